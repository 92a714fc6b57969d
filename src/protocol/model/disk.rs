//! A node's disk: a cache and stable media, what is recorded beside the copy, and operations that take their time.

use super::world::{Node, World, block_of, copy, range_of};
use super::{Granularity, Invariant};
use crate::protocol::*;
use crate::volume::InstanceId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Where each copy may know that others lack something: since a version.
type Lacking = BTreeMap<Stamp, Since>;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Since {
    /// Hot then.
    pub hot: BTreeSet<usize>,
    /// Written since then, as seen by the cache,
    pub cache: BTreeSet<usize>,
    /// and by the media.
    pub stable: BTreeSet<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Disk {
    pub cache: Vec<u8>,
    pub stable: Vec<u8>,
    pub record: Record,
    /// The node's boot that wrote the record.
    pub boot: u8,
    pub hot: BTreeSet<Extent>,
    pub lacking: Lacking,
}

impl Since {
    pub fn has(&self, block: usize) -> bool {
        self.hot.contains(&block) || self.cache.contains(&block)
    }
}

/// A disk operation that is not done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    Write {
        block: usize,
        value: u8,
    },
    Read {
        block: usize,
    },
    /// What the cache had when it was submitted.
    Flush {
        cache: Vec<u8>,
        lacking: Lacking,
        /// A later one has ended: this one must not take back what that has put on the media.
        overtaken: bool,
    },
    Persist(Box<Record>),
    WriteHot(Box<[Extent]>),
    /// With what another copy has.
    Compare {
        block: usize,
        value: u8,
    },
    NextRange,
}

impl Disk {
    pub fn new(blocks: usize, record: Record) -> Self {
        let (cache, stable) = (vec![0; blocks], vec![0; blocks]);
        Self { cache, stable, record, boot: 0, hot: BTreeSet::new(), lacking: Lacking::new() }
    }

    /// The store's plan: the blocks that the layers since a version name, and those of the extents, which may differ.
    pub fn plan(&self, lacks: Option<Lacks>, suspects: &Suspects) -> Vec<Missing> {
        let (Suspects::Marked(named) | Suspects::Unanswered(named)) = suspects;
        let mut suspected: BTreeSet<usize> = named.iter().map(|extent| extent.0 as usize).collect();
        let mut known = BTreeSet::new();
        match lacks {
            None => {}
            Some(Lacks::Everything) => suspected.extend(0..self.cache.len()),
            Some(Lacks::Since(since)) => match self.lacking.get(&since) {
                Some(since) => {
                    known.extend(&since.cache);
                    suspected.extend(since.hot.iter().filter(|_| matches!(suspects, Suspects::Marked(_))));
                }
                None => suspected.extend(0..self.cache.len()),
            },
        }
        let missing = |block: &usize| {
            let range = range_of(*block as u8);
            if suspected.contains(block) {
                Some(Missing::Suspected(range))
            } else {
                Piece::whole(range).map(Missing::Known)
            }
        };
        known.union(&suspected).filter_map(missing).collect()
    }

    /// As in the store, only a member's layers say what others lack.
    fn persist(&mut self, me: InstanceId, record: Record, boot: u8) {
        let before = self.record.configuration.stamp;
        let hot: BTreeSet<usize> = self.hot.iter().map(|extent| extent.0 as usize).collect();
        for lacks in record.configuration.candidates.values() {
            if let Lacks::Since(since) = lacks
                && *since > before
                && record.configuration.is_member(me)
            {
                self.lacking.insert(*since, Since { hot: hot.clone(), ..Since::default() });
            }
        }
        (self.record, self.boot) = (record, boot);
    }
}

impl World {
    pub(super) fn request(&mut self, node: u8, operation: OperationId, request: Request, value: u8) {
        let disk = &self.at(node).disk;
        let done = match request {
            Request::Read(range) => Operation::Read { block: block_of(range) },
            Request::Write(range) => Operation::Write { block: block_of(range), value },
            Request::Discard(range) | Request::WriteZeroes(range) => {
                Operation::Write { block: block_of(range), value: 0 }
            }
            Request::Flush | Request::Seal(_) => {
                Operation::Flush { cache: disk.cache.clone(), lacking: disk.lacking.clone(), overtaken: false }
            }
        };
        self.run(node, operation, done);
    }

    /// Begins a disk operation; what is not looked at one by one is done at once.
    pub(super) fn run(&mut self, node: u8, operation: OperationId, what: Operation) {
        let conflict = |other: &Operation| match (other, &what) {
            (
                Operation::Write { block: a, .. },
                Operation::Write { block: b, .. } | Operation::Read { block: b } | Operation::Compare { block: b, .. },
            ) => a == b,
            _ => false,
        };
        if self.nodes[usize::from(node)].operations.values().any(conflict) {
            self.oracle.break_it(Invariant::OneOrder);
        }
        let event = match self.bounds.disk {
            Granularity::Instant => false,
            Granularity::Data => matches!(what, Operation::Write { .. } | Operation::Flush { .. }),
            Granularity::Every => true,
        };
        self.at(node).operations.insert(operation, what);
        if !event {
            self.finish(node, operation);
        }
    }

    pub(super) fn finish(&mut self, node: u8, operation: OperationId) {
        let Some(what) = self.at(node).operations.remove(&operation) else { return };
        let input = match what {
            Operation::NextRange => {
                let n = self.at(node);
                let missing = (!n.plan.is_empty()).then(|| n.plan.remove(0));
                Input::Planned { operation, missing: Ok(missing) }
            }
            Operation::Compare { block, value } => {
                let differs = BlockSet::first(u32::from(self.at(node).disk.cache[block] != value));
                Input::Compared { operation, differs: Ok(differs) }
            }
            what => {
                self.effect(node, operation, what);
                Input::Completed { operation, result: Ok(()) }
            }
        };
        self.step(node, input);
    }

    /// What an operation does to the disk.
    pub(super) fn effect(&mut self, node: u8, operation: OperationId, what: Operation) {
        let Self { nodes, oracle, catalogue, .. } = self;
        let Node { disk, read, executed, operations, boot, .. } = Arc::make_mut(&mut nodes[usize::from(node)]);
        match what {
            Operation::Write { block, value } => {
                // A candidate that is behind has marked what it writes: it is copied again when it joins.
                let counts = catalogue.stamp == disk.record.configuration.stamp || catalogue.is_member(copy(node));
                if counts && oracle.is_certain(block, disk.cache[block]) && value != disk.cache[block] {
                    oracle.break_it(Invariant::NeverOlder);
                }
                disk.cache[block] = value;
                executed.insert(value);
                disk.lacking.values_mut().for_each(|since| _ = since.cache.insert(block));
            }
            Operation::Read { block } => {
                read.insert(operation, disk.cache[block]);
            }
            Operation::Flush { overtaken: true, .. } => {}
            Operation::Flush { cache, lacking, .. } => {
                for (_, other) in operations.range_mut(..operation) {
                    if let Operation::Flush { overtaken, .. } = other {
                        *overtaken = true;
                    }
                }
                disk.stable = cache;
                for (version, Since { cache, .. }) in lacking {
                    disk.lacking.entry(version).and_modify(|since| since.stable.extend(cache));
                }
            }
            Operation::Persist(record) => disk.persist(copy(node), *record, *boot),
            Operation::WriteHot(extents) => disk.hot = extents.iter().copied().collect(),
            Operation::Compare { .. } | Operation::NextRange => {}
        }
    }
}
