//! `tandem volume`: what kubectl and the sidecars do in a cluster, for a person on one machine.

use super::client::{COPY_MISSING, Target, find_snapshot, find_volume, name_of, refused, volumes};
use super::mirror::Mirror;
use super::output::{Output, Row};
use super::{CliError, copies, node, units};
use crate::rpc::control::health::Kind;
use crate::rpc::csi::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use crate::rpc::csi::{self, volume_capability as capability};
use crate::rpc::{control, csi::controller_client::ControllerClient};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::HashMap;
use std::time::Duration;
use tonic::{Code, transport::Channel};

/// How often a call that is still under way is asked again.
const RETRY: Duration = Duration::from_millis(500);

/// Volumes: make, look at, use and delete them. A VOLUME is named by its id or by its name.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List all volumes.
    #[command(visible_alias = "ls")]
    List(ListArguments),
    /// Show one volume: state, device, health.
    Show(ShowArguments),
    Create(CreateArguments),
    /// Delete a volume. Its snapshots and clones live on.
    #[command(visible_alias = "rm")]
    Delete(ShowArguments),
    /// Grow a volume, and the filesystem on it if it is mounted. It never shrinks.
    Expand(ExpandArguments),
    /// Change parameters of a volume while it is in use; all or nothing.
    Modify(ModifyArguments),
    #[command(flatten)]
    Copies(copies::Command),
    #[command(flatten)]
    Node(node::Command),
}

#[derive(Debug, clap::Args)]
pub struct ListArguments {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct ShowArguments {
    /// Id or name.
    volume: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// Create a volume: empty, or from a snapshot or another volume.
///
/// The same name again is the same volume: repeating the command is harmless.
#[derive(Debug, clap::Args)]
pub struct CreateArguments {
    /// Name of the volume; any text up to 128 bytes.
    name: String,
    /// Size, such as 10Gi. A clone has the size of its source unless told otherwise.
    #[arg(long, env = "TANDEM_SIZE", value_parser = units::parse_bytes, required_unless_present_any = ["from_snapshot", "from_volume"])]
    size: Option<u64>,
    /// Pool that holds it.
    #[arg(long, env = "TANDEM_POOL")]
    pool: Option<String>,
    /// Filesystem that it will carry: ext4 or xfs.
    #[arg(long, env = "TANDEM_FS_TYPE", conflicts_with = "block")]
    fs_type: Option<String>,
    /// It will be used as a bare block device.
    #[arg(long, env = "TANDEM_BLOCK")]
    block: bool,
    /// Start with the data of this snapshot (id or name).
    #[arg(long, env = "TANDEM_FROM_SNAPSHOT", value_name = "SNAPSHOT", conflicts_with = "from_volume")]
    from_snapshot: Option<String>,
    /// Start with the data that this volume has now (id or name).
    #[arg(long, env = "TANDEM_FROM_VOLUME", value_name = "VOLUME")]
    from_volume: Option<String>,
    /// A parameter as in a StorageClass; may be repeated.
    #[arg(long = "parameter", env = "TANDEM_PARAMETERS", value_delimiter = ',', value_parser = pair, value_name = "KEY=VALUE")]
    parameters: Vec<(String, String)>,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct ExpandArguments {
    /// Id or name.
    volume: String,
    /// New size, such as 20Gi.
    #[arg(value_parser = units::parse_bytes)]
    size: u64,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct ModifyArguments {
    /// Id or name.
    volume: String,
    /// A mutable parameter; may be repeated.
    #[arg(long = "parameter", env = "TANDEM_PARAMETERS", value_delimiter = ',', value_parser = pair, value_name = "KEY=VALUE", required = true)]
    parameters: Vec<(String, String)>,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    Ok((key.into(), value.into()))
}

#[derive(Serialize)]
struct Volume {
    id: String,
    name: String,
    pool: String,
    size_bytes: u64,
    allocated_bytes: u64,
    state: String,
    device: String,
    verify_reads: bool,
    layers: u32,
    merging_layers: u64,
    unchecked_bytes: u64,
    health: Vec<Health>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mirror: Option<Mirror>,
}

/// One thing that is wrong.
#[derive(Serialize)]
pub struct Health {
    kind: String,
    reason: String,
    message: String,
}

/// The health of a volume, for people and scripts.
pub fn health(volume: &control::Volume) -> Vec<Health> {
    let entry = |h: &control::Health| {
        let kind = match h.kind() {
            Kind::Unknown => "unknown",
            Kind::Degraded => "degraded",
            Kind::Inaccessible => "inaccessible",
            Kind::DataLoss => "data loss",
            Kind::Note => "note",
        };
        Health { kind: kind.into(), reason: h.reason.clone(), message: h.message.clone() }
    };
    volume.health.iter().map(entry).collect()
}

impl Health {
    /// Whether something is to be done about it.
    pub fn is_problem(&self) -> bool {
        self.kind != "note"
    }
}

impl std::fmt::Display for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}): {}", self.kind, self.reason, self.message)
    }
}

impl From<&control::Volume> for Volume {
    fn from(v: &control::Volume) -> Self {
        let is_missing = v.health.iter().any(|health| health.reason == COPY_MISSING);
        let state = match (v.ready, v.device.is_empty(), v.to_copy_bytes) {
            _ if is_missing => "missing".to_string(),
            (false, _, 0) => "being made".to_string(),
            (false, _, all) => format!("copied {} %", v.copied_bytes.saturating_mul(100) / all),
            (true, true, _) => "ready".to_string(),
            (true, false, _) => "attached".to_string(),
        };
        Self {
            id: v.volume_id.clone(),
            name: name_of(&v.descriptor),
            pool: v.pool.clone(),
            size_bytes: v.size_bytes,
            allocated_bytes: v.allocated_bytes,
            state,
            device: v.device.clone(),
            verify_reads: v.verify_reads,
            layers: v.layers,
            merging_layers: v.merging_layers,
            unchecked_bytes: v.unchecked_bytes,
            health: health(v),
            mirror: v.mirror.as_ref().map(Mirror::from),
        }
    }
}

impl Row for Volume {
    const TITLES: &'static [&'static str] = &["NAME", "ID", "POOL", "SIZE", "ALLOCATED", "STATE", "DEVICE", "HEALTH"];
    fn cells(&self) -> Vec<String> {
        let health = self.health.first().map_or_else(|| "ok".to_string(), |h| h.reason.clone());
        let (size, allocated) = (units::bytes(self.size_bytes), units::bytes(self.allocated_bytes));
        let texts = [&self.name, &self.id, &self.pool, &size, &allocated, &self.state, &self.device, &health];
        texts.into_iter().cloned().collect()
    }
}

/// Does one of them.
pub async fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::List(ListArguments { target, output }) => {
            let all: Vec<Volume> = volumes(&target).await?.iter().map(Volume::from).collect();
            output.rows(&all)
        }
        Command::Show(ShowArguments { volume, target, output }) => {
            show(&Volume::from(&find_volume(&target, &volume).await?), output)
        }
        Command::Create(arguments) => create(arguments).await,
        Command::Delete(arguments) => delete(arguments).await,
        Command::Expand(arguments) => expand(arguments).await,
        Command::Modify(arguments) => modify(arguments).await,
        Command::Copies(command) => copies::run(command).await,
        Command::Node(command) => node::run(command).await,
    }
}

fn show(v: &Volume, output: Output) -> Result<(), CliError> {
    let mut lines = vec![
        ("Name", v.name.clone()),
        ("Id", v.id.clone()),
        ("Pool", v.pool.clone()),
        ("Size", units::bytes(v.size_bytes)),
        ("Allocated", format!("{} in the live layer", units::bytes(v.allocated_bytes))),
        ("Layers", format!("{}, {} waiting for a merge", v.layers, v.merging_layers)),
        ("State", v.state.clone()),
        ("Device", if v.device.is_empty() { "none".into() } else { v.device.clone() }),
        ("Verified reads", if v.verify_reads { "yes" } else { "no" }.into()),
        ("Not yet checksummed", units::bytes(v.unchecked_bytes)),
    ];
    lines.extend(v.mirror.iter().flat_map(Mirror::lines));
    if v.health.is_empty() {
        lines.push(("Health", "ok".into()));
    }
    lines.extend(v.health.iter().map(|h| ("Health", h.to_string())));
    output.one(v, &lines)
}

async fn create(arguments: CreateArguments) -> Result<(), CliError> {
    let CreateArguments { name, size, pool, fs_type, block, from_snapshot, from_volume, parameters, target, output } =
        arguments;
    let (source, source_size) = match (from_snapshot, from_volume) {
        (Some(snapshot), _) => {
            let found = find_snapshot(&target, &snapshot).await?;
            (Some(Source::Snapshot(SnapshotSource { snapshot_id: found.snapshot_id })), found.size_bytes)
        }
        (None, Some(volume)) => {
            let found = find_volume(&target, &volume).await?;
            (Some(Source::Volume(VolumeSource { volume_id: found.volume_id })), found.size_bytes)
        }
        (None, None) => (None, 0),
    };
    let mut parameters: HashMap<String, String> = parameters.into_iter().collect();
    parameters.extend(pool.map(|pool| ("pool".to_string(), pool)));
    // Beside the capability: it is what later stages of this volume use when nothing is said.
    parameters.extend(fs_type.clone().map(|fs_type| ("csi.storage.k8s.io/fstype".to_string(), fs_type)));
    let bytes = size.unwrap_or(source_size);
    let request = csi::CreateVolumeRequest {
        name: name.clone(),
        capacity_range: Some(range(bytes)),
        volume_capabilities: vec![volume_capability(block, fs_type, Vec::new())],
        parameters,
        volume_content_source: source.map(|source| csi::VolumeContentSource { r#type: Some(source) }),
        ..Default::default()
    };
    let made = create_until_done(&target, request).await?;
    let size = u64::try_from(made.capacity_bytes).unwrap_or(0);
    let id = made.volume_id;
    let sentence = format!("volume {name} has {} and the id {id}", units::bytes(size));
    output.done(&serde_json::json!({ "id": id, "name": name, "size_bytes": size }), &sentence)
}

/// A copy into another pool is under way for as long as the answer is ABORTED: asks again, and shows how far it is.
async fn create_until_done(target: &Target, request: csi::CreateVolumeRequest) -> Result<csi::Volume, CliError> {
    let mut controller: ControllerClient<Channel> = target.controller().await?;
    let doing = format!("cannot create volume {}", request.name);
    let bar = ProgressBar::hidden();
    loop {
        match controller.create_volume(request.clone()).await {
            Ok(answer) => {
                bar.finish_and_clear();
                return answer
                    .into_inner()
                    .volume
                    .ok_or_else(|| refused(doing)(tonic::Status::internal("no volume in the answer")));
            }
            Err(status) if status.code() == Code::Aborted => {
                bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
                show_copy(target, &request.name, &bar).await?;
                tokio::time::sleep(RETRY).await;
            }
            Err(status) => return Err(refused(doing)(status)),
        }
    }
}

async fn show_copy(target: &Target, name: &str, bar: &ProgressBar) -> Result<(), CliError> {
    let copying = volumes(target).await?.into_iter().find(|v| !v.ready && name_of(&v.descriptor) == name);
    if let Some(volume) = copying {
        bar.set_style(progress_style());
        bar.set_message("copying");
        bar.set_length(volume.to_copy_bytes);
        bar.set_position(volume.copied_bytes);
    }
    Ok(())
}

/// The one look of all progress bars.
pub fn progress_style() -> ProgressStyle {
    let template = "{msg} [{bar:40}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

/// What the volume is to be used as: by several publishes on this node, which is what ReadWriteOnce means.
pub fn volume_capability(block: bool, fs_type: Option<String>, mount_flags: Vec<String>) -> csi::VolumeCapability {
    use capability::access_mode::Mode;
    let mount = capability::MountVolume { fs_type: fs_type.unwrap_or_default(), mount_flags, ..Default::default() };
    csi::VolumeCapability {
        access_mode: Some(capability::AccessMode { mode: Mode::SingleNodeMultiWriter.into() }),
        access_type: Some(if block {
            capability::AccessType::Block(capability::BlockVolume {})
        } else {
            capability::AccessType::Mount(mount)
        }),
    }
}

fn range(bytes: u64) -> csi::CapacityRange {
    // A size beyond the protocol's range is refused by the server as too large, like any other too large one.
    csi::CapacityRange { required_bytes: i64::try_from(bytes).unwrap_or(i64::MAX), limit_bytes: 0 }
}

async fn delete(ShowArguments { volume, target, output }: ShowArguments) -> Result<(), CliError> {
    let id = find_volume(&target, &volume).await?.volume_id;
    let request = csi::DeleteVolumeRequest { volume_id: id.clone(), ..Default::default() };
    let mut controller = target.controller().await?;
    let doing = format!("cannot delete volume {volume}");
    super::copies::until_done(doing, async || controller.delete_volume(request.clone()).await).await?;
    output.done(&serde_json::json!({ "id": id }), &format!("volume {volume} is deleted"))
}

async fn expand(ExpandArguments { volume, size, target, output }: ExpandArguments) -> Result<(), CliError> {
    let found = find_volume(&target, &volume).await?;
    let doing = format!("cannot expand volume {volume}");
    let request = csi::ControllerExpandVolumeRequest {
        volume_id: found.volume_id.clone(),
        capacity_range: Some(range(size)),
        ..Default::default()
    };
    let answer = target.controller().await?.controller_expand_volume(request).await.map_err(refused(doing.as_str()))?;
    let answer = answer.into_inner();
    let mut grown = String::new();
    if answer.node_expansion_required
        && let Some(path) = node::mount_point(&found.device)
    {
        let request = csi::NodeExpandVolumeRequest {
            volume_id: found.volume_id.clone(),
            volume_path: path.clone(),
            capacity_range: Some(range(size)),
            ..Default::default()
        };
        target.node().await?.node_expand_volume(request).await.map_err(refused(doing))?;
        grown = format!(", and so has the filesystem on {path}");
    }
    let bytes = u64::try_from(answer.capacity_bytes).unwrap_or(0);
    let sentence = format!("volume {volume} has {}{grown}", units::bytes(bytes));
    output.done(&serde_json::json!({ "id": found.volume_id, "size_bytes": bytes }), &sentence)
}

async fn modify(ModifyArguments { volume, parameters, target, output }: ModifyArguments) -> Result<(), CliError> {
    let id = find_volume(&target, &volume).await?.volume_id;
    let done = serde_json::json!({ "id": id, "parameters": parameters.iter().cloned().collect::<HashMap<_, _>>() });
    let request = csi::ControllerModifyVolumeRequest {
        volume_id: id,
        mutable_parameters: parameters.into_iter().collect(),
        ..Default::default()
    };
    let answer = target.controller().await?.controller_modify_volume(request).await;
    answer.map_err(refused(format!("cannot modify volume {volume}")))?;
    output.silent(&done)
}
