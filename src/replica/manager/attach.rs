//! Devices: made, found again, taken away.

use super::Manager;
use super::errors::AttachFailure as Failure;
use super::mirror::MirrorPlace;
use crate::protocol::{HEARTBEAT, Primary, Role, SILENCE};
use crate::replica::engine::EngineError;
use crate::volume::{InstanceId, VolumeId};
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// How long the catalogue may take to say who shall use a volume: two calls at their slowest.
const WISH_LIMIT: Duration = Duration::from_secs(12);

/// How long the end of the process waits for flushes: a supervisor that kills after thirty seconds finds it gone.
const LAST_FLUSHES: Duration = Duration::from_secs(10);

/// How long a call waits for its copy to become primary: it takes over from a dead node within five seconds.
const SERVED_LIMIT: Duration = Duration::from_secs(15);
const SERVED_PAUSE: Duration = Duration::from_millis(20);

impl Manager {
    /// The block device of the volume.
    pub async fn attach(&self, volume: VolumeId) -> Result<PathBuf, Failure> {
        let guard = self.inner.operations.begin(vec![volume.to_bytes()]).await?;
        // What waits for other nodes ends when the device is to be given up.
        tokio::select! {
            served = self.wait_until_served(volume) => served?,
            () = guard.wanted() => return Err(Failure::NotServed(volume)),
        }
        self.attach_served(volume).await
    }

    async fn wait_until_served(&self, volume: VolumeId) -> Result<(), Failure> {
        // Also if there is a device: what this copy has not heard of yet may have overtaken it.
        if let Some(mirror) = self.place(volume).and_then(|place| place.mirror) {
            check_wish(volume, &mirror).await?;
        }
        let until = Instant::now() + SERVED_LIMIT;
        while !self.is_served(volume).await? {
            if Instant::now() >= until {
                return Err(Failure::NotServed(volume));
            }
            sleep(SERVED_PAUSE).await;
        }
        Ok(())
    }

    /// Whether the volume answers here, or has a device that works. A device is made when its copy answers: what the kernel asks
    /// of it meanwhile would hold up whoever makes it, beyond the end of this process.
    async fn is_served(&self, volume: VolumeId) -> Result<bool, Failure> {
        let Some(place) = self.place(volume) else {
            if !self.is_client(volume) {
                self.all_open_for(&volume.to_string(), None).await?;
                return Err(Failure::NoVolume(volume));
            }
            return self.is_client_served(volume).await;
        };
        if place.copy.is_some() {
            return Err(Failure::NotReady(volume));
        }
        if place.mirror.is_none() {
            return Ok(true);
        }
        let failed = |error| Failure::Status { volume, error };
        if self.engine().has_device(volume).await.map_err(failed)? {
            return Ok(true);
        }
        let status = self.engine().mirror_status(volume).await.map_err(failed)?;
        Ok(status.is_none_or(|status| status.answers))
    }

    /// Needs the volume's operation.
    async fn attach_served(&self, volume: VolumeId) -> Result<PathBuf, Failure> {
        let tree = self.place(volume).map(|place| place.tree).or_else(|| self.publication(volume));
        let attached = self.engine().attach(tree.ok_or(Failure::NoVolume(volume))?, volume).await;
        let device = attached.map_err(|error| Failure::Attach { volume, error })?;
        if let Some(place) = self.index().volumes.get_mut(&volume) {
            place.device = Some(device.clone());
        }
        Ok(device)
    }

    /// The volume has no device any more. Unknown volumes have none.
    pub async fn detach(&self, volume: VolumeId) -> Result<(), Failure> {
        let _guard = self.inner.operations.begin_instead(vec![volume.to_bytes()]).await?;
        // Also without a device: a call that was cut off may have left the connection that it was made on; and of a volume
        // that nobody knows: its device may be there while its pool is not.
        let copy = self.place(volume).map(|place| place.tree).or_else(|| self.publication(volume));
        let detached = match copy {
            Some(copy) => self.engine().detach_from(copy, volume).await,
            None => self.engine().detach(volume).await,
        };
        detached.map_err(|error| Failure::Detach { volume, error: self.may_be_given_up(volume, error) })?;
        if let Some(place) = self.index().volumes.get_mut(&volume) {
            place.device = None;
        }
        self.left_detached(volume);
        self.client_detached(volume);
        Ok(())
    }

    /// Whoever waits for the device of a mirrored volume gets an error, if this copy answers nothing for as long as the copy that
    /// it may wait for is waited for. Without a device there is nothing to do.
    pub async fn abandon(&self, volume: VolumeId) -> Result<(), Failure> {
        let _guard = self.inner.operations.begin_instead(vec![volume.to_bytes()]).await?;
        let failed = |error| Failure::Status { volume, error };
        if self.left_copy(volume).await.map_err(failed)?.is_some() {
            return self.abandon_left_copy(volume).await;
        }
        if self.publication(volume).is_some() {
            return self.abandon_client(volume).await;
        }
        match self.place(volume) {
            None => return self.abandon_left_client(volume).await,
            Some(place) if place.mirror.is_none() => return Err(Failure::Only(volume)),
            Some(_) => {}
        }
        let (until, mut copied) = (Instant::now() + SILENCE, None);
        loop {
            let status = self.engine().mirror_status(volume).await;
            if let Some(status) = status.map_err(failed)? {
                // One that still makes the copies equal is about to answer.
                let done = status.copied_bytes + status.equal_bytes;
                let goes_on = copied.replace(done).is_some_and(|before| before != done);
                if status.answers || goes_on && status.role == Role::Primary(Primary::Reconciling) {
                    return Err(Failure::Served(volume));
                }
            }
            if Instant::now() >= until {
                break;
            }
            sleep(HEARTBEAT).await;
        }
        tracing::warn!(%volume, "its device is given up: it is to go, and nothing that it is asked is answered here");
        self.engine().abort(volume).await.map_err(|error| Failure::Detach { volume, error })
    }

    /// The end of the process: copies without devices are closed, so that the holder keeps nothing for them. The others are
    /// flushed: the machine may be about to go down.
    pub async fn close(&self) {
        self.inner.operations.idle().await;
        let pools: Vec<_> = self.index().pools.values().cloned().collect();
        let mut open = Vec::new();
        // From the disk, not from the index: also a copy whose last name is gone may be open.
        let trees = pools.iter().flat_map(|pool| pool.pool.trees().unwrap_or_default());
        for tree in trees {
            match self.engine().close_tree(tree).await {
                Ok(()) => {}
                // The holder keeps what a mirrored copy has not logged: its next engine goes on with it.
                Err(EngineError::VolumeAttached(_) | EngineError::MirrorIsOpen(_)) => open.push(tree),
                Err(error) => tracing::warn!(%tree, %error, "a copy was not closed; the next start repairs it"),
            }
        }
        self.flush(open).await;
        if self.attached().is_empty()
            && let Err(error) = self.engine().release_arena().await
        {
            tracing::warn!(%error, "the holder keeps memory that nobody needs");
        }
    }

    /// Puts what these copies have on stable media, all at the same time.
    async fn flush(&self, trees: Vec<InstanceId>) {
        let mut flushes = JoinSet::new();
        for tree in trees {
            let engine = self.engine().clone();
            flushes.spawn(async move { (tree, engine.flush_tree(tree).await) });
        }
        let all = async {
            while let Some(flushed) = flushes.join_next().await {
                if let Ok((tree, Err(error))) = flushed {
                    tracing::warn!(%tree, %error, "a copy was not flushed at the end");
                }
            }
        };
        if timeout(LAST_FLUSHES, all).await.is_err() {
            tracing::warn!("not every copy was flushed in time at the end");
        }
    }

    /// Volumes that have a device now.
    pub fn attached(&self) -> Vec<VolumeId> {
        self.index().volumes.iter().filter(|(_, p)| p.device.is_some()).map(|(v, _)| *v).collect()
    }
}

/// A mirrored volume is used where the catalogue wishes its primary. The engine is told first: a copy that is not wished
/// answers the first request of its device with an error.
async fn check_wish(volume: VolumeId, mirror: &MirrorPlace) -> Result<(), Failure> {
    let refresher = mirror.refresher.as_ref().ok_or(Failure::NotOpen(volume))?;
    let (answer, told) = oneshot::channel();
    let asked = timeout(WISH_LIMIT, async {
        refresher.send(Some(answer)).await.ok()?;
        told.await.ok()
    });
    match asked.await {
        Ok(Some(Ok(true))) => Ok(()),
        Ok(Some(Ok(false))) => Err(Failure::NotWished(volume)),
        Ok(Some(Err(problem))) => Err(Failure::NoCatalogue { volume, problem }),
        Ok(None) => Err(Failure::NotOpen(volume)),
        Err(_) => Err(Failure::NoCatalogue { volume, problem: "it does not answer in time".to_owned() }),
    }
}
