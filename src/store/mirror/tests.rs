//! The format of the file `mirror`.

use super::super::format::tests::{flip_every_bit, golden, instance};
use super::super::format::{BLOCK, HeaderError, Input, LayerId};
use super::super::record::{self, MAX_RECORD, RecordError};
use super::slot::*;
use super::state::{Kept, Lacking};
use crate::protocol::{
    Configuration, ConfigurationVersion, Extent, Generation, Lacks, MAX_COPIES, MAX_MARKS, Record, Stamp,
};
use crate::volume::{BootId, InstanceId, VolumeId};

fn stamp(version: u64) -> Stamp {
    Stamp { generation: Generation(3), version: ConfigurationVersion(version) }
}

fn copy(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([0x77; 16])
}

fn kept() -> Kept {
    let candidates = [(copy(3), Lacks::Since(stamp(8))), (copy(4), Lacks::Everything)].into();
    let configuration = Configuration {
        stamp: stamp(9),
        term: stamp(5),
        primary: Some(copy(1)),
        secondaries: [copy(2)].into(),
        candidates,
        lost: Stamp::default(),
    };
    let lacking = vec![
        Lacking { since: stamp(8), base: Some(LayerId(6)), hot: [Extent(2), Extent(500)].into() },
        Lacking { since: stamp(7), base: None, hot: [].into() },
    ];
    Kept { record: Record { configuration, intact: true }, boot: BootId::from_bytes([0x55; 16]), lacking }
}

/// Both record slots, of which the one for `sequence` is written.
fn with(slots: &mut [u8], sequence: u64, kept: &Kept) -> usize {
    let slot = &mut slots[sequence as usize % 2 * RECORD_SLOT..][..RECORD_SLOT];
    encode(&RECORD, instance(), volume(), sequence, &encode_record(kept), slot)
}

fn read(slots: &[u8]) -> Result<Option<(u64, Kept)>, HeaderError> {
    let found = newest(&RECORD, instance(), slots, |of| of == volume())?;
    found.map(|found| decode_record(found.body).map(|kept| (found.sequence, kept))).transpose()
}

#[test]
fn the_golden_record_is_read() {
    let mut slots = vec![0; HOT_AREA];
    let used = with(&mut slots, 12, &kept());
    let golden = golden("mirror-record-v2.bin", &slots[..used]);
    assert_eq!(golden.len(), 2 * BLOCK, "two copies");
    let found = decode(&RECORD, instance(), &golden).expect("it is sound");
    assert_eq!((found.volume, found.sequence), (volume(), 12));
    assert_eq!(decode_record(found.body), Ok(kept()));
    let older = older_golden("mirror-record-v1.bin");
    let found = decode(&RECORD, instance(), &older).expect("it is sound");
    assert_eq!(decode_record(found.body), Ok(kept()));
}

#[test]
fn the_golden_record_of_a_volume_that_has_lost_writes_is_read() {
    let mut kept = kept();
    kept.record.configuration.lost = stamp(5);
    let mut slots = vec![0; HOT_AREA];
    let used = with(&mut slots, 12, &kept);
    let golden = golden("mirror-record-lost-v2.bin", &slots[..used]);
    let found = decode(&RECORD, instance(), &golden).expect("it is sound");
    assert_eq!(decode_record(found.body), Ok(kept));
}

/// A golden file of a version that is not written any more.
fn older_golden(name: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    std::fs::read(path).expect("the golden file is there")
}

#[test]
fn the_golden_hot_set_is_read() {
    // More than a block has room for.
    let extents: Vec<Extent> = (0..1500).map(|number| Extent(number * 7)).collect();
    let mut slot = vec![0; HOT_SLOT];
    let used = encode(&HOT, instance(), volume(), 4, &encode_hot(&extents), &mut slot);
    let golden = golden("mirror-hot-v2.bin", &slot[..used]);
    assert_eq!(golden.len(), 4 * BLOCK, "two copies");
    let found = decode(&HOT, instance(), &golden).expect("it is sound");
    assert_eq!(decode_hot(found.body), Ok(extents.clone()));
    let older = older_golden("mirror-hot-v1.bin");
    let found = decode(&HOT, instance(), &older).expect("it is sound");
    assert_eq!(decode_hot(found.body), Ok(extents));
    flip_every_bit(&golden[..2 * BLOCK], 2 * BLOCK, |at, bytes| {
        assert!(decode(&HOT, instance(), bytes).is_err(), "byte {at}");
    });
}

#[test]
fn every_changed_bit_is_noticed_and_the_other_copy_counts() {
    let mut slots = vec![0; HOT_AREA];
    let older = Kept { lacking: Vec::new(), ..kept() };
    with(&mut slots, 11, &older);
    let used = with(&mut slots, 12, &kept());
    let (first, rest) = slots.split_at(used);
    flip_every_bit(&first[..BLOCK], BLOCK, |at, bytes| {
        assert!(decode(&RECORD, instance(), bytes).is_err(), "byte {at}");
    });
    flip_every_bit(first, 80, |at, bytes| {
        let whole = [bytes, rest].concat();
        assert_eq!(read(&whole), Ok(Some((12, kept()))), "byte {at}");
    });
}

#[test]
fn the_fullest_record_and_hot_set_fit_their_slots() {
    let mut kept = kept();
    let hot: Vec<Extent> = (0..MAX_MARKS as u32).map(Extent).collect();
    kept.record.configuration.candidates =
        (0..MAX_COPIES as u8).map(|number| (copy(number), Lacks::Since(stamp(u64::from(number))))).collect();
    kept.record.configuration.secondaries.clear();
    let left = &hot[..MAX_LEFT / MAX_COPIES];
    let lacking = |version| Lacking { since: stamp(version), base: Some(LayerId(1)), hot: left.into() };
    kept.lacking = (0..MAX_COPIES as u64).map(lacking).collect();
    let mut slots = vec![0; HOT_AREA];
    assert!(with(&mut slots, 1, &kept) <= RECORD_SLOT);
    assert_eq!(read(&slots), Ok(Some((1, kept))));
    let mut slot = vec![0; HOT_SLOT];
    assert!(encode(&HOT, instance(), volume(), 1, &encode_hot(&hot), &mut slot) <= HOT_SLOT);
}

#[test]
fn a_torn_write_leaves_the_one_before_and_never_a_mix() {
    let newer = Kept { lacking: Vec::new(), ..kept() };
    let mut before = vec![0; HOT_AREA];
    assert_eq!(read(&before), Ok(None), "a free region");
    for sequence in 1..5 {
        let (old, new) = if sequence % 2 == 0 { (kept(), newer.clone()) } else { (newer.clone(), kept()) };
        let mut after = before.clone();
        with(&mut after, sequence, &new);
        // Every prefix, and every suffix, of the units that a disk writes at once.
        for cut in (0..=RECORD_SLOT * 2).step_by(512) {
            let prefix = [&after[..cut], &before[cut..]].concat();
            let suffix = [&before[..cut], &after[cut..]].concat();
            for torn in [prefix, suffix] {
                let expected = (sequence > 1).then(|| (sequence - 1, old.clone()));
                let found = read(&torn);
                assert!(found == Ok(expected) || found == Ok(Some((sequence, new.clone()))), "{sequence} at {cut}");
            }
        }
        before = after;
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let mut slots = vec![0; HOT_AREA];
    with(&mut slots, 1, &kept());
    let foreign = newest(&RECORD, instance(), &slots, |_| false);
    assert_eq!(foreign, Ok(None), "a free region of a deleted volume");
    slots[RECORD_SLOT + 100] ^= 1;
    slots[RECORD_SLOT + BLOCK + 100] ^= 1;
    assert_eq!(read(&slots), Ok(None), "its first write was torn");
    with(&mut slots, 2, &kept());
    slots[100] ^= 1;
    slots[BLOCK + 100] ^= 1;
    assert!(matches!(read(&slots), Err(HeaderError::Checksum { .. })), "both slots are damaged");
    let mut slots = vec![0; HOT_AREA];
    with(&mut slots, 1, &kept());
    let newer = slots[RECORD_SLOT..].as_mut();
    newer[8] = 3;
    super::super::format::seal(&mut newer[..BLOCK]);
    assert_eq!(read(&slots), Err(HeaderError::Version { found: 3, known: 2 }));
    let other = newest(&RECORD, copy(9), &slots[RECORD_SLOT + BLOCK..][..2 * BLOCK], |_| true);
    assert_eq!(other, Err(HeaderError::Instance { found: instance(), expected: copy(9) }));
}

#[test]
fn a_wrong_field_with_a_right_checksum_is_named() {
    let body = encode_record(&kept());
    for length in 0..body.len() {
        assert!(matches!(decode_record(&body[..length]), Err(HeaderError::Field(_))), "{length} bytes");
    }
    for (flag, name) in [(4, "lost"), (8, "flags")] {
        let mut flags = body.clone();
        flags[32] = flag;
        assert_eq!(decode_record(&flags), Err(HeaderError::Field(name)));
    }
    let longer = [&body[..], &[0]].concat();
    assert_eq!(decode_record(&longer), Err(HeaderError::Field("length")));
    let descending = encode_hot(&[Extent(2), Extent(1)]);
    assert_eq!(decode_hot(&descending), Err(HeaderError::Field("extents")));
    let many = encode_hot(&vec![Extent(0); MAX_MARKS + 1]);
    assert_eq!(decode_hot(&many), Err(HeaderError::Field("extents")));
}

#[test]
fn the_names_of_bases_are_records_of_the_log() {
    let layer = LayerId(7);
    for record in [record::Record::NameBase { layer, volume: volume() }, record::Record::UnnameBase { layer }] {
        let mut bytes = [0; MAX_RECORD];
        let length = record.encode(&mut bytes);
        let decoded = |end: usize| record::Record::decode(bytes[0], &mut Input { bytes: &bytes[..end], at: 1 });
        assert_eq!(decoded(length), Ok(record));
        for end in 1..length {
            assert_eq!(decoded(end), Err(RecordError::Truncated(bytes[0])), "{end} bytes");
        }
    }
}
