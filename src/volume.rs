//! Vocabulary of every layer: ids, sizes and block ranges.
//!
//! Invariants: a size is a multiple of [`BLOCK_SIZE`]; a [`BlockRange`] is never empty and never wraps.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use uuid::Uuid;

/// Bytes of a block: the unit of every map, checksum and device request.
pub const BLOCK_SIZE: u64 = 4096;

/// Largest volume in bytes: block numbers of a layer chain are 32 bits wide, two of them reserved.
pub const MAX_VOLUME_BYTES: u64 = 8 << 40;

/// Smallest volume in bytes; mkfs.xfs needs more and says so itself.
pub const MIN_VOLUME_BYTES: u64 = 1 << 20;

/// Largest request in blocks (1 MiB): FUSE's limit of 256 pages.
pub const MAX_REQUEST_BLOCKS: u32 = 256;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);
        impl $name {
            /// A new random id.
            #[allow(clippy::new_without_default, reason = "a random id is no default")]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
            /// The id as its 16 bytes, for formats on disk.
            pub fn to_bytes(self) -> [u8; 16] {
                self.0.into_bytes()
            }
            /// The id from its 16 bytes.
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
        impl FromStr for $name {
            type Err = UnknownId;
            /// Only the canonical form is an id of ours; every other string is merely unknown.
            fn from_str(text: &str) -> Result<Self, UnknownId> {
                let id = Uuid::try_parse(text).map_err(|_| UnknownId)?;
                if id.to_string() == text { Ok(Self(id)) } else { Err(UnknownId) }
            }
        }
    };
}

/// The string is no id that Tandem ever made. Not a malformed request: CSI wants NOT_FOUND or OK for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an id of Tandem")]
pub struct UnknownId;

uuid_id! {
    /// A volume. Random, never derived from its name, the same at every site.
    VolumeId
}
uuid_id! {
    /// A snapshot of one volume.
    SnapshotId
}
uuid_id! {
    /// A group of snapshots taken at one point in time.
    GroupSnapshotId
}
uuid_id! {
    /// One copy of a layer chain on one disk: the directory that holds it. Made anew when a blank disk replaces it.
    InstanceId
}
uuid_id! {
    /// A pool, written in its superblock.
    PoolId
}
uuid_id! {
    /// A cluster: made with its certificate authority, part of every certificate.
    ClusterId
}
uuid_id! {
    /// One life of a node's kernel, from `/proc/sys/kernel/random/boot_id`: what was in its caches dies with it.
    BootId
}

/// Bytes of a volume: positive, a multiple of [`BLOCK_SIZE`], at most [`MAX_VOLUME_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VolumeSize(u64);

/// Why a number of bytes is no volume size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a multiple of the block size.
    #[error("{0} bytes is not a multiple of {BLOCK_SIZE}")]
    Unaligned(u64),
    /// Below the minimum.
    #[error("{0} bytes is less than the smallest volume, {MIN_VOLUME_BYTES} bytes")]
    TooSmall(u64),
    /// Above the maximum.
    #[error("{0} bytes is more than the largest volume, {MAX_VOLUME_BYTES} bytes")]
    TooLarge(u64),
}

impl VolumeSize {
    /// Bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
    /// Blocks of [`BLOCK_SIZE`].
    pub fn blocks(self) -> u64 {
        self.0 / BLOCK_SIZE
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = SizeError;
    fn try_from(bytes: u64) -> Result<Self, SizeError> {
        if bytes < MIN_VOLUME_BYTES {
            Err(SizeError::TooSmall(bytes))
        } else if bytes > MAX_VOLUME_BYTES {
            Err(SizeError::TooLarge(bytes))
        } else if !bytes.is_multiple_of(BLOCK_SIZE) {
            Err(SizeError::Unaligned(bytes))
        } else {
            Ok(Self(bytes))
        }
    }
}

impl From<VolumeSize> for u64 {
    fn from(size: VolumeSize) -> u64 {
        size.0
    }
}

/// A non-empty run of blocks of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    start: u64,
    count: NonZeroU32,
}

impl BlockRange {
    /// `count` blocks from block `start`; `None` if empty or past the largest volume.
    pub fn new(start: u64, count: u32) -> Option<Self> {
        let count = NonZeroU32::new(count)?;
        let end = start.checked_add(u64::from(count.get()))?;
        (end <= MAX_VOLUME_BYTES / BLOCK_SIZE).then_some(Self { start, count })
    }
    /// The blocks of a byte range; `None` unless it is aligned to blocks and not empty.
    pub fn from_bytes(offset: u64, length: u64) -> Option<Self> {
        if !offset.is_multiple_of(BLOCK_SIZE) || !length.is_multiple_of(BLOCK_SIZE) {
            return None;
        }
        Self::new(offset / BLOCK_SIZE, u32::try_from(length / BLOCK_SIZE).ok()?)
    }
    /// First block.
    pub fn start(self) -> u64 {
        self.start
    }
    /// The block after the last one.
    pub fn end(self) -> u64 {
        self.start + u64::from(self.count.get())
    }
    /// Number of blocks, never 0.
    pub fn count(self) -> u32 {
        self.count.get()
    }
    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.count.get()) * BLOCK_SIZE
    }
    /// Offset in bytes.
    pub fn offset(self) -> u64 {
        self.start * BLOCK_SIZE
    }
    /// Whether the two share a block.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_where_they_are_made() {
        assert_eq!(VolumeSize::try_from(0), Err(SizeError::TooSmall(0)));
        assert_eq!(VolumeSize::try_from((1 << 20) + 1), Err(SizeError::Unaligned((1 << 20) + 1)));
        assert_eq!(VolumeSize::try_from(u64::MAX), Err(SizeError::TooLarge(u64::MAX)));
        assert_eq!(VolumeSize::try_from(1 << 20).map(VolumeSize::blocks), Ok(256));
    }

    #[test]
    fn ranges_neither_wrap_nor_are_empty() {
        assert_eq!(BlockRange::new(0, 0), None);
        assert_eq!(BlockRange::new(u64::MAX, 1), None);
        assert_eq!(BlockRange::from_bytes(4096, 100), None);
        let range = BlockRange::from_bytes(8192, 4096).expect("aligned");
        assert_eq!((range.start(), range.end(), range.bytes()), (2, 3, 4096));
    }

    #[test]
    fn only_the_canonical_text_is_an_id() {
        let id = VolumeId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(
            id.to_string().to_uppercase().parse::<VolumeId>().is_ok(),
            id.to_string() == id.to_string().to_uppercase()
        );
        assert_eq!("fake-vol-id".parse::<VolumeId>(), Err(UnknownId));
        assert_eq!("../../etc".parse::<SnapshotId>(), Err(UnknownId));
    }
}
