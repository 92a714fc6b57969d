//! The file `mirror`: for each volume of the tree that has copies elsewhere, what its copy is under and where it is hot.
//!
//! One region per volume: found by its volume's id, and free if the tree has no such volume (ids are never used again).
//! ```text
//!   region  two slots for records (2 x 34 blocks of 4096 bytes), two for hot sets (2 x 66 blocks)
//!   slot    the same copy twice, one after the other, each:
//!           0 prefix (format.rs)   48 volume (16)   64 sequence (8)   72 bytes of the body (4)
//!           76 crc32c of the blocks after the first (4)   80 body, zeros to the end of the block
//!   record  stamp (16)   term (16)   flags (1: 1 intact, 2 has a primary, 4 lost)   primary (16)   boot (16)
//!           secondaries: n (1), n of id (16)
//!           candidates: n (1), n of id (16), 0 everything or 1 since (1), since which stamp (16)
//!           lacking: n (1), n of since (16), base layer or all ones: unknown (4), extents: m (4), m of number (4)
//!           if flagged: since which stamp writes are lost (16); a Tandem that does not know the flag refuses the record
//!   hot     extents: m (4), m of number (4), ascending
//!   stamp   generation (8)   version (8)
//! ```
//! # Invariants
//! * A slot is one write and one fdatasync, and sequence number n goes to slot n modulo 2: a torn write harms only what is
//!   older than the one before it. The valid copy with the highest number counts.
//! * Each slot has two copies, so damage of one block never makes the set before count as the newest. If a crash has
//!   torn the newest, there are two again when it was read.
//! * Both slots were written and no copy is valid: named, never guessed around.

use super::super::format::{
    BLOCK, HeaderError, Input, Kind, LayerId, Output, PREFIX, check_instance, check_prefix, seal, write_prefix,
};
use super::state::{Kept, Lacking, Part, SPOILT};
use crate::protocol::{
    Configuration, ConfigurationVersion, Extent, Generation, Lacks, MAX_COPIES, MAX_HOT_EXTENTS, MAX_MARKS, Record,
    Stamp,
};
use crate::volume::{BootId, InstanceId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// What a record's block begins with. Version 1 had other places (older.rs).
pub const RECORD: Kind = Kind { magic: *b"TandemMR", version: 2, incompatible: 0 };
/// What a hot set's block begins with.
pub const HOT: Kind = Kind { magic: *b"TandemMH", version: 2, incompatible: 0 };

/// Most extents that a record names, for all copies that left: a primary's own marks when each of two left. A copy for
/// which there is no room lacks everything.
pub const MAX_LEFT: usize = 2 * MAX_HOT_EXTENTS;
/// Bytes of a slot for a record: two copies of a full one.
pub const RECORD_SLOT: usize = 2 * 17 * BLOCK;
/// Bytes of a slot for a hot set: two copies of [`MAX_MARKS`].
pub const HOT_SLOT: usize = 2 * 33 * BLOCK;
/// Where the hot sets are in a region.
pub const HOT_AREA: usize = 2 * RECORD_SLOT;
/// Bytes of a region.
pub const REGION: usize = HOT_AREA + 2 * HOT_SLOT;

/// Where in a region the slot with this sequence number begins, and its length, in bytes.
pub fn place(part: Part, sequence: u64) -> (usize, usize) {
    let parity = sequence as usize % 2;
    match part {
        Part::Record => (parity * RECORD_SLOT, RECORD_SLOT),
        Part::Hot => (HOT_AREA + parity * HOT_SLOT, HOT_SLOT),
    }
}

const BODY: usize = PREFIX + 32;
const NO_LAYER: u32 = u32::MAX;
const INTACT: u8 = 1;
const HAS_PRIMARY: u8 = 2;
const LOST: u8 = 4;

/// A copy that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    pub volume: VolumeId,
    pub sequence: u64,
    pub body: &'a [u8],
}

/// Fills a slot from its start with both copies; the bytes that are to be written.
pub fn encode(
    kind: &Kind,
    instance: InstanceId,
    volume: VolumeId,
    sequence: u64,
    body: &[u8],
    slot: &mut [u8],
) -> usize {
    let length = (BODY + body.len()).next_multiple_of(BLOCK);
    let (first, second) = slot[..2 * length].split_at_mut(length);
    first.fill(0);
    write_prefix(first, kind, instance);
    let mut out = Output { bytes: first, at: BODY };
    out.put(body);
    let rest = crc32c::crc32c(&first[BLOCK..]);
    let mut out = Output { bytes: first, at: PREFIX };
    out.put(&volume.to_bytes());
    out.u64(sequence);
    out.u32(body.len() as u32);
    out.u32(rest);
    seal(&mut first[..BLOCK]);
    second.copy_from_slice(first);
    2 * length
}

/// Reads the copy that begins where `bytes` do.
pub fn decode<'a>(kind: &Kind, instance: InstanceId, bytes: &'a [u8]) -> Result<Found<'a>, HeaderError> {
    let (of, mut fields) = check_prefix(bytes, kind)?;
    check_instance(of, instance)?;
    let short = |need| HeaderError::Truncated { need, have: bytes.len() };
    let volume = VolumeId::from_bytes(fields.take().ok_or(short(BODY))?);
    let sequence = fields.u64().ok_or(short(BODY))?;
    let length = fields.u32().ok_or(short(BODY))? as usize;
    let stored = fields.u32().ok_or(short(BODY))?;
    let end = (BODY + length).next_multiple_of(BLOCK);
    let computed = crc32c::crc32c(bytes.get(BLOCK..end).ok_or(short(end))?);
    if stored != computed {
        return Err(HeaderError::Checksum { stored, computed });
    }
    Ok(Found { volume, sequence, body: &bytes[BODY..BODY + length] })
}

/// The newest copy in two slots that belongs to a volume which `is_wanted`.
pub fn newest<'a>(
    kind: &Kind,
    instance: InstanceId,
    slots: &'a [u8],
    is_wanted: impl Fn(VolumeId) -> bool,
) -> Result<Option<Found<'a>>, HeaderError> {
    let (mut newest, mut any): (Option<Found<'a>>, bool) = (None, false);
    let mut damage = None;
    // The second copy may begin at any block, behind the first.
    for at in (0..slots.len()).step_by(BLOCK) {
        match decode(kind, instance, &slots[at..]) {
            Ok(found) => {
                any = true;
                if is_wanted(found.volume) && newest.is_none_or(|newest| newest.sequence < found.sequence) {
                    newest = Some(found);
                }
            }
            Err(HeaderError::Magic { .. } | HeaderError::Checksum { .. } | HeaderError::Truncated { .. }) => {}
            // Whole, and not for this Tandem.
            Err(error) => return Err(error),
        }
    }
    let is_spoilt = |slot: &[u8]| slot[..BLOCK].iter().all(|byte| *byte == SPOILT);
    if slots.chunks(slots.len() / 2).all(is_spoilt) {
        // Versions before this one did so to a region whose volume was deleted; one that has a volume keeps its newest slot.
        return Ok(newest);
    }
    for slot in slots.chunks(slots.len() / 2) {
        if slot[..BLOCK].iter().all(|byte| *byte == 0) {
            // Never written: what is damaged in the other one is a first write that was torn.
            return Ok(newest);
        }
        damage = damage.or(decode(kind, instance, slot).err());
    }
    match damage {
        Some(error) if !any => Err(error),
        _ => Ok(newest),
    }
}

/// What a torn write or damage has left of the two copies with this sequence number: where in the slot the other one begins, and
/// what belongs there. `None` if both are whole, or none is.
pub fn lost_copy<'a>(kind: &Kind, instance: InstanceId, slot: &'a [u8], sequence: u64) -> Option<(usize, &'a [u8])> {
    let is_it =
        |at: usize| Some((at, decode(kind, instance, &slot[at..]).ok().filter(|found| found.sequence == sequence)?));
    let (at, found) = (0..slot.len()).step_by(BLOCK).find_map(is_it)?;
    let length = (BODY + found.body.len()).next_multiple_of(BLOCK);
    let other = if at == 0 { length } else { 0 };
    let copy = &slot[at..at + length];
    slot.get(other..other + length).filter(|there| *there != copy).map(|_| (other, copy))
}

/// The body of a record.
pub fn encode_record(kept: &Kept) -> Vec<u8> {
    let configuration = &kept.record.configuration;
    let mut body = Vec::new();
    put_stamp(&mut body, configuration.stamp);
    put_stamp(&mut body, configuration.term);
    let (primary, lost) = (configuration.primary, configuration.lost != Stamp::default());
    let flags = [(kept.record.intact, INTACT), (primary.is_some(), HAS_PRIMARY), (lost, LOST)];
    body.push(flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum());
    body.extend(primary.map_or([0; 16], InstanceId::to_bytes));
    body.extend(kept.boot.to_bytes());
    body.push(configuration.secondaries.len() as u8);
    body.extend(configuration.secondaries.iter().flat_map(|copy| copy.to_bytes()));
    body.push(configuration.candidates.len() as u8);
    for (copy, lacks) in &configuration.candidates {
        body.extend(copy.to_bytes());
        let (kind, since) = match lacks {
            Lacks::Everything => (0, Stamp::default()),
            Lacks::Since(since) => (1, *since),
        };
        body.push(kind);
        put_stamp(&mut body, since);
    }
    body.push(kept.lacking.len() as u8);
    for lacking in &kept.lacking {
        put_stamp(&mut body, lacking.since);
        body.extend(lacking.base.map_or(NO_LAYER, |layer| layer.0).to_le_bytes());
        put_extents(&mut body, &lacking.hot);
    }
    if lost {
        put_stamp(&mut body, configuration.lost);
    }
    body
}

/// Reads the body of a record.
pub fn decode_record(body: &[u8]) -> Result<Kept, HeaderError> {
    let mut fields = Fields(Input { bytes: body, at: 0 });
    let (stamp, term) = (fields.stamp("stamp")?, fields.stamp("term")?);
    let flags = fields.count("flags", usize::from(INTACT | HAS_PRIMARY | LOST))? as u8;
    let primary = InstanceId::from_bytes(fields.id("primary")?);
    let primary = (flags & HAS_PRIMARY != 0).then_some(primary);
    let boot = BootId::from_bytes(fields.id("boot")?);
    let mut secondaries = BTreeSet::new();
    for _ in 0..fields.count("secondaries", MAX_COPIES)? {
        secondaries.insert(InstanceId::from_bytes(fields.id("secondary")?));
    }
    let mut candidates = BTreeMap::new();
    for _ in 0..fields.count("candidates", MAX_COPIES)? {
        let copy = InstanceId::from_bytes(fields.id("candidate")?);
        let kind = fields.count("candidate", 1)?;
        let since = fields.stamp("candidate")?;
        candidates.insert(copy, if kind == 0 { Lacks::Everything } else { Lacks::Since(since) });
    }
    let mut lacking = Vec::new();
    for _ in 0..fields.count("lacking", MAX_COPIES)? {
        let since = fields.stamp("lacking")?;
        let base = fields.0.u32().ok_or(HeaderError::Field("base"))?;
        let base = (base != NO_LAYER).then_some(LayerId(base));
        lacking.push(Lacking { since, base, hot: fields.extents()?.into() });
    }
    let lost = if flags & LOST == 0 { Stamp::default() } else { fields.stamp("lost")? };
    let configuration = Configuration { stamp, term, primary, secondaries, candidates, lost };
    fields.end(Kept { record: Record { configuration, intact: flags & INTACT != 0 }, boot, lacking })
}

/// The body of a hot set, which ascends.
pub fn encode_hot(extents: &[Extent]) -> Vec<u8> {
    let mut body = Vec::with_capacity(4 + 4 * extents.len());
    put_extents(&mut body, extents);
    body
}

/// Reads the body of a hot set.
pub fn decode_hot(body: &[u8]) -> Result<Vec<Extent>, HeaderError> {
    let mut fields = Fields(Input { bytes: body, at: 0 });
    let extents = fields.extents()?;
    fields.end(extents)
}

fn put_stamp(body: &mut Vec<u8>, stamp: Stamp) {
    body.extend(stamp.generation.0.to_le_bytes());
    body.extend(stamp.version.0.to_le_bytes());
}

fn put_extents(body: &mut Vec<u8>, extents: &[Extent]) {
    body.extend((extents.len() as u32).to_le_bytes());
    body.extend(extents.iter().flat_map(|extent| extent.0.to_le_bytes()));
}

/// The checksum is right: a field that is not was written by a defective Tandem.
struct Fields<'a>(Input<'a>);

impl Fields<'_> {
    fn id(&mut self, name: &'static str) -> Result<[u8; 16], HeaderError> {
        self.0.take().ok_or(HeaderError::Field(name))
    }

    fn stamp(&mut self, name: &'static str) -> Result<Stamp, HeaderError> {
        let generation = Generation(self.0.u64().ok_or(HeaderError::Field(name))?);
        let version = ConfigurationVersion(self.0.u64().ok_or(HeaderError::Field(name))?);
        Ok(Stamp { generation, version })
    }

    fn count(&mut self, name: &'static str, most: usize) -> Result<usize, HeaderError> {
        let count = self.0.u8().map(usize::from).filter(|count| *count <= most);
        count.ok_or(HeaderError::Field(name))
    }

    fn extents(&mut self) -> Result<Vec<Extent>, HeaderError> {
        let wrong = HeaderError::Field("extents");
        let count = self.0.u32().filter(|count| *count as usize <= MAX_MARKS).ok_or(wrong)?;
        let extents: Option<Vec<Extent>> = (0..count).map(|_| self.0.u32().map(Extent)).collect();
        extents.filter(|extents| extents.is_sorted_by(|a, b| a < b)).ok_or(wrong)
    }

    fn end<T>(&self, value: T) -> Result<T, HeaderError> {
        if self.0.at == self.0.bytes.len() { Ok(value) } else { Err(HeaderError::Field("length")) }
    }
}
