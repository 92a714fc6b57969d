//! The acknowledged changes of the map that no log has yet, in shared memory that survives the process.
//!
//! Invariants: a change is in here before its request is answered; a half is emptied only when its commit is durable; what
//! counts is what the length says, and the length grows (release) only after the bytes, since the process may be killed
//! between any two instructions. A power cut takes all of it, which is what "not flushed" means. What an fdatasync that failed
//! may have lost is remembered for as long as the memory is there.
//! ```text
//!   page 0: magic, version, instance, epoch of the log, fdatasyncs that failed, of these: those that devices know of;
//!           per half: length, epoch and sequence of its commit (0: none yet)
//!   half A: records, each behind its length     half B: the same
//! ```
//! One half fills while the other is committed.

use super::format::Input;
use super::log::Position;
use super::record::{MAX_RECORD, Record};
use crate::memory::Memory;
use crate::volume::InstanceId;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

/// Bytes of the region: some 10,000 changes in each half, a tenth of a second of the fastest first writes; more would make
/// commits longer, not fewer. Pages that are never touched cost nothing.
pub const PENDING_BYTES: usize = HEADER + 2 * 256 * 1024;

/// Room that only control operations may use, so that a seal never waits for a commit: some 100 of them.
pub(super) const CONTROL_RESERVE: usize = 8192;

const MAGIC: u64 = u64::from_le_bytes(*b"tandem-p");
const VERSION: u64 = 1;
const HEADER: usize = 4096;
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;
const AT_INSTANCE: usize = 16;
const AT_EPOCH: usize = 32;
/// Zero in the memory of an older engine, which ignores both.
const AT_FAILURES: usize = 40;
const AT_HEARD: usize = 48;
const AT_HALVES: usize = 64;
const HALF_FIELDS: usize = 32;

/// The pending region of one tree.
#[derive(Debug)]
pub struct Pending {
    memory: Memory,
    half_bytes: usize,
    active: usize,
    scratch: Vec<u8>,
}

/// Where a commit was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Begun {
    /// Epoch of the log; from 1.
    pub epoch: u64,
    /// Block in it.
    pub sequence: u64,
}

/// Records of one half that a former process left.
#[derive(Debug)]
pub(super) struct Remains {
    pub half: usize,
    /// Where its commit was begun, if it was; if the log has that commit, the records are in it.
    pub commit: Option<Begun>,
    pub records: Vec<Record>,
}

/// The region cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PendingError {
    /// Not ours, or a newer version's.
    #[error("the pending region has magic {magic:#x} and version {version}, expected {MAGIC:#x} and {VERSION}")]
    Unknown {
        /// First word.
        magic: u64,
        /// Second word.
        version: u64,
    },
    /// It belongs to another tree.
    #[error("the pending region belongs to copy {0}")]
    OtherInstance(InstanceId),
    /// A record cannot be read.
    #[error("the pending region is damaged at byte {0}")]
    Damaged(usize),
}

impl Pending {
    /// Over zeroed memory, or over what a former process of the same tree left.
    ///
    /// # Panics
    /// If there is no room for a header and two halves of a page each.
    pub fn over(memory: Memory) -> Self {
        assert!(memory.len() >= HEADER + 2 * 4096, "the pending region needs three pages");
        let half_bytes = ((memory.len() - HEADER) / 2) & !7;
        Self { memory, half_bytes, active: 0, scratch: Vec::with_capacity(256) }
    }

    /// Ends the use, and keeps what is in it: for the next `Store::open` in the same process.
    pub fn into_memory(self) -> Memory {
        self.memory
    }

    /// What a former process left, oldest first. Nothing if the checkpoint is of a later `generation` than its log: then
    /// it was all in that checkpoint.
    pub(super) fn remains(&self, instance: InstanceId, generation: u64) -> Result<Vec<Remains>, PendingError> {
        let magic = self.memory.word(AT_MAGIC).load(Acquire);
        if magic == 0 {
            return Ok(Vec::new());
        }
        let version = self.memory.word(AT_VERSION).load(Acquire);
        if magic != MAGIC || version != VERSION {
            return Err(PendingError::Unknown { magic, version });
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.memory.word(AT_INSTANCE).load(Acquire).to_le_bytes());
        bytes[8..].copy_from_slice(&self.memory.word(AT_INSTANCE + 8).load(Acquire).to_le_bytes());
        if bytes != instance.to_bytes() {
            return Err(PendingError::OtherInstance(InstanceId::from_bytes(bytes)));
        }
        if generation > self.memory.word(AT_EPOCH).load(Acquire) {
            return Ok(Vec::new());
        }
        let mut halves = [self.half(0)?, self.half(1)?];
        // The one whose commit was begun is the older one; two begun commits are in order of their position.
        halves.sort_by_key(|half| half.commit.map_or((1, 0, 0), |begun| (0, begun.epoch, begun.sequence)));
        Ok(halves.into_iter().filter(|half| !half.records.is_empty()).collect())
    }

    /// Empties it for a new life of the tree whose first log has `epoch`.
    pub(super) fn reset(&mut self, instance: InstanceId, epoch: u64) {
        // Kill anywhere: until the epoch is stored all of it counts as older than the checkpoint, or as untouched.
        for half in 0..2 {
            self.clear(half);
        }
        let bytes = instance.to_bytes();
        let (low, high) = bytes.split_at(8);
        self.memory.word(AT_INSTANCE).store(word(low), Release);
        self.memory.word(AT_INSTANCE + 8).store(word(high), Release);
        self.memory.word(AT_VERSION).store(VERSION, Release);
        self.memory.word(AT_EPOCH).store(epoch, Release);
        self.memory.word(AT_MAGIC).store(MAGIC, Release);
        self.active = 0;
    }

    /// The log goes on in `epoch`. Must be called before a checkpoint of that generation can appear.
    pub(super) fn set_epoch(&mut self, epoch: u64) {
        self.memory.word(AT_EPOCH).store(epoch, Release);
    }

    /// An fdatasync has failed: what was acknowledged since the one before may be gone. The next process asks again and is told
    /// that all is well, so it has to know. Not forgotten by [`Self::reset`].
    pub(super) fn sync_failed(&self) {
        self.memory.word(AT_FAILURES).fetch_add(1, AcqRel);
    }

    /// How often one has failed.
    pub(super) fn failures(&self) -> u64 {
        self.memory.word(AT_FAILURES).load(Acquire)
    }

    /// Whether devices that outlived the process may not know of it.
    pub(super) fn has_unheard_failure(&self) -> bool {
        self.failures() != self.memory.word(AT_HEARD).load(Acquire)
    }

    /// They do.
    pub(super) fn failure_heard(&self) {
        self.memory.word(AT_HEARD).store(self.failures(), Release);
    }

    /// Whether nothing waits for a commit.
    pub(super) fn is_empty(&self) -> bool {
        self.used() == 0
    }

    /// Whether it is time to commit without being asked.
    pub(super) fn is_half_full(&self) -> bool {
        self.used() * 2 >= self.half_bytes
    }

    /// Records of map changes that a step of something long may append: they find room after the next commit at the latest.
    pub(super) fn step_records(&self) -> usize {
        (self.half_bytes - CONTROL_RESERVE.min(self.half_bytes / 4)) / (2 * (2 + MAX_RECORD))
    }

    /// Whether `count` records of map changes fit.
    pub(super) fn has_room(&self, count: usize) -> bool {
        self.used() + count * (2 + MAX_RECORD) + CONTROL_RESERVE.min(self.half_bytes / 4) <= self.half_bytes
    }

    /// Whether `count` records of a control operation fit.
    pub(super) fn has_room_for_control(&self, count: usize) -> bool {
        self.used() + count * (2 + MAX_RECORD) <= self.half_bytes
    }

    /// Appends all of the records at once: whoever reads it later sees all of them or none. There must be room.
    pub(super) fn append(&mut self, records: &[Record]) {
        self.scratch.clear();
        for record in records {
            let mut bytes = [0; MAX_RECORD];
            let length = record.encode(&mut bytes);
            self.scratch.extend_from_slice(&(length as u16).to_le_bytes());
            self.scratch.extend_from_slice(&bytes[..length]);
        }
        let used = self.used();
        let start = self.start(self.active) + used;
        assert!(used + self.scratch.len() <= self.half_bytes, "no room for {} records", records.len());
        self.memory.bytes_mut()[start..start + self.scratch.len()].copy_from_slice(&self.scratch);
        // Only now do the bytes count.
        self.length(self.active).store((used + self.scratch.len()) as u64, Release);
    }

    /// Begins the commit of what is in the active half; the other half, which must be empty, is active from now on.
    pub(super) fn begin_commit(&mut self, position: Position) {
        debug_assert_eq!(self.length(1 - self.active).load(Acquire), 0);
        let fields = self.fields(self.active);
        self.memory.word(fields + 16).store(position.sequence, Release);
        self.memory.word(fields + 8).store(position.epoch, Release);
        self.active = 1 - self.active;
    }

    /// The commit of a half that a former process left begins here.
    pub(super) fn recommit(&mut self, half: usize, position: Position) {
        let fields = self.fields(half);
        // Killed in between it counts as begun at a place that no log has reached: it is found again, and stays the older half.
        self.memory.word(fields + 16).store(u64::MAX, Release);
        self.memory.word(fields + 8).store(position.epoch, Release);
        self.memory.word(fields + 16).store(position.sequence, Release);
    }

    /// Bytes of records that a commit can have.
    pub(super) fn half_bytes(&self) -> usize {
        self.half_bytes
    }

    /// Records in the half that is being committed, in order.
    pub(super) fn committing(&self) -> impl Iterator<Item = Record> + '_ {
        let half = 1 - self.active;
        let bytes = &self.memory.bytes()[self.start(half)..][..self.length(half).load(Acquire) as usize];
        Records { bytes, offset: 0 }.map_while(Result::ok)
    }

    /// The commit that was begun is durable.
    pub(super) fn committed(&mut self) {
        self.clear(1 - self.active);
    }

    fn clear(&self, half: usize) {
        let fields = self.fields(half);
        self.length(half).store(0, Release);
        self.memory.word(fields + 8).store(0, Release);
    }

    fn half(&self, half: usize) -> Result<Remains, PendingError> {
        let length = self.length(half).load(Acquire) as usize;
        let start = self.start(half);
        let bytes = self.memory.bytes()[start..start + self.half_bytes].get(..length);
        let bytes = bytes.ok_or(PendingError::Damaged(start))?;
        let fields = self.fields(half);
        let epoch = self.memory.word(fields + 8).load(Acquire);
        let sequence = self.memory.word(fields + 16).load(Acquire);
        let records = Records { bytes, offset: 0 }.collect::<Result<_, usize>>();
        let records = records.map_err(|offset| PendingError::Damaged(start + offset))?;
        Ok(Remains { half, commit: (epoch > 0).then_some(Begun { epoch, sequence }), records })
    }

    fn used(&self) -> usize {
        self.length(self.active).load(Acquire) as usize
    }

    fn length(&self, half: usize) -> &std::sync::atomic::AtomicU64 {
        self.memory.word(self.fields(half))
    }

    fn fields(&self, half: usize) -> usize {
        AT_HALVES + half * HALF_FIELDS
    }

    fn start(&self, half: usize) -> usize {
        HEADER + half * self.half_bytes
    }
}

/// The records of a half; the offset of the first one that cannot be read.
struct Records<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl Iterator for Records<'_> {
    type Item = Result<Record, usize>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.bytes.get(self.offset..).filter(|rest| !rest.is_empty())?;
        let record = rest.split_first_chunk::<2>().and_then(|(length, rest)| {
            let length = usize::from(u16::from_le_bytes(*length));
            let mut input = Input { bytes: rest.get(..length)?, at: 1 };
            let record = Record::decode(*input.bytes.first()?, &mut input).ok()?;
            Some((record, 2 + length))
        });
        match record {
            Some((record, length)) => {
                self.offset += length;
                Some(Ok(record))
            }
            None => Some(Err(std::mem::replace(&mut self.offset, self.bytes.len()))),
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| (word << 8) | u64::from(*byte))
}
