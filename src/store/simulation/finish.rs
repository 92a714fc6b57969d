//! The end of a simulation: everything comes to rest, and one bit may flip.

use super::disk::BLOCK;
use super::world::{Kind, Outcome, World};
use crate::store::map::Entry;
use crate::store::{LogSlot, Name, verify};
use crate::volume::VolumeId;
use std::ops::ControlFlow;

impl World {
    /// Lets everything come to its end.
    pub fn drain(&mut self) -> Outcome {
        (self.errors, self.no_space, self.job_errors, self.full) = (0, 0, 0, 0);
        for _ in 0..20_000 {
            if self.store().failure().is_some() {
                self.crash(false)?;
            }
            if !self.in_flight.is_empty() {
                self.complete_one()?;
            } else if !self.jobs.is_empty() {
                self.run_job()?;
            } else if let Some(delay) = self.store().next_tick() {
                self.tick(delay)?;
            } else {
                let stuck: Vec<_> = self.operations.values().map(|operation| operation.kind).collect();
                return if stuck.is_empty() { Ok(()) } else { Err(format!("never done: {stuck:?}")) };
            }
        }
        Err(format!("never idle: {:?}", self.store().background))
    }

    pub fn finish(&mut self) -> Outcome {
        self.drain()?;
        self.verify_all()?;
        if let Some(volume) = self.pick_volume() {
            self.start(volume, Kind::Flush, None)?;
        }
        self.drain()?;
        self.verify_checksums(0)?;
        match self.random.below(4) {
            0 => self.flip(),
            1 => self.crash(false),
            _ => self.crash(true),
        }
    }

    pub fn verify_checksums(&mut self, wrong: u64) -> Outcome {
        let volumes: Vec<VolumeId> = self.oracle.volumes.keys().copied().collect();
        for volume in volumes {
            let plan = self.store().verify_plan(volume).map_err(|error| error.to_string())?;
            self.coverage.checksummed += plan.blocks();
            let report = verify::verify(&plan, &*self.disk, &mut |_| ControlFlow::Continue(()));
            let report = report.map_err(|error| error.to_string())?;
            if report.wrong > wrong {
                return Err(format!("verify of {volume} finds {report:?}"));
            }
        }
        Ok(())
    }

    /// After everything is durable one bit changes: it is named, or it changes nothing that anybody reads.
    pub fn flip(&mut self) -> Outcome {
        let name = [
            Name::Superblock,
            Name::Checkpoint,
            Name::Log(LogSlot::A),
            Name::Log(LogSlot::B),
            Name::Data,
            Name::Checksums,
        ][self.random.below(6)];
        let name = if self.mirror.is_some() && self.random.chance(1, 2) { Name::Mirror } else { name };
        self.store = None;
        self.cut(&[]);
        let Some(offset) = self.disk.flip(name) else { return Ok(()) };
        let in_data = matches!(name, Name::Data | Name::Checksums);
        match self.open() {
            Err(error) if in_data => return Err(format!("a flipped bit in {name:?} keeps it from opening: {error}")),
            Err(_) => {
                self.coverage.flips_detected += 1;
                return Ok(());
            }
            Ok(()) => {}
        }
        if name == Name::Data {
            self.coverage.flips_in_data += 1;
            return self.check_flipped_data(offset);
        }
        self.coverage.flips_harmless += 1;
        let found = self.resolve().and_then(|()| self.verify_all());
        found.map_err(|error| format!("bit at {offset} of {name:?} is flipped: {error}"))
    }

    /// Verify finds it if the block has a checksum, and nothing else.
    pub fn check_flipped_data(&mut self, offset: u64) -> Outcome {
        let physical = (offset / BLOCK as u64) as u32;
        let owner = self.store().tree.layers.iter().find(|(_, layer)| {
            layer.map.extents().any(|extent| match extent.entry {
                Entry::Data(start) => (start.0..start.0 + extent.count).contains(&physical),
                _ => false,
            })
        });
        let (owner, checked) = owner.map_or((None, false), |(id, layer)| (Some(*id), layer.checksummed));
        let mut found = 0;
        for volume in self.oracle.volumes.keys().copied().collect::<Vec<_>>() {
            let plan = self.store().verify_plan(volume).map_err(|error| error.to_string())?;
            let report = verify::verify(&plan, &*self.disk, &mut |_| ControlFlow::Continue(()));
            found += report.map_err(|error| error.to_string())?.wrong;
        }
        let below = self.store().tree.volumes.len() as u64;
        let tree = &self.store().tree;
        let is_seen = |id| tree.volumes.values().any(|volume| tree.path(volume.top).any(|(there, _)| there == id));
        let must = checked && owner.is_some_and(is_seen);
        if found > below || !checked && found > 0 || must && found == 0 {
            return Err(format!("a flipped bit makes {found} findings"));
        }
        Ok(())
    }
}
