//! The ranges that a copy lacks: blocks of the layers since it left, and of hot extents.
//!
//! Invariants: ranges ascend, are within the volume and of at most [`MAX_REQUEST_BLOCKS`] blocks, and two that touch are
//! one unless it would be too long; a plan holds the maps as they were when it was made, and finds one range at a time.

use super::super::Store;
use super::super::extents::{limit, resolve};
use super::super::map::{Entry, Map};
use crate::protocol::{DiskError, EXTENT_BLOCKS, Extent, Lacks};
use crate::volume::{BlockRange, MAX_REQUEST_BLOCKS, VolumeId};

/// What belongs to a plan by the layers.
#[derive(Clone, Debug)]
enum Layers {
    /// What any of them has, newest first.
    Some(Vec<Map>),
    /// Every block: nobody knows what the copy lacks.
    Whole,
}

/// A plan: an iterator.
#[derive(Clone, Debug)]
pub struct MirrorPlan {
    layers: Layers,
    /// Ascending; those before `next` are gone.
    hot: std::iter::Peekable<std::vec::IntoIter<Extent>>,
    next: u64,
    end: u64,
}

impl Store {
    /// Makes the plan of what a copy lacks, in place of any other: by the layers, and all blocks of `hot`.
    ///
    /// # Errors
    /// The volume has no record.
    pub fn plan(&mut self, volume: VolumeId, lacks: Option<Lacks>, hot: &[Extent]) -> Result<(), DiskError> {
        let (Some(known), Some(mirror)) = (self.tree.volumes.get(&volume), self.mirrors.volumes.get_mut(&volume))
        else {
            return Err(DiskError::Failed);
        };
        let kept = mirror.kept.as_ref().ok_or(DiskError::Failed)?;
        let mut hot = hot.to_vec();
        let path = || self.tree.path(known.top);
        let layers = match lacks {
            None => Layers::Some(Vec::new()),
            // It may hold what was discarded here since, and a root layer says nothing about that.
            Some(Lacks::Everything) => Layers::Whole,
            Some(Lacks::Since(since)) => {
                let lacking = kept.lacking.iter().find(|lacking| lacking.since == since);
                hot.extend(lacking.iter().flat_map(|lacking| lacking.hot.iter()));
                let base = lacking.and_then(|lacking| lacking.base);
                match path().position(|(layer, _)| Some(layer) == base) {
                    Some(above) => Layers::Some(path().take(above).map(|(_, layer)| layer.map.clone()).collect()),
                    None => Layers::Whole,
                }
            }
        };
        mirror.plan = Some(MirrorPlan::new(layers, hot, known.size.blocks()));
        Ok(())
    }

    /// The next range of the plan; `None` at its end.
    pub fn next_range(&mut self, volume: VolumeId) -> Option<BlockRange> {
        let plan = &mut self.mirrors.volumes.get_mut(&volume)?.plan;
        let range = plan.as_mut()?.next();
        if range.is_none() {
            // Its maps hold memory.
            *plan = None;
        }
        range
    }
}

impl MirrorPlan {
    /// A plan for a volume of `blocks` blocks.
    fn new(layers: Layers, mut hot: Vec<Extent>, blocks: u64) -> Self {
        hot.sort_unstable();
        hot.dedup();
        Self { layers, hot: hot.into_iter().peekable(), next: 0, end: blocks }
    }

    /// Whether the block at `next` belongs to the plan, and for how many, at most `most`, it is the same.
    fn run(&mut self, most: u64) -> (bool, u64) {
        let start = |extent: &Extent| u64::from(extent.0) * EXTENT_BLOCKS;
        while self.hot.next_if(|extent| start(extent) + EXTENT_BLOCKS <= self.next).is_some() {}
        let most = match self.hot.peek().map(start) {
            Some(start) if start <= self.next => return (true, most.min(start + EXTENT_BLOCKS - self.next)),
            Some(start) => most.min(start - self.next),
            None => most,
        };
        match &self.layers {
            Layers::Whole => (true, most),
            Layers::Some(layers) => {
                let (entry, count) = resolve(layers, self.next, limit(most));
                (entry != Entry::Absent, u64::from(count))
            }
        }
    }
}

impl Iterator for MirrorPlan {
    type Item = BlockRange;

    fn next(&mut self) -> Option<BlockRange> {
        let (mut start, mut count) = (self.next, 0);
        while self.next < self.end && count < u64::from(MAX_REQUEST_BLOCKS) {
            let left = self.end - self.next;
            let (lacks, found) =
                self.run(if count > 0 { left.min(u64::from(MAX_REQUEST_BLOCKS) - count) } else { left });
            match (lacks, count) {
                (true, _) => {
                    let found = found.min(u64::from(MAX_REQUEST_BLOCKS) - count);
                    (count, self.next) = (count + found, self.next + found);
                }
                (false, 0) => {
                    self.next += found;
                    start = self.next;
                }
                (false, _) => break,
            }
        }
        BlockRange::new(start, count as u32)
    }
}
