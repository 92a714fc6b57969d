//! The file `checkpoint`: the whole tree at one position of the map log.
//!
//! A header block, then chunks of at most 64 KiB, each with its own checksum; the last one is shorter and ends with totals:
//! ```text
//!   header  0 prefix (see format.rs)   48 generation (8)   56 log sequence (8)   64 log chain (4)
//!   chunk   0 crc32c of header checksum, chunk number and the bytes from 4 on (4)   4 bytes of items (4; bit 31: last chunk)
//!           8 items, none spans chunks, rest zero
//!   item    1..63 a record   64 extents: layer (4), n (4), n extents of 16 bytes   65 end: records (8), extents (8)
//! ```
//! # Invariants
//! * A chunk of another checkpoint, or at another place, never passes for the right one, and a missing end is noticed.
//! * Writing and reading stream: they hold one chunk, whatever the size of the tree.
//! * The file is written beside the old one, synced, and takes its name; what lies behind the end is not read.

#[cfg(test)]
mod tests;

use super::format::{
    BLOCK, HeaderError, Input, Kind, LayerId, Output, PREFIX, check_instance, check_prefix, seal, write_prefix,
};
use super::log::Position;
use super::map::{Entry, Extent, Map};
use super::record::{EXTENT_BYTES, MAX_RECORD, Record, RecordError, decode_extent, encode_extent};
use crate::volume::InstanceId;
use std::io;

const KIND: Kind = Kind { magic: *b"TandemCP", version: 1, incompatible: 0 };

/// Bytes of a chunk, but for the last.
pub const CHUNK: usize = 64 << 10;

const CHUNK_HEADER: usize = 8;
const LAST: u32 = 1 << 31;
const EXTENTS: u8 = 64;
const END: u8 = 65;
const EXTENTS_HEADER: usize = 9;
const END_BYTES: usize = 17;

/// What a checkpoint says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The tree.
    pub instance: InstanceId,
    /// Where the log continues; the epoch is the checkpoint's generation.
    pub log: Position,
}

/// A part of a checkpoint, in the order in which it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// A change that leads to the tree: layers, names.
    Record(Record),
    /// Blocks of a layer. Those of one layer ascend and do not overlap.
    Extent(LayerId, Extent),
}

/// What was written or read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Records.
    pub records: u64,
    /// Extents.
    pub extents: u64,
}

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file cannot be read.
    #[error("checkpoint: {0}")]
    Io(#[from] io::Error),
    /// The header is damaged, too new or of another tree.
    #[error("checkpoint: {0}")]
    Header(#[from] HeaderError),
    /// The bytes of a chunk changed, or it belongs elsewhere.
    #[error("checkpoint chunk {chunk}: its crc32c is {computed:#010x} and {stored:#010x} was stored")]
    Checksum {
        /// Which chunk.
        chunk: u32,
        /// In the chunk.
        stored: u32,
        /// Of the chunk.
        computed: u32,
    },
    /// The file ends before the end of the checkpoint.
    #[error("checkpoint: the file ends before chunk {chunk} is complete")]
    Truncated {
        /// Which chunk is not there.
        chunk: u32,
    },
    /// The checksum of a chunk is right and a record is not.
    #[error("checkpoint chunk {chunk}: {error}")]
    Record {
        /// Which chunk.
        chunk: u32,
        /// What is wrong.
        error: RecordError,
    },
    /// The checksum of a chunk is right and an extent or a length is not.
    #[error("checkpoint chunk {chunk}: {what} has an impossible value")]
    Impossible {
        /// Which chunk.
        chunk: u32,
        /// What.
        what: &'static str,
    },
    /// Every chunk is sound, and together they are not what was written.
    #[error("checkpoint: {found:?} instead of {expected:?}")]
    Totals {
        /// What there is.
        found: Totals,
        /// What the end says.
        expected: Totals,
    },
}

/// Writes a checkpoint: first `records` (layers before what names them), then the extents of every map. `out` gets pieces
/// of whole 4096-byte blocks, at most [`CHUNK`] bytes each; it has to be synced by the caller.
pub fn write<'a>(
    out: &mut dyn io::Write,
    header: &Header,
    records: impl Iterator<Item = Record>,
    layers: impl Iterator<Item = (LayerId, &'a Map)>,
) -> io::Result<Totals> {
    let mut block = [0; BLOCK];
    write_prefix(&mut block, &KIND, header.instance);
    let mut fields = Output { bytes: &mut block, at: PREFIX };
    fields.u64(header.log.epoch);
    fields.u64(header.log.sequence);
    fields.u32(header.log.chain);
    let seed = seal(&mut block);
    out.write_all(&block)?;
    let mut chunks = Chunks { out, seed, number: 0, bytes: vec![0; CHUNK], used: CHUNK_HEADER };
    let mut totals = Totals::default();
    for record in records {
        let mut bytes = [0; MAX_RECORD];
        let length = record.encode(&mut bytes);
        chunks.room(length)?.put(&bytes[..length]);
        totals.records += 1;
    }
    for (layer, map) in layers {
        totals.extents += chunks.extents(layer, map)?;
    }
    let mut end = chunks.room(END_BYTES)?;
    end.u8(END);
    end.u64(totals.records);
    end.u64(totals.extents);
    chunks.finish(LAST)?;
    Ok(totals)
}

/// Collects items into chunks.
struct Chunks<'a> {
    out: &'a mut dyn io::Write,
    seed: u32,
    number: u32,
    bytes: Vec<u8>,
    used: usize,
}

impl Chunks<'_> {
    /// Where the next `length` bytes go; they count as used.
    fn room(&mut self, length: usize) -> io::Result<Output<'_>> {
        if self.used + length > CHUNK {
            self.finish(0)?;
        }
        let at = self.used;
        self.used += length;
        Ok(Output { bytes: &mut self.bytes, at })
    }

    fn extents(&mut self, layer: LayerId, map: &Map) -> io::Result<u64> {
        let mut extents = map.extents().peekable();
        let mut total = 0;
        while extents.peek().is_some() {
            let start = self.room(EXTENTS_HEADER + EXTENT_BYTES)?.at;
            let most = (CHUNK - start - EXTENTS_HEADER) / EXTENT_BYTES;
            let mut out = Output { bytes: &mut self.bytes, at: start + EXTENTS_HEADER };
            let mut count = 0;
            for extent in extents.by_ref().take(most) {
                encode_extent(&extent, &mut out);
                count += 1;
            }
            self.used = out.at;
            let mut out = Output { bytes: &mut self.bytes, at: start };
            out.u8(EXTENTS);
            out.u32(layer.0);
            out.u32(count);
            total += u64::from(count);
        }
        Ok(total)
    }

    fn finish(&mut self, flag: u32) -> io::Result<()> {
        let length = if flag == LAST { self.used.next_multiple_of(BLOCK) } else { CHUNK };
        self.bytes[self.used..length].fill(0);
        Output { bytes: &mut self.bytes, at: 4 }.u32((self.used - CHUNK_HEADER) as u32 | flag);
        let crc = checksum(self.seed, self.number, &self.bytes[4..length]);
        Output { bytes: &mut self.bytes, at: 0 }.u32(crc);
        self.out.write_all(&self.bytes[..length])?;
        self.number += 1;
        self.used = CHUNK_HEADER;
        Ok(())
    }
}

/// Reads a checkpoint and hands out its items in order. After an error, nothing that was handed out may be used.
pub fn read(
    input: &mut dyn io::Read,
    instance: InstanceId,
    take: &mut dyn FnMut(Item),
) -> Result<(Header, Totals), CheckpointError> {
    let mut block = [0; BLOCK];
    let length = read_up_to(input, &mut block)?;
    let (header, seed) = decode_header(&block[..length], instance)?;
    let mut bytes = vec![0; CHUNK];
    let mut found = Totals::default();
    for chunk in 0.. {
        let length = read_up_to(input, &mut bytes)?;
        let (items, is_last) = check_chunk(&bytes[..length], seed, chunk)?;
        let end = decode_items(items, chunk, &mut found, take)?;
        match (end, is_last) {
            (None, false) => {}
            (Some(expected), true) if expected == found => return Ok((header, found)),
            (Some(expected), true) => return Err(CheckpointError::Totals { found, expected }),
            (Some(_), false) | (None, true) => return Err(CheckpointError::Impossible { chunk, what: "the end" }),
        }
    }
    Err(CheckpointError::Truncated { chunk: u32::MAX })
}

/// Reads the header only: which log belongs to the checkpoint.
pub fn read_header(block: &[u8], instance: InstanceId) -> Result<Header, CheckpointError> {
    Ok(decode_header(block, instance)?.0)
}

fn decode_header(block: &[u8], instance: InstanceId) -> Result<(Header, u32), HeaderError> {
    let (found, mut fields) = check_prefix(block, &KIND)?;
    check_instance(found, instance)?;
    let mut position = || Some(Position { epoch: fields.u64()?, sequence: fields.u64()?, chain: fields.u32()? });
    let log = position().ok_or(HeaderError::Field("log position"))?;
    Ok((Header { instance, log }, super::format::stored_checksum(block)))
}

/// The items of a chunk whose checksum is right, and whether it is the last one.
fn check_chunk(bytes: &[u8], seed: u32, chunk: u32) -> Result<(&[u8], bool), CheckpointError> {
    let mut fields = Input { bytes, at: 0 };
    let (Some(stored), Some(length)) = (fields.u32(), fields.u32()) else {
        return Err(CheckpointError::Truncated { chunk });
    };
    let is_last = length & LAST != 0;
    let used = CHUNK_HEADER + (length & !LAST) as usize;
    let whole = if is_last { used.next_multiple_of(BLOCK) } else { CHUNK };
    if used > CHUNK {
        return Err(CheckpointError::Impossible { chunk, what: "the length" });
    }
    let checked = bytes.get(4..whole).ok_or(CheckpointError::Truncated { chunk })?;
    let computed = checksum(seed, chunk, checked);
    if stored != computed {
        return Err(CheckpointError::Checksum { chunk, stored, computed });
    }
    Ok((&bytes[CHUNK_HEADER..used], is_last))
}

/// Hands out the items and counts them; the totals if the end is among them.
fn decode_items(
    items: &[u8],
    chunk: u32,
    found: &mut Totals,
    take: &mut dyn FnMut(Item),
) -> Result<Option<Totals>, CheckpointError> {
    let impossible = |what| CheckpointError::Impossible { chunk, what };
    let mut input = Input { bytes: items, at: 0 };
    while let Some(tag) = input.u8() {
        match tag {
            EXTENTS => {
                let (layer, count) = input.u32().zip(input.u32()).ok_or(impossible("a list of extents"))?;
                for _ in 0..count {
                    let extent = decode_extent(&mut input).filter(|extent| extent.entry != Entry::Absent);
                    let extent = extent.ok_or(impossible("an extent"))?;
                    take(Item::Extent(LayerId(layer), extent));
                }
                found.extents += u64::from(count);
            }
            END => {
                let totals = input.u64().zip(input.u64()).filter(|_| input.at == items.len());
                let (records, extents) = totals.ok_or(impossible("the end"))?;
                return Ok(Some(Totals { records, extents }));
            }
            tag => {
                let record = Record::decode(tag, &mut input);
                take(Item::Record(record.map_err(|error| CheckpointError::Record { chunk, error })?));
                found.records += 1;
            }
        }
    }
    Ok(None)
}

fn checksum(seed: u32, number: u32, bytes: &[u8]) -> u32 {
    let place = crc32c::crc32c_append(crc32c::crc32c(&seed.to_le_bytes()), &number.to_le_bytes());
    crc32c::crc32c_append(place, bytes)
}

/// Fills `bytes` as far as the file goes.
fn read_up_to(input: &mut dyn io::Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < bytes.len() {
        match input.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}
