//! When extents are marked, and when marks go: a write shall hardly ever wait for either.
//!
//! ```text
//!   Queued ──> marked durably here ───────────────> Started ─┬─> answered
//!      └─────> Marking: sent, and marked here meanwhile ─────┘
//! ```
//! # Invariants
//! * Each copy's own mark is durable before its own write. A copy may execute a write that the primary has not marked yet:
//!   its own mark says so, and stays, since a flush covers nothing that the primary has not executed and answered.
//! * Marks go when a flush on every copy covers them: those that were written longest ago, half of all, when they are many;
//!   and those that nobody has written for [`MARK_AGE`], so that an idle volume has none.
//! * Room is made before a write has to wait for it, and only by a flush that makes some.

use super::admission::Phase;
use super::hot::{Marked, crowd};
use super::interface::{Output, Primary, Role};
use super::message::{Buffer, Message, SerialNumber};
use super::replica::{Health, Replica};
use super::{MAX_MARKS, Now, Request, Tag};
use crate::volume::BlockRange;
use std::time::Duration;

/// For how long nobody has written to an extent whose mark goes. A volume that is written all over has each mark written
/// anew once in that time at most; what was idle for longer is not compared when a copy comes back.
pub(super) const MARK_AGE: Duration = Duration::from_secs(60);

/// What is to be cleared.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Clearing {
    /// Extents that a write needs and for which there was no room.
    pub wanted: usize,
    /// Marks that were written last below this are old.
    old: SerialNumber,
    /// There are some: a flush is wanted.
    due: bool,
    /// The next serial at the last look for old ones, and when that was.
    young: SerialNumber,
    pub looked: Now,
}

impl Clearing {
    /// In a new term, which numbers anew.
    pub fn new(now: Now) -> Self {
        Self { wanted: 0, old: SerialNumber::default(), due: false, young: SerialNumber(1), looked: now }
    }
}

impl Replica {
    /// Marks what a request changes, if there is anybody to differ from who may become equal. A damaged copy admits nobody in
    /// this life and clears no marks: writes would wait for room for ever. What it writes lies above what others have.
    pub(super) fn mark(&mut self, request: Request, tag: Tag) -> Marked {
        let marks = !self.peers.is_empty() && self.health != Health::Damaged;
        let range = request.range().filter(|_| request.is_mutation() && marks);
        let limit = if tag.is_copy() { MAX_MARKS } else { self.hot_limit };
        range.map_or(Marked::Yes, |range| self.mark_range(range, self.next_serial, limit))
    }

    pub(super) fn mark_range(&mut self, range: BlockRange, serial: SerialNumber, limit: usize) -> Marked {
        let marked = self.hot.mark(range, serial, limit);
        if let Marked::Full(new) = marked {
            self.clearing.wanted = self.clearing.wanted.max(new);
            return marked;
        }
        self.hot.mark_ahead(range, serial, self.hot_limit);
        if planted!(self, WriteBeforeMark) { Marked::Yes } else { marked }
    }

    /// Starts here what was sent before its mark was durable.
    pub(super) fn start_what_is_marked(&mut self, outputs: &mut Vec<Output>) {
        for position in 0..self.admission.entries().len() {
            let entry = self.admission.entries()[position];
            let is_durable = |range| self.hot.is_durable(range);
            if entry.phase == Phase::Marking && entry.request.range().is_none_or(is_durable) {
                self.start_here(position, outputs);
            }
        }
    }

    /// Whether a flush is wanted that makes room for other marks.
    pub(super) fn wants_room(&self) -> bool {
        let crowded = self.clearing.wanted > 0 || self.hot.len() > crowd(self.hot_limit);
        let room = crowded && self.hot.can_clear(self.lowest_unanswered());
        self.health == Health::Sound && !self.peers.is_empty() && (room || self.clearing.due)
    }

    /// A flush on every copy that writes were sent to then covers everything below: room for other marks.
    pub(super) fn flushed_on_all(&mut self, flush: SerialNumber, covers: SerialNumber, outputs: &mut Vec<Output>) {
        if self.health != Health::Sound && !planted!(self, ClearAfterFailure) {
            // What failed here is on other copies: it stays marked, and the next term makes them equal.
            return;
        }
        let waits = self.clearing.wanted > 0;
        let mut below = self.clears_below();
        if !planted!(self, ClearBeyondFlush) {
            below = below.min(covers);
        }
        (self.clearing.wanted, self.clearing.due) = (0, false);
        let clears = !self.peers.is_empty() && below > SerialNumber::default() && self.hot.can_clear(below);
        if clears {
            self.hot.clear(below, true);
            for peer in self.peers.iter().filter(|peer| peer.was_asked(flush) || planted!(self, ClearWhoJoins)) {
                if let Some(frame) = self.link(peer) {
                    let message = Message::Clear { frame, below };
                    outputs.push(Output::Send { to: peer.copy, message, buffer: Buffer::None });
                }
            }
        }
        if clears || waits {
            self.start_what_is_clear(outputs);
        }
    }

    /// The serial below which marks were written last that are old, or too many.
    fn clears_below(&self) -> SerialNumber {
        let Clearing { wanted, old, .. } = self.clearing;
        if wanted == 0 && self.hot.len() < crowd(self.hot_limit) {
            return old;
        }
        let keep = (self.hot_limit / 2).min(self.hot_limit.saturating_sub(wanted));
        // Those of an earlier term are older than anything of this one: members are equal where they are.
        old.max(SerialNumber(1)).max(self.hot.all_but_newest(keep))
    }

    /// Time has passed: looks for marks that nobody has written for long.
    pub(super) fn age_marks(&mut self) {
        if self.role != Role::Primary(Primary::Serving) || self.now.0 < self.clearing.looked.0 + self.mark_age {
            return;
        }
        let Clearing { old, due, young, looked, .. } = &mut self.clearing;
        // What was written before the last look was not written since.
        (*old, *young, *looked) = (*young, self.next_serial, self.now);
        *due = self.hot.can_clear(*old);
    }
}
