//! Which copies stay.

use super::super::settle::tests::{copy, members, mirrored};
use super::*;
use crate::catalog::{Access, AccessMode, Publication};

fn kept(
    volume: &Volume,
    count: usize,
    now: &Configuration,
) -> Result<(Vec<InstanceId>, Option<InstanceId>), Transient> {
    let mut mirror = volume.spec.mirror.clone().expect("mirrored");
    keep_best(volume, &mut mirror, count, Some(now))?;
    assert!(mirror.leaving.is_empty());
    Ok((mirror.copies.keys().copied().collect(), mirror.primary))
}

fn with(copies: &[u8], wished: Option<u8>, used: Option<u8>) -> Volume {
    let mut volume = mirrored(copies);
    volume.spec.mirror.as_mut().expect("mirrored").primary = wished.map(copy);
    let how = Publication { readonly: false, access: Access::Block, mode: AccessMode::SingleNodeWriter };
    volume.spec.publications.extend(used.map(|byte| (NodeName(format!("n{byte}")), how)));
    volume
}

#[test]
fn the_copy_that_is_used_stays_then_members_then_the_primary() {
    let all = members(&[1, 2, 3]);
    let one = |volume: &Volume, now: &Configuration| kept(volume, 1, now).expect("kept");
    assert_eq!(one(&with(&[1, 2, 3], Some(2), Some(2)), &all), (vec![copy(2)], Some(copy(2))));
    assert_eq!(one(&with(&[1, 2, 3], Some(3), None), &all), (vec![copy(3)], Some(copy(3))));
    assert_eq!(one(&with(&[1, 2, 3], None, None), &all), (vec![copy(1)], Some(copy(1))), "the primary");
    assert_eq!(one(&with(&[1, 2, 3], Some(3), None), &members(&[1, 2])), (vec![copy(1)], Some(copy(1))));
    let two = kept(&with(&[1, 2, 3], Some(1), Some(1)), 2, &members(&[1, 3])).expect("kept");
    assert_eq!(two, (vec![copy(1), copy(3)], Some(copy(1))), "the one that lacks writes goes");
    let mut leaves = with(&[1, 2, 3], Some(1), None);
    leaves.spec.mirror.as_mut().expect("mirrored").leaving.insert(copy(2));
    assert_eq!(kept(&leaves, 2, &all).expect("kept").0, [copy(1), copy(3)]);
}

#[test]
fn no_copy_is_given_up_for_one_that_lacks_writes() {
    let refused = kept(&with(&[1, 2], Some(2), Some(2)), 1, &members(&[1])).expect_err("it lacks writes");
    assert!(refused.to_string().contains("n2 are not up to date"), "{refused}");
}

#[test]
fn a_volume_has_the_copies_that_stay() {
    assert_eq!(replication(&mirrored(&[1])), Replication::None);
    assert_eq!(replication(&mirrored(&[1, 2])), Replication::Sync { replicas: 2 });
    let mut moves = mirrored(&[1, 2, 3]);
    moves.spec.mirror.as_mut().expect("mirrored").leaving.insert(copy(1));
    assert_eq!(replication(&moves), Replication::Sync { replicas: 2 });
    let mut sole = mirrored(&[1]);
    sole.spec.mirror = None;
    assert_eq!(replication(&sole), Replication::None);
}
