//! The copies' side of nodes without one: the shipped host at each copy, and what is asked of the catalogue for it.

use super::client::GuestEvent;
use super::cluster::{Cluster, Event};
use super::disk::Payload;
use super::oracle::WriteId;
use crate::protocol::*;
use std::time::Duration;

/// Above the tags of devices.
const FIRST_PLACE: u32 = 1 << 20;

/// A client's request at a copy.
#[derive(Clone, Debug)]
pub struct Asked {
    pub guest: usize,
    pub write: WriteId,
    pub payload: Payload,
    pub read: Payload,
    began: Option<Duration>,
}

/// Which client's request a tag stands for.
pub fn place(tag: Tag) -> Option<usize> {
    tag.0.checked_sub(FIRST_PLACE).map(|place| place as usize)
}

impl Cluster {
    /// One question at a time, so that a later answer is a later reading.
    pub fn ask_for_client(&mut self, node: usize, life: u64) {
        let Some(process) = self.nodes[node].life(life) else { return };
        if std::mem::replace(&mut process.asks, true) {
            process.asks_again = true;
            return;
        }
        let term = process.replica.term();
        self.soon(1, 20, GuestEvent::Read(node, life, term));
    }

    pub fn at_host(
        &mut self,
        guest: usize,
        node: usize,
        message: Message,
        write: WriteId,
        payload: Payload,
    ) -> Result<(), String> {
        let from = self.guests[guest].id;
        self.note(|| format!("node {node} <- guest {guest} {message:?}"));
        let Some(core) = self.standpoint(node) else { return Ok(()) };
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        match message {
            Message::Enter { client, attempt } => {
                process.host.enter(from, client, attempt);
                self.settle_guest(node)
            }
            Message::Ask { session, serial, request } => match process.host.ask(from, session, serial, request, core) {
                Ok(place) => {
                    process.asked.insert(place, Asked { guest, write, payload, read: vec![], began: None });
                    self.step(node, Input::Request { tag: Tag(FIRST_PLACE + place as u32), request })
                }
                Err(refused) => {
                    self.tally.guest_refused += 1;
                    self.host_sends(node, guest, refused, vec![]);
                    Ok(())
                }
            },
            _ => Ok(()),
        }
    }

    fn standpoint(&self, node: usize) -> Option<Standpoint> {
        let replica = &self.nodes[node].process.as_ref()?.replica;
        let (term, answers, quiet) = (replica.term(), replica.answers(), self.nodes[node].slots.is_empty());
        let lost = replica.record().configuration.lost;
        Some(Standpoint { term, lost, answers, quiet, blocks: super::disk::VOLUME_BLOCKS })
    }

    pub fn settle_guest(&mut self, node: usize) -> Result<(), String> {
        let Some(core) = self.standpoint(node) else { return Ok(()) };
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        let life = process.life;
        match process.host.settle(core) {
            Next::Wait => {}
            Next::Read => self.ask_for_client(node, life),
            Next::Send(to, message) => {
                let Some(guest) = self.guests.iter().position(|guest| guest.id == to) else { return Ok(()) };
                self.tally.guest_sessions += 1;
                if self.served.is_none_or(|(newest, _)| guest > newest) {
                    self.served = Some((guest, self.now));
                }
                self.host_sends(node, guest, message, vec![]);
            }
        }
        Ok(())
    }

    fn host_sends(&mut self, node: usize, guest: usize, message: Message, payload: Payload) {
        let (link, life) = (self.guests[guest].links[node].clone(), self.guests[guest].lives);
        self.note(|| format!("node {node} -> guest {guest} {message:?}"));
        self.guests[guest].links[node].stale |= link.cut;
        let delay = self.frame_delay();
        if !link.cut {
            let (connection, caches) = (link.number, self.nodes[node].caches);
            let event = GuestEvent::ToGuest { guest, life, node, caches, connection, message, payload };
            self.at(delay, Event::Guest(event));
        }
    }

    /// A primary has given a client's request to its disk.
    pub fn guest_begins(&mut self, node: usize, place: usize) -> Result<(), String> {
        let (now, copy) = (self.now, self.nodes[node].disk.instance);
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        let acts = self.catalogue.primary == Some(copy) && process.replica.term() == Some(self.catalogue.term);
        let Some(asked) = process.asked.get_mut(&place) else { return Ok(()) };
        asked.began.get_or_insert(now);
        let write = asked.write;
        if write > 0 {
            if acts && self.oracle.is_acknowledged(write) {
                return Err(format!("I10: the acknowledged write {write} of a client is executed again"));
            }
            self.oracle.start(write);
        }
        Ok(())
    }

    /// The core of a copy has ended a client's request.
    pub fn guest_answer(&mut self, node: usize, place: usize, result: Result<(), DiskError>) -> Result<(), String> {
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        let Some(asked) = process.asked.remove(&place) else { return Err(format!("place {place} is answered twice")) };
        let answer = process.host.done(place, result);
        let late = self.served.is_some_and(|(newest, at)| asked.guest < newest && asked.began > Some(at));
        if late && result.is_ok() {
            return Err(format!("guest {} is served after the one that was published later", asked.guest));
        }
        if let Some((to, message)) = answer
            && let Some(guest) = self.guests.iter().position(|guest| guest.id == to)
        {
            self.host_sends(node, guest, message, asked.read);
        }
        self.step(node, Input::Replied { tag: Tag(FIRST_PLACE + place as u32) })?;
        self.settle_guest(node)
    }
}
