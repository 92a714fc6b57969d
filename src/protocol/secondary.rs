//! What a copy does for a primary: executes, answers, grants the lease.
//!
//! # Invariants
//! * Only frames of the durable configuration's primary, version and of this very incarnation are executed; nothing
//!   while another configuration is being adopted.
//! * Each serial is executed once, however often it arrives: what the primary may still ask about is remembered, what it
//!   says is answered by all is forgotten and ignored.
//! * Overlapping operations run one at a time, in the order of serials.
//! * The mark is durable before the write, the write is done before the answer.
//! * A lease that was granted keeps this copy from promoting itself for lease + margin, also across a restart.

use super::configuration::Configuration;
use super::hot::{Extent, Marked};
use super::interface::{Output, Record, Role};
use super::message::{Buffer, Frame, Message, SerialNumber};
use super::piece::{BlockSet, Piece};
use super::replica::Replica;
use super::{DiskError, LEASE, MAX_MARKS, MAX_TAGS, Now, OperationId, Request};
use crate::volume::{BlockRange, InstanceId};
use std::time::Duration;

/// What a secondary waits beyond a lease: clocks that run at different speed, and a pause between look and act.
pub const MARGIN: Duration = Duration::from_secs(1);

/// Most operations that a secondary remembers: those from the first one that not everybody has answered. A primary starts
/// nothing that is further away from it, since later ones may be done long before a slow one.
pub(super) const MAX_APPLIES: usize = 2 * (MAX_TAGS + super::admission::OWN);

/// Something that the primary asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Apply {
    serial: SerialNumber,
    order: Order,
    phase: Phase,
}

/// What it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Order {
    /// As the device or the operator asks.
    Request(Request),
    /// Write these blocks.
    Piece(Piece),
    /// Say which blocks differ.
    Compare(BlockRange),
}

impl Order {
    fn range(self) -> Option<BlockRange> {
        match self {
            Self::Request(request) => request.range(),
            Self::Piece(piece) => Some(piece.range()),
            Self::Compare(range) => Some(range),
        }
    }

    fn is_mutation(self) -> bool {
        match self {
            Self::Request(request) => request.is_mutation(),
            Self::Piece(_) => true,
            Self::Compare(_) => false,
        }
    }

    /// Its bytes are in the buffer only when it is done; if the answer is lost, it is done again.
    fn is_read(self) -> bool {
        matches!(self, Self::Request(Request::Read(_)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// For its mark, or an earlier one that overlaps.
    Waiting,
    Running(OperationId),
    Done(Result<(), DiskError>),
}

impl Apply {
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running(_))
    }

    pub fn is_done(&self) -> bool {
        matches!(self.phase, Phase::Done(_))
    }

    /// Its serial, if its bytes are still needed.
    pub fn waiting(&self) -> Option<SerialNumber> {
        (self.phase == Phase::Waiting).then_some(self.serial)
    }

    #[cfg(test)]
    pub fn rename(&mut self, name: impl Fn(OperationId) -> OperationId) {
        if let Phase::Running(operation) = &mut self.phase {
            *operation = name(*operation);
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (Some(a), Some(b)) = (self.order.range(), other.order.range()) else { return false };
        a.overlaps(b)
    }
}

impl Replica {
    /// Whether a frame of the primary is to be executed; answers it if it is for another time or another life.
    pub(super) fn accepts(&mut self, from: InstanceId, frame: Frame, outputs: &mut Vec<Output>) -> bool {
        let stamp = self.record.configuration.stamp;
        if planted!(self, AcceptOlderVersion) && frame.stamp <= stamp {
            return true;
        }
        if self.adoption.is_some() || frame.stamp > stamp {
            return false;
        }
        if frame.stamp < stamp {
            let message = Message::Refused(stamp);
            outputs.push(Output::Send { to: from, message, buffer: Buffer::None });
            return false;
        }
        if self.record.configuration.primary != Some(from) || !matches!(self.role, Role::Secondary | Role::Candidate) {
            return false;
        }
        if frame.incarnation != self.incarnation && !planted!(self, AcceptOlderIncarnation) {
            self.answer_primary(outputs);
            return false;
        }
        true
    }

    pub(super) fn invited(&mut self, from: InstanceId, configuration: Configuration, outputs: &mut Vec<Output>) {
        let stamp = self.record.configuration.stamp;
        if configuration.stamp < stamp {
            let message = Message::Refused(stamp);
            outputs.push(Output::Send { to: from, message, buffer: Buffer::None });
        } else if configuration.stamp == stamp && self.adoption.is_none() {
            self.answer_primary(outputs);
        } else {
            self.learn(configuration, false, outputs);
        }
    }

    /// Tells the primary of the durable configuration that this copy acts under it.
    pub(super) fn answer_primary(&self, outputs: &mut Vec<Output>) {
        let follows = matches!(self.role, Role::Secondary | Role::Candidate) && self.adoption.is_none();
        let primary = self.record.configuration.primary.filter(|primary| follows && *primary != self.me);
        if let Some(to) = primary {
            let hot: Box<[Extent]> = self.hot.extents().into();
            let message = Message::Joined { frame: self.frame(self.incarnation), intact: self.record.intact, hot };
            outputs.push(Output::Send { to, message, buffer: Buffer::None });
        }
    }

    /// The primary asks for something: in which place, and below which all have answered everything.
    pub(super) fn ordered(
        &mut self,
        from: InstanceId,
        frame: Frame,
        (serial, floor): (SerialNumber, SerialNumber),
        order: Order,
        outputs: &mut Vec<Output>,
    ) {
        if !self.accepts(from, frame, outputs) {
            return;
        }
        self.floor = self.floor.max(floor);
        let floor = self.floor;
        self.applies.retain(|apply| apply.serial >= floor || apply.is_running());
        if let Some(known) = self.applies.iter().find(|apply| apply.serial == serial) {
            if let Phase::Done(result) = known.phase {
                self.answer(from, serial, result, None, outputs);
            }
            return;
        }
        if serial < floor || self.applies.len() >= MAX_APPLIES {
            return;
        }
        let at = self.applies.partition_point(|apply| apply.serial < serial);
        self.applies.insert(at, Apply { serial, order, phase: Phase::Waiting });
        self.start_applies(outputs);
    }

    /// Starts what nothing is in the way of.
    pub(super) fn start_applies(&mut self, outputs: &mut Vec<Output>) {
        let Some(from) = self.record.configuration.primary.filter(|_| self.adoption.is_none()) else { return };
        for at in 0..self.applies.len() {
            let apply = self.applies[at];
            if apply.phase != Phase::Waiting {
                continue;
            }
            if self.overlaps_earlier_or_running(at) {
                continue;
            }
            let marks = apply.order.range().filter(|_| apply.order.is_mutation());
            if marks.is_some_and(|range| self.mark_range(range, apply.serial, MAX_MARKS) != Marked::Yes) {
                continue;
            }
            let operation = self.operation();
            self.applies[at].phase = Phase::Running(operation);
            let serial = apply.serial;
            outputs.push(match apply.order {
                Order::Request(request) => Output::Apply { operation, from, serial, request },
                Order::Piece(piece) => Output::ApplyPiece { operation, from, serial, piece },
                Order::Compare(range) => Output::Compare { operation, from, serial, range },
            });
        }
    }

    fn overlaps_earlier_or_running(&self, at: usize) -> bool {
        let apply = &self.applies[at];
        self.applies.iter().enumerate().any(|(other_at, other)| {
            let before = other_at < at && !other.is_done();
            other_at != at && (before || other.is_running()) && other.overlaps(apply)
        })
    }

    /// The disk executed something for the primary.
    pub(super) fn applied(&mut self, operation: OperationId, result: Result<(), DiskError>, outputs: &mut Vec<Output>) {
        let at = self.applying(operation);
        let Apply { serial, order, .. } = self.applies[at];
        if order == Order::Request(Request::Flush) {
            self.note_flush(result);
        }
        if self.adoption.is_some() {
            // It belongs to the configuration before; the primary says it again if it still matters.
            self.applies.remove(at);
            return;
        }
        let read = order.is_read();
        if read {
            self.applies.remove(at);
        } else {
            self.applies[at].phase = Phase::Done(result);
        }
        if let Some(primary) = self.record.configuration.primary {
            self.answer(primary, serial, result, read.then_some(operation), outputs);
        }
        self.start_applies(outputs);
    }

    fn applying(&self, operation: OperationId) -> usize {
        let at = self.applies.iter().position(|apply| apply.phase == Phase::Running(operation));
        at.unwrap_or_else(|| panic!("{operation:?} is not running"))
    }

    /// The disk has read what is compared. If the answer is lost, it is compared again: the question brings the digests.
    pub(super) fn compared_here(
        &mut self,
        operation: OperationId,
        differs: Result<BlockSet, DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        let at = self.applying(operation);
        let Apply { serial, order, .. } = self.applies.remove(at);
        if self.adoption.is_some() {
            return;
        }
        let differs = match (differs, order.range()) {
            // What cannot be read is mended by being written; whether the disk can still do that, the write says.
            (Err(DiskError::Corrupt | DiskError::Failed), Some(range)) if !self.flush_failed => {
                let mut all = BlockSet::default();
                all.insert(0, range.count());
                Ok(all)
            }
            (differs, _) => differs,
        };
        if let Some(to) = self.record.configuration.primary {
            let message = Message::Compared { frame: self.frame(self.incarnation), serial, differs };
            outputs.push(Output::Send { to, message, buffer: Buffer::None });
        }
        self.start_applies(outputs);
    }

    fn answer(
        &self,
        to: InstanceId,
        serial: SerialNumber,
        result: Result<(), DiskError>,
        read: Option<OperationId>,
        outputs: &mut Vec<Output>,
    ) {
        let message = Message::Prepared { frame: self.frame(self.incarnation), serial, result };
        let buffer = read.map_or(Buffer::None, Buffer::Operation);
        outputs.push(Output::Send { to, message, buffer });
    }

    /// Promises not to be promoted for a while; not if this copy is wished as primary.
    pub(super) fn grant(&mut self, to: InstanceId, frame: Frame, sent: Now, outputs: &mut Vec<Output>) {
        let wished = self.wish.as_ref().is_some_and(|wish| wish.primary == Some(self.me));
        if wished || self.role != Role::Secondary || self.proposal.is_some() {
            return;
        }
        self.granted_until = self.granted_until.max(Now(self.now.0 + LEASE + MARGIN));
        outputs.push(Output::Send { to, message: Message::Granted { frame, sent }, buffer: Buffer::None });
    }

    /// The primary has made this copy equal to its own; that becomes durable before it counts.
    pub(super) fn reconciled(&mut self, outputs: &mut Vec<Output>) {
        if self.role != Role::Secondary || self.flush_failed {
            return;
        }
        self.settled = true;
        if self.record.intact {
            self.settle(outputs);
        } else if self.persisting.is_none() {
            self.persist(Record { intact: true, ..self.record.clone() }, outputs);
        }
    }

    /// The record says that this copy is intact: the primary may count on it.
    pub(super) fn intact_is_durable(&mut self, outputs: &mut Vec<Output>) {
        if self.settled && self.adoption.is_none() {
            self.reconciled(outputs);
        }
    }

    fn settle(&self, outputs: &mut Vec<Output>) {
        if let Some(to) = self.record.configuration.primary {
            let message = Message::Settled(self.frame(self.incarnation));
            outputs.push(Output::Send { to, message, buffer: Buffer::None });
        }
    }
}
