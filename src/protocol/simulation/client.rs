//! Nodes without a copy: the shipped client and host, with frames that come late also after their connection has ended, which
//! no transport does: sessions alone must sort them out.
//!
//! Of several nodes the last is published; those before it go on until they hear of that.

use super::cluster::{Cluster, Event};
use super::disk::Payload;
use super::losses::Told;
use super::node::Slot;
use super::oracle::WriteId;
use crate::protocol::*;
use crate::volume::InstanceId;
use std::collections::BTreeMap;
use std::time::Duration;

/// What happens to clients.
#[derive(Debug)]
pub enum GuestEvent {
    ToHost {
        guest: usize,
        node: usize,
        connection: u64,
        message: Message,
        write: WriteId,
        payload: Payload,
    },
    ToGuest {
        guest: usize,
        life: u64,
        node: usize,
        caches: u64,
        connection: u64,
        message: Message,
        payload: Payload,
    },
    Tick(usize, u64),
    Application(usize),
    Start(usize),
    /// Its node hears that it is published elsewhere.
    Ended(usize),
    /// A copy asks the catalogue, and is answered.
    Ask(usize, u64),
    Read(usize, u64, Option<Stamp>),
    Told(usize, u64, Option<Stamp>, Option<InstanceId>),
    Fault,
    Mend(usize, usize),
}

/// A mistake that must be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    AnySession,
    FormerTerm,
    /// A client goes on after the copies have lost what it had completed.
    GoesOn,
    /// Its next process does not know what they had lost before.
    ForgetsLoss,
}

/// A node that has no copy.
#[derive(Debug)]
pub struct Guest {
    pub id: InstanceId,
    pub slots: BTreeMap<u32, Slot>,
    next_tag: u32,
    pub lives: u64,
    process: Option<(u64, Replica, Client)>,
    ended: bool,
    pub depth: usize,
    pub links: Vec<Link>,
    unserved: Option<Duration>,
    pub told: Told,
}

/// Its connection to a node.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Zero: there is none.
    pub number: u64,
    copy: Option<InstanceId>,
    pub cut: bool,
    /// Frames were lost: it will break.
    pub stale: bool,
    heard: Duration,
    silent: bool,
}

impl Cluster {
    /// The volume is used by a node without a copy, and by no other.
    pub fn publish_without_copy(&mut self) {
        let number = self.guests.len() as u8;
        let nodes = self.nodes.len();
        let depth = 1 + self.random.index(8);
        self.guests.push(Guest {
            id: InstanceId::from_bytes([200 + number; 16]),
            slots: BTreeMap::new(),
            next_tag: 0,
            lives: 0,
            process: None,
            ended: false,
            depth,
            links: vec![Link { heard: self.now, ..Link::default() }; nodes],
            unserved: None,
            told: Told::default(),
        });
        let guest = self.guests.len() - 1;
        for node in &mut self.nodes {
            node.depth = 0;
            // Clients are the subject: copies come back soon, and a former primary is one again more often.
            if let Some(process) = &mut node.process {
                process.replica.piece_limits.share = 0;
            }
        }
        self.soon(1, 50, GuestEvent::Start(guest));
        self.soon(1, 50, GuestEvent::Application(guest));
        for node in 0..nodes {
            let life = self.nodes[node].lives;
            self.soon(1, 15_000, GuestEvent::Ask(node, life));
        }
        if let Some(former) = guest.checked_sub(1) {
            self.soon(1, 60_000, GuestEvent::Ended(former));
        }
    }

    pub fn soon(&mut self, from: u64, to: u64, event: GuestEvent) {
        let delay = self.random.millis(from, to);
        self.at(delay, Event::Guest(event));
    }

    pub fn published(&self) -> Option<InstanceId> {
        self.guests.last().map(|guest| guest.id)
    }

    pub fn guest_event(&mut self, event: GuestEvent) -> Result<(), String> {
        match event {
            GuestEvent::ToHost { node, .. } if self.nodes[node].paused => {
                self.nodes[node].backlog.push(Event::Guest(event));
                Ok(())
            }
            GuestEvent::ToHost { guest, node, connection, message, write, payload } => {
                let number = self.guests[guest].links[node].number;
                if number != connection && !self.random.percent(30) {
                    return Ok(());
                }
                self.at_host(guest, node, message, write, payload)
            }
            // What is heard after its node has lost its caches says nothing about what is left of them: it is as if the connection
            // had ended before.
            GuestEvent::ToGuest { guest, node, caches, .. } if self.nodes[node].caches != caches => {
                self.guests[guest].links[node].stale = true;
                Ok(())
            }
            GuestEvent::ToGuest { guest, life, node, connection, message, payload, .. } => {
                let number = self.guests[guest].links[node].number;
                if number != connection && !self.random.percent(30) {
                    return Ok(());
                }
                self.at_guest(guest, life, node, &message, &payload)
            }
            GuestEvent::Tick(guest, life) => self.guest_tick(guest, life),
            GuestEvent::Application(guest) => self.guest_application(guest),
            GuestEvent::Start(guest) => self.guest_start(guest),
            GuestEvent::Ended(guest) => {
                self.guests[guest].ended = true;
                self.guests[guest].depth = 0;
                self.with_client(guest, &vec![], Client::end)
            }
            GuestEvent::Ask(node, life) => {
                self.ask_for_client(node, life);
                Ok(())
            }
            GuestEvent::Read(node, life, term) => {
                if self.nodes[node].isolated {
                    self.soon(100, 500, GuestEvent::Read(node, life, term));
                } else {
                    let client = self.published();
                    self.soon(1, 300, GuestEvent::Told(node, life, term, client));
                }
                Ok(())
            }
            GuestEvent::Told(node, life, term, client) => {
                let Some(process) = self.nodes[node].life(life) else { return Ok(()) };
                process.asks = false;
                process.host.told(client, term);
                if std::mem::take(&mut process.asks_again) {
                    self.ask_for_client(node, life);
                }
                self.settle_guest(node)
            }
            GuestEvent::Fault => {
                self.guest_fault();
                Ok(())
            }
            GuestEvent::Mend(guest, node) => {
                self.guests[guest].links[node].cut = false;
                Ok(())
            }
        }
    }

    fn guest_fault(&mut self) {
        if self.healing {
            return;
        }
        self.soon(100, 2000, GuestEvent::Fault);
        let (guest, node) = (self.guests.len() - 1, self.random.index(self.nodes.len()));
        match self.random.below(100) {
            0..25 => {
                self.note(|| format!("guest {guest} is killed"));
                self.guests[guest].process = None;
                self.soon(1, 2000, GuestEvent::Start(guest));
            }
            25..60 => self.guests[guest].links[node].number = 0,
            60..85 => {
                self.note(|| format!("guest {guest} does not reach node {node}"));
                self.guests[guest].links[node].cut = true;
                self.soon(100, 9000, GuestEvent::Mend(guest, node));
            }
            85..95 if self.guests.len() < 50 => self.publish_without_copy(),
            _ => {}
        }
    }

    /// The engine of a node is another one.
    pub fn break_links(&mut self, node: usize) {
        self.guests.iter_mut().for_each(|guest| guest.links[node].number = 0);
    }

    /// Everything works again.
    pub fn mend_guests(&mut self) {
        let last = self.guests.len();
        for (index, guest) in self.guests.iter_mut().enumerate() {
            guest.links.iter_mut().for_each(|link| link.cut = false);
            guest.depth = 0;
            guest.ended |= index + 1 < last;
        }
        for guest in 0..last {
            self.soon(1, 10, GuestEvent::Start(guest));
            if guest + 1 < last {
                self.soon(10, 20, GuestEvent::Ended(guest));
            }
        }
    }

    fn guest_start(&mut self, guest: usize) -> Result<(), String> {
        let mistake = self.mistake;
        let g = &mut self.guests[guest];
        if g.process.is_some() {
            return Ok(());
        }
        g.lives += 1;
        g.unserved = None;
        let (life, id) = (g.lives, g.id);
        g.links.iter_mut().for_each(|link| *link = Link { cut: link.cut, heard: self.now, ..Link::default() });
        let incarnation = Incarnation(guest as u64 * 1000 + life);
        let forgets = life == 1 || mistake == Some(Mistake::ForgetsLoss);
        let mut client = if forgets { Client::new(incarnation) } else { Client::resumed(incarnation, g.told.lost) };
        client.goes_on = mistake == Some(Mistake::GoesOn);
        g.process = Some((life, Replica::sole(id), client));
        let again: Vec<_> = g.slots.iter().map(|(tag, slot)| (*tag, slot.request)).collect();
        let ended = g.ended;
        if ended {
            self.with_client(guest, &vec![], Client::end)?;
        }
        for (tag, request) in again {
            self.guest_step(guest, Input::Request { tag: Tag(tag), request }, &vec![])?;
        }
        self.soon(0, 500, GuestEvent::Tick(guest, life));
        Ok(())
    }

    fn guest_application(&mut self, guest: usize) -> Result<(), String> {
        if self.guests[guest].depth == 0 {
            return Ok(());
        }
        self.soon(1, 40, GuestEvent::Application(guest));
        if self.guests[guest].slots.len() >= self.guests[guest].depth {
            return Ok(());
        }
        let request = match self.request() {
            Request::Seal(_) => Request::Flush,
            request => request,
        };
        let slot = self.new_slot(request);
        let g = &mut self.guests[guest];
        let tag = g.next_tag;
        g.next_tag += 1;
        g.slots.insert(tag, slot);
        if request == Request::Flush {
            g.told.flush(tag);
        }
        self.guest_step(guest, Input::Request { tag: Tag(tag), request }, &vec![])
    }

    fn guest_tick(&mut self, guest: usize, life: u64) -> Result<(), String> {
        if self.guests[guest].process.as_ref().is_none_or(|process| process.0 != life) {
            return Ok(());
        }
        self.at(HEARTBEAT, Event::Guest(GuestEvent::Tick(guest, life)));
        for node in 0..self.nodes.len() {
            self.look_after_link(guest, node)?;
        }
        self.with_client(guest, &vec![], Client::tick)?;
        self.wish_another(guest);
        Ok(())
    }

    fn look_after_link(&mut self, guest: usize, node: usize) -> Result<(), String> {
        let (now, number) = (self.now, self.number());
        let (runs, copy) = (self.nodes[node].is_running(), self.nodes[node].disk.instance);
        let link = &mut self.guests[guest].links[node];
        let reached = runs && !link.cut;
        if let Some(gone) = link.copy.filter(|known| *known != copy) {
            (link.number, link.copy) = (0, None);
            return self.with_client(guest, &vec![], |client, out| client.silent(gone, out));
        }
        if reached && std::mem::take(&mut link.stale) {
            link.number = 0;
        }
        if reached {
            (link.heard, link.silent) = (now, false);
            if link.number == 0 {
                (link.number, link.copy) = (number, Some(copy));
                return self.with_client(guest, &vec![], |client, out| client.connected(copy, out));
            }
        } else if now - link.heard >= SILENCE && !link.silent {
            (link.number, link.silent) = (0, true);
            return self.with_client(guest, &vec![], |client, out| client.silent(copy, out));
        }
        Ok(())
    }

    /// As the driver does: a member that is reached in place of a primary that is not.
    fn wish_another(&mut self, guest: usize) {
        let (now, last) = (self.now, guest + 1 == self.guests.len());
        let g = &mut self.guests[guest];
        let served = g.process.as_ref().is_some_and(|(_, _, client)| client.is_served());
        if served || g.ended || !last {
            g.unserved = None;
            return;
        }
        if now - *g.unserved.get_or_insert(now) < SILENCE {
            return;
        }
        g.unserved = Some(now);
        let reached: Vec<_> = g.links.iter().filter(|link| link.number != 0).filter_map(|link| link.copy).collect();
        let wished = self.spec.primary.is_some_and(|copy| reached.contains(&copy));
        let fits = |copy: &InstanceId| reached.contains(copy) && self.spec.copies.contains(copy);
        let next = self.catalogue.members().find(fits).filter(|_| !wished);
        if let Some(next) = next {
            self.note(|| format!("guest {guest} wishes {next:?}"));
            self.spec.primary = Some(next);
            self.tell_wishes();
        }
    }

    fn with_client(
        &mut self,
        guest: usize,
        read: &Payload,
        tell: impl FnOnce(&mut Client, &mut Vec<ClientOutput>),
    ) -> Result<(), String> {
        let mut outputs = vec![];
        let g = &mut self.guests[guest];
        let Some((_, _, client)) = &mut g.process else { return Ok(()) };
        tell(client, &mut outputs);
        g.told.lost = client.lost().or(g.told.lost);
        let loses = client.has_ended() && !g.ended;
        g.ended |= loses;
        if loses {
            self.lose_guest(guest);
        }
        for output in outputs {
            match output {
                ClientOutput::Send { to, message, operation } => self.guest_sends(guest, to, message, operation),
                ClientOutput::Done { operation, result } => {
                    self.guest_step(guest, Input::Completed { operation, result }, read)?;
                }
            }
        }
        Ok(())
    }

    fn guest_sends(&mut self, guest: usize, to: InstanceId, message: Message, operation: Option<OperationId>) {
        let g = &self.guests[guest];
        let Some(node) = g.links.iter().position(|link| link.copy == Some(to) && link.number != 0) else { return };
        let Some((_, replica, _)) = &g.process else { return };
        let tag = operation.and_then(|operation| replica.tag_of(operation));
        let (mut write, mut payload) = (0, vec![]);
        if let Some(slot) = tag.and_then(|tag| g.slots.get(&tag.0)) {
            write = slot.write;
            if let Request::Write(range) = slot.request {
                payload = (range.start()..range.end()).map(|block| (block, write)).collect();
            }
        }
        let (connection, cut) = (g.links[node].number, g.links[node].cut);
        self.guests[guest].links[node].stale |= cut;
        let delay = self.frame_delay();
        if !cut {
            self.at(delay, Event::Guest(GuestEvent::ToHost { guest, node, connection, message, write, payload }));
        }
    }

    pub fn frame_delay(&mut self) -> Duration {
        match self.random.below(100) {
            0..3 => self.random.millis(100, 4000),
            3..10 => self.random.millis(5, 200),
            _ => self.random.micros(50, 2000),
        }
    }

    /// Gives a guest's core an input.
    fn guest_step(&mut self, guest: usize, input: Input, read: &Payload) -> Result<(), String> {
        let now = Now(self.now);
        self.note(|| format!("guest {guest} <- {input:?}"));
        let Some((_, replica, _)) = &mut self.guests[guest].process else { return Ok(()) };
        let mut outputs = vec![];
        replica.step(now, input, &mut outputs);
        for output in outputs {
            match output {
                Output::Disk { operation, request, .. } => {
                    self.with_client(guest, &vec![], |client, out| client.start(operation, request, out))?;
                }
                Output::Complete { tag, result } => {
                    let slot = self.guests[guest].slots.remove(&tag.0);
                    let Some(mut slot) = slot else {
                        return Err(format!("{tag:?} of guest {guest} is answered twice"));
                    };
                    slot.read.clone_from(read);
                    self.tally.guest_answers += u64::from(result.is_ok());
                    // It may have been executed before the next client began, and was only late: it says nothing of now.
                    let late = self.served.is_some_and(|(newest, _)| guest < newest);
                    let result = if late { Err(DiskError::Fenced) } else { result };
                    self.answered(guest, &slot, result)?;
                    if result.is_ok() {
                        self.guest_was_told(guest, tag, &slot)?;
                    }
                    self.guest_step(guest, Input::Replied { tag }, &vec![])?;
                }
                other => return Err(format!("guest {guest}: {other:?}")),
            }
        }
        Ok(())
    }

    fn at_guest(
        &mut self,
        guest: usize,
        life: u64,
        node: usize,
        message: &Message,
        payload: &Payload,
    ) -> Result<(), String> {
        let from = self.guests[guest].links[node].copy;
        let Some((found, _, _)) = &self.guests[guest].process else { return Ok(()) };
        let Some(from) = from.filter(|_| *found == life) else { return Ok(()) };
        self.with_client(guest, payload, |client, out| client.received(from, message, out))
    }

    /// What must be so in the end.
    pub fn guests_are_answered(&self) -> Result<(), String> {
        let waits = self.guests.iter().position(|guest| !guest.slots.is_empty());
        waits.map_or(Ok(()), |guest| Err(format!("guest {guest} waits for {:?}", self.guests[guest].slots)))
    }
}
