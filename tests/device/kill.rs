//! kill -9 of whoever serves a device, while it is written to: what the holder keeps lets the next one go on.

use super::server::{Server, Shared, open_direct};
use super::{CHUNK, Cleanup, MIB, PATIENCE, aligned, detach, direct};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tandem::replica::device::loop_device::{self, LoopDevice, LoopError};
use tandem::replica::device::slots::Slots;
use tandem::replica::device::{Control, FuseLoop};
use tandem::replica::holder::Holder;
use tandem::volume::{InstanceId, VolumeId};

const SERVE: &str = "TANDEM_TEST_SERVE";
/// Answers INIT and nothing more.
const HANG: &str = "TANDEM_TEST_HANG";
const BYTES: u64 = 64 * MIB;
const KILLS: u32 = 12;
const WRITERS: u64 = 8;

/// The same for every server of a device, as its directory is.
fn copy() -> InstanceId {
    InstanceId::from_bytes(*b"tandem-test-copy")
}

/// Not a test of its own: the process that is killed. Its directory says what it has to serve.
#[test]
fn server_process() {
    let Some(directory) = std::env::var_os(SERVE) else { return };
    let directory = Path::new(&directory);
    let holder = Holder::connect_or_spawn(&directory.join("holder.sock"), Path::new(env!("CARGO_BIN_EXE_tandem")));
    let holder = holder.expect("the holder");
    let mut held = holder.list().expect("what is held");
    let (arena, device) = if held.is_empty() {
        let (arena, memory) = Slots::create("tandem-arena", 16).expect("slots");
        let device = FuseLoop::create(VolumeId::random(), copy()).expect("a device");
        holder.put("arena", b"", &[memory.as_fd()]).expect("put");
        holder.put(&format!("volume/{}", device.volume), b"", &device.descriptors()).expect("put");
        (arena, device)
    } else {
        let volume = held[1].key.trim_start_matches("volume/").parse().expect("an id");
        let device = FuseLoop::from_held(volume, copy(), std::mem::take(&mut held[1].fds)).expect("the device");
        (Slots::map(held[0].fds[0].as_fd()).expect("slots"), device)
    };
    let delay = Duration::from_millis(1);
    let hang = std::env::var_os(HANG).map(|_| (1, directory.join("hangs")));
    let (size, stop, paused) = (AtomicU64::new(BYTES), AtomicBool::new(false), AtomicBool::new(false));
    let shared = Shared { size, stop, paused, delay, hang };
    let control = device.control().expect("control");
    let file = open_direct(&directory.join("volume"));
    let volume = device.volume;
    let server = Server { shared: &shared, device, arena, file };
    std::thread::scope(|scope| {
        let serving = scope.spawn(move || server.run());
        control.attach().expect("attach");
        std::fs::write(directory.join("device"), volume.to_string()).expect("write");
        while !directory.join("stop").exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
        finish(&control, &holder, volume);
        shared.stop.store(true, Ordering::Relaxed);
        let recovered = serving.join().expect("served");
        println!("the last server took over {recovered} requests");
    });
}

fn finish(control: &Control, holder: &Holder, volume: VolumeId) {
    detach(control, loop_device::find_any(volume).expect("the loop device"));
    holder.remove(&format!("volume/{volume}")).expect("remove");
    holder.remove("arena").expect("remove");
}

/// The processes of one run, ended on every path.
struct Run {
    directory: tempfile::TempDir,
    server: Child,
}

impl Run {
    fn start(hang: bool) -> Self {
        let directory = tempfile::Builder::new().prefix("tandem-kill-").tempdir().expect("a directory");
        open_direct(&directory.path().join("volume")).set_len(BYTES).expect("set_len");
        let mut command = Self::serve(directory.path());
        if hang {
            command.env(HANG, "1");
        }
        let server = command.spawn().expect("a server");
        Self { directory, server }
    }

    fn serve(directory: &Path) -> Command {
        let log = std::fs::File::options().create(true).append(true).open(directory.join("log")).expect("a log");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "kill::server_process", "--nocapture"]).env(SERVE, directory);
        command.stdout(log.try_clone().expect("dup")).stderr(log).stdin(Stdio::null());
        command
    }

    fn volume(&self) -> VolumeId {
        let start = Instant::now();
        loop {
            if let Ok(text) = std::fs::read_to_string(self.directory.path().join("device"))
                && let Ok(volume) = text.parse()
            {
                return volume;
            }
            assert!(start.elapsed() < PATIENCE, "no device: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Lets the server detach the device and end.
    fn stop(&mut self) {
        std::fs::write(self.directory.path().join("stop"), "").expect("stop");
        assert!(self.server.wait().expect("wait").success(), "{}", self.log());
        assert_eq!(loop_device::find_any(self.volume()), None);
    }

    fn kill_server(&mut self) {
        self.server.kill().expect("kill");
        let start = Instant::now();
        while self.server.try_wait().expect("wait").is_none() {
            assert!(start.elapsed() < PATIENCE, "a killed server does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        if let Ok(status) = Holder::status(&self.directory.path().join("holder.sock")) {
            // With the last descriptor of the connection its requests end.
            let _ = kill(Pid::from_raw(status.pid as i32), Signal::SIGKILL);
        }
        if let Ok(text) = std::fs::read_to_string(self.directory.path().join("device"))
            && let Ok(volume) = text.parse()
        {
            let _ = loop_device::detach_all(volume);
        }
    }
}

/// Writes round after round over its own part of the device, checking each; returns the last round and the longest wait.
fn write_rounds(device: LoopDevice, writer: u64, stop: &AtomicBool) -> (u8, Duration) {
    let disk = direct(device);
    let (mut round, mut longest) = (0u8, Duration::ZERO);
    let part = BYTES / WRITERS;
    while !stop.load(Ordering::Relaxed) {
        round = round.wrapping_add(1);
        for chunk in 0..part / CHUNK as u64 {
            let start = Instant::now();
            let offset = writer * part + chunk * CHUNK as u64;
            disk.write_all_at(&aligned(round).0, offset).expect("a write survives the server");
            longest = longest.max(start.elapsed());
        }
        let mut found = aligned(0);
        disk.read_exact_at(&mut found.0, writer * part).expect("a read survives the server");
        assert!(found.0.iter().all(|byte| *byte == round), "writer {writer} reads an older round");
        disk.sync_data().expect("a flush survives the server");
    }
    (round, longest)
}

#[test]
fn a_device_survives_kill_9_of_whoever_serves_it() {
    let mut run = Run::start(false);
    let device = loop_device::find_any(run.volume()).expect("the loop device");
    let stop = AtomicBool::new(false);
    let mut recovered = 0;
    let rounds: Vec<(u8, Duration)> = std::thread::scope(|scope| {
        let stop = &stop;
        let writers: Vec<_> =
            (0..WRITERS).map(|writer| scope.spawn(move || write_rounds(device, writer, stop))).collect();
        for number in 0..KILLS {
            std::thread::sleep(Duration::from_millis(150 + u64::from(number) * 7));
            run.kill_server();
            recovered += filled(run.directory.path());
            run.server = Run::serve(run.directory.path()).spawn().expect("a server");
        }
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().map(|writer| writer.join().expect("no error")).collect()
    });
    let disk = direct(device);
    let mut found = aligned(0);
    for chunk in 0..BYTES / CHUNK as u64 {
        disk.read_exact_at(&mut found.0, chunk * CHUNK as u64).expect("read");
        let writer = (chunk * CHUNK as u64 / (BYTES / WRITERS)) as usize;
        assert!(found.0.iter().all(|byte| *byte == rounds[writer].0), "chunk {chunk} is not the last written");
    }
    drop(disk);
    let longest = rounds.iter().map(|(_, longest)| *longest).max();
    println!("{KILLS} kills, {recovered} requests were in slots, longest wait {longest:?}");
    assert!(recovered > 0, "no kill hit a request: the test shows nothing");

    run.stop();
}

/// The thread that attaches waits for an answer that the same process owes: it must not keep the process from ending.
#[test]
fn a_server_that_is_killed_while_it_attaches_ends_at_once() {
    let mut run = Run::start(true);
    let hangs = run.directory.path().join("hangs");
    let start = Instant::now();
    while !hangs.exists() {
        assert!(start.elapsed() < PATIENCE, "{}", run.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    run.kill_server();
    assert_eq!(filled(run.directory.path()), 1, "the request that hangs");
    std::fs::remove_file(hangs).expect("remove");
    run.server = Run::serve(run.directory.path()).spawn().expect("a server");
    let device = loop_device::find_any(run.volume()).expect("the loop device");
    direct(device).write_all_at(&aligned(1).0, 0).expect("a write");
    run.stop();
}

/// Requests that a killed server left, as the next one will find them.
fn filled(directory: &Path) -> usize {
    let holder =
        Holder::connect_or_spawn(&directory.join("holder.sock"), Path::new("/nonexistent")).expect("the holder");
    let held = holder.list().expect("list");
    let arena = Slots::map(held[0].fds[0].as_fd()).expect("slots");
    let own = Slots::map(held[1].fds[2].as_fd()).expect("slots");
    arena.recovered().count() + own.recovered().count()
}

/// The holder's death ends the connection: the device is dead, and a new one takes its place as soon as nobody has it open.
#[test]
fn a_device_whose_holder_died_is_replaced() {
    let mut run = Run::start(false);
    let volume = run.volume();
    let dead = loop_device::find_any(volume).expect("the loop device");
    let disk = direct(dead);
    disk.write_all_at(&aligned(1).0, 0).expect("a write");
    run.kill_server();
    let holder = Holder::status(&run.directory.path().join("holder.sock")).expect("the holder");
    kill(Pid::from_raw(holder.pid as i32), Signal::SIGKILL).expect("kill");
    assert!(disk.write_all_at(&aligned(1).0, 0).is_err(), "nobody answers any more, so it must not hang");

    let device = FuseLoop::create(volume, copy()).expect("a device");
    let control = device.control().expect("control");
    let refused = control.attach();
    assert!(matches!(refused, Err(LoopError::Dead { .. })), "{refused:?}");
    drop(disk);
    let (arena, _memory) = Slots::create("tandem-arena", 4).expect("slots");
    let (size, stop, paused) = (AtomicU64::new(BYTES), AtomicBool::new(false), AtomicBool::new(false));
    let shared = &Shared { size, stop, paused, delay: Duration::ZERO, hang: None };
    let file = open_direct(&run.directory.path().join("volume"));
    std::thread::scope(|scope| {
        let guard = Cleanup { shared, control: device.control().ok(), volume };
        let server = Server { shared, device, arena, file };
        scope.spawn(move || server.run());
        let (fresh, _) = control.attach().expect("a fresh device");
        let mut found = aligned(0);
        direct(fresh).read_exact_at(&mut found.0, 0).expect("read");
        assert!(found.0.iter().all(|byte| *byte == 1));
        detach(&control, fresh);
        drop(guard);
    });
}
