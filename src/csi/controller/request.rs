//! Requests of the Controller service as domain requests: whatever gets through here is complete and within its limits.
//!
//! Invariants: secrets are dropped here and never leave the generated types; ids stay texts, because every text that is
//! no id of ours is an id that does not exist, and not a mistake of the caller.

use crate::catalog::{Access, NodeName};
use crate::csi::TOPOLOGY_KEY;
use crate::csi::capability::Capability;
use crate::csi::errors::{ArgumentError, RangeError};
use crate::csi::parameters::{self, Changes, Parameters};
use crate::placement::Place;
use crate::rpc::csi;
use crate::volume::{BLOCK_SIZE, MAX_VOLUME_BYTES, VolumeSize};
use std::collections::{BTreeSet, HashMap};

/// A volume without a size gets this one.
pub const DEFAULT_VOLUME_BYTES: u64 = 1 << 30;
/// The interface's limit for texts.
const TEXT_BYTES: usize = 128;

/// `capacity_range`: bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SizeRange {
    /// `None`: no wish.
    pub required: Option<u64>,
    /// `None`: no limit.
    pub limit: Option<u64>,
}

impl SizeRange {
    /// The smallest size that satisfies the range and is at least `floor` bytes; without a wish, `default` bytes or what
    /// the limit leaves of them.
    pub fn choose(self, floor: u64, default: u64) -> Result<VolumeSize, RangeError> {
        let limit = self.limit.unwrap_or(u64::MAX);
        let wish = self.required.unwrap_or_else(|| default.min(limit / BLOCK_SIZE * BLOCK_SIZE));
        let bytes = wish.max(floor).checked_next_multiple_of(BLOCK_SIZE).unwrap_or(u64::MAX);
        if bytes > MAX_VOLUME_BYTES {
            let text = format!("a volume of {bytes} bytes is not possible: the largest has {MAX_VOLUME_BYTES}");
            return Err(RangeError(text));
        }
        if bytes > limit {
            let text = format!(
                "capacity_range cannot be met: {wish} bytes are wanted, at least {floor} needed (source, filesystem), \
                 sizes are multiples of {BLOCK_SIZE}, and limit_bytes is {limit}"
            );
            return Err(RangeError(text));
        }
        VolumeSize::try_from(bytes).map_err(|error| RangeError(error.to_string()))
    }

    /// Whether a volume of that size is what was asked for.
    pub fn contains(self, size: VolumeSize) -> bool {
        self.required.is_none_or(|required| size.bytes() >= required)
            && self.limit.is_none_or(|limit| size.bytes() <= limit)
    }
}

impl TryFrom<Option<&csi::CapacityRange>> for SizeRange {
    type Error = ArgumentError;
    fn try_from(range: Option<&csi::CapacityRange>) -> Result<Self, ArgumentError> {
        let Some(range) = range else { return Ok(Self::default()) };
        let bytes = |field, value: i64| match u64::try_from(value) {
            Err(_) => Err(ArgumentError::Negative(field)),
            Ok(0) => Ok(None),
            Ok(bytes) => Ok(Some(bytes)),
        };
        let required = bytes("capacity_range.required_bytes", range.required_bytes)?;
        Ok(Self { required, limit: bytes("capacity_range.limit_bytes", range.limit_bytes)? })
    }
}

/// `accessibility_requirements`.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Some or all of these must be reached; none: anything will do.
    pub requisite: Vec<Place>,
    /// The better ones first.
    pub preferred: Vec<Place>,
}

impl Places {
    /// Whether what is on this node may be among what is asked for.
    pub fn include(&self, node: &NodeName) -> bool {
        self.requisite.is_empty() || self.requisite.iter().any(|place| place.includes(node))
    }
}

impl From<Option<csi::TopologyRequirement>> for Places {
    fn from(requirement: Option<csi::TopologyRequirement>) -> Self {
        let csi::TopologyRequirement { requisite, preferred } = requirement.unwrap_or_default();
        let places = |all: Vec<csi::Topology>| all.iter().map(|topology| place(&topology.segments)).collect();
        Self { requisite: places(requisite), preferred: places(preferred) }
    }
}

/// The place with these segments: keys that are not ours describe places that we know nothing of.
fn place(segments: &HashMap<String, String>) -> Place {
    let mut names = segments.iter().map(|(key, value)| key.eq_ignore_ascii_case(TOPOLOGY_KEY).then_some(value));
    match (names.next(), names.next()) {
        (None, _) => Place::Anywhere,
        (Some(Some(name)), None) => Place::Node(NodeName(name.clone())),
        (Some(_), _) => Place::Unknown,
    }
}

/// What a volume is to be made from; the id is not looked up yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WantedSource {
    /// A snapshot's id.
    Snapshot(String),
    /// A volume's id.
    Volume(String),
}

/// CreateVolume.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// The caller's name.
    pub name: String,
    /// Bytes.
    pub size: SizeRange,
    /// Of the StorageClass, mutable ones applied.
    pub parameters: Parameters,
    /// How it shall be used.
    pub access: BTreeSet<Access>,
    /// What its content is.
    pub source: Option<WantedSource>,
    /// Where it must be reachable.
    pub places: Places,
}

impl TryFrom<csi::CreateVolumeRequest> for NewVolume {
    type Error = ArgumentError;
    fn try_from(request: csi::CreateVolumeRequest) -> Result<Self, ArgumentError> {
        let name = name("name", request.name)?;
        let access = access(&request.volume_capabilities)?;
        let parameters = Parameters::parse(&request.parameters, &request.mutable_parameters)?;
        let size = SizeRange::try_from(request.capacity_range.as_ref())?;
        let source = request.volume_content_source.map(wanted_source).transpose()?;
        Ok(Self { name, size, parameters, access, source, places: request.accessibility_requirements.into() })
    }
}

fn wanted_source(source: csi::VolumeContentSource) -> Result<WantedSource, ArgumentError> {
    use csi::volume_content_source::Type;
    match source.r#type {
        Some(Type::Snapshot(source)) => {
            present("volume_content_source.snapshot.snapshot_id", source.snapshot_id).map(WantedSource::Snapshot)
        }
        Some(Type::Volume(source)) => {
            present("volume_content_source.volume.volume_id", source.volume_id).map(WantedSource::Volume)
        }
        None => Err(ArgumentError::Missing("volume_content_source.type")),
    }
}

/// `volume_capabilities`: at least one, all of them possible.
pub fn access(capabilities: &[csi::VolumeCapability]) -> Result<BTreeSet<Access>, ArgumentError> {
    if capabilities.is_empty() {
        return Err(ArgumentError::Missing("volume_capabilities"));
    }
    let parsed = capabilities.iter().map(|capability| Ok(Capability::try_from(capability)?.access));
    parsed.collect()
}

/// A name that the outside world gives: any script, 128 bytes, none of the forbidden control characters.
pub fn name(field: &'static str, text: String) -> Result<String, ArgumentError> {
    let text = present(field, text)?;
    if text.len() > TEXT_BYTES {
        return Err(ArgumentError::TooLong { field, limit: TEXT_BYTES });
    }
    let forbidden = text.chars().find(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r'));
    match forbidden {
        Some(character) => Err(ArgumentError::Character { field, character: character.into() }),
        None => Ok(text),
    }
}

/// A text that must not be empty.
pub fn present(field: &'static str, text: String) -> Result<String, ArgumentError> {
    if text.is_empty() { Err(ArgumentError::Missing(field)) } else { Ok(text) }
}

/// The id of DeleteVolume, ControllerGetVolume and ControllerGetVolumeHealth.
#[derive(Clone, Debug)]
pub struct VolumeReference(pub String);

/// The id of DeleteSnapshot and GetSnapshot.
#[derive(Clone, Debug)]
pub struct SnapshotReference(pub String);

macro_rules! references {
    ($($request:ident => $reference:ident($field:ident);)*) => {
        $(impl TryFrom<csi::$request> for $reference {
            type Error = ArgumentError;
            fn try_from(request: csi::$request) -> Result<Self, ArgumentError> {
                present(stringify!($field), request.$field).map(Self)
            }
        })*
    };
}

references! {
    DeleteVolumeRequest => VolumeReference(volume_id);
    ControllerGetVolumeRequest => VolumeReference(volume_id);
    ControllerGetVolumeHealthRequest => VolumeReference(volume_id);
    DeleteSnapshotRequest => SnapshotReference(snapshot_id);
    GetSnapshotRequest => SnapshotReference(snapshot_id);
}

/// ControllerPublishVolume.
#[derive(Clone, Debug)]
pub struct Publish {
    /// Its id.
    pub volume: String,
    /// Where.
    pub node: String,
    /// How it will be used.
    pub capability: Capability,
    /// Nobody may write.
    pub readonly: bool,
}

impl TryFrom<csi::ControllerPublishVolumeRequest> for Publish {
    type Error = ArgumentError;
    fn try_from(request: csi::ControllerPublishVolumeRequest) -> Result<Self, ArgumentError> {
        let volume = present("volume_id", request.volume_id)?;
        let node = present("node_id", request.node_id)?;
        let capability = Capability::required(request.volume_capability.as_ref())?;
        Ok(Self { volume, node, capability, readonly: request.readonly })
    }
}

/// ControllerUnpublishVolume; without a node: from all of them.
#[derive(Clone, Debug)]
pub struct Unpublish {
    /// Its id.
    pub volume: String,
    /// Where; `None`: everywhere.
    pub node: Option<NodeName>,
}

impl TryFrom<csi::ControllerUnpublishVolumeRequest> for Unpublish {
    type Error = ArgumentError;
    fn try_from(request: csi::ControllerUnpublishVolumeRequest) -> Result<Self, ArgumentError> {
        let volume = present("volume_id", request.volume_id)?;
        Ok(Self { volume, node: (!request.node_id.is_empty()).then_some(NodeName(request.node_id)) })
    }
}

/// ControllerExpandVolume.
#[derive(Clone, Debug)]
pub struct Expand {
    /// Its id.
    pub volume: String,
    /// Bytes.
    pub size: SizeRange,
    /// How it is used, if that is said.
    pub capability: Option<Capability>,
}

impl TryFrom<csi::ControllerExpandVolumeRequest> for Expand {
    type Error = ArgumentError;
    fn try_from(request: csi::ControllerExpandVolumeRequest) -> Result<Self, ArgumentError> {
        let volume = present("volume_id", request.volume_id)?;
        let size = SizeRange::try_from(request.capacity_range.as_ref())?;
        if size == SizeRange::default() {
            return Err(ArgumentError::Missing("capacity_range"));
        }
        let capability = request.volume_capability.as_ref().map(Capability::try_from).transpose()?;
        Ok(Self { volume, size, capability })
    }
}

/// ControllerModifyVolume.
#[derive(Clone, Debug)]
pub struct Modify {
    /// Its id.
    pub volume: String,
    /// What changes.
    pub changes: Changes,
}

impl TryFrom<csi::ControllerModifyVolumeRequest> for Modify {
    type Error = ArgumentError;
    fn try_from(request: csi::ControllerModifyVolumeRequest) -> Result<Self, ArgumentError> {
        let volume = present("volume_id", request.volume_id)?;
        Ok(Self { volume, changes: Changes::parse(&request.mutable_parameters)? })
    }
}

/// GetCapacity.
#[derive(Clone, Debug)]
pub struct Capacity {
    /// Of the StorageClass.
    pub parameters: Parameters,
    /// How the volume would be used, if that is said.
    pub access: BTreeSet<Access>,
    /// The place; `None`: anywhere.
    pub topology: Option<Place>,
}

impl TryFrom<csi::GetCapacityRequest> for Capacity {
    type Error = ArgumentError;
    fn try_from(request: csi::GetCapacityRequest) -> Result<Self, ArgumentError> {
        let parameters = Parameters::parse(&request.parameters, &Default::default())?;
        let none = request.volume_capabilities.is_empty();
        let access = if none { BTreeSet::new() } else { access(&request.volume_capabilities)? };
        let topology = request.accessible_topology.map(|topology| place(&topology.segments));
        Ok(Self { parameters, access, topology })
    }
}

/// Which part of a list.
#[derive(Clone, Debug)]
pub struct Page {
    /// `None`: all that are left.
    pub entries: Option<usize>,
    /// Empty: from the start.
    pub token: String,
}

impl Page {
    fn new(max_entries: i32, token: String) -> Result<Self, ArgumentError> {
        let entries = usize::try_from(max_entries).map_err(|_| ArgumentError::Negative("max_entries"))?;
        Ok(Self { entries: (entries > 0).then_some(entries), token })
    }
}

impl TryFrom<csi::ListVolumesRequest> for Page {
    type Error = ArgumentError;
    fn try_from(request: csi::ListVolumesRequest) -> Result<Self, ArgumentError> {
        Self::new(request.max_entries, request.starting_token)
    }
}

impl TryFrom<csi::ControllerListVolumeHealthRequest> for Page {
    type Error = ArgumentError;
    fn try_from(request: csi::ControllerListVolumeHealthRequest) -> Result<Self, ArgumentError> {
        Self::new(request.max_entries, request.starting_token)
    }
}

/// ListSnapshots; empty filters let everything pass.
#[derive(Clone, Debug)]
pub struct SnapshotPage {
    /// Which part.
    pub page: Page,
    /// Only those of this volume.
    pub volume: Option<String>,
    /// Only this one.
    pub snapshot: Option<String>,
}

impl TryFrom<csi::ListSnapshotsRequest> for SnapshotPage {
    type Error = ArgumentError;
    fn try_from(request: csi::ListSnapshotsRequest) -> Result<Self, ArgumentError> {
        let page = Page::new(request.max_entries, request.starting_token)?;
        let filter = |text: String| (!text.is_empty()).then_some(text);
        Ok(Self { page, volume: filter(request.source_volume_id), snapshot: filter(request.snapshot_id) })
    }
}

/// CreateSnapshot.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// The caller's name.
    pub name: String,
    /// Id of the source.
    pub volume: String,
    /// Where it must be usable.
    pub places: Places,
}

impl TryFrom<csi::CreateSnapshotRequest> for NewSnapshot {
    type Error = ArgumentError;
    fn try_from(request: csi::CreateSnapshotRequest) -> Result<Self, ArgumentError> {
        let name = name("name", request.name)?;
        let volume = present("source_volume_id", request.source_volume_id)?;
        parameters::parse_snapshot(&request.parameters)?;
        Ok(Self { name, volume, places: request.accessibility_requirements.into() })
    }
}

/// ValidateVolumeCapabilities: what cannot be is an answer here and no error, so only the shape is checked.
#[derive(Clone, Debug)]
pub struct Validate {
    /// Its id.
    pub volume: String,
    /// `Err`: the sentence that says why not.
    pub possible: Result<BTreeSet<Access>, String>,
    /// What is handed back if it is possible.
    pub echo: csi::validate_volume_capabilities_response::Confirmed,
}

impl TryFrom<csi::ValidateVolumeCapabilitiesRequest> for Validate {
    type Error = ArgumentError;
    fn try_from(request: csi::ValidateVolumeCapabilitiesRequest) -> Result<Self, ArgumentError> {
        let volume = present("volume_id", request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(ArgumentError::Missing("volume_capabilities"));
        }
        let parsed = Parameters::parse(&request.parameters, &request.mutable_parameters);
        let possible = parsed.map_err(ArgumentError::from).and_then(|_| access(&request.volume_capabilities));
        let echo = csi::validate_volume_capabilities_response::Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
            mutable_parameters: request.mutable_parameters,
        };
        Ok(Self { volume, possible: possible.map_err(|error| error.to_string()), echo })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(required: u64, limit: u64) -> SizeRange {
        let some = |bytes| (bytes > 0).then_some(bytes);
        SizeRange { required: some(required), limit: some(limit) }
    }

    #[test]
    fn the_size_is_the_smallest_that_the_range_allows() {
        let choose = |required, limit, floor| range(required, limit).choose(floor, 1 << 30).map(VolumeSize::bytes).ok();
        assert_eq!(choose(0, 0, 0), Some(1 << 30));
        assert_eq!(choose(10 << 20, 10 << 20, 0), Some(10 << 20));
        assert_eq!(choose((10 << 20) + 1, 0, 0), Some((10 << 20) + 4096));
        assert_eq!(choose((10 << 20) + 1, (10 << 20) + 2, 0), None);
        assert_eq!(choose(0, (10 << 20) + 5, 0), Some(10 << 20));
        assert_eq!(choose(10 << 20, 0, 20 << 20), Some(20 << 20));
        assert_eq!(choose(10 << 20, 15 << 20, 20 << 20), None);
        assert_eq!(choose(20 << 20, 10 << 20, 0), None);
        assert_eq!(choose(u64::MAX, 0, 0), None);
        assert_eq!(choose(i64::MAX as u64, 0, 0), None);
        assert_eq!(choose(1, 0, 1 << 20), Some(1 << 20));
    }

    #[test]
    fn names_may_be_of_any_script_but_not_too_long() {
        for text in ["pvc-1", "../../etc/passwd", "名前", "a/b", "💾", &"x".repeat(128)] {
            assert_eq!(name("name", text.to_owned()).as_deref(), Ok(text));
        }
        assert_eq!(name("name", String::new()), Err(ArgumentError::Missing("name")));
        assert!(matches!(name("name", "é".repeat(65)), Err(ArgumentError::TooLong { .. })));
        for text in ["a\0b", "\u{8}", "\u{b}", "\u{1f}", "\u{7f}", "\u{9f}"] {
            assert!(matches!(name("name", text.to_owned()), Err(ArgumentError::Character { .. })), "{text:?}");
        }
    }

    #[test]
    fn a_place_is_a_node_if_nothing_else_is_said_of_it() {
        let place = |pairs: &[(&str, &str)]| place(&pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect());
        assert_eq!(place(&[(TOPOLOGY_KEY, "alpha")]), Place::Node(NodeName("alpha".into())));
        assert_eq!(place(&[(&TOPOLOGY_KEY.to_uppercase(), "alpha")]), Place::Node(NodeName("alpha".into())));
        assert_eq!(place(&[]), Place::Anywhere);
        assert_eq!(place(&[(TOPOLOGY_KEY, "alpha"), ("topology.example/zone", "z")]), Place::Unknown);
        assert_eq!(place(&[("topology.example/zone", "z")]), Place::Unknown);
    }
}
