//! The catalogue and the controller: compare-and-swap with answers that are lost or late, and the wish.

use super::cluster::{Cluster, Event, Spec};
use crate::protocol::*;
use std::time::Duration;

/// After this a proposer does not know what became of its proposal.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_secs(1);

impl Cluster {
    /// An engine proposes; the request may be lost, or land when nobody waits for it any more.
    pub fn propose(&mut self, node: usize, life: u64, expected: Stamp, next: Configuration) {
        let number = self.number();
        let stamp = next.stamp;
        if let Some(process) = self.nodes[node].life(life) {
            process.proposing = Some(number);
        }
        let late = !self.healing && self.random.percent(8);
        let delay = if late { self.random.millis(500, 6000) } else { self.random.millis(1, 30) };
        if !self.nodes[node].isolated {
            self.at(delay, Event::Decide { node, life, number, expected, next });
        }
        self.at(PATIENCE, Event::Decided { node, life, number, stamp, outcome: Outcome::Ambiguous });
    }

    pub fn ask_catalogue(&mut self, node: usize, life: u64) {
        let delay = self.random.millis(1, 20);
        self.at(delay, Event::Read(node, life));
    }

    pub fn catalogue_event(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Decide { node, life, number, expected, next } => self.decide(node, life, number, expected, next),
            Event::Decided { node, life, number, stamp, outcome } => {
                let Some(process) = self.nodes[node].life(life) else { return Ok(()) };
                if process.proposing != Some(number) {
                    return Ok(());
                }
                process.proposing = None;
                self.tally.ambiguous += u64::from(outcome == Outcome::Ambiguous);
                self.step(node, Input::Proposed { stamp, outcome })
            }
            Event::Read(node, life) => {
                self.read_catalogue(node, life);
                Ok(())
            }
            Event::Told(node, life, configuration) => self.told(node, life, configuration),
            Event::Wished(node, life) => self.wished(node, life),
            _ => Ok(()),
        }
    }

    fn decide(
        &mut self,
        node: usize,
        life: u64,
        number: u64,
        expected: Stamp,
        next: Configuration,
    ) -> Result<(), String> {
        let stamp = next.stamp;
        let outcome = if self.catalogue.stamp == expected {
            if next.primary.is_some_and(|primary| !self.catalogue.is_member(primary)) {
                return Err(format!("I4: {next:?} promotes a copy that is no member of {:?}", self.catalogue));
            }
            self.note(|| format!("committed by node {node}: {next:?}"));
            self.tally.reconfigurations += 1;
            self.catalogue = next;
            self.admit_tears(node);
            for other in 0..self.nodes.len() {
                let delay = self.random.millis(1, 100);
                if let Some(process) = &self.nodes[other].process {
                    let life = process.life;
                    self.at(delay, Event::Read(other, life));
                }
            }
            Outcome::Committed
        } else {
            Outcome::Lost(Box::new(self.catalogue.clone()))
        };
        let lost = !self.healing && self.random.percent(10);
        if !lost && !self.nodes[node].isolated {
            let delay = self.random.millis(1, 30);
            self.at(delay, Event::Decided { node, life, number, stamp, outcome });
        }
        Ok(())
    }

    fn read_catalogue(&mut self, node: usize, life: u64) {
        let current = self.catalogue.clone();
        let delay = self.random.millis(1, 20);
        let n = &mut self.nodes[node];
        let isolated = n.isolated;
        let Some(process) = n.life(life) else { return };
        if isolated {
            process.behind = true;
            return;
        }
        self.at(delay, Event::Told(node, life, current));
    }

    fn told(&mut self, node: usize, life: u64, configuration: Configuration) -> Result<(), String> {
        let Some(process) = self.nodes[node].life(life) else { return Ok(()) };
        let first = !std::mem::replace(&mut process.informed, true);
        self.step(node, Input::Configuration(Box::new(configuration)))?;
        if first { self.wished(node, life) } else { Ok(()) }
    }

    fn wished(&mut self, node: usize, life: u64) -> Result<(), String> {
        let Spec { primary, copies } = self.spec.clone();
        let n = &mut self.nodes[node];
        let isolated = n.isolated;
        let Some(process) = n.life(life) else { return Ok(()) };
        if isolated || !process.informed {
            process.behind = true;
            return Ok(());
        }
        self.step(node, Input::Wish(Wish { primary, copies }))
    }

    /// What the spec wants has changed: each engine hears of it some time.
    pub fn tell_wishes(&mut self) {
        let spec = &self.spec;
        let text = format!("the spec wants {:?} of {:?}", spec.primary, spec.copies);
        self.note(|| text);
        for node in 0..self.nodes.len() {
            let delay = self.random.millis(1, 100);
            if let Some(process) = &self.nodes[node].process {
                let life = process.life;
                self.at(delay, Event::Wished(node, life));
            }
        }
    }

    /// What a controller repeats until it is so: a primary that can be had, and its application.
    pub fn controller(&mut self) {
        self.at(AGAIN, Event::Controller);
        let Some(wished) = self.spec.primary else { return };
        let orphaned = self.catalogue.primary.is_none_or(|primary| self.node_of(primary).is_none());
        if !self.catalogue.is_member(wished) && (orphaned || self.node_of(wished).is_none()) {
            self.wish_a_member();
            self.tell_wishes();
        }
        let node = self.spec.primary.and_then(|copy| self.node_of(copy));
        if let Some(node) = node.filter(|node| self.nodes[*node].depth == 0 && !self.healing) {
            self.open_application(node);
        }
    }

    /// Only a member can become primary; one that nobody wanted any more is wanted again if there is no other.
    pub fn wish_a_member(&mut self) {
        let members: Vec<_> = self.catalogue.members().filter(|copy| self.node_of(*copy).is_some()).collect();
        let best = members.iter().find(|copy| self.spec.copies.contains(copy)).or(members.first()).copied();
        if let Some(best) = best {
            self.spec.copies.insert(best);
            self.spec.primary = Some(best);
        }
    }
}
