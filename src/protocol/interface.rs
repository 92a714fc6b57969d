//! What the core is told and what it wants: its whole interface.
//!
//! Invariants: plain data; an output with an operation is answered once; "persist, then promise" is an output and the
//! input that says it is done.

use super::configuration::{Configuration, Lacks, Stamp};
use super::hot::Extent;
use super::message::{Buffer, Incarnation, Message, SerialNumber};
use super::piece::{BlockSet, Missing, Piece};
use super::term::Outcome;
use super::{DiskError, OperationId, Request, Tag};
use crate::volume::{BlockRange, InstanceId};
use std::collections::BTreeSet;
use std::time::Duration;

/// What happens to a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The device or the operator asks. The tag is free. What outlived a former engine comes **before any other input**
    /// and in its first order of arrival: if another copy was primary since, it is answered and not executed again.
    Request {
        /// Who.
        tag: Tag,
        /// For what.
        request: Request,
    },
    /// The store finished an operation.
    Completed {
        /// Which.
        operation: OperationId,
        /// How.
        result: Result<(), DiskError>,
    },
    /// The answer of a `Complete` was written and its slot freed.
    Replied {
        /// Whose.
        tag: Tag,
    },
    /// The pool has space again: whatever waits for it is tried once more.
    SpaceFreed,
    /// What the plan has next, or that there is nothing.
    Planned {
        /// The `Plan` or `NextRange`.
        operation: OperationId,
        /// Within the volume, behind all that the plan has had before.
        missing: Result<Option<Missing>, DiskError>,
    },
    /// The blocks of a `Compare` that differ here.
    Compared {
        /// Which.
        operation: OperationId,
        /// Counted from the first of its range.
        differs: Result<BlockSet, DiskError>,
    },
    /// A frame arrived.
    Received {
        /// The copy whose certificate and instance id the transport has checked.
        from: InstanceId,
        /// What it says.
        message: Message,
    },
    /// A connection to a copy is new: whatever is not answered is said again.
    Connected(InstanceId),
    /// Nothing was heard of a copy for [`SILENCE`](super::primary::SILENCE), or its connection makes no progress.
    Silent(InstanceId),
    /// The catalogue's answer to a proposal.
    Proposed {
        /// The version that was proposed.
        stamp: Stamp,
        /// What became of it.
        outcome: Outcome,
    },
    /// Read from the catalogue itself, never from a cache: at a start, after `ReadConfiguration`, by a watch.
    Configuration(Box<Configuration>),
    /// What the volume's spec wants.
    Wish(Wish),
    /// A person wants a copy compared with this one, block for block: it lacks everything from now on. Only a primary that
    /// serves and has every acknowledged write does that; for any other it means nothing.
    Resync(InstanceId),
    /// Time has passed; every [`HEARTBEAT`](super::primary::HEARTBEAT).
    Tick,
    /// Another node uses the volume in place of this one's device: what that has asked under tags below this one and has not
    /// begun is answered with an error.
    FenceRequests {
        /// Above the tags of devices.
        below: Tag,
    },
}

/// What the core wants. Every variant with an `operation` is answered by one `Completed` unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Execute on this node's copy.
    Disk {
        /// Names the completion.
        operation: OperationId,
        /// Whose buffer.
        tag: Tag,
        /// What.
        request: Request,
    },
    /// Answer the request.
    Complete {
        /// Whose.
        tag: Tag,
        /// How.
        result: Result<(), DiskError>,
    },
    /// Execute on this node's copy what another one sent; the bytes are those of its frame.
    Apply {
        /// Names the completion.
        operation: OperationId,
        /// Whose frame.
        from: InstanceId,
        /// Which.
        serial: SerialNumber,
        /// What; for a read the bytes go out with `Prepared`.
        request: Request,
    },
    /// The same for some blocks of a range; the bytes are those of the frame, one block after the other.
    ApplyPiece {
        /// Names the completion.
        operation: OperationId,
        /// Whose frame.
        from: InstanceId,
        /// Which.
        serial: SerialNumber,
        /// What.
        piece: Piece,
    },
    /// Read the range here and say which of its blocks have other digests than those of the frame: answered by `Compared`.
    Compare {
        /// Names the answer.
        operation: OperationId,
        /// Whose frame.
        from: InstanceId,
        /// Which.
        serial: SerialNumber,
        /// What.
        range: BlockRange,
    },
    /// Read into a buffer of the engine's, which is kept for as long as
    /// [`Replica::copies`](super::Replica::copies) says so.
    ReadPiece {
        /// Names the completion and the buffer.
        operation: OperationId,
        /// Which blocks.
        piece: Piece,
    },
    /// Put everything that this copy has executed on stable media.
    FlushHere {
        /// Names the completion.
        operation: OperationId,
    },
    /// Completed when the record is on stable media beside the copy. From then on the store keeps, for each candidate
    /// that left since the record before, what it lacks: the extents that are hot now, and the blocks written from now
    /// on, also those that are copied here.
    Persist {
        /// Names the completion.
        operation: OperationId,
        /// What.
        record: Box<Record>,
    },
    /// Completed when exactly these extents are marked on stable media. A crash leaves this set or the one before.
    WriteHot {
        /// Names the completion.
        operation: OperationId,
        /// The whole set, at most [`MAX_MARKS`](super::MAX_MARKS).
        extents: Box<[Extent]>,
    },
    /// Make a plan of what is missing, in place of any other, and answer with the first of it as `Planned`. What was still to
    /// be answered about another plan is void: it must not take anything from this one.
    Plan {
        /// Names the answer.
        operation: OperationId,
        /// What a copy lacks by the layers; `None`: only the suspected extents.
        lacks: Option<Lacks>,
        /// What belongs to it too.
        suspects: Suspects,
    },
    /// Answer with what the plan has next as `Planned`.
    NextRange {
        /// Names the answer.
        operation: OperationId,
    },
    /// Send; loss and repetition do no harm.
    Send {
        /// To whom.
        to: InstanceId,
        /// What.
        message: Message,
        /// With whose bytes.
        buffer: Buffer,
    },
    /// Replace the configuration in the catalogue if its stamp still is `expected`; answered by `Proposed`.
    Propose {
        /// The compare.
        expected: Stamp,
        /// The swap.
        next: Box<Configuration>,
    },
    /// Read the catalogue and answer with `Configuration`.
    ReadConfiguration,
    /// This copy was primary, and is no more; or it is, and no copy has what it may have lost, if a device has outlived
    /// that. Whatever its device is still asked for, by whoever has not heard of it, is answered with an error, also if it
    /// becomes primary again. Only another device is served then. It is said before the configuration that ends the term, or
    /// says what is lost, is durable, since another life of the copy would not know it.
    FenceDevice,
}

/// Extents whose blocks may differ, whatever the layers say.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Suspects {
    /// These, and those that were hot here when the copy left.
    Marked(Box<[Extent]>),
    /// Only these, of what was under way when the copy left: it has kept everything that it had answered.
    Unanswered(Box<[Extent]>),
}

/// What the volume's spec wants; written by controllers and people.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Wish {
    /// Which copy shall be primary.
    pub primary: Option<InstanceId>,
    /// Which copies there shall be.
    pub copies: BTreeSet<InstanceId>,
}

/// What is durable beside a copy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// The last one it has acted under.
    pub configuration: Configuration,
    /// It has kept everything that it ever acknowledged: as a member, every acknowledged write. Never of a copy that lacks
    /// everything, or that is not named.
    pub intact: bool,
}

/// What became of the node's memory between two starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// Only the engine died: completed writes are in the node's cache.
    Kept,
    /// The node died since the record was written (the record carries the node's boot id), or a flush of an engine before this
    /// one failed: writes that were not flushed may be gone.
    Lost,
}

/// What a copy is under its durable configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It committed a term of its own since it was started.
    Primary(Primary),
    /// It has every acknowledged write.
    Secondary,
    /// It is being brought up to date, or will be; never promotable.
    Candidate,
    /// Not a copy of the configuration; it may propose nothing.
    Outdated,
}

/// How far a primary is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Primary {
    /// Waits for all members, then makes their hot extents equal.
    Reconciling,
    /// They are equal; each member makes durable that it is.
    Settling,
    /// Takes requests.
    Serving,
}

/// A copy at its start.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Which copy.
    pub copy: InstanceId,
    /// Never the same twice for this copy.
    pub incarnation: Incarnation,
    /// As it is on disk.
    pub record: Record,
    /// As they are on disk.
    pub hot: Vec<Extent>,
    /// Whether the node died since the copy was last open.
    pub memory: Memory,
}

/// A count of what a volume is busy with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Status {
    /// Requests that are not answered yet.
    pub requests: usize,
    /// Of these: wait for an earlier one that overlaps, for a mark, or for this copy to serve.
    pub queued: usize,
    /// Of these: wait for space in the pool.
    pub no_space: usize,
    /// How long the oldest has been here.
    pub oldest: Option<Duration>,
}
