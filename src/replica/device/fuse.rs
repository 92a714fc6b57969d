//! The FUSE protocol of one file: parses what the kernel asks, encodes what we answer; no input or output of its own.
//!
//! ```text
//!   bytes of a request ── Message::parse ──> Message ── dispatch ──┬─> Submit(protocol::Request)   to the core
//!                                                                  ├─> Answer(Reply)               at once
//!                                                                  └─> Ignore                      no answer exists
//! ```
//! # Invariants
//! * No input makes it panic; a request that is cut short is [`Malformed`], never guessed at.
//! * A read or write is answered in full or with an error: the loop driver of several kernels takes a short write for a
//!   complete one.
//! * FSYNC is never answered with ENOSYS or EINVAL: the kernel takes the first for "never ask again" and the loop driver
//!   ignores the second, so both would lose every later flush.
//! * The numbers and layouts are those of the kernel's `fuse.h`, protocol 7, host byte order.

use crate::protocol;
use crate::volume::{BLOCK_SIZE, BlockRange, MAX_REQUEST_BLOCKS, VolumeId, VolumeSize};
use nix::errno::Errno;

/// Bytes of the header of every request.
pub const HEADER: usize = 40;
/// Bytes before the payload of a WRITE: header and arguments.
pub const WRITE_HEADER: usize = 80;
/// Bytes of the header of every reply.
pub const REPLY_HEADER: usize = 16;
/// Largest payload of a request in bytes.
pub const MAX_PAYLOAD: usize = MAX_REQUEST_BLOCKS as usize * BLOCK_SIZE as usize;
/// Most bytes that [`Reply::encode`] writes: a header and an entry or the directory.
pub const MAX_REPLY: usize = 256;
/// What the name of a volume's file starts with; its id follows, and after dots the number of the connection and the copy.
/// The kernel shows that name as the loop device's backing file, so a device can be found again without asking the engine.
pub const NAME_PREFIX: &str = "tandem-";

const ROOT: u64 = 1;
const FILE: u64 = 2;

/// Oldest protocol that has MAX_PAGES (Linux 4.20); requests of 1 MiB need it.
const MIN_MINOR: u32 = 28;
/// The protocol that this file was written against; the kernel speaks the lower of the two.
const OUR_MINOR: u32 = 38;
/// Requests that the kernel may have under way: its default of 12 costs a third of the writes at depth 32.
const MAX_BACKGROUND: u16 = 256;
const CONGESTION: u16 = 192;
/// Names are cached for an hour: there is one file and it never goes. Sizes are never cached, volumes grow.
const NAME_SECONDS: u64 = 3600;

const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
/// Without it direct I/O is done one request at a time (measured: 40k -> 6.6k writes per second).
const ASYNC_DIO: u32 = 1 << 15;
const PARALLEL_DIROPS: u32 = 1 << 18;
const MAX_PAGES: u32 = 1 << 22;
const INIT_EXT: u32 = 1 << 30;
const WANTED: u32 = ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT;

const OPEN_DIRECT_IO: u32 = 1;
/// Ignored by kernels before 6.2.
const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

const SET_SIZE: u32 = 1 << 3;

const KEEP_SIZE: u32 = 0x01;
const PUNCH_HOLE: u32 = 0x02;
const ZERO_RANGE: u32 = 0x10;

mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const ACCESS: u32 = 34;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// One request of the kernel. A WRITE's payload is not part of it: it stays where it was read to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The kernel's number of the request; the reply carries it. 0 for what has no reply.
    pub unique: u64,
    /// The inode it is about.
    pub node: u64,
    /// What is asked.
    pub request: Request,
}

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the operations of fuse.h")]
pub enum Request {
    Init { major: u32, minor: u32, max_readahead: u32, flags: u32 },
    Lookup { is_volume: bool },
    Getattr,
    Setattr { size: Option<u64> },
    Open,
    Release,
    Read { offset: u64, length: u32 },
    Write { offset: u64, length: u32 },
    Fsync,
    Fallocate { mode: u32, offset: u64, length: u64 },
    Statfs,
    Flush,
    Opendir,
    Readdir { offset: u64, length: u32 },
    Releasedir,
    Fsyncdir,
    Access,
    Xattr,
    Destroy,
    Forget,
    Interrupt,
    Unknown { opcode: u32 },
}

/// Bytes that are no request. The kernel never sends them; a damaged slot or a fuzzer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than a header, so there is nothing to answer to.
    #[error("a FUSE request of {0} bytes is shorter than its header")]
    Header(usize),
    /// The arguments do not fit the operation; answer EIO.
    #[error("FUSE request {unique} (operation {opcode}, {length} bytes) does not carry the arguments of its operation")]
    Arguments {
        /// The kernel's number of the request.
        unique: u64,
        /// The operation.
        opcode: u32,
        /// What the header says of its length.
        length: u32,
    },
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dispatch {
    /// The core decides; answer with [`Message::completion`] when it is done.
    Submit(protocol::Request),
    /// Answer at once.
    Answer(Reply),
    /// There is no answer: free the slot.
    Ignore,
}

impl Message {
    /// Parses the bytes of a request. They may end after the header and arguments of a WRITE.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let short = Malformed::Header(bytes.len());
        let fields = Fields(bytes);
        let (length, code) = (fields.u32(0).ok_or(short)?, fields.u32(4).ok_or(short)?);
        let (unique, node) = (fields.u64(8).ok_or(short)?, fields.u64(16).ok_or(short)?);
        let arguments = Fields(bytes.get(HEADER..).ok_or(short)?);
        let payload = (length as usize).checked_sub(WRITE_HEADER);
        let request =
            parse_arguments(code, arguments, payload).ok_or(Malformed::Arguments { unique, opcode: code, length })?;
        Ok(Self { unique, node, request })
    }

    /// What to do with the request on a volume of `size`.
    pub fn dispatch(&self, size: VolumeSize) -> Dispatch {
        match self.request {
            Request::Read { offset, length } => match range(offset, u64::from(length), size) {
                Some(range) if range.count() <= MAX_REQUEST_BLOCKS => Dispatch::Submit(protocol::Request::Read(range)),
                _ => error(Errno::EINVAL),
            },
            Request::Write { offset, length } => match range(offset, u64::from(length), size) {
                Some(range) if range.count() <= MAX_REQUEST_BLOCKS => Dispatch::Submit(protocol::Request::Write(range)),
                _ => error(Errno::EINVAL),
            },
            Request::Fsync => Dispatch::Submit(protocol::Request::Flush),
            Request::Fallocate { mode, offset, length } => {
                let request = match mode {
                    _ if mode == PUNCH_HOLE | KEEP_SIZE => protocol::Request::Discard,
                    _ if mode == ZERO_RANGE | KEEP_SIZE => protocol::Request::WriteZeroes,
                    _ => return error(Errno::EOPNOTSUPP),
                };
                range(offset, length, size).map_or(error(Errno::EINVAL), |range| Dispatch::Submit(request(range)))
            }
            Request::Forget | Request::Interrupt => Dispatch::Ignore,
            _ => Dispatch::Answer(self.answer(size)),
        }
    }

    /// The answer to what the core has nothing to do with.
    fn answer(&self, size: VolumeSize) -> Reply {
        match self.request {
            Request::Init { major, minor, max_readahead, flags } => init(major, minor, max_readahead, flags),
            Request::Lookup { is_volume: true } => Reply::Entry { size },
            Request::Lookup { is_volume: false } => Reply::Error(Errno::ENOENT),
            // Only the engine truncates, to the size that the volume has already: how a grown volume's size becomes known.
            Request::Setattr { size: Some(wanted) } if wanted != size.bytes() => Reply::Error(Errno::EPERM),
            Request::Getattr | Request::Setattr { .. } => Reply::Attributes { node: self.node, size },
            Request::Open => Reply::Opened { flags: OPEN_DIRECT_IO | OPEN_PARALLEL_DIRECT_WRITES },
            Request::Opendir => Reply::Opened { flags: 0 },
            Request::Readdir { offset, length } => Reply::Directory { offset, length },
            Request::Statfs => Reply::Statfs { size },
            // Told once, the kernel does not ask again: it would look for capabilities before writes.
            Request::Xattr | Request::Unknown { .. } => Reply::Error(Errno::ENOSYS),
            _ => Reply::Empty,
        }
    }

    /// The reply when the core is done with the request. A READ's data follows the reply (see [`Reply::Data`]).
    pub fn completion(&self, result: Result<(), Errno>) -> Reply {
        match (result, self.request) {
            (Err(Errno::ENOSYS | Errno::EINVAL), Request::Fsync) => Reply::Error(Errno::EIO),
            (Err(errno), _) => Reply::Error(errno),
            (Ok(()), Request::Read { length, .. }) => Reply::Data { length },
            (Ok(()), Request::Write { length, .. }) => Reply::Written { length },
            (Ok(()), _) => Reply::Empty,
        }
    }
}

fn error(errno: Errno) -> Dispatch {
    Dispatch::Answer(Reply::Error(errno))
}

/// The blocks of an aligned byte range inside the volume.
fn range(offset: u64, length: u64, size: VolumeSize) -> Option<BlockRange> {
    BlockRange::from_bytes(offset, length).filter(|range| range.end() <= size.blocks())
}

fn parse_arguments(code: u32, arguments: Fields<'_>, payload: Option<usize>) -> Option<Request> {
    Some(match code {
        opcode::INIT => Request::Init {
            major: arguments.u32(0)?,
            minor: arguments.u32(4)?,
            max_readahead: arguments.u32(8)?,
            flags: arguments.u32(12)?,
        },
        opcode::LOOKUP => {
            let name = std::ffi::CStr::from_bytes_until_nul(arguments.0).ok()?.to_str().ok();
            let id = name.and_then(|name| name.strip_prefix(NAME_PREFIX)?.split('.').next());
            Request::Lookup { is_volume: id.is_some_and(|id| id.parse::<VolumeId>().is_ok()) }
        }
        opcode::GETATTR => Request::Getattr,
        opcode::SETATTR => {
            let (valid, size) = (arguments.u32(0)?, arguments.u64(16)?);
            Request::Setattr { size: (valid & SET_SIZE != 0).then_some(size) }
        }
        opcode::OPEN => Request::Open,
        opcode::RELEASE => Request::Release,
        opcode::READ => Request::Read { offset: arguments.u64(8)?, length: arguments.u32(16)? },
        opcode::WRITE => {
            let (offset, length) = (arguments.u64(8)?, arguments.u32(16)?);
            // Arguments that are cut short would leave the payload somewhere else.
            let complete = arguments.0.len() >= WRITE_HEADER - HEADER && payload? == length as usize;
            complete.then_some(Request::Write { offset, length })?
        }
        opcode::FSYNC => Request::Fsync,
        opcode::FALLOCATE => {
            Request::Fallocate { offset: arguments.u64(8)?, length: arguments.u64(16)?, mode: arguments.u32(24)? }
        }
        opcode::STATFS => Request::Statfs,
        opcode::FLUSH => Request::Flush,
        opcode::OPENDIR => Request::Opendir,
        opcode::READDIR => Request::Readdir { offset: arguments.u64(8)?, length: arguments.u32(16)? },
        opcode::RELEASEDIR => Request::Releasedir,
        opcode::FSYNCDIR => Request::Fsyncdir,
        opcode::ACCESS => Request::Access,
        opcode::GETXATTR | opcode::LISTXATTR => Request::Xattr,
        opcode::DESTROY => Request::Destroy,
        opcode::FORGET | opcode::BATCH_FORGET => Request::Forget,
        opcode::INTERRUPT => Request::Interrupt,
        opcode => Request::Unknown { opcode },
    })
}

fn init(major: u32, minor: u32, max_readahead: u32, flags: u32) -> Reply {
    // A newer kernel asks again with our major version when it sees it in the reply.
    if major < 7 || (major == 7 && (minor < MIN_MINOR || flags & (ASYNC_DIO | MAX_PAGES) != ASYNC_DIO | MAX_PAGES)) {
        return Reply::Error(Errno::EPROTO);
    }
    let minor = if major == 7 { minor.min(OUR_MINOR) } else { OUR_MINOR };
    Reply::Init { minor, max_readahead, flags: flags & WANTED }
}

/// An answer to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the replies of fuse.h")]
pub enum Reply {
    Empty,
    Error(Errno),
    /// The header of a READ's reply; the data must follow it in the same write(2).
    Data {
        length: u32,
    },
    Written {
        length: u32,
    },
    Init {
        minor: u32,
        max_readahead: u32,
        flags: u32,
    },
    Entry {
        size: VolumeSize,
    },
    Attributes {
        node: u64,
        size: VolumeSize,
    },
    Opened {
        flags: u32,
    },
    Statfs {
        size: VolumeSize,
    },
    Directory {
        offset: u64,
        length: u32,
    },
}

impl Reply {
    /// The reply to request `unique`, and its length; of [`Reply::Data`] only the header.
    pub fn encode(&self, unique: u64) -> ([u8; MAX_REPLY], usize) {
        let mut out = Encoder { bytes: [0; MAX_REPLY], length: REPLY_HEADER };
        let mut errno = 0;
        let mut follows = 0;
        match *self {
            Self::Empty => {}
            Self::Error(error) => errno = -(error as i32),
            Self::Data { length } => follows = length,
            Self::Written { length } => out.u32s(&[length, 0]),
            Self::Init { minor, max_readahead, flags } => {
                out.u32s(&[7, minor, max_readahead, flags]);
                out.u16s(&[MAX_BACKGROUND, CONGESTION]);
                out.u32s(&[MAX_PAYLOAD as u32, 1]);
                out.u16s(&[MAX_REQUEST_BLOCKS as u16, 0]);
                out.u32s(&[0; 8]);
            }
            Self::Entry { size } => {
                out.u64s(&[FILE, 0, NAME_SECONDS, 0, 0]);
                out.attributes(FILE, size);
            }
            Self::Attributes { node, size } => {
                out.u64s(&[0, 0]);
                out.attributes(node, size);
            }
            Self::Opened { flags } => {
                out.u64s(&[1]);
                out.u32s(&[flags, 0]);
            }
            Self::Statfs { size } => {
                out.u64s(&[size.blocks(), 0, 0, 1, 0]);
                out.u32s(&[BLOCK_SIZE as u32, 255, BLOCK_SIZE as u32, 0, 0, 0, 0, 0, 0, 0]);
            }
            Self::Directory { offset, length } => out.directory(offset, length),
        }
        let length = out.length;
        out.length = 0;
        out.u32s(&[follows.saturating_add(length as u32), errno as u32]);
        out.u64s(&[unique]);
        (out.bytes, length)
    }
}

/// Fields in host byte order at fixed offsets; what lies outside is absent.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(self, offset: usize) -> Option<u32> {
        self.0.get(offset..)?.first_chunk().copied().map(u32::from_ne_bytes)
    }
    fn u64(self, offset: usize) -> Option<u64> {
        self.0.get(offset..)?.first_chunk().copied().map(u64::from_ne_bytes)
    }
}

struct Encoder {
    bytes: [u8; MAX_REPLY],
    length: usize,
}

impl Encoder {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }
    fn u16s(&mut self, values: &[u16]) {
        values.iter().for_each(|value| self.put(&value.to_ne_bytes()));
    }
    fn u32s(&mut self, values: &[u32]) {
        values.iter().for_each(|value| self.put(&value.to_ne_bytes()));
    }
    fn u64s(&mut self, values: &[u64]) {
        values.iter().for_each(|value| self.put(&value.to_ne_bytes()));
    }
    /// `struct fuse_attr`: no times, nobody looks.
    fn attributes(&mut self, node: u64, size: VolumeSize) {
        let (mode, links, bytes) =
            if node == ROOT { (libc::S_IFDIR | 0o700, 2, 0) } else { (libc::S_IFREG | 0o600, 1, size.bytes()) };
        self.u64s(&[node, bytes, bytes / 512, 0, 0, 0]);
        self.u32s(&[0, 0, 0, mode, links, 0, 0, 0, BLOCK_SIZE as u32, 0]);
    }
    /// Whole `struct fuse_dirent`s from entry number `offset` on, as many as fit in `room` bytes. The file is not
    /// listed: nobody but the engine looks for it, and the engine knows its name.
    fn directory(&mut self, offset: u64, room: u32) {
        let end = REPLY_HEADER + room as usize;
        for (number, name) in (1u64..).zip([c".", c".."]) {
            if number > offset && self.length + 32 <= end {
                self.u64s(&[ROOT, number]);
                self.u32s(&[name.count_bytes() as u32, u32::from(libc::DT_DIR)]);
                self.put(name.to_bytes());
                self.put(&[0; 8][..8 - name.count_bytes()]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
