//! What a person wants of a volume's copies: who is primary, and that one moves to another node (`proto/operator.proto`).
//!
//! Invariants: only wishes are written, the copies decide; nothing is taken from under a volume where it is used; a copy
//! is replaced by one that has every acknowledged write, or it stays.

use super::Controller;
use super::create::short;
use super::mirror::{COPIES_LIMIT, LOOK_EVERY};
use super::names;
use super::place::certain;
use super::request::present;
use crate::catalog::{CopySpec, Descriptor, MirrorSpec, NodeName, Stored, Volume};
use crate::csi::control::ControlError;
use crate::csi::errors::{ArgumentError, OperatorError, Transient};
use crate::csi::handler::answer;
use crate::csi::operations::Subject;
use crate::csi::status::failed;
use crate::protocol::{Configuration, Lacks, MAX_COPIES};
use crate::rpc::control::{GetVolumeRequest, ResyncCopyRequest, copy::State};
use crate::rpc::operator::{self as rpc, operator_server};
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

/// Promote: the volume, and the node of the copy.
pub struct Promote(String, NodeName);
/// Demote and ListCopies: the volume.
pub struct Of(String);
/// CompareCopies.
pub struct Compare {
    pub volume: String,
    pub bytes_per_second: u64,
}
/// Where a comparison is told.
pub type Progress = mpsc::Sender<Result<rpc::CompareCopiesResponse, Status>>;

/// The slowest comparison: a slower one would hold its snapshot for weeks.
const MIN_BYTES_PER_SECOND: u64 = 1 << 20;
/// Messages that wait for a slow reader.
const WAITING_MESSAGES: usize = 4;

/// ResyncCopy: the volume, and the node of the copy.
pub struct Resync(String, NodeName);
/// MoveCopy: the volume, from where, and to where.
pub struct Move(String, NodeName, NodeName);

impl TryFrom<rpc::PromoteRequest> for Promote {
    type Error = ArgumentError;
    fn try_from(request: rpc::PromoteRequest) -> Result<Self, ArgumentError> {
        Ok(Self(present("volume_id", request.volume_id)?, NodeName(present("node", request.node)?)))
    }
}

impl TryFrom<rpc::ResyncCopyRequest> for Resync {
    type Error = ArgumentError;
    fn try_from(request: rpc::ResyncCopyRequest) -> Result<Self, ArgumentError> {
        Ok(Self(present("volume_id", request.volume_id)?, NodeName(present("node", request.node)?)))
    }
}

impl TryFrom<rpc::DemoteRequest> for Of {
    type Error = ArgumentError;
    fn try_from(request: rpc::DemoteRequest) -> Result<Self, ArgumentError> {
        present("volume_id", request.volume_id).map(Self)
    }
}

impl TryFrom<rpc::ListCopiesRequest> for Of {
    type Error = ArgumentError;
    fn try_from(request: rpc::ListCopiesRequest) -> Result<Self, ArgumentError> {
        present("volume_id", request.volume_id).map(Self)
    }
}

impl TryFrom<rpc::CompareCopiesRequest> for Compare {
    type Error = ArgumentError;
    fn try_from(request: rpc::CompareCopiesRequest) -> Result<Self, ArgumentError> {
        let bytes_per_second = request.bytes_per_second;
        if bytes_per_second < MIN_BYTES_PER_SECOND {
            return Err(ArgumentError::TooLow { field: "bytes_per_second", limit: MIN_BYTES_PER_SECOND });
        }
        Ok(Self { volume: present("volume_id", request.volume_id)?, bytes_per_second })
    }
}

impl TryFrom<rpc::MoveCopyRequest> for Move {
    type Error = ArgumentError;
    fn try_from(request: rpc::MoveCopyRequest) -> Result<Self, ArgumentError> {
        let (from, to) = (present("from_node", request.from_node)?, present("to_node", request.to_node)?);
        Ok(Self(present("volume_id", request.volume_id)?, NodeName(from), NodeName(to)))
    }
}

impl Controller {
    /// A volume with several copies, by the text of its id.
    pub(super) async fn with_copies(&self, id: &str) -> Result<(Stored<Volume>, MirrorSpec), OperatorError> {
        let missing = || OperatorError::NotFound(short(id));
        let key: VolumeId = id.parse().map_err(|_| missing())?;
        let stored = self.get::<Volume>(key).await?.filter(|s| s.object.is_visible()).ok_or_else(missing)?;
        let mirror = stored.object.spec.mirror.clone().ok_or(OperatorError::Single(key))?;
        Ok((stored, mirror))
    }

    async fn operate(&self, id: &str) -> Result<Option<super::Operation>, Transient> {
        let Ok(id) = id.parse() else { return Ok(None) };
        self.start_soon(Subject::Volume(id)).await.map(Some)
    }

    /// The node's copy is primary, afterwards.
    pub async fn promote(&self, Promote(id, node): Promote) -> Result<(), OperatorError> {
        let _volume = self.operate(&id).await?;
        let (stored, mirror) = self.with_copies(&id).await?;
        let id = stored.object.id;
        if let Some(used) = stored.object.spec.publications.keys().find(|used| **used != node) {
            return Err(OperatorError::InUse { id, node: used.clone() });
        }
        let copy = copy_on(id, &mirror, &node)?;
        if !self.committed(id).await?.is_some_and(|now| now.is_member(copy)) {
            return Err(OperatorError::NotUpToDate { id, node });
        }
        self.wish_primary(stored, Some(copy)).await?;
        self.until(id, "primary", &node, |now| now.primary == Some(copy)).await
    }

    /// No copy is primary, afterwards: the next one need not wait for it.
    pub async fn demote(&self, Of(id): Of) -> Result<(), OperatorError> {
        let _volume = self.operate(&id).await?;
        let (stored, mirror) = self.with_copies(&id).await?;
        let id = stored.object.id;
        if let Some(node) = stored.object.spec.publications.keys().next() {
            return Err(OperatorError::InUse { id, node: node.clone() });
        }
        self.wish_primary(stored, None).await?;
        let primary = self.committed(id).await?.and_then(|now| now.primary);
        let node = primary.and_then(|copy| Some(mirror.copies.get(&copy)?.node.clone()));
        let node = node.unwrap_or_else(|| NodeName("a node that has none any more".to_owned()));
        self.until(id, "demoted", &node, |now| now.primary.is_none()).await
    }

    async fn wish_primary(&self, stored: Stored<Volume>, wish: Option<InstanceId>) -> Result<(), Transient> {
        if stored.object.spec.mirror.as_ref().is_some_and(|mirror| mirror.primary == wish) {
            return Ok(());
        }
        let write = |volume: &mut Volume| volume.spec.mirror.iter_mut().for_each(|mirror| mirror.primary = wish);
        self.change(stored, write).await.map(drop)
    }

    async fn until(
        &self,
        id: VolumeId,
        done: &'static str,
        node: &NodeName,
        is: impl Fn(&Configuration) -> bool,
    ) -> Result<(), OperatorError> {
        let deadline = Instant::now() + COPIES_LIMIT;
        while !self.committed(id).await?.is_some_and(|now| is(&now)) {
            if Instant::now() >= deadline {
                return Err(Transient::Waiting { id, done, nodes: node.to_string() }.into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// The copy of one node shall be replaced by one on another, which is recorded and placed afterwards.
    pub async fn move_copy(&self, Move(id, from, to): Move) -> Result<(), OperatorError> {
        let _volume = self.operate(&id).await?;
        let (stored, mirror) = self.with_copies(&id).await?;
        let id = stored.object.id;
        let there = mirror.copies_on(&to).next().map(|(copy, _)| copy);
        let old = match copy_on(id, &mirror, &from) {
            // It was repeated.
            Ok(old) if mirror.leaving.contains(&old) && there.is_some() => return Ok(()),
            Err(_) if there.is_some() => return Ok(()),
            old => old?,
        };
        if stored.object.spec.publications.contains_key(&from) {
            return Err(OperatorError::InUse { id, node: from });
        }
        if let Some(back) = there.filter(|there| mirror.leaving.contains(there)) {
            // A move is taken back: the old copy stays, the new one goes.
            self.change(stored, |volume| {
                if let Some(mirror) = &mut volume.spec.mirror {
                    mirror.leaving.remove(&back);
                    mirror.leaving.insert(old);
                    mirror.rebuild = None;
                }
            })
            .await?;
            return Ok(());
        }
        if !mirror.leaving.is_empty() || mirror.copies.len() >= MAX_COPIES {
            let leaving = mirror.leaving.iter().filter_map(|copy| mirror.copies.get(copy));
            let nodes = names(leaving.map(|copy| &copy.node));
            return Err(Transient::Waiting { id, done: "replaced", nodes }.into());
        }
        if there.is_some() {
            return Err(OperatorError::NoPlace(format!("node {to} has a copy of volume {id} already")));
        }
        let place = self.place_at(&stored.object, &to).await?;
        let new = InstanceId::random();
        self.change(stored, |volume| {
            if let Some(mirror) = &mut volume.spec.mirror {
                mirror.copies.insert(new, place.clone());
                mirror.leaving.insert(old);
            }
        })
        .await?;
        Ok(())
    }

    /// The node's copy is compared with the primary's from now on, and what differs is copied.
    pub async fn resync_copy(&self, Resync(id, node): Resync) -> Result<(), OperatorError> {
        let _volume = self.operate(&id).await?;
        let (stored, mirror) = self.with_copies(&id).await?;
        let id = stored.object.id;
        let copy = copy_on(id, &mirror, &node)?;
        let before = self.committed(id).await?;
        let primary = before.as_ref().and_then(|now| now.primary).ok_or(OperatorError::NoPrimary(id))?;
        if primary == copy {
            return Err(OperatorError::IsPrimary { id, node });
        }
        let place = mirror.copies.get(&primary).ok_or(OperatorError::NoPrimary(id))?;
        let there = self.nodes.find(&place.node).await?.ok_or(OperatorError::NoPrimary(id))?;
        let request = ResyncCopyRequest { volume_id: id.to_string(), copy_id: copy.to_string() };
        if let Err(status) = there.control.client().resync_copy(request).await {
            if status.code() == Code::Aborted {
                // It has just become primary.
                return Err(Transient::Waiting { id, done: "served", nodes: place.node.to_string() }.into());
            }
            return Err(match ControlError::from(status) {
                ControlError::InUse(why) => OperatorError::NotResynced(why),
                error => Transient::Replica(error).into(),
            });
        }
        // It may be a member again before anybody looks: it has left and was admitted, two versions later.
        let version = before.map(|before| before.stamp.version.0).unwrap_or_default();
        let anew = |now: &Configuration| now.candidates.get(&copy) == Some(&Lacks::Everything);
        let again = |now: &Configuration| now.is_member(copy) && now.stamp.version.0 >= version + 2;
        self.until(id, "compared anew", &node, |now| anew(now) || again(now)).await
    }

    /// A place for one more copy of the volume on this node.
    async fn place_at(&self, volume: &Volume, node: &NodeName) -> Result<CopySpec, OperatorError> {
        let (found, pool) = (self.nodes.pools().await?, &volume.request.pool);
        if let Some((_, error)) = found.silent.into_iter().chain(found.gone).find(|(silent, _)| silent == node) {
            return Err(Transient::Replica(error).into());
        }
        if volume.spec.mirror.iter().flat_map(|mirror| &mirror.client).any(|client| client.node == *node) {
            return Err(OperatorError::NoPlace(format!("node {node} uses the volume without a copy; end that first")));
        }
        let there = found.pools.iter().find(|known| known.node == *node && known.pool == *pool);
        let Some(there) = there else {
            return Err(OperatorError::NoPlace(format!("node {node} is not known or has no pool {pool}")));
        };
        let bytes = certain(volume.spec.size);
        if there.largest < bytes {
            let largest = there.largest;
            return Err(OperatorError::NoPlace(format!(
                "pool {pool} of node {node} takes {largest} bytes, not {bytes}"
            )));
        }
        Ok(CopySpec { node: node.clone(), pool: pool.clone() })
    }

    /// The volumes that callers know.
    pub async fn list_described(&self) -> Result<Vec<rpc::Volume>, OperatorError> {
        let described = |volume: Volume| rpc::Volume {
            volume_id: volume.id.to_string(),
            pool: volume.request.pool.clone(),
            size_bytes: volume.status.size.bytes(),
            verify_reads: volume.status.verify_reads,
            descriptor: Descriptor::of(&volume).encode(),
        };
        let known = self.all::<Volume>().await?.into_iter().map(|stored| stored.object).filter(Volume::is_visible);
        Ok(known.map(described).collect())
    }

    /// The copies that are wanted, and how far they are.
    pub async fn list_copies(&self, Of(id): Of) -> Result<Vec<rpc::Copy>, OperatorError> {
        let (stored, mirror) = self.with_copies(&id).await?;
        let now = self.committed(stored.object.id).await?;
        let is_member = |copy: InstanceId| now.as_ref().is_some_and(|now| now.is_member(copy));
        let primary = now.as_ref().and_then(|now| now.primary);
        let all = mirror.copies.keys().all(|copy| is_member(*copy));
        let targets = match primary.and_then(|copy| mirror.copies.get(&copy)) {
            Some(place) if !all => self.sync_targets(stored.object.id, &place.node).await,
            Some(_) | None => BTreeMap::new(),
        };
        let missed = &stored.object.status.missed;
        let copy = |(copy, place): (&InstanceId, &CopySpec)| {
            let [copied_bytes, equal_bytes, left_bytes] = targets.get(&copy.to_string()).copied().unwrap_or_default();
            rpc::Copy {
                copy_id: copy.to_string(),
                node: place.node.to_string(),
                pool: place.pool.clone(),
                member: is_member(*copy),
                primary: primary == Some(*copy),
                wished: mirror.primary == Some(*copy),
                leaving: mirror.leaving.contains(copy),
                missed_seconds: missed.get(copy).map_or(0, |missed| missed.seconds),
                waits: missed.get(copy).and_then(|missed| missed.waits.clone()).unwrap_or_default(),
                copied_bytes,
                equal_bytes,
                left_bytes,
            }
        };
        Ok(mirror.copies.iter().map(copy).collect())
    }

    /// What the primary knows of those that are brought up to date: bytes copied, equal before, and left. A node that does not answer
    /// says nothing.
    async fn sync_targets(&self, id: VolumeId, node: &NodeName) -> BTreeMap<String, [u64; 3]> {
        let Ok(Some(node)) = self.nodes.find(node).await else { return BTreeMap::new() };
        let asked = node.control.client().get_volume(GetVolumeRequest { volume_id: id.to_string() }).await;
        let copies = asked.ok().and_then(|answer| answer.into_inner().mirror).unwrap_or_default().copies;
        let targets = copies.into_iter().filter(|copy| copy.state() == State::SyncTarget);
        targets.map(|copy| (copy.copy_id, [copy.copied_bytes, copy.equal_bytes, copy.left_bytes])).collect()
    }
}

fn copy_on(id: VolumeId, mirror: &MirrorSpec, node: &NodeName) -> Result<InstanceId, OperatorError> {
    let found = mirror.copies_on(node).next().map(|(copy, _)| copy);
    found.ok_or_else(|| {
        let holders = names(mirror.copies.values().map(|copy| &copy.node));
        OperatorError::NoCopy { id, node: node.clone(), holders }
    })
}

/// Serves a [`Controller`].
pub struct OperatorService(pub Arc<Controller>);

#[tonic::async_trait]
impl operator_server::Operator for OperatorService {
    type CompareCopiesStream = ReceiverStream<Result<rpc::CompareCopiesResponse, Status>>;

    async fn compare_copies(
        &self,
        r: Request<rpc::CompareCopiesRequest>,
    ) -> Result<Response<Self::CompareCopiesStream>, Status> {
        let wanted = Compare::try_from(r.into_inner()).map_err(|error| failed("CompareCopies", &error))?;
        let (controller, (send, receive)) = (self.0.clone(), mpsc::channel(WAITING_MESSAGES));
        // To its end also when the caller goes away: the snapshot is taken away by it.
        tokio::spawn(async move {
            if let Err(error) = controller.compare_copies(&wanted, &send).await {
                let _ = send.send(Err(failed("CompareCopies", &error))).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn list_nodes(&self, _: Request<rpc::ListNodesRequest>) -> Result<Response<rpc::ListNodesResponse>, Status> {
        let nodes = self.0.list_nodes().await.map_err(|error| failed("ListNodes", &error))?;
        Ok(Response::new(rpc::ListNodesResponse { nodes }))
    }

    async fn remove_node(
        &self,
        r: Request<rpc::RemoveNodeRequest>,
    ) -> Result<Response<rpc::RemoveNodeResponse>, Status> {
        let rpc::RemoveNodeRequest { name, force } = r.into_inner();
        self.0.remove_node(&name, force).await.map_err(|error| failed("RemoveNode", &error))?;
        Ok(Response::new(rpc::RemoveNodeResponse {}))
    }

    async fn list_volumes(
        &self,
        _: Request<rpc::ListVolumesRequest>,
    ) -> Result<Response<rpc::ListVolumesResponse>, Status> {
        let listed = self.0.list_described().await.map_err(|error| failed("ListVolumes", &error))?;
        Ok(Response::new(rpc::ListVolumesResponse { volumes: listed }))
    }

    async fn list_copies(
        &self,
        r: Request<rpc::ListCopiesRequest>,
    ) -> Result<Response<rpc::ListCopiesResponse>, Status> {
        let controller = self.0.clone();
        answer("ListCopies", r, |of: Of| async move {
            let copies = controller.list_copies(of).await?;
            Ok::<_, OperatorError>(rpc::ListCopiesResponse { copies })
        })
        .await
    }

    async fn promote(&self, r: Request<rpc::PromoteRequest>) -> Result<Response<rpc::PromoteResponse>, Status> {
        let controller = self.0.clone();
        answer("Promote", r, |wanted: Promote| async move {
            controller.promote(wanted).await?;
            Ok::<_, OperatorError>(rpc::PromoteResponse {})
        })
        .await
    }

    async fn demote(&self, r: Request<rpc::DemoteRequest>) -> Result<Response<rpc::DemoteResponse>, Status> {
        let controller = self.0.clone();
        answer("Demote", r, |wanted: Of| async move {
            controller.demote(wanted).await?;
            Ok::<_, OperatorError>(rpc::DemoteResponse {})
        })
        .await
    }

    async fn resync_copy(
        &self,
        r: Request<rpc::ResyncCopyRequest>,
    ) -> Result<Response<rpc::ResyncCopyResponse>, Status> {
        let controller = self.0.clone();
        answer("ResyncCopy", r, |wanted: Resync| async move {
            controller.resync_copy(wanted).await?;
            Ok::<_, OperatorError>(rpc::ResyncCopyResponse {})
        })
        .await
    }

    async fn move_copy(&self, r: Request<rpc::MoveCopyRequest>) -> Result<Response<rpc::MoveCopyResponse>, Status> {
        let controller = self.0.clone();
        answer("MoveCopy", r, |wanted: Move| async move {
            controller.move_copy(wanted).await?;
            Ok::<_, OperatorError>(rpc::MoveCopyResponse {})
        })
        .await
    }

    async fn locate_snapshots(
        &self,
        _: Request<rpc::LocateSnapshotsRequest>,
    ) -> Result<Response<rpc::LocateSnapshotsResponse>, Status> {
        let located = self.0.locate_snapshots().await.map_err(OperatorError::from);
        let locations = located.map_err(|error| failed("LocateSnapshots", &error))?;
        Ok(Response::new(rpc::LocateSnapshotsResponse { locations }))
    }
}
