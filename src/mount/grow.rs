//! Grows a filesystem to the size of its device.
//!
//! Invariants: nothing ever shrinks; growing what already has the size is success and changes nothing; growing a mounted
//! filesystem is one ioctl, which the filesystem's journal makes atomic.
#![allow(unsafe_code, reason = "the growing ioctls of ext4 and xfs are not wrapped by any crate")]

use super::program::{ProgramError, RESIZE2FS};
use super::{Filesystem, device_size};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bit of CAP_SYS_RESOURCE, which ext4 wants for growing while mounted.
const CAP_SYS_RESOURCE: u32 = 24;

/// The smallest last allocation group that the kernel would add, in blocks (XFS_MIN_AG_BLOCKS).
const XFS_MIN_GROUP_BLOCKS: u64 = 64;

/// Why a filesystem was not grown.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// ext4, mounted, and the kernel does not let this process.
    #[error(
        "a mounted ext4 can only be grown with CAP_SYS_RESOURCE, which this process does not have; \
         either give it that capability, or end the pods that use the volume: it is grown when it is staged again"
    )]
    Capability,
    /// The superblock cannot be what it should be.
    #[error("{0} has no valid {1} superblock")]
    Superblock(PathBuf, Filesystem),
    /// Reading or the ioctl failed.
    #[error("{path}: {what}: {source}")]
    Io {
        /// Device or mount point.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// resize2fs.
    #[error(transparent)]
    Program(#[from] ProgramError),
}

/// Whether this process may grow a mounted ext4.
pub fn may_grow_mounted_ext4() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|capabilities| capabilities >> CAP_SYS_RESOURCE & 1 == 1)
}

/// Grows the mounted `filesystem` of `device` to the device's size. Answers whether anything changed.
pub fn grow_mounted(filesystem: Filesystem, device: &Path, mount_point: &Path) -> Result<bool, GrowError> {
    match filesystem {
        Filesystem::Ext4 => {
            let Some(blocks) = Ext4Size::read(device)?.growth(device_size_or(device)?) else { return Ok(false) };
            let directory = open(mount_point)?;
            // SAFETY: the descriptor is open and the ioctl reads one u64, which lives until it returns.
            unsafe { ext4_resize(directory.as_raw_fd(), &blocks) }.map_err(|error| match error {
                Errno::EPERM => GrowError::Capability,
                other => io(mount_point, "growing ext4", other),
            })?;
            Ok(true)
        }
        Filesystem::Xfs => grow_xfs(device_size_or(device)?, mount_point),
    }
}

/// Grows an ext4 that is not mounted, and that e2fsck -f has just called clean.
pub fn grow_unmounted_ext4(device: &Path) -> Result<(), GrowError> {
    if needs_growth_ext4(device)? {
        RESIZE2FS.succeed(&[device])?;
    }
    Ok(())
}

/// Whether the device has room that its ext4 does not use.
pub fn needs_growth_ext4(device: &Path) -> Result<bool, GrowError> {
    Ok(Ext4Size::read(device)?.growth(device_size_or(device)?).is_some())
}

fn grow_xfs(bytes: u64, mount_point: &Path) -> Result<bool, GrowError> {
    let directory = open(mount_point)?;
    let mut geometry = XfsGeometry::default();
    // SAFETY: the descriptor is open and the ioctl fills exactly this structure.
    unsafe { xfs_geometry(directory.as_raw_fd(), &raw mut geometry) }
        .map_err(|error| io(mount_point, "reading the geometry of xfs", error))?;
    let blocks = bytes / u64::from(geometry.block_bytes.max(512));
    if blocks < geometry.data_blocks + XFS_MIN_GROUP_BLOCKS {
        return Ok(false);
    }
    let wanted = XfsGrow { blocks, inode_percent: geometry.inode_percent, padding: 0 };
    // SAFETY: the descriptor is open and the ioctl reads exactly this structure.
    unsafe { xfs_grow(directory.as_raw_fd(), &raw const wanted) }
        .map_err(|error| io(mount_point, "growing xfs", error))?;
    Ok(true)
}

fn open(path: &Path) -> Result<File, GrowError> {
    File::open(path).map_err(|source| GrowError::Io { path: path.into(), what: "opening", source })
}

fn device_size_or(device: &Path) -> Result<u64, GrowError> {
    device_size(device).map_err(|source| GrowError::Io { path: device.into(), what: "reading its size", source })
}

fn io(path: &Path, what: &'static str, error: Errno) -> GrowError {
    GrowError::Io { path: path.into(), what, source: error.into() }
}

nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);
nix::ioctl_read!(xfs_geometry, b'X', 100, XfsGeometry);
nix::ioctl_write_ptr!(xfs_grow, b'X', 110, XfsGrow);

/// The kernel's xfs_fsop_geom_v1 (112 bytes); only the first fields matter here.
#[repr(C)]
#[derive(Default)]
struct XfsGeometry {
    block_bytes: u32,
    _before: [u32; 6],
    inode_percent: u32,
    data_blocks: u64,
    _after: [u64; 9],
}

/// The kernel's xfs_growfs_data.
#[repr(C)]
struct XfsGrow {
    blocks: u64,
    inode_percent: u32,
    padding: u32,
}

/// What the superblock of an ext4 says about its extent.
#[derive(Clone, Copy, Debug)]
struct Ext4Size {
    block_bytes: u64,
    blocks: u64,
    blocks_per_group: u64,
    /// Blocks of metadata that a group must at least have room for.
    group_overhead: u64,
}

impl Ext4Size {
    fn read(device: &Path) -> Result<Self, GrowError> {
        let mut superblock = [0; 1024];
        open(device)?.read_exact_at(&mut superblock, 1024).map_err(|source| GrowError::Io {
            path: device.into(),
            what: "reading its superblock",
            source,
        })?;
        Self::parse(&superblock).ok_or_else(|| GrowError::Superblock(device.into(), Filesystem::Ext4))
    }

    fn parse(superblock: &[u8; 1024]) -> Option<Self> {
        let u16_at = |at: usize| u64::from(u16::from_le_bytes([superblock[at], superblock[at + 1]]));
        let u32_at = |at: usize| u16_at(at) | u16_at(at + 2) << 16;
        let shift = u32_at(24);
        let blocks_per_group = u32_at(32);
        if u16_at(56) != 0xef53 || shift > 6 || blocks_per_group == 0 {
            return None;
        }
        let block_bytes = 1024 << shift;
        let has_64_bits = u32_at(96) & 0x80 != 0;
        let high = if has_64_bits { u32_at(0x150) } else { 0 };
        let blocks = u32_at(4) | high << 32;
        let descriptor_bytes = if has_64_bits { u16_at(0xfe).max(32) } else { 32 };
        let descriptors = (blocks.div_ceil(blocks_per_group) * descriptor_bytes).div_ceil(block_bytes);
        let inode_table = (u32_at(40) * u16_at(88)).div_ceil(block_bytes);
        let group_overhead = inode_table + 2 + 1 + descriptors + u16_at(0xce);
        Some(Self { block_bytes, blocks, blocks_per_group, group_overhead })
    }

    /// The number of blocks to grow to, or `None` if there is nothing to gain: neither mkfs nor the kernel makes a last
    /// group with less than 50 blocks beside its metadata, so a device may stay a little larger than its ext4.
    fn growth(self, device_bytes: u64) -> Option<u64> {
        let blocks = device_bytes / self.block_bytes;
        let rest = blocks % self.blocks_per_group;
        let usable = if rest < self.group_overhead + 50 { blocks - rest } else { blocks };
        (usable > self.blocks).then_some(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(blocks: u32) -> [u8; 1024] {
        let mut bytes = [0; 1024];
        bytes[4..8].copy_from_slice(&blocks.to_le_bytes());
        bytes[24] = 2;
        bytes[32..36].copy_from_slice(&32768_u32.to_le_bytes());
        bytes[40..44].copy_from_slice(&8192_u32.to_le_bytes());
        bytes[56..58].copy_from_slice(&[0x53, 0xef]);
        bytes[88..90].copy_from_slice(&256_u16.to_le_bytes());
        bytes
    }

    #[test]
    fn a_last_group_that_is_too_small_is_nothing_to_gain() {
        let size = Ext4Size::parse(&superblock(32768)).expect("valid");
        assert_eq!(size.growth(32768 * 4096), None);
        assert_eq!(size.growth((32768 + 100) * 4096), None);
        assert_eq!(size.growth(2 * 32768 * 4096), Some(65536));
        assert_eq!(size.growth(4096), None);
    }

    #[test]
    fn a_damaged_superblock_is_refused() {
        let mut bytes = superblock(32768);
        bytes[32..36].fill(0);
        assert!(Ext4Size::parse(&bytes).is_none());
        assert!(Ext4Size::parse(&[0xff; 1024]).is_none());
    }

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!((size_of::<XfsGeometry>(), size_of::<XfsGrow>()), (112, 16));
    }
}
