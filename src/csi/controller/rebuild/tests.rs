//! When a copy counts as lost, and what is done about it.

use super::super::settle::tests::{copy, members, mirrored};
use super::super::settle::{Settled, settle};
use super::*;
use crate::catalog::{Access, AccessMode, CopySpec, Publication};
use crate::protocol::Lacks;

const LIMIT: u32 = 600;

fn volume(copies: &[u8]) -> Volume {
    let mut volume = mirrored(copies);
    volume.spec.rebuild_after = RebuildAfter::Seconds(LIMIT);
    volume.spec.mirror.as_mut().expect("mirrored").primary = Some(copy(1));
    volume
}

fn nodes(bytes: &[u8]) -> BTreeSet<NodeName> {
    bytes.iter().map(|byte| NodeName(format!("n{byte}"))).collect()
}

/// The copy on n2 has left.
fn without_two() -> Configuration {
    let mut now = members(&[1]);
    now.candidates.insert(copy(2), Lacks::Since(now.stamp));
    now
}

fn around(silent: &[u8], replacing: usize) -> Around {
    Around { silent: nodes(silent), lap: Duration::ZERO, replacing }
}

fn serving(filled: &[u8]) -> Primary {
    Primary { filled: filled.iter().map(|byte| copy(*byte)).collect() }
}

#[test]
fn a_copy_is_missed_when_it_is_no_member_or_shall_lead_and_is_silent() {
    let volume = volume(&[1, 2]);
    let is = |now: &Configuration, silent: &[u8]| missed(&volume, now, &nodes(silent), None);
    assert_eq!(is(&members(&[1, 2]), &[]), BTreeSet::new());
    assert_eq!(is(&members(&[1, 2]), &[2]), BTreeSet::new(), "its primary says that it follows");
    assert_eq!(is(&without_two(), &[]), BTreeSet::from([copy(2)]), "its disk may be gone");
    assert_eq!(is(&members(&[1, 2]), &[1]), BTreeSet::from([copy(1)]), "nobody else can drop it");
    assert_eq!(is(&members(&[2, 1]), &[1]), BTreeSet::new(), "the other one is primary, and drops it");
    // The wish has left it, and nothing is counted anew before it is dropped.
    assert_eq!(missed(&volume, &members(&[2, 1]), &nodes(&[1]), Some(copy(1))), BTreeSet::from([copy(1)]));
    assert_eq!(missed(&volume, &members(&[2, 1]), &nodes(&[]), Some(copy(1))), BTreeSet::new());
}

#[test]
fn only_the_time_that_is_seen_counts_and_a_new_controller_goes_on_from_what_is_written() {
    let (mut volume, gone) = (volume(&[1, 2]), BTreeSet::from([copy(2)]));
    let mut counted = BTreeMap::new();
    let second = Duration::from_secs(1);
    let mut writes = 0;
    for _ in 0..100 {
        writes += usize::from(count(&mut volume, &gone, second, &mut counted));
    }
    assert_eq!((volume.status.missed[&copy(2)].seconds, writes), (100, 10));
    assert_eq!(due(&volume), None);
    // Another process remembers nothing, and loses less than a sixtieth.
    count(&mut volume, &gone, second * 5, &mut counted);
    let mut counted = BTreeMap::new();
    assert!(!count(&mut volume, &gone, Duration::ZERO, &mut counted), "the time between the two is nobody's");
    for _ in 0..499 {
        count(&mut volume, &gone, second, &mut counted);
    }
    assert_eq!((due(&volume), volume.status.missed[&copy(2)].seconds), (None, 590));
    count(&mut volume, &gone, second, &mut counted);
    assert_eq!(due(&volume), Some(copy(2)));
    assert!(!count(&mut volume, &gone, second * 1000, &mut counted), "it is late enough");
    // It is back for a moment: all of it begins anew.
    assert!(count(&mut volume, &BTreeSet::new(), second, &mut counted));
    assert!(volume.status.missed.is_empty() && due(&volume).is_none());
    volume.spec.rebuild_after = RebuildAfter::Never;
    assert!(!count(&mut volume, &gone, second * 1000, &mut counted) && due(&volume).is_none());
}

#[test]
fn a_lap_is_bounded_and_begins_anew_after_a_look_that_saw_too_little() {
    let (mut memory, now) = (Memory::default(), Instant::now());
    assert_eq!(memory.lap(now), Duration::ZERO);
    assert_eq!(memory.lap(now + Duration::from_secs(3)), Duration::from_secs(3));
    assert_eq!(memory.lap(now + Duration::from_secs(3000)), LONGEST_LAP);
    memory.last = None;
    assert_eq!(memory.lap(now + Duration::from_secs(4000)), Duration::ZERO);
}

#[test]
fn another_node_gets_a_copy_only_where_it_can_be_filled_and_few_at_once() {
    let (volume, now) = (volume(&[1, 2]), without_two());
    let taken = |primary: Option<&Primary>, replacing| step(&volume, copy(2), &now, primary, &around(&[2], replacing));
    assert_eq!(taken(Some(&serving(&[])), 0), Ok(Step::Replace));
    assert_eq!(taken(Some(&serving(&[2])), 0), Ok(Step::Nothing), "it is back and being filled");
    assert!(taken(None, 0).expect_err("nobody would fill it").contains("no primary that serves"));
    assert!(taken(Some(&serving(&[])), MAX_REBUILDS).expect_err("a storm").contains("other volumes"));
    let mut moves = volume.clone();
    let mirror = moves.spec.mirror.as_mut().expect("mirrored");
    mirror.copies.insert(copy(3), CopySpec { node: NodeName("n3".into()), pool: "default".into() });
    mirror.leaving.insert(copy(1));
    let waits = step(&moves, copy(2), &now, Some(&serving(&[3])), &around(&[2], 1)).expect_err("a person moves one");
    assert!(waits.contains("being replaced"), "{waits}");
}

#[test]
fn the_wish_leaves_a_silent_primary_only_while_nobody_uses_the_volume() {
    let (mut volume, now) = (volume(&[1, 2, 3]), members(&[1, 2, 3]));
    let taken = |volume: &Volume, silent: &[u8]| step(volume, copy(1), &now, None, &around(silent, 0));
    assert_eq!(taken(&volume, &[1]), Ok(Step::Wish(copy(2))));
    assert_eq!(taken(&volume, &[1, 2]), Ok(Step::Wish(copy(3))));
    assert!(taken(&volume, &[1, 2, 3]).is_err());
    let mut moved = volume.clone();
    moved.spec.mirror.as_mut().expect("mirrored").primary = Some(copy(2));
    assert_eq!(taken(&moved, &[1]), Ok(Step::Nothing), "it is about to be dropped");
    let how = Publication { readonly: false, access: Access::Block, mode: AccessMode::SingleNodeWriter };
    volume.spec.publications.insert(NodeName("n1".into()), how);
    assert!(taken(&volume, &[1]).expect_err("it may be in use").contains("published to n1"));
}

/// As the controller writes it when n2 is lost and n3 gets a copy.
fn rebuilding() -> Volume {
    let mut volume = volume(&[1, 2]);
    let mirror = volume.spec.mirror.as_mut().expect("mirrored");
    mirror.copies.insert(copy(3), CopySpec { node: NodeName("n3".into()), pool: "default".into() });
    mirror.leaving.insert(copy(2));
    mirror.rebuild = Some(Rebuild { lost: copy(2), new: copy(3) });
    volume
}

fn wanted(volume: &Volume) -> Vec<InstanceId> {
    volume.spec.mirror.as_ref().expect("mirrored").copies.keys().copied().collect()
}

#[test]
fn the_first_of_the_lost_copy_and_the_new_one_that_has_everything_stays() {
    let mut volume = rebuilding();
    assert_eq!(settle(&mut volume, Some(&without_two())), Settled::default(), "neither has");
    let mut back = rebuilding();
    assert!(settle(&mut back, Some(&members(&[1, 2]))).changed);
    let mirror = back.spec.mirror.clone().expect("mirrored");
    assert_eq!((wanted(&back), mirror.leaving, mirror.rebuild), (vec![copy(1), copy(2)], BTreeSet::new(), None));
    let mut filled = rebuilding();
    assert!(settle(&mut filled, Some(&members(&[1, 3]))).changed);
    assert_eq!((wanted(&filled), filled.spec.mirror.expect("mirrored").rebuild), (vec![copy(1), copy(3)], None));
    let mut both = rebuilding();
    assert!(settle(&mut both, Some(&members(&[1, 2, 3]))).changed);
    assert_eq!(wanted(&both), [copy(1), copy(3)], "as many as were asked for");
    // What a person moves is not taken back because the old copy has everything, which it has from the beginning.
    let mut moves = rebuilding();
    moves.spec.mirror.as_mut().expect("mirrored").rebuild = None;
    assert!(!settle(&mut moves, Some(&members(&[1, 2]))).changed);
}

#[test]
fn a_new_copy_that_is_lost_as_well_goes() {
    let mut volume = rebuilding();
    for byte in [2, 3] {
        volume.status.missed.insert(copy(byte), Missed { seconds: LIMIT.into(), waits: None });
    }
    assert_eq!(due(&volume), Some(copy(3)), "the other one is leaving");
    let taken = step(&volume, copy(3), &without_two(), Some(&serving(&[])), &around(&[2, 3], 1));
    assert_eq!(taken, Ok(Step::Withdraw));
}

#[test]
fn what_is_being_filled_is_counted_from_when_that_stops() {
    let (mut volume, mut counted, lap) = (volume(&[1, 2]), BTreeMap::new(), Duration::from_secs(3));
    let look = |volume: &mut Volume, counted: &mut BTreeMap<_, _>, filled: &[u8]| {
        let mut seen = missed(volume, &without_two(), &nodes(&[]), None);
        leave_out_filled(&mut seen, Some(&serving(filled)));
        count(volume, &seen, lap, counted);
        due(volume)
    };
    let looks = u64::from(LIMIT) / lap.as_secs();
    for _ in 1..looks {
        assert_eq!(look(&mut volume, &mut counted, &[]), None);
    }
    // It is back, and its filling takes longer than the limit.
    for _ in 0..2 * looks {
        assert_eq!(look(&mut volume, &mut counted, &[2]), None);
    }
    assert!(volume.status.missed.is_empty());
    for _ in 1..looks {
        assert_eq!(look(&mut volume, &mut counted, &[]), None, "its filling rests");
    }
    assert_eq!(look(&mut volume, &mut counted, &[]), Some(copy(2)));
}

/// As a person moves the copy on n2 to n3.
fn moving() -> Volume {
    let mut volume = rebuilding();
    volume.spec.mirror.as_mut().expect("mirrored").rebuild = None;
    volume
}

/// A move to a node that died stayed for ever, and nothing was made anew beside it.
#[test]
fn a_copy_that_was_moved_to_a_node_that_is_lost_goes() {
    let (volume, both) = (moving(), members(&[1, 2]));
    assert_eq!(missed(&volume, &both, &nodes(&[3]), None), BTreeSet::from([copy(3)]));
    let taken = |now: &Configuration, lost, filled: &[u8]| {
        step(&volume, copy(lost), now, Some(&serving(filled)), &around(&[3], MAX_REBUILDS))
    };
    assert_eq!(taken(&both, 3, &[]), Ok(Step::Withdraw));
    assert_eq!(taken(&both, 3, &[3]), Ok(Step::Nothing), "it is being filled");
    assert_eq!(taken(&without_two(), 3, &[]), Ok(Step::Withdraw), "also if the old one is lost");
    // A third copy is lost while the new one is being filled: that one is in its place soon.
    let mut three = moving();
    let spec = CopySpec { node: NodeName("n4".into()), pool: "default".into() };
    three.spec.mirror.as_mut().expect("mirrored").copies.insert(copy(4), spec);
    let taken = |filled: &[u8]| step(&three, copy(4), &both, Some(&serving(filled)), &around(&[4], 1));
    assert!(taken(&[3]).expect_err("it is waited for").contains("being replaced"));
    assert_eq!(taken(&[]), Ok(Step::Withdraw));
}
