//! How a copy proposes, learns and adopts configurations: who decides.
//!
//! # Invariants
//! * A proposal is one version above what is durable here, and there is one at a time. Until it is resolved it counts as
//!   committed and as not committed: acks are awaited from the members of both.
//! * An ambiguous answer is read back; if the catalogue still has the old version, the very same proposal is repeated,
//!   because the first one may still arrive.
//! * A copy is primary only under a term that it committed itself since it was started: an older proposal of its own
//!   that is committed late makes nobody primary, and serial numbers are unique in a term.
//! * A configuration is durable before anything is done or answered under it, and nothing that was started under the
//!   one before runs any more, unless both are this primary's own.
//! * Only members propose; only the primary drops, admits and adds copies. A primary that may lack acknowledged writes
//!   drops nobody.
//! * A term in which no member has every acknowledged write says so ([`Configuration::lost`]) before it serves. A copy that
//!   lacks something counts as intact again only by that, or by being made equal to one that is.

use super::OperationId;
use super::configuration::{Configuration, Lacks, MAX_COPIES, Stamp};
use super::interface::{Output, Primary, Record, Role};
use super::marks::Clearing;
use super::message::{Buffer, Message, SerialNumber};
use super::primary::Peer;
use super::replica::{Health, Orphan, Replica};
use crate::volume::InstanceId;

/// What became of a proposal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It is the configuration now.
    Committed,
    /// Another one was committed before; this is the one in the catalogue.
    Lost(Box<Configuration>),
    /// No answer: it may be committed, be committed later, or never.
    Ambiguous,
}

/// A configuration that is committed and not yet durable here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Adoption {
    configuration: Configuration,
    /// This copy proposed it since it was started.
    mine: bool,
}

impl Adoption {
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }
}

/// Before a primary proposes to go on without a member, everything that it acknowledged is on its own stable media, and
/// nothing is acknowledged meanwhile: the proposal may be committed after it has lost power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Guard {
    /// Requests may be acknowledged.
    Open,
    /// Its disk is being flushed.
    Flushing(OperationId),
    /// It may drop the members that are out.
    Flushed,
}

/// A record on its way to stable media.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Persisting {
    pub operation: OperationId,
    record: Record,
}

impl Replica {
    /// The newest configuration that this copy knows.
    fn known(&self) -> Stamp {
        self.adoption.as_ref().map_or(self.record.configuration.stamp, |adoption| adoption.configuration.stamp)
    }

    pub(super) fn proposed(&mut self, stamp: Stamp, outcome: Outcome, outputs: &mut Vec<Output>) {
        let Some(next) = self.proposal.as_ref().filter(|next| next.stamp == stamp).cloned() else { return };
        match outcome {
            Outcome::Committed => {
                self.proposal = None;
                self.learn(next, true, outputs);
            }
            Outcome::Lost(current) => self.resolve(next, *current, outputs),
            Outcome::Ambiguous if planted!(self, AmbiguousIsLost) => self.proposal = None,
            Outcome::Ambiguous => outputs.push(Output::ReadConfiguration),
        }
    }

    /// The catalogue said what is committed.
    pub(super) fn configuration_read(&mut self, current: Configuration, outputs: &mut Vec<Output>) {
        self.informed = true;
        match self.proposal.clone() {
            Some(next) if current.stamp < next.stamp => {
                let expected = self.record.configuration.stamp;
                outputs.push(Output::Propose { expected, next: Box::new(next) });
            }
            Some(next) => self.resolve(next, current, outputs),
            None => self.learn(current, false, outputs),
        }
    }

    /// The version that was proposed is taken, by `next` itself or by another one.
    fn resolve(&mut self, next: Configuration, current: Configuration, outputs: &mut Vec<Output>) {
        self.proposal = None;
        if planted!(self, LostIsCommitted) {
            return self.learn(next, true, outputs);
        }
        let mine = current == next;
        self.learn(current, mine, outputs);
    }

    /// Takes in a committed configuration.
    pub(super) fn learn(&mut self, configuration: Configuration, mine: bool, outputs: &mut Vec<Output>) {
        if configuration.stamp <= self.known() {
            return;
        }
        if self.proposal.as_ref().is_some_and(|next| next.stamp <= configuration.stamp) {
            self.proposal = None;
        }
        let continues = mine
            && self.is_primary()
            && configuration.term == self.record.configuration.term
            && configuration.primary == Some(self.me);
        if !continues {
            // Whoever else was primary in between may have acknowledged what these requests would overwrite.
            let (me, was) = (Some(self.me), self.record.configuration.primary);
            let overtaken = was == me && configuration.primary != me;
            if overtaken {
                outputs.push(Output::FenceDevice);
            }
            self.suspend_requests(overtaken);
            self.peers.clear();
            self.role = Self::follower(&self.record.configuration, self.me);
        }
        self.adoption = Some(Adoption { configuration, mine });
        // What was overtaken is answered before that is durable: another life of this copy would not know it any more.
        self.fence_what_waits(outputs);
        self.adopt_if_drained(outputs);
    }

    /// Makes what was learned durable, when nothing of the one before runs any more.
    pub(super) fn adopt_if_drained(&mut self, outputs: &mut Vec<Output>) {
        let Some(adoption) = &self.adoption else { return };
        if self.disk_rests || self.persisting.is_some() || !(self.is_primary() || self.is_drained()) {
            return;
        }
        let configuration = adoption.configuration.clone();
        // What a copy alone has is all there is, from the configuration on that says so: not from a late one of a former life,
        // which knew of nothing that is gone.
        let alone = configuration.primary == Some(self.me) && configuration.secondaries.is_empty();
        let counts = alone && configuration.lost == configuration.stamp;
        let lacks = configuration.candidates.get(&self.me);
        let keeps = configuration.is_member(self.me) || matches!(lacks, Some(Lacks::Since(_)));
        let intact = keeps && (self.record.intact || counts);
        if self.has_lost_its_own() {
            outputs.push(Output::FenceDevice);
            // Also if that fails: what outlived an engine, a flush for instance, is not executed as if nothing had been lost.
            self.admission.iter_mut().filter(|entry| !entry.tag.is_own()).for_each(|entry| entry.fenced = true);
            self.fence_what_waits(outputs);
        }
        self.persist(Record { configuration, intact }, outputs);
    }

    fn is_drained(&self) -> bool {
        let idle = self.admission.entries().iter().all(|entry| entry.running().is_none());
        let guarded = matches!(self.guard, Guard::Flushing(_));
        idle && !guarded && self.orphans.is_empty() && !self.applies.iter().any(super::secondary::Apply::is_running)
    }

    pub(super) fn persist(&mut self, mut record: Record, outputs: &mut Vec<Output>) {
        self.unsaved = false;
        record.intact &= !self.flush_failed;
        let operation = self.operation();
        outputs.push(Output::Persist { operation, record: Box::new(record.clone()) });
        self.persisting = Some(Persisting { operation, record });
    }

    /// A record is durable: from here on this copy acts under it.
    pub(super) fn persisted(&mut self, result: Result<(), super::DiskError>, outputs: &mut Vec<Output>) {
        let Some(Persisting { record, .. }) = self.persisting.take() else { return };
        if result.is_err() {
            // Nothing was promised under it, and nothing will be before another attempt succeeds.
            (self.health, self.disk_rests) = (Health::Failed, true);
            return;
        }
        let before = std::mem::replace(&mut self.record, record);
        self.record.intact &= !self.flush_failed;
        if before.configuration.stamp == self.record.configuration.stamp {
            return self.intact_is_durable(outputs);
        }
        if self.record.configuration.term != before.configuration.term {
            (self.applies, self.floor, self.settled) = (Vec::new(), SerialNumber::default(), false);
            self.hot.new_term();
            // What lacks everything is compared whole before it is a member again, however often that is begun; marks of all
            // attempts together could be more than there is room for. That it is not intact is durable with the record. Within
            // a term its admission may be committed already, and then its marks count.
            if self.record.configuration.lacks_everything(self.me) {
                self.hot.forget_old();
            }
        }
        self.open_guard();
        let Some(adoption) = self.adoption.take_if(|a| a.configuration.stamp == self.record.configuration.stamp) else {
            return;
        };
        // What had not started belongs to the version before; the primary says it again if it still matters.
        self.applies.retain(super::secondary::Apply::is_done);
        if adoption.mine && self.record.configuration.primary == Some(self.me) {
            self.begin_or_continue(outputs);
        } else {
            self.role = Self::follower(&self.record.configuration, self.me);
            self.answer_primary(outputs);
        }
        self.fence_what_waits(outputs);
        self.start_what_is_clear(outputs);
    }

    /// This copy's own configuration is durable: it begins its term, or goes on under the next version.
    fn begin_or_continue(&mut self, outputs: &mut Vec<Output>) {
        let configuration = self.record.configuration.clone();
        if !self.is_primary() {
            self.role = Role::Primary(Primary::Reconciling);
            (self.next_serial, self.flushed, self.clearing) = (SerialNumber(1), false, Clearing::new(self.now));
            self.peers.clear();
        }
        self.abandon_copying();
        let others = configuration.copies().filter(|copy| *copy != self.me);
        let peers = others.map(|copy| self.next_peer(copy, &configuration)).collect();
        let before = std::mem::replace(&mut self.peers, peers);
        self.renumber(&before);
        if self.role == Role::Primary(Primary::Settling) {
            self.role = Role::Primary(Primary::Reconciling);
        }
        for peer in &self.peers {
            let message = Message::Invite(Box::new(configuration.clone()));
            outputs.push(Output::Send { to: peer.copy, message, buffer: Buffer::None });
        }
        self.answer_what_all_did(outputs);
    }

    fn next_peer(&self, copy: InstanceId, configuration: &Configuration) -> Peer {
        let member = configuration.is_member(copy);
        let known = self.peers.iter().find(|peer| peer.copy == copy);
        match known {
            // A member stays one, or a candidate was admitted: its session goes on under the next version.
            Some(peer) if member => {
                // One that is to be compared anew was admitted meanwhile: it goes again.
                let out = peer.out || peer.anew;
                let (sync, unanswered) = (super::copying::Sync::Idle, None);
                Peer { member, joined: false, owes: 0, out, sync, unanswered, ..peer.clone() }
            }
            Some(peer) => {
                // A person's wish that it be compared outlives what was under way when it was said.
                let anew = peer.anew && !configuration.lacks_everything(copy);
                Peer { anew, unanswered: self.unanswered_by(peer), ..Peer::new(copy, false, false) }
            }
            None => Peer::new(copy, member, member && self.silent.contains(&copy)),
        }
    }

    /// Shows what the volume needs to the catalogue.
    pub(super) fn propose(&mut self, outputs: &mut Vec<Output>) {
        self.guard_drops(outputs);
        let busy = self.proposal.is_some() || self.adoption.is_some() || self.persisting.is_some();
        if busy || !self.informed {
            return;
        }
        let Some(next) = self.wanted() else { return };
        let expected = self.record.configuration.stamp;
        outputs.push(Output::Propose { expected, next: Box::new(next.clone()) });
        if planted!(self, DropBeforeCommit) {
            let out = self.bits(|peer| peer.out);
            self.stop_awaiting(out, outputs);
        }
        self.proposal = Some(next);
    }

    /// The configuration that this copy would commit now.
    fn wanted(&self) -> Option<Configuration> {
        let current = &self.record.configuration;
        let me = Some(self.me);
        match self.role {
            Role::Primary(_) if self.leaves() && self.may_leave() => {
                let mut next = current.next();
                next.secondaries.extend(next.primary.take());
                Some(next)
            }
            // Also of one that is to leave: the flush before that may wait for a member that is to be dropped.
            Role::Primary(_) => self.wanted_copies(),
            Role::Secondary if current.primary == me => Some(self.own_term()),
            Role::Outdated | Role::Candidate if !planted!(self, PromoteOutdated) => None,
            Role::Secondary | Role::Outdated | Role::Candidate => {
                let wished = self.wish.as_ref().is_some_and(|wish| wish.primary == me);
                let waited =
                    planted!(self, PromoteUnderLease) || current.primary.is_none() || self.now >= self.granted_until;
                (wished && waited && self.health != Health::Failed).then(|| {
                    let mut next = self.own_term();
                    next.candidates.remove(&self.me);
                    next
                })
            }
        }
    }

    /// This copy begins a term; if nobody else could have what it has lost, that is said at once.
    fn own_term(&self) -> Configuration {
        let mut next = self.record.configuration.with_primary(self.me);
        if next.secondaries.is_empty() && !self.record.intact {
            next.lost = next.stamp;
        }
        next
    }

    fn wanted_copies(&self) -> Option<Configuration> {
        let current = &self.record.configuration;
        let mut next = current.next();
        if self.has_lost_writes() {
            next.lost = next.stamp;
        }
        for peer in &self.peers {
            if peer.out && peer.member && self.may_drop() {
                next.drop_member(peer.copy);
                if peer.anew {
                    next.candidates.insert(peer.copy, Lacks::Everything);
                }
            } else if peer.anew && !peer.member {
                next.candidates.insert(peer.copy, Lacks::Everything);
            } else if peer.is_equal()
                && !peer.out
                && (self.health == Health::Sound || planted!(self, ClearAfterFailure))
            {
                next.admit(peer.copy);
            }
        }
        if let Some(wish) = self.wish.as_ref().filter(|_| self.record.intact) {
            next.candidates.retain(|copy, _| wish.copies.contains(copy));
            for copy in &wish.copies {
                if !next.copies().any(|known| known == *copy) && next.copies().count() < MAX_COPIES {
                    next.candidates.insert(*copy, Lacks::Everything);
                }
            }
        }
        let same = next.secondaries == current.secondaries && next.candidates == current.candidates;
        (!same || next.lost != current.lost).then_some(next)
    }

    fn may_drop(&self) -> bool {
        let may = self.record.intact && self.health != Health::Failed;
        may && (self.guard == Guard::Flushed || planted!(self, DropUnflushed))
    }

    /// What is acknowledged from now on is covered by no flush that has begun before.
    fn open_guard(&mut self) {
        if let Guard::Flushing(operation) = self.guard {
            self.orphans.push(Orphan { operation, is_flush: true });
        }
        self.guard = Guard::Open;
    }

    /// What this copy's disk did after that flush began is not covered by it, even if the member that goes answered before.
    pub(super) fn holds_answers(&self) -> bool {
        if planted!(self, DropUnflushed) {
            return false;
        }
        if planted!(self, DropBeforeCommit) {
            return false;
        }
        self.guard != Guard::Open
    }

    /// Flushes this copy before it goes on without a member: one that is out, or that the spec does not want any more.
    fn guard_drops(&mut self, outputs: &mut Vec<Output>) {
        // A primary that may lack acknowledged writes still needs those whom nobody wants any more.
        if let Some(wish) = self.wish.as_ref().filter(|_| self.is_primary() && self.record.intact) {
            let unwanted = |peer: &&mut Peer| peer.member && !wish.copies.contains(&peer.copy);
            self.peers.iter_mut().filter(unwanted).for_each(|peer| peer.out = true);
        }
        let may = self.is_primary() && self.record.intact && self.health != Health::Failed;
        let drops = may && self.peers.iter().any(|peer| peer.member && peer.out);
        if !drops && !self.drop_may_land() && self.guard != Guard::Open {
            self.open_guard();
            self.answer_what_all_did(outputs);
        }
        if drops && self.guard == Guard::Open {
            let operation = self.operation();
            self.guard = Guard::Flushing(operation);
            outputs.push(Output::FlushHere { operation });
        }
    }

    /// A configuration without a member may be committed, whatever became of this copy since it was proposed.
    fn drop_may_land(&self) -> bool {
        let next = self.proposal.as_ref().or(self.adopting());
        let lacks = |next: &Configuration| self.peers.iter().any(|peer| peer.member && !next.is_member(peer.copy));
        if planted!(self, OpenGuardEarly) {
            return false;
        }
        // A member that is taken back meanwhile does no harm as long as nothing is answered.
        if planted!(self, TakeBackDropped) {
            return false;
        }
        self.is_primary() && next.is_some_and(lacks)
    }

    pub(super) fn is_primary(&self) -> bool {
        matches!(self.role, Role::Primary(_))
    }

    /// The spec wants no primary, or another member. A copy that is no member could not take over, and without a primary
    /// nobody would make it one: until it is, this copy goes on, and what waits behind requests does not wait for ever.
    pub(super) fn leaves(&self) -> bool {
        let serves = self.role == Role::Primary(Primary::Serving);
        // Before it serves it would leave the volume to a dead member. It drops that one first, if it can; else only the other
        // one, silent to this copy, may be able to go on.
        let drops = self.record.intact && self.health != Health::Failed;
        let is_there = |copy: InstanceId| serves || !drops || !self.silent.contains(&copy);
        let takes_over = |copy| copy != self.me && self.record.configuration.is_member(copy) && is_there(copy);
        self.wish.as_ref().is_some_and(|wish| wish.primary.is_none_or(takes_over))
    }
}
