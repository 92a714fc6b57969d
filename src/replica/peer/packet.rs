//! Whole frames: a header, and what it announces.
//!
//! Invariants: header, body and crcs are checked here; the payload is not, its crcs go on with it to where it is written.

use super::header::{FrameError, HEADER, Header, Kind};
use super::hello::{self, Hello, Nonce, Reason};
use super::message;
use super::payload::Payload;
use crate::protocol::Message;
use crate::volume::VolumeId;
use bytes::Bytes;

/// What a frame says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// See [`hello`].
    Hello(Hello),
    /// The answer, with the caller's nonce.
    Welcome(Hello, Nonce),
    /// The last word, with the other's nonce.
    Confirm(Nonce),
    /// No.
    Refuse(Reason),
    /// Nothing to say.
    Heartbeat,
    /// A message of the core.
    Message(Message, Payload),
}

/// A frame's bytes, in the order in which they are sent.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Header, body and crcs.
    pub head: Vec<u8>,
    /// The payload, as it was given.
    pub data: Bytes,
}

impl Encoded {
    /// How many.
    pub fn bytes(&self) -> usize {
        self.head.len() + self.data.len()
    }
}

impl Packet {
    /// Its bytes, for a connection about this volume.
    pub fn encode(&self, volume: VolumeId) -> Encoded {
        let (mut header, mut table) = match self {
            Self::Hello(hello) => hello::encode(hello, None),
            Self::Welcome(hello, echo) => hello::encode(hello, Some(*echo)),
            Self::Confirm(echo) => (Header { body: 16, ..Header::new(Kind::Confirm, volume) }, echo.0.to_vec()),
            Self::Refuse(reason) => {
                (Header { operation: *reason as u8, ..Header::new(Kind::Refuse, volume) }, Vec::new())
            }
            Self::Heartbeat => (Header::new(Kind::Heartbeat, volume), Vec::new()),
            Self::Message(message, payload) => message::encode(volume, message, payload),
        };
        let mut data = Bytes::new();
        if let Self::Message(_, payload) = self {
            table.extend_from_slice(payload.table());
            data = payload.data().clone();
        }
        header.body_crc = crc32c::crc32c(&table);
        let mut head = Vec::with_capacity(HEADER + table.len());
        head.extend_from_slice(&header.encode());
        head.append(&mut table);
        Encoded { head, data }
    }

    /// From what followed a header: [`Header::table`] bytes and [`Header::payload`] bytes.
    pub fn decode(header: &Header, table: Bytes, data: Bytes) -> Result<Self, FrameError> {
        let have = HEADER + table.len() + data.len();
        if table.len() != header.table() || data.len() != header.payload() {
            return Err(FrameError::Truncated { need: HEADER + header.table() + header.payload(), have });
        }
        let computed = crc32c::crc32c(&table);
        if computed != header.body_crc {
            return Err(FrameError::Checksum { part: "body", stored: header.body_crc, computed });
        }
        let mut body = table;
        let crcs = body.split_off(header.body as usize);
        let packet = match header.kind {
            Kind::Hello | Kind::Welcome => match hello::decode(header, &body)? {
                (hello, Some(echo)) => return Ok(Self::Welcome(hello, echo)),
                (hello, None) => return Ok(Self::Hello(hello)),
            },
            Kind::Confirm => Self::Confirm(Nonce(body[..].try_into().map_err(|_| FrameError::Field("nonce"))?)),
            Kind::Refuse => Self::Refuse(Reason::from_number(header.operation).ok_or(FrameError::Field("reason"))?),
            Kind::Heartbeat => Self::Heartbeat,
            _ => {
                let (message, attached) = message::decode(header, &body)?;
                return Ok(Self::Message(message, Payload::received(data, crcs, attached)));
            }
        };
        // Nothing else is in these.
        let operation = if header.kind == Kind::Refuse { header.operation } else { 0 };
        let plain = Header { operation, body: header.body, ..Header::new(header.kind, header.volume) };
        let expected = if header.kind == Kind::Confirm { 16 } else { 0 };
        if (Header { body_crc: header.body_crc, ..plain }) != *header || header.body != expected {
            return Err(FrameError::Field("unused"));
        }
        Ok(packet)
    }

    /// The frame that `bytes` begin with, and what follows it.
    pub fn parse(bytes: &[u8]) -> Result<(VolumeId, Self, &[u8]), FrameError> {
        let truncated = |need| FrameError::Truncated { need, have: bytes.len() };
        let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or(truncated(HEADER))?;
        let header = Header::decode(header)?;
        let need = HEADER + header.table() + header.payload();
        let (table, rest) = rest.split_at_checked(header.table()).ok_or(truncated(need))?;
        let (data, rest) = rest.split_at_checked(header.payload()).ok_or(truncated(need))?;
        let packet = Self::decode(&header, Bytes::copy_from_slice(table), Bytes::copy_from_slice(data))?;
        Ok((header.volume, packet, rest))
    }
}
