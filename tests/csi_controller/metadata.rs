//! SnapshotMetadata: complete streams, and streams that end as errors.

use crate::site::*;
use tandem::csi::snapshot_metadata::SnapshotMetadataService;
use tandem::rpc::control::{Extent, GetExtentsResponse};
use tandem::rpc::csi::snapshot_metadata_server::SnapshotMetadata as _;
use tandem::rpc::csi::*;
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status};

fn extents(numbers: std::ops::Range<u64>) -> Result<GetExtentsResponse, Status> {
    let extents = numbers.map(|number| Extent { offset: number * 8192, length: 4096 }).collect();
    Ok(GetExtentsResponse { size_bytes: 64 * MIB, extents })
}

async fn allocated(
    driver: &Driver,
    snapshot_id: &str,
    starting_offset: i64,
    max_results: i32,
) -> Result<Vec<Result<GetMetadataAllocatedResponse, Status>>, Status> {
    let request = GetMetadataAllocatedRequest {
        snapshot_id: snapshot_id.into(),
        starting_offset,
        max_results,
        ..Default::default()
    };
    let service = SnapshotMetadataService(driver.controller.clone());
    let stream = service.get_metadata_allocated(Request::new(request)).await?.into_inner();
    Ok(stream.collect().await)
}

async fn delta(
    driver: &Driver,
    base: &str,
    target: &str,
) -> Result<Vec<Result<GetMetadataDeltaResponse, Status>>, Status> {
    let request = GetMetadataDeltaRequest {
        base_snapshot_id: base.into(),
        target_snapshot_id: target.into(),
        ..Default::default()
    };
    let service = SnapshotMetadataService(driver.controller.clone());
    let stream = service.get_metadata_delta(Request::new(request)).await?.into_inner();
    Ok(stream.collect().await)
}

async fn two_snapshots(driver: &Driver) -> (String, String) {
    let volume = driver.create(wanted("pvc-1", 64 * MIB)).await.expect("created").volume_id;
    let base = driver.snapshot("base", &volume).await.expect("taken").snapshot_id;
    (base, driver.snapshot("target", &volume).await.expect("taken").snapshot_id)
}

#[tokio::test]
async fn messages_have_at_most_the_wanted_number_of_blocks() {
    let site = Site::new();
    let driver = site.driver();
    let (_, target) = two_snapshots(&driver).await;
    site.fake.state().extents = vec![extents(0..5), extents(5..6), extents(6..6), extents(6..10)];
    let messages = allocated(&driver, &target, 4096, 2).await.expect("a stream");
    let messages: Vec<_> = messages.into_iter().map(|message| message.expect("a message")).collect();
    let sizes: Vec<_> = messages.iter().map(|message| message.block_metadata.len()).collect();
    assert_eq!(sizes, [2, 2, 1, 1, 2, 2]);
    let offsets = messages.iter().flat_map(|message| &message.block_metadata).map(|block| block.byte_offset / 8192);
    assert!(offsets.eq(0..10));
    assert!(messages.iter().all(|m| m.volume_capacity_bytes == 64 << 20));
    assert!(messages.iter().all(|m| m.block_metadata_type() == BlockMetadataType::VariableLength));
    let asked = site.fake.state().extents_asked.take().expect("asked");
    assert_eq!((asked.target_snapshot_id, asked.starting_offset, asked.base_snapshot_id.as_str()), (target, 4096, ""));
}

#[tokio::test]
async fn a_delta_is_asked_for_with_both_snapshots() {
    let site = Site::new();
    let driver = site.driver();
    let (base, target) = two_snapshots(&driver).await;
    site.fake.state().extents = vec![extents(0..3)];
    let messages = delta(&driver, &base, &target).await.expect("a stream");
    assert_eq!(messages.len(), 1);
    let asked = site.fake.state().extents_asked.take().expect("asked");
    assert_eq!((asked.base_snapshot_id, asked.target_snapshot_id), (base, target));
}

#[tokio::test]
async fn an_error_half_way_ends_the_stream_as_an_error() {
    let site = Site::new();
    let driver = site.driver();
    let (_, target) = two_snapshots(&driver).await;
    for (planted, expected) in [
        (Status::unavailable("engine restarted"), Code::Unavailable),
        (Status::internal("a bug"), Code::Unavailable),
        (Status::not_found("it was deleted"), Code::NotFound),
    ] {
        site.fake.state().extents = vec![extents(0..3), Err(planted)];
        let messages = allocated(&driver, &target, 0, 0).await.expect("a stream");
        assert_eq!(messages.len(), 2);
        assert_eq!(messages[1].as_ref().expect_err("the error").code(), expected);
    }
}

#[tokio::test]
async fn wrong_requests_are_refused_before_the_stream() {
    let site = Site::new();
    let driver = site.driver();
    let (base, target) = two_snapshots(&driver).await;
    assert_eq!(refused(allocated(&driver, "", 0, 0).await), Code::InvalidArgument);
    assert_eq!(refused(allocated(&driver, "non-existing-snapshot-id", 0, 0).await), Code::NotFound);
    assert_eq!(refused(allocated(&driver, &target, -1, 0).await), Code::OutOfRange);
    assert_eq!(refused(allocated(&driver, &target, (64 << 20) + 1, 0).await), Code::OutOfRange);
    assert_eq!(refused(allocated(&driver, &target, 0, -1).await), Code::InvalidArgument);
    assert!(allocated(&driver, &target, 64 << 20, 0).await.expect("a stream").is_empty());
    let other = driver.create(wanted("pvc-2", MIB)).await.expect("created").volume_id;
    let other = driver.snapshot("other", &other).await.expect("taken").snapshot_id;
    assert_eq!(refused(delta(&driver, &other, &target).await), Code::InvalidArgument);
    assert_eq!(refused(delta(&driver, "", &target).await), Code::InvalidArgument);
    assert_eq!(refused(delta(&driver, &base, "").await), Code::InvalidArgument);
    assert_eq!(refused(delta(&driver, &base, "fake").await), Code::NotFound);
}
