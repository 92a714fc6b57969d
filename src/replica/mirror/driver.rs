//! One copy that the engine runs: its conversations, and the tasks that carry what happens to the engine.
//!
//! Invariants: peers' events wait for the engine and for nothing else; all of it ends when the driver is dropped.

use super::MirrorSettings;
use super::courier::{Courier, Refresh, Refresher};
use super::record::Parties;
use crate::protocol::{Memory, Record};
use crate::replica::engine::{EngineError, EngineHandle, MirrorConfig, MirrorInput, SealReserve};
use crate::replica::manager::Manager;
use crate::replica::peer::{AlreadyOpen, Event, Session};
use crate::volume::{InstanceId, VolumeId};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Requests of a core that wait for the catalogue; it says the others again at its next heartbeat.
const MAX_REQUESTS: usize = 8;
/// Looks at the catalogue that were asked for and have not begun: one is as good as many.
const MAX_REFRESHES: usize = 8;

/// A copy that is to be opened.
pub(super) struct Opening {
    pub volume: VolumeId,
    pub tree: InstanceId,
    pub memory: Memory,
    /// If it has no record of its own.
    pub first: Record,
}

/// Why a copy was not opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error(transparent)]
    Session(#[from] AlreadyOpen),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// A task that ends with its owner.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// See the module.
pub(super) struct Driver {
    session: Arc<Session>,
    peers: Parties,
    refresher: Refresher,
    reserve: SealReserve,
    _tasks: [Task; 2],
}

impl Driver {
    pub async fn open(settings: &MirrorSettings, manager: &Manager, opening: Opening) -> Result<Self, OpenError> {
        let Opening { volume, tree, memory, first } = opening;
        let engine = manager.engine_handle();
        let (session, events) = settings.endpoint.open(volume, tree, first.configuration.stamp.generation)?;
        let session = Arc::new(session);
        let (requests, asked) = mpsc::channel(MAX_REQUESTS);
        let reserve = SealReserve::default();
        let config = MirrorConfig {
            tree,
            volume,
            session: Arc::clone(&session),
            boot: settings.boot,
            memory,
            first,
            reserve: reserve.clone(),
            requests,
        };
        engine.open_mirror(config).await?;
        let (refresher, refreshes) = mpsc::channel::<Refresh>(MAX_REFRESHES);
        let courier = Courier {
            catalog: settings.catalog.clone(),
            engine: engine.clone(),
            session: Arc::clone(&session),
            volume,
            copy: tree,
        };
        let tasks = [tokio::spawn(forward(engine, volume, events)), tokio::spawn(courier.run(asked, refreshes))];
        manager.set_open(volume, refresher.clone(), reserve.clone());
        let tasks = tasks.map(|task| Task(task.abort_handle()));
        tracing::info!(%volume, copy = %tree, ?memory, "a copy is open");
        Ok(Self { session, peers: Parties::new(), refresher, reserve, _tasks: tasks })
    }

    /// Calls these copies, and nobody else.
    pub fn set_peers(&mut self, wanted: &Parties) {
        for copy in self.peers.keys().filter(|copy| !wanted.contains_key(copy)) {
            self.session.remove_peer(*copy);
        }
        for (copy, (party, address)) in wanted {
            let known = self.peers.get(copy);
            if known.is_none_or(|(before, at)| before.node != party.node || at != address) {
                self.session.add_peer(party.clone(), *address);
            }
        }
        self.peers.clone_from(wanted);
    }

    /// Where the copy's seals take their space from.
    pub fn reserve(&self) -> &SealReserve {
        &self.reserve
    }

    /// Something about the volume may have changed in the catalogue.
    pub fn look(&self) {
        // A full queue means that somebody looks soon anyway.
        let _ = self.refresher.try_send(None);
    }
}

/// Until the session or the engine is gone.
async fn forward(engine: EngineHandle, volume: VolumeId, mut events: mpsc::Receiver<Event>) {
    while let Some(event) = events.recv().await {
        if let Err(error) = engine.tell_mirror(volume, MirrorInput::Peer(event)).await {
            tracing::warn!(%volume, %error, "what peers say is not heard any more");
            return;
        }
    }
}
