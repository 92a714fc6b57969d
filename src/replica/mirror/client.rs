//! Mirrored volumes that are used on this node without a copy: opened, ended and served as the catalogue says.
//!
//! ```text
//!   published here, no copy here ─> open: conversations with all copies, the engine's client asks whoever is primary
//!   published elsewhere since    ─> ended: its device gets errors ─ device gone ─> closed
//! ```
//! Who wishes another primary when the primary's node is gone: this node, if it uses the volume. It alone knows that it is
//! not answered, it needs no liveness in the catalogue, and without a user nobody needs another primary. It only writes the
//! wish, and only for a copy that it reaches; the copies' own rules decide the rest.
//!
//! # Invariants
//! * A client is its publication: it is ended when the catalogue names another one, or none, and never goes on after that.
//! * A node has a copy of a volume or uses it without one, never both: a copy that is to be made here waits.
//! * A device that is resized waits for its requests, and nothing else of this node waits for that.
//! * After a start nothing is asked of a primary before the catalogue has named the publication.

use super::driver::Task;
use super::local::Local;
use super::reconcile::Trouble;
use super::record::Parties;
use super::{LAST_PAUSE, MirrorSettings};
use crate::catalog::{Catalog, ClientSpec, Descriptor, MirrorSpec, UpdateError, Volume};
use crate::protocol::{HEARTBEAT, SILENCE};
use crate::replica::engine::{ClientConfig, EngineHandle, MirrorInput};
use crate::replica::manager::Manager;
use crate::replica::peer::{Event, Party, Session};
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep};

/// After a wish was written: a takeover waits for a lease and its margin, and drops who is silent.
const TAKEOVER: Duration = Duration::from_secs(15);
/// After this time without an answer even a primary that is reached is given up: its disk may have failed.
const BROKEN: Duration = Duration::from_secs(30);

/// What that time grows to, twice as long with each wish: making many hot extents equal may take minutes.
const LONGEST_BROKEN: Duration = Duration::from_secs(1920);

/// Copies that are heard, of those that are called. One that is called no more is never said to be silent.
#[derive(Clone, Default)]
struct Reached(Arc<Mutex<Hearing>>);

#[derive(Default)]
struct Hearing {
    called: BTreeSet<InstanceId>,
    heard: BTreeSet<InstanceId>,
}

impl Reached {
    fn lock(&self) -> MutexGuard<'_, Hearing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These are called from now on. To be said before they are.
    fn call(&self, called: BTreeSet<InstanceId>) {
        let mut hearing = self.lock();
        hearing.heard.retain(|copy| called.contains(copy));
        hearing.called = called;
    }

    fn note(&self, event: &Event) {
        let mut hearing = self.lock();
        match event {
            // It may have been said before the copy was called no more.
            Event::Connected(copy) if hearing.called.contains(copy) => _ = hearing.heard.insert(*copy),
            Event::Silent(copy) => _ = hearing.heard.remove(copy),
            Event::Connected(_) | Event::Received { .. } | Event::Room(_) => {}
        }
    }

    fn heard(&self) -> BTreeSet<InstanceId> {
        self.lock().heard.clone()
    }
}

/// See the module.
pub(super) struct ClientDriver {
    session: Arc<Session>,
    peers: Parties,
    reached: Reached,
    /// The volume's size may be another.
    resized: Arc<Notify>,
    _tasks: [Task; 3],
}

impl ClientDriver {
    fn begin(
        settings: &MirrorSettings,
        manager: &Manager,
        volume: VolumeId,
        publication: InstanceId,
        (session, events): (Arc<Session>, mpsc::Receiver<Event>),
    ) -> Self {
        let (engine, reached, resized) = (manager.engine_handle(), Reached::default(), Arc::new(Notify::new()));
        let watch = Watch { catalog: settings.catalog.clone(), engine: engine.clone(), volume, publication };
        let tasks = [
            tokio::spawn(forward(engine, volume, events, reached.clone())),
            tokio::spawn(watch.run(reached.clone())),
            tokio::spawn(super::driver::resize(manager.clone(), volume, Arc::clone(&resized))),
        ];
        Self { session, peers: Parties::new(), reached, resized, _tasks: tasks.map(Task::from) }
    }

    fn set_peers(&mut self, wanted: Parties) {
        self.reached.call(wanted.keys().copied().collect());
        super::driver::follow_peers(&self.session, &mut self.peers, &wanted);
    }
}

impl Local {
    /// Makes the next steps for a volume that is used here without a copy, or was.
    pub(super) async fn reconcile_client(&mut self, manager: &Manager, volume: &Volume) -> Result<(), Trouble> {
        let Some(mirror) = &volume.spec.mirror else { return Ok(()) };
        let id = volume.id;
        let named = mirror.client.as_ref().filter(|client| client.node == self.common.settings.node);
        let named = named.map(|ClientSpec { publication, .. }| *publication);
        if let Some(here) = manager.publication(id) {
            let engine = manager.engine_handle();
            engine.tell_mirror(id, MirrorInput::Client { client: named, term: None }).await?;
            let status = engine.client_status(id).await?;
            if status.as_ref().is_some_and(|status| status.ended && status.device.is_none()) {
                manager.end_client(id).await?;
                self.client = None;
            } else if named != Some(here) {
                return Ok(());
            }
        }
        // A device that a killed engine left belongs to its publication, whatever is named now. That of a copy waits for its pool.
        let is_copy = |held: &InstanceId| mirror.copies.contains_key(held) || volume.status.copies.contains(held);
        let wanted = manager.held_publication(id).filter(|held| !is_copy(held)).or(named);
        if let Some(publication) = wanted.filter(|_| manager.publication(id).is_none()) {
            if manager.copy_here(id).is_some() {
                return Ok(manager.close_client(id).await?);
            }
            self.open_client(manager, volume, publication).await?;
            if named != wanted {
                let ended = MirrorInput::Client { client: named, term: None };
                manager.engine_handle().tell_mirror(id, ended).await?;
                return Ok(());
            }
        }
        if manager.publication(id).is_none() {
            // Also what was ended in an earlier round.
            return Ok(manager.close_client(id).await?);
        }
        let peers = self.copies_of(mirror);
        if let Some(driver) = &mut self.client {
            driver.set_peers(peers);
            if let Some(configuration) = self.common.settings.catalog.configuration(id).await? {
                driver.session.set_generation(configuration.stamp.generation);
            }
        }
        manager.engine_handle().tell_mirror(id, MirrorInput::Size(volume.status.size)).await?;
        if let Some(driver) = &self.client {
            driver.resized.notify_one();
        }
        Ok(())
    }

    /// The catalogue has no such volume: it was deleted, or the catalogue was lost. A device that is still there is left
    /// alone: it goes when it is unstaged.
    pub(super) async fn forget_client(&mut self, manager: &Manager, id: VolumeId) -> Result<(), Trouble> {
        if !manager.is_client(id) {
            return Ok(());
        }
        let status = manager.engine_handle().client_status(id).await?;
        if status.is_none_or(|status| status.device.is_none()) {
            manager.close_client(id).await?;
            self.client = None;
        }
        Ok(())
    }

    async fn open_client(
        &mut self,
        manager: &Manager,
        volume: &Volume,
        publication: InstanceId,
    ) -> Result<(), Trouble> {
        let id = volume.id;
        let configuration = self.common.settings.catalog.configuration(id).await?.ok_or(Trouble::NoConfiguration)?;
        let opened = self.common.settings.endpoint.open(id, publication, configuration.stamp.generation);
        let (session, events) = opened.map_err(super::driver::OpenError::from)?;
        let session = Arc::new(session);
        let config = ClientConfig { volume: id, publication, size: volume.status.size, session: Arc::clone(&session) };
        let descriptor = Descriptor::of(volume).encode();
        manager.open_client(config, descriptor).await?;
        self.client = Some(ClientDriver::begin(&self.common.settings, manager, id, publication, (session, events)));
        tracing::info!(volume = %id, %publication, "it is used on this node without a copy");
        Ok(())
    }

    /// Where the copies are.
    fn copies_of(&self, mirror: &MirrorSpec) -> Parties {
        let mut parties = Parties::new();
        for (copy, spec) in &mirror.copies {
            let (Some(address), Ok(node)) = (self.common.addresses.get(&spec.node), spec.node.0.parse()) else {
                continue;
            };
            if spec.node != self.common.settings.node {
                parties.insert(*copy, (Party { node, copy: *copy }, *address));
            }
        }
        parties
    }

    /// The node that uses the volume without a copy, for the copies on this one.
    pub(super) fn client_of(&self, mirror: &MirrorSpec) -> Parties {
        let mut parties = Parties::new();
        if let Some(ClientSpec { node, publication }) = &mirror.client
            && *node != self.common.settings.node
            && let (Some(address), Ok(name)) = (self.common.addresses.get(node), node.0.parse())
        {
            parties.insert(*publication, (Party { node: name, copy: *publication }, *address));
        }
        parties
    }
}

/// Until the session or the engine is gone.
async fn forward(engine: EngineHandle, volume: VolumeId, mut events: mpsc::Receiver<Event>, reached: Reached) {
    while let Some(event) = events.recv().await {
        reached.note(&event);
        if let Err(error) = engine.tell_mirror(volume, MirrorInput::Peer(event)).await {
            tracing::warn!(%volume, %error, "what copies say is not heard any more");
            return;
        }
    }
}

/// Looks whether the volume is served, and wishes another primary if not.
struct Watch {
    catalog: Catalog,
    engine: EngineHandle,
    volume: VolumeId,
    publication: InstanceId,
}

impl Watch {
    async fn run(self, reached: Reached) {
        let (mut unserved, mut rests, mut broken) = (None, None, BROKEN);
        loop {
            sleep(HEARTBEAT).await;
            let Ok(Some(status)) = self.engine.client_status(self.volume).await else { continue };
            if status.answers || status.ended {
                (unserved, broken) = (None, BROKEN);
                continue;
            }
            let since: Duration = unserved.get_or_insert_with(Instant::now).elapsed();
            if since < SILENCE || rests.is_some_and(|until| Instant::now() < until) {
                continue;
            }
            match self.wish_another(&reached.heard(), since >= broken).await {
                Ok(None) => {}
                Ok(Some(copy)) => {
                    let volume = self.volume;
                    tracing::warn!(%volume, %copy, "its primary does not answer this node: another copy is wished");
                    // A primary that is replaced again and again makes its copies equal from the start each time.
                    (unserved, rests) = (None, Some(Instant::now() + TAKEOVER));
                    broken = (broken * 2).min(LONGEST_BROKEN);
                }
                Err(error) => {
                    tracing::info!(volume = %self.volume, %error, "no other primary could be wished; it is tried again");
                    rests = Some(Instant::now() + LAST_PAUSE);
                }
            }
        }
    }

    /// Writes the wish, if there is a better one: a member that is reached. Which one.
    async fn wish_another(&self, heard: &BTreeSet<InstanceId>, broken: bool) -> Result<Option<InstanceId>, Trouble> {
        let Some(mut stored) = self.catalog.get::<Volume>(&self.volume.to_string()).await? else { return Ok(None) };
        let Some(configuration) = self.catalog.configuration(self.volume).await? else { return Ok(None) };
        let Some(mirror) = stored.object.spec.mirror.as_mut() else { return Ok(None) };
        let mine = mirror.client.as_ref().is_some_and(|client| client.publication == self.publication);
        if !mine || mirror.primary.is_some_and(|copy| heard.contains(&copy) && !broken) {
            return Ok(None);
        }
        let fits =
            |copy: &InstanceId| heard.contains(copy) && configuration.is_member(*copy) && mirror.primary != Some(*copy);
        // One that is to be replaced has everything, too, while it is a member.
        let all = mirror.staying().map(|(copy, _)| copy).chain(mirror.copies.keys().copied());
        let Some(next) = all.into_iter().find(fits) else { return Ok(None) };
        mirror.primary = Some(next);
        match self.catalog.update(stored).await {
            Ok(_) => Ok(Some(next)),
            // Somebody has changed the volume, or may have: it is looked at again.
            Err(UpdateError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was taken for a primary that is only slow, and no other one was wished.
    #[test]
    fn a_copy_that_is_called_no_more_is_not_heard() {
        let [one, two] = [1, 2].map(|byte| InstanceId::from_bytes([byte; 16]));
        let reached = Reached::default();
        reached.call([one, two].into());
        reached.note(&Event::Connected(one));
        reached.note(&Event::Connected(two));
        assert_eq!(reached.heard(), [one, two].into());
        reached.call([two].into());
        assert_eq!(reached.heard(), [two].into());
        // What waited in the queue of events.
        reached.note(&Event::Connected(one));
        assert_eq!(reached.heard(), [two].into());
        reached.note(&Event::Silent(two));
        reached.call([one, two].into());
        assert_eq!(reached.heard(), [].into());
        reached.note(&Event::Connected(one));
        assert_eq!(reached.heard(), [one].into());
    }
}
