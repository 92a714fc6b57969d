//! Pools: opened at start, added while running, and their figures.

use super::errors::PoolFailure as Failure;
use super::{BrokenPool, HIGH_WATER_SHARE, Index, Manager, PoolState, largest_volume};
use crate::replica::operations::{Busy, OperationGuard};
use crate::replica::pool::{Expected, Pool, PoolName, sync_directory, used_bytes};
use crate::volume::{PoolId, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A pool to add.
#[derive(Clone, Debug)]
pub struct AddPool {
    /// Its name.
    pub name: PoolName,
    /// A directory or a disk.
    pub path: PathBuf,
    /// Format a disk that carries a signature, and begin anew where a pool of this name is gone.
    pub force: bool,
}

/// A pool and its figures in bytes.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "named and explained in control.proto")]
pub struct PoolView {
    pub name: PoolName,
    pub path: PathBuf,
    pub id: String,
    pub capacity: u64,
    pub promised: u64,
    pub used: u64,
    pub free: u64,
    pub largest_volume: u64,
    pub overcommit: f64,
    pub filesystem: &'static str,
    pub problem: String,
}

/// What is known of the node's pools from one start to the next.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PoolList {
    /// Added with `tandem pool add`: they are opened again at every start.
    pub pools: BTreeMap<String, PathBuf>,
    /// Which pool was open under a name, also of those that the command line names.
    #[serde(default)]
    ids: BTreeMap<String, PoolId>,
}

impl PoolList {
    pub fn read(dir: &Path) -> io::Result<Self> {
        match fs::read(dir.join("pools.json")) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", dir.join("pools.json").display()))
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e),
        }
    }

    pub fn expected(&self, name: &PoolName) -> Expected {
        self.ids.get(name.as_str()).map_or(Expected::Any, |id| Expected::Known(*id))
    }

    /// The pool is open; whether that was new.
    pub fn note(&mut self, pool: &Pool) -> bool {
        self.ids.insert(pool.name.to_string(), pool.id) != Some(pool.id)
    }

    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let fresh = dir.join("pools.json.new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&fresh, dir.join("pools.json"))?;
        sync_directory(dir)
    }
}

impl Index {
    /// What is wrong with the copies of this pool that are not open; empty if all are.
    pub(super) fn broken_trees_of(&self, name: &PoolName) -> String {
        let broken: Vec<_> = self.broken_trees.iter().filter(|(_, tree)| tree.pool == *name).collect();
        match broken.as_slice() {
            [] => String::new(),
            [(tree, first), rest @ ..] => {
                format!("{} copies cannot be opened; the first is {tree}: {}", rest.len() + 1, first.problem)
            }
        }
    }
}

impl Manager {
    /// The pool is there, now and after every restart.
    pub async fn add_pool(&self, add: AddPool) -> Result<PoolView, Failure> {
        let name = add.name.clone();
        let _guard = self.begin_pools().await?;
        if let Some(there) = self.pool(&name) {
            if there.pool.source != add.path {
                return Err(Failure::Exists(name));
            }
            return Ok(self.view(&there).await);
        }
        let (settings, wanted) = (self.inner.settings.clone(), add.clone());
        let opened = tokio::task::spawn_blocking(move || -> Result<Pool, Failure> {
            let mounts = settings.dir.join("pools");
            let mut list = PoolList::read(&settings.dir).map_err(Failure::List)?;
            let expected = if wanted.force { Expected::Force } else { list.expected(&wanted.name) };
            let pool = Pool::open(wanted.name.clone(), &wanted.path, &mounts, expected)?;
            list.note(&pool);
            list.pools.insert(wanted.name.to_string(), wanted.path);
            // The list before the answer: an added pool is there after a restart.
            list.write(&settings.dir).map_err(Failure::List)?;
            Ok(pool)
        });
        let pool = opened.await.map_err(|e| Failure::List(io::Error::other(e)))??;
        let state = self.take_in(pool).await;
        Ok(self.view(&state).await)
    }

    /// One pool is opened at a time.
    pub(super) async fn begin_pools(&self) -> Result<OperationGuard, Busy> {
        self.inner.operations.begin(vec![[0xff; 16]]).await
    }

    /// A pool that was opened while others are in use. Needs the operation of all pools.
    pub(super) async fn take_in(&self, pool: Pool) -> Arc<PoolState> {
        let name = pool.name.clone();
        let state = PoolState::new(pool, self.inner.settings.overcommit, self.index().pools.values());
        let trees = self.open_trees(&state).await;
        self.index().pools.insert(name.clone(), state.clone());
        self.index().broken_pools.remove(&name);
        self.clean_up(&state, &trees).await;
        self.copies_came();
        self.keep_trying();
        state
    }

    /// Whether the pool is open.
    pub fn has_pool(&self, name: &PoolName) -> bool {
        self.pool(name).is_some()
    }

    /// Where the volume's copy is on this node.
    pub fn pool_of(&self, volume: VolumeId) -> Option<PoolName> {
        self.index().volumes.get(&volume).map(|place| place.pool.clone())
    }

    /// Where the snapshot is on this node.
    pub fn pool_of_snapshot(&self, snapshot: SnapshotId) -> Option<PoolName> {
        self.index().snapshots.get(&snapshot).map(|place| place.pool.clone())
    }

    /// All pools, also those that could not be opened.
    pub async fn list_pools(&self) -> Vec<PoolView> {
        let (pools, broken) = {
            let index = self.index();
            (index.pools.values().cloned().collect::<Vec<_>>(), index.broken_pools.clone())
        };
        let mut views = Vec::new();
        for pool in pools {
            views.push(self.view(&pool).await);
        }
        views.extend(broken.into_iter().map(|(name, BrokenPool { path, problem, .. })| PoolView {
            name,
            path,
            id: String::new(),
            capacity: 0,
            promised: 0,
            used: 0,
            free: 0,
            largest_volume: 0,
            overcommit: self.inner.settings.overcommit,
            filesystem: "",
            problem,
        }));
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    async fn view(&self, state: &Arc<PoolState>) -> PoolView {
        let broken = self.index().broken_trees_of(&state.pool.name);
        let state = state.clone();
        let fallback = state.clone();
        let made = tokio::task::spawn_blocking(move || state.view(&broken)).await;
        made.unwrap_or_else(|_| fallback.view("its figures could not be read"))
    }

    /// Empties the trash of a pool in a thread of its own.
    pub(super) fn empty_trash(&self, state: &Arc<PoolState>) {
        let state = state.clone();
        tokio::task::spawn_blocking(move || {
            let path = state.pool.path.join("trash");
            if let Err(error) = state.emptying.empty(&path) {
                tracing::warn!(path = %path.display(), %error, "the trash is emptied later");
            }
        });
    }
}

impl PoolState {
    /// Blocking.
    fn view(&self, problem: &str) -> PoolView {
        let space = self.pool.space();
        let (free, total) = space.as_ref().map_or((0, 0), |s| (s.free, s.total));
        let (capacity, promised) = (self.limit(), self.promises.total());
        let problem = match &space {
            Err(error) => format!("its filesystem does not answer: {error}"),
            Ok(_) if !problem.is_empty() => problem.to_owned(),
            Ok(_) if free < total / HIGH_WATER_SHARE => {
                format!("only {} MiB are free; delete volumes or snapshots, or add a larger pool", free >> 20)
            }
            Ok(_) => String::new(),
        };
        PoolView {
            name: self.pool.name.clone(),
            path: self.pool.source.clone(),
            id: self.pool.id.to_string(),
            capacity,
            promised,
            used: used_bytes(&self.pool.path),
            free,
            largest_volume: largest_volume(capacity.saturating_sub(promised)),
            overcommit: self.overcommit,
            filesystem: self.pool.filesystem.name(),
            problem,
        }
    }
}
