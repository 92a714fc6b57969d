//! DeleteVolume and DeleteSnapshot.
//!
//! Invariants: unknown ids of any shape are deleted already; "deleted" is written down before the replica is told, so a
//! crash in between is finished by the next call or the sweep; what is in use stays as it was. A snapshot that some node has
//! erased is deleted to the end: a node that is away erases it when it answers the sweep, and nobody waits for that. What
//! nobody has named is deleted only if nothing was ever written to it: the catalogue that calls it half made may be an old one.

use super::Controller;
use super::seal::{Erased, Place, forget};
use crate::catalog::{Snapshot, Stored, Volume, VolumePhase};
use crate::csi::control::{Control, ControlError};
use crate::csi::errors::{DeleteSnapshotError, DeleteVolumeError, Transient};
use crate::csi::operations::Subject;
use crate::rpc::control::DeleteVolumeRequest;
use crate::volume::{SnapshotId, VolumeId};
use std::collections::BTreeSet;

impl Controller {
    /// The volume is not, afterwards. Its snapshots and clones live on.
    pub async fn delete_volume(&self, id: &str) -> Result<(), DeleteVolumeError> {
        let Ok(id) = id.parse::<VolumeId>() else { return Ok(()) };
        let _volume = self.start_soon(Subject::Volume(id)).await?;
        match self.get::<Volume>(id).await? {
            Some(stored) => {
                let stored = self.named(stored).await?;
                self.erase_volume(stored).await
            }
            // The catalogue may be a new one: a copy that it does not know must not stay behind.
            None => self.erase_unknown(id).await,
        }
    }

    /// The volume, whose id somebody knows: so it was made, whatever the catalogue says.
    async fn named(&self, stored: Stored<Volume>) -> Result<Stored<Volume>, Transient> {
        if stored.object.status.phase == VolumePhase::Ready {
            return Ok(stored);
        }
        self.change(stored, |volume| volume.status.phase = VolumePhase::Ready).await
    }

    /// Needs the volume's operation (or that nobody knows its id).
    pub(super) async fn erase_volume(&self, mut stored: Stored<Volume>) -> Result<(), DeleteVolumeError> {
        let id = stored.object.id;
        if !stored.object.spec.publications.is_empty() {
            let nodes: Vec<_> = stored.object.spec.publications.keys().map(ToString::to_string).collect();
            return Err(DeleteVolumeError::InUse { id, by: format!("it is published to {}", nodes.join(", ")) });
        }
        if !stored.object.spec.deleted {
            self.check_detached(&stored.object).await?;
            stored = self.change(stored, |volume| volume.spec.deleted = true).await?;
        }
        let base = stored.object.spec.base.as_ref().map(|base| base.snapshot);
        if stored.object.spec.mirror.is_some() {
            self.give_up_copies(stored).await?;
            self.erase_mirror(id).await?;
            // The nodes have changed its status since.
            let Some(stored) = self.get::<Volume>(id).await? else { return Ok(()) };
            self.remove(&stored).await?;
            self.drop_made_for(id, base).await;
            return Ok(());
        }
        if self.gives_up_sole(&stored.object).await? {
            self.remove(&stored).await?;
            self.drop_made_for(id, base).await;
            return Ok(());
        }
        let control = self.home(&stored.object).await?.control;
        let unwritten = stored.object.status.phase == VolumePhase::Creating;
        match erase_copy(&control, id, &stored.object.request.pool, unwritten).await {
            Ok(()) => {
                self.remove(&stored).await?;
                self.drop_made_for(id, base).await;
                Ok(())
            }
            Err(error @ DeleteVolumeError::InUse { .. }) => {
                stored.object.spec.deleted = false;
                self.update(stored).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// A deletion that will be refused is not written down first: a backup that has it would delete the volume one day.
    async fn check_detached(&self, volume: &Volume) -> Result<(), DeleteVolumeError> {
        if volume.spec.mirror.is_some() || self.is_away(volume).await? {
            // Nothing is taken back: the nodes of a mirrored volume wait for its devices to go.
            return Ok(());
        }
        match self.copy_at(volume, volume.spec.node.as_ref()).await? {
            Some(copy) if !copy.device.is_empty() => {
                Err(DeleteVolumeError::InUse { id: volume.id, by: format!("its device {} is attached", copy.device) })
            }
            _ => Ok(()),
        }
    }

    /// Wherever a copy is. A node that is down cannot be asked, and need not be: what the catalogue does not know was
    /// deleted there before it was forgotten, unless the catalogue itself was lost.
    async fn erase_unknown(&self, id: VolumeId) -> Result<(), DeleteVolumeError> {
        for node in self.nodes.all().await? {
            match erase_copy(&node.control, id, "", false).await {
                Err(DeleteVolumeError::Transient(error)) if !self.nodes.is_alone() => {
                    tracing::warn!(volume = %id, node = %node.name, %error, "a copy that nobody knows may stay behind");
                }
                erased => erased?,
            }
        }
        Ok(())
    }

    /// The snapshot is not, afterwards. Clones of it live on.
    pub async fn delete_snapshot(&self, id: &str) -> Result<(), DeleteSnapshotError> {
        let Ok(id) = id.parse::<SnapshotId>() else { return Ok(()) };
        let _snapshot = self.start_soon(Subject::Snapshot(id)).await?;
        match self.get::<Snapshot>(id).await? {
            Some(stored) => match stored.object.group {
                Some(group) => Err(DeleteSnapshotError::Grouped { id, group }),
                None => self.erase_snapshot(stored).await,
            },
            None => self.erase_unknown_snapshot(id).await,
        }
    }

    /// Needs the snapshot's operation (or that nobody knows its id).
    pub(in crate::csi) async fn erase_snapshot(&self, mut stored: Stored<Snapshot>) -> Result<(), DeleteSnapshotError> {
        let id = stored.object.id;
        // Only the call that begins a deletion takes it back: an earlier one may have erased it on some nodes.
        let begins = !stored.object.deleted;
        if begins {
            stored.object.deleted = true;
            stored = self.update(stored).await?;
        }
        let mut others = stored.object.holders();
        others.extend(stored.object.strays.iter().cloned());
        // A volume that is written down after this finds it deleted.
        let erased = match self.being_made_from(id).await? {
            Some(volume) => {
                Err(DeleteSnapshotError::InUse { id, by: format!("volume {volume} is being made from it") })
            }
            None => self.erase_sealed(id, stored.object.node.as_ref(), &others).await,
        };
        match erased {
            Ok(Erased::Everywhere) => Ok(self.remove(&stored).await?),
            Ok(Erased::Partly(error)) if stored.object.is_mirrored() => {
                tracing::warn!(snapshot = %id, %error, "a deleted snapshot goes from this node when it answers");
                Ok(self.write_given_up(stored, &BTreeSet::new()).await?)
            }
            Ok(Erased::Partly(error)) => Err(error.into()),
            Err(error @ DeleteSnapshotError::InUse { .. }) if begins => {
                stored.object.deleted = false;
                self.update(stored).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Controller::erase_unknown`].
    async fn erase_unknown_snapshot(&self, id: SnapshotId) -> Result<(), DeleteSnapshotError> {
        for node in self.nodes.all().await? {
            match forget(&node.control, id, &Place::default()).await {
                Err(DeleteSnapshotError::Transient(error)) if !self.nodes.is_alone() => {
                    tracing::warn!(snapshot = %id, node = %node.name, %error, "a snapshot that nobody knows may stay behind");
                }
                erased => erased?,
            }
        }
        Ok(())
    }
}

async fn erase_copy(control: &Control, id: VolumeId, pool: &str, unwritten: bool) -> Result<(), DeleteVolumeError> {
    let request = DeleteVolumeRequest { volume_id: id.to_string(), pool: pool.to_owned(), unwritten };
    match control.client().delete_volume(request).await.map_err(|status| control.refusal(status)) {
        Ok(_) | Err(ControlError::NotFound(_)) => Ok(()),
        Err(ControlError::InUse(by)) => Err(DeleteVolumeError::InUse { id, by }),
        Err(error @ (ControlError::Unknown(_) | ControlError::NoRoom(_) | ControlError::Refused(_))) => {
            Err(Transient::Replica(error).into())
        }
    }
}
