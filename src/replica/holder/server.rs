//! The holder process: one thread, one poll loop, a map of descriptors.
//!
//! # Invariants
//! * One answer per packet and no queue: a peer that does not read its answer loses its connection.
//! * While a successor copies, nobody else is served, so that what it copied is what there is.
//! * It ends by itself only when it holds nothing and no engine is connected.
#![allow(unsafe_code, reason = "mlockall")]

use super::wire::{self, Kind, Packet, ReceiveError};
use super::{HolderError, hello, refused, system};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen, socket, sockopt,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Bound;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Most entries: about four times what a node's volumes need, and 18 MiB at most.
pub const MAX_ENTRIES: usize = 4096;
/// Connections that have not said who they are; more wait in the listener's backlog.
const MAX_STRANGERS: usize = 8;
/// How long a connection may take to say who it is.
const STRANGER_LIMIT: Duration = Duration::from_secs(2);
/// How long a successor may take: it copies a few thousand descriptors in milliseconds.
const SUCCESSOR_LIMIT: Duration = Duration::from_secs(10);
/// How long a holder of nothing waits for an engine: longer than an engine takes to be started again.
const LINGER: Duration = Duration::from_secs(5);
/// Descriptors for our own use.
const OWN_FDS: u64 = 64;

struct Kept {
    meta: Vec<u8>,
    fds: Vec<OwnedFd>,
}

struct Server {
    path: PathBuf,
    listener: OwnedFd,
    lock: OwnedFd,
    entries: BTreeMap<Vec<u8>, Kept>,
    engine: Option<OwnedFd>,
    strangers: Vec<(OwnedFd, Instant)>,
    successor: Option<(OwnedFd, Instant)>,
    /// Since when no engine was connected.
    alone: Instant,
}

/// Runs the holder on this socket until it holds nothing and no engine is connected.
pub fn run(socket: &Path) -> Result<(), HolderError> {
    let path = std::path::absolute(socket).map_err(|error| failed(socket, "path")(error))?;
    let signals = prepare(&path)?;
    let lock = take_lock(&path)?;
    let listener = listen_on(&path)?;
    let alone = Instant::now();
    let (entries, strangers) = (BTreeMap::new(), vec![]);
    serve(Server { path, listener, lock, entries, engine: None, strangers, successor: None, alone }, &signals)
}

/// Takes everything over from the holder that runs on this socket, which then ends; goes on as [`run`]. The engine stays
/// connected and notices nothing.
pub fn run_successor(socket: &Path) -> Result<(), HolderError> {
    let path = std::path::absolute(socket).map_err(|error| failed(socket, "path")(error))?;
    let signals = prepare(&path)?;
    let server = take_over(path)?;
    serve(server, &signals)
}

fn take_over(path: PathBuf) -> Result<Server, HolderError> {
    let (old, _) = hello(&path, Kind::Successor)?;
    let mut entries: BTreeMap<Vec<u8>, Kept> = BTreeMap::new();
    loop {
        let after = entries.last_key_value().map_or(vec![], |(key, _)| key.clone());
        let packet = super::ask(&path, old.as_fd(), Kind::Next, (&after, &[]), &[])?;
        if packet.kind != Kind::Entry {
            break;
        }
        if packet.key <= after || entries.len() >= MAX_ENTRIES {
            return Err(refused(&path, "its entries are out of order"));
        }
        entries.insert(packet.key, Kept { meta: packet.meta, fds: packet.fds });
    }
    let mut fds = super::ask(&path, old.as_fd(), Kind::TakeOver, (&[], &[]), &[])?.fds.into_iter();
    let (Some(listener), Some(lock)) = (fds.next(), fds.next()) else {
        return Err(refused(&path, "it did not hand over its socket"));
    };
    let engine = fds.next();
    match super::ask(&path, old.as_fd(), Kind::Confirm, (&[], &[]), &[]) {
        // Gone: the old holder died just now, and we have everything.
        Ok(_) | Err(HolderError::Gone { .. }) => {}
        Err(error) => return Err(error),
    }
    log(&path, &format!("took over {} entries", entries.len()));
    let alone = Instant::now();
    Ok(Server { path, listener, lock, entries, engine, strangers: vec![], successor: None, alone })
}

/// Makes this process hard to end by accident. What is not allowed is left out: it costs robustness, not function.
fn prepare(path: &Path) -> Result<SignalFd, HolderError> {
    let _ = nix::sys::prctl::set_name(c"tandem-holder");
    let _ = nix::unistd::setsid();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    // SAFETY: only keeps pages in memory. ONFAULT: what is in use, not the whole program.
    unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_ONFAULT) };
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let mut signals = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|signal| signals.add(signal));
    signals.thread_block().map_err(system(path, "block signals"))?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(system(path, "signalfd"))
}

/// The lock says which holder is the one of this socket. Its file stays: removing it would let two take "the" lock.
fn take_lock(path: &Path) -> Result<OwnedFd, HolderError> {
    let file = File::options().create(true).truncate(false).write(true).open(path.with_extension("lock"));
    let file = file.map_err(failed(path, "open the lock file"))?;
    // A copy is what is kept and handed over: the lock belongs to the open file, not to the process.
    let kept = file.try_clone().map_err(failed(path, "copy the lock"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(locked) => {
            std::mem::forget(locked);
            Ok(kept.into())
        }
        Err((_, Errno::EWOULDBLOCK)) => Err(HolderError::AlreadyRuns { socket: path.to_path_buf() }),
        Err((_, errno)) => Err(system(path, "lock")(errno)),
    }
}

fn listen_on(path: &Path) -> Result<OwnedFd, HolderError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(path, "remove")(error)),
        _ => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(system(path, "socket"))?;
    let address = UnixAddr::new(path).map_err(system(path, "the path of a socket has at most 107 bytes"))?;
    bind(listener.as_raw_fd(), &address).map_err(system(path, "bind"))?;
    // Before listen: nobody connects to it with wider rights.
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, mode).map_err(failed(path, "chmod"))?;
    listen(&listener, Backlog::MAXCONN).map_err(system(path, "listen"))?;
    Ok(listener)
}

fn failed(path: &Path, step: &'static str) -> impl Fn(std::io::Error) -> HolderError {
    move |error| HolderError::System { socket: path.to_path_buf(), step, error }
}

fn log(path: &Path, text: &str) {
    eprintln!("tandem-holder {} ({}): {text}", nix::unistd::getpid(), path.display());
}

enum Next {
    Serve,
    End { handed_over: bool },
}

fn serve(mut server: Server, signals: &SignalFd) -> Result<(), HolderError> {
    loop {
        server.wait(signals).map_err(system(&server.path, "poll"))?;
        let next = match server.successor.take() {
            Some((successor, since)) => server.help(successor, since),
            None => server.turn(),
        };
        let wanted = std::iter::from_fn(|| signals.read_signal().ok().flatten()).count() > 0;
        match next {
            Next::End { handed_over } => {
                if !handed_over {
                    let _ = std::fs::remove_file(&server.path);
                }
                return Ok(());
            }
            Next::Serve if !wanted => {}
            Next::Serve if server.is_idle() => {
                let _ = std::fs::remove_file(&server.path);
                return Ok(());
            }
            Next::Serve => {
                let engine = if server.engine.is_some() { "an engine is connected" } else { "no engine is connected" };
                log(&server.path, &format!("stays: it holds {} entries and {engine}", server.entries.len()));
            }
        }
    }
}

impl Server {
    fn is_idle(&self) -> bool {
        self.entries.is_empty() && self.engine.is_none() && self.successor.is_none()
    }

    fn wait(&self, signals: &SignalFd) -> Result<(), Errno> {
        let mut ready = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let mut add = |fd| ready.push(PollFd::new(fd, PollFlags::POLLIN));
        let deadline = if let Some((successor, since)) = &self.successor {
            add(successor.as_fd());
            Some(*since + SUCCESSOR_LIMIT)
        } else {
            self.engine.iter().for_each(|engine| add(engine.as_fd()));
            self.strangers.iter().for_each(|(stranger, _)| add(stranger.as_fd()));
            if self.strangers.len() < MAX_STRANGERS {
                add(self.listener.as_fd());
            }
            let oldest = self.strangers.iter().map(|(_, since)| *since + STRANGER_LIMIT).min();
            let linger = self.is_idle().then_some(self.alone + LINGER);
            oldest.into_iter().chain(linger).min()
        };
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now()).as_millis() as u16;
        let timeout =
            deadline.map_or(PollTimeout::NONE, |deadline| PollTimeout::from(left(deadline).saturating_add(1)));
        match poll(&mut ready, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Everybody's turn, the engine first: it may have left, and the next one may be among the strangers.
    fn turn(&mut self) -> Next {
        if let Some(engine) = self.engine.take() {
            if self.hear_engine(engine.as_fd()) {
                self.engine = Some(engine);
            } else {
                self.alone = Instant::now();
            }
        }
        for (stranger, since) in std::mem::take(&mut self.strangers) {
            self.hear_stranger(stranger, since);
        }
        while self.strangers.len() < MAX_STRANGERS {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let Ok(fd) = accept4(self.listener.as_raw_fd(), flags) else { break };
            // SAFETY: accept4 just made it.
            self.strangers.push((unsafe { OwnedFd::from_raw_fd(fd) }, Instant::now()));
        }
        let over = self.is_idle() && self.strangers.is_empty() && self.alone.elapsed() >= LINGER;
        if over { Next::End { handed_over: false } } else { Next::Serve }
    }

    fn hear_stranger(&mut self, stranger: OwnedFd, since: Instant) {
        let end = stranger.as_fd();
        let pid = u64::from(std::process::id());
        match wire::receive(end) {
            Ok(Packet { kind: Kind::Engine, .. }) => match &self.engine {
                Some(engine) => drop(wire::send(end, Kind::Busy, peer(engine.as_fd()), &[], &[], &[])),
                None if wire::send(end, Kind::Ok, pid, &[], &[], &[]).is_ok() => self.engine = Some(stranger),
                None => {}
            },
            Ok(Packet { kind: Kind::Status, .. }) => {
                let fds: usize = self.entries.values().map(|kept| kept.fds.len()).sum();
                let engine = self.engine.as_ref().map_or(0, |engine| peer(engine.as_fd()));
                let numbers = [self.entries.len() as u64, fds as u64, engine].map(u64::to_le_bytes);
                let _ = wire::send(end, Kind::Ok, pid, &[], numbers.as_flattened(), &[]);
            }
            Ok(Packet { kind: Kind::Successor, .. }) if self.successor.is_none() => {
                if wire::send(end, Kind::Ok, pid, &[], &[], &[]).is_ok() {
                    self.successor = Some((stranger, Instant::now()));
                }
            }
            Ok(_) => drop(refuse(end, "the first packet must say who connects")),
            Err(ReceiveError::Empty) if since.elapsed() < STRANGER_LIMIT => self.strangers.push((stranger, since)),
            Err(ReceiveError::Empty | ReceiveError::Closed) => {}
            Err(ReceiveError::Version(_)) => {
                let _ = wire::send(end, Kind::Version, wire::VERSION.into(), &[], &[], &[]);
            }
            Err(error) => drop(refuse(end, &error.to_string())),
        }
    }

    /// Answers what the engine has sent; whether it is still there.
    fn hear_engine(&mut self, engine: BorrowedFd<'_>) -> bool {
        loop {
            let answered = match wire::receive(engine) {
                Ok(Packet { kind: Kind::Put, key, meta, fds, .. }) => match self.put(key, meta, fds) {
                    Ok(()) => wire::send(engine, Kind::Ok, 0, &[], &[], &[]),
                    Err(reason) => refuse(engine, &reason),
                },
                Ok(Packet { kind: Kind::Next, key, .. }) => self.next(engine, &key),
                Ok(Packet { kind: Kind::Remove, key, .. }) => {
                    self.entries.remove(&key);
                    wire::send(engine, Kind::Ok, 0, &[], &[], &[])
                }
                Ok(_) => refuse(engine, "an engine puts, lists and removes"),
                Err(ReceiveError::Empty) => return true,
                Err(ReceiveError::Closed) => return false,
                Err(error) => refuse(engine, &error.to_string()),
            };
            if let Err(errno) = answered {
                log(&self.path, &format!("the engine does not read its answers ({errno}); its connection is closed"));
                return false;
            }
        }
    }

    fn put(&mut self, key: Vec<u8>, meta: Vec<u8>, fds: Vec<OwnedFd>) -> Result<(), String> {
        if key.is_empty() || std::str::from_utf8(&key).is_err() {
            return Err("a key is text and not empty".to_owned());
        }
        let others = || self.entries.iter().filter(|(other, _)| **other != key).map(|(_, kept)| kept.fds.len() as u64);
        if others().count() >= MAX_ENTRIES {
            return Err(format!("it keeps {MAX_ENTRIES} entries and takes no more"));
        }
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        if others().sum::<u64>() + fds.len() as u64 + OWN_FDS > limit {
            return Err(format!(
                "its limit of {limit} open files is too low for one more device; raise the hard limit (ulimit -Hn, \
                 LimitNOFILE) and start a successor"
            ));
        }
        self.entries.insert(key, Kept { meta, fds });
        Ok(())
    }

    fn next(&self, end: BorrowedFd<'_>, after: &[u8]) -> Result<(), Errno> {
        let later = self.entries.range::<[u8], _>((Bound::Excluded(after), Bound::Unbounded)).next();
        let Some((key, kept)) = later else { return wire::send(end, Kind::End, 0, &[], &[], &[]) };
        let fds: Vec<_> = kept.fds.iter().map(AsFd::as_fd).collect();
        wire::send(end, Kind::Entry, 0, key, &kept.meta, &fds)
    }

    /// Answers the successor. Only its confirmation ends this holder; if it fails, everything goes on as before.
    fn help(&mut self, successor: OwnedFd, since: Instant) -> Next {
        let end = successor.as_fd();
        let answered = match wire::receive(end) {
            Ok(Packet { kind: Kind::Next, key, .. }) => self.next(end, &key),
            Ok(Packet { kind: Kind::TakeOver, .. }) => {
                let mut fds = vec![self.listener.as_fd(), self.lock.as_fd()];
                fds.extend(self.engine.iter().map(AsFd::as_fd));
                wire::send(end, Kind::Ok, 0, &[], &[], &fds)
            }
            Ok(Packet { kind: Kind::Confirm, .. }) => {
                // The answer may be lost: the successor takes a closed connection for a yes.
                let _ = wire::send(end, Kind::Ok, 0, &[], &[], &[]);
                log(&self.path, &format!("handed {} entries over to process {}", self.entries.len(), peer(end)));
                return Next::End { handed_over: true };
            }
            Err(ReceiveError::Empty) if since.elapsed() < SUCCESSOR_LIMIT => Ok(()),
            Err(ReceiveError::Empty) => {
                let _ = refuse(end, "the successor took too long");
                Err(Errno::ETIMEDOUT)
            }
            Err(ReceiveError::Closed) => Err(Errno::EPIPE),
            Ok(_) | Err(_) => {
                // Said, because a connection that is only closed means yes to a successor that has confirmed.
                let _ = refuse(end, "the successor sent what no successor sends");
                Err(Errno::EPROTO)
            }
        };
        match answered {
            Ok(()) => self.successor = Some((successor, since)),
            Err(errno) => log(&self.path, &format!("the successor failed ({errno}); this holder goes on")),
        }
        Next::Serve
    }
}

fn refuse(end: BorrowedFd<'_>, reason: &str) -> Result<(), Errno> {
    wire::send(end, Kind::Refused, 0, &[], reason.as_bytes(), &[])
}

/// The process at the other end.
fn peer(end: BorrowedFd<'_>) -> u64 {
    getsockopt(&end, sockopt::PeerCredentials).map_or(0, |peer| peer.pid() as u64)
}
