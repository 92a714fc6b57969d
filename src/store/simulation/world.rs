//! One simulated machine: a store, its disk, requests in flight, and crashes.

use super::coverage::Coverage;
use super::disk::{BLOCK, Disk, Random, Write};
use super::mirror::{self, Mirroring};
use super::oracle::{Content, Existence, Oracle, ZEROS, content, fill};
use crate::memory::Memory;
use crate::protocol::{DiskError, OperationId, Request};
use crate::store::planted::Planted;
use crate::store::tests::{size, superblock};
use crate::store::{Action, Buffer, Control, File, Io, IoId, Job, Store};
use crate::volume::{BlockRange, VolumeId};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

pub const MOST_VOLUMES: usize = 4;
pub const MOST_SNAPSHOTS: usize = 8;
const MOST_IN_FLIGHT: usize = 12;

pub struct Operation {
    pub kind: Kind,
    pub volume: VolumeId,
    pub range: Option<BlockRange>,
    /// Number and stamp of what it writes.
    pub number: u32,
    pub buffer: Vec<u8>,
    /// For a flush: what was the latest in each block when it began.
    pub latest: Vec<(VolumeId, u64, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Zeros,
    Flush,
    Control(Control),
    /// Of the mirrored volume: a record, marks.
    Persist,
    Marks,
}

pub struct InFlight {
    pub io: IoId,
    pub file: File,
    pub what: Io,
    /// What a sync covers.
    pub mark: u64,
    pub bytes: Vec<u8>,
}

pub struct World {
    pub random: Random,
    pub disk: Arc<Disk>,
    pub pending: OwnedFd,
    pub pending_bytes: usize,
    pub store: Option<Store>,
    pub oracle: Oracle,
    /// The first volume, if it is mirrored.
    pub mirror: Option<Mirroring>,
    pub operations: BTreeMap<OperationId, Operation>,
    pub in_flight: Vec<InFlight>,
    pub jobs: Vec<Job>,
    pub now: Duration,
    pub next: u32,
    /// One I/O of so many fails; 0 for none.
    pub errors: usize,
    pub no_space: usize,
    pub job_errors: usize,
    /// For one blocking call of so many the disk is full; 0 for none.
    pub full: usize,
    /// The disk becomes full in the end, and is from some time on.
    pub fills_up: bool,
    pub stays_full: bool,
    /// Decides that: by a sequence of its own, so that what a seed does otherwise stays the same.
    pub space: Random,
    pub had_errors: bool,
    pub had_no_space: bool,
    /// Steps in which a crash is likely, while something delicate is not durable yet.
    pub delicate: u32,
    pub planted: Option<Planted>,
    /// Writes of a killed process that nobody waited for.
    pub late: Vec<Write>,
    pub coverage: Coverage,
    /// Prints what happens.
    pub trace: bool,
}

pub type Outcome = Result<(), String>;

impl World {
    pub fn new(seed: u64, planted: Option<Planted>) -> Self {
        let mut random = Random::new(seed);
        let pending_bytes = 4096 + 2 * 4096 * (1 + random.below(2));
        let disk = Arc::new(Disk::new(seed));
        let log_bytes = (12 + 4 * random.below(4)) as u64 * BLOCK as u64;
        Store::create_with(&*disk, &superblock(), log_bytes).expect("a tree");
        let rate = |random: &mut Random, part, rate| if random.chance(1, part) { rate } else { 0 };
        let mut space = Random::new(seed ^ 0xf011);
        let full = if space.chance(1, 3) { 2 } else { 0 };
        if space.chance(1, 2) {
            disk.keep_no_space();
        }
        let mut world = Self {
            full,
            fills_up: false,
            stays_full: false,
            space,
            errors: rate(&mut random, 6, 60),
            no_space: rate(&mut random, 8, 10),
            job_errors: rate(&mut random, 6, 50),
            random,
            disk,
            pending: memfd(pending_bytes),
            pending_bytes,
            store: None,
            oracle: Oracle::default(),
            mirror: None,
            operations: BTreeMap::new(),
            in_flight: Vec::new(),
            jobs: Vec::new(),
            now: Duration::ZERO,
            next: 0,
            had_errors: false,
            had_no_space: false,
            delicate: 0,
            planted,
            late: Vec::new(),
            coverage: Coverage::default(),
            trace: std::env::var("SEED").is_ok(),
        };
        world.open().expect("a new tree opens");
        world
    }

    /// One whose first volume is mirrored.
    pub fn mirrored(seed: u64, planted: Option<Planted>) -> Self {
        Self { mirror: Some(Mirroring::new(VolumeId::from_bytes([1; 16]))), ..Self::new(seed, planted) }
    }

    pub fn run(mut self) -> Result<Coverage, String> {
        if self.fills_up {
            return self.run_full();
        }
        self.control(Control::CreateVolume {
            volume: VolumeId::from_bytes([1; 16]),
            size: size(if self.mirror.is_some() { mirror::BLOCKS } else { 256 }),
            verify_reads: true,
        })?;
        let rates = (self.errors, self.no_space, self.job_errors, self.full);
        self.drain()?;
        self.reconfigure()?;
        self.drain()?;
        (self.errors, self.no_space, self.job_errors, self.full) = rates;
        let steps = 80 + self.random.below(140);
        for step in 0..steps {
            self.step().map_err(|error| format!("step {step}: {error}"))?;
            self.coverage.steps += 1;
        }
        self.finish().map_err(|error| format!("at the end: {error}"))?;
        Ok(self.coverage)
    }

    pub fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("open")
    }

    pub fn step(&mut self) -> Outcome {
        if self.random.chance(1, 70) || self.store().failure().is_some() && self.random.chance(1, 4) {
            let cut = self.random.chance(1, 2);
            return self.crash(cut);
        }
        if let Some(write) = self.late.pop() {
            self.disk.write(&write);
        }
        if self.delicate > 0 {
            self.delicate -= 1;
            return match self.random.below(20) {
                0 => self.crash(true),
                1..3 => self.complete_one(),
                3..10 => self.tick(Duration::ZERO),
                _ => self.request(),
            };
        }
        if self.mirror.is_some() && self.random.chance(1, 6) {
            return self.mirror_step();
        }
        match self.random.below(100) {
            0..42 => self.complete_one(),
            42..48 => self.run_job(),
            48..56 => {
                let delay = [0, 1, 20, 100, 1500][self.random.below(5)];
                self.tick(Duration::from_millis(delay))
            }
            56..88 => self.request(),
            _ => self.random_control(),
        }
    }

    pub fn tick(&mut self, delay: Duration) -> Outcome {
        self.now += delay;
        let (mut out, now) = (Vec::new(), self.now);
        let layers = self.store().tree.layers.len();
        self.store().tick(now, &mut out);
        self.coverage.merged += layers.saturating_sub(self.store().tree.layers.len()) as u64;
        self.take(out)
    }

    // ---- requests ----

    pub fn pick_volume(&mut self) -> Option<VolumeId> {
        let there = self.oracle.volumes.iter().filter(|(_, volume)| volume.existence == Existence::There);
        let there: Vec<VolumeId> = there.map(|(id, _)| *id).collect();
        (!there.is_empty()).then(|| there[self.random.below(there.len())])
    }

    pub fn request(&mut self) -> Outcome {
        let Some(volume) = self.pick_volume().filter(|_| self.operations.len() < MOST_IN_FLIGHT) else {
            return self.complete_one();
        };
        let roll = self.random.below(100);
        if roll < 12 {
            return self.start(volume, Kind::Flush, None);
        }
        let kind = match roll {
            12..65 => Kind::Write,
            65..85 => Kind::Read,
            _ => Kind::Zeros,
        };
        let blocks = self.oracle.volumes[&volume].blocks;
        let is_mirrored = self.mirror.as_ref().is_some_and(|mirror| mirror.volume == volume);
        let whole = kind == Kind::Zeros && !is_mirrored && self.random.chance(1, 8);
        let start = if whole || self.random.chance(1, 2) { 0 } else { blocks as usize - 40 };
        let start = if whole { 0 } else { (start + self.random.below(32)) as u64 };
        let start = if is_mirrored { self.mirrored_start(blocks) } else { start };
        let count = if whole { blocks } else { 1 + self.random.below(8) as u64 };
        let range = BlockRange::new(start, count as u32).expect("a range");
        let overlaps = |operation: &Operation| {
            operation.volume == volume && operation.range.is_some_and(|other| other.overlaps(range))
        };
        if self.operations.values().any(overlaps) {
            return self.complete_one();
        }
        if kind != Kind::Read && !self.may_write(volume, range)? {
            return Ok(());
        }
        self.start(volume, kind, Some(range))
    }

    pub fn start(&mut self, volume: VolumeId, kind: Kind, range: Option<BlockRange>) -> Outcome {
        self.next += 1;
        let (number, id) = (self.next, OperationId(u64::from(self.next)));
        let mut buffer = vec![0xee; range.map_or(0, |range| range.bytes() as usize)];
        let request = match (kind, range) {
            (Kind::Read, Some(range)) => Request::Read(range),
            (Kind::Write, Some(range)) => {
                buffer.chunks_mut(BLOCK).for_each(|block| fill(block, number));
                Request::Write(range)
            }
            (Kind::Zeros, Some(range)) if self.random.chance(1, 2) => Request::Discard(range),
            (Kind::Zeros, Some(range)) => Request::WriteZeroes(range),
            _ => Request::Flush,
        };
        let mut latest = Vec::new();
        if kind == Kind::Flush {
            for (id, volume) in &self.oracle.volumes {
                let known = volume.touched.iter().filter(|(_, block)| block.now.len() == 1 && block.kept.len() > 1);
                latest.extend(known.map(|(number, block)| (*id, *number, block.latest)));
            }
        }
        if let (Kind::Write | Kind::Zeros, Some(range)) = (kind, range) {
            let known = self.oracle.volumes.get_mut(&volume).expect("it is there");
            let value = value(kind, number);
            (range.start()..range.end()).for_each(|block| known.block(block).start(u64::from(number), value));
        }
        self.operations.insert(id, Operation { kind, volume, range, number, buffer, latest });
        self.say(|| format!("{number}: {request:?} of {volume}"));
        let mut out = Vec::new();
        self.store().start(id, volume, request, &mut out);
        self.take(out)
    }

    pub fn take(&mut self, actions: Vec<Action<Job>>) -> Outcome {
        for action in actions {
            match action {
                Action::Io { io, file, what } => self.issue(io, file, what),
                Action::Zero { operation, offset, length } => {
                    let operation = self.operations.get_mut(&operation).expect("in flight");
                    operation.buffer[offset as usize..][..length as usize].fill(0);
                }
                Action::Check { operation, offset, crc } => {
                    let bytes = &self.operations[&operation].buffer[offset as usize..][..BLOCK];
                    if crc32c::crc32c(bytes) != crc {
                        return Err(format!("a verified read at {offset} finds another checksum"));
                    }
                }
                Action::Done { operation, result } => self.done(operation, result)?,
                Action::ControlDone { operation, result } => self.control_done(operation, result)?,
                Action::Job(job) => self.jobs.push(job),
            }
        }
        Ok(())
    }

    #[allow(unsafe_code, reason = "the disk reads the store's memory")]
    pub fn issue(&mut self, io: IoId, file: File, what: Io) {
        self.say(|| format!("    {io:?} {file:?} {what:?}"));
        let bytes = match what {
            Io::Write { length, buffer: Buffer::Request { operation, offset }, .. } => {
                self.operations[&operation].buffer[offset as usize..][..length as usize].to_vec()
            }
            Io::Write { length, buffer: Buffer::Store(memory), .. } => {
                // SAFETY: the store keeps it until the completion, and this is before.
                unsafe { std::slice::from_raw_parts(memory, length as usize) }.to_vec()
            }
            Io::Read { .. } | Io::Sync | Io::Punch { .. } => Vec::new(),
        };
        let mark = self.disk.mark(file);
        self.in_flight.push(InFlight { io, file, what, mark, bytes });
    }

    pub fn complete_one(&mut self) -> Outcome {
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let index = self.random.below(self.in_flight.len());
        self.complete(index)
    }

    pub fn complete(&mut self, index: usize) -> Outcome {
        let InFlight { io, file, what, mark, bytes } = self.in_flight.swap_remove(index);
        let fails = self.errors > 0 && self.random.chance(1, self.errors);
        let result = match what {
            _ if fails => {
                self.had_errors = true;
                if let Io::Write { offset, .. } = what {
                    self.disk.kill(&[Write { file, offset, bytes }]);
                }
                Err(DiskError::Failed)
            }
            Io::Read { offset, length, buffer: Buffer::Request { operation, offset: at } } => {
                let operation = self.operations.get_mut(&operation).expect("in flight");
                let whole = self.disk.read(file, offset, &mut operation.buffer[at as usize..][..length as usize]);
                if whole { Ok(()) } else { return Err(format!("a read at {offset} is past the end of the file")) }
            }
            Io::Read { .. } => return Err("the store reads nothing for itself".into()),
            Io::Write { offset, .. } => {
                let write = Write { file, offset, bytes };
                let first = self.no_space > 0 && file == File::Data && self.disk.is_first_write(&write);
                if first && self.random.chance(1, self.no_space) {
                    self.coverage.no_space += 1;
                    self.had_no_space = true;
                    Err(DiskError::NoSpace)
                } else {
                    self.disk.write(&write);
                    Ok(())
                }
            }
            Io::Sync => {
                self.disk.sync_to(file, mark);
                Ok(())
            }
            Io::Punch { .. } => {
                self.disk.punch(file, what);
                Ok(())
            }
        };
        self.say(|| format!("    {io:?} {result:?}"));
        let mut out = Vec::new();
        self.store().completed(io, result, &mut out);
        self.take(out)
    }

    pub fn done(&mut self, id: OperationId, result: Result<(), DiskError>) -> Outcome {
        self.say(|| format!("  {}: {result:?}", id.0));
        let operation = self.operations.remove(&id).ok_or(format!("{id:?} is done twice"))?;
        if let Err(error) = result {
            let planned = match error {
                DiskError::NoSpace => self.had_no_space,
                DiskError::Failed => self.had_errors,
                DiskError::Corrupt | DiskError::Fenced => false,
            };
            if !planned {
                return Err(format!("{:?} fails with {error}", operation.kind));
            }
        }
        let (kind, volume) = (operation.kind, operation.volume);
        if matches!(kind, Kind::Persist | Kind::Marks) {
            return self.update_done(kind, result);
        }
        let Some(range) = operation.range else {
            for (volume, block, number) in operation.latest.into_iter().filter(|_| result.is_ok()) {
                if let Some(volume) = self.oracle.volumes.get_mut(&volume) {
                    volume.block(block).flushed(number);
                }
            }
            return Ok(());
        };
        let known = self.oracle.volumes.get_mut(&volume).ok_or("its volume is gone")?;
        for (block, bytes) in (range.start()..range.end()).zip(operation.buffer.chunks(BLOCK)) {
            if kind == Kind::Read {
                if result.is_ok() {
                    self.next += 1;
                    let read = known.read(block, content(bytes), u64::from(self.next));
                    read.map_err(|error| format!("block {block} of {volume} {error}"))?;
                }
                continue;
            }
            let state = known.block(block);
            match (kind, result) {
                (Kind::Write | Kind::Zeros, Ok(())) => {
                    state.done(u64::from(operation.number), value(kind, operation.number));
                }
                (Kind::Write | Kind::Zeros, Err(_)) => state.unknown(value(kind, operation.number)),
                (Kind::Read | Kind::Flush | Kind::Control(_) | Kind::Persist | Kind::Marks, _) => {}
            }
        }
        Ok(())
    }

    /// The next blocking call finds the disk full, or not.
    pub fn fill_disk(&mut self) -> bool {
        let full = self.stays_full || self.full > 0 && self.space.chance(1, self.full);
        self.disk.set_full(full);
        full
    }

    pub fn run_job(&mut self) -> Outcome {
        if self.jobs.is_empty() {
            return Ok(());
        }
        let index = self.random.below(self.jobs.len());
        let job = self.jobs.swap_remove(index);
        let is_checkpoint = matches!(job, Job::Checkpoint(_));
        let fuse = self.random.chance(1, 8).then(|| 1 + self.random.below(14) as u32);
        self.disk.set_fuse(fuse);
        self.disk.set_write_errors(self.job_errors);
        self.fill_disk();
        let outcome = job.run();
        self.disk.set_write_errors(0);
        self.disk.set_full(self.stays_full);
        if self.disk.has_blown() {
            self.coverage.crashes_in_jobs += 1;
            let cut = self.random.chance(1, 2);
            return self.crash(cut);
        }
        self.disk.set_fuse(None);
        self.coverage.checkpoints += u64::from(is_checkpoint);
        let mut out = Vec::new();
        self.store().job_done(outcome, &mut out);
        self.take(out)
    }
}

pub fn value(kind: Kind, number: u32) -> Content {
    if kind == Kind::Write { [number; BLOCK / super::disk::UNIT] } else { ZEROS }
}

pub fn memfd(bytes: usize) -> OwnedFd {
    Memory::create("tandem-simulation", bytes).expect("memory").1
}
