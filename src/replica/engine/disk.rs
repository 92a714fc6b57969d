//! Between the stores and the disks: starts operations, executes what the stores want, hands completions back.
//!
//! Invariants: a pointer into a slot is used only while its operation runs, and the slot is busy as long; what a store
//! appends is executed in its order.
#![allow(unsafe_code, reason = "operations point into the slots of their requests")]

use super::commands::Copies;
use super::operations::{Kept, Purpose};
use super::tree::TreeKey;
use super::turn::{Engine, TICK, Work};
use super::volume::VolumeKey;
use crate::crash::crash_point;
use crate::protocol::{DiskError, Input, OperationId, Request, Tag};
use crate::replica::device::fuse::MAX_PAYLOAD;
use crate::replica::device::slots::RESERVED_SLOTS;
use crate::replica::io::{Operation, Token};
use crate::store::{Action, Buffer, ControlError as Refusal, File, Io, IoId, Job, JobOutcome};
use crate::volume::BLOCK_SIZE;
use std::sync::atomic::Ordering::Relaxed;

impl Engine {
    /// Starts what the core wants done on this node's copy.
    pub fn start(&mut self, key: VolumeKey, operation: OperationId, tag: Tag, request: Request) {
        if let Request::Seal(name) = request
            && let Some(volume) = self.volume_mut(key)
            && volume.mirror.is_some()
            && let Some(control) = volume.tickets.get(name.0 as usize).and_then(|ticket| Some(ticket.as_ref()?.control))
        {
            return self.seal_again(key, operation, control);
        }
        if self.volume_mut(key).is_some_and(|volume| volume.remote.is_some()) {
            return self.ask_primary(key, operation, request);
        }
        let memory = self.memory_of(key, tag);
        let Self { volumes, trees, arena, operations, actions, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let tree_key = volume.tree;
        let Some(tree) = trees[tree_key.0 as usize].as_mut() else { return };
        tree.under_way += 1;
        volume.running += 1;
        let id = operations.add(tree_key, Purpose::Core { volume: key, operation, memory, corrupt: false, kept: None });
        match request {
            Request::Seal(_) => {
                let index = (tag.0 - arena.slots.count() - RESERVED_SLOTS) as usize;
                if let Some(ticket) = volume.tickets[index].as_ref() {
                    tree.store.control(id, ticket.control, actions);
                }
            }
            Request::Read(_) | Request::Write(_) | Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) => {
                tree.store.start(id, volume.id, request, actions);
            }
        }
        self.collect_actions(tree_key);
    }

    /// Puts what a store appended into the queue, and the tree into the list of those that want ticks.
    pub fn collect_actions(&mut self, key: TreeKey) {
        let Self { work, actions, trees, ticking, next_tick, .. } = self;
        work.extend(actions.drain(..).map(|action| Work::Action(key, action)));
        let Some(tree) = trees[key.0 as usize].as_mut() else { return };
        let wanted = tree.wanted_tick(TICK);
        if let Some(due) = wanted {
            *next_tick = if ticking.is_empty() { due } else { due.min(*next_tick) };
            if tree.next_tick.is_none() {
                ticking.push(key);
            }
            tree.next_tick = wanted;
        }
    }

    pub fn act(&mut self, key: TreeKey, action: Action<Job>) {
        match action {
            Action::Io { io, file, what } => self.submit_io(key, io, file, what),
            Action::Zero { operation, offset, length } => {
                let memory = self.memory(operation, offset, length);
                // SAFETY: inside the slot of a request that waits for this operation.
                unsafe { std::ptr::write_bytes(memory, 0, length as usize) };
            }
            Action::Check { operation, offset, crc } => {
                let memory = self.memory(operation, offset, BLOCK_SIZE as u32);
                // SAFETY: as above, and the store says that the data is there.
                let block = unsafe { std::slice::from_raw_parts(memory, BLOCK_SIZE as usize) };
                let is_damaged = crc32c::crc32c(block) != crc;
                if let Some(Purpose::Core { corrupt, .. } | Purpose::Part { corrupt, .. }) =
                    self.operations.get(operation).map(|o| &mut o.purpose)
                {
                    *corrupt |= is_damaged;
                }
            }
            Action::Done { operation, result } => self.done(key, operation, result),
            Action::ControlDone { operation, result } => self.control_done(key, operation, result),
            Action::Job(job) => {
                if let Some(tree) = self.tree_mut(key) {
                    tree.under_way += 1;
                }
                self.jobs.start(key, job);
            }
        }
    }

    /// A part of the buffer of the request that started `operation`.
    fn memory(&mut self, operation: OperationId, offset: u32, length: u32) -> *mut u8 {
        assert!(offset as usize + length as usize <= MAX_PAYLOAD, "{length} bytes at {offset} of a request's buffer");
        match self.operations.get(operation).map(|o| &o.purpose) {
            // SAFETY: the payload of a slot is MAX_PAYLOAD long.
            Some(Purpose::Core { memory, .. } | Purpose::Part { memory, .. }) if !memory.is_null() => unsafe {
                memory.add(offset as usize)
            },
            // Only read from.
            Some(Purpose::Aside { data, .. }) if data.len() >= offset as usize + length as usize => {
                data[offset as usize..].as_ptr().cast_mut()
            }
            _ => panic!("{operation:?} has no buffer"),
        }
    }

    fn submit_io(&mut self, key: TreeKey, io: IoId, file: File, what: Io) {
        let mut address = |buffer: Buffer, length: u32| match buffer {
            Buffer::Request { operation, offset } => self.memory(operation, offset, length),
            Buffer::Store(memory) => memory.cast_mut(),
        };
        let operation = match what {
            Io::Read { offset, length, buffer } => Operation::Read { memory: address(buffer, length), length, offset },
            Io::Write { offset, length, buffer } => {
                let memory = address(buffer, length).cast_const();
                self.statistics.disk_bytes_written.fetch_add(u64::from(length), Relaxed);
                Operation::Write { memory, length, offset }
            }
            Io::Sync => Operation::Sync,
            Io::Punch { offset, length } => Operation::Punch { offset, length },
        };
        self.statistics.disk_operations.fetch_add(1, Relaxed);
        let Some(tree) = self.trees[key.0 as usize].as_mut() else { return };
        tree.under_way += 1;
        self.io.submit(Token((u64::from(key.0) << 32) | u64::from(io.0)), tree.files.fd(file), operation);
    }

    pub fn disk_done(&mut self, token: Token, result: Result<(), DiskError>) {
        let key = TreeKey((token.0 >> 32) as u32);
        let Self { trees, actions, .. } = self;
        let Some(tree) = trees[key.0 as usize].as_mut() else { return };
        tree.under_way -= 1;
        tree.store.completed(IoId(token.0 as u32), result, actions);
        self.collect_actions(key);
        // One completion's answers go out before the next one is looked at: at depth 1 that is the latency.
        self.pump();
        self.close_if_quiet(key);
    }

    pub fn job_done(&mut self, key: TreeKey, outcome: JobOutcome) {
        let Self { trees, actions, .. } = self;
        let Some(tree) = trees[key.0 as usize].as_mut() else { return };
        tree.under_way -= 1;
        tree.store.job_done(outcome, actions);
        self.collect_actions(key);
        self.pump();
        self.close_if_quiet(key);
    }

    fn done(&mut self, key: TreeKey, id: OperationId, result: Result<(), DiskError>) {
        let operation = self.operations.remove(id);
        let operation = operation.unwrap_or_else(|| panic!("the store finished {id:?}, which does not run"));
        assert_eq!(operation.tree, key, "the store finished an operation of another tree");
        let mut trusted = Ok(());
        if let Some(tree) = self.tree_mut(key) {
            tree.under_way -= 1;
            if tree.store.failure().is_some() {
                // What it reads may be older than what was acknowledged: no other copy is made equal to that.
                trusted = Err(DiskError::Failed);
            }
        }
        match operation.purpose {
            Purpose::Core { volume, operation, corrupt, kept, .. } => {
                self.ran(volume);
                let mut result = if corrupt { result.and(Err(DiskError::Corrupt)) } else { result };
                if let Some(Kept::Read(blocks)) = kept.map(|kept| *kept) {
                    result = result.and(trusted);
                    if result.is_ok() {
                        self.keep_read(volume, operation, blocks);
                    }
                }
                self.step(volume, Input::Completed { operation, result });
                self.after_core(volume);
            }
            Purpose::Part { volume, operation, corrupt, .. } => {
                self.ran(volume);
                let result = if corrupt { result.and(Err(DiskError::Corrupt)) } else { result };
                self.part_done(volume, operation, result.and(trusted));
                self.after_core(volume);
            }
            Purpose::FirstRecord(volume) => {
                self.ran(volume);
                self.first_record_done(volume, result);
            }
            Purpose::LastFlushOfDevice(volume) => self.flushed_for_good(volume, result),
            Purpose::LastFlushOfTree => {
                if let Err(error) = result {
                    self.stay_open(key, error);
                }
            }
            Purpose::Aside { reply, .. } => drop(reply.send(result.map_err(Into::into))),
            Purpose::Control { reply, .. } => {
                drop(reply.send(result.map(|()| Copies::new()).map_err(|e| Refusal::Disk(e).into())));
            }
        }
    }

    /// An operation of its core is over.
    fn ran(&mut self, key: VolumeKey) {
        if let Some(volume) = self.volume_mut(key) {
            volume.running -= 1;
        }
    }

    /// What was only lent for that input is gone, and so may be the core.
    fn after_core(&mut self, key: VolumeKey) {
        if let Some(mirror) = self.mirror_mut(key) {
            mirror.answer = None;
            self.close_if_done(key);
        }
    }

    fn seal_done(
        &mut self,
        key: VolumeKey,
        operation: OperationId,
        kept: Option<Box<Kept>>,
        result: Result<(), Refusal>,
    ) {
        let seal = match kept.map(|kept| *kept) {
            Some(Kept::Seal(control)) => Some(control),
            Some(Kept::Frame(_) | Kept::Read(_)) | None => None,
        };
        if let (Some(control), Err(Refusal::Busy), Some(mirror)) = (seal, result, self.mirror_mut(key)) {
            // It must happen at this point of the stream of writes on every copy: not answered, but tried again.
            mirror.busy.push((operation, control));
            return;
        }
        if seal.is_some() {
            crash_point("mirror.sealed");
        }
        self.note_seal(key, operation, result);
        let result = result.map_err(|refusal| match refusal {
            Refusal::Disk(error) => error,
            // It had no effect: no reason for a copy to take its disk for broken.
            _ if seal.is_some() => DiskError::NoSpace,
            _ => DiskError::Failed,
        });
        self.step(key, Input::Completed { operation, result });
    }

    fn control_done(&mut self, key: TreeKey, id: OperationId, result: Result<(), Refusal>) {
        let operation = self.operations.remove(id);
        let operation = operation.unwrap_or_else(|| panic!("the store finished {id:?}, which does not run"));
        if let Some(tree) = self.tree_mut(key) {
            tree.under_way -= 1;
        }
        match operation.purpose {
            Purpose::Core { volume, operation, kept, .. } => {
                self.ran(volume);
                self.seal_done(volume, operation, kept, result);
                self.after_core(volume);
            }
            Purpose::Control { reply, resized } => {
                if let (Ok(()), Some((volume, size))) = (result, resized)
                    && let Some(key) = self.volume_of(volume)
                    && let Some(volume) = self.volume_mut(key)
                    && volume.mirror.is_none()
                {
                    volume.size = volume.size.max(size);
                }
                drop(reply.send(result.map(|()| Copies::new()).map_err(Into::into)));
            }
            Purpose::LastFlushOfDevice(_)
            | Purpose::LastFlushOfTree
            | Purpose::FirstRecord(_)
            | Purpose::Aside { .. }
            | Purpose::Part { .. } => {}
        }
    }
}
