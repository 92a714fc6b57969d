//! Memory for blocks at an address that direct I/O takes, so that nothing is copied before it is written.
//!
//! Invariants: whoever takes memory fills all of it before anybody reads it, since what was in it before is still there; at
//! most [`KEPT`] large pieces are kept for their next use.

use crate::volume::{BLOCK_SIZE, MAX_REQUEST_BLOCKS};
use bytes::Bytes;
use std::sync::{Mutex, MutexGuard, PoisonError};

const BLOCK: usize = BLOCK_SIZE as usize;
/// Up to so many bytes a new piece costs little. A larger one is zeroed before it is filled, which is one more pass over a frame's
/// data, and what the allocator gives back to the system meanwhile costs page faults, too.
const SMALL: usize = 64 << 10;
/// Room for a request's data, and to align it.
const LARGE: usize = (MAX_REQUEST_BLOCKS as usize + 1) * BLOCK;
/// Large pieces that are kept: as many as two volumes write at a time at depth 16.
const KEPT: usize = 32;

static SPARE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

fn spare() -> MutexGuard<'static, Vec<Vec<u8>>> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
#[derive(Debug)]
pub struct Blocks {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Blocks {
    /// So many bytes, whatever they are.
    pub fn new(length: usize) -> Self {
        let is_large = length > SMALL && length + BLOCK <= LARGE;
        let memory = match length {
            0 => Vec::new(),
            _ if is_large => spare().pop().unwrap_or_else(|| vec![0; LARGE]),
            _ => vec![0; length + BLOCK],
        };
        let start = if length == 0 { 0 } else { memory.as_ptr().align_offset(BLOCK) };
        Self { memory, start, length }
    }

    /// How many.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }

    /// The bytes, shared from now on, at the same address.
    pub fn freeze(self) -> Bytes {
        if self.length == 0 { Bytes::new() } else { Bytes::from_owner(self) }
    }

    /// Whether direct I/O takes bytes at this address.
    pub fn are_aligned(bytes: &[u8]) -> bool {
        (bytes.as_ptr() as usize).is_multiple_of(BLOCK)
    }
}

impl AsRef<[u8]> for Blocks {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        if self.memory.len() == LARGE {
            let mut spare = spare();
            if spare.len() < KEPT {
                spare.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_is_used_again_and_small_memory_and_none_are_fine() {
        for length in [0, BLOCK, SMALL, SMALL + BLOCK, LARGE - BLOCK, LARGE] {
            let mut blocks = Blocks::new(length);
            blocks.bytes_mut().fill(7);
            let shared = blocks.freeze();
            let other = shared.clone();
            drop(shared);
            assert!(other.len() == length && other.iter().all(|byte| *byte == 7));
            assert!(length == 0 || Blocks::are_aligned(&other));
        }
        let many: Vec<_> = (0..2 * KEPT).map(|_| Blocks::new(LARGE - BLOCK).freeze()).collect();
        drop(many);
        assert!((1..=KEPT).contains(&spare().len()));
    }
}
