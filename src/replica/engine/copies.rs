//! Copies of mirrored volumes come and go: a core gets its record, then its peers' words, and ends when nothing runs for it.
//!
//! # Invariants
//! * **Persist, then act**: a core begins with the record that is durable beside the copy.
//! * A core takes the place of another only when that one has no request and nothing runs for it.
//! * A device that a killed engine left gets its core before its requests are executed again.

use super::commands::Reply;
use super::host::Guests;
use super::mirror::{CatalogueRequest, CopyState, CopyStatus, MirrorConfig, MirrorInput, MirrorStatus};
use super::operations::Purpose;
use super::pieces::Parts;
use super::tree::TreeKey;
use super::turn::Engine;
use super::unsaid::Refused;
use super::volume::{Volume, VolumeKey};
use super::{EngineError, SealReserve};
use crate::protocol::{
    Because, Configuration, DiskError, HEARTBEAT, Host, Input, Member, Memory, Message, OperationId, Piece, Replica,
    Role, SerialNumber, Stamp, Standing,
};
use crate::replica::peer::{Event, Payload, Session};
use crate::store::{Control, Reserve};
use crate::volume::{BLOCK_SIZE, BootId, InstanceId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Bytes of frames, by who sent them, under which configuration, and their place in the term.
pub(super) type Brought = BTreeMap<(InstanceId, Stamp, SerialNumber), Payload>;

/// What a core needs that has copies elsewhere.
pub(super) struct Mirror {
    pub session: Arc<Session>,
    pub boot: BootId,
    pub reserve: SealReserve,
    requests: mpsc::Sender<CatalogueRequest>,
    /// What found no place there.
    unread: bool,
    unproposed: Option<CatalogueRequest>,
    /// Of what waits for its turn in the core, which bounds it: a primary has so many requests in flight.
    pub brought: Brought,
    /// Pieces that the store works on; the core bounds both.
    pub pieces: BTreeMap<OperationId, Parts>,
    /// What was read and is still to be sent.
    pub ranges: BTreeMap<OperationId, (Piece, Payload)>,
    /// What was read for another copy, while the core is told so.
    pub answer: Option<(OperationId, Payload)>,
    refused: BTreeMap<InstanceId, Refused>,
    /// While the core says again, for this peer, what its connection has refused.
    pub repeats: Option<(InstanceId, Refused)>,
    /// Nodes without a copy that ask this one.
    pub guests: Guests,
    connected: BTreeSet<InstanceId>,
    /// Of the volume, behind what the plan has given last.
    pub behind_bytes: u64,
    /// Seals that found the store busy, tried again with each heartbeat; at most one for each ticket of the primary.
    pub busy: Vec<(OperationId, Control)>,
    pub role: Role,
    /// Copies that are left alone, as far as it was said.
    resting: BTreeSet<(InstanceId, Because)>,
    /// What every copy can hold, as it was told; never less than before.
    told_size: Option<VolumeSize>,
    /// Nothing is done any more; these are told when nothing runs.
    pub closing: Vec<Reply<Result<(), EngineError>>>,
}

/// A core that is about to begin.
pub(super) struct Opening {
    config: Box<MirrorConfig>,
    reply: Reply<Result<(), EngineError>>,
    persisting: bool,
}

impl Mirror {
    fn new(config: MirrorConfig, role: Role) -> Self {
        let MirrorConfig { session, boot, reserve, requests, .. } = config;
        Self {
            guests: Guests::new(Host::new(session.incarnation())),
            session,
            boot,
            reserve,
            requests,
            unread: false,
            unproposed: None,
            brought: BTreeMap::new(),
            pieces: BTreeMap::new(),
            ranges: BTreeMap::new(),
            answer: None,
            refused: BTreeMap::new(),
            repeats: None,
            connected: BTreeSet::new(),
            behind_bytes: 0,
            busy: Vec::new(),
            role,
            resting: BTreeSet::new(),
            told_size: None,
            closing: Vec::new(),
        }
    }

    /// The connection to this peer has refused something.
    pub fn note_refused(&mut self, to: InstanceId, refused: Refused) {
        let known = self.refused.entry(to).or_insert(refused);
        *known = known.and(refused);
    }

    /// Asks the catalogue, now or with the next heartbeat. Without a driver nobody will answer, and the copy waits.
    pub fn ask(&mut self, request: CatalogueRequest) {
        match self.requests.try_send(request) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(CatalogueRequest::Read)) => self.unread = true,
            Err(mpsc::error::TrySendError::Full(proposal)) => self.unproposed = Some(proposal),
        }
    }

    fn ask_again(&mut self) {
        if let Some(proposal) = self.unproposed.take() {
            self.ask(proposal);
        }
        if std::mem::take(&mut self.unread) {
            self.ask(CatalogueRequest::Read);
        }
    }

    /// What the pool has promised for this record: space is needed only when a copy has left since the one before.
    pub fn reserve_for(&self, next: &Configuration, before: Option<Stamp>, me: InstanceId) -> Reserve {
        let left = |(copy, lacks): (&InstanceId, &crate::protocol::Lacks)| match lacks {
            crate::protocol::Lacks::Since(since) => *copy != me && before.is_some_and(|before| *since > before),
            crate::protocol::Lacks::Everything => false,
        };
        if next.candidates.iter().any(left) { self.reserve.take() } else { Reserve::Refused }
    }
}

impl Engine {
    pub fn open_mirror(&mut self, config: Box<MirrorConfig>, reply: Reply<Result<(), EngineError>>) {
        match self.place_for(&config) {
            Ok(key) => {
                if let Some(volume) = self.volume_mut(key) {
                    volume.opening = Some(Opening { config, reply, persisting: false });
                }
                self.open_if_quiet(key);
                self.pump();
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// The volume as it is served, or one without device.
    fn place_for(&mut self, config: &MirrorConfig) -> Result<VolumeKey, EngineError> {
        let (tree, id) = (config.tree, config.volume);
        let tree_key = self.tree_of(tree).ok_or(EngineError::UnknownTree(tree))?;
        let size = self.known(tree_key, id)?;
        let Some(key) = self.volume_of(id) else {
            return Ok(self.add_volume(tree_key, id, size, Replica::sole(tree)));
        };
        match self.volume_mut(key) {
            Some(volume) if volume.mirror.is_some() || volume.opening.is_some() => Err(EngineError::MirrorIsOpen(id)),
            Some(volume) if volume.tree == tree_key => Ok(key),
            Some(_) | None => Err(EngineError::UnknownVolume(id)),
        }
    }

    /// Goes on with opening a copy when the core before has nothing to do any more.
    pub fn open_if_quiet(&mut self, key: VolumeKey) {
        let Self { volumes, trees, operations, actions, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        if volume.opening.is_none() || !volume.has_no_request() || volume.running > 0 {
            return;
        }
        let Some(opening) = volume.opening.as_mut().filter(|opening| !opening.persisting) else { return };
        let tree_key = volume.tree;
        let Some(tree) = trees[tree_key.0 as usize].as_mut() else { return };
        if tree.store.mirrored(volume.id).is_some() {
            return self.begin_core(key);
        }
        opening.persisting = true;
        let (first, life) = (opening.config.first.clone(), tree.life(opening.config.boot));
        volume.running += 1;
        tree.under_way += 1;
        let operation = operations.add(tree_key, Purpose::FirstRecord(key));
        tree.store.persist(operation, volume.id, first, life, Reserve::Refused, actions);
        self.collect_actions(tree_key);
    }

    pub fn first_record_done(&mut self, key: VolumeKey, result: Result<(), DiskError>) {
        let Err(error) = result else { return self.begin_core(key) };
        let Some(volume) = self.volume_mut(key) else { return };
        let (id, has_device) = (volume.id, volume.device.is_some());
        if let Some(opening) = volume.opening.take() {
            drop(opening.reply.send(Err(EngineError::Record { volume: id, error })));
        }
        if has_device { self.read_again(key) } else { self.volumes[key.0 as usize] = None }
    }

    /// The record is durable: the copy acts from here on.
    fn begin_core(&mut self, key: VolumeKey) {
        self.tell_time();
        let Self { volumes, trees, now, .. } = self;
        let Some(volume) = volumes[key.0 as usize].as_deref_mut() else { return };
        let Some(tree) = trees[volume.tree.0 as usize].as_ref() else { return };
        let Some(mirrored) = tree.store.mirrored(volume.id) else { return };
        let Some(Opening { config, reply, persisting: is_first }) = volume.opening.take() else { return };
        // Also an engine that was killed before it could record that the memory of the one before it was gone. A copy whose
        // first record was made just now has never acted: it has lost nothing, whatever an engine before this one has kept.
        let is_kept = is_first || config.memory == Memory::Kept;
        let memory = if is_kept && mirrored.boot == tree.life(config.boot) { Memory::Kept } else { Memory::Lost };
        let member = Member {
            copy: tree.id,
            incarnation: config.session.incarnation(),
            record: mirrored.record.clone(),
            hot: mirrored.hot.to_vec(),
            memory,
        };
        volume.replica = Replica::open(*now, member);
        volume.mirror = Some(Box::new(Mirror::new(*config, volume.replica.role())));
        if self.mirrored.is_empty() {
            self.next_heartbeat = self.now.0;
        }
        self.mirrored.push(key);
        let id = volume.id;
        self.revive_device_of(id);
        drop(reply.send(Ok(())));
        self.read_again(key);
    }

    /// Requests were left where they are while the core changed.
    pub fn read_again(&mut self, key: VolumeKey) {
        if let Some(device) = self.device_mut(key) {
            device.ready = false;
            self.make_ready(key);
        }
    }

    /// Whether the copy may only be served by a core that is not there yet.
    pub fn waits_for_core(&mut self, tree: TreeKey, id: VolumeId) -> bool {
        let served = self.volume_of(id).and_then(|key| self.volume_mut(key)).is_some_and(|v| v.mirror.is_some());
        !served && self.tree_mut(tree).is_some_and(|tree| tree.store.mirrored(id).is_some())
    }

    pub fn close_mirror(&mut self, id: VolumeId, reply: Reply<Result<(), EngineError>>) {
        let Some(key) = self.volume_of(id) else { return drop(reply.send(Ok(()))) };
        let Some(volume) = self.volume_mut(key) else { return };
        if volume.remote.is_some() {
            return self.close_client(key, reply);
        }
        if volume.opening.is_some() {
            return drop(reply.send(Err(EngineError::MirrorNotOpen(id))));
        }
        let attached = volume.device.is_some();
        let Some(mirror) = volume.mirror.as_mut() else { return drop(reply.send(Ok(()))) };
        if attached {
            return drop(reply.send(Err(EngineError::VolumeAttached(id))));
        }
        mirror.closing.push(reply);
        for ticket in volume.tickets.iter_mut().filter_map(Option::take) {
            drop(ticket.reply.send(Err(EngineError::MirrorNotOpen(id).into())));
        }
        // What the store was too busy for does not run.
        mirror.busy.clear();
        self.close_if_done(key);
    }

    /// Lets a copy's core go when nothing runs for it.
    pub fn close_if_done(&mut self, key: VolumeKey) {
        let Some(volume) = self.volume_mut(key) else { return };
        let done = volume.running == 0 && volume.mirror.as_ref().is_some_and(|mirror| !mirror.closing.is_empty());
        if !done {
            return;
        }
        self.mirrored.retain(|k| *k != key);
        self.stop_listening(key, None);
        let volume = self.volumes[key.0 as usize].take();
        if let Some(mirror) = volume.and_then(|volume| volume.mirror) {
            for reply in mirror.closing {
                drop(reply.send(Ok(())));
            }
        }
    }

    pub fn tell_mirror(&mut self, id: VolumeId, input: MirrorInput) -> Result<(), EngineError> {
        let key = self.volume_of(id).ok_or(EngineError::MirrorNotOpen(id))?;
        if self.publication_of(id).is_some() {
            self.tell_client(key, input);
            return Ok(());
        }
        self.mirror_mut(key).ok_or(EngineError::MirrorNotOpen(id))?;
        match input {
            MirrorInput::Client { client, term } => self.tell_of_client(key, client, term),
            MirrorInput::Configuration(configuration) => self.step(key, Input::Configuration(configuration)),
            MirrorInput::Wish(wish) => self.step(key, Input::Wish(wish)),
            MirrorInput::Size(size) => self.limit_size(key, size),
            MirrorInput::Resync(copy) => self.step(key, Input::Resync(copy)),
            MirrorInput::Proposed { stamp, outcome } => self.step(key, Input::Proposed { stamp, outcome }),
            MirrorInput::Peer(event) => self.peer_event(key, event),
        }
        Ok(())
    }

    /// Nothing beyond it is asked of the volume, nor copied, whatever this copy can hold: others may hold less.
    fn limit_size(&mut self, key: VolumeKey, size: VolumeSize) {
        let Some((tree, id)) = self.volume_mut(key).map(|volume| (volume.tree, volume.id)) else { return };
        let Ok(held) = self.known(tree, id) else { return };
        let Some(volume) = self.volume_mut(key) else { return };
        let Some(mirror) = volume.mirror.as_mut() else { return };
        // Whoever read the catalogue earlier may say so later.
        let told = mirror.told_size.map_or(size, |before| before.max(size));
        mirror.told_size = Some(told);
        volume.size = told.min(held);
    }

    pub fn peer_event(&mut self, key: VolumeKey, event: Event) {
        let Some(mirror) = self.mirror_mut(key) else { return };
        match event {
            Event::Connected(copy) => {
                mirror.refused.remove(&copy);
                mirror.guests.is_connected_anew(copy);
                mirror.connected.insert(copy);
                self.step(key, Input::Connected(copy));
                self.begin_listening(key, copy);
            }
            Event::Silent(copy) => {
                mirror.connected.remove(&copy);
                let is_client = mirror.guests.are(copy);
                if is_client {
                    mirror.guests.is_connected_anew(copy);
                }
                self.stop_listening(key, Some(copy));
                if !is_client {
                    self.step(key, Input::Silent(copy));
                }
            }
            // Allowed to be lost, not to be forgotten.
            Event::Room(copy) => match mirror.refused.remove(&copy) {
                Some(refused @ Refused::Question(_)) => {
                    mirror.repeats = Some((copy, refused));
                    self.step(key, Input::Connected(copy));
                    if let Some(mirror) = self.mirror_mut(key) {
                        mirror.repeats = None;
                    }
                }
                Some(Refused::Answer) => mirror.session.reconnect(copy),
                None => self.tell_guest_the_rest(key, copy),
            },
            Event::Received { from, message, payload } => {
                if let Err(damage) = payload.check() {
                    // Never written, and not even heard: on a new connection everything is said again.
                    mirror.session.reconnect(from);
                    self.stop_listening(key, Some(from));
                    tracing::error!(volume = ?self.volume_mut(key).map(|v| v.id), %from, %damage, "damaged on its way");
                    return;
                }
                if self.hear_client(key, from, &message, &payload) {
                    return;
                }
                let Some(mirror) = self.mirror_mut(key) else { return };
                match &message {
                    Message::Prepare { frame, serial, .. } | Message::Prepared { frame, serial, .. }
                        if payload != Payload::default() =>
                    {
                        mirror.brought.insert((from, frame.stamp, *serial), payload);
                    }
                    // Also without data: that it is not there is not the same.
                    Message::Copy { frame, serial, .. } | Message::Compare { frame, serial, .. } => {
                        mirror.brought.insert((from, frame.stamp, *serial), payload);
                    }
                    _ => {}
                }
                self.step(key, Input::Received { from, message });
            }
        }
    }

    /// Time passes for the cores that have peers.
    pub fn heartbeat(&mut self) {
        if self.mirrored.is_empty() || self.now.0 < self.next_heartbeat {
            return;
        }
        self.next_heartbeat = self.now.0 + HEARTBEAT;
        for index in 0..self.mirrored.len() {
            let Some(key) = self.mirrored.get(index).copied() else { break };
            if self.tick_client(key) {
                continue;
            }
            let Some(mirror) = self.mirror_mut(key) else { continue };
            mirror.ask_again();
            for (operation, control) in std::mem::take(&mut mirror.busy) {
                self.seal_again(key, operation, control);
            }
            self.step(key, Input::Tick);
            if self
                .volume_mut(key)
                .is_some_and(|volume| volume.device.is_none() && volume.replica.waiting_for_space() > 0)
            {
                // A client's: what a device asks is looked after by the patrol.
                self.step(key, Input::SpaceFreed);
            }
            self.name_resting_copies(key);
            self.settle_client(key);
        }
        self.pump();
    }

    /// Tells people which copies the core has given up.
    fn name_resting_copies(&mut self, key: VolumeKey) {
        let Some(volume) = self.volume_mut(key) else { return };
        let Some(mirror) = volume.mirror.as_mut() else { return };
        let resting: BTreeSet<_> = volume.replica.resting().collect();
        for (copy, because) in resting.difference(&mirror.resting) {
            let volume = volume.id;
            let why = match because {
                Because::Slow => {
                    "a copy has not executed what it was sent for ten seconds: it goes, and is left alone for a while"
                }
                Because::Unread => {
                    "what a copy lacks cannot be read here, and no other copy has it: it is tried again after a while; \
                     `tandem verify` says what is damaged"
                }
            };
            tracing::error!(%volume, %copy, "{why}");
        }
        mirror.resting = resting;
    }

    pub fn mirror_mut(&mut self, key: VolumeKey) -> Option<&mut Mirror> {
        self.volume_mut(key)?.mirror.as_deref_mut()
    }

    pub fn mirror_status(&mut self, id: VolumeId) -> Option<MirrorStatus> {
        let key = self.volume_of(id)?;
        let now = self.now;
        let volume = self.volumes[key.0 as usize].as_deref()?;
        let (mirror, replica) = (volume.mirror.as_ref()?, &volume.replica);
        let record = replica.record();
        let standings: BTreeMap<_, _> = replica.standings().collect();
        let me = self.trees[volume.tree.0 as usize].as_ref()?.id;
        let progress = replica.progress();
        let [copied_bytes, equal_bytes, under_way] =
            [progress.copied, progress.equal, progress.under_way].map(|blocks| blocks * BLOCK_SIZE);
        let status = |copy: InstanceId| {
            let member = record.configuration.is_member(copy);
            let state = match standings.get(&copy) {
                Some(Standing::UpToDate) => CopyState::UpToDate,
                Some(Standing::SyncTarget) => {
                    CopyState::SyncTarget { copied_bytes, equal_bytes, left_bytes: mirror.behind_bytes + under_way }
                }
                None if member => CopyState::UpToDate,
                Some(Standing::Outdated) | None => CopyState::Outdated,
            };
            CopyStatus { state, connected: mirror.connected.contains(&copy) }
        };
        let others = record.configuration.copies().filter(|copy| *copy != me);
        Some(MirrorStatus {
            role: replica.role(),
            size: volume.size,
            serves: replica.serves(),
            answers: replica.answers(),
            configuration: record.configuration.clone(),
            newest: replica.newest().clone(),
            wish: replica.wish().cloned(),
            intact: record.intact,
            disk_failed: replica.has_failed(),
            copies: others.map(|copy| (copy, status(copy))).collect(),
            copied_bytes,
            equal_bytes,
            hot_extents: replica.hot_extents().len(),
            requests: replica.status(now).requests,
            term: replica.term(),
        })
    }
}

impl Volume {
    /// Whether a client that is none any more still has requests in the core: a device's would be too many beside them.
    pub fn is_left_to_guests(&self) -> bool {
        self.mirror.as_ref().is_some_and(|mirror| !mirror.guests.is_idle() && !mirror.guests.own_the_volume())
    }
}
