//! One copy on a simulated disk: what its cache has, what its media have, and what it knows that others lack.
//!
//! Invariants: a write is in the cache when it is done and on the media when a flush that began later is done; a power cut
//! leaves each block that was not flushed as any of the versions since the last flush, or torn; and so may a flush that fails.

use super::random::Random;
use crate::protocol::tests::Planted;
use crate::protocol::*;
use crate::volume::{BlockRange, InstanceId, MAX_REQUEST_BLOCKS};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What a block holds: the number of the write that put it there, zero for zeros.
pub type Content = u32;

/// The blocks of a range that are not zero.
pub type Payload = Vec<(u64, Content)>;

/// Blocks of the volume: six extents.
pub const VOLUME_BLOCKS: u64 = 6 * EXTENT_BLOCKS;

#[derive(Clone, Debug, Default)]
struct Block {
    stable: Content,
    /// Versions since the last flush with the number of their writing.
    unflushed: Vec<(u64, Content)>,
}

impl Block {
    fn now(&self) -> Content {
        self.unflushed.last().map_or(self.stable, |(_, content)| *content)
    }
}

/// Where another copy differs, since it left.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Writings up to this one were before.
    since: u64,
    extents: BTreeSet<Extent>,
    blocks: BTreeSet<u64>,
    unflushed: BTreeSet<u64>,
}

/// What a flush that was submitted will put on the media.
#[derive(Clone, Debug)]
pub struct Captured {
    upto: u64,
    known: Vec<(Stamp, BTreeSet<u64>)>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Disk {
    pub instance: InstanceId,
    pub record: Record,
    /// The life of the caches in which the record was written.
    pub caches: u64,
    pub hot: BTreeSet<Extent>,
    blocks: BTreeMap<u64, Block>,
    writings: u64,
    lacking: BTreeMap<Stamp, Known>,
    planted: Option<Planted>,
    pub seals: BTreeMap<u32, Payload>,
}

fn extent_start(extent: &Extent) -> u64 {
    u64::from(extent.0) * EXTENT_BLOCKS
}

impl Disk {
    /// An empty disk.
    pub fn blank(instance: InstanceId, configuration: Configuration, planted: Option<Planted>) -> Self {
        let record = Record { intact: configuration.is_member(instance), configuration };
        Self {
            instance,
            record,
            caches: 0,
            hot: BTreeSet::new(),
            blocks: BTreeMap::new(),
            writings: 0,
            lacking: BTreeMap::new(),
            planted,
            seals: BTreeMap::new(),
        }
    }

    pub fn get(&self, block: u64) -> Content {
        self.blocks.get(&block).map_or(0, Block::now)
    }

    pub fn stable(&self, block: u64) -> Content {
        self.blocks.get(&block).map_or(0, |block| block.stable)
    }

    pub fn read(&self, range: BlockRange) -> Payload {
        let blocks = self.blocks.range(range.start()..range.end());
        blocks.map(|(block, found)| (*block, found.now())).filter(|(_, content)| *content != 0).collect()
    }

    /// The range has exactly this content afterwards.
    pub fn write(&mut self, range: BlockRange, payload: &Payload) {
        self.zero(range, payload);
        for (block, content) in payload {
            self.put(*block, *content);
        }
    }

    /// The range reads as zeros afterwards, but for what follows; what was never written needs nothing for that.
    pub fn zero(&mut self, range: BlockRange, followed: &[(u64, Content)]) {
        let there: Vec<u64> = self.blocks.range(range.start()..range.end()).map(|(block, _)| *block).collect();
        for block in there.into_iter().filter(|block| !followed.iter().any(|(b, _)| b == block)) {
            self.put(block, 0);
        }
    }

    fn put(&mut self, block: u64, content: Content) {
        self.writings += 1;
        self.blocks.entry(block).or_default().unflushed.push((self.writings, content));
        self.lacking.values_mut().for_each(|known| _ = known.unflushed.insert(block));
    }

    pub fn capture(&self) -> Captured {
        let known = self.lacking.iter().map(|(since, known)| (*since, known.unflushed.clone()));
        Captured { upto: self.writings, known: known.collect() }
    }

    pub fn flushed(&mut self, captured: &Captured) {
        for block in self.blocks.values_mut() {
            let count = block.unflushed.iter().take_while(|(writing, _)| *writing <= captured.upto).count();
            if let Some((_, content)) = block.unflushed.drain(..count).next_back() {
                block.stable = content;
            }
        }
        for (since, blocks) in &captured.known {
            if let Some(known) = self.lacking.get_mut(since) {
                known.blocks.extend(blocks);
            }
        }
    }

    /// As in the store, only a member's layers say what others lack.
    pub fn persist(&mut self, record: Record, caches: u64) {
        let before = self.record.configuration.stamp;
        let counts = record.configuration.is_member(self.instance) || self.planted == Some(Planted::CandidateKeepsBase);
        for lacks in record.configuration.candidates.values() {
            if let Lacks::Since(since) = lacks
                && *since > before
                && counts
            {
                let known = Known { since: self.writings, extents: self.hot.clone(), ..Known::default() };
                self.lacking.insert(*since, known);
            }
        }
        let named = |since: &Stamp| record.configuration.candidates.values().any(|l| *l == Lacks::Since(*since));
        self.lacking.retain(|since, _| named(since));
        (self.record, self.caches) = (record, caches);
    }

    /// What a node that loses its power leaves, or a disk that fails a flush; a torn block gets its content from `tear`.
    pub fn lose_caches(&mut self, random: &mut Random, mut tear: impl FnMut(u64) -> Content) {
        for (number, block) in &mut self.blocks {
            let versions = std::mem::take(&mut block.unflushed);
            if versions.is_empty() {
                continue;
            }
            let chosen = random.index(versions.len() + 1).checked_sub(1).map(|at| versions[at]);
            block.stable = chosen.map_or(block.stable, |(_, content)| content);
            let torn = random.percent(5);
            if torn {
                block.stable = tear(*number);
            }
            // What was written since a copy left is where the map says, or is not there at all.
            for known in self.lacking.values_mut().filter(|known| known.unflushed.contains(number)) {
                let newer = chosen.is_some_and(|(writing, _)| writing > known.since);
                if torn || newer || random.percent(50) {
                    known.blocks.insert(*number);
                }
            }
        }
        self.lacking.values_mut().for_each(|known| known.unflushed.clear());
    }

    /// What of a range differs from another copy's.
    pub fn compare(&self, range: BlockRange, theirs: &Payload) -> BlockSet {
        let (ours, mut differs) = (self.read(range), BlockSet::default());
        let found =
            |payload: &Payload, block| payload.iter().find(|(b, _)| *b == block).map_or(0, |(_, content)| *content);
        for block in (range.start()..range.end()).filter(|block| found(&ours, *block) != found(theirs, *block)) {
            differs.insert((block - range.start()) as u32, 1);
        }
        differs
    }

    /// What a copy lacks: known blocks close to each other together, extents in parts that are compared at once.
    pub fn plan(&self, lacks: Option<Lacks>, suspects: &Suspects) -> VecDeque<Missing> {
        let (Suspects::Marked(named) | Suspects::Unanswered(named)) = suspects;
        let mut extents: BTreeSet<Extent> = named.iter().copied().collect();
        let mut blocks = BTreeSet::new();
        match lacks {
            None => {}
            Some(lacks) => {
                let known = if let Lacks::Since(since) = lacks { self.lacking.get(&since) } else { None };
                match known {
                    Some(known) => {
                        let left = known.extents.iter().filter(|_| matches!(suspects, Suspects::Marked(_)));
                        extents.extend(left);
                        blocks.extend(known.blocks.iter().chain(&known.unflushed));
                    }
                    None => extents.extend((0..VOLUME_BLOCKS / EXTENT_BLOCKS).map(|extent| Extent(extent as u32))),
                }
            }
        }
        let part = u64::from(COMPARED_BLOCKS);
        let starts = |extent: &Extent| {
            (0..EXTENT_BLOCKS / part).map(move |at| extent_start(extent) + at * part).collect::<Vec<_>>()
        };
        let suspected = |at: u64| Some((at, Missing::Suspected(BlockRange::new(at, COMPARED_BLOCKS)?)));
        let mut plan: BTreeMap<u64, Missing> = extents.iter().flat_map(starts).filter_map(suspected).collect();
        let mut known: BTreeMap<u64, BlockSet> = BTreeMap::new();
        for block in blocks.into_iter().filter(|block| !extents.contains(&Extent((block / EXTENT_BLOCKS) as u32))) {
            let at = block - block % u64::from(MAX_REQUEST_BLOCKS);
            known.entry(at).or_default().insert((block - at) as u32, 1);
        }
        let piece =
            |(at, blocks)| Some((at, Missing::Known(Piece::new(BlockRange::new(at, MAX_REQUEST_BLOCKS)?, blocks)?)));
        plan.extend(known.into_iter().filter_map(piece));
        plan.into_values().collect()
    }

    /// Everything that is not zero.
    pub fn contents(&self) -> Payload {
        let blocks = self.blocks.iter().map(|(block, found)| (*block, found.now()));
        blocks.filter(|(_, content)| *content != 0).collect()
    }
}
