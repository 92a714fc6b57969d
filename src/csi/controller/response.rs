//! Objects of the catalogue as messages of the interface.

use crate::catalog::{GroupSnapshot, GroupStatus, NodeName, Snapshot, SnapshotStatus, Source, Volume};
use crate::csi::TOPOLOGY_KEY;
use crate::rpc::csi;
use crate::rpc::csi::volume_content_source::{SnapshotSource, Type, VolumeSource};
use std::collections::HashMap;

/// Bytes as the interface counts them.
pub fn bytes(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// The place that is a node.
pub fn topology(node: &NodeName) -> csi::Topology {
    csi::Topology { segments: HashMap::from([(TOPOLOGY_KEY.to_owned(), node.0.clone())]) }
}

/// A volume that is reachable from each of `nodes`, and from everywhere if there are none.
pub fn volume(volume: &Volume, nodes: &[NodeName]) -> csi::Volume {
    let source = volume.request.source.map(|source| match source {
        Source::Snapshot(id) => Type::Snapshot(SnapshotSource { snapshot_id: id.to_string() }),
        Source::Volume(id) => Type::Volume(VolumeSource { volume_id: id.to_string() }),
    });
    csi::Volume {
        capacity_bytes: bytes(volume.status.size.bytes()),
        volume_id: volume.id.to_string(),
        // Nothing that a node needs: it asks its replica.
        volume_context: HashMap::new(),
        content_source: source.map(|source| csi::VolumeContentSource { r#type: Some(source) }),
        accessible_topology: nodes.iter().map(topology).collect(),
    }
}

/// Where a volume is published.
pub fn published(volume: &Volume) -> Vec<String> {
    volume.spec.publications.keys().map(|node| node.0.clone()).collect()
}

/// A snapshot; `None` while nobody may know of it.
pub fn snapshot(snapshot: &Snapshot) -> Option<csi::Snapshot> {
    let SnapshotStatus::Ready { size, created_ms } = snapshot.status else { return None };
    if !snapshot.is_visible() {
        return None;
    }
    Some(csi::Snapshot {
        size_bytes: bytes(size.bytes()),
        snapshot_id: snapshot.id.to_string(),
        source_volume_id: snapshot.volume.to_string(),
        creation_time: Some(timestamp(created_ms)),
        ready_to_use: true,
        group_snapshot_id: snapshot.group.map(|group| group.to_string()).unwrap_or_default(),
        // Optional: where it can be restored is asked and answered when that is done. csi-sanity v5.6.0 compares Go structures with their internals here,
        // so that every driver that fills this in fails.
        accessible_topology: Vec::new(),
    })
}

/// A group with its snapshots; `None` while nobody may know of it.
pub fn group(group: &GroupSnapshot, members: &[Snapshot]) -> Option<csi::VolumeGroupSnapshot> {
    let GroupStatus::Ready { created_ms } = group.status else { return None };
    if group.deleted {
        return None;
    }
    Some(csi::VolumeGroupSnapshot {
        group_snapshot_id: group.id.to_string(),
        snapshots: members.iter().filter_map(snapshot).collect(),
        creation_time: Some(timestamp(created_ms)),
        ready_to_use: true,
    })
}

/// From milliseconds since 1970.
fn timestamp(ms: u64) -> prost_types::Timestamp {
    let nanos = i32::try_from(ms % 1000).unwrap_or(0) * 1_000_000;
    prost_types::Timestamp { seconds: bytes(ms / 1000), nanos }
}
