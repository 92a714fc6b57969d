//! One connection: sockets, TLS, the handshake's exchange, and frames in and out with a limit on silence.
//!
//! Invariants: a stranger makes nothing larger than a hello allocated; whoever sends or takes no byte for as long
//! as a peer may be silent is given up; a payload is copied once on its way in, to where
//! direct I/O takes it, and never on its way out.

use super::header::{FrameError, HEADER, Header, Kind};
use super::hello::{Cluster, Copies, Hello, Nonce, Reason, Rejection};
use super::packet::{Encoded, Packet};
use super::payload::{Blocks, Payload};
use crate::protocol::{Message, SILENCE};
use crate::tls::HandshakeError;
use crate::volume::VolumeId;
use bytes::Bytes;
use nix::sys::socket::{setsockopt, sockopt};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a handshake may take in all: TLS on a busy core, and some lost packets.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a handshake's largest body: two names of 253 characters, and ids.
const MAX_HELLO: usize = 1024;
/// Bytes that are read at once: many small frames, a part of a large one.
const READ_AHEAD: usize = 64 << 10;
/// Payloads up to so many bytes are copied behind their header: one TLS record instead of two.
const COALESCED: usize = 64 << 10;

/// A byte stream, encrypted or not.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection's stream.
pub type Stream = BufReader<Box<dyn Duplex>>;

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

/// Makes frames readable from a stream.
pub fn buffered(stream: impl Duplex + 'static) -> Stream {
    BufReader::with_capacity(READ_AHEAD, Box::new(stream))
}

/// Fills the buffer; gives up when no byte comes for `silence`.
async fn fill(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    silence: Duration,
) -> Result<(), ConnectionError> {
    let mut at = 0;
    while at < buffer.len() {
        match timeout(silence, stream.read(&mut buffer[at..])).await.map_err(|_| ConnectionError::Silent)?? {
            0 => return Err(ConnectionError::Closed),
            read => at += read,
        }
    }
    Ok(())
}

async fn read_header(stream: &mut (impl AsyncRead + Unpin), silence: Duration) -> Result<Header, ConnectionError> {
    let mut bytes = [0; HEADER];
    fill(stream, &mut bytes, silence).await?;
    Ok(Header::decode(&bytes)?)
}

async fn read_rest(
    stream: &mut (impl AsyncRead + Unpin),
    header: &Header,
    silence: Duration,
) -> Result<Packet, ConnectionError> {
    let (mut table, mut data) = (vec![0; header.table()], Blocks::zeros(header.payload()));
    fill(stream, &mut table, silence).await?;
    fill(stream, data.bytes_mut(), silence).await?;
    Ok(Packet::decode(header, Bytes::from(table), data.freeze())?)
}

/// The next frame of a session about this volume: a message, or `None` for a sign of life.
pub async fn read(
    stream: &mut (impl AsyncRead + Unpin),
    volume: VolumeId,
    silence: Duration,
) -> Result<Option<(Message, Payload)>, ConnectionError> {
    let header = read_header(stream, silence).await?;
    if header.volume != volume {
        return Err(ConnectionError::OtherVolume(header.volume));
    }
    match read_rest(stream, &header, silence).await? {
        Packet::Heartbeat => Ok(None),
        Packet::Message(message, payload) => Ok(Some((message, payload))),
        Packet::Hello(_) | Packet::Welcome(..) | Packet::Confirm(_) | Packet::Refuse(_) => {
            Err(ConnectionError::Unexpected(header.kind))
        }
    }
}

/// The next frame of a handshake: `expected`, or that the other side refuses.
async fn read_handshake(stream: &mut Stream, expected: Kind) -> Result<Packet, ConnectionError> {
    let header = read_header(stream, SILENCE).await?;
    if (header.kind != expected && header.kind != Kind::Refuse) || header.blocks != 0 || header.table() > MAX_HELLO {
        return Err(ConnectionError::Unexpected(header.kind));
    }
    match read_rest(stream, &header, SILENCE).await? {
        Packet::Refuse(reason) => Err(ConnectionError::Refused(reason)),
        packet => Ok(packet),
    }
}

/// Writes what the stream takes without waiting: how many bytes, and whether these are all and none is kept inside. An error
/// shows again at the next [`write`].
pub fn write_now(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> (usize, bool) {
    let mut context = Context::from_waker(Waker::noop());
    let mut at = 0;
    while at < bytes.len() {
        match Pin::new(&mut *stream).poll_write(&mut context, &bytes[at..]) {
            Poll::Ready(Ok(written)) if written > 0 => at += written,
            Poll::Ready(_) | Poll::Pending => return (at, false),
        }
    }
    (at, matches!(Pin::new(stream).poll_flush(&mut context), Poll::Ready(Ok(()))))
}

/// Writes the rest of earlier frames, and frames together; gives up when no byte is taken for `silence`.
pub async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    rest: &[u8],
    frames: &[Encoded],
    silence: Duration,
) -> Result<(), ConnectionError> {
    put(stream, rest, silence).await?;
    let mut together = Vec::new();
    for Encoded { head, data } in frames {
        together.extend_from_slice(head);
        if data.len() <= COALESCED {
            together.extend_from_slice(data);
        } else {
            put(stream, &together, silence).await?;
            together.clear();
            put(stream, data, silence).await?;
        }
        if together.len() > COALESCED {
            put(stream, &together, silence).await?;
            together.clear();
        }
    }
    put(stream, &together, silence).await?;
    timeout(silence, stream.flush()).await.map_err(|_| ConnectionError::Silent)?.map_err(ConnectionError::from)
}

async fn put(
    stream: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    silence: Duration,
) -> Result<(), ConnectionError> {
    while !bytes.is_empty() {
        match timeout(silence, stream.write(bytes)).await.map_err(|_| ConnectionError::Silent)?? {
            0 => return Err(ConnectionError::Closed),
            written => bytes = &bytes[written..],
        }
    }
    Ok(())
}

async fn say(stream: &mut Stream, volume: VolumeId, packet: &Packet) -> Result<(), ConnectionError> {
    write(stream, &[], &[packet.encode(volume)], SILENCE).await
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
