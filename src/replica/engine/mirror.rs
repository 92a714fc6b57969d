//! A copy of a mirrored volume: what the engine is given to run one, and what it says of it.
//!
//! ```text
//!   driver (src/replica/mirror) --open_mirror, tell_mirror--> engine's thread: Replica::step --Session::send--> peers
//!            ^----------------- CatalogueRequest ------------------'
//! ```
//! # Invariants
//! * The store has a record of the volume before its core acts, and from then on nothing but its core changes the volume.
//! * What a peer sent is written only if each block is what entered at the other end.

use crate::protocol::{Configuration, Memory, Outcome, Record, Role, Stamp, Wish};
use crate::replica::peer;
use crate::replica::pool::{Promise, Promises};
use crate::store::Reserve;
use crate::volume::{BootId, InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// A copy of a mirrored volume that the engine shall run.
pub struct MirrorConfig {
    /// Its tree, which is the copy's name; open.
    pub tree: InstanceId,
    /// The volume, which the tree has.
    pub volume: VolumeId,
    /// Its conversations. The driver adds and removes peers; the engine sends.
    pub session: Arc<peer::Session>,
    /// The life of this node.
    pub boot: BootId,
    /// Whether the node's caches have what the copy's last engine wrote. A record of another boot means `Lost` anyway.
    pub memory: Memory,
    /// For a copy without a record on disk: made durable before the copy acts.
    pub first: Record,
    /// Whether a base may be kept when a copy leaves.
    pub reserve: SealReserve,
    /// To the driver; bounded. What finds no place is said again a heartbeat later.
    pub requests: mpsc::Sender<CatalogueRequest>,
}

/// What a copy wants of the catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CatalogueRequest {
    /// Replace the configuration if its stamp still is `expected`; answered by [`MirrorInput::Proposed`].
    Propose {
        /// The compare.
        expected: Stamp,
        /// The swap.
        next: Box<Configuration>,
    },
    /// Read it, never from a cache; answered by [`MirrorInput::Configuration`].
    Read,
}

/// What a mirrored volume's copy is told.
#[derive(Debug)]
pub enum MirrorInput {
    /// As the catalogue has it.
    Configuration(Box<Configuration>),
    /// What the spec wants. To be told before a device is attached: a copy that is not wished refuses its requests.
    Wish(Wish),
    /// Bytes that every copy can hold: what a device of the volume has. To be told before the first configuration.
    Size(VolumeSize),
    /// A person wants the copy compared with this one, block for block.
    Resync(InstanceId),
    /// The answer to a proposal.
    Proposed {
        /// The version that was proposed.
        stamp: Stamp,
        /// What became of it.
        outcome: Outcome,
    },
    /// What happened on its connections, in order.
    Peer(peer::Event),
    /// Who uses the volume without a copy, as the catalogue says.
    Client {
        /// Its publication.
        client: Option<InstanceId>,
        /// The term in which this copy was primary before the catalogue was asked.
        term: Option<Stamp>,
    },
}

/// Where the space for a seal comes from: when a copy leaves, what is written from then on is kept apart, and may grow to a
/// full overwrite. It is asked of the pool's promises at that moment, by the engine's thread, which waits for nobody: so how
/// much may be promised was looked up before. Without an offer, or without space, the copy that left lacks everything.
///
/// For a snapshot that the primary of another node is about to take, the space was set aside here before, under its id. If
/// that was forgotten because the engine was started again, it is asked for as above; without space it is refused.
#[derive(Clone, Debug, Default)]
pub struct SealReserve(Arc<Mutex<Reserved>>);

#[derive(Debug, Default)]
struct Reserved {
    offer: Option<(Promises, u64, u64)>,
    taken: Option<Promise>,
    /// Until they are adopted or deleted: the controller has an object for each.
    snapshots: BTreeMap<SnapshotId, Promise>,
}

impl SealReserve {
    fn lock(&self) -> MutexGuard<'_, Reserved> {
        // Single assignments, so a poisoned lock is still usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One seal may take `bytes` from the pool if its promises stay within `limit` bytes.
    pub fn offer(&self, promises: Promises, bytes: u64, limit: u64) {
        self.lock().offer = Some((promises, bytes, limit));
    }

    /// What a seal has taken is in the figure of its tree now.
    pub fn settle(&self, tree: InstanceId, bytes: u64) {
        if let Some(promise) = self.lock().taken.take() {
            promise.settle(tree, bytes);
        }
    }

    /// Sets space aside for a snapshot, until [`Self::release`].
    pub fn set_aside(&self, snapshot: SnapshotId, promise: Promise) {
        self.lock().snapshots.insert(snapshot, promise);
    }

    /// What was set aside for a snapshot is in the figure of its tree now, or not needed any more.
    pub fn release(&self, snapshot: SnapshotId) -> Option<Promise> {
        self.lock().snapshots.remove(&snapshot)
    }

    /// Whether there is space for a snapshot that the primary takes.
    pub(super) fn has_space_for(&self, snapshot: SnapshotId) -> bool {
        let set_aside = self.lock().snapshots.contains_key(&snapshot);
        set_aside || self.take() == Reserve::Promised
    }

    /// For one seal, if nothing that was taken waits to be settled.
    pub(super) fn take(&self) -> Reserve {
        let mut reserved = self.lock();
        if reserved.taken.is_none() {
            let offer = reserved.offer.as_ref();
            reserved.taken = offer.and_then(|(promises, bytes, limit)| promises.promise(*bytes, *limit).ok());
            return if reserved.taken.is_some() { Reserve::Promised } else { Reserve::Refused };
        }
        Reserve::Refused
    }
}

/// For people, CSI health and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorStatus {
    /// What this copy is.
    pub role: Role,
    /// What a device of it has; the copy itself may be larger.
    pub size: VolumeSize,
    /// Requests are executed here.
    pub serves: bool,
    /// And can be answered: no other copy that they need is silent.
    pub answers: bool,
    /// The last configuration that it acts under.
    pub configuration: Configuration,
    /// The newest committed one that it knows: on its way to stable media, if it is not that one.
    pub newest: Configuration,
    /// What the spec wants, as it was told last.
    pub wish: Option<Wish>,
    /// It has kept everything that it ever acknowledged: as a member, every acknowledged write.
    pub intact: bool,
    /// Its disk failed something that it cannot do without.
    pub disk_failed: bool,
    /// The other copies of the configuration.
    pub copies: BTreeMap<InstanceId, CopyStatus>,
    /// Copied by the resync or reconcile that was begun last.
    pub copied_bytes: u64,
    /// Compared by it, and equal there already.
    pub equal_bytes: u64,
    /// Extents of 4 MiB where the copies may differ after a crash.
    pub hot_extents: usize,
    /// Requests that are not answered yet.
    pub requests: usize,
    /// The term that it is primary in.
    pub term: Option<Stamp>,
}

/// Another copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyStatus {
    /// How far it is: known to the primary only; the others say what the configuration says.
    pub state: CopyState,
    /// There is a connection.
    pub connected: bool,
}

/// DRBD's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// It has every acknowledged write.
    UpToDate,
    /// It gets all writes, and what it lacks is being copied to it.
    SyncTarget {
        /// Copied since it joined.
        copied_bytes: u64,
        /// Compared since it joined, and equal there already.
        equal_bytes: u64,
        /// Of the volume, behind the last range that was copied: at most so much is left.
        left_bytes: u64,
    },
    /// It lacks writes.
    Outdated,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_promise_of_space_is_one_seal() {
        let (reserve, promises, tree) = (SealReserve::default(), Promises::default(), InstanceId::random());
        assert_eq!(reserve.take(), Reserve::Refused);
        reserve.offer(promises.clone(), 100, 150);
        let engine = reserve.clone();
        assert_eq!((engine.take(), engine.take()), (Reserve::Promised, Reserve::Refused));
        assert_eq!(promises.total(), 100);
        reserve.settle(tree, 60);
        assert_eq!((promises.total(), engine.take()), (60, Reserve::Refused));
        promises.settle(tree, 50);
        assert_eq!(engine.take(), Reserve::Promised);
    }

    #[test]
    fn space_that_was_set_aside_is_one_snapshots_own() {
        let (reserve, promises) = (SealReserve::default(), Promises::default());
        let [one, other] = [SnapshotId::random(), SnapshotId::random()];
        reserve.set_aside(one, promises.promise(100, 150).expect("fits"));
        reserve.offer(promises.clone(), 100, 150);
        assert!(reserve.has_space_for(one) && !reserve.has_space_for(other), "it is refused, not taken from another");
        drop(reserve.release(one));
        assert!(promises.total() == 0 && reserve.has_space_for(other));
    }
}
