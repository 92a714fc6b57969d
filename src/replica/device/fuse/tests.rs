use super::*;
use proptest::prelude::*;

fn request(opcode: u32, arguments: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    bytes.extend(((HEADER + arguments.len()) as u32).to_ne_bytes());
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend(77u64.to_ne_bytes());
    bytes.extend(FILE.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(arguments);
    bytes
}

fn transfer(opcode: u32, offset: u64, length: u32, payload: usize) -> Vec<u8> {
    let mut arguments = [0; 40].to_vec();
    arguments[8..16].copy_from_slice(&offset.to_ne_bytes());
    arguments[16..20].copy_from_slice(&length.to_ne_bytes());
    arguments.extend(vec![1; payload]);
    request(opcode, &arguments)
}

fn fallocate(mode: u32, offset: u64, length: u64) -> Vec<u8> {
    let mut arguments = [0; 32];
    arguments[8..16].copy_from_slice(&offset.to_ne_bytes());
    arguments[16..24].copy_from_slice(&length.to_ne_bytes());
    arguments[24..28].copy_from_slice(&mode.to_ne_bytes());
    request(opcode::FALLOCATE, &arguments)
}

fn size() -> VolumeSize {
    VolumeSize::try_from(1 << 20).expect("a size")
}

fn dispatch(bytes: &[u8]) -> Dispatch {
    Message::parse(bytes).expect("a request").dispatch(size())
}

fn blocks(start: u64, count: u32) -> BlockRange {
    BlockRange::new(start, count).expect("a range")
}

#[test]
fn transfers_become_requests_of_the_core() {
    let read = transfer(opcode::READ, 8192, 4096, 0);
    assert_eq!(dispatch(&read), Dispatch::Submit(protocol::Request::Read(blocks(2, 1))));
    let write = transfer(opcode::WRITE, 4096, 8192, 8192);
    assert_eq!(dispatch(&write), Dispatch::Submit(protocol::Request::Write(blocks(1, 2))));
    // The payload may be elsewhere, the header knows its length.
    assert_eq!(dispatch(&write[..WRITE_HEADER]), dispatch(&write));
    assert_eq!(dispatch(&request(opcode::FSYNC, &[0; 16])), Dispatch::Submit(protocol::Request::Flush));
    let discard = fallocate(PUNCH_HOLE | KEEP_SIZE, 0, 1 << 20);
    assert_eq!(dispatch(&discard), Dispatch::Submit(protocol::Request::Discard(blocks(0, 256))));
    let zeroes = fallocate(ZERO_RANGE | KEEP_SIZE, 4096, 4096);
    assert_eq!(dispatch(&zeroes), Dispatch::Submit(protocol::Request::WriteZeroes(blocks(1, 1))));
    assert_eq!(dispatch(&fallocate(0, 0, 4096)), error(Errno::EOPNOTSUPP));
}

#[test]
fn ranges_off_the_blocks_or_off_the_volume_are_invalid() {
    for (offset, length) in [(512, 4096), (0, 512), (0, 0), (1 << 20, 4096), (u64::MAX - 4095, 4096)] {
        assert_eq!(dispatch(&transfer(opcode::READ, offset, length, 0)), error(Errno::EINVAL), "{offset}+{length}");
        assert_eq!(
            dispatch(&transfer(opcode::WRITE, offset, length, length as usize)),
            error(Errno::EINVAL),
            "{offset}+{length}"
        );
    }
    assert_eq!(dispatch(&fallocate(PUNCH_HOLE | KEEP_SIZE, 0, u64::MAX)), error(Errno::EINVAL));
}

#[test]
fn a_write_without_its_payload_is_no_write() {
    let short = transfer(opcode::WRITE, 0, 8192, 4096);
    assert_eq!(
        Message::parse(&short),
        Err(Malformed::Arguments { unique: 77, opcode: opcode::WRITE, length: 80 + 4096 })
    );
    assert_eq!(Message::parse(&short[..39]), Err(Malformed::Header(39)));
}

#[test]
fn a_flush_is_never_answered_in_a_way_that_ends_flushes() {
    let flush = Message::parse(&request(opcode::FSYNC, &[0; 16])).expect("a request");
    for errno in [Errno::ENOSYS, Errno::EINVAL, Errno::EIO] {
        assert_eq!(flush.completion(Err(errno)), Reply::Error(Errno::EIO));
    }
    assert_eq!(flush.completion(Ok(())), Reply::Empty);
}

#[test]
fn a_transfer_is_answered_in_full() {
    let write = Message::parse(&transfer(opcode::WRITE, 0, 8192, 8192)).expect("a request");
    let (bytes, length) = write.completion(Ok(())).encode(write.unique);
    assert_eq!((length, &bytes[16..20]), (24, &8192u32.to_ne_bytes()[..]));
    let read = Message::parse(&transfer(opcode::READ, 0, 8192, 0)).expect("a request");
    let (bytes, length) = read.completion(Ok(())).encode(read.unique);
    assert_eq!((length, &bytes[..4]), (16, &(16 + 8192u32).to_ne_bytes()[..]));
    let (bytes, length) = read.completion(Err(Errno::EIO)).encode(read.unique);
    assert_eq!((length, &bytes[..8]), (16, &[16, 0, 0, 0, 251, 255, 255, 255][..]));
}

#[test]
fn replies_have_the_lengths_of_the_kernels_structures() {
    let size = size();
    let cases = [
        (Reply::Empty, 0),
        (Reply::Written { length: 1 }, 8),
        (Reply::Init { minor: 31, max_readahead: 0, flags: 0 }, 64),
        (Reply::Entry { size }, 128),
        (Reply::Attributes { node: FILE, size }, 104),
        (Reply::Opened { flags: 0 }, 16),
        (Reply::Statfs { size }, 80),
        (Reply::Directory { offset: 0, length: 4096 }, 64),
        (Reply::Directory { offset: 0, length: 40 }, 32),
        (Reply::Directory { offset: 2, length: 4096 }, 0),
    ];
    for (reply, body) in cases {
        assert_eq!(reply.encode(1).1, REPLY_HEADER + body, "{reply:?}");
    }
}

#[test]
fn kernels_without_asynchronous_direct_io_are_refused() {
    let all = WANTED | 1 << 16;
    assert_eq!(init(7, 31, 9, all), Reply::Init { minor: 31, max_readahead: 9, flags: WANTED });
    assert_eq!(init(7, 99, 9, all), Reply::Init { minor: OUR_MINOR, max_readahead: 9, flags: WANTED });
    assert_eq!(init(7, 31, 9, all & !ASYNC_DIO), Reply::Error(Errno::EPROTO));
    assert_eq!(init(7, 27, 9, all), Reply::Error(Errno::EPROTO));
    assert_eq!(init(6, 40, 9, all), Reply::Error(Errno::EPROTO));
    assert!(matches!(init(8, 0, 9, 0), Reply::Init { .. }));
}

#[test]
fn the_file_has_one_name_and_one_size() {
    let name = format!("{NAME_PREFIX}{}.57\0", VolumeId::random());
    let entry = Dispatch::Answer(Reply::Entry { size: size() });
    assert_eq!(dispatch(&request(opcode::LOOKUP, name.as_bytes())), entry);
    assert_eq!(dispatch(&request(opcode::LOOKUP, &name.as_bytes()[1..])), error(Errno::ENOENT));
    assert_eq!(dispatch(&request(opcode::LOOKUP, b"\xff\0")), error(Errno::ENOENT));
    assert!(Message::parse(&request(opcode::LOOKUP, b"tandem-")).is_err());
    let mut arguments = [0; 88];
    arguments[..4].copy_from_slice(&SET_SIZE.to_ne_bytes());
    assert_eq!(dispatch(&request(opcode::SETATTR, &arguments)), error(Errno::EPERM));
    arguments[16..24].copy_from_slice(&(1u64 << 20).to_ne_bytes());
    let attributes = Dispatch::Answer(Reply::Attributes { node: FILE, size: size() });
    assert_eq!(dispatch(&request(opcode::SETATTR, &arguments)), attributes);
}

proptest! {
    #[test]
    fn any_bytes_are_answered_without_a_panic(mut bytes: Vec<u8>, opcode in 0u32..64, length in 0u32..1024) {
        for forced in [false, true] {
            if forced && bytes.len() >= 8 {
                bytes[..4].copy_from_slice(&length.to_ne_bytes());
                bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            }
            if let Ok(message) = Message::parse(&bytes) {
                if let Dispatch::Answer(reply) = message.dispatch(size()) {
                    reply.encode(message.unique);
                }
                message.completion(Ok(())).encode(message.unique);
            }
        }
    }
}
