//! The processes of a cluster that a person or a manifest starts: `tandem controller`, `tandem node`, and what
//! `tandem replica` takes besides in a cluster.
//!
//! Invariant: flags that do not go together, or do not fit the certificate, are refused in one sentence before anything runs.

use super::CliError;
use super::process::{Stop, until_told};
use crate::csi::control::Control;
use crate::csi::{ControllerConfig, CsiConfig, serve_controller, serve_node};
use crate::replica::cluster::ClusterConfig;
use crate::rpc::control::GetStatusRequest;
use crate::standalone::{self, Lock, StorageArguments};
use crate::tls::{Credentials, Role};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a killed predecessor may take to be gone.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// Whether data between replicas are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Encryption {
    /// TLS.
    #[default]
    On,
    /// In the clear: for links that nobody else can reach.
    Off,
}

/// Decide for a whole cluster: serve CSI's controller services, and the catalogue for the nodes.
///
/// Make certificates first (`tandem certificates --help`), then start this on one machine, and on each machine with disks
/// `tandem replica` and `tandem node`. While it is away volumes that are in use go on; nothing new is made. The catalogue
/// DIR/catalog.redb knows what every volume is: keep DIR on a disk that you back up.
#[derive(Debug, clap::Args)]
pub struct ControllerArguments {
    /// Directory of the controller: the catalogue and the CSI socket are in it.
    #[arg(long, env = "TANDEM_DIR", default_value = "/var/lib/tandem", value_name = "DIR")]
    dir: PathBuf,
    /// Address at which the nodes reach the catalogue: what they are given as --controller.
    #[arg(long, env = "TANDEM_LISTEN", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// Directory with tls.crt, tls.key and ca.crt, by `tandem certificates issue --role controller`.
    #[arg(long, env = "TANDEM_CERTIFICATES", value_name = "DIR")]
    certificates: PathBuf,
    /// Whether replicas encrypt what they send each other; a node with another setting gets no volumes.
    #[arg(long, env = "TANDEM_ENCRYPTION", value_enum, default_value_t)]
    encryption: Encryption,
    /// Socket on which CSI is served. [default: unix://DIR/csi.sock]
    #[arg(long, env = "CSI_ENDPOINT", value_name = "unix://PATH")]
    endpoint: Option<String>,
    /// How many volumes may be published to one node at once.
    #[arg(long, env = "TANDEM_MAX_VOLUMES_PER_NODE", default_value_t = 1000, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_volumes_per_node: u32,
}

/// Serve CSI's node services on a machine of a cluster: what kubelet calls to mount volumes.
///
/// `tandem replica` runs beside it with the same --dir, and has the devices; either may be killed and started again without
/// the other. With a command it is about the nodes of a cluster, as its controller knows them.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct NodeArguments {
    #[command(subcommand)]
    pub command: Option<super::nodes::Command>,
    /// Directory of this node, the same as the replica's.
    #[arg(long, env = "TANDEM_DIR", default_value = "/var/lib/tandem", value_name = "DIR")]
    dir: PathBuf,
    /// Name of this node, the same as in its certificate. [default: the host name]
    #[arg(long, env = "TANDEM_NODE_ID", value_name = "NAME")]
    node_id: Option<String>,
    /// Socket on which CSI is served. [default: unix://DIR/csi.sock]
    #[arg(long, env = "CSI_ENDPOINT", value_name = "unix://PATH")]
    endpoint: Option<String>,
    /// How many volumes may be attached at once.
    #[arg(long, env = "TANDEM_MAX_VOLUMES_PER_NODE", default_value_t = 1000, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_volumes_per_node: u32,
}

/// What makes a replica part of a cluster: the first four together, or none.
#[derive(Debug, clap::Args)]
pub struct ClusterArguments {
    /// Where the cluster's controller listens: its --listen.
    #[arg(long, env = "TANDEM_CONTROLLER", value_name = "HOST:PORT")]
    controller: Option<String>,
    /// Address of this node at which the controller calls this replica, and other replicas read snapshots that they lack.
    #[arg(long, env = "TANDEM_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Address of this node at which other replicas send it their writes: on the fastest network that they share.
    #[arg(long, env = "TANDEM_MIRROR_LISTEN", value_name = "ADDRESS:PORT")]
    mirror_listen: Option<SocketAddr>,
    /// Directory with tls.crt, tls.key and ca.crt, by `tandem certificates issue --role node`.
    #[arg(long, env = "TANDEM_CERTIFICATES", value_name = "DIR")]
    certificates: Option<PathBuf>,
    /// Whether replicas encrypt what they send each other: the same on the controller and all nodes. [default: on]
    #[arg(long, env = "TANDEM_ENCRYPTION", value_enum)]
    encryption: Option<Encryption>,
    /// How many volumes may be attached at once: decides how many descriptors the process needs.
    #[arg(long, env = "TANDEM_MAX_VOLUMES_PER_NODE", default_value_t = 1000, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_volumes_per_node: u32,
}

impl ClusterArguments {
    /// Checks them, the machine and the certificate, and fills in what `storage` leaves open. `None`: no part of a cluster.
    pub fn join(self, storage: &mut StorageArguments) -> Result<Option<ClusterConfig>, CliError> {
        let Self { controller, listen, mirror_listen, certificates, encryption, max_volumes_per_node } = self;
        let given = [
            ("--controller", controller.is_some()),
            ("--listen", listen.is_some()),
            ("--mirror-listen", mirror_listen.is_some()),
            ("--certificates", certificates.is_some()),
        ];
        let (Some(controller), Some(listen), Some(mirror_listen), Some(certificates)) =
            (controller, listen, mirror_listen, certificates)
        else {
            return if given.iter().any(|(_, given)| *given) || encryption.is_some() {
                Err(CliError::Together(incomplete(&given)))
            } else {
                Ok(None)
            };
        };
        callable("--listen", listen)?;
        callable("--mirror-listen", mirror_listen)?;
        let credentials = Credentials::open(&certificates)?;
        storage.node_id = Some(node_of(&credentials, &certificates, storage.node_id.take())?);
        let prepared = standalone::prepare_storage(storage.clone(), max_volumes_per_node)?;
        (storage.dir, storage.pools) = (prepared.dir, prepared.pools);
        let encrypted = encryption.unwrap_or_default() == Encryption::On;
        Ok(Some(ClusterConfig { controller, listen, mirror_listen, credentials: Arc::new(credentials), encrypted }))
    }
}

fn incomplete(given: &[(&str, bool)]) -> String {
    let all: Vec<_> = given.iter().map(|(flag, _)| *flag).collect();
    let missing: Vec<_> = given.iter().filter(|(_, given)| !given).map(|(flag, _)| *flag).collect();
    let (all, missing) = (all.join(", "), missing.join(", "));
    format!("a replica of a cluster needs all of {all}, and {missing} is missing; one that is alone takes none of them")
}

/// The address is handed to others: they must be able to call it.
fn callable(flag: &str, address: SocketAddr) -> Result<(), CliError> {
    if address.ip().is_unspecified() || address.port() == 0 {
        let text = format!(
            "{flag} {address} is nothing that another machine can call: name an address of this node and a port"
        );
        return Err(CliError::Together(text));
    }
    Ok(())
}

/// The node's name: the one in its certificate.
fn node_of(credentials: &Credentials, directory: &Path, asked: Option<String>) -> Result<String, CliError> {
    let own = credentials.current().own().clone();
    let directory = directory.display();
    if own.role != Role::Node {
        let text = format!(
            "the certificate in {directory} is that of {own}: a replica needs one by `tandem certificates issue --role node`"
        );
        return Err(CliError::Together(text));
    }
    match asked {
        Some(asked) if asked != own.name.as_str() => Err(CliError::Together(format!(
            "--node-id is {asked} and the certificate in {directory} is that of {own}: both name this node, so make them the same"
        ))),
        _ => Ok(own.name.to_string()),
    }
}

/// Runs it until it is told to end.
pub fn run_controller(arguments: ControllerArguments) -> Result<(), CliError> {
    let ControllerArguments { dir, listen, certificates, encryption, endpoint, max_volumes_per_node } = arguments;
    let dir = standalone::prepare_dir(&dir)?;
    let socket = standalone::socket(endpoint.as_deref(), &dir)?;
    let _lock = Lock::take(&dir.join("controller.lock"), PREDECESSOR)?;
    let (endpoint, encrypted) = (format!("unix://{}", socket.display()), encryption == Encryption::On);
    let config = ControllerConfig { endpoint, dir, listen, certificates, encrypted, max_volumes_per_node };
    until_told(|stop: Stop| async move {
        let ready = async {
            standalone::until_ready(&socket).await;
            println!("tandem controller is ready: CSI on unix://{}, catalogue on {listen}", socket.display());
            std::future::pending::<CliError>().await
        };
        tokio::select! {
            served = serve_controller(config, stop) => Ok(served?),
            error = ready => Err(error),
        }
    })
}

/// Runs it until it is told to end.
pub fn run_node(arguments: NodeArguments) -> Result<(), CliError> {
    let NodeArguments { command: _, dir, node_id, endpoint, max_volumes_per_node } = arguments;
    let dir = standalone::prepare_dir(&dir)?;
    let socket = standalone::socket(endpoint.as_deref(), &dir)?;
    let node_id = node_id.unwrap_or_else(standalone::host_name);
    let _lock = Lock::take(&dir.join("csi.lock"), PREDECESSOR)?;
    let control = dir.join("replica.sock");
    let endpoint = format!("unix://{}", socket.display());
    let config = CsiConfig { endpoint, dir, node_id: node_id.clone(), max_volumes_per_node, control: control.clone() };
    until_told(|stop: Stop| async move {
        let ready = async {
            standalone::until_ready(&socket).await;
            if let Some(error) = other_node(&control, &node_id).await {
                return error;
            }
            println!("tandem node is ready: CSI on unix://{}, node {node_id}", socket.display());
            std::future::pending().await
        };
        tokio::select! {
            served = serve_node(config, stop) => Ok(served?),
            error = ready => Err(error),
        }
    })
}

/// The replica behind the socket calls itself otherwise: volumes would be sent to a node that does not have them.
async fn other_node(control: &Path, node_id: &str) -> Option<CliError> {
    let status = Control::new(control).client().get_status(GetStatusRequest {}).await.ok()?.into_inner();
    let text = || {
        format!(
            "--node-id is {node_id} and the replica in this directory is node {}: make them the same",
            status.node_id
        )
    };
    (status.node_id != node_id).then(|| CliError::Together(text()))
}
