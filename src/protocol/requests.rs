//! The requests of the device and the operator, at the copy that serves them.
//!
//! ```text
//!   Request ─> Queued ──> (Marking ─>) Started ──all answered──> Completed ──Replied──> gone
//!                ^ (no earlier           │ │ superseded
//!                │  conflict)            │ └─> Draining ─> Queued, or Fenced
//!                └────────SpaceFreed── NoSpace
//! ```
//! Invariants: nothing starts unless this copy serves; a read starts and is answered only under the lease of every
//! secondary; a write starts here only when the marks of its extents are durable, if anybody else has the volume too; a
//! request that another primary's term has overtaken is never executed again.

use super::admission::{Awaits, Entry, FLUSH, Phase};
use super::hot::Marked;
use super::interface::{Output, Primary, Role};
use super::message::{Buffer, Message};
use super::replica::{Health, Orphan, Replica};
use super::secondary::MAX_APPLIES;
use super::term::Guard;
use super::{DiskError, OperationId, Request, Tag};

impl Replica {
    pub(super) fn requested(&mut self, tag: Tag, request: Request, outputs: &mut Vec<Output>) {
        let position = self.admission.push(tag, request, self.now);
        self.start_if_clear(position, outputs);
        self.refuse_seals(outputs);
        if self.role != Role::Primary(Primary::Serving) {
            self.fence_what_waits(outputs);
        }
    }

    pub(super) fn start_what_is_clear(&mut self, outputs: &mut Vec<Output>) {
        for position in 0..self.admission.entries().len() {
            if self.admission.entries()[position].phase == Phase::Queued {
                self.start_if_clear(position, outputs);
            }
        }
    }

    fn start_if_clear(&mut self, position: usize, outputs: &mut Vec<Output>) {
        if !self.may_start(position) {
            return;
        }
        let (tag, request) = (self.admission.entries()[position].tag, self.admission.entries()[position].request);
        let marked = self.mark(request, tag);
        match marked {
            Marked::Yes if tag.is_copy() => return self.start_copying(position, outputs),
            Marked::Yes => {}
            Marked::Soon if !tag.is_copy() => {}
            Marked::Soon | Marked::Full(_) => return,
        }
        let (serial, covers, awaits) = (self.next_serial, self.lowest_unanswered(), self.awaits());
        let entry = self.admission.at(position);
        entry.phase = Phase::Marking;
        entry.awaits = Awaits::LOCAL;
        if !matches!(request, Request::Read(_)) {
            (entry.serial, entry.covers, entry.awaits) = (serial, covers, awaits.with(Awaits::LOCAL));
            self.next_serial = serial.next();
            self.flushed = false;
        }
        if marked == Marked::Yes {
            self.start_here(position, outputs);
        }
        self.send_prepares(position, None, outputs);
    }

    /// Gives the disk what is the peers' already, or nobody's.
    pub(super) fn start_here(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let operation = self.operation();
        let entry = self.admission.at(position);
        entry.phase = Phase::Started(operation);
        outputs.push(Output::Disk { operation, tag: entry.tag, request: entry.request });
    }

    /// Whether nothing is in the way but a mark.
    fn may_start(&self, position: usize) -> bool {
        let entry = self.admission.entries()[position];
        let serves = match (self.role, entry.tag) {
            (Role::Primary(Primary::Serving), tag) if tag.is_own() => true,
            (Role::Primary(Primary::Serving), _) => self.health != Health::Failed && !self.leaves(),
            (Role::Primary(Primary::Reconciling), tag) if tag.is_copy() => true,
            (Role::Primary(_) | Role::Secondary | Role::Candidate | Role::Outdated, _) => false,
        };
        serves && self.has_window(entry.request) && self.is_clear(position) && self.may_read(entry.request)
    }

    /// Whether the other copies will remember one more operation; when an earlier one is answered, this is looked at again.
    fn has_window(&self, request: Request) -> bool {
        let asks_nobody = self.peers.is_empty() || matches!(request, Request::Read(_));
        asks_nobody || self.next_serial.0 - self.lowest_owed().0 < MAX_APPLIES as u64
    }

    /// Nobody can have written elsewhere: a read returns what every later read will return or overwrite.
    pub(super) fn may_read(&self, request: Request) -> bool {
        !matches!(request, Request::Read(_)) || planted!(self, ReadWithoutLease) || self.has_lease()
    }

    fn is_clear(&self, position: usize) -> bool {
        if planted!(self, StartOverlapping) {
            return true;
        }
        let copies = self.admission.entries()[position].tag.is_copy();
        if copies && planted!(self, ResyncBesideWrites) {
            return true;
        }
        if copies && self.role == Role::Primary(Primary::Reconciling) {
            // What is queued starts when the copies are equal: waiting for it would be for ever.
            return self.admission.is_clear_of_disk(position);
        }
        #[cfg(test)]
        if planted!(self, ReleaseAtComplete) {
            return self.admission.is_clear_of_running(position);
        }
        if self.peers.is_empty() { self.admission.is_clear(position) } else { self.admission.is_clear_on_all(position) }
    }

    /// The store finished something.
    pub(super) fn completed(
        &mut self,
        operation: OperationId,
        result: Result<(), DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        let Some(position) = self.admission.running(operation) else {
            return self.completed_in_background(operation, result, outputs);
        };
        let entry = self.admission.entries()[position];
        if entry.request == Request::Flush {
            self.note_flush(result);
        }
        if entry.phase == Phase::Draining(operation) {
            self.admission.at(position).phase = Phase::Queued;
            return self.fence_what_waits(outputs);
        }
        if entry.tag.is_copy() {
            return self.copied_here(position, result, outputs);
        }
        if result == Err(DiskError::NoSpace) && waits_for_space(entry.request) {
            self.admission.at(position).phase = Phase::NoSpace;
            return self.refuse_seals(outputs);
        }
        let superseded = !self.may_read(entry.request);
        let broken = matches!(result, Err(DiskError::Failed | DiskError::Corrupt));
        // What a disk finds after it has failed a flush may be older than what was acknowledged.
        let doubtful = self.flush_failed && matches!(entry.request, Request::Read(_));
        let fails = (broken || doubtful) && self.may_have_secondaries();
        if broken && !self.peers.is_empty() && entry.request.range().is_none_or(|_| entry.request.is_mutation()) {
            self.health = self.health.max(Health::Damaged);
        }
        if fails {
            self.health = Health::Failed;
        }
        if broken && entry.tag == FLUSH {
            return self.own_flush_failed();
        }
        let entry = self.admission.at(position);
        entry.result = result;
        entry.awaits = entry.awaits.without(Awaits::LOCAL);
        if fails {
            // Never guess: the request stays unanswered until another copy is primary.
            entry.phase = Phase::Queued;
        } else if superseded {
            entry.phase = Phase::Queued;
        } else {
            self.answer_if_all_did(position, outputs);
        }
    }

    fn completed_in_background(
        &mut self,
        operation: OperationId,
        result: Result<(), DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        if let Some(at) = self.orphans.iter().position(|orphan| orphan.operation == operation) {
            if self.orphans.swap_remove(at).is_flush {
                self.note_flush(result);
            }
        } else if self.guard == Guard::Flushing(operation) {
            self.note_flush(result);
            if result.is_err() {
                self.health = Health::Failed;
            }
            self.guard = if result.is_ok() { Guard::Flushed } else { Guard::Open };
            self.answer_what_all_did(outputs);
        } else if self.hot.is_writing(operation) {
            // A copy that cannot mark starts no write any more.
            if result.is_err() {
                self.health = Health::Failed;
            }
            self.hot.written(result.is_ok());
            self.start_what_is_marked(outputs);
            self.start_what_is_clear(outputs);
            self.start_applies(outputs);
        } else if self.persisting.as_ref().is_some_and(|persisting| persisting.operation == operation) {
            self.persisted(result, outputs);
        } else {
            self.applied(operation, result, outputs);
        }
    }

    /// After a flush that failed, what it should have covered may be gone, and none that succeeds later says that it is not.
    pub(super) fn note_flush(&mut self, result: Result<(), DiskError>) {
        if result.is_ok() || planted!(self, ForgetFailedFlush) {
            return;
        }
        (self.flush_failed, self.record.intact) = (true, false);
        if self.role == Role::Primary(Primary::Reconciling) {
            // What is read here may be older than what others have: they are asked instead.
            self.abandon_copying();
        }
        if self.is_primary() && !self.peers.is_empty() {
            let worst = if self.may_have_secondaries() { Health::Failed } else { Health::Damaged };
            self.health = self.health.max(worst);
        }
    }

    /// Completes an entry that waits for nobody any more.
    pub(super) fn answer_if_all_did(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let entry = self.admission.entries()[position];
        let mut missing = entry.awaits;
        if planted!(self, AnswerBeforePeers) && entry.request.is_mutation() {
            missing.0 &= Awaits::LOCAL.0;
        }
        if planted!(self, FlushHereOnly) && entry.request == Request::Flush {
            missing.0 &= Awaits::LOCAL.0;
        }
        // Persist, then promise: acks under a configuration count only when it is durable here.
        if !matches!(entry.phase, Phase::Started(_)) || !missing.is_empty() {
            return;
        }
        if entry.tag.is_copy() {
            return self.copied_there(position, outputs);
        }
        if entry.tag != FLUSH && self.holds_answers() && !matches!(entry.request, Request::Read(_)) {
            return;
        }
        if entry.request == Request::Flush && entry.result.is_ok() {
            self.flushed_on_all(entry.serial, entry.covers, outputs);
        } else if planted!(self, ClearAtAnswer) {
            self.flushed_on_all(entry.serial, entry.serial.next(), outputs);
        }
        if entry.tag == FLUSH {
            self.admission.remove_own(FLUSH);
            self.own_flush_done(entry);
            return;
        }
        self.admission.at(position).phase = Phase::Completed;
        outputs.push(Output::Complete { tag: entry.tag, result: entry.result });
        if !self.peers.is_empty() || planted!(self, ReleaseAtComplete) {
            self.start_what_is_clear(outputs);
        }
    }

    /// Where other copies follow, a seal waits for the writes before it and holds those after it: behind one that has no space it
    /// would stop the volume, and it would be refused for the same reason.
    fn refuse_seals(&mut self, outputs: &mut Vec<Output>) {
        let full = self.admission.entries().iter().position(|entry| entry.phase == Phase::NoSpace);
        let Some(full) = full.filter(|_| !self.peers.is_empty()) else { return };
        let mut refused = false;
        let is_seal = |entry: &&mut Entry| entry.phase == Phase::Queued && matches!(entry.request, Request::Seal(_));
        for entry in self.admission.iter_mut().skip(full).filter(is_seal) {
            (entry.phase, refused) = (Phase::Completed, true);
            outputs.push(Output::Complete { tag: entry.tag, result: Err(DiskError::NoSpace) });
        }
        if refused {
            self.start_what_is_clear(outputs);
        }
    }

    /// Tries again what the pool had no space for, here only: the peers have it.
    pub(super) fn space_freed(&mut self, outputs: &mut Vec<Output>) {
        for position in 0..self.admission.entries().len() {
            if self.admission.entries()[position].phase == Phase::NoSpace {
                self.start_here(position, outputs);
            }
        }
    }

    /// This copy stops being primary, or begins anew: what the disk still executes must end first.
    pub(super) fn suspend_requests(&mut self, overtaken: bool) {
        self.abandon_copying();
        if let Some(at) = self.admission.own(FLUSH) {
            let running = self.admission.entries()[at].running();
            self.orphans.extend(running.map(|operation| Orphan { operation, is_flush: true }));
            self.admission.remove_own(FLUSH);
        }
        let overtaken = overtaken && !planted!(self, ForgetFence);
        let again = planted!(self, RequeueCompleted);
        for entry in self.admission.iter_mut() {
            match entry.phase {
                Phase::Completed if again => entry.phase = Phase::Queued,
                Phase::Started(operation) if entry.awaits.contains(Awaits::LOCAL) => {
                    entry.phase = Phase::Draining(operation);
                }
                Phase::Marking | Phase::Started(_) | Phase::NoSpace => entry.phase = Phase::Queued,
                Phase::Queued | Phase::Draining(_) | Phase::Completed => {}
            }
            entry.fenced |= overtaken;
        }
    }

    /// Answers what another primary has overtaken, and what nobody will ever ask this copy to serve.
    pub(super) fn fence_what_waits(&mut self, outputs: &mut Vec<Output>) {
        let here = self.may_serve_later();
        for entry in self.admission.iter_mut() {
            if entry.phase == Phase::Queued && !entry.tag.is_own() && (entry.fenced || !here) {
                entry.phase = Phase::Completed;
                outputs.push(Output::Complete { tag: entry.tag, result: Err(DiskError::Fenced) });
            }
        }
    }

    /// The device that asked under these tags is given up.
    pub(super) fn fence_requests(&mut self, below: Tag, outputs: &mut Vec<Output>) {
        self.admission.iter_mut().filter(|entry| entry.tag.0 < below.0).for_each(|entry| entry.fenced = true);
        self.fence_what_waits(outputs);
    }

    /// This copy is primary, may become it, or does not know yet.
    fn may_serve_later(&self) -> bool {
        let me = Some(self.me);
        let wished = self.wish.as_ref().is_none_or(|wish| wish.primary == me);
        wished || self.record.configuration.primary == me
    }

    pub(super) fn buffer(request: Request, tag: Tag) -> Buffer {
        if matches!(request, Request::Write(_)) { Buffer::Request(tag) } else { Buffer::None }
    }

    /// Sends what an entry waits for to the peers that have joined, or only to one of them.
    pub(super) fn send_prepares(&self, position: usize, only: Option<usize>, outputs: &mut Vec<Output>) {
        let entry = self.admission.entries()[position];
        let floor = self.lowest_owed();
        for (index, peer) in self.peers.iter().enumerate() {
            let (Some(frame), None | Some(true)) = (self.link(peer), only.map(|only| only == index)) else { continue };
            if !entry.awaits.contains(Awaits::peer(index)) {
                continue;
            }
            let (message, buffer) = if entry.tag.is_copy() {
                let Some(asked) = self.copying_sends(entry, frame, floor) else { continue };
                asked
            } else {
                let (serial, request) = (entry.serial, entry.request);
                (Message::Prepare { frame, serial, floor, request }, Self::buffer(request, entry.tag))
            };
            outputs.push(Output::Send { to: peer.copy, message, buffer });
        }
    }
}

/// No space is never an error of the device: only an operator's seal is refused for want of it.
fn waits_for_space(request: Request) -> bool {
    match request {
        Request::Read(_) | Request::Write(_) | Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) => true,
        Request::Seal(_) => false,
    }
}
