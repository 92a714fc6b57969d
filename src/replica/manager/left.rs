//! Devices that a killed engine left and that nobody serves: their copy cannot be opened, or their volume has none here.
//!
//! # Invariants
//! * The device of a copy waits as long as that may come back as primary. It is given up when the catalogue says that another copy
//!   has taken its place, or when whoever has it is to go and the volume has other members; never that of the only one.
//! * What a device was asked that was given up is never executed.

use super::Manager;
use super::errors::AttachFailure;
use crate::protocol::{HEARTBEAT, SILENCE};
use crate::replica::engine::{DetachError, EngineError};
use crate::volume::{InstanceId, VolumeId};
use tokio::time::{Instant, sleep};

impl Manager {
    /// The publication of a device that a killed engine left, and whose volume has no copy here.
    pub fn held_publication(&self, volume: VolumeId) -> Option<InstanceId> {
        if self.place(volume).is_some() {
            return None;
        }
        self.index().held_devices.get(&volume).copied()
    }

    /// The copy that is not open and whose device waits for it.
    pub async fn left_copy(&self, volume: VolumeId) -> Result<Option<InstanceId>, EngineError> {
        let Some(copy) = self.index().held_devices.get(&volume).copied() else { return Ok(None) };
        match self.engine().has_device(volume).await {
            Err(EngineError::DeviceWaits(_)) => Ok(Some(copy)),
            Err(EngineError::DeviceLeft(_)) | Ok(_) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the volume has other members than the copy whose device waits here, as the catalogue says: only that can, because
    /// the record beside the copy names candidates, too, and what the copy itself knows cannot be read.
    pub fn note_others(&self, volume: VolumeId, others: bool) {
        let mut index = self.index();
        if others {
            index.with_others.insert(volume)
        } else {
            index.with_others.remove(&volume)
        };
    }

    /// Another copy has taken the place of the one whose device waits here: whoever waits for that gets an error.
    pub async fn end_left(&self, volume: VolumeId) -> Result<(), AttachFailure> {
        match self.engine().give_up(volume, true).await {
            Ok(true) => {
                tracing::error!(%volume, "its device waited for its copy, and another one is primary: unstage and stage it again");
                Ok(())
            }
            // Its copy was opened just now, whose core does the same.
            Ok(false) => Ok(()),
            Err(error) => Err(AttachFailure::Detach { volume, error }),
        }
    }

    fn has_others(&self, volume: VolumeId) -> bool {
        self.index().with_others.contains(&volume)
    }

    /// Says of a device that waits for its copy that nobody needs to wait with it.
    pub(super) fn may_be_given_up(&self, volume: VolumeId, error: DetachError) -> DetachError {
        match error {
            DetachError::Engine(EngineError::DeviceWaits(_)) if self.has_others(volume) => {
                DetachError::Engine(EngineError::CopyWaits(volume))
            }
            error => error,
        }
    }

    pub(super) fn left_detached(&self, volume: VolumeId) {
        let mut index = self.index();
        index.held_devices.remove(&volume);
        index.with_others.remove(&volume);
    }

    /// The device that a killed engine left, if it belongs to this publication, is served.
    pub(super) fn left_is_served(&self, volume: VolumeId, publication: InstanceId) {
        self.index().held_devices.retain(|held, of| *held != volume || *of != publication);
    }

    /// Whoever waits for the device gets an error, if its copy is not open for as long as one is waited for, and is not the only
    /// one.
    pub(super) async fn abandon_left_copy(&self, volume: VolumeId) -> Result<(), AttachFailure> {
        let until = Instant::now() + SILENCE;
        let failed = |error| AttachFailure::Status { volume, error };
        while Instant::now() < until {
            sleep(HEARTBEAT).await;
            if self.left_copy(volume).await.map_err(failed)?.is_none() {
                // It was opened, or given up: whoever asks again finds out.
                let works = self.engine().has_device(volume).await.map_err(failed)?;
                return if works { Err(AttachFailure::Served(volume)) } else { Ok(()) };
            }
        }
        self.give_up_left(volume, self.has_others(volume)).await
    }

    /// The same for the device of a volume without a copy here: it was deleted meanwhile, or the catalogue does not answer.
    pub(super) async fn abandon_left_client(&self, volume: VolumeId) -> Result<(), AttachFailure> {
        if self.held_publication(volume).is_none() {
            return Err(AttachFailure::Only(volume));
        }
        let until = Instant::now() + SILENCE;
        while self.publication(volume).is_none() && Instant::now() < until {
            sleep(HEARTBEAT).await;
        }
        if self.publication(volume).is_some() {
            return self.abandon_client(volume).await;
        }
        self.give_up_left(volume, false).await
    }

    async fn give_up_left(&self, volume: VolumeId, others: bool) -> Result<(), AttachFailure> {
        match self.engine().give_up(volume, others).await {
            Ok(true) => {
                tracing::warn!(%volume, "its device is given up: it is to go, and nobody here serves it");
                Ok(())
            }
            Ok(false) => Err(AttachFailure::Only(volume)),
            Err(error) => Err(AttachFailure::Detach { volume, error }),
        }
    }
}
