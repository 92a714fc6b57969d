//! What one end of a connection makes of its bytes, however they come.

use super::samples::{copy, payload, volume, write};
use crate::replica::peer::Event;
use crate::replica::peer::line::{Heard, Line};
use crate::replica::peer::packet::Packet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// A connection in the clear, and the other end of its socket.
fn line() -> (Line, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let there = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    let (here, _) = listener.accept().expect("accepted");
    here.set_nonblocking(true).expect("set");
    there.set_nodelay(true).expect("set");
    (Line::new(here, None, volume(), copy(2)), there)
}

fn frame(serial: u64, blocks: u8) -> (Event, Vec<u8>) {
    let (message, payload) = (write(serial, blocks), payload(blocks));
    let encoded = Packet::Message(message.clone(), payload.clone()).encode(volume());
    (Event::Received { from: copy(2), message, payload }, [&encoded.head[..], &encoded.data].concat())
}

/// The next message; what was written is there at the latest after a while.
fn hear(line: &Line) -> Event {
    let began = Instant::now();
    loop {
        match line.receive() {
            Heard::Event(event) => return event,
            Heard::Later => {}
            Heard::Nothing => assert!(began.elapsed() < super::loopback::LONG, "nothing is heard"),
            Heard::Ended => panic!("it has ended"),
        }
    }
}

#[test]
fn frames_are_whole_however_they_are_cut() {
    let (line, mut there) = line();
    let heartbeat = Packet::Heartbeat.encode(volume()).head;
    let (first, bytes) = frame(1, 2);
    let (second, more) = frame(2, u8::MAX);
    let all = [&heartbeat[..], &bytes, &heartbeat, &more, &bytes].concat();
    let writer = std::thread::spawn(move || {
        // Single bytes over the headers, then ever larger pieces that end anywhere.
        let (mut rest, mut size) = (&all[..], 1);
        for count in 0.. {
            let (piece, behind) = rest.split_at(size.min(rest.len()));
            there.write_all(piece).expect("written");
            if behind.is_empty() {
                return there;
            }
            rest = behind;
            size += usize::from(count > 300) * (1 + size / 3);
        }
        there
    });
    assert_eq!(hear(&line), first);
    assert_eq!(hear(&line), second);
    assert_eq!(hear(&line), first);
    let Event::Received { payload, .. } = second else { panic!("a message") };
    assert_eq!(payload.check(), Ok(()));
    let there = writer.join().expect("ends");
    assert!(matches!(line.receive(), Heard::Nothing));
    drop(there);
    while !matches!(line.receive(), Heard::Ended) {}
}

/// A reader that is woken by no single packet of a large frame is woken by its end, and by what comes after it.
#[test]
fn whoever_waits_for_the_socket_hears_each_frame() {
    let (line, mut there) = line();
    let frames: Vec<_> = [255, 1, 40, 255, 17, 33, 255].into_iter().zip(1..).map(|(n, at)| frame(at, n)).collect();
    let all: Vec<_> = frames.iter().map(|(_, bytes)| bytes.clone()).collect();
    // One end waits for the other, so that nothing that comes later wakes the reader.
    let (next, told) = std::sync::mpsc::channel();
    let writer = std::thread::spawn(move || {
        for bytes in all {
            for piece in bytes.chunks(50_000) {
                there.write_all(piece).expect("written");
                std::thread::yield_now();
            }
            told.recv().expect("it was heard");
        }
    });
    for (event, _) in frames {
        let heard = loop {
            match line.receive() {
                Heard::Event(heard) => break heard,
                Heard::Later => {}
                Heard::Nothing => {
                    let limit = PollTimeout::try_from(super::loopback::LONG).expect("fits");
                    let mut fds = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
                    assert_eq!(poll(&mut fds, limit), Ok(1), "it sleeps through a frame");
                }
                Heard::Ended => panic!("it has ended"),
            }
        };
        assert_eq!(heard, event);
        next.send(()).expect("it writes");
    }
    writer.join().expect("ends");
}

/// What has come of it wakes nobody, and is no sign of life for ever.
#[test]
fn whoever_stops_in_the_middle_of_a_frame_is_silent() {
    let (line, mut there) = line();
    let (_, bytes) = frame(1, 255);
    there.write_all(&bytes[..bytes.len() / 2]).expect("written");
    let began = Instant::now();
    while !line.is_silent(Duration::from_millis(100)) {
        let mut fds = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
            assert!(matches!(line.receive(), Heard::Nothing | Heard::Later));
        }
        assert!(began.elapsed() < super::loopback::LONG, "it is waited for");
        std::thread::sleep(Duration::from_millis(1));
    }
    there.write_all(&bytes[bytes.len() / 2..]).expect("written");
    assert!(matches!(hear(&line), Event::Received { .. }));
}

#[test]
fn who_has_bytes_to_be_read_is_not_silent_and_who_is_gone_is() {
    let (line, mut there) = line();
    let (second, long) = (Duration::from_millis(1), super::loopback::LONG);
    std::thread::sleep(2 * second);
    assert!(line.is_silent(second) && !line.is_silent(long));
    there.write_all(&[0]).expect("written");
    let began = Instant::now();
    while line.is_silent(second) {
        assert!(began.elapsed() < long, "the byte is not seen");
    }
    drop(there);
    while !line.is_silent(second) {
        assert!(began.elapsed() < long, "the end is not seen");
    }
}

#[test]
fn a_frame_about_another_volume_and_garbage_end_it() {
    let other = Packet::Message(write(1, 1), payload(1)).encode(crate::volume::VolumeId::random());
    for bytes in [other.head, vec![7; 4096]] {
        let (line, mut there) = line();
        there.write_all(&bytes).expect("written");
        let began = Instant::now();
        loop {
            match line.receive() {
                Heard::Event(event) => panic!("{event:?} was heard"),
                Heard::Later => {}
                Heard::Nothing => assert!(began.elapsed() < super::loopback::LONG, "nothing is heard"),
                Heard::Ended => break,
            }
        }
    }
}

/// Whoever reads is one thread for all volumes.
#[test]
fn signs_of_life_without_end_leave_others_their_turn() {
    let (line, mut there) = line();
    let heartbeats = Packet::Heartbeat.encode(volume()).head.repeat(1000);
    // Until the other end is gone.
    let writer = std::thread::spawn(move || while there.write_all(&heartbeats).is_ok() {});
    let began = Instant::now();
    loop {
        match line.receive() {
            Heard::Later => break,
            Heard::Nothing => assert!(began.elapsed() < super::loopback::LONG, "they never come fast enough"),
            Heard::Event(_) | Heard::Ended => panic!("nothing was said"),
        }
    }
    drop(line);
    writer.join().expect("ends");
}
