//! Flushes: what makes completed writes and changes of the map durable, in the right order.
//!
//! ```text
//!   Idle ──> Data: fdatasync(data) ──> Append: write the log ──> Log: fdatasync(log) ──> Idle, whoever waited is answered
//!               └─ nothing changed in the map ─────────────────────────────────────────────^
//! ```
//! Invariants: one commit at a time; it takes all records that are pending when it begins, and their data was written
//! before, so one fdatasync of `data` covers them (**data before map**); who asks while one runs waits for the next one.
//! A failed fdatasync is never tried again: the kernel may have dropped what it could not write and would say "done".

use super::allocator::Batch;
use super::format::{BLOCK, LayerId};
use super::job::{CheckpointJob, Job};
use super::log::{BLOCK_CHANGES, Writer};
use super::requests::InFlight;
use super::tree::Tree;
use super::{Action, Buffer, ControlError, File, Io, LogSlot, Store};
use crate::protocol::{DiskError, OperationId};
use crate::volume::VolumeId;

/// Who waits for a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    Flush(OperationId),
    Control(OperationId),
    /// And from then on the layer never changes.
    Seal(OperationId, LayerId),
    /// The mirror's record of the volume may name its new base.
    Base(VolumeId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Data,
    Append,
    Log,
}

/// What failed for good: nothing is flushed any more until the tree is opened again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Written data may be lost although it was acknowledged.
    #[error("the disk failed to make written data durable: what was written since the last flush may be lost")]
    DataSync,
    /// Changes of the map could not be made durable.
    #[error("the disk failed to write the map log")]
    Log,
}

/// The state of the commits of one tree.
pub(super) struct Commit {
    phase: Phase,
    failure: Option<Failure>,
    /// A write completed since the last fdatasync of `data` was issued.
    pub unsynced: bool,
    /// Commits begun, and durable. What is recorded now will be in commit `begun + 1`.
    begun: u64,
    durable: u64,
    waiting: Vec<Waiter>,
    served: Vec<Waiter>,
    /// Seals whose layer still has writes in flight.
    sealing: Vec<(OperationId, LayerId)>,
    batch: Option<Batch>,
    has_records: bool,
    writer: Writer,
    /// Where the running commit's blocks are: offset in the log, address in the writer's memory, bytes.
    append: (u64, usize, u32),
    /// Blocks of the current log that are durable.
    durable_blocks: u64,
    log_blocks: u64,
    /// Blocks of the largest commit.
    largest: u64,
    /// Generation of the checkpoint on disk: logs of this epoch and later ones are needed.
    generation: u64,
    /// The tree was opened from two logs and no space for a checkpoint: both are needed until one is made of where the second
    /// one ends.
    owes_checkpoint: bool,
    /// The tree as of the end of the current log, taken when its last commit began.
    snapshot: Option<Box<Tree>>,
    /// No more commits go to the current log.
    log_ended: bool,
    /// A checkpoint that failed, to be tried again.
    retry: Option<CheckpointJob>,
    /// A commit is wanted although nobody waits for it.
    pub is_due: bool,
    /// Blocks of the current log that the log itself says are durable, and blocks that should be.
    witnessed: u64,
    to_witness: u64,
}

impl Commit {
    /// Goes on after what is durable in the log, over the checkpoint of `generation`; `to_witness` blocks of it have nothing
    /// behind them that says so.
    pub fn new(writer: Writer, generation: u64, log_blocks: u64, largest: u64, to_witness: u64) -> Self {
        Self {
            phase: Phase::Idle,
            failure: None,
            // What a killed process wrote may be in a cache only.
            unsynced: true,
            begun: 0,
            durable: 0,
            waiting: Vec::new(),
            served: Vec::new(),
            sealing: Vec::new(),
            batch: None,
            has_records: false,
            generation,
            owes_checkpoint: generation != writer.position().epoch,
            durable_blocks: writer.position().sequence,
            writer,
            append: (0, 0, 0),
            log_blocks,
            largest,
            snapshot: None,
            log_ended: false,
            retry: None,
            is_due: false,
            witnessed: 0,
            to_witness,
        }
    }

    pub fn failure(&self) -> Option<Failure> {
        self.failure
    }

    /// The number of the commit that what is recorded now will be in.
    pub fn next(&self) -> u64 {
        self.begun + 1
    }

    pub fn is_durable(&self, commit: u64) -> bool {
        self.durable >= commit
    }

    /// Lets the caller wait for the next commit.
    pub fn wait(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
    }

    /// Lets a seal wait until no write into its layer is in flight, and then for the next commit, whose fdatasync makes
    /// what those writes did as durable as the seal.
    pub fn wait_for_writers(&mut self, operation: OperationId, layer: LayerId) {
        self.sealing.push((operation, layer));
    }

    /// Whether the last commit could be lost to damage and look like one that was torn.
    pub fn wants_witness(&self) -> bool {
        self.witnessed < self.to_witness && !self.log_ended
    }

    /// Changes of maps that find room in both logs, at most.
    pub fn changes_left(&self) -> u64 {
        (2 * self.log_blocks).saturating_sub(self.durable_blocks) * BLOCK_CHANGES
    }

    /// Whether the half of the log is used.
    pub fn is_half_full(&self) -> bool {
        self.durable_blocks >= self.log_blocks / 2
    }

    pub fn can_retry_checkpoint(&self) -> bool {
        self.retry.is_some()
    }

    #[cfg(test)]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    #[cfg(test)]
    pub fn owes_checkpoint(&self) -> bool {
        self.owes_checkpoint
    }

    /// No more commits go to the log, whose end is the tree: it was opened without room for one, and without space for a checkpoint.
    pub fn end_log(&mut self, tree: &Tree) {
        self.snapshot = Some(Box::new(tree.frozen()));
        self.log_ended = true;
    }

    /// Whether the log has ended and a checkpoint of that can be begun: only right after opening.
    pub fn can_rotate(&self) -> bool {
        self.snapshot.is_some() && self.log_ended && (self.owes_checkpoint || self.is_other_free())
    }

    fn is_other_free(&self) -> bool {
        self.generation == self.writer.position().epoch
    }

    /// Goes on in the other log, which nothing needs any more.
    fn begin_log(&mut self) {
        self.writer.begin_epoch();
        (self.durable_blocks, self.witnessed, self.to_witness) = (0, 0, 0);
        self.log_ended = false;
    }
}

/// The log of an epoch.
pub(super) fn slot_of(epoch: u64) -> LogSlot {
    if epoch.is_multiple_of(2) { LogSlot::A } else { LogSlot::B }
}

impl Store {
    pub(super) fn start_flush(&mut self, operation: OperationId, out: &mut Vec<Action<Job>>) {
        let idle = self.commit.phase == Phase::Idle && self.pending.is_empty() && !self.requests.has_stalled();
        if idle && !self.commit.unsynced && self.commit.failure.is_none() {
            // Nothing was written since the last fdatasync that succeeded was issued.
            return out.push(Action::Done { operation, result: Ok(()) });
        }
        self.commit.wait(Waiter::Flush(operation));
    }

    /// Lets the seals go on whose layer cannot change any more: nor can the layers below it, through which it is seen.
    pub(super) fn resume_seals(&mut self) {
        let (tree, commit) = (&self.tree, &mut self.commit);
        let waiting = &mut commit.waiting;
        commit.sealing.retain(|&(operation, layer)| {
            let is_written = tree.path(layer).any(|(_, layer)| layer.writers > 0);
            if !is_written {
                waiting.push(Waiter::Seal(operation, layer));
            }
            is_written
        });
    }

    /// Begins a commit if one is wanted and none runs. To be called at the end of everything that may want one.
    pub(super) fn pump(&mut self, out: &mut Vec<Action<Job>>) {
        if self.mirrors.waits_for_room {
            self.mirror_step(out);
        }
        if self.commit.failure.is_some() {
            self.fail_waiters(out);
            return self.resume_stalled(out);
        }
        while self.commit.phase == Phase::Idle && self.wants_commit() {
            if self.commit.log_ended && (!self.pending.is_empty() || self.commit.waiting.is_empty()) {
                // The other log is still needed: a checkpoint is being written. Everything waits, nothing is lost.
                return;
            }
            self.begin_commit(out);
        }
    }

    fn wants_commit(&self) -> bool {
        !self.commit.waiting.is_empty()
            || self.commit.is_due
            || self.pending.is_half_full()
            || self.requests.has_stalled()
    }

    fn begin_commit(&mut self, out: &mut Vec<Action<Job>>) {
        self.commit.begun += 1;
        // One that nobody waits for writes a block in any case: it says that the blocks before it were durable once.
        let is_due = std::mem::take(&mut self.commit.is_due) && self.commit.wants_witness();
        std::mem::swap(&mut self.commit.waiting, &mut self.commit.served);
        self.commit.has_records = !self.pending.is_empty() || is_due;
        self.commit.batch = Some(self.allocator.begin_batch());
        if self.commit.has_records {
            self.encode_commit();
            self.resume_stalled(out);
        }
        // Everything that is recorded or acknowledged by now was written before this fdatasync.
        if std::mem::take(&mut self.commit.unsynced) && !self.skips_sync() {
            self.commit.phase = Phase::Data;
            self.issue(InFlight::Commit, File::Data, Io::Sync, out);
        } else {
            self.append(out);
        }
    }

    /// Moves the pending records into blocks of the log.
    fn encode_commit(&mut self) {
        let commit = &mut self.commit;
        // From here on a process that is killed leaves a half that says where its commit is.
        self.pending.begin_commit(commit.writer.position());
        commit.writer.begin(commit.durable_blocks);
        commit.witnessed = commit.durable_blocks;
        let mut is_witness = true;
        for record in self.pending.committing() {
            is_witness = false;
            #[cfg(test)]
            if super::planted::misses_layer(self.planted, &self.tree, &record) {
                continue;
            }
            let pushed = commit.writer.push(&record);
            assert!(pushed.is_ok(), "a commit takes all that fits into a half of the pending region");
        }
        let (position, blocks) = commit.writer.finish();
        commit.append = (position.offset(), blocks.as_ptr() as usize, blocks.len() as u32);
        let end = position.sequence + (blocks.len() / BLOCK) as u64;
        if !is_witness {
            commit.to_witness = end;
        }
        if end + commit.largest.max(commit.log_blocks / 4) > commit.log_blocks {
            // The last commit of this log. The tree as it is now is exactly what the log ends with, and its data is what
            // this commit syncs: a checkpoint of it may appear once this commit is durable, and not before.
            commit.snapshot = Some(Box::new(self.tree.frozen()));
        }
    }

    pub(super) fn commit_io_done(&mut self, result: Result<(), DiskError>, out: &mut Vec<Action<Job>>) {
        match (self.commit.phase, result) {
            (Phase::Data, Err(_)) => self.sync_failed(Failure::DataSync),
            (Phase::Log, Err(_)) => self.sync_failed(Failure::Log),
            (Phase::Append | Phase::Idle, Err(_)) => _ = self.commit.failure.get_or_insert(Failure::Log),
            (_, Ok(())) => {}
        }
        if self.commit.failure.is_some() {
            // Also where another file's fdatasync has failed meanwhile: what this one is told may leave out what that one was.
            self.commit.phase = Phase::Idle;
            return;
        }
        match self.commit.phase {
            Phase::Data => self.append(out),
            Phase::Append => {
                self.commit.phase = Phase::Log;
                let log = File::Log(slot_of(self.commit.writer.position().epoch));
                self.issue(InFlight::Commit, log, Io::Sync, out);
            }
            Phase::Log => self.commit_done(out),
            Phase::Idle => debug_assert!(false, "no commit runs"),
        }
    }

    /// An fdatasync has failed: the disk may have lost its cache, whichever file it was asked for.
    pub(super) fn sync_failed(&mut self, failure: Failure) {
        self.pending.sync_failed();
        self.commit.failure.get_or_insert(failure);
    }

    fn append(&mut self, out: &mut Vec<Action<Job>>) {
        if !self.commit.has_records {
            return self.commit_done(out);
        }
        self.commit.phase = Phase::Append;
        let (offset, memory, length) = self.commit.append;
        let log = File::Log(slot_of(self.commit.writer.position().epoch));
        let what = Io::Write { offset, length, buffer: Buffer::Store(memory as *const u8) };
        self.issue(InFlight::Commit, log, what, out);
    }

    fn commit_done(&mut self, out: &mut Vec<Action<Job>>) {
        self.commit.phase = Phase::Idle;
        self.commit.durable = self.commit.begun;
        if let Some(batch) = self.commit.batch.take() {
            // The records that freed these blocks are durable: now, and not before, they may be used again.
            self.allocator.durable(batch);
            self.background.freed();
        }
        if self.commit.has_records {
            self.pending.committed();
            let was_half_full = self.commit.is_half_full();
            self.commit.durable_blocks = self.commit.writer.position().sequence;
            if !was_half_full && self.commit.is_half_full() {
                self.look_for_space();
            }
            self.commit.log_ended = self.commit.snapshot.is_some();
            self.background.committed();
            self.rotate(out);
        }
        // Durable: whoever waited is told.
        for waiter in self.commit.served.drain(..) {
            match waiter {
                Waiter::Flush(operation) => out.push(Action::Done { operation, result: Ok(()) }),
                Waiter::Control(operation) => out.push(Action::ControlDone { operation, result: Ok(()) }),
                Waiter::Seal(operation, layer) => {
                    if let Some(layer) = self.tree.layers.get_mut(&layer) {
                        layer.settled = true;
                    }
                    self.background.checking.changed();
                    out.push(Action::ControlDone { operation, result: Ok(()) });
                }
                Waiter::Base(volume) => self.mirrors.sealed.push(volume),
            }
        }
        self.bases_sealed(out);
    }

    /// Goes on in the other log, if it is not needed any more; if it is because a checkpoint is missing, that comes first.
    pub(super) fn rotate(&mut self, out: &mut Vec<Action<Job>>) {
        let commit = &mut self.commit;
        let position = commit.writer.position().next_epoch();
        let (can_rotate, is_other_free) = (commit.can_rotate(), commit.is_other_free());
        if let Some(tree) = commit.snapshot.take_if(|_| can_rotate) {
            commit.owes_checkpoint = false;
            if is_other_free {
                commit.begin_log();
            }
            // Before the checkpoint can appear: what is pending belongs to the new epoch, not into the checkpoint.
            self.pending.set_epoch(position.epoch);
            self.space.checkpoint_begins();
            let (files, range) = (self.files.clone(), self.space_range());
            let job = CheckpointJob::new(files, self.superblock.instance, position, *tree, range);
            out.push(Action::Job(Job::Checkpoint(job)));
        }
    }

    /// A checkpoint is on disk, or could not be written.
    pub(super) fn checkpoint_done(&mut self, result: Result<(u64, u64), CheckpointJob>, out: &mut Vec<Action<Job>>) {
        self.space.checkpoint_ends(result.as_ref().ok().map(|(_, kept)| *kept));
        match result {
            Ok((generation, _)) => {
                self.commit.generation = generation;
                if generation == self.commit.writer.position().epoch + 1 {
                    // It was owed: the log that it is of has ended, and neither is needed.
                    self.commit.begin_log();
                }
                self.rotate(out);
            }
            // The logs still have everything; `tick` tries again.
            Err(job) => self.commit.retry = Some(job),
        }
    }

    pub(super) fn retry_checkpoint(&mut self, out: &mut Vec<Action<Job>>) {
        if let Some(job) = self.commit.retry.take() {
            self.space.checkpoint_begins();
            out.push(Action::Job(Job::Checkpoint(job)));
        }
    }

    fn fail_waiters(&mut self, out: &mut Vec<Action<Job>>) {
        let commit = &mut self.commit;
        let sealing = commit.sealing.drain(..).map(|(operation, layer)| Waiter::Seal(operation, layer));
        let error = DiskError::Failed;
        for waiter in commit.served.drain(..).chain(commit.waiting.drain(..)).chain(sealing) {
            match waiter {
                Waiter::Flush(operation) => out.push(Action::Done { operation, result: Err(error) }),
                Waiter::Control(operation) | Waiter::Seal(operation, _) => {
                    out.push(Action::ControlDone { operation, result: Err(ControlError::Disk(error)) });
                }
                Waiter::Base(volume) => self.mirrors.sealed.push(volume),
            }
        }
        self.bases_sealed(out);
    }

    #[cfg(test)]
    fn skips_sync(&self) -> bool {
        self.planted == Some(super::planted::Planted::SkippedSync)
    }

    #[cfg(not(test))]
    fn skips_sync(&self) -> bool {
        false
    }
}
