//! NodeGetVolumeHealth and NodeGetStorageHealth: what is wrong, in one word and one sentence each.

use super::Inner;
use super::errors::HealthError;
use super::required;
use crate::mount::MountTable;
use crate::rpc::control::health::Kind;
use crate::rpc::csi::node_get_storage_health_response::StorageBackendHealth;
use crate::rpc::csi::volume_health::VolumeHealthEntry;
use crate::rpc::csi::{
    NodeGetStorageHealthResponse, NodeGetVolumeHealthRequest, NodeGetVolumeHealthResponse, StorageHealthErrorType,
    VolumeHealth, VolumeHealthErrorType,
};
use crate::volume::VolumeId;

/// Health of a volume: what the replica knows, and whether its filesystem has stopped itself.
pub fn volume(node: &Inner, request: &NodeGetVolumeHealthRequest) -> Result<NodeGetVolumeHealthResponse, HealthError> {
    required("volume_id", &request.volume_id)?;
    let id: VolumeId = request.volume_id.parse().map_err(|_| HealthError::UnknownVolume)?;
    let facts = node.replica.volume(id)?;
    let mut health_statuses: Vec<VolumeHealthEntry> = facts.health.into_iter().map(entry).collect();
    health_statuses.extend(stopped_filesystem(node, id)?);
    let volume_health = VolumeHealth { volume_id: id.to_string(), health_statuses };
    Ok(NodeGetVolumeHealthResponse { volume_health: Some(volume_health) })
}

fn entry(health: crate::rpc::control::Health) -> VolumeHealthEntry {
    let status = match health.kind() {
        Kind::Unknown | Kind::Note => VolumeHealthErrorType::UnknownVolumeHealthType,
        Kind::Degraded => VolumeHealthErrorType::Degraded,
        Kind::Inaccessible => VolumeHealthErrorType::Inaccessible,
        Kind::DataLoss => VolumeHealthErrorType::DataLoss,
    };
    VolumeHealthEntry { status: status.into(), reason: health.reason, message: health.message }
}

/// ext4 goes read-only when it finds damage in its metadata: then the mount says `rw` and the filesystem `ro`.
fn stopped_filesystem(node: &Inner, id: VolumeId) -> Result<Option<VolumeHealthEntry>, HealthError> {
    let Some(record) = node.records.load(id)?.filter(|record| record.filesystem.is_some()) else { return Ok(None) };
    let table = MountTable::read()?;
    let stopped =
        table.at(&record.staging).is_some_and(|mount| !mount.is_read_only() && mount.filesystem_is_read_only());
    Ok(stopped.then(|| VolumeHealthEntry {
        status: VolumeHealthErrorType::Inaccessible.into(),
        reason: "FilesystemReadOnly".into(),
        message: format!(
            "the filesystem of volume {id} has found damage in its metadata and made itself read-only: end its pods, so \
             that it is checked when it is staged again"
        ),
    }))
}

/// Health of the pools of this node. A replica that does not answer is a finding, not an error.
pub fn storage(node: &Inner) -> NodeGetStorageHealthResponse {
    let finding = |status: StorageHealthErrorType, reason: &str, message: String| StorageBackendHealth {
        status: status.into(),
        reason: reason.into(),
        message,
        volume_capability: None,
    };
    let backend_health = match node.replica.pools() {
        Err(error) => vec![finding(StorageHealthErrorType::StorageUnreachable, "ReplicaSilent", error.to_string())],
        Ok(pools) => pools
            .into_iter()
            .filter(|pool| !pool.problem.is_empty())
            .map(|pool| {
                let message = format!("pool {}: {}", pool.name, pool.problem);
                finding(StorageHealthErrorType::StorageDegraded, "PoolProblem", message)
            })
            .collect(),
    };
    NodeGetStorageHealthResponse { backend_health }
}
