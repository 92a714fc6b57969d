//! What was deleted while a person took this node for gone: it goes now.
//!
//! Invariants: the list is in the node's own object, so that a copy goes because the catalogue says so; a name leaves it when
//! nothing of it is here any more, nor where this node cannot look now. What the catalogue has again, and wants, stays.

use super::local::{Common, Local};
use super::reconcile::Trouble;
use super::{Errand, Mirrors, Subject, Work};
use crate::catalog::{GivenUp, Node, Snapshot, Stored, Volume};
use crate::replica::manager::Manager;
use crate::volume::SnapshotId;

impl Mirrors {
    /// Removes what this node has given up, as far as it can now.
    pub(super) async fn forget_given_up(&mut self, manager: &Manager, work: &mut Work) -> Result<(), Trouble> {
        let catalog = self.common.settings.catalog.clone();
        let stored = catalog.get::<Node>(&self.common.settings.node.0).await?;
        let given_up = |stored: &Stored<Node>| !stored.object.removed && !stored.object.given_up.is_empty();
        let Some(mut stored) = stored.filter(given_up) else { return Ok(()) };
        let before = stored.object.given_up.clone();
        let GivenUp { volumes, snapshots } = std::mem::take(&mut stored.object.given_up);
        let mut failed = None;
        for volume in volumes {
            if let Err(error) = self.run_errand(manager, Errand::Forget(Subject::Volume(volume)), work).await {
                stored.object.given_up.volumes.insert(volume);
                failed = Some(error);
            }
        }
        for snapshot in snapshots {
            if let Err(error) = self.run_errand(manager, Errand::Forget(Subject::Snapshot(snapshot)), work).await {
                stored.object.given_up.snapshots.insert(snapshot);
                failed = Some(error);
            }
        }
        // A change wakes whoever watches the nodes, and this node again.
        if stored.object.given_up != before {
            catalog.update(stored).await?;
        }
        failed.map_or(Ok(()), Err)
    }
}

impl Common {
    pub(super) async fn forget_snapshot(&self, manager: &Manager, id: SnapshotId) -> Result<(), Trouble> {
        let _visit = self.pools.enter(manager.pool_of_snapshot(id))?;
        let stored = self.settings.catalog.get::<Snapshot>(&id.to_string()).await?;
        if stored.is_some_and(|stored| !stored.object.deleted) {
            return Ok(());
        }
        Ok(manager.ensure_no_snapshot(id, "", true).await?)
    }
}

impl Local {
    pub(super) async fn forget(&mut self, manager: &Manager) -> Result<(), Trouble> {
        let volume = self.volume;
        self.enter(manager.pool_of(volume))?;
        let stored = self.common.settings.catalog.get::<Volume>(&volume.to_string()).await?;
        if stored.is_some_and(|stored| !stored.object.spec.deleted) {
            tracing::warn!(%volume, "it was deleted while this node was taken for gone, and has come back since: it stays");
            return Ok(());
        }
        match manager.copy_here(volume) {
            Some(here) => self.take_away(manager, &here).await?,
            None => manager.ensure_no_volume(volume, "", false).await?,
        }
        tracing::info!(%volume, "it was deleted while this node was taken for gone");
        Ok(())
    }
}
