//! Volumes that begin as a snapshot or as another volume is.
//!
//! # Invariants
//! * Everything is promised before the source is sealed: a clone that is refused changes nothing.
//! * The base that a clone stands on goes with the call that made it, whether that succeeds or not; a copy into another pool keeps
//!   it until it is complete. What a crash leaves of it is removed at the next start.

use super::errors::VolumeFailure as Failure;
use super::mirror::{MirrorPlace, copy_record};
use super::volumes::{NewVolume, base_of, base_record, now_ms, shared_by_a_seal};
use super::{Manager, PoolState, VolumePlace, growth};
use crate::replica::pool::Promise;
use crate::replica::records::Record;
use crate::store::Control;
use crate::volume::{InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::sync::Arc;

impl Manager {
    /// A volume that begins as a snapshot is.
    pub(super) async fn restore(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        snapshot: SnapshotId,
    ) -> Result<(), Failure> {
        let place = self.snapshot_place(snapshot).ok_or(Failure::NoSnapshot(snapshot))?;
        let info = self.snapshot_info(place.tree, snapshot).await.ok_or(Failure::NoSnapshot(snapshot))?;
        self.check_source_size(new, info.size)?;
        if place.pool != new.pool {
            let promise = self.promise_tree(new, pool).await?;
            return self.start_copy(new, pool, snapshot, promise).await;
        }
        let _tree = self.begin(new.volume, &[place.tree.to_bytes()]).await?;
        let promise = self.promise_clone(new, pool).await?;
        self.clone_snapshot(new, pool, place.tree, snapshot, promise, None).await
    }

    /// A volume that begins as another one is now.
    pub(super) async fn clone_volume(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        source: VolumeId,
    ) -> Result<(), Failure> {
        let place = self.place(source).ok_or(Failure::NoVolume(source))?;
        if place.copy.is_some() {
            return Err(Failure::NotReady(source));
        }
        let _tree = self.begin(new.volume, &[place.tree.to_bytes(), source.to_bytes()]).await?;
        let info = self.volume_info(place.tree, source).await.ok_or(Failure::NoVolume(source))?;
        self.check_source_size(new, info.size)?;
        let source_pool = self.pool(&place.pool).ok_or_else(|| Failure::NoPool(place.pool.clone()))?;
        let elsewhere = place.pool != new.pool;
        let own = if elsewhere { self.promise_tree(new, pool).await? } else { self.promise_clone(new, pool).await? };
        // What the source holds now is shared from here on: an overwrite of all of it must still fit.
        let shared = self.promise(&place.pool, &source_pool, shared_by_a_seal(&info)).await?;
        let base = base_of(new.volume);
        let cloned = match self.seal_base(new, &source_pool, &place, source, shared).await {
            Ok(()) if elsewhere => {
                self.note_snapshot(base, &place.pool, place.tree);
                self.start_copy(new, pool, base, own).await
            }
            Ok(()) => self.clone_snapshot(new, pool, place.tree, base, own, None).await,
            Err(error) => Err(error),
        };
        if cloned.is_err() || !elsewhere {
            let deleted = self.control(new.volume, place.tree, Control::DeleteSnapshot(base)).await;
            // What is still there stays known as a base: the next start deletes it.
            if deleted.is_ok() {
                self.index().snapshots.remove(&base);
                self.remove_record(&place.pool, place.tree, base_record(base)).await;
            }
            self.tidy_tree(&place.pool, place.tree).await;
            return cloned.and(deleted);
        }
        Ok(())
    }

    /// The point in time of a clone; what it newly shares is promised.
    async fn seal_base(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        place: &VolumePlace,
        source: VolumeId,
        shared: Promise,
    ) -> Result<(), Failure> {
        let base = base_of(new.volume);
        // The record before the name: a start after a crash must tell it from a user's snapshot.
        let record = Record::new(String::new(), None);
        self.write_record(pool, place.tree, new.volume, &base_record(base), record).await?;
        let seal = Control::Seal { volume: source, snapshot: base, created_ms: now_ms() };
        self.control(new.volume, place.tree, seal).await?;
        shared.settle(place.tree, self.promised_bytes(place.tree).await);
        Ok(())
    }

    /// Space for a clone in the tree of its source.
    pub(super) async fn promise_clone(&self, new: &NewVolume, pool: &Arc<PoolState>) -> Result<Promise, Failure> {
        self.promise(&new.pool, pool, growth(new.size.bytes())).await
    }

    /// Needs [`Self::promise_clone`]. `mirror`: the volume is one copy of several, with this record.
    pub(super) async fn clone_snapshot(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        tree: InstanceId,
        snapshot: SnapshotId,
        promise: Promise,
        mirror: Option<String>,
    ) -> Result<(), Failure> {
        let volume = new.volume;
        if let Some(text) = mirror.clone() {
            self.write_record(pool, tree, volume, &copy_record(volume), Record::new(text, None)).await?;
        }
        // The record before the name: `recover` must never find a volume that it knows nothing of.
        self.write_record(pool, tree, volume, &volume.to_string(), Record::new(new.descriptor.clone(), None)).await?;
        let clone = Control::Clone { snapshot, volume, size: new.size, verify_reads: new.verify_reads };
        self.control(volume, tree, clone).await?;
        promise.settle(tree, self.promised_bytes(tree).await);
        self.insert(new, tree, None, mirror.map(MirrorPlace::closed));
        Ok(())
    }

    pub(super) fn check_source_size(&self, new: &NewVolume, source: VolumeSize) -> Result<(), Failure> {
        if new.size >= source {
            return Ok(());
        }
        let (wanted, source_bytes) = (new.size.bytes(), source.bytes());
        Err(Failure::SmallerThanSource { volume: new.volume, wanted, source_bytes })
    }
}
