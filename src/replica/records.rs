//! What must be known to rebuild the catalogue lies beside each copy: one small file per volume and snapshot.
//!
//! ```text
//!   TREE/records/<uuid>     one line of JSON, then one line "crc32c <8 hex digits>" over it
//! ```
//! # Invariants
//! * A record is durable before the object that it describes is named in the map log; a record without object is removed
//!   at the next start, an object without record is served all the same (with an empty descriptor).
//! * A damaged record is named and never deleted.

use super::pool::sync_directory;
use crate::crash::crash_point;
use crate::volume::SnapshotId;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Longest record in bytes: CSI's maps are 4 KiB each, a descriptor holds a few of them.
const MAX_BYTES: u64 = 256 << 10;
const VERSION: u32 = 1;

/// What is known of a volume or snapshot beside the map log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The controller's own text.
    pub descriptor: String,
    /// The snapshot it is being copied from; gone when the copy is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copying: Option<SnapshotId>,
}

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not fit its checksum or format.
    #[error("{path} is damaged: {what}; the volume works, `tandem recover` cannot use it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
}

impl Record {
    /// A record with this text.
    pub fn new(descriptor: String, copying: Option<SnapshotId>) -> Self {
        Self { version: VERSION, descriptor, copying }
    }

    /// Writes it durably in place of an older one. Blocking.
    pub fn write(&self, tree: &Path, id: &str) -> Result<(), RecordError> {
        let directory = tree.join("records");
        let path = directory.join(id);
        let at = |source| RecordError::Io { path: path.clone(), source };
        let json = serde_json::to_string(self).map_err(|e| at(e.into()))?;
        let fresh = directory.join(format!("{id}.new"));
        crash_point("record.write");
        fs::create_dir_all(&directory).map_err(at)?;
        let mut file = File::create(&fresh).map_err(at)?;
        writeln!(file, "{json}\ncrc32c {:08x}", crc32c::crc32c(json.as_bytes())).map_err(at)?;
        file.sync_all().map_err(at)?;
        crash_point("record.name");
        fs::rename(&fresh, &path).map_err(at)?;
        sync_directory(&directory).map_err(at)?;
        crash_point("record.written");
        Ok(())
    }

    /// Reads it; `None` if there is none. Blocking.
    pub fn read(tree: &Path, id: &str) -> Result<Option<Self>, RecordError> {
        let path = tree.join("records").join(id);
        let at = |source| RecordError::Io { path: path.clone(), source };
        let damaged = |what: String| RecordError::Damaged { path: path.clone(), what };
        match fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(at(e)),
            Ok(meta) if meta.len() > MAX_BYTES => return Err(damaged(format!("{} bytes", meta.len()))),
            Ok(_) => {}
        }
        let bytes = fs::read(&path).map_err(at)?;
        let text = String::from_utf8(bytes).map_err(|e| damaged(e.to_string()))?;
        let (json, sum) = text.split_once('\n').ok_or_else(|| damaged("it is cut short".to_owned()))?;
        if sum.trim_end() != format!("crc32c {:08x}", crc32c::crc32c(json.as_bytes())) {
            return Err(damaged("its checksum does not fit".to_owned()));
        }
        let record: Self = serde_json::from_str(json).map_err(|e| damaged(e.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!("version {} needs a newer tandem", record.version)));
        }
        Ok(Some(record))
    }

    /// Removes it; that there is none is success. Blocking.
    pub fn remove(tree: &Path, id: &str) -> Result<(), RecordError> {
        let path = tree.join("records").join(id);
        crash_point("record.remove");
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RecordError::Io { path, source: e }),
            _ => Ok(()),
        }
    }

    /// The same; after a power cut it is not back. Blocking.
    pub fn remove_durably(tree: &Path, id: &str) -> Result<(), RecordError> {
        let directory = tree.join("records");
        Self::remove(tree, id)?;
        // Also if it is gone already: whoever has removed it may have died before that was durable.
        match sync_directory(&directory) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RecordError::Io { path: directory, source }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_damage_is_named() {
        let dir = tempfile::Builder::new().prefix("tandem-records").tempdir().expect("temporary directory");
        let record = Record::new("{\"name\":\"ü\\n\"}".to_owned(), Some(SnapshotId::random()));
        assert!(Record::read(dir.path(), "x").expect("readable").is_none());
        record.write(dir.path(), "x").expect("written");
        assert_eq!(Record::read(dir.path(), "x").expect("readable"), Some(record));
        let path = dir.path().join("records/x");
        let good = fs::read(&path).expect("read");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).expect("write");
            let same = Record::read(dir.path(), "x").ok().flatten();
            assert!(same.is_none(), "byte {at} flipped and accepted");
        }
        Record::remove(dir.path(), "x").expect("removed");
        Record::remove(dir.path(), "x").expect("again");
    }
}
