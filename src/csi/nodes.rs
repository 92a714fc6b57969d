//! The nodes of the installation, and the way to the replica of each.
//!
//! Invariants: which node a volume is on is read from the catalogue, never guessed; a node that does not answer is named
//! in the error, and stops nothing that does not need it.

use super::control::{Control, ControlError};
use super::errors::Transient;
use crate::catalog::NodeName;
use crate::placement;
use crate::rpc::control::ensure_snapshots_request::Item;
use crate::rpc::control::{self, EnsureSnapshotsRequest, ListPoolsRequest, ListVolumesRequest};
use tokio::task::JoinSet;

/// A node, and the way to its replica.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name in topologies.
    pub name: NodeName,
    /// Its replica.
    pub control: Control,
}

/// All of them.
#[derive(Clone, Debug)]
pub enum Nodes {
    /// This machine, whatever it is called: `tandem standalone`.
    Alone(Node),
}

/// The pools of all nodes, as far as they answer.
#[derive(Debug, Default)]
pub struct Pools {
    /// Of those that do.
    pub pools: Vec<placement::Pool>,
    /// Of those that do not.
    pub silent: Vec<(NodeName, ControlError)>,
}

impl Nodes {
    /// Whether there is but one node, and that is this machine.
    pub fn is_alone(&self) -> bool {
        match self {
            Self::Alone(_) => true,
        }
    }

    /// All nodes, by name.
    pub async fn all(&self) -> Result<Vec<Node>, Transient> {
        match self {
            Self::Alone(node) => Ok(vec![node.clone()]),
        }
    }

    /// The node of that name, if it has ever announced itself.
    pub async fn find(&self, name: &NodeName) -> Result<Option<Node>, Transient> {
        match self {
            Self::Alone(node) => Ok((node.name == *name).then(|| node.clone())),
        }
    }

    /// The node that holds what the catalogue says is on `place`.
    pub async fn holder(&self, place: Option<&NodeName>) -> Result<Node, Transient> {
        match self {
            Self::Alone(node) => Ok(node.clone()),
        }
    }

    /// What [`Nodes::holder`] is called; needs no look at the nodes.
    pub fn name_of(&self, place: Option<&NodeName>) -> Option<NodeName> {
        match self {
            Self::Alone(node) => Some(node.name.clone()),
        }
    }

    /// What can be promised where; all nodes are asked at once.
    pub async fn pools(&self) -> Result<Pools, Transient> {
        let mut asked = JoinSet::new();
        for node in self.all().await? {
            asked.spawn(async move { (node.pools().await, node.name) });
        }
        let mut found = Pools::default();
        for (answer, name) in asked.join_all().await {
            match answer {
                Ok(pools) => found.pools.extend(pools.into_iter().map(|pool| pool_at(&name, pool))),
                Err(error) => found.silent.push((name, error)),
            }
        }
        // The order of answers is luck.
        found.pools.sort_by(|a, b| (&a.node, &a.pool).cmp(&(&b.node, &b.pool)));
        found.silent.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }
}

impl Node {
    /// Its pools.
    pub async fn pools(&self) -> Result<Vec<control::Pool>, ControlError> {
        let answer = self.control.client().list_pools(ListPoolsRequest {}).await;
        Ok(answer.map_err(|status| self.control.refusal(status))?.into_inner().pools)
    }

    /// Takes the snapshots at one point in time.
    pub async fn seal(&self, items: Vec<Item>) -> Result<Vec<control::Snapshot>, ControlError> {
        let answer = self.control.client().ensure_snapshots(EnsureSnapshotsRequest { items }).await;
        Ok(answer.map_err(|status| self.control.refusal(status))?.into_inner().snapshots)
    }

    /// Every copy that it has.
    pub async fn copies(&self) -> Result<Vec<control::Volume>, ControlError> {
        let answer = self.control.client().list_volumes(ListVolumesRequest {}).await;
        Ok(answer.map_err(|status| self.control.refusal(status))?.into_inner().volumes)
    }
}

fn pool_at(node: &NodeName, pool: control::Pool) -> placement::Pool {
    let free = pool.capacity_bytes.saturating_sub(pool.promised_bytes);
    placement::Pool { node: node.clone(), pool: pool.name, free, largest: pool.largest_volume_bytes.min(free) }
}
