//! A cluster with one mirrored block volume, as the attacher and kubelet use it, and what is wrong with it.

use crate::load::{Load, Oracle};
pub use crate::rig::PATIENCE;
use crate::rig::{Cluster, MIB, filesystem, is_later, place, repeat};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tandem::csi::control::{Client, Control};
use tandem::rpc::control::{DetachVolumeRequest, GetVolumeRequest, Mirror};
use tandem::rpc::csi::volume_capability::{AccessMode, AccessType, BlockVolume, access_mode::Mode};
use tandem::rpc::csi::*;
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Code, Status};

/// Bytes of the volume,
pub const SIZE: i64 = 64 * MIB;
/// and of the part of it that loads write to; the rest is for tests that know themselves what is there.
pub const LOADED: i64 = 48 * MIB;

/// Clusters at a time: most of a case is waiting for leases and silences, and more than two would take each other's time
/// while a lease is two seconds.
const CLUSTERS: usize = 2;
static MACHINE: Semaphore = Semaphore::const_new(CLUSTERS);

pub struct Site {
    pub cluster: Cluster,
    pub id: String,
    pub oracle: Oracle,
    capability: VolumeCapability,
    /// Processes die in the middle of calls.
    kills: bool,
    _machine: SemaphorePermit<'static>,
}

impl Site {
    /// The volume is a block device with a copy on each node, and not published anywhere.
    pub async fn new(nodes: usize) -> Self {
        Self::with(nodes, nodes, block(), Vec::new()).await
    }

    /// With one copy, on the first node.
    pub async fn with_one_copy(nodes: usize) -> Self {
        Self::with(nodes, 1, block(), Vec::new()).await
    }

    /// Two copies, on nodes 1 and 2 of three, and every node may use it.
    pub async fn anywhere() -> Self {
        Self::with_access("any", 3, 2, block(), Vec::new()).await
    }

    /// The same with a filesystem.
    pub async fn anywhere_with_filesystem() -> Self {
        Self::with_access("any", 3, 2, filesystem(), Vec::new()).await
    }

    /// Two copies, on nodes 1 and 2 of three.
    pub async fn with_a_spare_node() -> Self {
        Self::with(3, 2, block(), Vec::new()).await
    }

    /// Two copies, and a filesystem.
    pub async fn with_filesystem() -> Self {
        Self::with(2, 2, filesystem(), Vec::new()).await
    }

    /// The same, with the pool of node 1 in this directory.
    pub async fn with_filesystem_in_pool(pool: &Path) -> Self {
        Self::with(2, 2, filesystem(), vec![pool_of(1, pool)]).await
    }

    /// A volume in use at node 1: its device, and writers on it.
    pub async fn under_load(nodes: usize) -> (Self, PathBuf, Load) {
        Self::new(nodes).await.loaded().await
    }

    /// The same, with the pool of node 2 in this directory.
    pub async fn under_load_with_pool(pool: &Path) -> (Self, PathBuf, Load) {
        Self::with(2, 2, block(), vec![pool_of(2, pool)]).await.loaded().await
    }

    /// The same with a node, and a copy, for each of these pools.
    pub async fn under_load_with_pools(pools: &[&Path]) -> (Self, PathBuf, Load) {
        let environment = pools.iter().enumerate().map(|(at, pool)| pool_of(at + 1, pool)).collect();
        Self::with(pools.len(), pools.len(), block(), environment).await.loaded().await
    }

    /// The same with two nodes whose processes die where they are told (`kills.rs`).
    pub async fn under_load_with_kills() -> (Self, PathBuf, Load) {
        let site = Self::with(2, 2, block(), vec![("TANDEM_CLUSTER_CRASH", "yes".into())]).await;
        Self { kills: true, ..site }.loaded().await
    }

    async fn loaded(self) -> (Self, PathBuf, Load) {
        let device = self.attach(1).await;
        let load = Load::start(&device, &self.oracle);
        (self, device, load)
    }

    async fn with(
        nodes: usize,
        copies: usize,
        capability: VolumeCapability,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        Self::with_access("local", nodes, copies, capability, environment).await
    }

    async fn with_access(
        access: &str,
        nodes: usize,
        copies: usize,
        capability: VolumeCapability,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        let machine = MACHINE.acquire().await.expect("never closed");
        let cluster = Cluster::up_with(nodes, environment);
        let requisite: Vec<_> = (1..=copies).map(place).collect();
        let access = ("access", access.to_owned());
        let sync = [("replication", "sync".to_owned()), ("replicas", copies.to_string()), access];
        let parameters = sync.into_iter().filter(|_| copies > 1);
        let request = CreateVolumeRequest {
            name: "faults".into(),
            capacity_range: Some(CapacityRange { required_bytes: SIZE, limit_bytes: 0 }),
            volume_capabilities: vec![capability.clone()],
            parameters: parameters.map(|(key, value)| (key.into(), value)).collect(),
            accessibility_requirements: Some(TopologyRequirement { preferred: requisite.clone(), requisite }),
            ..Default::default()
        };
        let create = async || cluster.controller().create_volume(request.clone()).await;
        let created = repeat("create", is_later, create).await.into_inner();
        let id = created.volume.expect("a volume").volume_id;
        Self { cluster, id, oracle: Oracle::new(LOADED), capability, kills: false, _machine: machine }
    }

    pub async fn publish(&self, number: usize) -> Result<(), Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: format!("node-{number}"),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        };
        self.cluster.controller().controller_publish_volume(request).await.map(drop)
    }

    /// Published, asked again as the attacher does.
    pub async fn published(&self, number: usize) {
        // A copy that a busy machine has dropped is brought up to date again.
        let again = |status: &Status| self.is_asked_again(status) || status.message().contains("is not up to date");
        repeat("publish", again, async || self.publish(number).await).await;
    }

    /// Changes parameters, asked again as the resizer does.
    pub async fn modify(&self, parameters: &[(&str, &str)]) {
        let request = ControllerModifyVolumeRequest {
            volume_id: self.id.clone(),
            mutable_parameters: parameters.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            ..Default::default()
        };
        let ask = async || self.cluster.controller().controller_modify_volume(request.clone()).await;
        self.repeat("modify", ask).await;
    }

    /// Grows the volume and its device at the node.
    pub async fn expand(&self, required_bytes: i64, number: usize) {
        let capacity_range = Some(CapacityRange { required_bytes, limit_bytes: 0 });
        let volume_id = self.id.clone();
        let request = ControllerExpandVolumeRequest { volume_id, capacity_range, ..Default::default() };
        let ask = async || self.cluster.controller().controller_expand_volume(request.clone()).await;
        let grown = self.repeat("expand", ask).await.into_inner();
        assert_eq!((grown.capacity_bytes, grown.node_expansion_required), (required_bytes, false));
        let request = NodeExpandVolumeRequest {
            volume_id: self.id.clone(),
            volume_path: self.staging(number).display().to_string(),
            capacity_range,
            ..Default::default()
        };
        let ask = async || self.cluster.node(number).node_expand_volume(request.clone()).await;
        let grown = self.repeat("node expand", ask).await.into_inner();
        assert_eq!(grown.capacity_bytes, required_bytes);
    }

    pub async fn unpublish(&self, number: usize) {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: self.id.clone(),
            node_id: format!("node-{number}"),
            ..Default::default()
        };
        let ask = async || self.cluster.controller().controller_unpublish_volume(request.clone()).await;
        self.repeat("unpublish", ask).await;
    }

    /// Where it is mounted on the node.
    pub fn staging(&self, number: usize) -> PathBuf {
        self.cluster.dir().join(format!("node-{number}/staging-{}", self.id))
    }

    /// Publishes and stages; the device.
    pub async fn attach(&self, number: usize) -> PathBuf {
        // The attacher and kubelet repeat it, too.
        self.published(number).await;
        self.repeat("stage", async || self.stage(number).await).await;
        self.device(number).await
    }

    /// One call.
    pub async fn stage(&self, number: usize) -> Result<(), Status> {
        let staging = self.staging(number);
        std::fs::create_dir_all(&staging).expect("a directory");
        let request = NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            staging_target_path: staging.display().to_string(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        };
        self.cluster.node(number).node_stage_volume(request).await.map(drop)
    }

    pub fn control(&self, number: usize) -> Client {
        Control::new(&self.cluster.dir().join(format!("node-{number}/replica.sock"))).client()
    }

    /// Of the volume at the node.
    pub async fn device(&self, number: usize) -> PathBuf {
        let request = GetVolumeRequest { volume_id: self.id.clone() };
        self.control(number).get_volume(request).await.expect("it answers").into_inner().device.into()
    }

    /// What the copy at the node is and knows of the others; `None`: it is not open, or does not answer.
    pub async fn mirror(&self, number: usize) -> Option<Mirror> {
        let request = GetVolumeRequest { volume_id: self.id.clone() };
        self.control(number).get_volume(request).await.ok()?.into_inner().mirror
    }

    /// Asks the node to give the device up.
    pub async fn abandon(&self, number: usize) -> Result<(), Status> {
        let request = DetachVolumeRequest { volume_id: self.id.clone(), abandon: true };
        self.control(number).detach_volume(request).await.map(drop)
    }

    pub async fn unstage(&self, number: usize) {
        let staging_target_path = self.staging(number).display().to_string();
        let request = NodeUnstageVolumeRequest { volume_id: self.id.clone(), staging_target_path };
        self.repeat("unstage", async || self.cluster.node(number).node_unstage_volume(request.clone()).await).await;
    }

    pub async fn detach(&self, number: usize) {
        self.unstage(number).await;
        self.unpublish(number).await;
    }

    /// Whoever dies cannot say what is wrong; and a volume is not published at a copy that is just brought up to date.
    fn is_asked_again(&self, status: &Status) -> bool {
        let of_kills = matches!(status.code(), Code::Unknown | Code::Cancelled | Code::FailedPrecondition);
        is_later(status) || (self.kills && of_kills)
    }

    /// Takes a snapshot; its id.
    pub async fn snapshot(&self, name: &str) -> String {
        let request =
            CreateSnapshotRequest { source_volume_id: self.id.clone(), name: name.into(), ..Default::default() };
        let ask = async || self.cluster.controller().create_snapshot(request.clone()).await;
        let taken = self.repeat("snapshot", ask).await.into_inner().snapshot.expect("a snapshot");
        assert!(taken.ready_to_use, "{taken:?}");
        taken.snapshot_id
    }

    pub async fn delete_snapshot(&self, snapshot_id: &str) {
        let request = DeleteSnapshotRequest { snapshot_id: snapshot_id.into(), ..Default::default() };
        let ask = async || self.cluster.controller().delete_snapshot(request.clone()).await;
        self.repeat("delete snapshot", ask).await;
    }

    /// Of this volume, as the controller has them.
    pub async fn snapshots(&self) -> Vec<String> {
        let request = ListSnapshotsRequest { source_volume_id: self.id.clone(), ..Default::default() };
        let ask = async || self.cluster.controller().list_snapshots(request.clone()).await;
        let listed = self.repeat("list snapshots", ask).await.into_inner().entries;
        listed.into_iter().filter_map(|entry| entry.snapshot).map(|snapshot| snapshot.snapshot_id).collect()
    }

    /// Waits until the copy at the node has checksums of what the snapshot has sealed.
    pub async fn until_checksummed(&self, number: usize, snapshot_id: &str) {
        let began = Instant::now();
        loop {
            let listed = self.control(number).list_snapshots(tandem::rpc::control::ListSnapshotsRequest {}).await;
            let snapshots = listed.expect("it answers").into_inner().snapshots;
            if snapshots.iter().any(|snapshot| snapshot.snapshot_id == snapshot_id && snapshot.checksummed) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "node-{number} makes no checksums: {snapshots:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Size of the device at the node.
    pub async fn device_bytes(&self, number: usize) -> i64 {
        let mut device = std::fs::File::open(self.device(number).await).expect("the device opens");
        i64::try_from(device.seek(SeekFrom::End(0)).expect("it has a size")).expect("a size")
    }

    /// `tandem verify` at the node: whether all is well, and what it says.
    pub fn verify(&self, number: usize) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command.args(["verify", &self.id]).arg("--dir").arg(self.cluster.dir().join(format!("node-{number}")));
        let output = command.output().expect("started");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// What is to become true, asked again as its callers do.
    async fn repeat<T>(&self, what: &str, ask: impl AsyncFn() -> Result<T, Status>) -> T {
        repeat(what, |status| self.is_asked_again(status), ask).await
    }

    /// What the controller says is wrong with the copies; nothing: all are members.
    pub async fn health(&self) -> Result<Vec<String>, Status> {
        let request = ControllerGetVolumeHealthRequest { volume_id: self.id.clone(), ..Default::default() };
        let answer = self.cluster.controller().controller_get_volume_health(request).await?.into_inner();
        Ok(answer.volume_health.unwrap_or_default().health_statuses.into_iter().map(|entry| entry.message).collect())
    }

    /// How often the replica of the node has said this.
    pub fn said(&self, number: usize, text: &str) -> usize {
        let log = self.cluster.dir().join(format!("node-{number}/replica.log"));
        std::fs::read_to_string(log).unwrap_or_default().matches(text).count()
    }

    /// Waits until it has said this more often than `before`.
    pub async fn until_said(&self, number: usize, text: &str, before: usize) {
        let began = Instant::now();
        while self.said(number, text) <= before {
            assert!(began.elapsed() < PATIENCE, "node-{number} does not say {text:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until the committed configuration is like that; how long it took.
    async fn until(&self, what: &str, is: impl Fn(&[String]) -> bool) -> Duration {
        let began = Instant::now();
        loop {
            let health = self.health().await;
            if health.as_ref().is_ok_and(|health| is(health)) {
                return began.elapsed();
            }
            assert!(began.elapsed() < PATIENCE, "{what}: {health:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// All copies are members.
    pub async fn until_whole(&self) -> Duration {
        self.until("every copy to be a member", <[String]>::is_empty).await
    }

    /// The copy of the node is no member.
    pub async fn until_dropped(&self, number: usize) -> Duration {
        let name = format!("node-{number}");
        self.until("a copy to be dropped", |health| health.iter().any(|message| message.contains(&name))).await
    }

    /// Everything that is acknowledged is on the device.
    pub async fn check(&self, device: &Path) {
        let (oracle, device) = (self.oracle.clone(), device.to_path_buf());
        tokio::task::spawn_blocking(move || oracle.check(&device)).await.expect("it is as it was acknowledged");
    }

    /// A thread that reads one block.
    pub fn read_first_block(&self, device: &Path) -> std::thread::JoinHandle<std::io::Result<()>> {
        let device = device.to_path_buf();
        std::thread::spawn(move || crate::load::read_first_block(&device))
    }

    /// Of the process that was started last in this role.
    pub fn pid(&self, role: &str, host: &str) -> Pid {
        let file = self.cluster.dir().join(host).join(format!("{role}.pid"));
        Pid::from_raw(std::fs::read_to_string(file).expect("started").trim().parse().expect("a pid"))
    }

    /// The whole of a node dies, where the volume is used: another one has everything that was acknowledged, and goes on.
    pub async fn outlive(&self, dead: usize, load: Load, next: usize) -> Load {
        self.cluster.run(&["kill", "all", &dead.to_string()]);
        let done = load.stop();
        println!("{} writes, then {} errors", done.writes, done.errors.len());
        // As the attacher does for a node that is gone.
        self.unpublish(dead).await;
        let device = self.attach(next).await;
        self.check(&device).await;
        Load::start(&device, &self.oracle)
    }

    pub fn signal(&self, number: usize, signal: Signal) {
        kill(self.pid("replica", &format!("node-{number}")), signal).expect("it runs");
    }

    /// The volume moves from the first of these nodes, where it is used, to each of the others, and every copy has all that
    /// is acknowledged. Then it is deleted, and nothing is left.
    pub async fn finish_at_each(self, nodes: &[usize]) {
        let mut device = self.device(nodes[0]).await;
        for (at, node) in nodes.iter().enumerate() {
            self.check(&device).await;
            self.detach(*node).await;
            if let Some(next) = nodes.get(at + 1) {
                device = self.attach(*next).await;
            }
        }
        self.finish().await;
    }

    pub async fn delete(&self) {
        self.repeat("delete", async || self.cluster.delete(&self.id).await).await;
    }

    /// Deleted, and nothing is left.
    pub async fn finish(self) {
        self.delete().await;
        let Self { cluster, _machine, .. } = self;
        cluster.down();
    }
}

/// Where a replica has its pool.
fn pool_of(number: usize, pool: &Path) -> (&'static str, String) {
    let variable = ["TANDEM_CLUSTER_NODE_FLAGS_1", "TANDEM_CLUSTER_NODE_FLAGS_2"][number - 1];
    (variable, format!("--pool default={} --overcommit 100", pool.display()))
}

fn block() -> VolumeCapability {
    let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter.into() });
    VolumeCapability { access_mode, access_type: Some(AccessType::Block(BlockVolume::default())) }
}
