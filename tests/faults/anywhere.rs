//! `access: any`: the volume has its copies on nodes 1 and 2, and is used at node 3.

use crate::load::{Load, write_first_block};
use crate::site::{PATIENCE, SIZE, Site};
use std::path::Path;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_used_without_a_copy_outlives_every_engine_and_the_node_of_its_primary() {
    let site = Site::anywhere().await;
    let device = site.attach(3).await;
    let load = Load::start(&device, &site.oracle);
    // The client's engine, the primary's, the other copy's, and the first two together.
    for nodes in [&["3"][..], &["1"], &["2"], &["3", "1"]] {
        load.await_writes(100, PATIENCE);
        for node in nodes {
            site.cluster.run(&["kill", "replica", node]);
        }
        for node in nodes {
            site.cluster.run(&["start", "replica", node]);
        }
        println!("{nodes:?} killed: 100 more writes after {:?}", load.await_writes(100, PATIENCE));
    }
    site.expand(2 * SIZE, 3).await;
    site.until_whole().await;
    site.cluster.run(&["kill", "all", "1"]);
    println!("the primary's node is dead: 100 more writes after {:?}", load.await_writes(100, PATIENCE));
    site.cluster.run(&["start", "all", "1"]);
    println!("all members after {:?}", site.until_whole().await);
    load.await_writes(100, PATIENCE);
    println!("{} writes, no error", load.stop_well());
    site.detach(3).await;
    site.attach(1).await;
    site.finish_at_each(&[1, 2]).await;
}

/// What may wait for another primary.
async fn within_patience<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let done = tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(what));
    done.await.expect("it does not hang").expect("no panic")
}

/// Writes the first block and flushes it.
async fn write_and_flush(device: &Path) -> std::io::Result<()> {
    let device = device.to_path_buf();
    within_patience(move || write_first_block(&device)?.sync_data()).await
}

/// Both nodes with copies lose their caches, as far as Tandem knows.
fn copies_lose_their_caches(site: &Site) {
    for (what, number) in [("kill", "1"), ("kill", "2"), ("start", "1"), ("start", "2")] {
        site.cluster.run(&[what, "all", number]);
    }
}

/// A device beside a copy would have died with that; this one lives on, and a flush said that what was lost is durable.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_a_copy_ends_if_its_writes_may_be_lost_and_only_then() {
    let site = Site::anywhere().await;
    let device = site.attach(3).await;
    write_and_flush(&device).await.expect("it works");
    copies_lose_their_caches(&site);
    let began = Instant::now();
    write_and_flush(&device).await.expect("nothing of it is lost: it goes on");
    println!("all was flushed: it goes on after {:?}", began.elapsed());
    let written = device.clone();
    let file = within_patience(move || write_first_block(&written)).await.expect("it works");
    copies_lose_their_caches(&site);
    let began = Instant::now();
    let flushed = within_patience(move || file.sync_data()).await;
    assert_eq!(flushed.expect_err("it may be lost").raw_os_error(), Some(libc::EIO));
    println!("a write was not: the flush fails after {:?}", began.elapsed());
    site.until_said(3, "its device gets errors; unstage and stage it again", 0).await;
    site.unstage(3).await;
    let device = site.attach(3).await;
    write_and_flush(&device).await.expect("it works again");
    site.detach(3).await;
    site.finish().await;
}

/// Nobody could serve it, and nobody gave it up: its unmount waited for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_whose_volume_was_deleted_while_its_node_was_away_is_unstaged() {
    let site = Site::anywhere_with_filesystem().await;
    site.attach(3).await;
    std::fs::write(site.staging(3).join("file"), [7; 100_000]).expect("written, and not flushed");
    site.cluster.run(&["cut", "3", "controller"]);
    site.cluster.run(&["cut", "controller", "3"]);
    site.unpublish(3).await;
    site.delete().await;
    site.cluster.run(&["kill", "replica", "3"]);
    site.cluster.run(&["heal"]);
    site.cluster.run(&["start", "replica", "3"]);
    let began = Instant::now();
    site.unstage(3).await;
    println!("unstaged after {:?}", began.elapsed());
    site.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_hear_of_its_end_executes_nothing_beside_its_successor() {
    let site = Site::anywhere().await;
    let device = site.attach(3).await;
    let load = Load::start(&device, &site.oracle);
    load.await_writes(200, PATIENCE);
    // It still reaches both copies.
    site.cluster.run(&["cut", "3", "controller"]);
    site.cluster.run(&["cut", "controller", "3"]);
    site.unpublish(3).await;
    let device = site.attach(1).await;
    load.retire();
    // From here on each block is what was read now.
    site.check(&device).await;
    let successor = Load::start(&device, &site.oracle);
    tokio::time::sleep(Duration::from_secs(2)).await;
    println!("{} writes beside the one that was cut off", successor.stop_well());
    site.cluster.run(&["heal"]);
    let done = load.stop();
    assert!(!done.errors.is_empty(), "its requests end with errors");
    site.unstage(3).await;
    site.finish_at_each(&[1]).await;
}
