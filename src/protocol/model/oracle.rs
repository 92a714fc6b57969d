//! What the applications know: which values a block may have, by what was answered and what was read.
//!
//! A write that was submitted and not answered may or may not take effect. Once a read has returned a value, or a later
//! write of the block was acknowledged, it is decided. Values rise in the order of submission.

use super::Invariant;
use std::collections::BTreeSet;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fate {
    Unknown,
    Acknowledged,
    Fenced,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Write {
    node: u8,
    block: usize,
    fate: Fate,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct Oracle {
    writes: Vec<Write>,
    /// By block: what a read may return.
    possible: Vec<BTreeSet<u8>>,
    /// By block: overwritten before a flush that was acknowledged; no member's stable media has these.
    flushed: Vec<BTreeSet<u8>>,
    /// A read was answered.
    pub has_read: bool,
    /// The first invariant that is broken.
    pub broken: Option<Invariant>,
}

impl Oracle {
    pub fn new(blocks: usize) -> Self {
        let possible = vec![BTreeSet::from([0]); blocks];
        Self { writes: vec![], possible, flushed: vec![BTreeSet::new(); blocks], has_read: false, broken: None }
    }

    pub fn break_it(&mut self, invariant: Invariant) {
        self.broken.get_or_insert(invariant);
    }

    /// A write is submitted at a node; returns its value.
    pub fn submit(&mut self, node: u8, block: usize) -> u8 {
        self.writes.push(Write { node, block, fate: Fate::Unknown });
        let value = self.writes.len() as u8;
        self.possible[block].insert(value);
        value
    }

    pub fn submitted(&self) -> usize {
        self.writes.len()
    }

    /// A write is answered. What was submitted before it at the same node came before it, and so did what has begun.
    pub fn acknowledge(&mut self, value: u8, began: impl Fn(u8) -> bool) {
        let write = &mut self.writes[usize::from(value) - 1];
        write.fate = Fate::Acknowledged;
        let (node, block) = (write.node, write.block);
        if self.is_possible(block, value) {
            self.decide(node, block, value, value, began);
        } else if self.possible[block].first().is_some_and(|left| *left < value) {
            // A later write may have followed it at another primary, but nothing older comes back.
            self.break_it(Invariant::Durable);
        }
    }

    /// The block has this value, until one that is not answered takes effect: of the same node only those that were
    /// submitted after `since`, of another node those that nobody has begun.
    fn decide(&mut self, node: u8, block: usize, value: u8, since: u8, began: impl Fn(u8) -> bool) {
        let Self { writes, possible, .. } = self;
        possible[block].retain(|v| {
            let later = || {
                let write = &writes[usize::from(*v) - 1];
                write.fate == Fate::Unknown && (*v > since || (write.node != node && !began(*v)))
            };
            *v == value || (*v > 0 && later())
        });
    }

    pub fn fence(&mut self, value: u8) {
        self.writes[usize::from(value) - 1].fate = Fate::Fenced;
    }

    /// Whether it was submitted and is not answered.
    pub fn is_unknown(&self, value: u8) -> bool {
        value > 0 && self.writes[usize::from(value) - 1].fate == Fate::Unknown
    }

    pub fn is_possible(&self, block: usize, value: u8) -> bool {
        self.possible[block].contains(&value)
    }

    pub fn is_certain(&self, block: usize, value: u8) -> bool {
        self.possible[block].len() == 1 && self.is_possible(block, value)
    }

    /// A read at a node has returned a value; `since`: the last write that was submitted before it.
    pub fn read(&mut self, node: u8, block: usize, value: u8, since: u8, began: impl Fn(u8) -> bool) {
        self.has_read = true;
        if self.is_possible(block, value) {
            self.decide(node, block, value, since, began);
        } else {
            self.break_it(Invariant::Reads);
        }
    }

    /// By block, what a flush that is submitted now must replace on stable media.
    pub fn overwritten(&self) -> Vec<BTreeSet<u8>> {
        let gone = |block: usize| {
            let written = (1..).zip(&self.writes).filter(|(_, write)| write.block == block).map(|(value, _)| value);
            written.chain([0]).filter(|value| !self.is_possible(block, *value)).collect()
        };
        (0..self.possible.len()).map(gone).collect()
    }

    pub fn flushed(&mut self, overwritten: &[BTreeSet<u8>]) {
        self.flushed.iter_mut().zip(overwritten).for_each(|(flushed, more)| flushed.extend(more));
    }

    /// Whether a flush promised that stable media has something newer.
    pub fn is_flushed_away(&self, block: usize, value: u8) -> bool {
        self.flushed[block].contains(&value)
    }

    /// No member kept its caches: what was not flushed may be gone.
    pub fn lose(&mut self, block: usize, left: u8) {
        self.possible[block].insert(left);
    }

    pub fn acknowledged(&self) -> usize {
        self.writes.iter().filter(|write| write.fate == Fate::Acknowledged).count()
    }

    pub fn fenced(&self) -> usize {
        self.writes.iter().filter(|write| write.fate == Fate::Fenced).count()
    }

    pub fn has_flushed(&self) -> bool {
        self.flushed.iter().any(|overwritten| !overwritten.is_empty())
    }
}
