//! Parameters of StorageClass and VolumeAttributesClass: text in, [`Parameters`] out, everything else refused by name.
//!
//! Invariants: [`PARAMETERS`] is the one list of keys: the parser, its messages and `docs/parameters.md` follow it;
//! `mutable_parameters` win over `parameters` and may only hold keys that can change on a volume in use.

use crate::catalog::{FsType, Reach, Replication};
use std::collections::{BTreeMap, HashMap};

/// One key of a StorageClass.
#[derive(Debug)]
pub struct Parameter {
    /// As in the StorageClass.
    pub key: &'static str,
    /// What may be written.
    pub values: &'static str,
    /// What it is without the key.
    pub default: &'static str,
    /// Whether a VolumeAttributesClass may change it on a volume in use.
    pub mutable: bool,
    /// What it does, one sentence.
    pub meaning: &'static str,
}

const REPLICATION: &str = "replication";
const REPLICAS: &str = "replicas";
const ACCESS: &str = "access";
const POOL: &str = "pool";
const FSTYPE: &str = "csi.storage.k8s.io/fstype";
const VERIFY_READS: &str = "verifyReads";
/// Keys that sidecars add or read; the ones that are not in the list mean nothing to a driver.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";

/// Every key that Tandem knows.
pub const PARAMETERS: [Parameter; 6] = [
    Parameter {
        key: REPLICATION,
        values: "none, sync",
        default: "none",
        mutable: true,
        meaning: "Whether other nodes hold the data, too: with `sync` each acknowledged write, which needs a cluster; `async` is not available in this version.",
    },
    Parameter {
        key: REPLICAS,
        values: "2, 3",
        default: "2",
        mutable: true,
        meaning: "How many nodes hold the data of a volume with `replication: sync`; refused without that.",
    },
    Parameter {
        key: ACCESS,
        values: "local, any",
        default: "local",
        mutable: false,
        meaning: "From where the volume may be used: from nodes with a copy, or with `any` from every node of the cluster, over the network; `any` goes with `replication: sync` only.",
    },
    Parameter {
        key: POOL,
        values: "name of a pool",
        default: DEFAULT_POOL,
        mutable: false,
        meaning: "Which pool of the node holds the volume.",
    },
    Parameter {
        key: FSTYPE,
        values: "ext4, xfs",
        default: "ext4",
        mutable: false,
        meaning: "Filesystem of a volume that is mounted; one named by the volume capability wins.",
    },
    Parameter {
        key: VERIFY_READS,
        values: "true, false",
        default: "false",
        mutable: true,
        meaning: "Check what is read from snapshots' layers against its checksum; damage is an I/O error, never wrong data.",
    },
];

/// The pool without the parameter.
pub const DEFAULT_POOL: &str = "default";

/// Copies of a volume with `sync`, without the parameter.
const DEFAULT_REPLICAS: u8 = 2;

/// Longest name of a pool, in bytes: it becomes a part of paths and labels.
const POOL_NAME_BYTES: usize = 63;

/// How much of a wrong value a message repeats.
const ECHO_CHARACTERS: usize = 64;

/// What a StorageClass says about a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// How many copies, and how they are kept.
    pub replication: Replication,
    /// From where it may be used.
    pub reach: Reach,
    /// Name of the pool.
    pub pool: String,
    /// `None`: not given.
    pub fs_type: Option<FsType>,
    /// Check reads of sealed layers.
    pub verify_reads: bool,
}

/// What a VolumeAttributesClass changes; `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Check reads of sealed layers.
    pub verify_reads: Option<bool>,
    replication: Option<Replication>,
    replicas: Option<u8>,
}

/// Why parameters are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// No such key.
    #[error("unknown parameter {key:?}; known are: {}", known())]
    Unknown {
        /// As given.
        key: String,
    },
    /// A value that the key does not take.
    #[error("parameter {key}: {value:?} is not possible; it takes: {takes}")]
    Value {
        /// The key.
        key: &'static str,
        /// As given, shortened.
        value: String,
        /// What is possible.
        takes: &'static str,
    },
    /// Replication that does not exist yet.
    #[error("parameter replication: {value:?} is not available in this version; only \"none\" is")]
    NotAvailable {
        /// As given.
        value: String,
    },
    /// Several copies on one machine.
    #[error(
        "parameter replication: \"sync\" keeps copies on several nodes, and `tandem standalone` is one: use a cluster, see `tandem controller --help`"
    )]
    Alone,
    /// A number of copies without replication.
    #[error("parameter replicas: it goes with \"replication: sync\" only, and without replication there is one copy")]
    ReplicasAlone,
    /// A volume that only its own node can serve, used from elsewhere.
    #[error(
        "parameter access: \"any\" goes with \"replication: sync\" only; without replication there is one copy, on one node"
    )]
    AnyAlone,
    /// A key that a volume in use cannot change.
    #[error("parameter {key} cannot be changed: it is no mutable parameter; mutable are: {}", mutable())]
    Immutable {
        /// The key.
        key: &'static str,
    },
    /// A snapshot class with parameters.
    #[error("unknown parameter {key:?}: snapshots take no parameters")]
    OfSnapshot {
        /// As given.
        key: String,
    },
}

impl Parameters {
    /// The parameters of CreateVolume, GetCapacity and ValidateVolumeCapabilities.
    pub fn parse(
        parameters: &HashMap<String, String>,
        mutable: &HashMap<String, String>,
    ) -> Result<Self, ParameterError> {
        let (replication, pool) = (Replication::None, DEFAULT_POOL.to_owned());
        let mut parsed = Self { replication, reach: Reach::Local, pool, fs_type: None, verify_reads: false };
        // Sorted: which of two mistakes is named must not be luck. `replicas` comes before `replication`.
        for (key, value) in parameters.iter().collect::<BTreeMap<_, _>>() {
            parsed.set(key, value)?;
        }
        match (parameters.get(REPLICAS), &mut parsed.replication) {
            (Some(_), Replication::None) => return Err(ParameterError::ReplicasAlone),
            (Some(value), Replication::Sync { replicas }) => *replicas = self::replicas(value)?,
            (None, _) => {}
        }
        let changes = Changes::parse(mutable)?;
        parsed.replication = changes.replication(parsed.replication)?;
        parsed.verify_reads = changes.verify_reads.unwrap_or(parsed.verify_reads);
        if parsed.reach == Reach::Any && parsed.replication == Replication::None {
            return Err(ParameterError::AnyAlone);
        }
        Ok(parsed)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ParameterError> {
        match known_key(key)? {
            Some(REPLICATION) => self.replication = replication(value)?,
            Some(REPLICAS) => drop(replicas(value)?),
            Some(ACCESS) => self.reach = reach(value)?,
            Some(POOL) => self.pool = pool(value)?,
            Some(FSTYPE) => self.fs_type = Some(fs_type(value)?),
            Some(VERIFY_READS) => self.verify_reads = boolean(VERIFY_READS, value)?,
            Some(_) | None => {}
        }
        Ok(())
    }
}

impl Changes {
    /// `mutable_parameters` of CreateVolume and ControllerModifyVolume: all of them, or an error and nothing.
    pub fn parse(mutable: &HashMap<String, String>) -> Result<Self, ParameterError> {
        let mut changes = Self::default();
        for (key, value) in mutable.iter().collect::<BTreeMap<_, _>>() {
            match known_key(key)? {
                Some(VERIFY_READS) => changes.verify_reads = Some(boolean(VERIFY_READS, value)?),
                Some(REPLICATION) => changes.replication = Some(replication(value)?),
                Some(REPLICAS) => changes.replicas = Some(replicas(value)?),
                Some(key) => return Err(ParameterError::Immutable { key }),
                None => {}
            }
        }
        Ok(changes)
    }

    /// What becomes of a volume that has `now`. How many copies there are stays as it is unless it is said.
    pub fn replication(&self, now: Replication) -> Result<Replication, ParameterError> {
        match (self.replication.unwrap_or(now), now, self.replicas) {
            (Replication::None, _, Some(_)) => Err(ParameterError::ReplicasAlone),
            (Replication::None, _, None) => Ok(Replication::None),
            (Replication::Sync { .. }, _, Some(replicas))
            | (Replication::Sync { .. }, Replication::Sync { replicas }, None) => Ok(Replication::Sync { replicas }),
            (wanted @ Replication::Sync { .. }, Replication::None, None) => Ok(wanted),
        }
    }
}

/// Snapshot classes have no keys of their own; those of the sidecars pass.
pub fn parse_snapshot(parameters: &HashMap<String, String>) -> Result<(), ParameterError> {
    let unknown = parameters.keys().filter(|key| !key.starts_with(SIDECAR_PREFIX)).min();
    unknown.map_or(Ok(()), |key| Err(ParameterError::OfSnapshot { key: shorten(key) }))
}

/// `None`: a sidecar's key that means nothing here.
fn known_key(key: &str) -> Result<Option<&'static str>, ParameterError> {
    match PARAMETERS.iter().find(|parameter| parameter.key == key) {
        Some(parameter) => Ok(Some(parameter.key)),
        None if key.starts_with(SIDECAR_PREFIX) => Ok(None),
        None => Err(ParameterError::Unknown { key: shorten(key) }),
    }
}

fn replication(value: &str) -> Result<Replication, ParameterError> {
    match value {
        "none" => Ok(Replication::None),
        "sync" => Ok(Replication::Sync { replicas: DEFAULT_REPLICAS }),
        "async" => Err(ParameterError::NotAvailable { value: value.to_owned() }),
        _ => Err(refused(REPLICATION, value)),
    }
}

fn reach(value: &str) -> Result<Reach, ParameterError> {
    match value {
        "local" => Ok(Reach::Local),
        "any" => Ok(Reach::Any),
        _ => Err(refused(ACCESS, value)),
    }
}

fn replicas(value: &str) -> Result<u8, ParameterError> {
    match value {
        "2" => Ok(2),
        "3" => Ok(3),
        _ => Err(refused(REPLICAS, value)),
    }
}

fn pool(value: &str) -> Result<String, ParameterError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let plain =
        !value.is_empty() && value.len() <= POOL_NAME_BYTES && value.chars().all(fits) && !value.starts_with('.');
    if plain { Ok(value.to_owned()) } else { Err(refused(POOL, value)) }
}

fn fs_type(value: &str) -> Result<FsType, ParameterError> {
    FsType::parse(value).ok_or_else(|| refused(FSTYPE, value))
}

fn boolean(key: &'static str, value: &str) -> Result<bool, ParameterError> {
    value.parse().map_err(|_| refused(key, value))
}

fn refused(key: &'static str, value: &str) -> ParameterError {
    let takes = PARAMETERS.iter().find(|parameter| parameter.key == key).map_or("", |parameter| parameter.values);
    ParameterError::Value { key, value: shorten(value), takes }
}

fn shorten(text: &str) -> String {
    text.chars().take(ECHO_CHARACTERS).collect()
}

fn known() -> String {
    PARAMETERS.map(|parameter| parameter.key).join(", ")
}

fn mutable() -> String {
    let mutable = PARAMETERS.iter().filter(|parameter| parameter.mutable);
    mutable.map(|parameter| parameter.key).collect::<Vec<_>>().join(", ")
}

/// For the fuzzer: lines of `key=value`, those after an empty line are mutable parameters. Any bytes may come; whatever
/// is accepted must be within the rules.
pub fn fuzz(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (fixed, mutable) = text.split_once("\n\n").unwrap_or((&text, ""));
    let map = |lines: &str| {
        let pairs = lines.lines().map(|line| line.split_once('=').unwrap_or((line, "")));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect::<HashMap<_, _>>()
    };
    let (fixed, mutable) = (map(fixed), map(mutable));
    if let Ok(parsed) = Parameters::parse(&fixed, &mutable) {
        assert!(parsed.pool.len() <= POOL_NAME_BYTES && !parsed.pool.contains('/') && !parsed.pool.is_empty());
        let known = |key: &String| key.starts_with(SIDECAR_PREFIX) || PARAMETERS.iter().any(|p| p.key == key);
        assert!(fixed.keys().chain(mutable.keys()).all(known));
    }
    let _ = parse_snapshot(&fixed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_documented_table_is_the_list_of_the_parser() {
        let document = include_str!("../../docs/parameters.md");
        let written: Vec<_> = document.lines().filter(|line| line.starts_with("| `")).collect();
        let expected = PARAMETERS.map(|p| {
            let mutable = if p.mutable { "yes" } else { "no" };
            format!("| `{}` | {} | {} | {mutable} | {} |", p.key, p.values, p.default, p.meaning)
        });
        assert_eq!(written, expected, "make docs/parameters.md say:\n{}", expected.join("\n"));
    }

    #[test]
    fn nothing_given_is_the_defaults() {
        let parsed = Parameters::parse(&map(&[]), &map(&[])).expect("defaults");
        let replication = Replication::None;
        let (reach, pool) = (Reach::Local, "default".to_owned());
        assert_eq!(parsed, Parameters { replication, reach, pool, fs_type: None, verify_reads: false });
    }

    #[test]
    fn every_key_is_understood_and_mutable_ones_win() {
        let fixed = map(&[
            ("replication", "none"),
            ("pool", "fast"),
            ("csi.storage.k8s.io/fstype", "xfs"),
            ("verifyReads", "false"),
            ("csi.storage.k8s.io/pvc/name", "data"),
        ]);
        let parsed = Parameters::parse(&fixed, &map(&[("verifyReads", "true")])).expect("parses");
        let (replication, fs_type) = (Replication::None, Some(FsType::Xfs));
        let (reach, pool) = (Reach::Local, "fast".to_owned());
        assert_eq!(parsed, Parameters { replication, reach, pool, fs_type, verify_reads: true });
    }

    #[test]
    fn copies_are_counted_only_where_there_are_several() {
        let parse = |pairs: &[(&str, &str)]| Parameters::parse(&map(pairs), &map(&[])).map(|parsed| parsed.replication);
        assert_eq!(parse(&[("replication", "sync")]), Ok(Replication::Sync { replicas: 2 }));
        assert_eq!(parse(&[("replication", "sync"), ("replicas", "3")]), Ok(Replication::Sync { replicas: 3 }));
        for alone in [&[("replicas", "2")][..], &[("replication", "none"), ("replicas", "2")]] {
            assert_eq!(parse(alone), Err(ParameterError::ReplicasAlone));
        }
        for wrong in ["1", "4", "", "two", "02"] {
            let refused = parse(&[("replication", "sync"), ("replicas", wrong)]).expect_err("refused").to_string();
            assert!(refused.contains("parameter replicas") && refused.contains("it takes: 2, 3"), "{refused}");
        }
    }

    #[test]
    fn every_node_may_use_only_what_several_hold() {
        let parse = |pairs: &[(&str, &str)]| Parameters::parse(&map(pairs), &map(&[])).map(|parsed| parsed.reach);
        assert_eq!(parse(&[("access", "any"), ("replication", "sync")]), Ok(Reach::Any));
        assert_eq!(parse(&[("access", "local")]), Ok(Reach::Local));
        for alone in [&[("access", "any")][..], &[("access", "any"), ("replication", "none")]] {
            assert_eq!(parse(alone), Err(ParameterError::AnyAlone));
        }
        let refused = parse(&[("access", "remote")]).expect_err("refused").to_string();
        assert!(refused.contains("parameter access") && refused.contains("it takes: local, any"), "{refused}");
    }

    #[test]
    fn what_is_refused_is_named_with_what_is_possible() {
        let refuse = |key: &str, value: &str| {
            Parameters::parse(&map(&[(key, value)]), &map(&[])).expect_err("refused").to_string()
        };
        assert_eq!(
            refuse("replica", "2"),
            "unknown parameter \"replica\"; known are: replication, replicas, access, pool, csi.storage.k8s.io/fstype, verifyReads"
        );
        assert!(refuse("replication", "async").contains("not available in this version"));
        assert!(refuse("replication", "raid0").contains("it takes: none, sync"));
        assert!(refuse("csi.storage.k8s.io/fstype", "zfs").contains("it takes: ext4, xfs"));
        assert!(refuse("verifyReads", "yes").contains("it takes: true, false"));
        for name in ["", "..", "a/b", ".hidden", "sp ace", &"x".repeat(64)] {
            assert!(refuse("pool", name).contains("parameter pool"), "{name}");
        }
    }

    #[test]
    fn only_mutable_keys_change_a_volume() {
        let verified = Changes { verify_reads: Some(true), ..Changes::default() };
        assert_eq!(Changes::parse(&map(&[("verifyReads", "true")])), Ok(verified));
        assert_eq!(Changes::parse(&map(&[("pool", "fast")])), Err(ParameterError::Immutable { key: "pool" }));
        assert!(matches!(Changes::parse(&map(&[("fake", "1")])), Err(ParameterError::Unknown { .. })));
        assert_eq!(Changes::parse(&map(&[])), Ok(Changes::default()));
    }

    #[test]
    fn the_number_of_copies_changes_when_it_is_said() {
        let (none, two, three) =
            (Replication::None, Replication::Sync { replicas: 2 }, Replication::Sync { replicas: 3 });
        let change = |pairs: &[(&str, &str)], now| Changes::parse(&map(pairs)).and_then(|c| c.replication(now));
        let cases: [(&[(&str, &str)], _, _); 8] = [
            (&[], three, Ok(three)),
            (&[("replication", "sync")], none, Ok(two)),
            (&[("replication", "sync")], three, Ok(three)),
            (&[("replication", "sync"), ("replicas", "3")], none, Ok(three)),
            (&[("replicas", "2")], three, Ok(two)),
            (&[("replicas", "2")], none, Err(ParameterError::ReplicasAlone)),
            (&[("replication", "none")], two, Ok(none)),
            (&[("replication", "none"), ("replicas", "2")], two, Err(ParameterError::ReplicasAlone)),
        ];
        for (pairs, now, expected) in cases {
            assert_eq!(change(pairs, now), expected, "{pairs:?} of {now:?}");
        }
        let created =
            Parameters::parse(&map(&[("replication", "sync"), ("replicas", "3")]), &map(&[("replication", "none")]));
        assert_eq!(created.expect("mutable ones win").replication, none);
    }

    #[test]
    fn snapshots_take_no_parameters_but_the_sidecars() {
        assert_eq!(parse_snapshot(&map(&[("csi.storage.k8s.io/volumesnapshot/name", "s")])), Ok(()));
        assert!(parse_snapshot(&map(&[("pool", "x")])).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(data: Vec<u8>) {
            fuzz(&data);
        }
    }
}
