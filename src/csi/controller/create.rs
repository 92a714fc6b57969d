//! CreateVolume.
//!
//! Invariant: a volume that no caller knows yet (`Creating`) and whose creation failed for good is taken back, at the
//! replica and then in the catalogue, before the caller hears of the failure.

use super::Controller;
use super::mirror::placed;
use super::request::{DEFAULT_VOLUME_BYTES, NewVolume, Places, WantedSource};
use super::source::{Found, Placed};
use crate::catalog::{
    Access, Base, Descriptor, FsType, Reach, Replication, Source, Stored, Volume, VolumePhase, VolumeRequest,
};
use crate::csi::control::ControlError;
use crate::csi::errors::{CreateVolumeError, DeleteVolumeError, Transient};
use crate::csi::nodes::Node;
use crate::csi::operations::Subject;
use crate::rpc::control::{self, ensure_volume_request};
use crate::volume::{MIN_VOLUME_BYTES, VolumeId, VolumeSize};
use std::collections::BTreeSet;

/// mkfs.xfs refuses smaller devices.
pub const MIN_XFS_BYTES: u64 = 300 << 20;

impl Controller {
    /// The volume of that name: found, finished or made.
    pub async fn create_volume(&self, wanted: NewVolume) -> Result<Volume, CreateVolumeError> {
        let _name = self.start(Subject::VolumeName(wanted.name.clone()))?;
        let stored = match self.find::<Volume>(&wanted.name).await? {
            Some(stored) if stored.object.spec.deleted => {
                let _volume = self.start(Subject::Volume(stored.object.id))?;
                self.same(&stored).await?;
                self.finish_deletion(stored).await?;
                self.record_volume(&wanted).await?
            }
            Some(stored) => {
                if let Some(what) = self.difference(&stored.object, &wanted) {
                    let (name, id) = (wanted.name, stored.object.id);
                    return Err(CreateVolumeError::Incompatible { name, id, what });
                }
                stored
            }
            None => self.record_volume(&wanted).await?,
        };
        if stored.object.status.phase == VolumePhase::Ready {
            return Ok(stored.object);
        }
        let _volume = self.start(Subject::Volume(stored.object.id))?;
        let stored = self.same_wish(stored).await?;
        self.make_volume(stored).await
    }

    /// The volume as it is now that its operation has been started, if only its nodes have changed it since it was read.
    async fn same_wish(&self, stored: Stored<Volume>) -> Result<Stored<Volume>, Transient> {
        let id = stored.object.id;
        let now = self.get::<Volume>(id).await?.filter(|now| now.object.spec == stored.object.spec);
        now.ok_or_else(|| Transient::Conflict(format!("volume {id}")))
    }

    /// Whether the volume is what the request asks for; it is compared with what was asked for when it was made, because
    /// it may have been grown or modified since.
    fn difference(&self, volume: &Volume, wanted: &NewVolume) -> Option<&'static str> {
        let request = &volume.request;
        let source = match &request.source {
            None => None,
            Some(Source::Snapshot(id)) => Some(WantedSource::Snapshot(id.to_string())),
            Some(Source::Volume(id)) => Some(WantedSource::Volume(id.to_string())),
        };
        let differs = [
            (!wanted.size.contains(request.size), "capacity_range"),
            (request.access != wanted.access, "volume_capabilities"),
            (request.pool != wanted.parameters.pool, "parameter pool"),
            (request.fs_type != wanted.parameters.fs_type, "parameter csi.storage.k8s.io/fstype"),
            (request.verify_reads != wanted.parameters.verify_reads, "parameter verifyReads"),
            (request.replication != wanted.parameters.replication, "parameter replication or replicas"),
            (request.rebuild_after != wanted.parameters.rebuild_after, "parameter rebuildAfter"),
            (request.reach != wanted.parameters.reach, "parameter access"),
            (source != wanted.source, "volume_content_source"),
            (!self.is_reachable(volume, &wanted.places), "accessibility_requirements"),
        ];
        differs.into_iter().find_map(|(differs, what)| differs.then_some(what))
    }

    /// Whether the volume can be used at one of the places.
    fn is_reachable(&self, volume: &Volume, places: &Places) -> bool {
        volume.request.reach == Reach::Any || self.holders(volume).iter().any(|node| places.include(node))
    }

    /// Writes down what is wanted, before anything is done for it.
    async fn record_volume(&self, wanted: &NewVolume) -> Result<Stored<Volume>, CreateVolumeError> {
        self.can_replicate(wanted.parameters.replication)?;
        let id = VolumeId::random();
        let found = match &wanted.source {
            None => None,
            Some(source) => Some(self.look_up_source(id, wanted, source).await?),
        };
        let recorded = self.record_found(id, wanted, found.as_ref()).await;
        if recorded.is_err() {
            self.drop_made_for(id, found.and_then(Found::give_up)).await;
        }
        let stored = recorded?;
        if self.base_is_there(&stored.object).await? {
            return Ok(stored);
        }
        self.finish_deletion(stored).await?;
        Err(CreateVolumeError::SourceNotFound(format!("of volume {id}, which was deleted meanwhile,")))
    }

    async fn record_found(
        &self,
        id: VolumeId,
        wanted: &NewVolume,
        found: Option<&Found>,
    ) -> Result<Stored<Volume>, CreateVolumeError> {
        let replication = wanted.parameters.replication;
        let source_size = found.map(|found| found.size.bytes());
        let floor = smallest(wanted.parameters.fs_type, &wanted.access).max(source_size.unwrap_or(0));
        let size = wanted.size.choose(floor, source_size.unwrap_or(DEFAULT_VOLUME_BYTES))?;
        let Placed { node, mirror, base } = match found {
            None => placed(replication, self.place(wanted, size, &wanted.places.preferred).await?),
            Some(found) => match (replication, found.snapshot) {
                (Replication::Sync { .. }, Some(snapshot)) => self.place_clones(wanted, size, found, snapshot).await?,
                (Replication::Sync { .. } | Replication::None, snapshot) => {
                    let base = snapshot.map(|snapshot| Base { snapshot, clones: BTreeSet::new() });
                    Placed { node: Some(self.place_beside(wanted, &found.holders).await?), base, mirror: None }
                }
            },
        };
        let request = VolumeRequest {
            name: wanted.name.clone(),
            size,
            pool: wanted.parameters.pool.clone(),
            fs_type: wanted.parameters.fs_type,
            verify_reads: wanted.parameters.verify_reads,
            access: wanted.access.clone(),
            source: found.map(|found| found.source),
            replication,
            rebuild_after: wanted.parameters.rebuild_after,
            reach: wanted.parameters.reach,
        };
        let mut volume = Volume::wanted(id, request);
        (volume.spec.node, volume.spec.mirror, volume.spec.base) = (node, mirror, base);
        Ok(self.create(volume).await?)
    }

    /// Has the replicas make what is written down, and writes down that it is so.
    async fn make_volume(&self, stored: Stored<Volume>) -> Result<Volume, CreateVolumeError> {
        let made = match &stored.object.spec.mirror {
            Some(_) => self.make_mirror(stored).await?,
            None => self.make_single(stored).await?,
        };
        self.drop_made_for(made.id, made.spec.base.as_ref().map(|base| base.snapshot)).await;
        Ok(made)
    }

    async fn make_single(&self, mut stored: Stored<Volume>) -> Result<Volume, CreateVolumeError> {
        let id = stored.object.id;
        let node = self.home(&stored.object).await?;
        let answer = node.control.client().ensure_volume(ensure_request(&stored.object)).await;
        let made = match answer.map_err(|status| node.control.refusal(status)) {
            Ok(answer) => answer.into_inner(),
            Err(error @ ControlError::Unknown(_)) => return Err(Transient::Replica(error).into()),
            Err(error) => return Err(self.take_back(stored, &node, error).await?),
        };
        if !made.ready {
            return Err(CreateVolumeError::Copying { id, copied: made.copied_bytes, total: made.to_copy_bytes });
        }
        let size = VolumeSize::try_from(made.size_bytes)
            .map_err(|error| Transient::Replica(ControlError::Unknown(format!("volume {id}: {error}"))))?;
        stored.object.status.phase = VolumePhase::Ready;
        stored.object.status.size = size;
        stored.object.spec.size = size;
        // Persist before the caller learns the id.
        Ok(self.update(stored).await?.object)
    }

    /// Undoes a creation that cannot succeed; what the caller gets to hear is returned.
    async fn take_back(
        &self,
        stored: Stored<Volume>,
        node: &Node,
        error: ControlError,
    ) -> Result<CreateVolumeError, CreateVolumeError> {
        let request = stored.object.request.clone();
        let reason = match error {
            ControlError::NotFound(_) => match unknown_pool(node, &request.pool).await? {
                Some(known) => CreateVolumeError::UnknownPool {
                    pool: request.pool,
                    place: format!("on node {}", node.name),
                    known,
                },
                None => CreateVolumeError::SourceNotFound(match request.source {
                    Some(Source::Snapshot(id)) => format!("snapshot {id}"),
                    Some(Source::Volume(id)) => format!("volume {id}"),
                    None => format!("of volume {}", stored.object.id),
                }),
            },
            ControlError::NoRoom(text) => CreateVolumeError::NoRoom(text),
            ControlError::Refused(text) => CreateVolumeError::Refused(text),
            other @ (ControlError::InUse(_) | ControlError::Unknown(_)) => {
                return Err(Transient::Replica(other).into());
            }
        };
        self.finish_deletion(stored).await?;
        Ok(reason)
    }

    async fn finish_deletion(&self, stored: Stored<Volume>) -> Result<(), Transient> {
        self.erase_volume(stored).await.map_err(|error| match error {
            DeleteVolumeError::Transient(error) => error,
            DeleteVolumeError::InUse { id, .. } => Transient::Conflict(format!("volume {id}")),
            DeleteVolumeError::Argument(error) => Transient::Conflict(error.to_string()),
        })
    }
}

/// The names of the node's pools, unless `pool` is one of them.
async fn unknown_pool(node: &Node, pool: &str) -> Result<Option<String>, Transient> {
    let pools = node.pools().await?;
    if pools.iter().any(|known| known.name == pool) {
        return Ok(None);
    }
    Ok(Some(pools.into_iter().map(|known| known.name).collect::<Vec<_>>().join(", ")))
}

/// What the replica is asked for, the same every time.
fn ensure_request(volume: &Volume) -> control::EnsureVolumeRequest {
    let base = volume.spec.base.as_ref().map(|base| Source::Snapshot(base.snapshot));
    let source = base.or(volume.request.source).map(|source| match source {
        Source::Snapshot(id) => ensure_volume_request::Source::SourceSnapshotId(id.to_string()),
        Source::Volume(id) => ensure_volume_request::Source::SourceVolumeId(id.to_string()),
    });
    control::EnsureVolumeRequest {
        volume_id: volume.id.to_string(),
        pool: volume.request.pool.clone(),
        size_bytes: volume.spec.size.bytes(),
        descriptor: Descriptor::of(volume).encode(),
        verify_reads: volume.spec.verify_reads,
        source,
    }
}

/// Bytes of the smallest volume that can be used like that.
pub fn smallest(parameter: Option<FsType>, access: &BTreeSet<Access>) -> u64 {
    let is_xfs = |access: &Access| match access {
        Access::Block => false,
        Access::Mount(fs_type) => fs_type.or(parameter) == Some(FsType::Xfs),
    };
    let parameter_only = access.is_empty() && parameter == Some(FsType::Xfs);
    if parameter_only || access.iter().any(is_xfs) { MIN_XFS_BYTES } else { MIN_VOLUME_BYTES }
}

/// As much of an unknown id as a message repeats.
pub fn short(text: &str) -> String {
    text.chars().take(128).collect()
}
