//! Snapshots that a copy of a mirrored volume lacks are filled from another node's: the steps on this node's pools.
//!
//! ```text
//!   space promised ─> record, internal volume on an older snapshot ─> filled ─> sealed under the snapshot's id ─> noted
//!        └────────────────── given up at any step: the internal volume goes, nothing is left ──────────────────┘
//! ```
//! # Invariants
//! * The internal volume is in no index: nobody lists, opens, attaches or recovers it. Its record, which is durable before it is,
//!   tells it from a volume; a start deletes it, since what is half filled is begun again.
//! * It becomes the snapshot in one step of the map's log: there is never both, and never neither. The layers are a branch of
//!   their own, beside those of the volume, which nothing here changes.
//! * What a copy may have under the snapshot's id from a seal that was not acknowledged is in the volume's own line of layers, or
//!   those of a copy that was here before, and nobody has adopted it. It is erased before, and never taken for the snapshot.
//! * A deletion of the snapshot ends the filling first, and waits until it has.

use super::errors::FillFailure as Failure;
use super::snapshots::NewSnapshot;
use super::{Manager, PoolState, SnapshotFailure, SnapshotPlace, growth};
use crate::catalog::Descriptor;
use crate::crash::crash_point;
use crate::protocol::Request;
use crate::replica::engine::EngineError;
use crate::replica::operations::OperationGuard;
use crate::replica::pool::PoolName;
use crate::replica::records::Record;
use crate::store::{Control, ExtentsPlan, ReadPlan, VolumeInfo};
use crate::volume::{BLOCK_SIZE, InstanceId, SnapshotId, VolumeId, VolumeSize};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A snapshot to fill.
#[derive(Clone, Debug)]
pub struct NewFill {
    /// Its id.
    pub snapshot: SnapshotId,
    /// Of which volume.
    pub volume: VolumeId,
    /// The volume's copy here.
    pub copy: InstanceId,
    /// Of the volume when it was taken.
    pub size: VolumeSize,
    /// When that was, in milliseconds since 1970.
    pub created_ms: u64,
    /// A snapshot that this copy has, and the source.
    pub base: Option<SnapshotId>,
    /// Other trees of this node that have the snapshot, as the catalogue says.
    pub said_in: BTreeSet<InstanceId>,
}

/// One that is being filled.
pub struct Fill {
    new: NewFill,
    pool: PoolName,
    _filling: OperationGuard,
}

/// Whether there is something to fill.
pub enum Begun {
    /// It is in this tree, durably.
    There(InstanceId),
    /// Nothing is there under its id.
    Fill(Fill),
}

/// What is kept of a filling until nothing is left of its internal volume.
#[derive(Clone, Debug)]
pub(in crate::replica) struct FillPlace {
    pool: PoolName,
    tree: InstanceId,
    volume: VolumeId,
    ends: bool,
}

/// A snapshot that is read for another node.
pub struct Reading {
    /// Where its tree is.
    pub path: PathBuf,
    /// What differs from the base, or what it has.
    pub extents: ExtentsPlan,
    /// Where its blocks are.
    pub plan: ReadPlan,
    /// What is kept beside it.
    pub descriptor: String,
}

/// The internal volume that becomes the snapshot.
pub(super) fn filled(snapshot: SnapshotId) -> VolumeId {
    VolumeId::from_bytes(snapshot.to_bytes().map(|byte| !byte))
}

/// The snapshot that an internal volume becomes.
fn filled_as(volume: VolumeId) -> SnapshotId {
    SnapshotId::from_bytes(volume.to_bytes().map(|byte| !byte))
}

/// What a filling under way holds among the operations: not the snapshot itself, which may be deleted meanwhile.
fn fill_key(snapshot: SnapshotId) -> [u8; 16] {
    filled(snapshot).to_bytes()
}

/// The name of the record that tells an internal volume from others.
pub(super) fn fill_record(volume: VolumeId) -> String {
    format!("fill-{volume}")
}

/// Whether the volume is an internal one. Blocking, briefly.
pub(super) fn is_filling(tree: &Path, volume: VolumeId) -> bool {
    tree.join("records").join(fill_record(volume)).exists()
}

impl Fill {
    /// The snapshot that it stands on.
    pub fn base(&self) -> Option<SnapshotId> {
        self.new.base
    }
}

impl Manager {
    /// A snapshot, read for another node: what differs from the base, if there is one.
    pub async fn read_for_another(
        &self,
        snapshot: SnapshotId,
        base: Option<SnapshotId>,
    ) -> Result<Reading, super::SnapshotFailure> {
        let extents = self.difference(snapshot, base).await?;
        let (path, plan) = self.reader(snapshot).await?;
        let descriptor = self.snapshot_place(snapshot).map(|place| place.descriptor).unwrap_or_default();
        Ok(Reading { path, extents, plan, descriptor })
    }

    /// Takes away what is here under its id and is not it. Until the [`Fill`] is finished or given up, nobody else fills it.
    pub async fn begin_fill(&self, mut new: NewFill) -> Result<Begun, Failure> {
        let (snapshot, tree) = (new.snapshot, new.copy);
        let operations = &self.inner.operations;
        let filling = operations.begin(vec![fill_key(snapshot)]).await?;
        let pool = self.copy_of(&new)?;
        let _snapshot = operations.begin(vec![snapshot.to_bytes(), tree.to_bytes()]).await?;
        if !new.said_in.is_empty() {
            self.all_is_open(snapshot)?;
        }
        // What was set aside for its seal is not needed.
        drop(self.release(snapshot));
        if let Some(there) = self.what_is_there(&new).await? {
            return Ok(Begun::There(there));
        }
        let place = FillPlace { pool: pool.clone(), tree, volume: new.volume, ends: false };
        self.erase_filled(snapshot, &place).await?;
        if let Some(base) = new.base {
            let info = self.snapshot_info(tree, base).await;
            // A copy that had grown before the others has larger snapshots.
            new.base = info.filter(|info| info.size <= new.size).map(|_| base);
        }
        self.index().fills.insert(snapshot, place);
        Ok(Begun::Fill(Fill { new, pool, _filling: filling }))
    }

    /// Promises the space for so many bytes, and makes the internal volume.
    pub async fn open_fill(&self, fill: &Fill, data_bytes: u64) -> Result<(), Failure> {
        let NewFill { snapshot, copy: tree, size, base, .. } = fill.new;
        let volume = filled(snapshot);
        let pool = self.open_pool(&fill.pool)?;
        let promise = self.promise(&fill.pool, &pool, growth(data_bytes)).await?;
        let _tree = self.inner.operations.begin(vec![tree.to_bytes()]).await?;
        self.goes_on(fill)?;
        // The record before the name: a start must never take it for a volume.
        self.write_record(&pool, tree, volume, &fill_record(volume), Record::new(String::new(), None)).await?;
        crash_point("mirror.fill.record");
        let blocks = data_bytes.div_ceil(BLOCK_SIZE);
        self.engine().inspect(tree, move |store| store.expect_filling(volume, blocks)).await?;
        let verify_reads = false;
        let made = match base {
            Some(snapshot) => Control::Clone { snapshot, volume, size, verify_reads },
            None => Control::CreateVolume { volume, size, verify_reads },
        };
        self.control(volume, tree, made).await?;
        promise.settle(tree, self.promised_bytes(tree).await);
        crash_point("mirror.fill.made");
        Ok(())
    }

    /// Writes into the internal volume, or flushes it. `data`, which begins at a page, is as long as a write.
    pub async fn fill(&self, fill: &Fill, request: Request, data: Bytes) -> Result<(), Failure> {
        self.goes_on(fill)?;
        Ok(self.engine().aside(fill.new.copy, filled(fill.new.snapshot), request, data).await?)
    }

    /// Nobody deletes the snapshot while this is held: time to look whether it is still wanted.
    pub async fn hold_filled(&self, fill: &Fill) -> Result<OperationGuard, Failure> {
        let held = self.inner.operations.begin(vec![fill.new.snapshot.to_bytes()]).await?;
        self.goes_on(fill)?;
        Ok(held)
    }

    /// What was filled is the snapshot from now on, durably.
    pub async fn seal_filled(&self, fill: &Fill, held: OperationGuard, descriptor: String) -> Result<(), Failure> {
        let NewFill { snapshot, volume, copy: tree, created_ms, .. } = fill.new;
        let (_held, _tree) = (held, self.inner.operations.begin(vec![tree.to_bytes()]).await?);
        let place =
            self.place(volume).filter(|place| place.tree == tree).ok_or(Failure::NoCopy { volume, copy: tree })?;
        let item = NewSnapshot { snapshot, volume, descriptor };
        self.write_snapshot_record(&item, &place).await?;
        crash_point("mirror.fill.seal");
        self.engine().control(tree, Control::SealAs { filled: filled(snapshot), snapshot, volume, created_ms }).await?;
        crash_point("mirror.fill.sealed");
        self.note(&item, &place);
        self.index().fills.remove(&snapshot);
        self.remove_record(&fill.pool, tree, fill_record(filled(snapshot))).await;
        self.tidy_tree(&fill.pool, tree).await;
        Ok(())
    }

    /// Leaves nothing of it. What cannot be taken away now goes with the next attempt, the snapshot's deletion, or a start.
    pub async fn give_up_fill(&self, fill: Fill) {
        let NewFill { snapshot, volume, copy: tree, .. } = fill.new;
        let done = async {
            let _tree = self.inner.operations.begin(vec![tree.to_bytes()]).await?;
            let place = FillPlace { pool: fill.pool.clone(), tree, volume, ends: true };
            self.erase_filled(snapshot, &place).await?;
            self.tidy_tree(&fill.pool, tree).await;
            Ok::<_, Failure>(())
        };
        if let Err(error) = done.await {
            tracing::warn!(%snapshot, copy = %tree, %error, "what was filled of a snapshot stays for now");
        }
    }

    /// Ends the filling of a snapshot that is deleted, waits for that, and takes away what it has left. What is returned keeps
    /// others from beginning one.
    pub(super) async fn end_fill(&self, snapshot: SnapshotId) -> Result<OperationGuard, super::SnapshotFailure> {
        if let Some(place) = self.index().fills.get_mut(&snapshot) {
            place.ends = true;
        }
        let guard = self.inner.operations.begin(vec![snapshot.to_bytes(), fill_key(snapshot)]).await?;
        let left = self.index().fills.get(&snapshot).cloned();
        if let Some(place) = left {
            let _tree = self.inner.operations.begin(vec![place.tree.to_bytes()]).await?;
            self.erase_filled(snapshot, &place).await?;
            self.tidy_tree(&place.pool, place.tree).await;
        }
        Ok(guard)
    }

    /// What a crash has left half filled, in a tree that was just opened.
    pub(super) async fn erase_half_filled(&self, state: &PoolState, tree: InstanceId, volumes: &[VolumeInfo]) {
        let path = state.pool.tree(tree);
        for volume in volumes.iter().map(|info| info.volume).filter(|volume| is_filling(&path, *volume)) {
            // First, as in `erase_filled`. Whoever removed it may not have lived to make that durable.
            let (records, snapshot) = (path.clone(), filled_as(volume));
            let removed = move || Record::remove_durably(&records, &snapshot.to_string());
            if !matches!(tokio::task::spawn_blocking(removed).await, Ok(Ok(()))) {
                tracing::warn!(%tree, %snapshot, "what was filled of a snapshot stays until the next start");
                continue;
            }
            match self.engine().control(tree, Control::DeleteVolume(volume)).await {
                Ok(()) => {
                    let path = path.clone();
                    // One that stays is a record of nothing.
                    let removed = move || Record::remove(&path, &fill_record(volume));
                    drop(tokio::task::spawn_blocking(removed).await);
                }
                Err(error) => tracing::warn!(%tree, %error, "what was filled of a snapshot stays until the next start"),
            }
        }
    }

    /// Where the copy is that shall have it.
    fn copy_of(&self, new: &NewFill) -> Result<PoolName, Failure> {
        let (volume, copy) = (new.volume, new.copy);
        let place =
            self.place(volume).filter(|place| place.tree == copy && place.mirror.is_some() && place.copy.is_none());
        place.map(|place| place.pool).ok_or(Failure::NoCopy { volume, copy })
    }

    fn open_pool(&self, name: &PoolName) -> Result<Arc<PoolState>, Failure> {
        self.pool(name).ok_or_else(|| super::VolumeFailure::NoPool(name.clone()).into())
    }

    /// What the catalogue says is here may be where nobody can look now.
    fn all_is_open(&self, snapshot: SnapshotId) -> Result<(), Failure> {
        let index = self.index();
        let is_open = index.broken_pools.is_empty() && index.broken_trees.is_empty();
        if is_open { Ok(()) } else { Err(Failure::MayBeHere(snapshot)) }
    }

    /// Whether it shall be filled to the end.
    fn goes_on(&self, fill: &Fill) -> Result<(), Failure> {
        let snapshot = fill.new.snapshot;
        self.copy_of(&fill.new)?;
        let ends = self.index().fills.get(&snapshot).is_none_or(|place| place.ends);
        if ends { Err(Failure::Deleted(snapshot)) } else { Ok(()) }
    }

    /// The tree that has it. What has something else under its id has it no more.
    async fn what_is_there(&self, new: &NewFill) -> Result<Option<InstanceId>, Failure> {
        let NewFill { snapshot, volume, copy, created_ms, .. } = *new;
        while let Some(place) = self.find_anywhere(snapshot).await? {
            // What was adopted was acknowledged before, whether the catalogue says so or not.
            if new.said_in.contains(&place.tree) || is_described(&place) {
                return Ok(Some(place.tree));
            }
            let beside = self.engine().inspect(place.tree, move |store| store.is_beside(snapshot, volume)).await?;
            if place.tree == copy && beside == Some(true) {
                // It may not be durable yet.
                let seal = Control::SealAs { filled: filled(snapshot), snapshot, volume, created_ms };
                self.engine().control(copy, seal).await?;
                self.note_again(snapshot, place).await;
                return Ok(Some(copy));
            }
            let other = (place.tree != copy).then(|| vec![place.tree.to_bytes()]);
            let _other = self.inner.operations.begin(other.unwrap_or_default()).await?;
            tracing::info!(%snapshot, copy = %place.tree, "what a seal without an answer has left under its id is erased");
            self.forget(snapshot).await?;
            self.remove_record(&place.pool, place.tree, snapshot.to_string()).await;
            self.tidy_tree(&place.pool, place.tree).await;
        }
        Ok(None)
    }

    /// One that was found in its store has no descriptor yet.
    async fn note_again(&self, snapshot: SnapshotId, place: SnapshotPlace) {
        let Some(pool) = self.pool(&place.pool) else { return };
        let path = pool.pool.tree(place.tree);
        let read = tokio::task::spawn_blocking(move || Record::read(&path, &snapshot.to_string())).await;
        if let Ok(Ok(Some(record))) = read {
            self.index().snapshots.insert(snapshot, SnapshotPlace { descriptor: record.descriptor, ..place });
        }
    }

    async fn erase_filled(&self, snapshot: SnapshotId, place: &FillPlace) -> Result<(), Failure> {
        let (FillPlace { pool, tree, volume, .. }, internal) = (place, filled(snapshot));
        let (tree, volume) = (*tree, *volume);
        let beside = self.engine().inspect(tree, move |store| store.is_beside(snapshot, volume)).await?;
        if beside != Some(true) {
            // Written before it was sealed, which has failed: a late seal of the volume may have put something under its id. Durably,
            // before the internal volume goes, which says that this record is of no snapshot.
            let path = self.open_pool(pool)?.pool.tree(tree);
            let removed =
                tokio::task::spawn_blocking(move || Record::remove_durably(&path, &snapshot.to_string())).await;
            removed.map_err(|_| Failure::Engine(EngineError::Stopped))?.map_err(SnapshotFailure::Record)?;
        }
        self.control(internal, tree, Control::DeleteVolume(internal)).await?;
        self.remove_record(pool, tree, fill_record(internal)).await;
        self.index().fills.remove(&snapshot);
        Ok(())
    }
}

/// Whether what lies beside it says that it is a snapshot that was acknowledged.
fn is_described(place: &SnapshotPlace) -> bool {
    matches!(Descriptor::decode(&place.descriptor), Some(Descriptor::Snapshot { .. }))
}
