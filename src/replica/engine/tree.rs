//! An open tree: its store, its files, and what is under way on them.

use super::EngineError;
use super::files::TreeFiles;
use crate::store::Store;
use crate::volume::{BootId, InstanceId};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::sync::oneshot;

/// Names an open tree; never used again, so a late completion cannot meet another tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TreeKey(pub u32);

impl TreeKey {
    /// Of a volume that has no copy here.
    pub const NONE: Self = Self(u32::MAX);
}

/// Where a tree is in its life.
pub(super) enum Phase {
    Open,
    /// A last flush was started or is done; it goes when nothing is under way.
    Closing(oneshot::Sender<Result<(), EngineError>>),
}

pub(super) struct Tree {
    pub id: InstanceId,
    pub store: Box<Store>,
    pub files: TreeFiles,
    /// The holder has a copy of it; this one keeps the memory's name alive for later engines of this process.
    pub pending: OwnedFd,
    /// Physical operations, jobs and store operations that are not finished.
    pub under_way: usize,
    /// When the store last did a step in the background.
    pub last_tick: Duration,
    /// When it wants the next one; the tree is in the engine's list while it wants any.
    pub next_tick: Option<Duration>,
    pub phase: Phase,
}

impl Tree {
    /// The life of what was acknowledged and not logged: it ends with the node's, with the memory that the holder keeps, and
    /// with an fdatasync that failed. The memory is told by its inode, of which a kernel makes each number once. The store
    /// takes no record after an fdatasync that failed: none says that it was written in the life that began then.
    pub fn life(&self, boot: BootId) -> BootId {
        let inode = nix::sys::stat::fstat(&self.pending).map_or(0, |found| found.st_ino);
        let mut bytes = boot.to_bytes();
        let more = inode.to_le_bytes().into_iter().chain(self.store.sync_failures().to_le_bytes());
        bytes.iter_mut().zip(more).for_each(|(byte, more)| *byte ^= more);
        BootId::from_bytes(bytes)
    }

    /// When the store wants its next step, not more often than every `pace`.
    pub fn wanted_tick(&self, pace: Duration) -> Option<Duration> {
        let delay = self.store.next_tick().filter(|_| self.is_open())?;
        Some(self.last_tick + delay.max(pace))
    }

    pub fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }
}
