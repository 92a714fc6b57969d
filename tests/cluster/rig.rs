//! A cluster made by `hack/cluster` in a temporary directory, with clients for its sockets. Dropped, nothing is left.

use crate::leash::Leash;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use tandem::csi::TOPOLOGY_KEY;
use tandem::rpc::csi::controller_client::ControllerClient;
use tandem::rpc::csi::node_client::NodeClient;
use tandem::rpc::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use tandem::rpc::csi::*;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Status};

pub const MIB: i64 = 1 << 20;
/// How long anything may take on a machine that is busy with other tests. A copy that was slow is left alone for a minute.
pub const PATIENCE: Duration = Duration::from_secs(240);

pub struct Cluster {
    /// For whoever kills the test.
    _leash: Leash,
    top: TempDir,
    /// For every command: more flags of its processes.
    environment: Vec<(&'static str, String)>,
    up: bool,
}

/// Runs `hack/cluster` with the binary of this build.
pub fn hack_cluster(dir: &Path, arguments: &[&str]) -> Output {
    hack_cluster_with(dir, arguments, &[])
}

fn hack_cluster_with(dir: &Path, arguments: &[&str], environment: &[(&'static str, String)]) -> Output {
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/hack/cluster"))
        .arg("--dir")
        .arg(dir)
        .args(arguments)
        .env("TANDEM", env!("CARGO_BIN_EXE_tandem"))
        .envs(environment.iter().map(|(name, value)| (*name, value)))
        .output()
        .expect("started")
}

/// What it printed; panics if it failed.
fn succeeded(output: Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

impl Cluster {
    /// Nodes 1 to n.
    pub fn up(nodes: usize) -> Self {
        Self::up_with(nodes, Vec::new())
    }

    /// The same with variables that `hack/cluster` knows.
    pub fn up_with(nodes: usize, environment: Vec<(&'static str, String)>) -> Self {
        let top = tempfile::Builder::new().prefix("tandem-cluster-").tempdir().expect("a directory");
        let _leash = Leash::after("hack/cluster --dir \"$DIR/c\" down", top.path());
        let cluster = Self { _leash, top, environment, up: true };
        cluster.run(&["up", &nodes.to_string()]);
        cluster
    }

    pub fn dir(&self) -> PathBuf {
        self.top.path().join("c")
    }

    /// A command of `hack/cluster` that must succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        self.run_with(arguments, &[])
    }

    /// The same with more variables.
    pub fn run_with(&self, arguments: &[&str], more: &[(&'static str, String)]) -> String {
        let environment = [self.environment.as_slice(), more].concat();
        succeeded(hack_cluster_with(&self.dir(), arguments, &environment))
    }

    /// A command of `hack/cluster`: whether it succeeded.
    #[allow(dead_code, reason = "tests/cluster.rs expects that all succeed")]
    pub fn tries(&self, arguments: &[&str]) -> bool {
        hack_cluster_with(&self.dir(), arguments, &self.environment).status.success()
    }

    /// Takes it down and checks that nothing is left.
    pub fn down(mut self) {
        self.up = false;
        let dir = self.dir();
        succeeded(hack_cluster(&dir, &["down"]));
        assert_eq!(traces(&dir), Vec::<String>::new());
    }

    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(tandem::uds::channel(&self.dir().join("controller/csi.sock")))
    }

    pub fn node(&self, number: usize) -> NodeClient<Channel> {
        NodeClient::new(tandem::uds::channel(&self.dir().join(format!("node-{number}/csi.sock"))))
    }

    /// A volume with a filesystem, on one of these nodes.
    pub async fn create(&self, name: &str, nodes: &[usize]) -> Result<Volume, Status> {
        self.create_with(name, nodes, &[]).await
    }

    /// The same with parameters.
    pub async fn create_with(
        &self,
        name: &str,
        nodes: &[usize],
        parameters: &[(&str, &str)],
    ) -> Result<Volume, Status> {
        let requisite: Vec<_> = nodes.iter().map(|number| place(*number)).collect();
        let request = CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(CapacityRange { required_bytes: 64 * MIB, limit_bytes: 0 }),
            volume_capabilities: vec![filesystem()],
            parameters: parameters.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            accessibility_requirements: Some(TopologyRequirement { preferred: requisite.clone(), requisite }),
            ..Default::default()
        };
        Ok(self.controller().create_volume(request).await?.into_inner().volume.expect("a volume"))
    }

    pub async fn delete(&self, volume_id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest { volume_id: volume_id.into(), ..Default::default() };
        self.controller().delete_volume(request).await.map(drop)
    }

    pub async fn attach(&self, volume_id: &str, number: usize) -> Result<(), Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: volume_id.into(),
            node_id: format!("node-{number}"),
            volume_capability: Some(filesystem()),
            ..Default::default()
        };
        self.controller().controller_publish_volume(request).await.map(drop)
    }

    /// Publishes and stages it on the node; returns where.
    pub async fn stage(&self, volume_id: &str, number: usize) -> PathBuf {
        repeat("publish", is_later, async || self.attach(volume_id, number).await).await;
        let staging = self.dir().join(format!("node-{number}/staging-{volume_id}"));
        std::fs::create_dir_all(&staging).expect("a directory");
        let request = NodeStageVolumeRequest {
            volume_id: volume_id.into(),
            staging_target_path: staging.display().to_string(),
            volume_capability: Some(filesystem()),
            ..Default::default()
        };
        repeat("stage", is_later, async || self.node(number).node_stage_volume(request.clone()).await).await;
        staging
    }

    pub async fn unstage(&self, volume_id: &str, number: usize, staging: &Path) {
        let staging_target_path = staging.display().to_string();
        let request = NodeUnstageVolumeRequest { volume_id: volume_id.into(), staging_target_path };
        repeat("unstage", is_later, async || self.node(number).node_unstage_volume(request.clone()).await).await;
        let node_id = format!("node-{number}");
        let request = ControllerUnpublishVolumeRequest { volume_id: volume_id.into(), node_id, ..Default::default() };
        let ask = async || self.controller().controller_unpublish_volume(request.clone()).await;
        repeat("unpublish", is_later, ask).await;
    }
}

/// Whether the answer asks for the call to be repeated.
pub fn is_later(status: &Status) -> bool {
    matches!(status.code(), Code::Aborted | Code::Unavailable)
}

/// As the sidecars and kubelet do.
pub async fn repeat<T>(what: &str, again: impl Fn(&Status) -> bool, ask: impl AsyncFn() -> Result<T, Status>) -> T {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(status) => assert!(again(&status) && began.elapsed() < PATIENCE, "{what}: {status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.up {
            for log in ["controller/controller.log", "node-1/replica.log", "node-2/replica.log"] {
                eprintln!("--- {log}\n{}", std::fs::read_to_string(self.dir().join(log)).unwrap_or_default());
            }
            let _ = hack_cluster(&self.dir(), &["down"]);
        }
    }
}

pub fn place(number: usize) -> Topology {
    Topology { segments: [(TOPOLOGY_KEY.to_owned(), format!("node-{number}"))].into() }
}

pub fn filesystem() -> VolumeCapability {
    let access_mode = Some(AccessMode { mode: Mode::SingleNodeWriter.into() });
    VolumeCapability { access_mode, access_type: Some(AccessType::Mount(MountVolume::default())) }
}

/// Processes, mounts and namespaces of the cluster in this directory, and the directory.
pub fn traces(dir: &Path) -> Vec<String> {
    let text = dir.display().to_string();
    let mut found = Vec::new();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
    found.extend(mounts.lines().filter(|line| line.contains(&text)).map(str::to_owned));
    for process in std::fs::read_dir("/proc").expect("readable").flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.starts_with(env!("CARGO_BIN_EXE_tandem")) && line.contains(&text) {
            found.push(line);
        }
    }
    let tag = Command::new("cksum").stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn();
    let mut tag = tag.expect("started");
    std::io::Write::write_all(&mut tag.stdin.take().expect("piped"), text.as_bytes()).expect("written");
    let sum = String::from_utf8(tag.wait_with_output().expect("ended").stdout).expect("text");
    let sum: u32 = sum.split(' ').next().and_then(|number| number.parse().ok()).expect("a number");
    let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|e| e.file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    found.extend(names.filter(|name| name.starts_with(&format!("tandem-{sum:08x}-"))));
    found.extend(dir.exists().then_some(text));
    found
}
