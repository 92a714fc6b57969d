//! How a primary makes copies equal: reconcile (the hot extents of all members, before it serves) and resync (what a
//! candidate lacks, beside the application's requests).
//!
//! ```text
//!   plan ─> what is missing next ─> held in the order of requests ─> made equal (`pieces.rs`) ─┐
//!            ^        (several at a time, at the pace that the application leaves)             │
//!            └──────────────────────── answered by all targets <───────────────────────────────┘
//!   the plan has ended, and nothing of it is under way ─> a flush everywhere ─> equal
//! ```
//! # Invariants
//! * A range is held like a write's until every target has answered, so a copied range never lands on a newer write.
//! * Application writes go to a candidate before its plan is made, and those that began earlier have ended: whatever
//!   the plan cannot know is sent to it.
//! * After the last range, one flush on every copy covers what was written before the marks began. Only then is the
//!   candidate equal, and only the committed configuration makes it a member.
//! * One plan of one volume at a time, and at most [`MAX_PIECES`](super::MAX_PIECES) ranges of it, which never overlap; a
//!   copy that fails ends the work, which begins again when it joins again.

use super::admission::{Awaits, Entry, FLUSH};
use super::configuration::Lacks;
use super::hot::{Extent, MAX_HOT_EXTENTS, MAX_MARKS, extents};
use super::interface::{Output, Primary, Record, Role, Suspects};
use super::message::SerialNumber;
use super::patience::Because;
use super::piece::Missing;
use super::pieces::Copied;
use super::primary::Peer;
use super::replica::{Health, Orphan, Replica};
use super::view::Progress;
use super::{DiskError, OperationId, Request};
use crate::volume::InstanceId;
use std::collections::BTreeSet;

/// Most marks of a candidate whose resync can end: this primary's writes may need as many more as one copy makes.
const MAX_CANDIDATE_MARKS: usize = MAX_MARKS - MAX_HOT_EXTENTS;

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
    pub(super) source: Option<usize>,
    pub(super) targets: Awaits,
    stage: Stage,
    /// What is under way.
    pub(super) pieces: Vec<Copied>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    /// The store looks for what is missing next.
    Planning(OperationId),
    /// There may be more in the plan.
    Copying,
    /// There is not: what is under way is the last.
    Ended,
    /// All ranges are done; `true`: the flush has begun.
    Flushing(bool),
}

#[cfg(test)]
impl Copying {
    /// Whether this copy fetches what it lost.
    pub fn has_source(&self) -> bool {
        self.source.is_some()
    }

    pub fn rename(&mut self, name: impl Fn(OperationId) -> OperationId) {
        if let Stage::Planning(operation) = &mut self.stage {
            *operation = name(*operation);
        }
        self.pieces.iter_mut().for_each(|copied| copied.rename(&name));
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
        // What lacks everything forgets its marks with the next term, and has room for those of the resync.
        let is_crowded = peer.hot.len() > MAX_CANDIDATE_MARKS;
        peer.anew |= is_crowded && !self.record.configuration.lacks_everything(peer.copy);
        peer.sync = if peer.out || peer.anew { Sync::Idle } else { Sync::Joining(since) };
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
        self.look_for_more(outputs);
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
        // What waited for room for its marks may need none any more.
        (self.disk_rests, self.released) = (true, true);
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
        let here = |peer: &Peer| peer.joined && !peer.out;
        // One that lost writes may not drop who is silent, but whoever kept everything makes it whole without them.
        let saved = !own && self.peers.iter().any(|peer| peer.member && here(peer) && peer.intact);
        let missing = |peer: &Peer| peer.member && !here(peer) && !(saved && peer.out);
        if !self.may_copy() || self.persisting.is_some() || self.peers.iter().any(missing) || self.has_lost_writes() {
            return;
        }
        let intact = |peer: &Peer| peer.member && here(peer) && peer.intact;
        // If nobody kept everything, unflushed writes may be lost: any copy will do, as long as it is one for all.
        let source = if own { None } else { self.peers.iter().position(intact) };
        let mut hot: Vec<Extent> = self.hot.extents();
        hot.extend(self.peers.iter().filter(|peer| peer.member && here(peer)).flat_map(|peer| peer.hot.iter()));
        hot.sort_unstable();
        hot.dedup();
        let from = source.map_or(Awaits::default(), Awaits::peer);
        let targets = self.bits(|peer| peer.member && here(peer)).without(from);
        self.copying = Some(Copying { candidate: None, source, targets, stage: Stage::Copying, pieces: Vec::new() });
        if hot.is_empty() || (targets.is_empty() && source.is_none()) || planted!(self, SkipReconcile) {
            return self.reconciled_all(outputs);
        }
        self.plan(None, Suspects::Marked(hot.into()), outputs);
    }

    /// Whether all members are here and none has every acknowledged write, which the configuration does not say yet.
    pub(super) fn has_lost_writes(&self) -> bool {
        let lacks = |peer: &Peer| !peer.member || (peer.joined && !peer.out && !peer.intact);
        self.role == Role::Primary(Primary::Reconciling)
            && !self.record.intact
            && !self.record.configuration.says_what_is_lost()
            && self.peers.iter().all(lacks)
    }

    fn begin_resync(&mut self, outputs: &mut Vec<Output>) {
        if !self.may_copy() {
            return;
        }
        let lowest = self.lowest_unanswered();
        let ready = |peer: &Peer| matches!(peer.sync, Sync::Joining(since) if lowest >= since);
        let Some(position) = self.peers.iter().position(ready) else { return };
        let peer = &mut self.peers[position];
        peer.sync = Sync::Copying;
        let copy = peer.copy;
        let lacks = self.record.configuration.candidates.get(&copy).copied();
        let targets = Awaits::peer(position);
        let candidate = Some(copy);
        self.copying = Some(Copying { candidate, source: None, targets, stage: Stage::Copying, pieces: Vec::new() });
        if planted!(self, AdmitUnsynced) {
            return self.stage(Stage::Flushing(false));
        }
        let suspects = self.suspects(position);
        self.plan(lacks, suspects, outputs);
    }

    /// Where a candidate may differ beside what was written since it left. One that has kept what it had answered: only where it
    /// had not. Any other: wherever something was not flushed when it left, or since.
    fn suspects(&self, position: usize) -> Suspects {
        let Peer { intact, hot, unanswered, .. } = &self.peers[position];
        let kept = *intact || planted!(self, TrustLostCopy);
        match unanswered {
            Some(unanswered) if kept && self.health == Health::Sound => Suspects::Unanswered(unanswered.clone()),
            _ if planted!(self, ForgetCandidatesMarks) => Suspects::Marked(Box::default()),
            Some(_) | None => Suspects::Marked(hot.clone()),
        }
    }

    /// Where a copy that leaves may differ from this one, as long as neither loses its caches: they were equal when this
    /// primary began to serve, or when it admitted that copy, and each has executed since then whatever the other has, but
    /// for what is still waited for. All of that is marked, so there is no more than there may be marks.
    pub(super) fn unanswered_by(&self, peer: &Peer) -> Option<Box<[Extent]>> {
        if !peer.member {
            return peer.unanswered.clone();
        }
        if self.role != Role::Primary(Primary::Serving) || self.health != Health::Sound {
            return None;
        }
        if planted!(self, ForgetUnanswered) {
            return Some(Box::default());
        }
        let began = self.admission.entries().iter().filter(|entry| entry.is_started() && entry.request.is_mutation());
        let touched: BTreeSet<Extent> = began.filter_map(|entry| entry.request.range()).flat_map(extents).collect();
        Some(touched.into_iter().collect())
    }

    fn plan(&mut self, lacks: Option<Lacks>, suspects: Suspects, outputs: &mut Vec<Output>) {
        let operation = self.operation();
        outputs.push(Output::Plan { operation, lacks, suspects });
        (self.progress, self.rests_until) = (Progress::default(), self.now);
        self.stage(Stage::Planning(operation));
    }

    fn stage(&mut self, stage: Stage) {
        if let Some(copying) = &mut self.copying {
            copying.stage = stage;
        }
    }

    /// The store has found what is missing next, or the end. An answer to work that was given up means nothing.
    pub(super) fn planned(
        &mut self,
        operation: OperationId,
        missing: Result<Option<Missing>, DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        let Some(copying) = self.copying.as_mut().filter(|copying| copying.stage == Stage::Planning(operation)) else {
            return;
        };
        match missing {
            Ok(Some(missing)) => {
                copying.stage = Stage::Copying;
                self.hold(missing, outputs);
            }
            Ok(None) => copying.stage = Stage::Ended,
            Err(error) => self.cannot_copy(error),
        }
    }

    /// Asks the store for more if more may be under way, and ends what has none.
    fn look_for_more(&mut self, outputs: &mut Vec<Output>) {
        let may = self.may_hold_more();
        let early = planted!(self, FlushBesidePieces);
        let Some(copying) = &mut self.copying else { return };
        match copying.stage {
            Stage::Copying if may => {
                let operation = self.operation();
                outputs.push(Output::NextRange { operation });
                self.stage(Stage::Planning(operation));
            }
            Stage::Ended if !copying.pieces.is_empty() && !early => {}
            Stage::Ended if copying.candidate.is_some() => copying.stage = Stage::Flushing(false),
            Stage::Ended => self.reconciled_all(outputs),
            Stage::Copying | Stage::Planning(_) | Stage::Flushing(_) => {}
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

    /// This copy's disk has failed to find or to read what is copied.
    pub(super) fn cannot_copy(&mut self, error: DiskError) {
        // Tried again with the next tick: by then there may be space, and a disk that fails at once is not asked without end.
        self.copying_waits = true;
        match self.candidate_of_sole_member() {
            _ if error == DiskError::NoSpace => {}
            // Nobody else could serve the volume. That candidate rests; what the application asks for goes on.
            Some(candidate) => self.give_up(candidate, Because::Unread),
            None => self.health = Health::Failed,
        }
        self.abandon_copying();
    }

    /// The candidate that the only member makes equal to itself.
    fn candidate_of_sole_member(&self) -> Option<usize> {
        let alone = self.role == Role::Primary(Primary::Serving) && !self.may_have_secondaries();
        let candidate = self.copying.as_ref().and_then(|copying| copying.candidate).filter(|_| alone)?;
        self.peers.iter().position(|peer| peer.copy == candidate)
    }

    /// Gives the work up; what the disk still does for it is waited for where it matters.
    pub(super) fn abandon_copying(&mut self) {
        if self.copying.take().is_none() {
            return;
        }
        if let Some(running) = self.admission.remove_copies() {
            self.orphans.extend(running.into_iter().map(|operation| Orphan { operation, is_flush: false }));
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
