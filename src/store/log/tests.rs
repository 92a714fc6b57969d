use super::super::format::LayerId;
use super::super::format::tests::{flip_every_bit, golden, instance};
use super::super::map::{Entry, Extent, PhysicalBlock};
use super::*;
use crate::volume::{SnapshotId, VolumeId, VolumeSize};
use proptest::prelude::*;

const FILE_BLOCKS: usize = 24;

fn map(start: u64, count: u32, entry: Entry) -> Record {
    Record::Map { layer: LayerId(7), extent: Extent { start, count, entry } }
}

/// One of each.
pub(crate) fn records() -> Vec<Record> {
    let (layer, parent) = (LayerId(7), LayerId(3));
    let volume = VolumeId::from_bytes([0x33; 16]);
    let snapshot = SnapshotId::from_bytes([0x44; 16]);
    let size = VolumeSize::try_from(1 << 30).expect("a size");
    vec![
        Record::NewLayer { layer: parent, parent: None },
        Record::NewLayer { layer, parent: Some(parent) },
        Record::NameVolume { layer, volume, size, verify_reads: true },
        Record::NameSnapshot { layer: parent, snapshot, volume, size, created_ms: 1_795_358_400_123 },
        map(0, 1, Entry::Data(PhysicalBlock(0))),
        map(1 << 20, 300, Entry::Data(PhysicalBlock(0x0102_0304))),
        map(9, 1 << 20, Entry::Zero),
        map(8, 2, Entry::Absent),
        Record::Checksummed { layer: parent },
        Record::Resize { volume, size: VolumeSize::try_from(2 << 30).expect("a size") },
        Record::Modify { volume, verify_reads: false },
        Record::Merged { parent, child: layer },
        Record::UnnameSnapshot { snapshot },
        Record::UnnameVolume { volume },
        Record::Freed { layer },
    ]
}

fn start(epoch: u64) -> Position {
    Position { epoch, sequence: 0, chain: 5 }
}

/// Makes a commit and returns the blocks and where they go.
fn commit(writer: &mut Writer, durable: u64, records: &[Record]) -> (Position, Vec<u8>) {
    writer.begin(durable);
    records.iter().for_each(|record| writer.push(record).expect("there is room"));
    let (position, blocks) = writer.finish();
    assert_eq!((blocks.len() % BLOCK, blocks.as_ptr().align_offset(BLOCK)), (0, 0));
    (position, blocks.to_vec())
}

fn write(file: &mut [u8], (position, blocks): &(Position, Vec<u8>)) {
    file[position.offset() as usize..][..blocks.len()].copy_from_slice(blocks);
}

type Replayed = Result<(Vec<Vec<Record>>, Position), LogError>;

fn replay(file: &[u8], position: Position) -> Replayed {
    let mut reader = Reader::new(file, instance(), position);
    let mut commits = Vec::new();
    while let Some(commit) = reader.next_commit()? {
        commits.push(commit.records().collect::<Result<_, _>>()?);
    }
    Ok((commits, reader.position()))
}

/// A log of three commits of two blocks each, every one durable before the next.
fn sample() -> (Vec<u8>, Vec<Vec<Record>>) {
    let mut file = vec![0; FILE_BLOCKS * BLOCK];
    let mut writer = Writer::new(instance(), start(4), 8);
    let commits: Vec<Vec<Record>> = (0..3)
        .map(|number| {
            (0..200).map(|at| map(number * 1000 + at, 1, Entry::Data(PhysicalBlock(at as u32 * 3)))).collect()
        })
        .collect();
    for records in &commits {
        let durable = writer.position().sequence;
        let blocks = commit(&mut writer, durable, records);
        assert_eq!(blocks.1.len(), 2 * BLOCK);
        write(&mut file, &blocks);
    }
    (file, commits)
}

#[test]
fn the_golden_log_is_read() {
    let mut writer = Writer::new(instance(), start(4), 8);
    let mut encoded = commit(&mut writer, 0, &records()).1;
    encoded.extend(commit(&mut writer, 1, &[]).1);
    let golden = golden("log-v1.bin", &encoded);
    let (commits, end) = replay(&golden, start(4)).expect("sound");
    assert_eq!((commits, end), (vec![records(), vec![]], writer.position()));
    assert_eq!(epoch_of(&golden, instance()), Ok(Some(4)));
}

#[test]
fn a_changed_bit_ends_the_log_or_is_damage() {
    let (file, commits) = sample();
    let used = 6 * BLOCK;
    flip_every_bit(&file[..used], used / 37, |at, changed| match replay(changed, start(4)) {
        Err(LogError::Damaged { epoch: 4, sequence, .. }) => {
            assert_eq!(sequence, (at / BLOCK / 2 * 2) as u64, "the commit that is damaged");
            assert!(at < 4 * BLOCK);
        }
        Ok((replayed, _)) => {
            assert_eq!(replayed, commits[..2], "only of the last commit nobody knows whether it was durable");
            assert!(at >= 4 * BLOCK);
        }
        other => panic!("byte {at}: {other:?}"),
    });
}

#[test]
fn a_log_of_something_else_is_refused_or_empty() {
    let (file, _) = sample();
    assert_eq!(replay(&file, start(5)), Ok((vec![], start(5))));
    assert_eq!(replay(&[], start(4)), Ok((vec![], start(4))));
    let other = InstanceId::from_bytes([9; 16]);
    let error = HeaderError::Instance { found: instance(), expected: other };
    let refused = Reader::new(&file, other, start(4)).next_commit().err();
    assert_eq!(refused, Some(LogError::Header { sequence: 0, error }));
    let mut newer = file.clone();
    newer[2 * BLOCK + 24] = 1;
    seal(&mut newer[2 * BLOCK..3 * BLOCK]);
    let error = HeaderError::Incompatible(1);
    assert_eq!(replay(&newer, start(4)), Err(LogError::Header { sequence: 2, error }));
}

#[test]
fn the_missing_end_of_the_log_before_is_noticed() {
    let (file, commits) = sample();
    let (_, end) = replay(&file, start(4)).expect("sound");
    let mut next = vec![0; FILE_BLOCKS * BLOCK];
    let mut writer = Writer::new(instance(), end, 2);
    writer.begin_epoch();
    write(&mut next, &commit(&mut writer, 0, &records()));
    assert_eq!(replay(&next, end.next_epoch()).map(|(commits, _)| commits), Ok(vec![records()]));
    let (short, torn) = replay(&file[..4 * BLOCK], start(4)).expect("looks complete");
    assert_eq!(short, commits[..2]);
    assert_eq!(replay(&next, torn.next_epoch()), Err(LogError::Gap { epoch: 5 }));
}

#[test]
fn a_full_commit_says_so_and_keeps_what_it_has() {
    let mut writer = Writer::new(instance(), start(0), 2);
    writer.begin(0);
    let mut pushed = 0;
    while writer.push(&map(pushed, 1, Entry::Zero)).is_ok() {
        pushed += 1;
    }
    let blocks = writer.finish().1.to_vec();
    let (commits, end) = replay(&blocks, start(0)).expect("sound");
    assert_eq!((commits.len(), commits[0].len() as u64, end.sequence), (1, pushed, 2));
}

#[test]
fn a_record_that_is_none_is_named() {
    let mut writer = Writer::new(instance(), start(0), 2);
    let (_, mut block) = commit(&mut writer, 0, &[map(0, 1, Entry::Zero)]);
    for (at, byte, error) in [
        (HEADER, 77, RecordError::Tag(77)),
        (HEADER, 5, RecordError::Truncated(5)),
        (HEADER + 13, 0, RecordError::Field { tag: 1, field: "extent" }),
    ] {
        let before = std::mem::replace(&mut block[at], byte);
        seal(&mut block);
        assert_eq!(replay(&block, start(0)), Err(LogError::Record { sequence: 0, error }));
        block[at] = before;
    }
}

#[derive(Clone, Debug)]
struct Life {
    /// Records of each commit; the last one was not durable when the machine failed.
    commits: Vec<usize>,
    /// For each block of the last commit: nothing, half of it or all of it arrived.
    arrived: Vec<u8>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn crashes_lose_only_what_was_not_durable(lives in prop::collection::vec(
        (prop::collection::vec(0..500_usize, 1..4), prop::collection::vec(0..3_u8, 3))
            .prop_map(|(commits, arrived)| Life { commits, arrived }), 1..6,
    )) {
        let mut file = vec![0xee; 64 * BLOCK];
        let (mut expected, mut position, mut serial) = (Vec::new(), start(1), 0);
        for life in lives {
            let mut writer = Writer::new(instance(), position, 8);
            let last = life.commits.len() - 1;
            for (number, &count) in life.commits.iter().enumerate() {
                let records: Vec<_> = (0..count).map(|_| { serial += 1; map(serial, 1, Entry::Zero) }).collect();
                let durable = writer.position().sequence;
 let blocks = commit(&mut writer, durable, &records);
                if number < last {
                    write(&mut file, &blocks);
                    expected.push(records);
                    continue;
                }
                let offset = blocks.0.offset() as usize;
                let arrived = blocks.1.chunks(BLOCK).zip(&life.arrived).enumerate();
                for (at, (block, &how)) in arrived {
                    let length = BLOCK / 2 * usize::from(how);
                    file[offset + at * BLOCK..][..length].copy_from_slice(&block[..length]);
                }
                if file[offset..].starts_with(&blocks.1) {
                    expected.push(records);
                }
            }
            let (replayed, end) = replay(&file, start(1)).expect("a torn end is no damage");
            prop_assert_eq!(&replayed, &expected);
            position = end;
        }
    }
}
