//! What the catalogue says of a volume's copies: how many are asked for, where they shall be, and their configuration.
//!
//! Invariants: the core knows nothing of encodings, so [`VolumeConfiguration`] is its form in the catalogue; text that
//! breaks a rule of [`Configuration`] is refused when it is read, whoever wrote it.

use super::NodeName;
use crate::catalog::Object;
use crate::protocol::{Configuration, ConfigurationVersion, Generation, Lacks, MAX_COPIES, Stamp, Wish};
use crate::volume::{InstanceId, VolumeId, VolumeSize};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// How many copies a volume has, and how they are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Replication {
    /// One copy.
    #[default]
    None,
    /// Each acknowledged write is on all of them.
    Sync {
        /// Copies in all.
        replicas: u8,
    },
}

/// How long a copy may be missed before another node gets one in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RebuildAfter {
    /// Only a person says so.
    Never,
    /// So many seconds.
    Seconds(u32),
}

impl Default for RebuildAfter {
    /// Longer than a node takes to be started again, or a person to look; one more failure is not likely meanwhile.
    fn default() -> Self {
        Self::Seconds(60 * 60)
    }
}

impl fmt::Display for RebuildAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Seconds(seconds) if *seconds > 0 && seconds.is_multiple_of(3600) => write!(f, "{}h", seconds / 3600),
            Self::Seconds(seconds) if *seconds > 0 && seconds.is_multiple_of(60) => write!(f, "{}m", seconds / 60),
            Self::Seconds(seconds) => write!(f, "{seconds}s"),
        }
    }
}

/// A copy that is wanted and does not follow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Missed {
    /// Counted while a controller saw it.
    pub seconds: u64,
    /// Why no other node has got one in its place, though it is time.
    #[serde(default)]
    pub waits: Option<String>,
}

/// A copy that is made because another one was missed for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rebuild {
    /// It is leaving.
    pub lost: InstanceId,
    /// It goes again if the lost one has every acknowledged write before it.
    pub new: InstanceId,
}

/// Where one copy shall be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CopySpec {
    /// On which node.
    pub node: NodeName,
    /// In which of its pools.
    pub pool: String,
}

/// From where a volume may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reach {
    /// From the nodes that have a copy.
    #[default]
    Local,
    /// From every node of the cluster.
    Any,
}

impl Reach {
    /// What is not written down.
    pub fn is_local(&self) -> bool {
        *self == Self::Local
    }
}

/// The use of a volume on a node that has no copy of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientSpec {
    /// The node.
    pub node: NodeName,
    /// This publication, by which the copies know the node: another one is another client, also of the same node.
    pub publication: InstanceId,
}

/// The copies that a volume shall have. Their ids are given out before any of them is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MirrorSpec {
    /// The wish: which copy shall be primary.
    pub primary: Option<InstanceId>,
    /// Where each copy shall be.
    pub copies: BTreeMap<InstanceId, CopySpec>,
    /// Those of them that go as soon as all others have every acknowledged write.
    #[serde(default)]
    pub leaving: BTreeSet<InstanceId>,
    /// The controller has decided that one is replaced, not a person.
    #[serde(default)]
    pub rebuild: Option<Rebuild>,
    /// Who alone may use the volume; `None`: whoever has the copy that is wished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<ClientSpec>,
}

/// What a node says of its copy, beside that it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CopyReport {
    /// What it can hold: more than the volume has where another node has refused to grow.
    pub size: VolumeSize,
    /// Whether its reads are checked.
    pub verify_reads: bool,
    /// Why it does not have the size that is wanted.
    #[serde(default)]
    pub refused: Option<String>,
}

impl MirrorSpec {
    /// These copies, and no wish.
    pub fn new(copies: BTreeMap<InstanceId, CopySpec>) -> Self {
        Self { primary: None, copies, leaving: BTreeSet::new(), rebuild: None, client: None }
    }

    /// The copies that shall stay.
    pub fn staying(&self) -> impl Iterator<Item = (InstanceId, &CopySpec)> {
        self.copies.iter().filter(|(copy, _)| !self.leaving.contains(copy)).map(|(copy, spec)| (*copy, spec))
    }

    /// As the core takes it.
    pub fn wish(&self) -> Wish {
        Wish { primary: self.primary, copies: self.copies.keys().copied().collect() }
    }

    /// The copies that shall be on this node.
    pub fn copies_on<'a>(&'a self, node: &'a NodeName) -> impl Iterator<Item = (InstanceId, &'a CopySpec)> {
        self.copies.iter().filter(move |(_, copy)| copy.node == *node).map(|(id, copy)| (*id, copy))
    }
}

/// A [`Stamp`] in the catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredStamp {
    generation: u64,
    version: u64,
}

impl From<Stamp> for StoredStamp {
    fn from(stamp: Stamp) -> Self {
        Self { generation: stamp.generation.0, version: stamp.version.0 }
    }
}

impl From<StoredStamp> for Stamp {
    fn from(stored: StoredStamp) -> Self {
        Self { generation: Generation(stored.generation), version: ConfigurationVersion(stored.version) }
    }
}

/// [`Lacks`] in the catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum StoredLacks {
    Since(StoredStamp),
    Everything,
}

/// Who is primary of a volume and who holds every acknowledged write: the first one is written with the volume, all others
/// by replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeConfiguration {
    /// Whose.
    pub volume: VolumeId,
    stamp: StoredStamp,
    term: StoredStamp,
    primary: Option<InstanceId>,
    secondaries: BTreeSet<InstanceId>,
    candidates: BTreeMap<InstanceId, StoredLacks>,
    /// None: no writes were ever lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lost: Option<StoredStamp>,
}

/// What the catalogue says is no configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadConfiguration {
    /// A copy is named twice.
    #[error("the configuration of volume {0} names a copy twice")]
    Twice(VolumeId),
    /// Too many copies.
    #[error("the configuration of volume {0} names more than {MAX_COPIES} copies")]
    Copies(VolumeId),
    /// A term or a loss that is later than now, or a version that does not exist.
    #[error("the configuration of volume {0} has an impossible version or term")]
    Version(VolumeId),
}

impl VolumeConfiguration {
    /// The form in the catalogue.
    pub fn new(volume: VolumeId, configuration: &Configuration) -> Self {
        let stored = |lacks: &Lacks| match lacks {
            Lacks::Since(stamp) => StoredLacks::Since((*stamp).into()),
            Lacks::Everything => StoredLacks::Everything,
        };
        Self {
            volume,
            stamp: configuration.stamp.into(),
            term: configuration.term.into(),
            primary: configuration.primary,
            secondaries: configuration.secondaries.clone(),
            candidates: configuration.candidates.iter().map(|(copy, lacks)| (*copy, stored(lacks))).collect(),
            lost: Some(configuration.lost).filter(|lost| *lost != Stamp::default()).map(Into::into),
        }
    }

    /// Its generation and version.
    pub fn stamp(&self) -> Stamp {
        self.stamp.into()
    }

    /// As text, where it travels outside the catalogue.
    pub fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// `None`: no text of ours.
    pub fn decode(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

impl TryFrom<&VolumeConfiguration> for Configuration {
    type Error = BadConfiguration;
    fn try_from(stored: &VolumeConfiguration) -> Result<Self, BadConfiguration> {
        let lacks = |lacks: &StoredLacks| match lacks {
            StoredLacks::Since(stamp) => Lacks::Since((*stamp).into()),
            StoredLacks::Everything => Lacks::Everything,
        };
        let configuration = Self {
            stamp: stored.stamp.into(),
            term: stored.term.into(),
            primary: stored.primary,
            secondaries: stored.secondaries.clone(),
            candidates: stored.candidates.iter().map(|(copy, stored)| (*copy, lacks(stored))).collect(),
            lost: stored.lost.map(Into::into).unwrap_or_default(),
        };
        let named = configuration.copies().count();
        if named > MAX_COPIES {
            return Err(BadConfiguration::Copies(stored.volume));
        }
        if configuration.copies().collect::<BTreeSet<_>>().len() != named {
            return Err(BadConfiguration::Twice(stored.volume));
        }
        let latest = configuration.term.max(configuration.lost);
        if configuration.stamp.version.0 == 0 || latest > configuration.stamp {
            return Err(BadConfiguration::Version(stored.volume));
        }
        Ok(configuration)
    }
}

impl Object for VolumeConfiguration {
    const KIND: &'static str = "configuration";
    fn key(&self) -> String {
        self.volume.to_string()
    }
    fn name(&self) -> Option<&str> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> InstanceId {
        InstanceId::from_bytes([byte; 16])
    }

    fn stamp(generation: u64, version: u64) -> Stamp {
        Stamp { generation: Generation(generation), version: ConfigurationVersion(version) }
    }

    fn sample() -> Configuration {
        Configuration {
            stamp: stamp(1, 9),
            term: stamp(1, 7),
            primary: Some(id(1)),
            secondaries: BTreeSet::from([id(2)]),
            candidates: BTreeMap::from([(id(3), Lacks::Since(stamp(1, 8))), (id(4), Lacks::Everything)]),
            lost: Stamp::default(),
        }
    }

    fn volume() -> VolumeId {
        VolumeId::from_bytes([9; 16])
    }

    #[test]
    fn a_configuration_is_read_back_as_it_was_written() {
        let none = Configuration { primary: None, ..sample() };
        let lost = Configuration { lost: stamp(1, 7), ..sample() };
        for configuration in [sample(), none, lost, Configuration::first(Generation(3), id(1), BTreeSet::new())] {
            let json = serde_json::to_string(&VolumeConfiguration::new(volume(), &configuration)).expect("JSON");
            let stored: VolumeConfiguration = serde_json::from_str(&json).expect("readable");
            assert_eq!(Configuration::try_from(&stored), Ok(configuration));
        }
    }

    #[test]
    fn its_text_does_not_change() {
        let text = std::fs::read_to_string("tests/golden/configuration-v1.json").expect("the golden file");
        let stored: VolumeConfiguration = serde_json::from_str(&text).expect("readable");
        assert_eq!(Configuration::try_from(&stored), Ok(sample()));
        let written = serde_json::to_string(&VolumeConfiguration::new(volume(), &sample())).expect("JSON");
        assert_eq!(written, text.trim_end());
    }

    #[test]
    fn what_breaks_a_rule_is_refused() {
        let refused = |change: fn(&mut VolumeConfiguration)| {
            let mut stored = VolumeConfiguration::new(volume(), &sample());
            change(&mut stored);
            Configuration::try_from(&stored).expect_err("refused")
        };
        assert_eq!(refused(|c| c.primary = Some(id(2))), BadConfiguration::Twice(volume()));
        assert_eq!(refused(|c| _ = c.secondaries.insert(id(5))), BadConfiguration::Copies(volume()));
        assert_eq!(refused(|c| c.stamp.version = 0), BadConfiguration::Version(volume()));
        assert_eq!(refused(|c| c.term.version = 10), BadConfiguration::Version(volume()));
        assert_eq!(refused(|c| c.term.generation = 2), BadConfiguration::Version(volume()));
        assert_eq!(refused(|c| c.lost = Some(stamp(1, 10).into())), BadConfiguration::Version(volume()));
    }
}
