//! What lacks what, and where it comes from, follow from the objects alone.

use super::super::settle::tests::{copy, members, mirrored};
use super::*;
use crate::volume::VolumeSize;

fn id(byte: u8) -> SnapshotId {
    SnapshotId::from_bytes([byte; 16])
}

fn node(byte: u8) -> NodeName {
    NodeName(format!("n{byte}"))
}

/// Snapshot n, taken at n, on copies that are on the nodes of their number.
fn snapshot(number: u8, copies: &[u8]) -> Snapshot {
    let mut snapshot = Snapshot::wanted(id(number), VolumeId::from_bytes([9; 16]), Some(node(1)));
    let size = VolumeSize::try_from(64 << 20).expect("a size");
    snapshot.status = SnapshotStatus::Ready { size, created_ms: number.into() };
    snapshot.copies = copies.iter().map(|byte| (copy(*byte), node(*byte))).collect();
    snapshot
}

fn lack(number: u8, of: u8) -> Lack {
    Lack { created_ms: number.into(), snapshot: id(number), copy: copy(of), node: node(of) }
}

#[test]
fn copies_that_are_up_to_date_get_what_they_lack_the_oldest_first() {
    let (volume, now) = (mirrored(&[1, 2, 3]), members(&[1, 2, 3]));
    let all = [snapshot(2, &[1, 2]), snapshot(1, &[1]), snapshot(3, &[1, 2, 3])];
    assert_eq!(lacks(&volume, &now, &all), [lack(1, 2), lack(1, 3), lack(2, 3)]);
    assert_eq!(lacks(&volume, &members(&[1, 2]), &all), [lack(1, 2)], "a candidate is brought up to date first");
    let mut leaving = volume.clone();
    leaving.spec.mirror.as_mut().expect("mirrored").leaving.insert(copy(3));
    assert_eq!(lacks(&leaving, &now, &all), [lack(1, 2)]);
    let mut deleted = volume.clone();
    deleted.spec.deleted = true;
    assert_eq!(lacks(&deleted, &now, &all), []);
}

#[test]
fn what_nobody_shall_have_is_brought_over_to_nobody() {
    let (volume, now) = (mirrored(&[1, 2]), members(&[1, 2]));
    let deleted = Snapshot { deleted: true, ..snapshot(1, &[1]) };
    let hidden = Snapshot { made_for: Some(VolumeId::random()), ..snapshot(2, &[1]) };
    let creating = Snapshot { status: SnapshotStatus::Creating, ..snapshot(3, &[1]) };
    let single = snapshot(4, &[]);
    assert_eq!(lacks(&volume, &now, &[deleted, hidden, creating, single]), []);
}

#[test]
fn it_comes_from_whoever_shares_the_newest_older_one() {
    let all = [snapshot(1, &[1, 2, 3]), snapshot(2, &[2, 3]), snapshot(3, &[1, 2]), snapshot(4, &[1, 2, 3])];
    let from = |of: u8, base: Option<u8>| Source { node: node(of), base: base.map(id) };
    assert_eq!(sources(&lack(3, 3), &all), [from(2, Some(2)), from(1, Some(1))]);
    assert_eq!(sources(&lack(3, 4), &all), [from(1, None), from(2, None)], "it has nothing");
    assert_eq!(sources(&lack(1, 1), &[snapshot(1, &[1])]), [], "nobody else has it");
}

#[test]
fn a_copy_that_has_it_takes_the_place_of_its_nodes_others() {
    let mut one = snapshot(1, &[1, 2]);
    one.strays = BTreeSet::from([node(2), node(3)]);
    has_it(&mut one, copy(7), &node(2));
    assert_eq!(one.copies, BTreeMap::from([(copy(1), node(1)), (copy(7), node(2))]));
    assert_eq!(one.strays, BTreeSet::from([node(3)]));
}
