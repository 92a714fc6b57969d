//! A primary's requests from a node without a copy: they have a place and a buffer here, in the stead of a device's slot.
//!
//! # Invariants
//! * At most [`MAX_ASKED`] at a time, each with at most one request's data; the client waits for the rest. As many answers may wait
//!   for room ([`Unsaid`]).
//! * A buffer stays until its request is answered by the core, which is after the disk and the other copies have used it.
//! * What was damaged on its way is not even heard. The checksums of a write are those that its node has made.
//! * While the catalogue names a client, a device of this node executes nothing: it was left by an earlier publication.

use super::outputs::aligned;
use super::requests::slot_of;
use super::turn::Engine;
use super::unsaid::Unsaid;
use super::volume::{Device, TICKETS, VolumeKey};
use crate::protocol::{
    DiskError, Host, Input, MAX_ASKED, Message, Next, Request, SerialNumber, Session, Standpoint, Tag,
};
use crate::replica::device::slots::RESERVED_SLOTS;
use crate::replica::peer::{Blocks, Payload};
use crate::volume::InstanceId;
use bytes::Bytes;

/// A request's data.
enum Buffer {
    None,
    /// As they came, and where direct I/O takes them.
    Write(Payload, Bytes),
    Read(Blocks),
}

/// The clients' side of a copy.
pub(super) struct Guests {
    core: Host,
    buffers: Vec<Buffer>,
    /// Who has asked last: none of the copies.
    entered: Option<InstanceId>,
    unsaid: Unsaid,
}

impl Guests {
    pub fn new(core: Host) -> Self {
        let buffers = (0..MAX_ASKED).map(|_| Buffer::None).collect();
        Self { core, buffers, entered: None, unsaid: Unsaid::default() }
    }

    /// Whether this is a client, and no copy.
    pub fn are(&self, id: InstanceId) -> bool {
        self.entered == Some(id) || self.core.client() == Some(id)
    }

    /// Whether a device of this node must not be served.
    pub fn own_the_volume(&self) -> bool {
        self.core.client().is_some()
    }

    /// Whether nothing of any client is in the core.
    pub fn is_idle(&self) -> bool {
        self.core.is_idle()
    }

    /// The connection to this one is new, or gone: it asks again.
    pub fn is_connected_anew(&mut self, client: InstanceId) {
        self.unsaid.take(client);
    }

    /// The bytes of a write, for the other copies.
    pub fn payload(&self, place: usize) -> Option<Payload> {
        match self.buffers.get(place)? {
            Buffer::Write(payload, _) => Some(payload.clone()),
            Buffer::None | Buffer::Read(_) => None,
        }
    }

    /// Where the disk finds or puts the data of a request.
    pub fn memory(&mut self, place: usize) -> *mut u8 {
        match self.buffers.get_mut(place) {
            // Only read from.
            Some(Buffer::Write(_, data)) => data.as_ptr().cast_mut(),
            Some(Buffer::Read(blocks)) => blocks.bytes_mut().as_mut_ptr(),
            Some(Buffer::None) | None => std::ptr::null_mut(),
        }
    }
}

impl Engine {
    /// The first tag that is a client's request.
    fn first_guest(&self) -> u32 {
        self.arena.slots.count() + RESERVED_SLOTS + TICKETS as u32
    }

    /// The place of a client's request.
    pub fn guest(&self, tag: Tag) -> Option<usize> {
        tag.0.checked_sub(self.first_guest()).map(|place| place as usize)
    }

    /// What a client says; `false`: it is a copy that speaks.
    pub fn hear_client(&mut self, key: VolumeKey, from: InstanceId, message: &Message, payload: &Payload) -> bool {
        match *message {
            Message::Enter { client, attempt } => {
                if let Some(mirror) = self.mirror_mut(key) {
                    mirror.guests.entered = Some(from);
                    mirror.guests.core.enter(from, client, attempt);
                }
                self.settle_client(key);
            }
            Message::Ask { session, serial, request } => self.asked(key, from, (session, serial, request), payload),
            Message::Entered { .. } | Message::Answer { .. } => {}
            _ => return false,
        }
        true
    }

    fn asked(
        &mut self,
        key: VolumeKey,
        from: InstanceId,
        (session, serial, request): (Session, SerialNumber, Request),
        payload: &Payload,
    ) {
        let first = self.first_guest();
        let Some(core) = self.standpoint(key) else { return };
        let Some(mirror) = self.mirror_mut(key).filter(|mirror| mirror.closing.is_empty()) else { return };
        let place = match mirror.guests.core.ask(from, session, serial, request, core) {
            Ok(place) => place,
            Err(refused) => return self.tell_guest(key, from, &refused, &Payload::default()),
        };
        mirror.guests.buffers[place] = match request {
            Request::Write(_) => Buffer::Write(payload.clone(), aligned(payload.clone())),
            Request::Read(range) => Buffer::Read(Blocks::new(range.bytes() as usize)),
            Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) | Request::Seal(_) => Buffer::None,
        };
        self.step(key, Input::Request { tag: Tag(first + place as u32), request });
    }

    /// The core has ended a client's request.
    pub fn answer_guest(&mut self, key: VolumeKey, place: usize, result: Result<(), DiskError>) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        let buffer = std::mem::replace(&mut mirror.guests.buffers[place], Buffer::None);
        let answer = mirror.guests.core.done(place, result);
        let read = match buffer {
            Buffer::Read(blocks) if result.is_ok() => Payload::new(blocks.freeze()).unwrap_or_default(),
            Buffer::None | Buffer::Write(..) | Buffer::Read(_) => Payload::default(),
        };
        if let Some((to, answer)) = answer {
            self.tell_guest(key, to, &answer, &read);
        }
    }

    /// After a client's request has left the core: a new session may begin, or a device of this node may be read again.
    pub fn guest_has_left(&mut self, key: VolumeKey) {
        let Some(mirror) = self.mirror_mut(key).filter(|mirror| mirror.guests.is_idle()) else { return };
        if mirror.guests.own_the_volume() {
            self.settle_client(key);
        } else {
            self.read_again(key);
        }
    }

    /// The catalogue, read when this copy was primary in that term, names this client.
    pub fn tell_of_client(&mut self, key: VolumeKey, client: Option<InstanceId>, term: Option<crate::protocol::Stamp>) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        let before = mirror.guests.own_the_volume();
        mirror.guests.core.told(client, term);
        let after = mirror.guests.own_the_volume();
        self.settle_client(key);
        if !before && after {
            // Whoever has a device here was published before: what it asks is older than what the client does.
            self.fence_device(key);
            let below = Tag(self.arena.slots.count() + RESERVED_SLOTS);
            self.step(key, Input::FenceRequests { below });
        }
        if before != after {
            self.read_again(key);
        }
    }

    /// Begins a session if one is asked for and can begin.
    pub fn settle_client(&mut self, key: VolumeKey) {
        let Some(core) = self.standpoint(key) else { return };
        let Some(mirror) = self.mirror_mut(key) else { return };
        match mirror.guests.core.settle(core) {
            Next::Wait => {}
            Next::Read => mirror.ask(super::CatalogueRequest::Read),
            Next::Send(to, message) => {
                if let Message::Entered { session, .. } = message {
                    let volume = self.volume_mut(key).map(|volume| volume.id);
                    tracing::info!(?volume, client = %to, ?session, "a node without a copy is served from now on");
                }
                self.tell_guest(key, to, &message, &Payload::default());
            }
        }
    }

    fn standpoint(&mut self, key: VolumeKey) -> Option<Standpoint> {
        let volume = self.volume_mut(key)?;
        let quiet = volume.device.as_ref().is_none_or(Device::is_quiet);
        let (term, answers) = (volume.replica.term(), volume.replica.answers());
        let lost = volume.replica.record().configuration.lost;
        Some(Standpoint { term, lost, answers, quiet, blocks: volume.size.blocks() })
    }

    /// What there is no room for is said when there is some; of more than that the client hears on a new connection.
    fn tell_guest(&mut self, key: VolumeKey, to: InstanceId, message: &Message, payload: &Payload) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        let full = mirror.session.send(to, message, payload) == Err(crate::replica::peer::SendError::Full);
        if full && !mirror.guests.unsaid.keep(to, message, payload) {
            mirror.note_refused(to, super::unsaid::Refused::Answer);
        }
        self.note_unsent(key);
    }

    /// There is room in the connection to this client.
    pub fn tell_guest_the_rest(&mut self, key: VolumeKey, to: InstanceId) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        for (message, payload) in mirror.guests.unsaid.take(to) {
            self.tell_guest(key, to, &message, &payload);
        }
    }

    /// Where the data of the request with this tag are.
    pub fn memory_of(&mut self, key: VolumeKey, tag: Tag) -> *mut u8 {
        let guest = self.guest(tag);
        let Self { volumes, arena, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return std::ptr::null_mut() };
        if let (Some(place), Some(mirror)) = (guest, volume.mirror.as_mut()) {
            return mirror.guests.memory(place);
        }
        let slot = volume.device.as_ref().and_then(|device| slot_of(arena, device, tag));
        slot.map_or(std::ptr::null_mut(), |slot| slot.payload())
    }
}
