//! PacificA's configuration: who is primary and who holds every acknowledged write. Changed only by compare-and-swap.
//!
//! Invariants: `primary`, `secondaries` and `candidates` share no copy; a next configuration has the next version of the
//! same generation; at most [`MAX_COPIES`] copies. A copy is named by its instance, so a blank disk under the name of an
//! old one is a stranger.

use crate::volume::InstanceId;
use std::collections::{BTreeMap, BTreeSet};

/// Most copies of a volume: three, and the one that is about to replace one of them. Acks are bits of one byte.
pub const MAX_COPIES: usize = 4;

/// Generation of the catalogue: raised when a lost catalogue is rebuilt from the disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// Version of a configuration within a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConfigurationVersion(pub u64);

impl ConfigurationVersion {
    /// The one that follows.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Which of two configurations is newer; the order of the fields is the rule. Part of every frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Of the catalogue.
    pub generation: Generation,
    /// Of the configuration.
    pub version: ConfigurationVersion,
}

/// What a copy outside the members lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lacks {
    /// It left with this version: the layers since, and what was not flushed, or not answered, then.
    Since(Stamp),
    /// It never held anything, or nobody knows what it holds: every block, also one that reads as zeros at the source.
    Everything,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Configuration {
    /// Generation and version.
    pub stamp: Stamp,
    /// The version that began the primary's term: serial numbers are unique within it.
    pub term: Stamp,
    /// Who orders the writes; `None` after a demotion.
    pub primary: Option<InstanceId>,
    /// The other members: each holds every acknowledged write and may be promoted.
    pub secondaries: BTreeSet<InstanceId>,
    /// Copies that are no members: outdated, or being brought up to date. Never promotable.
    pub candidates: BTreeMap<InstanceId, Lacks>,
    /// The configuration since which writes of before may be gone that no flush covers: no member had everything, or a person
    /// forced one. The default: that never happened. It is in the catalogue before anything is served after the loss, and kept
    /// for those who were not asked meanwhile (NFS's write verifier).
    pub lost: Stamp,
}

impl Configuration {
    /// The first configuration of a volume whose copies are all empty.
    ///
    /// # Panics
    /// On more than [`MAX_COPIES`] copies.
    pub fn first(generation: Generation, primary: InstanceId, secondaries: BTreeSet<InstanceId>) -> Self {
        assert!(secondaries.len() < MAX_COPIES, "more than {MAX_COPIES} copies");
        let stamp = Stamp { generation, version: ConfigurationVersion(1) };
        let (candidates, lost) = (BTreeMap::new(), Stamp::default());
        Self { stamp, term: stamp, primary: Some(primary), secondaries, candidates, lost }
    }

    /// Whether the copy holds every acknowledged write by definition.
    pub fn is_member(&self, copy: InstanceId) -> bool {
        self.primary == Some(copy) || self.secondaries.contains(&copy)
    }

    /// The members: the primary first.
    pub fn members(&self) -> impl Iterator<Item = InstanceId> + '_ {
        self.primary.iter().chain(&self.secondaries).copied()
    }

    /// Every copy that it names.
    pub fn copies(&self) -> impl Iterator<Item = InstanceId> + '_ {
        self.members().chain(self.candidates.keys().copied())
    }

    /// The same with the next version.
    pub(super) fn next(&self) -> Self {
        let stamp = Stamp { version: self.stamp.version.next(), ..self.stamp };
        Self { stamp, ..self.clone() }
    }

    /// The next one, in which the member `copy` begins a term as primary.
    pub(super) fn with_primary(&self, copy: InstanceId) -> Self {
        let mut next = self.next();
        next.term = next.stamp;
        next.secondaries.extend(next.primary);
        next.secondaries.remove(&copy);
        next.primary = Some(copy);
        next
    }

    /// Whether it says that writes were lost in its term, so that nobody needs to say it again.
    pub(super) fn says_what_is_lost(&self) -> bool {
        self.lost >= self.term
    }

    /// Whether a copy is a candidate of which nothing is known.
    pub(super) fn lacks_everything(&self, copy: InstanceId) -> bool {
        self.candidates.get(&copy) == Some(&Lacks::Everything)
    }

    /// Makes a secondary a candidate that lacks what is written from this version on.
    pub(super) fn drop_member(&mut self, copy: InstanceId) {
        if self.secondaries.remove(&copy) {
            self.candidates.insert(copy, Lacks::Since(self.stamp));
        }
    }

    /// Makes a candidate a secondary.
    pub(super) fn admit(&mut self, copy: InstanceId) {
        if self.candidates.remove(&copy).is_some() {
            self.secondaries.insert(copy);
        }
    }
}
