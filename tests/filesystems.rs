//! ext4 and xfs on the device, through the CSI socket: fsx and fio verify what they wrote while snapshots are taken.
//!
//! Needs root, fsx (`FSX_SEED=n` repeats its random run), fio, e2fsprogs and xfsprogs.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::installation::Installation;
use tandem::rpc::csi;
use tandem::rpc::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use tandem::rpc::csi::volume_content_source::{SnapshotSource, Type};

const SIZE: i64 = 512 << 20;
const FIXED_SEED: u64 = 20_261_122;
/// Operations of each run of fsx.
const OPERATIONS: u64 = 4_000;
const MOST_SNAPSHOTS: usize = 8;
/// About one seed in a hundred is of no use: so many in a row are not.
const SEEDS_TRIED: u64 = 20;

/// Every operation that both filesystems have; sizes and places of any alignment.
const FSX: &str = "
flen = 4194304
[opsize]
max = 131072
[weights]
close_open = 1
invalidate = 1
mapread = 5
mapwrite = 5
read = 5
write = 10
truncate = 2
fsync = 1
fdatasync = 1
posix_fallocate = 1
punch_hole = 2
sendfile = 1
posix_fadvise = 1
";

/// A command that must succeed; what it says where it does not.
fn succeeds(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
}

fn capability(filesystem: &str) -> csi::VolumeCapability {
    let mount = MountVolume { fs_type: filesystem.to_owned(), ..Default::default() };
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(mount)),
    }
}

async fn create(tandem: &Installation, name: &str, filesystem: &str, source: Option<Type>) -> String {
    let request = csi::CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(csi::CapacityRange { required_bytes: SIZE, limit_bytes: 0 }),
        volume_capabilities: vec![capability(filesystem)],
        volume_content_source: source.map(|source| csi::VolumeContentSource { r#type: Some(source) }),
        ..Default::default()
    };
    let made = tandem.controller().create_volume(request).await.expect("volume").into_inner();
    made.volume.expect("volume").volume_id
}

async fn stage(tandem: &Installation, volume: &str, filesystem: &str) -> PathBuf {
    let staging = tandem.dir().join(format!("staging-{volume}"));
    fs::create_dir_all(&staging).expect("directory");
    let request = csi::NodeStageVolumeRequest {
        volume_id: volume.to_owned(),
        staging_target_path: staging.display().to_string(),
        volume_capability: Some(capability(filesystem)),
        ..Default::default()
    };
    tandem.node().node_stage_volume(request).await.expect("staged");
    staging
}

async fn unstage(tandem: &Installation, volume: &str) {
    let staging = tandem.dir().join(format!("staging-{volume}")).display().to_string();
    let request = csi::NodeUnstageVolumeRequest { volume_id: volume.to_owned(), staging_target_path: staging };
    tandem.node().node_unstage_volume(request).await.expect("unstaged");
}

/// The filesystem's own checker, without changes, finds nothing on the unmounted volume.
async fn is_clean(tandem: &Installation, volume: &str, filesystem: &str) {
    let device = tandem.attach(volume).await;
    match filesystem {
        "ext4" => succeeds(Command::new("e2fsck").arg("-fn").arg(&device)),
        _ => succeeds(Command::new("xfs_repair").arg("-n").arg(&device)),
    }
    tandem.detach(volume).await;
}

fn fsx_command(directory: &Path, seed: u64) -> Command {
    let config = directory.join(format!("fsx-{seed}.toml"));
    fs::write(&config, FSX).expect("configuration");
    let mut command = Command::new("fsx");
    command.args(["-N", &OPERATIONS.to_string(), "-S", &seed.to_string(), "-f"]).arg(config);
    command.arg("-P").arg(directory).arg(directory.join(format!("fsx-{seed}")));
    command
}

fn fsx(directory: &Path, seed: u64) {
    println!("fsx with seed {seed}");
    succeeds(&mut fsx_command(directory, seed));
}

/// A seed that nobody has tried on a volume, and that fsx itself survives on this machine's own filesystem: from some it
/// makes an allocation of no bytes, which every filesystem refuses.
fn random_seed() -> u64 {
    if let Some(seed) = std::env::var("FSX_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return seed;
    }
    let directory = tempfile::Builder::new().prefix("tandem-fsx-").tempdir().expect("a directory");
    let survives = |seed: &u64| fsx_command(directory.path(), *seed).output().is_ok_and(|done| done.status.success());
    let first = u64::from(std::process::id()) * 1_000;
    (first..first + SEEDS_TRIED).find(survives).expect("fsx works on this machine's own filesystem")
}

/// Buffered and direct at once. With `only_verify` it reads what an earlier run left.
fn fio(directory: &Path, only_verify: bool) {
    let mut command = Command::new("fio");
    command.args([
        "--rw=randwrite",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--size=48m",
        "--randrepeat=1",
        "--verify_state_save=0",
    ]);
    command.arg(format!("--directory={}", directory.display()));
    command.args(only_verify.then_some("--verify_only=1"));
    command.args(["--name=buffered", "--ioengine=psync", "--bs=4k", "--fsync=64"]);
    command.args(["--name=direct", "--ioengine=io_uring", "--iodepth=16", "--direct=1", "--bs=16k", "--fsync=64"]);
    succeeds(&mut command);
}

/// Sets it when dropped, also by a panic: nobody waits for ever.
struct Finished<'a>(&'a AtomicBool);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Takes snapshots until the work is over; the ids.
async fn snapshots(tandem: &Installation, volume: &str, over: &AtomicBool) -> Vec<String> {
    let mut taken = Vec::new();
    while !over.load(Ordering::Relaxed) {
        if taken.len() < MOST_SNAPSHOTS {
            taken.push(tandem.snapshot(&format!("{volume}-{}", taken.len()), volume).await.expect("snapshot"));
        }
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    taken
}

async fn what_is_written_is_read(filesystem: &str) {
    let tandem = Installation::start(&["--overcommit", "10"]).await;
    let volume = create(&tandem, "worked-on", filesystem, None).await;
    let directory = stage(&tandem, &volume, filesystem).await;
    let random = random_seed();
    let over = AtomicBool::new(false);
    let taken = std::thread::scope(|scope| {
        scope.spawn(|| {
            let _finished = Finished(&over);
            std::thread::scope(|scope| {
                scope.spawn(|| fio(&directory, false));
                for seed in [FIXED_SEED, random] {
                    let directory = &directory;
                    scope.spawn(move || fsx(directory, seed));
                }
            });
        });
        let runtime = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| runtime.block_on(snapshots(&tandem, &volume, &over)))
    });
    println!("{} snapshots meanwhile", taken.len());
    assert!(taken.len() > 1, "no snapshot fell into the work");
    unstage(&tandem, &volume).await;
    is_clean(&tandem, &volume, filesystem).await;
    // From the device now, not from the page cache.
    assert_eq!(stage(&tandem, &volume, filesystem).await, directory);
    fio(&directory, true);
    unstage(&tandem, &volume).await;
    // A snapshot is what a power cut would leave: its journal is replayed by the mount, and then it is clean, too.
    let snapshot_id = taken[taken.len() / 2].clone();
    let source = Some(Type::Snapshot(SnapshotSource { snapshot_id }));
    let restored = create(&tandem, "restored", filesystem, source).await;
    stage(&tandem, &restored, filesystem).await;
    unstage(&tandem, &restored).await;
    is_clean(&tandem, &restored, filesystem).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fsx_and_fio_find_what_they_wrote_on_ext4() {
    what_is_written_is_read("ext4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fsx_and_fio_find_what_they_wrote_on_xfs() {
    what_is_written_is_read("xfs").await;
}
