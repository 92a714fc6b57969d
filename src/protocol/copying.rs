//! How a primary makes copies equal: reconcile (the hot extents of all members, before it serves) and resync (what a
//! candidate lacks, beside the application's requests).
//!
//! ```text
//!   plan ─> range ─> held in the order of requests ─┬─────────────────────────> read here ─> write there ─┐
//!            ^                                      └─> fetch ─> write here ──┘ (this copy lost writes)   │
//!            └────────────────────────────────────── answered by all targets <────────────────────────────┘
//! ```
//! # Invariants
//! * A range is held like a write's until every target has answered, so a copied range never lands on a newer write.
//! * Application writes go to a candidate before its plan is made, and those that began earlier have ended: whatever
//!   the plan cannot know is sent to it.
//! * After the last range, one flush on every copy covers what was written before the marks began. Only then is the
//!   candidate equal, and only the committed configuration makes it a member.
//! * One range of one volume at a time; a copy that fails ends the work, which begins again when it joins again.

use super::admission::{Awaits, COPY, Entry, FLUSH, Phase};
use super::configuration::Lacks;
use super::hot::Extent;
use super::interface::{Output, Primary, Record, Role};
use super::message::{Buffer, SerialNumber};
use super::replica::{Health, Replica};
use super::{DiskError, OperationId, Request};
use crate::volume::{BlockRange, InstanceId};

/// How far a candidate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sync {
    /// Not joined: nothing is sent to it.
    Idle,
    /// Writes are sent to it; those before this serial still run without it.
    Joining(SerialNumber),
    /// The plan is being copied.
    Copying,
    /// All ranges are copied, and flushed there and here.
    Equal,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Copying {
    /// The candidate, or all members.
    candidate: Option<InstanceId>,
    /// Whose data it is, if not this copy's own.
    source: Option<usize>,
    targets: Awaits,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// The store looks for the next range.
    Planning(OperationId),
    /// It waits for its place among the requests.
    Queued,
    /// From the source.
    Fetching,
    /// Into this copy.
    Writing,
    /// From this copy.
    Reading,
    /// To the targets, out of this buffer.
    Sending(OperationId),
    /// All ranges are done; `true`: the flush has begun.
    Flushing(bool),
}

#[cfg(test)]
impl Copying {
    /// Whose bytes are being sent.
    pub fn buffer(&self) -> Option<OperationId> {
        if let Stage::Sending(operation) = self.stage { Some(operation) } else { None }
    }

    /// Whether this copy fetches what it lost.
    pub fn has_source(&self) -> bool {
        self.source.is_some()
    }

    pub fn rename(&mut self, name: impl Fn(OperationId) -> OperationId) {
        if let Stage::Planning(operation) | Stage::Sending(operation) = &mut self.stage {
            *operation = name(*operation);
        }
    }
}

impl Replica {
    /// Sends a candidate all writes from now on.
    pub(super) fn begin_sync(&mut self, position: usize, outputs: &mut Vec<Output>) {
        self.abandon_copying_to(position);
        let bit = Awaits::peer(position);
        // What is under way may have reached a former life of it, or nobody: the plan has it.
        self.stop_awaiting(bit, outputs);
        let since = self.next_serial;
        let peer = &mut self.peers[position];
        // Giving up what was copied to its former session forgets that it has joined.
        peer.joined = true;
        peer.sync = if peer.out { Sync::Idle } else { Sync::Joining(since) };
    }

    /// Begins the next piece of copying work, and the core's own flushes.
    pub(super) fn advance_copying(&mut self, outputs: &mut Vec<Output>) {
        self.release_candidates(outputs);
        match self.role {
            Role::Primary(_) if self.adoption.is_some() => return,
            Role::Primary(Primary::Reconciling) => self.begin_reconcile(outputs),
            Role::Primary(Primary::Serving) => self.begin_resync(outputs),
            Role::Primary(Primary::Settling) | Role::Secondary | Role::Candidate | Role::Outdated => return,
        }
        let leaves = self.leaves() && self.is_quiet() && !self.flushed;
        let copied = self.copying.as_ref().is_some_and(|copying| copying.stage == Stage::Flushing(false));
        let serves = self.role == Role::Primary(Primary::Serving);
        let may_flush = serves && !self.disk_rests && self.admission.own(FLUSH).is_none();
        if may_flush && (leaves || copied || self.wants_room()) {
            if let Some(copying) = self.copying.as_mut().filter(|_| copied) {
                copying.stage = Stage::Flushing(true);
            }
            self.requested(FLUSH, Request::Flush, outputs);
        }
    }

    /// A flush of the core's own is done on every copy.
    pub(super) fn own_flush_done(&mut self, flush: Entry) {
        // Whatever ran when it began, or was started since, is not covered.
        let covers_all = flush.covers == flush.serial && self.next_serial == flush.serial.next();
        self.flushed = covers_all && self.leaves() && self.is_quiet();
        let Some(copying) = &self.copying else { return };
        if copying.stage == Stage::Flushing(true) {
            let candidate = copying.candidate;
            self.copying = None;
            if let Some(peer) = self.peers.iter_mut().find(|peer| Some(peer.copy) == candidate) {
                peer.sync = Sync::Equal;
            }
        }
    }

    /// This copy's disk has failed it: what it was for asks for another one, but not at once.
    pub(super) fn own_flush_failed(&mut self) {
        self.admission.remove_own(FLUSH);
        self.disk_rests = true;
        if self.copying.as_ref().is_some_and(|copying| copying.stage == Stage::Flushing(true)) {
            self.stage(Stage::Flushing(false));
        }
    }

    /// What was given up may still write here, or read into the buffer.
    fn may_copy(&self) -> bool {
        self.copying.is_none() && !self.copying_waits && self.orphans.is_empty()
    }

    /// When all members have answered under this term, their hot extents are made equal.
    fn begin_reconcile(&mut self, outputs: &mut Vec<Output>) {
        let own = self.record.intact;
        let here = |peer: &super::primary::Peer| peer.joined && !peer.out;
        // One that lost writes may not drop who is silent, but whoever kept everything makes it whole without them.
        let saved = !own && self.peers.iter().any(|peer| peer.member && here(peer) && peer.intact);
        let missing = |peer: &super::primary::Peer| peer.member && !here(peer) && !(saved && peer.out);
        if !self.may_copy() || self.persisting.is_some() || self.peers.iter().any(missing) {
            return;
        }
        let intact = |peer: &super::primary::Peer| peer.member && here(peer) && peer.intact;
        // If nobody kept everything, unflushed writes may be lost: any copy will do, as long as it is one for all.
        let source = if own { None } else { self.peers.iter().position(intact) };
        let mut hot: Vec<Extent> = self.hot.extents();
        hot.extend(self.peers.iter().filter(|peer| peer.member && here(peer)).flat_map(|peer| peer.hot.iter()));
        hot.sort_unstable();
        hot.dedup();
        let from = source.map_or(Awaits::default(), Awaits::peer);
        let targets = self.bits(|peer| peer.member && here(peer)).without(from);
        self.copying = Some(Copying { candidate: None, source, targets, stage: Stage::Queued });
        if hot.is_empty() || (targets.is_empty() && source.is_none()) || planted!(self, SkipReconcile) {
            return self.reconciled_all(outputs);
        }
        self.plan(None, hot.into(), outputs);
    }

    fn begin_resync(&mut self, outputs: &mut Vec<Output>) {
        if !self.may_copy() {
            return;
        }
        let lowest = self.lowest_unanswered();
        let ready = |peer: &super::primary::Peer| matches!(peer.sync, Sync::Joining(since) if lowest >= since);
        let Some(position) = self.peers.iter().position(ready) else { return };
        let peer = &mut self.peers[position];
        peer.sync = Sync::Copying;
        let (copy, hot) = (peer.copy, peer.hot.clone());
        let lacks = self.record.configuration.candidates.get(&copy).copied();
        let targets = Awaits::peer(position);
        self.copying = Some(Copying { candidate: Some(copy), source: None, targets, stage: Stage::Queued });
        if planted!(self, AdmitUnsynced) {
            self.planned_all(outputs);
            return;
        }
        self.plan(lacks, if planted!(self, ForgetCandidatesMarks) { Box::default() } else { hot }, outputs);
    }

    fn plan(&mut self, lacks: Option<Lacks>, hot: Box<[Extent]>, outputs: &mut Vec<Output>) {
        let operation = self.operation();
        outputs.push(Output::Plan { operation, lacks, hot });
        self.stage(Stage::Planning(operation));
    }

    fn stage(&mut self, stage: Stage) {
        if let Some(copying) = &mut self.copying {
            copying.stage = stage;
        }
    }

    /// The store has found the next range, or the end. An answer to work that was given up means nothing.
    pub(super) fn planned(
        &mut self,
        operation: OperationId,
        range: Result<Option<BlockRange>, DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        if self.copying.as_ref().is_none_or(|copying| copying.stage != Stage::Planning(operation)) {
            return;
        }
        match range {
            Ok(Some(range)) => {
                self.stage(Stage::Queued);
                self.requested(COPY, Request::Write(range), outputs);
            }
            Ok(None) => self.planned_all(outputs),
            Err(_) => self.health = Health::Failed,
        }
    }

    fn planned_all(&mut self, outputs: &mut Vec<Output>) {
        if self.copying.as_ref().is_some_and(|copying| copying.candidate.is_some()) {
            self.stage(Stage::Flushing(false));
        } else {
            self.reconciled_all(outputs);
        }
    }

    /// All members are equal: each makes durable that it is, this one too.
    fn reconciled_all(&mut self, outputs: &mut Vec<Output>) {
        self.copying = None;
        self.role = Role::Primary(Primary::Settling);
        if !self.record.intact {
            self.persist(Record { intact: true, ..self.record.clone() }, outputs);
        }
        for position in 0..self.peers.len() {
            self.send_everything(position, outputs);
        }
    }

    /// The range has its place among the requests: nobody else changes it from now on.
    pub(super) fn start_copying(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let Some(copying) = &self.copying else { return };
        let Some(source) = copying.source else { return self.read_range(position, outputs) };
        let (operation, serial) = (self.operation(), self.serial());
        let entry = self.admission.at(position);
        entry.phase = Phase::Started(operation);
        (entry.serial, entry.awaits) = (serial, Awaits::peer(source));
        self.stage(Stage::Fetching);
        self.send_prepares(position, None, outputs);
    }

    fn read_range(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let Some(range) = self.admission.entries()[position].request.range() else { return };
        let (operation, serial) = (self.operation(), self.serial());
        let entry = self.admission.at(position);
        entry.phase = Phase::Started(operation);
        (entry.serial, entry.awaits, entry.owed) = (serial, Awaits::LOCAL, 0);
        self.stage(Stage::Reading);
        outputs.push(Output::ReadRange { operation, range });
    }

    /// What the peers are asked for in this stage.
    pub(super) fn copying_sends(&self, request: Request) -> (Request, Buffer) {
        match (self.copying.as_ref().map(|copying| copying.stage), request.range()) {
            (Some(Stage::Sending(read)), _) => (request, Buffer::Operation(read)),
            (_, Some(range)) => (Request::Read(range), Buffer::None),
            (_, None) => (request, Buffer::None),
        }
    }

    /// This copy's disk has read or written the range.
    pub(super) fn copied_here(&mut self, position: usize, result: Result<(), DiskError>, outputs: &mut Vec<Output>) {
        let Some(copying) = &self.copying else { return };
        let (stage, targets) = (copying.stage, copying.targets);
        let Phase::Started(operation) = self.admission.entries()[position].phase else { return };
        let entry = self.admission.at(position);
        entry.awaits = Awaits::default();
        if let Err(error) = result {
            // Tried again with the next tick: by then there may be space, and a disk that fails at once is not asked without end.
            self.copying_waits = true;
            if error != DiskError::NoSpace {
                self.health = Health::Failed;
            }
            return self.abandon_copying();
        }
        match stage {
            Stage::Writing if targets.is_empty() => self.range_done(outputs),
            Stage::Writing => self.read_range(position, outputs),
            Stage::Reading => {
                entry.awaits = targets;
                self.stage(Stage::Sending(operation));
                self.send_prepares(position, None, outputs);
            }
            Stage::Planning(_) | Stage::Queued | Stage::Fetching | Stage::Sending(_) | Stage::Flushing(_) => {}
        }
    }

    /// All peers that were asked have answered.
    pub(super) fn copied_there(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let Some(copying) = &self.copying else { return };
        match (copying.stage, copying.source) {
            (Stage::Fetching, Some(source)) => {
                let operation = self.operation();
                let from = self.peers[source].copy;
                let entry = self.admission.at(position);
                entry.phase = Phase::Started(operation);
                entry.awaits = Awaits::LOCAL;
                let (serial, request) = (entry.serial, entry.request);
                self.stage(Stage::Writing);
                outputs.push(Output::Apply { operation, from, serial, request });
            }
            (Stage::Sending(_), _) => self.range_done(outputs),
            _ => {}
        }
    }

    fn range_done(&mut self, outputs: &mut Vec<Output>) {
        self.admission.remove_own(COPY);
        let operation = self.operation();
        self.stage(Stage::Planning(operation));
        outputs.push(Output::NextRange { operation });
        self.start_what_is_clear(outputs);
    }

    /// Gives the work up; what the disk still does for it is waited for where it matters.
    pub(super) fn abandon_copying(&mut self) {
        if self.copying.take().is_none() {
            return;
        }
        if let Some(position) = self.admission.own(COPY) {
            self.orphans.extend(self.admission.entries()[position].running());
            self.admission.remove_own(COPY);
            self.released = true;
        }
        for peer in &mut self.peers {
            if matches!(peer.sync, Sync::Copying) {
                peer.sync = Sync::Idle;
                peer.joined = false;
            }
        }
    }

    /// Gives the work up if it is for this peer.
    pub(super) fn abandon_copying_to(&mut self, position: usize) {
        let copy = self.peers[position].copy;
        if self.copying.as_ref().is_some_and(|copying| copying.candidate == Some(copy)) {
            self.abandon_copying();
        }
    }
}
