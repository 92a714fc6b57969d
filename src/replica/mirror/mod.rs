//! The mirrored volumes of this node: makes true what the catalogue says of their copies here.
//!
//! ```text
//!   catalogue --watch--> Mirrors (one task) --makes, removes--> Manager     trees, space, records beside the copies
//!      ^                    └── Driver per copy ──open_mirror──> engine
//!      └─ read, propose ── Courier          └─ Session ──peers' events──┘
//! ```
//! # Invariants
//! * Level-triggered: every step is found again by looking at the catalogue and at the disk, in any order of crashes.
//! * A copy is confirmed in the catalogue when it is durable and before it acts; one that was confirmed and is gone is never
//!   made again under its name, because others may count on what it held.
//! * Data is deleted only because an object in the catalogue says so, never because there is no object; and a catalogue that
//!   is older than a copy ([`OlderCatalogue`]) changes nothing of it.
//! * No volume waits for another one's requests: what may wait for those is a task of its own.
//! * The data path does not wait for the catalogue: peers' events go to the engine in a task of their own, and copies are
//!   opened from what is beside them ([`record`]) before anybody asks the catalogue.

mod client;
mod courier;
mod departed;
mod driver;
mod left;
mod reconcile;
mod record;

use crate::catalog::{Catalog, Node, NodeName, Object, Seen, Volume, VolumeConfiguration};
use crate::protocol::{Memory, Stamp};
use crate::replica::manager::Manager;
use crate::replica::peer::Endpoint;
use crate::volume::{BootId, InstanceId, VolumeId};
use client::ClientDriver;
use driver::{Driver, Opened, Opening};
use record::CopyRecord;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

pub use courier::{Refresh, Refresher};
pub use record::{is_going, nodes_of};

/// Before what failed is tried again, at first,
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// and at last: a catalogue that is back is found within seconds, and one that is away is not flooded.
const LAST_PAUSE: Duration = Duration::from_secs(3);

/// What the mirrored volumes of a node need to know.
pub struct MirrorSettings {
    /// This node, also in its certificate.
    pub node: NodeName,
    /// The cluster's.
    pub catalog: Catalog,
    /// Where the other nodes' copies are reached from and come in.
    pub endpoint: Endpoint,
    /// The life of this node: [`boot_id`].
    pub boot: BootId,
}

/// The catalogue has an older configuration of a volume than the copy on this node: it was restored from a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the catalogue is older than the copy on this node (version {}.{} there, {}.{} here): the copy does nothing that it says; \
     use `tandem recover`",
    found.generation.0, found.version.0, here.generation.0, here.version.0
)]
pub struct OlderCatalogue {
    found: Stamp,
    here: Stamp,
}

impl OlderCatalogue {
    /// Whether what was found is at least what is `here`, which was read before it.
    fn check(found: Stamp, here: Option<Stamp>) -> Result<(), Self> {
        match here {
            Some(here) if found < here => Err(Self { found, here }),
            Some(_) | None => Ok(()),
        }
    }
}

/// The life of this node's kernel.
pub fn boot_id() -> io::Result<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    text.trim().parse().map_err(io::Error::other)
}

/// See the module.
pub struct Mirrors {
    settings: Arc<MirrorSettings>,
    drivers: BTreeMap<VolumeId, Driver>,
    /// Volumes that are used here without a copy.
    clients: BTreeMap<VolumeId, ClientDriver>,
    /// Copies that are being opened: a volume that is in use first ends what it has begun, which may wait for space.
    opening: BTreeMap<VolumeId, Opened>,
    /// Trees of which the node's caches have everything: an engine of this boot has left them to the holder, or this one
    /// has made them.
    kept: BTreeSet<InstanceId>,
    /// Where nodes are reached; as the catalogue said last, which is good enough to call them.
    addresses: BTreeMap<NodeName, SocketAddr>,
    /// What was logged last, of the whole or of a volume: what fails again and again is said once.
    said: BTreeMap<Option<VolumeId>, String>,
}

/// What is to be looked at.
struct Work {
    everything: bool,
    nodes: bool,
    volumes: BTreeSet<VolumeId>,
    /// There is something that this node has given up, and when it is tried to forget that: what is in a pool that is missing may stay
    /// for ever.
    gives_up: bool,
    forget_at: Instant,
    rest: Duration,
}

/// How long at most what cannot be forgotten rests, if nothing comes meanwhile in which it may be: each try asks for every name.
const LONGEST_REST: Duration = Duration::from_secs(60);

impl Work {
    fn is_empty(&self) -> bool {
        !self.everything && !self.nodes && self.volumes.is_empty()
    }
}

impl Mirrors {
    /// Of this node. Nothing is opened yet.
    pub fn new(settings: MirrorSettings) -> Self {
        let (drivers, clients, opening, kept, addresses, said) = Default::default();
        Self { settings: Arc::new(settings), drivers, clients, opening, kept, addresses, said }
    }

    /// Opens the copies that are on this node and have acted before, from what is beside them; no catalogue is asked. To be
    /// called when the trees are open and before devices go on. `held` are the trees that the holder kept.
    pub async fn open_copies(&mut self, manager: &Manager, held: &BTreeSet<InstanceId>) {
        self.kept.clone_from(held);
        for copy in manager.copies() {
            let volume = copy.volume;
            let record = match CopyRecord::decode(&copy.record) {
                Ok(record) if !record.removing => record,
                Ok(_) => continue,
                Err(error) => {
                    tracing::error!(%volume, %error, "the record beside a copy is not used: it waits for the catalogue");
                    continue;
                }
            };
            // Without one it has never acted: the catalogue says what it is.
            let Some(first) = manager.durable_record(volume).await else { continue };
            let memory = self.memory(copy.tree);
            let opening = Opening { volume, tree: copy.tree, memory, size: record.size, first };
            match Driver::open(&self.settings, manager, opening).await {
                Ok(mut driver) => {
                    driver.set_peers(&record.parties(&self.settings.node));
                    self.drivers.insert(volume, driver);
                }
                Err(error) => {
                    tracing::error!(%volume, %error, "a copy could not be opened from its disk; it is tried again")
                }
            }
        }
    }

    fn memory(&self, tree: InstanceId) -> Memory {
        if self.kept.contains(&tree) { Memory::Kept } else { Memory::Lost }
    }

    /// Follows the catalogue until it is dropped. The copies' tasks end with it.
    pub async fn run(mut self, manager: Manager) {
        let mut watch = self.settings.catalog.watch();
        let (gives_up, forget_at, rest) = (false, Instant::now(), FIRST_PAUSE);
        let mut work = Work { everything: true, nodes: true, volumes: BTreeSet::new(), gives_up, forget_at, rest };
        let mut pause = FIRST_PAUSE;
        loop {
            self.do_all(&manager, &mut work).await;
            if work.is_empty() {
                pause = FIRST_PAUSE;
            }
            tokio::select! {
                seen = watch.next() => match seen {
                    Some(seen) => self.note(&seen, &mut work),
                    // The catalogue of a process that is ending.
                    None => return,
                },
                () = manager.clients_changed() => (work.everything, work.forget_at) = (true, Instant::now()),
                () = tokio::time::sleep_until(work.forget_at), if work.gives_up && work.is_empty() => {}
                () = tokio::time::sleep(pause), if !work.is_empty() => pause = (pause * 2).min(LAST_PAUSE),
            }
        }
    }

    fn note(&self, seen: &Seen, work: &mut Work) {
        let Seen::Changed(change) = seen else {
            (work.everything, work.nodes) = (true, true);
            return;
        };
        match change.kind {
            Node::KIND => work.nodes = true,
            Volume::KIND | VolumeConfiguration::KIND => {
                if let Ok(volume) = change.key.parse() {
                    work.volumes.insert(volume);
                }
            }
            _ => {}
        }
    }

    /// What cannot be done stays to be done.
    async fn do_all(&mut self, manager: &Manager, work: &mut Work) {
        if work.nodes {
            match self.settings.catalog.list::<Node>().await {
                Ok(nodes) => {
                    let own = nodes.iter().find(|stored| stored.object.name == self.settings.node);
                    work.gives_up = own.is_some_and(|own| !own.object.given_up.is_empty());
                    let nodes = nodes.into_iter().map(|stored| (stored.object.name, stored.object.mirror));
                    let addresses = nodes.collect();
                    // Whoever has a copy beside one of ours may have moved.
                    work.everything |= self.addresses != addresses;
                    (self.addresses, work.nodes) = (addresses, false);
                }
                Err(error) => return self.say(None, error.to_string()),
            }
        }
        if work.everything {
            match self.settings.catalog.list::<Volume>().await {
                Ok(volumes) => {
                    work.volumes.extend(volumes.iter().map(|stored| stored.object.id));
                    work.volumes.extend(manager.copies().iter().map(|copy| copy.volume));
                    work.volumes.extend(self.clients.keys());
                    work.everything = false;
                }
                Err(error) => return self.say(None, error.to_string()),
            }
        }
        let mut failed = BTreeSet::new();
        for volume in std::mem::take(&mut work.volumes) {
            match self.reconcile(manager, volume).await {
                Ok(()) => drop(self.said.remove(&Some(volume))),
                Err(error) => {
                    self.say(Some(volume), error.to_string());
                    failed.insert(volume);
                }
            }
        }
        work.volumes = failed;
        self.forget_in_time(manager, work).await;
    }

    /// After what somebody may wait for.
    async fn forget_in_time(&mut self, manager: &Manager, work: &mut Work) {
        if work.gives_up && Instant::now() < work.forget_at {
            return;
        }
        let forgotten = if work.gives_up { self.forget_given_up(manager).await } else { Ok(()) };
        match forgotten {
            Ok(()) => {
                self.said.remove(&None);
                (work.gives_up, work.rest) = (false, FIRST_PAUSE);
            }
            Err(error) => {
                self.say(None, error.to_string());
                work.forget_at = Instant::now() + work.rest;
                work.rest = (work.rest * 2).min(LONGEST_REST);
            }
        }
    }

    /// Logs what is tried again, once as long as it stays the same.
    fn say(&mut self, volume: Option<VolumeId>, problem: String) {
        if self.said.get(&volume) == Some(&problem) {
            return;
        }
        match volume {
            Some(volume) => {
                tracing::warn!(%volume, %problem, "a mirrored volume is not yet as it shall be here; it is tried again");
            }
            None => tracing::warn!(%problem, "mirrored volumes go on as they are; the catalogue is asked again"),
        }
        self.said.insert(volume, problem);
    }
}
