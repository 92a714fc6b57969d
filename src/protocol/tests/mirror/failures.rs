//! Disks that fail at once, and answers that are late or wrong, by hand: what is tried again, when, and what is not believed.

use super::*;

/// The store of a failed disk refuses at once; its core asked it again within the same turn, for ever.
#[test]
fn a_record_that_failed_is_tried_again_with_the_next_tick() {
    let mut script = Script::new(true, &[], Memory::Kept);
    let next = script.replica.record().configuration.with_primary(copy(2));
    script.give(Input::Configuration(Box::new(next)));
    script.fail();
    assert!(!script.wants(|output| matches!(output, Output::Persist { .. })), "{:?}", script.outputs);
    script.give(Input::Tick);
    assert!(script.wants(|output| matches!(output, Output::Persist { .. })), "{:?}", script.outputs);
}

/// The store of a failed disk refuses at once; the flush before leaving was asked for again within the same turn, for ever.
#[test]
fn a_flush_of_its_own_that_failed_is_tried_again_with_the_next_tick() {
    for secondary in [false, true] {
        let mut script = if secondary { Script::serving() } else { Script::primary(false) };
        let flushes = |output: &Output| matches!(output, Output::Disk { request: Request::Flush, .. });
        script.wish(None);
        for _ in 0..3 {
            assert!(script.wants(flushes), "{:?}", script.outputs);
            script.fail();
            assert!(!script.wants(flushes), "{:?}", script.outputs);
            script.give(Input::Tick);
        }
        script.finish();
        if secondary {
            script.hear_prepared(script.replica.next_serial.0 - 1);
        }
        assert_eq!(script.proposal().expect("it leaves").primary, None);
    }
}

/// The removal of a member was on its way to the catalogue when the member came back, and everything went on. It landed
/// seconds later, after a power cut here: what the member had and this copy had lost was acknowledged, and gone. (The simulator
/// found it with seed 30131174278911.)
#[test]
fn a_member_that_comes_back_while_its_removal_may_be_committed_stays_out() {
    let mut script = Script::primary(true);
    script.give(Input::Silent(copy(2)));
    script.finish();
    let without = script.proposal().expect("the silent one is dropped");
    assert!(!without.is_member(copy(2)));
    script.give(Input::Connected(copy(2)));
    script.hear(Script::joined(FIRST, &[]));
    script.hear(Message::Settled(Frame { stamp: version(2), incarnation: FIRST }));
    assert_eq!(script.replica.role(), Role::Primary(Primary::Reconciling));
    script.give(Input::Proposed { stamp: without.stamp, outcome: Outcome::Ambiguous });
    assert!(script.wants(|output| *output == Output::ReadConfiguration));
    script.give(Input::Configuration(Box::new(without)));
    script.finish();
    assert_eq!(script.replica.role(), Role::Primary(Primary::Serving));
}

/// A drop was on its way to the catalogue when this copy failed. What its flush had not covered was acknowledged, the drop landed,
/// and power was lost here: the other copy, which had it, was no member any more.
#[test]
fn nothing_is_acknowledged_behind_a_drop_that_may_land_although_this_copy_has_failed() {
    for planted in [None, Some(super::super::Planted::OpenGuardEarly)] {
        let mut script = Script::serving();
        script.replica.planted = planted;
        script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
        script.finish();
        let write = script.outputs.clone();
        script.hear_prepared(1);
        script.give(Input::Silent(copy(2)));
        script.finish();
        let drop = script.outputs.clone();
        assert!(script.proposal().is_some());
        script.outputs = write;
        script.finish();
        script.give(Input::Request { tag: OTHER, request: Request::Write(extent(1)) });
        script.fail();
        assert_eq!(script.completes(WRITER), planted.is_some());
        script.outputs = drop;
        script.commit();
        assert!(planted.is_some() || script.completes(WRITER), "{:?}", script.outputs);
    }
}

/// It left for a copy that was dead: nobody was primary, and nobody could drop the dead one.
#[test]
fn a_primary_that_does_not_serve_yet_leaves_for_nobody_who_is_silent() {
    let mut script = Script::primary(true);
    script.give(Input::Silent(copy(2)));
    let flush = script.outputs.clone();
    script.wish(Some(copy(2)));
    assert_eq!(script.proposal(), None);
    script.outputs = flush;
    script.finish();
    assert!(script.proposal().is_some_and(|next| next.primary == Some(copy(1)) && next.secondaries.is_empty()));
    let mut script = Script::primary(true);
    script.wish(Some(copy(2)));
    assert_eq!(script.proposal().expect("it leaves").primary, None);
}

/// It stayed for the silent one, which it could not drop, and nobody was primary although others heard that one.
#[test]
fn a_primary_that_may_drop_nobody_leaves_also_for_one_who_is_silent() {
    let mut script = Script::without_memory();
    script.give(Input::Silent(copy(2)));
    script.wish(Some(copy(2)));
    assert_eq!(script.proposal().expect("it leaves").primary, None);
}

/// A write without space kept its place among those that others remember: after 153 operations reads and discards stopped, too;
/// and a seal waited for it, and held what came later.
#[test]
fn a_write_without_space_stops_no_read_no_discard_and_no_seal() {
    let mut script = Script::serving();
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    script.finish();
    let operation = script.operation();
    script.hear_prepared(1);
    script.give(Input::Completed { operation, result: Err(DiskError::NoSpace) });
    let beside = BlockRange::new(1, 1).expect("not empty");
    let ask = |script: &mut Script, serial: Option<u64>, request| {
        script.give(Input::Request { tag: OTHER, request });
        script.finish();
        if let Some(serial) = serial {
            script.hear_prepared(serial);
        }
        assert!(script.completes(OTHER), "{request:?}: {:?}", script.outputs);
        script.give(Input::Replied { tag: OTHER });
    };
    let operations = super::super::super::secondary::MAX_APPLIES as u64 + 5;
    script.give(Input::Received { from: copy(2), message: granted() });
    for serial in 2..operations {
        ask(&mut script, Some(serial), Request::Discard(beside));
        ask(&mut script, None, Request::Read(beside));
    }
    script.give(Input::Request { tag: OTHER, request: Request::Seal(SealName(1)) });
    let refused = |tag| Output::Complete { tag, result: Err(DiskError::NoSpace) };
    assert_eq!(script.outputs, [refused(OTHER)]);
    script.give(Input::Replied { tag: OTHER });
    ask(&mut script, Some(operations), Request::Discard(beside));
    script.give(Input::SpaceFreed);
    script.finish();
    assert!(script.completes(WRITER));
}

/// The seal came first: it waits for the write, as what comes later waits for it.
#[test]
fn a_seal_that_waits_for_a_write_is_refused_when_there_is_no_space_for_that() {
    let mut script = Script::serving();
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    script.finish();
    let operation = script.operation();
    script.give(Input::Request { tag: OTHER, request: Request::Seal(SealName(1)) });
    script.give(Input::Request { tag: Tag(3), request: Request::Discard(BlockRange::new(1, 1).expect("not empty")) });
    assert_eq!(script.outputs, []);
    script.give(Input::Completed { operation, result: Err(DiskError::NoSpace) });
    assert!(script.outputs.contains(&Output::Complete { tag: OTHER, result: Err(DiskError::NoSpace) }));
    assert!(script.wants(|output| matches!(output, Output::Disk { tag: Tag(3), .. })), "{:?}", script.outputs);
}

fn granted() -> Message {
    Message::Granted { frame: Frame { stamp: version(2), incarnation: FIRST }, sent: Now::default() }
}

/// It made the lease endless, or ended the process.
#[test]
fn a_lease_of_which_more_is_granted_than_was_asked_for_is_not_believed() {
    let mut script = Script::serving();
    script.beat(1);
    let frame = Frame { stamp: version(2), incarnation: FIRST };
    let sent = script.now;
    let granted = |sent| Message::Granted { frame, sent };
    script.hear(granted(Now(sent.0 + LEASE)));
    script.hear(granted(Now(std::time::Duration::MAX)));
    assert!(!script.replica.answers());
    script.hear(granted(sent));
    assert!(script.replica.answers());
    script.now.0 += LEASE;
    script.give(Input::Tick);
    assert!(!script.replica.answers());
}
