//! Volumes with copies on several nodes change step by step: what all of their nodes have confirmed becomes the status.
//!
//! ```text
//!   spec.size, spec.verifyReads ──> each node's report ──> all have it: status; one refuses: the wish is taken back
//!   a copy that leaves ──> all others are members ──> it is wanted no more
//! ```
//! # Invariants
//! * The size of a volume is one that each copy can hold, so no write lies beyond the end of any. A copy that has grown
//!   while another one was refused keeps what it has, and a device shows nothing of it.
//! * A copy that is replaced stays until all others have every acknowledged write. One that was missed and has them first stays
//!   for good, and the one that was to replace it goes.
//! * Level-triggered: each step follows from what is in the catalogue, whoever looks: a call that waits, or [`Controller::tend`].

use super::mirror::{COPIES_LIMIT, LOOK_EVERY};
use super::{Controller, names};
use crate::catalog::{
    CopyReport, CopySpec, MirrorSpec, NodeName, Object, Publication, Rebuild, Seen, Stored, Volume,
    VolumeConfiguration, VolumePhase,
};
use crate::csi::errors::Transient;
use crate::csi::operations::Subject;
use crate::protocol::Configuration;
use crate::volume::{InstanceId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// When a look that failed, or found the volume busy, is repeated.
const TEND_AGAIN: Duration = Duration::from_secs(1);

/// What a look has brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// The object is another now.
    pub changed: bool,
    /// A growth was taken back: which node had no room, in its words.
    pub refused: Option<String>,
}

/// Makes the next steps that the nodes' reports and the configuration allow.
pub(super) fn settle(volume: &mut Volume, configuration: Option<&Configuration>) -> Settled {
    let mut settled = Settled::default();
    let Volume { spec, status, .. } = volume;
    let Some(mirror) = spec.mirror.as_mut().filter(|_| status.phase == VolumePhase::Ready && !spec.deleted) else {
        return settled;
    };
    let is_member = |copy: &InstanceId| configuration.is_some_and(|now| now.is_member(*copy));
    settled.changed = take_back(mirror, &is_member) || let_go(mirror, &spec.publications, &is_member);
    // One that leaves counts for as long as writes go to it.
    let counts = |copy: &InstanceId| !mirror.leaving.contains(copy) || is_member(copy);
    let counted = || mirror.copies.iter().filter(|(copy, _)| counts(copy));
    let all = |is: &dyn Fn(&CopyReport) -> bool| counted().all(|(copy, _)| status.reports.get(copy).is_some_and(is));
    let refused = |(copy, of): (_, &CopySpec)| {
        let reason = status.reports.get(copy)?.refused.as_ref()?;
        Some(format!("node {}: {reason}", of.node))
    };
    let verified = all(&|report| report.verify_reads == spec.verify_reads);
    settled.changed |= verified && status.verify_reads != spec.verify_reads;
    let grows = spec.size > status.size;
    settled.refused = if grows { counted().find_map(refused) } else { None };
    let grown = grows && settled.refused.is_none() && all(&|report| report.size >= spec.size);
    settled.changed |= grown || settled.refused.is_some();
    if verified {
        status.verify_reads = spec.verify_reads;
    }
    if grown {
        status.size = spec.size;
    }
    if settled.refused.is_some() {
        spec.size = status.size;
        status.reports.values_mut().for_each(|report| report.refused = None);
    }
    settled
}

/// A copy that was missed has everything again before the one that was to replace it. That one is none of the members, so
/// nothing is lost with it.
fn take_back(mirror: &mut MirrorSpec, is_member: &impl Fn(&InstanceId) -> bool) -> bool {
    let Some(Rebuild { lost, new }) = mirror.rebuild else { return false };
    if !is_member(&lost) || is_member(&new) {
        return false;
    }
    mirror.rebuild = None;
    mirror.leaving.remove(&lost);
    mirror.copies.remove(&new);
    if mirror.primary == Some(new) {
        mirror.primary = Some(lost);
    }
    true
}

/// What leaves is not wanted any more, if everything is on all others and nobody uses it.
fn let_go(
    mirror: &mut MirrorSpec,
    used: &BTreeMap<NodeName, Publication>,
    is_member: &impl Fn(&InstanceId) -> bool,
) -> bool {
    if let Some(Rebuild { lost, new }) = mirror.rebuild
        && is_member(&new)
        && !is_member(&lost)
        && mirror.copies.get(&lost).is_none_or(|of| !used.contains_key(&of.node))
    {
        // Whatever becomes of a third copy: this one has been replaced.
        mirror.rebuild = None;
        mirror.leaving.remove(&lost);
        mirror.copies.remove(&lost);
        if mirror.primary == Some(lost) {
            mirror.primary = Some(new);
        }
        return true;
    }
    let is_used =
        mirror.leaving.iter().any(|copy| mirror.copies.get(copy).is_some_and(|of| used.contains_key(&of.node)));
    if mirror.leaving.is_empty() || is_used || !mirror.staying().all(|(copy, _)| is_member(&copy)) {
        return false;
    }
    let leaving = std::mem::take(&mut mirror.leaving);
    mirror.rebuild = None;
    mirror.copies.retain(|copy, _| !leaving.contains(copy));
    if mirror.primary.is_some_and(|copy| leaving.contains(&copy)) {
        mirror.primary = mirror.copies.keys().next().copied();
    }
    true
}

/// The nodes whose copies are not as wanted yet.
pub(super) fn behind(volume: &Volume) -> Vec<NodeName> {
    let (spec, reports) = (&volume.spec, &volume.status.reports);
    let follows = |copy: &InstanceId| {
        reports.get(copy).is_some_and(|is| is.size >= spec.size && is.verify_reads == spec.verify_reads)
    };
    let wanted = spec.mirror.iter().flat_map(|mirror| &mirror.copies);
    wanted.filter(|(copy, _)| !follows(copy)).map(|(_, of)| of.node.clone()).collect()
}

impl Controller {
    /// The committed configuration.
    pub(super) async fn committed(&self, id: VolumeId) -> Result<Option<Configuration>, Transient> {
        let stored = self.get::<VolumeConfiguration>(id).await?;
        let read = stored.map(|stored| Configuration::try_from(&stored.object)).transpose();
        read.map_err(|error| Transient::Conflict(error.to_string()))
    }

    /// Waits until `done` says what became of it, and makes the steps that the nodes allow meanwhile. Needs the volume's
    /// operation.
    pub(super) async fn settled<T>(
        &self,
        id: VolumeId,
        what: &'static str,
        done: impl Fn(&Volume, Option<String>) -> Option<T>,
    ) -> Result<T, Transient> {
        let deadline = Instant::now() + COPIES_LIMIT;
        loop {
            let missing = || Transient::Conflict(format!("volume {id}"));
            let mut stored = self.get::<Volume>(id).await?.ok_or_else(missing)?;
            let Settled { changed, refused } = settle(&mut stored.object, self.committed(id).await?.as_ref());
            let updated = if changed { self.update(stored).await } else { Ok(stored) };
            match updated {
                Ok(Stored { object, .. }) => {
                    if let Some(found) = done(&object, refused) {
                        return Ok(found);
                    }
                    if Instant::now() >= deadline {
                        return Err(Transient::Waiting { id, done: what, nodes: names(&behind(&object)) });
                    }
                }
                Err(Transient::Conflict(_)) if Instant::now() < deadline => continue,
                Err(error) => return Err(error),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Makes the steps that nobody waits for any more, until it is dropped.
    pub async fn tend(&self) {
        let mut watch = self.catalog.watch();
        let (mut everything, mut volumes) = (true, BTreeSet::new());
        loop {
            if everything {
                match self.all::<Volume>().await {
                    Ok(all) => {
                        volumes.extend(all.iter().map(|stored| stored.object.id));
                        everything = false;
                    }
                    Err(error) => tracing::warn!(%error, "volumes with several copies are looked at again later"),
                }
            }
            let mut again = BTreeSet::new();
            for id in std::mem::take(&mut volumes) {
                if let Err(error) = self.tend_volume(id).await {
                    tracing::debug!(volume = %id, %error, "it is looked at again later");
                    again.insert(id);
                }
            }
            volumes = again;
            let waits = everything || !volumes.is_empty();
            tokio::select! {
                seen = watch.next() => match seen {
                    Some(Seen::Changed(change)) if [Volume::KIND, VolumeConfiguration::KIND].contains(&change.kind) => {
                        volumes.extend(change.key.parse::<VolumeId>());
                    }
                    Some(Seen::Changed(_)) => {}
                    Some(Seen::FellBehind) => everything = true,
                    None => return,
                },
                () = tokio::time::sleep(TEND_AGAIN), if waits => {}
            }
        }
    }

    /// Takes the volume's operation only if there is something to do: a call must not find it busy for nothing.
    async fn tend_volume(&self, id: VolumeId) -> Result<(), Transient> {
        let Some(stored) = self.get::<Volume>(id).await? else { return Ok(()) };
        if stored.object.spec.mirror.is_none() {
            return Ok(());
        }
        let configuration = self.committed(id).await?;
        let waits = configuration.is_none() && stored.object.is_visible();
        if !waits && !settle(&mut stored.object.clone(), configuration.as_ref()).changed {
            return Ok(());
        }
        let _volume = self.start(Subject::Volume(id))?;
        let Some(mut stored) = self.get::<Volume>(id).await? else { return Ok(()) };
        if stored.object.is_visible() {
            self.begin_mirror(&stored.object).await?;
        }
        let Settled { changed, refused } = settle(&mut stored.object, self.committed(id).await?.as_ref());
        if let Some(refused) = refused {
            tracing::warn!(volume = %id, %refused, "growth that was begun is taken back");
        }
        if changed {
            self.update(stored).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "settle/tests.rs"]
pub(super) mod tests;
