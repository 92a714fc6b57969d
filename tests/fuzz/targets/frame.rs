//! Reads arbitrary frames between replicas: no panic, and what was read is written as it was.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem::replica::peer::header::HEADER;
use tandem::replica::peer::packet::Packet;

fuzz_target!(|data: &[u8]| {
    read_and_write(data);
    if let Some(frame) = plausible(data) {
        read_and_write(&frame);
    }
});

fn read_and_write(bytes: &[u8]) {
    if let Ok((volume, packet, rest)) = Packet::parse(bytes) {
        let encoded = packet.encode(volume);
        assert_eq!([encoded.head, encoded.data.to_vec()].concat(), bytes[..bytes.len() - rest.len()]);
        if let Packet::Message(_, payload) = packet {
            let _ = payload.check();
        }
    }
}

/// The same with checksums and a length that are right, so that the fields are looked at.
fn plausible(data: &[u8]) -> Option<Vec<u8>> {
    let mut frame = data.to_vec();
    let table = data.get(HEADER..)?;
    let blocks = u32::from(data[12] % 3);
    // The crcs of the payload lie at the end of the input; the payload itself may be anything.
    let body = (table.len() as u32).checked_sub(4 * blocks)?;
    frame[..6].copy_from_slice(b"TDMP\x01\x00");
    frame[8..12].copy_from_slice(&(body + blocks * 4100).to_le_bytes());
    frame[12..16].copy_from_slice(&blocks.to_le_bytes());
    frame[84..88].copy_from_slice(&crc32c::crc32c(table).to_le_bytes());
    let crc = crc32c::crc32c(&frame[..HEADER - 4]);
    frame[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
    frame.resize(frame.len() + blocks as usize * 4096, 7);
    Some(frame)
}
