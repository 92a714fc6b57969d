//! What a person asks for a volume's copies. A task of the test does what the nodes would do, and the test what the primary would.

use crate::mirrors::{LONG, configuration, make_copies, mirrored, object};
use crate::nodes::{at, cluster};
use crate::site::*;
use std::collections::BTreeSet;
use std::time::Duration;
use tandem::catalog::{Descriptor, Stored, VolumeConfiguration};
use tandem::csi::controller::OperatorService;
use tandem::protocol::{Configuration, Lacks};
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::operator::operator_server::Operator as _;
use tandem::rpc::operator::*;
use tandem::volume::InstanceId;
use tonic::{Code, Request, Status};

/// What the primary would commit.
pub async fn commit(driver: &Driver, id: &str, change: impl Fn(&mut Configuration)) {
    let stored = driver.catalog.get::<VolumeConfiguration>(id).await.expect("readable").expect("there");
    let mut next = Configuration::try_from(&stored.object).expect("a configuration");
    change(&mut next);
    next.stamp.version = next.stamp.version.next();
    let object = VolumeConfiguration::new(id.parse().expect("an id"), &next);
    driver.catalog.update(Stored { object, ..stored }).await.expect("committed");
}

async fn promote(driver: &Driver, id: &str, node: &str) -> Result<(), Status> {
    let request = PromoteRequest { volume_id: id.into(), node: node.into() };
    OperatorService(driver.controller.clone()).promote(Request::new(request)).await.map(drop)
}

async fn demote(driver: &Driver, id: &str) -> Result<(), Status> {
    let request = DemoteRequest { volume_id: id.into() };
    OperatorService(driver.controller.clone()).demote(Request::new(request)).await.map(drop)
}

pub async fn replace(driver: &Driver, id: &str, from: &str, to: &str) -> Result<(), Status> {
    let request = MoveCopyRequest { volume_id: id.into(), from_node: from.into(), to_node: to.into() };
    OperatorService(driver.controller.clone()).move_copy(Request::new(request)).await.map(drop)
}

pub async fn copies(driver: &Driver, id: &str) -> Vec<Copy> {
    let request = Request::new(ListCopiesRequest { volume_id: id.into() });
    let answer = OperatorService(driver.controller.clone()).list_copies(request).await;
    answer.expect("a list").into_inner().copies
}

pub async fn copy_on(driver: &Driver, id: &str, node: &str) -> InstanceId {
    let found = copies(driver, id).await.into_iter().find(|copy| copy.node == node).expect("a copy");
    found.copy_id.parse().expect("an id")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_moves_the_primary_of_a_volume_that_is_not_in_use() {
    let (_nodes, driver) = cluster(&[10, 20, 30]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let id = driver.create(mirrored("pvc", &[1, 2], "2")).await.expect("created").volume_id;
    let one = copy_on(&driver, &id, "node-1").await;
    let two = copy_on(&driver, &id, "node-2").await;
    // The copies follow the wish.
    let following = tokio::spawn({
        let (driver, id) = (driver.clone(), id.clone());
        async move {
            loop {
                let wish = object(&driver, &id).await.spec.mirror.and_then(|mirror| mirror.primary);
                let is = configuration(&driver, &id).await.expect("there").primary;
                if wish != is {
                    commit(&driver, &id, |now| {
                        now.secondaries.extend(now.primary.take());
                        now.primary = wish;
                        wish.iter().for_each(|copy| _ = now.secondaries.remove(copy));
                    })
                    .await;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    });
    promote(&driver, &id, "node-2").await.expect("promoted");
    assert_eq!(configuration(&driver, &id).await.expect("there").primary, Some(two));
    let listed = copies(&driver, &id).await;
    assert!(listed.iter().all(|copy| copy.member && (copy.primary && copy.wished) == (copy.node == "node-2")));
    assert_eq!(refused(promote(&driver, &id, "node-3").await), Code::FailedPrecondition, "no copy there");
    demote(&driver, &id).await.expect("demoted");
    assert_eq!(configuration(&driver, &id).await.expect("there").primary, None);
    driver.publish(&id, "node-1", Mode::SingleNodeWriter, false).await.expect("published");
    assert_eq!(object(&driver, &id).await.spec.mirror.expect("mirrored").primary, Some(one));
    assert_eq!(refused(promote(&driver, &id, "node-2").await), Code::FailedPrecondition, "it is used on node-1");
    assert_eq!(refused(demote(&driver, &id).await), Code::FailedPrecondition);
    promote(&driver, &id, "node-1").await.expect("as it is");
    following.abort();
    assert_eq!(refused(promote(&driver, "nothing", "node-1").await), Code::NotFound);
    assert_eq!(refused(promote(&driver, "", "node-1").await), Code::InvalidArgument);
    let sole = driver.create(at("sole", &[1])).await.expect("created").volume_id;
    assert_eq!(refused(promote(&driver, &sole, "node-1").await), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_replaced_by_one_that_has_everything() {
    let (_nodes, driver) = cluster(&[10, 20, 30]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2", "node-3"]);
    let id = driver.create(mirrored("pvc", &[1, 2], "2")).await.expect("created").volume_id;
    driver.publish(&id, "node-1", Mode::SingleNodeWriter, false).await.expect("published");
    let tending = tokio::spawn({
        let controller = driver.controller.clone();
        async move { controller.tend().await }
    });
    for (from, to, code) in [
        ("node-1", "node-3", Code::FailedPrecondition),
        ("node-3", "node-9", Code::FailedPrecondition),
        ("node-2", "node-1", Code::ResourceExhausted),
        ("node-2", "node-9", Code::ResourceExhausted),
    ] {
        assert_eq!(refused(replace(&driver, &id, from, to).await), code, "{from} to {to}");
    }
    for _ in 0..2 {
        replace(&driver, &id, "node-2", "node-3").await.expect("recorded");
        let listed = copies(&driver, &id).await;
        let of = |node: &str| listed.iter().find(|copy| copy.node == node).expect("a copy").clone();
        assert!(listed.len() == 3 && of("node-2").leaving && of("node-2").member && !of("node-3").member);
    }
    let three = copy_on(&driver, &id, "node-3").await;
    commit(&driver, &id, |now| _ = now.candidates.insert(three, Lacks::Everything)).await;
    driver.expand(&id, 2 * GIB, 0).await.expect("the node of each copy follows");
    assert_eq!(copies(&driver, &id).await.len(), 3, "it lacks everything");
    commit(&driver, &id, |now| {
        now.candidates.clear();
        now.secondaries.insert(three);
    })
    .await;
    let done = async {
        while copies(&driver, &id).await.len() > 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, done).await.expect("the old one goes");
    let nodes: BTreeSet<_> = copies(&driver, &id).await.into_iter().map(|copy| copy.node).collect();
    assert_eq!(nodes, BTreeSet::from(["node-1".into(), "node-3".into()]));
    replace(&driver, &id, "node-2", "node-3").await.expect("repeated");
    tending.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_finds_a_volume_of_the_cluster_by_its_name() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let id = driver.create(mirrored("pvc", &[], "2")).await.expect("created").volume_id;
    let asked = OperatorService(driver.controller.clone()).list_volumes(Request::new(ListVolumesRequest {})).await;
    let [found] = &asked.expect("a list").into_inner().volumes[..] else { panic!("one volume") };
    assert_eq!((&found.volume_id, found.size_bytes, found.pool.as_str()), (&id, GIB, "default"));
    let described = Descriptor::decode(&found.descriptor);
    assert!(matches!(described, Some(Descriptor::Volume { request, .. }) if request.name == "pvc"));
}
