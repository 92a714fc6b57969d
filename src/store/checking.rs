//! Checksums of sealed layers: making them in the background, and having them at hand for verified reads.
//!
//! Invariants: a layer counts as checksummed only after its checksums are synced and a record says so; while they are made
//! the layer is held, so that none of its blocks moves; a torn write of a checksum block is mended from the redo file. What is
//! to be merged into a layer with checksums gets its own before: else all of that one's would be made again, of what may have
//! rotted since.

#[cfg(test)]
mod tests;

use super::checksums::{ChecksumBlock, ChecksumsError, Place};
use super::files::{Files, Name};
use super::format::{BLOCK, LayerId};
use super::job::{FilesHandle, Job};
use super::map::{Entry, Map, PhysicalBlock};
use super::record::Record;
use super::tree::{Layer, Role, Tree};
use super::{Action, Store};
use crate::memory::Memory;
use crate::volume::{BLOCK_SIZE, InstanceId};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Blocks whose checksums one job makes (16 MiB): then others get a turn, and what changed meanwhile is noticed.
const JOB_BLOCKS: u32 = 4096;

/// Blocks of the checksum file that one job changes: bounds the redo file.
const JOB_CHECKSUM_BLOCKS: usize = 64;

/// Time a job's share of the disk takes at least: 16 MiB each 80 ms are 200 MiB/s, which leaves room for the volumes.
const JOB_EVERY: Duration = Duration::from_millis(80);

/// Stands where the number of an entry's block would be. Without it, as older versions wrote it, the redo file ends where it ends.
const END_OF_REDO: u64 = u64::MAX;

/// Bytes read at once.
const READ_BYTES: usize = 1 << 20;

/// State of the checksums.
#[derive(Debug, Default)]
pub(super) struct Checking {
    /// Look for layers without checksums.
    scan: bool,
    /// The layer whose checksums are being made; its job waits here between two turns.
    active: Option<(LayerId, Option<ChecksumJob>)>,
    next_at: Duration,
    /// Layers whose checksums could not be made; tried again when the tree is opened again.
    failed: BTreeSet<LayerId>,
    loading: Option<LayerId>,
    /// Layers whose checksums are in `table`; of the `incomplete` ones not all.
    loaded: BTreeSet<LayerId>,
    incomplete: BTreeSet<LayerId>,
    /// Blocks of the checksum file; only while a volume verifies its reads.
    table: BTreeMap<u32, ChecksumBlock>,
}

/// Makes the checksums of one layer, a part at a time.
#[derive(Debug)]
pub struct ChecksumJob {
    files: FilesHandle,
    instance: InstanceId,
    layer: LayerId,
    /// The layer, until its runs are made: sorting them is work for the helper thread, too.
    map: Option<Map>,
    /// The layer's blocks in the order of the file.
    runs: Vec<(u32, u32)>,
    next: usize,
    changed: BTreeMap<u32, ChecksumBlock>,
    _pin: Arc<()>,
}

/// Loads the checksums of one layer.
#[derive(Debug)]
pub struct LoadJob {
    files: FilesHandle,
    instance: InstanceId,
    layer: LayerId,
    map: Map,
    found: BTreeMap<u32, ChecksumBlock>,
}

impl Checking {
    /// Layers or settings changed: look for work.
    pub fn changed(&mut self) {
        self.scan = true;
    }

    /// Whether the checksums of this layer are being made or loaded.
    pub fn is_at(&self, layer: LayerId) -> bool {
        self.loading == Some(layer) || self.active.as_ref().is_some_and(|(active, _)| *active == layer)
    }

    /// A part of a layer whose checksums could not be made has taken those of the layer above: they are not made anew with each step.
    pub fn taken(&mut self, parent: LayerId, child: LayerId) {
        if self.failed.contains(&parent) {
            self.failed.insert(child);
        }
    }

    /// A layer was merged into another one: what is loaded of that one's checksums may not be all any more.
    pub fn merged(&mut self, parent: LayerId, child: LayerId) {
        let is_whole = self.loaded.contains(&parent) && !self.incomplete.contains(&parent);
        if self.loaded.contains(&child) && !is_whole {
            self.incomplete.insert(child);
            self.scan = true;
        }
    }

    /// When there is something to do.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        let waiting = self.active.as_ref().is_some_and(|(_, job)| job.is_some());
        let begin = self.scan && self.active.is_none() && self.loading.is_none();
        (waiting || begin).then(|| self.next_at.saturating_sub(now))
    }

    /// Checksums, by offset in a request's buffer, of the blocks that a checksummed layer below `top` owns. `count` blocks
    /// at `block` go to `offset`.
    pub fn expected(
        &self,
        tree: &Tree,
        top: LayerId,
        block: u64,
        count: u32,
        offset: u32,
        checks: &mut Vec<(u32, u32)>,
    ) {
        let mut done = 0;
        while done < count {
            let mut limit = count - done;
            let start = block + u64::from(done);
            let owner = tree.path(top).find_map(|(id, layer)| {
                let (entry, count) = layer.map.run(start, limit);
                limit = count;
                (entry != Entry::Absent).then_some((id, layer, entry))
            });
            if let Some((id, layer, Entry::Data(physical))) = owner
                && id != top
                && layer.checksummed
                && self.loaded.contains(&id)
            {
                for index in 0..limit {
                    let place = Place::of(PhysicalBlock(physical.0 + index));
                    if let Some(block) = self.table.get(&place.block) {
                        checks.push((offset + (done + index) * BLOCK_SIZE as u32, block.get(place.index)));
                    }
                }
            }
            done += limit;
        }
    }
}

impl Store {
    /// Begins or goes on with what there is to do for checksums.
    pub(super) fn check_step(&mut self, now: Duration, out: &mut Vec<Action<Job>>) {
        let checking = &mut self.background.checking;
        if checking.loading.is_some() || now < checking.next_at || self.commit.failure().is_some() {
            return;
        }
        if let Some((layer, waiting)) = &mut checking.active {
            let Some(job) = waiting.take() else { return };
            if self.tree.layers.get(layer).is_some_and(|layer| is_worth_checking(&self.tree, layer)) {
                checking.next_at = now + JOB_EVERY;
                return out.push(Action::Job(Job::Checksum(job)));
            }
            // It lost its name meanwhile: without the job it can be merged.
            checking.active = None;
            out.push(Action::Job(Job::Cancel(job)));
        }
        if !std::mem::take(&mut checking.scan) {
            return;
        }
        if let Some(job) = self.load_job() {
            (self.background.checking.scan, self.background.checking.loading) = (true, Some(job.layer));
            out.push(Action::Job(Job::Load(job)));
        } else if let Some(job) = self.checksum_job() {
            self.background.checking.scan = true;
            self.background.checking.active = Some((job.layer, None));
            out.push(Action::Job(Job::Checksum(job)));
        }
    }

    /// Whether a layer is to have checksums and has none: it is not merged before.
    pub(super) fn awaits_checksums(&self, id: LayerId, layer: &Layer) -> bool {
        !layer.checksummed && !self.background.checking.failed.contains(&id) && is_worth_checking(&self.tree, layer)
    }

    fn checksum_job(&self) -> Option<ChecksumJob> {
        let (id, layer) = self.tree.layers.iter().find(|(id, layer)| self.awaits_checksums(**id, layer))?;
        Some(ChecksumJob {
            files: FilesHandle(self.files.clone()),
            instance: self.superblock.instance,
            layer: *id,
            map: Some(layer.map.clone()),
            runs: Vec::new(),
            next: 0,
            changed: BTreeMap::new(),
            _pin: layer.pin.clone(),
        })
    }

    /// For the volumes that verify their reads.
    fn load_job(&mut self) -> Option<LoadJob> {
        let verifying: Vec<_> =
            self.tree.volumes.values().filter(|volume| volume.verify_reads).map(|volume| volume.top).collect();
        if verifying.is_empty() {
            self.background.checking.table.clear();
            self.background.checking.loaded.clear();
            self.background.checking.incomplete.clear();
            return None;
        }
        let checking = &self.background.checking;
        let is_loaded = |id| checking.loaded.contains(&id) && !checking.incomplete.contains(&id);
        let mut layers = verifying.into_iter().flat_map(|top| self.tree.path(top));
        let (id, layer) = layers.find(|(id, layer)| layer.checksummed && !is_loaded(*id))?;
        Some(LoadJob {
            files: FilesHandle(self.files.clone()),
            instance: self.superblock.instance,
            layer: id,
            map: layer.map.clone(),
            found: BTreeMap::new(),
        })
    }

    pub(super) fn checksum_done(&mut self, mut job: ChecksumJob, result: io::Result<bool>) {
        let checking = &mut self.background.checking;
        for (number, block) in std::mem::take(&mut job.changed) {
            // Others that are loaded already may have checksums in the same block.
            if let Some(loaded) = checking.table.get_mut(&number) {
                *loaded = block;
            }
        }
        match result {
            Ok(false) => checking.active = Some((job.layer, Some(job))),
            Ok(true) => {
                let layer = job.layer;
                let valid = self.tree.layers.get(&layer).is_some_and(|layer| is_worth_checking(&self.tree, layer));
                if valid && !self.pending.has_room(1) {
                    // The job is at its end: its next turn does nothing and brings us here again.
                    checking.active = Some((layer, Some(job)));
                    return;
                }
                checking.active = None;
                if valid {
                    // Blocks that came to it since they were loaded are not in the table.
                    checking.loaded.remove(&layer);
                    self.change(&[Record::Checksummed { layer }]);
                }
            }
            Err(_) => {
                checking.active = None;
                checking.failed.insert(job.layer);
            }
        }
    }

    pub(super) fn checksums_loaded(&mut self, job: LoadJob, result: io::Result<()>) {
        let checking = &mut self.background.checking;
        checking.loading = None;
        // What cannot be loaded is not checked; verify names it.
        checking.loaded.insert(job.layer);
        checking.incomplete.remove(&job.layer);
        if result.is_ok() {
            checking.table.extend(job.found);
        }
    }
}

impl ChecksumJob {
    /// One part; whether that was all.
    pub(super) fn step(&mut self) -> io::Result<bool> {
        self.changed.clear();
        if let Some(map) = self.map.take() {
            self.runs = map.extents().filter_map(|extent| data_run(extent.entry, extent.count)).collect();
            self.runs.sort_unstable();
        }
        let mut memory = Memory::zeros(READ_BYTES)?;
        let mut budget = JOB_BLOCKS;
        while let Some(&(start, count)) = self.runs.get(self.next) {
            if budget == 0 || self.changed.len() >= JOB_CHECKSUM_BLOCKS {
                break;
            }
            let place = Place::of(PhysicalBlock(start));
            let here = count.min(budget).min(READ_BYTES as u32 / BLOCK as u32);
            let here = here.min(super::checksums::PER_BLOCK - place.index);
            let bytes = &mut memory.bytes_mut()[..here as usize * BLOCK];
            self.files.0.read_at(Name::Data, u64::from(start) * BLOCK_SIZE, bytes)?;
            let block = match self.changed.entry(place.block) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(new) => {
                    new.insert(read_block(&*self.files.0, self.instance, place.block)?)
                }
            };
            for (index, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
                block.set(place.index + index as u32, crc32c::crc32c(bytes));
            }
            budget -= here;
            self.runs[self.next] = (start + here, count - here);
            self.next += usize::from(here == count);
        }
        self.write()?;
        Ok(self.next == self.runs.len())
    }

    fn write(&self) -> io::Result<()> {
        if self.changed.is_empty() {
            return Ok(());
        }
        let files = &*self.files.0;
        let mut redo = Vec::with_capacity(self.changed.len() * 2 * BLOCK);
        for (&number, block) in &self.changed {
            let mut bytes = [0; BLOCK];
            redo.extend_from_slice(&u64::from(number).to_le_bytes());
            redo.resize(redo.len() + BLOCK - 8, 0);
            block.encode(self.instance, number, &mut bytes);
            redo.extend_from_slice(&bytes);
        }
        // What is behind it is of an older step.
        redo.extend_from_slice(&END_OF_REDO.to_le_bytes());
        redo.resize(redo.len() + BLOCK - 8, 0);
        // Durable beside the file before the file is touched: a torn block there takes others' checksums along.
        files.write_at(Name::ChecksumsRedo, 0, &redo)?;
        files.sync(Name::ChecksumsRedo)?;
        for (index, &number) in self.changed.keys().enumerate() {
            let bytes = &redo[(2 * index + 1) * BLOCK..][..BLOCK];
            files.write_at(Name::Checksums, u64::from(number) * BLOCK_SIZE, bytes)?;
        }
        files.sync(Name::Checksums)
    }
}

impl LoadJob {
    pub(super) fn load(&mut self) -> io::Result<()> {
        let runs = self.map.extents().filter_map(|extent| data_run(extent.entry, extent.count));
        let blocks: BTreeSet<u32> = runs.flat_map(|(start, count)| checksum_blocks(start, count)).collect();
        for number in blocks {
            self.found.insert(number, read_block(&*self.files.0, self.instance, number)?);
        }
        Ok(())
    }
}

/// Mends blocks of the checksum file that a power cut tore.
pub(super) fn redo(files: &dyn Files, instance: InstanceId) -> io::Result<()> {
    let entries = files.size(Name::ChecksumsRedo)?.unwrap_or(0) / (2 * BLOCK_SIZE);
    for entry in 0..entries.min(JOB_CHECKSUM_BLOCKS as u64) {
        let mut bytes = vec![0; 2 * BLOCK];
        files.read_at(Name::ChecksumsRedo, entry * 2 * BLOCK_SIZE, &mut bytes)?;
        let (head, block) = bytes.split_at(BLOCK);
        let number = head.first_chunk().map_or(0, |number| u64::from_le_bytes(*number));
        if number == END_OF_REDO {
            break;
        }
        let Ok(number) = u32::try_from(number) else { continue };
        let sound = ChecksumBlock::decode(instance, number, block).is_ok();
        if sound && read_block(files, instance, number).is_err_and(|error| error.kind() == io::ErrorKind::InvalidData) {
            files.write_at(Name::Checksums, u64::from(number) * BLOCK_SIZE, block)?;
            files.sync(Name::Checksums)?;
        }
    }
    Ok(())
}

/// A block of the checksum file; one that was never written has no checksums.
pub(super) fn read_block(files: &dyn Files, instance: InstanceId, number: u32) -> io::Result<ChecksumBlock> {
    let offset = u64::from(number) * BLOCK_SIZE;
    if files.size(Name::Checksums)?.unwrap_or(0) < offset + BLOCK_SIZE {
        return Ok(ChecksumBlock::default());
    }
    let mut bytes = vec![0; BLOCK];
    let mut read = || {
        files.read_at(Name::Checksums, offset, &mut bytes)?;
        Ok::<_, io::Error>(ChecksumBlock::decode(instance, number, &bytes))
    };
    let mut decoded = read()?;
    if matches!(&decoded, Err(error) if !matches!(error, ChecksumsError::Blank { .. })) {
        // Who verifies reads beside the job that writes, and may see one half as it was and one as it becomes.
        decoded = read()?;
    }
    match decoded {
        Err(ChecksumsError::Blank { .. }) => Ok(ChecksumBlock::default()),
        decoded => decoded.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}

/// Sealed for good, and here to stay; or about to be merged into a layer that has checksums. Those would have to be made anew
/// otherwise, from what has rotted meanwhile, too. Such a layer was settled when all below it was.
fn is_worth_checking(tree: &Tree, layer: &Layer) -> bool {
    let has_checksums = |id: &LayerId| tree.layers.get(id).is_some_and(|layer| layer.checksummed);
    match layer.role {
        Role::Snapshot(_) => layer.settled,
        Role::Nameless => match &layer.children[..] {
            [] => false,
            [child] => layer.map.data_blocks() > 0 && has_checksums(child),
            [_, _, ..] => layer.settled,
        },
        Role::Top(_) | Role::Base => false,
    }
}

fn data_run(entry: Entry, count: u32) -> Option<(u32, u32)> {
    match entry {
        Entry::Data(physical) => Some((physical.0, count)),
        Entry::Absent | Entry::Zero => None,
    }
}

fn checksum_blocks(start: u32, count: u32) -> impl Iterator<Item = u32> {
    Place::of(PhysicalBlock(start)).block..=Place::of(PhysicalBlock(start + count - 1)).block
}
