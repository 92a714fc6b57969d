//! What a copy of a mirrored volume says of itself and of the others, for people, CSI health and metrics.
//!
//! Invariant: nothing is called well that is not known to be: a copy that nobody speaks of lacks writes.

use super::{HealthEntry, HealthKind, Manager, VolumePlace};
use crate::catalog::NodeName;
use crate::protocol::{Role, Stamp};
use crate::replica::engine::{CopyState, MirrorStatus};
use crate::replica::mirror::nodes_of;
use crate::volume::{InstanceId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};

/// A copy on this node and the others of its volume.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named and explained in control.proto")]
pub struct MirrorView {
    pub role: Role,
    /// Of the volume: what every copy can hold.
    pub size: VolumeSize,
    pub serves: bool,
    /// And its requests are answered: no other copy that they need is silent.
    pub answers: bool,
    pub stamp: Stamp,
    pub intact: bool,
    pub wished: bool,
    pub copies: Vec<CopyView>,
    pub copied: u64,
    /// Compared by it, and equal there already.
    pub equal: u64,
    pub hot_extents: u64,
    pub requests: u64,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named and explained in control.proto")]
pub struct CopyView {
    pub copy: InstanceId,
    pub node: Option<NodeName>,
    pub here: bool,
    pub member: bool,
    pub primary: bool,
    /// The spec names it.
    pub wanted: bool,
    pub state: CopyState,
    pub connected: bool,
}

impl Manager {
    /// `None`: the volume has but one copy, or this one is not open.
    pub(super) async fn mirror_view(&self, volume: VolumeId, place: &VolumePlace) -> Option<MirrorView> {
        let mirror = place.mirror.as_ref()?;
        let status = self.engine().mirror_status(volume).await.ok().flatten()?;
        Some(MirrorView::new(place.tree, &status, &nodes_of(&mirror.record)))
    }
}

impl MirrorView {
    fn new(here: InstanceId, status: &MirrorStatus, nodes: &BTreeMap<InstanceId, NodeName>) -> Self {
        let configuration = &status.configuration;
        // Until it was told what is wanted, it is what there is.
        let wanted: BTreeSet<_> =
            status.wish.as_ref().map_or_else(|| configuration.copies().collect(), |wish| wish.copies.clone());
        let view = |copy: InstanceId| {
            let member = configuration.is_member(copy);
            let seen = status.copies.get(&copy);
            let own = if member { CopyState::UpToDate } else { CopyState::Outdated };
            CopyView {
                copy,
                node: nodes.get(&copy).cloned(),
                here: copy == here,
                member,
                primary: configuration.primary == Some(copy),
                wanted: wanted.contains(&copy),
                state: seen.map_or(own, |seen| seen.state),
                connected: copy == here || seen.is_some_and(|seen| seen.connected),
            }
        };
        let all: BTreeSet<_> = configuration.copies().chain(wanted.iter().copied()).collect();
        Self {
            role: status.role,
            size: status.size,
            serves: status.serves,
            answers: status.answers,
            stamp: configuration.stamp,
            intact: status.intact,
            wished: status.wish.as_ref().is_some_and(|wish| wish.primary == Some(here)),
            copies: all.into_iter().map(view).collect(),
            copied: status.copied_bytes,
            equal: status.equal_bytes,
            hot_extents: status.hot_extents as u64,
            requests: status.requests as u64,
        }
    }

    /// What is wrong.
    pub(super) fn health(&self, volume: VolumeId) -> Vec<HealthEntry> {
        let mut entries = Vec::new();
        if self.wished && !self.serves {
            let message = format!(
                "requests of volume {volume} wait: its copy on this node shall be primary and does not serve yet. It needs \
                 the catalogue, and the other members or a configuration without them; it goes on by itself"
            );
            entries.push(HealthEntry { kind: HealthKind::Inaccessible, reason: "NotServing", message });
        }
        if self.serves && !self.answers {
            let message = format!(
                "requests of volume {volume} wait for a copy that is silent, or for a configuration without it, which needs \
                 the catalogue; they go on by themselves"
            );
            entries.push(HealthEntry { kind: HealthKind::Inaccessible, reason: "NotAnswering", message });
        }
        let behind: Vec<_> = self.copies.iter().filter(|copy| copy.is_behind()).map(CopyView::name).collect();
        if !behind.is_empty() {
            let message = format!(
                "volume {volume} is not as safe as asked for: the copy on {} lacks acknowledged writes. It is brought up \
                 to date as soon as the primary serves and reaches it",
                behind.join(", ")
            );
            entries.push(HealthEntry { kind: HealthKind::Degraded, reason: "CopyNotUpToDate", message });
        }
        if !self.intact {
            let message = format!(
                "the copy of volume {volume} on this node may lack acknowledged writes, because the node has died with it; \
                 what may differ is fetched from another member before it is read"
            );
            entries.push(HealthEntry { kind: HealthKind::Degraded, reason: "CopyNotIntact", message });
        }
        entries
    }
}

impl CopyView {
    /// It is wanted and lacks writes.
    fn is_behind(&self) -> bool {
        self.wanted && self.state != CopyState::UpToDate
    }

    /// For people: the node, or the copy's id where its node is not known.
    pub fn name(&self) -> String {
        match &self.node {
            _ if self.here => "this node".to_owned(),
            Some(node) => node.to_string(),
            None => self.copy.to_string(),
        }
    }
}

/// The catalogue or the store does not let it act yet.
pub(super) fn not_open(volume: VolumeId) -> HealthEntry {
    let message = format!(
        "the copy of volume {volume} on this node is not open yet: it needs the catalogue once; see the replica's log"
    );
    HealthEntry { kind: HealthKind::Degraded, reason: "CopyNotOpen", message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Configuration, Generation, Lacks, Primary, Wish};
    use crate::replica::engine::CopyStatus;

    fn copies() -> [InstanceId; 3] {
        [1, 2, 3].map(|byte| InstanceId::from_bytes([byte; 16]))
    }

    fn status() -> MirrorStatus {
        let [one, two, _] = copies();
        let configuration = Configuration::first(Generation(1), one, [two].into());
        MirrorStatus {
            role: Role::Primary(Primary::Serving),
            size: VolumeSize::try_from(1 << 30).expect("a size"),
            serves: true,
            answers: true,
            newest: configuration.clone(),
            configuration,
            wish: Some(Wish { primary: Some(one), copies: [one, two].into() }),
            intact: true,
            disk_failed: false,
            copies: [(two, CopyStatus { state: CopyState::UpToDate, connected: true })].into(),
            copied_bytes: 0,
            equal_bytes: 0,
            hot_extents: 0,
            requests: 0,
            term: None,
        }
    }

    fn reasons(status: &MirrorStatus) -> Vec<(HealthKind, &'static str)> {
        let [one, two, _] = copies();
        let view = MirrorView::new(one, status, &[(two, NodeName("node-2".into()))].into());
        view.health(VolumeId::from_bytes([9; 16])).into_iter().map(|entry| (entry.kind, entry.reason)).collect()
    }

    #[test]
    fn a_mirror_that_is_as_it_shall_be_has_nothing_to_say() {
        assert_eq!(reasons(&status()), []);
    }

    #[test]
    fn a_wanted_copy_that_lacks_writes_is_degraded_until_it_is_up_to_date() {
        let [_, two, three] = copies();
        for state in [CopyState::Outdated, CopyState::SyncTarget { copied_bytes: 1, equal_bytes: 0, left_bytes: 0 }] {
            let mut behind = status();
            behind.configuration.secondaries.clear();
            behind.configuration.candidates.insert(two, Lacks::Everything);
            behind.copies.insert(two, CopyStatus { state, connected: true });
            assert_eq!(reasons(&behind), [(HealthKind::Degraded, "CopyNotUpToDate")]);
            // One that nobody wants any more may lack what it likes.
            behind.wish.as_mut().expect("a wish").copies.remove(&two);
            assert_eq!(reasons(&behind), []);
        }
        let mut missing = status();
        missing.wish.as_mut().expect("a wish").copies.insert(three);
        assert_eq!(reasons(&missing), [(HealthKind::Degraded, "CopyNotUpToDate")], "wanted, and in no configuration");
    }

    #[test]
    fn a_copy_that_shall_be_primary_and_does_not_serve_is_inaccessible_and_others_are_not() {
        let mut waiting = status();
        (waiting.role, waiting.serves) = (Role::Secondary, false);
        assert_eq!(reasons(&waiting), [(HealthKind::Inaccessible, "NotServing")]);
        let mut silent = status();
        silent.answers = false;
        assert_eq!(reasons(&silent), [(HealthKind::Inaccessible, "NotAnswering")]);
        waiting.wish.as_mut().expect("a wish").primary = None;
        assert_eq!(reasons(&waiting), []);
        waiting.intact = false;
        assert_eq!(reasons(&waiting), [(HealthKind::Degraded, "CopyNotIntact")]);
    }
}
