//! Snapshots that copies lack are brought over to them, and read the same there: copies that were away, and new ones.

use crate::discards::Part;
use crate::rot;
use crate::site::{PATIENCE, SIZE, Site};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tandem::rpc::control::{DigestSnapshotRequest, GetExtentsRequest, ListPoolsRequest, ListSnapshotsRequest};
use tandem::rpc::operator::operator_client::OperatorClient;
use tandem::rpc::operator::{LocateSnapshotsRequest, MoveCopyRequest};
use tonic::transport::Channel;

const MIB: u64 = 1 << 20;

impl Site {
    fn operator(&self) -> OperatorClient<Channel> {
        OperatorClient::new(tandem::uds::channel(&self.cluster.dir().join("controller/csi.sock")))
    }

    /// Waits until the snapshot is on these nodes, and on no others; the controller may die meanwhile.
    pub async fn until_snapshot_is_on(&self, snapshot: &str, numbers: &[usize]) {
        let began = Instant::now();
        let wanted: Vec<_> = numbers.iter().map(|number| format!("node-{number}")).collect();
        loop {
            let answer = self.operator().locate_snapshots(LocateSnapshotsRequest {}).await;
            let told = answer.map(|answer| answer.into_inner().locations).unwrap_or_default();
            let place = told.iter().find(|location| location.snapshot_id == snapshot);
            if place.is_some_and(|place| place.nodes == wanted && place.lacking.is_empty()) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{snapshot} is not on {wanted:?}: {told:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the snapshot reads as on the node.
    pub async fn digests(&self, number: usize, snapshot: &str) -> Vec<Vec<u8>> {
        let (length_bytes, bytes_per_second) = (SIZE as u64, 1 << 30);
        let request = DigestSnapshotRequest { snapshot_id: snapshot.into(), length_bytes, bytes_per_second };
        let mut stream = self.control(number).digest_snapshot(request).await.expect("it is there").into_inner();
        let mut digests = Vec::new();
        while let Some(message) = stream.message().await.expect("it is readable") {
            digests.extend(message.digests);
        }
        assert_eq!(digests.len() as u64, SIZE as u64 / (4 * MIB));
        digests
    }

    /// The MiBs where the two may differ, by what is said on this node, which has both in one line of layers.
    async fn difference(&self, number: usize, base: &str, target: &str) -> BTreeSet<u64> {
        let (target_snapshot_id, base_snapshot_id) = (target.into(), base.into());
        let request = GetExtentsRequest { target_snapshot_id, base_snapshot_id, ..Default::default() };
        let mut stream = self.control(number).get_extents(request).await.expect("in one line").into_inner();
        let mut differ = BTreeSet::new();
        while let Some(message) = stream.message().await.expect("it is readable") {
            differ.extend(message.extents.iter().flat_map(|e| e.offset / MIB..(e.offset + e.length).div_ceil(MIB)));
        }
        differ
    }

    /// The trees of the node.
    fn trees(&self, number: usize) -> Vec<PathBuf> {
        let trees = fs::read_dir(self.cluster.dir().join(format!("node-{number}/pool/trees")));
        trees.map(|trees| trees.flatten().map(|tree| tree.path()).collect()).unwrap_or_default()
    }

    /// Waits until the node has no snapshot, and nothing that was to become one.
    pub async fn until_nothing_is_filled(&self, number: usize) {
        let began = Instant::now();
        loop {
            let listed = self.control(number).list_snapshots(ListSnapshotsRequest {}).await.expect("it answers");
            let records = self.trees(number).into_iter().filter_map(|tree| fs::read_dir(tree.join("records")).ok());
            let names = records.flat_map(|record| record.flatten().map(|entry| entry.file_name()));
            let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with("fill-")).collect();
            if left.is_empty() && listed.get_ref().snapshots.is_empty() {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "node-{number} keeps {left:?} and {listed:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn promised(&self, number: usize) -> u64 {
        let listed = self.control(number).list_pools(ListPoolsRequest {}).await.expect("it answers").into_inner();
        listed.pools.iter().map(|pool| pool.promised_bytes).sum()
    }

    async fn until_as_much_is_promised(&self, one: usize, other: usize) {
        let began = Instant::now();
        loop {
            let both = (self.promised(one).await, self.promised(other).await);
            if both.0 == both.1 {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{both:?} are promised");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn is_the_same_on(&self, snapshots: &[&String], one: usize, other: usize) {
        for snapshot in snapshots {
            assert_eq!(self.digests(one, snapshot).await, self.digests(other, snapshot).await, "{snapshot}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_brought_over_to_a_copy_that_was_away_and_to_a_new_one() {
    let site = Site::with_a_spare_node().await;
    let device = site.attach(1).await;
    let mut part = Part::new();
    part.write(&device, 0..8, 1);
    let first = site.snapshot("first").await;
    site.cluster.run(&["kill", "all", "2"]);
    site.until_dropped(2).await;
    part.write(&device, 4..12, 2);
    part.discard(&device, 0..2);
    let second = site.snapshot("second").await;
    part.write(&device, 10..14, 3);
    part.discard(&device, 5..6);
    let third = site.snapshot("third").await;
    part.write(&device, 0..16, 9);
    let all = [&first, &second, &third];

    site.cluster.run(&["start", "all", "2"]);
    site.until_whole().await;
    for snapshot in all {
        site.until_snapshot_is_on(snapshot, &[1, 2]).await;
    }
    site.is_the_same_on(&all, 1, 2).await;
    let differ: BTreeSet<u64> = [0, 1].into_iter().chain(4..14).map(|mib| 48 + mib).collect();
    for node in [1, 2] {
        assert_eq!(site.difference(node, &first, &third).await, differ, "node-{node}");
    }
    part.check(&device);

    // A copy that is made anew elsewhere has none of them at first. The old one's node keeps its own.
    let (from_node, to_node) = ("node-2".into(), "node-3".into());
    let wanted = MoveCopyRequest { volume_id: site.id.clone(), from_node, to_node };
    site.operator().move_copy(wanted).await.expect("it moves");
    for snapshot in all {
        site.until_snapshot_is_on(snapshot, &[1, 2, 3]).await;
    }
    site.is_the_same_on(&all, 1, 3).await;
    assert_eq!(site.difference(3, &first, &third).await, differ);
    let (well, said) = site.verify(3);
    assert!(well, "{said}");

    // From the middle of the branch, from its end, and the rest: the space is given back.
    site.delete_snapshot(&second).await;
    site.is_the_same_on(&[&first, &third], 1, 3).await;
    for snapshot in [&third, &first] {
        site.delete_snapshot(snapshot).await;
    }
    for node in [1, 2, 3] {
        site.until_nothing_is_filled(node).await;
    }
    site.until_as_much_is_promised(1, 3).await;
    part.check(&device);
    site.detach(1).await;
    part.check(&site.attach(3).await);
    site.detach(3).await;
    site.finish().await;
}

/// The damage stays where it is: it is named, and the copy that lacks the snapshot gets none of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotten_snapshot_is_not_brought_over() {
    let site = Site::new(2).await;
    let device = site.attach(1).await;
    site.cluster.run(&["kill", "all", "2"]);
    site.until_dropped(2).await;
    // Above what was sealed when the copy left: that has no checksums before it is merged.
    rot::write(&device, 0..rot::BLOCKS);
    let snapshot = site.snapshot("rotten").await;
    site.until_checksummed(1, &snapshot).await;
    rot::flip(&site, 1);
    site.cluster.run(&["start", "all", "2"]);
    site.until_said(1, "a copy elsewhere does not get it from here", 0).await;
    assert!(site.said(1, "is damaged: its crc32c is") > 0);
    let told = site.operator().locate_snapshots(LocateSnapshotsRequest {}).await.expect("told").into_inner();
    let [place] = &told.locations[..] else { panic!("one snapshot") };
    assert_eq!((&place.nodes[..], &place.lacking[..]), (&["node-1".to_owned()][..], &["node-2".to_owned()][..]));
    site.delete_snapshot(&snapshot).await;
    site.until_nothing_is_filled(2).await;
    site.detach(1).await;
    site.finish().await;
}
