//! A pool that is full: writes wait and say so, go on when space is freed, and the neighbour is undamaged. Needs root.

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use support::installation::Installation;
use support::small_pool::SmallPool;
use tandem::memory::Memory;
use tandem::rpc::{control, csi};

const MIB: usize = 1 << 20;
/// Of the pool's filesystem.
const POOL_MIB: usize = 512;
/// Of each volume: with overcommit 3 all of them are promised, and each copy keeps up to 64 MiB zeroed ahead.
const VOLUME_MIB: usize = 256;
const NEIGHBOUR_MIB: usize = 64;
const IN_THE_WAY_MIB: usize = 128;
/// How long the pool may take to fill or to be emptied.
const PATIENCE: Duration = Duration::from_secs(300);

fn open(device: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("device")
}

/// Any MiB has a content of its own.
fn content(seed: u8, at: usize) -> Memory {
    let mut chunk = Memory::zeros(MIB).expect("memory");
    for (number, block) in chunk.bytes_mut().chunks_mut(4096).enumerate() {
        block.fill(seed ^ (at as u8).wrapping_mul(31) ^ (number as u8).wrapping_mul(7) | 1);
    }
    chunk
}

fn fill(device: &Path, seed: u8, count: usize) -> std::io::Result<()> {
    let file = open(device);
    for at in 0..count {
        file.write_all_at(content(seed, at).bytes(), (at * MIB) as u64)?;
    }
    file.sync_data()
}

fn check(device: &Path, seed: u8, count: usize) {
    let file = open(device);
    let mut found = Memory::zeros(MIB).expect("memory");
    for at in 0..count {
        file.read_exact_at(found.bytes_mut(), (at * MIB) as u64).expect("read");
        assert!(found.bytes() == content(seed, at).bytes(), "MiB {at} of {} is damaged", device.display());
    }
}

/// Reasons of a volume's health, as `tandem volume show -o json` says them.
fn shown(tandem: &Installation, volume: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    let output = command.args(["volume", "show", volume, "-o", "json", "--dir"]).arg(tandem.dir()).output();
    let output = output.expect("tandem runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A free port of this machine: whoever takes it in between makes the start fail, with a message that says so.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

fn scrape(port: u16) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("metrics");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: tandem\r\nconnection: close\r\n\r\n").expect("request");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answer");
    text
}

async fn health(tandem: &Installation, volume: &str) -> Vec<String> {
    let request = control::GetVolumeRequest { volume_id: volume.to_owned() };
    let volume = tandem.control().get_volume(request).await.expect("volume").into_inner();
    volume.health.into_iter().map(|health| health.reason).collect()
}

/// Nobody gets as much as a block any more.
fn take_the_last_block(pool: &Path) -> std::path::PathBuf {
    let path = pool.join("in-the-way");
    let file = OpenOptions::new().create_new(true).write(true).custom_flags(libc::O_DSYNC).open(&path).expect("a name");
    let mut end = 0;
    for bytes in [MIB, 4096] {
        let zeros = vec![0; bytes];
        while file.write_all_at(&zeros, end).is_ok() {
            end += bytes as u64;
        }
    }
    path
}

async fn nothing_is_made(tandem: &Installation, pool: &Path) {
    let trees = || std::fs::read_dir(pool.join("trees")).expect("readable").count();
    let before = trees();
    let refused = tandem.create_from("late", (16 * MIB) as i64, &[], None).await.expect_err("no space for it");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    assert_eq!(trees(), before, "nothing is left of it");
}

/// The next one comes up on the full pool, with every device; writes wait again.
async fn kill_the_engine(tandem: &Installation, waiting: &str) {
    let killed = tandem.pids("replica");
    for pid in &killed {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
    }
    until("its end", async || tandem.pids("replica").iter().all(|pid| !killed.contains(pid))).await;
    until("the next engine", async || has_volume(tandem, waiting).await).await;
    until("PoolFull again", async || health(tandem, waiting).await.contains(&"PoolFull".to_owned())).await;
}

async fn has_volume(tandem: &Installation, volume: &str) -> bool {
    let request = control::GetVolumeRequest { volume_id: volume.to_owned() };
    tandem.control().get_volume(request).await.is_ok()
}

async fn promised(tandem: &Installation) -> u64 {
    let pools = tandem.control().list_pools(control::ListPoolsRequest {}).await.expect("pools").into_inner();
    pools.pools[0].promised_bytes
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = std::time::Instant::now();
    while !condition().await {
        assert!(began.elapsed() < PATIENCE, "{what} does not come");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn delete(tandem: &Installation, volume: &str) {
    let request = csi::DeleteVolumeRequest { volume_id: volume.to_owned(), ..Default::default() };
    tandem.controller().delete_volume(request).await.expect("deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_to_a_full_pool_wait_say_so_and_go_on_when_something_is_deleted() {
    let pool = SmallPool::ext4(POOL_MIB);
    let port = free_port();
    let (argument, address) = (format!("default={}", pool.path().display()), format!("127.0.0.1:{port}"));
    let tandem = Installation::start(&["--pool", &argument, "--overcommit", "3", "--metrics", &address]).await;
    let mut volumes = Vec::new();
    for name in ["neighbour", "in-the-way", "filler"] {
        let id = tandem.create(name, (VOLUME_MIB * MIB) as i64, &[]).await;
        volumes.push((tandem.attach(&id).await, id));
    }
    // Should the test fail, its devices are found by what is here.
    std::os::unix::fs::symlink(pool.path(), tandem.dir().join("pool")).expect("a link");
    let [(neighbour_device, neighbour), (way_device, in_the_way), (filler_device, filler)] =
        volumes.try_into().expect("three");
    fill(&neighbour_device, 1, NEIGHBOUR_MIB).expect("it fits");
    fill(&way_device, 2, IN_THE_WAY_MIB).expect("it fits");
    let snapshot = tandem.snapshot("in-the-way", &in_the_way).await.expect("snapshot");
    let writer = tokio::task::spawn_blocking({
        let device = filler_device.clone();
        move || fill(&device, 3, VOLUME_MIB)
    });
    until("PoolFull", async || health(&tandem, &filler).await.contains(&"PoolFull".to_owned())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!writer.is_finished(), "a write to a full pool waits");
    let text = shown(&tandem, &filler);
    assert!(text.contains("PoolFull") && text.contains("inaccessible"), "{text}");
    let metrics = scrape(port);
    let line = metrics.lines().find(|line| line.contains(&filler) && line.contains("PoolFull"));
    assert!(line.is_some_and(|line| line.ends_with(" 1")), "{line:?} of\n{metrics}");
    // What is there can be read and overwritten while the pool is full.
    check(&neighbour_device, 1, NEIGHBOUR_MIB);
    fill(&neighbour_device, 4, 8).expect("overwritten in place");
    let left = take_the_last_block(pool.path());
    nothing_is_made(&tandem, pool.path()).await;
    kill_the_engine(&tandem, &filler).await;
    assert!(!writer.is_finished(), "a write to a full pool waits");
    check(&neighbour_device, 4, 8);
    std::fs::remove_file(left).expect("it is ours");
    tandem.detach(&in_the_way).await;
    delete(&tandem, &in_the_way).await;
    let gone = csi::DeleteSnapshotRequest { snapshot_id: snapshot, ..Default::default() };
    tandem.controller().delete_snapshot(gone).await.expect("deleted");
    until("the end of the writes", async || writer.is_finished()).await;
    writer.await.expect("no panic").expect("they waited and went on: no error");
    until("health", async || !health(&tandem, &filler).await.contains(&"PoolFull".to_owned())).await;
    check(&filler_device, 3, VOLUME_MIB);
    check(&neighbour_device, 4, 8);
    assert!(
        !health(&tandem, &neighbour).await.iter().any(|reason| reason == "DiskFailed" || reason == "DamagedBlocks")
    );
    for volume in [&neighbour, &filler] {
        tandem.detach(volume).await;
        delete(&tandem, volume).await;
    }
    drop(tandem);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_promised_without_overcommit_can_be_written_to_the_last_block() {
    const EACH_MIB: usize = 96;
    let pool = SmallPool::ext4(POOL_MIB);
    let argument = format!("default={}", pool.path().display());
    let tandem = Installation::start(&["--pool", &argument]).await;
    std::os::unix::fs::symlink(pool.path(), tandem.dir().join("pool")).expect("a link");
    let mut volumes = Vec::new();
    while let Ok(id) = tandem.create_from(&format!("full-{}", volumes.len()), (EACH_MIB * MIB) as i64, &[], None).await
    {
        let device = tandem.attach(&id).await;
        volumes.push((id, device));
    }
    assert!(volumes.len() >= 3, "{} volumes of {EACH_MIB} MiB in {POOL_MIB} MiB", volumes.len());
    for (seed, (id, device)) in (1..).zip(&volumes) {
        let writer = tokio::task::spawn_blocking({
            let device = device.clone();
            move || fill(&device, seed, EACH_MIB)
        });
        while !writer.is_finished() {
            assert!(!health(&tandem, id).await.contains(&"PoolFull".to_owned()), "volume {seed} of {}", volumes.len());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        writer.await.expect("no panic").expect("it was promised");
    }
    for (seed, (id, device)) in (1..).zip(&volumes) {
        check(device, seed, EACH_MIB);
        tandem.detach(id).await;
    }
}

/// It would fit beside its source if it shared nothing with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_does_not_fit_leaves_nothing_in_its_source() {
    const EACH_MIB: usize = 160;
    let pool = SmallPool::ext4(POOL_MIB);
    let argument = format!("default={}", pool.path().display());
    let tandem = Installation::start(&["--pool", &argument]).await;
    std::os::unix::fs::symlink(pool.path(), tandem.dir().join("pool")).expect("a link");
    let id = tandem.create("source", (EACH_MIB * MIB) as i64, &[]).await;
    let device = tandem.attach(&id).await;
    fill(&device, 1, EACH_MIB).expect("it fits");
    let before = promised(&tandem).await;
    let source = csi::volume_content_source::VolumeSource { volume_id: id.clone() };
    let source = Some(csi::volume_content_source::Type::Volume(source));
    let refused = tandem.create_from("clone", (EACH_MIB * MIB) as i64, &[], source).await.expect_err("it does not fit");
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
    assert_eq!(promised(&tandem).await, before);
    let request = control::GetVolumeRequest { volume_id: id.clone() };
    let layers = tandem.control().get_volume(request).await.expect("volume").into_inner().layers;
    assert_eq!(layers, 1, "it was never sealed");
    tandem.detach(&id).await;
    delete(&tandem, &id).await;
}
