//! A set of blocks kept as runs, found by place and by length.
//!
//! Invariants: runs never touch each other; `by_length` has exactly the runs of two blocks or more, so that recycling
//! scattered single blocks touches one tree only.

use std::collections::{BTreeMap, BTreeSet};

/// Runs of at least this many blocks (256 KiB) count as contiguous space; requests of this size are large.
pub(super) const LONG: u32 = 64;

/// Runs looked at from the cursor on before the search goes by length.
const NEXT_FIT_TRIES: usize = 4;

#[derive(Clone, Debug, Default)]
pub(super) struct Runs {
    by_start: BTreeMap<u32, u32>,
    by_length: BTreeSet<(u32, u32)>,
    blocks: u64,
    long_blocks: u64,
}

impl Runs {
    /// The set of runs that ascend and do not touch each other: much cheaper than inserting them one by one.
    pub fn from_ascending(runs: Vec<(u32, u32)>) -> Self {
        let sum = |least| runs.iter().filter(|&&(_, count)| count >= least).map(|&(_, count)| u64::from(count)).sum();
        Self {
            blocks: sum(0),
            long_blocks: sum(LONG),
            by_length: runs.iter().filter(|&&(_, count)| count > 1).map(|&(start, count)| (count, start)).collect(),
            by_start: runs.into_iter().collect(),
        }
    }

    /// Blocks of the set.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks in runs of at least [`LONG`].
    pub fn long_blocks(&self) -> u64 {
        self.long_blocks
    }

    pub fn first(&self) -> Option<(u32, u32)> {
        self.by_start.first_key_value().map(|(&start, &count)| (start, count))
    }

    /// Adds blocks; none of them may be in the set.
    pub fn insert(&mut self, start: u32, count: u32) {
        if count == 0 {
            return;
        }
        let (mut from, mut to) = (start, start + count);
        if let Some((&before, &length)) = self.by_start.range(..=start).next_back() {
            assert!(before + length <= start, "block {start} is freed twice");
            if before + length == start {
                self.remove_run(before, length);
                from = before;
            }
        }
        if let Some((&after, &length)) = self.by_start.range(start..).next() {
            assert!(to <= after, "block {after} is freed twice");
            if to == after {
                self.remove_run(after, length);
                to = after + length;
            }
        }
        self.add_run(from, to - from);
    }

    /// Removes `count` blocks from `start`, which lie in the run at `run`.
    pub fn take(&mut self, run: (u32, u32), start: u32, count: u32) {
        let (run_start, length) = run;
        self.remove_run(run_start, length);
        self.add_run(run_start, start - run_start);
        self.add_run(start + count, run_start + length - start - count);
    }

    /// A run of at least `count` blocks, near `cursor` if it is found quickly, else the shortest.
    pub fn near(&self, cursor: u32, count: u32) -> Option<(u32, u32)> {
        let onwards = self.by_start.range(cursor..).chain(&self.by_start).take(NEXT_FIT_TRIES);
        let run = onwards.map(|(&start, &length)| (start, length)).find(|&(_, length)| length >= count);
        run.or_else(|| self.shortest(count))
    }

    /// The shortest run of at least `count` blocks.
    pub fn shortest(&self, count: u32) -> Option<(u32, u32)> {
        if let Some(&(length, start)) = self.by_length.range((count, 0)..).next() {
            return Some((start, length));
        }
        // Only single blocks are left, and `by_length` does not have them.
        self.first().filter(|&(_, length)| length >= count)
    }

    /// The runs of two blocks or more, longest first.
    pub fn longest_first(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.by_length.iter().rev().map(|&(length, start)| (start, length))
    }

    /// A longest run.
    pub fn longest(&self) -> Option<(u32, u32)> {
        self.longest_first().next().or_else(|| self.first())
    }

    fn add_run(&mut self, start: u32, count: u32) {
        if count == 0 {
            return;
        }
        self.by_start.insert(start, count);
        if count > 1 {
            self.by_length.insert((count, start));
        }
        self.blocks += u64::from(count);
        self.long_blocks += if count >= LONG { u64::from(count) } else { 0 };
    }

    fn remove_run(&mut self, start: u32, count: u32) {
        self.by_start.remove(&start);
        if count > 1 {
            self.by_length.remove(&(count, start));
        }
        self.blocks -= u64::from(count);
        self.long_blocks -= if count >= LONG { u64::from(count) } else { 0 };
    }
}
