//! The control socket of the process that carries I/O, as a client sees it.
//!
//! Invariants: the connection is made when it is needed and made again when the replica was restarted; what was asked is
//! level-triggered, so an answer that never came ([`ControlError::Unknown`]) is asked for again, never guessed.

use crate::catalog::NodeName;
use crate::crash::crash_point;
use crate::rpc::control::replica_client::ReplicaClient;
use crate::tls::{Credentials, Expected, Role, dial};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// The generated client.
pub type Client = ReplicaClient<Channel>;

/// Longest wait for one answer: longer than any call takes that is not stuck, shorter than a person's patience.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for the connection: a replica that restarts listens again within a second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Another machine that says nothing is asked whether it is there after this time,
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// and given up when it does not answer so long: who provisions repeats its call after 15 s.
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(3);
/// Bytes of the largest answer: 100,000 volumes with their descriptors.
const LARGEST_ANSWER: usize = 256 << 20;

/// A client of the control socket; clones share the connection.
#[derive(Clone, Debug)]
pub struct Control {
    client: Client,
    /// The other machine that it is on; for messages.
    machine: Option<NodeName>,
}

/// What the replica answered instead of doing it. The texts are its own sentences.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Whether it happened is not known; ask again.
    #[error("the replica did not answer: {0}; repeat the call, it is answered when the replica is back")]
    Unknown(String),
    /// What was named does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The pool cannot promise the bytes, or another limit is reached.
    #[error("{0}")]
    NoRoom(String),
    /// It is in use or in the wrong state.
    #[error("{0}")]
    InUse(String),
    /// It makes no sense to the replica.
    #[error("{0}")]
    Refused(String),
}

impl From<Status> for ControlError {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound => Self::NotFound(message),
            Code::ResourceExhausted => Self::NoRoom(message),
            Code::FailedPrecondition => Self::InUse(message),
            Code::InvalidArgument | Code::OutOfRange => Self::Refused(message),
            // Everything else may come from the transport, after the replica did it.
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Aborted
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
            | Code::Unauthenticated => Self::Unknown(message),
        }
    }
}

impl Control {
    /// A client of `socket`. Does not connect yet, so the replica may start later.
    pub fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        // The address is never used; HTTP wants one, and "localhost" is what every gRPC server accepts as authority.
        let endpoint =
            Endpoint::from_static("http://localhost").timeout(ANSWER_TIMEOUT).connect_timeout(CONNECT_TIMEOUT);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move {
                let connected = UnixStream::connect(&socket).await;
                let named = |error: std::io::Error| {
                    std::io::Error::new(error.kind(), format!("{} cannot be connected: {error}", socket.display()))
                };
                connected.map(TokioIo::new).map_err(named)
            }
        }));
        Self { client: ReplicaClient::new(channel).max_decoding_message_size(LARGEST_ANSWER), machine: None }
    }

    /// A client of the replica of another machine. Does not connect yet, so that machine may start later.
    pub fn remote(machine: NodeName, address: SocketAddr, credentials: Arc<Credentials>) -> Self {
        let endpoint = Endpoint::from_static("http://localhost")
            .timeout(ANSWER_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_LIMIT)
            .keep_alive_while_idle(true);
        // A name that is none in a certificate is nobody's.
        let expected = Expected { role: Some(Role::Node), name: machine.0.parse().ok() };
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (credentials, expected) = (Arc::clone(&credentials), expected.clone());
            async move {
                let connected =
                    tokio::time::timeout(CONNECT_TIMEOUT, dial(&address.to_string(), &credentials, expected)).await;
                let connected = connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                let named = |error: std::io::Error| {
                    std::io::Error::new(error.kind(), format!("{address} cannot be connected: {error}"))
                };
                connected.map(TokioIo::new).map_err(named)
            }
        }));
        let client = ReplicaClient::new(channel).max_decoding_message_size(LARGEST_ANSWER);
        Self { client, machine: Some(machine) }
    }

    /// For one call: generated clients want to be owned, and cloning is cheap.
    pub fn client(&self) -> Client {
        crash_point("csi.call");
        self.client.clone()
    }

    /// What a failed call means; where the answer never came, from whom.
    pub fn refusal(&self, status: Status) -> ControlError {
        match (ControlError::from(status), &self.machine) {
            (ControlError::Unknown(reason), Some(machine)) => {
                ControlError::Unknown(format!("node {machine}: {reason}"))
            }
            (error, _) => error,
        }
    }
}
