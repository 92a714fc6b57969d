//! Copies that are compared by the digests that their nodes send.

use crate::fake::When;
use crate::mirror_snapshots::{ALL, called, snapshots, volume};
use crate::mirrors::make_copies;
use crate::nodes::{at, cluster};
use crate::site::*;
use tandem::csi::controller::OperatorService;
use tandem::rpc::operator::operator_server::Operator as _;
use tandem::rpc::operator::*;
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status};

const EXTENT: u64 = 4 << 20;

/// The last message.
async fn compare(driver: &Driver, id: &str) -> Result<CompareCopiesResponse, Status> {
    let request = CompareCopiesRequest { volume_id: id.into(), bytes_per_second: 64 << 20 };
    let mut stream =
        OperatorService(driver.controller.clone()).compare_copies(Request::new(request)).await?.into_inner();
    let mut last = None;
    while let Some(message) = stream.next().await {
        last = Some(message?);
    }
    Ok(last.expect("a message"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_differs_is_named_and_the_snapshot_goes_on_every_path() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    for fake in &nodes.fakes {
        fake.state().digests.insert(3, vec![7]);
    }
    let same = compare(&driver, &id).await.expect("compared");
    assert_eq!((same.compared_bytes, same.nodes.clone()), (GIB, vec!["node-1".to_owned(), "node-2".to_owned()]));
    assert!(same.differences.is_empty() && same.different_bytes == 0);
    for (extent, digest) in [(3, 8), (4, 1), (9, 1)] {
        nodes.fakes[1].state().digests.insert(extent, vec![digest]);
    }
    let differ = compare(&driver, &id).await.expect("compared");
    let ranges: Vec<_> =
        differ.differences.iter().map(|range| (range.offset / EXTENT, range.length / EXTENT)).collect();
    assert_eq!((ranges, differ.different_bytes), (vec![(3, 2), (9, 1)], 3 * EXTENT));
    assert_eq!(differ.differences[0].groups, ["node-1", "node-2"]);
    assert!(driver.snapshots().await.is_empty(), "nobody ever sees it");
    // A node that gives up half way: promise, seal and name, then the digests.
    nodes.fakes[1].fail_call(2, When::Before, Code::Unavailable);
    let status = compare(&driver, &id).await.expect_err("it does not answer");
    assert!(status.code() == Code::Unavailable && status.message().contains("node-2"), "{status:?}");
    assert_eq!(called(&nodes, 2, "DigestSnapshot"), 3);
    assert!(snapshots(&driver).await.is_empty(), "the stream ends after it");
    assert!(nodes.fakes.iter().all(|fake| fake.state().snapshots.is_empty()));
}

/// The process dies while it compares.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sweep_takes_the_snapshot_of_a_comparison_that_nobody_makes_any_more() {
    let (nodes, driver) = cluster(&[100, 50]).await;
    let _work = make_copies(&driver.catalog, &ALL);
    let id = volume(&nodes, &driver, "pvc").await;
    // Seal and digests; then its deletion at both nodes has no answer.
    nodes.fakes[0].fail_call(2, When::Before, Code::Unavailable);
    nodes.fakes[1].fail_call(3, When::Before, Code::Unavailable);
    compare(&driver, &id).await.expect("compared");
    assert_eq!((snapshots(&driver).await.len(), driver.snapshots().await.len()), (1, 0));
    driver.controller.sweep_given_up().await.expect("swept");
    assert!(snapshots(&driver).await.is_empty());
    assert!(nodes.fakes.iter().all(|fake| fake.state().snapshots.is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_compared_is_refused() {
    let (_nodes, driver) = cluster(&[100, 50]).await;
    let sole = driver.create(at("sole", &[1])).await.expect("created").volume_id;
    assert_eq!(refused(compare(&driver, &sole).await), Code::FailedPrecondition);
    assert_eq!(refused(compare(&driver, "nothing").await), Code::NotFound);
    let slow = CompareCopiesRequest { volume_id: sole, bytes_per_second: 1 };
    let slow = OperatorService(driver.controller.clone()).compare_copies(Request::new(slow)).await;
    assert_eq!(slow.expect_err("refused").code(), Code::InvalidArgument);
}
