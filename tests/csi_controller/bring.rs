//! Snapshots that are brought over to copies that lack them: who is asked for what, and what the catalogue says meanwhile.

use crate::copies::{commit, copy_on};
use crate::mirror_snapshots::{ALL, called, snapshots, volume};
use crate::mirrors::{LONG, make_copies, object};
use crate::nodes::{Cluster, cluster};
use crate::site::*;
use std::collections::BTreeSet;
use std::time::Duration;
use tandem::catalog::{NodeName, Snapshot as Object};
use tandem::csi::controller::OperatorService;
use tandem::protocol::Lacks;
use tandem::rpc::operator::LocateSnapshotsRequest;
use tandem::rpc::operator::operator_server::Operator as _;
use tandem::volume::InstanceId;
use tokio::task::JoinHandle;
use tonic::Request;

/// The copy on node 2 is away, or back.
async fn node_2_is(driver: &Driver, nodes: &Cluster, id: &str, member: bool) -> InstanceId {
    let two = copy_on(driver, id, "node-2").await;
    commit(driver, id, |now| {
        let stamp = now.stamp;
        if member {
            now.candidates.remove(&two);
            now.secondaries.insert(two);
        } else {
            now.secondaries.remove(&two);
            now.candidates.insert(two, Lacks::Since(stamp));
        }
    })
    .await;
    let mirror = object(driver, id).await.spec.mirror.expect("mirrored");
    let all = mirror.copies.keys().filter(|copy| member || **copy != two).map(ToString::to_string).collect();
    nodes.fakes[0].state().members.insert(id.into(), all);
    two
}

/// What a controller does beside its calls.
fn bring(driver: &Driver) -> JoinHandle<()> {
    let controller = driver.controller.clone();
    tokio::spawn(async move { controller.bring_over().await })
}

async fn until(driver: &Driver, what: &str, is: impl Fn(&[Object]) -> bool) -> Vec<Object> {
    let looked = async {
        loop {
            let all = snapshots(driver).await;
            if is(&all) {
                return all;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, looked).await.unwrap_or_else(|_| panic!("{what} does not come"))
}

fn nodes_of(snapshot: &Object) -> Vec<String> {
    snapshot.holders().iter().map(ToString::to_string).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_was_away_gets_what_it_lacks_the_oldest_first() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let both = driver.snapshot("both", &id).await.expect("taken").snapshot_id;
    node_2_is(&driver, &nodes, &id, false).await;
    let first = driver.snapshot("first", &id).await.expect("taken").snapshot_id;
    let second = driver.snapshot("second", &id).await.expect("taken").snapshot_id;
    let task = bring(&driver);
    let operator = OperatorService(driver.controller.clone());
    let places = operator.locate_snapshots(Request::new(LocateSnapshotsRequest {})).await.expect("told").into_inner();
    assert!(places.locations.iter().all(|place| place.lacking.is_empty()), "its copy has to be up to date first");
    let two = node_2_is(&driver, &nodes, &id, true).await;
    let places = operator.locate_snapshots(Request::new(LocateSnapshotsRequest {})).await.expect("told").into_inner();
    let of = |id: &str| places.locations.iter().find(|place| place.snapshot_id == id).expect("there").clone();
    assert_eq!((of(&first).nodes, of(&first).lacking), (vec!["node-1".to_owned()], vec!["node-2".to_owned()]));
    assert_eq!(of(&both).lacking, Vec::<String>::new());

    let all = until(&driver, "the last one", |all| all.iter().all(|s| s.copies.contains_key(&two))).await;
    assert!(all.iter().all(|snapshot| snapshot.strays.is_empty() && nodes_of(snapshot) == ["node-1", "node-2"]));
    let filled = nodes.fakes[1].state().filled.clone();
    let asked: Vec<_> = filled.iter().map(|r| (r.snapshot_id.clone(), r.base_snapshot_id.clone())).collect();
    assert_eq!(asked, [(first.clone(), both.clone()), (second.clone(), first.clone())]);
    assert!(filled.iter().all(|r| r.source_node == "node-1" && r.copy_id == two.to_string()), "{filled:?}");
    assert_eq!(called(&nodes, 1, "FillSnapshot"), 0);
    for snapshot in [first, second, both] {
        driver.delete_snapshot(&snapshot).await.expect("deleted");
    }
    assert!(nodes.fakes[1].state().snapshots.is_empty() && snapshots(&driver).await.is_empty());
    task.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_deleted_while_it_is_brought_over_is_erased_on_both_nodes() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    node_2_is(&driver, &nodes, &id, false).await;
    let snapshot = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    node_2_is(&driver, &nodes, &id, true).await;
    // It never ends there.
    nodes.fakes[1].state().filling = Some(String::new());
    let task = bring(&driver);
    let two = BTreeSet::from([NodeName("node-2".into())]);
    let all = until(&driver, "a call", |_| called(&nodes, 2, "FillSnapshot") > 1).await;
    assert_eq!(nodes_of(&all[0]), ["node-1"], "it is not there before its node says so");
    assert_eq!(all[0].strays, two);
    driver.delete_snapshot(&snapshot).await.expect("deleted");
    assert_eq!((called(&nodes, 1, "DeleteSnapshot"), called(&nodes, 2, "DeleteSnapshot")), (1, 1));
    assert!(snapshots(&driver).await.is_empty());
    task.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_is_no_holder_and_the_next_one_is_not_held_up() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    node_2_is(&driver, &nodes, &id, false).await;
    let first = driver.snapshot("first", &id).await.expect("taken").snapshot_id;
    driver.snapshot("second", &id).await.expect("taken");
    node_2_is(&driver, &nodes, &id, true).await;
    nodes.fakes[1].state().filling = Some("pool default is full".into());
    nodes.fakes[1].state().fails = Some(first.clone());
    let task = bring(&driver);
    let is_first = |snapshot: &Object| snapshot.id.to_string() == first;
    let all = until(&driver, "the second one", |all| {
        all.iter().any(|snapshot| !is_first(snapshot) && snapshot.copies.len() == 2)
    })
    .await;
    let stray = all.iter().find(|snapshot| is_first(snapshot)).expect("there");
    assert_eq!((nodes_of(stray), stray.strays.len()), (vec!["node-1".to_owned()], 1));
    // When there is room, it comes, too.
    nodes.fakes[1].state().filling = None;
    until(&driver, "the first one", |all| all.iter().all(|snapshot| snapshot.copies.len() == 2)).await;
    task.abort();
}
