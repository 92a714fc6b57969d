//! The holder keeps descriptors so that everything else may die: a process with no logic, and the client to it.
//!
//! ```text
//!   engine ──put(key, meta, fds)──> holder          engine killed: its connection closes, the entries stay
//!   next engine ──list()──────────> holder          same entries, same open files
//!   next holder ──successor───────> holder ends     entries, listener, lock and the engine's connection move
//! ```
//! # Invariants
//! * One engine at a time; the next one may come when the first one's connection is closed.
//! * An answered put is held until it is removed or the holder dies; the holder never dies by itself while it holds.
//! * A handover moves the engine's connection too: the engine notices nothing. Until the successor confirms, the old holder
//!   can go on as before.
//! * If the holder is killed, the kernel ends every device request with an error unless the engine still has the
//!   descriptors; an engine that sees [`HolderError::Gone`] should start a new holder and put them again.

mod server;
mod wire;

pub use server::{MAX_ENTRIES, run, run_successor};
pub use wire::{MAX_FDS, MAX_KEY, MAX_META};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket, sockopt};
use nix::sys::time::TimeVal;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use wire::{Kind, Packet, ReceiveError};

/// How long an answer of the holder may take; it does nothing but keep.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long a new holder, or the end of a killed engine, is waited for: under emulation a process takes seconds to start.
const START_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// Why the holder did not do what it was asked for, or could not run.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// Another engine is connected.
    #[error("{}: the engine with process id {pid} is connected; two engines on one directory are one too many", socket.display())]
    Busy {
        /// The holder's socket.
        socket: PathBuf,
        /// The engine's process.
        pid: u64,
    },
    /// The holder closed the connection or does not answer.
    #[error("{}: the holder is gone", socket.display())]
    Gone {
        /// The holder's socket.
        socket: PathBuf,
    },
    /// The holder is of another version.
    #[error(
        "{}: the holder speaks version {found} of its protocol, this program version {}; hand over to a holder of this \
         program's version first",
        socket.display(), wire::VERSION
    )]
    Version {
        /// The holder's socket.
        socket: PathBuf,
        /// The other side's version.
        found: u64,
    },
    /// The holder said no.
    #[error("{}: the holder refused: {reason}", socket.display())]
    Refused {
        /// The holder's socket.
        socket: PathBuf,
        /// Its words.
        reason: String,
    },
    /// Another holder has this socket.
    #[error("{}: another holder runs there", socket.display())]
    AlreadyRuns {
        /// The holder's socket.
        socket: PathBuf,
    },
    /// A system call failed.
    #[error("{}: {step}: {error}", socket.display())]
    System {
        /// The holder's socket.
        socket: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Its error.
        error: std::io::Error,
    },
}

/// What the holder keeps under one key.
#[derive(Debug)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its description.
    pub meta: Vec<u8>,
    /// Copies of its descriptors, in the order in which they were put.
    pub fds: Vec<OwnedFd>,
}

/// What the holder says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its process.
    pub pid: u64,
    /// Entries it keeps.
    pub entries: u64,
    /// Descriptors it keeps.
    pub fds: u64,
    /// The connected engine's process.
    pub engine: Option<u64>,
}

/// The engine's connection to the holder.
#[derive(Debug)]
pub struct Holder {
    path: PathBuf,
    // One question at a time has its answer.
    socket: Mutex<OwnedFd>,
}

impl Holder {
    /// Connects as the engine. Busy while another one is connected.
    pub fn connect(path: &Path) -> Result<Self, HolderError> {
        let (socket, _) = hello(path, Kind::Engine)?;
        Ok(Self { path: path.to_path_buf(), socket: Mutex::new(socket) })
    }

    /// Connects as the engine; starts `exe holder --socket PATH`, detached from this process, when none runs. Its messages
    /// go to `holder.log` beside the socket. Waits for a killed engine to be gone.
    pub fn connect_or_spawn(path: &Path, exe: &Path) -> Result<Self, HolderError> {
        let mut command = Command::new(exe);
        command.arg("holder").arg("--socket").arg(path);
        Self::connect_or_spawn_command(path, command)
    }

    /// As [`Holder::connect_or_spawn`], with the command that starts the holder.
    pub fn connect_or_spawn_command(path: &Path, command: Command) -> Result<Self, HolderError> {
        let start = Instant::now();
        let mut command = Some(command);
        loop {
            let error = match Self::connect(path) {
                Ok(holder) => return Ok(holder),
                Err(error) => error,
            };
            match &error {
                HolderError::System { step: "connect", .. } => {
                    if let Some(command) = command.take() {
                        spawn(path, command)?;
                    }
                }
                HolderError::Busy { .. } | HolderError::Gone { .. } => {}
                _ => return Err(error),
            }
            if start.elapsed() > START_LIMIT {
                return Err(error);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Keeps `fds` under `key`; replaces what was there at once. When it returns, they outlive this process.
    pub fn put(&self, key: &str, meta: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), HolderError> {
        self.ask(Kind::Put, key, meta, fds).map(drop)
    }

    /// Everything that is kept, in the order of keys.
    pub fn list(&self) -> Result<Vec<Entry>, HolderError> {
        let mut entries: Vec<Entry> = vec![];
        loop {
            let after = entries.last().map_or("", |entry| entry.key.as_str());
            let packet = self.ask(Kind::Next, after, &[], &[])?;
            if packet.kind != Kind::Entry {
                return Ok(entries);
            }
            let key =
                String::from_utf8(packet.key).map_err(|_| refused(&self.path, "it keeps a key that is no text"))?;
            // A holder that repeats itself must not keep us here.
            if key.as_str() <= after || entries.len() >= MAX_ENTRIES {
                return Err(refused(&self.path, "its entries are out of order"));
            }
            entries.push(Entry { key, meta: packet.meta, fds: packet.fds });
        }
    }

    /// Forgets `key`; none is fine too.
    pub fn remove(&self, key: &str) -> Result<(), HolderError> {
        self.ask(Kind::Remove, key, &[], &[]).map(drop)
    }

    /// Asks the holder on this socket, without being its engine.
    pub fn status(path: &Path) -> Result<Status, HolderError> {
        let (_, packet) = hello(path, Kind::Status)?;
        let mut numbers = packet.meta.chunks_exact(8).map(|bytes| bytes.iter().rfold(0, |n, b| n << 8 | u64::from(*b)));
        let mut number = || numbers.next().unwrap_or_default();
        let (pid, entries, fds, engine) = (packet.number, number(), number(), number());
        Ok(Status { pid, entries, fds, engine: (engine != 0).then_some(engine) })
    }

    fn ask(&self, kind: Kind, key: &str, meta: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Packet, HolderError> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        ask(&self.path, socket.as_fd(), kind, (key.as_bytes(), meta), fds)
    }
}

fn refused(path: &Path, reason: &str) -> HolderError {
    HolderError::Refused { socket: path.to_path_buf(), reason: reason.to_owned() }
}

fn system(path: &Path, step: &'static str) -> impl Fn(Errno) -> HolderError {
    move |errno| HolderError::System { socket: path.to_path_buf(), step, error: errno.into() }
}

/// Connects and says who we are; the answer to that.
fn hello(path: &Path, role: Kind) -> Result<(OwnedFd, Packet), HolderError> {
    let end = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let end = end.map_err(system(path, "socket"))?;
    let limit = TimeVal::new(ANSWER_LIMIT.as_secs() as i64, 0);
    nix::sys::socket::setsockopt(&end, sockopt::ReceiveTimeout, &limit).map_err(system(path, "SO_RCVTIMEO"))?;
    nix::sys::socket::setsockopt(&end, sockopt::SendTimeout, &limit).map_err(system(path, "SO_SNDTIMEO"))?;
    let address = UnixAddr::new(path).map_err(system(path, "the path of a socket has at most 107 bytes"))?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&end), &address).map_err(system(path, "connect"))?;
    let packet = ask(path, end.as_fd(), role, (&[], &[]), &[])?;
    Ok((end, packet))
}

/// One question and its answer; what is no success is an error.
fn ask(
    path: &Path,
    end: BorrowedFd<'_>,
    kind: Kind,
    (key, meta): (&[u8], &[u8]),
    fds: &[BorrowedFd<'_>],
) -> Result<Packet, HolderError> {
    let gone = || HolderError::Gone { socket: path.to_path_buf() };
    match wire::send(end, kind, 0, key, meta, fds) {
        // A holder that said no before it read us has closed the connection; its words are still there.
        Ok(()) | Err(Errno::EPIPE | Errno::ECONNRESET) => {}
        Err(Errno::EAGAIN) => return Err(gone()),
        Err(errno) => return Err(system(path, "send")(errno)),
    }
    let packet = match wire::receive(end) {
        Ok(packet) => packet,
        Err(ReceiveError::Closed | ReceiveError::Empty) => return Err(gone()),
        Err(ReceiveError::Version(found)) => {
            return Err(HolderError::Version { socket: path.to_path_buf(), found: found.into() });
        }
        Err(ReceiveError::System(errno)) => return Err(system(path, "receive")(errno)),
        Err(error) => return Err(refused(path, &error.to_string())),
    };
    match packet.kind {
        Kind::Busy => Err(HolderError::Busy { socket: path.to_path_buf(), pid: packet.number }),
        Kind::Refused => Err(refused(path, &String::from_utf8_lossy(&packet.meta))),
        Kind::Version => Err(HolderError::Version { socket: path.to_path_buf(), found: packet.number }),
        _ => Ok(packet),
    }
}

/// Starts a process that has nothing in common with this one: own session, no parent, no terminal.
#[allow(unsafe_code, reason = "pre_exec")]
fn spawn(path: &Path, mut command: Command) -> Result<(), HolderError> {
    let failed = |step| move |error| HolderError::System { socket: path.to_path_buf(), step, error };
    let log = std::fs::File::options().create(true).append(true).open(path.with_file_name("holder.log"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log.map_err(failed("open holder.log"))?);
    let detach = || {
        nix::unistd::setsid()?;
        // SAFETY: between fork and exec, system calls only; the process in between ends at once.
        match unsafe { libc::fork() } {
            -1 => Err(std::io::Error::last_os_error()),
            0 => Ok(()),
            // SAFETY: ends this process without running what the parent registered.
            _ => unsafe { libc::_exit(0) },
        }
    };
    // SAFETY: `detach` makes system calls only.
    let mut between = unsafe { command.pre_exec(detach) }.spawn().map_err(failed("start the holder"))?;
    between.wait().map(drop).map_err(failed("start the holder"))
}
