//! Why a call fails: one enum per RPC, so that each can only fail in the ways that its RPC has codes for.
//!
//! Invariant: a sentence says what happened, to what, and what to do; no error carries a secret. `status.rs` gives each
//! its code, `docs/errors.md` says what the sidecar then does.

use super::capability::CapabilityError;
use super::control::ControlError;
use super::operations::UnderWay;
use super::parameters::ParameterError;
use crate::catalog::{CatalogError, NodeName};
use crate::volume::{GroupSnapshotId, SnapshotId, VolumeId};
use thiserror::Error;

/// The request itself is wrong: every RPC.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ArgumentError {
    /// A field that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A text above the interface's limit.
    #[error("{field} is longer than {limit} bytes")]
    TooLong {
        /// Name of the field.
        field: &'static str,
        /// Bytes.
        limit: usize,
    },
    /// A control character.
    #[error("{field} has the control character U+{character:04X}")]
    Character {
        /// Name of the field.
        field: &'static str,
        /// Its code point.
        character: u32,
    },
    /// Less than makes sense.
    #[error("{field} is less than {limit}")]
    TooLow {
        /// Name of the field.
        field: &'static str,
        /// The least.
        limit: u64,
    },
    /// Below zero.
    #[error("{0} is negative")]
    Negative(&'static str),
    /// Named twice.
    #[error("{0} has a volume twice")]
    Duplicate(&'static str),
    /// A parameter.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// A capability.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
}

/// Not now: nothing is known to be wrong with the request, and repeating it converges. Every RPC.
#[derive(Debug, Error)]
pub enum Transient {
    /// Another call works on it.
    #[error(transparent)]
    UnderWay(#[from] UnderWay),
    /// Another call changed it meanwhile.
    #[error("the {0} was changed by another call meanwhile; repeat this one")]
    Conflict(String),
    /// The catalogue may have taken the change or not.
    #[error(
        "the catalogue did not answer ({reason}), so it is not known whether the {what} was changed; repeat the call"
    )]
    NoAnswer {
        /// Which object.
        what: String,
        /// Why there is no answer.
        reason: String,
    },
    /// The catalogue cannot be read or written.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The replica did not answer, or not what this call can use.
    #[error(transparent)]
    Replica(#[from] ControlError),
    /// The nodes have not done it yet.
    #[error(
        "the copies of volume {id} on {nodes} are not {done} yet; repeat the call until they are, or start those nodes"
    )]
    Waiting {
        /// The volume.
        id: VolumeId,
        /// What they have to be.
        done: &'static str,
        /// Comma separated.
        nodes: String,
    },
    /// Nobody orders the writes of a mirrored volume.
    #[error("no copy of volume {0} shall be its primary: publish it to a node once, then repeat the call")]
    NoPrimary(VolumeId),
    /// No node has announced itself, or not the one that it is about.
    #[error("{0}; `tandem replica` announces its node when it reaches the controller: repeat the call")]
    NoNode(String),
}

/// Sizes that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct RangeError(pub String);

macro_rules! rpc_errors {
    ($($(#[$doc:meta])* $name:ident { $($variants:tt)* })*) => {
        $($(#[$doc])*
        #[derive(Debug, Error)]
        pub enum $name {
            /// The request itself is wrong.
            #[error(transparent)]
            Argument(#[from] ArgumentError),
            /// Not now.
            #[error(transparent)]
            Transient(#[from] Transient),
            $($variants)*
        })*
    };
}

rpc_errors! {
    /// CreateVolume.
    CreateVolumeError {
        /// The name is taken by a volume that differs.
        #[error("volume {name:?} exists already with id {id} and differs in {what}; delete it or use another name")]
        Incompatible {
            /// The name.
            name: String,
            /// Who has it.
            id: VolumeId,
            /// The first difference.
            what: &'static str,
        },
        /// No such snapshot or volume.
        #[error("the source {0} does not exist")]
        SourceNotFound(String),
        /// The size is impossible.
        #[error("{0}")]
        Range(#[from] RangeError),
        /// No such pool on any node, or not on the node of the source.
        #[error("pool {pool:?} does not exist {place}; there are: {known}; see `tandem pool add`")]
        UnknownPool {
            /// As asked for.
            pool: String,
            /// Where it was looked for.
            place: String,
            /// Comma separated.
            known: String,
        },
        /// The volume must be elsewhere.
        #[error("{0}")]
        NotHere(String),
        /// The pool cannot promise the bytes.
        #[error("no room for the volume: {0}")]
        NoRoom(String),
        /// The content is on its way from another pool.
        #[error("volume {id} is being copied from its source: {copied} of {total} bytes; repeat the call until it is done")]
        Copying {
            /// The volume.
            id: VolumeId,
            /// Bytes.
            copied: u64,
            /// Bytes.
            total: u64,
        },
        /// The replica finds the request senseless.
        #[error("the volume cannot be made: {0}")]
        Refused(String),
    }
    /// DeleteVolume.
    DeleteVolumeError {
        /// Somebody uses it.
        #[error("volume {id} is in use: {by}; nothing was deleted")]
        InUse {
            /// The volume.
            id: VolumeId,
            /// By whom and what to do.
            by: String,
        },
    }
    /// ControllerPublishVolume.
    PublishError {
        /// No such volume.
        #[error("volume {0:?} does not exist")]
        VolumeNotFound(String),
        /// No such node.
        #[error("node {node:?} does not exist; there are: {known}")]
        NodeNotFound {
            /// As asked for.
            node: String,
            /// Comma separated.
            known: String,
        },
        /// The node does not hold the volume.
        #[error("volume {id} has no copy on node {node} and can be used on {holders} only")]
        NoCopy {
            /// The volume.
            id: VolumeId,
            /// As asked for.
            node: NodeName,
            /// Comma separated.
            holders: String,
        },
        /// Published to this node in another way.
        #[error("volume {id} is published to node {node} already, with another capability or read-only flag; unpublish it first")]
        Incompatible {
            /// The volume.
            id: VolumeId,
            /// The node.
            node: NodeName,
        },
        /// Published to another node.
        #[error("volume {id} is published to node {node}; unpublish it there first")]
        Elsewhere {
            /// The volume.
            id: VolumeId,
            /// Where.
            node: NodeName,
        },
        /// The copy there lacks acknowledged writes.
        #[error("the copy of volume {id} on node {node} is not up to date, so it cannot be used there; use another node, or wait")]
        NotUpToDate {
            /// The volume.
            id: VolumeId,
            /// As asked for.
            node: NodeName,
        },
        /// The catalogue was lost, and not every copy has been read since.
        #[error(
            "volume {id} cannot be used yet: the catalogue was rebuilt and not every copy of it was read; bring its nodes back \
             and run `tandem recover` again, or give copies up with `tandem promote {id} NODE --force`"
        )]
        NoConfiguration {
            /// The volume.
            id: VolumeId,
        },
        /// The node has as many as it may.
        #[error("node {node} has its {limit} volumes already; unpublish one or raise --max-volumes-per-node")]
        NodeFull {
            /// The node.
            node: NodeName,
            /// --max-volumes-per-node.
            limit: u32,
        },
    }
    /// ControllerUnpublishVolume.
    UnpublishError {}
    /// ValidateVolumeCapabilities.
    ValidateError {
        /// No such volume.
        #[error("volume {0:?} does not exist")]
        NotFound(String),
    }
    /// ControllerGetVolume.
    GetVolumeError {
        /// No such volume.
        #[error("volume {0:?} does not exist")]
        NotFound(String),
    }
    /// ControllerGetVolumeHealth.
    VolumeHealthError {
        /// No such volume.
        #[error("volume {0:?} does not exist")]
        NotFound(String),
    }
    /// ListVolumes, ControllerListVolumeHealth and ListSnapshots.
    ListError {
        /// Not from an earlier answer.
        #[error("starting_token {0:?} is not from an answer of this driver; list again from the start")]
        Token(String),
    }
    /// GetCapacity.
    CapacityError {}
    /// ControllerExpandVolume.
    ExpandError {
        /// No such volume.
        #[error("volume {0:?} does not exist")]
        NotFound(String),
        /// The size is impossible.
        #[error("{0}")]
        Range(#[from] RangeError),
        /// The pool cannot promise the bytes.
        #[error("no room to grow the volume: {0}")]
        NoRoom(String),
    }
    /// ControllerModifyVolume.
    ModifyError {
        /// No such volume.
        #[error("volume {0:?} does not exist")]
        NotFound(String),
        /// The replica finds the request senseless; nothing was changed.
        #[error("the volume cannot be changed like that: {0}")]
        Refused(String),
        /// No nodes for more copies; nothing was changed.
        #[error("no room for more copies of the volume: {0}")]
        NoRoom(String),
    }
    /// What a person asks for a volume's copies.
    OperatorError {
        /// No such volume.
        #[error("volume {0:?} does not exist")]
        NotFound(String),
        /// It has but one.
        #[error("volume {0} has one copy; `tandem volume modify --parameter replication=sync` gives it another one")]
        Single(VolumeId),
        /// It is used there.
        #[error("volume {id} is published to node {node}; unpublish it there first")]
        InUse {
            /// The volume.
            id: VolumeId,
            /// Where.
            node: NodeName,
        },
        /// No copy on that node.
        #[error("volume {id} has no copy on node {node}; its copies are on {holders}")]
        NoCopy {
            /// The volume.
            id: VolumeId,
            /// As asked for.
            node: NodeName,
            /// Comma separated.
            holders: String,
        },
        /// The copy there lacks acknowledged writes.
        #[error("the copy of volume {id} on node {node} is not up to date and cannot be primary; use another one, or wait")]
        NotUpToDate {
            /// The volume.
            id: VolumeId,
            /// As asked for.
            node: NodeName,
        },
        /// No place for another copy.
        #[error("no place for the copy: {0}")]
        NoPlace(String),
        /// The reserve for a snapshot cannot be had.
        #[error("no room for the snapshot by which the copies are compared: {0}")]
        NoRoom(String),
        /// Nothing to compare it with.
        #[error("only the copy of volume {id} on {node} is up to date: there is nothing to compare it with; see `tandem volume copies {id}`")]
        Alone {
            /// The volume.
            id: VolumeId,
            /// Where.
            node: String,
        },
        /// It is the one that the others are made equal to.
        #[error("the copy of volume {id} on node {node} is its primary: other copies are made equal to it; promote another one first")]
        IsPrimary {
            /// The volume.
            id: VolumeId,
            /// As asked for.
            node: NodeName,
        },
        /// Nothing to make it equal to.
        #[error("volume {0} has no primary: no copy is known to have every acknowledged write. Publish it, or promote a copy")]
        NoPrimary(VolumeId),
        /// The primary does not do it.
        #[error("the copy is not resynced: {0}")]
        NotResynced(String),
    }
    /// CreateSnapshot.
    CreateSnapshotError {
        /// No such volume.
        #[error("the source volume {0:?} does not exist")]
        SourceNotFound(String),
        /// The name is taken by a snapshot of another volume.
        #[error("snapshot {name:?} exists already with id {id}, of volume {volume}; delete it or use another name")]
        Incompatible {
            /// The name.
            name: String,
            /// Who has it.
            id: SnapshotId,
            /// Of what.
            volume: VolumeId,
        },
        /// The snapshot must be elsewhere.
        #[error("the snapshot is where its volume is, on {0}, and must be reachable from other nodes only")]
        NotHere(String),
        /// The reserve cannot be had.
        #[error("no room for the snapshot: {0}")]
        NoRoom(String),
    }
    /// DeleteSnapshot.
    DeleteSnapshotError {
        /// It goes with its group.
        #[error("snapshot {id} is a member of group snapshot {group}; delete the group")]
        Grouped {
            /// The snapshot.
            id: SnapshotId,
            /// Its group.
            group: GroupSnapshotId,
        },
        /// Somebody uses it.
        #[error("snapshot {id} is in use: {by}")]
        InUse {
            /// The snapshot.
            id: SnapshotId,
            /// By whom and what to do.
            by: String,
        },
    }
    /// GetSnapshot.
    GetSnapshotError {
        /// No such snapshot.
        #[error("snapshot {0:?} does not exist")]
        NotFound(String),
    }
    /// CreateVolumeGroupSnapshot.
    CreateGroupError {
        /// No such volume.
        #[error("the source volume {0} does not exist")]
        SourceNotFound(String),
        /// The name is taken by a group of other volumes.
        #[error("group snapshot {name:?} exists already with id {id}, of other volumes; delete it or use another name")]
        Incompatible {
            /// The name.
            name: String,
            /// Who has it.
            id: GroupSnapshotId,
        },
        /// Nobody can stop the writes of several nodes at one moment.
        #[error("the volumes are on different nodes ({0}): a group snapshot needs all of them on one")]
        Apart(String),
        /// The reserve cannot be had for all of them.
        #[error("no room for the snapshots: {0}")]
        NoRoom(String),
    }
    /// DeleteVolumeGroupSnapshot.
    DeleteGroupError {
        /// The caller's list differs.
        #[error("group snapshot {0} has other snapshots than those in snapshot_ids; nothing was deleted")]
        Mismatch(GroupSnapshotId),
        /// Somebody uses a member.
        #[error("group snapshot {id} is in use: {by}")]
        InUse {
            /// The group.
            id: GroupSnapshotId,
            /// By whom and what to do.
            by: String,
        },
    }
    /// GetVolumeGroupSnapshot.
    GetGroupError {
        /// No such group.
        #[error("group snapshot {0:?} does not exist")]
        NotFound(String),
        /// The caller's list differs.
        #[error("group snapshot {0} has other snapshots than those in snapshot_ids")]
        Mismatch(GroupSnapshotId),
    }
    /// GetMetadataAllocated and GetMetadataDelta.
    MetadataError {
        /// No such snapshot.
        #[error("snapshot {0:?} does not exist")]
        NotFound(String),
        /// Below zero or past the end.
        #[error("starting_offset {offset} is not within the {size} bytes of the snapshot")]
        Offset {
            /// As asked for.
            offset: i64,
            /// Bytes.
            size: u64,
        },
        /// Nothing to compare.
        #[error("snapshots {base} and {target} are of different volumes")]
        OtherVolume {
            /// The older one.
            base: SnapshotId,
            /// The newer one.
            target: SnapshotId,
        },
        /// The replica finds the request senseless.
        #[error("the snapshots cannot be compared: {0}")]
        Refused(String),
    }
}
