//! A cluster's catalogue rebuilt from what its nodes say of their copies, and a copy that is forced. The nodes are in memory.

use crate::mirrors::{LONG, configuration, object};
use crate::nodes::{Cluster, cluster};
use crate::site::*;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tandem::catalog::{
    Access, AccessMode, ClientSpec, CopySpec, Descriptor, MirrorSpec, Node, NodeName, Publication, Reach, Replication,
    Stored, Volume as Object, VolumeConfiguration, VolumePhase, VolumeRequest,
};
use tandem::csi::controller::{Report, State};
use tandem::protocol::{Configuration, ConfigurationVersion, Generation, Lacks, Stamp};
use tandem::rpc::control::{self, CopyRecord, copy_record::Peer};
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::volume::{InstanceId, VolumeId, VolumeSize};
use tonic::Code;

fn copy(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

fn stamp(generation: u64, version: u64) -> Stamp {
    Stamp { generation: Generation(generation), version: ConfigurationVersion(version) }
}

/// Copy n is on node n: the first member is primary, candidates left with a version.
fn version(version: u64, members: &[u8], candidates: &[(u8, u64)]) -> Configuration {
    let at = stamp(0, version);
    Configuration {
        stamp: at,
        term: at,
        primary: members.first().map(|number| copy(*number)),
        secondaries: members.iter().skip(1).map(|number| copy(*number)).collect(),
        candidates: candidates.iter().map(|(number, at)| (copy(*number), Lacks::Since(stamp(0, *at)))).collect(),
        lost: stamp(0, 0),
    }
}

fn request(name: &str) -> VolumeRequest {
    VolumeRequest {
        name: name.into(),
        size: VolumeSize::try_from(GIB).expect("a size"),
        pool: "default".into(),
        fs_type: None,
        verify_reads: false,
        access: [tandem::catalog::Access::Mount(None)].into(),
        source: None,
        replication: Replication::Sync { replicas: 2 },
        rebuild_after: Default::default(),
        reach: Default::default(),
    }
}

/// What a node says of its copy of a volume with this name.
fn on_disk(id: VolumeId, number: u8, known: Option<&Configuration>, all: &[u8]) -> control::Volume {
    let peer = |number: &u8| Peer { copy_id: copy(*number).to_string(), node: format!("node-{number}") };
    let record = CopyRecord {
        copy_id: copy(number).to_string(),
        peers: all.iter().filter(|other| **other != number).map(peer).collect(),
        configuration: known.map(|known| VolumeConfiguration::new(id, known).encode()).unwrap_or_default(),
        intact: true,
        ..Default::default()
    };
    control::Volume {
        volume_id: id.to_string(),
        pool: "default".into(),
        size_bytes: GIB,
        ready: true,
        descriptor: Descriptor::Volume { request: request("pvc"), rebuild_after: None }.encode(),
        record: Some(record),
        ..Default::default()
    }
}

fn put(nodes: &Cluster, number: u8, volume: control::Volume) {
    nodes.fakes[usize::from(number) - 1].state().volumes.insert(volume.volume_id.clone(), volume);
}

/// It is used on the node.
fn use_it(nodes: &Cluster, number: u8, id: VolumeId) {
    let mut state = nodes.fakes[usize::from(number) - 1].state();
    let volume = state.volumes.get_mut(&id.to_string()).expect("there");
    volume.device = "/dev/loop7".into();
    volume.mirror = Some(control::Mirror { serves: true, ..Default::default() });
}

async fn recover(driver: &Driver) -> Report {
    driver.controller.recover().await.expect("recovered")
}

fn named(nodes: &[&str]) -> Vec<NodeName> {
    nodes.iter().map(|node| NodeName((*node).into())).collect()
}

/// The node's replica does not reach this controller; what it had announced.
async fn forget(driver: &Driver, node: &str) -> Node {
    let stored = driver.catalog.get::<Node>(node).await.expect("readable").expect("announced");
    driver.catalog.delete(&stored).await.expect("forgotten");
    stored.object
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_come_back_with_their_copies_under_a_raised_generation() {
    let (nodes, driver) = cluster(&[10, 10, 10]).await;
    let (id, single) = (VolumeId::random(), VolumeId::random());
    let newest = version(7, &[1], &[(2, 6)]);
    put(&nodes, 1, on_disk(id, 1, Some(&newest), &[1, 2]));
    put(&nodes, 2, on_disk(id, 2, Some(&version(5, &[1, 2], &[])), &[1, 2]));
    let descriptor = Descriptor::Volume { request: request("alone"), rebuild_after: None }.encode();
    put(&nodes, 3, control::Volume { descriptor, record: None, ..on_disk(single, 3, None, &[]) });
    let report = recover(&driver).await;
    assert_eq!((report.volumes, report.kept, &report.problems), (2, 0, &vec![]), "{report:?}");
    let row = report.rows.iter().find(|row| row.volume == id).expect("a row");
    assert_eq!((row.name.as_str(), row.state, row.configuration), ("pvc", State::PutBack, Some(stamp(1, 8))));
    assert_eq!((&row.nodes, row.missing.len()), (&named(&["node-1", "node-2"]), 0));
    let now = configuration(&driver, &id.to_string()).await.expect("written");
    assert_eq!(now, Configuration { stamp: stamp(1, 8), term: stamp(1, 8), ..newest });
    let volume = object(&driver, &id.to_string()).await;
    assert_eq!((volume.status.phase, volume.status.copies.len()), (VolumePhase::Ready, 2));
    let mirror = volume.spec.mirror.expect("mirrored");
    let places: Vec<_> = mirror.copies.into_values().map(|spec| spec.node).collect();
    assert_eq!((mirror.primary, places), (Some(copy(1)), named(&["node-1", "node-2"])), "the last one goes on");
    assert_eq!(object(&driver, &single.to_string()).await.spec.node, Some(NodeName("node-3".into())));

    let publish = |node: &'static str| driver.publish_to(id, node);
    assert_eq!(refused(publish("node-2").await), Code::FailedPrecondition, "it has left");
    publish("node-1").await.expect("the member");
    let again = recover(&driver).await;
    assert_eq!((again.volumes, again.kept), (0, 2), "{again:?}");
    assert!(again.rows.iter().all(|row| row.state == State::Kept), "{again:?}");
    assert_eq!(configuration(&driver, &id.to_string()).await, Some(now), "nothing is raised twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_waits_for_every_copy_that_may_know_better() {
    let (nodes, driver) = cluster(&[10, 10]).await;
    let id = VolumeId::random();
    let (both, alone) = (version(5, &[1, 2], &[]), version(6, &[1], &[(2, 6)]));
    put(&nodes, 1, on_disk(id, 1, Some(&alone), &[1, 2]));
    put(&nodes, 2, on_disk(id, 2, Some(&both), &[1, 2]));
    let away = forget(&driver, "node-1").await;
    for _ in 0..2 {
        let report = recover(&driver).await;
        assert_eq!((report.rows[0].state, report.rows[0].configuration), (State::Waits, None), "{report:?}");
        assert_eq!(report.rows[0].missing, ["node-1"]);
        assert!(report.problems.iter().any(|text| text.contains("node-1") && text.contains("--force")), "{report:?}");
    }
    assert_eq!(configuration(&driver, &id.to_string()).await, None);
    let refused = driver.publish_to(id, "node-2").await.expect_err("nobody may be primary");
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("recover"), "{refused:?}");
    driver.catalog.create(away).await.expect("announced");
    let report = recover(&driver).await;
    assert_eq!((report.rows[0].state, report.rows[0].configuration), (State::Raised, Some(stamp(1, 7))), "{report:?}");
    driver.publish_to(id, "node-1").await.expect("the member");
}

/// The copy that was read is attached, was primary in what it knows, and was dropped since. Another volume that has no
/// configuration gets its first one from the controller's own look; this one had one, which only the other copy knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_waits_is_begun_anew_by_nobody() {
    let (nodes, driver) = cluster(&[10, 10]).await;
    let [waits, complete, later] = [1, 2, 3].map(|byte| VolumeId::from_bytes([byte; 16]));
    put(&nodes, 1, on_disk(waits, 1, Some(&version(5, &[1, 2], &[])), &[1, 2]));
    put(&nodes, 1, on_disk(complete, 1, Some(&version(5, &[1], &[])), &[1]));
    use_it(&nodes, 1, waits);
    let _away = forget(&driver, "node-2").await;
    let states = recover(&driver).await.rows.into_iter().map(|row| row.state).collect::<Vec<_>>();
    assert_eq!(states, [State::Waits, State::PutBack]);
    let stored = driver.catalog.get::<Object>(&waits.to_string()).await.expect("readable").expect("there");
    let mut object = stored.object.clone();
    let mirror = object.spec.mirror.as_mut().expect("mirrored");
    assert_eq!(mirror.primary.replace(copy(1)), None, "nobody is wished");
    let mut begun = Object::wanted(later, VolumeRequest { name: "later".into(), ..request("pvc") });
    begun.spec.mirror = Some(MirrorSpec { primary: Some(copy(1)), ..mirror.clone() });
    begun.status.copies = [copy(1)].into();
    begun.status.phase = VolumePhase::Ready;
    driver.catalog.update(Stored { object, ..stored }).await.expect("wished by hand");
    driver.catalog.create(begun).await.expect("created");
    let controller = driver.controller.clone();
    let tending = tokio::spawn(async move { controller.tend().await });
    let began = Instant::now();
    while configuration(&driver, &later.to_string()).await.is_none() {
        assert!(began.elapsed() < LONG, "the controller does not look");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tending.abort();
    assert_eq!(configuration(&driver, &waits.to_string()).await, None);
}

/// Growth changes no configuration. A candidate may be smaller: it is filled later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_has_the_size_that_its_members_have() {
    let (nodes, driver) = cluster(&[10, 10, 10]).await;
    let id = VolumeId::random();
    let newest = version(7, &[1, 2], &[(3, 6)]);
    for (number, bytes) in [(1, 3 * GIB), (2, 2 * GIB), (3, GIB)] {
        put(&nodes, number, control::Volume { size_bytes: bytes, ..on_disk(id, number, Some(&newest), &[1, 2, 3]) });
    }
    recover(&driver).await;
    let size = |volume: &Object| (volume.spec.size.bytes(), volume.status.size.bytes());
    let stored = driver.catalog.get::<Object>(&id.to_string()).await.expect("readable").expect("there");
    assert_eq!(size(&stored.object), (2 * GIB, 2 * GIB));
    // A backup from before it grew, and from before its first caller had an answer.
    let mut object = stored.object.clone();
    (object.spec.size, object.status.size) = (GIB.try_into().expect("a size"), GIB.try_into().expect("a size"));
    driver.catalog.update(Stored { object, ..stored }).await.expect("restored");
    assert_eq!(recover(&driver).await.rows[0].state, State::Kept);
    assert_eq!(size(&self::object(&driver, &id.to_string()).await), (2 * GIB, 2 * GIB));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_copy_that_is_in_use_stays_wished() {
    let (nodes, driver) = cluster(&[10, 10]).await;
    let id = VolumeId::random();
    let both = version(5, &[1, 2], &[]);
    put(&nodes, 1, on_disk(id, 1, Some(&both), &[1, 2]));
    put(&nodes, 2, on_disk(id, 2, Some(&both), &[1, 2]));
    use_it(&nodes, 1, id);
    recover(&driver).await;
    assert_eq!(object(&driver, &id.to_string()).await.spec.mirror.expect("mirrored").primary, Some(copy(1)));
    driver.publish_to(id, "node-1").await.expect("as the attacher does");
    driver.unpublish(&id.to_string(), "node-1").await.expect("unpublished");
    assert_eq!(object(&driver, &id.to_string()).await.spec.mirror.expect("mirrored").primary, Some(copy(1)));
}

/// The catalogue is a backup: the volume has moved from node 2 to node 3 since, and is used there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_catalogue_is_raised_to_what_the_copies_know() {
    let (nodes, driver) = cluster(&[10, 10, 10]).await;
    let id = VolumeId::random();
    let (old, newest) = (version(2, &[1, 2], &[]), version(9, &[3, 1], &[]));
    let mut volume = Object::wanted(id, request("pvc"));
    let spec =
        |number: u8| (copy(number), CopySpec { node: NodeName(format!("node-{number}")), pool: "default".into() });
    let copies: BTreeMap<_, _> = [spec(1), spec(2)].into();
    volume.status.copies = copies.keys().copied().collect();
    volume.status.phase = VolumePhase::Ready;
    volume.spec.mirror = Some(MirrorSpec::new(copies));
    driver.catalog.create(volume).await.expect("created");
    driver.catalog.create(VolumeConfiguration::new(id, &old)).await.expect("created");
    driver.publish_to(id, "node-1").await.expect("published");
    for number in [1, 3] {
        put(&nodes, number, on_disk(id, number, Some(&newest), &[1, 3]));
    }
    use_it(&nodes, 3, id);
    let report = recover(&driver).await;
    assert_eq!((report.rows[0].state, report.rows[0].configuration), (State::Raised, Some(stamp(1, 10))), "{report:?}");
    let now = configuration(&driver, &id.to_string()).await.expect("there");
    assert_eq!((now.primary, now.stamp), (Some(copy(3)), stamp(1, 10)));
    let spec = object(&driver, &id.to_string()).await.spec;
    let mirror = spec.mirror.expect("mirrored");
    assert_eq!(
        (mirror.primary, mirror.copies.into_keys().collect::<Vec<_>>()),
        (Some(copy(3)), vec![copy(1), copy(3)])
    );
    assert_eq!(spec.publications.into_keys().collect::<Vec<_>>(), named(&["node-3"]));
}

/// The backup is from before the volume was made, and a sweep of it has begun to delete the volume.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_was_used_is_neither_half_made_nor_deleted_afterwards() {
    let (nodes, driver) = cluster(&[10, 10]).await;
    let [older, same, empty] = [1, 2, 3].map(|byte| VolumeId::from_bytes([byte; 16]));
    let newest = version(2, &[1, 2], &[]);
    for (id, known, written) in [(older, 1, true), (same, 2, true), (empty, 2, false)] {
        let name = format!("pvc-{id}");
        let mut volume = Object::wanted(id, VolumeRequest { name, ..request("pvc") });
        let spec =
            |number: u8| (copy(number), CopySpec { node: NodeName(format!("node-{number}")), pool: "default".into() });
        volume.spec.mirror = Some(MirrorSpec::new([spec(1), spec(2)].into()));
        volume.spec.deleted = true;
        driver.catalog.create(volume).await.expect("created");
        driver.catalog.create(VolumeConfiguration::new(id, &version(known, &[1, 2], &[]))).await.expect("created");
        for number in [1, 2] {
            put(&nodes, number, control::Volume { written, ..on_disk(id, number, Some(&newest), &[1, 2]) });
        }
    }
    let report = recover(&driver).await;
    let states: Vec<_> = report.rows.iter().map(|row| row.state).collect();
    assert_eq!(states, [State::Raised, State::Raised, State::Kept], "{report:?}");
    for (id, used) in [(older, true), (same, true), (empty, false)] {
        let volume = object(&driver, &id.to_string()).await;
        assert_eq!((volume.is_visible(), volume.spec.deleted), (used, !used), "{volume:?}");
    }
}

/// A node without a copy used the volume; it does no more, or under a publication that nobody knows any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_where_nobody_is_known_to_use_it_is_published_again() {
    let (nodes, driver) = cluster(&[10, 10, 10]).await;
    let id = VolumeId::random();
    let mut volume = Object::wanted(id, VolumeRequest { reach: Reach::Any, ..request("pvc") });
    let spec =
        |number: u8| (copy(number), CopySpec { node: NodeName(format!("node-{number}")), pool: "default".into() });
    let publication = copy(9);
    let client = Some(ClientSpec { node: NodeName("node-3".into()), publication });
    volume.spec.mirror = Some(MirrorSpec { client, ..MirrorSpec::new([spec(1), spec(2)].into()) });
    volume.spec.publications.insert(
        NodeName("node-3".into()),
        Publication { readonly: false, access: Access::Mount(None), mode: AccessMode::SingleNodeWriter },
    );
    volume.status.phase = VolumePhase::Ready;
    driver.catalog.create(volume).await.expect("created");
    driver.catalog.create(VolumeConfiguration::new(id, &version(2, &[1, 2], &[]))).await.expect("created");
    for number in [1, 2] {
        put(&nodes, number, on_disk(id, number, Some(&version(5, &[1, 2], &[])), &[1, 2]));
    }
    recover(&driver).await;
    let spec = object(&driver, &id.to_string()).await.spec;
    assert!(spec.publications.is_empty() && spec.mirror.expect("mirrored").client.is_none());
    // Its replica hears of it.
    let heard = tokio::spawn({
        let (catalog, fake) = (driver.catalog.clone(), nodes.fakes[2].clone());
        async move {
            loop {
                let stored = catalog.get::<Object>(&id.to_string()).await.expect("readable");
                let client = stored.and_then(|stored| stored.object.spec.mirror).and_then(|mirror| mirror.client);
                if let Some(client) = client {
                    let volume = control::Volume { tree_id: client.publication.to_string(), ..Default::default() };
                    fake.state().volumes.insert(id.to_string(), volume);
                    return client;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    driver.publish_to(id, "node-3").await.expect("published");
    assert_ne!(heard.await.expect("heard").publication, publication);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_may_bring_back_is_told() {
    let (nodes, driver) = cluster(&[10, 10]).await;
    let (going, made, broken) = (VolumeId::random(), VolumeId::random(), VolumeId::random());
    let both = version(5, &[1, 2], &[]);
    for number in [1, 2] {
        let mut leaving = on_disk(going, number, Some(&both), &[1, 2]);
        leaving.record.as_mut().expect("one of several").removing = number == 2;
        put(&nodes, number, leaving);
        put(&nodes, number, on_disk(made, number, None, &[1, 2]));
        put(&nodes, number, control::Volume { size_bytes: 0, ..on_disk(broken, number, Some(&both), &[1, 2]) });
    }
    let report = recover(&driver).await;
    assert!(report.rows.iter().all(|row| row.state == State::Left), "{report:?}");
    let told =
        |id: VolumeId, what: &str| report.problems.iter().any(|t| t.contains(&id.to_string()) && t.contains(what));
    assert!(told(going, "deleted") && told(made, "never been used") && told(broken, "can be used"), "{report:?}");
    assert!(driver.volumes().await.is_empty());
    // Of a volume whose copy has moved, the one that was kept may be on a node that is away.
    let _away = forget(&driver, "node-1").await;
    let report = recover(&driver).await;
    let left = report.rows.iter().find(|row| row.volume == going).expect("a row");
    assert_eq!((left.state, &left.missing), (State::Left, &vec!["node-1".to_owned()]), "{report:?}");
    assert!(report.problems.iter().any(|text| text.contains("on node-1 may be kept")), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_copy_is_the_only_member_and_what_is_lost_is_told_before() {
    let (nodes, driver) = cluster(&[10, 10]).await;
    let id = VolumeId::random();
    let both = version(5, &[1, 2], &[]);
    put(&nodes, 1, on_disk(id, 1, Some(&both), &[1, 2]));
    put(&nodes, 2, on_disk(id, 2, Some(&both), &[1, 2]));
    let node = |number: u8| NodeName(format!("node-{number}"));
    let unknown = driver.controller.plan_force("pvc", &node(2)).await.expect_err("not put back").to_string();
    assert!(unknown.contains("tandem recover"), "{unknown}");
    let away = forget(&driver, "node-1").await;
    recover(&driver).await;
    let plan = driver.controller.plan_force("pvc", &node(2)).await.expect("it can be forced");
    assert_eq!((plan.volume, plan.newest), (id, stamp(0, 5)));
    let losses = plan.losses.join("\n");
    assert!(losses.contains("node-1 (the primary of version 0.5; it is not reached)"), "{losses}");
    let elsewhere = driver.controller.plan_force("pvc", &node(1)).await.expect_err("it does not answer").to_string();
    assert!(elsewhere.contains("node-1") && elsewhere.contains("node-2"), "{elsewhere}");
    let other = driver.controller.force("pvc", &node(2), stamp(0, 4)).await.expect_err("not what was shown");
    assert!(other.to_string().contains("look again"), "{other}");
    assert_eq!(configuration(&driver, &id.to_string()).await, None, "nothing was done");

    assert_eq!(driver.controller.force("pvc", &node(2), plan.newest).await.expect("forced"), stamp(1, 6));
    let now = configuration(&driver, &id.to_string()).await.expect("written");
    assert_eq!(now.members().collect::<Vec<_>>(), [copy(2)]);
    assert_eq!(now.candidates, BTreeMap::from([(copy(1), Lacks::Everything)]));
    assert_eq!(object(&driver, &id.to_string()).await.spec.mirror.expect("mirrored").primary, Some(copy(2)));
    driver.publish_to(id, "node-2").await.expect("published");
    // The other one comes back: neither it nor what it knows counts any more.
    driver.catalog.create(away).await.expect("announced");
    assert_eq!(recover(&driver).await.rows[0].state, State::Kept);
    let unneeded = driver.controller.plan_force("pvc", &node(1)).await.expect_err("published").to_string();
    assert!(unneeded.contains("node-2"), "{unneeded}");
    driver.unpublish(&id.to_string(), "node-2").await.expect("unpublished");
    put(&nodes, 2, on_disk(id, 2, Some(&now), &[1, 2]));
    for number in [1, 2] {
        let unneeded =
            driver.controller.plan_force("pvc", &node(number)).await.expect_err("a member is there").to_string();
        assert!(unneeded.contains("node-2 has every acknowledged write"), "{unneeded}");
    }
}

/// What is only there is named by nobody: a person has to know where to look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_is_not_open_is_named_wherever_it_matters() {
    let (nodes, driver) = cluster(&[10, 10]).await;
    let [id, going] = [VolumeId::random(), VolumeId::random()];
    let both = version(5, &[1, 2], &[]);
    put(&nodes, 2, on_disk(id, 2, Some(&both), &[1, 2]));
    let mut leaving = on_disk(going, 2, Some(&both), &[1, 2]);
    leaving.record.as_mut().expect("mirrored").removing = true;
    put(&nodes, 2, leaving);
    let problem = "its disk is a new one";
    let closed = control::Unopened { pool: "fast".into(), problem: problem.into() };
    nodes.fakes[0].state().unopened.push(closed);
    let report = recover(&driver).await;
    let [unopened] = &report.unopened[..] else { panic!("{report:?}") };
    assert_eq!((unopened.node.0.as_str(), unopened.pool.as_str()), ("node-1", "fast"));
    let says = |text: &str| text.contains("node-1") && text.contains("pool fast") && text.contains(problem);
    for (volume, state) in [(id, State::Waits), (going, State::Left)] {
        let row = report.rows.iter().find(|row| row.volume == volume).expect("a row");
        assert!(row.state == state && row.missing.len() == 1 && says(&row.missing[0]), "{row:?}");
        let told = |text: &&String| text.contains(&volume.to_string()) && says(text);
        assert!(report.problems.iter().any(|text| told(&text)), "{report:?}");
    }
    let plan = driver.controller.plan_force("pvc", &NodeName("node-2".into())).await.expect("it can be forced");
    assert!(plan.losses.iter().any(|loss| loss.contains("its node answers") && says(loss)), "{plan:?}");
    let refused = driver.controller.plan_force("pvc", &NodeName("node-1".into())).await.expect_err("it is not open");
    assert!(says(&refused.to_string()), "{refused}");
    // An older replica, and one where all is open, names none.
    nodes.fakes[0].state().unopened.clear();
    let report = recover(&driver).await;
    assert!(report.unopened.is_empty() && report.rows.iter().any(|row| row.state == State::Waits), "{report:?}");
}

impl Driver {
    async fn publish_to(&self, id: VolumeId, node: &str) -> Result<(), tonic::Status> {
        self.publish(&id.to_string(), node, Mode::SingleNodeWriter, false).await
    }
}
