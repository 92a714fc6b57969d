//! The core of a mirror by hand: one copy, scripted inputs. Each test is a counterexample that the model once found.

#![allow(clippy::wildcard_enum_match_arm, reason = "a script names the outputs that it is about")]

mod failures;
mod guests;
mod kept;
mod losses;
mod marks;
mod patience;
mod pieces;
mod window;

use super::super::*;
use crate::volume::{BlockRange, InstanceId};
use std::collections::BTreeSet;

const WRITER: Tag = Tag(1);
const OTHER: Tag = Tag(2);
/// The lives of the other copy.
const FIRST: Incarnation = Incarnation(1);
const SECOND: Incarnation = Incarnation(2);

fn copy(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

fn extent(number: u64) -> BlockRange {
    BlockRange::new(number * EXTENT_BLOCKS, 1).expect("not empty")
}

fn version(version: u64) -> Stamp {
    Stamp { generation: Generation(1), version: ConfigurationVersion(version) }
}

/// Copy 1 of a volume, and what its last input made it want.
struct Script {
    replica: Replica,
    outputs: Vec<Output>,
    now: Now,
}

impl Script {
    /// Copy 1 has committed its term as version 2; nobody has answered yet.
    fn new(secondary: bool, hot: &[Extent], memory: Memory) -> Self {
        let others = if secondary { BTreeSet::from([copy(2)]) } else { BTreeSet::new() };
        let mut configuration = Configuration::first(Generation(1), copy(1), others);
        if !secondary {
            configuration.candidates.insert(copy(2), Lacks::Everything);
        }
        let record = Record { configuration, intact: true };
        let member = Member { copy: copy(1), incarnation: FIRST, record, hot: hot.to_vec(), memory };
        Self { replica: Replica::open(Now::default(), member), outputs: vec![], now: Now::default() }
    }

    /// What it has is in the catalogue, too.
    fn read_catalogue(&mut self) {
        let current = self.replica.record().configuration.clone();
        self.give(Input::Configuration(Box::new(current)));
    }

    /// Its node has died with a mark; its term is committed.
    fn without_memory() -> Self {
        let mut script = Self::new(true, &[Extent(0)], Memory::Lost);
        script.read_catalogue();
        script.finish();
        script.commit();
        script
    }

    /// The first thing that it wants is to know what another copy lacks.
    fn plan(&self) -> OperationId {
        let Some(Output::Plan { operation, .. }) = self.outputs.first() else { panic!("{:?}", self.outputs) };
        *operation
    }

    /// The same, as primary of version 2.
    fn primary(secondary: bool) -> Self {
        let mut script = Self::new(secondary, &[], Memory::Kept);
        script.read_catalogue();
        script.commit();
        script
    }

    /// The same, serving, with its secondary equal.
    fn serving() -> Self {
        let mut script = Self::primary(true);
        script.hear(Script::joined(FIRST, &[]));
        script.hear(Message::Settled(Frame { stamp: version(2), incarnation: FIRST }));
        assert_eq!(script.replica.role(), Role::Primary(Primary::Serving));
        script
    }

    fn joined(incarnation: Incarnation, hot: &[Extent]) -> Message {
        Message::Joined { frame: Frame { stamp: version(2), incarnation }, intact: true, hot: hot.into() }
    }

    fn give(&mut self, input: Input) {
        self.outputs.clear();
        self.replica.step(self.now, input, &mut self.outputs);
    }

    /// So many heartbeats pass, in which the other copy grants the lease.
    fn beat(&mut self, count: u32) {
        for _ in 0..count {
            self.now.0 += HEARTBEAT;
            self.give(Input::Tick);
        }
    }

    fn hear(&mut self, message: Message) {
        self.give(Input::Received { from: copy(2), message });
    }

    /// The other copy has executed what it was sent as this serial.
    fn hear_prepared(&mut self, serial: u64) {
        let frame = Frame { stamp: self.replica.record().configuration.stamp, incarnation: FIRST };
        self.hear(Message::Prepared { frame, serial: SerialNumber(serial), result: Ok(()) });
    }

    /// The disk has done the only operation among the outputs.
    fn finish(&mut self) {
        let operation = self.operation();
        self.give(Input::Completed { operation, result: Ok(()) });
    }

    /// The disk has failed it.
    fn fail(&mut self) {
        let operation = self.operation();
        self.give(Input::Completed { operation, result: Err(DiskError::Failed) });
    }

    fn operation(&self) -> OperationId {
        let operations = self.outputs.iter().filter_map(|output| match output {
            Output::Disk { operation, .. }
            | Output::FlushHere { operation }
            | Output::Persist { operation, .. }
            | Output::WriteHot { operation, .. } => Some(*operation),
            _ => None,
        });
        let operations: Vec<OperationId> = operations.collect();
        assert_eq!(operations.len(), 1, "{:?}", self.outputs);
        operations[0]
    }

    fn wish(&mut self, primary: Option<InstanceId>) {
        self.give(Input::Wish(Wish { primary, copies: BTreeSet::from([copy(1), copy(2)]) }));
    }

    fn clears(&self) -> bool {
        self.wants(|output| matches!(output, Output::Send { message: Message::Clear { .. }, .. }))
    }

    fn proposal(&self) -> Option<Configuration> {
        self.outputs.iter().find_map(|output| match output {
            Output::Propose { next, .. } => Some((**next).clone()),
            _ => None,
        })
    }

    /// The catalogue executes the proposal among the outputs, and its record becomes durable.
    fn commit(&mut self) {
        let stamp = self.proposal().expect("something is proposed").stamp;
        self.give(Input::Proposed { stamp, outcome: Outcome::Committed });
        self.finish();
    }

    /// A write of an extent that is not marked yet is on this copy's disk.
    fn write(&mut self, tag: Tag, number: u64) {
        self.give(Input::Request { tag, request: Request::Write(extent(number)) });
        self.finish();
        self.finish();
    }

    fn completes(&self, tag: Tag) -> bool {
        self.outputs.contains(&Output::Complete { tag, result: Ok(()) })
    }

    fn wants(&self, what: fn(&Output) -> bool) -> bool {
        self.outputs.iter().any(what)
    }
}

/// It was proposed at once; committed late, it left a primary alone that had lost what the dropped member still had.
#[test]
fn a_member_is_dropped_only_after_a_flush_of_this_copy() {
    let mut script = Script::serving();
    script.write(WRITER, 0);
    script.give(Input::Silent(copy(2)));
    assert!(script.wants(|output| matches!(output, Output::FlushHere { .. })));
    assert_eq!(script.proposal(), None);
    let flush = script.outputs.clone();
    script.hear_prepared(1);
    assert!(!script.completes(WRITER), "the flush does not cover what is acknowledged now");
    script.outputs = flush;
    script.finish();
    let next = script.proposal().expect("now it may go on alone");
    assert_eq!((next.secondaries.len(), next.candidates[&copy(2)]), (0, Lacks::Since(version(3))));
    assert!(!script.completes(WRITER));
    script.commit();
    assert!(script.completes(WRITER));
}

/// Its record still said that it was intact; an engine killed a moment later counted on it.
#[test]
fn a_copy_that_lost_its_caches_records_that_before_anything_else() {
    for (hot, intact) in [(vec![Extent(0)], false), (vec![], true)] {
        let mut script = Script::new(true, &hot, Memory::Lost);
        script.read_catalogue();
        let [Output::Persist { record, .. }] = &script.outputs[..] else { panic!("{:?}", script.outputs) };
        assert_eq!(record.intact, intact, "a node without marks has lost nothing");
    }
}

/// The catalogue was lost and rebuilt from the disks while the volume was in use.
#[test]
fn a_raised_generation_that_names_the_running_primary_costs_a_term_and_no_request() {
    let mut script = Script::serving();
    script.wish(Some(copy(1)));
    script.write(WRITER, 0);
    let mut raised = script.replica.record().configuration.clone();
    raised.stamp = Stamp { generation: Generation(2), version: ConfigurationVersion(3) };
    raised.term = raised.stamp;
    script.give(Input::Configuration(Box::new(raised)));
    assert!(!script.wants(|output| matches!(output, Output::Complete { .. })), "neither answered nor failed");
    script.finish();
    let next = script.proposal().expect("a term of its own");
    assert_eq!((next.primary, next.stamp), (Some(copy(1)), Stamp { version: ConfigurationVersion(4), ..next.term }));
    script.commit();
    let frame = Frame { stamp: next.stamp, incarnation: FIRST };
    script.hear(Message::Joined { frame, intact: true, hot: Box::default() });
    let operation = script.plan();
    script.give(Input::Planned { operation, missing: Ok(None) });
    script.hear(Message::Settled(frame));
    assert_eq!(script.replica.role(), Role::Primary(Primary::Serving));
    assert!(script.wants(|output| matches!(output, Output::Disk { tag: WRITER, .. })), "it is executed again");
    // What the lost catalogue may have committed is older, whatever its version.
    let stale = Configuration { stamp: version(99), term: version(99), primary: Some(copy(2)), ..next };
    script.give(Input::Configuration(Box::new(stale)));
    assert_eq!((script.replica.role(), &script.outputs[..]), (Role::Primary(Primary::Serving), &[][..]));
}

/// It was begun anew and not awaited meanwhile, and its admission was committed.
#[test]
fn a_candidate_that_restarts_during_its_admission_stays_awaited() {
    let mut script = Script::primary(false);
    script.hear(Script::joined(FIRST, &[]));
    let operation = script.plan();
    script.give(Input::Planned { operation, missing: Ok(None) });
    script.finish();
    script.hear_prepared(1);
    let admission = script.outputs.clone();
    assert!(script.proposal().is_some_and(|next| next.is_member(copy(2))));
    script.write(WRITER, 0);
    script.hear(Script::joined(SECOND, &[]));
    assert_eq!(script.outputs, [], "neither answered nor begun anew");
    script.outputs = admission;
    script.commit();
    assert!(!script.completes(WRITER));
    script.finish();
    assert!(script.proposal().is_some_and(|next| !next.is_member(copy(2))), "it goes again");
    assert!(!script.completes(WRITER));
    script.commit();
    assert!(script.completes(WRITER));
}

/// The member had answered before it was silent, and this copy's disk was done after the flush before the drop had begun:
/// what was acknowledged then was in its cache alone when the configuration without the other one was committed.
#[test]
fn what_the_flush_before_a_drop_does_not_cover_is_not_answered_before_the_drop() {
    let mut script = Script::serving();
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    script.finish();
    let write = script.outputs.clone();
    script.hear_prepared(1);
    script.give(Input::Silent(copy(2)));
    let flush = script.outputs.clone();
    script.outputs = write;
    script.finish();
    assert!(!script.completes(WRITER), "{:?}", script.outputs);
    script.outputs = flush;
    script.finish();
    assert!(!script.completes(WRITER) && script.proposal().is_some(), "{:?}", script.outputs);
    script.commit();
    assert!(script.completes(WRITER));
}

/// Whoever connects says so twice: the plan began anew each time, and a primary that served stopped.
#[test]
fn a_repeated_answer_does_not_restart_a_reconcile() {
    let mut script = Script::primary(true);
    script.hear(Script::joined(FIRST, &[Extent(0)]));
    let operation = script.plan();
    script.hear(Script::joined(FIRST, &[Extent(0)]));
    assert_eq!(script.outputs, []);
    script.give(Input::Planned { operation, missing: Ok(None) });
    assert_eq!(script.replica.role(), Role::Primary(Primary::Settling));
    script.hear(Script::joined(FIRST, &[Extent(0)]));
    assert_eq!(script.replica.role(), Role::Primary(Primary::Settling));
}

/// Requests that were under way when the engine died come back before the copy serves, and lie in hot extents.
#[test]
fn a_request_that_waits_for_this_copy_to_serve_does_not_hold_up_the_reconcile() {
    let mut script = Script::new(true, &[Extent(0)], Memory::Kept);
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    script.read_catalogue();
    script.commit();
    script.hear(Script::joined(FIRST, &[Extent(0)]));
    let operation = script.plan();
    script.give(Input::Planned { operation, missing: Ok(Some(Missing::Suspected(extent(0)))) });
    assert!(script.wants(|output| matches!(output, Output::ReadPiece { .. })), "{:?}", script.outputs);
}

/// A later flush cleared the mark of a write that the other copy had and this one had not: they differed for good.
#[test]
fn what_failed_here_stays_marked() {
    for planted in [None, Some(super::Planted::ClearAfterFailure)] {
        let mut script = Script::serving();
        (script.replica.hot_limit, script.replica.planted) = (1, planted);
        script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
        script.finish();
        script.fail();
        script.hear_prepared(1);
        assert!(!script.wants(|output| matches!(output, Output::Complete { .. })), "never guess");
        script.wish(None);
        script.finish();
        script.hear_prepared(2);
        assert_eq!(script.clears(), planted.is_some());
    }
}

/// The only member answered with an error, the candidate had the write, and was admitted.
#[test]
fn a_candidate_that_has_what_failed_here_is_not_admitted() {
    for planted in [None, Some(super::Planted::ClearAfterFailure)] {
        let mut script = Script::primary(false);
        script.replica.planted = planted;
        script.hear(Script::joined(FIRST, &[]));
        let operation = script.plan();
        script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
        script.finish();
        script.fail();
        script.hear_prepared(1);
        let failed = Output::Complete { tag: WRITER, result: Err(DiskError::Failed) };
        assert!(script.outputs.contains(&failed), "there is nobody else: {:?}", script.outputs);
        script.give(Input::Replied { tag: WRITER });
        script.give(Input::Planned { operation, missing: Ok(None) });
        script.finish();
        script.hear_prepared(2);
        assert_eq!(script.proposal().is_some(), planted.is_some());
        // Its marks never go: when they were many, every write waited for ever.
        script.replica.hot_limit = 1;
        script.give(Input::Request { tag: WRITER, request: Request::Write(extent(1)) });
        assert!(script.wants(|output| matches!(output, Output::Disk { tag: WRITER, .. })), "{:?}", script.outputs);
    }
}

/// They came after the configuration, and an old write was executed over those of another primary.
#[test]
fn what_outlived_the_engine_is_answered_when_another_copy_was_primary_since() {
    let mut script = Script::new(true, &[], Memory::Kept);
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    assert_eq!(script.outputs, []);
    let mut current = Configuration::first(Generation(1), copy(2), BTreeSet::from([copy(1)]));
    (current.stamp, current.term, current.primary) = (version(4), version(3), None);
    current.secondaries.insert(copy(2));
    script.give(Input::Configuration(Box::new(current)));
    let fenced = Output::Complete { tag: WRITER, result: Err(DiskError::Fenced) };
    // In this order: a life that finds the record would not know any more that it was overtaken.
    let [Output::FenceDevice, first, Output::Persist { .. }] = &script.outputs[..] else {
        panic!("{:?}", script.outputs)
    };
    assert_eq!(*first, fenced);
}

/// What an application had not asked for yet, when another copy became primary, was executed over that one's writes when this
/// copy was primary again: its device was never told.
#[test]
fn the_device_of_a_copy_that_is_primary_no_more_is_fenced_before_that_is_durable() {
    for (primary, fences) in [(Some(copy(2)), true), (None, true), (Some(copy(1)), false)] {
        let mut script = Script::serving();
        let mut next = script.replica.record().configuration.clone();
        next.stamp = version(9);
        let members = BTreeSet::from([copy(1), copy(2)]);
        next.secondaries = members.into_iter().filter(|member| Some(*member) != primary).collect();
        next.primary = primary;
        script.give(Input::Configuration(Box::new(next)));
        let at = script.outputs.iter().position(|output| *output == Output::FenceDevice);
        let persists = script.outputs.iter().position(|output| matches!(output, Output::Persist { .. }));
        assert_eq!(at.is_some(), fences, "{primary:?}: {:?}", script.outputs);
        assert!(!fences || at < persists, "{:?}", script.outputs);
    }
}

/// It was started by the next event that started anything, which never came.
#[test]
fn a_request_that_waited_while_this_copy_was_to_leave_starts_when_it_stays() {
    let mut script = Script::serving();
    script.wish(None);
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    assert_eq!(script.outputs, []);
    script.wish(Some(copy(1)));
    assert!(script.wants(|output| matches!(output, Output::WriteHot { .. })), "{:?}", script.outputs);
}

/// The copying waited for it for ever: it is dropped by nobody, and it was not asked to join again.
#[test]
fn a_member_that_was_silent_during_a_reconcile_is_asked_again() {
    let mut script = Script::without_memory();
    script.hear(Script::joined(FIRST, &[Extent(0)]));
    let operation = script.plan();
    script.give(Input::Planned { operation, missing: Ok(Some(Missing::Suspected(extent(0)))) });
    script.give(Input::Silent(copy(2)));
    script.give(Input::Connected(copy(2)));
    assert!(script.wants(|output| matches!(output, Output::Send { message: Message::Invite(_), .. })));
    script.hear(Script::joined(FIRST, &[Extent(0)]));
    assert!(script.wants(|output| matches!(output, Output::Plan { .. })), "{:?}", script.outputs);
}

/// The flush before leaving waited for a member that only a configuration could let go, and none was proposed.
#[test]
fn a_primary_that_is_to_leave_still_drops_a_member() {
    let mut script = Script::serving();
    script.wish(None);
    let flush = script.outputs.clone();
    script.give(Input::Silent(copy(2)));
    script.finish();
    assert!(script.proposal().is_some_and(|next| next.primary == Some(copy(1)) && next.secondaries.is_empty()));
    let dropped = script.outputs.clone();
    script.outputs = flush;
    script.finish();
    assert_eq!(script.proposal(), None);
    script.outputs = dropped;
    script.commit();
    assert!(script.proposal().is_some_and(|next| next.primary.is_none()), "{:?}", script.outputs);
}

/// It left for a copy that it had dropped itself, so nobody was primary and nobody made that copy a member again. When it
/// only stayed, and held the requests that came, the range that was to be copied waited behind them for ever.
#[test]
fn a_primary_stays_and_serves_until_the_wished_copy_can_take_over() {
    let mut script = Script::serving();
    script.wish(Some(copy(2)));
    let flush = script.outputs.clone();
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    assert_eq!(script.outputs, [], "it is to leave");
    script.give(Input::Silent(copy(2)));
    script.finish();
    let dropped = script.outputs.clone();
    script.outputs = flush;
    script.finish();
    script.outputs = dropped;
    script.commit();
    // The write begins with its mark.
    script.finish();
    script.finish();
    assert!(script.completes(WRITER) && script.proposal().is_none(), "{:?}", script.outputs);
    script.give(Input::Replied { tag: WRITER });
    script.give(Input::Request { tag: OTHER, request: Request::Read(extent(0)) });
    let read = script.outputs.clone();
    let stamp = script.replica.record().configuration.stamp;
    script.hear(Message::Joined { frame: Frame { stamp, incarnation: FIRST }, intact: true, hot: Box::default() });
    let operation = script.plan();
    script.outputs = read;
    script.finish();
    assert!(script.completes(OTHER));
    script.give(Input::Planned { operation, missing: Ok(None) });
    script.finish();
    script.hear_prepared(script.replica.next_serial.0 - 1);
    assert!(script.proposal().is_some_and(|next| next.is_member(copy(2)) && next.primary == Some(copy(1))));
    script.commit();
    assert!(script.wants(|output| matches!(output, Output::Disk { request: Request::Flush, .. })), "now it leaves");
    let flush = script.outputs.clone();
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    assert_eq!(script.outputs, []);
    let stamp = script.replica.record().configuration.stamp;
    script.hear(Message::Joined { frame: Frame { stamp, incarnation: FIRST }, intact: true, hot: Box::default() });
    script.outputs = flush;
    script.finish();
    script.hear_prepared(script.replica.next_serial.0 - 1);
    assert_eq!(script.proposal().expect("it leaves").primary, None);
}
