//! Unmounts and detaches a volume, also when nothing that its device is asked is answered any more.
//!
//! A mirrored volume whose other copy is primary, or cannot be reached, is suspended: an unmount would wait for ever, and with
//! it kubelet, which could neither stage it again nor drain the node.
//!
//! Invariants: what may hang is begun elsewhere and waited for with a limit; a device is given up only if the replica says
//! that it does not serve it; one that is served, however slowly, is waited for; an answer comes within 15 s otherwise.

use super::Inner;
use super::errors::UnstageError;
use super::replica::Facts;
use crate::csi::control::ControlError;
use crate::mount::{Unmounting, remove_read_only_twin, unmount_lazily};
use crate::volume::VolumeId;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an unmount may take before the replica is asked whether it serves the volume.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(5);
/// The replica looks for as long as a copy may be silent, and then ends a connection.
const ABANDON_LIMIT: Duration = Duration::from_secs(6);
/// After that everything that waits has its error within milliseconds.
const AFTERWARDS: Duration = Duration::from_millis(1500);
/// How long a device may stay busy after its last unmount before the replica is asked the same,
const ABANDON_AFTER: Duration = Duration::from_secs(4);
/// and before the caller is told.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
const BUSY_POLL: Duration = Duration::from_millis(50);

/// A volume that is being taken away.
pub struct Release<'a> {
    node: &'a Inner,
    volume: VolumeId,
    /// Its device was given up.
    abandoned: bool,
    /// The replica was asked to.
    asked: bool,
}

impl<'a> Release<'a> {
    /// Nothing was tried yet.
    pub fn new(node: &'a Inner, volume: VolumeId) -> Self {
        Self { node, volume, abandoned: false, asked: false }
    }

    /// Nothing is mounted at `target` afterwards.
    pub fn unmount(&mut self, target: &Path) -> Result<(), UnstageError> {
        let unmounting = Unmounting::start(target);
        if let Some(result) = unmounting.wait(UNMOUNT_LIMIT) {
            return Ok(result?);
        }
        match self.abandon() {
            Ok(()) => {}
            // Slow, and served.
            Err(ControlError::InUse(_)) => return Ok(unmounting.wait_for_its_end()?),
            Err(error) => return Err(error.into()),
        }
        match unmounting.wait(AFTERWARDS) {
            Some(result) => Ok(result?),
            None => Ok(unmount_lazily(target)?),
        }
    }

    fn abandon(&mut self) -> Result<(), ControlError> {
        self.asked = true;
        self.node.replica.abandon(self.volume, ABANDON_LIMIT)?;
        self.abandoned = true;
        Ok(())
    }

    /// It has no device afterwards. One that was given up may go later: what it was asked has its place in the engine until
    /// that knows which copy is primary.
    pub fn detach(mut self) -> Result<(), UnstageError> {
        // The read-only twin of a block device holds it open: it goes first.
        if let Ok(Facts { device: Some(device), .. }) = self.node.replica.volume(self.volume) {
            remove_read_only_twin(&device).map_err(|source| UnstageError::Twin { device, source })?;
            self.node.steps.done()?;
        }
        let start = Instant::now();
        loop {
            match self.try_detach() {
                // An umount that outlived its killed parent may still be writing: the mount is gone, the device not yet free.
                Err(ControlError::InUse(_)) if start.elapsed() < BUSY_LIMIT => {
                    if !self.asked && start.elapsed() > ABANDON_AFTER {
                        // Refused: then it is served, and busy.
                        let _ = self.abandon();
                    }
                    std::thread::sleep(BUSY_POLL);
                }
                detached => break detached?,
            }
        }
        self.node.steps.done()?;
        Ok(())
    }

    fn try_detach(&self) -> Result<(), ControlError> {
        if self.abandoned {
            return self.node.replica.detach_within(self.volume, AFTERWARDS).unwrap_or(Ok(()));
        }
        self.node.replica.detach(self.volume)
    }
}
