//! Unmounts and detaches a volume, also when nothing that its device is asked is answered any more.
//!
//! A mirrored volume whose other copy is primary, or cannot be reached, is suspended: an unmount would wait for ever, and with
//! it kubelet, which could neither stage it again nor drain the node.
//!
//! Invariants: what may hang is begun elsewhere and waited for with a limit; a device is given up only for a call that would take it
//! away now, and if the replica says that it does not serve it; one that was served when that was asked first is waited for, however
//! slow it is, until it has been silent for [`SILENT_LIMIT`]. An answer comes within 15 s otherwise, behind a call that hangs on the
//! device within 35 s.

use super::Inner;
use super::errors::{RequestError, UnstageError};
use super::replica::Facts;
use crate::csi::control::ControlError;
use crate::csi::operations::{Operation, Subject};
use crate::mount::{Unmounting, remove_read_only_twin, unmount_lazily};
use crate::volume::VolumeId;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long another call for the volume may take before the replica is asked the same. To stage a volume that is served takes
/// longer at times: then the caller is told to come back.
const HUNG_AFTER: Duration = Duration::from_secs(4);
/// How long such a call may take to undo what it has begun, when its device is given up: it detaches that.
const HUNG_LIMIT: Duration = Duration::from_secs(8);
/// How long an unmount may take before the replica is asked whether it serves the volume.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(5);
/// How long a device that was served may be silent before its unmount is given up. A copy that is lost costs a lease, a flush on a
/// disk that this very unmount keeps busy, and a change in a catalogue that may be failing over just then: nobody's pages are
/// dropped for that. Another primary ends the device long before; and all is said before the call is answered for being late.
const SILENT_LIMIT: Duration = Duration::from_secs(60);
/// How often that is looked at.
const SILENT_POLL: Duration = Duration::from_secs(1);
/// The replica looks for as long as a copy may be silent, and then ends a connection.
const ABANDON_LIMIT: Duration = Duration::from_secs(6);
/// After that everything that waits has its error within milliseconds.
const AFTERWARDS: Duration = Duration::from_millis(1500);
/// How long a device may stay busy after its last unmount before the replica is asked the same,
const ABANDON_AFTER: Duration = Duration::from_secs(4);
/// and before the caller is told.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
const BUSY_POLL: Duration = Duration::from_millis(50);

/// The right to take a volume away.
pub struct Turn {
    /// Another call hung on its device, which was given up.
    hung: bool,
    _release: Operation,
    _operation: Operation,
}

/// Waits for the right to take a volume away. A call that hangs on its device is ended if nobody serves that and `may` says that
/// this call would take it away now: else nobody could, for as long as that one hangs. What else is under way is waited for, and
/// then named; an unmount that is under way knows by itself how long its device may be silent.
pub fn start_instead(node: &Inner, volume: VolumeId, may: impl FnOnce() -> bool) -> Result<Turn, RequestError> {
    let start = |limit| node.operations.start_within(Subject::Volume(volume), limit);
    let begin = || node.operations.start(Subject::Release(volume));
    let refused = match start(HUNG_AFTER) {
        Ok(operation) => return Ok(Turn { hung: false, _release: begin()?, _operation: operation }),
        Err(refused) => refused,
    };
    let Ok(release) = begin() else { return Err(refused.into()) };
    if !may() {
        return Err(refused.into());
    }
    if let Err(reason) = node.replica.abandon(volume, ABANDON_LIMIT) {
        tracing::info!(%volume, %reason, "another call for it is under way, and its device is not given up");
        return Err(refused.into());
    }
    tracing::warn!(%volume, "another call for it hung on its device, which is given up: it is to go");
    Ok(Turn { hung: true, _release: release, _operation: start(HUNG_LIMIT)? })
}

/// How long a device that was served is silent.
#[derive(Default)]
struct Silence(Option<Instant>);

impl Silence {
    /// Whether it is too long.
    fn is_long(&mut self, answers: bool, now: Instant) -> bool {
        if answers {
            self.0 = None;
            return false;
        }
        now.duration_since(*self.0.get_or_insert(now)) >= SILENT_LIMIT
    }
}

/// A volume that is being taken away.
pub struct Release<'a> {
    node: &'a Inner,
    volume: VolumeId,
    /// Its device was given up.
    abandoned: bool,
    /// The replica was asked to.
    asked: bool,
    /// A call hung on it before.
    hung: bool,
}

impl<'a> Release<'a> {
    /// Nothing was tried yet but to begin.
    pub fn new(node: &'a Inner, volume: VolumeId, turn: &Turn) -> Self {
        Self { node, volume, abandoned: false, asked: false, hung: turn.hung }
    }

    /// Nothing is mounted at `target` afterwards.
    pub fn unmount(&mut self, target: &Path) -> Result<(), UnstageError> {
        let unmounting = Unmounting::start(target);
        if let Some(result) = unmounting.wait(UNMOUNT_LIMIT) {
            return Ok(result?);
        }
        loop {
            match self.abandon() {
                Ok(()) => break,
                // Slow, and served; for how long, nobody knows.
                Err(ControlError::InUse(_)) => {}
                Err(error) => return Err(error.into()),
            }
            let mut silence = Silence::default();
            while !silence.is_long(self.answers(), Instant::now()) {
                if let Some(result) = unmounting.wait(SILENT_POLL) {
                    return Ok(result?);
                }
            }
        }
        match unmounting.wait(AFTERWARDS) {
            Some(result) => Ok(result?),
            None => Ok(unmount_lazily(target)?),
        }
    }

    fn answers(&self) -> bool {
        self.node.replica.volume(self.volume).is_ok_and(|facts| facts.answers)
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
        // The call that hung may have made a new one since, or another call: one that answers goes as any other.
        self.abandoned |= self.hung && !self.answers();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_silence_that_is_never_broken_is_too_long() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!silence.is_long(true, at(0)) && !silence.is_long(false, at(100)), "it has just begun");
        assert!(
            !silence.is_long(false, at(159)) && !silence.is_long(true, at(160)) && !silence.is_long(false, at(161))
        );
        assert!(!silence.is_long(false, at(220)) && silence.is_long(false, at(221)));
    }
}
