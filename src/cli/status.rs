//! `tandem status`: is it well, and if not, what is wrong.

use super::CliError;
use super::client::{Target, name_of, refused, volumes};
use super::output::Output;
use super::pool::{Pool, pools};
use super::volume::{Health, health};
use crate::rpc::{control, csi};
use serde::Serialize;

/// Show whether the installation is well: processes, pools, and every volume that is not.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Status {
    node: String,
    version: String,
    csi: String,
    replica_pid: u64,
    io: String,
    device: String,
    holder_connected: bool,
    volumes: usize,
    attached_volumes: u64,
    recovered_requests: u64,
    encryption: String,
    pools: Vec<Pool>,
    problems: Vec<String>,
}

/// Asks and prints.
pub async fn run(Arguments { target, output }: Arguments) -> Result<(), CliError> {
    let replica = target.replica().await?.get_status(control::GetStatusRequest {}).await;
    let replica = replica.map_err(refused("cannot read the status"))?.into_inner();
    let volumes = volumes(&target).await?;
    let mut problems: Vec<String> = volumes
        .iter()
        .flat_map(|v| {
            let wrong = health(v).into_iter().filter(Health::is_problem);
            wrong.map(|h| format!("volume {} ({}): {h}", name_of(&v.descriptor), v.volume_id))
        })
        .collect();
    let pools = pools(&target).await?;
    problems.extend(pools.iter().filter_map(Pool::problem));
    if !replica.holder_connected {
        problems.push("the holder is not connected: if the engine dies now, devices are lost; restart tandem".into());
    }
    let csi = csi_state(&target).await;
    let status = Status {
        node: replica.node_id,
        version: replica.version,
        csi,
        replica_pid: replica.pid,
        io: replica.io_engine,
        device: replica.device,
        holder_connected: replica.holder_connected,
        volumes: volumes.len(),
        attached_volumes: replica.attached_volumes,
        recovered_requests: replica.recovered_requests,
        encryption: replica.encryption,
        pools,
        problems,
    };
    output.one(&status, &lines(&status))
}

/// One word on the CSI process; its absence is a line of the status, not an error.
async fn csi_state(target: &Target) -> String {
    let Ok(mut identity) = target.identity().await else { return "does not answer".into() };
    match identity.probe(csi::ProbeRequest {}).await {
        Ok(answer) if answer.get_ref().ready == Some(false) => "starting".into(),
        Ok(_) => "ready".into(),
        Err(status) => status.message().to_string(),
    }
}

fn lines(status: &Status) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("Node", status.node.clone()),
        ("Version", status.version.clone()),
        ("CSI", status.csi.clone()),
        ("Engine", format!("pid {}, {}, {}", status.replica_pid, status.device, status.io)),
        ("Holder", if status.holder_connected { "connected" } else { "NOT CONNECTED" }.into()),
        ("Volumes", format!("{}, {} attached", status.volumes, status.attached_volumes)),
        ("Recovered", format!("{} requests since the engine started", status.recovered_requests)),
    ];
    let encryption = match status.encryption.as_str() {
        "" => "none needed: there are no other nodes",
        "off" => "OFF: what the copies of a volume send each other is not encrypted",
        _ => "on",
    };
    lines.push(("Encryption", encryption.into()));
    lines.extend(status.pools.iter().map(|pool| ("Pool", pool.summary())));
    if status.problems.is_empty() {
        lines.push(("Problems", "none".into()));
    }
    lines.extend(status.problems.iter().map(|p| ("Problem", p.clone())));
    lines
}
