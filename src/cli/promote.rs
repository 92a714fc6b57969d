//! `tandem promote`: as `tandem volume promote`; with `--force` it gives up the copies of a volume that are not there, after a
//! person has agreed.

use super::CliError;
use super::client::{Target, refused};
use super::copies::{self, PromoteArguments};
use super::output::Output;
use crate::rpc::recovery::{ForceRequest, PlanForceRequest, PlanForceResponse};
use std::io::{BufRead, IsTerminal, Write};

/// Make the copy of a mirrored volume on a node primary; with --force, although it may lack writes.
///
/// With --force it is the only one that counts from then on, because the copies with newer writes are lost. What is lost is
/// said before, and asked for. All other copies of the volume are thrown away and made anew from this one as soon as their
/// nodes are back. While a copy with every acknowledged write is there, nothing has to be forced, and nothing is.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Id or name.
    volume: String,
    /// The node whose copy it is.
    node: String,
    /// Give up the other copies.
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

/// Asks and forces.
pub async fn run(Arguments { volume, node, force, yes, target, output }: Arguments) -> Result<(), CliError> {
    if !force {
        return copies::promote(PromoteArguments { volume, node, target, output }).await;
    }
    let doing = format!("cannot promote the copy of volume {volume} on {node}");
    let mut client = target.recovery().await?;
    let request = PlanForceRequest { volume: volume.clone(), node: node.clone() };
    let plan = client.plan_force(request).await.map_err(refused(doing.as_str()))?.into_inner();
    if !yes {
        agree(&plan, &node)?;
    }
    let PlanForceResponse { volume_id, name, generation, version, losses } = plan;
    let request = ForceRequest { volume: volume_id.clone(), node: node.clone(), generation, version };
    let written = client.force(request).await.map_err(refused(doing))?.into_inner();
    let sentence = format!(
        "the copy of volume {name} on {node} is its only member (version {}.{}): publish the volume there",
        written.generation, written.version
    );
    let done = serde_json::json!({
        "id": volume_id, "name": name, "node": node, "losses": losses,
        "generation": written.generation, "version": written.version,
    });
    output.done(&done, &sentence)
}

/// On a terminal, by the name of the volume.
fn agree(plan: &PlanForceResponse, node: &str) -> Result<(), CliError> {
    let PlanForceResponse { name, generation, version, losses, .. } = plan;
    let mut text =
        format!("Volume {name}, newest known version {generation}.{version}. With the copy on {node} alone:\n");
    losses.iter().for_each(|loss| text += &format!("  - {loss}\n"));
    typed(&text, "the volume", name, "nothing was forced")
}

/// Tells a person what follows; who agrees types the name of what it is about.
pub fn typed(text: &str, what: &str, name: &str, nothing: &str) -> Result<(), CliError> {
    let mut terminal = std::io::stderr().lock();
    terminal.write_all(text.as_bytes()).map_err(CliError::Output)?;
    if !std::io::stdin().is_terminal() {
        let text = format!("{nothing}: nobody can be asked here; with --yes nobody is asked");
        return Err(CliError::Together(text));
    }
    write!(terminal, "Type the name of {what} to go on: ").and_then(|()| terminal.flush()).map_err(CliError::Output)?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(CliError::Output)?;
    if answer.trim() == name { Ok(()) } else { Err(CliError::Together(nothing.into())) }
}
