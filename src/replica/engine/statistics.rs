//! What the engine counts, readable by anybody at any time without asking it.
//!
//! Invariants: written by the engine's thread only, with relaxed atomics; a reader may see a request in one counter and not
//! yet in another, never a wrong sum later.

use crate::protocol::Request;
use crate::volume::VolumeId;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Latency buckets: bucket n counts requests below 2^n microseconds, the last one all others. 2^26 us are 67 s.
pub const BUCKETS: usize = 28;

/// A request that takes longer than this counts as a stall.
pub const STALL: Duration = Duration::from_secs(1);

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards and write-zeroes.
    Discard,
}

impl Direction {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Discard];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
        }
    }

    /// Of a device's request; `None` for an operator's.
    pub(super) fn of(request: Request) -> Option<Self> {
        match request {
            Request::Read(_) => Some(Self::Read),
            Request::Write(_) => Some(Self::Write),
            Request::Flush => Some(Self::Flush),
            Request::Discard(_) | Request::WriteZeroes(_) => Some(Self::Discard),
            Request::Seal(_) => None,
        }
    }
}

/// Requests of one direction.
#[derive(Debug, Default)]
pub struct DirectionStatistics {
    /// Answered requests.
    pub requests: AtomicU64,
    /// Of these, answered with an error.
    pub errors: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Their latencies in microseconds, summed.
    pub microseconds: AtomicU64,
    /// Requests by latency, see [`BUCKETS`].
    pub latency: [AtomicU64; BUCKETS],
}

/// One volume.
#[derive(Debug, Default)]
pub struct VolumeStatistics {
    directions: [DirectionStatistics; 4],
    /// Requests that are not answered yet.
    pub in_flight: AtomicU64,
    /// Answered requests that took longer than [`STALL`].
    pub stalls: AtomicU64,
    /// Requests that are not answered yet and older than [`STALL`].
    pub stalled: AtomicU64,
    /// Requests that wait for space in the pool.
    pub waiting_for_space: AtomicU64,
    /// Requests that a killed engine left and this one finished.
    pub recovered: AtomicU64,
    /// The disk failed a request since the volume was attached.
    pub disk_failed: AtomicBool,
    /// A read found damaged blocks since the volume was attached.
    pub corrupt: AtomicBool,
    /// A request was refused since the volume was attached, because another copy is its primary.
    pub fenced: AtomicBool,
}

impl VolumeStatistics {
    /// The counters of one direction.
    pub fn direction(&self, direction: Direction) -> &DirectionStatistics {
        &self.directions[direction as usize]
    }

    pub(super) fn answered(&self, direction: Direction, bytes: u64, took: Duration, failed: bool) {
        let counters = self.direction(direction);
        counters.requests.fetch_add(1, Relaxed);
        counters.errors.fetch_add(u64::from(failed), Relaxed);
        counters.bytes.fetch_add(bytes, Relaxed);
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        counters.microseconds.fetch_add(microseconds, Relaxed);
        counters.latency[bucket(microseconds)].fetch_add(1, Relaxed);
        if took > STALL {
            self.stalls.fetch_add(1, Relaxed);
        }
    }
}

fn bucket(microseconds: u64) -> usize {
    ((u64::BITS - microseconds.leading_zeros()) as usize).min(BUCKETS - 1)
}

/// The engine and its volumes.
#[derive(Debug, Default)]
pub struct Statistics {
    volumes: Mutex<BTreeMap<VolumeId, Arc<VolumeStatistics>>>,
    /// Turns of the engine's loop.
    pub turns: AtomicU64,
    /// Of these, turns that slept.
    pub sleeps: AtomicU64,
    /// Requests read from devices.
    pub reads: AtomicU64,
    /// Looks at a device that found nothing.
    pub empty_reads: AtomicU64,
    /// Replies written to devices.
    pub replies: AtomicU64,
    /// Physical operations.
    pub disk_operations: AtomicU64,
    /// Bytes that applications wrote.
    pub device_bytes_written: AtomicU64,
    /// Bytes written to disks for any reason.
    pub disk_bytes_written: AtomicU64,
    /// Requests that a killed engine left and this one finished.
    pub recovered: AtomicU64,
}

impl Statistics {
    /// The volumes that are attached.
    pub fn volumes(&self) -> Vec<(VolumeId, Arc<VolumeStatistics>)> {
        self.lock().iter().map(|(id, volume)| (*id, volume.clone())).collect()
    }

    /// One volume, while it is attached.
    pub fn volume(&self, volume: VolumeId) -> Option<Arc<VolumeStatistics>> {
        self.lock().get(&volume).cloned()
    }

    pub(super) fn add(&self, volume: VolumeId) -> Arc<VolumeStatistics> {
        self.lock().entry(volume).or_default().clone()
    }

    pub(super) fn remove(&self, volume: VolumeId) {
        self.lock().remove(&volume);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Arc<VolumeStatistics>>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_powers_of_two() {
        assert_eq!([0, 1, 2, 3, 4, 1000].map(bucket), [0, 1, 2, 2, 3, 10]);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        let statistics = VolumeStatistics::default();
        statistics.answered(Direction::Write, 4096, Duration::from_micros(90), false);
        statistics.answered(Direction::Write, 4096, Duration::from_secs(2), true);
        let writes = statistics.direction(Direction::Write);
        assert_eq!((writes.requests.load(Relaxed), writes.errors.load(Relaxed)), (2, 1));
        assert_eq!((writes.latency[7].load(Relaxed), statistics.stalls.load(Relaxed)), (1, 1));
    }
}
