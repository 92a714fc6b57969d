//! `tandem recover`: says what was found on the disks and put back.

use super::CliError;
use super::output::Output;
use crate::standalone::{self, StorageArguments};
use serde::Serialize;

/// Rebuild a lost or damaged catalogue from the disks. The server must not run.
///
/// Move a damaged DIR/catalog.redb away first. Every volume and snapshot in the pools comes back under its own id; what
/// the catalogue still has is not changed. Name every pool that the server was started with.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    storage: StorageArguments,
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
}

/// Recovers and reports.
pub async fn run(Arguments { storage, output }: Arguments, log: &str) -> Result<(), CliError> {
    let report = standalone::recover::run(storage, log).await?;
    let lines: Vec<(&str, String)> = [
        ("Volumes put back", report.volumes.to_string()),
        ("Snapshots put back", report.snapshots.to_string()),
        ("Groups put back", report.groups.to_string()),
        ("Already there", report.kept.to_string()),
    ]
    .into_iter()
    .chain(report.problems.iter().map(|problem| ("Look at", problem.clone())))
    .collect();
    let recovered = Recovered {
        volumes: report.volumes,
        snapshots: report.snapshots,
        groups: report.groups,
        kept: report.kept,
        problems: report.problems.clone(),
    };
    output.one(&recovered, &lines)
}
