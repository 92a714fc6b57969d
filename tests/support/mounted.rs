//! Volumes that are staged and published as kubelet does it, at paths below the installation's directory.

use super::installation::{Installation, block};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use tandem::rpc::csi;
use tandem::rpc::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use tonic::{Code, Status};

/// How often a call that cannot be answered now (the server is being killed) is repeated, and how long.
const REPEATS: u32 = 6000;
const PAUSE: Duration = Duration::from_millis(50);

/// The capability "filesystem, one node writes".
pub fn filesystem(fs_type: &str) -> csi::VolumeCapability {
    let mount = MountVolume { fs_type: fs_type.to_owned(), mount_flags: Vec::new(), volume_mount_group: String::new() };
    csi::VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(mount)),
    }
}

/// One volume with the paths that kubelet would choose.
#[derive(Clone, Debug)]
pub struct Usage {
    pub volume: String,
    pub staging: PathBuf,
    pub target: PathBuf,
    pub capability: csi::VolumeCapability,
}

/// Repeats a call until it is answered by something else than "ask again".
pub async fn insist<T, F: Future<Output = Result<T, Status>>>(mut call: impl FnMut() -> F) -> Result<T, Status> {
    let mut last = Status::unknown("never asked");
    for _ in 0..REPEATS {
        match call().await {
            Err(status) if may_be_repeated(&status) => last = status,
            answer => return answer,
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(last)
}

/// Whether the answer says nothing about the request: the server died, or works on it.
pub fn may_be_repeated(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Aborted | Code::Unknown | Code::Cancelled)
}

impl Usage {
    /// A filesystem volume; `fs_type` empty: a block volume.
    pub fn new(tandem: &Installation, volume: &str, fs_type: &str) -> Self {
        let capability = if fs_type.is_empty() { block() } else { filesystem(fs_type) };
        let staging = tandem.dir().join("staging").join(volume);
        let target = tandem.dir().join("targets").join(volume);
        fs::create_dir_all(&staging).expect("staging path");
        fs::create_dir_all(tandem.dir().join("targets")).expect("targets");
        Self { volume: volume.to_owned(), staging, target, capability }
    }

    pub async fn stage(&self, tandem: &Installation) -> Result<(), Status> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: self.volume.clone(),
            staging_target_path: self.staging.display().to_string(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        };
        tandem.node().node_stage_volume(request).await.map(drop)
    }

    pub async fn publish(&self, tandem: &Installation) -> Result<(), Status> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.volume.clone(),
            staging_target_path: self.staging.display().to_string(),
            target_path: self.target.display().to_string(),
            volume_capability: Some(self.capability.clone()),
            ..Default::default()
        };
        tandem.node().node_publish_volume(request).await.map(drop)
    }

    pub async fn unpublish(&self, tandem: &Installation) -> Result<(), Status> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: self.volume.clone(),
            target_path: self.target.display().to_string(),
        };
        tandem.node().node_unpublish_volume(request).await.map(drop)
    }

    pub async fn unstage(&self, tandem: &Installation) -> Result<(), Status> {
        let request = csi::NodeUnstageVolumeRequest {
            volume_id: self.volume.clone(),
            staging_target_path: self.staging.display().to_string(),
        };
        tandem.node().node_unstage_volume(request).await.map(drop)
    }
}
