//! What the handles ask the engine's thread for, and how it does it.
//!
//! Invariants: a command is executed whole, between two turns of the data path, and never blocks; whoever gives up waiting
//! for the answer changes nothing.

use super::client::{ClientConfig, ClientStatus};
use super::files::TreeFiles;
use super::mirror::{MirrorConfig, MirrorInput, MirrorStatus};
use super::operations::Purpose;
use super::tree::{Phase as TreePhase, Tree, TreeKey};
use super::turn::Engine;
use super::volume::{Ticket, VolumeKey};
use super::{AsideError, ControlError, EngineError};
use crate::protocol::{DiskError, Input, OperationId, Request, Role, SealName, Tag};
use crate::replica::device::FuseLoop;
use crate::replica::device::loop_device::LoopDevice;
use crate::replica::device::slots::RESERVED_SLOTS;
use crate::store::{Control, ControlError as Refusal, MAX_SNAPSHOTS, Store};
use crate::volume::{BlockRange, InstanceId, SnapshotId, VolumeId, VolumeSize};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::sync::oneshot;

pub(super) type Reply<T> = oneshot::Sender<T>;

/// An attached volume, for those who do what blocks.
pub(super) struct Found {
    /// None: nobody serves it.
    pub size: Option<VolumeSize>,
    pub device: Option<LoopDevice>,
    pub control: Result<crate::replica::device::Control, crate::replica::device::DeviceError>,
    pub broken: bool,
}

/// The copies that have done it: of a mirrored volume's seal all members; none are named where there is but one copy.
pub(super) type Copies = BTreeSet<InstanceId>;

/// A request of an operator, and who waits for the answer.
pub(super) type ControlItem = (InstanceId, Control, Reply<Result<Copies, ControlError>>);

pub(super) enum Command {
    OpenTree {
        tree: InstanceId,
        store: Box<Store>,
        files: TreeFiles,
        pending: OwnedFd,
        reply: Reply<Result<(), EngineError>>,
    },
    CloseTree {
        tree: InstanceId,
        reply: Reply<Result<(), EngineError>>,
    },
    /// All of them before anything else happens: several seals are one point in time. A write that was read before is in
    /// all of them; no other one is, also where a seal waits in the core of a mirrored volume.
    Control(Vec<ControlItem>),
    /// A request on a volume that nobody serves; nothing is read. `data` is what a write writes, and begins at a page.
    Aside {
        tree: InstanceId,
        volume: VolumeId,
        request: Request,
        data: Bytes,
        reply: Reply<Result<(), AsideError>>,
    },
    Inspect {
        tree: InstanceId,
        look: Box<dyn FnOnce(&mut Store) + Send>,
    },
    TreeWith {
        snapshot: SnapshotId,
        reply: Reply<Option<InstanceId>>,
    },
    Find {
        volume: VolumeId,
        reply: Reply<Result<Option<Found>, EngineError>>,
    },
    AddDevice {
        tree: InstanceId,
        device: Box<FuseLoop>,
        reply: Reply<Result<(), EngineError>>,
    },
    SetDevice {
        volume: VolumeId,
        device: LoopDevice,
    },
    RemoveDevice {
        volume: VolumeId,
        reply: Reply<()>,
    },
    GiveUp {
        volume: VolumeId,
        others: bool,
        reply: Reply<std::io::Result<bool>>,
    },
    FlushTree {
        tree: InstanceId,
        reply: Reply<Result<Copies, ControlError>>,
    },
    Reattach {
        reply: Reply<Vec<VolumeId>>,
    },
    OpenMirror {
        config: Box<MirrorConfig>,
        reply: Reply<Result<(), EngineError>>,
    },
    /// Peers' events are answered by nobody: many are on their way at a time.
    TellMirror {
        volume: VolumeId,
        input: MirrorInput,
        reply: Option<Reply<Result<(), EngineError>>>,
    },
    CloseMirror {
        volume: VolumeId,
        reply: Reply<Result<(), EngineError>>,
    },
    MirrorStatus {
        volume: VolumeId,
        reply: Reply<Option<MirrorStatus>>,
    },
    OpenClient {
        config: ClientConfig,
        reply: Reply<Result<(), EngineError>>,
    },
    ClientStatus {
        volume: VolumeId,
        reply: Reply<Option<ClientStatus>>,
    },
}

impl Engine {
    pub fn command(&mut self, command: Command) {
        match command {
            Command::OpenTree { tree, store, files, pending, reply } => {
                let opened = self.open_tree(tree, store, files, pending);
                drop(reply.send(opened));
            }
            Command::CloseTree { tree, reply } => self.close_tree(tree, reply),
            Command::Control(items) => {
                items.into_iter().for_each(|(tree, control, reply)| self.control(tree, control, reply))
            }
            Command::Aside { tree, volume, request, data, reply } => self.aside(tree, volume, request, data, reply),
            Command::Inspect { tree, look } => {
                if let Some(key) = self.tree_of(tree) {
                    if let Some(tree) = self.tree_mut(key) {
                        look(&mut tree.store);
                    }
                    self.collect_actions(key);
                }
            }
            Command::TreeWith { snapshot, reply } => {
                let with = self.trees.iter().flatten().find(|tree| tree.store.has_snapshot(snapshot));
                let _ = reply.send(with.map(|tree| tree.id));
            }
            Command::Find { volume, reply } => drop(reply.send(self.find_device(volume))),
            Command::AddDevice { tree, device, reply } => {
                let without_copy = self.publication_of(device.volume) == Some(tree);
                let found = if without_copy { Some(TreeKey::NONE) } else { self.tree_of(tree) };
                let added = found.ok_or(EngineError::UnknownTree(tree));
                let added = added.and_then(|tree| self.add_device(tree, *device, None)).map(drop);
                drop(reply.send(added));
            }
            Command::SetDevice { volume, device } => {
                if let Some(key) = self.volume_of(volume)
                    && let Some(found) = self.device_mut(key)
                {
                    found.loop_device = Some(device);
                }
            }
            Command::RemoveDevice { volume, reply } => self.remove_device(volume, reply),
            Command::GiveUp { volume, others, reply } => drop(reply.send(self.give_up(volume, others))),
            Command::FlushTree { tree, reply } => self.flush_tree(tree, reply),
            Command::Reattach { reply } => {
                self.reattached = true;
                drop(reply.send(self.revive()));
            }
            Command::OpenMirror { config, reply } => self.open_mirror(config, reply),
            Command::TellMirror { volume, input, reply } => {
                let told = self.tell_mirror(volume, input);
                if let Some(reply) = reply {
                    drop(reply.send(told));
                }
            }
            Command::CloseMirror { volume, reply } => self.close_mirror(volume, reply),
            Command::MirrorStatus { volume, reply } => drop(reply.send(self.mirror_status(volume))),
            Command::OpenClient { config, reply } => {
                let opened = self.open_client(config);
                drop(reply.send(opened));
            }
            Command::ClientStatus { volume, reply } => drop(reply.send(self.client_status(volume))),
        }
    }

    fn open_tree(
        &mut self,
        id: InstanceId,
        store: Box<Store>,
        files: TreeFiles,
        pending: OwnedFd,
    ) -> Result<(), EngineError> {
        if self.tree_of(id).is_some() {
            return Err(EngineError::TreeIsOpen(id));
        }
        let key = TreeKey(self.trees.len() as u32);
        let phase = TreePhase::Open;
        self.trees.push(Some(Tree {
            id,
            store,
            files,
            pending,
            under_way: 0,
            last_tick: Duration::ZERO,
            next_tick: None,
            phase,
        }));
        self.collect_actions(key);
        self.arena.drained(id);
        self.ready.extend(std::mem::take(&mut self.starving));
        if self.reattached {
            self.revive();
        }
        Ok(())
    }

    fn flush_tree(&mut self, id: InstanceId, reply: Reply<Result<Copies, ControlError>>) {
        let Some(key) = self.tree_of(id) else { return drop(reply.send(Err(EngineError::UnknownTree(id).into()))) };
        let Self { trees, operations, actions, .. } = self;
        let Some(tree) = trees[key.0 as usize].as_mut() else { return };
        // Without a volume nothing was written.
        let Some(volume) = tree.store.volumes().first().map(|info| info.volume) else {
            return drop(reply.send(Ok(Copies::new())));
        };
        tree.under_way += 1;
        let operation = operations.add(key, Purpose::Control { reply, resized: None });
        tree.store.start(operation, volume, Request::Flush, actions);
        self.collect_actions(key);
        self.pump();
    }

    /// What is acknowledged and not in the log is written before the memory that holds it may be forgotten.
    fn close_tree(&mut self, id: InstanceId, reply: Reply<Result<(), EngineError>>) {
        let Some(key) = self.tree_of(id) else {
            drop(reply.send(Ok(())));
            return;
        };
        if let Some(volume) = self.volumes.iter().flatten().find(|v| v.tree == key) {
            let attached = volume.device.is_some();
            let error = if attached { EngineError::VolumeAttached } else { EngineError::MirrorIsOpen };
            drop(reply.send(Err(error(volume.id))));
            return;
        }
        if let Some(parked) = self.parked.iter().find(|p| p.tree == id) {
            drop(reply.send(Err(EngineError::VolumeAttached(parked.fuse.volume))));
            return;
        }
        let Self { trees, operations, actions, .. } = self;
        let Some(tree) = trees[key.0 as usize].as_mut() else { return };
        if !tree.is_open() {
            drop(reply.send(Err(EngineError::TreeIsClosing(id))));
            return;
        }
        tree.phase = TreePhase::Closing(reply);
        if let Some(volume) = tree.store.volumes().first() {
            tree.under_way += 1;
            let operation = operations.add(key, Purpose::LastFlushOfTree);
            tree.store.start(operation, volume.volume, Request::Flush, actions);
        }
        self.collect_actions(key);
        self.pump();
        self.close_if_quiet(key);
    }

    /// What is acknowledged is not on stable media: its memory is needed, and whoever closes it again tries again.
    pub fn stay_open(&mut self, key: TreeKey, error: DiskError) {
        let Some(tree) = self.tree_mut(key) else { return };
        let id = tree.id;
        if let TreePhase::Closing(reply) = std::mem::replace(&mut tree.phase, TreePhase::Open) {
            drop(reply.send(Err(EngineError::LastFlush { tree: id, error })));
        }
    }

    pub fn close_if_quiet(&mut self, key: TreeKey) {
        let Some(tree) = self.tree_mut(key) else { return };
        if tree.is_open() || tree.under_way > 0 {
            return;
        }
        self.ticking.retain(|k| *k != key);
        if let Some(tree) = self.trees[key.0 as usize].take()
            && let TreePhase::Closing(reply) = tree.phase
        {
            drop(tree.store);
            drop(reply.send(Ok(())));
        }
    }

    fn control(&mut self, id: InstanceId, control: Control, reply: Reply<Result<Copies, ControlError>>) {
        let Some(key) = self.tree_of(id) else {
            drop(reply.send(Err(EngineError::UnknownTree(id).into())));
            return;
        };
        if let Control::Seal { volume, snapshot, .. } = control {
            let is_there = self.tree_mut(key).is_some_and(|tree| tree.store.has_snapshot(snapshot));
            match self.volume_of(volume) {
                // Which copies have it is not known any more, and a second time would be at another point.
                Some(_) if is_there && self.is_mirrored(volume) => {
                    return drop(reply.send(Err(Refusal::Exists.into())));
                }
                Some(served) => return self.seal(served, control, reply),
                None if self.waits_for_core(key, volume) => {
                    return drop(reply.send(Err(EngineError::MirrorNotOpen(volume).into())));
                }
                None => {}
            }
        }
        if let Control::DeleteVolume(volume) = control
            && self.volume_of(volume).is_some()
        {
            drop(reply.send(Err(EngineError::VolumeAttached(volume).into())));
            return;
        }
        let resized = match control {
            Control::Resize { volume, size } => Some((volume, size)),
            _ => None,
        };
        let Self { trees, operations, actions, .. } = self;
        let Some(tree) = trees[key.0 as usize].as_mut().filter(|t| t.is_open()) else {
            drop(reply.send(Err(EngineError::TreeIsClosing(id).into())));
            return;
        };
        tree.under_way += 1;
        let operation = operations.add(key, Purpose::Control { reply, resized });
        tree.store.control(operation, control, actions);
        self.collect_actions(key);
        self.pump();
    }

    /// A volume that somebody serves has a core, and everything goes through that.
    fn aside(
        &mut self,
        id: InstanceId,
        volume: VolumeId,
        request: Request,
        data: Bytes,
        reply: Reply<Result<(), AsideError>>,
    ) {
        let writes = matches!(request, Request::Write(_)).then(|| request.range().map_or(0, BlockRange::bytes));
        assert!(writes.unwrap_or(0) == data.len() as u64, "{request:?} with {} bytes", data.len());
        if self.volume_of(volume).is_some() {
            return drop(reply.send(Err(EngineError::VolumeAttached(volume).into())));
        }
        let Some(key) = self.tree_of(id) else {
            return drop(reply.send(Err(EngineError::UnknownTree(id).into())));
        };
        let Self { trees, operations, actions, .. } = self;
        let Some(tree) = trees[key.0 as usize].as_mut().filter(|t| t.is_open()) else {
            return drop(reply.send(Err(EngineError::TreeIsClosing(id).into())));
        };
        tree.under_way += 1;
        let operation = operations.add(key, Purpose::Aside { data, reply });
        tree.store.start(operation, volume, request, actions);
        self.collect_actions(key);
        self.pump();
    }

    /// A seal of an attached volume takes its place among the device's requests.
    fn seal(&mut self, key: VolumeKey, control: Control, reply: Reply<Result<Copies, ControlError>>) {
        let first = self.arena.slots.count() + RESERVED_SLOTS;
        if self.mirror_mut(key).is_some()
            && let Err(error) = self.may_seal(key, control)
        {
            drop(reply.send(Err(error)));
            return;
        }
        let Some(volume) = self.volume_mut(key) else { return };
        let Some(index) = volume.tickets.iter().position(Option::is_none) else {
            drop(reply.send(Err(Refusal::Busy.into())));
            return;
        };
        volume.tickets[index] = Some(Ticket { control, reply, refusal: None });
        let request = Request::Seal(SealName(index as u32));
        self.step(key, Input::Request { tag: Tag(first + index as u32), request });
        self.pump();
    }

    fn is_mirrored(&mut self, id: VolumeId) -> bool {
        self.volume_of(id).is_some_and(|key| self.mirror_mut(key).is_some())
    }

    /// What every copy would refuse is refused before any is asked.
    fn may_seal(&mut self, key: VolumeKey, control: Control) -> Result<(), ControlError> {
        let Some(volume) = self.volume_mut(key) else { return Ok(()) };
        let (id, tree) = (volume.id, volume.tree);
        let same = |ticket: &&Ticket| match (ticket.control, control) {
            (Control::Seal { snapshot: one, .. }, Control::Seal { snapshot: other, .. }) => one == other,
            _ => false,
        };
        if !matches!(volume.replica.role(), Role::Primary(_)) {
            return Err(EngineError::NotPrimary(id).into());
        }
        if volume.tickets.iter().flatten().any(|ticket| same(&ticket)) {
            return Err(Refusal::Busy.into());
        }
        let volumes = self.tree_mut(tree).map(|tree| tree.store.volumes()).unwrap_or_default();
        match volumes.iter().find(|info| info.volume == id) {
            Some(info) if info.layers as usize > MAX_SNAPSHOTS => Err(Refusal::TooManySnapshots(id).into()),
            Some(_) | None => Ok(()),
        }
    }

    /// The store says more of a seal than the core needs to know.
    pub fn note_seal(&mut self, key: VolumeKey, operation: OperationId, result: Result<(), Refusal>) {
        let first = self.arena.slots.count() + RESERVED_SLOTS;
        let Some(volume) = self.volume_mut(key) else { return };
        let tag = volume.replica.tag_of(operation);
        if let Some(ticket) = tag.and_then(|tag| volume.tickets.get_mut((tag.0 - first) as usize)?.as_mut()) {
            ticket.refusal = result.err();
        }
    }

    pub fn answer_operator(&mut self, key: VolumeKey, tag: Tag, result: Result<(), DiskError>) {
        let first = self.arena.slots.count() + RESERVED_SLOTS;
        let Some(volume) = self.volume_mut(key) else { return };
        if let Some(remote) = volume.remote.as_mut() {
            remote.leaving = None;
            return self.flushed_for_good(key, result);
        }
        if let Some(ticket) = volume.tickets.get_mut((tag.0 - first) as usize).and_then(Option::take) {
            let refused = |error| ticket.refusal.unwrap_or(Refusal::Disk(error));
            // Whoever is a member now has answered; whoever came after the seal is none before this.
            let members = volume.mirror.as_ref().map(|_| volume.replica.record().configuration.members().collect());
            drop(
                ticket.reply.send(result.map(|()| members.unwrap_or_default()).map_err(|error| refused(error).into())),
            );
        }
    }
}
