//! The hot extents of one copy: where it may differ from the other members after a crash (a write-intent bitmap).
//!
//! Invariants: a write starts only when the marks of its extents are durable and are not being cleared; a mark of this
//! session goes only when a flush on every copy covers its last write, a mark from before only when the copy is known
//! to be equal to the primary's; one durable update at a time, so the last one completed is the truth.

use super::OperationId;
use super::message::SerialNumber;
use crate::volume::BlockRange;

/// Blocks of an extent: 4 MiB. Small enough to compare quickly, large enough that marks are rare.
pub const EXTENT_BLOCKS: u64 = 1024;

/// Most extents that a primary's writes make hot (4 GiB): comparing them after a crash is a matter of seconds.
pub const MAX_HOT_EXTENTS: usize = 1024;

/// Most marks of one copy on disk: its own, and those of other copies that a primary makes equal or that are left from
/// an earlier role.
pub const MAX_MARKS: usize = MAX_HOT_EXTENTS * super::configuration::MAX_COPIES;

/// Number of an extent of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent(pub u32);

/// The extents that a range touches; the volume's size limits them to 32 bits.
fn extents(range: BlockRange) -> impl Iterator<Item = Extent> {
    let number = |block: u64| Extent(u32::try_from(block / EXTENT_BLOCKS).unwrap_or(u32::MAX));
    (number(range.start()).0..=number(range.end() - 1).0).map(Extent)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Mark {
    extent: Extent,
    /// From before this term: the copies may differ here for an older reason than `last`.
    old: bool,
    /// Last write of this term.
    last: Option<SerialNumber>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Wanted,
    Writing,
    Durable,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Hot {
    /// Sorted by extent.
    marks: Vec<Mark>,
    /// The durable set differs from the wanted one.
    stale: bool,
    writing: Option<OperationId>,
}

/// Whether a write may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marked {
    /// Its marks are durable.
    Yes,
    /// They are wanted and will be.
    Soon,
    /// There is no room before some are cleared.
    Full,
}

impl Hot {
    pub fn new(extents: &[Extent]) -> Self {
        let marks = extents.iter().map(|extent| Mark { extent: *extent, old: true, last: None, state: State::Durable });
        let mut marks: Vec<Mark> = marks.collect();
        marks.sort_by_key(|mark| mark.extent);
        marks.dedup_by_key(|mark| mark.extent);
        Self { marks, stale: false, writing: None }
    }

    pub fn len(&self) -> usize {
        self.marks.len()
    }

    pub fn extents(&self) -> Vec<Extent> {
        self.marks.iter().map(|mark| mark.extent).collect()
    }

    #[cfg(test)]
    pub fn rename(&mut self, name: impl Fn(OperationId) -> OperationId) {
        self.writing = self.writing.map(name);
    }

    pub fn is_writing(&self, operation: OperationId) -> bool {
        self.writing == Some(operation)
    }

    /// Marks the extents of a write, for now in memory: all of them or, if there is no room for all, none, since a mark
    /// that waits for others cannot be cleared. `limit` bounds the set.
    pub fn mark(&mut self, range: BlockRange, serial: SerialNumber, limit: usize) -> Marked {
        let new = extents(range).filter(|extent| self.marks.binary_search_by_key(extent, |mark| mark.extent).is_err());
        let new = new.count();
        if new > 0 && self.marks.len() + new > limit {
            return Marked::Full;
        }
        let mut marked = Marked::Yes;
        for extent in extents(range) {
            match self.marks.binary_search_by_key(&extent, |mark| mark.extent) {
                Ok(at) => {
                    let mark = &mut self.marks[at];
                    mark.last = mark.last.max(Some(serial));
                    if mark.state != State::Durable {
                        marked = Marked::Soon;
                    }
                }
                Err(at) => {
                    self.marks.insert(at, Mark { extent, old: false, last: Some(serial), state: State::Wanted });
                    self.stale = true;
                    marked = Marked::Soon;
                }
            }
        }
        marked
    }

    /// Forgets marks that a flush on every copy covers, in memory first; those from before only if `equal`.
    pub fn clear(&mut self, below: SerialNumber, equal: bool) {
        let before = self.marks.len();
        self.marks.retain(|mark| (mark.old && !equal) || mark.last.is_some_and(|last| last >= below));
        self.stale |= self.marks.len() != before;
    }

    /// Whether a flush that starts now would make room.
    pub fn can_clear(&self, below: SerialNumber) -> bool {
        self.marks.iter().any(|mark| mark.last.is_none_or(|last| last < below))
    }

    /// A new term numbers anew: all marks are from before.
    pub fn new_term(&mut self) {
        for mark in &mut self.marks {
            (mark.old, mark.last) = (true, None);
        }
    }

    /// The set to be made durable next, if it is not and nothing is being written.
    pub fn write(&mut self, operation: OperationId) -> Option<Box<[Extent]>> {
        if !self.stale || self.writing.is_some() {
            return None;
        }
        self.stale = false;
        self.writing = Some(operation);
        self.advance(State::Wanted, State::Writing);
        Some(self.extents().into())
    }

    /// The set that was being written is durable; if not, it is still wanted, but nobody may count on it.
    pub fn written(&mut self, durable: bool) {
        self.writing = None;
        self.advance(State::Writing, if durable { State::Durable } else { State::Wanted });
    }

    fn advance(&mut self, from: State, to: State) {
        self.marks.iter_mut().filter(|mark| mark.state == from).for_each(|mark| mark.state = to);
    }
}
