//! Why a call of the Node service failed, one enum per call.
//!
//! Invariant: each message says what happened, to which volume or path, and what to do.

use super::path::PathError;
use super::records::{RecordError, Staged};
use super::steps::Interrupted;
use crate::csi::capability::CapabilityError;
use crate::csi::control::ControlError;
use crate::csi::operations::UnderWay;
use crate::mount::{Filesystem, GrowError, MountError, MountTableError, OptionError, PrepareError, UnmountError};
use crate::volume::VolumeId;
use std::io::Error;
use std::path::PathBuf;
use thiserror::Error as Cause;

/// What is wrong with a request before anything is looked at.
#[derive(Debug, Cause)]
pub enum RequestError {
    /// A field is empty.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// No such volume.
    #[error("this volume does not exist")]
    UnknownVolume,
    /// Another call works on it.
    #[error(transparent)]
    UnderWay(#[from] UnderWay),
}

/// Why a volume is not staged.
#[derive(Debug, Cause)]
pub enum StageError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The capability.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// A mount option.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The caller makes the staging directory.
    #[error("the staging path {0} is not a directory: the caller makes it")]
    NotADirectory(PathBuf),
    /// Its contents are not all here yet.
    #[error("volume {volume} is still being copied ({copied} of {to_copy} bytes); repeat the call later")]
    Copying {
        /// The volume.
        volume: VolumeId,
        /// Bytes that are here.
        copied: u64,
        /// All bytes.
        to_copy: u64,
    },
    /// Staged with another capability, or at another path.
    #[error("volume {} is staged at {} already, in another way or for another path; unstage it there first", .0.volume, .0.staging.display())]
    Elsewhere(Box<Staged>),
    /// Something else is mounted there.
    #[error("something else is mounted at the staging path {0}; unmount it first")]
    Occupied(PathBuf),
    /// The device that the replica named is not there.
    #[error("device {device}: {source}")]
    Device {
        /// The device.
        device: PathBuf,
        /// Why.
        source: Error,
    },
    /// The filesystem.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The filesystem after the mount.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel's table.
    #[error(transparent)]
    Table(#[from] MountTableError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ControlError),
    /// A test.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Why a volume is not unstaged.
#[derive(Debug, Cause)]
pub enum UnstageError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Unpublish comes first.
    #[error("volume {volume} is still published at {target}; unpublish it first")]
    Published {
        /// The volume.
        volume: VolumeId,
        /// One of its targets.
        target: PathBuf,
    },
    /// It is busy, or umount failed.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// The read-only twin does not go away.
    #[error("the read-only device over {device} cannot be removed: {source}; end what has it open, then repeat")]
    Twin {
        /// The volume's device.
        device: PathBuf,
        /// Why.
        source: Error,
    },
    /// The kernel's table.
    #[error(transparent)]
    Table(#[from] MountTableError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ControlError),
    /// A test.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Why a volume is not published.
#[derive(Debug, Cause)]
pub enum PublishError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The capability.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// A mount option.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The node stages.
    #[error("staging_target_path is missing: this driver stages volumes before it publishes them")]
    NoStagingPath,
    /// Not staged, or no longer.
    #[error("volume {0} is not staged on this node; stage it first")]
    NotStaged(VolumeId),
    /// Staged at another path.
    #[error("volume {volume} is staged at {staging}, not at the given path")]
    StagedElsewhere {
        /// The volume.
        volume: VolumeId,
        /// Where it is staged.
        staging: PathBuf,
    },
    /// Both paths are one.
    #[error("target path {0} is the staging path; give another one")]
    TargetIsStaging(PathBuf),
    /// Staged as a device and published as a filesystem, or as another filesystem.
    #[error("volume {0} is staged as another access type or filesystem than the one asked for; unstage it first")]
    NotAsStaged(VolumeId),
    /// Options of a filesystem are fixed when it is staged.
    #[error("volume {0} is staged without some of these mount options, and a published path cannot add them")]
    NewOptions(VolumeId),
    /// The same target with other arguments.
    #[error("volume {volume} is published at {target} in another way; unpublish it first")]
    Otherwise {
        /// The volume.
        volume: VolumeId,
        /// The target.
        target: PathBuf,
    },
    /// The access mode allows one target.
    #[error("volume {volume} is published at {target}, and its access mode allows one target only")]
    OnlyOnce {
        /// The volume.
        volume: VolumeId,
        /// The other target.
        target: PathBuf,
    },
    /// Something else is there.
    #[error("target path {0} holds something else already; remove it first")]
    Occupied(PathBuf),
    /// The target cannot be made.
    #[error("target path {target}: {source}")]
    Target {
        /// The target.
        target: PathBuf,
        /// Why.
        source: Error,
    },
    /// No read-only device over the volume's device.
    #[error("no read-only device over {device}: {source}")]
    Twin {
        /// The volume's device.
        device: PathBuf,
        /// Why.
        source: Error,
    },
    /// The mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel's table.
    #[error(transparent)]
    Table(#[from] MountTableError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ControlError),
    /// A test.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Why a volume is not unpublished.
#[derive(Debug, Cause)]
pub enum UnpublishError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Something else is mounted there.
    #[error("what is mounted at {target} is not volume {volume}; it is left alone")]
    NotOurs {
        /// The volume.
        volume: VolumeId,
        /// The target.
        target: PathBuf,
    },
    /// Files are below the target, and not in the volume.
    #[error("target path {0} is not empty although the volume is not mounted there; it is not removed")]
    NotEmpty(PathBuf),
    /// The target cannot be removed.
    #[error("target path {target}: {source}")]
    Target {
        /// The target.
        target: PathBuf,
        /// Why.
        source: Error,
    },
    /// The read-only twin does not go away.
    #[error("the read-only device over {device} cannot be removed: {source}; end what has it open, then repeat")]
    Twin {
        /// The volume's device.
        device: PathBuf,
        /// Why.
        source: Error,
    },
    /// It is busy, or umount failed.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// The kernel's table.
    #[error(transparent)]
    Table(#[from] MountTableError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ControlError),
    /// A test.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Why there are no statistics.
#[derive(Debug, Cause)]
pub enum StatsError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// No such volume on this node.
    #[error("this volume is not on this node")]
    UnknownVolume,
    /// Not at that path.
    #[error("volume {0} is not at the given path")]
    NotThere(VolumeId),
    /// The kernel does not answer.
    #[error("volume {volume} cannot be measured: {source}")]
    Failed {
        /// The volume.
        volume: VolumeId,
        /// Why.
        source: Error,
    },
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Why a volume was not grown.
#[derive(Debug, Cause)]
pub enum ExpandError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The capability.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// A size below zero.
    #[error("capacity_range: {0} is negative")]
    Negative(i64),
    /// A capability that is not the one it is staged with.
    #[error("volume {0} is staged as another access type than the capability says")]
    OtherAccess(VolumeId),
    /// Not on this node, or not at that path.
    #[error("this volume is not at the given path on this node")]
    NotThere,
    /// The controller has not grown it, or grew it further.
    #[error(
        "volume {volume} has {size} bytes, which is not between {required} and {limit}; expand it at the controller first"
    )]
    OutOfRange {
        /// The volume.
        volume: VolumeId,
        /// Bytes it has.
        size: u64,
        /// Bytes asked for.
        required: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// The device is smaller than its volume.
    #[error("{device} still has {found} bytes instead of {size}; repeat the call")]
    DeviceBehind {
        /// The device.
        device: PathBuf,
        /// Bytes it has.
        found: u64,
        /// Bytes of the volume.
        size: u64,
    },
    /// The device.
    #[error("device {device}: {source}")]
    Device {
        /// The device.
        device: PathBuf,
        /// Why.
        source: Error,
    },
    /// A mounted ext4, and no right to grow it.
    #[error("volume {volume}: {}", GrowError::Capability)]
    Mounted {
        /// The volume.
        volume: VolumeId,
    },
    /// The filesystem.
    #[error("volume {volume}, {filesystem}: {source}")]
    Grow {
        /// The volume.
        volume: VolumeId,
        /// Its filesystem.
        filesystem: Filesystem,
        /// Why.
        source: GrowError,
    },
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ControlError),
    /// A test.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Why the health of a volume is not known.
#[derive(Debug, Cause)]
pub enum HealthError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// No such volume.
    #[error("this volume does not exist")]
    UnknownVolume,
    /// The kernel's table.
    #[error(transparent)]
    Table(#[from] MountTableError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ControlError),
}
