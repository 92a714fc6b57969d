//! What has failed and is tried again: when.
//!
//! # Invariants
//! * However soon something fails, and whether or not anybody waits for its end, it is tried again after a pause, which grows
//!   until it succeeds; sooner only if something comes for it.
//! * What waits for room is tried again when somebody has left, and not before.

use super::{FIRST_PAUSE, LAST_PAUSE};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// See the module. `S` is what is tried.
pub(super) struct Retries<S>(BTreeMap<S, Retry>);

struct Retry {
    turn: Turn,
    /// After the next failure.
    pause: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// It is being tried.
    Now,
    At(Instant),
    /// When somebody has left.
    Room,
}

impl<S: Copy + Ord> Retries<S> {
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }

    fn set(&mut self, subject: S, turn: Turn) -> &mut Retry {
        let retry = self.0.entry(subject).or_insert(Retry { turn, pause: FIRST_PAUSE });
        retry.turn = turn;
        retry
    }

    /// It is tried now, whatever was meant.
    pub fn begun(&mut self, subject: S) {
        if let Some(retry) = self.0.get_mut(&subject) {
            retry.turn = Turn::Now;
        }
    }

    pub fn failed(&mut self, subject: S, now: Instant) {
        let retry = self.set(subject, Turn::Now);
        retry.turn = Turn::At(now + retry.pause);
        retry.pause = (retry.pause * 2).min(LAST_PAUSE);
    }

    pub fn waits_for_room(&mut self, subject: S) {
        self.set(subject, Turn::Room);
    }

    /// There may be room.
    pub fn somebody_left(&mut self, now: Instant) {
        for retry in self.0.values_mut().filter(|retry| retry.turn == Turn::Room) {
            retry.turn = Turn::At(now);
        }
    }

    pub fn succeeded(&mut self, subject: S) {
        self.0.remove(&subject);
    }

    /// Those whose turn it is.
    pub fn take_due(&mut self, now: Instant) -> BTreeSet<S> {
        let is_due = |retry: &Retry| matches!(retry.turn, Turn::At(at) if at <= now);
        let due = self.0.iter_mut().filter(|(_, retry)| is_due(retry));
        due.map(|(subject, retry)| {
            retry.turn = Turn::Now;
            *subject
        })
        .collect()
    }

    /// When the next one's turn is.
    pub fn next(&self) -> Option<Instant> {
        let turns = self.0.values().filter_map(|retry| match retry.turn {
            Turn::At(at) => Some(at),
            Turn::Now | Turn::Room => None,
        });
        turns.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::mirror::local::{MOST_AT_A_POOL, Pools};

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn what_fails_at_once_is_tried_with_growing_pauses_until_it_succeeds() {
        let (mut retries, begin) = (Retries::new(), Instant::now());
        let (mut now, mut tries) = (begin, 1);
        retries.failed(1, now);
        while let Some(at) = retries.next().filter(|at| *at < begin + MINUTE) {
            assert!(at > now && retries.take_due(now).is_empty(), "there is a pause");
            now = at;
            assert_eq!(retries.take_due(now), [1].into());
            assert_eq!(retries.next(), None, "once");
            tries += 1;
            retries.failed(1, now);
        }
        assert!((20..=30).contains(&tries), "{tries} in a minute");
        // Something comes for it: that is no reason for a shorter pause after it.
        retries.begun(1);
        assert_eq!(retries.next(), None);
        retries.failed(1, now);
        assert_eq!(retries.next(), Some(now + LAST_PAUSE));
        retries.succeeded(1);
        assert_eq!(retries.next(), None);
        retries.failed(1, now);
        assert_eq!(retries.next(), Some(now + FIRST_PAUSE));
    }

    #[test]
    fn what_finds_no_room_at_a_disk_that_hangs_is_not_tried_before_somebody_has_left() {
        let (pools, now) = (Pools::default(), Instant::now());
        let (mut retries, mut visits, mut tries) = (Retries::new(), Vec::new(), 0);
        let enter = |subject, retries: &mut Retries<usize>, tries: &mut usize| {
            *tries += 1;
            retries.begun(subject);
            let entered = pools.enter(None).map_err(|_| retries.waits_for_room(subject));
            entered.ok()
        };
        visits.extend((0..MOST_AT_A_POOL + 2).filter_map(|subject| enter(subject, &mut retries, &mut tries)));
        assert_eq!((visits.len(), tries), (MOST_AT_A_POOL, MOST_AT_A_POOL + 2));
        assert_eq!(retries.next(), None);
        assert!(retries.take_due(now + MINUTE).is_empty());
        visits.pop();
        retries.somebody_left(now);
        assert_eq!(retries.next(), Some(now));
        let due = retries.take_due(now);
        assert_eq!(due, [MOST_AT_A_POOL, MOST_AT_A_POOL + 1].into());
        visits.extend(due.into_iter().filter_map(|subject| enter(subject, &mut retries, &mut tries)));
        assert_eq!((visits.len(), tries), (MOST_AT_A_POOL, MOST_AT_A_POOL + 4));
        assert_eq!(retries.next(), None, "the other one still waits");
    }
}
