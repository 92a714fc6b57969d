//! The catalogue: what shall be (spec), what is (status) and a version, for volumes, their configurations, snapshots,
//! groups and nodes.
//!
//! # Invariants
//! * Level-triggered: an object says what is wanted *before* anyone acts on it, so whoever comes next can finish the work.
//! * An update is a compare-and-swap on the version; a lost race is [`UpdateError::Conflict`], never a lost change.
//! * What a call has answered is durable.
//! * A name is an index into its kind: unique, changed in the same commit as the object, never a file name or an id.
//!
//! # The seam
//! [`Catalog`] is the interface: get, find, list, watch, create, update, delete over any [`Object`]. It is an enum of a file
//! on this machine ([`Embedded`]) and of a client of another machine's ([`Remote`], served by [`serve`]). Kubernetes custom
//! resources (`resourceVersion` is the version, a label with a hash is the name index) come as a third variant. That is
//! why nothing here knows of redb, prost or kube.

mod access;
mod configuration;
mod embedded;
mod objects;
mod remote;
mod server;
#[cfg(test)]
mod tests;
mod watch;

pub use configuration::ConfigurationError;
pub use embedded::Embedded;
pub use objects::{
    Access, AccessMode, BadConfiguration, Base, ClientSpec, CopyReport, CopySpec, Descriptor, FsType, GivenUp,
    GroupMember, GroupSnapshot, GroupStatus, MirrorSpec, Missed, Node, NodeName, Publication, Reach, Rebuild,
    RebuildAfter, Replication, Snapshot, SnapshotStatus, Source, Volume, VolumeConfiguration, VolumePhase,
    VolumeRequest, VolumeSpec, VolumeStatus,
};

pub use remote::{CALL_LIMIT, Remote};
pub use server::serve;
pub use watch::{Seen, Watch};

use crate::protocol::Generation;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// The catalogue of this installation or cluster; clones are the same one.
#[derive(Clone)]
pub enum Catalog {
    /// A file on this machine.
    Embedded(Embedded),
    /// Another machine's.
    Remote(Remote),
}

/// Changes that a slow watcher may fall behind before it must list again: more than one CSI call of any kind makes.
pub const WATCH_BACKLOG: usize = 1024;

/// Bytes of the largest object: maps of CSI have 4 KiB each, and a volume has a few of them and its nodes.
pub const MAX_OBJECT: usize = 256 << 10;

/// Bytes of the largest message: one object and what names it.
const MAX_MESSAGE: usize = MAX_OBJECT + (16 << 10);

/// The kind with this name, if this version knows it.
fn kind(name: &str) -> Option<&'static str> {
    let kinds = [Volume::KIND, Snapshot::KIND, GroupSnapshot::KIND, Node::KIND, VolumeConfiguration::KIND];
    kinds.into_iter().find(|kind| *kind == name)
}

/// The same call of whichever it is.
macro_rules! either {
    ($catalog:expr, $inner:ident => $call:expr) => {
        match $catalog {
            Self::Embedded($inner) => $call,
            Self::Remote($inner) => $call,
        }
    };
}

impl Catalog {
    /// Opens the one in this file, or makes an empty one where there is none. Checks every page and every value: blocking.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Embedded::open(path).map(Self::Embedded)
    }

    /// The object with this key.
    pub async fn get<T: Object>(&self, key: &str) -> Result<Option<Stored<T>>, CatalogError> {
        either!(self, catalog => catalog.get(key).await)
    }

    /// The object with this name.
    pub async fn find<T: Object>(&self, name: &str) -> Result<Option<Stored<T>>, CatalogError> {
        either!(self, catalog => catalog.find(name).await)
    }

    /// All objects of the kind, ordered by key.
    pub async fn list<T: Object>(&self) -> Result<Vec<Stored<T>>, CatalogError> {
        either!(self, catalog => catalog.list().await)
    }

    /// Changes from now on, of all kinds; of another machine's catalogue from the first [`Seen::FellBehind`] on. Whoever
    /// watches lists when it begins and after each of those. Must be called on a runtime.
    pub fn watch(&self) -> Watch {
        either!(self, catalog => catalog.watch())
    }

    /// Puts a new object in.
    pub async fn create<T: Object>(&self, object: T) -> Result<Stored<T>, CreateError> {
        either!(self, catalog => catalog.create(object).await)
    }

    /// Replaces the object that was read as `stored.version` by `stored.object`.
    pub async fn update<T: Object>(&self, stored: Stored<T>) -> Result<Stored<T>, UpdateError> {
        either!(self, catalog => catalog.update(stored).await)
    }

    /// Takes out the object that was read as `stored.version`. One that is gone already is success.
    pub async fn delete<T: Object>(&self, stored: &Stored<T>) -> Result<(), UpdateError> {
        either!(self, catalog => catalog.delete(stored).await)
    }

    /// Raises the generation above its own and above the highest that was found on the disks; returns the new one. Only where
    /// the catalogue is.
    pub async fn raise_generation(&self, found: Generation) -> Result<Generation, CatalogError> {
        match self {
            Self::Embedded(catalog) => catalog.raise_generation(found).await,
            Self::Remote(catalog) => Err(catalog.not_here("its generation is raised by its controller only")),
        }
    }

    /// The catalogue's generation: 0 until it was rebuilt from the disks for the first time.
    pub async fn generation(&self) -> Result<Generation, CatalogError> {
        either!(self, catalog => catalog.generation().await)
    }
}

/// A kind of object.
pub trait Object: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// Name of the kind, and of its table.
    const KIND: &'static str;
    /// The object's key, unique in its kind and never changed.
    fn key(&self) -> String;
    /// The name that the outside world gave it, unique in its kind. It may be given up, and is never another one.
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
    /// Another machine's catalogue does not answer. Nothing is known to be wrong with the call.
    #[error(
        "the catalogue at {server} cannot be reached ({reason}): check that `tandem controller` runs there and that its \
         address and the network are right; volumes that are in use go on meanwhile"
    )]
    Unreachable {
        /// Its address.
        server: String,
        /// What was tried last.
        reason: String,
    },
    /// Another machine's catalogue does not do it, and will not if it is asked again.
    #[error("the catalogue at {server} refuses: {reason}")]
    Refused {
        /// Its address.
        server: String,
        /// In its words.
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
    /// No answer came: read whether it is there, or will be.
    #[error("it is not known whether the {kind} {key} was created ({reason}): read it back")]
    Ambiguous {
        /// [`Object::KIND`].
        kind: &'static str,
        /// [`Object::key`].
        key: String,
        /// Why there is no answer.
        reason: String,
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
    /// No answer came: it may have happened, happen later, or never. Read it back.
    #[error("it is not known whether the {kind} {key} was changed ({reason}): read it back")]
    Ambiguous {
        /// [`Object::KIND`].
        kind: &'static str,
        /// [`Object::key`].
        key: String,
        /// Why there is no answer.
        reason: String,
    },
    /// The catalogue does not work.
    #[error(transparent)]
    Failed(#[from] CatalogError),
}
