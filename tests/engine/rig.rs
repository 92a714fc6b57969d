//! An engine with its holder, a tree and a volume, in this process or in one that is killed.
#![allow(dead_code, reason = "not every test program uses all of it")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem::memory::Memory;
use tandem::replica::device::loop_device;
use tandem::replica::engine::{self, EngineConfig, EngineHandle, IoChoice, Recovered, TreeFiles};
use tandem::replica::holder::{self, Holder};
use tandem::store::{Control, Directory, PENDING_BYTES, Pending, Store, Superblock};
use tandem::volume::{InstanceId, PoolId, VolumeId, VolumeSize};

const HOLDER: &str = "TANDEM_TEST_ENGINE_HOLDER";
const CHILD: &str = "TANDEM_TEST_ENGINE_CHILD";

pub const SIZE: u64 = 512 << 20;

pub fn size(bytes: u64) -> VolumeSize {
    VolumeSize::try_from(bytes).expect("a size")
}

/// This program again, as something else than a test run.
pub fn again(test: &str, variable: &str, value: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(variable, value);
    command
}

/// What the process started by [`again`] does; returns at once in a test run.
pub fn be_the_holder() {
    if let Some(socket) = std::env::var_os(HOLDER) {
        holder::run(Path::new(&socket)).expect("the holder");
    }
}

/// The engine that is killed: brings everything up, says so in a file, and works.
pub fn be_the_engine() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let directory = PathBuf::from(directory);
    let io = if directory.join("threads").exists() { IoChoice::Threads } else { IoChoice::Uring };
    runtime().block_on(async {
        let up = bring_up(&directory, io).await;
        std::fs::write(directory.join("recovered.new"), up.handle.status().recovered_requests.to_string())
            .expect("write");
        std::fs::rename(directory.join("recovered.new"), directory.join("recovered")).expect("rename");
        std::fs::write(directory.join("device.new"), up.device.display().to_string()).expect("write");
        std::fs::rename(directory.join("device.new"), directory.join("device")).expect("rename");
        loop {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
    });
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// Everything that a test has on this machine; all of it goes on every path.
pub struct Place {
    directory: Option<tempfile::TempDir>,
    pub volume: VolumeId,
    child: Option<Child>,
}

impl Place {
    pub fn new() -> Self {
        let under = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let directory = tempfile::Builder::new().prefix("tandem-engine-").tempdir_in(under).expect("a directory");
        let (tree, volume) = (InstanceId::random(), VolumeId::random());
        std::fs::write(directory.path().join("ids"), format!("{tree} {volume}")).expect("write");
        Self { directory: Some(directory), volume, child: None }
    }

    pub fn path(&self) -> &Path {
        self.directory.as_ref().expect("until it is dropped").path()
    }

    /// Starts an engine in a process of its own and waits until its device is there.
    pub fn start_child(&mut self) -> PathBuf {
        let device = self.path().join("device");
        let _ = std::fs::remove_file(&device);
        self.child = Some(again("engine_process", CHILD, self.path()).spawn().expect("starts"));
        wait_for("the device", || std::fs::read_to_string(&device).ok()).into()
    }

    /// The engine's process.
    pub fn child_id(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// kill -9 and wait until it is gone.
    pub fn kill_child(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("is there");
            child.wait().expect("ends");
        }
    }

    pub fn recovered(&self) -> u64 {
        let text = std::fs::read_to_string(self.path().join("recovered")).unwrap_or_default();
        text.parse().unwrap_or(0)
    }
}

pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // The connections go with the holder, and nobody waits for them any more.
        if let Ok(status) = Holder::status(&self.path().join("holder.sock")) {
            let pid = nix::unistd::Pid::from_raw(status.pid as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = loop_device::detach(self.volume);
    }
}

pub struct Up {
    pub handle: EngineHandle,
    pub tree: InstanceId,
    pub volume: VolumeId,
    pub device: PathBuf,
}

/// An engine whose tree and volume are open, and what an earlier one left of devices.
pub struct Started {
    pub handle: EngineHandle,
    pub recovered: Recovered,
    pub tree: InstanceId,
    pub volume: VolumeId,
}

/// The engine with what an earlier one left, the tree and the volume.
pub async fn start_engine(directory: &Path, io: IoChoice, bytes: u64) -> Started {
    let ids = std::fs::read_to_string(directory.join("ids")).expect("ids");
    let (tree, volume) = ids.split_once(' ').expect("two ids");
    let (tree, volume): (InstanceId, VolumeId) = (tree.parse().expect("an id"), volume.parse().expect("an id"));
    let socket = directory.join("holder.sock");
    let command = again("holder_process", HOLDER, &socket);
    let holder = Holder::connect_or_spawn_command(&socket, command).expect("the holder");
    let (handle, mut recovered) = engine::start(EngineConfig { holder, io, spin: None }).expect("the engine");
    let path = directory.join("tree");
    let files = Directory::new(&path);
    if !path.join("superblock").exists() {
        // The path may be a link into a small pool.
        std::fs::create_dir_all(std::fs::read_link(&path).unwrap_or(path.clone())).expect("a directory");
        Store::create(&files, &Superblock { instance: tree, pool: PoolId::random(), created_ms: 0 }).expect("a tree");
    }
    let tree_files = TreeFiles::open(&path).expect("the files");
    tree_files.drain().expect("drains");
    let (memory, pending) = match recovered.pendings.remove(&tree) {
        Some(fd) => (Memory::map(&fd, PENDING_BYTES).expect("maps"), fd),
        None => Memory::create("tandem-pending", PENDING_BYTES).expect("memory"),
    };
    let store = Store::open(Arc::new(files), Pending::over(memory)).expect("opens");
    handle.open_tree(tree, Box::new(store), tree_files, pending).await.expect("opens");
    let create = Control::CreateVolume { volume, size: size(bytes), verify_reads: false };
    handle.control(tree, create).await.expect("a volume");
    Started { handle, recovered, tree, volume }
}

/// The engine with what an earlier one left, the tree, the volume and its device.
pub async fn bring_up(directory: &Path, io: IoChoice) -> Up {
    let Started { handle, recovered, tree, volume } = start_engine(directory, io, SIZE).await;
    handle.reattach(recovered).await;
    let device = handle.attach(tree, volume).await.expect("a device");
    Up { handle, tree, volume, device }
}

/// Runs a program to its end; its output if it fails.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}\n{errors}", output.status);
}

/// fio on a device: writes with checksums, then reads them.
pub fn fio(device: &Path, more: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command.arg("--name=tandem-verify").arg(format!("--filename={}", device.display()));
    command.args([
        "--direct=1",
        "--ioengine=libaio",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--output-format=terse",
    ]);
    command.args(more);
    command
}

pub fn succeeds(mut command: Command) {
    let output = command.output().expect("runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
}
