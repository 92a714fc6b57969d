//! CreateSnapshot, DeleteSnapshot, ListSnapshots and GetSnapshot.

use crate::fake::When;
use crate::site::*;
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::*;
use tonic::{Code, Request};

async fn page(driver: &Driver, request: ListSnapshotsRequest) -> (Vec<String>, String) {
    let answer = accepted(driver.service.list_snapshots(Request::new(request)).await);
    let ids = answer.entries.into_iter().filter_map(|entry| Some(entry.snapshot?.snapshot_id));
    (ids.collect(), answer.next_token)
}

#[tokio::test]
async fn the_same_request_is_the_same_snapshot() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    let other = driver.create(wanted("pvc-2", 64 * MIB)).await.expect("created").volume_id;
    let first = driver.snapshot("snap", &volume).await.expect("taken");
    assert!(first.ready_to_use && first.size_bytes == 64 << 20 && first.source_volume_id == volume);
    assert_eq!(first.creation_time.as_ref().map(|time| time.seconds), Some(1_700_000_000));
    assert!(first.group_snapshot_id.is_empty());
    for _ in 0..3 {
        assert_eq!(driver.snapshot("snap", &volume).await.expect("found"), first);
    }
    assert_eq!(refused(driver.snapshot("snap", &other).await), Code::AlreadyExists);
    assert_eq!(site.fake.state().snapshots.len(), 1);
    driver.snapshot(&"ß".repeat(64), &volume).await.expect("128 bytes");
    assert_eq!(refused(driver.snapshot("", &volume).await), Code::InvalidArgument);
    assert_eq!(refused(driver.snapshot("x", "").await), Code::InvalidArgument);
    assert_eq!(refused(driver.snapshot("x", "fake-vol-id").await), Code::NotFound);
    assert_eq!(refused(driver.snapshot(&"x".repeat(129), &volume).await), Code::InvalidArgument);
}

#[tokio::test]
async fn parameters_and_places_of_snapshots_are_checked() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    let base = || CreateSnapshotRequest { name: "s".into(), source_volume_id: volume.clone(), ..Default::default() };
    let create = |request| driver.service.create_snapshot(Request::new(request));
    let parameters = CreateSnapshotRequest { parameters: map(&[("pool", "other")]), ..base() };
    assert_eq!(refused(create(parameters).await), Code::InvalidArgument);
    let requirement = TopologyRequirement { requisite: vec![place("node-2")], preferred: vec![] };
    let elsewhere = CreateSnapshotRequest { accessibility_requirements: Some(requirement), ..base() };
    assert_eq!(refused(create(elsewhere).await), Code::ResourceExhausted);
    let sidecars = map(&[("csi.storage.k8s.io/volumesnapshot/name", "x")]);
    accepted(create(CreateSnapshotRequest { parameters: sidecars, ..base() }).await);
}

#[tokio::test]
async fn no_room_leaves_nothing() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 60 * GIB)).await.expect("created").volume_id;
    assert_eq!(refused(driver.snapshot("snap", &volume).await), Code::ResourceExhausted);
    assert!(driver.catalog.list::<tandem::catalog::Snapshot>().await.expect("lists").is_empty());
    site.fake.state().pools.insert("default".into(), 200 * GIB);
    driver.snapshot("snap", &volume).await.expect("now there is room");
}

#[tokio::test]
async fn snapshots_outlive_their_volume() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    let snapshot = driver.snapshot("snap", &volume).await.expect("taken");
    driver.delete(&volume).await.expect("deleted");
    assert_eq!(driver.snapshots().await, std::slice::from_ref(&snapshot));
    assert_eq!(driver.snapshot("snap", &volume).await.expect("found"), snapshot, "the name is still this one's");
    driver.create(from_snapshot("restored", &snapshot.snapshot_id)).await.expect("restored");
    assert_eq!(refused(driver.snapshot("another", &volume).await), Code::NotFound);
}

#[tokio::test]
async fn deleting_is_idempotent() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    let id = driver.snapshot("snap", &volume).await.expect("taken").snapshot_id;
    for unknown in ["reallyfakesnapshotid", "../..", &uuid::Uuid::new_v4().to_string(), &volume] {
        driver.delete_snapshot(unknown).await.expect("deleted already");
    }
    assert_eq!(refused(driver.delete_snapshot("").await), Code::InvalidArgument);
    site.fake.fail_call(0, When::Before, Code::FailedPrecondition);
    assert_eq!(refused(driver.delete_snapshot(&id).await), Code::FailedPrecondition);
    assert_eq!(driver.snapshots().await.len(), 1, "it is as it was");
    for _ in 0..2 {
        driver.delete_snapshot(&id).await.expect("deleted");
    }
    assert!(site.fake.state().snapshots.is_empty() && driver.snapshots().await.is_empty());
    assert_ne!(driver.snapshot("snap", &volume).await.expect("the name is free").snapshot_id, id);
}

#[tokio::test]
async fn lists_are_filtered_and_paged() {
    let site = Site::new();
    let driver = site.driver();
    let one = driver.create(wanted("pvc-1", MIB)).await.expect("created").volume_id;
    let two = driver.create(wanted("pvc-2", MIB)).await.expect("created").volume_id;
    let mut ids = Vec::new();
    for number in 0..5 {
        ids.push(driver.snapshot(&format!("one-{number}"), &one).await.expect("taken").snapshot_id);
    }
    let alone = driver.snapshot("two", &two).await.expect("taken").snapshot_id;
    ids.sort();
    let of_one = || ListSnapshotsRequest { source_volume_id: one.clone(), ..Default::default() };
    assert_eq!(page(&driver, of_one()).await, (ids.clone(), String::new()));
    let (first, token) = page(&driver, ListSnapshotsRequest { max_entries: 2, ..of_one() }).await;
    assert_eq!(first, ids[..2]);
    let rest = page(&driver, ListSnapshotsRequest { starting_token: token, ..of_one() }).await;
    assert_eq!(rest, (ids[2..].to_vec(), String::new()));
    let by_id = |snapshot_id: &str| ListSnapshotsRequest { snapshot_id: snapshot_id.into(), ..Default::default() };
    assert_eq!(page(&driver, by_id(&alone)).await.0, std::slice::from_ref(&alone));
    assert!(page(&driver, by_id("non-existing-snapshot-id")).await.0.is_empty());
    assert!(page(&driver, ListSnapshotsRequest { source_volume_id: two, ..by_id(&ids[0]) }).await.0.is_empty());
    let unknown = ListSnapshotsRequest { source_volume_id: "none-exist-id".into(), ..Default::default() };
    assert!(page(&driver, unknown).await.0.is_empty());
    let wrong = ListSnapshotsRequest { starting_token: "x".into(), ..Default::default() };
    assert_eq!(refused(driver.service.list_snapshots(Request::new(wrong)).await), Code::Aborted);
    let negative = ListSnapshotsRequest { max_entries: -1, ..Default::default() };
    assert_eq!(refused(driver.service.list_snapshots(Request::new(negative)).await), Code::InvalidArgument);
}

#[tokio::test]
async fn one_snapshot_can_be_asked_for() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", MIB)).await.expect("created").volume_id;
    let snapshot = driver.snapshot("snap", &volume).await.expect("taken");
    let ask = |id: &str| {
        let request = GetSnapshotRequest { snapshot_id: id.into(), ..Default::default() };
        driver.service.get_snapshot(Request::new(request))
    };
    assert_eq!(accepted(ask(&snapshot.snapshot_id).await).snapshot, Some(snapshot));
    assert_eq!(refused(ask("").await), Code::InvalidArgument);
    assert_eq!(refused(ask("non-existing-snapshot-id").await), Code::NotFound);
}
