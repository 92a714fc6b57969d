//! The file `mirror` as version 1 had it, with room for fewer marks: it is written anew when its tree is opened.
//!
//! Invariants: the old file counts until the new one is durable under its name, so after a crash it is done again from the
//! beginning; regions keep their numbers and slots their parity; what was not valid does not become so. An older Tandem
//! refuses the new file by its version.

use super::super::files::{Files, Name};
use super::super::format::{BLOCK, HeaderError, Kind, check_prefix, seal};
use super::slot::{HOT, HOT_AREA, HOT_SLOT, RECORD, REGION};
use std::io;

/// Bytes of a slot for a hot set then. Records had as much room as now.
const OLD_HOT_SLOT: usize = 2 * 5 * BLOCK;
/// Bytes of a region then.
const OLD_REGION: usize = HOT_AREA + 2 * OLD_HOT_SLOT;
const OLD_VERSION: u32 = 1;
/// Where a header block has its version.
const VERSION: std::ops::Range<usize> = 8..12;

/// Writes the file as it is now, if it is older.
pub(super) fn convert(files: &dyn Files) -> io::Result<()> {
    let size = files.size(Name::Mirror)?.unwrap_or(0);
    let mut bytes = vec![0; OLD_REGION];
    let regions = size.div_ceil(OLD_REGION as u64);
    for region in 0..regions {
        read(files, region, size, &mut bytes)?;
        match version(&bytes) {
            // Nothing here says which it is.
            None => {}
            Some(OLD_VERSION) => return write_anew(files, size, &mut bytes),
            Some(_) => return Ok(()),
        }
    }
    Ok(())
}

fn write_anew(files: &dyn Files, size: u64, bytes: &mut [u8]) -> io::Result<()> {
    files.remove(Name::MirrorNew)?;
    files.create(Name::MirrorNew)?;
    for region in 0..size.div_ceil(OLD_REGION as u64) {
        read(files, region, size, bytes)?;
        files.write_at(Name::MirrorNew, region * REGION as u64, &renewed(bytes))?;
    }
    // Whole and durable before it has the name.
    files.sync(Name::MirrorNew)?;
    files.rename(Name::MirrorNew, Name::Mirror)?;
    files.sync_names()
}

fn read(files: &dyn Files, region: u64, size: u64, bytes: &mut [u8]) -> io::Result<()> {
    let offset = region * OLD_REGION as u64;
    let length = (size - offset).min(OLD_REGION as u64) as usize;
    bytes[length..].fill(0);
    files.read_at(Name::Mirror, offset, &mut bytes[..length])
}

/// The version of the first sound block that begins a copy.
fn version(bytes: &[u8]) -> Option<u32> {
    bytes.chunks(BLOCK).find(|block| is_header(block)).map(|block| {
        let mut version = [0; 4];
        version.copy_from_slice(&block[VERSION]);
        u32::from_le_bytes(version)
    })
}

fn is_header(block: &[u8]) -> bool {
    let is = |kind: &Kind| match check_prefix(block, kind) {
        Ok(_) => true,
        // Of a Tandem that is newer than this one: it is named when it is read.
        Err(HeaderError::Version { .. } | HeaderError::Incompatible(_)) => true,
        Err(_) => false,
    };
    is(&RECORD) || is(&HOT)
}

/// A region as it is now.
fn renewed(old: &[u8]) -> Vec<u8> {
    let (records, sets) = old.split_at(HOT_AREA);
    let mut new = vec![0; REGION];
    new[..HOT_AREA].copy_from_slice(records);
    for (parity, set) in sets.chunks(OLD_HOT_SLOT).enumerate() {
        new[HOT_AREA + parity * HOT_SLOT..][..OLD_HOT_SLOT].copy_from_slice(set);
    }
    for block in new.chunks_mut(BLOCK).filter(|block| is_header(block)) {
        block[VERSION].copy_from_slice(&RECORD.version.to_le_bytes());
        seal(block);
    }
    new
}

/// The file as version 1 would have it.
#[cfg(test)]
pub(in crate::store) fn aged(new: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for region in new.chunks(REGION) {
        let (records, sets) = region.split_at(HOT_AREA);
        all.extend_from_slice(records);
        sets.chunks(HOT_SLOT).for_each(|set| all.extend_from_slice(&set[..OLD_HOT_SLOT]));
    }
    for block in all.chunks_mut(BLOCK).filter(|block| is_header(block)) {
        block[VERSION].copy_from_slice(&OLD_VERSION.to_le_bytes());
        seal(block);
    }
    all
}
