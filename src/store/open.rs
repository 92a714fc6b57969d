//! Making a tree, and opening it again: the checkpoint, the logs, and what a killed process left pending.
//!
//! Invariants: nothing is handed out before all that was replayed is durable, since a block that a lost record freed would
//! be used again; damage is named, never guessed around; opening can be killed at any point and done again.

use super::allocator::{Allocator, Overlap};
use super::checkpoint::{self, CheckpointError, Item};
use super::commit::{Commit, slot_of};
use super::files::{Files, Name, is_full};
use super::format::BLOCK;
use super::job::{name_checkpoint, prepare_checkpoint, write_checkpoint};
use super::log::{LogError, Position, Reader, Writer};
use super::map::{Entry, Extent, MAX_PHYSICAL_BLOCKS, PhysicalBlock};
use super::mirror::{MirrorError, Mirrors};
use super::pending::{Pending, PendingError, Remains};
use super::space::{self, Space};
use super::superblock::{Superblock, SuperblockError};
use super::tree::{Inconsistent, Role, Tree};
use super::{LogSlot, Store, checking};
use crate::volume::BLOCK_SIZE;
use std::io;
use std::sync::Arc;

/// Bytes of each map log: a thousand small commits between checkpoints; a new tree writes two of them, some milliseconds.
pub const LOG_BYTES: u64 = 4 << 20;

/// Commits that a log should have room for when a tree is opened, else a checkpoint is made: one for each half of the pending region
/// that a killed process left, and the one that ends the log.
const COMMITS_LEFT: u64 = 3;

/// Why a tree was not made.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct CreateError {
    /// What failed.
    pub what: &'static str,
    /// Why.
    pub error: io::Error,
}

/// Why a tree cannot be opened. But for `Io`, the copy is damaged or of a newer Tandem; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file cannot be read or written.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// The superblock.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A map log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// What a mirrored volume is under.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// What was pending.
    #[error(transparent)]
    Pending(#[from] PendingError),
    /// Records contradict each other.
    #[error("the map is damaged: {0}")]
    Inconsistent(#[from] Inconsistent),
    /// Two layers own one block.
    #[error("the map is damaged: {0}")]
    Overlap(#[from] Overlap),
    /// The map names blocks that the data file does not have.
    #[error("the data file ends at block {blocks}, and the map names block {named}")]
    DataShort {
        /// Blocks of the file.
        blocks: u64,
        /// The last one named.
        named: u64,
    },
}

impl Store {
    /// Makes an empty tree in an empty directory; durable when it returns.
    pub fn create(files: &dyn Files, superblock: &Superblock) -> Result<(), CreateError> {
        Self::create_with(files, superblock, LOG_BYTES)
    }

    /// The same with logs of another size: a multiple of the block size.
    pub fn create_with(files: &dyn Files, superblock: &Superblock, log_bytes: u64) -> Result<(), CreateError> {
        let failed = |what| move |error| CreateError { what, error };
        for name in [Name::Data, Name::Checksums, Name::ChecksumsRedo, Name::Mirror] {
            files.create(name).map_err(failed("making a file"))?;
        }
        for name in [Name::Log(LogSlot::A), Name::Log(LogSlot::B)] {
            files.create(name).map_err(failed("making a map log"))?;
            // Written now, so that an append is an overwrite: a first write into a hole costs three times as much, and space.
            let zeros = vec![0; (1 << 20).min(log_bytes as usize)];
            for offset in (0..log_bytes).step_by(zeros.len()) {
                let length = (log_bytes - offset).min(zeros.len() as u64) as usize;
                files.write_at(name, offset, &zeros[..length]).map_err(failed("writing a map log"))?;
            }
            files.sync(name).map_err(failed("syncing a map log"))?;
        }
        let position = Position { epoch: 1, sequence: 0, chain: 0 };
        write_checkpoint(files, superblock.instance, position, &Tree::default())
            .map_err(failed("writing a checkpoint"))?;
        // Last: a directory without it is none of a tree.
        files.create(Name::Superblock).map_err(failed("making the superblock"))?;
        files.write_at(Name::Superblock, 0, &superblock.encode()).map_err(failed("writing the superblock"))?;
        files.sync(Name::Superblock).map_err(failed("syncing the superblock"))?;
        files.sync_names().map_err(failed("syncing the directory"))
    }

    /// Opens a tree. Direct I/O that a killed process had in flight must be over: the caller waits for it before.
    pub fn open(files: Arc<dyn Files>, pending: Pending) -> Result<Self, OpenError> {
        let mut opening = Opening::begin(&*files, pending)?;
        opening.replay()?;
        opening.settle()?;
        opening.finish(files.clone())
    }
}

/// A tree that is being opened.
struct Opening<'a> {
    files: &'a dyn Files,
    pending: Pending,
    superblock: Superblock,
    tree: Tree,
    /// Of the checkpoint on disk.
    generation: u64,
    /// After the last commit in the logs.
    end: Position,
    log_blocks: u64,
    /// The last commit has nothing behind it that says that it was durable.
    unwitnessed: bool,
    remains: Vec<Remains>,
    /// Without space for a checkpoint there is no room for another commit: it has to wait for one.
    ended: bool,
    mirrors: Mirrors,
}

impl<'a> Opening<'a> {
    fn begin(files: &'a dyn Files, pending: Pending) -> Result<Self, OpenError> {
        let mut block = [0; BLOCK];
        let length = files.size(Name::Superblock).map_err(io_error("superblock"))?.unwrap_or(0).min(BLOCK as u64);
        let block = &mut block[..length as usize];
        files.read_at(Name::Superblock, 0, block).map_err(io_error("reading the superblock"))?;
        let superblock = Superblock::decode(block)?;
        checking::redo(files, superblock.instance).map_err(io_error("mending checksums"))?;
        if files.size(Name::Mirror).map_err(io_error("mirror"))?.is_none() {
            // A tree that was made before there were mirrors.
            files.create(Name::Mirror).map_err(io_error("making the file mirror"))?;
        }
        let mut tree = Tree::default();
        let mut wrong = None;
        let size = files.size(Name::Checkpoint).map_err(io_error("checkpoint"))?.unwrap_or(0);
        let mut input = FileReader { files, name: Name::Checkpoint, offset: 0, size };
        let (header, _) = checkpoint::read(&mut input, superblock.instance, &mut |item| {
            if wrong.is_none() {
                wrong = take_item(&mut tree, item).err();
            }
        })?;
        if let Some(wrong) = wrong {
            return Err(wrong.into());
        }
        let (end, generation) = (header.log, header.log.epoch);
        Ok(Self {
            files,
            pending,
            superblock,
            tree,
            generation,
            end,
            log_blocks: 0,
            unwitnessed: false,
            remains: Vec::new(),
            ended: false,
            mirrors: Mirrors::default(),
        })
    }

    /// Everything that happened since the checkpoint.
    fn replay(&mut self) -> Result<(), OpenError> {
        let instance = self.superblock.instance;
        let current = self.replay_log(self.end)?;
        // The other log, if a checkpoint was under way.
        let next = current.next_epoch();
        let after = self.replay_log(next)?;
        self.end = if after == next { current } else { after };
        for remains in self.pending.remains(instance, self.generation)? {
            let (end, commit) = ((self.end.epoch, self.end.sequence), remains.commit);
            if commit.is_some_and(|commit| (commit.epoch, commit.sequence) < end) {
                continue;
            }
            for record in &remains.records {
                self.tree.apply(record, &mut |_, _| {})?;
            }
            self.remains.push(remains);
        }
        Ok(())
    }

    /// Replays the log from a position; where it ends.
    fn replay_log(&mut self, start: Position) -> Result<Position, OpenError> {
        let name = Name::Log(slot_of(start.epoch));
        let size = self.files.size(name).map_err(io_error("map log"))?.unwrap_or(0);
        let mut bytes = vec![0; size as usize];
        self.files.read_at(name, 0, &mut bytes).map_err(io_error("reading a map log"))?;
        self.log_blocks = size / BLOCK_SIZE;
        let mut reader = Reader::new(&bytes, self.superblock.instance, start);
        while let Some(commit) = reader.next_commit()? {
            self.unwitnessed = false;
            for record in commit.records() {
                self.unwitnessed = true;
                let record = record?;
                self.tree.apply(&record, &mut |_, _| {})?;
            }
        }
        Ok(reader.position())
    }

    /// Makes all of it durable.
    fn settle(&mut self) -> Result<(), OpenError> {
        self.check_data()?;
        // What is read has to be durable, and so has what is spoilt then; if that fails it is remembered here.
        self.sync(Name::Mirror, "syncing the file mirror")?;
        self.mirrors = Mirrors::load(self.files, self.superblock.instance, &self.tree)?;
        self.sync(Name::Mirror, "syncing the file mirror")?;
        // The checkpoint may have got its name just before the process was killed; the log that it replaces is overwritten
        // from now on.
        self.files.sync_names().map_err(io_error("syncing the directory"))?;
        // Nor may a snapshot be shown whose last writes were in flight when it was sealed, and are in a cache only: also where the
        // checkpoint has the seal already.
        let needs_data = !self.remains.is_empty() || !self.tree.snapshots.is_empty();
        let room = self.log_blocks.saturating_sub(self.end.sequence);
        let largest = largest_commit(&self.pending);
        let needs_checkpoint = self.end.epoch != self.generation || room < COMMITS_LEFT * largest + self.log_blocks / 4;
        if needs_data || needs_checkpoint {
            // Data before map.
            self.sync(Name::Data, "syncing the data")?;
        }
        let remains = self.blocks_of_remains();
        let (fits, goes_on) = (room >= remains, room >= remains + largest);
        let begins_other = !goes_on && self.end.epoch == self.generation && self.log_blocks >= remains + largest;
        if !needs_checkpoint || !self.checkpoint(fits || begins_other)? {
            // What was replayed may be in a cache only. Blocks that it freed are used from now on, and the next commit says
            // of it that it is durable.
            let log = Name::Log(slot_of(self.end.epoch));
            self.sync(log, "syncing a map log")?;
            if begins_other {
                (self.end, self.unwitnessed) = (self.end.next_epoch(), false);
            }
            self.append_remains()?;
            self.ended = !goes_on && !begins_other;
        }
        self.pending.reset(self.superblock.instance, self.end.epoch);
        Ok(())
    }

    /// Makes a checkpoint of the tree; whether there was space for it, where it `may_wait`.
    fn checkpoint(&mut self, may_wait: bool) -> Result<bool, OpenError> {
        // Past every epoch that a torn append may have left behind, or that what is pending may be said to belong to: the one
        // after the last log's, where the next checkpoint was begun and has not got its name.
        let end = Position { epoch: self.end.epoch + 2, sequence: 0, chain: self.end.chain };
        match prepare_checkpoint(self.files, self.superblock.instance, end, &self.tree) {
            // A full pool must not keep its volumes from coming back: who else would give it space?
            Err(error) if may_wait && is_full(&error) => return Ok(false),
            prepared => prepared.map_err(io_error("writing a checkpoint"))?,
        }
        // This is the moment at which the logs and what is pending are history.
        name_checkpoint(self.files).map_err(io_error("naming a checkpoint"))?;
        (self.generation, self.end, self.unwitnessed) = (end.epoch, end, false);
        Ok(true)
    }

    /// What was in a cache before this process may be lost if it fails, and devices of a killed engine do not know.
    fn sync(&self, name: Name, doing: &'static str) -> Result<(), OpenError> {
        self.files.sync(name).inspect_err(|_| self.pending.sync_failed()).map_err(io_error(doing))
    }

    /// Blocks of the log that the remains take.
    fn blocks_of_remains(&self) -> u64 {
        let mut writer = Writer::new(self.superblock.instance, self.end, largest_commit(&self.pending) as usize);
        let blocks = |remains: &Remains| {
            encode(&mut writer, remains);
            (writer.finish().1.len() / BLOCK) as u64
        };
        self.remains.iter().map(blocks).sum()
    }

    fn append_remains(&mut self) -> Result<(), OpenError> {
        let log = Name::Log(slot_of(self.end.epoch));
        let mut writer = Writer::new(self.superblock.instance, self.end, largest_commit(&self.pending) as usize);
        for remains in &self.remains {
            // Killed from here on: the half says where its commit is, and the log whether it has it.
            self.pending.recommit(remains.half, writer.position());
            encode(&mut writer, remains);
            let (position, blocks) = writer.finish();
            self.files.write_at(log, position.offset(), blocks).map_err(io_error("writing a map log"))?;
            self.sync(log, "syncing a map log")?;
        }
        self.unwitnessed |= !self.remains.is_empty();
        self.end = writer.position();
        Ok(())
    }

    /// Whether the data file has every block that the map names.
    fn check_data(&self) -> Result<(), OpenError> {
        let blocks = self.files.size(Name::Data).map_err(io_error("data"))?.unwrap_or(0) / BLOCK_SIZE;
        let ends = owned(&self.tree).map(|(start, count)| u64::from(start.0) + u64::from(count));
        match ends.max() {
            Some(end) if end > blocks => Err(OpenError::DataShort { blocks, named: end - 1 }),
            _ => Ok(()),
        }
    }

    fn finish(mut self, files: Arc<dyn Files>) -> Result<Store, OpenError> {
        let size = files.size(Name::Data).map_err(io_error("data"))?.unwrap_or(0);
        let written = u32::try_from(size / BLOCK_SIZE).unwrap_or(MAX_PHYSICAL_BLOCKS).min(MAX_PHYSICAL_BLOCKS);
        let allocator = Allocator::from_owned(owned(&self.tree), written, MAX_PHYSICAL_BLOCKS)?;
        for layer in self.tree.layers.values_mut() {
            layer.settled = !matches!(layer.role, Role::Top(_));
        }
        let tops: Vec<_> = self.tree.volumes.iter().map(|(id, volume)| (*id, volume.top)).collect();
        for (id, top) in tops {
            let index = self.tree.new_index(top);
            if let Some(volume) = self.tree.volumes.get_mut(&id) {
                volume.index = index;
            }
        }
        let largest = largest_commit(&self.pending);
        let writer = Writer::new(self.superblock.instance, self.end, largest as usize);
        let to_witness = if self.unwitnessed { self.end.sequence } else { 0 };
        let mut commit = Commit::new(writer, self.generation, self.log_blocks, largest, to_witness);
        if self.ended {
            commit.end_log(&self.tree);
        }
        let space = Space::new(space::keep(&*files, space::Range::of(&self.tree, &commit)));
        let mut store = Store {
            files,
            superblock: self.superblock,
            tree: self.tree,
            allocator,
            commit,
            space,
            pending: self.pending,
            requests: Default::default(),
            background: Default::default(),
            mirrors: self.mirrors,
            fillings: Default::default(),
            #[cfg(test)]
            planted: None,
        };
        store.background.changed();
        store.background.committed();
        store.keep_budget();
        store.let_bases_go();
        Ok(store)
    }
}

/// Makes one commit of what a half of the pending region had.
fn encode(writer: &mut Writer, remains: &Remains) {
    writer.begin(writer.position().sequence);
    for record in &remains.records {
        let pushed = writer.push(record);
        assert!(pushed.is_ok(), "a commit takes all that fits into a half of the pending region");
    }
}

/// Blocks that a commit of a full half of the pending region may need.
fn largest_commit(pending: &Pending) -> u64 {
    // A record needs less in a log block than in the region; a block's header and unused end are below 160 bytes.
    (pending.half_bytes() / (BLOCK - 160) + 1) as u64
}

fn owned(tree: &Tree) -> impl Iterator<Item = (PhysicalBlock, u32)> + '_ {
    let extents = tree.layers.values().flat_map(|layer| layer.map.extents());
    extents.filter_map(|extent| match extent.entry {
        Entry::Data(physical) => Some((physical, extent.count)),
        Entry::Absent | Entry::Zero => None,
    })
}

fn take_item(tree: &mut Tree, item: Item) -> Result<(), Inconsistent> {
    match item {
        Item::Record(record) => tree.apply(&record, &mut |_, _| {}),
        Item::Extent(layer, Extent { start, count, entry }) => {
            let mut twice = false;
            tree.layer_mut(layer)?.map.replace(start, count, entry, &mut |_| twice = true);
            if twice { Err(Inconsistent(format!("layer {} has block {start} twice", layer.0))) } else { Ok(()) }
        }
    }
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> OpenError {
    move |error| OpenError::Io { what, error }
}

/// Reads a file from front to back.
struct FileReader<'a> {
    files: &'a dyn Files,
    name: Name,
    offset: u64,
    size: u64,
}

impl io::Read for FileReader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let length = bytes.len().min((self.size - self.offset) as usize);
        self.files.read_at(self.name, self.offset, &mut bytes[..length])?;
        self.offset += length as u64;
        Ok(length)
    }
}
