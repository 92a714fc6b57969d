//! The pure core of a volume: a function of (state, now, input) that decides order and never waits.
//!
//! ```text
//!   device requests ─┐                       ┌─> Disk { operation, request }   to the store of this copy
//!   disk completions ├─> Replica::step(now) ─┤
//!   operator's seals ┘                       └─> Complete { tag, result }      to the device or the operator
//! ```
//!
//! # The contract of a device
//! * A completed **write** is in this node's kernel or disk cache; a killed engine does not lose it.
//! * A completed **flush** has put every write that was completed before the flush was submitted on stable media.
//! * Between flushes, completed writes may reach stable media in any order; a 4 KiB block that was not flushed
//!   may be old, new or a mix in units of the disk's atomic write.
//! * Requests that overlap are executed one at a time, in order of arrival; a request's range is held until its reply is
//!   written ([`Input::Replied`]), so a replayed write never lands on a newer acknowledged one.
//! * A **discard** or **write-zeroes** reads as zeros afterwards, for ever, also below a snapshot's layer.
//! * A **seal** (snapshot, cut) is prefix-closed: what was acknowledged before it is in, what was submitted after it is not.
//! * No space is never an error of a write: it waits until there is space ([`Input::SpaceFreed`]).
//!
//! # What is here and what is not
//! The same core mirrors a volume (`docs/protocol.md`): configurations, terms, leases, hot extents, resync. A volume with
//! one copy, [`Replica::sole`], is a configuration with one member. The engine executes every output
//! (`src/replica/engine/outputs.rs`).
//!
//! # Invariants
//! No clock, socket, file, random number or `await` in here (clippy's `disallowed_*` lists, denied below);
//! every collection is bounded by the number of tags,
//! copies or hot extents; "persist, then promise" is two steps: a `Disk` output, and only its
//! `Completed` input lets `step` emit `Complete`.
#![deny(clippy::disallowed_methods, clippy::disallowed_types, clippy::wildcard_enum_match_arm)]

/// Whether a core carries this planted mistake; never outside its tests.
macro_rules! planted {
    ($replica:expr, $mistake:ident) => {{
        #[cfg(test)]
        let planted = $replica.has(crate::protocol::tests::Planted::$mistake);
        #[cfg(not(test))]
        let planted = {
            let _ = &$replica;
            false
        };
        planted
    }};
}

mod admission;
mod client;
mod configuration;
mod copying;
mod host;
mod hot;
mod interface;
mod marks;
mod message;
#[cfg(test)]
mod model;
mod patience;
mod piece;
mod pieces;
mod primary;
mod replica;
mod requests;
mod secondary;
#[cfg(test)]
mod simulation;
mod term;
#[cfg(test)]
mod tests;
mod view;

pub use admission::{MAX_PIECES, MAX_TAGS};
pub use client::{Client, ClientOutput};
pub use configuration::{Configuration, ConfigurationVersion, Generation, Lacks, MAX_COPIES, Stamp};
pub use host::{Host, MAX_ASKED, Next, Standpoint};
pub use hot::{EXTENT_BLOCKS, Extent, MAX_HOT_EXTENTS, MAX_MARKS};
pub use interface::{Input, Member, Memory, Output, Primary, Record, Role, Status, Suspects, Wish};
pub use message::{Buffer, Frame, Incarnation, Message, SerialNumber, Session};
pub use patience::Because;
pub use piece::{BlockSet, COMPARED_BLOCKS, Missing, Piece};
pub use primary::{HEARTBEAT, LEASE, SILENCE};
pub use replica::Replica;
pub use secondary::MARGIN;
pub use term::Outcome;
pub use view::{Progress, Standing};

use crate::volume::BlockRange;
use std::time::Duration;

/// Time since the engine started; an argument of the core, which has no clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Now(pub Duration);

/// Who asked: the slot of a device request or the ticket of an operator's request. Unique while in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u32);

/// One disk operation, unique for the life of a `Replica` in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperationId(pub u64);

/// What a block device is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Read blocks into the request's buffer.
    Read(BlockRange),
    /// Write the request's buffer.
    Write(BlockRange),
    /// Put every completed write on stable media.
    Flush,
    /// The blocks are not needed; they read as zeros from now on and their space is freed.
    Discard(BlockRange),
    /// The blocks read as zeros from now on.
    WriteZeroes(BlockRange),
    /// End the current layer and start a new one; the sealed layer becomes what `name` calls it.
    Seal(SealName),
}

/// Names a sealed layer to the store: an index into what the operator's request carries. Opaque to the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SealName(pub u32);

impl Request {
    /// The blocks it touches; `None` for what orders itself against everything (flush, seal).
    pub fn range(self) -> Option<BlockRange> {
        match self {
            Self::Read(range) | Self::Write(range) | Self::Discard(range) | Self::WriteZeroes(range) => Some(range),
            Self::Flush | Self::Seal(_) => None,
        }
    }
    /// Whether it changes what later reads return.
    pub fn is_mutation(self) -> bool {
        match self {
            Self::Write(_) | Self::Discard(_) | Self::WriteZeroes(_) => true,
            Self::Read(_) | Self::Flush | Self::Seal(_) => false,
        }
    }
}

/// Why a disk operation did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum DiskError {
    /// The pool is full; the operation had no effect and may be repeated.
    #[error("the pool has no space left")]
    NoSpace,
    /// The disk failed; a write may have had any effect on its own blocks.
    #[error("the disk failed")]
    Failed,
    /// A checksum does not fit: the blocks are damaged.
    #[error("the data on disk is damaged")]
    Corrupt,
    /// Another copy is or may be primary: the request was not acknowledged and never will be.
    #[error("another copy of the volume is its primary")]
    Fenced,
}
