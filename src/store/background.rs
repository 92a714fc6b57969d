//! Work that nobody waits for: long discards, merging and freeing layers, indexes of clones, zeroing ahead, giving space
//! back, checksums, and checkpoints that failed.
//!
//! Invariants: a step is short (below a millisecond, whatever the size of the volume), so that it can run between requests;
//! whatever a step changes is a record like any other; a layer is merged or freed only when its namelessness is durable,
//! nobody outside reads it, and it has one child or none; into one with checksums only what has its own is merged,
//! has no data, or could not get any.

use super::format::LayerId;
use super::map::{Entry, Extent, PhysicalBlock};
use super::record::Record;
use super::requests::{InFlight, physical_offset};
use super::tree::{Index, Layer, Role, Tree};
use super::{Action, Backlog, Buffer, File, Io, Job, Store};
use crate::memory::Memory;
use crate::protocol::DiskError;
use crate::volume::{BLOCK_SIZE, VolumeId};
use std::sync::OnceLock;
use std::time::Duration;

/// Extents that a step looks at or moves: some 100 microseconds. Few in the tests, so that much happens between two steps.
pub(super) const STEP_EXTENTS: usize = if cfg!(all(test, debug_assertions)) { 5 } else { 512 };

/// Blocks that a step changes: bounds the work on extents that are very long (4 GiB are 2,048 chunks of a map).
pub(super) const STEP_BLOCKS: u64 = if cfg!(all(test, debug_assertions)) { 64 } else { 1 << 20 };

/// Blocks zeroed ahead for each block allocated: who writes much gets ahead of it, who writes little costs little space.
const ZERO_AHEAD: u64 = 2;

/// The most that is zeroed ahead without new allocations (64 MiB).
const MOST_ZERO_AHEAD: u64 = 16384;

/// Blocks of one write of zeros, and the least to begin with.
const ZERO_CHUNK: u64 = 256;

/// Blocks given back at once: punching holds the file's lock, and writes wait for it.
const PUNCH_BLOCKS: u32 = 1024;

/// How often what cannot go on yet is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How long after a failed attempt a checkpoint is written again; and how often freed blocks are committed by themselves.
const RETRY: Duration = Duration::from_secs(1);

/// State of the background work.
#[derive(Debug, Default)]
pub(super) struct Background {
    now: Duration,
    /// Layers that may wait to be merged or freed, or be looked at for it.
    scan: bool,
    reclaim: Vec<LayerId>,
    /// Some candidates cannot go on now.
    deferred: bool,
    building: bool,
    zero_credit: u64,
    zeroing: bool,
    punching: bool,
    /// There was something to punch the last time.
    punchable: bool,
    retry_at: Option<Duration>,
    commit_at: Option<Duration>,
    pub checking: super::checking::Checking,
}

impl Background {
    /// Names or layers changed: look for work.
    pub fn changed(&mut self) {
        (self.scan, self.building) = (true, true);
        self.checking.changed();
    }

    /// Blocks were allocated.
    pub fn allocated(&mut self, blocks: u32) {
        self.zero_credit = (self.zero_credit + ZERO_AHEAD * u64::from(blocks)).min(MOST_ZERO_AHEAD);
    }

    /// A commit with records is durable: unless another one follows soon, one more shall say so in the log.
    pub fn committed(&mut self) {
        self.commit_at = Some(self.now + RETRY);
    }

    /// Blocks became free.
    pub fn freed(&mut self) {
        self.punchable = true;
    }
}

impl Store {
    /// One short step of the background work. To be called while [`Self::busy`], after the delay of [`Self::next_tick`].
    pub fn tick(&mut self, now: Duration, out: &mut Vec<Action<Job>>) {
        self.background.now = now;
        self.zeroing_step(out);
        self.build_step();
        self.reclaim_step();
        self.zero_ahead_step(out);
        self.punch_step(out);
        self.check_step(now, out);
        if !self.tree.discarded.is_empty() {
            out.push(Action::Job(Job::Free(std::mem::take(&mut self.tree.discarded))));
        }
        self.checkpoint_step(now, out);
        self.space_step(now, out);
        self.commit_step(now);
        self.pump(out);
    }

    /// Whether there is background work.
    pub fn busy(&self) -> bool {
        self.next_tick().is_some()
    }

    /// How long [`Self::tick`] may wait; `None` if there is nothing to do.
    pub fn next_tick(&self) -> Option<Duration> {
        let background = &self.background;
        let healthy = self.commit.failure().is_none();
        let zero = background.zero_credit >= ZERO_CHUNK && !background.zeroing;
        let reclaim = background.scan || !background.reclaim.is_empty() && !background.deferred;
        let punch = background.punchable && !background.punching;
        let free = !self.tree.discarded.is_empty();
        if self.requests.is_zeroing()
            || background.building
            || free
            || healthy && (zero || reclaim || punch || self.commit.can_rotate())
        {
            return Some(Duration::ZERO);
        }
        let later = |at: Option<Duration>| at.map(|at| at.saturating_sub(background.now));
        let again = (!background.reclaim.is_empty() && healthy).then_some(LOOK_AGAIN);
        let retry = later(background.retry_at).or(self.commit.can_retry_checkpoint().then_some(RETRY));
        let commit = later(background.commit_at).filter(|_| healthy);
        let checking = background.checking.next(background.now).filter(|_| healthy);
        let space = self.space.next(background.now).filter(|_| healthy);
        [again, retry, commit, checking, space].into_iter().flatten().min()
    }

    /// What waits to be done.
    pub fn backlog(&self) -> Backlog {
        let nameless = self.tree.layers.values().filter(|layer| layer.role == Role::Nameless);
        let unchecked = self.tree.layers.values().filter(|layer| layer.settled && !layer.checksummed);
        Backlog {
            merging_layers: nameless.filter(|layer| layer.children.len() < 2).count() as u32,
            unchecked_blocks: unchecked.map(|layer| layer.map.data_blocks()).sum(),
        }
    }

    /// Copies a few extents into the index of a volume that has none yet.
    fn build_step(&mut self) {
        if !self.background.building {
            return;
        }
        let is_building = |volume: &super::tree::Volume| matches!(volume.index, Index::Building { .. });
        let found = self.tree.volumes.iter().find(|(_, volume)| is_building(volume)).map(|(id, _)| *id);
        match found {
            Some(id) => build_index(&mut self.tree, id),
            None => self.background.building = false,
        }
    }

    /// Merges or frees a part of one nameless layer.
    fn reclaim_step(&mut self) {
        if std::mem::take(&mut self.background.scan) {
            let nameless = self.tree.layers.iter().filter(|(_, layer)| self.is_reclaimable(layer));
            self.background.reclaim = nameless.map(|(id, _)| *id).collect();
        }
        self.background.deferred = true;
        let may_merge = !self.background.reclaim.is_empty() && self.may_merge();
        let mut reclaim = self.background.reclaim.iter().copied();
        let ready = reclaim.find_map(|id| Some((id, self.reclaim_record(id, may_merge)?)));
        if let Some((id, record)) = ready
            && self.pending.has_room(1)
        {
            self.background.deferred = false;
            self.change_below(record);
            if let Record::MergedPart { parent, child, .. } | Record::Merged { parent, child } = record
                && self.tree.layers.get(&child).is_some_and(|child| !child.checksummed)
            {
                self.background.checking.taken(parent, child);
            }
            if let Record::Merged { parent, child } = record {
                self.background.checking.merged(parent, child);
            }
            self.background.commit_at.get_or_insert(self.background.now + RETRY);
            if !self.tree.layers.contains_key(&id) {
                // Its parent may be a leaf now, or have one child; and its child may have lost its checksums.
                self.background.changed();
                self.keep_budget();
            }
        }
    }

    /// What slips from below into a volume that is being filled comes on top of what is awaited there, and was promised below.
    fn change_below(&mut self, record: Record) {
        let into = match record {
            Record::MergedPart { child, .. } | Record::Merged { child, .. } => Some(child),
            _ => None,
        };
        let blocks = |tree: &Tree| Some((tree.layers.get(&into?)?.role, tree.layers.get(&into?)?.map.data_blocks()));
        let before = blocks(&self.tree).map_or(0, |(_, blocks)| blocks);
        self.change(&[record]);
        if let Some((Role::Top(volume), now)) = blocks(&self.tree)
            && let Some(most) = self.fillings.get_mut(&volume)
        {
            *most += now.saturating_sub(before);
        }
    }

    fn is_reclaimable(&self, layer: &Layer) -> bool {
        #[cfg(test)]
        if self.planted == Some(super::planted::Planted::MergeOfTwo) {
            return layer.role == Role::Nameless;
        }
        layer.role == Role::Nameless && layer.children.len() < 2
    }

    /// The next step for a nameless layer; `None` while it has to wait.
    fn reclaim_record(&self, id: LayerId, may_merge: bool) -> Option<Record> {
        let layer = self.tree.layers.get(&id).filter(|layer| self.is_reclaimable(layer))?;
        let durable = self.commit.is_durable(layer.nameless_by);
        #[cfg(test)]
        let durable = durable || self.planted == Some(super::planted::Planted::MergeWithoutBarrier);
        // The name must be gone for good: a snapshot that a power cut brings back must not have lost or shared a block.
        if !durable || layer.in_use() || self.awaits_checksums(id, layer) {
            return None;
        }
        match layer.children.first() {
            None => Some(free_record(id, layer)),
            Some(_) if !may_merge => None,
            Some(&child) => {
                let below = self.tree.layers.get(&child)?;
                // Blocks must not slip into a layer while its checksums are being made or loaded.
                let checking = self.background.checking.is_at(child);
                (!checking).then(|| match merge_end(layer, below) {
                    Some(end) => Record::MergedPart { parent: id, child, end },
                    None => Record::Merged { parent: id, child },
                })
            }
        }
    }

    fn zero_ahead_step(&mut self, out: &mut Vec<Action<Job>>) {
        if self.background.zeroing || self.background.zero_credit < ZERO_CHUNK || self.commit.failure().is_some() {
            return;
        }
        let Some(((start, count), zeros)) = self.allocator.zero_ahead().zip(zeros()) else {
            self.background.zero_credit = 0;
            return;
        };
        self.background.zeroing = true;
        self.background.zero_credit -= u64::from(count).min(self.background.zero_credit);
        let (offset, length) = (physical_offset(start), count * BLOCK_SIZE as u32);
        let what = Io::Write { offset, length, buffer: Buffer::Store(zeros.as_ptr()) };
        self.issue(InFlight::Zeroing(start, count), File::Data, what, out);
    }

    pub(super) fn zeroed_ahead(&mut self, start: PhysicalBlock, count: u32, result: Result<(), DiskError>) {
        self.background.zeroing = false;
        match result {
            Ok(()) => self.allocator.zeroed(start, count),
            Err(_) => {
                // The pool is full or failing: whoever writes will see it himself.
                self.background.zero_credit = 0;
                self.allocator.not_zeroed(start, count);
            }
        }
    }

    fn punch_step(&mut self, out: &mut Vec<Action<Job>>) {
        if self.background.punching || !self.background.punchable {
            return;
        }
        match self.allocator.take_punchable(PUNCH_BLOCKS) {
            Some((start, count)) => {
                self.background.punching = true;
                let what = Io::Punch { offset: physical_offset(start), length: u64::from(count) * BLOCK_SIZE };
                self.issue(InFlight::Punching(start, count), File::Data, what, out);
            }
            None => self.background.punchable = false,
        }
    }

    pub(super) fn punched(&mut self, start: PhysicalBlock, count: u32) {
        self.background.punching = false;
        self.allocator.punched(start, count);
    }

    fn checkpoint_step(&mut self, now: Duration, out: &mut Vec<Action<Job>>) {
        self.rotate(out);
        if !self.commit.can_retry_checkpoint() {
            return;
        }
        if now >= *self.background.retry_at.get_or_insert(now + RETRY) {
            self.background.retry_at = None;
            self.retry_checkpoint(out);
        }
    }

    /// What was freed in the background is free only after a commit, also if nobody flushes; and the last commit needs a
    /// witness.
    fn commit_step(&mut self, now: Duration) {
        if self.background.commit_at.is_some_and(|at| now >= at) {
            self.background.commit_at = None;
            self.commit.is_due = !self.pending.is_empty() || self.commit.wants_witness();
        }
    }
}

/// The zeros that are written ahead: one copy for all trees, never touched, so it costs no memory.
fn zeros() -> Option<&'static Memory> {
    static ZEROS: OnceLock<Option<Memory>> = OnceLock::new();
    ZEROS.get_or_init(|| Memory::zeros((ZERO_CHUNK * BLOCK_SIZE) as usize).ok()).as_ref()
}

/// Removes the first part of a leaf, or the leaf once it is empty.
fn free_record(id: LayerId, layer: &Layer) -> Record {
    let mut part: Option<Extent> = None;
    for extent in layer.map.extents().take(STEP_EXTENTS) {
        let start = part.map_or(extent.start, |part| part.start);
        let end = extent.end().min(start + STEP_BLOCKS);
        if end > start && extent.start < end {
            part = Some(Extent { start, count: (end - start) as u32, entry: Entry::Absent });
        }
    }
    part.map_or(Record::Freed { layer: id }, |extent| Record::Map { layer: id, extent })
}

/// How far one step of a merge goes; `None` if it can do all that is left.
fn merge_end(layer: &Layer, child: &Layer) -> Option<u64> {
    let (mut pieces, mut blocks) = (0, 0);
    for extent in layer.map.extents() {
        let mut done = 0;
        while done < extent.count {
            if pieces >= STEP_EXTENTS || blocks >= STEP_BLOCKS {
                return Some(extent.start + u64::from(done));
            }
            let limit = (extent.count - done).min(STEP_BLOCKS as u32);
            let (_, count) = child.map.run(extent.start + u64::from(done), limit);
            (pieces, blocks, done) = (pieces + 1, blocks + u64::from(count), done + count);
        }
    }
    None
}

/// Copies a few extents of the next layer into the volume's index.
fn build_index(tree: &mut Tree, id: VolumeId) {
    let Some(volume) = tree.volumes.get_mut(&id) else { return };
    let top = volume.top;
    let Index::Building { mut map, stage, cursor } = std::mem::replace(&mut volume.index, Index::Top) else { return };
    let mut next = None;
    let (mut count, mut blocks) = (0, 0);
    if let Some(layer) = tree.layers.get(&stage) {
        for extent in layer.map.extents_from(cursor) {
            if count >= STEP_EXTENTS || blocks >= STEP_BLOCKS {
                next = Some(extent.start);
                break;
            }
            let part = u64::from(extent.count).min(STEP_BLOCKS) as u32;
            map.replace(extent.start, part, extent.entry, &mut |_| {});
            (count, blocks) = (count + 1, blocks + u64::from(part));
            if part < extent.count {
                next = Some(extent.start + u64::from(part));
                break;
            }
        }
    }
    let index = match next {
        Some(cursor) => Index::Building { map, stage, cursor },
        None if stage == top => Index::Ready(map),
        None => match tree.path(top).map(|(id, _)| id).take_while(|id| *id != stage).last() {
            Some(stage) => Index::Building { map, stage, cursor: 0 },
            None => tree.new_index(top),
        },
    };
    if let Some(volume) = tree.volumes.get_mut(&id) {
        volume.index = index;
    }
}
