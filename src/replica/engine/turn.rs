//! The engine's thread: one loop for all volumes of the node.
//!
//! ```text
//!   ┌─> read what peers say, and requests of ready devices ─> core ─> store ─> submit ─┐
//!   └────────── answer, free slots <─ core <─ store <─ completions <─ wait <───────────┘
//! ```
//! # Invariants
//! * The only place that waits is [`Io::wait`]; nothing else in this thread blocks, but short reads and writes of FUSE and
//!   of sockets that do not block.
//! * With nothing under way it sleeps without a limit: an idle volume costs no wake-up.
//! * A turn allocates nothing: its queues keep their memory.

use super::commands::Command;
use super::jobs::{Bell, Jobs};
use super::lines::Watched;
use super::operations::Operations;
use super::recover::Parked;
use super::statistics::{STALL, Statistics};
use super::tree::{Tree, TreeKey};
use super::volume::{Device, Volume, VolumeKey};
use crate::protocol::{Input, Now, Output};
use crate::replica::device::slots::Slots;
use crate::replica::fatal::EndsProcess;
use crate::replica::io::{Event, Io, Sleep, WatchKey};
use crate::store::{Action, Job};
use crate::volume::{InstanceId, VolumeId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::mpsc;

/// How often a store may do a step in the background: one takes some 100 us, so requests keep most of the time.
pub(super) const TICK: Duration = Duration::from_millis(1);
/// How often requests that wait are looked at: for space in the pool, and for counting stalls.
pub(super) const PATROL: Duration = Duration::from_millis(250);
/// The watched descriptor that is no volume's.
pub(super) const BELL: WatchKey = WatchKey(0);

/// What is to be done in this turn.
pub(super) enum Work {
    Action(TreeKey, Action<Job>),
    Output(VolumeKey, Output),
}

/// The slots that all volumes share.
pub(super) struct Arena {
    pub slots: Slots,
    /// The last one freed is the next one used: its memory is in the cache.
    pub free: Vec<u32>,
}

pub(super) struct Engine {
    pub io: Io,
    pub jobs: Jobs,
    pub bell: Arc<Bell>,
    pub commands: mpsc::Receiver<Command>,
    pub statistics: Arc<Statistics>,
    pub trees: Vec<Option<Tree>>,
    /// Trees whose store has something to do in the background.
    pub ticking: Vec<TreeKey>,
    /// By key.
    pub volumes: Vec<Option<Box<Volume>>>,
    /// Descriptors that are watched, but the bell.
    pub watched: BTreeMap<WatchKey, Watched>,
    /// The last one that was given out.
    pub last_watch: WatchKey,
    /// Connections with something to read.
    pub speaking: VecDeque<WatchKey>,
    pub parked: Vec<Parked>,
    /// A device that a former engine left could be neither taken over nor ended: what it has not been told of stays unheard.
    pub has_loose_device: bool,
    /// Volumes whose cores have peers, and when time passes for them.
    pub mirrored: Vec<VolumeKey>,
    pub next_heartbeat: Duration,
    /// Those whose cores have said something in this turn.
    pub unsent: Vec<VolumeKey>,
    /// Parked devices go on as soon as their tree is open.
    pub reattached: bool,
    pub arena: Arena,
    pub operations: Operations,
    /// Volumes with requests to read.
    pub ready: VecDeque<VolumeKey>,
    /// Volumes with requests to read for which there was no slot.
    pub starving: Vec<VolumeKey>,
    pub work: VecDeque<Work>,
    pub actions: Vec<Action<Job>>,
    pub outputs: Vec<Output>,
    /// Of the clock that counts while the node sleeps: a lease must not outlive that.
    pub began: Duration,
    pub now: Now,
    pub next_tick: Duration,
    pub next_patrol: Duration,
    /// Device requests that are not answered.
    pub in_flight: usize,
    /// The next request's place in the order of arrival.
    pub sequence: u64,
    pub stopping: bool,
}

impl Engine {
    /// Runs until all handles are gone.
    pub fn run(mut self) {
        let _fatal = EndsProcess("tandem-engine");
        if let Err(error) = self.io.watch(BELL, std::os::fd::AsRawFd::as_raw_fd(self.bell.descriptor())) {
            tracing::error!(%error, "the engine cannot wait for commands; it stops");
            return;
        }
        let mut events = Vec::with_capacity(256);
        while !self.stopping {
            self.tell_time();
            self.listen();
            for _ in 0..self.ready.len() {
                if let Some(key) = self.ready.pop_front() {
                    self.read_requests(key);
                }
            }
            self.pump();
            // Before the disks get their work: it is the longer way.
            self.flush_sessions();
            events.clear();
            let sleep = self.sleep();
            if let Err(error) = self.io.wait(sleep, &mut events) {
                tracing::error!(%error, "the engine cannot wait for its disks; it stops and devices freeze until the next one");
                std::process::abort();
            }
            self.tell_time();
            for event in &events {
                match *event {
                    Event::Done { token, result } => self.disk_done(token, result),
                    Event::Ready(BELL) => self.bell_rang(),
                    Event::Ready(key) => self.is_readable(key),
                }
            }
            self.pump();
            self.tick();
            self.patrol();
            self.heartbeat();
            let (turns, sleeps) = self.io.counters();
            self.statistics.turns.store(turns, Relaxed);
            self.statistics.sleeps.store(sleeps, Relaxed);
        }
    }

    pub fn tell_time(&mut self) {
        self.now = Now(super::since_boot().saturating_sub(self.began));
    }

    /// How long nothing happens by itself.
    fn sleep(&self) -> Sleep {
        if !self.ready.is_empty() || !self.speaking.is_empty() {
            return Sleep::No;
        }
        let tick = (!self.ticking.is_empty()).then_some(self.next_tick);
        let patrol = (self.in_flight > 0).then_some(self.next_patrol);
        let heartbeat = (!self.mirrored.is_empty()).then_some(self.next_heartbeat);
        match tick.into_iter().chain(patrol).chain(heartbeat).min() {
            Some(due) => Sleep::AtMost(due.saturating_sub(self.now.0)),
            None => Sleep::Long,
        }
    }

    /// Does everything that follows from what happened, before the next wait.
    pub fn pump(&mut self) {
        while let Some(work) = self.work.pop_front() {
            match work {
                Work::Action(tree, action) => self.act(tree, action),
                Work::Output(volume, output) => self.output(volume, output),
            }
        }
    }

    pub fn make_ready(&mut self, key: VolumeKey) {
        if let Some(device) = self.device_mut(key)
            && !device.ready
        {
            device.ready = true;
            self.ready.push_back(key);
        }
    }

    fn bell_rang(&mut self) {
        self.bell.quiet();
        for (tree, outcome) in self.jobs.finished() {
            self.job_done(tree, outcome);
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    self.command(command);
                    self.pump();
                }
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return;
                }
            }
        }
    }

    fn tick(&mut self) {
        if self.ticking.is_empty() || self.now.0 < self.next_tick {
            return;
        }
        let now = self.now.0;
        for key in std::mem::take(&mut self.ticking) {
            let Self { trees, actions, .. } = self;
            let Some(tree) = trees[key.0 as usize].as_mut() else { continue };
            if tree.is_open() && tree.next_tick.is_some_and(|due| due <= now) {
                tree.store.tick(now, actions);
                tree.last_tick = now;
            }
            // Back into the list, if there is more to do.
            tree.next_tick = None;
            self.collect_actions(key);
        }
        self.pump();
    }

    /// Tries again what waits for space, and counts what waits for too long.
    fn patrol(&mut self) {
        if self.in_flight == 0 || self.now.0 < self.next_patrol {
            return;
        }
        self.next_patrol = self.now.0 + PATROL;
        let now = self.now;
        for index in 0..self.volumes.len() {
            let Some(volume) = self.volumes[index].as_mut() else { continue };
            let Some(device) = volume.device.as_mut() else { continue };
            let stalled = device.pending.iter().flatten().filter(|p| now.0.saturating_sub(p.since.0) > STALL).count();
            device.statistics.stalled.store(stalled as u64, Relaxed);
            if volume.replica.waiting_for_space() > 0 {
                self.step(VolumeKey(index as u32), Input::SpaceFreed);
            }
        }
        self.pump();
    }

    pub fn tree_mut(&mut self, key: TreeKey) -> Option<&mut Tree> {
        self.trees.get_mut(key.0 as usize)?.as_mut()
    }

    pub fn volume_mut(&mut self, key: VolumeKey) -> Option<&mut Volume> {
        self.volumes.get_mut(key.0 as usize)?.as_deref_mut()
    }

    pub fn device_mut(&mut self, key: VolumeKey) -> Option<&mut Device> {
        self.volume_mut(key)?.device.as_mut()
    }

    /// Rare (operators' requests), so a scan is good enough.
    pub fn tree_of(&self, id: InstanceId) -> Option<TreeKey> {
        let position = self.trees.iter().position(|t| t.as_ref().is_some_and(|t| t.id == id))?;
        Some(TreeKey(position as u32))
    }

    /// The served volume with this id. Rare, as above.
    pub fn volume_of(&self, id: VolumeId) -> Option<VolumeKey> {
        let position = self.volumes.iter().position(|v| v.as_ref().is_some_and(|v| v.id == id))?;
        Some(VolumeKey(position as u32))
    }
}
