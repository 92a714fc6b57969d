//! A replica whose volumes are plain loop devices on files, behind a real control socket.

use crate::loopdev::{LoopDevice, MountPoint};
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tandem::catalog::{Access, Descriptor, NodeName, Replication, Source, VolumeRequest};
use tandem::csi::control::Control;
use tandem::csi::node::{NodeConfig, NodeService, Steps};
use tandem::rpc::control::replica_server::{Replica, ReplicaServer};
use tandem::rpc::control::*;
use tandem::volume::{SnapshotId, VolumeId, VolumeSize};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, async_trait};

struct FakeVolume {
    file: PathBuf,
    size: u64,
    descriptor: String,
    ready: bool,
    device: Option<LoopDevice>,
}

#[derive(Default)]
struct State {
    volumes: HashMap<String, FakeVolume>,
    health: Vec<Health>,
    attach_delay: Duration,
    /// Nobody serves the devices, and this keeps what is asked of them until they are given up; `None`: they are served.
    suspended: Option<Hanging>,
    /// Calls that wait for a device.
    attaching: usize,
    /// How often a device was to be given up.
    abandons: usize,
}

/// What does not go on before it is dropped.
pub type Hanging = Box<dyn Send>;

#[derive(Clone, Default)]
struct Fake {
    state: Arc<Mutex<State>>,
    given_up: Arc<Notify>,
}

/// One node with its fake replica and a directory of its own; everything goes when it is dropped.
pub struct Node {
    // Fields are dropped in this order: mounts, then devices, then files.
    targets: Mutex<Vec<MountPoint>>,
    fake: Fake,
    control: Control,
    pub directory: crate::loopdev::Directory,
}

impl Node {
    pub fn new() -> Self {
        let directory = crate::loopdev::directory();
        let socket = directory.path().join("replica.sock");
        let fake = Fake::default();
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("socket"));
        let server = tonic::transport::Server::builder().add_service(ReplicaServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        Self { targets: Mutex::default(), fake, control: Control::new(&socket), directory }
    }

    /// The service, as after a restart.
    pub fn service(&self) -> NodeService {
        self.interruptible(Steps::default())
    }

    pub fn interruptible(&self, steps: Steps) -> NodeService {
        let config = NodeConfig {
            name: NodeName("node-1".into()),
            max_volumes: 7,
            records: self.directory.path().join("staged"),
        };
        NodeService::interruptible(config, self.control.clone(), steps).expect("service")
    }

    pub fn volume(&self, bytes: u64) -> VolumeId {
        self.volume_from(bytes, None)
    }

    pub fn restored(&self, bytes: u64) -> VolumeId {
        self.volume_from(bytes, Some(Source::Snapshot(SnapshotId::random())))
    }

    fn volume_from(&self, bytes: u64, source: Option<Source>) -> VolumeId {
        self.volume_in(self.directory.path(), bytes, source)
    }

    /// One whose file is in this directory.
    pub fn volume_in(&self, directory: &Path, bytes: u64, source: Option<Source>) -> VolumeId {
        let id = VolumeId::random();
        let file = directory.join(id.to_string());
        std::fs::File::create(&file).and_then(|file| file.set_len(bytes)).expect("volume file");
        let request = VolumeRequest {
            name: "pvc".into(),
            size: VolumeSize::try_from(bytes).expect("size"),
            pool: "default".into(),
            fs_type: None,
            verify_reads: false,
            access: [Access::Mount(None)].into(),
            source,
            replication: Replication::None,
            rebuild_after: Default::default(),
            reach: Default::default(),
        };
        let descriptor = Descriptor::Volume { request, rebuild_after: None }.encode();
        let volume = FakeVolume { file, size: bytes, descriptor, ready: true, device: None };
        self.state(|state| state.volumes.insert(id.to_string(), volume));
        id
    }

    fn state<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        change(&mut self.fake.state.lock().expect("state"))
    }

    pub fn grow(&self, id: VolumeId, bytes: u64) {
        self.state(|state| {
            let volume = state.volumes.get_mut(&id.to_string()).expect("volume");
            volume.size = bytes;
            match &volume.device {
                Some(device) => device.grow(bytes),
                None => OpenOptions::new().write(true).open(&volume.file).and_then(|f| f.set_len(bytes)).expect("grow"),
            }
        });
    }

    pub fn set_ready(&self, id: VolumeId, ready: bool) {
        self.state(|state| state.volumes.get_mut(&id.to_string()).expect("volume").ready = ready);
    }

    pub fn set_health(&self, health: Vec<Health>) {
        self.state(|state| state.health = health);
    }

    pub fn delay_attach(&self, delay: Duration) {
        self.state(|state| state.attach_delay = delay);
    }

    /// From now on nobody serves any device, until one is given up: then `hanging` goes on.
    pub fn suspend(&self, hanging: Hanging) {
        self.state(|state| state.suspended = Some(hanging));
    }

    /// And if none is.
    pub fn resume(&self) {
        drop(self.state(|state| state.suspended.take()));
        self.fake.given_up.notify_waiters();
    }

    /// Calls that wait for a device.
    pub fn attaching(&self) -> usize {
        self.state(|state| state.attaching)
    }

    /// How often a device was to be given up, served or not.
    pub fn abandons(&self) -> usize {
        self.state(|state| state.abandons)
    }

    pub fn device(&self, id: VolumeId) -> Option<PathBuf> {
        self.state(|state| state.volumes[&id.to_string()].device.as_ref().map(|device| device.path.clone()))
    }

    pub fn file(&self, id: VolumeId) -> PathBuf {
        self.state(|state| state.volumes[&id.to_string()].file.clone())
    }

    /// A directory as kubelet makes it for staging.
    pub fn staging(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        self.targets.lock().expect("targets").push(MountPoint::new(path.clone()));
        path.to_str().expect("UTF-8").to_owned()
    }

    /// A path whose parent exists.
    pub fn target(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        self.targets.lock().expect("targets").push(MountPoint(path.clone()));
        path.to_str().expect("UTF-8").to_owned()
    }

    /// Unmounts everything and detaches, as a restart of the machine does.
    pub fn reboot(&self) {
        self.targets.lock().expect("targets").drain(..).for_each(drop);
        self.state(|state| state.volumes.values_mut().for_each(|volume| volume.device = None));
    }

    /// Records and marks that are left.
    pub fn leftovers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path().join("staged")).expect("records");
        entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect()
    }
}

fn is_mounted_or_held(device: &Path) -> bool {
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device).is_err()
}

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("state")
    }

    /// Ends when the devices are served; an error: they were given up before.
    async fn until_served(&self) -> Result<(), Status> {
        let given_up = self.given_up.notified();
        if self.state().suspended.is_none() {
            return Ok(());
        }
        given_up.await;
        Err(Status::aborted("it was given up"))
    }

    fn abandon(&self) -> Result<(), Status> {
        let mut state = self.state();
        state.abandons += 1;
        let hanging = state.suspended.take().ok_or_else(|| Status::failed_precondition("it is served"))?;
        drop(state);
        drop(hanging);
        self.given_up.notify_waiters();
        Ok(())
    }

    fn describe(&self, id: &str) -> Result<Volume, Status> {
        let state = self.state();
        let volume = state.volumes.get(id).ok_or_else(|| Status::not_found(format!("no volume {id}")))?;
        let mut health = state.health.clone();
        if state.suspended.is_some() {
            health.push(Health { reason: "NotServed".into(), ..Default::default() });
        }
        Ok(Volume {
            volume_id: id.into(),
            pool: "default".into(),
            size_bytes: volume.size,
            ready: volume.ready,
            device: volume.device.as_ref().map(LoopDevice::text).unwrap_or_default(),
            descriptor: volume.descriptor.clone(),
            health,
            ..Default::default()
        })
    }
}

macro_rules! not_asked {
    ($($name:ident: $request:ty => $response:ty),* $(,)?) => {
        #[async_trait]
        impl Replica for Fake {
            type GetExtentsStream = ReceiverStream<Result<GetExtentsResponse, Status>>;
            type VerifyVolumeStream = ReceiverStream<Result<VerifyVolumeResponse, Status>>;
            type DigestSnapshotStream = ReceiverStream<Result<DigestSnapshotResponse, Status>>;

            async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Result<Response<Volume>, Status> {
                self.describe(&request.into_inner().volume_id).map(Response::new)
            }

            async fn attach_volume(
                &self,
                request: Request<AttachVolumeRequest>,
            ) -> Result<Response<AttachVolumeResponse>, Status> {
                let id = request.into_inner().volume_id;
                self.describe(&id)?;
                let delay = self.state().attach_delay;
                self.state().attaching += 1;
                tokio::time::sleep(delay).await;
                let served = self.until_served().await;
                let mut state = self.state();
                state.attaching -= 1;
                served?;
                let volume = state.volumes.get_mut(&id).expect("described above");
                let device = volume.device.get_or_insert_with(|| LoopDevice::over(&volume.file)).text();
                Ok(Response::new(AttachVolumeResponse { device }))
            }

            async fn detach_volume(
                &self,
                request: Request<DetachVolumeRequest>,
            ) -> Result<Response<DetachVolumeResponse>, Status> {
                let DetachVolumeRequest { volume_id: id, abandon } = request.into_inner();
                self.describe(&id)?;
                if abandon {
                    return self.abandon().map(|()| Response::new(DetachVolumeResponse {}));
                }
                let mut state = self.state();
                let volume = state.volumes.get_mut(&id).expect("described above");
                if volume.device.as_ref().is_some_and(|device| is_mounted_or_held(&device.path)) {
                    return Err(Status::failed_precondition("the device is in use"));
                }
                volume.device = None;
                Ok(Response::new(DetachVolumeResponse {}))
            }

            async fn list_pools(&self, _: Request<ListPoolsRequest>) -> Result<Response<ListPoolsResponse>, Status> {
                let pools = ["", "99 % full: add a disk"].map(|problem| Pool {
                    name: "default".into(),
                    id: "1".into(),
                    problem: problem.into(),
                    ..Default::default()
                });
                Ok(Response::new(ListPoolsResponse { pools: pools.to_vec() }))
            }

            $(async fn $name(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                Err(Status::unimplemented(concat!(stringify!($name), " is no business of a node")))
            })*
        }
    };
}

not_asked! {
    get_status: GetStatusRequest => GetStatusResponse,
    add_pool: AddPoolRequest => AddPoolResponse,
    ensure_volume: EnsureVolumeRequest => Volume,
    delete_volume: DeleteVolumeRequest => DeleteVolumeResponse,
    list_volumes: ListVolumesRequest => ListVolumesResponse,
    expand_volume: ExpandVolumeRequest => Volume,
    modify_volume: ModifyVolumeRequest => Volume,
    resync_copy: ResyncCopyRequest => ResyncCopyResponse,
    ensure_snapshots: EnsureSnapshotsRequest => EnsureSnapshotsResponse,
    promise_snapshots: EnsureSnapshotsRequest => PromiseSnapshotsResponse,
    adopt_snapshots: EnsureSnapshotsRequest => AdoptSnapshotsResponse,
    fill_snapshot: FillSnapshotRequest => FillSnapshotResponse,
    delete_snapshot: DeleteSnapshotRequest => DeleteSnapshotResponse,
    list_snapshots: ListSnapshotsRequest => ListSnapshotsResponse,
    look_for: LookForRequest => LookForResponse,
    get_extents: GetExtentsRequest => Self::GetExtentsStream,
    verify_volume: VerifyVolumeRequest => Self::VerifyVolumeStream,
    digest_snapshot: DigestSnapshotRequest => Self::DigestSnapshotStream,
}
