//! Mount options that a user may give: a closed list, so that none can turn a mount into something else.
//!
//! Invariants: an option is known by name or refused by name (values may be sensitive and are never repeated); nothing
//! that remounts, binds, moves, names another device, panics the machine or gives up flushes is on the list.
//!
//! `discard` is on it but not a default: a discard with every deletion sits in the journal's commit, and so in somebody's
//! fsync; running `fstrim` now and then frees the same space at a time that suits.

use super::Filesystem;
use sys_mount::MountFlags;

/// Bytes of all options of one request together (the CSI specification's limit).
pub const MAX_TOTAL_BYTES: usize = 4096;

/// Why options are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Not on the list.
    #[error("mount option {0:?} is not supported for {1}; supported are {2}")]
    Unknown(String, Filesystem, String),
    /// On the list of those that break a promise.
    #[error("mount option {0:?} is refused: it gives up what a completed flush promises")]
    LosesWrites(String),
    /// Needs a value, or must not have one.
    #[error(
        "mount option {0:?} has a value where none belongs, or none where one does, or a value with forbidden characters"
    )]
    Value(String),
    /// Above the limit.
    #[error("the mount options have {0} bytes together; {MAX_TOTAL_BYTES} are allowed")]
    TooLong(usize),
}

/// Options of one mount, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// For mount(2).
    flags: MountFlags,
    /// For the filesystem, in the order given.
    data: Vec<String>,
}

impl MountOptions {
    /// Checks the options of a request. Each may be a list separated by commas.
    pub fn parse(filesystem: Filesystem, given: &[String]) -> Result<Self, OptionError> {
        let total = given.iter().map(String::len).sum();
        if total > MAX_TOTAL_BYTES {
            return Err(OptionError::TooLong(total));
        }
        let mut options = Self { flags: MountFlags::empty(), data: Vec::new() };
        for option in given.iter().flat_map(|text| split(text)) {
            options.add(filesystem, option)?;
        }
        Ok(options)
    }

    /// Flags for mount(2).
    pub fn flags(&self) -> MountFlags {
        self.flags
    }

    /// The flags that belong to one mount of a filesystem and not to the filesystem: those a bind mount may add.
    pub fn flags_of_bind(&self) -> MountFlags {
        self.flags & per_mount()
    }

    /// Whether a bind mount of a filesystem mounted with `mounted` can have these options: it can add those of a mount, but
    /// none of the filesystem.
    pub fn is_bind_of(&self, mounted: &Self) -> bool {
        mounted.flags.contains(self.flags - per_mount()) && self.data.iter().all(|option| mounted.data.contains(option))
    }

    /// Whether `ro` was given.
    pub fn is_read_only(&self) -> bool {
        self.flags.contains(MountFlags::RDONLY)
    }

    /// The text for the filesystem, with what Tandem adds where the user said nothing about it.
    ///
    /// xfs: `nouuid`, because a clone or restored snapshot has the UUID of its source and both may be here.
    /// ext4: `errors=remount-ro`, because going on with damaged metadata loses more than stopping.
    pub fn data(&self, filesystem: Filesystem) -> String {
        let says = |name: &str| self.data.iter().any(|option| option.split('=').next() == Some(name));
        let mut data = self.data.clone();
        match filesystem {
            Filesystem::Xfs if !says("nouuid") => data.push("nouuid".into()),
            Filesystem::Ext4 if !says("errors") => data.push("errors=remount-ro".into()),
            Filesystem::Xfs | Filesystem::Ext4 => {}
        }
        data.join(",")
    }

    fn add(&mut self, filesystem: Filesystem, option: &str) -> Result<(), OptionError> {
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        if let Some((_, set, clear)) = GENERIC.iter().find(|(generic, ..)| *generic == name) {
            if value.is_some() {
                return Err(OptionError::Value(name.into()));
            }
            self.flags.remove(MountFlags::from_bits_retain(*clear));
            self.flags.insert(MountFlags::from_bits_retain(*set));
            return Ok(());
        }
        if LOSES_WRITES.contains(&name) {
            return Err(OptionError::LosesWrites(name.into()));
        }
        if name == "barrier" {
            // `barrier=0` is `nobarrier`; the other spelling is what happens anyway.
            return if value == Some("0") { Err(OptionError::LosesWrites(name.into())) } else { Ok(()) };
        }
        let known = || known(filesystem).chain(SELINUX.iter().copied());
        let Some(rule) = known().find(|rule| rule.trim_end_matches('=') == name) else {
            return Err(unknown(name, filesystem, known()));
        };
        // The value must not smuggle in a second option; `errors=panic` would let a volume stop the machine.
        let bad_value = match value {
            Some(value) if rule.starts_with("context") || SELINUX.contains(&rule) => !is_context(value),
            Some("panic") if name == "errors" => true,
            Some(value) => value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'),
            None => false,
        };
        let needs_value = rule.ends_with('=');
        if bad_value || (value.is_none() && needs_value) || (value.is_some() && !needs_value && name != "init_itable") {
            return Err(OptionError::Value(name.into()));
        }
        self.data.push(option.to_owned());
        Ok(())
    }
}

fn unknown<'a>(name: &str, filesystem: Filesystem, known: impl Iterator<Item = &'a str>) -> OptionError {
    // A hostile name may be long or hold control characters; `{:?}` deals with the second.
    let name: String = name.chars().take(40).collect();
    let list: Vec<&str> = GENERIC.iter().map(|(name, ..)| *name).chain(known).collect();
    OptionError::Unknown(name, filesystem, list.join(", "))
}

/// Commas separate options, but not inside quotes (an SELinux context has commas).
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |character| {
        quoted ^= character == '"';
        character == ',' && !quoted
    })
    .filter(|option| !option.is_empty())
}

/// `"system_u:object_r:container_file_t:s0:c1,c2"`, quoted if it has a comma.
fn is_context(value: &str) -> bool {
    let inner = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let (text, commas) = inner.map_or((value, false), |inner| (inner, true));
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_:.-".contains(&byte) || (commas && byte == b',');
    !text.is_empty() && text.bytes().all(allowed)
}

fn per_mount() -> MountFlags {
    MountFlags::from_bits_retain(
        libc::MS_RDONLY
            | libc::MS_NOSUID
            | libc::MS_NODEV
            | libc::MS_NOEXEC
            | libc::MS_NOATIME
            | libc::MS_NODIRATIME
            | libc::MS_RELATIME
            | libc::MS_STRICTATIME
            | libc::MS_NOSYMFOLLOW,
    )
}

/// Name, bits to set, bits to clear.
const GENERIC: &[(&str, libc::c_ulong, libc::c_ulong)] = &[
    ("defaults", 0, 0),
    ("ro", libc::MS_RDONLY, 0),
    ("rw", 0, libc::MS_RDONLY),
    ("nosuid", libc::MS_NOSUID, 0),
    ("suid", 0, libc::MS_NOSUID),
    ("nodev", libc::MS_NODEV, 0),
    ("dev", 0, libc::MS_NODEV),
    ("noexec", libc::MS_NOEXEC, 0),
    ("exec", 0, libc::MS_NOEXEC),
    ("sync", libc::MS_SYNCHRONOUS, 0),
    ("async", 0, libc::MS_SYNCHRONOUS),
    ("dirsync", libc::MS_DIRSYNC, 0),
    ("noatime", libc::MS_NOATIME, libc::MS_STRICTATIME | libc::MS_RELATIME),
    ("atime", 0, libc::MS_NOATIME),
    ("nodiratime", libc::MS_NODIRATIME, 0),
    ("diratime", 0, libc::MS_NODIRATIME),
    ("relatime", libc::MS_RELATIME, libc::MS_NOATIME | libc::MS_STRICTATIME),
    ("strictatime", libc::MS_STRICTATIME, libc::MS_NOATIME | libc::MS_RELATIME),
    ("lazytime", libc::MS_LAZYTIME, 0),
    ("nolazytime", 0, libc::MS_LAZYTIME),
    ("nosymfollow", libc::MS_NOSYMFOLLOW, 0),
];

const LOSES_WRITES: &[&str] = &["nobarrier", "journal_async_commit", "norecovery", "noload", "abort"];

/// A name that ends in `=` needs a value.
const SELINUX: &[&str] = &["context=", "fscontext=", "defcontext=", "rootcontext="];

const EXT4: &str = "acl noacl user_xattr nouser_xattr auto_da_alloc noauto_da_alloc block_validity noblock_validity bsddf minixdf \
    commit= data= delalloc nodelalloc dioread_lock dioread_nolock discard nodiscard errors= grpid nogrpid \
    init_itable noinit_itable inode_readahead_blks= journal_checksum nojournal_checksum journal_ioprio= \
    max_batch_time= max_dir_size_kb= min_batch_time= grpquota prjquota quota noquota usrquota resgid= resuid= \
    stripe=";
const XFS: &str = "allocsize= discard nodiscard filestreams gqnoenforce gquota grpid nogrpid grpquota inode32 inode64 largeio \
    nolargeio logbsize= logbufs= noalign nouuid noquota pqnoenforce pquota prjquota qnoenforce quota sunit= \
    swalloc swidth= uqnoenforce uquota usrquota wsync";

fn known(filesystem: Filesystem) -> impl Iterator<Item = &'static str> {
    match filesystem {
        Filesystem::Ext4 => EXT4.split_ascii_whitespace(),
        Filesystem::Xfs => XFS.split_ascii_whitespace(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(filesystem: Filesystem, options: &[&str]) -> Result<MountOptions, OptionError> {
        MountOptions::parse(filesystem, &options.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn nothing_on_the_list_turns_a_mount_into_something_else() {
        for hostile in [
            "remount",
            "bind",
            "rbind",
            "move",
            "shared",
            "loop",
            "loop=/dev/loop0",
            "offset=4096",
            "journal_path=/dev/sda",
            "journal_dev=0x801",
            "logdev=/dev/sda",
            "rtdev=/dev/sda",
            "errors=panic",
            "X-mount.mkdir",
            "user",
            "helper=x",
            "commit=5\nremount",
            "stripe=1;2",
            "data=",
            "commit",
            "ro=1",
            "context=",
            "context=a,remount",
            "\"",
            "acl=1",
        ] {
            for filesystem in [Filesystem::Ext4, Filesystem::Xfs] {
                assert!(parse(filesystem, &[hostile]).is_err(), "{hostile} on {filesystem}");
            }
        }
    }

    #[test]
    fn options_that_lose_writes_are_refused_as_such() {
        for option in ["nobarrier", "barrier=0", "norecovery", "noload"] {
            let refused = parse(Filesystem::Ext4, &[option]);
            assert!(matches!(refused, Err(OptionError::LosesWrites(_))), "{option}: {refused:?}");
        }
    }

    #[test]
    fn generic_options_become_flags_and_the_last_word_counts() {
        let options = parse(Filesystem::Xfs, &["ro,noatime", "rw", "nosuid"]).expect("known options");
        assert_eq!(options.flags(), MountFlags::NOATIME | MountFlags::NOSUID);
        assert!(!options.is_read_only());
    }

    #[test]
    fn defaults_are_added_only_where_nothing_was_said() {
        let none = parse(Filesystem::Ext4, &[]).expect("no options");
        assert_eq!(
            (none.data(Filesystem::Ext4).as_str(), none.data(Filesystem::Xfs).as_str()),
            ("errors=remount-ro", "nouuid")
        );
        let said = parse(Filesystem::Ext4, &["errors=continue", "commit=30"]).expect("known options");
        assert_eq!(said.data(Filesystem::Ext4), "errors=continue,commit=30");
    }

    #[test]
    fn a_quoted_selinux_context_keeps_its_commas() {
        let context = "context=\"system_u:object_r:container_file_t:s0:c1,c2\"";
        let options = parse(Filesystem::Ext4, &["noatime", context]).expect("a context");
        assert!(options.data(Filesystem::Ext4).starts_with(context));
    }

    #[test]
    fn a_refusal_names_the_option_but_not_its_value() {
        let error = parse(Filesystem::Ext4, &["password=hunter2"]).expect_err("unknown").to_string();
        assert!(error.contains("password") && error.contains("noatime") && !error.contains("hunter2"), "{error}");
        assert_eq!(parse(Filesystem::Ext4, &["acl"; 2000]), Err(OptionError::TooLong(6000)));
    }
}
