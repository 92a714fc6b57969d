//! Parameters of StorageClass and VolumeAttributesClass: text in, [`Parameters`] out, everything else refused by name.
//!
//! Invariants: [`PARAMETERS`] is the one list of keys: the parser, its messages and `README.md` follow it;
//! `mutable_parameters` win over `parameters` and may only hold keys that can change on a volume in use.

use crate::catalog::{FsType, Reach, RebuildAfter, Replication};
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
const REBUILD_AFTER: &str = "rebuildAfter";
const ACCESS: &str = "access";
const POOL: &str = "pool";
const FSTYPE: &str = "csi.storage.k8s.io/fstype";
const VERIFY_READS: &str = "verifyReads";
/// Keys that sidecars add or read; the ones that are not in the list mean nothing to a driver.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";

/// Every key that Tandem knows.
pub const PARAMETERS: [Parameter; 7] = [
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
        key: REBUILD_AFTER,
        values: "1s to 30d (a number with s, m, h or d), never",
        default: "1h",
        mutable: true,
        meaning: "How long a copy of a volume with `replication: sync` may be missed before another node gets one in its place; refused without that.",
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

/// The longest `rebuildAfter`: who waits longer decides by hand.
const LONGEST_REBUILD_AFTER: u32 = 30 * 24 * 60 * 60;

/// How much of a wrong value a message repeats.
const ECHO_CHARACTERS: usize = 64;

/// What a StorageClass says about a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// How many copies, and how they are kept.
    pub replication: Replication,
    /// When a copy that is missed is made anew elsewhere.
    pub rebuild_after: RebuildAfter,
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
    /// When a copy that is missed is made anew elsewhere.
    pub rebuild_after: Option<RebuildAfter>,
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
    /// A rebuild without replication.
    #[error(
        "parameter rebuildAfter: it goes with \"replication: sync\" only; without replication there is no other copy to make one from"
    )]
    RebuildAlone,
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
        let (reach, rebuild_after) = (Reach::Local, RebuildAfter::default());
        let mut parsed = Self { replication, rebuild_after, reach, pool, fs_type: None, verify_reads: false };
        // Sorted: which of two mistakes is named must not be luck. `replicas` comes before `replication`.
        for (key, value) in parameters.iter().collect::<BTreeMap<_, _>>() {
            parsed.set(key, value)?;
        }
        match (parameters.get(REPLICAS), &mut parsed.replication) {
            (Some(_), Replication::None) => return Err(ParameterError::ReplicasAlone),
            (Some(value), Replication::Sync { replicas }) => *replicas = self::replicas(value)?,
            (None, _) => {}
        }
        if parameters.contains_key(REBUILD_AFTER) && parsed.replication == Replication::None {
            return Err(ParameterError::RebuildAlone);
        }
        let changes = Changes::parse(mutable)?;
        parsed.replication = changes.replication(parsed.replication)?;
        parsed.rebuild_after = changes.rebuild_after.unwrap_or(parsed.rebuild_after);
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
            Some(REBUILD_AFTER) => self.rebuild_after = rebuild_after(value)?,
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
                Some(REBUILD_AFTER) => changes.rebuild_after = Some(rebuild_after(value)?),
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
            (Replication::None, _, None) if self.rebuild_after.is_some() => Err(ParameterError::RebuildAlone),
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

/// A whole number with its unit.
fn rebuild_after(value: &str) -> Result<RebuildAfter, ParameterError> {
    if value == "never" {
        return Ok(RebuildAfter::Never);
    }
    let wrong = || refused(REBUILD_AFTER, value);
    let unit = match value.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 60 * 60,
        Some('d') => 24 * 60 * 60,
        Some(_) | None => return Err(wrong()),
    };
    let number = &value[..value.len() - 1];
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let seconds = number.parse::<u32>().ok().and_then(|number| number.checked_mul(unit)).ok_or_else(wrong)?;
    if (1..=LONGEST_REBUILD_AFTER).contains(&seconds) { Ok(RebuildAfter::Seconds(seconds)) } else { Err(wrong()) }
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
mod tests;
