//! The layers of one tree and their names: what the records of the log add up to, in memory.
//!
//! Invariants: only [`Tree::apply`] changes what is durable, the same for a live change and for its replay; a physical
//! block is in at most one layer; a layer with a child is never written to; what a volume shows is the first entry that
//! is not absent on the path from its top to the root, and its index, where it has one, says the same.

use super::format::LayerId;
use super::map::{Entry, Extent, MAX_LOGICAL_BLOCKS, Map, PhysicalBlock};
use super::record::Record;
use crate::volume::{SnapshotId, VolumeId, VolumeSize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a layer is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The newest layer of a volume: the only one that changes.
    Top(VolumeId),
    /// A snapshot: it changes never again.
    Snapshot(SnapshotId),
    /// What a copy had that left the mirror: it stays below what was written since, until no copy needs to know that.
    Base,
    /// Nobody asks for it: it is merged into its only child, or freed if it has none.
    Nameless,
}

/// One layer.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub parent: Option<LayerId>,
    pub children: Vec<LayerId>,
    pub role: Role,
    pub map: Map,
    /// Every block it owns has its crc32c in `checksums`.
    pub checksummed: bool,
    /// Requests in flight that write in place into blocks it owned when they began.
    pub writers: u32,
    /// The seal is done: no request in flight can still write into it.
    pub settled: bool,
    /// The commit that makes its namelessness durable; merging before would change a snapshot that a power cut brings back.
    pub nameless_by: u64,
    /// Shared with readers outside of the store: while they live it is neither merged nor freed.
    pub pin: Arc<()>,
}

impl Layer {
    fn new(parent: Option<LayerId>) -> Self {
        Self {
            parent,
            children: Vec::new(),
            role: Role::Nameless,
            map: Map::new(),
            checksummed: false,
            writers: 0,
            settled: false,
            nameless_by: 0,
            pin: Arc::new(()),
        }
    }

    /// Whether a reader outside of the store, or a request in flight, relies on its blocks.
    pub fn in_use(&self) -> bool {
        self.writers > 0 || Arc::strong_count(&self.pin) > 1
    }
}

/// Finds a block of a volume at a cost that does not depend on the number of its layers.
#[derive(Clone, Debug)]
pub(super) enum Index {
    /// The top has no ancestors: its own map is the index.
    Top,
    /// All layers below `stage`, and `stage` before `cursor`, are in the map; reads walk the layers meanwhile.
    Building { map: Map, stage: LayerId, cursor: u64 },
    /// Every layer is in it.
    Ready(Map),
}

impl Index {
    fn into_map(self) -> Option<Map> {
        match self {
            Self::Top => None,
            Self::Building { map, .. } | Self::Ready(map) => Some(map),
        }
    }
}

/// One volume.
#[derive(Clone, Debug)]
pub(super) struct Volume {
    pub top: LayerId,
    pub size: VolumeSize,
    pub verify_reads: bool,
    pub index: Index,
    /// Requests that were started and are not done.
    pub in_flight: u32,
}

/// One snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub layer: LayerId,
    pub volume: VolumeId,
    pub size: VolumeSize,
    pub created_ms: u64,
}

/// A record does not fit the state that the records before it made: the log or the checkpoint is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Inconsistent(pub String);

/// All layers and names of a tree.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    pub layers: BTreeMap<LayerId, Layer>,
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// Bases of mirrored volumes.
    pub bases: BTreeMap<LayerId, VolumeId>,
    /// Ids are never used again: an old record can never mean a new layer.
    pub next_layer: u32,
    /// Indexes that are not needed any more. Freeing one takes tens of milliseconds: work for a helper thread.
    pub discarded: Vec<Map>,
}

/// Receives the physical blocks that no layer owns any more.
pub(super) type Retire<'a> = &'a mut dyn FnMut(PhysicalBlock, u32);

impl Tree {
    /// Makes the change that `record` says.
    pub fn apply(&mut self, record: &Record, retire: Retire<'_>) -> Result<(), Inconsistent> {
        match *record {
            Record::Map { layer, extent } => self.map(layer, extent, retire),
            Record::NewLayer { layer, parent } => self.new_layer(layer, parent),
            Record::NameVolume { volume, layer, size, verify_reads } => {
                self.name_volume(volume, layer, size, verify_reads)
            }
            Record::UnnameVolume { volume } => {
                let old = self.volumes.remove(&volume).ok_or_else(|| unknown(record))?;
                self.discarded.extend(old.index.into_map());
                self.layer_mut(old.top)?.role = Role::Nameless;
                self.bases_of(volume).into_iter().try_for_each(|layer| self.unname_base(layer))
            }
            Record::NameSnapshot { snapshot, layer, volume, size, created_ms } => {
                if self.snapshots.contains_key(&snapshot) || self.layer(layer)?.role != Role::Nameless {
                    return Err(unknown(record));
                }
                self.layer_mut(layer)?.role = Role::Snapshot(snapshot);
                self.snapshots.insert(snapshot, Snapshot { layer, volume, size, created_ms });
                Ok(())
            }
            Record::UnnameSnapshot { snapshot } => {
                let old = self.snapshots.remove(&snapshot).ok_or_else(|| unknown(record))?;
                self.layer_mut(old.layer)?.role = Role::Nameless;
                Ok(())
            }
            Record::MergedPart { parent, child, end } => self.merge(parent, child, end, retire),
            Record::Merged { parent, child } => {
                self.merge(parent, child, MAX_LOGICAL_BLOCKS, retire)?;
                self.remove_merged(parent, child)
            }
            Record::Freed { layer } => self.free(layer, retire),
            Record::Resize { volume, size } => {
                self.volumes.get_mut(&volume).ok_or_else(|| unknown(record))?.size = size;
                Ok(())
            }
            Record::Modify { volume, verify_reads } => {
                self.volumes.get_mut(&volume).ok_or_else(|| unknown(record))?.verify_reads = verify_reads;
                Ok(())
            }
            Record::Checksummed { layer } => {
                self.layer_mut(layer)?.checksummed = true;
                Ok(())
            }
            Record::NameBase { layer, volume } => {
                if self.layer(layer)?.role != Role::Nameless || !self.volumes.contains_key(&volume) {
                    return Err(unknown(record));
                }
                self.layer_mut(layer)?.role = Role::Base;
                self.bases.insert(layer, volume);
                Ok(())
            }
            Record::UnnameBase { layer } => self.unname_base(layer),
        }
    }

    /// The tree as it is now, for a checkpoint: what is only in memory is left out, and nothing is held in use.
    pub fn frozen(&self) -> Self {
        let frozen = |layer: &Layer| Layer { pin: Arc::new(()), ..layer.clone() };
        Self {
            layers: self.layers.iter().map(|(id, layer)| (*id, frozen(layer))).collect(),
            volumes: self.volumes.iter().map(|(id, volume)| (*id, Volume { index: Index::Top, ..*volume })).collect(),
            snapshots: self.snapshots.clone(),
            bases: self.bases.clone(),
            next_layer: self.next_layer,
            discarded: Vec::new(),
        }
    }

    /// Layers that are bases of the volume: a handful.
    pub fn bases_of(&self, id: VolumeId) -> Vec<LayerId> {
        self.bases.iter().filter(|(_, volume)| **volume == id).map(|(layer, _)| *layer).collect()
    }

    fn unname_base(&mut self, id: LayerId) -> Result<(), Inconsistent> {
        self.bases.remove(&id).ok_or_else(|| Inconsistent(format!("layer {} is no base", id.0)))?;
        self.layer_mut(id)?.role = Role::Nameless;
        Ok(())
    }

    pub fn layer(&self, id: LayerId) -> Result<&Layer, Inconsistent> {
        self.layers.get(&id).ok_or_else(|| Inconsistent(format!("layer {} does not exist", id.0)))
    }

    pub fn layer_mut(&mut self, id: LayerId) -> Result<&mut Layer, Inconsistent> {
        self.layers.get_mut(&id).ok_or_else(|| Inconsistent(format!("layer {} does not exist", id.0)))
    }

    /// What a volume shows at `block`, and for how many blocks from there, at most `limit`, that goes on.
    pub fn view(&self, volume: &Volume, block: u64, limit: u32) -> (Entry, u32) {
        match &volume.index {
            Index::Ready(map) => map.run(block, limit),
            Index::Top | Index::Building { .. } => self.resolve(volume.top, block, limit),
        }
    }

    /// The same for a layer and its ancestors, at a cost that grows with their number.
    pub fn resolve(&self, layer: LayerId, block: u64, mut limit: u32) -> (Entry, u32) {
        let mut next = Some(layer);
        while let Some(layer) = next.and_then(|id| self.layers.get(&id)) {
            let (entry, count) = layer.map.run(block, limit);
            limit = count;
            if entry != Entry::Absent {
                return (entry, count);
            }
            next = layer.parent;
        }
        (Entry::Absent, limit)
    }

    /// The layer and its ancestors, newest first.
    pub fn path(&self, layer: LayerId) -> impl Iterator<Item = (LayerId, &Layer)> {
        let first = self.layers.get(&layer).map(|found| (layer, found));
        std::iter::successors(first, |(_, layer)| {
            let parent = layer.parent?;
            self.layers.get(&parent).map(|found| (parent, found))
        })
    }

    fn map(&mut self, id: LayerId, extent: Extent, retire: Retire<'_>) -> Result<(), Inconsistent> {
        let layer = self.layer_mut(id)?;
        layer.map.replace(extent.start, extent.count, extent.entry, &mut |old| retire_data(old, retire));
        let role = layer.role;
        if let Role::Top(volume) = role
            && let Some(volume) = self.volumes.get_mut(&volume)
        {
            match &mut volume.index {
                // While the top itself is being copied into the index both orders give the same; before that stage the
                // copying will find the entry in the top.
                Index::Building { map, stage, .. } if *stage == id => set(map, extent),
                Index::Ready(map) => set(map, extent),
                Index::Top | Index::Building { .. } => {}
            }
        }
        Ok(())
    }

    fn new_layer(&mut self, id: LayerId, parent: Option<LayerId>) -> Result<(), Inconsistent> {
        if id.0 < self.next_layer {
            return Err(Inconsistent(format!("layer {} is made twice", id.0)));
        }
        if let Some(parent) = parent {
            self.layer_mut(parent)?.children.push(id);
        }
        self.next_layer = id.0 + 1;
        self.layers.insert(id, Layer::new(parent));
        Ok(())
    }

    /// A new volume, or a volume that goes on in a new layer above its top, which loses its name.
    fn name_volume(
        &mut self,
        id: VolumeId,
        top: LayerId,
        size: VolumeSize,
        verify_reads: bool,
    ) -> Result<(), Inconsistent> {
        let layer = self.layer(top)?;
        if layer.role != Role::Nameless || !layer.children.is_empty() || !layer.map.is_empty() {
            return Err(Inconsistent(format!("layer {} cannot be the top of volume {id}", top.0)));
        }
        let parent = layer.parent;
        let old = self.volumes.remove(&id);
        if let Some(old) = &old {
            if parent != Some(old.top) {
                return Err(Inconsistent(format!("volume {id} cannot go on in layer {}", top.0)));
            }
            self.layer_mut(old.top)?.role = Role::Nameless;
        }
        let in_flight = old.as_ref().map_or(0, |old| old.in_flight);
        let index = match old {
            // The new top is empty: what the volume shows is the same as before. O(1), however fragmented it is.
            Some(Volume { index: Index::Top, top: sealed, .. }) => Index::Ready(self.layer(sealed)?.map.clone()),
            Some(Volume { index, .. }) => index,
            None => self.new_index(top),
        };
        self.layer_mut(top)?.role = Role::Top(id);
        self.volumes.insert(id, Volume { top, size, verify_reads, index, in_flight });
        Ok(())
    }

    /// The index of a volume whose layers are not in any index yet.
    pub fn new_index(&self, top: LayerId) -> Index {
        match self.path(top).skip(1).last() {
            Some((root, _)) => Index::Building { map: Map::new(), stage: root, cursor: 0 },
            None => Index::Top,
        }
    }

    /// Moves what `id` has below block `end`, and its only child lacks, into that child. What any reader sees stays the
    /// same.
    fn merge(&mut self, id: LayerId, child_id: LayerId, end: u64, retire: Retire<'_>) -> Result<(), Inconsistent> {
        if !self.layer(id)?.children.contains(&child_id) {
            return Err(Inconsistent(format!("layer {} is no child of layer {}", child_id.0, id.0)));
        }
        let mut layer = self.layers.remove(&id).ok_or_else(|| Inconsistent(format!("no layer {}", id.0)))?;
        let child = self.layer_mut(child_id)?;
        // Blocks without a checksum come to it. Not from a layer without data: what has rotted in the child would be summed anew.
        child.checksummed &= layer.checksummed || layer.map.data_blocks() == 0;
        let moved: Vec<Extent> = layer.map.extents().take_while(|extent| extent.start < end).collect();
        for extent in moved {
            let extent = Extent { count: (end - extent.start).min(u64::from(extent.count)) as u32, ..extent };
            layer.map.replace(extent.start, extent.count, Entry::Absent, &mut |_| {});
            // Below the root everything is zeros: an explicit zero says nothing there.
            let needless = layer.parent.is_none() && extent.entry == Entry::Zero;
            let mut done = 0;
            while done < extent.count {
                let start = extent.start + u64::from(done);
                let (there, count) = child.map.run(start, extent.count - done);
                let piece = Extent { start, count, entry: extent.entry.advanced(done) };
                if there != Entry::Absent {
                    retire_data(piece, retire);
                } else if !needless {
                    child.map.replace(start, count, piece.entry, &mut |_| {});
                }
                done += count;
            }
        }
        self.layers.insert(id, layer);
        Ok(())
    }

    /// Takes a layer that has nothing left out of the path between its only child and its parent.
    fn remove_merged(&mut self, id: LayerId, child_id: LayerId) -> Result<(), Inconsistent> {
        let parent = self.layer(id)?.parent;
        self.layers.remove(&id);
        self.layer_mut(child_id)?.parent = parent;
        if let Some(parent) = parent {
            for sibling in &mut self.layer_mut(parent)?.children {
                if *sibling == id {
                    *sibling = child_id;
                }
            }
        }
        for volume in self.volumes.values_mut() {
            if parent.is_none() && volume.top == child_id {
                self.discarded.extend(std::mem::replace(&mut volume.index, Index::Top).into_map());
            }
            match &mut volume.index {
                // What it had not copied yet is in the child now.
                Index::Building { stage, cursor, .. } if *stage == id => (*stage, *cursor) = (child_id, 0),
                Index::Building { .. } | Index::Top | Index::Ready(_) => {}
            }
        }
        Ok(())
    }

    fn free(&mut self, id: LayerId, retire: Retire<'_>) -> Result<(), Inconsistent> {
        let layer = self.layer(id)?;
        if !layer.children.is_empty() || layer.role != Role::Nameless {
            return Err(Inconsistent(format!("layer {} is freed and in use", id.0)));
        }
        let parent = layer.parent;
        if let Some(layer) = self.layers.remove(&id) {
            layer.map.extents().for_each(|extent| retire_data(extent, retire));
        }
        if let Some(parent) = parent {
            self.layer_mut(parent)?.children.retain(|child| *child != id);
        }
        Ok(())
    }
}

fn retire_data(extent: Extent, retire: Retire<'_>) {
    if let Entry::Data(physical) = extent.entry {
        retire(physical, extent.count);
    }
}

fn set(map: &mut Map, extent: Extent) {
    map.replace(extent.start, extent.count, extent.entry, &mut |_| {});
}

fn unknown(record: &Record) -> Inconsistent {
    Inconsistent(format!("nothing that the record is about exists, or it does already: {record:?}"))
}
