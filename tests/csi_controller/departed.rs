//! Nodes that a person has said are gone for good: what is refused before, what nobody waits for afterwards, and what they
//! have to give up if they come back.

use crate::mirror_snapshots::{snapshots, volume};
use crate::mirrors::{make_copies, object};
use crate::nodes::{at, cluster};
use crate::site::*;
use std::time::{Duration, Instant};
use tandem::catalog::{CopySpec, GivenUp, Node, UpdateError, Volume};
use tandem::csi::controller::OperatorService;
use tandem::rpc::operator::operator_server::Operator as _;
use tandem::rpc::operator::{self, ListNodesRequest, RemoveNodeRequest};
use tandem::volume::SnapshotId;
use tonic::{Code, Request, Status};

async fn remove(driver: &Driver, name: &str, force: bool) -> Result<(), Status> {
    let request = RemoveNodeRequest { name: name.into(), force };
    OperatorService(driver.controller.clone()).remove_node(Request::new(request)).await.map(drop)
}

async fn nodes_of(driver: &Driver) -> Vec<operator::Node> {
    let listed = OperatorService(driver.controller.clone()).list_nodes(Request::new(ListNodesRequest {})).await;
    listed.expect("a list").into_inner().nodes
}

async fn given_up(driver: &Driver, name: &str) -> GivenUp {
    driver.catalog.get::<Node>(name).await.expect("readable").expect("there").object.given_up
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_node_that_a_person_has_removed() {
    let (mut nodes, driver) = cluster(&[100, 50]).await;
    let work = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let mirrored = volume(&nodes, &driver, "pvc").await;
    let snapshot = driver.snapshot("snap", &mirrored).await.expect("taken").snapshot_id;
    let sole = driver.create(at("sole", &[2])).await.expect("created").volume_id;
    assert_eq!(refused(remove(&driver, "node-9", true).await), Code::NotFound);
    let answers = remove(&driver, "node-2", true).await.expect_err("it is there");
    assert!(answers.code() == Code::FailedPrecondition && answers.message().contains("answers"), "{answers:?}");

    nodes.stop(2);
    work.abort();
    let _one = make_copies(&driver.catalog, &["node-1"]);
    assert_eq!(refused(driver.delete(&mirrored).await), Code::Aborted, "its copy may come back");
    assert_eq!(refused(driver.delete(&sole).await), Code::Unavailable);
    let needed = remove(&driver, "node-2", false).await.expect_err("only it has one");
    assert_eq!(needed.code(), Code::FailedPrecondition);
    assert!(needed.message().contains(&format!("sole ({sole})")) && !needed.message().contains("pvc"), "{needed:?}");
    remove(&driver, "node-2", true).await.expect("a person says so");
    let told: Vec<_> =
        nodes_of(&driver).await.into_iter().map(|node| (node.name, node.answers, node.removed)).collect();
    assert_eq!(told, [("node-1".into(), true, false), ("node-2".into(), false, true)]);

    driver.delete(&mirrored).await.expect("nobody waits");
    driver.delete_snapshot(&snapshot).await.expect("nobody waits");
    driver.delete(&sole).await.expect("nobody waits");
    assert!(driver.volumes().await.is_empty() && snapshots(&driver).await.is_empty());
    let id = |text: &String| text.parse().expect("an id");
    let expected =
        GivenUp { volumes: [id(&mirrored), id(&sole)].into(), snapshots: [snapshot.parse().expect("an id")].into() };
    assert_eq!(given_up(&driver, "node-2").await, expected, "it goes if the node ever comes back");
    assert_eq!(driver.create(wanted("new", GIB)).await.expect("made").accessible_topology, [place("node-1")]);
    assert_eq!(refused(driver.create(at("there", &[2])).await), Code::ResourceExhausted);
}

/// The copy on a removed node was replaced, and nobody has said since that it is gone: then its volume is deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_was_replaced_goes_from_a_removed_node_if_that_comes_back() {
    let (mut nodes, driver) = cluster(&[100, 50]).await;
    let work = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let id = volume(&nodes, &driver, "pvc").await;
    nodes.stop(2);
    work.abort();
    let _one = make_copies(&driver.catalog, &["node-1"]);
    remove(&driver, "node-2", true).await.expect("a person says so");
    let mirror = object(&driver, &id).await.spec.mirror.expect("mirrored");
    let replaced =
        mirror.copies.iter().find(|(_, spec)| spec.node.0 == "node-2").map(|(copy, _)| *copy).expect("there");
    change(&driver, &id, |volume| drop(volume.spec.mirror.as_mut().expect("mirrored").copies.remove(&replaced))).await;
    let (deleting, gone) = (driver.controller.clone(), id.clone());
    let deletion = tokio::spawn(async move { deleting.delete_volume(&gone).await });
    let until = Instant::now() + Duration::from_secs(60);
    while !given_up(&driver, "node-2").await.volumes.contains(&id.parse().expect("an id")) {
        assert!(Instant::now() < until, "nobody tells the node");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(given_up(&driver, "node-1").await.is_empty(), "it is there, and is told otherwise");
    // Otherwise the deletion waits for a while.
    change(&driver, &id, |volume| (volume.status.copies, volume.status.reports) = Default::default()).await;
    drop(deletion.await.expect("it ends"));
    // It may have lost a race.
    driver.delete(&id).await.expect("deleted");
}

/// As much was deleted without it as its object can name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_list_refuses_what_would_be_forgotten_and_nothing_else() {
    let (mut nodes, driver) = cluster(&[100, 50]).await;
    let work = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let id = volume(&nodes, &driver, "pvc").await;
    let named = driver.create(at("named", &[2])).await.expect("created").volume_id;
    let unnamed = driver.create(at("unnamed", &[2])).await.expect("created").volume_id;
    nodes.stop(2);
    work.abort();
    let _one = make_copies(&driver.catalog, &["node-1"]);
    remove(&driver, "node-2", true).await.expect("a person says so");
    let on_it = |copy: &CopySpec| copy.node.0 == "node-2";
    change(&driver, &id, |volume| {
        volume.spec.mirror.as_mut().expect("mirrored").copies.retain(|_, copy| !on_it(copy));
    })
    .await;
    let mut stored = driver.catalog.get::<Node>("node-2").await.expect("readable").expect("there");
    let list = &mut stored.object.given_up;
    list.volumes.insert(named.parse().expect("an id"));
    while !list.is_too_large() {
        list.snapshots.insert(SnapshotId::random());
    }
    list.snapshots.pop_first();
    let full = list.clone();
    driver.catalog.update(stored).await.expect("full");
    driver.delete(&named).await.expect("it is written down");
    assert_eq!(refused(driver.delete(&unnamed).await), Code::Unavailable);
    let until = Instant::now() + Duration::from_secs(60);
    while let Err(status) = driver.delete(&id).await {
        // It may have lost a race.
        assert!(status.code() == Code::Aborted && Instant::now() < until, "the list is waited for: {status:?}");
    }
    assert_eq!(given_up(&driver, "node-2").await, full);
}

/// Changes the volume, if it is there, and again if it lost a race to the nodes that [`make_copies`] plays.
async fn change(driver: &Driver, id: &str, to: impl Fn(&mut Volume)) {
    while let Some(mut stored) = driver.catalog.get::<Volume>(id).await.expect("readable") {
        to(&mut stored.object);
        match driver.catalog.update(stored).await {
            Ok(_) => return,
            Err(UpdateError::Conflict { .. }) => {}
            Err(error) => panic!("not changed: {error}"),
        }
    }
}
