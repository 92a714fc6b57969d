//! What the catalogue calls half made, and somebody may have been told of: then it was restored from a backup.
//!
//! Invariants: nothing that may hold somebody's data is deleted for being half made. A volume goes if each node that may have
//! it answers, and has none, or one that was made empty and never used; a node whose pool cannot be opened has not answered. A
//! snapshot or a group that a node has taken is what it is, whoever has heard of it: it is ready, and the answer to the repeated
//! call, unless it was given up before. A volume that was used waits for
//! `tandem recover`, which asks all nodes. A clone has something from the beginning: once it is there, it stays.

use super::Controller;
use super::seal::{Sealed, found, ready};
use crate::catalog::{
    GroupMember, GroupSnapshot, GroupStatus, NodeName, Snapshot, SnapshotStatus, Stored, Volume, VolumeConfiguration,
};
use crate::csi::control::ControlError;
use crate::csi::errors::Transient;
use crate::protocol::Stamp;
use crate::rpc::control::{self, GetVolumeRequest};
use std::collections::BTreeSet;

/// Whether the node's copy may have what nobody else has, or knows a newer configuration than the catalogue.
fn may_be_used(volume: &Volume, copy: &control::Volume, known: Option<Stamp>) -> bool {
    let record = copy.record.as_ref().and_then(|record| VolumeConfiguration::decode(&record.configuration));
    let is_newer = record.is_some_and(|record| known.is_none_or(|known| record.stamp() > known));
    volume.spec.base.is_some() || copy.written || !copy.device.is_empty() || is_newer
}

impl Controller {
    /// Whether a half made volume stays. Of a volume with one copy that began with nothing, its replica decides when it is told
    /// to delete it.
    pub(super) async fn stays(&self, volume: &Volume) -> Result<bool, Transient> {
        let Some(mirror) = &volume.spec.mirror else { return self.is_copying(volume).await };
        let known = self.committed(volume.id).await?.map(|known| known.stamp);
        let mut silent = None;
        for place in mirror.copies.values() {
            let asked = async {
                let node = self.nodes.holder(Some(&place.node)).await?;
                node.look_for(volume.id.to_string(), place.pool.clone()).await?;
                self.copy_at(volume, Some(&place.node)).await
            };
            match asked.await {
                Ok(Some(copy)) if may_be_used(volume, &copy, known) => return Ok(true),
                Ok(_) => {}
                Err(error) => silent = Some(error),
            }
        }
        silent.map_or(Ok(false), Err)
    }

    /// Whether the volume has a source and its replica works on it, or has.
    async fn is_copying(&self, volume: &Volume) -> Result<bool, Transient> {
        if volume.request.source.is_none() {
            return Ok(false);
        }
        Ok(self.copy_at(volume, volume.spec.node.as_ref()).await?.is_some())
    }

    /// What the node has of it.
    pub(super) async fn copy_at(
        &self,
        volume: &Volume,
        node: Option<&NodeName>,
    ) -> Result<Option<control::Volume>, Transient> {
        let request = GetVolumeRequest { volume_id: volume.id.to_string() };
        let control = self.nodes.holder(node).await?.control;
        match control.client().get_volume(request).await.map_err(|status| control.refusal(status)) {
            Ok(answer) => Ok(Some(answer.into_inner())),
            Err(ControlError::NotFound(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Says that a half made volume stays. A deletion that was begun for nobody is taken back.
    pub(super) async fn keep(&self, stored: Stored<Volume>) -> Result<(), Transient> {
        let (id, name) = (stored.object.id, stored.object.request.name.clone());
        tracing::warn!(volume = %id, %name, "a half made volume has contents and is kept: repeat its creation, or use `tandem recover`");
        if stored.object.spec.deleted {
            self.change(stored, |volume| volume.spec.deleted = false).await?;
        }
        Ok(())
    }

    /// The snapshot as it was taken, if it was: asked of each node that may have something of it.
    async fn taken(&self, snapshot: &Snapshot) -> Result<Option<Sealed>, Transient> {
        let (text, mut answers, mut silent) = (snapshot.id.to_string(), Vec::new(), None);
        let pool =
            self.get::<Volume>(snapshot.volume).await?.map(|stored| stored.object.request.pool).unwrap_or_default();
        let strays = snapshot.strays.iter().map(Some).filter(|stray| *stray != snapshot.node.as_ref());
        for place in std::iter::once(snapshot.node.as_ref()).chain(strays) {
            let asked = async {
                let node = self.nodes.holder(place).await?;
                node.look_for(text.clone(), pool.clone()).await?;
                Ok::<_, Transient>((node.snapshots().await?, node.name))
            };
            match asked.await {
                Ok((all, node)) => {
                    answers.extend(all.into_iter().filter(|s| s.snapshot_id == text).map(|s| (node.clone(), s)));
                }
                Err(error) => silent = Some(error),
            }
        }
        match (found(&answers, snapshot.is_mirrored()), silent) {
            (None, Some(error)) => Err(error),
            (taken, _) => Ok(taken),
        }
    }

    /// A half made snapshot that was taken is ready; whether it was.
    pub(super) async fn finish_snapshot(&self, stored: &Stored<Snapshot>) -> Result<bool, Transient> {
        if stored.object.deleted || stored.object.made_for.is_some() {
            return Ok(false);
        }
        let Some(taken) = self.taken(&stored.object).await? else { return Ok(false) };
        let object = ready(stored.object.clone(), taken);
        self.update(Stored { version: stored.version, object }).await?;
        Ok(true)
    }

    /// A half made group whose snapshots were all taken is ready; one of which some were is left as it is. Whether any was.
    pub(in crate::csi) async fn finish_group(&self, stored: &Stored<GroupSnapshot>) -> Result<bool, Transient> {
        let (mut members, mut missing, mut moment) = (Vec::new(), 0, 0);
        for member in &stored.object.members {
            let wanted = self.member(&stored.object, *member).await?;
            // One of an attempt that was given up: its snapshot goes.
            let taken = if wanted.deleted { None } else { self.taken(&wanted).await? };
            match taken {
                Some(taken) => members.push(ready(wanted, taken)),
                None => missing += 1,
            }
        }
        if members.is_empty() {
            return Ok(false);
        }
        if missing > 0 {
            let (group, name) = (stored.object.id, &stored.object.name);
            tracing::warn!(%group, %name, missing, "a half made group is kept, because some of its snapshots were taken");
            return Ok(true);
        }
        for member in members {
            if let SnapshotStatus::Ready { created_ms, .. } = member.status {
                moment = created_ms.max(moment);
            }
            if self.get::<Snapshot>(member.id).await?.is_none() {
                self.create(member).await?;
            }
        }
        // After its members, so that a group in the catalogue is always whole.
        let object = GroupSnapshot { status: GroupStatus::Ready { created_ms: moment }, ..stored.object.clone() };
        self.update(Stored { version: stored.version, object }).await?;
        Ok(true)
    }

    /// A snapshot of the group as it is written down, or would be.
    async fn member(&self, group: &GroupSnapshot, member: GroupMember) -> Result<Snapshot, Transient> {
        if let Some(stored) = self.get::<Snapshot>(member.snapshot).await? {
            return Ok(stored.object);
        }
        let strays = match self.get::<Volume>(member.volume).await? {
            Some(volume) if volume.object.spec.mirror.is_none() => BTreeSet::new(),
            // Its copies may have been elsewhere then.
            Some(_) | None => group.strays.clone(),
        };
        let wanted = Snapshot::wanted(member.snapshot, member.volume, group.node.clone());
        Ok(Snapshot { group: Some(group.id), strays, ..wanted })
    }
}
