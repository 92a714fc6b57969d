//! A snapshot as Prometheus text.

use super::{Mirror, Peer, Pool, Snapshot, Volume};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, text};
use prometheus_client::metrics::{MetricType, exemplar::Exemplar};
use prometheus_client::registry::Registry;
use std::fmt;

type Label<'a> = (&'static str, &'a str);
/// No metric has examples.
const NO_EXAMPLE: Option<&Exemplar<Vec<(String, String)>, u64>> = None;

/// The text of one scrape.
pub fn render(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(snapshot));
    let mut answer = String::new();
    text::encode(&mut answer, &registry)?;
    Ok(answer)
}

/// One number of each thing: name, help, how to read it.
type Numbers<T> = &'static [(&'static str, &'static str, fn(&T) -> u64)];

/// The names get `_total` from the encoder.
const VOLUME_COUNTERS: Numbers<Volume> = &[
    ("tandem_stalls", "Requests that stalled", |v| v.stalls),
    ("tandem_device_recoveries", "Times a new engine took the device over", |v| v.recoveries),
];
const VOLUME_GAUGES: Numbers<Volume> = &[
    ("tandem_queue_depth", "Requests in the engine", |v| v.queue_depth),
    ("tandem_volume_size_bytes", "Size of the volume", |v| v.size_bytes),
    ("tandem_volume_allocated_bytes", "Bytes that the live layer occupies", |v| v.allocated_bytes),
    ("tandem_volume_layers", "Layers of the volume", |v| v.layers),
    ("tandem_volume_merging_layers", "Layers that wait for a merge", |v| v.merging_layers),
    ("tandem_volume_unchecked_bytes", "Bytes of sealed layers that lack checksums", |v| v.unchecked_bytes),
    ("tandem_volume_copied_bytes", "Background copy: bytes done", |v| v.copied_bytes),
    ("tandem_volume_to_copy_bytes", "Background copy: bytes in all", |v| v.to_copy_bytes),
    ("tandem_volume_problems", "Things that are wrong with the volume", |v| v.problems.len() as u64),
];
const MIRROR_GAUGES: Numbers<Mirror> = &[
    ("tandem_mirror_serving", "1 where requests of the volume are executed", |m| u64::from(m.serves)),
    ("tandem_mirror_hot_extents", "Extents of 4 MiB that may differ after a crash", |m| m.hot_extents),
];
const PEER_GAUGES: Numbers<Peer> = &[
    ("tandem_mirror_connected", "1 while there is a connection to the other copy", |p| u64::from(p.connected)),
    (
        "tandem_mirror_out_of_sync_bytes",
        "Most that the other copy lacks; the whole volume while nothing is copied to it",
        |p| p.out_of_sync_bytes,
    ),
];
const NODE_COUNTERS: Numbers<Snapshot> = &[
    ("tandem_device_written_bytes", "Bytes that applications wrote", |s| s.device_written_bytes),
    ("tandem_disk_written_bytes", "Bytes that the engine wrote to disks", |s| s.disk_written_bytes),
];
const POOL_GAUGES: Numbers<Pool> = &[
    ("tandem_pool_capacity_bytes", "Bytes that the pool may promise", |p| p.capacity_bytes),
    ("tandem_pool_promised_bytes", "Bytes that volumes and snapshots may grow to", |p| p.promised_bytes),
    ("tandem_pool_used_bytes", "Bytes that volumes and snapshots occupy", |p| p.used_bytes),
    ("tandem_pool_free_bytes", "Bytes free in the filesystem of the pool", |p| p.free_bytes),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        numbers(&mut encoder, MetricType::Counter, VOLUME_COUNTERS, &self.volumes, volume_labels)?;
        numbers(&mut encoder, MetricType::Gauge, VOLUME_GAUGES, &self.volumes, volume_labels)?;
        for (name, help, read) in NODE_COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            metric.encode_counter(&read(self), NO_EXAMPLE)?;
        }
        numbers(&mut encoder, MetricType::Gauge, POOL_GAUGES, &self.pools, pool_labels)?;
        self.amplification(&mut encoder)?;
        self.directions(&mut encoder)?;
        self.problems(&mut encoder)?;
        self.mirrors(&mut encoder)?;
        let help = "Requests of a dead engine that this one executed or answered again";
        let mut metric = encoder.encode_descriptor("tandem_replayed_requests", help, None, MetricType::Counter)?;
        metric.encode_counter(&self.replayed_requests, NO_EXAMPLE)
    }
}

fn volume_labels(volume: &Volume) -> Vec<Label<'_>> {
    vec![("volume", &volume.volume), ("pool", &volume.pool)]
}

fn pool_labels(pool: &Pool) -> Vec<Label<'_>> {
    vec![("pool", &pool.pool)]
}

fn numbers<T>(
    encoder: &mut DescriptorEncoder<'_>,
    kind: MetricType,
    numbers: Numbers<T>,
    things: &[T],
    labels: fn(&T) -> Vec<Label<'_>>,
) -> fmt::Result {
    for (name, help, read) in numbers {
        let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
        for thing in things {
            labeled(&mut metric, &labels(thing), |m| match kind {
                MetricType::Counter => m.encode_counter(&read(thing), NO_EXAMPLE),
                _ => m.encode_gauge(&read(thing)),
            })?;
        }
    }
    Ok(())
}

fn labeled(
    metric: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    value: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    value(&mut metric.encode_family(labels)?)
}

impl Snapshot {
    /// Bytes written per byte. Absent until an application has written something.
    fn amplification(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Bytes written to the disk per byte that applications wrote";
        if self.device_written_bytes == 0 {
            return Ok(());
        }
        let mut metric =
            encoder.encode_descriptor("tandem_write_amplification_ratio", help, None, MetricType::Gauge)?;
        metric.encode_gauge(&(self.disk_written_bytes as f64 / self.device_written_bytes as f64))
    }

    fn directions(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let each = || {
            self.volumes.iter().flat_map(|v| {
                v.directions.iter().map(move |d| ([volume_labels(v), vec![("direction", d.direction)]].concat(), d))
            })
        };
        let help = "Bytes that requests asked for";
        let mut metric = encoder.encode_descriptor("tandem_request_bytes", help, None, MetricType::Counter)?;
        for (labels, direction) in each() {
            labeled(&mut metric, &labels, |m| m.encode_counter(&direction.bytes, NO_EXAMPLE))?;
        }
        let help = "Time from the arrival of a request to its reply";
        let mut metric =
            encoder.encode_descriptor("tandem_request_duration_seconds", help, None, MetricType::Histogram)?;
        for (labels, direction) in each() {
            let mut buckets = direction.latency.buckets.clone();
            if buckets.last().is_none_or(|(bound, _)| bound.is_finite()) {
                buckets.push((f64::INFINITY, 0));
            }
            let count = buckets.iter().map(|(_, count)| count).sum();
            let sum = direction.latency.sum_seconds;
            labeled(&mut metric, &labels, |m| m.encode_histogram::<Vec<(String, String)>>(sum, count, &buckets, None))?;
        }
        Ok(())
    }

    fn mirrors(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let all = || self.volumes.iter().filter_map(|v| v.mirror.as_ref().map(|mirror| (v, mirror)));
        let help = "1 for what this copy of a mirrored volume is";
        let mut metric = encoder.encode_descriptor("tandem_mirror_role", help, None, MetricType::Gauge)?;
        for (volume, mirror) in all() {
            let labels = [volume_labels(volume), vec![("role", mirror.role)]].concat();
            labeled(&mut metric, &labels, |m| m.encode_gauge(&1_u64))?;
        }
        for (name, help, read) in MIRROR_GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (volume, mirror) in all() {
                labeled(&mut metric, &volume_labels(volume), |m| m.encode_gauge(&read(mirror)))?;
            }
        }
        for (name, help, read) in PEER_GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (volume, peer) in all().flat_map(|(v, mirror)| mirror.peers.iter().map(move |peer| (v, peer))) {
                let labels = [volume_labels(volume), vec![("peer", peer.name.as_str())]].concat();
                labeled(&mut metric, &labels, |m| m.encode_gauge(&read(peer)))?;
            }
        }
        Ok(())
    }

    fn problems(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "1 for each thing that is wrong with a volume";
        let mut metric = encoder.encode_descriptor("tandem_volume_problem", help, None, MetricType::Gauge)?;
        for volume in &self.volumes {
            for reason in &volume.problems {
                let labels = [volume_labels(volume), vec![("reason", reason.as_str())]].concat();
                labeled(&mut metric, &labels, |m| m.encode_gauge(&1_u64))?;
            }
        }
        Ok(())
    }
}
