//! What a primary knows of the other copies: who has joined, what they have answered, the lease.
//!
//! # Invariants
//! * A member that is silent, fails or was restarted is `out`: its answers are awaited until a configuration without it
//!   is committed and durable here.
//! * A candidate that writes are sent to counts like a member for every ack, before the compare-and-swap that admits it.
//! * The lease holds while every secondary granted it within [`LEASE`], counted from when the primary asked, by its own
//!   clock. No acknowledgement of a write rests on it.

use super::admission::{Awaits, Entry, Phase};
use super::configuration::{Configuration, Lacks};
use super::copying::Sync;
use super::hot::Extent;
use super::interface::{Output, Primary, Role};
use super::message::{Buffer, Frame, Incarnation, Message, SerialNumber};
use super::replica::{Health, Replica};
use super::{DiskError, Now};
use crate::volume::InstanceId;
use std::time::Duration;

/// How often the engine gives a mirrored volume a `Tick`: four chances to renew within a lease.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// How long a granted lease lasts: reads freeze this long after a secondary was heard last.
pub const LEASE: Duration = Duration::from_secs(2);
/// After how long without a sign a copy is silent: longer than lease and margin, so that a pause drops nobody at once.
pub const SILENCE: Duration = Duration::from_secs(4);

/// Another copy, as the primary sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Peer {
    pub copy: InstanceId,
    pub member: bool,
    /// Its session in this term.
    pub incarnation: Option<Incarnation>,
    /// It answered under the configuration that is durable here.
    pub joined: bool,
    pub intact: bool,
    pub settled: bool,
    pub hot: Box<[Extent]>,
    /// Of a copy that this primary has dropped in this term, having served with it: where it may have executed something, or
    /// not, that it had not answered.
    pub unanswered: Option<Box<[Extent]>>,
    pub lease_until: Now,
    /// Heartbeats for which a member has owed its word under this configuration.
    pub owes: u8,
    /// To be dropped, or left alone until it joins anew.
    pub out: bool,
    /// Nothing of what it holds counts from the next configuration on.
    pub anew: bool,
    pub sync: Sync,
}

impl Peer {
    pub fn new(copy: InstanceId, member: bool, out: bool) -> Self {
        Self {
            copy,
            member,
            incarnation: None,
            joined: false,
            intact: false,
            settled: false,
            hot: Box::default(),
            unanswered: None,
            lease_until: Now::default(),
            owes: 0,
            out,
            anew: false,
            sync: Sync::Idle,
        }
    }

    /// A candidate that has everything, on stable media what came before its marks.
    pub fn is_equal(&self) -> bool {
        !self.member && self.joined && self.sync == Sync::Equal
    }

    /// Whether what has this serial was sent to it, and waits for it. One that has joined since then may not have flushed what
    /// it executed before it left.
    pub fn was_asked(&self, serial: SerialNumber) -> bool {
        match self.sync {
            _ if self.member => true,
            Sync::Idle => false,
            Sync::Joining(since) => since <= serial,
            // What began earlier has ended.
            Sync::Copying | Sync::Equal => true,
        }
    }

    /// Writes are sent to it.
    fn is_active(&self) -> bool {
        self.member || self.sync != Sync::Idle
    }
}

impl Replica {
    pub(super) fn bits(&self, which: impl Fn(&Peer) -> bool) -> Awaits {
        let positions = self.peers.iter().enumerate().filter(|(_, peer)| which(peer)).map(|(position, _)| position);
        positions.fold(Awaits::default(), |bits, position| bits.with(Awaits::peer(position)))
    }

    /// The peers whose answers a new request needs.
    pub(super) fn awaits(&self) -> Awaits {
        if planted!(self, DropBeforeCommit) {
            return self.bits(|peer| peer.is_active() && !peer.out);
        }
        if planted!(self, CandidateNotAwaited) {
            return self.bits(|peer| peer.member);
        }
        self.bits(Peer::is_active)
    }

    /// Everything below was answered by all.
    pub(super) fn lowest_unanswered(&self) -> SerialNumber {
        let counts =
            |entry: &&Entry| entry.is_started() && !(planted!(self, CoverMarking) && entry.phase == Phase::Marking);
        let started = self.admission.entries().iter().filter(counts);
        let lowest = started.map(|entry| entry.serial).filter(|serial| *serial != SerialNumber::default()).min();
        lowest.unwrap_or(self.next_serial)
    }

    /// Every other copy has answered everything below: none is asked for it again, and none has to remember it. A range that is
    /// copied asks them again, under a later serial, whatever this copy's disk does for it now.
    pub(super) fn lowest_owed(&self) -> SerialNumber {
        let asks = |entry: &Entry| entry.tag.is_copy() || !entry.awaits.without(Awaits::LOCAL).is_empty();
        let owed = |entry: &&Entry| entry.is_started() && asks(entry);
        let owed = self.admission.entries().iter().filter(owed).map(|entry| entry.serial);
        owed.min().unwrap_or(self.next_serial)
    }

    pub(super) fn has_secondaries(&self) -> bool {
        self.peers.iter().any(|peer| peer.member)
    }

    /// There are secondaries, or the catalogue may say so.
    pub(super) fn may_have_secondaries(&self) -> bool {
        let next = self.proposal.as_ref().or(self.adopting());
        self.has_secondaries() || next.is_some_and(|next| !next.secondaries.is_empty())
    }

    pub(super) fn has_lease(&self) -> bool {
        self.peers.iter().all(|peer| !peer.member || peer.lease_until > self.now)
    }

    /// The session with a peer that may be spoken to under the durable configuration.
    pub(super) fn link(&self, peer: &Peer) -> Option<Frame> {
        peer.incarnation.filter(|_| peer.joined).map(|incarnation| self.frame(incarnation))
    }

    /// The peer whose frame it is, if it belongs to its present session.
    pub(super) fn session(&self, from: InstanceId, frame: Frame) -> Option<usize> {
        let position = self.peers.iter().position(|peer| peer.copy == from)?;
        (self.is_primary() && self.link(&self.peers[position]) == Some(frame)).then_some(position)
    }

    /// A copy has answered an invitation, or says that it was restarted.
    pub(super) fn joined(
        &mut self,
        from: InstanceId,
        frame: Frame,
        intact: bool,
        hot: Box<[Extent]>,
        outputs: &mut Vec<Output>,
    ) {
        if !self.is_primary() || frame.stamp != self.record.configuration.stamp {
            return;
        }
        let Some(position) = self.peers.iter().position(|peer| peer.copy == from) else { return };
        self.forgive_if_restarted(from, frame.incarnation);
        if self.is_left_alone(&self.peers[position]) {
            return;
        }
        let reconciling = self.role != Role::Primary(Primary::Serving);
        let peer = &mut self.peers[position];
        let known = peer.incarnation.replace(frame.incarnation);
        let restarted = known.is_some_and(|known| known != frame.incarnation);
        if restarted && peer.member && !reconciling {
            // It may have lost what it had acknowledged. Nobody hears of its new life before it was dropped.
            (peer.incarnation, peer.out) = (known, true);
            return;
        }
        if peer.joined && !restarted && (peer.member || peer.sync != Sync::Idle) {
            return;
        }
        let next = self.proposal.as_ref().or(self.adopting());
        let (admitting, dropping) = next.map_or((false, false), |next| (next.is_member(from), !next.is_member(from)));
        let dropping = dropping && !planted!(self, TakeBackDropped);
        let peer = &mut self.peers[position];
        if (admitting && !peer.member) || (dropping && peer.member) {
            // Its admission or its removal may be committed already: it stays awaited, or out, until that is known.
            (peer.incarnation, peer.out) = (known, true);
            return;
        }
        (peer.joined, peer.intact, peer.hot, peer.settled) = (true, intact, hot, false);
        if reconciling && !peer.member {
            return;
        }
        if reconciling {
            peer.out = false;
            self.abandon_copying();
            self.role = Role::Primary(Primary::Reconciling);
            return;
        }
        if self.peers[position].member {
            self.send_everything(position, outputs);
        } else {
            self.begin_sync(position, outputs);
        }
    }

    /// Says everything again that a peer has not answered.
    pub(super) fn send_everything(&mut self, position: usize, outputs: &mut Vec<Output>) {
        for entry in 0..self.admission.entries().len() {
            if self.admission.entries()[entry].is_started() {
                self.send_prepares(entry, Some(position), outputs);
            }
        }
        let settles = matches!(self.role, Role::Primary(Primary::Settling | Primary::Serving));
        let peer = &self.peers[position];
        if let Some(frame) = self.link(peer).filter(|_| settles && peer.member && !peer.settled) {
            let message = Message::Reconciled(frame);
            outputs.push(Output::Send { to: peer.copy, message, buffer: Buffer::None });
        }
    }

    pub(super) fn connected(&mut self, copy: InstanceId, outputs: &mut Vec<Output>) {
        self.silent.remove(&copy);
        let Some(position) = self.peers.iter().position(|peer| peer.copy == copy) else {
            return self.answer_primary(outputs);
        };
        let peer = &self.peers[position];
        if peer.joined && (peer.member || peer.sync != Sync::Idle) {
            self.send_everything(position, outputs);
        } else {
            let message = Message::Invite(Box::new(self.record.configuration.clone()));
            outputs.push(Output::Send { to: copy, message, buffer: Buffer::None });
        }
    }

    pub(super) fn peer_silent(&mut self, copy: InstanceId) {
        self.silent.insert(copy);
        if let Some(position) = self.peers.iter().position(|peer| peer.copy == copy) {
            self.member_fails(position);
        }
    }

    /// It is to be dropped, or left alone until it joins anew.
    pub(super) fn member_fails(&mut self, position: usize) {
        self.peers[position].out = true;
        if self.role == Role::Primary(Primary::Reconciling) && self.peers[position].member {
            // This copy may be one that drops nobody: then the other one is asked to join again.
            self.peers[position].joined = false;
            self.abandon_copying();
        }
    }

    /// A member goes like one that fails, and comes back as a candidate that lacks everything.
    pub(super) fn resync(&mut self, copy: InstanceId) {
        let serves = self.role == Role::Primary(Primary::Serving);
        if !serves || !self.record.intact || self.health != Health::Sound {
            return;
        }
        let lacks = self.record.configuration.candidates.get(&copy);
        if lacks == Some(&Lacks::Everything) {
            return;
        }
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.copy == copy) {
            (peer.anew, peer.out) = (true, peer.out || peer.member);
        }
    }

    /// Candidates that are out are awaited no more, unless their admission may be committed.
    pub(super) fn release_candidates(&mut self, outputs: &mut Vec<Output>) {
        let proposal = self.proposal.as_ref().or(self.adopting());
        let proposal = if planted!(self, AwaitOnlyMembers) { None } else { proposal };
        let admitted = |peer: &Peer| proposal.is_some_and(|next| next.is_member(peer.copy));
        let gone = |peer: &Peer| peer.out && !peer.member && !admitted(peer);
        let bits = self.bits(gone);
        if bits.is_empty() {
            return;
        }
        for position in 0..self.peers.len() {
            if bits.contains(Awaits::peer(position)) {
                let peer = &mut self.peers[position];
                (peer.out, peer.joined, peer.sync) = (false, false, Sync::Idle);
                self.abandon_copying_to(position);
            }
        }
        self.stop_awaiting(bits, outputs);
    }

    pub(super) fn stop_awaiting(&mut self, bits: Awaits, outputs: &mut Vec<Output>) {
        self.admission.iter_mut().for_each(|entry| entry.awaits = entry.awaits.without(bits));
        self.released = true;
        self.answer_what_all_did(outputs);
    }

    /// The positions of the peers have changed: so have those of their bits. Copies that are awaited no more lose theirs.
    pub(super) fn renumber(&mut self, before: &[Peer]) {
        let Self { peers, admission, .. } = self;
        let stays = |old: usize| peers.iter().position(|peer| peer.copy == before[old].copy && peer.is_active());
        for entry in admission.iter_mut() {
            let mut awaits = Awaits(entry.awaits.0 & Awaits::LOCAL.0);
            for old in (0..before.len()).filter(|old| entry.awaits.contains(Awaits::peer(*old))) {
                awaits = stays(old).map_or(awaits, |new| awaits.with(Awaits::peer(new)));
            }
            entry.awaits = awaits;
        }
    }

    pub(super) fn prepared(
        &mut self,
        from: InstanceId,
        frame: Frame,
        serial: SerialNumber,
        result: Result<(), DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        let entry = self.admission.serial(serial).map(|position| self.admission.entries()[position].tag);
        if entry.is_some_and(|tag| !self.is_comparing(tag)) {
            self.answered(from, frame, serial, result, outputs);
        }
    }

    /// A copy has done what it was asked for.
    pub(super) fn answered(
        &mut self,
        from: InstanceId,
        frame: Frame,
        serial: SerialNumber,
        result: Result<(), DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        let Some(peer) = self.session(from, frame) else { return };
        let Some(position) = self.admission.serial(serial) else { return };
        if !self.admission.entries()[position].awaits.contains(Awaits::peer(peer)) {
            return;
        }
        if self.peers[peer].out && !planted!(self, DropUnflushed) {
            // It is about to be dropped: nothing may be acknowledged that a flush of this copy does not cover.
            return;
        }
        if result.is_err() {
            // No space, a broken disk: it goes, and only a committed configuration lets it go.
            return self.member_fails(peer);
        }
        let entry = self.admission.at(position);
        entry.awaits = entry.awaits.without(Awaits::peer(peer));
        // The others remember it no more, so that one more may begin.
        self.released |= entry.awaits == Awaits::LOCAL;
        self.answer_if_all_did(position, outputs);
    }

    pub(super) fn answer_what_all_did(&mut self, outputs: &mut Vec<Output>) {
        for position in (0..self.admission.entries().len()).rev() {
            if position < self.admission.entries().len() {
                self.answer_if_all_did(position, outputs);
            }
        }
    }

    pub(super) fn granted(&mut self, from: InstanceId, frame: Frame, sent: Now, outputs: &mut Vec<Output>) {
        let Some(position) = self.session(from, frame).filter(|_| sent <= self.now) else {
            // Of nobody, or of no request of this primary: a lease lasts from when it was asked for.
            return;
        };
        let peer = &mut self.peers[position];
        peer.lease_until = peer.lease_until.max(Now(sent.0 + LEASE));
        self.start_what_is_clear(outputs);
    }

    pub(super) fn tick(&mut self, outputs: &mut Vec<Output>) {
        let sent = self.now;
        for peer in self.peers.iter().filter(|_| self.is_primary()) {
            let message = match self.link(peer) {
                Some(frame) if peer.member => Message::Renew { frame, sent },
                Some(_) => continue,
                None if self.is_left_alone(peer) => continue,
                // Not joined, or given up after an error: it is asked again, so that nothing waits for a new connection.
                None => Message::Invite(Box::new(self.record.configuration.clone())),
            };
            outputs.push(Output::Send { to: peer.copy, message, buffer: Buffer::None });
        }
    }

    /// Takes requests as soon as every member is durably equal and no lease of a former primary can hold.
    pub(super) fn serve_if_settled(&mut self, outputs: &mut Vec<Output>) {
        if self.role == Role::Primary(Primary::Settling)
            && self.adoption.is_none()
            && self.record.intact
            && self.peers.iter().all(|peer| !peer.member || peer.settled)
            && (self.now >= self.granted_until || planted!(self, PromoteUnderLease))
        {
            self.role = Role::Primary(Primary::Serving);
            for position in 0..self.peers.len() {
                if self.peers[position].joined && !self.peers[position].member {
                    self.begin_sync(position, outputs);
                }
            }
            self.start_what_is_clear(outputs);
        }
    }

    /// Nothing of this primary's is under way any more, and it is on stable media everywhere.
    pub(super) fn may_leave(&self) -> bool {
        self.role != Role::Primary(Primary::Serving) || self.is_quiet() && self.flushed
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.admission.entries().iter().all(|entry| !entry.is_started() && entry.running().is_none())
    }

    /// The configuration that is on its way to stable media.
    pub(super) fn adopting(&self) -> Option<&Configuration> {
        self.adoption.as_ref().map(super::term::Adoption::configuration)
    }
}
