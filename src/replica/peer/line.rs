//! A connection after its handshake: a socket and its encryption, for threads that must not wait.
//!
//! ```text
//!   engine's thread ── receive <── frame being put together <── TLS <──128 KiB── socket
//!   engine's thread, or the connection's task ── write ── 256 KiB ──> TLS ──> socket
//! ```
//! # Invariants
//! * Nothing in here waits for the peer. The lock is held for as long as a piece takes to be encrypted, or [`READS`] to be read.
//! * Whoever waits for the lock gets it before the one that has it gets it again.
//! * Bytes go out in the order of the calls of [`Line::write`]: whoever gets some not taken gives them again before others.
//! * A payload goes from the decrypted record to where direct I/O takes it, in one copy.
//! * Whoever reads hears at the latest by an event of the socket that there is more, once [`Heard::Nothing`] was said.
//! * The first error ends the connection, whoever found it; its task hears it.

use super::blocks::Blocks;
use super::connection::ConnectionError;
use super::fair::Fair;
use super::header::{HEADER, Header};
use super::low_water::set_low_water;
use super::packet::Packet;
use super::payload::Payload;
use super::volume::Event;
use crate::protocol::Message;
use crate::volume::{InstanceId, VolumeId};
use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::Connection;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Bytes that are read at once: many small frames, a part of a large one. rustls by itself reads 4 KiB at a time.
const READ_AHEAD: usize = 128 << 10;
/// Reads after which others have their turn, whatever has come: the largest frame, and as much again. Signs of life may come
/// without end.
const READS: u32 = 16;
/// Bytes that [`Line::write`] should be given at a time: what a large frame is cut into. Each piece is a system call, and a
/// wake-up of the other side if that is asleep; a lock that the reader may wait for is held meanwhile.
pub(super) const PIECE: usize = 256 << 10;
/// A large frame wakes the reader when so many bytes more are there, not with each packet.
const WAKE: usize = 128 << 10;
/// What of a frame's rest may be in a record that has come in part.
const RECORD: usize = 18 << 10;

/// What a peer says on one connection.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and used at once")]
pub enum Heard {
    /// [`Event::Received`], always.
    Event(Event),
    /// Nothing more at the moment.
    Nothing,
    /// No message yet, and there may be more: to be called again, when others have had their turn.
    Later,
    /// Nothing ever again.
    Ended,
}

/// What [`Heard`] is made of.
#[allow(clippy::large_enum_variant, reason = "one at a time, and used at once")]
enum Next {
    Message(Message, Payload),
    Nothing,
    Later,
}

/// What the connection took.
pub(super) struct Taken {
    pub bytes: usize,
    /// All, and none is kept inside.
    pub is_all: bool,
}

/// See the module.
pub struct Line {
    socket: TcpStream,
    volume: VolumeId,
    peer: InstanceId,
    state: Fair<State>,
    end: Mutex<Option<ConnectionError>>,
    ended: Notify,
}

struct State {
    tls: Option<Connection>,
    /// When the socket had bytes last, and took some.
    heard: Instant,
    said: Instant,
    ahead: Ahead,
    frame: Assembly,
    /// Bytes with which the socket becomes readable.
    wakes_at: usize,
}

/// What was read from the socket and is not used yet.
struct Ahead {
    bytes: Box<[u8]>,
    at: usize,
    end: usize,
}

/// A frame, as far as it has come.
struct Assembly {
    part: Part,
    filled: usize,
}

enum Part {
    Header([u8; HEADER]),
    Table(Header, Vec<u8>),
    Data(Header, Vec<u8>, Blocks),
}

impl Line {
    /// A connection about this volume with this peer, whose socket does not block.
    pub(super) fn new(socket: TcpStream, mut tls: Option<Connection>, volume: VolumeId, peer: InstanceId) -> Self {
        if let Some(tls) = &mut tls {
            // rustls by itself takes 64 KiB before it wants to write.
            tls.set_buffer_limit(Some(PIECE + PIECE / 16));
        }
        let ahead = Ahead { bytes: vec![0; READ_AHEAD].into(), at: 0, end: 0 };
        let frame = Assembly { part: Part::Header([0; HEADER]), filled: 0 };
        let now = Instant::now();
        let state = State { tls, heard: now, said: now, ahead, frame, wakes_at: 1 };
        Self { socket, volume, peer, state: Fair::new(state), end: Mutex::default(), ended: Notify::new() }
    }

    /// The peer's next message. To be called until there is none, whenever the socket has become readable, and once at first.
    pub fn receive(&self) -> Heard {
        let heard = self.state.lock().next(&self.socket, self.volume);
        match heard {
            Ok(Next::Message(message, payload)) => Heard::Event(Event::Received { from: self.peer, message, payload }),
            Ok(Next::Nothing) => Heard::Nothing,
            Ok(Next::Later) => Heard::Later,
            Err(error) => {
                self.end(error);
                Heard::Ended
            }
        }
    }

    /// Gives the connection at most [`PIECE`] bytes, and what it has kept inside before.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<Taken, ConnectionError> {
        Ok(self.state.lock().write(&self.socket, bytes)?)
    }

    /// Nothing was said for so long.
    pub(super) fn was_quiet(&self, time: Duration) -> bool {
        self.state.lock().said.elapsed() >= time
    }

    /// How long until nothing was heard for so long; zero, if it was not.
    pub(super) fn silent_in(&self, silence: Duration) -> Duration {
        silence.saturating_sub(self.state.lock().heard.elapsed())
    }

    /// Nothing is heard any more: not a byte for so long, and none waits to be read.
    pub(super) fn is_silent(&self, silence: Duration) -> bool {
        self.silent_in(silence).is_zero() && !self.has_more()
    }

    /// Whether bytes of a peer that is there wait to be read.
    fn has_more(&self) -> bool {
        let closed = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN | closed)];
        // Any other event, also one that has no name there, is an end. A part of a large frame after which nothing came is below the
        // low-water mark: whoever has sent it is silent.
        poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].revents() == Some(PollFlags::POLLIN)
    }

    fn end(&self, error: ConnectionError) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.ended.notify_one();
    }

    /// Waits until whoever reads has found the end.
    pub(super) async fn ended(&self) -> ConnectionError {
        loop {
            let end = self.end.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(error) = end {
                return error;
            }
            self.ended.notified().await;
        }
    }

    /// Nothing is sent or received any more: whoever watches the socket, here and there, finds its end.
    pub fn close(&self) {
        // It may be closed by the peer already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Line {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl State {
    fn next(&mut self, socket: &TcpStream, volume: VolumeId) -> Result<Next, ConnectionError> {
        let mut reads = 0;
        loop {
            let count = self.take()?;
            if count > 0 {
                if let Some((message, payload)) = self.frame.advance(count, volume)? {
                    return Ok(Next::Message(message, payload));
                }
                continue;
            }
            if self.ahead.at == self.ahead.end {
                if reads == READS {
                    return Ok(Next::Later);
                }
                reads += 1;
                if !self.ahead.read(socket)? {
                    if self.wake_at(socket)? {
                        continue;
                    }
                    return Ok(Next::Nothing);
                }
                self.heard = Instant::now();
            }
            self.decrypt()?;
        }
    }

    /// Sets with how many bytes the socket becomes readable. Whether it was set, and may be readable already.
    fn wake_at(&mut self, socket: &TcpStream) -> io::Result<bool> {
        let wanted = self.frame.missing().saturating_sub(RECORD).clamp(1, WAKE);
        // A call for what is nearly whole costs more than it saves.
        let is_set = if wanted < self.wakes_at { false } else { wanted < WAKE / 2 || self.wakes_at >= WAKE / 2 };
        if is_set || wanted == self.wakes_at {
            return Ok(false);
        }
        self.wakes_at = wanted;
        set_low_water(socket, wanted)?;
        Ok(true)
    }

    /// Moves what is there to where the frame wants it: how many bytes.
    fn take(&mut self) -> Result<usize, ConnectionError> {
        let place = self.frame.place();
        let Some(tls) = &mut self.tls else { return Ok(self.ahead.take(place)) };
        match tls.reader().read(place) {
            Ok(0) => Err(ConnectionError::Closed),
            Ok(count) => Ok(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives TLS what was read.
    fn decrypt(&mut self) -> Result<(), ConnectionError> {
        if let Some(tls) = &mut self.tls {
            let mut rest = &self.ahead.bytes[self.ahead.at..self.ahead.end];
            self.ahead.at += tls.read_tls(&mut rest)?;
            tls.process_new_packets().map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
        Ok(())
    }

    fn write(&mut self, socket: &TcpStream, bytes: &[u8]) -> io::Result<Taken> {
        let mut at = 0;
        while self.write_kept(socket)? && at < bytes.len() {
            let rest = &bytes[at..];
            let written = match &mut self.tls {
                Some(tls) => tls.writer().write(rest)?,
                None => unless_blocked(|| (&*socket).write(rest))?.unwrap_or(0),
            };
            if written == 0 {
                return Ok(Taken { bytes: at, is_all: false });
            }
            at += written;
            self.said = Instant::now();
        }
        let kept = self.tls.as_ref().is_some_and(|tls| tls.wants_write());
        Ok(Taken { bytes: at, is_all: at == bytes.len() && !kept })
    }

    /// Whether nothing that is encrypted is kept any more.
    fn write_kept(&mut self, socket: &TcpStream) -> io::Result<bool> {
        let Some(tls) = &mut self.tls else { return Ok(true) };
        while tls.wants_write() {
            if unless_blocked(|| tls.write_tls(&mut &*socket))?.is_none_or(|written| written == 0) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Ahead {
    /// Reads what the socket has. `false`: nothing.
    fn read(&mut self, mut socket: &TcpStream) -> Result<bool, ConnectionError> {
        // A read that brings less than it might have has not seen the end that may be behind it: only the next one does.
        match unless_blocked(|| socket.read(&mut self.bytes))? {
            None => Ok(false),
            Some(0) => Err(ConnectionError::Closed),
            Some(count) => {
                (self.at, self.end) = (0, count);
                Ok(true)
            }
        }
    }

    fn take(&mut self, place: &mut [u8]) -> usize {
        let count = place.len().min(self.end - self.at);
        place[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        count
    }
}

/// `None`: it would have to wait.
fn unless_blocked(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

impl Assembly {
    /// Where the next bytes go; never empty between two calls.
    fn place(&mut self) -> &mut [u8] {
        let filled = self.filled;
        match &mut self.part {
            Part::Header(bytes) => &mut bytes[filled..],
            Part::Table(_, bytes) => &mut bytes[filled..],
            Part::Data(_, _, blocks) => &mut blocks.bytes_mut()[filled..],
        }
    }

    /// Bytes of the payload that have not come, if it is one that comes.
    fn missing(&self) -> usize {
        match &self.part {
            Part::Data(_, _, blocks) => blocks.length() - self.filled,
            Part::Header(_) | Part::Table(..) => 0,
        }
    }

    /// So many bytes are in their place. A message about the volume, if these were its last.
    fn advance(&mut self, count: usize, volume: VolumeId) -> Result<Option<(Message, Payload)>, ConnectionError> {
        self.filled += count;
        while self.place().is_empty() {
            self.filled = 0;
            match std::mem::replace(&mut self.part, Part::Header([0; HEADER])) {
                Part::Header(bytes) => {
                    let header = Header::decode(&bytes)?;
                    if header.volume != volume {
                        return Err(ConnectionError::OtherVolume(header.volume));
                    }
                    self.part = Part::Table(header, vec![0; header.table()]);
                }
                Part::Table(header, table) => self.part = Part::Data(header, table, Blocks::new(header.payload())),
                Part::Data(header, table, data) => return message(&header, table, data),
            }
        }
        Ok(None)
    }
}

/// What a whole frame of a session says; nothing, if it is a sign of life.
fn message(header: &Header, table: Vec<u8>, data: Blocks) -> Result<Option<(Message, Payload)>, ConnectionError> {
    match Packet::decode(header, Bytes::from(table), data.freeze())? {
        Packet::Heartbeat => Ok(None),
        Packet::Message(message, payload) => Ok(Some((message, payload))),
        Packet::Hello(_) | Packet::Welcome(..) | Packet::Confirm(_) | Packet::Refuse(_) => {
            Err(ConnectionError::Unexpected(header.kind))
        }
    }
}
