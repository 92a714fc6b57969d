//! Digests of what a snapshot reads as, so that the copies of a volume can be compared without moving them.
//!
//! # Invariants
//! * A digest is of the bytes that a reader would get: copies whose layers differ and whose contents do not have the same ones.
//! * SHA-256: two contents with one digest do not occur, whoever writes the volume.
//! * In memory are one piece and what one message holds; what is read is limited to a rate, since applications read there, too.

use super::manager::{Manager, SnapshotFailure};
use crate::memory::Memory;
use crate::protocol::EXTENT_BLOCKS;
use crate::rpc::control::DigestSnapshotResponse;
use crate::store::map::Entry;
use crate::store::{Directory, Files, Name, ReadPlan};
use crate::volume::{BLOCK_SIZE, MAX_REQUEST_BLOCKS, SnapshotId};
use ring::digest::{Context, SHA256};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tonic::Status;

/// Digests of one message: often enough for a progress bar.
const MESSAGE_DIGESTS: usize = 16;

/// Digests that are ready to be made without the snapshot's owner.
pub struct DigestJob {
    snapshot: SnapshotId,
    path: PathBuf,
    plan: ReadPlan,
    blocks: u64,
    bytes_per_second: u64,
}

/// Takes the plan from the owner of the snapshot, for its first `bytes` (what is past its end reads as zeros).
pub async fn prepare(
    manager: &Manager,
    snapshot: SnapshotId,
    bytes: u64,
    bytes_per_second: u64,
) -> Result<DigestJob, SnapshotFailure> {
    let (path, plan) = manager.reader(snapshot).await?;
    Ok(DigestJob { snapshot, path, plan, blocks: bytes / BLOCK_SIZE, bytes_per_second })
}

/// Sleeps so that no more is read than shall be.
struct Pace {
    began: Instant,
    bytes: u64,
    bytes_per_second: u64,
}

impl Pace {
    /// So many bytes more were read.
    fn read(&mut self, bytes: u64) {
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bytes_per_second as f64);
        std::thread::sleep(due.saturating_sub(self.began.elapsed()));
    }
}

impl DigestJob {
    /// Reads, and sends one digest for each extent in order. Blocking.
    pub fn run(self, send: &mpsc::Sender<Result<DigestSnapshotResponse, Status>>) {
        if let Err(error) = self.walk(send) {
            let text = format!("snapshot {} cannot be read: {error}", self.snapshot);
            // Whoever has gone away reads no result.
            let _ = send.blocking_send(Err(Status::unavailable(text)));
        }
    }

    fn walk(&self, send: &mpsc::Sender<Result<DigestSnapshotResponse, Status>>) -> io::Result<()> {
        let files = Directory::new(&self.path);
        let mut memory = Memory::zeros(MAX_REQUEST_BLOCKS as usize * BLOCK_SIZE as usize)?;
        let mut pace = Pace { began: Instant::now(), bytes: 0, bytes_per_second: self.bytes_per_second.max(1) };
        let (mut block, mut digests) = (0, Vec::new());
        while block < self.blocks && !send.is_closed() {
            let end = (block + EXTENT_BLOCKS).min(self.blocks);
            digests.push(self.digest(&files, &mut memory, block..end, &mut pace)?);
            block = end;
            if digests.len() == MESSAGE_DIGESTS || block == self.blocks {
                let message = DigestSnapshotResponse { digests: std::mem::take(&mut digests) };
                if send.blocking_send(Ok(message)).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Of these blocks; empty if all of them are zeros.
    fn digest(
        &self,
        files: &dyn Files,
        memory: &mut Memory,
        blocks: Range<u64>,
        pace: &mut Pace,
    ) -> io::Result<Vec<u8>> {
        // Most of a large volume was never written: that costs no arithmetic.
        if self.is_hole(&blocks) {
            return Ok(Vec::new());
        }
        let (mut context, mut is_zero) = (Context::new(&SHA256), true);
        let mut next = blocks.start;
        while next < blocks.end {
            let (entry, count) = self.run_at(next, blocks.end);
            let bytes = &mut memory.bytes_mut()[..count as usize * BLOCK_SIZE as usize];
            match entry {
                Entry::Data(physical) => {
                    files.read_at(Name::Data, u64::from(physical.0) * BLOCK_SIZE, bytes)?;
                    pace.read(bytes.len() as u64);
                    is_zero &= bytes.iter().all(|byte| *byte == 0);
                }
                Entry::Zero | Entry::Absent => bytes.fill(0),
            }
            context.update(bytes);
            next += u64::from(count);
        }
        Ok(if is_zero { Vec::new() } else { context.finish().as_ref().to_vec() })
    }

    fn is_hole(&self, blocks: &Range<u64>) -> bool {
        let mut next = blocks.start;
        while next < blocks.end {
            match self.run_at(next, blocks.end) {
                (Entry::Data(_), _) => return false,
                (Entry::Zero | Entry::Absent, count) => next += u64::from(count),
            }
        }
        true
    }

    /// What is at a block, and for how many blocks that goes on, at most one piece.
    fn run_at(&self, block: u64, end: u64) -> (Entry, u32) {
        let limit = u32::try_from(end - block).unwrap_or(u32::MAX).min(MAX_REQUEST_BLOCKS);
        match self.plan.blocks() {
            size if block >= size => (Entry::Absent, limit),
            size => self.plan.run(block, limit.min(u32::try_from(size - block).unwrap_or(u32::MAX))),
        }
    }
}
