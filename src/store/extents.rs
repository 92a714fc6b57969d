//! What a sealed snapshot has, and what differs between two: read off the layers, without the store.
//!
//! ```text
//!   base below the target        what the layers between them have
//!   in different branches        what the layers above their common ancestor have, in both branches
//!   in different trees           what any of their layers has
//! ```
//! Invariants: what differs is always in a plan, which may name more; a plan is a copy of the maps at one moment, so it can be
//! walked on any thread; sealed layers do not change, and while a [`ReadPlan`] lives the blocks it names keep their content.

use super::format::LayerId;
use super::map::{Entry, Map};
#[cfg(test)]
use super::planted::Planted;
use super::tree::Layer;
use super::{Inconsistent, Store};
use crate::volume::{InstanceId, SnapshotId};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Blocks that are looked at before whoever counts is asked whether it shall go on: below a second, however scattered they are.
const COUNTED_AT_ONCE: u64 = if cfg!(test) { 16 } else { 1 << 12 };

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentsError {
    /// No such snapshot, or its seal is not done.
    #[error("snapshot {0} does not exist")]
    Unknown(SnapshotId),
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
    /// They are known to read as zeros: only in a difference, where the base may have had data.
    pub is_zero: bool,
}

/// The runs of a snapshot in ascending order: an iterator.
#[derive(Clone, Debug)]
pub struct ExtentsPlan {
    /// Newest first.
    layers: Vec<Map>,
    /// What only the base has above the common ancestor, newest first.
    beside: Vec<Map>,
    next: u64,
    end: u64,
    with_zeros: bool,
    line: Line,
}

/// How two snapshots are to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// The base is below the target, or it is the target, or there is none.
    BaseBelow,
    BaseAbove,
    Branches,
}

/// The layers that a snapshot is seen through, for a comparison with one of another tree.
#[derive(Clone, Debug)]
pub struct LayerMaps {
    /// Newest first.
    layers: Vec<Map>,
    blocks: u64,
}

/// Where a snapshot's blocks are in the `data` file. Holds the snapshot's blocks while it lives.
#[derive(Clone, Debug)]
pub struct ReadPlan {
    /// Newest first.
    layers: Vec<Map>,
    /// Of each layer whether its blocks have checksums.
    checksummed: Vec<bool>,
    blocks: u64,
    instance: InstanceId,
    _pin: Arc<()>,
}

impl Store {
    /// Without a base: the blocks of `target` that are not zeros. With one: those that may differ between the two.
    pub fn extents(&self, target: SnapshotId, base: Option<SnapshotId>) -> Result<ExtentsPlan, ExtentsError> {
        let (layer, end) = self.settled(target)?;
        let path: Vec<_> = self.tree.path(layer).collect();
        let Some(base) = base else {
            return Ok(ExtentsPlan { end, ..ExtentsPlan::new(maps(&path), Vec::new(), Line::BaseBelow, false) });
        };
        let other: Vec<_> = self.tree.path(self.settled(base)?.0).collect();
        let (here, there) = (&path[..not_in(&path, &other)], &other[..not_in(&other, &path)]);
        let line = match (here.is_empty(), there.is_empty()) {
            (_, true) => Line::BaseBelow,
            (true, false) => Line::BaseAbove,
            (false, false) => Line::Branches,
        };
        #[cfg(test)]
        let there = if self.planted == Some(Planted::DifferenceOfOneBranch) { &[][..] } else { there };
        Ok(ExtentsPlan { end, ..ExtentsPlan::new(maps(here), maps(there), line, true) })
    }

    /// For [`ExtentsPlan::apart`].
    pub fn layer_maps(&self, snapshot: SnapshotId) -> Result<LayerMaps, ExtentsError> {
        let (layer, blocks) = self.settled(snapshot)?;
        Ok(LayerMaps { layers: self.tree.path(layer).map(|(_, layer)| layer.map.clone()).collect(), blocks })
    }

    /// For reading a snapshot from its file, aside of the volumes.
    pub fn reader(&self, snapshot: SnapshotId) -> Result<ReadPlan, ExtentsError> {
        let (layer, blocks) = self.settled(snapshot)?;
        let path = self.tree.path(layer).map(|(_, layer)| (layer.map.clone(), layer.checksummed));
        let (layers, checksummed) = path.unzip();
        let instance = self.instance();
        // The newest layer only: merging its ancestors takes away nothing that is seen from here.
        Ok(ReadPlan { layers, checksummed, blocks, instance, _pin: self.tree.layer(layer)?.pin.clone() })
    }

    fn settled(&self, id: SnapshotId) -> Result<(LayerId, u64), ExtentsError> {
        let snapshot = self.tree.snapshots.get(&id).ok_or(ExtentsError::Unknown(id))?;
        let settled = self.tree.layers.get(&snapshot.layer).is_some_and(|layer| layer.settled);
        settled.then_some((snapshot.layer, snapshot.size.blocks())).ok_or(ExtentsError::Unknown(id))
    }
}

impl ExtentsPlan {
    fn new(layers: Vec<Map>, beside: Vec<Map>, line: Line, with_zeros: bool) -> Self {
        Self { layers, beside, next: 0, end: 0, with_zeros, line }
    }

    /// Where the two are in different trees, which know nothing of each other.
    pub fn apart(target: LayerMaps, base: LayerMaps) -> Self {
        Self { end: target.blocks, ..Self::new(target.layers, base.layers, Line::Branches, true) }
    }

    /// Whether nothing is in it but what the layers between the two have.
    pub fn in_one_line(&self) -> bool {
        self.line == Line::BaseBelow
    }

    /// Whether the base is known to be the newer one.
    pub fn is_backwards(&self) -> bool {
        self.line == Line::BaseAbove
    }

    /// No fewer blocks of data than the target has in its runs: known without a walk, however large the maps are.
    pub fn most_data_blocks(&self) -> u64 {
        let here = self.layers.iter().map(Map::data_blocks);
        // Be it zeros: the target may have data there.
        let beside = self.beside.iter().map(|map| map.data_blocks() + map.zero_blocks());
        here.chain(beside).sum::<u64>().min(self.end)
    }

    /// Blocks of data that the target, whose blocks these are, has in its runs before block `end`. `None`: `goes_on`, which is
    /// asked now and then, said no.
    pub fn data_blocks(mut self, target: &ReadPlan, end: u64, mut goes_on: impl FnMut() -> bool) -> Option<u64> {
        let (end, mut blocks) = (self.end.min(target.blocks).min(end), 0);
        self.end = self.next;
        while self.end < end {
            self.end = (self.end + COUNTED_AT_ONCE).min(end);
            for Run { mut start, mut count, .. } in self.by_ref() {
                while count > 0 {
                    let (entry, here) = target.run(start, limit(count));
                    blocks += if matches!(entry, Entry::Data(_)) { u64::from(here) } else { 0 };
                    (start, count) = (start + u64::from(here), count - u64::from(here));
                }
            }
            if !goes_on() {
                return None;
            }
        }
        Some(blocks)
    }

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
            let (beside, count) = resolve(&self.beside, self.next, count);
            let only_beside = (beside != Entry::Absent).then_some(false);
            match (&mut found, self.wanted(entry).or(only_beside)) {
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

    /// The same, and whether all of these blocks have checksums.
    pub fn checked_run(&self, block: u64, mut limit: u32) -> (Entry, u32, bool) {
        for (map, checksummed) in self.layers.iter().zip(&self.checksummed) {
            let (entry, count) = map.run(block, limit);
            limit = count;
            if entry != Entry::Absent {
                return (entry, count, *checksummed);
            }
        }
        (Entry::Absent, limit, false)
    }

    /// No fewer blocks of data than the snapshot has.
    pub fn most_data_blocks(&self) -> u64 {
        self.layers.iter().map(Map::data_blocks).sum::<u64>().min(self.blocks)
    }

    /// The tree that it is in.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }
}

fn maps(path: &[(LayerId, &Layer)]) -> Vec<Map> {
    path.iter().map(|(_, layer)| layer.map.clone()).collect()
}

/// How many layers are above the first one that the other path has, too.
fn not_in(path: &[(LayerId, &Layer)], other: &[(LayerId, &Layer)]) -> usize {
    let there: BTreeSet<_> = other.iter().map(|(id, _)| *id).collect();
    path.iter().position(|(id, _)| there.contains(id)).unwrap_or(path.len())
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
