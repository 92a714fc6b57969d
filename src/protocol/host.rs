//! The other end of a [`Client`](super::Client): a copy that executes requests of a node without one, while it is primary.
//!
//! ```text
//!   Enter ─> entering ──(serves under a lease, the catalogue names the client, nothing of it is under way)──> session
//!   Ask of that session ─> Replica, as a request under a tag of its own ─Complete─> Answer
//! ```
//! # Invariants
//! * At most one session, of the newest attempt. One begins only when every request of the sessions before is answered here:
//!   executed to its end, or fenced. What comes late, of an older session, is never executed.
//! * Who may enter is what the catalogue said **after** this copy's term began: a client that was fenced by a later
//!   publication is known to whichever primary has served that one, and so to every primary after it. When the catalogue
//!   names another client, or none, the session ends before anything else is taken in.
//! * Nothing that came over the network is trusted: a request outside of the volume, a seal, or one too many is fenced, and
//!   the client asks again.

use super::message::{Incarnation, Message, SerialNumber, Session};
use super::{DiskError, Request, Stamp};
use crate::volume::InstanceId;

/// Requests of a client that are executed at a time, each with up to 1 MiB of data: as many as its device has slots.
pub const MAX_ASKED: usize = 65;

/// What a host must know of the core beside it.
#[derive(Clone, Copy, Debug)]
pub struct Standpoint {
    /// Of the configuration that it acts under, if it is primary.
    pub term: Option<Stamp>,
    /// Of that configuration: the same for as long as it serves in a term.
    pub lost: Stamp,
    /// Requests are answered: it serves, and its lease holds.
    pub answers: bool,
    /// No request of a device of this node is in the core.
    pub quiet: bool,
    /// Blocks of the volume.
    pub blocks: u64,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, yet.
    Wait,
    /// The catalogue must be read: [`Host::told`] follows.
    Read,
    /// To be sent to this client.
    Send(InstanceId, Message),
}

#[derive(Clone, Copy, Debug)]
struct Entering {
    from: InstanceId,
    client: Incarnation,
    attempt: u64,
}

#[derive(Clone, Copy, Debug)]
struct Serving {
    whose: Entering,
    session: Session,
    term: Stamp,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    session: Session,
    serial: SerialNumber,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Host {
    me: Incarnation,
    sessions: u64,
    /// What the catalogue said of the client, and the term that this copy was in before it was asked.
    known: Option<(Stamp, Option<InstanceId>)>,
    /// Who was named last, in whatever term: local devices give way to it.
    named: Option<InstanceId>,
    entering: Option<Entering>,
    serving: Option<Serving>,
    asked: Vec<Option<Asked>>,
    /// A planted mistake: every session is the newest.
    #[cfg(test)]
    pub(super) takes_any_session: bool,
    /// A planted mistake: what was known in an earlier term is enough.
    #[cfg(test)]
    pub(super) trusts_former_term: bool,
}

impl Host {
    /// Of one start of a copy; the incarnation is never used again.
    pub fn new(me: Incarnation) -> Self {
        Self {
            me,
            sessions: 0,
            named: None,
            known: None,
            entering: None,
            serving: None,
            asked: Vec::new(),
            #[cfg(test)]
            takes_any_session: false,
            #[cfg(test)]
            trusts_former_term: false,
        }
    }

    /// The catalogue, read when this copy was primary in that term, names this client or none.
    pub fn told(&mut self, client: Option<InstanceId>, term: Option<Stamp>) {
        let is_it = |whose: &Entering| client == Some(whose.from);
        self.serving = self.serving.filter(|serving| is_it(&serving.whose));
        self.entering = self.entering.filter(is_it);
        (self.named, self.known) = (client, term.map(|term| (term, client)));
    }

    /// The client that the catalogue named last, as far as this copy was told.
    pub fn client(&self) -> Option<InstanceId> {
        self.named
    }

    /// A client asks to be served.
    pub fn enter(&mut self, from: InstanceId, client: Incarnation, attempt: u64) {
        let whose = Entering { from, client, attempt };
        let older = |known: &Entering| (known.from, known.client) == (from, client) && known.attempt > attempt;
        if self.entering.as_ref().is_some_and(older) || self.serving.is_some_and(|serving| older(&serving.whose)) {
            return;
        }
        self.entering = Some(whose);
    }

    /// Begins a session if one is asked for and nothing is in its way. To be called whenever that may have changed.
    pub fn settle(&mut self, core: Standpoint) -> Next {
        let (Some(whose), Some(term)) = (self.entering, core.term) else { return Next::Wait };
        let known = self.known.filter(|(known, _)| *known == term || self.trusts_former_term());
        let Some((_, client)) = known else { return Next::Read };
        if client != Some(whose.from) {
            // It may have been published since; it asks again.
            self.entering = None;
            return Next::Read;
        }
        let same = |serving: &Serving| {
            let Entering { client, attempt, .. } = serving.whose;
            (client, attempt, serving.term) == (whose.client, whose.attempt, term)
        };
        if let Some(serving) = self.serving.filter(same) {
            // The answer was lost: nothing can have been asked since.
            self.entering = None;
            return Next::Send(whose.from, entered(whose, serving.session, core.lost));
        }
        // What comes of the session before is late from now on.
        self.serving = None;
        if !core.answers || !core.quiet || !self.is_idle() {
            return Next::Wait;
        }
        self.sessions += 1;
        let session = Session { host: self.me, number: self.sessions };
        (self.entering, self.serving) = (None, Some(Serving { whose, session, term }));
        Next::Send(whose.from, entered(whose, session, core.lost))
    }

    /// Whether nothing of any client is under way.
    pub fn is_idle(&self) -> bool {
        self.asked.iter().all(Option::is_none)
    }

    /// A client's request: the place that it has until it is done.
    ///
    /// # Errors
    /// It is not executed; the answer says so.
    pub fn ask(
        &mut self,
        from: InstanceId,
        session: Session,
        serial: SerialNumber,
        request: Request,
        core: Standpoint,
    ) -> Result<usize, Message> {
        let refused = Message::Answer { session, serial, result: Err(DiskError::Fenced) };
        let newest = |serving: &Serving| {
            let same = serving.session == session || self.takes_any_session();
            same && serving.whose.from == from && Some(serving.term) == core.term
        };
        let inside = match request {
            Request::Seal(_) => false,
            Request::Flush => true,
            Request::Read(range) | Request::Write(range) | Request::Discard(range) | Request::WriteZeroes(range) => {
                range.end() <= core.blocks
            }
        };
        if !self.serving.as_ref().is_some_and(newest) || !inside {
            return Err(refused);
        }
        let place = self.asked.iter().position(Option::is_none).unwrap_or(self.asked.len());
        if place >= MAX_ASKED {
            return Err(refused);
        }
        let asked = Some(Asked { session, serial });
        match self.asked.get_mut(place) {
            Some(free) => *free = asked,
            None => self.asked.push(asked),
        }
        Ok(place)
    }

    /// The core has ended the request in this place: the answer, if its client still waits for it here.
    pub fn done(&mut self, place: usize, result: Result<(), DiskError>) -> Option<(InstanceId, Message)> {
        let Asked { session, serial } = self.asked.get_mut(place)?.take()?;
        let serving = self.serving.filter(|serving| serving.session == session || self.takes_any_session())?;
        Some((serving.whose.from, Message::Answer { session, serial, result }))
    }

    #[cfg(test)]
    fn takes_any_session(&self) -> bool {
        self.takes_any_session
    }
    #[cfg(not(test))]
    fn takes_any_session(&self) -> bool {
        false
    }
    #[cfg(test)]
    fn trusts_former_term(&self) -> bool {
        self.trusts_former_term
    }
    #[cfg(not(test))]
    fn trusts_former_term(&self) -> bool {
        false
    }
}

fn entered(whose: Entering, session: Session, lost: Stamp) -> Message {
    Message::Entered { client: whose.client, attempt: whose.attempt, session, lost }
}
