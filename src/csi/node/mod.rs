//! The Node service: makes a volume's device usable at the paths that the caller names, and takes it away again.
//!
//! Invariants:
//! * A record says what is to be before it is done (see [`records`]); whether it *is* so is always read from the kernel.
//!   A call that is repeated after a kill at any step therefore goes on where the other one ended.
//! * One operation per volume at a time; another call is told so (ABORTED). One that takes the volume away does not wait for ever
//!   for one that hangs on its device: see [`release::start_instead`].
//! * A call is answered within [`LIMIT`] even if a device hangs; the work goes on and the next call finds it.
//! * Secrets and mount flags are never logged.

mod codes;
mod errors;
mod expand;
mod health;
mod path;
mod publish;
mod records;
mod release;
mod replica;
mod stage;
mod stats;
mod steps;

pub use errors::{
    ExpandError, HealthError, PublishError, RequestError, StageError, StatsError, UnpublishError, UnstageError,
};
pub use path::PathError;
pub use records::RecordError;
pub use steps::{Interrupted, Steps};

use super::control::Control;
use super::operations::{Operation, Operations, Subject};
use crate::catalog::{AccessMode, FsType, NodeName};
use crate::mount::Filesystem;
use crate::rpc::csi::node_server::Node;
use crate::rpc::csi::node_service_capability::rpc::Type as Rpc;
use crate::rpc::csi::{self, node_service_capability};
use crate::volume::VolumeId;
use records::Records;
use replica::Replica;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tonic::{Request, Response, Status, async_trait};

/// The one topology key: its value is the node's name.
pub const TOPOLOGY_KEY: &str = "topology.tandem.storage/node";

/// Longest wait for an answer: kubelet gives up after 2 minutes and must hear why before.
const LIMIT: Duration = Duration::from_secs(90);

/// What a node service needs to know.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The node.
    pub name: NodeName,
    /// Volumes that may be published on it; 0 means that nobody counts.
    pub max_volumes: u32,
    /// Where the records of staged volumes are kept; made if it is not there.
    pub records: PathBuf,
}

/// The node service. Clones are the same service.
#[derive(Clone, Debug)]
pub struct NodeService(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: NodeConfig,
    replica: Replica,
    records: Records,
    operations: Operations,
    steps: Steps,
}

impl NodeService {
    /// A service that has devices made by the replica behind `control`. Must be called inside a tokio runtime.
    pub fn new(config: NodeConfig, control: Control) -> Result<Self, RecordError> {
        Self::interruptible(config, control, Steps::default())
    }

    /// As [`NodeService::new`]; calls end where `steps` says, as if the process had been killed there.
    pub fn interruptible(config: NodeConfig, control: Control, steps: Steps) -> Result<Self, RecordError> {
        let records = Records::open(&config.records)?;
        let replica = Replica::new(control, Handle::current());
        Ok(Self(Arc::new(Inner { config, replica, records, operations: Operations::default(), steps })))
    }

    /// Does the blocking work of one call on a thread of its own, to the end, whether or not the caller still waits.
    async fn run<T, E>(
        &self,
        rpc: &'static str,
        volume: &str,
        work: impl FnOnce(&Inner) -> Result<T, E> + Send + 'static,
    ) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        E: std::fmt::Display + Send + 'static,
        Status: From<E>,
    {
        // An id that is not ours may be anything: it is not repeated in the log.
        let volume = volume.parse::<VolumeId>().map_or_else(|_| "unknown".to_owned(), |id| id.to_string());
        let inner = self.0.clone();
        let task = tokio::task::spawn_blocking(move || work(&inner));
        match tokio::time::timeout(LIMIT, task).await {
            Ok(Ok(Ok(answer))) => Ok(Response::new(answer)),
            Ok(Ok(Err(error))) => {
                tracing::warn!(rpc, volume, %error, "call failed");
                Err(error.into())
            }
            Ok(Err(panicked)) => {
                tracing::error!(rpc, volume, error = %panicked, "call ended by a bug");
                Err(Status::internal(format!("{rpc} of volume {volume} ended by a bug of the driver: see its log")))
            }
            Err(_) => {
                let seconds = LIMIT.as_secs();
                tracing::warn!(rpc, volume, seconds, "call goes on, its caller is told to ask again");
                Err(Status::aborted(format!("{rpc} of volume {volume} is not done after {seconds} s and goes on")))
            }
        }
    }
}

impl Inner {
    /// The id of a volume that may exist, and the right to work on it.
    fn start(&self, volume: &str) -> Result<(VolumeId, Operation), RequestError> {
        let id: VolumeId = volume.parse().map_err(|_| RequestError::UnknownVolume)?;
        Ok((id, self.operations.start(Subject::Volume(id))?))
    }

    /// Marks the formatting of a volume as begun; see [`crate::mount::prepare`].
    fn format_mark(&self, volume: VolumeId) -> PathBuf {
        self.records.directory().join(format!("{volume}.formatting"))
    }
}

/// A field that must not be empty.
fn required(name: &'static str, value: &str) -> Result<(), RequestError> {
    if value.is_empty() { Err(RequestError::Missing(name)) } else { Ok(()) }
}

fn filesystem(fs_type: FsType) -> Filesystem {
    match fs_type {
        FsType::Ext4 => Filesystem::Ext4,
        FsType::Xfs => Filesystem::Xfs,
    }
}

/// Whether volumes of this mode are published for reading, whatever the call says.
fn only_reads(mode: AccessMode) -> bool {
    match mode {
        AccessMode::SingleNodeReader | AccessMode::MultiNodeReader => true,
        AccessMode::SingleNodeWriter | AccessMode::SingleNodeSingleWriter | AccessMode::SingleNodeMultiWriter => false,
    }
}

/// Whether `target` is a node of the same block device as `device`.
fn is_node_of(target: &Path, device: &Path) -> bool {
    let number = |path| crate::mount::device_number(path).ok();
    number(device).is_some_and(|wanted| number(target) == Some(wanted))
}

#[async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.run("NodeStageVolume", &volume, move |node| stage::stage(node, &request)).await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.run("NodeUnstageVolume", &volume, move |node| stage::unstage(node, &request)).await
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.run("NodePublishVolume", &volume, move |node| publish::publish(node, &request)).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.run("NodeUnpublishVolume", &volume, move |node| publish::unpublish(node, &request)).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.run("NodeGetVolumeStats", &volume, move |node| stats::stats(node, &request)).await
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.run("NodeExpandVolume", &volume, move |node| expand::expand(node, &request)).await
    }

    async fn node_get_volume_health(
        &self,
        request: Request<csi::NodeGetVolumeHealthRequest>,
    ) -> Result<Response<csi::NodeGetVolumeHealthResponse>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.clone();
        self.run("NodeGetVolumeHealth", &volume, move |node| health::volume(node, &request)).await
    }

    async fn node_get_storage_health(
        &self,
        _: Request<csi::NodeGetStorageHealthRequest>,
    ) -> Result<Response<csi::NodeGetStorageHealthResponse>, Status> {
        self.run("NodeGetStorageHealth", "", |node| Ok::<_, RequestError>(health::storage(node))).await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let capability = |rpc: Rpc| csi::NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(node_service_capability::Rpc { r#type: rpc.into() })),
        };
        let all = [
            Rpc::StageUnstageVolume,
            Rpc::GetVolumeStats,
            Rpc::ExpandVolume,
            Rpc::SingleNodeMultiWriter,
            Rpc::GetVolumeHealth,
            Rpc::GetStorageHealth,
        ];
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities: all.map(capability).to_vec() }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let config = &self.0.config;
        let segments = [(TOPOLOGY_KEY.to_owned(), config.name.0.clone())].into();
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: config.name.0.clone(),
            max_volumes_per_node: i64::from(config.max_volumes),
            accessible_topology: Some(csi::Topology { segments }),
        }))
    }
}
