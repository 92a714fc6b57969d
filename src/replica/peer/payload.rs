//! Blocks on their way from one copy to another, with the checksum of each.
//!
//! Invariants: a checksum is made where the data enters, by [`Payload::new`], and checked where it is written, by
//! [`Payload::check`]; nothing in between makes it anew. At most [`MAX_REQUEST_BLOCKS`] whole blocks.

use crate::volume::{BLOCK_SIZE, MAX_REQUEST_BLOCKS};
use bytes::Bytes;

/// Blocks and their checksums; cloning copies neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload {
    data: Bytes,
    /// Four bytes for each block, as they travel.
    crcs: Bytes,
}

/// The data is no payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes are not whole blocks, or more than {MAX_REQUEST_BLOCKS}")]
pub struct BadLength(pub usize);

/// A block is not what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("block {block} of a payload is damaged: its crc32c is {computed:#010x} and {sent:#010x} was sent")]
pub struct Damaged {
    /// From the first of the payload, which is 0.
    pub block: usize,
    /// Where the data entered.
    pub sent: u32,
    /// Of the data here.
    pub computed: u32,
}

impl Payload {
    /// Makes the checksums.
    pub fn new(data: Bytes) -> Result<Self, BadLength> {
        let block = BLOCK_SIZE as usize;
        if !data.len().is_multiple_of(block) || data.len() > block * MAX_REQUEST_BLOCKS as usize {
            return Err(BadLength(data.len()));
        }
        let crcs = data.chunks(block).flat_map(|block| crc32c::crc32c(block).to_le_bytes()).collect::<Vec<_>>();
        Ok(Self { data, crcs: crcs.into() })
    }

    /// What arrived: as many crcs as the header has announced blocks.
    pub(super) fn received(data: Bytes, crcs: Bytes) -> Self {
        Self { data, crcs }
    }

    /// The blocks.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The checksums as they travel.
    pub(super) fn table(&self) -> &Bytes {
        &self.crcs
    }

    /// The checksum of each block.
    pub fn crcs(&self) -> impl Iterator<Item = u32> + '_ {
        self.crcs.as_chunks::<4>().0.iter().map(|crc| u32::from_le_bytes(*crc))
    }

    /// How many blocks.
    pub fn blocks(&self) -> u32 {
        (self.crcs.len() / 4) as u32
    }

    /// Whether each block is what entered at the other end.
    pub fn check(&self) -> Result<(), Damaged> {
        for (block, (data, sent)) in self.data.chunks(BLOCK_SIZE as usize).zip(self.crcs()).enumerate() {
            let computed = crc32c::crc32c(data);
            if computed != sent {
                return Err(Damaged { block, sent, computed });
            }
        }
        Ok(())
    }
}
