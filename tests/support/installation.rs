//! A `tandem standalone` of the test's own in a temporary directory, with clients for its sockets. Leaves nothing behind.

use super::leash::Leash;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tandem::rpc::control::replica_client::ReplicaClient;
use tandem::rpc::csi;
use tandem::rpc::csi::controller_client::ControllerClient;
use tandem::rpc::csi::identity_client::IdentityClient;
use tandem::rpc::csi::node_client::NodeClient;
use tempfile::TempDir;
use tonic::transport::Channel;

/// How long a start may take: opening pools, and replaying what waits.
const START_LIMIT: Duration = Duration::from_secs(300);

/// The installation; dropped, it is gone.
pub struct Installation {
    parent: Option<Child>,
    arguments: Vec<String>,
    environment: Vec<(String, PathBuf)>,
    /// For whoever kills the test.
    _leash: Leash,
    dir: TempDir,
}

impl Installation {
    /// Starts one with more arguments for `tandem standalone`.
    pub async fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::Builder::new().prefix("tandem-test-").tempdir().expect("directory"), arguments, &[])
            .await
    }

    /// Starts one in a directory that was made for it, with more variables in its environment.
    pub async fn start_in(dir: TempDir, arguments: &[&str], environment: &[(&str, &Path)]) -> Self {
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect();
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), value.to_path_buf())).collect();
        let mut installation = Self { parent: None, arguments, environment, _leash: Leash::new(dir.path()), dir };
        installation.start_again().await;
        installation
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The same command once more.
    pub async fn start_again(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir().join("log")).expect("log");
        let child = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .arg("standalone")
            .arg("--dir")
            .arg(self.dir())
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("tandem starts");
        self.parent = Some(child);
        let started = Instant::now();
        while !self.ready().await {
            let ended = self.parent.as_mut().and_then(|p| p.try_wait().ok().flatten());
            assert!(ended.is_none(), "tandem ended: {ended:?}\n{}", self.log());
            assert!(started.elapsed() < START_LIMIT, "tandem is not ready\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// kill -9 of the parent: CSI and engine die with it.
    pub fn kill(&mut self) {
        if let Some(mut parent) = self.parent.take() {
            parent.kill().expect("our own child");
            parent.wait().expect("our own child");
        }
    }

    /// SIGTERM, and wait until it is gone.
    pub fn terminate(&mut self) {
        // One that ended by itself has no process id any more.
        if let Some(mut parent) = self.parent.take()
            && parent.try_wait().expect("our own child").is_none()
        {
            let pid = nix::unistd::Pid::from_raw(parent.id().try_into().expect("pid"));
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("our own child");
            parent.wait().expect("our own child");
        }
    }

    /// Whether the server died by itself since it was started.
    pub fn has_ended(&mut self) -> bool {
        self.parent.as_mut().is_none_or(|parent| parent.try_wait().expect("our own child").is_some())
    }

    /// Pids of a role's process of this installation ("replica", "csi", "holder").
    pub fn pids(&self, role: &str) -> Vec<i32> {
        pids(self.dir(), role)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).unwrap_or_default()
    }

    async fn ready(&self) -> bool {
        let probe = IdentityClient::new(self.csi()).probe(csi::ProbeRequest {}).await;
        probe.is_ok_and(|r| r.into_inner().ready.unwrap_or(true))
    }

    fn csi(&self) -> Channel {
        tandem::uds::channel(&self.dir().join("csi.sock"))
    }

    /// CSI Controller.
    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.csi())
    }

    /// CSI Node.
    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.csi())
    }

    /// The control socket.
    pub fn control(&self) -> ReplicaClient<Channel> {
        ReplicaClient::new(tandem::uds::channel(&self.dir().join("replica.sock")))
    }

    /// Creates a volume and returns its id.
    pub async fn create(&self, name: &str, bytes: i64, parameters: &[(&str, &str)]) -> String {
        self.create_from(name, bytes, parameters, None).await.expect("volume")
    }

    /// Creates a volume with a source.
    pub async fn create_from(
        &self,
        name: &str,
        bytes: i64,
        parameters: &[(&str, &str)],
        source: Option<csi::volume_content_source::Type>,
    ) -> Result<String, tonic::Status> {
        let request = csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
            volume_capabilities: vec![block()],
            parameters: parameters.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            volume_content_source: source.map(|s| csi::VolumeContentSource { r#type: Some(s) }),
            ..Default::default()
        };
        let made = self.controller().create_volume(request).await?.into_inner();
        Ok(made.volume.expect("volume").volume_id)
    }

    /// Creates a volume for a filesystem and returns its id.
    pub async fn create_mounted(&self, name: &str, bytes: i64, fs_type: &str) -> String {
        let request = csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
            volume_capabilities: vec![super::mounted::filesystem(fs_type)],
            ..Default::default()
        };
        let made = self.controller().create_volume(request).await.expect("volume").into_inner();
        made.volume.expect("volume").volume_id
    }

    /// Takes a snapshot and returns its id.
    pub async fn snapshot(&self, name: &str, volume: &str) -> Result<String, tonic::Status> {
        let request = csi::CreateSnapshotRequest {
            name: name.to_owned(),
            source_volume_id: volume.to_owned(),
            ..Default::default()
        };
        let made = self.controller().create_snapshot(request).await?.into_inner();
        Ok(made.snapshot.expect("snapshot").snapshot_id)
    }

    /// The block device of a volume.
    pub async fn attach(&self, volume: &str) -> PathBuf {
        let request = tandem::rpc::control::AttachVolumeRequest { volume_id: volume.to_owned() };
        self.control().attach_volume(request).await.expect("device").into_inner().device.into()
    }

    /// No device any more.
    pub async fn detach(&self, volume: &str) {
        let request = tandem::rpc::control::DetachVolumeRequest { volume_id: volume.to_owned(), abandon: false };
        self.control().detach_volume(request).await.expect("detached");
    }
}

/// Pids of a role's process of the installation in `dir`.
pub fn pids(dir: &Path, role: &str) -> Vec<i32> {
    let dir = dir.display().to_string();
    let processes = fs::read_dir("/proc").expect("proc").filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    let ours = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        words.get(1).is_some_and(|w| w == role) && words.iter().any(|w| w.starts_with(&dir))
    };
    processes.filter(ours).collect()
}

/// The capability "raw block, one node writes".
pub fn block() -> csi::VolumeCapability {
    use csi::volume_capability::{AccessMode, AccessType, BlockVolume, access_mode::Mode};
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            super::diagnosis::print(self.dir());
            eprintln!("--- log of {}\n{}", self.dir().display(), self.log());
        }
        self.unmount();
        self.terminate();
        let devices = self.release_devices();
        for role in ["replica", "csi", "holder"] {
            self.end(role);
        }
        if !failed {
            assert!(devices.is_empty(), "the test left devices attached: {devices:?}");
        }
    }
}

impl Installation {
    fn unmount(&self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let dir = self.dir().display().to_string();
        let mut targets: Vec<_> =
            mounts.lines().filter_map(|l| l.split(' ').nth(4)).filter(|t| t.starts_with(&dir)).collect();
        targets.reverse();
        for target in targets {
            let _ = Command::new("umount").args(["--lazy", target]).status();
        }
    }

    /// Takes away the loop devices that are ours: their volumes' copies are under our pool. Asks sysfs: `losetup --all` waits
    /// for every frozen device of the machine.
    fn release_devices(&self) -> Vec<String> {
        let ids = self.volume_ids();
        let mut released = Vec::new();
        for block in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let backing = fs::read_to_string(block.path().join("loop/backing_file")).unwrap_or_default();
            if ids.iter().any(|id| backing.contains(id.as_str())) {
                let device = Path::new("/dev").join(block.file_name()).display().to_string();
                let _ = Command::new("losetup").args(["--detach", &device]).status();
                released.push(device);
            }
        }
        released
    }

    fn volume_ids(&self) -> Vec<String> {
        let trees = fs::read_dir(self.dir().join("pool/trees")).into_iter().flatten().flatten();
        let records = trees.filter_map(|t| fs::read_dir(t.path().join("records")).ok()).flatten().flatten();
        records.filter_map(|r| r.file_name().into_string().ok()).collect()
    }

    fn end(&self, role: &str) {
        let deadline = Instant::now() + Duration::from_secs(1);
        while role == "holder" && !self.pids(role).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        for pid in self.pids(role) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}
