//! The map log: changes of the tree since a checkpoint, appended in commits that are replayed whole or not at all.
//!
//! A log is a file of 4096-byte blocks; block `n` of the file has sequence `n`. Layout of a block:
//! ```text
//!   0 prefix (see format.rs)   48 epoch (8)   56 sequence (8)   64 durable (8)   72 chain (4)   76 bytes of records (2)
//!   78 flags (2): 1 = last of its commit   80 records, none spans blocks, rest zero
//! ```
//! # Invariants
//! * `chain` is the checksum of the block before, over the border of logs too: what a torn append left behind never looks
//!   like the continuation of what was written over its beginning.
//! * `durable` is how many blocks of the epoch were on stable media when this block was made. So a bad block is the torn
//!   end of the log, unless a later block says that it once was durable: then it is damage, and not silently the end.
//! * The last commit of an epoch is durable before the first one of the next is written.

#[cfg(test)]
pub(super) mod tests;

use super::format::{
    BLOCK, HeaderError, Input, Kind, Output, PREFIX, check_instance, check_prefix, seal, stored_checksum, write_prefix,
};
use super::record::{EXTENT_BYTES, MAX_RECORD, Record, RecordError};
use crate::volume::InstanceId;

const KIND: Kind = Kind { magic: *b"TandemLG", version: 1, incompatible: 0 };

/// Bytes before the records of a block.
const HEADER: usize = 80;

/// Changes of a map that a block has room for: a tag, a layer and an extent each.
pub(super) const BLOCK_CHANGES: u64 = ((BLOCK - HEADER) / (1 + 4 + EXTENT_BYTES)) as u64;

/// Flag of the last block of a commit.
const LAST: u16 = 1;

/// A place in the logs, and what stands before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Generation of the checkpoint that the log follows.
    pub epoch: u64,
    /// Number of the block in the log.
    pub sequence: u64,
    /// Checksum of the block before.
    pub chain: u32,
}

impl Position {
    /// The beginning of the log that continues this one.
    pub fn next_epoch(self) -> Self {
        Self { epoch: self.epoch + 1, sequence: 0, chain: self.chain }
    }

    /// Offset in the log file in bytes.
    pub fn offset(self) -> u64 {
        self.sequence * BLOCK as u64
    }
}

/// Why a log cannot be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// A sound block that this Tandem cannot use, or of another tree.
    #[error("map log block {sequence}: {error}")]
    Header {
        /// Which block.
        sequence: u64,
        /// Why.
        error: HeaderError,
    },
    /// A block was on stable media and is not there any more.
    #[error("map log block {sequence} of epoch {epoch} is damaged: block {witness} shows that it was complete")]
    Damaged {
        /// The log.
        epoch: u64,
        /// The bad block.
        sequence: u64,
        /// A later block that was written when the bad one was durable.
        witness: u64,
    },
    /// This log continues another one whose end is missing.
    #[error("the map log of epoch {epoch} continues a longer log than there is: the end of the one before is damaged")]
    Gap {
        /// The log that continues.
        epoch: u64,
    },
    /// The checksum of a block is right and a record in it is not.
    #[error("map log block {sequence}: {error}")]
    Record {
        /// Which block.
        sequence: u64,
        /// What is wrong.
        error: RecordError,
    },
}

/// The commit has no room for another record: finish it and begin the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the commit is full")]
pub struct CommitFull;

/// Makes the blocks of commits, one commit at a time.
#[derive(Debug)]
pub struct Writer {
    instance: InstanceId,
    position: Position,
    durable: u64,
    memory: Box<[u8]>,
    /// Where the aligned part of `memory` begins.
    skip: usize,
    /// Blocks of the commit that are finished.
    blocks: usize,
    /// Bytes of the current block that are used.
    used: usize,
}

impl Writer {
    /// A writer whose next block goes to `position`, with room for commits of `capacity` blocks.
    pub fn new(instance: InstanceId, position: Position, capacity: usize) -> Self {
        assert!(capacity > 0, "a commit has at least one block");
        let memory = vec![0; (capacity + 1) * BLOCK].into_boxed_slice();
        let skip = memory.as_ptr().align_offset(BLOCK);
        Self { instance, position, durable: 0, memory, skip, blocks: 0, used: HEADER }
    }

    /// Where the next block goes.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Continues at the beginning of the other log. No commit may be open.
    pub fn begin_epoch(&mut self) {
        assert!(self.blocks == 0 && self.used == HEADER, "a commit is open");
        self.position = self.position.next_epoch();
    }

    /// Begins a commit. `durable` blocks of this epoch are on stable media now. The memory that [`Self::finish`] returned
    /// before is used again.
    pub fn begin(&mut self, durable: u64) {
        assert!(durable <= self.position.sequence, "what is not written is not durable");
        self.durable = durable;
        self.blocks = 0;
        self.used = HEADER;
    }

    /// Appends a record to the commit.
    pub fn push(&mut self, record: &Record) -> Result<(), CommitFull> {
        let mut bytes = [0; MAX_RECORD];
        let length = record.encode(&mut bytes);
        if self.used + length > BLOCK {
            if (self.blocks + 2) * BLOCK + self.skip > self.memory.len() {
                return Err(CommitFull);
            }
            self.finish_block(0);
        }
        let at = self.skip + self.blocks * BLOCK + self.used;
        self.memory[at..at + length].copy_from_slice(&bytes[..length]);
        self.used += length;
        Ok(())
    }

    /// Ends the commit; returns where it goes and its blocks, aligned to 4096 bytes and unchanged until [`Self::begin`].
    pub fn finish(&mut self) -> (Position, &[u8]) {
        let blocks = self.blocks;
        self.finish_block(LAST);
        let mut position = self.position;
        position.sequence -= blocks as u64 + 1;
        let length = self.blocks * BLOCK;
        self.blocks = 0;
        (position, &self.memory[self.skip..self.skip + length])
    }

    fn finish_block(&mut self, flags: u16) {
        let start = self.skip + self.blocks * BLOCK;
        let block = &mut self.memory[start..start + BLOCK];
        block[self.used..].fill(0);
        write_prefix(block, &KIND, self.instance);
        let mut out = Output { bytes: block, at: PREFIX };
        out.u64(self.position.epoch);
        out.u64(self.position.sequence);
        out.u64(self.durable);
        out.u32(self.position.chain);
        out.u16((self.used - HEADER) as u16);
        out.u16(flags);
        self.position.chain = seal(block);
        self.position.sequence += 1;
        self.blocks += 1;
        self.used = HEADER;
    }
}

/// Replays a log.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    file: &'a [u8],
    instance: InstanceId,
    position: Position,
}

/// One commit: a change of the tree that happened as a whole.
#[derive(Clone, Copy, Debug)]
pub struct Commit<'a> {
    blocks: &'a [u8],
    sequence: u64,
}

/// A block of a log whose checksum is right.
struct Block {
    epoch: u64,
    sequence: u64,
    durable: u64,
    chain: u32,
    is_last: bool,
}

/// Which epoch a log is of: that of its first block, if that is sound. `None` for a log that was never written, or whose
/// first append was torn.
pub fn epoch_of(file: &[u8], instance: InstanceId) -> Result<Option<u64>, LogError> {
    Ok(block_at(file, 0, instance)?.filter(|block| block.sequence == 0).map(|block| block.epoch))
}

impl<'a> Reader<'a> {
    /// Replays the bytes of a log file from `position` on: that of a checkpoint, or the [`Position::next_epoch`] of the end
    /// of the log before.
    pub fn new(file: &'a [u8], instance: InstanceId, position: Position) -> Self {
        Self { file, instance, position }
    }

    /// After the last commit that was returned: where a [`Writer`] continues.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The next complete commit; `None` at the end of the log.
    pub fn next_commit(&mut self) -> Result<Option<Commit<'a>>, LogError> {
        if let Some((commit, end)) = self.commit_at(self.position)? {
            self.position = end;
            return Ok(Some(commit));
        }
        self.check_end()?;
        Ok(None)
    }

    fn commit_at(&self, start: Position) -> Result<Option<(Commit<'a>, Position)>, LogError> {
        let mut position = start;
        while let Some(block) = block_at(self.file, position.sequence, self.instance)? {
            if (block.epoch, block.sequence, block.chain) != (position.epoch, position.sequence, position.chain) {
                return Ok(None);
            }
            let bytes = bytes_at(self.file, position.sequence).unwrap_or_default();
            position = Position { chain: stored_checksum(bytes), sequence: position.sequence + 1, ..position };
            if block.is_last {
                let blocks = &self.file[start.sequence as usize * BLOCK..position.sequence as usize * BLOCK];
                return Ok(Some((Commit { blocks, sequence: start.sequence }, position)));
            }
        }
        Ok(None)
    }

    /// Whether the log may end here: nothing later says that there was more.
    fn check_end(&self) -> Result<(), LogError> {
        let Position { epoch, sequence, .. } = self.position;
        if sequence == 0
            && let Some(first) = block_at(self.file, 0, self.instance)?.filter(|block| block.epoch == epoch)
            && first.sequence == 0
            && first.chain != self.position.chain
            && self.commit_at(Position { epoch, sequence, chain: first.chain })?.is_some()
        {
            return Err(LogError::Gap { epoch });
        }
        for later in sequence + 1..(self.file.len() / BLOCK) as u64 {
            // Blocks of older epochs and of garbage do not matter here.
            if let Ok(Some(block)) = block_at(self.file, later, self.instance)
                && (block.epoch, block.sequence) == (epoch, later)
                && block.durable > sequence
            {
                return Err(LogError::Damaged { epoch, sequence, witness: later });
            }
        }
        Ok(())
    }
}

impl<'a> Commit<'a> {
    /// The records in order. After an error there are no more.
    pub fn records(&self) -> impl Iterator<Item = Result<Record, LogError>> + 'a {
        let blocks = self.blocks.chunks_exact(BLOCK).zip(self.sequence..);
        blocks.flat_map(|(block, sequence)| {
            let length = Input { bytes: block, at: 76 }.u16().map_or(0, usize::from);
            let mut input = Input { bytes: block.get(..HEADER + length).unwrap_or(block), at: HEADER };
            std::iter::from_fn(move || {
                let tag = input.u8()?;
                let record = Record::decode(tag, &mut input);
                if record.is_err() {
                    input.at = BLOCK;
                }
                Some(record.map_err(|error| LogError::Record { sequence, error }))
            })
        })
    }
}

fn bytes_at(file: &[u8], sequence: u64) -> Option<&[u8]> {
    let start = usize::try_from(sequence).ok()?.checked_mul(BLOCK)?;
    file.get(start..)?.get(..BLOCK)
}

/// The block, `None` if it is not there or not sound. An error if it is sound and this Tandem must not ignore it.
fn block_at(file: &[u8], sequence: u64, instance: InstanceId) -> Result<Option<Block>, LogError> {
    let Some(bytes) = bytes_at(file, sequence) else { return Ok(None) };
    let refuse = |error| LogError::Header { sequence, error };
    let (found, mut fields) = match check_prefix(bytes, &KIND) {
        Ok(checked) => checked,
        Err(HeaderError::Magic { .. } | HeaderError::Checksum { .. }) => return Ok(None),
        Err(error) => return Err(refuse(error)),
    };
    check_instance(found, instance).map_err(refuse)?;
    let mut decode = || {
        let (epoch, sequence, durable) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (chain, length, flags) = (fields.u32()?, fields.u16()?, fields.u16()?);
        let block = Block { epoch, sequence, durable, chain, is_last: flags & LAST != 0 };
        (usize::from(length) <= BLOCK - HEADER && flags & !LAST == 0).then_some(block)
    };
    decode().map(Some).ok_or(refuse(HeaderError::Field("length or flags")))
}
