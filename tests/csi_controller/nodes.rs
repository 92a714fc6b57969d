//! A controller over several nodes: replicas in memory, each behind a port with certificates as in a cluster.

use crate::fake::Fake;
use crate::site::*;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tandem::catalog::{Catalog, Node, NodeName};
use tandem::csi::controller::{Controller, ControllerService};
use tandem::csi::nodes::{Announced, Nodes};
use tandem::rpc::control::replica_server::ReplicaServer;
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tandem::tls::{Authority, Credentials, Leaf, Port, Role, Validity};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tonic::{Code, Request, Status};

/// The replicas of a cluster, and what its controller is made of.
pub struct Cluster {
    pub fakes: Vec<Fake>,
    /// One for each node: what runs there ends with it.
    machines: Vec<Option<Runtime>>,
    pub directory: tempfile::TempDir,
    authority: Authority,
}

fn name(number: usize) -> NodeName {
    NodeName(format!("node-{number}"))
}

impl Cluster {
    /// Nodes 1 to n with a pool of so many GiB each.
    pub async fn start(catalog: &Catalog, directory: tempfile::TempDir, pools: &[u64]) -> Self {
        let path = directory.path().join("authority");
        let authority = Authority::create(&path, "lab".parse().expect("a name"), Validity::days(1)).expect("made");
        let mut nodes = Self { fakes: Vec::new(), machines: Vec::new(), directory, authority };
        for (at, gib) in pools.iter().enumerate() {
            nodes.add(catalog, at + 1, gib * GIB, true).await;
        }
        nodes
    }

    fn credentials(&self, role: Role, name: &str) -> Arc<Credentials> {
        let out: PathBuf = self.directory.path().join(format!("{role}-{name}"));
        let leaf = Leaf { role, name: name.parse().expect("a name"), addresses: Vec::new() };
        self.authority.issue(&leaf, Validity::days(1)).expect("issued").write(&out).expect("written");
        Arc::new(Credentials::open(&out).expect("good"))
    }

    async fn add(&mut self, catalog: &Catalog, number: usize, capacity: u64, encrypted: bool) {
        let fake = Fake::default();
        fake.state().pools.insert("default".into(), capacity);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("set");
        let control = listener.local_addr().expect("its address");
        let credentials = self.credentials(Role::Node, &name(number).0);
        let machine = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let server = tonic::transport::Server::builder().add_service(ReplicaServer::new(fake.clone()));
        machine.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            let port = Port { listener, credentials, role: Some(Role::Controller) };
            server.serve_with_incoming(port.incoming()).await.expect("it serves until the end");
        });
        self.machines.push(Some(machine));
        self.fakes.push(fake);
        let node = Node::new(name(number), control, control, encrypted);
        catalog.create(node).await.expect("announced");
    }

    /// The node's machine is gone.
    pub fn stop(&mut self, number: usize) {
        if let Some(machine) = self.machines[number - 1].take() {
            machine.shutdown_background();
        }
    }

    fn volumes(&self, number: usize) -> usize {
        self.fakes[number - 1].state().volumes.len()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (1..=self.machines.len()).for_each(|number| self.stop(number));
    }
}

pub async fn cluster(pools: &[u64]) -> (Cluster, Driver) {
    patient(pools, Duration::from_secs(60 * 60)).await
}

/// A controller that waits so long for the pools of a silent node.
async fn patient(pools: &[u64], patience: Duration) -> (Cluster, Driver) {
    let directory = tempfile::Builder::new().prefix("tandem-csi").tempdir().expect("a directory");
    let catalog = Catalog::open(&directory.path().join("catalog.redb")).expect("the catalogue");
    let nodes = Cluster::start(&catalog, directory, pools).await;
    let credentials = nodes.credentials(Role::Controller, "controller");
    let announced = Nodes::Announced(Announced::with_patience(catalog.clone(), credentials, true, patience));
    let controller = Arc::new(Controller::new(catalog.clone(), announced, LIMIT).with_mirrors());
    let driver = Driver { service: Arc::new(ControllerService(controller.clone())), controller, catalog };
    (nodes, driver)
}

pub fn at(name: &str, requisite: &[usize]) -> CreateVolumeRequest {
    let places: Vec<_> = requisite.iter().map(|number| place(&format!("node-{number}"))).collect();
    let requirement = TopologyRequirement { requisite: places.clone(), preferred: places };
    CreateVolumeRequest { accessibility_requirements: Some(requirement), ..wanted(name, GIB) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_on_the_node_that_is_asked_for_or_has_the_most_room() {
    let (nodes, driver) = cluster(&[10, 30, 20]).await;
    let anywhere = driver.create(wanted("anywhere", GIB)).await.expect("created");
    assert_eq!(anywhere.accessible_topology, [place("node-2")]);
    let there = driver.create(at("there", &[1])).await.expect("created");
    assert_eq!(there.accessible_topology, [place("node-1")]);
    assert_eq!(driver.create(at("there", &[1])).await.expect("the same"), there);
    assert_eq!(refused(driver.create(at("there", &[2])).await), Code::AlreadyExists);
    assert_eq!((nodes.volumes(1), nodes.volumes(2), nodes.volumes(3)), (1, 1, 0));
    let full = CreateVolumeRequest { capacity_range: Some(range(15 * GIB, 0)), ..at("full", &[1]) };
    assert_eq!(refused(driver.create(full.clone()).await), Code::ResourceExhausted);
    assert_eq!(refused(driver.create(at("nowhere", &[9])).await), Code::ResourceExhausted);
    let nothing = CreateVolumeRequest { parameters: map(&[("pool", "other")]), ..wanted("no pool", GIB) };
    assert_eq!(refused(driver.create(nothing).await), Code::InvalidArgument);
    let either = CreateVolumeRequest { name: "either".into(), ..at("", &[1, 3]) };
    let either = CreateVolumeRequest { capacity_range: full.capacity_range, ..either };
    assert_eq!(driver.create(either).await.expect("created").accessible_topology, [place("node-3")]);
    assert_eq!(driver.volumes().await.len(), 3, "what was refused left nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capacity_is_told_per_node() {
    let (_nodes, driver) = cluster(&[10, 30]).await;
    let ask = async |topology: Option<Topology>| {
        let request = GetCapacityRequest { accessible_topology: topology, ..Default::default() };
        let answer = accepted(driver.service.get_capacity(Request::new(request)).await);
        (answer.available_capacity >> 30, answer.maximum_volume_size.unwrap_or_default() >> 30)
    };
    assert_eq!(ask(None).await, (40, 30));
    assert_eq!(ask(Some(place("node-1"))).await, (10, 10));
    assert_eq!(ask(Some(place("node-9"))).await, (0, 0));
}

/// A scheduler that asks of any node may get a volume whose copies are elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_for_every_node_has_the_room_of_all() {
    let (_nodes, driver) = cluster(&[10, 30, 20]).await;
    let ask = async |access: &str, node: &str| {
        let parameters = map(&[("replication", "sync"), ("access", access)]);
        let accessible_topology = Some(place(node));
        let request = GetCapacityRequest { parameters, accessible_topology, ..Default::default() };
        accepted(driver.service.get_capacity(Request::new(request)).await).available_capacity >> 30
    };
    assert_eq!((ask("local", "node-1").await, ask("any", "node-1").await), (10, 20));
    assert_eq!((ask("local", "node-9").await, ask("any", "node-9").await), (0, 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_silent_for_long_is_not_waited_for() {
    let (mut nodes, driver) = patient(&[10, 30], Duration::ZERO).await;
    nodes.stop(2);
    assert_eq!(refused(driver.create(at("new", &[2])).await), Code::ResourceExhausted, "elsewhere, then");
    let full = CreateVolumeRequest { capacity_range: Some(range(20 * GIB, 0)), ..wanted("full", 0) };
    assert_eq!(refused(driver.create(full).await), Code::ResourceExhausted);
    let ask = async |topology: Option<Topology>| {
        let request = GetCapacityRequest { accessible_topology: topology, ..Default::default() };
        accepted(driver.service.get_capacity(Request::new(request)).await).available_capacity >> 30
    };
    assert_eq!((ask(None).await, ask(Some(place("node-2"))).await), (10, 0));
    nodes.fakes[0].state().pools.clear();
    let unknown = driver.create(wanted("new", GIB)).await.expect_err("the pool may be there");
    assert!(unknown.code() == Code::Unavailable && unknown.message().contains("node-2"), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_published_only_where_it_is() {
    let (_nodes, driver) = cluster(&[10, 10]).await;
    let volume = driver.create(at("pvc", &[2])).await.expect("created").volume_id;
    let publish = |node: &'static str| driver.publish(&volume, node, Mode::SingleNodeWriter, false);
    let elsewhere = publish("node-1").await.expect_err("no copy there");
    assert_eq!(elsewhere.code(), Code::FailedPrecondition);
    assert!(elsewhere.message().contains("node-1") && elsewhere.message().contains("node-2"), "{elsewhere:?}");
    assert_eq!(refused(publish("node-9").await), Code::NotFound);
    publish("node-2").await.expect("published");
    let list = accepted(driver.service.list_volumes(Request::new(ListVolumesRequest::default())).await);
    assert_eq!(list.entries[0].status.as_ref().expect("a status").published_node_ids, ["node-2"]);
    driver.unpublish(&volume, "node-2").await.expect("unpublished");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_goes_to_the_node_that_holds_the_volume() {
    let (nodes, driver) = cluster(&[100, 10]).await;
    let volume = driver.create(at("pvc", &[2])).await.expect("created").volume_id;
    let snapshot = driver.snapshot("snap", &volume).await.expect("taken").snapshot_id;
    // The source decides where, however much room there is elsewhere; and whether that is allowed.
    let clone = driver.create(from_volume("clone", &volume)).await.expect("cloned");
    let restored = driver.create(from_snapshot("restored", &snapshot)).await.expect("restored");
    for made in [&clone, &restored] {
        assert_eq!(made.accessible_topology, [place("node-2")]);
    }
    let requirement = TopologyRequirement { requisite: vec![place("node-1")], preferred: vec![] };
    let elsewhere =
        CreateVolumeRequest { accessibility_requirements: Some(requirement), ..from_volume("elsewhere", &volume) };
    assert_eq!(refused(driver.create(elsewhere).await), Code::ResourceExhausted);
    assert_eq!(driver.expand(&volume, 2 * GIB, 0).await.expect("grown"), 2 * GIB);
    driver.modify(&volume, &[("verifyReads", "true")]).await.expect("modified");
    driver.delete_snapshot(&snapshot).await.expect("deleted");
    for id in [&volume, &clone.volume_id, &restored.volume_id] {
        driver.delete(id).await.expect("deleted");
    }
    assert!(nodes.fakes[1].state().volumes.is_empty() && nodes.fakes[1].state().snapshots.is_empty());
    let calls = nodes.fakes[0].state().calls.clone();
    assert!(calls.iter().all(|call| *call == "ListPools"), "node-1 was asked for room only: {calls:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_down_is_named_and_stops_only_what_needs_it() {
    let (mut nodes, driver) = cluster(&[10, 30]).await;
    let down = driver.create(at("down", &[2])).await.expect("created").volume_id;
    let up = driver.create(at("up", &[1])).await.expect("created").volume_id;
    nodes.stop(2);
    let named = |result: Result<(), Status>| {
        let status = result.expect_err("its node is down");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("node-2"), "{status:?}");
    };
    named(driver.create(at("new", &[2])).await.map(drop));
    named(driver.snapshot("snap", &down).await.map(drop));
    named(driver.expand(&down, 2 * GIB, 0).await.map(drop));
    named(driver.delete(&down).await);
    let request = GetCapacityRequest { accessible_topology: Some(place("node-2")), ..Default::default() };
    named(driver.service.get_capacity(Request::new(request)).await.map(drop));
    // Others go on, and what may be anywhere goes where somebody answers.
    driver.expand(&up, 2 * GIB, 0).await.expect("grown");
    let anywhere = driver.create(wanted("anywhere", GIB)).await.expect("created");
    assert_eq!(anywhere.accessible_topology, [place("node-1")]);
    driver.delete("6f1c2c4e-3f0e-4c1f-9a55-0d9f6a1b2c3d").await.expect("nobody needs to know it");
    let list = ControllerListVolumeHealthRequest::default();
    let health = accepted(driver.service.controller_list_volume_health(Request::new(list)).await).entries;
    let of = |id: &str| health.iter().find(|entry| entry.volume_id == id).map(|entry| entry.health_statuses.clone());
    assert!(of(&up).expect("there").is_empty());
    assert!(
        of(&down).is_none_or(|entries| entries[0].reason == "NodeUnreachable" && entries[0].message.contains("node-2"))
    );
    let stored = driver.catalog.list::<tandem::catalog::Volume>().await.expect("readable");
    assert!(
        stored.iter().all(|volume| volume.object.request.name != "new"),
        "nothing was begun on a node that is down"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_of_one_node() {
    let (_nodes, driver) = cluster(&[10, 10]).await;
    let one = driver.create(at("one", &[1])).await.expect("created").volume_id;
    let two = driver.create(at("two", &[2])).await.expect("created").volume_id;
    let other = driver.create(at("other", &[2])).await.expect("created").volume_id;
    let take = |volumes: Vec<String>| {
        let request =
            CreateVolumeGroupSnapshotRequest { name: "group".into(), source_volume_ids: volumes, ..Default::default() };
        driver.controller.create_group(request.try_into().expect("a request"))
    };
    let apart = take(vec![one, two.clone()]).await.expect_err("two nodes").to_string();
    assert!(apart.contains("node-1, node-2"), "{apart}");
    assert_eq!(take(vec![two, other]).await.expect("taken").snapshots.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_another_setting_of_encryption_gets_no_volumes() {
    let (mut nodes, driver) = cluster(&[10]).await;
    nodes.add(&driver.catalog, 2, 100 * GIB, false).await;
    assert_eq!(driver.create(wanted("pvc", GIB)).await.expect("created").accessible_topology, [place("node-1")]);
    assert_eq!(refused(driver.create(at("there", &[2])).await), Code::ResourceExhausted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_called_that_is_another_than_the_catalogue_says() {
    let (nodes, driver) = cluster(&[10]).await;
    let stored = driver.catalog.get::<Node>("node-1").await.expect("readable").expect("there");
    let impostor = Node { name: NodeName("node-2".into()), ..stored.object };
    driver.catalog.create(impostor).await.expect("announced");
    let status = driver.create(at("pvc", &[2])).await.expect_err("node-1 answers there");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("node-2"), "{status:?}");
    assert_eq!(nodes.volumes(1), 0);
}
