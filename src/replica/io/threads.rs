//! Physical I/O by a few threads that block, and readiness through epoll: where io_uring is off.
//!
//! Invariants: an operation is in the queue, with one thread, or in `finished`; dropping the pool executes the queue and
//! joins the threads, so no operation outlives it.
#![allow(unsafe_code, reason = "pread, pwrite, fallocate on raw descriptors into lent memory")]

use super::{Event, Operation, Sleep, Transfer, WatchKey};
use crate::replica::fatal::EndsProcess;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Enough to keep an NVMe disk busy through blocking calls; more only switch contexts.
const THREADS: usize = 8;
/// Descriptors told per call; the others at the next.
const EVENTS: usize = 64;
const FINISHED: u64 = u64::MAX;

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Transfer>,
    finished: Vec<Event>,
    stopping: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    wake: EventFd,
}

impl Shared {
    /// The queue is consistent at every unlock, also of a thread that panicked.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Threads {
    shared: Arc<Shared>,
    epoll: Epoll,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, FINISHED))?;
        let shared = Arc::new(Shared { queue: Mutex::default(), work: Condvar::new(), wake });
        let mut threads = Self { shared, epoll, threads: vec![] };
        for number in 0..THREADS {
            let shared = threads.shared.clone();
            let thread =
                std::thread::Builder::new().name(format!("tandem-io-{number}")).spawn(move || work(&shared))?;
            threads.threads.push(thread);
        }
        Ok(threads)
    }

    pub fn submit(&mut self, transfer: Transfer) {
        self.shared.lock().waiting.push_back(transfer);
        self.shared.work.notify_one();
    }

    pub fn watch(&mut self, key: WatchKey, fd: RawFd) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, u64::from(key.0));
        // SAFETY: the caller keeps the descriptor open until `unwatch`.
        Ok(self.epoll.add(unsafe { BorrowedFd::borrow_raw(fd) }, event)?)
    }

    pub fn unwatch(&mut self, fd: RawFd) {
        // SAFETY: as in `watch`. An error means that it is not watched.
        let _ = self.epoll.delete(unsafe { BorrowedFd::borrow_raw(fd) });
    }

    pub fn wait(&mut self, sleep: Sleep, events: &mut Vec<Event>) -> io::Result<()> {
        let timeout = match sleep {
            Sleep::No => EpollTimeout::ZERO,
            // Rounded up: waking before the time would only mean to wait again.
            Sleep::AtMost(limit) => EpollTimeout::try_from(limit.as_millis() + 1).unwrap_or(EpollTimeout::MAX),
            Sleep::Long => EpollTimeout::NONE,
        };
        let mut ready = [EpollEvent::empty(); EVENTS];
        let count = match self.epoll.wait(&mut ready, timeout) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for event in &ready[..count] {
            if event.data() == FINISHED {
                let _ = self.shared.wake.read(); // EAGAIN: somebody was faster, nothing is lost
                events.append(&mut self.shared.lock().finished);
            } else {
                events.push(Event::Ready(WatchKey(event.data() as u32)));
            }
        }
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic ends the process
        }
    }
}

fn work(shared: &Shared) {
    // Whoever submitted what it works on would wait for ever.
    let _fatal = EndsProcess("tandem-io");
    let mut queue = shared.lock();
    loop {
        let Some(mut transfer) = queue.waiting.pop_front() else {
            if queue.stopping {
                return;
            }
            queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(queue);
        let result = loop {
            let attempt = execute(&transfer);
            if let Some(result) = transfer.advance(attempt) {
                break result;
            }
            if let Some(pause) = transfer.pause() {
                std::thread::sleep(pause);
            }
        };
        queue = shared.lock();
        queue.finished.push(Event::Done { token: transfer.token, result });
        if queue.finished.len() == 1 {
            let _ = shared.wake.write(1); // can only fail when it is signalled already
        }
    }
}

fn execute(transfer: &Transfer) -> Result<u32, i32> {
    let fd = transfer.fd;
    // SAFETY: the descriptor and the memory are lent until the completion is handed out.
    let result = unsafe {
        match transfer.remaining() {
            Operation::Read { memory, length, offset } => {
                libc::pread(fd, memory.cast(), length as usize, offset as libc::off_t)
            }
            Operation::Write { memory, length, offset } => {
                libc::pwrite(fd, memory.cast(), length as usize, offset as libc::off_t)
            }
            Operation::Sync => libc::fdatasync(fd) as isize,
            Operation::Punch { offset, length } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                libc::fallocate(fd, mode, offset as libc::off_t, length as libc::off_t) as isize
            }
        }
    };
    u32::try_from(result).map_err(|_| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}
