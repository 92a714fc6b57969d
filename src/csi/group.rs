//! The GroupController service: snapshots of several volumes at one point in time.
//!
//! Invariants: the ids of the members are written down before they are taken, the replica takes all or none, and a group
//! is ready when all its members are in the catalogue; a group is deleted as a whole. Primaries of mirrored members are
//! all on one node: nobody else can stop the writes of all volumes at one moment.

use super::controller::request::{name, present};
use super::controller::seal::{Erased, SealError, Sealed, ready};
use super::controller::snapshot::transient;
use super::controller::{Controller, response};
use super::errors::{ArgumentError, CreateGroupError, DeleteGroupError, DeleteSnapshotError, GetGroupError, Transient};
use super::handler::answer;
use super::operations::Subject;
use super::parameters;
use crate::catalog::{
    Descriptor, GroupMember, GroupSnapshot, GroupStatus, NodeName, Snapshot, SnapshotStatus, Stored, Volume,
};
use crate::rpc::csi;
use crate::rpc::csi::group_controller_server::GroupController;
use crate::rpc::csi::group_controller_service_capability::{Rpc, Type, rpc};
use crate::volume::{GroupSnapshotId, SnapshotId, VolumeId};
use std::collections::BTreeSet;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// CreateVolumeGroupSnapshot.
pub struct NewGroup {
    name: String,
    volumes: BTreeSet<String>,
}

impl TryFrom<csi::CreateVolumeGroupSnapshotRequest> for NewGroup {
    type Error = ArgumentError;
    fn try_from(request: csi::CreateVolumeGroupSnapshotRequest) -> Result<Self, ArgumentError> {
        let name = name("name", request.name)?;
        if request.source_volume_ids.is_empty() || request.source_volume_ids.iter().any(String::is_empty) {
            return Err(ArgumentError::Missing("source_volume_ids"));
        }
        let given = request.source_volume_ids.len();
        let volumes: BTreeSet<_> = request.source_volume_ids.into_iter().collect();
        if volumes.len() < given {
            return Err(ArgumentError::Duplicate("source_volume_ids"));
        }
        parameters::parse_snapshot(&request.parameters)?;
        Ok(Self { name, volumes })
    }
}

/// The id and the members of GetVolumeGroupSnapshot and DeleteVolumeGroupSnapshot.
pub struct GroupReference {
    id: String,
    /// Empty: not given.
    snapshots: BTreeSet<String>,
}

impl TryFrom<csi::GetVolumeGroupSnapshotRequest> for GroupReference {
    type Error = ArgumentError;
    fn try_from(request: csi::GetVolumeGroupSnapshotRequest) -> Result<Self, ArgumentError> {
        let id = present("group_snapshot_id", request.group_snapshot_id)?;
        Ok(Self { id, snapshots: request.snapshot_ids.into_iter().collect() })
    }
}

impl TryFrom<csi::DeleteVolumeGroupSnapshotRequest> for GroupReference {
    type Error = ArgumentError;
    fn try_from(request: csi::DeleteVolumeGroupSnapshotRequest) -> Result<Self, ArgumentError> {
        let id = present("group_snapshot_id", request.group_snapshot_id)?;
        Ok(Self { id, snapshots: request.snapshot_ids.into_iter().collect() })
    }
}

impl GroupReference {
    fn fits(&self, group: &GroupSnapshot) -> bool {
        let members: BTreeSet<_> = group.members.iter().map(|member| member.snapshot.to_string()).collect();
        self.snapshots.is_empty() || self.snapshots == members
    }
}

/// Snapshots that are to be taken.
struct Plan {
    members: Vec<GroupMember>,
    node: Option<NodeName>,
    strays: BTreeSet<NodeName>,
}

impl Controller {
    /// The group of that name: found, finished or taken.
    pub async fn create_group(&self, wanted: NewGroup) -> Result<csi::VolumeGroupSnapshot, CreateGroupError> {
        let _name = self.start(Subject::GroupName(wanted.name.clone()))?;
        let mut is_found = false;
        let stored = match self.find::<GroupSnapshot>(&wanted.name).await? {
            Some(stored) if stored.object.deleted => {
                let _group = self.start(Subject::Group(stored.object.id))?;
                self.same(&stored).await?;
                self.erase_group(stored).await?;
                self.record_group(&wanted).await?
            }
            Some(stored) => {
                let volumes: BTreeSet<_> = stored.object.members.iter().map(|m| m.volume.to_string()).collect();
                if volumes != wanted.volumes {
                    return Err(CreateGroupError::Incompatible { name: wanted.name, id: stored.object.id });
                }
                is_found = true;
                stored
            }
            None => self.record_group(&wanted).await?,
        };
        let _group = self.start(Subject::Group(stored.object.id))?;
        self.same(&stored).await?;
        let group = match stored.object.status {
            GroupStatus::Ready { .. } => stored.object,
            GroupStatus::Creating if is_found && self.may_be_elsewhere(&stored.object).await? => {
                let again = self.plan_again(stored).await?;
                self.take_group(again).await?
            }
            GroupStatus::Creating => self.take_group(stored).await?,
        };
        let members = self.members(&group).await?;
        Ok(response::group(&group, &members).unwrap_or_default())
    }

    async fn record_group(&self, wanted: &NewGroup) -> Result<Stored<GroupSnapshot>, CreateGroupError> {
        let (id, name) = (GroupSnapshotId::random(), wanted.name.clone());
        let Plan { members, node, strays } = self.plan(&wanted.volumes).await?;
        let status = GroupStatus::Creating;
        Ok(self.create(GroupSnapshot { id, name, members, node, strays, deleted: false, status }).await?)
    }

    /// New ids for snapshots of these volumes, and where they are taken.
    async fn plan(&self, volumes: &BTreeSet<String>) -> Result<Plan, CreateGroupError> {
        let (mut members, mut homes, mut strays) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        for text in volumes {
            let missing = || CreateGroupError::SourceNotFound(text.chars().take(128).collect());
            let volume: VolumeId = text.parse().map_err(|_| missing())?;
            let source = self.get::<Volume>(volume).await?.filter(|stored| stored.object.is_visible());
            let sealing = self.sealing(&source.ok_or_else(missing)?.object)?;
            homes.insert(sealing.node);
            strays.extend(sealing.strays);
            members.push(GroupMember { snapshot: SnapshotId::random(), volume });
        }
        let node = homes.pop_first().flatten();
        if let Some(other) = homes.pop_first() {
            let names = [node, other].map(|name| name.map_or_else(String::new, |name| name.to_string()));
            return Err(CreateGroupError::Apart(names.join(", ")));
        }
        Ok(Plan { members, node, strays })
    }

    /// Whether its attempts may have left something on other nodes: also those that were begun while its volumes had one copy.
    async fn may_be_elsewhere(&self, group: &GroupSnapshot) -> Result<bool, Transient> {
        let mut copies = group.strays.len();
        for member in &group.members {
            copies += self.mirrored_on(member.volume).await?.len();
        }
        Ok(copies > 0)
    }

    /// Needs the group's operation. Some copies may have executed the seals of an earlier attempt, and others not: each of
    /// those snapshots is given up, and there are others in their place.
    async fn plan_again(&self, mut stored: Stored<GroupSnapshot>) -> Result<Stored<GroupSnapshot>, CreateGroupError> {
        let group = &stored.object;
        let volumes = group.members.iter().map(|member| member.volume.to_string()).collect();
        let Plan { members, node, strays } = self.plan(&volumes).await?;
        let anywhere: BTreeSet<_> = group.strays.union(&strays).cloned().collect();
        for GroupMember { snapshot, volume } in &group.members {
            match self.get::<Snapshot>(*snapshot).await? {
                Some(stored) => self.give_up(stored, &anywhere).await?,
                None => self.given_up(group, GroupMember { snapshot: *snapshot, volume: *volume }, &anywhere).await?,
            }
        }
        (stored.object.members, stored.object.node, stored.object.strays) = (members, node, strays);
        Ok(self.update(stored).await?)
    }

    /// A member that was never ready is written down as one that whoever has the time deletes.
    async fn given_up(
        &self,
        group: &GroupSnapshot,
        member: GroupMember,
        strays: &BTreeSet<NodeName>,
    ) -> Result<(), Transient> {
        let given_up = Snapshot::wanted(member.snapshot, member.volume, group.node.clone());
        self.create(Snapshot { strays: strays.clone(), deleted: true, ..given_up }).await?;
        Ok(())
    }

    async fn take_group(&self, mut stored: Stored<GroupSnapshot>) -> Result<GroupSnapshot, CreateGroupError> {
        let group = stored.object.clone();
        let descriptor =
            Descriptor::Snapshot { name: None, group: Some(Box::new(group.clone())), made_for: None }.encode();
        let mut wanted = Vec::new();
        let mut missing = None;
        for member in &group.members {
            match self.get::<Volume>(member.volume).await? {
                // Who may have something of it is not written down.
                Some(volume) if volume.object.spec.mirror.is_some() && group.strays.is_empty() => {
                    return Err(Transient::Conflict(format!("volume {}", member.volume)).into());
                }
                Some(volume) => wanted.push((member.snapshot, volume.object)),
                None => missing = Some(SealError::NotFound(member.volume.to_string())),
            }
        }
        let taken = match missing {
            Some(missing) => Err(missing),
            None => self.seal(group.node.as_ref(), &wanted, &descriptor).await,
        };
        let refusal = match taken {
            Ok(taken) => {
                let mut moment = 0;
                for ((member, (_, volume)), sealed) in group.members.iter().zip(&wanted).zip(taken) {
                    if let SnapshotStatus::Ready { created_ms, .. } = sealed.status {
                        moment = created_ms.max(moment);
                    }
                    self.record_member(&group, *member, volume, sealed).await?;
                }
                stored.object.status = GroupStatus::Ready { created_ms: moment };
                // Persist before the caller learns the id.
                return Ok(self.update(stored).await?.object);
            }
            Err(SealError::NoRoom(text)) => CreateGroupError::NoRoom(text),
            Err(SealError::NotFound(text)) => CreateGroupError::SourceNotFound(text),
            Err(SealError::Transient(error)) => return Err(error.into()),
        };
        self.erase_group(stored).await?;
        Err(refusal)
    }

    async fn record_member(
        &self,
        group: &GroupSnapshot,
        member: GroupMember,
        volume: &Volume,
        sealed: Sealed,
    ) -> Result<(), Transient> {
        if self.get::<Snapshot>(member.snapshot).await?.is_some() {
            return Ok(());
        }
        let strays = self.sealing(volume)?.strays;
        let wanted = Snapshot::wanted(member.snapshot, member.volume, group.node.clone());
        self.create(ready(Snapshot { group: Some(group.id), strays, ..wanted }, sealed)).await?;
        Ok(())
    }

    async fn members(&self, group: &GroupSnapshot) -> Result<Vec<Snapshot>, Transient> {
        let mut members = Vec::new();
        for member in &group.members {
            members.extend(self.get::<Snapshot>(member.snapshot).await?.map(|stored| stored.object));
        }
        Ok(members)
    }

    /// The group with this id.
    pub async fn group(&self, wanted: GroupReference) -> Result<csi::VolumeGroupSnapshot, GetGroupError> {
        let missing = || GetGroupError::NotFound(wanted.id.chars().take(128).collect());
        let id: GroupSnapshotId = wanted.id.parse().map_err(|_| missing())?;
        let group = self.get::<GroupSnapshot>(id).await?.ok_or_else(missing)?.object;
        let members = self.members(&group).await?;
        let answer = response::group(&group, &members).ok_or_else(missing)?;
        if wanted.fits(&group) { Ok(answer) } else { Err(GetGroupError::Mismatch(id)) }
    }

    /// The group and its snapshots are not, afterwards.
    pub async fn delete_group(&self, wanted: GroupReference) -> Result<(), DeleteGroupError> {
        let Ok(id) = wanted.id.parse::<GroupSnapshotId>() else { return Ok(()) };
        let _group = self.start_soon(Subject::Group(id)).await?;
        let Some(stored) = self.get::<GroupSnapshot>(id).await? else { return Ok(()) };
        if !wanted.fits(&stored.object) {
            return Err(DeleteGroupError::Mismatch(id));
        }
        self.erase_members(stored).await.map_err(|error| match error {
            DeleteSnapshotError::InUse { id: snapshot, by } => {
                DeleteGroupError::InUse { id, by: format!("snapshot {snapshot}: {by}") }
            }
            other => transient(other).into(),
        })
    }

    /// Needs the group's operation. What is in use is tried again later.
    pub(super) async fn erase_group(&self, stored: Stored<GroupSnapshot>) -> Result<(), Transient> {
        self.erase_members(stored).await.map_err(transient)
    }

    async fn erase_members(&self, mut stored: Stored<GroupSnapshot>) -> Result<(), DeleteSnapshotError> {
        if !stored.object.deleted {
            stored.object.deleted = true;
            stored = self.update(stored).await?;
        }
        for member in &stored.object.members {
            match self.get::<Snapshot>(member.snapshot).await? {
                Some(snapshot) => self.erase_snapshot(snapshot).await?,
                None => {
                    let GroupSnapshot { node, strays, .. } = &stored.object;
                    match self.erase_sealed(member.snapshot, node.as_ref(), strays).await? {
                        Erased::Everywhere => {}
                        Erased::Partly(error) if strays.is_empty() => return Err(error.into()),
                        Erased::Partly(_) => self.given_up(&stored.object, *member, strays).await?,
                    }
                }
            }
        }
        Ok(self.remove(&stored).await?)
    }
}

/// Serves the groups of a [`Controller`].
pub struct GroupService(pub Arc<Controller>);

#[tonic::async_trait]
impl GroupController for GroupService {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<csi::GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::GroupControllerGetCapabilitiesResponse>, Status> {
        let kind = rpc::Type::CreateDeleteGetVolumeGroupSnapshot.into();
        let capability = csi::GroupControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind })) };
        Ok(Response::new(csi::GroupControllerGetCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<csi::CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<csi::CreateVolumeGroupSnapshotResponse>, Status> {
        let controller = self.0.clone();
        answer("CreateVolumeGroupSnapshot", request, |wanted: NewGroup| async move {
            let group_snapshot = Some(controller.create_group(wanted).await?);
            Ok::<_, CreateGroupError>(csi::CreateVolumeGroupSnapshotResponse { group_snapshot })
        })
        .await
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<csi::GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<csi::GetVolumeGroupSnapshotResponse>, Status> {
        let controller = self.0.clone();
        answer("GetVolumeGroupSnapshot", request, |wanted: GroupReference| async move {
            let group_snapshot = Some(controller.group(wanted).await?);
            Ok::<_, GetGroupError>(csi::GetVolumeGroupSnapshotResponse { group_snapshot })
        })
        .await
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<csi::DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<csi::DeleteVolumeGroupSnapshotResponse>, Status> {
        let controller = self.0.clone();
        answer("DeleteVolumeGroupSnapshot", request, |wanted: GroupReference| async move {
            controller.delete_group(wanted).await?;
            Ok::<_, DeleteGroupError>(csi::DeleteVolumeGroupSnapshotResponse {})
        })
        .await
    }
}
