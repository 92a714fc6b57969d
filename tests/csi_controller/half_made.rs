//! A catalogue that calls half made what its callers know: it was restored from a backup that was made a moment before they
//! had their answers. What is half made indeed goes.

use crate::mirror_snapshots::{ALL, volume};
use crate::mirrors::{configuration, make_copies, object};
use crate::nodes::cluster;
use crate::site::*;
use std::slice;
use tandem::catalog::{
    GroupSnapshot, GroupStatus, Snapshot as SnapshotObject, SnapshotStatus, UpdateError, Volume as Object,
    VolumeConfiguration, VolumePhase,
};
use tandem::csi::errors::Transient;
use tandem::csi::group::GroupService;
use tandem::protocol::Configuration;
use tandem::rpc::control;
use tandem::rpc::csi::group_controller_server::GroupController as _;
use tandem::rpc::csi::*;
use tonic::Request;

/// Of what a node says of its copy.
type Change = fn(&mut control::Volume);

/// Changes the volume, and again if it lost a race: the nodes that [`make_copies`] plays write into it as well.
async fn change(driver: &Driver, id: &str, to: impl Fn(&mut Object)) {
    loop {
        let mut stored = driver.catalog.get::<Object>(id).await.expect("readable").expect("there");
        to(&mut stored.object);
        match driver.catalog.update(stored).await {
            Ok(_) => return,
            Err(UpdateError::Conflict { .. }) => {}
            Err(error) => panic!("not changed: {error}"),
        }
    }
}

/// Sweeps, and again if it lost a race to a node, as the controller does at its next turn.
async fn swept(driver: &Driver) {
    while let Err(error) = driver.controller.sweep().await {
        assert!(matches!(error, Transient::Conflict(_)), "not swept: {error}");
    }
}

async fn creating(driver: &Driver, id: &str) {
    change(driver, id, |volume| volume.status.phase = VolumePhase::Creating).await;
}

async fn creating_snapshot(driver: &Driver, id: &str) {
    let mut stored = driver.catalog.get::<SnapshotObject>(id).await.expect("readable").expect("there");
    if !stored.object.copies.is_empty() {
        stored.object.strays = std::mem::take(&mut stored.object.copies).into_values().collect();
    }
    stored.object.status = SnapshotStatus::Creating;
    driver.catalog.update(stored).await.expect("restored");
}

#[tokio::test]
async fn a_volume_that_was_used_is_never_taken_away_as_half_made() {
    let site = Site::new();
    let driver = site.driver();
    let changes: [(&str, bool, Change); 3] = [
        ("written", true, |volume| volume.written = true),
        ("attached", true, |volume| volume.device = "/dev/loop7".into()),
        ("empty", false, |_| {}),
    ];
    for (name, used, change) in changes {
        let id = driver.create(wanted(name, GIB)).await.expect("created").volume_id;
        creating(&driver, &id).await;
        change(site.fake.state().volumes.get_mut(&id).expect("there"));
        swept(&driver).await;
        let left = driver.catalog.get::<Object>(&id).await.expect("readable").map(|stored| stored.object);
        assert_eq!(site.fake.state().volumes.contains_key(&id), used, "{name}");
        assert_eq!(left.as_ref().map(|volume| volume.spec.deleted), used.then_some(false), "{name}");
        if used {
            driver.controller.recover().await.expect("recovered");
            assert!(object(&driver, &id).await.is_visible(), "{name}");
            assert_eq!(driver.create(wanted(name, GIB)).await.expect("the same").volume_id, id);
        }
    }
    // Who names it knows it.
    let id = driver.create(wanted("written", GIB)).await.expect("the same").volume_id;
    creating(&driver, &id).await;
    driver.delete(&id).await.expect("deleted");
    assert!(!site.fake.state().volumes.contains_key(&id));
}

#[tokio::test]
async fn a_snapshot_that_was_taken_is_there_and_one_that_was_not_goes() {
    let site = Site::new();
    let driver = site.driver();
    let id = driver.create(wanted("data", GIB)).await.expect("created").volume_id;
    let taken = driver.snapshot("snap", &id).await.expect("taken");
    creating_snapshot(&driver, &taken.snapshot_id).await;
    assert!(driver.snapshots().await.is_empty());
    swept(&driver).await;
    assert_eq!(driver.snapshots().await, slice::from_ref(&taken));
    creating_snapshot(&driver, &taken.snapshot_id).await;
    assert_eq!(driver.controller.recover().await.expect("recovered").snapshots, 1);
    assert_eq!(driver.snapshots().await, slice::from_ref(&taken));
    creating_snapshot(&driver, &taken.snapshot_id).await;
    site.fake.state().snapshots.clear();
    swept(&driver).await;
    assert!(driver.catalog.list::<SnapshotObject>().await.expect("readable").is_empty());
}

/// What a node does not list may be in a pool that it cannot open now.
#[tokio::test]
async fn a_snapshot_in_a_pool_that_cannot_be_opened_is_not_taken_away() {
    let site = Site::new();
    let driver = site.driver();
    let id = driver.create(wanted("data", GIB)).await.expect("created").volume_id;
    let taken = driver.snapshot("snap", &id).await.expect("taken");
    creating_snapshot(&driver, &taken.snapshot_id).await;
    let there = std::mem::take(&mut site.fake.state().snapshots);
    site.fake.state().closed = true;
    driver.controller.sweep().await.expect_err("nobody can say whether it was taken");
    let kept = driver.catalog.get::<SnapshotObject>(&taken.snapshot_id).await.expect("readable").expect("there");
    assert!(!kept.object.deleted, "{kept:?}");
    (site.fake.state().snapshots, site.fake.state().closed) = (there, false);
    swept(&driver).await;
    assert_eq!(driver.snapshots().await, slice::from_ref(&taken));
}

/// Of two new volumes.
async fn group_of_two(driver: &Driver) -> CreateVolumeGroupSnapshotRequest {
    let mut source_volume_ids = Vec::new();
    for name in ["one", "two"] {
        source_volume_ids.push(driver.create(wanted(name, GIB)).await.expect("created").volume_id);
    }
    CreateVolumeGroupSnapshotRequest { name: "group".into(), source_volume_ids, ..Default::default() }
}

/// The process has died after it had given up the members of an attempt, and before it wrote down those of the next one.
#[tokio::test]
async fn a_group_whose_members_were_given_up_goes_with_them() {
    let site = Site::new();
    let driver = site.driver();
    let request = group_of_two(&driver).await;
    let groups = GroupService(driver.controller.clone());
    accepted(groups.create_volume_group_snapshot(Request::new(request)).await);
    let mut stored = driver.catalog.list::<GroupSnapshot>().await.expect("readable").remove(0);
    stored.object.status = GroupStatus::Creating;
    driver.catalog.update(stored).await.expect("as it was");
    for mut stored in driver.catalog.list::<SnapshotObject>().await.expect("readable") {
        let member = &mut stored.object;
        (member.status, member.deleted, member.group) = (SnapshotStatus::Creating, true, None);
        driver.catalog.update(stored).await.expect("given up");
    }
    swept(&driver).await;
    assert!(driver.catalog.list::<GroupSnapshot>().await.expect("readable").is_empty(), "it has no snapshots");
    assert!(driver.catalog.list::<SnapshotObject>().await.expect("readable").is_empty());
    assert!(site.fake.state().snapshots.is_empty());
}

#[tokio::test]
async fn a_group_that_was_taken_is_there_and_a_part_of_one_stays() {
    let site = Site::new();
    let driver = site.driver();
    let request = group_of_two(&driver).await;
    let groups = GroupService(driver.controller.clone());
    let taken = accepted(groups.create_volume_group_snapshot(Request::new(request.clone())).await);
    let status = async || driver.catalog.list::<GroupSnapshot>().await.expect("readable").remove(0).object.status;
    let restore = async || {
        let mut stored = driver.catalog.list::<GroupSnapshot>().await.expect("readable").remove(0);
        stored.object.status = GroupStatus::Creating;
        driver.catalog.update(stored).await.expect("restored");
        for stored in driver.catalog.list::<SnapshotObject>().await.expect("readable") {
            driver.catalog.delete(&stored).await.expect("restored");
        }
    };
    restore().await;
    swept(&driver).await;
    assert!(matches!(status().await, GroupStatus::Ready { .. }));
    let again = accepted(groups.create_volume_group_snapshot(Request::new(request)).await);
    assert_eq!(again, taken);
    restore().await;
    let lost = site.fake.state().snapshots.pop_first().expect("one of them");
    swept(&driver).await;
    assert_eq!((status().await, site.fake.state().snapshots.len()), (GroupStatus::Creating, 1), "{lost:?} is lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirrored_volume_goes_only_when_every_node_says_that_it_is_empty() {
    let (mut nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    creating(&driver, &id).await;
    let known = configuration(&driver, &id).await.expect("written");
    let mut newer = Configuration { stamp: known.stamp, ..known };
    newer.stamp.version = newer.stamp.version.next();
    let text = VolumeConfiguration::new(id.parse().expect("an id"), &newer).encode();
    let changes: [&dyn Fn(&mut control::Volume); 3] =
        [&|volume| volume.written = true, &|volume| volume.device = "/dev/loop7".into(), &|volume| {
            volume.record = Some(control::CopyRecord { configuration: text.clone(), ..Default::default() })
        }];
    for (number, change) in changes.into_iter().enumerate() {
        let before = nodes.fakes[1].state().volumes[&id].clone();
        change(nodes.fakes[1].state().volumes.get_mut(&id).expect("there"));
        swept(&driver).await;
        let kept = object(&driver, &id).await;
        assert!(!kept.spec.deleted && kept.status.copies.len() == 2, "case {number}");
        nodes.fakes[1].state().volumes.insert(id.clone(), before);
    }
    // An earlier version has begun to delete one that was used: that is taken back.
    nodes.fakes[1].state().volumes.get_mut(&id).expect("there").written = true;
    change(&driver, &id, |volume| {
        volume.spec.deleted = true;
        volume.status.copies.clear();
    })
    .await;
    swept(&driver).await;
    assert!(!object(&driver, &id).await.spec.deleted);
    nodes.fakes[1].state().volumes.get_mut(&id).expect("there").written = false;
    swept(&driver).await;
    assert!(driver.catalog.get::<Object>(&id).await.expect("readable").is_none(), "nobody has ever used it");

    let silent = volume(&nodes, &driver, "silent").await;
    creating(&driver, &silent).await;
    let there = std::mem::take(&mut nodes.fakes[1].state().volumes);
    nodes.fakes[1].state().closed = true;
    driver.controller.sweep().await.expect_err("its copy may be in a pool that is not open");
    assert!(!object(&driver, &silent).await.spec.deleted);
    (nodes.fakes[1].state().volumes, nodes.fakes[1].state().closed) = (there, false);
    nodes.stop(2);
    driver.controller.sweep().await.expect_err("node 2 may have what nobody else has");
    assert!(!object(&driver, &silent).await.spec.deleted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_a_mirrored_volume_is_on_the_nodes_that_were_told() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    let taken = driver.snapshot("snap", &id).await.expect("taken");
    let before =
        driver.catalog.get::<SnapshotObject>(&taken.snapshot_id).await.expect("readable").expect("there").object;
    for recovers in [false, true] {
        creating_snapshot(&driver, &taken.snapshot_id).await;
        if recovers {
            // What the nodes say of the volume's copies is another test's subject.
            nodes.fakes.iter().for_each(|fake| {
                let mut state = fake.state();
                let copy_id = state.tree.clone();
                let volume = state.volumes.get_mut(&id).expect("there");
                volume.record = Some(control::CopyRecord { copy_id, ..Default::default() });
            });
            driver.controller.recover().await.expect("recovered");
        } else {
            swept(&driver).await;
        }
        let after = driver.catalog.get::<SnapshotObject>(&taken.snapshot_id).await.expect("readable").expect("there");
        assert_eq!(after.object, before, "recovers: {recovers}");
    }
    // Node 2 has followed the seal and was never told.
    creating_snapshot(&driver, &taken.snapshot_id).await;
    nodes.fakes[1].state().snapshots.values_mut().for_each(|snapshot| snapshot.descriptor.clear());
    swept(&driver).await;
    let after =
        driver.catalog.get::<SnapshotObject>(&taken.snapshot_id).await.expect("readable").expect("there").object;
    assert_eq!((after.copies.len(), after.strays.len()), (1, 1), "{after:?}");
}
