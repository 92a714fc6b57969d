//! Group snapshots.

use crate::site::*;
use tandem::csi::group::GroupService;
use tandem::rpc::csi::group_controller_server::GroupController as _;
use tandem::rpc::csi::*;
use tonic::{Code, Request, Status};

async fn create(driver: &Driver, name: &str, volumes: &[&str]) -> Result<VolumeGroupSnapshot, Status> {
    let request = CreateVolumeGroupSnapshotRequest {
        name: name.into(),
        source_volume_ids: volumes.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    let service = GroupService(driver.controller.clone());
    let answer = service.create_volume_group_snapshot(Request::new(request)).await?;
    Ok(answer.into_inner().group_snapshot.expect("a group"))
}

async fn get(driver: &Driver, id: &str, snapshots: &[String]) -> Result<VolumeGroupSnapshot, Status> {
    let request = GetVolumeGroupSnapshotRequest {
        group_snapshot_id: id.into(),
        snapshot_ids: snapshots.to_vec(),
        ..Default::default()
    };
    let service = GroupService(driver.controller.clone());
    let answer = service.get_volume_group_snapshot(Request::new(request)).await?;
    Ok(answer.into_inner().group_snapshot.expect("a group"))
}

async fn delete(driver: &Driver, id: &str, snapshots: &[String]) -> Result<(), Status> {
    let request = DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: id.into(),
        snapshot_ids: snapshots.to_vec(),
        ..Default::default()
    };
    GroupService(driver.controller.clone()).delete_volume_group_snapshot(Request::new(request)).await.map(drop)
}

fn members(group: &VolumeGroupSnapshot) -> Vec<String> {
    group.snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone()).collect()
}

#[tokio::test]
async fn a_group_is_one_point_in_time_and_one_thing() {
    let site = Site::new();
    let driver = site.driver();
    let one = driver.create(wanted("pvc-1", MIB)).await.expect("created").volume_id;
    let two = driver.create(wanted("pvc-2", 2 * MIB)).await.expect("created").volume_id;
    let group = create(&driver, "group", &[&one, &two]).await.expect("taken");
    assert!(group.ready_to_use && group.snapshots.len() == 2);
    for snapshot in &group.snapshots {
        assert_eq!(snapshot.creation_time, group.creation_time);
        assert_eq!(snapshot.group_snapshot_id, group.group_snapshot_id);
        assert_eq!(refused(driver.delete_snapshot(&snapshot.snapshot_id).await), Code::InvalidArgument);
    }
    assert_eq!(create(&driver, "group", &[&two, &one]).await.expect("found"), group, "in any order");
    assert_eq!(refused(create(&driver, "group", &[&one]).await), Code::AlreadyExists);
    let (id, snapshots) = (group.group_snapshot_id.clone(), members(&group));
    assert_eq!(get(&driver, &id, &snapshots).await.expect("found"), group);
    assert_eq!(get(&driver, &id, &[]).await.expect("found"), group);
    assert_eq!(driver.snapshots().await.len(), 2);
    driver.create(from_snapshot("restored", &snapshots[0])).await.expect("restored");
    assert_eq!(refused(get(&driver, &id, &snapshots[..1]).await), Code::InvalidArgument);
    assert_eq!(refused(delete(&driver, &id, &snapshots[..1]).await), Code::InvalidArgument);
    for _ in 0..2 {
        delete(&driver, &id, &snapshots).await.expect("deleted");
    }
    assert!(driver.snapshots().await.is_empty() && site.fake.state().snapshots.is_empty());
    assert_eq!(refused(get(&driver, &id, &[]).await), Code::NotFound);
}

#[tokio::test]
async fn a_group_that_cannot_be_is_not_taken_in_part() {
    let site = Site::new();
    let driver = site.driver();
    let one = driver.create(wanted("pvc-1", MIB)).await.expect("created").volume_id;
    let large = driver.create(wanted("pvc-2", 60 * GIB)).await.expect("created").volume_id;
    let unknown = uuid::Uuid::new_v4().to_string();
    let refusals: [(&str, &[&str], Code); 7] = [
        ("", &[&one], Code::InvalidArgument),
        ("group", &[], Code::InvalidArgument),
        ("group", &[&one, ""], Code::InvalidArgument),
        ("group", &[&one, &one], Code::InvalidArgument),
        ("group", &[&one, "fake-vol-id"], Code::NotFound),
        ("group", &[&one, &unknown], Code::NotFound),
        ("group", &[&one, &large], Code::ResourceExhausted),
    ];
    for (name, volumes, code) in refusals {
        assert_eq!(refused(create(&driver, name, volumes).await), code, "{name:?} {volumes:?}");
    }
    assert!(site.fake.state().snapshots.is_empty());
    assert!(driver.catalog.list::<tandem::catalog::GroupSnapshot>().await.expect("lists").is_empty());
    assert_eq!(refused(get(&driver, "", &[]).await), Code::InvalidArgument);
    assert_eq!(refused(get(&driver, "fake", &[]).await), Code::NotFound);
    assert_eq!(refused(delete(&driver, "", &[]).await), Code::InvalidArgument);
    delete(&driver, "fake", &[]).await.expect("deleted already");
}
