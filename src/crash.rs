//! Places where a process may die on purpose: before and after everything that outlives it.
//!
//! Invariants: nothing of it is in a release build. In a debug build it does nothing unless `TANDEM_CRASH_DIR` names a
//! directory. There `hits` gets a line for every point that is passed, and `armed` says where to die, once: only the
//! process that removes the file does.

/// A point between two durable steps; names are `part.step`.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub const fn crash_point(_name: &str) {}

/// A point between two durable steps; names are `part.step`.
#[cfg(debug_assertions)]
pub fn crash_point(name: &str) {
    armed::passed(name);
}

#[cfg(debug_assertions)]
mod armed {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::{Pid, getpid, getppid};
    use std::fs::{self, File};
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::sync::{Mutex, OnceLock, PoisonError};
    use std::time::Duration;

    /// How long the process waits for the effects of another one's death before it goes on.
    const AFTERMATH: Duration = Duration::from_millis(150);

    /// Counts of one process must not mix.
    static PASSING: Mutex<()> = Mutex::new(());

    fn directory() -> Option<&'static Path> {
        static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
        DIRECTORY.get_or_init(|| std::env::var_os("TANDEM_CRASH_DIR").map(PathBuf::from)).as_deref()
    }

    pub fn passed(name: &str) {
        let Some(directory) = directory() else { return };
        let _one = PASSING.lock().unwrap_or_else(PoisonError::into_inner);
        // A test without its directory is over.
        if let Ok(mut hits) = File::options().append(true).open(directory.join("hits")) {
            let _ = hits.write_all(format!("{name}\n").as_bytes());
        }
        let file = directory.join("armed");
        let Ok(text) = fs::read_to_string(&file) else { return };
        // `name passes victim`: the victim is `self`, `parent`, a pid, or the path of a file that has one.
        let mut words = text.split_whitespace();
        let (Some(wanted), Some(passes), Some(victim)) = (words.next(), words.next(), words.next()) else { return };
        if wanted != name {
            return;
        }
        match passes.parse::<u32>() {
            Ok(0 | 1) if fs::remove_file(&file).is_ok() => die(victim),
            Ok(more) if more > 1 => drop(fs::write(&file, format!("{name} {} {victim}", more - 1))),
            _ => {}
        }
    }

    fn die(victim: &str) {
        match victim {
            "self" => end(getpid()),
            "parent" => {
                end(getppid());
                // The parent's death is this process's own; until it comes, nothing more is done.
                std::thread::sleep(AFTERMATH);
                end(getpid());
            }
            pid => {
                let text = if pid.contains('/') { fs::read_to_string(pid).unwrap_or_default() } else { pid.to_owned() };
                if let Ok(pid) = text.trim().parse() {
                    end(Pid::from_raw(pid));
                }
                std::thread::sleep(AFTERMATH);
            }
        }
    }

    fn end(pid: Pid) {
        let _ = kill(pid, Signal::SIGKILL);
    }
}
