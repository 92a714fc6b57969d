//! Reading back the blocks of sealed layers and comparing them with their checksums.
//!
//! Invariant: a plan holds its layers, so that no block of them moves or changes while it is read; findings are bounded.

use super::Store;
use super::checking::read_block;
use super::checksums::{ChecksumBlock, PER_BLOCK, Place};
use super::files::{Files, Name};
use super::format::{BLOCK, LayerId};
use super::map::{Entry, Map, PhysicalBlock};
use super::tree::{Layer, Role};
use crate::memory::Memory;
use crate::volume::{BLOCK_SIZE, InstanceId, VolumeId};
use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Findings that are kept; more are counted.
pub const MOST_FINDINGS: usize = 100;

const READ_BLOCKS: u32 = 256;

/// What to read back.
#[derive(Clone, Debug)]
pub struct VerifyPlan {
    instance: InstanceId,
    layers: Vec<(LayerId, Map, Arc<()>)>,
    /// Blocks of sealed layers that have no checksum yet.
    pub unchecked_blocks: u64,
}

/// A block that is not what it was when its layer was sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The layer.
    pub layer: u32,
    /// Block of the volume.
    pub block: u64,
    /// Block of the `data` file.
    pub physical: u32,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with a block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Its bytes changed.
    #[error("crc32c is {found:#010x}, expected {expected:#010x}")]
    Changed {
        /// When sealed.
        expected: u32,
        /// Now.
        found: u32,
    },
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(String),
    /// Its checksum cannot be read.
    #[error("its checksum cannot be read: {0}")]
    NoChecksum(String),
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Blocks that were compared.
    pub blocks: u64,
    /// Blocks that are wrong.
    pub wrong: u64,
    /// The first of them.
    pub findings: Vec<Finding>,
}

impl Store {
    /// What can be verified of a volume: its sealed layers that have checksums, also those of its snapshots that are beside
    /// it. The newest layer has none.
    pub fn verify_plan(&self, id: VolumeId) -> Result<VerifyPlan, super::ControlError> {
        let volume = self.tree.volumes.get(&id).ok_or(super::ControlError::UnknownVolume(id))?;
        let snapshots = self.tree.snapshots.values().filter(|snapshot| snapshot.volume == id);
        let mut sealed: BTreeMap<LayerId, &Layer> = BTreeMap::new();
        for newest in snapshots.map(|snapshot| snapshot.layer).chain([volume.top]) {
            // What is below a layer that is known is known, too.
            let unknown: Vec<_> = self.tree.path(newest).take_while(|(id, _)| !sealed.contains_key(id)).collect();
            sealed.extend(unknown);
        }
        sealed.retain(|_, layer| !matches!(layer.role, Role::Top(_)));
        let sealed = sealed.into_iter();
        let (checked, unchecked): (Vec<_>, Vec<_>) = sealed.partition(|(_, layer)| layer.checksummed);
        Ok(VerifyPlan {
            instance: self.superblock.instance,
            layers: checked.into_iter().map(|(id, layer)| (id, layer.map.clone(), layer.pin.clone())).collect(),
            unchecked_blocks: unchecked.into_iter().map(|(_, layer)| layer.map.data_blocks()).sum(),
        })
    }
}

impl VerifyPlan {
    /// Blocks that will be read.
    pub fn blocks(&self) -> u64 {
        self.layers.iter().map(|(_, map, _)| map.data_blocks()).sum()
    }
}

/// Checksums of sealed blocks as they are at rest, for whoever reads these blocks in order.
#[derive(Debug)]
pub struct AtRest {
    instance: InstanceId,
    last: Option<(u32, ChecksumBlock)>,
}

impl AtRest {
    /// Of this tree.
    pub fn new(instance: InstanceId) -> Self {
        Self { instance, last: None }
    }

    /// Of one block, which a layer with checksums has. Blocks.
    pub fn of(&mut self, files: &dyn Files, physical: PhysicalBlock) -> io::Result<u32> {
        let place = Place::of(physical);
        match &self.last {
            Some((number, block)) if *number == place.block => Ok(block.get(place.index)),
            _ => {
                let block = read_block(files, self.instance, place.block)?;
                let crc = block.get(place.index);
                self.last = Some((place.block, block));
                Ok(crc)
            }
        }
    }
}

/// Reads everything in the plan. Blocks. `progress` gets the number of blocks read so far, and may end it.
pub fn verify(
    plan: &VerifyPlan,
    files: &dyn Files,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> io::Result<Report> {
    let mut memory = Memory::zeros(READ_BLOCKS as usize * BLOCK)?;
    let mut report = Report::default();
    for (layer, map, _) in &plan.layers {
        for extent in map.extents() {
            let Entry::Data(physical) = extent.entry else { continue };
            let mut done = 0;
            while done < extent.count {
                let start = PhysicalBlock(physical.0 + done);
                let count = (extent.count - done).min(READ_BLOCKS).min(PER_BLOCK - Place::of(start).index);
                let at = At { layer: layer.0, block: extent.start + u64::from(done), physical: start, count };
                check(plan.instance, files, &mut memory, at, &mut report);
                report.blocks += u64::from(count);
                done += count;
                if progress(report.blocks).is_break() {
                    return Ok(report);
                }
            }
        }
    }
    Ok(report)
}

#[derive(Clone, Copy)]
struct At {
    layer: u32,
    block: u64,
    physical: PhysicalBlock,
    count: u32,
}

/// Compares blocks whose checksums are in one block of the checksum file.
fn check(instance: InstanceId, files: &dyn Files, memory: &mut Memory, at: At, report: &mut Report) {
    let mut found = |index: u32, problem: Problem| {
        report.wrong += 1;
        if report.findings.len() < MOST_FINDINGS {
            let (block, physical) = (at.block + u64::from(index), at.physical.0 + index);
            report.findings.push(Finding { layer: at.layer, block, physical, problem });
        }
    };
    let place = Place::of(at.physical);
    let checksums: ChecksumBlock = match read_block(files, instance, place.block) {
        Ok(checksums) => checksums,
        Err(error) => return (0..at.count).for_each(|index| found(index, Problem::NoChecksum(error.to_string()))),
    };
    let bytes = &mut memory.bytes_mut()[..at.count as usize * BLOCK];
    let whole = files.read_at(Name::Data, u64::from(at.physical.0) * BLOCK_SIZE, bytes);
    for index in 0..at.count {
        let block = &mut bytes[index as usize * BLOCK..][..BLOCK];
        if whole.is_err() {
            // Which of them: one by one.
            let offset = u64::from(at.physical.0 + index) * BLOCK_SIZE;
            if let Err(error) = files.read_at(Name::Data, offset, block) {
                found(index, Problem::Unreadable(error.to_string()));
                continue;
            }
        }
        let (expected, actual) = (checksums.get(place.index + index), crc32c::crc32c(block));
        if expected != actual {
            found(index, Problem::Changed { expected, found: actual });
        }
    }
}
