//! Volumes that are used on this node without a copy: no pool and no tree, a device only.
//!
//! Invariants: a volume has a copy on a node, or is used there without one, never both; its publication is its name here.

use super::errors::{AttachFailure, VolumeFailure};
use super::status::{HealthEntry, HealthKind, VolumeView};
use super::{ClientPlace, Manager};
use crate::protocol::{HEARTBEAT, SILENCE};
use crate::replica::engine::{ClientConfig, ClientStatus, MirrorInput};
use crate::volume::{InstanceId, VolumeId};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a call waits for an ended publication to be replaced by the one that the catalogue names: its device has gone just
/// now. One that is named no more is not.
const RENEWED_LIMIT: Duration = Duration::from_secs(5);
const RENEWED_PAUSE: Duration = Duration::from_millis(20);

impl Manager {
    /// The publication by which the volume is used here without a copy.
    pub fn publication(&self, volume: VolumeId) -> Option<InstanceId> {
        self.index().clients.get(&volume).filter(|place| place.open).map(|place| place.publication)
    }

    /// Whether the volume is used here without a copy, or will be again at once.
    pub fn is_client(&self, volume: VolumeId) -> bool {
        self.index().clients.contains_key(&volume)
    }

    /// From now on the volume can be attached here.
    pub async fn open_client(&self, config: ClientConfig, descriptor: String) -> Result<(), VolumeFailure> {
        let (volume, publication, size) = (config.volume, config.publication, config.size);
        let opened = self.engine().open_client(config).await;
        opened.map_err(|error| VolumeFailure::Engine { volume, error })?;
        self.left_is_served(volume, publication);
        self.index().clients.insert(volume, ClientPlace { publication, descriptor, size, open: true });
        Ok(())
    }

    /// It has no device any more, and cannot be attached.
    pub async fn close_client(&self, volume: VolumeId) -> Result<(), VolumeFailure> {
        self.end_client(volume).await?;
        self.index().clients.remove(&volume);
        Ok(())
    }

    /// The same, and another one is opened at once: until then it cannot be attached, but the volume is known here.
    pub async fn end_client(&self, volume: VolumeId) -> Result<(), VolumeFailure> {
        if self.publication(volume).is_none() {
            // Whatever the engine has of the volume then is a copy's.
            return Ok(());
        }
        self.engine().close_mirror(volume).await.map_err(|error| VolumeFailure::Engine { volume, error })?;
        if let Some(place) = self.index().clients.get_mut(&volume) {
            place.open = false;
        }
        Ok(())
    }

    /// Copies were opened that could not be before: who follows the catalogue looks at them.
    pub(super) fn copies_came(&self) {
        self.inner.clients_changed.notify_one();
    }

    /// Somebody uses a volume without a copy no more, or wants to, or copies came: who follows the catalogue looks again.
    pub async fn clients_changed(&self) {
        self.inner.clients_changed.notified().await;
    }

    pub(super) async fn client_status(&self, volume: VolumeId) -> Option<ClientStatus> {
        self.engine().client_status(volume).await.ok().flatten()
    }

    /// Whether what a device here asks is answered, or there is one already.
    pub(super) async fn is_client_served(&self, volume: VolumeId) -> Result<bool, AttachFailure> {
        let until = Instant::now() + RENEWED_LIMIT;
        let mut is_asked = false;
        loop {
            if let Some(status) = self.client_status(volume).await.filter(|status| !status.ended) {
                return Ok(status.device.is_some() || status.answers);
            }
            if !std::mem::replace(&mut is_asked, true) {
                self.inner.clients_changed.notify_one();
            }
            if Instant::now() >= until {
                return Err(AttachFailure::NotWished(volume));
            }
            sleep(RENEWED_PAUSE).await;
        }
    }

    /// After its device has gone.
    pub(super) fn client_detached(&self, volume: VolumeId) {
        if self.publication(volume).is_some() {
            self.inner.clients_changed.notify_one();
        }
    }

    /// Whoever waits for the device gets an error, if no primary answers for as long as one is waited for.
    pub(super) async fn abandon_client(&self, volume: VolumeId) -> Result<(), AttachFailure> {
        let until = Instant::now() + SILENCE;
        loop {
            let status = self.engine().client_status(volume).await;
            let status = status.map_err(|error| AttachFailure::Status { volume, error })?;
            if status.is_some_and(|status| status.answers) {
                return Err(AttachFailure::Served(volume));
            }
            if Instant::now() >= until {
                break;
            }
            sleep(HEARTBEAT).await;
        }
        tracing::warn!(%volume, "its device is given up: it is to go, and no primary answers");
        let ended = MirrorInput::Client { client: None, term: None };
        let told = self.engine().tell_mirror(volume, ended).await;
        told.map_err(|error| AttachFailure::Status { volume, error })
    }

    /// What is known of it here.
    pub(super) async fn view_client(&self, volume: VolumeId) -> Option<VolumeView> {
        let place = self.index().clients.get(&volume).cloned()?;
        let status = self.client_status(volume).await;
        let mut health = Vec::new();
        if !status.as_ref().is_some_and(|status| status.answers) {
            let ended = "it is not published here any more, or no copy has everything that it had not flushed";
            let has_ended = status.as_ref().is_none_or(|status| status.ended);
            let what = if has_ended { ended } else { "no primary answers this node" };
            let message = format!("requests of volume {volume} are not executed: {what}");
            health.push(HealthEntry { kind: HealthKind::Inaccessible, reason: "NotServed", message });
        }
        Some(VolumeView {
            volume,
            tree: place.publication,
            pool: String::new(),
            size: status.as_ref().map_or(place.size, |status| status.size).bytes(),
            copy: None,
            allocated: 0,
            device: status.and_then(|status| status.device),
            descriptor: place.descriptor,
            verify_reads: false,
            health,
            layers: 0,
            written: false,
            unchecked: 0,
            merging_layers: 0,
            mirror: None,
            record: None,
        })
    }
}
