//! From a device to the core and back: reads requests into slots, answers them, frees the slots.
//!
//! Invariants: a slot that holds a request is nobody else's until its answer is written; it is marked done before that,
//! so that a killed engine's successor repeats the answer and not the request.
#![allow(unsafe_code, reason = "read(2) into and write(2) from shared memory")]

use super::statistics::Direction;
use super::turn::{Arena, Engine, Work};
use super::volume::{Device, Pending, Phase, TICKETS, Volume, VolumeKey};
use crate::protocol::{DiskError, Input, MAX_TAGS, Output, Request, Tag};
use crate::replica::device::fuse::{Dispatch, Malformed, Message, Reply};
use crate::replica::device::slots::{RESERVED_SLOTS, Slot};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;

/// Most slots of the arena for one volume; with its own and the operators' tickets that is all the core takes.
const MOST: u32 = MAX_TAGS as u32 - RESERVED_SLOTS - TICKETS as u32;

impl Arena {
    /// Whether a volume that has `used` slots may take one more: while it has less than twice of what is free. Alone it
    /// gets two thirds; however many volumes stall, each new one finds some free.
    fn allows(&self, used: u32) -> bool {
        used < MOST && used < 2 * self.free.len() as u32
    }
}

/// The slot that a tag stands for.
pub(super) fn slot_of<'a>(arena: &'a Arena, device: &'a Device, tag: Tag) -> Option<Slot<'a>> {
    let shared = arena.slots.count();
    if tag.0 < shared {
        Some(arena.slots.slot(tag.0))
    } else {
        (tag.0 - shared < device.fuse.slots.count()).then(|| device.fuse.slots.slot(tag.0 - shared))
    }
}

impl Engine {
    /// Reads requests of a volume until there are no more or no slot is free for them.
    pub fn read_requests(&mut self, key: VolumeKey) {
        if self.volume_mut(key).is_some_and(|volume| volume.opening.is_some() || volume.is_left_to_guests()) {
            // They wait in the kernel while the volume gets another core, or ends what a client has asked for.
            if let Some(device) = self.device_mut(key) {
                device.ready = false;
            }
            return;
        }
        loop {
            let Some(tag) = self.take_slot(key) else {
                if self.device_mut(key).is_some() {
                    self.starving.push(key);
                }
                return;
            };
            let sequence = self.sequence;
            let Some(device) = self.volumes[key.0 as usize].as_deref().and_then(|v| v.device.as_ref()) else { return };
            let Some(slot) = slot_of(&self.arena, device, tag) else { return };
            slot.prepare(device.fuse.volume, sequence);
            match read_request(device.fuse.connection(), slot) {
                Ok(()) => {
                    self.sequence += 1;
                    self.statistics.reads.fetch_add(1, Relaxed);
                    self.admit(key, tag);
                    self.pump();
                }
                Err(errno) => {
                    self.give_back(key, tag);
                    let Some(device) = self.device_mut(key) else { return };
                    device.ready = false;
                    if errno == Errno::EAGAIN {
                        self.statistics.empty_reads.fetch_add(1, Relaxed);
                    } else {
                        self.broken(key, errno);
                    }
                    return;
                }
            }
        }
    }

    fn take_slot(&mut self, key: VolumeKey) -> Option<Tag> {
        let Self { volumes, arena, .. } = self;
        let device = volumes.get_mut(key.0 as usize)?.as_deref_mut()?.device.as_mut()?;
        if arena.allows(device.arena_used) {
            device.arena_used += 1;
            return arena.free.pop().map(Tag);
        }
        device.own_free.pop().map(|index| Tag(arena.slots.count() + index))
    }

    fn give_back(&mut self, key: VolumeKey, tag: Tag) {
        let Self { volumes, arena, .. } = self;
        let Some(device) = volumes[key.0 as usize].as_deref_mut().and_then(|v| v.device.as_mut()) else { return };
        match tag.0.checked_sub(arena.slots.count()) {
            None => {
                device.arena_used -= 1;
                arena.free.push(tag.0);
            }
            Some(index) => device.own_free.push(index),
        }
        for key in std::mem::take(&mut self.starving) {
            self.ready.push_back(key);
        }
    }

    /// The connection was ended by somebody else: nothing can be asked or answered any more.
    fn broken(&mut self, key: VolumeKey, errno: Errno) {
        let Some(device) = self.device_mut(key) else { return };
        let (id, watch, fd) = (device.fuse.volume, device.watch, device.fuse.connection().as_raw_fd());
        let phase = std::mem::replace(&mut device.phase, Phase::Broken);
        if let Phase::Leaving(replies) = phase {
            device.phase = Phase::Leaving(replies);
        } else if matches!(phase, Phase::Serving) {
            tracing::error!(
                volume = %id,
                "its device was taken away ({errno}): somebody removed the loop device or aborted the FUSE connection; \
                 detach and attach the volume"
            );
        }
        self.unwatch(watch, fd);
    }

    /// Takes in the request in a slot: a new one, or one that a killed engine left.
    pub fn admit(&mut self, key: VolumeKey, tag: Tag) {
        let Self { volumes, arena, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let Some(device) = volume.device.as_mut() else { return };
        let Some(slot) = slot_of(arena, device, tag) else { return };
        let message = match slot.message() {
            Ok(message) => message,
            Err(error) => {
                tracing::error!(volume = %volume.id, %error, "the kernel sent what is no request");
                if matches!(error, Malformed::Arguments { .. }) {
                    write_reply(device, slot, &Reply::Error(Errno::EIO));
                }
                return self.free(key, tag);
            }
        };
        match message.dispatch(volume.size) {
            Dispatch::Submit(_) if matches!(device.phase, Phase::Fenced) => {
                write_reply(device, slot, &Reply::Error(Errno::EIO));
                self.free(key, tag);
            }
            Dispatch::Submit(request) => self.submit(key, tag, message, request),
            Dispatch::Answer(reply) => {
                write_reply(device, slot, &reply);
                self.free(key, tag);
            }
            Dispatch::Ignore => self.free(key, tag),
        }
    }

    fn submit(&mut self, key: VolumeKey, tag: Tag, message: Message, request: Request) {
        let since = self.now;
        let Some(device) = self.device_mut(key) else { return };
        let direction = Direction::of(request).unwrap_or(Direction::Flush);
        let bytes = request.range().map_or(0, |range| range.bytes());
        if let Some(place) = device.pending.get_mut(tag.0 as usize) {
            *place = Some(Pending { message, direction, bytes, since });
        }
        device.statistics.in_flight.fetch_add(1, Relaxed);
        self.in_flight += 1;
        if self.in_flight == 1 {
            self.next_patrol = since.0 + super::turn::PATROL;
        }
        let mirror = self.mirror_mut(key);
        if mirror.is_some_and(|mirror| mirror.guests.own_the_volume()) {
            return self.answer(key, tag, Err(DiskError::Fenced));
        }
        self.step(key, Input::Request { tag, request });
    }

    /// Gives the core an input; what follows is in the queue.
    pub fn step(&mut self, key: VolumeKey, input: Input) {
        let Self { volumes, outputs, work, now, .. } = self;
        let Some(volume) = volumes.get_mut(key.0 as usize).and_then(Option::as_deref_mut) else { return };
        if volume.mirror.is_some() {
            return self.step_mirrored(key, input);
        }
        let frees = matches!(input, Input::Completed { .. } | Input::SpaceFreed);
        volume.replica.step(*now, input, outputs);
        work.extend(outputs.drain(..).map(|output| Work::Output(key, output)));
        if frees {
            note_waiting(volume);
        }
    }

    pub fn output(&mut self, key: VolumeKey, output: Output) {
        match output {
            Output::Disk { operation, tag, request } => self.start(key, operation, tag, request),
            Output::Complete { tag, result } => {
                let guest = self.guest(tag);
                match guest {
                    Some(place) => self.answer_guest(key, place, result),
                    None if tag.0 >= self.arena.slots.count() + RESERVED_SLOTS => {
                        self.answer_operator(key, tag, result);
                    }
                    None => self.answer(key, tag, result),
                }
                self.step(key, Input::Replied { tag });
                if guest.is_some() {
                    self.guest_has_left(key);
                }
                self.let_go(key);
                self.open_if_quiet(key);
            }
            Output::Apply { .. }
            | Output::ApplyPiece { .. }
            | Output::Compare { .. }
            | Output::ReadPiece { .. }
            | Output::FlushHere { .. }
            | Output::Persist { .. }
            | Output::WriteHot { .. }
            | Output::Plan { .. }
            | Output::NextRange { .. }
            | Output::Send { .. }
            | Output::Propose { .. }
            | Output::ReadConfiguration
            | Output::FenceDevice => self.mirror_output(key, output),
        }
    }

    fn answer(&mut self, key: VolumeKey, tag: Tag, result: Result<(), DiskError>) {
        let Self { volumes, arena, now, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let Some(pending) = volume.pending(tag).and_then(Option::take) else { return };
        let Some(device) = volume.device.as_mut() else { return };
        note_errors(device, result);
        let result = result.map_err(|_| Errno::EIO);
        if let Some(slot) = slot_of(arena, device, tag) {
            // Persist, then promise: from here on a successor repeats the reply and does not execute the request again.
            slot.done(result);
            write_reply(device, slot, &pending.message.completion(result));
        }
        let took = now.0.saturating_sub(pending.since.0);
        device.statistics.answered(pending.direction, pending.bytes, took, result.is_err());
        if pending.direction == Direction::Write {
            self.statistics.device_bytes_written.fetch_add(pending.bytes, Relaxed);
        }
        device.statistics.in_flight.fetch_sub(1, Relaxed);
        self.in_flight -= 1;
        self.statistics.replies.fetch_add(1, Relaxed);
        self.free(key, tag);
    }

    /// Frees the slot, in shared memory first: what is free here may be filled again at once.
    pub fn free(&mut self, key: VolumeKey, tag: Tag) {
        if let Some(device) = self.volumes[key.0 as usize].as_deref().and_then(|volume| volume.device.as_ref())
            && let Some(slot) = slot_of(&self.arena, device, tag)
        {
            slot.free();
        }
        self.give_back(key, tag);
    }
}

/// Whether writes wait for space, for those who ask; a person hears of it once.
pub(super) fn note_waiting(volume: &Volume) {
    let Some(device) = volume.device.as_ref() else { return };
    let waiting = volume.replica.waiting_for_space() as u64;
    if device.statistics.waiting_for_space.swap(waiting, Relaxed) == 0 && waiting > 0 {
        tracing::warn!(volume = %volume.id, "a write waits: its pool is full");
    }
}

/// An error that a person must hear of, once.
fn note_errors(device: &Device, result: Result<(), DiskError>) {
    let (statistics, volume) = (&device.statistics, device.fuse.volume);
    match result {
        Ok(()) => {}
        Err(DiskError::Corrupt) => {
            if !statistics.corrupt.swap(true, Relaxed) {
                tracing::error!(%volume, "a read found damaged blocks");
            }
        }
        Err(DiskError::Failed | DiskError::NoSpace) => {
            if !statistics.disk_failed.swap(true, Relaxed) {
                tracing::error!(%volume, "its disk failed a request");
            }
        }
        Err(DiskError::Fenced) => {
            if !statistics.fenced.swap(true, Relaxed) {
                tracing::error!(%volume, "its device gets errors: another copy is the volume's primary, or shall be");
            }
        }
    }
}

fn read_request(connection: BorrowedFd<'_>, slot: Slot<'_>) -> Result<(), Errno> {
    let (memory, length) = slot.request_buffer();
    loop {
        // SAFETY: memory of the slot, which no request is in and which outlives the call.
        let count = unsafe { libc::read(connection.as_raw_fd(), memory.cast(), length) };
        match Errno::result(count) {
            Ok(_) => return Ok(()),
            // ENOENT: the request was withdrawn while it was being read.
            Err(Errno::EINTR | Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Writes an answer. Only a killed engine's request can have one already (ENOENT).
pub(super) fn write_reply(device: &Device, slot: Slot<'_>, reply: &Reply) {
    let (memory, length) = slot.encode(reply);
    loop {
        // SAFETY: `encode` returns memory of the slot.
        let count = unsafe { libc::write(device.fuse.connection().as_raw_fd(), memory.cast(), length) };
        match Errno::result(count) {
            // Nobody waits any more: answered before, or the connection is gone.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::ENOTCONN) => return,
            Err(Errno::EINTR) => {}
            Err(errno) => {
                tracing::error!(volume = %device.fuse.volume, %errno, ?reply, "the kernel refuses an answer");
                return;
            }
        }
    }
}
