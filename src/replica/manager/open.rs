//! The start of a replica: pools, copies, devices that outlived the last one, and what a crash left half made.
//!
//! # Invariants
//! * Copies whose device somebody is using come first: their requests are waiting.
//! * One damaged copy is reported and left alone; the rest of the pool works on.

use super::copy::copying;
use super::fill::{fill_record, is_filling};
use super::mirror::{MirrorPlace, copy_record};
use super::pools::PoolList;
use super::volumes::{Opened, TreeFailure, base_of, base_record, open_tree};
use super::{CopyState, Index, Inner, Manager, PoolState, SnapshotPlace, VolumePlace};
use crate::replica::engine::{EngineHandle, Recovered};
use crate::replica::operations::Operations;
use crate::replica::pool::{Pool, PoolError, PoolName, Promises};
use crate::replica::records::Record;
use crate::store::{Control, SnapshotInfo, VolumeInfo};
use crate::volume::{InstanceId, SnapshotId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
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
        let mut held = std::mem::take(&mut recovered.pendings);
        let kept = held.keys().copied().collect();
        for state in manager.open_pools(settings).await? {
            manager.index().pools.insert(state.pool.name.clone(), state.clone());
            manager.open_trees(&state, &mut held).await;
        }
        for tree in held.keys() {
            tracing::error!(%tree, "a device waits for a copy that is in no pool; add its pool with `tandem pool add`");
        }
        *manager.held() = held;
        before_devices(&manager, &kept).await;
        manager.engine().reattach(recovered).await.into_iter().for_each(|(volume, device)| {
            if let Some(place) = manager.index().volumes.get_mut(&volume) {
                place.device = Some(device);
            }
        });
        manager.clean_up().await;
        Ok(manager)
    }

    async fn open_pools(&self, settings: OpenSettings) -> Result<Vec<Arc<PoolState>>, OpenFailure> {
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
        let mut is_new = false;
        for (name, path, required) in open {
            let (mounts, wanted, source, expected) = (mounts.clone(), name.clone(), path.clone(), list.expected(&name));
            match tokio::task::spawn_blocking(move || Pool::open(wanted, &source, &mounts, expected)).await? {
                Ok(pool) => {
                    is_new |= list.note(&pool);
                    let overcommit = settings.overcommit;
                    states.push(Arc::new(PoolState { pool, promises: Promises::default(), overcommit }));
                }
                // A pool that the command line names must be there; an added one must not keep the others from working,
                // nor one that is gone: only `tandem pool add --force` begins it anew.
                Err(error) if required && !error.is_gone() => return Err(error.into()),
                Err(error) => {
                    tracing::error!(pool = %name, %error, "a pool cannot be opened");
                    self.index().broken_pools.insert(name, (path, error.to_string()));
                }
            }
        }
        if is_new {
            list.write(&settings.dir).map_err(OpenFailure::List)?;
        }
        Ok(states)
    }

    /// Opens the copies of a pool: held ones first, a few at a time.
    pub(super) async fn open_trees(&self, state: &Arc<PoolState>, held: &mut BTreeMap<InstanceId, OwnedFd>) {
        let listed = state.clone();
        let trees = match tokio::task::spawn_blocking(move || listed.pool.trees()).await {
            Ok(Ok(trees)) => trees,
            other => {
                tracing::error!(pool = %state.pool.name, ?other, "the copies of the pool cannot be listed");
                return;
            }
        };
        let (first, rest): (Vec<_>, Vec<_>) = trees.into_iter().partition(|tree| held.contains_key(tree));
        let mut work =
            first.into_iter().chain(rest).map(|tree| (tree, held.remove(&tree))).collect::<Vec<_>>().into_iter();
        let mut running = tokio::task::JoinSet::new();
        loop {
            while running.len() < PARALLEL_OPENS
                && let Some((tree, pending)) = work.next()
            {
                let path = state.pool.tree(tree);
                running.spawn_blocking(move || (tree, open_tree(&path, pending)));
            }
            let Some(opened) = running.join_next().await else { break };
            if let Ok((tree, opened)) = opened {
                self.adopt(state, tree, opened).await;
            }
        }
        self.empty_trash(state);
    }

    async fn adopt(&self, state: &Arc<PoolState>, tree: InstanceId, opened: Result<Opened, TreeFailure>) {
        let name = state.pool.name.clone();
        let problem = match opened {
            Ok(opened) => {
                let (volumes, snapshots) = (opened.store.volumes(), opened.store.snapshots());
                match self.engine().open_tree(tree, opened.store, opened.files, opened.pending).await {
                    Ok(()) => {
                        self.read_names(state, tree, &volumes, &snapshots);
                        self.erase_half_filled(state, tree, &volumes).await;
                        state.promises.settle(tree, self.promised_bytes(tree).await);
                        return;
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        tracing::error!(pool = %name, %tree, %problem, "a copy cannot be opened");
        self.index().broken_trees.insert(tree, (name, problem));
    }

    fn read_names(&self, state: &PoolState, tree: InstanceId, volumes: &[VolumeInfo], snapshots: &[SnapshotInfo]) {
        let path = state.pool.tree(tree);
        let pool = &state.pool.name;
        for info in volumes.iter().filter(|info| !is_filling(&path, info.volume)) {
            let copy = copying(&path, info.volume).map(|_| CopyState::new(info.size));
            let descriptor = descriptor(&path, &info.volume.to_string());
            let mirror = mirror(&path, info.volume);
            let place = VolumePlace { pool: pool.clone(), tree, descriptor, device: None, copy, mirror };
            self.index().volumes.insert(info.volume, place);
        }
        for info in snapshots {
            let base = path.join("records").join(base_record(info.snapshot)).exists();
            let descriptor = descriptor(&path, &info.snapshot.to_string());
            self.index().snapshots.insert(info.snapshot, SnapshotPlace { pool: pool.clone(), tree, descriptor, base });
        }
    }

    /// What a crash left: copies go on, bases that nobody needs go away, and so do copies without names.
    async fn clean_up(&self) {
        let pools: Vec<_> = self.index().pools.values().cloned().collect();
        // Before any copy goes on and writes records.
        for pool in &pools {
            for tree in pool.pool.trees().unwrap_or_default() {
                self.clean_records(pool, tree).await;
            }
        }
        let places: Vec<_> = self.index().volumes.iter().map(|(v, p)| (*v, p.clone())).collect();
        for (volume, place) in &places {
            let Some(pool) = self.pool(&place.pool) else { continue };
            match copying(&pool.pool.tree(place.tree), *volume) {
                Some(snapshot) => self.resume_copy(*volume, snapshot),
                None => self.clean_base(*volume).await,
            }
        }
        for pool in pools {
            let Ok(trees) = pool.pool.trees() else { continue };
            for tree in trees {
                if !self.index().broken_trees.contains_key(&tree) {
                    self.clean_orphan_bases(&pool.pool.name, tree).await;
                    self.tidy_tree(&pool.pool.name, tree).await;
                }
            }
        }
    }

    async fn clean_base(&self, volume: VolumeId) {
        if let Some(place) = self.snapshot_place(base_of(volume)) {
            self.drop_base(volume, place.tree).await;
        }
    }

    /// A record whose object was never named: the call was cut off between the two.
    async fn clean_records(&self, state: &Arc<PoolState>, tree: InstanceId) {
        let names = self.engine().inspect(tree, |store| {
            let volumes = store.volumes().into_iter().map(|info| info.volume);
            let volumes = volumes.flat_map(|id| [id.to_string(), copy_record(id), fill_record(id)]);
            let snapshots = store.snapshots().into_iter().map(|info| info.snapshot);
            let snapshots = snapshots.flat_map(|id| [id.to_string(), base_record(id)]);
            volumes.chain(snapshots).collect::<BTreeSet<_>>()
        });
        let Ok(names) = names.await else { return };
        let records = state.pool.tree(tree).join("records");
        match tokio::task::spawn_blocking(move || remove_orphans(&records, &names)).await {
            Ok(Ok(())) => {}
            other => tracing::warn!(%tree, ?other, "records of nothing stay until the next start"),
        }
    }

    /// A base whose clone was never named: the call that made it was cut off. It is made again when the call is repeated.
    async fn clean_orphan_bases(&self, pool: &PoolName, tree: InstanceId) {
        let nameless: Vec<SnapshotId> = {
            let index = self.index();
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

/// Removes records of what was never made, and what was left of writing one. Blocking.
fn remove_orphans(records: &Path, named: &BTreeSet<String>) -> io::Result<()> {
    for entry in std::fs::read_dir(records)? {
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
