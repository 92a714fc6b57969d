//! One volume at one staging path and one target, and the calls on it.

use crate::fake::Node as Machine;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use tandem::csi::node::NodeService;
use tandem::mount::MountTable;
use tandem::rpc::csi::node_server::Node;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use tandem::rpc::csi::*;
use tandem::volume::VolumeId;
use tonic::{Code, Request, Status};

pub const MIB: u64 = 1 << 20;
/// mkfs.xfs wants that much.
pub const SIZE: u64 = 300 * MIB;

/// How a volume is used in a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Ext4,
    Xfs,
    Block,
}
pub use Use::{Block, Ext4, Xfs};
pub const KINDS: [Use; 3] = [Ext4, Xfs, Block];

pub fn capability(kind: Use, mode: Mode) -> VolumeCapability {
    with_flags(kind, mode, &[])
}

pub fn with_flags(kind: Use, mode: Mode, flags: &[&str]) -> VolumeCapability {
    let mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    let mount = |fs_type: &str| {
        AccessType::Mount(MountVolume { fs_type: fs_type.into(), mount_flags, volume_mount_group: String::new() })
    };
    let access_type = match kind {
        Ext4 => mount(""),
        Xfs => mount("xfs"),
        Block => AccessType::Block(BlockVolume {}),
    };
    VolumeCapability { access_type: Some(access_type), access_mode: Some(AccessMode { mode: mode.into() }) }
}

/// One volume at one staging path and one target.
#[derive(Clone)]
pub struct Case {
    pub id: String,
    pub staging: String,
    pub target: String,
    pub capability: VolumeCapability,
    pub readonly: bool,
}

impl Case {
    pub fn new(machine: &Machine, id: VolumeId, kind: Use) -> Self {
        Self {
            id: id.to_string(),
            staging: machine.staging(&format!("staging-{id}")),
            target: machine.target(&format!("target-{id}")),
            capability: capability(kind, Mode::SingleNodeWriter),
            readonly: false,
        }
    }

    pub async fn stage(&self, service: &NodeService) -> Result<(), Status> {
        let request = NodeStageVolumeRequest {
            volume_id: self.id.clone(),
            staging_target_path: self.staging.clone(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        };
        service.node_stage_volume(Request::new(request)).await.map(drop)
    }

    pub async fn publish(&self, service: &NodeService) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            staging_target_path: self.staging.clone(),
            target_path: self.target.clone(),
            volume_capability: Some(self.capability.clone()),
            readonly: self.readonly,
            ..Default::default()
        };
        service.node_publish_volume(Request::new(request)).await.map(drop)
    }

    pub async fn unpublish(&self, service: &NodeService) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest { volume_id: self.id.clone(), target_path: self.target.clone() };
        service.node_unpublish_volume(Request::new(request)).await.map(drop)
    }

    pub async fn unstage(&self, service: &NodeService) -> Result<(), Status> {
        let request =
            NodeUnstageVolumeRequest { volume_id: self.id.clone(), staging_target_path: self.staging.clone() };
        service.node_unstage_volume(Request::new(request)).await.map(drop)
    }

    pub async fn expand(&self, service: &NodeService, bytes: u64) -> Result<i64, Status> {
        let request = NodeExpandVolumeRequest {
            volume_id: self.id.clone(),
            volume_path: self.target.clone(),
            capacity_range: Some(CapacityRange { required_bytes: bytes as i64, limit_bytes: 0 }),
            ..Default::default()
        };
        service.node_expand_volume(Request::new(request)).await.map(|answer| answer.into_inner().capacity_bytes)
    }

    pub async fn stats(&self, service: &NodeService, path: &str) -> Result<Vec<VolumeUsage>, Status> {
        let request =
            NodeGetVolumeStatsRequest { volume_id: self.id.clone(), volume_path: path.into(), ..Default::default() };
        service.node_get_volume_stats(Request::new(request)).await.map(|answer| answer.into_inner().usage)
    }

    /// Writes and reads a word through the target.
    pub fn write(&self, kind: Use, word: &str) -> std::io::Result<()> {
        match kind {
            Block => {
                let mut device = OpenOptions::new().write(true).open(&self.target)?;
                device.write_all(&word.as_bytes().repeat(4096 / word.len()))?;
                device.sync_all()
            }
            Ext4 | Xfs => fs::write(Path::new(&self.target).join("file"), word),
        }
    }

    pub fn read(&self, kind: Use, length: usize) -> String {
        let mut bytes = vec![0; length];
        let path = if kind == Block { self.target.clone().into() } else { Path::new(&self.target).join("file") };
        fs::File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).expect("read");
        String::from_utf8(bytes).expect("a word")
    }

    pub fn assert_gone(&self, machine: &Machine) {
        assert!(!Path::new(&self.target).exists(), "the target is removed");
        assert_eq!(fs::read_dir(&self.staging).expect("staging").count(), 0, "the staging directory is left empty");
        let table = MountTable::read().expect("table");
        assert!(table.at(Path::new(&self.staging)).is_none(), "nothing is mounted");
        assert_eq!(machine.leftovers(), Vec::<String>::new());
        assert_eq!(machine.device(self.id.parse().expect("id")), None, "the device is detached");
    }
}

pub fn code(result: Result<(), Status>) -> Code {
    result.err().map_or(Code::Ok, |status| {
        assert!(!status.message().is_empty(), "every error says something");
        status.code()
    })
}
