//! The plan of what a copy lacks.

use super::mirror::{SINCE_TWO, boot, compared, known, marked, mirrored, record, stamp};
use super::*;
use crate::protocol::{EXTENT_BLOCKS, Extent, Lacks, Missing, Suspects};

#[test]
fn a_copy_lacks_what_was_written_since_it_left_and_what_was_hot_then() {
    let (mut bench, id) = mirrored();
    bench.write(id, 5, &[1; 30]);
    bench.simple(id, Request::Flush);
    assert_eq!(bench.mark(id, &[Extent(8), Extent(2)]), Ok(()));
    bench.persist(id, 2, &[(2, 2)]);
    bench.write(id, 100, &[2; 3]);
    assert_eq!(bench.mark(id, &[]), Ok(()));
    assert_eq!(bench.control(Control::Seal { volume: id, snapshot: snapshot(1), created_ms: 5 }), Ok(()));
    bench.write(id, 103, &[3]);
    bench.simple(id, Request::Discard(range(10, 2)));
    let first = [known(10, &[(0, 2), (90, 4)])];
    let hot = [compared(2 * EXTENT_BLOCKS, EXTENT_BLOCKS), compared(8 * EXTENT_BLOCKS, 10)];
    let all = [&first[..], &hot.concat()].concat();
    for _ in 0..2 {
        assert_eq!(bench.plan(id, SINCE_TWO, &[]), all);
        assert_eq!(bench.plan(id, None, &[Extent(8)]), compared(8 * EXTENT_BLOCKS, 10));
        let kept = bench.plan_of(id, SINCE_TWO, &Suspects::Unanswered([Extent(8)].into()));
        assert_eq!(kept, [&first[..], &hot[1]].concat(), "what was hot then is equal in a copy that kept its caches");
        let whole = bench.plan(id, Some(Lacks::Everything), &[]);
        assert_eq!(whole, compared(0, 8 * EXTENT_BLOCKS + 10), "it may hold what reads as zeros here");
        assert_eq!(bench.store().snapshots().len(), 1, "a base is nobody's snapshot");
        bench.kill();
        bench.idle();
    }
    bench.simple(id, Request::Flush);
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(1))), Ok(()));
    bench.idle();
    bench.lose_pending();
    let mirrored = bench.store().mirrored(id).map(|mirrored| (mirrored.boot, mirrored.hot.len()));
    assert_eq!(mirrored, Some((boot(), 0)));
    assert_eq!(bench.plan(id, SINCE_TWO, &[]), all, "merging and opening change nothing");
}

/// Each of them was a message of its own, and half a minute of a resync went by with waiting for answers.
#[test]
fn scattered_blocks_are_few_pieces() {
    let (mut bench, id) = mirrored();
    bench.persist(id, 2, &[(2, 2)]);
    for block in (0..600).step_by(6) {
        bench.write(id, block, &[1]);
    }
    let runs = |count: u32| (0..count).map(|run| (6 * run, 1)).collect::<Vec<_>>();
    let expected = [known(0, &runs(32)), known(192, &runs(32)), known(384, &runs(32)), known(576, &runs(4))];
    assert_eq!(bench.plan(id, SINCE_TWO, &[]), expected, "no piece has more runs");
    let hot = bench.plan(id, SINCE_TWO, &[Extent(0)]);
    assert_eq!(hot, compared(0, EXTENT_BLOCKS), "what is hot is compared, also where it was written since");
}

#[test]
fn a_new_plan_is_in_place_of_the_one_before() {
    let (mut bench, id) = mirrored();
    bench.store().plan(id, None, &marked(&[Extent(0)])).expect("a plan");
    assert_eq!(bench.store().next_missing(id), Ok(compared(0, 64).pop()));
    assert_eq!(bench.plan(id, None, &[]), []);
    assert_eq!(bench.store().next_missing(id), Ok(None));
    assert_eq!(bench.store().plan(volume(2), None, &marked(&[])), Err(DiskError::Failed), "it is not mirrored");
}

#[test]
fn who_left_unseen_or_without_a_reserve_lacks_the_whole_volume() {
    let (mut bench, id) = mirrored();
    let whole = 8 * EXTENT_BLOCKS + 10;
    let blocks = |plan: Vec<Missing>| plan.iter().map(|missing| u64::from(missing.range().count())).sum::<u64>();
    assert_eq!(bench.persist_with(id, record(2, &[(2, 2)]), Reserve::Refused), Ok(()));
    assert_eq!(blocks(bench.plan(id, SINCE_TWO, &[])), whole);
    bench.persist(id, 5, &[(2, 2), (3, 4), (4, 1)]);
    assert_eq!(blocks(bench.plan(id, SINCE_TWO, &[])), whole, "it stays unknown");
    assert_eq!(blocks(bench.plan(id, Some(Lacks::Since(stamp(4))), &[])), 0);
    assert_eq!(blocks(bench.plan(id, Some(Lacks::Since(stamp(1))), &[])), whole, "before the record that was there");
    assert_eq!(blocks(bench.plan(id, Some(Lacks::Since(stamp(3))), &[])), whole, "nobody left with it");
    // Another one that begins with a copy that is out.
    let other = volume(2);
    let create = Control::CreateVolume { volume: other, size: size(256), verify_reads: false };
    assert_eq!(bench.control(create), Ok(()));
    bench.persist(other, 2, &[(2, 2)]);
    assert_eq!(blocks(bench.plan(other, SINCE_TWO, &[])), 256);
}
