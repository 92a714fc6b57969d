//! Nodes that are gone for good: a person says so, and nobody waits for them any more.
//!
//! Invariants: only a node that does not answer is removed, and nothing is deleted by that: its copies count as before, and
//! are replaced like any that is missed. What is deleted later and may be on its disks is first written into its object:
//! if the node ever comes back, it says so itself, and takes that off its disks. What nobody is known to have named, because
//! the catalogue calls it half made, stays there.

use super::Controller;
use super::names;
use crate::catalog::{GivenUp, Node, NodeName, Stored, Volume, VolumeConfiguration, VolumePhase};
use crate::csi::control::ControlError;
use crate::csi::errors::Transient;
use crate::csi::status::Coded;
use crate::protocol::Configuration;
use crate::rpc::operator as rpc;
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use tonic::Code;

/// How often what the node itself changes meanwhile is read again: it writes its object at its start.
const ATTEMPTS: usize = 4;

/// Why a node is not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Not now.
    #[error(transparent)]
    Transient(#[from] Transient),
    /// No such node.
    #[error("there is no node {0:?}; `tandem node list` shows those that there are")]
    NotFound(String),
    /// It is there.
    #[error("node {0} answers: it is not gone; stop `tandem replica` on it first")]
    Answers(NodeName),
    /// It has what nobody else has.
    #[error(
        "only node {node} has every acknowledged write of {volumes}: without it they are lost; --force removes it nevertheless"
    )]
    Needed {
        /// The node.
        node: NodeName,
        /// Comma separated.
        volumes: String,
    },
}

impl Coded for RemoveError {
    fn code(&self) -> Code {
        match self {
            Self::Transient(error) => error.code(),
            Self::NotFound(_) => Code::NotFound,
            Self::Answers(_) | Self::Needed { .. } => Code::FailedPrecondition,
        }
    }
}

/// Whether a copy of the volume shall be on the node.
fn is_on(volume: &Volume, node: &NodeName) -> bool {
    match &volume.spec.mirror {
        Some(mirror) => mirror.copies_on(node).next().is_some(),
        None => volume.spec.node.as_ref() == Some(node),
    }
}

/// Whether nobody but this node has every acknowledged write of the volume.
fn is_only_on(volume: &Volume, now: Option<&Configuration>, node: &NodeName) -> bool {
    let Some(mirror) = &volume.spec.mirror else { return is_on(volume, node) };
    let on = |copy: InstanceId| mirror.copies.get(&copy).map(|of| &of.node);
    let mut members = now.into_iter().flat_map(Configuration::members).peekable();
    members.peek().is_some() && members.all(|copy| on(copy) == Some(node))
}

impl Controller {
    /// Every node that has ever announced itself.
    pub async fn list_nodes(&self) -> Result<Vec<rpc::Node>, Transient> {
        let (_, silent) = self.nodes.silent().await?;
        let volumes = self.all::<Volume>().await?;
        let stored = self.all::<VolumeConfiguration>().await?;
        let read = |stored: &Stored<VolumeConfiguration>| {
            Some((stored.object.volume, Configuration::try_from(&stored.object).ok()?))
        };
        let configurations: BTreeMap<VolumeId, Configuration> = stored.iter().filter_map(read).collect();
        let told = |Node { name, removed, encrypted, .. }: Node| {
            let here: Vec<_> = volumes.iter().map(|stored| &stored.object).filter(|v| is_on(v, &name)).collect();
            let only = here.iter().filter(|volume| volume.is_visible());
            let only = only.filter(|volume| is_only_on(volume, configurations.get(&volume.id), &name));
            rpc::Node {
                answers: !removed && !silent.contains(&name),
                removed,
                encrypted,
                copies: here.len() as u64,
                only_here: only.map(|volume| format!("{} ({})", volume.request.name, volume.id)).collect(),
                name: name.0.clone(),
            }
        };
        Ok(self.all::<Node>().await?.into_iter().map(|stored| told(stored.object)).collect())
    }

    /// Nobody waits for the node any more.
    pub async fn remove_node(&self, name: &str, force: bool) -> Result<(), RemoveError> {
        let missing = || RemoveError::NotFound(name.chars().take(128).collect());
        let told = self.list_nodes().await?.into_iter().find(|node| node.name == name).ok_or_else(missing)?;
        let node = NodeName(told.name);
        if told.answers {
            return Err(RemoveError::Answers(node));
        }
        if !force && !told.only_here.is_empty() {
            return Err(RemoveError::Needed { node, volumes: told.only_here.join(", ") });
        }
        let mut stored = self.get::<Node>(&node.0).await?.ok_or_else(missing)?;
        stored.object.removed = true;
        self.update(stored).await?;
        tracing::warn!(%node, force, "a person has removed the node: nobody waits for it before it says that it is back");
        Ok(())
    }

    async fn is_removed(&self, node: Option<&NodeName>) -> Result<bool, Transient> {
        let Some(node) = node else { return Ok(false) };
        Ok(self.get::<Node>(&node.0).await?.is_some_and(|stored| stored.object.removed))
    }

    /// Whether the only copy of the volume is on a removed node.
    pub(super) async fn is_away(&self, volume: &Volume) -> Result<bool, Transient> {
        self.is_removed(volume.spec.node.as_ref()).await
    }

    /// Writes down that the node shall have it no more, if it was removed; whether it was.
    async fn give_up_on(&self, node: &NodeName, write: impl Fn(&mut GivenUp)) -> Result<bool, Transient> {
        for _ in 0..ATTEMPTS {
            let Some(mut stored) = self.get::<Node>(&node.0).await?.filter(|stored| stored.object.removed) else {
                return Ok(false);
            };
            let before = stored.object.given_up.clone();
            write(&mut stored.object.given_up);
            if stored.object.given_up == before {
                return Ok(true);
            }
            if stored.object.given_up.is_too_large() {
                let text =
                    format!("node {node} was removed, and as much was deleted without it as can be written down");
                return Err(ControlError::Unknown(text).into());
            }
            match self.update(stored).await {
                Err(Transient::Conflict(_)) => {}
                done => return done.map(|_| true),
            }
        }
        Err(Transient::Conflict(format!("node {node}")))
    }

    /// The snapshot on that node counts as erased, if the node was removed.
    pub(super) async fn gives_up_snapshot(&self, node: Option<&NodeName>, id: SnapshotId) -> Result<bool, Transient> {
        let Some(node) = node else { return Ok(false) };
        self.give_up_on(node, |given_up| _ = given_up.snapshots.insert(id)).await
    }

    /// The only copy of a deleted volume counts as erased, if its node was removed.
    pub(super) async fn gives_up_sole(&self, volume: &Volume) -> Result<bool, Transient> {
        match &volume.spec.node {
            Some(node) if volume.status.phase == VolumePhase::Ready => {
                self.give_up_on(node, |given_up| _ = given_up.volumes.insert(volume.id)).await
            }
            node => self.is_removed(node.as_ref()).await,
        }
    }

    /// The copies of a deleted volume on removed nodes count as erased.
    pub(super) async fn give_up_copies(&self, stored: Stored<Volume>) -> Result<(), Transient> {
        let (id, known) = (stored.object.id, stored.object.status.phase == VolumePhase::Ready);
        let mut gone = BTreeMap::new();
        for (copy, place) in stored.object.spec.mirror.iter().flat_map(|mirror| &mirror.copies) {
            let removed = if known {
                self.give_up_on(&place.node, |given_up| _ = given_up.volumes.insert(id)).await?
            } else {
                self.is_removed(Some(&place.node)).await?
            };
            if removed {
                gone.insert(*copy, place.node.clone());
            }
        }
        let named = |copy: &InstanceId| stored.object.spec.mirror.iter().any(|mirror| mirror.copies.contains_key(copy));
        if known && !stored.object.status.copies.iter().all(named) {
            // One that was replaced, and whose node has not said since that it is gone. Nobody knows any more which node that is.
            for Stored { object: node, .. } in self.all::<Node>().await? {
                match self.give_up_on(&node.name, |given_up| _ = given_up.volumes.insert(id)).await {
                    // Most likely it has nothing of it: nobody waits for that.
                    Err(error @ Transient::Replica(_)) => {
                        tracing::warn!(volume = %id, %error, "a copy that was replaced may stay there");
                    }
                    written => _ = written?,
                }
            }
        }
        if !stored.object.status.copies.iter().any(|copy| gone.contains_key(copy)) {
            return Ok(());
        }
        tracing::warn!(volume = %id, nodes = names(gone.values().collect::<BTreeSet<_>>()), "its copies on removed nodes count as gone");
        let forget = |volume: &mut Volume| {
            volume.status.copies.retain(|copy| !gone.contains_key(copy));
            volume.status.reports.retain(|copy, _| !gone.contains_key(copy));
        };
        self.change(stored, forget).await.map(drop)
    }
}
