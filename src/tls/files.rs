//! The files of an authority and of a certificate: their names, and how they are written and read.
//!
//! Invariants: a file that is there is never replaced; a key is never readable by others, not for a moment; when one of
//! several files cannot be written, none is left.

use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The authority's certificate: what peers are checked against.
pub const AUTHORITY: &str = "ca.crt";
/// The authority's key: whoever has it can be anybody in the cluster.
pub const AUTHORITY_KEY: &str = "ca.key";
/// A process's own certificate.
pub const CERTIFICATE: &str = "tls.crt";
/// Its key.
pub const KEY: &str = "tls.key";

/// Bytes of the largest file that is read: a bundle of many authorities fits, a disk does not.
const MAX_FILE: u64 = 1 << 20;

/// Why a file could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is there already.
    #[error("{0} exists and is never overwritten: choose another directory, or move it away first")]
    Exists(PathBuf),
    /// It is not there.
    #[error("there is no {0}: `tandem certificates` makes it, or the directory is another one")]
    Missing(PathBuf),
    /// It is far too large.
    #[error("{0} has more than {MAX_FILE} bytes: it is no certificate or key in PEM")]
    TooLarge(PathBuf),
    /// It is binary.
    #[error("{0} is no text: it is no certificate or key in PEM")]
    NoText(PathBuf),
    /// The system refuses.
    #[error("cannot {doing} {path}: {source}")]
    System {
        /// make, write, read.
        doing: &'static str,
        /// What.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// One file that shall be there.
pub(super) struct File<'a> {
    /// In the directory.
    pub name: &'a str,
    /// PEM.
    pub text: &'a str,
    /// Only its owner may read it.
    pub secret: bool,
}

/// Makes the directory if need be, and all files in it or none.
pub(super) fn write(directory: &Path, files: &[File<'_>]) -> Result<(), FileError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|source| FileError::System { doing: "make", path: directory.into(), source })?;
    let mut written = Vec::new();
    for file in files {
        let path = directory.join(file.name);
        match create(&path, file) {
            Ok(()) => written.push(path),
            Err(error) => {
                written.iter().for_each(|path| drop(std::fs::remove_file(path)));
                return Err(error);
            }
        }
    }
    let synced = std::fs::File::open(directory).and_then(|opened| opened.sync_all());
    synced.map_err(|source| FileError::System { doing: "write", path: directory.into(), source })
}

fn create(path: &Path, file: &File<'_>) -> Result<(), FileError> {
    let mode = if file.secret { 0o600 } else { 0o644 };
    let failed = |source: std::io::Error| match source.kind() {
        ErrorKind::AlreadyExists => FileError::Exists(path.into()),
        _ => FileError::System { doing: "write", path: path.into(), source },
    };
    let mut opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    opened.write_all(file.text.as_bytes()).and_then(|()| opened.sync_all()).map_err(|source| {
        // Ours: it was not there before.
        drop(std::fs::remove_file(path));
        failed(source)
    })
}

/// The text of a file.
pub(super) fn read(directory: &Path, name: &str) -> Result<String, FileError> {
    let path = directory.join(name);
    let failed = |source: std::io::Error| match source.kind() {
        ErrorKind::NotFound => FileError::Missing(path.clone()),
        _ => FileError::System { doing: "read", path: path.clone(), source },
    };
    if std::fs::metadata(&path).map_err(failed)?.len() > MAX_FILE {
        return Err(FileError::TooLarge(path));
    }
    let bytes = std::fs::read(&path).map_err(failed)?;
    String::from_utf8(bytes).map_err(|_| FileError::NoText(path.clone()))
}
