//! Snapshots that were taken elsewhere and are filled here.

use super::super::*;
use super::rules::by_hand;
use super::*;

/// A snapshot of volume 1 that was taken elsewhere, filled on a clone of another one or on nothing.
fn fill(bench: &mut Bench, number: u8, base: Option<u8>, write: impl FnOnce(&mut Bench, VolumeId)) {
    let filled = volume(100 + number);
    let (size, verify_reads) = (size(1024), false);
    let made = match base {
        Some(base) => Control::Clone { snapshot: snapshot(base), volume: filled, size, verify_reads },
        None => Control::CreateVolume { volume: filled, size, verify_reads },
    };
    assert_eq!(bench.control(made), Ok(()));
    write(bench, filled);
    let seal = Control::SealAs { filled, snapshot: snapshot(number), volume: volume(1), created_ms: 7 };
    assert_eq!(bench.control(seal), Ok(()));
    assert_eq!(bench.control(seal), Ok(()), "again");
}

#[test]
fn the_difference_of_two_branches_is_what_either_has_above_their_ancestor() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1, 1]);
    let seal = |number| Control::Seal { volume: volume(1), snapshot: snapshot(number), created_ms: 0 };
    assert_eq!(bench.control(seal(1)), Ok(()));
    bench.write(volume(1), 10, &[5]);
    assert_eq!(bench.control(seal(2)), Ok(()));
    fill(&mut bench, 3, Some(1), |bench, filled| {
        bench.write(filled, 20, &[6]);
        bench.simple(filled, Request::WriteZeroes(range(0, 1)));
    });
    fill(&mut bench, 4, None, |bench, filled| bench.write(filled, 30, &[8]));
    let runs = |bench: &mut Bench, target, base| {
        let plan = bench.store().extents(snapshot(target), Some(snapshot(base))).expect("a plan");
        let in_one_line = plan.in_one_line();
        (plan.map(|run| (run.start, run.count, run.is_zero)).collect::<Vec<_>>(), in_one_line)
    };
    assert_eq!(runs(&mut bench, 2, 1), (vec![(10, 1, false)], true));
    assert_eq!(runs(&mut bench, 3, 1), (vec![(0, 1, true), (20, 1, false)], true));
    assert_eq!(runs(&mut bench, 3, 2), (vec![(0, 1, true), (10, 1, false), (20, 1, false)], false));
    assert_eq!(runs(&mut bench, 2, 3), (vec![(0, 1, false), (10, 1, false), (20, 1, false)], false));
    assert_eq!(runs(&mut bench, 4, 2), (vec![(0, 2, false), (10, 1, false), (30, 1, false)], false));
    let most = |bench: &mut Bench, target, base| {
        bench.store().extents(snapshot(target), Some(snapshot(base))).expect("a plan").most_data_blocks()
    };
    assert_eq!(most(&mut bench, 2, 1), 1);
    assert_eq!((most(&mut bench, 3, 1), most(&mut bench, 3, 2)), (1, 2));
    assert_eq!(most(&mut bench, 2, 3), 3, "what the base alone has as zeros may be data here");
    assert_eq!((most(&mut bench, 4, 2), bench.store().reader(snapshot(2)).expect("a plan").most_data_blocks()), (4, 3));
    let counted = |bench: &mut Bench, target, base| {
        let plan = bench.store().reader(snapshot(target)).expect("a plan");
        let extents = bench.store().extents(snapshot(target), Some(snapshot(base))).expect("a plan");
        assert_eq!(extents.clone().data_blocks(&plan, 1024, || false), None);
        (extents.clone().data_blocks(&plan, 10, || true), extents.data_blocks(&plan, 1024, || true))
    };
    assert_eq!((counted(&mut bench, 3, 1), counted(&mut bench, 3, 2)), ((Some(0), Some(1)), (Some(0), Some(1))));
    assert_eq!((counted(&mut bench, 2, 3), counted(&mut bench, 4, 2)), ((Some(1), Some(2)), (Some(0), Some(1))));
    let mut apart = |target, base| {
        let mut maps = |number| bench.store().layer_maps(snapshot(number)).expect("maps");
        ExtentsPlan::apart(maps(target), maps(base)).map(|run| (run.start, run.count)).collect::<Vec<_>>()
    };
    assert_eq!(apart(4, 2), [(0, 2), (10, 1), (30, 1)]);
}

#[test]
fn a_filled_snapshot_is_one_of_its_volume_and_is_no_layer_below_it() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1, 1]);
    let seal = |number| Control::Seal { volume: volume(1), snapshot: snapshot(number), created_ms: 0 };
    assert_eq!(bench.control(seal(1)), Ok(()));
    let before = bench.store().promised_blocks();
    bench.store().expect_filling(volume(103), 2);
    fill(&mut bench, 3, Some(1), |bench, filled| {
        assert_eq!(bench.store().promised_blocks(), before + 2);
        bench.write(filled, 20, &[6, 6]);
    });
    assert_eq!(bench.store().promised_blocks(), before + 2);
    let found = bench.store().snapshots().into_iter().find(|info| info.snapshot == snapshot(3)).expect("there");
    assert_eq!((found.volume, found.size, found.created_ms), (volume(1), size(1024), 7));
    assert_eq!(bench.store().volumes().len(), 1, "what was filled is no volume any more");
    assert_eq!(bench.store().is_beside(snapshot(1), volume(1)), Some(false));
    assert_eq!(bench.store().is_beside(snapshot(3), volume(1)), Some(true));
    let taken = Control::SealAs { filled: volume(103), snapshot: snapshot(1), volume: volume(1), created_ms: 0 };
    assert_eq!(bench.control(taken), Err(ControlError::Exists), "what was sealed here is not it");
    bench.idle();
    assert!(bench.store().snapshots().iter().all(|info| info.checksummed));
    let plan = bench.store().verify_plan(volume(1)).expect("a plan");
    assert_eq!((plan.blocks(), plan.unchecked_blocks), (4, 0), "also what is beside the volume");
    // It holds its layers.
    drop(plan);
    // Its base goes first, then itself.
    for number in [1, 3] {
        assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(number))), Ok(()));
        bench.idle();
    }
    assert_eq!(bench.store().promised_blocks(), before - 2);
}

/// Of a base that is deleted meanwhile, its blocks slip into what is filled above it.
#[test]
fn what_merges_into_a_filling_is_promised_as_well() {
    let mut bench = by_hand(1024);
    bench.write(volume(1), 0, &[1; 200]);
    let seal = Control::Seal { volume: volume(1), snapshot: snapshot(1), created_ms: 0 };
    assert_eq!(bench.control(seal), Ok(()));
    bench.store().expect_filling(volume(103), 2);
    fill(&mut bench, 3, Some(1), |bench, filled| {
        for gone in [Control::DeleteSnapshot(snapshot(1)), Control::DeleteVolume(volume(1))] {
            assert_eq!(bench.control(gone), Ok(()));
        }
        bench.write(filled, 0, &[6]);
        bench.idle();
        assert_eq!((bench.store().volumes()[0].layers, bench.store().volumes()[0].allocated_blocks), (1, 200));
        bench.write(filled, 300, &[6]);
        let (promised, allocated) = (bench.store().promised_blocks(), bench.store().volumes()[0].allocated_blocks);
        assert!(allocated == 201 && (201..=202).contains(&promised), "{allocated} of {promised}");
    });
    assert_eq!(bench.store().promised_blocks(), 201);
}
