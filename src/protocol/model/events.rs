//! Which events are possible, and what they do.

use super::Invariant;
use super::oracle::Oracle;
use super::world::{Action, Envelope, Node, Proposal, Slot, World, copy, fingerprint, node_of, range_of};
use crate::protocol::*;
use crate::volume::InstanceId;

impl World {
    pub fn actions(&self, actions: &mut Vec<Action>) {
        let bounds = &self.bounds;
        for (index, node) in self.nodes.iter().enumerate() {
            let n = index as u8;
            if node.wish == n && node.slots.len() < 3 {
                self.requests(n, actions);
            }
            actions.extend(node.slots.iter().filter(|(_, slot)| slot.done).map(|(tag, _)| Action::Reply(n, *tag)));
            actions.extend(node.operations.keys().map(|operation| Action::Disk(n, *operation)));
            if node.wish != self.wish {
                actions.push(Action::TellWish(n));
            }
            let behind = node.replica.record().configuration.stamp < self.catalogue.stamp;
            if behind || node.asked {
                actions.push(Action::Inform(n));
            }
            if node.replica.is_primary() && (bounds.expiries > 0 || bounds.reads > 0 || self.has_expired()) {
                actions.push(Action::Tick(n));
            }
            for other in (0..self.nodes.len() as u8).filter(|other| *other != n) {
                if bounds.reconnects > 0 {
                    actions.push(Action::Connect(n, other));
                }
                if bounds.suspicions > 0 {
                    actions.push(Action::Suspect(n, other));
                }
            }
            for applied in [false, true] {
                if applied && node.operations.is_empty() {
                    continue;
                }
                actions.extend((bounds.kills > 0).then_some(Action::Restart(n, false, applied)));
                actions.extend((bounds.power_cuts > 0).then_some(Action::Restart(n, true, applied)));
            }
        }
        if bounds.wishes > 0 {
            actions.extend((0..bounds.copies).filter(|n| *n != self.wish).map(Action::Wish));
        }
        actions.extend((bounds.expiries > 0).then_some(Action::Expire));
        self.deliveries(actions);
    }

    fn requests(&self, n: u8, actions: &mut Vec<Action>) {
        // An application that nobody has stopped yet may look on beside its successor.
        let wished = self.wish == n;
        for block in 0..self.bounds.blocks {
            if wished && self.oracle.submitted() < usize::from(self.bounds.writes) {
                actions.push(Action::Write(n, block));
            }
            if self.bounds.reads > 0 {
                actions.push(Action::Read(n, block));
            }
        }
        actions.extend((wished && self.bounds.flushes > 0).then_some(Action::Flush(n)));
    }

    fn deliveries(&self, actions: &mut Vec<Action>) {
        for envelope in self.network.values() {
            actions.push(Action::Deliver(envelope.clone()));
            if self.bounds.repetitions > 0 {
                actions.push(Action::Repeat(envelope.clone()));
            }
        }
        for proposal in self.proposals.values() {
            if self.catalogue.stamp != proposal.expected || self.bounds.reconfigurations > 0 {
                actions.push(Action::Commit(proposal.clone(), false));
                if self.bounds.ambiguous > 0 {
                    actions.push(Action::Commit(proposal.clone(), true));
                    actions.push(Action::NoAnswer(proposal.clone()));
                }
            }
        }
    }

    pub fn act(&mut self, action: &Action) {
        // Time passes for everybody.
        let before = if *action == Action::Expire { vec![] } else { self.nodes.clone() };
        self.happen(action);
        self.check();
        self.simplify(&before);
    }

    fn happen(&mut self, action: &Action) {
        match action {
            Action::Write(n, block) => {
                let value = self.oracle.submit(*n, usize::from(*block));
                self.submit(*n, Request::Write(range_of(*block)), value);
            }
            Action::Read(n, block) => {
                self.bounds.reads -= 1;
                let since = self.oracle.submitted() as u8;
                self.submit(*n, Request::Read(range_of(*block)), since);
            }
            Action::Flush(n) => {
                self.bounds.flushes -= 1;
                self.submit(*n, Request::Flush, 0);
            }
            Action::Disk(n, operation) => self.finish(*n, *operation),
            Action::Reply(n, tag) => self.reply(*n, *tag),
            Action::Deliver(envelope) => {
                self.network.remove(&fingerprint(envelope));
                self.deliver(envelope);
            }
            Action::Repeat(envelope) => {
                self.bounds.repetitions -= 1;
                self.deliver(envelope);
            }
            Action::Tick(n) => self.step(*n, Input::Tick),
            Action::Connect(n, other) => {
                self.bounds.reconnects -= 1;
                self.step(*n, Input::Connected(copy(*other)));
            }
            Action::Suspect(n, other) => {
                self.bounds.suspicions -= 1;
                self.step(*n, Input::Silent(copy(*other)));
            }
            Action::Wish(n) => {
                self.bounds.wishes -= 1;
                self.wish = *n;
            }
            Action::TellWish(n) => self.tell_wish(*n),
            Action::Commit(proposal, lost) => self.commit(proposal, *lost),
            Action::NoAnswer(proposal) => {
                self.bounds.ambiguous -= 1;
                self.answer(proposal, Outcome::Ambiguous);
            }
            Action::Inform(n) => {
                self.at(*n).asked = false;
                let current = Box::new(self.catalogue.clone());
                self.step(*n, Input::Configuration(current));
            }
            Action::Expire => {
                self.bounds.expiries -= 1;
                self.epoch += 1;
            }
            Action::Restart(n, power, applied) => self.restart(*n, *power, *applied),
        }
    }

    fn submit(&mut self, n: u8, request: Request, value: u8) {
        let covered = if request == Request::Flush { self.oracle.overwritten() } else { vec![] };
        let node = self.at(n);
        let tag = node.next_tag;
        node.next_tag += 1;
        node.slots.insert(tag, Slot { request, value, covered, done: false });
        self.step(n, Input::Request { tag: Tag(tag), request });
    }

    fn deliver(&mut self, envelope: &Envelope) {
        let from = copy(envelope.from);
        if let Message::Prepare { frame, serial, .. }
        | Message::Copy { frame, serial, .. }
        | Message::Compare { frame, serial, .. }
        | Message::Prepared { frame, serial, .. } = envelope.message
        {
            // Bytes that still wait for their turn are not those of a later frame, nor of another term's.
            self.at(envelope.to).brought.entry((from, frame.stamp, serial)).or_insert(envelope.value);
        }
        self.step(envelope.to, Input::Received { from, message: envelope.message.clone() });
        let Node { brought, replica, .. } = self.at(envelope.to);
        brought.retain(|(from, stamp, serial), _| replica.wants(*from, *stamp, *serial));
    }

    fn commit(&mut self, proposal: &Proposal, lost: bool) {
        self.proposals.remove(&fingerprint(proposal));
        let outcome = if self.catalogue.stamp == proposal.expected {
            self.bounds.reconfigurations -= 1;
            let (before, next) = (&self.catalogue, &proposal.next);
            if next.primary.is_some_and(|primary| !before.is_member(primary)) {
                self.oracle.break_it(Invariant::MembersOnly);
            }
            self.catalogue = proposal.next.clone();
            Outcome::Committed
        } else {
            Outcome::Lost(Box::new(self.catalogue.clone()))
        };
        let outcome = if lost {
            self.bounds.ambiguous -= 1;
            Outcome::Ambiguous
        } else {
            outcome
        };
        self.answer(proposal, outcome);
    }

    fn answer(&mut self, proposal: &Proposal, outcome: Outcome) {
        let stamp = proposal.next.stamp;
        // The connection of a process that has died answers nobody.
        if self.nodes[usize::from(proposal.from)].incarnation == proposal.incarnation {
            self.step(proposal.from, Input::Proposed { stamp, outcome });
        }
    }

    fn restart(&mut self, n: u8, power: bool, applied: bool) {
        let operations = std::mem::take(&mut self.at(n).operations);
        for (operation, what) in operations.into_iter().filter(|_| applied) {
            self.effect(n, operation, what);
        }
        if !power {
            self.bounds.kills -= 1;
            return self.start(n);
        }
        self.bounds.power_cuts -= 1;
        let node = self.at(n);
        // The device is gone with the node: nobody hears of its requests any more.
        node.slots.clear();
        node.boot += 1;
        node.disk.cache.clone_from(&node.disk.stable);
        node.disk.lacking.values_mut().for_each(|since| since.cache.clone_from(&since.stable));
        let kept = |other: InstanceId| other != copy(n) && self.node(other).replica.record().intact;
        if self.catalogue.is_member(copy(n)) && !self.catalogue.members().any(kept) {
            for member in self.catalogue.members() {
                let cache = &self.nodes[usize::from(node_of(member))].disk.cache;
                cache.iter().enumerate().for_each(|(block, left)| Oracle::lose(&mut self.oracle, block, *left));
            }
            self.forget_covered();
        }
        self.start(n);
    }
}

impl World {
    /// A flush that waits at another node is executed after the loss: what it covers is what is left.
    fn forget_covered(&mut self) {
        let left: Vec<Vec<u8>> = self
            .catalogue
            .members()
            .map(|member| self.nodes[usize::from(node_of(member))].disk.cache.clone())
            .collect();
        for node in &mut self.nodes {
            if node.slots.values().all(|slot| slot.covered.is_empty()) {
                continue;
            }
            for slot in std::sync::Arc::make_mut(node).slots.values_mut() {
                for (block, covered) in slot.covered.iter_mut().enumerate() {
                    covered.retain(|value| left.iter().all(|cache| cache[block] != *value));
                }
            }
        }
    }

    fn has_expired(&self) -> bool {
        self.epoch > 1
    }
}
