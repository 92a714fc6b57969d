//! Copies that are slow, by hand: when one is given up, and when it is asked again.

use super::super::super::patience::PATIENCE;
use super::*;
use std::time::Duration;

/// A member whose disk is slow lets every write wait: it was dropped only when it had not answered anything at all.
#[test]
fn a_member_that_owes_one_operation_for_too_long_goes_although_it_answers_others() {
    let mut script = Script::serving();
    script.write(WRITER, 0);
    for serial in 2..u64::from(PATIENCE) + 1 {
        script.give(Input::Request { tag: OTHER, request: Request::Flush });
        script.finish();
        script.hear_prepared(serial);
        assert!(script.completes(OTHER));
        script.give(Input::Replied { tag: OTHER });
        script.beat(1);
        assert!(!script.wants(|output| matches!(output, Output::FlushHere { .. })), "it may still answer");
    }
    script.beat(1);
    script.finish();
    assert!(script.proposal().is_some_and(|next| next.candidates.contains_key(&copy(2))), "{:?}", script.outputs);
    assert!(!script.completes(WRITER));
    script.commit();
    assert!(script.completes(WRITER));
}

/// What this copy has not executed itself, nobody owes it.
#[test]
fn a_primary_whose_own_disk_is_slow_blames_nobody() {
    let mut script = Script::serving();
    script.give(Input::Request { tag: WRITER, request: Request::Flush });
    let slow = script.outputs.clone();
    script.beat(10 * u32::from(PATIENCE));
    assert!(!script.wants(|output| matches!(output, Output::FlushHere { .. })));
    // Nor after a long sleep.
    script.outputs = slow;
    script.finish();
    script.now.0 += Duration::from_secs(3600);
    script.beat(u32::from(PATIENCE) - 1);
    assert!(!script.wants(|output| matches!(output, Output::FlushHere { .. })));
}

/// It was heard and did not make the configuration durable: a new term waited for it for ever.
#[test]
fn a_member_that_does_not_join_a_term_goes() {
    let mut script = Script::primary(true);
    script.beat(u32::from(PATIENCE));
    let flush = script.outputs.clone();
    script.hear(Script::joined(FIRST, &[]));
    assert_eq!(script.outputs, [], "too late: it is about to be dropped");
    script.outputs = flush;
    script.finish();
    assert!(script.proposal().is_some_and(|next| next.secondaries.is_empty()), "{:?}", script.outputs);
}

/// It would have been a candidate again with its next word, and writes wait for candidates, too.
#[test]
fn a_copy_that_was_slow_is_left_alone_for_a_while_and_then_for_longer() {
    let invites = |output: &Output| matches!(output, Output::Send { message: Message::Invite(_), .. });
    let mut script = Script::primary(false);
    let mut rests = vec![];
    for _ in 0..7 {
        let began = script.now;
        while !script.wants(invites) {
            script.beat(1);
        }
        rests.push((script.now.0 - began.0).as_secs());
        script.hear(Script::joined(FIRST, &[]));
        script.give(Input::Request { tag: WRITER, request: Request::Flush });
        script.finish();
        script.beat(u32::from(PATIENCE));
        assert!(script.completes(WRITER));
        script.give(Input::Replied { tag: WRITER });
    }
    assert_eq!(rests, [0, 60, 120, 240, 480, 960, 960]);
    script.wish(Some(copy(2)));
    script.beat(1);
    assert!(script.wants(invites), "wished as primary: {:?}", script.outputs);
    script.wish(Some(copy(1)));
    script.hear(Script::joined(FIRST, &[]));
    assert!(!script.wants(|output| matches!(output, Output::Plan { .. })));
    script.hear(Script::joined(SECOND, &[]));
    assert!(script.wants(|output| matches!(output, Output::Plan { .. })), "it was started again: {:?}", script.outputs);
}

/// It was a member, and its newer blocks did not count: writes were answered for as long as it said nothing.
#[test]
fn a_member_that_was_admitted_and_does_not_settle_goes() {
    for settles in [true, false] {
        let mut script = Script::primary(false);
        script.hear(Script::joined(FIRST, &[]));
        let operation = script.plan();
        script.give(Input::Planned { operation, missing: Ok(None) });
        script.finish();
        script.hear_prepared(1);
        script.commit();
        let frame = Frame { stamp: version(3), incarnation: FIRST };
        script.hear(Message::Joined { frame, intact: false, hot: Box::default() });
        assert!(script.wants(|output| matches!(output, Output::Send { message: Message::Reconciled(_), .. })));
        if settles {
            script.hear(Message::Settled(frame));
        }
        script.beat(u32::from(PATIENCE));
        assert_eq!(script.wants(|output| matches!(output, Output::FlushHere { .. })), !settles);
    }
}
