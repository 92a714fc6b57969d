//! Frames on their way out to one peer.
//!
//! Invariants: never more than [`MAX_IN_FLIGHT`] bytes, those being written included; nothing is taken while there is no
//! connection, and what is left from the one before goes when the next one begins: the core says it again.

use super::packet::Encoded;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Bytes that wait for one peer's connection: 10 Gbit/s over a round trip of 10 ms is 12.5 MB, and a volume has 64
/// requests at a time anyway. What does not fit stays with whoever sends.
pub const MAX_IN_FLIGHT: usize = 16 << 20;

/// Bytes that are written together: beyond this nothing is gained, and a heartbeat would wait longer.
const BATCH: usize = 256 << 10;

/// Why a message was not taken; it is the caller's still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// As much as may wait is waiting. An event says when there is room.
    #[error("{MAX_IN_FLIGHT} bytes wait for the peer already")]
    Full,
    /// There is no connection; an event says when there is, and the core then says everything again.
    #[error("the peer is not connected")]
    Disconnected,
    /// Not a copy that was added.
    #[error("not a peer of this volume")]
    NoPeer,
    /// The message does not go with so many blocks.
    #[error("the message cannot carry that payload")]
    Payload,
}

#[derive(Default)]
struct State {
    open: bool,
    frames: VecDeque<Encoded>,
    /// Of the frames and of those that are being written.
    bytes: usize,
    /// Somebody was told that it is full, and waits to be told otherwise.
    refused: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    ready: Notify,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection begins.
    pub fn open(&self) {
        *self.state() = State { open: true, ..State::default() };
    }

    /// It has ended.
    pub fn close(&self) {
        *self.state() = State::default();
    }

    /// Takes a frame to be sent.
    pub fn push(&self, frame: Encoded) -> Result<(), SendError> {
        let mut state = self.state();
        if !state.open {
            return Err(SendError::Disconnected);
        }
        if state.bytes + frame.bytes() > MAX_IN_FLIGHT {
            state.refused = true;
            return Err(SendError::Full);
        }
        state.bytes += frame.bytes();
        state.frames.push_back(frame);
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// Bytes that wait or are being written.
    pub fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// The next frames to be written together; waits for one. Cancelling it loses nothing.
    pub async fn take(&self) -> Vec<Encoded> {
        loop {
            let batch = self.batch();
            if !batch.is_empty() {
                return batch;
            }
            self.ready.notified().await;
        }
    }

    fn batch(&self) -> Vec<Encoded> {
        let (mut state, mut batch, mut bytes) = (self.state(), Vec::new(), 0);
        while bytes < BATCH
            && let Some(frame) = state.frames.pop_front()
        {
            bytes += frame.bytes();
            batch.push(frame);
        }
        batch
    }

    /// So many bytes were written. Whether whoever was refused has to be told that there is room: half of it.
    pub fn written(&self, bytes: usize) -> bool {
        let mut state = self.state();
        state.bytes = state.bytes.saturating_sub(bytes);
        let room = state.refused && state.bytes <= MAX_IN_FLIGHT / 2;
        state.refused &= !room;
        room
    }
}
