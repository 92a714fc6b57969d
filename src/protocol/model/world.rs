//! The cluster around the shipped cores: nodes with disks, a network, a catalogue with compare-and-swap.

use super::disk::{Disk, Operation};
use super::oracle::Oracle;
use super::{Bounds, Invariant};
use crate::protocol::pieces::PieceLimits;
use crate::protocol::tests::Planted;
use crate::protocol::*;
use crate::volume::{BlockRange, InstanceId};
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

/// Longer than any lease with its margin.
const EPOCH: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub replica: Replica,
    pub disk: Disk,
    pub operations: BTreeMap<OperationId, Operation>,
    pub(super) incarnation: u64,
    pub(super) wish: u8,
    pub(super) asked: bool,
    /// Requests of the device that are not answered, by tag.
    pub slots: BTreeMap<u32, Slot>,
    pub(super) next_tag: u32,
    pub(super) boot: u8,
    /// Writes that this copy has executed at any time and nobody has answered.
    pub(super) executed: BTreeSet<u8>,
    pub(super) plan: Vec<Missing>,
    /// Bytes by operation that read them, and by frame that brought them.
    pub(super) read: BTreeMap<OperationId, u8>,
    pub(super) brought: BTreeMap<(InstanceId, Stamp, SerialNumber), u8>,
}

/// A request of the device: a write's value, the last one that a read may not know, or what a flush must have put on stable media.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Slot {
    pub request: Request,
    pub value: u8,
    pub(super) covered: Vec<BTreeSet<u8>>,
    /// It is answered; the reply is on its way.
    pub(super) done: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct Envelope {
    pub from: u8,
    pub to: u8,
    pub message: Message,
    pub value: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct Proposal {
    pub from: u8,
    pub incarnation: u64,
    pub expected: Stamp,
    pub next: Configuration,
}

/// What may happen next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in super::super) enum Action {
    Write(u8, u8),
    Read(u8, u8),
    Flush(u8),
    Disk(u8, OperationId),
    /// The reply of a request is written.
    Reply(u8, u32),
    Deliver(Arc<Envelope>),
    Repeat(Arc<Envelope>),
    Tick(u8),
    Connect(u8, u8),
    Suspect(u8, u8),
    Wish(u8),
    TellWish(u8),
    /// The catalogue executes it; is the answer lost?
    Commit(Arc<Proposal>, bool),
    /// The proposer is told nothing; it may still land.
    NoAnswer(Arc<Proposal>),
    Inform(u8),
    Expire,
    /// Is the node's memory lost, and was what its disk was doing done?
    Restart(u8, bool, bool),
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct World {
    pub(super) bounds: Bounds,
    pub(super) planted: Option<Planted>,
    pub(super) epoch: u8,
    /// Shared by states that differ elsewhere.
    pub(super) nodes: Vec<Arc<Node>>,
    pub(super) catalogue: Configuration,
    pub(super) network: BTreeMap<u64, Arc<Envelope>>,
    pub(super) proposals: BTreeMap<u64, Arc<Proposal>>,
    pub(super) wish: u8,
    pub(super) oracle: Oracle,
}

/// The key of an element of an unordered set, the same in every run.
pub(super) fn fingerprint(element: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    element.hash(&mut hasher);
    hasher.finish()
}

pub(super) fn copy(node: u8) -> InstanceId {
    InstanceId::from_bytes([node + 1; 16])
}

pub(super) fn node_of(copy: InstanceId) -> u8 {
    copy.to_bytes()[0] - 1
}

pub(super) fn range_of(block: u8) -> BlockRange {
    BlockRange::new(u64::from(block) * EXTENT_BLOCKS, 1).expect("not empty")
}

pub(super) fn block_of(range: BlockRange) -> usize {
    (range.start() / EXTENT_BLOCKS) as usize
}

impl World {
    pub fn new(bounds: Bounds, planted: Option<Planted>) -> Self {
        let secondaries = (1..bounds.copies).map(copy).collect();
        let mut catalogue = Configuration::first(Generation(1), copy(0), secondaries);
        let all = bounds.copies + u8::from(bounds.candidate);
        if bounds.candidate {
            catalogue.candidates.insert(copy(bounds.copies), Lacks::Everything);
        }
        let blocks = usize::from(bounds.blocks);
        let mut world = Self {
            bounds,
            planted,
            epoch: 1,
            nodes: vec![],
            network: BTreeMap::new(),
            proposals: BTreeMap::new(),
            wish: 0,
            oracle: Oracle::new(blocks),
            catalogue: catalogue.clone(),
        };
        for node in 0..all {
            let record = Record { intact: catalogue.is_member(copy(node)), configuration: catalogue.clone() };
            world.nodes.push(Arc::new(Node {
                replica: Replica::sole(copy(node)),
                disk: Disk::new(blocks, record),
                operations: BTreeMap::new(),
                incarnation: 0,
                wish: 0,
                asked: false,
                slots: BTreeMap::new(),
                next_tag: 0,
                boot: 0,
                executed: BTreeSet::new(),
                plan: vec![],
                read: BTreeMap::new(),
                brought: BTreeMap::new(),
            }));
        }
        (0..all).for_each(|node| world.start(node));
        world.bounds.reconfigurations += 1;
        world.settle();
        world
    }

    /// The first term begins before anything else happens.
    fn settle(&mut self) {
        while !self.serves(0) {
            let mut actions = vec![];
            self.actions(&mut actions);
            let begins = |a: &Action| matches!(a, Action::Disk(..) | Action::Deliver(_) | Action::Commit(_, false));
            let action = actions.into_iter().find(begins).expect("it goes on until copy 0 serves");
            self.act(&action);
        }
    }

    pub(super) fn now(&self) -> Now {
        Now(EPOCH * u32::from(self.epoch))
    }

    pub(super) fn node(&self, copy: InstanceId) -> &Node {
        &self.nodes[usize::from(node_of(copy))]
    }

    pub(super) fn at(&mut self, node: u8) -> &mut Node {
        Arc::make_mut(&mut self.nodes[usize::from(node)])
    }

    /// Opens a copy, as the engine will: the disk's record, the slots, the catalogue, then the wish.
    pub(super) fn start(&mut self, node: u8) {
        let (now, planted, current) = (self.now(), self.planted, self.catalogue.clone());
        let n = self.at(node);
        n.incarnation += 1;
        let member = Member {
            copy: copy(node),
            incarnation: Incarnation(n.incarnation),
            record: n.disk.record.clone(),
            hot: n.disk.hot.iter().copied().collect(),
            memory: if n.disk.boot == n.boot { Memory::Kept } else { Memory::Lost },
        };
        n.replica = Replica::open(now, member);
        n.replica.planted = planted;
        n.replica.hot_limit = 1;
        n.replica.piece_limits = PieceLimits { busy: 2, quiet: 2, share: 0 };
        n.asked = false;
        // Those that are done get their reply again.
        n.slots.retain(|_, slot| !slot.done);
        (n.operations, n.plan, n.read, n.brought) = Default::default();
        let again: Vec<_> = n.slots.iter().map(|(tag, slot)| (*tag, slot.request)).collect();
        for (tag, request) in again {
            self.step(node, Input::Request { tag: Tag(tag), request });
        }
        self.step(node, Input::Configuration(Box::new(current)));
        self.tell_wish(node);
    }

    pub(super) fn tell_wish(&mut self, node: u8) {
        let wish = self.wish;
        self.at(node).wish = wish;
        let copies = (0..self.nodes.len() as u8).map(copy).collect();
        self.step(node, Input::Wish(Wish { primary: Some(copy(wish)), copies }));
    }

    pub(super) fn step(&mut self, node: u8, input: Input) {
        let mut outputs = vec![];
        let now = self.now();
        self.at(node).replica.step(now, input, &mut outputs);
        for output in outputs {
            self.output(node, output);
        }
    }

    fn output(&mut self, node: u8, output: Output) {
        match output {
            Output::Disk { operation, tag, request } => {
                let slot = self.at(node).slots.get(&tag.0);
                let (value, done) = slot.map_or((0, false), |slot| (slot.value, slot.done));
                if done {
                    self.oracle.break_it(Invariant::OnlyOnce);
                }
                self.request(node, operation, request, value);
            }
            Output::Apply { operation, from, serial, request } => {
                let value = self.brought(node, from, serial);
                self.request(node, operation, request, value);
            }
            Output::ApplyPiece { operation, from, serial, piece } => {
                let value = self.brought(node, from, serial);
                self.request(node, operation, Request::Write(piece.range()), value);
            }
            Output::Compare { operation, from, serial, range } => {
                let value = self.brought(node, from, serial);
                self.run(node, operation, Operation::Compare { block: block_of(range), value });
            }
            Output::ReadPiece { operation, piece } => {
                self.run(node, operation, Operation::Read { block: block_of(piece.range()) })
            }
            Output::FlushHere { operation } => self.request(node, operation, Request::Flush, 0),
            Output::Persist { operation, record } => self.run(node, operation, Operation::Persist(record)),
            Output::WriteHot { operation, extents } => self.run(node, operation, Operation::WriteHot(extents)),
            Output::Plan { operation, lacks, suspects } => {
                let n = self.at(node);
                n.operations.retain(|_, what| *what != Operation::NextRange);
                n.plan = n.disk.plan(lacks, &suspects);
                self.run(node, operation, Operation::NextRange);
            }
            Output::NextRange { operation } => self.run(node, operation, Operation::NextRange),
            Output::Complete { tag, result } => self.complete(node, tag, result),
            Output::Send { to, message, buffer } => {
                let n = self.at(node);
                let value = match buffer {
                    Buffer::None => 0,
                    Buffer::Request(tag) => n.slots.get(&tag.0).map_or(0, |slot| slot.value),
                    Buffer::Operation(read) => n.read.get(&read).copied().unwrap_or(0),
                };
                let envelope = Envelope { from: node, to: node_of(to), message, value };
                self.network.insert(fingerprint(&envelope), Arc::new(envelope));
            }
            Output::Propose { expected, next } => {
                let incarnation = self.at(node).incarnation;
                let proposal = Proposal { from: node, incarnation, expected, next: *next };
                self.proposals.insert(fingerprint(&proposal), Arc::new(proposal));
            }
            Output::ReadConfiguration => self.at(node).asked = true,
            // Applications ask by another device from then on: what they ask is not known before.
            Output::FenceDevice => {}
        }
    }

    fn brought(&self, node: u8, from: InstanceId, serial: SerialNumber) -> u8 {
        let node = &self.nodes[usize::from(node)];
        let stamp = node.replica.record().configuration.stamp;
        // A planted mistake heeds frames of another version.
        let other = || node.brought.iter().find(|((by, _, place), _)| (*by, *place) == (from, serial)).map(|(_, v)| v);
        node.brought.get(&(from, stamp, serial)).or_else(other).copied().unwrap_or(0)
    }

    fn complete(&mut self, node: u8, tag: Tag, result: Result<(), DiskError>) {
        let slow = self.bounds.slow_replies;
        let Some(slot) = self.at(node).slots.get_mut(&tag.0) else { return };
        if slot.done {
            return self.oracle.break_it(Invariant::OnlyOnce);
        }
        slot.done = true;
        let Slot { request, value, covered, .. } = slot.clone();
        match (request, result) {
            (Request::Write(_), Ok(())) => {
                let executed = |member: InstanceId| self.node(member).executed.contains(&value);
                let awaited = self.catalogue.members().all(executed);
                self.oracle.acknowledge(value, |value| began(&self.nodes, value));
                if !awaited {
                    self.oracle.break_it(Invariant::Awaited);
                }
            }
            (Request::Write(_), Err(_)) => self.oracle.fence(value),
            (Request::Read(range), Ok(())) => {
                let read = self.at(node).disk.cache[block_of(range)];
                self.oracle.read(node, block_of(range), read, value, |value| began(&self.nodes, value));
            }
            (Request::Flush, Ok(())) => self.oracle.flushed(&covered),
            _ => {}
        }
        if !slow {
            self.reply(node, tag.0);
        }
    }

    pub(super) fn reply(&mut self, node: u8, tag: u32) {
        self.at(node).slots.remove(&tag);
        self.step(node, Input::Replied { tag: Tag(tag) });
    }
}

/// Whether any copy has executed this write.
fn began(nodes: &[Arc<Node>], value: u8) -> bool {
    nodes.iter().any(|node| node.executed.contains(&value))
}
