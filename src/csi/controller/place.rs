//! Where a new volume goes, and GetCapacity: what could go where.
//!
//! Invariants: a node that does not answer is never chosen; where one of those might be the only place, the answer is "not
//! now" with its name, and nothing is made, until it has been silent for so long that it may be gone for good. The replica has
//! the last word on bytes.

use super::create::smallest;
use super::mirror::copies;
use super::request::{Capacity, NewVolume};
use super::{Controller, names, response};
use crate::catalog::{NodeName, Reach};
use crate::csi::errors::{CapacityError, CreateVolumeError, Transient};
use crate::csi::nodes::Pools;
use crate::placement::{self, Choice, Place, Refusal, Wanted};
use crate::rpc::csi;
use crate::volume::VolumeSize;
use std::collections::BTreeSet;

impl Controller {
    /// The places for the copies of a volume of this size, the best first.
    pub(super) async fn place(
        &self,
        wanted: &NewVolume,
        size: VolumeSize,
        preferred: &[Place],
    ) -> Result<Vec<Choice>, CreateVolumeError> {
        let Pools { pools, silent, gone } = self.nodes.pools().await?;
        if pools.is_empty() && silent.is_empty() && gone.is_empty() {
            return Err(Transient::NoNode("there is no node with a pool".to_owned()).into());
        }
        let asked = Wanted {
            pool: &wanted.parameters.pool,
            bytes: certain(size),
            copies: copies(wanted.parameters.replication),
            // A volume that every node reaches may have its copies anywhere.
            requisite: if wanted.parameters.reach == Reach::Any { &[] } else { &wanted.places.requisite },
            preferred,
        };
        let refusal = match placement::choose(&pools, &asked) {
            Ok(choices) => return Ok(choices),
            Err(refusal) => refusal,
        };
        let may_help = |node: &NodeName| asked.copies > 1 || wanted.places.include(node);
        let silent = silent.into_iter().find(|(node, _)| may_help(node));
        // Nobody says of a pool that was there that the class is wrong.
        let unknown = matches!(refusal, Refusal::UnknownPool { .. });
        match silent.or(gone.into_iter().next().filter(|_| unknown)) {
            Some((_, error)) => Err(Transient::Replica(error).into()),
            None => Err(refusal.into()),
        }
    }

    /// A volume with one copy and a source goes where the source is, on a node that answers.
    pub(super) async fn place_beside(
        &self,
        wanted: &NewVolume,
        source: &BTreeSet<NodeName>,
    ) -> Result<NodeName, CreateVolumeError> {
        let mut holders: Vec<_> = source.iter().filter_map(|holder| self.nodes.name_of(Some(holder))).collect();
        if holders.is_empty() {
            holders.extend(self.nodes.name_of(None));
        }
        // The caller's order, then any.
        let preferred =
            wanted.places.preferred.iter().flat_map(|place| holders.iter().filter(|node| place.includes(node)));
        let mut possible: Vec<_> = preferred.chain(&holders).filter(|holder| wanted.places.include(holder)).collect();
        let (mut seen, mut silent) = (BTreeSet::new(), None);
        possible.retain(|holder| seen.insert(*holder));
        for holder in possible {
            if self.nodes.is_alone() {
                return Ok(holder.clone());
            }
            match self.nodes.answers(holder).await {
                Ok(()) => return Ok(holder.clone()),
                Err(error) => silent = silent.or(Some(error)),
            }
        }
        if let Some(error) = silent {
            return Err(error.into());
        }
        let holders = names(&holders);
        let text = format!("the source is on {holders}, and the volume must be reachable from other nodes only");
        Err(CreateVolumeError::NotHere(text))
    }

    /// What can be created with these parameters at this place. A pool that is not there has no room.
    pub async fn capacity(&self, wanted: Capacity) -> Result<csi::GetCapacityResponse, CapacityError> {
        self.can_replicate(wanted.parameters.replication)?;
        let Pools { mut pools, silent, .. } = self.nodes.pools().await?;
        // A volume that every node reaches may have its copies anywhere.
        let topology = wanted.topology.filter(|_| wanted.parameters.reach == Reach::Local);
        let place = topology.unwrap_or(Place::Anywhere);
        if let Some((_, error)) = silent.into_iter().find(|(node, _)| place.includes(node)) {
            // Less than there is would be believed.
            return Err(Transient::Replica(error).into());
        }
        let (pool, copies) = (wanted.parameters.pool.as_str(), copies(wanted.parameters.replication));
        let asked = Wanted { pool, bytes: 1, copies, requisite: std::slice::from_ref(&place), preferred: &[] };
        let largest = placement::largest(&pools, &asked);
        pools.retain(|known| known.pool == pool && place.includes(&known.node));
        // Of several copies, what the smallest of them leaves is all that is certain.
        let free = pools.iter().map(|pool| pool.free).fold(0, u64::saturating_add);
        let available = if copies > 1 { largest } else { free };
        let minimum = smallest(wanted.parameters.fs_type, &wanted.access);
        Ok(csi::GetCapacityResponse {
            available_capacity: response::bytes(available),
            maximum_volume_size: Some(response::bytes(largest)),
            minimum_volume_size: Some(response::bytes(minimum)),
        })
    }
}

/// What a pool must be able to take for certain: what it announces is rounded down to whole MiB, so about the rest of the
/// size its replica decides.
pub(super) fn certain(size: VolumeSize) -> u64 {
    const MIB: u64 = 1 << 20;
    size.bytes() / MIB * MIB
}

impl From<Refusal> for CreateVolumeError {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::UnknownPool { pool, known } => Self::UnknownPool { pool, place: "on any node".to_owned(), known },
            Refusal::NotThere { .. } => Self::NotHere(text),
            Refusal::TooFewNodes { .. } | Refusal::NoRoom { .. } => Self::NoRoom(text),
        }
    }
}
