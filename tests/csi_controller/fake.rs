//! A replica in memory behind a real control socket: it counts promised bytes, and fails where a test says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tandem::rpc::control::replica_server::{Replica, ReplicaServer};
use tandem::rpc::control::*;
use tandem::volume::InstanceId;
use tokio::net::UnixListener;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Code, Request, Response, Status, async_trait};

/// Where a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Nothing was done.
    Before,
    /// It was done, but the caller does not hear of it.
    After,
}

#[derive(Default)]
pub struct State {
    pub volumes: BTreeMap<String, Volume>,
    pub snapshots: BTreeMap<String, Snapshot>,
    pub pools: BTreeMap<String, u64>,
    /// Names of the calls, in order.
    pub calls: Vec<&'static str>,
    /// The call with this number (from 0, counted in `calls`) fails.
    pub fail: Option<(usize, When, Code)>,
    /// Volumes with a source stay incomplete.
    pub copying: bool,
    /// A pool that cannot be opened has what is not known here.
    pub closed: bool,
    /// What this node says of pools that are not open.
    pub unopened: Vec<Unopened>,
    /// Every call takes this long.
    pub delay: Duration,
    /// What the extent stream answers.
    pub extents: Vec<Result<GetExtentsResponse, Status>>,
    pub extents_asked: Option<GetExtentsRequest>,
    /// What is not all zeros, by extents of 4 MiB.
    pub digests: BTreeMap<u64, Vec<u8>>,
    /// What was to be brought over from other nodes, each once.
    pub filled: Vec<FillSnapshotRequest>,
    /// What is said instead of doing it: nothing, as long as it is under way, or what has failed.
    pub filling: Option<String>,
    /// That is so for one snapshot alone.
    pub fails: Option<String>,
    /// Copies of a mirrored volume that follow a seal here, by volume.
    pub members: BTreeMap<String, Vec<String>>,
    /// The name of this node's only tree.
    pub tree: String,
    clock: u64,
}

impl State {
    pub fn promised(&self, pool: &str) -> u64 {
        let volumes = self.volumes.values().filter(|v| v.pool == pool).map(|v| v.size_bytes);
        let snapshots = self.snapshots.values().filter(|s| s.pool == pool).map(|s| s.size_bytes);
        volumes.sum::<u64>() + snapshots.sum::<u64>()
    }

    fn reserve(&self, pool: &str, bytes: u64) -> Result<(), Status> {
        let capacity = *self.pools.get(pool).ok_or_else(|| Status::not_found(format!("no pool {pool}")))?;
        let free = capacity.saturating_sub(self.promised(pool));
        if bytes > free {
            return Err(Status::resource_exhausted(format!("pool {pool} has {free} bytes to promise, not {bytes}")));
        }
        Ok(())
    }

    fn ensure_volume(&mut self, wanted: EnsureVolumeRequest) -> Result<Volume, Status> {
        if let Some(there) = self.volumes.get(&wanted.volume_id) {
            return Ok(there.clone());
        }
        let has_source = wanted.source.is_some();
        let found = match &wanted.source {
            None => true,
            Some(ensure_volume_request::Source::SourceSnapshotId(id)) => self.snapshots.contains_key(id),
            Some(ensure_volume_request::Source::SourceVolumeId(id)) => self.volumes.contains_key(id),
        };
        if !found {
            return Err(Status::not_found("no such source"));
        }
        self.reserve(&wanted.pool, wanted.size_bytes)?;
        let volume = Volume {
            volume_id: wanted.volume_id.clone(),
            pool: wanted.pool,
            size_bytes: wanted.size_bytes,
            descriptor: wanted.descriptor,
            verify_reads: wanted.verify_reads,
            ready: !(has_source && self.copying),
            to_copy_bytes: if has_source { wanted.size_bytes } else { 0 },
            tree_id: InstanceId::random().to_string(),
            ..Default::default()
        };
        self.volumes.insert(wanted.volume_id, volume.clone());
        Ok(volume)
    }

    fn ensure_snapshots(&mut self, items: Vec<ensure_snapshots_request::Item>) -> Result<Vec<Snapshot>, Status> {
        let mut bytes = 0;
        for item in items.iter().filter(|item| !self.snapshots.contains_key(&item.snapshot_id)) {
            let volume = self.volumes.get(&item.volume_id).ok_or_else(|| Status::not_found(item.volume_id.clone()))?;
            bytes += volume.size_bytes;
            self.reserve(&volume.pool, bytes)?;
        }
        self.clock += 1;
        for item in &items {
            let Some(volume) = self.volumes.get(&item.volume_id) else { continue };
            let snapshot = Snapshot {
                snapshot_id: item.snapshot_id.clone(),
                volume_id: item.volume_id.clone(),
                pool: volume.pool.clone(),
                size_bytes: volume.size_bytes,
                created_ms: 1_700_000_000_000 + self.clock,
                descriptor: item.descriptor.clone(),
                copy_id: self.tree.clone(),
                copies: self.members.get(&item.volume_id).cloned().unwrap_or_default(),
                ..Default::default()
            };
            self.snapshots.entry(item.snapshot_id.clone()).or_insert(snapshot);
        }
        Ok(items.iter().map(|item| self.snapshots[&item.snapshot_id].clone()).collect())
    }

    fn volume(&mut self, id: &str) -> Result<&mut Volume, Status> {
        self.volumes.get_mut(id).ok_or_else(|| Status::not_found(format!("no volume {id}")))
    }
}

/// Handles to one replica.
#[derive(Clone, Default)]
pub struct Fake(Arc<Mutex<State>>);

impl Fake {
    /// Listens in `directory`; the pool "default" has `capacity` bytes.
    pub fn start(directory: &Path, capacity: u64) -> (Self, PathBuf) {
        let fake = Self::default();
        fake.state().pools.insert("default".into(), capacity);
        let socket = directory.join("replica.sock");
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("a socket"));
        let server = tonic::transport::Server::builder().add_service(ReplicaServer::new(fake.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        (fake, socket)
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("the state")
    }

    /// The call `number` calls from now fails.
    pub fn fail_call(&self, number: usize, when: When, code: Code) {
        let mut state = self.state();
        state.fail = Some((state.calls.len() + number, when, code));
    }

    async fn call<R>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut State) -> Result<R, Status>,
    ) -> Result<Response<R>, Status> {
        let delay = self.state().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let mut state = self.state();
        let number = state.calls.len();
        state.calls.push(name);
        let fault = state.fail.filter(|(at, ..)| *at == number);
        let lost = |code| Err(Status::new(code, "planted"));
        match fault {
            Some((_, When::Before, code)) => lost(code),
            Some((_, When::After, code)) => {
                let _ = work(&mut state);
                lost(code)
            }
            None => work(&mut state).map(Response::new),
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl Replica for Fake {
    type GetExtentsStream = ReceiverStream<Result<GetExtentsResponse, Status>>;
    type VerifyVolumeStream = ReceiverStream<Result<VerifyVolumeResponse, Status>>;
    type DigestSnapshotStream = ReceiverStream<Result<DigestSnapshotResponse, Status>>;

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Answer<GetStatusResponse> {
        self.call("GetStatus", |_| Ok(GetStatusResponse::default())).await
    }

    async fn list_pools(&self, _: Request<ListPoolsRequest>) -> Answer<ListPoolsResponse> {
        self.call("ListPools", |state| {
            let pools = state.pools.iter().map(|(name, capacity)| Pool {
                name: name.clone(),
                capacity_bytes: *capacity,
                promised_bytes: state.promised(name),
                largest_volume_bytes: capacity.saturating_sub(state.promised(name)),
                ..Default::default()
            });
            Ok(ListPoolsResponse { pools: pools.collect() })
        })
        .await
    }

    async fn add_pool(&self, _: Request<AddPoolRequest>) -> Answer<AddPoolResponse> {
        Err(Status::unimplemented("not asked by CSI"))
    }

    async fn ensure_volume(&self, request: Request<EnsureVolumeRequest>) -> Answer<Volume> {
        self.call("EnsureVolume", |state| state.ensure_volume(request.into_inner())).await
    }

    async fn delete_volume(&self, request: Request<DeleteVolumeRequest>) -> Answer<DeleteVolumeResponse> {
        self.call("DeleteVolume", |state| {
            let DeleteVolumeRequest { volume_id: id, unwritten, pool: _ } = request.into_inner();
            if state.volumes.get(&id).is_some_and(|volume| !volume.device.is_empty()) {
                return Err(Status::failed_precondition("it is attached"));
            }
            if unwritten && state.volumes.get(&id).is_some_and(|volume| volume.written) {
                return Err(Status::failed_precondition("it was used"));
            }
            state.volumes.remove(&id);
            Ok(DeleteVolumeResponse {})
        })
        .await
    }

    async fn get_volume(&self, request: Request<GetVolumeRequest>) -> Answer<Volume> {
        self.call("GetVolume", |state| state.volume(&request.into_inner().volume_id).cloned()).await
    }

    async fn list_volumes(&self, _: Request<ListVolumesRequest>) -> Answer<ListVolumesResponse> {
        let list = |state: &mut State| {
            let (volumes, unopened) = (state.volumes.values().cloned().collect(), state.unopened.clone());
            Ok(ListVolumesResponse { volumes, unopened })
        };
        self.call("ListVolumes", list).await
    }

    async fn expand_volume(&self, request: Request<ExpandVolumeRequest>) -> Answer<Volume> {
        self.call("ExpandVolume", |state| {
            let wanted = request.into_inner();
            let (pool, size) = state.volume(&wanted.volume_id).map(|v| (v.pool.clone(), v.size_bytes))?;
            state.reserve(&pool, wanted.size_bytes.saturating_sub(size))?;
            let volume = state.volume(&wanted.volume_id)?;
            volume.size_bytes = wanted.size_bytes.max(size);
            Ok(volume.clone())
        })
        .await
    }

    async fn modify_volume(&self, request: Request<ModifyVolumeRequest>) -> Answer<Volume> {
        self.call("ModifyVolume", |state| {
            let wanted = request.into_inner();
            let volume = state.volume(&wanted.volume_id)?;
            volume.verify_reads = wanted.verify_reads.unwrap_or(volume.verify_reads);
            Ok(volume.clone())
        })
        .await
    }

    async fn attach_volume(&self, _: Request<AttachVolumeRequest>) -> Answer<AttachVolumeResponse> {
        Err(Status::unimplemented("asked by the node only"))
    }

    async fn detach_volume(&self, _: Request<DetachVolumeRequest>) -> Answer<DetachVolumeResponse> {
        Err(Status::unimplemented("asked by the node only"))
    }

    async fn resync_copy(&self, _: Request<ResyncCopyRequest>) -> Answer<ResyncCopyResponse> {
        Err(Status::unimplemented("not asked by CSI"))
    }

    async fn ensure_snapshots(&self, request: Request<EnsureSnapshotsRequest>) -> Answer<EnsureSnapshotsResponse> {
        self.call("EnsureSnapshots", |state| {
            let snapshots = state.ensure_snapshots(request.into_inner().items)?;
            Ok(EnsureSnapshotsResponse { snapshots })
        })
        .await
    }

    async fn promise_snapshots(&self, request: Request<EnsureSnapshotsRequest>) -> Answer<PromiseSnapshotsResponse> {
        self.call("PromiseSnapshots", |state| {
            for item in request.into_inner().items {
                let (pool, size) = state.volume(&item.volume_id).map(|v| (v.pool.clone(), v.size_bytes))?;
                state.reserve(&pool, size)?;
            }
            Ok(PromiseSnapshotsResponse {})
        })
        .await
    }

    async fn adopt_snapshots(&self, request: Request<EnsureSnapshotsRequest>) -> Answer<AdoptSnapshotsResponse> {
        self.call("AdoptSnapshots", |state| {
            state.ensure_snapshots(request.into_inner().items).map(|_| AdoptSnapshotsResponse {})
        })
        .await
    }

    async fn fill_snapshot(&self, request: Request<FillSnapshotRequest>) -> Answer<FillSnapshotResponse> {
        self.call("FillSnapshot", |state| {
            let wanted = request.into_inner();
            if !state.filled.contains(&wanted) {
                state.filled.push(wanted.clone());
            }
            let is_meant = state.fails.as_ref().is_none_or(|id| *id == wanted.snapshot_id);
            if let Some(problem) = state.filling.clone().filter(|_| is_meant) {
                return Ok(FillSnapshotResponse { problem, ..Default::default() });
            }
            let FillSnapshotRequest { snapshot_id, copy_id, .. } = wanted;
            let there = Snapshot { snapshot_id: snapshot_id.clone(), copy_id: copy_id.clone(), ..Default::default() };
            state.snapshots.insert(snapshot_id, there);
            Ok(FillSnapshotResponse { copy_id, ..Default::default() })
        })
        .await
    }

    async fn delete_snapshot(&self, request: Request<DeleteSnapshotRequest>) -> Answer<DeleteSnapshotResponse> {
        self.call("DeleteSnapshot", |state| {
            let DeleteSnapshotRequest { snapshot_id, mirrored, .. } = request.into_inner();
            let is_known = state.snapshots.remove(&snapshot_id).is_some();
            let closed = || Status::unavailable("it may be in a copy that cannot be opened");
            if state.closed && mirrored && !is_known { Err(closed()) } else { Ok(DeleteSnapshotResponse {}) }
        })
        .await
    }

    async fn list_snapshots(&self, _: Request<ListSnapshotsRequest>) -> Answer<ListSnapshotsResponse> {
        self.call("ListSnapshots", |state| {
            Ok(ListSnapshotsResponse { snapshots: state.snapshots.values().cloned().collect() })
        })
        .await
    }

    async fn look_for(&self, request: Request<LookForRequest>) -> Answer<LookForResponse> {
        self.call("LookFor", |state| {
            let id = request.into_inner().id;
            let is_known = state.volumes.contains_key(&id) || state.snapshots.contains_key(&id);
            let closed = || Status::unavailable("it may be in a pool that cannot be opened");
            if state.closed && !is_known { Err(closed()) } else { Ok(LookForResponse {}) }
        })
        .await
    }

    async fn get_extents(&self, request: Request<GetExtentsRequest>) -> Answer<Self::GetExtentsStream> {
        let messages = self.call("GetExtents", |state| {
            state.extents_asked = Some(request.into_inner());
            Ok(std::mem::take(&mut state.extents))
        });
        let messages = messages.await?.into_inner();
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            for message in messages {
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn digest_snapshot(&self, request: Request<DigestSnapshotRequest>) -> Answer<Self::DigestSnapshotStream> {
        let digests = self.call("DigestSnapshot", |state| {
            let DigestSnapshotRequest { snapshot_id, length_bytes, .. } = request.into_inner();
            if !state.snapshots.contains_key(&snapshot_id) {
                return Err(Status::not_found("no such snapshot"));
            }
            let extents = 0..length_bytes.div_ceil(4 << 20);
            let digest = |extent| state.digests.get(&extent).cloned().unwrap_or_default();
            Ok(extents.map(digest).collect::<Vec<_>>())
        });
        let digests = digests.await?.into_inner();
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            for some in digests.chunks(7) {
                if sender.send(Ok(DigestSnapshotResponse { digests: some.to_vec() })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn verify_volume(&self, _: Request<VerifyVolumeRequest>) -> Answer<Self::VerifyVolumeStream> {
        Err(Status::unimplemented("not asked by CSI"))
    }
}
