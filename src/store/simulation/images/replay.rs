//! Replays a recording into the shipped store on the simulated disk, cuts the power, and reads the image out again.

use super::record::{Event, Recording};
use crate::memory::Memory;
use crate::protocol::{OperationId, Request};
use crate::store::planted::Planted;
use crate::store::simulation::disk::{BLOCK, Disk, Random, Write};
use crate::store::tests::{size, snapshot, superblock, volume};
use crate::store::{Action, Buffer, Control, ControlError, File, Io, IoId, Job, PENDING_BYTES, Pending, Store};
use crate::volume::BlockRange;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a map log: so small that checkpoints fall into every replay.
const LOG_BYTES: u64 = 128 << 10;
/// A snapshot is taken after so many events, and the one before is deleted: layers are sealed and merged under the work.
const SNAPSHOT_EVERY: usize = 150;
/// Actions of the machine until an operation must be done.
const PATIENCE: usize = 200_000;
const READ_BLOCKS: u32 = 64;

struct InFlight {
    io: IoId,
    file: File,
    what: Io,
    mark: u64,
    bytes: Vec<u8>,
}

/// One machine.
pub struct Replay {
    random: Random,
    disk: Arc<Disk>,
    store: Store,
    blocks: u64,
    buffers: BTreeMap<OperationId, Vec<u8>>,
    ranges: BTreeMap<OperationId, BlockRange>,
    done: BTreeSet<OperationId>,
    in_flight: Vec<InFlight>,
    jobs: Vec<Job>,
    now: Duration,
    next: u64,
    snapshots: u8,
}

fn pending() -> Pending {
    Pending::over(Memory::zeros(PENDING_BYTES).expect("memory"))
}

impl Replay {
    pub fn new(seed: u64, bytes: u64, planted: Option<Planted>) -> Self {
        let disk = Arc::new(Disk::new(seed));
        Store::create_with(&*disk, &superblock(), LOG_BYTES).expect("a tree");
        let mut store = Store::open(disk.clone(), pending()).expect("a new tree opens");
        store.planted = planted;
        let blocks = bytes / BLOCK as u64;
        let mut replay = Self {
            random: Random::new(seed ^ 0x1234),
            disk,
            store,
            blocks,
            buffers: BTreeMap::new(),
            ranges: BTreeMap::new(),
            done: BTreeSet::new(),
            in_flight: Vec::new(),
            jobs: Vec::new(),
            now: Duration::ZERO,
            next: 1 << 32,
            snapshots: 0,
        };
        let made = replay.control(Control::CreateVolume { volume: volume(1), size: size(blocks), verify_reads: true });
        replay.finish(made).expect("a volume");
        replay
    }

    pub fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// The first `count` events. What had an answer when the next was submitted has it here, too; the rest is in any order.
    pub fn events(&mut self, recording: &Recording, count: usize) -> Result<(), String> {
        for (index, event) in recording.events[..count].iter().enumerate() {
            match *event {
                Event::Submitted(number) => self.submit(number, recording)?,
                Event::Completed(number) => self.finish(operation(number))?,
                Event::Started(_) | Event::Promised(_) => {}
            }
            if index >= recording.ready && index.is_multiple_of(SNAPSHOT_EVERY) {
                self.take_snapshot();
            }
        }
        Ok(())
    }

    fn submit(&mut self, number: usize, recording: &Recording) -> Result<(), String> {
        let recorded = &recording.requests[number];
        let range = match recorded.request {
            Request::Read(range) | Request::Write(range) | Request::Discard(range) | Request::WriteZeroes(range) => {
                Some(range)
            }
            Request::Flush | Request::Seal(_) => None,
        };
        // As the engine does it: what overlaps waits.
        let overlapping = self.ranges.iter().filter(|(_, other)| range.is_some_and(|range| range.overlaps(**other)));
        for waits_for in overlapping.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.finish(waits_for)?;
        }
        let id = operation(number);
        self.start(id, recorded.request, range, recorded.data.clone())
    }

    fn start(
        &mut self,
        id: OperationId,
        request: Request,
        range: Option<BlockRange>,
        data: Vec<u8>,
    ) -> Result<(), String> {
        self.buffers.insert(id, data);
        self.ranges.extend(range.map(|range| (id, range)));
        let mut out = Vec::new();
        self.store.start(id, volume(1), request, &mut out);
        self.take(out)
    }

    fn control(&mut self, control: Control) -> OperationId {
        self.next += 1;
        let (id, mut out) = (OperationId(self.next), Vec::new());
        self.buffers.insert(id, Vec::new());
        self.store.control(id, control, &mut out);
        self.take(out).expect("no request ends here");
        id
    }

    fn take_snapshot(&mut self) {
        self.snapshots += 1;
        self.control(Control::Seal { volume: volume(1), snapshot: snapshot(self.snapshots), created_ms: 1 });
        if self.snapshots > 2 {
            self.control(Control::DeleteSnapshot(snapshot(self.snapshots - 2)));
        }
    }

    /// Lets the machine work until the operation is done.
    fn finish(&mut self, id: OperationId) -> Result<(), String> {
        for _ in 0..PATIENCE {
            if self.done.remove(&id) || !self.buffers.contains_key(&id) {
                self.buffers.remove(&id);
                self.ranges.remove(&id);
                return Ok(());
            }
            self.step()?;
        }
        Err(format!("{id:?} is never done"))
    }

    fn step(&mut self) -> Result<(), String> {
        match self.random.below(12) {
            0 if !self.jobs.is_empty() => {
                let job = self.jobs.swap_remove(self.random.below(self.jobs.len()));
                let outcome = job.run();
                let mut out = Vec::new();
                self.store.job_done(outcome, &mut out);
                self.take(out)
            }
            0..3 => {
                self.now += Duration::from_millis([0, 1, 30, 800][self.random.below(4)]);
                let mut out = Vec::new();
                self.store.tick(self.now, &mut out);
                self.take(out)
            }
            _ if self.in_flight.is_empty() => Ok(()),
            _ => self.complete_one(),
        }
    }

    fn take(&mut self, actions: Vec<Action<Job>>) -> Result<(), String> {
        for action in actions {
            match action {
                Action::Io { io, file, what } => self.issue(io, file, what),
                Action::Zero { operation, offset, length } => {
                    let buffer = self.buffers.get_mut(&operation).ok_or("unknown operation")?;
                    buffer[offset as usize..][..length as usize].fill(0);
                }
                Action::Check { operation, offset, crc } => {
                    if crc32c::crc32c(&self.buffers[&operation][offset as usize..][..BLOCK]) != crc {
                        return Err(format!("{operation:?}: a verified read finds another checksum"));
                    }
                }
                Action::Done { operation, result } => {
                    result.map_err(|error| format!("{operation:?}: {error}"))?;
                    self.done.insert(operation);
                    self.ranges.remove(&operation);
                }
                Action::ControlDone { operation, result } => match result {
                    Ok(()) | Err(ControlError::Busy | ControlError::UnknownSnapshot(_)) => {
                        self.done.insert(operation);
                    }
                    Err(error) => return Err(error.to_string()),
                },
                Action::Job(job) => self.jobs.push(job),
            }
        }
        Ok(())
    }

    #[allow(unsafe_code, reason = "the disk reads the store's memory")]
    fn issue(&mut self, io: IoId, file: File, what: Io) {
        let bytes = match what {
            Io::Write { length, buffer: Buffer::Request { operation, offset }, .. } => {
                self.buffers[&operation][offset as usize..][..length as usize].to_vec()
            }
            // SAFETY: the store keeps it until the completion, and this is before.
            Io::Write { length, buffer: Buffer::Store(memory), .. } => unsafe {
                std::slice::from_raw_parts(memory, length as usize).to_vec()
            },
            Io::Read { .. } | Io::Sync | Io::Punch { .. } => Vec::new(),
        };
        let mark = self.disk.mark(file);
        self.in_flight.push(InFlight { io, file, what, mark, bytes });
    }

    fn complete_one(&mut self) -> Result<(), String> {
        let index = self.random.below(self.in_flight.len());
        let InFlight { io, file, what, mark, bytes } = self.in_flight.swap_remove(index);
        match what {
            Io::Read { offset, length, buffer: Buffer::Request { operation, offset: at } } => {
                let buffer = self.buffers.get_mut(&operation).ok_or("unknown operation")?;
                if !self.disk.read(file, offset, &mut buffer[at as usize..][..length as usize]) {
                    return Err(format!("a read at {offset} is past the end of the file"));
                }
            }
            Io::Read { .. } => return Err("the store reads nothing for itself".to_owned()),
            Io::Write { offset, .. } => self.disk.write(&Write { file, offset, bytes }),
            Io::Sync => self.disk.sync_to(file, mark),
            Io::Punch { .. } => self.disk.punch(file, what),
        }
        let mut out = Vec::new();
        self.store.completed(io, Ok(()), &mut out);
        self.take(out)
    }

    /// Some of what is in flight gets done, then the power fails and the tree is opened again.
    pub fn power_cut(&mut self) -> Result<(), String> {
        for _ in 0..self.random.below(2 * self.in_flight.len() + 1) {
            self.step()?;
        }
        let writes = std::mem::take(&mut self.in_flight).into_iter().filter_map(|io| match io.what {
            Io::Write { offset, .. } => Some(Write { file: io.file, offset, bytes: io.bytes }),
            Io::Read { .. } | Io::Sync | Io::Punch { .. } => None,
        });
        self.disk.power_cut(&writes.collect::<Vec<_>>());
        self.jobs.clear();
        (self.buffers, self.ranges, self.done) = Default::default();
        self.store = Store::open(self.disk.clone(), pending()).map_err(|error| error.to_string())?;
        Ok(())
    }

    /// The whole volume as a sparse file.
    pub fn read_out(&mut self, image: &Path) -> Result<(), String> {
        let out = std::fs::File::create(image).map_err(|error| error.to_string())?;
        out.set_len(self.blocks * BLOCK as u64).map_err(|error| error.to_string())?;
        let mut start = 0;
        while start < self.blocks {
            let count = (self.blocks - start).min(READ_BLOCKS.into()) as u32;
            let range = BlockRange::new(start, count).ok_or("no range")?;
            self.next += 1;
            let id = OperationId(self.next);
            self.start(id, Request::Read(range), Some(range), vec![0xee; range.bytes() as usize])?;
            while !self.done.contains(&id) {
                self.step()?;
            }
            let bytes = self.buffers.remove(&id).unwrap_or_default();
            for (block, bytes) in (start..).zip(bytes.chunks(BLOCK)).filter(|(_, bytes)| bytes.iter().any(|b| *b != 0))
            {
                out.write_all_at(bytes, block * BLOCK as u64).map_err(|error| error.to_string())?;
            }
            self.finish(id)?;
            start += u64::from(count);
        }
        Ok(())
    }
}

/// Operations of the recording, apart from our own.
fn operation(number: usize) -> OperationId {
    OperationId(number as u64)
}
