//! Volumes with copies on several nodes, on the controller's side: where they are placed, what is written down, and that
//! the controller waits for the nodes. A task of the test does what the nodes would do.

use crate::nodes::{at, cluster};
use crate::site::*;
use std::collections::BTreeSet;
use std::time::Duration;
use tandem::catalog::{Catalog, NodeName, Volume as Object, VolumeConfiguration};
use tandem::protocol::Configuration;
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tokio::task::AbortHandle;
use tonic::{Code, Request};

fn mirrored(name: &str, requisite: &[usize], replicas: &str) -> CreateVolumeRequest {
    let parameters = map(&[("replication", "sync"), ("replicas", replicas)]);
    CreateVolumeRequest { parameters, ..at(name, requisite) }
}

/// Makes and removes the copies of these nodes, as their replicas would.
fn make_copies(catalog: &Catalog, nodes: &[&str]) -> AbortHandle {
    let (catalog, nodes) =
        (catalog.clone(), nodes.iter().map(|node| NodeName((*node).into())).collect::<BTreeSet<_>>());
    let work = async move {
        loop {
            for mut stored in catalog.list::<Object>().await.expect("readable") {
                let before = stored.object.status.copies.clone();
                let Some(mirror) = stored.object.spec.mirror.clone() else { continue };
                for (copy, spec) in mirror.copies.iter().filter(|(_, spec)| nodes.contains(&spec.node)) {
                    assert!(!spec.pool.is_empty());
                    match stored.object.spec.deleted {
                        true => drop(stored.object.status.copies.remove(copy)),
                        false => drop(stored.object.status.copies.insert(*copy)),
                    }
                }
                if stored.object.status.copies != before {
                    // A lost race is found at the next look.
                    let _ = catalog.update(stored).await;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::spawn(work).abort_handle()
}

pub async fn object(driver: &Driver, id: &str) -> Object {
    driver.catalog.get::<Object>(id).await.expect("readable").expect("there").object
}

pub async fn configuration(driver: &Driver, id: &str) -> Option<Configuration> {
    let stored = driver.catalog.get::<VolumeConfiguration>(id).await.expect("readable");
    stored.map(|stored| Configuration::try_from(&stored.object).expect("a configuration"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirrored_volume_lives_where_its_copies_are() {
    let (_nodes, driver) = cluster(&[10, 20, 30]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2", "node-3"]);
    let volume = driver.create(mirrored("pvc", &[2], "2")).await.expect("created");
    assert_eq!(volume.accessible_topology, [place("node-2"), place("node-3")]);
    assert_eq!(driver.create(mirrored("pvc", &[2], "2")).await.expect("the same"), volume);
    assert_eq!(refused(driver.create(mirrored("pvc", &[2], "3")).await), Code::AlreadyExists);
    let id = volume.volume_id.as_str();
    let first = configuration(&driver, id).await.expect("written");
    let mirror = object(&driver, id).await.spec.mirror.expect("mirrored");
    let primary = first.primary.expect("the first primary");
    // The node that was asked for is the best place.
    assert_eq!((mirror.copies[&primary].node.0.as_str(), mirror.primary), ("node-2", None));
    assert_eq!(first.members().collect::<BTreeSet<_>>(), mirror.copies.keys().copied().collect());

    let publish = |node: &'static str, mode| driver.publish(id, node, mode, false);
    assert_eq!(refused(publish("node-1", Mode::SingleNodeWriter).await), Code::FailedPrecondition);
    publish("node-3", Mode::MultiNodeReaderOnly).await.expect("published");
    let wish = object(&driver, id).await.spec.mirror.expect("mirrored").primary.expect("a wish");
    assert_eq!(mirror.copies[&wish].node.0, "node-3");
    assert_eq!(refused(publish("node-2", Mode::MultiNodeReaderOnly).await), Code::FailedPrecondition, "one primary");
    assert_eq!(refused(driver.delete(id).await), Code::FailedPrecondition);
    driver.unpublish(id, "node-3").await.expect("unpublished");
    assert_eq!(object(&driver, id).await.spec.mirror.expect("mirrored").primary, None);
    assert_eq!(refused(driver.expand(id, 2 * GIB, 0).await), Code::InvalidArgument);
    assert_eq!(refused(driver.snapshot("snap", id).await), Code::InvalidArgument);
    assert_eq!(refused(driver.create(from_volume("clone", id)).await), Code::InvalidArgument);
    driver.delete(id).await.expect("deleted");
    assert!(configuration(&driver, id).await.is_none() && driver.volumes().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_follow_is_waited_for_and_named() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    let work = make_copies(&driver.catalog, &["node-1"]);
    let status = driver.create(mirrored("pvc", &[], "2")).await.expect_err("node-2 does nothing");
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("node-2") && !status.message().contains("node-1"), "{status:?}");
    let all = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let id = driver.create(mirrored("pvc", &[], "2")).await.expect("goes on").volume_id;
    all.abort();
    work.abort();
    let _one = make_copies(&driver.catalog, &["node-1"]);
    let status = driver.delete(&id).await.expect_err("node-2 still has its copy");
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("node-2"), "{status:?}");
    let _all = make_copies(&driver.catalog, &["node-1", "node-2"]);
    driver.delete(&id).await.expect("deleted");
    driver.delete(&id).await.expect("and again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_behind_is_no_place_to_publish_and_is_told() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let id = driver.create(mirrored("pvc", &[1], "2")).await.expect("created").volume_id;
    let health = async || {
        let request = ControllerGetVolumeHealthRequest { volume_id: id.clone(), ..Default::default() };
        let answer = accepted(driver.service.controller_get_volume_health(Request::new(request)).await);
        answer.volume_health.expect("an answer").health_statuses
    };
    assert!(health().await.is_empty());
    let stored = driver.catalog.get::<VolumeConfiguration>(&id).await.expect("readable").expect("there");
    let mut next = Configuration::try_from(&stored.object).expect("a configuration");
    let behind = next.secondaries.pop_first().expect("a secondary");
    next.candidates.insert(behind, tandem::protocol::Lacks::Since(next.stamp));
    next.stamp.version = next.stamp.version.next();
    let object = VolumeConfiguration::new(id.parse().expect("an id"), &next);
    driver.catalog.update(tandem::catalog::Stored { object, ..stored }).await.expect("committed");
    let told = health().await;
    assert_eq!(told[0].status, i32::from(VolumeHealthErrorType::Degraded));
    assert!(told[0].message.contains("1 of 2") && told[0].message.contains("node-2"), "{told:?}");
    let publish = |node: &'static str| driver.publish(&id, node, Mode::SingleNodeWriter, false);
    assert_eq!(refused(publish("node-2").await), Code::FailedPrecondition);
    publish("node-1").await.expect("the member");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_need_as_many_nodes_and_a_machine_alone_has_one() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    assert_eq!(refused(driver.create(mirrored("pvc", &[], "3")).await), Code::ResourceExhausted);
    assert!(driver.catalog.list::<Object>().await.expect("readable").is_empty());
    let site = Site::new();
    let alone = site.driver().create(mirrored("pvc", &[], "2")).await.expect_err("one node");
    assert_eq!(alone.code(), Code::InvalidArgument);
    assert!(alone.message().contains("tandem standalone"), "{alone:?}");
}
