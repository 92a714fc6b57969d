//! One copy of a volume: takes in what happens and dispatches it to the part of the core that decides.
//!
//! ```text
//!   Candidate ──admitted──> Secondary ──own term committed──> Primary(Reconciling ─> Settling ─> Serving)
//!       ^                       │ ^──────── demoted, or another primary committed ────────┘
//!       └─── dropped: Outdated <┘
//! ```
//! # Invariants
//! * `Complete(Ok)` follows the disk's `Completed` and the answers of all peers that writes are sent to, under a
//!   configuration that is durable here; nothing else.
//! * A range is held until `Replied`: whatever the reply's reader does next finds the request's slot already marked done.
//! * A flush starts at once: it covers the writes *completed* before it, and those wait for nobody.
//! * After a restart there is nothing to recover in here: requests whose slots are filled come again as new ones, **in
//!   their first order of arrival**. They were not answered, yet a read may have seen what one of them did before the
//!   kill; replayed after a newer one it would come back. And **before any other input**: what the core
//!   learns first may be that another copy was primary since; then they are answered and never executed.
//! * A volume with one copy is a configuration with one member: the same path, without messages, marks and lease.

use super::admission::{Admission, Phase};
use super::configuration::{Configuration, Generation};
use super::copying::Copying;
use super::hot::{Hot, MAX_HOT_EXTENTS};
use super::interface::{Input, Member, Memory, Output, Primary, Record, Role, Status, Wish};
use super::marks::{Clearing, MARK_AGE};
use super::message::{Frame, Incarnation, Message, SerialNumber};
use super::patience::Rest;
use super::pieces::PieceLimits;
use super::primary::Peer;
use super::secondary::{Apply, MARGIN, Order};
use super::term::{Adoption, Guard, Persisting};
use super::view::Progress;
use super::{LEASE, Now, OperationId, Tag};
use crate::volume::InstanceId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What this copy's disk has done since the engine was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Health {
    /// Nothing failed.
    Sound,
    /// The only member's disk failed something that a candidate may have executed: nobody is equal to it any more.
    Damaged,
    /// It serves no more, so that the wish may move, and drops nobody.
    Failed,
}

/// An operation whose requester is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Orphan {
    pub operation: OperationId,
    /// Whoever asked for it: if it fails, this copy is not intact.
    pub is_flush: bool,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    pub(super) me: InstanceId,
    pub(super) incarnation: Incarnation,
    pub(super) now: Now,
    /// What is durable.
    pub(super) record: Record,
    pub(super) role: Role,
    /// The catalogue was read since the start; before, nothing is proposed.
    pub(super) informed: bool,
    /// The node died since the record was written: it must be written again before another start may count on it.
    pub(super) unsaved: bool,
    pub(super) wish: Option<Wish>,
    pub(super) adoption: Option<Adoption>,
    pub(super) persisting: Option<Persisting>,
    /// Proposed and not resolved: it may be committed at any moment.
    pub(super) proposal: Option<Configuration>,
    pub(super) admission: Admission,
    pub(super) next_operation: OperationId,
    pub(super) next_serial: SerialNumber,
    /// Of a primary: every other copy, by the position that `Awaits` uses.
    pub(super) peers: Vec<Peer>,
    pub(super) copying: Option<Copying>,
    /// Of what was begun last.
    pub(super) progress: Progress,
    /// Until when the application has the disks for itself.
    pub(super) rests_until: Now,
    /// Heartbeats since the application asked last.
    pub(super) quiet: u8,
    pub(super) piece_limits: PieceLimits,
    /// There was no space for what was copied, or the disk failed: nothing is copied before the next tick.
    pub(super) copying_waits: bool,
    /// A record or a flush of the core's own failed: neither is tried again before the next tick. A store that has failed
    /// answers at once, and would be asked without end.
    pub(super) disk_rests: bool,
    /// Something that others wait for was given up.
    pub(super) released: bool,
    /// Whether this copy may become the only one.
    pub(super) guard: Guard,
    /// A flush before leaving is done, and nothing was started since.
    pub(super) flushed: bool,
    pub(super) orphans: Vec<Orphan>,
    pub(super) health: Health,
    /// A flush of this life failed: what it should have covered may be gone, so this copy is not intact before its engine is
    /// started again and it was made equal.
    pub(super) flush_failed: bool,
    pub(super) hot: Hot,
    pub(super) clearing: Clearing,
    /// Most hot extents of this primary's own writes.
    pub(super) hot_limit: usize,
    /// After how long without a write there a mark goes.
    pub(super) mark_age: Duration,
    /// Until when nobody else may be promoted by this copy's promise.
    pub(super) granted_until: Now,
    pub(super) silent: BTreeSet<InstanceId>,
    /// At most one for each other copy.
    pub(super) rests: BTreeMap<InstanceId, Rest>,
    /// Of a secondary or candidate: what it was told and the primary may ask again.
    pub(super) applies: Vec<Apply>,
    pub(super) floor: SerialNumber,
    /// In this term the primary has made this copy equal to its own.
    pub(super) settled: bool,
    #[cfg(test)]
    pub(super) planted: Option<super::tests::Planted>,
}

impl Replica {
    /// A volume with one copy, `replication: none`: primary for ever, without a catalogue.
    pub fn sole(copy: InstanceId) -> Self {
        let configuration = Configuration::first(Generation::default(), copy, BTreeSet::new());
        let record = Record { configuration, intact: true };
        let (incarnation, memory) = (Incarnation::default(), Memory::Kept);
        let member = Member { copy, incarnation, record, hot: Vec::new(), memory };
        Self { role: Role::Primary(Primary::Serving), ..Self::open(Now::default(), member) }
    }

    /// A copy whose configuration the catalogue keeps. It asks for nothing until it is given that
    /// [`Input::Configuration`].
    pub fn open(now: Now, member: Member) -> Self {
        let Member { copy, incarnation, mut record, hot, memory } = member;
        // Without a mark, every write that others might have was flushed everywhere; one that is alone may have marked nothing.
        let alone = record.configuration.members().eq([copy]);
        record.intact &= memory == Memory::Kept || (hot.is_empty() && !alone);
        // It may have granted a lease just before it died, but only to another copy.
        let granted = record.configuration.primary.is_some_and(|primary| primary != copy);
        Self {
            me: copy,
            incarnation,
            now,
            granted_until: if granted { Now(now.0 + LEASE + MARGIN) } else { now },
            role: Self::follower(&record.configuration, copy),
            record,
            informed: false,
            unsaved: memory == Memory::Lost,
            wish: None,
            adoption: None,
            persisting: None,
            proposal: None,
            admission: Admission::new(),
            next_operation: OperationId(0),
            next_serial: SerialNumber(1),
            peers: Vec::new(),
            copying: None,
            progress: Progress::default(),
            rests_until: Now::default(),
            quiet: 0,
            piece_limits: PieceLimits::SHIPPED,
            copying_waits: false,
            disk_rests: false,
            released: false,
            guard: Guard::Open,
            flushed: false,
            orphans: Vec::new(),
            health: Health::Sound,
            flush_failed: false,
            hot: Hot::new(&hot),
            clearing: Clearing::new(now),
            hot_limit: MAX_HOT_EXTENTS,
            mark_age: MARK_AGE,
            silent: BTreeSet::new(),
            rests: BTreeMap::new(),
            applies: Vec::new(),
            floor: SerialNumber::default(),
            settled: false,
            #[cfg(test)]
            planted: None,
        }
    }

    /// Applies one input; what follows from it is appended to `outputs`.
    ///
    /// # Panics
    /// On inputs that the engine can only give by a mistake of its own: a tag in use, an operation that is not running,
    /// a reply to what is not completed, more than [`MAX_TAGS`](super::MAX_TAGS) requests.
    pub fn step(&mut self, now: Now, input: Input, outputs: &mut Vec<Output>) {
        self.now = now;
        match input {
            Input::Request { tag, request } => {
                self.quiet = 0;
                self.requested(tag, request, outputs);
            }
            Input::Completed { operation, result } => self.completed(operation, result, outputs),
            Input::Replied { tag } => {
                assert!(self.admission.remove_completed(tag), "{tag:?} was not completed");
                self.start_what_is_clear(outputs);
            }
            Input::SpaceFreed => {
                self.space_freed(outputs);
                self.start_what_is_clear(outputs);
            }
            Input::Planned { operation, missing } => self.planned(operation, missing, outputs),
            Input::Compared { operation, differs } => self.compared_here(operation, differs, outputs),
            Input::Received { from, message } => self.received(from, message, outputs),
            Input::Connected(peer) => self.connected(peer, outputs),
            Input::Silent(peer) => self.peer_silent(peer),
            Input::Proposed { stamp, outcome } => self.proposed(stamp, outcome, outputs),
            Input::Configuration(configuration) => self.configuration_read(*configuration, outputs),
            Input::Wish(wish) => {
                self.wish = Some(wish);
                self.fence_what_waits(outputs);
                // What waited while this copy was to leave.
                self.start_what_is_clear(outputs);
            }
            Input::Resync(copy) => self.resync(copy),
            Input::FenceRequests { below } => self.fence_requests(below, outputs),
            Input::Tick => {
                (self.copying_waits, self.disk_rests) = (false, false);
                self.judge_patience();
                self.age_marks();
                self.judge_quiet();
                self.tick(outputs);
            }
        }
        self.advance(outputs);
    }

    fn received(&mut self, from: InstanceId, message: Message, outputs: &mut Vec<Output>) {
        self.silent.remove(&from);
        match message {
            Message::Invite(configuration) => self.invited(from, *configuration, outputs),
            Message::Joined { frame, intact, hot } => self.joined(from, frame, intact, hot, outputs),
            Message::Prepare { frame, serial, floor, request } => {
                self.ordered(from, frame, (serial, floor), Order::Request(request), outputs);
            }
            Message::Copy { frame, serial, floor, piece } => {
                self.ordered(from, frame, (serial, floor), Order::Piece(piece), outputs);
            }
            Message::Compare { frame, serial, floor, range } => {
                self.ordered(from, frame, (serial, floor), Order::Compare(range), outputs);
            }
            Message::Compared { frame, serial, differs } => self.compared(from, frame, serial, differs, outputs),
            Message::Prepared { frame, serial, result } => self.prepared(from, frame, serial, result, outputs),
            Message::Renew { frame, sent } => {
                if self.accepts(from, frame, outputs) {
                    self.grant(from, frame, sent, outputs);
                }
            }
            Message::Granted { frame, sent } => self.granted(from, frame, sent, outputs),
            Message::Reconciled(frame) => {
                if self.accepts(from, frame, outputs) {
                    self.reconciled(outputs);
                }
            }
            Message::Settled(frame) => {
                if let Some(position) = self.session(from, frame) {
                    self.peers[position].settled = true;
                }
            }
            Message::Clear { frame, below } => {
                if self.accepts(from, frame, outputs) {
                    let equal = self.settled && self.record.intact && self.role == Role::Secondary;
                    self.hot.clear(below, equal);
                }
            }
            Message::Refused(stamp) => {
                if stamp > self.record.configuration.stamp {
                    outputs.push(Output::ReadConfiguration);
                }
            }
            // Between a client and its host, which give the core requests.
            Message::Enter { .. } | Message::Entered { .. } | Message::Ask { .. } | Message::Answer { .. } => {}
        }
    }

    /// Whatever can go on by itself now. Nothing on a volume that only one copy serves and nobody wants changed.
    fn advance(&mut self, outputs: &mut Vec<Output>) {
        if self.role == Role::Primary(Primary::Serving)
            && self.peers.is_empty()
            && self.wish.is_none()
            && self.adoption.is_none()
        {
            return;
        }
        if self.unsaved && !self.disk_rests && self.persisting.is_none() && self.adoption.is_none() {
            self.persist(self.record.clone(), outputs);
        }
        self.adopt_if_drained(outputs);
        self.propose(outputs);
        self.advance_copying(outputs);
        if std::mem::take(&mut self.released) {
            self.start_what_is_clear(outputs);
        }
        self.serve_if_settled(outputs);
        self.write_hot(outputs);
    }

    /// The role of a copy that has committed no term of its own since it was started.
    pub(super) fn follower(configuration: &Configuration, copy: InstanceId) -> Role {
        if configuration.is_member(copy) {
            Role::Secondary
        } else if configuration.candidates.contains_key(&copy) {
            Role::Candidate
        } else {
            Role::Outdated
        }
    }

    pub(super) fn operation(&mut self) -> OperationId {
        let operation = self.next_operation;
        self.next_operation = OperationId(operation.0 + 1);
        operation
    }

    pub(super) fn serial(&mut self) -> SerialNumber {
        let serial = self.next_serial;
        self.next_serial = serial.next();
        serial
    }

    pub(super) fn write_hot(&mut self, outputs: &mut Vec<Output>) {
        let operation = self.next_operation;
        if let Some(extents) = self.hot.write(operation) {
            self.operation();
            outputs.push(Output::WriteHot { operation, extents });
        }
    }

    /// Requests that wait for space in the pool.
    pub fn waiting_for_space(&self) -> usize {
        self.admission.entries().iter().filter(|e| e.phase == Phase::NoSpace).count()
    }

    /// What this copy is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// What is durable beside this copy, as far as the core knows.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// What the volume is busy with.
    pub fn status(&self, now: Now) -> Status {
        let entries = self.admission.entries();
        let count = |phase| entries.iter().filter(|e| e.phase == phase).count();
        Status {
            requests: entries.len(),
            queued: count(Phase::Queued) + count(Phase::Marking),
            no_space: count(Phase::NoSpace),
            oldest: entries.first().map(|e| now.0.saturating_sub(e.arrived.0)),
        }
    }

    /// Whose operation it is, while the disk executes it.
    pub fn tag_of(&self, operation: OperationId) -> Option<Tag> {
        self.admission.running(operation).map(|position| self.admission.entries()[position].tag)
    }

    /// Gives the operations that are running other names, in the same order.
    #[cfg(test)]
    pub(super) fn rename(&mut self, name: impl Fn(OperationId) -> OperationId) {
        for entry in self.admission.iter_mut() {
            if let Phase::Started(operation) | Phase::Draining(operation) = &mut entry.phase {
                *operation = name(*operation);
            }
        }
        self.orphans.iter_mut().for_each(|orphan| orphan.operation = name(orphan.operation));
        self.orphans.sort_unstable();
        self.applies.iter_mut().for_each(|apply| apply.rename(&name));
        self.persisting.iter_mut().for_each(|persisting| persisting.operation = name(persisting.operation));
        self.copying.iter_mut().for_each(|copying| copying.rename(&name));
        self.hot.rename(&name);
        if let Guard::Flushing(operation) = &mut self.guard {
            *operation = name(*operation);
        }
    }

    /// The planted mistake, if any.
    #[cfg(test)]
    pub(super) fn has(&self, planted: super::tests::Planted) -> bool {
        self.planted == Some(planted)
    }

    /// A frame of the session with a peer.
    pub(super) fn frame(&self, incarnation: Incarnation) -> Frame {
        Frame { stamp: self.record.configuration.stamp, incarnation }
    }
}
