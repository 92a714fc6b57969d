//! `tandem verify`: reads a volume back and compares what has checksums.

use super::client::{Target, find_volume, refused};
use super::output::Output;
use super::volume::progress_style;
use super::{CliError, units};
use crate::rpc::control;
use indicatif::ProgressBar;
use serde::Serialize;

/// Read a volume back and check it: structure of the map, checksums of every sealed layer.
///
/// The live layer has no checksums at rest: a snapshot seals it. The volume may be in use. Exit code 1 if anything is
/// damaged.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Id or name.
    volume: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Default, Serialize)]
struct Report {
    volume_id: String,
    checked_bytes: u64,
    total_bytes: u64,
    unchecked_bytes: u64,
    live_bytes: u64,
    problem_count: u64,
    problems: Vec<String>,
}

/// Verifies and reports.
pub async fn run(Arguments { volume, target, output }: Arguments) -> Result<(), CliError> {
    let control::Volume { volume_id, allocated_bytes: live_bytes, .. } = find_volume(&target, &volume).await?;
    let doing = format!("cannot verify volume {volume}");
    let mut report = Report { volume_id: volume_id.clone(), live_bytes, ..Report::default() };
    let request = control::VerifyVolumeRequest { volume_id };
    let answer = target.replica().await?.verify_volume(request).await.map_err(refused(doing.as_str()))?;
    let mut progress = answer.into_inner();
    let bar = ProgressBar::new(0).with_style(progress_style()).with_message(format!("verifying {volume}"));
    while let Some(step) = progress.message().await.map_err(refused(doing.as_str()))? {
        bar.set_length(step.total_bytes);
        bar.set_position(step.checked_bytes);
        report.checked_bytes = step.checked_bytes;
        report.total_bytes = step.total_bytes;
        report.unchecked_bytes = step.unchecked_bytes;
        report.problem_count = report.problem_count.max(step.problem_count);
        report.problems.extend(step.problems);
    }
    bar.finish_and_clear();
    output.one(&report, &lines(&volume, &report))?;
    if report.problem_count > 0 { Err(CliError::Damaged(report.problem_count)) } else { Ok(()) }
}

fn lines(volume: &str, report: &Report) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("Volume", volume.to_string()),
        ("Checked", units::bytes(report.checked_bytes)),
        (
            "Without checksums",
            format!("{} (the live layer: a snapshot seals it)", units::bytes(report.unchecked_bytes)),
        ),
        ("Problems", report.problem_count.to_string()),
    ];
    lines.extend(report.problems.iter().map(|p| ("Problem", p.clone())));
    lines
}
