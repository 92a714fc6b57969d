//! The requests of one volume in order of arrival, and which of them may start.
//!
//! Invariants: a request starts only when no earlier one that is still here conflicts with it, so overlapping requests
//! run one at a time, first come first served, and none starves; an entry (and with it its range) stays until its reply
//! is written; at most [`MAX_TAGS`] entries; nothing is allocated after `new`.

use super::message::SerialNumber;
use super::{DiskError, Now, OperationId, Request, Tag};

/// Most requests of one volume at a time: 64 slots of the arena (the engine's cap per volume), its reserved slot, and
/// operators' tickets (seals: one at a time per volume, one spare for a group).
pub const MAX_TAGS: usize = 64 + 1 + 3;

/// Most ranges of one volume that are copied at a time: while one is read here, others are on their way and on the other
/// disk. With a MiB each they are half of what may wait for a connection; the other half is the application's.
pub const MAX_PIECES: usize = 8;

/// The core's own entries: the ranges that are being copied, and a flush.
pub(super) const OWN: usize = MAX_PIECES + 1;
/// The first range that is being copied to or from another copy.
const FIRST_COPY: u32 = u32::MAX - MAX_PIECES as u32;
/// A flush that the core needs.
pub(super) const FLUSH: Tag = Tag(u32::MAX);

impl Tag {
    /// Those of copied ranges.
    pub(super) fn copies() -> impl Iterator<Item = Self> {
        (FIRST_COPY..u32::MAX).map(Self)
    }

    /// Whether it is a copied range's.
    pub(super) fn is_copy(self) -> bool {
        self.is_own() && self != FLUSH
    }

    /// Whether nobody outside has asked.
    pub(super) fn is_own(self) -> bool {
        self.0 >= FIRST_COPY
    }
}

/// The answers that a request waits for: this copy's in the highest bit, below it the peers' by position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Awaits(pub u8);

impl Awaits {
    pub const LOCAL: Self = Self(1 << 7);

    pub fn peer(position: usize) -> Self {
        Self(1 << position)
    }
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// Waits for an earlier request.
    Queued,
    /// The peers execute it; the store does when its mark is durable here.
    Marking,
    /// The store and the peers execute it.
    Started(OperationId),
    /// The store still executes it, but this copy is not the primary any more that started it.
    Draining(OperationId),
    /// The store had no space for it; it has had no effect and starts again when there is some.
    NoSpace,
    /// Its completion was emitted; the reply is being written.
    Completed,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    pub tag: Tag,
    pub request: Request,
    pub phase: Phase,
    pub arrived: Now,
    pub serial: SerialNumber,
    /// Of a flush: everything below was completed on every copy before it started.
    pub covers: SerialNumber,
    pub awaits: Awaits,
    /// Heartbeats for which other copies have owed it.
    pub owed: u8,
    /// Another primary may have overtaken it: it is answered as such and never executed again.
    pub fenced: bool,
    /// What this copy's disk said.
    pub result: Result<(), DiskError>,
}

impl Entry {
    /// What the disk executes for it.
    pub fn running(&self) -> Option<OperationId> {
        match self.phase {
            Phase::Started(operation) if self.awaits.contains(Awaits::LOCAL) => Some(operation),
            Phase::Draining(operation) => Some(operation),
            Phase::Queued | Phase::Marking | Phase::Started(_) | Phase::NoSpace | Phase::Completed => None,
        }
    }

    /// Whether a copy may have executed it, and not all have answered.
    pub fn is_started(&self) -> bool {
        matches!(self.phase, Phase::Marking | Phase::Started(_) | Phase::NoSpace)
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Admission {
    /// In order of arrival. A linear scan over at most 77 entries of 80 bytes costs less than any index would.
    entries: Vec<Entry>,
}

/// Whether `later` must wait for `earlier`: they share a block and one of them changes it.
pub(super) fn conflicts(earlier: Request, later: Request) -> bool {
    let (Some(a), Some(b)) = (earlier.range(), later.range()) else { return false };
    (earlier.is_mutation() || later.is_mutation()) && a.overlaps(b)
}

/// Whether the order of the two matters on other copies: a seal is the same point of the stream of writes everywhere.
fn ordered(earlier: Request, later: Request) -> bool {
    let seal = |request| matches!(request, Request::Seal(_));
    (seal(earlier) && (later.is_mutation() || seal(later))) || (earlier.is_mutation() && seal(later))
}

impl Admission {
    pub fn new() -> Self {
        Self { entries: Vec::with_capacity(MAX_TAGS + OWN) }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Takes a request in and returns its position.
    pub fn push(&mut self, tag: Tag, request: Request, now: Now) -> usize {
        let own = tag.is_own();
        assert!(own || self.entries.len() < MAX_TAGS + OWN, "more than {MAX_TAGS} requests of one volume");
        assert!(self.entries.iter().all(|e| e.tag != tag), "{tag:?} is in use");
        self.entries.push(Entry {
            tag,
            request,
            phase: Phase::Queued,
            arrived: now,
            serial: SerialNumber::default(),
            covers: SerialNumber::default(),
            awaits: Awaits::default(),
            owed: 0,
            fenced: false,
            result: Ok(()),
        });
        self.entries.len() - 1
    }

    /// Whether no earlier entry is in the way of the one at `position`.
    pub fn is_clear(&self, position: usize) -> bool {
        let request = self.entries[position].request;
        !self.entries[..position].iter().any(|earlier| conflicts(earlier.request, request))
    }

    /// The same where other copies follow: a seal also waits for the writes before it, and holds those after it.
    pub fn is_clear_on_all(&self, position: usize) -> bool {
        let request = self.entries[position].request;
        let mut earlier = self.entries[..position].iter().filter(|e| e.phase != Phase::Completed);
        self.is_clear(position) && !earlier.any(|earlier| ordered(earlier.request, request))
    }

    /// Whether the disk executes nothing that is in the way of the entry at `position`.
    pub fn is_clear_of_disk(&self, position: usize) -> bool {
        let request = self.entries[position].request;
        let mut running = self.entries[..position].iter().filter(|e| e.running().is_some());
        !running.any(|earlier| conflicts(earlier.request, request))
    }

    pub fn at(&mut self, position: usize) -> &mut Entry {
        &mut self.entries[position]
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.entries.iter_mut()
    }

    /// The position of an operation that the disk executes.
    pub fn running(&self, operation: OperationId) -> Option<usize> {
        self.entries.iter().position(|e| e.running() == Some(operation))
    }

    /// The position of what is started under this serial.
    pub fn serial(&self, serial: SerialNumber) -> Option<usize> {
        self.entries.iter().position(|e| e.serial == serial && e.is_started())
    }

    /// The position of an entry of the core's own.
    pub fn own(&self, tag: Tag) -> Option<usize> {
        self.entries.iter().position(|e| e.tag == tag)
    }

    /// Removes an entry of the core's own.
    pub fn remove_own(&mut self, tag: Tag) {
        self.entries.retain(|e| e.tag != tag);
    }

    /// Removes all ranges that are being copied, and returns what the disk still executes for them; `None` if there are none.
    pub fn remove_copies(&mut self) -> Option<Vec<OperationId>> {
        let copies = self.entries.iter().filter(|e| e.tag.is_copy());
        let (count, running) = (copies.clone().count(), copies.filter_map(Entry::running).collect());
        self.entries.retain(|e| !e.tag.is_copy());
        (count > 0).then_some(running)
    }

    /// Whether anybody outside has asked for something that is not answered.
    pub fn is_asked(&self) -> bool {
        self.entries.iter().any(|e| !e.tag.is_own() && e.phase != Phase::Completed)
    }

    /// Removes a completed entry; `false` if there is none with this tag.
    pub fn remove_completed(&mut self, tag: Tag) -> bool {
        let position = self.entries.iter().position(|e| e.tag == tag && e.phase == Phase::Completed);
        if let Some(position) = position {
            self.entries.remove(position);
        }
        position.is_some()
    }

    /// The planted bug "the range is released at `Complete`": like [`Self::is_clear`], blind to completed entries.
    #[cfg(test)]
    pub fn is_clear_of_running(&self, position: usize) -> bool {
        let request = self.entries[position].request;
        let earlier = self.entries[..position].iter().filter(|e| e.phase != Phase::Completed);
        !earlier.into_iter().any(|earlier| conflicts(earlier.request, request))
    }
}
