//! A disk that is full and stays so, while snapshots are deleted and what is merged makes the map larger.

use super::coverage::Coverage;
use super::world::{Kind, Outcome, World};
use crate::store::Control;
use crate::store::planted::Planted;
use crate::store::tests::size;
use crate::volume::{BlockRange, SnapshotId, VolumeId};
use std::time::Duration;

/// Of the volume.
const BLOCKS: u64 = 4096;

/// Requests that are under way at once.
const AT_ONCE: usize = 8;

/// Changes of settings while the disk is full: several logs.
const CHANGES: u32 = 80;

impl World {
    /// One whose disk becomes full, and keeps what was written.
    pub fn full(seed: u64, planted: Option<Planted>) -> Self {
        let world = Self { fills_up: true, full: 0, errors: 0, no_space: 0, job_errors: 0, ..Self::new(seed, planted) };
        world.disk.keep_space();
        world
    }

    /// Everything goes on, and ends.
    pub fn run_full(mut self) -> Result<Coverage, String> {
        let volume = VolumeId::from_bytes([1; 16]);
        self.control(Control::CreateVolume { volume, size: size(BLOCKS), verify_reads: false })?;
        self.drain()?;
        self.fragment(volume)?;
        self.stays_full = true;
        self.disk.set_full(true);
        for snapshot in self.oracle.snapshots.keys().copied().collect::<Vec<_>>() {
            self.control(Control::DeleteSnapshot(snapshot))?;
        }
        for number in 0..CHANGES {
            self.control(Control::Modify { volume, verify_reads: number.is_multiple_of(2) })?;
            for _ in 0..20 + self.random.below(40) {
                match self.random.below(6) {
                    0 => self.tick(Duration::from_millis(100))?,
                    1 => self.tick(Duration::ZERO)?,
                    2 => self.run_job()?,
                    _ => self.complete_one()?,
                }
            }
            if self.random.chance(1, 30) {
                self.crash(false)?;
            }
        }
        self.drain()?;
        let waiting = self.store().backlog().merging_layers;
        if waiting > 0 {
            return Err(format!("{waiting} layers wait for ever"));
        }
        self.verify_all()?;
        self.crash(true)?;
        Ok(self.coverage)
    }

    /// A snapshot of long pieces, and perhaps another one, under a layer with something small at every other block.
    fn fragment(&mut self, volume: VolumeId) -> Outcome {
        for start in (0..BLOCKS).step_by(256) {
            self.start(volume, Kind::Write, BlockRange::new(start, 256))?;
            self.drain()?;
        }
        for layer in 0..1 + self.random.below(2) as u8 {
            let snapshot = SnapshotId::from_bytes([layer + 1; 16]);
            self.control(Control::Seal { volume, snapshot, created_ms: 1 })?;
            self.drain()?;
            let first = self.random.below(2) as u64;
            for start in (first..BLOCKS).step_by(2 + 2 * usize::from(layer)) {
                let kind = if self.random.chance(1, 4) { Kind::Write } else { Kind::Zeros };
                self.start(volume, kind, BlockRange::new(start, 1))?;
                while self.operations.len() >= AT_ONCE {
                    if self.in_flight.is_empty() {
                        self.tick(Duration::from_millis(10))?
                    } else {
                        self.complete_one()?
                    }
                    if self.random.chance(1, 8) {
                        self.run_job()?;
                    }
                }
            }
            self.drain()?;
        }
        Ok(())
    }
}
