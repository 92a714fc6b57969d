//! Deleting copies without blocking anything: a rename, then small steps in a thread of its own.
//!
//! # Invariants
//! * A copy is gone from the pool's names in one atomic step; emptying the trash may stop and start again at any point.
//! * A pool's trash is emptied by one thread at a time; what comes meanwhile is not forgotten.

use super::{Pool, sync_directory};
use crate::crash::crash_point;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Bytes given back per step: one transaction of the filesystem that stalls nobody (~10 ms on ext4).
const STEP_BYTES: u64 = 256 << 20;
/// Pause between steps, so that deleting 1 TiB never takes more than a part of the disk's time.
const PAUSE: Duration = Duration::from_millis(20);

/// Moves a directory of the pool to its trash, durably.
pub fn discard(pool: &Pool, path: &Path) -> io::Result<()> {
    let target = pool.path.join("trash").join(uuid::Uuid::new_v4().to_string());
    crash_point("trash.rename");
    match fs::rename(path, target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    crash_point("trash.renamed");
    sync_directory(&pool.path.join("trees"))?;
    sync_directory(&pool.path.join("trash"))
}

/// Whether somebody empties a pool's trash.
#[derive(Debug, Default)]
pub struct Emptying(Mutex<State>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Idle,
    Running,
    /// And something may have come that the thread has not seen.
    Again,
}

impl Emptying {
    /// As [`empty`], unless another thread does it: then that one looks once more. Blocking.
    pub fn empty(&self, trash: &Path) -> io::Result<()> {
        if self.change(|state| if state == State::Idle { State::Running } else { State::Again }) != State::Idle {
            return Ok(());
        }
        loop {
            let emptied = empty(trash);
            if self.change(|state| if state == State::Again { State::Running } else { State::Idle }) == State::Running {
                return emptied;
            }
        }
    }

    /// What it was before.
    fn change(&self, next: impl Fn(State) -> State) -> State {
        // One word is whole between any two calls, so a poisoned lock is still usable.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *state;
        *state = next(before);
        before
    }
}

/// Gives the space of everything in `trash` back; what cannot be removed keeps nothing else. The first error. Blocking; run it
/// on a helper thread.
pub fn empty(trash: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for entry in fs::read_dir(trash)? {
        let emptied = entry.and_then(|entry| {
            shrink_files(&entry.path())?;
            crash_point("trash.remove");
            remove(&entry.path())
        });
        // Whoever was here before has removed it.
        result = result.and(emptied.or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        }));
    }
    result
}

fn shrink_files(path: &Path) -> io::Result<()> {
    if !path.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.metadata()?.len() > STEP_BYTES {
            shrink(&entry.path())?;
        }
    }
    Ok(())
}

/// Truncates from the end, a step at a time.
fn shrink(path: &PathBuf) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let mut length = file.metadata()?.len();
    while length > 0 {
        length = length.saturating_sub(STEP_BYTES);
        file.set_len(length)?;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}
