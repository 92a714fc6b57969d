//! What a sealed snapshot has, and what differs between two: read off the layers, without the store.
//!
//! Invariants: a plan is a copy of the maps at one moment, so it can be walked on any thread; sealed layers do not change,
//! and while a [`ReadPlan`] lives the blocks it names keep their content.

use super::map::{Entry, Map};
use super::{Inconsistent, Store};
use crate::volume::SnapshotId;
use std::sync::Arc;

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentsError {
    /// No such snapshot, or its seal is not done.
    #[error("snapshot {0} does not exist")]
    Unknown(SnapshotId),
    /// The base is not an older snapshot of the same volume, or of what it was cloned from.
    #[error("snapshot {base} is not older than {target} in the same line of snapshots")]
    NotAncestor {
        /// The base.
        base: SnapshotId,
        /// The target.
        target: SnapshotId,
    },
    /// The layers contradict each other.
    #[error(transparent)]
    Inconsistent(#[from] Inconsistent),
}

/// A run of blocks that are allocated, or that may differ from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block.
    pub start: u64,
    /// Blocks.
    pub count: u64,
    /// They read as zeros: only in a difference, where the base may have had data.
    pub is_zero: bool,
}

/// The runs of a snapshot in ascending order: an iterator.
#[derive(Clone, Debug)]
pub struct ExtentsPlan {
    /// Newest first.
    layers: Vec<Map>,
    next: u64,
    end: u64,
    with_zeros: bool,
}

/// Where a snapshot's blocks are in the `data` file. Holds the snapshot's blocks while it lives.
#[derive(Clone, Debug)]
pub struct ReadPlan {
    /// Newest first.
    layers: Vec<Map>,
    blocks: u64,
    _pin: Arc<()>,
}

impl Store {
    /// Without a base: the blocks of `target` that are not zeros. With one: those that may differ between the two.
    pub fn extents(&self, target: SnapshotId, base: Option<SnapshotId>) -> Result<ExtentsPlan, ExtentsError> {
        let (layer, blocks) = self.settled(target)?;
        let stop = match base {
            Some(base) => Some(self.settled(base)?.0),
            None => None,
        };
        let path: Vec<_> = self.tree.path(layer).collect();
        let count = match stop {
            Some(stop) => path.iter().position(|(id, _)| *id == stop),
            None => Some(path.len()),
        };
        let count = count.ok_or(ExtentsError::NotAncestor { base: base.unwrap_or(target), target })?;
        let layers = path.iter().take(count).map(|(_, layer)| layer.map.clone()).collect();
        Ok(ExtentsPlan { layers, next: 0, end: blocks, with_zeros: base.is_some() })
    }

    /// For reading a snapshot from its file, aside of the volumes.
    pub fn reader(&self, snapshot: SnapshotId) -> Result<ReadPlan, ExtentsError> {
        let (layer, blocks) = self.settled(snapshot)?;
        let layers = self.tree.path(layer).map(|(_, layer)| layer.map.clone()).collect();
        // The newest layer only: merging its ancestors takes away nothing that is seen from here.
        Ok(ReadPlan { layers, blocks, _pin: self.tree.layer(layer)?.pin.clone() })
    }

    fn settled(&self, id: SnapshotId) -> Result<(super::format::LayerId, u64), ExtentsError> {
        let snapshot = self.tree.snapshots.get(&id).ok_or(ExtentsError::Unknown(id))?;
        let settled = self.tree.layers.get(&snapshot.layer).is_some_and(|layer| layer.settled);
        settled.then_some((snapshot.layer, snapshot.size.blocks())).ok_or(ExtentsError::Unknown(id))
    }
}

impl ExtentsPlan {
    /// Only what is at or after block `start`; a run that spans it is cut.
    pub fn starting_at(mut self, start: u64) -> Self {
        self.next = start;
        self
    }

    fn wanted(&self, entry: Entry) -> Option<bool> {
        match entry {
            Entry::Data(_) => Some(false),
            Entry::Zero => self.with_zeros.then_some(true),
            Entry::Absent => None,
        }
    }
}

impl Iterator for ExtentsPlan {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let mut found: Option<Run> = None;
        while self.next < self.end {
            let (entry, count) = resolve(&self.layers, self.next, limit(self.end - self.next));
            match (&mut found, self.wanted(entry)) {
                (None, None) => {}
                (None, Some(is_zero)) => found = Some(Run { start: self.next, count: u64::from(count), is_zero }),
                (Some(run), Some(is_zero)) if run.is_zero == is_zero => run.count += u64::from(count),
                (Some(_), _) => break,
            }
            self.next += u64::from(count);
        }
        found
    }
}

impl ReadPlan {
    /// Blocks of the snapshot.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What is at `block`, and for how many blocks, at most `limit`, that goes on. Absent and zero both read as zeros.
    pub fn run(&self, block: u64, limit: u32) -> (Entry, u32) {
        resolve(&self.layers, block, limit)
    }
}

pub(super) fn limit(blocks: u64) -> u32 {
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

/// The first entry that is not absent, newest layer first.
pub(super) fn resolve(layers: &[Map], block: u64, mut limit: u32) -> (Entry, u32) {
    for map in layers {
        let (entry, count) = map.run(block, limit);
        limit = count;
        if entry != Entry::Absent {
            return (entry, count);
        }
    }
    (Entry::Absent, limit)
}
