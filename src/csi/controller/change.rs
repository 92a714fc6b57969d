//! ControllerExpandVolume and ControllerModifyVolume: on a volume in use, without a pause.
//!
//! Invariants: the wish is in `spec` before a replica acts, what the replicas confirmed is in `status`; a wish that one of
//! them refuses is taken back, so that nothing tries it again behind the caller's back. One that a node has not followed in
//! time stays: the call is repeated, or the node follows later ([`settle`](super::settle)).

use super::Controller;
use super::create::short;
use super::replicas::replication;
use super::request::{Expand, Modify};
use crate::catalog::{Access, MirrorSpec, Stored, Volume};
use crate::csi::control::ControlError;
use crate::csi::errors::{ArgumentError, ExpandError, ModifyError, RangeError, Transient};
use crate::csi::operations::Subject;
use crate::csi::parameters::Changes;
use crate::rpc::control::{ExpandVolumeRequest, ModifyVolumeRequest};
use crate::volume::{VolumeId, VolumeSize};

/// What ControllerExpandVolume answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expanded {
    /// Of the volume, now.
    pub size: VolumeSize,
    /// Whether a filesystem has to follow.
    pub node_expansion_required: bool,
}

impl Controller {
    /// The volume has at least the wanted size, afterwards.
    pub async fn expand(&self, wanted: Expand) -> Result<Expanded, ExpandError> {
        let missing = || ExpandError::NotFound(short(&wanted.volume));
        let id: VolumeId = wanted.volume.parse().map_err(|_| missing())?;
        let _volume = self.start_soon(Subject::Volume(id)).await?;
        let stored = self.get::<Volume>(id).await?.filter(|s| s.object.is_visible()).ok_or_else(missing)?;
        let is_block = match wanted.capability {
            Some(capability) => capability.access == Access::Block,
            None => stored.object.request.access.iter().all(|access| *access == Access::Block),
        };
        let current = stored.object.status.size;
        let size = wanted.size.choose(current.bytes(), current.bytes())?;
        let size = match &stored.object.spec.mirror {
            _ if size <= current => current,
            Some(_) => self.grow_copies(stored, size).await?,
            None => self.grow(stored, size).await?,
        };
        Ok(Expanded { size, node_expansion_required: !is_block })
    }

    /// Needs the volume's operation.
    async fn grow_copies(&self, stored: Stored<Volume>, size: VolumeSize) -> Result<VolumeSize, ExpandError> {
        self.check_room(&stored.object, size).await?;
        let id = stored.object.id;
        let wish = |volume: &mut Volume| {
            volume.spec.size = size;
            volume.status.reports.values_mut().for_each(|report| report.refused = None);
        };
        if stored.object.spec.size != size {
            self.change(stored, wish).await?;
        }
        let grown = self.settled(id, "grown", |volume, refused| match refused {
            Some(reason) => Some(Err(ExpandError::NoRoom(reason))),
            None => (volume.status.size >= size).then_some(Ok(volume.status.size)),
        });
        grown.await?
    }

    /// Where the pool of a copy cannot take it for certain, nothing is begun. The replicas have the last word.
    async fn check_room(&self, volume: &Volume, size: VolumeSize) -> Result<(), ExpandError> {
        let pools = self.nodes.pools().await?.pools;
        for (copy, place) in volume.spec.mirror.iter().flat_map(MirrorSpec::staying) {
            let held = volume.status.reports.get(&copy).map_or(volume.status.size, |report| report.size);
            let more = size.bytes().saturating_sub(held.bytes());
            let pool = pools.iter().find(|pool| pool.node == place.node && pool.pool == place.pool);
            if let Some(pool) = pool.filter(|pool| pool.free < more) {
                let (node, name, free) = (&place.node, &place.pool, pool.free);
                let text = format!("pool {name} of node {node} can promise {free} bytes, and {more} more are wanted");
                return Err(ExpandError::NoRoom(text));
            }
        }
        Ok(())
    }

    /// Needs the volume's operation.
    pub(super) async fn grow(&self, mut stored: Stored<Volume>, size: VolumeSize) -> Result<VolumeSize, ExpandError> {
        let id = stored.object.id;
        if stored.object.spec.size != size {
            stored.object.spec.size = size;
            stored = self.update(stored).await?;
        }
        let request = ExpandVolumeRequest { volume_id: id.to_string(), size_bytes: size.bytes() };
        let control = self.home(&stored.object).await?.control;
        let refusal = match control.client().expand_volume(request).await.map_err(|status| control.refusal(status)) {
            Ok(answer) => {
                let bytes = answer.into_inner().size_bytes;
                let grown = VolumeSize::try_from(bytes).ok().filter(|grown| *grown >= size);
                let text = || format!("volume {id} has {bytes} bytes after growing to {size:?}");
                let grown = grown.ok_or_else(|| Transient::Replica(ControlError::Unknown(text())))?;
                stored.object.spec.size = grown;
                stored.object.status.size = grown;
                self.update(stored).await?;
                return Ok(grown);
            }
            Err(ControlError::NoRoom(text)) => ExpandError::NoRoom(text),
            Err(ControlError::Refused(text)) => RangeError(text).into(),
            Err(error @ (ControlError::Unknown(_) | ControlError::NotFound(_) | ControlError::InUse(_))) => {
                return Err(Transient::Replica(error).into());
            }
        };
        stored.object.spec.size = stored.object.status.size;
        self.update(stored).await?;
        Err(refusal)
    }

    /// The volume has the wanted attributes, afterwards; all of them or none.
    pub async fn modify(&self, wanted: Modify) -> Result<(), ModifyError> {
        let missing = || ModifyError::NotFound(short(&wanted.volume));
        let id: VolumeId = wanted.volume.parse().map_err(|_| missing())?;
        let _volume = self.start_soon(Subject::Volume(id)).await?;
        let stored = self.get::<Volume>(id).await?.filter(|s| s.object.is_visible()).ok_or_else(missing)?;
        let volume = &stored.object;
        let now = replication(volume);
        let replication = wanted.changes.replication(now).map_err(ArgumentError::from)?;
        let copies = if replication == now {
            volume.spec.mirror.clone()
        } else {
            self.can_replicate(replication)?;
            Some(self.plan_copies(volume, replication).await?)
        };
        match (copies, wanted.changes.verify_reads) {
            (Some(copies), _) => self.change_copies(stored, copies, wanted.changes).await,
            (None, Some(verify_reads)) => self.set_verify_reads(stored, verify_reads).await,
            (None, None) => Ok(()),
        }
    }

    /// Needs the volume's operation. New copies are placed and recorded when it returns, and the nodes go on.
    async fn change_copies(
        &self,
        stored: Stored<Volume>,
        copies: MirrorSpec,
        changes: Changes,
    ) -> Result<(), ModifyError> {
        let verify_reads = changes.verify_reads;
        let (id, had_one) = (stored.object.id, stored.object.spec.mirror.is_none());
        let wish = |volume: &mut Volume| {
            volume.spec.verify_reads = verify_reads.unwrap_or(volume.spec.verify_reads);
            volume.spec.rebuild_after = changes.rebuild_after.unwrap_or(volume.spec.rebuild_after);
            if had_one {
                // Its node has just named it: it is there, and the volume is not deleted before it is gone.
                volume.status.copies.extend(copies.primary);
                volume.spec.node = None;
            }
            volume.spec.mirror = Some(copies.clone());
        };
        let mut wanted = stored.object.clone();
        wish(&mut wanted);
        let changed = if wanted == stored.object { stored } else { self.change(stored, wish).await? };
        self.begin_mirror(&changed.object).await?;
        let Some(verify_reads) = verify_reads else { return Ok(()) };
        let is_so = |volume: &Volume, _| (volume.status.verify_reads == verify_reads).then_some(());
        Ok(self.settled(id, "changed", is_so).await?)
    }

    /// Needs the volume's operation.
    pub(super) async fn set_verify_reads(
        &self,
        mut stored: Stored<Volume>,
        verify_reads: bool,
    ) -> Result<(), ModifyError> {
        let (spec, status) = (&mut stored.object.spec, &stored.object.status);
        if spec.verify_reads == verify_reads && status.verify_reads == verify_reads {
            return Ok(());
        }
        if spec.verify_reads != verify_reads {
            spec.verify_reads = verify_reads;
            stored = self.update(stored).await?;
        }
        let volume_id = stored.object.id.to_string();
        let request = ModifyVolumeRequest { volume_id, verify_reads: Some(verify_reads), descriptor: None };
        let control = self.home(&stored.object).await?.control;
        match control.client().modify_volume(request).await.map_err(|status| control.refusal(status)) {
            Ok(_) => {
                stored.object.status.verify_reads = verify_reads;
                self.update(stored).await?;
                Ok(())
            }
            Err(ControlError::Refused(text)) => {
                stored.object.spec.verify_reads = stored.object.status.verify_reads;
                self.update(stored).await?;
                Err(ModifyError::Refused(text))
            }
            Err(
                error @ (ControlError::Unknown(_)
                | ControlError::NotFound(_)
                | ControlError::InUse(_)
                | ControlError::NoRoom(_)),
            ) => Err(Transient::Replica(error).into()),
        }
    }
}
