//! Snapshots are brought over to copies that lack them: those that were away when they were taken, or made later.
//!
//! ```text
//!   an up-to-date copy lacks one ─> its node is a stray ─> the node reads it from a holder ─> durable ─> the copy is a holder
//! ```
//! # Invariants
//! * Before anything is made on a node it is among the snapshot's strays, so a deletion erases it there, too; it is a holder only when
//!   its node has said that the snapshot is durable. The node looks into the catalogue itself before it begins and before it seals.
//! * One at a time for each node, the oldest first: the next one is filled on what it brings. What failed rests, and then another
//!   holder is asked.
//! * Level-triggered: each look begins with the catalogue; what is remembered between two may be lost.

use super::Controller;
use crate::catalog::{NodeName, Snapshot, SnapshotStatus, Stored, Volume};
use crate::csi::errors::Transient;
use crate::csi::operations::Subject;
use crate::protocol::Configuration;
use crate::rpc::control::FillSnapshotRequest;
use crate::rpc::operator::locate_snapshots_response::Location;
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How often it looks while nothing is being brought over: whoever comes back is brought up to date first, which takes longer.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// The same while something is.
const LOOK_SOON: Duration = Duration::from_millis(500);
/// How long what has failed rests at first, and at most: a pool without room, or a node that is away, is not asked all the time.
const REST: Duration = Duration::from_secs(3);
const LONGEST_REST: Duration = Duration::from_secs(5 * 60);
/// How long a node may take to say how far it is.
const ANSWER_SOON: Duration = Duration::from_secs(4);

/// What a look remembers of the ones before it.
#[derive(Default)]
struct Memory {
    /// What each node is at.
    at: BTreeMap<NodeName, SnapshotId>,
    rests: BTreeMap<(SnapshotId, NodeName), Rest>,
    /// Nodes that have a snapshot in another tree than their copy's now: they are asked once.
    elsewhere: BTreeSet<(SnapshotId, InstanceId)>,
}

/// What has failed.
struct Rest {
    until: Instant,
    /// How often: another source is asked each time.
    times: usize,
    said: String,
}

/// A copy that lacks a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Lack {
    created_ms: u64,
    snapshot: SnapshotId,
    copy: InstanceId,
    node: NodeName,
}

/// Whom it is read from, and what both have already.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    node: NodeName,
    base: Option<SnapshotId>,
}

/// When it was taken, if it is one that copies shall have.
fn taken(snapshot: &Snapshot) -> Option<u64> {
    let wanted = !snapshot.deleted && snapshot.made_for.is_none() && !snapshot.copies.is_empty();
    match snapshot.status {
        SnapshotStatus::Ready { created_ms, .. } if wanted => Some(created_ms),
        SnapshotStatus::Ready { .. } | SnapshotStatus::Creating => None,
    }
}

/// What copies of the volume that have every acknowledged write lack; `snapshots` are the volume's.
fn lacks(volume: &Volume, now: &Configuration, snapshots: &[Snapshot]) -> Vec<Lack> {
    let Some(mirror) = volume.spec.mirror.as_ref().filter(|_| volume.is_visible()) else { return Vec::new() };
    let copies = || mirror.staying().filter(|(copy, _)| now.is_member(*copy) && volume.status.copies.contains(copy));
    let of = |snapshot: &Snapshot| {
        let created_ms = taken(snapshot)?;
        let without = copies().filter(|(copy, _)| !snapshot.copies.contains_key(copy));
        let lack = |(copy, node)| Lack { created_ms, snapshot: snapshot.id, copy, node };
        Some(without.map(|(copy, of)| lack((copy, of.node.clone()))).collect::<Vec<_>>())
    };
    let mut found: Vec<_> = snapshots.iter().filter_map(of).flatten().collect();
    found.sort();
    found
}

/// Where the snapshot can be read from: first whoever shares the newest older snapshot with the copy that lacks it.
fn sources(lack: &Lack, snapshots: &[Snapshot]) -> Vec<Source> {
    let Some(snapshot) = snapshots.iter().find(|snapshot| snapshot.id == lack.snapshot) else { return Vec::new() };
    let older = |base: &&Snapshot| taken(base).is_some_and(|taken| (taken, base.id) < (lack.created_ms, lack.snapshot));
    let mut bases: Vec<_> =
        snapshots.iter().filter(older).filter(|base| base.copies.contains_key(&lack.copy)).collect();
    bases.sort_by_key(|base| std::cmp::Reverse((taken(base), base.id)));
    let holders = snapshot.copies.iter().filter(|(_, node)| **node != lack.node);
    let mut found: Vec<_> = holders
        .map(|(copy, node)| {
            let place = bases.iter().position(|base| base.copies.contains_key(copy));
            (place.unwrap_or(bases.len()), Source { node: node.clone(), base: place.map(|place| bases[place].id) })
        })
        .collect();
    found.sort_by(|(one, a), (other, b)| (one, &a.node).cmp(&(other, &b.node)));
    found.into_iter().map(|(_, source)| source).collect()
}

/// The copy in this tree has the snapshot: whatever else was said of its node is over.
fn has_it(snapshot: &mut Snapshot, copy: InstanceId, node: &NodeName) {
    snapshot.strays.remove(node);
    snapshot.copies.retain(|_, holder| holder != node);
    snapshot.copies.insert(copy, node.clone());
}

impl Controller {
    /// Has snapshots brought over, until it is dropped.
    pub async fn bring_over(&self) {
        if self.nodes.is_alone() {
            // There is no other node.
            return;
        }
        let mut memory = Memory::default();
        loop {
            tokio::time::sleep(if memory.at.is_empty() { LOOK_EVERY } else { LOOK_SOON }).await;
            if let Err(error) = self.look_for_lacking(&mut memory).await {
                tracing::debug!(%error, "copies that lack snapshots are looked for again later");
            }
        }
    }

    async fn snapshots_by_volume(&self) -> Result<BTreeMap<VolumeId, Vec<Snapshot>>, Transient> {
        let mut of: BTreeMap<VolumeId, Vec<Snapshot>> = BTreeMap::new();
        for stored in self.all::<Snapshot>().await? {
            of.entry(stored.object.volume).or_default().push(stored.object);
        }
        Ok(of)
    }

    /// What the volume's copies lack of these snapshots, the oldest first.
    async fn lacks_of(&self, volume: VolumeId, snapshots: &[Snapshot]) -> Result<Vec<Lack>, Transient> {
        if snapshots.iter().all(|snapshot| taken(snapshot).is_none()) {
            return Ok(Vec::new());
        }
        let Some(stored) = self.get::<Volume>(volume).await? else { return Ok(Vec::new()) };
        Ok(self.committed(volume).await?.map_or_else(Vec::new, |now| lacks(&stored.object, &now, snapshots)))
    }

    /// On which nodes each snapshot is, and which are to get it.
    pub(super) async fn locate_snapshots(&self) -> Result<Vec<Location>, Transient> {
        let mut locations = Vec::new();
        for (volume, snapshots) in self.snapshots_by_volume().await? {
            let lacks = self.lacks_of(volume, &snapshots).await?;
            for snapshot in snapshots.iter().filter(|snapshot| snapshot.is_visible()) {
                let mut nodes = snapshot.holders();
                nodes.extend(self.nodes.name_of(snapshot.node.as_ref()).filter(|_| nodes.is_empty()));
                let lacking = lacks.iter().filter(|lack| lack.snapshot == snapshot.id && !nodes.contains(&lack.node));
                locations.push(Location {
                    snapshot_id: snapshot.id.to_string(),
                    lacking: lacking.map(|lack| lack.node.to_string()).collect(),
                    nodes: nodes.iter().map(ToString::to_string).collect(),
                });
            }
        }
        Ok(locations)
    }

    async fn look_for_lacking(&self, memory: &mut Memory) -> Result<(), Transient> {
        let of = self.snapshots_by_volume().await?;
        memory.rests.retain(|(id, _), _| of.values().flatten().any(|snapshot| snapshot.id == *id));
        memory.elsewhere.retain(|(id, _)| of.values().flatten().any(|snapshot| snapshot.id == *id));
        let mut all = Vec::new();
        for (volume, snapshots) in &of {
            all.extend(self.lacks_of(*volume, snapshots).await?.into_iter().map(|lack| (lack, snapshots)));
        }
        all.retain(|(lack, _)| !memory.elsewhere.contains(&(lack.snapshot, lack.copy)));
        all.sort_by(|(one, _), (other, _)| one.cmp(other));
        let at = std::mem::take(&mut memory.at);
        for node in all.iter().map(|(lack, _)| lack.node.clone()).collect::<BTreeSet<_>>() {
            let now = Instant::now();
            let rests =
                |lack: &Lack| memory.rests.get(&(lack.snapshot, node.clone())).is_some_and(|rest| rest.until > now);
            let mut here = all.iter().filter(|(lack, _)| lack.node == node);
            let begun = here.clone().find(|(lack, _)| at.get(&node) == Some(&lack.snapshot));
            let Some((lack, snapshots)) = begun.or_else(|| here.find(|(lack, _)| !rests(lack))) else { continue };
            match self.bring(lack, snapshots, memory).await {
                Ok(()) => {}
                // Somebody works on the snapshot.
                Err(Transient::UnderWay(_) | Transient::Conflict(_)) => _ = memory.at.insert(node, lack.snapshot),
                Err(error) => memory.fails(lack, error.to_string()),
            }
        }
        Ok(())
    }

    /// One step for one copy.
    async fn bring(&self, lack: &Lack, snapshots: &[Snapshot], memory: &mut Memory) -> Result<(), Transient> {
        let Lack { snapshot, copy, node, .. } = lack;
        let Some(object) = snapshots.iter().find(|object| object.id == *snapshot) else { return Ok(()) };
        let control = self.nodes.holder(Some(node)).await?.control;
        let is_holder = object.copies.values().any(|holder| holder == node);
        if is_holder && !object.strays.contains(node) {
            // In the tree of a copy that was here before, unless its disk is another one now.
            let held = self.nodes.holder(Some(node)).await?.snapshots().await?;
            let id = snapshot.to_string();
            let said = held.iter().filter(|held| held.snapshot_id == id).filter_map(|held| held.copy_id.parse().ok());
            if said.into_iter().any(|tree: InstanceId| object.copies.contains_key(&tree)) {
                memory.elsewhere.insert((*snapshot, *copy));
                return Ok(());
            }
        }
        let times = memory.rests.get(&(*snapshot, node.clone())).map_or(0, |rest| rest.times);
        let sources = sources(lack, snapshots);
        let Some(source) = sources.get(times % sources.len().max(1)) else {
            memory.fails(lack, "no other node has it".to_owned());
            return Ok(());
        };
        if !object.strays.contains(node)
            && !self.write_snapshot(lack, |object| _ = object.strays.insert(node.clone())).await?
        {
            return Ok(());
        }
        let request = FillSnapshotRequest {
            snapshot_id: snapshot.to_string(),
            copy_id: copy.to_string(),
            source_node: source.node.0.clone(),
            base_snapshot_id: source.base.map(|base| base.to_string()).unwrap_or_default(),
        };
        let asked = tokio::time::timeout(ANSWER_SOON, control.client().fill_snapshot(request)).await;
        let silent = || tonic::Status::unavailable(format!("node {node} does not answer"));
        let said = asked.unwrap_or_else(|_| Err(silent())).map_err(|status| control.refusal(status))?.into_inner();
        match said.copy_id.parse::<InstanceId>() {
            Ok(tree) => {
                if self.write_snapshot(lack, |object| has_it(object, tree, node)).await? {
                    tracing::info!(%snapshot, %node, from = %source.node, "a snapshot was brought over to a copy that lacked it");
                }
                memory.rests.remove(&(*snapshot, node.clone()));
                // There may be more for this node.
                memory.at.insert(node.clone(), *snapshot);
            }
            Err(_) if said.problem.is_empty() => _ = memory.at.insert(node.clone(), *snapshot),
            Err(_) => memory.fails(lack, said.problem),
        }
        Ok(())
    }

    /// Changes the snapshot, if it shall still be brought over and nobody works on it; whether it did.
    async fn write_snapshot(&self, lack: &Lack, change: impl Fn(&mut Snapshot)) -> Result<bool, Transient> {
        let _snapshot = self.start(Subject::Snapshot(lack.snapshot))?;
        let Some(mut stored) = self.get::<Snapshot>(lack.snapshot).await? else { return Ok(false) };
        let _group = match stored.object.group {
            Some(group) => Some(self.start(Subject::Group(group))?),
            None => None,
        };
        if taken(&stored.object).is_none() || stored.object.copies.contains_key(&lack.copy) {
            return Ok(false);
        }
        let Stored { version, object: before } = stored.clone();
        change(&mut stored.object);
        if stored.object != before {
            self.update(Stored { version, ..stored }).await?;
        }
        Ok(true)
    }
}

impl Memory {
    /// Said when it is something else than the last time.
    fn fails(&mut self, lack: &Lack, said: String) {
        let key = (lack.snapshot, lack.node.clone());
        let before = self.rests.get(&key);
        if before.is_none_or(|rest| rest.said != said) {
            tracing::warn!(snapshot = %lack.snapshot, node = %lack.node, problem = %said, "a snapshot is not brought over yet");
        }
        let times = before.map_or(1, |rest| rest.times + 1);
        let rest = REST.saturating_mul(1 << times.min(10).saturating_sub(1)).min(LONGEST_REST);
        self.rests.insert(key, Rest { until: Instant::now() + rest, times, said });
    }
}

#[cfg(test)]
#[path = "bring/tests.rs"]
mod tests;
