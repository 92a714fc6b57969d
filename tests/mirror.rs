//! Mirrored volumes: engines with their own stores, connected over loopback. Needs root, /dev/fuse and loop devices.

#[path = "mirror/catalogue.rs"]
mod catalogue;
#[path = "mirror/lab.rs"]
mod lab;
#[path = "mirror/node.rs"]
mod node;
#[path = "mirror/relay.rs"]
mod relay;
#[path = "engine/rig.rs"]
mod rig;

use lab::{CHILD, Lab, Stop, both_up_to_date, check, compare, content, until, write};
use node::Node;
use relay::Relay;
use rig::runtime;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tandem::replica::device::loop_device;
use tandem::replica::engine::{CopyState, IoChoice, MirrorInput};
use tandem::store::{Control, Directory, PENDING_BYTES, Pending, Store};
use tandem::volume::{InstanceId, SnapshotId};

const MIB: u64 = 1 << 20;
/// Blocks of the volumes of most tests.
const BLOCKS: u64 = 64 * MIB / 4096;

/// A clone is made in a tree that an earlier engine may have closed.
#[test]
fn a_copy_that_has_never_acted_has_lost_nothing_whoever_had_its_tree_before() {
    let lab = Lab::new(64 * MIB).with_candidate();
    runtime().block_on(async {
        for (life, intact) in [("the first", true), ("the second", false)] {
            let one = Node::start_unknowing(&lab.directory(0)).await;
            assert_eq!(one.status().await.intact, intact, "{life}");
            one.stop().await;
        }
    });
}

/// Not a test of its own: the holder that the tests below start.
#[test]
fn holder_process() {
    rig::be_the_holder();
}

/// Not a test of its own: the node that the tests below kill.
#[test]
fn node_process() {
    let Some(directory) = std::env::var_os(CHILD) else { return };
    let directory = Path::new(&directory);
    runtime().block_on(async {
        let node = Node::start(directory).await;
        until("its copy to serve", async || node.status().await.serves.then_some(())).await;
        let device = node.handle.attach(node.tree, node.volume).await.expect("a device");
        std::fs::write(directory.join("device.new"), device.display().to_string()).expect("write");
        std::fs::rename(directory.join("device.new"), directory.join("device")).expect("rename");
        std::future::pending::<()>().await;
    });
}

fn attached(lab: Lab, test: impl AsyncFnOnce(&Lab, Node, Node, &Path)) {
    runtime().block_on(async {
        let (one, two) = lab.start_both().await;
        let device = one.handle.attach(one.tree, one.volume).await.expect("a device");
        test(&lab, one, two, &device).await;
    });
}

async fn end(one: Node, two: Node) {
    one.handle.detach(one.volume).await.expect("detaches");
    one.stop().await;
    two.stop().await;
}

async fn carries_data_on_both(_: &Lab, one: Node, two: Node, device: &Path) {
    write(device, 0..3000, 1).await;
    write(device, (0..3000).step_by(7), 2).await;
    let path = device.display().to_string();
    tokio::task::spawn_blocking(move || rig::run("blkdiscard", &["-o", "4096000", "-l", "2097152", &path]))
        .await
        .expect("discarded");
    let device = device.to_path_buf();
    let job = tokio::task::spawn_blocking(move || {
        let arguments =
            ["--rw=randwrite", "--bsrange=4k-1m", "--iodepth=16", "--size=24m", "--offset=32m", "--fsync=32"];
        rig::succeeds(rig::fio(&device, &arguments));
    });
    job.await.expect("verified");
    assert!(compare(&one, &two).await > 3000, "the test shows something");
    end(one, two).await;
}

#[test]
fn what_is_written_at_the_primary_is_on_both_copies() {
    attached(Lab::new(64 * MIB), carries_data_on_both);
}

#[test]
fn what_is_written_at_the_primary_is_on_both_copies_over_tls() {
    attached(Lab::new(64 * MIB).with_certificates(), carries_data_on_both);
}

/// What is in the tree's files alone: nothing of what the holder keeps in memory.
fn on_disk(lab: &Lab, number: usize) -> (u64, Store) {
    let to = lab.directory(number).join("found");
    rig::run(
        "cp",
        &[
            "-r",
            "--sparse=always",
            &lab.directory(number).join("tree").display().to_string(),
            &to.display().to_string(),
        ],
    );
    let memory = tandem::memory::Memory::zeros(PENDING_BYTES).expect("memory");
    let store = Store::open(Arc::new(Directory::new(&to)), Pending::over(memory)).expect("opens");
    let info = store.volumes().into_iter().find(|info| info.volume == lab.volume).expect("the volume");
    (info.allocated_blocks, store)
}

#[test]
fn a_flush_is_on_stable_media_of_both() {
    attached(Lab::new(64 * MIB), async |lab, one, two, device| {
        write(device, 100..600, 1).await;
        for number in 0..2 {
            let (blocks, store) = on_disk(lab, number);
            assert_eq!(blocks, 500, "copy {number}: its map has what was flushed");
            let mirrored = store.mirrored(lab.volume).expect("a record");
            assert!(!mirrored.hot.is_empty(), "a mark is durable before the write");
        }
        end(one, two).await;
    });
}

#[test]
fn a_snapshot_is_the_same_on_both_copies() {
    attached(Lab::new(64 * MIB), async |_, one, two, device| {
        let stop = Stop::default();
        let (path, ended) = (device.to_path_buf(), Arc::clone(&stop.0));
        let writer = tokio::task::spawn_blocking(move || {
            let file = File::options().write(true).open(&path).expect("the device");
            let mut round = 0;
            while !ended.load(Ordering::SeqCst) {
                round += 1;
                for block in (0..400).map(|n| n * 37 % BLOCKS) {
                    file.write_all_at(&content(block, round), block * 4096).expect("writes");
                }
                file.sync_data().expect("flushes");
            }
        });
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            compare(&one, &two).await;
        }
        drop(stop);
        writer.await.expect("no error");
        let seal = Control::Seal { volume: two.volume, snapshot: SnapshotId::random(), created_ms: 1 };
        let refused = two.handle.control(two.tree, seal).await.expect_err("only the primary seals");
        assert!(refused.to_string().contains("not its primary"), "{refused}");
        end(one, two).await;
    });
}

#[test]
fn the_secondary_takes_over_and_has_everything_acknowledged() {
    let mut lab = Lab::new(64 * MIB);
    runtime().block_on(async {
        let two = lab.start(1).await;
        let device = lab.start_child();
        write(&device, 0..2000, 3).await;
        lab.kill_node();
        lab.wish(Some(1));
        until("the second copy to serve", async || two.status().await.serves.then_some(())).await;
        let device = two.handle.attach(two.tree, two.volume).await.expect("a device");
        check(&device, 0..2000, 3).await;
        write(&device, 500..600, 4).await;
        let status = two.status().await;
        assert_eq!(status.copies[&lab.copies[0]].state, CopyState::Outdated);
        two.handle.detach(two.volume).await.expect("detaches");
        two.stop().await;
    });
}

#[test]
fn an_engine_that_is_killed_goes_on_mirrored() {
    let mut lab = Lab::new(64 * MIB);
    runtime().block_on(async {
        let two = lab.start(1).await;
        let device = lab.start_child();
        let stop = Stop::default();
        let (path, ended) = (device.clone(), Arc::clone(&stop.0));
        let load = tokio::task::spawn_blocking(move || {
            let seconds = ["--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--size=32m", "--verify_backlog=64"];
            let mut rounds = 0;
            while !ended.load(Ordering::SeqCst) {
                rig::succeeds(rig::fio(&path, &seconds));
                rounds += 1;
            }
            rounds
        });
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            lab.kill_child();
            assert_eq!(lab.start_child(), device, "the device is the same");
        }
        drop(stop);
        assert!(load.await.expect("no error") > 0);
        write(&device, 0..100, 9).await;
        // The first node's engine ends, its copy goes on in this process.
        lab.kill_child();
        let one = lab.start(0).await;
        both_up_to_date(&one, &two).await;
        assert_eq!(one.handle.attach(one.tree, one.volume).await.expect("a device"), device);
        check(&device, 0..100, 9).await;
        assert!(compare(&one, &two).await > 1000);
        end(one, two).await;
    });
}

#[test]
fn a_silent_member_is_dropped_and_comes_back_by_what_differs() {
    attached(Lab::new(2600 * MIB), async |lab, one, two, device| {
        // Few extents, which stay hot: of the volume only these are looked at, and what was written since.
        write(device, (0..8).map(|extent| extent * 1024), 1).await;
        write(device, [5], 2).await;
        two.stop().await;
        write(device, [9, 700 * 64, 701 * 64], 3).await;
        let status = one.status().await;
        assert!(
            !status.configuration.is_member(lab.copies[1]),
            "it is out before anything is acknowledged: {status:?}"
        );
        assert_eq!(status.copies[&lab.copies[1]].state, CopyState::Outdated);
        let hot = status.hot_extents as u64;
        let two = lab.start(1).await;
        both_up_to_date(&one, &two).await;
        let (copied, equal) = (one.status().await.copied_bytes, one.status().await.equal_bytes);
        assert!((3 * 4096..MIB).contains(&copied), "three blocks differ, and {copied} bytes were copied");
        assert!(equal > 0 && equal <= (hot + 1) * 4 * MIB, "{equal} bytes, {hot} hot extents");
        check(device, [9, 700 * 64, 701 * 64], 3).await;
        assert_eq!(compare(&one, &two).await, 12);
        end(one, two).await;
    });
}

/// It keeps its caches: of all extents that are hot, only those are compared where a write was under way when it left.
#[test]
fn a_member_that_was_cut_off_is_compared_only_where_it_had_not_answered() {
    attached(Lab::new(64 * MIB), async |lab, one, two, device| {
        write(device, (0..8).map(|extent| extent * 1024), 1).await;
        two.isolated.store(true, Ordering::SeqCst);
        until("its driver to end its conversations", async || two.cut_off.load(Ordering::SeqCst).then_some(())).await;
        write(device, [9, 5 * 1024 + 1, 7 * 1024], 2).await;
        let status = one.status().await;
        assert!(!status.configuration.is_member(lab.copies[1]) && status.hot_extents >= 8, "{status:?}");
        two.isolated.store(false, Ordering::SeqCst);
        both_up_to_date(&one, &two).await;
        let (copied, equal) = (one.status().await.copied_bytes, one.status().await.equal_bytes);
        assert!((3 * 4096..MIB).contains(&copied), "three blocks differ, and {copied} bytes were copied");
        assert!(equal > 0 && equal < 3 * 4 * MIB, "{equal} bytes of the three extents were compared and are equal");
        check(device, [9, 5 * 1024 + 1, 7 * 1024], 2).await;
        assert_eq!(compare(&one, &two).await, 10);
        end(one, two).await;
    });
}

#[test]
fn a_damaged_frame_is_never_written() {
    let lab = Lab::new(64 * MIB);
    runtime().block_on(async {
        let relays = [Relay::before(&lab, 0).await, Relay::before(&lab, 1).await];
        let (one, two) = lab.start_both().await;
        let device = one.handle.attach(one.tree, one.volume).await.expect("a device");
        write(&device, 0..512, 1).await;
        for round in 2..6 {
            relays.iter().for_each(Relay::flip_one);
            write(&device, 0..512, round).await;
        }
        let flipped: u64 = relays.iter().map(Relay::flipped).sum();
        assert!(flipped >= 4, "{flipped} blocks were damaged");
        both_up_to_date(&one, &two).await;
        check(&device, 0..512, 5).await;
        assert_eq!(compare(&one, &two).await, 512);
        end(one, two).await;
    });
}

/// More than may wait for a peer, so that the transport refuses some of it.
#[test]
fn what_a_full_queue_refuses_is_said_again() {
    let lab = Lab::new(128 * MIB);
    runtime().block_on(async {
        let relays = [Relay::before(&lab, 0).await, Relay::before(&lab, 1).await];
        let (one, two) = lab.start_both().await;
        let device = one.handle.attach(one.tree, one.volume).await.expect("a device");
        for round in 0..3 {
            relays.iter().for_each(|relay| relay.stand(true));
            let path = device.clone();
            let load = tokio::task::spawn_blocking(move || {
                rig::succeeds(rig::fio(&path, &["--rw=write", "--bs=1m", "--iodepth=40", "--size=96m"]));
            });
            // Shorter than a silence.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            assert!(!load.is_finished(), "round {round}: nothing is acknowledged by one copy alone");
            relays.iter().for_each(|relay| relay.stand(false));
            load.await.expect("verified");
        }
        let configuration = one.status().await.configuration;
        assert!(configuration.is_member(two.tree), "nobody was dropped for being slow: {configuration:?}");
        assert_eq!(compare(&one, &two).await, 96 * 256);
        end(one, two).await;
    });
}

/// Its flush before leaving failed at once, and was repeated within the same turn of the engine, which answered nobody any more.
#[test]
fn a_copy_whose_log_has_failed_does_not_occupy_its_engine() {
    let lab = Lab::new(64 * MIB).with_candidate();
    runtime().block_on(async {
        let one = lab.start(0).await;
        until("the copy to serve", async || one.status().await.serves.then_some(())).await;
        let device = one.handle.attach(one.tree, one.volume).await.expect("a device");
        let _unwritable = lab.unwritable(0, ["log-a", "log-b"]);
        let path = device.clone();
        let flushed = tokio::task::spawn_blocking(move || {
            let file = File::options().write(true).open(&path).expect("the device");
            file.write_all_at(&content(0, 1), 0).and_then(|()| file.sync_all())
        });
        assert!(flushed.await.expect("answered").is_err(), "the log has failed");
        lab.wish(None);
        until("the copy to hear that it shall leave", async || {
            let status = tokio::time::timeout(Duration::from_secs(60), one.status()).await;
            let wish = status.expect("the engine answers").wish;
            wish.is_some_and(|wish| wish.primary.is_none()).then_some(())
        })
        .await;
        // Another turn of the engine.
        let status = tokio::time::timeout(Duration::from_secs(60), one.status()).await.expect("the engine answers");
        assert!(status.serves, "it cannot leave without a flush: {status:?}");
    });
}

#[test]
fn the_old_primary_is_fenced() {
    attached(Lab::new(64 * MIB), async |lab, one, two, device| {
        write(device, 0..200, 1).await;
        one.isolated.store(true, Ordering::SeqCst);
        let cut_off = async || one.cut_off.load(Ordering::SeqCst).then_some(());
        until("its driver to end its conversations", cut_off).await;
        let path = device.to_path_buf();
        let late = tokio::task::spawn_blocking(move || {
            let file = File::options().write(true).open(&path).expect("the device");
            file.write_all_at(&content(3, 2), 3 * 4096).and_then(|()| file.sync_all())
        });
        lab.wish(Some(1));
        until("the second copy to serve", async || two.status().await.serves.then_some(())).await;
        assert!(!late.is_finished(), "nobody has answered what the old primary could not replicate");
        one.isolated.store(false, Ordering::SeqCst);
        let error = late.await.expect("no panic").expect_err("the old primary does not acknowledge it");
        assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}");
        assert!(!one.handle.health(one.volume).disk_failed, "its disk is not to blame");
        both_up_to_date(&two, &one).await;
        one.handle.detach(one.volume).await.expect("detaches");
        let device = two.handle.attach(two.tree, two.volume).await.expect("a device");
        check(&device, 0..200, 1).await;
        assert_eq!(compare(&two, &one).await, 200);
        end(two, one).await;
    });
}

/// Its user was idle, so nothing that it asked was answered with an error; what it wrote later landed on newer writes.
#[test]
fn a_device_that_outlived_another_primary_is_never_served_again() {
    attached(Lab::new(64 * MIB), async |lab, one, two, device| {
        write(device, 0..10, 1).await;
        let old = File::options().write(true).open(device).expect("the device");
        lab.wish(Some(1));
        until("the second copy to serve", async || two.status().await.serves.then_some(())).await;
        let elsewhere = two.handle.attach(two.tree, two.volume).await.expect("a device");
        write(&elsewhere, 0..10, 2).await;
        two.handle.detach(two.volume).await.expect("detaches");
        lab.wish(Some(0));
        until("the first copy to serve again", async || one.status().await.serves.then_some(())).await;
        let late = move || old.write_all_at(&content(3, 3), 3 * 4096).and_then(|()| old.sync_all());
        let late = tokio::task::spawn_blocking(late).await.expect("no panic");
        assert_eq!(late.expect_err("it is not served").raw_os_error(), Some(nix::libc::EIO));
        let again = one.handle.attach(one.tree, one.volume).await.expect("another device");
        check(&again, 0..10, 2).await;
        both_up_to_date(&one, &two).await;
        assert_eq!(compare(&one, &two).await, 10);
        end(one, two).await;
    });
}

/// The volume was published at a node without a copy while the engine was down, and its device was still there: what that was
/// asked went over what the other node had written.
#[test]
fn a_device_that_outlived_its_engine_gives_way_to_a_client_that_was_named_meanwhile() {
    let mut lab = Lab::new(64 * MIB);
    runtime().block_on(async {
        let two = lab.start(1).await;
        let device = lab.start_child();
        write(&device, 0..10, 1).await;
        lab.kill_child();
        lab.catalogue.set_client(Some(InstanceId::random()));
        let path = device.clone();
        let late = tokio::task::spawn_blocking(move || {
            let file = File::options().write(true).open(&path).expect("the device");
            file.write_all_at(&content(3, 2), 3 * 4096).and_then(|()| file.sync_all())
        });
        let one = lab.start(0).await;
        both_up_to_date(&one, &two).await;
        let error = late.await.expect("no panic").expect_err("another node uses the volume");
        assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}");
        let snapshot = SnapshotId::random();
        let seal = Control::Seal { volume: one.volume, snapshot, created_ms: 1 };
        one.handle.control(one.tree, seal).await.expect("seals");
        for node in [&one, &two] {
            let found = node.contents(snapshot).await;
            assert_eq!((found.len(), found[&3]), (10, crc32c::crc32c(&content(3, 1))));
        }
        end(one, two).await;
    });
}

#[test]
fn an_attached_volume_becomes_mirrored_online() {
    let lab = Lab::new(64 * MIB).with_candidate();
    runtime().block_on(async {
        let started = rig::start_engine(&lab.directory(0), IoChoice::Auto, 64 * MIB).await;
        let device = started.handle.attach(started.tree, started.volume).await.expect("a device");
        write(&device, 0..4000, 1).await;
        let path = device.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let file = File::options().write(true).open(&path).expect("the device");
            for round in 2..12 {
                for block in (0..8000).step_by(13) {
                    file.write_all_at(&content(block, round), block * 4096).expect("writes");
                }
                file.sync_all().expect("flushes");
            }
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        let one = Node::open(&lab.directory(0), started).await;
        let two = lab.start(1).await;
        both_up_to_date(&one, &two).await;
        writer.await.expect("no error");
        check(&device, (0..8000).step_by(13), 11).await;
        check(&device, (1..4000).step_by(13), 1).await;
        assert!(compare(&one, &two).await >= 4000);
        end(one, two).await;
    });
}

#[test]
fn a_mirrored_volume_grows_and_its_device_comes_and_goes() {
    attached(Lab::new(64 * MIB), async |_, one, two, device| {
        write(device, 0..10, 1).await;
        for node in [&two, &one] {
            let size = rig::size(128 * MIB);
            node.handle.control(node.tree, Control::Resize { volume: node.volume, size }).await.expect("grows");
        }
        let beyond = BLOCKS * 4096;
        assert_eq!(
            one.status().await.size,
            rig::size(64 * MIB),
            "its copy is larger, and nobody has said that both are"
        );
        one.handle.resized(one.volume).await.expect("nothing to do");
        let refused =
            File::options().write(true).open(device).expect("the device").write_all_at(&content(1, 1), beyond);
        assert_eq!(refused.expect_err("past the end").raw_os_error(), Some(nix::libc::ENOSPC));
        one.handle.tell_mirror(one.volume, MirrorInput::Size(rig::size(128 * MIB))).await.expect("told");
        // What was read from the catalogue earlier.
        one.handle.tell_mirror(one.volume, MirrorInput::Size(rig::size(64 * MIB))).await.expect("told");
        one.handle.resized(one.volume).await.expect("grows");
        write(device, BLOCKS..BLOCKS + 100, 2).await;
        one.handle.detach(one.volume).await.expect("detaches");
        assert_eq!(loop_device::find_any(one.volume), None);
        assert!(one.status().await.serves, "its core stays");
        let device = one.handle.attach(one.tree, one.volume).await.expect("a device");
        check(&device, BLOCKS..BLOCKS + 100, 2).await;
        assert_eq!(compare(&one, &two).await, 110);
        end(one, two).await;
    });
}
