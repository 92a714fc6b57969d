//! What a replica does in a cluster, and not alone: serves its controller and other replicas, and announces its node.
//!
//! Invariant: nothing here is needed by a volume of this node that is in use.

use super::announce::keep_announced;
use super::peer::{Endpoint, Security};
use super::service::ReplicaService;
use crate::catalog::{Catalog, Node, NodeName, Remote};
use crate::rpc::control::replica_server::ReplicaServer;
use crate::tls::{Credentials, Port, Role};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// How the replica is part of a cluster.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Where the catalogue is, "host:port".
    pub controller: String,
    /// Where the controller calls this replica.
    pub listen: SocketAddr,
    /// Where other replicas do.
    pub mirror_listen: SocketAddr,
    /// Who this node is.
    pub credentials: Arc<Credentials>,
    /// Whether data between replicas are encrypted.
    pub encrypted: bool,
}

/// A port cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; {flag} takes an address of this node and a free port")]
pub struct ListenError {
    flag: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// What runs; dropped, it ends.
pub struct Member {
    _tasks: JoinSet<()>,
    _endpoint: Endpoint,
}

impl Member {
    /// Takes part.
    pub async fn join(config: ClusterConfig, service: ReplicaService) -> Result<Self, ListenError> {
        let ClusterConfig { controller, listen, mirror_listen, credentials, encrypted } = config;
        let listener = bind("--listen", listen).await?;
        let mirror = bind("--mirror-listen", mirror_listen).await?;
        let own = credentials.current().own().clone();
        let security = if encrypted {
            Security::Tls(Arc::clone(&credentials))
        } else {
            Security::Off { cluster: own.cluster, node: own.name.clone() }
        };
        let endpoint = Endpoint::listen(mirror, security);
        let mut tasks = JoinSet::new();
        let port = Port { listener, credentials: Arc::clone(&credentials), role: Some(Role::Controller) };
        tasks.spawn(serve(port, service));
        let name = NodeName(own.name.to_string());
        let node = Node { name, mirror: mirror_listen, control: listen, encrypted };
        tasks.spawn(async move {
            let catalog = Catalog::Remote(Remote::new(&controller, credentials));
            let ready = || println!("tandem replica is ready: node {}, announced to {controller}", node.name);
            keep_announced(&catalog, &node, ready).await;
        });
        Ok(Self { _tasks: tasks, _endpoint: endpoint })
    }
}

async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError { flag, address, source })
}

/// The same service as on the Unix socket.
async fn serve(port: Port, service: ReplicaService) {
    let server = tonic::transport::Server::builder().add_service(ReplicaServer::new(service));
    if let Err(error) = server.serve_with_incoming(port.incoming()).await {
        tracing::error!(%error, "the controller cannot call this replica any more: restart it");
    }
}
