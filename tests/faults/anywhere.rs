//! `access: any`: the volume has its copies on nodes 1 and 2, and is used at node 3.

use crate::load::Load;
use crate::site::{PATIENCE, SIZE, Site};
use std::time::Duration;

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
