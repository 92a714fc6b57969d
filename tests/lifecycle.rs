//! Whole lives of volumes through the CSI socket while the processes behind it are killed with -9 at random moments: every
//! call that is repeated ends well, what was written and synced stays, and nothing is left in the end.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::installation::{Installation, pids};
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use tandem::rpc::csi::*;
use tonic::{Code, Status};

/// mkfs.xfs wants that much.
const SIZE: i64 = 320 << 20;
/// A call is repeated as kubelet does it; this is far above any restart.
const CALL_LIMIT: Duration = Duration::from_secs(300);
const WORD: &[u8] = b"written and synced";

/// Repeats a call until it ends well. Only what says "repeat" may come in between.
async fn until_done<T, F: Future<Output = Result<T, Status>>>(name: &str, call: impl Fn() -> F) -> T {
    let started = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return answer,
            // Unknown and Cancelled: the connection broke under the call.
            Err(status) => {
                let repeat = [Code::Unavailable, Code::Aborted, Code::Unknown, Code::Cancelled, Code::Internal];
                let broken = status.code() != Code::Internal || status.message().contains("h2 protocol error");
                // For a moment after a close: until its exec, another test's fork has this process's files open.
                let busy = status.code() == Code::FailedPrecondition
                    && ["a process still uses it", "is in use"].iter().any(|words| status.message().contains(words));
                assert!(busy || (repeat.contains(&status.code()) && broken), "{name}: {status:?}");
                assert!(started.elapsed() < CALL_LIMIT, "{name} does not end: {status:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn capability(fs_type: Option<&str>) -> VolumeCapability {
    let access_type = match fs_type {
        None => AccessType::Block(BlockVolume {}),
        Some(fs_type) => AccessType::Mount(MountVolume { fs_type: fs_type.into(), ..Default::default() }),
    };
    let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter.into() });
    VolumeCapability { access_type: Some(access_type), access_mode }
}

/// A volume on its way, with what every call about it says.
struct Life {
    node: String,
    fs_type: Option<&'static str>,
    staging: PathBuf,
    target: PathBuf,
}

impl Life {
    fn new(tandem: &Installation, node: &str, name: &str, fs_type: Option<&'static str>) -> Self {
        let staging = tandem.dir().join(format!("staging-{name}"));
        fs::create_dir(&staging).expect("staging directory");
        let target = tandem.dir().join(format!("target-{name}"));
        Self { node: node.into(), fs_type, staging, target }
    }

    async fn create(&self, tandem: &Installation, name: &str, source: Option<volume_content_source::Type>) -> String {
        let request = CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(CapacityRange { required_bytes: SIZE, limit_bytes: 0 }),
            volume_capabilities: vec![capability(self.fs_type)],
            volume_content_source: source.map(|source| VolumeContentSource { r#type: Some(source) }),
            ..Default::default()
        };
        let made =
            until_done("CreateVolume", || async { tandem.controller().create_volume(request.clone()).await }).await;
        made.into_inner().volume.expect("volume").volume_id
    }

    async fn bring_up(&self, tandem: &Installation, id: &str) {
        let publish = ControllerPublishVolumeRequest {
            volume_id: id.into(),
            node_id: self.node.clone(),
            volume_capability: Some(capability(self.fs_type)),
            ..Default::default()
        };
        until_done("ControllerPublishVolume", || async {
            tandem.controller().controller_publish_volume(publish.clone()).await
        })
        .await;
        let stage = NodeStageVolumeRequest {
            volume_id: id.into(),
            staging_target_path: text(&self.staging),
            volume_capability: Some(capability(self.fs_type)),
            ..Default::default()
        };
        until_done("NodeStageVolume", || async { tandem.node().node_stage_volume(stage.clone()).await }).await;
        let publish = NodePublishVolumeRequest {
            volume_id: id.into(),
            staging_target_path: text(&self.staging),
            target_path: text(&self.target),
            volume_capability: Some(capability(self.fs_type)),
            ..Default::default()
        };
        until_done("NodePublishVolume", || async { tandem.node().node_publish_volume(publish.clone()).await }).await;
    }

    async fn take_down(&self, tandem: &Installation, id: &str) {
        let unpublish = NodeUnpublishVolumeRequest { volume_id: id.into(), target_path: text(&self.target) };
        until_done("NodeUnpublishVolume", || async { tandem.node().node_unpublish_volume(unpublish.clone()).await })
            .await;
        assert!(!self.target.exists(), "the target is removed");
        let unstage = NodeUnstageVolumeRequest { volume_id: id.into(), staging_target_path: text(&self.staging) };
        until_done("NodeUnstageVolume", || async { tandem.node().node_unstage_volume(unstage.clone()).await }).await;
        let unpublish =
            ControllerUnpublishVolumeRequest { volume_id: id.into(), node_id: self.node.clone(), ..Default::default() };
        until_done("ControllerUnpublishVolume", || async {
            tandem.controller().controller_unpublish_volume(unpublish.clone()).await
        })
        .await;
    }

    async fn delete(&self, tandem: &Installation, id: &str) {
        let request = DeleteVolumeRequest { volume_id: id.into(), ..Default::default() };
        until_done("DeleteVolume", || async { tandem.controller().delete_volume(request.clone()).await }).await;
    }

    /// Grown as far as this machine lets a mounted filesystem grow: an ext4 may have to wait for the next stage.
    async fn expand(&self, tandem: &Installation, id: &str, bytes: i64) {
        let range = Some(CapacityRange { required_bytes: bytes, limit_bytes: 0 });
        let grow = ControllerExpandVolumeRequest { volume_id: id.into(), capacity_range: range, ..Default::default() };
        until_done("ControllerExpandVolume", || async {
            tandem.controller().controller_expand_volume(grow.clone()).await
        })
        .await;
        if self.fs_type == Some("ext4") && !tandem::mount::may_grow_mounted_ext4() {
            return;
        }
        let grow = NodeExpandVolumeRequest {
            volume_id: id.into(),
            volume_path: text(&self.target),
            capacity_range: range,
            ..Default::default()
        };
        until_done("NodeExpandVolume", || async { tandem.node().node_expand_volume(grow.clone()).await }).await;
    }

    fn file(&self) -> PathBuf {
        if self.fs_type.is_some() { self.target.join("file") } else { self.target.clone() }
    }

    /// Blocks while the engine is away: not on a thread of the runtime.
    async fn write(&self) {
        let (path, is_block) = (self.file(), self.fs_type.is_none());
        let write = move || {
            let mut file = fs::OpenOptions::new().write(true).create(!is_block).open(path)?;
            file.write_all(WORD)?;
            file.sync_all()
        };
        tokio::task::spawn_blocking(write).await.expect("thread").expect("no error ever reaches the application");
    }

    async fn check(&self) {
        let path = self.file();
        let mut bytes = vec![0; WORD.len()];
        let read = move || fs::File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).map(|()| bytes);
        let bytes =
            tokio::task::spawn_blocking(read).await.expect("thread").expect("no error ever reaches the application");
        assert_eq!(bytes, WORD);
    }

    /// Bytes of the filesystem or device.
    fn bytes(&self) -> u64 {
        match self.fs_type {
            Some(_) => tandem::mount::usage(&self.target).expect("usage").total_bytes,
            None => tandem::mount::device_size(&self.target).expect("size"),
        }
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

/// One life: made, used, snapshotted, grown, used again, restored, and gone.
async fn live(tandem: &Installation, node: &str, name: &str, fs_type: Option<&'static str>) {
    let life = Life::new(tandem, node, name, fs_type);
    let id = life.create(tandem, name, None).await;
    life.bring_up(tandem, &id).await;
    life.write().await;
    let request = CreateSnapshotRequest { name: name.into(), source_volume_id: id.clone(), ..Default::default() };
    let snapshot =
        until_done("CreateSnapshot", || async { tandem.controller().create_snapshot(request.clone()).await }).await;
    let snapshot_id = snapshot.into_inner().snapshot.expect("snapshot").snapshot_id;
    life.expand(tandem, &id, 2 * SIZE).await;
    life.check().await;
    life.take_down(tandem, &id).await;
    life.bring_up(tandem, &id).await;
    life.check().await;
    assert!(life.bytes() > SIZE as u64 * 3 / 2, "{fs_type:?} has grown: {}", life.bytes());
    life.take_down(tandem, &id).await;
    life.delete(tandem, &id).await;
    let source = volume_content_source::SnapshotSource { snapshot_id: snapshot_id.clone() };
    let restored =
        life.create(tandem, &format!("{name}-restored"), Some(volume_content_source::Type::Snapshot(source))).await;
    life.bring_up(tandem, &restored).await;
    life.check().await;
    life.take_down(tandem, &restored).await;
    life.delete(tandem, &restored).await;
    let request = DeleteSnapshotRequest { snapshot_id, ..Default::default() };
    until_done("DeleteSnapshot", || async { tandem.controller().delete_snapshot(request.clone()).await }).await;
    assert_eq!(fs::read_dir(&life.staging).expect("staging").count(), 0, "the staging directory is left empty");
}

async fn node_name(tandem: &Installation) -> String {
    let info = until_done("NodeGetInfo", || async { tandem.node().node_get_info(NodeGetInfoRequest {}).await }).await;
    info.into_inner().node_id
}

/// Nothing is left of any volume: no record on the node, no copy in the pool, no device.
async fn assert_nothing_left(tandem: &Installation) {
    let records = fs::read_dir(tandem.dir().join("node")).expect("records").count();
    assert_eq!(records, 0, "records of staged volumes");
    let answer = until_done("ListVolumes of the replica", || async {
        tandem.control().list_volumes(tandem::rpc::control::ListVolumesRequest {}).await
    })
    .await;
    assert_eq!(answer.into_inner().volumes, Vec::new(), "volumes of the replica");
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_live_whole_lives() {
    let tandem = Installation::start(&[]).await;
    let node = node_name(&tandem).await;
    for (name, fs_type) in [("ext4", Some("ext4")), ("xfs", Some("xfs")), ("block", None)] {
        live(&tandem, &node, name, fs_type).await;
    }
    assert_nothing_left(&tandem).await;
}

/// Then kills do not happen at all.
const MOST_ROUNDS: usize = 50;

/// Kills processes of an installation again and again, until it is dropped.
struct Killer {
    stop: Arc<AtomicBool>,
    killed: Arc<AtomicUsize>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Killer {
    fn new(dir: PathBuf, roles: &'static [&'static str]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let killed = Arc::new(AtomicUsize::new(0));
        let (is_over, count) = (stop.clone(), killed.clone());
        let run = move || {
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            while !is_over.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // Rarer and rarer, so that a machine on which a start takes long gets through, too.
                let done = count.load(Ordering::Relaxed) as u64;
                std::thread::sleep(Duration::from_millis(30 + random % 500 + 10 * done));
                for pid in pids(&dir, roles[random as usize % roles.len()]) {
                    let pid = nix::unistd::Pid::from_raw(pid);
                    let hit = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).is_ok();
                    count.fetch_add(usize::from(hit), Ordering::Relaxed);
                }
            }
        };
        Self { stop, killed, thread: Some(std::thread::spawn(run)) }
    }

    /// So many until now.
    fn killed(&self) -> usize {
        self.killed.load(Ordering::Relaxed)
    }

    /// Stops it; answers how many it killed.
    fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().into_iter().for_each(|thread| thread.join().expect("killer"));
        self.killed()
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// At least so many rounds, and more where lives are short, until they have met enough kills.
async fn lives_under_kills(roles: &'static [&'static str], rounds: usize) {
    let tandem = Installation::start(&[]).await;
    let node = node_name(&tandem).await;
    // Declared after the installation, so that it stops first on every way out.
    let killer = Killer::new(tandem.dir().to_owned(), roles);
    let wanted = 5 * rounds;
    for round in 0..MOST_ROUNDS {
        if round >= rounds && killer.killed() >= wanted {
            break;
        }
        for (name, fs_type) in [("ext4", Some("ext4")), ("xfs", Some("xfs")), ("block", None)] {
            live(&tandem, &node, &format!("{name}-{round}"), fs_type).await;
        }
    }
    let killed = killer.stop();
    println!("{killed} kills of {roles:?} in rounds of three lives");
    assert!(killed >= wanted, "only {killed} kills in {MOST_ROUNDS} rounds");
    assert_nothing_left(&tandem).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lives_go_on_when_the_csi_process_is_killed() {
    lives_under_kills(&["csi"], 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lives_go_on_when_engine_and_csi_are_killed() {
    lives_under_kills(&["csi", "replica"], 2).await;
}

/// The server is killed whole, with -9, somewhere in every call, then started again, and the call is repeated.
#[tokio::test(flavor = "multi_thread")]
async fn lives_go_on_when_everything_is_killed_in_the_middle_of_each_call() {
    let mut tandem = Installation::start(&[]).await;
    let node = node_name(&tandem).await;
    for (name, fs_type) in [("ext4", Some("ext4")), ("xfs", Some("xfs")), ("block", None)] {
        let life = Life::new(&tandem, &node, name, fs_type);
        let mut kills = 0;
        // Later and later, until the whole way up ends before the kill.
        for milliseconds in [0, 2, 5, 10, 20, 40, 80, 160] {
            let up = async {
                let id = life.create(&tandem, name, None).await;
                life.bring_up(&tandem, &id).await;
            };
            kills += usize::from(tokio::time::timeout(Duration::from_millis(milliseconds), up).await.is_err());
            tandem.kill();
            tandem.start_again().await;
        }
        let id = life.create(&tandem, name, None).await;
        life.bring_up(&tandem, &id).await;
        life.write().await;
        for milliseconds in [0, 2, 5, 10, 20, 40, 80, 160] {
            let down = life.take_down(&tandem, &id);
            kills += usize::from(tokio::time::timeout(Duration::from_millis(milliseconds), down).await.is_err());
            tandem.kill();
            tandem.start_again().await;
        }
        life.take_down(&tandem, &id).await;
        life.bring_up(&tandem, &id).await;
        life.check().await;
        life.take_down(&tandem, &id).await;
        life.delete(&tandem, &id).await;
        println!("{name}: {kills} calls were cut off");
        assert!(kills >= 4, "{name}: only {kills} calls were cut off");
    }
    assert_nothing_left(&tandem).await;
}
