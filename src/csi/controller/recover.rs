//! Rebuilds the catalogue from what the replica finds on the disks.
//!
//! Invariants: what the catalogue has is never changed; every volume and snapshot on the disks is in the catalogue
//! afterwards, under its own id, so that whoever knows the id (a PersistentVolume does) can use it; where a name is lost
//! or taken, it gets one that says so. Which nodes a volume is published to is not on the disks: the callers publish again.

use crate::catalog::{
    Access, Catalog, CreateError, Descriptor, GroupSnapshot, GroupStatus, Object, Replication, Snapshot,
    SnapshotStatus, Volume, VolumePhase, VolumeRequest,
};
use crate::csi::control::{Control, ControlError};
use crate::csi::errors::Transient;
use crate::rpc::control::{self, ListSnapshotsRequest, ListVolumesRequest};
use crate::volume::{SnapshotId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};

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
}

/// Puts back what the catalogue has lost.
pub async fn recover(catalog: &Catalog, control: &Control) -> Result<Report, Transient> {
    let volumes = control.client().list_volumes(ListVolumesRequest {}).await.map_err(ControlError::from)?;
    let snapshots = control.client().list_snapshots(ListSnapshotsRequest {}).await.map_err(ControlError::from)?;
    let mut report = Report::default();
    for copy in volumes.into_inner().volumes {
        recover_volume(catalog, &copy, &mut report).await?;
    }
    let snapshots = snapshots.into_inner().snapshots;
    let found: BTreeSet<_> = snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone()).collect();
    let mut groups = BTreeMap::new();
    for sealed in &snapshots {
        if let Some(group) = recover_snapshot(catalog, sealed, &found, &mut report).await? {
            groups.insert(group.id, group);
        }
    }
    // After their members, so that a group in the catalogue is always whole.
    for group in groups.into_values() {
        if put(catalog, group, |group, name| group.name = name, &mut report).await? {
            report.groups += 1;
        }
    }
    Ok(report)
}

async fn recover_volume(catalog: &Catalog, copy: &control::Volume, report: &mut Report) -> Result<(), Transient> {
    let (Ok(id), Ok(size)) = (copy.volume_id.parse::<VolumeId>(), VolumeSize::try_from(copy.size_bytes)) else {
        report.problems.push(format!("volume {:?} of {} bytes is none of ours", copy.volume_id, copy.size_bytes));
        return Ok(());
    };
    let request = match Descriptor::decode(&copy.descriptor) {
        Some(Descriptor::Volume { request }) => request,
        Some(Descriptor::Snapshot { .. }) | None => {
            report.problems.push(format!("volume {id} has lost its name and what it was made for; it can be used"));
            VolumeRequest {
                name: lost_name(&id.to_string()),
                size,
                pool: copy.pool.clone(),
                fs_type: None,
                verify_reads: copy.verify_reads,
                access: BTreeSet::from([Access::Block, Access::Mount(None)]),
                source: None,
                replication: Replication::None,
            }
        }
    };
    let mut volume = Volume::wanted(id, request);
    volume.spec.size = size;
    volume.spec.verify_reads = copy.verify_reads;
    volume.status.size = size;
    volume.status.verify_reads = copy.verify_reads;
    volume.status.phase = if copy.ready { VolumePhase::Ready } else { VolumePhase::Creating };
    if put(catalog, volume, |volume, name| volume.request.name = name, report).await? {
        report.volumes += 1;
    }
    Ok(())
}

/// Returns the group that the snapshot is a member of, if all of its members were found.
async fn recover_snapshot(
    catalog: &Catalog,
    sealed: &control::Snapshot,
    found: &BTreeSet<String>,
    report: &mut Report,
) -> Result<Option<GroupSnapshot>, Transient> {
    let (Ok(id), Ok(volume)) = (sealed.snapshot_id.parse::<SnapshotId>(), sealed.volume_id.parse::<VolumeId>()) else {
        report.problems.push(format!("snapshot {:?} is none of ours", sealed.snapshot_id));
        return Ok(None);
    };
    let Ok(size) = VolumeSize::try_from(sealed.size_bytes) else {
        report.problems.push(format!("snapshot {id} has an impossible size, {} bytes", sealed.size_bytes));
        return Ok(None);
    };
    let (name, group) = match Descriptor::decode(&sealed.descriptor) {
        Some(Descriptor::Snapshot { name, group }) => (name, group),
        Some(Descriptor::Volume { .. }) | None => {
            report.problems.push(format!("snapshot {id} has lost its name; it can be used"));
            (Some(lost_name(&id.to_string())), None)
        }
    };
    let is_whole = |group: &GroupSnapshot| group.members.iter().all(|m| found.contains(&m.snapshot.to_string()));
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
    let snapshot = Snapshot { name, group: member_of, status, ..Snapshot::wanted(id, volume, None) };
    if put(catalog, snapshot, |snapshot, name| snapshot.name = Some(name), report).await? {
        report.snapshots += 1;
    }
    Ok(group)
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
