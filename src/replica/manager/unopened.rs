//! What is not known here because it may be in a pool or a copy that could not be opened.
//!
//! Invariant: an object is said not to be here only when no record beside a copy that is not open names it, and, where something
//! is to be deleted, no pool that is not open may have it. What a copy has followed without being told has no record: it may be in
//! every copy that is not open.

use super::{Manager, SnapshotFailure, VolumeFailure};
use crate::replica::pool::PoolName;
use crate::volume::{SnapshotId, VolumeId};
use std::collections::BTreeSet;

/// Nobody can say now.
#[derive(Debug, thiserror::Error)]
#[error(
    "it may be in pool {pool}, where this cannot be opened: {problem}; see `tandem pool list`, and repeat the call then"
)]
pub struct Unopened {
    pool: PoolName,
    problem: String,
}

/// A pool that is not open, or that has copies which are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnopenedView {
    /// Which.
    pub pool: PoolName,
    /// One sentence.
    pub problem: String,
}

impl Manager {
    /// Where something may be that is not known here.
    pub fn unopened(&self) -> Vec<UnopenedView> {
        let index = self.index();
        let pools = index.broken_pools.iter();
        let pools = pools.map(|(pool, broken)| UnopenedView { pool: pool.clone(), problem: broken.problem.clone() });
        let with_copies: BTreeSet<_> = index.broken_trees.values().map(|tree| &tree.pool).collect();
        let with_copies = with_copies.into_iter();
        let with_copies =
            with_copies.map(|pool| UnopenedView { pool: pool.clone(), problem: index.broken_trees_of(pool) });
        pools.chain(with_copies).collect()
    }

    /// As [`Self::delete_volume`], or [`Self::delete_unwritten`]; `pool` is where it is said to be, or empty.
    pub async fn ensure_no_volume(&self, volume: VolumeId, pool: &str, unwritten: bool) -> Result<(), VolumeFailure> {
        if self.place(volume).is_none() {
            self.all_open_for(&volume.to_string(), Some(pool)).await?;
        }
        if unwritten { self.delete_unwritten(volume).await } else { self.delete_volume(volume).await }
    }

    /// As [`Self::delete_snapshot`]; `pool` is where it is said to be, or empty; `mirrored`: copies here may have followed its
    /// seal.
    pub async fn ensure_no_snapshot(
        &self,
        snapshot: SnapshotId,
        pool: &str,
        mirrored: bool,
    ) -> Result<(), SnapshotFailure> {
        if self.snapshot_place(snapshot).is_none() {
            self.all_open_for(&snapshot.to_string(), Some(pool)).await?;
            let closed = if mirrored { self.closed_tree(pool).await } else { None };
            closed.map_or(Ok(()), Err)?;
        }
        self.delete_snapshot(snapshot).await
    }

    /// A volume or snapshot with this id is known here, or all is open in which it could be; `pool` is where it is said to be, or
    /// empty.
    pub async fn look_for(&self, id: &str, pool: &str) -> Result<(), Unopened> {
        let is_volume = id.parse::<VolumeId>().is_ok_and(|volume| self.place(volume).is_some());
        let is_known = is_volume || id.parse::<SnapshotId>().is_ok_and(|id| self.snapshot_place(id).is_some());
        if is_known { Ok(()) } else { self.all_open_for(id, Some(pool)).await }
    }

    /// A copy in this pool, or in any, into which nobody can look.
    async fn closed_tree(&self, pool: &str) -> Option<Unopened> {
        let trees = self.index().broken_trees.clone();
        for (tree, broken) in trees.into_iter().filter(|(_, tree)| pool.is_empty() || tree.pool.as_str() == pool) {
            // One that is left alone is open.
            if self.engine().inspect(tree, |_| ()).await.is_err() {
                return Some(Unopened { pool: broken.pool, problem: broken.problem });
            }
        }
        None
    }

    /// All is open in which something that is not known here could be; `record` is the name of its record, and `pool`, if that
    /// matters, where it is said to be, or empty for anywhere.
    pub async fn all_open_for(&self, record: &str, pool: Option<&str>) -> Result<(), Unopened> {
        let (closed, trees) = {
            let index = self.index();
            let mut pools = index.broken_pools.iter();
            let closed = pool.and_then(|pool| pools.find(|(name, _)| pool.is_empty() || name.as_str() == pool));
            let closed = closed.map(|(name, broken)| Unopened { pool: name.clone(), problem: broken.problem.clone() });
            (closed, index.broken_trees.clone())
        };
        if let Some(closed) = closed {
            return Err(closed);
        }
        let places: Vec<_> = trees
            .into_iter()
            .filter_map(|(tree, broken)| {
                let path = self.pool(&broken.pool)?.pool.tree(tree).join("records").join(record);
                Some((path, broken))
            })
            .collect();
        let found = tokio::task::spawn_blocking(move || places.into_iter().find(|(path, _)| path.exists()));
        match found.await {
            Ok(Some((_, broken))) => Err(Unopened { pool: broken.pool, problem: broken.problem }),
            Ok(None) | Err(_) => Ok(()),
        }
    }
}
