//! Physical I/O and readiness through one io_uring.
//!
//! Invariants: all calls come from the thread that made the ring (SINGLE_ISSUER); a slot of `transfers` is used again only
//! after its completion; nothing is allocated per operation once `transfers` has grown to the number in flight.
#![allow(unsafe_code, reason = "io_uring submissions point to memory that the submitter lends until the completion")]

use super::{Event, Operation, Sleep, Transfer, WatchKey};
use io_uring::types::{Fd, FsyncFlags, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// Submissions per system call; more are submitted in several.
const ENTRIES: u32 = 256;
/// Operations after which the disk gets them at once: it works on half of a deep queue while the other half is read. Fewer
/// would ring the doorbell of a virtual disk more often, at some 10 us each.
const BATCH: usize = 16;
/// Room for completions; what does not fit waits in the kernel (NODROP).
const COMPLETIONS: u32 = 4 * ENTRIES;

const KIND_TRANSFER: u64 = 0;
const KIND_WATCH: u64 = 1;
const KIND_TIMER: u64 = 2;
const KIND_UPDATE: u64 = 3;
const KIND_NOTHING: u64 = 4;

fn user_data(kind: u64, index: u32) -> u64 {
    (kind << 32) | u64::from(index)
}

struct Watch {
    key: WatchKey,
    fd: RawFd,
}

pub(super) struct Uring {
    ring: IoUring,
    transfers: Vec<Option<Transfer>>,
    free: Vec<u32>,
    watches: Vec<Watch>,
    again: Vec<u32>,
    /// What the kernel had no room for again and again, and when it is asked next.
    later: Vec<(Instant, u32)>,
    rearm: Vec<WatchKey>,
    /// When the one timer in the kernel fires. It stays armed over many waits: one for each would cost more than all the
    /// rest of a wait.
    timer: Option<Instant>,
    /// Kernels before 5.11 cannot change a timer: there each earlier one is one more.
    updates: bool,
    /// The kernel reads it when the timer's entry is submitted.
    timer_length: Box<Timespec>,
    /// Kernels before 5.13 take a poll for one event only.
    multishot: bool,
}

impl Uring {
    pub fn new() -> io::Result<Self> {
        let ring = build()?;
        let parameters = ring.params();
        if !parameters.is_feature_nodrop() || !parameters.is_feature_ext_arg() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring of this kernel is too old"));
        }
        Ok(Self {
            ring,
            transfers: Vec::with_capacity(ENTRIES as usize),
            free: Vec::with_capacity(ENTRIES as usize),
            watches: vec![],
            again: vec![],
            later: vec![],
            rearm: vec![],
            timer: None,
            updates: true,
            timer_length: Box::default(),
            multishot: true,
        })
    }

    pub fn submit(&mut self, transfer: Transfer) {
        let index = match self.free.pop() {
            Some(index) => {
                self.transfers[index as usize] = Some(transfer);
                index
            }
            None => {
                self.transfers.push(Some(transfer));
                self.transfers.len() as u32 - 1
            }
        };
        self.push(entry(&transfer).user_data(user_data(KIND_TRANSFER, index)));
        if self.ring.submission().len() >= BATCH {
            // An error shows at the next wait.
            let _ = self.enter(0);
        }
    }

    pub fn watch(&mut self, key: WatchKey, fd: RawFd) {
        self.watches.push(Watch { key, fd });
        self.arm(key);
    }

    pub fn unwatch(&mut self, key: WatchKey) {
        self.watches.retain(|w| w.key != key);
        let poll = user_data(KIND_WATCH, key.0);
        self.push(opcode::PollRemove::new(poll).build().user_data(user_data(KIND_NOTHING, 0)));
        // The descriptor may be closed after this: the poll must have let go of it.
        let _ = self.enter(0);
    }

    pub fn wait(&mut self, sleep: Sleep, events: &mut Vec<Event>) -> io::Result<()> {
        let before = events.len();
        self.reap(events);
        let wanted = u32::from(sleep != Sleep::No && events.len() == before);
        match sleep {
            Sleep::AtMost(limit) if wanted > 0 => {
                self.arm_timer(limit);
                self.enter(1)?;
            }
            _ if wanted > 0 => self.enter(1)?,
            // Nothing to submit and nothing to run: no system call.
            _ if self.ring.submission().is_empty() && !self.ring.submission().taskrun() && !self.overflows() => {
                return Ok(());
            }
            _ => self.enter(0)?,
        }
        self.reap(events);
        Ok(())
    }

    /// Looks for completions without a system call unless the kernel says that there is work to run.
    pub fn peek(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        if self.ring.submission().taskrun() || !self.ring.submission().is_empty() {
            self.enter(0)?;
        }
        self.reap(events);
        Ok(())
    }

    /// Sees to it that the kernel ends a wait after `limit`, unless an armed timer does so earlier.
    fn arm_timer(&mut self, limit: Duration) {
        let due = Instant::now() + limit;
        if self.timer.is_some_and(|armed| armed <= due) {
            return;
        }
        let is_armed = self.timer.replace(due).is_some();
        *self.timer_length = Timespec::from(limit);
        let (length, timer) = (&raw const *self.timer_length, user_data(KIND_TIMER, 0));
        if is_armed && self.updates {
            // If it fires before this is submitted, its completion says so and the next wait arms another.
            let update = opcode::TimeoutUpdate::new(timer, length).build();
            self.push(update.user_data(user_data(KIND_UPDATE, 0)));
        } else {
            self.push(opcode::Timeout::new(length).build().user_data(timer));
        }
    }

    fn overflows(&mut self) -> bool {
        self.ring.submission().cq_overflow()
    }

    fn arm(&mut self, key: WatchKey) {
        let Some(watch) = self.watches.iter().find(|w| w.key == key) else { return };
        let poll = opcode::PollAdd::new(Fd(watch.fd), libc::POLLIN as u32).multi(self.multishot).build();
        self.push(poll.user_data(user_data(KIND_WATCH, key.0)));
    }

    fn push(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: the memory that the entry points to is lent until its completion (see the module of `Io`).
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: give the kernel what is there. An error shows at the next wait.
            let _ = self.enter(0);
        }
    }

    /// Asks again for what has waited long enough, and sees to it that the others' time comes.
    fn resume_later(&mut self) {
        let now = Instant::now();
        let due: Vec<u32> = self.later.extract_if(.., |(due, _)| *due <= now).map(|(_, index)| index).collect();
        for index in due {
            let transfer = self.transfers[index as usize].expect("still under way");
            self.push(entry(&transfer).user_data(user_data(KIND_TRANSFER, index)));
        }
        if let Some(next) = self.later.iter().map(|(due, _)| *due).min() {
            self.arm_timer(next.saturating_duration_since(now));
        }
    }

    fn enter(&mut self, wanted: u32) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        let length = self.ring.submission().len() as u32;
        // SAFETY: no argument is passed; the counts are within the queue.
        match unsafe { self.ring.submitter().enter::<libc::sigset_t>(length, wanted, GETEVENTS, None) } {
            Ok(_) => Ok(()),
            Err(e) if is_transient(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        let Self { ring, transfers, free, again, rearm, multishot, timer, updates, .. } = self;
        for completion in ring.completion() {
            let (kind, index) = (completion.user_data() >> 32, completion.user_data() as u32);
            match kind {
                KIND_TRANSFER => {
                    let slot = &mut transfers[index as usize];
                    let transfer = slot.as_mut().expect("a completion belongs to a transfer");
                    let result = u32::try_from(completion.result()).map_err(|_| -completion.result());
                    match transfer.advance(result) {
                        Some(result) => {
                            events.push(Event::Done { token: transfer.token, result });
                            *slot = None;
                            free.push(index);
                        }
                        None => again.push(index),
                    }
                }
                KIND_WATCH => {
                    let key = WatchKey(index);
                    if completion.result() == -libc::EINVAL && *multishot {
                        *multishot = false;
                    } else if completion.result() != -libc::ECANCELED {
                        events.push(Event::Ready(key));
                    }
                    if !cqueue::more(completion.flags()) {
                        rearm.push(key);
                    }
                }
                KIND_TIMER => *timer = None,
                KIND_UPDATE if completion.result() == -libc::EINVAL => (*updates, *timer) = (false, None),
                _ => {}
            }
        }
        while let Some(index) = self.again.pop() {
            let transfer = self.transfers[index as usize].expect("still under way");
            match transfer.pause() {
                Some(pause) => self.later.push((Instant::now() + pause, index)),
                None => self.push(entry(&transfer).user_data(user_data(KIND_TRANSFER, index))),
            }
        }
        if !self.later.is_empty() {
            self.resume_later();
        }
        while let Some(key) = self.rearm.pop() {
            self.arm(key); // unless it was unwatched
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let mut events = vec![];
        while self.transfers.iter().any(Option::is_some) {
            if self.wait(Sleep::Long, &mut events).is_err() {
                // The kernel may still write to memory that is about to be given back.
                std::process::abort();
            }
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME))
}

/// The best ring that this kernel has: completions run when the owner asks (6.1), at its next system call (5.19), or by
/// interrupting it.
fn build() -> io::Result<IoUring> {
    let mut builder = IoUring::<squeue::Entry, cqueue::Entry>::builder();
    builder.dontfork().setup_cqsize(COMPLETIONS);
    let mut coop = builder.clone();
    coop.setup_coop_taskrun().setup_taskrun_flag();
    let mut defer = builder.clone();
    defer.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    defer.build(ENTRIES).or_else(|_| coop.build(ENTRIES)).or_else(|_| builder.build(ENTRIES))
}

fn entry(transfer: &Transfer) -> squeue::Entry {
    let fd = Fd(transfer.fd);
    match transfer.remaining() {
        Operation::Read { memory, length, offset } => opcode::Read::new(fd, memory, length).offset(offset).build(),
        Operation::Write { memory, length, offset } => opcode::Write::new(fd, memory, length).offset(offset).build(),
        Operation::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Operation::Punch { offset, length } => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            opcode::Fallocate::new(fd, length).offset(offset).mode(mode).build()
        }
    }
}
