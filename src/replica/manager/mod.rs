//! Makes true what the controller asks for: volumes, snapshots and devices on this node's pools.
//!
//! ```text
//!   control socket ─> service.rs ─> Manager ─┬─> pools, promises, records     (what is promised and written beside copies)
//!                                            └─> EngineHandle ─> owner thread  (maps, devices, I/O)
//! ```
//! # Invariants
//! * A byte is promised before anything is made ([`Promises`]); the promise follows what the store says afterwards.
//! * Every operation is idempotent by id and converges when it is repeated after a crash at any step: the map log of the
//!   tree is the truth, the index here is only read off it.
//! * One operation at a time per object ([`Operations`]).

use super::engine::EngineHandle;
use super::operations::Operations;
use super::pool::{Pool, PoolName, Promises, trash, used_bytes};
use crate::store::{SnapshotInfo, VolumeInfo, spare_blocks};
use crate::volume::{BLOCK_SIZE, InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod attach;
mod change;
mod client;
mod clones;
mod copy;
mod errors;
mod fill;
mod follow;
mod left;
mod measure;
mod mirror;
mod open;
mod pools;
mod record;
mod reopen;
mod snapshots;
mod standing;
mod status;
mod unopened;
mod volumes;

pub use errors::{AttachFailure, FillFailure, PoolFailure, SnapshotFailure, VolumeFailure};
pub use fill::{Begun, Fill, NewFill, Reading};
pub use mirror::CopyHere;
pub use open::{OpenFailure, OpenSettings};
pub use pools::{AddPool, PoolView};
pub use record::RecordView;
pub use snapshots::{Copies, ExtentStream, NewSnapshot, SnapshotView};
pub use standing::{CopyView, MirrorView};
pub use status::{HealthEntry, HealthKind, VolumeView};
pub use unopened::UnopenedView;
pub use volumes::{NewVolume, Source};

/// Space of a tree beside its blocks: two map logs of 4 MiB each, superblock, records, 1 MiB for names in each of two checkpoints.
const TREE_OVERHEAD_BYTES: u64 = 12 << 20;
/// Map, the next one (src/store/space.rs), and checksums of a block at rest: 16 + 16 + 4 bytes in the worst case, rounded up to a 112th.
const OVERHEAD_SHARE: u64 = 112;
/// Part of the filesystem that is never promised (a 50th): its own metadata and the page of an unlucky neighbour.
const HEADROOM_SHARE: u64 = 50;
/// Below a 20th of free space a pool is reported as nearly full.
const HIGH_WATER_SHARE: u64 = 20;

/// An open pool with its promises.
pub(super) struct PoolState {
    pub pool: Pool,
    /// Of all pools on the same filesystem: what is free there can be promised once.
    pub promises: Promises,
    /// Where those pools are, this one among them.
    neighbours: Arc<Mutex<BTreeSet<PathBuf>>>,
    pub overcommit: f64,
    pub emptying: trash::Emptying,
}

/// A pool that could not be opened.
#[derive(Clone, Debug)]
pub(super) struct BrokenPool {
    pub path: PathBuf,
    /// The sentence that says why.
    pub problem: String,
    /// It is tried again by itself.
    pub retried: bool,
}

/// A copy that could not be opened, or must not be used.
#[derive(Clone, Debug)]
pub(super) struct BrokenTree {
    pub pool: PoolName,
    /// The sentence that says why.
    pub problem: String,
    /// It is tried again by itself.
    pub retried: bool,
}

/// Where a volume is.
#[derive(Clone, Debug)]
pub(super) struct VolumePlace {
    pub pool: PoolName,
    pub tree: InstanceId,
    pub descriptor: String,
    /// The device, while it is attached.
    pub device: Option<PathBuf>,
    /// Under way, or failed with a reason.
    pub copy: Option<CopyState>,
    /// It is one copy of several.
    pub mirror: Option<mirror::MirrorPlace>,
}

/// A volume that is used here without a copy.
#[derive(Clone, Debug)]
pub(super) struct ClientPlace {
    pub publication: InstanceId,
    pub descriptor: String,
    pub size: VolumeSize,
    /// Not while an ended one is replaced.
    pub open: bool,
}

/// A background copy into this volume.
#[derive(Clone, Debug)]
pub(super) struct CopyState {
    /// Of the volume: its store is not open meanwhile.
    pub size: VolumeSize,
    pub copied_bytes: u64,
    pub total_bytes: u64,
    pub problem: Option<String>,
}

/// Where a snapshot is.
#[derive(Clone, Debug)]
pub(super) struct SnapshotPlace {
    pub pool: PoolName,
    pub tree: InstanceId,
    pub descriptor: String,
    /// Internal: see [`volumes::base_of`].
    pub base: bool,
}

/// What is where. Read off the trees at start, changed only after the store's word.
#[derive(Default)]
pub(super) struct Index {
    pub pools: BTreeMap<PoolName, Arc<PoolState>>,
    pub broken_pools: BTreeMap<PoolName, BrokenPool>,
    pub volumes: BTreeMap<VolumeId, VolumePlace>,
    pub clients: BTreeMap<VolumeId, ClientPlace>,
    /// Devices that a killed engine left, with their copy or publication; not those that were taken up since.
    pub held_devices: BTreeMap<VolumeId, InstanceId>,
    /// Of those whose copy is not open, volumes that have other copies, as the catalogue said last.
    pub with_others: BTreeSet<VolumeId>,
    pub snapshots: BTreeMap<SnapshotId, SnapshotPlace>,
    /// Those that are being brought over from other nodes, and what is left of attempts to.
    pub fills: BTreeMap<SnapshotId, fill::FillPlace>,
    pub broken_trees: BTreeMap<InstanceId, BrokenTree>,
    /// A task tries again what could not be opened.
    pub retrying: bool,
    /// Trees whose promise is looked at again while layers are merged, and how often that was asked for.
    pub merging: BTreeMap<InstanceId, u64>,
}

/// The manager; cheap to clone.
#[derive(Clone)]
pub struct Manager {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    engine: EngineHandle,
    index: Mutex<Index>,
    operations: Operations,
    settings: OpenSettings,
    /// What an earlier engine has acknowledged and not logged, of trees that are not open: for when they are.
    held: Mutex<BTreeMap<InstanceId, OwnedFd>>,
    clients_changed: tokio::sync::Notify,
}

impl Manager {
    fn index(&self) -> MutexGuard<'_, Index> {
        // Changes of the index are single inserts and removes, so a poisoned lock is still usable.
        self.inner.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<InstanceId, OwnedFd>> {
        self.inner.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn engine(&self) -> &EngineHandle {
        &self.inner.engine
    }

    fn pool(&self, name: &PoolName) -> Option<Arc<PoolState>> {
        self.index().pools.get(name).cloned()
    }

    fn place(&self, volume: VolumeId) -> Option<VolumePlace> {
        self.index().volumes.get(&volume).cloned()
    }

    fn snapshot_place(&self, snapshot: SnapshotId) -> Option<SnapshotPlace> {
        self.index().snapshots.get(&snapshot).cloned()
    }

    async fn volume_info(&self, tree: InstanceId, volume: VolumeId) -> Option<VolumeInfo> {
        let all = self.engine().inspect(tree, |store| store.volumes()).await.ok()?;
        all.into_iter().find(|v| v.volume == volume)
    }

    async fn snapshot_info(&self, tree: InstanceId, snapshot: SnapshotId) -> Option<SnapshotInfo> {
        let all = self.engine().inspect(tree, |store| store.snapshots()).await.ok()?;
        all.into_iter().find(|s| s.snapshot == snapshot)
    }

    /// Takes the tree's own figure as its promise. Called after every operation that changes it.
    async fn promised_bytes(&self, tree: InstanceId) -> u64 {
        match self.engine().inspect(tree, |store| store.promised_blocks()).await {
            Ok(blocks) => with_overhead(blocks * BLOCK_SIZE),
            Err(_) => 0,
        }
    }
}

impl PoolState {
    /// A pool that was opened, beside those that are open.
    fn new<'a>(pool: Pool, overcommit: f64, open: impl IntoIterator<Item = &'a Arc<Self>>) -> Arc<Self> {
        let beside = open.into_iter().find(|other| other.pool.device == pool.device);
        let (promises, neighbours) =
            beside.map(|other| (other.promises.clone(), other.neighbours.clone())).unwrap_or_default();
        paths(&neighbours).insert(pool.path.clone());
        Arc::new(Self { pool, promises, neighbours, overcommit, emptying: trash::Emptying::default() })
    }

    /// Bytes that may be promised altogether on this filesystem: what Tandem occupies and what is free, less the headroom,
    /// times the ratio. Blocking (asks the filesystem).
    fn limit(&self) -> u64 {
        let Ok(space) = self.pool.space() else { return 0 };
        let pools = paths(&self.neighbours).clone();
        let used: u64 = pools.iter().map(|path| used_bytes(path)).sum();
        let ours = used.saturating_add(space.free).saturating_sub(space.total / HEADROOM_SHARE);
        // Precision: f64 is exact to 8 PiB; the cast saturates.
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let scaled = (ours as f64 * self.overcommit) as u64;
        scaled
    }
}

fn paths(neighbours: &Mutex<BTreeSet<PathBuf>>) -> MutexGuard<'_, BTreeSet<PathBuf>> {
    // A set of paths is whole between any two calls, so a poisoned lock is still usable.
    neighbours.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that a tree may occupy when its volumes and snapshots occupy `bytes`.
fn with_overhead(bytes: u64) -> u64 {
    bytes + bytes / OVERHEAD_SHARE + spare_blocks(bytes / BLOCK_SIZE) * BLOCK_SIZE + TREE_OVERHEAD_BYTES
}

/// Bytes by which a tree may grow when what its volumes and snapshots occupy grows by `bytes`, whatever it is now.
fn growth(bytes: u64) -> u64 {
    with_overhead(bytes) - TREE_OVERHEAD_BYTES + BLOCK_SIZE
}

/// The largest volume whose tree fits into `bytes`: whole MiB.
fn largest_volume(bytes: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    // `with_overhead` grows with its argument.
    let (mut fits, mut too_large) = (0, bytes.min(crate::volume::MAX_VOLUME_BYTES) / MIB + 1);
    while too_large - fits > 1 {
        let middle = fits.midpoint(too_large);
        if with_overhead(middle * MIB) <= bytes { fits = middle } else { too_large = middle }
    }
    if VolumeSize::try_from(fits * MIB).is_ok() { fits * MIB } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::pool::Expected;

    #[test]
    fn two_pools_on_one_filesystem_promise_what_is_free_there_once() {
        let dir = tempfile::Builder::new().prefix("tandem-pool").tempdir().expect("temporary directory");
        let open = |name: &str| {
            let path = dir.path().join(name);
            Pool::open(name.parse().expect("name"), &path, dir.path(), Expected::Any).expect("a pool")
        };
        let one = PoolState::new(open("one"), 1.0, []);
        let two = PoolState::new(open("two"), 1.0, [&one]);
        let most = one.limit() / 4 * 3;
        let promise = one.promises.promise(most, one.limit()).expect("it is free");
        two.promises.promise(most, two.limit()).expect_err("it is promised");
        promise.settle(InstanceId::random(), most);
        two.promises.promise(most, two.limit()).expect_err("it still is");
        assert!(two.promises.promise(most / 9, two.limit()).is_ok());
    }

    #[test]
    fn the_largest_volume_fits_and_is_a_size() {
        for bytes in [0, 1 << 20, 13 << 20, 100 << 20, 1 << 40, 12 << 40, u64::MAX / 4] {
            let largest = largest_volume(bytes);
            assert!(largest == 0 || with_overhead(largest) <= bytes, "{bytes}");
            assert!(largest == 0 || VolumeSize::try_from(largest).is_ok());
        }
        assert!(largest_volume(1 << 30) > 900 << 20);
    }

    #[test]
    fn growth_is_never_less_than_what_is_settled_afterwards() {
        for before in [0, 4096, 1 << 20, (1 << 30) + 4096, 5 << 30, 1 << 40] {
            for more in [4096, 63 * 4096, 1 << 20, 3 << 30, 1 << 40] {
                assert!(with_overhead(before + more) - with_overhead(before) <= growth(more), "{before} {more}");
            }
        }
    }
}
