//! Marks of hot extents: when a write waits for one, and when they go.

use super::*;

impl Script {
    /// The set that is to be made durable.
    fn marks(&self) -> Option<Vec<Extent>> {
        self.outputs.iter().find_map(|output| match output {
            Output::WriteHot { extents, .. } => Some(extents.to_vec()),
            _ => None,
        })
    }

    fn flush(&self) -> Option<OperationId> {
        self.outputs.iter().find_map(|output| match output {
            Output::Disk { operation, request: Request::Flush, .. } => Some(*operation),
            _ => None,
        })
    }

    fn flushes(&self) -> bool {
        self.flush().is_some()
    }

    fn starts(&self) -> bool {
        self.wants(|output| matches!(output, Output::Disk { request: Request::Write(_), .. }))
    }

    /// A write from its request to its reply, as this serial.
    fn write_whole(&mut self, number: u64, serial: u64) {
        self.write(WRITER, number);
        self.hear_prepared(serial);
        assert!(self.completes(WRITER));
    }
}

/// The write that waited for room asked for a flush, which made none, and so on.
#[test]
fn a_flush_for_room_begins_only_when_it_makes_some() {
    let mut script = Script::serving();
    script.replica.hot_limit = 1;
    script.write(WRITER, 0);
    script.give(Input::Request { tag: OTHER, request: Request::Write(extent(1)) });
    assert_eq!(script.outputs, [], "the only mark is that of a write under way");
    script.hear_prepared(1);
    assert!(script.completes(WRITER));
    let flushes = |output: &Output| matches!(output, Output::Disk { request: Request::Flush, .. });
    assert!(script.wants(flushes));
    script.finish();
    script.hear_prepared(2);
    assert!(script.wants(|output| matches!(output, Output::Send { message: Message::Clear { .. }, .. })));
    assert!(!script.wants(flushes));
}

/// Marks of the term before were counted among those that a flush could clear, and cleared by none: flush followed flush, and
/// writes to other extents waited, for the first minute of a term.
#[test]
fn marks_of_an_earlier_term_make_room() {
    let mut script = Script::serving();
    for (number, serial) in [(10, 1), (20, 2), (30, 3)] {
        script.write_whole(number, serial);
        script.give(Input::Replied { tag: WRITER });
    }
    script.replica.hot.new_term();
    script.replica.hot_limit = 4;
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(40)) });
    let flush = script.flush().expect("there are too many");
    script.give(Input::Completed { operation: flush, result: Ok(()) });
    script.hear_prepared(5);
    assert!(script.clears() && !script.flushes(), "{:?}", script.outputs);
    assert_eq!(script.replica.hot_extents(), [Extent(40)]);
}

/// It marked the first of its extents, which nobody could clear before it had begun.
#[test]
fn a_write_marks_all_of_its_extents_or_none() {
    let mut script = Script::serving();
    script.replica.hot_limit = 2;
    script.write(WRITER, 0);
    script.hear_prepared(1);
    script.give(Input::Replied { tag: WRITER });
    let both = BlockRange::new(2 * EXTENT_BLOCKS - 1, 2).expect("not empty");
    script.give(Input::Request { tag: OTHER, request: Request::Write(both) });
    assert!(!script.wants(|output| matches!(output, Output::WriteHot { .. })), "{:?}", script.outputs);
    script.finish();
    script.hear_prepared(2);
    assert!(script.clears());
    let marks =
        |output: &Output| matches!(output, Output::WriteHot { extents, .. } if **extents == [Extent(1), Extent(2)]);
    assert!(script.wants(marks), "{:?}", script.outputs);
}

/// The other copy marks and writes while this one marks: one after the other took twice as long.
#[test]
fn a_write_is_sent_before_its_mark_is_durable_here_and_executed_after() {
    let mut script = Script::serving();
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    let mark = script.outputs.clone();
    assert!(script.wants(|output| matches!(output, Output::Send { message: Message::Prepare { .. }, .. })));
    assert!(!script.starts());
    script.hear_prepared(1);
    assert_eq!(script.outputs, [], "this copy does not have it");
    script.outputs = mark;
    script.finish();
    assert!(script.starts());
    script.finish();
    assert!(script.completes(WRITER));
}

/// All of its hot extents were copied to a member that came back, however long ago they were written.
#[test]
fn marks_of_a_volume_that_is_idle_go() {
    let mut script = Script::serving();
    script.write_whole(0, 1);
    script.give(Input::Replied { tag: WRITER });
    let age = super::super::super::marks::MARK_AGE.as_millis() / HEARTBEAT.as_millis();
    let mut beats = 0;
    while !script.flushes() {
        script.beat(1);
        beats += 1;
    }
    assert!(beats > age && beats <= 2 * age, "{beats} heartbeats");
    script.finish();
    script.hear_prepared(2);
    assert!(script.clears());
    assert_eq!(script.marks(), Some(vec![]));
    script.finish();
    for _ in 0..3 * age {
        script.beat(1);
        assert!(!script.flushes(), "it has no marks");
    }
}

#[test]
fn a_sequential_stream_finds_its_extents_marked() {
    let mut script = Script::serving();
    script.write_whole(0, 1);
    script.give(Input::Replied { tag: WRITER });
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(1)) });
    assert_eq!(script.marks(), Some((0..10).map(Extent).collect()));
    script.finish();
    script.finish();
    script.hear_prepared(2);
    script.give(Input::Replied { tag: WRITER });
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(2)) });
    assert!(script.starts(), "{:?}", script.outputs);
}

/// Who writes here and there filled the set, and then every write waited for a flush.
#[test]
fn room_is_made_before_a_write_waits_and_what_was_written_last_stays_marked() {
    let mut script = Script::serving();
    script.replica.hot_limit = 4;
    for number in 0..3 {
        script.write_whole(3 * number, number + 1);
        assert!(!script.flushes(), "there is room");
        script.give(Input::Replied { tag: WRITER });
    }
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(9)) });
    let (flush, mark) = (script.flush(), script.outputs.clone());
    script.outputs = mark.into_iter().filter(|output| matches!(output, Output::WriteHot { .. })).collect();
    script.finish();
    script.finish();
    script.hear_prepared(4);
    assert!(script.completes(WRITER), "it does not wait for the flush");
    script.give(Input::Completed { operation: flush.expect("room is made"), result: Ok(()) });
    script.hear_prepared(5);
    assert_eq!(script.marks(), Some(vec![Extent(6), Extent(9)]));
}

/// A thousand marks for four thousand extents: nine of ten writes waited for a mark, first here and then there.
#[test]
fn writes_all_over_16_gib_are_marked_once() {
    let mut script = Script::serving();
    let (mut serial, mut waited) = (0, 0);
    let mut write = |script: &mut Script, number: u64| {
        serial += 1;
        script.give(Input::Request { tag: WRITER, request: Request::Write(extent(number)) });
        let mark = !script.starts();
        if mark {
            script.finish();
        }
        assert!(!script.flushes());
        script.finish();
        script.hear_prepared(serial);
        assert!(script.completes(WRITER));
        script.give(Input::Replied { tag: WRITER });
        mark
    };
    // Each number once in 4,096, without order.
    for number in (0..4096).map(|at| at * 2_654_435_761 % 4096) {
        waited += usize::from(write(&mut script, number));
    }
    assert!(waited <= 4096);
    for number in (0..20_000).map(|at| at * 40_503 % 4096) {
        assert!(!write(&mut script, number), "it is marked");
    }
}

/// Of a long fill that was begun anew by term after term they were more than there is room for, and it could never end.
#[test]
fn a_candidate_that_lacks_everything_forgets_marks_of_earlier_terms() {
    for (lacks, left) in [(Lacks::Everything, vec![]), (Lacks::Since(version(1)), vec![Extent(0), Extent(7)])] {
        let mut configuration = Configuration::first(Generation(1), copy(2), BTreeSet::new());
        configuration.candidates.insert(copy(1), lacks);
        let record = Record { configuration: configuration.clone(), intact: false };
        let hot = vec![Extent(0), Extent(7)];
        let member = Member { copy: copy(1), incarnation: FIRST, record, hot, memory: Memory::Kept };
        let replica = Replica::open(Now::default(), member);
        let mut script = Script { replica, outputs: vec![], now: Now::default() };
        script.give(Input::Configuration(Box::new(configuration.clone())));
        assert_eq!(script.replica.hot.len(), 2, "the term goes on: its admission may be committed already");
        let next = configuration.with_primary(copy(2));
        script.give(Input::Configuration(Box::new(Configuration { secondaries: BTreeSet::new(), ..next })));
        script.finish();
        assert_eq!(script.replica.hot.extents(), left, "{lacks:?}");
    }
}

/// Added up over several resyncs they left no room for the next one's: it could never end.
#[test]
fn a_candidate_with_too_many_marks_is_compared_whole() {
    for (count, anew) in [(MAX_MARKS - MAX_HOT_EXTENTS, false), (MAX_MARKS - MAX_HOT_EXTENTS + 1, true)] {
        let mut configuration = Configuration::first(Generation(1), copy(1), BTreeSet::new());
        configuration.candidates.insert(copy(2), Lacks::Since(version(1)));
        let record = Record { configuration: configuration.clone(), intact: true };
        let member = Member { copy: copy(1), incarnation: FIRST, record, hot: vec![], memory: Memory::Kept };
        let replica = Replica::open(Now::default(), member);
        let mut script = Script { replica, outputs: vec![], now: Now::default() };
        script.give(Input::Configuration(Box::new(configuration)));
        script.commit();
        let hot: Vec<Extent> = (0..count as u32).map(Extent).collect();
        script.hear(Script::joined(FIRST, &hot));
        assert_eq!(script.wants(|output| matches!(output, Output::Plan { .. })), !anew);
        let lacks = script.proposal().map(|next| next.candidates[&copy(2)]);
        assert_eq!(lacks, anew.then_some(Lacks::Everything));
    }
}
