//! `tandem volume copies`, `promote`, `demote`, `move` and `resync`: where a volume's copies are, and who is primary.

use super::client::{Target, find_volume, refused};
use super::output::{Output, Row};
use super::volume::progress_style;
use super::{CliError, units};
use crate::rpc::operator::operator_client::OperatorClient;
use crate::rpc::operator::{
    Copy, DemoteRequest, ListCopiesRequest, MoveCopyRequest, PromoteRequest, ResyncCopyRequest,
};
use indicatif::ProgressBar;
use serde::Serialize;
use std::time::Duration;
use tonic::{Code, Status, transport::Channel};

/// How often it is asked whether it is so.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show where the copies of a volume are, and which have every acknowledged write.
    ///
    /// As the controller knows them; `tandem volume show` on a node tells what that node's copy knows of the others.
    Copies(CopiesArguments),
    Promote(PromoteArguments),
    /// Let no copy of a volume be primary: the next one then need not wait for it.
    ///
    /// What was acknowledged is flushed on every copy before. The volume must not be in use; publishing or promoting it
    /// gives it a primary again.
    Demote(CopiesArguments),
    Move(MoveArguments),
    Resync(ResyncArguments),
}

#[derive(Debug, clap::Args)]
pub struct CopiesArguments {
    /// Id or name.
    volume: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// Make the copy on a node primary: requests are then served there without a wait when the volume is used there.
///
/// Only a copy that has every acknowledged write can be primary, whoever asks. A volume that is in use has its primary
/// where it is used; publishing it elsewhere moves the primary by itself.
#[derive(Debug, clap::Args)]
pub struct PromoteArguments {
    /// Id or name.
    pub volume: String,
    /// Name of the node.
    pub node: String,
    #[command(flatten)]
    pub target: Target,
    #[command(flatten)]
    pub output: Output,
}

/// Replace the copy on one node by one on another, while the volume is in use elsewhere.
///
/// The new copy is made and filled first; the old one goes when all others have every acknowledged write, so the volume is
/// never less safe than before. The node of the old copy may be dead. Interrupted, the command only stops to show how far
/// it is: the cluster goes on, and the same command again looks on.
#[derive(Debug, clap::Args)]
pub struct MoveArguments {
    /// Id or name.
    volume: String,
    /// Node whose copy goes.
    #[arg(long, env = "TANDEM_FROM_NODE", value_name = "NODE")]
    from: String,
    /// Node that gets one: with a pool of the same name, and none of the volume's copies.
    #[arg(long, env = "TANDEM_TO_NODE", value_name = "NODE")]
    to: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// Compare the copy on a node with the primary, block for block, and copy what differs.
///
/// For a copy that is not trusted any more: its disk had errors, somebody wrote to it behind Tandem's back, or `tandem verify`
/// found damage. It counts as a copy again when it has every acknowledged write; until then the volume has one copy less. The volume may be in
/// use. Refused for the primary itself, and if no primary has every acknowledged write. Interrupted, the command only stops
/// to show how far it is.
#[derive(Debug, clap::Args)]
pub struct ResyncArguments {
    /// Id or name.
    volume: String,
    /// Node whose copy is made equal to the primary's.
    #[arg(long, env = "TANDEM_NODE", value_name = "NODE")]
    node: String,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// One copy, for people and scripts.
#[derive(Serialize)]
struct Line {
    node: String,
    pool: String,
    id: String,
    up_to_date: bool,
    primary: bool,
    wished: bool,
    leaving: bool,
    copied_bytes: u64,
    equal_bytes: u64,
    left_bytes: u64,
    missed_seconds: u64,
    waits: String,
}

impl From<Copy> for Line {
    fn from(copy: Copy) -> Self {
        Self {
            node: copy.node,
            pool: copy.pool,
            id: copy.copy_id,
            up_to_date: copy.member,
            primary: copy.primary,
            wished: copy.wished,
            leaving: copy.leaving,
            copied_bytes: copy.copied_bytes,
            equal_bytes: copy.equal_bytes,
            left_bytes: copy.left_bytes,
            missed_seconds: copy.missed_seconds,
            waits: copy.waits,
        }
    }
}

impl Row for Line {
    const TITLES: &'static [&'static str] = &["NODE", "POOL", "STATE", "ROLE", "ID"];
    fn cells(&self) -> Vec<String> {
        let mut state = if self.up_to_date { "UpToDate" } else { "Outdated" }.to_owned();
        if !self.up_to_date && self.left_bytes > 0 {
            let [copied, equal, left] = [self.copied_bytes, self.equal_bytes, self.left_bytes].map(units::bytes);
            state = format!("SyncTarget, {copied} copied, {equal} equal already, at most {left} left");
        }
        if self.missed_seconds > 0 {
            state += &format!(", missed for {} s", self.missed_seconds);
        }
        if !self.waits.is_empty() {
            state += &format!(", not made anew elsewhere: {}", self.waits);
        }
        if self.leaving {
            state += ", to be replaced";
        }
        let role = match (self.primary, self.wished, self.up_to_date) {
            (true, _, _) => "Primary",
            (false, true, _) => "shall be primary",
            (false, false, true) => "Secondary",
            (false, false, false) => "Candidate",
        };
        vec![self.node.clone(), self.pool.clone(), state, role.to_owned(), self.id.clone()]
    }
}

/// Does one of them.
pub async fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Copies(arguments) => list(arguments).await,
        Command::Promote(arguments) => promote(arguments).await,
        Command::Demote(arguments) => demote(arguments).await,
        Command::Move(arguments) => replace(arguments).await,
        Command::Resync(arguments) => resync(arguments).await,
    }
}

async fn list(CopiesArguments { volume, target, output }: CopiesArguments) -> Result<(), CliError> {
    let id = find_volume(&target, &volume).await?.volume_id;
    let doing = format!("cannot list the copies of volume {volume}");
    let copies = copies(&mut target.operator().await?, &id).await.map_err(refused(doing))?;
    output.rows(&copies.into_iter().map(Line::from).collect::<Vec<_>>())
}

async fn copies(operator: &mut OperatorClient<Channel>, id: &str) -> Result<Vec<Copy>, Status> {
    Ok(operator.list_copies(ListCopiesRequest { volume_id: id.to_owned() }).await?.into_inner().copies)
}

/// Asks until it is so: ABORTED means that it is wished and not yet true, or that another call is under way.
pub(super) async fn until_done<T>(
    doing: String,
    mut ask: impl AsyncFnMut() -> Result<T, Status>,
) -> Result<T, CliError> {
    loop {
        match ask().await {
            Err(status) if status.code() == Code::Aborted => {
                eprintln!("{}", status.message());
                tokio::time::sleep(LOOK).await;
            }
            answer => return answer.map_err(refused(doing)),
        }
    }
}

/// Until it is primary.
pub(super) async fn promote(
    PromoteArguments { volume, node, target, output }: PromoteArguments,
) -> Result<(), CliError> {
    let id = find_volume(&target, &volume).await?.volume_id;
    let mut operator = target.operator().await?;
    let request = PromoteRequest { volume_id: id.clone(), node: node.clone() };
    let doing = format!("cannot promote the copy of volume {volume} on {node}");
    until_done(doing, async || operator.promote(request.clone()).await).await?;
    output.done(&serde_json::json!({ "id": id, "primary": node }), &format!("volume {volume}: {node} is primary"))
}

async fn demote(CopiesArguments { volume, target, output }: CopiesArguments) -> Result<(), CliError> {
    let id = find_volume(&target, &volume).await?.volume_id;
    let mut operator = target.operator().await?;
    let request = DemoteRequest { volume_id: id.clone() };
    let doing = format!("cannot demote the primary of volume {volume}");
    until_done(doing, async || operator.demote(request.clone()).await).await?;
    output.done(&serde_json::json!({ "id": id, "primary": null }), &format!("volume {volume}: no copy is primary"))
}

async fn replace(MoveArguments { volume, from, to, target, output }: MoveArguments) -> Result<(), CliError> {
    let id = find_volume(&target, &volume).await?.volume_id;
    let mut operator = target.operator().await?;
    let doing = format!("cannot move the copy of volume {volume} from {from} to {to}");
    let request = MoveCopyRequest { volume_id: id.clone(), from_node: from.clone(), to_node: to.clone() };
    until_done(doing.clone(), async || operator.move_copy(request.clone()).await).await?;
    let has_none = |copies: &[Copy], node: &str| copies.iter().all(|copy| copy.node != node);
    // Without the new copy it was taken back.
    let over = |copies: &[Copy]| has_none(copies, &from) || has_none(copies, &to);
    watch(&mut operator, &id, &to, &doing, over).await?;
    if has_none(&copies(&mut operator, &id).await.map_err(refused(doing.as_str()))?, &to) {
        let answer = format!("it was taken back, or the new copy is missed: see `tandem volume copies {volume}`");
        return Err(CliError::Refused { doing, answer });
    }
    let sentence = format!("volume {volume}: the copy on {from} is replaced by the one on {to}");
    output.done(&serde_json::json!({ "id": id, "from": from, "to": to }), &sentence)
}

/// Shows how far the copy on a node is, until it is so.
async fn watch(
    operator: &mut OperatorClient<Channel>,
    id: &str,
    node: &str,
    doing: &str,
    done: impl Fn(&[Copy]) -> bool,
) -> Result<(), CliError> {
    let bar = ProgressBar::new(0).with_style(progress_style()).with_message(format!("the copy on {node}"));
    loop {
        let copies = copies(operator, id).await.map_err(refused(doing))?;
        if done(&copies) {
            break;
        }
        // Those of one that is filled are not told any more.
        for filled in copies.iter().filter(|copy| copy.node == node && copy.left_bytes > 0) {
            let done = filled.copied_bytes + filled.equal_bytes;
            bar.set_length(done + filled.left_bytes);
            bar.set_position(done);
        }
        tokio::time::sleep(LOOK).await;
    }
    bar.finish_and_clear();
    Ok(())
}

async fn resync(ResyncArguments { volume, node, target, output }: ResyncArguments) -> Result<(), CliError> {
    let id = find_volume(&target, &volume).await?.volume_id;
    let mut operator = target.operator().await?;
    let doing = format!("cannot resync the copy of volume {volume} on {node}");
    let request = ResyncCopyRequest { volume_id: id.clone(), node: node.clone() };
    until_done(doing.clone(), async || operator.resync_copy(request.clone()).await).await?;
    // A copy that is not there any more was replaced meanwhile.
    let over = |copies: &[Copy]| copies.iter().all(|copy| copy.node != node || copy.member);
    watch(&mut operator, &id, &node, &doing, over).await?;
    let there = copies(&mut operator, &id).await.map_err(refused(doing.as_str()))?;
    if !there.iter().any(|copy| copy.node == node) {
        let answer = format!("it is replaced by one on another node: see `tandem volume copies {volume}`");
        return Err(CliError::Refused { doing, answer });
    }
    let sentence = format!("volume {volume}: the copy on {node} is equal to the primary's");
    output.done(&serde_json::json!({ "id": id, "node": node, "up_to_date": true }), &sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_told_in_the_words_of_the_field() {
        let state = |change: fn(&mut Copy)| {
            let mut copy = Copy { node: "n1".into(), ..Copy::default() };
            change(&mut copy);
            Line::from(copy).cells()[2..4].join("; ")
        };
        assert_eq!(state(|copy| (copy.member, copy.primary) = (true, true)), "UpToDate; Primary");
        assert_eq!(state(|copy| (copy.member, copy.leaving) = (true, true)), "UpToDate, to be replaced; Secondary");
        assert_eq!(state(|_| {}), "Outdated; Candidate");
        assert_eq!(state(|copy| (copy.member, copy.wished) = (true, true)), "UpToDate; shall be primary");
        let lost = state(|copy| (copy.missed_seconds, copy.waits) = (60, "no room".into()));
        assert_eq!(lost, "Outdated, missed for 60 s, not made anew elsewhere: no room; Candidate");
        let copied = state(|copy| (copy.copied_bytes, copy.left_bytes) = (4096, 1 << 20));
        assert_eq!(copied, "SyncTarget, 4 KiB copied, 0 B equal already, at most 1 MiB left; Candidate");
    }
}
