//! Volumes: made and deleted, and the trees that they are in.

use super::errors::VolumeFailure as Failure;
use super::mirror::{MirrorPlace, copy_record};
use super::{CopyState, Manager, PoolState, VolumePlace, growth, with_overhead};
use crate::crash::crash_point;
use crate::replica::engine::TreeFiles;
use crate::replica::operations::OperationGuard;
use crate::replica::pool::promises::NotEnough;
use crate::replica::pool::{PoolName, Promise, sync_directory, trash};
use crate::replica::records::Record;
use crate::store::{
    Control, Directory, MirrorError, OpenError, PENDING_BYTES, Pending, Store, Superblock, VolumeInfo, is_full,
};
use crate::volume::{BLOCK_SIZE, InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::collections::btree_map::Entry;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Pauses between two looks at a tree whose layers are merged: short for small ones, cheap for those that take hours.
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LAST_LOOK: Duration = Duration::from_secs(5);

/// A volume to make.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its id.
    pub volume: VolumeId,
    /// Where.
    pub pool: PoolName,
    /// How large.
    pub size: VolumeSize,
    /// Kept beside the copy.
    pub descriptor: String,
    /// Check sums at reads of sealed layers.
    pub verify_reads: bool,
    /// What it starts with.
    pub source: Source,
}

/// What a new volume starts with.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// Zeros.
    Blank,
    /// A snapshot.
    Snapshot(SnapshotId),
    /// Another volume as it is now.
    Volume(VolumeId),
}

/// How a new tree begins.
pub(super) struct Blank {
    pub tree: InstanceId,
    /// The volume is filled from this snapshot in the background.
    pub copying: Option<SnapshotId>,
    /// The volume is one copy of several: the mirror's own record.
    pub mirror: Option<String>,
}

impl Blank {
    /// For a volume with one copy.
    fn new() -> Self {
        Self { tree: InstanceId::random(), copying: None, mirror: None }
    }

    /// The same, filled from a snapshot.
    pub fn copying(snapshot: SnapshotId) -> Self {
        Self { copying: Some(snapshot), ..Self::new() }
    }
}

/// The snapshot that a clone of a volume stands on until the volume is made: it has the clone's own id, so a repeated call
/// finds it and a start after a crash can tell it from a user's.
pub(super) fn base_of(volume: VolumeId) -> SnapshotId {
    SnapshotId::from_bytes(volume.to_bytes())
}

/// The name of the record that tells a base from a user's snapshot.
pub(super) fn base_record(base: SnapshotId) -> String {
    format!("base-{base}")
}

pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Manager {
    /// The volume is there, with this size, in this pool; made if it was not.
    pub async fn ensure_volume(&self, new: NewVolume) -> Result<(), Failure> {
        let volume = new.volume;
        let _guard = self.begin(volume, &[volume.to_bytes()]).await?;
        if self.place(volume).is_none() {
            self.all_open_for(&volume.to_string(), None).await?;
        }
        // Looked up again: its copy may have been opened meanwhile.
        if let Some(place) = self.place(volume) {
            return self.check_same(&new, &place).await;
        }
        let pool = self.pool(&new.pool).ok_or_else(|| Failure::NoPool(new.pool.clone()))?;
        match new.source {
            Source::Blank => self.create_blank(&new, &pool, Blank::new()).await,
            Source::Snapshot(snapshot) => self.restore(&new, &pool, snapshot).await,
            Source::Volume(source) => self.clone_volume(&new, &pool, source).await,
        }
    }

    async fn check_same(&self, new: &NewVolume, place: &VolumePlace) -> Result<(), Failure> {
        let size = match &place.copy {
            Some(copy) => copy.size,
            None => self.volume_info(place.tree, new.volume).await.ok_or(Failure::NoVolume(new.volume))?.size,
        };
        // It may have been grown since; it is another volume only if it is smaller than what is asked for.
        if place.pool == new.pool && size >= new.size {
            return Ok(());
        }
        Err(Failure::Different { volume: new.volume, found: size.bytes(), pool: place.pool.clone() })
    }

    /// A tree of its own with one empty volume.
    pub(super) async fn create_blank(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        blank: Blank,
    ) -> Result<(), Failure> {
        let promise = self.promise_tree(new, pool).await?;
        self.create_promised(new, pool, blank, promise).await
    }

    /// Space for a tree of its own.
    pub(super) async fn promise_tree(&self, new: &NewVolume, pool: &Arc<PoolState>) -> Result<Promise, Failure> {
        self.promise(&new.pool, pool, with_overhead(new.size.bytes())).await
    }

    /// As [`Self::create_blank`], with its space. Nothing is left of what failed: a start would find an empty volume.
    pub(super) async fn create_promised(
        &self,
        new: &NewVolume,
        pool: &Arc<PoolState>,
        blank: Blank,
        promise: Promise,
    ) -> Result<(), Failure> {
        let (volume, tree) = (new.volume, blank.tree);
        let mut records = vec![(volume.to_string(), Record::new(new.descriptor.clone(), blank.copying))];
        records.extend(blank.mirror.clone().map(|text| (copy_record(volume), Record::new(text, None))));
        let made = pool.clone();
        let opened = tokio::task::spawn_blocking(move || make_tree(&made, tree, volume, &records))
            .await
            .map_err(|e| Failure::Io { volume, what: "cannot make its copy", error: io::Error::other(e) })?;
        if opened.is_err() {
            self.empty_trash(pool);
        }
        let opened = opened?;
        let named = self.name_first(new, tree, opened).await;
        if named.is_err() {
            self.remove_tree(pool, tree).await;
            return named;
        }
        promise.settle(tree, self.promised_bytes(tree).await);
        let mirror = blank.mirror.map(MirrorPlace::closed);
        self.insert(new, tree, blank.copying.map(|_| CopyState::new(new.size)), mirror);
        Ok(())
    }

    /// Opens a tree that was made, and names its first volume.
    async fn name_first(&self, new: &NewVolume, tree: InstanceId, opened: Opened) -> Result<(), Failure> {
        let volume = new.volume;
        self.engine()
            .open_tree(tree, opened.store, opened.files, opened.pending)
            .await
            .map_err(|error| Failure::Engine { volume, error })?;
        crash_point("tree.opened");
        let create = Control::CreateVolume { volume, size: new.size, verify_reads: new.verify_reads };
        self.control(volume, tree, create).await
    }

    /// The volume is gone; what its snapshots and clones share stays.
    pub async fn delete_volume(&self, volume: VolumeId) -> Result<(), Failure> {
        if self.copy_here(volume).is_some() {
            return Err(Failure::Mirrored(volume));
        }
        self.delete(volume, false).await
    }

    /// The same, if nothing was ever written to it: nobody looks and then deletes, so nobody writes in between.
    pub async fn delete_unwritten(&self, volume: VolumeId) -> Result<(), Failure> {
        if self.copy_here(volume).is_some() {
            return Err(Failure::Mirrored(volume));
        }
        self.delete(volume, true).await
    }

    pub(super) async fn delete(&self, volume: VolumeId, unwritten: bool) -> Result<(), Failure> {
        // Behind whoever makes it now: what is not there must not be there a moment later.
        let _volume = self.begin(volume, &[volume.to_bytes()]).await?;
        let Some(place) = self.place(volume) else { return Ok(()) };
        let _tree = self.begin(volume, &[place.tree.to_bytes()]).await?;
        if place.device.is_some() {
            return Err(Failure::Attached(volume));
        }
        if place.copy.is_some() {
            return self.cancel_copy(volume, &place).await;
        }
        if unwritten && self.volume_info(place.tree, volume).await.is_none_or(|info| info.written) {
            return Err(Failure::Written(volume));
        }
        // A call that was cut off may have left a connection without device.
        self.engine().detach_from(place.tree, volume).await.map_err(|_| Failure::Attached(volume))?;
        self.control(volume, place.tree, Control::DeleteVolume(volume)).await?;
        self.index().volumes.remove(&volume);
        self.drop_base(volume, place.tree).await;
        self.remove_record(&place.pool, place.tree, volume.to_string()).await;
        if place.mirror.is_some() {
            self.remove_record(&place.pool, place.tree, copy_record(volume)).await;
        }
        self.tidy_tree(&place.pool, place.tree).await;
        Ok(())
    }

    pub(super) async fn begin(&self, volume: VolumeId, keys: &[[u8; 16]]) -> Result<OperationGuard, Failure> {
        let operations = &self.inner.operations;
        operations.begin(keys.to_vec()).await.map_err(|error| Failure::Busy { volume, error })
    }

    pub(super) async fn promise(&self, name: &PoolName, pool: &Arc<PoolState>, bytes: u64) -> Result<Promise, Failure> {
        let asked = pool.clone();
        let promised = tokio::task::spawn_blocking(move || asked.promises.promise(bytes, asked.limit())).await;
        let full = |error| Failure::PoolFull { pool: name.clone(), error };
        promised.unwrap_or_else(|_| Err(NotEnough { wanted: bytes, available: 0 })).map_err(full)
    }

    pub(super) async fn control(&self, volume: VolumeId, tree: InstanceId, control: Control) -> Result<(), Failure> {
        crash_point("control");
        let done = self.engine().control(tree, control).await.map_err(|error| Failure::Control { volume, error });
        crash_point("control.done");
        done
    }

    pub(super) async fn write_record(
        &self,
        pool: &Arc<PoolState>,
        tree: InstanceId,
        volume: VolumeId,
        id: &str,
        record: Record,
    ) -> Result<(), Failure> {
        let (path, id) = (pool.pool.tree(tree), id.to_owned());
        let written = tokio::task::spawn_blocking(move || record.write(&path, &id)).await;
        let written =
            written.map_err(|e| Failure::Io { volume, what: "cannot write its record", error: io::Error::other(e) });
        written?.map_err(|error| Failure::Record { volume, error })
    }

    /// Best effort: a record without object is removed at the next start.
    pub(super) async fn remove_record(&self, pool: &PoolName, tree: InstanceId, id: String) {
        let Some(pool) = self.pool(pool) else { return };
        let path = pool.pool.tree(tree);
        let removed = tokio::task::spawn_blocking(move || Record::remove(&path, &id)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(%error, "a record stays behind until the next start");
        }
    }

    /// The base of a copy or clone into `volume`, if it is still there, is not needed any more.
    pub(super) async fn drop_base(&self, volume: VolumeId, tree: InstanceId) {
        let base = base_of(volume);
        crash_point("base.drop");
        let place = self.index().snapshots.remove(&base);
        let (pool, tree) = match place {
            Some(place) => (Some(place.pool), place.tree),
            // Not noted: then the clone is in the pool of its source.
            None => (self.index().volumes.get(&volume).map(|p| p.pool.clone()), tree),
        };
        if let Err(error) = self.engine().control(tree, Control::DeleteSnapshot(base)).await {
            tracing::debug!(%error, %volume, "no base to delete");
        }
        if let Some(pool) = pool {
            self.remove_record(&pool, tree, base_record(base)).await;
        }
    }

    /// Follows what a deletion left: the promise shrinks, and a tree without names goes to the trash.
    pub(super) async fn tidy_tree(&self, name: &PoolName, tree: InstanceId) {
        let Some(pool) = self.pool(name) else { return };
        let names = self.engine().inspect(tree, |s| s.volumes().len() + s.snapshots().len()).await;
        if names.is_ok_and(|n| n == 0) {
            self.remove_tree(&pool, tree).await;
            return;
        }
        pool.promises.settle(tree, self.promised_bytes(tree).await);
        self.settle_when_merged(pool, tree);
    }

    /// A merge gives blocks back that were promised: without this the pool would look fuller than it is until the next
    /// operation on the same tree.
    pub(super) fn settle_when_merged(&self, pool: Arc<PoolState>, tree: InstanceId) {
        match self.index().merging.entry(tree) {
            Entry::Occupied(mut asked) => {
                *asked.get_mut() += 1;
                return;
            }
            Entry::Vacant(first) => first.insert(1),
        };
        let manager = self.clone();
        tokio::spawn(async move {
            let mut pause = FIRST_LOOK;
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_LOOK);
                let asked = manager.index().merging.get(&tree).copied();
                // No operation may have asked for a promise that this figure does not know.
                let Ok(_guard) = manager.inner.operations.begin(vec![tree.to_bytes()]).await else { continue };
                let left = manager.engine().inspect(tree, |store| store.backlog().merging_layers).await;
                if left.is_ok() {
                    pool.promises.settle(tree, manager.promised_bytes(tree).await);
                }
                if left.is_ok_and(|left| left > 0) {
                    continue;
                }
                // Whoever asked since then may have deleted something after the look above.
                let mut index = manager.index();
                if index.merging.get(&tree).copied() == asked {
                    index.merging.remove(&tree);
                    return;
                }
            }
        });
    }

    pub(super) async fn remove_tree(&self, pool: &Arc<PoolState>, tree: InstanceId) {
        crash_point("tree.close");
        if let Err(error) = self.engine().close_tree(tree).await {
            tracing::warn!(%tree, %error, "an empty copy stays until the next start");
            return;
        }
        let removed = pool.clone();
        let result = tokio::task::spawn_blocking(move || trash::discard(&removed.pool, &removed.pool.tree(tree))).await;
        match result {
            Ok(Ok(())) => {
                pool.promises.settle(tree, 0);
                self.empty_trash(pool);
            }
            other => tracing::warn!(%tree, ?other, "an empty copy stays until the next start"),
        }
    }

    pub(super) fn insert(
        &self,
        new: &NewVolume,
        tree: InstanceId,
        copy: Option<CopyState>,
        mirror: Option<MirrorPlace>,
    ) {
        let descriptor = new.descriptor.clone();
        let place = VolumePlace { pool: new.pool.clone(), tree, descriptor, device: None, copy, mirror };
        self.index().volumes.insert(new.volume, place);
    }
}

/// What `open_tree` of the engine takes.
pub(super) struct Opened {
    pub store: Box<Store>,
    pub files: TreeFiles,
    pub pending: std::os::fd::OwnedFd,
}

/// Makes an empty tree under its final name, with the records of its first volume; what it made is gone if it fails. Blocking.
fn make_tree(
    pool: &PoolState,
    tree: InstanceId,
    volume: VolumeId,
    records: &[(String, Record)],
) -> Result<Opened, Failure> {
    let io = |what| move |error| Failure::Io { volume, what, error };
    let (fresh, path) = (pool.pool.new_tree(tree), pool.pool.tree(tree));
    let undo = |left: &Path, failure: Failure| {
        if let Err(error) = trash::discard(&pool.pool, left) {
            tracing::warn!(%volume, path = %left.display(), %error, "what was half made stays until the next start");
        }
        failure
    };
    fill_tree(pool, tree, volume, records).map_err(|failure| undo(&fresh, failure))?;
    crash_point("tree.name");
    // The name is the promise that the tree is whole: everything in it is durable before the rename is.
    fs::rename(&fresh, &path).map_err(io("cannot name its directory")).map_err(|failure| undo(&fresh, failure))?;
    crash_point("tree.named");
    let synced = sync_directory(&pool.pool.path.join("trees")).map_err(io("cannot sync the pool"));
    let opened = synced.and_then(|()| open_tree(&path, None).map_err(|error| error.of(volume)));
    opened.map_err(|failure| undo(&path, failure))
}

fn fill_tree(
    pool: &PoolState,
    tree: InstanceId,
    volume: VolumeId,
    records: &[(String, Record)],
) -> Result<(), Failure> {
    let io = |what| move |error| Failure::Io { volume, what, error };
    let fresh = pool.pool.new_tree(tree);
    fs::create_dir(&fresh).map_err(io("cannot make its directory"))?;
    pool.pool.prepare(&fresh).map_err(io("cannot switch copy-on-write off for it"))?;
    crash_point("tree.made");
    let files = Directory::new(&fresh);
    let superblock = Superblock { instance: tree, pool: pool.pool.id, created_ms: now_ms() };
    Store::create(&files, &superblock).map_err(|error| Failure::Create { volume, error })?;
    records
        .iter()
        .try_for_each(|(name, record)| record.write(&fresh, name).map_err(|error| Failure::Record { volume, error }))
}

/// Why a tree could not be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeFailure {
    /// The system said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Its contents do not fit.
    #[error("{0}")]
    Store(#[from] OpenError),
}

impl TreeFailure {
    /// There was no space for what opening it writes: it had no effect.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Io(error) | Self::Store(OpenError::Io { error, .. } | OpenError::Mirror(MirrorError::Io(error))) => {
                is_full(error)
            }
            Self::Store(_) => false,
        }
    }

    fn of(self, volume: VolumeId) -> Failure {
        match self {
            Self::Io(error) => Failure::Io { volume, what: "cannot open its copy", error },
            Self::Store(error) => Failure::Open { volume, error },
        }
    }
}

/// Opens a tree; `held` is the pending region that the holder kept. Blocking.
pub(super) fn open_tree(path: &Path, held: Option<std::os::fd::OwnedFd>) -> Result<Opened, TreeFailure> {
    let directory = Arc::new(Directory::new(path));
    let files = TreeFiles::open(path)?;
    // A killed engine's direct I/O may still be under way: nothing is read before it has landed.
    files.drain()?;
    let (memory, pending) = match held {
        Some(fd) => (crate::memory::Memory::map(&fd, PENDING_BYTES)?, fd),
        None => crate::memory::Memory::create("tandem-pending", PENDING_BYTES)?,
    };
    let store = Store::open(directory, Pending::over(memory))?;
    // It may have written `mirror` anew, which is another file under that name.
    let files = TreeFiles::open(path)?;
    Ok(Opened { store: Box::new(store), files, pending })
}

/// Blocks that a snapshot of this volume would newly share.
pub(super) fn shared_by_a_seal(info: &VolumeInfo) -> u64 {
    growth(info.allocated_blocks * BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_that_finds_no_space_is_tried_again_whatever_it_was_about_to_write() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let failures = [
            TreeFailure::Io(full()),
            TreeFailure::Store(OpenError::Io { what: "writing a map log", error: full() }),
            TreeFailure::Store(OpenError::Mirror(MirrorError::Io(full()))),
        ];
        assert!(failures.iter().all(TreeFailure::is_full));
        let broken = io::Error::other("the disk is broken");
        assert!(!TreeFailure::Store(OpenError::Mirror(MirrorError::Io(broken))).is_full());
    }
}
