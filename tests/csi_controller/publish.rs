//! ControllerPublishVolume, ControllerUnpublishVolume and ValidateVolumeCapabilities.

use crate::site::*;
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tonic::{Code, Request};

async fn published(driver: &Driver, volume: &str) -> Vec<String> {
    let request = ControllerGetVolumeRequest { volume_id: volume.into() };
    let answer = accepted(driver.service.controller_get_volume(Request::new(request)).await);
    answer.status.expect("a status").published_node_ids
}

#[tokio::test]
async fn publishing_is_recorded_and_compared() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", GIB)).await.expect("created").volume_id;
    for _ in 0..2 {
        driver.publish(&volume, NODE, Mode::SingleNodeWriter, false).await.expect("published");
    }
    assert_eq!(published(&driver, &volume).await, [NODE]);
    let list = accepted(driver.service.list_volumes(Request::new(ListVolumesRequest::default())).await);
    assert_eq!(list.entries[0].status.as_ref().expect("a status").published_node_ids, [NODE]);
    for (mode, readonly) in [(Mode::SingleNodeWriter, true), (Mode::SingleNodeReaderOnly, false)] {
        assert_eq!(refused(driver.publish(&volume, NODE, mode, readonly).await), Code::AlreadyExists);
    }
    drop(driver);
    let driver = site.driver();
    assert_eq!(published(&driver, &volume).await, [NODE], "it outlives the process");
    for _ in 0..2 {
        driver.unpublish(&volume, NODE).await.expect("unpublished");
    }
    assert!(published(&driver, &volume).await.is_empty());
    driver.publish(&volume, NODE, Mode::SingleNodeWriter, true).await.expect("now read-only");
}

#[tokio::test]
async fn unknown_volumes_and_nodes_are_named() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", GIB)).await.expect("created").volume_id;
    let publish =
        |volume: &'static str, node: &'static str| driver.publish(volume, node, Mode::SingleNodeWriter, false);
    assert_eq!(refused(publish("", NODE).await), Code::InvalidArgument);
    assert_eq!(refused(publish("x", "").await), Code::InvalidArgument);
    assert_eq!(refused(publish("non-existing-volume-id", "some-fake-node-id").await), Code::NotFound);
    let elsewhere = driver.publish(&volume, "some-fake-node-id", Mode::SingleNodeWriter, false).await;
    assert_eq!(refused(elsewhere), Code::NotFound);
    let many = driver.publish(&volume, NODE, Mode::MultiNodeMultiWriter, false).await;
    assert_eq!(refused(many), Code::InvalidArgument);
    let request = ControllerPublishVolumeRequest { volume_id: volume, node_id: NODE.into(), ..Default::default() };
    assert_eq!(refused(driver.service.controller_publish_volume(Request::new(request)).await), Code::InvalidArgument);
    assert_eq!(refused(driver.unpublish("", NODE).await), Code::InvalidArgument);
    driver.unpublish("fake-vol-id", NODE).await.expect("nothing to do");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_never_has_more_than_its_limit() {
    let site = Site::new();
    let driver = site.driver();
    let mut volumes = Vec::new();
    for number in 0..12 {
        volumes.push(driver.create(wanted(&format!("pvc-{number}"), MIB)).await.expect("created").volume_id);
    }
    let calls = volumes.iter().cloned().map(|volume| {
        let driver = driver.clone();
        tokio::spawn(async move { driver.publish(&volume, NODE, Mode::SingleNodeWriter, false).await })
    });
    let calls: Vec<_> = calls.collect();
    for call in calls {
        if let Err(status) = call.await.expect("no panic") {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        }
    }
    let mut there = Vec::new();
    for volume in &volumes {
        if published(&driver, volume).await == [NODE] {
            there.push(volume);
        }
    }
    assert_eq!(there.len(), LIMIT as usize);
    driver.publish(there[0], NODE, Mode::SingleNodeWriter, false).await.expect("it is there already");
    driver.unpublish(there[0], NODE).await.expect("unpublished");
    driver.publish(there[0], NODE, Mode::SingleNodeWriter, false).await.expect("there is room again");
}

#[tokio::test]
async fn capabilities_are_confirmed_or_the_reason_is_said() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", GIB)).await.expect("created").volume_id;
    let ask = |volume: &str, volume_capabilities: Vec<VolumeCapability>, parameters: &[(&str, &str)]| {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: volume.into(),
            volume_capabilities,
            parameters: map(parameters),
            volume_context: map(&[("storage.kubernetes.io/csiProvisionerIdentity", "x")]),
            ..Default::default()
        };
        driver.service.validate_volume_capabilities(Request::new(request))
    };
    let single = || vec![mount(Mode::SingleNodeWriter, "")];
    let yes = accepted(ask(&volume, single(), &[("verifyReads", "true")]).await).confirmed.expect("confirmed");
    assert_eq!((yes.volume_capabilities.len(), yes.parameters.len(), yes.volume_context.len()), (1, 1, 1));
    let impossible = [
        (vec![mount(Mode::MultiNodeMultiWriter, "")], vec![]),
        (vec![block(Mode::SingleNodeWriter)], vec![]),
        (single(), vec![("fake", "parameter")]),
    ];
    for (capabilities, parameters) in impossible {
        let no = accepted(ask(&volume, capabilities, &parameters).await);
        assert!(no.confirmed.is_none() && no.message.len() > 10, "{no:?}");
    }
    assert_eq!(refused(ask(&volume, vec![], &[]).await), Code::InvalidArgument);
    assert_eq!(refused(ask("", single(), &[]).await), Code::InvalidArgument);
    assert_eq!(refused(ask("fake-vol-id", single(), &[]).await), Code::NotFound);
}
