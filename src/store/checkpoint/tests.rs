use super::super::format::tests::{flip_every_bit, golden, instance};
use super::super::log::tests::records;
use super::super::map::{Entry, PhysicalBlock};
use super::*;

fn header() -> Header {
    Header { instance: instance(), log: Position { epoch: 12, sequence: 0, chain: 0xdead_beef } }
}

/// Every seventh block, so that there are as many extents as blocks.
fn scattered(count: u32) -> Map {
    let mut map = Map::new();
    for at in 0..count {
        map.replace(u64::from(at) * 7, 1, Entry::Data(PhysicalBlock(count - at)), &mut |_| {});
    }
    map
}

fn small() -> Map {
    let mut map = scattered(20);
    map.replace(50, 1 << 20, Entry::Zero, &mut |_| {});
    map
}

fn encode(header: &Header, layers: &[(LayerId, &Map)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let totals = write(&mut bytes, header, records().into_iter(), layers.iter().copied()).expect("memory");
    assert_eq!(totals.records, records().len() as u64);
    assert_eq!(bytes.len() % BLOCK, 0);
    bytes
}

fn decode(mut bytes: &[u8]) -> Result<(Header, Vec<Item>), CheckpointError> {
    let mut items = Vec::new();
    let (header, totals) = read(&mut bytes, instance(), &mut |item| items.push(item))?;
    assert_eq!(totals.records + totals.extents, items.len() as u64);
    Ok((header, items))
}

fn expected(layers: &[(LayerId, &Map)]) -> Vec<Item> {
    let extents = layers.iter().flat_map(|&(layer, map)| map.extents().map(move |extent| Item::Extent(layer, extent)));
    records().into_iter().map(Item::Record).chain(extents).collect()
}

#[test]
fn the_golden_checkpoint_is_read() {
    let (map, empty) = (small(), Map::new());
    let layers = [(LayerId(3), &map), (LayerId(7), &empty)];
    let golden = golden("checkpoint-v1.bin", &encode(&header(), &layers));
    let (found, items) = decode(&golden).expect("sound");
    assert_eq!((found, items), (header(), expected(&layers)));
    assert_eq!(read_header(&golden, instance()).expect("sound"), header());
}

#[test]
fn many_chunks_are_read_as_they_were_written() {
    let (large, other) = (scattered(30_000), scattered(4_085));
    let layers = [(LayerId(1), &large), (LayerId(2), &other)];
    let mut bytes = encode(&header(), &layers);
    assert!(bytes.len() > 8 * CHUNK);
    bytes.extend([0xee; 5000]);
    assert_eq!(decode(&bytes).expect("what follows the end does not matter").1, expected(&layers));
}

#[test]
fn every_changed_bit_is_noticed() {
    let map = small();
    let bytes = encode(&header(), &[(LayerId(3), &map)]);
    flip_every_bit(&bytes, bytes.len(), |at, changed| assert!(decode(changed).is_err(), "byte {at}"));
    let large = scattered(9_000);
    flip_every_bit(&encode(&header(), &[(LayerId(3), &large)]), 0, |at, changed| {
        assert!(decode(changed).is_err(), "byte {at}");
    });
}

#[test]
fn a_missing_exchanged_or_foreign_chunk_is_noticed() {
    let map = scattered(20_000);
    let bytes = encode(&header(), &[(LayerId(3), &map)]);
    for end in (0..bytes.len()).step_by(4093) {
        assert!(decode(&bytes[..end]).is_err(), "the first {end} bytes");
    }
    let chunk = |number: usize| BLOCK + number * CHUNK..BLOCK + (number + 1) * CHUNK;
    let mut exchanged = bytes.clone();
    exchanged[chunk(1)].copy_from_slice(&bytes[chunk(2)]);
    exchanged[chunk(2)].copy_from_slice(&bytes[chunk(1)]);
    assert!(matches!(decode(&exchanged), Err(CheckpointError::Checksum { chunk: 1, .. })));
    let later = Header { log: header().log.next_epoch(), ..header() };
    let mut foreign = bytes.clone();
    foreign[chunk(1)].copy_from_slice(&encode(&later, &[(LayerId(3), &map)])[chunk(1)]);
    assert!(matches!(decode(&foreign), Err(CheckpointError::Checksum { chunk: 1, .. })));
    let mut without = bytes[..BLOCK + CHUNK].to_vec();
    without.extend_from_slice(&bytes[BLOCK + 2 * CHUNK..]);
    assert!(matches!(decode(&without), Err(CheckpointError::Checksum { chunk: 1, .. })));
}

#[test]
fn sound_chunks_with_impossible_items_are_refused() {
    let map = small();
    let bytes = encode(&header(), &[(LayerId(3), &map)]);
    let seed = super::super::format::stored_checksum(&bytes);
    let with = |at: usize, field: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[BLOCK + at..BLOCK + at + field.len()].copy_from_slice(field);
        let crc = checksum(seed, 0, &bytes[BLOCK + 4..]);
        bytes[BLOCK..BLOCK + 4].copy_from_slice(&crc.to_le_bytes());
        decode(&bytes).expect_err("impossible")
    };
    let used = u32::from_le_bytes(bytes[BLOCK + 4..BLOCK + 8].try_into().expect("four")) & !LAST;
    assert!(matches!(with(8, &[60]), CheckpointError::Record { error: RecordError::Tag(60), .. }));
    assert!(matches!(with(4, &((used - 1) | LAST).to_le_bytes()), CheckpointError::Impossible { what: "the end", .. }));
    assert!(matches!(with(4, &used.to_le_bytes()), CheckpointError::Truncated { chunk: 0 }));
    let totals = CHUNK_HEADER + used as usize - 8;
    assert!(matches!(with(totals, &[99]), CheckpointError::Totals { .. }));
    let extent = CHUNK_HEADER + used as usize - END_BYTES - EXTENT_BYTES;
    assert!(matches!(with(extent + 8, &[0xff; 4]), CheckpointError::Impossible { what: "an extent", .. }));
    assert!(matches!(with(extent + 12, &[0; 4]), CheckpointError::Impossible { what: "an extent", .. }));
}
