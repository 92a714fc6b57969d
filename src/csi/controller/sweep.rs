//! What is done at start about what was left half done and nobody repeats.
//!
//! Invariants: a deletion that was begun is finished; a wish that was written down is made true, or taken back where the
//! replica refuses it. What is half made holds a promise of space, but no caller knows its id: it is taken back, and a
//! repeated call begins anew. What somebody may know after all, because the catalogue is a restored one, is kept
//! ([`half_made`](super::half_made)). So is a copy from another source, because it may have taken hours: it goes on, is
//! the answer to the repeated call, and `tandem volume list` shows it for as long as nobody repeats it.

use super::Controller;
use super::snapshot::transient;
use crate::catalog::{GroupSnapshot, GroupStatus, Snapshot, SnapshotStatus, Stored, Volume, VolumePhase};
use crate::csi::errors::{DeleteVolumeError, ExpandError, ModifyError, Transient};
use crate::csi::operations::Subject;

impl Controller {
    /// Finishes everything that an earlier process left. What cannot be done now, because its node is down, is the
    /// error; the caller tries again later.
    pub async fn sweep(&self) -> Result<(), Transient> {
        let mut result = Ok(());
        for stored in self.all::<Volume>().await? {
            result = result.and(self.sweep_volume(stored).await);
        }
        for stored in self.all::<GroupSnapshot>().await? {
            result = result.and(self.sweep_group(stored).await);
        }
        for stored in self.all::<Snapshot>().await? {
            result = result.and(self.sweep_snapshot(stored).await);
        }
        result
    }

    /// Takes away snapshots that nobody can name and nobody needs: attempts that were given up, and what clones left. What
    /// cannot be done now, because its node is down, is the error.
    pub async fn sweep_given_up(&self) -> Result<(), Transient> {
        let mut result = Ok(());
        for stored in self.all::<Snapshot>().await? {
            let given_up = stored.object.deleted && stored.object.name.is_none();
            if given_up || self.is_left_over(&stored.object).await? {
                result = result.and(self.sweep_snapshot(stored).await);
            }
        }
        result
    }

    async fn sweep_group(&self, stored: Stored<GroupSnapshot>) -> Result<(), Transient> {
        if !stored.object.deleted && stored.object.status != GroupStatus::Creating {
            return Ok(());
        }
        // Whoever holds these is doing it now.
        let Ok(_name) = self.start(Subject::GroupName(stored.object.name.clone())) else { return Ok(()) };
        let Ok(_group) = self.start(Subject::Group(stored.object.id)) else { return Ok(()) };
        self.same(&stored).await?;
        if !stored.object.deleted && self.finish_group(&stored).await? {
            return Ok(());
        }
        self.erase_group(stored).await
    }

    async fn sweep_snapshot(&self, stored: Stored<Snapshot>) -> Result<(), Transient> {
        let half = stored.object.deleted || stored.object.status == SnapshotStatus::Creating;
        let half = half || self.is_left_over(&stored.object).await?;
        if !half || stored.object.group.is_some() {
            return Ok(());
        }
        let _name = match stored.object.name.clone().map(|name| self.start(Subject::SnapshotName(name))) {
            Some(Err(_)) => return Ok(()),
            name => name,
        };
        let Ok(_snapshot) = self.start(Subject::Snapshot(stored.object.id)) else { return Ok(()) };
        self.same(&stored).await?;
        if stored.object.status == SnapshotStatus::Creating && self.finish_snapshot(&stored).await? {
            return Ok(());
        }
        self.erase_snapshot(stored).await.map_err(transient)
    }

    async fn sweep_volume(&self, stored: Stored<Volume>) -> Result<(), Transient> {
        let volume = &stored.object;
        let (wanted, is) = (&volume.spec, &volume.status);
        let half_made = is.phase == VolumePhase::Creating;
        // The nodes of a mirrored volume go on by themselves, and `tend` takes in what they say.
        let half_changed =
            wanted.mirror.is_none() && (wanted.size != is.size || wanted.verify_reads != is.verify_reads);
        if !(wanted.deleted || half_made || half_changed) {
            return Ok(());
        }
        // Whoever holds these is doing it now.
        let Ok(_name) = self.start(Subject::VolumeName(volume.request.name.clone())) else { return Ok(()) };
        let Ok(_volume) = self.start(Subject::Volume(volume.id)) else { return Ok(()) };
        self.same(&stored).await?;
        let id = stored.object.id;
        if half_made && self.stays(&stored.object).await? {
            return self.keep(stored).await;
        }
        if half_made || stored.object.spec.deleted {
            return match self.erase_volume(stored).await {
                Ok(()) => Ok(()),
                Err(DeleteVolumeError::Transient(error)) => Err(error),
                Err(error @ (DeleteVolumeError::InUse { .. } | DeleteVolumeError::Argument(_))) => {
                    tracing::warn!(volume = %id, %error, "a deletion that was begun is taken back");
                    Ok(())
                }
            };
        }
        self.finish_changes(stored).await
    }

    async fn finish_changes(&self, stored: Stored<Volume>) -> Result<(), Transient> {
        let (id, wanted) = (stored.object.id, stored.object.spec.clone());
        let mut stored = stored;
        if wanted.size > stored.object.status.size {
            match self.grow(stored, wanted.size).await {
                Ok(_) => {}
                Err(ExpandError::Transient(error)) => return Err(error),
                Err(error) => tracing::warn!(volume = %id, %error, "growth that was begun is taken back"),
            }
            match self.get::<Volume>(id).await? {
                Some(now) => stored = now,
                None => return Ok(()),
            }
        }
        match self.set_verify_reads(stored, wanted.verify_reads).await {
            Ok(()) => Ok(()),
            Err(ModifyError::Transient(error)) => Err(error),
            Err(error) => {
                tracing::warn!(volume = %id, %error, "a change that was begun is taken back");
                Ok(())
            }
        }
    }
}
