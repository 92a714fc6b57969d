//! Where each logical block of a layer is: a persistent map from block numbers to physical blocks or explicit zeros.
//!
//! Invariants: a clone shares everything and never sees later changes of the other (copy on write, 2 MiB of blocks at a
//! time); reading allocates nothing; the counters always equal what walking the map would count.
//! ```text
//!   Map ── leaf (1 GiB) ── chunk (2 MiB): empty | one run | few runs, sorted | a value per block
//! ```
//! Costs: 8 KiB per GiB that is not empty, then 8 bytes per run or 4 per block; a lookup follows at most four pointers.

mod chunk;
#[cfg(test)]
mod tests;

use crate::volume::{BLOCK_SIZE, MAX_VOLUME_BYTES};
use chunk::{ABSENT, CHUNK_BLOCKS, Chunk, FIRST_DATA, Piece, ZERO, advance};
use std::sync::Arc;

/// Block numbers of a layer are below this.
pub const MAX_LOGICAL_BLOCKS: u64 = MAX_VOLUME_BYTES / BLOCK_SIZE;

/// Physical block numbers are below this: two values of 32 bits mean absent and zero, and the last one is of no block, so
/// that the value after the last block is none of the two.
pub const MAX_PHYSICAL_BLOCKS: u32 = u32::MAX - 2;

const LEAF_CHUNKS: usize = 512;
const LEAF_BLOCKS: u64 = LEAF_CHUNKS as u64 * CHUNK_BLOCKS as u64;

/// Number of a block in the `data` file; below [`MAX_PHYSICAL_BLOCKS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PhysicalBlock(pub u32);

/// What a layer says about a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Nothing: the parent layer decides, or zeros if there is none.
    Absent,
    /// Zeros, whatever the parent says.
    Zero,
    /// The data is there.
    Data(PhysicalBlock),
}

impl Entry {
    /// The entry of the block `by` blocks further in the same extent.
    pub fn advanced(self, by: u32) -> Self {
        match self {
            Self::Data(physical) => Self::Data(PhysicalBlock(physical.0 + by)),
            Self::Absent | Self::Zero => self,
        }
    }

    pub(super) fn from_value(value: u32) -> Self {
        match value {
            ABSENT => Self::Absent,
            ZERO => Self::Zero,
            data => Self::Data(PhysicalBlock(data - FIRST_DATA)),
        }
    }

    pub(super) fn value(self) -> u32 {
        match self {
            Self::Absent => ABSENT,
            Self::Zero => ZERO,
            Self::Data(physical) => physical.0 + FIRST_DATA,
        }
    }
}

/// A run of blocks with one entry; physical blocks count up along it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First logical block.
    pub start: u64,
    /// Blocks.
    pub count: u32,
    /// Entry of the first block.
    pub entry: Entry,
}

impl Extent {
    /// The logical block after the last one.
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.count)
    }

    /// Whether the map can hold it: not empty, and within [`MAX_LOGICAL_BLOCKS`] and [`MAX_PHYSICAL_BLOCKS`].
    pub fn is_valid(&self) -> bool {
        let physical = match self.entry {
            Entry::Data(physical) => physical.0.checked_add(self.count).is_some_and(|end| end <= MAX_PHYSICAL_BLOCKS),
            Entry::Absent | Entry::Zero => true,
        };
        let logical = self.start.checked_add(u64::from(self.count)).is_some_and(|end| end <= MAX_LOGICAL_BLOCKS);
        self.count > 0 && logical && physical
    }

    /// Whether `next` could be the rest of the same extent.
    fn is_continued_by(&self, next: &Self) -> bool {
        let continues = match (self.entry, next.entry) {
            (Entry::Data(one), Entry::Data(two)) => one.0 + self.count == two.0,
            (one, two) => one == two,
        };
        self.end() == next.start && continues
    }
}

/// The map of one layer.
#[derive(Clone, Debug, Default)]
pub struct Map {
    leaves: Vec<Option<Arc<Leaf>>>,
    data_blocks: u64,
    zero_blocks: u64,
    pieces: u64,
}

#[derive(Clone, Debug)]
struct Leaf {
    chunks: [Chunk; LEAF_CHUNKS],
    /// Chunks that are not empty.
    used: u32,
}

impl Map {
    /// A map in which every block is absent.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the layer says about `block`; absent past the end.
    pub fn get(&self, block: u64) -> Entry {
        Entry::from_value(self.run_in_chunk(block).0)
    }

    /// The entry of `block` and how many blocks from there, at most `limit`, belong to the same extent. `limit` is not 0.
    pub fn run(&self, block: u64, limit: u32) -> (Entry, u32) {
        let (value, mut count) = self.run_in_chunk(block);
        while count < limit {
            let next = block + u64::from(count);
            if next >= MAX_LOGICAL_BLOCKS {
                break;
            }
            let (next_value, more) = self.run_in_chunk(next);
            if next_value != advance(value, count) {
                break;
            }
            count += more;
        }
        (Entry::from_value(value), count.min(limit))
    }

    /// Sets `count` blocks from `start` to `entry` (absent clears them; physical blocks count up) and reports every extent
    /// that was there before, in ascending order, also where it equals the new one.
    ///
    /// # Panics
    /// If the blocks are out of range; see [`Extent::is_valid`] for what comes from disk.
    pub fn replace(&mut self, start: u64, count: u32, entry: Entry, removed: &mut dyn FnMut(Extent)) {
        if count == 0 {
            return;
        }
        assert!(Extent { start, count, entry }.is_valid(), "{count} blocks at {start} as {entry:?} fit no map");
        match entry {
            Entry::Absent => {}
            Entry::Zero => self.zero_blocks += u64::from(count),
            Entry::Data(_) => self.data_blocks += u64::from(count),
        }
        let mut pieces = Joined { current: None, report: removed };
        let (mut zero_blocks, mut data_blocks) = (0, 0);
        let mut done = 0;
        while done < count {
            let block = start + u64::from(done);
            let offset = (block % u64::from(CHUNK_BLOCKS)) as u16;
            let here = u32::from(CHUNK_BLOCKS - offset).min(count - done) as u16;
            let piece = Piece { start: offset, count: here, value: advance(entry.value(), done) };
            let chunk_start = block - u64::from(offset);
            self.replace_in_chunk(block, piece, &mut |old| {
                if old.value == ZERO {
                    zero_blocks += u64::from(old.count);
                } else {
                    data_blocks += u64::from(old.count);
                }
                pieces.push(Extent {
                    start: chunk_start + u64::from(old.start),
                    count: u32::from(old.count),
                    entry: Entry::from_value(old.value),
                });
            });
            done += u32::from(here);
        }
        pieces.finish();
        self.zero_blocks -= zero_blocks;
        self.data_blocks -= data_blocks;
    }

    /// Every extent, ascending, never absent, as long as possible.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents_from(0)
    }

    /// The extents from block `start` on; one that spans it is cut there.
    pub fn extents_from(&self, start: u64) -> impl Iterator<Item = Extent> + '_ {
        let end = self.leaves.len() as u64 * LEAF_BLOCKS;
        let mut next = start;
        std::iter::from_fn(move || {
            while next < end {
                let (entry, count) = self.run(next, u32::MAX);
                let start = next;
                next += u64::from(count);
                if entry != Entry::Absent {
                    return Some(Extent { start, count, entry });
                }
            }
            None
        })
    }

    /// Blocks with data.
    pub fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// Blocks that are explicit zeros.
    pub fn zero_blocks(&self) -> u64 {
        self.zero_blocks
    }

    /// Extents, where one that spans chunks counts in each of them: at least as many as there are.
    pub fn pieces(&self) -> u64 {
        self.pieces
    }

    /// Whether every block is absent.
    pub fn is_empty(&self) -> bool {
        self.data_blocks == 0 && self.zero_blocks == 0
    }

    /// The value of `block` and how many blocks continue it in its chunk; where there is no leaf, in its leaf.
    fn run_in_chunk(&self, block: u64) -> (u32, u32) {
        let offset = block % LEAF_BLOCKS;
        match self.leaves.get((block / LEAF_BLOCKS) as usize) {
            Some(Some(leaf)) => {
                let chunk = &leaf.chunks[(offset / u64::from(CHUNK_BLOCKS)) as usize];
                let (value, count) = chunk.run((offset % u64::from(CHUNK_BLOCKS)) as u16);
                (value, u32::from(count))
            }
            Some(None) => (ABSENT, (LEAF_BLOCKS - offset) as u32),
            None => (ABSENT, MAX_LOGICAL_BLOCKS.saturating_sub(block).max(1) as u32),
        }
    }

    fn replace_in_chunk(&mut self, block: u64, piece: Piece, removed: &mut dyn FnMut(Piece)) {
        let index = (block / LEAF_BLOCKS) as usize;
        let chunk_index = (block % LEAF_BLOCKS / u64::from(CHUNK_BLOCKS)) as usize;
        if piece.value == ABSENT {
            // Nothing to clear must not copy a shared leaf.
            let chunk = self.leaves.get(index).and_then(Option::as_ref).map(|leaf| &leaf.chunks[chunk_index]);
            if chunk.is_none_or(Chunk::is_empty) {
                return;
            }
        }
        if self.leaves.len() <= index {
            self.leaves.resize(index + 1, None);
        }
        let leaf = self.leaves[index]
            .get_or_insert_with(|| Arc::new(Leaf { chunks: [const { Chunk::Empty }; LEAF_CHUNKS], used: 0 }));
        let leaf = Arc::make_mut(leaf);
        let chunk = &mut leaf.chunks[chunk_index];
        let (was_empty, pieces) = (chunk.is_empty(), chunk.pieces());
        chunk.replace(piece, removed);
        self.pieces = self.pieces + chunk.pieces() - pieces;
        match (was_empty, chunk.is_empty()) {
            (true, false) => leaf.used += 1,
            (false, true) => leaf.used -= 1,
            (true, true) | (false, false) => {}
        }
        if leaf.used == 0 {
            self.leaves[index] = None;
        }
    }
}

/// Joins the pieces of neighbouring chunks into extents.
struct Joined<'a> {
    current: Option<Extent>,
    report: &'a mut dyn FnMut(Extent),
}

impl Joined<'_> {
    fn push(&mut self, extent: Extent) {
        match &mut self.current {
            Some(current) if current.is_continued_by(&extent) => current.count += extent.count,
            current => {
                if let Some(done) = current.replace(extent) {
                    (self.report)(done);
                }
            }
        }
    }

    fn finish(self) {
        if let Some(done) = self.current {
            (self.report)(done);
        }
    }
}
