//! What goes with a message of the core: blocks with the checksum of each, digests of blocks, or what a seal names.
//!
//! Invariants: a checksum is made where the data enters, by [`Payload::new`] or [`Payload::gather`], and checked where it is
//! written, by [`Payload::check`]; nothing in between makes it anew. At most [`MAX_REQUEST_BLOCKS`] whole blocks. What arrived
//! lies where direct I/O takes it.

use super::blocks::Blocks;
use crate::protocol::BlockSet;
use crate::volume::{BLOCK_SIZE, MAX_REQUEST_BLOCKS, SnapshotId};
use bytes::Bytes;

/// Blocks and their checksums; cloning copies neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload {
    data: Bytes,
    /// Four bytes for each block, as they travel.
    crcs: Bytes,
    attached: Attached,
}

/// What goes with a message that has no blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Attached {
    /// Nothing.
    #[default]
    Nothing,
    /// With a seal.
    Sealed(Sealed),
    /// With a comparison: [`DIGEST`] bytes for each block.
    Digests(Bytes),
}

/// Bytes of the digest of a block.
pub const DIGEST: usize = 32;

/// SHA-256 of a block: two that differ never look equal, whoever wrote them and whatever for. With the instructions that
/// processors have for it, it keeps up with a disk; a shorter or faster sum would let a database's user make two copies
/// differ for ever.
fn digest(block: &[u8]) -> [u8; DIGEST] {
    let mut digest = [0; DIGEST];
    // What was never written need not be computed each time; nobody can make a block whose SHA-256 is this.
    if !is_zero(block) {
        digest.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, block).as_ref());
    }
    digest
}

/// Whether a block is all zeros.
pub fn is_zero(block: &[u8]) -> bool {
    const ZEROS: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];
    *block == ZEROS
}

/// The digest of each block, one behind the other.
pub fn digests(data: &[u8]) -> Bytes {
    data.chunks(BLOCK_SIZE as usize).flat_map(digest).collect::<Vec<_>>().into()
}

/// What a seal names: every copy makes the same snapshot, at the same point of the stream of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Milliseconds since 1970.
    pub created_ms: u64,
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

fn fits(length: usize) -> Result<(), BadLength> {
    let most = (BLOCK_SIZE * u64::from(MAX_REQUEST_BLOCKS)) as usize;
    if length.is_multiple_of(BLOCK_SIZE as usize) && length <= most { Ok(()) } else { Err(BadLength(length)) }
}

impl Payload {
    /// Makes the checksums.
    pub fn new(data: Bytes) -> Result<Self, BadLength> {
        fits(data.len())?;
        let crcs = data.chunks(BLOCK_SIZE as usize).flat_map(|block| crc32c::crc32c(block).to_le_bytes());
        let crcs = crcs.collect::<Vec<_>>().into();
        Ok(Self { data, crcs, attached: Attached::Nothing })
    }

    /// So many bytes, which `fill` puts where it is told, each block by its offset. A block is summed while the processor's cache
    /// has it.
    pub fn gather(length: usize, mut fill: impl FnMut(usize, &mut [u8])) -> Result<Self, BadLength> {
        fits(length)?;
        let (mut data, mut offset) = (Blocks::new(length), 0);
        let mut crcs = Vec::with_capacity(length / BLOCK_SIZE as usize * 4);
        for block in data.bytes_mut().chunks_mut(BLOCK_SIZE as usize) {
            fill(offset, block);
            crcs.extend_from_slice(&crc32c::crc32c(block).to_le_bytes());
            offset += block.len();
        }
        Ok(Self { data: data.freeze(), crcs: crcs.into(), attached: Attached::Nothing })
    }

    /// What goes with a seal.
    pub fn seal(sealed: Sealed) -> Self {
        Self { attached: Attached::Sealed(sealed), ..Self::default() }
    }

    /// What goes with a comparison.
    pub fn digests(digests: Bytes) -> Self {
        Self { attached: Attached::Digests(digests), ..Self::default() }
    }

    /// What goes with it beside its blocks.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// What a seal names.
    pub fn sealed(&self) -> Option<Sealed> {
        match self.attached {
            Attached::Sealed(sealed) => Some(sealed),
            Attached::Nothing | Attached::Digests(_) => None,
        }
    }

    /// Some of its blocks, which are those of `from`, with the checksums that they have.
    pub fn select(&self, from: BlockSet, blocks: BlockSet) -> Self {
        let (mut data, mut crcs) = (Vec::with_capacity(self.data.len()), Vec::new());
        let pairs = self.data.chunks(BLOCK_SIZE as usize).zip(self.crcs.chunks(4));
        for (_, (block, crc)) in from.blocks().zip(pairs).filter(|(number, _)| blocks.contains(*number)) {
            data.extend_from_slice(block);
            crcs.extend_from_slice(crc);
        }
        Self { data: data.into(), crcs: crcs.into(), attached: Attached::Nothing }
    }

    /// What arrived: as many crcs as the header has announced blocks.
    pub(super) fn received(data: Bytes, crcs: Bytes, attached: Attached) -> Self {
        Self { data, crcs, attached }
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

    /// Whether there are blocks and all of them are zeros.
    pub fn is_zero(&self) -> bool {
        !self.data.is_empty() && self.data.chunks(BLOCK_SIZE as usize).all(is_zero)
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
