//! A cluster in simulated time: one queue of events, and what the shipped cores ask for.

use super::client::{Guest, GuestEvent, Mistake};
use super::disk::{Disk, Payload};
use super::host;
use super::network::Network;
use super::node::{Node, Operation, Process};
use super::oracle::Oracle;
use super::random::Random;
use crate::protocol::pieces::PieceLimits;
use crate::protocol::tests::Planted;
use crate::protocol::*;
use crate::volume::InstanceId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What happens at a moment.
#[derive(Debug)]
pub enum Event {
    /// A disk operation ends.
    Done(usize, u64, OperationId),
    /// A frame arrives over a connection.
    Frame {
        to: usize,
        from: usize,
        connection: u64,
        sender: InstanceId,
        receiver: InstanceId,
        message: Message,
        payload: Payload,
    },
    /// A heartbeat of the transport arrives.
    Sign {
        to: usize,
        from: usize,
        connection: u64,
    },
    /// A connection comes up.
    Connect(usize, usize),
    Tick(usize, u64),
    /// A proposal reaches the catalogue: of which engine, its number.
    Decide {
        node: usize,
        life: u64,
        number: u64,
        expected: Stamp,
        next: Configuration,
    },
    /// The answer reaches the proposer; nothing: it waits no more.
    Decided {
        node: usize,
        life: u64,
        number: u64,
        stamp: Stamp,
        outcome: Outcome,
    },
    /// The catalogue is read.
    Read(usize, u64),
    Told(usize, u64, Configuration),
    Wished(usize, u64),
    Application(usize, u64),
    Start(usize),
    Controller,
    Fault,
    Heal(super::faults::Fault),
    Guest(GuestEvent),
}

/// What is wanted, as the catalogue keeps it.
#[derive(Clone, Debug)]
pub struct Spec {
    pub primary: Option<InstanceId>,
    pub copies: BTreeSet<InstanceId>,
}

/// See the module.
#[derive(Debug)]
pub struct Cluster {
    pub random: Random,
    pub now: Duration,
    queue: BTreeMap<(Duration, u64), Event>,
    numbers: u64,
    pub nodes: Vec<Node>,
    pub network: Network,
    pub catalogue: Configuration,
    pub spec: Spec,
    pub oracle: Oracle,
    pub planted: Option<Planted>,
    /// Nodes without a copy that use the volume, one after the other; none: only nodes with one do.
    pub guests: Vec<Guest>,
    /// The newest of them that was ever served, and since when.
    pub served: Option<(usize, Duration)>,
    pub mistake: Option<Mistake>,
    pub healing: bool,
    pub instances: u8,
    pub seals: u32,
    pub tally: super::Tally,
    pub trace: Option<Vec<String>>,
}

type Checked = Result<(), String>;

impl Cluster {
    pub fn new(seed: u64, planted: Option<Planted>, trace: bool) -> Self {
        let mut random = Random::new(seed);
        let count = if random.percent(60) { 2 } else { 3 };
        let instances: Vec<InstanceId> = (1..=count).map(|n| InstanceId::from_bytes([n; 16])).collect();
        let copies: BTreeSet<_> = instances.iter().copied().collect();
        let secondaries = copies.iter().copied().filter(|copy| *copy != instances[0]).collect();
        let catalogue = Configuration::first(Generation(1), instances[0], secondaries);
        let spare = usize::from(random.percent(30));
        let all = (1..=count + spare as u8).map(|n| InstanceId::from_bytes([n; 16]));
        let nodes: Vec<Node> = all
            .map(|instance| {
                let disk = Disk::blank(instance, catalogue.clone(), planted);
                Node::new(disk, random.below(2000) as i64 - 1000)
            })
            .collect();
        let network = Network::new(nodes.len(), &mut random);
        let mut cluster = Self {
            random,
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            numbers: 0,
            network,
            catalogue,
            spec: Spec { primary: Some(instances[0]), copies },
            oracle: Oracle::default(),
            planted,
            guests: vec![],
            served: None,
            mistake: None,
            healing: false,
            instances: count + spare as u8,
            seals: 0,
            tally: super::Tally::default(),
            trace: trace.then(Vec::new),
            nodes,
        };
        for node in 0..cluster.nodes.len() {
            cluster.at(Duration::ZERO, Event::Start(node));
        }
        cluster.open_application(0);
        cluster.at(Duration::from_secs(1), Event::Controller);
        cluster
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>12.6} {}", now.as_secs_f64(), text()));
        }
    }

    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Something shall happen after a while.
    pub fn at(&mut self, delay: Duration, event: Event) {
        let number = self.number();
        self.queue.insert((self.now + delay, number), event);
    }

    /// Lets time pass until `end`.
    pub fn run_until(&mut self, end: Duration) -> Checked {
        while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 < end) {
            let ((time, _), event) = entry.remove_entry();
            self.now = time;
            self.tally.events += 1;
            self.happen(event)?;
        }
        self.now = end;
        Ok(())
    }

    /// The node that an event belongs to, if that node may sleep through it.
    fn sleeper(event: &Event) -> Option<usize> {
        match event {
            Event::Done(node, ..) | Event::Tick(node, _) | Event::Told(node, ..) | Event::Wished(node, _) => {
                Some(*node)
            }
            Event::Decided { node, .. } => Some(*node),
            Event::Frame { to, .. } | Event::Sign { to, .. } => Some(*to),
            _ => None,
        }
    }

    fn happen(&mut self, event: Event) -> Checked {
        if let Some(node) = Self::sleeper(&event).filter(|node| self.nodes[*node].paused) {
            // It is all there when the process goes on.
            self.nodes[node].backlog.push(event);
            return Ok(());
        }
        match event {
            Event::Done(node, life, operation) => self.done(node, life, operation),
            Event::Frame { .. } | Event::Sign { .. } => self.arrive(event),
            Event::Connect(a, b) => self.connect(a, b),
            Event::Tick(node, life) => self.tick(node, life),
            Event::Decide { .. } | Event::Decided { .. } | Event::Read(..) | Event::Told(..) | Event::Wished(..) => {
                self.catalogue_event(event)
            }
            Event::Controller => {
                self.controller();
                Ok(())
            }
            Event::Application(node, number) => self.application(node, number),
            Event::Start(node) => self.start(node),
            Event::Fault => self.fault(),
            Event::Heal(fault) => self.heal(fault),
            Event::Guest(event) => self.guest_event(event),
        }
    }

    /// Opens the copy: what is on disk, the slots, then the catalogue.
    fn start(&mut self, node: usize) -> Checked {
        let (planted, mistake, others, now) = (self.planted, self.mistake, self.nodes.len(), self.now);
        let guests = !self.guests.is_empty();
        let n = &mut self.nodes[node];
        if n.process.is_some() || !n.powered {
            return Ok(());
        }
        self.network.disconnect_all(node);
        n.lives += 1;
        let (life, local) = (n.lives, n.now(now));
        let member = Member {
            copy: n.disk.instance,
            incarnation: Incarnation(life),
            record: n.disk.record.clone(),
            hot: n.disk.hot.iter().copied().collect(),
            memory: n.memory(planted),
        };
        let mut replica = Replica::open(local, member);
        replica.planted = planted;
        // Three: writes wait for room. Four: it is made before. And marks age within the time that a seed runs.
        (replica.hot_limit, replica.mark_age) = (3 + life as usize % 2, Duration::from_millis(900));
        replica.piece_limits = PieceLimits { busy: 1, quiet: 3, share: if guests { 0 } else { 9 } };
        let mut host = Host::new(Incarnation(node as u64 * 1_000_000 + life));
        host.takes_any_session = mistake == Some(Mistake::AnySession);
        host.trusts_former_term = mistake == Some(Mistake::FormerTerm);
        n.process = Some(Process {
            life,
            replica,
            operations: BTreeMap::new(),
            plan: Default::default(),
            read: BTreeMap::new(),
            brought: BTreeMap::new(),
            informed: false,
            behind: false,
            proposing: None,
            heard: vec![(now, false); others],
            failed: false,
            flush_failed: false,
            host,
            asked: BTreeMap::new(),
            asks: false,
            asks_again: false,
        });
        self.break_links(node);
        self.note(|| format!("node {node} starts, life {life}"));
        let again: Vec<_> = self.nodes[node].slots.iter().map(|(tag, slot)| (Tag(*tag), slot.request)).collect();
        for (tag, request) in again {
            self.step(node, Input::Request { tag, request })?;
        }
        self.ask_catalogue(node, life);
        let phase = self.random.millis(0, 500);
        self.at(phase, Event::Tick(node, life));
        Ok(())
    }

    /// Gives the core of a node an input and does what it wants.
    pub fn step(&mut self, node: usize, input: Input) -> Checked {
        let now = self.now;
        let local = self.nodes[node].now(now);
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        let life = process.life;
        let (before, resting) = (process.replica.role(), process.replica.resting().count());
        let mut outputs = vec![];
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>12.6} node {node} <- {input:?}", now.as_secs_f64()));
        }
        process.replica.step(local, input, &mut outputs);
        let after = process.replica.role();
        self.tally.slow_copies += (process.replica.resting().count() as u64).saturating_sub(resting as u64);
        if before != after {
            self.note(|| format!("node {node}: {before:?} -> {after:?}"));
            self.tally.role(after);
        }
        for output in outputs {
            self.note(|| format!("node {node} -> {output:?}"));
            self.output(node, life, output)?;
        }
        Ok(())
    }

    fn output(&mut self, node: usize, life: u64, output: Output) -> Checked {
        let Some(process) = self.nodes[node].life(life) else { return Ok(()) };
        match output {
            Output::Disk { operation, tag, request } => {
                let payload = self.payload_of(node, tag);
                if let Some(place) = host::place(tag) {
                    self.guest_begins(node, place)?;
                }
                if let Some(slot) = self.nodes[node].slots.get(&tag.0).filter(|_| request.is_mutation()) {
                    if self.oracle.is_acknowledged(slot.write) {
                        return Err(format!("I10: the acknowledged write {} is executed again", slot.write));
                    }
                    self.oracle.start(slot.write);
                }
                self.run(node, life, operation, request, payload, Some(tag))
            }
            Output::Apply { operation, from, serial, request } => {
                let payload = process.brought(from, serial);
                self.run(node, life, operation, request, payload, None)
            }
            Output::ApplyPiece { operation, from, serial, piece } => {
                let payload = process.brought(from, serial);
                self.begin(node, life, operation, Operation::WritePiece { piece, payload })
            }
            Output::Compare { operation, from, serial, range } => {
                let payload = process.brought(from, serial);
                self.begin(node, life, operation, Operation::Compare { range, payload })
            }
            Output::ReadPiece { operation, piece } => {
                self.begin(node, life, operation, Operation::Read { range: piece.range(), tag: None })
            }
            Output::FlushHere { operation } => self.run(node, life, operation, Request::Flush, vec![], None),
            Output::Persist { operation, record } => self.begin(node, life, operation, Operation::Persist(record)),
            Output::WriteHot { operation, extents } => self.begin(node, life, operation, Operation::WriteHot(extents)),
            Output::Plan { operation, lacks, suspects } => {
                process.operations.retain(|_, what| !matches!(what, Operation::NextRange));
                let plan = self.nodes[node].disk.plan(lacks, &suspects);
                self.tally.resyncs += u64::from(lacks.is_some());
                if let Some(process) = self.nodes[node].life(life) {
                    process.plan = plan;
                }
                self.begin(node, life, operation, Operation::NextRange)
            }
            Output::NextRange { operation } => self.begin(node, life, operation, Operation::NextRange),
            Output::Complete { tag, result } => self.complete(node, tag, result),
            Output::Send { to, message, buffer } => self.say(node, life, to, message, buffer),
            Output::Propose { expected, next } => {
                self.propose(node, life, expected, *next);
                Ok(())
            }
            Output::ReadConfiguration => {
                self.ask_catalogue(node, life);
                Ok(())
            }
            Output::FenceDevice => {
                self.nodes[node].depth = 0;
                Ok(())
            }
        }
    }

    fn run(
        &mut self,
        node: usize,
        life: u64,
        id: OperationId,
        request: Request,
        payload: Payload,
        tag: Option<Tag>,
    ) -> Checked {
        let operation = match request {
            Request::Read(range) => Operation::Read { range, tag },
            Request::Write(range) => Operation::Write { range, payload },
            Request::Discard(range) | Request::WriteZeroes(range) => Operation::Zero(range),
            Request::Flush => Operation::Flush(self.nodes[node].disk.capture()),
            Request::Seal(SealName(name)) => Operation::Seal { name, contents: self.nodes[node].disk.contents() },
        };
        self.begin(node, life, id, operation)
    }

    /// Begins a disk operation.
    fn begin(&mut self, node: usize, life: u64, id: OperationId, operation: Operation) -> Checked {
        let slow = self.nodes[node].slow;
        let delay = match slow {
            Some(most) => self.random.millis(50, most.as_millis() as u64),
            None => self.random.micros(50, 3000),
        };
        let Some(process) = self.nodes[node].life(life) else { return Ok(()) };
        let orphans = &process.replica.orphans;
        let conflict = |(id, other): &(&OperationId, &Operation)| match (other.range(), operation.range()) {
            // Nobody looks at what a read that was given up will find.
            (Some(a), Some(b)) if other.is_mutation() || !orphans.iter().any(|orphan| orphan.operation == **id) => {
                a.overlaps(b) && (other.is_mutation() || operation.is_mutation())
            }
            _ => false,
        };
        if let Some((_, other)) = process.operations.iter().find(conflict) {
            return Err(format!("I7: {operation:?} runs beside {other:?} at node {node}"));
        }
        process.operations.insert(id, operation);
        self.at(delay, Event::Done(node, life, id));
        Ok(())
    }

    fn done(&mut self, node: usize, life: u64, id: OperationId) -> Checked {
        let failure = self.failure(node, life, id);
        let n = &mut self.nodes[node];
        let Some(operation) = n.life(life).and_then(|process| process.operations.remove(&id)) else { return Ok(()) };
        if let Operation::NextRange = operation {
            let process = n.life(life);
            let missing = process.map_or(Ok(None), |process| failure.map_or_else(|| Ok(process.plan.pop_front()), Err));
            return self.step(node, Input::Planned { operation: id, missing });
        }
        if let Operation::Compare { range, payload } = operation {
            let differs = failure.map_or_else(|| Ok(n.disk.compare(range, &payload)), Err);
            self.tally.compared += u64::from(range.count());
            self.tally.equal += differs.map_or(0, |differs| u64::from(range.count() - differs.count()));
            return self.step(node, Input::Compared { operation: id, differs });
        }
        if failure != Some(DiskError::NoSpace)
            && (failure.is_none() || !matches!(operation, Operation::Persist(_) | Operation::WriteHot(_)))
        {
            let reader = match &operation {
                Operation::Read { tag, .. } => Some(*tag),
                _ => None,
            };
            let is_flush = matches!(operation, Operation::Flush(_));
            if failure.is_some() && is_flush {
                self.fail_flush(node);
            }
            let lost = failure.is_some() && (is_flush || self.random.percent(50));
            let read = if lost { None } else { self.nodes[node].effect(operation) };
            if let (Some(payload), Some(tag)) = (read, reader) {
                self.keep_read(node, life, id, tag, payload);
            }
        }
        let result = failure.map_or(Ok(()), Err);
        self.step(node, Input::Completed { operation: id, result })
    }

    fn keep_read(&mut self, node: usize, life: u64, id: OperationId, tag: Option<Tag>, payload: Payload) {
        let n = &mut self.nodes[node];
        let asked = n.process.as_mut().zip(tag.and_then(host::place));
        if let Some(asked) = asked.and_then(|(process, place)| process.asked.get_mut(&place)) {
            asked.read = payload;
            return;
        }
        match tag.and_then(|tag| n.slots.get_mut(&tag.0)) {
            Some(slot) => slot.read = payload,
            None => {
                if let Some(process) = n.life(life) {
                    process.read.insert(id, payload);
                }
            }
        }
    }

    /// How the disk fails an operation now, if it does.
    fn failure(&mut self, node: usize, life: u64, id: OperationId) -> Option<DiskError> {
        let n = &mut self.nodes[node];
        let (broken, full) = (n.broken, n.full);
        let process = n.life(life)?;
        let operation = process.operations.get(&id)?;
        let takes_space = operation.is_mutation();
        if process.flush_failed && operation.is_refused_after_failed_flush() {
            return Some(DiskError::Failed);
        }
        let fails = broken && !matches!(operation, Operation::NextRange | Operation::Seal { .. });
        if fails && self.random.percent(50) {
            process.failed = true;
            self.tally.disk_errors += 1;
            return Some(DiskError::Failed);
        }
        let waits = full && takes_space && self.random.percent(50);
        waits.then_some(DiskError::NoSpace)
    }

    /// A copy's engine ends (power cut or not); the disk may or may not have done what it was doing.
    pub fn kill(&mut self, node: usize) {
        let Some(process) = self.nodes[node].process.take() else { return };
        let flush_failed = process.flush_failed;
        let is_of_former_life = |operation: &Operation| flush_failed && matches!(operation, Operation::Persist(_));
        for operation in process.operations.into_values() {
            // The life that a record names is the one in which it was begun.
            if self.random.percent(50) && !is_of_former_life(&operation) {
                self.nodes[node].effect(operation);
            }
        }
        self.nodes[node].paused = false;
        self.nodes[node].backlog.clear();
        self.note(|| format!("node {node}: its engine is dead"));
    }

    /// The node that has this copy.
    pub fn node_of(&self, copy: InstanceId) -> Option<usize> {
        self.nodes.iter().position(|node| node.disk.instance == copy)
    }
}
