//! A process that belongs to the parent: dies with it, and is started again when it dies alone.
#![allow(unsafe_code, reason = "the parent-death signal is set between fork and exec")]

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::process::{Child as Process, Command};

/// Wait before the first restart after a failure; doubled with each that follows.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait: a device stands still meanwhile.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A process that lived this long was well: its next failure is the first again.
const WELL: Duration = Duration::from_secs(10);

/// Why there is no such process.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It could not be started.
    #[error("cannot start the {role} process: {source}")]
    Spawn {
        /// replica or csi.
        role: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It ended by itself before the server was ready; it has said why.
    #[error("the {role} process ended ({status}): its last line above says why")]
    Early {
        /// replica or csi.
        role: &'static str,
        /// How it ended.
        status: String,
    },
}

/// A process and how to start it again.
pub struct Child {
    role: &'static str,
    arguments: Vec<OsString>,
    process: Process,
    started: Instant,
    failures: u32,
}

impl Child {
    /// Starts it. Must be called on the thread that lives as long as the program: the kernel sends the death signal
    /// when the thread dies that started the process.
    pub fn start(role: &'static str, arguments: Vec<OsString>) -> Result<Self, ChildError> {
        let process = spawn(&arguments).map_err(|source| ChildError::Spawn { role, source })?;
        Ok(Self { role, arguments, process, started: Instant::now(), failures: 0 })
    }

    /// Waits until it ends by itself, which before the server is ready is the end of the server: it has said why it cannot
    /// serve. Killed by a signal it has said nothing, devices may be waiting for it, and it is started again.
    pub async fn died_early(&mut self) -> ChildError {
        loop {
            let status = self.process.wait().await;
            if status.as_ref().is_ok_and(|status| status.signal().is_some()) {
                self.revive(status).await;
                continue;
            }
            let status = status.map_or_else(|e| e.to_string(), |status| status.to_string());
            return ChildError::Early { role: self.role, status };
        }
    }

    /// Starts it again whenever it dies; never returns.
    pub async fn keep_alive(&mut self) {
        loop {
            let status = self.process.wait().await;
            self.revive(status).await;
        }
    }

    async fn revive(&mut self, status: io::Result<ExitStatus>) {
        let wait = self.next_wait(status.as_ref().ok(), self.started.elapsed());
        let how = status.map_or_else(|e| e.to_string(), |status| status.to_string());
        tracing::warn!("the {} process died ({how}) and is started again in {} ms", self.role, wait.as_millis());
        tokio::time::sleep(wait).await;
        while let Err(error) = self.restart() {
            let wait = self.next_wait(None, Duration::ZERO);
            tracing::error!("cannot start the {} process, next try in {} ms: {error}", self.role, wait.as_millis());
            tokio::time::sleep(wait).await;
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.process = spawn(&self.arguments)?;
        self.started = Instant::now();
        Ok(())
    }

    /// Somebody who kills a process wants it back at once; one that fails by itself will fail again.
    fn next_wait(&mut self, status: Option<&ExitStatus>, lived: Duration) -> Duration {
        if status.is_some_and(|status| status.signal() == Some(nix::libc::SIGKILL)) {
            self.failures = 0;
            return Duration::ZERO;
        }
        if lived > WELL {
            self.failures = 0;
        }
        let wait = FIRST_WAIT.saturating_mul(1 << self.failures.min(16)).min(LONGEST_WAIT);
        self.failures += 1;
        wait
    }

    /// Asks it to end, and ends it when it does not.
    pub async fn stop(mut self, patience: Duration) {
        let Some(pid) = self.process.id().and_then(|pid| i32::try_from(pid).ok()) else { return };
        // The process has not been waited for, so the pid is still its own.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        if tokio::time::timeout(patience, self.process.wait()).await.is_err() {
            tracing::warn!("the {} process does not end within {} s and is killed", self.role, patience.as_secs());
            if let Err(error) = self.process.kill().await {
                tracing::warn!("cannot kill the {} process: {error}", self.role);
            }
        }
    }
}

/// This program, for another process of it. An upgrade that replaced the file is what runs next; if the file is gone,
/// the one that is running.
pub fn program() -> PathBuf {
    let path = std::env::current_exe().unwrap_or_default();
    let replaced = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map(PathBuf::from);
    let exists = [Some(path), replaced].into_iter().flatten().find(|path| path.exists());
    exists.unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

fn spawn(arguments: &[OsString]) -> io::Result<Process> {
    let mut command = Command::new(program());
    // A group of its own: Ctrl-C is for the parent, which ends its children in order.
    command.args(arguments).stdin(Stdio::null()).process_group(0);
    let parent = nix::unistd::getpid();
    let die_with_parent = move || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        // The parent may have died before the signal was set: then nobody would send it.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::ESRCH)) }
    };
    // SAFETY: between fork and exec it only makes two system calls and allocates nothing.
    unsafe { command.pre_exec(die_with_parent) };
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn child() -> Child {
        // Any process will do: only the bookkeeping is looked at. `--list` ends a test binary at once.
        Child::start("test", vec!["--list".into()]).expect("a process")
    }

    #[tokio::test]
    async fn a_killed_process_comes_back_at_once_and_a_failing_one_later_each_time() {
        let mut child = child();
        let (killed, failed) = (ExitStatus::from_raw(9), ExitStatus::from_raw(256));
        let (short, long) = (Duration::ZERO, WELL * 2);
        assert_eq!(child.next_wait(Some(&killed), long), Duration::ZERO);
        let waits: Vec<u128> = (0..9).map(|_| child.next_wait(Some(&failed), short).as_millis()).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(child.next_wait(Some(&failed), long).as_millis(), 50);
        assert_eq!(child.next_wait(None, short).as_millis(), 100);
        assert_eq!(child.next_wait(Some(&killed), short), Duration::ZERO);
        assert_eq!(child.next_wait(Some(&failed), short).as_millis(), 50);
    }
}
