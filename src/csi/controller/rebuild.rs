//! A copy that is lost is made anew on another node, without a person.
//!
//! ```text
//!   a wanted copy does not follow ──counted──> for `rebuildAfter` ──> another node gets one, and the lost one leaves (settle)
//!        └── it follows again ──> nothing is counted any more; it stays, and a new one that is no member yet goes (settle)
//! ```
//! # Invariants
//! * What is counted is time in which a running controller saw that the copy is missed, by its own monotonic clock. It is in the
//!   catalogue whenever another [`COUNT_SHARE`] of the limit is over: who starts goes on from there, and no clock hurries it.
//! * A copy that is being filled is not missed, however long that takes; it is counted anew from when it was last seen so.
//! * Nothing is counted or begun while more than half of the nodes are silent: then it is the controller that is cut off.
//! * A copy is filled by a primary that serves, so the volume has a member. The lost copy stays wanted until all others have every
//!   acknowledged write: there are never fewer members for it.
//! * The wish leaves a primary whose node is silent only while the volume is published nowhere; members alone are wished.
//! * Level-triggered: each look begins with the catalogue, and a step that was cut off is found again.

use super::Controller;
use crate::catalog::{MirrorSpec, Missed, NodeName, Rebuild, RebuildAfter, Stored, Volume, VolumeConfiguration};
use crate::csi::errors::Transient;
use crate::csi::operations::Subject;
use crate::protocol::{Configuration, MAX_COPIES};
use crate::rpc::control::{GetVolumeRequest, copy::State};
use crate::volume::{InstanceId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How often it looks: a lost copy is missed for minutes, and each look asks every node whether it is there.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// The most that counts between two looks: a controller that stood still has seen nothing meanwhile.
const LONGEST_LAP: Duration = Duration::from_secs(30);
/// The part of the limit after which the count is written down: few writes, and little is forgotten.
const COUNT_SHARE: u64 = 60;
/// Volumes that have a copy replaced at once, by a person or by this: each reads all of it where applications read, too. A
/// node that dies takes a copy of many volumes with it.
const MAX_REBUILDS: usize = 4;
/// How long another primary may take to drop the one that the wish has left: lease, silence, and some more.
const DROPPED_WITHIN: Duration = Duration::from_secs(60);
/// How long a primary may take to say whether it serves.
const ANSWER_SOON: Duration = Duration::from_secs(4);
/// How often in a row a copy that replaces another one may be late and not being filled, though its node answers: it may rest for a
/// quarter of an hour because it was slow; longer, its disk may have failed.
const UNFILLED: u32 = 3;
/// How long what was refused rests: a node that has room is found soon, and pools are not asked all the time.
const REST: Duration = Duration::from_secs(15);

/// What a look remembers of the ones before it. All of it may be lost.
#[derive(Default)]
struct Memory {
    last: Option<Instant>,
    /// Nodes that have answered.
    seen: BTreeSet<NodeName>,
    /// How often the copy that replaces another one was late and not being filled, one time after the other.
    unfilled: BTreeMap<VolumeId, u32>,
    counted: BTreeMap<VolumeId, BTreeMap<InstanceId, Duration>>,
    rests: BTreeMap<VolumeId, Instant>,
    /// What the wish has left lately, and until when that counts: its count goes on until another primary has dropped it.
    left: BTreeMap<VolumeId, (InstanceId, Instant)>,
}

/// What is around a volume at one look.
struct Around {
    silent: BTreeSet<NodeName>,
    /// Since the look before.
    lap: Duration,
    /// Volumes that have a copy replaced.
    replacing: usize,
}

/// What can be done about a copy that was missed for too long.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Another member shall be primary, so that it drops this one.
    Wish(InstanceId),
    /// Another node gets a copy.
    Replace,
    /// It was to replace another one, which needs a third.
    Withdraw,
    /// It is being filled, or dropped.
    Nothing,
}

/// What the primary says of the others.
struct Primary {
    filled: BTreeSet<InstanceId>,
}

impl Memory {
    fn lap(&mut self, now: Instant) -> Duration {
        let lap = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(now);
        lap.min(LONGEST_LAP)
    }
}

/// The wanted copies that do not follow: those that are no members, and on a node that is silent one that leads, or that the
/// wish has just left.
fn missed(
    volume: &Volume,
    now: &Configuration,
    silent: &BTreeSet<NodeName>,
    left: Option<InstanceId>,
) -> BTreeSet<InstanceId> {
    let Some(mirror) = &volume.spec.mirror else { return BTreeSet::new() };
    let leads = |copy| now.primary.or(mirror.primary) == Some(copy);
    let is_missed = |copy, node| !now.is_member(copy) || (silent.contains(node) && (leads(copy) || left == Some(copy)));
    mirror.copies.iter().filter(|(copy, of)| is_missed(**copy, &of.node)).map(|(copy, _)| *copy).collect()
}

/// What is being filled goes on.
fn leave_out_filled(missed: &mut BTreeSet<InstanceId>, primary: Option<&Primary>) {
    missed.retain(|copy| primary.is_none_or(|primary| !primary.filled.contains(copy)));
}

/// Counts on, and whether the object is another now.
fn count(
    volume: &mut Volume,
    missed: &BTreeSet<InstanceId>,
    lap: Duration,
    counted: &mut BTreeMap<InstanceId, Duration>,
) -> bool {
    let limit = match volume.spec.rebuild_after {
        RebuildAfter::Seconds(seconds) => u64::from(seconds),
        RebuildAfter::Never => {
            counted.clear();
            return !std::mem::take(&mut volume.status.missed).is_empty();
        }
    };
    let known = &mut volume.status.missed;
    let before = known.len();
    known.retain(|copy, _| missed.contains(copy));
    counted.retain(|copy, _| missed.contains(copy));
    let mut changed = known.len() != before;
    for copy in missed {
        let written = known.get(copy).map_or(0, |missed| missed.seconds);
        let so_far = counted.entry(*copy).or_insert(Duration::from_secs(written));
        *so_far = so_far.saturating_add(lap).min(Duration::from_secs(limit.max(written)));
        let seconds = so_far.as_secs();
        if seconds >= written + (limit / COUNT_SHARE).max(1) || (seconds >= limit && written < limit) {
            known.entry(*copy).or_default().seconds = seconds;
            changed = true;
        }
    }
    changed
}

/// The copy that was missed for too long, if there is one.
fn due(volume: &Volume) -> Option<InstanceId> {
    let RebuildAfter::Seconds(limit) = volume.spec.rebuild_after else { return None };
    let leaves = |copy: &InstanceId| volume.spec.mirror.as_ref().is_some_and(|mirror| mirror.leaving.contains(copy));
    let late = |(copy, missed): &(&InstanceId, &Missed)| missed.seconds >= u64::from(limit) && !leaves(copy);
    volume.status.missed.iter().find(late).map(|(copy, _)| *copy)
}

/// What is done about it; or why nothing is.
fn step(
    volume: &Volume,
    lost: InstanceId,
    now: &Configuration,
    primary: Option<&Primary>,
    around: &Around,
) -> Result<Step, String> {
    let Some(mirror) = &volume.spec.mirror else { return Ok(Step::Nothing) };
    if now.is_member(lost) {
        let answers = |copy: &InstanceId| mirror.copies.get(copy).is_some_and(|of| !around.silent.contains(&of.node));
        if mirror.primary.is_some_and(|wished| wished != lost && now.is_member(wished) && answers(&wished)) {
            return Ok(Step::Nothing);
        }
        if let Some(node) = volume.spec.publications.keys().next() {
            return Err(format!("it shall be primary, since the volume is published to {node}; unpublish it there"));
        }
        let fits = |copy: &InstanceId| *copy != lost && answers(copy);
        let stays = now.members().find(|copy| fits(copy) && !mirror.leaving.contains(copy));
        let other = stays.or_else(|| now.members().find(fits));
        return other
            .map(Step::Wish)
            .ok_or_else(|| "no other copy that has every acknowledged write is reached".into());
    }
    let Some(primary) = primary else {
        return Err("no primary that serves is reached, and only one could fill another copy".into());
    };
    if primary.filled.contains(&lost) {
        return Ok(Step::Nothing);
    }
    let fills_another = || mirror.staying().any(|(copy, _)| primary.filled.contains(&copy));
    if replaces(mirror, lost) && (mirror.rebuild.is_some() || !fills_another()) {
        return Ok(Step::Withdraw);
    }
    if !mirror.leaving.is_empty() || mirror.copies.len() >= MAX_COPIES {
        return Err("another copy of the volume is being replaced".into());
    }
    if around.replacing >= MAX_REBUILDS {
        return Err(format!("copies of {MAX_REBUILDS} other volumes are being replaced now"));
    }
    Ok(Step::Replace)
}

/// Whether a wanted copy of the volume is on that node.
fn holds(volume: &Volume, node: &NodeName) -> bool {
    volume.spec.mirror.iter().flat_map(|mirror| mirror.copies.values()).any(|copy| copy.node == *node)
}

/// Whether the copy, which is no member, was to replace another one. Where a person has moved a copy, nothing else says which one
/// is the new one.
fn replaces(mirror: &MirrorSpec, copy: InstanceId) -> bool {
    match mirror.rebuild {
        Some(Rebuild { new, .. }) => new == copy,
        None => !mirror.leaving.is_empty() && !mirror.leaving.contains(&copy),
    }
}

/// Whether a copy is being filled, in place of another one, on a node that answers.
fn is_replacing(volume: &Volume, now: Option<&Configuration>, silent: &BTreeSet<NodeName>) -> bool {
    let Some(mirror) = volume.spec.mirror.as_ref().filter(|mirror| !mirror.leaving.is_empty()) else { return false };
    let is_member = |copy| now.is_some_and(|now| now.is_member(copy));
    mirror.staying().any(|(copy, of)| !is_member(copy) && !silent.contains(&of.node))
}

impl Controller {
    /// Makes lost copies anew, until it is dropped.
    pub async fn rebuild(&self) {
        let mut memory = Memory::default();
        if self.nodes.is_alone() {
            // There is no other node.
            return;
        }
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Err(error) = self.look_for_lost(&mut memory).await {
                tracing::debug!(%error, "copies that may be lost are looked for again later");
            }
        }
    }

    async fn look_for_lost(&self, memory: &mut Memory) -> Result<(), Transient> {
        let mut volumes = self.all::<Volume>().await?;
        volumes.retain(|stored| stored.object.is_visible() && stored.object.spec.mirror.is_some());
        let (nodes, mut silent) = self.nodes.silent().await?;
        memory.seen.extend(nodes.difference(&silent).cloned());
        // A node that is gone for good and has nothing says nothing about the network.
        let has_copies = |node: &NodeName| volumes.iter().any(|stored| holds(&stored.object, node));
        let places = volumes.iter().flat_map(|s| &s.object.spec.mirror).flat_map(|mirror| mirror.copies.values());
        let removed: Vec<_> = places.map(|of| &of.node).filter(|node| !nodes.contains(*node)).cloned().collect();
        silent.retain(|node| memory.seen.contains(node) || has_copies(node));
        let counted = nodes.iter().filter(|node| memory.seen.contains(*node) || has_copies(node)).count();
        if silent.len() * 2 > counted {
            // Said once.
            if memory.last.take().is_some() {
                tracing::warn!(
                    silent = silent.len(),
                    nodes = counted,
                    "most nodes are silent: no copy is taken for lost"
                );
            }
            return Ok(());
        }
        // Nobody asks these, and what they have is missed like what any silent node has.
        silent.extend(removed);
        let lap = memory.lap(Instant::now());
        let stored = self.all::<VolumeConfiguration>().await?;
        let read = stored
            .iter()
            .filter_map(|stored| Some((stored.object.volume, Configuration::try_from(&stored.object).ok()?)));
        let configurations: BTreeMap<_, _> = read.collect();
        // One that was late and not being filled makes no progress.
        let fills = |id: &VolumeId| memory.unfilled.get(id).is_none_or(|times| *times == 0);
        let takes_a_place = |stored: &&Stored<Volume>| {
            let Volume { id, .. } = &stored.object;
            fills(id) && is_replacing(&stored.object, configurations.get(id), &silent)
        };
        let replacing = volumes.iter().filter(takes_a_place).count();
        let mut around = Around { silent, lap, replacing };
        let there: BTreeSet<_> = volumes.iter().map(|stored| stored.object.id).collect();
        memory.counted.retain(|volume, _| there.contains(volume));
        memory.rests.retain(|volume, until| there.contains(volume) && *until > Instant::now());
        memory.unfilled.retain(|volume, _| there.contains(volume));
        memory.left.retain(|volume, (_, until)| there.contains(volume) && *until > Instant::now());
        for stored in volumes {
            let id = stored.object.id;
            let Some(now) = configurations.get(&id) else { continue };
            if let Err(error) = self.look_at(stored.object, now, &mut around, memory).await {
                tracing::debug!(volume = %id, %error, "its copies are looked at again later");
            }
        }
        Ok(())
    }

    async fn look_at(
        &self,
        mut volume: Volume,
        now: &Configuration,
        around: &mut Around,
        memory: &mut Memory,
    ) -> Result<(), Transient> {
        let id = volume.id;
        let left = memory.left.get(&id).map(|(copy, _)| *copy);
        let mut missed = missed(&volume, now, &around.silent, left);
        let primary = if missed.is_empty() { None } else { self.serving(&volume, now).await };
        leave_out_filled(&mut missed, primary.as_ref());
        let rebuild = volume.spec.mirror.as_ref().and_then(|mirror| mirror.rebuild);
        if rebuild.is_some_and(|rebuild| primary.as_ref().is_some_and(|primary| primary.filled.contains(&rebuild.new)))
        {
            memory.unfilled.remove(&id);
        }
        if missed.is_empty() && volume.status.missed.is_empty() {
            memory.counted.remove(&id);
            memory.unfilled.remove(&id);
            return Ok(());
        }
        if count(&mut volume, &missed, around.lap, memory.counted.entry(id).or_default()) {
            let counted = volume.status.missed.clone();
            self.write(id, |volume| volume.status.missed.clone_from(&counted)).await?;
        }
        let Some(lost) = due(&volume).filter(|_| !memory.rests.contains_key(&id)) else { return Ok(()) };
        if self.is_filled_slowly(&volume, lost, primary.as_ref(), around, memory) {
            memory.counted.entry(id).or_default().remove(&lost);
            return self.write(id, |volume| _ = volume.status.missed.remove(&lost)).await;
        }
        let done = match step(&volume, lost, now, primary.as_ref(), around) {
            Ok(Step::Nothing) => Ok(()),
            Ok(step) => {
                match step {
                    Step::Wish(_) => _ = memory.left.insert(id, (lost, Instant::now() + DROPPED_WITHIN)),
                    // The next copy that replaces one has its time before it.
                    Step::Withdraw => _ = memory.unfilled.remove(&id),
                    Step::Replace | Step::Nothing => {}
                }
                self.take(&volume, lost, &step, around).await?
            }
            Err(waits) => Err(waits),
        };
        let waits = done.err();
        if waits.is_some() {
            memory.rests.insert(id, Instant::now() + REST);
        }
        if volume.status.missed.get(&lost).is_some_and(|missed| missed.waits != waits) {
            if let Some(waits) = &waits {
                tracing::warn!(volume = %id, copy = %lost, %waits, "a copy that is missed is not made anew");
            }
            self.write(id, |volume| {
                volume.status.missed.entry(lost).and_modify(|missed| missed.waits.clone_from(&waits));
            })
            .await?;
        }
        Ok(())
    }

    /// A copy that replaces another one may take longer than the time after which it counts as late, and its filling may
    /// rest: it goes only if its node is silent, or if it was not being filled several times.
    fn is_filled_slowly(
        &self,
        volume: &Volume,
        late: InstanceId,
        primary: Option<&Primary>,
        around: &Around,
        memory: &mut Memory,
    ) -> bool {
        let (Some(mirror), Some(primary)) = (&volume.spec.mirror, primary) else { return false };
        if !replaces(mirror, late) {
            return false;
        }
        let times = memory.unfilled.entry(volume.id).or_default();
        *times = if primary.filled.contains(&late) { 0 } else { *times + 1 };
        let silent = mirror.copies.get(&late).is_some_and(|of| around.silent.contains(&of.node));
        *times == 0 || (!silent && *times < UNFILLED)
    }

    /// Changes the volume, if no call works on it.
    async fn write(&self, id: VolumeId, change: impl Fn(&mut Volume)) -> Result<(), Transient> {
        let _volume = self.start(Subject::Volume(id))?;
        let Some(stored) = self.get::<Volume>(id).await?.filter(|stored| stored.object.is_visible()) else {
            return Ok(());
        };
        self.change(stored, change).await.map(drop)
    }

    /// The primary, if it serves and says so.
    async fn serving(&self, volume: &Volume, now: &Configuration) -> Option<Primary> {
        let mirror = volume.spec.mirror.as_ref()?;
        let place = mirror.copies.get(&now.primary?)?;
        let node = self.nodes.find(&place.node).await.ok()??;
        let request = GetVolumeRequest { volume_id: volume.id.to_string() };
        let asked = tokio::time::timeout(ANSWER_SOON, node.control.client().get_volume(request)).await;
        let said = asked.ok()?.ok()?.into_inner().mirror.filter(|mirror| mirror.serves)?;
        let targets = said.copies.iter().filter(|copy| copy.state() == State::SyncTarget);
        Some(Primary { filled: targets.filter_map(|copy| copy.copy_id.parse().ok()).collect() })
    }

    /// Takes the step, unless somebody has changed the volume's copies meanwhile. The inner error says why it cannot be taken.
    async fn take(
        &self,
        seen: &Volume,
        lost: InstanceId,
        step: &Step,
        around: &mut Around,
    ) -> Result<Result<(), String>, Transient> {
        let (id, Some(mirror)) = (seen.id, &seen.spec.mirror) else { return Ok(Ok(())) };
        // Before the operation begins: that a node is silent is known after seconds only.
        let more = match step {
            Step::Replace => self.more_copies(seen, mirror, 1).await,
            Step::Nothing | Step::Wish(_) | Step::Withdraw => Ok(BTreeMap::new()),
        };
        let _volume = self.start(Subject::Volume(id))?;
        let changed = || Transient::Conflict(format!("volume {id}"));
        let stored = self.get::<Volume>(id).await?.ok_or_else(changed)?;
        if stored.object.spec != seen.spec {
            return Err(changed());
        }
        let node = mirror.copies.get(&lost).map_or_else(String::new, |of| of.node.to_string());
        let mut next = mirror.clone();
        match step {
            Step::Nothing => return Ok(Ok(())),
            Step::Wish(other) => {
                tracing::warn!(volume = %id, %node, wished = %other, "the primary's node is silent: another copy shall be primary");
                next.primary = Some(*other);
            }
            Step::Withdraw => {
                tracing::warn!(volume = %id, %node, "the copy that was to replace another one is missed, too: it goes");
                next.copies.remove(&lost);
                next.leaving.clear();
                next.rebuild = None;
            }
            Step::Replace => {
                let more = match more {
                    Ok(more) => more,
                    Err(error) => return Ok(Err(error.to_string())),
                };
                around.replacing += 1;
                for (new, place) in more {
                    tracing::warn!(volume = %id, lost = %node, new = %place.node, "a lost copy is made anew on another node");
                    next.copies.insert(new, place);
                    next.leaving.insert(lost);
                    next.rebuild = Some(Rebuild { lost, new });
                }
            }
        }
        self.change(stored, |volume| volume.spec.mirror = Some(next.clone())).await?;
        Ok(Ok(()))
    }
}

#[cfg(test)]
#[path = "rebuild/tests.rs"]
mod tests;
