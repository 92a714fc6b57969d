//! What a volume is made from: found, or taken for it.
//!
//! Invariants: where copies are mirrored there is a snapshot first, since only a snapshot is the same on several copies; one
//! that was taken for a clone alone is known to nobody, and goes when the clone is made or given up. A copy that is no
//! clone begins empty and is no member: the primary, which is a clone, fills it.

use super::create::short;
use super::mirror::copies;
use super::request::{NewVolume, WantedSource};
use super::snapshot::transient;
use super::{Controller, names};
use crate::catalog::{
    Base, CopySpec, MirrorSpec, NodeName, Replication, Snapshot, SnapshotStatus, Source, Stored, Volume, VolumePhase,
};
use crate::csi::control::ControlError;
use crate::csi::errors::{CreateSnapshotError, CreateVolumeError, Transient};
use crate::csi::operations::{Operation, Subject};
use crate::placement::Place;
use crate::rpc::control;
use crate::volume::{InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};

/// A source that exists.
pub(super) struct Found {
    pub source: Source,
    pub size: VolumeSize,
    /// Who holds it.
    pub holders: BTreeSet<NodeName>,
    /// In which trees, if its volume is mirrored: another one of the same node may have something else under its id.
    trees: BTreeSet<InstanceId>,
    /// The snapshot, also one that was taken for this volume alone.
    pub snapshot: Option<SnapshotId>,
    /// Of that: nobody sweeps it away before there is a volume that names it.
    taken: Option<Operation>,
}

impl Found {
    fn at(source: Source, snapshot: &Snapshot, taken: Option<Operation>) -> Option<Self> {
        match snapshot.status {
            SnapshotStatus::Ready { size, .. } => {
                let (holders, trees) = (snapshot.holders(), snapshot.copies.keys().copied().collect());
                Some(Self { source, size, holders, trees, snapshot: Some(snapshot.id), taken })
            }
            SnapshotStatus::Creating => None,
        }
    }

    /// The snapshot that was taken for this volume alone, which nobody needs.
    pub fn give_up(self) -> Option<SnapshotId> {
        self.taken.and(self.snapshot)
    }
}

/// Where a volume shall be, and what its copies begin with.
#[derive(Default)]
pub(super) struct Placed {
    pub node: Option<NodeName>,
    pub mirror: Option<MirrorSpec>,
    pub base: Option<Base>,
}

impl Controller {
    /// What the volume with this id shall be made from.
    pub(super) async fn look_up_source(
        &self,
        id: VolumeId,
        wanted: &NewVolume,
        source: &WantedSource,
    ) -> Result<Found, CreateVolumeError> {
        match source {
            WantedSource::Snapshot(text) => {
                let missing = || CreateVolumeError::SourceNotFound(format!("snapshot {}", short(text)));
                let id = text.parse().map_err(|_| missing())?;
                let snapshot = self.get::<Snapshot>(id).await?.map(|stored| stored.object);
                let snapshot = snapshot.filter(Snapshot::is_visible).ok_or_else(missing)?;
                Found::at(Source::Snapshot(id), &snapshot, None).ok_or_else(missing)
            }
            WantedSource::Volume(text) => {
                let missing = || CreateVolumeError::SourceNotFound(format!("volume {}", short(text)));
                let source = text.parse().map_err(|_| missing())?;
                let volume = self.get::<Volume>(source).await?.map(|stored| stored.object);
                let volume = volume.filter(Volume::is_visible).ok_or_else(missing)?;
                if volume.spec.mirror.is_some() || wanted.parameters.replication != Replication::None {
                    let (snapshot, taken) = self.take_for(id, &volume).await?;
                    return Found::at(Source::Volume(source), &snapshot, Some(taken)).ok_or_else(missing);
                }
                let (size, holders) = (volume.status.size, self.holders(&volume).into_iter().collect());
                let (source, trees) = (Source::Volume(source), BTreeSet::new());
                Ok(Found { source, size, holders, trees, snapshot: None, taken: None })
            }
        }
    }

    /// A snapshot for one clone alone.
    async fn take_for(&self, clone: VolumeId, volume: &Volume) -> Result<(Snapshot, Operation), CreateVolumeError> {
        self.take_hidden(clone, volume).await.map_err(|error| match error {
            CreateSnapshotError::NoRoom(text) => CreateVolumeError::NoRoom(text),
            CreateSnapshotError::SourceNotFound(text) => CreateVolumeError::SourceNotFound(format!("volume {text}")),
            CreateSnapshotError::Transient(error) => error.into(),
            CreateSnapshotError::Argument(error) => error.into(),
            CreateSnapshotError::NotHere(text) => CreateVolumeError::NotHere(text),
            CreateSnapshotError::Incompatible { .. } => CreateVolumeError::Refused(error.to_string()),
        })
    }

    /// A snapshot that nobody sees, and that the sweep takes away when no volume with that id is being made.
    pub(super) async fn take_hidden(
        &self,
        made_for: VolumeId,
        volume: &Volume,
    ) -> Result<(Snapshot, Operation), CreateSnapshotError> {
        let sealing = self.sealing(volume)?;
        let wanted = Snapshot::wanted(SnapshotId::random(), volume.id, sealing.node);
        let stored = self.create(Snapshot { strays: sealing.strays, made_for: Some(made_for), ..wanted }).await?;
        let operation = self.start(Subject::Snapshot(stored.object.id))?;
        Ok((self.take_snapshot(stored).await?, operation))
    }

    /// Whether the snapshot that the volume begins with is still there. Asked when the volume is written down: from then on
    /// nobody deletes it, see [`Controller::erase_snapshot`].
    pub(super) async fn base_is_there(&self, volume: &Volume) -> Result<bool, Transient> {
        let Some(base) = &volume.spec.base else { return Ok(true) };
        let snapshot = self.get::<Snapshot>(base.snapshot).await?.map(|stored| stored.object);
        Ok(snapshot.is_some_and(|snapshot| !snapshot.deleted && snapshot.status != SnapshotStatus::Creating))
    }

    /// The snapshot that was taken for this volume alone is not needed any more. What cannot be done now is done later.
    pub(super) async fn drop_made_for(&self, clone: VolumeId, snapshot: Option<SnapshotId>) {
        let Some(id) = snapshot else { return };
        let dropped = async {
            let Some(stored) = self.get::<Snapshot>(id).await? else { return Ok(()) };
            if stored.object.made_for != Some(clone) {
                return Ok(());
            }
            let _snapshot = self.start(Subject::Snapshot(id))?;
            self.erase_snapshot(stored).await.map_err(transient)
        };
        if let Err(error) = dropped.await {
            tracing::info!(snapshot = %id, volume = %clone, %error, "a snapshot that was taken for a clone goes later");
        }
    }

    /// Whether nobody needs a snapshot any more that was taken for a clone.
    pub(super) async fn is_left_over(&self, snapshot: &Snapshot) -> Result<bool, Transient> {
        let Some(clone) = snapshot.made_for else { return Ok(false) };
        let clone = self.get::<Volume>(clone).await?;
        Ok(clone.is_none_or(|stored| stored.object.status.phase == VolumePhase::Ready))
    }

    /// A volume that is being made from the snapshot.
    pub(super) async fn being_made_from(&self, snapshot: SnapshotId) -> Result<Option<VolumeId>, Transient> {
        let needs = |stored: &Stored<Volume>| {
            let Volume { spec, status, .. } = &stored.object;
            let from = spec.base.as_ref().is_some_and(|base| base.snapshot == snapshot);
            from && status.phase == VolumePhase::Creating && !spec.deleted
        };
        Ok(self.all::<Volume>().await?.iter().find(|stored| needs(stored)).map(|stored| stored.object.id))
    }

    /// Copies of a volume that begin with a snapshot: the best places are those that hold it.
    pub(super) async fn place_clones(
        &self,
        wanted: &NewVolume,
        size: VolumeSize,
        found: &Found,
        snapshot: SnapshotId,
    ) -> Result<Placed, CreateVolumeError> {
        let there = self.trees_with(snapshot, found, &wanted.parameters.pool, size).await?;
        // The caller's order among those that hold it, then all of those, then the caller's order.
        let mut preferred: Vec<_> = wanted.places.preferred.clone();
        preferred.retain(|place| there.keys().any(|node| place.includes(node)));
        preferred.extend(there.keys().cloned().map(Place::Node));
        preferred.extend(wanted.places.preferred.iter().cloned());
        let choices = self.place(wanted, size, &preferred).await?;
        debug_assert_eq!(choices.len(), copies(wanted.parameters.replication));
        let copy = |node: &NodeName| there.get(node).copied();
        let clones: BTreeSet<_> = choices.iter().filter_map(|choice| copy(&choice.node)).collect();
        let primary = choices.iter().find_map(|choice| copy(&choice.node)).ok_or_else(|| {
            let holders = names(there.keys());
            CreateVolumeError::NotHere(format!("the source is on {holders}, and none of the copies would be there"))
        })?;
        let spec = choices.into_iter().map(|choice| {
            let id = copy(&choice.node).unwrap_or_else(InstanceId::random);
            (id, CopySpec { node: choice.node, pool: choice.pool })
        });
        let mirror = Some(MirrorSpec { primary: Some(primary), ..MirrorSpec::new(spec.collect()) });
        Ok(Placed { node: None, mirror, base: Some(Base { snapshot, clones }) })
    }

    /// The trees with the snapshot in pools of this name, by node. A copy that had grown before the others is in none: its
    /// snapshot is larger than the volume that is made from it.
    async fn trees_with(
        &self,
        snapshot: SnapshotId,
        found: &Found,
        pool: &str,
        size: VolumeSize,
    ) -> Result<BTreeMap<NodeName, InstanceId>, CreateVolumeError> {
        let (text, mut there, mut elsewhere, mut silent) = (snapshot.to_string(), BTreeMap::new(), None, None);
        for node in &found.holders {
            let snapshots = match self.nodes.holder(Some(node)).await?.snapshots().await {
                Ok(snapshots) => snapshots,
                Err(error) => {
                    silent = Some(error);
                    continue;
                }
            };
            let fits = |held: &control::Snapshot| held.snapshot_id == text && held.size_bytes <= size.bytes();
            let Some(held) = snapshots.into_iter().find(fits) else { continue };
            match held.copy_id.parse() {
                Ok(tree) if !found.trees.is_empty() && !found.trees.contains(&tree) => {}
                Ok(tree) if held.pool == pool => _ = there.insert(node.clone(), tree),
                Ok(_) | Err(_) => elsewhere = Some(held.pool),
            }
        }
        if there.is_empty() {
            return Err(match (elsewhere, silent) {
                (Some(found), _) => CreateVolumeError::Refused(format!(
                    "copies on several nodes are made in the pool of their source, {found:?}, not in {pool:?}"
                )),
                (None, Some(error)) => Transient::Replica(error).into(),
                (None, None) => {
                    Transient::Replica(ControlError::Unknown(format!("no node has snapshot {snapshot} that should")))
                        .into()
                }
            });
        }
        Ok(there)
    }
}
