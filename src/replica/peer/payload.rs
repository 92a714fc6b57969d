//! What goes with a message of the core: blocks with the checksum of each, or what a seal names.
//!
//! Invariants: a checksum is made where the data enters, by [`Payload::new`], and checked where it is written, by
//! [`Payload::check`]; nothing in between makes it anew. At most [`MAX_REQUEST_BLOCKS`] whole blocks. What arrived lies where direct I/O takes it.

use crate::volume::{BLOCK_SIZE, MAX_REQUEST_BLOCKS, SnapshotId};
use bytes::Bytes;

/// Blocks and their checksums; cloning copies neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload {
    data: Bytes,
    /// Four bytes for each block, as they travel.
    crcs: Bytes,
    sealed: Option<Sealed>,
}

/// What a seal names: every copy makes the same snapshot, at the same point of the stream of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Milliseconds since 1970.
    pub created_ms: u64,
}

/// Memory for blocks at an address that direct I/O takes, so that nothing is copied before it is written.
#[derive(Debug)]
pub struct Blocks {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Blocks {
    /// So many bytes, all zero.
    pub fn zeros(length: usize) -> Self {
        let memory = vec![0u8; length + BLOCK_SIZE as usize];
        let start = memory.as_ptr().align_offset(BLOCK_SIZE as usize);
        Self { memory, start, length }
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }

    /// The bytes, shared from now on, at the same address.
    pub fn freeze(self) -> Bytes {
        Bytes::from(self.memory).slice(self.start..self.start + self.length)
    }

    /// Whether direct I/O takes bytes at this address.
    pub fn are_aligned(bytes: &[u8]) -> bool {
        (bytes.as_ptr() as usize).is_multiple_of(BLOCK_SIZE as usize)
    }
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
        Ok(Self { data, crcs: crcs.into(), sealed: None })
    }

    /// What goes with a seal.
    pub fn seal(sealed: Sealed) -> Self {
        Self { sealed: Some(sealed), ..Self::default() }
    }

    /// What a seal names.
    pub fn sealed(&self) -> Option<Sealed> {
        self.sealed
    }

    /// What arrived: as many crcs as the header has announced blocks.
    pub(super) fn received(data: Bytes, crcs: Bytes, sealed: Option<Sealed>) -> Self {
        Self { data, crcs, sealed }
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
