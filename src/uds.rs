//! Unix sockets of our services: private from the first moment, never stolen from a living server.

use hyper_util::rt::TokioIo;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint, Uri};

/// Connections that may wait to be accepted: kubelet and a few sidecars, with room.
const BACKLOG: i32 = 128;

/// Why a socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("{0} is served by another process; stop it, or use another path")]
    InUse(PathBuf),
    /// There is a file that is no socket.
    #[error("{0} exists and is no socket; remove it, or use another path")]
    NoSocket(PathBuf),
    /// The system said no.
    #[error(
        "{path} cannot be made a socket: {source}; does its directory exist, and is the path shorter than 108 bytes?"
    )]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens on `path` for root only. A socket that nobody answers is replaced.
pub fn listen_on(path: &Path) -> Result<UnixListener, SocketError> {
    let at = |source| SocketError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NoSocket(path.to_owned())),
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(at)?,
            Err(e) => return Err(at(e)),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(at(e)),
    }
    let nix = |e: nix::Error| at(e.into());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(nix)?;
    // Before bind: the file inherits this mode, so there is no moment in which others could connect.
    fchmod(fd.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR).map_err(nix)?;
    let address = UnixAddr::new(path).map_err(nix)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).map_err(|errno| match errno {
        nix::Error::EADDRINUSE => SocketError::InUse(path.to_owned()),
        errno => nix(errno),
    })?;
    listen(&fd, Backlog::new(BACKLOG).map_err(nix)?).map_err(nix)?;
    UnixListener::from_std(std::os::unix::net::UnixListener::from(fd)).map_err(at)
}

/// A channel to a service on `path`; it connects at the first call, and again after every loss.
pub fn channel(path: &Path) -> Channel {
    endpoint().connect_with_connector_lazy(connector(path))
}

/// As [`channel`], but connects now.
///
/// # Errors
/// Nobody listens there.
pub async fn connect(path: &Path) -> Result<Channel, tonic::transport::Error> {
    endpoint().connect_with_connector(connector(path)).await
}

/// The address is for the HTTP header only: the connector knows the path.
fn endpoint() -> Endpoint {
    Endpoint::from_static("http://localhost")
}

fn connector(
    path: &Path,
) -> impl tower::Service<Uri, Response = TokioIo<UnixStream>, Error = io::Error, Future: Send> + Send + 'static {
    let path = path.to_owned();
    tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::Builder::new().prefix("tandem-uds").tempdir().expect("temporary directory");
        let path = dir.path().join("x.sock");
        let first = listen_on(&path).expect("free");
        assert_eq!(fs::metadata(&path).expect("socket").permissions().mode() & 0o777, 0o600);
        assert!(matches!(listen_on(&path), Err(SocketError::InUse(_))));
        drop(first);
        listen_on(&path).expect("stale");
        let file = dir.path().join("file");
        fs::write(&file, "x").expect("file");
        assert!(matches!(listen_on(&file), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&file).expect("there"), b"x");
        assert!(matches!(listen_on(&dir.path().join("no/such.sock")), Err(SocketError::Io { .. })));
        let long = dir.path().join("x".repeat(120));
        assert!(listen_on(&long).expect_err("too long").to_string().contains("shorter than 108 bytes"));
    }
}
