//! Crashes of the simulated machine, and what must be there afterwards.

use super::disk::Write;
use super::oracle::{Content, Existence};
use super::world::{Kind, Outcome, World, memfd, value};
use crate::memory::Memory;
use crate::store::planted::Planted;
use crate::store::{Io, Pending, Store};
use crate::volume::{BlockRange, SnapshotId, VolumeId};
use std::collections::BTreeMap;
use std::io;

impl World {
    pub fn crash(&mut self, power_cut: bool) -> Outcome {
        self.say(|| format!("CRASH, power cut: {power_cut}"));
        self.coverage.failures += u64::from(self.store.as_ref().is_some_and(|store| store.failure().is_some()));
        let writes = std::mem::take(&mut self.in_flight).into_iter().filter_map(|io| match io.what {
            Io::Write { offset, .. } => Some(Write { file: io.file, offset, bytes: io.bytes }),
            Io::Read { .. } | Io::Sync | Io::Punch { .. } => None,
        });
        let writes: Vec<Write> = writes.collect();
        self.store = None;
        self.jobs.clear();
        if power_cut {
            self.coverage.power_cuts += 1;
            self.cut(&writes);
        } else {
            self.coverage.kills += 1;
            if self.planted == Some(Planted::NoDrain) {
                self.late = writes.clone();
            }
            self.disk.kill(&writes);
            for operation in self.operations.values() {
                if let (Kind::Write | Kind::Zeros, Some(range)) = (operation.kind, operation.range) {
                    let volume = self.oracle.volumes.get_mut(&operation.volume).ok_or("its volume is gone")?;
                    let value = value(operation.kind, operation.number);
                    (range.start()..range.end()).for_each(|block| volume.block(block).unknown(value));
                }
            }
            if self.planted == Some(Planted::LostPending) {
                self.pending = memfd(self.pending_bytes);
            }
        }
        self.operations.clear();
        let cut_in_open = self.reopen()?;
        self.resolve()?;
        self.verify_all()?;
        if power_cut || cut_in_open {
            // What came through a power cut is on stable media.
            self.next += 1;
            let number = u64::from(self.next);
            for block in self.oracle.volumes.values_mut().flat_map(|volume| volume.touched.values_mut()) {
                (block.kept, block.latest) = (vec![(number, block.now[0])], number);
            }
        }
        Ok(())
    }

    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{}", what());
        }
    }

    pub fn cut(&mut self, writes: &[Write]) {
        self.late.clear();
        self.disk.power_cut(writes);
        self.pending = memfd(self.pending_bytes);
        self.oracle.volumes.values_mut().flat_map(|volume| volume.touched.values_mut()).for_each(|block| block.cut());
        for snapshot in self.oracle.snapshots.values_mut() {
            if snapshot.existence == Existence::Coming {
                snapshot.now = snapshot.kept.clone();
            }
        }
    }

    /// Opens the tree, with crashes while it is being opened; whether one was a power cut.
    pub fn reopen(&mut self) -> Result<bool, String> {
        let mut was_cut = false;
        loop {
            let fuse = self.random.chance(1, 5).then(|| 1 + self.random.below(30) as u32);
            self.disk.set_fuse(fuse);
            let full = self.fill_disk();
            let opened = self.open();
            self.disk.set_full(self.stays_full);
            match opened {
                Ok(()) if !self.disk.has_blown() => break,
                // It stays as it is until there is space: the same as a kill.
                Err(error) if self.stays_full && !self.disk.has_blown() => {
                    return Err(format!("open, on a full disk: {error}"));
                }
                Err(error) if full && error.ends_with(&io::Error::from(io::ErrorKind::StorageFull).to_string()) => {
                    self.coverage.full_opens += 1;
                }
                Err(error) if !self.disk.has_blown() => return Err(format!("open: {error}")),
                Ok(()) | Err(_) => {}
            }
            self.store = None;
            self.coverage.crashes_in_open += 1;
            if self.random.chance(1, 2) {
                was_cut = true;
                self.cut(&[]);
            } else {
                self.disk.kill(&[]);
            }
        }
        self.disk.set_fuse(None);
        self.coverage.owed_checkpoints += u64::from(self.store().commit.owes_checkpoint());
        Ok(was_cut)
    }

    pub fn open(&mut self) -> Outcome {
        let memory = Memory::map(&self.pending, self.pending_bytes).map_err(|error| error.to_string())?;
        let mut store = Store::open(self.disk.clone(), Pending::over(memory)).map_err(|error| error.to_string())?;
        store.planted = self.planted;
        self.store = Some(store);
        Ok(())
    }

    /// What was neither there nor gone is one of the two after a crash.
    pub fn resolve(&mut self) -> Outcome {
        let volumes: BTreeMap<_, _> = self.store().volumes().into_iter().map(|info| (info.volume, info)).collect();
        let snapshots: Vec<_> = self.store().snapshots().into_iter().map(|info| info.snapshot).collect();
        let oracle = &mut self.oracle;
        for (snapshot, filled) in std::mem::take(&mut oracle.fills) {
            if volumes.contains_key(&filled) == snapshots.contains(&snapshot) {
                return Err(format!(
                    "of volume {filled} and snapshot {snapshot} that it becomes both are there, or none"
                ));
            }
        }
        oracle.volumes.retain(|id, volume| volume.existence == Existence::There || volumes.contains_key(id));
        oracle.snapshots.retain(|id, snapshot| snapshot.existence == Existence::There || snapshots.contains(id));
        if !oracle.volumes.keys().eq(volumes.keys()) {
            return Err(format!("there are volumes {volumes:?}, expected {:?}", oracle.volumes.keys()));
        }
        if !oracle.snapshots.keys().eq(snapshots.iter()) {
            return Err(format!("there are snapshots {snapshots:?}, expected {:?}", oracle.snapshots.keys()));
        }
        for (id, volume) in &mut oracle.volumes {
            volume.existence = Existence::There;
            let blocks = volumes[id].size.blocks();
            let grown = volume.grows_to.take().is_some_and(|grown| blocks <= grown && blocks > volume.blocks);
            if blocks != volume.blocks && !grown {
                return Err(format!("volume {id} has {blocks} blocks, expected {}", volume.blocks));
            }
            volume.blocks = blocks;
        }
        oracle.snapshots.values_mut().for_each(|snapshot| snapshot.existence = Existence::There);
        self.resolve_mirror()
    }

    /// Reads everything and compares. Nothing may be in flight.
    pub fn verify_all(&mut self) -> Outcome {
        let volumes: Vec<(VolumeId, u64)> =
            self.oracle.volumes.iter().map(|(id, volume)| (*id, volume.blocks)).collect();
        for (id, blocks) in volumes {
            for start in (0..blocks).step_by(256) {
                let range = BlockRange::new(start, (blocks - start).min(256) as u32);
                if range.is_some_and(|range| self.is_untouched(id, range)) {
                    continue;
                }
                let errors = std::mem::take(&mut self.errors);
                let before = self.in_flight.len();
                self.start(id, Kind::Read, range)?;
                while self.in_flight.len() > before {
                    self.complete(before)?;
                }
                self.errors = errors;
            }
        }
        let snapshots: Vec<SnapshotId> = self.oracle.snapshots.keys().copied().collect();
        let mut contents = Vec::new();
        for id in snapshots {
            let content = self.read_snapshot(id)?;
            self.check_extents(id, None, &BTreeMap::new(), &content)?;
            for (base, there) in &contents {
                self.check_extents(id, Some(*base), there, &content)?;
            }
            contents.push((id, content));
        }
        self.check_plans()
    }

    /// Whatever differs is in the extents.
    pub fn check_extents(
        &mut self,
        target: SnapshotId,
        base: Option<SnapshotId>,
        before: &BTreeMap<u64, Content>,
        after: &BTreeMap<u64, Content>,
    ) -> Outcome {
        let Ok(plan) = self.store().extents(target, base) else { return Ok(()) };
        let runs: Vec<_> = plan.collect();
        let end = self.store().reader(target).map_or(0, |plan| plan.blocks());
        for block in before.keys().chain(after.keys()).filter(|block| **block < end) {
            let covered = runs.iter().any(|run| (run.start..run.start + run.count).contains(block));
            if before.get(block) != after.get(block) && !covered {
                return Err(format!("block {block} differs between {base:?} and {target} and is not in {runs:?}"));
            }
        }
        Ok(())
    }
}
