//! The invariants that are looked at in every state.

use super::disk::Disk;
use super::world::{Node, World, copy};
use super::{Cluster, Invariant};
use crate::protocol::*;

fn marked(node: &Node, block: usize) -> bool {
    node.disk.hot.contains(&Extent(block as u32))
}

impl World {
    /// Remembers the first invariant that does not hold, if no event has broken one before.
    pub fn check(&mut self) {
        let states = [
            (Invariant::Durable, self.members_have_everything()),
            (Invariant::OnePrimary, self.primaries_are_alone()),
            (Invariant::KnownDifferences, self.differences_are_known()),
            (Invariant::Marked, self.unflushed_is_marked()),
        ];
        states.into_iter().filter(|(_, holds)| !holds).for_each(|(invariant, _)| self.oracle.break_it(invariant));
    }

    fn members(&self) -> impl Iterator<Item = &Node> {
        self.catalogue.members().map(|member| self.node(member))
    }

    fn blocks(&self) -> std::ops::Range<usize> {
        0..usize::from(self.bounds.blocks)
    }

    fn members_have_everything(&self) -> bool {
        self.blocks().all(|block| {
            self.members().all(|node| {
                let Disk { cache, stable, .. } = &node.disk;
                let kept = !node.replica.record().intact || self.oracle.is_possible(block, cache[block]);
                kept && !self.oracle.is_flushed_away(block, stable[block])
            })
        })
    }

    fn primaries_are_alone(&self) -> bool {
        let primaries = self.nodes.iter().filter(|node| node.replica.is_primary());
        let stamps: Vec<Stamp> = primaries.map(|node| node.replica.record().configuration.stamp).collect();
        (1..stamps.len()).all(|i| !stamps[..i].contains(&stamps[i]))
    }

    fn differences_are_known(&self) -> bool {
        let members: Vec<&Node> = self.members().collect();
        let pairs = members.iter().flat_map(|a| members.iter().map(move |b| (*a, *b)));
        let between = pairs
            .into_iter()
            .all(|(a, b)| self.blocks().all(|x| a.disk.cache[x] == b.disk.cache[x] || marked(a, x) || marked(b, x)));
        let differs = |a: &Node, b: &Node, x: usize| a.disk.cache[x] != b.disk.cache[x];
        between
            && self.candidates().all(|(primary, candidate, since)| {
                let known = |x: usize| primary.disk.lacking.get(&since).is_none_or(|lacking| lacking.has(x));
                self.blocks().all(|x| !differs(primary, candidate, x) || known(x) || marked(candidate, x))
            })
    }

    /// Beside the primary, the candidates of which it is known since when they lack something.
    fn candidates(&self) -> impl Iterator<Item = (&Node, &Node, Stamp)> {
        let primary = self.catalogue.primary.map(|primary| self.node(primary));
        let primary = primary.filter(|n| n.disk.record.configuration.stamp == self.catalogue.stamp);
        let all = self.catalogue.candidates.iter().filter_map(|(copy, lacks)| match lacks {
            Lacks::Since(since) => Some((self.node(*copy), *since)),
            Lacks::Everything => None,
        });
        primary.into_iter().flat_map(move |primary| all.clone().map(move |(node, since)| (primary, node, since)))
    }

    /// Also on candidates that count as intact, but for what is known that they lack: what they were sent for a resync that was
    /// given up may be executed late.
    fn unflushed_is_marked(&self) -> bool {
        let is_safe = |node: &Node, x: usize| node.disk.cache[x] == node.disk.stable[x] || marked(node, x);
        let several = self.catalogue.members().count() > 1;
        let intact = self.candidates().filter(|(_, candidate, _)| candidate.disk.record.intact);
        (!several || self.members().all(|node| self.blocks().all(|x| is_safe(node, x))))
            && intact.into_iter().all(|(primary, candidate, since)| {
                let peers = &primary.replica.peers;
                let unanswered = peers.iter().filter(|peer| peer.copy == candidate.replica.me);
                let unanswered: Vec<Extent> =
                    unanswered.flat_map(|peer| peer.unanswered.iter().flatten().copied()).collect();
                let lacking = primary.disk.lacking.get(&since);
                let known = |x: usize| {
                    lacking.is_none_or(|lacking| lacking.cache.contains(&x)) || unanswered.contains(&Extent(x as u32))
                };
                self.blocks().all(|x| is_safe(candidate, x) || known(x))
            })
    }

    pub fn serves(&self, copy: usize) -> bool {
        self.nodes.get(copy).is_some_and(|node| node.replica.role() == Role::Primary(Primary::Serving))
    }

    pub fn has_equal_candidate(&self) -> bool {
        self.nodes.iter().any(|node| node.replica.peers.iter().any(|peer| peer.is_equal()))
    }

    /// The candidate of the beginning is a member.
    pub fn has_admitted(&self, cluster: &Cluster) -> bool {
        cluster.bounds.candidate && self.catalogue.is_member(copy(cluster.bounds.copies))
    }

    pub fn is_reconciling(&self) -> bool {
        let reconciling = |node: &Node| node.replica.role() == Role::Primary(Primary::Reconciling);
        self.nodes.iter().any(|node| reconciling(node) && node.replica.copying.is_some())
    }

    /// A primary that lost writes gets them from a member that has them.
    pub fn is_fetching(&self) -> bool {
        self.nodes.iter().any(|node| node.replica.copying.as_ref().is_some_and(|copying| copying.has_source()))
    }

    /// A read waits, because a secondary has not granted the lease.
    pub fn misses_lease(&self) -> bool {
        let waits =
            |node: &Node| node.slots.values().any(|slot| matches!(slot.request, Request::Read(_)) && !slot.done);
        (0..self.nodes.len()).any(|n| self.serves(n) && !self.nodes[n].replica.has_lease() && waits(&self.nodes[n]))
    }

    /// A compare-and-swap was not answered, and whoever proposed it acts under the catalogue's configuration again.
    pub fn has_resolved(&self, cluster: &Cluster) -> bool {
        self.bounds.ambiguous < cluster.bounds.ambiguous
            && self.catalogue.primary.is_some_and(|primary| {
                let replica = &self.node(primary).replica;
                replica.proposal.is_none() && replica.is_primary() && replica.record.configuration == self.catalogue
            })
    }
}
