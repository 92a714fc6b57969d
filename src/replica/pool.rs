//! A pool: a directory on a filesystem with O_DIRECT (or a disk that Tandem formats itself) that holds copies.
//!
//! ```text
//!   POOL/pool.tandem                superblock: pool id, format version; locked while a replica uses the pool
//!   POOL/trees/<instance>/          one copy: see `store`
//!   POOL/trees/<instance>.new/      being created: removed at the next start
//!   POOL/trash/<instance>/          deleted: given back to the filesystem piece by piece
//! ```
//! # Invariants
//! * One replica uses a pool at a time: it holds the lock of the superblock.
//! * Nothing is promised that is not there: promised <= (used + free in the filesystem) x overcommit, with [`Promises`]
//!   as the only place where a promise is made.

use crate::store::is_full;
use crate::volume::{InstanceId, PoolId};
use nix::sys::statfs;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

mod disk;
mod nocow;
pub mod promises;
pub mod trash;
pub use promises::{Promise, Promises};

const MAGIC: [u8; 8] = *b"TNDMPOOL";
const VERSION: u32 = 1;
/// Incompatible features this version understands: none yet.
const INCOMPATIBLE: u64 = 0;
const SUPERBLOCK: &str = "pool.tandem";
const SUPERBLOCK_BYTES: usize = 4096;

/// A pool's name in StorageClass parameters and on the command line: 1 to 63 of `a-z 0-9 - _ .`, the first a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolName(String);

impl PoolName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for PoolName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is no pool name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no pool name: use 1 to 63 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit")]
pub struct BadPoolName(String);

impl std::str::FromStr for PoolName {
    type Err = BadPoolName;
    fn from_str(text: &str) -> Result<Self, BadPoolName> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let fits = (1..=63).contains(&text.len())
            && text.starts_with(plain)
            && text.chars().all(|c| plain(c) || matches!(c, '-' | '_' | '.'));
        if fits { Ok(Self(text.to_owned())) } else { Err(BadPoolName(text.to_owned())) }
    }
}

/// Why a path cannot be a pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Neither a directory nor a block device, or not accessible.
    #[error("pool path {path}: {source}; make the directory writable for root or name another one")]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Wrong filesystem.
    #[error("pool {path} is on {found}; Tandem needs ext4, xfs or btrfs: mount one of them there, or name a disk")]
    Filesystem {
        /// The path.
        path: PathBuf,
        /// What it is on.
        found: String,
    },
    /// The filesystem refuses O_DIRECT.
    #[error(
        "pool {path} does not take direct I/O ({source}); choose a filesystem without encryption or compression in front"
    )]
    NoDirectIo {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Read-only.
    #[error("pool {0} is read-only; remount it read-write, or look in the kernel log for why it was remounted")]
    ReadOnly(PathBuf),
    /// Another replica has it.
    #[error("pool {0} is used by another tandem; stop that one, or name another pool")]
    InUse(PathBuf),
    /// The superblock is damaged or of another program.
    #[error("pool {path}: {what}")]
    Superblock {
        /// The path.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// The disk carries something.
    #[error("{path} carries {found}; nothing was written. Use --force only if that may be destroyed")]
    Occupied {
        /// The device.
        path: PathBuf,
        /// The signature.
        found: String,
    },
    /// There is none, and there was one.
    #[error(
        "pool {path} is not there: it was pool {id} and is empty now. Mount its filesystem or bring its disk back; if it is lost \
         for good, `tandem pool add --force` begins an empty one"
    )]
    Gone {
        /// Where it was.
        path: PathBuf,
        /// Its id.
        id: PoolId,
    },
    /// Another one is there.
    #[error(
        "{path} has pool {found}, and not {id}, which was there before; name the right path, or `tandem pool add --force` to \
         use this one instead"
    )]
    Another {
        /// Where.
        path: PathBuf,
        /// The one that is there.
        found: PoolId,
        /// The one that was.
        id: PoolId,
    },
    /// mkfs or mount failed.
    #[error("disk {path}: {what}")]
    Disk {
        /// The device.
        path: PathBuf,
        /// What failed and what to do.
        what: String,
    },
}

impl PoolError {
    /// The pool that was there before is not.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Another { .. })
    }
}

/// Filesystems under a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filesystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs: copy-on-write is switched off for the copies.
    Btrfs,
}

impl Filesystem {
    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

/// Space of a pool's filesystem in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Free for us now.
    pub free: u64,
    /// Size of the filesystem.
    pub total: u64,
}

/// What may be found where a pool is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The pool that was there before. A place without it has lost its mount or its disk: nothing is made there.
    Known(PoolId),
    /// Any pool; an empty place, or a blank disk, becomes one.
    Any,
    /// The same, and what a disk carries otherwise is lost.
    Force,
}

/// An open, locked pool.
pub struct Pool {
    /// Its name on this node.
    pub name: PoolName,
    /// As the operator gave it: a directory or a disk.
    pub source: PathBuf,
    /// The directory in use.
    pub path: PathBuf,
    /// Written in its superblock.
    pub id: PoolId,
    /// What it is on.
    pub filesystem: Filesystem,
    /// The kernel's number of that filesystem: two pools with the same one share its space.
    pub device: u64,
    _lock: File,
}

impl Pool {
    /// Opens the pool; as far as `expected` allows it, its directory and superblock are made, and a disk is formatted. A
    /// block device is mounted below `mounts`.
    pub fn open(name: PoolName, source: &Path, mounts: &Path, expected: Expected) -> Result<Self, PoolError> {
        let at = |e| PoolError::Path { path: source.to_owned(), source: e };
        let path = match fs::metadata(source) {
            Ok(meta) if disk::is_block_device(&meta) => {
                let mounted = disk::mount(source, &mounts.join(name.as_str()), expected)?;
                let opened = Self::open_at(name, source, mounted.clone(), expected);
                if opened.is_err() {
                    disk::unmount(&mounted);
                }
                return opened;
            }
            Ok(_) => source.to_owned(),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !matches!(expected, Expected::Known(_)) => {
                fs::create_dir_all(source).map_err(at)?;
                source.to_owned()
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => source.to_owned(),
            Err(e) => return Err(at(e)),
        };
        Self::open_at(name, source, path, expected)
    }

    /// The pool in the directory `path`.
    fn open_at(name: PoolName, source: &Path, path: PathBuf, expected: Expected) -> Result<Self, PoolError> {
        let at = |e| PoolError::Path { path: source.to_owned(), source: e };
        if let Expected::Known(id) = expected
            && !path.join(SUPERBLOCK).exists()
        {
            return Err(PoolError::Gone { path: source.to_owned(), id });
        }
        let filesystem = filesystem(&path)?;
        check_direct_io(&path)?;
        let (lock, found) = superblock(&path)?;
        if let Expected::Known(id) = expected
            && id != found
        {
            return Err(PoolError::Another { path: source.to_owned(), found, id });
        }
        for part in ["trees", "trash"] {
            fs::create_dir_all(path.join(part)).map_err(at)?;
        }
        sync_directory(&path).map_err(at)?;
        let device = fs::metadata(&path).map_err(at)?.dev();
        Ok(Self { name, source: source.to_owned(), path, id: found, filesystem, device, _lock: lock })
    }

    /// The directory of a copy.
    pub fn tree(&self, instance: InstanceId) -> PathBuf {
        self.path.join("trees").join(instance.to_string())
    }

    /// Where a copy is made before it gets its name.
    pub fn new_tree(&self, instance: InstanceId) -> PathBuf {
        self.path.join("trees").join(format!("{instance}.new"))
    }

    /// Makes a new, empty directory fit for a copy. On btrfs direct writes are buffered unless copy-on-write is off, which files
    /// inherit from their directory. Blocking.
    pub fn prepare(&self, directory: &Path) -> io::Result<()> {
        if self.filesystem != Filesystem::Btrfs {
            return Ok(());
        }
        nocow::switch_copy_on_write_off(&File::open(directory)?)
    }

    /// The copies that are there; what was being created is moved to the trash.
    pub fn trees(&self) -> io::Result<Vec<InstanceId>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.path.join("trees"))? {
            let name = entry?.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Ok(instance) = name.parse() {
                found.push(instance);
            } else if name.ends_with(".new") {
                trash::discard(self, &self.path.join("trees").join(name))?;
            }
        }
        found.sort();
        Ok(found)
    }

    /// Space of the filesystem now.
    pub fn space(&self) -> io::Result<Space> {
        let s = nix::sys::statvfs::statvfs(&self.path)?;
        let unit = s.fragment_size();
        Ok(Space { free: s.blocks_available() * unit, total: s.blocks() * unit })
    }
}

/// Bytes that the copies of the pool in `path` occupy in its filesystem. Blocking: it asks for every file.
pub fn used_bytes(path: &Path) -> u64 {
    let files = |path: PathBuf| fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    let trees = files(path.join("trees")).chain(files(path.join("trash")));
    let occupied = trees.flat_map(|tree| files(tree.path())).filter_map(|file| file.metadata().ok());
    occupied.map(|meta| meta.blocks() * 512).sum()
}

/// fsync of a directory: makes a rename or a new name in it durable.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn filesystem(path: &Path) -> Result<Filesystem, PoolError> {
    let at = |e: nix::Error| PoolError::Path { path: path.to_owned(), source: e.into() };
    let s = statfs::statfs(path).map_err(at)?;
    if s.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        return Err(PoolError::ReadOnly(path.to_owned()));
    }
    match s.filesystem_type() {
        statfs::EXT4_SUPER_MAGIC => Ok(Filesystem::Ext4),
        statfs::XFS_SUPER_MAGIC => Ok(Filesystem::Xfs),
        statfs::BTRFS_SUPER_MAGIC => Ok(Filesystem::Btrfs),
        statfs::TMPFS_MAGIC => Err(PoolError::Filesystem { path: path.to_owned(), found: "tmpfs".to_owned() }),
        other => {
            Err(PoolError::Filesystem { path: path.to_owned(), found: format!("a filesystem of type {:#x}", other.0) })
        }
    }
}

/// Writes one aligned block with O_DIRECT and reads it back. Where there is no space for it the pool is full, which is no
/// reason to keep it closed: what is in it could not even be deleted.
fn check_direct_io(path: &Path) -> Result<(), PoolError> {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let probe = path.join(".tandem-probe");
    let attempt = || {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_DIRECT)
            .open(&probe)?;
        let mut block = Block([0x5a; 4096]);
        file.write_all_at(&block.0, 0)?;
        block.0.fill(0);
        file.read_exact_at(&mut block.0, 0)?;
        if block.0.iter().all(|b| *b == 0x5a) { Ok(()) } else { Err(io::Error::other("read back other bytes")) }
    };
    let result = attempt();
    let _ = fs::remove_file(&probe);
    if result.as_ref().is_err_and(is_full) {
        return Ok(());
    }
    result.map_err(|e: io::Error| match e.raw_os_error() {
        Some(libc::EROFS) => PoolError::ReadOnly(path.to_owned()),
        Some(libc::EINVAL | libc::EOPNOTSUPP) => PoolError::NoDirectIo { path: path.to_owned(), source: e },
        _ => PoolError::Path { path: path.to_owned(), source: e },
    })
}

/// Opens (or makes) and locks the superblock.
fn superblock(path: &Path) -> Result<(File, PoolId), PoolError> {
    let at = |e| PoolError::Path { path: path.to_owned(), source: e };
    let bad = |what: &str| PoolError::Superblock { path: path.to_owned(), what: what.to_owned() };
    let name = path.join(SUPERBLOCK);
    if !name.exists() {
        let fresh = path.join(format!("{SUPERBLOCK}.new"));
        let mut file = File::create(&fresh).map_err(at)?;
        file.write_all(&encode(PoolId::random())).and_then(|()| file.sync_all()).map_err(at)?;
        fs::rename(&fresh, &name).map_err(at)?;
        sync_directory(path).map_err(at)?;
    }
    let mut file = OpenOptions::new().read(true).write(true).open(&name).map_err(at)?;
    if file.try_lock().is_err() {
        return Err(PoolError::InUse(path.to_owned()));
    }
    // The lock must be on the file that has the name: another process may have replaced it in between.
    let (ours, named) = (file.metadata().map_err(at)?, fs::metadata(&name).map_err(at)?);
    if (ours.ino(), ours.dev()) != (named.ino(), named.dev()) {
        return Err(PoolError::InUse(path.to_owned()));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(at)?;
    let id = decode(&bytes).map_err(|what| bad(&what))?;
    Ok((file, id))
}

fn encode(id: PoolId) -> [u8; SUPERBLOCK_BYTES] {
    let mut b = [0; SUPERBLOCK_BYTES];
    b[0..8].copy_from_slice(&MAGIC);
    b[8..12].copy_from_slice(&VERSION.to_le_bytes());
    // 16..24 compatible and 24..32 incompatible feature bits: none set.
    b[32..48].copy_from_slice(&id.to_bytes());
    let crc = crc32c::crc32c(&b[..SUPERBLOCK_BYTES - 4]);
    b[SUPERBLOCK_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    b
}

fn decode(b: &[u8]) -> Result<PoolId, String> {
    if b.len() != SUPERBLOCK_BYTES {
        return Err(format!("its superblock has {} bytes instead of {SUPERBLOCK_BYTES}: damaged", b.len()));
    }
    if b.iter().all(|byte| *byte == 0) {
        return Err(
            "its superblock is blank: its disk is a new one, or was wiped, or it is damaged; nothing was written there"
                .to_owned(),
        );
    }
    let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    if b[0..8] != MAGIC {
        return Err("its superblock is not one of Tandem: damaged, or the file of another program".to_owned());
    }
    if word(SUPERBLOCK_BYTES - 4) != crc32c::crc32c(&b[..SUPERBLOCK_BYTES - 4]) {
        return Err("its superblock is damaged (checksum)".to_owned());
    }
    let incompatible = u64::from(word(24)) | u64::from(word(28)) << 32;
    if word(8) != VERSION || incompatible & !INCOMPATIBLE != 0 {
        return Err(format!("its format (version {}, features {incompatible:#x}) needs a newer tandem", word(8)));
    }
    let mut id = [0; 16];
    id.copy_from_slice(&b[32..48]);
    Ok(PoolId::from_bytes(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblock_is_read_back_and_every_flipped_bit_is_named() {
        let id = PoolId::random();
        let good = encode(id);
        assert_eq!(decode(&good), Ok(id));
        for at in 0..good.len() * 8 {
            let mut bad = good;
            bad[at / 8] ^= 1 << (at % 8);
            assert!(decode(&bad).is_err(), "bit {at}");
        }
        for short in [&good[..100], &[0; 100], &[]] {
            let problem = decode(short).expect_err("short");
            assert!(problem.contains("damaged") && !problem.contains("a new one"), "{problem}");
        }
        let blank = decode(&[0; SUPERBLOCK_BYTES]).expect_err("blank");
        assert!(blank.contains("a new one") && blank.contains("or it is damaged"), "{blank}");
    }

    #[test]
    fn pool_names_are_safe_as_file_names() {
        for bad in ["", "..", "/", "a/b", "-a", "Ä", "a b", &"x".repeat(64)] {
            assert!(bad.parse::<PoolName>().is_err(), "{bad}");
        }
        assert!("default".parse::<PoolName>().is_ok());
    }

    #[test]
    fn a_pool_is_used_by_one_replica_at_a_time() {
        let dir = tempfile::Builder::new().prefix("tandem-pool").tempdir().expect("temporary directory");
        let open = || Pool::open("default".parse().expect("name"), dir.path(), dir.path(), Expected::Any);
        let first = open().expect("first");
        assert!(matches!(open(), Err(PoolError::InUse(_))));
        let id = first.id;
        drop(first);
        assert_eq!(open().expect("again").id, id);
    }

    /// A mount point whose filesystem is not mounted looks like an empty pool.
    #[test]
    fn a_pool_that_is_known_is_never_made_anew() {
        let dir = tempfile::Builder::new().prefix("tandem-pool").tempdir().expect("temporary directory");
        let path = dir.path().join("pool");
        let open = |expected| Pool::open("default".parse().expect("name"), &path, dir.path(), expected);
        let id = open(Expected::Any).expect("made").id;
        let known = Expected::Known(id);
        assert_eq!(open(known).expect("there").id, id);
        fs::rename(&path, dir.path().join("unmounted")).expect("moved away");
        assert!(matches!(open(known), Err(PoolError::Gone { .. })));
        assert!(!path.exists(), "and nothing was made");
        fs::create_dir(&path).expect("a mount point");
        assert!(matches!(open(known), Err(PoolError::Gone { .. })));
        assert_eq!(fs::read_dir(&path).expect("readable").count(), 0, "and nothing was made");
        let other = open(Expected::Force).expect("told to").id;
        assert!(matches!(open(known), Err(PoolError::Another { found, .. }) if found == other));
    }
}
