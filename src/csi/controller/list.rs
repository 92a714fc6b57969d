//! What is there: ListVolumes, ListSnapshots, ControllerGetVolume and the health of volumes.
//!
//! Invariants: lists are ordered by id and a token is the last id of a page, so a page never skips or repeats a volume
//! that was there all the time; what is half made or half deleted is in no list.

use super::Controller;
use super::create::short;
use super::request::{Page, SnapshotPage};
use super::response;
use crate::catalog::{Snapshot, Volume};
use crate::csi::control::ControlError;
use crate::csi::errors::{GetVolumeError, ListError, Transient, VolumeHealthError};
use crate::csi::nodes::Node;
use crate::rpc::control::{self, GetVolumeRequest, health::Kind};
use crate::rpc::csi;
use crate::volume::VolumeId;
use std::collections::BTreeMap;

impl Controller {
    /// One page of volumes, and the token of the next.
    pub async fn list_volumes(&self, page: Page) -> Result<(Vec<Volume>, String), ListError> {
        let volumes = self.visible_volumes().await?;
        cut(volumes, |volume| volume.id.to_string(), &page)
    }

    async fn visible_volumes(&self) -> Result<Vec<Volume>, Transient> {
        let volumes = self.all::<Volume>().await?.into_iter().map(|stored| stored.object);
        Ok(volumes.filter(Volume::is_visible).collect())
    }

    /// One page of snapshots, and the token of the next.
    pub async fn list_snapshots(&self, wanted: SnapshotPage) -> Result<(Vec<csi::Snapshot>, String), ListError> {
        let snapshots = self.all::<Snapshot>().await?;
        let snapshots = snapshots.iter().filter_map(|stored| response::snapshot(&stored.object));
        let is_wanted = |snapshot: &csi::Snapshot| {
            wanted.volume.as_ref().is_none_or(|id| *id == snapshot.source_volume_id)
                && wanted.snapshot.as_ref().is_none_or(|id| *id == snapshot.snapshot_id)
        };
        cut(snapshots.filter(is_wanted).collect(), |snapshot| snapshot.snapshot_id.clone(), &wanted.page)
    }

    /// The volume with this id.
    pub async fn volume(&self, id: &str) -> Result<Volume, GetVolumeError> {
        let missing = || GetVolumeError::NotFound(short(id));
        let key: VolumeId = id.parse().map_err(|_| missing())?;
        let volume = self.get::<Volume>(key).await?.map(|stored| stored.object);
        volume.filter(Volume::is_visible).ok_or_else(missing)
    }

    /// What the replica says of the volume; nothing: it is healthy.
    pub async fn volume_health(&self, id: &str) -> Result<csi::VolumeHealth, VolumeHealthError> {
        let volume = self.volume(id).await.map_err(|error| match error {
            GetVolumeError::NotFound(id) => VolumeHealthError::NotFound(id),
            GetVolumeError::Argument(error) => error.into(),
            GetVolumeError::Transient(error) => error.into(),
        })?;
        if volume.spec.mirror.is_some() {
            return Ok(self.mirror_health(&volume).await?);
        }
        let request = GetVolumeRequest { volume_id: volume.id.to_string() };
        let control = self.home(&volume).await?.control;
        match control.client().get_volume(request).await.map_err(|status| control.refusal(status)) {
            Ok(answer) => Ok(health(volume.id, Some(&answer.into_inner()))),
            Err(ControlError::NotFound(_)) => Ok(health(volume.id, None)),
            Err(
                error @ (ControlError::Unknown(_)
                | ControlError::NoRoom(_)
                | ControlError::InUse(_)
                | ControlError::Refused(_)),
            ) => Err(Transient::Replica(error).into()),
        }
    }

    /// The health of one page of volumes, and the token of the next. A node that does not answer is the health of its
    /// volumes, and no error of the list.
    pub async fn list_volume_health(&self, page: Page) -> Result<(Vec<csi::VolumeHealth>, String), ListError> {
        let (volumes, next) = self.list_volumes(page).await?;
        let mut nodes = BTreeMap::new();
        let mut entries = Vec::new();
        for volume in &volumes {
            if volume.spec.mirror.is_some() {
                entries.push(self.mirror_health(volume).await?);
                continue;
            }
            let place = volume.spec.node.as_ref();
            let name = self.nodes.name_of(place);
            if !nodes.contains_key(&name) {
                nodes.insert(name.clone(), copies(&self.nodes.holder(place).await?).await);
            }
            entries.push(match &nodes[&name] {
                Ok(copies) => health(volume.id, copies.get(&volume.id.to_string())),
                Err(error) => unreachable(volume.id, error),
            });
        }
        Ok((entries, next))
    }
}

/// Everything that the node has, by id.
async fn copies(node: &Node) -> Result<BTreeMap<String, control::Volume>, ControlError> {
    Ok(node.copies().await?.into_iter().map(|copy| (copy.volume_id.clone(), copy)).collect())
}

/// The page of `items`, which are ordered by `key`, and the token of the next one.
fn cut<T>(items: Vec<T>, key: impl Fn(&T) -> String, page: &Page) -> Result<(Vec<T>, String), ListError> {
    if !page.token.is_empty() && page.token.parse::<VolumeId>().is_err() {
        return Err(ListError::Token(short(&page.token)));
    }
    // Every key is greater than the empty token.
    let mut left = items.into_iter().filter(|item| key(item) > page.token);
    let entries: Vec<T> = left.by_ref().take(page.entries.unwrap_or(usize::MAX)).collect();
    let more = left.next().is_some();
    let next = entries.last().filter(|_| more).map(key).unwrap_or_default();
    Ok((entries, next))
}

/// The only copy is on a node that does not answer.
fn unreachable(id: VolumeId, error: &ControlError) -> csi::VolumeHealth {
    let status = csi::VolumeHealthErrorType::Inaccessible.into();
    let (reason, message) = ("NodeUnreachable".to_owned(), error.to_string());
    let entry = csi::volume_health::VolumeHealthEntry { status, reason, message };
    csi::VolumeHealth { volume_id: id.to_string(), health_statuses: vec![entry] }
}

/// `None`: the replica does not have it.
fn health(id: VolumeId, copy: Option<&control::Volume>) -> csi::VolumeHealth {
    use csi::volume_health::VolumeHealthEntry;
    let entries = match copy {
        Some(copy) => copy.health.iter().map(|health| VolumeHealthEntry {
            status: kind(health.kind()).into(),
            reason: health.reason.clone(),
            message: health.message.clone(),
        }),
        None => {
            let status = csi::VolumeHealthErrorType::Inaccessible.into();
            let message = "no pool of its node has the volume: is its pool missing? see `tandem pool list`".to_owned();
            let entry = VolumeHealthEntry { status, reason: "CopyMissing".to_owned(), message };
            return csi::VolumeHealth { volume_id: id.to_string(), health_statuses: vec![entry] };
        }
    };
    csi::VolumeHealth { volume_id: id.to_string(), health_statuses: entries.collect() }
}

fn kind(kind: Kind) -> csi::VolumeHealthErrorType {
    match kind {
        Kind::Unknown | Kind::Note => csi::VolumeHealthErrorType::UnknownVolumeHealthType,
        Kind::Degraded => csi::VolumeHealthErrorType::Degraded,
        Kind::Inaccessible => csi::VolumeHealthErrorType::Inaccessible,
        Kind::DataLoss => csi::VolumeHealthErrorType::DataLoss,
    }
}
