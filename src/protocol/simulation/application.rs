//! The applications: requests of the device, and what their answers say.

use super::cluster::{Cluster, Event};
use super::disk::VOLUME_BLOCKS;
use super::node::Slot;
use crate::protocol::*;
use crate::volume::BlockRange;

impl Cluster {
    /// A pod starts on a node.
    pub fn open_application(&mut self, node: usize) {
        if !self.nodes[node].powered || !self.guests.is_empty() {
            return;
        }
        let number = self.number();
        let depth = 1 + self.random.index(8);
        let n = &mut self.nodes[node];
        (n.depth, n.application) = (depth, number);
        self.at(std::time::Duration::ZERO, Event::Application(node, number));
    }

    pub fn application(&mut self, node: usize, number: u64) -> Result<(), String> {
        let n = &self.nodes[node];
        if n.application != number || n.depth == 0 {
            return Ok(());
        }
        let pause = self.random.millis(1, 40);
        self.at(pause, Event::Application(node, number));
        if self.nodes[node].slots.len() >= self.nodes[node].depth {
            return Ok(());
        }
        let request = self.request();
        let slot = self.new_slot(request);
        let n = &mut self.nodes[node];
        let tag = n.next_tag;
        n.next_tag += 1;
        n.slots.insert(tag, slot);
        // An engine that is not there finds it in its slot.
        self.step(node, Input::Request { tag: Tag(tag), request })
    }

    /// A request that is submitted now.
    pub fn new_slot(&mut self, request: Request) -> Slot {
        let write = match request {
            Request::Write(range) => self.oracle.submit(range, false),
            Request::Discard(range) | Request::WriteZeroes(range) => self.oracle.submit(range, true),
            Request::Read(_) | Request::Flush | Request::Seal(_) => 0,
        };
        let covered = match request {
            Request::Flush | Request::Seal(_) => self.oracle.covered(),
            _ => vec![],
        };
        Slot { request, write, covered, read: vec![] }
    }

    /// Blocks near the borders of extents, so that requests meet each other and cross them.
    fn range(&mut self) -> BlockRange {
        let extent = self.random.below(VOLUME_BLOCKS / EXTENT_BLOCKS - 1) + 1;
        let at = extent * EXTENT_BLOCKS + self.random.below(6) - 3;
        let count = 1 + self.random.below(3) as u32;
        BlockRange::new(at, count).unwrap_or_else(|| unreachable!("inside of the volume"))
    }

    pub fn request(&mut self) -> Request {
        match self.random.below(100) {
            0..50 => Request::Write(self.range()),
            50..75 => Request::Read(self.range()),
            75..88 => Request::Flush,
            88..93 => Request::Discard(self.range()),
            93..97 => Request::WriteZeroes(self.range()),
            _ => {
                self.seals += 1;
                Request::Seal(SealName(self.seals))
            }
        }
    }

    /// A request is answered.
    pub fn complete(&mut self, node: usize, tag: Tag, result: Result<(), DiskError>) -> Result<(), String> {
        if let Some(place) = super::host::place(tag) {
            return self.guest_answer(node, place, result);
        }
        let Some(slot) = self.nodes[node].slots.remove(&tag.0) else {
            return Err(format!("{tag:?} of node {node} is answered twice"));
        };
        if result == Err(DiskError::Fenced) {
            self.tally.fenced += 1;
            // The device ends with it.
            self.nodes[node].depth = 0;
        }
        self.answered(node, &slot, result)?;
        self.step(node, Input::Replied { tag })
    }

    /// What the answer of a request promises.
    pub fn answered(&mut self, node: usize, slot: &Slot, result: Result<(), DiskError>) -> Result<(), String> {
        match (slot.request, result) {
            (Request::Write(range) | Request::Discard(range) | Request::WriteZeroes(range), Ok(())) => {
                self.oracle.acknowledge(slot.write)?;
                self.admit_late_losses(range, slot.write);
                self.everywhere(range, slot.write)?;
            }
            (request, Err(_)) if request.is_mutation() => self.oracle.fail(slot.write),
            (Request::Read(range), Ok(())) => {
                self.tally.reads += 1;
                self.oracle.read(range, &slot.read).map_err(|error| format!("node {node}: {error}"))?;
            }
            (Request::Flush, Ok(())) => {
                self.tally.flushes += 1;
                self.oracle.flushed(&slot.covered);
                self.floors()?;
            }
            (Request::Seal(SealName(name)), Ok(())) => self.sealed(name, slot)?,
            _ => {}
        }
        Ok(())
    }

    /// The nodes that have a member of the committed configuration.
    pub fn members(&self) -> Vec<usize> {
        self.catalogue.members().filter_map(|copy| self.node_of(copy)).collect()
    }

    /// I1: an acknowledged write is on every member that kept its caches.
    fn everywhere(&self, range: BlockRange, write: u32) -> Result<(), String> {
        for node in self.members() {
            let n = &self.nodes[node];
            let has = |block| self.oracle.is_since(block, n.disk.get(block), write);
            if n.is_kept() && !(range.start()..range.end()).all(has) {
                return Err(format!("I1: write {write} of {range:?} is acknowledged, and member {node} lacks it"));
            }
        }
        Ok(())
    }

    /// I1: an acknowledged flush is on the stable media of every member.
    pub fn floors(&self) -> Result<(), String> {
        for node in self.members() {
            let disk = &self.nodes[node].disk;
            if let Some((block, content, floor)) = self.oracle.below_floor(|block| disk.stable(block)) {
                return Err(format!(
                    "I1: a flush that covers write {floor} is acknowledged, and block {block} of member {node} is {content}"
                ));
            }
        }
        Ok(())
    }

    /// A snapshot is the same point on every member, with all that was acknowledged before.
    fn sealed(&mut self, name: u32, slot: &Slot) -> Result<(), String> {
        self.tally.seals += 1;
        let of = |node: usize| self.nodes[node].disk.seals.get(&name).ok_or(node);
        let all: Result<Vec<_>, usize> = self.members().into_iter().map(of).collect();
        let all = all.map_err(|node| format!("snapshot {name} is acknowledged, and member {node} has none"))?;
        if all.windows(2).any(|two| two[0] != two[1]) {
            return Err(format!("snapshot {name} is not the same on all members: {all:?}"));
        }
        let Some(first) = all.first() else { return Ok(()) };
        for (block, write) in &slot.covered {
            let content = first.iter().find(|(b, _)| b == block).map_or(0, |(_, content)| *content);
            if !self.oracle.is_since(*block, content, *write) {
                return Err(format!(
                    "snapshot {name} lacks write {write}, which was acknowledged before: block {block}"
                ));
            }
        }
        Ok(())
    }
}
