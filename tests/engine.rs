//! The engine with a real store on the kernel's FUSE and loop drivers. Needs root, /dev/fuse, fio and mkfs.ext4.

#[path = "engine/oracle.rs"]
mod oracle;
#[path = "engine/rig.rs"]
mod rig;

use rig::{Place, SIZE, Up, bring_up, fio, run, runtime, size, succeeds};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tandem::replica::device::loop_device;
use tandem::replica::engine::{DetachError, Direction, EngineError, IoChoice};
use tandem::store::Control;
use tandem::volume::SnapshotId;

/// Not a test of its own: the holder that the tests below start.
#[test]
fn holder_process() {
    rig::be_the_holder();
}

/// Not a test of its own: the engine that the tests below kill.
#[test]
fn engine_process() {
    rig::be_the_engine();
}

fn with_engine(io: IoChoice, test: impl AsyncFnOnce(Up)) {
    let place = Place::new();
    runtime().block_on(async {
        let up = bring_up(place.path(), io).await;
        test(up).await;
    });
}

fn device_size(device: &Path) -> u64 {
    File::open(device).and_then(|mut file| file.seek(SeekFrom::End(0))).expect("a device")
}

async fn carries_verified_data(up: Up) {
    let (device, handle) = (up.device.clone(), up.handle.clone());
    assert_eq!(device_size(&device), SIZE);
    assert_eq!(handle.attach(up.tree, up.volume).await.expect("again"), device, "attaching is idempotent");
    let path = device.clone();
    let job = tokio::task::spawn_blocking(move || {
        succeeds(fio(&path, &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=32m"]));
        succeeds(fio(&path, &["--rw=write", "--bs=1m", "--iodepth=8", "--size=128m"]));
        succeeds(fio(&path, &["--rw=randwrite", "--bsrange=4k-256k", "--iodepth=16", "--size=64m", "--fsync=16"]));
        // Discarded blocks read as zeros.
        let mut file = File::options().read(true).write(true).open(&path).expect("the device");
        run("blkdiscard", &["-o", "1048576", "-l", "8388608", path.to_str().expect("text")]);
        let mut block = vec![1; 8 << 20];
        file.seek(SeekFrom::Start(1 << 20)).expect("seeks");
        file.read_exact(&mut block).expect("reads");
        assert!(block.iter().all(|b| *b == 0));
    });
    // Seals while writes are under way.
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let seal = vec![(up.tree, up.volume, SnapshotId::random())];
        handle.seal_group(seal, 1).await.expect("seals");
    }
    job.await.expect("verified");
    assert_eq!(handle.inspect(up.tree, |store| store.snapshots().len()).await.expect("open"), 5);

    let resize = Control::Resize { volume: up.volume, size: size(2 * SIZE) };
    handle.control(up.tree, resize).await.expect("resizes");
    handle.resized(up.volume).await.expect("resizes");
    assert_eq!(device_size(&device), 2 * SIZE);
    let path = device.clone();
    let job = tokio::task::spawn_blocking(move || {
        let offset = format!("--offset={SIZE}");
        succeeds(fio(&path, &["--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=8m", &offset]));
    });
    job.await.expect("verified");

    let statistics = handle.statistics();
    let volume = statistics.volume(up.volume).expect("is attached");
    assert!(volume.direction(Direction::Write).requests.load(Ordering::Relaxed) > 8192);
    assert_eq!(volume.in_flight.load(Ordering::Relaxed), 0);
    assert!(matches!(handle.close_tree(up.tree).await, Err(EngineError::VolumeAttached(_))));

    let open = File::open(&device).expect("the device");
    assert!(matches!(handle.detach(up.volume).await, Err(DetachError::Busy(_))), "somebody has it open");
    drop(open);
    handle.detach(up.volume).await.expect("detaches");
    handle.detach(up.volume).await.expect("is idempotent");
    assert_eq!(loop_device::find_any(up.volume), None);
    handle.close_tree(up.tree).await.expect("closes");
}

#[test]
fn a_device_carries_verified_data_by_io_uring() {
    with_engine(IoChoice::Uring, carries_verified_data);
}

#[test]
fn a_device_carries_verified_data_by_threads() {
    with_engine(IoChoice::Threads, carries_verified_data);
}

/// Writes before a detach are there after an attach by another engine.
#[test]
fn what_was_written_survives_detach_and_the_end_of_the_engine() {
    let place = Place::new();
    runtime().block_on(async {
        let up = bring_up(place.path(), IoChoice::Auto).await;
        let device = up.device.clone();
        tokio::task::spawn_blocking(move || {
            let mut file = File::options().write(true).open(&device).expect("the device");
            file.write_all(&vec![7; 3 << 20]).expect("writes");
        })
        .await
        .expect("written");
        up.handle.detach(up.volume).await.expect("detaches");
        up.handle.close_tree(up.tree).await.expect("closes");
        drop(up);
        let up = bring_up(place.path(), IoChoice::Auto).await;
        let device = up.device.clone();
        tokio::task::spawn_blocking(move || {
            let mut found = vec![0; 3 << 20];
            File::open(&device).expect("the device").read_exact(&mut found).expect("reads");
            assert!(found.iter().all(|b| *b == 7));
        })
        .await
        .expect("read");
        up.handle.detach(up.volume).await.expect("detaches");
    });
}

/// kill -9 of the engine while fio writes and checks at depth 32. `kills` of them; returns the requests that were taken over.
fn kills_under_verify(io: IoChoice, kills: u32) -> u64 {
    let mut place = Place::new();
    if io == IoChoice::Threads {
        std::fs::write(place.path().join("threads"), "").expect("write");
    }
    let device = place.start_child();
    let seconds = format!("--runtime={}", kills + 6);
    let arguments = [
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=32",
        "--size=256m",
        "--verify_backlog=256",
        "--time_based",
        &seconds,
    ];
    let mut load = fio(&device, &arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("fio");
    let (mut recovered, mut longest) = (0, Duration::ZERO);
    for kill in 0..kills {
        std::thread::sleep(Duration::from_millis(300 + u64::from(kill * 97 % 500)));
        let began = Instant::now();
        place.kill_child();
        assert_eq!(place.start_child(), device);
        longest = longest.max(began.elapsed());
        recovered += place.recovered();
    }
    let output = wait(&mut load);
    println!("{io:?}: {kills} kills, {recovered} requests taken over, longest pause {longest:?}");
    assert!(output.is_empty(), "{output}");
    recovered
}

/// Overlapping reads, writes, discards and write-zeroes while the engine is killed.
fn kills_under_overlap(io: IoChoice, kills: u32) {
    let mut place = Place::new();
    if io == IoChoice::Threads {
        std::fs::write(place.path().join("threads"), "").expect("write");
    }
    let device = place.start_child();
    let stop = AtomicBool::new(false);
    let mut recovered = 0;
    let outcome = std::thread::scope(|scope| {
        let load = scope.spawn(|| oracle::work(&device, &stop, u64::from(kills)));
        for kill in 0..kills {
            std::thread::sleep(Duration::from_millis(200 + u64::from(kill * 61 % 300)));
            place.kill_child();
            place.start_child();
            recovered += place.recovered();
        }
        stop.store(true, Ordering::SeqCst);
        load.join().expect("no panic")
    });
    println!("{io:?}: {kills} kills, {recovered} requests taken over, {outcome:?} requests checked");
    assert!(outcome.is_ok(), "{outcome:?}");
    assert!(recovered > 0, "no request was ever taken over: the test shows nothing");
}

#[test]
fn overlapping_requests_keep_their_order_over_kills_by_io_uring() {
    kills_under_overlap(IoChoice::Uring, 15);
}

#[test]
fn overlapping_requests_keep_their_order_over_kills_by_threads() {
    kills_under_overlap(IoChoice::Threads, 8);
}

/// The end of fio, with a limit; what it said if it failed.
fn wait(load: &mut std::process::Child) -> String {
    let ended = rig::wait_for("the end of fio", || load.try_wait().expect("a child"));
    let mut text = String::new();
    if !ended.success() {
        load.stdout.take().expect("piped").read_to_string(&mut text).expect("text");
        load.stderr.take().expect("piped").read_to_string(&mut text).expect("text");
        text.push_str(&ended.to_string());
    }
    text
}

#[test]
fn a_killed_engine_costs_no_error_by_io_uring() {
    assert!(kills_under_verify(IoChoice::Uring, 20) > 0, "no request was ever taken over: the test shows nothing");
}

#[test]
fn a_killed_engine_costs_no_error_by_threads() {
    kills_under_verify(IoChoice::Threads, 10);
}

#[test]
fn idle_volumes_cost_no_wake_up() {
    with_engine(IoChoice::Uring, async |up| {
        let turns = || up.handle.statistics().turns.load(Ordering::Relaxed);
        // What mkfs or udev left to do in the background is over some time.
        for second in 0.. {
            let before = turns();
            tokio::time::sleep(Duration::from_secs(2)).await;
            let after = turns();
            if after - before <= 2 {
                break;
            }
            assert!(second < 60, "{} turns of an idle engine in two seconds", after - before);
        }
        up.handle.detach(up.volume).await.expect("detaches");
    });
}
