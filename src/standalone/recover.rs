//! `tandem recover`: rebuilds a lost catalogue from what lies beside each copy on the disks.
//!
//! Runs instead of a server: it has the directory's lock, an engine process for the time it takes, and the catalogue.

use super::child::Child;
use super::{EngineArguments, Lock, StandaloneError, StorageArguments, checks, lock};
use crate::catalog::{Catalog, Embedded, NodeName};
use crate::csi::control::Control;
use crate::csi::controller::{Report, recover};
use crate::csi::nodes::{Node, Nodes};
use crate::protocol::Generation;
use crate::rpc::control::GetStatusRequest;
use std::path::Path;
use std::time::Duration;

/// How often the engine that is starting is asked.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How long the engine may take to finish.
const PATIENCE: Duration = Duration::from_secs(10);
/// Devices that are waiting for an engine are taken over while it runs.
const VOLUMES: u32 = 1000;

/// Puts back into the catalogue what it has lost; what it has is not changed.
pub async fn run(arguments: StorageArguments, log: &str) -> Result<Report, StandaloneError> {
    let storage = checks::prepare_storage(arguments, VOLUMES)?;
    let _lock = Lock::take(&storage.dir.join("tandem.lock"), lock::DYING_SERVER)?;
    let catalog = Embedded::open(&storage.dir.join("catalog.redb"))?;
    // Before anything is put back: what is configured from now on is newer than what the lost catalogue has said.
    let raised = catalog.raise_generation(Generation::default()).await;
    raised.map_err(|error| StandaloneError::Recover(error.to_string()))?;
    let catalog = Catalog::Embedded(catalog);
    let mut replica = Child::start("replica", storage.replica_arguments(&EngineArguments::default(), log))?;
    let socket = storage.dir.join("replica.sock");
    let report = tokio::select! {
        report = rebuild(&catalog, &socket, &storage.node_id) => report,
        error = replica.died_early() => return Err(error.into()),
    };
    replica.stop(PATIENCE).await;
    report
}

async fn rebuild(catalog: &Catalog, socket: &Path, node_id: &str) -> Result<Report, StandaloneError> {
    let control = Control::new(socket);
    while control.client().get_status(GetStatusRequest {}).await.is_err() {
        tokio::time::sleep(ASK_EVERY).await;
    }
    let nodes = Nodes::Alone(Node { name: NodeName(node_id.to_owned()), control });
    recover(catalog, &nodes).await.map_err(|error| StandaloneError::Recover(error.to_string()))
}
