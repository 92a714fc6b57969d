//! Volumes with copies on several nodes, as far as the controller decides: where the copies shall be, and the wish.
//!
//! Invariants: ids of copies are given out before any of them is made; the first configuration is written before a node
//! may act on it, and no other one here; a volume is ready when every copy is durably on its node, and forgotten when none is.
//! The wish is there from the beginning and stays where it was last, so that a volume that nobody uses has a primary.

use super::source::Placed;
use super::{Controller, names};
use crate::catalog::{
    ClientSpec, CopySpec, MirrorSpec, NodeName, Replication, Stored, Volume, VolumeConfiguration, VolumePhase,
};
use crate::csi::errors::{ArgumentError, CreateVolumeError, PublishError, Transient};
use crate::csi::parameters::ParameterError;
use crate::placement::Choice;
use crate::protocol::{Configuration, Lacks};
use crate::rpc::csi::{self, VolumeHealthErrorType, volume_health::VolumeHealthEntry};
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long a call waits for the nodes; external-provisioner gives up after 15 s and repeats it.
pub(super) const COPIES_LIMIT: Duration = Duration::from_secs(10);
/// How often it looks: nodes make a copy within a second.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How many copies a volume has.
pub(super) fn copies(replication: Replication) -> usize {
    match replication {
        Replication::None => 1,
        Replication::Sync { replicas } => usize::from(replicas),
    }
}

/// What the volume shall be where it is placed.
pub(super) fn placed(replication: Replication, choices: Vec<Choice>) -> Placed {
    if replication == Replication::None {
        return Placed { node: choices.into_iter().next().map(|choice| choice.node), ..Placed::default() };
    }
    let copy = |Choice { node, pool }| (InstanceId::random(), CopySpec { node, pool });
    let copies: Vec<_> = choices.into_iter().map(copy).collect();
    // The best place is the first primary's.
    let primary = copies.first().map(|(copy, _)| *copy);
    Placed {
        mirror: Some(MirrorSpec { primary, ..MirrorSpec::new(copies.into_iter().collect()) }),
        ..Placed::default()
    }
}

impl Controller {
    /// Refuses a replication that this installation cannot keep.
    pub(super) fn can_replicate(&self, replication: Replication) -> Result<(), ArgumentError> {
        match replication {
            Replication::None => Ok(()),
            Replication::Sync { .. } if self.nodes.is_alone() => Err(ParameterError::Alone.into()),
            Replication::Sync { .. } if self.mirrors => Ok(()),
            Replication::Sync { .. } => Err(ParameterError::NotAvailable { value: "sync".to_owned() }.into()),
        }
    }

    /// Waits until the nodes have made every copy, and writes down that it is so.
    pub(super) async fn make_mirror(&self, stored: Stored<Volume>) -> Result<Volume, CreateVolumeError> {
        let id = stored.object.id;
        self.first_configuration(&stored.object).await?;
        let deadline = Instant::now() + COPIES_LIMIT;
        loop {
            let missing_volume = || Transient::Conflict(format!("volume {id}"));
            let now = self.get::<Volume>(id).await?.ok_or_else(missing_volume)?;
            let missing = without(&now.object, |copy| !now.object.status.copies.contains(copy));
            if missing.is_empty() {
                // Persist before the caller learns the id.
                return Ok(self.change(now, |volume| volume.status.phase = VolumePhase::Ready).await?.object);
            }
            if Instant::now() >= deadline {
                return Err(Transient::Waiting { id, done: "made", nodes: names(&missing) }.into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn first_configuration(&self, volume: &Volume) -> Result<(), Transient> {
        let Some(mirror) = &volume.spec.mirror else { return Ok(()) };
        let Some(primary) = mirror.primary else { return Ok(()) };
        let base = volume.spec.base.as_ref();
        let is_whole = |copy: &InstanceId| base.is_none_or(|base| base.clones.contains(copy));
        let others = mirror.copies.keys().copied().filter(|copy| *copy != primary);
        let (members, empty): (BTreeSet<_>, BTreeSet<_>) = others.partition(is_whole);
        if self.get::<VolumeConfiguration>(volume.id).await?.is_some() {
            return Ok(());
        }
        let mut first = Configuration::first(self.catalog.generation().await?, primary, members);
        // The primary fills them; meanwhile the volume can be used.
        first.candidates = empty.into_iter().map(|copy| (copy, Lacks::Everything)).collect();
        self.create(VolumeConfiguration::new(volume.id, &first)).await?;
        Ok(())
    }

    /// Waits until no node has a copy of a volume that shall not be, then forgets its configuration. A copy that the volume has
    /// given up before, on a node that may never come back, is waited for only for a while.
    pub(super) async fn erase_mirror(&self, id: VolumeId) -> Result<(), Transient> {
        let deadline = Instant::now() + COPIES_LIMIT;
        while let Some(now) = self.get::<Volume>(id).await? {
            if now.object.status.copies.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                let left = without(&now.object, |copy| now.object.status.copies.contains(copy));
                if left.is_empty() {
                    let copies = &now.object.status.copies;
                    tracing::warn!(volume = %id, ?copies, "copies that were given up may stay on nodes that are away");
                    break;
                }
                return Err(Transient::Waiting { id, done: "removed", nodes: names(&left) });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        match self.get::<VolumeConfiguration>(id).await? {
            Some(configuration) => self.remove(&configuration).await,
            None => Ok(()),
        }
    }

    /// Writes the wish into the volume: its copy on the node shall be primary. Only a member may become that.
    pub(super) async fn wish_for(&self, volume: &mut Volume, node: &NodeName) -> Result<(), PublishError> {
        let id = volume.id;
        let Some(mirror) = &mut volume.spec.mirror else { return Ok(()) };
        let Some(copy) = mirror.copies_on(node).map(|(copy, _)| copy).next() else { return Ok(()) };
        let configuration = self.configuration(id).await?.ok_or(PublishError::NoConfiguration { id })?;
        if !configuration.is_member(copy) {
            return Err(PublishError::NotUpToDate { id, node: node.clone() });
        }
        mirror.primary = Some(copy);
        Ok(())
    }

    /// Writes into the volume that this node uses it without a copy. The primary stays where it is: the client asks for another
    /// one if it does not reach that.
    pub(super) async fn name_client(&self, volume: &mut Volume, node: &NodeName) -> Result<(), PublishError> {
        let id = volume.id;
        let Some(mirror) = &mut volume.spec.mirror else { return Ok(()) };
        let configuration = self.configuration(id).await?.ok_or(PublishError::NoConfiguration { id })?;
        if mirror.primary.is_none() {
            let first = configuration.members().find(|copy| mirror.copies.contains_key(copy));
            mirror.primary = configuration.primary.or(first);
        }
        mirror.client = Some(ClientSpec { node: node.clone(), publication: InstanceId::random() });
        Ok(())
    }

    pub(super) async fn configuration(&self, id: VolumeId) -> Result<Option<Configuration>, Transient> {
        let stored = self.get::<VolumeConfiguration>(id).await?;
        let read = stored.map(|stored| Configuration::try_from(&stored.object)).transpose();
        read.map_err(|error| Transient::Conflict(error.to_string()))
    }

    /// Whether every copy that is wanted has every acknowledged write.
    pub(super) async fn mirror_health(&self, volume: &Volume) -> Result<csi::VolumeHealth, Transient> {
        let configuration = self.configuration(volume.id).await?;
        let is_member = |copy: &InstanceId| configuration.as_ref().is_some_and(|now| now.is_member(*copy));
        let behind = without(volume, |copy| !is_member(copy));
        let wanted = volume.spec.mirror.as_ref().map_or(0, |mirror| mirror.copies.len());
        let mut health_statuses = Vec::new();
        if !behind.is_empty() {
            let good = wanted - behind.len();
            let status = if good == 0 { VolumeHealthErrorType::Inaccessible } else { VolumeHealthErrorType::Degraded };
            let message = format!(
                "{good} of {wanted} copies have every acknowledged write; not the ones on {}: they are brought up to date \
                 as soon as their nodes are reached{}",
                names(&behind),
                lost(volume)
            );
            let (reason, message) = match configuration {
                Some(_) => ("CopyOutdated".to_owned(), message),
                None => {
                    let message = PublishError::NoConfiguration { id: volume.id }.to_string();
                    ("NoConfiguration".to_owned(), format!("{message}; copies are on {}", names(&behind)))
                }
            };
            health_statuses.push(VolumeHealthEntry { status: status.into(), reason, message });
        }
        Ok(csi::VolumeHealth { volume_id: volume.id.to_string(), health_statuses })
    }
}

/// What is done about copies that may be lost for good.
fn lost(volume: &Volume) -> String {
    let Some(mirror) = &volume.spec.mirror else { return String::new() };
    let node = |copy: &InstanceId| mirror.copies.get(copy).map_or_else(String::new, |of| of.node.to_string());
    let mut text = String::new();
    if let Some(rebuild) = mirror.rebuild {
        text += &format!("; {} gets a copy in place of the one on {}", node(&rebuild.new), node(&rebuild.lost));
    }
    for (copy, missed) in volume.status.missed.iter().filter(|(copy, _)| !mirror.leaving.contains(copy)) {
        let (node, after) = (node(copy), volume.spec.rebuild_after);
        text += &match &missed.waits {
            Some(waits) => format!("; another node gets none in place of the one on {node} yet: {waits}"),
            None => format!(
                "; the one on {node} is missed for {} s, and another node gets one in its place after {after}",
                missed.seconds
            ),
        };
    }
    text
}

/// The nodes whose copies are like that. A copy that nobody wants any more has no node, and counts by its id.
fn without(volume: &Volume, like_that: impl Fn(&InstanceId) -> bool) -> Vec<NodeName> {
    let wanted = volume.spec.mirror.iter().flat_map(|mirror| &mirror.copies);
    let mut nodes: Vec<_> = wanted.filter(|(copy, _)| like_that(copy)).map(|(_, spec)| spec.node.clone()).collect();
    nodes.sort();
    nodes
}
