//! Rebuilds the catalogue from what the replicas find on the disks: of one machine, or of every node of a cluster.
//!
//! Invariants: what the catalogue has is never changed, but a configuration that is older than what the copies know
//! ([`mirrored`]), and what it calls half made and is on the disks: that is ready; every volume and snapshot on the disks is in
//! the catalogue afterwards, under its own id, so that whoever knows the id (a PersistentVolume does) can use it; where a name is lost
//! or taken, it gets one that says so; a node that does not answer is named,
//! and so is a pool that is not open. Which nodes a volume is published to is not on
//! the disks: the callers publish again.

mod choice;
mod forced;
mod inventory;
mod mirrored;

pub use forced::{ForceError, Promotion};

use super::Controller;
use super::seal::{Sealed, found as taken, is_described, ready};
use crate::catalog::{
    Access, Catalog, CreateError, Descriptor, GroupSnapshot, GroupStatus, NodeName, Object, Reach, Replication,
    Snapshot, SnapshotStatus, Stored, UpdateError, Volume, VolumePhase, VolumeRequest,
};
use crate::csi::errors::Transient;
use crate::csi::nodes::Nodes;
use crate::csi::operations::Subject;
use crate::protocol::{Generation, Stamp};
use crate::rpc::control;
use crate::volume::{SnapshotId, VolumeId, VolumeSize};
use inventory::Inventory;
use std::collections::{BTreeMap, BTreeSet};

/// How often what somebody else has changed meanwhile is looked at again.
const ATTEMPTS: usize = 4;

/// What was done, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Volumes that are in the catalogue again.
    pub volumes: u64,
    /// Snapshots that are in the catalogue again.
    pub snapshots: u64,
    /// Groups that are in the catalogue again.
    pub groups: u64,
    /// Objects that were there and were not touched.
    pub kept: u64,
    /// One sentence each: what could not be brought back as it was.
    pub problems: Vec<String>,
    /// One for each volume of a cluster.
    pub rows: Vec<Row>,
    /// Where volumes and snapshots may be that nobody has named.
    pub unopened: Vec<Unopened>,
}

/// A pool that is not open, or that has copies which are not, on a node that has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unopened {
    /// Which node.
    pub node: NodeName,
    /// Its pool.
    pub pool: String,
    /// One sentence.
    pub problem: String,
}

/// What became of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Which.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// In a word or two.
    pub state: State,
    /// Its configuration in the catalogue now, if it has copies on several nodes.
    pub configuration: Option<Stamp>,
    /// Where its copies are that were read.
    pub nodes: Vec<NodeName>,
    /// Where copies are that were not: they may have newer writes.
    pub missing: Vec<String>,
}

/// See [`Row::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was not in the catalogue, and is.
    PutBack,
    /// It was there, and nothing was changed.
    Kept,
    /// It was there with an older configuration than its copies have, or half made.
    Raised,
    /// Nobody may be primary before other copies are read, or one is forced.
    Waits,
    /// It is not in the catalogue.
    Left,
}

/// Raises the generation once, when the first configuration needs it.
struct Raise<'a> {
    catalog: &'a Catalog,
    /// The highest that any copy knows.
    found: Generation,
    raised: Option<Generation>,
}

impl Raise<'_> {
    async fn generation(&mut self) -> Result<Generation, Transient> {
        if self.raised.is_none() {
            self.raised = Some(self.catalog.raise_generation(self.found).await?);
        }
        Ok(self.raised.unwrap_or_default())
    }
}

impl Controller {
    /// Puts back what the catalogue has lost.
    pub async fn recover(&self) -> Result<Report, Transient> {
        let _recovery = self.start(Subject::Recovery)?;
        recover(&self.catalog, &self.nodes).await
    }
}

/// Puts back what the catalogue has lost.
pub async fn recover(catalog: &Catalog, nodes: &Nodes) -> Result<Report, Transient> {
    let found = Inventory::ask(nodes).await?;
    let mut report = Report { unopened: found.unopened.clone(), ..Report::default() };
    for (node, error) in &found.silent {
        let done = "what only that node has is not put back; bring it back and repeat this";
        report.problems.push(format!("node {node} was not read, and {done}: {error}"));
    }
    let mut raise = Raise { catalog, found: found.generation(), raised: None };
    for (text, copies) in &found.volumes {
        let Ok(id) = text.parse::<VolumeId>() else {
            report.problems.push(format!("volume {text:?} is none of ours"));
            continue;
        };
        if copies.iter().any(|(_, copy)| copy.record.is_some()) {
            if nodes.is_alone() {
                let advice = "recover the cluster that it belongs to, at its controller";
                report.problems.push(format!("volume {id} is one copy of several: {advice}"));
                continue;
            }
            let row = mirrored::put_back(&found, id, copies, &mut raise, &mut report).await?;
            report.rows.push(row);
        } else {
            recover_volume(catalog, id, copies, nodes.is_alone(), &mut report).await?;
        }
    }
    let mut groups = BTreeMap::new();
    for sealed in found.snapshots.values() {
        if let Some(group) = recover_snapshot(catalog, sealed, &found, nodes.is_alone(), &mut report).await? {
            groups.insert(group.id, group);
        }
    }
    // After their members, so that a group in the catalogue is always whole.
    for group in groups.into_values() {
        let done = match catalog.get::<GroupSnapshot>(&group.id.to_string()).await? {
            Some(there) if there.object.status == GroupStatus::Creating && !there.object.deleted => {
                let object = GroupSnapshot { status: group.status, ..there.object };
                finish(catalog, Stored { version: there.version, object }, &mut report).await?
            }
            Some(_) | None => put(catalog, group, |group, name| group.name = name, &mut report).await?,
        };
        report.groups += u64::from(done);
    }
    Ok(report)
}

/// A volume with one copy.
async fn recover_volume(
    catalog: &Catalog,
    id: VolumeId,
    copies: &[(NodeName, control::Volume)],
    alone: bool,
    report: &mut Report,
) -> Result<(), Transient> {
    let Some((node, copy)) = copies.first() else { return Ok(()) };
    for (other, _) in &copies[1..] {
        report.problems.push(format!("volume {id} is on {node} and on {other}: the one on {node} is used"));
    }
    let Some(mut volume) = wanted(id, copy, Replication::None, report) else { return Ok(()) };
    volume.spec.node = (!alone).then(|| node.clone());
    volume.status.phase = if copy.ready { VolumePhase::Ready } else { VolumePhase::Creating };
    let name = volume.request.name.clone();
    let state = if finish_volume(catalog, &volume, report).await? {
        State::Raised
    } else if put(catalog, volume, |volume, name| volume.request.name = name, report).await? {
        report.volumes += 1;
        State::PutBack
    } else {
        State::Kept
    };
    if !alone {
        let (nodes, missing) = (vec![node.clone()], Vec::new());
        report.rows.push(Row { volume: id, name, state, configuration: None, nodes, missing });
    }
    Ok(())
}

/// A volume that the catalogue calls half made, and that is on a disk, is ready. Whether it was.
async fn finish_volume(catalog: &Catalog, found: &Volume, report: &mut Report) -> Result<bool, Transient> {
    let stored = catalog.get::<Volume>(&found.id.to_string()).await?;
    let is_half_made = |volume: &Volume| volume.status.phase == VolumePhase::Creating && volume.spec.mirror.is_none();
    let Some(mut stored) = stored.filter(|stored| is_half_made(&stored.object)) else { return Ok(false) };
    if found.status.phase != VolumePhase::Ready {
        return Ok(false);
    }
    stored.object.status.clone_from(&found.status);
    (stored.object.spec.size, stored.object.spec.deleted) = (found.spec.size, false);
    report.volumes += u64::from(finish(catalog, stored, report).await?);
    Ok(true)
}

/// A half made object that is one of what the disks have. Whether it is ready now; a call that works on it goes before.
async fn finish<T: Object>(catalog: &Catalog, stored: Stored<T>, report: &mut Report) -> Result<bool, Transient> {
    let key = stored.object.key();
    match catalog.update(stored).await {
        Ok(_) => Ok(true),
        Err(UpdateError::Conflict { .. }) => {
            report.problems.push(format!("{} {key} is being made just now: repeat this", T::KIND));
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// The object of a volume, by one copy and what lies beside it.
fn wanted(id: VolumeId, copy: &control::Volume, replication: Replication, report: &mut Report) -> Option<Volume> {
    let Ok(size) = VolumeSize::try_from(copy.size_bytes) else {
        report.problems.push(format!("volume {id} of {} bytes is none of ours", copy.size_bytes));
        return None;
    };
    let (request, rebuild_after) = match Descriptor::decode(&copy.descriptor) {
        Some(Descriptor::Volume { request, rebuild_after }) => (request, rebuild_after),
        Some(Descriptor::Snapshot { .. }) | None => {
            report.problems.push(format!("volume {id} has lost its name and what it was made for; it can be used"));
            let request = VolumeRequest {
                name: lost_name(&id.to_string()),
                size,
                pool: copy.pool.clone(),
                fs_type: None,
                verify_reads: copy.verify_reads,
                access: BTreeSet::from([Access::Block, Access::Mount(None)]),
                source: None,
                replication,
                rebuild_after: Default::default(),
                reach: Reach::default(),
            };
            (request, None)
        }
    };
    let mut volume = Volume::wanted(id, request);
    volume.spec.size = size;
    volume.spec.rebuild_after = rebuild_after.unwrap_or(volume.spec.rebuild_after);
    volume.spec.verify_reads = copy.verify_reads;
    volume.status.size = size;
    volume.status.verify_reads = copy.verify_reads;
    Some(volume)
}

/// Returns the group that the snapshot is a member of, if all of its members were found. Of a mirrored volume, a node that has
/// something under the id and was never told that it is the snapshot has no descriptor of it, and is no holder.
async fn recover_snapshot(
    catalog: &Catalog,
    answers: &[(NodeName, control::Snapshot)],
    found: &Inventory,
    alone: bool,
    report: &mut Report,
) -> Result<Option<GroupSnapshot>, Transient> {
    let described = answers.iter().find(|(_, sealed)| is_described(sealed));
    let Some((holder, sealed)) = described.or(answers.first()) else { return Ok(None) };
    let (Ok(id), Ok(volume)) = (sealed.snapshot_id.parse::<SnapshotId>(), sealed.volume_id.parse::<VolumeId>()) else {
        report.problems.push(format!("snapshot {:?} is none of ours", sealed.snapshot_id));
        return Ok(None);
    };
    let Ok(size) = VolumeSize::try_from(sealed.size_bytes) else {
        report.problems.push(format!("snapshot {id} has an impossible size, {} bytes", sealed.size_bytes));
        return Ok(None);
    };
    let (name, group, made_for) = match Descriptor::decode(&sealed.descriptor) {
        Some(Descriptor::Snapshot { name, group, made_for }) => (name, group, made_for),
        // Its descriptor lies beside a snapshot before it has the name; only a copy that followed a seal in the middle of its
        // resync has none.
        Some(Descriptor::Volume { .. }) | None
            if !alone && (sealed.descriptor.is_empty() || found.is_mirrored(volume)) =>
        {
            report.problems.push(format!("snapshot {id} was not taken to the end: it is not put back"));
            return Ok(None);
        }
        Some(Descriptor::Volume { .. }) | None => {
            report.problems.push(format!("snapshot {id} has lost its name; it can be used"));
            (Some(lost_name(&id.to_string())), None, None)
        }
    };
    let is_whole =
        |group: &GroupSnapshot| group.members.iter().all(|m| found.snapshots.contains_key(&m.snapshot.to_string()));
    let group = match group {
        Some(group) if is_whole(&group) => {
            Some(GroupSnapshot { status: GroupStatus::Ready { created_ms: sealed.created_ms }, ..*group })
        }
        Some(group) => {
            report.problems.push(format!("snapshot {id} is alone: others of group {:?} are gone", group.name));
            None
        }
        None => None,
    };
    let status = SnapshotStatus::Ready { size, created_ms: sealed.created_ms };
    let member_of = group.as_ref().map(|group| group.id);
    let node = Some(holder.clone()).filter(|_| !alone);
    let mut snapshot = Snapshot { name, group: member_of, made_for, status, ..Snapshot::wanted(id, volume, node) };
    if found.is_mirrored(volume) {
        for (node, sealed) in answers {
            match sealed.copy_id.parse() {
                Ok(copy) if is_described(sealed) => drop(snapshot.copies.insert(copy, node.clone())),
                Ok(_) | Err(_) => drop(snapshot.strays.insert(node.clone())),
            }
        }
    }
    put_snapshot(catalog, snapshot, taken(answers, found.is_mirrored(volume)), report).await?;
    Ok(group)
}

/// In place of one that the catalogue calls half made, or if there is none.
async fn put_snapshot(
    catalog: &Catalog,
    snapshot: Snapshot,
    sealed: Option<Sealed>,
    report: &mut Report,
) -> Result<(), Transient> {
    let there = catalog.get::<Snapshot>(&snapshot.key()).await?;
    let is_half_made = |there: &Stored<Snapshot>| {
        let Snapshot { status, deleted, .. } = &there.object;
        *status == SnapshotStatus::Creating && !deleted
    };
    let done = match (there.filter(is_half_made), sealed) {
        (Some(there), Some(sealed)) => {
            let object = ready(there.object, sealed);
            finish(catalog, Stored { version: there.version, object }, report).await?
        }
        _ => put(catalog, snapshot, |snapshot, name| snapshot.name = Some(name), report).await?,
    };
    report.snapshots += u64::from(done);
    Ok(())
}

fn lost_name(key: &str) -> String {
    format!("recovered-{key}")
}

/// Creates the object unless its key is there; under another name if its name is taken. Whether it was created.
async fn put<T: Object>(
    catalog: &Catalog,
    object: T,
    rename: impl FnOnce(&mut T, String),
    report: &mut Report,
) -> Result<bool, Transient> {
    let key = object.key();
    if catalog.get::<T>(&key).await?.is_some() {
        report.kept += 1;
        return Ok(false);
    }
    let mut renamed = object.clone();
    let taken = match catalog.create(object).await {
        Ok(_) => return Ok(true),
        Err(CreateError::Exists { key, .. }) => key,
        Err(error) => return Err(error.into()),
    };
    rename(&mut renamed, lost_name(&key));
    report.problems.push(format!("{} {key} has a new name, because {taken} has its own", T::KIND));
    match catalog.create(renamed).await {
        Ok(_) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
