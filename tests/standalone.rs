//! The whole of it on one machine, through its sockets: volumes keep what they were given, whatever dies.

mod support;

use std::fs::OpenOptions;
use std::io::BufRead;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use support::installation::{Installation, pids};
use support::mounted::insist;
use tandem::memory::Memory;
use tandem::rpc::csi;
use tandem::rpc::csi::volume_content_source::{SnapshotSource, Type, VolumeSource};

const MIB: usize = 1 << 20;

fn open(device: &Path) -> std::fs::File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("device")
}

fn fill(device: &Path, at: usize, byte: u8) {
    let mut chunk = Memory::zeros(MIB).expect("memory");
    chunk.bytes_mut().fill(byte);
    let file = open(device);
    file.write_all_at(chunk.bytes(), (at * MIB) as u64).expect("written");
    file.sync_data().expect("flushed");
}

/// kill -9 of the process with this role as soon as there is one.
fn kill_when_it_comes(dir: &Path, role: &str) {
    let began = std::time::Instant::now();
    loop {
        if let Some(pid) = pids(dir, role).first() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
            return;
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(300), "no {role} process");
    }
}

/// The byte that all of this MiB has; panics if it is mixed.
fn byte(device: &Path, at: usize) -> u8 {
    let mut chunk = Memory::zeros(MIB).expect("memory");
    open(device).read_exact_at(chunk.bytes_mut(), (at * MIB) as u64).expect("read");
    let bytes = chunk.bytes();
    assert!(bytes.iter().all(|b| *b == bytes[0]), "MiB {at} of {} is mixed", device.display());
    bytes[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_keeps_its_data_when_everything_but_the_holder_is_killed() {
    let mut tandem = Installation::start(&[]).await;
    let volume = tandem.create("keeps", 64 << 20, &[]).await;
    let device = tandem.attach(&volume).await;
    fill(&device, 3, 0x33);
    for round in 1..=3 {
        tandem.kill();
        let writer = std::thread::spawn({
            let device = device.clone();
            move || fill(&device, 10 + usize::from(round), round)
        });
        tandem.start_again().await;
        writer.join().expect("the write waited and went on");
        assert_eq!(byte(&device, 3), 0x33);
        assert_eq!(byte(&device, 10 + usize::from(round)), round);
        assert_eq!(tandem.attach(&volume).await, device, "the device is found again");
    }
    tandem.detach(&volume).await;
    tandem.terminate();
    tandem.start_again().await;
    let device = tandem.attach(&volume).await;
    assert_eq!((byte(&device, 3), byte(&device, 13), byte(&device, 20)), (0x33, 3, 0));
    tandem.detach(&volume).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_and_clones_have_the_data_of_their_moment() {
    let tandem = Installation::start(&[]).await;
    let volume = tandem.create("origin", 64 << 20, &[]).await;
    let device = tandem.attach(&volume).await;
    fill(&device, 0, 1);
    fill(&device, 1, 1);
    let snapshot = tandem.snapshot("s1", &volume).await.expect("snapshot");
    assert_eq!(tandem.snapshot("s1", &volume).await.expect("again"), snapshot);
    fill(&device, 0, 2);
    let clone = tandem
        .create_from("clone", 64 << 20, &[], Some(Type::Volume(VolumeSource { volume_id: volume.clone() })))
        .await
        .expect("clone");
    fill(&device, 1, 3);
    let restored = tandem
        .create_from("restored", 96 << 20, &[], Some(Type::Snapshot(SnapshotSource { snapshot_id: snapshot.clone() })))
        .await
        .expect("restored");
    let (clone_device, restored_device) = (tandem.attach(&clone).await, tandem.attach(&restored).await);
    assert_eq!((byte(&device, 0), byte(&device, 1)), (2, 3));
    assert_eq!((byte(&clone_device, 0), byte(&clone_device, 1)), (2, 1));
    assert_eq!((byte(&restored_device, 0), byte(&restored_device, 1), byte(&restored_device, 80)), (1, 1, 0));
    // The source may go while its clones live.
    tandem.detach(&volume).await;
    let mut controller = tandem.controller();
    let gone = csi::DeleteVolumeRequest { volume_id: volume, ..Default::default() };
    controller.delete_volume(gone).await.expect("deleted");
    let gone = csi::DeleteSnapshotRequest { snapshot_id: snapshot, ..Default::default() };
    controller.delete_snapshot(gone).await.expect("deleted");
    fill(&clone_device, 2, 9);
    assert_eq!((byte(&clone_device, 0), byte(&clone_device, 1), byte(&clone_device, 2)), (2, 1, 9));
    assert_eq!((byte(&restored_device, 0), byte(&restored_device, 2)), (1, 0));
    tandem.detach(&clone).await;
    tandem.detach(&restored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_into_another_pool_is_a_copy_that_is_usable_when_complete() {
    let other = tempfile::Builder::new().prefix("tandem-test-pool-").tempdir().expect("temporary directory");
    let pool = format!("other={}", other.path().display());
    let tandem = Installation::start(&["--pool", &pool]).await;
    // Naming a pool replaces the default one, so the source goes into one that is added.
    let first = tempfile::Builder::new().prefix("tandem-test-pool-").tempdir().expect("temporary directory");
    let add = tandem::rpc::control::AddPoolRequest {
        name: "first".to_owned(),
        path: first.path().display().to_string(),
        force: false,
    };
    tandem.control().add_pool(add).await.expect("pool");
    let volume = tandem.create("origin", 64 << 20, &[("pool", "first")]).await;
    let device = tandem.attach(&volume).await;
    (0..8).for_each(|at| fill(&device, at * 7, u8::try_from(at + 1).expect("small")));
    let copy = loop {
        let source = Some(Type::Volume(VolumeSource { volume_id: volume.clone() }));
        match tandem.create_from("copy", 64 << 20, &[("pool", "other")], source).await {
            Ok(copy) => break copy,
            Err(status) => assert_eq!(status.code(), tonic::Code::Aborted, "{status}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    fill(&device, 0, 0xff);
    let copied = tandem.attach(&copy).await;
    (0..8).for_each(|at| assert_eq!(byte(&copied, at * 7), u8::try_from(at + 1).expect("small")));
    assert_eq!(byte(&copied, 1), 0);
    tandem.detach(&copy).await;
    tandem.detach(&volume).await;
}

/// A server that ended with them would leave its devices standing still.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_processes_are_killed_before_it_is_ready_starts_them_again() {
    let mut tandem = Installation::start(&[]).await;
    let volume = tandem.create("waits", 64 << 20, &[]).await;
    let device = tandem.attach(&volume).await;
    for role in ["replica", "csi"] {
        tandem.kill();
        while !(tandem.pids("replica").is_empty() && tandem.pids("csi").is_empty()) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let dir = tandem.dir().to_owned();
        let killer = std::thread::spawn(move || kill_when_it_comes(&dir, role));
        tandem.start_again().await;
        killer.join().expect("killed");
        fill(&device, 1, 1);
    }
    tandem.detach(&volume).await;
    assert!(!tandem.has_ended(), "{}", tandem.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_parallel_creations_never_promise_more_than_the_pool_has() {
    let tandem = Installation::start(&[]).await;
    let pools =
        tandem.control().list_pools(tandem::rpc::control::ListPoolsRequest {}).await.expect("pools").into_inner();
    let each = i64::try_from(pools.pools[0].capacity_bytes / 20 / MIB as u64).expect("small") * MIB as i64;
    let tandem = std::sync::Arc::new(tandem);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..50 {
        let tandem = tandem.clone();
        tasks.spawn(async move { tandem.create_from(&format!("many-{n}"), each, &[], None).await });
    }
    let (mut made, mut refused) = (0, 0);
    while let Some(result) = tasks.join_next().await {
        match result.expect("task") {
            Ok(_) => made += 1,
            Err(status) => {
                assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
                refused += 1;
            }
        }
    }
    assert!((15..20).contains(&made) && made + refused == 50, "{made} made, {refused} refused");
    let pools =
        tandem.control().list_pools(tandem::rpc::control::ListPoolsRequest {}).await.expect("pools").into_inner();
    assert!(pools.pools[0].promised_bytes <= pools.pools[0].capacity_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_holder_ends_when_there_is_nothing_to_hold() {
    let mut tandem = Installation::start(&[]).await;
    let (kept, deleted) = (tandem.create("kept", 8 << 20, &[]).await, tandem.create("deleted", 8 << 20, &[]).await);
    fill(&tandem.attach(&kept).await, 1, 1);
    tandem.detach(&kept).await;
    let gone = csi::DeleteVolumeRequest { volume_id: deleted, ..Default::default() };
    tandem.controller().delete_volume(gone).await.expect("deleted");
    assert_eq!(tandem.pids("holder").len(), 1);
    tandem.terminate();
    let began = std::time::Instant::now();
    while !tandem.pids("holder").is_empty() {
        assert!(began.elapsed() < std::time::Duration::from_secs(300), "the holder stays\n{}", tandem.log());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// What was acknowledged and not flushed is in memory that the holder keeps, also while the pool of its volume is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_comes_back_brings_what_was_acknowledged_before_it_went() {
    let mut tandem = Installation::start(&[]).await;
    let place = tempfile::Builder::new().prefix("tandem-test-pool-").tempdir().expect("temporary directory");
    let (pool, away) = (place.path().join("pool"), place.path().join("away"));
    std::fs::create_dir(&pool).expect("a directory");
    let add = || tandem::rpc::control::AddPoolRequest {
        name: "second".into(),
        path: pool.display().to_string(),
        force: false,
    };
    tandem.control().add_pool(add()).await.expect("pool");
    let volume = tandem.create("far", 64 << 20, &[("pool", "second")]).await;
    let device = tandem.attach(&volume).await;
    let mut chunk = Memory::zeros(MIB).expect("memory");
    chunk.bytes_mut().fill(0x77);
    // Open until the end: the last close would flush.
    let open = open(&device);
    open.write_all_at(chunk.bytes(), 5 * MIB as u64).expect("acknowledged");
    tandem.kill();
    std::fs::rename(&pool, &away).expect("the pool goes");
    std::fs::create_dir(&pool).expect("and leaves its mount point");
    tandem.start_again().await;
    let pools =
        tandem.control().list_pools(tandem::rpc::control::ListPoolsRequest {}).await.expect("pools").into_inner();
    let second = pools.pools.iter().find(|pool| pool.name == "second").expect("listed");
    assert!(second.problem.contains("is empty now"), "{second:?}");
    let refused = tandem.control().add_pool(add()).await.expect_err("it is another place");
    assert!(refused.message().contains("--force"), "{refused}");
    let detach = tandem::rpc::control::DetachVolumeRequest { volume_id: volume.clone(), abandon: false };
    let refused = tandem.control().detach_volume(detach).await.expect_err("its device is there, and waits");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    std::fs::remove_dir(&pool).expect("nothing was made in it");
    std::fs::rename(&away, &pool).expect("the pool is back");
    tandem.control().add_pool(add()).await.expect("added again");
    assert_eq!(byte(&device, 5), 0x77);
    drop(open);
    tandem.detach(&volume).await;
}

fn losetup(arguments: &[&str]) -> bool {
    std::process::Command::new("losetup").args(arguments).status().expect("losetup").success()
}

/// Loop devices whose file is of this volume.
fn devices_of(volume: &str) -> usize {
    let blocks = std::fs::read_dir("/sys/block").expect("sysfs").flatten();
    let backing =
        blocks.map(|block| std::fs::read_to_string(block.path().join("loop/backing_file")).unwrap_or_default());
    backing.filter(|backing| backing.contains(volume)).count()
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = std::time::Instant::now();
    while !condition().await {
        assert!(began.elapsed() < std::time::Duration::from_secs(300), "{what} does not come");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// A loop device that somebody takes away while nothing has it open leaves its number to anybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_was_taken_away_is_never_mistaken_for_what_has_its_number_now() {
    let tandem = Installation::start(&[]).await;
    let volume = tandem.create("taken", 64 << 20, &[]).await;
    let device = tandem.attach(&volume).await;
    assert_eq!(tandem.attach(&volume).await, device, "it is there");
    fill(&device, 1, 5);
    let text = device.display().to_string();
    assert!(losetup(&["--detach", &text]), "nobody has it open");
    until("its end", async || devices_of(&volume) == 0).await;
    let image = tandem.dir().join("image");
    std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
    // Another test may have been faster: then the number is its, or free again.
    let ours = losetup(&[&text, &image.display().to_string()]);
    let again = tandem.attach(&volume).await;
    if ours {
        assert!(losetup(&["--detach", &text]), "nobody has it open");
        assert_ne!(again, device);
    }
    assert_eq!(byte(&again, 1), 5);
    tandem.detach(&volume).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_died_with_its_holder_goes_when_it_is_detached() {
    let mut tandem = Installation::start(&[]).await;
    let volume = tandem.create("orphan", 64 << 20, &[]).await;
    fill(&tandem.attach(&volume).await, 1, 5);
    tandem.kill();
    kill_when_it_comes(tandem.dir(), "holder");
    until("the end of the holder", async || tandem.pids("holder").is_empty()).await;
    assert_eq!(devices_of(&volume), 1, "it is dead, and there");
    tandem.start_again().await;
    tandem.detach(&volume).await;
    assert_eq!(devices_of(&volume), 0);
    let device = tandem.attach(&volume).await;
    assert_eq!(byte(&device, 1), 5);
    tandem.detach(&volume).await;
}

/// The others go on, nothing of what it has counts as gone, and it is used again as soon as that is possible.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_cannot_be_opened_stops_nothing_else_and_comes_back_by_itself() {
    let dir = tempfile::Builder::new().prefix("tandem-test-").tempdir().expect("directory");
    let second = dir.path().join("second");
    let pools = [("default", "pool"), ("second", "second")];
    let pools = pools.map(|(name, place)| format!("{name}={}", dir.path().join(place).display()));
    let mut tandem = Installation::start_in(dir, &["--pool", &pools[0], "--pool", &pools[1]], &[]).await;
    let near = tandem.create("near", 64 << 20, &[]).await;
    let far = tandem.create("far", 64 << 20, &[("pool", "second")]).await;
    let gone = tandem.create("gone", 64 << 20, &[("pool", "second")]).await;
    let (near_device, far_device) = (tandem.attach(&near).await, tandem.attach(&far).await);
    fill(&near_device, 0, 1);
    fill(&far_device, 0, 2);
    let snapshot = tandem.snapshot("of-far", &far).await.expect("snapshot");
    tandem.kill();
    let lock = std::fs::File::open(second.join("pool.tandem")).expect("its superblock");
    lock.lock().expect("nobody has it");
    tandem.start_again().await;
    fill(&near_device, 1, 3);
    let delete_volume = csi::DeleteVolumeRequest { volume_id: gone.clone(), ..Default::default() };
    let delete_snapshot = csi::DeleteSnapshotRequest { snapshot_id: snapshot, ..Default::default() };
    let stage = csi::NodeStageVolumeRequest {
        volume_id: far.clone(),
        staging_target_path: tandem.dir().display().to_string(),
        volume_capability: Some(support::installation::block()),
        ..Default::default()
    };
    let refusals = [
        tandem.controller().delete_volume(delete_volume.clone()).await.map(drop).expect_err("not known"),
        tandem.controller().delete_snapshot(delete_snapshot.clone()).await.map(drop).expect_err("not known"),
        tandem.node().node_stage_volume(stage).await.map(drop).expect_err("not known"),
    ];
    for refused in refusals {
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
        assert!(refused.message().contains("second"), "{refused}");
    }
    let never = csi::DeleteVolumeRequest { volume_id: "never-heard-of".to_owned(), ..Default::default() };
    tandem.controller().delete_volume(never).await.expect("it cannot be anywhere");
    drop(lock);
    assert_eq!(byte(&far_device, 0), 2, "it waited for its pool");
    // Its volumes are known a moment after its devices answer.
    let deleted = insist(|| async { tandem.controller().delete_volume(delete_volume.clone()).await }).await;
    deleted.expect("deleted");
    let deleted = insist(|| async { tandem.controller().delete_snapshot(delete_snapshot.clone()).await }).await;
    deleted.expect("deleted");
    assert_eq!(tandem.attach(&far).await, far_device);
    for volume in [near, far] {
        tandem.detach(&volume).await;
    }
}

/// A creation that was cut off and repeated may leave two copies that name one volume.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_copy_never_takes_the_place_of_one_with_data() {
    let mut tandem = Installation::start(&[]).await;
    let volume = tandem.create("twice", 64 << 20, &[]).await;
    tandem.terminate();
    let trees = tandem.dir().join("pool/trees");
    let first = std::fs::read_dir(&trees).expect("readable").flatten().next().expect("a copy").path();
    // Before it and behind it in every order.
    for other in ["00000000-0000-4000-8000-000000000001", "ffffffff-ffff-4fff-bfff-ffffffffffff"] {
        let copied = std::process::Command::new("cp").arg("-a").arg(&first).arg(trees.join(other)).status();
        assert!(copied.expect("cp").success());
    }
    for round in 1..4 {
        tandem.start_again().await;
        let device = tandem.attach(&volume).await;
        assert_eq!(byte(&device, 0), round - 1);
        fill(&device, 0, round);
        tandem.detach(&volume).await;
        let pools = tandem.control().list_pools(tandem::rpc::control::ListPoolsRequest {}).await.expect("pools");
        let problem = &pools.get_ref().pools[0].problem;
        assert!(problem.contains("2 copies") && problem.contains(&volume), "{problem}");
        tandem.terminate();
    }
}

/// Tells the child below that it is one.
const LEASHED: &str = "TANDEM_TEST_LEASHED";

/// Of the tests: whatever ends them, they leave nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_test_that_is_killed_leaves_no_process_device_or_directory() {
    if std::env::var_os(LEASHED).is_some() {
        let tandem = Installation::start(&[]).await;
        let volume = tandem.create("pvc-leashed", 64 << 20, &[]).await;
        tandem.attach(&volume).await;
        println!("leashed {volume} {}", tandem.dir().display());
        // Until it is killed, or whoever was to do that is gone.
        std::io::stdin().lines().for_each(drop);
        return;
    }
    let mut command = std::process::Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "a_test_that_is_killed_leaves_no_process_device_or_directory", "--nocapture"]);
    command.env(LEASHED, "1").stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("this program");
    let lines = std::io::BufReader::new(child.stdout.take().expect("piped"));
    let said = lines.lines().map_while(Result::ok).find_map(|line| Some(line.split_once("leashed ")?.1.to_owned()));
    child.kill().expect("our own child");
    child.wait().expect("our own child");
    let said = said.expect("what it made");
    let (volume, dir) = said.split_once(' ').expect("two words");
    let dir = std::path::Path::new(dir);
    until("the end of what it left", async || {
        let roles = ["replica", "csi", "holder"];
        !dir.exists() && devices_of(volume) == 0 && roles.iter().all(|role| pids(dir, role).is_empty())
    })
    .await;
}
