//! Volumes with copies on several nodes, on the controller's side: where they are placed, what is written down, and that
//! the controller waits for the nodes. A task of the test does what the nodes would do.

use crate::nodes::{at, cluster};
use crate::site::*;
use std::collections::BTreeSet;
use std::time::Duration;
use tandem::catalog::{Catalog, CopyReport, NodeName, Stored, Volume as Object, VolumeConfiguration};
use tandem::protocol::{Configuration, Lacks};
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tandem::volume::InstanceId;
use tokio::task::AbortHandle;
use tonic::{Code, Request};

/// When a condition is given up.
pub const LONG: Duration = Duration::from_secs(60);

pub fn mirrored(name: &str, requisite: &[usize], replicas: &str) -> CreateVolumeRequest {
    let parameters = map(&[("replication", "sync"), ("replicas", replicas)]);
    CreateVolumeRequest { parameters, ..at(name, requisite) }
}

/// Makes, changes and removes the copies of these nodes, as their replicas would.
pub fn make_copies(catalog: &Catalog, nodes: &[&str]) -> AbortHandle {
    make_copies_below(catalog, nodes, u64::MAX)
}

/// None of them can be larger than that.
fn make_copies_below(catalog: &Catalog, nodes: &[&str], limit: u64) -> AbortHandle {
    let (catalog, nodes) =
        (catalog.clone(), nodes.iter().map(|node| NodeName((*node).into())).collect::<BTreeSet<_>>());
    let report = move |volume: &Object| {
        let (wanted, verify_reads) = (volume.spec.size, volume.spec.verify_reads);
        let fits = wanted.bytes() <= limit;
        let refused = (!fits).then(|| "its pool is full".to_owned());
        CopyReport { size: if fits { wanted } else { volume.status.size }, verify_reads, refused }
    };
    let work = async move {
        let mut made = BTreeSet::new();
        loop {
            for mut stored in catalog.list::<Object>().await.expect("readable") {
                let before = stored.object.status.clone();
                let Some(mirror) = stored.object.spec.mirror.clone() else { continue };
                for (copy, spec) in mirror.copies.iter().filter(|(_, spec)| nodes.contains(&spec.node)) {
                    assert!(!spec.pool.is_empty());
                    made.insert(*copy);
                    let is = report(&stored.object);
                    let status = &mut stored.object.status;
                    if stored.object.spec.deleted {
                        status.copies.remove(copy);
                        status.reports.remove(copy);
                    } else {
                        status.copies.insert(*copy);
                        status.reports.insert(*copy, is);
                    }
                }
                // What nobody wants any more is removed by whoever made it.
                let gone = |copy: &InstanceId| made.contains(copy) && !mirror.copies.contains_key(copy);
                stored.object.status.copies.retain(|copy| !gone(copy));
                stored.object.status.reports.retain(|copy, _| !gone(copy));
                if stored.object.status != before {
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
    assert_eq!((mirror.copies[&primary].node.0.as_str(), mirror.primary), ("node-2", Some(primary)));
    assert_eq!(first.members().collect::<BTreeSet<_>>(), mirror.copies.keys().copied().collect());

    let publish = |node: &'static str, mode| driver.publish(id, node, mode, false);
    assert_eq!(refused(publish("node-1", Mode::SingleNodeWriter).await), Code::FailedPrecondition);
    publish("node-3", Mode::MultiNodeReaderOnly).await.expect("published");
    let wish = object(&driver, id).await.spec.mirror.expect("mirrored").primary.expect("a wish");
    assert_eq!(mirror.copies[&wish].node.0, "node-3");
    assert_eq!(refused(publish("node-2", Mode::MultiNodeReaderOnly).await), Code::FailedPrecondition, "one primary");
    assert_eq!(refused(driver.delete(id).await), Code::FailedPrecondition);
    driver.unpublish(id, "node-3").await.expect("unpublished");
    assert_eq!(object(&driver, id).await.spec.mirror.expect("mirrored").primary, Some(wish), "it stays where it was");
    driver.delete(id).await.expect("deleted");
    assert!(configuration(&driver, id).await.is_none() && driver.volumes().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_for_every_node_names_the_one_that_uses_it_without_a_copy() {
    let (nodes, driver) = cluster(&[10, 20, 30]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2", "node-3"]);
    let any = |requisite: &[usize]| {
        let parameters = map(&[("replication", "sync"), ("access", "any")]);
        CreateVolumeRequest { parameters, ..at("pvc", requisite) }
    };
    let volume = driver.create(any(&[])).await.expect("created");
    assert_eq!(volume.accessible_topology, [], "from everywhere");
    assert_eq!(driver.create(any(&[1])).await.expect("the same"), volume);
    assert_eq!(refused(driver.create(mirrored("pvc", &[], "2")).await), Code::AlreadyExists);
    let id = volume.volume_id.as_str();
    let mirror = async || object(&driver, id).await.spec.mirror.expect("mirrored");
    let publish = |node: &'static str| driver.publish(id, node, Mode::SingleNodeWriter, false);
    let primary = mirror().await.primary;
    // What its replica does when it hears of it, some time later.
    let (catalog, fake, known) = (driver.catalog.clone(), nodes.fakes[0].clone(), id.to_owned());
    let hears = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let stored = catalog.get::<Object>(&known).await.expect("readable");
            let client = stored.and_then(|stored| stored.object.spec.mirror).and_then(|mirror| mirror.client);
            if let Some(client) = client {
                let tree_id = client.publication.to_string();
                let volume = tandem::rpc::control::Volume { tree_id, ..Default::default() };
                fake.state().volumes.insert(known.clone(), volume);
            }
        }
    });
    // The others have the most room.
    publish("node-1").await.expect("published");
    let first = mirror().await.client.expect("a client");
    assert_eq!((first.node.0.as_str(), mirror().await.primary), ("node-1", primary));
    publish("node-1").await.expect("published already");
    assert_eq!(mirror().await.client.as_ref(), Some(&first));
    assert_eq!(refused(publish("node-2").await), Code::FailedPrecondition);
    assert_eq!(refused(publish("node-9").await), Code::NotFound);
    driver.unpublish(id, "node-1").await.expect("unpublished");
    assert_eq!(mirror().await.client, None);
    publish("node-1").await.expect("published");
    assert_ne!(mirror().await.client.expect("a client").publication, first.publication);
    driver.unpublish(id, "").await.expect("unpublished");
    hears.abort();
    publish("node-2").await.expect("published where it has a copy");
    let now = mirror().await;
    let wished = now.primary.expect("a wish");
    assert_eq!((now.client, now.copies[&wished].node.0.as_str()), (None, "node-2"));
    driver.unpublish(id, "node-2").await.expect("unpublished");
    driver.delete(id).await.expect("deleted");
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
    // A copy that was moved away from a node that never came back.
    while let Some(mut stored) = driver.catalog.get::<Object>(&id).await.expect("readable") {
        if !stored.object.status.copies.insert(InstanceId::random()) || driver.catalog.update(stored).await.is_ok() {
            break;
        }
    }
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
    driver.catalog.update(Stored { object, ..stored }).await.expect("committed");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirrored_volume_grows_when_every_node_has_room() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    let one = make_copies(&driver.catalog, &["node-1"]);
    let two = make_copies(&driver.catalog, &["node-2"]);
    let id = driver.create(mirrored("pvc", &[1, 2], "2")).await.expect("created").volume_id;
    assert_eq!(driver.expand(&id, 2 * GIB, 0).await.expect("grown"), 2 * GIB);
    assert_eq!(driver.expand(&id, GIB, 0).await.expect("large enough"), 2 * GIB);
    let full = driver.expand(&id, 15 * GIB, 0).await.expect_err("node-1 has 10 GiB");
    assert_eq!(full.code(), Code::ResourceExhausted);
    assert!(full.message().contains("node-1"), "{full:?}");
    assert_eq!(object(&driver, &id).await.spec.size.bytes(), 2 * GIB, "nothing was begun");

    // One that looked as if it had room, and refuses.
    two.abort();
    let small = make_copies_below(&driver.catalog, &["node-2"], 2 * GIB);
    let refused = driver.expand(&id, 3 * GIB, 0).await.expect_err("node-2 refuses");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("node-2: its pool is full"), "{refused:?}");
    let volume = object(&driver, &id).await;
    assert_eq!((volume.spec.size.bytes(), volume.status.size.bytes()), (2 * GIB, 2 * GIB), "taken back");

    // One that does not answer: the wish stays.
    small.abort();
    let waits = driver.expand(&id, 3 * GIB, 0).await.expect_err("node-2 does nothing");
    assert_eq!(waits.code(), Code::Aborted);
    assert!(waits.message().contains("node-2 are not grown"), "{waits:?}");
    let volume = object(&driver, &id).await;
    assert_eq!((volume.spec.size.bytes(), volume.status.size.bytes()), (3 * GIB, 2 * GIB));
    let _two = make_copies(&driver.catalog, &["node-2"]);
    let tending = tokio::spawn({
        let controller = driver.controller.clone();
        async move { controller.tend().await }
    });
    let grown = async {
        while object(&driver, &id).await.status.size.bytes() < 3 * GIB {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, grown).await.expect("nobody repeats the call, and it converges");
    tending.abort();
    assert_eq!(driver.expand(&id, 3 * GIB, 0).await.expect("repeated"), 3 * GIB);
    one.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirrored_volume_is_modified_on_all_nodes() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    let _work = make_copies(&driver.catalog, &["node-1", "node-2"]);
    let id = driver.create(mirrored("pvc", &[], "2")).await.expect("created").volume_id;
    for value in ["true", "true", "false"] {
        driver.modify(&id, &[("verifyReads", value)]).await.expect("modified");
        let status = object(&driver, &id).await.status;
        assert!(status.verify_reads == (value == "true"));
        assert!(status.reports.values().all(|report| report.verify_reads == status.verify_reads));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_becomes_mirrored_and_ceases_to_be() {
    let (nodes, driver) = cluster(&[10, 20, 30]).await;
    let id = driver.create(at("pvc", &[1])).await.expect("created").volume_id;
    let tree = nodes.fakes[0].state().volumes[&id].tree_id.parse().expect("an id");
    assert_eq!(refused(driver.modify(&id, &[("replicas", "2")]).await), Code::InvalidArgument);
    for _ in 0..2 {
        driver.modify(&id, &[("replication", "sync"), ("verifyReads", "false")]).await.expect("recorded and placed");
        let volume = object(&driver, &id).await;
        let mirror = volume.spec.mirror.expect("mirrored");
        let nodes: Vec<_> = mirror.copies.values().map(|copy| copy.node.0.as_str()).collect();
        assert_eq!(nodes.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from(["node-1", "node-3"]));
        assert_eq!((mirror.primary, volume.spec.node), (Some(tree), None));
        let first = configuration(&driver, &id).await.expect("written");
        assert_eq!((first.primary, first.secondaries.len(), first.candidates.len()), (Some(tree), 0, 1));
        assert!(first.candidates.values().all(|lacks| *lacks == Lacks::Everything));
    }
    let _work = make_copies(&driver.catalog, &["node-1", "node-2", "node-3"]);
    let publish = |node: &'static str| driver.publish(&id, node, Mode::SingleNodeWriter, false);
    assert_eq!(refused(publish("node-3").await), Code::FailedPrecondition, "it lacks everything");
    publish("node-1").await.expect("the member");
    driver.modify(&id, &[("replicas", "3")]).await.expect("another one");
    assert_eq!(object(&driver, &id).await.spec.mirror.expect("mirrored").copies.len(), 3);
    assert_eq!(driver.create(at("pvc", &[1])).await.expect("as it was asked for").volume_id, id);
    driver.modify(&id, &[("replication", "none")]).await.expect("one is enough");
    let mirror = object(&driver, &id).await.spec.mirror.expect("it stays one, with one copy");
    assert_eq!(mirror.copies.keys().copied().collect::<Vec<_>>(), [tree]);
    driver.unpublish(&id, "node-1").await.expect("unpublished");
    assert_eq!(refused(publish("node-3").await), Code::FailedPrecondition);
    driver.modify(&id, &[("replication", "sync")]).await.expect("and again");
    driver.delete(&id).await.expect("deleted");
}

/// The process dies after the spec is written: whoever comes next writes the configuration.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mode_change_that_was_cut_off_is_finished() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    let id = driver.create(at("pvc", &[1])).await.expect("created").volume_id;
    driver.modify(&id, &[("replication", "sync")]).await.expect("recorded");
    let written = driver.catalog.get::<VolumeConfiguration>(&id).await.expect("readable").expect("there");
    driver.catalog.delete(&written).await.expect("as if it never was");
    let tending = tokio::spawn({
        let controller = driver.controller.clone();
        async move { controller.tend().await }
    });
    let begun = async {
        while configuration(&driver, &id).await.is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, begun).await.expect("written again");
    tending.abort();
    let again = configuration(&driver, &id).await.expect("written");
    assert_eq!(again, Configuration::try_from(&written.object).expect("a configuration"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_cannot_be_placed_change_nothing() {
    let (_nodes, driver) = cluster(&[10, 20]).await;
    let id = driver.create(at("pvc", &[1])).await.expect("created").volume_id;
    let before = object(&driver, &id).await;
    let three = driver.modify(&id, &[("replication", "sync"), ("replicas", "3"), ("verifyReads", "true")]).await;
    assert_eq!(refused(three), Code::ResourceExhausted);
    assert_eq!(object(&driver, &id).await, before);
    let site = Site::new();
    let alone = site.driver();
    let id = alone.create(wanted("pvc", GIB)).await.expect("created").volume_id;
    assert_eq!(refused(alone.modify(&id, &[("replication", "sync")]).await), Code::InvalidArgument);
    alone.modify(&id, &[("replication", "none")]).await.expect("as it is");
}
