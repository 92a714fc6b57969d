//! ControllerExpandVolume, ControllerModifyVolume, ControllerGetVolume, the health of volumes, and a replica that is away.

use crate::fake::When;
use crate::site::*;
use tandem::rpc::control::{Health, health::Kind};
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tonic::{Code, Request};

#[tokio::test]
async fn growing_is_idempotent_and_exact() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    for _ in 0..2 {
        assert_eq!(driver.expand(&volume, 128 * MIB, 128 * MIB).await.expect("grown"), 128 * MIB);
    }
    assert_eq!(driver.expand(&volume, 64 * MIB, 0).await.expect("large enough"), 128 * MIB);
    assert_eq!(driver.expand(&volume, 128 * MIB + 1, 0).await.expect("rounded"), 128 * MIB + 4096);
    assert_eq!(refused(driver.expand(&volume, 64 * MIB, 100 * MIB).await), Code::OutOfRange);
    assert_eq!(refused(driver.expand(&volume, 9 << 40, 0).await), Code::OutOfRange);
    assert_eq!(refused(driver.expand(&volume, 200 * GIB, 0).await), Code::ResourceExhausted);
    assert_eq!(refused(driver.expand(&volume, 0, 0).await), Code::InvalidArgument);
    assert_eq!(refused(driver.expand("", GIB, 0).await), Code::InvalidArgument);
    assert_eq!(refused(driver.expand("fake-vol-id", GIB, 0).await), Code::NotFound);
    drop(driver);
    let driver = site.driver();
    driver.controller.sweep().await.expect("swept");
    let sizes: Vec<_> = site.fake.state().volumes.values().map(|volume| volume.size_bytes).collect();
    assert_eq!(sizes, [128 * MIB + 4096], "a refused growth is not tried again");
}

#[tokio::test]
async fn a_block_volume_needs_no_filesystem_to_follow() {
    let site = Site::new();
    let driver = site.driver();
    let capability = block(Mode::SingleNodeWriter);
    let request = CreateVolumeRequest { volume_capabilities: vec![capability.clone()], ..wanted("pvc-1", 64 * MIB) };
    let volume_id = driver.create(request).await.expect("created").volume_id;
    for volume_capability in [None, Some(capability)] {
        let capacity_range = Some(range(128 * MIB, 0));
        let volume_id = volume_id.clone();
        let request =
            ControllerExpandVolumeRequest { volume_id, capacity_range, volume_capability, ..Default::default() };
        let answer = accepted(driver.service.controller_expand_volume(Request::new(request)).await);
        assert!(!answer.node_expansion_required);
    }
}

#[tokio::test]
async fn only_mutable_parameters_change_and_all_or_none() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    let verifies = || site.fake.state().volumes.values().all(|volume| volume.verify_reads);
    let refusals: [&[(&str, &str)]; 5] = [
        &[("XXX_FakeKey", "x")],
        &[("verifyReads", "true"), ("XXX_FakeKey", "x")],
        &[("verifyReads", "true"), ("pool", "other")],
        &[("verifyReads", "maybe")],
        &[("replication", "sync")],
    ];
    for parameters in refusals {
        assert_eq!(refused(driver.modify(&volume, parameters).await), Code::InvalidArgument);
        assert!(!verifies(), "nothing was applied");
    }
    for _ in 0..2 {
        driver.modify(&volume, &[("verifyReads", "true")]).await.expect("modified");
        assert!(verifies());
    }
    driver.modify(&volume, &[]).await.expect("nothing to do");
    assert!(verifies());
    assert_eq!(refused(driver.modify("", &[]).await), Code::InvalidArgument);
    assert_eq!(refused(driver.modify("fake-vol-id", &[("verifyReads", "true")]).await), Code::NotFound);
    let request =
        CreateVolumeRequest { mutable_parameters: map(&[("verifyReads", "true")]), ..wanted("pvc-2", 64 * MIB) };
    driver.create(request).await.expect("created");
    assert!(verifies());
}

#[tokio::test]
async fn health_is_what_the_replica_says() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    let ask = |id: &str| {
        let request = ControllerGetVolumeHealthRequest { volume_id: id.into(), ..Default::default() };
        driver.service.controller_get_volume_health(Request::new(request))
    };
    let health = accepted(ask(&volume).await).volume_health.expect("a health");
    assert_eq!((health.volume_id.as_str(), health.health_statuses.len()), (volume.as_str(), 0));
    let sick = Health { kind: Kind::DataLoss.into(), reason: "Damaged".into(), message: "3 blocks".into() };
    site.fake.state().volumes.values_mut().for_each(|volume| volume.health = vec![sick.clone()]);
    let health = accepted(ask(&volume).await).volume_health.expect("a health");
    assert_eq!(health.health_statuses[0].status(), VolumeHealthErrorType::DataLoss);
    assert_eq!(health.health_statuses[0].message, "3 blocks");
    let page = ControllerListVolumeHealthRequest::default();
    let list = accepted(driver.service.controller_list_volume_health(Request::new(page)).await);
    assert_eq!(list.entries, [health]);
    site.fake.state().volumes.clear();
    let health = accepted(ask(&volume).await).volume_health.expect("a health");
    assert_eq!(health.health_statuses[0].status(), VolumeHealthErrorType::Inaccessible);
    assert_eq!(health.health_statuses[0].reason, "CopyMissing");
    assert_eq!(refused(ask("").await), Code::InvalidArgument);
    assert_eq!(refused(ask("fake-vol-id").await), Code::NotFound);
}

#[tokio::test]
async fn one_volume_can_be_asked_for() {
    let site = Site::new();
    let driver = site.driver();
    let created = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created");
    let ask = |id: &str| {
        driver.service.controller_get_volume(Request::new(ControllerGetVolumeRequest { volume_id: id.into() }))
    };
    assert_eq!(accepted(ask(&created.volume_id).await).volume, Some(created));
    assert_eq!(refused(ask("").await), Code::InvalidArgument);
    assert_eq!(refused(ask("fake-vol-id").await), Code::NotFound);
}

#[tokio::test]
async fn what_the_driver_announces_is_what_it_has() {
    let site = Site::new();
    let request = Request::new(ControllerGetCapabilitiesRequest {});
    let answer = accepted(site.driver().service.controller_get_capabilities(request).await);
    let kind = |capability: ControllerServiceCapability| match capability.r#type {
        Some(controller_service_capability::Type::Rpc(rpc)) => rpc.r#type,
        None => 0,
    };
    let mut announced: Vec<_> = answer.capabilities.into_iter().map(kind).collect();
    announced.sort_unstable();
    assert_eq!(announced, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17], "all but VOLUME_CONDITION (11)");
}

#[tokio::test]
async fn a_replica_that_is_away_is_no_final_error() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    for code in [Code::Unavailable, Code::Internal, Code::Unknown, Code::DeadlineExceeded, Code::Cancelled] {
        let name = format!("pvc-{code:?}");
        site.fake.fail_call(0, When::After, code);
        assert_eq!(refused(driver.create(wanted(&name, MIB)).await), Code::Unavailable);
        driver.create(wanted(&name, MIB)).await.expect("converges");
    }
    assert_eq!(site.fake.state().volumes.len(), 6);
    std::fs::remove_file(&site.socket).expect("removes");
    let away = Driver { controller: driver.controller.clone(), ..driver.clone() };
    assert!(away.publish(&volume, NODE, Mode::SingleNodeWriter, false).await.is_ok(), "needs no replica");
}

#[tokio::test]
async fn a_driver_without_a_replica_says_so() {
    let site = Site::new();
    let driver = site.driver();
    drop(driver);
    let elsewhere = Site { socket: site.directory.path().join("no.sock"), ..site };
    let status = elsewhere.driver().create(wanted("pvc-1", MIB)).await.expect_err("no replica");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("repeat the call"), "{status:?}");
}
