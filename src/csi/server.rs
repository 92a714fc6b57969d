//! The processes that speak CSI: a Unix socket, services on it, and the work at start. A machine alone has all of them in
//! one process; in a cluster the controller's and each node's are apart.
//!
//! Invariants: one process per catalogue; the socket is made by the rules of [`uds`](crate::uds).

use super::control::Control;
use super::controller::{Controller, ControllerService, OperatorService};
use super::group::GroupService;
use super::identity::IdentityService;
use super::node::{NodeConfig, NodeService, RecordError};
use super::nodes::{Announced, Node, Nodes};
use super::recovery::RecoveryService;
use super::snapshot_metadata::SnapshotMetadataService;
use crate::catalog::{self, Catalog, Embedded, NodeName, OpenError};
use crate::rpc::csi::controller_server::ControllerServer;
use crate::rpc::csi::group_controller_server::GroupControllerServer;
use crate::rpc::csi::identity_server::IdentityServer;
use crate::rpc::csi::node_server::NodeServer;
use crate::rpc::csi::snapshot_metadata_server::SnapshotMetadataServer;
use crate::rpc::operator::operator_server::OperatorServer;
use crate::rpc::recovery::recovery_server::RecoveryServer;
use crate::tls::{Credentials, CredentialsError, Identity, Role};
use crate::uds::{self, SocketError};
use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

/// Calls of one connection at a time; sidecars run up to 100 workers, more wait in the connection.
const CALLS_PER_CONNECTION: usize = 128;
/// First pause between attempts of the work at start ...
const SWEEP_PAUSE: Duration = Duration::from_secs(1);
/// ... and the longest: a replica that is gone for long is no reason to be busy.
const SWEEP_PAUSE_LIMIT: Duration = Duration::from_secs(60);

/// What the process needs to know.
#[derive(Clone, Debug)]
pub struct CsiConfig {
    /// `unix:///path`, or an absolute path.
    pub endpoint: String,
    /// The installation's directory: the catalogue and the node's records are in it.
    pub dir: PathBuf,
    /// Name of this node, as topology and ControllerPublishVolume have it.
    pub node_id: String,
    /// Volumes that may be published to this node.
    pub max_volumes_per_node: u32,
    /// The replica's control socket.
    pub control: PathBuf,
}

/// Why the process cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Not an endpoint.
    #[error("endpoint {0:?} is not possible: it is unix:///path/of/a/socket")]
    Endpoint(String),
    /// Not a node's name.
    #[error("node id {0:?} is not possible: it has 1 to 63 bytes, letters, digits, '-', '_' and '.'")]
    NodeId(String),
    /// Its socket.
    #[error("{0}; or use another --endpoint")]
    Socket(#[from] SocketError),
    /// The catalogue.
    #[error(transparent)]
    Catalog(#[from] OpenError),
    /// The node's records.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// The certificates.
    #[error(transparent)]
    Certificates(#[from] CredentialsError),
    /// A node's certificate.
    #[error(
        "the certificate in {} is that of {found}: a controller needs one by `tandem certificates issue --role controller`",
        directory.display()
    )]
    Role {
        /// Who it names.
        found: Identity,
        /// Where it is.
        directory: PathBuf,
    },
    /// The port for nodes.
    #[error("cannot listen on {address}: {source}; --listen takes an address of this machine and a free port")]
    Listen {
        /// As asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The catalogue's server gave up.
    #[error("the catalogue is not served any more: {0}")]
    Catalogue(String),
    /// The server gave up.
    #[error("the CSI socket failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// What a cluster's controller needs to know.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// `unix:///path`, or an absolute path.
    pub endpoint: String,
    /// The catalogue is in it.
    pub dir: PathBuf,
    /// Where nodes reach the catalogue.
    pub listen: SocketAddr,
    /// tls.crt, tls.key and ca.crt.
    pub certificates: PathBuf,
    /// Whether data between replicas are encrypted.
    pub encrypted: bool,
    /// Volumes that may be published to one node.
    pub max_volumes_per_node: u32,
}

type Router = tonic::transport::server::Router;

/// Serves all of CSI for one machine until `stop`, then finishes the calls that are under way.
pub async fn serve(config: CsiConfig, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let path = socket_path(&config.endpoint)?;
    let node = node_name(&config.node_id)?;
    let catalog = Catalog::open(&config.dir.join("catalog.redb"))?;
    let control = Control::new(&config.control);
    let router = with_node(services(Some(control.clone())), &config, node.clone(), control.clone())?;
    let nodes = Nodes::Alone(Node { name: node, control });
    let controller = Arc::new(Controller::new(catalog, nodes, config.max_volumes_per_node));
    listen(&path, with_controller(router, &controller), Some(controller), stop).await
}

/// As [`serve`], without the services of a controller: a node of a cluster.
pub async fn serve_node(config: CsiConfig, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let path = socket_path(&config.endpoint)?;
    let node = node_name(&config.node_id)?;
    let control = Control::new(&config.control);
    let router = with_node(services(Some(control.clone())), &config, node, control)?;
    listen(&path, router, None, stop).await
}

/// As [`serve`], without the services of a node, for all nodes that announce themselves; and the catalogue for those.
pub async fn serve_controller(config: ControllerConfig, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let path = socket_path(&config.endpoint)?;
    let credentials = Arc::new(Credentials::open(&config.certificates)?);
    let own = credentials.current().own().clone();
    if own.role != Role::Controller {
        return Err(ServeError::Role { found: own, directory: config.certificates });
    }
    let file = Embedded::open(&config.dir.join("catalog.redb"))?;
    let address = config.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })?;
    let catalog = Catalog::Embedded(file.clone());
    let nodes = Nodes::Announced(Announced::new(catalog.clone(), Arc::clone(&credentials), config.encrypted));
    let controller = Arc::new(Controller::new(catalog, nodes, config.max_volumes_per_node).with_mirrors());
    let recovery = RecoveryServer::new(RecoveryService(controller.clone()));
    let router = with_controller(services(None), &controller).add_service(recovery);
    let (stopping, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(catalog::serve(file, listener, credentials, async { drop(stopped.await) }));
    let served = tokio::select! {
        served = listen(&path, router, Some(controller), stop) => served,
        // It never ends by itself while its stop is held here.
        ended = serving => return Err(ServeError::Catalogue(ended.map_or_else(|e| e.to_string(), |e| format!("{e:?}")))),
    };
    drop(stopping);
    served
}

fn services(control: Option<Control>) -> Router {
    let mut server = Server::builder().concurrency_limit_per_connection(CALLS_PER_CONNECTION);
    server.add_service(IdentityServer::new(IdentityService::new(control)))
}

fn with_controller(router: Router, controller: &Arc<Controller>) -> Router {
    router
        .add_service(ControllerServer::new(ControllerService(controller.clone())))
        .add_service(GroupControllerServer::new(GroupService(controller.clone())))
        .add_service(OperatorServer::new(OperatorService(controller.clone())))
        .add_service(SnapshotMetadataServer::new(SnapshotMetadataService(controller.clone())))
}

fn with_node(router: Router, config: &CsiConfig, name: NodeName, control: Control) -> Result<Router, RecordError> {
    let records = config.dir.join("node");
    let node = NodeConfig { name, max_volumes: config.max_volumes_per_node, records };
    Ok(router.add_service(NodeServer::new(NodeService::new(node, control)?)))
}

/// Serves on the socket, and does the work at start of a controller.
async fn listen(
    path: &Path,
    router: Router,
    controller: Option<Arc<Controller>>,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    // Last, so that whoever can connect gets answers.
    let listener = uds::listen_on(path)?;
    let sweeping = controller.map(|controller| {
        tokio::spawn(async move {
            tokio::join!(sweep(controller.clone()), controller.tend(), controller.rebuild(), controller.bring_over())
        })
    });
    tracing::info!(endpoint = %path.display(), "CSI is served");
    let served = router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop).await;
    if let Some(sweeping) = sweeping {
        sweeping.abort();
    }
    // Without a listener the name only confuses; the next start removes it if this fails.
    let _ = fs::remove_file(path);
    Ok(served?)
}

/// Finishes what an earlier process left, as soon as the replica answers; then what this one gives up, now and then.
async fn sweep(controller: Arc<Controller>) {
    let mut pause = SWEEP_PAUSE;
    while let Err(error) = controller.sweep().await {
        tracing::info!(%error, seconds = pause.as_secs(), "what an earlier process left half done is tried again later");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(SWEEP_PAUSE_LIMIT);
    }
    loop {
        tokio::time::sleep(SWEEP_PAUSE_LIMIT).await;
        if let Err(error) = controller.sweep_given_up().await {
            tracing::info!(%error, "snapshots that were given up are taken away later");
        }
    }
}

/// The path of an endpoint.
pub fn socket_path(endpoint: &str) -> Result<PathBuf, ServeError> {
    let path = Path::new(endpoint.strip_prefix("unix://").unwrap_or(endpoint));
    let is_path = path.is_absolute() && path.file_name().is_some();
    is_path.then(|| path.to_owned()).ok_or_else(|| ServeError::Endpoint(endpoint.to_owned()))
}

/// A name that can be the value of a topology segment.
fn node_name(text: &str) -> Result<NodeName, ServeError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let valid = !text.is_empty() && text.len() <= 63 && text.chars().all(fits);
    if valid { Ok(NodeName(text.to_owned())) } else { Err(ServeError::NodeId(text.chars().take(128).collect())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_and_node_names_are_checked() {
        assert_eq!(socket_path("unix:///run/csi.sock").ok(), Some(PathBuf::from("/run/csi.sock")));
        assert_eq!(socket_path("/run/csi.sock").ok(), Some(PathBuf::from("/run/csi.sock")));
        for wrong in ["", "unix://", "unix://relative", "tcp://127.0.0.1:1", "csi.sock", "/"] {
            assert!(matches!(socket_path(wrong), Err(ServeError::Endpoint(_))), "{wrong}");
        }
        assert!(node_name("node-1.example").is_ok());
        for wrong in ["", "a/b", "node 1", &"x".repeat(64)] {
            assert!(matches!(node_name(wrong), Err(ServeError::NodeId(_))), "{wrong}");
        }
    }
}
