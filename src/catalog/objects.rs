//! The objects of the catalogue.
//!
//! Invariants: `request` is what the caller asked for and never changes (a repeated call is compared with it);
//! `spec` is what is wanted now; `status` is what the replica has confirmed.

mod mirror;
mod node;

pub use mirror::{
    BadConfiguration, ClientSpec, CopyReport, CopySpec, MirrorSpec, Missed, Reach, Rebuild, RebuildAfter, Replication,
    VolumeConfiguration,
};
pub use node::{GivenUp, Node};

use super::Object;
use crate::volume::{GroupSnapshotId, InstanceId, SnapshotId, VolumeId, VolumeSize};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A node of the cluster, by the name that its kubelet (or the operator) gave it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(pub String);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Filesystems that Tandem makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    /// ext4, the default.
    Ext4,
    /// XFS.
    Xfs,
}

impl FsType {
    /// As in a StorageClass and in mount(8).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
    /// `None` for a filesystem that Tandem does not make.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "ext4" => Some(Self::Ext4),
            "xfs" => Some(Self::Xfs),
            _ => None,
        }
    }
}

/// How the content of a volume is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Access {
    /// A device.
    Block,
    /// A filesystem; `None`: the volume's default.
    Mount(Option<FsType>),
}

/// By how many a volume may be used at once. Writers on several nodes do not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum AccessMode {
    /// One node writes; how many of its pods is not said.
    SingleNodeWriter,
    /// One node reads.
    SingleNodeReader,
    /// One pod writes.
    SingleNodeSingleWriter,
    /// Pods of one node write.
    SingleNodeMultiWriter,
    /// Nodes read.
    MultiNodeReader,
}

/// A volume as a node may use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Publication {
    /// Nobody may write.
    pub readonly: bool,
    /// Device or filesystem.
    pub access: Access,
    /// By how many.
    pub mode: AccessMode,
}

/// What a volume was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A volume, as it was at that moment.
    Volume(VolumeId),
}

/// What CreateVolume asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeRequest {
    /// The caller's name: up to 128 bytes of any script.
    pub name: String,
    /// What it got then.
    pub size: VolumeSize,
    /// Name of the pool.
    pub pool: String,
    /// The parameter; `None` if it was not given.
    pub fs_type: Option<FsType>,
    /// The parameter.
    pub verify_reads: bool,
    /// How it may be used.
    pub access: BTreeSet<Access>,
    /// What it was made from.
    pub source: Option<Source>,
    /// The parameter.
    #[serde(default)]
    pub replication: Replication,
    /// The parameter.
    #[serde(default)]
    pub rebuild_after: RebuildAfter,
    /// The parameter `access`.
    #[serde(default, skip_serializing_if = "Reach::is_local")]
    pub reach: Reach,
}

/// What is wanted of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSpec {
    /// It grows to this.
    pub size: VolumeSize,
    /// Check what is read from sealed layers.
    pub verify_reads: bool,
    /// Where it may be used.
    pub publications: BTreeMap<NodeName, Publication>,
    /// Where its copies shall be; `None`: one copy, known to the node alone that has it.
    #[serde(default)]
    pub mirror: Option<MirrorSpec>,
    /// It shall not be.
    pub deleted: bool,
    /// Who holds the one copy of a volume without replication; `None`: the only node that there is.
    #[serde(default)]
    pub node: Option<NodeName>,
    /// What its copies begin with, if that is not nothing; `None` also of a volume with one copy whose replica is told by
    /// [`VolumeRequest::source`].
    #[serde(default)]
    pub base: Option<Base>,
    /// When a copy that is missed is made anew elsewhere.
    #[serde(default)]
    pub rebuild_after: RebuildAfter,
}

/// The snapshot that copies of a volume are clones of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Base {
    /// Which one.
    pub snapshot: SnapshotId,
    /// Copies that are clones, each in the tree whose id it has; the others begin empty, and the primary fills them.
    pub clones: BTreeSet<InstanceId>,
}

/// How far a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum VolumePhase {
    /// No caller knows its id yet.
    Creating,
    /// It can be used.
    Ready,
}

/// What the replica has confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStatus {
    /// How far it is.
    pub phase: VolumePhase,
    /// Its size now.
    pub size: VolumeSize,
    /// Whether reads are checked now.
    pub verify_reads: bool,
    /// Copies that are durably on their nodes; empty without [`VolumeSpec::mirror`].
    #[serde(default)]
    pub copies: BTreeSet<InstanceId>,
    /// What their nodes say of them.
    #[serde(default)]
    pub reports: BTreeMap<InstanceId, CopyReport>,
    /// Wanted copies that the controller misses.
    #[serde(default)]
    pub missed: BTreeMap<InstanceId, Missed>,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// Random.
    pub id: VolumeId,
    /// What was asked for.
    pub request: VolumeRequest,
    /// What is wanted.
    pub spec: VolumeSpec,
    /// What is.
    pub status: VolumeStatus,
}

impl Volume {
    /// A volume that is to be made.
    pub fn wanted(id: VolumeId, request: VolumeRequest) -> Self {
        let (size, verify_reads, rebuild_after) = (request.size, request.verify_reads, request.rebuild_after);
        let publications = BTreeMap::new();
        let (mirror, node, base) = Default::default();
        let spec = VolumeSpec { size, verify_reads, publications, mirror, deleted: false, node, base, rebuild_after };
        let (copies, reports, missed) = Default::default();
        let status = VolumeStatus { phase: VolumePhase::Creating, size, verify_reads, copies, reports, missed };
        Self { id, request, spec, status }
    }
    /// Whether a caller may know its id: it is there and shall stay.
    pub fn is_visible(&self) -> bool {
        self.status.phase == VolumePhase::Ready && !self.spec.deleted
    }
}

impl Object for Volume {
    const KIND: &'static str = "volume";
    fn key(&self) -> String {
        self.id.to_string()
    }
    fn name(&self) -> Option<&str> {
        Some(&self.request.name)
    }
}

/// How far a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SnapshotStatus {
    /// No caller knows its id yet.
    Creating,
    /// It is durable.
    #[serde(rename_all = "camelCase")]
    Ready {
        /// Of the volume when it was taken.
        size: VolumeSize,
        /// Milliseconds since 1970.
        created_ms: u64,
    },
}

/// A snapshot. It outlives its volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Random.
    pub id: SnapshotId,
    /// The caller's name; members of a group have none.
    pub name: Option<String>,
    /// Which volume it is a snapshot of.
    pub volume: VolumeId,
    /// The group that it was taken with.
    pub group: Option<GroupSnapshotId>,
    /// Who takes it and holds it; `None`: the only node that there is.
    #[serde(default)]
    pub node: Option<NodeName>,
    /// Of a mirrored volume, when it is ready: its copies that hold it, and their nodes. Those that were members when it was
    /// taken, `node` among them, and those that it was brought over to since.
    #[serde(default)]
    pub copies: BTreeMap<InstanceId, NodeName>,
    /// Of a mirrored volume: other nodes that may have something under this id. It is not the snapshot, or is being made so, and
    /// goes with it.
    #[serde(default)]
    pub strays: BTreeSet<NodeName>,
    /// Taken for the clone with this id alone: nobody else knows it, and it goes when that is made.
    #[serde(default)]
    pub made_for: Option<VolumeId>,
    /// It shall not be.
    pub deleted: bool,
    /// What is.
    pub status: SnapshotStatus,
}

impl Snapshot {
    /// One that is to be taken, of a volume with one copy.
    pub fn wanted(id: SnapshotId, volume: VolumeId, node: Option<NodeName>) -> Self {
        let (name, group, copies, strays, made_for) = Default::default();
        Self {
            id,
            name,
            volume,
            group,
            node,
            copies,
            strays,
            made_for,
            deleted: false,
            status: SnapshotStatus::Creating,
        }
    }

    /// Whether it is of a mirrored volume.
    pub fn is_mirrored(&self) -> bool {
        !(self.copies.is_empty() && self.strays.is_empty())
    }

    /// Whether a caller may know its id: it is there and shall stay.
    pub fn is_visible(&self) -> bool {
        matches!(self.status, SnapshotStatus::Ready { .. }) && !self.deleted && self.made_for.is_none()
    }

    /// Who holds it; empty: the only node that there is.
    pub fn holders(&self) -> BTreeSet<NodeName> {
        if self.copies.is_empty() {
            self.node.iter().cloned().collect()
        } else {
            self.copies.values().cloned().collect()
        }
    }
}

impl Object for Snapshot {
    const KIND: &'static str = "snapshot";
    fn key(&self) -> String {
        self.id.to_string()
    }
    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

/// One snapshot of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupMember {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// What it is a snapshot of.
    pub volume: VolumeId,
}

/// How far a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum GroupStatus {
    /// No caller knows its id yet.
    Creating,
    /// All members are durable.
    #[serde(rename_all = "camelCase")]
    Ready {
        /// Milliseconds since 1970.
        created_ms: u64,
    },
}

/// Snapshots of several volumes at one point in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupSnapshot {
    /// Random.
    pub id: GroupSnapshotId,
    /// The caller's name.
    pub name: String,
    /// Ids are given out before the snapshots are taken, so that a repeated call means the same ones.
    pub members: Vec<GroupMember>,
    /// Who takes them and holds them; `None`: the only node that there is.
    #[serde(default)]
    pub node: Option<NodeName>,
    /// Other nodes that may have something under the ids of its members, because volumes are mirrored.
    #[serde(default)]
    pub strays: BTreeSet<NodeName>,
    /// It shall not be.
    pub deleted: bool,
    /// What is.
    pub status: GroupStatus,
}

impl Object for GroupSnapshot {
    const KIND: &'static str = "group";
    fn key(&self) -> String {
        self.id.to_string()
    }
    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }
}

/// What is kept beside a copy so that a lost catalogue can be rebuilt from the disks: everything that the replica does
/// not know itself. Its encoding is JSON; unknown fields are ignored, so later versions may add some.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Descriptor {
    /// Of a volume.
    #[serde(rename_all = "camelCase")]
    Volume {
        /// What was asked for.
        request: VolumeRequest,
        /// What is wanted now, if that is something else.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rebuild_after: Option<RebuildAfter>,
    },
    /// Of a snapshot.
    #[serde(rename_all = "camelCase")]
    Snapshot {
        /// The caller's name; members of a group have none.
        name: Option<String>,
        /// The group that it was taken with, whole: any member that is found is enough to know the group.
        group: Option<Box<GroupSnapshot>>,
        /// It was taken for the clone with this id alone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        made_for: Option<VolumeId>,
    },
}

impl Descriptor {
    /// Of the volume as it is wanted now.
    pub fn of(volume: &Volume) -> Self {
        let after = volume.spec.rebuild_after;
        let rebuild_after = (after != volume.request.rebuild_after).then_some(after);
        Self::Volume { request: volume.request.clone(), rebuild_after }
    }

    /// As it is handed to the replica.
    pub fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
    /// `None`: no text of ours.
    pub fn decode(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}
