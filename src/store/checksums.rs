//! The file `checksums`: the crc32c of each physical block that a sealed layer owns.
//!
//! Invariant: block `n` of the file has the checksums of physical blocks `n * 1022` and following, whatever they belong to;
//! its own checksum covers its place and the instance, so that a misplaced block is noticed:
//! ```text
//!   0 crc32c of instance, n and the bytes from 4 on (4)   4 magic with the version (4)   8 checksums (1022 x 4)
//! ```
//! Which of them mean anything, the layers know; the superblock carries the features.

use super::format::BLOCK;
use super::map::PhysicalBlock;
use crate::volume::InstanceId;

/// Checksums in a block of the file.
pub const PER_BLOCK: u32 = 1022;

const MAGIC: [u8; 4] = *b"TCS1";

/// Why a block of checksums cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChecksumsError {
    /// Not a whole block.
    #[error("checksums block {block}: {length} bytes instead of {BLOCK}")]
    Length {
        /// Which block.
        block: u32,
        /// Bytes.
        length: usize,
    },
    /// Nothing was ever written there.
    #[error("checksums block {block} was never written")]
    Blank {
        /// Which block.
        block: u32,
    },
    /// It is something else, or of a newer Tandem.
    #[error("checksums block {block} begins with {found:02x?}, which this Tandem does not know")]
    Magic {
        /// Which block.
        block: u32,
        /// What stands there.
        found: [u8; 4],
    },
    /// The bytes changed, or belong elsewhere.
    #[error("checksums block {block}: its crc32c is {computed:#010x} and {stored:#010x} was stored")]
    Checksum {
        /// Which block.
        block: u32,
        /// In the block.
        stored: u32,
        /// Of the block.
        computed: u32,
    },
}

/// Where the checksum of a physical block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Block of the file.
    pub block: u32,
    /// Index in that block.
    pub index: u32,
}

impl Place {
    /// The place of one physical block's checksum.
    pub fn of(physical: PhysicalBlock) -> Self {
        Self { block: physical.0 / PER_BLOCK, index: physical.0 % PER_BLOCK }
    }

    /// Offset of the block in the file, in bytes.
    pub fn offset(self) -> u64 {
        u64::from(self.block) * BLOCK as u64
    }
}

/// One block of the file. A checksum that was never set is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChecksumBlock {
    values: [u32; PER_BLOCK as usize],
}

impl Default for ChecksumBlock {
    fn default() -> Self {
        Self { values: [0; PER_BLOCK as usize] }
    }
}

impl ChecksumBlock {
    /// The checksum at [`Place::index`].
    ///
    /// # Panics
    /// If `index` is not below [`PER_BLOCK`].
    pub fn get(&self, index: u32) -> u32 {
        self.values[index as usize]
    }

    /// Sets the checksum at [`Place::index`].
    ///
    /// # Panics
    /// If `index` is not below [`PER_BLOCK`].
    pub fn set(&mut self, index: u32, checksum: u32) {
        self.values[index as usize] = checksum;
    }

    /// Writes block number `block` of the file of `instance` into `bytes`.
    pub fn encode(&self, instance: InstanceId, block: u32, bytes: &mut [u8; BLOCK]) {
        bytes[4..8].copy_from_slice(&MAGIC);
        for (field, value) in bytes[8..].as_chunks_mut::<4>().0.iter_mut().zip(&self.values) {
            *field = value.to_le_bytes();
        }
        let crc = checksum(instance, block, &bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads block number `block` of the file of `instance`.
    pub fn decode(instance: InstanceId, block: u32, bytes: &[u8]) -> Result<Self, ChecksumsError> {
        let length = bytes.len();
        let Ok(bytes) = <&[u8; BLOCK]>::try_from(bytes) else {
            return Err(ChecksumsError::Length { block, length });
        };
        let (fields, _) = bytes.as_chunks::<4>();
        let (stored, magic) = (u32::from_le_bytes(fields[0]), fields[1]);
        if bytes.iter().all(|&byte| byte == 0) {
            return Err(ChecksumsError::Blank { block });
        }
        if magic != MAGIC {
            return Err(ChecksumsError::Magic { block, found: magic });
        }
        let computed = checksum(instance, block, &bytes[4..]);
        if stored != computed {
            return Err(ChecksumsError::Checksum { block, stored, computed });
        }
        let mut this = Self::default();
        this.values.iter_mut().zip(&fields[2..]).for_each(|(value, field)| *value = u32::from_le_bytes(*field));
        Ok(this)
    }
}

fn checksum(instance: InstanceId, block: u32, bytes: &[u8]) -> u32 {
    let place = crc32c::crc32c_append(crc32c::crc32c(&instance.to_bytes()), &block.to_le_bytes());
    crc32c::crc32c_append(place, bytes)
}

#[cfg(test)]
mod tests {
    use super::super::format::tests::{flip_every_bit, golden, instance};
    use super::*;

    fn sample() -> (ChecksumBlock, [u8; BLOCK]) {
        let mut checksums = ChecksumBlock::default();
        (0..PER_BLOCK).for_each(|index| checksums.set(index, index.wrapping_mul(0x9e37_79b9)));
        let mut bytes = [0; BLOCK];
        checksums.encode(instance(), 3, &mut bytes);
        (checksums, bytes)
    }

    #[test]
    fn the_golden_checksums_are_read() {
        let (checksums, bytes) = sample();
        assert_eq!(ChecksumBlock::decode(instance(), 3, &golden("checksums-v1.bin", &bytes)), Ok(checksums));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        flip_every_bit(&sample().1, BLOCK, |at, bytes| {
            assert!(ChecksumBlock::decode(instance(), 3, bytes).is_err(), "byte {at}");
        });
    }

    #[test]
    fn a_block_elsewhere_is_not_taken_for_another() {
        let bytes = sample().1;
        let elsewhere = [(instance(), 4), (InstanceId::from_bytes([9; 16]), 3)];
        for (instance, block) in elsewhere {
            let error = ChecksumBlock::decode(instance, block, &bytes).expect_err("misplaced");
            assert!(matches!(error, ChecksumsError::Checksum { .. }), "{error}");
        }
        let blank = ChecksumBlock::decode(instance(), 3, &[0; BLOCK]);
        assert_eq!(blank, Err(ChecksumsError::Blank { block: 3 }));
        let short = ChecksumBlock::decode(instance(), 3, &bytes[1..]);
        assert_eq!(short, Err(ChecksumsError::Length { block: 3, length: BLOCK - 1 }));
    }

    #[test]
    fn every_physical_block_has_its_place() {
        assert_eq!(Place::of(PhysicalBlock(1021)), Place { block: 0, index: 1021 });
        assert_eq!(Place::of(PhysicalBlock(1022)), Place { block: 1, index: 0 });
        assert_eq!(Place { block: u32::MAX, index: 0 }.offset(), u64::from(u32::MAX) * 4096);
    }
}
