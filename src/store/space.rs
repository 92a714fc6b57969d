//! Disk space that is kept for checkpoints: without one, logs that are full are never used again, nothing can be deleted any
//! more, and a full pool stays full.
//!
//! Invariants: what is kept is kept for both files, since they exchange their names; it covers the tree, whatever the merges
//! that wait make of it, and from the half of a log on whatever the changes do that still find room in both logs, or as much of
//! that as the disk has (a tree that nobody writes takes no more than it may need); a merge, of which one small record may add
//! hundreds of extents, waits as long as what it adds, and some changes beside it, is not covered.

use super::background::STEP_EXTENTS;
use super::commit::Commit;
use super::files::{Files, Name};
use super::job::{FilesHandle, Job};
use super::record::EXTENT_BYTES;
use super::tree::{Role, Tree};
use super::{Action, Store};
use std::time::Duration;

/// Layers and names that are made before the next look, the header, and what the last chunk leaves unused. Little in the
/// tests, so that it does not hide what is missing elsewhere.
const SPARE_BYTES: u64 = if cfg!(all(test, debug_assertions)) { 12 << 10 } else { 1 << 20 };

/// The most that a checkpoint says of one layer, volume or snapshot beside its extents.
const NAME_BYTES: u64 = 128;

/// Extents that a change adds at most: one in the middle of another makes three of it. It is 21 bytes of a log; what makes
/// layers and names takes more of a log than of these 32 bytes.
const EXTENTS_OF_A_CHANGE: u64 = 2;

/// Of a checkpoint, this part at most is headers of chunks and what does not fit into their ends.
const CHUNK_SHARE: u64 = 512;

/// Extents that changes may add while a merge goes on: beyond what it adds itself, so much must be covered (1 MiB).
const BESIDE_A_MERGE: u64 = if cfg!(all(test, debug_assertions)) { 256 } else { 1 << 16 };

/// A disk that has not enough is asked for more in so many steps, each for both files.
const STEPS: u64 = 8;

/// At least so long between two attempts; who still wants more asks again.
const RETRY: Duration = Duration::from_secs(1);

/// What is known of the space that is kept.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// Bytes of each of the two files.
    kept: u64,
    /// More is wanted, and not asked for yet.
    wanted: bool,
    /// A job asks for more.
    asking: bool,
    /// A checkpoint is being written, or was since the job began to ask: the files may have exchanged their names meanwhile.
    writing: bool,
    stale: bool,
    /// Not before, if the last attempt got too little.
    retry_at: Duration,
}

/// The least and the most to be kept, in bytes of each of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub least: u64,
    pub most: u64,
}

/// Keeps space for both files of a checkpoint.
#[derive(Debug)]
pub struct KeepJob {
    files: FilesHandle,
    range: Range,
}

impl KeepJob {
    /// Does it; bytes that are kept.
    pub(super) fn run(&self) -> u64 {
        keep(&*self.files.0, self.range)
    }
}

impl Range {
    /// For a tree whose layers may all be merged: an extent of the result begins or ends where one does now, so there are at
    /// most twice as many.
    pub fn of(tree: &Tree, commit: &Commit) -> Self {
        let pieces = pieces(tree);
        let changes = if commit.is_half_full() { commit.changes_left() } else { 0 };
        let beside = BESIDE_A_MERGE.max(EXTENTS_OF_A_CHANGE * changes);
        Self { least: bytes(tree, pieces), most: bytes(tree, 2 * pieces + beside) }
    }
}

/// Bytes of the largest checkpoint of the tree if its maps had so many extents.
fn bytes(tree: &Tree, extents: u64) -> u64 {
    let names = tree.layers.len() + tree.volumes.len() + tree.snapshots.len();
    let items = NAME_BYTES * names as u64 + EXTENT_BYTES as u64 * extents.min(most_extents(tree));
    items + items / CHUNK_SHARE + SPARE_BYTES
}

/// At least as many as there are extents.
fn pieces(tree: &Tree) -> u64 {
    tree.layers.values().map(|layer| layer.map.pieces()).sum()
}

/// Each block an extent of its own: that much was promised when the volumes and snapshots were made.
fn most_extents(tree: &Tree) -> u64 {
    let blocks = tree.layers.values().map(|layer| match layer.role {
        Role::Top(volume) => tree.volumes.get(&volume).map_or(0, |volume| volume.size.blocks()),
        Role::Snapshot(_) | Role::Base | Role::Nameless => layer.map.data_blocks() + layer.map.zero_blocks(),
    });
    blocks.sum()
}

/// Keeps as much as there is; bytes of each file.
pub(super) fn keep(files: &dyn Files, range: Range) -> u64 {
    let Range { least, most } = range;
    let both = [Name::CheckpointNew, Name::Checkpoint];
    for step in 0..=STEPS {
        // In steps: an attempt that fails may have taken all that there was for the first of the files.
        let bytes = least + (most - least) * step / STEPS;
        if both.iter().any(|name| files.reserve(*name, bytes).is_err()) {
            break;
        }
    }
    // Also what was kept before, where that is more.
    both.map(|name| files.reserved(name).unwrap_or(0)).into_iter().min().unwrap_or(0)
}

impl Space {
    /// What is kept when a tree is opened.
    pub fn new(kept: u64) -> Self {
        Self { kept, ..Self::default() }
    }

    /// A checkpoint is being written from now on.
    pub fn checkpoint_begins(&mut self) {
        (self.writing, self.stale) = (true, true);
    }

    /// It is written, or was not; what was kept then.
    pub fn checkpoint_ends(&mut self, kept: Option<u64>) {
        self.writing = false;
        self.kept = self.kept.max(kept.unwrap_or(0));
    }

    /// The next attempt may be made now.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        (self.wanted && !self.asking && !self.writing).then(|| self.retry_at.saturating_sub(now))
    }
}

impl Store {
    /// What should be kept now.
    pub(super) fn space_range(&self) -> Range {
        let range = Range::of(&self.tree, &self.commit);
        #[cfg(test)]
        if self.planted == Some(super::planted::Planted::SpaceForTheNextAlone) {
            return Range { most: range.least, ..range };
        }
        range
    }

    /// To be called when more may be needed than before. A few names more are covered by what is kept for them.
    pub(super) fn look_for_space(&mut self) {
        self.space.wanted |= self.space_range().most > self.space.kept + SPARE_BYTES / 2;
    }

    /// Whether what is kept covers one more step of a merge; if not, more is asked for.
    pub(super) fn may_merge(&mut self) -> bool {
        #[cfg(test)]
        if self.planted == Some(super::planted::Planted::SpaceForTheNextAlone) {
            return true;
        }
        let extents = pieces(&self.tree) + STEP_EXTENTS as u64 + 1 + BESIDE_A_MERGE / 4;
        let is_covered = bytes(&self.tree, extents) <= self.space.kept + SPARE_BYTES / 2;
        self.space.wanted |= !is_covered;
        is_covered
    }

    /// Asks for what is wanted.
    pub(super) fn space_step(&mut self, now: Duration, out: &mut Vec<Action<Job>>) {
        if self.space.next(now) != Some(Duration::ZERO) {
            return;
        }
        (self.space.wanted, self.space.asking, self.space.stale) = (false, true, false);
        self.space.retry_at = now + RETRY;
        let (files, range) = (FilesHandle(self.files.clone()), self.space_range());
        out.push(Action::Job(Job::Keep(KeepJob { files, range })));
    }

    pub(super) fn space_kept(&mut self, kept: u64) {
        self.space.asking = false;
        if !self.space.stale {
            self.space.kept = self.space.kept.max(kept);
        }
    }
}
