//! NodeExpandVolume: the filesystem (or the device) follows a volume that the controller has grown.

use super::errors::ExpandError;
use super::replica::Facts;
use super::stats::place_of;
use super::{Inner, required};
use crate::catalog::Access;
use crate::csi::capability::Capability;
use crate::csi::control::ControlError;
use crate::mount::{GrowError, device_size, grow_mounted, resize_read_only_twin};
use crate::rpc::csi::{NodeExpandVolumeRequest, NodeExpandVolumeResponse};
use crate::volume::VolumeId;
use std::path::Path;
use std::time::{Duration, Instant};

/// The replica changes the device's size with the volume's; this is for a replica that is just being restarted.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// Grows what is at the path. What has the size already is fine.
pub fn expand(node: &Inner, request: &NodeExpandVolumeRequest) -> Result<NodeExpandVolumeResponse, ExpandError> {
    required("volume_id", &request.volume_id)?;
    required("volume_path", &request.volume_path)?;
    let (id, _operation) = node.start(&request.volume_id)?;
    let record = node.records.load(id)?.ok_or(ExpandError::NotThere)?;
    place_of(&record, &request.volume_path).ok_or(ExpandError::NotThere)?;
    if let Some(capability) = &request.volume_capability {
        let access = Capability::try_from(capability)?.access;
        if (access == Access::Block) != record.filesystem.is_none() {
            return Err(ExpandError::OtherAccess(id));
        }
    }
    let (required, limit) = match request.capacity_range {
        None => (0, u64::MAX),
        Some(range) => {
            (bytes(range.required_bytes)?, Some(bytes(range.limit_bytes)?).filter(|b| *b > 0).unwrap_or(u64::MAX))
        }
    };
    let facts = volume_of_size(node, id, required)?;
    if facts.mirrored && facts.size < required {
        // The controller has grown it, and this node has not heard of that yet.
        return Err(ExpandError::DeviceBehind { device: node.replica.attach(id)?, found: facts.size, size: required });
    }
    if facts.size < required || facts.size > limit {
        return Err(ExpandError::OutOfRange { volume: id, size: facts.size, required, limit });
    }
    let device = node.replica.attach(id)?;
    wait_for_size(&device, facts.size)?;
    match record.filesystem {
        Some(filesystem) => {
            grow_mounted(filesystem, &device, &record.staging).map_err(|error| match error {
                GrowError::Capability => ExpandError::Mounted { volume: id },
                source => ExpandError::Grow { volume: id, filesystem, source },
            })?;
        }
        None => resize_read_only_twin(&device).map_err(|source| ExpandError::Device { device, source })?,
    }
    node.steps.done()?;
    Ok(NodeExpandVolumeResponse { capacity_bytes: facts.size.try_into().unwrap_or(i64::MAX) })
}

/// The volume; a mirrored one when it has the size, if that is soon.
fn volume_of_size(node: &Inner, id: VolumeId, required: u64) -> Result<Facts, ControlError> {
    let start = Instant::now();
    loop {
        let facts = node.replica.volume(id)?;
        if !facts.mirrored || facts.size >= required || start.elapsed() > DEVICE_LIMIT {
            return Ok(facts);
        }
        std::thread::sleep(POLL);
    }
}

fn bytes(value: i64) -> Result<u64, ExpandError> {
    u64::try_from(value).map_err(|_| ExpandError::Negative(value))
}

fn wait_for_size(device: &Path, size: u64) -> Result<(), ExpandError> {
    let start = Instant::now();
    loop {
        let found = device_size(device).map_err(|source| ExpandError::Device { device: device.into(), source })?;
        if found >= size {
            return Ok(());
        }
        if start.elapsed() > DEVICE_LIMIT {
            return Err(ExpandError::DeviceBehind { device: device.into(), found, size });
        }
        std::thread::sleep(POLL);
    }
}
