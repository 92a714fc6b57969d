//! The FUSE mount of one volume: made without a path, so there is nothing to clean up and nothing that anybody can open.
//!
//! # Invariants
//! * The mount is never attached to a directory: it lives as long as its root descriptor or the loop device's open file.
//! * Nothing in here waits for an answer of the engine.
#![allow(unsafe_code, reason = "fsopen, fsconfig and fsmount have no wrapper")]

use super::fuse::MAX_PAYLOAD;
use super::isolated::close_all_but;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

const FSOPEN_CLOEXEC: u32 = 1;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSMOUNT_CLOEXEC: u32 = 1;
const MOUNT_ATTR_NOSUID: u32 = 2;
const MOUNT_ATTR_NODEV: u32 = 4;
const MOUNT_ATTR_NOEXEC: u32 = 8;
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// Why no FUSE mount could be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// /dev/fuse cannot be opened.
    #[error("/dev/fuse cannot be opened: {0}; load the module (modprobe fuse), and in a container pass the device")]
    Device(Errno),
    /// The kernel refused the mount.
    #[error("FUSE mount: {call}: {errno}; it needs root (CAP_SYS_ADMIN) and Linux 5.9 or newer")]
    Mount {
        /// The system call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
}

/// Gives this process a mount namespace of its own, into which mounts and unmounts of the host still come (a pool's disk may
/// be mounted later) and from which none goes out. Call it before any other thread exists.
///
/// Mounts of our own devices are taken out of it: an engine that holds the last one of them waits for itself when it ends.
pub fn private_mount_namespace() -> Result<(), Errno> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let (none, flags) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE);
    mount(none, "/", none, flags, none)?;
    let targets = mounts_of_our_devices();
    if targets.is_empty() {
        return Ok(());
    }
    // In a child: should the host unmount one just now, ours is the last, and its final write waits for the engine to serve.
    // SAFETY: no other thread exists, as documented; the child only makes system calls.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            // The engine's lock above all: the child may wait for the next engine, which waits for that lock.
            close_all_but(&[2]);
            for target in &targets {
                let _ = umount2(target.as_path(), MntFlags::MNT_DETACH);
            }
            // SAFETY: ends the child without running what the parent registered.
            unsafe { libc::_exit(0) }
        }
        nix::unistd::ForkResult::Parent { child } => wait_a_moment(child),
    }
    Ok(())
}

/// Waits for the child, but no longer than detaching mounts takes when nothing is wrong.
fn wait_a_moment(child: nix::unistd::Pid) {
    for _ in 0..200 {
        if waitpid(child, Some(WaitPidFlag::WNOHANG)) != Ok(WaitStatus::StillAlive) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Mount points in this namespace whose device is a loop device of ours, innermost last mount first.
fn mounts_of_our_devices() -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let ours = |line: &str| {
        let mut fields = line.split(' ').skip(2);
        let device = fields.next()?;
        let backing = std::fs::read_to_string(format!("/sys/dev/block/{device}/loop/backing_file")).ok()?;
        super::loop_device::volume_of(&backing)?;
        Some(unescape(fields.nth(1)?))
    };
    table.lines().rev().filter_map(ours).collect()
}

/// A path of mountinfo: blanks and backslashes are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// A new FUSE connection, non-blocking, and the root of its mount.
pub fn connect() -> Result<(OwnedFd, OwnedFd), MountError> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let device = open("/dev/fuse", flags, Mode::empty()).map_err(MountError::Device)?;
    let failed = |call| move |errno| MountError::Mount { call, errno };
    // SAFETY: a system call with constant, terminated strings; returns a descriptor that nobody else has.
    let context = unsafe { new_fd(libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), FSOPEN_CLOEXEC)) };
    let context = context.map_err(failed("fsopen"))?;
    let fd = CString::new(device.as_raw_fd().to_string()).map_err(|_| failed("fsconfig")(Errno::EINVAL))?;
    let max_read = CString::new(MAX_PAYLOAD.to_string()).map_err(|_| failed("fsconfig")(Errno::EINVAL))?;
    let options = [
        (c"source", c"tandem"),
        (c"subtype", c"tandem"),
        (c"fd", fd.as_c_str()),
        (c"rootmode", c"40000"),
        (c"user_id", c"0"),
        (c"group_id", c"0"),
        (c"max_read", max_read.as_c_str()),
    ];
    for (key, value) in options {
        configure(context.as_fd(), FSCONFIG_SET_STRING, Some((key, value))).map_err(failed("fsconfig"))?;
    }
    configure(context.as_fd(), FSCONFIG_CMD_CREATE, None).map_err(failed("fsconfig(create)"))?;
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    // SAFETY: a system call with integers; returns a descriptor that nobody else has.
    let root = unsafe { new_fd(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes)) };
    Ok((device, root.map_err(failed("fsmount"))?))
}

fn configure(context: BorrowedFd<'_>, command: u32, option: Option<(&CStr, &CStr)>) -> Result<(), Errno> {
    let (key, value) = option.map_or((std::ptr::null(), std::ptr::null()), |(k, v)| (k.as_ptr(), v.as_ptr()));
    // SAFETY: terminated strings that outlive the call, or null.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    Errno::result(result).map(drop)
}

/// # Safety
/// `result` must be that of a system call that returns a new descriptor.
unsafe fn new_fd(result: libc::c_long) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller's promise.
    Errno::result(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The number under which the kernel lists the connection. Asks for what the kernel knows, not the engine.
pub fn connection_number(root: BorrowedFd<'_>) -> Result<u32, Errno> {
    // SAFETY: all zeros is a valid statx.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the buffer lives across the call.
    let result = unsafe { libc::statx(root.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, &mut found) };
    Errno::result(result)?;
    Ok(found.stx_dev_minor | found.stx_dev_major << 20)
}

/// Ends the connection: every request of it, waiting or new, ends with an error. For devices that are given up.
///
/// Closing every copy of the device descriptor does the same; this works also while others hold copies.
pub fn abort(root: BorrowedFd<'_>) -> Result<(), std::io::Error> {
    let path: PathBuf = Path::new(CONNECTIONS).join(connection_number(root)?.to_string()).join("abort");
    if !path.exists() {
        // Containers often lack the control filesystem; the engine's mount namespace is its own.
        mount(Some("fusectl"), CONNECTIONS, Some("fusectl"), MsFlags::empty(), None::<&str>)?;
    }
    std::fs::write(path, "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_blanks_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape("/var/a\\040b\\134"), PathBuf::from("/var/a b\\"));
        assert_eq!(unescape("/plain"), PathBuf::from("/plain"));
    }
}
