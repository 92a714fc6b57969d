//! A snapshot is read for another node, whose copy of the volume lacks it.
//!
//! # Invariants
//! * Other nodes may call this, and nothing else at this port ([`only_controllers`]).
//! * What has a checksum at rest is compared with it before it is sent; damage is named, and nothing is sent after it. Every block
//!   travels with a checksum, which is compared where it is written.
//! * In memory are one piece and [`UNREAD`] messages for each reader, and there are at most [`MAX_READERS`]; the reader's pace
//!   is that of the disk here.

use super::manager::{Manager, Reading};
use super::peer::is_zero;
use crate::memory::Memory;
use crate::rpc::control as rpc;
use crate::rpc::control::read_snapshot_response::{Begin, End, Part, Piece};
use crate::rpc::control::snapshots_server::Snapshots;
use crate::store::map::{Entry, PhysicalBlock};
use crate::store::verify::AtRest;
use crate::store::{Directory, Files, Name};
use crate::tls::{Caller, Role};
use crate::volume::{BLOCK_SIZE, MAX_REQUEST_BLOCKS, SnapshotId, VolumeSize};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Nodes that read at a time: each of the others brings over one snapshot, and a disk serves no more of them well.
const MAX_READERS: usize = 8;
/// Messages of 1 MiB that a reader has not taken.
const UNREAD: usize = 2;
/// Blocks of one piece that is all zeros (1 GiB): a reader looks up whether it shall go on between two.
const MAX_ZEROS: u64 = 1 << 18;

/// How long counting what will be sent may take: whoever asks waits for the first message, and not for a minute.
const COUNTING_LIMIT: Duration = Duration::from_secs(20);

/// Serves the snapshots of this node.
#[derive(Clone)]
pub struct SnapshotsService {
    manager: Manager,
    readers: Arc<Semaphore>,
}

impl SnapshotsService {
    /// Of this manager.
    pub fn new(manager: Manager) -> Self {
        Self { manager, readers: Arc::new(Semaphore::new(MAX_READERS)) }
    }
}

/// Refuses everybody who is not a controller.
#[allow(clippy::result_large_err, reason = "tonic's interceptors are like that")]
pub fn only_controllers(request: Request<()>) -> Result<Request<()>, Status> {
    match request.extensions().get::<Caller>() {
        Some(Caller(who)) if who.role == Role::Controller => Ok(request),
        Some(Caller(who)) => Err(Status::permission_denied(format!("{who} is not a controller"))),
        None => Err(Status::permission_denied("it is not known who calls")),
    }
}

#[tonic::async_trait]
impl Snapshots for SnapshotsService {
    type ReadSnapshotStream = ReceiverStream<Result<rpc::ReadSnapshotResponse, Status>>;

    async fn read_snapshot(
        &self,
        request: Request<rpc::ReadSnapshotRequest>,
    ) -> Result<Response<Self::ReadSnapshotStream>, Status> {
        let rpc::ReadSnapshotRequest { snapshot_id, base_snapshot_id, size_bytes } = request.into_inner();
        let parsed = |text: &str| {
            text.parse::<SnapshotId>().map_err(|_| Status::not_found(format!("there is no snapshot {text:?} here")))
        };
        let snapshot = parsed(&snapshot_id)?;
        let base = if base_snapshot_id.is_empty() { None } else { Some(parsed(&base_snapshot_id)?) };
        let size = VolumeSize::try_from(size_bytes).map_err(|error| Status::out_of_range(error.to_string()))?;
        let reader = Arc::clone(&self.readers).try_acquire_owned();
        let reader = reader.map_err(|_| Status::resource_exhausted(format!("{MAX_READERS} nodes read here now")))?;
        let reading = self.manager.read_for_another(snapshot, base).await?;
        let job = ReadJob { snapshot, reading, blocks: size.blocks() };
        let (send, receive) = mpsc::channel(UNREAD);
        tokio::task::spawn_blocking(move || {
            job.run(&send);
            drop(reader);
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

/// Why reading ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("nobody reads any more")]
    Unheard,
    #[error("{0}")]
    Disk(#[from] io::Error),
    #[error(
        "block {block} is damaged: its crc32c is {found:#010x} and was {expected:#010x} when it was sealed; run `tandem verify`"
    )]
    Damaged { block: u64, found: u32, expected: u32 },
}

type Sender = mpsc::Sender<Result<rpc::ReadSnapshotResponse, Status>>;

struct ReadJob {
    snapshot: SnapshotId,
    reading: Reading,
    blocks: u64,
}

/// Where pieces come from and go to.
struct Way<'a> {
    files: Directory,
    memory: Memory,
    at_rest: AtRest,
    send: &'a Sender,
}

impl ReadJob {
    /// Reads and sends. Blocking.
    fn run(self, send: &Sender) {
        let text = |error: &Ended| format!("snapshot {} cannot be read for another node: {error}", self.snapshot);
        let last = match self.walk(send) {
            Ok(()) => Ok(rpc::ReadSnapshotResponse { part: Some(Part::End(End {})) }),
            Err(Ended::Unheard) => return,
            Err(error @ Ended::Disk(_)) => Err(Status::unavailable(text(&error))),
            Err(error @ Ended::Damaged { .. }) => {
                tracing::error!(snapshot = %self.snapshot, %error, "a copy elsewhere does not get it from here");
                Err(Status::data_loss(text(&error)))
            }
        };
        // Whoever has gone away reads no result.
        let _ = send.blocking_send(last);
    }

    fn walk(&self, send: &Sender) -> Result<(), Ended> {
        let Reading { path, extents, plan, descriptor } = &self.reading;
        let data_bytes = self.data_blocks(COUNTING_LIMIT) * BLOCK_SIZE;
        tell(send, Part::Begin(Begin { data_bytes, descriptor: descriptor.clone() }))?;
        let mut way = Way {
            files: Directory::new(path),
            memory: Memory::zeros(MAX_REQUEST_BLOCKS as usize * BLOCK_SIZE as usize)?,
            at_rest: AtRest::new(plan.instance()),
            send,
        };
        for run in extents.clone() {
            let (mut block, end) = (run.start, (run.start + run.count).min(self.blocks));
            while block < end {
                block += self.piece(block, end, &mut way)?;
            }
        }
        Ok(())
    }

    /// What is sent; where the maps are so large that counting takes longer than this, the most that it can be.
    fn data_blocks(&self, limit: Duration) -> u64 {
        let Reading { extents, plan, .. } = &self.reading;
        let until = Instant::now() + limit;
        let counted = extents.clone().data_blocks(plan, self.blocks, || Instant::now() < until);
        counted.unwrap_or_else(|| extents.most_data_blocks().min(plan.most_data_blocks()).min(self.blocks))
    }

    /// What the snapshot has at a block, for how many, and whether these have checksums.
    fn run_at(&self, block: u64, end: u64) -> (Entry, u64, bool) {
        let plan = &self.reading.plan;
        // What is past its end reads as zeros.
        if block >= plan.blocks() {
            return (Entry::Absent, end - block, false);
        }
        let limit = u32::try_from(end.min(plan.blocks()) - block).unwrap_or(u32::MAX);
        let (entry, count, checksummed) = plan.checked_run(block, limit);
        (entry, u64::from(count), checksummed)
    }

    /// Sends what begins at a block; how many blocks that were.
    fn piece(&self, block: u64, end: u64, way: &mut Way<'_>) -> Result<u64, Ended> {
        let (entry, count, checksummed) = self.run_at(block, end);
        let offset = block * BLOCK_SIZE;
        let Entry::Data(physical) = entry else {
            let count = count.min(MAX_ZEROS);
            tell(way.send, Part::Piece(Piece { offset, length: count * BLOCK_SIZE, ..Default::default() }))?;
            return Ok(count);
        };
        let count = count.min(u64::from(MAX_REQUEST_BLOCKS));
        let length = count * BLOCK_SIZE;
        let data = &mut way.memory.bytes_mut()[..length as usize];
        way.files.read_at(Name::Data, u64::from(physical.0) * BLOCK_SIZE, data)?;
        let mut checksums = Vec::with_capacity(count as usize);
        for (index, bytes) in data.chunks_exact(BLOCK_SIZE as usize).enumerate() {
            let found = crc32c::crc32c(bytes);
            if checksummed {
                let expected = way.at_rest.of(&way.files, PhysicalBlock(physical.0 + index as u32))?;
                if found != expected {
                    return Err(Ended::Damaged { block: block + index as u64, found, expected });
                }
            }
            checksums.push(found);
        }
        let zeros = data.chunks_exact(BLOCK_SIZE as usize).all(is_zero);
        let piece = if zeros {
            Piece { offset, length, ..Default::default() }
        } else {
            Piece { offset, length, data: data.to_vec(), checksums }
        };
        tell(way.send, Part::Piece(piece))?;
        Ok(count)
    }
}

fn tell(send: &Sender, part: Part) -> Result<(), Ended> {
    send.blocking_send(Ok(rpc::ReadSnapshotResponse { part: Some(part) })).map_err(|_| Ended::Unheard)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::Identity;
    use crate::volume::ClusterId;

    #[test]
    fn a_node_is_no_controller() {
        let ask = |role: Option<Role>| {
            let mut request = Request::new(());
            if let Some(role) = role {
                let name = "n1".parse().expect("a name");
                request.extensions_mut().insert(Caller(Identity { cluster: ClusterId::random(), role, name }));
            }
            only_controllers(request).map(drop).map_err(|status| status.code())
        };
        assert_eq!(ask(Some(Role::Controller)), Ok(()));
        assert_eq!(ask(Some(Role::Node)), Err(tonic::Code::PermissionDenied));
        assert_eq!(ask(None), Err(tonic::Code::PermissionDenied), "nobody is let in unknown");
    }
}
