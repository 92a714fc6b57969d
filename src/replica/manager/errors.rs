//! What can go wrong, one enum per kind of operation, each with its gRPC code in one exhaustive match.

use super::unopened::Unopened;
use crate::replica::engine::{AsideError, AttachError, ControlError, DetachError, EngineError};
use crate::replica::operations::Busy;
use crate::replica::pool::promises::NotEnough;
use crate::replica::pool::{PoolError, PoolName};
use crate::replica::records::RecordError;
use crate::store::{ControlError as Refusal, CreateError, Inconsistent, OpenError};
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use std::io;
use tonic::{Code, Status};

/// A volume could not be made, changed or deleted.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's sentence is its documentation")]
pub enum VolumeFailure {
    #[error("there is no pool {0}; `tandem pool list` shows the pools of this node")]
    NoPool(PoolName),
    #[error("there is no volume {0} on this node")]
    NoVolume(VolumeId),
    #[error("there is no snapshot {0} on this node")]
    NoSnapshot(SnapshotId),
    #[error("volume {volume} exists with {found} bytes in pool {pool}")]
    Different { volume: VolumeId, found: u64, pool: PoolName },
    #[error("volume {volume}: {wanted} bytes are less than the {source_bytes} of its source")]
    SmallerThanSource { volume: VolumeId, wanted: u64, source_bytes: u64 },
    #[error("pool {pool} is full: {error}; delete volumes or snapshots, or add a larger pool")]
    PoolFull { pool: PoolName, error: NotEnough },
    #[error("volume {0} is attached to this node; unpublish it first")]
    Attached(VolumeId),
    #[error("volume {0} was used: a catalogue that calls it half made is an old one; use `tandem recover`")]
    Written(VolumeId),
    #[error("volume {0} is still being copied")]
    NotReady(VolumeId),
    #[error("volume {0} is mirrored: its copies go when its object in the catalogue says so")]
    Mirrored(VolumeId),
    #[error(
        "the copy of volume {0} on this node does not serve, or may lack acknowledged writes: no other copy is made equal to it"
    )]
    NoSource(VolumeId),
    #[error("the copy of volume {0} on this node is its primary and does not serve yet")]
    NotServing(VolumeId),
    #[error("the primary of volume {volume} knows no other copy {copy}")]
    NoOther { volume: VolumeId, copy: InstanceId },
    #[error("volume {volume} has another copy on this node, {found}; it has to go first")]
    OtherCopy { volume: VolumeId, found: InstanceId },
    #[error(
        "volume {volume}: its copy {wanted} begins with snapshot {snapshot}, which copy {found} in pool {pool} has"
    )]
    Elsewhere { volume: VolumeId, wanted: InstanceId, snapshot: SnapshotId, found: InstanceId, pool: PoolName },
    #[error("a copy of volume {volume} begins with a snapshot of volume {source_volume}, not with the volume itself")]
    NoSnapshotOf { volume: VolumeId, source_volume: VolumeId },
    #[error("volume {volume}: its copy {tree} cannot be opened ({problem}); repair it or give the volume another copy")]
    Broken { volume: VolumeId, tree: InstanceId, problem: String },
    #[error("{0}")]
    Unopened(#[from] Unopened),
    #[error("volume {volume}: {error}")]
    Busy { volume: VolumeId, error: Busy },
    #[error("volume {volume}: {error}")]
    Control { volume: VolumeId, error: ControlError },
    #[error("volume {volume}: {error}")]
    Engine { volume: VolumeId, error: EngineError },
    #[error("volume {volume}: {error}")]
    Create { volume: VolumeId, error: CreateError },
    #[error("volume {volume}: {error}")]
    Open { volume: VolumeId, error: OpenError },
    #[error("volume {volume}: {error}")]
    Record { volume: VolumeId, error: RecordError },
    #[error("volume {volume}: {what}: {error}")]
    Io { volume: VolumeId, what: &'static str, error: io::Error },
}

impl From<VolumeFailure> for Status {
    fn from(failure: VolumeFailure) -> Self {
        use VolumeFailure as F;
        let code = match &failure {
            F::NoPool(_) | F::NoVolume(_) | F::NoSnapshot(_) => Code::NotFound,
            F::Different { .. } => Code::AlreadyExists,
            F::SmallerThanSource { .. } => Code::OutOfRange,
            F::PoolFull { .. } => Code::ResourceExhausted,
            F::Attached(_) | F::Written(_) | F::Mirrored(_) | F::NoSource(_) | F::NoOther { .. } => {
                Code::FailedPrecondition
            }
            F::NotReady(_) | F::Busy { .. } | F::OtherCopy { .. } | F::NotServing(_) => Code::Aborted,
            F::Elsewhere { .. } | F::NoSnapshotOf { .. } => Code::InvalidArgument,
            F::Control { error, .. } => control_code(error),
            // Something may be half made: the caller shall come again, not give up.
            F::Engine { .. } | F::Create { .. } | F::Record { .. } | F::Io { .. } | F::Unopened(_) => Code::Unavailable,
            F::Open { .. } | F::Broken { .. } => Code::DataLoss,
        };
        Status::new(code, failure.to_string())
    }
}

/// What the store's refusal means to a caller.
fn control_code(error: &ControlError) -> Code {
    match error {
        ControlError::Store(Refusal::UnknownVolume(_) | Refusal::UnknownSnapshot(_)) => Code::NotFound,
        ControlError::Store(Refusal::TooManySnapshots(_)) => Code::ResourceExhausted,
        ControlError::Store(Refusal::SizeSmaller(_)) => Code::OutOfRange,
        ControlError::Store(Refusal::Exists) => Code::AlreadyExists,
        ControlError::Store(Refusal::Busy) => Code::Aborted,
        ControlError::Engine(EngineError::VolumeAttached(_)) => Code::FailedPrecondition,
        ControlError::Engine(EngineError::NotPrimary(_)) => Code::Aborted,
        ControlError::Store(Refusal::Disk(_)) | ControlError::Engine(_) => Code::Unavailable,
    }
}

/// A snapshot could not be made or deleted.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's sentence is its documentation")]
pub enum SnapshotFailure {
    #[error("there is no volume {0} on this node")]
    NoVolume(VolumeId),
    #[error("there is no snapshot {0} on this node")]
    NoSnapshot(SnapshotId),
    #[error("snapshot {0} exists and is of another volume")]
    Different(SnapshotId),
    #[error("snapshot {0} may have been taken by some copies before: it has to be deleted, and another one taken")]
    TakenBefore(SnapshotId),
    #[error("snapshots {base} and {target} are not an older and a newer one of the same volume")]
    NotOfOneVolume { base: SnapshotId, target: SnapshotId },
    #[error("snapshots {base} and {target} are in different branches on this node: more than differs would be named")]
    InBranches { base: SnapshotId, target: SnapshotId },
    #[error("pool {pool} cannot hold a full overwrite after this snapshot: {error}; delete snapshots or volumes")]
    PoolFull { pool: PoolName, error: NotEnough },
    #[error("volume {0} is still being copied")]
    NotReady(VolumeId),
    #[error("snapshot {snapshot}: its map is inconsistent: {what}; run `tandem verify`")]
    Damaged { snapshot: SnapshotId, what: Inconsistent },
    #[error("{0}")]
    Unopened(#[from] Unopened),
    #[error("{0}")]
    Busy(#[from] Busy),
    #[error("{0}")]
    Control(#[from] ControlError),
    #[error("{0}")]
    Engine(#[from] EngineError),
    #[error("{0}")]
    Record(#[from] RecordError),
}

impl From<SnapshotFailure> for Status {
    fn from(failure: SnapshotFailure) -> Self {
        use SnapshotFailure as F;
        let code = match &failure {
            F::NoVolume(_) | F::NoSnapshot(_) => Code::NotFound,
            F::Different(_) => Code::AlreadyExists,
            F::NotOfOneVolume { .. } => Code::InvalidArgument,
            F::InBranches { .. } => Code::FailedPrecondition,
            F::PoolFull { .. } => Code::ResourceExhausted,
            F::NotReady(_) | F::Busy(_) | F::TakenBefore(_) | F::Engine(EngineError::NotPrimary(_)) => Code::Aborted,
            F::Control(error) => control_code(error),
            F::Damaged { .. } => Code::DataLoss,
            F::Engine(_) | F::Record(_) | F::Unopened(_) => Code::Unavailable,
        };
        Status::new(code, failure.to_string())
    }
}

/// A snapshot could not be brought over from another node. What is said of it goes to the controller as a sentence.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's sentence is its documentation")]
pub enum FillFailure {
    #[error("there is no copy {copy} of volume {volume} on this node")]
    NoCopy { volume: VolumeId, copy: InstanceId },
    #[error("snapshot {0} may be in a pool or copy of this node that cannot be opened; see `tandem pool list`")]
    MayBeHere(SnapshotId),
    #[error("snapshot {0} is deleted")]
    Deleted(SnapshotId),
    #[error("{0}")]
    Volume(#[from] VolumeFailure),
    #[error("{0}")]
    Snapshot(#[from] SnapshotFailure),
    #[error("{0}")]
    Control(#[from] ControlError),
    #[error("{0}")]
    Engine(#[from] EngineError),
    #[error("{0}")]
    Write(#[from] AsideError),
    #[error("{0}")]
    Busy(#[from] Busy),
}

/// What keeps a snapshot from being deleted for now.
impl From<FillFailure> for SnapshotFailure {
    fn from(failure: FillFailure) -> Self {
        use FillFailure as F;
        match failure {
            F::Snapshot(failure) => failure,
            F::Control(error) | F::Volume(VolumeFailure::Control { error, .. }) => Self::Control(error),
            F::Engine(error) | F::Write(AsideError::Engine(error)) => Self::Engine(error),
            F::Busy(error) => Self::Busy(error),
            F::Write(AsideError::Disk(error)) => Self::Control(ControlError::Store(Refusal::Disk(error))),
            F::NoCopy { volume, .. } => Self::NoVolume(volume),
            F::Volume(_) | F::MayBeHere(_) | F::Deleted(_) => Self::Busy(Busy),
        }
    }
}

/// A device could not be made or taken away.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's sentence is its documentation")]
pub enum AttachFailure {
    #[error("there is no volume {0} on this node")]
    NoVolume(VolumeId),
    #[error("volume {0} is still being copied")]
    NotReady(VolumeId),
    #[error("the copy of volume {0} on this node is not open yet; repeat the call")]
    NotOpen(VolumeId),
    #[error(
        "volume {0} shall not be used on this node: another copy is wished to be its primary, or none; publish it here first"
    )]
    NotWished(VolumeId),
    #[error(
        "volume {0} is not served to this node yet (a copy waits for others, for the catalogue, or makes copies equal); see `tandem volume show {0}`, and repeat the call"
    )]
    NotServed(VolumeId),
    #[error("volume {volume} is mirrored, and the catalogue cannot be asked who shall use it: {problem}")]
    NoCatalogue { volume: VolumeId, problem: String },
    #[error("{0}")]
    Unopened(#[from] Unopened),
    #[error("{0}")]
    Busy(#[from] Busy),
    #[error("volume {volume}: {error}")]
    Attach { volume: VolumeId, error: AttachError },
    #[error("volume {volume}: {error}")]
    Detach { volume: VolumeId, error: DetachError },
    #[error("volume {0} has no other copy: its device is not given up")]
    Only(VolumeId),
    #[error("volume {0} is served here: its device is not given up")]
    Served(VolumeId),
    #[error("volume {volume}: {error}")]
    Status { volume: VolumeId, error: EngineError },
}

impl From<AttachFailure> for Status {
    fn from(failure: AttachFailure) -> Self {
        use AttachFailure as F;
        let code = match &failure {
            F::NoVolume(_) => Code::NotFound,
            F::NotReady(_) | F::Busy(_) | F::NotOpen(_) | F::NotServed(_) => Code::Aborted,
            F::NotWished(_) | F::Only(_) | F::Served(_) => Code::FailedPrecondition,
            F::Attach { .. } | F::NoCatalogue { .. } | F::Status { .. } | F::Unopened(_) => Code::Unavailable,
            // In use, until it is given up.
            F::Detach {
                error:
                    DetachError::Busy(_) | DetachError::Engine(EngineError::DeviceLeft(_) | EngineError::CopyWaits(_)),
                ..
            } => Code::FailedPrecondition,
            F::Detach { .. } => Code::Unavailable,
        };
        Status::new(code, failure.to_string())
    }
}

/// A pool could not be added.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's sentence is its documentation")]
pub enum PoolFailure {
    #[error("{0}")]
    Name(#[from] crate::replica::pool::BadPoolName),
    #[error("pool {0} exists already with another path")]
    Exists(PoolName),
    #[error("{0}")]
    Pool(#[from] PoolError),
    #[error("the list of pools cannot be written: {0}")]
    List(io::Error),
    #[error("{0}")]
    Busy(#[from] Busy),
}

impl From<PoolFailure> for Status {
    fn from(failure: PoolFailure) -> Self {
        use PoolFailure as F;
        let code = match &failure {
            F::Name(_) => Code::InvalidArgument,
            F::Exists(_) => Code::AlreadyExists,
            F::Pool(_) => Code::FailedPrecondition,
            F::List(_) => Code::Unavailable,
            F::Busy(_) => Code::Aborted,
        };
        Status::new(code, failure.to_string())
    }
}
