//! One copy that the engine runs: its conversations, and the tasks that carry what happens to the engine.
//!
//! Invariants: peers' events wait for the engine and for nothing else; a device that is resized waits for its requests, and
//! nothing else of the copy waits for that; all of it ends when the driver is dropped.

use super::courier::{Courier, Refresh, Refresher};
use super::record::Parties;
use super::{FIRST_PAUSE, LAST_PAUSE, MirrorSettings};
use crate::protocol::{Memory, Record};
use crate::replica::engine::{EngineError, EngineHandle, MirrorConfig, MirrorInput, SealReserve};
use crate::replica::manager::Manager;
use crate::replica::peer::{AlreadyOpen, Event, Session};
use crate::volume::{InstanceId, VolumeId, VolumeSize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinHandle};

/// Requests of a core that wait for the catalogue; it says the others again at its next heartbeat.
const MAX_REQUESTS: usize = 8;
/// How long is waited for one copy to be open: what is under way on it has ended by then, unless it is stuck. Much less than
/// [`SOON`](super::errands::SOON), so that a copy that waits for space is not taken for a disk that hangs.
const OPEN_SOON: Duration = Duration::from_millis(200);
/// Looks at the catalogue that were asked for and have not begun: one is as good as many.
const MAX_REFRESHES: usize = 8;

/// A copy that is to be opened.
pub(super) struct Opening {
    pub volume: VolumeId,
    pub tree: InstanceId,
    pub memory: Memory,
    /// As far as it is known before the catalogue is asked.
    pub size: Option<VolumeSize>,
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
    #[error("the task that opens it has ended: {0}")]
    Task(tokio::task::JoinError),
}

/// A task that ends with its owner.
pub(super) struct Task(AbortHandle);

impl From<JoinHandle<()>> for Task {
    fn from(task: JoinHandle<()>) -> Self {
        Self(task.abort_handle())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A copy that is being opened, in a task that ends with its owner.
pub(super) struct Opened(JoinHandle<Result<Driver, OpenError>>);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Opened {
    /// Begins.
    pub fn begin(settings: &Arc<MirrorSettings>, manager: &Manager, opening: Opening) -> Self {
        let (settings, manager) = (Arc::clone(settings), manager.clone());
        Self(tokio::spawn(async move { Driver::open(&settings, &manager, opening).await }))
    }

    /// The open copy, if that is soon.
    pub async fn soon(&mut self) -> Option<Result<Driver, OpenError>> {
        let opened = tokio::time::timeout(OPEN_SOON, &mut self.0).await.ok()?;
        Some(opened.unwrap_or_else(|error| Err(OpenError::Task(error))))
    }
}

/// See the module.
pub(super) struct Driver {
    session: Arc<Session>,
    peers: Parties,
    refresher: Refresher,
    reserve: SealReserve,
    volume: VolumeId,
    /// The volume's size may be another.
    resized: Arc<Notify>,
    _tasks: [Task; 3],
}

impl Driver {
    pub async fn open(settings: &MirrorSettings, manager: &Manager, opening: Opening) -> Result<Self, OpenError> {
        let Opening { volume, tree, memory, size, first } = opening;
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
        if let Some(size) = size {
            engine.tell_mirror(volume, MirrorInput::Size(size)).await?;
        }
        let (refresher, refreshes) = mpsc::channel::<Refresh>(MAX_REFRESHES);
        let courier = Courier {
            catalog: settings.catalog.clone(),
            engine: engine.clone(),
            session: Arc::clone(&session),
            volume,
            copy: tree,
        };
        let resized = Arc::new(Notify::new());
        let tasks = [
            tokio::spawn(forward(engine, volume, events)),
            tokio::spawn(courier.run(asked, refreshes)),
            tokio::spawn(resize(manager.clone(), volume, Arc::clone(&resized))),
        ];
        manager.set_open(volume, refresher.clone(), reserve.clone());
        let tasks = tasks.map(Task::from);
        tracing::info!(%volume, copy = %tree, ?memory, "a copy is open");
        Ok(Self { session, peers: Parties::new(), refresher, reserve, volume, resized, _tasks: tasks })
    }

    /// Calls these copies, and nobody else.
    pub fn set_peers(&mut self, wanted: &Parties) {
        follow_peers(&self.session, &mut self.peers, wanted);
    }

    /// Every copy can hold so much: the core may know, and the device follows by itself.
    pub async fn set_size(&self, manager: &Manager, size: VolumeSize) -> Result<(), EngineError> {
        manager.engine_handle().tell_mirror(self.volume, MirrorInput::Size(size)).await?;
        self.resized.notify_one();
        Ok(())
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

/// Makes a session's peers those that are wanted.
pub(super) fn follow_peers(session: &Session, known: &mut Parties, wanted: &Parties) {
    for copy in known.keys().filter(|copy| !wanted.contains_key(copy)) {
        session.remove_peer(*copy);
    }
    for (copy, (party, address)) in wanted {
        let before = known.get(copy);
        if before.is_none_or(|(before, at)| before.node != party.node || at != address) {
            session.add_peer(party.clone(), *address);
        }
    }
    known.clone_from(wanted);
}

/// Lets the device follow the volume's size.
pub(super) async fn resize(manager: Manager, volume: VolumeId, resized: Arc<Notify>) {
    loop {
        resized.notified().await;
        let mut pause = FIRST_PAUSE;
        while let Err(error) = manager.resize_device(volume).await {
            // What fails again and again is said once.
            if pause == FIRST_PAUSE {
                tracing::warn!(%volume, %error, "its device does not have its size yet; it is tried again");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
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
