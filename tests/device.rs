//! The device layer on the real kernel: FUSE, loop, slots and the holder. Needs root and /dev/fuse.
#![allow(unsafe_code, reason = "aligned buffers and the calls of a minimal engine")]

#[path = "device/kill.rs"]
mod kill;
#[path = "device/server.rs"]
mod server;

use server::{Server, Shared, open_direct};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tandem::replica::device::loop_device::{self, LoopDevice, LoopError};
use tandem::replica::device::slots::Slots;
use tandem::replica::device::{Control, FuseLoop, mount};
use tandem::volume::{InstanceId, VolumeId, VolumeSize};

const MIB: u64 = 1 << 20;

/// Bytes that direct I/O accepts.
#[repr(C, align(4096))]
struct Aligned([u8; CHUNK]);

const CHUNK: usize = 128 << 10;

fn aligned(byte: u8) -> Box<Aligned> {
    Box::new(Aligned([byte; CHUNK]))
}

fn direct(device: LoopDevice) -> File {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_DIRECT).open(device.path()).expect("the loop device")
}

/// After this something hangs; how fast it is, is not what is tested.
const PATIENCE: Duration = Duration::from_secs(300);

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether somebody has the device for himself, as a mount has. For a moment after a close or an umount somebody still may:
/// the child of another thread's fork has copies of this process's files, an engine that starts has copies of all mounts.
fn in_use(device: LoopDevice) -> bool {
    let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(device.path());
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// Detaches the device that nobody uses any more; see [`in_use`].
fn detach(control: &Control, device: LoopDevice) {
    eventually("the device is free", || !in_use(device));
    eventually("the device goes", || match control.detach() {
        Ok(()) => true,
        Err(LoopError::Busy { .. }) => false,
        Err(error) => panic!("{error}"),
    });
}

fn size(bytes: u64) -> VolumeSize {
    VolumeSize::try_from(bytes).expect("a size")
}

fn backing(directory: &Path, bytes: u64) -> File {
    let file = open_direct(&directory.join("volume"));
    file.set_len(bytes).expect("set_len");
    file
}

/// Gives the device up on every path: nobody waits for a server that is gone.
struct Cleanup<'a> {
    shared: &'a Shared,
    control: Option<Control>,
    volume: VolumeId,
}

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        if loop_device::find_any(self.volume).is_some() {
            if let Some(control) = self.control.take() {
                let _ = control.abort();
            }
            let _ = loop_device::detach_all(self.volume);
        }
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// Serves a volume of `bytes` from a thread while `test` uses its device.
fn with_device(bytes: u64, test: impl FnOnce(&Shared, &Control, LoopDevice, &File)) {
    let directory = tempfile::Builder::new().prefix("tandem-device-").tempdir().expect("a directory");
    let file = backing(directory.path(), bytes);
    let (size, stop, paused) = (AtomicU64::new(bytes), AtomicBool::new(false), AtomicBool::new(false));
    let shared = Shared { size, stop, paused, delay: Duration::ZERO, hang: None };
    let (arena, _memory) = Slots::create("tandem-test", 8).expect("slots");
    let device = FuseLoop::create(VolumeId::random(), InstanceId::random()).expect("a device");
    let (volume, control) = (device.volume, device.control().expect("control"));
    let guard = Cleanup { shared: &shared, control: Some(device.control().expect("control")), volume };
    let server = Server { shared: &shared, device, arena, file: file.try_clone().expect("dup") };
    std::thread::scope(|scope| {
        let guard = guard;
        let thread = scope.spawn(move || server.run());
        let (attached, untuned) = control.attach().expect("attach");
        assert_eq!(loop_device::find_any(volume), Some(attached));
        println!("{attached:?}, not tuned: {untuned:?}");
        test(&shared, &control, attached, &file);
        detach(&control, attached);
        assert_eq!(loop_device::find_any(volume), None);
        drop(guard);
        assert_eq!(thread.join().expect("the server"), 0);
    });
}

#[test]
fn what_is_written_to_the_device_is_in_the_file_and_back() {
    with_device(16 * MIB, |_, _, device, file| {
        assert!(loop_device::is_direct(device));
        let disk = direct(device);
        disk.write_all_at(&aligned(7).0, 3 * MIB).expect("write");
        disk.sync_all().expect("flush");
        let mut found = aligned(0);
        file.read_exact_at(&mut found.0, 3 * MIB).expect("the file");
        assert!(found.0 == aligned(7).0);
        found.0.fill(0);
        disk.read_exact_at(&mut found.0, 3 * MIB).expect("read");
        assert!(found.0 == aligned(7).0);

        let range = [3 * MIB, CHUNK as u64 / 2];
        // SAFETY: BLKDISCARD takes two numbers.
        let discarded = unsafe { libc::ioctl(disk.as_raw_fd(), 0x1277, &range) };
        assert_eq!(discarded, 0, "{}", std::io::Error::last_os_error());
        disk.read_exact_at(&mut found.0, 3 * MIB).expect("read");
        assert!(found.0[..CHUNK / 2] == [0; CHUNK / 2] && found.0[CHUNK / 2..] == [7; CHUNK / 2]);
    });
}

#[test]
fn a_device_grows_while_it_is_written_to() {
    with_device(16 * MIB, |shared, control, device, file| {
        let disk = direct(device);
        let writing = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while writing.load(Ordering::Relaxed) {
                    disk.write_all_at(&aligned(1).0[..4096], 0).expect("write");
                }
            });
            for grown in [32 * MIB, 33 * MIB, 64 * MIB] {
                file.set_len(grown).expect("set_len");
                shared.size.store(grown, Ordering::Relaxed);
                control.resized(size(grown)).expect("resized");
                let sectors = std::fs::read_to_string(format!("/sys/block/loop{}/size", device.0)).expect("size");
                assert_eq!(sectors.trim().parse(), Ok(grown / 512));
            }
            writing.store(false, Ordering::Relaxed);
        });
        disk.write_all_at(&aligned(2).0, 63 * MIB).expect("a write at the new end");
    });
}

#[test]
fn a_device_that_is_open_is_not_taken_away() {
    with_device(16 * MIB, |_, control, device, _| {
        let exclusive = File::options().read(true).custom_flags(libc::O_EXCL).open(device.path()).expect("open");
        assert!(in_use(device));
        assert!(matches!(control.detach(), Err(LoopError::Busy { .. })));
        drop(exclusive);
        eventually("the device is free", || !in_use(device));

        // Only open: the kernel would remove it at the last close.
        let disk = direct(device);
        assert!(matches!(control.detach(), Err(LoopError::Busy { .. })));
        disk.write_all_at(&aligned(1).0, 0).expect("it still works");
        drop(disk);
        std::thread::sleep(Duration::from_millis(100));
        assert!(device.path().exists() && std::fs::read_dir(format!("/sys/block/loop{}/loop", device.0)).is_ok());
        direct(device).write_all_at(&aligned(1).0, 0).expect("and after the close");
    });
}

#[test]
fn an_aborted_connection_ends_its_requests() {
    let device = FuseLoop::create(VolumeId::random(), InstanceId::random()).expect("a device");
    let control = device.control().expect("control");
    std::thread::scope(|scope| {
        // Nobody serves, so this waits for ever.
        let waiting = scope.spawn(|| control.attach());
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waiting.is_finished());
        control.abort().expect("abort");
        assert!(matches!(waiting.join().expect("no panic"), Err(LoopError::File { .. })));
    });
    assert!(mount::connection_number(device.descriptors()[1]).is_ok());
}

#[test]
fn devices_attached_side_by_side_do_not_mix() {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..3 {
                    with_device(MIB, |_, _, device, _| direct(device).write_all_at(&aligned(9).0, 0).expect("write"));
                }
            });
        }
    });
    println!("24 devices in {:?}", start.elapsed());
}

/// A filesystem on the device, unmounted on every path.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(device: LoopDevice) -> Self {
        let made = std::process::Command::new("mkfs.ext4").arg("-q").arg(device.path()).status().expect("mkfs.ext4");
        assert!(made.success());
        let directory = tempfile::Builder::new().prefix("tandem-device-").tempdir().expect("a directory");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some(&device.path()), directory.path(), Some("ext4"), flags, None::<&str>).expect("mount");
        Self(directory)
    }
    fn is_in(&self, table: &str) -> bool {
        std::fs::read_to_string(table).expect("mounts").contains(&self.0.path().display().to_string())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn mounts_of_our_devices_do_not_follow_an_engine_into_its_namespace() {
    with_device(32 * MIB, |_, _, device, _| {
        let mounted = Mounted::new(device);
        std::thread::scope(|scope| {
            let engine = scope.spawn(|| {
                assert!(mounted.is_in("/proc/thread-self/mountinfo"));
                mount::private_mount_namespace().expect("a namespace");
                // The child that does it is not waited for long.
                eventually("its copy is detached", || !mounted.is_in("/proc/thread-self/mountinfo"));
            });
            engine.join().expect("no panic");
        });
        assert!(mounted.is_in("/proc/self/mountinfo"), "the host's stays");
        assert!(in_use(device));
    });
}

/// The last copy of a mount writes when it goes, and waits for the next engine if its own is killed. That one wants the lock.
#[test]
fn whoever_lets_go_of_a_mount_holds_no_lock_of_its_engine() {
    let directory = tempfile::Builder::new().prefix("tandem-device-").tempdir().expect("a directory");
    let path = directory.path().join("lock");
    let locked = || {
        let file = File::create(&path).expect("a file");
        // SAFETY: a system call on a descriptor that is open.
        (unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0).then_some(file)
    };
    with_device(32 * MIB, |shared, _, device, _| {
        let engine = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a namespace: this test needs root");
            let _mounted = Mounted::new(device);
            let lock = locked().expect("nobody else has it");
            shared.paused.store(true, Ordering::Relaxed);
            mount::private_mount_namespace().expect("a namespace");
            // A killed engine closes it and unlocks nothing.
            drop(lock);
            let free = locked().is_some();
            let waits = in_use(device);
            shared.paused.store(false, Ordering::Relaxed);
            (free, waits)
        };
        let (free, waits) = std::thread::scope(|scope| scope.spawn(engine).join()).expect("no panic");
        assert!(waits, "the mount went without a write: the test shows nothing");
        assert!(free, "the child that lets go of the mount has the lock");
    });
}

/// Its size becomes that of nothing: what is left of a device when the child that sets it up is killed before it has asked for it.
fn shrink_to_nothing(device: LoopDevice, bytes: u64) {
    const LOOP_SET_STATUS64: libc::c_ulong = 0x4c04;
    const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
    /// Words of `struct loop_info64`, and the one that says where the device begins in the file.
    const WORDS: usize = 29;
    const OFFSET: usize = 3;
    let (node, mut info) = (direct(device), [0u64; WORDS]);
    // SAFETY: both requests read or write a `loop_info64`, which is as long as these words.
    let done = unsafe {
        let got = libc::ioctl(node.as_raw_fd(), LOOP_GET_STATUS64 as _, info.as_mut_ptr());
        info[OFFSET] = bytes;
        (got, libc::ioctl(node.as_raw_fd(), LOOP_SET_STATUS64 as _, info.as_mut_ptr()))
    };
    assert_eq!(done, (0, 0), "{}", std::io::Error::last_os_error());
}

#[test]
fn a_device_whose_setting_up_was_cut_off_is_set_up_again() {
    with_device(16 * MIB, |_, control, device, _| {
        let length = |device: LoopDevice| direct(device).seek(SeekFrom::End(0)).expect("a size");
        shrink_to_nothing(device, 16 * MIB);
        assert_eq!(length(device), 0);
        eventually("the device is free", || !in_use(device));
        let (again, _) = control.attach().expect("attach");
        assert_eq!(length(again), 16 * MIB);
    });
}
