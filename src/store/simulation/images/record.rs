//! Records what a filesystem asks of its device, while the requests are served from memory.

#![allow(unsafe_code, reason = "requests are read into slots as the engine does it")]

use super::work::{self, Step};
use super::{Kind, Mounted, run};
use crate::protocol::Request;
use crate::replica::device::FuseLoop;
use crate::replica::device::fuse::{Dispatch, Malformed, Reply};
use crate::replica::device::loop_device;
use crate::replica::device::slots::{Slot, Slots};
use crate::volume::{InstanceId, VolumeId, VolumeSize};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// What happened, in the order in which it did. Numbers are those of [`Recording::requests`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The device was given a request.
    Submitted(usize),
    /// The request was answered.
    Completed(usize),
    /// The workload begins to do this.
    Started(Step),
    /// fsync has returned: from now on it must be there.
    Promised(Step),
}

/// A request that changes something, with what it writes.
pub struct Recorded {
    pub request: Request,
    pub data: Vec<u8>,
}

/// One run of the workload.
pub struct Recording {
    pub requests: Vec<Recorded>,
    pub events: Vec<Event>,
    /// Index of the event from which on the workload runs: a cut before is none of a filesystem.
    pub ready: usize,
}

#[derive(Default)]
struct Log {
    requests: Vec<Recorded>,
    events: Vec<Event>,
}

struct Server<'a> {
    device: FuseLoop,
    arena: Slots,
    image: RefCell<Vec<u8>>,
    log: &'a Mutex<Log>,
    stop: &'a AtomicBool,
}

/// Takes the device away on every path.
struct Attached<'a> {
    control: crate::replica::device::Control,
    volume: VolumeId,
    stop: &'a AtomicBool,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if loop_device::find_any(self.volume).is_some() && self.control.detach().is_err() {
            let _ = self.control.abort();
            let _ = loop_device::detach_all(self.volume);
        }
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Makes the filesystem on a device of ours, works on it, and returns what the device saw.
pub fn record(kind: &Kind) -> Recording {
    let (log, stop) = (Mutex::new(Log::default()), AtomicBool::new(false));
    let (arena, _memory) = Slots::create("tandem-images", 32).expect("slots");
    let device = FuseLoop::create(VolumeId::random(), InstanceId::random())
        .expect("a FUSE device: this test needs root and /dev/fuse");
    let attached = Attached { control: device.control().expect("control"), volume: device.volume, stop: &stop };
    let image = RefCell::new(vec![0; kind.bytes as usize]);
    let server = Server { device, arena, image, log: &log, stop: &stop };
    let ready = std::thread::scope(|scope| {
        let attached = attached;
        scope.spawn(move || server.run());
        let (device, _) = attached.control.attach().expect("a loop device");
        run(Command::new(kind.mkfs[0]).args(&kind.mkfs[1..]).arg(device.path())).expect("mkfs");
        let directory = tempfile::Builder::new().prefix("tandem-record-").tempdir().expect("a directory");
        let mounted =
            Mounted::new(&device.path(), &directory.path().join("mount"), kind.name, "discard").expect("mounts");
        let note = |event| log.lock().expect("no panic").events.push(event);
        work::prepare(&mounted.0, &note);
        let ready = log.lock().expect("no panic").events.len();
        work::work(&mounted.0, &note);
        mounted.end().expect("unmounts");
        attached.control.detach().expect("detaches");
        ready
    });
    let Log { requests, events } = log.into_inner().expect("no panic");
    Recording { requests, events, ready }
}

impl Server<'_> {
    fn run(&self) {
        let mut sequence = 1;
        while !self.stop.load(Ordering::Relaxed) {
            let _ = poll(&mut [PollFd::new(self.device.connection(), PollFlags::POLLIN)], PollTimeout::from(50u8));
            let mut taken = Vec::new();
            // All that wait are taken before one is answered: so many are in flight at once.
            for index in 0..self.arena.count() {
                let slot = self.arena.slot(index);
                slot.prepare(self.device.volume, sequence);
                sequence += 1;
                match self.take(slot) {
                    Ok(number) => taken.push((slot, number)),
                    Err(Errno::ENODEV) => return,
                    Err(_) => break,
                }
            }
            taken.into_iter().for_each(|(slot, number)| self.answer(slot, number));
        }
    }

    fn size(&self) -> VolumeSize {
        VolumeSize::try_from(self.image.borrow().len() as u64).expect("a size")
    }

    /// Reads a request, and records it if it changes something.
    fn take(&self, slot: Slot<'_>) -> Result<Option<usize>, Errno> {
        let (start, length) = slot.request_buffer();
        // SAFETY: the slot's own memory, which outlives the call.
        Errno::result(unsafe { libc::read(self.device.connection().as_raw_fd(), start.cast(), length) })?;
        let Ok(Dispatch::Submit(request)) = slot.message().map(|message| message.dispatch(self.size())) else {
            return Ok(None);
        };
        let data = match request {
            Request::Read(_) => return Ok(None),
            Request::Write(range) => {
                // SAFETY: the payload of the slot holds the largest request.
                unsafe { std::slice::from_raw_parts(slot.payload(), range.bytes() as usize) }.to_vec()
            }
            _ => Vec::new(),
        };
        let mut log = self.log.lock().expect("no panic");
        let number = log.requests.len();
        log.requests.push(Recorded { request, data });
        log.events.push(Event::Submitted(number));
        Ok(Some(number))
    }

    fn answer(&self, slot: Slot<'_>, number: Option<usize>) {
        let message = match slot.message() {
            Ok(message) => message,
            Err(Malformed::Arguments { .. }) => return self.reply(slot, &Reply::Error(Errno::EIO)),
            Err(Malformed::Header(_)) => return slot.free(),
        };
        match message.dispatch(self.size()) {
            Dispatch::Ignore => slot.free(),
            Dispatch::Answer(reply) => self.reply(slot, &reply),
            Dispatch::Submit(request) => {
                self.execute(request, slot);
                if let Some(number) = number {
                    self.log.lock().expect("no panic").events.push(Event::Completed(number));
                }
                self.reply(slot, &message.completion(Ok(())));
            }
        }
    }

    fn execute(&self, request: Request, slot: Slot<'_>) {
        let mut image = self.image.borrow_mut();
        match request {
            Request::Read(range) | Request::Write(range) => {
                let ours = &mut image[range.offset() as usize..][..range.bytes() as usize];
                // SAFETY: the payload of the slot holds the largest request, and nobody else uses it now.
                let payload = unsafe { std::slice::from_raw_parts_mut(slot.payload(), ours.len()) };
                if matches!(request, Request::Read(_)) {
                    payload.copy_from_slice(ours)
                } else {
                    ours.copy_from_slice(payload)
                }
            }
            Request::Discard(range) | Request::WriteZeroes(range) => {
                image[range.offset() as usize..][..range.bytes() as usize].fill(0);
            }
            Request::Flush | Request::Seal(_) => {}
        }
    }

    fn reply(&self, slot: Slot<'_>, reply: &Reply) {
        let (start, length) = slot.encode(reply);
        // SAFETY: the slot's own memory. ENOENT, which may come: the kernel has given the request up.
        unsafe { libc::write(self.device.connection().as_raw_fd(), start.cast(), length) };
        slot.free();
    }
}
