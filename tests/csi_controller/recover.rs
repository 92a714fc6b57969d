//! The catalogue rebuilt from what the replica finds on the disks.

use crate::site::*;
use tandem::catalog::{Descriptor, RebuildAfter, Volume as Object};
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tandem::volume::VolumeId;
use tonic::Request;

fn lose_the_catalogue(site: &Site) {
    std::fs::remove_file(site.directory.path().join("catalog.redb")).expect("removes");
}

#[tokio::test]
async fn a_lost_catalogue_comes_back_from_the_disks() {
    let site = Site::new();
    let driver = site.driver();
    let parameters = map(&[("csi.storage.k8s.io/fstype", "xfs")]);
    let request = CreateVolumeRequest { parameters, ..wanted("größe", GIB) };
    let volume = driver.create(request.clone()).await.expect("created");
    let snapshot = driver.snapshot("snap", &volume.volume_id).await.expect("taken");
    let clone = driver.create(from_snapshot("clone", &snapshot.snapshot_id)).await.expect("cloned");
    driver.expand(&volume.volume_id, 2 * GIB, 0).await.expect("grown");
    driver.modify(&volume.volume_id, &[("verifyReads", "true")]).await.expect("modified");
    let group = CreateVolumeGroupSnapshotRequest {
        name: "group".into(),
        source_volume_ids: vec![volume.volume_id.clone(), clone.volume_id.clone()],
        ..Default::default()
    };
    let groups = |driver: &Driver| tandem::csi::group::GroupService(driver.controller.clone());
    use group_controller_server::GroupController as _;
    let taken = accepted(groups(&driver).create_volume_group_snapshot(Request::new(group.clone())).await);
    let (volumes, snapshots) = (driver.volumes().await, driver.snapshots().await);
    drop(driver);
    lose_the_catalogue(&site);

    let driver = site.driver();
    assert!(driver.volumes().await.is_empty());
    let report = driver.controller.recover().await.expect("recovered");
    assert_eq!((report.volumes, report.snapshots, report.groups, report.kept), (2, 3, 1, 0), "{report:?}");
    assert!(report.problems.is_empty(), "{report:?}");
    assert_eq!((driver.volumes().await, driver.snapshots().await), (volumes, snapshots));
    let again = driver.create(request).await.expect("the original request still fits");
    assert_eq!((again.volume_id, again.capacity_bytes), (volume.volume_id.clone(), 2 << 30));
    assert_eq!(driver.create(from_snapshot("clone", &snapshot.snapshot_id)).await.expect("found"), clone);
    assert_eq!(driver.snapshot("snap", &volume.volume_id).await.expect("found"), snapshot);
    assert_eq!(accepted(groups(&driver).create_volume_group_snapshot(Request::new(group)).await), taken);
    let report = driver.controller.recover().await.expect("again");
    assert_eq!((report.volumes, report.snapshots, report.groups, report.kept), (0, 0, 0, 6), "nothing is overwritten");
}

#[tokio::test]
async fn what_the_catalogue_has_is_never_overwritten() {
    let site = Site::new();
    let driver = site.driver();
    let old = driver.create(wanted("data", GIB)).await.expect("created");
    drop(driver);
    lose_the_catalogue(&site);
    let driver = site.driver();
    let new = driver.create(wanted("data", GIB)).await.expect("made anew, before anyone recovered");
    driver.publish(&new.volume_id, NODE, Mode::SingleNodeWriter, false).await.expect("published");
    let report = driver.controller.recover().await.expect("recovered");
    assert_eq!((report.volumes, report.kept, report.problems.len()), (1, 1, 1), "{report:?}");
    assert_eq!(driver.volumes().await.len(), 2, "both can be reached by their ids");
    let request = ControllerGetVolumeRequest { volume_id: new.volume_id.clone() };
    let kept = accepted(driver.service.controller_get_volume(Request::new(request)).await);
    assert_eq!(kept.status.expect("a status").published_node_ids, [NODE]);
    assert_eq!(driver.create(wanted("data", GIB)).await.expect("found").volume_id, new.volume_id);
    assert_ne!(old.volume_id, new.volume_id);
}

#[tokio::test]
async fn without_descriptors_the_data_is_still_reachable() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("data", GIB)).await.expect("created").volume_id;
    let snapshot = driver.snapshot("snap", &volume).await.expect("taken").snapshot_id;
    drop(driver);
    lose_the_catalogue(&site);
    site.fake.state().volumes.values_mut().for_each(|volume| volume.descriptor = "rubbish \0".repeat(1 << 20));
    site.fake.state().snapshots.values_mut().for_each(|snapshot| snapshot.descriptor.clear());
    let driver = site.driver();
    let report = driver.controller.recover().await.expect("recovered");
    assert_eq!((report.volumes, report.snapshots, report.problems.len()), (1, 1, 2), "{report:?}");
    driver.publish(&volume, NODE, Mode::SingleNodeWriter, false).await.expect("usable");
    driver.create(from_snapshot("restored", &snapshot)).await.expect("restorable");
}

/// A snapshot that was taken for a clone alone, and what a volume was changed to.
#[tokio::test]
async fn what_nobody_saw_stays_hidden_and_what_was_changed_stays_changed() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("data", GIB)).await.expect("created").volume_id;
    let snapshot = driver.snapshot("snap", &volume).await.expect("taken").snapshot_id;
    {
        let mut state = site.fake.state();
        let made_for = Some(VolumeId::random());
        let hidden = state.snapshots.get_mut(&snapshot).expect("there");
        hidden.descriptor = Descriptor::Snapshot { name: None, group: None, made_for }.encode();
        let changed = state.volumes.get_mut(&volume).expect("there");
        let Some(Descriptor::Volume { request, .. }) = Descriptor::decode(&changed.descriptor) else { panic!("ours") };
        let rebuild_after = Some(RebuildAfter::Seconds(77));
        changed.descriptor = Descriptor::Volume { request, rebuild_after }.encode();
    }
    drop(driver);
    lose_the_catalogue(&site);
    let driver = site.driver();
    let report = driver.controller.recover().await.expect("recovered");
    assert_eq!((report.volumes, report.snapshots, report.problems.len()), (1, 1, 0), "{report:?}");
    assert!(driver.snapshots().await.is_empty(), "nobody knows it");
    let found = driver.catalog.get::<Object>(&volume).await.expect("readable").expect("there").object;
    assert_eq!(found.spec.rebuild_after, RebuildAfter::Seconds(77));
    assert_eq!(found.request.rebuild_after, RebuildAfter::default(), "as it was asked for");
    driver.controller.sweep_given_up().await.expect("swept");
    assert!(site.fake.state().snapshots.is_empty(), "nobody needs it");
}
