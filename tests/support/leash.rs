//! What a test has started ends with the test's process, also when that is killed: nothing of it drops anything then.
//!
//! A shell waits at the other end of a pipe. If it closes while the leash is held, the process is gone, and the shell takes away
//! every process that names the test's directory, the mounts below it, its loop devices and the directory itself.
//! What a test has in other directories (`SmallPool`, `VolatileDisk`), and devices of volumes there, stay.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Dropped by a test that lives, it does nothing: the test cleans up by itself.
pub struct Leash(Child);

impl Leash {
    pub fn new(directory: &Path) -> Self {
        Self::after("", directory)
    }

    /// Runs a line of shell first; the directory is `$DIR` in it.
    pub fn after(line: &str, directory: &Path) -> Self {
        let script = format!("trap '' INT TERM HUP\nread -r _\n. hack/lib/cleanup\n{line}\nend_directory \"$DIR\"");
        let mut command = Command::new("bash");
        // Not among the arguments: a process that names the directory counts as the test's. And in a group of its own: who ends the
        // test by its group shall not end this.
        command.args(["-c", &script]).env("DIR", directory).env("TANDEM", env!("CARGO_BIN_EXE_tandem"));
        command.current_dir(ROOT).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("bash"))
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
