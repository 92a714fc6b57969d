//! The nodes of the installation, and the way to the replica of each.
//!
//! Invariants: which node a volume is on is read from the catalogue, never guessed; a node that does not answer is named
//! in the error, and stops nothing that does not need it; one that has not answered for long stops nothing that could be
//! elsewhere; one that a person has removed is none before it says that it is back.

use super::control::{Control, ControlError};
use super::errors::Transient;
use crate::catalog::{self, Catalog, NodeName};
use crate::placement;
use crate::rpc::control::ensure_snapshots_request::Item;
use crate::rpc::control::{
    self, EnsureSnapshotsRequest, GetStatusRequest, ListPoolsRequest, ListSnapshotsRequest, ListVolumesRequest,
    LookForRequest,
};
use crate::tls::Credentials;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How long a node may take to say that it is there: as long as a connection may take, and some more.
const ANSWER_SOON: Duration = Duration::from_secs(4);
/// How long a node may be silent before nobody waits for its pools: longer than a machine takes to be started again.
const PATIENCE: Duration = Duration::from_secs(10 * 60);

/// A node, and the way to its replica.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name in topologies.
    pub name: NodeName,
    /// Its replica.
    pub control: Control,
}

/// All of them.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "a process has one of these")]
pub enum Nodes {
    /// This machine, whatever it is called: `tandem standalone`.
    Alone(Node),
    /// Those that have announced themselves in the catalogue of a cluster.
    Announced(Announced),
}

/// The nodes of a cluster; clones are the same ones.
#[derive(Clone)]
pub struct Announced(Arc<Cluster>);

struct Cluster {
    catalog: Catalog,
    credentials: Arc<Credentials>,
    /// The setting of the whole cluster.
    encrypted: bool,
    /// How long a node may be silent before nobody waits for its pools.
    patience: Duration,
    silence: Mutex<Silence>,
    /// Connections by the address that they were made for: a node that comes back elsewhere gets a new one.
    known: Mutex<BTreeMap<(NodeName, SocketAddr), Control>>,
}

/// The pools of all nodes, as far as they answer.
#[derive(Debug, Default)]
pub struct Pools {
    /// Of those that do.
    pub pools: Vec<placement::Pool>,
    /// Of those that do not.
    pub silent: Vec<(NodeName, ControlError)>,
    /// Of those that have not for long: they may be gone for good.
    pub gone: Vec<(NodeName, ControlError)>,
}

/// Since when nodes have not answered, as far as this process has asked them.
#[derive(Default)]
struct Silence(BTreeMap<NodeName, Instant>);

impl Silence {
    /// For how long the node has not answered.
    fn note(&mut self, node: &NodeName, answers: bool, now: Instant) -> Duration {
        if answers {
            self.0.remove(node);
            return Duration::ZERO;
        }
        now.saturating_duration_since(*self.0.entry(node.clone()).or_insert(now))
    }
}

impl Announced {
    /// The nodes in this catalogue, called with these certificates. New copies go only to those whose connections to other
    /// replicas are encrypted or not, as said.
    pub fn new(catalog: Catalog, credentials: Arc<Credentials>, encrypted: bool) -> Self {
        Self::with_patience(catalog, credentials, encrypted, PATIENCE)
    }

    /// The same; nobody waits for the pools of a node that was silent for so long.
    pub fn with_patience(catalog: Catalog, credentials: Arc<Credentials>, encrypted: bool, patience: Duration) -> Self {
        let (known, silence) = Default::default();
        Self(Arc::new(Cluster { catalog, credentials, encrypted, patience, silence, known }))
    }

    /// Whether the node may be gone for good, now that it was asked.
    fn is_gone(&self, node: &NodeName, answers: bool) -> bool {
        let mut silence = self.0.silence.lock().unwrap_or_else(PoisonError::into_inner);
        let silent = silence.note(node, answers, Instant::now());
        !answers && silent >= self.0.patience
    }

    fn node(&self, node: catalog::Node) -> Node {
        let catalog::Node { name, control: address, .. } = node;
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(other, at), _| *other != name || *at == address);
        let control = known.entry((name.clone(), address));
        let control =
            control.or_insert_with(|| Control::remote(name.clone(), address, Arc::clone(&self.0.credentials)));
        Node { control: control.clone(), name }
    }

    async fn get(&self, name: &NodeName) -> Result<Option<Node>, Transient> {
        let stored = self.0.catalog.get::<catalog::Node>(&name.0).await?.filter(|stored| !stored.object.removed);
        Ok(stored.map(|stored| self.node(stored.object)))
    }

    async fn list(&self) -> Result<Vec<(Node, bool)>, Transient> {
        let stored = self.0.catalog.list::<catalog::Node>().await?.into_iter();
        Ok(stored
            .filter(|stored| !stored.object.removed)
            .map(|stored| (stored.object.encrypted, stored.object))
            .map(|(e, node)| (self.node(node), e))
            .collect())
    }
}

impl Nodes {
    /// Whether there is but one node, and that is this machine.
    pub fn is_alone(&self) -> bool {
        matches!(self, Self::Alone(_))
    }

    /// All nodes, by name.
    pub async fn all(&self) -> Result<Vec<Node>, Transient> {
        match self {
            Self::Alone(node) => Ok(vec![node.clone()]),
            Self::Announced(nodes) => Ok(nodes.list().await?.into_iter().map(|(node, _)| node).collect()),
        }
    }

    /// The node of that name, if it has ever announced itself.
    pub async fn find(&self, name: &NodeName) -> Result<Option<Node>, Transient> {
        match self {
            Self::Alone(node) => Ok((node.name == *name).then(|| node.clone())),
            Self::Announced(nodes) => nodes.get(name).await,
        }
    }

    /// The node that holds what the catalogue says is on `place`.
    pub async fn holder(&self, place: Option<&NodeName>) -> Result<Node, Transient> {
        let nodes = match self {
            Self::Alone(node) => return Ok(node.clone()),
            Self::Announced(nodes) => nodes,
        };
        let Some(name) = place else {
            return Err(Transient::NoNode("the catalogue is of a single machine and does not say which".to_owned()));
        };
        nodes.get(name).await?.ok_or_else(|| Transient::NoNode(format!("node {name} has not announced itself")))
    }

    /// What [`Nodes::holder`] is called; needs no look at the nodes.
    pub fn name_of(&self, place: Option<&NodeName>) -> Option<NodeName> {
        match self {
            Self::Alone(node) => Some(node.name.clone()),
            Self::Announced(_) => place.cloned(),
        }
    }

    /// Nodes that may get new copies; a node with another setting of encryption than the cluster is none of them.
    async fn fitting(&self) -> Result<Vec<Node>, Transient> {
        let Self::Announced(nodes) = self else { return self.all().await };
        let (fit, other): (Vec<_>, Vec<_>) =
            nodes.list().await?.into_iter().partition(|(_, e)| *e == nodes.0.encrypted);
        for (node, encrypted) in other {
            let (theirs, ours) = if encrypted { ("on", "off") } else { ("off", "on") };
            tracing::warn!(node = %node.name, "it has --encryption {theirs} and this cluster {ours}: it gets no copies");
        }
        Ok(fit.into_iter().map(|(node, _)| node).collect())
    }

    /// The nodes that there are, and who of them does not answer now; all are asked at once.
    pub async fn silent(&self) -> Result<(BTreeSet<NodeName>, BTreeSet<NodeName>), Transient> {
        let all = self.all().await?;
        let (names, mut asked) = (all.iter().map(|node| node.name.clone()).collect(), JoinSet::new());
        for Node { name, control } in all {
            asked.spawn(async move {
                let answer = tokio::time::timeout(ANSWER_SOON, control.client().get_status(GetStatusRequest {})).await;
                (name, matches!(answer, Ok(Ok(_))))
            });
        }
        let answers = asked.join_all().await;
        answers.iter().for_each(|(name, answers)| _ = self.is_gone(name, *answers));
        Ok((names, answers.into_iter().filter(|(_, answers)| !answers).map(|(name, _)| name).collect()))
    }

    fn is_gone(&self, node: &NodeName, answers: bool) -> bool {
        match self {
            Self::Alone(_) => false,
            Self::Announced(nodes) => nodes.is_gone(node, answers),
        }
    }

    /// Whether the node answers now; if not, why.
    pub async fn answers(&self, name: &NodeName) -> Result<(), Transient> {
        let control = self.holder(Some(name)).await?.control;
        let asked = tokio::time::timeout(ANSWER_SOON, control.client().get_status(GetStatusRequest {})).await;
        match asked {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(control.refusal(status).into()),
            Err(_) => Err(ControlError::Unknown(format!("node {name} does not answer")).into()),
        }
    }

    /// What can be promised where; all nodes are asked at once.
    pub async fn pools(&self) -> Result<Pools, Transient> {
        let mut asked = JoinSet::new();
        for node in self.fitting().await? {
            asked.spawn(async move { (node.pools().await, node.name) });
        }
        let mut found = Pools::default();
        for (answer, name) in asked.join_all().await {
            match answer {
                Ok(pools) => {
                    self.is_gone(&name, true);
                    found.pools.extend(pools.into_iter().map(|pool| pool_at(&name, pool)));
                }
                Err(error) if self.is_gone(&name, false) => {
                    tracing::warn!(node = %name, %error, "it has not answered for long: its pools are not counted");
                    found.gone.push((name, error));
                }
                Err(error) => found.silent.push((name, error)),
            }
        }
        // The order of answers is luck.
        found.pools.sort_by(|a, b| (&a.node, &a.pool).cmp(&(&b.node, &b.pool)));
        found.silent.sort_by(|a, b| a.0.cmp(&b.0));
        found.gone.sort_by(|a, b| a.0.cmp(&b.0));
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

    /// Its copies can follow when a primary elsewhere takes these snapshots.
    pub async fn promise(&self, items: Vec<Item>) -> Result<(), ControlError> {
        let answer = self.control.client().promise_snapshots(EnsureSnapshotsRequest { items }).await;
        answer.map(drop).map_err(|status| self.control.refusal(status))
    }

    /// Its copies have followed: it knows these snapshots.
    pub async fn adopt(&self, items: Vec<Item>) -> Result<(), ControlError> {
        let answer = self.control.client().adopt_snapshots(EnsureSnapshotsRequest { items }).await;
        answer.map(drop).map_err(|status| self.control.refusal(status))
    }

    /// Whether it can say that it has no such volume or snapshot; `pool` is where it would be, or empty. To be asked before.
    pub async fn look_for(&self, id: String, pool: String) -> Result<(), ControlError> {
        let answer = self.control.client().look_for(LookForRequest { id, pool }).await;
        answer.map(drop).map_err(|status| self.control.refusal(status))
    }

    /// Every snapshot that it knows.
    pub async fn snapshots(&self) -> Result<Vec<control::Snapshot>, ControlError> {
        let answer = self.control.client().list_snapshots(ListSnapshotsRequest {}).await;
        Ok(answer.map_err(|status| self.control.refusal(status))?.into_inner().snapshots)
    }

    /// Every copy that it has.
    pub async fn copies(&self) -> Result<Vec<control::Volume>, ControlError> {
        Ok(self.look().await?.volumes)
    }

    /// The same, and where it could not look.
    pub async fn look(&self) -> Result<control::ListVolumesResponse, ControlError> {
        let answer = self.control.client().list_volumes(ListVolumesRequest {}).await;
        Ok(answer.map_err(|status| self.control.refusal(status))?.into_inner())
    }
}

fn pool_at(node: &NodeName, pool: control::Pool) -> placement::Pool {
    let free = pool.capacity_bytes.saturating_sub(pool.promised_bytes);
    placement::Pool { node: node.clone(), pool: pool.name, free, largest: pool.largest_volume_bytes.min(free) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_counted_from_the_first_question_without_an_answer() {
        let (mut silence, began) = (Silence::default(), Instant::now());
        let [one, two] = ["node-1", "node-2"].map(|name| NodeName(name.to_owned()));
        let after = |seconds: u64| began + Duration::from_secs(seconds);
        let mut note = |node, answers, seconds| silence.note(node, answers, after(seconds)).as_secs();
        assert_eq!((note(&one, false, 0), note(&one, false, 700), note(&two, false, 700)), (0, 700, 0));
        assert_eq!((note(&one, true, 701), note(&one, false, 702), note(&one, false, 705)), (0, 0, 3));
    }
}
