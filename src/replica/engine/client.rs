//! Volumes used on this node that have no copy here: their core's disk is the primary of another node.
//!
//! ```text
//!   device ─> Replica::sole ─Disk─> Client ─Session::send─> copies' nodes        see src/protocol/client.rs
//!                 ^──Completed── payload into the slot <─Event── driver (src/replica/mirror/client.rs)
//! ```
//! # Invariants
//! * A request stays in its slot, in memory that the holder keeps, until it is answered: a killed engine's successor asks again.
//! * What was damaged on its way is neither written into a slot nor answered: the connection begins anew.
//! * A device belongs to one publication. One that was left by an earlier publication is never served with a later one.
//! * What the copies had lost when it was served last is kept beside its slot before anything is completed: its next engine
//!   knows whether they have lost more since.

use super::EngineError;
use super::commands::Reply;
use super::mirror::MirrorInput;
use super::requests::slot_of;
use super::tree::TreeKey;
use super::turn::Engine;
use super::unsaid::Unasked;
use super::volume::VolumeKey;
use crate::protocol::{
    Client, ClientOutput, DiskError, Input, Message, OperationId, Replica, Request, SerialNumber, Tag,
};
use crate::replica::device::slots::RESERVED_SLOTS;
use crate::replica::peer::{Event, Payload, SendError, Session};
use crate::volume::{InstanceId, VolumeId, VolumeSize};
use std::path::PathBuf;
use std::sync::Arc;

/// A volume that is to be used here without a copy.
pub struct ClientConfig {
    /// Which.
    pub volume: VolumeId,
    /// Its publication on this node, by which the copies know it.
    pub publication: InstanceId,
    /// Bytes that every copy can hold.
    pub size: VolumeSize,
    /// Its conversations with the copies.
    pub session: Arc<Session>,
}

/// How such a volume does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientStatus {
    /// Its publication on this node.
    pub publication: InstanceId,
    /// What its device has.
    pub size: VolumeSize,
    /// A primary serves it and answers.
    pub answers: bool,
    /// It was published elsewhere since: nothing is executed any more.
    pub ended: bool,
    /// The copy that serves it.
    pub host: Option<InstanceId>,
    /// Its device, if there is one.
    pub device: Option<PathBuf>,
    /// Requests that are not answered.
    pub requests: usize,
}

/// What stands in the place of a tree.
pub(super) struct Remote {
    pub publication: InstanceId,
    pub session: Arc<Session>,
    core: Client,
    unasked: Unasked,
    /// Heartbeats for which its last flush has waited for a primary.
    pub leaving: Option<u8>,
}

/// Heartbeats for which a device that goes waits for a primary: its takeover takes less. What was written is in the caches of
/// all members anyway.
const LEAVE_LIMIT: u8 = 40;

impl Engine {
    /// Serves the volume's device from now on, when there is one; one that a killed engine left goes on.
    pub fn open_client(&mut self, config: ClientConfig) -> Result<(), EngineError> {
        let ClientConfig { volume: id, publication, size, session } = config;
        if self.volume_of(id).is_some() {
            return Err(EngineError::MirrorIsOpen(id));
        }
        self.tell_time();
        let key = self.add_volume(TreeKey::NONE, id, size, Replica::sole(publication));
        let left = self.parked.iter().find(|parked| parked.fuse.volume == id && parked.tree == publication);
        let core = match left {
            Some(left) => Client::resumed(session.incarnation(), left.fuse.slots.slot(0).lost()),
            None => Client::new(session.incarnation()),
        };
        if let Some(volume) = self.volume_mut(key) {
            volume.remote =
                Some(Box::new(Remote { publication, session, core, unasked: Unasked::default(), leaving: None }));
        }
        if self.mirrored.is_empty() {
            self.next_heartbeat = self.now.0;
        }
        self.mirrored.push(key);
        self.revive_device_of(id);
        Ok(())
    }

    /// The publication of a volume that is used here without a copy.
    pub fn publication_of(&mut self, id: VolumeId) -> Option<InstanceId> {
        let key = self.volume_of(id)?;
        self.volume_mut(key)?.remote.as_ref().map(|remote| remote.publication)
    }

    /// Ends the use of a volume that has no device any more.
    pub fn close_client(&mut self, key: VolumeKey, reply: Reply<Result<(), EngineError>>) {
        let Some(volume) = self.volume_mut(key) else { return };
        if volume.device.is_some() {
            return drop(reply.send(Err(EngineError::VolumeAttached(volume.id))));
        }
        self.mirrored.retain(|k| *k != key);
        self.stop_listening(key, None);
        self.volumes[key.0 as usize] = None;
        drop(reply.send(Ok(())));
    }

    pub fn client_status(&mut self, id: VolumeId) -> Option<ClientStatus> {
        let (key, now) = (self.volume_of(id)?, self.now);
        let volume = self.volume_mut(key)?;
        let remote = volume.remote.as_ref()?;
        let device = volume.device.as_ref().and_then(|device| device.loop_device);
        Some(ClientStatus {
            publication: remote.publication,
            size: volume.size,
            answers: remote.core.is_served(),
            ended: remote.core.has_ended(),
            host: remote.core.host(),
            device: device.map(|device| device.path()),
            requests: volume.replica.status(now).requests,
        })
    }

    /// What the core wants executed.
    pub fn ask_primary(&mut self, key: VolumeKey, operation: OperationId, request: Request) {
        self.with_client(key, None, |core, outputs| core.start(operation, request, outputs));
    }

    /// Time passes; `false`: the volume is none of these.
    pub fn tick_client(&mut self, key: VolumeKey) -> bool {
        let Some(remote) = self.volume_mut(key).and_then(|volume| volume.remote.as_mut()) else { return false };
        let served = remote.core.is_served();
        let waited = remote.leaving.as_mut().map_or(0, |waited| {
            *waited += u8::from(!served);
            *waited
        });
        if waited >= LEAVE_LIMIT {
            remote.leaving = None;
            self.with_client(key, None, Client::end);
        } else {
            self.with_client(key, None, Client::tick);
        }
        true
    }

    pub fn tell_client(&mut self, key: VolumeKey, input: MirrorInput) {
        let Some(volume) = self.volume_mut(key) else { return };
        let Some(remote) = volume.remote.as_mut() else { return };
        match input {
            MirrorInput::Size(size) => volume.size = volume.size.max(size),
            MirrorInput::Client { client, .. } if client != Some(remote.publication) => {
                if !remote.core.has_ended() {
                    let volume = volume.id;
                    tracing::error!(%volume, "it is not published on this node any more: its device gets errors");
                }
                self.with_client(key, None, Client::end);
            }
            MirrorInput::Peer(event) => self.client_event(key, event),
            // Whom it is served by is asked of the copies themselves.
            MirrorInput::Client { .. }
            | MirrorInput::Configuration(_)
            | MirrorInput::Wish(_)
            | MirrorInput::Resync(_)
            | MirrorInput::Proposed { .. } => {}
        }
    }

    pub fn client_event(&mut self, key: VolumeKey, event: Event) {
        match event {
            Event::Connected(copy) => {
                self.with_client(key, None, |core, outputs| core.connected(copy, outputs));
                self.begin_listening(key, copy);
            }
            Event::Room(_) => self.send_unsent(key),
            Event::Silent(copy) => {
                self.stop_listening(key, Some(copy));
                self.with_client(key, None, |core, outputs| core.silent(copy, outputs));
            }
            Event::Received { from, message, payload } => {
                let Some(remote) = self.volume_mut(key).and_then(|volume| volume.remote.as_ref()) else { return };
                if payload.check().is_err() || !fits(&remote.core, &message, &payload) {
                    remote.session.reconnect(from);
                    self.stop_listening(key, Some(from));
                    tracing::error!(volume = ?self.volume_mut(key).map(|v| v.id), %from, "damaged on its way");
                    return;
                }
                let ended = remote.core.has_ended();
                self.with_client(key, Some(&payload), |core, outputs| core.received(from, &message, outputs));
                self.note_lost(key, ended);
            }
        }
    }

    /// Keeps what the copies have lost for the device's next engine, and says it if that has ended the client.
    pub fn note_lost(&mut self, key: VolumeKey, ended: bool) {
        let Some(volume) = self.volume_mut(key) else { return };
        let Some(remote) = volume.remote.as_ref() else { return };
        if let (Some(lost), Some(device)) = (remote.core.lost(), volume.device.as_ref()) {
            device.fuse.slots.slot(0).keep_lost(lost);
        }
        if !ended && remote.core.has_ended() {
            tracing::error!(
                volume = %volume.id,
                "no copy has everything that was acknowledged and not flushed: its device gets errors; unstage and stage it again"
            );
        }
    }

    /// Gives the client something, and does what it wants.
    fn with_client(
        &mut self,
        key: VolumeKey,
        payload: Option<&Payload>,
        tell: impl FnOnce(&mut Client, &mut Vec<ClientOutput>),
    ) {
        let mut outputs = Vec::new();
        let Some(remote) = self.volume_mut(key).and_then(|volume| volume.remote.as_mut()) else { return };
        tell(&mut remote.core, &mut outputs);
        for output in outputs {
            match output {
                ClientOutput::Send { to, message, operation } => self.send_asked(key, to, &message, operation),
                ClientOutput::Done { operation, result } => {
                    self.fill_slot(key, operation, payload.filter(|_| result.is_ok()));
                    self.step(key, Input::Completed { operation, result });
                }
            }
        }
    }

    /// What a read has brought goes to where its device takes it.
    fn fill_slot(&mut self, key: VolumeKey, operation: OperationId, payload: Option<&Payload>) {
        let Self { volumes, arena, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref() else { return };
        let (Some(tag), Some(device)) = (volume.replica.tag_of(operation), volume.device.as_ref()) else { return };
        if let (Some(slot), Some(payload)) = (slot_of(arena, device, tag), payload) {
            slot.put(payload.data());
        }
    }

    /// What found a full queue and was never sent goes now, in its session; unless it is over, or answered in another one.
    fn send_unsent(&mut self, key: VolumeKey) {
        let Some(remote) = self.volume_mut(key).and_then(|volume| volume.remote.as_mut()) else { return };
        for (to, message, operation) in remote.unasked.take() {
            let remote = self.volume_mut(key).and_then(|volume| volume.remote.as_ref());
            if remote.is_some_and(|remote| remote.core.still_asks(to, &message)) {
                self.send_asked(key, to, &message, Some(operation));
            }
        }
    }

    fn send_asked(&mut self, key: VolumeKey, to: InstanceId, message: &Message, operation: Option<OperationId>) {
        let Self { volumes, arena, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref() else { return };
        let Some(remote) = volume.remote.as_ref() else { return };
        let payload = match message {
            Message::Ask { request: Request::Write(range), .. } => {
                let bytes = range.bytes() as usize;
                // Before the data is copied.
                if let Err(error) = remote.session.has_room(to, bytes) {
                    return self.not_asked(key, to, message, operation, error);
                }
                let tag = operation.and_then(|operation| volume.replica.tag_of(operation));
                let slot = tag.zip(volume.device.as_ref()).and_then(|(tag, device)| slot_of(arena, device, tag));
                slot.and_then(|slot| Payload::gather(bytes, |at, block| slot.copy(at, block)).ok())
            }
            _ => Some(Payload::default()),
        };
        let Some(payload) = payload else {
            tracing::error!(volume = %volume.id, %to, ?message, "not sent: its data is not there");
            return;
        };
        match remote.session.send(to, message, &payload) {
            Ok(()) => self.note_unsent(key),
            Err(error) => self.not_asked(key, to, message, operation, error),
        }
    }

    fn not_asked(
        &mut self,
        key: VolumeKey,
        to: InstanceId,
        message: &Message,
        operation: Option<OperationId>,
        error: SendError,
    ) {
        let Some(volume) = self.volume_mut(key) else { return };
        let Some(remote) = volume.remote.as_mut() else { return };
        match error {
            // An event follows, and with it a new session.
            SendError::Disconnected | SendError::NoPeer => {}
            SendError::Full => remote.unasked.keep(to, message, operation),
            SendError::Payload => tracing::error!(volume = %volume.id, %to, ?message, %error, "not sent"),
        }
    }

    /// The device is leaving: what was written is put on stable media, by whoever is primary. A device whose connection is
    /// gone has nobody who waits for anything.
    pub fn leave_client(&mut self, key: VolumeKey, is_whole: bool) {
        let Some(volume) = self.volume_mut(key) else { return };
        let (Some(remote), Some(device)) = (volume.remote.as_mut(), volume.device.as_mut()) else { return };
        if !is_whole {
            return self.with_client(key, None, Client::end);
        }
        (device.flushing, remote.leaving) = (true, Some(0));
        let tag = Tag(self.arena.slots.count() + RESERVED_SLOTS);
        self.step(key, Input::Request { tag, request: Request::Flush });
    }
}

/// Whether the data that came are those that were asked for.
fn fits(core: &Client, message: &Message, payload: &Payload) -> bool {
    let Message::Answer { serial: SerialNumber(serial), result, .. } = *message else { return true };
    let expected = match core.request(OperationId(serial)) {
        Some(Request::Read(range)) if result == Ok(()) => range.count(),
        Some(_) => 0,
        // Answered before: nothing is done with it.
        None => return true,
    };
    result == Err(DiskError::Fenced) || payload.blocks() == expected
}
