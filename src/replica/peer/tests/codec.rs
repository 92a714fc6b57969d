//! Frames are written as they always were, read back as they were written, and refused when a bit is not as it was.

use super::samples::{any_message, configuration, copy, frames, payload, stamp, volume, write};
use crate::protocol::{Extent, Lacks, MAX_MARKS, Message};
use crate::replica::peer::header::{FrameError, HEADER, Header, Kind, MAX_FRAME};
use crate::replica::peer::packet::Packet;
use crate::replica::peer::payload::{BadLength, Payload};
use crate::store::format::tests::{flip_every_bit, golden};
use crate::volume::MAX_REQUEST_BLOCKS;
use proptest::prelude::*;

fn bytes(packet: &Packet) -> Vec<u8> {
    let encoded = packet.encode(volume());
    [encoded.head, encoded.data.to_vec()].concat()
}

/// Makes the header's checksum right again.
fn seal(bytes: &mut [u8]) {
    let crc = crc32c::crc32c(&bytes[..HEADER - 4]);
    bytes[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
}

/// What is said of a frame with other bytes at this place of its header.
fn changed(packet: &Packet, at: usize, field: &[u8]) -> Result<Packet, FrameError> {
    let mut bytes = bytes(packet);
    bytes[at..at + field.len()].copy_from_slice(field);
    seal(&mut bytes);
    Packet::parse(&bytes).map(|(_, packet, _)| packet)
}

fn frame(name: &str) -> Packet {
    frames().into_iter().find(|(known, _)| *known == name).expect("a sample").1
}

#[test]
fn each_kind_of_frame_is_written_and_read_as_it_always_was() {
    for (name, packet) in frames() {
        let golden = golden(&format!("frame-{name}-v1.bin"), &bytes(&packet));
        let with_more = [golden, vec![1, 2, 3]].concat();
        assert_eq!(Packet::parse(&with_more), Ok((volume(), packet, &[1, 2, 3][..])), "{name}");
    }
}

#[test]
fn a_flipped_bit_is_refused_or_found_where_the_data_is_written() {
    for (name, packet) in frames() {
        let head = packet.encode(volume()).head.len();
        flip_every_bit(&bytes(&packet), head, |at, bytes| match Packet::parse(bytes) {
            Ok((_, Packet::Message(_, payload), _)) if at >= head => assert!(payload.check().is_err(), "{name} {at}"),
            Ok(_) => panic!("{name}: a flipped bit in byte {at} is not noticed"),
            Err(_) => assert!(at < head, "{name} {at}"),
        });
    }
}

#[test]
fn a_frame_that_was_cut_short_is_refused() {
    for (name, packet) in frames() {
        let bytes = bytes(&packet);
        for length in (0..HEADER + 80).chain((HEADER + 80..bytes.len()).step_by(97)).take_while(|l| *l < bytes.len()) {
            let refused = Packet::parse(&bytes[..length]);
            assert!(matches!(refused, Err(FrameError::Truncated { have, .. }) if have == length), "{name} {length}");
        }
    }
}

#[test]
fn impossible_fields_under_a_right_checksum_are_refused() {
    let heartbeat = Packet::Heartbeat;
    assert_eq!(changed(&heartbeat, 4, &[2, 0]), Err(FrameError::Version(2)));
    assert_eq!(changed(&heartbeat, 6, &[99]), Err(FrameError::Kind(99)));
    assert_eq!(changed(&heartbeat, 56, &[1]), Err(FrameError::Field("unused")));
    let huge = |blocks: u32, length: u32| [length.to_le_bytes(), blocks.to_le_bytes()].concat();
    let refused = changed(&heartbeat, 8, &huge(257, 257 * 4100));
    assert_eq!(refused, Err(FrameError::TooLarge { length: 257 * 4100, blocks: 257 }));
    let refused = changed(&heartbeat, 8, &huge(0, u32::MAX));
    assert_eq!(refused, Err(FrameError::TooLarge { length: u32::MAX, blocks: 0 }));
    assert_eq!(changed(&heartbeat, 8, &huge(2, 4100)), Err(FrameError::Field("length")));
    let prepare = frame("prepare");
    assert_eq!(changed(&prepare, 7, &[0]), Err(FrameError::Field("request")));
    assert_eq!(changed(&prepare, 7, &[6]), Err(FrameError::Field("seal")));
    assert_eq!(changed(&frame("seal"), 7, &[3]), Err(FrameError::Field("unused")));
    // A flush has no data.
    assert_eq!(changed(&prepare, 7, &[3]), Err(FrameError::Field("blocks")));
    assert_eq!(changed(&prepare, 64, &[1]), Err(FrameError::Field("range")));
    assert_eq!(changed(&prepare, 64, &[0xff; 8]), Err(FrameError::Field("range")));
    assert_eq!(changed(&prepare, 80, &[0]), Err(FrameError::Field("range")));
    assert_eq!(changed(&prepare, 80, &[2]), Err(FrameError::Field("blocks")));
    assert_eq!(changed(&prepare, 80, &257u32.to_le_bytes()), Err(FrameError::Field("range")));
    assert_eq!(changed(&frame("prepared"), 7, &[5]), Err(FrameError::Field("result")));
    assert_eq!(changed(&frame("prepared"), 64, &[1]), Err(FrameError::Field("unused")));
    assert_eq!(changed(&frame("joined"), 7, &[2]), Err(FrameError::Field("unused")));
    assert_eq!(changed(&frame("joined"), 80, &[2]), Err(FrameError::Field("extents")));
    assert_eq!(changed(&frame("renew"), 80, &[0xff; 4]), Err(FrameError::Field("nanoseconds")));
    assert_eq!(changed(&frame("refuse"), 7, &[0]), Err(FrameError::Field("reason")));
    assert_eq!(changed(&frame("hello"), 56, &[1]), Err(FrameError::Field("unused")));
}

#[test]
fn impossible_configurations_are_refused() {
    let parse = |configuration| {
        let packet = Packet::Message(Message::Invite(Box::new(configuration)), Payload::default());
        Packet::parse(&bytes(&packet)).map(|(_, read, _)| assert_eq!(read, packet))
    };
    assert_eq!(parse(configuration()), Ok(()));
    let refused = Err(FrameError::Field("configuration"));
    let mut twice = configuration();
    twice.secondaries.insert(copy(1));
    assert_eq!(parse(twice), refused);
    let mut many = configuration();
    many.candidates.insert(copy(5), Lacks::Everything);
    assert_eq!(parse(many), refused);
    let mut later = configuration();
    later.term = stamp(2, 8);
    assert_eq!(parse(later), refused);
}

#[test]
fn the_largest_frames_are_within_the_limit() {
    let hot = (0..MAX_MARKS as u32).map(Extent).collect();
    let joined = Message::Joined { frame: super::samples::frame(), intact: false, hot };
    let joined = Packet::Message(joined, Payload::default());
    let data = vec![7; MAX_REQUEST_BLOCKS as usize * 4096];
    let request = crate::protocol::Request::Write(super::samples::range(0, MAX_REQUEST_BLOCKS));
    let Message::Prepare { frame, serial, floor, .. } = write(1, 1) else { panic!("a write") };
    let prepare = Message::Prepare { frame, serial, floor, request };
    let prepare = Packet::Message(prepare, Payload::new(data.into()).expect("a request's data"));
    for packet in [joined, prepare] {
        let bytes = bytes(&packet);
        assert!(bytes.len() <= MAX_FRAME);
        assert_eq!(Packet::parse(&bytes), Ok((volume(), packet, &[][..])));
    }
}

#[test]
fn data_is_whole_blocks_and_damage_is_named() {
    assert_eq!(Payload::new(vec![0; 4095].into()), Err(BadLength(4095)));
    assert_eq!(Payload::new(vec![0; 257 * 4096].into()), Err(BadLength(257 * 4096)));
    assert_eq!(Payload::gather(257 * 4096, |_, _| {}), Err(BadLength(257 * 4096)));
    let data: Vec<u8> = (0..3 * 4096u32).map(|byte| (byte / 7) as u8).collect();
    let gathered = Payload::gather(data.len(), |at, block| block.copy_from_slice(&data[at..at + block.len()]));
    assert_eq!(gathered, Payload::new(data.clone().into()));
    let payload = payload(3);
    assert_eq!((payload.blocks(), payload.crcs().count(), payload.check()), (3, 3, Ok(())));
    let mut bytes = bytes(&Packet::Message(write(1, 3), payload));
    *bytes.last_mut().expect("data") ^= 1;
    let Ok((_, Packet::Message(_, damaged), _)) = Packet::parse(&bytes) else { panic!("the frame itself is good") };
    assert_eq!(damaged.check().map_err(|damaged| damaged.block), Err(2));
}

proptest! {
    #[test]
    fn any_message_is_read_as_it_was_written(packet in any_message()) {
        let bytes = bytes(&packet);
        prop_assert_eq!(Packet::parse(&bytes), Ok((volume(), packet, &[][..])));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(mut noise in proptest::collection::vec(any::<u8>(), 0..400), kind: u8) {
        let _ = Packet::parse(&noise);
        if noise.len() >= HEADER {
            // Checksums that are right, so that the fields are looked at.
            let body = noise.len() - HEADER;
            noise[..6].copy_from_slice(b"TDMP\x01\x00");
            noise[6] = [1, 2, 3, 4, 5, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25][usize::from(kind) % 15];
            noise[8..16].copy_from_slice(&[(body as u32).to_le_bytes(), [0; 4]].concat());
            let crc = crc32c::crc32c(&noise[HEADER..]);
            noise[84..88].copy_from_slice(&crc.to_le_bytes());
            seal(&mut noise);
            if let Ok((volume, packet, rest)) = Packet::parse(&noise) {
                let encoded = packet.encode(volume);
                prop_assert_eq!(&noise[..noise.len() - rest.len()], &[encoded.head, encoded.data.to_vec()].concat());
            }
        }
    }
}

#[test]
fn header_and_kind_are_one_to_one() {
    let header =
        Header { operation: 3, serial: crate::protocol::SerialNumber(4), ..Header::new(Kind::Prepare, volume()) };
    assert_eq!(Header::decode(&header.encode()), Ok(header));
}
