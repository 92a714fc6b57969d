//! Pieces of ranges that copies are made equal by: read for another copy, compared with what it has, written for it.
//!
//! # Invariants
//! * A piece is as many operations of the store as it has runs; the core hears of it once, when none of them runs any more.
//!   Their memory stays until then.
//! * What shall be written, or compared, and has come without its bytes, is refused: it is never taken for zeros.
#![allow(unsafe_code, reason = "operations point into frames and buffers")]

use super::operations::Purpose;
use super::turn::{Engine, Work};
use super::volume::VolumeKey;
use crate::crash::crash_point;
use crate::protocol::{BlockSet, DiskError, Input, Missing, OperationId, Piece, Request, SerialNumber};
use crate::replica::peer::{self, Attached, Blocks, DIGEST, Payload};
use crate::store::Action;
use crate::volume::{BLOCK_SIZE, BlockRange, InstanceId};
use bytes::Bytes;

/// A piece that the store works on.
pub(super) struct Parts {
    left: usize,
    result: Result<(), DiskError>,
    purpose: Whole,
}

/// What happens when all parts are done.
enum Whole {
    /// It is kept until the core does not need it any more.
    Read(Piece, Blocks),
    /// The answer is what differs from these digests.
    Compare(Blocks, Bytes),
    /// The bytes of a frame.
    Write(#[allow(dead_code, reason = "kept for as long as the disk reads them")] Bytes),
}

impl Engine {
    /// Reads what is to be copied.
    pub fn read_piece(&mut self, key: VolumeKey, operation: OperationId, piece: Piece) {
        let mut blocks = Blocks::new(piece.bytes() as usize);
        let memory = blocks.bytes_mut().as_mut_ptr();
        let reads = piece.runs().map(Request::Read).collect();
        self.begin_parts(key, operation, reads, memory, Whole::Read(piece, blocks));
    }

    /// Writes what another copy has sent; a piece without data is zeros.
    pub fn apply_piece(
        &mut self,
        key: VolumeKey,
        operation: OperationId,
        from: InstanceId,
        serial: SerialNumber,
        piece: Piece,
    ) {
        match self.brought(key, from, serial) {
            Some(payload) if payload == Payload::default() => {
                let zeros = piece.runs().map(Request::WriteZeroes).collect();
                self.begin_parts(key, operation, zeros, std::ptr::null_mut(), Whole::Write(Bytes::new()));
            }
            Some(payload) if payload.blocks() == piece.count() => {
                let data = super::outputs::aligned(payload);
                // Only read from: a write's buffer.
                let memory = data.as_ptr().cast_mut();
                self.begin_parts(key, operation, writes(piece, &data), memory, Whole::Write(data));
            }
            Some(_) | None => self.refuse_piece(key, operation, Whole::Write(Bytes::new())),
        }
    }

    /// Reads the range and compares it with what another copy has.
    pub fn compare(
        &mut self,
        key: VolumeKey,
        operation: OperationId,
        from: InstanceId,
        serial: SerialNumber,
        range: BlockRange,
    ) {
        let theirs = match self.brought(key, from, serial).as_ref().map(Payload::attached) {
            Some(Attached::Digests(theirs)) if theirs.len() == DIGEST * range.count() as usize => Some(theirs.clone()),
            _ => None,
        };
        let mut blocks = Blocks::new(range.bytes() as usize);
        let memory = blocks.bytes_mut().as_mut_ptr();
        match theirs {
            Some(theirs) => {
                self.begin_parts(key, operation, vec![Request::Read(range)], memory, Whole::Compare(blocks, theirs));
            }
            None => self.refuse_piece(key, operation, Whole::Compare(blocks, Bytes::new())),
        }
    }

    /// What came with a frame.
    fn brought(&mut self, key: VolumeKey, from: InstanceId, serial: SerialNumber) -> Option<Payload> {
        let volume = self.volume_mut(key)?;
        let stamp = volume.replica.record().configuration.stamp;
        volume.mirror.as_mut()?.brought.remove(&(from, stamp, serial))
    }

    /// Starts the operations of a piece, whose data lie one behind the other in `memory`.
    fn begin_parts(
        &mut self,
        key: VolumeKey,
        operation: OperationId,
        requests: Vec<Request>,
        memory: *mut u8,
        purpose: Whole,
    ) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        mirror.pieces.insert(operation, Parts { left: requests.len(), result: Ok(()), purpose });
        let mut at = 0;
        for request in requests {
            // SAFETY: the data of all parts together are as long as the memory, where there is any.
            let part = if memory.is_null() { memory } else { unsafe { memory.add(at) } };
            at += request.range().map_or(0, |range| range.bytes() as usize);
            self.start_in_store(key, Purpose::Part { volume: key, operation, memory: part, corrupt: false }, request);
        }
    }

    /// Ends a piece that was not begun, in its place among those that were.
    fn refuse_piece(&mut self, key: VolumeKey, operation: OperationId, purpose: Whole) {
        let Some(volume) = self.volume_mut(key) else { return };
        tracing::error!(volume = %volume.id, "a piece of a copied range came without its data");
        let Some(mirror) = volume.mirror.as_mut() else { return };
        mirror.pieces.insert(operation, Parts { left: 1, result: Ok(()), purpose });
        let part = Purpose::Part { volume: key, operation, memory: std::ptr::null_mut(), corrupt: false };
        let Some((id, volume)) = self.running_in_store(key, part) else { return };
        let tree = volume.tree;
        self.work.push_back(Work::Action(tree, Action::Done { operation: id, result: Err(DiskError::Corrupt) }));
    }

    /// The store has done a part of a piece.
    pub fn part_done(&mut self, key: VolumeKey, operation: OperationId, result: Result<(), DiskError>) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        let Some(parts) = mirror.pieces.get_mut(&operation) else { return };
        parts.left -= 1;
        parts.result = parts.result.and(result);
        if parts.left > 0 {
            return;
        }
        let Some(Parts { result, purpose, .. }) = mirror.pieces.remove(&operation) else { return };
        let input = match purpose {
            Whole::Read(piece, blocks) => {
                if let (Ok(()), Ok(payload)) = (result, Payload::new(blocks.freeze())) {
                    mirror.ranges.insert(operation, (piece, payload));
                    // Held here, and not at the other copy.
                    crash_point("mirror.range");
                }
                Input::Completed { operation, result }
            }
            Whole::Compare(blocks, theirs) => {
                let differs = result.map(|()| differing(&blocks.freeze(), &theirs));
                Input::Compared { operation, differs }
            }
            Whole::Write(_) => Input::Completed { operation, result },
        };
        self.step(key, input);
    }

    /// Tells the core what its plan has next.
    pub fn next_missing(&mut self, key: VolumeKey, operation: OperationId, planned: Result<(), DiskError>) {
        let Self { volumes, trees, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let Some(tree) = trees[volume.tree.0 as usize].as_mut() else { return };
        // Its copy here may be larger, and others may not.
        let end = volume.size.blocks();
        let missing = planned.and_then(|()| tree.store.next_missing(volume.id));
        let missing = missing.map(|missing| missing.and_then(|missing| missing.below(end)));
        let behind = |missing: Missing| end.saturating_sub(missing.range().end()) * BLOCK_SIZE;
        if let Some(mirror) = volume.mirror.as_mut() {
            mirror.behind_bytes = missing.ok().flatten().map_or(0, behind);
        }
        self.step(key, Input::Planned { operation, missing });
    }
}

/// A piece's data as requests: blocks that are zeros take no space.
fn writes(piece: Piece, data: &[u8]) -> Vec<Request> {
    let block = BLOCK_SIZE as usize;
    let (mut requests, mut rest) = (Vec::new(), data);
    for run in piece.runs() {
        let (these, behind) = rest.split_at(run.bytes() as usize);
        rest = behind;
        let mut start = run.start();
        for alike in these.chunks(block).map(peer::is_zero).collect::<Vec<_>>().chunk_by(PartialEq::eq) {
            if let Some(range) = BlockRange::new(start, alike.len() as u32) {
                requests.push(if alike[0] { Request::WriteZeroes(range) } else { Request::Write(range) });
            }
            start += alike.len() as u64;
        }
    }
    requests
}

/// Which blocks have another digest.
fn differing(data: &[u8], theirs: &[u8]) -> BlockSet {
    let mut differs = BlockSet::default();
    let ours = peer::digests(data);
    for (block, (ours, theirs)) in (0..).zip(ours.chunks(DIGEST).zip(theirs.chunks(DIGEST))) {
        if ours != theirs {
            differs.insert(block, 1);
        }
    }
    differs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u32) -> BlockRange {
        BlockRange::new(start, count).expect("not empty")
    }

    #[test]
    fn zeros_of_a_piece_are_written_without_data() {
        let mut blocks = BlockSet::default();
        blocks.insert(1, 3);
        blocks.insert(9, 1);
        let piece = Piece::new(range(100, 10), blocks).expect("four blocks");
        let block = BLOCK_SIZE as usize;
        let data = [vec![1; block], vec![0; 2 * block], vec![0; block]].concat();
        let expected =
            [Request::Write(range(101, 1)), Request::WriteZeroes(range(102, 2)), Request::WriteZeroes(range(109, 1))];
        assert_eq!(writes(piece, &data), expected);
    }

    #[test]
    fn a_changed_byte_is_another_block() {
        let block = BLOCK_SIZE as usize;
        let ours = [vec![7; block], vec![0; block], vec![9; block]].concat();
        let mut theirs = ours.clone();
        assert!(differing(&ours, &peer::digests(&theirs)).is_empty());
        theirs[2 * block - 1] = 1;
        theirs[2 * block] ^= 0x80;
        assert_eq!(differing(&ours, &peer::digests(&theirs)).blocks().collect::<Vec<_>>(), [1, 2]);
    }
}
