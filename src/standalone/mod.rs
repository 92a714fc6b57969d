//! `tandem standalone`: the parent of a CSI process and an engine process on one machine.
//!
//! Invariants: one server per directory (a lock that dies with the process). Children die with the parent and are
//! started again when they die alone; only the holder outlives everything, so that a kill -9 here and the same command
//! again let every device go on.

mod checks;
mod child;
mod lock;
pub mod recover;
mod shutdown;

pub use checks::{CheckError, host_name};
pub(crate) use checks::{prepare_dir, prepare_storage, socket};
pub use child::program;
pub use lock::{Lock, LockError};

use crate::cli::units;
use crate::rpc::csi::{ProbeRequest, identity_client::IdentityClient};
use child::{Child, ChildError};
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Serve volumes from this machine's disks: a CSI socket, an engine, and nothing else to install.
///
/// It makes what it needs below DIR: the CSI socket DIR/csi.sock, the catalogue, and the pool DIR/pool. It may be
/// killed and started again at any time: applications on its volumes wait meanwhile and see no error.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for the help of the command")]
    pub storage: StorageArguments,
    /// Socket on which CSI is served. [default: unix://DIR/csi.sock]
    #[arg(long, env = "CSI_ENDPOINT", value_name = "unix://PATH")]
    pub endpoint: Option<String>,
    /// How many volumes may be attached at once.
    #[arg(long, env = "TANDEM_MAX_VOLUMES_PER_NODE", default_value_t = 1000, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_volumes_per_node: u32,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for the help of the command")]
    pub engine: EngineArguments,
}

/// Where everything is.
#[derive(Clone, Debug, clap::Args)]
pub struct StorageArguments {
    /// Directory of this installation, on a local filesystem.
    #[arg(long, env = "TANDEM_DIR", default_value = "/var/lib/tandem", value_name = "DIR")]
    pub dir: PathBuf,
    /// A pool: a name, and a directory on ext4, xfs or btrfs, or a disk; may be repeated. [default: default=DIR/pool]
    #[arg(long = "pool", env = "TANDEM_POOLS", value_delimiter = ',', value_name = "NAME=PATH")]
    pub pools: Vec<PoolArgument>,
    /// Name of this node in CSI answers. [default: the host name]
    #[arg(long, env = "TANDEM_NODE_ID", value_name = "NAME")]
    pub node_id: Option<String>,
}

/// What is handed on to the engine process.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineArguments {
    /// Serve Prometheus metrics on this address, http://ADDRESS/metrics.
    #[arg(long, env = "TANDEM_METRICS", value_name = "127.0.0.1:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Bytes that a pool may promise per byte that it has. Above 1.0 a full pool makes writes wait.
    #[arg(long, env = "TANDEM_OVERCOMMIT", default_value_t = 1.0, value_parser = overcommit, value_name = "X")]
    pub overcommit: f64,
    /// How the engine reaches the disk. `auto` takes io_uring where the kernel has it.
    #[arg(long, env = "TANDEM_IO", value_enum, default_value_t, value_name = "HOW")]
    pub io: Io,
    /// Poll up to this long for the next event before sleeping, while events come one by one and that fast; 0: never.
    ///
    /// 200us takes some 25 us off a request at queue depth one, and CPU from applications where cores are few. An idle engine
    /// sleeps at once.
    #[arg(long, env = "TANDEM_SPIN", value_parser = units::parse_duration, default_value = "0", value_name = "DURATION")]
    pub spin: Duration,
}

impl Default for EngineArguments {
    fn default() -> Self {
        Self { metrics: None, overcommit: 1.0, io: Io::Auto, spin: Duration::ZERO }
    }
}

/// How the engine reaches the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Io {
    /// io_uring where the kernel has it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    #[value(name = "io_uring")]
    IoUring,
    /// A small pool of threads.
    Threads,
}

/// A pool as it is named on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolArgument {
    /// Name, as in the StorageClass parameter.
    pub name: String,
    /// Directory.
    pub path: PathBuf,
}

impl FromStr for PoolArgument {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.into(), path: std::path::absolute(path).map_err(|e| e.to_string())? })
            }
            _ => Err(format!("`{text}` is no pool: write NAME=PATH")),
        }
    }
}

impl fmt::Display for PoolArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.path.display())
    }
}

fn overcommit(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.1..=100.0).contains(&ratio) => Ok(ratio),
        _ => Err(format!("`{text}` is no overcommit ratio: write a number from 0.1 to 100")),
    }
}

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    /// The machine lacks something.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// Another server has the directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A process could not be started, or ended by itself before the server was ever ready.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The catalogue cannot be opened.
    #[error(transparent)]
    Catalog(#[from] crate::catalog::OpenError),
    /// The engine did not say what is on the disks.
    #[error("cannot rebuild the catalogue: {0}")]
    Recover(String),
    /// The signals cannot be had.
    #[error("cannot wait for signals: {0}")]
    Signal(std::io::Error),
}

/// How often a server that is starting is asked whether it is ready.
const PROBE_EVERY: Duration = Duration::from_millis(50);

/// Serves until a signal says to end.
pub async fn run(arguments: Arguments, log: &str) -> Result<(), StandaloneError> {
    let plan = checks::prepare(arguments)?;
    let _lock = Lock::take(&plan.storage.dir.join("tandem.lock"), lock::DYING_SERVER)?;
    checks::write_pid(&plan.storage.dir)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(StandaloneError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StandaloneError::Signal)?;

    let mut replica = Child::start("replica", plan.storage.replica_arguments(&plan.engine, log))?;
    let mut csi = Child::start("csi", plan.csi_arguments(log))?;
    let ready = tokio::select! {
        () = until_ready(&plan.socket) => true,
        error = replica.died_early() => return Err(error.into()),
        error = csi.died_early() => return Err(error.into()),
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
    };
    if ready {
        println!("tandem is ready: CSI on unix://{}, pid {}", plan.socket.display(), std::process::id());
        tokio::select! {
            () = replica.keep_alive() => {}
            () = csi.keep_alive() => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    shutdown::run(&plan.storage.dir, replica, csi).await;
    checks::remove_pid(&plan.storage.dir);
    Ok(())
}

/// Waits until the CSI process says that it and the engine are ready.
pub(crate) async fn until_ready(socket: &Path) {
    loop {
        if let Ok(channel) = crate::uds::connect(socket).await
            && let Ok(answer) = IdentityClient::new(channel).probe(ProbeRequest {}).await
            && answer.get_ref().ready != Some(false)
        {
            return;
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
}

/// What was asked for, checked and with its defaults.
pub struct Plan {
    storage: Storage,
    socket: PathBuf,
    max_volumes_per_node: u32,
    engine: EngineArguments,
}

/// Where everything is, made and with its defaults.
pub(crate) struct Storage {
    /// The installation's directory.
    pub dir: PathBuf,
    /// At least one.
    pub pools: Vec<PoolArgument>,
    /// Name of this node.
    pub node_id: String,
}

impl Storage {
    fn replica_arguments(&self, engine: &EngineArguments, log: &str) -> Vec<OsString> {
        let EngineArguments { metrics, overcommit, io, spin } = engine;
        let io = clap::ValueEnum::to_possible_value(io).map_or_else(String::new, |v| v.get_name().to_string());
        let mut arguments = self.common("replica", log);
        arguments.extend(self.pools.iter().flat_map(|pool| ["--pool".into(), pool.to_string().into()]));
        arguments.extend(metrics.iter().flat_map(|address| ["--metrics".into(), address.to_string().into()]));
        arguments.extend(["--overcommit".into(), overcommit.to_string().into(), "--io".into(), io.into()]);
        arguments.extend(["--spin".into(), format!("{}us", spin.as_micros()).into()]);
        arguments
    }
    fn common(&self, role: &str, log: &str) -> Vec<OsString> {
        let dir = self.dir.clone().into_os_string();
        let node_id = OsString::from(&self.node_id);
        vec![role.into(), "--dir".into(), dir, "--node-id".into(), node_id, "--log".into(), log.into()]
    }
}

impl Plan {
    fn csi_arguments(&self, log: &str) -> Vec<OsString> {
        let mut arguments = self.storage.common("csi", log);
        arguments.extend(["--endpoint".into(), format!("unix://{}", self.socket.display()).into()]);
        arguments.extend(["--max-volumes-per-node".into(), self.max_volumes_per_node.to_string().into()]);
        arguments
    }
}
