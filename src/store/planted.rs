//! Bugs on purpose: a test that cannot find these would not find others either.

use super::record::Record;
use super::tree::{Role, Tree};

/// One deliberate bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    /// A flush does not fdatasync the data.
    SkippedSync,
    /// A block is in the map before its data is written.
    MapBeforeData,
    /// A layer with two children is merged into the first.
    MergeOfTwo,
    /// A layer is merged before it is durable that nobody names it.
    MergeWithoutBarrier,
    /// A flush forgets changes of layers that were sealed since.
    MissedLayer,
    /// Freed blocks are used again at once.
    ReuseBeforeDurable,
    /// What is pending is thrown away when the process is killed. (The simulation does it.)
    LostPending,
    /// The tree is opened while a killed process still has writes in flight. (The simulation does it.)
    NoDrain,
    /// A record names a base whose seal is not durable.
    RecordBeforeBase,
    /// A base goes before the record is durable that does not name it.
    BaseReleasedFirst,
    /// Hot sets and records are always written to the same slot.
    HotInPlace,
    /// What becomes a snapshot of another volume is answered before it is durable.
    FillAnsweredEarly,
    /// What differs between two branches is looked for in the target's alone.
    DifferenceOfOneBranch,
    /// What was hot when a copy left is not kept.
    MarksForgotten,
    /// Only what the tree needs now is kept for the next checkpoint, and merges do not ask.
    SpaceForTheNextAlone,
}

/// Whether the commit leaves the record out.
pub(super) fn misses_layer(planted: Option<Planted>, tree: &Tree, record: &Record) -> bool {
    let Record::Map { layer, .. } = record else { return false };
    let sealed = tree.layers.get(layer).is_some_and(|layer| matches!(layer.role, Role::Snapshot(_)));
    planted == Some(Planted::MissedLayer) && sealed
}
