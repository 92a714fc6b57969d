//! What every file of a tree begins with, and how its fields are read and written.
//!
//! Invariants: the first 48 bytes of a header block and the place and reach of its checksum are the same in every version,
//! so that an older Tandem can tell a newer format from damage:
//! ```text
//!   0 magic (8)   8 version (4)   12 crc32c of the block without these four bytes
//!   16 compatible features (8)   24 incompatible features (8)   32 instance (16)   48 ...
//! ```
//! All numbers are little-endian. A reader ignores compatible features that it does not know and refuses incompatible ones.

use crate::volume::InstanceId;

/// Bytes of a header block, of a log block and of a checksum block.
pub const BLOCK: usize = 4096;

/// Bytes of the part of a header block that all formats share.
pub(super) const PREFIX: usize = 48;

/// Number of a layer in its tree; never used again in that tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub u32);

/// One file format.
pub(super) struct Kind {
    /// What the block begins with.
    pub magic: [u8; 8],
    /// The version that is written, and the newest that is read.
    pub version: u32,
    /// Incompatible features that are understood.
    pub incompatible: u64,
}

/// Why a header block cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The file is shorter than its header.
    #[error("the file ends after {have} of {need} bytes")]
    Truncated {
        /// Bytes of the header.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// It is something else.
    #[error("the block begins with {found:02x?} instead of {expected:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 8],
        /// What they should be.
        expected: [u8; 8],
    },
    /// The bytes changed since they were written.
    #[error("the block's crc32c is {computed:#010x} and {stored:#010x} was stored")]
    Checksum {
        /// In the block.
        stored: u32,
        /// Of the block.
        computed: u32,
    },
    /// Written by a newer Tandem.
    #[error("format version {found} is newer than {known}, the newest this Tandem reads")]
    Version {
        /// In the block.
        found: u32,
        /// The newest understood.
        known: u32,
    },
    /// Written by a Tandem that uses features which this one does not understand.
    #[error("incompatible features {0:#x} are unknown to this Tandem")]
    Incompatible(u64),
    /// It belongs to another tree.
    #[error("it belongs to instance {found} instead of {expected}")]
    Instance {
        /// In the block.
        found: InstanceId,
        /// The tree's.
        expected: InstanceId,
    },
    /// The checksum is right and a field is not: written by a defective Tandem.
    #[error("the field {0} has an impossible value")]
    Field(&'static str),
}

/// Fills the prefix of a header block; [`seal`] has to follow when the rest is there.
pub(super) fn write_prefix(block: &mut [u8], kind: &Kind, instance: InstanceId) {
    let mut out = Output { bytes: block, at: 0 };
    out.put(&kind.magic);
    out.u32(kind.version);
    out.u32(0);
    out.u64(0);
    out.u64(0);
    out.put(&instance.to_bytes());
}

/// Stores the block's checksum and returns it.
pub(super) fn seal(block: &mut [u8]) -> u32 {
    let crc = checksum(block);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// The checksum stored in a header block.
pub(super) fn stored_checksum(block: &[u8]) -> u32 {
    Input { bytes: block, at: 12 }.u32().unwrap_or(0)
}

/// Checks the prefix and the checksum of a header block; returns the instance it names and the fields after the prefix.
pub(super) fn check_prefix<'a>(block: &'a [u8], kind: &Kind) -> Result<(InstanceId, Input<'a>), HeaderError> {
    let truncated = HeaderError::Truncated { need: BLOCK, have: block.len() };
    let block = block.get(..BLOCK).ok_or(truncated)?;
    let mut input = Input { bytes: block, at: 0 };
    let magic = input.take().ok_or(truncated)?;
    if magic != kind.magic {
        return Err(HeaderError::Magic { found: magic, expected: kind.magic });
    }
    let version = input.u32().ok_or(truncated)?;
    let stored = input.u32().ok_or(truncated)?;
    let computed = checksum(block);
    if stored != computed {
        return Err(HeaderError::Checksum { stored, computed });
    }
    if version > kind.version {
        return Err(HeaderError::Version { found: version, known: kind.version });
    }
    if version == 0 {
        return Err(HeaderError::Field("version"));
    }
    let _compatible = input.u64().ok_or(truncated)?;
    let unknown = input.u64().ok_or(truncated)? & !kind.incompatible;
    if unknown != 0 {
        return Err(HeaderError::Incompatible(unknown));
    }
    let instance = InstanceId::from_bytes(input.take().ok_or(truncated)?);
    Ok((instance, input))
}

/// That the block belongs to the expected tree.
pub(super) fn check_instance(found: InstanceId, expected: InstanceId) -> Result<(), HeaderError> {
    if found == expected { Ok(()) } else { Err(HeaderError::Instance { found, expected }) }
}

fn checksum(block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&block[..12]), &block[16..])
}

/// Reads fields in order; `None` where the bytes end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
}

impl Input<'_> {
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let field = self.bytes.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(*field)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.take().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// Writes fields in order into a buffer that is large enough.
pub(crate) struct Output<'a> {
    pub bytes: &'a mut [u8],
    pub at: usize,
}

impl Output<'_> {
    pub fn put(&mut self, field: &[u8]) {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }

    pub fn u8(&mut self, field: u8) {
        self.put(&[field]);
    }

    pub fn u16(&mut self, field: u16) {
        self.put(&field.to_le_bytes());
    }

    pub fn u32(&mut self, field: u32) {
        self.put(&field.to_le_bytes());
    }

    pub fn u64(&mut self, field: u64) {
        self.put(&field.to_le_bytes());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    //! What the tests of all formats share.

    use super::*;

    /// A fixed id, so that golden files stay what they are.
    pub fn instance() -> InstanceId {
        InstanceId::from_bytes([0x11; 16])
    }

    /// The bytes of `tests/golden/<name>`; `encoded` must equal them. A changed format needs a new version and a new file,
    /// and the old file must still be read. `TANDEM_GOLDEN=write` writes a file that does not exist yet.
    pub fn golden(name: &str, encoded: &[u8]) -> Vec<u8> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if !path.exists() && std::env::var("TANDEM_GOLDEN").is_ok_and(|value| value == "write") {
            std::fs::write(&path, encoded).expect("the golden file can be written");
        }
        let golden = std::fs::read(&path).expect("the golden file is there");
        assert!(golden == encoded, "{name} is no longer written as it was");
        golden
    }

    /// Calls `check` with `bytes` after each change of one bit, up to `all` bytes, and of a sample of the rest.
    pub fn flip_every_bit(bytes: &[u8], all: usize, mut check: impl FnMut(usize, &[u8])) {
        let mut bytes = bytes.to_vec();
        let sample = (all..bytes.len()).step_by(509);
        for at in (0..all.min(bytes.len())).chain(sample) {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                check(at, &bytes);
                bytes[at] ^= 1 << bit;
            }
        }
    }
}
