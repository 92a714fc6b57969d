//! Reads arbitrary checkpoints: no panic, and what was read can be written and read again, unchanged.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::collections::BTreeMap;
use tandem::store::checkpoint::{CheckpointError, Header, Item, Totals, read, read_header, write};
use tandem::store::format::{BLOCK, LayerId};
use tandem::store::map::Map;
use tandem::volume::InstanceId;

fuzz_target!(|data: &[u8]| {
    let instance = InstanceId::from_bytes([0x11; 16]);
    let _ = read_header(data, instance);
    let _ = items(data, instance);
    // A golden file is a good beginning for what is inside a chunk, too.
    let inside = if data.starts_with(b"TandemCP") { items_of_golden(data) } else { data };
    // The totals at the end are the only thing that has to be known: the first attempt tells them.
    if let Err(CheckpointError::Totals { found, .. }) = items(&plausible(inside, None), instance) {
        let (header, items) = items(&plausible(inside, Some(found)), instance).expect("the totals are right");
        write_and_read(&header, &items);
    }
});

fn items(mut bytes: &[u8], instance: InstanceId) -> Result<(Header, Vec<Item>), CheckpointError> {
    let mut items = Vec::new();
    let (header, _) = read(&mut bytes, instance, &mut |item| items.push(item))?;
    Ok((header, items))
}

/// The items of the first chunk without the end that follows them.
fn items_of_golden(file: &[u8]) -> &[u8] {
    let length =
        file.get(BLOCK + 4..).and_then(|rest| rest.first_chunk()).map_or(0, |length| u32::from_le_bytes(*length));
    let length = (length & !(1 << 31)) as usize;
    file.get(BLOCK + 8..).and_then(|rest| rest.get(..length.saturating_sub(17))).unwrap_or_default()
}

/// One chunk whose checksums are right, so that its items are looked at: those of the input, then an end with the totals
/// given or with wrong ones.
fn plausible(data: &[u8], totals: Option<Totals>) -> Vec<u8> {
    let totals = totals.unwrap_or(Totals { records: u64::MAX, extents: u64::MAX });
    let mut inside = data[..data.len().min(BLOCK - 8 - 17)].to_vec();
    inside.push(65);
    inside.extend_from_slice(&totals.records.to_le_bytes());
    inside.extend_from_slice(&totals.extents.to_le_bytes());
    let mut file = vec![0; 2 * BLOCK];
    let (header, chunk) = file.split_at_mut(BLOCK);
    header[..8].copy_from_slice(b"TandemCP");
    header[8] = 1;
    header[32..48].fill(0x11);
    let seed = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..]);
    header[12..16].copy_from_slice(&seed.to_le_bytes());
    chunk[4..8].copy_from_slice(&(inside.len() as u32 | (1 << 31)).to_le_bytes());
    chunk[8..8 + inside.len()].copy_from_slice(&inside);
    let place = crc32c::crc32c_append(crc32c::crc32c(&seed.to_le_bytes()), &[0; 4]);
    let crc = crc32c::crc32c_append(place, &chunk[4..]);
    chunk[..4].copy_from_slice(&crc.to_le_bytes());
    file
}

/// The same records in the same order, and the same maps.
fn write_and_read(header: &Header, first: &[Item]) {
    let (records, maps) = split(first);
    let layers = maps.iter().map(|(layer, map)| (*layer, map));
    let mut bytes = Vec::new();
    let totals = write(&mut bytes, header, records.iter().copied(), layers).expect("memory");
    let (again, second) = items(&bytes, header.instance).expect("what was just written");
    assert_eq!((*header, records.len() as u64), (again, totals.records));
    let extents = maps.iter().flat_map(|(layer, map)| map.extents().map(|extent| Item::Extent(*layer, extent)));
    let expected: Vec<_> = records.iter().copied().map(Item::Record).chain(extents).collect();
    assert_eq!(expected, second);
}

/// Records and maps, as an opening tree would make them.
fn split(items: &[Item]) -> (Vec<tandem::store::record::Record>, BTreeMap<LayerId, Map>) {
    let mut records = Vec::new();
    let mut maps: BTreeMap<LayerId, Map> = BTreeMap::new();
    for item in items {
        match item {
            Item::Record(record) => records.push(*record),
            // Extents of a TiB are right, too, and would only slow this down.
            Item::Extent(_, extent) if extent.count > 1 << 20 => {}
            Item::Extent(layer, extent) => {
                maps.entry(*layer).or_default().replace(extent.start, extent.count, extent.entry, &mut |_| {});
            }
        }
    }
    (records, maps)
}
