//! Snapshots: sealed at one point in time, deleted, and read as extents.

use super::errors::SnapshotFailure as Failure;
use super::volumes::{now_ms, shared_by_a_seal};
use super::{Manager, SnapshotPlace, VolumePlace};
use crate::crash::crash_point;
use crate::protocol::Role;
use crate::replica::engine::EngineError;
use crate::replica::pool::{PoolName, Promise};
use crate::replica::records::Record;
use crate::store::{Control, ExtentsError, ExtentsPlan, ReadPlan, SnapshotInfo};
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a primary is waited for: until a lease and its margin are over, silent copies are dropped, and some more.
const PRIMARY_LIMIT: Duration = Duration::from_secs(10);
/// How long the writes are waited for that were in flight when a snapshot was taken: a copy that crawls is given up then.
const SETTLED_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A snapshot to take.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// Its id.
    pub snapshot: SnapshotId,
    /// Of which volume.
    pub volume: VolumeId,
    /// Kept beside the copy.
    pub descriptor: String,
}

/// The extents of a snapshot, or between two, to be walked without holding anything up.
pub struct ExtentStream {
    /// Size of the volume at the target, in bytes.
    pub size_bytes: u64,
    /// The walk.
    pub plan: ExtentsPlan,
}

/// For each snapshot of a mirrored volume the copies that have it.
pub type Copies = BTreeMap<SnapshotId, BTreeSet<InstanceId>>;

/// A snapshot, where it is, and what is known of it.
#[derive(Clone, Debug)]
pub struct SnapshotView {
    /// As its store says.
    pub info: SnapshotInfo,
    /// In which pool.
    pub pool: PoolName,
    /// Which copy.
    pub tree: InstanceId,
    /// Kept beside it.
    pub descriptor: String,
}

impl Manager {
    /// All the snapshots are there, of one point in time; durable when this returns.
    pub async fn ensure_snapshots(&self, items: &[NewSnapshot]) -> Result<Copies, Failure> {
        let operations = &self.inner.operations;
        let _snapshots = operations.begin(items.iter().map(|item| item.snapshot.to_bytes()).collect()).await?;
        let mut mirrored = false;
        for (item, place) in items.iter().zip(self.places(items)?) {
            if place.mirror.is_some() {
                mirrored = true;
                self.until_primary(item.volume).await?;
            }
        }
        let places = self.places(items)?;
        let mut keys: Vec<_> = items.iter().map(|item| item.volume.to_bytes()).collect();
        keys.extend(places.iter().map(|place| place.tree.to_bytes()));
        let others = operations.begin(keys).await?;
        let there = self.existing(items).await?;
        match items.iter().zip(&places).find(|(_, place)| place.mirror.is_some()) {
            Some((item, _)) if there > 0 => return Err(Failure::TakenBefore(item.snapshot)),
            None if there == items.len() => return Ok(Copies::new()),
            Some(_) | None => {}
        }
        if there > 0 {
            // A crash between the members' commits: what is there is of another point in time than what is missing.
            for item in items {
                self.forget(item.snapshot).await?;
            }
        }
        let promises = self.promise_seals(items, &places).await?;
        for (item, place) in items.iter().zip(&places) {
            // The record before the name, as for volumes.
            self.write_snapshot_record(item, place).await?;
        }
        // Other copies may be waited for: whoever takes away the device, or the copy, must not wait for that.
        let _others = (!mirrored).then_some(others);
        let copies = self.seal(items, &places).await?;
        for (item, place) in items.iter().zip(&places) {
            self.note(item, place);
        }
        drop(promises);
        for place in &places {
            self.settle(&place.pool, place.tree).await;
        }
        Ok(copies)
    }

    /// All or none, as far as this node goes.
    async fn seal(&self, items: &[NewSnapshot], places: &[VolumePlace]) -> Result<Copies, Failure> {
        let seals = items.iter().zip(places).map(|(item, place)| (place.tree, item.volume, item.snapshot)).collect();
        crash_point("seal");
        let sealed = self.engine().seal_group(seals, now_ms()).await;
        crash_point("seal.done");
        match sealed {
            Ok(copies) => Ok(items.iter().map(|item| item.snapshot).zip(copies).collect()),
            Err(error) => {
                for (item, place) in items.iter().zip(places) {
                    let undone = self.engine().control(place.tree, Control::DeleteSnapshot(item.snapshot)).await;
                    if let Err(error) = undone {
                        tracing::warn!(snapshot = %item.snapshot, %error, "what was refused may stay until it is deleted");
                    }
                    self.remove_record(&place.pool, place.tree, item.snapshot.to_string()).await;
                }
                Err(error.into())
            }
        }
    }

    /// A copy that is wished is primary by itself soon after its volume was made, or its engine started.
    async fn until_primary(&self, volume: VolumeId) -> Result<(), Failure> {
        let until = Instant::now() + PRIMARY_LIMIT;
        loop {
            let status = self.engine().mirror_status(volume).await?;
            if status.is_some_and(|status| matches!(status.role, Role::Primary(_))) {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(EngineError::NotPrimary(volume).into());
            }
            sleep(LOOK_EVERY).await;
        }
    }

    pub(super) fn places(&self, items: &[NewSnapshot]) -> Result<Vec<VolumePlace>, Failure> {
        items
            .iter()
            .map(|item| {
                let place = self.place(item.volume).ok_or(Failure::NoVolume(item.volume))?;
                if place.copy.is_some() { Err(Failure::NotReady(item.volume)) } else { Ok(place) }
            })
            .collect()
    }

    async fn existing(&self, items: &[NewSnapshot]) -> Result<usize, Failure> {
        let mut there = 0;
        for item in items {
            if let Some(info) = self.find_snapshot(item.snapshot).await {
                if info.volume != item.volume {
                    return Err(Failure::Different(item.snapshot));
                }
                there += 1;
            }
        }
        Ok(there)
    }

    pub(super) async fn promise_seals(
        &self,
        items: &[NewSnapshot],
        places: &[VolumePlace],
    ) -> Result<Vec<Promise>, Failure> {
        let mut promises = Vec::with_capacity(items.len());
        for (item, place) in items.iter().zip(places) {
            let info = self.volume_info(place.tree, item.volume).await.ok_or(Failure::NoVolume(item.volume))?;
            let pool = self.pool(&place.pool).ok_or(Failure::NoVolume(item.volume))?;
            let promised = self.promise(&place.pool, &pool, shared_by_a_seal(&info)).await;
            promises.push(promised.map_err(|failure| match failure {
                super::VolumeFailure::PoolFull { pool, error } => Failure::PoolFull { pool, error },
                _ => Failure::NoVolume(item.volume),
            })?);
        }
        Ok(promises)
    }

    pub(super) async fn write_snapshot_record(&self, item: &NewSnapshot, place: &VolumePlace) -> Result<(), Failure> {
        let Some(pool) = self.pool(&place.pool) else { return Err(Failure::NoVolume(item.volume)) };
        let (path, record, id) =
            (pool.pool.tree(place.tree), Record::new(item.descriptor.clone(), None), item.snapshot.to_string());
        match tokio::task::spawn_blocking(move || record.write(&path, &id)).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(Failure::NoVolume(item.volume)),
        }
    }

    pub(super) fn note(&self, item: &NewSnapshot, place: &VolumePlace) {
        let noted = SnapshotPlace {
            pool: place.pool.clone(),
            tree: place.tree,
            descriptor: item.descriptor.clone(),
            base: false,
        };
        self.index().snapshots.insert(item.snapshot, noted);
    }

    /// Makes an internal snapshot findable for a copy.
    pub(super) fn note_snapshot(&self, snapshot: SnapshotId, pool: &PoolName, tree: InstanceId) {
        let noted = SnapshotPlace { pool: pool.clone(), tree, descriptor: String::new(), base: true };
        self.index().snapshots.insert(snapshot, noted);
    }

    async fn settle(&self, pool: &PoolName, tree: InstanceId) {
        if let Some(pool) = self.pool(pool) {
            pool.promises.settle(tree, self.promised_bytes(tree).await);
        }
    }

    pub(super) async fn forget(&self, snapshot: SnapshotId) -> Result<(), Failure> {
        let Some(place) = self.snapshot_place(snapshot) else { return Ok(()) };
        crash_point("forget");
        self.engine().control(place.tree, Control::DeleteSnapshot(snapshot)).await?;
        crash_point("forget.done");
        self.index().snapshots.remove(&snapshot);
        Ok(())
    }

    /// The snapshot is gone; its layer is merged or freed in the background.
    pub async fn delete_snapshot(&self, snapshot: SnapshotId) -> Result<(), Failure> {
        // Behind whoever takes it or fills it now: what is not there must not be there a moment later.
        let _snapshot = self.end_fill(snapshot).await?;
        let _set_aside = self.release(snapshot);
        // Each time in one tree less: a copy that was replaced may have something under its id, too.
        while let Some(place) = self.find_anywhere(snapshot).await? {
            let _tree = self.inner.operations.begin(vec![place.tree.to_bytes()]).await?;
            self.forget(snapshot).await?;
            self.remove_record(&place.pool, place.tree, snapshot.to_string()).await;
            self.tidy_tree(&place.pool, place.tree).await;
        }
        Ok(())
    }

    /// A snapshot by id.
    pub async fn find_snapshot(&self, snapshot: SnapshotId) -> Option<SnapshotInfo> {
        let place = self.snapshot_place(snapshot)?;
        self.snapshot_info(place.tree, snapshot).await
    }

    /// All snapshots that users know, with pool and descriptor, by id.
    pub async fn list_snapshots(&self) -> Vec<SnapshotView> {
        let places: Vec<_> = self.index().snapshots.iter().map(|(id, place)| (*id, place.clone())).collect();
        let mut trees: Vec<_> = places.iter().map(|(_, p)| p.tree).collect();
        trees.sort_unstable();
        trees.dedup();
        let mut infos = std::collections::BTreeMap::new();
        for tree in trees {
            if let Ok(all) = self.engine().inspect(tree, |store| store.snapshots()).await {
                infos.extend(all.into_iter().map(|info| ((tree, info.snapshot), info)));
            }
        }
        let listed = places.into_iter().filter(|(_, place)| !place.base);
        let view = |(id, place): (SnapshotId, SnapshotPlace)| {
            let SnapshotPlace { pool, tree, descriptor, .. } = place;
            infos.remove(&(tree, id)).map(|info| SnapshotView { info, pool, tree, descriptor })
        };
        listed.filter_map(view).collect()
    }

    /// Where the snapshot's tree is, and its blocks in there, to be read without holding anything up. A write that is in flight
    /// since before its seal is waited for.
    pub async fn reader(&self, snapshot: SnapshotId) -> Result<(PathBuf, ReadPlan), Failure> {
        let place = self.snapshot_place(snapshot).ok_or(Failure::NoSnapshot(snapshot))?;
        let pool = self.pool(&place.pool).ok_or(Failure::NoSnapshot(snapshot))?;
        let until = Instant::now() + SETTLED_LIMIT;
        loop {
            match self.engine().inspect(place.tree, move |store| store.reader(snapshot)).await? {
                Ok(plan) => return Ok((pool.pool.tree(place.tree), plan)),
                Err(ExtentsError::Inconsistent(what)) => return Err(Failure::Damaged { snapshot, what }),
                Err(_) if Instant::now() < until => sleep(LOOK_EVERY).await,
                Err(_) => return Err(Failure::NoSnapshot(snapshot)),
            }
        }
    }

    /// What is allocated in `target`, or differs between `base`, an older one, and `target`; `loose`: may differ between any two.
    pub async fn extents(
        &self,
        target: SnapshotId,
        base: Option<SnapshotId>,
        loose: bool,
    ) -> Result<ExtentStream, Failure> {
        let place = self.snapshot_place(target).ok_or(Failure::NoSnapshot(target))?;
        let info = self.snapshot_info(place.tree, target).await.ok_or(Failure::NoSnapshot(target))?;
        let plan = self.difference(target, base).await?;
        match base.filter(|_| !loose) {
            Some(base) if plan.is_backwards() => Err(Failure::NotOfOneVolume { base, target }),
            Some(base) if !plan.in_one_line() => Err(Failure::InBranches { base, target }),
            Some(_) | None => Ok(ExtentStream { size_bytes: info.size.bytes(), plan }),
        }
    }

    /// What is allocated in `target`, or may differ from `base`, wherever on this node that is.
    pub(super) async fn difference(
        &self,
        target: SnapshotId,
        base: Option<SnapshotId>,
    ) -> Result<ExtentsPlan, Failure> {
        let failed = |error| match error {
            ExtentsError::Unknown(snapshot) => Failure::NoSnapshot(snapshot),
            ExtentsError::Inconsistent(what) => Failure::Damaged { snapshot: target, what },
        };
        let place = self.snapshot_place(target).ok_or(Failure::NoSnapshot(target))?;
        let apart = match base {
            Some(base) => {
                let of_base = self.snapshot_place(base).ok_or(Failure::NoSnapshot(base))?;
                (of_base.tree != place.tree).then_some((base, of_base.tree))
            }
            None => None,
        };
        let Some((base, tree)) = apart else {
            let plan = self.engine().inspect(place.tree, move |store| store.extents(target, base)).await?;
            return plan.map_err(failed);
        };
        let there = self.engine().inspect(tree, move |store| store.layer_maps(base)).await?.map_err(failed)?;
        let here = self.engine().inspect(place.tree, move |store| store.layer_maps(target)).await?.map_err(failed)?;
        Ok(ExtentsPlan::apart(here, there))
    }
}
