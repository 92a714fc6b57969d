//! Connections to a gRPC server for other machines: accepted, shaken hands with, and known by their certificates.
//!
//! Invariants: at most [`MAX_HANDSHAKES`] callers are in theirs and [`MAX_CONNECTIONS`] are let in; a refusal disturbs no
//! other connection.

use super::{Credentials, HandshakeError, Identity, Role, peer_identity};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// Callers that may be in their handshake at a time: a cluster's nodes after the controller's start, some at a time.
const MAX_HANDSHAKES: usize = 64;
/// Connections in all: one or two per node, and shells.
const MAX_CONNECTIONS: usize = 4096;
/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Before the next attempt when a connection cannot be accepted (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who calls, by its certificate.
#[derive(Clone)]
pub struct Caller(pub Identity);

/// A connection whose caller is known.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Caller;
    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A port at which callers with a certificate of the cluster are let in.
pub struct Port {
    /// Where.
    pub listener: TcpListener,
    /// Whose certificates count.
    pub credentials: Arc<Credentials>,
    /// As what callers come; `None`: anybody of the cluster.
    pub role: Option<Role>,
}

impl Port {
    /// Callers that were let in. Ends accepting when the stream is dropped.
    pub fn incoming(self) -> ReceiverStream<io::Result<Connection>> {
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(async move {
            tokio::select! {
                () = accept_all(Arc::new(self), &send) => {}
                () = send.closed() => {}
            }
        });
        ReceiverStream::new(receive)
    }

    async fn handshake(&self, socket: TcpStream) -> Result<(TlsStream<TcpStream>, Caller), HandshakeError> {
        socket.set_nodelay(true)?;
        let config = self.credentials.current().server(self.role);
        let config = config.map_err(|error| HandshakeError::Protocol(error.to_string()))?;
        let stream = TlsAcceptor::from(config).accept(socket).await?;
        let caller = peer_identity(stream.get_ref().1).ok_or(HandshakeError::NoCertificate)?;
        Ok((stream, Caller(caller)))
    }
}

async fn accept_all(port: Arc<Port>, send: &mpsc::Sender<io::Result<Connection>>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        if handshakes.len() >= MAX_HANDSHAKES {
            handshakes.join_next().await;
        }
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match port.listener.accept().await {
            Ok((socket, from)) => drop(handshakes.spawn(admit(Arc::clone(&port), socket, from, place, send.clone()))),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn admit(
    port: Arc<Port>,
    socket: TcpStream,
    from: SocketAddr,
    place: OwnedSemaphorePermit,
    send: mpsc::Sender<io::Result<Connection>>,
) {
    let slow = || io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long");
    let attempt = timeout(HANDSHAKE_LIMIT, port.handshake(socket)).await;
    match attempt.unwrap_or_else(|_| Err(HandshakeError::Connection(slow()))) {
        // A server that is ending takes nobody.
        Ok((stream, caller)) => drop(send.send(Ok(Connection { stream, caller, _place: place })).await),
        Err(error) => tracing::warn!(from = %from.ip(), %error, "a caller was not let in"),
    }
}
