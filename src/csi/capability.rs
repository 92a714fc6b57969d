//! Volume capabilities: how a caller wants to use a volume, checked once.

use crate::catalog::{Access, AccessMode, FsType};
use crate::rpc::csi::VolumeCapability;
use crate::rpc::csi::volume_capability::AccessType;
use crate::rpc::csi::volume_capability::access_mode::Mode;

/// Longest sum of mount flags in bytes: the interface's limit.
const MOUNT_FLAGS_BYTES: usize = 4096;

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Device or filesystem.
    pub access: Access,
    /// By how many.
    pub mode: AccessMode,
    /// For mount(8). May hold secrets: never logged.
    pub mount_flags: Vec<String>,
}

/// Why a capability is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// None given.
    #[error("volume_capability is missing")]
    Missing,
    /// Neither block nor mount.
    #[error("volume_capability.access_type is missing: it is block or mount")]
    NoAccessType,
    /// No mode, or an unknown one.
    #[error("volume_capability.access_mode is missing or unknown")]
    NoMode,
    /// Writers on several nodes.
    #[error(
        "access mode {0} is not possible: a volume is written from one node only; use a SINGLE_NODE mode (ReadWriteOnce)"
    )]
    ManyWriters(&'static str),
    /// A filesystem that Tandem does not make.
    #[error("filesystem {0:?} is not possible: it is ext4 or xfs")]
    UnknownFilesystem(String),
    /// A feature that the node does not announce.
    #[error("volume_mount_group is not supported: let the kubelet apply fsGroup")]
    MountGroup,
    /// More than the interface allows.
    #[error("mount_flags are longer than {MOUNT_FLAGS_BYTES} bytes")]
    LongFlags,
}

impl TryFrom<&VolumeCapability> for Capability {
    type Error = CapabilityError;

    fn try_from(capability: &VolumeCapability) -> Result<Self, CapabilityError> {
        let (access, mount_flags) = match &capability.access_type {
            None => return Err(CapabilityError::NoAccessType),
            Some(AccessType::Block(_)) => (Access::Block, Vec::new()),
            Some(AccessType::Mount(mount)) => {
                if !mount.volume_mount_group.is_empty() {
                    return Err(CapabilityError::MountGroup);
                }
                if mount.mount_flags.iter().map(String::len).sum::<usize>() > MOUNT_FLAGS_BYTES {
                    return Err(CapabilityError::LongFlags);
                }
                (Access::Mount(fs_type(&mount.fs_type)?), mount.mount_flags.clone())
            }
        };
        let mode = capability.access_mode.as_ref().ok_or(CapabilityError::NoMode)?;
        let mode = access_mode(Mode::try_from(mode.mode).unwrap_or(Mode::Unknown))?;
        Ok(Self { access, mode, mount_flags })
    }
}

impl Capability {
    /// A capability that must be there.
    pub fn required(capability: Option<&VolumeCapability>) -> Result<Self, CapabilityError> {
        Self::try_from(capability.ok_or(CapabilityError::Missing)?)
    }
}

/// Empty is the driver's choice.
fn fs_type(text: &str) -> Result<Option<FsType>, CapabilityError> {
    match text {
        "" => Ok(None),
        text => {
            let unknown = || CapabilityError::UnknownFilesystem(text.chars().take(32).collect());
            FsType::parse(text).map(Some).ok_or_else(unknown)
        }
    }
}

fn access_mode(mode: Mode) -> Result<AccessMode, CapabilityError> {
    match mode {
        Mode::Unknown => Err(CapabilityError::NoMode),
        Mode::SingleNodeWriter => Ok(AccessMode::SingleNodeWriter),
        Mode::SingleNodeReaderOnly => Ok(AccessMode::SingleNodeReader),
        Mode::SingleNodeSingleWriter => Ok(AccessMode::SingleNodeSingleWriter),
        Mode::SingleNodeMultiWriter => Ok(AccessMode::SingleNodeMultiWriter),
        Mode::MultiNodeReaderOnly => Ok(AccessMode::MultiNodeReader),
        Mode::MultiNodeSingleWriter => Err(CapabilityError::ManyWriters("MULTI_NODE_SINGLE_WRITER")),
        Mode::MultiNodeMultiWriter => Err(CapabilityError::ManyWriters("MULTI_NODE_MULTI_WRITER")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::csi::volume_capability as proto;

    fn capability(access_type: Option<AccessType>, mode: Mode) -> VolumeCapability {
        VolumeCapability { access_type, access_mode: Some(proto::AccessMode { mode: mode.into() }) }
    }

    fn mount(fs_type: &str) -> Option<AccessType> {
        Some(AccessType::Mount(proto::MountVolume { fs_type: fs_type.into(), ..Default::default() }))
    }

    #[test]
    fn writers_on_several_nodes_are_refused_by_name() {
        for mode in [Mode::MultiNodeSingleWriter, Mode::MultiNodeMultiWriter] {
            let refused = Capability::try_from(&capability(mount(""), mode)).expect_err("refused").to_string();
            assert!(refused.contains(mode.as_str_name()), "{refused}");
        }
        for mode in [Mode::SingleNodeWriter, Mode::SingleNodeSingleWriter, Mode::SingleNodeMultiWriter] {
            assert!(Capability::try_from(&capability(mount("xfs"), mode)).is_ok());
        }
    }

    #[test]
    fn half_a_capability_is_refused() {
        let whole = capability(Some(AccessType::Block(proto::BlockVolume {})), Mode::SingleNodeWriter);
        assert_eq!(Capability::required(None), Err(CapabilityError::Missing));
        let no_type = VolumeCapability { access_type: None, ..whole.clone() };
        assert_eq!(Capability::try_from(&no_type), Err(CapabilityError::NoAccessType));
        let no_mode = VolumeCapability { access_mode: None, ..whole.clone() };
        assert_eq!(Capability::try_from(&no_mode), Err(CapabilityError::NoMode));
        assert_eq!(Capability::try_from(&capability(mount(""), Mode::Unknown)), Err(CapabilityError::NoMode));
        assert!(Capability::try_from(&capability(mount("zfs"), Mode::SingleNodeWriter)).is_err());
        assert_eq!(Capability::try_from(&whole).map(|c| c.access), Ok(Access::Block));
    }
}
