//! Prometheus metrics of the engine process: numbers in, text out, served over HTTP on a local address.
//!
//! Nothing is registered and nothing is global: each scrape takes one [`Snapshot`] of plain numbers and renders it, so
//! a volume that is gone is gone from the metrics too.

mod render;
mod serve;

pub use render::render;
pub use serve::serve;

/// Everything that is exported, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Attached or not.
    pub volumes: Vec<Volume>,
    /// All pools.
    pub pools: Vec<Pool>,
    /// Requests that this engine found in slots of its predecessor and executed or answered again.
    pub replayed_requests: u64,
    /// Bytes that applications wrote since the engine started.
    pub device_written_bytes: u64,
    /// Bytes that the engine wrote to disks since then: data, map logs, zeroed ahead.
    pub disk_written_bytes: u64,
}

/// One volume.
#[derive(Clone, Debug, Default)]
pub struct Volume {
    /// Its id.
    pub volume: String,
    /// Name of its pool.
    pub pool: String,
    /// Requests by kind; those that never occurred may be left out.
    pub directions: Vec<Direction>,
    /// Requests that are in the engine now.
    pub queue_depth: u64,
    /// Requests that took longer than the engine calls a stall.
    pub stalls: u64,
    /// How often a new engine took the device over from a dead one.
    pub recoveries: u64,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bytes that its live layer occupies.
    pub allocated_bytes: u64,
    /// Layers from the live one to the oldest.
    pub layers: u64,
    /// Layers that wait for a merge or are in one.
    pub merging_layers: u64,
    /// Bytes of sealed layers that still lack checksums.
    pub unchecked_bytes: u64,
    /// Background copy: done, and all of it; 0 and 0 without one.
    pub copied_bytes: u64,
    /// See `copied_bytes`.
    pub to_copy_bytes: u64,
    /// What is wrong: words such as `PoolFull`.
    pub problems: Vec<String>,
    /// Of a copy that is one of several.
    pub mirror: Option<Mirror>,
}

/// A copy of a mirrored volume.
#[derive(Clone, Debug, Default)]
pub struct Mirror {
    /// `primary`, `secondary`, `candidate` or `outdated`.
    pub role: &'static str,
    /// Requests are executed here.
    pub serves: bool,
    /// Extents where the copies may differ after a crash.
    pub hot_extents: u64,
    /// The others.
    pub peers: Vec<Peer>,
}

/// Another copy.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Its node, or its id where the node is not known.
    pub name: String,
    /// There is a connection.
    pub connected: bool,
    /// At most so much of it lacks acknowledged writes.
    pub out_of_sync_bytes: u64,
}

/// Requests of one kind on one volume.
#[derive(Clone, Debug, Default)]
pub struct Direction {
    /// `read`, `write`, `flush` or `discard`.
    pub direction: &'static str,
    /// Bytes that they asked for.
    pub bytes: u64,
    /// Time from the request's arrival to its reply.
    pub latency: Histogram,
}

/// A latency histogram.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    /// Upper bound in seconds, and how many were above the bound before and not above this one. Ascending; the last
    /// bound is infinite, or the rest is missing.
    pub buckets: Vec<(f64, u64)>,
    /// Sum of all latencies in seconds.
    pub sum_seconds: f64,
}

/// One pool.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// Its name.
    pub pool: String,
    /// Bytes that it may promise.
    pub capacity_bytes: u64,
    /// Bytes that volumes and snapshots may grow to.
    pub promised_bytes: u64,
    /// Bytes that they occupy.
    pub used_bytes: u64,
    /// Bytes free in its filesystem.
    pub free_bytes: u64,
}

#[cfg(test)]
mod tests;
