//! The entries of 512 consecutive blocks (2 MiB), in whichever form is small.
//!
//! Invariants: pieces are sorted, do not overlap, are not absent and are merged where one continues another; `Sparse` has
//! 2 to [`SPARSE_MAX`] of them; a table has at least [`TABLE_MIN`].

use std::sync::Arc;

/// Blocks of a chunk.
pub(super) const CHUNK_BLOCKS: u16 = 512;

/// More pieces than this are kept as a table: a piece is 8 bytes and a table 2 KiB, but a table is found without a search.
const SPARSE_MAX: usize = 64;

/// A table with fewer pieces than this becomes sparse again; half of [`SPARSE_MAX`], so that it does not flip to and fro.
const TABLE_MIN: u16 = 32;

/// The value of a block that is absent.
pub(super) const ABSENT: u32 = 0;

/// The value of an explicit zero. Physical block `n` has the value `n + FIRST_DATA`.
pub(super) const ZERO: u32 = 1;

/// The value of physical block 0.
pub(super) const FIRST_DATA: u32 = 2;

/// The value of the block `by` blocks after one with this value, in the same run.
pub(super) fn advance(value: u32, by: u32) -> u32 {
    if value < FIRST_DATA { value } else { value.wrapping_add(by) }
}

/// A run inside a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// First block, counted from the start of the chunk.
    pub start: u16,
    /// Blocks.
    pub count: u16,
    /// Value of the first block.
    pub value: u32,
}

impl Piece {
    /// The block after the last one.
    pub fn end(self) -> u16 {
        self.start + self.count
    }

    /// The part inside `from..to`, which must overlap it.
    fn clip(self, from: u16, to: u16) -> Self {
        let start = self.start.max(from);
        let count = self.end().min(to) - start;
        Self { start, count, value: advance(self.value, u32::from(start - self.start)) }
    }

    fn is_continued_by(self, next: Self) -> bool {
        self.end() == next.start && advance(self.value, u32::from(self.count)) == next.value
    }
}

/// The entries of one chunk.
#[derive(Clone, Debug)]
pub(super) enum Chunk {
    /// Every block is absent.
    Empty,
    /// One run, kept inline.
    One(Piece),
    /// A few runs.
    Sparse(Arc<Vec<Piece>>),
    /// A value per block.
    Table(Arc<Table>),
}

impl Chunk {
    /// Whether every block is absent.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// How many runs there are.
    pub fn pieces(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::One(_) => 1,
            Self::Sparse(pieces) => pieces.len() as u64,
            Self::Table(table) => u64::from(table.pieces),
        }
    }

    /// The value of block `at` and how many blocks continue it, within the chunk.
    pub fn run(&self, at: u16) -> (u32, u16) {
        let pieces = match self {
            Self::Table(table) => return table.run(at, CHUNK_BLOCKS),
            Self::Empty => return (ABSENT, CHUNK_BLOCKS - at),
            Self::One(piece) => std::slice::from_ref(piece),
            Self::Sparse(pieces) => pieces.as_slice(),
        };
        match pieces.get(pieces.partition_point(|piece| piece.end() <= at)) {
            None => (ABSENT, CHUNK_BLOCKS - at),
            Some(piece) if piece.start > at => (ABSENT, piece.start - at),
            Some(piece) => (advance(piece.value, u32::from(at - piece.start)), piece.end() - at),
        }
    }

    /// Sets the blocks of `piece` (whose value may be [`ABSENT`]) and reports what was there before, in order.
    pub fn replace(&mut self, piece: Piece, removed: &mut dyn FnMut(Piece)) {
        if piece.count == CHUNK_BLOCKS {
            self.for_each(removed);
            *self = if piece.value == ABSENT { Self::Empty } else { Self::One(piece) };
            return;
        }
        let pieces = match self {
            Self::Table(table) => {
                let table = Arc::make_mut(table);
                table.replace(piece, removed);
                if table.pieces < TABLE_MIN {
                    *self = Self::from_pieces(self.to_vec());
                }
                return;
            }
            Self::Empty => &[],
            Self::One(piece) => std::slice::from_ref(piece),
            Self::Sparse(pieces) => pieces.as_slice(),
        };
        let patch = Patch::new(pieces, piece, removed);
        if !patch.changes {
            return;
        }
        let mut pieces = match self {
            Self::Sparse(pieces) => std::mem::take(Arc::make_mut(pieces)),
            Self::Empty | Self::One(_) | Self::Table(_) => self.to_vec(),
        };
        patch.apply(&mut pieces);
        match self {
            Self::Sparse(kept) if (2..=SPARSE_MAX).contains(&pieces.len()) => *Arc::make_mut(kept) = pieces,
            form => *form = Self::from_pieces(pieces),
        }
    }

    fn to_vec(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        self.for_each(&mut |piece| pieces.push(piece));
        pieces
    }

    fn for_each(&self, visit: &mut dyn FnMut(Piece)) {
        match self {
            Self::Empty => {}
            Self::One(piece) => visit(*piece),
            Self::Sparse(pieces) => pieces.iter().copied().for_each(visit),
            Self::Table(table) => table.for_each(visit),
        }
    }

    fn from_pieces(pieces: Vec<Piece>) -> Self {
        match pieces.as_slice() {
            [] => Self::Empty,
            [piece] => Self::One(*piece),
            more if more.len() <= SPARSE_MAX => Self::Sparse(Arc::new(pieces)),
            more => {
                let mut table = Table { values: [ABSENT; CHUNK_BLOCKS as usize], pieces: more.len() as u16 };
                more.iter().for_each(|piece| table.write(*piece));
                Self::Table(Arc::new(table))
            }
        }
    }
}

/// How a sorted list of pieces changes: `from..to` of it becomes `new[..len]`.
struct Patch {
    from: usize,
    to: usize,
    new: [Piece; 3],
    len: usize,
    changes: bool,
}

impl Patch {
    fn new(pieces: &[Piece], piece: Piece, removed: &mut dyn FnMut(Piece)) -> Self {
        // Neighbours that only touch take part, so that they can be merged.
        let from = pieces.partition_point(|old| old.end() < piece.start);
        let to = from + pieces[from..].partition_point(|old| old.start <= piece.end());
        let mut patch = Self { from, to, new: [piece; 3], len: 0, changes: piece.value != ABSENT };
        if let Some(first) = pieces[from..to].first()
            && first.start < piece.start
        {
            patch.push(first.clip(0, piece.start));
        }
        if piece.value != ABSENT {
            patch.push(piece);
        }
        for old in &pieces[from..to] {
            if old.start < piece.end() && piece.start < old.end() {
                removed(old.clip(piece.start, piece.end()));
                patch.changes = true;
            }
        }
        if let Some(last) = pieces[from..to].last()
            && last.end() > piece.end()
        {
            patch.push(last.clip(piece.end(), CHUNK_BLOCKS));
        }
        patch
    }

    fn push(&mut self, piece: Piece) {
        match self.new[..self.len].last_mut() {
            Some(last) if last.is_continued_by(piece) => last.count += piece.count,
            _ => {
                self.new[self.len] = piece;
                self.len += 1;
            }
        }
    }

    fn apply(&self, pieces: &mut Vec<Piece>) {
        let new = &self.new[..self.len];
        if self.to - self.from == new.len() {
            pieces[self.from..self.to].copy_from_slice(new);
        } else if self.from == pieces.len() {
            pieces.extend_from_slice(new);
        } else {
            pieces.splice(self.from..self.to, new.iter().copied());
        }
    }
}

/// A value per block.
#[derive(Clone, Debug)]
pub(super) struct Table {
    values: [u32; CHUNK_BLOCKS as usize],
    /// How many pieces the values make.
    pieces: u16,
}

impl Table {
    fn run(&self, at: u16, limit: u16) -> (u32, u16) {
        let first = self.values[usize::from(at)];
        let rest = &self.values[usize::from(at) + 1..usize::from(limit)];
        let more = rest.iter().zip(1..).take_while(|&(&value, by)| value == advance(first, by)).count();
        (first, 1 + more as u16)
    }

    fn write(&mut self, piece: Piece) {
        let values = &mut self.values[usize::from(piece.start)..usize::from(piece.end())];
        values.iter_mut().zip(0..).for_each(|(value, by)| *value = advance(piece.value, by));
    }

    fn visit(&self, from: u16, to: u16, visit: &mut dyn FnMut(Piece)) {
        let mut start = from;
        while start < to {
            let (value, count) = self.run(start, to);
            if value != ABSENT {
                visit(Piece { start, count, value });
            }
            start += count;
        }
    }

    fn for_each(&self, visit: &mut dyn FnMut(Piece)) {
        self.visit(0, CHUNK_BLOCKS, visit);
    }

    fn replace(&mut self, piece: Piece, removed: &mut dyn FnMut(Piece)) {
        self.visit(piece.start, piece.end(), removed);
        let before = self.starts(piece);
        self.write(piece);
        self.pieces = self.pieces + self.starts(piece) - before;
    }

    /// How many pieces start inside `piece` or right after it: the only ones that writing it can make or unmake.
    fn starts(&self, piece: Piece) -> u16 {
        let last = usize::from(piece.end()).min(self.values.len() - 1);
        let starts = |&at: &usize| {
            let value = self.values[at];
            value != ABSENT && (at == 0 || advance(self.values[at - 1], 1) != value)
        };
        (usize::from(piece.start)..=last).filter(starts).count() as u16
    }
}
