//! How many copies a volume has, and where, changes while it is in use.
//!
//! Invariants: a copy that has everything stays, where the volume is used if it is; more copies are placed as those of a
//! new volume, and nothing is changed where there is no place; a volume that had one copy keeps it under the id of its
//! tree, as the only member, and the others begin with nothing. One that is to have one copy again stays what it is: a
//! mirror with one member, which needs no lease and sends nothing.

use super::Controller;
use super::mirror::copies;
use super::place::certain;
use crate::catalog::{CopySpec, MirrorSpec, NodeName, Replication, Volume, VolumeConfiguration};
use crate::csi::control::ControlError;
use crate::csi::errors::{ModifyError, Transient};
use crate::csi::nodes::Pools;
use crate::placement::{self, Wanted};
use crate::protocol::{Configuration, Lacks, MAX_COPIES};
use crate::rpc::control::GetVolumeRequest;
use crate::volume::{InstanceId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// How many copies the volume shall have now.
pub(super) fn replication(volume: &Volume) -> Replication {
    let staying = volume.spec.mirror.as_ref().map_or(1, |mirror| mirror.staying().count());
    match u8::try_from(staying) {
        Ok(replicas) if replicas > 1 => Replication::Sync { replicas },
        Ok(_) | Err(_) => Replication::None,
    }
}

impl Controller {
    /// The copies that the volume shall have. Nothing is changed.
    pub(super) async fn plan_copies(&self, volume: &Volume, wanted: Replication) -> Result<MirrorSpec, ModifyError> {
        let count = copies(wanted);
        let mut mirror = match &volume.spec.mirror {
            Some(mirror) => mirror.clone(),
            None => self.only_copy(volume).await?,
        };
        let staying = mirror.staying().count();
        if staying < count {
            let more = self.more_copies(volume, &mirror, count - staying).await?;
            mirror.copies.extend(more);
        } else {
            let configuration = self.committed(volume.id).await?;
            keep_best(volume, &mut mirror, count, configuration.as_ref())?;
        }
        Ok(mirror)
    }

    /// A volume without replication as a mirror with one member.
    async fn only_copy(&self, volume: &Volume) -> Result<MirrorSpec, Transient> {
        if volume.spec.size != volume.status.size {
            // Its device may have the new size already. The sweep, or the repeated call, ends that first.
            return Err(Transient::Conflict(format!("size of volume {}", volume.id)));
        }
        let node = self.home(volume).await?;
        let request = GetVolumeRequest { volume_id: volume.id.to_string() };
        let answer = node.control.client().get_volume(request).await;
        let found = answer.map_err(|status| node.control.refusal(status))?.into_inner();
        let unnamed = |error| ControlError::Unknown(format!("volume {}: its copy has no name: {error}", volume.id));
        let copy: InstanceId = found.tree_id.parse().map_err(unnamed)?;
        let mut mirror = MirrorSpec::new([(copy, CopySpec { node: node.name, pool: found.pool })].into());
        mirror.primary = Some(copy);
        Ok(mirror)
    }

    /// So many more, on nodes that have none.
    pub(super) async fn more_copies(
        &self,
        volume: &Volume,
        mirror: &MirrorSpec,
        count: usize,
    ) -> Result<BTreeMap<InstanceId, CopySpec>, ModifyError> {
        if mirror.copies.len() + count > MAX_COPIES {
            return Err(moving(volume.id, mirror).into());
        }
        // Where the volume is used without a copy none is made meanwhile.
        let client = mirror.client.iter().map(|client| client.node.clone());
        let taken: BTreeSet<_> = mirror.copies.values().map(|copy| copy.node.clone()).chain(client).collect();
        let Pools { mut pools, silent, .. } = self.nodes.pools().await?;
        pools.retain(|pool| !taken.contains(&pool.node));
        let asked = Wanted {
            pool: &volume.request.pool,
            bytes: certain(volume.spec.size),
            copies: count,
            requisite: &[],
            preferred: &[],
        };
        match placement::choose(&pools, &asked) {
            Ok(choices) => {
                let copy = |choice: placement::Choice| CopySpec { node: choice.node, pool: choice.pool };
                Ok(choices.into_iter().map(|choice| (InstanceId::random(), copy(choice))).collect())
            }
            Err(refusal) => match silent.into_iter().find(|(node, _)| !taken.contains(node)) {
                Some((_, error)) => Err(Transient::Replica(error).into()),
                None => Err(ModifyError::NoRoom(format!("of the nodes without one, {refusal}"))),
            },
        }
    }

    /// The first configuration of a volume that had one copy: that one has everything, the others nothing. Level-triggered:
    /// one that is there stays. No other copy is there before it; a volume that has several and no configuration waits for
    /// `tandem recover`.
    pub(super) async fn begin_mirror(&self, volume: &Volume) -> Result<(), Transient> {
        let Some(mirror) = &volume.spec.mirror else { return Ok(()) };
        let Some(primary) = mirror.primary else { return Ok(()) };
        let is_alone = volume.status.copies.iter().eq([&primary]);
        if !is_alone || self.get::<VolumeConfiguration>(volume.id).await?.is_some() {
            return Ok(());
        }
        let mut first = Configuration::first(self.catalog.generation().await?, primary, BTreeSet::new());
        let others = mirror.copies.keys().filter(|copy| **copy != primary);
        first.candidates = others.map(|copy| (*copy, Lacks::Everything)).collect();
        self.create(VolumeConfiguration::new(volume.id, &first)).await?;
        Ok(())
    }
}

fn moving(id: VolumeId, mirror: &MirrorSpec) -> Transient {
    let leaving = mirror.leaving.iter().filter_map(|copy| mirror.copies.get(copy));
    let nodes = super::names(leaving.map(|copy| &copy.node).collect::<BTreeSet<_>>());
    Transient::Waiting { id, done: "replaced", nodes }
}

/// Keeps so many copies: where the volume is used before all others, then members, then what is or shall be primary.
fn keep_best(
    volume: &Volume,
    mirror: &mut MirrorSpec,
    count: usize,
    configuration: Option<&Configuration>,
) -> Result<(), Transient> {
    let is_used = |node: &NodeName| volume.spec.publications.contains_key(node);
    let is_member = |copy: InstanceId| configuration.is_some_and(|now| now.is_member(copy));
    let is_primary = |copy: InstanceId| configuration.is_some_and(|now| now.primary == Some(copy));
    // False comes before true.
    let rank = |copy: InstanceId| {
        let used = is_used(&mirror.copies[&copy].node);
        let leaves = mirror.leaving.contains(&copy);
        (!used, !is_member(copy), leaves, mirror.primary != Some(copy), !is_primary(copy), copy)
    };
    let mut best: Vec<_> = mirror.copies.keys().copied().collect();
    best.sort_by_key(|copy| rank(*copy));
    best.truncate(count);
    let Some(first) = best.first().copied().filter(|copy| is_member(*copy)) else {
        let nodes = best.first().map(|copy| mirror.copies[copy].node.to_string()).unwrap_or_default();
        return Err(Transient::Waiting { id: volume.id, done: "up to date", nodes });
    };
    mirror.copies.retain(|copy, _| best.contains(copy));
    mirror.leaving.clear();
    mirror.rebuild = None;
    if !mirror.primary.is_some_and(|copy| best.contains(&copy)) {
        mirror.primary = Some(first);
    }
    Ok(())
}

#[cfg(test)]
#[path = "replicas/tests.rs"]
mod tests;
