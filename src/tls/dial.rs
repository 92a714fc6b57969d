//! Calls of another machine's gRPC server.
//!
//! Invariants: each connection is made with the certificates that are there then; whoever answers must be who was called.

use super::{Credentials, Expected, HandshakeError};
use rustls::pki_types::ServerName;
use std::io;
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Connects to `server` and shakes hands. How long that may take is the caller's to say.
pub async fn dial(
    server: impl ToSocketAddrs,
    credentials: &Credentials,
    expected: Expected,
) -> io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(server).await?;
    socket.set_nodelay(true)?;
    let config = credentials.current().client(expected).map_err(io::Error::other)?;
    let name = ServerName::IpAddress(socket.peer_addr()?.ip().into());
    let connected = TlsConnector::from(config).connect(name, socket).await;
    connected.map_err(|error| io::Error::other(HandshakeError::from(error)))
}
