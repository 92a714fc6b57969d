//! Which physical blocks of one `data` file are free, and which of them to use next.
//!
//! Invariants: every block below the limit is in exactly one state:
//! ```text
//!   hole ──zero_ahead──> being zeroed ──zeroed──> written, free ──allocate──> owned ──retire──> retired
//!    │ ^                                              │    ^                    │                  │
//!    │ └──────punched────── being punched <──take_punchable │<───────undo───────┘                  │
//!    └───────────────────allocate──> owned                  └<──────────durable(batch)─────────────┘
//! ```
//! A retired block is handed out again only after the batch it was retired in is durable. A block that is being zeroed or
//! punched is handed out to nobody.
//! Why so: a first write into a hole costs three times an overwrite, so small writes get blocks that were written before,
//! and some of the frontier is zeroed ahead for them; large writes go to holes, where the cost is per request.

mod runs;
#[cfg(test)]
mod tests;

use crate::store::map::PhysicalBlock;
use runs::{LONG, Runs};
use std::collections::VecDeque;

/// Zeroing ahead begins when less contiguous written space than this is free: 16 MiB, a second of small writes.
const ZEROED_LOW: u64 = 16 << 8;

/// Zeroing ahead ends when this much contiguous written space is free: 64 MiB.
const ZEROED_HIGH: u64 = 64 << 8;

/// Blocks zeroed or punched at once (1 MiB), and the alignment of punching: holes below that only fragment the filesystem.
const CHUNK: u32 = 256;

/// Free written space that is kept for recycling before any becomes holes: this, or an eighth of what is owned: 64 MiB.
const RECYCLE_MIN: u64 = 64 << 8;

/// A small request is split into at most this many pieces before a hole is used: each piece is a write of its own.
const MAX_PIECES: usize = 4;

/// Runs examined for an aligned chunk to punch.
const PUNCH_TRIES: usize = 32;

/// Free space of one data file.
#[derive(Clone, Debug)]
pub struct Allocator {
    /// Free and written at least once.
    written: Runs,
    /// Free and unwritten: the frontier, and what was punched.
    holes: Runs,
    /// Retired since the last batch began.
    retired: Vec<(u32, u32)>,
    /// Retired in batches that are not durable yet, oldest first.
    batches: VecDeque<(Batch, Vec<(u32, u32)>)>,
    next_batch: u64,
    owned_blocks: u64,
    retired_blocks: u64,
    /// Being zeroed or punched.
    busy_blocks: u64,
    /// Blocks of disk that the tree may occupy before it uses up scattered free blocks.
    budget: u64,
    zeroing: bool,
    cursor: u32,
}

/// The blocks retired before one point in time; later batches compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Batch(u64);

/// There are not enough free blocks; nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} blocks are wanted and {free} are free")]
pub struct Full {
    /// Blocks asked for.
    pub wanted: u32,
    /// Blocks free, not counting retired ones.
    pub free: u64,
}

/// The layers' claims to physical blocks are damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Overlap {
    /// Two extents claim it.
    #[error("physical block {0} is owned twice")]
    OwnedTwice(u32),
    /// It does not exist.
    #[error("physical block {block} is owned and the data file ends at block {limit}")]
    PastLimit {
        /// The first such block.
        block: u64,
        /// The limit.
        limit: u32,
    },
}

impl Allocator {
    /// The free space beside the owned extents (in any order). Blocks below `file_blocks_written` (the size of the data
    /// file) count as written; a punched hole there that nobody remembers costs only time. No block at or past
    /// `limit_blocks` is ever handed out.
    pub fn from_owned(
        owned: impl Iterator<Item = (PhysicalBlock, u32)>,
        file_blocks_written: u32,
        limit_blocks: u32,
    ) -> Result<Self, Overlap> {
        let mut owned: Vec<(u32, u32)> = owned.map(|(start, count)| (start.0, count)).filter(|run| run.1 > 0).collect();
        owned.sort_unstable();
        let frontier = file_blocks_written.min(limit_blocks);
        let (mut written, mut holes) = (Vec::new(), Vec::new());
        let mut add_free = |from: u32, to: u32| {
            let middle = frontier.clamp(from, to);
            written.extend((from < middle).then_some((from, middle - from)));
            holes.extend((middle < to).then(|| (middle, to - middle)));
        };
        let (mut next, mut owned_blocks) = (0, 0);
        for (start, count) in owned {
            if start < next {
                return Err(Overlap::OwnedTwice(start));
            }
            let end = start
                .checked_add(count)
                .filter(|&end| end <= limit_blocks)
                .ok_or(Overlap::PastLimit { block: u64::from(start.max(limit_blocks)), limit: limit_blocks })?;
            add_free(next, start);
            owned_blocks += u64::from(count);
            next = end;
        }
        add_free(next, limit_blocks);
        Ok(Self {
            written: Runs::from_ascending(written),
            holes: Runs::from_ascending(holes),
            retired: Vec::new(),
            batches: VecDeque::new(),
            next_batch: 0,
            owned_blocks,
            retired_blocks: 0,
            busy_blocks: 0,
            budget: u64::from(limit_blocks),
            zeroing: false,
            cursor: 0,
        })
    }

    /// Hands out `count` blocks, appended to `out` as runs: all of them or none. One run if there is one; small requests
    /// come from written blocks first, large ones from contiguous space.
    pub fn allocate(&mut self, count: u32, out: &mut Vec<(PhysicalBlock, u32)>) -> Result<(), Full> {
        let free = self.written.blocks() + self.holes.blocks();
        if u64::from(count) > free {
            return Err(Full { wanted: count, free });
        }
        if count == 0 {
            return Ok(());
        }
        let within_budget = self.occupied_blocks() + u64::from(count) <= self.budget;
        let hole = if within_budget { self.holes.shortest(count) } else { None };
        // What was zeroed ahead is for small writes, unless there is more of it than zeroing keeps ready.
        let recycle = count < LONG || hole.is_none() || self.written.long_blocks() > ZEROED_HIGH;
        let written = if recycle { self.written.near(self.cursor, count) } else { None };
        if let Some(run) = written {
            self.take_written(run, count, out);
        } else if let Some(run) = hole
            && !self.fits_in_pieces(count)
        {
            self.take_hole(run, count, out);
        } else {
            self.take_pieces(count, out);
        }
        Ok(())
    }

    /// Blocks that no layer names any more: free once the batch they end up in is durable.
    pub fn retire(&mut self, start: PhysicalBlock, count: u32) {
        self.owned_blocks -= u64::from(count);
        self.retired_blocks += u64::from(count);
        match self.retired.last_mut() {
            Some((last, length)) if *last + *length == start.0 => *length += count,
            _ => self.retired.push((start.0, count)),
        }
    }

    /// Ends the current batch: what was retired so far becomes free with [`Self::durable`], what is retired later does not.
    pub fn begin_batch(&mut self) -> Batch {
        let batch = Batch(self.next_batch);
        self.next_batch += 1;
        if !self.retired.is_empty() {
            self.batches.push_back((batch, std::mem::take(&mut self.retired)));
        }
        batch
    }

    /// The records that retired the blocks of `batch` and of all batches before it are on stable media.
    pub fn durable(&mut self, batch: Batch) {
        while self.batches.front().is_some_and(|(retired_in, _)| *retired_in <= batch) {
            for (start, count) in self.batches.pop_front().into_iter().flat_map(|(_, runs)| runs) {
                self.retired_blocks -= u64::from(count);
                self.written.insert(start, count);
            }
        }
    }

    /// Takes back blocks that were allocated and that no layer ever named: their write failed. Free at once.
    pub fn undo(&mut self, start: PhysicalBlock, count: u32) {
        self.owned_blocks -= u64::from(count);
        self.written.insert(start.0, count);
    }

    /// The next blocks to fill with zeros, at most 1 MiB, so that small writes need not write into holes; `None` while
    /// enough are ready or the budget is used up. They belong to nobody until [`Self::zeroed`] or [`Self::not_zeroed`].
    pub fn zero_ahead(&mut self) -> Option<(PhysicalBlock, u32)> {
        let ready = self.written.long_blocks() + self.busy_blocks;
        self.zeroing = ready < if self.zeroing { ZEROED_HIGH } else { ZEROED_LOW };
        let run = self.holes.first().filter(|_| self.zeroing)?;
        let count = run.1.min(CHUNK);
        if self.occupied_blocks() + u64::from(count) > self.budget {
            return None;
        }
        self.holes.take(run, run.0, count);
        self.busy_blocks += u64::from(count);
        Some((PhysicalBlock(run.0), count))
    }

    /// The blocks that [`Self::zero_ahead`] gave are written.
    pub fn zeroed(&mut self, start: PhysicalBlock, count: u32) {
        self.busy_blocks -= u64::from(count);
        self.written.insert(start.0, count);
    }

    /// Zeroing them failed: they are holes as before.
    pub fn not_zeroed(&mut self, start: PhysicalBlock, count: u32) {
        self.punched(start, count);
    }

    /// Free blocks, whole MiB, at most `max` blocks, whose space the filesystem should get back: there are more than
    /// recycling needs, or than the budget allows. They belong to nobody until [`Self::punched`].
    pub fn take_punchable(&mut self, max: u32) -> Option<(PhysicalBlock, u32)> {
        let reserve = RECYCLE_MIN.max(self.owned_blocks / 8);
        let spare = self.written.blocks().saturating_sub(reserve);
        // Never below what zeroing ahead would write again, except to keep the budget: that stops zeroing, too.
        let spare = spare.min(self.written.long_blocks().saturating_sub(ZEROED_HIGH));
        let spare = spare.max(self.occupied_blocks().saturating_sub(self.budget));
        let most = u32::try_from(spare).unwrap_or(u32::MAX).min(max) / CHUNK * CHUNK;
        if most == 0 {
            return None;
        }
        let (run, start, count) = self.written.longest_first().take(PUNCH_TRIES).find_map(|run| {
            let start = run.0.next_multiple_of(CHUNK);
            let end = (run.0 + run.1) / CHUNK * CHUNK;
            (start < end).then(|| (run, start, (end - start).min(most)))
        })?;
        self.written.take(run, start, count);
        self.busy_blocks += u64::from(count);
        Some((PhysicalBlock(start), count))
    }

    /// The blocks that [`Self::take_punchable`] gave are holes. Also right if punching failed: that costs space, not data.
    pub fn punched(&mut self, start: PhysicalBlock, count: u32) {
        self.busy_blocks -= u64::from(count);
        self.holes.insert(start.0, count);
    }

    /// How many blocks of disk the tree should occupy at most: what its volumes and snapshots promise. Over it, requests
    /// are split over scattered free blocks rather than taking new ones, and no more is zeroed ahead.
    pub fn set_budget(&mut self, blocks: u64) {
        self.budget = blocks;
    }

    /// Blocks that layers own, or that are allocated to a write in flight.
    pub fn owned_blocks(&self) -> u64 {
        self.owned_blocks
    }

    /// Blocks that wait for their batch to be durable.
    pub fn retired_blocks(&self) -> u64 {
        self.retired_blocks
    }

    /// Free blocks that were written before: they take space on disk.
    pub fn free_written(&self) -> u64 {
        self.written.blocks()
    }

    /// Free blocks below the limit that take no space.
    pub fn free_holes(&self) -> u64 {
        self.holes.blocks()
    }

    /// Blocks that take space on disk, whoever has them.
    pub fn occupied_blocks(&self) -> u64 {
        self.owned_blocks + self.retired_blocks + self.busy_blocks + self.written.blocks()
    }

    fn fits_in_pieces(&self, count: u32) -> bool {
        let pieces = self.written.longest_first().take(MAX_PIECES).map(|(_, length)| u64::from(length)).sum::<u64>();
        count < LONG && pieces >= u64::from(count)
    }

    fn take_written(&mut self, run: (u32, u32), count: u32, out: &mut Vec<(PhysicalBlock, u32)>) {
        // From the front, and the next request right behind it: a sequential writer gets sequential blocks.
        self.written.take(run, run.0, count);
        self.cursor = run.0 + count;
        self.hand_out(run.0, count, out);
    }

    fn take_hole(&mut self, run: (u32, u32), count: u32, out: &mut Vec<(PhysicalBlock, u32)>) {
        self.holes.take(run, run.0, count);
        self.hand_out(run.0, count, out);
    }

    /// Takes the longest runs, written ones before holes. There must be enough.
    fn take_pieces(&mut self, count: u32, out: &mut Vec<(PhysicalBlock, u32)>) {
        let mut rest = count;
        while rest > 0 {
            if let Some(run) = self.written.longest() {
                let take = run.1.min(rest);
                self.take_written(run, take, out);
                rest -= take;
            } else {
                let run = self.holes.shortest(rest).or_else(|| self.holes.longest());
                let run = run.expect("the caller counted enough free blocks");
                let take = run.1.min(rest);
                self.take_hole(run, take, out);
                rest -= take;
            }
        }
    }

    fn hand_out(&mut self, start: u32, count: u32, out: &mut Vec<(PhysicalBlock, u32)>) {
        self.owned_blocks += u64::from(count);
        out.push((PhysicalBlock(start), count));
    }
}
