//! The holder as a process: what it keeps outlives whoever put it there, and the holder's own upgrade.

#[path = "support/leash.rs"]
mod leash;

use leash::Leash;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tandem::replica::holder::{Entry, Holder, HolderError, MAX_META};

fn command(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.arg("holder").arg("--socket").arg(socket);
    command
}

/// A directory for the socket; ends the holder on every path.
struct Place {
    _leash: Leash,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("tandem-holder-").tempdir().expect("a directory");
        Self { _leash: Leash::new(directory.path()), directory }
    }
    fn socket(&self) -> PathBuf {
        self.directory.path().join("holder.sock")
    }
    fn engine(&self) -> Holder {
        Holder::connect_or_spawn(&self.socket(), Path::new(env!("CARGO_BIN_EXE_tandem"))).expect("the holder")
    }
    fn pid(&self) -> Pid {
        Pid::from_raw(Holder::status(&self.socket()).expect("status").pid as i32)
    }
    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("holder.log")).unwrap_or_default()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Ok(status) = Holder::status(&self.socket()) {
            let _ = kill(Pid::from_raw(status.pid as i32), Signal::SIGKILL);
        }
    }
}

fn text(words: &str) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(words.as_bytes()).expect("write");
    file
}

fn words(entry: &Entry) -> Vec<String> {
    let read = |fd: &std::os::fd::OwnedFd| {
        let mut file = File::from(fd.try_clone().expect("dup"));
        let mut text = String::new();
        file.rewind().expect("rewind");
        file.read_to_string(&mut text).expect("read");
        text
    };
    entry.fds.iter().map(read).collect()
}

/// After this something hangs; how fast it is, is not what is tested.
const PATIENCE: Duration = Duration::from_secs(300);

fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_is_put_is_there_for_the_next_engine() {
    let place = Place::new();
    let engine = place.engine();
    let (one, two) = (text("one"), text("two"));
    engine.put("volume/a", b"meta", &[one.as_fd(), two.as_fd()]).expect("put");
    engine.put("arena", &[7; MAX_META], &[one.as_fd()]).expect("put");
    engine.put("volume/b", b"", &[]).expect("put");
    engine.put("arena", b"replaced", &[two.as_fd()]).expect("put again");
    engine.remove("volume/b").expect("remove");
    engine.remove("volume/b").expect("remove what is gone");
    drop((engine, one, two));

    let engine = place.engine();
    let entries = engine.list().expect("list");
    let keys: Vec<_> = entries.iter().map(|entry| (entry.key.as_str(), entry.meta.as_slice())).collect();
    assert_eq!(keys, [("arena", &b"replaced"[..]), ("volume/a", b"meta")]);
    assert_eq!(
        (words(&entries[0]), words(&entries[1])),
        (vec!["two".to_owned()], vec!["one".to_owned(), "two".into()])
    );
    let status = Holder::status(&place.socket()).expect("status");
    assert_eq!((status.entries, status.fds, status.engine), (2, 3, Some(std::process::id().into())));
    let mode = std::fs::metadata(place.socket()).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let name = std::fs::read_to_string(format!("/proc/{}/comm", status.pid)).expect("comm");
    assert_eq!(name.trim(), "tandem-holder");
}

#[test]
fn there_is_one_engine_at_a_time() {
    let place = Place::new();
    let engine = place.engine();
    match Holder::connect(&place.socket()) {
        Err(HolderError::Busy { pid, .. }) => assert_eq!(pid, u64::from(std::process::id())),
        other => panic!("{other:?}"),
    }
    drop(engine);
    let engine = place.engine();
    engine.put("a", b"", &[]).expect("put");
    assert!(matches!(engine.put("", b"", &[]), Err(HolderError::Refused { .. })));
    engine.put("b", b"", &[]).expect("a refused put does not end the connection");
}

#[test]
fn a_second_holder_does_not_take_the_socket() {
    let place = Place::new();
    let _engine = place.engine();
    let output = command(&place.socket()).output().expect("a second holder");
    let output = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.contains("another holder runs there"), "{output}");
    assert_eq!(Holder::status(&place.socket()).expect("the first one").entries, 0);
}

#[test]
fn a_holder_of_nothing_ends_when_no_engine_comes() {
    let place = Place::new();
    let engine = place.engine();
    let pid = place.pid();
    engine.put("a", b"", &[text("x").as_fd()]).expect("put");
    drop(engine);
    std::thread::sleep(Duration::from_secs(6));
    let engine = place.engine();
    assert_eq!(place.pid(), pid, "it holds something, so it stays");
    engine.remove("a").expect("remove");
    drop(engine);
    eventually("the holder ends", || kill(pid, None).is_err());
    assert!(!place.socket().exists());
}

#[test]
fn a_holder_ignores_being_asked_to_end_while_it_holds() {
    let place = Place::new();
    let engine = place.engine();
    let pid = place.pid();
    engine.put("a", b"", &[text("x").as_fd()]).expect("put");
    drop(engine);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(pid, signal).expect("kill");
        eventually("it says so", || place.log().contains("it holds 1 entries"));
    }
    let engine = place.engine();
    assert_eq!(place.pid(), pid);
    engine.remove("a").expect("remove");
    drop(engine);
    kill(pid, Signal::SIGTERM).expect("kill");
    eventually("it ends", || kill(pid, None).is_err());
}

#[test]
fn a_successor_takes_everything_and_the_engine_notices_nothing() {
    let place = Place::new();
    let engine = place.engine();
    let before = place.pid();
    for number in 0..300 {
        let file = text(&format!("file {number}"));
        engine.put(&format!("volume/{number:03}"), b"m", &[file.as_fd()]).expect("put");
    }
    let mut successor = command(&place.socket()).arg("--successor").stderr(Stdio::null()).spawn().expect("a successor");
    eventually("the old holder ends", || kill(before, None).is_err());
    assert_eq!(place.pid().as_raw(), successor.id() as i32);
    assert!(matches!(Holder::connect(&place.socket()), Err(HolderError::Busy { .. })));
    engine.put("volume/300", b"", &[]).expect("the same connection");
    let entries = engine.list().expect("list");
    assert_eq!(entries.len(), 301);
    assert_eq!(words(&entries[123]), ["file 123"]);
    drop((engine, place));
    successor.wait().expect("the successor");
}

#[test]
fn a_successor_that_fails_changes_nothing() {
    let place = Place::new();
    let engine = place.engine();
    engine.put("a", b"", &[text("kept").as_fd()]).expect("put");
    // Says that it is the successor, and dies.
    let stranger = raw_connection(&place.socket());
    send(&stranger, &[b'T', b'D', b'M', b'H', 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(received(&stranger)[6..8], 100u16.to_le_bytes());
    drop(stranger);
    engine.put("b", b"", &[]).expect("put");
    assert_eq!(words(&engine.list().expect("list")[0]), ["kept"]);
}

#[test]
fn strangers_are_refused_and_cost_nothing() {
    let place = Place::new();
    let engine = place.engine();
    let other_version = raw_connection(&place.socket());
    send(&other_version, &[b'T', b'D', b'M', b'H', 9, 0, 1, 0]);
    assert_eq!(received(&other_version)[6..8], 105u16.to_le_bytes());
    let noise = raw_connection(&place.socket());
    send(&noise, b"GET / HTTP/1.1");
    assert_eq!(received(&noise)[6..8], 104u16.to_le_bytes());
    let silent: Vec<_> = (0..20).map(|_| raw_connection(&place.socket())).collect();
    engine.put("a", b"", &[]).expect("put");
    eventually("room for another", || Holder::status(&place.socket()).is_ok());
    drop(silent);
}

#[test]
fn too_few_descriptors_are_said_before_they_are_needed() {
    let place = Place::new();
    let mut command = command(&place.socket());
    let limit = || nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 80, 80);
    #[allow(unsafe_code, reason = "pre_exec")]
    // SAFETY: one system call.
    unsafe {
        command.pre_exec(move || Ok(limit()?))
    };
    let engine = Holder::connect_or_spawn_command(&place.socket(), command).expect("the holder");
    let file = text("x");
    let refused = (0..40).map(|n| engine.put(&n.to_string(), b"", &[file.as_fd()])).find_map(Result::err);
    let words = refused.expect("a refusal").to_string();
    assert!(words.contains("limit of 80 open files"), "{words}");
    assert_eq!(engine.list().expect("list").len(), 16);
}

fn raw_connection(socket: &Path) -> std::os::fd::OwnedFd {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect};
    let end = nix::sys::socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let end = end.expect("socket");
    let address = UnixAddr::new(socket).expect("address");
    connect(std::os::fd::AsRawFd::as_raw_fd(&end), &address).expect("connect");
    end
}

fn send(end: &std::os::fd::OwnedFd, bytes: &[u8]) {
    assert_eq!(nix::unistd::write(end, bytes), Ok(bytes.len()));
}

fn received(end: &std::os::fd::OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    let count = nix::unistd::read(end, &mut bytes).expect("read");
    bytes.truncate(count);
    bytes
}
