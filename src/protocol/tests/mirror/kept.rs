//! What is suspected of a copy that comes back, having kept or lost what it had answered.

use super::*;

/// Copy 2 has answered a write of extent 3, and is dropped before it answers one of extent 0.
fn dropped() -> Script {
    let mut script = Script::serving();
    script.write(OTHER, 3);
    script.hear_prepared(1);
    assert!(script.completes(OTHER));
    script.give(Input::Replied { tag: OTHER });
    script.write(WRITER, 0);
    script.give(Input::Silent(copy(2)));
    script.finish();
    script.commit();
    assert!(script.completes(WRITER));
    script
}

/// It joins under the newest version.
fn joins(script: &mut Script, incarnation: Incarnation, intact: bool) -> Suspects {
    let stamp = script.replica.record().configuration.stamp;
    let hot = [Extent(0), Extent(3), Extent(7)].into();
    script.hear(Message::Joined { frame: Frame { stamp, incarnation }, intact, hot });
    let plans = script.outputs.iter().find_map(|output| match output {
        Output::Plan { lacks: Some(Lacks::Since(_)), suspects, .. } => Some(suspects.clone()),
        _ => None,
    });
    plans.unwrap_or_else(|| panic!("{:?}", script.outputs))
}

/// All that was hot was compared, up to 32 GiB, when an engine was killed for a moment.
#[test]
fn of_a_copy_that_has_kept_what_it_answered_only_the_rest_is_suspected() {
    let marked = Suspects::Marked([Extent(0), Extent(3), Extent(7)].into());
    for (intact, suspects) in [(true, Suspects::Unanswered([Extent(0)].into())), (false, marked)] {
        let mut script = dropped();
        assert_eq!(joins(&mut script, FIRST, intact), suspects);
        // It is killed meanwhile and comes back.
        assert_eq!(joins(&mut script, SECOND, intact), suspects);
    }
}

/// What it had executed for another primary, this one does not know.
#[test]
fn of_a_copy_that_never_served_with_this_primary_all_that_is_hot_is_suspected() {
    let mut script = Script::primary(true);
    script.give(Input::Silent(copy(2)));
    script.finish();
    script.commit();
    assert_eq!(script.replica.role(), Role::Primary(Primary::Serving));
    assert!(matches!(joins(&mut script, FIRST, true), Suspects::Marked(_)));
}

/// Every candidate counted as one that had lost something, also after its next start.
#[test]
fn a_copy_that_leaves_stays_intact_if_it_is_known_what_it_lacks() {
    for (lacks, intact) in [(Lacks::Since(version(3)), true), (Lacks::Everything, false)] {
        for was_intact in [false, true] {
            let mut configuration = Configuration::first(Generation(1), copy(2), BTreeSet::from([copy(1)]));
            let record = Record { configuration: configuration.clone(), intact: was_intact };
            let member = Member { copy: copy(1), incarnation: FIRST, record, hot: vec![], memory: Memory::Kept };
            let replica = Replica::open(Now::default(), member);
            let mut script = Script { replica, outputs: vec![], now: Now::default() };
            (configuration.stamp, configuration.secondaries) = (version(3), BTreeSet::new());
            configuration.candidates.insert(copy(1), lacks);
            script.give(Input::Configuration(Box::new(configuration)));
            let Some(Output::Persist { record, .. }) = script.outputs.first() else { panic!("{:?}", script.outputs) };
            assert_eq!(record.intact, intact && was_intact);
        }
    }
}

/// A flush that it was not asked for took its mark of what it had not flushed: after a loss of power it counted as intact.
#[test]
fn a_copy_that_joins_while_a_flush_is_under_way_keeps_its_marks() {
    for planted in [None, Some(super::super::Planted::ClearWhoJoins)] {
        let mut script = dropped();
        script.give(Input::Replied { tag: WRITER });
        (script.replica.planted, script.replica.hot_limit) = (planted, 2);
        script.give(Input::Request { tag: OTHER, request: Request::Flush });
        let flush = script.outputs.clone();
        let stamp = script.replica.record().configuration.stamp;
        script.hear(Message::Joined { frame: Frame { stamp, incarnation: FIRST }, intact: true, hot: Box::default() });
        script.outputs = flush;
        script.finish();
        assert!(script.completes(OTHER) && script.wants(|output| matches!(output, Output::WriteHot { .. })));
        assert_eq!(script.clears(), planted.is_some(), "{:?}", script.outputs);
    }
}

/// The configuration without it was on its way when a person wanted it compared: that was forgotten.
#[test]
fn a_copy_that_is_to_be_compared_is_when_its_removal_was_proposed_before() {
    let mut script = Script::serving();
    script.give(Input::Silent(copy(2)));
    script.finish();
    let next = script.proposal().expect("it goes on alone");
    assert_eq!(next.candidates[&copy(2)], Lacks::Since(next.stamp));
    script.give(Input::Resync(copy(2)));
    script.give(Input::Proposed { stamp: next.stamp, outcome: Outcome::Committed });
    script.finish();
    let next = script.proposal().expect("it lacks everything");
    assert_eq!(next.candidates[&copy(2)], Lacks::Everything);
    script.commit();
    assert_eq!(script.proposal(), None);
}
