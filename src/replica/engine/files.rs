//! The data path's descriptors of one tree, and the barrier that waits for what a killed engine still has under way.
//!
//! Direct I/O that was submitted through a ring outlives its process: the ring is taken down later than the process ends.
//! A late write would land on newer data. What waits for it, read in the kernel's sources (5.4 to 6.18):
//! * ext4: `fallocate` of any mode calls `inode_dio_wait` with the inode locked.
//! * xfs: `xfs_file_fallocate` calls `inode_dio_wait` for every mode, before anything else.
//! * btrfs: `fallocate` waits only for its own range, but `ftruncate` to the size that the file has goes through
//!   `btrfs_setsize`, which calls `inode_dio_wait`; so do ext4 and xfs there.
//!
//! So both are called. Work that the ring had queued but not begun is cancelled before the process is gone.
#![allow(unsafe_code, reason = "fallocate with a mode has no wrapper that keeps holes cheap")]

use crate::store::{File, LogSlot};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// O_DIRECT descriptors of `data`, `log-a`, `log-b` and `mirror`.
#[derive(Debug)]
pub struct TreeFiles {
    data: fs::File,
    log_a: fs::File,
    log_b: fs::File,
    mirror: fs::File,
}

impl TreeFiles {
    /// Opens the files of the tree's directory; `mirror` is made if the tree is older than mirrors are.
    ///
    /// # Errors
    /// One is missing, or the filesystem has no direct I/O.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let open = |name: &str| {
            let path = directory.join(name);
            let mut options = fs::File::options();
            let options = options.read(true).write(true).create(name == "mirror").mode(0o600);
            let file = options.custom_flags(libc::O_DIRECT).open(&path);
            file.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        };
        Ok(Self { data: open("data")?, log_a: open("log-a")?, log_b: open("log-b")?, mirror: open("mirror")? })
    }

    /// Waits until no direct I/O of an earlier process is under way. Blocks; call it before the store reads anything.
    ///
    /// # Errors
    /// The filesystem refuses: then nothing is known and the tree must not be opened.
    pub fn drain(&self) -> io::Result<()> {
        [&self.data, &self.log_a, &self.log_b, &self.mirror].into_iter().try_for_each(drain)
    }

    pub(super) fn fd(&self, file: File) -> RawFd {
        match file {
            File::Data => self.data.as_raw_fd(),
            File::Log(LogSlot::A) => self.log_a.as_raw_fd(),
            File::Log(LogSlot::B) => self.log_b.as_raw_fd(),
            File::Mirror => self.mirror.as_raw_fd(),
        }
    }
}

/// Waits for all direct I/O of the file's inode, whoever submitted it; see the module.
///
/// # Errors
/// The filesystem refuses one of the calls.
pub fn drain(file: &fs::File) -> io::Result<()> {
    // One allocated block at the start of the file: where the superblock of a log and the first block of data are.
    // SAFETY: a system call on a descriptor that is open.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, 4096) };
    if result != 0 {
        let error = io::Error::last_os_error();
        // A full pool must not keep its volumes from coming back; the truncation below waits, too.
        if !matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EOPNOTSUPP)) {
            return Err(error);
        }
    }
    file.set_len(file.metadata()?.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn the_barrier_changes_neither_size_nor_content() {
        let dir = tempfile::Builder::new().prefix("tandem-files").tempdir().expect("a directory");
        let path = dir.path().join("data");
        let file = fs::File::options().read(true).write(true).create_new(true).open(&path).expect("a file");
        file.set_len(1 << 30).expect("sparse");
        file.write_all_at(b"kept", 4096).expect("writes");
        for _ in 0..3 {
            drain(&file).expect("drains");
        }
        let mut found = [0; 4];
        file.read_exact_at(&mut found, 4096).expect("reads");
        let metadata = file.metadata().expect("stat");
        assert_eq!((&found, metadata.len()), (b"kept", 1 << 30));
        assert!(metadata.blocks() * 512 <= 64 << 10, "holes stay holes");
    }
}
