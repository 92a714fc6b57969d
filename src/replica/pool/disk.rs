//! A whole disk as a pool: formatted with xfs once, mounted in the replica's own mount namespace.
//!
//! # Invariants
//! A disk that carries any signature is never formatted unless told `--force`; one that is in use never at all.

use super::{Expected, PoolError};
use crate::mount::{Content, Signature, probe};
use nix::mount::{MntFlags, umount2};
use std::fs::{self, File, Metadata, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The label that tells our filesystem from anybody else's.
const LABEL: &str = "tandem";

pub(super) fn is_block_device(meta: &Metadata) -> bool {
    meta.file_type().is_block_device()
}

/// Mounts the disk on `target`, formatting it first if that is allowed.
pub(super) fn mount(device: &Path, target: &Path, expected: Expected) -> Result<PathBuf, PoolError> {
    let failed = |what: String| PoolError::Disk { path: device.to_owned(), what };
    let occupied = |found: String| PoolError::Occupied { path: device.to_owned(), found };
    match (probe(device).map_err(|e| failed(e.to_string()))?, expected) {
        (Content::Known(Signature::Xfs), _) if is_ours(device) => {}
        (Content::Blank, Expected::Known(id)) => return Err(PoolError::Gone { path: device.to_owned(), id }),
        (Content::Blank, Expected::Any) | (_, Expected::Force) => format(device)?,
        (found, Expected::Known(_) | Expected::Any) => return Err(occupied(found.to_string())),
    }
    fs::create_dir_all(target).map_err(|e| failed(format!("{}: {e}", target.display())))?;
    sys_mount::Mount::builder()
        .fstype("xfs")
        .flags(sys_mount::MountFlags::NOATIME | sys_mount::MountFlags::NOSUID | sys_mount::MountFlags::NODEV)
        .mount(device, target)
        .map_err(|e| failed(format!("cannot be mounted: {e}; see the kernel log")))?;
    Ok(target.to_owned())
}

/// Takes the mount away again: the pool on it could not be opened, and is tried again.
pub(super) fn unmount(target: &Path) {
    if let Err(error) = umount2(target, MntFlags::MNT_DETACH) {
        tracing::warn!(path = %target.display(), %error, "a disk that is no pool stays mounted");
    }
}

/// Whether an xfs has our label: 12 bytes at offset 108 of its superblock.
fn is_ours(device: &Path) -> bool {
    let mut label = [0; 12];
    let read = File::open(device).and_then(|file| file.read_exact_at(&mut label, 108));
    read.is_ok() && label.starts_with(LABEL.as_bytes()) && label[LABEL.len()..].iter().all(|b| *b == 0)
}

fn format(device: &Path) -> Result<(), PoolError> {
    let failed = |what: String| PoolError::Disk { path: device.to_owned(), what };
    // O_EXCL on a block device fails while anything has it mounted or claimed.
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_EXCL)
        .open(device)
        .map_err(|e| failed(format!("is in use ({e}); unmount it first")))?;
    let output = Command::new("mkfs.xfs")
        .args(["-f", "-q", "-L", LABEL])
        .arg(device)
        .output()
        .map_err(|e| failed(format!("mkfs.xfs: {e}; install the package xfsprogs")))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(format!("mkfs.xfs: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}
