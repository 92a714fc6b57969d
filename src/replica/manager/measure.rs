//! The figures that `/metrics` exports, taken at each scrape.

use super::{HealthEntry, Manager, MirrorView, VolumeView};
use crate::metrics;
use crate::protocol::Role;
use crate::replica::engine::{BUCKETS, CopyState, Direction, DirectionStatistics, VolumeStatistics};
use std::sync::atomic::Ordering::Relaxed;

/// Microseconds in a second.
const MICROSECONDS: f64 = 1e6;

impl Manager {
    /// Everything, now.
    pub async fn measure(&self) -> metrics::Snapshot {
        let statistics = self.engine().statistics();
        let mut volumes = Vec::new();
        for view in self.volumes().await {
            let counters = statistics.volume(view.volume);
            volumes.push(volume(view, counters.as_deref()));
        }
        let pools = self.list_pools().await.into_iter().map(|p| metrics::Pool {
            pool: p.name.to_string(),
            capacity_bytes: p.capacity,
            promised_bytes: p.promised,
            used_bytes: p.used,
            free_bytes: p.free,
        });
        metrics::Snapshot {
            volumes,
            pools: pools.collect(),
            replayed_requests: statistics.recovered.load(Relaxed),
            device_written_bytes: statistics.device_bytes_written.load(Relaxed),
            disk_written_bytes: statistics.disk_bytes_written.load(Relaxed),
        }
    }
}

fn volume(view: VolumeView, counters: Option<&VolumeStatistics>) -> metrics::Volume {
    let (copied_bytes, to_copy_bytes) = view.copy.map_or((0, 0), |c| (c.copied, c.total));
    metrics::Volume {
        volume: view.volume.to_string(),
        pool: view.pool,
        directions: counters.map_or_else(Vec::new, |c| Direction::ALL.map(|d| direction(d, c.direction(d))).into()),
        queue_depth: counters.map_or(0, |c| c.in_flight.load(Relaxed)),
        stalls: counters.map_or(0, |c| c.stalls.load(Relaxed)),
        recoveries: counters.map_or(0, |c| c.recovered.load(Relaxed)),
        size_bytes: view.size,
        allocated_bytes: view.allocated,
        layers: u64::from(view.layers),
        merging_layers: view.merging_layers,
        unchecked_bytes: view.unchecked,
        copied_bytes,
        to_copy_bytes,
        mirror: view.mirror.map(|mirror| of_mirror(&mirror, view.size)),
        problems: view.health.into_iter().map(|HealthEntry { reason, .. }| reason.to_owned()).collect(),
    }
}

fn of_mirror(mirror: &MirrorView, size: u64) -> metrics::Mirror {
    let role = match mirror.role {
        Role::Primary(_) => "primary",
        Role::Secondary => "secondary",
        Role::Candidate => "candidate",
        Role::Outdated => "outdated",
    };
    let peers = mirror.copies.iter().filter(|copy| !copy.here).map(|copy| metrics::Peer {
        name: copy.name(),
        connected: copy.connected,
        out_of_sync_bytes: match copy.state {
            CopyState::UpToDate => 0,
            CopyState::SyncTarget { left_bytes, .. } => left_bytes,
            CopyState::Outdated => size,
        },
    });
    metrics::Mirror { role, serves: mirror.serves, hot_extents: mirror.hot_extents, peers: peers.collect() }
}

fn direction(direction: Direction, counters: &DirectionStatistics) -> metrics::Direction {
    // Counters of microseconds and requests stay far below 2^53, where f64 is exact.
    #[allow(clippy::cast_precision_loss)]
    let bound =
        |bucket: usize| if bucket + 1 == BUCKETS { f64::INFINITY } else { (1_u64 << bucket) as f64 / MICROSECONDS };
    #[allow(clippy::cast_precision_loss)]
    let sum_seconds = counters.microseconds.load(Relaxed) as f64 / MICROSECONDS;
    let buckets = counters.latency.iter().enumerate().map(|(n, count)| (bound(n), count.load(Relaxed))).collect();
    metrics::Direction {
        direction: direction.name(),
        bytes: counters.bytes.load(Relaxed),
        latency: metrics::Histogram { buckets, sum_seconds },
    }
}
