//! Power-cut images: what real ext4 and xfs wrote is recorded at the device, replayed into the shipped store, and cut off.
//!
//! Each cut leaves an image that a power cut may leave: it is read out through the store, mounted (the journal is replayed),
//! compared with what was promised by fsync before the cut, and checked by the filesystem's own checker. Needs root,
//! /dev/fuse, e2fsprogs and xfsprogs. `CUTS=n` sets how many cuts, `FIRST_CUT=n` the seed of the first.

mod record;
mod replay;
mod work;

use crate::replica::device::mount::private_mount_namespace;
use crate::store::planted::Planted;
use record::{Event, Recording};
use replay::Replay;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use work::Expected;

const CUTS: u64 = 20;

/// A filesystem, and how it is made small and without work left for later.
struct Kind {
    name: &'static str,
    bytes: u64,
    mkfs: &'static [&'static str],
    check: &'static [&'static str],
}

const EXT4: Kind = Kind {
    name: "ext4",
    bytes: 48 << 20,
    mkfs: &["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    check: &["e2fsck", "-fn"],
};

/// The smallest that mkfs.xfs makes.
const XFS: Kind = Kind { name: "xfs", bytes: 300 << 20, mkfs: &["mkfs.xfs", "-q"], check: &["xfs_repair", "-n"] };

/// Runs a command; what it said if it failed.
fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("{command:?}: {}: {}{}", output.status, out.trim(), err.trim()))
}

/// An image as a block device; goes on every path. Not `mount -o loop`: that asks every loop device of the machine for the
/// file behind it, and waits where another test has just killed the engine.
struct Attached(PathBuf);

impl Attached {
    fn new(image: &Path) -> Result<Self, String> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(image).output();
        let output = output.map_err(|error| format!("losetup: {error}"))?;
        match String::from_utf8_lossy(&output.stdout).trim() {
            "" => Err(format!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim())),
            device => Ok(Self(device.into())),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.0));
    }
}

/// Runs in a mount namespace of its own: an engine of another test that starts meanwhile copies the mounts that it sees,
/// and xfs refuses to mount what is still mounted elsewhere. For the same reason copies of other tests' mounts are let go
/// of: unmounted there, their devices would stay in use as long as this runs.
fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        private_mount_namespace().expect("a mount namespace: this test needs root");
        work()
    };
    std::thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A mounted filesystem; goes on every path.
struct Mounted(PathBuf);

impl Mounted {
    fn new(source: &Path, at: &Path, filesystem: &str, options: &str) -> Result<Self, String> {
        std::fs::create_dir_all(at).map_err(|error| error.to_string())?;
        run(Command::new("mount").args(["-t", filesystem, "-o", options]).args([source, at]))?;
        Ok(Self(at.to_owned()))
    }

    /// Takes it away; an error if that fails. A child that another test has just forked may have a file there open until it
    /// executes its program.
    fn end(self) -> Result<(), String> {
        for _ in 0..600 {
            match run(Command::new("umount").arg(&self.0)) {
                Err(error) if error.contains("busy") => std::thread::sleep(Duration::from_millis(100)),
                Err(error) => return Err(error),
                Ok(()) => {
                    std::mem::forget(self);
                    return Ok(());
                }
            }
        }
        Err(format!("{} is busy for a minute", self.0.display()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.0));
    }
}

/// One cut: the image, and what is wrong with it.
fn cut(kind: &Kind, recording: &Recording, seed: u64, planted: Option<Planted>) -> Result<(), String> {
    let mut replay = Replay::new(seed, kind.bytes, planted);
    let length = recording.events.len();
    let at = recording.ready + replay.random().below(length - recording.ready + 1);
    replay.events(recording, at)?;
    replay.power_cut()?;
    let directory = tempfile::Builder::new().prefix("tandem-image-").tempdir().map_err(|error| error.to_string())?;
    let (image, mount) = (directory.path().join("image"), directory.path().join("mount"));
    replay.read_out(&image)?;
    let expected = Expected::after(&recording.events[..at]);
    let check = || {
        let attached = Attached::new(&image)?;
        let mounted = Mounted::new(&attached.0, &mount, kind.name, "defaults")?;
        let compared = expected.compare(&mounted.0);
        mounted.end()?;
        drop(attached);
        compared?;
        run(Command::new(kind.check[0]).args(&kind.check[1..]).arg(&image))
    };
    check().map_err(|error| format!("{} cut at event {at} of {length}, seed {seed}: {error}", kind.name))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// All cuts of one recording, then the same with a flush that does not sync: that must not pass.
fn power_cuts(kind: &Kind) {
    let recording = record::record(kind);
    let of = |wanted: fn(&Event) -> bool| recording.events.iter().filter(|event| wanted(event)).count();
    let (requests, promises) =
        (of(|event| matches!(event, Event::Submitted(_))), of(|event| matches!(event, Event::Promised(_))));
    println!("{}: {requests} requests and {promises} promises recorded", kind.name);
    assert!(requests > 300 && promises > 50, "the recording is too small to show anything");
    let (first, cuts) = (number("FIRST_CUT", 1), number("CUTS", CUTS));
    for seed in first..first + cuts {
        cut(kind, &recording, seed, None).unwrap_or_else(|error| panic!("{error}"));
    }
    println!("{}: {cuts} power cuts, every image is sound", kind.name);
    let found = (first..first + cuts.max(CUTS))
        .find_map(|seed| cut(kind, &recording, seed, Some(Planted::SkippedSync)).err())
        .unwrap_or_else(|| panic!("{}: a flush without fdatasync is not found", kind.name));
    println!("a flush without fdatasync is found: {found}");
}

#[test]
fn power_cut_images_of_ext4_are_sound() {
    apart(|| power_cuts(&EXT4));
}

#[test]
fn power_cut_images_of_xfs_are_sound() {
    apart(|| power_cuts(&XFS));
}
