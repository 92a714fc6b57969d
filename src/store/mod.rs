//! One copy of a layer tree on one disk: where each block of each volume and snapshot is, and how that survives a crash.
//!
//! A tree has one sparse `data` file of 4 KiB physical blocks and one map log. A **layer** maps logical blocks to
//! physical ones or to explicit zeros; a volume is the newest layer of a path to the root, a snapshot is a sealed layer.
//! ```text
//!   root ── sealed "snapshot A" ── sealed "snapshot B" ── top of volume 1
//!                       └───────── top of volume 2 (a clone of A)
//! ```
//! # Invariants
//! * Every physical block belongs to at most one layer; free is what no layer owns.
//! * A block that the top layer owns is overwritten in place; any other block gets a new physical block.
//! * **Data before map**: a log record that names a physical block is written only after an fdatasync of `data` that
//!   followed the block's write.
//! * **Freed is free only when the freeing is durable**: a physical block is used again only after the record that took it
//!   away from its layer is on stable media.
//! * A flush is: fdatasync(data), and if the map changed: append to the log, fdatasync(log). One log serves all layers of
//!   the tree, so a flush covers every layer sealed since the last one.
//! * Between flushes the changes of the map that were acknowledged live in the *pending* region (a memfd that the holder
//!   keeps), so a killed engine loses none; a lost node loses only what was not flushed.
//! * A seal is made at once and done later: when no write that chose its place before is in flight, in its layer or below,
//!   and all of it is durable. From then on the layer never changes; before, nobody reads or clones it.
//! * A **base** is a sealed layer that a copy of a mirrored volume had when it left: what lies above it is what it lacks.
//! * A checkpoint is the tree exactly at the end of one log, and gets its name only when that end is durable.
//! * Merging moves entries of a layer with exactly one child into that child: data never moves, so what any reader sees
//!   (and any flattened index) stays valid.
//!
//! The store does no I/O itself on the data path: it answers every request with [`Action`]s and takes their completions,
//! so that a ring, a thread pool and a simulated disk can execute the very same code.

pub mod allocator;
mod background;
mod checking;
pub mod checkpoint;
pub mod checksums;
mod commit;
mod control;
pub mod extents;
pub mod files;
pub mod format;
mod job;
pub mod log;
pub mod map;
pub mod mirror;
mod open;
mod pending;
#[cfg(test)]
mod planted;
pub mod record;
mod requests;
#[cfg(test)]
mod simulation;
mod slab;
mod space;
pub mod superblock;
#[cfg(test)]
mod tests;
mod tree;
pub mod verify;

pub use commit::Failure;
pub use extents::{ExtentsError, ExtentsPlan, LayerMaps, ReadPlan};
pub use files::{Directory, Files, Name, is_full};
pub use job::{Job, JobOutcome};
pub use mirror::{MirrorError, Mirrored, Reserve};
pub use open::{CreateError, OpenError};
pub use pending::{PENDING_BYTES, Pending, PendingError};
pub use superblock::Superblock;
pub use tree::Inconsistent;

use crate::protocol::{DiskError, OperationId};
use crate::volume::{InstanceId, SnapshotId, VolumeId, VolumeSize};
use allocator::Allocator;
use std::collections::BTreeMap;
use std::sync::Arc;
use tree::Tree;

/// A file of the tree's directory that takes part in the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum File {
    /// Physical blocks.
    Data,
    /// The two map logs; one is current, the other is retired by a checkpoint.
    Log(LogSlot),
    /// What volumes with several copies are under.
    Mirror,
}

/// Which of the two logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LogSlot {
    /// `log-a`.
    A,
    /// `log-b`.
    B,
}

/// One physical operation, unique until its completion is handed back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoId(pub u32);

/// The memory of a physical read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// `offset` bytes into the buffer of the request that started `operation`.
    Request {
        /// The operation.
        operation: OperationId,
        /// Bytes from the start of its buffer; a multiple of the block size.
        offset: u32,
    },
    /// Memory of the store, aligned to 4096, valid and unchanged until the completion.
    Store(*const u8),
}

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Read `length` bytes at `offset`.
    Read {
        /// Bytes from the start of the file.
        offset: u64,
        /// Bytes; a multiple of the block size.
        length: u32,
        /// Where to.
        buffer: Buffer,
    },
    /// Write `length` bytes at `offset`.
    Write {
        /// Bytes from the start of the file.
        offset: u64,
        /// Bytes; a multiple of the block size.
        length: u32,
        /// Where from.
        buffer: Buffer,
    },
    /// fdatasync.
    Sync,
    /// Give the space back to the filesystem (punch a hole, keep the size).
    Punch {
        /// Bytes from the start of the file.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// What the store wants done. `J` is work for a helper thread (see [`Store`]).
#[derive(Debug)]
pub enum Action<J> {
    /// Execute, then call `Store::completed(io, result)`.
    Io {
        /// Names the completion.
        io: IoId,
        /// The file.
        file: File,
        /// What to do.
        what: Io,
    },
    /// Fill part of the operation's buffer with zeros, now.
    Zero {
        /// The operation.
        operation: OperationId,
        /// Bytes from the start of its buffer.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// Compare crc32c of one block of the operation's buffer, which is full by now; if it differs, the [`Action::Done`] that
    /// follows counts as [`DiskError::Corrupt`].
    Check {
        /// The operation.
        operation: OperationId,
        /// Bytes from the start of its buffer.
        offset: u32,
        /// What crc32c of the block must be.
        crc: u32,
    },
    /// The operation that `Store::start` began is finished.
    Done {
        /// The operation.
        operation: OperationId,
        /// How.
        result: Result<(), DiskError>,
    },
    /// The operation that `Store::control` began is finished, and durable if it succeeded.
    ControlDone {
        /// The operation.
        operation: OperationId,
        /// How.
        result: Result<(), ControlError>,
    },
    /// Work that takes long and blocks: run it on a helper thread, then call `Store::job_done`.
    Job(J),
}

/// Sealed layers below a volume: more make a backward walk through them too long to bound.
pub const MAX_SNAPSHOTS: usize = 1024;

/// An operator's request. All are idempotent by id: repeating one that has happened is a success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// A new, empty volume.
    CreateVolume {
        /// Its id.
        volume: VolumeId,
        /// Its size.
        size: VolumeSize,
        /// Whether reads of sealed, checksummed blocks are checked.
        verify_reads: bool,
    },
    /// A new volume that begins as the snapshot is.
    Clone {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Id of the new volume.
        volume: VolumeId,
        /// At least the size of the snapshot.
        size: VolumeSize,
        /// As in `CreateVolume`.
        verify_reads: bool,
    },
    /// Ends the volume's current layer and names it: what was acknowledged before is in, what starts afterwards is not.
    /// Several in one turn, with nothing else in between, are one point in time.
    Seal {
        /// The volume.
        volume: VolumeId,
        /// Id of the new snapshot.
        snapshot: SnapshotId,
        /// Milliseconds since 1970.
        created_ms: u64,
    },
    /// What an internal volume holds is a snapshot of another volume, which was taken elsewhere, and the internal one is gone:
    /// both or neither. Nothing may be in flight on it. A layer below the other volume is never taken for that snapshot.
    SealAs {
        /// The internal volume.
        filled: VolumeId,
        /// Id of the snapshot.
        snapshot: SnapshotId,
        /// Of which volume it is.
        volume: VolumeId,
        /// When that was taken: milliseconds since 1970.
        created_ms: u64,
    },
    /// Removes the volume; nothing may be in flight on it. Its space is freed in the background.
    DeleteVolume(VolumeId),
    /// Removes the snapshot. Clones made from it live on. Its space is freed in the background.
    DeleteSnapshot(SnapshotId),
    /// Makes the volume larger, at any time; the new blocks are zeros.
    Resize {
        /// The volume.
        volume: VolumeId,
        /// Its new size; one it has already is a success.
        size: VolumeSize,
    },
    /// Changes what can be changed.
    Modify {
        /// The volume.
        volume: VolumeId,
        /// As in `CreateVolume`.
        verify_reads: bool,
    },
}

/// Why an operator's request was refused; then it changed nothing, except that after [`ControlError::Disk`] it may have
/// happened: repeat it once the tree is open again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// No such volume.
    #[error("volume {0} does not exist")]
    UnknownVolume(VolumeId),
    /// No such snapshot.
    #[error("snapshot {0} does not exist")]
    UnknownSnapshot(SnapshotId),
    /// The id names something else already: a snapshot of another volume, a volume of another size.
    #[error("the id is in use for something else")]
    Exists,
    /// Too many snapshots below the volume.
    #[error("volume {0} has {MAX_SNAPSHOTS} snapshots, which is the limit: delete some")]
    TooManySnapshots(VolumeId),
    /// Smaller than the volume is, or than the snapshot it begins as.
    #[error("the size is smaller than the {0} bytes there are")]
    SizeSmaller(u64),
    /// Requests are in flight, or a seal of it is not finished, or very many control operations are waiting.
    #[error("busy: repeat it later")]
    Busy,
    /// The disk failed.
    #[error("{0}")]
    Disk(#[from] DiskError),
}

/// One volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its id.
    pub volume: VolumeId,
    /// Its size.
    pub size: VolumeSize,
    /// Whether reads are checked.
    pub verify_reads: bool,
    /// Blocks that its own layer occupies.
    pub allocated_blocks: u64,
    /// Layers from the root to it, itself included.
    pub layers: u32,
    /// One of them has something: the volume is not as one that was made empty and never used.
    pub written: bool,
}

/// One snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id.
    pub snapshot: SnapshotId,
    /// The volume it was taken of, which may be gone.
    pub volume: VolumeId,
    /// Size of the volume at that time.
    pub size: VolumeSize,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Blocks that its own layer occupies.
    pub allocated_blocks: u64,
    /// Its checksums are on disk.
    pub checksummed: bool,
}

/// What background work there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Nameless layers that wait to be merged or freed.
    pub merging_layers: u32,
    /// Blocks of sealed layers that have no checksum yet.
    pub unchecked_blocks: u64,
}

/// A layer tree that is open: the state machine that turns requests into [`Action`]s. One owner; it never blocks.
///
/// `Action<Job>::Job` runs on a helper thread, one after the other or side by side.
pub struct Store {
    files: Arc<dyn Files>,
    superblock: Superblock,
    tree: Tree,
    allocator: Allocator,
    pending: Pending,
    requests: requests::Requests,
    commit: commit::Commit,
    background: background::Background,
    space: space::Space,
    mirrors: mirror::Mirrors,
    /// Internal volumes that are being filled, and the most blocks that each will have: as long as the process lives.
    fillings: BTreeMap<VolumeId, u64>,
    #[cfg(test)]
    planted: Option<planted::Planted>,
}

impl Store {
    /// Id of the copy.
    pub fn instance(&self) -> InstanceId {
        self.superblock.instance
    }

    /// What the tree's superblock says.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Ends the use of the tree without writing anything; what is pending stays in the memory, for the next `open`.
    pub fn into_memory(self) -> crate::memory::Memory {
        self.pending.into_memory()
    }

    /// All volumes, by id.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let info = |(id, volume): (&VolumeId, &tree::Volume)| VolumeInfo {
            volume: *id,
            size: volume.size,
            verify_reads: volume.verify_reads,
            allocated_blocks: self.tree.layers.get(&volume.top).map_or(0, |layer| layer.map.data_blocks()),
            layers: self.tree.path(volume.top).count() as u32,
            written: self.tree.path(volume.top).any(|(_, layer)| !layer.map.is_empty()),
        };
        self.tree.volumes.iter().map(info).collect()
    }

    /// All snapshots, by id; without those whose seal is not done yet.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let info = |(id, snapshot): (&SnapshotId, &tree::Snapshot)| {
            let layer = self.tree.layers.get(&snapshot.layer).filter(|layer| layer.settled)?;
            Some(SnapshotInfo {
                snapshot: *id,
                volume: snapshot.volume,
                size: snapshot.size,
                created_ms: snapshot.created_ms,
                allocated_blocks: layer.map.data_blocks(),
                checksummed: layer.checksummed,
            })
        };
        self.tree.snapshots.iter().filter_map(info).collect()
    }

    /// Whether there is a snapshot of this id, its seal done or not.
    pub fn has_snapshot(&self, snapshot: SnapshotId) -> bool {
        self.tree.snapshots.contains_key(&snapshot)
    }

    /// What the tree may grow to: every volume fully written, plus what its sealed layers occupy.
    pub fn promised_blocks(&self) -> u64 {
        let most = |(id, volume): (&VolumeId, &tree::Volume)| {
            let size = volume.size.blocks();
            self.fillings.get(id).map_or(size, |blocks| size.min(*blocks))
        };
        let tops: u64 = self.tree.volumes.iter().map(most).sum();
        let sealed = self.tree.layers.values().filter(|layer| !matches!(layer.role, tree::Role::Top(_)));
        tops + sealed.map(|layer| layer.map.data_blocks()).sum::<u64>()
    }

    /// The volume, which is there or will be, is filled with at most so many blocks and then sealed: nobody overwrites it.
    pub fn expect_filling(&mut self, volume: VolumeId, blocks: u64) {
        self.fillings.insert(volume, blocks);
        self.keep_budget();
    }

    /// To be called when [`Self::promised_blocks`] may have changed.
    fn keep_budget(&mut self) {
        let promised = self.promised_blocks();
        self.allocator.set_budget(promised + spare_blocks(promised));
        self.look_for_space();
    }

    /// Blocks of disk that the tree occupies now, free ones that are kept for new writes included.
    pub fn used_blocks(&self) -> u64 {
        self.allocator.occupied_blocks()
    }

    /// The disk failed in a way that only opening the tree again can mend; flushes fail until then.
    pub fn failure(&self) -> Option<Failure> {
        self.commit.failure()
    }

    /// How often an fdatasync of the tree has failed since its memory was made: each time what was written since the one
    /// before may be gone, also when the tree was opened again and flushes succeed.
    pub fn sync_failures(&self) -> u64 {
        self.pending.failures()
    }

    /// Whether devices that outlived a former process may wait for writes that are gone.
    pub fn has_unheard_failure(&self) -> bool {
        self.pending.has_unheard_failure()
    }

    /// Those devices have ended.
    pub fn failure_heard(&self) {
        self.pending.failure_heard();
    }
}

/// Blocks of disk that a tree may use beyond the `promised` ones: what was freed and is not durably free yet, and what is
/// kept written for small writes. A 64th, at most 64 MiB; who promises a tree's blocks has to promise these, too.
pub fn spare_blocks(promised: u64) -> u64 {
    (promised / 64).min(16384)
}
