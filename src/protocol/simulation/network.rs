//! The network: connections that break, directions that are cut, frames that come late, twice or in another order.
//!
//! Invariant: a frame is lost only with its connection; after each new connection both ends are told `Connected`.

use super::cluster::{Cluster, Event};
use super::disk::Payload;
use super::host;
use super::node::Slot;
use super::random::Random;
use crate::protocol::*;
use crate::volume::InstanceId;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Default)]
struct Connection {
    /// Zero: there is none.
    number: u64,
    /// Frames were lost: it will break.
    stale: bool,
    /// When the last frame of each direction arrives.
    arrival: [Duration; 2],
}

/// See the module.
#[derive(Debug)]
pub struct Network {
    cut: Vec<Vec<bool>>,
    connections: BTreeMap<(usize, usize), Connection>,
    in_order: bool,
    /// Percent of frames that arrive twice.
    twice: u64,
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

impl Network {
    pub fn new(nodes: usize, random: &mut Random) -> Self {
        let pairs = (0..nodes).flat_map(|a| (a + 1..nodes).map(move |b| (a, b)));
        let connections = pairs.map(|pair| (pair, Connection::default())).collect();
        let twice = if random.percent(50) { 0 } else { 3 };
        Self { cut: vec![vec![false; nodes]; nodes], connections, in_order: random.percent(50), twice }
    }

    pub fn set_cut(&mut self, from: usize, to: usize, cut: bool) {
        self.cut[from][to] = cut;
    }

    pub fn mend(&mut self) {
        self.cut.iter_mut().for_each(|row| row.fill(false));
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cut[a][b] || self.cut[b][a]
    }

    pub fn disconnect(&mut self, a: usize, b: usize) {
        if let Some(connection) = self.connections.get_mut(&pair(a, b)) {
            *connection = Connection::default();
        }
    }

    pub fn disconnect_all(&mut self, node: usize) {
        let of_node = self.connections.iter_mut().filter(|((a, b), _)| *a == node || *b == node);
        of_node.for_each(|(_, connection)| *connection = Connection::default());
    }

    /// The connection that a frame may take now.
    fn open(&mut self, from: usize, to: usize) -> Option<&mut Connection> {
        let cut = self.cut[from][to];
        let connection = self.connections.get_mut(&pair(from, to)).filter(|connection| connection.number != 0)?;
        connection.stale |= cut;
        (!cut).then_some(connection)
    }

    fn is_open(&self, a: usize, b: usize, number: u64) -> bool {
        self.connections.get(&pair(a, b)).is_some_and(|connection| connection.number == number)
    }
}

impl Cluster {
    /// A frame leaves a node; without a connection it is lost.
    pub fn send(&mut self, from: usize, to: InstanceId, message: Message, payload: Payload) {
        let Some(node) = self.node_of(to).filter(|node| *node != from) else { return };
        let delay = if self.random.percent(2) { self.random.millis(5, 200) } else { self.random.micros(50, 2000) };
        let (now, in_order, twice) = (self.now, self.network.in_order, self.network.twice);
        let Some(connection) = self.network.open(from, node) else { return };
        let (number, last) = (connection.number, &mut connection.arrival[usize::from(from < node)]);
        let arrival = if in_order { (now + delay).max(*last) } else { now + delay };
        *last = arrival;
        let sender = self.nodes[from].disk.instance;
        let frame = |message, payload| Event::Frame {
            to: node,
            from,
            connection: number,
            sender,
            receiver: to,
            message,
            payload,
        };
        if self.random.percent(twice) {
            let later = self.random.millis(0, 300);
            self.at(arrival - now + later, frame(message.clone(), payload.clone()));
        }
        self.at(arrival - now, frame(message, payload));
    }

    /// A frame or heartbeat is there, if its connection still is.
    pub fn arrive(&mut self, event: Event) -> Result<(), String> {
        let (to, from, connection) = match &event {
            Event::Frame { to, from, connection, .. } | Event::Sign { to, from, connection } => {
                (*to, *from, *connection)
            }
            _ => return Ok(()),
        };
        let now = self.now;
        if !self.network.is_open(from, to, connection) {
            return Ok(());
        }
        let here = self.nodes[to].disk.instance;
        let Some(process) = &mut self.nodes[to].process else { return Ok(()) };
        process.heard[from] = (now, false);
        let Event::Frame { sender, receiver, message, payload, .. } = event else { return Ok(()) };
        if receiver != here {
            return Ok(());
        }
        if let Message::Prepare { frame, serial, .. }
        | Message::Copy { frame, serial, .. }
        | Message::Compare { frame, serial, .. }
        | Message::Prepared { frame, serial, .. } = &message
        {
            process.brought.insert((sender, frame.stamp, *serial), payload);
        }
        self.step(to, Input::Received { from: sender, message })
    }

    pub fn connect(&mut self, a: usize, b: usize) -> Result<(), String> {
        let number = self.number();
        let both = self.nodes[a].is_running() && self.nodes[b].is_running();
        let cut = self.network.is_cut(a, b);
        let Some(connection) = self.network.connections.get_mut(&pair(a, b)) else { return Ok(()) };
        if !both || cut || connection.number != 0 {
            return Ok(());
        }
        connection.number = number;
        let now = self.now;
        for (node, other) in [(a, b), (b, a)] {
            if let Some(process) = &mut self.nodes[node].process {
                process.heard[other] = (now, false);
            }
        }
        let (first, second) = (self.nodes[a].disk.instance, self.nodes[b].disk.instance);
        self.step(a, Input::Connected(second))?;
        self.step(b, Input::Connected(first))
    }

    /// Every half second: the core's tick, heartbeats, silence, connections to be made.
    pub fn tick(&mut self, node: usize, life: u64) -> Result<(), String> {
        if self.nodes[node].life(life).is_none() {
            return Ok(());
        }
        self.at(HEARTBEAT, Event::Tick(node, life));
        self.step(node, Input::Tick)?;
        let n = &mut self.nodes[node];
        let isolated = n.isolated;
        if let Some(process) = n.life(life).filter(|process| process.behind && !isolated) {
            process.behind = false;
            self.ask_catalogue(node, life);
            self.at(HEARTBEAT / 2, Event::Wished(node, life));
        }
        for other in (0..self.nodes.len()).filter(|other| *other != node) {
            self.look_at(node, other)?;
        }
        self.settle_guest(node)?;
        self.strangers(node)
    }

    /// A blank disk answers in the place of a copy that is gone: the copy is silent.
    fn strangers(&mut self, node: usize) -> Result<(), String> {
        let Some(process) = &self.nodes[node].process else { return Ok(()) };
        let copies: Vec<_> = process.replica.record().configuration.copies().collect();
        for copy in copies {
            if self.node_of(copy).is_none() && self.random.percent(20) {
                self.step(node, Input::Silent(copy))?;
            }
        }
        Ok(())
    }

    fn look_at(&mut self, node: usize, other: usize) -> Result<(), String> {
        let now = self.now;
        let delay = self.random.micros(50, 2000);
        if let Some(connection) = self.network.open(node, other) {
            let connection = connection.number;
            self.at(delay, Event::Sign { to: other, from: node, connection });
        }
        let cut = self.network.is_cut(node, other);
        let connection = self.network.connections.entry(pair(node, other)).or_default();
        if connection.stale && !cut {
            *connection = Connection::default();
        }
        let is_open = connection.number != 0;
        if !is_open && !cut && self.nodes[other].is_running() {
            let delay = self.random.millis(1, 100);
            self.at(delay, Event::Connect(node, other));
        }
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        let (heard, silent) = process.heard[other];
        if silent || now - heard < SILENCE {
            return Ok(());
        }
        process.heard[other].1 = true;
        self.network.disconnect(node, other);
        let copy = self.nodes[other].disk.instance;
        self.step(node, Input::Silent(copy))
    }
}

impl Cluster {
    /// A core says something to another copy, with the bytes that the buffer names.
    pub fn say(
        &mut self,
        node: usize,
        life: u64,
        to: InstanceId,
        message: Message,
        buffer: Buffer,
    ) -> Result<(), String> {
        if let Message::Prepare { serial, .. } = message
            && let Some(process) = self.nodes[node].life(life)
            && let Some(at) = process.replica.admission.serial(serial)
        {
            // Another copy may execute it before this one does.
            let tag = process.replica.admission.entries()[at].tag;
            let mutates = |slot: &&Slot| slot.request.is_mutation();
            if let Some(slot) = self.nodes[node].slots.get(&tag.0).filter(mutates) {
                self.oracle.start(slot.write);
            }
            if let Some(place) = host::place(tag) {
                self.guest_begins(node, place)?;
            }
        }
        let payload = match buffer {
            Buffer::None => vec![],
            Buffer::Request(tag) => self.payload_of(node, tag),
            Buffer::Operation(read) => self.nodes[node].read_for(life, &message, read),
        };
        self.send(node, to, message, payload);
        Ok(())
    }

    /// What a device's write puts into each of its blocks.
    pub fn payload_of(&self, node: usize, tag: Tag) -> Payload {
        let asked = self.nodes[node].process.as_ref().zip(host::place(tag));
        if let Some(asked) = asked.and_then(|(process, place)| process.asked.get(&place)) {
            return asked.payload.clone();
        }
        let Some(slot) = self.nodes[node].slots.get(&tag.0) else { return vec![] };
        let Request::Write(range) = slot.request else { return vec![] };
        (range.start()..range.end()).map(|block| (block, slot.write)).collect()
    }
}
