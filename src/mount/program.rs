//! Runs the programs of e2fsprogs, xfsprogs and util-linux.
//!
//! Invariants: a program is never killed half way (an interrupted resize is worse than a late one): should this process die, the
//! child finishes alone and the kernel's exclusive open of the device keeps a second one off it; no shell is involved.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::process::{Command, Stdio};

/// Characters of a program's output that an error repeats: the end of it, where the reason is.
const MAX_OUTPUT: usize = 600;

/// A program and the Debian package that brings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// File name.
    pub name: &'static str,
    /// Debian package.
    pub package: &'static str,
}

/// Makes an ext4.
pub const MKFS_EXT4: Program = Program { name: "mkfs.ext4", package: "e2fsprogs" };
/// Checks an ext4.
pub const E2FSCK: Program = Program { name: "e2fsck", package: "e2fsprogs" };
/// Grows an ext4 that is not mounted.
pub const RESIZE2FS: Program = Program { name: "resize2fs", package: "e2fsprogs" };
/// Makes an xfs.
pub const MKFS_XFS: Program = Program { name: "mkfs.xfs", package: "xfsprogs" };
/// Unmounts.
pub const UMOUNT: Program = Program { name: "umount", package: "mount" };

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The end of what it printed, both streams, in one line.
    pub output: String,
}

/// A program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// Not installed.
    #[error("{} is not installed; on Debian: apt-get install {}", .0.name, .0.package)]
    Missing(Program),
    /// Could not be started.
    #[error("{} cannot be started: {source}", program.name)]
    Start {
        /// Which.
        program: Program,
        /// Why.
        source: std::io::Error,
    },
    /// It failed.
    #[error("{} failed ({}): {}", program.name, outcome.code.map_or("killed by a signal".into(), |code| format!("exit status {code}")), outcome.output)]
    Failed {
        /// Which.
        program: Program,
        /// How.
        outcome: Outcome,
    },
}

impl Program {
    /// Runs it to its end, whatever its exit status.
    pub fn run<A: AsRef<OsStr>>(self, arguments: &[A]) -> Result<Outcome, ProgramError> {
        // A service may have a PATH without the administrator's directories.
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", std::env::var("PATH").unwrap_or_default());
        let run = Command::new(self.name)
            .args(arguments)
            .env("PATH", path.trim_start_matches(':'))
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output();
        match run {
            Ok(done) => {
                let text = [&done.stdout[..], &done.stderr[..]].concat();
                Ok(Outcome { code: done.status.code(), output: tail(&String::from_utf8_lossy(&text)) })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Err(ProgramError::Missing(self)),
            Err(source) => Err(ProgramError::Start { program: self, source }),
        }
    }

    /// Runs it; anything but exit status 0 is an error.
    pub fn succeed<A: AsRef<OsStr>>(self, arguments: &[A]) -> Result<(), ProgramError> {
        let outcome = self.run(arguments)?;
        if outcome.code == Some(0) { Ok(()) } else { Err(ProgramError::Failed { program: self, outcome }) }
    }
}

fn tail(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    let skip = line.chars().count().saturating_sub(MAX_OUTPUT);
    line.chars().skip(skip).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let missing = Program { name: "mkfs.tandem-is-not-there", package: "tandem-progs" };
        let error = missing.run(&["x"]).expect_err("no such program").to_string();
        assert!(error.contains("apt-get install tandem-progs"), "{error}");
    }

    #[test]
    fn a_failure_repeats_the_reason() {
        let cat = Program { name: "cat", package: "coreutils" };
        let error = cat.succeed(&["/nonexistent/tandem"]).expect_err("no such file").to_string();
        assert!(error.contains("exit status 1") && error.contains("No such file"), "{error}");
    }
}
