//! Operations that a store executes: whose they are, and where their data is.
//!
//! Invariants: an id is never used twice; a slot of the slab is used again, so that nothing is allocated per operation.

use super::commands::Copies;
use super::tree::TreeKey;
use super::volume::VolumeKey;
use super::{AsideError, ControlError};
use crate::protocol::OperationId;
use crate::replica::peer::Blocks;
use crate::store::Control;
use crate::volume::{VolumeId, VolumeSize};
use bytes::Bytes;
use tokio::sync::oneshot;

/// Bits of an id that are the place in the slab: a million operations at a time.
const PLACE_BITS: u32 = 20;

/// What happens when the operation is done.
pub(super) enum Purpose {
    /// A volume's core goes on. `memory` is the payload of the request's slot, or inside of what is kept.
    Core { volume: VolumeKey, operation: OperationId, memory: *mut u8, corrupt: bool, kept: Option<Box<Kept>> },
    /// A part of a piece that is copied or compared: `memory` is its place in the piece's.
    Part { volume: VolumeKey, operation: OperationId, memory: *mut u8, corrupt: bool },
    /// A copy of a mirrored volume may begin.
    FirstRecord(VolumeKey),
    /// Somebody writes into a volume that nobody serves: `data` is kept for as long as the disk reads it.
    Aside { data: Bytes, reply: oneshot::Sender<Result<(), AsideError>> },
    /// An operator gets an answer; a resize becomes visible before.
    Control { reply: oneshot::Sender<Result<Copies, ControlError>>, resized: Option<(VolumeId, VolumeSize)> },
    /// A device that is removed has its last flush.
    LastFlushOfDevice(VolumeKey),
    /// A tree that is closed has its last flush.
    LastFlushOfTree,
}

/// What an operation needs that has no slot: only volumes with copies elsewhere have such.
pub(super) enum Kept {
    /// The bytes that another copy has sent: `memory` is theirs.
    Frame(#[allow(dead_code, reason = "kept for as long as the disk reads them")] Bytes),
    /// Where blocks for another copy are read to.
    Read(Blocks),
    /// A seal, which is tried again when the store is busy.
    Seal(Control),
}

impl Purpose {
    /// One operation for a volume's core.
    pub fn core(volume: VolumeKey, operation: OperationId, memory: *mut u8, kept: Option<Box<Kept>>) -> Self {
        Self::Core { volume, operation, memory, corrupt: false, kept }
    }
}

pub(super) struct Operation {
    id: OperationId,
    pub tree: TreeKey,
    pub purpose: Purpose,
}

#[derive(Default)]
pub(super) struct Operations {
    slab: Vec<Option<Operation>>,
    free: Vec<u32>,
    next: u64,
}

fn place(id: OperationId) -> usize {
    (id.0 & ((1 << PLACE_BITS) - 1)) as usize
}

impl Operations {
    pub fn add(&mut self, tree: TreeKey, purpose: Purpose) -> OperationId {
        let place = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            self.slab.len() as u32 - 1
        });
        assert!(place < 1 << PLACE_BITS, "a million operations at a time");
        self.next += 1;
        let id = OperationId((self.next << PLACE_BITS) | u64::from(place));
        self.slab[place as usize] = Some(Operation { id, tree, purpose });
        id
    }

    pub fn get(&mut self, id: OperationId) -> Option<&mut Operation> {
        self.slab.get_mut(place(id))?.as_mut().filter(|operation| operation.id == id)
    }

    pub fn remove(&mut self, id: OperationId) -> Option<Operation> {
        self.get(id)?;
        self.free.push(place(id) as u32);
        self.slab[place(id)].take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_id_finds_nothing() {
        let mut operations = Operations::default();
        let first = operations.add(TreeKey(1), Purpose::LastFlushOfTree);
        assert!(operations.remove(first).is_some());
        let second = operations.add(TreeKey(1), Purpose::LastFlushOfTree);
        assert_eq!(place(first), place(second));
        assert!(operations.get(first).is_none() && operations.remove(first).is_none());
        assert!(operations.get(second).is_some());
    }
}
