//! The caches of all members are lost, by hand: who says so, and which client goes on.

use super::*;

/// A client of copy 1, in a session with it.
struct Guest {
    client: Client,
    outputs: Vec<ClientOutput>,
    attempt: u64,
    session: Session,
}

impl Guest {
    fn served(client: Client, lost: Stamp) -> Self {
        let session = Session { host: FIRST, number: 0 };
        let mut guest = Self { client, outputs: vec![], attempt: 1, session };
        guest.client.connected(copy(1), &mut guest.outputs);
        guest.enter(lost);
        guest
    }

    /// A copy begins a session of the attempt that it is asked for now.
    fn enter(&mut self, lost: Stamp) {
        let attempts = self.outputs.iter().filter_map(|output| match output {
            ClientOutput::Send { message: Message::Enter { attempt, .. }, .. } => Some(*attempt),
            _ => None,
        });
        self.attempt = attempts.max().unwrap_or(self.attempt);
        self.session.number += 1;
        let (client, attempt, session) = (SECOND, self.attempt, self.session);
        self.outputs.clear();
        self.client.received(copy(1), &Message::Entered { client, attempt, session, lost }, &mut self.outputs);
    }

    /// Its primary dies, and another one begins a session.
    fn enter_anew(&mut self, lost: Stamp) {
        self.outputs.clear();
        self.client.silent(copy(1), &mut self.outputs);
        self.client.connected(copy(1), &mut self.outputs);
        self.enter(lost);
    }

    fn start(&mut self, number: u64, request: Request) {
        self.client.start(OperationId(number), request, &mut self.outputs);
    }

    fn answer(&mut self, number: u64) {
        let message = Message::Answer { session: self.session, serial: SerialNumber(number), result: Ok(()) };
        self.client.received(copy(1), &message, &mut self.outputs);
    }

    fn run(&mut self, number: u64, request: Request) {
        self.start(number, request);
        self.answer(number);
    }
}

const NEVER: Stamp = Stamp { generation: Generation(0), version: ConfigurationVersion(0) };

/// The write that the caches of all copies had lost was said to be durable by the next flush.
#[test]
fn a_client_ends_if_a_write_may_be_lost_that_no_flush_covers() {
    let write = Request::Write(extent(0));
    let served = || Guest::served(Client::new(SECOND), NEVER);
    let ends = |guest: &mut Guest, lost| {
        guest.enter_anew(lost);
        guest.client.has_ended()
    };
    for changes in [write, Request::Discard(extent(0)), Request::WriteZeroes(extent(0))] {
        let mut guest = served();
        guest.run(1, changes);
        assert!(!ends(&mut guest, NEVER), "another primary that has everything");
        guest.start(2, Request::Flush);
        assert!(ends(&mut guest, version(9)));
        let fenced = ClientOutput::Done { operation: OperationId(2), result: Err(DiskError::Fenced) };
        assert!(guest.outputs.contains(&fenced), "{:?}", guest.outputs);
        guest.outputs.clear();
        guest.start(3, Request::Flush);
        assert!(matches!(guest.outputs[..], [ClientOutput::Done { result: Err(DiskError::Fenced), .. }]));
    }
    let mut covered = served();
    covered.run(1, write);
    covered.run(2, Request::Flush);
    covered.start(3, write);
    assert!(!ends(&mut covered, version(9)), "what is not answered is asked again");
    covered.answer(3);
    assert!(!ends(&mut covered, version(9)), "that was before");
    assert!(ends(&mut covered, version(12)));
    let mut beside = served();
    beside.start(1, Request::Flush);
    beside.run(2, write);
    beside.answer(1);
    assert!(ends(&mut beside, version(9)), "the flush was asked for before the write was completed");
    let mut reads = served();
    reads.run(1, Request::Read(extent(0)));
    assert!(!ends(&mut reads, version(9)));
}

#[test]
fn a_client_that_outlived_its_engine_is_taken_for_one_that_has_written() {
    let mut guest = Guest::served(Client::resumed(SECOND, Some(version(3))), version(3));
    guest.enter_anew(version(9));
    assert!(guest.client.has_ended());
    let guest = Guest::served(Client::resumed(SECOND, Some(version(3))), version(9));
    assert!(guest.client.has_ended(), "it was lost between the two engines");
    let mut guest = Guest::served(Client::resumed(SECOND, Some(version(3))), version(3));
    guest.run(1, Request::Flush);
    guest.enter_anew(version(9));
    assert!(!guest.client.has_ended() && guest.client.lost() == Some(version(9)));
    let guest = Guest::served(Client::resumed(SECOND, None), version(9));
    assert!(!guest.client.has_ended(), "it was never served");
}

/// Copy 1 was the only member.
#[test]
fn the_only_member_says_that_it_has_lost_writes_with_its_term() {
    for (hot, memory) in [(vec![], Memory::Lost), (vec![Extent(0)], Memory::Lost), (vec![Extent(0)], Memory::Kept)] {
        let mut script = Script::new(false, &hot, memory);
        script.read_catalogue();
        if memory == Memory::Lost {
            script.finish();
        }
        let next = script.proposal().expect("a term of its own");
        let lost = if memory == Memory::Lost { next.stamp } else { NEVER };
        assert_eq!(
            (next.lost, next.term),
            (lost, next.stamp),
            "{hot:?}: without a copy to differ from nothing is marked"
        );
        script.commit();
        assert!(script.replica.serves() && script.replica.record().intact);
    }
}

/// It took itself for intact again, and nobody heard of the loss.
#[test]
fn a_late_configuration_of_a_former_life_makes_nobody_intact() {
    let mut script = Script::new(false, &[Extent(0)], Memory::Lost);
    let mut late = script.replica.record().configuration.clone();
    late.stamp = version(2);
    script.give(Input::Configuration(Box::new(late)));
    let [Output::Persist { record, .. }] = &script.outputs[..] else { panic!("{:?}", script.outputs) };
    assert!(!record.intact, "it says nothing of what is gone");
    script.finish();
    let next = script.proposal().expect("a term of its own");
    assert_eq!((next.stamp, next.lost), (version(3), version(3)));
}

/// Both members have lost their caches: the catalogue says so before anything is served or made equal.
#[test]
fn a_term_without_an_intact_member_says_so_before_it_serves() {
    for intact in [false, true] {
        let mut script = Script::without_memory();
        let frame = |stamp| Frame { stamp, incarnation: FIRST };
        let joined = |stamp| Message::Joined { frame: frame(stamp), intact, hot: [Extent(0)].into() };
        script.hear(joined(version(2)));
        let plans = |output: &Output| matches!(output, Output::Plan { .. });
        assert_eq!(script.wants(plans), intact, "{:?}", script.outputs);
        let Some(next) = script.proposal() else {
            assert!(intact);
            continue;
        };
        assert_eq!((next.stamp, next.lost, next.term), (version(3), version(3), version(2)));
        script.commit();
        assert!(!script.wants(plans), "it is asked to join under that");
        script.hear(joined(version(3)));
        assert!(script.wants(plans) && script.proposal().is_none(), "{:?}", script.outputs);
    }
}

/// Its blocks, of which the disk had lost some, went over the good ones of the other member.
#[test]
fn a_copy_whose_flush_failed_is_not_the_one_that_others_are_made_equal_to() {
    let forgets = super::super::Planted::ForgetFailedFlush;
    // It is asked for before a drop; the member may be back before it fails, and nobody needs it any more.
    for (planted, is_back) in [(None, false), (None, true), (Some(forgets), false), (Some(forgets), true)] {
        let mut script = Script::new(true, &[Extent(0)], Memory::Kept);
        script.replica.planted = planted;
        script.read_catalogue();
        script.commit();
        script.give(Input::Silent(copy(2)));
        assert!(script.wants(|output| matches!(output, Output::FlushHere { .. })));
        let flush = script.outputs.clone();
        if is_back {
            script.hear(Script::joined(FIRST, &[]));
            assert_eq!(script.outputs, [], "the flush is waited for");
        }
        script.outputs = flush;
        script.fail();
        assert_eq!(script.replica.has_failed(), planted.is_none() || !is_back);
        if !is_back {
            script.hear(Script::joined(FIRST, &[]));
        }
        let operation = script.plan();
        script.give(Input::Planned { operation, missing: Ok(Some(Missing::Suspected(extent(0)))) });
        let fetches = script.wants(|output| matches!(output, Output::Send { message: Message::Prepare { .. }, .. }));
        assert_eq!(fetches, planted.is_none(), "{:?}", script.outputs);
    }
}

/// It counts itself intact no more, whatever it is told, before it is started again.
#[test]
fn a_secondary_whose_flush_failed_says_that_it_is_not_intact() {
    let configuration = Configuration::first(Generation(1), copy(2), BTreeSet::from([copy(1)]));
    let record = Record { configuration: configuration.clone(), intact: true };
    let member = Member { copy: copy(1), incarnation: FIRST, record, hot: vec![], memory: Memory::Kept };
    let replica = Replica::open(Now::default(), member);
    let mut script = Script { replica, outputs: vec![], now: Now::default() };
    script.give(Input::Configuration(Box::new(configuration)));
    let says = |script: &mut Script| {
        script.give(Input::Connected(copy(2)));
        match &script.outputs[..] {
            [Output::Send { message: Message::Joined { intact, .. }, .. }] => *intact,
            outputs => panic!("{outputs:?}"),
        }
    };
    assert!(says(&mut script));
    let frame = Frame { stamp: version(1), incarnation: FIRST };
    let (serial, floor) = (SerialNumber(1), SerialNumber(1));
    script.hear(Message::Prepare { frame, serial, floor, request: Request::Flush });
    let Some(Output::Apply { operation, .. }) = script.outputs.first().cloned() else { panic!("{:?}", script.outputs) };
    script.give(Input::Completed { operation, result: Err(DiskError::Failed) });
    assert!(!says(&mut script));
    script.hear(Message::Reconciled(frame));
    assert_eq!(script.outputs, []);
}

/// A device that outlived the flush that failed went on, and its next flush was said to cover what was gone.
#[test]
fn a_device_ends_before_its_copy_says_what_no_copy_has() {
    for memory in [Memory::Kept, Memory::Lost] {
        let mut script = Script::new(false, &[], memory);
        script.read_catalogue();
        if memory == Memory::Lost {
            script.finish();
        }
        let stamp = script.proposal().expect("a term of its own").stamp;
        script.give(Input::Proposed { stamp, outcome: Outcome::Committed });
        let ends = matches!(script.outputs[..], [Output::FenceDevice, Output::Persist { .. }]);
        assert_eq!(ends, memory == Memory::Lost, "{:?}", script.outputs);
    }
}

/// Each configuration that followed ended the device again, also the one that was staged since.
#[test]
fn a_device_ends_once_for_what_no_copy_has() {
    let mut script = Script::without_memory();
    let frame = Frame { stamp: version(2), incarnation: FIRST };
    script.hear(Message::Joined { frame, intact: false, hot: Box::default() });
    let says = script.proposal().expect("it says what is lost");
    script.give(Input::Proposed { stamp: says.stamp, outcome: Outcome::Committed });
    assert!(script.outputs.contains(&Output::FenceDevice));
    script.finish();
    assert!(!script.replica.record().intact);
    script.give(Input::Configuration(Box::new(Configuration { stamp: version(4), ..says })));
    assert!(script.wants(|output| matches!(output, Output::Persist { .. })));
    assert!(!script.outputs.contains(&Output::FenceDevice), "{:?}", script.outputs);
}
