//! What a mirrored volume has on this node, and how many volumes may be at the disk of one pool.
//!
//! # Invariants
//! * Whoever works on a volume owns this of it; nobody else has it meanwhile.
//! * What may wait for a pool's disk begins with [`Local::enter`].

use super::MirrorSettings;
use super::client::ClientDriver;
use super::driver::{Driver, Opened};
use crate::catalog::NodeName;
use crate::protocol::Memory;
use crate::replica::pool::PoolName;
use crate::volume::{InstanceId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Volumes and snapshots for which something is under way at the disk of one pool. If that hangs, each keeps one of the
/// runtime's 512 threads for what blocks: a node with a dozen such pools still has threads for the others. And one that is only
/// slow does not hold up the rest of its pool.
pub(super) const MOST_AT_A_POOL: usize = 16;

/// So many are at the disk of the pool that no more are let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it waits for others of its pool: for those, its disk or the catalogue does not answer soon")]
pub(super) struct Crowded;

/// Who is at which pool's disk; `None`: it is not known at which one.
#[derive(Clone, Debug, Default)]
pub(super) struct Pools(Arc<Mutex<BTreeMap<Option<PoolName>, usize>>>);

/// One of them, until this is dropped.
#[derive(Debug)]
pub(super) struct Visit {
    pools: Pools,
    pool: Option<PoolName>,
}

impl Pools {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Option<PoolName>, usize>> {
        // Counts are whole between any two calls, so a poisoned lock is still usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn enter(&self, pool: Option<PoolName>) -> Result<Visit, Crowded> {
        let mut all = self.lock();
        let visitors = all.entry(pool.clone()).or_default();
        if *visitors >= MOST_AT_A_POOL {
            return Err(Crowded);
        }
        *visitors += 1;
        Ok(Visit { pools: self.clone(), pool })
    }

    /// Whether anybody is at its disk.
    pub fn is_visited(&self, pool: Option<PoolName>) -> bool {
        self.lock().contains_key(&pool)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut all = self.pools.lock();
        if let Some(visitors) = all.get_mut(&self.pool) {
            *visitors -= 1;
            if *visitors == 0 {
                all.remove(&self.pool);
            }
        }
    }
}

/// What all volumes have in common.
#[derive(Clone)]
pub(super) struct Common {
    pub settings: Arc<MirrorSettings>,
    /// Trees of which the node's caches have everything: an engine of this boot has left them to the holder.
    pub kept: Arc<BTreeSet<InstanceId>>,
    /// Where nodes are reached; as the catalogue said last, which is good enough to call them.
    pub addresses: Arc<BTreeMap<NodeName, SocketAddr>>,
    pub pools: Pools,
}

impl Common {
    pub fn memory(&self, tree: InstanceId) -> Memory {
        if self.kept.contains(&tree) { Memory::Kept } else { Memory::Lost }
    }
}

/// See the module.
pub(super) struct Local {
    pub common: Common,
    pub volume: VolumeId,
    /// Of its copy, while that is open.
    pub driver: Option<Driver>,
    /// While it is used here without a copy.
    pub client: Option<ClientDriver>,
    /// While its copy is being opened: a volume that is in use first ends what it has begun, which may wait for space.
    pub opening: Option<Opened>,
    visit: Option<Visit>,
}

impl Local {
    pub fn new(common: Common, volume: VolumeId) -> Self {
        Self { common, volume, driver: None, client: None, opening: None, visit: None }
    }

    /// From now on it may wait for this pool's disk, until [`Self::leave`].
    pub fn enter(&mut self, pool: Option<PoolName>) -> Result<(), Crowded> {
        if self.visit.as_ref().is_none_or(|visit| visit.pool != pool) {
            self.visit = None;
            self.visit = Some(self.common.pools.enter(pool)?);
        }
        Ok(())
    }

    /// It waits for no disk any more.
    pub fn leave(&mut self) {
        self.visit = None;
    }

    /// Whether there is something to keep of it.
    pub fn has_any(&self) -> bool {
        self.driver.is_some() || self.client.is_some() || self.opening.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_that_is_crowded_lets_nobody_in_and_another_one_does() {
        let (pools, of) = (Pools::default(), |name: &str| Some(name.parse::<PoolName>().expect("a name")));
        let mut visits: Vec<_> = (0..MOST_AT_A_POOL).map(|_| pools.enter(of("hangs")).expect("room")).collect();
        assert_eq!(pools.enter(of("hangs")).err(), Some(Crowded));
        assert!(pools.is_visited(of("hangs")) && !pools.is_visited(of("well")) && !pools.is_visited(None));
        drop(pools.enter(of("well")).expect("nobody is there"));
        visits.pop();
        drop(pools.enter(of("hangs")).expect("one has left"));
        visits.clear();
        assert!(!pools.is_visited(of("hangs")));
    }
}
