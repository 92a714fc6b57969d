//! NodePublishVolume and NodeUnpublishVolume: the staged volume at a target path, and away from it again.
//!
//! Publish: record, make the target, bind, restrict. Unpublish: unmount, remove the target, forget. The target (a directory,
//! or a file for a device) is made and removed here and is never removed with anything in it.

use super::errors::{PublishError, UnpublishError};
use super::path::{PathError, resolve};
use super::records::{Published, RecordError, Staged, Use};
use super::release::start_instead;
use super::{Inner, is_node_of, only_reads, required};
use crate::catalog::{Access, AccessMode};
use crate::csi::capability::Capability;
use crate::csi::control::ControlError;
use crate::mount::{
    MountOptions, MountTable, bind, device_number, read_only_twin, remove_read_only_twin, restrict_bind, unmount,
};
use crate::rpc::csi::{
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
};
use crate::store::is_full;
use crate::volume::VolumeId;
use std::fs::{DirBuilder, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use sys_mount::MountFlags;

/// Makes the staged volume visible at the target.
pub fn publish(node: &Inner, request: &NodePublishVolumeRequest) -> Result<NodePublishVolumeResponse, PublishError> {
    required("volume_id", &request.volume_id)?;
    required("target_path", &request.target_path)?;
    let used = Use::from(Capability::required(request.volume_capability.as_ref())?);
    let (id, _operation) = node.start(&request.volume_id)?;
    let Some(mut record) = node.records.load(id)? else {
        node.replica.volume(id)?;
        return Err(PublishError::NotStaged(id));
    };
    if request.staging_target_path.is_empty() {
        return Err(PublishError::NoStagingPath);
    }
    if resolve(&request.staging_target_path)? != record.staging {
        return Err(PublishError::StagedElsewhere { volume: id, staging: record.staging });
    }
    let target = resolve(&request.target_path)?;
    if target == record.staging {
        return Err(PublishError::TargetIsStaging(target));
    }
    let published = Published { used, readonly: request.readonly };
    let binding = Binding::new(&record, &published)?;
    let table = MountTable::read()?;
    // Targets that are gone with a restart of the machine count for nothing.
    record.targets.retain(|path, _| *path == target || table.at(path).is_some());
    match record.targets.get(&target) {
        Some(other) if *other != published && table.at(&target).is_some() => {
            return Err(PublishError::Otherwise { volume: id, target });
        }
        Some(_) | None => check_others(&record, &target, published.used.mode)?,
    }
    let source = source(node, &record, &table)?;
    record.targets.insert(target.clone(), published);
    // Persist before you act: every target that is made is announced.
    node.records.store(&record)?;
    node.steps.done()?;
    let source = match source {
        Source::Directory(staging) => staging,
        Source::Device(device) if binding.read_only => {
            read_only_twin(&device).map_err(|source| PublishError::Twin { device, source })?
        }
        Source::Device(device) => device,
    };
    node.steps.done()?;
    binding.establish(node, &source, &target)?;
    Ok(NodePublishVolumeResponse {})
}

/// One target alone, unless both modes say that several are meant.
fn check_others(record: &Staged, target: &Path, mode: AccessMode) -> Result<(), PublishError> {
    let several = |mode| match mode {
        AccessMode::SingleNodeMultiWriter | AccessMode::MultiNodeReader => true,
        AccessMode::SingleNodeWriter | AccessMode::SingleNodeSingleWriter | AccessMode::SingleNodeReader => false,
    };
    let other =
        record.targets.iter().find(|(path, other)| *path != target && !(several(mode) && several(other.used.mode)));
    match other {
        Some((path, _)) => Err(PublishError::OnlyOnce { volume: record.volume, target: path.clone() }),
        None => Ok(()),
    }
}

enum Source {
    Directory(PathBuf),
    Device(PathBuf),
}

/// What is to be bound: it must really be there, whatever the record says.
fn source(node: &Inner, record: &Staged, table: &MountTable) -> Result<Source, PublishError> {
    if record.filesystem.is_none() {
        return Ok(Source::Device(node.replica.attach(record.volume)?));
    }
    if table.at(&record.staging).is_none() {
        return Err(PublishError::NotStaged(record.volume));
    }
    Ok(Source::Directory(record.staging.clone()))
}

/// How a target is made.
struct Binding {
    access: Access,
    read_only: bool,
    flags: MountFlags,
}

impl Binding {
    fn new(record: &Staged, published: &Published) -> Result<Self, PublishError> {
        let read_only = reads(published);
        let access = published.used.access;
        let different = || PublishError::NotAsStaged(record.volume);
        let Some(filesystem) = record.filesystem else {
            return match access {
                Access::Block => Ok(Self { access, read_only, flags: MountFlags::empty() }),
                Access::Mount(_) => Err(different()),
            };
        };
        match access {
            Access::Mount(asked) if asked.is_none_or(|asked| super::filesystem(asked) == filesystem) => {}
            Access::Mount(_) | Access::Block => return Err(different()),
        }
        let options = MountOptions::parse(filesystem, &published.used.mount_flags)?;
        let staged = MountOptions::parse(filesystem, &record.used.mount_flags)?;
        if !options.is_bind_of(&staged) {
            return Err(PublishError::NewOptions(record.volume));
        }
        let mut flags = options.flags_of_bind();
        flags.set(MountFlags::RDONLY, read_only || options.is_read_only());
        Ok(Self { access, read_only, flags })
    }

    fn establish(&self, node: &Inner, source: &Path, target: &Path) -> Result<(), PublishError> {
        if MountTable::read()?.at(target).is_some() {
            if !self.is_bound(source, target)? {
                return Err(PublishError::Occupied(target.into()));
            }
        } else {
            self.make_target(target)?;
            node.steps.done()?;
            bind(source, target)?;
            node.steps.done()?;
        }
        if !self.flags.is_empty() {
            if let Err(error) = restrict_bind(target, self.flags) {
                // Writable where it should not be: nobody shall find it.
                let _ = unmount(target);
                return Err(error.into());
            }
            node.steps.done()?;
        }
        Ok(())
    }

    fn is_bound(&self, source: &Path, target: &Path) -> Result<bool, PublishError> {
        Ok(match self.access {
            Access::Block => is_node_of(target, source),
            Access::Mount(_) => {
                let table = MountTable::read()?;
                let place = |path| table.at(path).map(|mount| (mount.device, mount.root.clone()));
                place(source) == place(target)
            }
        })
    }

    /// A directory or an empty file. One that is there already may be left from an interrupted call.
    fn make_target(&self, target: &Path) -> Result<(), PublishError> {
        let made = match self.access {
            Access::Mount(_) => DirBuilder::new().mode(0o750).create(target),
            Access::Block => OpenOptions::new().write(true).create_new(true).mode(0o600).open(target).map(drop),
        };
        match made {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let right = target.symlink_metadata().is_ok_and(|found| match self.access {
                    Access::Mount(_) => found.is_dir(),
                    Access::Block => found.is_file() && found.len() == 0,
                });
                if right { Ok(()) } else { Err(PublishError::Occupied(target.into())) }
            }
            Err(source) => Err(PublishError::Target { target: target.into(), source }),
        }
    }
}

/// Undoes [`publish`]. Ids and paths where nothing is are fine.
pub fn unpublish(
    node: &Inner,
    request: &NodeUnpublishVolumeRequest,
) -> Result<NodeUnpublishVolumeResponse, UnpublishError> {
    required("volume_id", &request.volume_id)?;
    required("target_path", &request.target_path)?;
    let Ok(id) = request.volume_id.parse::<VolumeId>() else { return Ok(NodeUnpublishVolumeResponse {}) };
    let target = match resolve(&request.target_path) {
        Err(PathError::NoParent(path)) => path,
        resolved => resolved?,
    };
    let _turn = start_instead(node, id, || is_last_target(node, id, &target))?;
    let record = node.records.load(id)?;
    let is_recorded = record.as_ref().is_some_and(|record| record.targets.contains_key(&target));
    if MountTable::read()?.at(&target).is_some() {
        if !is_recorded && !is_ours(node, id, &target)? {
            return Err(UnpublishError::NotOurs { volume: id, target });
        }
        unmount(&target)?;
        node.steps.done()?;
    }
    remove_target(&target)?;
    node.steps.done()?;
    if let Some(mut record) = record
        && let Some(gone) = record.targets.remove(&target)
    {
        if reads(&gone) {
            remove_unused_twin(node, &record)?;
        }
        match node.records.store(&record) {
            // The target is gone, which is what was asked for; a record that still names it names nothing that is mounted.
            Err(RecordError::Io { path, source }) if is_full(&source) => {
                tracing::warn!(volume = %id, path = %path.display(), error = %source, "a target that is gone stays on record");
            }
            stored => stored?,
        }
        node.steps.done()?;
    }
    Ok(NodeUnpublishVolumeResponse {})
}

/// Whether this is where the volume is used, and the only place: what waits for its device waits for nobody else.
fn is_last_target(node: &Inner, id: VolumeId, target: &Path) -> bool {
    let (Ok(Some(record)), Ok(table)) = (node.records.load(id), MountTable::read()) else { return false };
    // Also one that is recorded and not mounted: it may be just being made.
    record.targets.keys().eq([target]) && table.at(target).is_some()
}

/// Whether what is mounted at `target` is this volume, as the replica knows it.
fn is_ours(node: &Inner, id: VolumeId, target: &Path) -> Result<bool, UnpublishError> {
    let device = match node.replica.volume(id) {
        Err(ControlError::NotFound(_)) => return Ok(false),
        facts => facts?.device,
    };
    let Some(device) = device else { return Ok(false) };
    let number = device_number(&device).ok();
    let mounted = MountTable::read()?.at(target).is_some_and(|mount| Some(mount.device) == number);
    Ok(mounted || is_node_of(target, &device))
}

fn remove_target(target: &Path) -> Result<(), UnpublishError> {
    let found = match target.symlink_metadata() {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(UnpublishError::Target { target: target.into(), source }),
    };
    let removed = if found.is_dir() {
        std::fs::remove_dir(target)
    } else if found.is_file() && found.len() == 0 && !found.file_type().is_block_device() {
        std::fs::remove_file(target)
    } else {
        return Err(UnpublishError::NotEmpty(target.into()));
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Err(UnpublishError::NotEmpty(target.into())),
        Err(source) => Err(UnpublishError::Target { target: target.into(), source }),
        Ok(()) => Ok(()),
    }
}

fn reads(published: &Published) -> bool {
    published.readonly || only_reads(published.used.mode)
}

/// The read-only twin serves all read-only targets of a block volume; it goes with the last of them.
fn remove_unused_twin(node: &Inner, record: &Staged) -> Result<(), UnpublishError> {
    if record.filesystem.is_some() || record.targets.values().any(reads) {
        return Ok(());
    }
    if let Some(device) = node.replica.volume(record.volume)?.device {
        remove_read_only_twin(&device).map_err(|source| UnpublishError::Twin { device, source })?;
        node.steps.done()?;
    }
    Ok(())
}
