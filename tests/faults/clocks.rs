//! Nodes whose clocks jump. What a replica reads is the time since its node was started, and a time namespace gives each of its
//! lives another one; a clock that jumps in the middle of a life is the simulator's.

use crate::site::{PATIENCE, Site};

/// Three years, and a month.
const FAR: &str = "100000000";
const LESS_FAR: &str = "2500000";

/// The replica of the node, in another life.
fn restart(site: &Site, number: &str, variable: &'static str, uptime: &str) {
    site.cluster.run(&["kill", "replica", number]);
    site.cluster.run_with(&["start", "replica", number], &[(variable, uptime.to_owned())]);
}

/// Case 16.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_whose_clocks_jump_to_and_fro_lose_nothing() {
    let (site, _, load) = Site::under_load(2).await;
    let (first, second) = ("TANDEM_CLUSTER_UPTIME_1", "TANDEM_CLUSTER_UPTIME_2");
    for (number, variable, uptime) in
        [("1", first, FAR), ("2", second, LESS_FAR), ("1", first, ""), ("2", second, FAR), ("1", first, LESS_FAR)]
    {
        load.await_writes(100, PATIENCE);
        restart(&site, number, variable, uptime);
        println!("node {number}, {uptime:?}: 100 writes after {:?}", load.await_writes(100, PATIENCE));
    }
    site.until_whole().await;
    load.await_writes(100, PATIENCE);
    let load = site.outlive(1, load, 2).await;
    load.await_writes(100, PATIENCE);
    site.cluster.run(&["start", "all", "1"]);
    println!("a member again after {:?}", site.until_whole().await);
    load.stop_well();
    site.unstage(1).await;
    site.finish_at_each(&[2, 1]).await;
}
