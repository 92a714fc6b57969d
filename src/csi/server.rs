//! The process that speaks CSI: a Unix socket, all services on it, and the work at start.
//!
//! Invariants: one process per catalogue; the socket is made by the rules of [`uds`](crate::uds).

use super::control::Control;
use super::controller::{Controller, ControllerService};
use super::group::GroupService;
use super::identity::IdentityService;
use super::node::{NodeConfig, NodeService, RecordError};
use super::nodes::{Node, Nodes};
use super::snapshot_metadata::SnapshotMetadataService;
use crate::catalog::{Catalog, NodeName, OpenError};
use crate::rpc::csi::controller_server::ControllerServer;
use crate::rpc::csi::group_controller_server::GroupControllerServer;
use crate::rpc::csi::identity_server::IdentityServer;
use crate::rpc::csi::node_server::NodeServer;
use crate::rpc::csi::snapshot_metadata_server::SnapshotMetadataServer;
use crate::uds::{self, SocketError};
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
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
    /// The server gave up.
    #[error("the CSI socket failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves CSI until `stop`, then finishes the calls that are under way.
pub async fn serve(config: CsiConfig, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let path = socket_path(&config.endpoint)?;
    let node = node_name(&config.node_id)?;
    let catalog = Catalog::open(&config.dir.join("catalog.redb"))?;
    let control = Control::new(&config.control);
    let limit = config.max_volumes_per_node;
    let records = config.dir.join("node");
    let node_service =
        NodeService::new(NodeConfig { name: node.clone(), max_volumes: limit, records }, control.clone())?;
    let controller = Arc::new(Controller::new(catalog, Nodes::Alone(Node { name: node, control: control.clone() }), limit));
    // Last, so that whoever can connect gets answers.
    let listener = uds::listen_on(&path)?;
    let sweeping = tokio::spawn(sweep(controller.clone()));
    tracing::info!(endpoint = %path.display(), node = config.node_id, "CSI is served");
    let served = Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .add_service(IdentityServer::new(IdentityService::new(control)))
        .add_service(ControllerServer::new(ControllerService(controller.clone())))
        .add_service(GroupControllerServer::new(GroupService(controller.clone())))
        .add_service(SnapshotMetadataServer::new(SnapshotMetadataService(controller)))
        .add_service(NodeServer::new(node_service))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await;
    sweeping.abort();
    // Without a listener the name only confuses; the next start removes it if this fails.
    let _ = fs::remove_file(&path);
    Ok(served?)
}

/// Finishes what an earlier process left, as soon as the replica answers.
async fn sweep(controller: Arc<Controller>) {
    let mut pause = SWEEP_PAUSE;
    while let Err(error) = controller.sweep().await {
        tracing::info!(%error, seconds = pause.as_secs(), "what an earlier process left half done is tried again later");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(SWEEP_PAUSE_LIMIT);
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
