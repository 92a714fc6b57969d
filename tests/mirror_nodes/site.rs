//! Nodes of one cluster in this process, each with an engine, a holder of its own, a pool, and a port of this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tandem::catalog::{
    Base, Catalog, CopySpec, Descriptor, Embedded, MirrorSpec, Node, NodeName, Object, Replication, Stored,
    UpdateError, Volume, VolumeConfiguration, VolumePhase, VolumeRequest,
};
use tandem::metrics;
use tandem::protocol::{Configuration, Generation, Lacks};
use tandem::replica::device::loop_device;
use tandem::replica::engine::{self, CopyState, EngineConfig, IoChoice, MirrorStatus};
use tandem::replica::holder::Holder;
use tandem::replica::manager::{Manager, NewVolume, OpenSettings, Source};
use tandem::replica::mirror::{MirrorSettings, Mirrors, boot_id};
use tandem::replica::peer::{Endpoint, Security};
use tandem::volume::{ClusterId, InstanceId, SnapshotId, VolumeId, VolumeSize};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// When a condition is given up: a test that waits so long has failed.
pub const LONG: Duration = Duration::from_secs(120);
pub const SIZE: u64 = 64 << 20;

/// Waits for a condition of the running system.
pub async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < LONG, "{what} does not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn size(bytes: u64) -> VolumeSize {
    VolumeSize::try_from(bytes).expect("a size")
}

/// A copy on this node.
pub fn at(node: &str) -> CopySpec {
    CopySpec { node: NodeName(node.into()), pool: "default".into() }
}

/// A volume with a copy on each of some nodes.
pub struct Wanted {
    pub id: VolumeId,
    pub copies: BTreeMap<&'static str, InstanceId>,
}

/// Everything that a test has on this machine; all of it goes on every path.
pub struct Site {
    directory: tempfile::TempDir,
    cluster: ClusterId,
    pub file: Embedded,
    nodes: BTreeMap<&'static str, SocketAddr>,
    /// Of each node, beside its own.
    pub pools: Vec<(&'static str, PathBuf)>,
    volumes: Vec<VolumeId>,
}

impl Site {
    pub fn new(nodes: &[&'static str]) -> Self {
        let under = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let directory = tempfile::Builder::new().prefix("tandem-mirror-").tempdir_in(under).expect("a directory");
        let file = Embedded::open(&directory.path().join("catalog.redb")).expect("a catalogue");
        for node in nodes {
            std::fs::create_dir_all(directory.path().join(node).join("pool")).expect("a directory");
        }
        let nodes = nodes.iter().map(|node| (*node, SocketAddr::from(([127, 0, 0, 1], 0)))).collect();
        Self { directory, cluster: ClusterId::random(), file, nodes, pools: Vec::new(), volumes: Vec::new() }
    }

    pub fn path(&self, node: &str) -> PathBuf {
        self.directory.path().join(node)
    }

    pub fn catalog(&self) -> Catalog {
        Catalog::Embedded(self.file.clone())
    }

    /// What the controller writes for a new volume, and nothing else.
    pub async fn create(&mut self, copies: &[&'static str]) -> Wanted {
        self.create_from(copies.iter().map(|node| (*node, InstanceId::random())).collect(), None).await
    }

    /// The same with a copy in this pool of the node.
    pub async fn create_in(&mut self, pool: &str, node: &'static str) -> Wanted {
        let copies = BTreeMap::from([(node, InstanceId::random())]);
        self.create_with(copies, None, pool).await
    }

    /// The same for one whose copies may begin with a snapshot.
    pub async fn create_from(&mut self, copies: BTreeMap<&'static str, InstanceId>, base: Option<Base>) -> Wanted {
        self.create_with(copies, base, "default").await
    }

    async fn create_with(
        &mut self,
        copies: BTreeMap<&'static str, InstanceId>,
        base: Option<Base>,
        pool: &str,
    ) -> Wanted {
        let replicas = u8::try_from(copies.len()).expect("few");
        let mut volume = Volume::wanted(VolumeId::random(), self.request(Replication::Sync { replicas }));
        let in_pool = |node: &str| CopySpec { pool: pool.into(), ..at(node) };
        let wanted = copies.iter().map(|(node, copy)| (*copy, in_pool(node))).collect();
        volume.spec.mirror = Some(MirrorSpec::new(wanted));
        volume.status.phase = VolumePhase::Ready;
        let is_whole = |copy: &InstanceId| base.as_ref().is_none_or(|base| base.clones.contains(copy));
        let (whole, empty): (Vec<_>, Vec<_>) = copies.values().copied().partition(is_whole);
        let mut whole = whole.into_iter();
        let mut first = Configuration::first(Generation(0), whole.next().expect("a copy"), whole.collect());
        first.candidates = empty.into_iter().map(|copy| (copy, Lacks::Everything)).collect();
        volume.spec.base = base;
        self.file.create(VolumeConfiguration::new(volume.id, &first)).await.expect("created");
        self.volumes.push(volume.id);
        let id = self.file.create(volume).await.expect("created").object.id;
        Wanted { id, copies }
    }

    fn request(&self, replication: Replication) -> VolumeRequest {
        VolumeRequest {
            name: format!("pvc-{}", self.volumes.len()),
            size: size(SIZE),
            pool: "default".into(),
            fs_type: None,
            verify_reads: false,
            access: BTreeSet::new(),
            source: None,
            replication,
            rebuild_after: Default::default(),
            reach: Default::default(),
        }
    }

    /// A volume with one copy, on this node, as the controller and the replica make it.
    pub async fn create_sole(&mut self, node: &'static str, up: &Up) -> Wanted {
        let mut volume = Volume::wanted(VolumeId::random(), self.request(Replication::None));
        (volume.spec.node, volume.status.phase) = (Some(NodeName(node.into())), VolumePhase::Ready);
        let id = volume.id;
        let new = NewVolume {
            volume: id,
            pool: "default".parse().expect("a name"),
            size: volume.spec.size,
            descriptor: Descriptor::of(&volume).encode(),
            verify_reads: false,
            source: Source::Blank,
        };
        up.manager.ensure_volume(new).await.expect("made");
        self.volumes.push(id);
        self.file.create(volume).await.expect("created");
        let tree = up.manager.volume(id).await.expect("there").tree;
        Wanted { id, copies: BTreeMap::from([(node, tree)]) }
    }

    /// A device of a volume that the catalogue does not know is looked for at the end as well.
    pub fn note(&mut self, volume: VolumeId) {
        self.volumes.push(volume);
    }

    pub async fn volume(&self, id: VolumeId) -> Stored<Volume> {
        self.file.get::<Volume>(&id.to_string()).await.expect("reads").expect("is there")
    }

    pub async fn configuration(&self, id: VolumeId) -> Configuration {
        self.catalog().configuration(id).await.expect("reads").expect("is there")
    }

    /// What a controller or a person writes.
    pub async fn change(&self, id: VolumeId, change: impl Fn(&mut Volume)) {
        loop {
            let mut stored = self.volume(id).await;
            change(&mut stored.object);
            match self.file.update(stored).await {
                Ok(_) => return,
                Err(UpdateError::Conflict { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub async fn wish(&self, id: VolumeId, primary: Option<InstanceId>) {
        self.change(id, |volume| volume.spec.mirror.as_mut().expect("mirrored").primary = primary).await;
    }

    /// Starts a node, or starts it again. It is found at the same address as before.
    pub async fn start(&mut self, node: &'static str, catalog: Catalog) -> Up {
        let directory = self.path(node);
        let listener = eventually("the port", async || TcpListener::bind(self.nodes[node]).await.ok()).await;
        let address = listener.local_addr().expect("an address");
        self.nodes.insert(node, address);
        let executable = Path::new(env!("CARGO_BIN_EXE_tandem"));
        let socket = directory.join("holder.sock");
        let engine = eventually("the engine before it to end", async || {
            let holder = Holder::connect_or_spawn(&socket, executable).ok()?;
            engine::start(EngineConfig { holder, io: IoChoice::Uring, spin: None }).ok()
        });
        let (handle, recovered) = engine.await;
        let security = Security::Off { cluster: self.cluster, node: node.parse().expect("a name") };
        let endpoint = Endpoint::listen(listener, security);
        let mut mirrors = Mirrors::new(MirrorSettings {
            node: NodeName(node.into()),
            catalog,
            endpoint,
            boot: boot_id().expect("a boot id"),
        });
        let mut pools = vec![("default".parse().expect("a name"), directory.join("pool"))];
        pools.extend(self.pools.iter().map(|(name, path)| (name.parse().expect("a name"), path.clone())));
        let settings = OpenSettings { dir: directory, pools, overcommit: 1.0 };
        let opened = Manager::open_with(settings, handle, recovered, async |manager, held| {
            mirrors.open_copies(manager, held).await;
        });
        let manager = opened.await.expect("opens");
        let task = tokio::spawn(mirrors.run(manager.clone()));
        Up { manager, task }
    }

    /// What `tandem replica` says of itself at its start.
    pub async fn announce(&self, node: &str) {
        let address = self.nodes[node];
        let wanted = Node::new(NodeName(node.into()), address, address, false);
        match self.file.get::<Node>(&wanted.key()).await.expect("reads") {
            Some(stored) => drop(self.file.update(Stored { object: wanted, ..stored }).await.expect("updated")),
            None => drop(self.file.create(wanted).await.expect("created")),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for node in self.nodes.keys() {
            // The connections go with the holder, and nobody waits for them any more.
            if let Ok(status) = Holder::status(&self.path(node).join("holder.sock")) {
                let pid = nix::unistd::Pid::from_raw(i32::try_from(status.pid).expect("a pid"));
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        for volume in &self.volumes {
            abort_connection(*volume);
            let _ = loop_device::detach_all(*volume);
        }
    }
}

/// So that nobody waits for a device whose engine is about to end, if the test has failed. The number of its connection is
/// in the name of the file below it.
fn abort_connection(volume: VolumeId) {
    for entry in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        let connection = backing.split('.').nth(1).filter(|_| backing.contains(&volume.to_string()));
        if let Some(connection) = connection {
            let _ = std::fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1");
        }
    }
}

/// A node that runs.
pub struct Up {
    pub manager: Manager,
    task: JoinHandle<()>,
}

impl Up {
    /// Its engine and everything else of it ends; devices freeze.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    pub async fn status(&self, volume: VolumeId) -> Option<MirrorStatus> {
        self.manager.engine_handle().mirror_status(volume).await.expect("the engine runs")
    }

    /// What metrics say of the volume.
    pub async fn seen(&self, volume: VolumeId) -> metrics::Volume {
        let all = self.manager.measure().await.volumes;
        all.into_iter().find(|seen| seen.volume == volume.to_string()).expect("it has a copy")
    }

    /// The volume's device, when this node may have one.
    pub async fn attach(&self, volume: VolumeId) -> PathBuf {
        eventually("the device", async || match self.manager.attach(volume).await {
            Ok(device) => Some(device),
            Err(error) => {
                println!("not yet: {error}");
                None
            }
        })
        .await
    }

    /// This node's copy serves, and the other one has everything.
    pub async fn until_up_to_date(&self, volume: VolumeId, other: InstanceId) {
        eventually("the other copy to be up to date", async || {
            let status = self.status(volume).await?;
            let there = status.copies.get(&other)?;
            (status.serves && status.configuration.is_member(other) && there.state == CopyState::UpToDate).then_some(())
        })
        .await;
    }

    /// Snapshots that this node knows.
    pub async fn snapshots(&self) -> Vec<SnapshotId> {
        self.manager.list_snapshots().await.into_iter().map(|view| view.info.snapshot).collect()
    }

    pub fn trees(&self, pool: &Path) -> usize {
        std::fs::read_dir(pool.join("trees")).map_or(0, Iterator::count)
    }
}

#[repr(C, align(4096))]
pub struct Aligned(pub [u8; 4096]);

pub fn direct(device: &Path) -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device")
}

/// Writes blocks with this content and flushes; ends when both are acknowledged.
pub async fn write(device: &Path, blocks: std::ops::Range<u64>, content: u8) {
    use std::os::unix::fs::FileExt;
    let device = direct(device);
    let work = move || {
        blocks.for_each(|block| device.write_all_at(&Aligned([content; 4096]).0, block * 4096).expect("writes"));
        device.sync_data().expect("flushes");
    };
    tokio::task::spawn_blocking(work).await.expect("written");
}

/// Whether all of the blocks have this content.
pub async fn has(device: &Path, blocks: std::ops::Range<u64>, content: u8) -> bool {
    use std::os::unix::fs::FileExt;
    let device = direct(device);
    let work = move || {
        let mut buffer = Box::new(Aligned([0; 4096]));
        blocks.into_iter().all(|block| {
            device.read_exact_at(&mut buffer.0, block * 4096).expect("reads");
            buffer.0.iter().all(|byte| *byte == content)
        })
    };
    tokio::task::spawn_blocking(work).await.expect("read")
}
