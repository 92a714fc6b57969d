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
//! * No volume waits for another one's requests, nor for its disk: what may wait for those is a task of its own ([`errands`]).
//! * The data path does not wait for the catalogue: peers' events go to the engine in a task of their own, and copies are
//!   opened from what is beside them ([`record`]) before anybody asks the catalogue.

mod client;
mod courier;
mod departed;
mod driver;
mod errands;
mod left;
mod local;
mod reconcile;
mod record;
mod retries;

use crate::catalog::{Catalog, CatalogError, Node, NodeName, Object, Seen, Volume, VolumeConfiguration};
use crate::protocol::Stamp;
use crate::replica::manager::Manager;
use crate::replica::peer::Endpoint;
use crate::replica::pool::PoolName;
use crate::volume::{BootId, InstanceId, SnapshotId, VolumeId};
use driver::{Driver, Opening};
use errands::{Ended, Errands, SOON};
use local::{Common, Local};
use reconcile::Trouble;
use record::CopyRecord;
use retries::Retries;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
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
    common: Common,
    /// What volumes have here for which nothing is under way.
    volumes: BTreeMap<VolumeId, Local>,
    errands: Errands<Subject, Done>,
    /// What failed for volumes.
    retries: Retries<VolumeId>,
    /// Those of which it was logged that they take long.
    slow: BTreeSet<VolumeId>,
    /// What was logged last, of the whole or of a volume: what fails again and again is said once.
    said: BTreeMap<Option<VolumeId>, String>,
}

/// Whom an errand is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Volume(VolumeId),
    Snapshot(SnapshotId),
}

/// Why it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Errand {
    /// The catalogue is followed.
    Follow(VolumeId),
    /// This node has given it up.
    Forget(Subject),
}

impl Subject {
    fn volume(self) -> Option<VolumeId> {
        match self {
            Self::Volume(volume) => Some(volume),
            Self::Snapshot(_) => None,
        }
    }

    /// Where it is here, if it is.
    fn pool(self, manager: &Manager) -> Option<PoolName> {
        match self {
            Self::Volume(volume) => manager.pool_of(volume),
            Self::Snapshot(snapshot) => manager.pool_of_snapshot(snapshot),
        }
    }
}

impl Errand {
    fn subject(self) -> Subject {
        match self {
            Self::Follow(volume) => Subject::Volume(volume),
            Self::Forget(subject) => subject,
        }
    }

    /// `local` is what the volume has here, of a volume.
    async fn run(self, manager: Manager, common: Common, mut local: Option<Local>) -> Done {
        let result = match (self, &mut local) {
            (Self::Follow(_), Some(local)) => local.reconcile(&manager).await,
            (Self::Forget(Subject::Volume(_)), Some(local)) => local.forget(&manager).await,
            (Self::Forget(Subject::Snapshot(snapshot)), None) => common.forget_snapshot(&manager, snapshot).await,
            // A volume has something local, and a snapshot has not.
            (Self::Follow(_) | Self::Forget(_), _) => Ok(()),
        };
        if let Some(local) = &mut local {
            local.leave();
        }
        Done { errand: self, local, result }
    }
}

/// What it brings back.
struct Done {
    errand: Errand,
    /// Of a volume.
    local: Option<Local>,
    result: Result<(), Trouble>,
}

/// What is to be looked at.
struct Work {
    everything: bool,
    nodes: bool,
    /// When those two are asked for, and the pause if that fails.
    list_at: Instant,
    pause: Duration,
    /// At once.
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
    fn new() -> Self {
        let (volumes, gives_up, now) = (BTreeSet::new(), false, Instant::now());
        let (list_at, forget_at, pause, rest) = (now, now, FIRST_PAUSE, FIRST_PAUSE);
        Self { everything: true, nodes: true, list_at, pause, volumes, gives_up, forget_at, rest }
    }

    fn is_to_list(&self) -> bool {
        self.everything || self.nodes
    }

    /// When there is something to do, if that is known; `retry_at` is when a volume is tried again.
    fn next(&self, retry_at: Option<Instant>) -> Option<Instant> {
        if self.is_to_list() {
            return Some(self.list_at);
        }
        let at_once = (!self.volumes.is_empty()).then(Instant::now);
        let forget_at = self.gives_up.then_some(self.forget_at);
        [at_once, forget_at, retry_at].into_iter().flatten().min()
    }
}

impl Mirrors {
    /// Of this node. Nothing is opened yet.
    pub fn new(settings: MirrorSettings) -> Self {
        let (kept, addresses, pools) = Default::default();
        let common = Common { settings: Arc::new(settings), kept, addresses, pools };
        let (volumes, slow, said) = Default::default();
        Self { common, volumes, errands: Errands::new(), retries: Retries::new(), slow, said }
    }

    /// Opens the copies that are on this node and have acted before, from what is beside them; no catalogue is asked. To be
    /// called when the trees are open and before devices go on. `held` are the trees that the holder kept.
    pub async fn open_copies(&mut self, manager: &Manager, held: &BTreeSet<InstanceId>) {
        self.common.kept = Arc::new(held.clone());
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
            let memory = self.common.memory(copy.tree);
            let opening = Opening { volume, tree: copy.tree, memory, size: record.size, first };
            match Driver::open(&self.common.settings, manager, opening).await {
                Ok(mut driver) => {
                    driver.set_peers(&record.parties(&self.common.settings.node));
                    self.local(volume).driver = Some(driver);
                }
                Err(error) => {
                    tracing::error!(%volume, %error, "a copy could not be opened from its disk; it is tried again")
                }
            }
        }
    }

    fn local(&mut self, volume: VolumeId) -> &mut Local {
        let Self { volumes, common, .. } = self;
        volumes.entry(volume).or_insert_with(|| Local::new(common.clone(), volume))
    }

    /// Follows the catalogue until it is dropped. The copies' tasks end with it.
    pub async fn run(mut self, manager: Manager) {
        let mut watch = self.common.settings.catalog.watch();
        let mut work = Work::new();
        loop {
            self.do_all(&manager, &mut work).await;
            let next = work.next(self.retries.next());
            tokio::select! {
                seen = watch.next() => match seen {
                    Some(seen) => self.note(&seen, &mut work),
                    // The catalogue of a process that is ending.
                    None => return,
                },
                ended = self.errands.next() => {
                    let (errand, result) = self.take_back(ended, &mut work);
                    self.note_late(&manager, errand, result, &mut work);
                }
                () = manager.clients_changed() => (work.everything, work.forget_at) = (true, Instant::now()),
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }

    fn note(&self, seen: &Seen, work: &mut Work) {
        let Seen::Changed(change) = seen else {
            (work.everything, work.nodes, work.list_at) = (true, true, Instant::now());
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
        if work.is_to_list() {
            if Instant::now() < work.list_at {
                return;
            }
            if let Err(error) = self.list(manager, work).await {
                (work.list_at, work.pause) = (Instant::now() + work.pause, (work.pause * 2).min(LAST_PAUSE));
                return self.say(None, error.to_string());
            }
            work.pause = FIRST_PAUSE;
        }
        work.volumes.extend(self.retries.take_due(Instant::now()));
        for volume in std::mem::take(&mut work.volumes) {
            let result = self.run_errand(manager, Errand::Follow(volume), work).await;
            self.note_followed(volume, result);
        }
        self.forget_in_time(manager, work).await;
    }

    /// Finds the nodes, or everything, if that is to be looked at.
    async fn list(&mut self, manager: &Manager, work: &mut Work) -> Result<(), CatalogError> {
        if work.nodes {
            let nodes = self.common.settings.catalog.list::<Node>().await?;
            let own = nodes.iter().find(|stored| stored.object.name == self.common.settings.node);
            work.gives_up = own.is_some_and(|own| !own.object.given_up.is_empty());
            let nodes = nodes.into_iter().map(|stored| (stored.object.name, stored.object.mirror));
            let addresses = nodes.collect();
            // Whoever has a copy beside one of ours may have moved.
            work.everything |= *self.common.addresses != addresses;
            work.nodes = false;
            self.common.addresses = Arc::new(addresses);
        }
        if work.everything {
            let volumes = self.common.settings.catalog.list::<Volume>().await?;
            work.volumes.extend(volumes.iter().map(|stored| stored.object.id));
            work.volumes.extend(manager.copies().iter().map(|copy| copy.volume));
            work.volumes.extend(self.volumes.keys());
            work.volumes.extend(self.errands.subjects().filter_map(Subject::volume));
            work.everything = false;
        }
        Ok(())
    }

    /// Runs an errand, and waits for its end if that is soon; not at all if others are at the disk of its pool already, since
    /// that may hang, or if its copy is being opened, which may wait for space.
    async fn run_errand(&mut self, manager: &Manager, errand: Errand, work: &mut Work) -> Result<(), Trouble> {
        let subject = errand.subject();
        if self.errands.note(subject) {
            return Err(Trouble::UnderWay);
        }
        let pool = subject.pool(manager);
        let is_visited = pool.is_some() && self.common.pools.is_visited(pool.clone());
        let mut local = self.local_of(subject);
        if pool.is_some() && local.as_mut().is_some_and(|local| local.enter(pool.clone()).is_err()) {
            self.volumes.extend(local.filter(Local::has_any).map(|local| (local.volume, local)));
            if let Errand::Follow(volume) = errand {
                self.retries.waits_for_room(volume);
            }
            return Err(Trouble::UnderWay);
        }
        let is_opening = local.as_ref().is_some_and(|local| local.opening.is_some());
        let patience = if is_visited || is_opening { Duration::ZERO } else { SOON };
        let until = Instant::now() + patience;
        if let Errand::Follow(volume) = errand {
            self.retries.begun(volume);
        }
        self.errands.begin(subject, errand.run(manager.clone(), self.common.clone(), local));
        while let Some(ended) = self.errands.next_before(until).await {
            let (ended, result) = self.take_back(ended, work);
            if ended == errand {
                return result;
            }
            self.note_late(manager, ended, result, work);
        }
        // Without a pool it is mostly another node's and waits for the catalogue, whose error will say so.
        if let Some(volume) = subject.volume().filter(|_| pool.is_some() && patience == SOON)
            && self.slow.insert(volume)
        {
            warn_of(volume, &Trouble::UnderWay.to_string());
        }
        Err(Trouble::UnderWay)
    }

    /// What the subject has here, if it is a volume, to be worked on.
    fn local_of(&mut self, subject: Subject) -> Option<Local> {
        let volume = subject.volume()?;
        let local = self.volumes.remove(&volume);
        let mut local = local.unwrap_or_else(|| Local::new(self.common.clone(), volume));
        local.common.clone_from(&self.common);
        Some(local)
    }

    /// What an errand has brought back is here again.
    fn take_back(&mut self, ended: Ended<Subject, Done>, work: &mut Work) -> (Errand, Result<(), Trouble>) {
        let Ended { subject, result: Done { errand, local, result }, again } = ended;
        if let Some(local) = local.filter(Local::has_any) {
            self.volumes.insert(local.volume, local);
        }
        if let (Some(volume), Ok(())) = (subject.volume(), &result) {
            self.slow.remove(&volume);
        }
        // Who found no room has left none.
        if !matches!(result, Err(Trouble::Crowded(_))) {
            self.retries.somebody_left(Instant::now());
        }
        if again {
            work.volumes.extend(subject.volume());
        }
        (errand, result)
    }

    /// An errand has ended that nobody waits for any more.
    fn note_late(&mut self, manager: &Manager, errand: Errand, result: Result<(), Trouble>, work: &mut Work) {
        match (errand, result) {
            (Errand::Follow(volume), result) => self.note_followed(volume, result),
            // It leaves the list when it is looked at again: at once if it has gone. What stays is looked at after its rest.
            (Errand::Forget(subject), Ok(())) => {
                if subject.pool(manager).is_none() {
                    work.forget_at = Instant::now();
                }
            }
            (Errand::Forget(_), Err(error)) => self.say(None, error.to_string()),
        }
    }

    /// The catalogue was followed, or will be.
    fn note_followed(&mut self, volume: VolumeId, result: Result<(), Trouble>) {
        match result {
            Ok(()) => {
                self.said.remove(&Some(volume));
                self.retries.succeeded(volume);
            }
            // Its end brings it here again, or that of another one.
            Err(Trouble::UnderWay) => {}
            // What the others wait for was said of one of them.
            Err(Trouble::Crowded(_)) => self.retries.failed(volume, Instant::now()),
            Err(error) => {
                self.say(Some(volume), error.to_string());
                self.retries.failed(volume, Instant::now());
            }
        }
    }

    /// After what somebody may wait for.
    async fn forget_in_time(&mut self, manager: &Manager, work: &mut Work) {
        if work.gives_up && Instant::now() < work.forget_at {
            return;
        }
        let forgotten = if work.gives_up { self.forget_given_up(manager, work).await } else { Ok(()) };
        match forgotten {
            Ok(()) => {
                self.said.remove(&None);
                (work.gives_up, work.rest) = (false, FIRST_PAUSE);
            }
            Err(error) => {
                if !matches!(error, Trouble::UnderWay) {
                    self.say(None, error.to_string());
                }
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
            Some(volume) => warn_of(volume, &problem),
            None => tracing::warn!(%problem, "mirrored volumes go on as they are; the catalogue is asked again"),
        }
        self.said.insert(volume, problem);
    }
}

fn warn_of(volume: VolumeId, problem: &str) {
    tracing::warn!(%volume, %problem, "a mirrored volume is not yet as it shall be here; it is tried again");
}
