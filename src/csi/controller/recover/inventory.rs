//! What every node has.
//!
//! Invariants: nodes are asked at once and each says everything or is silent, so nothing is known by halves; of a machine
//! alone silence is an error.

use super::Unopened;
use super::choice::Found;
use crate::catalog::{NodeName, VolumeConfiguration};
use crate::csi::control::ControlError;
use crate::csi::errors::Transient;
use crate::csi::nodes::{Node, Nodes};
use crate::protocol::{Configuration, Generation};
use crate::rpc::control::{self, ListSnapshotsRequest};
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeMap;
use tokio::task::JoinSet;

/// See the module.
#[derive(Default)]
pub(super) struct Inventory {
    /// By the text of their ids.
    pub volumes: BTreeMap<String, Vec<(NodeName, control::Volume)>>,
    /// By the text of their ids.
    pub snapshots: BTreeMap<String, Vec<(NodeName, control::Snapshot)>>,
    /// Who has answered.
    pub read: Vec<NodeName>,
    /// Who has not.
    pub silent: Vec<(NodeName, ControlError)>,
    /// Pools of those who have, of which not everything was read.
    pub unopened: Vec<Unopened>,
}

type Answer = Result<(control::ListVolumesResponse, Vec<control::Snapshot>), ControlError>;

async fn ask(node: &Node) -> Answer {
    let volumes = node.look().await?;
    let answer = node.control.client().list_snapshots(ListSnapshotsRequest {}).await;
    Ok((volumes, answer.map_err(|status| node.control.refusal(status))?.into_inner().snapshots))
}

impl Inventory {
    /// Of all nodes.
    pub async fn ask(nodes: &Nodes) -> Result<Self, Transient> {
        let mut asked = JoinSet::new();
        for node in nodes.all().await? {
            asked.spawn(async move { (ask(&node).await, node.name) });
        }
        let mut answers = asked.join_all().await;
        // The order of answers is luck.
        answers.sort_by(|a, b| a.1.cmp(&b.1));
        let mut found = Self::default();
        for (answer, node) in answers {
            match answer {
                Ok(answer) => found.add(node, answer),
                Err(error) if nodes.is_alone() => return Err(error.into()),
                Err(error) => found.silent.push((node, error)),
            }
        }
        Ok(found)
    }

    fn add(&mut self, node: NodeName, (found, snapshots): (control::ListVolumesResponse, Vec<control::Snapshot>)) {
        let unopened = found.unopened.into_iter();
        let unopened = unopened.map(|found| Unopened { node: node.clone(), pool: found.pool, problem: found.problem });
        self.unopened.extend(unopened);
        for volume in found.volumes {
            self.volumes.entry(volume.volume_id.clone()).or_default().push((node.clone(), volume));
        }
        for snapshot in snapshots {
            self.snapshots.entry(snapshot.snapshot_id.clone()).or_default().push((node.clone(), snapshot));
        }
        self.read.push(node);
    }

    /// What of this node was not read although it has answered, for people.
    pub fn closed(&self, node: &NodeName) -> Option<String> {
        let closed: Vec<_> = self.unopened.iter().filter(|unopened| unopened.node == *node).collect();
        let text = closed.iter().map(|unopened| format!("pool {}: {}", unopened.pool, unopened.problem));
        (!closed.is_empty()).then(|| text.collect::<Vec<_>>().join("; "))
    }

    /// Whether the volume has copies on several nodes.
    pub fn is_mirrored(&self, volume: VolumeId) -> bool {
        self.volumes.get(&volume.to_string()).into_iter().flatten().any(|(_, copy)| copy.record.is_some())
    }

    /// The highest that any copy knows.
    pub fn generation(&self) -> Generation {
        let copies = self.volumes.values().flatten().filter_map(|(_, copy)| copy.record.as_ref());
        let known = copies.filter_map(|record| VolumeConfiguration::decode(&record.configuration));
        known.map(|configuration| configuration.stamp().generation).max().unwrap_or_default()
    }
}

/// What a node says of its copy of a mirrored volume; or why that cannot be used.
pub(super) fn copy(id: VolumeId, node: &NodeName, copy: &control::Volume) -> Result<(InstanceId, Found), String> {
    let bad = |what: &str| format!("the copy of volume {id} on {node} is not used: {what}");
    let record = copy.record.as_ref().ok_or_else(|| bad("it is a volume with one copy there"))?;
    let instance = record.copy_id.parse().map_err(|_| bad("it has no id of ours"))?;
    let configuration = match record.configuration.as_str() {
        "" => None,
        text => {
            let stored = VolumeConfiguration::decode(text).filter(|stored| stored.volume == id);
            let stored = stored.ok_or_else(|| bad("its record is none of ours"))?;
            Some(Configuration::try_from(&stored).map_err(|error| bad(&error.to_string()))?)
        }
    };
    let mut peers = BTreeMap::new();
    for peer in &record.peers {
        let other = peer.copy_id.parse().map_err(|_| bad("it names a copy that has no id of ours"))?;
        peers.insert(other, NodeName(peer.node.clone()));
    }
    let found = Found {
        node: node.clone(),
        pool: copy.pool.clone(),
        configuration,
        intact: record.intact,
        removing: record.removing,
        peers,
        attached: !copy.device.is_empty(),
        serves: copy.mirror.as_ref().is_some_and(|mirror| mirror.serves),
    };
    Ok((instance, found))
}
