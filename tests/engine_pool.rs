//! The engine and the filesystem under it: the drain barrier, and a pool that is full. Needs root, mkfs of ext4, xfs, btrfs.

mod loopdev;
#[path = "engine/rig.rs"]
mod rig;

use loopdev::LoopDevice;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use rig::{Place, bring_up, run, runtime, wait_for};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tandem::replica::engine::{IoChoice, drain};
use tandem::replica::io::{Choice, Event, Io, Operation, Sleep, Token};
use tandem::replica::pool::{Expected, Pool, trash};

/// Not a test of its own: the holder that the tests below start.
#[test]
fn holder_process() {
    rig::be_the_holder();
}

/// Not a test of its own: the engine that the tests below stop.
#[test]
fn engine_process() {
    rig::be_the_engine();
}

/// A mounted filesystem; goes on every path.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, filesystem: &str, at: &Path) -> Self {
        std::fs::create_dir(at).expect("a directory");
        mount(Some(device), at, Some(filesystem), MsFlags::empty(), None::<&str>).expect("mounts");
        Self(at.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if umount2(&self.0, MntFlags::empty()).is_err() {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}

/// A process that is stopped for as long as this lives: what it serves does not answer.
struct Stopped(nix::unistd::Pid);

impl Stopped {
    fn new(process: u32) -> Self {
        let pid = nix::unistd::Pid::from_raw(process as i32);
        kill(pid, Signal::SIGSTOP).expect("is there");
        // The signal only asks: a thread that is in the middle of a request may still answer it.
        wait_for("every thread of the engine to stop", || threads_are_stopped(pid).then_some(()));
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Whether the kernel shows each thread of the process as stopped; the state is the field behind the name in brackets.
fn threads_are_stopped(process: nix::unistd::Pid) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("a process");
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|fields| fields.starts_with('T'))
    })
}

#[repr(C, align(4096))]
struct Aligned([u8; 4096]);

fn direct_file(path: &Path) -> File {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).custom_flags(libc::O_DIRECT).open(path).expect("a file");
    (0..256).for_each(|block| file.write_all_at(&Aligned([1; 4096]).0, block * 4096).expect("writes"));
    file.sync_all().expect("syncs");
    file
}

/// A write is under way on a device that does not answer: the barrier waits for it, and only for it.
fn the_barrier_waits(filesystem: &str, mkfs: &[&str]) {
    let mut place = Place::new();
    let device = place.start_child();
    let mut arguments = mkfs.to_vec();
    let text = device.display().to_string();
    arguments.push(&text);
    run(&format!("mkfs.{filesystem}"), &arguments);
    let mounted = Mounted::new(&device, filesystem, &place.path().join("mnt"));
    if filesystem == "btrfs" {
        // With checksums its direct writes go through the page cache since Linux 6.15; a pool there is NOCOW.
        run("chattr", &["+C", &mounted.0.display().to_string()]);
    }
    let (busy, quiet) = (direct_file(&mounted.0.join("busy")), direct_file(&mounted.0.join("quiet")));
    nix::unistd::syncfs(&busy).expect("syncs");
    drain(&busy).expect("nothing is under way");

    let mut io = Io::new(Choice::Uring, None).expect("io_uring");
    let memory = Box::new(Aligned([2; 4096]));
    let stopped = Stopped::new(place.child_id());
    let write = Operation::Write { memory: memory.0.as_ptr(), length: 4096, offset: 128 * 4096 };
    io.submit(Token(1), busy.as_raw_fd(), write);
    let mut events = vec![];
    io.wait(Sleep::AtMost(Duration::from_millis(50)), &mut events).expect("waits");
    assert_eq!(events, [], "the device is stopped");
    let (through, drained) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            drain(&quiet).expect("drains");
            through.store(true, Ordering::SeqCst);
        });
        scope.spawn(|| {
            drain(&busy).expect("drains");
            drained.store(true, Ordering::SeqCst);
        });
        // That of another file comes through, so what this one waits for is the write; if it waits for something else
        // the test ends here and shows nothing.
        wait_for("the barrier of another file", || through.load(Ordering::SeqCst).then_some(()));
        std::thread::sleep(Duration::from_millis(500));
        let this = drained.load(Ordering::SeqCst);
        drop(stopped);
        assert!(!this, "{filesystem}: the barrier did not wait for direct I/O");
        wait_for("the barrier", || drained.load(Ordering::SeqCst).then_some(()));
    });
    io.wait(Sleep::Long, &mut events).expect("waits");
    assert_eq!(events, [Event::Done { token: Token(1), result: Ok(()) }]);
}

#[test]
fn the_drain_barrier_waits_for_direct_io_on_ext4() {
    the_barrier_waits("ext4", &["-q"]);
}

#[test]
fn the_drain_barrier_waits_for_direct_io_on_xfs() {
    the_barrier_waits("xfs", &["-q"]);
}

#[test]
fn the_drain_barrier_waits_for_direct_io_on_btrfs() {
    the_barrier_waits("btrfs", &["-q"]);
}

/// A pool on a filesystem of its own, with little space.
fn small_pool(place: &Place, megabytes: u64) -> (LoopDevice, Mounted) {
    let device = LoopDevice::new(place.path(), "pool.img", megabytes << 20);
    let at = place.path().join("pool");
    run("mkfs.ext4", &["-q", "-m", "0", &device.text()]);
    let mounted = Mounted::new(&device.path, "ext4", &at);
    std::os::unix::fs::symlink(at.join("tree"), place.path().join("tree")).expect("a link");
    (device, mounted)
}

fn writes_wait_for_space(io: IoChoice) {
    let place = Place::new();
    let (_device, pool) = small_pool(&place, 224);
    let filler = pool.0.join("filler");
    runtime().block_on(async {
        let up = bring_up(place.path(), io).await;
        let taken = File::create(&filler).expect("a file");
        nix::fcntl::fallocate(&taken, nix::fcntl::FallocateFlags::empty(), 0, 96 << 20).expect("space");
        let path = up.device.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let mut file = File::options().write(true).custom_flags(libc::O_DIRECT).open(&path).expect("the device");
            let chunk = tandem::memory::Memory::zeros(1 << 20).expect("memory");
            (0..140).for_each(|_| file.write_all(chunk.bytes()).expect("waits, but never fails"));
        });
        let waits = || up.handle.health(up.volume).waiting_for_space;
        let mut waited = 0;
        while !waits() {
            assert!(!writer.is_finished(), "140 MiB do not fit");
            tokio::time::sleep(Duration::from_millis(50)).await;
            waited += 1;
            assert!(waited < 6000, "the pool is never full");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!writer.is_finished() && waits(), "still full");
        drop(taken);
        std::fs::remove_file(&filler).expect("removes");
        writer.await.expect("all written");
        assert!(!waits(), "told while it is so, not longer");
        let health = up.handle.health(up.volume);
        assert!(!health.disk_failed && !health.corrupt);
        up.handle.detach(up.volume).await.expect("detaches");
        up.handle.close_tree(up.tree).await.expect("closes");
    });
}

#[test]
fn writes_wait_while_the_pool_is_full_and_go_on_by_io_uring() {
    writes_wait_for_space(IoChoice::Uring);
}

#[test]
fn writes_wait_while_the_pool_is_full_and_go_on_by_threads() {
    writes_wait_for_space(IoChoice::Threads);
}

/// A direct write to a copy-on-write file of btrfs would go through the page cache.
#[test]
fn a_copy_on_btrfs_is_not_copied_on_write() {
    let place = Place::new();
    let device = LoopDevice::new(place.path(), "pool.img", 256 << 20);
    run("mkfs.btrfs", &["-q", &device.text()]);
    let at = place.path().join("pool");
    let mounted = Mounted::new(&device.path, "btrfs", &at);
    let pool = Pool::open("default".parse().expect("a name"), &mounted.0, place.path(), Expected::Any).expect("a pool");
    let tree = mounted.0.join("tree");
    std::fs::create_dir(&tree).expect("a directory");
    pool.prepare(&tree).expect("an attribute");
    File::create(tree.join("data")).expect("a file");
    let attributes = loopdev::run("lsattr", &[&tree.join("data").display().to_string()]);
    assert!(attributes.split_whitespace().next().is_some_and(|flags| flags.contains('C')), "{attributes}");
}

/// One copy that cannot be removed keeps no other's space, and no two threads do the same work.
#[test]
fn what_cannot_be_removed_from_the_trash_keeps_nothing_else_there() {
    let place = Place::new();
    let path = place.path().join("trash");
    for number in 0..8 {
        std::fs::create_dir_all(path.join(format!("{number}/in-use"))).expect("a directory");
        std::fs::write(path.join(format!("{number}/data")), [1; 4096]).expect("a file");
    }
    let busy = path.join("3/in-use");
    mount(Some("tandem-trash"), &busy, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).expect("mounts");
    let mounted = Mounted(busy);
    let emptying = trash::Emptying::default();
    emptying.empty(&path).expect_err("somebody uses one");
    let left = || std::fs::read_dir(&path).expect("readable").count();
    assert_eq!(left(), 1);
    drop(mounted);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| emptying.empty(&path))).collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic").expect("nothing is in use"));
    });
    emptying.empty(&path).expect("nothing is there");
    assert_eq!(left(), 0);
}
