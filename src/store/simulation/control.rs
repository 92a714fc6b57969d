//! An operator's requests in the simulation, and reading snapshots.

use super::disk::BLOCK;
use super::oracle::{Content, Existence, Snapshot, Volume, ZEROS, content};
use super::world::{Kind, MOST_SNAPSHOTS, MOST_VOLUMES, Operation, Outcome, World, value};
use crate::protocol::OperationId;
use crate::store::tests::size;
use crate::store::{Control, ControlError, File};
use crate::volume::{SnapshotId, VolumeId};
use std::collections::BTreeMap;

impl World {
    pub fn random_control(&mut self) -> Outcome {
        let Some(volume) = self.pick_volume() else { return Ok(()) };
        let there = self.oracle.snapshots.iter().filter(|(_, snapshot)| snapshot.existence == Existence::There);
        let snapshots: Vec<SnapshotId> = there.map(|(id, _)| *id).collect();
        let snapshot = snapshots.get(self.random.below(snapshots.len())).copied();
        self.next += 1;
        let mut id = [0; 16];
        id[..4].copy_from_slice(&self.next.to_le_bytes());
        let blocks = self.oracle.volumes[&volume].blocks;
        let verify_reads = self.random.chance(1, 2);
        let many = self.oracle.volumes.len() >= MOST_VOLUMES;
        match (self.random.below(100), snapshot) {
            (0..40, _) if self.oracle.snapshots.len() < MOST_SNAPSHOTS => {
                self.control(Control::Seal { volume, snapshot: SnapshotId::from_bytes(id), created_ms: 1 })
            }
            (40..55, Some(snapshot)) if !many => {
                let info = self.store().snapshots().into_iter().find(|info| info.snapshot == snapshot);
                let blocks = info.ok_or("the snapshot is gone")?.size.blocks();
                let size = size(blocks + self.random.below(2) as u64 * 16);
                self.control(Control::Clone { snapshot, volume: VolumeId::from_bytes(id), size, verify_reads })
            }
            (55..80, Some(snapshot)) => self.control(Control::DeleteSnapshot(snapshot)),
            (80..88, _) if self.oracle.volumes.len() > 1 => {
                let is_mirrored = self.mirror.as_ref().is_some_and(|mirror| mirror.volume == volume);
                if is_mirrored || self.operations.values().any(|operation| operation.volume == volume) {
                    return Ok(());
                }
                self.control(Control::DeleteVolume(volume))
            }
            (88..93, _) => self.control(Control::Resize { volume, size: size(blocks + 8) }),
            (93..96, _) => self.control(Control::Modify { volume, verify_reads }),
            (96..98, _) if self.oracle.snapshots.len() < MOST_SNAPSHOTS && self.oracle.volumes.len() > 1 => {
                let is_mirrored = self.mirror.as_ref().is_some_and(|mirror| mirror.volume == volume);
                let others = self.oracle.volumes.keys().copied().find(|other| *other != volume);
                let is_busy = self.operations.values().any(|operation| operation.volume == volume);
                let (false, Some(of)) = (is_mirrored || is_busy, others) else { return Ok(()) };
                let snapshot = SnapshotId::from_bytes(id);
                self.control(Control::SealAs { filled: volume, snapshot, volume: of, created_ms: 1 })
            }
            (98..100, _) if !many => {
                let volume = VolumeId::from_bytes(id);
                self.control(Control::CreateVolume { volume, size: size(256), verify_reads })
            }
            _ => Ok(()),
        }
    }

    pub fn control(&mut self, control: Control) -> Outcome {
        self.next += 1;
        let (number, id) = (self.next, OperationId(u64::from(self.next)));
        let volume = match control {
            Control::CreateVolume { volume, size, .. } => {
                let new = Volume {
                    existence: Existence::Coming,
                    blocks: size.blocks(),
                    grows_to: None,
                    base: BTreeMap::new(),
                    touched: BTreeMap::new(),
                };
                self.oracle.volumes.insert(volume, new);
                volume
            }
            Control::Clone { snapshot, volume, size, .. } => {
                let base = self.read_snapshot(snapshot)?;
                let (existence, touched) = (Existence::Coming, BTreeMap::new());
                let new = Volume { existence, blocks: size.blocks(), grows_to: None, base, touched };
                self.oracle.volumes.insert(volume, new);
                volume
            }
            Control::Seal { volume, snapshot, .. } => {
                let sealed = self.seal(volume);
                self.oracle.snapshots.insert(snapshot, sealed);
                volume
            }
            Control::SealAs { filled, snapshot, .. } => {
                let sealed = self.seal(filled);
                self.oracle.snapshots.insert(snapshot, sealed);
                self.oracle.fills.insert(snapshot, filled);
                self.oracle.volumes.get_mut(&filled).expect("there").existence = Existence::Going;
                filled
            }
            Control::DeleteVolume(volume) => {
                self.oracle.volumes.get_mut(&volume).expect("there").existence = Existence::Going;
                volume
            }
            Control::DeleteSnapshot(snapshot) => {
                self.delicate = if self.random.chance(1, 3) { 16 } else { 0 };
                let snapshot = self.oracle.snapshots.get_mut(&snapshot).expect("there");
                snapshot.existence = Existence::Going;
                snapshot.volume
            }
            Control::Resize { volume, size } => {
                self.oracle.volumes.get_mut(&volume).expect("there").grows_to = Some(size.blocks());
                volume
            }
            Control::Modify { volume, .. } => volume,
        };
        let (kind, buffer, latest) = (Kind::Control(control), Vec::new(), Vec::new());
        self.operations.insert(id, Operation { kind, volume, range: None, number, buffer, latest });
        self.say(|| format!("{number}: {control:?}"));
        let mut out = Vec::new();
        self.store().control(id, control, &mut out);
        self.take(out)
    }

    /// What a snapshot may have that is taken now.
    pub fn seal(&mut self, id: VolumeId) -> Snapshot {
        let volume = &self.oracle.volumes[&id];
        let mut now: BTreeMap<u64, Vec<Content>> =
            volume.touched.iter().map(|(number, block)| (*number, block.now.clone())).collect();
        let kept = volume.touched.iter().map(|(number, block)| (*number, block.kept.iter().map(|(_, c)| *c).collect()));
        let kept = kept.collect();
        for operation in self.operations.values().filter(|operation| operation.volume == id) {
            if let (Kind::Write | Kind::Zeros, Some(range)) = (operation.kind, operation.range) {
                for block in range.start()..range.end() {
                    now.entry(block).or_default().push(value(operation.kind, operation.number));
                }
            }
        }
        let base = volume.base.clone();
        Snapshot { existence: Existence::Coming, volume: id, now, kept, base }
    }

    pub fn control_done(&mut self, id: OperationId, result: Result<(), ControlError>) -> Outcome {
        self.say(|| format!("  {}: {result:?}", id.0));
        let operation = self.operations.remove(&id).ok_or(format!("{id:?} is done twice"))?;
        let Kind::Control(control) = operation.kind else { return Err("not a control operation".into()) };
        match result {
            Ok(()) => {}
            // It may have happened: known after the next crash.
            Err(ControlError::Disk(_)) if self.had_errors => return Ok(()),
            Err(ControlError::Busy) => return self.refused(control),
            Err(error) => return Err(format!("{control:?} fails: {error}")),
        }
        match control {
            Control::CreateVolume { volume, .. } | Control::Clone { volume, .. } => {
                self.coverage.clones += u64::from(matches!(control, Control::Clone { .. }));
                self.oracle.volumes.get_mut(&volume).ok_or("no such volume")?.existence = Existence::There;
            }
            Control::Seal { snapshot, .. } => {
                self.coverage.seals += 1;
                self.oracle.snapshots.get_mut(&snapshot).ok_or("no such snapshot")?.existence = Existence::There;
            }
            Control::SealAs { filled, snapshot, .. } => {
                self.coverage.fills += 1;
                self.oracle.fills.remove(&snapshot);
                self.oracle.snapshots.get_mut(&snapshot).ok_or("no such snapshot")?.existence = Existence::There;
                self.oracle.volumes.remove(&filled);
            }
            Control::DeleteVolume(volume) => {
                self.coverage.deletions += 1;
                self.oracle.volumes.remove(&volume);
            }
            Control::DeleteSnapshot(snapshot) => {
                self.coverage.deletions += 1;
                self.oracle.snapshots.remove(&snapshot);
            }
            Control::Resize { volume, size } => {
                let volume = self.oracle.volumes.get_mut(&volume).ok_or("no such volume")?;
                volume.blocks = volume.blocks.max(size.blocks());
                volume.grows_to = volume.grows_to.filter(|blocks| *blocks > volume.blocks);
            }
            Control::Modify { .. } => {}
        }
        Ok(())
    }

    pub fn refused(&mut self, control: Control) -> Outcome {
        match control {
            Control::CreateVolume { volume, .. } | Control::Clone { volume, .. } => {
                self.oracle.volumes.remove(&volume);
            }
            Control::Seal { snapshot, .. } => {
                self.oracle.snapshots.remove(&snapshot);
            }
            Control::SealAs { filled, snapshot, .. } => {
                self.oracle.fills.remove(&snapshot);
                self.oracle.snapshots.remove(&snapshot);
                self.oracle.volumes.get_mut(&filled).ok_or("no such volume")?.existence = Existence::There;
            }
            Control::DeleteVolume(volume) => {
                self.oracle.volumes.get_mut(&volume).ok_or("no such volume")?.existence = Existence::There;
            }
            Control::DeleteSnapshot(snapshot) => {
                self.oracle.snapshots.get_mut(&snapshot).ok_or("no such snapshot")?.existence = Existence::There;
            }
            Control::Resize { .. } | Control::Modify { .. } => {}
        }
        Ok(())
    }

    /// Reads a snapshot from the disk, aside of the store; what is not zeros.
    pub fn read_snapshot(&mut self, id: SnapshotId) -> Result<BTreeMap<u64, Content>, String> {
        let plan = self.store().reader(id).map_err(|error| error.to_string())?;
        let snapshot = self.oracle.snapshots.get_mut(&id).ok_or("no such snapshot")?;
        let mut found = BTreeMap::new();
        let mut block = 0;
        while block < plan.blocks() {
            let (entry, count) = plan.run(block, (plan.blocks() - block) as u32);
            let is_data = matches!(entry, crate::store::map::Entry::Data(_));
            for index in 0..count {
                let number = block + u64::from(index);
                if !is_data && !snapshot.now.contains_key(&number) && !snapshot.base.contains_key(&number) {
                    continue;
                }
                let mut bytes = [0; BLOCK];
                if let crate::store::map::Entry::Data(physical) = entry.advanced(index) {
                    let offset = u64::from(physical.0) * BLOCK as u64;
                    if !self.disk.read(File::Data, offset, &mut bytes) {
                        return Err(format!("snapshot {id} names a block past the end of the file"));
                    }
                }
                let content = content(&bytes);
                snapshot.read(number, content).map_err(|error| format!("block {number} of snapshot {id} {error}"))?;
                if content != ZEROS {
                    found.insert(number, content);
                }
            }
            block += u64::from(count);
        }
        Ok(found)
    }
}
