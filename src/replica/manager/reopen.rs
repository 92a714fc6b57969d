//! What could not be opened is tried again by itself: a pool that was read-only or in use, a copy whose pool was full.
//!
//! # Invariants
//! * What is damaged, or gone, is never tried again without a person.
//! * One task does it, only while there is something for it to do, and it keeps nothing alive.

use super::{Index, Manager, PoolState};
use crate::replica::pool::{Pool, PoolName};
use crate::volume::InstanceId;
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Pauses between two attempts: somebody may be waiting for a device, and an attempt reads the map of a copy.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(15);

impl Index {
    fn waits_to_be_opened(&self) -> bool {
        self.broken_pools.values().any(|pool| pool.retried) || self.broken_trees.values().any(|tree| tree.retried)
    }
}

impl Manager {
    /// To be called when something could not be opened.
    pub(super) fn keep_trying(&self) {
        {
            let mut index = self.index();
            if index.retrying || !index.waits_to_be_opened() {
                return;
            }
            index.retrying = true;
        }
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
                let Some(inner) = inner.upgrade() else { return };
                let manager = Self { inner };
                manager.try_again().await;
                let mut index = manager.index();
                if !index.waits_to_be_opened() {
                    index.retrying = false;
                    return;
                }
            }
        });
    }

    async fn try_again(&self) {
        let pools: Vec<_> = {
            let index = self.index();
            let retried = index.broken_pools.iter().filter(|(_, pool)| pool.retried);
            retried.map(|(name, pool)| (name.clone(), pool.path.clone())).collect()
        };
        for (name, path) in pools {
            self.open_pool_again(name, path).await;
        }
        let trees: Vec<_> = {
            let index = self.index();
            let retried = index.broken_trees.iter().filter(|(_, tree)| tree.retried);
            retried.map(|(tree, broken)| (*tree, broken.pool.clone())).collect()
        };
        for (tree, pool) in trees {
            if let Some(state) = self.pool(&pool) {
                self.open_tree_again(&state, tree).await;
            }
        }
    }

    async fn open_pool_again(&self, name: PoolName, path: PathBuf) {
        let Ok(_guard) = self.begin_pools().await else { return };
        if self.pool(&name).is_some() {
            return;
        }
        let (settings, wanted) = (self.inner.settings.clone(), name.clone());
        let opened = tokio::task::spawn_blocking(move || -> Result<Pool, (String, bool)> {
            let listed = |error: io::Error| (format!("the list of pools: {error}"), true);
            let mut list = super::pools::PoolList::read(&settings.dir).map_err(listed)?;
            let pool = Pool::open(wanted.clone(), &path, &settings.dir.join("pools"), list.expected(&wanted));
            let pool = pool.map_err(|error| (error.to_string(), !error.is_gone()))?;
            if list.note(&pool) {
                list.write(&settings.dir).map_err(listed)?;
            }
            Ok(pool)
        });
        match opened.await {
            Ok(Ok(pool)) => {
                self.take_in(pool).await;
                tracing::info!(pool = %name, "a pool that could not be opened is used again");
            }
            Ok(Err((problem, retried))) => {
                if let Some(broken) = self.index().broken_pools.get_mut(&name) {
                    (broken.problem, broken.retried) = (problem, retried);
                }
            }
            Err(error) => tracing::warn!(pool = %name, %error, "a pool is tried again later"),
        }
    }

    async fn open_tree_again(&self, state: &Arc<PoolState>, tree: InstanceId) {
        {
            let Ok(_guard) = self.inner.operations.begin(vec![tree.to_bytes()]).await else { return };
            if let Ok(opened) = tokio::task::spawn_blocking(self.opening(state, tree)).await {
                self.adopt(state, tree, opened).await;
            }
        }
        if !self.index().broken_trees.contains_key(&tree) {
            tracing::info!(%tree, "a copy that could not be opened is used again");
            self.clean_up(state, &BTreeSet::from([tree])).await;
            self.copies_came();
        }
    }
}
