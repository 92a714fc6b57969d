//! How far ahead a primary runs, by hand: no further than the others remember what was not answered.

use super::super::super::secondary::MAX_APPLIES;
use super::*;

impl Script {
    /// Writes one after the other, behind what has this serial, which the other copy answers, until one has to wait.
    fn runs_ahead(&mut self, mut serial: u64) -> u64 {
        let beside = Request::Write(BlockRange::new(1, 1).expect("not empty"));
        loop {
            self.give(Input::Request { tag: WRITER, request: beside });
            if self.outputs.is_empty() {
                return serial;
            }
            serial += 1;
            self.finish();
            self.hear_prepared(serial);
            assert!(self.completes(WRITER));
            self.give(Input::Replied { tag: WRITER });
        }
    }
}

/// A secondary remembers so many operations from the first one that is not answered; what was further away it dropped
/// without a word, and both waited for ever.
#[test]
fn nothing_is_started_further_ahead_than_the_others_remember() {
    for here in [true, false] {
        let mut script = Script::serving();
        script.give(Input::Request { tag: OTHER, request: Request::Write(extent(0)) });
        script.finish();
        if here {
            script.finish();
        }
        let serial = script.runs_ahead(1);
        assert_eq!(serial, MAX_APPLIES as u64);
        // What the others have answered they forget, whether this copy's own disk is done or not.
        script.hear_prepared(1);
        assert_eq!(script.completes(OTHER), here);
        assert!(script.wants(|output| matches!(output, Output::Disk { tag: WRITER, .. })), "{:?}", script.outputs);
    }
}

/// The question for a range that was read meanwhile was further away than the other copy remembers: it was dropped there without
/// a word, and the resync never ended.
#[test]
fn a_range_that_is_read_keeps_its_place_among_what_the_others_remember() {
    let mut script = Script::primary(false);
    script.write(OTHER, 0);
    script.give(Input::Replied { tag: OTHER });
    script.hear(Script::joined(FIRST, &[]));
    let operation = script.plan();
    let suspected = BlockRange::new(64, 16).expect("not empty");
    script.give(Input::Planned { operation, missing: Ok(Some(Missing::Suspected(suspected))) });
    let Some(Output::ReadPiece { operation: read, .. }) = script.outputs.first().cloned() else {
        panic!("{:?}", script.outputs)
    };
    // The other copy does not answer it, and answers what follows.
    script.give(Input::Request { tag: OTHER, request: Request::Write(extent(0)) });
    script.finish();
    script.runs_ahead(3);
    script.give(Input::Completed { operation: read, result: Ok(()) });
    let asked = script.outputs.iter().find_map(|output| match output {
        Output::Send { message: Message::Compare { serial, floor, .. }, .. } => Some((*serial, *floor)),
        _ => None,
    });
    let (serial, floor) = asked.expect("it is compared");
    assert!(serial.0 - floor.0 < MAX_APPLIES as u64, "{serial:?} from {floor:?} on");
}
