//! An operator's requests: what they change, and when they are done.
//!
//! Invariants: each is one append of records to the pending region, so it happened as a whole or not at all; its answer
//! waits until that is durable; repeating what has happened changes nothing and still waits, since it may not be durable.

use super::commit::Waiter;
use super::format::LayerId;
use super::record::Record;
use super::tree::Role;
use super::{Action, Control, ControlError, Job, MAX_SNAPSHOTS, Store};
use crate::protocol::OperationId;
use crate::volume::{SnapshotId, VolumeId, VolumeSize};

/// Records of the largest operation.
const MOST_RECORDS: usize = 3;

impl Store {
    /// Starts an operator's request; [`Action::ControlDone`] ends it.
    pub fn control(&mut self, operation: OperationId, control: Control, out: &mut Vec<Action<Job>>) {
        let done = match control {
            Control::CreateVolume { volume, size, verify_reads } => {
                self.create_volume(volume, None, size, verify_reads)
            }
            Control::Clone { snapshot, volume, size, verify_reads } => {
                self.clone_snapshot(snapshot, volume, size, verify_reads)
            }
            Control::Seal { volume, snapshot, created_ms } => {
                let sealed = self.seal_now(volume, snapshot, created_ms);
                return self.seal(operation, sealed, out);
            }
            Control::SealAs { filled, snapshot, volume, created_ms } => {
                let sealed = self.seal_as_now(filled, snapshot, volume, created_ms);
                #[cfg(test)]
                if self.planted == Some(super::planted::Planted::FillAnsweredEarly) && sealed.is_ok() {
                    return out.push(Action::ControlDone { operation, result: Ok(()) });
                }
                return self.seal(operation, sealed, out);
            }
            Control::DeleteVolume(volume) => self.delete_volume(volume),
            Control::DeleteSnapshot(snapshot) => self.delete_snapshot(snapshot),
            Control::Resize { volume, size } => self.resize(volume, size),
            Control::Modify { volume, verify_reads } => self.modify(volume, verify_reads),
        };
        match done {
            Ok(()) => self.commit.wait(Waiter::Control(operation)),
            Err(error) => out.push(Action::ControlDone { operation, result: Err(error) }),
        }
        self.pump(out);
    }

    pub(super) fn record(&mut self, records: &[Record]) -> Result<(), ControlError> {
        debug_assert!(records.len() <= MOST_RECORDS);
        if !self.pending.has_room_for_control(records.len()) {
            return Err(ControlError::Busy);
        }
        self.change(records);
        self.background.changed();
        self.keep_budget();
        Ok(())
    }

    fn create_volume(
        &mut self,
        volume: VolumeId,
        parent: Option<LayerId>,
        size: VolumeSize,
        verify_reads: bool,
    ) -> Result<(), ControlError> {
        if let Some(known) = self.tree.volumes.get(&volume) {
            // Made before; it may have been resized or sealed since, which is no reason to refuse.
            let root = self.tree.path(known.top).any(|(id, _)| Some(id) == parent);
            return if known.size >= size && (root || parent.is_none()) { Ok(()) } else { Err(ControlError::Exists) };
        }
        let layer = LayerId(self.tree.next_layer);
        self.record(&[Record::NewLayer { layer, parent }, Record::NameVolume { layer, volume, size, verify_reads }])
    }

    fn clone_snapshot(
        &mut self,
        id: SnapshotId,
        volume: VolumeId,
        size: VolumeSize,
        verify_reads: bool,
    ) -> Result<(), ControlError> {
        let Some(snapshot) = self.tree.snapshots.get(&id).copied() else {
            // A clone outlives its snapshot.
            let known = self.tree.volumes.contains_key(&volume);
            return if known { Ok(()) } else { Err(ControlError::UnknownSnapshot(id)) };
        };
        if size < snapshot.size {
            return Err(ControlError::SizeSmaller(snapshot.size.bytes()));
        }
        let layer = self.tree.layers.get(&snapshot.layer);
        if layer.is_none_or(|layer| !layer.settled) {
            // A write that is in flight since before the seal may still change it.
            return Err(ControlError::Busy);
        }
        self.create_volume(volume, Some(snapshot.layer), size, verify_reads)
    }

    fn seal(&mut self, operation: OperationId, sealed: Result<LayerId, ControlError>, out: &mut Vec<Action<Job>>) {
        let sealed = match sealed {
            Ok(layer) => layer,
            Err(error) => {
                out.push(Action::ControlDone { operation, result: Err(error) });
                return self.pump(out);
            }
        };
        // The switch is made; the answer waits for writes in flight that chose their place before it.
        self.commit.wait_for_writers(operation, sealed);
        self.resume_seals();
        self.pump(out);
    }

    fn seal_now(&mut self, id: VolumeId, snapshot: SnapshotId, created_ms: u64) -> Result<LayerId, ControlError> {
        if let Some(known) = self.tree.snapshots.get(&snapshot) {
            return if known.volume == id { Ok(known.layer) } else { Err(ControlError::Exists) };
        }
        let volume = self.tree.volumes.get(&id).ok_or(ControlError::UnknownVolume(id))?;
        let (sealed, size, verify_reads) = (volume.top, volume.size, volume.verify_reads);
        // Bases of mirrors are nobody's snapshots, and few.
        if self.tree.path(sealed).filter(|(_, layer)| layer.role != Role::Base).count() > MAX_SNAPSHOTS {
            return Err(ControlError::TooManySnapshots(id));
        }
        let layer = LayerId(self.tree.next_layer);
        self.record(&[
            Record::NewLayer { layer, parent: Some(sealed) },
            Record::NameVolume { layer, volume: id, size, verify_reads },
            Record::NameSnapshot { layer: sealed, snapshot, volume: id, size, created_ms },
        ])?;
        Ok(sealed)
    }

    fn seal_as_now(
        &mut self,
        filled: VolumeId,
        id: SnapshotId,
        of: VolumeId,
        created_ms: u64,
    ) -> Result<LayerId, ControlError> {
        if let Some(known) = self.tree.snapshots.get(&id) {
            let is_it = known.volume == of && self.is_beside(id, of) == Some(true);
            return if is_it { Ok(known.layer) } else { Err(ControlError::Exists) };
        }
        let volume = self.tree.volumes.get(&filled).ok_or(ControlError::UnknownVolume(filled))?;
        if volume.in_flight > 0 {
            return Err(ControlError::Busy);
        }
        let (layer, size) = (volume.top, volume.size);
        // As for a seal: whoever is cloned from it has it below.
        if self.tree.path(layer).filter(|(_, layer)| layer.role != Role::Base).count() > MAX_SNAPSHOTS {
            return Err(ControlError::TooManySnapshots(of));
        }
        self.record(&[
            Record::UnnameVolume { volume: filled },
            Record::NameSnapshot { layer, snapshot: id, volume: of, size, created_ms },
        ])?;
        self.fillings.remove(&filled);
        self.keep_budget();
        Ok(layer)
    }

    /// Whether the snapshot was filled beside the volume, and not sealed in its own line of layers; `None`: there is none.
    pub fn is_beside(&self, snapshot: SnapshotId, volume: VolumeId) -> Option<bool> {
        let layer = self.tree.snapshots.get(&snapshot)?.layer;
        let top = self.tree.volumes.get(&volume).map(|volume| volume.top);
        Some(top.is_none_or(|top| self.tree.path(top).all(|(id, _)| id != layer)))
    }

    fn delete_volume(&mut self, id: VolumeId) -> Result<(), ControlError> {
        let Some(volume) = self.tree.volumes.get(&id) else {
            self.fillings.remove(&id);
            return Ok(());
        };
        if volume.in_flight > 0 {
            return Err(ControlError::Busy);
        }
        let top = volume.top;
        let bases = self.tree.bases_of(id);
        self.record(&[Record::UnnameVolume { volume: id }])?;
        self.fillings.remove(&id);
        self.keep_budget();
        bases.into_iter().chain([top]).for_each(|layer| self.now_nameless(layer));
        self.mirrors.volume_gone(id, self.commit.next());
        Ok(())
    }

    fn delete_snapshot(&mut self, id: SnapshotId) -> Result<(), ControlError> {
        let Some(snapshot) = self.tree.snapshots.get(&id).copied() else { return Ok(()) };
        self.record(&[Record::UnnameSnapshot { snapshot: id }])?;
        self.now_nameless(snapshot.layer);
        Ok(())
    }

    /// Not before the commit that makes it durable is the layer merged or freed: after a power cut the name may be back.
    pub(super) fn now_nameless(&mut self, layer: LayerId) {
        if let Some(layer) = self.tree.layers.get_mut(&layer) {
            layer.nameless_by = self.commit.next();
        }
    }

    fn resize(&mut self, id: VolumeId, size: VolumeSize) -> Result<(), ControlError> {
        let volume = self.tree.volumes.get(&id).ok_or(ControlError::UnknownVolume(id))?;
        if size < volume.size {
            return Err(ControlError::SizeSmaller(volume.size.bytes()));
        }
        if size == volume.size { Ok(()) } else { self.record(&[Record::Resize { volume: id, size }]) }
    }

    fn modify(&mut self, id: VolumeId, verify_reads: bool) -> Result<(), ControlError> {
        let volume = self.tree.volumes.get(&id).ok_or(ControlError::UnknownVolume(id))?;
        if volume.verify_reads == verify_reads {
            return Ok(());
        }
        self.record(&[Record::Modify { volume: id, verify_reads }])
    }
}
