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

/// Most extents that a primary's writes make hot (32 GiB): what a busy database writes to within a minute, so that hardly
/// any write waits for a mark; and still only what is compared before a copy serves after a crash, not the whole volume.
pub const MAX_HOT_EXTENTS: usize = 8192;

/// Most marks of one copy on disk: its own, and those of other copies that a primary makes equal or that are left from
/// an earlier role.
pub const MAX_MARKS: usize = MAX_HOT_EXTENTS * super::configuration::MAX_COPIES;

/// Extents that are marked ahead of a sequential stream, in one durable write: 32 MiB, a tenth of a second at 300 MB/s.
const AHEAD: u32 = 8;
/// Two writes of one stream have at most so many others between them: as many as a device has under way.
const NEAR: u64 = super::MAX_TAGS as u64;

/// How many marks are so many that some are to go, before a write has to wait for that.
pub(super) fn crowd(limit: usize) -> usize {
    limit - limit / 4
}

/// Number of an extent of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent(pub u32);

/// First and last of the extents that a range touches; the volume's size limits them to 32 bits.
fn ends(range: BlockRange) -> (u32, u32) {
    let number = |block: u64| u32::try_from(block / EXTENT_BLOCKS).unwrap_or(u32::MAX);
    (number(range.start()), number(range.end() - 1))
}

/// The extents that a range touches.
pub(super) fn extents(range: BlockRange) -> impl Iterator<Item = Extent> {
    let (first, last) = ends(range);
    (first..=last).map(Extent)
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
    /// There is no room for so many new ones before others are cleared.
    Full(usize),
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
        let new = extents(range).filter(|extent| self.find(*extent).is_err()).count();
        if new > 0 && self.marks.len() + new > limit {
            return Marked::Full(new);
        }
        let mut marked = Marked::Yes;
        for extent in extents(range) {
            if self.touch(extent, serial) != State::Durable {
                marked = Marked::Soon;
            }
        }
        marked
    }

    /// Marks what a sequential stream writes next, so that it never waits; only while the set is not crowded. Too many marks
    /// do no harm, and who writes here and there has hardly ever just written before.
    pub fn mark_ahead(&mut self, range: BlockRange, serial: SerialNumber, limit: usize) {
        let (first, last) = ends(range);
        let (Some(before), Some(end)) = (first.checked_sub(1), last.checked_add(AHEAD)) else { return };
        let has_room = self.marks.len() + AHEAD as usize <= crowd(limit);
        if !has_room || self.find(Extent(last + 1)).is_ok() {
            return;
        }
        let written = self.find(Extent(before)).ok().and_then(|at| self.marks[at].last);
        if written.is_some_and(|written| written.0 + NEAR >= serial.0) {
            (last + 1..=end).for_each(|extent| _ = self.touch(Extent(extent), serial));
        }
    }

    /// Whether all marks of a range are durable.
    pub fn is_durable(&self, range: BlockRange) -> bool {
        extents(range).all(|extent| self.find(extent).is_ok_and(|at| self.marks[at].state == State::Durable))
    }

    fn find(&self, extent: Extent) -> Result<usize, usize> {
        self.marks.binary_search_by_key(&extent, |mark| mark.extent)
    }

    /// Marks one extent; how far its mark is.
    fn touch(&mut self, extent: Extent, serial: SerialNumber) -> State {
        match self.find(extent) {
            Ok(at) => {
                let mark = &mut self.marks[at];
                mark.last = mark.last.max(Some(serial));
                mark.state
            }
            Err(at) => {
                self.marks.insert(at, Mark { extent, old: false, last: Some(serial), state: State::Wanted });
                self.stale = true;
                State::Wanted
            }
        }
    }

    /// Forgets marks that a flush on every copy covers, in memory first; those from before only if `equal`.
    pub fn clear(&mut self, below: SerialNumber, equal: bool) {
        let before = self.marks.len();
        self.marks.retain(|mark| (mark.old && !equal) || mark.last.is_some_and(|last| last >= below));
        self.stale |= self.marks.len() != before;
    }

    /// The serial below which marks were written last if all but the `keep` newest are to go.
    pub fn all_but_newest(&self, keep: usize) -> SerialNumber {
        let mut last: Vec<SerialNumber> = self.marks.iter().filter_map(|mark| mark.last).collect();
        match last.len().checked_sub(keep + 1) {
            Some(at) => last.select_nth_unstable(at).1.next(),
            None => SerialNumber::default(),
        }
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

    /// Forgets what is from before this term: everything is compared anyway.
    pub fn forget_old(&mut self) {
        let before = self.marks.len();
        self.marks.retain(|mark| !mark.old);
        self.stale |= self.marks.len() != before;
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
