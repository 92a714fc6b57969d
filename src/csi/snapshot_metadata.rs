//! The SnapshotMetadata service: which blocks of a snapshot hold data, or differ from an older one.
//!
//! Invariants: a stream that ends well is complete; every failure, also half way, ends it as an error. Of two snapshots of one volume
//! what differs is named, and where no node has both in one line of layers, more. At most
//! [`WAITING_MESSAGES`] messages wait for a slow reader, then the replica's stream waits too.

use super::control::ControlError;
use super::controller::Controller;
use super::controller::request::present;
use super::controller::response::bytes;
use super::errors::{ArgumentError, GetSnapshotError, MetadataError, Transient};
use super::status::failed;
use crate::catalog::{NodeName, Snapshot, SnapshotStatus};
use crate::rpc::control::{Extent, GetExtentsRequest, GetExtentsResponse};
use crate::rpc::csi;
use crate::rpc::csi::snapshot_metadata_server::SnapshotMetadata;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Messages of one stream in memory.
const WAITING_MESSAGES: usize = 4;
/// Most extents of one message, also if more are allowed: 100 KiB on the wire.
const MESSAGE_EXTENTS: usize = 4096;

/// Which extents of what.
struct Wanted {
    base: Option<String>,
    target: String,
    offset: i64,
    /// Most extents of one message.
    results: usize,
}

fn results(max_results: i32) -> Result<usize, ArgumentError> {
    match usize::try_from(max_results) {
        Err(_) => Err(ArgumentError::Negative("max_results")),
        Ok(0) => Ok(MESSAGE_EXTENTS),
        Ok(results) => Ok(results.min(MESSAGE_EXTENTS)),
    }
}

impl TryFrom<csi::GetMetadataAllocatedRequest> for Wanted {
    type Error = ArgumentError;
    fn try_from(request: csi::GetMetadataAllocatedRequest) -> Result<Self, ArgumentError> {
        let target = present("snapshot_id", request.snapshot_id)?;
        Ok(Self { base: None, target, offset: request.starting_offset, results: results(request.max_results)? })
    }
}

impl TryFrom<csi::GetMetadataDeltaRequest> for Wanted {
    type Error = ArgumentError;
    fn try_from(request: csi::GetMetadataDeltaRequest) -> Result<Self, ArgumentError> {
        let base = Some(present("base_snapshot_id", request.base_snapshot_id)?);
        let target = present("target_snapshot_id", request.target_snapshot_id)?;
        Ok(Self { base, target, offset: request.starting_offset, results: results(request.max_results)? })
    }
}

/// Serves the extents of a [`Controller`]'s snapshots.
pub struct SnapshotMetadataService(pub Arc<Controller>);

impl SnapshotMetadataService {
    async fn extents<T: From<Block> + Send + 'static>(
        &self,
        call: &'static str,
        wanted: Result<Wanted, ArgumentError>,
    ) -> Result<Response<ReceiverStream<Result<T, Status>>>, Status> {
        let wanted = wanted.map_err(|error| failed(call, &error))?;
        let results = wanted.results;
        let opened = open(&self.0, wanted).await.map_err(|error| failed(call, &error))?;
        let (sender, receiver) = mpsc::channel(WAITING_MESSAGES);
        tokio::spawn(async move {
            let forwarded = match opened {
                Opened::Stream(stream) => forward(*stream, results, &sender).await,
                Opened::All { size, offset } if offset < size => {
                    let extents = vec![Extent { offset, length: size - offset }];
                    return drop(sender.send(Ok(T::from(Block { size, extents }))).await);
                }
                Opened::All { .. } => Ok(()),
            };
            if let Err(error) = forwarded {
                // A reader that is gone needs no error.
                let _ = sender.send(Err(failed(call, &error))).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Where extents come from.
enum Opened {
    Stream(Box<Streaming<GetExtentsResponse>>),
    /// No node knows better: all of the target may differ, from an offset on.
    All {
        size: u64,
        offset: u64,
    },
}

/// Checks what can be checked here and starts the replica's stream.
async fn open(controller: &Controller, wanted: Wanted) -> Result<Opened, MetadataError> {
    let (target, size, taken) = find(controller, &wanted.target).await?;
    let starting_offset = u64::try_from(wanted.offset).ok().filter(|offset| *offset <= size);
    let offset = starting_offset.ok_or(MetadataError::Offset { offset: wanted.offset, size });
    let mut holders = target.holders();
    let mut base_is_newer = false;
    if let Some(base) = &wanted.base {
        let (base, _, base_taken) = find(controller, base).await?;
        if base.volume != target.volume {
            return Err(MetadataError::OtherVolume { base: base.id, target: target.id });
        }
        base_is_newer = base_taken > taken;
        if !holders.is_empty() {
            holders.retain(|node| base.holders().contains(node));
            if holders.is_empty() {
                return Ok(Opened::All { size, offset: offset? });
            }
        }
    }
    let request = GetExtentsRequest {
        target_snapshot_id: wanted.target,
        base_snapshot_id: wanted.base.clone().unwrap_or_default(),
        starting_offset: offset?,
        loose: false,
    };
    // Where the two are in one line of layers nothing is named that does not differ. Elsewhere all that may differ is named.
    let error = match ask(controller, &holders, &request).await? {
        Ok(stream) => return Ok(Opened::Stream(Box::new(stream))),
        Err(error) => error,
    };
    if wanted.base.is_none() || (base_is_newer && matches!(error, ControlError::Refused(_))) {
        return Err(refused(error));
    }
    let loose = ask(controller, &holders, &GetExtentsRequest { loose: true, ..request }).await?;
    loose.map(|stream| Opened::Stream(Box::new(stream))).map_err(refused)
}

/// Each holder has the same; the first one that answers will do. Of refusals one counts that says something of the snapshots.
async fn ask(
    controller: &Controller,
    holders: &BTreeSet<NodeName>,
    request: &GetExtentsRequest,
) -> Result<Result<Streaming<GetExtentsResponse>, ControlError>, Transient> {
    let mut places: Vec<_> = holders.iter().map(Some).collect();
    if places.is_empty() {
        places.push(None);
    }
    // What is not found may have been lost with one disk, and a node that is silent may know better.
    let says = |error: &ControlError| match error {
        ControlError::NotFound(_) => 0,
        ControlError::Unknown(_) => 1,
        ControlError::NoRoom(_) | ControlError::InUse(_) => 2,
        ControlError::Refused(_) => 3,
    };
    let mut failed = ControlError::NotFound(format!("snapshot {} is nowhere", request.target_snapshot_id));
    for place in places {
        let control = controller.nodes.holder(place).await?.control;
        match control.client().get_extents(request.clone()).await.map_err(|status| control.refusal(status)) {
            Ok(answer) => return Ok(Ok(answer.into_inner())),
            Err(error) if says(&error) >= says(&failed) => failed = error,
            Err(_) => {}
        }
    }
    Ok(Err(failed))
}

/// The snapshot, its size, and when it was taken.
async fn find(controller: &Controller, id: &str) -> Result<(Snapshot, u64, u64), MetadataError> {
    let snapshot = controller.snapshot(id).await.map_err(|error| match error {
        GetSnapshotError::NotFound(id) => MetadataError::NotFound(id),
        GetSnapshotError::Argument(error) => error.into(),
        GetSnapshotError::Transient(error) => error.into(),
    })?;
    let (size, taken) = match snapshot.status {
        SnapshotStatus::Ready { size, created_ms } => (size.bytes(), created_ms),
        SnapshotStatus::Creating => (0, 0),
    };
    Ok((snapshot, size, taken))
}

fn refused(error: ControlError) -> MetadataError {
    match error {
        ControlError::NotFound(text) => MetadataError::NotFound(text),
        ControlError::Refused(text) => MetadataError::Refused(text),
        error @ (ControlError::Unknown(_) | ControlError::NoRoom(_) | ControlError::InUse(_)) => {
            Transient::Replica(error).into()
        }
    }
}

/// The common content of both services' messages.
struct Block {
    size: u64,
    extents: Vec<Extent>,
}

impl From<Block> for csi::GetMetadataAllocatedResponse {
    fn from(block: Block) -> Self {
        Self {
            block_metadata_type: csi::BlockMetadataType::VariableLength.into(),
            volume_capacity_bytes: bytes(block.size),
            block_metadata: block.extents.into_iter().map(metadata).collect(),
        }
    }
}

impl From<Block> for csi::GetMetadataDeltaResponse {
    fn from(block: Block) -> Self {
        Self {
            block_metadata_type: csi::BlockMetadataType::VariableLength.into(),
            volume_capacity_bytes: bytes(block.size),
            block_metadata: block.extents.into_iter().map(metadata).collect(),
        }
    }
}

fn metadata(extent: Extent) -> csi::BlockMetadata {
    csi::BlockMetadata { byte_offset: bytes(extent.offset), size_bytes: bytes(extent.length) }
}

/// Cuts the replica's messages into ones of at most `results` extents.
async fn forward<T: From<Block>>(
    mut stream: Streaming<GetExtentsResponse>,
    results: usize,
    sender: &mpsc::Sender<Result<T, Status>>,
) -> Result<(), MetadataError> {
    loop {
        let message = stream.message().await.map_err(|status| refused(status.into()))?;
        let Some(GetExtentsResponse { size_bytes: size, mut extents }) = message else { return Ok(()) };
        while !extents.is_empty() {
            let rest = extents.split_off(results.min(extents.len()));
            let message = T::from(Block { size, extents });
            if sender.send(Ok(message)).await.is_err() {
                // The reader went away; dropping the stream tells the replica.
                return Ok(());
            }
            extents = rest;
        }
    }
}

#[tonic::async_trait]
impl SnapshotMetadata for SnapshotMetadataService {
    type GetMetadataAllocatedStream = ReceiverStream<Result<csi::GetMetadataAllocatedResponse, Status>>;
    type GetMetadataDeltaStream = ReceiverStream<Result<csi::GetMetadataDeltaResponse, Status>>;

    async fn get_metadata_allocated(
        &self,
        request: Request<csi::GetMetadataAllocatedRequest>,
    ) -> Result<Response<Self::GetMetadataAllocatedStream>, Status> {
        self.extents("GetMetadataAllocated", request.into_inner().try_into()).await
    }

    async fn get_metadata_delta(
        &self,
        request: Request<csi::GetMetadataDeltaRequest>,
    ) -> Result<Response<Self::GetMetadataDeltaStream>, Status> {
        self.extents("GetMetadataDelta", request.into_inner().try_into()).await
    }
}
