//! `tandem verify`: reads a volume back and compares what has checksums, or the copies of a mirrored volume with each other.

use super::client::{Target, find_volume, refused};
use super::output::Output;
use super::volume::progress_style;
use super::{CliError, units};
use crate::rpc::control;
use crate::rpc::operator::{CompareCopiesRequest, CompareCopiesResponse};
use indicatif::ProgressBar;
use serde::Serialize;

/// Read a volume back and check it: structure of the map, checksums of every sealed layer.
///
/// The live layer has no checksums at rest: a snapshot seals it. The volume may be in use. Exit code 1 if anything is
/// damaged.
///
/// With --copies the copies of a mirrored volume are compared instead, all of what is in them, by digests that their nodes
/// make of a snapshot; it is deleted afterwards. Exit code 1 if they differ.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Id or name.
    volume: String,
    /// Compare the copies that are up to date with each other.
    #[arg(long, env = "TANDEM_COPIES")]
    copies: bool,
    /// The most that each node reads in a second, at least 1Mi.
    #[arg(long, env = "TANDEM_RATE", default_value = "64Mi", value_parser = units::parse_bytes, value_name = "BYTES")]
    #[arg(requires = "copies")]
    rate: u64,
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
pub async fn run(arguments: Arguments) -> Result<(), CliError> {
    if arguments.copies { compare(arguments).await } else { check(arguments).await }
}

async fn check(Arguments { volume, target, output, .. }: Arguments) -> Result<(), CliError> {
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

/// What a comparison has found.
#[derive(Serialize)]
struct Compared {
    volume_id: String,
    compared_bytes: u64,
    nodes: Vec<String>,
    different_bytes: u64,
    differences: Vec<Range>,
}

#[derive(Serialize)]
struct Range {
    offset: u64,
    length: u64,
    /// Nodes with equal copies are together.
    groups: Vec<String>,
}

async fn compare(Arguments { volume, target, output, rate, .. }: Arguments) -> Result<(), CliError> {
    let volume_id = find_volume(&target, &volume).await?.volume_id;
    let doing = format!("cannot compare the copies of volume {volume}");
    let request = CompareCopiesRequest { volume_id: volume_id.clone(), bytes_per_second: rate };
    let answer = target.operator().await?.compare_copies(request).await.map_err(refused(doing.as_str()))?;
    let (mut progress, mut last) = (answer.into_inner(), CompareCopiesResponse::default());
    let bar =
        ProgressBar::new(0).with_style(progress_style()).with_message(format!("comparing the copies of {volume}"));
    while let Some(step) = progress.message().await.map_err(refused(doing.as_str()))? {
        bar.set_length(step.total_bytes);
        bar.set_position(step.compared_bytes);
        last = step;
    }
    bar.finish_and_clear();
    if last.total_bytes == 0 || last.compared_bytes != last.total_bytes {
        let (compared, total) = (units::bytes(last.compared_bytes), units::bytes(last.total_bytes));
        let answer =
            format!("it ended after {compared} of {total}: nothing is known of the rest; see the controller's log");
        return Err(CliError::Refused { doing, answer });
    }
    let CompareCopiesResponse { compared_bytes, nodes, differences, different_bytes, .. } = last;
    let range = |found: crate::rpc::operator::Difference| Range {
        offset: found.offset,
        length: found.length,
        groups: found.groups,
    };
    let differences = differences.into_iter().map(range).collect();
    let compared = Compared { volume_id, compared_bytes, nodes, different_bytes, differences };
    output.one(&compared, &compared.lines(&volume))?;
    if different_bytes > 0 { Err(CliError::Differ(units::bytes(different_bytes))) } else { Ok(()) }
}

impl Compared {
    fn lines(&self, volume: &str) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("Volume", volume.to_owned()),
            ("Compared", units::bytes(self.compared_bytes)),
            ("Copies on", self.nodes.join(", ")),
            ("Different", units::bytes(self.different_bytes)),
        ];
        lines.extend(self.differences.iter().map(|range| {
            let groups: Vec<_> = range.groups.iter().map(|group| format!("({group})")).collect();
            let end = range.offset + range.length;
            ("Differs", format!("bytes {} to {end}: {}", range.offset, groups.join(" against ")))
        }));
        lines
    }
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
