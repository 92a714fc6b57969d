//! The nodes of a cluster.

use super::NodeName;
use crate::catalog::Object;
use crate::volume::{SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// Names that a node may have given up: 40 bytes each, so that its object stays below the limit of one.
const MAX_GIVEN_UP: usize = 4096;

/// A node, as its replica says at each start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    /// Also in its certificate.
    pub name: NodeName,
    /// Where the other replicas reach its copies.
    pub mirror: SocketAddr,
    /// Where the controller reaches its replica.
    pub control: SocketAddr,
    /// Whether its connections to other replicas are encrypted.
    pub encrypted: bool,
    /// A person has said that it is gone for good, and it has not said that it is back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
    /// What was deleted while it was removed: that goes from its disks when it is back.
    #[serde(default, skip_serializing_if = "GivenUp::is_empty")]
    pub given_up: GivenUp,
}

/// What a node may have that was deleted without it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GivenUp {
    /// Their copies.
    pub volumes: BTreeSet<VolumeId>,
    /// Snapshots, or what has their id.
    pub snapshots: BTreeSet<SnapshotId>,
}

impl GivenUp {
    /// Nothing is.
    pub fn is_empty(&self) -> bool {
        self.volumes.is_empty() && self.snapshots.is_empty()
    }
    /// These are more than can be written down.
    pub fn is_too_large(&self) -> bool {
        self.volumes.len() + self.snapshots.len() > MAX_GIVEN_UP
    }
}

impl Node {
    /// One that is there.
    pub fn new(name: NodeName, mirror: SocketAddr, control: SocketAddr, encrypted: bool) -> Self {
        Self { name, mirror, control, encrypted, removed: false, given_up: GivenUp::default() }
    }
}

impl Object for Node {
    const KIND: &'static str = "node";
    fn key(&self) -> String {
        self.name.0.clone()
    }
    fn name(&self) -> Option<&str> {
        None
    }
}
