//! What is allocated in a snapshot, or differs between two, as messages.
//!
//! Invariants: a message has at most so many extents, and there is always one; a reader that left ends the work.

use super::manager::ExtentStream;
use crate::rpc::control as rpc;
use crate::volume::BLOCK_SIZE;
use tokio::sync::mpsc;
use tonic::Status;

/// Extents per message: 16 bytes each, well below the 4 MiB that clients accept.
const EXTENTS_PER_MESSAGE: usize = 4096;

/// Sends the extents that end after `start`. Blocking; stops when nobody reads any more.
pub fn send(stream: &ExtentStream, start: u64, messages: &mpsc::Sender<Result<rpc::GetExtentsResponse, Status>>) {
    let size_bytes = stream.size_bytes;
    let mut extents = Vec::with_capacity(EXTENTS_PER_MESSAGE);
    for run in stream.plan.clone().starting_at(start / BLOCK_SIZE) {
        let offset = (run.start * BLOCK_SIZE).max(start);
        let end = (run.start + run.count) * BLOCK_SIZE;
        extents.push(rpc::Extent { offset, length: end - offset });
        if extents.len() == EXTENTS_PER_MESSAGE {
            let full = std::mem::take(&mut extents);
            if messages.blocking_send(Ok(rpc::GetExtentsResponse { size_bytes, extents: full })).is_err() {
                return;
            }
        }
    }
    // Always a last message, so that the size is known even if nothing is allocated. A reader that left needs none.
    let _ = messages.blocking_send(Ok(rpc::GetExtentsResponse { size_bytes, extents }));
}
