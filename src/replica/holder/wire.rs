//! Packets between the holder and those who talk to it: one packet asks, one packet answers, descriptors ride along.
//!
//! # Invariants
//! * The first eight bytes (mark, version, kind) never change: two versions can always tell each other that they differ.
//! * No packet makes the reader panic; a packet that was cut short, in bytes or in descriptors, is an error.
#![allow(unsafe_code, reason = "received descriptors become owned")]

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Bytes of a key.
pub const MAX_KEY: usize = 128;
/// Bytes of an entry's description.
pub const MAX_META: usize = 4096;
/// Descriptors of one entry.
pub const MAX_FDS: usize = 4;
/// The format of every packet.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"TDMH";
const HEADER: usize = 20;
const MAX_PACKET: usize = HEADER + MAX_KEY + MAX_META;

/// What a packet asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// First packet: I am the engine.
    Engine = 1,
    /// First packet: I only ask for the status.
    Status = 2,
    /// First packet: I will be the holder.
    Successor = 3,
    /// Keep `key` with `meta` and descriptors; replaces what has that key.
    Put = 10,
    /// The entry after `key` in the order of keys.
    Next = 11,
    /// Forget `key`.
    Remove = 12,
    /// Successor: the listener, the lock and the engine's connection.
    TakeOver = 13,
    /// Successor: I have everything.
    Confirm = 14,
    /// Done; `number` is what was asked for.
    Ok = 100,
    /// An entry.
    Entry = 101,
    /// No entry after that key.
    End = 102,
    /// Another engine is connected: `number` is its process.
    Busy = 103,
    /// Not done, for the reason in `meta`.
    Refused = 104,
    /// The other side speaks another version: `number`.
    Version = 105,
}

impl Kind {
    fn from_number(number: u16) -> Option<Self> {
        use Kind::*;
        [Engine, Status, Successor, Put, Next, Remove, TakeOver, Confirm, Ok, Entry, End, Busy, Refused, Version]
            .into_iter()
            .find(|kind| *kind as u16 == number)
    }
}

/// One packet.
#[derive(Debug)]
pub struct Packet {
    pub kind: Kind,
    pub number: u64,
    pub key: Vec<u8>,
    pub meta: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// Why a packet could not be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The other side is gone.
    #[error("the connection was closed")]
    Closed,
    /// Nothing yet.
    #[error("no answer in time")]
    Empty,
    /// Another version of the format.
    #[error("the other side speaks version {0} of the holder's protocol, this one version {VERSION}")]
    Version(u16),
    /// Not a packet of ours.
    #[error("not a packet of the holder's protocol")]
    Malformed,
    /// Descriptors were lost on the way.
    #[error("descriptors were lost: the limit of open files of this process is too low (ulimit -n)")]
    Descriptors,
    /// The system call failed.
    #[error("recvmsg: {0}")]
    System(Errno),
}

/// Sends one packet; [`Errno::EAGAIN`] when the other side does not read.
pub fn send(
    socket: BorrowedFd<'_>,
    kind: Kind,
    number: u64,
    key: &[u8],
    meta: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    send_version(socket, VERSION, kind, (number, key, meta), fds)
}

pub(super) fn send_version(
    socket: BorrowedFd<'_>,
    version: u16,
    kind: Kind,
    (number, key, meta): (u64, &[u8], &[u8]),
    fds: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    if key.len() > MAX_KEY || meta.len() > MAX_META || fds.len() > MAX_FDS {
        return Err(Errno::EMSGSIZE);
    }
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&version.to_le_bytes());
    header[6..8].copy_from_slice(&(kind as u16).to_le_bytes());
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..18].copy_from_slice(&(key.len() as u16).to_le_bytes());
    header[18..20].copy_from_slice(&(meta.len() as u16).to_le_bytes());
    let parts = [IoSlice::new(&header), IoSlice::new(key), IoSlice::new(meta)];
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Receives one packet.
pub fn receive(socket: BorrowedFd<'_>) -> Result<Packet, ReceiveError> {
    let mut bytes = [0u8; MAX_PACKET];
    let mut space = cmsg_space!([RawFd; MAX_FDS]);
    let (length, flags, fds) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                let fds = match message.cmsgs() {
                    Ok(all) => all.flat_map(descriptors).collect(),
                    Err(_) => return Err(ReceiveError::Descriptors),
                };
                break (message.bytes, message.flags, fds);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(ReceiveError::Empty),
            Err(Errno::ECONNRESET | Errno::EPIPE) => return Err(ReceiveError::Closed),
            Err(errno) => return Err(ReceiveError::System(errno)),
        }
    };
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(ReceiveError::Descriptors);
    }
    if length == 0 {
        return Err(ReceiveError::Closed);
    }
    parse(&bytes[..length], fds)
}

fn descriptors(message: ControlMessageOwned) -> Vec<OwnedFd> {
    match message {
        // SAFETY: the kernel just made them for us.
        ControlMessageOwned::ScmRights(raw) => raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect(),
        _ => vec![],
    }
}

fn parse(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Packet, ReceiveError> {
    let (header, rest) = bytes.split_first_chunk::<8>().ok_or(ReceiveError::Malformed)?;
    let [m0, m1, m2, m3, v0, v1, k0, k1] = *header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(ReceiveError::Malformed);
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(ReceiveError::Version(version));
    }
    let kind = Kind::from_number(u16::from_le_bytes([k0, k1])).ok_or(ReceiveError::Malformed)?;
    let (number, rest) = rest.split_first_chunk::<8>().ok_or(ReceiveError::Malformed)?;
    let (key, rest) = rest.split_first_chunk::<2>().ok_or(ReceiveError::Malformed)?;
    let (meta, rest) = rest.split_first_chunk::<2>().ok_or(ReceiveError::Malformed)?;
    let (key, meta) = (usize::from(u16::from_le_bytes(*key)), usize::from(u16::from_le_bytes(*meta)));
    if key > MAX_KEY || meta > MAX_META || rest.len() != key + meta {
        return Err(ReceiveError::Malformed);
    }
    let (key, meta) = rest.split_at(key);
    Ok(Packet { kind, number: u64::from_le_bytes(*number), key: key.to_vec(), meta: meta.to_vec(), fds })
}
