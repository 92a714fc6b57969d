//! `tandem snapshot`: take, list and delete snapshots.

use super::client::{Target, find_snapshot, find_volume, name_of, refused, snapshot_places, snapshots};
use super::output::{Output, Row};
use super::{CliError, units};
use crate::rpc::{control, csi};
use serde::Serialize;

/// Snapshots: take, list and delete them. A SNAPSHOT is named by its id or by its name.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List all snapshots of this node, or those of one volume, and the nodes that have them.
    ///
    /// "not yet" are nodes whose copies of a mirrored volume were away, or were made, since it was taken: it is brought over to
    /// them. The nodes are not told when the controller is not reached.
    #[command(visible_alias = "ls")]
    List(ListArguments),
    /// Take a snapshot of a volume, which may be in use. The same name again is the same snapshot.
    Create(CreateArguments),
    /// Delete a snapshot. Volumes made from it live on.
    #[command(visible_alias = "rm")]
    Delete(DeleteArguments),
}

#[derive(Debug, clap::Args)]
pub struct ListArguments {
    /// Only those of this volume (id or name).
    #[arg(long, env = "TANDEM_VOLUME")]
    volume: Option<String>,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct CreateArguments {
    /// Volume: id or name.
    volume: String,
    /// Name of the snapshot.
    name: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct DeleteArguments {
    /// Id or name.
    snapshot: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Snapshot {
    id: String,
    name: String,
    volume_id: String,
    pool: String,
    size_bytes: u64,
    allocated_bytes: u64,
    created_ms: u64,
    checksummed: bool,
    /// Empty: the controller is not reached.
    nodes: Vec<String>,
    lacking: Vec<String>,
}

impl From<&control::Snapshot> for Snapshot {
    fn from(s: &control::Snapshot) -> Self {
        Self {
            id: s.snapshot_id.clone(),
            name: name_of(&s.descriptor),
            volume_id: s.volume_id.clone(),
            pool: s.pool.clone(),
            size_bytes: s.size_bytes,
            allocated_bytes: s.allocated_bytes,
            created_ms: s.created_ms,
            checksummed: s.checksummed,
            nodes: Vec::new(),
            lacking: Vec::new(),
        }
    }
}

impl Row for Snapshot {
    const TITLES: &'static [&'static str] =
        &["NAME", "ID", "VOLUME", "POOL", "SIZE", "OWN BLOCKS", "AGE", "CHECKSUMS", "NODES"];
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.id.clone(),
            self.volume_id.clone(),
            self.pool.clone(),
            units::bytes(self.size_bytes),
            units::bytes(self.allocated_bytes),
            age(self.created_ms),
            if self.checksummed { "written" } else { "being made" }.into(),
            match (self.nodes.join(", "), self.lacking.join(", ")) {
                (nodes, lacking) if lacking.is_empty() => nodes,
                (nodes, lacking) => format!("{nodes} (not yet: {lacking})"),
            },
        ]
    }
}

/// How long ago that was, in its largest unit.
fn age(created_ms: u64) -> String {
    let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs());
    let seconds = now.saturating_sub(created_ms / 1000);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Does one of them.
pub async fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::List(ListArguments { volume, target, output }) => {
            let of = match volume {
                Some(volume) => Some(find_volume(&target, &volume).await?.volume_id),
                None => None,
            };
            let all = snapshots(&target).await?;
            let mut places = snapshot_places(&target).await;
            let wanted = all.iter().filter(|s| of.as_ref().is_none_or(|of| s.volume_id == *of));
            let row = |found: &control::Snapshot| {
                let place = places.remove(&found.snapshot_id).unwrap_or_default();
                Snapshot { nodes: place.nodes, lacking: place.lacking, ..found.into() }
            };
            output.rows(&wanted.map(row).collect::<Vec<_>>())
        }
        Command::Create(arguments) => create(arguments).await,
        Command::Delete(DeleteArguments { snapshot, target, output }) => {
            let id = find_snapshot(&target, &snapshot).await?.snapshot_id;
            let request = csi::DeleteSnapshotRequest { snapshot_id: id.clone(), ..Default::default() };
            let answer = target.controller().await?.delete_snapshot(request).await;
            answer.map_err(refused(format!("cannot delete snapshot {snapshot}")))?;
            output.done(&serde_json::json!({ "id": id }), &format!("snapshot {snapshot} is deleted"))
        }
    }
}

async fn create(CreateArguments { volume, name, target, output }: CreateArguments) -> Result<(), CliError> {
    let source_volume_id = find_volume(&target, &volume).await?.volume_id;
    let request = csi::CreateSnapshotRequest { source_volume_id, name: name.clone(), ..Default::default() };
    let answer = target.controller().await?.create_snapshot(request).await;
    let made =
        answer.map_err(refused(format!("cannot snapshot volume {volume}")))?.into_inner().snapshot.unwrap_or_default();
    let sentence = format!("snapshot {name} of volume {volume} has the id {}", made.snapshot_id);
    let size = u64::try_from(made.size_bytes).unwrap_or(0);
    output.done(&serde_json::json!({ "id": made.snapshot_id, "name": name, "size_bytes": size }), &sentence)
}
