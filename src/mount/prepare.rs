//! Makes sure that a device carries the filesystem that was asked for, checked and as large as the device.
//!
//! Invariants: only a device that is blank is formatted, or one that carries no whole format and whose formatting by this code was
//! cut short here (a durable mark, written before and removed after, says so); a restored volume is never formatted; a
//! device that another program holds is left alone. The mark is this node's own and the volume may have been used elsewhere
//! since, so a mark alone never makes a filesystem that is whole be formatted again.

use super::grow::{GrowError, grow_unmounted_ext4, may_grow_mounted_ext4, needs_growth_ext4};
use super::program::{E2FSCK, MKFS_EXT4, MKFS_XFS, ProgramError};
use super::signature::{Content, ProbeError, Signature, probe};
use super::{Filesystem, device_size};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// mkfs.xfs refuses less (a log and four groups would not fit well).
pub const MIN_XFS_BYTES: u64 = 300 << 20;

/// Where the contents of a volume come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Made empty: blank means new.
    Empty,
    /// Cloned or restored: blank means that something is wrong.
    Source,
}

/// Why a device is not ready to be mounted.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// It cannot be read.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Opened exclusively by someone else.
    #[error("{0} is in use by another program (a check or a format that is still running?)")]
    Busy(PathBuf),
    /// The filesystem does not fit.
    #[error("{filesystem} needs at least {minimum} bytes and the volume has {size}")]
    TooSmall {
        /// Which.
        filesystem: Filesystem,
        /// Bytes it has.
        size: u64,
        /// Bytes it needs.
        minimum: u64,
    },
    /// It carries something else; formatting it would destroy that.
    #[error("the device carries {found}, not {wanted}; it is not formatted, because that would destroy what is there")]
    Foreign {
        /// What was asked for.
        wanted: Filesystem,
        /// What is there.
        found: Content,
    },
    /// A copy without a filesystem.
    #[error(
        "the volume was made from a snapshot or a volume, but carries no filesystem; it is not formatted, because its \
         contents would be lost if they are merely not readable now (a source that was never mounted has none either: \
         create an empty volume instead)"
    )]
    BlankRestore,
    /// e2fsck found what it may not repair by itself.
    #[error("its ext4 is damaged and e2fsck -p could not repair it ({0}); take a snapshot, then run e2fsck -f on {1}")]
    Damaged(String, PathBuf),
    /// The mark of a formatting under way cannot be written or removed.
    #[error("{path}: {source}")]
    Mark {
        /// The mark.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The device cannot be opened or synced.
    #[error("{path}: {source}")]
    Device {
        /// The device.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A program is missing or failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// It could not be grown to the device's size.
    #[error(transparent)]
    Grow(#[from] GrowError),
}

/// Formats, checks and grows, whichever is due. The device must not be mounted. `mark` is a file name of this volume's own.
pub fn prepare(device: &Path, filesystem: Filesystem, origin: Origin, mark: &Path) -> Result<(), PrepareError> {
    refuse_if_in_use(device)?;
    let marked = mark.exists();
    match (probe(device)?, filesystem, origin) {
        // Begun on a blank device. Another node has formatted it only whole, and mounts nothing else.
        (Content::Blank | Content::Data { .. }, _, Origin::Empty) if marked => {
            return format(device, filesystem, mark, Again::Yes);
        }
        (Content::Known(Signature::Xfs), Filesystem::Xfs, Origin::Empty) if marked && is_unfinished_xfs(device)? => {
            return format(device, filesystem, mark, Again::Yes);
        }
        (Content::Blank, _, Origin::Empty) => format(device, filesystem, mark, Again::No),
        (Content::Blank, _, Origin::Source) => Err(PrepareError::BlankRestore),
        (Content::Known(Signature::Ext4), Filesystem::Ext4, _) => check_and_grow_ext4(device),
        // xfs replays its log at mount and is grown mounted: there is nothing to do before.
        (Content::Known(Signature::Xfs), Filesystem::Xfs, _) => Ok(()),
        (found, wanted, _) => Err(PrepareError::Foreign { wanted, found }),
    }?;
    // What is there is whole, so that formatting is over, wherever it was done.
    if marked { remove_mark(mark).map_err(|source| PrepareError::Mark { path: mark.into(), source }) } else { Ok(()) }
}

/// mkfs.xfs writes its first superblock with this byte set, and clears it last (`sb_inprogress` in the kernel's `xfs_format.h`);
/// such a filesystem was never mounted. mkfs.ext4 writes its first superblock last.
fn is_unfinished_xfs(device: &Path) -> Result<bool, PrepareError> {
    const IN_PROGRESS: u64 = 126;
    let mut byte = [0];
    let read = File::open(device).and_then(|file| file.read_exact_at(&mut byte, IN_PROGRESS));
    read.map_err(|source| PrepareError::Device { path: device.into(), source })?;
    Ok(byte[0] != 0)
}

/// The device is used without a filesystem from now on: what is on it is its user's, also if formatting was begun here before.
pub fn forget_formatting(mark: &Path) -> Result<(), PrepareError> {
    match remove_mark(mark) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(PrepareError::Mark { path: mark.into(), source: error })
        }
        _ => Ok(()),
    }
}

/// The kernel gives an exclusive open to one holder: mkfs, e2fsck, resize2fs and mount all ask for it.
fn refuse_if_in_use(device: &Path) -> Result<(), PrepareError> {
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Err(PrepareError::Busy(device.into())),
        Err(source) => Err(PrepareError::Device { path: device.into(), source }),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    Yes,
    No,
}

fn format(device: &Path, filesystem: Filesystem, mark: &Path, again: Again) -> Result<(), PrepareError> {
    let size = device_size(device).map_err(|source| PrepareError::Device { path: device.into(), source })?;
    if filesystem == Filesystem::Xfs && size < MIN_XFS_BYTES {
        return Err(PrepareError::TooSmall { filesystem, size, minimum: MIN_XFS_BYTES });
    }
    let mark_error = |source| PrepareError::Mark { path: mark.into(), source };
    // Persist before you act: without the mark a half made filesystem would look like somebody's data.
    write_mark(mark).map_err(mark_error)?;
    // No discard: the volume is new and reads as zeros. No reserve for root: pods cannot use it.
    let (program, mut arguments) = match filesystem {
        Filesystem::Ext4 => (MKFS_EXT4, vec!["-q", "-b", "4096", "-m", "0", "-E", "nodiscard"]),
        Filesystem::Xfs => (MKFS_XFS, vec!["-q", "-K"]),
    };
    if again == Again::Yes {
        arguments.push(if filesystem == Filesystem::Ext4 { "-F" } else { "-f" });
    }
    let device_text = device.to_string_lossy();
    arguments.push(&device_text);
    program.succeed(&arguments)?;
    File::open(device)
        .and_then(|file| file.sync_all())
        .map_err(|source| PrepareError::Device { path: device.into(), source })?;
    // The filesystem is on stable media: only now the mark may go.
    remove_mark(mark).map_err(mark_error)
}

fn remove_mark(mark: &Path) -> std::io::Result<()> {
    std::fs::remove_file(mark)?;
    sync_parent(mark)
}

fn write_mark(mark: &Path) -> std::io::Result<()> {
    File::create(mark)?.sync_all()?;
    sync_parent(mark)
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// Growing before the mount needs a full check first; where growing a mounted ext4 is allowed, that is cheaper.
fn check_and_grow_ext4(device: &Path) -> Result<(), PrepareError> {
    check_ext4(device, "-p")?;
    if !may_grow_mounted_ext4() && needs_growth_ext4(device)? {
        check_ext4(device, "-pf")?;
        grow_unmounted_ext4(device)?;
    }
    Ok(())
}

fn check_ext4(device: &Path, how: &str) -> Result<(), PrepareError> {
    let outcome = E2FSCK.run(&[how.as_ref(), device.as_os_str()])?;
    // 0: clean. 1: repaired. 2: repaired, and a reboot is due if it is mounted, which it is not.
    match outcome.code {
        Some(0..=3) => Ok(()),
        Some(code) if code & 4 != 0 => Err(PrepareError::Damaged(outcome.output, device.into())),
        Some(_) | None => Err(ProgramError::Failed { program: E2FSCK, outcome }.into()),
    }
}
