use super::super::fuse::{Dispatch, HEADER};
use super::*;
use crate::protocol;
use crate::volume::{BlockRange, VolumeSize};

const FSYNC: u32 = 20;
const WRITE: u32 = 16;
const READ: u32 = 15;

fn fill(slot: Slot<'_>, opcode: u32, unique: u64, length: u32) {
    let total = if opcode == WRITE { WRITE_HEADER as u32 + length } else { WRITE_HEADER as u32 };
    let mut bytes = [0; WRITE_HEADER];
    bytes[..4].copy_from_slice(&total.to_ne_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
    bytes[HEADER + 16..HEADER + 20].copy_from_slice(&length.to_ne_bytes());
    slot.write(AT_REQUEST, &bytes);
}

fn volume() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

#[test]
fn a_request_survives_its_engine_in_every_state() {
    let (slots, fd) = Slots::create("tandem-test", 4).expect("slots");
    for index in 0..4 {
        slots.slot(index).prepare(volume(), 1);
    }
    fill(slots.slot(1), WRITE, 11, 8192);
    fill(slots.slot(2), WRITE, 12, 4096);
    slots.slot(2).done(Err(Errno::EIO));
    fill(slots.slot(3), FSYNC, 13, 0);
    slots.slot(3).done(Ok(()));
    slots.slot(3).free();
    drop(slots);

    let slots = Slots::map(fd.as_fd()).expect("the same slots");
    let states: Vec<_> = slots.recovered().map(|slot| (slot.index(), slot.volume(), slot.state())).collect();
    assert_eq!(states, [(1, volume(), SlotState::Filled), (2, volume(), SlotState::Done(Err(Errno::EIO)))]);
    let message = slots.slot(1).message().expect("a request");
    let size = VolumeSize::try_from(1 << 20).expect("a size");
    let write = protocol::Request::Write(BlockRange::new(0, 2).expect("a range"));
    assert_eq!((message.unique, message.dispatch(size)), (11, Dispatch::Submit(write)));
}

#[test]
fn a_slot_that_a_disk_may_still_use_is_not_free_for_the_next_engine() {
    let (slots, fd) = Slots::create("tandem-test", 1).expect("slots");
    let tree = InstanceId::from_bytes([9; 16]);
    slots.slot(0).prepare(volume(), 1);
    fill(slots.slot(0), READ, 11, 4096);
    slots.slot(0).rest(tree);
    drop(slots);

    let slots = Slots::map(fd.as_fd()).expect("the same slots");
    assert_eq!(slots.slot(0).state(), SlotState::Resting(tree));
    assert_ne!(slots.slot(0).volume(), volume(), "it is nobody's request");
    slots.slot(0).free();
    assert_eq!(slots.slot(0).state(), SlotState::Free);
}

#[test]
fn a_prepared_slot_forgets_the_request_before() {
    let (slots, _fd) = Slots::create("tandem-test", 1).expect("slots");
    let slot = slots.slot(0);
    fill(slot, WRITE, 11, 4096);
    slot.done(Err(Errno::EIO));
    slot.prepare(volume(), 1);
    assert_eq!(slot.state(), SlotState::Free);
    fill(slot, WRITE, 12, 4096);
    assert_eq!(slot.state(), SlotState::Filled);
}

#[test]
fn the_reply_of_a_read_ends_where_its_data_begins() {
    let (slots, _fd) = Slots::create("tandem-test", 1).expect("slots");
    let slot = slots.slot(0);
    fill(slot, READ, 5, 8192);
    let reply = slot.message().expect("a request").completion(Ok(()));
    let (start, length) = slot.encode(&reply);
    assert_eq!((start.wrapping_add(16), length), (slot.payload().cast_const(), 16 + 8192));
    // The request can still be read from the slot after its reply was encoded.
    assert_eq!(slot.message().expect("a request").completion(Ok(())), reply);
}

#[test]
fn what_the_copies_had_lost_outlives_the_engine_and_its_requests() {
    let (slots, fd) = Slots::create("tandem-test", 1).expect("slots");
    assert_eq!(slots.slot(0).lost(), None);
    let lost = |version| Stamp { generation: Generation(3), version: ConfigurationVersion(version) };
    slots.slot(0).keep_lost(lost(0));
    slots.slot(0).keep_lost(lost(7));
    fill(slots.slot(0), WRITE, 11, 8192);
    drop(slots);
    let slots = Slots::map(fd.as_fd()).expect("the same slots");
    slots.slot(0).prepare(volume(), 1);
    assert_eq!(slots.slot(0).lost(), Some(lost(7)));
}

#[test]
fn memory_of_another_format_is_refused() {
    let (slots, fd) = Slots::create("tandem-test", 2).expect("slots");
    slots.slot(1).word(AT_VERSION).store(2, Ordering::Relaxed);
    assert!(matches!(Slots::map(fd.as_fd()), Err(SlotsError::Version { found: 2, .. })));
    slots.slot(1).word(AT_VERSION).store(VERSION, Ordering::Relaxed);
    slots.slot(1).word(AT_INCOMPATIBLE).store(1, Ordering::Relaxed);
    assert!(matches!(Slots::map(fd.as_fd()), Err(SlotsError::Version { features: 1, .. })));
    slots.slot(1).word(AT_INCOMPATIBLE).store(0, Ordering::Relaxed);
    slots.slot(0).write(0, b"X");
    assert!(matches!(Slots::map(fd.as_fd()), Err(SlotsError::Foreign { index: 0 })));

    let short = memfd_create(c"tandem-test", MFdFlags::MFD_CLOEXEC).expect("memfd");
    assert!(matches!(Slots::map(short.as_fd()), Err(SlotsError::Length { length: 0 })));
    nix::unistd::ftruncate(&short, 4096).expect("ftruncate");
    assert!(matches!(Slots::map(short.as_fd()), Err(SlotsError::Length { length: 4096 })));
}

/// The first page of a done slot, as version 1 wrote it: an upgraded engine must be able to take it over.
#[test]
fn slots_of_version_1_stay_readable() {
    let golden: &[u8; PAYLOAD] = include_bytes!("../../../../tests/golden/slot-v1.bin");
    let (slots, fd) = Slots::create("tandem-test", 1).expect("slots");
    let slot = slots.slot(0);
    slot.prepare(volume(), 1);
    fill(slot, WRITE, 0x1234, 8192);
    slot.done(Err(Errno::ENOSPC));
    let mut page = [0; PAYLOAD];
    slot.read(0, &mut page);
    if std::env::var_os("TANDEM_WRITE_GOLDEN").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/slot-v1.bin"), page).expect("golden file");
    }
    assert!(&page == golden, "the format changed: raise VERSION and keep reading the old one");

    slot.write(0, &[0; PAYLOAD]);
    slot.write(0, golden);
    let slots = Slots::map(fd.as_fd()).expect("slots of version 1");
    let slot = slots.slot(0);
    assert_eq!((slot.volume(), slot.state()), (volume(), SlotState::Done(Err(Errno::ENOSPC))));
    assert_eq!(slot.message().map(|message| message.unique), Ok(0x1234));
    assert_eq!(slot.sequence(), 1);
}
