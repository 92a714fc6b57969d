//! Two helper threads for what takes long and blocks, and the mailbox through which they and the handles wake the engine.
//!
//! Invariants: a tree has a bounded number of jobs (its store sees to that), so the queue is bounded by the open trees; an
//! outcome is in the mailbox before the bell rings.

use super::tree::TreeKey;
use crate::replica::fatal::EndsProcess;
use crate::store::{Job, JobOutcome};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::AcqRel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A checkpoint and a checksum run side by side; more would only compete with the device's requests for the disk.
const THREADS: usize = 2;

/// Wakes the engine. Who rings while it rings already, makes no system call.
#[derive(Debug)]
pub(super) struct Bell {
    descriptor: EventFd,
    rings: AtomicBool,
}

impl Bell {
    pub fn new() -> io::Result<Self> {
        let descriptor = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { descriptor, rings: AtomicBool::new(false) })
    }
    pub fn ring(&self) {
        if !self.rings.swap(true, AcqRel) {
            let _ = self.descriptor.write(1); // fails only when it has been rung 2^64 times
        }
    }
    /// Whoever rings from here on wakes the engine again; what was there before it does now.
    pub fn quiet(&self) {
        let _ = self.descriptor.read(); // EAGAIN: it was quiet
        // After the read, which would swallow a ring in between; before the work is looked at.
        self.rings.swap(false, AcqRel);
    }
    pub fn descriptor(&self) -> &EventFd {
        &self.descriptor
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(TreeKey, Job)>,
    finished: Vec<(TreeKey, JobOutcome)>,
    stopping: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    bell: Arc<Bell>,
}

impl Shared {
    /// The queue is consistent at every unlock.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The helper threads.
pub(super) struct Jobs {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Jobs {
    pub fn new(bell: Arc<Bell>) -> io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), work: Condvar::new(), bell });
        let mut jobs = Self { shared, threads: vec![] };
        for _ in 0..THREADS {
            let shared = jobs.shared.clone();
            let thread = std::thread::Builder::new().name("tandem-job".into()).spawn(move || work(&shared))?;
            jobs.threads.push(thread);
        }
        Ok(jobs)
    }

    pub fn start(&self, tree: TreeKey, job: Job) {
        self.shared.lock().waiting.push_back((tree, job));
        self.shared.work.notify_one();
    }

    pub fn finished(&self) -> Vec<(TreeKey, JobOutcome)> {
        std::mem::take(&mut self.shared.lock().finished)
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic ends the process
        }
    }
}

fn work(shared: &Shared) {
    // The store would wait for the outcome for ever.
    let _fatal = EndsProcess("tandem-job");
    let mut queue = shared.lock();
    loop {
        if queue.stopping {
            return;
        }
        let Some((tree, job)) = queue.waiting.pop_front() else {
            queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(queue);
        let outcome = job.run();
        queue = shared.lock();
        queue.finished.push((tree, outcome));
        shared.bell.ring();
    }
}
