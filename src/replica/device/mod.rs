//! Block devices of this node: how the kernel's requests for a volume reach the engine and outlive it.
//!
//! ```text
//!   /dev/loopN ──> FUSE file (detached mount) ──> /dev/fuse descriptor ──> slot in a memfd ──> engine
//!                                                 └────────── both kept by the holder ─────────┘
//! ```
//! # Invariants
//! * A request is read straight into a slot that the holder keeps, so a killed engine loses none.
//! * The engine's own threads never wait for an answer of its own FUSE file: what can (opening the file, setting up or
//!   removing the loop device) runs in a short-lived child (`isolated`).

pub mod fuse;
pub mod isolated;
pub mod loop_device;
pub mod mount;
pub mod slots;

use crate::volume::{InstanceId, VolumeId, VolumeSize};
use loop_device::{LoopDevice, LoopError, Served, Untuned};
use mount::MountError;
use slots::{RESERVED_SLOTS, Slots, SlotsError};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Why a volume's device could not be made or taken over.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No FUSE mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// No slots.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// The holder gave back something else than it was given.
    #[error("volume {volume}: the holder keeps {found} descriptors of its device instead of 3")]
    Held {
        /// The volume.
        volume: VolumeId,
        /// Number of descriptors.
        found: usize,
    },
    /// A descriptor could not be copied.
    #[error("volume {volume}: {errno}; raise the limit of open files (ulimit -n)")]
    Descriptor {
        /// The volume.
        volume: VolumeId,
        /// What dup said.
        errno: std::io::Error,
    },
}

/// A volume's device by FUSE and loop: what the engine reads requests from and answers to.
///
/// The seam for a ublk device: it will be the second implementation of what the engine uses here: a descriptor to wait
/// for, slots to find requests in ([`slots::Slot`]), an answer to write, and a [`Control`] for what blocks. The engine's
/// field of this type becomes an enum of both then; a trait for one implementation would be a guess.
#[derive(Debug)]
pub struct FuseLoop {
    /// The volume.
    pub volume: VolumeId,
    /// The slot that only this volume uses.
    pub slots: Slots,
    copy: InstanceId,
    device: OwnedFd,
    root: OwnedFd,
    memory: OwnedFd,
}

impl FuseLoop {
    /// A new connection and a slot of its own; no loop device yet. Order: give [`FuseLoop::descriptors`] to the holder, serve
    /// the connection, then [`Control::attach`].
    pub fn create(volume: VolumeId, copy: InstanceId) -> Result<Self, DeviceError> {
        let (slots, memory) = Slots::create("tandem-slot", RESERVED_SLOTS)?;
        let (device, root) = mount::connect()?;
        Ok(Self { volume, slots, copy, device, root, memory })
    }

    /// Takes over what the holder kept, in the order of [`FuseLoop::descriptors`].
    pub fn from_held(volume: VolumeId, copy: InstanceId, descriptors: Vec<OwnedFd>) -> Result<Self, DeviceError> {
        let found = descriptors.len();
        let [device, root, memory] = descriptors.try_into().map_err(|_| DeviceError::Held { volume, found })?;
        Ok(Self { volume, slots: Slots::map(memory.as_fd())?, copy, device, root, memory })
    }

    /// What the holder must keep: the connection, the root of its mount, the memory of the slot.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.device.as_fd(), self.root.as_fd(), self.memory.as_fd()]
    }

    /// Requests are read from it (never blocks) and answers written to it. ENODEV: the connection was ended.
    pub fn connection(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Whose device it is.
    pub fn served(&self) -> Served {
        Served { volume: self.volume, copy: self.copy }
    }

    /// Ends the connection with errors for whoever waits. It waits for nobody.
    pub fn abort(&self) -> Result<(), std::io::Error> {
        mount::abort(self.root.as_fd())
    }

    /// For the helper thread that does what blocks. Drop it before [`FuseLoop`] when the device is given up.
    pub fn control(&self) -> Result<Control, DeviceError> {
        let volume = self.volume;
        let root = self.root.try_clone().map_err(|errno| DeviceError::Descriptor { volume, errno })?;
        Ok(Control { served: self.served(), root })
    }
}

/// What blocks while the engine must go on serving: never call it from the engine's thread.
#[derive(Debug)]
pub struct Control {
    served: Served,
    root: OwnedFd,
}

impl Control {
    /// Sets up the loop device, or finds the one that is there. Returns also what could not be tuned.
    pub fn attach(&self) -> Result<(LoopDevice, Untuned), LoopError> {
        let device = loop_device::attach(self.root.as_fd(), self.served)?;
        Ok((device, loop_device::tune(device)))
    }
    /// Whether the loop device is the one that serves it: a number is used again for anybody once its device is gone, and only
    /// the kernel knows that.
    pub fn is_at(&self, device: LoopDevice) -> bool {
        loop_device::find(self.served) == Some(device)
    }
    /// Makes a grown size known; the engine answers with it already.
    pub fn resized(&self, size: VolumeSize) -> Result<(), LoopError> {
        loop_device::set_capacity(self.root.as_fd(), self.served, size)
    }
    /// Removes the loop device; afterwards the engine may end the connection.
    pub fn detach(&self) -> Result<(), LoopError> {
        loop_device::detach(self.served)
    }
    /// Ends the connection with errors for whoever waits.
    pub fn abort(&self) -> Result<(), std::io::Error> {
        mount::abort(self.root.as_fd())
    }
}
