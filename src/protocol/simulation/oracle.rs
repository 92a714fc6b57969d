//! What the applications know: which contents a block may have, by what was answered and what was read.
//!
//! A write that failed is *unknown*: it may or may not have had an effect. Once a read has returned a content, or a later
//! write of the block was acknowledged, it is decided. Writes that overlap have the order in which a primary started them.

use super::disk::{Content, Payload};
use crate::volume::BlockRange;
use std::collections::{BTreeMap, BTreeSet};

/// Number of a write; zero: never written.
pub type WriteId = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Unknown,
    Acknowledged,
    Failed,
}

#[derive(Clone, Debug)]
struct Write {
    range: BlockRange,
    zeros: bool,
    fate: Fate,
    /// Place in the order of starting; `NEVER` before.
    order: u32,
    /// It was under way when no member had kept its caches.
    endangered: bool,
}

/// Not started: it may take effect after everything else.
const NEVER: u32 = u32::MAX;

/// See the module.
#[derive(Debug, Default)]
pub struct Oracle {
    writes: Vec<Write>,
    /// By block: all writes of it, and those that a read may return.
    of: BTreeMap<u64, Vec<WriteId>>,
    possible: BTreeMap<u64, BTreeSet<WriteId>>,
    /// No member's media have anything older.
    floor: BTreeMap<u64, WriteId>,
    started: u32,
    pub acknowledged: u64,
    pub failed: u64,
}

impl Oracle {
    /// A write (or discard) is submitted.
    pub fn submit(&mut self, range: BlockRange, zeros: bool) -> WriteId {
        self.writes.push(Write { range, zeros, fate: Fate::Unknown, order: NEVER, endangered: false });
        let id = self.writes.len() as WriteId;
        for block in range.start()..range.end() {
            self.of.entry(block).or_default().push(id);
            self.possible.entry(block).or_insert_with(|| BTreeSet::from([0])).insert(id);
        }
        id
    }

    /// A block was torn: neither one write nor the other.
    pub fn tear(&mut self, block: u64) -> Content {
        let Some(range) = BlockRange::new(block, 1) else { return 0 };
        self.started += 1;
        self.writes.push(Write { range, zeros: false, fate: Fate::Failed, order: self.started, endangered: false });
        let id = self.writes.len() as WriteId;
        self.of.entry(block).or_default().push(id);
        id
    }

    /// A primary has given it to its disk. What is executed again after a crash has its first place.
    pub fn start(&mut self, id: WriteId) {
        if let Some(write) = self.writes.get_mut(id as usize - 1).filter(|write| write.order == NEVER) {
            self.started += 1;
            write.order = self.started;
        }
    }

    fn order(&self, id: WriteId) -> u32 {
        self.write(id).map_or(0, |write| write.order)
    }

    fn write(&self, id: WriteId) -> Option<&Write> {
        self.writes.get((id as usize).checked_sub(1)?)
    }

    /// What a block holds after the write.
    pub fn content(&self, id: WriteId) -> Content {
        self.write(id).map_or(0, |write| if write.zeros { 0 } else { id })
    }

    pub fn is_acknowledged(&self, id: WriteId) -> bool {
        self.write(id).is_some_and(|write| write.fate == Fate::Acknowledged)
    }

    /// No member has its caches any more: what is under way may be gone, also if it is acknowledged later.
    pub fn endanger(&mut self) {
        let under_way = |write: &&mut Write| write.fate == Fate::Unknown && write.order != NEVER;
        self.writes.iter_mut().filter(under_way).for_each(|write| write.endangered = true);
    }

    pub fn is_endangered(&self, id: WriteId) -> bool {
        self.write(id).is_some_and(|write| write.endangered)
    }

    pub fn acknowledge(&mut self, id: WriteId) -> Result<(), String> {
        self.acknowledged += 1;
        let Some(write) = self.writes.get_mut((id as usize) - 1) else { return Ok(()) };
        write.fate = Fate::Acknowledged;
        let (range, order) = (write.range, write.order);
        for block in range.start()..range.end() {
            let Some(possible) = self.possible.get(&block) else { continue };
            if possible.contains(&id) {
                self.decide(block, &BTreeSet::from([id]), order);
            } else if possible.iter().any(|left| self.order(*left) < order) {
                return Err(format!("I1: write {id} is acknowledged, but block {block} was seen without it"));
            }
        }
        Ok(())
    }

    /// The block has one of these, until one that is started after `order` takes effect.
    fn decide(&mut self, block: u64, these: &BTreeSet<WriteId>, order: u32) {
        let Self { writes, possible, .. } = self;
        let later = |write: &Write| write.order > order && write.fate == Fate::Unknown;
        let unknown = |id: WriteId| id > 0 && later(&writes[id as usize - 1]);
        if let Some(possible) = possible.get_mut(&block) {
            possible.retain(|id| these.contains(id) || unknown(*id));
        }
    }

    pub fn fail(&mut self, id: WriteId) {
        self.failed += 1;
        if let Some(write) = self.writes.get_mut(id as usize - 1) {
            write.fate = Fate::Failed;
        }
    }

    /// What may be read from a block and has this content.
    fn matching(&self, block: u64, content: Content) -> BTreeSet<WriteId> {
        match self.possible.get(&block) {
            None if content == 0 => BTreeSet::from([0]),
            None => BTreeSet::new(),
            Some(possible) => possible.iter().copied().filter(|id| self.content(*id) == content).collect(),
        }
    }

    pub fn is_possible(&self, block: u64, content: Content) -> bool {
        !self.matching(block, content).is_empty()
    }

    /// A read has returned this: what was started before it is decided.
    pub fn read(&mut self, range: BlockRange, payload: &Payload) -> Result<(), String> {
        for block in range.start()..range.end() {
            let content = payload.iter().find(|(b, _)| *b == block).map_or(0, |(_, content)| *content);
            let matching = self.matching(block, content);
            if matching.is_empty() {
                let possible = self.possible.get(&block);
                return Err(format!("a read of block {block} returned {content}; possible is {possible:?}"));
            }
            self.decide(block, &matching, self.started);
        }
        Ok(())
    }

    /// What a flush that is submitted now must put on stable media: nothing older than this.
    pub fn covered(&self) -> Vec<(u64, WriteId)> {
        let first = |possible: &BTreeSet<WriteId>| possible.iter().copied().min_by_key(|id| self.order(*id));
        let oldest = self.possible.iter().filter_map(|(block, possible)| Some((*block, first(possible)?)));
        oldest.filter(|(_, id)| *id > 0).collect()
    }

    pub fn flushed(&mut self, covered: &[(u64, WriteId)]) {
        for (block, id) in covered {
            let floor = self.floor.get(block).copied().unwrap_or_default();
            if self.order(*id) > self.order(floor) {
                self.floor.insert(*block, *id);
            }
        }
    }

    /// Whether a block with this content has nothing older than `floor`.
    pub fn is_since(&self, block: u64, content: Content, floor: WriteId) -> bool {
        let fits = |id: &WriteId| self.order(*id) >= self.order(floor) && self.content(*id) == content;
        floor == 0 || self.of.get(&block).is_some_and(|writes| writes.iter().any(fits))
    }

    /// The first block whose stable content is older than an acknowledged flush.
    pub fn below_floor(&self, stable: impl Fn(u64) -> Content) -> Option<(u64, Content, WriteId)> {
        let found = self.floor.iter().map(|(block, floor)| (*block, stable(*block), *floor));
        found.into_iter().find(|(block, content, floor)| !self.is_since(*block, *content, *floor))
    }

    /// No member kept its caches: what was not flushed may be gone, and this is what one of them has.
    pub fn lose(&mut self, block: u64, left: Content) {
        let floor = self.floor.get(&block).copied().unwrap_or_default();
        let writes = self.of.get(&block).into_iter().flatten().copied();
        let since = self.order(floor);
        let ids: Vec<_> = writes.filter(|id| self.order(*id) >= since && self.content(*id) == left).collect();
        let possible = self.possible.entry(block).or_insert_with(|| BTreeSet::from([0]));
        possible.extend(ids);
        if floor == 0 && left == 0 {
            possible.insert(0);
        }
    }

    /// What was under way when the only member lost its caches may have this left; what was acknowledged is there.
    pub fn leave(&mut self, block: u64, left: Content) {
        let Some(possible) = self.possible.get(&block) else { return };
        let since = possible.iter().map(|id| self.order(*id)).min().unwrap_or_default();
        let writes = self.of.get(&block).into_iter().flatten().copied();
        let ids: Vec<_> = writes.filter(|id| self.order(*id) >= since && self.content(*id) == left).collect();
        self.possible.entry(block).or_default().extend(ids);
    }

    /// The one of two that is older.
    pub fn older(&self, one: WriteId, other: WriteId) -> WriteId {
        if self.order(one) < self.order(other) { one } else { other }
    }

    pub fn blocks(&self) -> Vec<u64> {
        self.of.keys().copied().collect()
    }
}
