//! A node: its disk, its device with the slots that outlive the engine, and the engine while it runs.

use super::cluster::Event;
use super::disk::{Captured, Disk, Payload};
use super::oracle::WriteId;
use crate::protocol::tests::Planted;
use crate::protocol::*;
use crate::volume::{BlockRange, InstanceId};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// A disk operation that is not done.
#[derive(Debug)]
pub enum Operation {
    Write {
        range: BlockRange,
        payload: Payload,
    },
    Zero(BlockRange),
    Read {
        range: BlockRange,
        tag: Option<Tag>,
    },
    /// Blocks of a range get what another copy has there.
    WritePiece {
        piece: Piece,
        payload: Payload,
    },
    /// With what another copy has.
    Compare {
        range: BlockRange,
        payload: Payload,
    },
    Flush(Captured),
    Seal {
        name: u32,
        contents: Payload,
    },
    Persist(Box<Record>),
    WriteHot(Box<[Extent]>),
    NextRange,
}

impl Operation {
    pub fn is_mutation(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::WritePiece { .. } | Self::Zero(_))
    }

    /// Nothing becomes durable, and nothing is read for another copy. The engine refuses all parts of pieces, also what is written.
    pub fn is_refused_after_failed_flush(&self) -> bool {
        match self {
            Self::Flush(_) | Self::Persist(_) | Self::Seal { .. } | Self::NextRange | Self::Read { tag: None, .. } => {
                true
            }
            Self::Write { .. } | Self::WritePiece { .. } | Self::Zero(_) | Self::Compare { .. } | Self::WriteHot(_) => {
                false
            }
            Self::Read { tag: Some(_), .. } => false,
        }
    }

    pub fn range(&self) -> Option<BlockRange> {
        match self {
            Self::Write { range, .. } | Self::Zero(range) | Self::Read { range, .. } => Some(*range),
            Self::Compare { range, .. } => Some(*range),
            Self::WritePiece { piece, .. } => Some(piece.range()),
            Self::Flush(_) | Self::Seal { .. } | Self::Persist(_) | Self::WriteHot(_) | Self::NextRange => None,
        }
    }
}

/// A request of the device that is not answered: it outlives the engine.
#[derive(Debug)]
pub struct Slot {
    pub request: Request,
    /// Number of a write, or zero.
    pub write: WriteId,
    /// What a flush must put on the media.
    pub covered: Vec<(u64, WriteId)>,
    pub read: Payload,
}

/// An engine that runs.
#[derive(Debug)]
pub struct Process {
    pub life: u64,
    pub replica: Replica,
    pub operations: BTreeMap<OperationId, Operation>,
    pub plan: VecDeque<Missing>,
    /// Bytes by the operation that read them, and by the frame that brought them.
    pub read: BTreeMap<OperationId, Payload>,
    pub brought: BTreeMap<(InstanceId, Stamp, SerialNumber), Payload>,
    /// The catalogue was read: the wish may be given to the core.
    pub informed: bool,
    /// It could not reach the catalogue when it wanted to.
    pub behind: bool,
    /// The proposal that waits for an answer, by its number.
    pub proposing: Option<u64>,
    /// When each other node was heard last, and whether that was too long ago.
    pub heard: Vec<(Duration, bool)>,
    /// A disk operation failed.
    pub failed: bool,
    /// It was a flush: the store makes nothing durable any more.
    pub flush_failed: bool,
    /// Clients: what they have asked for, whether the catalogue is being asked who they are, and shall be again.
    pub host: Host,
    pub asked: BTreeMap<usize, super::host::Asked>,
    pub asks: bool,
    pub asks_again: bool,
}

impl Process {
    /// What a frame has brought.
    pub fn brought(&self, from: InstanceId, serial: SerialNumber) -> Payload {
        let stamp = self.replica.record().configuration.stamp;
        self.brought.get(&(from, stamp, serial)).cloned().unwrap_or_default()
    }

    /// What goes with a message of what was read: nothing but the blocks that it names.
    pub fn read_for(&self, message: &Message, read: OperationId) -> Payload {
        let mut payload = self.read.get(&read).cloned().unwrap_or_default();
        if let Message::Copy { piece, .. } = message {
            payload.retain(|(block, _)| piece.runs().any(|run| (run.start()..run.end()).contains(block)));
        }
        payload
    }
}

/// See the module.
#[derive(Debug)]
pub struct Node {
    pub disk: Disk,
    pub process: Option<Process>,
    /// Lives of its caches: a boot ends one, and so does a flush that fails.
    pub caches: u64,
    /// Which of them began with the boot.
    pub booted_with: u64,
    /// Of its engines.
    pub lives: u64,
    pub booted: Duration,
    /// Parts in a million by which its clock is fast.
    pub drift: i64,
    pub powered: bool,
    pub paused: bool,
    pub broken: bool,
    pub full: bool,
    /// How long its disk takes at most, while it is slow.
    pub slow: Option<Duration>,
    /// It cannot reach the catalogue.
    pub isolated: bool,
    pub slots: BTreeMap<u32, Slot>,
    pub next_tag: u32,
    /// Requests that its application has in flight at most; zero: there is none.
    pub depth: usize,
    /// Number of that application.
    pub application: u64,
    /// What arrives while the process is paused.
    pub backlog: Vec<Event>,
}

impl Node {
    pub fn new(disk: Disk, drift: i64) -> Self {
        Self {
            disk,
            process: None,
            caches: 1,
            booted_with: 1,
            lives: 0,
            booted: Duration::ZERO,
            drift,
            powered: true,
            paused: false,
            broken: false,
            full: false,
            slow: None,
            isolated: false,
            slots: BTreeMap::new(),
            next_tag: 0,
            depth: 0,
            application: 0,
            backlog: vec![],
        }
    }

    /// By this node's own clock.
    pub fn now(&self, time: Duration) -> Now {
        let since = (time - self.booted).as_micros() as i64;
        Now(Duration::from_micros((since + since / 1_000_000 * self.drift) as u64))
    }

    pub fn is_running(&self) -> bool {
        self.process.is_some() && !self.paused
    }

    /// The engine, if it is this one.
    pub fn life(&mut self, life: u64) -> Option<&mut Process> {
        self.process.as_mut().filter(|process| process.life == life)
    }

    /// What goes with a message of what an operation of this life has read.
    pub fn read_for(&mut self, life: u64, message: &Message, read: OperationId) -> Payload {
        self.life(life).map(|process| process.read_for(message, read)).unwrap_or_default()
    }

    /// Its caches have everything that it ever acknowledged.
    pub fn is_kept(&self) -> bool {
        self.disk.caches == self.caches && self.disk.record.intact
    }

    /// What a new engine is told of its caches.
    pub fn memory(&self, planted: Option<Planted>) -> Memory {
        let forgets = planted == Some(Planted::ForgetFailedFlush) && self.disk.caches >= self.booted_with;
        if self.disk.caches == self.caches || forgets { Memory::Kept } else { Memory::Lost }
    }

    /// What an operation does to the disk; the bytes that it read, if any.
    pub fn effect(&mut self, operation: Operation) -> Option<Payload> {
        let disk = &mut self.disk;
        match operation {
            Operation::Write { range, payload } => disk.write(range, &payload),
            Operation::Zero(range) => disk.zero(range, &[]),
            Operation::Read { range, .. } => return Some(disk.read(range)),
            Operation::Flush(captured) => disk.flushed(&captured),
            Operation::Seal { name, contents } => _ = disk.seals.entry(name).or_insert(contents),
            Operation::Persist(record) => disk.persist(*record, self.caches),
            Operation::WriteHot(extents) => disk.hot = extents.iter().copied().collect(),
            Operation::WritePiece { piece, payload } => {
                for run in piece.runs() {
                    let within = payload.iter().copied().filter(|(block, _)| (run.start()..run.end()).contains(block));
                    disk.write(run, &within.collect());
                }
            }
            Operation::Compare { .. } | Operation::NextRange => {}
        }
        None
    }
}
