//! A pool's filesystem of a few hundred MiB out of a sparse file, which can be full, can fail and can hang; gone on every path.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

pub struct SmallPool {
    path: PathBuf,
    image: PathBuf,
    options: &'static str,
    /// The last one is used, the others have failed.
    devices: Vec<String>,
    _directory: tempfile::TempDir,
}

fn run(command: &mut Command) {
    assert!(command.status().expect("it is installed").success(), "{command:?}");
}

impl SmallPool {
    pub fn ext4(mib: usize) -> Self {
        Self::new(mib, Command::new("mkfs.ext4").args(["-q", "-m", "0"]), "defaults")
    }

    /// At least 300 MiB. One that has failed and is not gone everywhere has the same name.
    pub fn xfs(mib: usize) -> Self {
        Self::new(mib, Command::new("mkfs.xfs").arg("-q"), "nouuid")
    }

    fn new(mib: usize, make: &mut Command, options: &'static str) -> Self {
        let directory = tempfile::Builder::new().prefix("tandem-full-").tempdir().expect("temporary directory");
        let (image, path) = (directory.path().join("image"), directory.path().join("pool"));
        File::create(&image).and_then(|file| file.set_len(mib as u64 * MIB)).expect("image");
        std::fs::create_dir(&path).expect("directory");
        run(make.arg(&image));
        let mut pool = Self { path, image, options, devices: Vec::new(), _directory: directory };
        pool.mount();
        pool
    }

    fn mount(&mut self) {
        // Not `mount -o loop`: that asks every loop device of the machine, also one whose engine is dead at the moment.
        let found = Command::new("losetup").args(["--find", "--show"]).arg(&self.image).output().expect("losetup");
        let device = String::from_utf8_lossy(&found.stdout).trim().to_owned();
        assert!(found.status.success() && !device.is_empty(), "no loop device");
        self.devices.push(device.clone());
        run(Command::new("mount").args(["-o", self.options]).arg(&device).arg(&self.path));
    }

    fn unmount(&self) {
        if !Command::new("umount").arg(&self.path).status().is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn in_the_way(&self) -> PathBuf {
        self.path.join("in-the-way")
    }

    /// So much is left for others.
    pub fn fill(&self, left_mib: u64) {
        let space = nix::sys::statvfs::statvfs(&self.path).expect("it answers");
        let bytes = (space.blocks_available() * space.fragment_size()).saturating_sub(left_mib * MIB);
        run(Command::new("fallocate").args(["--length", &bytes.to_string()]).arg(self.in_the_way()));
    }

    /// Undoes it.
    pub fn make_room(&self) {
        std::fs::remove_file(self.in_the_way()).expect("it was full");
    }

    /// From now on everything that is written there is an error.
    pub fn fail(&self) {
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(&self.path));
    }

    /// From now on everything that is written there waits until what this returns is dropped.
    pub fn hang(&self) -> Hanging {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.path));
        Hanging(self.path.clone())
    }

    /// The disk works again, when whoever used it has ended. What has failed lives on in every mount namespace that was made
    /// meanwhile, and does no I/O: so the same blocks get another device.
    pub fn mount_again(&mut self) {
        self.unmount();
        self.mount();
    }
}

/// See [`SmallPool::hang`].
pub struct Hanging(PathBuf);

impl Drop for Hanging {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0).status();
    }
}

impl Drop for SmallPool {
    fn drop(&mut self) {
        self.unmount();
        for device in &self.devices {
            let _ = Command::new("losetup").args(["--detach", device]).status();
        }
    }
}
