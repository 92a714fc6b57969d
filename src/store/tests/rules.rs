//! One test for each rule that is about the order of things.

use super::super::*;
use super::*;

type Actions = Vec<Action<Job>>;

/// A store whose actions the test completes by itself, with one volume of `blocks`.
pub(super) fn by_hand(blocks: u64) -> Bench {
    let mut bench = Bench::new();
    let create = Control::CreateVolume { volume: volume(1), size: size(blocks), verify_reads: false };
    assert_eq!(bench.control(create), Ok(()));
    bench.idle();
    bench
}

impl Bench {
    fn begin(&mut self, request: Request) -> (OperationId, Actions) {
        self.next += 1;
        let (mut out, id) = (Vec::new(), OperationId(self.next));
        self.store().start(id, volume(1), request, &mut out);
        (id, out)
    }

    fn seal(&mut self, number: u8) -> (OperationId, Actions) {
        self.next += 1;
        let (mut out, id) = (Vec::new(), OperationId(self.next));
        let seal = Control::Seal { volume: volume(1), snapshot: snapshot(number), created_ms: 0 };
        self.store().control(id, seal, &mut out);
        (id, out)
    }

    fn complete(&mut self, io: IoId, result: Result<(), DiskError>) -> Actions {
        let mut out = Vec::new();
        self.store().completed(io, result, &mut out);
        out
    }

    /// Completes I/O, without executing it, until there is none; what was done meanwhile.
    fn complete_all(&mut self, mut actions: Actions) -> Vec<OperationId> {
        let mut ended = Vec::new();
        while !actions.is_empty() {
            let mut next = Vec::new();
            for action in actions {
                match action {
                    Action::Io { io, .. } => next.extend(self.complete(io, Ok(()))),
                    Action::Done { operation, result: Ok(()) } => ended.push(operation),
                    Action::ControlDone { operation, result: Ok(()) } => ended.push(operation),
                    other => panic!("{other:?}"),
                }
            }
            actions = next;
        }
        ended
    }
}

/// The I/Os among actions.
fn ios(actions: &Actions) -> Vec<(IoId, File, Io)> {
    let io = |action: &Action<Job>| match action {
        Action::Io { io, file, what } => Some((*io, *file, *what)),
        _ => None,
    };
    actions.iter().filter_map(io).collect()
}

fn is_write(what: Io) -> bool {
    matches!(what, Io::Write { .. })
}

#[test]
fn data_is_synced_before_the_log_is_written_and_the_log_before_the_flush_is_done() {
    let mut bench = by_hand(1024);
    let (_, out) = bench.begin(Request::Write(range(0, 1)));
    bench.complete_all(out);
    let (flush, out) = bench.begin(Request::Flush);
    let [(io, File::Data, Io::Sync)] = ios(&out)[..] else { panic!("{out:?}") };
    let out = bench.complete(io, Ok(()));
    let [(io, File::Log(log), what)] = ios(&out)[..] else { panic!("{out:?}") };
    assert!(is_write(what));
    let out = bench.complete(io, Ok(()));
    let [(io, File::Log(synced), Io::Sync)] = ios(&out)[..] else { panic!("{out:?}") };
    assert_eq!(log, synced);
    let out = bench.complete(io, Ok(()));
    assert!(matches!(out[..], [Action::Done { operation, result: Ok(()) }] if operation == flush), "{out:?}");
}

#[test]
fn an_overwrite_needs_no_log_and_a_flush_without_writes_no_disk() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1]);
    bench.simple(volume(1), Request::Flush);
    let (_, out) = bench.begin(Request::Write(range(0, 1)));
    assert_eq!(bench.complete_all(out).len(), 1);
    let (_, out) = bench.begin(Request::Flush);
    let [(io, File::Data, Io::Sync)] = ios(&out)[..] else { panic!("{out:?}") };
    assert!(matches!(bench.complete(io, Ok(()))[..], [Action::Done { result: Ok(()), .. }]));
    let (_, out) = bench.begin(Request::Flush);
    assert!(matches!(out[..], [Action::Done { result: Ok(()), .. }]), "{out:?}");
}

#[test]
fn flushes_that_come_during_a_commit_share_the_next_one() {
    let mut bench = by_hand(1024);
    let (_, out) = bench.begin(Request::Write(range(0, 1)));
    bench.complete_all(out);
    let (first, out) = bench.begin(Request::Flush);
    let [(io, ..)] = ios(&out)[..] else { panic!("{out:?}") };
    let (_, more) = bench.begin(Request::Write(range(5, 1)));
    bench.complete_all(more);
    let (second, more) = bench.begin(Request::Flush);
    let (third, again) = bench.begin(Request::Flush);
    assert!(more.is_empty() && again.is_empty());
    let out = bench.complete(io, Ok(()));
    assert_eq!(bench.complete_all(out), [first, second, third]);
}

#[test]
fn a_seal_waits_for_writes_in_place_and_for_those_below_it() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1, 1]);
    let (_, out) = bench.begin(Request::Write(range(0, 1)));
    let [(write, ..)] = ios(&out)[..] else { panic!("{out:?}") };
    // In flight as well, and not in place: it goes to the new top, and nobody waits for it.
    let (_, out) = bench.begin(Request::Write(range(9, 1)));
    let [(fresh, ..)] = ios(&out)[..] else { panic!("{out:?}") };
    let (one, out) = bench.seal(1);
    assert_eq!(bench.complete_all(out), []);
    let (two, out) = bench.seal(2);
    assert_eq!(bench.complete_all(out), []);
    assert_eq!(bench.store().snapshots(), []);
    let clone = Control::Clone { snapshot: snapshot(2), volume: volume(2), size: size(1024), verify_reads: false };
    assert_eq!(bench.control(clone), Err(ControlError::Busy));
    let out = bench.complete(write, Ok(()));
    let ended = bench.complete_all(out);
    assert!(ended.contains(&one) && ended.contains(&two), "{ended:?}");
    assert_eq!(bench.store().snapshots().len(), 2);
    assert!(bench.store().snapshots().iter().all(|info| info.allocated_blocks != 3));
    let out = bench.complete(fresh, Ok(()));
    bench.complete_all(out);
    assert_eq!(bench.store().volumes()[0].allocated_blocks, 1);
}

#[test]
fn a_failed_write_leaves_nothing_behind_and_no_space_is_said_before_the_first_byte() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1]);
    let used = bench.store().allocator.owned_blocks();
    let (_, out) = bench.begin(Request::Write(range(0, 3)));
    let [(one, ..), (two, ..)] = ios(&out)[..] else { panic!("{out:?}") };
    assert!(bench.complete(one, Err(DiskError::NoSpace)).is_empty(), "it waits for its other half");
    let out = bench.complete(two, Ok(()));
    assert!(matches!(out[..], [Action::Done { result: Err(DiskError::NoSpace), .. }]), "{out:?}");
    assert_eq!(bench.store().allocator.owned_blocks(), used);
    assert_eq!(bench.store().volumes()[0].allocated_blocks, 1);
    let owned = std::iter::once((map::PhysicalBlock(0), 1));
    bench.store().allocator = Allocator::from_owned(owned, 1, 2).expect("one block is free");
    let (_, out) = bench.begin(Request::Write(range(0, 3)));
    assert!(matches!(out[..], [Action::Done { result: Err(DiskError::NoSpace), .. }]), "{out:?}");
}

#[test]
fn after_a_failed_fdatasync_nothing_is_flushed_until_the_tree_is_opened_again() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1]);
    let (_, out) = bench.begin(Request::Flush);
    let [(io, ..)] = ios(&out)[..] else { panic!("{out:?}") };
    let out = bench.complete(io, Err(DiskError::Failed));
    assert!(matches!(out[..], [Action::Done { result: Err(DiskError::Failed), .. }]), "{out:?}");
    assert_eq!(bench.store().failure(), Some(Failure::DataSync));
    let (_, out) = bench.begin(Request::Flush);
    assert!(matches!(out[..], [Action::Done { result: Err(DiskError::Failed), .. }]), "{out:?}");
    let resize = Control::Resize { volume: volume(1), size: size(2048) };
    assert_eq!(bench.control(resize), Err(ControlError::Disk(DiskError::Failed)));
    bench.kill();
    assert_eq!(bench.store().failure(), None);
    bench.simple(volume(1), Request::Flush);
    // What the next process is told does not say that nothing is gone.
    assert_eq!((bench.store().sync_failures(), bench.store().has_unheard_failure()), (1, true));
    bench.store().failure_heard();
    bench.kill();
    assert_eq!((bench.store().sync_failures(), bench.store().has_unheard_failure()), (1, false));
    bench.lose_pending();
    assert_eq!(bench.store().sync_failures(), 0);
}

#[test]
fn control_operations_are_idempotent_and_refuse_what_contradicts_them() {
    let mut bench = by_hand(1024);
    let create = Control::CreateVolume { volume: volume(1), size: size(1024), verify_reads: false };
    assert_eq!(bench.control(create), Ok(()));
    let seal = Control::Seal { volume: volume(1), snapshot: snapshot(1), created_ms: 7 };
    assert_eq!((bench.control(seal), bench.control(seal)), (Ok(()), Ok(())));
    assert_eq!(bench.store().snapshots().len(), 1);
    let unknown = Control::Seal { volume: volume(9), snapshot: snapshot(9), created_ms: 7 };
    assert_eq!(bench.control(unknown), Err(ControlError::UnknownVolume(volume(9))));
    let small = Control::Clone { snapshot: snapshot(1), volume: volume(2), size: size(512), verify_reads: false };
    assert_eq!(bench.control(small), Err(ControlError::SizeSmaller(4 << 20)));
    let clone = Control::Clone { snapshot: snapshot(1), volume: volume(2), size: size(1024), verify_reads: false };
    assert_eq!((bench.control(clone), bench.control(clone)), (Ok(()), Ok(())));
    let resize = |blocks| Control::Resize { volume: volume(1), size: size(blocks) };
    assert_eq!((bench.control(resize(2048)), bench.control(resize(2048))), (Ok(()), Ok(())));
    assert_eq!(bench.control(resize(1024)), Err(ControlError::SizeSmaller(8 << 20)));
    for _ in 0..2 {
        assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(1))), Ok(()));
        assert_eq!(bench.control(Control::DeleteVolume(volume(1))), Ok(()));
    }
    bench.idle();
    assert_eq!(bench.store().volumes().len(), 1);
}

#[test]
fn a_volume_has_a_limit_of_snapshots() {
    let mut bench = by_hand(256);
    let id = |number: u16| SnapshotId::from_bytes(std::array::from_fn(|at| (number >> (at % 2 * 8)) as u8));
    let seal = |number| Control::Seal { volume: volume(1), snapshot: id(number), created_ms: 0 };
    for number in 0..MAX_SNAPSHOTS as u16 {
        assert_eq!(bench.control(seal(number)), Ok(()));
    }
    assert_eq!(bench.control(seal(9999)), Err(ControlError::TooManySnapshots(volume(1))));
    bench.write(volume(1), 3, &[5]);
    bench.kill();
    assert_eq!(bench.read(volume(1), 2, 3), [0, 5, 0]);
    for number in 0..MAX_SNAPSHOTS as u16 {
        assert_eq!(bench.control(Control::DeleteSnapshot(id(number))), Ok(()));
    }
    bench.idle();
    assert_eq!(bench.store().volumes()[0].layers, 1);
    assert_eq!(bench.read(volume(1), 2, 3), [0, 5, 0]);
}

#[test]
fn a_long_discard_goes_on_in_steps_and_frees_its_blocks() {
    let mut bench = by_hand(4096);
    for block in (0..1000).step_by(2) {
        bench.write(volume(1), block, &[1]);
    }
    bench.simple(volume(1), Request::Flush);
    assert_eq!(bench.store().volumes()[0].allocated_blocks, 500);
    let (_, out) = bench.begin(Request::Discard(range(0, 4096)));
    assert!(out.is_empty(), "not in one step: {out:?}");
    assert_eq!(bench.ticks(&mut Memory::zeros(4096).expect("memory")), Some(Ok(())));
    assert_eq!(bench.store().volumes()[0].allocated_blocks, 0);
    bench.idle();
    assert_eq!(bench.store().allocator.owned_blocks() + bench.store().allocator.retired_blocks(), 0);
    assert_eq!(bench.read(volume(1), 0, 4), [0; 4]);
}

#[test]
fn many_changes_between_two_flushes_commit_themselves_and_checkpoints_follow() {
    let mut bench = by_hand(65536);
    // Every second block, from the end: no two of them are neighbours in the map.
    for block in (0..15_000).rev() {
        bench.write(volume(1), 2 * block, &[(block % 251) as u8]);
    }
    bench.kill();
    bench.idle();
    for block in (0..15_000).step_by(997) {
        assert_eq!(bench.read(volume(1), 2 * block, 2), [(block % 251) as u8, 0]);
    }
}

#[test]
fn a_volume_in_use_is_not_deleted_and_a_read_past_its_end_fails() {
    let mut bench = by_hand(256);
    let (_, out) = bench.begin(Request::Write(range(0, 1)));
    assert_eq!(bench.control(Control::DeleteVolume(volume(1))), Err(ControlError::Busy));
    bench.complete_all(out);
    let (_, out) = bench.begin(Request::Read(range(250, 10)));
    assert!(matches!(out[..], [Action::Done { result: Err(DiskError::Failed), .. }]));
    assert_eq!(bench.control(Control::DeleteVolume(volume(1))), Ok(()));
}

#[test]
fn verified_reads_name_the_checksum_and_verify_finds_a_changed_bit() {
    let mut bench = by_hand(1024);
    let modify = Control::Modify { volume: volume(1), verify_reads: true };
    assert_eq!(bench.control(modify), Ok(()));
    bench.write(volume(1), 0, &[1, 2, 3]);
    let seal = Control::Seal { volume: volume(1), snapshot: snapshot(1), created_ms: 0 };
    assert_eq!(bench.control(seal), Ok(()));
    bench.idle();
    assert!(bench.store().snapshots()[0].checksummed);
    bench.write(volume(1), 1, &[9]);
    let (_, out) = bench.begin(Request::Read(range(0, 3)));
    let mut done = Vec::new();
    ios(&out).iter().for_each(|(io, ..)| done.extend(bench.complete(*io, Ok(()))));
    let checks = done.iter().filter(|action| matches!(action, Action::Check { offset: 0 | 8192, .. })).count();
    assert_eq!(checks, 2, "block 1 is in the newest layer, which has no checksums: {done:?}");
    let plan = bench.store().verify_plan(volume(1)).expect("a plan");
    let files = bench.files.clone();
    let verify = || verify::verify(&plan, &*files, &mut |_| std::ops::ControlFlow::Continue(())).expect("readable");
    assert_eq!((verify().blocks, verify().wrong), (3, 0));
    let mut block = Memory::zeros(4096).expect("memory");
    files.read_at(Name::Data, 4096, block.bytes_mut()).expect("readable");
    block.bytes_mut()[77] ^= 4;
    files.write_at(Name::Data, 4096, block.bytes()).expect("writable");
    let report = verify();
    assert_eq!((report.wrong, report.findings[0].block, report.findings[0].physical), (1, 1, 1));
}

/// What was not loaded of a layer's checksums when it was merged into one that was is loaded then.
#[test]
fn verified_reads_check_what_a_merge_brought() {
    let mut bench = by_hand(4096);
    let seal = |number| Control::Seal { volume: volume(1), snapshot: snapshot(number), created_ms: 0 };
    bench.write(volume(1), 0, &[1; 3]);
    assert_eq!(bench.control(seal(1)), Ok(()));
    // What the two layers own is far apart, so the checksums are in two blocks of their file.
    let other = Control::CreateVolume { volume: volume(2), size: size(4096), verify_reads: false };
    assert_eq!(bench.control(other), Ok(()));
    (0..8).for_each(|part| bench.write(volume(2), part * 200, &[7; 200]));
    bench.write(volume(1), 2000, &[2; 3]);
    assert_eq!(bench.control(seal(2)), Ok(()));
    bench.idle();
    assert!(bench.store().snapshots().iter().all(|info| info.checksummed));
    assert_eq!(bench.control(Control::Modify { volume: volume(1), verify_reads: true }), Ok(()));
    let checked = |bench: &mut Bench, block| {
        let (_, out) = bench.begin(Request::Read(range(block, 1)));
        let mut done = Vec::new();
        ios(&out).iter().for_each(|(io, ..)| done.extend(bench.complete(*io, Ok(()))));
        done.iter().any(|action| matches!(action, Action::Check { .. }))
    };
    // Newest first: one step loads the upper snapshot, and not yet the lower one.
    while !checked(&mut bench, 2000) {
        bench.now += Duration::from_secs(1);
        let (mut out, now) = (Vec::new(), bench.now);
        bench.store().tick(now, &mut out);
        bench.run(out, &mut Memory::zeros(4096).expect("memory"));
    }
    assert!(!checked(&mut bench, 0), "then this test shows nothing");
    // In this moment it loses its name; the next step merges it, before it is loaded.
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(1))), Ok(()));
    bench.idle();
    assert_eq!(bench.store().volumes()[0].layers, 2, "merged");
    assert!(checked(&mut bench, 2000) && checked(&mut bench, 0));
}

#[test]
fn the_difference_of_two_snapshots_is_what_was_written_between_them() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 10, &[1, 1, 1, 1]);
    let seal = |number| Control::Seal { volume: volume(1), snapshot: snapshot(number), created_ms: 0 };
    assert_eq!(bench.control(seal(1)), Ok(()));
    bench.write(volume(1), 12, &[2]);
    bench.simple(volume(1), Request::Discard(range(13, 1)));
    assert_eq!(bench.control(seal(2)), Ok(()));
    assert_eq!(bench.control(seal(3)), Ok(()));
    bench.write(volume(1), 20, &[3]);
    let runs = |bench: &mut Bench, target, base: Option<u8>| {
        let plan = bench.store().extents(snapshot(target), base.map(snapshot)).expect("a plan");
        plan.map(|run| (run.start, run.count, run.is_zero)).collect::<Vec<_>>()
    };
    assert_eq!(runs(&mut bench, 3, None), [(10, 3, false)]);
    assert_eq!(runs(&mut bench, 3, Some(1)), [(12, 1, false), (13, 1, true)]);
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(2))), Ok(()));
    bench.idle();
    assert_eq!(runs(&mut bench, 3, Some(1)), [(12, 1, false), (13, 1, true)]);
    let backwards = bench.store().extents(snapshot(1), Some(snapshot(3))).expect("a plan");
    assert!(backwards.is_backwards() && !backwards.in_one_line());
    assert_eq!(backwards.map(|run| (run.start, run.count)).collect::<Vec<_>>(), [(12, 2)]);
}

#[test]
fn a_reader_keeps_a_deleted_snapshot_readable() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1, 2]);
    let seal = Control::Seal { volume: volume(1), snapshot: snapshot(1), created_ms: 0 };
    assert_eq!(bench.control(seal), Ok(()));
    let plan = bench.store().reader(snapshot(1)).expect("a plan");
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(1))), Ok(()));
    bench.write(volume(1), 0, &[8, 8]);
    for _ in 0..100 {
        bench.now += Duration::from_secs(1);
        let (mut out, now) = (Vec::new(), bench.now);
        bench.store().tick(now, &mut out);
        bench.run(out, &mut Memory::zeros(4096).expect("memory"));
    }
    assert_eq!(bench.store().volumes()[0].layers, 2, "held");
    let (map::Entry::Data(physical), 2) = plan.run(0, 1024) else { panic!("two blocks") };
    let mut block = Memory::zeros(8192).expect("memory");
    bench.files.read_at(Name::Data, u64::from(physical.0) * 4096, block.bytes_mut()).expect("readable");
    assert_eq!((block.bytes()[0], block.bytes()[4096]), (1, 2));
    drop(plan);
    bench.idle();
    assert_eq!(bench.store().volumes()[0].layers, 1);
}

#[test]
fn a_seal_that_is_durable_late_gets_its_checksums_all_the_same() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1, 2, 3]);
    let (seal, out) = bench.seal(1);
    // Ticks while the seal is under way look for work and find none.
    for _ in 0..3 {
        bench.now += Duration::from_secs(1);
        let (mut more, now) = (Vec::new(), bench.now);
        bench.store().tick(now, &mut more);
        bench.complete_all(more);
    }
    assert_eq!(bench.complete_all(out), [seal]);
    bench.idle();
    assert!(bench.store().snapshots()[0].checksummed);
}
