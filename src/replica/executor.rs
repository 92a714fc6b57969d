//! Drives a store that has no device: every action at once, blocking, in the caller's thread.
//!
//! The same store code as under a device, with plain reads and writes instead of a ring. Used by background copies.
#![allow(unsafe_code, reason = "a store's own buffers are named by address")]

use crate::memory::Memory;
use crate::protocol::{DiskError, OperationId, Request};
use crate::replica::engine::drain;
use crate::store::{Action, Buffer, Directory, File, Io, Job, LogSlot, Name, PENDING_BYTES, Pending, Store};
use crate::volume::{BlockRange, VolumeId};
use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// A store and its files.
pub struct Executor {
    store: Store,
    data: fs::File,
    logs: [fs::File; 2],
    next: u64,
}

impl Executor {
    /// Opens the tree at `path`, which nobody else has open.
    pub fn open(path: &Path) -> io::Result<Self> {
        let directory = Directory::new(path);
        let open = |name| {
            let options = fs::File::options().read(true).write(true).custom_flags(libc::O_DIRECT).clone();
            options.open(directory.path_of(name))
        };
        let data = open(Name::Data)?;
        let logs = [open(Name::Log(LogSlot::A))?, open(Name::Log(LogSlot::B))?];
        for file in [&data, &logs[0], &logs[1]] {
            drain(file)?;
        }
        let pending = Pending::over(Memory::zeros(PENDING_BYTES)?);
        let store = Store::open(Arc::new(directory), pending).map_err(io::Error::other)?;
        Ok(Self { store, data, logs, next: 0 })
    }

    /// Writes `data`, which is as long as `range` and starts at a page.
    pub fn write(&mut self, volume: VolumeId, range: BlockRange, data: &[u8]) -> io::Result<()> {
        self.run(volume, Request::Write(range), data)
    }

    /// Puts everything written on stable media.
    pub fn flush(&mut self, volume: VolumeId) -> io::Result<()> {
        self.run(volume, Request::Flush, &[])
    }

    fn run(&mut self, volume: VolumeId, request: Request, data: &[u8]) -> io::Result<()> {
        self.next += 1;
        let operation = OperationId(self.next);
        let mut out = Vec::new();
        self.store.start(operation, volume, request, &mut out);
        let mut queue: VecDeque<Action<Job>> = out.drain(..).collect();
        let mut answer = None;
        while let Some(action) = queue.pop_front() {
            match action {
                Action::Io { io, file, what } => {
                    let result = self.execute(file, what, data).map_err(|e| disk_error(&e));
                    self.store.completed(io, result, &mut out);
                }
                Action::Job(job) => self.store.job_done(job.run(), &mut out),
                Action::Done { operation: done, result } if done == operation => answer = Some(result),
                // Reads are never started here, and nobody waits for the others.
                Action::Done { .. } | Action::ControlDone { .. } | Action::Zero { .. } | Action::Check { .. } => {}
            }
            queue.extend(out.drain(..));
        }
        match answer {
            Some(Ok(())) => Ok(()),
            Some(Err(DiskError::NoSpace)) => Err(io::ErrorKind::StorageFull.into()),
            Some(Err(error)) => Err(io::Error::other(error)),
            None => Err(io::Error::other("the store did not answer")),
        }
    }

    fn execute(&self, file: File, what: Io, data: &[u8]) -> io::Result<()> {
        let file = match file {
            File::Data => &self.data,
            File::Log(LogSlot::A) => &self.logs[0],
            File::Log(LogSlot::B) => &self.logs[1],
            File::Mirror => return Err(io::Error::other("a tree that is being copied has no mirrored volumes")),
        };
        match what {
            Io::Write { offset, length, buffer: Buffer::Request { offset: at, .. } } => {
                file.write_all_at(&data[at as usize..(at + length) as usize], offset)
            }
            Io::Write { offset, length, buffer: Buffer::Store(memory) } => {
                // SAFETY: the store keeps its buffer valid and unchanged until the completion, which follows this call.
                let bytes = unsafe { std::slice::from_raw_parts(memory, length as usize) };
                file.write_all_at(bytes, offset)
            }
            Io::Sync => file.sync_data(),
            // Space that a copy frees while it writes is given back when the engine opens the tree.
            Io::Punch { .. } => Err(io::ErrorKind::Unsupported.into()),
            Io::Read { .. } => Err(io::Error::other("a copy reads nothing from its target")),
        }
    }
}

fn disk_error(error: &io::Error) -> DiskError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DiskError::NoSpace,
        _ => DiskError::Failed,
    }
}
