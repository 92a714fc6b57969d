//! One installation: a directory, a replica in memory, and drivers that are started over it again and again.

use crate::fake::Fake;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem::catalog::{Catalog, NodeName, OpenError};
use tandem::csi::TOPOLOGY_KEY;
use tandem::csi::control::Control;
use tandem::csi::controller::{Controller, ControllerService};
use tandem::csi::nodes::{Node, Nodes};
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use tandem::rpc::csi::*;
use tonic::{Code, Request, Response, Status};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const NODE: &str = "node-1";
/// Volumes that may be published to the node.
pub const LIMIT: u32 = 3;

pub struct Site {
    pub fake: Fake,
    pub socket: PathBuf,
    pub directory: tempfile::TempDir,
}

impl Site {
    /// A pool "default" of 100 GiB. Must be called inside a runtime that outlives it.
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("tandem-csi").tempdir().expect("a directory");
        let (fake, socket) = Fake::start(directory.path(), 100 * GIB);
        Self { fake, socket, directory }
    }

    /// The driver as after a start; waits for the end of an earlier one.
    pub fn driver(&self) -> Driver {
        let deadline = Instant::now() + Duration::from_secs(300);
        let catalog = loop {
            match Catalog::open(&self.directory.path().join("catalog.redb")) {
                Err(OpenError::InUse { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => break other.expect("the catalogue"),
            }
        };
        let control = Control::new(&self.socket);
        let node = NodeName(NODE.into());
        let controller = Arc::new(Controller::new(catalog.clone(), Nodes::Alone(Node { name: node, control }), LIMIT));
        Driver { service: Arc::new(ControllerService(controller.clone())), controller, catalog }
    }
}

#[derive(Clone)]
pub struct Driver {
    pub controller: Arc<Controller>,
    pub service: Arc<ControllerService>,
    pub catalog: Catalog,
}

impl Driver {
    pub async fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let answer = self.service.create_volume(Request::new(request)).await?;
        Ok(answer.into_inner().volume.expect("a volume"))
    }

    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest { volume_id: id.into(), ..Default::default() };
        self.service.delete_volume(Request::new(request)).await.map(drop)
    }

    pub async fn list(&self, max_entries: i32, token: &str) -> Result<(Vec<String>, String), Status> {
        let request = ListVolumesRequest { max_entries, starting_token: token.into() };
        let answer = self.service.list_volumes(Request::new(request)).await?.into_inner();
        let ids = answer.entries.into_iter().filter_map(|entry| Some(entry.volume?.volume_id));
        Ok((ids.collect(), answer.next_token))
    }

    pub async fn volumes(&self) -> Vec<String> {
        self.list(0, "").await.expect("a list").0
    }

    pub async fn snapshot(&self, name: &str, volume: &str) -> Result<Snapshot, Status> {
        let request =
            CreateSnapshotRequest { name: name.into(), source_volume_id: volume.into(), ..Default::default() };
        let answer = self.service.create_snapshot(Request::new(request)).await?;
        Ok(answer.into_inner().snapshot.expect("a snapshot"))
    }

    pub async fn delete_snapshot(&self, id: &str) -> Result<(), Status> {
        let request = DeleteSnapshotRequest { snapshot_id: id.into(), ..Default::default() };
        self.service.delete_snapshot(Request::new(request)).await.map(drop)
    }

    pub async fn snapshots(&self) -> Vec<Snapshot> {
        let answer = self.service.list_snapshots(Request::new(ListSnapshotsRequest::default())).await;
        let entries = answer.expect("a list").into_inner().entries;
        entries.into_iter().filter_map(|entry| entry.snapshot).collect()
    }

    pub async fn publish(&self, volume: &str, node: &str, mode: Mode, readonly: bool) -> Result<(), Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: volume.into(),
            node_id: node.into(),
            volume_capability: Some(mount(mode, "")),
            readonly,
            ..Default::default()
        };
        self.service.controller_publish_volume(Request::new(request)).await.map(drop)
    }

    pub async fn unpublish(&self, volume: &str, node: &str) -> Result<(), Status> {
        let request =
            ControllerUnpublishVolumeRequest { volume_id: volume.into(), node_id: node.into(), ..Default::default() };
        self.service.controller_unpublish_volume(Request::new(request)).await.map(drop)
    }

    pub async fn expand(&self, volume: &str, required: u64, limit: u64) -> Result<u64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: volume.into(),
            capacity_range: Some(range(required, limit)),
            ..Default::default()
        };
        let answer = self.service.controller_expand_volume(Request::new(request)).await?.into_inner();
        assert!(answer.node_expansion_required);
        Ok(answer.capacity_bytes.try_into().expect("not negative"))
    }

    pub async fn modify(&self, volume: &str, parameters: &[(&str, &str)]) -> Result<(), Status> {
        let request = ControllerModifyVolumeRequest {
            volume_id: volume.into(),
            mutable_parameters: map(parameters),
            ..Default::default()
        };
        self.service.controller_modify_volume(Request::new(request)).await.map(drop)
    }
}

pub fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub fn range(required: u64, limit: u64) -> CapacityRange {
    let bytes = |bytes: u64| i64::try_from(bytes).expect("fits");
    CapacityRange { required_bytes: bytes(required), limit_bytes: bytes(limit) }
}

pub fn mount(mode: Mode, fs_type: &str) -> VolumeCapability {
    let mount = MountVolume { fs_type: fs_type.into(), ..Default::default() };
    let access_mode = Some(AccessMode { mode: mode.into() });
    VolumeCapability { access_type: Some(AccessType::Mount(mount)), access_mode }
}

pub fn block(mode: Mode) -> VolumeCapability {
    let access_mode = Some(AccessMode { mode: mode.into() });
    VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), access_mode }
}

/// A plain volume of exactly `bytes`.
pub fn wanted(name: &str, bytes: u64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(range(bytes, bytes)),
        volume_capabilities: vec![mount(Mode::SingleNodeWriter, "")],
        ..Default::default()
    }
}

pub fn from_snapshot(name: &str, id: &str) -> CreateVolumeRequest {
    let source = volume_content_source::SnapshotSource { snapshot_id: id.into() };
    from(name, volume_content_source::Type::Snapshot(source))
}

pub fn from_volume(name: &str, id: &str) -> CreateVolumeRequest {
    let source = volume_content_source::VolumeSource { volume_id: id.into() };
    from(name, volume_content_source::Type::Volume(source))
}

fn from(name: &str, source: volume_content_source::Type) -> CreateVolumeRequest {
    let volume_content_source = Some(VolumeContentSource { r#type: Some(source) });
    CreateVolumeRequest { volume_content_source, capacity_range: None, ..wanted(name, 0) }
}

pub fn place(node: &str) -> Topology {
    Topology { segments: map(&[(TOPOLOGY_KEY, node)]) }
}

/// The code of a refusal; its message must say something and its details must be empty.
#[track_caller]
pub fn refused<T>(result: Result<T, Status>) -> Code {
    let status = result.err().expect("a refusal");
    assert!(status.message().len() > 10, "{status:?}");
    assert!(status.details().is_empty(), "{status:?}");
    status.code()
}

#[track_caller]
pub fn accepted<T>(result: Result<Response<T>, Status>) -> T {
    result.expect("an answer").into_inner()
}
