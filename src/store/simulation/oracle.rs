//! What a volume may show: every value each block may have now, and every value a power cut may bring back.

use super::disk::{BLOCK, UNIT};
use crate::volume::{SnapshotId, VolumeId};
use std::collections::BTreeMap;

/// A stamp per unit of a block: which write it is from; 0 is zeros.
pub type Content = [u32; BLOCK / UNIT];

pub const ZEROS: Content = [0; BLOCK / UNIT];

/// Fills a block.
pub fn fill(block: &mut [u8], stamp: u32) {
    block.fill(0);
    for unit in block.chunks_mut(UNIT) {
        unit[..4].copy_from_slice(&stamp.to_le_bytes());
    }
}

/// What is in a block.
pub fn content(block: &[u8]) -> Content {
    static NOTHING: [u8; BLOCK] = [0; BLOCK];
    if block == NOTHING {
        return ZEROS;
    }
    std::array::from_fn(|unit| {
        let bytes = &block[unit * UNIT..][..UNIT];
        let stamp = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if bytes[4..16].iter().all(|byte| *byte == 0) { stamp } else { u32::MAX }
    })
}

/// One block.
#[derive(Clone, Debug)]
pub struct Block {
    /// What it may be now: more than one while nobody knows whether a write happened; then any mix of units.
    pub now: Vec<Content>,
    /// What it may be after a power cut, with numbers that grow: the last value that is known to be flushed, and later ones.
    pub kept: Vec<(u64, Content)>,
    /// Number of what it is now.
    pub latest: u64,
}

impl Block {
    pub fn new(content: Content) -> Self {
        Self { now: vec![content], kept: vec![(0, content)], latest: 0 }
    }

    /// A write was started.
    pub fn start(&mut self, number: u64, content: Content) {
        self.kept.push((number, content));
    }

    /// It was acknowledged.
    pub fn done(&mut self, number: u64, content: Content) {
        (self.now, self.latest) = (vec![content], number);
    }

    /// Nobody knows whether it happened.
    pub fn unknown(&mut self, content: Content) {
        self.now.push(content);
    }

    /// A flush that was started when `number` was the latest is done.
    pub fn flushed(&mut self, number: u64) {
        if let Some(at) = self.kept.iter().position(|(there, _)| *there == number) {
            self.kept.drain(..at);
        }
    }

    /// The power was cut.
    pub fn cut(&mut self) {
        self.now = self.kept.iter().map(|(_, content)| *content).collect();
    }

    /// It was read. From now on it is that.
    pub fn read(&mut self, found: Content, number: u64) -> Result<(), String> {
        if !is_mix(&found, &self.now) {
            return Err(format!("is {found:?}, expected one of {:?}", self.now));
        }
        if self.now.len() > 1 {
            self.now = vec![found];
            self.latest = number;
            self.kept.push((number, found));
        }
        Ok(())
    }
}

/// Whether each unit is that of one of the values.
pub fn is_mix(found: &Content, values: &[Content]) -> bool {
    if let [value] = values {
        return found == value;
    }
    (0..found.len()).all(|unit| values.iter().any(|value| value[unit] == found[unit]))
}

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    Coming,
    There,
    Going,
}

#[derive(Clone, Debug)]
pub struct Volume {
    pub existence: Existence,
    pub blocks: u64,
    /// A resize that is not acknowledged.
    pub grows_to: Option<u64>,
    /// What the snapshot had that it was cloned from.
    pub base: BTreeMap<u64, Content>,
    pub touched: BTreeMap<u64, Block>,
}

impl Volume {
    /// The block was read.
    pub fn read(&mut self, block: u64, found: Content, number: u64) -> Result<(), String> {
        match self.touched.get_mut(&block) {
            Some(state) => state.read(found, number),
            None if self.base.get(&block).copied().unwrap_or(ZEROS) == found => Ok(()),
            None => Err(format!("is {found:?}, and nobody wrote it")),
        }
    }

    pub fn block(&mut self, number: u64) -> &mut Block {
        let base = self.base.get(&number).copied().unwrap_or(ZEROS);
        self.touched.entry(number).or_insert_with(|| Block::new(base))
    }
}

#[derive(Clone, Debug)]
pub struct Snapshot {
    pub existence: Existence,
    pub volume: VolumeId,
    /// What each block may be; one that is not here is as in `base`.
    pub now: BTreeMap<u64, Vec<Content>>,
    /// The same if the power is cut before the seal is acknowledged.
    pub kept: BTreeMap<u64, Vec<Content>>,
    pub base: BTreeMap<u64, Content>,
}

impl Snapshot {
    pub fn read(&mut self, number: u64, found: Content) -> Result<(), String> {
        let base = [self.base.get(&number).copied().unwrap_or(ZEROS)];
        let allowed = self.now.get(&number).map_or(&base[..], |values| &values[..]);
        if !is_mix(&found, allowed) {
            return Err(format!("is {found:?}, expected one of {allowed:?}"));
        }
        if allowed.len() > 1 {
            self.now.insert(number, vec![found]);
        }
        Ok(())
    }
}

/// All volumes and snapshots.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// Volumes that are becoming a snapshot: one of the two is there.
    pub fills: BTreeMap<SnapshotId, VolumeId>,
}
