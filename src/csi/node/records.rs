//! What is staged and published on this node: one small file per volume.
//!
//! Invariants: a record is on stable media (fsync, rename, fsync of the directory) before the effect that it announces, and
//! is taken away after the effect that it announced is undone; it says what was asked for, never what the kernel knows.

use crate::catalog::{Access, AccessMode};
use crate::crash::crash_point;
use crate::csi::capability::Capability;
use crate::mount::Filesystem;
use crate::volume::VolumeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Format of a record; a higher one is refused.
const VERSION: u32 = 1;

/// How a volume is used at one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Use {
    /// Device or filesystem, as asked for.
    pub access: Access,
    /// By how many.
    pub mode: AccessMode,
    /// As asked for; may be sensitive.
    pub mount_flags: Vec<String>,
}

impl From<Capability> for Use {
    fn from(capability: Capability) -> Self {
        Self { access: capability.access, mode: capability.mode, mount_flags: capability.mount_flags }
    }
}

/// A volume published at one target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// How.
    pub used: Use,
    /// As asked for.
    pub readonly: bool,
}

/// A volume that is staged, or is being staged or unstaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Staged {
    /// [`VERSION`].
    version: u32,
    /// The volume.
    pub volume: VolumeId,
    /// Where.
    pub staging: PathBuf,
    /// How.
    pub used: Use,
    /// The filesystem that `used` comes to; `None` for a block volume.
    pub filesystem: Option<Filesystem>,
    /// Where it is published.
    pub targets: BTreeMap<PathBuf, Published>,
}

impl Staged {
    /// Not published yet.
    pub fn new(volume: VolumeId, staging: PathBuf, used: Use, filesystem: Option<Filesystem>) -> Self {
        Self { version: VERSION, volume, staging, used, filesystem, targets: BTreeMap::new() }
    }
}

/// A record cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The disk says no.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: Error,
    },
    /// It was not written like that, or by a later version.
    #[error(
        "{path} is damaged or of a later version ({reason}); if nothing of the volume is mounted, remove that file"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The directory of records.
#[derive(Debug)]
pub struct Records(PathBuf);

impl Records {
    /// Makes the directory if need be.
    pub fn open(directory: &Path) -> Result<Self, RecordError> {
        std::fs::create_dir_all(directory).map_err(|source| RecordError::Io { path: directory.into(), source })?;
        Ok(Self(directory.into()))
    }

    /// Where the records are.
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// The record of a volume, if there is one.
    pub fn load(&self, volume: VolumeId) -> Result<Option<Staged>, RecordError> {
        let path = self.path(volume);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(RecordError::Io { path, source }),
        };
        let damaged = |reason: String| RecordError::Damaged { path: path.clone(), reason };
        let record: Staged = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        match record {
            other if other.version != VERSION => Err(damaged(format!("version {}", other.version))),
            other if other.volume != volume => Err(damaged(format!("it is the record of volume {}", other.volume))),
            record => Ok(Some(record)),
        }
    }

    /// Writes a record; durable when it returns.
    pub fn store(&self, record: &Staged) -> Result<(), RecordError> {
        let path = self.path(record.volume);
        let new = path.with_extension("new");
        let write = || -> Result<(), Error> {
            let text = serde_json::to_vec(record)?;
            // Readable by root alone: mount flags may be sensitive.
            let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            crash_point("csi.record.named");
            std::fs::rename(&new, &path)?;
            self.sync()
        };
        write().map_err(|source| RecordError::Io { path: path.clone(), source })
    }

    /// Takes a record away; none is fine. Durable when it returns.
    pub fn remove(&self, volume: VolumeId) -> Result<(), RecordError> {
        let path = self.path(volume);
        let removed = match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => self.sync(),
        };
        removed.map_err(|source| RecordError::Io { path, source })
    }

    fn sync(&self) -> Result<(), Error> {
        File::open(&self.0)?.sync_all()
    }

    fn path(&self, volume: VolumeId) -> PathBuf {
        self.0.join(format!("{volume}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> (tempfile::TempDir, Records) {
        let directory = tempfile::Builder::new().prefix("tandem-records-").tempdir().expect("temporary directory");
        let records = Records::open(&directory.path().join("staged")).expect("open");
        (directory, records)
    }

    fn record() -> Staged {
        let used = Use {
            access: Access::Mount(None),
            mode: AccessMode::SingleNodeWriter,
            mount_flags: vec!["noatime".into()],
        };
        let mut record = Staged::new(VolumeId::random(), "/staging/é \n".into(), used.clone(), Some(Filesystem::Ext4));
        record.targets.insert("/target".into(), Published { used, readonly: true });
        record
    }

    #[test]
    fn a_record_comes_back_as_it_was_until_it_is_removed() {
        let (_directory, records) = records();
        let record = record();
        assert_eq!(records.load(record.volume).expect("none"), None);
        records.store(&record).expect("store");
        assert_eq!(records.load(record.volume).expect("one"), Some(record.clone()));
        records.remove(record.volume).expect("remove");
        records.remove(record.volume).expect("again");
        assert_eq!(records.load(record.volume).expect("none"), None);
    }

    #[test]
    fn damage_and_later_versions_are_named() {
        let (_directory, records) = records();
        let record = record();
        let path = records.path(record.volume);
        records.store(&record).expect("store");
        let text = std::fs::read_to_string(&path).expect("read");
        let other = VolumeId::random().to_string();
        for damage in [
            text[..text.len() / 2].to_owned(),
            text.replace("\"version\":1", "\"version\":2"),
            text.replace(&record.volume.to_string(), &other),
        ] {
            std::fs::write(&path, damage).expect("write");
            let error = records.load(record.volume).expect_err("damaged").to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }
}
