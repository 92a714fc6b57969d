//! One frame of each kind, and any message at all.

use crate::protocol::{
    BlockSet, Configuration, ConfigurationVersion, DiskError, Extent, Frame, Generation, Incarnation, Lacks,
    MAX_COPIES, Message, Now, Piece, Request, SealName, SerialNumber, Session, Stamp,
};
use crate::replica::peer::hello::{ENCRYPTED, Hello, Nonce, Party, Reason};
use crate::replica::peer::packet::Packet;
use crate::replica::peer::payload::{Payload, Sealed, digests};
use crate::tls::Name;
use crate::volume::{BLOCK_SIZE, BlockRange, ClusterId, InstanceId, SnapshotId, VolumeId};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use std::time::Duration;

pub fn volume() -> VolumeId {
    VolumeId::from_bytes([0x22; 16])
}

pub fn copy(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

pub fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

pub fn stamp(generation: u64, version: u64) -> Stamp {
    Stamp { generation: Generation(generation), version: ConfigurationVersion(version) }
}

pub fn frame() -> Frame {
    Frame { stamp: stamp(2, 7), incarnation: Incarnation(0x1122_3344_5566_7788) }
}

pub fn range(start: u64, count: u32) -> BlockRange {
    BlockRange::new(start, count).expect("a range")
}

/// Blocks with other content each.
pub fn payload(blocks: u8) -> Payload {
    let data: Vec<u8> = (0..blocks).flat_map(|block| vec![block ^ 0x5a; BLOCK_SIZE as usize]).collect();
    Payload::new(data.into()).expect("whole blocks")
}

pub fn write(serial: u64, blocks: u8) -> Message {
    let request = Request::Write(range(9, blocks.into()));
    Message::Prepare { frame: frame(), serial: SerialNumber(serial), floor: SerialNumber(3), request }
}

pub fn session() -> Session {
    Session { host: Incarnation(0x1122_3344_5566_7788), number: 9 }
}

pub fn ask(serial: u64, blocks: u8) -> Message {
    let request = Request::Write(range(9, blocks.into()));
    Message::Ask { session: session(), serial: SerialNumber(serial), request }
}

pub fn seal(serial: u64) -> Message {
    let request = Request::Seal(SealName(2));
    Message::Prepare { frame: frame(), serial: SerialNumber(serial), floor: SerialNumber(3), request }
}

/// Every other block of a range.
pub fn piece(range: BlockRange) -> Piece {
    let mut blocks = BlockSet::default();
    (0..range.count()).step_by(2).for_each(|block| blocks.insert(block, 1));
    Piece::new(range, blocks).expect("a block")
}

pub fn sealed(number: u8) -> Payload {
    Payload::seal(Sealed { snapshot: SnapshotId::from_bytes([number; 16]), created_ms: 0x0102_0304 })
}

pub fn hello() -> Hello {
    Hello {
        compatible: 0,
        incompatible: ENCRYPTED,
        cluster: ClusterId::from_bytes([0x33; 16]),
        volume: volume(),
        from: Party { node: name("node-1"), copy: copy(1) },
        to: Party { node: name("node-2"), copy: copy(2) },
        generation: Generation(2),
        incarnation: Incarnation(77),
        nonce: Nonce([0x44; 16]),
    }
}

pub fn configuration() -> Configuration {
    Configuration {
        stamp: stamp(2, 7),
        term: stamp(2, 5),
        primary: Some(copy(1)),
        secondaries: [copy(2)].into(),
        candidates: [(copy(3), Lacks::Since(stamp(2, 6))), (copy(4), Lacks::Everything)].into(),
        lost: Stamp::default(),
    }
}

/// The same after a loss.
pub fn after_a_loss() -> Configuration {
    Configuration { lost: stamp(2, 6), ..configuration() }
}

fn entered(lost: Stamp) -> Message {
    Message::Entered { client: Incarnation(77), attempt: 3, session: session(), lost }
}

/// With the names of their golden files.
pub fn frames() -> Vec<(&'static str, Packet)> {
    let message = |message| Packet::Message(message, Payload::default());
    let (serial, floor, sent) = (SerialNumber(12), SerialNumber(3), Now(Duration::new(5, 6)));
    let hot = [Extent(0), Extent(5), Extent(u32::MAX)].into();
    vec![
        ("hello", Packet::Hello(hello())),
        ("welcome", Packet::Welcome(hello(), Nonce([0x55; 16]))),
        ("confirm", Packet::Confirm(Nonce([0x66; 16]))),
        ("refuse", Packet::Refuse(Reason::OtherDisk)),
        ("heartbeat", Packet::Heartbeat),
        ("invite", message(Message::Invite(Box::new(configuration())))),
        ("invite-lost", message(Message::Invite(Box::new(after_a_loss())))),
        ("joined", message(Message::Joined { frame: frame(), intact: true, hot })),
        ("prepare", Packet::Message(write(12, 1), payload(1))),
        ("seal", Packet::Message(seal(12), sealed(0x77))),
        ("prepared", message(Message::Prepared { frame: frame(), serial, result: Err(DiskError::Corrupt) })),
        ("renew", message(Message::Renew { frame: frame(), sent })),
        ("granted", message(Message::Granted { frame: frame(), sent })),
        ("reconciled", message(Message::Reconciled(frame()))),
        ("settled", message(Message::Settled(frame()))),
        ("clear", message(Message::Clear { frame: frame(), below: serial })),
        ("refused", message(Message::Refused(stamp(3, 1)))),
        (
            "copy",
            Packet::Message(Message::Copy { frame: frame(), serial, floor, piece: piece(range(9, 3)) }, payload(2)),
        ),
        (
            "compare",
            Packet::Message(
                Message::Compare { frame: frame(), serial, floor, range: range(9, 2) },
                Payload::digests(digests(payload(2).data())),
            ),
        ),
        ("compared", message(Message::Compared { frame: frame(), serial, differs: Ok(BlockSet::first(2)) })),
        ("enter", message(Message::Enter { client: Incarnation(77), attempt: 3 })),
        ("entered", message(entered(Stamp::default()))),
        ("entered-lost", message(entered(stamp(2, 6)))),
        ("ask", Packet::Message(ask(12, 1), payload(1))),
        ("answer", Packet::Message(Message::Answer { session: session(), serial, result: Ok(()) }, payload(2))),
    ]
}

fn any_stamp() -> impl Strategy<Value = Stamp> {
    (any::<u64>(), any::<u64>()).prop_map(|(generation, version)| stamp(generation, version))
}

fn any_request() -> impl Strategy<Value = Request> {
    let range = (0u64..1 << 20, 1u32..=4).prop_map(|(start, count)| range(start, count));
    (0..6, range, any::<u32>()).prop_map(|(kind, range, number)| match kind {
        0 => Request::Read(range),
        1 => Request::Write(range),
        2 => Request::Flush,
        3 => Request::Discard(range),
        4 => Request::WriteZeroes(range),
        _ => Request::Seal(SealName(number)),
    })
}

fn any_configuration() -> impl Strategy<Value = Configuration> {
    let roles = btree_map(any::<[u8; 16]>(), (0..4u8, any_stamp()), 0..=MAX_COPIES);
    (any_stamp(), any_stamp(), roles).prop_map(|(one, other, roles)| {
        let (term, stamp) = (one.min(other), one.max(other));
        let (primary, secondaries, candidates) = Default::default();
        let lost = if roles.len() > 1 { term } else { Stamp::default() };
        let mut configuration = Configuration { stamp, term, primary, secondaries, candidates, lost };
        for (bytes, (role, since)) in roles {
            let copy = InstanceId::from_bytes(bytes);
            match role {
                0 if configuration.primary.is_none() => configuration.primary = Some(copy),
                0 | 1 => drop(configuration.secondaries.insert(copy)),
                2 => drop(configuration.candidates.insert(copy, Lacks::Everything)),
                _ => drop(configuration.candidates.insert(copy, Lacks::Since(since))),
            }
        }
        configuration
    })
}

/// Any message, with data where it has some.
pub fn any_message() -> impl Strategy<Value = Packet> {
    let frame =
        (any_stamp(), any::<u64>()).prop_map(|(stamp, number)| Frame { stamp, incarnation: Incarnation(number) });
    let numbers = (any::<u64>(), any::<u64>(), 0..1_000_000_000u32, 0..5u8);
    let hot = vec(any::<u32>().prop_map(Extent), 0..9);
    (0..17, frame, numbers, any_request(), any_configuration(), hot).prop_map(
        |(kind, frame, (one, other, nanoseconds, small), request, configuration, hot)| {
            let (serial, sent) = (SerialNumber(one), Now(Duration::new(other, nanoseconds)));
            let errors = [DiskError::NoSpace, DiskError::Failed, DiskError::Corrupt, DiskError::Fenced];
            let result = errors.get(usize::from(small)).map_or(Ok(()), |error| Err(*error));
            let message = match kind {
                0 => Message::Invite(Box::new(configuration)),
                1 => Message::Joined { frame, intact: small == 0, hot: hot.into() },
                2 | 3 => Message::Prepare { frame, serial, floor: SerialNumber(other), request },
                4 => Message::Prepared { frame, serial, result },
                5 => Message::Renew { frame, sent },
                6 => Message::Granted { frame, sent },
                7 => Message::Reconciled(frame),
                8 => Message::Clear { frame, below: serial },
                9 => Message::Copy {
                    frame,
                    serial,
                    floor: SerialNumber(other),
                    piece: piece(range(one >> 40, 1 + u32::from(small))),
                },
                10 => Message::Compare {
                    frame,
                    serial,
                    floor: SerialNumber(other),
                    range: range(one >> 40, 1 + u32::from(small)),
                },
                11 => Message::Compared { frame, serial, differs: result.map(|()| BlockSet::first(nanoseconds % 300)) },
                12 => Message::Enter { client: frame.incarnation, attempt: other },
                13 => {
                    let session = Session { host: Incarnation(one), number: u64::from(nanoseconds) };
                    let lost = if small > 1 { frame.stamp } else { Stamp::default() };
                    Message::Entered { client: frame.incarnation, attempt: other, session, lost }
                }
                14 => Message::Ask { session: Session { host: frame.incarnation, number: other }, serial, request },
                15 => Message::Answer { session: Session { host: frame.incarnation, number: other }, serial, result },
                _ => Message::Refused(frame.stamp),
            };
            let blocks = match &message {
                Message::Prepare { request: Request::Write(range), .. }
                | Message::Ask { request: Request::Write(range), .. } => range.count() as u8,
                Message::Prepared { result: Ok(()), .. } | Message::Answer { result: Ok(()), .. } => small,
                Message::Copy { piece, .. } if other % 2 == 0 => piece.count() as u8,
                _ => 0,
            };
            let seals = matches!(message, Message::Prepare { request: Request::Seal(_), .. });
            let compared = match &message {
                Message::Compare { range, .. } => Some(digests(payload(range.count() as u8).data())),
                _ => None,
            };
            let plain = || if seals { sealed(small) } else { payload(blocks) };
            let payload = compared.map_or_else(plain, Payload::digests);
            Packet::Message(message, payload)
        },
    )
}
