//! What a core wants that has copies elsewhere: executed here, or sent.
//!
//! # Invariants
//! * The bytes of a write from another copy are those of its frame, whose blocks were checked before the core heard of it;
//!   without them nothing is written.
//! * What needs bytes that are only lent (a request's slot, what was just read) is done before the next input.
//! * Each output with an operation is answered once, by what the store or the plan says.

use super::copies::Mirror;
use super::mirror::CatalogueRequest;
use super::operations::{Kept, Purpose};
use super::requests::{note_waiting, slot_of};
use super::turn::{Engine, Work};
use super::unsaid::Refused;
use super::volume::{Volume, VolumeKey};
use crate::crash::crash_point;
use crate::protocol::{
    Buffer, DiskError, Input, Lacks, Message, OperationId, Output, Record, Request, SealName, SerialNumber, Suspects,
};
use crate::replica::peer::{Blocks, Payload, Sealed, SendError, digests};
use crate::store::{Action, Control};
use crate::volume::{BlockRange, InstanceId};

impl Engine {
    /// Gives a core an input whose outputs may have to do with other copies.
    pub fn step_mirrored(&mut self, key: VolumeKey, input: Input) {
        // Leases are looked at now, not when the turn began.
        self.tell_time();
        let now = self.now;
        let mut outputs = std::mem::take(&mut self.outputs);
        let Some(volume) = self.volume_mut(key) else { return };
        let Some(mirror) = volume.mirror.as_mut().filter(|mirror| mirror.closing.is_empty()) else { return };
        let before = volume.replica.record().configuration.stamp;
        volume.replica.step(now, input, &mut outputs);
        if volume.replica.record().configuration.stamp != before {
            // Durable here, and nothing is done or said under it yet.
            crash_point("mirror.persisted");
        }
        let role = volume.replica.role();
        if std::mem::replace(&mut mirror.role, role) != role {
            let configuration = volume.replica.record().configuration.stamp;
            tracing::info!(volume = %volume.id, ?role, ?configuration, "its copy on this node has another role");
        }
        for output in outputs.drain(..) {
            match output {
                Output::Send { to, message, buffer } => self.send(key, to, &message, buffer),
                Output::Apply { operation, from, serial, request } => self.apply(key, operation, from, serial, request),
                Output::FenceDevice => self.fence_device(key),
                Output::ApplyPiece { operation, from, serial, piece } => {
                    self.apply_piece(key, operation, from, serial, piece);
                }
                Output::Compare { operation, from, serial, range } => self.compare(key, operation, from, serial, range),
                other => self.work.push_back(Work::Output(key, other)),
            }
        }
        self.outputs = outputs;
        let Some(volume) = self.volume_mut(key) else { return };
        note_waiting(volume);
        let replica = &volume.replica;
        if let Some(mirror) = volume.mirror.as_mut() {
            // What the core has not kept for later is not needed: it was executed, or refused, or repeated.
            mirror.brought.retain(|(from, stamp, serial), _| replica.wants(*from, *stamp, *serial));
            mirror.ranges.retain(|operation, _| replica.copies(*operation));
        }
    }

    /// An output that only a core with copies elsewhere has.
    pub fn mirror_output(&mut self, key: VolumeKey, output: Output) {
        match output {
            Output::ReadPiece { operation, piece } => self.read_piece(key, operation, piece),
            Output::FlushHere { operation } => self.begin(key, operation, Request::Flush, std::ptr::null_mut(), None),
            Output::Persist { operation, record } => self.persist(key, operation, *record),
            Output::WriteHot { operation, extents } => {
                let purpose = Purpose::core(key, operation, std::ptr::null_mut(), None);
                let Some((id, volume)) = self.running_in_store(key, purpose) else { return };
                let (tree, volume) = (volume.tree, volume.id);
                let Self { trees, actions, .. } = self;
                let Some(found) = trees[tree.0 as usize].as_mut() else { return };
                found.store.write_hot(id, volume, &extents, actions);
                self.collect_actions(tree);
            }
            Output::Plan { operation, lacks, suspects } => self.plan(key, operation, lacks, &suspects),
            Output::NextRange { operation } => self.next_missing(key, operation, Ok(())),
            Output::Propose { expected, next } => {
                if let Some(mirror) = self.mirror_mut(key) {
                    mirror.ask(CatalogueRequest::Propose { expected, next });
                }
            }
            Output::ReadConfiguration => {
                if let Some(mirror) = self.mirror_mut(key) {
                    mirror.ask(CatalogueRequest::Read);
                }
            }
            Output::Disk { .. }
            | Output::Complete { .. }
            | Output::Apply { .. }
            | Output::ApplyPiece { .. }
            | Output::Compare { .. }
            | Output::Send { .. }
            | Output::FenceDevice => unreachable!("{output:?} is executed where it is found"),
        }
    }

    /// Counts an operation of the core that the store is about to execute.
    pub fn running_in_store(&mut self, key: VolumeKey, purpose: Purpose) -> Option<(OperationId, &Volume)> {
        let Self { volumes, trees, operations, .. } = self;
        let volume = volumes.get_mut(key.0 as usize)?.as_deref_mut()?;
        trees[volume.tree.0 as usize].as_mut()?.under_way += 1;
        volume.running += 1;
        Some((operations.add(volume.tree, purpose), volume))
    }

    /// Starts a request that is no device's.
    fn begin(
        &mut self,
        key: VolumeKey,
        operation: OperationId,
        request: Request,
        memory: *mut u8,
        kept: Option<Box<Kept>>,
    ) {
        self.start_in_store(key, Purpose::core(key, operation, memory, kept), request);
    }

    /// The store executes this; its end is what the purpose says.
    pub(super) fn start_in_store(&mut self, key: VolumeKey, purpose: Purpose, request: Request) {
        let Some((id, volume)) = self.running_in_store(key, purpose) else { return };
        let (tree, volume) = (volume.tree, volume.id);
        let Self { trees, actions, .. } = self;
        let Some(found) = trees[tree.0 as usize].as_mut() else { return };
        found.store.start(id, volume, request, actions);
        self.collect_actions(tree);
    }

    /// Executes what another copy has sent.
    fn apply(
        &mut self,
        key: VolumeKey,
        operation: OperationId,
        from: InstanceId,
        serial: SerialNumber,
        request: Request,
    ) {
        let Some(volume) = self.volume_mut(key) else { return };
        let stamp = volume.replica.record().configuration.stamp;
        let Some(mirror) = volume.mirror.as_mut() else { return };
        let payload = mirror.brought.remove(&(from, stamp, serial)).unwrap_or_default();
        match request {
            Request::Write(range) if payload.blocks() == range.count() => {
                let data = aligned(payload);
                // Only read from: a write's buffer.
                let memory = data.as_ptr().cast_mut();
                self.begin(key, operation, request, memory, Some(Box::new(Kept::Frame(data))));
            }
            Request::Seal(_) if payload.sealed().is_some() => {
                let volume = volume.id;
                let Some(Sealed { snapshot, created_ms }) = payload.sealed() else { return };
                if !mirror.reserve.has_space_for(snapshot) {
                    tracing::warn!(%volume, %snapshot, "the pool has no space for a full overwrite after this snapshot");
                    return self.refuse(key, operation, DiskError::NoSpace);
                }
                self.seal_again(key, operation, Control::Seal { volume, snapshot, created_ms });
            }
            Request::Write(_) | Request::Seal(_) => {
                tracing::error!(volume = %volume.id, %from, ?request, "what shall be executed came without its data");
                self.refuse(key, operation, DiskError::Corrupt);
            }
            Request::Read(range) => self.read_blocks(key, operation, range),
            Request::Flush | Request::Discard(_) | Request::WriteZeroes(_) => {
                self.begin(key, operation, request, std::ptr::null_mut(), None);
            }
        }
    }

    /// Ends an operation that was not begun, in its place among those that were.
    fn refuse(&mut self, key: VolumeKey, operation: OperationId, error: DiskError) {
        let purpose = Purpose::core(key, operation, std::ptr::null_mut(), None);
        let Some((id, volume)) = self.running_in_store(key, purpose) else { return };
        let tree = volume.tree;
        self.work.push_back(Work::Action(tree, Action::Done { operation: id, result: Err(error) }));
    }

    /// Reads into memory of its own.
    fn read_blocks(&mut self, key: VolumeKey, operation: OperationId, range: BlockRange) {
        let mut blocks = Blocks::new(range.bytes() as usize);
        let memory = blocks.bytes_mut().as_mut_ptr();
        self.begin(key, operation, Request::Read(range), memory, Some(Box::new(Kept::Read(blocks))));
    }

    /// What was read for another copy, for the message that follows.
    pub fn keep_read(&mut self, key: VolumeKey, operation: OperationId, blocks: Blocks) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        let Ok(payload) = Payload::new(blocks.freeze()) else { return };
        mirror.answer = Some((operation, payload));
    }

    /// Starts a seal, also one that found the store busy before.
    pub fn seal_again(&mut self, key: VolumeKey, operation: OperationId, control: Control) {
        let kept = Some(Box::new(Kept::Seal(control)));
        let purpose = Purpose::core(key, operation, std::ptr::null_mut(), kept);
        let Some((id, volume)) = self.running_in_store(key, purpose) else { return };
        let tree = volume.tree;
        let Self { trees, actions, .. } = self;
        let Some(found) = trees[tree.0 as usize].as_mut() else { return };
        crash_point("mirror.seal");
        found.store.control(id, control, actions);
        self.collect_actions(tree);
    }

    fn persist(&mut self, key: VolumeKey, operation: OperationId, record: Record) {
        let purpose = Purpose::core(key, operation, std::ptr::null_mut(), None);
        let Some((id, volume)) = self.running_in_store(key, purpose) else { return };
        let tree = volume.tree;
        let Self { volumes, trees, actions, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let (Some(mirror), Some(found)) = (volume.mirror.as_ref(), trees[tree.0 as usize].as_mut()) else { return };
        // It is committed: peers that know only an older catalogue are refused from now on, also where this copy learned it
        // from its primary.
        mirror.session.set_generation(record.configuration.stamp.generation);
        let before = found.store.mirrored(volume.id).map(|known| known.record.configuration.stamp);
        let reserve = mirror.reserve_for(&record.configuration, before, found.id);
        let life = found.life(mirror.boot);
        crash_point("mirror.persist");
        found.store.persist(id, volume.id, record, life, reserve, actions);
        self.collect_actions(tree);
    }

    fn plan(&mut self, key: VolumeKey, operation: OperationId, lacks: Option<Lacks>, suspects: &Suspects) {
        let Self { volumes, trees, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let Some(tree) = trees[volume.tree.0 as usize].as_mut() else { return };
        let planned = tree.store.plan(volume.id, lacks, suspects);
        crash_point("mirror.planned");
        self.next_missing(key, operation, planned);
    }

    /// Sends with the bytes that the buffer names. Loss is allowed: what a full queue refuses is remembered.
    fn send(&mut self, key: VolumeKey, to: InstanceId, message: &Message, buffer: Buffer) {
        let guest = match buffer {
            Buffer::Request(tag) => self.guest(tag),
            Buffer::None | Buffer::Operation(_) => None,
        };
        let Self { volumes, arena, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let Some(mirror) = volume.mirror.as_deref() else { return };
        if mirror.repeats.is_some_and(|(peer, refused)| peer == to && refused.was_taken(message)) {
            return;
        }
        let payload = match (message, buffer) {
            (Message::Prepare { request: Request::Seal(name), .. }, _) => sealed(volume, *name),
            (_, Buffer::Request(_)) if guest.is_some() => guest.and_then(|place| mirror.guests.payload(place)),
            (Message::Prepare { request: Request::Write(range), .. }, Buffer::Request(tag)) => {
                let bytes = range.bytes() as usize;
                // Before the data is copied.
                if let Err(error) = mirror.session.has_room(to, bytes) {
                    return not_sent(volume, to, message, error);
                }
                let slot = volume.device.as_ref().and_then(|device| slot_of(arena, device, tag));
                slot.and_then(|slot| Payload::gather(bytes, |at, block| slot.copy(at, block)).ok())
            }
            (Message::Prepared { result: Err(_), .. }, _) | (_, Buffer::None) => Some(Payload::default()),
            (_, Buffer::Operation(read)) => read_for(mirror, message, read),
            (_, Buffer::Request(_)) => None,
        };
        let Some(payload) = payload else {
            tracing::error!(volume = %volume.id, %to, ?message, "not sent: its data is not there");
            return;
        };
        match mirror.session.send(to, message, &payload) {
            Ok(()) => self.note_unsent(key),
            Err(error) => not_sent(volume, to, message, error),
        }
    }
}

/// A message was not taken.
fn not_sent(volume: &mut Volume, to: InstanceId, message: &Message, error: SendError) {
    let Some(mirror) = volume.mirror.as_mut() else { return };
    match error {
        // Without a connection everything is said again when there is one.
        SendError::Disconnected | SendError::NoPeer => {}
        SendError::Full => mirror.note_refused(to, Refused::of(message)),
        SendError::Payload => tracing::error!(volume = %volume.id, %to, ?message, %error, "not sent"),
    }
}

impl Engine {
    /// Its session has something to say when the turn ends.
    pub fn note_unsent(&mut self, key: VolumeKey) {
        if let Some(volume) = self.volume_mut(key)
            && !std::mem::replace(&mut volume.unsent, true)
        {
            self.unsent.push(key);
        }
    }

    /// What all cores have said in this turn goes out together.
    pub fn flush_sessions(&mut self) {
        while let Some(key) = self.unsent.pop() {
            let Some(volume) = self.volume_mut(key) else { continue };
            volume.unsent = false;
            if let Some(session) = volume.session() {
                session.flush();
            }
        }
    }
}

/// Bytes where direct I/O takes them: as they came, since the transport puts them there.
pub(super) fn aligned(payload: Payload) -> bytes::Bytes {
    let data = payload.data();
    if Blocks::are_aligned(data) {
        return data.clone();
    }
    let mut blocks = Blocks::new(data.len());
    blocks.bytes_mut().copy_from_slice(data);
    blocks.freeze()
}

/// What the operator's ticket says of a seal.
fn sealed(volume: &Volume, name: SealName) -> Option<Payload> {
    match volume.tickets.get(name.0 as usize)?.as_ref()?.control {
        Control::Seal { snapshot, created_ms, .. } => Some(Payload::seal(Sealed { snapshot, created_ms })),
        _ => None,
    }
}

/// What goes with a message of what was read. A piece without data costs its target no space and the network nothing.
fn read_for(mirror: &Mirror, message: &Message, read: OperationId) -> Option<Payload> {
    let piece = |read| mirror.ranges.get(&read).map(|(piece, payload)| (piece.blocks(), payload));
    match message {
        Message::Copy { piece: sent, .. } => piece(read).map(|(blocks, payload)| match sent.blocks() == blocks {
            _ if payload.is_zero() => Payload::default(),
            true => payload.clone(),
            false => payload.select(blocks, sent.blocks()),
        }),
        Message::Compare { .. } => piece(read).map(|(_, payload)| Payload::digests(digests(payload.data()))),
        _ => mirror.answer.as_ref().filter(|(operation, _)| *operation == read).map(|(_, payload)| payload.clone()),
    }
}
