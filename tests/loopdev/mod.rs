//! A loop device on a sparse temporary file, gone again on every path. Needs root.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device of 4096-byte sectors.
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// The file under it.
    pub file: PathBuf,
}

/// Runs a program that must succeed; answers what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&[&done.stdout[..], &done.stderr[..]].concat()).trim().to_owned();
    assert!(done.status.success(), "{program} {arguments:?}: {text}");
    text
}

impl LoopDevice {
    /// `size` bytes of zeros in `directory`.
    pub fn new(directory: &Path, name: &str, size: u64) -> Self {
        let file = directory.join(name);
        let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&file).expect("temporary file");
        opened.set_len(size).expect("sparse file");
        Self::over(&file)
    }

    /// On a file that exists.
    pub fn over(file: &Path) -> Self {
        let text = file.to_str().expect("UTF-8");
        let path = run("losetup", &["--find", "--show", "--sector-size", "4096", text]).into();
        Self { path, file: file.to_owned() }
    }

    /// Grows file and device.
    pub fn grow(&self, size: u64) {
        OpenOptions::new().write(true).open(&self.file).and_then(|file| file.set_len(size)).expect("growing");
        run("losetup", &["--set-capacity", &self.text()]);
    }

    /// Overwrites a part of the device.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let device = OpenOptions::new().write(true).open(&self.path).expect("device");
        device.write_all_at(bytes, offset).and_then(|()| device.sync_all()).expect("writing to the device");
    }

    /// The device's path as text.
    pub fn text(&self) -> String {
        self.path.to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.text()]).output();
    }
}

/// A directory on which something may be mounted: unmounted when it goes.
pub struct MountPoint(pub PathBuf);

impl MountPoint {
    /// Makes the directory.
    pub fn new(path: PathBuf) -> Self {
        std::fs::create_dir_all(&path).expect("mount point");
        Self(path)
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        for _ in 0..4 {
            if !Command::new("umount").arg("--").arg(&self.0).output().is_ok_and(|done| done.status.success()) {
                break;
            }
        }
    }
}

/// A temporary directory named `tandem-...`, a shared mount of its own: what is unmounted below it is unmounted in every mount
/// namespace. A process that takes a private one meanwhile would otherwise keep the device busy for as long as it lives.
pub struct Directory(tempfile::TempDir);

impl Directory {
    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Makes one.
pub fn directory() -> Directory {
    let made = tempfile::Builder::new().prefix("tandem-mount-").tempdir().expect("temporary directory");
    let path = made.path().to_str().expect("UTF-8");
    run("mount", &["--bind", path, path]);
    run("mount", &["--make-shared", path]);
    Directory(made)
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).output();
    }
}
