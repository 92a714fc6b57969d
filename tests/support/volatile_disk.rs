//! A pool's filesystem on a disk with a volatile write cache that can lose power; gone on every path.
//!
//! ```text
//!   ext4 or xfs ─> /dev/loopN ─> a file of nbdfuse ─> nbdkit, its cache ══ flush ══> image
//! ```
//! # Invariants
//! * What is written is in a file without a name that only this nbdkit has, until a flush: killed, it takes that along.
//! * Each life of the disk has a server, a mount and a loop device of its own: what has lost power may live on in mount namespaces
//!   that were made meanwhile, and reaches nothing.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Until a process is there, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the disk does with a flush.
#[derive(Clone, Copy)]
pub enum Flushes {
    /// It keeps what was written before.
    Obeyed,
    /// It says so, and keeps nothing.
    Ignored,
}

impl Flushes {
    fn mode(self) -> &'static str {
        match self {
            Self::Obeyed => "cache=writeback",
            Self::Ignored => "cache=unsafe",
        }
    }
}

/// See the module.
pub struct VolatileDisk {
    directory: tempfile::TempDir,
    /// The last one is used, those before have lost power.
    lives: Vec<Life>,
}

/// From one power cut to the next.
struct Life {
    server: Child,
    fuse: Child,
    /// Where nbdfuse shows its file.
    at: PathBuf,
    device: String,
}

fn run(command: &mut Command) {
    assert!(command.status().expect("it is installed").success(), "{command:?}");
}

/// Also where a dead filesystem is still used by somebody else.
fn unmount(path: &Path) {
    let mut command = Command::new("umount");
    let _ = command.arg("--lazy").arg(path).stderr(Stdio::null()).status();
}

fn await_that(what: &str, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < PATIENCE, "{what} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl VolatileDisk {
    /// All zeros, without power.
    pub fn new(mib: u64) -> Self {
        let directory = tempfile::Builder::new().prefix("tandem-volatile-").tempdir().expect("temporary directory");
        let disk = Self { directory, lives: Vec::new() };
        File::create(disk.image()).and_then(|file| file.set_len(mib * MIB)).expect("image");
        disk
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// It has power again: its device.
    pub fn start(&mut self, flushes: Flushes) -> PathBuf {
        let number = self.lives.len();
        let (socket, at) = (
            self.directory.path().join(format!("socket-{number}")),
            self.directory.path().join(format!("disk-{number}")),
        );
        std::fs::create_dir(&at).expect("a directory");
        let mut server = Command::new("nbdkit");
        server.args(["--foreground", "--exit-with-parent", "--filter=cache", "--unix"]).arg(&socket);
        server.arg("file").arg(self.image()).arg(flushes.mode()).env("TMPDIR", self.directory.path());
        let server = server.spawn().expect("nbdkit");
        await_that("nbdkit", || socket.exists());
        let file = at.join("disk");
        let fuse = Command::new("nbdfuse").arg(&file).arg("--unix").arg(&socket).spawn().expect("nbdfuse");
        self.lives.push(Life { server, fuse, at, device: String::new() });
        await_that("nbdfuse", || file.exists());
        let found = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().expect("losetup");
        let device = String::from_utf8_lossy(&found.stdout).trim().to_owned();
        assert!(found.status.success() && !device.is_empty(), "no loop device");
        self.lives[number].device.clone_from(&device);
        device.into()
    }

    /// What was not flushed is lost from this moment on, and whatever is asked fails.
    pub fn cut(&mut self) {
        if let Some(life) = self.lives.last_mut() {
            life.end();
        }
    }
}

impl Life {
    fn end(&mut self) {
        if matches!(self.server.try_wait(), Ok(None)) {
            // It does nothing any more; and the other one ends before it notices that.
            let _ = kill(Pid::from_raw(self.server.id() as i32), Signal::SIGSTOP);
        }
        for process in [&mut self.fuse, &mut self.server] {
            // One that has ended is a zombie until it is waited for: nobody else has its number.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for VolatileDisk {
    fn drop(&mut self) {
        for life in &mut self.lives {
            life.end();
            if !life.device.is_empty() {
                let _ = Command::new("losetup").args(["--detach", &life.device]).stderr(Stdio::null()).status();
            }
            unmount(&life.at);
        }
    }
}

/// What is on such a disk.
#[derive(Clone, Copy)]
pub enum Filesystem {
    Ext4,
    /// At least 300 MiB.
    Xfs,
}

/// A filesystem on such a disk, in use.
pub struct VolatilePool {
    path: PathBuf,
    /// One that is not gone everywhere has the same name.
    options: &'static str,
    disk: VolatileDisk,
}

impl VolatilePool {
    pub fn new(kind: Filesystem, mib: u64) -> Self {
        let disk = VolatileDisk::new(mib);
        let (mut make, options) = match kind {
            Filesystem::Ext4 => (Command::new("mkfs.ext4"), "defaults"),
            Filesystem::Xfs => (Command::new("mkfs.xfs"), "nouuid"),
        };
        run(make.arg("-q").arg(disk.image()));
        let path = disk.directory.path().join("pool");
        std::fs::create_dir(&path).expect("directory");
        let mut pool = Self { path, options, disk };
        pool.restore(Flushes::Obeyed);
        pool
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// See [`VolatileDisk::cut`].
    pub fn cut(&mut self) {
        self.disk.cut();
    }

    /// Power is back. Whoever used the pool has ended.
    pub fn restore(&mut self, flushes: Flushes) {
        unmount(&self.path);
        let device = self.disk.start(flushes);
        run(Command::new("mount").args(["-o", self.options]).arg(device).arg(&self.path));
    }
}

impl Drop for VolatilePool {
    fn drop(&mut self) {
        unmount(&self.path);
    }
}
