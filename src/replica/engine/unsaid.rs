//! What a connection has no room for, until it has: what clients are to be told, what a client asks, and what a core has said.
//!
//! Invariants: at most [`MAX_ASKED`] messages wait for clients, as many as a client's requests are executed at a time; who makes
//! more wait begins a new connection. Answers of one session only: a client hears none of an earlier one. What waits for a connection
//! goes with it: on the next one the client asks again. Of what a client asks everything of its session waits that was not sent,
//! and nothing else: nobody would say it again. What a core has said is not kept, only from where on it has to say it again.

use crate::protocol::{MAX_ASKED, Message, OperationId, SerialNumber};
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

/// A client's requests that found a full queue: at most what its core asks in one session.
#[derive(Default)]
pub(super) struct Unasked {
    waiting: Vec<(InstanceId, Message, OperationId)>,
}

impl Unasked {
    /// Keeps it for later, if it is a request of a session. Anything else the core says again by itself.
    pub fn keep(&mut self, to: InstanceId, message: &Message, operation: Option<OperationId>) {
        let (Message::Ask { session, .. }, Some(operation)) = (message, operation) else { return };
        // A new session asks everything again: what is left of the one before is of no use.
        self.waiting.retain(|(_, before, _)| matches!(before, Message::Ask { session: of, .. } if of == session));
        self.waiting.push((to, message.clone(), operation));
    }

    /// What is to be asked now that there is room.
    pub fn take(&mut self) -> Vec<(InstanceId, Message, OperationId)> {
        std::mem::take(&mut self.waiting)
    }
}

/// What of a core's a full queue to a peer has refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// What a primary asks: its core says it again. What has a place in its term before this one was taken.
    Question(SerialNumber),
    /// An answer: it is given again when it is asked for again, which a new connection makes the peer do.
    Answer,
}

impl Refused {
    /// What is missing when this was refused.
    pub fn of(message: &Message) -> Self {
        match message {
            Message::Prepare { serial, .. } | Message::Copy { serial, .. } | Message::Compare { serial, .. } => {
                Self::Question(*serial)
            }
            // Nothing that has a place is missing.
            Message::Granted { .. } | Message::Invite(_) | Message::Renew { .. } => {
                Self::Question(SerialNumber(u64::MAX))
            }
            Message::Reconciled(_) | Message::Clear { .. } => Self::Question(SerialNumber(u64::MAX)),
            Message::Prepared { .. } | Message::Compared { .. } | Message::Settled(_) => Self::Answer,
            Message::Joined { .. } | Message::Refused(_) => Self::Answer,
            // A client that has room again begins a new session, and asks everything again.
            Message::Enter { .. } | Message::Entered { .. } | Message::Ask { .. } | Message::Answer { .. } => {
                Self::Answer
            }
        }
    }

    /// What is missing when both were refused in one connection.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Question(one), Self::Question(other)) => Self::Question(one.min(other)),
            (Self::Answer, _) | (_, Self::Answer) => Self::Answer,
        }
    }

    /// Whether this connection has taken the message already, or what has its place.
    pub fn was_taken(self, message: &Message) -> bool {
        match (self, Self::of(message)) {
            (Self::Question(from), Self::Question(serial)) => serial < from,
            (Self::Answer, _) | (_, Self::Answer) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Frame, Incarnation, Now, Request, Session, Stamp};

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

    /// A client's own word that it seeks its primary threw away what it had asked in a session that went on.
    #[test]
    fn what_a_client_asked_waits_whatever_else_finds_no_room() {
        let to = InstanceId::from_bytes([1; 16]);
        let ask = |number, serial| {
            let session = Session { host: Incarnation(1), number };
            (to, Message::Ask { session, serial: SerialNumber(serial), request: Request::Flush }, OperationId(serial))
        };
        let mut unasked = Unasked::default();
        for (to, message, operation) in [ask(1, 5), ask(1, 6)] {
            unasked.keep(to, &message, Some(operation));
        }
        unasked.keep(to, &Message::Enter { client: Incarnation(2), attempt: 3 }, None);
        assert_eq!(unasked.take(), [ask(1, 5), ask(1, 6)]);
        assert_eq!(unasked.take(), []);
        for (to, message, operation) in [ask(1, 5), ask(2, 6)] {
            unasked.keep(to, &message, Some(operation));
        }
        assert_eq!(unasked.take(), [ask(2, 6)], "its session has begun anew");
    }

    #[test]
    fn what_was_taken_before_the_first_refusal_is_not_said_again() {
        let frame = Frame { stamp: Stamp::default(), incarnation: Incarnation(1) };
        let prepare = |serial| {
            let (serial, floor) = (SerialNumber(serial), SerialNumber(1));
            Message::Prepare { frame, serial, floor, request: Request::Flush }
        };
        let renew = Message::Renew { frame, sent: Now::default() };
        let refused = [prepare(9), prepare(7), renew.clone(), prepare(8)];
        let all = refused.iter().map(Refused::of).reduce(Refused::and).expect("some");
        assert_eq!([6, 7, 10].map(|serial| all.was_taken(&prepare(serial))), [true, false, false]);
        assert!(!all.was_taken(&Message::Reconciled(frame)), "it has no place in the term");
        // Nothing with a place was refused: all of that was taken.
        assert!(Refused::of(&renew).was_taken(&prepare(6)) && !Refused::of(&renew).was_taken(&renew));
        // An answer: on a new connection everything is said.
        let answered = all.and(Refused::of(&Message::Settled(frame))).and(all);
        assert!(answered == Refused::Answer && !answered.was_taken(&prepare(6)));
    }
}
