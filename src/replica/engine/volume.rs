//! An attached volume: its device, its core, and the requests that are not answered yet.

use super::ControlError;
use super::statistics::{Direction, VolumeStatistics};
use super::tree::TreeKey;
use crate::protocol::{Now, Replica, Tag};
use crate::replica::device::FuseLoop;
use crate::replica::device::fuse::Message;
use crate::replica::device::loop_device::LoopDevice;
use crate::store::{Control, ControlError as Refusal};
use crate::volume::VolumeSize;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Names an attached volume; never used again. It is also the key of its watched descriptor, where 0 is the bell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct VolumeKey(pub u32);

/// Seals of one volume at a time; the operator serialises them, one more is a repeated call.
pub(super) const TICKETS: usize = 3;

/// A device request that is not answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub message: Message,
    pub direction: Direction,
    pub bytes: u64,
    pub since: Now,
}

/// An operator's request that is not answered.
pub(super) struct Ticket {
    pub control: Control,
    pub reply: oneshot::Sender<Result<(), ControlError>>,
    /// What the store said, in its own words.
    pub refusal: Option<Refusal>,
}

/// Whether it is served.
pub(super) enum Phase {
    Serving,
    /// The connection is gone (somebody removed the loop device or aborted it); nothing comes any more.
    Broken,
    /// The device is gone; the volume goes when its last flush and all requests are done.
    Leaving(Vec<oneshot::Sender<()>>),
}

pub(super) struct Volume {
    pub tree: TreeKey,
    pub size: VolumeSize,
    pub fuse: FuseLoop,
    pub device: Option<LoopDevice>,
    pub replica: Replica,
    /// By tag: the arena's slots, then its own.
    pub pending: Vec<Option<Pending>>,
    pub tickets: [Option<Ticket>; TICKETS],
    /// Slots of the arena that hold its requests.
    pub arena_used: u32,
    /// Of its own slots, those that are free.
    pub own_free: Vec<u32>,
    /// There may be requests to read.
    pub ready: bool,
    pub flushing: bool,
    pub phase: Phase,
    pub statistics: Arc<VolumeStatistics>,
}

impl Volume {
    /// Whether nothing of it is under way.
    pub fn is_quiet(&self) -> bool {
        !self.flushing && self.pending.iter().all(Option::is_none) && self.tickets.iter().all(Option::is_none)
    }

    pub fn pending(&mut self, tag: Tag) -> Option<&mut Option<Pending>> {
        self.pending.get_mut(tag.0 as usize)
    }
}
