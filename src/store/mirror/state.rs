//! The mirrored volumes of a tree in memory, and reading them from the file `mirror`.
//!
//! Invariants: `kept`, `hot` and `sequences` are what is durable; what is under way becomes that when its fdatasync has
//! succeeded; the slot that is written next is spoilt at each open, durably, since what a power cut left of an update that
//! nobody heard of could become whole again with parts of the next one; a region belongs to one volume until the deletion of that volume is durable.

use super::super::files::{Files, Name};
use super::super::format::{HeaderError, LayerId};
use super::super::tree::Tree;
use super::MirrorPlan;
use super::older;
use super::slot::{self, HOT_AREA, HOT_SLOT, RECORD_SLOT, REGION};
use crate::memory::Memory;
use crate::protocol::{Configuration, Extent, Lacks, OperationId, Record, Stamp};
use crate::volume::{BootId, InstanceId, VolumeId};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// What a spoilt slot is full of: no sector of any slot is.
pub(super) const SPOILT: u8 = 0xff;

/// Why the file `mirror` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// It cannot be read.
    #[error("the file mirror: {0}")]
    Io(#[from] io::Error),
    /// A region is damaged, or of a newer Tandem.
    #[error("the file mirror, region {region}: {error}")]
    Region {
        /// Which.
        region: u32,
        /// What is wrong.
        error: HeaderError,
    },
    /// Two regions are of one volume.
    #[error("the file mirror has volume {0} twice")]
    Twice(VolumeId),
}

/// Which of a volume's two updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Part {
    Record,
    Hot,
}

/// What a copy lacks that left with a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lacking {
    pub since: Stamp,
    /// The layers above it; `None`: nobody knows, everything.
    pub base: Option<LayerId>,
    /// Hot when it left, ascending.
    pub hot: Arc<[Extent]>,
}

/// What a record slot says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub record: Record,
    pub boot: BootId,
    pub lacking: Vec<Lacking>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Waits for room for the records of a seal.
    Wanted,
    Sealing,
    Writing,
    Syncing,
}

/// An update under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    pub operation: OperationId,
    pub step: Step,
    /// fdatasyncs of the tree that had failed when it began.
    pub failures: u64,
}

/// One volume. What has two of it is indexed by [`Part`].
#[derive(Debug, Default)]
pub(super) struct Mirror {
    pub region: u32,
    /// `None` before the first record is durable.
    pub kept: Option<Kept>,
    /// Ascending.
    pub hot: Vec<Extent>,
    /// Of the newest copies on disk.
    pub sequences: [u64; 2],
    pub updates: [Option<Update>; 2],
    /// What is being written; used again, so that most updates allocate nothing that is large.
    pub memory: [Option<Memory>; 2],
    /// What the updates will make of `kept` and `hot`.
    pub next_kept: Option<Kept>,
    pub next_hot: Vec<Extent>,
    /// Stamps of `next_kept` that want a base, and what was hot since they were asked for.
    pub left: Vec<Stamp>,
    pub hot_since: Vec<Extent>,
    pub plan: Option<MirrorPlan>,
}

/// The mirrored volumes of a tree.
#[derive(Debug, Default)]
pub(in crate::store) struct Mirrors {
    pub(super) volumes: BTreeMap<VolumeId, Mirror>,
    /// Regions of deleted volumes, and the commit after which another volume may have them.
    gone: Vec<(u32, u64)>,
    /// Regions without a volume that were used before, and the sequence numbers of what is whole in them.
    free: BTreeMap<u32, [u64; 2]>,
    /// Regions that the file has.
    pub(super) regions: u32,
    /// Volumes whose seal is durable, or never will be.
    pub sealed: Vec<VolumeId>,
    /// A seal or a release waits for room in the pending region.
    pub waits_for_room: bool,
    /// An update failed, and nobody knows what of it is on disk.
    pub(super) failed: bool,
}

impl Mirror {
    /// What copies other than `me` lack under the next configuration, and the stamps among them that want a base of now.
    /// Only a member's layers above a base say what differs: what a candidate is brought later may read as zeros in it already,
    /// which its layers do not show.
    pub fn lacking(&self, next: &Configuration, me: InstanceId) -> (Vec<Lacking>, Vec<Stamp>) {
        let (mut lacking, mut left): (Vec<Lacking>, Vec<Stamp>) = (Vec::new(), Vec::new());
        for (copy, lacks) in &next.candidates {
            let Lacks::Since(since) = *lacks else { continue };
            if *copy == me || lacking.iter().any(|known| known.since == since) {
                continue;
            }
            let known = self.kept.iter().flat_map(|kept| &kept.lacking).find(|known| known.since == since);
            lacking.push(known.cloned().unwrap_or_else(|| Lacking { since, base: None, hot: Arc::default() }));
            // Who left before this copy's record did so unseen.
            let seen = self.kept.as_ref().is_some_and(|kept| since > kept.record.configuration.stamp);
            left.extend((known.is_none() && seen && next.is_member(me)).then_some(since));
        }
        (lacking, left)
    }

    /// Marked, about to be, or since the record was asked for; ascending. `None` if it is more than the record can keep for
    /// each of the copies that left now, beside what it keeps for others.
    pub fn marked(&self) -> Option<Arc<[Extent]>> {
        let mut marked: Vec<Extent> = self.hot.iter().chain(&self.next_hot).chain(&self.hot_since).copied().collect();
        marked.sort_unstable();
        marked.dedup();
        let known = self.next_kept.iter().flat_map(|kept| &kept.lacking).map(|lacking| lacking.hot.len());
        let all = known.sum::<usize>() + marked.len() * self.left.len();
        (all <= slot::MAX_LEFT).then(|| marked.into())
    }

    pub fn names(&self, layer: LayerId) -> bool {
        let names = |kept: &Kept| kept.lacking.iter().any(|lacking| lacking.base == Some(layer));
        self.kept.iter().chain(&self.next_kept).any(names)
    }
}

impl Mirrors {
    /// Reads what is there, and makes it durable: it may be in a cache only.
    pub fn load(files: &dyn Files, instance: InstanceId, tree: &Tree) -> Result<Self, MirrorError> {
        older::convert(files)?;
        let size = files.size(Name::Mirror)?.unwrap_or(0);
        let mut mirrors = Self { regions: size.div_ceil(REGION as u64) as u32, ..Self::default() };
        if size > 0 {
            files.sync(Name::Mirror)?;
        }
        let mut bytes = vec![0; REGION];
        let spoilt = vec![SPOILT; RECORD_SLOT.max(HOT_SLOT)];
        for region in 0..mirrors.regions {
            let offset = u64::from(region) * REGION as u64;
            let length = (size - offset).min(REGION as u64) as usize;
            files.read_at(Name::Mirror, offset, &mut bytes[..length])?;
            bytes[length..].fill(0);
            let wrong = |error| MirrorError::Region { region, error };
            let Some((volume, mirror)) = read_region(region, &bytes, instance, tree).map_err(wrong)? else {
                mirrors.free.insert(region, clean_free_region(files, region, &bytes, instance)?);
                continue;
            };
            for (part, kind) in [(Part::Record, &slot::RECORD), (Part::Hot, &slot::HOT)] {
                let sequence = mirror.sequences[part as usize];
                let (start, length) = slot::place(part, sequence);
                // Two again: of a first record, damage of the only one would look as if there never was any.
                if let Some((at, copy)) = slot::lost_copy(kind, instance, &bytes[start..start + length], sequence) {
                    files.write_at(Name::Mirror, offset + (start + at) as u64, copy)?;
                }
                let (start, length) = slot::place(part, sequence + 1);
                files.write_at(Name::Mirror, offset + start as u64, &spoilt[..length])?;
            }
            if mirrors.volumes.insert(volume, mirror).is_some() {
                return Err(MirrorError::Twice(volume));
            }
        }
        Ok(mirrors)
    }

    /// The volume is deleted by the records of a commit.
    pub fn volume_gone(&mut self, volume: VolumeId, commit: u64) {
        // After a power cut the volume may be back: nobody else gets its region before.
        if let Some(mirror) = self.volumes.remove(&volume) {
            self.gone.push((mirror.region, commit));
            self.free.insert(mirror.region, mirror.sequences);
        }
    }

    /// A volume without a record yet, in a region that nobody needs. What a deleted volume left there is older than whatever is
    /// written from now on, and the newest of it is not what is written first: a torn first write harms nothing that is whole.
    pub(super) fn settle(&mut self, is_durable: impl Fn(u64) -> bool) -> Mirror {
        self.gone.retain(|(_, commit)| !is_durable(*commit));
        let used = |region: &u32| {
            self.volumes.values().any(|mirror| mirror.region == *region) || self.gone.iter().any(|(r, _)| r == region)
        };
        let region = (0..).find(|region| !used(region)).unwrap_or(u32::MAX);
        Mirror { region, sequences: self.free.remove(&region).unwrap_or_default(), ..Mirror::default() }
    }
}

/// Nobody's region: the sequence numbers of what is whole in it. That stays, because the volume's deletion may not be durable
/// yet. Where nothing is whole, everything becomes zeros: what is torn there never becomes whole again, and is no damage
/// for whoever gets the region.
fn clean_free_region(
    files: &dyn Files,
    region: u32,
    bytes: &[u8],
    instance: InstanceId,
) -> Result<[u64; 2], MirrorError> {
    let offset = u64::from(region) * REGION as u64;
    let (records, sets) = bytes.split_at(HOT_AREA);
    let mut sequences = [0; 2];
    for (part, kind, start, slots) in
        [(Part::Record, &slot::RECORD, 0, records), (Part::Hot, &slot::HOT, HOT_AREA, sets)]
    {
        match slot::newest(kind, instance, slots, |_| true) {
            Ok(Some(found)) => sequences[part as usize] = found.sequence,
            Ok(None) if slots.iter().any(|byte| *byte != 0) => {
                files.write_at(Name::Mirror, offset + start as u64, &vec![0; slots.len()])?;
            }
            // Damaged: its volume may come back, and then must not be taken for one without marks.
            Ok(None) | Err(_) => {}
        }
    }
    Ok(sequences)
}

/// The volume that a region belongs to; `None` if it is free.
fn read_region(
    region: u32,
    bytes: &[u8],
    instance: InstanceId,
    tree: &Tree,
) -> Result<Option<(VolumeId, Mirror)>, HeaderError> {
    let (records, sets) = bytes.split_at(HOT_AREA);
    let there = |volume| tree.volumes.contains_key(&volume);
    let Some(found) = slot::newest(&slot::RECORD, instance, records, there)? else { return Ok(None) };
    let volume = found.volume;
    let mut mirror = Mirror { region, kept: Some(slot::decode_record(found.body)?), ..Mirror::default() };
    mirror.sequences[Part::Record as usize] = found.sequence;
    if let Some(found) = slot::newest(&slot::HOT, instance, sets, |of| of == volume)? {
        mirror.hot = slot::decode_hot(found.body)?;
        mirror.sequences[Part::Hot as usize] = found.sequence;
    } else if let Some(found) = slot::newest(&slot::HOT, instance, sets, |_| true)? {
        // Of a volume that had the region before: this one's first set goes on from there, and may have been torn.
        mirror.sequences[Part::Hot as usize] = found.sequence;
    }
    Ok(Some((volume, mirror)))
}
