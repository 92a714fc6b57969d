//! Copies that are slow, not dead: they are heard and renew the lease, and what they owe lets writes wait for too long.
//!
//! # Invariants
//! * What a copy owes is counted in this copy's own heartbeats, from when this copy has done its own part: a primary that
//!   slept, or whose own disk is slow, blames nobody. How much else the other one answers meanwhile does not matter.
//! * Who owes something for [`PATIENCE`] heartbeats is out like a silent copy: its answers are awaited until a
//!   configuration without it is committed and durable here.
//! * Writes wait for a candidate, too. So a copy that was slow is left alone for a while before its resync begins again,
//!   each time twice as long; not if it is wished as primary, or was started anew since. So is one, whatever is wished, for
//!   which the only member could not read what it copied.

use super::admission::{Awaits, Entry};
use super::interface::{Primary, Role};
use super::message::Incarnation;
use super::primary::{HEARTBEAT, Peer};
use super::replica::{Health, Replica};
use super::{LEASE, Now};
use crate::volume::InstanceId;
use std::time::Duration;

/// For how many heartbeats a copy may owe something: ten seconds, far longer than a disk that works ever takes, and shorter
/// than the half minute after which kernels and databases begin to complain about theirs.
pub(super) const PATIENCE: u8 = 20;

/// How long a copy that was slow is left alone first: if it still is, writes wait for it for a seventh of the time.
const REST: Duration = Duration::from_secs(60);
/// And at last: then it is one hundredth. A copy that was not slow for as long after its rest begins anew.
const LONGEST_REST: Duration = Duration::from_secs(16 * 60);

const _: () = assert!(HEARTBEAT.as_millis() * PATIENCE as u128 > LEASE.as_millis(), "more patience than a lease");

/// Why a copy is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Because {
    /// It owed something for too long.
    Slow,
    /// The only member could not read what it lacks: whatever becomes of this candidate, that takes as long as it takes.
    Unread,
}

/// A copy that was slow, or cannot be helped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Rest {
    because: Because,
    until: Now,
    length: Duration,
    /// Of the copy that was slow: another start of it is worth another try.
    incarnation: Option<Incarnation>,
}

impl Rest {
    fn after(before: Option<Self>, because: Because, now: Now, incarnation: Option<Incarnation>) -> Self {
        let again = before.filter(|before| now.0 < before.until.0 + LONGEST_REST);
        let length = again.map_or(REST, |before| (before.length * 2).min(LONGEST_REST));
        Self { because, until: Now(now.0 + length), length, incarnation }
    }
}

impl Entry {
    /// This copy has executed it, and others have not.
    fn is_owed(&self) -> bool {
        self.is_started() && !self.awaits.is_empty() && !self.awaits.contains(Awaits::LOCAL)
    }
}

impl Replica {
    /// A heartbeat has passed: what is owed is older, and whoever owes something for too long goes.
    pub(super) fn judge_patience(&mut self) {
        if !self.is_primary() {
            return;
        }
        let mut late = Awaits::default();
        for entry in self.admission.iter_mut().filter(|entry| entry.is_owed()) {
            entry.owed = entry.owed.saturating_add(1);
            if entry.owed >= PATIENCE {
                late = late.with(entry.awaits);
            }
        }
        // One that was just admitted, too: until it has settled, its newer blocks may not count if this copy loses its caches.
        let settling = matches!(self.role, Role::Primary(Primary::Settling | Primary::Serving));
        for position in 0..self.peers.len() {
            let peer = &mut self.peers[position];
            let owes = peer.member && (!peer.joined || settling && !peer.settled);
            peer.owes = if owes { peer.owes.saturating_add(1) } else { 0 };
            if !peer.out && (peer.owes >= PATIENCE || late.contains(Awaits::peer(position))) {
                self.give_up(position, Because::Slow);
            }
        }
    }

    /// It is out, and is left alone for a while when it is gone.
    pub(super) fn give_up(&mut self, position: usize, because: Because) {
        let Self { peers, rests, now, .. } = self;
        rests.retain(|copy, _| peers.iter().any(|peer| peer.copy == *copy));
        let peer = &mut peers[position];
        peer.owes = 0;
        rests.insert(peer.copy, Rest::after(rests.get(&peer.copy).copied(), because, *now, peer.incarnation));
        self.member_fails(position);
    }

    /// Whether a copy is not asked, nor heard if it says that it is there. A member only while it is about to be dropped:
    /// who may drop nobody cannot do without it.
    pub(super) fn is_left_alone(&self, peer: &Peer) -> bool {
        let goes = !peer.member || peer.out && self.record.intact && self.health != Health::Failed;
        let wished = self.wish.as_ref().is_some_and(|wish| wish.primary == Some(peer.copy));
        let rests = |rest: &Rest| self.now < rest.until && !(wished && rest.because == Because::Slow);
        goes && self.rests.get(&peer.copy).is_some_and(rests)
    }

    /// A copy says that it is there: if it was started since it was slow, it may be faster now.
    pub(super) fn forgive_if_restarted(&mut self, copy: InstanceId, incarnation: Incarnation) {
        let rest = self.rests.get_mut(&copy).filter(|rest| rest.because == Because::Slow);
        if rest.is_some_and(|rest| *rest.incarnation.get_or_insert(incarnation) != incarnation) {
            self.rests.remove(&copy);
        }
    }

    /// Copies that are left alone if nothing else speaks for them.
    pub fn resting(&self) -> impl Iterator<Item = (InstanceId, Because)> + '_ {
        self.rests.iter().filter(|(_, rest)| self.now < rest.until).map(|(copy, rest)| (*copy, rest.because))
    }
}
