//! Parses arbitrary FUSE requests and answers them: no panic, and nothing outside the volume or too large is submitted.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem::protocol::Request;
use tandem::replica::device::fuse::{Dispatch, MAX_REPLY, Message};
use tandem::volume::{MAX_REQUEST_BLOCKS, VolumeSize};

fuzz_target!(|data: &[u8]| {
    let Ok(message) = Message::parse(data) else { return };
    for bytes in [1 << 20, 1 << 30, 8 << 40] {
        let size = VolumeSize::try_from(bytes).expect("a size");
        match message.dispatch(size) {
            Dispatch::Submit(request) => {
                let range = match request {
                    Request::Read(range) | Request::Write(range) => {
                        assert!(range.count() <= MAX_REQUEST_BLOCKS);
                        Some(range)
                    }
                    Request::Discard(range) | Request::WriteZeroes(range) => Some(range),
                    Request::Flush => None,
                    Request::Seal(_) => panic!("the kernel cannot seal"),
                };
                assert!(range.is_none_or(|range| range.end() <= size.blocks()));
                let (_, length) = message.completion(Ok(())).encode(message.unique);
                assert!(length <= MAX_REPLY);
            }
            Dispatch::Answer(reply) => assert!(reply.encode(message.unique).1 <= MAX_REPLY),
            Dispatch::Ignore => {}
        }
    }
});
