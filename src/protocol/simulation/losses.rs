//! What nodes without a copy were told: it is so, whatever the copies have lost since, or their devices end.
//!
//! Unlike a device beside a copy, theirs outlives the caches of all copies: nobody but the client can say that something is gone.

use super::cluster::Cluster;
use super::node::Slot;
use super::oracle::WriteId;
use crate::protocol::*;
use std::collections::BTreeMap;

/// What a node was told.
#[derive(Debug, Default)]
pub struct Told {
    /// What its device keeps for the next process.
    pub lost: Option<Stamp>,
    /// By block, the last write that is completed.
    completed: BTreeMap<u64, WriteId>,
    /// By its tag, what a flush that is not answered must put on stable media.
    flushes: BTreeMap<u32, Vec<(u64, WriteId)>>,
}

impl Told {
    /// A flush is submitted.
    pub fn flush(&mut self, tag: u32) {
        let covered = self.completed.iter().map(|(block, write)| (*block, *write));
        self.flushes.insert(tag, covered.collect());
    }
}

impl Cluster {
    /// A request has ended well.
    pub fn guest_was_told(&mut self, guest: usize, tag: Tag, slot: &Slot) -> Result<(), String> {
        let told = &mut self.guests[guest].told;
        if let Some(range) = slot.request.range().filter(|_| slot.request.is_mutation()) {
            told.completed.extend((range.start()..range.end()).map(|block| (block, slot.write)));
        }
        let Some(covered) = told.flushes.remove(&tag.0) else { return Ok(()) };
        self.oracle.flushed(&covered);
        self.floors().map_err(|error| format!("guest {guest} was told that all is flushed: {error}"))
    }

    /// The copies have lost what it had completed: its device ends, and the volume is published anew.
    pub fn lose_guest(&mut self, guest: usize) {
        self.note(|| format!("guest {guest} has lost writes"));
        self.guests[guest].depth = 0;
        self.tally.guest_losses += 1;
        if !self.healing && guest + 1 == self.guests.len() && guest < 50 {
            self.publish_without_copy();
        }
    }
}
