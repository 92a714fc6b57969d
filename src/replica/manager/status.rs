//! What a volume is and how it does.

use super::record::RecordView;
use super::standing::{self, MirrorView};
use super::{CopyState, HIGH_WATER_SHARE, Manager, VolumeFailure, VolumePlace};
use crate::replica::engine::{EngineStatus, VolumeHealth};
use crate::store::VolumeInfo;
use crate::store::verify::VerifyPlan;
use crate::volume::{BLOCK_SIZE, InstanceId, VolumeId, VolumeSize};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;

/// A volume with everything that is known of it; sizes in bytes.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "named and explained in control.proto")]
pub struct VolumeView {
    pub volume: VolumeId,
    pub tree: InstanceId,
    pub pool: String,
    pub size: u64,
    pub copy: Option<CopyProgress>,
    pub allocated: u64,
    pub device: Option<PathBuf>,
    pub descriptor: String,
    pub verify_reads: bool,
    pub health: Vec<HealthEntry>,
    pub layers: u32,
    pub written: bool,
    pub unchecked: u64,
    pub merging_layers: u64,
    pub mirror: Option<MirrorView>,
    pub record: Option<RecordView>,
}

/// How far a background copy is, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct CopyProgress {
    /// Copied so far.
    pub copied: u64,
    /// To copy.
    pub total: u64,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthKind {
    /// Works, but not as promised.
    Degraded,
    /// Requests wait or fail.
    Inaccessible,
    /// Damaged blocks were found.
    DataLoss,
}

/// Something that a person should know.
#[derive(Clone, Debug)]
pub struct HealthEntry {
    /// How bad.
    pub kind: HealthKind,
    /// CamelCase, one word.
    pub reason: &'static str,
    /// What happened and what to do.
    pub message: String,
}

impl Manager {
    /// One volume; `None` if it is not on this node.
    pub async fn volume(&self, volume: VolumeId) -> Option<VolumeView> {
        let Some(place) = self.place(volume) else { return self.view_client(volume).await };
        let info = self.volume_info(place.tree, volume).await;
        let low = self.low_pools().await;
        Some(self.view_volume(volume, place, info, &low).await)
    }

    /// All volumes, by id.
    pub async fn volumes(&self) -> Vec<VolumeView> {
        let places: Vec<_> = self.index().volumes.iter().map(|(v, p)| (*v, p.clone())).collect();
        let low = self.low_pools().await;
        let mut infos: BTreeMap<InstanceId, Vec<VolumeInfo>> = BTreeMap::new();
        let mut views = Vec::with_capacity(places.len());
        for (volume, place) in places {
            if let Entry::Vacant(vacant) = infos.entry(place.tree) {
                let read = self.engine().inspect(place.tree, |store| store.volumes()).await;
                vacant.insert(read.unwrap_or_default());
            }
            let info = infos.get(&place.tree).and_then(|all| all.iter().find(|i| i.volume == volume)).cloned();
            views.push(self.view_volume(volume, place, info, &low).await);
        }
        views
    }

    async fn view_volume(
        &self,
        volume: VolumeId,
        place: VolumePlace,
        info: Option<VolumeInfo>,
        low: &BTreeMap<String, u64>,
    ) -> VolumeView {
        let backlog = self.engine().inspect(place.tree, |store| store.backlog()).await.unwrap_or_default();
        let pool = place.pool.to_string();
        let mut health = entries(volume, &pool, self.engine().health(volume));
        if let Some(free) = low.get(&pool) {
            let message =
                format!("pool {pool} has only {} MiB free; delete volumes or snapshots, or add a pool", free >> 20);
            health.push(HealthEntry { kind: HealthKind::Degraded, reason: "PoolAlmostFull", message });
        }
        if let Some(CopyState { problem: Some(problem), .. }) = &place.copy {
            let message = format!("the background copy of volume {volume} fails and is tried again: {problem}");
            health.push(HealthEntry { kind: HealthKind::Degraded, reason: "CopyFailed", message });
        }
        let mirror = self.mirror_view(volume, &place).await;
        match &mirror {
            Some(mirror) => health.extend(mirror.health(volume)),
            None if place.mirror.is_some() => health.push(standing::not_open(volume)),
            None => {}
        }
        let record = self.record_view(volume, &place).await;
        let served = mirror.as_ref().map(|mirror| mirror.size);
        let copying_size = place.copy.as_ref().map(|copy| copy.size);
        let size = served.or(info.as_ref().map(|i| i.size)).or(copying_size);
        VolumeView {
            volume,
            tree: place.tree,
            pool,
            size: size.map_or(0, VolumeSize::bytes),
            copy: place.copy.map(|c| CopyProgress { copied: c.copied_bytes, total: c.total_bytes }),
            allocated: info.as_ref().map_or(0, |i| i.allocated_blocks * BLOCK_SIZE),
            device: place.device,
            descriptor: place.descriptor,
            verify_reads: info.as_ref().is_some_and(|i| i.verify_reads),
            health,
            layers: info.as_ref().map_or(0, |i| i.layers),
            // Of what cannot be read nobody knows.
            written: info.as_ref().is_none_or(|i| i.written),
            unchecked: backlog.unchecked_blocks * BLOCK_SIZE,
            merging_layers: u64::from(backlog.merging_layers),
            mirror,
            record,
        }
    }

    /// The engine's own figures.
    pub fn engine_status(&self) -> EngineStatus {
        self.engine().status()
    }

    /// Where the volume's copy is, and what of it can be checked.
    pub async fn verify_plan(&self, volume: VolumeId) -> Result<(PathBuf, VerifyPlan), VolumeFailure> {
        let place = self.place(volume).ok_or(VolumeFailure::NoVolume(volume))?;
        let pool = self.pool(&place.pool).ok_or_else(|| VolumeFailure::NoPool(place.pool.clone()))?;
        let plan = self.engine().inspect(place.tree, move |store| store.verify_plan(volume)).await;
        let plan = plan.map_err(|error| VolumeFailure::Engine { volume, error })?;
        Ok((pool.pool.tree(place.tree), plan.map_err(|_| VolumeFailure::NoVolume(volume))?))
    }

    /// Pools below the high-water mark, with what is free in bytes.
    async fn low_pools(&self) -> BTreeMap<String, u64> {
        let pools: Vec<_> = self.index().pools.values().cloned().collect();
        let read = tokio::task::spawn_blocking(move || {
            let spaces = pools.iter().filter_map(|p| p.pool.space().ok().map(|s| (p.pool.name.to_string(), s)));
            spaces.filter(|(_, s)| s.free < s.total / HIGH_WATER_SHARE).map(|(name, s)| (name, s.free)).collect()
        });
        read.await.unwrap_or_default()
    }
}

fn entries(volume: VolumeId, pool: &str, found: VolumeHealth) -> Vec<HealthEntry> {
    let mut entries = Vec::new();
    if found.waiting_for_space {
        let message = format!(
            "writes of volume {volume} wait: pool {pool} is full. Delete volumes or snapshots, or free space in its \
             filesystem; they go on by themselves"
        );
        entries.push(HealthEntry { kind: HealthKind::Inaccessible, reason: "PoolFull", message });
    }
    if found.disk_failed {
        let message = format!("the disk under pool {pool} failed a request of volume {volume}; see the kernel log");
        entries.push(HealthEntry { kind: HealthKind::Inaccessible, reason: "DiskFailed", message });
    }
    if found.corrupt {
        let message =
            format!("damaged blocks were read from volume {volume}; run `tandem verify {volume}`, then restore");
        entries.push(HealthEntry { kind: HealthKind::DataLoss, reason: "DamagedBlocks", message });
    }
    entries
}
