//! One connection: sockets, TLS, the handshake's exchange, and the writing of what the engine's thread leaves.
//!
//! Invariants: a stranger makes nothing larger than a hello allocated; whoever sends or takes no byte for as long
//! as a peer may be silent is given up; of what follows the handshake nothing is read here.
#![allow(unsafe_code, reason = "a descriptor is registered with the runtime beside its owner")]

use super::header::{FrameError, HEADER, Header, Kind};
use super::hello::{Cluster, Copies, Hello, Nonce, Reason, Rejection};
use super::line::{Line, PIECE};
use super::packet::{Encoded, Packet};
use crate::protocol::SILENCE;
use crate::tls::HandshakeError;
use crate::volume::VolumeId;
use bytes::Bytes;
use nix::sys::socket::{setsockopt, sockopt};
use rustls::Connection;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsStream;

/// How long a handshake may take in all: TLS on a busy core, and some lost packets.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a handshake's largest body: two names of 253 characters, and ids.
const MAX_HELLO: usize = 1024;
/// Payloads up to so many bytes are copied behind their header: one TLS record instead of two.
const COALESCED: usize = 64 << 10;

/// A byte stream, encrypted or not.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection until its handshake is over.
pub enum Stream {
    /// `encryption: off`.
    Plain(TcpStream),
    /// TLS.
    Encrypted(Box<TlsStream<TcpStream>>),
}

impl Stream {
    fn bytes(&mut self) -> &mut dyn Duplex {
        match self {
            Self::Plain(socket) => socket,
            Self::Encrypted(stream) => stream,
        }
    }

    /// Its socket, which does not block, and its encryption with what has come behind the handshake.
    pub fn into_parts(self) -> std::io::Result<(std::net::TcpStream, Option<Connection>)> {
        let (socket, tls) = match self {
            Self::Plain(socket) => (socket, None),
            Self::Encrypted(stream) => match *stream {
                TlsStream::Client(stream) => {
                    let (socket, tls) = stream.into_inner();
                    (socket, Some(tls.into()))
                }
                TlsStream::Server(stream) => {
                    let (socket, tls) = stream.into_inner();
                    (socket, Some(tls.into()))
                }
            },
        };
        Ok((socket.into_std()?, tls))
    }
}

/// Why a connection ended or did not begin.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The other side has closed it.
    #[error("the other side has closed the connection")]
    Closed,
    /// No byte for as long as a peer may be silent.
    #[error("it neither sends nor takes a byte")]
    Silent,
    /// Its machine or the way to it is down.
    #[error("nothing answers there")]
    Unreachable,
    /// The handshake took too long.
    #[error("no handshake within {} s", HANDSHAKE_LIMIT.as_secs())]
    Slow,
    /// The system.
    #[error("{0}")]
    System(std::io::Error),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] HandshakeError),
    /// The configuration cannot be made from the certificates.
    #[error("the certificates cannot be used: {0}")]
    Certificates(#[from] rustls::Error),
    /// Bytes that are none.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame out of place.
    #[error("a frame of the kind {0:?} is out of place")]
    Unexpected(Kind),
    /// A frame about another volume.
    #[error("a frame about another volume, {0}")]
    OtherVolume(VolumeId),
    /// Refused here.
    #[error("refused: {0}")]
    Rejected(#[from] Rejection),
    /// Refused there.
    #[error("the other side refuses: {0}")]
    Refused(Reason),
    /// A new connection of the same peer takes its place.
    #[error("the peer has connected anew")]
    Replaced,
}

impl From<std::io::Error> for ConnectionError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            // The kernel has given the peer up.
            std::io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::System(error),
        }
    }
}

/// Sets what every data connection has.
pub fn prepare(socket: &TcpStream) -> std::io::Result<()> {
    // A write is as late as its last packet: nothing waits for more data.
    socket.set_nodelay(true)?;
    // Later than the limit here, which says more: it ends what the kernel would keep for a peer that is gone.
    let limit = u32::try_from(2 * SILENCE.as_millis()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::TcpUserTimeout, &limit).map_err(std::io::Error::from)
}

/// Fills the buffer, and reads nothing beyond it; gives up when no byte comes for as long as a peer may be silent.
async fn fill(stream: &mut dyn Duplex, buffer: &mut [u8]) -> Result<(), ConnectionError> {
    let mut at = 0;
    while at < buffer.len() {
        match timeout(SILENCE, stream.read(&mut buffer[at..])).await.map_err(|_| ConnectionError::Silent)?? {
            0 => return Err(ConnectionError::Closed),
            read => at += read,
        }
    }
    Ok(())
}

/// The next frame of a handshake: `expected`, or that the other side refuses.
async fn read_handshake(stream: &mut Stream, expected: Kind) -> Result<Packet, ConnectionError> {
    let mut bytes = [0; HEADER];
    fill(stream.bytes(), &mut bytes).await?;
    let header = Header::decode(&bytes)?;
    if (header.kind != expected && header.kind != Kind::Refuse) || header.blocks != 0 || header.table() > MAX_HELLO {
        return Err(ConnectionError::Unexpected(header.kind));
    }
    let mut table = vec![0; header.table()];
    fill(stream.bytes(), &mut table).await?;
    match Packet::decode(&header, Bytes::from(table), Bytes::new())? {
        Packet::Refuse(reason) => Err(ConnectionError::Refused(reason)),
        packet => Ok(packet),
    }
}

/// Writes to a connection on behalf of its task, waiting for room.
pub struct Pen {
    line: AsyncFd<Arc<Line>>,
    silence: Duration,
}

impl Pen {
    /// For a connection that is given up when it takes no byte for `silence`.
    pub fn new(line: Arc<Line>, silence: Duration) -> std::io::Result<Self> {
        // Not woken by what arrives: that is the engine's.
        // SAFETY: the line's descriptor is its socket's, which stays open for as long as the line is owned here.
        let line = unsafe { AsyncFd::register_with_interest(line, Interest::WRITABLE)? };
        Ok(Self { line, silence })
    }

    /// Writes the rest of earlier frames, and frames together.
    pub async fn write(&self, rest: &[u8], frames: &[Encoded]) -> Result<(), ConnectionError> {
        self.put(rest).await?;
        let mut together = Vec::new();
        for Encoded { head, data } in frames {
            together.extend_from_slice(head);
            if data.len() <= COALESCED {
                together.extend_from_slice(data);
            } else {
                self.put(&together).await?;
                together.clear();
                self.put(data).await?;
            }
            if together.len() > COALESCED {
                self.put(&together).await?;
                together.clear();
            }
        }
        self.put(&together).await
    }

    /// Also without bytes: what the connection has kept inside.
    async fn put(&self, mut bytes: &[u8]) -> Result<(), ConnectionError> {
        loop {
            let mut room = timeout(self.silence, self.line.writable()).await.map_err(|_| ConnectionError::Silent)??;
            let taken = self.line.get_ref().write(&bytes[..bytes.len().min(PIECE)])?;
            bytes = &bytes[taken.bytes..];
            if !taken.is_all {
                room.clear_ready();
            } else if bytes.is_empty() {
                return Ok(());
            }
        }
    }
}

async fn say(stream: &mut Stream, volume: VolumeId, packet: &Packet) -> Result<(), ConnectionError> {
    let frame = packet.encode(volume);
    let stream = stream.bytes();
    let written = async {
        stream.write_all(&frame.head).await?;
        stream.flush().await
    };
    timeout(SILENCE, written).await.map_err(|_| ConnectionError::Silent)?.map_err(ConnectionError::from)
}

/// The caller's part of a handshake: `hello` is what it says of itself.
pub async fn call(
    stream: &mut Stream,
    hello: &Hello,
    cluster: Cluster<'_>,
    copies: Copies<'_>,
) -> Result<(), ConnectionError> {
    say(stream, hello.volume, &Packet::Hello(hello.clone())).await?;
    let Packet::Welcome(theirs, echo) = read_handshake(stream, Kind::Welcome).await? else {
        return Err(ConnectionError::Unexpected(Kind::Welcome));
    };
    let checked = cluster.check(&theirs).and_then(|()| copies.check(&theirs));
    let fresh = if echo == hello.nonce { Ok(()) } else { Err(Rejection::Replayed) };
    if let Err(rejection) = fresh.and(checked) {
        return Err(refuse(stream, hello.volume, rejection).await);
    }
    say(stream, hello.volume, &Packet::Confirm(theirs.nonce)).await
}

/// What a caller says first.
pub async fn listen(stream: &mut Stream) -> Result<Hello, ConnectionError> {
    match read_handshake(stream, Kind::Hello).await? {
        Packet::Hello(hello) => Ok(hello),
        _ => Err(ConnectionError::Unexpected(Kind::Hello)),
    }
}

/// The rest of the called side's part, after the caller's hello was found good.
pub async fn welcome(stream: &mut Stream, ours: &Hello, echo: Nonce) -> Result<(), ConnectionError> {
    say(stream, ours.volume, &Packet::Welcome(ours.clone(), echo)).await?;
    match read_handshake(stream, Kind::Confirm).await? {
        Packet::Confirm(echo) if echo == ours.nonce => Ok(()),
        _ => Err(refuse(stream, ours.volume, Rejection::Replayed).await),
    }
}

/// Tells the other side why not.
pub async fn refuse(stream: &mut Stream, volume: VolumeId, rejection: Rejection) -> ConnectionError {
    // Whether it hears it changes nothing.
    let _ = say(stream, volume, &Packet::Refuse(rejection.reason())).await;
    ConnectionError::Rejected(rejection)
}
