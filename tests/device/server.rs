//! A minimal engine: serves one volume out of a file through the real device layer, one batch of slots after the other.

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tandem::protocol::Request;
use tandem::replica::device::FuseLoop;
use tandem::replica::device::fuse::{Dispatch, Malformed, Reply};
use tandem::replica::device::slots::{Slot, SlotState, Slots};
use tandem::volume::{BlockRange, VolumeSize};

/// What the test changes while the server runs.
pub struct Shared {
    pub size: AtomicU64,
    pub stop: AtomicBool,
    /// Answers nothing as long as this is set.
    pub paused: AtomicBool,
    /// How long a filled slot waits before it is executed: what a kill then finds.
    pub delay: Duration,
    /// After so many requests it reads one more, makes this file and hangs.
    pub hang: Option<(usize, PathBuf)>,
}

pub struct Server<'a> {
    pub shared: &'a Shared,
    pub device: FuseLoop,
    pub arena: Slots,
    pub file: File,
}

pub fn open_direct(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_DIRECT);
    options.open(path).expect("the backing file")
}

impl Server<'_> {
    /// Serves until the connection ends or the test stops it; returns how many requests it took over.
    pub fn run(&self) -> usize {
        let (mut recovered, mut sequence, mut served) = (0, 1, 0);
        for slot in self.slots().filter(|slot| slot.state() != SlotState::Free) {
            assert_eq!(slot.volume(), self.device.volume);
            self.finish(slot);
            recovered += 1;
        }
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.shared.paused.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            let mut ready = [PollFd::new(self.device.connection(), PollFlags::POLLIN)];
            let _ = poll(&mut ready, PollTimeout::from(50u8));
            let mut filled = vec![];
            for slot in self.slots() {
                slot.prepare(self.device.volume, sequence);
                sequence += 1;
                match self.read(slot) {
                    Ok(()) => filled.push(slot),
                    Err(Errno::ENODEV) => return recovered,
                    Err(_) => break,
                }
            }
            served += filled.len();
            if let Some((after, said)) = &self.shared.hang
                && served > *after
            {
                std::fs::write(said, "").expect("write");
                // For ever: a thread may wake up by itself.
                loop {
                    std::thread::park();
                }
            }
            std::thread::sleep(if filled.is_empty() { Duration::ZERO } else { self.shared.delay });
            filled.into_iter().for_each(|slot| self.finish(slot));
        }
        recovered
    }

    fn slots(&self) -> impl Iterator<Item = Slot<'_>> {
        let reserved = (0..self.device.slots.count()).map(|index| self.device.slots.slot(index));
        reserved.chain((0..self.arena.count()).map(|index| self.arena.slot(index)))
    }

    fn read(&self, slot: Slot<'_>) -> Result<(), Errno> {
        let (start, length) = slot.request_buffer();
        let fd = self.device.connection().as_raw_fd();
        // SAFETY: the slot's own memory, which outlives the call.
        Errno::result(unsafe { libc::read(fd, start.cast(), length) }).map(drop)
    }

    fn finish(&self, slot: Slot<'_>) {
        let message = match slot.message() {
            Ok(message) => message,
            Err(Malformed::Arguments { .. }) => return self.reply(slot, &Reply::Error(Errno::EIO)),
            Err(Malformed::Header(_)) => return slot.free(),
        };
        let size = VolumeSize::try_from(self.shared.size.load(Ordering::Relaxed)).expect("a size");
        match message.dispatch(size) {
            Dispatch::Ignore => slot.free(),
            Dispatch::Answer(reply) => self.reply(slot, &reply),
            Dispatch::Submit(request) => {
                let result = match slot.state() {
                    SlotState::Done(result) => result,
                    _ => self.execute(request, slot),
                };
                if request.is_mutation() {
                    slot.done(result);
                }
                self.reply(slot, &message.completion(result));
            }
        }
    }

    fn reply(&self, slot: Slot<'_>, reply: &Reply) {
        let (start, length) = slot.encode(reply);
        let fd = self.device.connection().as_raw_fd();
        // SAFETY: the slot's own memory. ENOENT: the kernel has no such request any more.
        let written = Errno::result(unsafe { libc::write(fd, start.cast(), length) });
        assert!(written.is_ok_and(|count| count as usize == length) || written == Err(Errno::ENOENT), "{written:?}");
        slot.free();
    }

    fn execute(&self, request: Request, slot: Slot<'_>) -> Result<(), Errno> {
        let fd = self.file.as_fd();
        match request {
            Request::Read(range) => self.transfer(range, |fd, length, offset| {
                // SAFETY: the payload of the slot holds the largest request.
                unsafe { libc::pread(fd.as_raw_fd(), slot.payload().cast(), length, offset) }
            }),
            Request::Write(range) => self.transfer(range, |fd, length, offset| {
                // SAFETY: as above.
                unsafe { libc::pwrite(fd.as_raw_fd(), slot.payload().cast(), length, offset) }
            }),
            Request::Flush => nix::unistd::fdatasync(fd),
            Request::Discard(range) | Request::WriteZeroes(range) => {
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(fd, flags, range.offset() as i64, range.bytes() as i64)
            }
            Request::Seal(_) => Err(Errno::EOPNOTSUPP),
        }
    }

    fn transfer(&self, range: BlockRange, call: impl Fn(BorrowedFd<'_>, usize, i64) -> isize) -> Result<(), Errno> {
        let moved = Errno::result(call(self.file.as_fd(), range.bytes() as usize, range.offset() as i64))?;
        // The file has the volume's size, so nothing is short.
        if moved as u64 == range.bytes() { Ok(()) } else { Err(Errno::EIO) }
    }
}
