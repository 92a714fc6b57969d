//! The files of one tree, as blocking calls: for create, open and the jobs of helper threads; never for requests.
//!
//! Invariants: a write or read is whole or an error; nothing is durable before its `sync`, and no name before `sync_names`.

use super::{File, LogSlot};
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::libc;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file of a tree's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// What the directory is; written once.
    Superblock,
    /// Physical blocks. Read and written directly, so buffers, offsets and lengths must be multiples of 4096.
    Data,
    /// A map log.
    Log(LogSlot),
    /// The whole map.
    Checkpoint,
    /// The next checkpoint, until it has that name; between two of them, the last but one: disk space that is kept.
    CheckpointNew,
    /// crc32c of the physical blocks of sealed layers.
    Checksums,
    /// What is about to be written there, so that a torn write harms no other layer's checksums.
    ChecksumsRedo,
    /// What volumes with several copies are under.
    Mirror,
    /// The same as it is written anew from an older version, until it is renamed.
    MirrorNew,
}

impl Name {
    /// Its name in the directory.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Data => "data",
            Self::Log(LogSlot::A) => "log-a",
            Self::Log(LogSlot::B) => "log-b",
            Self::Checkpoint => "checkpoint",
            Self::CheckpointNew => "checkpoint.new",
            Self::Checksums => "checksums",
            Self::ChecksumsRedo => "checksums.redo",
            Self::Mirror => "mirror",
            Self::MirrorNew => "mirror.new",
        }
    }
}

impl From<File> for Name {
    fn from(file: File) -> Self {
        match file {
            File::Data => Self::Data,
            File::Log(slot) => Self::Log(slot),
            File::Mirror => Self::Mirror,
        }
    }
}

/// A tree's directory. Real ([`Directory`]) and simulated.
pub trait Files: Send + Sync {
    /// Makes an empty file; an error if there is one.
    fn create(&self, name: Name) -> io::Result<()>;
    /// Bytes of a file; `None` if there is none.
    fn size(&self, name: Name) -> io::Result<Option<u64>>;
    /// Fills the buffer; an error if the file ends before.
    fn read_at(&self, name: Name, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Writes all of the buffer; the file grows as needed.
    fn write_at(&self, name: Name, offset: u64, buffer: &[u8]) -> io::Result<()>;
    /// Makes content and size durable.
    fn sync(&self, name: Name) -> io::Result<()>;
    /// Renames, over what is there.
    fn rename(&self, from: Name, to: Name) -> io::Result<()>;
    /// Each of two files that are there gets the name of the other, in one step.
    fn exchange(&self, one: Name, other: Name) -> io::Result<()>;
    /// Removes; a file that is not there is a success.
    fn remove(&self, name: Name) -> io::Result<()>;
    /// Makes what was created, renamed and removed durable.
    fn sync_names(&self) -> io::Result<()>;
    /// Keeps disk space for the first `bytes` of a file, which is made if there is none; its size does not change.
    fn reserve(&self, name: Name, bytes: u64) -> io::Result<()>;
    /// For how many bytes from its beginning a file has disk space, at least; 0 if there is no file.
    fn reserved(&self, name: Name) -> io::Result<u64>;
}

/// Of the space of a file, so much may be the filesystem's own: where its pieces are.
const BOOKKEEPING_BYTES: u64 = 64 << 10;

/// Whether the disk, or what may be used of it, is full: then it had no effect, and can be repeated.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A directory of a real filesystem.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// The directory at `path`, which must exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of a file in it: the engine opens those of [`File`] with O_DIRECT by itself.
    pub fn path_of(&self, name: Name) -> PathBuf {
        self.path.join(name.as_str())
    }

    fn open(&self, name: Name, write: bool) -> io::Result<fs::File> {
        let mut options = OpenOptions::new();
        options.read(true).write(write);
        if name == Name::Data {
            // The engine writes it directly, too: what a page cache kept would be stale.
            options.custom_flags(libc::O_DIRECT);
        }
        options.open(self.path_of(name))
    }
}

impl Files for Directory {
    fn create(&self, name: Name) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.path_of(name)).map(drop)
    }

    fn size(&self, name: Name) -> io::Result<Option<u64>> {
        match fs::metadata(self.path_of(name)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read_at(&self, name: Name, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.open(name, false)?.read_exact_at(buffer, offset)
    }

    fn write_at(&self, name: Name, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.open(name, true)?.write_all_at(buffer, offset)
    }

    fn sync(&self, name: Name) -> io::Result<()> {
        // fdatasync: also what another descriptor wrote, and a size that changed.
        self.open(name, true)?.sync_data()
    }

    fn rename(&self, from: Name, to: Name) -> io::Result<()> {
        fs::rename(self.path_of(from), self.path_of(to))
    }

    fn exchange(&self, one: Name, other: Name) -> io::Result<()> {
        let (one, other) = (self.path_of(one), self.path_of(other));
        Ok(renameat2(AT_FDCWD, &one, AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE)?)
    }

    fn remove(&self, name: Name) -> io::Result<()> {
        match fs::remove_file(self.path_of(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        fs::File::open(&self.path)?.sync_all()
    }

    fn reserve(&self, name: Name, bytes: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(self.path_of(name))?;
        let there = reserved(&file.metadata()?);
        if there >= bytes {
            return Ok(());
        }
        // XFS wants free space for all of the range, also for what has its own already.
        let more = bytes + BOOKKEEPING_BYTES - there;
        Ok(fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, there.cast_signed(), more.cast_signed())?)
    }

    fn reserved(&self, name: Name) -> io::Result<u64> {
        match fs::metadata(self.path_of(name)) {
            Ok(metadata) => Ok(reserved(&metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        }
    }
}

/// Files whose space is kept are written from front to back: what they have is at their beginning.
fn reserved(metadata: &fs::Metadata) -> u64 {
    (metadata.blocks() * 512).saturating_sub(BOOKKEEPING_BYTES)
}
