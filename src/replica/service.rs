//! The control socket: `proto/control.proto` over the manager. Parsing and conversion only.

use super::engine::CopyState;
use super::filler::Filler;
use super::manager::{
    AddPool, CopyView, HealthKind, Manager, MirrorView, NewSnapshot, NewVolume, PoolView, RecordView, SnapshotView,
    Source, UnopenedView, VolumeFailure, VolumeView,
};
use super::pool::PoolName;
use super::{digest, extents, verify};
use crate::catalog::{NodeName, VolumeConfiguration};
use crate::protocol::{Primary, Role};
use crate::rpc::control as rpc;
use crate::rpc::control::replica_server::Replica;
use crate::volume::{BLOCK_SIZE, InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::path::PathBuf;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Messages that a slow reader of a stream may leave unread before the walk waits for it.
const STREAM_DEPTH: usize = 8;

/// The service.
#[derive(Clone)]
pub struct ReplicaService {
    manager: Manager,
    node_id: String,
    /// Whether its connections to other replicas are encrypted, if there are others.
    encrypted: Option<bool>,
    filler: Option<Filler>,
}

impl ReplicaService {
    /// Serves `manager` as the node `node_id`, whose connections to other replicas are encrypted or not, if there are others.
    pub fn new(manager: Manager, node_id: String, encrypted: Option<bool>) -> Self {
        Self { manager, node_id, encrypted, filler: None }
    }

    /// The same, which brings snapshots over from other nodes.
    #[must_use]
    pub fn with_filler(self, filler: Filler) -> Self {
        Self { filler: Some(filler), ..self }
    }

    async fn view(&self, volume: VolumeId) -> Result<Response<rpc::Volume>, Status> {
        if let Some(view) = self.manager.volume(volume).await {
            return Ok(Response::new(told(view.into(), self.encrypted)));
        }
        self.manager.all_open_for(&volume.to_string(), None).await.map_err(VolumeFailure::from)?;
        Err(VolumeFailure::NoVolume(volume).into())
    }
}

/// An id of ours, or "there is none": the shape of an id is never an error by itself.
fn volume_id(text: &str) -> Result<VolumeId, Status> {
    text.parse().map_err(|_| Status::not_found(format!("there is no volume {text:?} on this node")))
}

fn snapshot_id(text: &str) -> Result<SnapshotId, Status> {
    text.parse().map_err(|_| Status::not_found(format!("there is no snapshot {text:?} on this node")))
}

/// An id of something to be made: here its shape matters.
fn new_id<T: std::str::FromStr>(text: &str) -> Result<T, Status> {
    text.parse().map_err(|_| Status::invalid_argument(format!("{text:?} is no id of Tandem (a random UUID)")))
}

/// What changes something runs to its end even if the caller goes away: a killed CSI process closes its connection, and
/// half a creation would be known to nobody until the next start.
async fn to_the_end<T, E>(work: impl Future<Output = Result<T, E>> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: Send + 'static,
    Status: From<E>,
{
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(error) => {
            tracing::error!(%error, "a call ended by a bug");
            Err(Status::internal("the call ended by a bug of the replica: see its log"))
        }
    }
}

fn size(bytes: u64) -> Result<VolumeSize, Status> {
    VolumeSize::try_from(bytes).map_err(|e| Status::out_of_range(e.to_string()))
}

impl TryFrom<rpc::EnsureVolumeRequest> for NewVolume {
    type Error = Status;
    fn try_from(r: rpc::EnsureVolumeRequest) -> Result<Self, Status> {
        use rpc::ensure_volume_request::Source as From;
        let pool: PoolName = r.pool.parse().map_err(|e| Status::not_found(format!("{e}")))?;
        let source = match r.source {
            None => Source::Blank,
            Some(From::SourceSnapshotId(id)) => Source::Snapshot(snapshot_id(&id)?),
            Some(From::SourceVolumeId(id)) => Source::Volume(volume_id(&id)?),
        };
        Ok(Self {
            volume: new_id(&r.volume_id)?,
            pool,
            size: size(r.size_bytes)?,
            descriptor: r.descriptor,
            verify_reads: r.verify_reads,
            source,
        })
    }
}

impl From<VolumeView> for rpc::Volume {
    fn from(v: VolumeView) -> Self {
        let health = v.health.into_iter().map(|h| rpc::Health {
            kind: match h.kind {
                HealthKind::Degraded => rpc::health::Kind::Degraded.into(),
                HealthKind::Inaccessible => rpc::health::Kind::Inaccessible.into(),
                HealthKind::DataLoss => rpc::health::Kind::DataLoss.into(),
            },
            reason: h.reason.to_owned(),
            message: h.message,
        });
        Self {
            volume_id: v.volume.to_string(),
            pool: v.pool,
            size_bytes: v.size,
            ready: v.copy.is_none(),
            copied_bytes: v.copy.map_or(0, |c| c.copied),
            to_copy_bytes: v.copy.map_or(0, |c| c.total),
            allocated_bytes: v.allocated,
            device: v.device.map(|d| d.display().to_string()).unwrap_or_default(),
            descriptor: v.descriptor,
            verify_reads: v.verify_reads,
            health: health.collect(),
            layers: v.layers,
            unchecked_bytes: v.unchecked,
            merging_layers: v.merging_layers,
            mirror: v.mirror.map(Into::into),
            record: v.record.map(|record| record_message(v.volume, record)),
            tree_id: v.tree.to_string(),
            written: v.written,
        }
    }
}

/// With what follows for it from the setting of this node.
fn told(mut volume: rpc::Volume, encrypted: Option<bool>) -> rpc::Volume {
    if encrypted == Some(false) && volume.record.is_some() {
        let message = "what its copies send each other is not encrypted: their nodes have --encryption off".to_owned();
        let (kind, reason) = (rpc::health::Kind::Note.into(), "NotEncrypted".to_owned());
        volume.health.push(rpc::Health { kind, reason, message });
    }
    volume
}

fn record_message(volume: VolumeId, record: RecordView) -> rpc::CopyRecord {
    let RecordView { copy, removing, peers, record } = record;
    let peer =
        |(copy, node): (InstanceId, NodeName)| rpc::copy_record::Peer { copy_id: copy.to_string(), node: node.0 };
    rpc::CopyRecord {
        copy_id: copy.to_string(),
        removing,
        peers: peers.into_iter().map(peer).collect(),
        intact: record.as_ref().is_some_and(|record| record.intact),
        configuration: record
            .map(|record| VolumeConfiguration::new(volume, &record.configuration).encode())
            .unwrap_or_default(),
    }
}

impl From<MirrorView> for rpc::Mirror {
    fn from(m: MirrorView) -> Self {
        let role = match m.role {
            Role::Outdated => rpc::mirror::Role::Outdated,
            Role::Candidate => rpc::mirror::Role::Candidate,
            Role::Secondary => rpc::mirror::Role::Secondary,
            Role::Primary(Primary::Reconciling) => rpc::mirror::Role::PrimaryReconciling,
            Role::Primary(Primary::Settling) => rpc::mirror::Role::PrimarySettling,
            Role::Primary(Primary::Serving) => rpc::mirror::Role::Primary,
        };
        Self {
            role: role.into(),
            serves: m.serves,
            generation: m.stamp.generation.0,
            version: m.stamp.version.0,
            intact: m.intact,
            wished: m.wished,
            copies: m.copies.into_iter().map(Into::into).collect(),
            copied_bytes: m.copied,
            equal_bytes: m.equal,
            hot_extents: m.hot_extents,
            requests: m.requests,
        }
    }
}

impl From<CopyView> for rpc::Copy {
    fn from(c: CopyView) -> Self {
        let (state, [copied_bytes, equal_bytes, left_bytes]) = match c.state {
            CopyState::UpToDate => (rpc::copy::State::UpToDate, [0; 3]),
            CopyState::SyncTarget { copied_bytes, equal_bytes, left_bytes } => {
                (rpc::copy::State::SyncTarget, [copied_bytes, equal_bytes, left_bytes])
            }
            CopyState::Outdated => (rpc::copy::State::Outdated, [0; 3]),
        };
        Self {
            copy_id: c.copy.to_string(),
            node: c.node.map(|node| node.to_string()).unwrap_or_default(),
            here: c.here,
            member: c.member,
            primary: c.primary,
            state: state.into(),
            connected: c.connected,
            copied_bytes,
            equal_bytes,
            left_bytes,
        }
    }
}

impl From<PoolView> for rpc::Pool {
    fn from(p: PoolView) -> Self {
        Self {
            name: p.name.to_string(),
            path: p.path.display().to_string(),
            id: p.id,
            capacity_bytes: p.capacity,
            promised_bytes: p.promised,
            used_bytes: p.used,
            free_bytes: p.free,
            largest_volume_bytes: p.largest_volume,
            overcommit: p.overcommit,
            filesystem: p.filesystem.to_owned(),
            problem: p.problem,
        }
    }
}

impl From<SnapshotView> for rpc::Snapshot {
    fn from(view: SnapshotView) -> Self {
        let SnapshotView { info, pool, tree, descriptor } = view;
        Self {
            snapshot_id: info.snapshot.to_string(),
            volume_id: info.volume.to_string(),
            pool: pool.to_string(),
            size_bytes: info.size.bytes(),
            created_ms: info.created_ms,
            allocated_bytes: info.allocated_blocks * BLOCK_SIZE,
            checksummed: info.checksummed,
            descriptor,
            copy_id: tree.to_string(),
            copies: Vec::new(),
        }
    }
}

fn new_snapshots(request: rpc::EnsureSnapshotsRequest) -> Result<Vec<NewSnapshot>, Status> {
    let new = |item: rpc::ensure_snapshots_request::Item| {
        let (snapshot, volume) = (new_id(&item.snapshot_id)?, volume_id(&item.volume_id)?);
        Ok(NewSnapshot { snapshot, volume, descriptor: item.descriptor })
    };
    request.items.into_iter().map(new).collect()
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    type GetExtentsStream = ReceiverStream<Result<rpc::GetExtentsResponse, Status>>;
    type VerifyVolumeStream = ReceiverStream<Result<rpc::VerifyVolumeResponse, Status>>;
    type DigestSnapshotStream = ReceiverStream<Result<rpc::DigestSnapshotResponse, Status>>;

    async fn get_status(&self, _: Request<rpc::GetStatusRequest>) -> Result<Response<rpc::GetStatusResponse>, Status> {
        let engine = self.manager.engine_status();
        Ok(Response::new(rpc::GetStatusResponse {
            node_id: self.node_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            io_engine: engine.io.to_owned(),
            device: "fuse+loop".to_owned(),
            pid: u64::from(std::process::id()),
            recovered_requests: engine.recovered_requests,
            attached_volumes: self.manager.attached().len() as u64,
            holder_connected: engine.holder_connected,
            encryption: self.encrypted.map_or("", |on| if on { "on" } else { "off" }).to_owned(),
        }))
    }

    async fn list_pools(&self, _: Request<rpc::ListPoolsRequest>) -> Result<Response<rpc::ListPoolsResponse>, Status> {
        let pools = self.manager.list_pools().await.into_iter().map(Into::into).collect();
        Ok(Response::new(rpc::ListPoolsResponse { pools }))
    }

    async fn add_pool(&self, r: Request<rpc::AddPoolRequest>) -> Result<Response<rpc::AddPoolResponse>, Status> {
        let r = r.into_inner();
        let name = r.name.parse().map_err(|e| Status::invalid_argument(format!("{e}")))?;
        let path = PathBuf::from(r.path);
        if !path.is_absolute() {
            return Err(Status::invalid_argument(format!("pool path {} is not absolute", path.display())));
        }
        let (manager, add) = (self.manager.clone(), AddPool { name, path, force: r.force });
        let pool = to_the_end(async move { manager.add_pool(add).await }).await?;
        Ok(Response::new(rpc::AddPoolResponse { pool: Some(pool.into()) }))
    }

    async fn ensure_volume(&self, r: Request<rpc::EnsureVolumeRequest>) -> Result<Response<rpc::Volume>, Status> {
        let new = NewVolume::try_from(r.into_inner())?;
        let volume = new.volume;
        let manager = self.manager.clone();
        to_the_end(async move { manager.ensure_volume(new).await }).await?;
        self.view(volume).await
    }

    async fn delete_volume(
        &self,
        r: Request<rpc::DeleteVolumeRequest>,
    ) -> Result<Response<rpc::DeleteVolumeResponse>, Status> {
        let rpc::DeleteVolumeRequest { volume_id, pool, unwritten } = r.into_inner();
        if let Ok(volume) = volume_id.parse() {
            let manager = self.manager.clone();
            to_the_end(async move { manager.ensure_no_volume(volume, &pool, unwritten).await }).await?;
        }
        Ok(Response::new(rpc::DeleteVolumeResponse {}))
    }

    async fn get_volume(&self, r: Request<rpc::GetVolumeRequest>) -> Result<Response<rpc::Volume>, Status> {
        self.view(volume_id(&r.into_inner().volume_id)?).await
    }

    async fn list_volumes(
        &self,
        _: Request<rpc::ListVolumesRequest>,
    ) -> Result<Response<rpc::ListVolumesResponse>, Status> {
        // Before what is there is looked at: a pool that is opened meanwhile may have more.
        let unopened = self.manager.unopened().into_iter();
        let unopened = unopened.map(|UnopenedView { pool, problem }| rpc::Unopened { pool: pool.to_string(), problem });
        let unopened = unopened.collect();
        let volumes = self.manager.volumes().await.into_iter().map(|view| told(view.into(), self.encrypted)).collect();
        Ok(Response::new(rpc::ListVolumesResponse { volumes, unopened }))
    }

    async fn expand_volume(&self, r: Request<rpc::ExpandVolumeRequest>) -> Result<Response<rpc::Volume>, Status> {
        let r = r.into_inner();
        let volume = volume_id(&r.volume_id)?;
        let (manager, size) = (self.manager.clone(), size(r.size_bytes)?);
        to_the_end(async move { manager.expand_volume(volume, size).await }).await?;
        self.view(volume).await
    }

    async fn modify_volume(&self, r: Request<rpc::ModifyVolumeRequest>) -> Result<Response<rpc::Volume>, Status> {
        let r = r.into_inner();
        let volume = volume_id(&r.volume_id)?;
        let manager = self.manager.clone();
        to_the_end(async move { manager.modify_volume(volume, r.verify_reads, r.descriptor).await }).await?;
        self.view(volume).await
    }

    async fn attach_volume(
        &self,
        r: Request<rpc::AttachVolumeRequest>,
    ) -> Result<Response<rpc::AttachVolumeResponse>, Status> {
        let (manager, volume) = (self.manager.clone(), volume_id(&r.into_inner().volume_id)?);
        let device = to_the_end(async move { manager.attach(volume).await }).await?;
        Ok(Response::new(rpc::AttachVolumeResponse { device: device.display().to_string() }))
    }

    async fn detach_volume(
        &self,
        r: Request<rpc::DetachVolumeRequest>,
    ) -> Result<Response<rpc::DetachVolumeResponse>, Status> {
        let rpc::DetachVolumeRequest { volume_id, abandon } = r.into_inner();
        if let Ok(volume) = volume_id.parse() {
            let manager = self.manager.clone();
            to_the_end(
                async move { if abandon { manager.abandon(volume).await } else { manager.detach(volume).await } },
            )
            .await?;
        }
        Ok(Response::new(rpc::DetachVolumeResponse {}))
    }

    async fn resync_copy(
        &self,
        r: Request<rpc::ResyncCopyRequest>,
    ) -> Result<Response<rpc::ResyncCopyResponse>, Status> {
        let rpc::ResyncCopyRequest { volume_id: volume, copy_id } = r.into_inner();
        let (volume, copy) = (volume_id(&volume)?, new_id(&copy_id)?);
        self.manager.resync(volume, copy).await?;
        Ok(Response::new(rpc::ResyncCopyResponse {}))
    }

    async fn ensure_snapshots(
        &self,
        r: Request<rpc::EnsureSnapshotsRequest>,
    ) -> Result<Response<rpc::EnsureSnapshotsResponse>, Status> {
        let items = new_snapshots(r.into_inner())?;
        let (manager, wanted) = (self.manager.clone(), items.clone());
        let copies = to_the_end(async move { manager.ensure_snapshots(&wanted).await }).await?;
        let mut listed = self.manager.list_snapshots().await;
        listed.retain(|view| items.iter().any(|item| item.snapshot == view.info.snapshot));
        let message = |view: SnapshotView| {
            let copies = copies.get(&view.info.snapshot).into_iter().flatten().map(ToString::to_string).collect();
            rpc::Snapshot { copies, ..view.into() }
        };
        Ok(Response::new(rpc::EnsureSnapshotsResponse { snapshots: listed.into_iter().map(message).collect() }))
    }

    async fn promise_snapshots(
        &self,
        r: Request<rpc::EnsureSnapshotsRequest>,
    ) -> Result<Response<rpc::PromiseSnapshotsResponse>, Status> {
        let (manager, items) = (self.manager.clone(), new_snapshots(r.into_inner())?);
        to_the_end(async move { manager.promise_snapshots(&items).await }).await?;
        Ok(Response::new(rpc::PromiseSnapshotsResponse {}))
    }

    async fn adopt_snapshots(
        &self,
        r: Request<rpc::EnsureSnapshotsRequest>,
    ) -> Result<Response<rpc::AdoptSnapshotsResponse>, Status> {
        let (manager, items) = (self.manager.clone(), new_snapshots(r.into_inner())?);
        to_the_end(async move { manager.adopt_snapshots(&items).await }).await?;
        Ok(Response::new(rpc::AdoptSnapshotsResponse {}))
    }

    async fn fill_snapshot(
        &self,
        r: Request<rpc::FillSnapshotRequest>,
    ) -> Result<Response<rpc::FillSnapshotResponse>, Status> {
        let alone = || Status::failed_precondition("only a cluster's controller asks for snapshots of other nodes");
        Ok(Response::new(self.filler.as_ref().ok_or_else(alone)?.fill(r.into_inner())?))
    }

    async fn delete_snapshot(
        &self,
        r: Request<rpc::DeleteSnapshotRequest>,
    ) -> Result<Response<rpc::DeleteSnapshotResponse>, Status> {
        let rpc::DeleteSnapshotRequest { snapshot_id, pool, mirrored } = r.into_inner();
        if let Ok(snapshot) = snapshot_id.parse() {
            let manager = self.manager.clone();
            to_the_end(async move { manager.ensure_no_snapshot(snapshot, &pool, mirrored).await }).await?;
        }
        Ok(Response::new(rpc::DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        _: Request<rpc::ListSnapshotsRequest>,
    ) -> Result<Response<rpc::ListSnapshotsResponse>, Status> {
        let listed = self.manager.list_snapshots().await;
        let snapshots = listed.into_iter().map(Into::into).collect();
        Ok(Response::new(rpc::ListSnapshotsResponse { snapshots }))
    }

    async fn look_for(&self, r: Request<rpc::LookForRequest>) -> Result<Response<rpc::LookForResponse>, Status> {
        let rpc::LookForRequest { id, pool } = r.into_inner();
        self.manager.look_for(&id, &pool).await.map_err(VolumeFailure::from)?;
        Ok(Response::new(rpc::LookForResponse {}))
    }

    async fn get_extents(
        &self,
        r: Request<rpc::GetExtentsRequest>,
    ) -> Result<Response<Self::GetExtentsStream>, Status> {
        let r = r.into_inner();
        let target = snapshot_id(&r.target_snapshot_id)?;
        let base = if r.base_snapshot_id.is_empty() { None } else { Some(snapshot_id(&r.base_snapshot_id)?) };
        let stream = self.manager.extents(target, base, r.loose).await?;
        let (send, receive) = mpsc::channel(STREAM_DEPTH);
        tokio::task::spawn_blocking(move || extents::send(&stream, r.starting_offset, &send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn verify_volume(
        &self,
        r: Request<rpc::VerifyVolumeRequest>,
    ) -> Result<Response<Self::VerifyVolumeStream>, Status> {
        let volume = volume_id(&r.into_inner().volume_id)?;
        let (send, receive) = mpsc::channel(STREAM_DEPTH);
        let job = verify::prepare(&self.manager, volume).await?;
        tokio::task::spawn_blocking(move || job.run(&send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn digest_snapshot(
        &self,
        r: Request<rpc::DigestSnapshotRequest>,
    ) -> Result<Response<Self::DigestSnapshotStream>, Status> {
        let r = r.into_inner();
        let (snapshot, bytes) = (snapshot_id(&r.snapshot_id)?, size(r.length_bytes)?.bytes());
        let job = digest::prepare(&self.manager, snapshot, bytes, r.bytes_per_second).await?;
        let (send, receive) = mpsc::channel(STREAM_DEPTH);
        tokio::task::spawn_blocking(move || job.run(&send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

#[cfg(test)]
mod tests;
