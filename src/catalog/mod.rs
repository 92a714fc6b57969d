//! The catalogue: what shall be (spec), what is (status) and a version, for volumes, snapshots and groups.
//!
//! # Invariants
//! * Level-triggered: an object says what is wanted *before* anyone acts on it, so whoever comes next can finish the work.
//! * An update is a compare-and-swap on the version; a lost race is [`UpdateError::Conflict`], never a lost change.
//! * What a call has answered is durable.
//! * A name is an index into its kind: unique, changed in the same commit as the object, never a file name or an id.
//!
//! # The seam
//! [`Catalog`] is the interface: get, find, list, watch, create, update, delete over any [`Object`]. It has one
//! implementation, the embedded one, so it is a type and not a trait. Kubernetes custom resources (`resourceVersion` is the
//! version, a label with a hash is the name index) come as a second module and turn the alias into an enum of the two.
//! That is why nothing here knows of redb, prost or kube.

mod embedded;
mod objects;

pub use embedded::Embedded;
pub use objects::{
    Access, AccessMode, BadConfiguration, CopySpec, Descriptor, FsType, GroupMember, GroupSnapshot, GroupStatus,
    MirrorSpec, Node, NodeName, Publication, Replication, Snapshot, SnapshotStatus, Source, Volume,
    VolumeConfiguration, VolumePhase, VolumeRequest, VolumeSpec, VolumeStatus,
};

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;

/// The catalogue of this installation.
pub type Catalog = Embedded;

/// Changes that a slow watcher may fall behind before it must list again: more than one CSI call of any kind makes.
pub const WATCH_BACKLOG: usize = 1024;

/// A kind of object.
pub trait Object: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// Name of the kind, and of its table.
    const KIND: &'static str;
    /// The object's key, unique in its kind and never changed.
    fn key(&self) -> String;
    /// The name that the outside world gave it, unique in its kind and never changed.
    fn name(&self) -> Option<&str>;
}

/// Which state of an object: grows with every change and is never used twice in a catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(u64);

/// An object as it was when it was read or written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored<T> {
    /// To be handed back to [`Catalog::update`].
    pub version: Version,
    /// The object.
    pub object: T,
}

/// Something happened to an object; what it is now is to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// [`Object::KIND`].
    pub kind: &'static str,
    /// [`Object::key`].
    pub key: String,
}

/// The catalogue cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("the catalogue {} is in use: another tandem serves this directory; stop it, or use another --dir", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A version of Tandem that this one does not know has written it.
    #[error("the catalogue {} has format {found}, this version of tandem knows {known}: use the version that wrote it", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// As written in the file.
        found: u32,
        /// What this version reads and writes.
        known: u32,
    },
    /// It cannot be read or is damaged.
    #[error(transparent)]
    Failed(#[from] CatalogError),
}

/// The catalogue does not work.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// What is in the file was not written like that.
    #[error(
        "the catalogue {} is damaged ({reason}): move it away and rebuild it from the disks with `tandem recover`",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The file cannot be read or written.
    #[error("the catalogue {} cannot be read or written: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// From the operating system.
        reason: String,
    },
}

/// Why an object was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// There is one with the same key or name.
    #[error("there is already a {kind} with this key or name: {key}")]
    Exists {
        /// [`Object::KIND`].
        kind: &'static str,
        /// Key of the one that is there.
        key: String,
    },
    /// The catalogue does not work.
    #[error(transparent)]
    Failed(#[from] CatalogError),
}

/// Why an object was not changed or deleted.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// Somebody else changed or deleted it since it was read.
    #[error("the {kind} {key} was changed by somebody else")]
    Conflict {
        /// [`Object::KIND`].
        kind: &'static str,
        /// [`Object::key`].
        key: String,
    },
    /// The catalogue does not work.
    #[error(transparent)]
    Failed(#[from] CatalogError),
}
