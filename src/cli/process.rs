//! The processes of an installation: those that `tandem standalone` starts, and those that are containers in a cluster.

use super::CliError;
use super::role::{self, ClusterArguments, ControllerArguments, NodeArguments};
use crate::csi::{CsiConfig, serve};
use crate::replica::engine::IoChoice;
use crate::replica::{self, ReplicaConfig};
use crate::standalone::{self, EngineArguments, Io, Lock, StorageArguments};
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long a killed predecessor may take to be gone: its memory is large.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// Ends when the process is told to end.
pub(super) type Stop = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Threads of the CSI process: calls wait for the engine and for mkfs most of the time.
const WORKERS: usize = 2;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    Controller(ControllerArguments),
    Node(NodeArguments),
    Replica(ReplicaArguments),
    /// Serve CSI.
    #[command(hide = true)]
    Csi(CsiArguments),
}

/// Carry the I/O of all volumes of this node, and hold its copies: the process to start before `tandem node`.
///
/// In a cluster it needs --controller, --listen, --mirror-listen and --certificates, and runs as root. It may be killed and
/// started again at any time: applications wait meanwhile and see no error. Without --controller it serves this machine
/// alone, which `tandem standalone` does better.

#[derive(Debug, clap::Args)]
pub struct ReplicaArguments {
    #[command(flatten)]
    storage: StorageArguments,
    #[command(flatten)]
    engine: EngineArguments,
    #[command(flatten)]
    cluster: ClusterArguments,
}

#[derive(Debug, clap::Args)]
pub struct CsiArguments {
    /// Directory of the installation.
    #[arg(long, env = "TANDEM_DIR", value_name = "DIR")]
    dir: PathBuf,
    /// Name of this node.
    #[arg(long, env = "TANDEM_NODE_ID", value_name = "NAME")]
    node_id: String,
    /// Socket on which CSI is served.
    #[arg(long, env = "CSI_ENDPOINT", value_name = "unix://PATH")]
    endpoint: String,
    /// How many volumes may be attached at once.
    #[arg(long, env = "TANDEM_MAX_VOLUMES_PER_NODE", default_value_t = 1000, value_name = "N")]
    max_volumes_per_node: u32,
}

/// Runs one of them until it is told to end.
pub fn run(command: Command, log: &str) -> Result<(), CliError> {
    match command {
        Command::Controller(arguments) => {
            crate::logging::start(log, "controller");
            role::run_controller(arguments)
        }
        Command::Node(NodeArguments { command: Some(command), .. }) => super::block_on(super::nodes::run(command)),
        Command::Node(arguments) => {
            crate::logging::start(log, "node");
            role::run_node(arguments)
        }
        Command::Replica(arguments) => run_replica(arguments, log),
        Command::Csi(arguments) => {
            crate::logging::start(log, "csi");
            run_csi(arguments)
        }
    }
}

fn run_replica(arguments: ReplicaArguments, log: &str) -> Result<(), CliError> {
    let ReplicaArguments { mut storage, engine, cluster } = arguments;
    crate::logging::start(log, "replica");
    let cluster = cluster.join(&mut storage)?;
    let StorageArguments { dir, pools, node_id } = storage;
    let EngineArguments { metrics, overcommit, io, spin } = engine;
    let _lock = Lock::take(&dir.join("replica.lock"), PREDECESSOR)?;
    let pools = pools.into_iter().map(|pool| Ok((pool.name.parse()?, pool.path))).collect::<Result<_, _>>();
    let config = ReplicaConfig {
        node_id: node_id.unwrap_or_else(standalone::host_name),
        pools: pools.map_err(CliError::PoolName)?,
        overcommit,
        io: match io {
            Io::Auto => IoChoice::Auto,
            Io::IoUring => IoChoice::Uring,
            Io::Threads => IoChoice::Threads,
        },
        spin: (!spin.is_zero()).then_some(spin),
        metrics,
        executable: standalone::program(),
        dir,
        cluster,
    };
    Ok(replica::run(config)?)
}

fn run_csi(CsiArguments { dir, node_id, endpoint, max_volumes_per_node }: CsiArguments) -> Result<(), CliError> {
    let _lock = Lock::take(&dir.join("csi.lock"), PREDECESSOR)?;
    let config = CsiConfig { control: dir.join("replica.sock"), dir, endpoint, node_id, max_volumes_per_node };
    until_told(|stop| async move { Ok(serve(config, stop).await?) })
}

/// Runs a server until SIGTERM.
pub(super) fn until_told<F>(server: impl FnOnce(Stop) -> F) -> Result<(), CliError>
where
    F: Future<Output = Result<(), CliError>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build();
    runtime.map_err(CliError::Runtime)?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(CliError::Runtime)?;
        let stop = Box::pin(async move {
            terminate.recv().await;
        });
        server(stop).await
    })
}
