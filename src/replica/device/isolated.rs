//! Runs system calls that may wait for our own FUSE file in a child process.
//!
//! A thread that waits for a FUSE answer cannot be killed once the request was read. Were it a thread of the engine, a
//! killed engine could not end, its descriptors would stay open and nothing could take over. The child has none of the
//! engine's descriptors, so the engine ends at once, and the child ends when the next engine answers.
//!
//! # Invariants
//! * The child shares the engine's memory and the calling thread waits for it, as with vfork(2): no page is copied, so
//!   direct I/O under way into private memory is not torn from it (a plain fork(2) does that on kernels before 6.3).
//! * The child keeps only the descriptors it is given, and dies with the thread that started it.
#![allow(unsafe_code, reason = "clone(2) with shared memory")]

use nix::errno::Errno;
use nix::sched::{CloneFlags, clone};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::wait::waitpid;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of the child's stack: the calls below it need a few KiB, formatting and paths a few more.
const STACK: usize = 256 << 10;

/// Runs `work` in a child that has `keep` and standard error open and nothing else. Blocks; not for the engine's thread.
///
/// `work` must not touch what another thread may hold locked for long, and must not panic.
pub fn isolated<T: Send>(keep: &[BorrowedFd<'_>], work: impl FnOnce() -> Result<T, Errno> + Send) -> Result<T, Errno> {
    let parent = nix::unistd::getpid();
    let mut kept: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).chain([2]).collect();
    kept.sort_unstable();
    let mut stack = vec![0u8; STACK];
    let mut outcome = Err(Errno::ECHILD);
    let mut work = Some(work);
    let child = || {
        // A parent that was killed before prctl took effect would leave a child that nobody waits for.
        let tied = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_ok() && nix::unistd::getppid() == parent;
        if let Some(work) = work.take().filter(|_| tied) {
            close_all_but(&kept);
            outcome = work();
        }
        0
    };
    // Handlers of the parent must not run in the child, in memory that both share.
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
    // SAFETY: with CLONE_VFORK this thread sleeps until the child is done with the shared memory, so the child is alone
    // with this thread's stack frame and thread-local storage; it has a stack and a descriptor table of its own.
    let pid = unsafe { clone(Box::new(child), &mut stack, flags, Some(Signal::SIGCHLD as i32)) };
    let restored = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    match waitpid(pid?, None) {
        // Somebody who ignores SIGCHLD made the kernel reap it; it is gone either way.
        Ok(_) | Err(Errno::ECHILD) => {}
        Err(errno) => return Err(errno),
    }
    restored?;
    outcome
}

/// Closes every descriptor of this process that is not in `kept` (ascending).
pub(super) fn close_all_but(kept: &[u32]) {
    let close = |first: u32, last: u32| {
        if first <= last {
            // SAFETY: descriptors of the child only; nobody in it uses them.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    };
    let mut first = 0;
    for &fd in kept {
        if let Some(last) = fd.checked_sub(1) {
            close(first, last);
        }
        first = fd + 1;
    }
    close(first, u32::MAX);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_child_has_only_what_it_is_given_and_returns_what_it_found() {
        let (kept, closed) = (std::fs::File::open("/dev/null"), std::fs::File::open("/dev/null"));
        let (kept, closed) = (kept.expect("/dev/null"), closed.expect("/dev/null"));
        let (first, second) = (kept.as_raw_fd(), closed.as_raw_fd());
        let me = nix::unistd::getpid();
        let seen = isolated(&[kept.as_fd()], || {
            // SAFETY: only asked whether it is open, in a process where nobody opens or closes.
            let open = |fd: i32| nix::sys::stat::fstat(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok();
            Ok((open(first), open(second), nix::unistd::getpid() == me))
        });
        assert_eq!(seen, Ok((true, false, false)));
        assert!(nix::sys::stat::fstat(&closed).is_ok(), "the parent's descriptors stay open");
        assert_eq!(isolated(&[], || Err::<(), _>(Errno::EBUSY)), Err(Errno::EBUSY));
    }
}
