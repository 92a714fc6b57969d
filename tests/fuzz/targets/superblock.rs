//! Reads arbitrary superblocks and blocks of checksums: no panic, and what was read is written as it was.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem::store::checksums::ChecksumBlock;
use tandem::store::format::BLOCK;
use tandem::store::superblock::Superblock;
use tandem::volume::InstanceId;

fuzz_target!(|data: &[u8]| {
    let instance = InstanceId::from_bytes([0x11; 16]);
    let _ = Superblock::decode(data);
    let _ = ChecksumBlock::decode(instance, 0, data);
    let mut block = [0; BLOCK];
    let length = data.len().min(BLOCK);
    block[..length].copy_from_slice(&data[..length]);
    let mut checksums = block;
    // Checksums that are right, so that the fields are looked at.
    block[..8].copy_from_slice(b"TandemSB");
    let crc = crc32c::crc32c_append(crc32c::crc32c(&block[..12]), &block[16..]);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    if let Ok(superblock) = Superblock::decode(&block) {
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    }
    checksums[4..8].copy_from_slice(b"TCS1");
    let place = crc32c::crc32c_append(crc32c::crc32c(&instance.to_bytes()), &[0; 4]);
    let crc = crc32c::crc32c_append(place, &checksums[4..]);
    checksums[..4].copy_from_slice(&crc.to_le_bytes());
    let decoded = ChecksumBlock::decode(instance, 0, &checksums).expect("any checksums are possible");
    let mut encoded = [0; BLOCK];
    decoded.encode(instance, 0, &mut encoded);
    assert!(encoded == checksums);
});
