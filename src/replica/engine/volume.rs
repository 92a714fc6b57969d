//! A volume that is served: its core, its device if it has one, and the requests that are not answered yet.
//!
//! Invariants: there is one as long as the volume has a device, or this node's copy of it is open, or it is used here without
//! a copy; a device goes when its requests are answered, the core when nothing of it is under way. One without a copy has no
//! tree ([`TreeKey::NONE`]) and no mirror: its core's disk is [`Remote`].

use super::ControlError;
use super::client::Remote;
use super::commands::Copies;
use super::copies::{Mirror, Opening};
use super::statistics::{Direction, VolumeStatistics};
use super::tree::TreeKey;
use crate::protocol::{Now, Replica, Tag};
use crate::replica::device::FuseLoop;
use crate::replica::device::fuse::Message;
use crate::replica::device::loop_device::LoopDevice;
use crate::replica::io::WatchKey;
use crate::replica::peer::Session;
use crate::store::{Control, ControlError as Refusal};
use crate::volume::{VolumeId, VolumeSize};
use std::sync::Arc;
use tokio::sync::oneshot;

/// Names a served volume; never used again. 0 is nobody's.
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
    pub reply: oneshot::Sender<Result<Copies, ControlError>>,
    /// What the store said, in its own words.
    pub refusal: Option<Refusal>,
}

/// Whether a device is served.
pub(super) enum Phase {
    Serving,
    /// Another copy was primary since it was made: whatever it is asked for is answered with an error.
    Fenced,
    /// The connection is gone (somebody removed the loop device or aborted it); nothing comes any more.
    Broken,
    /// The loop device is gone; the rest goes when its last flush and all requests are done.
    Leaving(Vec<oneshot::Sender<()>>),
}

/// The block device of a volume on this node.
pub(super) struct Device {
    pub fuse: FuseLoop,
    pub loop_device: Option<LoopDevice>,
    /// Of its connection.
    pub watch: WatchKey,
    /// By tag: the arena's slots, then its own.
    pub pending: Vec<Option<Pending>>,
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

pub(super) struct Volume {
    pub id: VolumeId,
    pub tree: TreeKey,
    pub size: VolumeSize,
    pub replica: Replica,
    pub tickets: [Option<Ticket>; TICKETS],
    /// Operations that the store executes for the core.
    pub running: usize,
    /// None: only other nodes ask for it.
    pub device: Option<Device>,
    /// None: the volume has one copy.
    pub mirror: Option<Box<Mirror>>,
    /// None: the volume has a copy here.
    pub remote: Option<Box<Remote>>,
    /// Something waits for its session's flush.
    pub unsent: bool,
    /// The core is about to be another.
    pub opening: Option<Opening>,
}

impl Device {
    /// Whether nothing of it is under way.
    pub fn is_quiet(&self) -> bool {
        !self.flushing && self.pending.iter().all(Option::is_none)
    }
}

impl Volume {
    pub fn pending(&mut self, tag: Tag) -> Option<&mut Option<Pending>> {
        self.device.as_mut()?.pending.get_mut(tag.0 as usize)
    }

    /// Its conversations with other nodes, if there are any.
    pub fn session(&self) -> Option<&Session> {
        let copies = self.mirror.as_ref().map(|mirror| &mirror.session);
        copies.or(self.remote.as_ref().map(|remote| &remote.session)).map(|session| &**session)
    }

    /// Whether no request is in its core.
    pub fn has_no_request(&self) -> bool {
        self.device.as_ref().is_none_or(Device::is_quiet) && self.tickets.iter().all(Option::is_none)
    }
}
