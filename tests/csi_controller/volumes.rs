//! CreateVolume, DeleteVolume, ListVolumes and GetCapacity.

use crate::site::*;
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tonic::{Code, Request};

#[tokio::test]
async fn the_same_request_is_the_same_volume() {
    let site = Site::new();
    let driver = site.driver();
    let first = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created");
    assert_eq!(first.capacity_bytes, 64 << 20);
    assert_eq!(first.accessible_topology, [place(NODE)]);
    for _ in 0..10 {
        assert_eq!(driver.create(wanted("pvc-1", 64 * MIB)).await.expect("found"), first);
    }
    drop(driver);
    let driver = site.driver();
    assert_eq!(driver.create(wanted("pvc-1", 64 * MIB)).await.expect("found after a restart"), first);
    assert_eq!(driver.volumes().await, std::slice::from_ref(&first.volume_id));
    assert_eq!(site.fake.state().volumes.len(), 1);
    assert!(first.volume_id.parse::<tandem::volume::VolumeId>().is_ok());
}

/// What makes a second request for the same name another one.
#[tokio::test]
async fn another_request_of_the_same_name_is_refused() {
    let site = Site::new();
    let driver = site.driver();
    driver.create(wanted("source", 64 * MIB)).await.expect("created");
    let first = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created");
    let base = || wanted("pvc-1", 64 * MIB);
    let same = [
        CreateVolumeRequest { capacity_range: Some(range(32 * MIB, 0)), ..base() },
        CreateVolumeRequest { capacity_range: Some(range(0, 128 * MIB)), ..base() },
        CreateVolumeRequest { capacity_range: None, ..base() },
        CreateVolumeRequest { parameters: map(&[("pool", "default"), ("verifyReads", "false")]), ..base() },
        CreateVolumeRequest { volume_capabilities: vec![mount(Mode::SingleNodeMultiWriter, "")], ..base() },
        CreateVolumeRequest { secrets: map(&[("any", "secret")]), ..base() },
    ];
    for request in same {
        assert_eq!(driver.create(request).await.expect("compatible").volume_id, first.volume_id);
    }
    let elsewhere = TopologyRequirement { requisite: vec![place("node-2")], preferred: vec![] };
    let other = [
        CreateVolumeRequest { capacity_range: Some(range(128 * MIB, 0)), ..base() },
        CreateVolumeRequest { capacity_range: Some(range(0, 32 * MIB)), ..base() },
        CreateVolumeRequest { parameters: map(&[("verifyReads", "true")]), ..base() },
        CreateVolumeRequest { parameters: map(&[("pool", "other")]), ..base() },
        CreateVolumeRequest { parameters: map(&[("csi.storage.k8s.io/fstype", "xfs")]), ..base() },
        CreateVolumeRequest { mutable_parameters: map(&[("verifyReads", "true")]), ..base() },
        CreateVolumeRequest { volume_capabilities: vec![block(Mode::SingleNodeWriter)], ..base() },
        CreateVolumeRequest { volume_capabilities: vec![mount(Mode::SingleNodeWriter, "xfs")], ..base() },
        CreateVolumeRequest { accessibility_requirements: Some(elsewhere), ..base() },
        from_volume("pvc-1", &first.volume_id),
    ];
    for request in other {
        assert_eq!(refused(driver.create(request.clone()).await), Code::AlreadyExists, "{request:?}");
    }
    assert_eq!(site.fake.state().volumes.len(), 2);
}

#[tokio::test]
async fn a_repeated_creation_is_compared_with_the_original_request() {
    let site = Site::new();
    let driver = site.driver();
    let first = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created");
    assert_eq!(driver.expand(&first.volume_id, 128 * MIB, 0).await.expect("grown"), 128 * MIB);
    driver.modify(&first.volume_id, &[("verifyReads", "true")]).await.expect("modified");
    let again = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("the original request");
    assert_eq!((again.volume_id, again.capacity_bytes), (first.volume_id, 128 << 20));
    assert_eq!(refused(driver.create(wanted("pvc-1", 128 * MIB)).await), Code::AlreadyExists);
}

#[tokio::test]
async fn sizes_are_rounded_up_within_the_limit() {
    let site = Site::new();
    let driver = site.driver();
    let mut number = 0;
    let mut create = |range: Option<CapacityRange>| {
        number += 1;
        let request = CreateVolumeRequest { capacity_range: range, ..wanted(&format!("pvc-{number}"), 0) };
        let driver = driver.clone();
        async move { driver.create(request).await.map(|volume| volume.capacity_bytes) }
    };
    assert_eq!(create(None).await.expect("default"), 1 << 30);
    assert_eq!(create(Some(range(0, 0))).await.expect("default"), 1 << 30);
    assert_eq!(create(Some(range(1, 0))).await.expect("smallest"), 1 << 20);
    assert_eq!(create(Some(range(10_000_001, 0))).await.expect("rounded"), 10_002_432);
    assert_eq!(create(Some(range(0, 10_000_001))).await.expect("limit"), 9_998_336);
    assert_eq!(refused(create(Some(range(10_000_001, 10_000_001))).await), Code::OutOfRange);
    assert_eq!(refused(create(Some(range(2 * GIB, GIB))).await), Code::OutOfRange);
    assert_eq!(refused(create(Some(range(0, 1000))).await), Code::OutOfRange);
    assert_eq!(refused(create(Some(range(9 << 40, 0))).await), Code::OutOfRange);
    let huge = CapacityRange { required_bytes: i64::MAX, limit_bytes: 0 };
    assert_eq!(refused(create(Some(huge)).await), Code::OutOfRange);
    for (required_bytes, limit_bytes) in [(-1, 0), (0, -1), (i64::MIN, i64::MIN)] {
        let negative = CapacityRange { required_bytes, limit_bytes };
        assert_eq!(refused(create(Some(negative)).await), Code::InvalidArgument);
    }
    assert_eq!(site.fake.state().volumes.len(), 5, "nothing was made for a refused request");
}

#[tokio::test]
async fn xfs_volumes_are_large_enough_for_mkfs() {
    let site = Site::new();
    let driver = site.driver();
    let xfs = map(&[("csi.storage.k8s.io/fstype", "xfs")]);
    let small = CreateVolumeRequest { parameters: xfs.clone(), ..wanted("pvc-1", 64 * MIB) };
    assert_eq!(refused(driver.create(small.clone()).await), Code::OutOfRange);
    let unlimited = CreateVolumeRequest { capacity_range: Some(range(64 * MIB, 0)), ..small };
    assert_eq!(driver.create(unlimited).await.expect("created").capacity_bytes, 300 << 20);
    let ext4 = vec![mount(Mode::SingleNodeWriter, "ext4")];
    let named = CreateVolumeRequest { parameters: xfs, volume_capabilities: ext4, ..wanted("pvc-2", 64 * MIB) };
    assert_eq!(driver.create(named).await.expect("the capability wins").capacity_bytes, 64 << 20);
}

#[tokio::test]
async fn what_a_request_may_not_say_is_refused_with_nothing_half_made() {
    let site = Site::new();
    let driver = site.driver();
    let base = || wanted("pvc-1", 64 * MIB);
    let with = |parameters: &[(&str, &str)]| CreateVolumeRequest { parameters: map(parameters), ..base() };
    let capabilities = |volume_capabilities| CreateVolumeRequest { volume_capabilities, ..base() };
    let refusals = [
        (CreateVolumeRequest { name: String::new(), ..base() }, "name is missing"),
        (CreateVolumeRequest { name: "x".repeat(129), ..base() }, "128 bytes"),
        (CreateVolumeRequest { name: "a\u{7}b".into(), ..base() }, "U+0007"),
        (capabilities(vec![]), "volume_capabilities is missing"),
        (capabilities(vec![VolumeCapability::default()]), "access_type"),
        (capabilities(vec![mount(Mode::Unknown, "")]), "access_mode"),
        (capabilities(vec![mount(Mode::MultiNodeMultiWriter, "")]), "MULTI_NODE_MULTI_WRITER"),
        (capabilities(vec![block(Mode::MultiNodeSingleWriter)]), "MULTI_NODE_SINGLE_WRITER"),
        (capabilities(vec![mount(Mode::SingleNodeWriter, "btrfs")]), "ext4 or xfs"),
        (with(&[("replication", "sync")]), "`tandem standalone` is one"),
        (with(&[("replicas", "2")]), "parameter replicas"),
        (with(&[("replication", "async")]), "not available in this version"),
        (with(&[("csi.storage.k8s.io/fstype", "ntfs")]), "ext4, xfs"),
        (with(&[("verifyRead", "true")]), "known are: replication, replicas, rebuildAfter, access, pool"),
        (with(&[("pool", "nope")]), "there are: default"),
        (with(&[("pool", "../../etc")]), "parameter pool"),
        (CreateVolumeRequest { mutable_parameters: map(&[("pool", "default")]), ..base() }, "cannot be changed"),
        (CreateVolumeRequest { volume_content_source: Some(Default::default()), ..base() }, "type is missing"),
    ];
    for (request, says) in refusals {
        let status = driver.create(request).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(says), "{says:?} is not in {:?}", status.message());
    }
    assert!(site.fake.state().volumes.is_empty());
    assert!(driver.catalog.list::<tandem::catalog::Volume>().await.expect("lists").is_empty());
}

#[tokio::test]
async fn names_of_any_script_are_only_names() {
    let site = Site::new();
    let driver = site.driver();
    let names = ["../../etc/passwd", "a/b", "名前", "💾".repeat(32).as_str(), " ", "-", "x".repeat(128).as_str(), "\t"]
        .map(str::to_owned);
    for name in &names {
        driver.create(wanted(name, 64 * MIB)).await.expect("created");
    }
    assert_eq!(site.fake.state().volumes.len(), names.len());
    let files = std::fs::read_dir(site.directory.path()).expect("reads");
    let files: Vec<_> = files.map(|file| file.expect("a file").file_name()).collect();
    assert_eq!(files.len(), 2, "only the catalogue and the socket: {files:?}");
}

#[tokio::test]
async fn a_volume_lands_where_it_must() {
    let site = Site::new();
    let driver = site.driver();
    let with = |name: &str, requisite: Vec<Topology>| CreateVolumeRequest {
        accessibility_requirements: Some(TopologyRequirement { preferred: requisite.clone(), requisite }),
        ..wanted(name, 64 * MIB)
    };
    let both = driver.create(with("pvc-1", vec![place("node-2"), place(NODE)])).await.expect("created");
    assert_eq!(both.accessible_topology, [place(NODE)]);
    assert_eq!(refused(driver.create(with("pvc-2", vec![place("node-2")])).await), Code::ResourceExhausted);
    driver.create(with("pvc-3", vec![])).await.expect("anywhere");
    assert_eq!(driver.volumes().await.len(), 2);
}

#[tokio::test]
async fn sources_are_looked_up_and_give_the_smallest_size() {
    let site = Site::new();
    let driver = site.driver();
    let source = driver.create(wanted("source", 64 * MIB)).await.expect("created");
    let snapshot = driver.snapshot("snap", &source.volume_id).await.expect("taken");
    let restored = driver.create(from_snapshot("restored", &snapshot.snapshot_id)).await.expect("restored");
    assert_eq!(restored.capacity_bytes, 64 << 20);
    assert_eq!(restored.content_source, from_snapshot("", &snapshot.snapshot_id).volume_content_source);
    let larger = CreateVolumeRequest {
        capacity_range: Some(range(128 * MIB, 128 * MIB)),
        ..from_volume("clone", &source.volume_id)
    };
    let clone = driver.create(larger).await.expect("cloned");
    assert_eq!((clone.capacity_bytes, clone.content_source.is_some()), (128 << 20, true));
    let smaller = CreateVolumeRequest {
        capacity_range: Some(range(0, 32 * MIB)),
        ..from_snapshot("small", &snapshot.snapshot_id)
    };
    assert_eq!(refused(driver.create(smaller).await), Code::OutOfRange);
    let unknown = [
        from_snapshot("s", "non-existing-snapshot-id"),
        from_snapshot("s", &source.volume_id),
        from_volume("s", "../../etc"),
        from_volume("s", &uuid::Uuid::new_v4().to_string()),
    ];
    for request in unknown {
        assert_eq!(refused(driver.create(request).await), Code::NotFound);
    }
    assert_eq!(refused(driver.create(from_volume("s", "")).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_copy_is_answered_when_it_is_complete() {
    let site = Site::new();
    let driver = site.driver();
    let source = driver.create(wanted("source", 64 * MIB)).await.expect("created");
    site.fake.state().copying = true;
    let status = driver.create(from_volume("clone", &source.volume_id)).await.expect_err("not yet");
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("0 of 67108864 bytes"), "{status:?}");
    assert_eq!(driver.volumes().await, std::slice::from_ref(&source.volume_id), "nobody sees it yet");
    drop(driver);
    let driver = site.driver();
    driver.controller.sweep().await.expect("swept");
    assert_eq!(site.fake.state().volumes.len(), 2, "a copy under way survives a restart");
    site.fake.state().volumes.values_mut().for_each(|volume| volume.ready = true);
    driver.create(from_volume("clone", &source.volume_id)).await.expect("complete");
    assert_eq!(driver.volumes().await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_creations_at_once_never_promise_more_than_there_is() {
    let site = Site::new();
    site.fake.state().pools.insert("default".into(), 10 * GIB);
    let driver = site.driver();
    let calls = (0..50).map(|number| {
        let driver = driver.clone();
        tokio::spawn(async move { driver.create(wanted(&format!("pvc-{number}"), GIB)).await })
    });
    let calls: Vec<_> = calls.collect();
    let mut created = 0;
    for call in calls {
        match call.await.expect("no panic") {
            Ok(_) => created += 1,
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
        }
    }
    assert_eq!(created, 10);
    assert_eq!(site.fake.state().promised("default"), 10 * GIB);
    assert_eq!(driver.volumes().await.len(), 10);
    let left = driver.catalog.list::<tandem::catalog::Volume>().await.expect("lists");
    assert_eq!(left.len(), 10, "what was refused left nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_name_at_once_is_one_volume() {
    let site = Site::new();
    site.fake.state().delay = std::time::Duration::from_millis(50);
    let driver = site.driver();
    let calls = (0..20).map(|_| {
        let driver = driver.clone();
        tokio::spawn(async move { driver.create(wanted("pvc-1", GIB)).await })
    });
    let calls: Vec<_> = calls.collect();
    let mut ids = std::collections::BTreeSet::new();
    let mut aborted = 0;
    for call in calls {
        match call.await.expect("no panic") {
            Ok(volume) => drop(ids.insert(volume.volume_id)),
            Err(status) => {
                assert_eq!(status.code(), Code::Aborted, "{status:?}");
                aborted += 1;
            }
        }
    }
    assert!(ids.len() == 1 && aborted > 0, "{ids:?}, {aborted} aborted");
    assert_eq!(site.fake.state().volumes.len(), 1);
}

#[tokio::test]
async fn a_call_goes_on_when_its_caller_goes_away() {
    let site = Site::new();
    site.fake.state().delay = std::time::Duration::from_secs(2);
    let driver = site.driver();
    let impatient = driver.create(wanted("pvc-1", GIB));
    assert!(tokio::time::timeout(std::time::Duration::from_millis(20), impatient).await.is_err());
    assert_eq!(refused(driver.create(wanted("pvc-1", GIB)).await), Code::Aborted);
    let began = std::time::Instant::now();
    while driver.volumes().await.is_empty() {
        assert!(began.elapsed() < std::time::Duration::from_secs(300), "it was not finished without its caller");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(driver.volumes().await.len(), 1);
}

#[tokio::test]
async fn deleting_is_idempotent_and_never_takes_what_is_used() {
    let site = Site::new();
    let driver = site.driver();
    for unknown in ["fake-vol-id", "../..", "💾", &"x".repeat(1000), &uuid::Uuid::new_v4().to_string()] {
        driver.delete(unknown).await.expect("deleted already");
    }
    assert_eq!(refused(driver.delete("").await), Code::InvalidArgument);
    let volume = driver.create(wanted("pvc-1", GIB)).await.expect("created").volume_id;
    driver.publish(&volume, NODE, Mode::SingleNodeWriter, false).await.expect("published");
    assert_eq!(refused(driver.delete(&volume).await), Code::FailedPrecondition);
    driver.unpublish(&volume, NODE).await.expect("unpublished");
    site.fake.state().volumes.values_mut().for_each(|volume| volume.device = "/dev/loop7".into());
    assert_eq!(refused(driver.delete(&volume).await), Code::FailedPrecondition);
    assert_eq!(driver.volumes().await, std::slice::from_ref(&volume), "it is as it was");
    driver.publish(&volume, NODE, Mode::SingleNodeWriter, false).await.expect("it can still be used");
    driver.unpublish(&volume, "").await.expect("unpublished");
    site.fake.state().volumes.values_mut().for_each(|volume| volume.device.clear());
    for _ in 0..3 {
        driver.delete(&volume).await.expect("deleted");
        driver.unpublish(&volume, NODE).await.expect("still fine");
    }
    assert!(driver.volumes().await.is_empty() && site.fake.state().volumes.is_empty());
    let again = driver.create(wanted("pvc-1", GIB)).await.expect("the name is free");
    assert_ne!(again.volume_id, volume);
}

#[tokio::test]
async fn a_copy_that_the_catalogue_does_not_know_is_deleted_too() {
    let site = Site::new();
    let driver = site.driver();
    let volume = driver.create(wanted("pvc-1", GIB)).await.expect("created").volume_id;
    drop(driver);
    std::fs::remove_file(site.directory.path().join("catalog.redb")).expect("removes");
    site.driver().delete(&volume).await.expect("deleted");
    assert!(site.fake.state().volumes.is_empty());
}

#[tokio::test]
async fn pages_are_ordered_and_complete() {
    let site = Site::new();
    let driver = site.driver();
    let mut all = Vec::new();
    for number in 0..7 {
        all.push(driver.create(wanted(&format!("pvc-{number}"), MIB)).await.expect("created").volume_id);
    }
    all.sort();
    let (mut listed, mut token) = (Vec::new(), String::new());
    for expected in [3, 3, 1] {
        let (page, next) = driver.list(3, &token).await.expect("a page");
        assert_eq!(page.len(), expected);
        listed.extend(page);
        token = next;
    }
    assert_eq!((listed, token.as_str()), (all.clone(), ""));
    let (page, token) = driver.list(2, "").await.expect("a page");
    driver.delete(&page[1]).await.expect("deleted");
    assert_eq!(driver.list(0, &token).await.expect("the rest").0, all[2..], "a token outlives its volume");
    assert_eq!(driver.list(7, "").await.expect("all").1, "", "no token when nothing is left");
    for token in ["invalid-token", "1", "../.."] {
        assert_eq!(refused(driver.list(0, token).await), Code::Aborted);
    }
    assert_eq!(refused(driver.list(-1, "").await), Code::InvalidArgument);
}

#[tokio::test]
async fn capacity_is_that_of_the_pool_at_the_place() {
    let site = Site::new();
    let driver = site.driver();
    driver.create(wanted("pvc-1", 40 * GIB)).await.expect("created");
    let ask = |parameters: &[(&str, &str)], topology: Option<Topology>| {
        let request = GetCapacityRequest {
            parameters: map(parameters),
            accessible_topology: topology,
            volume_capabilities: vec![],
        };
        driver.service.get_capacity(Request::new(request))
    };
    let answer = accepted(ask(&[], None).await);
    assert_eq!(answer.available_capacity, 60 << 30);
    assert_eq!((answer.maximum_volume_size, answer.minimum_volume_size), (Some(60 << 30), Some(1 << 20)));
    assert_eq!(accepted(ask(&[], Some(place(NODE))).await).available_capacity, 60 << 30);
    assert_eq!(accepted(ask(&[], Some(place("node-2"))).await).available_capacity, 0);
    assert_eq!(accepted(ask(&[("pool", "other")], None).await).available_capacity, 0);
    let xfs = accepted(ask(&[("csi.storage.k8s.io/fstype", "xfs")], None).await);
    assert_eq!(xfs.minimum_volume_size, Some(300 << 20));
    assert_eq!(refused(ask(&[("replication", "sync")], None).await), Code::InvalidArgument);
}
