//! The start of a replica: pools, copies, devices that outlived the last one, and what a crash left half made.
//!
//! # Invariants
//! * Copies whose device somebody is using come first: their requests are waiting.
//! * One damaged copy is reported and left alone; the rest of the pool works on.
//! * What the holder kept of a copy is kept here until that copy is open.

use super::copy::copying;
use super::fill::{fill_record, filled, is_filling};
use super::mirror::{MirrorPlace, copy_record};
use super::pools::PoolList;
use super::volumes::{Opened, TreeFailure, base_of, base_record, open_tree};
use super::{BrokenPool, BrokenTree, CopyState, Index, Inner, Manager, PoolState, SnapshotPlace, VolumePlace};
use crate::replica::engine::{EngineHandle, Recovered};
use crate::replica::operations::Operations;
use crate::replica::pool::{Expected, Pool, PoolError, PoolName};
use crate::replica::records::Record;
use crate::store::{Control, SnapshotInfo, Store, VolumeInfo};
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Copies that are opened at the same time: one per core is enough to keep the disk busy.
const PARALLEL_OPENS: usize = 4;

/// What the manager needs to know at its start.
#[derive(Clone, Debug)]
pub struct OpenSettings {
    /// The installation's directory.
    pub dir: PathBuf,
    /// Pools from the command line; those added later are in `dir/pools.json`.
    pub pools: Vec<(PoolName, PathBuf)>,
    /// Promised bytes over bytes that are there.
    pub overcommit: f64,
}

/// Why the manager cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenFailure {
    /// A pool from the command line.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The list of added pools.
    #[error("the list of pools cannot be read: {0}; repair or remove it (the pools themselves are safe)")]
    List(#[source] io::Error),
    /// A helper thread died.
    #[error("a helper thread died while opening pools: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

impl Manager {
    /// Opens everything; `recovered` is what the holder kept. When it returns, devices go on.
    pub async fn open(settings: OpenSettings, engine: EngineHandle, recovered: Recovered) -> Result<Self, OpenFailure> {
        Self::open_with(settings, engine, recovered, async |_, _| {}).await
    }

    /// The same; `before_devices` opens what devices need beside their trees: it gets the trees that the holder kept.
    pub async fn open_with(
        settings: OpenSettings,
        engine: EngineHandle,
        mut recovered: Recovered,
        before_devices: impl AsyncFnOnce(&Self, &BTreeSet<InstanceId>),
    ) -> Result<Self, OpenFailure> {
        let manager = Self {
            inner: Arc::new(Inner {
                engine,
                index: Mutex::new(Index::default()),
                operations: Operations::default(),
                settings: settings.clone(),
                held: Mutex::default(),
                clients_changed: tokio::sync::Notify::new(),
            }),
        };
        manager.index().held_devices = recovered.volumes.iter().copied().collect();
        let kept: BTreeSet<_> = recovered.pendings.keys().copied().collect();
        *manager.held() = std::mem::take(&mut recovered.pendings);
        let mut opened = Vec::new();
        for state in manager.open_pools(settings, !kept.is_empty()).await? {
            manager.index().pools.insert(state.pool.name.clone(), state.clone());
            let trees = manager.open_trees(&state).await;
            opened.push((state, trees));
        }
        for tree in manager.held().keys() {
            tracing::error!(%tree, "a device waits for a copy that is not open; if its pool is away, `tandem pool add` takes it back");
        }
        before_devices(&manager, &kept).await;
        manager.engine().reattach(recovered).await.into_iter().for_each(|(volume, device)| {
            if let Some(place) = manager.index().volumes.get_mut(&volume) {
                place.device = Some(device);
            }
        });
        for (state, trees) in &opened {
            manager.clean_up(state, trees).await;
        }
        manager.keep_trying();
        Ok(manager)
    }

    /// `is_used`: devices of an earlier engine wait.
    async fn open_pools(&self, settings: OpenSettings, is_used: bool) -> Result<Vec<Arc<PoolState>>, OpenFailure> {
        let mounts = settings.dir.join("pools");
        let mut list = PoolList::read(&settings.dir).map_err(OpenFailure::List)?;
        let mut states = Vec::new();
        let mut open = Vec::new();
        for (name, path) in settings.pools {
            open.push((name, path, true));
        }
        for (name, path) in &list.pools {
            let Ok(name) = name.parse::<PoolName>() else { continue };
            if !open.iter().any(|(known, _, _)| *known == name) {
                open.push((name, path.clone(), false));
            }
        }
        let (mut is_new, mut refused) = (false, None);
        for (name, path, required) in open {
            let (mounts, wanted, source, expected) = (mounts.clone(), name.clone(), path.clone(), list.expected(&name));
            match tokio::task::spawn_blocking(move || Pool::open(wanted, &source, &mounts, expected)).await? {
                Ok(pool) => {
                    is_new |= list.note(&pool);
                    states.push(PoolState::new(pool, settings.overcommit, &states));
                }
                Err(error) => {
                    tracing::error!(pool = %name, %error, "a pool cannot be opened");
                    // One that is gone is a person's to bring back, or to begin anew.
                    let broken = BrokenPool { path, problem: error.to_string(), retried: !error.is_gone() };
                    self.index().broken_pools.insert(name, broken);
                    if required && expected == Expected::Any {
                        refused.get_or_insert(error);
                    }
                }
            }
        }
        // A first start ends with what is wrong. Whoever has devices, or another pool, is not left alone for one that is bad.
        if let Some(error) = refused.filter(|_| states.is_empty() && !is_used) {
            return Err(error.into());
        }
        if is_new {
            list.write(&settings.dir).map_err(OpenFailure::List)?;
        }
        Ok(states)
    }

    /// Opens the copies of a pool, and says which there are: held ones first, a few at a time.
    pub(super) async fn open_trees(&self, state: &Arc<PoolState>) -> BTreeSet<InstanceId> {
        let listed = state.clone();
        let trees = match tokio::task::spawn_blocking(move || listed.pool.trees()).await {
            Ok(Ok(trees)) => trees,
            other => {
                tracing::error!(pool = %state.pool.name, ?other, "the copies of the pool cannot be listed");
                return BTreeSet::new();
            }
        };
        let (first, rest): (Vec<InstanceId>, Vec<InstanceId>) = {
            let held = self.held();
            trees.iter().partition(|tree| held.contains_key(tree))
        };
        let mut work = first.into_iter().chain(rest);
        let mut running = tokio::task::JoinSet::new();
        loop {
            while running.len() < PARALLEL_OPENS
                && let Some(tree) = work.next()
            {
                let open = self.opening(state, tree);
                running.spawn_blocking(move || (tree, open()));
            }
            let Some(opened) = running.join_next().await else { break };
            if let Ok((tree, opened)) = opened {
                self.adopt(state, tree, opened).await;
            }
        }
        self.empty_trash(state);
        trees.into_iter().collect()
    }

    /// What opens a copy; it blocks. Records of what was never named are gone before anybody can write others.
    pub(super) fn opening(
        &self,
        state: &PoolState,
        tree: InstanceId,
    ) -> impl FnOnce() -> Result<Opened, TreeFailure> + Send + use<> {
        // What was acknowledged is in this memory and nowhere else: it is kept until the copy is open.
        let held = self.held().get(&tree).map(OwnedFd::try_clone).transpose();
        let path = state.pool.tree(tree);
        move || {
            let opened = open_tree(&path, held?)?;
            if let Err(error) = remove_orphans(&path.join("records"), &names_of(&opened.store)) {
                tracing::warn!(%tree, %error, "records of nothing stay until the next start");
            }
            Ok(opened)
        }
    }

    /// A copy that was opened is used from now on; one that was not is noted.
    pub(super) async fn adopt(&self, state: &Arc<PoolState>, tree: InstanceId, opened: Result<Opened, TreeFailure>) {
        let pool = state.pool.name.clone();
        let (problem, retried) = match opened {
            Ok(opened) => {
                let (volumes, snapshots) = (opened.store.volumes(), opened.store.snapshots());
                match self.engine().open_tree(tree, opened.store, opened.files, opened.pending).await {
                    Ok(()) => {
                        self.held().remove(&tree);
                        // Until its names are read, nobody may take what is in it for what is not here.
                        if self.read_names(state, tree, &volumes, &snapshots).await {
                            self.index().broken_trees.remove(&tree);
                        }
                        self.erase_half_filled(state, tree, &volumes).await;
                        state.promises.settle(tree, self.promised_bytes(tree).await);
                        return;
                    }
                    Err(error) => (error.to_string(), false),
                }
            }
            Err(error) => (error.to_string(), error.is_full()),
        };
        let broken = BrokenTree { pool, problem, retried };
        let known = self.index().broken_trees.insert(tree, broken.clone());
        if known.is_none_or(|known| known.problem != broken.problem) {
            tracing::error!(pool = %broken.pool, %tree, problem = %broken.problem, retried, "a copy cannot be opened");
        }
    }

    /// What the copy has is known from now on; whether it is not left alone.
    async fn read_names(
        &self,
        state: &PoolState,
        tree: InstanceId,
        volumes: &[VolumeInfo],
        snapshots: &[SnapshotInfo],
    ) -> bool {
        let path = state.pool.tree(tree);
        let (pool, mut is_used) = (&state.pool.name, true);
        for info in volumes.iter().filter(|info| !is_filling(&path, info.volume)) {
            if !self.may_claim(state, tree, info).await {
                is_used = false;
                continue;
            }
            let copy = copying(&path, info.volume).map(|_| CopyState::new(info.size));
            let descriptor = descriptor(&path, &info.volume.to_string());
            let mirror = mirror(&path, info.volume);
            let device = self.device_here(info.volume, tree).await;
            let place = VolumePlace { pool: pool.clone(), tree, descriptor, device, copy, mirror };
            self.index().volumes.insert(info.volume, place);
        }
        for info in snapshots {
            let base = path.join("records").join(base_record(info.snapshot)).exists();
            let descriptor = descriptor(&path, &info.snapshot.to_string());
            let place = SnapshotPlace { pool: pool.clone(), tree, descriptor, base };
            let mut index = self.index();
            // A copy that was replaced may have followed the seal in the middle of its resync: what has no record is not it.
            let known =
                index.snapshots.get(&info.snapshot).filter(|known| known.tree != tree && place.descriptor.is_empty());
            if known.is_none_or(|known| known.descriptor.is_empty()) {
                index.snapshots.insert(info.snapshot, place);
            }
        }
        is_used
    }

    /// Whether the volume is this copy's: a creation that was cut off may have left an empty one beside the one that was made
    /// when the call was repeated. Whichever does not count is named and left alone.
    async fn may_claim(&self, state: &PoolState, tree: InstanceId, info: &VolumeInfo) -> bool {
        let volume = info.volume;
        let Some(other) = self.place(volume).filter(|place| place.tree != tree) else { return true };
        let is_blank = |info: &VolumeInfo| info.allocated_blocks == 0 && info.layers == 1;
        let other_info = self.volume_info(other.tree, volume).await;
        let held = self.index().held_devices.get(&volume).copied();
        let is_used = other.device.is_some() || held == Some(other.tree);
        let has_more = !is_blank(info) && other_info.is_some_and(|info| is_blank(&info));
        let claims = !is_used && (held == Some(tree) || has_more);
        let this = (tree, state.pool.name.clone());
        let ((used, _), (left, pool)) =
            if claims { (this, (other.tree, other.pool)) } else { ((other.tree, other.pool), this) };
        let problem = format!(
            "it has volume {volume}, and so has copy {used}, which is used; if nothing of it is missed, move its directory away \
             while tandem does not run"
        );
        tracing::error!(%pool, tree = %left, %problem, "a copy is left alone");
        self.index().broken_trees.insert(left, BrokenTree { pool, problem, retried: false });
        claims
    }

    /// The device that the engine serves for a volume that a killed engine served.
    async fn device_here(&self, volume: VolumeId, tree: InstanceId) -> Option<PathBuf> {
        if self.index().held_devices.get(&volume) != Some(&tree) {
            return None;
        }
        // One that waits for something else is found when it is attached.
        self.engine().device(volume).await.ok().flatten()
    }

    /// What a crash left in these copies: copies under way go on, bases that nobody needs go away, and so do copies without
    /// names. Others may be in use meanwhile.
    pub(super) async fn clean_up(&self, state: &Arc<PoolState>, trees: &BTreeSet<InstanceId>) {
        let volumes: Vec<_> = {
            let index = self.index();
            let here = index.volumes.iter().filter(|(_, place)| trees.contains(&place.tree));
            here.map(|(volume, place)| (*volume, place.tree)).collect()
        };
        for (volume, tree) in volumes {
            match copying(&state.pool.tree(tree), volume) {
                Some(snapshot) => self.resume_copy(volume, snapshot),
                None => self.clean_base(volume).await,
            }
        }
        for tree in trees {
            let Ok(_guard) = self.inner.operations.begin(vec![tree.to_bytes()]).await else { continue };
            if !self.index().broken_trees.contains_key(tree) {
                self.clean_orphan_bases(&state.pool.name, *tree).await;
                self.tidy_tree(&state.pool.name, *tree).await;
            }
        }
    }

    async fn clean_base(&self, volume: VolumeId) {
        let Ok(_guard) = self.inner.operations.begin(vec![volume.to_bytes()]).await else { return };
        if let Some(place) = self.snapshot_place(base_of(volume)) {
            self.drop_base(volume, place.tree).await;
        }
    }

    /// A base whose clone was never named: the call that made it was cut off. It is made again when the call is repeated.
    async fn clean_orphan_bases(&self, pool: &PoolName, tree: InstanceId) {
        let nameless: Vec<SnapshotId> = {
            let index = self.index();
            if !index.broken_pools.is_empty() || !index.broken_trees.is_empty() {
                // The clone may be there.
                return;
            }
            let of_tree = index.snapshots.iter().filter(|(_, p)| p.tree == tree && p.base);
            of_tree
                .map(|(id, _)| *id)
                .filter(|id| !index.volumes.contains_key(&VolumeId::from_bytes(id.to_bytes())))
                .collect()
        };
        for snapshot in nameless {
            if let Err(error) = self.engine().control(tree, Control::DeleteSnapshot(snapshot)).await {
                tracing::warn!(%snapshot, %error, "a snapshot without record stays until the next start");
                continue;
            }
            self.index().snapshots.remove(&snapshot);
            self.remove_record(pool, tree, base_record(snapshot)).await;
        }
    }
}

/// The records that a copy may have. That of a snapshot which was still being filled, and was to be sealed, says nothing of what a
/// late seal has put under its id.
fn names_of(store: &Store) -> BTreeSet<String> {
    let volumes: BTreeSet<_> = store.volumes().into_iter().map(|info| info.volume).collect();
    let snapshots = store.snapshots().into_iter().map(|info| info.snapshot);
    let snapshots = snapshots.filter(|id| !volumes.contains(&filled(*id)));
    let snapshots = snapshots.flat_map(|id| [id.to_string(), base_record(id)]);
    let volumes = volumes.iter().flat_map(|id| [id.to_string(), copy_record(*id), fill_record(*id)]);
    volumes.chain(snapshots).collect()
}

/// Removes records of what was never made (the call was cut off between the two), and what was left of writing one. Blocking.
fn remove_orphans(records: &Path, named: &BTreeSet<String>) -> io::Result<()> {
    let entries = match std::fs::read_dir(records) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(|name| named.contains(name)) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn descriptor(tree: &Path, id: &str) -> String {
    match Record::read(tree, id) {
        Ok(record) => record.map(|r| r.descriptor).unwrap_or_default(),
        Err(error) => {
            tracing::error!(%error, "a record is not used");
            String::from("damaged")
        }
    }
}

/// A damaged record makes it one copy of several as well: nobody may take it for the only one.
fn mirror(tree: &Path, volume: VolumeId) -> Option<MirrorPlace> {
    let name = copy_record(volume);
    let there = tree.join("records").join(&name).exists();
    there.then(|| MirrorPlace::closed(descriptor(tree, &name)))
}
