//! Snapshots that the primary of a mirrored volume takes on another node: the space for them here, and their names.
//!
//! ```text
//!   promise_snapshots ─> the primary's node seals, and with it every member ─> adopt_snapshots: record, index, figure
//! ```
//! # Invariants
//! * Space is set aside before the primary is asked, under the snapshot's id, and until it is adopted or deleted.
//! * What was not adopted is nobody's snapshot: it is not listed before the next start, and it can be deleted.

use super::errors::SnapshotFailure as Failure;
use super::snapshots::NewSnapshot;
use super::{Manager, SnapshotPlace};
use crate::replica::operations::{Busy, OperationGuard};
use crate::replica::pool::Promise;
use crate::store::{ControlError as Refusal, MAX_SNAPSHOTS};
use crate::volume::SnapshotId;

impl Manager {
    /// The copies here can take these snapshots.
    pub async fn promise_snapshots(&self, items: &[NewSnapshot]) -> Result<(), Failure> {
        let places = self.places(items)?;
        let _guard = self.begin_following(items).await?;
        for (item, place) in items.iter().zip(&places) {
            let info = self.volume_info(place.tree, item.volume).await.ok_or(Failure::NoVolume(item.volume))?;
            // A copy that refuses a seal would leave its mirror.
            if info.layers as usize > MAX_SNAPSHOTS {
                return Err(Failure::Control(Refusal::TooManySnapshots(item.volume).into()));
            }
        }
        let promises = self.promise_seals(items, &places).await?;
        for ((item, place), promise) in items.iter().zip(&places).zip(promises) {
            let reserve = place.mirror.as_ref().and_then(|mirror| mirror.reserve.as_ref());
            reserve.ok_or(Failure::NotReady(item.volume))?.set_aside(item.snapshot, promise);
        }
        Ok(())
    }

    /// The primary has taken these snapshots, and the copies here as well: they are known here from now on.
    pub async fn adopt_snapshots(&self, items: &[NewSnapshot]) -> Result<(), Failure> {
        let places = self.places(items)?;
        let _guard = self.begin_following(items).await?;
        for (item, place) in items.iter().zip(&places) {
            let info = self.snapshot_info(place.tree, item.snapshot).await;
            if info.is_none_or(|info| info.volume != item.volume) {
                return Err(Failure::NoSnapshot(item.snapshot));
            }
            self.write_snapshot_record(item, place).await?;
            self.note(item, place);
            let figure = self.promised_bytes(place.tree).await;
            match self.release(item.snapshot) {
                Some(promise) => promise.settle(place.tree, figure),
                None => self.pool(&place.pool).iter().for_each(|pool| pool.promises.settle(place.tree, figure)),
            }
        }
        Ok(())
    }

    async fn begin_following(&self, items: &[NewSnapshot]) -> Result<OperationGuard, Busy> {
        let places = items.iter().filter_map(|item| self.place(item.volume)).map(|place| place.tree.to_bytes());
        let keys = items.iter().map(|item| item.snapshot.to_bytes()).chain(places).collect();
        self.inner.operations.begin(keys).await
    }

    /// What was set aside for the snapshot.
    pub(super) fn release(&self, snapshot: SnapshotId) -> Option<Promise> {
        let index = self.index();
        let mut reserves = index.volumes.values().filter_map(|place| place.mirror.as_ref()?.reserve.as_ref());
        reserves.find_map(|reserve| reserve.release(snapshot))
    }

    /// Where the snapshot is, noted or not: a copy may have followed a seal that nobody has adopted, and be gone since, and its
    /// tree is there for what else it has. So what is not noted is looked for in every open tree, and noted.
    pub(super) async fn find_anywhere(&self, snapshot: SnapshotId) -> Result<Option<SnapshotPlace>, Failure> {
        if let Some(place) = self.snapshot_place(snapshot) {
            return Ok(Some(place));
        }
        let Some(tree) = self.engine().tree_with(snapshot).await? else { return Ok(None) };
        let pools: Vec<_> = self.index().pools.values().cloned().collect();
        let has_it = tokio::task::spawn_blocking(move || pools.into_iter().find(|pool| pool.pool.tree(tree).exists()));
        // Otherwise its pool is being opened now.
        let pool = has_it.await.ok().flatten().ok_or(Busy)?.pool.name.clone();
        let place = SnapshotPlace { pool, tree, descriptor: String::new(), base: false };
        Ok(Some(self.index().snapshots.entry(snapshot).or_insert(place).clone()))
    }
}
