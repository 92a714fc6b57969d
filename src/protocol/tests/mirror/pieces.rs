//! Ranges that are copied, by hand: how many at a time, what is compared, and what is sent.

use super::*;
use std::time::Duration;

/// Sixteen blocks of the first extent.
fn part(number: u64) -> BlockRange {
    BlockRange::new(16 * number, 16).expect("not empty")
}

fn blocks(these: &[u32]) -> BlockSet {
    let mut blocks = BlockSet::default();
    these.iter().for_each(|block| blocks.insert(*block, 1));
    blocks
}

impl Script {
    /// What the store is asked for of the plan.
    fn looks(&self) -> Option<OperationId> {
        self.outputs.iter().find_map(|output| match output {
            Output::Plan { operation, .. } | Output::NextRange { operation } => Some(*operation),
            _ => None,
        })
    }

    fn reads(&self) -> Option<OperationId> {
        self.outputs.iter().find_map(|output| match output {
            Output::ReadPiece { operation, .. } => Some(*operation),
            _ => None,
        })
    }

    /// The message of a copied range.
    fn sends(&self) -> Option<Message> {
        self.outputs.iter().find_map(|output| match output {
            Output::Send { message: message @ (Message::Copy { .. } | Message::Compare { .. }), .. } => {
                Some(message.clone())
            }
            _ => None,
        })
    }

    fn serial(&self) -> u64 {
        match self.sends().expect("a range is sent") {
            Message::Copy { serial, .. } | Message::Compare { serial, .. } => serial.0,
            other => panic!("{other:?}"),
        }
    }

    /// The plan has this next. The read that follows, if it follows at once, and what is looked for then.
    fn finds(&mut self, missing: Missing) -> (Option<OperationId>, Option<OperationId>) {
        let operation = self.looks().expect("something is looked for");
        self.give(Input::Planned { operation, missing: Ok(Some(missing)) });
        (self.reads(), self.looks())
    }

    fn hear_compared(&mut self, serial: u64, differs: BlockSet) {
        let frame = Frame { stamp: version(2), incarnation: FIRST };
        self.hear(Message::Compared { frame, serial: SerialNumber(serial), differs: Ok(differs) });
    }

    /// A candidate has joined, the application is away or asks, and the first extent is marked.
    fn copying(quiet: bool) -> Self {
        let mut script = Self::primary(false);
        script.write(WRITER, 0);
        script.give(Input::Replied { tag: WRITER });
        script.beat(if quiet { 3 } else { 0 });
        script.hear(Self::joined(FIRST, &[]));
        script
    }
}

fn known(number: u64) -> Missing {
    Missing::Known(Piece::whole(part(number)).expect("not too long"))
}

/// One range at a time waited for its answer: 1 GiB of scattered blocks was not copied after ten minutes.
#[test]
fn many_ranges_are_under_way_while_nobody_asks_and_one_while_somebody_does() {
    let mut script = Script::copying(true);
    let mut reads = vec![];
    for number in 0..MAX_PIECES as u64 {
        let (read, next) = script.finds(known(number));
        reads.push(read.expect("nothing is in its way"));
        assert_eq!(next.is_some(), number + 1 < MAX_PIECES as u64, "{number}");
    }
    assert_eq!(script.replica.progress().under_way, 16 * MAX_PIECES as u64);
    let done = |script: &mut Script, read| {
        script.give(Input::Completed { operation: read, result: Ok(()) });
        assert!(script.replica.copies(read));
        script.hear_prepared(script.serial());
        assert!(!script.replica.copies(read), "its memory is not needed any more");
    };
    done(&mut script, reads[0]);
    assert!(script.looks().is_some(), "another one has its place");
    script.finds(known(MAX_PIECES as u64));
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    for (count, read) in reads.drain(1..).enumerate() {
        done(&mut script, read);
        assert_eq!(script.looks(), None, "{count}: the application asks");
    }
}

/// Beside a busy application a resync took a third of its writes.
#[test]
fn beside_an_application_a_range_takes_a_tenth_of_the_time() {
    let mut script = Script::copying(false);
    let (read, next) = script.finds(known(0));
    assert_eq!(next, None, "one at a time");
    script.now.0 += Duration::from_millis(10);
    script.give(Input::Completed { operation: read.expect("it is read"), result: Ok(()) });
    script.hear_prepared(script.serial());
    assert_eq!(script.looks(), None);
    for (milliseconds, looks) in [(89, false), (1, true)] {
        script.now.0 += Duration::from_millis(milliseconds);
        script.give(Input::Request { tag: WRITER, request: Request::Read(extent(5)) });
        assert_eq!(script.looks().is_some(), looks);
        let Some(Output::Disk { operation, .. }) = script.outputs.first().cloned() else {
            panic!("{:?}", script.outputs)
        };
        let outputs = script.outputs.clone();
        script.give(Input::Completed { operation, result: Ok(()) });
        script.give(Input::Replied { tag: WRITER });
        script.outputs = outputs;
    }
    script.finds(known(1));
    // Whatever a range takes, the plan goes on with a heartbeat.
    script.now.0 += Duration::from_secs(60);
    let read = script.reads().expect("it is read");
    script.give(Input::Completed { operation: read, result: Ok(()) });
    script.hear_prepared(script.serial());
    script.give(Input::Request { tag: WRITER, request: Request::Flush });
    assert_eq!(script.looks(), None);
    script.beat(1);
    assert!(script.looks().is_some());
}

/// The hot extents of a copy that came back were copied whole, although almost all of their blocks were equal.
#[test]
fn of_what_is_suspected_only_what_differs_is_sent() {
    let mut script = Script::copying(true);
    let (read, _) = script.finds(Missing::Suspected(part(0)));
    script.give(Input::Completed { operation: read.expect("it is read"), result: Ok(()) });
    assert!(matches!(script.sends(), Some(Message::Compare { range, .. }) if range == part(0)));
    let serial = script.serial();
    script.give(Input::Request { tag: WRITER, request: Request::Write(part(0)) });
    assert_eq!(script.outputs, [], "what is compared is held");
    script.hear_prepared(serial);
    assert_eq!(script.sends(), None, "that says nothing about what is equal");
    // Nor is any block outside of the range copied, whatever is answered.
    script.hear_compared(serial, blocks(&[3, 7, 16, 255]));
    let Some(Message::Copy { piece, .. }) = script.sends() else { panic!("{:?}", script.outputs) };
    assert_eq!((piece.range(), piece.blocks()), (part(0), blocks(&[3, 7])));
    script.hear_compared(serial, BlockSet::default());
    let starts = |output: &Output| matches!(output, Output::Disk { tag: WRITER, .. });
    assert!(!script.wants(starts));
    script.hear_prepared(serial + 1);
    assert!(script.wants(starts), "{:?}", script.outputs);
    assert_eq!(script.replica.progress(), Progress { copied: 2, equal: 14, under_way: 0 });
}

#[test]
fn what_is_equal_is_not_sent() {
    let mut script = Script::copying(true);
    let (read, _) = script.finds(Missing::Suspected(part(0)));
    let looks = script.looks().expect("for more");
    script.give(Input::Completed { operation: read.expect("it is read"), result: Ok(()) });
    script.hear_compared(script.serial(), BlockSet::default());
    assert_eq!(script.sends(), None);
    script.give(Input::Planned { operation: looks, missing: Ok(None) });
    assert!(script.wants(|output| matches!(output, Output::Disk { request: Request::Flush, .. })), "it is all equal");
}

/// The flush began when the plan had ended, and the candidate was admitted without the last ranges.
#[test]
fn the_last_flush_waits_for_the_last_range() {
    for planted in [None, Some(super::super::Planted::FlushBesidePieces)] {
        let mut script = Script::copying(true);
        script.replica.planted = planted;
        let (read, looks) = script.finds(known(0));
        let flushes = |output: &Output| matches!(output, Output::Disk { request: Request::Flush, .. });
        script.give(Input::Planned { operation: looks.expect("for more"), missing: Ok(None) });
        assert_eq!(script.wants(flushes), planted.is_some());
        script.give(Input::Completed { operation: read.expect("it is read"), result: Ok(()) });
        script.hear_prepared(script.serial());
        assert_eq!(script.wants(flushes), planted.is_none());
    }
}

/// It failed the comparison, and so did the next copy's, for ever: not even a resync that a person asked for mended it.
#[test]
fn blocks_that_a_candidate_cannot_read_are_sent_to_it() {
    for (error, mended) in [(DiskError::Corrupt, true), (DiskError::Failed, true), (DiskError::NoSpace, false)] {
        let mut configuration = Configuration::first(Generation(1), copy(2), BTreeSet::new());
        configuration.candidates.insert(copy(1), Lacks::Everything);
        let record = Record { configuration: configuration.clone(), intact: false };
        let member = Member { copy: copy(1), incarnation: FIRST, record, hot: vec![], memory: Memory::Kept };
        let replica = Replica::open(Now::default(), member);
        let mut script = Script { replica, outputs: vec![], now: Now::default() };
        script.give(Input::Configuration(Box::new(configuration)));
        let frame = Frame { stamp: version(1), incarnation: FIRST };
        let (serial, floor) = (SerialNumber(1), SerialNumber(1));
        script.hear(Message::Compare { frame, serial, floor, range: part(0) });
        let Some(Output::Compare { operation, .. }) = script.outputs.first().cloned() else {
            panic!("{:?}", script.outputs)
        };
        script.give(Input::Compared { operation, differs: Err(error) });
        let Some(Output::Send { message: Message::Compared { differs, .. }, .. }) = script.outputs.first() else {
            panic!("{:?}", script.outputs)
        };
        let all: Vec<u32> = (0..16).collect();
        assert_eq!(*differs, if mended { Ok(blocks(&all)) } else { Err(error) });
    }
}

/// One block that could not be read stopped the volume as soon as there was a candidate, and nobody else had it.
#[test]
fn a_sole_member_that_cannot_read_what_it_copies_goes_on_and_leaves_the_candidate_alone() {
    [false, true].into_iter().for_each(cannot_read);
}

fn cannot_read(plan: bool) {
    let mut script = Script::copying(true);
    let (read, next) = script.finds(known(0));
    script.give(Input::Request { tag: OTHER, request: Request::Flush });
    let flush = script.operation();
    match next.filter(|_| plan) {
        Some(operation) => script.give(Input::Planned { operation, missing: Err(DiskError::Failed) }),
        None => script.give(Input::Completed { operation: read.expect("it is read"), result: Err(DiskError::Corrupt) }),
    }
    assert!(script.replica.serves());
    assert_eq!(script.replica.resting().collect::<Vec<_>>(), [(copy(2), Because::Unread)]);
    script.give(Input::Completed { operation: flush, result: Ok(()) });
    assert!(script.completes(OTHER), "the candidate is not awaited: {:?}", script.outputs);
    script.give(Input::Request { tag: WRITER, request: Request::Write(extent(0)) });
    script.finish();
    assert!(script.completes(WRITER), "{:?}", script.outputs);
    script.give(Input::Replied { tag: WRITER });
    // Wished or started anew, it is of no more use: each time what can be read was copied, and the rest failed again.
    script.wish(Some(copy(2)));
    script.hear(Script::joined(SECOND, &[]));
    assert_eq!(script.outputs, []);
    script.beat(2);
    assert!(!script.wants(|output| matches!(output, Output::Send { .. })), "{:?}", script.outputs);
    script.beat(130);
    assert!(script.wants(|output| matches!(output, Output::Send { message: Message::Invite(_), .. })));
    assert_eq!(script.proposal(), None);
}
