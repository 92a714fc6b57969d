//! ControllerPublishVolume, ControllerUnpublishVolume and ValidateVolumeCapabilities.
//!
//! Invariants: what is published is in the catalogue; a node never has more volumes than its limit, however many
//! publications run at once.

use super::Controller;
use super::create::short;
use super::mirror::{COPIES_LIMIT, LOOK_EVERY};
use super::names;
use super::request::{Publish, Unpublish, Validate};
use crate::catalog::{Access, AccessMode, NodeName, Publication, Reach, Stored, Volume};
use crate::csi::control::ControlError;
use crate::csi::errors::{PublishError, Transient, UnpublishError, ValidateError};
use crate::csi::operations::Subject;
use crate::rpc::control::GetVolumeRequest;
use crate::rpc::csi::ValidateVolumeCapabilitiesResponse;
use crate::volume::VolumeId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Publications under way, in order of arrival: each counts those before it as done, so that two that arrive together
/// cannot both take the last place.
#[derive(Default)]
pub(super) struct Publishing(Mutex<BTreeMap<u64, VolumeId>>);

struct Ticket<'a> {
    all: &'a Publishing,
    number: u64,
    earlier: BTreeSet<VolumeId>,
}

impl Publishing {
    fn enter(&self, volume: VolumeId) -> Ticket<'_> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = all.last_key_value().map_or(0, |(last, _)| last + 1);
        let earlier = all.values().copied().collect();
        all.insert(number, volume);
        Ticket { all: self, number, earlier }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.all.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

impl Controller {
    /// The volume may be used on the node, afterwards.
    pub async fn publish(&self, wanted: Publish) -> Result<(), PublishError> {
        let missing = || PublishError::VolumeNotFound(short(&wanted.volume));
        let id: VolumeId = wanted.volume.parse().map_err(|_| missing())?;
        let _volume = self.start_soon(Subject::Volume(id)).await?;
        let stored = self.get::<Volume>(id).await?.filter(|s| s.object.is_visible()).ok_or_else(missing)?;
        let node = NodeName(wanted.node.clone());
        let holders = self.holders(&stored.object);
        let without_copy = !holders.contains(&node);
        if without_copy && (stored.object.request.reach == Reach::Local || self.nodes.find(&node).await?.is_none()) {
            return Err(self.not_here(id, node, &holders).await?);
        }
        let capability = &wanted.capability;
        let publication = Publication { readonly: wanted.readonly, access: capability.access, mode: capability.mode };
        match stored.object.spec.publications.get(&node) {
            Some(published) if *published == publication => {
                return Ok(self.await_client(&stored.object, &node).await?);
            }
            Some(_) => return Err(PublishError::Incompatible { id, node }),
            None => {}
        }
        if let Some(elsewhere) = conflicting(&stored.object, publication.mode) {
            return Err(PublishError::Elsewhere { id, node: elsewhere });
        }
        let ticket = self.publishing.enter(id);
        self.check_limit(&node, id, &ticket.earlier).await?;
        let mut published = stored.object.clone();
        if without_copy {
            self.name_client(&mut published, &node).await?;
        } else {
            self.wish_for(&mut published, &node).await?;
        }
        published.spec.publications.insert(node.clone(), publication);
        self.change(stored, |volume| volume.spec.clone_from(&published.spec)).await?;
        Ok(self.await_client(&published, &node).await?)
    }

    /// Waits until a node that has no copy of the volume has heard that it may use it, by this publication.
    async fn await_client(&self, volume: &Volume, node: &NodeName) -> Result<(), Transient> {
        let client = volume.spec.mirror.as_ref().and_then(|mirror| mirror.client.as_ref());
        let Some(client) = client.filter(|client| client.node == *node) else { return Ok(()) };
        let (id, publication) = (volume.id, client.publication);
        let (control, deadline) = (self.nodes.holder(Some(node)).await?.control, Instant::now() + COPIES_LIMIT);
        loop {
            let asked = control.client().get_volume(GetVolumeRequest { volume_id: id.to_string() }).await;
            match asked.map_err(|status| control.refusal(status)) {
                // Not the publication before.
                Ok(answer) if answer.get_ref().tree_id == publication.to_string() => return Ok(()),
                Ok(_) | Err(ControlError::NotFound(_)) if Instant::now() < deadline => {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Ok(_) | Err(ControlError::NotFound(_)) => {
                    let text = format!("node {node} has not heard yet that it may use volume {id}; repeat the call");
                    return Err(Transient::Replica(ControlError::Unknown(text)));
                }
                Err(error) => return Err(Transient::Replica(error)),
            }
        }
    }

    /// Why a volume cannot be used on a node that holds no copy of it.
    async fn not_here(&self, id: VolumeId, node: NodeName, holders: &[NodeName]) -> Result<PublishError, PublishError> {
        if self.nodes.find(&node).await?.is_none() {
            let known = names(self.nodes.all().await?.iter().map(|node| &node.name));
            return Ok(PublishError::NodeNotFound { node: short(&node.0), known });
        }
        Ok(PublishError::NoCopy { id, node, holders: names(holders) })
    }

    async fn check_limit(
        &self,
        node: &NodeName,
        id: VolumeId,
        under_way: &BTreeSet<VolumeId>,
    ) -> Result<(), PublishError> {
        let volumes = self.all::<Volume>().await?;
        let published = volumes.iter().filter(|stored| stored.object.spec.publications.contains_key(node));
        let mut there: BTreeSet<_> = published.map(|stored| stored.object.id).collect();
        there.extend(under_way);
        there.remove(&id);
        let limit = self.max_volumes_per_node;
        if there.len() >= limit as usize {
            return Err(PublishError::NodeFull { node: node.clone(), limit });
        }
        Ok(())
    }

    /// The volume is not published to the node (or to any, without one), afterwards.
    pub async fn unpublish(&self, wanted: Unpublish) -> Result<(), UnpublishError> {
        let Ok(id) = wanted.volume.parse::<VolumeId>() else { return Ok(()) };
        let _volume = self.start_soon(Subject::Volume(id)).await?;
        let Some(stored): Option<Stored<Volume>> = self.get(id).await? else { return Ok(()) };
        let publications = &stored.object.spec.publications;
        let is_published =
            wanted.node.as_ref().map_or(!publications.is_empty(), |node| publications.contains_key(node));
        if is_published {
            let gone = |node: &NodeName| wanted.node.as_ref().is_none_or(|gone| gone == node);
            let end = |volume: &mut Volume| {
                volume.spec.publications.retain(|node, _| !gone(node));
                if let Some(mirror) = &mut volume.spec.mirror {
                    // Whichever primary serves another client or a device of its own has read this before.
                    mirror.client.take_if(|client| gone(&client.node));
                }
            };
            self.change(stored, end).await?;
        }
        Ok(())
    }

    /// Whether the volume can be used like that.
    pub async fn validate(&self, wanted: Validate) -> Result<ValidateVolumeCapabilitiesResponse, ValidateError> {
        let missing = || ValidateError::NotFound(short(&wanted.volume));
        let id: VolumeId = wanted.volume.parse().map_err(|_| missing())?;
        let stored = self.get::<Volume>(id).await?.filter(|s| s.object.is_visible()).ok_or_else(missing)?;
        let why_not = match &wanted.possible {
            Err(text) => Some(text.clone()),
            Ok(access) if !access.iter().all(|wanted| allows(&stored.object, *wanted)) => {
                Some("the volume was made for another access type or filesystem".to_owned())
            }
            Ok(_) => None,
        };
        Ok(match why_not {
            Some(message) => ValidateVolumeCapabilitiesResponse { confirmed: None, message },
            None => ValidateVolumeCapabilitiesResponse { confirmed: Some(wanted.echo), message: String::new() },
        })
    }
}

fn allows(volume: &Volume, wanted: Access) -> bool {
    volume.request.access.iter().any(|made_for| match (*made_for, wanted) {
        (Access::Block, Access::Block) => true,
        (Access::Mount(made), Access::Mount(wanted)) => made == wanted || made.is_none() || wanted.is_none(),
        (Access::Block, Access::Mount(_)) | (Access::Mount(_), Access::Block) => false,
    })
}

/// The other node that keeps the volume from being used with this mode here.
fn conflicting(volume: &Volume, mode: AccessMode) -> Option<NodeName> {
    let reads = |mode| mode == AccessMode::MultiNodeReader;
    // Several copies have one primary, and it serves the readers, too.
    let shared = |other: &Publication| reads(mode) && reads(other.mode) && volume.spec.mirror.is_none();
    let mut others = volume.spec.publications.iter().filter(|(_, other)| !shared(other));
    others.next().map(|(node, _)| node.clone())
}
