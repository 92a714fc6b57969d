//! The fixed header that every frame begins with.
//!
//! # Invariants
//! * Magic, version and the place and reach of the header's checksum are the same in every version, so that a newer
//!   Tandem can be told from damage.
//! * Every bit is covered by the checksum, and nothing is allocated or read on before it and all limits were checked.
//! ```text
//!   0 magic (4)         4 version (2)      6 kind (1)          7 operation (1)
//!   8 length of what follows (4)          12 blocks: 4 KiB of payload, and as many crcs (4)
//!  16 volume (16)      32 generation (8)  40 version of the configuration (8)
//!  48 incarnation (8)  56 serial (8)      64 offset in the volume, bytes (8)  72 value (8)
//!  80 count (4)        84 crc32c of body and crcs (4)          88 crc32c of the header before (4)
//! ```
//! All numbers are little-endian. After the header come the body, the crcs and the payload. What a kind does not use is 0.

use crate::protocol::{ConfigurationVersion, Generation, Incarnation, MAX_MARKS, SerialNumber, Stamp};
use crate::store::format::{Input, Output};
use crate::volume::{BLOCK_SIZE, MAX_REQUEST_BLOCKS, VolumeId};

/// Bytes of a header.
pub const HEADER: usize = 92;
/// The format of frames.
pub const VERSION: u16 = 1;
/// What every frame begins with.
pub const MAGIC: [u8; 4] = *b"TDMP";
/// Bytes of the largest body: every mark of a copy, four bytes each, in [`Message::Joined`](crate::protocol::Message).
pub const MAX_BODY: u32 = 4 * MAX_MARKS as u32;
/// Bytes of one payload block and of its crc.
const BLOCK_AND_CRC: u32 = BLOCK_SIZE as u32 + 4;
/// Bytes of the largest frame: the largest request that a device or a resync makes is one frame, never more.
pub const MAX_FRAME: usize = HEADER + (MAX_BODY + MAX_REQUEST_BLOCKS * BLOCK_AND_CRC) as usize;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Handshake: who calls.
    Hello = 1,
    /// Handshake: who answers.
    Welcome = 2,
    /// Handshake: the caller is the one that said hello just now.
    Confirm = 3,
    /// Handshake: why not.
    Refuse = 4,
    /// The connection is alive.
    Heartbeat = 5,
    /// [`Message::Invite`](crate::protocol::Message::Invite), and so on.
    Invite = 16,
    /// A message.
    Joined = 17,
    /// A message.
    Prepare = 18,
    /// A message.
    Prepared = 19,
    /// A message.
    Renew = 20,
    /// A message.
    Granted = 21,
    /// A message.
    Reconciled = 22,
    /// A message.
    Settled = 23,
    /// A message.
    Clear = 24,
    /// A message.
    Refused = 25,
    /// A message.
    Copy = 26,
    /// A message.
    Compare = 27,
    /// A message.
    Compared = 28,
    /// A message, of a node without a copy; a Tandem that knows none refuses it.
    Enter = 29,
    /// A message.
    Entered = 30,
    /// A message.
    Ask = 31,
    /// A message.
    Answer = 32,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        use Kind::*;
        let handshake = [Hello, Welcome, Confirm, Refuse, Heartbeat];
        let messages = [Invite, Joined, Prepare, Prepared, Renew, Granted, Reconciled, Settled, Clear, Refused];
        let pieces = [Copy, Compare, Compared];
        let clients = [Enter, Entered, Ask, Answer];
        let all = handshake.into_iter().chain(messages).chain(pieces).chain(clients);
        all.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Something else speaks.
    #[error("not a frame of Tandem's: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// Damage on the way.
    #[error("a frame's {part} is damaged: its crc32c is {computed:#010x} and {stored:#010x} was sent")]
    Checksum {
        /// header or body.
        part: &'static str,
        /// In the frame.
        stored: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// Another Tandem.
    #[error(
        "the other side speaks version {0} of the replicas' protocol, this one version {VERSION}: upgrade the older one"
    )]
    Version(u16),
    /// Unknown kind.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// Larger than anything that is sent.
    #[error("a frame of {length} bytes with {blocks} blocks is larger than any that is sent")]
    TooLarge {
        /// Bytes after the header.
        length: u32,
        /// Blocks of payload.
        blocks: u32,
    },
    /// The checksum is right and a field is not: sent by a defective Tandem.
    #[error("the field {0} of a frame has an impossible value")]
    Field(&'static str),
    /// The bytes end before the frame does.
    #[error("a frame ends after {have} of {need} bytes")]
    Truncated {
        /// Bytes of the frame.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
}

/// A header's fields; the lengths fit each other and all limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Which request or result, by kind.
    pub operation: u8,
    /// Bytes of the body, at most [`MAX_BODY`].
    pub body: u32,
    /// Blocks of the payload, at most [`MAX_REQUEST_BLOCKS`].
    pub blocks: u32,
    /// Whose.
    pub volume: VolumeId,
    /// Of the configuration.
    pub stamp: Stamp,
    /// Of the copy that is not primary, or of the client; of a client's session: of its host.
    pub incarnation: Incarnation,
    /// In the primary's term.
    pub serial: SerialNumber,
    /// Where in the volume, in bytes.
    pub offset: u64,
    /// By kind: a floor, the first serial that is not covered, seconds, an attempt, the number of a client's session.
    pub value: u64,
    /// By kind: blocks of the range, number of extents or name of a seal, nanoseconds.
    pub count: u32,
    /// Of the body and the crcs behind it.
    pub body_crc: u32,
}

impl Header {
    /// One without body, payload and fields.
    pub fn new(kind: Kind, volume: VolumeId) -> Self {
        Self {
            kind,
            operation: 0,
            body: 0,
            blocks: 0,
            volume,
            stamp: Stamp::default(),
            incarnation: Incarnation::default(),
            serial: SerialNumber::default(),
            offset: 0,
            value: 0,
            count: 0,
            body_crc: 0,
        }
    }

    /// Bytes between the header and the payload.
    pub fn table(&self) -> usize {
        (self.body + 4 * self.blocks) as usize
    }

    /// Bytes of the payload.
    pub fn payload(&self) -> usize {
        self.blocks as usize * BLOCK_SIZE as usize
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut out = Output { bytes: &mut bytes, at: 0 };
        out.put(&MAGIC);
        out.u16(VERSION);
        out.u8(self.kind as u8);
        out.u8(self.operation);
        out.u32(self.body + self.blocks * BLOCK_AND_CRC);
        out.u32(self.blocks);
        out.put(&self.volume.to_bytes());
        out.u64(self.stamp.generation.0);
        out.u64(self.stamp.version.0);
        out.u64(self.incarnation.0);
        out.u64(self.serial.0);
        out.u64(self.offset);
        out.u64(self.value);
        out.u32(self.count);
        out.u32(self.body_crc);
        let crc = crc32c::crc32c(&out.bytes[..out.at]);
        out.u32(crc);
        bytes
    }

    /// From bytes that anybody may have sent.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, FrameError> {
        let truncated = FrameError::Truncated { need: HEADER, have: bytes.len() };
        let mut input = Input { bytes, at: 0 };
        let magic: [u8; 4] = input.take().ok_or(truncated)?;
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let computed = crc32c::crc32c(&bytes[..HEADER - 4]);
        let stored = Input { bytes, at: HEADER - 4 }.u32().ok_or(truncated)?;
        if stored != computed {
            return Err(FrameError::Checksum { part: "header", stored, computed });
        }
        let version = input.u16().ok_or(truncated)?;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        Self::fields(input).ok_or(truncated)?
    }

    /// The fields after the version; `None` where the bytes end.
    fn fields(mut input: Input<'_>) -> Option<Result<Self, FrameError>> {
        let (kind, operation) = (input.u8()?, input.u8()?);
        let (length, blocks) = (input.u32()?, input.u32()?);
        let Some(kind) = Kind::from_number(kind) else { return Some(Err(FrameError::Kind(kind))) };
        if blocks > MAX_REQUEST_BLOCKS || length > blocks * BLOCK_AND_CRC + MAX_BODY {
            return Some(Err(FrameError::TooLarge { length, blocks }));
        }
        let Some(body) = length.checked_sub(blocks * BLOCK_AND_CRC) else {
            return Some(Err(FrameError::Field("length")));
        };
        Some(Ok(Self {
            kind,
            operation,
            body,
            blocks,
            volume: VolumeId::from_bytes(input.take()?),
            stamp: Stamp { generation: Generation(input.u64()?), version: ConfigurationVersion(input.u64()?) },
            incarnation: Incarnation(input.u64()?),
            serial: SerialNumber(input.u64()?),
            offset: input.u64()?,
            value: input.u64()?,
            count: input.u32()?,
            body_crc: input.u32()?,
        }))
    }
}
