//! Copies that are lost and made anew elsewhere, with nobody who says so. Tasks of the test do what nodes and primary would do.

use crate::copies::{commit, copy_on, replace};
use crate::mirrors::{LONG, make_copies, object};
use crate::nodes::{Cluster, at, cluster};
use crate::site::*;
use std::collections::BTreeSet;
use std::time::Duration;
use tandem::catalog::{Rebuild, RebuildAfter, Volume as Object};
use tandem::protocol::Lacks;
use tandem::rpc::control;
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::*;
use tandem::volume::InstanceId;
use tokio::task::JoinHandle;
use tonic::Request;

const ALL: [&str; 3] = ["node-1", "node-2", "node-3"];

/// A volume with a copy on nodes 1 and 2, and the one on node 1 serves.
async fn volume(nodes: &Cluster, driver: &Driver, rebuild_after: &str) -> String {
    let parameters = map(&[("replication", "sync"), ("rebuildAfter", rebuild_after)]);
    let wanted = CreateVolumeRequest { parameters, ..at("pvc", &[1, 2]) };
    let id = driver.create(wanted).await.expect("created").volume_id;
    let mirror = Some(control::Mirror { serves: true, ..Default::default() });
    let there = control::Volume { volume_id: id.clone(), mirror, ..Default::default() };
    nodes.fakes[0].state().volumes.insert(id.clone(), there);
    id
}

/// What the primary would do about a copy that is silent. Returns its id.
async fn drop_node_2(driver: &Driver, id: &str) -> InstanceId {
    let two = copy_on(driver, id, "node-2").await;
    commit(driver, id, |now| {
        now.secondaries.remove(&two);
        now.candidates.insert(two, Lacks::Since(now.stamp));
    })
    .await;
    two
}

/// What a controller does beside its calls.
fn run(driver: &Driver) -> [JoinHandle<()>; 2] {
    let (one, two) = (driver.controller.clone(), driver.controller.clone());
    [tokio::spawn(async move { one.rebuild().await }), tokio::spawn(async move { two.tend().await })]
}

async fn until(driver: &Driver, id: &str, what: &str, is: impl Fn(&Object) -> bool) -> Object {
    let looked = async {
        loop {
            let volume = object(driver, id).await;
            if is(&volume) {
                return volume;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, looked).await.unwrap_or_else(|_| panic!("{what} does not come"))
}

async fn health(driver: &Driver, id: &str) -> String {
    let request = ControllerGetVolumeHealthRequest { volume_id: id.into(), ..Default::default() };
    let answer = accepted(driver.service.controller_get_volume_health(Request::new(request)).await);
    let entries = answer.volume_health.expect("an answer").health_statuses;
    entries.into_iter().map(|entry| entry.message).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_copy_is_made_anew_on_a_third_node() {
    let (mut nodes, driver) = cluster(&[10, 20, 30]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "1s").await;
    nodes.stop(2);
    let two = drop_node_2(&driver, &id).await;
    let tasks = run(&driver);
    let lost = until(&driver, &id, "a new copy", |volume| {
        volume.spec.mirror.as_ref().is_some_and(|mirror| mirror.rebuild.is_some())
    });
    let mirror = lost.await.spec.mirror.expect("mirrored");
    let Some(Rebuild { lost, new }) = mirror.rebuild else { panic!("a rebuild") };
    assert_eq!((lost, mirror.leaving, mirror.copies[&new].node.0.as_str()), (two, BTreeSet::from([two]), "node-3"));
    let told = health(&driver, &id).await;
    assert!(told.contains("node-3 gets a copy in place of the one on node-2"), "{told}");
    // The primary fills it.
    commit(&driver, &id, |now| {
        now.candidates.clear();
        now.secondaries.insert(new);
    })
    .await;
    let done = until(&driver, &id, "the end", |volume| {
        volume.spec.mirror.as_ref().is_some_and(|mirror| mirror.copies.len() == 2) && volume.status.missed.is_empty()
    });
    let mirror = done.await.spec.mirror.expect("mirrored");
    assert!(mirror.copies.contains_key(&new) && mirror.rebuild.is_none() && mirror.leaving.is_empty());
    assert_eq!(health(&driver, &id).await, "");
    tasks.iter().for_each(JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_comes_back_first_stays_and_no_node_that_fits_is_told() {
    let (mut nodes, driver) = cluster(&[10, 20]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "1s").await;
    nodes.stop(2);
    let two = drop_node_2(&driver, &id).await;
    let tasks = run(&driver);
    let waits = until(&driver, &id, "a reason", |volume| {
        let waits = volume.status.missed.get(&two).and_then(|missed| missed.waits.as_ref());
        waits.is_some_and(|waits| waits.contains("no room"))
    });
    assert_eq!(waits.await.spec.mirror.expect("mirrored").copies.len(), 2);
    let told = health(&driver, &id).await;
    assert!(told.contains("in place of the one on node-2 yet: no room for more copies"), "{told}");
    let listed = crate::copies::copies(&driver, &id).await;
    let of = listed.iter().find(|copy| copy.node == "node-2").expect("a copy");
    assert!(of.missed_seconds >= 1 && of.waits.contains("no room"), "{of:?}");
    // It follows again, and nothing is left of it.
    commit(&driver, &id, |now| {
        now.candidates.clear();
        now.secondaries.insert(two);
    })
    .await;
    until(&driver, &id, "nothing missed", |volume| volume.status.missed.is_empty()).await;
    assert_eq!(health(&driver, &id).await, "");
    // A person decides alone.
    driver.modify(&id, &[("rebuildAfter", "never")]).await.expect("modified");
    assert_eq!(object(&driver, &id).await.spec.rebuild_after, RebuildAfter::Never);
    tasks.iter().for_each(JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_to_a_node_that_dies_is_taken_back_and_can_be_asked_for_again() {
    let (mut nodes, driver) = cluster(&[10, 20, 30, 40]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2", "node-3", "node-4"]);
    let id = volume(&nodes, &driver, "1s").await;
    let copies_of = |volume: &Object| volume.spec.mirror.clone().expect("mirrored");
    replace(&driver, &id, "node-2", "node-3").await.expect("recorded");
    assert_eq!(copies_of(&object(&driver, &id).await).leaving.len(), 1);
    nodes.stop(3);
    let [rebuild, tend] = run(&driver);
    let back = until(&driver, &id, "the old copies", |volume| {
        let mirror = copies_of(volume);
        mirror.leaving.is_empty() && mirror.copies.values().all(|of| of.node.0 != "node-3")
    });
    assert_eq!(copies_of(&back.await).copies.len(), 2);
    // To another node; and a person takes that back.
    rebuild.abort();
    let _ = rebuild.await;
    replace(&driver, &id, "node-2", "node-4").await.expect("recorded");
    replace(&driver, &id, "node-4", "node-2").await.expect("taken back");
    let back = until(&driver, &id, "the old copies", |volume| copies_of(volume).leaving.is_empty()).await;
    let there: BTreeSet<_> = copies_of(&back).copies.into_values().map(|of| of.node.0).collect();
    assert_eq!(there, BTreeSet::from(["node-1".to_owned(), "node-2".to_owned()]));
    tend.abort();
}
