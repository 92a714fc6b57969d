//! What copies say to each other. Plain data, ready for a wire codec.
//!
//! Invariants: every frame of a session names the configuration and the receiver's or sender's incarnation, so nothing
//! sent under an older configuration or to a process that has died is ever executed. Frames may be lost, repeated and
//! reordered: the core repeats and recognises them by serial number.

use super::configuration::{Configuration, Stamp};
use super::hot::Extent;
use super::piece::{BlockSet, Piece};
use super::{DiskError, Now, OperationId, Request, Tag};
use crate::volume::BlockRange;

/// One start of one copy's core: the transport makes it (never the same twice for a copy).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// Place of a mutation, flush, seal or copied range in a primary's term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SerialNumber(pub u64);

impl SerialNumber {
    /// The one that follows.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A client's conversation with one primary: never the same twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session {
    /// Of the copy that serves it.
    pub host: Incarnation,
    /// Rises with every session of that start.
    pub number: u64,
}

/// What every frame of a session carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// The configuration it belongs to.
    pub stamp: Stamp,
    /// Of the copy that is not primary.
    pub incarnation: Incarnation,
}

/// Whose bytes go with a message: the engine finds them, the core never sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Buffer {
    /// No bytes.
    None,
    /// The buffer of a device request.
    Request(Tag),
    /// What this operation read, or digests of that; valid until the next message of the core that names it is sent.
    Operation(OperationId),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// The primary shows a committed configuration and asks for an answer under it.
    Invite(Box<Configuration>),
    /// The copy has made that configuration durable, with nothing older in flight. Also the answer of a restarted copy
    /// to a frame for its former incarnation.
    Joined {
        /// The answer's session.
        frame: Frame,
        /// It has kept everything that it ever acknowledged.
        intact: bool,
        /// Its hot extents.
        hot: Box<[Extent]>,
    },
    /// Execute this. A read is the primary's way to fetch a range; its bytes come with [`Message::Prepared`].
    Prepare {
        /// Session.
        frame: Frame,
        /// Its place.
        serial: SerialNumber,
        /// Everything below was answered by every other copy.
        floor: SerialNumber,
        /// What.
        request: Request,
    },
    /// Executed: in the cache of this copy, or on stable media for a flush.
    Prepared {
        /// Session.
        frame: Frame,
        /// Which.
        serial: SerialNumber,
        /// How.
        result: Result<(), DiskError>,
    },
    /// Write these blocks, whose bytes come with it; without bytes they are zeros. Answered by [`Message::Prepared`].
    Copy {
        /// Session.
        frame: Frame,
        /// Its place.
        serial: SerialNumber,
        /// Everything below was answered by every other copy.
        floor: SerialNumber,
        /// Which blocks.
        piece: Piece,
    },
    /// Say which blocks of the range have other digests than those that come with it.
    Compare {
        /// Session.
        frame: Frame,
        /// Its place.
        serial: SerialNumber,
        /// Everything below was answered by every other copy.
        floor: SerialNumber,
        /// Of at most [`COMPARED_BLOCKS`](super::COMPARED_BLOCKS).
        range: BlockRange,
    },
    /// These differ, counted from the first of the range.
    Compared {
        /// Session.
        frame: Frame,
        /// Which.
        serial: SerialNumber,
        /// How.
        differs: Result<BlockSet, DiskError>,
    },
    /// The primary asks for its lease.
    Renew {
        /// Session.
        frame: Frame,
        /// By the primary's clock.
        sent: Now,
    },
    /// This secondary promotes nobody, itself included, for lease + margin from when it says so.
    Granted {
        /// Session.
        frame: Frame,
        /// Of the request.
        sent: Now,
    },
    /// This copy is equal to the primary's now: it is promotable, and its old marks mean nothing any more.
    Reconciled(Frame),
    /// That is durable.
    Settled(Frame),
    /// A flush on every copy covers everything below this serial: marks last used before it may go.
    Clear {
        /// Session.
        frame: Frame,
        /// The first serial that is not covered.
        below: SerialNumber,
    },
    /// The receiver's configuration is older than this one: it must read the catalogue.
    Refused(Stamp),
    /// A node without a copy asks whoever is primary to serve it.
    Enter {
        /// Of its start.
        client: Incarnation,
        /// The newest one counts.
        attempt: u64,
    },
    /// It is served from now on: nothing that it asked for before is executed any more.
    Entered {
        /// Whom.
        client: Incarnation,
        /// Which of its attempts.
        attempt: u64,
        /// From now on.
        session: Session,
        /// [`Configuration::lost`], as the copies have it now.
        lost: Stamp,
    },
    /// A request of the client's device. The bytes of a write go with it.
    Ask {
        /// The newest one.
        session: Session,
        /// The client's name for it.
        serial: SerialNumber,
        /// What.
        request: Request,
    },
    /// It was executed, as the contract of a device says; the bytes of a read go with it. `Fenced`: it was not and never
    /// will be, and the session is over.
    Answer {
        /// The session.
        session: Session,
        /// Which.
        serial: SerialNumber,
        /// How.
        result: Result<(), DiskError>,
    },
}
