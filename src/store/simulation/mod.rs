//! Seeded simulation: the shipped store on a faulty disk, with crashes at any moment, against an oracle.
//!
//! `SEED=n cargo test --lib store::simulation::one_seed -- --nocapture` repeats a seed.

mod control;
mod coverage;
mod crash;
mod disk;
mod finish;
mod full;
mod images;
mod mirror;
mod oracle;
mod world;

use super::planted::Planted;
use coverage::Coverage;
pub use disk::{Disk, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::World;

/// Seeds of the test; one takes some milliseconds in a debug build.
const SEEDS: u64 = 10_000;

/// Seeds with a mirrored volume; one takes longer.
const MIRRORED_SEEDS: u64 = 500;

/// Seeds with a disk that becomes full; one takes some hundred milliseconds.
const FULL_SEEDS: u64 = 12;

/// Makes the world of a seed.
type Make = fn(u64, Option<Planted>) -> World;

/// Runs one seed.
fn run(make: Make, seed: u64, planted: Option<Planted>) -> Result<Coverage, String> {
    let caught = catch_unwind(AssertUnwindSafe(|| make(seed, planted).run()));
    caught.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default())
    })
}

#[test]
fn nothing_is_lost_in_ten_thousand_seeds() {
    let first = std::env::var("FIRST_SEED").ok().and_then(|first| first.parse().ok()).unwrap_or(0);
    let count = std::env::var("SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(SEEDS);
    let mut coverage = Coverage::default();
    for seed in first..first + count {
        match run(World::new, seed, None) {
            Ok(more) => coverage.add(&more),
            Err(error) => panic!("seed {seed}: {error}\nSEED={seed} cargo test --lib store::simulation::one_seed"),
        }
    }
    println!("{count} seeds: {coverage:?}");
    coverage.assert_all_seen(count);
}

#[test]
fn whatever_changed_since_a_copy_left_is_in_its_plan() {
    let first = std::env::var("FIRST_SEED").ok().and_then(|first| first.parse().ok()).unwrap_or(0);
    let count = std::env::var("SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(MIRRORED_SEEDS);
    let mut coverage = Coverage::default();
    for seed in first..first + count {
        match run(World::mirrored, seed, None) {
            Ok(more) => coverage.add(&more),
            Err(error) => panic!("seed {seed}: {error}\nMIRRORED=1 SEED={seed} cargo test --lib one_seed"),
        }
    }
    println!("{count} seeds: {coverage:?}");
    assert!(coverage.leaves > count && coverage.plans > count, "few copies left: {coverage:?}");
}

#[test]
fn a_full_disk_stops_nothing_while_merges_make_the_map_larger() {
    for seed in 0..FULL_SEEDS {
        if let Err(error) = run(World::full, seed, None) {
            panic!("seed {seed}: {error}\nFULL=1 SEED={seed} cargo test --lib one_seed");
        }
    }
}

#[test]
fn one_seed() {
    let Some(seed) = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) else { return };
    let full = std::env::var("FULL").is_ok();
    let make: Make = if full { World::full } else { World::new };
    let make: Make = if std::env::var("MIRRORED").is_ok() { World::mirrored } else { make };
    println!("{:?}", make(seed, None).run().expect("nothing is lost"));
}

/// Seeds until the bug is found.
fn caught(planted: Planted, within: u64) {
    caught_in(World::new, planted, within);
}

fn caught_in(make: Make, planted: Planted, within: u64) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..within).find_map(|seed| run(make, seed, Some(planted)).err().map(|error| (seed, error)));
    std::panic::set_hook(hook);
    match found {
        Some((seed, error)) => println!("{planted:?} is found by seed {seed}: {error}"),
        None => panic!("{planted:?} is not found by {within} seeds"),
    }
}

#[test]
fn a_flush_without_fdatasync_is_found() {
    caught(Planted::SkippedSync, 500);
}

#[test]
fn a_map_before_its_data_is_found() {
    caught(Planted::MapBeforeData, 500);
}

#[test]
fn a_merge_of_a_layer_with_two_children_is_found() {
    caught(Planted::MergeOfTwo, 500);
}

#[test]
fn a_merge_without_a_barrier_is_found() {
    caught(Planted::MergeWithoutBarrier, 2000);
}

#[test]
fn a_flush_that_misses_a_sealed_layer_is_found() {
    caught(Planted::MissedLayer, 500);
}

#[test]
fn blocks_used_again_too_early_are_found() {
    caught(Planted::ReuseBeforeDurable, 500);
}

#[test]
fn a_lost_pending_region_is_found() {
    caught(Planted::LostPending, 500);
}

#[test]
fn a_late_write_after_a_kill_is_found() {
    caught(Planted::NoDrain, 500);
}

#[test]
fn a_record_before_its_base_is_found() {
    caught_in(World::mirrored, Planted::RecordBeforeBase, 1000);
}

#[test]
fn a_base_that_goes_before_its_record_is_found() {
    caught_in(World::mirrored, Planted::BaseReleasedFirst, 1000);
}

#[test]
fn a_filled_snapshot_that_is_answered_too_early_is_found() {
    caught(Planted::FillAnsweredEarly, 500);
}

#[test]
fn a_difference_of_one_branch_alone_is_found() {
    caught(Planted::DifferenceOfOneBranch, 500);
}

#[test]
fn marks_written_in_place_are_found() {
    caught_in(World::mirrored, Planted::HotInPlace, 500);
}

#[test]
fn marks_that_are_forgotten_when_a_copy_leaves_are_found() {
    caught_in(World::mirrored, Planted::MarksForgotten, 500);
}

#[test]
fn too_little_space_for_the_next_checkpoints_is_found() {
    caught_in(World::full, Planted::SpaceForTheNextAlone, FULL_SEEDS);
}
