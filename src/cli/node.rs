//! `tandem volume stage|publish|unpublish|unstage`: what the attacher and the kubelet do, by the same CSI calls.

use super::CliError;
use super::client::{Target, find_volume, refused};
use super::output::Output;
use super::volume::volume_capability;
use crate::rpc::csi;
use std::path::{Path, PathBuf};

/// Use a volume on this node. Stage it once, publish it as often as needed, then undo both.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Attach a volume to this node and mount it on a private directory (CSI: ControllerPublish, NodeStage).
    ///
    /// A volume without a filesystem gets one. A directory that does not exist is made.
    Stage(StageArguments),
    /// Undo `stage` (CSI: NodeUnstage, ControllerUnpublish).
    Unstage(PathArguments),
    /// Make a staged volume appear at a path, for an application (CSI: NodePublish).
    Publish(PublishArguments),
    /// Undo `publish` (CSI: NodeUnpublish).
    Unpublish(PathArguments),
    /// Take a volume from a node that is dead, so that another one may stage it (CSI: ControllerUnpublish alone).
    ///
    /// What Kubernetes does for a node with the taint out-of-service. A volume with `replication: sync` is safe all the
    /// while: the old node's copy stops serving by itself before another one begins.
    Detach(DetachArguments),
}

#[derive(Debug, clap::Args)]
pub struct DetachArguments {
    /// Id or name.
    volume: String,
    /// The node from which it is taken.
    node: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct Use {
    /// Filesystem: ext4 or xfs; the driver's default if not said.
    #[arg(long, env = "TANDEM_FS_TYPE", conflicts_with = "block")]
    fs_type: Option<String>,
    /// As a bare block device instead of a filesystem.
    #[arg(long, env = "TANDEM_BLOCK")]
    block: bool,
    /// A mount option such as noatime; may be repeated.
    #[arg(
        long = "mount-flag",
        env = "TANDEM_MOUNT_FLAGS",
        value_delimiter = ',',
        value_name = "FLAG",
        conflicts_with = "block"
    )]
    mount_flags: Vec<String>,
    /// Nothing may be written through it.
    #[arg(long, env = "TANDEM_READ_ONLY")]
    read_only: bool,
}

#[derive(Debug, clap::Args)]
pub struct StageArguments {
    /// Id or name.
    volume: String,
    /// The private directory.
    staging: PathBuf,
    #[command(flatten)]
    usage: Use,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct PublishArguments {
    /// Id or name.
    volume: String,
    /// Where it shall appear.
    path: PathBuf,
    /// The directory on which it was staged.
    #[arg(long, env = "TANDEM_STAGING", value_name = "DIR")]
    staging: PathBuf,
    #[command(flatten)]
    usage: Use,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct PathArguments {
    /// Id or name.
    volume: String,
    /// The directory or path that was given before.
    path: PathBuf,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// Does one of them.
pub async fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Stage(arguments) => stage(arguments).await,
        Command::Unstage(arguments) => unstage(arguments).await,
        Command::Publish(arguments) => publish(arguments).await,
        Command::Detach(DetachArguments { volume, node, target, output }) => {
            let id = find_volume(&target, &volume).await?.volume_id;
            let doing = format!("cannot take volume {volume} from its node");
            detach(&target, id.clone(), node.clone(), doing).await?;
            output.silent(&serde_json::json!({ "id": id, "node": node }))
        }
        Command::Unpublish(PathArguments { volume, path, target, output }) => {
            let id = find_volume(&target, &volume).await?.volume_id;
            let request = csi::NodeUnpublishVolumeRequest { volume_id: id.clone(), target_path: text(&path) };
            let answer = target.node().await?.node_unpublish_volume(request).await;
            answer.map_err(refused(format!("cannot unpublish volume {volume}")))?;
            output.silent(&serde_json::json!({ "id": id, "path": text(&path) }))
        }
    }
}

/// CSI wants absolute paths; a person need not.
fn text(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()).display().to_string()
}

fn make(directory: &Path) -> Result<(), CliError> {
    let failed = |source| CliError::Directory { path: directory.display().to_string(), source };
    std::fs::create_dir_all(directory).map_err(failed)
}

/// The volume context that the controller gave the volume: Kubernetes hands it to every later call.
async fn context(
    target: &Target,
    volume_id: &str,
    doing: &str,
) -> Result<std::collections::HashMap<String, String>, CliError> {
    let request = csi::ControllerGetVolumeRequest { volume_id: volume_id.into() };
    let answer = target.controller().await?.controller_get_volume(request).await.map_err(refused(doing))?;
    Ok(answer.into_inner().volume.map(|v| v.volume_context).unwrap_or_default())
}

/// The name of the target's node.
async fn own_name(target: &Target, doing: &str) -> Result<String, CliError> {
    let info = target.node().await?.node_get_info(csi::NodeGetInfoRequest {}).await.map_err(refused(doing))?;
    Ok(info.into_inner().node_id)
}

async fn detach(target: &Target, volume_id: String, node_id: String, doing: String) -> Result<(), CliError> {
    let request = csi::ControllerUnpublishVolumeRequest { volume_id, node_id, ..Default::default() };
    target.controller().await?.controller_unpublish_volume(request).await.map(drop).map_err(refused(doing))
}

async fn attach(
    target: &Target,
    volume_id: &str,
    usage: &Use,
    doing: &str,
) -> Result<std::collections::HashMap<String, String>, CliError> {
    let request = csi::ControllerPublishVolumeRequest {
        volume_id: volume_id.into(),
        node_id: own_name(target, doing).await?,
        volume_capability: Some(volume_capability(usage.block, usage.fs_type.clone(), usage.mount_flags.clone())),
        readonly: usage.read_only,
        volume_context: context(target, volume_id, doing).await?,
        ..Default::default()
    };
    let answer = target.controller().await?.controller_publish_volume(request).await.map_err(refused(doing))?;
    Ok(answer.into_inner().publish_context)
}

async fn stage(StageArguments { volume, staging, usage, target, output }: StageArguments) -> Result<(), CliError> {
    let volume_id = find_volume(&target, &volume).await?.volume_id;
    let doing = format!("cannot stage volume {volume}");
    make(&staging)?;
    let publish_context = attach(&target, &volume_id, &usage, &doing).await?;
    let volume_context = context(&target, &volume_id, &doing).await?;
    let done = serde_json::json!({ "id": volume_id, "staging": text(&staging) });
    let request = csi::NodeStageVolumeRequest {
        volume_id,
        publish_context,
        staging_target_path: text(&staging),
        volume_capability: Some(volume_capability(usage.block, usage.fs_type, usage.mount_flags)),
        volume_context,
        ..Default::default()
    };
    target.node().await?.node_stage_volume(request).await.map_err(refused(doing))?;
    output.silent(&done)
}

async fn unstage(PathArguments { volume, path, target, output }: PathArguments) -> Result<(), CliError> {
    let volume_id = find_volume(&target, &volume).await?.volume_id;
    let doing = format!("cannot unstage volume {volume}");
    let request = csi::NodeUnstageVolumeRequest { volume_id: volume_id.clone(), staging_target_path: text(&path) };
    target.node().await?.node_unstage_volume(request).await.map_err(refused(doing.as_str()))?;
    detach(&target, volume_id.clone(), own_name(&target, &doing).await?, doing).await?;
    output.silent(&serde_json::json!({ "id": volume_id, "staging": text(&path) }))
}

async fn publish(arguments: PublishArguments) -> Result<(), CliError> {
    let PublishArguments { volume, path, staging, usage, target, output } = arguments;
    let volume_id = find_volume(&target, &volume).await?.volume_id;
    let doing = format!("cannot publish volume {volume}");
    if let Some(parent) = path.parent() {
        make(parent)?;
    }
    let publish_context = attach(&target, &volume_id, &usage, &doing).await?;
    let volume_context = context(&target, &volume_id, &doing).await?;
    let done = serde_json::json!({ "id": volume_id, "path": text(&path) });
    let request = csi::NodePublishVolumeRequest {
        volume_id,
        publish_context,
        staging_target_path: text(&staging),
        target_path: text(&path),
        volume_capability: Some(volume_capability(usage.block, usage.fs_type, usage.mount_flags)),
        readonly: usage.read_only,
        volume_context,
        ..Default::default()
    };
    target.node().await?.node_publish_volume(request).await.map_err(refused(doing))?;
    output.silent(&done)
}

/// A directory on which the device's filesystem is mounted, seen from here; `None` if there is none or no device.
pub fn mount_point(device: &str) -> Option<String> {
    if device.is_empty() {
        return None;
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' '));
    fields.find_map(|mut f| (f.next() == Some(device)).then(|| f.next()).flatten().map(unescape))
}

/// The kernel writes blanks and backslashes in paths as octal numbers.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}
