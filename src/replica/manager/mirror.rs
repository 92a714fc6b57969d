//! Copies of mirrored volumes: made with the id that the catalogue gives them, found again, removed.
//!
//! Invariants: the record that a copy is one of several is durable with the tree, so that no start takes it for a volume
//! with one copy; a volume has at most one copy on a node.

use super::errors::VolumeFailure as Failure;
use super::volumes::{Blank, NewVolume, Source};
use super::{BrokenTree, Manager, PoolState, VolumePlace, growth};
use crate::protocol;
use crate::replica::engine::{EngineHandle, MirrorInput, SealReserve};
use crate::replica::mirror::Refresher;
use crate::replica::records::Record;
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use std::sync::Arc;

/// The name of the record beside a copy of a mirrored volume.
pub(super) fn copy_record(volume: VolumeId) -> String {
    format!("mirror-{volume}")
}

/// What makes a volume's place one copy of several.
#[derive(Clone, Debug)]
pub(in crate::replica) struct MirrorPlace {
    /// The text of the mirror's own record beside the copy.
    pub record: String,
    /// Where the catalogue can be asked to be read, while the copy is open.
    pub refresher: Option<Refresher>,
    /// Where its seals take their space from, while it is open.
    pub reserve: Option<SealReserve>,
}

impl MirrorPlace {
    /// Of a copy that is not open.
    pub fn closed(record: String) -> Self {
        Self { record, refresher: None, reserve: None }
    }
}

/// A copy of a mirrored volume on this node.
#[derive(Clone, Debug)]
pub struct CopyHere {
    /// Of which volume.
    pub volume: VolumeId,
    /// Its tree, which is its name.
    pub tree: InstanceId,
    /// The text of the record beside it.
    pub record: String,
    /// The controller's own text.
    pub descriptor: String,
    /// It has a device.
    pub attached: bool,
}

impl CopyHere {
    fn of(volume: VolumeId, place: &VolumePlace) -> Option<Self> {
        let mirror = place.mirror.as_ref()?;
        let (record, descriptor, attached) = (mirror.record.clone(), place.descriptor.clone(), place.device.is_some());
        Some(Self { volume, tree: place.tree, record, descriptor, attached })
    }
}

impl Manager {
    /// Another copy is compared with this one, block for block, and brought up to date.
    pub async fn resync(&self, volume: VolumeId, copy: InstanceId) -> Result<(), Failure> {
        let failed = |error| Failure::Engine { volume, error };
        let status = self.engine().mirror_status(volume).await.map_err(failed)?;
        let status = status.ok_or(Failure::NoVolume(volume))?;
        let begins = matches!(status.role, protocol::Role::Primary(_)) && !status.serves && !status.disk_failed;
        if begins {
            return Err(Failure::NotServing(volume));
        }
        if !status.serves || !status.intact || status.disk_failed {
            return Err(Failure::NoSource(volume));
        }
        if !status.copies.contains_key(&copy) {
            return Err(Failure::NoOther { volume, copy });
        }
        tracing::info!(%volume, %copy, "a copy is to be compared with this one and brought up to date");
        self.engine().tell_mirror(volume, MirrorInput::Resync(copy)).await.map_err(failed)
    }

    /// All copies of mirrored volumes on this node.
    pub fn copies(&self) -> Vec<CopyHere> {
        self.index().volumes.iter().filter_map(|(volume, place)| CopyHere::of(*volume, place)).collect()
    }

    /// The volume's copy on this node.
    pub fn copy_here(&self, volume: VolumeId) -> Option<CopyHere> {
        self.index().volumes.get(&volume).and_then(|place| CopyHere::of(volume, place))
    }

    /// What is durable about the volume's mirror; `None` if its copy has never acted.
    pub async fn durable_record(&self, volume: VolumeId) -> Option<protocol::Record> {
        let place = self.place(volume)?;
        let look =
            move |store: &mut crate::store::Store| store.mirrored(volume).map(|mirrored| mirrored.record.clone());
        self.engine().inspect(place.tree, look).await.ok().flatten()
    }

    /// A copy with this id is here; made if it was not: empty, or a clone of a snapshot, which is in the tree of that name.
    pub async fn ensure_copy(&self, new: NewVolume, tree: InstanceId, record: String) -> Result<(), Failure> {
        let volume = new.volume;
        let _guard = self.begin(volume, &[volume.to_bytes(), tree.to_bytes()]).await?;
        if let Some(place) = self.place(volume) {
            return match place.mirror {
                Some(_) if place.tree == tree => Ok(()),
                _ => Err(Failure::OtherCopy { volume, found: place.tree }),
            };
        }
        let pool = self.pool(&new.pool).ok_or_else(|| Failure::NoPool(new.pool.clone()))?;
        if let Some(BrokenTree { problem, .. }) = self.index().broken_trees.get(&tree).cloned() {
            return Err(Failure::Broken { volume, tree, problem });
        }
        match new.source {
            Source::Blank => {}
            Source::Snapshot(snapshot) => return self.clone_copy(&new, &pool, tree, record, snapshot).await,
            Source::Volume(source_volume) => return Err(Failure::NoSnapshotOf { volume, source_volume }),
        }
        if pool.pool.tree(tree).exists() {
            // An attempt before has failed half way: nothing is in it, or it is not taken away.
            self.tidy_tree(&new.pool, tree).await;
        }
        self.create_blank(&new, &pool, Blank { tree, copying: None, mirror: Some(record) }).await
    }

    async fn clone_copy(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        tree: InstanceId,
        record: String,
        snapshot: SnapshotId,
    ) -> Result<(), Failure> {
        let place = self.snapshot_place(snapshot).ok_or(Failure::NoSnapshot(snapshot))?;
        if place.tree != tree || place.pool != new.pool {
            let (volume, found, pool) = (new.volume, place.tree, place.pool);
            return Err(Failure::Elsewhere { volume, wanted: tree, snapshot, found, pool });
        }
        let info = self.snapshot_info(tree, snapshot).await.ok_or(Failure::NoSnapshot(snapshot))?;
        self.check_source_size(new, info.size)?;
        let promise = self.promise_clone(new, pool).await?;
        self.clone_snapshot(new, pool, tree, snapshot, promise, Some(record)).await
    }

    /// Replaces the record beside the copy.
    pub async fn write_copy_record(&self, volume: VolumeId, record: String) -> Result<(), Failure> {
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        let _guard = self.begin(volume, &[volume.to_bytes()]).await?;
        let pool = self.pool(&place.pool).ok_or_else(|| Failure::NoPool(place.pool.clone()))?;
        let written = Record::new(record.clone(), None);
        self.write_record(&pool, place.tree, volume, &copy_record(volume), written).await?;
        if let Some(mirror) = self.index().volumes.get_mut(&volume).and_then(|place| place.mirror.as_mut()) {
            mirror.record = record;
        }
        Ok(())
    }

    /// What a seal has taken is the tree's own from now on; the next one is offered what the pool has. Without it a copy
    /// that leaves comes back by copying everything.
    pub async fn offer_seal(&self, volume: VolumeId, reserve: &SealReserve) -> Result<(), Failure> {
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        let _guard = self.begin(volume, &[place.tree.to_bytes()]).await?;
        let pool = self.pool(&place.pool).ok_or_else(|| Failure::NoPool(place.pool.clone()))?;
        let Some(info) = self.volume_info(place.tree, volume).await else { return Ok(()) };
        reserve.settle(place.tree, self.promised_bytes(place.tree).await);
        let asked = pool.clone();
        if let Ok(limit) = tokio::task::spawn_blocking(move || asked.limit()).await {
            reserve.offer(pool.promises.clone(), growth(info.size.bytes()), limit);
        }
        self.settle_when_merged(pool, place.tree);
        Ok(())
    }

    /// Ends the copy's core, if it has no device.
    pub async fn close_copy(&self, volume: VolumeId) -> Result<(), Failure> {
        self.engine().close_mirror(volume).await.map_err(|error| Failure::Engine { volume, error })
    }

    /// The copy was closed and goes away with everything in it.
    pub async fn delete_copy(&self, volume: VolumeId) -> Result<(), Failure> {
        self.delete(volume, false).await
    }

    /// The copy is open: its catalogue is asked here, and its seals take their space from there.
    pub fn set_open(&self, volume: VolumeId, refresher: Refresher, reserve: SealReserve) {
        if let Some(mirror) = self.index().volumes.get_mut(&volume).and_then(|place| place.mirror.as_mut()) {
            (mirror.refresher, mirror.reserve) = (Some(refresher), Some(reserve));
        }
    }

    /// The engine, for those who run copies.
    pub fn engine_handle(&self) -> EngineHandle {
        self.engine().clone()
    }
}
