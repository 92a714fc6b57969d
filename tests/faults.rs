//! Mirrored volumes under load while processes and nodes die, sleep and lose each other: everything that was acknowledged is
//! there afterwards, on whichever copy. The numbers are those of the failure cases in docs/protocol.md.

#[path = "faults/anywhere.rs"]
mod anywhere;
#[path = "faults/brought.rs"]
mod brought;
#[path = "faults/changes.rs"]
mod changes;
#[path = "faults/clocks.rs"]
mod clocks;
#[path = "faults/discards.rs"]
mod discards;
#[path = "faults/hung.rs"]
mod hung;
#[path = "faults/kills.rs"]
mod kills;
#[allow(dead_code, reason = "other test programs use the rest")]
#[path = "support/leash.rs"]
mod leash;
#[path = "faults/load.rs"]
mod load;
#[path = "support/points.rs"]
mod points;
#[path = "faults/pools.rs"]
mod pools;
#[path = "faults/power.rs"]
mod power;
#[path = "faults/recovery.rs"]
mod recovery;
#[allow(dead_code, reason = "tests/cluster.rs uses the rest")]
#[path = "cluster/rig.rs"]
mod rig;
#[path = "faults/rot.rs"]
mod rot;
#[path = "faults/site.rs"]
mod site;
#[allow(dead_code, reason = "tests/full_pool.rs uses the rest")]
#[path = "support/small_pool.rs"]
mod small_pool;
#[path = "support/volatile_disk.rs"]
mod volatile_disk;

use load::Load;
use nix::sys::signal::Signal;
use site::{PATIENCE, SIZE, Site};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use tonic::Code;

/// A lease, its margin, and what a busy machine adds: after it nobody reads what nobody may write.
const LEASE_IS_OVER: Duration = Duration::from_millis(3500);
/// How often the volume is used at the other node; with what is taken back, it is published 20 times.
const MOVES: usize = 8;
/// Within which kubelet hears that a volume is unstaged, whatever became of it.
const UNSTAGE_LIMIT: Duration = Duration::from_secs(15);

/// Cases 1, 3, 19, 20.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_under_load_loses_nothing_and_comes_back_by_what_differs() {
    let (site, _, load) = Site::under_load(2).await;
    load.await_writes(500, PATIENCE);
    let load = site.outlive(1, load, 2).await;
    println!("the other node writes after {:?}", load.await_writes(200, PATIENCE));
    site.cluster.run(&["start", "all", "1"]);
    println!("a member again after {:?}", site.until_whole().await);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    // Failback: what is on the copy that came back is the same.
    site.unstage(1).await;
    site.finish_at_each(&[2, 1]).await;
}

/// Case 22.
#[tokio::test(flavor = "multi_thread")]
async fn engines_that_are_killed_under_load_cost_no_error_and_no_write() {
    let (site, _, load) = Site::under_load(2).await;
    for nodes in [&["1"][..], &["2"], &["1", "2"], &["2", "1"], &["1"], &["1", "2"]] {
        load.await_writes(200, PATIENCE);
        for node in nodes {
            site.cluster.run(&["kill", "replica", node]);
        }
        for node in nodes {
            site.cluster.run(&["start", "replica", node]);
        }
        println!("{nodes:?} killed: 200 more writes after {:?}", load.await_writes(200, PATIENCE));
    }
    println!("{} writes", load.stop_well());
    println!("all members after {:?}", site.until_whole().await);
    site.finish_at_each(&[1, 2]).await;
}

/// Case 4, with the catalogue on both sides.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_cut_off_from_the_other_copy_goes_on_without_it_by_a_committed_configuration() {
    let (site, _, load) = Site::under_load(2).await;
    for cuts in [&[["1", "2"]][..], &[["2", "1"]], &[["1", "2"], ["2", "1"]]] {
        load.await_writes(200, PATIENCE);
        for [from, to] in cuts {
            site.cluster.run(&["cut", from, to]);
        }
        println!("{cuts:?} cut: dropped after {:?}", site.until_dropped(2).await);
        println!("200 writes more after {:?}", load.await_writes(200, PATIENCE));
        let refused = site.health().await.expect("it answers");
        assert!(refused.iter().any(|message| message.contains("node-2")), "still out: {refused:?}");
        site.cluster.run(&["heal"]);
        println!("a member again after {:?}", site.until_whole().await);
    }
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.finish_at_each(&[1, 2]).await;
}

/// Case 5.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_slept_through_its_lease_answers_nothing_and_can_be_used_again() {
    let (site, _, old) = Site::under_load(2).await;
    old.await_writes(300, PATIENCE);
    site.signal(1, Signal::SIGSTOP);
    tokio::time::sleep(Duration::from_millis(500)).await;
    old.retire();
    let before = old.writes();
    site.unpublish(1).await;
    let device = site.attach(2).await;
    let began = Instant::now();
    site.check(&device).await;
    println!("readable at the other node after {:?}", began.elapsed());
    let new = Load::start(&device, &site.oracle);
    new.await_writes(300, PATIENCE);
    site.signal(1, Signal::SIGCONT);
    // Each writer tries again if its last request is answered.
    old.await_errors(PATIENCE);
    let done = old.stop();
    println!("woken: {} answers to what the other copy had confirmed", done.writes - before);
    assert_eq!(done.errors.len(), load::THREADS, "{:?}", done.errors);
    unstage_in_time(&site, 1).await;
    new.await_writes(200, PATIENCE);
    new.stop_well();
    site.until_whole().await;
    site.finish_at_each(&[2, 1]).await;
}

/// A filesystem in use: files that are synced, and pages that nobody has synced.
fn dirty(staging: &Path) {
    fs::write(staging.join("synced"), b"synced").expect("written");
    fs::File::open(staging.join("synced")).and_then(|file| file.sync_all()).expect("synced");
    for number in 0..200 {
        fs::write(staging.join(format!("dirty-{number}")), vec![7; 50_000]).expect("written");
    }
}

/// Unstages at the node within the limit.
async fn unstage_in_time(site: &Site, number: usize) {
    let began = Instant::now();
    site.unstage(number).await;
    println!("unstaged after {:?}", began.elapsed());
    assert!(began.elapsed() < UNSTAGE_LIMIT, "{:?}", began.elapsed());
}

/// Cases 5, 20.
#[tokio::test(flavor = "multi_thread")]
async fn a_filesystem_on_a_primary_that_slept_through_its_lease_is_unstaged_and_staged_again() {
    let site = Site::with_filesystem().await;
    site.attach(1).await;
    dirty(&site.staging(1));
    let refused = site.abandon(1).await.expect_err("it is served");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    site.signal(1, Signal::SIGSTOP);
    site.unpublish(1).await;
    site.attach(2).await;
    assert_eq!(fs::read(site.staging(2).join("synced")).expect("reads"), b"synced");
    fs::write(site.staging(2).join("synced"), b"newer").expect("written");
    site.signal(1, Signal::SIGCONT);
    unstage_in_time(&site, 1).await;
    assert_eq!(fs::read(site.staging(2).join("synced")).expect("reads"), b"newer");
    site.until_whole().await;
    site.detach(2).await;
    site.attach(1).await;
    assert_eq!(fs::read(site.staging(1).join("synced")).expect("reads"), b"newer");
    site.detach(1).await;
    site.finish().await;
}

/// Case 4, the primary alone: it knows neither that another one is chosen nor that none is.
#[tokio::test(flavor = "multi_thread")]
async fn a_filesystem_that_is_suspended_is_unstaged_and_its_node_can_be_used_again() {
    let site = Site::with_filesystem().await;
    site.attach(1).await;
    dirty(&site.staging(1));
    for [from, to] in [["1", "2"], ["2", "1"], ["1", "controller"], ["controller", "1"]] {
        site.cluster.run(&["cut", from, to]);
    }
    // While it may only be slow, it is waited for; the other node takes over meanwhile.
    site.unpublish(1).await;
    tokio::join!(unstage_in_time(&site, 1), async {
        site.attach(2).await;
        fs::write(site.staging(2).join("synced"), b"newer").expect("written");
    });
    site.cluster.run(&["heal"]);
    println!("a member again after {:?}", site.until_whole().await);
    site.detach(2).await;
    site.attach(1).await;
    assert_eq!(fs::read(site.staging(1).join("synced")).expect("reads"), b"newer");
    site.detach(1).await;
    site.finish().await;
}

/// Case 4, with the catalogue on neither side.
#[tokio::test(flavor = "multi_thread")]
async fn without_controller_a_volume_goes_on_and_without_the_other_copy_too_it_waits() {
    let (site, device, load) = Site::under_load(2).await;
    site.cluster.run(&["kill", "controller", "controller"]);
    println!("without controller: 500 writes in {:?}", load.await_writes(500, PATIENCE));
    site.cluster.run(&["kill", "replica", "2"]);
    let killed = Instant::now();
    let before = load.writes();
    tokio::time::sleep(LEASE_IS_OVER.saturating_sub(killed.elapsed())).await;
    let reader = site.read_first_block(&device);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // What the other copy had confirmed when it was killed may be counted late: no thread has a second one.
    assert!(load.writes() <= before + load::THREADS as u64, "nobody may acknowledge alone");
    assert!(!reader.is_finished(), "nobody may read without a lease");
    site.cluster.run(&["start", "controller", "controller"]);
    site.cluster.run(&["start", "replica", "2"]);
    println!("both are back: 200 writes after {:?}", load.await_writes(200, PATIENCE));
    reader.join().expect("no panic").expect("read in the end");
    site.until_whole().await;
    load.stop_well();
    site.finish_at_each(&[1, 2]).await;
}

/// Case 10.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_way_to_the_other_copy_makes_writes_slow_and_none_hangs() {
    let (site, _, load) = Site::under_load(2).await;
    load.await_writes(100, PATIENCE);
    site.cluster.run(&["slow", "2", "link", "100K"]);
    println!("slow: 100 writes in {:?}; {:?}", load.await_writes(100, PATIENCE), site.health().await);
    site.cluster.run(&["heal"]);
    site.until_whole().await;
    println!("fast again: 300 writes in {:?}", load.await_writes(300, PATIENCE));
    load.stop_well();
    site.finish_at_each(&[1, 2]).await;
}

/// Cases 1, 3 with three copies.
#[tokio::test(flavor = "multi_thread")]
async fn with_three_copies_each_of_the_others_has_what_a_dead_primary_acknowledged() {
    let (site, _, load) = Site::under_load(3).await;
    load.await_writes(300, PATIENCE);
    let load = site.outlive(1, load, 2).await;
    load.await_writes(200, PATIENCE);
    site.cluster.run(&["start", "all", "1"]);
    println!("three members after {:?}", site.until_whole().await);
    load.await_writes(100, PATIENCE);
    load.stop_well();
    site.unstage(1).await;
    site.finish_at_each(&[2, 3, 1]).await;
}

/// Case 15.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_moves_to_and_fro_loses_nothing_on_the_way() {
    let (site, _, load) = Site::under_load(2).await;
    load.await_writes(100, PATIENCE);
    load.stop_well();
    site.detach(1).await;
    let began = Instant::now();
    for round in 0..MOVES {
        let (here, there) = (1 + round % 2, 2 - round % 2);
        // Wishes that are taken back before, while or after they come true.
        for node in [&[][..], &[there], &[here, there], &[there, here, there]][round % 4] {
            site.published(*node).await;
            site.unpublish(*node).await;
        }
        let device = site.attach(here).await;
        let load = Load::start(&device, &site.oracle);
        load.await_writes(50, PATIENCE);
        load.stop_well();
        site.detach(here).await;
    }
    println!("{MOVES} moves in {:?}", began.elapsed());
    site.attach(1).await;
    site.until_whole().await;
    site.finish_at_each(&[1, 2]).await;
}

/// One copy, two, one and two again, and twice the size: while it is written, and no request fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_gets_and_gives_up_a_copy_and_grows_under_load() {
    let site = Site::with_one_copy(2).await;
    let device = site.attach(1).await;
    let load = Load::start(&device, &site.oracle);
    load.await_writes(300, PATIENCE);
    for wanted in ["sync", "none", "sync"] {
        site.modify(&[("replication", wanted)]).await;
        println!("{wanted}: as wanted after {:?}", site.until_whole().await);
        load.await_writes(300, PATIENCE);
    }
    site.expand(2 * SIZE, 1).await;
    load.await_writes(100, PATIENCE);
    println!("{} writes", load.stop_well());
    site.until_whole().await;
    site.check(&device).await;
    site.detach(1).await;
    let device = site.attach(2).await;
    site.check(&device).await;
    site.detach(2).await;
    site.finish().await;
}
