//! Brings snapshots over that copies of this node lack: read from another node, in the background.
//!
//! ```text
//!   controller: FillSnapshot ─> wanted here? ─> ReadSnapshot of a holder ─> pieces checked and written ─> still wanted? ─> sealed
//! ```
//! # Invariants
//! * One at a time: a resync and the application read and write on the same disks. After [`BURST`] pieces they are left alone for as
//!   long as these have taken.
//! * The catalogue names this node among the snapshot's strays, when it begins and, held against a deletion, when it is sealed. So
//!   what is deleted is never sealed, and what is sealed is deleted with the snapshot, whatever becomes of the controller.
//! * Nothing is sealed before the source has said that it was all, and a piece whose checksums do not fit is not written.
//! * Whatever fails leaves nothing behind and is told when the controller asks next; who asks again begins again.

use super::manager::{Begun, Fill, FillFailure, Manager, NewFill};
use super::operations::OperationGuard;
use super::peer::Blocks;
use crate::catalog::{Catalog, CatalogError, Descriptor, Node, NodeName, Snapshot, SnapshotStatus};
use crate::protocol::Request;
use crate::rpc::control as rpc;
use crate::rpc::control::read_snapshot_response::{Begin, Part, Piece};
use crate::rpc::control::snapshots_client::SnapshotsClient;
use crate::tls::{Credentials, Expected, Role, dial};
use crate::volume::{BLOCK_SIZE, BlockRange, InstanceId, MAX_REQUEST_BLOCKS, SnapshotId, VolumeSize};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};

/// Pieces of at most 1 MiB between two rests.
const BURST: u32 = 16;
/// The longest rest: a disk that crawls needs no more.
const LONGEST_REST: Duration = Duration::from_secs(1);
/// How long the connection to the source may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long its next message may take: a piece from a disk that is busy.
const MESSAGE_LIMIT: Duration = Duration::from_secs(60);
/// How long the catalogue may be away when everything is there, and how often it is asked.
const CATALOGUE_LIMIT: Duration = Duration::from_secs(15 * 60);
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A source that says nothing is asked whether it is there after this time, and has so long to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// What brings snapshots over; clones are the same one.
#[derive(Clone)]
pub struct Filler(Arc<Shared>);

struct Shared {
    manager: Manager,
    catalog: Catalog,
    credentials: Arc<Credentials>,
    node: NodeName,
    under_way: Mutex<Option<UnderWay>>,
}

/// The one that is being brought over, or the last one, until the controller has heard how it ended.
struct UnderWay {
    snapshot: SnapshotId,
    progress: Arc<Progress>,
    task: AbortHandle,
}

#[derive(Default)]
struct Progress {
    copied: AtomicU64,
    total: AtomicU64,
    ended: Mutex<Option<Result<InstanceId, String>>>,
}

/// What the controller asks for.
struct Wanted {
    snapshot: SnapshotId,
    copy: InstanceId,
    source: NodeName,
    base: Option<SnapshotId>,
}

/// Why a snapshot was not brought over.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("the catalogue does not want snapshot {0} on this node, or not any more")]
    NotWanted(SnapshotId),
    #[error(transparent)]
    Catalogue(#[from] CatalogError),
    #[error("node {0} has not announced itself")]
    NoNode(NodeName),
    #[error("node {node} does not send it: {text}")]
    Source { node: NodeName, text: String },
    #[error("node {node} has sent what cannot be: {what}")]
    Senseless { node: NodeName, what: &'static str },
    #[error(
        "block {block} was damaged on its way from node {node}: its crc32c is {found:#010x} and {sent:#010x} was sent"
    )]
    Damaged { node: NodeName, block: u64, found: u32, sent: u32 },
    #[error(transparent)]
    Here(#[from] FillFailure),
}

fn bad<T: std::str::FromStr>(text: &str) -> Result<T, Status> {
    text.parse().map_err(|_| Status::invalid_argument(format!("{text:?} is no id of Tandem")))
}

impl TryFrom<rpc::FillSnapshotRequest> for Wanted {
    type Error = Status;
    fn try_from(request: rpc::FillSnapshotRequest) -> Result<Self, Status> {
        let rpc::FillSnapshotRequest { snapshot_id, copy_id, source_node, base_snapshot_id } = request;
        let base = if base_snapshot_id.is_empty() { None } else { Some(bad(&base_snapshot_id)?) };
        Ok(Self { snapshot: bad(&snapshot_id)?, copy: bad(&copy_id)?, source: NodeName(source_node), base })
    }
}

impl Filler {
    /// For the copies of this node.
    pub fn new(manager: Manager, catalog: Catalog, credentials: Arc<Credentials>, node: NodeName) -> Self {
        Self(Arc::new(Shared { manager, catalog, credentials, node, under_way: Mutex::default() }))
    }

    /// Begins, unless something is being brought over, or says how far that is.
    pub fn fill(&self, request: rpc::FillSnapshotRequest) -> Result<rpc::FillSnapshotResponse, Status> {
        let wanted = Wanted::try_from(request)?;
        let mut under_way = self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = under_way.as_ref() {
            let told = now.progress.told();
            if let Some(ended) = now.progress.ended() {
                let is_this = now.snapshot == wanted.snapshot;
                *under_way = None;
                match ended {
                    Ok(copy) if is_this => return Ok(rpc::FillSnapshotResponse { copy_id: copy.to_string(), ..told }),
                    Err(problem) if is_this => return Ok(rpc::FillSnapshotResponse { problem, ..told }),
                    Ok(_) | Err(_) => {}
                }
            } else if !now.task.is_finished() {
                return Ok(told);
            }
        }
        let (shared, progress, snapshot) = (Arc::clone(&self.0), Arc::new(Progress::default()), wanted.snapshot);
        let says = Arc::clone(&progress);
        let task = tokio::spawn(async move {
            let ended = shared.bring(wanted, &says).await.map_err(|error| error.to_string());
            *says.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
        });
        let told = progress.told();
        *under_way = Some(UnderWay { snapshot, progress, task: task.abort_handle() });
        Ok(told)
    }

    /// Ends what is under way as if the process had died.
    pub fn stop(&self) {
        if let Some(now) = self.0.under_way.lock().unwrap_or_else(PoisonError::into_inner).take() {
            now.task.abort();
        }
    }
}

impl Progress {
    fn told(&self) -> rpc::FillSnapshotResponse {
        let (copied_bytes, total_bytes) = (self.copied.load(Relaxed), self.total.load(Relaxed));
        rpc::FillSnapshotResponse { copied_bytes, total_bytes, ..Default::default() }
    }

    fn ended(&self) -> Option<Result<InstanceId, String>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Shared {
    async fn bring(&self, wanted: Wanted, progress: &Progress) -> Result<InstanceId, Trouble> {
        let (object, size, created_ms) = self.look(wanted.snapshot).await?;
        // For recovery, should the source have lost what lies beside it.
        let named = Descriptor::Snapshot { name: object.name.clone(), group: None, made_for: object.made_for }.encode();
        let here = object.copies.iter().filter(|(_, node)| **node == self.node);
        let new = NewFill {
            snapshot: wanted.snapshot,
            volume: object.volume,
            copy: wanted.copy,
            size,
            created_ms,
            base: wanted.base,
            said_in: here.map(|(copy, _)| *copy).collect::<BTreeSet<_>>(),
        };
        let fill = match self.manager.begin_fill(new).await? {
            Begun::There(tree) => return Ok(tree),
            Begun::Fill(fill) => fill,
        };
        match self.copy(&fill, &wanted, (size, named), progress).await {
            Ok(()) => {
                let bytes = progress.copied.load(Relaxed);
                tracing::info!(snapshot = %wanted.snapshot, from = %wanted.source, bytes, "a snapshot was brought over");
                Ok(wanted.copy)
            }
            Err(error) => {
                self.manager.give_up_fill(fill).await;
                Err(error)
            }
        }
    }

    /// The snapshot, if it shall be brought over to this node, its size, and when it was taken.
    async fn look(&self, snapshot: SnapshotId) -> Result<(Snapshot, VolumeSize, u64), Trouble> {
        let stored = self.catalog.get::<Snapshot>(&snapshot.to_string()).await?;
        let wanted = stored.map(|stored| stored.object);
        let wanted = wanted.filter(|object| !object.deleted && object.strays.contains(&self.node));
        match wanted {
            Some(object) => match object.status {
                SnapshotStatus::Ready { size, created_ms } => Ok((object, size, created_ms)),
                SnapshotStatus::Creating => Err(Trouble::NotWanted(snapshot)),
            },
            None => Err(Trouble::NotWanted(snapshot)),
        }
    }

    async fn copy(
        &self,
        fill: &Fill,
        wanted: &Wanted,
        (size, named): (VolumeSize, String),
        progress: &Progress,
    ) -> Result<(), Trouble> {
        let mut source = self.open(wanted, fill.base(), size).await?;
        let first = source.next().await?;
        let Begin { data_bytes, descriptor } = beginning(&source.node, first, size)?;
        progress.total.store(data_bytes, Relaxed);
        self.manager.open_fill(fill, data_bytes).await?;
        let mut way = Way { size, next: 0, left: data_bytes };
        let (mut burst, mut began) = (0, Instant::now());
        loop {
            let piece = match source.next().await? {
                Part::Piece(piece) => piece,
                Part::End(_) => break,
                Part::Begin(_) => return Err(source.senseless("two beginnings")),
            };
            let (request, data) = way.request(&source.node, piece)?;
            progress.copied.fetch_add(data.len() as u64, Relaxed);
            self.manager.fill(fill, request, data).await?;
            burst += 1;
            if burst == BURST {
                tokio::time::sleep(began.elapsed().min(LONGEST_REST)).await;
                (burst, began) = (0, Instant::now());
            }
        }
        self.manager.fill(fill, Request::Flush, Bytes::new()).await?;
        let held = self.held(fill, wanted.snapshot).await?;
        let descriptor = if descriptor.is_empty() { named } else { descriptor };
        Ok(self.manager.seal_filled(fill, held, descriptor).await?)
    }

    /// Held against a deletion, and still wanted. A catalogue that is away for a while does not spoil what has taken hours.
    async fn held(&self, fill: &Fill, snapshot: SnapshotId) -> Result<OperationGuard, Trouble> {
        let until = Instant::now() + CATALOGUE_LIMIT;
        loop {
            let held = self.manager.hold_filled(fill).await?;
            match self.look(snapshot).await {
                Ok(_) => return Ok(held),
                Err(Trouble::Catalogue(_)) if Instant::now() < until => {}
                Err(error) => return Err(error),
            }
            drop(held);
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn open(&self, wanted: &Wanted, base: Option<SnapshotId>, size: VolumeSize) -> Result<Source, Trouble> {
        let node = wanted.source.clone();
        let stored = self.catalog.get::<Node>(&node.0).await?;
        let address = stored.ok_or_else(|| Trouble::NoNode(node.clone()))?.object.control;
        let mut client = SnapshotsClient::new(channel(node.clone(), address, Arc::clone(&self.credentials)));
        let request = rpc::ReadSnapshotRequest {
            snapshot_id: wanted.snapshot.to_string(),
            base_snapshot_id: base.map(|base| base.to_string()).unwrap_or_default(),
            size_bytes: size.bytes(),
        };
        match timeout(MESSAGE_LIMIT, client.read_snapshot(request)).await {
            Ok(Ok(answer)) => Ok(Source { node, stream: answer.into_inner() }),
            Ok(Err(status)) => Err(Trouble::Source { node, text: status.message().to_owned() }),
            Err(_) => Err(Trouble::Source { node, text: "it does not answer".to_owned() }),
        }
    }
}

/// What another node sends.
struct Source {
    node: NodeName,
    stream: Streaming<rpc::ReadSnapshotResponse>,
}

impl Source {
    async fn next(&mut self) -> Result<Part, Trouble> {
        let told = |text: &str| Trouble::Source { node: self.node.clone(), text: text.to_owned() };
        match timeout(MESSAGE_LIMIT, self.stream.message()).await {
            Ok(Ok(Some(message))) => message.part.ok_or_else(|| self.senseless("an empty message")),
            Ok(Ok(None)) => Err(told("it has stopped before the end")),
            Ok(Err(status)) => Err(told(status.message())),
            Err(_) => Err(told("it sends nothing any more")),
        }
    }

    fn senseless(&self, what: &'static str) -> Trouble {
        Trouble::Senseless { node: self.node.clone(), what }
    }
}

/// What the source says before its pieces.
fn beginning(node: &NodeName, part: Part, size: VolumeSize) -> Result<Begin, Trouble> {
    let senseless = |what| Err(Trouble::Senseless { node: node.clone(), what });
    match part {
        // Space is promised for that, whoever says it.
        Part::Begin(begin) if begin.data_bytes > size.bytes() => senseless("more data than the snapshot is large"),
        Part::Begin(begin) => Ok(begin),
        Part::Piece(_) | Part::End(_) => senseless("no beginning"),
    }
}

/// What may still come.
struct Way {
    size: VolumeSize,
    next: u64,
    left: u64,
}

impl Way {
    /// What a piece asks for, with its data where direct I/O takes them; a piece that breaks a rule is refused.
    fn request(&mut self, node: &NodeName, piece: Piece) -> Result<(Request, Bytes), Trouble> {
        let senseless = |what| Trouble::Senseless { node: node.clone(), what };
        let Piece { offset, length, data, checksums } = piece;
        let range = BlockRange::from_bytes(offset, length).ok_or_else(|| senseless("a piece of no blocks"))?;
        if range.start() < self.next || range.end() > self.size.blocks() {
            return Err(senseless("a piece out of order, or past the end"));
        }
        self.next = range.end();
        if data.is_empty() {
            return Ok((Request::WriteZeroes(range), Bytes::new()));
        }
        if data.len() as u64 != length
            || range.count() > MAX_REQUEST_BLOCKS
            || checksums.len() != range.count() as usize
        {
            return Err(senseless("a piece with too much data, or too little"));
        }
        self.left = self.left.checked_sub(length).ok_or_else(|| senseless("more data than was announced"))?;
        let mut blocks = Blocks::new(data.len());
        blocks.bytes_mut().copy_from_slice(&data);
        for (index, (block, sent)) in blocks.bytes_mut().chunks(BLOCK_SIZE as usize).zip(checksums).enumerate() {
            let found = crc32c::crc32c(block);
            if found != sent {
                return Err(Trouble::Damaged { node: node.clone(), block: range.start() + index as u64, found, sent });
            }
        }
        Ok((Request::Write(range), blocks.freeze()))
    }
}

/// A connection to the replica of another node, and of no other.
fn channel(node: NodeName, address: SocketAddr, credentials: Arc<Credentials>) -> Channel {
    let endpoint = Endpoint::from_static("http://localhost")
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    // A name that is none in a certificate is nobody's.
    let expected = Expected { role: Some(Role::Node), name: node.0.parse().ok() };
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let (credentials, expected) = (Arc::clone(&credentials), expected.clone());
        async move {
            let slow = || io::Error::new(io::ErrorKind::TimedOut, format!("{address} cannot be connected"));
            let connected = timeout(CONNECT_LIMIT, dial(&address.to_string(), &credentials, expected)).await;
            connected.map_err(|_| slow())?.map(TokioIo::new)
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, length: u64, data: Vec<u8>) -> Piece {
        let checksums = data.chunks(BLOCK_SIZE as usize).map(crc32c::crc32c).collect();
        Piece { offset, length, data, checksums }
    }

    #[test]
    fn no_space_is_promised_for_more_than_there_can_be() {
        let (node, size) = (NodeName("n2".into()), VolumeSize::try_from(1 << 20).expect("a size"));
        let begin = |data_bytes| Part::Begin(Begin { data_bytes, ..Default::default() });
        assert_eq!(beginning(&node, begin(1 << 20), size).expect("good").data_bytes, 1 << 20);
        for part in [begin((1 << 20) + 1), begin(u64::MAX), Part::Piece(piece(0, 4096, Vec::new()))] {
            let refused = beginning(&node, part, size).expect_err("senseless");
            assert!(matches!(refused, Trouble::Senseless { .. }), "{refused}");
        }
    }

    #[test]
    fn what_breaks_a_rule_is_not_written() {
        let node = NodeName("n2".into());
        let way = || Way { size: VolumeSize::try_from(1 << 20).expect("a size"), next: 4, left: 8192 };
        let block = vec![7; 4096];
        let good = way().request(&node, piece(4 * 4096, 4096, block.clone())).expect("good");
        assert_eq!(good, (Request::Write(BlockRange::new(4, 1).expect("a block")), block.clone().into()));
        let zeros = way().request(&node, piece(4096 * 200, 4096 * 56, Vec::new())).expect("good");
        assert_eq!(zeros.0, Request::WriteZeroes(BlockRange::new(200, 56).expect("blocks")));
        let mut damaged = piece(4 * 4096, 4096, block.clone());
        damaged.data[9] ^= 1;
        let refused = way().request(&node, damaged).expect_err("damaged");
        assert!(matches!(refused, Trouble::Damaged { block: 4, .. }), "{refused}");
        let bad = [
            piece(3 * 4096, 4096, block.clone()),
            piece(256 * 4096, 4096, block.clone()),
            piece(4 * 4096, 100, Vec::new()),
            piece(4 * 4096, 0, Vec::new()),
            piece(4 * 4096, 8192, block.clone()),
            piece(u64::MAX - 4095, 4096, block.clone()),
            piece(4 * 4096, 3 * 4096, vec![7; 3 * 4096]),
            Piece { checksums: Vec::new(), ..piece(4 * 4096, 4096, block) },
        ];
        for piece in bad {
            let refused = way().request(&node, piece).expect_err("senseless");
            assert!(matches!(refused, Trouble::Senseless { .. }), "{refused}");
        }
    }
}
