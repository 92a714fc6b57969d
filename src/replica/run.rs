//! The process `tandem replica`: from its flags to a served control socket.

use super::cluster::{Candidate, ClusterConfig, JoinError};
use super::device::mount::private_mount_namespace;
use super::engine::{self, EngineConfig, IoChoice, StartError};
use super::holder::{Holder, HolderError};
use super::manager::{Manager, OpenFailure, OpenSettings};
use super::pool::PoolName;
use super::service::ReplicaService;
use crate::metrics;
use crate::rpc::control::replica_server::ReplicaServer;
use crate::uds::{self, SocketError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

/// Threads for gRPC: a handful of calls at a time; the data path has its own.
const WORKERS: usize = 2;

/// What `tandem replica` needs to know.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// The installation's directory: sockets, mount points.
    pub dir: PathBuf,
    /// This node's id.
    pub node_id: String,
    /// Pools by name.
    pub pools: Vec<(PoolName, PathBuf)>,
    /// Promised bytes over bytes that are there.
    pub overcommit: f64,
    /// io_uring or threads.
    pub io: IoChoice,
    /// How long the engine spins before it sleeps.
    pub spin: Option<Duration>,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
    /// The program to start as holder.
    pub executable: PathBuf,
    /// `None`: this machine alone.
    pub cluster: Option<ClusterConfig>,
}

/// Why the replica stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No mount namespace.
    #[error("no mount namespace of its own ({0}); tandem needs root with CAP_SYS_ADMIN")]
    Namespace(#[source] io::Error),
    /// No runtime.
    #[error("the runtime cannot start: {0}")]
    Runtime(#[source] io::Error),
    /// No holder.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// No engine.
    #[error(transparent)]
    Engine(#[from] StartError),
    /// No pool.
    #[error(transparent)]
    Open(#[from] OpenFailure),
    /// No socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No part of the cluster.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The server failed.
    #[error("the control socket failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The metrics port.
    #[error("metrics on {address}: {source}")]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// Runs until SIGTERM. Devices freeze when it returns (the holder keeps their requests) and go on with the next one.
pub fn run(config: ReplicaConfig) -> Result<(), RunError> {
    // Before any thread: whoever opens copies while devices stand still must not wait for them when memory is short; threads
    // and the holder inherit it.
    engine::protect_from_reclaim();
    // Before any thread: a namespace belongs to the threads that are made afterwards.
    private_mount_namespace().map_err(|e| RunError::Namespace(e.into()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build();
    runtime.map_err(RunError::Runtime)?.block_on(serve(config))
}

async fn serve(config: ReplicaConfig) -> Result<(), RunError> {
    // From here on, also while copies are being opened: a copy that is open when the process ends must be closed.
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Runtime)?;
    let holder = Holder::connect_or_spawn(&config.dir.join("holder.sock"), &config.executable)?;
    let engine = EngineConfig { holder, io: config.io, spin: config.spin };
    let (handle, recovered) = engine::start(engine)?;
    let settings = OpenSettings { dir: config.dir.clone(), pools: config.pools, overcommit: config.overcommit };
    let encrypted = config.cluster.as_ref().map(|cluster| cluster.encrypted);
    let mut candidate = match config.cluster {
        Some(cluster) => Some(Candidate::new(cluster).await?),
        None => None,
    };
    let manager = Manager::open_with(settings, handle, recovered, async |manager, held| {
        if let Some(candidate) = &mut candidate {
            candidate.open_copies(manager, held).await;
        }
    })
    .await?;
    if let Some(address) = config.metrics {
        let source = manager.clone();
        metrics::serve(address, move || {
            let source = source.clone();
            async move { source.measure().await }
        })
        .await
        .map_err(|source| RunError::Metrics { address, source })?;
    }
    let listener = uds::listen_on(&config.dir.join("replica.sock"))?;
    let service = ReplicaService::new(manager.clone(), config.node_id, encrypted);
    let member = candidate.map(|candidate| candidate.join(&manager, service.clone()));
    tracing::info!(attached = manager.attached().len(), "the replica serves");
    tonic::transport::Server::builder()
        .add_service(ReplicaServer::new(service))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            terminate.recv().await;
        })
        .await?;
    drop(member);
    manager.close().await;
    for volume in manager.attached() {
        tracing::warn!(%volume, "its device freezes until tandem is started again");
    }
    Ok(())
}
