//! What clients are to be told and their connections have no room for: said when there is room, in the same connection.
//!
//! Invariants: at most [`MAX_ASKED`] messages wait, as many as a client's requests are executed at a time; who makes more wait
//! begins a new connection. Answers of one session only: a client hears none of an earlier one. What waits for a connection goes
//! with it: on the next one the client asks again.

use crate::protocol::{MAX_ASKED, Message};
use crate::replica::peer::Payload;
use crate::volume::InstanceId;

/// See the module.
#[derive(Default)]
pub(super) struct Unsaid {
    /// In the order in which they are to be said.
    waiting: Vec<(InstanceId, Message, Payload)>,
}

impl Unsaid {
    /// Keeps it for later; `false`: too much waits already.
    pub fn keep(&mut self, to: InstanceId, message: &Message, payload: &Payload) -> bool {
        if let Message::Answer { session, .. } = message {
            let earlier = |before: &Message| matches!(before, Message::Answer { session: of, .. } if of != session);
            self.waiting.retain(|(whose, before, _)| *whose != to || !earlier(before));
        }
        let takes = self.waiting.len() < MAX_ASKED;
        if takes {
            self.waiting.push((to, message.clone(), payload.clone()));
        }
        takes
    }

    /// What is to be said to this client, now that there is room or that its connection is gone.
    pub fn take(&mut self, to: InstanceId) -> Vec<(Message, Payload)> {
        let all = std::mem::take(&mut self.waiting).into_iter();
        let (its, others): (Vec<_>, Vec<_>) = all.partition(|(whose, ..)| *whose == to);
        self.waiting = others;
        its.into_iter().map(|(_, message, payload)| (message, payload)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Incarnation, SerialNumber, Session};

    fn answer(number: u64, serial: u64) -> Message {
        let session = Session { host: Incarnation(1), number };
        Message::Answer { session, serial: SerialNumber(serial), result: Ok(()) }
    }

    fn said(unsaid: &mut Unsaid, to: InstanceId) -> Vec<Message> {
        unsaid.take(to).into_iter().map(|(message, _)| message).collect()
    }

    #[test]
    fn what_waits_is_said_once_in_its_order_and_only_of_the_newest_session() {
        let [one, two] = [1, 2].map(|byte| InstanceId::from_bytes([byte; 16]));
        let (mut unsaid, nothing) = (Unsaid::default(), Payload::default());
        for (to, message) in [(one, answer(1, 5)), (two, answer(1, 6)), (one, answer(1, 4))] {
            assert!(unsaid.keep(to, &message, &nothing));
        }
        assert_eq!(said(&mut unsaid, one), [answer(1, 5), answer(1, 4)]);
        assert_eq!(said(&mut unsaid, one), []);
        assert!(unsaid.keep(two, &answer(2, 7), &nothing), "its own session has begun anew");
        assert_eq!(said(&mut unsaid, two), [answer(2, 7)]);
    }

    #[test]
    fn no_more_waits_than_a_client_can_ask() {
        let (mut unsaid, to) = (Unsaid::default(), InstanceId::from_bytes([1; 16]));
        for serial in 0..MAX_ASKED as u64 {
            assert!(unsaid.keep(to, &answer(1, serial), &Payload::default()));
        }
        assert!(!unsaid.keep(to, &answer(1, 99), &Payload::default()));
        assert_eq!(said(&mut unsaid, to).len(), MAX_ASKED);
    }
}
