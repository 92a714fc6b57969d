//! A volume's copy at this end: what the engine holds, and what happens to it.
//!
//! Invariants: a peer is known for as long as its conversation runs, which ends with its removal, and all end when the [`Session`]
//! is dropped; events of one peer arrive in order. Messages do not come by that way: whoever hears [`Event::Connected`] reads the [`Line`].

use super::endpoint::{Identification, Shared};
use super::hello::{Hello, Nonce, Party};
use super::line::Line;
use super::message::may_have;
use super::packet::Packet;
use super::payload::Payload;
use super::queue::SendError;
use super::session::{self, Pace, Peer};
use crate::protocol::{Generation, Incarnation, Message};
use crate::volume::{InstanceId, VolumeId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Events that wait for the engine: some of each peer.
pub(super) const MAX_EVENTS: usize = 32;

/// What happens on a volume's connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A connection to this copy is new: whatever is not answered must be said again.
    Connected(InstanceId),
    /// A message, from a [`Line`].
    Received {
        /// The copy whose certificate and instance id were checked.
        from: InstanceId,
        /// What it says.
        message: Message,
        /// With which data; its crcs are those that the sender has made, not checked yet.
        payload: Payload,
    },
    /// Nothing was heard of this copy, or it took nothing, for [`SILENCE`](crate::protocol::SILENCE).
    Silent(InstanceId),
    /// There is room again after [`SendError::Full`].
    Room(InstanceId),
}

/// Conversations, each with the task that carries it. A task owns the volume, so whoever ends that takes them out.
type Peers = BTreeMap<InstanceId, (Arc<Peer>, Task)>;

/// What sessions and the listener know of a volume.
pub(super) struct Volume {
    pub id: VolumeId,
    pub here: Party,
    pub incarnation: Incarnation,
    generation: AtomicU64,
    peers: Mutex<Peers>,
    events: mpsc::Sender<Event>,
}

impl Volume {
    pub fn new(id: VolumeId, here: Party, generation: Generation) -> (Arc<Self>, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(MAX_EVENTS);
        let (incarnation, generation) = (random_incarnation(), AtomicU64::new(generation.0));
        let peers = Mutex::default();
        (Arc::new(Self { id, here, incarnation, generation, peers, events }), receiver)
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn peer(&self, copy: InstanceId) -> Option<Arc<Peer>> {
        self.peers().get(&copy).map(|(peer, _)| Arc::clone(peer))
    }

    pub fn parties(&self) -> Vec<Party> {
        self.peers().values().map(|(peer, _)| peer.party.clone()).collect()
    }

    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    pub fn hello(&self, identity: &Identification, to: Party) -> Hello {
        Hello {
            compatible: 0,
            incompatible: identity.features(),
            cluster: identity.cluster,
            volume: self.id,
            from: self.here.clone(),
            to,
            generation: self.generation(),
            incarnation: self.incarnation,
            nonce: Nonce::random(),
        }
    }

    /// Waits until the engine has taken earlier events. An engine that is gone takes none: the session ends with it.
    pub async fn tell(&self, event: Event) {
        let _ = self.events.send(event).await;
    }
}

/// Random, so that no clock can repeat it.
fn random_incarnation() -> Incarnation {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    // The fixed bits of such an id are in different places of the halves.
    Incarnation(high ^ low)
}

/// A task that ends with its owner.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One copy's end of all its conversations; dropping it ends them.
pub struct Session {
    shared: Arc<Shared>,
    volume: Arc<Volume>,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>, volume: Arc<Volume>) -> Self {
        Self { shared, volume }
    }

    /// Of this start: for the core's [`Member`](crate::protocol::Member).
    pub fn incarnation(&self) -> Incarnation {
        self.volume.incarnation
    }

    /// The catalogue's generation has been raised: peers that know an older one only are refused at their next connection.
    pub fn set_generation(&self, generation: Generation) {
        self.volume.generation.fetch_max(generation.0, Ordering::AcqRel);
    }

    /// Begins a conversation, in place of one with the same copy.
    pub fn add_peer(&self, party: Party, address: SocketAddr) {
        self.begin(&mut self.volume.peers(), party, address, Arc::default());
    }

    /// Ends a conversation.
    pub fn remove_peer(&self, copy: InstanceId) {
        self.volume.peers().remove(&copy);
    }

    /// Ends the connection to a copy and begins another: both sides are told, and say everything again that is not answered.
    pub fn reconnect(&self, copy: InstanceId) {
        let mut peers = self.volume.peers();
        if let Some((peer, _)) = peers.get(&copy) {
            let Peer { party, address, pace, .. } = &**peer;
            let (party, address, pace) = (party.clone(), *address, Arc::clone(pace));
            self.begin(&mut peers, party, address, pace);
        }
    }

    fn begin(&self, peers: &mut Peers, party: Party, address: SocketAddr, pace: Arc<Mutex<Pace>>) {
        let copy = party.copy;
        let (queue, arrivals) = Default::default();
        let peer = Arc::new(Peer { party, address, queue, arrivals, pace });
        // The earlier one first: two would both tell the engine that they are connected.
        peers.remove(&copy);
        let run = session::run(Arc::clone(&self.shared), Arc::clone(&self.volume), Arc::clone(&peer));
        peers.insert(copy, (peer, Task(self.shared.runtime.spawn(run).abort_handle())));
    }

    /// Whether a message with so many bytes of data would be taken, give or take its header: to be asked before they are copied.
    ///
    /// # Errors
    /// It would not, and why; what follows then is what follows after [`Self::send`].
    pub fn has_room(&self, to: InstanceId, data: usize) -> Result<(), SendError> {
        self.volume.peer(to).ok_or(SendError::NoPeer)?.queue.has_room(data)
    }

    /// Takes a message to be sent with the next [`Self::flush`], with the data that goes with it. Never waits.
    ///
    /// # Errors
    /// The message was not taken, and why; it may be lost later, too, when the connection ends before it was written.
    pub fn send(&self, to: InstanceId, message: &Message, payload: &Payload) -> Result<(), SendError> {
        if !may_have(message, payload) {
            return Err(SendError::Payload);
        }
        let peer = self.volume.peer(to).ok_or(SendError::NoPeer)?;
        let packet = Packet::Message(message.clone(), payload.clone());
        peer.queue.push(packet.encode(self.volume.id))
    }

    /// Sends what was taken since the last time. Never waits.
    pub fn flush(&self) {
        let peers: Vec<_> = self.volume.peers().values().map(|(peer, _)| Arc::clone(peer)).collect();
        peers.iter().for_each(|peer| peer.queue.flush());
    }

    /// The connection with this copy, if there is one: its socket becomes readable when something was said.
    pub fn line(&self, with: InstanceId) -> Option<Arc<Line>> {
        self.volume.peer(with)?.queue.line()
    }

    /// Bytes that wait to be sent to this copy or are being written.
    pub fn in_flight(&self, to: InstanceId) -> usize {
        self.volume.peer(to).map_or(0, |peer| peer.queue.bytes())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.forget(&self.volume);
        self.volume.peers().clear();
    }
}
