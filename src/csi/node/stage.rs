//! NodeStageVolume and NodeUnstageVolume: from a volume to a mounted filesystem (or an attached device) and back.
//!
//! Stage: record, attach, format or check or grow if due, mount, grow. Unstage: unmount, detach, forget. Each step is
//! skipped where the kernel says that it is done.

use super::errors::{StageError, UnstageError};
use super::path::{PathError, resolve};
use super::records::{Staged, Use};
use super::release::{Release, Turn, start_instead};
use super::replica::Facts;
use super::{Inner, filesystem, required};
use crate::catalog::{Access, FsType};
use crate::csi::capability::Capability;
use crate::csi::control::ControlError;
use crate::mount::{
    Filesystem, GrowError, MountOptions, MountTable, device_number, forget_formatting, grow_mounted, mount_device,
    prepare, unmount,
};
use crate::rpc::csi::{
    NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse,
};
use crate::volume::VolumeId;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a call that has failed waits until its device is gone: who unstages a device on which it hung waits for that.
const DETACH_LIMIT: Duration = Duration::from_secs(5);

/// Makes the volume ready to be published.
pub fn stage(node: &Inner, request: &NodeStageVolumeRequest) -> Result<NodeStageVolumeResponse, StageError> {
    required("volume_id", &request.volume_id)?;
    required("staging_target_path", &request.staging_target_path)?;
    let used = Use::from(Capability::required(request.volume_capability.as_ref())?);
    let (id, _operation) = node.start(&request.volume_id)?;
    let facts = node.replica.volume_to_use(id)?;
    let staging = resolve(&request.staging_target_path)?;
    if !staging.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        return Err(StageError::NotADirectory(staging));
    }
    if let Some((copied, to_copy)) = facts.copying {
        return Err(StageError::Copying { volume: id, copied, to_copy });
    }
    let filesystem = match used.access {
        Access::Block => None,
        Access::Mount(asked) => Some(filesystem(asked.or(facts.fs_type).unwrap_or(FsType::Ext4))),
    };
    let options = filesystem.map(|kind| MountOptions::parse(kind, &used.mount_flags)).transpose()?;
    let targets = match node.records.load(id)? {
        Some(record) if record.staging == staging && record.used == used => record.targets,
        Some(record) if is_staged(&record, &facts)? => return Err(StageError::Elsewhere(Box::new(record))),
        // A record without anything behind it is from before the machine was restarted.
        Some(_) | None => Default::default(),
    };
    let mut record = Staged::new(id, staging, used, filesystem);
    record.targets = targets;
    // Persist before you act: what is mounted is always announced.
    node.records.store(&record)?;
    node.steps.done()?;
    if filesystem.is_none() {
        forget_formatting(&node.format_mark(id))?;
    }
    let device = node.replica.attach(id)?;
    node.steps.done()?;
    let (Some(filesystem), Some(options)) = (filesystem, options) else { return Ok(NodeStageVolumeResponse {}) };
    match mount(node, &record, &facts, &device, filesystem, &options) {
        Ok(()) => Ok(NodeStageVolumeResponse {}),
        Err(StageError::Interrupted(cut)) => Err(cut.into()),
        Err(error) => {
            give_up(node, &record);
            Err(error)
        }
    }
}

/// A refused volume is not kept attached: kubelet does not unstage what was never staged, and then it could not be deleted.
/// What cannot be undone now stays on record, for the next call.
fn give_up(node: &Inner, record: &Staged) {
    let is_free = || Some(MountTable::read().ok()?.at(&record.staging).is_none());
    let detach = || node.replica.detach_within(record.volume, DETACH_LIMIT);
    if record.targets.is_empty() && is_free() == Some(true) && matches!(detach(), Some(Ok(()))) {
        let _ = node.records.remove(record.volume);
    }
}

/// Whether anything of this record is still in effect.
fn is_staged(record: &Staged, facts: &Facts) -> Result<bool, StageError> {
    let Some(device) = &facts.device else { return Ok(false) };
    match record.filesystem {
        None => Ok(true),
        Some(_) => {
            let number = device_number(device).ok();
            Ok(MountTable::read()?.at(&record.staging).is_some_and(|mount| Some(mount.device) == number))
        }
    }
}

fn mount(
    node: &Inner,
    record: &Staged,
    facts: &Facts,
    device: &Path,
    filesystem: Filesystem,
    options: &MountOptions,
) -> Result<(), StageError> {
    let number = device_number(device).map_err(|source| StageError::Device { device: device.into(), source })?;
    let table = MountTable::read()?;
    match table.at(&record.staging) {
        Some(mount) if mount.device == number => {}
        Some(_) => return Err(StageError::Occupied(record.staging.clone())),
        None => {
            // Mounted elsewhere means checked before; checking it now would damage it.
            if table.of_device(number).next().is_none() {
                prepare(device, filesystem, facts.origin, &node.format_mark(record.volume))?;
                node.steps.done()?;
            }
            mount_device(device, &record.staging, filesystem, options)?;
            node.steps.done()?;
        }
    }
    if options.is_read_only() {
        return Ok(());
    }
    match grow_mounted(filesystem, device, &record.staging) {
        Ok(_) => Ok(()),
        // It was as large as its device when it was mounted; NodeExpandVolume says the rest to whoever grew it since.
        Err(GrowError::Capability) => Ok(()),
        Err(error) => {
            // Mounted by this call and of no use: gone again, unless somebody is on it already.
            if table.at(&record.staging).is_none() {
                let _ = unmount(&record.staging);
            }
            Err(error.into())
        }
    }
}

/// Undoes [`stage`]. Ids and paths where nothing is are fine.
pub fn unstage(node: &Inner, request: &NodeUnstageVolumeRequest) -> Result<NodeUnstageVolumeResponse, UnstageError> {
    required("volume_id", &request.volume_id)?;
    required("staging_target_path", &request.staging_target_path)?;
    let Ok(volume) = request.volume_id.parse() else { return Ok(NodeUnstageVolumeResponse {}) };
    let staging = match resolve(&request.staging_target_path) {
        Err(PathError::NoParent(_)) => None,
        resolved => Some(resolved?),
    };
    let turn = start_instead(node, volume, || is_last_user(node, volume, staging.as_deref()))?;
    match node.records.load(volume)? {
        Some(record) => unstage_recorded(node, &turn, &record, staging.as_deref())?,
        None => unstage_unrecorded(node, volume, &turn, staging)?,
    }
    Ok(NodeUnstageVolumeResponse {})
}

/// Whether [`unstage_recorded`] would take the device away. What is not recorded yet has none on which a call could hang.
fn is_last_user(node: &Inner, volume: VolumeId, staging: Option<&Path>) -> bool {
    let (Ok(Some(record)), Ok(table)) = (node.records.load(volume), MountTable::read()) else { return false };
    staging.is_none_or(|staging| staging == record.staging)
        && !record.targets.keys().any(|target| table.at(target).is_some())
}

fn unstage_recorded(node: &Inner, turn: &Turn, record: &Staged, staging: Option<&Path>) -> Result<(), UnstageError> {
    let table = MountTable::read()?;
    if let Some(target) = record.targets.keys().find(|target| table.at(target).is_some()) {
        return Err(UnstageError::Published { volume: record.volume, target: target.clone() });
    }
    // Another path than the one where it is staged: there it is not, and that is what was asked for.
    if staging.is_some_and(|staging| staging != record.staging) {
        return Ok(());
    }
    let mut release = Release::new(node, record.volume, turn);
    if record.filesystem.is_some() {
        release.unmount(&record.staging)?;
        node.steps.done()?;
    }
    release.detach()?;
    node.records.remove(record.volume)?;
    node.steps.done()?;
    Ok(())
}

/// A volume without a record: forgotten already, or never staged by this installation.
fn unstage_unrecorded(
    node: &Inner,
    volume: VolumeId,
    turn: &Turn,
    staging: Option<PathBuf>,
) -> Result<(), UnstageError> {
    let facts = match node.replica.volume(volume) {
        Err(ControlError::NotFound(_)) => return Ok(()),
        facts => facts?,
    };
    let Some(device) = facts.device else { return Ok(()) };
    let mut release = Release::new(node, volume, turn);
    if let (Some(staging), Ok(number)) = (staging, device_number(&device))
        && MountTable::read()?.at(&staging).is_some_and(|mount| mount.device == number)
    {
        release.unmount(&staging)?;
        node.steps.done()?;
    }
    release.detach()
}
