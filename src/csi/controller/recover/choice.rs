//! Which configuration a mirrored volume goes on with, by what lies beside its copies.
//!
//! # Invariants
//! * Pure: a function of the records that were read.
//! * The record with the highest (generation, version) decides, and only when every copy that it names was read.
//!
//! Why that suffices. Let C be the newest configuration that was found. Say that some copy acts, or has acted, under a later
//! one, and let D be the first one committed after C. Only a member of C could propose D: a proposal is one version above
//! what is durable beside its proposer. And nothing is done under D before its primary, which is that proposer, has D durable
//! beside it. Whatever follows D is proposed by a member of D that has D durable; a member of D is named in C, because a copy
//! becomes a candidate one configuration before it can be admitted. So in each case a copy that C names knows D or a later
//! one; it was read, and then C was not the newest. What a forced promotion committed has one member, which must be named in
//! the newest configuration that was known, and the same holds for it.
//!
//! It needs that nobody commits to the lost catalogue any more: the old controller does not run, and a replica knows one.

use crate::catalog::NodeName;
use crate::protocol::{Configuration, Generation, Lacks, Stamp};
use crate::volume::InstanceId;
use std::collections::{BTreeMap, BTreeSet};

/// A copy as its node has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub node: NodeName,
    /// In which pool.
    pub pool: String,
    /// The newest committed one that the copy knows; `None`: it has never acted.
    pub configuration: Option<Configuration>,
    /// It has kept everything that it ever acknowledged: as a member, every acknowledged write.
    pub intact: bool,
    /// Its removal was decided.
    pub removing: bool,
    /// The other copies, and where they were last.
    pub peers: BTreeMap<InstanceId, NodeName>,
    /// It has a device,
    pub attached: bool,
    /// and answers its requests.
    pub serves: bool,
}

/// What was read of a volume.
pub type Copies = BTreeMap<InstanceId, Found>;

/// What follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// All that it names were read: the volume goes on with it.
    Complete(Configuration),
    /// Copies that may know a newer one were not read.
    Missing {
        /// The newest that was found, if any.
        newest: Option<Configuration>,
        /// Who may know better.
        missing: BTreeSet<InstanceId>,
    },
    /// Two different configurations have the same, highest version: two histories.
    Split(Stamp),
    /// The volume was being deleted.
    Going,
    /// Every copy is there and none has ever acted: it was being made.
    Unused,
}

/// The newest configuration that was found.
pub fn newest(found: &Copies) -> Option<&Configuration> {
    found.values().filter_map(|copy| copy.configuration.as_ref()).max_by_key(|known| known.stamp)
}

/// See the module.
pub fn choose(found: &Copies) -> Choice {
    decide(found, |named| named.filter(|copy| !found.contains_key(copy)).collect())
}

fn decide(found: &Copies, unread: impl Fn(&mut dyn Iterator<Item = InstanceId>) -> BTreeSet<InstanceId>) -> Choice {
    let removing = |copy: &InstanceId| found.get(copy).is_some_and(|copy| copy.removing);
    if found.keys().all(removing) {
        return Choice::Going;
    }
    let Some(newest) = newest(found) else {
        let missing = unread(&mut found.values().flat_map(|copy| copy.peers.keys().copied()));
        return if missing.is_empty() { Choice::Unused } else { Choice::Missing { newest: None, missing } };
    };
    let differs = |known: &Configuration| known.stamp == newest.stamp && known != newest;
    if found.values().filter_map(|copy| copy.configuration.as_ref()).any(differs) {
        return Choice::Split(newest.stamp);
    }
    let missing = unread(&mut newest.copies());
    if !missing.is_empty() {
        return Choice::Missing { newest: Some(newest.clone()), missing };
    }
    // A member goes only with its volume.
    if newest.members().any(|copy| removing(&copy)) {
        return Choice::Going;
    }
    let mut chosen = newest.clone();
    for (copy, lacks) in &mut chosen.candidates {
        if found.get(copy).is_some_and(|found| has_strayed(*copy, found, *lacks)) {
            *lacks = Lacks::Everything;
        }
    }
    Choice::Complete(chosen)
}

/// It counts itself a member at a version at which it had left: an old catalogue was restored, and it has gone on under that.
fn has_strayed(copy: InstanceId, found: &Found, lacks: Lacks) -> bool {
    let Lacks::Since(since) = lacks else { return false };
    found.configuration.as_ref().is_some_and(|own| own.stamp >= since && own.is_member(copy))
}

/// The same in a raised generation: newer than anything that any copy or the lost catalogue knows. Its primary stays named,
/// so that a running one goes on by a term of its own and answers no request with an error.
pub fn raised(base: &Configuration, generation: Generation) -> Configuration {
    let stamp = Stamp { generation, version: base.stamp.version.next() };
    Configuration { stamp, term: stamp, ..base.clone() }
}

/// The copy that was forced is the only member, of all others nothing is believed. Whoever uses the volume without a copy is
/// told that writes may be lost.
pub fn forced(newest: &Configuration, copy: InstanceId, generation: Generation) -> Configuration {
    let others = newest.copies().filter(|other| *other != copy);
    let candidates = others.map(|other| (other, Lacks::Everything)).collect();
    let stamp = Stamp { generation, version: newest.stamp.version.next() };
    let (primary, secondaries) = (Some(copy), BTreeSet::new());
    Configuration { stamp, term: stamp, primary, secondaries, candidates, lost: stamp }
}

/// The copy that is in use: the primary, if its device is there, also while its requests wait for the catalogue; else the only
/// member that serves one.
pub fn in_use(found: &Copies, configuration: &Configuration) -> Option<InstanceId> {
    let attached = |copy: &InstanceId| found.get(copy).is_some_and(|copy| copy.attached);
    if let Some(primary) = configuration.primary.filter(attached) {
        return Some(primary);
    }
    let mut serving = configuration.members().filter(|copy| attached(copy) && found[copy].serves);
    serving.next().filter(|_| serving.next().is_none())
}

#[cfg(test)]
mod tests;
