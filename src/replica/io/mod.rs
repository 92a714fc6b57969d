//! The one place where the engine waits: physical I/O of all volumes and readiness of all descriptors.
//!
//! ```text
//!   submit(token, fd, operation) ──> io_uring  ─┐
//!                                    or threads ├──> wait() ──> [Done { token, result } | Ready(key)]
//!   watch(key, fd) ────────────────> poll/epoll ┘
//! ```
//! # Invariants
//! * The memory of an operation is valid and left alone until its `Done`; dropping [`Io`] waits for all of them.
//! * A read past the end of the file gives zeros; a short write goes on or fails, it is never a success.
//! * Readiness is told once per change: whoever is told reads until there is nothing more.
#![allow(unsafe_code, reason = "zeroes the rest of a short read in memory that the caller lent")]

mod threads;
mod uring;

#[cfg(test)]
mod tests;

use crate::protocol::DiskError;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Names an operation to its submitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u64);

/// Names a watched descriptor; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WatchKey(pub u32);

/// A physical operation on an O_DIRECT descriptor.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// `length` bytes at `offset` into `memory`.
    Read {
        /// Aligned to 4096.
        memory: *mut u8,
        /// Bytes.
        length: u32,
        /// Bytes from the start of the file.
        offset: u64,
    },
    /// `length` bytes of `memory` at `offset`.
    Write {
        /// Aligned to 4096.
        memory: *const u8,
        /// Bytes.
        length: u32,
        /// Bytes from the start of the file.
        offset: u64,
    },
    /// fdatasync.
    Sync,
    /// Punch a hole, keep the size.
    Punch {
        /// Bytes from the start of the file.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// What [`Io::wait`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The descriptor became readable or broke.
    Ready(WatchKey),
    /// The operation is over.
    Done {
        /// Which.
        token: Token,
        /// How.
        result: Result<(), DiskError>,
    },
}

/// Which way to do I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// io_uring where the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// pread and pwrite on a few threads.
    Threads,
}

/// How long [`Io::wait`] may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// Not at all: submit and look.
    No,
    /// Until something happens or this much time has passed.
    AtMost(Duration),
    /// Until something happens.
    Long,
}

#[allow(clippy::large_enum_variant, reason = "one per process, and never moved")]
enum Backend {
    Uring(Box<uring::Uring>),
    Threads(threads::Threads),
}

/// See the module. Belongs to the thread that made it.
pub struct Io {
    backend: Backend,
    spin: Option<Spin>,
    sleeps: u64,
    waits: u64,
}

impl Io {
    /// Starts the chosen backend. `spin`: how long to look for events before sleeping, while they come that fast.
    ///
    /// # Errors
    /// The kernel refuses io_uring and it was asked for by name, or threads or descriptors cannot be had.
    pub fn new(choice: Choice, spin: Option<Duration>) -> io::Result<Self> {
        let backend = match choice {
            Choice::Uring => Backend::Uring(Box::new(uring::Uring::new()?)),
            Choice::Threads => Backend::Threads(threads::Threads::new()?),
            Choice::Auto => match uring::Uring::new() {
                Ok(ring) => Backend::Uring(Box::new(ring)),
                Err(error) => {
                    tracing::info!("the kernel refuses io_uring ({error}): disks are read and written by threads");
                    Backend::Threads(threads::Threads::new()?)
                }
            },
        };
        Ok(Self { backend, spin: spin.map(Spin::new), sleeps: 0, waits: 0 })
    }

    /// The backend in words, for status.
    pub fn name(&self) -> &'static str {
        match self.backend {
            Backend::Uring(_) => "io_uring",
            Backend::Threads(_) => "threads",
        }
    }

    /// Times that the thread waited and, of these, was ready to sleep.
    pub fn counters(&self) -> (u64, u64) {
        (self.waits, self.sleeps)
    }

    /// Starts an operation, at the latest at the next [`Self::wait`].
    pub fn submit(&mut self, token: Token, fd: RawFd, operation: Operation) {
        let transfer = Transfer { token, fd, operation, done: 0, retries: 0 };
        match &mut self.backend {
            Backend::Uring(ring) => ring.submit(transfer),
            Backend::Threads(threads) => threads.submit(transfer),
        }
    }

    /// Tells from now on when `fd` becomes readable.
    ///
    /// # Errors
    /// The kernel refuses to watch it.
    pub fn watch(&mut self, key: WatchKey, fd: RawFd) -> io::Result<()> {
        match &mut self.backend {
            Backend::Uring(ring) => {
                ring.watch(key, fd);
                Ok(())
            }
            Backend::Threads(threads) => threads.watch(key, fd),
        }
    }

    /// Stops watching, before the descriptor is closed.
    pub fn unwatch(&mut self, key: WatchKey, fd: RawFd) {
        match &mut self.backend {
            Backend::Uring(ring) => ring.unwatch(key),
            Backend::Threads(threads) => threads.unwatch(fd),
        }
    }

    /// Submits, waits as allowed, and appends what happened to `events`.
    ///
    /// # Errors
    /// The kernel refuses to wait: the engine cannot go on.
    pub fn wait(&mut self, sleep: Sleep, events: &mut Vec<Event>) -> io::Result<()> {
        self.waits += 1;
        let Some(mut spin) = self.spin.filter(|_| sleep != Sleep::No) else {
            // One system call submits and waits.
            self.sleeps += u64::from(sleep != Sleep::No);
            return self.look(sleep, events);
        };
        let (before, began) = (events.len(), Instant::now());
        self.look(Sleep::No, events)?;
        if spin.is_worth_it() {
            while events.len() == before && began.elapsed() < spin.limit {
                std::hint::spin_loop();
                self.peek(events)?;
            }
        }
        if events.len() == before {
            self.sleeps += 1;
            self.look(sleep, events)?;
        }
        spin.note(began.elapsed(), events.len() - before);
        self.spin = Some(spin);
        Ok(())
    }

    fn look(&mut self, sleep: Sleep, events: &mut Vec<Event>) -> io::Result<()> {
        match &mut self.backend {
            Backend::Uring(ring) => ring.wait(sleep, events),
            Backend::Threads(threads) => threads.wait(sleep, events),
        }
    }

    fn peek(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        match &mut self.backend {
            Backend::Uring(ring) => ring.peek(events),
            Backend::Threads(threads) => threads.wait(Sleep::No, events),
        }
    }
}

/// Spins only while the recent gaps between events were shorter than the limit, so an idle engine sleeps at once, and only
/// while events come one by one: in a deep queue a wake-up is shared by many, and others need the CPU.
#[derive(Clone, Copy, Debug)]
struct Spin {
    limit: Duration,
    average_gap: Duration,
    last_events: usize,
}

/// A request at depth one makes one event at a time; two at once are two of them.
const SPIN_EVENTS: usize = 2;

impl Spin {
    fn new(limit: Duration) -> Self {
        Self { limit, average_gap: 4 * limit, last_events: 0 }
    }
    fn is_worth_it(&self) -> bool {
        self.average_gap < self.limit && self.last_events <= SPIN_EVENTS
    }
    /// A moving average over 8 gaps; one long pause counts as four limits, or a burst would never be recognised again.
    fn note(&mut self, gap: Duration, events: usize) {
        self.last_events = events;
        self.average_gap = (self.average_gap * 7 + gap.min(4 * self.limit)) / 8;
    }
}

/// Attempts of one operation that made no progress (EINTR, EAGAIN) before the next one waits a little.
const QUICK_RETRIES: u8 = 16;

/// How long it waits: the kernel is short of something, and asking all the time makes that no better. The disk has not failed, so
/// this never becomes an error; while it lasts the request counts as stalled.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// An operation under way, possibly in several attempts.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    token: Token,
    fd: RawFd,
    operation: Operation,
    done: u32,
    retries: u8,
}

// SAFETY: the memory is lent by the submitter until `Done`, whichever thread executes the operation.
unsafe impl Send for Transfer {}

impl Transfer {
    /// How long the next attempt waits.
    fn pause(&self) -> Option<Duration> {
        (self.retries > QUICK_RETRIES).then_some(RETRY_PAUSE)
    }

    /// What is left to do.
    fn remaining(&self) -> Operation {
        let done = self.done;
        match self.operation {
            Operation::Read { memory, length, offset } => Operation::Read {
                memory: memory.wrapping_add(done as usize),
                length: length - done,
                offset: offset + u64::from(done),
            },
            Operation::Write { memory, length, offset } => Operation::Write {
                memory: memory.wrapping_add(done as usize),
                length: length - done,
                offset: offset + u64::from(done),
            },
            Operation::Sync | Operation::Punch { .. } => self.operation,
        }
    }

    /// Takes the result of one attempt (bytes or errno). `Some` when the operation is over, `None` to try on.
    fn advance(&mut self, result: Result<u32, i32>) -> Option<Result<(), DiskError>> {
        let moved = match result {
            Err(libc::EINTR | libc::EAGAIN) => {
                self.retries = self.retries.saturating_add(1);
                return None;
            }
            Err(errno) => return Some(Err(self.failed(errno))),
            Ok(moved) => moved,
        };
        self.retries = 0;
        match self.operation {
            Operation::Sync | Operation::Punch { .. } => Some(Ok(())),
            Operation::Write { length, .. } => {
                self.done += moved;
                match moved {
                    _ if self.done >= length => Some(Ok(())),
                    0 => Some(Err(self.failed(libc::EIO))),
                    _ => None,
                }
            }
            Operation::Read { memory, length, .. } => {
                self.done += moved;
                // Direct I/O stops inside a block only at the end of the file.
                let at_end = moved == 0 || !moved.is_multiple_of(crate::volume::BLOCK_SIZE as u32);
                if self.done < length && at_end {
                    let rest = (length - self.done) as usize;
                    // SAFETY: `memory` has `length` bytes, `done` of which are filled.
                    unsafe { std::ptr::write_bytes(memory.add(self.done as usize), 0, rest) };
                    self.done = length;
                }
                (self.done >= length).then_some(Ok(()))
            }
        }
    }

    fn failed(&self, errno: i32) -> DiskError {
        if errno == libc::ENOSPC || errno == libc::EDQUOT {
            return DiskError::NoSpace;
        }
        // A dying disk fails every request: tell the 1st, 2nd, 4th, 8th ... of them.
        static FAILURES: AtomicU64 = AtomicU64::new(0);
        let count = FAILURES.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            let (what, error) = (self.operation, io::Error::from_raw_os_error(errno));
            tracing::error!(count, "a disk failed: {what:?} on descriptor {}: {error}", self.fd);
        }
        DiskError::Failed
    }
}
