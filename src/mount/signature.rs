//! What a block device carries, told by the signatures that filesystems and volume managers leave on it.
//!
//! Invariants: nothing is written; a device is [`Content::Blank`] only if its first and last MiB read as zeros, which covers
//! every place where a signature may be; anything else that is not known is [`Content::Data`], never "probably empty".

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes read at each end: btrfs, zfs and md keep their last copies within it.
const WINDOW: u64 = 1 << 20;

/// A format that was recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signature {
    /// ext2, no journal.
    Ext2,
    /// ext3: a journal, no extents.
    Ext3,
    /// ext4.
    Ext4,
    /// The separate journal of an ext3 or ext4.
    ExtJournal,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// bcache or bcachefs.
    Bcache,
    /// ZFS pool member.
    Zfs,
    /// F2FS.
    F2fs,
    /// EROFS.
    Erofs,
    /// SquashFS.
    Squashfs,
    /// JFS.
    Jfs,
    /// ReiserFS.
    Reiserfs,
    /// ISO 9660.
    Iso9660,
    /// FAT, exFAT or NTFS.
    Windows,
    /// Swap space.
    Swap,
    /// LUKS encryption.
    Luks,
    /// LVM physical volume.
    Lvm,
    /// Linux software RAID member.
    Raid,
    /// Ceph BlueStore.
    Bluestore,
    /// VDO.
    Vdo,
    /// Stratis pool member.
    Stratis,
    /// GPT partition table.
    Gpt,
    /// MBR partition table or boot sector.
    Mbr,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::ExtJournal => "an ext journal",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Bcache => "bcache",
            Self::Zfs => "a ZFS pool",
            Self::F2fs => "f2fs",
            Self::Erofs => "erofs",
            Self::Squashfs => "squashfs",
            Self::Jfs => "jfs",
            Self::Reiserfs => "reiserfs",
            Self::Iso9660 => "iso9660",
            Self::Windows => "FAT or NTFS",
            Self::Swap => "swap space",
            Self::Luks => "LUKS",
            Self::Lvm => "an LVM physical volume",
            Self::Raid => "a RAID member",
            Self::Bluestore => "Ceph BlueStore",
            Self::Vdo => "VDO",
            Self::Stratis => "a Stratis pool",
            Self::Gpt => "a GPT partition table",
            Self::Mbr => "an MBR partition table",
        })
    }
}

/// What a device carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros wherever a signature could be.
    Blank,
    /// One recognised format.
    Known(Signature),
    /// Several at once: what it really is cannot be told.
    Ambiguous(Vec<Signature>),
    /// Something unknown; the first byte that is not zero is at `offset`.
    Data {
        /// Bytes from the start of the device.
        offset: u64,
    },
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => f.write_str("nothing"),
            Self::Known(signature) => signature.fmt(f),
            Self::Ambiguous(all) => {
                let names: Vec<String> = all.iter().map(ToString::to_string).collect();
                write!(f, "the signatures of {} at once", names.join(" and "))
            }
            Self::Data { offset } => write!(f, "unknown data at byte {offset}"),
        }
    }
}

/// The device cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot be read: {source}", path.display())]
pub struct ProbeError {
    /// Device or file.
    pub path: PathBuf,
    /// Why.
    pub source: std::io::Error,
}

/// Reads what `device` (a block device or a plain file) carries.
pub fn probe(device: &Path) -> Result<Content, ProbeError> {
    let window = |source| ProbeError { path: device.to_owned(), source };
    Ends::read(device).map(|ends| ends.content()).map_err(window)
}

/// The first and last bytes of a device; they overlap if it is small.
struct Ends {
    size: u64,
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Ends {
    fn read(device: &Path) -> std::io::Result<Self> {
        let mut file = File::open(device)?;
        let size = file.seek(SeekFrom::End(0))?;
        let length = size.min(WINDOW) as usize;
        let mut head = vec![0; length];
        let mut tail = vec![0; length];
        file.seek(SeekFrom::Start(0))?;
        file.read_exact(&mut head)?;
        file.seek(SeekFrom::Start(size - length as u64))?;
        file.read_exact(&mut tail)?;
        Ok(Self { size, head, tail })
    }

    fn content(&self) -> Content {
        let found = self.signatures();
        if let [only] = found[..] {
            return Content::Known(only);
        }
        if !found.is_empty() {
            return Content::Ambiguous(found);
        }
        let tail_start = self.size - self.tail.len() as u64;
        let first = |bytes: &[u8], base: u64| bytes.iter().position(|byte| *byte != 0).map(|at| base + at as u64);
        match first(&self.head, 0).or_else(|| first(&self.tail, tail_start)) {
            Some(offset) => Content::Data { offset },
            None => Content::Blank,
        }
    }

    fn signatures(&self) -> Vec<Signature> {
        let mut found: Vec<Signature> = FIXED
            .iter()
            .filter(|(_, offset, magic)| self.at(*offset, magic))
            .map(|(signature, ..)| *signature)
            .collect();
        found.extend(self.ext());
        if self.is_lvm() {
            found.push(Signature::Lvm);
        }
        if self.is_raid_at_end() {
            found.push(Signature::Raid);
        }
        if self.is_zfs() {
            found.push(Signature::Zfs);
        }
        found.extend(self.partition_table());
        found.dedup();
        found
    }

    fn at(&self, offset: u64, magic: &[u8]) -> bool {
        let start = offset as usize;
        self.head.get(start..start + magic.len()) == Some(magic)
    }

    /// `magic` at `offset` bytes from the start of the device, if that is within the last MiB.
    fn at_end(&self, offset: u64, magic: &[u8]) -> bool {
        let base = self.size - self.tail.len() as u64;
        let Some(start) = offset.checked_sub(base) else { return false };
        self.tail.get(start as usize..start as usize + magic.len()) == Some(magic)
    }

    fn ext(&self) -> Option<Signature> {
        if !self.at(1024 + 56, &[0x53, 0xef]) {
            return None;
        }
        let feature = |offset: usize| {
            let at = 1024 + offset;
            self.head.get(at..at + 4).map_or(0, |bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let (compatible, incompatible, read_only) = (feature(92), feature(96), feature(100));
        // What ext3 knows: filetype, recover, journal_dev, meta_bg; sparse_super, large_file, btree_dir.
        let newer = incompatible & !0x1e != 0 || read_only & !0x7 != 0;
        Some(if incompatible & 0x8 != 0 {
            Signature::ExtJournal
        } else if newer {
            Signature::Ext4
        } else if compatible & 0x4 != 0 {
            Signature::Ext3
        } else {
            Signature::Ext2
        })
    }

    fn is_lvm(&self) -> bool {
        (0..4).any(|sector| self.at(sector * 512, b"LABELONE") && self.at(sector * 512 + 24, b"LVM2 001"))
    }

    /// md superblocks 1.0 (8 KiB before the end) and 0.90 (in the last 64 KiB that is aligned).
    fn is_raid_at_end(&self) -> bool {
        let one = (self.size / 512).saturating_sub(16) & !7;
        let old = (self.size & !0xffff).saturating_sub(0x10000);
        self.at_end(one * 512, &MD) || self.at_end(old, &MD) || self.at_end(old, &[0xa9, 0x2b, 0x4e, 0xfc])
    }

    /// One uberblock in the ring of the first label is enough.
    fn is_zfs(&self) -> bool {
        (0..128).any(|slot| {
            let offset = (128 << 10) + slot * 1024;
            self.at(offset, &0x00ba_b10c_u64.to_le_bytes()) || self.at(offset, &0x00ba_b10c_u64.to_be_bytes())
        })
    }

    /// GPT wins over the protective MBR before it; a boot sector of FAT or NTFS is none.
    fn partition_table(&self) -> Option<Signature> {
        let gpt = b"EFI PART";
        let ends = [512, 4096].map(|sector| self.size.saturating_sub(sector));
        if self.at(512, gpt) || self.at(4096, gpt) || ends.iter().any(|offset| self.at_end(*offset, gpt)) {
            return Some(Signature::Gpt);
        }
        if !self.at(510, &[0x55, 0xaa]) {
            return None;
        }
        let windows = [(3, &b"NTFS    "[..]), (3, b"EXFAT   "), (54, b"FAT"), (82, b"FAT32")];
        if windows.iter().any(|(offset, magic)| self.at(*offset, magic)) {
            Some(Signature::Windows)
        } else {
            Some(Signature::Mbr)
        }
    }
}

const MD: [u8; 4] = [0xfc, 0x4e, 0x2b, 0xa9];

/// Signatures at a fixed place from the start.
const FIXED: &[(Signature, u64, &[u8])] = &[
    (Signature::Xfs, 0, b"XFSB"),
    (Signature::Btrfs, 0x10040, b"_BHRfS_M"),
    (Signature::Luks, 0, b"LUKS\xba\xbe"),
    (Signature::Luks, 0x4000, b"SKUL\xba\xbe"),
    (Signature::Swap, 4096 - 10, b"SWAPSPACE2"),
    (Signature::Swap, 4096 - 10, b"SWAP-SPACE"),
    (Signature::Swap, 16384 - 10, b"SWAPSPACE2"),
    (Signature::Swap, 65536 - 10, b"SWAPSPACE2"),
    (Signature::Bcache, 4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf7\x7f\x48\xba\x6d\x81"),
    (Signature::Bcache, 4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    (Signature::F2fs, 1024, b"\x10\x20\xf5\xf2"),
    (Signature::Erofs, 1024, b"\xe2\xe1\xf5\xe0"),
    (Signature::Squashfs, 0, b"hsqs"),
    (Signature::Jfs, 0x8000, b"JFS1"),
    (Signature::Reiserfs, 0x10034, b"ReIsEr"),
    (Signature::Iso9660, 0x8001, b"CD001"),
    (Signature::Raid, 0, &MD),
    (Signature::Raid, 4096, &MD),
    (Signature::Bluestore, 0, b"bluestore block device"),
    (Signature::Vdo, 0, b"dmvdo001"),
    (Signature::Stratis, 512 + 4, b"!Stra0tis\x86\xff\x02^\x41rh"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn content(size: usize, bytes: &[(usize, &[u8])]) -> Content {
        let mut image = vec![0_u8; size];
        for (offset, magic) in bytes {
            image[*offset..offset + magic.len()].copy_from_slice(magic);
        }
        let length = size.min(WINDOW as usize);
        let (head, tail) = (image[..length].to_vec(), image[size - length..].to_vec());
        Ends { size: size as u64, head, tail }.content()
    }

    const SIZE: usize = 4 << 20;

    #[test]
    fn zeros_are_blank_also_when_tiny() {
        assert_eq!(content(SIZE, &[]), Content::Blank);
        assert_eq!(content(512, &[]), Content::Blank);
        assert_eq!(content(0, &[]), Content::Blank);
    }

    #[test]
    fn unknown_bytes_at_either_end_are_data() {
        assert_eq!(content(SIZE, &[(77, b"x")]), Content::Data { offset: 77 });
        assert_eq!(content(SIZE, &[(SIZE - 1, b"x")]), Content::Data { offset: SIZE as u64 - 1 });
    }

    #[test]
    fn every_fixed_signature_is_recognised() {
        for (signature, offset, magic) in FIXED {
            assert_eq!(content(SIZE, &[(*offset as usize, magic)]), Content::Known(*signature), "{signature}");
        }
    }

    #[test]
    fn the_generations_of_ext_are_told_apart() {
        let ext = |features: &[(usize, &[u8])]| {
            let mut all = vec![(1024 + 56, &b"\x53\xef"[..])];
            all.extend(features);
            content(SIZE, &all)
        };
        assert_eq!(ext(&[]), Content::Known(Signature::Ext2));
        assert_eq!(ext(&[(1024 + 92, &[4])]), Content::Known(Signature::Ext3));
        assert_eq!(ext(&[(1024 + 92, &[4]), (1024 + 96, &[0x40])]), Content::Known(Signature::Ext4));
        assert_eq!(ext(&[(1024 + 96, &[8])]), Content::Known(Signature::ExtJournal));
    }

    #[test]
    fn signatures_at_the_end_count() {
        assert_eq!(content(SIZE, &[(SIZE - 512, b"EFI PART")]), Content::Known(Signature::Gpt));
        assert_eq!(content(SIZE, &[(SIZE - 8192, &MD)]), Content::Known(Signature::Raid));
        assert_eq!(content(SIZE, &[(SIZE - 65536, &MD)]), Content::Known(Signature::Raid));
    }

    #[test]
    fn partition_tables_and_volume_managers_are_recognised() {
        assert_eq!(content(SIZE, &[(510, &[0x55, 0xaa])]), Content::Known(Signature::Mbr));
        assert_eq!(content(SIZE, &[(510, &[0x55, 0xaa]), (512, b"EFI PART")]), Content::Known(Signature::Gpt));
        assert_eq!(content(SIZE, &[(510, &[0x55, 0xaa]), (3, b"NTFS    ")]), Content::Known(Signature::Windows));
        assert_eq!(content(SIZE, &[(512, b"LABELONE"), (536, b"LVM2 001")]), Content::Known(Signature::Lvm));
        assert_eq!(content(SIZE, &[(0x20000, &0x00ba_b10c_u64.to_le_bytes())]), Content::Known(Signature::Zfs));
    }

    #[test]
    fn two_filesystems_at_once_are_neither() {
        let both = content(SIZE, &[(0, b"XFSB"), (1024 + 56, b"\x53\xef")]);
        assert_eq!(both, Content::Ambiguous(vec![Signature::Xfs, Signature::Ext2]));
    }
}
