//! The kernel's own account of what is mounted where: `/proc/self/mountinfo`.
//!
//! Invariants: names come back exactly as they were given (the kernel writes space, tab, newline and backslash in octal);
//! of several mounts on one place the topmost counts; a line that cannot be read is an error, not "nothing mounted".

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Where the table is.
const TABLE: &str = "/proc/self/mountinfo";

/// Two equal readings in a row are taken as the truth: a mount or unmount between two of the kernel's pages can hide
/// an unrelated line. A machine that mounts without pause gets the last reading.
const READINGS: usize = 10;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Major and minor number of the filesystem's device.
    pub device: (u32, u32),
    /// The part of that filesystem that is mounted.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of this mount (`ro`, `nosuid`, ...).
    pub options: Vec<String>,
    /// Type of the filesystem.
    pub filesystem: String,
    /// What was mounted.
    pub source: OsString,
    /// Options of the filesystem, shared by all its mounts.
    pub filesystem_options: Vec<String>,
}

impl Mount {
    /// Whether writing through this mount is refused.
    pub fn is_read_only(&self) -> bool {
        self.has("ro")
    }
    /// Whether the filesystem itself refuses writes, through any mount.
    pub fn filesystem_is_read_only(&self) -> bool {
        self.filesystem_options.iter().any(|option| option == "ro" || option == "emergency_ro" || option == "shutdown")
    }
    /// Whether an option of the mount itself is set.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|given| given == option)
    }
}

/// Why the table is unknown.
#[derive(Debug, thiserror::Error)]
pub enum MountTableError {
    /// `/proc` is not there.
    #[error("{TABLE} cannot be read: {0}; is /proc mounted?")]
    Unreadable(#[from] std::io::Error),
    /// A line has another shape than the kernel documents.
    #[error("{TABLE} has a line that cannot be understood: {0:?}")]
    Malformed(String),
}

/// All mounts of this process's mount namespace, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountTable(Vec<Mount>);

impl MountTable {
    /// The table as it is now.
    pub fn read() -> Result<Self, MountTableError> {
        let mut last = std::fs::read(TABLE)?;
        for _ in 1..READINGS {
            let again = std::fs::read(TABLE)?;
            if again == last {
                break;
            }
            last = again;
        }
        Self::parse(&last)
    }

    /// The table in the text of the kernel.
    pub fn parse(text: &[u8]) -> Result<Self, MountTableError> {
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let malformed = |line| MountTableError::Malformed(String::from_utf8_lossy(line).into());
        lines.map(|line| parse_line(line).ok_or_else(|| malformed(line))).collect::<Result<_, _>>().map(Self)
    }

    /// The topmost mount exactly at `path` (canonical, absolute).
    pub fn at(&self, path: &Path) -> Option<&Mount> {
        self.0.iter().rev().find(|mount| mount.mount_point == path)
    }

    /// Every mount of the filesystem on this device.
    pub fn of_device(&self, device: (u32, u32)) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.device == device)
    }
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let (_id, _parent) = (fields.next()?, fields.next()?);
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = unescape(fields.next()?)?.into();
    let mount_point = unescape(fields.next()?)?.into();
    let options = std::str::from_utf8(fields.next()?).ok()?.split(',').map(str::to_owned).collect();
    fields.find(|field| *field == b"-")?;
    let filesystem = unescape(fields.next()?)?.into_string().ok()?;
    let source = unescape(fields.next()?)?;
    // Values of these may hold any byte.
    let rest = String::from_utf8_lossy(fields.next()?);
    let filesystem_options = rest.split(',').map(str::to_owned).collect();
    Some(Mount { device, root, mount_point, options, filesystem, source, filesystem_options })
}

/// Three octal digits after each backslash.
fn unescape(field: &[u8]) -> Option<OsString> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, tail)) = rest.split_first() {
        if *byte != b'\\' {
            plain.push(*byte);
            rest = tail;
            continue;
        }
        let (digits, tail) = tail.split_at_checked(3)?;
        plain.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()?);
        rest = tail;
    }
    Some(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_escapes_are_undone() {
        let line =
            b"36 35 98:0 /a\\040b /mnt/t\\011\\012\\134\xc3\xa9 rw,nosuid master:1 shared:2 - xfs /dev/loop\\0401 rw\n";
        let table = MountTable::parse(line).expect("a line of the kernel");
        let mount = table.at(Path::new("/mnt/t\t\n\\é")).expect("found by its real name");
        assert_eq!((mount.device, mount.root.as_path()), ((98, 0), Path::new("/a b")));
        assert_eq!((mount.filesystem.as_str(), mount.source.to_str()), ("xfs", Some("/dev/loop 1")));
        assert!(mount.has("nosuid") && !mount.is_read_only());
    }

    #[test]
    fn the_topmost_of_stacked_mounts_counts() {
        let text = b"1 0 8:1 / /a rw - ext4 /dev/x rw\n2 1 8:2 / /a ro - ext4 /dev/y ro\n";
        let table = MountTable::parse(text).expect("two lines");
        assert_eq!(table.at(Path::new("/a")).map(|mount| mount.device), Some((8, 2)));
        assert_eq!(table.of_device((8, 1)).count(), 1);
    }

    #[test]
    fn a_damaged_line_is_an_error() {
        for line in [&b"36 35"[..], b"1 0 8:1 / /a\\9 rw - ext4 x rw", b"1 0 8 / /a rw - ext4 x rw", b"1 0 8:1 / /a rw"]
        {
            assert!(MountTable::parse(line).is_err(), "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn the_table_of_this_machine_is_understood() {
        assert!(MountTable::read().expect("mountinfo").at(Path::new("/proc")).is_some());
    }
}
