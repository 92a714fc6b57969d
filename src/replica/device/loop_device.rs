//! The loop device on a volume's FUSE file: attach, find again, resize, detach.
//!
//! # Invariants
//! * Every function that can wait for the engine runs in a child ([`isolated`]) and blocks its caller: never call one from
//!   the engine's own thread.
//! * A device is found by the name of its backing file in /sys, which the kernel knows without asking the engine;
//!   LOOP_GET_STATUS64 would ask. The name says which copy serves it: two nodes on one kernel may have the same volume.
//! * Nothing waits without a limit of its own, except for the engine's answers.
#![allow(unsafe_code, reason = "ioctls of the loop driver")]

use super::fuse::NAME_PREFIX;
use super::isolated::isolated;
use crate::volume::{BLOCK_SIZE, InstanceId, VolumeId, VolumeSize};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_SET_STATUS64: libc::c_ulong = 0x4c04;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4c07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_MAJOR: u64 = 7;

/// Others take free loop devices too; each lost race costs one try.
const FREE_TRIES: u32 = 256;
/// Udev looks at a device when it appears and when it goes; it is done within milliseconds.
const DETACH_LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// Queue settings that were measured to matter: scheduling and throttling are the pool disk's business. (The driver's depth
/// of 128 requests can only be lowered here, which costs a fifth.)
const QUEUE: [(&str, &str); 2] = [("scheduler", "none"), ("wbt_lat_usec", "0")];

/// A loop device of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoopDevice(pub u32);

impl LoopDevice {
    /// Its node in /dev.
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.0))
    }
    fn sys(self) -> PathBuf {
        PathBuf::from(format!("/sys/block/loop{}", self.0))
    }
}

/// Why the loop device could not be set up, resized or removed.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The device is mounted or open.
    #[error("{} of volume {volume} is in use; unmount it or end what has it open, then repeat", device.path().display())]
    Busy {
        /// The volume.
        volume: VolumeId,
        /// Its device.
        device: LoopDevice,
    },
    /// The device is mounted or open, and dead.
    #[error(
        "{} of volume {volume} is dead, because the holder process was killed, and still in use; unmount it or end what has \
         it open, then repeat: what was flushed is there", device.path().display()
    )]
    Dead {
        /// The volume.
        volume: VolumeId,
        /// Its device.
        device: LoopDevice,
    },
    /// The file could not be opened: the engine does not serve it.
    #[error("the device file of volume {volume} cannot be opened: {errno}")]
    File {
        /// The volume.
        volume: VolumeId,
        /// What openat said.
        errno: Errno,
    },
    /// The loop driver is not there.
    #[error("no loop device for volume {volume}: /dev/loop-control: {errno}; load the module (modprobe loop)")]
    NoDriver {
        /// The volume.
        volume: VolumeId,
        /// Its error.
        errno: Errno,
    },
    /// A step failed.
    #[error("loop device of volume {volume}: {step}: {errno}")]
    System {
        /// The volume.
        volume: VolumeId,
        /// What was tried.
        step: &'static str,
        /// Its error.
        errno: Errno,
    },
}

/// Whose device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Served {
    /// The volume.
    pub volume: VolumeId,
    /// The copy of it that serves the device.
    pub copy: InstanceId,
}

impl Served {
    /// The beginning of the copy's id: enough to tell the few copies of one volume apart, and the driver cuts long names.
    fn tag(self) -> u32 {
        let [first, second, third, fourth, ..] = self.copy.to_bytes();
        u32::from_be_bytes([first, second, third, fourth])
    }

    /// The name of its file: also the FUSE connection is in it, so that a device whose connection died with the holder is told
    /// from one that works.
    fn file_name(self, connection: u32) -> String {
        format!("{NAME_PREFIX}{}.{connection}.{:08x}", self.volume, self.tag())
    }
}

/// A loop device of ours, as its backing file's name says.
struct Found {
    volume: VolumeId,
    connection: u32,
    tag: u32,
    device: LoopDevice,
}

impl Found {
    fn is_of(&self, served: Served) -> bool {
        self.volume == served.volume && self.tag == served.tag()
    }

    /// Whoever is killed while it sets a device up may leave one without size: the kernel has not heard how large the file is.
    fn is_whole(&self) -> bool {
        std::fs::read_to_string(self.device.sys().join("size")).is_ok_and(|sectors| sectors.trim() != "0")
    }

    fn is_there(&self) -> bool {
        let backing = std::fs::read_to_string(self.device.sys().join("loop/backing_file")).unwrap_or_default();
        parse_backing(&backing).is_some_and(|(volume, _, tag)| (volume, tag) == (self.volume, self.tag))
    }
}

/// The volume that a loop device with this backing file belongs to.
pub fn volume_of(backing_file: &str) -> Option<VolumeId> {
    parse_backing(backing_file).map(|(volume, _, _)| volume)
}

fn parse_backing(backing_file: &str) -> Option<(VolumeId, u32, u32)> {
    let name = backing_file.trim_end().strip_prefix('/')?.strip_prefix(NAME_PREFIX)?;
    // The kernel appends " (deleted)" when it has forgotten the name, which changes nothing.
    let mut parts = name.split(' ').next()?.split('.');
    let (volume, connection, tag) = (parts.next()?, parts.next()?, parts.next()?);
    Some((volume.parse().ok()?, connection.parse().ok()?, u32::from_str_radix(tag, 16).ok()?))
}

fn scan() -> impl Iterator<Item = Found> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let number = entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok()?;
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let (volume, connection, tag) = parse_backing(&backing)?;
        Some(Found { volume, connection, tag, device: LoopDevice(number) })
    })
}

/// The loop device that a copy serves, if it is attached and can be used. Never waits for the engine.
pub fn find(served: Served) -> Option<LoopDevice> {
    scan().find(|found| found.is_of(served) && found.is_whole()).map(|found| found.device)
}

/// One that any copy of the volume serves. Never waits for the engine.
pub fn find_any(volume: VolumeId) -> Option<LoopDevice> {
    scan().find(|found| found.volume == volume).map(|found| found.device)
}

/// Sets up a loop device (direct I/O, 4096-byte sectors) on the copy's file below `root`; the one that is there already
/// is taken. One of an earlier connection, which died with its holder, is removed first, unless it is still mounted; so is one
/// whose setting up was cut off.
/// The engine must be serving the file.
pub fn attach(root: BorrowedFd<'_>, served: Served) -> Result<LoopDevice, LoopError> {
    let volume = served.volume;
    let connection = own_connection(root, volume)?;
    match scan().find(|found| found.is_of(served)) {
        Some(found) if found.connection == connection && found.is_whole() => return Ok(found.device),
        Some(found) if found.connection == connection => remove(&found)?,
        Some(found) => match remove(&found) {
            Err(LoopError::Busy { .. }) => return Err(LoopError::Dead { volume, device: found.device }),
            result => result?,
        },
        None => {}
    }
    let name = served.file_name(connection);
    let configured = isolated(&[root], || Ok(configure_free(root, &name)));
    match configured.map_err(|errno| LoopError::System { volume, step: "child process", errno })? {
        Ok(number) => Ok(LoopDevice(number)),
        Err(("open the file", errno)) => Err(LoopError::File { volume, errno }),
        Err(("/dev/loop-control", errno)) => Err(LoopError::NoDriver { volume, errno }),
        Err((step, errno)) => Err(LoopError::System { volume, step, errno }),
    }
}

fn own_connection(root: BorrowedFd<'_>, volume: VolumeId) -> Result<u32, LoopError> {
    let failed = |errno| LoopError::System { volume, step: "look at the FUSE mount", errno };
    super::mount::connection_number(root).map_err(failed)
}

type Step<T> = Result<T, (&'static str, Errno)>;

fn step(name: &'static str) -> impl Fn(Errno) -> (&'static str, Errno) {
    move |errno| (name, errno)
}

fn configure_free(root: BorrowedFd<'_>, name: &str) -> Step<u32> {
    let control = open("/dev/loop-control", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
    let control = control.map_err(step("/dev/loop-control"))?;
    let file = openat(root, name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(step("open the file"))?;
    let mut config = LoopConfig::new(&file, name.split('.').next().unwrap_or(name));
    for _ in 0..FREE_TRIES {
        let number = ioctl(&control, LOOP_CTL_GET_FREE, 0).map_err(step("LOOP_CTL_GET_FREE"))? as u32;
        let device = open_node(LoopDevice(number), OFlag::O_RDWR).map_err(step("open the loop device"))?;
        match ioctl(&device, LOOP_CONFIGURE, &raw mut config as usize) {
            Ok(_) => return Ok(number),
            // Somebody was faster.
            Err(Errno::EBUSY) => {}
            Err(errno) => return Err(("LOOP_CONFIGURE", errno)),
        }
    }
    Err(("LOOP_CONFIGURE", Errno::EBUSY))
}

/// Opens the device node; makes it where /dev does not do that by itself (containers).
fn open_node(device: LoopDevice, flags: OFlag) -> Result<OwnedFd, Errno> {
    let path = device.path();
    let flags = flags | OFlag::O_CLOEXEC;
    match open(&path, flags, Mode::empty()) {
        Err(Errno::ENOENT) => {
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            match mknod(&path, SFlag::S_IFBLK, mode, makedev(LOOP_MAJOR, u64::from(device.0))) {
                Ok(()) | Err(Errno::EEXIST) => open(&path, flags, Mode::empty()),
                Err(errno) => Err(errno),
            }
        }
        result => result,
    }
}

/// Settings of a queue that this kernel does not let us change, and why; it costs speed and nothing else.
pub type Untuned = Vec<(&'static str, std::io::Error)>;

/// Sets the queue as measured.
pub fn tune(device: LoopDevice) -> Untuned {
    let queue = device.sys().join("queue");
    let set = |(name, value): (&'static str, &str)| std::fs::write(queue.join(name), value).err().map(|e| (name, e));
    QUEUE.into_iter().filter_map(set).collect()
}

/// Makes a grown volume's size known to the device. The engine must answer with the new size already.
pub fn set_capacity(root: BorrowedFd<'_>, served: Served, size: VolumeSize) -> Result<(), LoopError> {
    let volume = served.volume;
    let name = served.file_name(own_connection(root, volume)?);
    let device = find(served).ok_or(LoopError::System { volume, step: "find the device", errno: Errno::ENOENT })?;
    let work = || -> Step<()> {
        let file = openat(root, name.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
        let file = file.map_err(step("open the file"))?;
        // Truncating to the size it has makes the kernel take the size for certain; attributes that it merely reads are
        // dropped when a write ends at the same time.
        nix::unistd::ftruncate(&file, size.bytes() as i64).map_err(step("ftruncate"))?;
        let node = open_node(device, OFlag::O_RDONLY).map_err(step("open the loop device"))?;
        ioctl(&node, LOOP_SET_CAPACITY, 0).map_err(step("LOOP_SET_CAPACITY"))?;
        let mut bytes = 0u64;
        ioctl(&node, BLKGETSIZE64, &raw mut bytes as usize).map_err(step("BLKGETSIZE64"))?;
        if bytes == size.bytes() { Ok(()) } else { Err(("LOOP_SET_CAPACITY has not changed the size", Errno::EAGAIN)) }
    };
    let done = isolated(&[root], || Ok(work()));
    let done = done.map_err(|errno| LoopError::System { volume, step: "child process", errno })?;
    done.map_err(|(step, errno)| LoopError::System { volume, step, errno })
}

/// Removes the loop device of a copy and waits until it is gone; none is fine too. Busy while anything has it mounted or
/// open, and then it stays as it was. The engine must be serving the file.
pub fn detach(served: Served) -> Result<(), LoopError> {
    scan().find(|found| found.is_of(served)).map_or(Ok(()), |found| remove(&found))
}

/// As [`detach`], for all copies of the volume that have devices on this machine.
pub fn detach_all(volume: VolumeId) -> Result<(), LoopError> {
    scan().filter(|found| found.volume == volume).try_for_each(|found| remove(&found))
}

fn remove(found: &Found) -> Result<(), LoopError> {
    let (volume, device) = (found.volume, found.device);
    let cleared = isolated(&[], || Ok(clear(device)));
    let cleared = cleared.map_err(|errno| LoopError::System { volume, step: "child process", errno })?;
    match cleared {
        Ok(()) | Err((_, Errno::ENXIO | Errno::ENOENT)) => {}
        Err((_, Errno::EBUSY)) => return Err(LoopError::Busy { volume, device }),
        Err((step, errno)) => return Err(LoopError::System { volume, step, errno }),
    }
    if wait_until_gone(found) {
        return Ok(());
    }
    // Somebody has it open: the kernel would remove it at their last close. Take that promise back.
    let kept = isolated(&[], || Ok(keep(device)));
    match kept.map_err(|errno| LoopError::System { volume, step: "child process", errno })? {
        // On a dead connection the state cannot be asked for: that device may go at the last close.
        Ok(()) | Err(("LOOP_GET_STATUS64", Errno::ENOTCONN)) => Err(LoopError::Busy { volume, device }),
        Err((_, Errno::ENXIO | Errno::ENOENT)) => Ok(()),
        Err((step, errno)) => Err(LoopError::System { volume, step, errno }),
    }
}

fn clear(device: LoopDevice) -> Step<()> {
    // Exclusive: fails while it is mounted, and nobody can mount it meanwhile.
    let node = open_node(device, OFlag::O_RDONLY | OFlag::O_EXCL).map_err(step("open the loop device"))?;
    ioctl(&node, LOOP_CLR_FD, 0).map_err(step("LOOP_CLR_FD")).map(drop)
}

fn keep(device: LoopDevice) -> Step<()> {
    let node = open_node(device, OFlag::O_RDWR).map_err(step("open the loop device"))?;
    let mut info = LoopInfo::default();
    ioctl(&node, LOOP_GET_STATUS64, &raw mut info as usize).map_err(step("LOOP_GET_STATUS64"))?;
    info.flags &= !LO_FLAGS_AUTOCLEAR;
    ioctl(&node, LOOP_SET_STATUS64, &raw mut info as usize).map_err(step("LOOP_SET_STATUS64")).map(drop)
}

fn wait_until_gone(found: &Found) -> bool {
    let start = Instant::now();
    while found.is_there() {
        if start.elapsed() > DETACH_LIMIT {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

fn ioctl(fd: impl AsFd, request: libc::c_ulong, argument: usize) -> Result<i32, Errno> {
    // SAFETY: `argument` is 0 or the address of the structure that the request reads or writes, made at each call above.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as _, argument) })
}

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Default for LoopInfo {
    fn default() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

impl LoopConfig {
    fn new(file: &OwnedFd, name: &str) -> Self {
        let mut info = LoopInfo { flags: LO_FLAGS_DIRECT_IO, ..LoopInfo::default() };
        let length = name.len().min(info.file_name.len() - 1);
        info.file_name[..length].copy_from_slice(&name.as_bytes()[..length]);
        Self { fd: file.as_raw_fd() as u32, block_size: BLOCK_SIZE as u32, info, reserved: [0; 8] }
    }
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

/// Whether the device does direct I/O to its file: the kernel falls back silently where it cannot.
pub fn is_direct(device: LoopDevice) -> bool {
    let path: &Path = &device.sys().join("loop/dio");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_the_name_of_its_file_alone() {
        let (volume, copy) = (VolumeId::random(), InstanceId::random());
        let served = Served { volume, copy };
        let name = served.file_name(4_000_000_000);
        assert_eq!(parse_backing(&format!("/{name}\n")), Some((volume, 4_000_000_000, served.tag())));
        assert_eq!(parse_backing(&format!("/{name} (deleted)\n")), Some((volume, 4_000_000_000, served.tag())));
        assert!(name.len() < 64, "the loop driver cuts it");
        for other in ["/srv/tandem-x\n", "/tandem-\n", "", "/var/lib/disk.img\n"] {
            assert_eq!(volume_of(other), None, "{other}");
        }
        assert_eq!(volume_of(&format!("/srv/{name}\n")), None);
    }
}
