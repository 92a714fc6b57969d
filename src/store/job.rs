//! Work for helper threads: what takes long and blocks.
//!
//! Invariant: a job owns all that it needs; nothing it does is believed before its outcome is handed back to the store.

use super::checking::{ChecksumJob, LoadJob};
use super::checkpoint::{self, Header};
use super::files::{Files, Name};
use super::log::Position;
use super::map::Map;
use super::record::Record;
use super::space::{self, KeepJob};
use super::tree::Tree;
use super::{Action, Store};
use crate::volume::InstanceId;
use std::io;
use std::sync::Arc;

/// One piece of blocking work.
#[derive(Debug)]
pub enum Job {
    /// Writes the whole map.
    Checkpoint(CheckpointJob),
    /// Makes the checksums of a part of a sealed layer.
    Checksum(ChecksumJob),
    /// Loads the checksums of a layer for verified reads.
    Load(LoadJob),
    /// Keeps space for checkpoints.
    Keep(KeepJob),
    /// Frees memory, which takes long where there is much of it.
    Free(Vec<Map>),
    /// Gives up making checksums, and frees what that held.
    Cancel(ChecksumJob),
}

/// What became of a job.
#[derive(Debug)]
pub struct JobOutcome(Outcome);

#[derive(Debug)]
enum Outcome {
    /// The generation, and the space that is kept for the next ones.
    Checkpoint(Result<(u64, u64), CheckpointJob>),
    Checksum(ChecksumJob, io::Result<bool>),
    Load(LoadJob, io::Result<()>),
    Kept(u64),
    Free,
}

impl Job {
    /// Does it. Blocks.
    pub fn run(self) -> JobOutcome {
        JobOutcome(match self {
            Self::Checkpoint(job) => {
                let written = job.write();
                Outcome::Checkpoint(written.map(|kept| (job.position.epoch, kept)).map_err(|_| job))
            }
            Self::Checksum(mut job) => {
                let result = job.step();
                Outcome::Checksum(job, result)
            }
            Self::Load(mut job) => {
                let result = job.load();
                Outcome::Load(job, result)
            }
            Self::Keep(job) => Outcome::Kept(job.run()),
            Self::Free(maps) => {
                drop(maps);
                Outcome::Free
            }
            Self::Cancel(job) => {
                drop(job);
                Outcome::Free
            }
        })
    }
}

impl Store {
    /// Takes the outcome of an [`Action::Job`].
    pub fn job_done(&mut self, outcome: JobOutcome, out: &mut Vec<Action<Job>>) {
        match outcome.0 {
            Outcome::Checkpoint(result) => self.checkpoint_done(result, out),
            Outcome::Checksum(job, result) => self.checksum_done(job, result),
            Outcome::Load(job, result) => self.checksums_loaded(job, result),
            Outcome::Kept(bytes) => self.space_kept(bytes),
            Outcome::Free => {}
        }
        self.pump(out);
    }
}

/// Writes a checkpoint.
#[derive(Debug)]
pub struct CheckpointJob {
    files: FilesHandle,
    instance: InstanceId,
    position: Position,
    tree: Tree,
    /// What is to be kept for the next ones.
    range: space::Range,
}

/// The files of a tree, in a form that can be shown.
#[derive(Clone)]
pub(super) struct FilesHandle(pub Arc<dyn Files>);

impl std::fmt::Debug for FilesHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Files")
    }
}

impl CheckpointJob {
    pub(super) fn new(
        files: Arc<dyn Files>,
        instance: InstanceId,
        position: Position,
        tree: Tree,
        range: space::Range,
    ) -> Self {
        Self { files: FilesHandle(files), instance, position, tree, range }
    }

    fn write(&self) -> io::Result<u64> {
        write_checkpoint(&*self.files.0, self.instance, self.position, &self.tree)?;
        Ok(space::keep(&*self.files.0, self.range))
    }
}

/// Writes the tree as the checkpoint that the log at `position` follows. All data that the tree names must be durable.
pub(super) fn write_checkpoint(
    files: &dyn Files,
    instance: InstanceId,
    position: Position,
    tree: &Tree,
) -> io::Result<()> {
    prepare_checkpoint(files, instance, position, tree)?;
    name_checkpoint(files)
}

/// The first half: the checkpoint is durable and has no name, so nothing has changed.
pub(super) fn prepare_checkpoint(
    files: &dyn Files,
    instance: InstanceId,
    position: Position,
    tree: &Tree,
) -> io::Result<()> {
    // What is there is written over, not removed: its space is kept for this. What is left behind the end is never read.
    if files.size(Name::CheckpointNew)?.is_none() {
        files.create(Name::CheckpointNew)?;
    } else {
        // An exchange whose sync failed may not be durable: then this is what a power cut would call the checkpoint.
        files.sync_names()?;
    }
    let mut out = Appender { files, name: Name::CheckpointNew, offset: 0 };
    let layers = tree.layers.iter().map(|(id, layer)| (*id, &layer.map));
    checkpoint::write(&mut out, &Header { instance, log: position }, records(tree).into_iter(), layers)?;
    // Whole and durable before it has the name.
    files.sync(Name::CheckpointNew)
}

/// The second half.
pub(super) fn name_checkpoint(files: &dyn Files) -> io::Result<()> {
    match files.size(Name::Checkpoint)? {
        // The old one gives its space to the next one, and not to whoever waits for some.
        Some(_) => files.exchange(Name::CheckpointNew, Name::Checkpoint)?,
        None => files.rename(Name::CheckpointNew, Name::Checkpoint)?,
    }
    // The name durable before the old logs are used again.
    files.sync_names()
}

/// The records that make the layers and names of a tree.
fn records(tree: &Tree) -> Vec<Record> {
    // A parent's id is always the smaller one.
    let layers = tree.layers.iter().map(|(&layer, found)| Record::NewLayer { layer, parent: found.parent });
    let volumes = tree.volumes.iter().map(|(&volume, found)| Record::NameVolume {
        layer: found.top,
        volume,
        size: found.size,
        verify_reads: found.verify_reads,
    });
    let snapshots = tree.snapshots.iter().map(|(&snapshot, found)| Record::NameSnapshot {
        layer: found.layer,
        snapshot,
        volume: found.volume,
        size: found.size,
        created_ms: found.created_ms,
    });
    let checksummed = tree.layers.iter().filter(|(_, layer)| layer.checksummed);
    let checksummed = checksummed.map(|(&layer, _)| Record::Checksummed { layer });
    let bases = tree.bases.iter().map(|(&layer, &volume)| Record::NameBase { layer, volume });
    layers.chain(volumes).chain(snapshots).chain(checksummed).chain(bases).collect()
}

/// Writes a file from front to back.
struct Appender<'a> {
    files: &'a dyn Files,
    name: Name,
    offset: u64,
}

impl io::Write for Appender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.files.write_at(self.name, self.offset, bytes)?;
        self.offset += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
