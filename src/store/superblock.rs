//! The file `superblock`: which tree this is, to whom it belongs, and whether this Tandem may open it.
//!
//! Invariant: written once, when the tree is created; one block of 4096 bytes:
//! ```text
//!   0 prefix (see format.rs)   48 pool (16)   64 created, ms since 1970 (8)   72 cipher (4)   76 zero (4)   80 key id (16)
//! ```

use super::format::{BLOCK, HeaderError, Kind, Output, PREFIX, check_prefix, seal, write_prefix};
use crate::volume::{InstanceId, PoolId};

const KIND: Kind = Kind { magic: *b"TandemSB", version: 1, incompatible: 0 };

/// Identity of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The tree.
    pub instance: InstanceId,
    /// The pool it was made in.
    pub pool: PoolId,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
}

/// Why a superblock cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// The block is damaged or too new.
    #[error("superblock: {0}")]
    Header(#[from] HeaderError),
    /// The tree is encrypted; this Tandem reads no encrypted trees.
    #[error("superblock: the tree is encrypted with cipher {0}, which this Tandem does not know")]
    Cipher(u32),
}

impl Superblock {
    /// The block as it is written.
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        write_prefix(&mut block, &KIND, self.instance);
        let mut out = Output { bytes: &mut block, at: PREFIX };
        out.put(&self.pool.to_bytes());
        out.u64(self.created_ms);
        seal(&mut block);
        block
    }

    /// Reads a block.
    pub fn decode(bytes: &[u8]) -> Result<Self, SuperblockError> {
        let (instance, mut fields) = check_prefix(bytes, &KIND)?;
        let short = HeaderError::Truncated { need: BLOCK, have: bytes.len() };
        let pool = PoolId::from_bytes(fields.take().ok_or(short)?);
        let created_ms = fields.u64().ok_or(short)?;
        match fields.u32().ok_or(short)? {
            0 => Ok(Self { instance, pool, created_ms }),
            cipher => Err(SuperblockError::Cipher(cipher)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::tests::{flip_every_bit, golden, instance};
    use super::*;

    fn sample() -> Superblock {
        Superblock { instance: instance(), pool: PoolId::from_bytes([0x22; 16]), created_ms: 1_795_358_400_123 }
    }

    /// A sound block with other bytes at `at`.
    fn with(at: usize, bytes: &[u8]) -> [u8; BLOCK] {
        let mut block = sample().encode();
        block[at..at + bytes.len()].copy_from_slice(bytes);
        seal(&mut block);
        block
    }

    #[test]
    fn the_golden_superblock_is_read() {
        assert_eq!(Superblock::decode(&golden("superblock-v1.bin", &sample().encode())), Ok(sample()));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        flip_every_bit(&sample().encode(), BLOCK, |at, block| {
            assert!(Superblock::decode(block).is_err(), "byte {at}");
        });
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |bytes: &[u8]| Superblock::decode(bytes).expect_err("unusable");
        let have = BLOCK - 1;
        assert_eq!(error(&sample().encode()[1..]), HeaderError::Truncated { need: BLOCK, have }.into());
        assert_eq!(error(&with(8, &[2])), HeaderError::Version { found: 2, known: 1 }.into());
        assert_eq!(error(&with(8, &[0])), HeaderError::Field("version").into());
        assert_eq!(error(&with(24, &[4])), HeaderError::Incompatible(4).into());
        assert_eq!(error(&with(72, &[1])), SuperblockError::Cipher(1));
        assert!(matches!(error(&[0; BLOCK]), SuperblockError::Header(HeaderError::Magic { .. })));
        assert_eq!(Superblock::decode(&with(16, &[0xff; 8])), Ok(sample()), "compatible features may be unknown");
    }
}
