//! Messages of the core as frames.
//!
//! Invariants: no bytes make the decoder panic; a message has one encoding only, and anything else is refused, so what a
//! decoder accepts is encoded to the same bytes.

use super::header::{FrameError, Header, Kind};
use super::payload::{Attached, DIGEST, Payload, Sealed};
use crate::protocol::{
    BlockSet, COMPARED_BLOCKS, Configuration, ConfigurationVersion, DiskError, Extent, Frame, Generation, Incarnation,
    Lacks, MAX_COPIES, MAX_MARKS, Message, Now, Piece, Request, SealName, SerialNumber, Session, Stamp,
};
use crate::store::format::Input;
use crate::volume::{BLOCK_SIZE, BlockRange, InstanceId, MAX_REQUEST_BLOCKS, SnapshotId, VolumeId};
use std::time::Duration;

/// Header and body of a message with what goes with it; the header lacks the body's checksum.
pub fn encode(volume: VolumeId, message: &Message, payload: &Payload) -> (Header, Vec<u8>) {
    encode_parts(volume, message, payload.blocks(), payload.attached())
}

fn encode_parts(volume: VolumeId, message: &Message, blocks: u32, attached: &Attached) -> (Header, Vec<u8>) {
    let mut header = Header { blocks, ..Header::new(kind(message), volume) };
    let mut body = Vec::new();
    match message {
        Message::Invite(configuration) => {
            header.stamp = configuration.stamp;
            write_configuration(configuration, &mut body);
        }
        Message::Joined { frame, intact, hot } => {
            frame_into(*frame, &mut header);
            (header.operation, header.count) = (u8::from(*intact), hot.len() as u32);
            hot.iter().for_each(|extent| body.extend(extent.0.to_le_bytes()));
        }
        Message::Prepare { frame, serial, floor, request } => {
            frame_into(*frame, &mut header);
            (header.serial, header.value) = (*serial, floor.0);
            request_into(*request, &mut header);
            // snapshot (16), created (8)
            if let Attached::Sealed(Sealed { snapshot, created_ms }) = attached {
                body.extend(snapshot.to_bytes());
                body.extend(created_ms.to_le_bytes());
            }
        }
        Message::Copy { frame, serial, floor, piece } => {
            range_into(*frame, *serial, *floor, piece.range(), &mut header);
            body.extend(piece.blocks().to_bytes());
        }
        Message::Compare { frame, serial, floor, range } => {
            range_into(*frame, *serial, *floor, *range, &mut header);
            if let Attached::Digests(digests) = attached {
                body.extend_from_slice(digests);
            }
        }
        Message::Compared { frame, serial, differs } => {
            frame_into(*frame, &mut header);
            (header.serial, header.operation) = (*serial, result_number(differs.map(drop)));
            differs.iter().for_each(|blocks| body.extend(blocks.to_bytes()));
        }
        Message::Prepared { frame, serial, result } => {
            frame_into(*frame, &mut header);
            (header.serial, header.operation) = (*serial, result_number(*result));
        }
        Message::Renew { frame, sent } | Message::Granted { frame, sent } => {
            frame_into(*frame, &mut header);
            (header.value, header.count) = (sent.0.as_secs(), sent.0.subsec_nanos());
        }
        Message::Reconciled(frame) | Message::Settled(frame) => frame_into(*frame, &mut header),
        Message::Clear { frame, below } => {
            frame_into(*frame, &mut header);
            header.serial = *below;
        }
        Message::Refused(stamp) => header.stamp = *stamp,
        Message::Enter { client, attempt } => (header.incarnation, header.value) = (*client, *attempt),
        Message::Entered { client, attempt, session, lost } => {
            (header.incarnation, header.value) = (*client, *attempt);
            write_entered(*session, *lost, &mut body);
        }
        Message::Ask { session, serial, request } => {
            session_into(*session, *serial, &mut header);
            request_into(*request, &mut header);
        }
        Message::Answer { session, serial, result } => {
            session_into(*session, *serial, &mut header);
            header.operation = result_number(*result);
        }
    }
    header.body = body.len() as u32;
    (header, body)
}

fn range_into(frame: Frame, serial: SerialNumber, floor: SerialNumber, range: BlockRange, header: &mut Header) {
    frame_into(frame, header);
    (header.serial, header.value) = (serial, floor.0);
    (header.offset, header.count) = (range.offset(), range.count());
}

fn kind(message: &Message) -> Kind {
    match message {
        Message::Invite(_) => Kind::Invite,
        Message::Joined { .. } => Kind::Joined,
        Message::Prepare { .. } => Kind::Prepare,
        Message::Prepared { .. } => Kind::Prepared,
        Message::Renew { .. } => Kind::Renew,
        Message::Granted { .. } => Kind::Granted,
        Message::Reconciled(_) => Kind::Reconciled,
        Message::Settled(_) => Kind::Settled,
        Message::Clear { .. } => Kind::Clear,
        Message::Refused(_) => Kind::Refused,
        Message::Copy { .. } => Kind::Copy,
        Message::Compare { .. } => Kind::Compare,
        Message::Compared { .. } => Kind::Compared,
        Message::Enter { .. } => Kind::Enter,
        Message::Entered { .. } => Kind::Entered,
        Message::Ask { .. } => Kind::Ask,
        Message::Answer { .. } => Kind::Answer,
    }
}

/// The message of a frame whose checksums are right, and what goes with it.
pub fn decode(header: &Header, body: &[u8]) -> Result<(Message, Attached), FrameError> {
    let frame = Frame { stamp: header.stamp, incarnation: header.incarnation };
    let serial = header.serial;
    let message = match header.kind {
        Kind::Invite => Message::Invite(Box::new(read_configuration(header.stamp, body)?)),
        Kind::Joined => Message::Joined { frame, intact: header.operation == 1, hot: read_extents(header, body)? },
        Kind::Prepare => {
            let request = read_request(header)?;
            Message::Prepare { frame, serial, floor: SerialNumber(header.value), request }
        }
        Kind::Prepared => Message::Prepared { frame, serial, result: read_result(header.operation)? },
        Kind::Renew => Message::Renew { frame, sent: read_time(header)? },
        Kind::Granted => Message::Granted { frame, sent: read_time(header)? },
        Kind::Reconciled => Message::Reconciled(frame),
        Kind::Settled => Message::Settled(frame),
        Kind::Clear => Message::Clear { frame, below: serial },
        Kind::Refused => Message::Refused(header.stamp),
        Kind::Copy => {
            Message::Copy { frame, serial, floor: SerialNumber(header.value), piece: read_piece(header, body)? }
        }
        Kind::Compare => {
            Message::Compare { frame, serial, floor: SerialNumber(header.value), range: read_compared(header, body)? }
        }
        Kind::Compared => {
            let differs =
                read_result(header.operation)?.map_or_else(|error| Ok(Err(error)), |()| read_set(body).map(Ok));
            Message::Compared { frame, serial, differs: differs? }
        }
        Kind::Enter => Message::Enter { client: header.incarnation, attempt: header.value },
        Kind::Entered => read_entered(header, body)?,
        Kind::Ask => Message::Ask { session: session(header), serial, request: read_request(header)? },
        Kind::Answer => Message::Answer { session: session(header), serial, result: read_result(header.operation)? },
        Kind::Hello | Kind::Welcome | Kind::Confirm | Kind::Refuse | Kind::Heartbeat => {
            return Err(FrameError::Field("kind"));
        }
    };
    let attached = match message {
        Message::Prepare { request: Request::Seal(_), .. } => Attached::Sealed(read_sealed(body)?),
        Message::Compare { .. } => Attached::Digests(body.to_vec().into()),
        _ => Attached::Nothing,
    };
    if !may_carry(&message, header.blocks) {
        return Err(FrameError::Field("blocks"));
    }
    // What the kind does not use is 0, and a body that says the same in other bytes is none of ours.
    let (again, bytes) = encode_parts(header.volume, &message, header.blocks, &attached);
    if bytes != body || (Header { body_crc: header.body_crc, ..again }) != *header {
        return Err(FrameError::Field("unused"));
    }
    Ok((message, attached))
}

/// Whether a payload goes with a message.
pub fn may_have(message: &Message, payload: &Payload) -> bool {
    may_carry(message, payload.blocks())
        && match (message, payload.attached()) {
            (Message::Prepare { request: Request::Seal(_), .. }, attached) => matches!(attached, Attached::Sealed(_)),
            (Message::Compare { range, .. }, Attached::Digests(digests)) => {
                digests.len() == DIGEST * range.count() as usize
            }
            (Message::Compare { .. }, _) => false,
            (_, attached) => *attached == Attached::Nothing,
        }
}

/// Whether a message may have a payload of so many blocks: a write, and the answer to a read.
fn may_carry(message: &Message, blocks: u32) -> bool {
    match message {
        Message::Prepare { request: Request::Write(range), .. }
        | Message::Ask { request: Request::Write(range), .. } => range.count() == blocks,
        Message::Prepared { result: Ok(()), .. } | Message::Answer { result: Ok(()), .. } => {
            blocks <= MAX_REQUEST_BLOCKS
        }
        // Without data they are zeros.
        Message::Copy { piece, .. } => piece.count() == blocks || blocks == 0,
        Message::Compare { .. } | Message::Compared { .. } => blocks == 0,
        Message::Prepare { .. } | Message::Prepared { .. } | Message::Invite(_) | Message::Joined { .. } => blocks == 0,
        Message::Renew { .. } | Message::Granted { .. } | Message::Reconciled(_) | Message::Settled(_) => blocks == 0,
        Message::Clear { .. } | Message::Refused(_) | Message::Enter { .. } | Message::Entered { .. } => blocks == 0,
        Message::Ask { .. } | Message::Answer { .. } => blocks == 0,
    }
}

fn session_into(session: Session, serial: SerialNumber, header: &mut Header) {
    (header.incarnation, header.value, header.serial) = (session.host, session.number, serial);
}

fn session(header: &Header) -> Session {
    Session { host: header.incarnation, number: header.value }
}

/// host (8), number (8), lost (16) if any.
fn write_entered(session: Session, lost: Stamp, body: &mut Vec<u8>) {
    body.extend([session.host.0, session.number].iter().flat_map(|number| number.to_le_bytes()));
    write_lost(lost, body);
}

fn read_entered(header: &Header, body: &[u8]) -> Result<Message, FrameError> {
    let mut input = Input { bytes: body, at: 0 };
    let session = input.u64().zip(input.u64()).map(|(host, number)| Session { host: Incarnation(host), number });
    let session = session.ok_or(FrameError::Field("session"))?;
    let lost = read_lost(&mut input).ok_or(FrameError::Field("lost"))?;
    Ok(Message::Entered { client: header.incarnation, attempt: header.value, session, lost })
}

fn frame_into(frame: Frame, header: &mut Header) {
    (header.stamp, header.incarnation) = (frame.stamp, frame.incarnation);
}

fn request_into(request: Request, header: &mut Header) {
    header.operation = match request {
        Request::Read(_) => 1,
        Request::Write(_) => 2,
        Request::Flush => 3,
        Request::Discard(_) => 4,
        Request::WriteZeroes(_) => 5,
        Request::Seal(_) => 6,
    };
    if let Some(range) = request.range() {
        (header.offset, header.count) = (range.offset(), range.count());
    }
    if let Request::Seal(name) = request {
        header.count = name.0;
    }
}

fn read_range(header: &Header) -> Result<BlockRange, FrameError> {
    let start = header.offset.is_multiple_of(BLOCK_SIZE).then_some(header.offset / BLOCK_SIZE);
    start.and_then(|start| BlockRange::new(start, header.count)).ok_or(FrameError::Field("range"))
}

fn read_set(body: &[u8]) -> Result<BlockSet, FrameError> {
    body.try_into().map(BlockSet::from_bytes).map_err(|_| FrameError::Field("blocks"))
}

fn read_piece(header: &Header, body: &[u8]) -> Result<Piece, FrameError> {
    Piece::new(read_range(header)?, read_set(body)?).ok_or(FrameError::Field("blocks"))
}

/// A range of which the body has all digests.
fn read_compared(header: &Header, body: &[u8]) -> Result<BlockRange, FrameError> {
    let range = read_range(header)?;
    let fits = range.count() <= COMPARED_BLOCKS && body.len() == DIGEST * range.count() as usize;
    if fits { Ok(range) } else { Err(FrameError::Field("digests")) }
}

fn read_request(header: &Header) -> Result<Request, FrameError> {
    let range = || read_range(header);
    // One frame carries the data of one request.
    let small = || {
        range().and_then(|range| match range.count() {
            1..=MAX_REQUEST_BLOCKS => Ok(range),
            _ => Err(FrameError::Field("range")),
        })
    };
    Ok(match header.operation {
        1 => Request::Read(small()?),
        2 => Request::Write(small()?),
        3 => Request::Flush,
        4 => Request::Discard(range()?),
        5 => Request::WriteZeroes(range()?),
        6 => Request::Seal(SealName(header.count)),
        _ => return Err(FrameError::Field("request")),
    })
}

fn read_sealed(body: &[u8]) -> Result<Sealed, FrameError> {
    let mut input = Input { bytes: body, at: 0 };
    let snapshot = input.take().map(SnapshotId::from_bytes);
    snapshot
        .zip(input.u64())
        .map(|(snapshot, created_ms)| Sealed { snapshot, created_ms })
        .ok_or(FrameError::Field("seal"))
}

fn result_number(result: Result<(), DiskError>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(DiskError::NoSpace) => 1,
        Err(DiskError::Failed) => 2,
        Err(DiskError::Corrupt) => 3,
        Err(DiskError::Fenced) => 4,
    }
}

fn read_result(number: u8) -> Result<Result<(), DiskError>, FrameError> {
    Ok(match number {
        0 => Ok(()),
        1 => Err(DiskError::NoSpace),
        2 => Err(DiskError::Failed),
        3 => Err(DiskError::Corrupt),
        4 => Err(DiskError::Fenced),
        _ => return Err(FrameError::Field("result")),
    })
}

fn read_time(header: &Header) -> Result<Now, FrameError> {
    if header.count >= 1_000_000_000 {
        return Err(FrameError::Field("nanoseconds"));
    }
    Ok(Now(Duration::new(header.value, header.count)))
}

fn read_extents(header: &Header, body: &[u8]) -> Result<Box<[Extent]>, FrameError> {
    let (extents, rest) = body.as_chunks::<4>();
    if !rest.is_empty() || extents.len() != header.count as usize || extents.len() > MAX_MARKS {
        return Err(FrameError::Field("extents"));
    }
    Ok(extents.iter().map(|extent| Extent(u32::from_le_bytes(*extent))).collect())
}

fn write_stamp(stamp: Stamp, body: &mut Vec<u8>) {
    body.extend(stamp.generation.0.to_le_bytes());
    body.extend(stamp.version.0.to_le_bytes());
}

fn read_stamp(input: &mut Input<'_>) -> Option<Stamp> {
    Some(Stamp { generation: Generation(input.u64()?), version: ConfigurationVersion(input.u64()?) })
}

/// The end of a body, if writes were ever lost: who does not know of it refuses the frame.
fn write_lost(lost: Stamp, body: &mut Vec<u8>) {
    if lost != Stamp::default() {
        write_stamp(lost, body);
    }
}

fn read_lost(input: &mut Input<'_>) -> Option<Stamp> {
    if input.at == input.bytes.len() { Some(Stamp::default()) } else { read_stamp(input) }
}

/// term (16), primary (1 + 16), secondaries (1 + 16 each), candidates (1 + 33 each: copy, since or everything), lost (16) if any.
fn write_configuration(configuration: &Configuration, body: &mut Vec<u8>) {
    write_stamp(configuration.term, body);
    body.push(u8::from(configuration.primary.is_some()));
    configuration.primary.iter().for_each(|copy| body.extend(copy.to_bytes()));
    body.push(configuration.secondaries.len() as u8);
    configuration.secondaries.iter().for_each(|copy| body.extend(copy.to_bytes()));
    body.push(configuration.candidates.len() as u8);
    for (copy, lacks) in &configuration.candidates {
        body.extend(copy.to_bytes());
        match lacks {
            Lacks::Since(since) => {
                body.push(1);
                write_stamp(*since, body);
            }
            Lacks::Everything => body.push(0),
        }
    }
    write_lost(configuration.lost, body);
}

fn read_configuration(stamp: Stamp, body: &[u8]) -> Result<Configuration, FrameError> {
    let read = parse_configuration(stamp, &mut Input { bytes: body, at: 0 });
    let configuration = read.ok_or(FrameError::Field("configuration"))?;
    let mut copies: Vec<InstanceId> = configuration.copies().collect();
    let named = copies.len();
    copies.sort_unstable();
    copies.dedup();
    if named != copies.len() || named > MAX_COPIES || configuration.term > stamp || configuration.lost > stamp {
        return Err(FrameError::Field("configuration"));
    }
    Ok(configuration)
}

fn parse_configuration(stamp: Stamp, input: &mut Input<'_>) -> Option<Configuration> {
    let copy = |input: &mut Input<'_>| input.take().map(InstanceId::from_bytes);
    let term = read_stamp(input)?;
    let primary = if input.u8()? == 0 { None } else { Some(copy(input)?) };
    // A number of copies is one byte: at most 255 rounds.
    let secondaries = (0..input.u8()?).map(|_| copy(input)).collect::<Option<_>>()?;
    let candidates = (0..input.u8()?).map(|_| {
        let copy = copy(input)?;
        let lacks = if input.u8()? == 0 { Lacks::Everything } else { Lacks::Since(read_stamp(input)?) };
        Some((copy, lacks))
    });
    let candidates = candidates.collect::<Option<_>>()?;
    let lost = read_lost(input)?;
    Some(Configuration { stamp, term, primary, secondaries, candidates, lost })
}
