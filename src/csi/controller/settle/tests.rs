//! Each step follows from the object and the configuration alone.

use super::*;
use crate::catalog::{Access, AccessMode, Replication, VolumeRequest};
use crate::protocol::{Generation, Lacks};
use crate::volume::VolumeSize;
use std::collections::BTreeMap;

pub(in crate::csi::controller) fn copy(byte: u8) -> InstanceId {
    InstanceId::from_bytes([byte; 16])
}

fn size(mib: u64) -> VolumeSize {
    VolumeSize::try_from(mib << 20).expect("a size")
}

/// A volume of 64 MiB that is ready, with copy n on node n.
pub(in crate::csi::controller) fn mirrored(copies: &[u8]) -> Volume {
    let request = VolumeRequest {
        name: "data".into(),
        size: size(64),
        pool: "default".into(),
        fs_type: None,
        verify_reads: false,
        access: BTreeSet::new(),
        source: None,
        replication: Replication::None,
        rebuild_after: Default::default(),
        reach: Default::default(),
    };
    let mut volume = Volume::wanted(VolumeId::from_bytes([9; 16]), request);
    volume.status.phase = VolumePhase::Ready;
    let place = |byte: u8| CopySpec { node: NodeName(format!("n{byte}")), pool: "default".into() };
    let all: BTreeMap<_, _> = copies.iter().map(|byte| (copy(*byte), place(*byte))).collect();
    volume.status.copies = all.keys().copied().collect();
    volume.spec.mirror = Some(MirrorSpec::new(all));
    copies.iter().for_each(|byte| report(&mut volume, *byte, 64, None));
    volume
}

/// The first one is primary.
pub(in crate::csi::controller) fn members(copies: &[u8]) -> Configuration {
    let secondaries = copies[1..].iter().map(|byte| copy(*byte)).collect();
    Configuration::first(Generation(1), copy(copies[0]), secondaries)
}

fn report(volume: &mut Volume, byte: u8, mib: u64, refused: Option<&str>) {
    let refused = refused.map(str::to_owned);
    let verify_reads = volume.spec.verify_reads;
    volume.status.reports.insert(copy(byte), CopyReport { size: size(mib), verify_reads, refused });
}

#[test]
fn a_volume_is_as_large_as_each_of_its_copies() {
    let (mut volume, now) = (mirrored(&[1, 2]), members(&[1, 2]));
    assert_eq!(settle(&mut volume, Some(&now)), Settled::default());
    volume.spec.size = size(128);
    report(&mut volume, 1, 128, None);
    assert!(!settle(&mut volume, Some(&now)).changed, "the other one could not hold it");
    assert_eq!(behind(&volume), [NodeName("n2".into())]);
    report(&mut volume, 2, 128, None);
    assert!(settle(&mut volume, Some(&now)).changed);
    assert_eq!((volume.status.size, behind(&volume)), (size(128), vec![]));
    assert_eq!(settle(&mut volume, Some(&now)), Settled::default(), "nothing is left to do");
    volume.spec.size = size(256);
    volume.status.reports.remove(&copy(2));
    report(&mut volume, 1, 256, None);
    assert!(!settle(&mut volume, Some(&now)).changed, "a copy that says nothing holds nothing");
}

#[test]
fn a_refused_growth_is_taken_back_and_a_later_one_converges() {
    let (mut volume, now) = (mirrored(&[1, 2]), members(&[1, 2]));
    volume.spec.size = size(128);
    report(&mut volume, 1, 128, None);
    report(&mut volume, 2, 64, Some("its pool is full"));
    let settled = settle(&mut volume, Some(&now));
    assert_eq!(settled, Settled { changed: true, refused: Some("node n2: its pool is full".into()) });
    assert_eq!((volume.spec.size, volume.status.size), (size(64), size(64)));
    assert!(volume.status.reports.values().all(|report| report.refused.is_none()), "it is not read twice");
    volume.spec.size = size(96);
    assert!(!settle(&mut volume, Some(&now)).changed);
    report(&mut volume, 2, 96, None);
    assert!(settle(&mut volume, Some(&now)).changed);
    assert_eq!(volume.status.size, size(96));
}

#[test]
fn a_setting_is_the_volumes_when_every_copy_has_it() {
    let (mut volume, now) = (mirrored(&[1, 2]), members(&[1, 2]));
    volume.spec.verify_reads = true;
    report(&mut volume, 1, 64, None);
    assert!(!settle(&mut volume, Some(&now)).changed);
    report(&mut volume, 2, 64, None);
    assert!(settle(&mut volume, Some(&now)).changed && volume.status.verify_reads);
}

#[test]
fn a_copy_that_is_replaced_stays_until_the_others_are_members() {
    let mut volume = mirrored(&[1, 2, 3]);
    volume.spec.mirror.as_mut().expect("mirrored").leaving.insert(copy(2));
    let mut now = members(&[1, 2]);
    now.candidates.insert(copy(3), Lacks::Everything);
    assert!(!settle(&mut volume, Some(&now)).changed);
    assert!(!settle(&mut volume, None).changed, "nobody knows");
    // Writes go to it as long as it is a member.
    volume.spec.size = size(128);
    report(&mut volume, 1, 128, None);
    report(&mut volume, 3, 128, None);
    assert!(!settle(&mut volume, Some(&now)).changed);
    assert!(settle(&mut volume, Some(&members(&[1, 2, 3]))).changed);
    let mirror = volume.spec.mirror.clone().expect("mirrored");
    assert_eq!(mirror.copies.keys().copied().collect::<Vec<_>>(), [copy(1), copy(3)]);
    assert!(mirror.leaving.is_empty() && volume.status.size == size(128));
}

#[test]
fn a_copy_that_is_used_is_not_taken_away_and_a_wish_for_one_that_goes_moves() {
    let (mut volume, now) = (mirrored(&[1, 2]), members(&[1, 2]));
    let mirror = volume.spec.mirror.as_mut().expect("mirrored");
    (mirror.primary, mirror.leaving) = (Some(copy(1)), [copy(1)].into());
    let how = Publication { readonly: false, access: Access::Block, mode: AccessMode::SingleNodeWriter };
    volume.spec.publications.insert(NodeName("n1".into()), how);
    assert!(!settle(&mut volume, Some(&now)).changed, "somebody uses it");
    volume.spec.publications.clear();
    assert!(settle(&mut volume, Some(&now)).changed);
    let mirror = volume.spec.mirror.expect("mirrored");
    assert_eq!((mirror.primary, mirror.copies.len()), (Some(copy(2)), 1));
}

#[test]
fn nothing_is_done_about_what_is_half_made_or_goes() {
    let now = members(&[1]);
    let grows = |change: fn(&mut Volume)| {
        let mut volume = mirrored(&[1]);
        volume.spec.size = size(128);
        report(&mut volume, 1, 128, None);
        change(&mut volume);
        settle(&mut volume, Some(&now)).changed
    };
    assert!(grows(|_| {}));
    assert!(!grows(|volume| volume.spec.deleted = true));
    assert!(!grows(|volume| volume.status.phase = VolumePhase::Creating));
    assert!(!grows(|volume| volume.spec.mirror = None));
}
