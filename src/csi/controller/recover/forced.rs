//! `promote --force`: a person gives up the copies that are not there.
//!
//! # Invariants
//! * Nothing is forced that a publication would do: while a member is reached that has everything, or the copy itself is one.
//! * Only a copy that the newest configuration names is forced, so that a later recovery cannot pass over it (`choice.rs`).
//! * What was shown to the person is what is given up: the newest version that is known is part of the order.
//! * The raised generation fences whoever comes back: it becomes a candidate, of which nothing is believed.

use super::choice::{self, Choice, Copies};
use super::inventory::{self, Inventory};
use super::mirrored::write;
use crate::catalog::{MirrorSpec, NodeName, Stored, Volume, VolumeConfiguration};
use crate::csi::controller::{Controller, names};
use crate::csi::errors::Transient;
use crate::csi::operations::Subject;
use crate::csi::status::Coded;
use crate::protocol::{Configuration, Lacks, Stamp};
use crate::volume::{InstanceId, VolumeId};
use tonic::Code;

/// What a person must know before a copy is forced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promotion {
    /// Of which volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Where the copy is.
    pub node: NodeName,
    /// The newest version that is known of it: to be said again with the order.
    pub newest: Stamp,
    /// What may be lost, one sentence each.
    pub losses: Vec<String>,
}

/// Why a copy is not forced.
#[derive(Debug, thiserror::Error)]
pub enum ForceError {
    /// Not now.
    #[error(transparent)]
    Transient(#[from] Transient),
    /// No such volume.
    #[error("there is no volume {0:?} in the catalogue; if it was lost, run `tandem recover` first")]
    NoVolume(String),
    /// It has one copy.
    #[error("volume {0} has one copy only: there is nothing to promote")]
    Single(VolumeId),
    /// None that could be forced.
    #[error("volume {id} has no copy on node {node} that can be forced: {why}")]
    NoCopy {
        /// The volume.
        id: VolumeId,
        /// As asked for.
        node: NodeName,
        /// A sentence.
        why: String,
    },
    /// There is a way that loses nothing.
    #[error("nothing was forced: {0}")]
    Unneeded(String),
    /// Somebody uses it elsewhere.
    #[error(
        "volume {id} is published to {nodes}: make sure that nothing runs there any more, then `tandem volume detach {id} NODE`"
    )]
    Published {
        /// The volume.
        id: VolumeId,
        /// Comma separated.
        nodes: String,
    },
    /// Not what the person has seen.
    #[error("what is known of volume {0} has changed meanwhile: look again at what would be lost")]
    Changed(VolumeId),
}

impl Coded for ForceError {
    fn code(&self) -> Code {
        match self {
            Self::Transient(error) => error.code(),
            Self::NoVolume(_) => Code::NotFound,
            Self::Single(_) | Self::NoCopy { .. } | Self::Unneeded(_) | Self::Published { .. } => {
                Code::FailedPrecondition
            }
            Self::Changed(_) => Code::Aborted,
        }
    }
}

/// A volume with what is known of its copies.
struct Known {
    stored: Stored<Volume>,
    mirror: MirrorSpec,
    there: Option<Stored<VolumeConfiguration>>,
    /// The catalogue has it.
    current: bool,
    newest: Configuration,
    found: Copies,
    inventory: Inventory,
}

impl Controller {
    /// What would be lost.
    pub async fn plan_force(&self, volume: &str, node: &NodeName) -> Result<Promotion, ForceError> {
        let known = self.known(volume).await?;
        let copy = known.forceable(node)?;
        Ok(known.promotion(copy, node))
    }

    /// Makes the volume's copy on the node its only member. Returns the version of the configuration that says so.
    pub async fn force(&self, volume: &str, node: &NodeName, seen: Stamp) -> Result<Stamp, ForceError> {
        let id = self.known(volume).await?.stored.object.id;
        let _volume = self.start_soon(Subject::Volume(id)).await?;
        let Known { mut stored, mut mirror, there, newest, found, .. } = {
            let known = self.known(&id.to_string()).await?;
            known.forceable(node)?;
            known
        };
        let copy = found.iter().find(|(_, found)| found.node == *node).map(|(copy, _)| *copy);
        let Some(copy) = copy.filter(|_| newest.stamp == seen) else { return Err(ForceError::Changed(id)) };
        let generation = self.catalog.raise_generation(newest.stamp.generation).await.map_err(Transient::from)?;
        let next = choice::forced(&newest, copy, generation);
        mirror.primary = Some(copy);
        stored.object.spec.mirror = Some(mirror);
        self.update(stored).await?;
        write(&self.catalog, there, &next, id).await?;
        tracing::warn!(volume = %id, %node, stamp = ?next.stamp, "a copy was forced to be the only member");
        Ok(next.stamp)
    }

    async fn known(&self, volume: &str) -> Result<Known, ForceError> {
        let by_id = match volume.parse::<VolumeId>() {
            Ok(id) => self.get::<Volume>(id).await?,
            Err(_) => None,
        };
        let stored = match by_id {
            Some(stored) => Some(stored),
            None => self.find::<Volume>(volume).await?,
        };
        let stored = stored.filter(|stored| !stored.object.spec.deleted);
        let stored = stored.ok_or_else(|| ForceError::NoVolume(volume.chars().take(128).collect()))?;
        let id = stored.object.id;
        let mirror = stored.object.spec.mirror.clone().ok_or(ForceError::Single(id))?;
        let inventory = Inventory::ask(&self.nodes).await?;
        let copies = inventory.volumes.get(&id.to_string()).into_iter().flatten();
        // What cannot be used is as good as not there.
        let found: Copies = copies.filter_map(|(node, copy)| inventory::copy(id, node, copy).ok()).collect();
        // After the copies, so that it is as new as they were.
        let there = self.get::<VolumeConfiguration>(id).await?;
        let now = there.as_ref().map(|stored| Configuration::try_from(&stored.object)).transpose();
        let now = now.map_err(|error| Transient::Conflict(error.to_string()))?;
        let newest = choice::newest(&found).cloned().into_iter().chain(now.clone());
        // Of two that are equal the catalogue's.
        let newest = newest.max_by_key(|known| known.stamp);
        let newest = newest.ok_or_else(|| Transient::NoNode(format!("nobody knows a configuration of volume {id}")))?;
        let current = now.is_some_and(|now| now == newest);
        Ok(Known { stored, mirror, there, current, newest, found, inventory })
    }
}

impl Known {
    /// The copy on the node, if only force can make it primary.
    fn forceable(&self, node: &NodeName) -> Result<InstanceId, ForceError> {
        let id = self.stored.object.id;
        let refused = |why: String| ForceError::NoCopy { id, node: node.clone(), why };
        let here = self.found.iter().find(|(_, found)| found.node == *node && !found.removing);
        let Some((copy, found)) = here else {
            if let Some(closed) = self.inventory.closed(node) {
                return Err(refused(format!("not everything is open there: {closed}")));
            }
            let has: Vec<_> = self.found.values().map(|found| found.node.clone()).collect();
            return Err(refused(format!(
                "the node does not answer, or has none; those that have one: {}",
                names(&has)
            )));
        };
        if !self.newest.copies().any(|named| named == *copy) || !self.mirror.copies.contains_key(copy) {
            return Err(refused("the volume has gone on without it".into()));
        }
        let others = self.stored.object.spec.publications.keys().filter(|other| *other != node).cloned();
        let others: Vec<_> = others.collect();
        if !others.is_empty() {
            return Err(ForceError::Published { id, nodes: names(&others) });
        }
        let publish = |node: &NodeName| {
            format!("the copy of volume {id} on {node} has every acknowledged write: publish the volume there")
        };
        if self.newest.is_member(*copy) && self.current && found.intact {
            return Err(ForceError::Unneeded(format!("{}; it is promoted without --force", publish(node))));
        }
        if !self.current && matches!(choice::choose(&self.found), Choice::Complete(_)) {
            let advice = "every copy of the volume is reached: `tandem recover` puts it back without any loss";
            return Err(ForceError::Unneeded(advice.into()));
        }
        let reached = self.newest.members().filter(|member| member != copy).find_map(|member| self.found.get(&member));
        if let Some(member) = reached.filter(|_| self.current) {
            let otherwise = "or wait until the other copy is up to date; if its disk is broken, stop its replica first";
            return Err(ForceError::Unneeded(format!("{}, {otherwise}", publish(&member.node))));
        }
        Ok(*copy)
    }

    fn promotion(&self, copy: InstanceId, node: &NodeName) -> Promotion {
        let (id, version) = (self.stored.object.id, text(self.newest.stamp));
        let mut losses = Vec::new();
        match self.newest.candidates.get(&copy) {
            Some(Lacks::Everything) => losses.push(format!(
                "the copy on {node} was never complete: what it has not got reads as zeros or as old data"
            )),
            Some(Lacks::Since(since)) => losses.push(format!(
                "the copy on {node} has left with version {}: all writes since then may be missing in it, some of them may be there",
                text(*since)
            )),
            None if self.found.get(&copy).is_some_and(|found| !found.intact) => losses.push(format!(
                "the node {node} has died with its copy: writes that were acknowledged and not flushed may be missing in it"
            )),
            None => losses.push(format!(
                "the copy on {node} has every write until version {version}; whatever was acknowledged by a later version \
                 without it is missing"
            )),
        }
        for other in self.newest.copies().filter(|other| *other != copy) {
            let at = self.mirror.copies.get(&other).map(|spec| &spec.node);
            let place = at.map_or_else(|| format!("copy {other}"), NodeName::to_string);
            let role = if self.newest.primary == Some(other) {
                "the primary"
            } else if self.newest.is_member(other) {
                "a member"
            } else {
                "no member"
            };
            let reached = match at.and_then(|node| self.inventory.closed(node)) {
                _ if self.found.contains_key(&other) => "it answers".to_owned(),
                Some(closed) => format!("its node answers, and it is not open there: {closed}"),
                None => "it is not reached".to_owned(),
            };
            losses.push(format!(
                "the copy on {place} ({role} of version {version}; {reached}) is thrown away and made anew; nothing of it is kept"
            ));
        }
        losses.push(
            "whoever still runs on one of those copies goes on until its node reaches the controller: stop it".into(),
        );
        let name = self.stored.object.request.name.clone();
        Promotion { volume: id, name, node: node.clone(), newest: self.newest.stamp, losses }
    }
}

fn text(stamp: Stamp) -> String {
    format!("{}.{}", stamp.generation.0, stamp.version.0)
}
