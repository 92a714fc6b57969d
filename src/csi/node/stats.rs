//! NodeGetVolumeStats: what a volume has and uses at one of its paths.

use super::errors::StatsError;
use super::path::resolve;
use super::records::Staged;
use super::{Inner, required};
use crate::mount::{MountTable, device_size, usage};
use crate::rpc::csi::volume_usage::Unit;
use crate::rpc::csi::{NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, VolumeUsage};
use crate::volume::VolumeId;
use std::path::PathBuf;

/// Bytes and inodes of a filesystem, bytes of a device. Asks the kernel only: it works while the replica restarts.
pub fn stats(node: &Inner, request: &NodeGetVolumeStatsRequest) -> Result<NodeGetVolumeStatsResponse, StatsError> {
    required("volume_id", &request.volume_id)?;
    required("volume_path", &request.volume_path)?;
    let id: VolumeId = request.volume_id.parse().map_err(|_| StatsError::UnknownVolume)?;
    let record = node.records.load(id)?.ok_or(StatsError::UnknownVolume)?;
    let path = place_of(&record, &request.volume_path).ok_or(StatsError::NotThere(id))?;
    let failed = |source| StatsError::Failed { volume: id, source };
    let usage = if record.filesystem.is_none() {
        // The staging directory of a block volume holds nothing; the size is the same at every target.
        let target = Some(path).filter(|path| *path != record.staging).ok_or(StatsError::NotThere(id))?;
        let total = signed(device_size(&target).map_err(failed)?);
        vec![VolumeUsage { total, unit: Unit::Bytes.into(), ..Default::default() }]
    } else {
        let usage = usage(&path).map_err(failed)?;
        let bytes = VolumeUsage {
            available: signed(usage.available_bytes),
            total: signed(usage.total_bytes),
            used: signed(usage.used_bytes),
            unit: Unit::Bytes.into(),
        };
        let inodes = VolumeUsage {
            available: signed(usage.free_inodes),
            total: signed(usage.total_inodes),
            used: signed(usage.used_inodes),
            unit: Unit::Inodes.into(),
        };
        vec![bytes, inodes]
    };
    Ok(NodeGetVolumeStatsResponse { usage })
}

/// The path of a request, if the volume is really there.
pub fn place_of(record: &Staged, path: &str) -> Option<PathBuf> {
    let path = resolve(path).ok()?;
    let is_staging = path == record.staging;
    if !is_staging && !record.targets.contains_key(&path) {
        return None;
    }
    let is_mounted = MountTable::read().is_ok_and(|table| table.at(&path).is_some());
    (is_mounted || (is_staging && record.filesystem.is_none())).then_some(path)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
