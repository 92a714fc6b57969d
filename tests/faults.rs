//! Mirrored volumes under load while processes and nodes die, sleep and lose each other: everything that was acknowledged is
//! there afterwards, on whichever copy. The numbers are those of the failure cases in docs/protocol.md.

#[path = "faults/load.rs"]
mod load;
#[allow(dead_code, reason = "tests/cluster.rs uses the rest")]
#[path = "cluster/rig.rs"]
mod rig;
#[path = "faults/site.rs"]
mod site;

use load::Load;
use site::{PATIENCE, Site};

/// Cases 1, 3, 19, 20.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_under_load_loses_nothing_and_comes_back_by_what_differs() {
    let site = Site::new(2, "2").await;
    let device = site.attach(1).await;
    let load = Load::start(&device, &site.oracle);
    load.await_writes(500, PATIENCE);
    site.cluster.run(&["kill", "all", "1"]);
    let done = load.stop();
    println!("{} writes, then {} errors", done.writes, done.errors.len());
    // As the attacher does for a node that is gone.
    site.unpublish(1).await;
    let device = site.attach(2).await;
    site.check(&device).await;
    let load = Load::start(&device, &site.oracle);
    println!("the other node writes after {:?}", load.await_writes(200, PATIENCE));
    site.cluster.run(&["start", "all", "1"]);
    println!("a member again after {:?}", site.until_whole().await);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.check(&device).await;
    // Failback: what is on the copy that came back is the same.
    site.unstage(1).await;
    site.detach(2).await;
    let device = site.attach(1).await;
    site.check(&device).await;
    site.detach(1).await;
    site.finish().await;
}

/// Case 22.
#[tokio::test(flavor = "multi_thread")]
async fn engines_that_are_killed_under_load_cost_no_error_and_no_write() {
    let site = Site::new(2, "2").await;
    let device = site.attach(1).await;
    let load = Load::start(&device, &site.oracle);
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
    site.check(&device).await;
    site.detach(1).await;
    let device = site.attach(2).await;
    site.check(&device).await;
    site.detach(2).await;
    site.finish().await;
}
