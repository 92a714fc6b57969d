//! Requests of a device: what to do on disk for each, and what to change in the map once that is done.
//!
//! Invariants: a block gets into a map only when all of its request's writes are complete; it is in the pending region
//! before the request is done; a failed write leaves no trace in any map; a read or an overwrite allocates no memory.
//! Overlapping requests are never in flight at the same time: the core holds the range.

use super::allocator::Full;
use super::background::STEP_BLOCKS;
use super::format::LayerId;
use super::map::{Entry, Extent, PhysicalBlock};
use super::mirror::Part;
use super::record::Record;
use super::slab::Slab;
use super::tree::Volume;
use super::{Action, Buffer, File, Io, IoId, Job, Store};
use crate::protocol::{DiskError, OperationId, Request};
use crate::volume::{BLOCK_SIZE, BlockRange, VolumeId};
use std::collections::VecDeque;

/// Extents that one step of a discard looks at: some 100 microseconds, so that a discard of a TiB stalls nobody.
const STEP_EXTENTS: usize = if cfg!(all(test, debug_assertions)) { 7 } else { 1024 };

/// Records that one step of a discard may append; small, so that it finds room while writes append, too.
const STEP_RECORDS: usize = 64;

/// What a completion is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum InFlight {
    /// Part of the request in this slot.
    Piece(u32),
    /// The step of the commit that is running.
    Commit,
    /// Zeroing ahead.
    Zeroing(PhysicalBlock, u32),
    /// Giving space back.
    Punching(PhysicalBlock, u32),
    /// The step of a mirrored volume's update that is running.
    Mirror(VolumeId, Part),
}

/// A read or write in flight. Slots are used again with their vectors, so that nothing is allocated.
#[derive(Debug)]
struct Slot {
    operation: OperationId,
    volume: VolumeId,
    /// Pieces in flight.
    remaining: u32,
    error: Option<DiskError>,
    /// The layer that owned the blocks it writes in place.
    in_place: Option<LayerId>,
    /// Blocks allocated for it.
    fresh: Vec<Extent>,
    /// Offset in the buffer, and crc32c, of blocks to check.
    checks: Vec<(u32, u32)>,
}

/// A discard or write-zeroes that is done in steps.
#[derive(Clone, Copy, Debug)]
struct Zeroing {
    operation: OperationId,
    volume: VolumeId,
    next: u64,
    end: u64,
}

/// All requests in flight.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub ios: Slab<InFlight>,
    slots: Vec<Slot>,
    free_slots: Vec<u32>,
    allocated: Vec<(PhysicalBlock, u32)>,
    /// Written, and waiting for room in the pending region; bounded by the requests in flight.
    stalled: VecDeque<u32>,
    zeroing: VecDeque<Zeroing>,
    records: Vec<Record>,
}

impl Requests {
    /// Whether a request waits for the pending region to be committed.
    pub fn has_stalled(&self) -> bool {
        !self.stalled.is_empty()
    }

    /// Whether a discard goes on in the background.
    pub fn is_zeroing(&self) -> bool {
        !self.zeroing.is_empty()
    }
}

impl Store {
    /// Starts a request of a volume; [`Action::Done`] ends it. [`Request::Seal`] is not for here: it carries a name, and
    /// goes through [`Store::control`].
    pub fn start(&mut self, operation: OperationId, volume: VolumeId, request: Request, out: &mut Vec<Action<Job>>) {
        let known = self.tree.volumes.get_mut(&volume);
        let fits = |volume: &Volume| request.range().is_none_or(|range| range.end() <= volume.size.blocks());
        let Some(known) = known.filter(|volume| fits(volume)) else {
            return out.push(Action::Done { operation, result: Err(DiskError::Failed) });
        };
        match request {
            Request::Read(range) => {
                known.in_flight += 1;
                self.start_read(operation, volume, range, out);
            }
            Request::Write(range) => {
                known.in_flight += 1;
                self.start_write(operation, volume, range, out);
            }
            Request::Discard(range) | Request::WriteZeroes(range) => {
                known.in_flight += 1;
                let zeroing = Zeroing { operation, volume, next: range.start(), end: range.end() };
                self.requests.zeroing.push_back(zeroing);
                // Those that came before go on in `tick`; most are done in one step, here.
                self.step_zeroing(self.requests.zeroing.len() - 1, out);
            }
            Request::Flush => self.start_flush(operation, out),
            Request::Seal(_) => out.push(Action::Done { operation, result: Err(DiskError::Failed) }),
        }
        self.pump(out);
    }

    /// Takes the completion of an [`Action::Io`].
    pub fn completed(&mut self, io: IoId, result: Result<(), DiskError>, out: &mut Vec<Action<Job>>) {
        match self.requests.ios.remove(io.0) {
            Some(InFlight::Piece(slot)) => self.piece_done(slot, result, out),
            Some(InFlight::Commit) => self.commit_io_done(result, out),
            Some(InFlight::Zeroing(start, count)) => self.zeroed_ahead(start, count, result),
            Some(InFlight::Punching(start, count)) => self.punched(start, count),
            Some(InFlight::Mirror(volume, part)) => self.mirror_io_done(volume, part, result, out),
            None => debug_assert!(false, "{io:?} is not in flight"),
        }
        self.pump(out);
    }

    /// Issues an I/O.
    pub(super) fn issue(&mut self, purpose: InFlight, file: File, what: Io, out: &mut Vec<Action<Job>>) {
        let io = IoId(self.requests.ios.insert(purpose));
        out.push(Action::Io { io, file, what });
    }

    fn start_read(&mut self, operation: OperationId, id: VolumeId, range: BlockRange, out: &mut Vec<Action<Job>>) {
        let slot = self.new_slot(operation, id);
        let mut block = range.start();
        while block < range.end() {
            let Some(volume) = self.tree.volumes.get(&id) else { break };
            let limit = (range.end() - block) as u32;
            let (entry, count) = self.tree.view(volume, block, limit);
            let offset = buffer_offset(range, block);
            match entry {
                Entry::Data(physical) => {
                    if volume.verify_reads {
                        let checks = &mut self.requests.slots[slot as usize].checks;
                        self.background.checking.expected(&self.tree, volume.top, block, count, offset, checks);
                    }
                    self.requests.slots[slot as usize].remaining += 1;
                    let buffer = Buffer::Request { operation, offset };
                    let what = Io::Read { offset: physical_offset(physical), length: bytes(count), buffer };
                    self.issue(InFlight::Piece(slot), File::Data, what, out);
                }
                Entry::Absent | Entry::Zero => out.push(Action::Zero { operation, offset, length: bytes(count) }),
            }
            block += u64::from(count);
        }
        if self.requests.slots[slot as usize].remaining == 0 {
            self.finish(slot, Ok(()), out);
        }
    }

    fn start_write(&mut self, operation: OperationId, id: VolumeId, range: BlockRange, out: &mut Vec<Action<Job>>) {
        let slot = self.new_slot(operation, id);
        // All of the space or none, before the first I/O: a write without space has no effect and can be repeated.
        if self.allocate_for(slot, range).is_err() {
            return self.finish(slot, Err(DiskError::NoSpace), out);
        }
        let top = self.tree.volumes[&id].top;
        let mut allocated = std::mem::take(&mut self.requests.allocated);
        let mut unused = allocated.iter().copied();
        let mut current = unused.next();
        let mut block = range.start();
        while block < range.end() {
            let (entry, mut count) = self.tree.layers[&top].map.run(block, (range.end() - block) as u32);
            let physical = match (entry, &mut current) {
                // The top owns it: overwritten in place.
                (Entry::Data(physical), _) => {
                    self.requests.slots[slot as usize].in_place = Some(top);
                    physical
                }
                (Entry::Absent | Entry::Zero, Some((start, length))) => {
                    count = count.min(*length);
                    let physical = *start;
                    (start.0, *length) = (start.0 + count, *length - count);
                    if *length == 0 {
                        current = unused.next();
                    }
                    let extent = Extent { start: block, count, entry: Entry::Data(physical) };
                    self.requests.slots[slot as usize].fresh.push(extent);
                    physical
                }
                (Entry::Absent | Entry::Zero, None) => unreachable!("as many blocks were allocated as were counted"),
            };
            self.requests.slots[slot as usize].remaining += 1;
            let buffer = Buffer::Request { operation, offset: buffer_offset(range, block) };
            let what = Io::Write { offset: physical_offset(physical), length: bytes(count), buffer };
            self.issue(InFlight::Piece(slot), File::Data, what, out);
            block += u64::from(count);
        }
        allocated.clear();
        self.requests.allocated = allocated;
        // Until its writes are complete the layer is not done being sealed: they may land in it.
        if let Some(layer) = self.requests.slots[slot as usize].in_place
            && let Some(layer) = self.tree.layers.get_mut(&layer)
        {
            layer.writers += 1;
        }
        #[cfg(test)]
        if self.planted == Some(super::planted::Planted::MapBeforeData) {
            self.map_fresh(slot);
            self.requests.slots[slot as usize].fresh.clear();
        }
    }

    /// Allocates for the blocks of the range that the top does not own.
    fn allocate_for(&mut self, slot: u32, range: BlockRange) -> Result<(), Full> {
        let top = self.tree.volumes[&self.requests.slots[slot as usize].volume].top;
        let map = &self.tree.layers[&top].map;
        let mut wanted = 0;
        let mut block = range.start();
        while block < range.end() {
            let (entry, count) = map.run(block, (range.end() - block) as u32);
            if !matches!(entry, Entry::Data(_)) {
                wanted += count;
            }
            block += u64::from(count);
        }
        self.requests.allocated.clear();
        if wanted == 0 {
            return Ok(());
        }
        self.background.allocated(wanted);
        self.allocator.allocate(wanted, &mut self.requests.allocated)
    }

    fn piece_done(&mut self, slot: u32, result: Result<(), DiskError>, out: &mut Vec<Action<Job>>) {
        let request = &mut self.requests.slots[slot as usize];
        request.remaining -= 1;
        if let Err(error) = result {
            // What may have had an effect outweighs what had none.
            request.error =
                Some(request.error.map_or(error, |first| if first == DiskError::NoSpace { error } else { first }));
        }
        if request.remaining > 0 {
            return;
        }
        // A later flush must sync the data, also that of a failed write.
        self.commit.unsynced |= request.in_place.is_some() || !request.fresh.is_empty();
        #[cfg(test)]
        if self.planted == Some(super::planted::Planted::MapBeforeData) {
            self.commit.unsynced = true;
        }
        if let Some(id) = request.in_place
            && let Some(layer) = self.tree.layers.get_mut(&id)
        {
            layer.writers -= 1;
            if layer.writers == 0 {
                self.resume_seals();
            }
        }
        let request = &mut self.requests.slots[slot as usize];
        if let Some(error) = request.error {
            // No map names them, and no I/O on them is left: free at once.
            for extent in request.fresh.drain(..) {
                if let Entry::Data(physical) = extent.entry {
                    self.allocator.undo(physical, extent.count);
                }
            }
            return self.finish(slot, Err(error), out);
        }
        self.map_and_finish(slot, out);
    }

    /// Maps what a completed write allocated, in the layer that is the top by now, then answers.
    fn map_and_finish(&mut self, slot: u32, out: &mut Vec<Action<Job>>) {
        let count = self.requests.slots[slot as usize].fresh.len();
        if count > 0 && !self.pending.has_room(count) {
            if self.commit.failure().is_some() {
                // No commit will make room again. The write is not acknowledged and not mapped: it had no effect.
                for extent in self.requests.slots[slot as usize].fresh.drain(..) {
                    if let Entry::Data(physical) = extent.entry {
                        self.allocator.undo(physical, extent.count);
                    }
                }
                return self.finish(slot, Err(DiskError::Failed), out);
            }
            return self.requests.stalled.push_back(slot);
        }
        if count > 0 {
            self.map_fresh(slot);
        }
        let request = &mut self.requests.slots[slot as usize];
        let operation = request.operation;
        for (offset, crc) in request.checks.drain(..) {
            out.push(Action::Check { operation, offset, crc });
        }
        self.finish(slot, Ok(()), out);
    }

    fn map_fresh(&mut self, slot: u32) {
        let request = &mut self.requests.slots[slot as usize];
        let layer = self.tree.volumes[&request.volume].top;
        let mut records = std::mem::take(&mut self.requests.records);
        records.extend(request.fresh.drain(..).map(|extent| Record::Map { layer, extent }));
        self.change(&records);
        records.clear();
        self.requests.records = records;
    }

    /// Makes changes that are consistent by construction, and keeps them in the pending region. There must be room.
    pub(super) fn change(&mut self, records: &[Record]) {
        for record in records {
            let allocator = &mut self.allocator;
            #[cfg(test)]
            let reuse = self.planted == Some(super::planted::Planted::ReuseBeforeDurable);
            #[cfg(not(test))]
            let reuse = false;
            // Freed by a record that is not durable yet: not to be used before it is.
            let retire =
                &mut |start, count| if reuse { allocator.undo(start, count) } else { allocator.retire(start, count) };
            let applied = self.tree.apply(record, retire);
            assert!(applied.is_ok(), "a live change does not fit: {applied:?}");
        }
        // Before anything is answered: from here on the change survives the process.
        self.pending.append(records);
    }

    /// Goes on with the requests that waited for room.
    pub(super) fn resume_stalled(&mut self, out: &mut Vec<Action<Job>>) {
        for _ in 0..self.requests.stalled.len() {
            if let Some(slot) = self.requests.stalled.pop_front() {
                self.map_and_finish(slot, out);
            }
        }
    }

    /// One step of the first discard that is not done.
    pub(super) fn zeroing_step(&mut self, out: &mut Vec<Action<Job>>) {
        if self.requests.is_zeroing() {
            self.step_zeroing(0, out);
        }
    }

    fn step_zeroing(&mut self, index: usize, out: &mut Vec<Action<Job>>) {
        let mut zeroing = self.requests.zeroing[index];
        let mut records = std::mem::take(&mut self.requests.records);
        let most = STEP_RECORDS.min(self.pending.step_records());
        let (mut extents, mut blocks) = (0, 0);
        while zeroing.next < zeroing.end && extents < STEP_EXTENTS && records.len() < most && blocks < STEP_BLOCKS {
            let limit = (zeroing.end - zeroing.next).min(STEP_BLOCKS) as u32;
            let (count, change) = self.zero_run(zeroing.volume, zeroing.next, limit);
            if let Some((layer, entry)) = change {
                let extent = Extent { start: zeroing.next, count, entry };
                blocks += u64::from(count);
                match records.last_mut() {
                    Some(Record::Map { extent: last, .. }) if last.entry == entry && last.end() == extent.start => {
                        last.count += count;
                    }
                    _ => records.push(Record::Map { layer, extent }),
                }
            }
            zeroing.next += u64::from(count);
            extents += 1;
        }
        let has_room = self.pending.has_room(records.len());
        if has_room {
            self.change(&records);
            self.requests.zeroing[index] = zeroing;
        }
        records.clear();
        self.requests.records = records;
        // Without room it goes on after the commit; without any more commits it never will.
        let failed = !has_room && self.commit.failure().is_some();
        if failed || has_room && zeroing.next == zeroing.end {
            self.requests.zeroing.remove(index);
            self.request_gone(zeroing.volume);
            let result = if failed { Err(DiskError::Failed) } else { Ok(()) };
            out.push(Action::Done { operation: zeroing.operation, result });
        }
    }

    /// How far the blocks from `block` on are alike, and what the top must say so that they read as zeros.
    fn zero_run(&self, id: VolumeId, block: u64, limit: u32) -> (u32, Option<(LayerId, Entry)>) {
        let Some(volume) = self.tree.volumes.get(&id) else { return (limit, None) };
        let Some(layer) = self.tree.layers.get(&volume.top) else { return (limit, None) };
        let (entry, count) = layer.map.run(block, limit);
        match (entry, layer.parent) {
            (Entry::Data(_) | Entry::Zero, None) => (count, Some((volume.top, Entry::Absent))),
            (Entry::Absent, None) | (Entry::Zero, Some(_)) => (count, None),
            // An ancestor may have data there: nobody below may shine through.
            (Entry::Data(_), Some(_)) => (count, Some((volume.top, Entry::Zero))),
            (Entry::Absent, Some(_)) => {
                let (entry, count) = self.tree.view(volume, block, count);
                let change = matches!(entry, Entry::Data(_)).then_some((volume.top, Entry::Zero));
                (count, change)
            }
        }
    }

    fn new_slot(&mut self, operation: OperationId, volume: VolumeId) -> u32 {
        let requests = &mut self.requests;
        let slot = requests.free_slots.pop().unwrap_or_else(|| {
            requests.slots.push(Slot {
                operation,
                volume,
                remaining: 0,
                error: None,
                in_place: None,
                fresh: Vec::new(),
                checks: Vec::new(),
            });
            requests.slots.len() as u32 - 1
        });
        let request = &mut requests.slots[slot as usize];
        (request.operation, request.volume) = (operation, volume);
        (request.remaining, request.error, request.in_place) = (0, None, None);
        slot
    }

    fn finish(&mut self, slot: u32, result: Result<(), DiskError>, out: &mut Vec<Action<Job>>) {
        let request = &mut self.requests.slots[slot as usize];
        request.fresh.clear();
        request.checks.clear();
        let (operation, volume) = (request.operation, request.volume);
        self.requests.free_slots.push(slot);
        self.request_gone(volume);
        out.push(Action::Done { operation, result });
    }

    pub(super) fn request_gone(&mut self, volume: VolumeId) {
        if let Some(volume) = self.tree.volumes.get_mut(&volume) {
            volume.in_flight -= 1;
        }
    }
}

fn bytes(blocks: u32) -> u32 {
    blocks * BLOCK_SIZE as u32
}

fn buffer_offset(range: BlockRange, block: u64) -> u32 {
    ((block - range.start()) * BLOCK_SIZE) as u32
}

pub(super) fn physical_offset(block: PhysicalBlock) -> u64 {
    u64::from(block.0) * BLOCK_SIZE
}
