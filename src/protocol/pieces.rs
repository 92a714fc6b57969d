//! The way of one range from the plan to its targets, and how many are on their way.
//!
//! ```text
//!   held ─┬─> read here ─┬────────────────────────────────────────────────────> sent ─┬─> done
//!         │       ^      └─ suspected ─> compared there ─ some blocks differ ────^    │
//!         │       │                            └─ none does ───────────────────────────┤
//!         └─> fetched ─> written here ─ nobody else wants it ──────────────────────────┘
//!             (this copy lost writes)
//! ```
//! # Invariants
//! * What is compared is held from before it is read here until the blocks that differ are answered by every target: the
//!   digests are those of what would be sent.
//! * Blocks are taken for equal only by the answer of every target to the question that asked it for them.
//! * The application goes first. While it asks, one range at a time is under way, and between two of them nothing is copied
//!   for nine times as long as the last one took. So whatever a range takes from the application, it takes it for a
//!   tenth of the time at most.
//! * Times only set the pace: no order and no answer depends on them.

use super::admission::{Awaits, Entry, Phase};
use super::interface::{Output, Primary, Role};
use super::message::{Buffer, Frame, Message, SerialNumber};
use super::piece::{BlockSet, Missing, Piece};
use super::replica::Replica;
use super::{DiskError, HEARTBEAT, MAX_PIECES, Now, OperationId, Request, Tag};
use crate::volume::InstanceId;

/// Heartbeats without any request after which the application is taken to be away, and all ranges may be under way.
const QUIET: u8 = 2;
/// Heartbeats for which a copied range is owed at the most before fewer are sent: the link or the other disk is slow, and
/// whoever owes something for long enough is given up.
const SLOW: u8 = 2;

/// How many ranges may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PieceLimits {
    /// While the application asks, or a target is slow.
    pub busy: usize,
    /// Otherwise.
    pub quiet: usize,
    /// How much longer the application has the disks and the link for itself than a copied range has them beside it.
    pub share: u32,
}

impl PieceLimits {
    pub const SHIPPED: Self = Self { busy: 1, quiet: MAX_PIECES, share: 9 };
}

/// A range on its way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Copied {
    tag: Tag,
    piece: Piece,
    /// The targets may have it: it is compared before it is sent.
    suspected: bool,
    /// What the targets have said so far.
    differs: BlockSet,
    step: Step,
    /// When its turn came.
    began: Now,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// It waits for its place among the requests.
    Queued,
    /// From the source.
    Fetching,
    /// Into this copy.
    Writing,
    /// From this copy.
    Reading,
    /// The digests of this buffer are with the targets.
    Comparing(OperationId),
    /// To the targets, out of this buffer.
    Sending(OperationId),
}

impl Copied {
    /// Whose bytes are still needed.
    fn buffer(&self) -> Option<OperationId> {
        match self.step {
            Step::Comparing(read) | Step::Sending(read) => Some(read),
            Step::Queued | Step::Fetching | Step::Writing | Step::Reading => None,
        }
    }
}

#[cfg(test)]
impl Copied {
    pub fn rename(&mut self, name: impl Fn(OperationId) -> OperationId) {
        self.began = Now::default();
        if let Step::Comparing(read) | Step::Sending(read) = &mut self.step {
            *read = name(*read);
        }
    }
}

impl Replica {
    /// Takes a range in; it has its turn when nothing that came earlier is in its way.
    pub(super) fn hold(&mut self, missing: Missing, outputs: &mut Vec<Output>) {
        let (piece, suspected) = match missing {
            Missing::Known(piece) => (Some(piece), false),
            Missing::Suspected(range) => (Piece::whole(range), true),
        };
        let used = |tag: &Tag| self.admission.own(*tag).is_some();
        let tag = Tag::copies().find(|tag| !used(tag));
        let (Some(piece), Some(tag), Some(copying)) = (piece, tag, &mut self.copying) else {
            panic!("{missing:?} is longer than a request, or one too many");
        };
        let (differs, began) = (BlockSet::default(), self.now);
        copying.pieces.push(Copied { tag, piece, suspected, differs, step: Step::Queued, began });
        self.requested(tag, Request::Write(piece.range()), outputs);
    }

    /// Whether one more range may be under way.
    pub(super) fn may_hold_more(&self) -> bool {
        let Some(copying) = &self.copying else { return false };
        let is_slow = |entry: &Entry| entry.tag.is_copy() && entry.owed >= SLOW;
        let serves = self.role == Role::Primary(Primary::Serving);
        if serves && self.leaves() {
            // It leaves when nothing is under way any more.
            return false;
        }
        let asks = serves && (self.quiet < QUIET || self.admission.is_asked());
        if asks || self.admission.entries().iter().any(is_slow) {
            return copying.pieces.len() < self.piece_limits.busy && self.now >= self.rests_until;
        }
        copying.pieces.len() < self.piece_limits.quiet
    }

    /// A heartbeat has passed.
    pub(super) fn judge_quiet(&mut self) {
        self.quiet = if self.admission.is_asked() { 0 } else { self.quiet.saturating_add(1).min(QUIET) };
    }

    fn copied(&mut self, tag: Tag) -> Option<&mut Copied> {
        self.copying.as_mut()?.pieces.iter_mut().find(|copied| copied.tag == tag)
    }

    /// The range has its place among the requests: nobody else changes it from now on.
    pub(super) fn start_copying(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let (tag, now) = (self.admission.entries()[position].tag, self.now);
        let Some(source) = self.copying.as_ref().map(|copying| copying.source) else { return };
        let Some(copied) = self.copied(tag) else { return };
        copied.began = now;
        let Some(source) = source else { return self.read_piece(position, outputs) };
        copied.step = Step::Fetching;
        let operation = self.operation();
        self.admission.at(position).phase = Phase::Started(operation);
        self.ask(position, Awaits::peer(source), outputs);
    }

    /// Asks other copies for the entry's next step, under a serial of its own.
    fn ask(&mut self, position: usize, awaits: Awaits, outputs: &mut Vec<Output>) {
        let serial = self.serial();
        let entry = self.admission.at(position);
        (entry.serial, entry.awaits, entry.owed) = (serial, awaits, 0);
        self.send_prepares(position, None, outputs);
    }

    fn read_piece(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let (operation, serial) = (self.operation(), self.serial());
        let entry = self.admission.at(position);
        entry.phase = Phase::Started(operation);
        (entry.serial, entry.awaits, entry.owed) = (serial, Awaits::LOCAL, 0);
        let tag = entry.tag;
        let Some(copied) = self.copied(tag) else { return };
        copied.step = Step::Reading;
        outputs.push(Output::ReadPiece { operation, piece: copied.piece });
    }

    /// What the peers are asked for in this step.
    pub(super) fn copying_sends(&self, entry: Entry, frame: Frame, floor: SerialNumber) -> Option<(Message, Buffer)> {
        let copied = self.copying.as_ref()?.pieces.iter().find(|copied| copied.tag == entry.tag)?;
        let (serial, piece) = (entry.serial, copied.piece);
        match copied.step {
            Step::Fetching => {
                let request = Request::Read(piece.range());
                Some((Message::Prepare { frame, serial, floor, request }, Buffer::None))
            }
            Step::Comparing(read) => {
                Some((Message::Compare { frame, serial, floor, range: piece.range() }, Buffer::Operation(read)))
            }
            Step::Sending(read) => Some((Message::Copy { frame, serial, floor, piece }, Buffer::Operation(read))),
            Step::Queued | Step::Writing | Step::Reading => None,
        }
    }

    /// This copy's disk has read or written the range.
    pub(super) fn copied_here(&mut self, position: usize, result: Result<(), DiskError>, outputs: &mut Vec<Output>) {
        let Some(targets) = self.copying.as_ref().map(|copying| copying.targets) else { return };
        let entry = self.admission.at(position);
        let (Phase::Started(operation), tag) = (entry.phase, entry.tag) else { return };
        entry.awaits = Awaits::default();
        if let Err(error) = result {
            return self.cannot_copy(error);
        }
        let Some(copied) = self.copied(tag) else { return };
        match copied.step {
            Step::Writing if targets.is_empty() => self.piece_done(position, outputs),
            Step::Writing => self.read_piece(position, outputs),
            Step::Reading => {
                copied.step = if copied.suspected { Step::Comparing(operation) } else { Step::Sending(operation) };
                self.ask(position, targets, outputs);
            }
            Step::Queued | Step::Fetching | Step::Comparing(_) | Step::Sending(_) => {}
        }
    }

    /// A target has compared. What it does not have to be asked for is no answer.
    pub(super) fn compared(
        &mut self,
        from: InstanceId,
        frame: Frame,
        serial: SerialNumber,
        differs: Result<BlockSet, DiskError>,
        outputs: &mut Vec<Output>,
    ) {
        let Some(tag) = self.admission.serial(serial).map(|position| self.admission.entries()[position].tag) else {
            return;
        };
        if self.session(from, frame).is_none() || !self.is_comparing(tag) {
            return;
        }
        if let (Some(copied), Ok(differs)) = (self.copied(tag), differs) {
            // One that answers twice says no less than before.
            copied.differs = copied.differs.with(differs);
        }
        self.answered(from, frame, serial, differs.map(drop), outputs);
    }

    /// Whether the entry waits for what only a comparison says.
    pub(super) fn is_comparing(&self, tag: Tag) -> bool {
        let mut pieces = self.copying.iter().flat_map(|copying| &copying.pieces);
        pieces.any(|copied| copied.tag == tag && matches!(copied.step, Step::Comparing(_)))
    }

    /// All peers that were asked have answered.
    pub(super) fn copied_there(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let tag = self.admission.entries()[position].tag;
        let Some((source, targets)) = self.copying.as_ref().map(|copying| (copying.source, copying.targets)) else {
            return;
        };
        let blind = planted!(self, TakeForEqual);
        let Some(copied) = self.copied(tag) else { return };
        match (copied.step, source) {
            (Step::Fetching, Some(source)) => {
                copied.step = Step::Writing;
                self.write_fetched(position, source, outputs);
            }
            (Step::Comparing(read), _) => {
                let compared = copied.piece;
                let differs = Piece::new(compared.range(), copied.differs).filter(|_| !blind);
                if let Some(piece) = differs {
                    (copied.piece, copied.step) = (piece, Step::Sending(read));
                }
                self.progress.equal += u64::from(compared.count() - differs.map_or(0, Piece::count));
                match differs {
                    Some(_) => self.ask(position, targets, outputs),
                    None => self.piece_done(position, outputs),
                }
            }
            (Step::Sending(_), _) => {
                let sent = u64::from(copied.piece.count());
                self.progress.copied += sent;
                self.piece_done(position, outputs);
            }
            _ => {}
        }
    }

    fn write_fetched(&mut self, position: usize, source: usize, outputs: &mut Vec<Output>) {
        let operation = self.operation();
        let from = self.peers[source].copy;
        let entry = self.admission.at(position);
        entry.phase = Phase::Started(operation);
        entry.awaits = Awaits::LOCAL;
        let (serial, request) = (entry.serial, entry.request);
        self.progress.copied += request.range().map_or(0, |range| u64::from(range.count()));
        outputs.push(Output::Apply { operation, from, serial, request });
    }

    /// The range is equal everywhere: whatever waits behind it may start.
    fn piece_done(&mut self, position: usize, outputs: &mut Vec<Output>) {
        let tag = self.admission.entries()[position].tag;
        self.admission.remove_own(tag);
        let Some(copying) = &mut self.copying else { return };
        let Some(at) = copying.pieces.iter().position(|copied| copied.tag == tag) else { return };
        let took = self.now.0.saturating_sub(copying.pieces.swap_remove(at).began.0);
        self.rests_until = Now(self.now.0 + (took * self.piece_limits.share).min(HEARTBEAT));
        self.start_what_is_clear(outputs);
    }

    /// Whether what this operation has read is still to be sent.
    pub fn copies(&self, operation: OperationId) -> bool {
        let mut pieces = self.copying.iter().flat_map(|copying| &copying.pieces);
        pieces.any(|copied| copied.buffer() == Some(operation))
    }

    /// Blocks that are being copied or compared.
    pub(super) fn blocks_under_way(&self) -> u64 {
        let pieces = self.copying.iter().flat_map(|copying| &copying.pieces);
        pieces.map(|copied| u64::from(copied.piece.count())).sum()
    }
}
