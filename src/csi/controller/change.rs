//! ControllerExpandVolume and ControllerModifyVolume: on a volume in use, without a pause.
//!
//! Invariants: the wish is in `spec` before the replica acts, what the replica confirmed is in `status`; a wish that the
//! replica refuses is taken back, so that nothing tries it again behind the caller's back.

use super::Controller;
use super::create::short;
use super::mirror::single;
use super::request::{Expand, Modify};
use crate::catalog::{Access, Stored, Volume};
use crate::csi::control::ControlError;
use crate::csi::errors::{ExpandError, ModifyError, RangeError, Transient};
use crate::csi::operations::Subject;
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
        let _volume = self.start(Subject::Volume(id))?;
        let stored = self.get::<Volume>(id).await?.filter(|s| s.object.is_visible()).ok_or_else(missing)?;
        single(&stored.object, "grown")?;
        let is_block = match wanted.capability {
            Some(capability) => capability.access == Access::Block,
            None => stored.object.request.access.iter().all(|access| *access == Access::Block),
        };
        let current = stored.object.status.size;
        let size = wanted.size.choose(current.bytes(), current.bytes())?;
        let size = if size > current { self.grow(stored, size).await? } else { current };
        Ok(Expanded { size, node_expansion_required: !is_block })
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
        let _volume = self.start(Subject::Volume(id))?;
        let stored = self.get::<Volume>(id).await?.filter(|s| s.object.is_visible()).ok_or_else(missing)?;
        single(&stored.object, "modified")?;
        match wanted.changes.verify_reads {
            Some(verify_reads) => self.set_verify_reads(stored, verify_reads).await,
            None => Ok(()),
        }
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
