//! Snapshots, groups, clones and restores of mirrored volumes on the controller's side: who is asked for what and in which
//! order, who holds what afterwards, and what is left of attempts without an answer.

use crate::fake::When;
use crate::mirrors::{configuration, make_copies, mirrored, object};
use crate::nodes::{Cluster, at, cluster};
use crate::site::*;
use std::collections::BTreeSet;
use tandem::catalog::{self, NodeName, Snapshot as Object, VolumeConfiguration};
use tandem::protocol::{Configuration, Lacks};
use tandem::rpc::control;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tandem::volume::InstanceId;
use tonic::Code;

/// A mirrored volume with a copy on nodes 1 and 2, whose replicas know it; its primary shall be on node 1.
pub async fn volume(nodes: &Cluster, driver: &Driver, name: &str) -> String {
    let id = driver.create(mirrored(name, &[1], "2")).await.expect("created").volume_id;
    follow(nodes, driver, &id).await;
    id
}

/// The replicas of the volume's nodes have its copies, all of which follow what the primary does.
async fn follow(nodes: &Cluster, driver: &Driver, id: &str) {
    let mirror = object(driver, id).await.spec.mirror.expect("mirrored");
    for (copy, spec) in &mirror.copies {
        let number: usize = spec.node.0.trim_start_matches("node-").parse().expect("a number");
        let mut state = nodes.fakes[number - 1].state();
        let there = control::Volume {
            volume_id: id.into(),
            pool: "default".into(),
            size_bytes: GIB,
            ready: true,
            ..Default::default()
        };
        state.volumes.insert(id.into(), there);
        state.tree = copy.to_string();
        state.members.insert(id.into(), mirror.copies.keys().map(ToString::to_string).collect());
    }
}

pub async fn snapshots(driver: &Driver) -> Vec<Object> {
    driver.catalog.list::<Object>().await.expect("readable").into_iter().map(|stored| stored.object).collect()
}

fn held(nodes: &Cluster, number: usize) -> Vec<String> {
    nodes.fakes[number - 1].state().snapshots.keys().cloned().collect()
}

pub fn called(nodes: &Cluster, number: usize, name: &str) -> usize {
    nodes.fakes[number - 1].state().calls.iter().filter(|call| **call == name).count()
}

fn names(nodes: &[&str]) -> BTreeSet<NodeName> {
    nodes.iter().map(|node| NodeName((*node).into())).collect()
}

/// The copy on node 2 has left the configuration.
async fn drop_node_2(driver: &Driver, id: &str) {
    let mirror = object(driver, id).await.spec.mirror.expect("mirrored");
    let gone = mirror.copies.iter().find(|(_, spec)| spec.node.0 == "node-2").map(|(copy, _)| *copy).expect("there");
    let stored = driver.catalog.get::<VolumeConfiguration>(id).await.expect("readable").expect("there");
    let mut next = Configuration::try_from(&stored.object).expect("a configuration");
    next.secondaries.remove(&gone);
    next.candidates.insert(gone, Lacks::Since(next.stamp));
    next.stamp.version = next.stamp.version.next();
    let object = VolumeConfiguration::new(id.parse().expect("an id"), &next);
    driver.catalog.update(catalog::Stored { object, ..stored }).await.expect("committed");
}

pub const ALL: [&str; 3] = ["node-1", "node-2", "node-3"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_on_every_member_and_goes_from_each() {
    let (nodes, driver) = cluster(&[100, 50, 20]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let taken = driver.snapshot("snap", &id).await.expect("taken");
    assert!(taken.ready_to_use && taken.source_volume_id == id);
    assert_eq!(driver.snapshot("snap", &id).await.expect("the same"), taken);
    let [found] = &snapshots(&driver).await[..] else { panic!("one snapshot") };
    assert_eq!((found.holders(), found.strays.clone()), (names(&["node-1", "node-2"]), names(&[])));
    assert_eq!((held(&nodes, 1), held(&nodes, 2)), (vec![taken.snapshot_id.clone()], vec![taken.snapshot_id.clone()]));
    let asked = |number, name| called(&nodes, number, name);
    assert_eq!((asked(1, "PromiseSnapshots"), asked(1, "EnsureSnapshots"), asked(1, "AdoptSnapshots")), (0, 1, 0));
    assert_eq!((asked(2, "PromiseSnapshots"), asked(2, "EnsureSnapshots"), asked(2, "AdoptSnapshots")), (1, 0, 1));
    // The volume may go first.
    driver.delete(&id).await.expect("deleted");
    driver.delete_snapshot(&taken.snapshot_id).await.expect("deleted");
    assert!(held(&nodes, 1).is_empty() && held(&nodes, 2).is_empty() && snapshots(&driver).await.is_empty());
    assert_eq!(asked(3, "DeleteSnapshot"), 0, "it never had anything");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_without_an_answer_is_given_up_with_its_id() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    for when in [When::Before, When::After] {
        // Each call at each node: the promise, the seal, and the name.
        for (node, number) in [(2, 0), (1, 0), (2, 1)] {
            nodes.fakes[node - 1].fail_call(number, when, Code::Unavailable);
            assert_eq!(refused(driver.snapshot("snap", &id).await), Code::Unavailable);
            assert!(driver.snapshots().await.is_empty());
            let tried = snapshots(&driver).await[0].id.to_string();
            let taken = driver.snapshot("snap", &id).await.expect("another attempt");
            assert_ne!(taken.snapshot_id, tried, "some copies may have something under that id");
            let given_up = snapshots(&driver).await.into_iter().find(|snapshot| snapshot.id.to_string() == tried);
            assert!(given_up.is_some_and(|snapshot| snapshot.deleted && snapshot.name.is_none()));
            driver.controller.sweep_given_up().await.expect("swept");
            assert_eq!(
                (held(&nodes, 1), held(&nodes, 2)),
                (vec![taken.snapshot_id.clone()], vec![taken.snapshot_id.clone()])
            );
            assert_eq!(driver.snapshot("snap", &id).await.expect("the same"), taken);
            driver.delete_snapshot(&taken.snapshot_id).await.expect("deleted");
            assert!(snapshots(&driver).await.is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_down_is_named_and_is_no_holder_when_it_has_left() {
    let (mut nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    nodes.stop(2);
    let status = driver.snapshot("snap", &id).await.expect_err("a member is down");
    assert!(status.code() == Code::Unavailable && status.message().contains("node-2"), "{status:?}");
    // Its primary goes on without it.
    drop_node_2(&driver, &id).await;
    let mirror = object(&driver, &id).await.spec.mirror.expect("mirrored");
    let left = mirror.copies.iter().filter(|(_, spec)| spec.node.0 == "node-1").map(|(copy, _)| copy.to_string());
    nodes.fakes[0].state().members.insert(id.clone(), left.collect());
    let taken = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    let found = driver.catalog.get::<Object>(&taken).await.expect("readable").expect("there").object;
    assert_eq!((found.holders(), found.strays), (names(&["node-1"]), names(&["node-2"])));
    // It may have something under that id: that goes when the node answers, which it may never do again.
    driver.delete_snapshot(&taken).await.expect("deleted to the end");
    assert!(driver.snapshots().await.is_empty() && held(&nodes, 1).is_empty());
    let left = driver.catalog.get::<Object>(&taken).await.expect("readable").expect("there").object;
    assert!(left.deleted && left.name.is_none() && left.strays == names(&["node-2"]));
    driver.delete_snapshot(&taken).await.expect("and again");
    // The name is free all the same.
    let another = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    assert_ne!(another, taken);
    // The wish may be for a node that is down.
    driver.publish(&id, "node-1", Mode::SingleNodeWriter, false).await.expect("published");
    driver.unpublish(&id, "node-1").await.expect("unpublished");
    nodes.stop(1);
    let status = driver.snapshot("later", &id).await.expect_err("its primary is down");
    assert!(status.code() == Code::Unavailable && status.message().contains("node-1"), "{status:?}");
}

/// Whoever restored it then would find it on some nodes and not on others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_is_not_taken_back_once_a_node_has_erased_it() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let snapshot = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    let refuse = |node: usize| nodes.fakes[node - 1].fail_call(0, When::Before, Code::FailedPrecondition);
    let away = |node: usize| nodes.fakes[node - 1].fail_call(0, When::After, Code::Unavailable);
    // Nobody has erased anything: it is as it was.
    refuse(1);
    assert_eq!(refused(driver.delete_snapshot(&snapshot).await), Code::FailedPrecondition);
    assert_eq!((driver.snapshots().await.len(), held(&nodes, 2).len()), (1, 1));
    // The other one may have: it has no answer.
    away(1);
    refuse(2);
    assert_eq!(refused(driver.delete_snapshot(&snapshot).await), Code::Unavailable);
    assert!(driver.snapshots().await.is_empty() && held(&nodes, 1).is_empty());
    refuse(1);
    assert_eq!(refused(driver.delete_snapshot(&snapshot).await), Code::FailedPrecondition);
    assert!(driver.snapshots().await.is_empty(), "an earlier call has begun it");
    // It has: the rest goes later.
    refuse(2);
    driver.delete_snapshot(&snapshot).await.expect("deleted");
    assert_eq!((driver.snapshots().await.len(), held(&nodes, 2)), (0, vec![snapshot.clone()]));
    assert_eq!(refused(driver.create(from_snapshot("restored", &snapshot)).await), Code::NotFound);
    driver.controller.sweep_given_up().await.expect("swept");
    assert!(snapshots(&driver).await.is_empty() && held(&nodes, 2).is_empty());
}

/// The first attempt has no answer, and the volume is mirrored before the second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_from_before_a_volume_was_mirrored_is_given_up() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let mut ids = Vec::new();
    for name in ["one", "two"] {
        ids.push(driver.create(at(name, &[1])).await.expect("created").volume_id);
    }
    let group = || {
        let source_volume_ids = ids.clone();
        let request = CreateVolumeGroupSnapshotRequest { name: "all".into(), source_volume_ids, ..Default::default() };
        driver.controller.create_group(request.try_into().expect("a request"))
    };
    let no_answer = || nodes.fakes[0].fail_call(0, When::After, Code::Unavailable);
    no_answer();
    assert_eq!(refused(driver.snapshot("snap", &ids[0]).await), Code::Unavailable);
    no_answer();
    group().await.expect_err("no answer");
    driver.modify(&ids[0], &[("replication", "sync")]).await.expect("recorded");
    let _work = make_copies(&driver.catalog, &ALL);
    follow(&nodes, &driver, &ids[0]).await;
    let taken = driver.snapshot("snap", &ids[0]).await.expect("another attempt").snapshot_id;
    let found = driver.catalog.get::<Object>(&taken).await.expect("readable").expect("there").object;
    assert_eq!(found.holders(), names(&["node-1", "node-2"]));
    let all = group().await.expect("another attempt");
    driver.controller.sweep_given_up().await.expect("swept");
    let mut wanted: Vec<_> = all.snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone()).collect();
    wanted.push(taken);
    wanted.sort();
    assert_eq!(held(&nodes, 1), wanted, "nothing of the first attempts");
    assert_eq!(held(&nodes, 2).len(), 2, "of the mirrored one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_room_on_one_node_leaves_nothing_on_any() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    nodes.fakes[1].state().pools.insert("default".into(), GIB);
    let status = driver.snapshot("snap", &id).await.expect_err("no room");
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("node-2"), "{status:?}");
    assert!(snapshots(&driver).await.is_empty() && held(&nodes, 1).is_empty());
    assert_eq!(called(&nodes, 1, "EnsureSnapshots"), 0, "nobody was asked to seal");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_made_from_a_snapshot_begins_where_it_is() {
    let (nodes, driver) = cluster(&[100, 50, 20]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let snapshot = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    // One copy: on any holder, as the caller likes.
    let there = CreateVolumeRequest {
        accessibility_requirements: at("", &[2]).accessibility_requirements,
        ..from_snapshot("one", &snapshot)
    };
    assert_eq!(driver.create(there).await.expect("restored").accessible_topology, [place("node-2")]);
    assert!(nodes.fakes[1].state().volumes.len() == 2 && nodes.fakes[0].state().volumes.len() == 1);
    // Two copies: clones, in the trees that hold it, members from the start.
    let sync = |name: &str, nodes: &[usize], replicas: &str| CreateVolumeRequest {
        parameters: mirrored(name, nodes, replicas).parameters,
        accessibility_requirements: at(name, nodes).accessibility_requirements,
        ..from_snapshot(name, &snapshot)
    };
    let made = driver.create(sync("two", &[], "2")).await.expect("restored").volume_id;
    let source = object(&driver, &id).await.spec.mirror.expect("mirrored");
    let spec = object(&driver, &made).await.spec;
    assert_eq!(spec.mirror.expect("mirrored").copies, source.copies);
    let base = spec.base.expect("a base");
    assert!(base.snapshot.to_string() == snapshot && base.clones == source.copies.keys().copied().collect());
    let first = configuration(&driver, &made).await.expect("written");
    assert!(first.members().count() == 2 && first.candidates.is_empty());
    // The caller wants it where nobody holds it: that copy is filled by a holder.
    let made = driver.create(sync("away", &[3], "2")).await.expect("restored").volume_id;
    let spec = object(&driver, &made).await.spec;
    let (mirror, base) = (spec.mirror.expect("mirrored"), spec.base.expect("a base"));
    let first = configuration(&driver, &made).await.expect("written");
    let (primary, empty) = (first.primary.expect("a primary"), *first.candidates.keys().next().expect("an empty copy"));
    assert_eq!(mirror.primary, Some(primary));
    assert!(base.clones == BTreeSet::from([primary]) && source.copies.contains_key(&primary));
    assert!(mirror.copies[&empty].node.0 == "node-3" && first.candidates[&empty] == Lacks::Everything);
    // Three copies, two of which are clones.
    let made = driver.create(sync("three", &[], "3")).await.expect("restored").volume_id;
    let first = configuration(&driver, &made).await.expect("written");
    assert_eq!((first.members().count(), first.candidates.len()), (2, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_stays_while_a_volume_is_being_made_from_it() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let snapshot = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    work.abort();
    let wanted =
        CreateVolumeRequest { parameters: mirrored("", &[], "2").parameters, ..from_snapshot("restored", &snapshot) };
    assert_eq!(refused(driver.create(wanted.clone()).await), Code::Aborted, "no node makes its copy");
    let status = driver.delete_snapshot(&snapshot).await.expect_err("it is needed");
    assert!(status.code() == Code::FailedPrecondition && status.message().contains("being made"), "{status:?}");
    assert_eq!(held(&nodes, 1), [snapshot.as_str()]);
    let _work = make_copies(&driver.catalog, &ALL);
    driver.create(wanted).await.expect("restored");
    driver.delete_snapshot(&snapshot).await.expect("deleted");
    assert!(held(&nodes, 1).is_empty() && held(&nodes, 2).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_one_copy_is_restored_to_several() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = driver.create(at("pvc", &[1])).await.expect("created").volume_id;
    let tree = InstanceId::random();
    nodes.fakes[0].state().tree = tree.to_string();
    let snapshot = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    let wanted =
        CreateVolumeRequest { parameters: mirrored("", &[], "2").parameters, ..from_snapshot("pvc-2", &snapshot) };
    let made = driver.create(wanted.clone()).await.expect("restored");
    assert_eq!(driver.create(wanted).await.expect("the same"), made);
    let first = configuration(&driver, &made.volume_id).await.expect("written");
    assert!(first.primary == Some(tree) && first.secondaries.is_empty() && first.candidates.len() == 1);
    // And straight from the volume: by a snapshot that nobody sees.
    let clone = CreateVolumeRequest { parameters: mirrored("", &[], "2").parameters, ..from_volume("clone", &id) };
    let clone = driver.create(clone).await.expect("cloned").volume_id;
    assert_eq!(configuration(&driver, &clone).await.expect("written").primary, Some(tree));
    assert_eq!(held(&nodes, 1), [snapshot]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_of_a_mirrored_volume_leaves_no_snapshot() {
    let (nodes, driver) = cluster(&[100, 50, 20]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let single = driver.create(from_volume("single", &id)).await.expect("cloned");
    let again = driver.create(from_volume("single", &id)).await.expect("the same");
    assert_eq!(single, again);
    let sync = CreateVolumeRequest { parameters: mirrored("", &[], "2").parameters, ..from_volume("sync", &id) };
    let sync = driver.create(sync).await.expect("cloned");
    assert_eq!(configuration(&driver, &sync.volume_id).await.expect("written").members().count(), 2);
    assert!(snapshots(&driver).await.is_empty() && held(&nodes, 1).is_empty() && held(&nodes, 2).is_empty());
    // One whose clone was refused goes as well, and one that could not be taken away is not forgotten.
    let limit = CreateVolumeRequest { capacity_range: Some(range(GIB / 2, GIB / 2)), ..from_volume("small", &id) };
    assert_eq!(refused(driver.create(limit).await), Code::OutOfRange);
    assert!(snapshots(&driver).await.is_empty() && held(&nodes, 1).is_empty());
    nodes.fakes[1].fail_call(2, When::Before, Code::Unavailable);
    driver.create(from_volume("later", &id)).await.expect("cloned");
    assert_eq!((snapshots(&driver).await.len(), driver.snapshots().await.len()), (1, 0), "nobody sees it");
    driver.controller.sweep_given_up().await.expect("swept");
    assert!(snapshots(&driver).await.is_empty() && held(&nodes, 2).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_of_volumes_with_their_primaries_on_one_node() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let one = volume(&nodes, &driver, "one").await;
    let two = volume(&nodes, &driver, "two").await;
    let plain = driver.create(at("plain", &[1])).await.expect("created").volume_id;
    let all = vec![one.clone(), two.clone(), plain];
    let take = |name: &str| {
        let source_volume_ids = all.clone();
        let request = CreateVolumeGroupSnapshotRequest { name: name.into(), source_volume_ids, ..Default::default() };
        driver.controller.create_group(request.try_into().expect("a request"))
    };
    nodes.fakes[0].fail_call(0, When::After, Code::Unavailable);
    take("group").await.expect_err("no answer");
    let group = take("group").await.expect("another attempt");
    assert_eq!(take("group").await.expect("the same"), group);
    driver.controller.sweep_given_up().await.expect("swept");
    let taken: BTreeSet<_> = group.snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone()).collect();
    assert_eq!(held(&nodes, 1).into_iter().collect::<BTreeSet<_>>(), taken, "nothing of the first attempt");
    assert_eq!(held(&nodes, 2).len(), 2, "of the mirrored ones");
    let request = DeleteVolumeGroupSnapshotRequest { group_snapshot_id: group.group_snapshot_id, ..Default::default() };
    driver.controller.delete_group(request.try_into().expect("a request")).await.expect("deleted");
    assert!(held(&nodes, 1).is_empty() && held(&nodes, 2).is_empty() && snapshots(&driver).await.is_empty());
    // One primary is elsewhere now.
    driver.publish(&two, "node-2", Mode::SingleNodeWriter, false).await.expect("published");
    let apart = take("apart").await.expect_err("two nodes").to_string();
    assert!(apart.contains("node-1, node-2"), "{apart}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_with_one_copy_is_made_at_a_holder_of_its_source_that_answers() {
    let (mut nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let taken = driver.snapshot("snap", &id).await.expect("taken").snapshot_id;
    nodes.stop(1);
    let restored = driver.create(from_snapshot("restored", &taken)).await.expect("node 2 has it, too");
    assert_eq!(restored.accessible_topology, [place("node-2")]);
    nodes.stop(2);
    let status = driver.create(from_snapshot("another", &taken)).await.expect_err("nobody answers");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(driver.catalog.list::<catalog::Volume>().await.expect("readable").len() == 2, "nothing was begun");
}

/// A copy may have followed its seal without being told. Of a volume with one copy nobody follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_cannot_be_opened_keeps_what_it_may_have_followed_and_nothing_else() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let mirrored = driver.snapshot("mirrored", &id).await.expect("taken").snapshot_id;
    let sole = driver.create(at("sole", &[2])).await.expect("created").volume_id;
    let single = driver.snapshot("single", &sole).await.expect("taken").snapshot_id;
    {
        let mut state = nodes.fakes[1].state();
        state.closed = true;
        state.snapshots.clear();
    }
    driver.delete_snapshot(&single).await.expect("deleted");
    driver.delete_snapshot(&mirrored).await.expect("deleted, but for what may be there");
    driver.controller.sweep_given_up().await.expect("it goes on with the others");
    assert_eq!(snapshots(&driver).await.len(), 1);
    nodes.fakes[1].state().closed = false;
    driver.controller.sweep_given_up().await.expect("swept");
    assert!(snapshots(&driver).await.is_empty());
}
