//! One server per directory: a file lock that the kernel lets go of when its process dies, however it dies.

use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a predecessor that was just killed may take to be gone.
pub const DYING_SERVER: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(10);

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("another tandem (pid {pid}) serves {}: stop it first, or use another --dir", dir.display())]
    Held {
        /// What it wrote into the file.
        pid: String,
        /// The directory.
        dir: PathBuf,
    },
    /// The file cannot be used.
    #[error("cannot lock {}: {source}: --dir must be on a local filesystem that can be written", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// The lock; let go of when dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its lifetime")] Flock<File>);

impl Lock {
    /// Takes the lock, and writes this process's pid into the file for the next one that tries.
    pub fn take(path: &Path, patience: Duration) -> Result<Self, LockError> {
        let failed = |source| LockError::Io { path: path.into(), source };
        let deadline = Instant::now() + patience;
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(failed)?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(mut lock) => {
                    let pid = format!("{}\n", std::process::id());
                    lock.set_len(0).and_then(|()| lock.write_all(pid.as_bytes())).map_err(failed)?;
                    return Ok(Self(lock));
                }
                Err((_, errno)) if errno != nix::errno::Errno::EWOULDBLOCK => return Err(failed(errno.into())),
                Err((held, _)) if Instant::now() < deadline => file = held,
                Err(_) => return Err(Self::held(path)),
            }
            std::thread::sleep(RETRY);
        }
    }

    fn held(path: &Path) -> LockError {
        let pid = std::fs::read_to_string(path).unwrap_or_default().trim().to_string();
        LockError::Held { pid, dir: path.parent().unwrap_or(path).into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_server_is_told_the_pid_of_the_first() {
        let dir = tempfile::Builder::new().prefix("tandem-").tempdir().expect("a directory");
        let path = dir.path().join("tandem.lock");
        let first = Lock::take(&path, Duration::ZERO).expect("free");
        let error = Lock::take(&path, Duration::from_millis(20)).expect_err("held");
        assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
        drop(first);
        Lock::take(&path, Duration::ZERO).expect("free again");
    }
}
