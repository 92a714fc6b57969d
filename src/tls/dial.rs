//! Calls of another machine's gRPC server.
//!
//! Invariants: each connection is made with the certificates that are there then; whoever answers must be who was called;
//! a call that found no connection was certainly not sent.

use super::{Credentials, Expected, HandshakeError};
use rustls::pki_types::ServerName;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Bytes of a server's first word that are read at once: its HTTP/2 settings.
const FIRST_WORD: usize = 256;

/// Connects to `server` ("host:port"), shakes hands, and waits for the server's first word: in TLS 1.3 a client learns only then whether
/// it is let in. How long that may take is the caller's to say.
pub async fn dial(
    server: &str,
    credentials: &Credentials,
    expected: Expected,
) -> io::Result<impl AsyncRead + AsyncWrite + Send + use<>> {
    let socket = TcpStream::connect(server).await?;
    socket.set_nodelay(true)?;
    let config = credentials.current().client(expected).map_err(io::Error::other)?;
    let name = ServerName::IpAddress(socket.peer_addr()?.ip().into());
    let refused = |error| io::Error::other(HandshakeError::from(error));
    let mut stream = TlsConnector::from(config).connect(name, socket).await.map_err(refused)?;
    let mut word = vec![0; FIRST_WORD];
    let count = stream.read(&mut word).await.map_err(refused)?;
    if count == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has closed the connection"));
    }
    word.truncate(count);
    let (reader, writer) = tokio::io::split(stream);
    Ok(tokio::io::join(io::Cursor::new(word).chain(reader), writer))
}
