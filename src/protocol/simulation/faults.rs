//! What goes wrong, for how long, and how it is mended.

use super::cluster::{Cluster, Event};
use super::disk::Disk;
use super::oracle::WriteId;
use crate::protocol::*;
use crate::volume::{BlockRange, InstanceId};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long an operation takes at most on a slow disk, and on one that crawls.
const SLOW: Duration = Duration::from_millis(2500);
pub const CRAWLING: Duration = Duration::from_secs(30);

/// What ends some time.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Killed(usize),
    PowerCut(usize),
    Paused(usize),
    Cut(usize, usize, bool),
    Isolated(usize),
    Slow(usize),
    /// Its disk lets more than the patience pass.
    Crawling(usize),
    Broken(usize),
    Full(usize),
    Unpublished,
}

impl Cluster {
    /// Something goes wrong, and the next thing will.
    pub fn fault(&mut self) -> Result<(), String> {
        if self.healing {
            return Ok(());
        }
        let next = self.random.millis(50, 2500);
        self.at(next, Event::Fault);
        let node = self.random.index(self.nodes.len());
        let other = (node + 1 + self.random.index(self.nodes.len() - 1)) % self.nodes.len();
        let (fault, least, most) = match self.random.below(100) {
            0..15 => (Fault::Killed(node), 1, 600),
            15..30 if self.is_spared(node) => return Ok(()),
            15..30 => (Fault::PowerCut(node), 500, 9000),
            30..40 => (Fault::Paused(node), 50, 8000),
            40..55 => (Fault::Cut(node, other, self.random.percent(50)), 100, 9000),
            55..62 => (Fault::Isolated(node), 100, 6000),
            62..66 => (Fault::Slow(node), 100, 6000),
            66..67 => (Fault::Crawling(node), 100, 20_000),
            67..71 => (Fault::Broken(node), 100, 3000),
            71..75 => (Fault::Full(node), 100, 5000),
            75..79 => (Fault::Unpublished, 100, 3000),
            79..92 => return self.move_primary(),
            92..96 => return self.replace(node),
            96..98 => return self.change_copies(node),
            _ => return self.distrust(node),
        };
        self.note(|| format!("fault: {fault:?}"));
        self.begin_fault(fault);
        let lasts = self.random.millis(least, most);
        self.at(lasts, Event::Heal(fault));
        Ok(())
    }

    /// A person does not trust the copy there.
    fn distrust(&mut self, node: usize) -> Result<(), String> {
        let copy = self.nodes[node].disk.instance;
        self.note(|| format!("node {node} is to be made equal to the primary"));
        self.tally.distrusted += u64::from(self.catalogue.is_member(copy));
        (0..self.nodes.len()).try_for_each(|node| self.step(node, Input::Resync(copy)))
    }

    fn begin_fault(&mut self, fault: Fault) {
        match fault {
            Fault::Killed(node) => {
                self.tally.kills += 1;
                self.kill(node);
                self.network.disconnect_all(node);
            }
            Fault::PowerCut(node) => self.cut_power(node),
            Fault::Paused(node) => self.nodes[node].paused = self.nodes[node].process.is_some(),
            Fault::Cut(a, b, both) => {
                self.tally.partitions += 1;
                self.network.set_cut(a, b, true);
                if both {
                    self.network.set_cut(b, a, true);
                }
            }
            Fault::Isolated(node) => self.nodes[node].isolated = true,
            Fault::Slow(node) => self.nodes[node].slow = Some(SLOW),
            Fault::Crawling(node) => self.nodes[node].slow = Some(CRAWLING),
            Fault::Broken(node) => self.nodes[node].broken = true,
            Fault::Full(node) => self.nodes[node].full = true,
            Fault::Unpublished => {
                self.close_application();
                self.spec.primary = None;
                self.tell_wishes();
            }
        }
    }

    pub fn heal(&mut self, fault: Fault) -> Result<(), String> {
        match fault {
            Fault::Killed(node) => self.at(Duration::ZERO, Event::Start(node)),
            Fault::PowerCut(node) => {
                let n = &mut self.nodes[node];
                if !n.powered {
                    (n.powered, n.booted) = (true, self.now);
                    self.at(Duration::ZERO, Event::Start(node));
                }
            }
            Fault::Paused(node) => self.resume(node),
            Fault::Cut(a, b, _) => {
                self.network.set_cut(a, b, false);
                self.network.set_cut(b, a, false);
            }
            Fault::Isolated(node) => self.nodes[node].isolated = false,
            Fault::Slow(node) | Fault::Crawling(node) => self.nodes[node].slow = None,
            Fault::Broken(node) => {
                self.nodes[node].broken = false;
                self.replace_failed(node);
            }
            Fault::Full(node) => {
                self.nodes[node].full = false;
                return self.step(node, Input::SpaceFreed);
            }
            Fault::Unpublished if self.spec.primary.is_none() => return self.move_primary(),
            Fault::Unpublished => {}
        }
        Ok(())
    }

    fn resume(&mut self, node: usize) {
        self.nodes[node].paused = false;
        for event in std::mem::take(&mut self.nodes[node].backlog) {
            self.at(Duration::ZERO, event);
        }
    }

    /// A person looks after a disk that had errors and starts the engine again.
    fn replace_failed(&mut self, node: usize) {
        if self.nodes[node].process.as_ref().is_some_and(|process| process.failed) {
            self.kill(node);
            self.network.disconnect_all(node);
            self.at(Duration::from_millis(10), Event::Start(node));
        }
    }

    /// A member's disk is gone: what the others have only in their caches may be all there is, which is for people to decide.
    fn is_spared(&self, node: usize) -> bool {
        let mut others = self.members().into_iter().filter(|member| *member != node);
        let gone = self.catalogue.members().any(|copy| self.node_of(copy).is_none());
        gone && !others.any(|member| self.nodes[member].is_kept())
    }

    fn cut_power(&mut self, node: usize) {
        if !self.nodes[node].powered {
            return;
        }
        self.tally.power_cuts += 1;
        self.kill(node);
        let Self { nodes, random, oracle, .. } = self;
        let n = &mut nodes[node];
        // The device is gone with the node: nobody hears of its requests any more.
        for slot in std::mem::take(&mut n.slots).into_values().filter(|slot| slot.request.is_mutation()) {
            oracle.fail(slot.write);
        }
        (n.powered, n.depth) = (false, 0);
        n.caches += 1;
        n.booted_with = n.caches;
        n.disk.lose_caches(random, |block| oracle.tear(block));
        self.admit_losses();
    }

    /// A disk may have lost anything that it should have made durable.
    pub fn fail_flush(&mut self, node: usize) {
        let Self { nodes, random, oracle, tally, .. } = self;
        let n = &mut nodes[node];
        if n.process.as_mut().is_none_or(|process| std::mem::replace(&mut process.flush_failed, true)) {
            return;
        }
        n.caches += 1;
        tally.lost_flushes += 1;
        if random.percent(50) {
            n.disk.lose_caches(random, |block| oracle.tear(block));
        }
        self.admit_losses();
    }

    /// No member has everything that was ever acknowledged.
    fn is_nothing_kept(&self) -> bool {
        !self.members().into_iter().any(|member| self.nodes[member].is_kept())
    }

    /// If no member kept its caches, what was not flushed may be gone.
    fn admit_losses(&mut self) {
        if !self.is_nothing_kept() {
            return;
        }
        self.tally.lost_caches += 1;
        self.oracle.endanger();
        for block in self.oracle.blocks() {
            self.lose(block);
        }
        // What is gone is covered by no flush that comes after; a client is never told that it is (`client.rs`).
        let now: BTreeMap<_, _> = self.oracle.covered().into_iter().collect();
        let Self { nodes, guests, oracle, .. } = self;
        let slots = nodes.iter_mut().flat_map(|n| n.slots.values_mut());
        let slots = slots.chain(guests.iter_mut().flat_map(|guest| guest.slots.values_mut()));
        for (block, id) in slots.flat_map(|slot| &mut slot.covered) {
            *id = oracle.older(*id, now.get(block).copied().unwrap_or(0));
        }
    }

    /// What the members have of a block is all there is.
    fn lose(&mut self, block: u64) {
        for member in self.members() {
            self.oracle.lose(block, self.nodes[member].disk.get(block));
        }
    }

    /// A flush may fail between the writing of something and its acknowledgement: it is gone, then, like what was acknowledged
    /// before. No flush can cover it any more, and the device ends.
    pub fn admit_late_losses(&mut self, range: BlockRange, write: WriteId) {
        if self.oracle.is_endangered(write) && self.is_nothing_kept() {
            (range.start()..range.end()).for_each(|block| self.lose(block));
        }
    }

    /// A proposal may land when the only members that it leaves have lost their caches. Its proposer had flushed what was
    /// acknowledged, but what was under way may be torn there. The others may have lost power before, unheard.
    pub fn admit_tears(&mut self, proposer: usize) {
        if !self.is_nothing_kept() {
            return;
        }
        self.oracle.endanger();
        let members = self.members();
        for block in self.oracle.blocks() {
            for member in &members {
                let left = self.nodes[*member].disk.get(block);
                if *member == proposer { self.oracle.leave(block, left) } else { self.oracle.lose(block, left) }
            }
        }
    }

    fn close_application(&mut self) {
        // A pod that is cut off from its controller goes on; the others end.
        for node in 0..self.nodes.len() {
            if self.random.percent(70) {
                self.nodes[node].depth = 0;
            }
        }
    }

    /// The volume is published at another node.
    fn move_primary(&mut self) -> Result<(), String> {
        let members: Vec<InstanceId> =
            self.catalogue.members().filter(|copy| self.spec.copies.contains(copy)).collect();
        if members.is_empty() {
            return Ok(());
        }
        let wished = members[self.random.index(members.len())];
        self.tally.moves += 1;
        self.close_application();
        self.spec.primary = Some(wished);
        self.tell_wishes();
        if let Some(node) = self.node_of(wished) {
            self.open_application(node);
        }
        Ok(())
    }

    /// A disk is replaced by a blank one; not the last one that has everything.
    fn replace(&mut self, node: usize) -> Result<(), String> {
        let old = self.nodes[node].disk.instance;
        let mut others = self.members().into_iter().filter(|member| *member != node);
        if self.instances == u8::MAX || !others.any(|member| self.nodes[member].is_kept()) || self.is_spared(node) {
            return Ok(());
        }
        self.tally.replaced += 1;
        self.cut_power(node);
        self.instances += 1;
        let new = InstanceId::from_bytes([self.instances; 16]);
        self.note(|| format!("node {node}: a blank disk {new:?} in place of {old:?}"));
        let nothing = Configuration::first(Generation(0), new, Default::default());
        self.nodes[node].disk = Disk::blank(new, Configuration { primary: None, ..nothing }, self.planted);
        if self.spec.copies.remove(&old) {
            self.spec.copies.insert(new);
        }
        if self.spec.primary == Some(old) {
            self.wish_a_member();
        }
        self.tell_wishes();
        let later = self.random.millis(500, 3000);
        self.at(later, Event::Heal(Fault::PowerCut(node)));
        Ok(())
    }

    /// The volume shall have another number of copies.
    fn change_copies(&mut self, node: usize) -> Result<(), String> {
        let copy = self.nodes[node].disk.instance;
        let wanted = self.spec.copies.contains(&copy);
        if wanted && self.spec.primary != Some(copy) && self.spec.copies.len() > 1 {
            self.spec.copies.remove(&copy);
        } else if !wanted {
            self.spec.copies.insert(copy);
        }
        self.tell_wishes();
        Ok(())
    }

    /// Everything works again; nobody asks for anything new.
    pub fn mend_everything(&mut self) -> Result<(), String> {
        self.healing = true;
        self.network.mend();
        self.note(|| "everything is mended".to_owned());
        for node in 0..self.nodes.len() {
            for fault in [Fault::Paused(node), Fault::PowerCut(node), Fault::Isolated(node), Fault::Slow(node)] {
                self.heal(fault)?;
            }
            self.heal(Fault::Broken(node))?;
            self.heal(Fault::Full(node))?;
            self.heal(Fault::Killed(node))?;
            self.nodes[node].depth = 0;
        }
        self.mend_guests();
        if self.spec.primary.is_none() {
            self.wish_a_member();
        }
        self.tell_wishes();
        Ok(())
    }

    /// A member's disk is gone, and no other member is known to have everything: a person decides (`promote --force`).
    pub fn needs_a_person(&self) -> bool {
        let gone = self.catalogue.members().any(|copy| self.node_of(copy).is_none());
        gone && self.is_nothing_kept()
    }

    /// A primary waits with a copy that was slow.
    pub fn leaves_a_copy_alone(&self) -> bool {
        self.nodes.iter().filter_map(|n| n.process.as_ref()).any(|process| process.replica.resting().count() > 0)
    }

    /// What must be so some time after everything was mended.
    pub fn is_healed(&self) -> Result<(), String> {
        let wish = (self.spec.primary, &self.spec.copies);
        let (catalogue, roles) =
            (&self.catalogue, self.nodes.iter().map(|n| n.process.as_ref().map(|p| p.replica.role())));
        let state =
            || format!("wanted {wish:?}, committed {catalogue:?}, roles {:?}", roles.clone().collect::<Vec<_>>());
        let members: std::collections::BTreeSet<_> = self.catalogue.members().collect();
        if self.catalogue.primary != self.spec.primary
            || members != self.spec.copies
            || !self.catalogue.candidates.is_empty()
        {
            return Err(format!("it does not heal: {}", state()));
        }
        let primary = self.catalogue.primary.and_then(|copy| self.node_of(copy));
        let serving = primary.and_then(|node| self.nodes[node].process.as_ref());
        if serving.is_none_or(|process| process.replica.role() != Role::Primary(Primary::Serving)) {
            return Err(format!("nobody serves: {}", state()));
        }
        if let Some((node, n)) = self.nodes.iter().enumerate().find(|(_, n)| !n.slots.is_empty()) {
            return Err(format!("node {node} has unanswered requests {:?}: {}", n.slots, state()));
        }
        self.guests_are_answered()?;
        self.floors()?;
        for block in self.oracle.blocks() {
            let contents: Vec<_> = self.members().iter().map(|node| self.nodes[*node].disk.get(block)).collect();
            if contents.windows(2).any(|two| two[0] != two[1]) {
                return Err(format!("I5: block {block} differs for good: {contents:?}; {}", state()));
            }
            if contents.iter().any(|content| !self.oracle.is_possible(block, *content)) {
                return Err(format!("I1: block {block} is {contents:?}, which it cannot be; {}", state()));
            }
        }
        Ok(())
    }
}
