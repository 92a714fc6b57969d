//! `tandem node`: the nodes of a cluster, and those that are gone for good.

use super::CliError;
use super::client::{Target, refused};
use super::output::{Output, Row};
use super::promote::typed;
use crate::rpc::operator::{ListNodesRequest, Node, RemoveNodeRequest};
use serde::Serialize;

/// Nodes of a cluster, as its controller knows them.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List all nodes: which answer, and what is on them.
    #[command(visible_alias = "ls")]
    List(ListArguments),
    Remove(RemoveArguments),
}

#[derive(Debug, clap::Args)]
pub struct ListArguments {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// Say that a node is gone for good: nobody waits for it any more.
///
/// Volumes and snapshots that are on it can be deleted then, and new ones are placed without it. Nothing is deleted by the
/// command: copies there count as before, and are made anew elsewhere like any that is missed. If the node comes back it is
/// one again, and what was deleted meanwhile goes from its disks. Refused while it answers, and, without --force, if nobody else has every acknowledged
/// write of some volume.
#[derive(Debug, clap::Args)]
pub struct RemoveArguments {
    /// Name of the node.
    node: String,
    /// Also if volumes are lost without it. They are named, and asked for.
    #[arg(long, env = "TANDEM_FORCE")]
    force: bool,
    /// Do not ask.
    #[arg(long, env = "TANDEM_YES", requires = "force")]
    yes: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// One node, for people and scripts.
#[derive(Serialize)]
struct Line {
    name: String,
    state: &'static str,
    encrypted: bool,
    copies: u64,
    only_here: Vec<String>,
}

impl From<Node> for Line {
    fn from(node: Node) -> Self {
        let state = match (node.removed, node.answers) {
            (true, _) => "removed",
            (false, true) => "answers",
            (false, false) => "SILENT",
        };
        let Node { name, encrypted, copies, only_here, .. } = node;
        Self { name, state, encrypted, copies, only_here }
    }
}

impl Row for Line {
    const TITLES: &'static [&'static str] = &["NAME", "STATE", "ENCRYPTION", "COPIES", "ONLY HERE"];
    fn cells(&self) -> Vec<String> {
        let encryption = if self.encrypted { "on" } else { "OFF" };
        let only = self.only_here.join(", ");
        vec![self.name.clone(), self.state.into(), encryption.into(), self.copies.to_string(), only]
    }
}

/// Does one of them.
pub async fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::List(ListArguments { target, output }) => {
            output.rows(&nodes(&target).await?.into_iter().map(Line::from).collect::<Vec<_>>())
        }
        Command::Remove(arguments) => remove(arguments).await,
    }
}

async fn nodes(target: &Target) -> Result<Vec<Node>, CliError> {
    let answer = target.operator().await?.list_nodes(ListNodesRequest {}).await;
    Ok(answer.map_err(refused("cannot list nodes"))?.into_inner().nodes)
}

async fn remove(RemoveArguments { node, force, yes, target, output }: RemoveArguments) -> Result<(), CliError> {
    let only = nodes(&target).await?.into_iter().find(|known| known.name == node).map(|known| known.only_here);
    let only = only.unwrap_or_default();
    if force && !yes && !only.is_empty() {
        let mut text = format!("Nobody but node {node} has every acknowledged write of these volumes:\n");
        only.iter().for_each(|volume| text += &format!("  - {volume}\n"));
        typed(&text, "the node", &node, "nothing was removed")?;
    }
    let request = RemoveNodeRequest { name: node.clone(), force };
    let removed = target.operator().await?.remove_node(request).await;
    removed.map_err(refused(format!("cannot remove node {node}")))?;
    let sentence = format!("nobody waits for node {node} any more");
    output.done(&serde_json::json!({ "node": node, "lost_without_it": only }), &sentence)
}
