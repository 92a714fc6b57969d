//! What is copied at once: some blocks of a range, which is held as a whole meanwhile.
//!
//! Invariants: a piece has at least one block, and none outside its range; its range is no longer than a request's, so that
//! its data go in one frame.

use crate::volume::{BLOCK_SIZE, BlockRange, MAX_REQUEST_BLOCKS};

/// Most blocks that are compared at once: the thread that makes their digests serves all volumes of a node, and 256 KiB
/// keep it for some 150 us.
pub const COMPARED_BLOCKS: u32 = 64;

const WORDS: usize = MAX_REQUEST_BLOCKS as usize / 64;

/// Some of the blocks of a range, counted from its first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockSet([u64; WORDS]);

impl BlockSet {
    /// Bytes of it in a frame.
    pub const BYTES: usize = 8 * WORDS;

    /// The first `count`, at most all that a range may have.
    pub fn first(count: u32) -> Self {
        let mut set = Self::default();
        set.insert(0, count);
        set
    }

    /// Adds `count` blocks from `start` on; there are none beyond [`MAX_REQUEST_BLOCKS`].
    pub fn insert(&mut self, start: u32, count: u32) {
        for block in start..start.saturating_add(count).min(MAX_REQUEST_BLOCKS) {
            self.0[block as usize / 64] |= 1 << (block % 64);
        }
    }

    /// Whether the block is in it.
    pub fn contains(self, block: u32) -> bool {
        self.0.get(block as usize / 64).is_some_and(|word| word & (1 << (block % 64)) != 0)
    }

    /// How many.
    pub fn count(self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Those of both.
    pub fn with(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    /// Those in both.
    pub fn within(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    /// In ascending order.
    pub fn blocks(self) -> impl Iterator<Item = u32> {
        (0..MAX_REQUEST_BLOCKS).filter(move |block| self.contains(*block))
    }

    /// Neighbours together: the first of each run, and how many.
    pub fn runs(self) -> impl Iterator<Item = (u32, u32)> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..MAX_REQUEST_BLOCKS).find(|block| self.contains(*block))?;
            let end = (start..MAX_REQUEST_BLOCKS).find(|block| !self.contains(*block)).unwrap_or(MAX_REQUEST_BLOCKS);
            next = end;
            Some((start, end - start))
        })
    }

    /// As it travels.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes.chunks_mut(8).zip(self.0).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// From anybody's bytes: each is a set.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self(std::array::from_fn(|word| u64::from_le_bytes(words[word])))
    }
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    range: BlockRange,
    blocks: BlockSet,
}

impl Piece {
    /// Those of the blocks that are in the range; `None` if there are none, or the range is too long.
    pub fn new(range: BlockRange, blocks: BlockSet) -> Option<Self> {
        let blocks = blocks.within(BlockSet::first(range.count()));
        (range.count() <= MAX_REQUEST_BLOCKS && !blocks.is_empty()).then_some(Self { range, blocks })
    }

    /// All blocks of a range that is not too long.
    pub fn whole(range: BlockRange) -> Option<Self> {
        Self::new(range, BlockSet::first(range.count()))
    }

    /// What is held.
    pub fn range(self) -> BlockRange {
        self.range
    }

    /// What is copied.
    pub fn blocks(self) -> BlockSet {
        self.blocks
    }

    /// How many blocks are copied.
    pub fn count(self) -> u32 {
        self.blocks.count()
    }

    /// Bytes that are copied.
    pub fn bytes(self) -> u64 {
        u64::from(self.count()) * BLOCK_SIZE
    }

    /// What is copied, in ascending order, neighbours together.
    pub fn runs(self) -> impl Iterator<Item = BlockRange> {
        let start = self.range.start();
        self.blocks.runs().filter_map(move |(first, count)| BlockRange::new(start + u64::from(first), count))
    }

    /// The part of it below `end`.
    pub fn below(self, end: u64) -> Option<Self> {
        let count = end.saturating_sub(self.range.start()).min(u64::from(self.range.count())) as u32;
        Self::new(BlockRange::new(self.range.start(), count)?, self.blocks)
    }
}

/// What a plan finds next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Missing {
    /// The copies differ there, as far as anybody knows.
    Known(Piece),
    /// They may differ there, and most blocks are equal: they are compared first. At most [`COMPARED_BLOCKS`].
    Suspected(BlockRange),
}

impl Missing {
    /// What is held.
    pub fn range(self) -> BlockRange {
        match self {
            Self::Known(piece) => piece.range,
            Self::Suspected(range) => range,
        }
    }

    /// The part of it below `end`.
    pub fn below(self, end: u64) -> Option<Self> {
        match self {
            Self::Known(piece) => piece.below(end).map(Self::Known),
            Self::Suspected(range) => {
                let count = end.saturating_sub(range.start()).min(u64::from(range.count())) as u32;
                BlockRange::new(range.start(), count).map(Self::Suspected)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_blocks_with_neighbours_together() {
        let mut blocks = BlockSet::default();
        for (start, count) in [(0, 1), (62, 4), (255, 9)] {
            blocks.insert(start, count);
        }
        assert_eq!(blocks.runs().collect::<Vec<_>>(), [(0, 1), (62, 4), (255, 1)]);
        assert_eq!(blocks.blocks().collect::<Vec<_>>(), [0, 62, 63, 64, 65, 255]);
        assert_eq!((blocks.count(), BlockSet::from_bytes(blocks.to_bytes())), (6, blocks));
        assert_eq!(BlockSet::first(256).runs().collect::<Vec<_>>(), [(0, 256)]);
        assert!(BlockSet::default().is_empty() && !blocks.contains(1) && !blocks.contains(1000));
    }

    #[test]
    fn a_piece_has_no_block_outside_its_range() {
        let range = |start, count| BlockRange::new(start, count).expect("not empty");
        let piece = Piece::new(range(1000, 10), BlockSet::first(64)).expect("ten blocks");
        assert_eq!((piece.count(), piece.runs().collect::<Vec<_>>()), (10, vec![range(1000, 10)]));
        assert_eq!(piece.below(1004).map(|piece| (piece.range(), piece.count())), Some((range(1000, 4), 4)));
        assert_eq!(piece.below(1000), None);
        let mut last = BlockSet::default();
        last.insert(9, 1);
        assert_eq!(Piece::new(range(0, 9), last), None);
        assert_eq!(Piece::whole(range(0, MAX_REQUEST_BLOCKS + 1)), None);
    }
}
