//! The way to the engine for everybody else: asks its thread, and does what blocks in threads of its own.
//!
//! Invariants: a method that is dropped half way leaves what the same call repeated goes on from; the holder has a
//! device's descriptors before the device exists.

use super::client::{ClientConfig, ClientStatus};
use super::commands::{Command, Found, Reply};
use super::files::TreeFiles;
use super::jobs::Bell;
use super::mirror::{MirrorConfig, MirrorInput, MirrorStatus};
use super::statistics::Statistics;
use super::{
    AsideError, AttachError, ControlError, DetachError, EngineError, EngineStatus, Recovered, VolumeHealth,
    pending_key, volume_key, volume_meta,
};
use crate::crash::crash_point;
use crate::protocol::Request;
use crate::replica::device::loop_device::{self, LoopDevice, LoopError, Served};
use crate::replica::device::{Control as DeviceControl, FuseLoop};
use crate::replica::holder::{Holder, HolderError};
use crate::store::{Control, Store};
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tokio::sync::{mpsc, oneshot};

/// Commands that wait for the engine's next turn; more callers wait for a place.
pub(super) const COMMANDS: usize = 128;

/// Rings when the last handle is gone, so that the engine looks and ends.
pub(super) struct LastRing(pub Arc<Bell>);

impl Drop for LastRing {
    fn drop(&mut self) {
        self.0.ring();
    }
}

pub(super) struct Shared {
    // Dropped in this order: the bell must ring when the channel is closed already.
    pub commands: mpsc::Sender<Command>,
    pub bell: LastRing,
    pub statistics: Arc<Statistics>,
    pub holder: Holder,
    pub holder_connected: AtomicBool,
    pub io: &'static str,
}

impl Shared {
    fn hold(&self, what: impl FnOnce(&Holder) -> Result<(), HolderError>) -> Result<(), HolderError> {
        let result = what(&self.holder);
        if let Err(HolderError::Gone { .. }) = result
            && self.holder_connected.swap(false, Relaxed)
        {
            tracing::error!("the holder is gone: if the engine dies now, every device gets I/O errors; restart tandem");
        }
        result
    }
}

/// The engine, from outside. Cheap to clone; the engine's thread ends with the last one.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) shared: Arc<Shared>,
}

impl EngineHandle {
    /// Hands an open tree to the engine. `pending` is the memory that the store keeps its acknowledged changes in.
    ///
    /// # Errors
    /// The tree is open already, or the holder does not take the memory.
    pub async fn open_tree(
        &self,
        tree: InstanceId,
        store: Box<Store>,
        files: TreeFiles,
        pending: OwnedFd,
    ) -> Result<(), EngineError> {
        // Before the first change is acknowledged: it must survive this process.
        let pending = self
            .blocking(move |shared| {
                shared.hold(|holder| holder.put(&pending_key(tree), b"", &[pending.as_fd()]))?;
                Ok::<_, HolderError>(pending)
            })
            .await??;
        self.ask(|reply| Command::OpenTree { tree, store, files, pending, reply }).await?
    }

    /// Flushes, ends the use of a tree and forgets its memory; a tree that is not open is fine.
    ///
    /// # Errors
    /// A volume of it is attached, or the engine or the holder is gone.
    pub async fn close_tree(&self, tree: InstanceId) -> Result<(), EngineError> {
        self.ask(|reply| Command::CloseTree { tree, reply }).await??;
        self.blocking(move |shared| shared.hold(|holder| holder.remove(&pending_key(tree)))).await??;
        Ok(())
    }

    /// Executes an operator's request; returns when it is durable. Idempotent by id. A resize of an attached volume is
    /// complete after [`Self::resized`].
    ///
    /// # Errors
    /// The store refuses, the disk fails, or the tree is not open.
    pub async fn control(&self, tree: InstanceId, control: Control) -> Result<(), ControlError> {
        self.ask(|reply| Command::Control(vec![(tree, control, reply)])).await?.map(drop)
    }

    /// Seals several volumes at one point in time: no request is executed between the first and the last seal. For each
    /// the copies that have it, if it is mirrored.
    ///
    /// # Errors
    /// The first refusal; the other seals may have happened, and this one on some copies of a mirrored volume.
    pub async fn seal_group(
        &self,
        items: Vec<(InstanceId, VolumeId, SnapshotId)>,
        created_ms: u64,
    ) -> Result<Vec<BTreeSet<InstanceId>>, ControlError> {
        let mut answers = Vec::with_capacity(items.len());
        let mut controls = Vec::with_capacity(items.len());
        for (tree, volume, snapshot) in items {
            let (reply, answer) = oneshot::channel();
            controls.push((tree, Control::Seal { volume, snapshot, created_ms }, reply));
            answers.push(answer);
        }
        self.send(Command::Control(controls)).await?;
        let mut results = Vec::with_capacity(answers.len());
        for answer in answers {
            results.push(answer.await.unwrap_or(Err(EngineError::Stopped.into())));
        }
        results.into_iter().collect()
    }

    /// Writes into a volume that nobody serves, or flushes it: returns when that is done. `data`, which begins at a page, is as
    /// long as a write.
    ///
    /// # Errors
    /// The disk failed or is full, the tree is not open, or somebody serves the volume.
    pub async fn aside(
        &self,
        tree: InstanceId,
        volume: VolumeId,
        request: Request,
        data: Bytes,
    ) -> Result<(), AsideError> {
        self.ask(|reply| Command::Aside { tree, volume, request, data, reply }).await?
    }

    /// Makes the block device of a volume, or finds the one that is there.
    ///
    /// # Errors
    /// The kernel refuses a mount or loop device, or the tree is not open.
    pub async fn attach(&self, tree: InstanceId, volume: VolumeId) -> Result<PathBuf, AttachError> {
        let mut found = self.find(volume).await?;
        if found.as_ref().is_some_and(|found| found.broken) {
            self.detach(volume).await.map_err(|error| AttachError::Broken { volume, error: Box::new(error) })?;
            found = None;
        }
        let control = match found {
            Some(Found { device: Some(device), control, .. }) => {
                let control = control?;
                let (is_there, control) = self.blocking(move |_| (control.is_at(device), control)).await?;
                if is_there {
                    return Ok(device.path());
                }
                tracing::warn!(%volume, device = %device.path().display(), "its loop device was taken away; it gets another one");
                control
            }
            Some(found) => found.control?,
            None => self.make_device(tree, volume).await?,
        };
        crash_point("device.attach");
        match self.blocking(move |_| control.attach()).await? {
            Ok((device, untuned)) => {
                for (setting, error) in untuned {
                    tracing::debug!(%volume, setting, %error, "a queue setting of the loop device stays as it is");
                }
                crash_point("device.attached");
                self.send(Command::SetDevice { volume, device }).await?;
                Ok(device.path())
            }
            Err(error) => {
                // Nobody has the device: take it back, so that a repeated call begins anew.
                if let Err(left) = self.detach(volume).await {
                    tracing::warn!(%volume, error = %left, "a device that could not be set up is still there");
                }
                Err(AttachError::Loop(error))
            }
        }
    }

    /// Whether the volume has a device that works.
    ///
    /// # Errors
    /// The engine is gone, or the device waits for its copy.
    pub async fn has_device(&self, volume: VolumeId) -> Result<bool, EngineError> {
        Ok(self.find(volume).await?.is_some_and(|found| found.device.is_some() && !found.broken))
    }

    /// The volume's device, if it works.
    ///
    /// # Errors
    /// As [`Self::has_device`].
    pub async fn device(&self, volume: VolumeId) -> Result<Option<PathBuf>, EngineError> {
        let found = self.find(volume).await?.filter(|found| !found.broken);
        Ok(found.and_then(|found| found.device).map(LoopDevice::path))
    }

    /// A served connection without loop device.
    async fn make_device(&self, tree: InstanceId, volume: VolumeId) -> Result<DeviceControl, AttachError> {
        let without_copy = self.client_status(volume).await?.is_some();
        let (device, control) = self
            .blocking(move |shared| {
                let device = FuseLoop::create(volume, tree)?;
                let control = device.control()?;
                // Before anything can be asked: a request that was read must outlive this process.
                crash_point("device.hold");
                let meta = volume_meta(tree, without_copy);
                shared.hold(|holder| holder.put(&volume_key(volume), &meta, &device.descriptors()))?;
                crash_point("device.held");
                Ok::<_, AttachError>((Box::new(device), control))
            })
            .await??;
        let added = self.ask(|reply| Command::AddDevice { tree, device, reply }).await?;
        if let Err(error) = added {
            self.blocking(move |shared| shared.hold(|holder| holder.remove(&volume_key(volume)))).await??;
            return Err(error.into());
        }
        Ok(control)
    }

    /// Removes the block device of a volume; none is fine too. What was written is on stable media afterwards.
    ///
    /// # Errors
    /// Something has the device open, or the kernel refuses.
    pub async fn detach(&self, volume: VolumeId) -> Result<(), DetachError> {
        let Some(found) = self.find(volume).await? else { return Ok(()) };
        let (control, broken) = (found.control?, found.broken);
        crash_point("device.detach");
        let detached = self.blocking(move |_| control.detach()).await?;
        match detached {
            Ok(()) => {}
            Err(error @ LoopError::Busy { .. }) => return Err(DetachError::Busy(error)),
            // The loop device of an aborted connection goes at its last close.
            Err(error) if broken => tracing::warn!(%volume, %error, "the loop device of a broken connection stays"),
            Err(error) => return Err(DetachError::Loop(error)),
        }
        crash_point("device.detached");
        self.ask(|reply| Command::RemoveDevice { volume, reply }).await?;
        crash_point("device.release");
        self.blocking(move |shared| shared.hold(|holder| holder.remove(&volume_key(volume)))).await??;
        Ok(())
    }

    /// As [`Self::detach`] for the device that this copy serves, also where its connection died with the holder: the loop device
    /// stays then, and the engine knows nothing of it.
    ///
    /// # Errors
    /// As above.
    pub async fn detach_from(&self, tree: InstanceId, volume: VolumeId) -> Result<(), DetachError> {
        self.detach(volume).await?;
        let served = Served { volume, copy: tree };
        self.blocking(move |_| loop_device::detach(served)).await?.map_err(|error| match error {
            LoopError::Busy { .. } => DetachError::Busy(error),
            _ => DetachError::Loop(error),
        })
    }

    /// Ends the connection of a device: whoever waits for it gets an error, and nothing that it is asked comes here any more.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn abort(&self, volume: VolumeId) -> Result<(), DetachError> {
        let Some(found) = self.find(volume).await? else { return Ok(()) };
        let control = found.control?;
        self.blocking(move |_| control.abort()).await?.map_err(DetachError::Abort)
    }

    /// The same for a device that a killed engine left and nobody serves, if its volume has no copy here, or `others`
    /// elsewhere: it is never served again, nothing that it was asked is executed, and [`Self::detach`] takes it away. `false`:
    /// there is none.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn give_up(&self, volume: VolumeId, others: bool) -> Result<bool, DetachError> {
        self.ask(|reply| Command::GiveUp { volume, others, reply }).await?.map_err(DetachError::Abort)
    }

    /// Puts everything that the tree has executed on stable media; whoever uses it goes on.
    ///
    /// # Errors
    /// The tree is not open, or its disk fails.
    pub async fn flush_tree(&self, tree: InstanceId) -> Result<(), ControlError> {
        self.ask(|reply| Command::FlushTree { tree, reply }).await?.map(drop)
    }

    /// Makes a grown volume's size known to its device; none is fine.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn resized(&self, volume: VolumeId) -> Result<(), EngineError> {
        let Some(found) = self.find(volume).await? else { return Ok(()) };
        let (Some(size), Some(_)) = (found.size, found.device) else { return Ok(()) };
        let control = found.control?;
        Ok(self.blocking(move |_| control.resized(size)).await??)
    }

    /// Looks into a store between two requests. Short: every device of the node waits meanwhile.
    ///
    /// # Errors
    /// The tree is not open.
    pub async fn inspect<R: Send + 'static>(
        &self,
        tree: InstanceId,
        look: impl FnOnce(&mut Store) -> R + Send + 'static,
    ) -> Result<R, EngineError> {
        let (reply, answer) = oneshot::channel();
        let look = Box::new(move |store: &mut Store| drop(reply.send(look(store))));
        self.send(Command::Inspect { tree, look }).await?;
        answer.await.map_err(|_| EngineError::UnknownTree(tree))
    }

    /// An open tree that has the snapshot, its seal done or not, whoever knows of it.
    ///
    /// # Errors
    /// The engine has stopped.
    pub async fn tree_with(&self, snapshot: SnapshotId) -> Result<Option<InstanceId>, EngineError> {
        self.ask(|reply| Command::TreeWith { snapshot, reply }).await
    }

    /// Goes on with the devices that a killed engine left and whose trees are open. Those of trees that are opened later go
    /// on then. Returns the devices that are served.
    pub async fn reattach(&self, recovered: Recovered) -> Vec<(VolumeId, PathBuf)> {
        let waiting = match self.ask(|reply| Command::Reattach { reply }).await {
            Ok(waiting) => waiting,
            Err(error) => {
                tracing::error!(%error, "devices cannot go on");
                return vec![];
            }
        };
        for volume in &waiting {
            tracing::warn!(%volume, "its device waits until its copy is open");
        }
        let served = recovered.devices.into_iter().filter(|(volume, _)| !waiting.contains(volume));
        served.filter_map(|(volume, device)| Some((volume, device.map(LoopDevice::path)?))).collect()
    }

    /// Runs a copy of a mirrored volume; returns when the copy has a durable record and its core goes. A device that a killed
    /// engine left goes on with it; a volume that is attached without mirror stops for a moment and goes on with it.
    ///
    /// # Errors
    /// The tree or the volume is not there, the copy is open already, or its first record cannot be made durable.
    pub async fn open_mirror(&self, config: MirrorConfig) -> Result<(), EngineError> {
        self.ask(|reply| Command::OpenMirror { config: Box::new(config), reply }).await?
    }

    /// Tells a copy what happened. Awaiting it is the back pressure on peers: the engine takes a bounded number of inputs.
    /// A peer's event for a copy that is not open is lost, like its connection.
    ///
    /// # Errors
    /// The copy is not open, or the engine has stopped.
    pub async fn tell_mirror(&self, volume: VolumeId, input: MirrorInput) -> Result<(), EngineError> {
        if let MirrorInput::Peer(_) = input {
            return self.send(Command::TellMirror { volume, input, reply: None }).await;
        }
        self.ask(|reply| Command::TellMirror { volume, input, reply: Some(reply) }).await?
    }

    /// Ends the core of a copy that has no device; returns when nothing of it is under way. A copy that is not open is fine.
    ///
    /// # Errors
    /// The volume has a device.
    pub async fn close_mirror(&self, volume: VolumeId) -> Result<(), EngineError> {
        self.ask(|reply| Command::CloseMirror { volume, reply }).await?
    }

    /// What a copy is and how far the others are; `None` if it is not open.
    ///
    /// # Errors
    /// The engine has stopped.
    pub async fn mirror_status(&self, volume: VolumeId) -> Result<Option<MirrorStatus>, EngineError> {
        self.ask(|reply| Command::MirrorStatus { volume, reply }).await
    }

    /// Uses a volume here that has no copy on this node; a device that a killed engine left goes on.
    ///
    /// # Errors
    /// The volume is served here already.
    pub async fn open_client(&self, config: ClientConfig) -> Result<(), EngineError> {
        self.ask(|reply| Command::OpenClient { config, reply }).await?
    }

    /// How a volume without a copy here does; `None` if it is not used here.
    ///
    /// # Errors
    /// The engine has stopped.
    pub async fn client_status(&self, volume: VolumeId) -> Result<Option<ClientStatus>, EngineError> {
        self.ask(|reply| Command::ClientStatus { volume, reply }).await
    }

    /// How an attached volume does; all is well for others.
    pub fn health(&self, volume: VolumeId) -> VolumeHealth {
        let Some(found) = self.shared.statistics.volume(volume) else { return VolumeHealth::default() };
        VolumeHealth {
            waiting_for_space: found.waiting_for_space.load(Relaxed) > 0,
            disk_failed: found.disk_failed.load(Relaxed),
            corrupt: found.corrupt.load(Relaxed),
            stalled_requests: found.stalled.load(Relaxed),
        }
    }

    /// What the engine counts.
    pub fn statistics(&self) -> Arc<Statistics> {
        self.shared.statistics.clone()
    }

    /// What the engine is.
    pub fn status(&self) -> EngineStatus {
        EngineStatus {
            io: self.shared.io,
            recovered_requests: self.shared.statistics.recovered.load(Relaxed),
            holder_connected: self.shared.holder_connected.load(Relaxed),
        }
    }

    /// Lets go of the memory of requests, so that a holder without devices may end; not while it keeps any device, served or
    /// not: its requests may be in there. For the end of the process.
    ///
    /// # Errors
    /// The holder does not answer.
    pub async fn release_arena(&self) -> Result<(), EngineError> {
        let release = |holder: &Holder| {
            let devices = holder.list()?.into_iter().filter(|entry| entry.key.starts_with(super::VOLUME));
            if devices.count() == 0 { holder.remove(super::ARENA) } else { Ok(()) }
        };
        self.blocking(move |shared| shared.hold(release)).await??;
        Ok(())
    }

    async fn find(&self, volume: VolumeId) -> Result<Option<Found>, EngineError> {
        self.ask(|reply| Command::Find { volume, reply }).await?
    }

    async fn send(&self, command: Command) -> Result<(), EngineError> {
        self.shared.commands.send(command).await.map_err(|_| EngineError::Stopped)?;
        self.shared.bell.0.ring();
        Ok(())
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| EngineError::Stopped)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> Result<T, EngineError> {
        let shared = self.shared.clone();
        tokio::task::spawn_blocking(move || work(&shared)).await.map_err(|_| EngineError::Stopped)
    }
}
