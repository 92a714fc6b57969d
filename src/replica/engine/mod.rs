//! The engine: carries the requests of all devices of a node to their stores and back, on one thread with one ring.
//!
//! ```text
//!   /dev/fuse of volume 1 ─┐                                   ┌─ data, logs of tree 1
//!   /dev/fuse of volume 2 ─┼─> thread "tandem-engine" ── ring ─┼─ data, logs of tree 2
//!   connections with peers ┤      │ jobs      └ threads        └─ ...
//!   EngineHandle (bell)  ──┘      │
//!                                 └─> 2 threads "tandem-job" (checkpoints, checksums)
//! ```
//! # Invariants
//! * Threads do not grow with volumes; an idle volume costs memory for one request and nothing else.
//! * It may be killed at any instruction: what it has acknowledged is in the kernel, on disk, or in memory that the holder
//!   keeps, and what it has not acknowledged is in a slot that the holder keeps.
//! * Order at a restart: everything from the holder, [`TreeFiles::drain`] on every tree, open the stores with their held
//!   memory, [`EngineHandle::open_tree`], [`EngineHandle::reattach`].
#![allow(unsafe_code, reason = "prctl, setpriority and mlockall")]

mod attach;
mod client;
mod commands;
mod copies;
mod disk;
mod files;
mod handle;
mod host;
mod jobs;
mod lines;
mod mirror;
mod operations;
mod outputs;
mod pieces;
mod recover;
mod requests;
mod statistics;
mod tree;
mod turn;
mod unsaid;
mod volume;

pub use crate::replica::io::Choice as IoChoice;
pub use client::{ClientConfig, ClientStatus};
pub use files::{TreeFiles, drain};
pub use handle::EngineHandle;
pub use mirror::{CatalogueRequest, CopyState, CopyStatus, MirrorConfig, MirrorInput, MirrorStatus, SealReserve};
pub use statistics::{BUCKETS, Direction, DirectionStatistics, STALL, Statistics, VolumeStatistics};

use crate::replica::device::loop_device::{self, LoopDevice, LoopError};
use crate::replica::device::slots::{ARENA_SLOTS, SlotState, Slots, SlotsError};
use crate::replica::device::{DeviceError, FuseLoop};
use crate::replica::holder::{Entry, Holder, HolderError};
use crate::replica::io::Io;
use crate::volume::{InstanceId, VolumeId};
use recover::Parked;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

const ARENA: &str = "arena";
const VOLUME: &str = "volume/";
const PENDING: &str = "pending/";

/// How the engine works.
#[derive(Debug)]
pub struct EngineConfig {
    /// The connection to the holder.
    pub holder: Holder,
    /// io_uring or threads.
    pub io: IoChoice,
    /// How long to look for work before sleeping while work comes that fast: lower latency in a VM for much more CPU.
    pub spin: Option<Duration>,
}

/// What the holder kept of an earlier engine.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The memory of acknowledged changes, by tree.
    pub pendings: BTreeMap<InstanceId, OwnedFd>,
    /// Devices that wait for [`EngineHandle::reattach`], with their trees.
    pub volumes: Vec<(VolumeId, InstanceId)>,
    devices: BTreeMap<VolumeId, Option<LoopDevice>>,
}

/// How an attached volume does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeHealth {
    /// Writes wait for space in the pool.
    pub waiting_for_space: bool,
    /// The disk failed a request since the volume was attached.
    pub disk_failed: bool,
    /// A read found damaged blocks since the volume was attached.
    pub corrupt: bool,
    /// Requests that have waited longer than [`STALL`].
    pub stalled_requests: u64,
}

/// What the engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineStatus {
    /// "io_uring" or "threads".
    pub io: &'static str,
    /// Requests that a killed engine left and this one finished.
    pub recovered_requests: u64,
    /// The holder answered when it was last asked.
    pub holder_connected: bool,
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The holder does not answer.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// No memory for requests, or memory of another version.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// No thread, ring or eventfd.
    #[error("the engine cannot start: {0}; check the limits of processes, open files and locked memory")]
    Io(#[from] io::Error),
}

/// Why the engine did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Its thread is gone.
    #[error("the engine has stopped; repeat the call when it is back")]
    Stopped,
    /// No such tree is open.
    #[error("copy {0} is not open")]
    UnknownTree(InstanceId),
    /// It is open.
    #[error("copy {0} is open already")]
    TreeIsOpen(InstanceId),
    /// Its disk failed, so what was acknowledged and not flushed is in memory only; the copy stays open.
    #[error(
        "copy {tree} is not closed, because its last flush failed: {error}; what was not flushed is kept in memory"
    )]
    LastFlush {
        /// Which.
        tree: InstanceId,
        /// What failed.
        error: crate::protocol::DiskError,
    },
    /// It is being closed.
    #[error("copy {0} is being closed")]
    TreeIsClosing(InstanceId),
    /// The tree does not know the volume.
    #[error("volume {0} is not in this copy")]
    UnknownVolume(VolumeId),
    /// The volume has a device.
    #[error("volume {0} is attached; detach it first")]
    VolumeAttached(VolumeId),
    /// A core runs the volume's copy already.
    #[error("the copy of volume {0} is open already")]
    MirrorIsOpen(VolumeId),
    /// The volume is mirrored and nothing runs its copy.
    #[error("the copy of volume {0} on this node is not open yet; repeat the call")]
    MirrorNotOpen(VolumeId),
    /// Snapshots are taken at the primary.
    #[error("the copy of volume {0} on this node is not its primary")]
    NotPrimary(VolumeId),
    /// What the volume's copy is under could not be made durable.
    #[error("volume {volume}: what its copy is under cannot be made durable: {error}")]
    Record {
        /// The volume.
        volume: VolumeId,
        /// Why not.
        error: crate::protocol::DiskError,
    },
    /// A killed engine left the device, and its copy is not open.
    #[error(
        "the device of volume {0} waits for its copy, which is not open: see the replica's log, repair its pool, then repeat"
    )]
    DeviceWaits(VolumeId),
    /// The same, and the volume has other copies: it can be given up.
    #[error(
        "the device of volume {0} waits for its copy, which is not open, and the volume has others: unstage it, or repair its pool"
    )]
    CopyWaits(VolumeId),
    /// A killed engine left the device of a volume without a copy here, and nobody serves it: it can be given up.
    #[error(
        "the device of volume {0}, which has no copy here, waits to be served: publish the volume here again, or unstage it"
    )]
    DeviceLeft(VolumeId),
    /// The kernel does not watch its connection.
    #[error("volume {volume}: its FUSE connection cannot be watched: {error}")]
    Watch {
        /// The volume.
        volume: VolumeId,
        /// What the kernel said.
        error: io::Error,
    },
    /// The holder.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The loop device.
    #[error(transparent)]
    Loop(#[from] LoopError),
}

/// Why an operator's request was not executed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The store refused, or its disk failed.
    #[error(transparent)]
    Store(#[from] crate::store::ControlError),
    /// It did not get there.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Why something was not written aside of devices.
#[derive(Debug, thiserror::Error)]
pub enum AsideError {
    /// The disk failed, or is full.
    #[error(transparent)]
    Disk(#[from] crate::protocol::DiskError),
    /// It did not get there.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Why a volume has no device.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The FUSE mount or its slots.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The loop device.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The holder.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// Its last device was aborted and is still there.
    #[error("volume {volume}: its aborted device cannot be removed: {error}")]
    Broken {
        /// The volume.
        volume: VolumeId,
        /// Why not.
        error: Box<DetachError>,
    },
}

/// Why a volume keeps its device.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Something has it open.
    #[error(transparent)]
    Busy(LoopError),
    /// The loop device.
    #[error(transparent)]
    Loop(LoopError),
    /// Its connection cannot be ended.
    #[error("its FUSE connection cannot be ended: {0}; the replica needs root and the control filesystem (fusectl)")]
    Abort(std::io::Error),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The holder.
    #[error(transparent)]
    Holder(#[from] HolderError),
}

/// What the holder keeps beside a device's descriptors. Unknown fields are fine: a newer engine may have written it.
#[derive(Serialize, Deserialize)]
struct VolumeMeta {
    version: u32,
    tree: InstanceId,
    /// The volume has no copy here, and `tree` is its publication.
    #[serde(default)]
    without_copy: bool,
}

fn volume_key(volume: VolumeId) -> String {
    format!("{VOLUME}{volume}")
}

fn pending_key(tree: InstanceId) -> String {
    format!("{PENDING}{tree}")
}

fn volume_meta(tree: InstanceId, without_copy: bool) -> Vec<u8> {
    serde_json::to_vec(&VolumeMeta { version: 1, tree, without_copy }).unwrap_or_default()
}

/// Starts the engine's thread and takes over what an earlier engine left with the holder. Blocks for a moment.
///
/// # Errors
/// The holder does not answer, its memory is of another version, or the system has no resources left.
pub fn start(config: EngineConfig) -> Result<(EngineHandle, Recovered), StartError> {
    let mut recovered = Recovered::default();
    let (mut parked, mut held) = (vec![], BTreeSet::new());
    let mut arena = None;
    for entry in config.holder.list()? {
        if entry.key == ARENA {
            let memory = entry.fds.first().ok_or(SlotsError::Length { length: 0 })?;
            arena = Some(Slots::map(memory.as_fd())?);
        } else if let Some(tree) = entry.key.strip_prefix(PENDING).and_then(|id| id.parse().ok()) {
            recovered.pendings.extend(entry.fds.into_iter().next().map(|fd| (tree, fd)));
        } else if let Some(volume) = entry.key.strip_prefix(VOLUME).and_then(|id| id.parse().ok()) {
            held.insert(volume);
            parked.extend(park(volume, entry));
        } else {
            tracing::warn!(key = entry.key, "the holder keeps something unknown; it is left alone");
        }
    }
    let arena = match arena {
        Some(arena) => arena,
        None => {
            let (slots, memory) = Slots::create("tandem-arena", ARENA_SLOTS)?;
            // Before a request is read into it.
            config.holder.put(ARENA, b"", &[memory.as_fd()])?;
            slots
        }
    };
    arena.populate();
    let parked = forget_unused(&config.holder, parked, &mut held, &arena);
    recovered.volumes = parked.iter().map(|p| (p.fuse.volume, p.tree)).collect();
    recovered.devices = parked.iter().map(|p| (p.fuse.volume, p.device)).collect();
    let handle = launch(config, arena, held, parked)?;
    Ok((handle, recovered))
}

fn park(volume: VolumeId, entry: Entry) -> Option<Parked> {
    let meta: VolumeMeta = match serde_json::from_slice(&entry.meta) {
        Ok(meta) => meta,
        Err(error) => {
            tracing::error!(%volume, %error, "the holder's note on a device cannot be read; the device stays frozen");
            return None;
        }
    };
    match FuseLoop::from_held(volume, meta.tree, entry.fds) {
        Ok(fuse) => Some(Parked {
            tree: meta.tree,
            device: loop_device::find(fuse.served()),
            fuse,
            without_copy: meta.without_copy,
            given_up: false,
        }),
        Err(error) => {
            tracing::error!(%volume, %error, "a device cannot be taken over; it stays frozen");
            None
        }
    }
}

/// Lets go of connections whose loop device was never made or is gone: nobody can be waiting for them.
fn forget_unused(holder: &Holder, parked: Vec<Parked>, held: &mut BTreeSet<VolumeId>, arena: &Slots) -> Vec<Parked> {
    let devices_are_known = std::fs::read_dir("/sys/block").is_ok();
    let (kept, unused): (Vec<_>, Vec<_>) = parked.into_iter().partition(|p| {
        let mut shared = (0..arena.count()).map(|index| arena.slot(index));
        let waits = shared.any(|slot| slot.state() != SlotState::Free && slot.volume() == p.fuse.volume)
            || p.fuse.slots.recovered().next().is_some();
        p.device.is_some() || waits || !devices_are_known
    });
    for parked in unused {
        let volume = parked.fuse.volume;
        tracing::info!(%volume, "a connection without device is ended");
        held.remove(&volume);
        if let Err(error) = holder.remove(&volume_key(volume)) {
            tracing::warn!(%volume, %error, "a connection without device stays");
        }
    }
    kept
}

fn launch(
    config: EngineConfig,
    arena: Slots,
    held: BTreeSet<VolumeId>,
    parked: Vec<Parked>,
) -> Result<EngineHandle, StartError> {
    let (bell, statistics) = (Arc::new(jobs::Bell::new()?), Arc::new(Statistics::default()));
    let (commands, receiver) = mpsc::channel(handle::COMMANDS);
    let (started, starts) = std::sync::mpsc::channel();
    let (thread_bell, thread_statistics, choice, spin) = (bell.clone(), statistics.clone(), config.io, config.spin);
    let run = move || {
        protect_from_reclaim();
        // The ring belongs to the thread that makes it.
        let made = Io::new(choice, spin).and_then(|io| Ok((io, jobs::Jobs::new(thread_bell.clone())?)));
        let (io, jobs) = match made {
            Ok(made) => made,
            Err(error) => return drop(started.send(Err(error))),
        };
        go_first();
        let name = io.name();
        let (arena, sequence) = recover::sort_arena(arena, &held, &parked);
        let engine = turn::Engine {
            io,
            jobs,
            bell: thread_bell,
            commands: receiver,
            statistics: thread_statistics,
            trees: vec![],
            ticking: vec![],
            volumes: vec![None],
            watched: BTreeMap::new(),
            last_watch: turn::BELL,
            speaking: Default::default(),
            has_loose_device: held.len() > parked.len(),
            parked,
            reattached: false,
            mirrored: vec![],
            next_heartbeat: Duration::ZERO,
            unsent: vec![],
            arena,
            operations: Default::default(),
            ready: Default::default(),
            starving: vec![],
            work: Default::default(),
            actions: vec![],
            outputs: vec![],
            began: since_boot(),
            now: Default::default(),
            next_tick: Duration::ZERO,
            next_patrol: Duration::ZERO,
            in_flight: 0,
            sequence,
            stopping: false,
        };
        if started.send(Ok(name)).is_ok() {
            engine.run();
        }
    };
    std::thread::Builder::new().name("tandem-engine".into()).spawn(run)?;
    let io = starts.recv().map_err(io::Error::other)??;
    let shared = handle::Shared {
        commands,
        bell: handle::LastRing(bell),
        statistics,
        holder: config.holder,
        holder_connected: true.into(),
        io,
    };
    Ok(EngineHandle { shared: Arc::new(shared) })
}

/// Time since the node's start, its sleep included.
fn since_boot() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes into `time`.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert_eq!(result, 0, "every kernel that has io_uring or FUSE has this clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Best effort: everybody who waits for a disk waits for this thread, and it never computes for long.
fn go_first() {
    const NICE: libc::c_int = -10;
    // SAFETY: numbers only; 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0 {
        tracing::debug!("no CAP_SYS_NICE: the engine's thread has no priority over applications");
    }
}

/// Best effort: memory that the engine needs must not depend on writing to its own devices.
pub(super) fn protect_from_reclaim() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: flags only. Allocations of this thread (and of those it makes) do no I/O and are not throttled for it.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::debug!("no CAP_SYS_RESOURCE: the engine's thread is not marked as one that writes memory out");
    }
    // What is there now and in use stays in memory. Not what comes later: it would populate every future mapping.
    // SAFETY: flags only.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_ONFAULT) } != 0 {
        tracing::debug!("memory of the engine cannot be locked (ulimit -l)");
    }
}
