//! `tandem recover`: says what was found on the disks and put back.

use super::CliError;
use super::client::{Target, refused};
use super::output::Output;
use crate::csi::controller::Report;
use crate::rpc::recovery::{self as rpc, row::State};
use crate::standalone::{self, StorageArguments};
use serde::Serialize;

/// Rebuild a lost, damaged or old catalogue from the disks.
///
/// On one machine the server must not run, and a damaged DIR/catalog.redb is moved away first; name every pool that the
/// server was started with. Every volume and snapshot in the pools comes back under its own id; what the catalogue still has
/// is not changed.
///
/// In a cluster a controller runs, on an empty directory or on a restored one, and the nodes have announced themselves:
/// with --controller-endpoint, or with its directory as --dir, it asks all of them. A mirrored volume can be used again when
/// all copies were read that may have its last writes; those that were not are named. So are the pools of which a node cannot
/// open everything: volumes with one copy, and snapshots, that are only there are not found. The lost controller must not run
/// any more.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    storage: StorageArguments,
    /// CSI socket of the cluster's controller.
    #[arg(long, env = "TANDEM_CONTROLLER_ENDPOINT", value_name = "unix://PATH")]
    controller_endpoint: Option<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Recovered {
    volumes: u64,
    snapshots: u64,
    groups: u64,
    kept: u64,
    problems: Vec<String>,
    rows: Vec<Row>,
    unopened: Vec<Unopened>,
}

/// A pool of which not everything was read.
#[derive(Serialize)]
struct Unopened {
    node: String,
    pool: String,
    problem: String,
}

/// What became of one volume of a cluster.
#[derive(Serialize)]
struct Row {
    id: String,
    name: String,
    state: &'static str,
    generation: u64,
    version: u64,
    nodes: Vec<String>,
    missing: Vec<String>,
}

impl From<Report> for Recovered {
    fn from(report: Report) -> Self {
        rpc::RecoverResponse::from(report).into()
    }
}

impl From<rpc::RecoverResponse> for Recovered {
    fn from(report: rpc::RecoverResponse) -> Self {
        let rpc::RecoverResponse { volumes, snapshots, groups, kept, problems, rows, unopened } = report;
        let rows = rows.into_iter().map(Row::from).collect();
        let unopened = unopened.into_iter().map(Unopened::from).collect();
        Self { volumes, snapshots, groups, kept, problems, rows, unopened }
    }
}

impl From<rpc::Unopened> for Unopened {
    fn from(rpc::Unopened { node, pool, problem }: rpc::Unopened) -> Self {
        Self { node, pool, problem }
    }
}

impl Unopened {
    fn line(&self) -> String {
        let Self { node, pool, problem } = self;
        format!("pool {pool} of {node}: {problem}. What only it has is not put back: when it is open, repeat this")
    }
}

impl From<rpc::Row> for Row {
    fn from(row: rpc::Row) -> Self {
        let state = match row.state() {
            State::Unknown => "unknown",
            State::PutBack => "put back",
            State::Kept => "kept",
            State::Raised => "raised",
            State::Waits => "WAITS",
            State::Left => "NOT PUT BACK",
        };
        let rpc::Row { volume_id: id, name, generation, version, nodes, missing, .. } = row;
        Self { id, name, state, generation, version, nodes, missing }
    }
}

impl Row {
    fn line(&self) -> String {
        let name = if self.name.is_empty() { &self.id } else { &self.name };
        let mut line = format!("{name}: {}, read on {}", self.state, self.nodes.join(", "));
        if self.version > 0 {
            line += &format!(", version {}.{}", self.generation, self.version);
        }
        if !self.missing.is_empty() {
            line += &format!(", NOT READ on {}", self.missing.join(", "));
        }
        line
    }
}

/// Recovers and reports.
pub async fn run(Arguments { storage, controller_endpoint, output }: Arguments, log: &str) -> Result<(), CliError> {
    let recovered = match Target::of_controller(&storage.dir, controller_endpoint) {
        Some(_) if !storage.pools.is_empty() || storage.node_id.is_some() => {
            let text = "the nodes of a cluster know their pools: leave --pool and --node-id out (also TANDEM_POOLS and \
                        TANDEM_NODE_ID), or --controller-endpoint (TANDEM_CONTROLLER_ENDPOINT) to recover one machine";
            return Err(CliError::Together(text.into()));
        }
        Some(target) => {
            let answer = target.recovery().await?.recover(rpc::RecoverRequest {}).await;
            answer.map_err(refused("cannot recover the catalogue"))?.into_inner().into()
        }
        None => Recovered::from(standalone::recover::run(storage, log).await?),
    };
    print(&recovered, output)
}

fn print(recovered: &Recovered, output: Output) -> Result<(), CliError> {
    let lines: Vec<(&str, String)> = [
        ("Volumes put back", recovered.volumes.to_string()),
        ("Snapshots put back", recovered.snapshots.to_string()),
        ("Groups put back", recovered.groups.to_string()),
        ("Already there", recovered.kept.to_string()),
    ]
    .into_iter()
    .chain(recovered.rows.iter().map(|row| ("Volume", row.line())))
    .chain(recovered.unopened.iter().map(|unopened| ("Not open", unopened.line())))
    .chain(recovered.problems.iter().map(|problem| ("Look at", problem.clone())))
    .collect();
    output.one(recovered, &lines)
}
