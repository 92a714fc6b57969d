//! What a replica does in a cluster, and not alone: keeps copies of mirrored volumes, serves its controller and, snapshots only,
//! other nodes, and announces its node.
//!
//! Invariant: a volume of this node that is in use needs no answer of the controller.

use super::announce::keep_announced;
use super::filler::Filler;
use super::manager::Manager;
use super::mirror::{MirrorSettings, Mirrors, boot_id};
use super::peer::{Endpoint, Security};
use super::service::ReplicaService;
use super::transfer::{SnapshotsService, only_controllers};
use crate::catalog::{Catalog, Node, NodeName, Remote};
use crate::rpc::control::replica_server::ReplicaServer;
use crate::rpc::control::snapshots_server::SnapshotsServer;
use crate::tls::{Credentials, Port};
use crate::volume::InstanceId;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A caller that says nothing is asked whether it is there after this time, and has so long to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How the replica is part of a cluster.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Where the catalogue is, "host:port".
    pub controller: String,
    /// Where the controller calls this replica, and other replicas read its snapshots.
    pub listen: SocketAddr,
    /// Where other replicas do.
    pub mirror_listen: SocketAddr,
    /// Who this node is.
    pub credentials: Arc<Credentials>,
    /// Whether data between replicas are encrypted.
    pub encrypted: bool,
}

/// Why the node cannot take part.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A port cannot be had.
    #[error("cannot listen on {address}: {source}; {flag} takes an address of this node and a free port")]
    Listen {
        /// Which flag.
        flag: &'static str,
        /// What it says.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The life of this node's kernel has no name.
    #[error("cannot read the boot id of this machine: {0}; copies are safe, mount /proc")]
    Boot(#[source] io::Error),
}

/// A node that has its ports, and no copy open yet.
pub struct Candidate {
    listener: TcpListener,
    credentials: Arc<Credentials>,
    mirrors: Mirrors,
    catalog: Catalog,
    node: Node,
    controller: String,
}

/// What runs; dropped, it ends.
pub struct Member {
    _tasks: JoinSet<()>,
    filler: Filler,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.filler.stop();
    }
}

impl Candidate {
    /// Takes the ports.
    pub async fn new(config: ClusterConfig) -> Result<Self, JoinError> {
        let ClusterConfig { controller, listen, mirror_listen, credentials, encrypted } = config;
        let listener = bind("--listen", listen).await?;
        let mirror = bind("--mirror-listen", mirror_listen).await?;
        let own = credentials.current().own().clone();
        let security = if encrypted {
            Security::Tls(Arc::clone(&credentials))
        } else {
            Security::Off { cluster: own.cluster, node: own.name.clone() }
        };
        let catalog = Catalog::Remote(Remote::new(&controller, Arc::clone(&credentials)));
        let name = NodeName(own.name.to_string());
        let mirrors = Mirrors::new(MirrorSettings {
            node: name.clone(),
            catalog: catalog.clone(),
            endpoint: Endpoint::listen(mirror, security),
            boot: boot_id().map_err(JoinError::Boot)?,
        });
        let node = Node::new(name, mirror_listen, listen, encrypted);
        Ok(Self { listener, credentials, mirrors, catalog, node, controller })
    }

    /// Opens the copies of mirrored volumes that have acted before, before devices go on.
    pub async fn open_copies(&mut self, manager: &Manager, held: &BTreeSet<InstanceId>) {
        self.mirrors.open_copies(manager, held).await;
    }

    /// Takes part.
    pub fn join(self, manager: &Manager, service: ReplicaService) -> Member {
        let Self { listener, credentials, mirrors, catalog, node, controller } = self;
        let mut tasks = JoinSet::new();
        tasks.spawn(mirrors.run(manager.clone()));
        let filler = Filler::new(manager.clone(), catalog.clone(), Arc::clone(&credentials), node.name.clone());
        let (service, snapshots) = (service.with_filler(filler.clone()), SnapshotsService::new(manager.clone()));
        tasks.spawn(serve(Port { listener, credentials, role: None }, service, snapshots));
        tasks.spawn(async move {
            let ready = || println!("tandem replica is ready: node {}, announced to {controller}", node.name);
            keep_announced(&catalog, &node, ready).await;
        });
        Member { _tasks: tasks, filler }
    }
}

async fn bind(flag: &'static str, address: SocketAddr) -> Result<TcpListener, JoinError> {
    TcpListener::bind(address).await.map_err(|source| JoinError::Listen { flag, address, source })
}

/// The same service as on the Unix socket for the controller, and the snapshots for other nodes.
async fn serve(port: Port, service: ReplicaService, snapshots: SnapshotsService) {
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(ReplicaServer::with_interceptor(service, only_controllers))
        .add_service(SnapshotsServer::new(snapshots));
    if let Err(error) = server.serve_with_incoming(port.incoming()).await {
        tracing::error!(%error, "the controller cannot call this replica any more: restart it");
    }
}
