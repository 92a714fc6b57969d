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
