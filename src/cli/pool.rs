//! `tandem pool`: the directories and disks that hold volumes.

use super::client::{Target, refused};
use super::output::{Output, Row};
use super::{CliError, units};
use crate::rpc::control;
use serde::Serialize;
use std::path::PathBuf;

/// Pools: the directories or disks that hold volumes.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List all pools: what they have, have promised, and use.
    #[command(visible_alias = "ls")]
    List(ListArguments),
    /// Add a pool: a directory on ext4, xfs or btrfs, or a whole disk, which is formatted with xfs.
    Add(AddArguments),
}

#[derive(Debug, clap::Args)]
pub struct ListArguments {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct AddArguments {
    /// Name of the pool, as in the StorageClass parameter `pool`.
    name: String,
    /// Directory or disk.
    path: PathBuf,
    /// Format a disk although it carries a filesystem or a partition table: WHAT IS ON IT IS LOST. Also begins an empty pool
    /// where one of this name was and is gone: bring its disk or mount back instead if there is any hope for what it held.
    #[arg(long, env = "TANDEM_FORCE")]
    force: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Output,
}

/// A pool, for people and scripts.
#[derive(Serialize)]
pub struct Pool {
    name: String,
    path: String,
    id: String,
    filesystem: String,
    capacity_bytes: u64,
    promised_bytes: u64,
    used_bytes: u64,
    free_bytes: u64,
    largest_volume_bytes: u64,
    overcommit: f64,
    problem: String,
}

impl From<control::Pool> for Pool {
    fn from(p: control::Pool) -> Self {
        let control::Pool { name, path, id, capacity_bytes, promised_bytes, used_bytes, free_bytes, .. } = p;
        let control::Pool { largest_volume_bytes, overcommit, filesystem, problem, .. } = p;
        Self {
            name,
            path,
            id,
            filesystem,
            capacity_bytes,
            promised_bytes,
            used_bytes,
            free_bytes,
            largest_volume_bytes,
            overcommit,
            problem,
        }
    }
}

impl Row for Pool {
    const TITLES: &'static [&'static str] =
        &["NAME", "PATH", "FILESYSTEM", "CAPACITY", "PROMISED", "USED", "FREE", "LARGEST VOLUME", "PROBLEM"];
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.path.clone(),
            self.filesystem.clone(),
            units::bytes(self.capacity_bytes),
            units::bytes(self.promised_bytes),
            units::bytes(self.used_bytes),
            units::bytes(self.free_bytes),
            units::bytes(self.largest_volume_bytes),
            self.problem.clone(),
        ]
    }
}

/// Every pool of the replica.
pub async fn pools(target: &Target) -> Result<Vec<Pool>, CliError> {
    let answer = target.replica().await?.list_pools(control::ListPoolsRequest {}).await;
    let pools = answer.map_err(refused("cannot list pools"))?.into_inner().pools;
    Ok(pools.into_iter().map(Pool::from).collect())
}

/// Does one of them.
pub async fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::List(ListArguments { target, output }) => output.rows(&pools(&target).await?),
        Command::Add(AddArguments { name, path, force, target, output }) => {
            let path = std::path::absolute(&path).unwrap_or(path).display().to_string();
            let request = control::AddPoolRequest { name: name.clone(), path, force };
            let answer = target.replica().await?.add_pool(request).await;
            let pool =
                answer.map_err(refused(format!("cannot add pool {name}")))?.into_inner().pool.unwrap_or_default();
            let sentence = format!("pool {name} has {} on {}", units::bytes(pool.capacity_bytes), pool.path);
            output.done(&Pool::from(pool), &sentence)
        }
    }
}

impl Pool {
    /// One line for `tandem status`.
    pub fn summary(&self) -> String {
        let [capacity, promised, used] = [self.capacity_bytes, self.promised_bytes, self.used_bytes].map(units::bytes);
        format!("{}: {promised} of {capacity} promised, {used} used, {} ({})", self.name, self.path, self.filesystem)
    }
    /// What is wrong with it.
    pub fn problem(&self) -> Option<String> {
        (!self.problem.is_empty()).then(|| format!("pool {}: {}", self.name, self.problem))
    }
}
