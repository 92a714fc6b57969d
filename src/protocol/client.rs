//! A volume used on a node that has no copy of it: the disk of its device is the volume's primary, wherever that is.
//!
//! ```text
//!   device ─> Replica::sole ─Disk─> Client ══ Enter, Ask ══> Host ─Request─> Replica, primary ─> all members
//!          <─Complete───────  <─Done──     <══ Entered, Answer ══     <─Complete──
//! ```
//! The node's device has a core with one copy, [`Replica::sole`](super::Replica::sole), as any device has: it holds what
//! overlaps until the earlier request is answered. This part stands where the store would: it sends what the core wants
//! executed to the primary, and says it again to the next one.
//!
//! # Invariants
//! * Which copy is primary is asked, not known: every copy hears [`Message::Enter`], and only one that serves, and whose
//!   lease holds, answers. No frame is trusted but those of the newest session that was entered.
//! * A request is sent once in a session, and in every session again until it is answered; nothing that overlaps it is sent
//!   meanwhile. So executing it twice is harmless (I10), if the second time comes before whatever follows its answer. The
//!   host sees to that: it begins a session only when nothing of the one before can still be executed ([`Host`]), and of a
//!   primary that was replaced nothing is ever executed again (its term is over).
//! * An answer other than `Fenced` is the primary's word, as good as that of a disk: a completed write is in the cache of
//!   every member, and so the flush of a later primary covers it.
//! * At most two sessions begin in a heartbeat because something was refused.
//! * A client that the catalogue does not name any more executes nothing: whatever waits ends with `Fenced`.
//! * A flush is never answered well that does not cover what was completed before it. What the caches of all members have lost,
//!   the next primary says ([`Configuration::lost`](super::Configuration::lost)): a client with completed writes that no flush
//!   covers ends then, for good; one without goes on.
//!
//! [`Host`]: super::Host

use super::message::{Incarnation, Message, SerialNumber, Session};
use super::{DiskError, OperationId, Request, Stamp};
use crate::volume::InstanceId;
use std::collections::{BTreeMap, BTreeSet};

/// Heartbeats without an answer after which the copies are asked again: another one may be primary by now.
const PATIENCE: u8 = 4;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOutput {
    /// Send; with the bytes of this operation's write.
    Send {
        /// To which copy.
        to: InstanceId,
        /// What.
        message: Message,
        /// Whose bytes; `None`: it has none.
        operation: Option<OperationId>,
    },
    /// The operation has ended. The bytes of a read are those of the frame that was just received.
    Done {
        /// Which.
        operation: OperationId,
        /// How.
        result: Result<(), DiskError>,
    },
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Client {
    me: Incarnation,
    /// Rises whenever a session begins or ends: an answer to an earlier attempt says nothing.
    attempt: u64,
    connected: BTreeSet<InstanceId>,
    session: Option<(InstanceId, Session)>,
    /// What is not answered, in the order of the core. It holds at most as many requests as the core.
    asked: BTreeMap<OperationId, Request>,
    /// Heartbeats since something was answered, while something waits.
    quiet: u8,
    /// In this heartbeat a session has ended because something was not executed.
    refused: bool,
    ended: bool,
    /// What the copies had lost when it was served last; `None`: it never was.
    lost: Option<Stamp>,
    /// Writes, discards and zeros that were completed.
    written: u64,
    /// So many of them were completed before a flush was asked for that has ended well.
    covered: u64,
    /// How many each flush covers that is not answered.
    flushes: BTreeMap<OperationId, u64>,
    /// A planted mistake: it goes on, whatever was lost.
    #[cfg(test)]
    pub(super) goes_on: bool,
}

impl Client {
    /// Of one start; the incarnation is never used again.
    pub fn new(me: Incarnation) -> Self {
        let (connected, asked, flushes) = Default::default();
        Self {
            me,
            attempt: 1,
            connected,
            session: None,
            asked,
            quiet: 0,
            refused: false,
            ended: false,
            lost: None,
            written: 0,
            covered: 0,
            flushes,
            #[cfg(test)]
            goes_on: false,
        }
    }

    /// Of a device that outlived its engine, of which no more is known than what the copies had lost when it was served last:
    /// as if something was written since its last flush.
    pub fn resumed(me: Incarnation, lost: Option<Stamp>) -> Self {
        Self { lost, written: 1, ..Self::new(me) }
    }

    /// The core wants this executed.
    pub fn start(&mut self, operation: OperationId, request: Request, outputs: &mut Vec<ClientOutput>) {
        if self.ended {
            return outputs.push(ClientOutput::Done { operation, result: Err(DiskError::Fenced) });
        }
        if self.asked.is_empty() {
            self.quiet = 0;
        }
        self.asked.insert(operation, request);
        if request == Request::Flush {
            self.flushes.insert(operation, self.written);
        }
        if let Some((to, session)) = self.session {
            outputs.push(ask(to, session, operation, request));
        }
    }

    /// A connection to a copy is new, or frames to it may have been lost.
    pub fn connected(&mut self, copy: InstanceId, outputs: &mut Vec<ClientOutput>) {
        self.connected.insert(copy);
        self.leave(copy);
        if self.session.is_none() {
            self.enter(copy, outputs);
        }
    }

    /// Nothing is heard of a copy.
    pub fn silent(&mut self, copy: InstanceId, outputs: &mut Vec<ClientOutput>) {
        self.connected.remove(&copy);
        if self.leave(copy) {
            self.seek(outputs);
        }
    }

    /// A copy has said something.
    pub fn received(&mut self, from: InstanceId, message: &Message, outputs: &mut Vec<ClientOutput>) {
        match *message {
            Message::Entered { client, attempt, session, lost } if client == self.me && !self.ended => {
                let anew = self.goes_on_anew(from, attempt, session);
                if attempt != self.attempt && !anew {
                    return;
                }
                if self.has_lost_writes(lost) {
                    return self.end(outputs);
                }
                self.lost = Some(lost);
                (self.session, self.quiet) = (Some((from, session)), 0);
                self.attempt += u64::from(!anew);
                outputs.extend(self.asked.iter().map(|(operation, request)| ask(from, session, *operation, *request)));
            }
            Message::Answer { session, serial, result } if self.session == Some((from, session)) => {
                if result == Err(DiskError::Fenced) {
                    // Not executed, and never to be: whoever is primary is asked again, at once the first time. A primary
                    // that knows only a smaller volume says so in each session.
                    self.leave(from);
                    if !std::mem::replace(&mut self.refused, true) {
                        self.seek(outputs);
                    }
                    return;
                }
                let operation = OperationId(serial.0);
                if let Some(request) = self.asked.remove(&operation) {
                    self.quiet = 0;
                    self.note_answer(operation, request, result.is_ok());
                    outputs.push(ClientOutput::Done { operation, result });
                }
            }
            // Of the copies among themselves, of an earlier session, or for another start of this node.
            Message::Entered { .. } | Message::Answer { .. } | Message::Enter { .. } | Message::Ask { .. } => {}
            Message::Invite(_) | Message::Joined { .. } | Message::Prepare { .. } | Message::Prepared { .. } => {}
            Message::Renew { .. } | Message::Granted { .. } | Message::Reconciled(_) | Message::Settled(_) => {}
            Message::Copy { .. } | Message::Compare { .. } | Message::Compared { .. } => {}
            Message::Clear { .. } | Message::Refused(_) => {}
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, outputs: &mut Vec<ClientOutput>) {
        self.quiet = if self.asked.is_empty() { 0 } else { self.quiet.saturating_add(1) };
        self.refused = false;
        if self.session.is_none() || self.quiet >= PATIENCE {
            self.seek(outputs);
        }
    }

    /// The catalogue does not name this client any more, or it may have been told what is not so any more.
    pub fn end(&mut self, outputs: &mut Vec<ClientOutput>) {
        (self.ended, self.session) = (true, None);
        self.flushes.clear();
        let asked = std::mem::take(&mut self.asked).into_keys();
        outputs.extend(asked.map(|operation| ClientOutput::Done { operation, result: Err(DiskError::Fenced) }));
    }

    /// Whether what is asked now is answered soon, as far as is known.
    pub fn is_served(&self) -> bool {
        self.session.is_some() && self.quiet < PATIENCE
    }

    /// Whether nothing is executed any more.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// What the copies had lost when it was served last: to be kept for as long as its device, in memory that outlives this
    /// process.
    pub fn lost(&self) -> Option<Stamp> {
        self.lost
    }

    /// The copy that serves it.
    pub fn host(&self) -> Option<InstanceId> {
        self.session.map(|(host, _)| host)
    }

    /// Whether this would still be a request of the present session.
    pub fn still_asks(&self, to: InstanceId, message: &Message) -> bool {
        let Message::Ask { session, serial, .. } = *message else { return false };
        self.session == Some((to, session)) && self.asked.contains_key(&OperationId(serial.0))
    }

    /// What an operation that is not answered is about.
    pub fn request(&self, operation: OperationId) -> Option<Request> {
        self.asked.get(&operation).copied()
    }

    fn note_answer(&mut self, operation: OperationId, request: Request, well: bool) {
        let covers = self.flushes.remove(&operation);
        if well {
            self.written += u64::from(request.is_mutation());
            self.covered = self.covered.max(covers.unwrap_or_default());
        }
    }

    /// Whether what was completed and is not flushed may be gone: the copies have lost something since it was served last.
    fn has_lost_writes(&self, lost: Stamp) -> bool {
        #[cfg(test)]
        if self.goes_on {
            return false;
        }
        self.covered < self.written && self.lost.is_some_and(|known| known != lost)
    }

    /// The session with a copy is over, if there is one.
    fn leave(&mut self, copy: InstanceId) -> bool {
        let left = self.session.take_if(|(host, _)| *host == copy).is_some();
        self.attempt += u64::from(left);
        left
    }

    /// The copy that serves this client has begun another session of the attempt that the present one is of: a late frame of an
    /// earlier life of the client had ended that.
    fn goes_on_anew(&self, from: InstanceId, attempt: u64, session: Session) -> bool {
        let later = |known: Session| known.host == session.host && known.number < session.number;
        let here = self.session.is_some_and(|(host, known)| host == from && later(known));
        here && attempt + 1 == self.attempt
    }

    /// Asks every copy whether it is primary.
    fn seek(&self, outputs: &mut Vec<ClientOutput>) {
        self.connected.iter().for_each(|copy| self.enter(*copy, outputs));
    }

    fn enter(&self, to: InstanceId, outputs: &mut Vec<ClientOutput>) {
        // The one that serves now is not disturbed: it may only be slow.
        let attempt = self.attempt - u64::from(self.host() == Some(to));
        if !self.ended {
            let message = Message::Enter { client: self.me, attempt };
            outputs.push(ClientOutput::Send { to, message, operation: None });
        }
    }
}

fn ask(to: InstanceId, session: Session, operation: OperationId, request: Request) -> ClientOutput {
    let message = Message::Ask { session, serial: SerialNumber(operation.0), request };
    ClientOutput::Send { to, message, operation: Some(operation) }
}

#[cfg(test)]
#[path = "client/tests.rs"]
mod tests;
