//! A node's end of all connections between replicas: listens, lets peers in, and knows which volumes are open here.
//!
//! Invariants: a caller is handed to a volume only after its whole handshake; at most [`MAX_HANDSHAKES`] callers are in
//! theirs; a refusal is logged here, once a minute if it is repeated, and disturbs no other connection.

use super::connection::{self, ConnectionError, HANDSHAKE_LIMIT, Stream, prepare};
use super::header::MAGIC;
use super::hello::{Cluster, Copies, ENCRYPTED, Hello, PIECES, Party, Rejection};
use super::volume::{Event, Session, Volume};
use crate::protocol::{Generation, SILENCE};
use crate::tls::{Credentials, Expected, HandshakeError, Identity, Name, Role, peer_identity};
use crate::volume::{ClusterId, InstanceId, VolumeId};
use rustls::pki_types::ServerName;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Callers that may be in their handshake at a time: every volume's peer after a node's start, and strangers get no more
/// than so many times some kilobytes. The next wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 128;
/// Before the next attempt when a connection cannot be accepted (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a node may take to answer a call at all: a packet that is lost is sent again after a second.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// The first byte of a TLS connection: a handshake record.
const TLS_FIRST_BYTE: u8 = 0x16;
/// The same sentence is logged again after this time.
const LOG_AGAIN: Duration = Duration::from_secs(60);
/// Different sentences that are remembered; then all are forgotten.
const MAX_SENTENCES: usize = 256;

/// Whether connections are encrypted: a setting of the whole cluster.
#[derive(Clone, Debug)]
pub enum Security {
    /// TLS with these certificates, which also say who this node is.
    Tls(Arc<Credentials>),
    /// `encryption: off`, for links that nobody else can reach: the peer is believed what it says.
    Off {
        /// This cluster.
        cluster: ClusterId,
        /// This node.
        node: Name,
    },
}

impl Security {
    fn identification(&self) -> Identification {
        match self {
            Self::Tls(credentials) => {
                let Identity { cluster, name, .. } = credentials.current().own().clone();
                Identification { cluster, node: name, encrypted: true }
            }
            Self::Off { cluster, node } => Identification { cluster: *cluster, node: node.clone(), encrypted: false },
        }
    }

    /// Calls a node.
    pub(super) async fn connect(
        &self,
        address: SocketAddr,
        node: &Name,
    ) -> Result<(Stream, Option<Identity>), ConnectionError> {
        let connected = timeout(CONNECT_LIMIT, TcpStream::connect(address)).await;
        let socket = connected.map_err(|_| ConnectionError::Unreachable)??;
        prepare(&socket)?;
        let Self::Tls(credentials) = self else { return Ok((Stream::Plain(socket), None)) };
        let expected = Expected { role: Some(Role::Node), name: Some(node.clone()) };
        let connector = TlsConnector::from(credentials.current().client(expected)?);
        let name = ServerName::IpAddress(address.ip().into());
        let stream = connector.connect(name, socket).await.map_err(HandshakeError::from)?;
        let certificate = peer_identity(stream.get_ref().1);
        Ok((Stream::Encrypted(Box::new(stream.into())), certificate))
    }

    /// Takes a call.
    async fn accept(&self, socket: TcpStream) -> Result<(Stream, Option<Identity>), ConnectionError> {
        prepare(&socket)?;
        let mut first = [0];
        if socket.peek(&mut first).await? == 0 {
            return Err(ConnectionError::Closed);
        }
        match self {
            Self::Off { .. } if first[0] == TLS_FIRST_BYTE => Err(Rejection::Encryption { theirs: true }.into()),
            Self::Off { .. } => Ok((Stream::Plain(socket), None)),
            // Whoever speaks in the clear is told why it is not let in, whatever it says.
            Self::Tls(_) if first[0] == MAGIC[0] => {
                let mut stream = Stream::Plain(socket);
                let hello = connection::listen(&mut stream).await?;
                let rejection = Rejection::Encryption { theirs: false };
                Err(connection::refuse(&mut stream, hello.volume, rejection).await)
            }
            Self::Tls(credentials) => {
                let acceptor = TlsAcceptor::from(credentials.current().server(Some(Role::Node))?);
                let stream = acceptor.accept(socket).await.map_err(HandshakeError::from)?;
                let certificate = peer_identity(stream.get_ref().1);
                Ok((Stream::Encrypted(Box::new(stream.into())), certificate))
            }
        }
    }
}

/// Who this node is.
pub(super) struct Identification {
    pub cluster: ClusterId,
    node: Name,
    encrypted: bool,
}

impl Identification {
    pub fn features(&self) -> u64 {
        if self.encrypted { PIECES | ENCRYPTED } else { PIECES }
    }

    pub fn cluster<'a>(&self, certificate: Option<&'a Identity>) -> Cluster<'a> {
        Cluster { id: self.cluster, encrypted: self.encrypted, certificate }
    }
}

/// Sentences that were logged not long ago.
#[derive(Default)]
pub(super) struct Log(Mutex<BTreeMap<String, Instant>>);

impl Log {
    pub fn warn(&self, sentence: &str) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if said.get(sentence).is_some_and(|at| now.duration_since(*at) < LOG_AGAIN) {
            return;
        }
        if said.len() >= MAX_SENTENCES {
            said.clear();
        }
        said.insert(sentence.into(), now);
        drop(said);
        tracing::warn!("{sentence}");
    }
}

/// What all connections of a node share.
pub(super) struct Shared {
    pub security: Security,
    pub identity: Identification,
    pub runtime: Handle,
    pub log: Log,
    /// For how long a peer may neither send nor take a byte.
    pub silence: Duration,
    volumes: Mutex<BTreeMap<VolumeId, Arc<Volume>>>,
}

impl Shared {
    fn volumes(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Arc<Volume>>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session of this volume was dropped.
    pub fn forget(&self, volume: &Arc<Volume>) {
        let mut volumes = self.volumes();
        if volumes.get(&volume.id).is_some_and(|known| Arc::ptr_eq(known, volume)) {
            volumes.remove(&volume.id);
        }
    }
}

/// The volume is open on this node already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("volume {0} is open already")]
pub struct AlreadyOpen(pub VolumeId);

/// See the module.
pub struct Endpoint {
    shared: Arc<Shared>,
    accepting: AbortHandle,
}

impl Endpoint {
    /// Takes calls on this socket. Must be called on a tokio runtime, which then carries all connections.
    pub fn listen(listener: TcpListener, security: Security) -> Self {
        Self::listen_with(listener, security, SILENCE)
    }

    pub(super) fn listen_with(listener: TcpListener, security: Security, silence: Duration) -> Self {
        let (identity, runtime) = (security.identification(), Handle::current());
        let (log, volumes) = Default::default();
        let shared = Arc::new(Shared { security, identity, runtime, log, silence, volumes });
        let accepting = tokio::spawn(accept_all(Arc::clone(&shared), listener)).abort_handle();
        Self { shared, accepting }
    }

    /// Opens a volume's copy that is on this node: from now on its peers may connect. Returns what happens to it, too.
    pub fn open(
        &self,
        volume: VolumeId,
        copy: InstanceId,
        generation: Generation,
    ) -> Result<(Session, mpsc::Receiver<Event>), AlreadyOpen> {
        let here = Party { node: self.shared.identity.node.clone(), copy };
        let (opened, events) = Volume::new(volume, here, generation);
        let mut volumes = self.shared.volumes();
        if volumes.contains_key(&volume) {
            return Err(AlreadyOpen(volume));
        }
        volumes.insert(volume, Arc::clone(&opened));
        Ok((Session::new(Arc::clone(&self.shared), opened), events))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept_all(shared: Arc<Shared>, listener: TcpListener) {
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        if handshakes.len() >= MAX_HANDSHAKES {
            handshakes.join_next().await;
        }
        match listener.accept().await {
            Ok((socket, from)) => drop(handshakes.spawn(admit(Arc::clone(&shared), socket, from))),
            Err(error) => {
                shared.log.warn(&format!("cannot accept a connection: {error}"));
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A caller's handshake, and what became of it.
async fn admit(shared: Arc<Shared>, socket: TcpStream, from: SocketAddr) {
    let attempt = timeout(HANDSHAKE_LIMIT, handshake(&shared, socket)).await;
    if let Err(error) = attempt.unwrap_or(Err(ConnectionError::Slow)) {
        shared.log.warn(&format!("a connection from {} was not let in: {error}", from.ip()));
    }
}

async fn handshake(shared: &Shared, socket: TcpStream) -> Result<(), ConnectionError> {
    let (mut stream, certificate) = shared.security.accept(socket).await?;
    let hello = connection::listen(&mut stream).await?;
    let volume = match find(shared, &hello, certificate.as_ref()) {
        Ok(volume) => volume,
        Err(rejection) => return Err(connection::refuse(&mut stream, hello.volume, rejection).await),
    };
    let ours = volume.hello(&shared.identity, hello.from.clone());
    connection::welcome(&mut stream, &ours, hello.nonce).await?;
    let peer = volume.peer(hello.from.copy).ok_or(Rejection::Stranger(hello.from))?;
    peer.arrivals.put(stream);
    Ok(())
}

/// The volume that a caller may talk about.
fn find(shared: &Shared, hello: &Hello, certificate: Option<&Identity>) -> Result<Arc<Volume>, Rejection> {
    shared.identity.cluster(certificate).check(hello)?;
    let volume = shared.volumes().get(&hello.volume).cloned().ok_or(Rejection::Volume(hello.volume))?;
    let (peers, generation) = (volume.parties(), volume.generation());
    Copies { here: &volume.here, peers: &peers, generation }.check(hello)?;
    Ok(volume)
}
