//! Copy-on-write of btrfs, switched off for a directory; files that are made in it afterwards inherit that.
//!
//! Invariant: the other attributes of the directory stay as they are.
#![allow(unsafe_code, reason = "the attribute ioctls are not wrapped by any crate that is used here")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

// The kernel's names say `long`, but it reads and writes an int.
nix::ioctl_read!(get_attributes, b'f', 1, libc::c_long);
nix::ioctl_write_ptr!(set_attributes, b'f', 2, libc::c_long);

/// FS_NOCOW_FL, chattr's `C`.
const NOCOW: libc::c_long = 0x0080_0000;

/// What chattr +C does.
pub(super) fn switch_copy_on_write_off(directory: &File) -> io::Result<()> {
    let mut attributes: libc::c_long = 0;
    // SAFETY: the descriptor is open and the ioctl writes no more than this value.
    unsafe { get_attributes(directory.as_raw_fd(), &raw mut attributes) }?;
    attributes |= NOCOW;
    // SAFETY: the descriptor is open and the ioctl reads no more than this value.
    unsafe { set_attributes(directory.as_raw_fd(), &raw const attributes) }?;
    Ok(())
}
