//! CreateSnapshot and GetSnapshot.
//!
//! Invariant: a snapshot's id is written down before it is taken, so a repeated call means the same one; its moment is
//! the one at which the replica took it.

use super::Controller;
use super::create::short;
use super::mirror::single;
use super::names;
use super::request::NewSnapshot;
use crate::catalog::{Descriptor, Snapshot, SnapshotStatus, Stored, Volume};
use crate::csi::control::ControlError;
use crate::csi::errors::{CreateSnapshotError, DeleteSnapshotError, GetSnapshotError, Transient};
use crate::csi::operations::Subject;
use crate::rpc::control::{self, ensure_snapshots_request::Item};
use crate::volume::{SnapshotId, VolumeId, VolumeSize};

impl Controller {
    /// The snapshot of that name: found, finished or taken.
    pub async fn create_snapshot(&self, wanted: NewSnapshot) -> Result<Snapshot, CreateSnapshotError> {
        let _name = self.start(Subject::SnapshotName(wanted.name.clone()))?;
        let stored = match self.find::<Snapshot>(&wanted.name).await? {
            Some(stored) if stored.object.deleted => {
                let _snapshot = self.start(Subject::Snapshot(stored.object.id))?;
                self.same(&stored).await?;
                self.finish_snapshot_deletion(stored).await?;
                self.record_snapshot(&wanted).await?
            }
            Some(stored) => {
                let (id, volume) = (stored.object.id, stored.object.volume);
                if volume.to_string() != wanted.volume {
                    return Err(CreateSnapshotError::Incompatible { name: wanted.name, id, volume });
                }
                stored
            }
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
        single(&source, "snapshotted")?;
        let holders = self.holders(&source);
        if !holders.iter().any(|node| wanted.places.include(node)) {
            return Err(CreateSnapshotError::NotHere(names(&holders)));
        }
        let node = source.spec.node;
        let (id, name) = (SnapshotId::random(), Some(wanted.name.clone()));
        let status = SnapshotStatus::Creating;
        Ok(self.create(Snapshot { id, name, volume, group: None, node, deleted: false, status }).await?)
    }

    async fn take_snapshot(&self, mut stored: Stored<Snapshot>) -> Result<Snapshot, CreateSnapshotError> {
        let Snapshot { id, name, volume, node, .. } = stored.object.clone();
        let descriptor = Descriptor::Snapshot { name, group: None }.encode();
        let item = Item { snapshot_id: id.to_string(), volume_id: volume.to_string(), descriptor };
        let refusal = match self.nodes.holder(node.as_ref()).await?.seal(vec![item]).await {
            Ok(sealed) => {
                stored.object.status = ready(id, &sealed)?;
                // Persist before the caller learns the id.
                return Ok(self.update(stored).await?.object);
            }
            Err(ControlError::NoRoom(text)) => CreateSnapshotError::NoRoom(text),
            Err(ControlError::NotFound(_)) => CreateSnapshotError::SourceNotFound(volume.to_string()),
            Err(error @ (ControlError::Unknown(_) | ControlError::InUse(_) | ControlError::Refused(_))) => {
                return Err(Transient::Replica(error).into());
            }
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
        let stored = self.get::<Snapshot>(key).await?.ok_or_else(missing)?;
        match stored.object.status {
            SnapshotStatus::Ready { .. } if !stored.object.deleted => Ok(stored.object),
            SnapshotStatus::Ready { .. } | SnapshotStatus::Creating => Err(missing()),
        }
    }
}

/// What the replica says of one of the snapshots that it took.
pub(in crate::csi) fn ready(id: SnapshotId, sealed: &[control::Snapshot]) -> Result<SnapshotStatus, Transient> {
    let unusable = |what: String| Transient::Replica(ControlError::Unknown(format!("snapshot {id}: {what}")));
    let text = id.to_string();
    let snapshot = sealed.iter().find(|snapshot| snapshot.snapshot_id == text);
    let snapshot = snapshot.ok_or_else(|| unusable("it is not in the answer".to_owned()))?;
    let size = VolumeSize::try_from(snapshot.size_bytes).map_err(|error| unusable(error.to_string()))?;
    Ok(SnapshotStatus::Ready { size, created_ms: snapshot.created_ms })
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
