//! One mirrored volume on this node: what shall be, what is, and the next steps from one to the other.
//!
//! ```text
//!   wanted, not here   space, tree, record ─> confirmed in the catalogue ─> open
//!   wanted, the only   record: from now on it is one of several; then as below
//!   wanted and here    record, peers, size and settings follow the catalogue ─> confirmed ─> open
//!   not wanted, here   no member, or the volume is deleted ─> recorded as going ─> taken out of the catalogue ─> removed
//! ```

use super::OlderCatalogue;
use super::driver::{OpenError, Opened, Opening};
use super::local::{Crowded, Local};
use super::record::{CopyRecord, PeerRecord};
use crate::catalog::{
    Catalog, CatalogError, ConfigurationError, CopyReport, CopySpec, Descriptor, MirrorSpec, Stored, UpdateError,
    Volume, VolumePhase, VolumeSpec,
};
use crate::protocol::{Configuration, Record};
use crate::replica::engine::EngineError;
use crate::replica::manager::{AttachFailure, CopyHere, Manager, NewVolume, SnapshotFailure, Source, VolumeFailure};
use crate::replica::pool::{BadPoolName, PoolName};
use crate::volume::{InstanceId, VolumeId};

/// Why a volume is not yet as it shall be.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error(transparent)]
    Catalogue(#[from] CatalogError),
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    #[error(transparent)]
    Update(#[from] UpdateError),
    #[error(transparent)]
    Manager(#[from] VolumeFailure),
    #[error(transparent)]
    Snapshot(#[from] SnapshotFailure),
    #[error(transparent)]
    Device(#[from] AttachFailure),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Pool(#[from] BadPoolName),
    #[error("its copy waits for what was asked of its device before")]
    Opening,
    #[error(
        "what was begun for it takes long: the disk of its pool, or the catalogue, does not answer soon; others in that pool may \
         wait for it, and volumes in other pools go on"
    )]
    UnderWay,
    #[error(transparent)]
    Crowded(#[from] Crowded),
    #[error("the catalogue has no configuration of it yet: if it was lost, use `tandem recover`")]
    NoConfiguration,
    #[error(transparent)]
    Older(#[from] OlderCatalogue),
    #[error("the record beside its copy is damaged ({0}): `tandem verify` shows it")]
    Record(#[from] serde_json::Error),
}

impl Local {
    /// Makes the next steps for the volume; all of them unless something fails.
    pub(super) async fn reconcile(&mut self, manager: &Manager) -> Result<(), Trouble> {
        let id = self.volume;
        if let Some(pool) = manager.pool_of(id) {
            self.enter(Some(pool))?;
        }
        let mut here = manager.copy_here(id);
        if let Some(gone) = here.take_if(|here| CopyRecord::decode(&here.record).is_ok_and(|r| r.removing)) {
            self.finish_removal(manager, &gone).await?;
        }
        let catalog = self.common.settings.catalog.clone();
        let Some(stored) = catalog.get::<Volume>(&id.to_string()).await? else {
            if let Some(here) = here {
                tracing::warn!(volume = %id, copy = %here.tree, "the catalogue does not know the volume of a copy on this node: it is kept, use `tandem recover`");
            }
            return self.forget_client(manager, id).await;
        };
        let Some(mirror) = stored.object.spec.mirror.clone() else { return Ok(()) };
        if manager.sole_tree(id).is_some_and(|tree| self.is_ours(&mirror, tree)) {
            manager.join_mirror(id, CopyRecord::default().encode()).await?;
            here = manager.copy_here(id);
        }
        let left = self.follow_left_device(manager, id).await;
        // What is wrong with a device that waits keeps nobody from the copies; it is looked at again with them.
        self.follow_spec(manager, stored, &mirror, here).await.and(left)
    }

    async fn follow_spec(
        &mut self,
        manager: &Manager,
        stored: Stored<Volume>,
        mirror: &MirrorSpec,
        here: Option<CopyHere>,
    ) -> Result<(), Trouble> {
        let (id, catalog) = (stored.object.id, self.common.settings.catalog.clone());
        self.reconcile_client(manager, &stored.object).await?;
        let deleted = stored.object.spec.deleted;
        let wanted = mirror.copies_on(&self.common.settings.node).next().filter(|_| !deleted);
        // As long as it is used here without a copy, none is made.
        let wanted = wanted.filter(|_| manager.publication(id).is_none());
        let wanted = wanted.map(|(copy, spec)| (copy, spec.clone()));
        if here.is_some() && manager.publication(id).is_some() {
            // Never removed for that: its device goes first.
            return Ok(());
        }
        match (wanted, here) {
            (None, None) if deleted => self.unconfirm_all(stored, mirror).await,
            (None, None) => Ok(()),
            (Some((copy, _)), Some(here)) if here.tree == copy => self.keep(manager, stored, &here).await,
            (Some((copy, spec)), None) => self.make(manager, stored, copy, &spec).await,
            (wanted, Some(here)) => {
                self.remove(manager, &stored.object, &here).await?;
                // Another one comes after it.
                match (wanted, manager.copy_here(id), catalog.get::<Volume>(&id.to_string()).await?) {
                    (Some((copy, spec)), None, Some(stored)) => self.make(manager, stored, copy, &spec).await,
                    _ => Ok(()),
                }
            }
        }
    }

    fn is_ours(&self, mirror: &MirrorSpec, copy: InstanceId) -> bool {
        mirror.copies.get(&copy).is_some_and(|spec| spec.node == self.common.settings.node)
    }

    /// The configuration in the catalogue, if that is not older than the copy on this node.
    pub(super) async fn committed(&self, manager: &Manager, volume: VolumeId) -> Result<Configuration, Trouble> {
        // Before the catalogue is read: what becomes durable meanwhile may be newer.
        let here = manager.durable_record(volume).await.map(|record| record.configuration.stamp);
        let found = self.common.settings.catalog.configuration(volume).await?.ok_or(Trouble::NoConfiguration)?;
        OlderCatalogue::check(found.stamp, here)?;
        Ok(found)
    }

    /// Makes a copy: empty, or a clone.
    async fn make(
        &mut self,
        manager: &Manager,
        stored: Stored<Volume>,
        copy: InstanceId,
        spec: &CopySpec,
    ) -> Result<(), Trouble> {
        let volume = &stored.object;
        let pool: PoolName = spec.pool.parse()?;
        if !manager.has_pool(&pool) {
            // Its copy may be there: a pool whose mount is missing comes back with `tandem pool add`.
            return Err(VolumeFailure::NoPool(pool).into());
        }
        if volume.status.copies.contains(&copy) {
            tracing::error!(volume = %volume.id, %copy, "this node's copy is gone with what it held: give the volume another one");
            return Ok(());
        }
        self.enter(Some(pool.clone()))?;
        let configuration = self.committed(manager, volume.id).await?;
        let record = self.record_of(volume, copy, &configuration, &CopyRecord::default());
        let base = volume.spec.base.as_ref().filter(|base| base.clones.contains(&copy));
        let new = NewVolume {
            volume: volume.id,
            pool,
            size: volume.spec.size,
            descriptor: Descriptor::of(volume).encode(),
            verify_reads: volume.spec.verify_reads,
            source: base.map_or(Source::Blank, |base| Source::Snapshot(base.snapshot)),
        };
        manager.ensure_copy(new, copy, record.encode()).await?;
        let Some(here) = manager.copy_here(volume.id) else { return Ok(()) };
        self.keep(manager, stored, &here).await
    }

    /// The copy is here and shall be.
    async fn keep(&mut self, manager: &Manager, stored: Stored<Volume>, here: &CopyHere) -> Result<(), Trouble> {
        let (volume, copy) = (stored.object.id, here.tree);
        let configuration = self.committed(manager, volume).await?;
        let before = CopyRecord::decode(&here.record)?;
        let record = self.record_of(&stored.object, copy, &configuration, &before);
        if record != before {
            manager.write_copy_record(volume, record.encode()).await?;
        }
        let client = stored.object.spec.mirror.as_ref().map(|mirror| self.client_of(mirror)).unwrap_or_default();
        let size = record.size.unwrap_or(stored.object.status.size);
        let report = follow(manager, volume, &stored.object.spec).await?;
        if let Some(descriptor) = renewed(&here.descriptor, &stored.object) {
            manager.modify_volume(volume, None, Some(descriptor.encode())).await?;
        }
        confirm(&self.common.settings.catalog, stored, copy, report).await?;
        if self.driver.is_none() {
            // Until it has a record of its own it has never acted, and nobody could count on it without its answer.
            let first = Record { intact: configuration.is_member(copy), configuration };
            let opening = Opening { volume, tree: copy, memory: self.common.memory(copy), size: record.size, first };
            let begin = || Opened::begin(&self.common.settings, manager, opening);
            let mut opened = self.opening.take().unwrap_or_else(begin);
            let Some(driver) = opened.soon().await else {
                self.opening = Some(opened);
                return Err(Trouble::Opening);
            };
            self.driver = Some(driver?);
        }
        if let Some(driver) = &mut self.driver {
            let mut peers = record.parties(&self.common.settings.node);
            peers.extend(client);
            driver.set_peers(&peers);
            driver.set_size(manager, size).await?;
            manager.offer_seal(volume, driver.reserve()).await?;
            driver.look();
        }
        Ok(())
    }

    /// The other copies: those that the spec names, and those that the configuration still does.
    fn record_of(
        &self,
        volume: &Volume,
        copy: InstanceId,
        configuration: &Configuration,
        before: &CopyRecord,
    ) -> CopyRecord {
        let mut peers = before.peers.clone();
        peers.retain(|peer, _| configuration.copies().any(|named| named == *peer));
        for (peer, spec) in volume.spec.mirror.iter().flat_map(|mirror| &mirror.copies) {
            peers.entry(*peer).or_insert_with(|| PeerRecord { node: spec.node.clone(), address: None });
        }
        peers.remove(&copy);
        for peer in peers.values_mut() {
            // A node that the catalogue does not name now is called where it was.
            peer.address = self.common.addresses.get(&peer.node).copied().or(peer.address);
        }
        CopyRecord { peers, removing: false, size: before.size.max(Some(volume.status.size)) }
    }

    /// The copy is here and shall not be.
    async fn remove(&mut self, manager: &Manager, wanted: &Volume, here: &CopyHere) -> Result<(), Trouble> {
        let (volume, deleted) = (wanted.id, wanted.spec.deleted);
        if !deleted {
            if self.committed(manager, volume).await?.is_member(here.tree) {
                // Its primary drops it first; the change of the configuration brings this here again.
                if let Some(driver) = &self.driver {
                    driver.look();
                }
                return Ok(());
            }
        } else if manager.durable_record(volume).await.is_some() {
            // A catalogue that is older than the copy removes nothing; of a volume that is deleted it has the configuration to
            // the end. A copy that has never acted has nothing to lose.
            self.committed(manager, volume).await?;
        }
        // Whoever deletes what he knows says that it was made. A clone has something from the beginning.
        let is_unknown = wanted.status.phase == VolumePhase::Creating && wanted.spec.base.is_none();
        if deleted && is_unknown && manager.copy_info(volume).await?.written {
            return Err(VolumeFailure::Written(volume).into());
        }
        self.take_away(manager, here).await
    }

    /// From now on it is decided that the copy goes.
    pub(super) async fn take_away(&mut self, manager: &Manager, here: &CopyHere) -> Result<(), Trouble> {
        if here.attached {
            return Err(VolumeFailure::Attached(here.volume).into());
        }
        let record = CopyRecord { removing: true, ..CopyRecord::decode(&here.record).unwrap_or_default() };
        manager.write_copy_record(here.volume, record.encode()).await?;
        self.finish_removal(manager, here).await
    }

    /// Nobody can want it back: the record beside it says that it goes.
    async fn finish_removal(&mut self, manager: &Manager, here: &CopyHere) -> Result<(), Trouble> {
        // Its name in the catalogue goes first: when its volume is gone there, nobody would take it out.
        if let Some(stored) = self.common.settings.catalog.get::<Volume>(&here.volume.to_string()).await? {
            unconfirm(&self.common.settings.catalog, stored, |copy| copy == here.tree).await?;
        }
        manager.close_copy(here.volume).await?;
        (self.opening, self.driver) = (None, None);
        manager.delete_copy(here.volume).await?;
        tracing::info!(volume = %here.volume, copy = %here.tree, "a copy was removed");
        Ok(())
    }

    /// A deleted volume of which nothing is here.
    async fn unconfirm_all(&self, stored: Stored<Volume>, mirror: &MirrorSpec) -> Result<(), Trouble> {
        unconfirm(&self.common.settings.catalog, stored, |copy| self.is_ours(mirror, copy)).await
    }
}

/// Gives the copy the size and the settings that are wanted, and says what it has.
async fn follow(manager: &Manager, volume: VolumeId, wanted: &VolumeSpec) -> Result<CopyReport, Trouble> {
    let mut info = manager.copy_info(volume).await?;
    let mut refused = None;
    if info.size < wanted.size {
        match manager.grow_copy(volume, wanted.size).await {
            Ok(()) => info.size = wanted.size,
            Err(error @ VolumeFailure::PoolFull { .. }) => refused = Some(error.to_string()),
            Err(error) => return Err(error.into()),
        }
    }
    if info.verify_reads != wanted.verify_reads {
        manager.modify_volume(volume, Some(wanted.verify_reads), None).await?;
    }
    Ok(CopyReport { size: info.size, verify_reads: wanted.verify_reads, refused })
}

/// What shall lie beside the copy, if what does is not what is wanted now. One that says something else altogether stays.
fn renewed(there: &str, volume: &Volume) -> Option<Descriptor> {
    let (now, there) = (Descriptor::of(volume), Descriptor::decode(there)?);
    let is_its = matches!(&there, Descriptor::Volume { request, .. } if *request == volume.request);
    (is_its && there != now).then_some(now)
}

/// The catalogue says that the copy is durably on its node, and what it is.
async fn confirm(
    catalog: &Catalog,
    mut stored: Stored<Volume>,
    copy: InstanceId,
    report: CopyReport,
) -> Result<(), Trouble> {
    let status = &mut stored.object.status;
    let is_new = status.copies.insert(copy);
    if status.reports.insert(copy, report.clone()) != Some(report) || is_new {
        catalog.update(stored).await?;
    }
    Ok(())
}

async fn unconfirm(
    catalog: &Catalog,
    mut stored: Stored<Volume>,
    gone: impl Fn(InstanceId) -> bool,
) -> Result<(), Trouble> {
    let status = &mut stored.object.status;
    let before = (status.copies.len(), status.reports.len());
    status.copies.retain(|copy| !gone(*copy));
    status.reports.retain(|copy, _| !gone(*copy));
    if (status.copies.len(), status.reports.len()) != before {
        catalog.update(stored).await?;
    }
    Ok(())
}
