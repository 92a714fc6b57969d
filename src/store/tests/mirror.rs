//! A mirrored volume: its record, its marks, and what copies lack.

use super::*;
use crate::protocol::{
    BlockSet, COMPARED_BLOCKS, Configuration, ConfigurationVersion, EXTENT_BLOCKS, Extent, Generation, Lacks,
    MAX_MARKS, Missing, Piece, Record, Stamp, Suspects,
};
use crate::volume::BootId;

pub(super) fn stamp(version: u64) -> Stamp {
    Stamp { generation: Generation(1), version: ConfigurationVersion(version) }
}

fn copy(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

/// This copy is primary; the candidates left with those versions.
pub(super) fn record(version: u64, candidates: &[(u8, u64)]) -> Record {
    let mut configuration = Configuration::first(Generation(1), copy(1), Default::default());
    configuration.stamp = stamp(version);
    let since = |(number, since): &(u8, u64)| (copy(*number), Lacks::Since(stamp(*since)));
    configuration.candidates = candidates.iter().map(since).collect();
    Record { configuration, intact: true }
}

pub(super) fn boot() -> BootId {
    BootId::from_bytes([9; 16])
}

impl Bench {
    pub(super) fn persist_with(&mut self, id: VolumeId, record: Record, reserve: Reserve) -> Result<(), ControlError> {
        self.next += 1;
        let (mut out, operation) = (Vec::new(), OperationId(self.next));
        self.store().persist(operation, id, record, boot(), reserve, &mut out);
        self.run(out, &mut Memory::zeros(4096).expect("memory")).expect("it ends")
    }

    pub(super) fn persist(&mut self, id: VolumeId, version: u64, candidates: &[(u8, u64)]) {
        assert_eq!(self.persist_with(id, record(version, candidates), Reserve::Promised), Ok(()));
        assert_eq!(
            self.store().mirrored(id).map(|mirrored| mirrored.record.clone()),
            Some(record(version, candidates))
        );
    }

    pub(super) fn mark(&mut self, id: VolumeId, extents: &[Extent]) -> Result<(), ControlError> {
        self.next += 1;
        let (mut out, operation) = (Vec::new(), OperationId(self.next));
        self.store().write_hot(operation, id, extents, &mut out);
        self.run(out, &mut Memory::zeros(4096).expect("memory")).expect("it ends")
    }

    pub(super) fn plan(&mut self, id: VolumeId, lacks: Option<Lacks>, hot: &[Extent]) -> Vec<Missing> {
        self.plan_of(id, lacks, &marked(hot))
    }

    pub(super) fn plan_of(&mut self, id: VolumeId, lacks: Option<Lacks>, suspects: &Suspects) -> Vec<Missing> {
        self.store().plan(id, lacks, suspects).expect("a plan");
        std::iter::from_fn(|| self.store().next_missing(id).expect("the disk is sound")).collect()
    }
}

pub(super) fn marked(extents: &[Extent]) -> Suspects {
    Suspects::Marked(extents.into())
}

/// A mirrored volume of eight extents and a few blocks more.
pub(super) fn mirrored() -> (Bench, VolumeId) {
    let (mut bench, id) = (Bench::new(), volume(1));
    let create = Control::CreateVolume { volume: id, size: size(8 * EXTENT_BLOCKS + 10), verify_reads: false };
    assert_eq!(bench.control(create), Ok(()));
    assert_eq!(bench.store().mirrored(id), None);
    bench.persist(id, 1, &[]);
    (bench, id)
}

/// Known blocks, in runs from `start` on.
pub(super) fn known(start: u64, runs: &[(u32, u32)]) -> Missing {
    let (mut blocks, mut end) = (BlockSet::default(), 0);
    for (first, count) in runs {
        blocks.insert(*first, *count);
        end = first + count;
    }
    Missing::Known(Piece::new(range(start, end), blocks).expect("a block"))
}

/// The parts in which so many blocks are compared.
pub(super) fn compared(start: u64, count: u64) -> Vec<Missing> {
    let part = u64::from(COMPARED_BLOCKS);
    let parts = (0..count.div_ceil(part)).map(|at| (at * part, part.min(count - at * part)));
    parts.map(|(at, count)| Missing::Suspected(range(start + at, count as u32))).collect()
}

pub(super) const SINCE_TWO: Option<Lacks> =
    Some(Lacks::Since(Stamp { generation: Generation(1), version: ConfigurationVersion(2) }));

#[test]
fn a_base_goes_when_no_record_names_it() {
    let (mut bench, id) = mirrored();
    for version in 2..6 {
        bench.write(id, version, &[1]);
        bench.persist(id, version, &[(2, version)]);
        assert_eq!(bench.store().tree.bases.len(), 1, "the base before has no name any more");
    }
    bench.write(id, 2, &[2]);
    bench.persist(id, 6, &[(2, 5)]);
    assert_eq!(bench.plan(id, Some(Lacks::Since(stamp(5))), &[]), [known(2, &[(0, 1)])]);
    bench.idle();
    assert_eq!(bench.store().volumes()[0].layers, 2, "the others are merged");
    bench.persist(id, 7, &[]);
    bench.idle();
    assert_eq!((bench.store().tree.bases.len(), bench.store().volumes()[0].layers), (0, 1));
    assert_eq!(bench.read(id, 2, 4), [2, 1, 1, 1]);
}

/// The checksums of the snapshot above it are the only ones that know what was written.
#[test]
fn a_base_without_data_leaves_the_checksums_above_it() {
    let (mut bench, id) = mirrored();
    bench.persist(id, 2, &[(2, 2)]);
    bench.write(id, 0, &[1, 2, 3]);
    assert_eq!(bench.control(Control::Seal { volume: id, snapshot: snapshot(1), created_ms: 5 }), Ok(()));
    bench.idle();
    assert!(bench.store().snapshots()[0].checksummed);
    let mut block = Memory::zeros(4096).expect("memory");
    bench.files.read_at(Name::Data, 4096, block.bytes_mut()).expect("readable");
    block.bytes_mut()[77] ^= 4;
    bench.files.write_at(Name::Data, 4096, block.bytes()).expect("writable");
    bench.persist(id, 3, &[]);
    bench.idle();
    assert_eq!((bench.store().tree.bases.len(), bench.store().volumes()[0].layers), (0, 2));
    let (plan, files) = (bench.store().verify_plan(id).expect("a plan"), bench.files.clone());
    let report = verify::verify(&plan, &*files, &mut |_| std::ops::ControlFlow::Continue(())).expect("readable");
    assert_eq!((report.blocks, report.wrong), (3, 1));
}

/// The base has no checksums: the snapshot's were made anew when it was merged, from what had rotted meanwhile.
#[test]
fn what_has_rotted_in_a_snapshot_is_found_after_a_base_was_merged_into_it() {
    for in_parts in [false, true] {
        let (mut bench, id) = mirrored();
        // A merge takes a few extents at a time.
        let below = if in_parts { 30 } else { 1 };
        (0..below).for_each(|block| bench.write(id, 5 + 2 * block, &[1]));
        bench.persist(id, 2, &[(2, 2)]);
        bench.write(id, 100, &[2; 3]);
        assert_eq!(bench.control(Control::Seal { volume: id, snapshot: snapshot(1), created_ms: 5 }), Ok(()));
        bench.idle();
        assert!(bench.store().snapshots()[0].checksummed);
        let (files, mut block, mut offset) = (bench.files.clone(), Memory::zeros(4096).expect("memory"), 0);
        while block.bytes()[0] != 2 {
            files.read_at(Name::Data, offset, block.bytes_mut()).expect("readable");
            offset += BLOCK_SIZE;
        }
        block.bytes_mut()[77] ^= 4;
        files.write_at(Name::Data, offset - BLOCK_SIZE, block.bytes()).expect("writable");
        // The copy is back. A step at a time: it is a snapshot with checksums all the time.
        bench.persist(id, 3, &[]);
        while let Some(delay) = bench.store().next_tick() {
            bench.now += delay;
            let (mut out, now) = (Vec::new(), bench.now);
            bench.store().tick(now, &mut out);
            assert!(bench.store().snapshots()[0].checksummed);
            bench.run(out, &mut Memory::zeros(4096).expect("memory"));
        }
        assert_eq!(bench.store().volumes()[0].layers, 2, "the base is merged");
        bench.kill();
        let plan = bench.store().verify_plan(id).expect("a plan");
        let report = verify::verify(&plan, &*files, &mut |_| std::ops::ControlFlow::Continue(())).expect("readable");
        assert_eq!((report.blocks, report.wrong, plan.unchecked_blocks), (below + 3, 1, 0));
    }
}

#[test]
fn a_base_without_a_record_goes_when_the_tree_is_opened() {
    for kill in [true, false] {
        let (mut bench, id) = mirrored();
        let (mut actions, operation) = (Vec::new(), OperationId(99));
        bench.store().persist(operation, id, record(2, &[(2, 2)]), boot(), Reserve::Promised, &mut actions);
        // The seal is durable, and the record is never written.
        while let Some(action) = actions.pop() {
            let Action::Io { io, file, what } = action else { continue };
            if file != File::Mirror {
                let result = bench.execute(file, what, &mut Memory::zeros(4096).expect("memory"));
                bench.store().completed(io, result, &mut actions);
            }
        }
        assert_eq!(bench.store().tree.bases.len(), 1);
        if kill {
            bench.kill();
        } else {
            bench.lose_pending();
        }
        assert_eq!(bench.store().mirrored(id).map(|mirrored| mirrored.record.clone()), Some(record(1, &[])));
        bench.idle();
        assert_eq!((bench.store().tree.bases.len(), bench.store().volumes()[0].layers), (0, 1));
    }
}

#[test]
fn marks_outlive_the_process_and_have_a_bound() {
    let (mut bench, id) = mirrored();
    for number in 0..5 {
        let marks = [Extent(number), Extent(7), Extent(3)];
        assert_eq!(bench.mark(id, &marks), Ok(()));
        bench.lose_pending();
        let mut expected = marks.to_vec();
        expected.sort();
        expected.dedup();
        assert_eq!(bench.store().mirrored(id).map(|mirrored| mirrored.hot.to_vec()), Some(expected));
    }
    let many: Vec<Extent> = (0..=MAX_MARKS as u32).map(Extent).collect();
    assert_eq!(bench.mark(id, &many[1..]), Ok(()));
    assert_eq!(bench.mark(id, &many), Err(ControlError::Disk(DiskError::Failed)));
    assert_eq!(bench.mark(volume(2), &[]), Err(ControlError::Disk(DiskError::Failed)), "it is not mirrored");
}

/// Only the record was refused then: the tree went on, was told that all is well, and other copies were made equal to what is left.
#[test]
fn after_a_failed_fdatasync_of_marks_nothing_is_flushed_or_copied_until_the_tree_is_opened_again() {
    for error in [DiskError::Failed, DiskError::NoSpace] {
        let (mut bench, id) = mirrored();
        bench.write(id, 0, &[1]);
        bench.store().plan(id, None, &marked(&[Extent(0)])).expect("a plan");
        let (mut flush, mut out) = (Vec::new(), Vec::new());
        bench.store().start(OperationId(98), id, Request::Flush, &mut flush);
        let [Action::Io { io: data, file: File::Data, what: Io::Sync }] = flush[..] else { panic!("{flush:?}") };
        bench.store().write_hot(OperationId(99), id, &[Extent(3)], &mut out);
        let [Action::Io { io, file: File::Mirror, what: Io::Write { .. } }] = out[..] else { panic!("{out:?}") };
        out.clear();
        bench.store().completed(io, Ok(()), &mut out);
        let [Action::Io { io, file: File::Mirror, what: Io::Sync }] = out[..] else { panic!("{out:?}") };
        out.clear();
        bench.store().completed(io, Err(error), &mut out);
        // The one that is under way may be told that all is well.
        bench.store().completed(data, Ok(()), &mut out);
        let mut failed: Vec<_> = out
            .iter()
            .map(|action| match action {
                Action::Done { operation, result: Err(DiskError::Failed) } => operation.0,
                other => panic!("{other:?}"),
            })
            .collect();
        failed.sort_unstable();
        assert_eq!(failed, [98, 99]);
        assert_eq!((bench.store().failure(), bench.store().sync_failures()), (Some(Failure::DataSync), 1));
        assert_eq!(bench.store().next_missing(id), Err(DiskError::Failed));
        assert_eq!(bench.store().plan(id, None, &marked(&[])), Err(DiskError::Failed));
        let refused = bench.persist_with(id, record(2, &[]), Reserve::Promised);
        assert_eq!(refused, Err(ControlError::Disk(DiskError::Failed)));
        bench.kill();
        bench.persist(id, 2, &[]);
        assert_eq!(bench.plan(id, None, &[]), []);
    }
}

/// The disk may have lost its cache, and with it the record or the marks that it has just said to have: a copy that has lost marks
/// counts as intact.
#[test]
fn neither_record_nor_marks_are_durable_when_another_fdatasync_has_failed_meanwhile() {
    for marks in [false, true] {
        let (mut bench, id) = mirrored();
        bench.write(id, 0, &[1]);
        let (mut flush, mut out) = (Vec::new(), Vec::new());
        bench.store().start(OperationId(98), id, Request::Flush, &mut flush);
        let [Action::Io { io: data, file: File::Data, what: Io::Sync }] = flush[..] else { panic!("{flush:?}") };
        match marks {
            false => bench.store().persist(OperationId(99), id, record(2, &[]), boot(), Reserve::Promised, &mut out),
            true => bench.store().write_hot(OperationId(99), id, &[Extent(3)], &mut out),
        }
        let [Action::Io { io: written, file: File::Mirror, what: Io::Write { .. } }] = out[..] else {
            panic!("{out:?}")
        };
        out.clear();
        bench.store().completed(written, Ok(()), &mut out);
        let [Action::Io { io: synced, file: File::Mirror, what: Io::Sync }] = out[..] else { panic!("{out:?}") };
        out.clear();
        bench.store().completed(data, Err(DiskError::Failed), &mut out);
        bench.store().completed(synced, Ok(()), &mut out);
        let failed = out.iter().filter_map(|action| match action {
            Action::Done { operation, result: Err(DiskError::Failed) } => Some(operation.0),
            _ => None,
        });
        assert_eq!(failed.collect::<std::collections::BTreeSet<_>>(), [98, 99].into());
        let mirrored = bench.store().mirrored(id).expect("mirrored");
        assert_eq!((mirrored.record.clone(), mirrored.hot), (record(1, &[]), &[][..]));
        assert_eq!(bench.mark(id, &[Extent(3)]), Ok(()), "they are written after it");
    }
}

#[test]
fn a_file_of_version_1_is_written_anew_and_a_crash_meanwhile_harms_nothing() {
    let id = volume(1);
    for calls in 1.. {
        let disk = Arc::new(Disk::new(calls));
        let mut bench = Bench::over(disk.clone(), None);
        let create = Control::CreateVolume { volume: id, size: size(EXTENT_BLOCKS), verify_reads: false };
        assert_eq!(bench.control(create), Ok(()));
        bench.persist(id, 1, &[]);
        let hot: Vec<Extent> = (0..3000).map(|number| Extent(2 * number)).collect();
        for count in [10, 3000] {
            assert_eq!(bench.mark(id, &hot[..count]), Ok(()));
        }
        bench.store = None;
        let mut now = vec![0; disk.size(Name::Mirror).expect("it is there").expect("it is there") as usize];
        disk.read_at(Name::Mirror, 0, &mut now).expect("reads");
        let before = crate::store::mirror::older::aged(&now);
        disk.remove(Name::Mirror).expect("removes");
        disk.create(Name::Mirror).expect("makes");
        disk.write_at(Name::Mirror, 0, &before).expect("writes");
        disk.sync(Name::Mirror).expect("syncs");
        disk.sync_names().expect("syncs");
        disk.set_fuse(Some(calls as u32));
        let pending = || Pending::over(Memory::zeros(PENDING_BYTES).expect("memory"));
        let opened = Store::open(disk.clone(), pending()).is_ok();
        disk.set_fuse(None);
        disk.power_cut(&[]);
        bench.lose_pending();
        let found = bench.store().mirrored(id).expect("it is mirrored");
        assert!(found.hot == hot && *found.record == record(1, &[]), "after {calls} calls");
        bench.persist(id, 2, &[]);
        if opened {
            break;
        }
    }
}

#[test]
fn a_deleted_volume_leaves_its_bases_and_its_region() {
    let (mut bench, id) = mirrored();
    bench.persist(id, 2, &[(2, 2)]);
    let size_before = bench.files.size(Name::Mirror).expect("it is there");
    assert_eq!(bench.control(Control::DeleteVolume(id)), Ok(()));
    assert_eq!(bench.store().tree.bases.len(), 0);
    bench.idle();
    assert_eq!(bench.store().tree.layers.len(), 0);
    bench.lose_pending();
    let other = volume(2);
    let create = Control::CreateVolume { volume: other, size: size(256), verify_reads: false };
    assert_eq!(bench.control(create), Ok(()));
    assert_eq!(bench.store().mirrored(other), None);
    bench.persist(other, 8, &[]);
    assert_eq!(bench.files.size(Name::Mirror).expect("it is there"), size_before, "the region is used again");
    assert_eq!(bench.store().mirrored(other).map(|mirrored| mirrored.hot.len()), Some(0));
}

/// Each open spoilt the slot that nobody writes next, and after some nothing in the region was whole or never written.
#[test]
fn a_region_without_a_volume_outlives_any_number_of_opens() {
    for marks in [0, 1, 2] {
        let (mut bench, id) = mirrored();
        for mark in 0..marks {
            assert_eq!(bench.mark(id, &[Extent(mark)]), Ok(()));
        }
        bench.lose_pending();
        assert_eq!(bench.control(Control::DeleteVolume(id)), Ok(()));
        bench.idle();
        (0..3).for_each(|_| bench.lose_pending());
        let other = volume(2);
        let create = Control::CreateVolume { volume: other, size: size(256), verify_reads: false };
        assert_eq!(bench.control(create), Ok(()));
        bench.persist(other, 8, &[]);
        (0..3).for_each(|_| bench.lose_pending());
        assert_eq!(bench.store().mirrored(other).map(|mirrored| mirrored.hot.len()), Some(0));
    }
}

#[test]
fn a_damaged_region_is_named() {
    let (mut bench, id) = mirrored();
    bench.persist(id, 2, &[]);
    bench.store = None;
    let size = bench.files.size(Name::Mirror).expect("it is there").expect("it is there");
    bench.files.write_at(Name::Mirror, 0, &vec![0xaa; size as usize]).expect("writes");
    let pending = Pending::over(Memory::zeros(PENDING_BYTES).expect("memory"));
    let error = Store::open(bench.files.clone(), pending).err().expect("it is damaged");
    assert!(matches!(error, OpenError::Mirror(MirrorError::Region { region: 0, .. })), "{error}");
}

#[test]
fn a_checkpoint_keeps_bases() {
    let (mut bench, id) = mirrored();
    bench.persist(id, 2, &[(2, 2)]);
    let other: Arc<dyn Files> = Arc::new(Disk::new(1));
    Store::create(&*other, &superblock()).expect("a tree");
    let position = log::Position { epoch: 1, sequence: 0, chain: 0 };
    let tree = bench.store().tree.frozen();
    job::write_checkpoint(&*other, superblock().instance, position, &tree).expect("writes");
    let mut bytes = vec![0; bench.files.size(Name::Mirror).expect("it is there").expect("it is there") as usize];
    bench.files.read_at(Name::Mirror, 0, &mut bytes).expect("reads");
    other.write_at(Name::Mirror, 0, &bytes).expect("writes");
    bench.files = other;
    bench.lose_pending();
    assert_eq!(bench.store().tree.bases.len(), 1);
    assert_eq!(bench.plan(id, SINCE_TWO, &[]), []);
}

#[test]
fn a_copy_keeps_no_base_for_itself() {
    let (mut bench, id) = mirrored();
    let mut outdated = record(2, &[(1, 2)]);
    outdated.configuration.primary = None;
    assert_eq!(bench.persist_with(id, outdated, Reserve::Promised), Ok(()));
    assert_eq!(bench.store().tree.bases.len(), 0);
}

/// What a candidate is brought may read as zeros in it before: no layer above a base would show that, and the copy that left
/// may have something else there.
#[test]
fn what_a_candidate_saw_leave_lacks_the_whole_volume() {
    let (mut bench, id) = mirrored();
    let filled = |version: u64, left: &[(u8, u64)]| {
        let mut record = record(version, left);
        record.configuration.primary = Some(copy(3));
        record.configuration.candidates.insert(copy(1), Lacks::Everything);
        Record { intact: false, ..record }
    };
    for next in [filled(2, &[]), filled(3, &[(2, 3)])] {
        assert_eq!(bench.persist_with(id, next, Reserve::Promised), Ok(()));
    }
    bench.simple(id, Request::WriteZeroes(range(5, 1)));
    let whole = compared(0, 8 * EXTENT_BLOCKS + 10);
    assert_eq!(bench.plan(id, Some(Lacks::Since(stamp(3))), &[]), whole);
    // Later it is a member, and primary.
    bench.persist(id, 4, &[(2, 3), (3, 4)]);
    assert_eq!(bench.plan(id, Some(Lacks::Since(stamp(3))), &[]), whole);
    assert_eq!(bench.plan(id, Some(Lacks::Since(stamp(4))), &[]), []);
}
