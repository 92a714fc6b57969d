//! What a copy lacks: the blocks of the layers since it left, which are known to differ, and those of hot extents or of the
//! whole volume, which may.
//!
//! Invariants: what is found ascends, never overlaps and is within the volume; blocks that are known and close to each other are
//! one piece, since what is between them costs nothing and another piece a message; a plan holds the maps as they were when it was
//! made, and finds one thing at a time.

use super::super::Store;
use super::super::extents::{limit, resolve};
use super::super::map::{Entry, Map};
use crate::protocol::{BlockSet, COMPARED_BLOCKS, DiskError, EXTENT_BLOCKS, Extent, Lacks, Missing, Piece, Suspects};
use crate::volume::{BlockRange, MAX_REQUEST_BLOCKS, VolumeId};

/// Most runs of one piece: each is an operation here and on the other disk, and several pieces are under way.
const MAX_RUNS: usize = 32;

/// What the plan says of a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Equal,
    Known,
    Suspected,
}

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
    /// Makes the plan of what a copy lacks, in place of any other: by the layers, and all blocks of the suspected extents.
    ///
    /// # Errors
    /// The volume has no record, or the disk has failed: what is read now may be older than what was acknowledged.
    pub fn plan(&mut self, volume: VolumeId, lacks: Option<Lacks>, suspects: &Suspects) -> Result<(), DiskError> {
        if self.failure().is_some() {
            return Err(DiskError::Failed);
        }
        let (Some(known), Some(mirror)) = (self.tree.volumes.get(&volume), self.mirrors.volumes.get_mut(&volume))
        else {
            return Err(DiskError::Failed);
        };
        let kept = mirror.kept.as_ref().ok_or(DiskError::Failed)?;
        let (mut hot, left) = match suspects {
            Suspects::Marked(hot) => (hot.to_vec(), true),
            Suspects::Unanswered(extents) => (extents.to_vec(), false),
        };
        let path = || self.tree.path(known.top);
        let layers = match lacks {
            None => Layers::Some(Vec::new()),
            // It may hold what was discarded here since, and a root layer says nothing about that.
            Some(Lacks::Everything) => Layers::Whole,
            Some(Lacks::Since(since)) => {
                let lacking = kept.lacking.iter().find(|lacking| lacking.since == since);
                hot.extend(lacking.iter().filter(|_| left).flat_map(|lacking| lacking.hot.iter()));
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

    /// What the plan has next; `None` at its end.
    ///
    /// # Errors
    /// The disk has failed since the plan was made.
    pub fn next_missing(&mut self, volume: VolumeId) -> Result<Option<Missing>, DiskError> {
        let failed = self.failure().is_some();
        let Some(mirror) = self.mirrors.volumes.get_mut(&volume) else { return Ok(None) };
        let missing = mirror.plan.as_mut().filter(|_| !failed).and_then(Iterator::next);
        if missing.is_none() {
            // Its maps hold memory.
            mirror.plan = None;
        }
        if failed { Err(DiskError::Failed) } else { Ok(missing) }
    }
}

impl MirrorPlan {
    /// A plan for a volume of `blocks` blocks.
    fn new(layers: Layers, mut hot: Vec<Extent>, blocks: u64) -> Self {
        hot.sort_unstable();
        hot.dedup();
        Self { layers, hot: hot.into_iter().peekable(), next: 0, end: blocks }
    }

    /// What the plan says of the block at `next`, and for how many, at most `most`, it is the same.
    fn run(&mut self, most: u64) -> (Kind, u64) {
        let start = |extent: &Extent| u64::from(extent.0) * EXTENT_BLOCKS;
        while self.hot.next_if(|extent| start(extent) + EXTENT_BLOCKS <= self.next).is_some() {}
        let most = match self.hot.peek().map(start) {
            Some(start) if start <= self.next => {
                return (Kind::Suspected, most.min(start + EXTENT_BLOCKS - self.next));
            }
            Some(start) => most.min(start - self.next),
            None => most,
        };
        match &self.layers {
            Layers::Whole => (Kind::Suspected, most),
            Layers::Some(layers) => {
                let (entry, count) = resolve(layers, self.next, limit(most));
                (if entry == Entry::Absent { Kind::Equal } else { Kind::Known }, u64::from(count))
            }
        }
    }

    /// What is known from `next` on, as much as one piece may have.
    fn piece(&mut self) -> Option<Piece> {
        let (start, mut end, mut runs) = (self.next, self.next, 0);
        let last = self.end.min(start + u64::from(MAX_REQUEST_BLOCKS));
        let mut blocks = BlockSet::default();
        while self.next < last {
            let (kind, count) = self.run(last - self.next);
            match kind {
                Kind::Equal => {}
                Kind::Known if self.next > end && runs == MAX_RUNS => break,
                Kind::Known => {
                    runs += usize::from(self.next > end || runs == 0);
                    blocks.insert((self.next - start) as u32, count as u32);
                    end = self.next + count;
                }
                Kind::Suspected => break,
            }
            self.next += count;
        }
        Piece::new(BlockRange::new(start, (end - start) as u32)?, blocks)
    }
}

impl Iterator for MirrorPlan {
    type Item = Missing;

    fn next(&mut self) -> Option<Missing> {
        while self.next < self.end {
            let (kind, count) = self.run(self.end - self.next);
            match kind {
                Kind::Equal => self.next += count,
                Kind::Known => return self.piece().map(Missing::Known),
                Kind::Suspected => {
                    let range = BlockRange::new(self.next, count.min(u64::from(COMPARED_BLOCKS)) as u32)?;
                    self.next = range.end();
                    return Some(Missing::Suspected(range));
                }
            }
        }
        None
    }
}
