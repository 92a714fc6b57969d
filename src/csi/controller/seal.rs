//! How snapshots are taken, and taken away, where volumes may have several copies: one point of each volume's stream of
//! writes, the same on every copy.
//!
//! ```text
//!   nodes with other members: space promised ─> node of the primaries: sealed, on every member ─> the same nodes: adopted
//! ```
//! # Invariants
//! * While it is taken, every node with a copy is a *stray*: it may have something under the id. When it is ready, its
//!   holders are the copies that were members when the seal was acknowledged, and each has adopted it. A copy that was
//!   being brought up to date may have followed the seal half way: it is no holder.
//! * An id is sealed at most once: what an attempt without an answer may have left is deleted everywhere, under its own
//!   id, and the next attempt has another one.
//! * A snapshot is deleted on holders and strays, on the node that takes it first: what that one still does ends before. From
//!   the first node on that has erased it, or may have, it is not taken back: whoever restored it would find it on some only.

use super::snapshot::transient;
use super::{Controller, names};
use crate::catalog::{Descriptor, NodeName, Snapshot, SnapshotStatus, Stored, Volume};
use crate::csi::control::{Control, ControlError};
use crate::csi::errors::{DeleteSnapshotError, Transient};
use crate::csi::operations::Subject;
use crate::rpc::control::{self, DeleteSnapshotRequest, ensure_snapshots_request::Item};
use crate::volume::{InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};

/// Where a snapshot is taken.
pub(in crate::csi) struct Sealing {
    /// `None`: the only node that there is.
    pub node: Option<NodeName>,
    /// Every node with a copy of a mirrored volume.
    pub strays: BTreeSet<NodeName>,
}

/// A snapshot that was taken.
pub(in crate::csi) struct Sealed {
    pub status: SnapshotStatus,
    /// Of a mirrored volume: who has it.
    pub copies: BTreeMap<InstanceId, NodeName>,
}

/// What became of a deletion.
pub(in crate::csi) enum Erased {
    /// No node has it any more.
    Everywhere,
    /// Some have erased it, and others did not: the first of them says why.
    Partly(Transient),
}

/// Why snapshots were not taken.
pub(in crate::csi) enum SealError {
    /// For good, as long as no space is made.
    NoRoom(String),
    /// For good.
    NotFound(String),
    /// Some copies may have something.
    Transient(Transient),
}

impl<T: Into<Transient>> From<T> for SealError {
    fn from(error: T) -> Self {
        Self::Transient(error.into())
    }
}

impl SealError {
    fn refused(node: &NodeName, error: ControlError) -> Self {
        match error {
            ControlError::NoRoom(text) => Self::NoRoom(format!("node {node}: {text}")),
            error => Self::Transient(error.into()),
        }
    }
}

impl Controller {
    /// Where snapshots of this volume are taken: where its primary shall be.
    pub(in crate::csi) fn sealing(&self, volume: &Volume) -> Result<Sealing, Transient> {
        let Some(mirror) = &volume.spec.mirror else {
            return Ok(Sealing { node: volume.spec.node.clone(), strays: BTreeSet::new() });
        };
        let primary = mirror.primary.and_then(|copy| mirror.copies.get(&copy));
        let primary = primary.ok_or(Transient::NoPrimary(volume.id))?;
        let strays = mirror.copies.values().map(|copy| copy.node.clone()).collect();
        Ok(Sealing { node: Some(primary.node.clone()), strays })
    }

    /// Has `node` take snapshots of these volumes at one point in time.
    pub(in crate::csi) async fn seal(
        &self,
        node: Option<&NodeName>,
        wanted: &[(SnapshotId, Volume)],
        descriptor: &str,
    ) -> Result<Vec<Sealed>, SealError> {
        let item = |snapshot: &SnapshotId, volume: &Volume| Item {
            snapshot_id: snapshot.to_string(),
            volume_id: volume.id.to_string(),
            descriptor: descriptor.to_owned(),
        };
        let mut others: BTreeMap<NodeName, Vec<Item>> = BTreeMap::new();
        for (snapshot, volume) in wanted {
            for other in self.other_members(volume, node).await? {
                others.entry(other).or_default().push(item(snapshot, volume));
            }
        }
        for (other, items) in others {
            let promised = self.nodes.holder(Some(&other)).await?.promise(items).await;
            promised.map_err(|error| SealError::refused(&other, error))?;
        }
        let items = wanted.iter().map(|(snapshot, volume)| item(snapshot, volume)).collect();
        let answers = self.nodes.holder(node).await?.seal(items).await.map_err(|error| match error {
            ControlError::NoRoom(text) => SealError::NoRoom(text),
            ControlError::NotFound(text) => SealError::NotFound(text),
            error => error.into(),
        })?;
        let mut taken = Vec::new();
        let mut adopt: BTreeMap<NodeName, Vec<Item>> = BTreeMap::new();
        for (snapshot, volume) in wanted {
            let sealed = sealed(*snapshot, volume, &answers)?;
            for holder in sealed.copies.values().filter(|holder| Some(*holder) != node) {
                adopt.entry(holder.clone()).or_default().push(item(snapshot, volume));
            }
            taken.push(sealed);
        }
        for (other, items) in adopt {
            self.nodes.holder(Some(&other)).await?.adopt(items).await?;
        }
        Ok(taken)
    }

    /// Nodes of a mirrored volume's members, but for that one.
    async fn other_members(&self, volume: &Volume, but: Option<&NodeName>) -> Result<BTreeSet<NodeName>, Transient> {
        let Some(mirror) = &volume.spec.mirror else { return Ok(BTreeSet::new()) };
        let configuration = self.configuration(volume.id).await?;
        let is_member = |copy: &InstanceId| configuration.as_ref().is_some_and(|now| now.is_member(*copy));
        let members = mirror.copies.iter().filter(|(copy, _)| is_member(copy)).map(|(_, spec)| spec.node.clone());
        Ok(members.filter(|node| Some(node) != but).collect())
    }

    /// The nodes that the volume's copies are on now, if it is mirrored.
    pub(in crate::csi) async fn mirrored_on(&self, volume: VolumeId) -> Result<BTreeSet<NodeName>, Transient> {
        let mirror = self.get::<Volume>(volume).await?.and_then(|stored| stored.object.spec.mirror);
        Ok(mirror.iter().flat_map(|mirror| mirror.copies.values()).map(|copy| copy.node.clone()).collect())
    }

    /// The object gives up its name, and is deleted by whoever has the time, on these nodes, too. Needs the name's operation.
    pub(in crate::csi) async fn give_up(
        &self,
        stored: Stored<Snapshot>,
        strays: &BTreeSet<NodeName>,
    ) -> Result<(), Transient> {
        let _snapshot = self.start(Subject::Snapshot(stored.object.id))?;
        self.same(&stored).await?;
        self.write_given_up(stored, strays).await
    }

    /// Needs the snapshot's operation (or that nobody knows its id).
    pub(super) async fn write_given_up(
        &self,
        stored: Stored<Snapshot>,
        strays: &BTreeSet<NodeName>,
    ) -> Result<(), Transient> {
        let mut object = Snapshot { name: None, group: None, deleted: true, ..stored.object.clone() };
        object.strays.extend(strays.iter().cloned());
        if object != stored.object {
            self.update(Stored { object, ..stored }).await?;
        }
        Ok(())
    }

    /// The nodes forget the snapshot: the one that takes it, and the others that hold it or may have something of it. An error
    /// that says that it is in use means that no node has forgotten it.
    pub(in crate::csi) async fn erase_sealed(
        &self,
        id: SnapshotId,
        node: Option<&NodeName>,
        others: &BTreeSet<NodeName>,
    ) -> Result<Erased, DeleteSnapshotError> {
        let others = others.iter().map(Some).filter(|other| *other != node);
        let mut place = self.place_of(id).await?;
        // A member of a group that was never written down.
        place.mirrored |= others.clone().next().is_some();
        let (mut erased, mut left) = (false, None);
        for holder in std::iter::once(node).chain(others) {
            match self.erase_on(id, holder, &place).await {
                Ok(()) => erased = true,
                Err(error @ DeleteSnapshotError::InUse { .. }) if !erased && left.is_none() => return Err(error),
                // A node that is away, or refuses, does not keep the others from freeing their space.
                Err(error) => left = left.or(Some(transient(error))),
            }
        }
        match left {
            None => Ok(Erased::Everywhere),
            Some(error) if erased => Ok(Erased::Partly(error)),
            Some(error) => Err(error.into()),
        }
    }

    async fn erase_on(
        &self,
        id: SnapshotId,
        node: Option<&NodeName>,
        place: &Place,
    ) -> Result<(), DeleteSnapshotError> {
        if self.gives_up_snapshot(node, id).await? {
            return Ok(());
        }
        forget(&self.nodes.holder(node).await?.control, id, place).await
    }

    /// As far as the catalogue still knows the snapshot and its volume.
    async fn place_of(&self, id: SnapshotId) -> Result<Place, Transient> {
        let Some(Stored { object: snapshot, .. }) = self.get::<Snapshot>(id).await? else {
            return Ok(Place::default());
        };
        let pool = self.get::<Volume>(snapshot.volume).await?.map(|stored| stored.object.request.pool);
        Ok(Place { pool: pool.unwrap_or_default(), mirrored: snapshot.is_mirrored() })
    }
}

/// Where a node may have something of a snapshot.
#[derive(Default)]
pub(super) struct Place {
    /// Empty: that is not known.
    pool: String,
    /// Copies may have followed its seal without being told.
    mirrored: bool,
}

/// The replica forgets the snapshot.
pub(super) async fn forget(control: &Control, id: SnapshotId, place: &Place) -> Result<(), DeleteSnapshotError> {
    let Place { pool, mirrored } = place;
    let request = DeleteSnapshotRequest { snapshot_id: id.to_string(), pool: pool.clone(), mirrored: *mirrored };
    match control.client().delete_snapshot(request).await.map_err(|status| control.refusal(status)) {
        Ok(_) | Err(ControlError::NotFound(_)) => Ok(()),
        Err(ControlError::InUse(by)) => Err(DeleteSnapshotError::InUse { id, by }),
        Err(error @ (ControlError::Unknown(_) | ControlError::NoRoom(_) | ControlError::Refused(_))) => {
            Err(Transient::Replica(error).into())
        }
    }
}

/// What the replica says of one of the snapshots that it took.
fn sealed(id: SnapshotId, volume: &Volume, answers: &[control::Snapshot]) -> Result<Sealed, Transient> {
    let unusable = |what: String| Transient::Replica(ControlError::Unknown(format!("snapshot {id}: {what}")));
    let text = id.to_string();
    let answer = answers.iter().find(|snapshot| snapshot.snapshot_id == text);
    let answer = answer.ok_or_else(|| unusable("it is not in the answer".to_owned()))?;
    let size = VolumeSize::try_from(answer.size_bytes).map_err(|error| unusable(error.to_string()))?;
    let status = SnapshotStatus::Ready { size, created_ms: answer.created_ms };
    let mut copies = BTreeMap::new();
    if let Some(mirror) = &volume.spec.mirror {
        let has_it: BTreeSet<InstanceId> = answer.copies.iter().filter_map(|copy| copy.parse().ok()).collect();
        let holders = mirror.copies.iter().filter(|(copy, _)| has_it.contains(*copy));
        copies.extend(holders.map(|(copy, spec)| (*copy, spec.node.clone())));
        if copies.is_empty() {
            return Err(unusable(format!("no copy of volume {} is said to have it", volume.id)));
        }
    }
    Ok(Sealed { status, copies })
}

/// What nodes say of a snapshot that was taken before. Of a mirrored volume it is the snapshot where its descriptor lies
/// beside it: elsewhere it is what a copy has followed in the middle of its resync.
pub(super) fn found(answers: &[(NodeName, control::Snapshot)], mirrored: bool) -> Option<Sealed> {
    let is_it = |answer: &&(NodeName, control::Snapshot)| !mirrored || is_described(&answer.1);
    let holders: Vec<_> = answers.iter().filter(is_it).collect();
    let (_, first) = holders.first()?;
    let size = VolumeSize::try_from(first.size_bytes).ok()?;
    let copy = |(node, held): &&(NodeName, control::Snapshot)| Some((held.copy_id.parse().ok()?, node.clone()));
    let copies = if mirrored { holders.iter().filter_map(copy).collect() } else { BTreeMap::new() };
    Some(Sealed { status: SnapshotStatus::Ready { size, created_ms: first.created_ms }, copies })
}

/// Whether the node was told that it is the snapshot.
pub(super) fn is_described(sealed: &control::Snapshot) -> bool {
    matches!(Descriptor::decode(&sealed.descriptor), Some(Descriptor::Snapshot { .. }))
}

/// The snapshot, now that it was taken.
pub(in crate::csi) fn ready(snapshot: Snapshot, Sealed { status, copies }: Sealed) -> Snapshot {
    let holders: BTreeSet<_> = copies.values().collect();
    let strays: BTreeSet<_> = snapshot.strays.iter().filter(|node| !holders.contains(node)).cloned().collect();
    if !strays.is_empty() {
        tracing::warn!(snapshot = %snapshot.id, without = names(&strays), "a snapshot is not on every node with a copy");
    }
    Snapshot { status, copies, strays, ..snapshot }
}
