//! Filesystems on block devices: make, check, grow, mount, bind, measure and unmount them.
//!
//! Invariants: what exists is never formatted (see [`prepare`]); what is mounted is read from the kernel, never remembered;
//! unmounting happens in a child process, so that a filesystem that hangs can never hang this one; only a lazy unmount, of
//! what was given up, does not. All functions block.

mod grow;
mod mountinfo;
mod options;
mod prepare;
mod program;
mod signature;
mod twin;

pub use grow::{GrowError, grow_mounted, may_grow_mounted_ext4};
pub use mountinfo::{Mount, MountTable, MountTableError};
pub use options::{MAX_TOTAL_BYTES, MountOptions, OptionError};
pub use prepare::{MIN_XFS_BYTES, Origin, PrepareError, forget_formatting, prepare};
pub use program::{MKFS_XFS, Outcome, Program, ProgramError};
pub use signature::{Content, ProbeError, Signature, probe};
pub use twin::{read_only_twin, remove_read_only_twin, resize_read_only_twin};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::statvfs::statvfs;
use program::UMOUNT;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{Error, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};
use sys_mount::MountFlags;

/// Mounts stacked on one place that an unmount takes away; more than a few means that something mounts in a loop.
const MAX_STACKED: usize = 16;
/// How long a mount may stay busy before the caller is told: a program that is being started has the files of the process
/// that starts it open until its exec.
const BUSY_LIMIT: Duration = Duration::from_secs(2);
const BUSY_POLL: Duration = Duration::from_millis(50);

/// A filesystem that Tandem makes and mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// ext4, the default.
    Ext4,
    /// XFS.
    Xfs,
}

impl Filesystem {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Ext4, Self::Xfs];
    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not a filesystem that Tandem knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("filesystem {0:?} is not supported; supported are ext4 and xfs")]
pub struct UnknownFilesystem(String);

impl FromStr for Filesystem {
    type Err = UnknownFilesystem;
    fn from_str(name: &str) -> Result<Self, UnknownFilesystem> {
        let unknown = || UnknownFilesystem(name.chars().take(40).collect());
        Self::ALL.into_iter().find(|filesystem| filesystem.name() == name).ok_or_else(unknown)
    }
}

/// Why something is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The filesystem's own metadata is wrong.
    #[error("the {filesystem} on {} is damaged; repair it with {}", device.display(), repair(*filesystem))]
    Damaged {
        /// Which.
        filesystem: Filesystem,
        /// Where.
        device: PathBuf,
    },
    /// The kernel has no such filesystem.
    #[error("this kernel cannot mount {0}; try: modprobe {0}")]
    NoDriver(Filesystem),
    /// The mount call failed.
    #[error("mounting {} on {}: {source}", what.display(), target.display())]
    Failed {
        /// Device or directory.
        what: PathBuf,
        /// Where.
        target: PathBuf,
        /// Why.
        source: Error,
    },
    /// The table of mounts is unknown.
    #[error(transparent)]
    Table(#[from] MountTableError),
}

fn repair(filesystem: Filesystem) -> &'static str {
    match filesystem {
        Filesystem::Ext4 => "e2fsck -f",
        Filesystem::Xfs => "xfs_repair",
    }
}

/// Mounts `device` on the directory `target`.
pub fn mount_device(
    device: &Path,
    target: &Path,
    filesystem: Filesystem,
    options: &MountOptions,
) -> Result<(), MountError> {
    let data = options.data(filesystem);
    let builder = sys_mount::Mount::builder().fstype(filesystem.name()).flags(options.flags()).data(&data);
    match builder.mount(device, target) {
        Ok(_) => Ok(()),
        // EUCLEAN (EFSCORRUPTED) and EBADMSG (EFSBADCRC).
        Err(error) if matches!(error.raw_os_error(), Some(libc::EUCLEAN | libc::EBADMSG)) => {
            Err(MountError::Damaged { filesystem, device: device.into() })
        }
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Err(MountError::NoDriver(filesystem)),
        Err(source) => Err(MountError::Failed { what: device.into(), target: target.into(), source }),
    }
}

/// Makes `source` (a directory or a device node) visible at `target`, which exists and is of the same kind.
pub fn bind(source: &Path, target: &Path) -> Result<(), MountError> {
    call(source, target, MountFlags::BIND)
}

/// Adds `flags` (see [`MountOptions::flags_of_bind`]; `RDONLY` for read-only) to the bind mount at `target`.
/// Those that it has stay: the kernel takes the new set as a whole.
pub fn restrict_bind(target: &Path, flags: MountFlags) -> Result<(), MountError> {
    let table = MountTable::read()?;
    let has = table.at(target).map_or(MountFlags::empty(), flags_of);
    if has.contains(flags) {
        return Ok(());
    }
    call(Path::new("none"), target, MountFlags::REMOUNT | MountFlags::BIND | has | flags)
}

fn flags_of(mount: &Mount) -> MountFlags {
    let known = [
        ("ro", libc::MS_RDONLY),
        ("nosuid", libc::MS_NOSUID),
        ("nodev", libc::MS_NODEV),
        ("noexec", libc::MS_NOEXEC),
        ("noatime", libc::MS_NOATIME),
        ("nodiratime", libc::MS_NODIRATIME),
        ("relatime", libc::MS_RELATIME),
        ("nosymfollow", libc::MS_NOSYMFOLLOW),
    ];
    let bits = known.iter().filter(|(name, _)| mount.has(name)).fold(0, |bits, (_, bit)| bits | bit);
    MountFlags::from_bits_retain(bits)
}

fn call(source: &Path, target: &Path, flags: MountFlags) -> Result<(), MountError> {
    let done = sys_mount::Mount::builder().fstype("none").flags(flags).mount(source, target);
    done.map(drop).map_err(|source_error| MountError::Failed {
        what: source.into(),
        target: target.into(),
        source: source_error,
    })
}

/// Why something is still mounted.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// Files on it are open, or something is mounted below.
    #[error("{0} is busy: a process still uses it, or something is mounted below it (see: fuser -vm)")]
    Busy(PathBuf),
    /// Mounted over and over.
    #[error("{0} has more than {MAX_STACKED} mounts on top of each other; unmount them by hand")]
    Stacked(PathBuf),
    /// Not even lazily.
    #[error("{} cannot be unmounted lazily: {errno}", target.display())]
    Lazily {
        /// Where.
        target: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// A bug.
    #[error("an unmount ended by a bug of the driver: see its log, then repeat")]
    Ended,
    /// umount is missing or failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The table of mounts is unknown.
    #[error(transparent)]
    Table(#[from] MountTableError),
}

/// Unmounts whatever is mounted at `target` (canonical, absolute); nothing is success. Waits until the child has done it.
pub fn unmount(target: &Path) -> Result<(), UnmountError> {
    for _ in 0..MAX_STACKED {
        if MountTable::read()?.at(target).is_none() {
            return Ok(());
        }
        let arguments = ["--no-canonicalize".as_ref(), "--internal-only".as_ref(), "--".as_ref(), target.as_os_str()];
        let start = Instant::now();
        let mut outcome = UMOUNT.run(&arguments)?;
        while outcome.output.contains("target is busy") && start.elapsed() < BUSY_LIMIT {
            std::thread::sleep(BUSY_POLL);
            outcome = UMOUNT.run(&arguments)?;
        }
        if outcome.code != Some(0) && MountTable::read()?.at(target).is_some() {
            if outcome.output.contains("target is busy") {
                return Err(UnmountError::Busy(target.into()));
            }
            return Err(ProgramError::Failed { program: UMOUNT, outcome }.into());
        }
    }
    Err(UnmountError::Stacked(target.into()))
}

/// An unmount that may take as long as its filesystem hangs.
pub struct Unmounting(Receiver<Result<(), UnmountError>>);

impl Unmounting {
    /// Begins to [`unmount`]; it goes on when this is dropped.
    pub fn start(target: &Path) -> Self {
        let (done, result) = sync_channel(1);
        let target = target.to_path_buf();
        std::thread::spawn(move || drop(done.send(unmount(&target))));
        Self(result)
    }

    /// How it ended; `None`: it goes on.
    pub fn wait(&self, limit: Duration) -> Option<Result<(), UnmountError>> {
        match self.0.recv_timeout(limit) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(UnmountError::Ended)),
        }
    }
}

/// What is mounted at `target` is seen by nobody any more, and goes when its last user does; nothing is success.
pub fn unmount_lazily(target: &Path) -> Result<(), UnmountError> {
    for _ in 0..MAX_STACKED {
        if MountTable::read()?.at(target).is_none() {
            return Ok(());
        }
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        umount2(target, flags).map_err(|errno| UnmountError::Lazily { target: target.into(), errno })?;
    }
    Err(UnmountError::Stacked(target.into()))
}

/// What a mounted filesystem has and uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of the filesystem.
    pub total_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Bytes that a process without privileges can still have.
    pub available_bytes: u64,
    /// Inodes.
    pub total_inodes: u64,
    /// Inodes in use.
    pub used_inodes: u64,
    /// Inodes left.
    pub free_inodes: u64,
}

/// Usage of the filesystem mounted at `path`.
pub fn usage(path: &Path) -> Result<Usage, Error> {
    let answer = statvfs(path)?;
    let unit = answer.fragment_size();
    Ok(Usage {
        total_bytes: answer.blocks() * unit,
        used_bytes: answer.blocks().saturating_sub(answer.blocks_free()) * unit,
        available_bytes: answer.blocks_available() * unit,
        total_inodes: answer.files(),
        used_inodes: answer.files().saturating_sub(answer.files_free()),
        free_inodes: answer.files_free(),
    })
}

/// Bytes of a block device (or a plain file).
pub fn device_size(device: &Path) -> Result<u64, Error> {
    File::open(device)?.seek(SeekFrom::End(0))
}

/// Major and minor number of the block device that `path` is a node of.
pub fn device_number(path: &Path) -> Result<(u32, u32), Error> {
    let number = std::fs::metadata(path)?.rdev();
    Ok((libc::major(number), libc::minor(number)))
}
