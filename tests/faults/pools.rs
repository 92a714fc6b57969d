//! What becomes of a mirrored volume when the pool of its secondary is full, fails, hangs, rots, or is gone.

use crate::site::{PATIENCE, Site};
use crate::small_pool::SmallPool;
use std::process::Command;

/// Of the pool of node 2: more than twice the volume.
const POOL_MIB: usize = 512;
/// What the full one has left before the copy is made: its logs, and less than the writers need.
const LEFT_MIB: u64 = 24;
/// What a replica says that finds nothing where its pool was,
const EMPTY: &str = "is empty now";
/// and where its copy was, in a pool that somebody has begun anew.
const GONE: &str = "this node's copy is gone with what it held";

/// Case 11, no space.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_pool_is_full_is_dropped_and_comes_back_when_there_is_room() {
    let pool = SmallPool::ext4(POOL_MIB);
    pool.fill(LEFT_MIB);
    let (site, _, load) = Site::under_load_with_pool(pool.path()).await;
    println!("full: dropped after {:?}", site.until_dropped(2).await);
    println!("200 writes more after {:?}", load.await_writes(200, PATIENCE));
    pool.make_room();
    println!("there is room: a member again after {:?}", site.until_whole().await);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.finish_at_each(&[1, 2]).await;
}

/// Case 11, a disk that fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_disk_fails_is_dropped_and_comes_back_with_the_disk() {
    let mut pool = SmallPool::xfs(POOL_MIB);
    let (site, _, load) = Site::under_load_with_pool(pool.path()).await;
    load.await_writes(200, PATIENCE);
    pool.fail();
    println!("failing: dropped after {:?}", site.until_dropped(2).await);
    println!("200 writes more after {:?}", load.await_writes(200, PATIENCE));
    site.cluster.run(&["kill", "all", "2"]);
    pool.mount_again();
    site.cluster.run(&["start", "all", "2"]);
    println!("the disk is well: a member again after {:?}", site.until_whole().await);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.finish_at_each(&[1, 2]).await;
}

/// Case 10, a disk: it does nothing, and its node answers heartbeats.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_disk_hangs_is_dropped_and_comes_back_when_it_goes_on() {
    let pool = SmallPool::ext4(POOL_MIB);
    let (site, _, load) = Site::under_load_with_pool(pool.path()).await;
    load.await_writes(200, PATIENCE);
    let hanging = pool.hang();
    println!("hanging: dropped after {:?}", site.until_dropped(2).await);
    println!("200 writes more after {:?}", load.await_writes(200, PATIENCE));
    drop(hanging);
    // One that was slow is left alone for a minute, unless it is started anew.
    site.cluster.run(&["kill", "replica", "2"]);
    site.cluster.run(&["start", "replica", "2"]);
    println!("going on: a member again after {:?}", site.until_whole().await);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.finish_at_each(&[1, 2]).await;
}

/// Case 18.
#[tokio::test(flavor = "multi_thread")]
async fn a_blank_disk_under_the_old_name_is_never_taken_for_a_member() {
    let (site, device, load) = Site::under_load(2).await;
    load.await_writes(200, PATIENCE);
    site.cluster.run(&["kill", "all", "2"]);
    println!("dead: dropped after {:?}", site.until_dropped(2).await);
    let node = site.cluster.dir().join("node-2");
    std::fs::remove_dir_all(node.join("pool")).expect("removed");
    site.cluster.run(&["start", "all", "2"]);
    site.until_said(2, EMPTY, 0).await;
    let force = Command::new(env!("CARGO_BIN_EXE_tandem"))
        .args(["pool", "add", "default", "--force"])
        .arg(node.join("pool"))
        .arg("--dir")
        .arg(&node)
        .status();
    assert!(force.expect("started").success());
    site.cluster.run(&["kill", "all", "2"]);
    let before = site.said(2, GONE);
    site.cluster.run(&["start", "all", "2"]);
    site.until_said(2, GONE, before).await;
    println!("200 writes more after {:?}", load.await_writes(200, PATIENCE));
    load.stop_well();
    let health = site.health().await.expect("it answers");
    assert!(health.iter().any(|message| message.contains("node-2")), "it has nothing and counts: {health:?}");
    site.check(&device).await;
    site.detach(1).await;
    if site.publish(2).await.is_ok() {
        site.stage(2).await.expect_err("there is nothing to use");
        site.detach(2).await;
    }
    site.attach(1).await;
    site.finish_at_each(&[1]).await;
}
