//! What a volume with copies elsewhere keeps beside its own: its record, its hot extents, and what those lack that left.
//!
//! ```text
//!   persist     Wanted ──> Sealing (a base, in the map log) ──> Writing ──> Syncing ──> done; bases without a name go
//!                 └─ nobody left since, or no base can be kept ──^
//!   write_hot                                                   Writing ──> Syncing ──> done
//! ```
//! A **base** is the volume's newest layer at the moment when a copy left, sealed. It is merged only when no record names
//! it any more, so what the copy lacks is what the layers above it have, and the extents that were hot at that moment:
//! they cover what was in flight, and what only some copies had. (A core that knows what was in flight, of a copy that has
//! kept its caches, names that instead.)
//!
//! # Invariants
//! * **Base before record**: a record that names a base is written when the seal is durable in the map log.
//! * **Record before release**: a base loses its name when a durable record does not name it; bases that a crash left
//!   without a record are let go when the tree is opened, after the records that were read are durable.
//! * A copy for which no base could be kept is recorded as such: it lacks the whole volume.
//! * What a crash left of an update never becomes whole again: the slot that is next is spoilt at each open.
//! * One update of each kind at a time; after a failed one nothing is updated until the tree is opened again, since
//!   nobody knows what is on disk. Volumes without copies elsewhere are not in here, and pay nothing.

pub(super) mod older;
mod plan;
mod slot;
mod state;
#[cfg(test)]
mod tests;

pub use plan::MirrorPlan;
pub use state::MirrorError;
pub(super) use state::{Mirrors, Part};

use super::commit::{Failure, Waiter};
use super::format::LayerId;
use super::record::Record as Change;
use super::requests::InFlight;
use super::{Action, Buffer, File, Io, Job, Store};
use crate::memory::Memory;
use crate::protocol::{DiskError, Extent, MAX_COPIES, MAX_MARKS, OperationId, Record};
use crate::volume::{BootId, VolumeId};
use slot::REGION;
use state::{Kept, Mirror, Step, Update};

/// Bases of one volume: one for each copy that may be out, twice, since those without a name go a little later.
const MAX_BASES: usize = 2 * MAX_COPIES;

const RECORD: usize = Part::Record as usize;
const HOT: usize = Part::Hot as usize;

/// Whether the pool has promised the space that a seal may newly take: a full overwrite of the volume's newest layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// A base may be kept.
    Promised,
    /// None may: a copy that leaves now lacks the whole volume.
    Refused,
}

/// What is durable about a mirrored volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mirrored<'a> {
    /// What its copy is under.
    pub record: &'a Record,
    /// The life of the node that wrote it.
    pub boot: BootId,
    /// Where its copy is marked hot, ascending.
    pub hot: &'a [Extent],
}

impl Store {
    /// What is durable about the volume; `None` if it never had a record.
    pub fn mirrored(&self, volume: VolumeId) -> Option<Mirrored<'_>> {
        let mirror = self.mirrors.volumes.get(&volume)?;
        mirror.kept.as_ref().map(|kept| Mirrored { record: &kept.record, boot: kept.boot, hot: &mirror.hot })
    }

    /// Makes a record durable, and keeps from now on what those copies lack that left since the one before;
    /// [`Action::Done`] ends it.
    pub fn persist(
        &mut self,
        operation: OperationId,
        volume: VolumeId,
        record: Record,
        boot: BootId,
        reserve: Reserve,
        out: &mut Vec<Action<Job>>,
    ) {
        match self.begin_persist(operation, volume, record, boot, reserve) {
            Ok(Step::Wanted) => self.mirror_step(out),
            Ok(Step::Sealing | Step::Writing | Step::Syncing) => self.write_record(volume, out),
            Err(error) => out.push(Action::Done { operation, result: Err(error) }),
        }
        self.pump(out);
    }

    fn begin_persist(
        &mut self,
        operation: OperationId,
        id: VolumeId,
        record: Record,
        boot: BootId,
        reserve: Reserve,
    ) -> Result<Step, DiskError> {
        let fits = record.configuration.copies().count() <= MAX_COPIES;
        if self.mirrors.failed || self.commit.failure().is_some() || !fits {
            return Err(DiskError::Failed);
        }
        let volume = self.tree.volumes.get_mut(&id).ok_or(DiskError::Failed)?;
        if !self.mirrors.volumes.contains_key(&id) {
            let mirror = self.mirrors.settle(|commit| self.commit.is_durable(commit));
            self.mirrors.volumes.insert(id, mirror);
        }
        let mirror = self.mirrors.volumes.get_mut(&id).filter(|mirror| mirror.updates[RECORD].is_none());
        let mirror = mirror.ok_or(DiskError::Failed)?;
        let (lacking, left) = mirror.lacking(&record.configuration, self.superblock.instance);
        let bases = self.tree.bases.values().filter(|of| **of == id).count();
        let keeps = reserve == Reserve::Promised && bases < MAX_BASES;
        let step = if keeps && !left.is_empty() { Step::Wanted } else { Step::Writing };
        (mirror.left, mirror.hot_since) = (left, [&mirror.hot[..], &mirror.next_hot].concat());
        mirror.next_kept = Some(Kept { record, boot, lacking });
        mirror.updates[RECORD] = Some(Update { operation, step, failures: self.pending.failures() });
        volume.in_flight += 1;
        #[cfg(test)]
        if self.planted == Some(super::planted::Planted::BaseReleasedFirst) {
            let kept = mirror.kept.take();
            self.let_bases_go();
            self.mirrors.volumes.entry(id).and_modify(|mirror| mirror.kept = kept);
        }
        Ok(step)
    }

    /// Makes the set of marked extents durable, in place of the one before; [`Action::Done`] ends it.
    pub fn write_hot(&mut self, operation: OperationId, id: VolumeId, extents: &[Extent], out: &mut Vec<Action<Job>>) {
        let mirror = self.mirrors.volumes.get_mut(&id);
        let mirror = mirror.filter(|mirror| mirror.kept.is_some() && mirror.updates[HOT].is_none());
        let may = !self.mirrors.failed && extents.len() <= MAX_MARKS;
        let (Some(mirror), Some(volume), true) = (mirror, self.tree.volumes.get_mut(&id), may) else {
            return out.push(Action::Done { operation, result: Err(DiskError::Failed) });
        };
        volume.in_flight += 1;
        mirror.next_hot = extents.to_vec();
        mirror.next_hot.sort_unstable();
        mirror.next_hot.dedup();
        if mirror.updates[RECORD].is_some_and(|update| update.step == Step::Wanted) {
            mirror.hot_since.extend_from_slice(extents);
        }
        let body = slot::encode_hot(&mirror.next_hot);
        mirror.updates[HOT] = Some(Update { operation, step: Step::Writing, failures: self.pending.failures() });
        self.write_slot(id, Part::Hot, &body, out);
        self.pump(out);
    }

    /// Goes on with what waited for room.
    pub(super) fn mirror_step(&mut self, out: &mut Vec<Action<Job>>) {
        self.mirrors.waits_for_room = false;
        let wants = |mirror: &Mirror| mirror.updates[RECORD].is_some_and(|update| update.step == Step::Wanted);
        let wanted = self.mirrors.volumes.iter().filter(|(_, mirror)| wants(mirror));
        for volume in wanted.map(|(id, _)| *id).collect::<Vec<_>>() {
            if self.commit.failure().is_some() {
                self.finish_update(volume, Part::Record, Err(DiskError::Failed), out);
            } else if self.seal_base(volume) {
                #[cfg(test)]
                if self.planted == Some(super::planted::Planted::RecordBeforeBase) {
                    self.write_record(volume, out);
                    continue;
                }
                // Base before record.
                self.commit.wait(Waiter::Base(volume));
            }
        }
        self.let_bases_go();
    }

    /// Ends the volume's newest layer, if there is room: what is written from now on lies above it.
    fn seal_base(&mut self, id: VolumeId) -> bool {
        let Some(volume) = self.tree.volumes.get(&id) else { return false };
        let (base, layer) = (volume.top, LayerId(self.tree.next_layer));
        let (size, verify_reads) = (volume.size, volume.verify_reads);
        let sealed = self.record(&[
            Change::NewLayer { layer, parent: Some(base) },
            Change::NameVolume { layer, volume: id, size, verify_reads },
            Change::NameBase { layer: base, volume: id },
        ]);
        if sealed.is_err() {
            self.wait_for_room();
            return false;
        }
        let Some(mirror) = self.mirrors.volumes.get_mut(&id) else { return false };
        // Writes that are in flight may still land in the base, or have: their extents are marked.
        let marked = mirror.marked();
        #[cfg(test)]
        let marked = if self.planted == Some(super::planted::Planted::MarksForgotten) {
            Some(std::sync::Arc::default())
        } else {
            marked
        };
        let lacking = mirror.next_kept.iter_mut().flat_map(|kept| &mut kept.lacking);
        for lacking in lacking.filter(|lacking| mirror.left.contains(&lacking.since)) {
            if let Some(hot) = &marked {
                (lacking.base, lacking.hot) = (Some(base), hot.clone());
            }
        }
        mirror.updates[RECORD].iter_mut().for_each(|update| update.step = Step::Sealing);
        true
    }

    /// The seals are durable, or will never be.
    pub(super) fn bases_sealed(&mut self, out: &mut Vec<Action<Job>>) {
        while let Some(volume) = self.mirrors.sealed.pop() {
            match self.commit.failure() {
                Some(_) => self.finish_update(volume, Part::Record, Err(DiskError::Failed), out),
                None => self.write_record(volume, out),
            }
        }
    }

    fn write_record(&mut self, volume: VolumeId, out: &mut Vec<Action<Job>>) {
        let Some(mirror) = self.mirrors.volumes.get_mut(&volume) else { return };
        mirror.updates[RECORD].iter_mut().for_each(|update| update.step = Step::Writing);
        let Some(body) = mirror.next_kept.as_ref().map(slot::encode_record) else { return };
        self.write_slot(volume, Part::Record, &body, out);
    }

    /// Writes the next slot of a part.
    fn write_slot(&mut self, volume: VolumeId, part: Part, body: &[u8], out: &mut Vec<Action<Job>>) {
        let (instance, regions) = (self.superblock.instance, self.mirrors.regions);
        let Some(mirror) = self.mirrors.volumes.get_mut(&volume) else { return };
        let sequence = mirror.sequences[part as usize] + 1;
        let (start, bytes) = slot::place(part, sequence);
        #[cfg(test)]
        let in_place = self.planted == Some(super::planted::Planted::HotInPlace);
        #[cfg(test)]
        let start = if in_place { slot::place(part, 0).0 } else { start };
        let kind = if part == Part::Record { &slot::RECORD } else { &slot::HOT };
        // A new region is written whole, so that an update is an overwrite: it needs no space and changes no map below.
        let is_new = part == Part::Record && mirror.region >= regions;
        let memory = &mut mirror.memory[part as usize];
        if memory.is_none() {
            *memory = Memory::zeros(if is_new { REGION } else { bytes }).ok();
        }
        let Some(memory) = memory else { return self.update_failed(volume, part, DiskError::NoSpace, out) };
        let at = if is_new { start } else { 0 };
        let used = slot::encode(kind, instance, volume, sequence, body, &mut memory.bytes_mut()[at..at + bytes]);
        let (start, length) = if is_new { (0, REGION) } else { (start, used) };
        let offset = u64::from(mirror.region) * REGION as u64 + start as u64;
        let what = Io::Write { offset, length: length as u32, buffer: Buffer::Store(memory.as_ptr()) };
        self.issue(InFlight::Mirror(volume, part), File::Mirror, what, out);
    }

    pub(super) fn mirror_io_done(
        &mut self,
        volume: VolumeId,
        part: Part,
        result: Result<(), DiskError>,
        out: &mut Vec<Action<Job>>,
    ) {
        let mirror = self.mirrors.volumes.get_mut(&volume);
        let update = mirror.as_ref().and_then(|mirror| mirror.updates[part as usize]);
        let step = update.map(|update| update.step);
        let is_doubtful = update.is_some_and(|update| update.failures != self.pending.failures());
        match result {
            Err(_) if step == Some(Step::Syncing) => {
                self.sync_failed(Failure::DataSync);
                return self.update_failed(volume, part, DiskError::Failed, out);
            }
            Err(error) => return self.update_failed(volume, part, error, out),
            // What this one is told may leave out what another fdatasync was that has failed meanwhile, as for a commit. Also marks:
            // a copy that has lost them counts as intact. Those that begin later are written after it.
            Ok(()) if is_doubtful || part == Part::Record && self.commit.failure().is_some() => {
                return self.finish_update(volume, part, Err(DiskError::Failed), out);
            }
            Ok(()) => {}
        }
        match mirror.and_then(|mirror| mirror.updates[part as usize].as_mut()) {
            Some(update) if update.step == Step::Writing => {
                update.step = Step::Syncing;
                self.issue(InFlight::Mirror(volume, part), File::Mirror, Io::Sync, out);
            }
            _ => self.finish_update(volume, part, Ok(()), out),
        }
    }

    fn update_failed(&mut self, volume: VolumeId, part: Part, error: DiskError, out: &mut Vec<Action<Job>>) {
        // Without space nothing happened; else nobody knows what is on disk, and an fdatasync that failed is not repeated.
        self.mirrors.failed |= error != DiskError::NoSpace;
        self.finish_update(volume, part, Err(error), out);
    }

    fn finish_update(&mut self, id: VolumeId, part: Part, result: Result<(), DiskError>, out: &mut Vec<Action<Job>>) {
        let Some(mirror) = self.mirrors.volumes.get_mut(&id) else { return };
        let Some(update) = mirror.updates[part as usize].take() else { return };
        let (next_kept, next_hot) = match part {
            Part::Record => (mirror.next_kept.take(), Vec::new()),
            Part::Hot => (None, std::mem::take(&mut mirror.next_hot)),
        };
        if result.is_ok() {
            mirror.sequences[part as usize] += 1;
            match part {
                Part::Record => {
                    mirror.kept = next_kept;
                    self.mirrors.regions = self.mirrors.regions.max(mirror.region + 1);
                }
                Part::Hot => mirror.hot = next_hot,
            }
        }
        // Record before release: what it does not name is not needed any more.
        self.let_bases_go();
        self.request_gone(id);
        out.push(Action::Done { operation: update.operation, result });
    }

    /// Takes the name from bases that no record names: they are merged in the background.
    pub(super) fn let_bases_go(&mut self) {
        if self.mirrors.failed || self.commit.failure().is_some() {
            // The record on disk may be the one before.
            return;
        }
        let is_named = |(layer, volume): &(&LayerId, &VolumeId)| {
            self.mirrors.volumes.get(volume).is_some_and(|mirror| mirror.names(**layer))
        };
        let gone = self.tree.bases.iter().filter(|base| !is_named(base)).map(|(layer, _)| *layer);
        for layer in gone.collect::<Vec<_>>() {
            if self.record(&[Change::UnnameBase { layer }]).is_err() {
                return self.wait_for_room();
            }
            self.now_nameless(layer);
            self.background.committed();
        }
    }

    fn wait_for_room(&mut self) {
        self.mirrors.waits_for_room = true;
        self.commit.is_due = true;
    }
}
