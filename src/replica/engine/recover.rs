//! What a killed engine left: takes the devices over, repeats answers, executes again what was not answered.
//!
//! # Invariants
//! * A filled slot of a known volume is never discarded: its volume waits (parked) until its tree is open. Only a device of a
//!   volume that has no copy here, or others elsewhere, can be given up while it waits: then it is never served again, and no
//!   engine executes what it was asked.
//! * What a disk may still read from or write into for the killed engine is used again only when that disk was drained, also by
//!   later engines.
//! * A done slot's answer is repeated (the kernel says ENOENT if it had it) and the request is not executed again.
//! * Filled slots are executed in their first order of arrival, before anything new is read.

use super::requests::{slot_of, write_reply};
use super::tree::TreeKey;
use super::turn::{Arena, Engine};
use super::volume::VolumeKey;
use crate::protocol::Tag;
use crate::replica::device::FuseLoop;
use crate::replica::device::loop_device::LoopDevice;
use crate::replica::device::slots::{Slot, SlotState, Slots};
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::Ordering::Relaxed;

/// A device that a killed engine served and this one does not yet.
pub(super) struct Parked {
    pub tree: InstanceId,
    pub fuse: FuseLoop,
    pub device: Option<LoopDevice>,
    /// `tree` is a publication: the volume has no copy here.
    pub without_copy: bool,
    /// Its connection was ended for whoever takes it away.
    pub given_up: bool,
}

/// Sorts the arena of a killed engine: slots of volumes whose devices the holder keeps stay as they are, also if this engine
/// cannot take the device over, and so do those that a disk may still use; others are free. Also the first sequence number that
/// no slot has.
pub(super) fn sort_arena(slots: Slots, held: &BTreeSet<VolumeId>, parked: &[Parked]) -> (Arena, u64) {
    let mut sequence = 0;
    let mut free = vec![];
    for index in (0..slots.count()).rev() {
        let slot = slots.slot(index);
        if let SlotState::Resting(_) = slot.state() {
            continue;
        }
        if slot.state() != SlotState::Free {
            if held.contains(&slot.volume()) {
                sequence = sequence.max(slot.sequence());
                continue;
            }
            tracing::warn!(volume = %slot.volume(), "a request of a volume that no device of this node belongs to is dropped");
            slot.free();
        }
        free.push(index);
    }
    let own = parked.iter().flat_map(|p| (0..p.fuse.slots.count()).map(|index| p.fuse.slots.slot(index).sequence()));
    let sequence = own.fold(sequence, u64::max);
    (Arena { slots, free }, sequence + 1)
}

impl Arena {
    /// Nothing of this volume is executed any more: its slots rest until the disk of its tree was drained; if that never comes,
    /// for as long as the machine runs. They are at most as many as its device had when its engine was killed, and devices
    /// go on by their own slots if none is left.
    fn give_up(&mut self, volume: VolumeId, tree: InstanceId) {
        let all = (0..self.slots.count()).map(|index| self.slots.slot(index));
        let own =
            |slot: &Slot<'_>| matches!(slot.state(), SlotState::Filled | SlotState::Done(_)) && slot.volume() == volume;
        all.filter(own).for_each(|slot| slot.rest(tree));
    }

    /// Nothing is under way any more that a killed engine asked of the disk of this tree.
    pub fn drained(&mut self, tree: InstanceId) {
        for index in 0..self.slots.count() {
            let slot = self.slots.slot(index);
            if slot.state() == SlotState::Resting(tree) {
                slot.free();
                self.free.push(index);
            }
        }
    }
}

impl Engine {
    /// Goes on with every parked device whose tree is open. Returns those that still wait.
    pub fn revive(&mut self) -> Vec<VolumeId> {
        for parked in std::mem::take(&mut self.parked) {
            self.revive_one(parked);
        }
        self.note_failures_heard();
        self.parked.iter().map(|p| p.fuse.volume).collect()
    }

    /// Devices of a tree that an fdatasync failed before this engine was started have ended, but for those that wait for the
    /// core of their copy, which knows by its record.
    fn note_failures_heard(&self) {
        if self.has_loose_device {
            // Its tree is not known for sure; of another one's devices some are ended for nothing.
            return;
        }
        for tree in self.trees.iter().flatten().filter(|tree| tree.store.has_unheard_failure()) {
            let waits = |parked: &Parked| parked.tree == tree.id && tree.store.mirrored(parked.fuse.volume).is_none();
            if tree.store.failure().is_none() && !self.parked.iter().any(waits) {
                tree.store.failure_heard();
            }
        }
    }

    /// Goes on with the device of a copy whose core has just begun, also before [`EngineHandle::reattach`]: what outlived the
    /// former engine comes before any other input, else the core would not know what another primary has overtaken.
    ///
    /// [`EngineHandle::reattach`]: super::EngineHandle::reattach
    pub fn revive_device_of(&mut self, volume: VolumeId) {
        if let Some(at) = self.parked.iter().position(|parked| parked.fuse.volume == volume) {
            let parked = self.parked.remove(at);
            self.revive_one(parked);
        }
    }

    fn revive_one(&mut self, parked: Parked) {
        let volume = parked.fuse.volume;
        if parked.given_up {
            return self.parked.push(parked);
        }
        if self.publication_of(volume) == Some(parked.tree) {
            return self.serve_again(TreeKey::NONE, parked);
        }
        let Some(tree) = self.tree_of(parked.tree) else { return self.parked.push(parked) };
        let known = self.tree_mut(tree).is_some_and(|t| t.store.volumes().iter().any(|info| info.volume == volume));
        if !known {
            tracing::error!(%volume, tree = %parked.tree, "its device waits, but its copy does not know it");
            return self.parked.push(parked);
        }
        if self.waits_for_core(tree, volume) {
            // Executed by a core of its own it would change this copy alone.
            tracing::info!(%volume, "its device waits for its copy to be opened");
            return self.parked.push(parked);
        }
        self.serve_again(tree, parked);
    }

    fn serve_again(&mut self, tree: TreeKey, parked: Parked) {
        let volume = parked.fuse.volume;
        match self.add_device(tree, parked.fuse, parked.device) {
            Ok(key) => {
                self.end_if_writes_are_lost(tree, key);
                self.replay(key);
            }
            // The device is gone from here; the holder keeps it, and the next engine tries again.
            Err(error) => {
                self.has_loose_device = true;
                tracing::error!(%volume, %error, "its device cannot be served");
            }
        }
    }

    /// An fdatasync failed, and nobody has said so to the device or can: the next one would be told that all is well. Of a volume
    /// with several copies another one may have everything; its core ends the device if none has.
    fn end_if_writes_are_lost(&mut self, tree: TreeKey, key: VolumeKey) {
        let unheard = self.tree_mut(tree).is_some_and(|tree| tree.store.has_unheard_failure());
        if unheard && self.volume_mut(key).is_some_and(|volume| volume.mirror.is_none() && volume.remote.is_none()) {
            self.end_device(
                key,
                "the disk failed to make written data durable before the engine was started, so writes that were completed may \
                 be lost",
            );
        }
    }

    /// Whoever waits for a device that a killed engine left gets an error; of a volume that has a copy here only if it has
    /// `others`. `false`: nothing of that kind is there.
    pub fn give_up(&mut self, volume: VolumeId, others: bool) -> io::Result<bool> {
        let may = |left: &Parked| left.without_copy || left.given_up || others;
        let left = self.parked.iter_mut().find(|left| left.fuse.volume == volume);
        let Some(left) = left.filter(|left| may(left)) else { return Ok(false) };
        left.fuse.abort()?;
        left.given_up = true;
        let own = (0..left.fuse.slots.count()).map(|index| left.fuse.slots.slot(index));
        own.for_each(|slot| slot.free());
        let (tree, without_copy) = (left.tree, left.without_copy);
        // A tree that is open was drained; and without a copy no disk was asked.
        let is_drained = without_copy || self.tree_of(tree).is_some();
        self.arena.give_up(volume, tree);
        if is_drained {
            self.arena.drained(tree);
        }
        self.ready.extend(std::mem::take(&mut self.starving));
        Ok(true)
    }

    /// The loop device of what was given up is gone.
    pub fn forget_given_up(&mut self, volume: VolumeId) {
        self.parked.retain(|left| left.fuse.volume != volume || !left.given_up);
    }

    /// Ends what a killed engine began on this volume.
    fn replay(&mut self, key: VolumeKey) {
        let mut filled = vec![];
        let shared = self.arena.slots.count();
        let Some(volume) = self.volumes[key.0 as usize].as_deref_mut() else { return };
        let id = volume.id;
        let Some(device) = volume.device.as_mut() else { return };
        let tags = (0..shared + device.fuse.slots.count()).map(Tag);
        let mut repeated = vec![];
        for tag in tags {
            let Some(slot) = slot_of(&self.arena, device, tag) else { continue };
            if slot.volume() != id {
                continue;
            }
            match slot.state() {
                SlotState::Done(result) => {
                    if let Ok(message) = slot.message() {
                        write_reply(device, slot, &message.completion(result));
                    }
                    repeated.push(tag);
                }
                SlotState::Filled => filled.push((slot.sequence(), tag)),
                SlotState::Free | SlotState::Resting(_) => {}
            }
        }
        for tag in repeated.iter().chain(filled.iter().map(|(_, tag)| tag)) {
            match tag.0.checked_sub(shared) {
                None => device.arena_used += 1,
                Some(index) => device.own_free.retain(|free| *free != index),
            }
        }
        let count = (repeated.len() + filled.len()) as u64;
        device.statistics.recovered.fetch_add(count, Relaxed);
        self.statistics.recovered.fetch_add(count, Relaxed);
        for tag in repeated {
            self.free(key, tag);
        }
        filled.sort_unstable();
        if count > 0 {
            tracing::info!(volume = %id, requests = count, "requests that a killed engine left are finished");
        }
        for (_, tag) in filled {
            self.admit(key, tag);
            self.pump();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// What the kernel writes: a request with this number.
    fn fill(slot: Slot<'_>, volume: VolumeId) {
        slot.prepare(volume, 1);
        let (buffer, length) = slot.request_buffer();
        let mut request = [0; 64];
        request[8..16].copy_from_slice(&7_u64.to_ne_bytes());
        assert!(request.len() < length);
        // SAFETY: the slot's own memory, which is longer, by the line above.
        #[allow(unsafe_code, reason = "the kernel's part")]
        unsafe {
            std::ptr::copy_nonoverlapping(request.as_ptr(), buffer, request.len());
        }
    }

    #[test]
    fn a_slot_that_a_disk_may_still_use_is_taken_under_the_next_engines_too_until_it_was_drained() {
        let [volume, neighbour] = [1, 2].map(|byte| VolumeId::from_bytes([byte; 16]));
        let [tree, other] = [3, 4].map(|byte| InstanceId::from_bytes([byte; 16]));
        let (slots, memory) = Slots::create("tandem-test", 3).expect("slots");
        fill(slots.slot(0), volume);
        fill(slots.slot(1), neighbour);
        let (mut arena, _) = sort_arena(slots, &[volume, neighbour].into(), &[]);
        arena.give_up(volume, tree);
        assert_eq!(arena.free, [2]);
        drop(arena);

        let slots = Slots::map(memory.as_fd()).expect("the same slots");
        let (mut arena, _) = sort_arena(slots, &[neighbour].into(), &[]);
        assert_eq!((arena.free.as_slice(), arena.slots.slot(0).state()), ([2].as_slice(), SlotState::Resting(tree)));
        arena.drained(other);
        assert_eq!(arena.free, [2], "the disk of another one");
        arena.drained(tree);
        assert_eq!(arena.free, [2, 0]);
        assert_eq!(arena.slots.slot(1).state(), SlotState::Filled);
    }
}
