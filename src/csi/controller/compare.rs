//! `tandem verify --copies`: whether the copies of a mirrored volume are the same, while it is in use.
//!
//! ```text
//!   a snapshot for this alone ──> each holder's node: digests of 4 MiB each ──> side by side ──> what differs
//! ```
//! # Invariants
//! * All copies are read at one point of the stream of writes, since a snapshot is one.
//! * The snapshot goes on every path: here, or by the sweep, which takes it for one whose clone is not made any more.
//! * Nobody repairs anything here: which copy is right is not known from the copies.
//! * In memory are the digests of one message for each node, and [`MOST_DIFFERENCES`].

use super::Controller;
use super::operator::{Compare, Progress};
use crate::catalog::{NodeName, Snapshot, SnapshotStatus, Volume};
use crate::csi::control::{Control, ControlError};
use crate::csi::errors::{CreateSnapshotError, OperatorError, Transient};
use crate::protocol::EXTENT_BLOCKS;
use crate::rpc::control::{DigestSnapshotRequest, DigestSnapshotResponse};
use crate::rpc::operator::{CompareCopiesResponse, Difference};
use crate::volume::{BLOCK_SIZE, VolumeId};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};
use tonic::Streaming;

/// What one digest is of.
const EXTENT_BYTES: u64 = EXTENT_BLOCKS * BLOCK_SIZE;
/// Ranges that are told one by one.
const MOST_DIFFERENCES: usize = 100;
/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(200);
/// How long the next digests of a node may take: sixteen extents at a megabyte each second, and some more.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// The digests that one node sends.
struct Digests {
    node: NodeName,
    control: Control,
    stream: Streaming<DigestSnapshotResponse>,
    ahead: VecDeque<Vec<u8>>,
}

impl Digests {
    async fn next(&mut self) -> Result<Vec<u8>, Transient> {
        let unknown = |what: &str| ControlError::Unknown(format!("node {}: {what}", self.node));
        loop {
            if let Some(digest) = self.ahead.pop_front() {
                return Ok(digest);
            }
            let message = tokio::time::timeout(ANSWER_LIMIT, self.stream.message()).await;
            let message = message.map_err(|_| unknown("it sends no digests any more"))?;
            let message = message.map_err(|status| self.control.refusal(status))?;
            self.ahead.extend(message.ok_or_else(|| unknown("it has sent too few digests"))?.digests);
        }
    }
}

/// Puts the nodes together whose copies have one digest.
fn groups(of: &[(NodeName, Vec<u8>)]) -> Vec<String> {
    let mut groups: BTreeMap<&[u8], Vec<&str>> = BTreeMap::new();
    of.iter().for_each(|(node, digest)| groups.entry(digest).or_default().push(&node.0));
    let mut groups: Vec<_> = groups.into_values().map(|nodes| nodes.join(", ")).collect();
    groups.sort();
    groups
}

/// Adds an extent that differs; neighbours with the same groups are one range.
fn note(found: &mut CompareCopiesResponse, offset: u64, length: u64, groups: Vec<String>) {
    found.different_bytes += length;
    let told = found.differences.len();
    match found.differences.last_mut() {
        Some(last) if last.offset + last.length == offset && last.groups == groups => last.length += length,
        _ if told < MOST_DIFFERENCES => {
            found.differences.push(Difference { offset, length, groups });
        }
        _ => {}
    }
}

impl Controller {
    /// Compares, and tells how far it is; the last message has what differs. Ends early when nobody listens.
    pub(super) async fn compare_copies(&self, wanted: &Compare, told: &Progress) -> Result<(), OperatorError> {
        let (stored, _) = self.with_copies(&wanted.volume).await?;
        // Of a clone that nobody makes, so that the sweep takes it away if this process dies.
        let nobody = VolumeId::random();
        let (snapshot, operation) = self.take_hidden(nobody, &stored.object).await.map_err(|error| match error {
            CreateSnapshotError::NoRoom(text) => OperatorError::NoRoom(text),
            CreateSnapshotError::SourceNotFound(text) => OperatorError::NotFound(text),
            CreateSnapshotError::Transient(error) => error.into(),
            CreateSnapshotError::Argument(error) => error.into(),
            error @ (CreateSnapshotError::NotHere(_) | CreateSnapshotError::Incompatible { .. }) => {
                Transient::Conflict(error.to_string()).into()
            }
        })?;
        let compared = self.compare(&stored.object, &snapshot, wanted.bytes_per_second, told).await;
        drop(operation);
        self.drop_made_for(nobody, Some(snapshot.id)).await;
        compared
    }

    async fn compare(
        &self,
        volume: &Volume,
        snapshot: &Snapshot,
        bytes_per_second: u64,
        told: &Progress,
    ) -> Result<(), OperatorError> {
        let mut total = volume.status.size.bytes();
        if let SnapshotStatus::Ready { size, .. } = snapshot.status {
            // A copy may be larger than its volume.
            total = total.min(size.bytes());
        }
        let mut all = Vec::new();
        for node in snapshot.holders() {
            let control = self.nodes.holder(Some(&node)).await?.control;
            let snapshot_id = snapshot.id.to_string();
            let request = DigestSnapshotRequest { snapshot_id, length_bytes: total, bytes_per_second };
            let answer = control.client().digest_snapshot(request).await;
            let stream = answer.map_err(|status| Transient::Replica(control.refusal(status)))?.into_inner();
            all.push(Digests { node, control, stream, ahead: VecDeque::new() });
        }
        let nodes: Vec<_> = all.iter().map(|digests| digests.node.to_string()).collect();
        if all.len() < 2 {
            return Err(OperatorError::Alone { id: volume.id, node: nodes.join(", ") });
        }
        let mut found = CompareCopiesResponse { total_bytes: total, nodes, ..Default::default() };
        let mut last = Instant::now();
        while found.compared_bytes < total {
            let (offset, length) = (found.compared_bytes, EXTENT_BYTES.min(total - found.compared_bytes));
            let mut of = Vec::with_capacity(all.len());
            for digests in &mut all {
                of.push((digests.node.clone(), digests.next().await?));
            }
            let groups = groups(&of);
            if groups.len() > 1 {
                note(&mut found, offset, length, groups);
            }
            found.compared_bytes += length;
            if last.elapsed() >= TELL_EVERY {
                last = Instant::now();
                let so_far = CompareCopiesResponse { differences: Vec::new(), ..found.clone() };
                if told.send(Ok(so_far)).await.is_err() {
                    return Ok(());
                }
            }
        }
        // Whoever has gone away reads no result.
        let _ = told.send(Ok(found)).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_range_and_equal_copies_one_group() {
        let of = |digests: [u8; 3]| {
            let nodes = ["n1", "n2", "n3"].map(|node| NodeName(node.into()));
            groups(&nodes.into_iter().zip(digests.map(|byte| vec![byte])).collect::<Vec<_>>())
        };
        assert_eq!(of([1, 1, 1]), ["n1, n2, n3"]);
        assert_eq!(of([1, 2, 1]), ["n1, n3", "n2"]);
        assert_eq!(of([2, 1, 0]), ["n1", "n2", "n3"]);
        let mut found = CompareCopiesResponse::default();
        for (offset, digests) in [(0, [1, 2, 1]), (4, [9, 2, 9]), (8, [1, 1, 2]), (16, [1, 1, 2])] {
            note(&mut found, offset, 4, of(digests));
        }
        let ranges: Vec<_> = found.differences.iter().map(|range| (range.offset, range.length)).collect();
        assert_eq!((ranges, found.different_bytes), (vec![(0, 8), (8, 4), (16, 4)], 16));
        (10..200).for_each(|number| note(&mut found, number * 8, 4, of([1, 2, 1])));
        assert_eq!((found.differences.len(), found.different_bytes), (MOST_DIFFERENCES, 16 + 190 * 4));
    }
}
