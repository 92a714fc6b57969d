//! Nodes that a person has said are gone for good: what is refused before, what nobody waits for afterwards, and what they
//! have to give up if they come back.

use crate::mirror_snapshots::{snapshots, volume};
use crate::mirrors::make_copies;
use crate::nodes::{at, cluster};
use crate::site::*;
use tandem::catalog::{GivenUp, Node};
use tandem::csi::controller::OperatorService;
use tandem::rpc::operator::operator_server::Operator as _;
use tandem::rpc::operator::{self, ListNodesRequest, RemoveNodeRequest};
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
