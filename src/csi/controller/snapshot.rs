//! CreateSnapshot and GetSnapshot.
//!
//! Invariants: a snapshot's id is written down before it is taken, so a repeated call means the same one, or, where a
//! mirrored volume's copies may differ in it, gives that one up; its moment is the one at which the replica took it.

use super::Controller;
use super::create::short;
use super::names;
use super::request::NewSnapshot;
use super::seal::{SealError, Sealing, ready};
use crate::catalog::{Descriptor, Snapshot, SnapshotStatus, Stored, Volume};
use crate::csi::errors::{CreateSnapshotError, DeleteSnapshotError, GetSnapshotError, Transient};
use crate::csi::operations::Subject;
use crate::volume::{SnapshotId, VolumeId};
use std::collections::BTreeSet;

impl Controller {
    /// The snapshot of that name: found, finished or taken.
    pub async fn create_snapshot(&self, wanted: NewSnapshot) -> Result<Snapshot, CreateSnapshotError> {
        let _name = self.start(Subject::SnapshotName(wanted.name.clone()))?;
        let found = self.find::<Snapshot>(&wanted.name).await?;
        let copies = match &found {
            Some(stored) if !stored.object.is_visible() => self.mirrored_on(stored.object.volume).await?,
            Some(_) | None => BTreeSet::new(),
        };
        let stored = match found {
            Some(stored) if stored.object.deleted && !stored.object.is_mirrored() => {
                let _snapshot = self.start(Subject::Snapshot(stored.object.id))?;
                self.same(&stored).await?;
                self.finish_snapshot_deletion(stored).await?;
                self.record_snapshot(&wanted).await?
            }
            Some(stored) if !stored.object.deleted && stored.object.volume.to_string() != wanted.volume => {
                let (id, volume) = (stored.object.id, stored.object.volume);
                return Err(CreateSnapshotError::Incompatible { name: wanted.name, id, volume });
            }
            // Some copies may have executed the seal and others not, also one that was begun while there was one copy: another
            // one is taken.
            Some(stored) if !stored.object.is_visible() && (stored.object.is_mirrored() || !copies.is_empty()) => {
                self.give_up(stored, &copies).await?;
                self.record_snapshot(&wanted).await?
            }
            Some(stored) => stored,
            None => self.record_snapshot(&wanted).await?,
        };
        if let SnapshotStatus::Ready { .. } = stored.object.status {
            return Ok(stored.object);
        }
        let _snapshot = self.start(Subject::Snapshot(stored.object.id))?;
        self.same(&stored).await?;
        self.take_snapshot(stored).await
    }

    async fn record_snapshot(&self, wanted: &NewSnapshot) -> Result<Stored<Snapshot>, CreateSnapshotError> {
        let missing = || CreateSnapshotError::SourceNotFound(short(&wanted.volume));
        let volume: VolumeId = wanted.volume.parse().map_err(|_| missing())?;
        let source = self.get::<Volume>(volume).await?;
        let source = source.filter(|stored| stored.object.is_visible()).ok_or_else(missing)?.object;
        let holders = self.holders(&source);
        if !holders.iter().any(|node| wanted.places.include(node)) {
            return Err(CreateSnapshotError::NotHere(names(&holders)));
        }
        let Sealing { node, strays } = self.sealing(&source)?;
        let snapshot = Snapshot::wanted(SnapshotId::random(), volume, node);
        Ok(self.create(Snapshot { name: Some(wanted.name.clone()), strays, ..snapshot }).await?)
    }

    /// Needs the snapshot's operation, and that it was never tried before if its volume is mirrored.
    pub(super) async fn take_snapshot(&self, stored: Stored<Snapshot>) -> Result<Snapshot, CreateSnapshotError> {
        let Snapshot { id, name, volume, node, made_for, .. } = stored.object.clone();
        let descriptor = Descriptor::Snapshot { name, group: None, made_for }.encode();
        let taken = match self.get::<Volume>(volume).await? {
            // It was begun while there was one copy: who may have something of it is not written down.
            Some(source) if source.object.spec.mirror.is_some() && !stored.object.is_mirrored() => {
                return Err(Transient::Conflict(format!("volume {volume}")).into());
            }
            Some(source) => self.seal(node.as_ref(), &[(id, source.object)], &descriptor).await,
            None => Err(SealError::NotFound(volume.to_string())),
        };
        let refusal = match taken.map(|mut taken| taken.pop()) {
            Ok(Some(sealed)) => {
                let object = ready(stored.object.clone(), sealed);
                // Persist before the caller learns the id.
                return Ok(self.update(Stored { object, ..stored }).await?.object);
            }
            Ok(None) | Err(SealError::NotFound(_)) => CreateSnapshotError::SourceNotFound(volume.to_string()),
            Err(SealError::NoRoom(text)) => CreateSnapshotError::NoRoom(text),
            Err(SealError::Transient(error)) => return Err(error.into()),
        };
        self.finish_snapshot_deletion(stored).await?;
        Err(refusal)
    }

    async fn finish_snapshot_deletion(&self, stored: Stored<Snapshot>) -> Result<(), Transient> {
        self.erase_snapshot(stored).await.map_err(transient)
    }

    /// The snapshot with this id.
    pub async fn snapshot(&self, id: &str) -> Result<Snapshot, GetSnapshotError> {
        let missing = || GetSnapshotError::NotFound(short(id));
        let key: SnapshotId = id.parse().map_err(|_| missing())?;
        let snapshot = self.get::<Snapshot>(key).await?.map(|stored| stored.object);
        snapshot.filter(Snapshot::is_visible).ok_or_else(missing)
    }
}

/// A deletion that is part of something else and can be repeated with it.
pub(in crate::csi) fn transient(error: DeleteSnapshotError) -> Transient {
    match error {
        DeleteSnapshotError::Transient(error) => error,
        DeleteSnapshotError::InUse { id, .. } | DeleteSnapshotError::Grouped { id, .. } => {
            Transient::Conflict(format!("snapshot {id}"))
        }
        DeleteSnapshotError::Argument(error) => Transient::Conflict(error.to_string()),
    }
}
