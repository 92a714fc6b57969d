//! Devices come and go: a volume gets one, and gives it up when its requests are answered.
//!
//! Invariants: a volume without copies elsewhere is served exactly as long as it has a device; a mirrored one's core stays.

use super::EngineError;
use super::commands::{Found, Reply};
use super::lines::Watched;
use super::operations::Purpose;
use super::tree::TreeKey;
use super::turn::Engine;
use super::volume::{Device, Phase, TICKETS, Volume, VolumeKey};
use crate::protocol::{DiskError, Replica, Request};
use crate::replica::device::FuseLoop;
use crate::replica::device::loop_device::LoopDevice;
use crate::volume::{VolumeId, VolumeSize};
use std::os::fd::AsRawFd;

impl Engine {
    /// The device of the volume, if it has one. One that waits is there, and nothing can be done with it.
    pub fn find_device(&self, id: VolumeId) -> Result<Option<Found>, EngineError> {
        match self.parked.iter().find(|parked| parked.fuse.volume == id) {
            None => Ok(self.find(id)),
            Some(left) if left.given_up => {
                Ok(Some(Found { size: None, device: left.device, control: left.fuse.control(), broken: true }))
            }
            Some(left) if left.without_copy => Err(EngineError::DeviceLeft(id)),
            Some(_) => Err(EngineError::DeviceWaits(id)),
        }
    }

    fn find(&self, id: VolumeId) -> Option<Found> {
        let volume = self.volumes[self.volume_of(id)?.0 as usize].as_deref()?;
        let device = volume.device.as_ref()?;
        Some(Found {
            size: Some(volume.size),
            device: device.loop_device,
            control: device.fuse.control(),
            broken: matches!(device.phase, Phase::Broken | Phase::Fenced),
        })
    }

    /// The open tree that has the volume, and the volume's size.
    pub fn known(&mut self, key: TreeKey, id: VolumeId) -> Result<VolumeSize, EngineError> {
        let tree = self.tree_mut(key).filter(|tree| tree.is_open()).ok_or(EngineError::UnknownVolume(id))?;
        let info = tree.store.volumes().into_iter().find(|info| info.volume == id);
        Ok(info.ok_or(EngineError::UnknownVolume(id))?.size)
    }

    /// A volume without device.
    pub fn add_volume(&mut self, tree: TreeKey, id: VolumeId, size: VolumeSize, replica: Replica) -> VolumeKey {
        let tickets = [const { None }; TICKETS];
        self.volumes.push(Some(Box::new(Volume {
            id,
            tree,
            size,
            replica,
            tickets,
            running: 0,
            unsent: false,
            device: None,
            mirror: None,
            remote: None,
            opening: None,
        })));
        VolumeKey(self.volumes.len() as u32 - 1)
    }

    /// Serves a device from now on.
    pub fn add_device(
        &mut self,
        tree_key: TreeKey,
        fuse: FuseLoop,
        loop_device: Option<LoopDevice>,
    ) -> Result<VolumeKey, EngineError> {
        let id = fuse.volume;
        let served = self.volume_of(id);
        if served.is_some_and(|key| self.device_mut(key).is_some()) {
            return Err(EngineError::VolumeAttached(id));
        }
        let size = match served.and_then(|key| self.volume_mut(key)).filter(|volume| volume.remote.is_some()) {
            Some(volume) => volume.size,
            None => self.known(tree_key, id)?,
        };
        if served.is_none() && self.waits_for_core(tree_key, id) {
            return Err(EngineError::MirrorNotOpen(id));
        }
        let watch = self.next_watch();
        let watched = self.io.watch(watch, fuse.connection().as_raw_fd());
        watched.map_err(|error| EngineError::Watch { volume: id, error })?;
        let key = match (served, self.tree_mut(tree_key).map(|tree| tree.id)) {
            (Some(key), _) => key,
            (None, Some(copy)) => self.add_volume(tree_key, id, size, Replica::sole(copy)),
            (None, None) => return Err(EngineError::UnknownVolume(id)),
        };
        self.watched.insert(watch, Watched::Device(key));
        let tags = (self.arena.slots.count() + fuse.slots.count()) as usize;
        let statistics = self.statistics.add(id);
        let Some(volume) = self.volume_mut(key) else { return Err(EngineError::UnknownVolume(id)) };
        volume.device = Some(Device {
            loop_device,
            watch,
            pending: vec![None; tags],
            arena_used: 0,
            own_free: (0..fuse.slots.count()).collect(),
            fuse,
            ready: false,
            flushing: false,
            phase: Phase::Serving,
            statistics,
        });
        self.note_lost(key, true);
        // Requests may be there already, from before the watch.
        self.make_ready(key);
        Ok(key)
    }

    /// The device belongs to a term of this copy that is over. Its user may hold what another primary's writes have replaced
    /// (an old filesystem, dirty pages, requests that wait in the kernel), so it never gets through any more: the kernel
    /// ends the connection, and keeps that whatever becomes of this process. Rare, and it only wakes whoever waits.
    pub fn fence_device(&mut self, key: VolumeKey) {
        let lost = self.volume_mut(key).is_some_and(|volume| volume.replica.has_lost_its_own());
        let why = if lost {
            "the disk failed to make written data durable, and no other copy has it, so writes that were completed may be lost"
        } else {
            "another copy is the volume's primary, or shall be, and this node was not asked to unstage it"
        };
        self.end_device(key, why);
    }

    /// The device never gets through any more; see [`Self::fence_device`].
    pub fn end_device(&mut self, key: VolumeKey, why: &str) {
        let Some(device) = self.device_mut(key).filter(|device| matches!(device.phase, Phase::Serving)) else { return };
        device.phase = Phase::Fenced;
        let volume = device.fuse.volume;
        tracing::error!(%volume, why, "its device is given up: unstage and stage it again");
        if let Err(error) = device.fuse.abort() {
            tracing::error!(%volume, %error, "its FUSE connection cannot be ended: what it is asked for is answered with errors");
            self.has_loose_device = true;
        }
    }

    /// The loop device is gone, so nothing new comes; what was written is put on stable media.
    pub fn remove_device(&mut self, id: VolumeId, reply: Reply<()>) {
        let key = self.volume_of(id);
        let Some(key) = key.filter(|key| self.device_mut(*key).is_some()) else {
            self.forget_given_up(id);
            let _ = reply.send(());
            return;
        };
        let Self { volumes, trees, operations, actions, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let tree_key = volume.tree;
        let Some(device) = volume.device.as_mut() else { return };
        let phase = std::mem::replace(&mut device.phase, Phase::Broken);
        let (watch, fd) = (device.watch, device.fuse.connection().as_raw_fd());
        let is_watched = matches!(phase, Phase::Serving | Phase::Fenced);
        if let Phase::Leaving(mut replies) = phase {
            replies.push(reply);
            device.phase = Phase::Leaving(replies);
            return;
        }
        device.phase = Phase::Leaving(vec![reply]);
        if volume.remote.is_some() {
            if is_watched {
                self.unwatch(watch, fd);
            }
            self.leave_client(key, is_watched);
            self.pump();
            return self.let_go(key);
        }
        if let Some(tree) = trees[tree_key.0 as usize].as_mut() {
            device.flushing = true;
            tree.under_way += 1;
            let operation = operations.add(tree_key, Purpose::LastFlushOfDevice(key));
            tree.store.start(operation, id, Request::Flush, actions);
        }
        if is_watched {
            self.unwatch(watch, fd);
        }
        self.collect_actions(tree_key);
        self.pump();
        self.let_go(key);
    }

    pub fn flushed_for_good(&mut self, key: VolumeKey, result: Result<(), DiskError>) {
        if let Some(volume) = self.volume_mut(key)
            && let Some(device) = volume.device.as_mut()
        {
            device.flushing = false;
            if let Err(error) = result {
                tracing::error!(volume = %volume.id, %error, "the last flush before its device went failed");
            }
        }
        self.let_go(key);
    }

    /// Lets a device go when it is leaving and nothing of it is under way, and its volume with it if nobody else needs it.
    pub fn let_go(&mut self, key: VolumeKey) {
        let Some(volume) = self.volumes.get_mut(key.0 as usize).and_then(Option::as_deref_mut) else { return };
        // A mirrored volume's core stays, and what an operator wants of it; so does one without a copy, until it is closed.
        let stays = volume.mirror.is_some() || volume.remote.is_some() || volume.opening.is_some();
        let tickets = !stays && volume.tickets.iter().any(Option::is_some);
        let leaves = |device: &mut Device| matches!(device.phase, Phase::Leaving(_)) && device.is_quiet() && !tickets;
        let Some(device) = volume.device.take_if(leaves) else { return };
        self.ready.retain(|k| *k != key);
        self.starving.retain(|k| *k != key);
        self.statistics.remove(volume.id);
        if stays {
            self.open_if_quiet(key);
        } else {
            self.volumes[key.0 as usize] = None;
        }
        if let Phase::Leaving(replies) = device.phase {
            for reply in replies {
                let _ = reply.send(());
            }
        }
    }
}
