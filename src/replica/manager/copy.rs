//! Background copies: a clone or restore into another pool, usable when it is complete.
//!
//! # Invariants
//! * The record says `copying` until the last byte is durable at the target: a start after a crash begins again.
//! * The base snapshot stays until then. Blocks never written are skipped.
//! * The target is opened by nobody but the copy: its engine tree is opened when it is complete.

use super::errors::VolumeFailure as Failure;
use super::volumes::{Blank, NewVolume, base_of, open_tree};
use super::{CopyState, Manager, PoolState, VolumePlace};
use crate::crash::crash_point;
use crate::memory::Memory;
use crate::replica::executor::Executor;
use crate::replica::pool::Promise;
use crate::replica::records::Record;
use crate::store::map::Entry;
use crate::store::{Directory, Files, Name, ReadPlan};
use crate::volume::{BLOCK_SIZE, BlockRange, MAX_REQUEST_BLOCKS, SnapshotId, VolumeId, VolumeSize};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

impl CopyState {
    /// A copy that has not begun.
    pub fn new(size: VolumeSize) -> Self {
        Self { size, copied_bytes: 0, total_bytes: 0, problem: None }
    }
}

/// Requests of 1 MiB between two pauses: application I/O on the same disk goes first.
const BURST: u32 = 16;
const PAUSE: Duration = Duration::from_millis(5);
/// Pauses before a failed copy is tried again, from the beginning: what keeps it from going on (a pool that is full or away) may
/// take long, and whoever asks for the volume waits for it.
const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_secs(300);

/// What a copy under way holds among the operations: not the volume itself, which may be asked for meanwhile.
fn copy_key(volume: VolumeId) -> [u8; 16] {
    volume.to_bytes().map(|byte| !byte)
}

/// One copy under way.
#[derive(Clone)]
struct CopyJob {
    volume: VolumeId,
    snapshot: SnapshotId,
    source: PathBuf,
    target: PathBuf,
}

impl Manager {
    /// Makes the empty target and starts to fill it.
    pub(super) async fn start_copy(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        snapshot: SnapshotId,
        promise: Promise,
    ) -> Result<(), Failure> {
        self.create_promised(new, pool, Blank::copying(snapshot), promise).await?;
        self.resume_copy(new.volume, snapshot);
        Ok(())
    }

    /// Fills the volume from the snapshot in the background, from the beginning.
    pub(super) fn resume_copy(&self, volume: VolumeId, snapshot: SnapshotId) {
        let manager = self.clone();
        tokio::spawn(async move {
            let (mut pause, mut is_written) = (FIRST_RETRY, false);
            while let Err(error) = manager.try_copy(volume, snapshot, &mut is_written).await {
                if manager.place(volume).is_none() {
                    return;
                }
                tracing::warn!(%volume, %error, again_in = ?pause, "the background copy failed");
                manager.report(volume, |copy| copy.problem = Some(error.to_string()));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_RETRY);
            }
        });
    }

    /// `is_written`: all of it is at the target, and only its record is missing.
    async fn try_copy(&self, volume: VolumeId, snapshot: SnapshotId, is_written: &mut bool) -> Result<(), Failure> {
        // Held until the copy lets go of its files: whoever deletes the volume waits for that.
        let _copying = self.begin(volume, &[copy_key(volume)]).await?;
        if !*is_written {
            self.copy(volume, snapshot).await?;
            *is_written = true;
        }
        self.finish_copy(volume, snapshot).await
    }

    async fn copy(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), Failure> {
        let target = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        let source = self.snapshot_place(snapshot).ok_or(Failure::NoSnapshot(snapshot))?;
        let job = CopyJob {
            volume,
            snapshot,
            source: self.tree_path(&source.pool, source.tree).ok_or(Failure::NoSnapshot(snapshot))?,
            target: self.tree_path(&target.pool, target.tree).ok_or(Failure::NoVolume(volume))?,
        };
        let plan = self.engine().inspect(source.tree, move |store| store.reader(snapshot)).await;
        let plan =
            plan.map_err(|error| Failure::Engine { volume, error })?.map_err(|_| Failure::NoSnapshot(snapshot))?;
        let engine = |error| Failure::Engine { volume, error };
        crash_point("copy.begin");
        self.engine().close_tree(target.tree).await.map_err(engine)?;
        let (manager, path) = (self.clone(), job.target.clone());
        let copied = tokio::task::spawn_blocking(move || run(&job, &plan, &manager)).await;
        let io = |error| Failure::Io { volume, what: "the copy failed", error };
        copied.map_err(|e| io(io::Error::other(e)))?.map_err(io)?;
        crash_point("copy.written");
        let opened = tokio::task::spawn_blocking(move || open_tree(&path, None)).await;
        let opened = opened.map_err(|e| io(io::Error::other(e)))?.map_err(|e| io(io::Error::other(e)))?;
        self.engine().open_tree(target.tree, opened.store, opened.files, opened.pending).await.map_err(engine)
    }

    /// Deletes a volume whose copy is under way: the copy notices and stops.
    pub(super) async fn cancel_copy(&self, volume: VolumeId, place: &VolumePlace) -> Result<(), Failure> {
        self.index().volumes.remove(&volume);
        // A copy that still writes would keep its tree open, and could make a directory anew that is gone.
        let stopped = self.begin(volume, &[copy_key(volume)]).await;
        if stopped.is_err() {
            self.index().volumes.insert(volume, place.clone());
        }
        let _stopped = stopped?;
        let base = self.snapshot_place(base_of(volume));
        if let Some(pool) = self.pool(&place.pool) {
            self.remove_tree(&pool, place.tree).await;
        }
        if let Some(source) = base {
            self.drop_base(volume, source.tree).await;
            self.tidy_tree(&source.pool, source.tree).await;
        }
        Ok(())
    }

    async fn finish_copy(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), Failure> {
        let place = self.place(volume).ok_or(Failure::NoVolume(volume))?;
        let pool = self.pool(&place.pool).ok_or_else(|| Failure::NoPool(place.pool.clone()))?;
        let record = Record::new(place.descriptor.clone(), None);
        crash_point("copy.complete");
        self.write_record(&pool, place.tree, volume, &volume.to_string(), record).await?;
        if let Some(place) = self.index().volumes.get_mut(&volume) {
            place.copy = None;
        }
        if snapshot == base_of(volume)
            && let Some(source) = self.snapshot_place(snapshot)
        {
            self.drop_base(volume, source.tree).await;
            self.tidy_tree(&source.pool, source.tree).await;
        }
        tracing::info!(%volume, "the background copy is complete");
        Ok(())
    }

    fn tree_path(&self, pool: &crate::replica::pool::PoolName, tree: crate::volume::InstanceId) -> Option<PathBuf> {
        self.pool(pool).map(|p| p.pool.tree(tree))
    }

    fn report(&self, volume: VolumeId, change: impl FnOnce(&mut CopyState)) {
        if let Some(VolumePlace { copy: Some(copy), .. }) = self.index().volumes.get_mut(&volume) {
            change(copy);
        }
    }
}

/// Copies every block that was ever written. Blocking.
fn run(job: &CopyJob, plan: &ReadPlan, manager: &Manager) -> io::Result<()> {
    let source = Directory::new(&job.source);
    let mut target = Executor::open(&job.target)?;
    let total = runs(plan).map(|(_, _, count)| u64::from(count) * BLOCK_SIZE).sum();
    manager.report(job.volume, |copy| (copy.total_bytes, copy.problem) = (total, None));
    let mut buffer = Memory::zeros(MAX_REQUEST_BLOCKS as usize * BLOCK_SIZE as usize)?;
    let mut copied = 0;
    for (number, (block, physical, count)) in (1_u32..).zip(runs(plan)) {
        let data = &mut buffer.bytes_mut()[..count as usize * BLOCK_SIZE as usize];
        source.read_at(Name::Data, u64::from(physical) * BLOCK_SIZE, data)?;
        let range = BlockRange::new(block, count).ok_or_else(|| io::Error::other("an extent outside any volume"))?;
        target.write(job.volume, range, data)?;
        copied += u64::from(count) * BLOCK_SIZE;
        if number.is_multiple_of(BURST) {
            manager.report(job.volume, |copy| copy.copied_bytes = copied);
            if manager.place(job.volume).is_none() {
                return Err(io::Error::other("the volume was deleted"));
            }
            std::thread::sleep(PAUSE);
        }
    }
    target.flush(job.volume)?;
    tracing::debug!(volume = %job.volume, snapshot = %job.snapshot, copied, "copied");
    Ok(())
}

/// The data of a snapshot as (block, physical block, count), each at most one request long.
fn runs(plan: &ReadPlan) -> impl Iterator<Item = (u64, u32, u32)> + '_ {
    let mut next = 0;
    std::iter::from_fn(move || {
        while next < plan.blocks() {
            let block = next;
            let limit = u32::try_from(plan.blocks() - block).unwrap_or(u32::MAX);
            match plan.run(block, limit) {
                (Entry::Data(physical), count) => {
                    let count = count.min(MAX_REQUEST_BLOCKS);
                    next += u64::from(count);
                    return Some((block, physical.0, count));
                }
                (Entry::Zero | Entry::Absent, count) => next += u64::from(count),
            }
        }
        None
    })
}

/// Where the record of a volume that is being copied lies, for the start after a crash.
pub(super) fn copying(tree: &Path, volume: VolumeId) -> Option<SnapshotId> {
    Record::read(tree, &volume.to_string()).ok().flatten().and_then(|record| record.copying)
}
