//! One volume's conversation with one peer: connects, connects again, and says what happens.
//!
//! ```text
//!   waiting --a handshake succeeds--> connected --closed, silent, replaced--> waiting
//!      |  Silent, once, when nothing was heard for SILENCE         Connected at each beginning
//! ```
//! Invariants: of two copies the one with the lower id calls, so that there is one connection; a newer connection of the
//! same peer replaces the older; after a `Silent` comes a `Connected` before anything else of that peer. Who calls rests longer
//! and longer between attempts while none leads to a connection that holds.

use super::connection::{self, ConnectionError, HANDSHAKE_LIMIT, Pen, Stream};
use super::endpoint::Shared;
use super::hello::{Copies, Party};
use super::line::Line;
use super::packet::Packet;
use super::queue::Queue;
use super::volume::{Event, Volume};
use crate::protocol::HEARTBEAT;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Between two attempts to connect, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// And at last: with the time that an attempt may take, a node that is back is found within seconds.
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// A connection that held for so long has done some good, and may be followed by another one at once.
const HELD: Duration = Duration::from_secs(1);

/// What is known of a peer.
pub(super) struct Peer {
    pub party: Party,
    pub address: SocketAddr,
    pub queue: Queue,
    pub arrivals: Arrivals,
    /// Whoever takes this one's place goes on with it.
    pub pace: Arc<Mutex<Pace>>,
}

/// How often a peer is called.
#[derive(Default)]
pub(super) struct Pace {
    connected: Option<Instant>,
    pause: Duration,
}

impl Pace {
    /// How long to rest before the attempt that would begin now.
    pub fn rest(&mut self, now: Instant) -> Duration {
        let held = self.connected.take().is_some_and(|since| now.duration_since(since) >= HELD);
        let pause = if held { Duration::ZERO } else { self.pause };
        self.pause = (pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
        pause
    }

    /// The attempt has led to a connection.
    pub fn has_connected(&mut self, now: Instant) {
        self.connected = Some(now);
    }
}

impl Peer {
    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The newest connection that a peer has opened and nobody has taken; an older one is closed.
#[derive(Default)]
pub(super) struct Arrivals {
    stream: Mutex<Option<Stream>>,
    arrived: Notify,
}

impl Arrivals {
    fn slot(&self) -> MutexGuard<'_, Option<Stream>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn put(&self, stream: Stream) {
        *self.slot() = Some(stream);
        self.arrived.notify_one();
    }

    async fn take(&self) -> Stream {
        loop {
            let stream = self.slot().take();
            if let Some(stream) = stream {
                return stream;
            }
            self.arrived.notified().await;
        }
    }
}

/// When something was heard last, and whether the silence since was reported.
struct Silence {
    since: Instant,
    reported: bool,
}

/// Until it is aborted.
pub(super) async fn run(shared: Arc<Shared>, volume: Arc<Volume>, peer: Arc<Peer>) {
    let copy = peer.party.copy;
    let mut silence = Silence { since: Instant::now(), reported: false };
    let mut newer = None;
    loop {
        let stream = match newer.take() {
            Some(stream) => stream,
            None => next(&shared, &volume, &peer, &mut silence).await,
        };
        let ended = tokio::select! {
            ended = exchange(stream, &volume, &peer, shared.silence) => ended,
            stream = peer.arrivals.take() => {
                newer = Some(stream);
                ConnectionError::Replaced
            }
        };
        shared.log.warn(&format!("volume {}, {}: the connection has ended: {ended}", volume.id, peer.party));
        silence = Silence { since: Instant::now(), reported: matches!(ended, ConnectionError::Silent) };
        if silence.reported {
            volume.tell(Event::Silent(copy)).await;
        }
    }
}

/// The next connection; reports a silence that lasts until then.
async fn next(shared: &Shared, volume: &Volume, peer: &Peer, silence: &mut Silence) -> Stream {
    let connect = async {
        if volume.here.copy < peer.party.copy {
            dial_until_connected(shared, volume, peer).await
        } else {
            peer.arrivals.take().await
        }
    };
    tokio::pin!(connect);
    loop {
        tokio::select! {
            stream = &mut connect => return stream,
            () = sleep_until(silence.since + shared.silence), if !silence.reported => {
                silence.reported = true;
                volume.tell(Event::Silent(peer.party.copy)).await;
            }
        }
    }
}

async fn dial_until_connected(shared: &Shared, volume: &Volume, peer: &Peer) -> Stream {
    loop {
        // Not under the lock.
        let rest = peer.pace().rest(Instant::now());
        sleep(rest).await;
        let attempt = timeout(HANDSHAKE_LIMIT, dial(shared, volume, peer)).await;
        match attempt.unwrap_or(Err(ConnectionError::Slow)) {
            Ok(stream) => {
                peer.pace().has_connected(Instant::now());
                return stream;
            }
            Err(error) => {
                let Volume { id, .. } = volume;
                shared.log.warn(&format!("volume {id}: cannot connect to {} at {}: {error}", peer.party, peer.address));
            }
        }
    }
}

async fn dial(shared: &Shared, volume: &Volume, peer: &Peer) -> Result<Stream, ConnectionError> {
    let (mut stream, certificate) = shared.security.connect(peer.address, &peer.party.node).await?;
    let hello = volume.hello(&shared.identity, peer.party.clone());
    let copies =
        Copies { here: &volume.here, peers: std::slice::from_ref(&peer.party), generation: volume.generation() };
    connection::call(&mut stream, &hello, shared.identity.cluster(certificate.as_ref()), copies).await?;
    Ok(stream)
}

/// Until either side ends it. What arrives is read by the engine's thread, see [`Line`].
async fn exchange(stream: Stream, volume: &Volume, peer: &Peer, silence: Duration) -> ConnectionError {
    let (line, pen) = match begin(stream, volume, peer, silence) {
        Ok(begun) => begun,
        Err(error) => return error.into(),
    };
    let _open = peer.queue.open(Arc::clone(&line));
    tracing::info!(volume = %volume.id, peer = %peer.party, "connected");
    volume.tell(Event::Connected(peer.party.copy)).await;
    let ended = tokio::select! {
        ended = line.ended() => Err(ended),
        ended = transmit(volume, peer, &line, &pen, silence) => ended,
    };
    match ended {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

fn begin(stream: Stream, volume: &Volume, peer: &Peer, silence: Duration) -> std::io::Result<(Arc<Line>, Pen)> {
    let (socket, tls) = stream.into_parts()?;
    let line = Arc::new(Line::new(socket, tls, volume.id, peer.party.copy));
    Ok((Arc::clone(&line), Pen::new(line, silence)?))
}

/// A loop that ends by an error only.
enum Never {}

/// Writes what the engine's thread does not write itself, and signs of life; listens for those of the peer.
async fn transmit(
    volume: &Volume,
    peer: &Peer,
    line: &Line,
    pen: &Pen,
    silence: Duration,
) -> Result<Never, ConnectionError> {
    let heartbeat = Packet::Heartbeat.encode(volume.id);
    loop {
        let soon =
            Some(line.silent_in(silence)).filter(|left| !left.is_zero()).map_or(HEARTBEAT, |left| left.min(HEARTBEAT));
        match timeout(soon, peer.queue.take()).await {
            Ok(batch) => {
                pen.write(&batch.rest, &batch.frames).await?;
                if peer.queue.written(batch) {
                    volume.tell(Event::Room(peer.party.copy)).await;
                }
            }
            // It goes with the next batch. A full queue says as much.
            Err(_) if line.was_quiet(HEARTBEAT) => drop(peer.queue.push(heartbeat.clone())),
            Err(_) => {}
        }
        if line.is_silent(silence) {
            return Err(ConnectionError::Silent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_calls_rests_for_longer_until_a_connection_holds() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        let mut rests = |held| {
            (0..6)
                .map(|_| {
                    let rest = pace.rest(now + held).as_millis();
                    pace.has_connected(now);
                    rest
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(rests(HELD / 2), [0, 100, 200, 400, 800, 1000]);
        assert_eq!(rests(HELD), [0; 6]);
        assert_eq!(rests(HELD / 2)[..2], [100, 200]);
        // Without any connection.
        let mut pace = Pace::default();
        assert_eq!([now; 3].map(|now| pace.rest(now).as_millis()), [0, 100, 200]);
    }
}
