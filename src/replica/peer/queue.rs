//! Frames on their way out to one peer, and who may write them to the connection.
//!
//! ```text
//!   push ─> frames ─┬─ flush: the engine's thread, what is little and is taken without waiting ─┬─> connection
//!                   └─ take: the connection's task, everything else ────────────────────────────┘
//! ```
//! Invariants: never more than [`MAX_IN_FLIGHT`] bytes, those being written included; nothing is taken while there is no
//! connection, and what is left from the one before goes when the next one begins: the core says it again. Whoever has the
//! turn to write gives it back with what the connection did not take: so bytes go out in order, and once.

use super::line::{Line, Taken};
use super::packet::Encoded;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Bytes that wait for one peer's connection: 10 Gbit/s over a round trip of 10 ms is 12.5 MB, and a volume has 64
/// requests at a time anyway. What does not fit stays with whoever sends.
pub const MAX_IN_FLIGHT: usize = 16 << 20;

/// Bytes that are written together: beyond this nothing is gained, and a heartbeat would wait longer.
const BATCH: usize = 256 << 10;

/// Bytes that the engine's thread writes itself, which saves the wake-up of another thread: encrypting more would hold up
/// other volumes for longer than that wake-up takes.
const LITTLE: usize = 64 << 10;

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
    /// The connection, if there is one.
    line: Option<Arc<Line>>,
    frames: VecDeque<Encoded>,
    /// Of the frames and of those that are being written.
    bytes: usize,
    /// Somebody was told that it is full, and waits to be told otherwise.
    refused: bool,
    /// Somebody writes.
    writing: bool,
    /// What the connection did not take at once; nothing, if it has only kept something inside.
    rest: Option<Vec<u8>>,
}

/// What is to be written next, by whoever has this.
pub(super) struct Batch {
    line: Arc<Line>,
    /// Of earlier frames.
    pub rest: Vec<u8>,
    pub frames: Vec<Encoded>,
}

impl State {
    fn has_room(&mut self, bytes: usize) -> Result<(), SendError> {
        if self.line.is_none() {
            return Err(SendError::Disconnected);
        }
        if self.bytes + bytes > MAX_IN_FLIGHT {
            self.refused = true;
            return Err(SendError::Full);
        }
        Ok(())
    }

    /// The turn to write, if nobody has it.
    fn begin(&mut self) -> Option<Arc<Line>> {
        let line = self.line.as_ref().filter(|_| !self.writing)?.clone();
        self.writing = true;
        Some(line)
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    ready: Notify,
}

/// A connection that ends when this is dropped.
pub(super) struct Open<'a>(&'a Queue);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let before = std::mem::take(&mut *self.0.state());
        if let Some(line) = before.line {
            line.close();
        }
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection begins.
    pub fn open(&self, line: Arc<Line>) -> Open<'_> {
        *self.state() = State { line: Some(line), ..State::default() };
        Open(self)
    }

    /// The connection, if there is one.
    pub fn line(&self) -> Option<Arc<Line>> {
        self.state().line.clone()
    }

    /// Whether there is room for so many bytes; who is told that there is not hears when there is.
    pub fn has_room(&self, bytes: usize) -> Result<(), SendError> {
        self.state().has_room(bytes)
    }

    /// Takes a frame to be sent with the next [`Self::flush`].
    pub fn push(&self, frame: Encoded) -> Result<(), SendError> {
        let mut state = self.state();
        state.has_room(frame.bytes())?;
        state.bytes += frame.bytes();
        state.frames.push_back(frame);
        Ok(())
    }

    /// Writes what waits if it is little and the connection takes it; everything else is the connection's task's. Never waits.
    pub fn flush(&self) {
        let Some(mut batch) = self.little() else { return };
        let mut bytes = Vec::with_capacity(batch.frames.iter().map(Encoded::bytes).sum());
        for Encoded { head, data } in &batch.frames {
            bytes.extend_from_slice(head);
            bytes.extend_from_slice(data);
        }
        // An error shows again when the connection's task writes the rest.
        let taken = batch.line.write(&bytes).unwrap_or(Taken { bytes: 0, is_all: false });
        if !taken.is_all {
            bytes.drain(..taken.bytes);
            batch.rest = bytes;
        }
        self.give_back(batch, taken.bytes, !taken.is_all);
    }

    /// Everything, if it is little and nobody writes; who writes will look again.
    fn little(&self) -> Option<Batch> {
        let mut state = self.state();
        if state.frames.is_empty() {
            return None;
        }
        if state.bytes > LITTLE || state.rest.is_some() {
            self.ready.notify_one();
            return None;
        }
        let line = state.begin()?;
        let frames = state.frames.drain(..).collect();
        Some(Batch { line, rest: Vec::new(), frames })
    }

    /// So many bytes were written, and perhaps a rest was not. Whether whoever was refused has to be told that there is room:
    /// half of it.
    fn give_back(&self, batch: Batch, written: usize, has_rest: bool) -> bool {
        let mut state = self.state();
        if !state.line.as_ref().is_some_and(|line| Arc::ptr_eq(line, &batch.line)) {
            // Another connection has begun.
            return false;
        }
        state.bytes = state.bytes.saturating_sub(written);
        state.writing = false;
        state.rest = has_rest.then_some(batch.rest);
        if has_rest {
            self.ready.notify_one();
        }
        let room = state.refused && state.bytes <= MAX_IN_FLIGHT / 2;
        state.refused &= !room;
        room
    }

    /// Bytes that wait or are being written.
    pub fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// The next frames to be written together; waits for them and for the turn. Cancelling it loses nothing.
    pub async fn take(&self) -> Batch {
        loop {
            if let Some(batch) = self.batch() {
                return batch;
            }
            self.ready.notified().await;
        }
    }

    fn batch(&self) -> Option<Batch> {
        let mut state = self.state();
        if state.frames.is_empty() && state.rest.is_none() {
            return None;
        }
        let line = state.begin()?;
        let (rest, mut frames, mut bytes) = (state.rest.take().unwrap_or_default(), Vec::new(), 0);
        while bytes < BATCH
            && let Some(frame) = state.frames.pop_front()
        {
            bytes += frame.bytes();
            frames.push(frame);
        }
        Some(Batch { line, rest, frames })
    }

    /// A batch was written whole. Whether whoever was refused has to be told that there is room.
    pub fn written(&self, batch: Batch) -> bool {
        let bytes = batch.rest.len() + batch.frames.iter().map(Encoded::bytes).sum::<usize>();
        self.give_back(batch, bytes, false)
    }
}
