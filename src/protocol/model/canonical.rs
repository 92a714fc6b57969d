//! Fewer states: what no future event can tell apart is made equal, and what can have no effect any more is removed.
//!
//! Names of operations and tags are only compared, so each node's are numbered from zero in their order. Times that have
//! passed are all the same. A message that its receiver will ignore for ever is gone, unless the planted mistake is to heed
//! it. (It would still show that its sender is not silent: that is the state of one suspicion less.)

use super::world::{Envelope, Node, Proposal, World};
use crate::protocol::tests::Planted;
use crate::protocol::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

impl World {
    /// `before`: the nodes before the event, of which most have not changed.
    pub(super) fn simplify(&mut self, before: &[Arc<Node>]) {
        let now = self.now();
        let Self { nodes, network, proposals, catalogue, oracle, .. } = self;
        let expired = before.is_empty();
        for (at, node) in nodes.iter_mut().enumerate() {
            if expired || !Arc::ptr_eq(node, &before[at]) {
                rename(Arc::make_mut(node), now);
            }
            if node.executed.iter().any(|value| !oracle.is_unknown(*value)) {
                Arc::make_mut(node).executed.retain(|value| oracle.is_unknown(*value));
            }
        }
        if matches!(self.planted, Some(Planted::AcceptOlderVersion | Planted::AcceptOlderIncarnation)) {
            return;
        }
        network.retain(|_, envelope| !is_dead(envelope, &nodes[usize::from(envelope.to)], now));
        proposals.retain(|_, proposal| proposal.expected == catalogue.stamp || is_awaited(proposal, nodes));
    }
}

/// Whether anybody listens to the answer of a proposal that was overtaken.
fn is_awaited(proposal: &Proposal, nodes: &[Arc<Node>]) -> bool {
    let node = &nodes[usize::from(proposal.from)];
    let waits = node.replica.proposal.as_ref().is_some_and(|next| next.stamp == proposal.next.stamp);
    waits && node.incarnation == proposal.incarnation
}

/// Whether the receiver will ignore it whatever happens: what is durable there is newer, and never goes back. A refusal
/// only makes its receiver read the catalogue, which it may do at any time once it is behind.
fn is_dead(envelope: &Envelope, to: &Node, now: Now) -> bool {
    let durable = to.disk.record.configuration.stamp;
    match &envelope.message {
        Message::Invite(configuration) => configuration.stamp < durable,
        // The model has no clients.
        Message::Refused(_) | Message::Enter { .. } | Message::Entered { .. } => true,
        Message::Ask { .. } | Message::Answer { .. } => true,
        Message::Prepare { frame, .. }
        | Message::Copy { frame, .. }
        | Message::Compare { frame, .. }
        | Message::Renew { frame, .. }
        | Message::Reconciled(frame)
        | Message::Clear { frame, .. } => frame.stamp < durable,
        Message::Granted { frame, sent } => is_unheard(*frame, to) || now.0 >= sent.0 + LEASE,
        Message::Joined { frame, .. } | Message::Settled(frame) => is_unheard(*frame, to),
        Message::Prepared { frame, serial, .. } | Message::Compared { frame, serial, .. } => {
            let replica = &to.replica;
            let started = replica.admission.serial(*serial).is_some();
            is_unheard(*frame, to) || (frame.stamp == durable && *serial < replica.next_serial && !started)
        }
    }
}

/// Whether an answer comes too late: its receiver is no primary of that version, and whoever becomes primary does so
/// under a newer one.
fn is_unheard(frame: Frame, to: &Node) -> bool {
    let durable = to.disk.record.configuration.stamp;
    frame.stamp < durable || (frame.stamp == durable && to.replica.persisting.is_none() && !to.replica.is_primary())
}

fn rename(node: &mut Node, now: Now) {
    let Node { replica, operations, read, slots, .. } = node;
    read.retain(|operation, _| replica.copies(*operation));
    let live: BTreeSet<OperationId> = operations.keys().chain(read.keys()).copied().collect();
    let names: BTreeMap<OperationId, OperationId> = live.into_iter().zip((0..).map(OperationId)).collect();
    // What has ended is never asked for again, whatever its name.
    let name = |operation: OperationId| names.get(&operation).copied().unwrap_or(OperationId(u64::MAX));
    *operations = std::mem::take(operations).into_iter().map(|(key, what)| (name(key), what)).collect();
    *read = std::mem::take(read).into_iter().map(|(key, value)| (name(key), value)).collect();
    let tags: BTreeMap<u32, u32> = slots.keys().copied().zip(0..).collect();
    *slots = std::mem::take(slots).into_iter().map(|(tag, slot)| (tags[&tag], slot)).collect();
    node.next_tag = tags.len() as u32;
    for entry in replica.admission.iter_mut() {
        (entry.arrived, entry.owed) = (Now::default(), 0);
        if !entry.tag.is_own() {
            entry.tag = Tag(tags[&entry.tag.0]);
        }
    }
    replica.rename(name);
    replica.next_operation = OperationId(names.len() as u64);
    (replica.now, replica.progress, replica.quiet) = (Now::default(), Default::default(), 0);
    let passed = |time: &mut Now| *time = if *time <= now { Now::default() } else { *time };
    passed(&mut replica.granted_until);
    // Less than a mark's age ever passes here.
    replica.clearing.looked = Now::default();
    passed(&mut replica.rests_until);
    replica.peers.iter_mut().for_each(|peer| {
        peer.owes = 0;
        passed(&mut peer.lease_until);
    });
}
