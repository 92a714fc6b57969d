//! The read-only twin of a block device: a loop device without write access on top of it.
//!
//! A read-only mount of a device node keeps nobody from writing to the device, and making the device itself read-only
//! (BLKROSET) would take it from those who may write. The twin refuses writes by itself. It costs one loop device per volume
//! that is published read-only as a block device.
//!
//! Invariants: at most one twin per device, found by its backing file; it does direct I/O, so what one reads is what the
//! other has written (a reader that wants that while it goes on must read directly too: each has its own page cache).
#![allow(unsafe_code, reason = "ioctls of the loop driver")]

use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

nix::ioctl_none_bad!(loop_clear, 0x4c01);
nix::ioctl_none_bad!(loop_set_capacity, 0x4c07);
nix::ioctl_write_ptr_bad!(loop_configure, 0x4c0a, Config);
nix::ioctl_none_bad!(loop_get_free, 0x4c82);

const READ_ONLY: u32 = 1;
const DIRECT_IO: u32 = 16;

/// Others take free loop devices too; each lost race costs one try.
const FREE_TRIES: u32 = 64;
/// A device that is cleared goes when its last opener (udev, for milliseconds) has closed it.
const GONE_LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// The kernel's loop_config: descriptor, block size, loop_info64 (of which only the flags matter here), reserved.
#[repr(C)]
struct Config {
    descriptor: u32,
    block_bytes: u32,
    before_flags: [u32; 13],
    flags: u32,
    after_flags: [u64; 22],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Config>() == 304 && std::mem::offset_of!(Config, flags) == 60);

/// The twin of `device`: the one that is there, or a new one.
pub fn read_only_twin(device: &Path) -> Result<PathBuf, Error> {
    if let Some(twin) = find(device)? {
        return Ok(twin);
    }
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    let backing = File::open(device)?;
    let config = Config {
        descriptor: backing.as_raw_fd() as u32,
        block_bytes: 4096,
        before_flags: [0; 13],
        flags: READ_ONLY | DIRECT_IO,
        after_flags: [0; 22],
        reserved: [0; 8],
    };
    for _ in 0..FREE_TRIES {
        // SAFETY: the descriptor is open; the ioctl takes no argument.
        let number = unsafe { loop_get_free(control.as_raw_fd()) }?;
        let twin = PathBuf::from(format!("/dev/loop{number}"));
        let node = File::open(&twin)?;
        // SAFETY: the descriptor is open and the ioctl reads exactly this structure.
        match unsafe { loop_configure(node.as_raw_fd(), &raw const config) } {
            Ok(_) => return Ok(twin),
            Err(Errno::EBUSY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(ErrorKind::ResourceBusy.into())
}

/// Removes the twin of `device`; none is fine.
pub fn remove_read_only_twin(device: &Path) -> Result<(), Error> {
    let start = Instant::now();
    while let Some(twin) = find(device)? {
        let node = OpenOptions::new().read(true).open(&twin)?;
        // SAFETY: the descriptor is open; the ioctl takes no argument.
        match unsafe { loop_clear(node.as_raw_fd()) } {
            Ok(_) | Err(Errno::ENXIO) => {}
            Err(errno) => return Err(errno.into()),
        }
        drop(node);
        if find(device)?.is_some() {
            if start.elapsed() > GONE_LIMIT {
                return Err(ErrorKind::ResourceBusy.into());
            }
            std::thread::sleep(POLL);
        }
    }
    Ok(())
}

/// Makes the new size of `device` known to its twin; none is fine.
pub fn resize_read_only_twin(device: &Path) -> Result<(), Error> {
    let Some(twin) = find(device)? else { return Ok(()) };
    let node = File::open(twin)?;
    // SAFETY: the descriptor is open; the ioctl takes no argument.
    unsafe { loop_set_capacity(node.as_raw_fd()) }?;
    Ok(())
}

fn find(device: &Path) -> Result<Option<PathBuf>, Error> {
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(backing.trim_end_matches('\n')) == device {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}
