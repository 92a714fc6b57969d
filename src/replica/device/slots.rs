//! Request slots: shared memory that keeps each device request while the engine may die.
//!
//! ```text
//!   one slot                                  read(fuse) ──┐                      ┌── payload, page aligned
//!   0        64                              4016          v            4096      v
//!   | header | reply without data ...        | FUSE header, arguments   | <= 1 MiB          |
//!                                                       4080 ^ reply header of a READ: one write(2) sends both
//!
//!   free ── prepare(volume), then the kernel's read fills it ──> filled ── done(result) ──> done ── free() ──> free
//! ```
//! # Invariants
//! * The volume is stored before the read, so a filled slot always says whose it is; the kernel's `unique` != 0 is what
//!   makes it filled.
//! * Filled slots are executed again in the order in which they were read: one that had an effect which a read saw must
//!   not come back over a newer one.
//! * A mutating request is marked done before its reply is written, and freed after: a new engine executes filled slots
//!   again and only repeats the reply of done ones.
//! * A slot is populated and locked before a request is read into it: a page fault inside the kernel's copy with SIGKILL
//!   pending would end the request with EIO. The arena is so from the start; a volume's own slot, which most volumes never
//!   need, before its first use ([`Slot::prepare`]).
//! * What a volume without a copy here must not forget ([`Slot::keep_lost`]) is written in three steps, of which the first says
//!   that nothing is kept: it changes only while nothing depends on it.
//! * What a disk may still use for a killed engine when nobody waits for it any more rests, also under the next engines, until
//!   that disk was drained: its place has the name of a tree then, never that of a volume.
//! * Shared memory never leaves the machine: fields are in host byte order; a memfd with another version is refused.
#![allow(unsafe_code, reason = "shared memory that the kernel fills")]

use super::fuse::{MAX_PAYLOAD, MAX_REPLY, Malformed, Message, REPLY_HEADER, Reply, WRITE_HEADER};
use crate::protocol::{ConfigurationVersion, Generation, Stamp};
use crate::volume::{InstanceId, VolumeId};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, munmap};
use std::cell::Cell;
use std::ffi::{CString, c_void};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Slots that all volumes of a node share: enough for the deepest queue that was measured to help, twice.
pub const ARENA_SLOTS: u32 = 64;
/// Slots of a volume's own: one, so that no neighbour can keep it from going on.
pub const RESERVED_SLOTS: u32 = 1;
/// Most slots of one memfd: what a damaged length may make us map.
const MAX_SLOTS: usize = 1024;

const MAGIC: [u8; 8] = *b"TDMSLOT\0";
const VERSION: u32 = 1;
/// No incompatible feature exists yet; an unknown bit is refused.
const INCOMPATIBLE: u32 = 0;

const AT_VERSION: usize = 8;
const AT_COMPATIBLE: usize = 12;
const AT_INCOMPATIBLE: usize = 16;
const AT_INDEX: usize = 20;
const AT_STATE: usize = 24;
const AT_RESULT: usize = 28;
const AT_VOLUME: usize = 32;
const AT_SEQUENCE: usize = 48;
const AT_REPLY: usize = 64;
/// Whether anything is kept (8), generation (8), version (8); zeros in memory that an older Tandem has made.
const AT_LOST: usize = 2048;
const PAYLOAD: usize = 4096;
const AT_REQUEST: usize = PAYLOAD - WRITE_HEADER;
const AT_UNIQUE: usize = AT_REQUEST + 8;
const STRIDE: usize = PAYLOAD + MAX_PAYLOAD;
const _: () = assert!(AT_REPLY + MAX_REPLY <= AT_LOST && AT_LOST + 24 <= AT_REQUEST);

const OPEN: u32 = 0;
const DONE: u32 = 1;
const RESTING: u32 = 2;

/// Why slots could not be made or taken over.
#[derive(Debug, thiserror::Error)]
pub enum SlotsError {
    /// A system call failed.
    #[error("request slots: {call}: {errno}")]
    System {
        /// The call.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// The descriptor is no memory of slots.
    #[error("request slots: the kept memory has {length} bytes, which is no number of slots of {STRIDE} bytes")]
    Length {
        /// Bytes found.
        length: i64,
    },
    /// The memory holds something else, or was damaged.
    #[error("request slots: slot {index} does not start with the mark of a slot")]
    Foreign {
        /// Number of the slot.
        index: u32,
    },
    /// Written by another version of Tandem.
    #[error(
        "request slots: kept by another version of Tandem (format {found}, features {features:#x}; this one knows format \
         {VERSION}); start that version again, detach the volumes, then upgrade"
    )]
    Version {
        /// Format version found.
        found: u32,
        /// Incompatible features found.
        features: u32,
    },
}

fn system(call: &'static str) -> impl Fn(Errno) -> SlotsError {
    move |errno| SlotsError::System { call, errno }
}

/// A mapped memfd of slots. One thread owns it; the kernel writes into it where that thread says.
#[derive(Debug)]
pub struct Slots {
    base: NonNull<u8>,
    /// By slot: whether it is populated, and locked if that is allowed.
    populated: Vec<Cell<bool>>,
    locked: Cell<bool>,
}

// SAFETY: the mapping belongs to the value and is not tied to a thread.
unsafe impl Send for Slots {}

impl Slots {
    /// Makes a memfd of `count` free slots. Give the descriptor to the holder before the first request is read.
    pub fn create(name: &str, count: u32) -> Result<(Self, OwnedFd), SlotsError> {
        let name = CString::new(name).map_err(|_| SlotsError::System { call: "memfd_create", errno: Errno::EINVAL })?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(name.as_c_str(), flags).map_err(system("memfd_create"))?;
        let bytes = STRIDE as i64 * i64::from(count);
        nix::unistd::ftruncate(&fd, bytes).map_err(system("ftruncate"))?;
        // Nobody can cut it off under our mapping.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(system("fcntl(F_ADD_SEALS)"))?;
        let slots = Self::map_memory(fd.as_fd())?;
        for index in 0..slots.count() {
            slots.slot(index).format();
        }
        Ok((slots, fd))
    }

    /// Takes over what an earlier engine left; checks the format of every slot.
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, SlotsError> {
        let slots = Self::map_memory(fd)?;
        for index in 0..slots.count() {
            slots.slot(index).check()?;
        }
        Ok(slots)
    }

    fn map_memory(fd: BorrowedFd<'_>) -> Result<Self, SlotsError> {
        let length = nix::sys::stat::fstat(fd).map_err(system("fstat"))?.st_size;
        let bytes = usize::try_from(length)
            .ok()
            .and_then(NonZeroUsize::new)
            .filter(|bytes| bytes.get().is_multiple_of(STRIDE) && bytes.get() / STRIDE <= MAX_SLOTS)
            .ok_or(SlotsError::Length { length })?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, fd, 0) }.map_err(system("mmap"))?;
        let populated = vec![Cell::new(false); bytes.get() / STRIDE];
        Ok(Self { base: memory.cast(), populated, locked: Cell::new(true) })
    }

    /// Number of slots.
    pub fn count(&self) -> u32 {
        self.populated.len() as u32
    }

    /// Whether the memory in use is locked; where it is not, a swapped-out page can cost a request at a kill.
    pub fn locked(&self) -> bool {
        self.locked.get()
    }

    /// Populates and locks all slots now: some milliseconds for the arena, which no request shall wait for.
    pub fn populate(&self) {
        (0..self.count()).for_each(|index| self.populate_one(index));
    }

    fn populate_one(&self, index: u32) {
        if self.populated[index as usize].replace(true) {
            return;
        }
        let base = self.slot(index).base;
        // SAFETY: inside the mapping. Not allowed (RLIMIT_MEMLOCK) means that it may be swapped out: `locked` says so.
        if unsafe { mlock(base.cast(), STRIDE) }.is_err() {
            self.locked.set(false);
            for page in (0..STRIDE).step_by(PAYLOAD) {
                // SAFETY: inside the slot. Writes back what is there: it may hold a killed engine's request.
                unsafe { base.add(page).write_volatile(base.add(page).read_volatile()) };
            }
        }
    }

    /// Slot `index`.
    ///
    /// # Panics
    /// When there is no such slot: indices come from [`Slots::count`], never from shared memory.
    pub fn slot(&self, index: u32) -> Slot<'_> {
        assert!(index < self.count(), "slot {index} of {}", self.count());
        // SAFETY: inside the mapping, by the line above.
        let base = unsafe { self.base.add(index as usize * STRIDE) };
        Slot { base, index, slots: self }
    }

    /// The slots that a killed engine left: filled ones to execute again, done ones whose reply to repeat.
    pub fn recovered(&self) -> impl Iterator<Item = Slot<'_>> {
        (0..self.count()).map(|index| self.slot(index)).filter(|slot| slot.state() != SlotState::Free)
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map_memory`; slots borrow from `self`.
        let unmapped = unsafe { munmap(self.base.cast::<c_void>(), self.populated.len() * STRIDE) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

/// Where a slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// No request.
    Free,
    /// The kernel's request is in it and was not executed to its end.
    Filled,
    /// Executed, with this result; the reply may have been written.
    Done(Result<(), Errno>),
    /// Its request is gone, and the disk of this tree may still read from it or write into it.
    Resting(InstanceId),
}

/// One slot. Copies of it are the same memory; what it returns never borrows that memory.
#[derive(Clone, Copy)]
pub struct Slot<'a> {
    base: NonNull<u8>,
    index: u32,
    slots: &'a Slots,
}

impl Slot<'_> {
    /// Its number.
    pub fn index(self) -> u32 {
        self.index
    }

    /// Its state, also after a kill at any moment.
    pub fn state(self) -> SlotState {
        if self.unique().load(Ordering::Acquire) == 0 {
            return SlotState::Free;
        }
        match (self.word(AT_STATE).load(Ordering::Acquire), self.word(AT_RESULT).load(Ordering::Relaxed)) {
            (OPEN, _) => SlotState::Filled,
            (RESTING, _) => SlotState::Resting(InstanceId::from_bytes(self.volume().to_bytes())),
            (_, 0) => SlotState::Done(Ok(())),
            (_, errno) => SlotState::Done(Err(Errno::from_raw(errno as i32))),
        }
    }

    /// The volume whose request it holds or waits for.
    pub fn volume(self) -> VolumeId {
        let mut bytes = [0; 16];
        self.read(AT_VOLUME, &mut bytes);
        VolumeId::from_bytes(bytes)
    }

    /// The place of the request in the order of arrival of its volume. (The kernel's number is none: it counts per CPU.)
    pub fn sequence(self) -> u64 {
        self.long(AT_SEQUENCE).load(Ordering::Relaxed)
    }

    /// Makes the slot ready for a read from the descriptor of `volume`; call it before every such read. `sequence` rises
    /// with every request that is read, also from one engine to the next: filled slots are executed again in that order.
    pub fn prepare(self, volume: VolumeId, sequence: u64) {
        self.slots.populate_one(self.index);
        self.unique().store(0, Ordering::Relaxed);
        self.word(AT_STATE).store(OPEN, Ordering::Release);
        self.word(AT_RESULT).store(0, Ordering::Relaxed);
        self.write(AT_VOLUME, &volume.to_bytes());
        self.long(AT_SEQUENCE).store(sequence, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Where one read(2) from /dev/fuse puts a request: address and length.
    pub fn request_buffer(self) -> (*mut u8, usize) {
        (self.at(AT_REQUEST), WRITE_HEADER + MAX_PAYLOAD)
    }

    /// The payload: a WRITE's data, or where a READ's data goes. [`MAX_PAYLOAD`] bytes, page aligned.
    pub fn payload(self) -> *mut u8 {
        self.at(PAYLOAD)
    }

    /// Copies the payload from `offset` on, of a WRITE that is not answered.
    pub fn copy(self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= MAX_PAYLOAD, "{} bytes at {offset} of a slot", into.len());
        self.read(PAYLOAD + offset, into);
    }

    /// Puts bytes into the payload, of a READ that is not answered.
    pub fn put(self, data: &[u8]) {
        assert!(data.len() <= MAX_PAYLOAD, "{} bytes into a slot", data.len());
        // SAFETY: the payload is MAX_PAYLOAD long, by the line above; `data` is memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.payload(), data.len()) }
    }

    /// The request in a slot that is not free.
    pub fn message(self) -> Result<Message, Malformed> {
        // Everything but the payload of a WRITE and the one long name that a LOOKUP can have, which is not ours.
        let mut bytes = [0; WRITE_HEADER + 256];
        self.read(AT_REQUEST, &mut bytes);
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let length = length.clamp(super::fuse::HEADER, bytes.len());
        Message::parse(&bytes[..length])
    }

    /// The kernel's number of the request; 0 in a free slot.
    pub fn request_number(self) -> u64 {
        self.unique().load(Ordering::Relaxed)
    }

    /// Marks the request as executed. Persist, then promise: call it before the reply of a mutating request is written.
    pub fn done(self, result: Result<(), Errno>) {
        let errno = result.err().map_or(0, |errno| errno as u32);
        self.word(AT_RESULT).store(errno, Ordering::Relaxed);
        self.word(AT_STATE).store(DONE, Ordering::SeqCst);
    }

    /// Puts the reply into the slot; one write(2) of the returned bytes to /dev/fuse answers the request.
    /// For [`Reply::Data`] the payload must be there already.
    pub fn encode(self, reply: &Reply) -> (*const u8, usize) {
        let (bytes, length) = reply.encode(self.request_number());
        match reply {
            Reply::Data { length: data } => {
                self.write(PAYLOAD - REPLY_HEADER, &bytes[..REPLY_HEADER]);
                (self.at(PAYLOAD - REPLY_HEADER), REPLY_HEADER + (*data as usize).min(MAX_PAYLOAD))
            }
            _ => {
                self.write(AT_REPLY, &bytes[..length]);
                (self.at(AT_REPLY), length)
            }
        }
    }

    /// Frees the slot: its reply was written, or it had none.
    pub fn free(self) {
        self.unique().store(0, Ordering::SeqCst);
        self.word(AT_STATE).store(OPEN, Ordering::Relaxed);
    }

    /// Nobody executes or answers its request any more, and it is not free before the disk of `tree` was drained.
    pub fn rest(self, tree: InstanceId) {
        // Killed before the next line it waits for a tree that is named as the volume: for ever, and in nobody's way.
        self.word(AT_STATE).store(RESTING, Ordering::SeqCst);
        self.write(AT_VOLUME, &tree.to_bytes());
    }

    /// What the copies of the volume whose own slot this is had lost when its device was served last.
    pub fn lost(self) -> Option<Stamp> {
        let [kept, generation, version] = [0, 8, 16].map(|at| self.long(AT_LOST + at).load(Ordering::SeqCst));
        let stamp = Stamp { generation: Generation(generation), version: ConfigurationVersion(version) };
        (kept == 1).then_some(stamp)
    }

    /// Keeps that, for the next engine. To be called before anything is completed that depends on it.
    pub fn keep_lost(self, lost: Stamp) {
        if self.lost() == Some(lost) {
            return;
        }
        let numbers = [(0, 0), (8, lost.generation.0), (16, lost.version.0), (0, 1)];
        numbers.iter().for_each(|(at, number)| self.long(AT_LOST + at).store(*number, Ordering::SeqCst));
    }

    fn format(self) {
        self.write(0, &MAGIC);
        self.word(AT_VERSION).store(VERSION, Ordering::Relaxed);
        self.word(AT_COMPATIBLE).store(0, Ordering::Relaxed);
        self.word(AT_INCOMPATIBLE).store(INCOMPATIBLE, Ordering::Relaxed);
        self.word(AT_INDEX).store(self.index, Ordering::Relaxed);
        self.free();
    }

    fn check(self) -> Result<(), SlotsError> {
        let mut magic = [0; 8];
        self.read(0, &mut magic);
        let load = |offset| self.word(offset).load(Ordering::Relaxed);
        let (found, features) = (load(AT_VERSION), load(AT_INCOMPATIBLE));
        if magic != MAGIC {
            Err(SlotsError::Foreign { index: self.index })
        } else if found != VERSION || features & !INCOMPATIBLE != 0 {
            Err(SlotsError::Version { found, features })
        } else if load(AT_INDEX) != self.index {
            Err(SlotsError::Foreign { index: self.index })
        } else {
            Ok(())
        }
    }

    fn at(self, offset: usize) -> *mut u8 {
        debug_assert!(offset < STRIDE);
        // SAFETY: inside the slot.
        unsafe { self.base.as_ptr().add(offset) }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: aligned constants inside the slot, which lives as long as the borrow; shared memory is only ever
        // accessed atomically here.
        unsafe { AtomicU32::from_ptr(self.at(offset).cast()) }
    }

    fn unique(&self) -> &AtomicU64 {
        self.long(AT_UNIQUE)
    }

    fn long(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `word`; the offsets are multiples of 8 and slots are page aligned.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    fn read(self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= STRIDE);
        // SAFETY: inside the slot, by the line above; `into` is memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(self.at(offset), into.as_mut_ptr(), into.len()) }
    }

    fn write(self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAYLOAD);
        // SAFETY: inside the slot's first page, by the line above; `bytes` is memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset), bytes.len()) }
    }
}

#[cfg(test)]
mod tests;
