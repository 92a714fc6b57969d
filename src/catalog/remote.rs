//! The catalogue of another machine: a client of `proto/catalog.proto` with mutual TLS.
//!
//! # Invariants
//! * Nothing is kept here: every read asks the server.
//! * A write without an answer is *ambiguous* unless it is certain that it was not sent; it is never repeated here.
//! * Each call ends within [`CALL_LIMIT`]; the connection is made when it is needed, with the certificates that are there
//!   then, and only to a controller of the own cluster.

use super::watch::{Seen, Watch};
use super::{
    CatalogError, Change, CreateError, MAX_MESSAGE, Object, Stored, UpdateError, Version, WATCH_BACKLOG, kind,
};
use crate::protocol::Generation;
use crate::rpc::catalog as rpc;
use crate::rpc::catalog::catalogue_client::CatalogueClient;
use crate::tls::{Credentials, Expected, Role, dial};
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, ConnectError, Status};

/// How long one call may take, its connection included: a commit of the server's disk takes milliseconds.
pub const CALL_LIMIT: Duration = Duration::from_secs(5);
/// How long a connection may take to be made, its handshake included.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// A silent connection is asked whether it is alive after this time,
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// and given up when it does not answer so long: watchers then connect again.
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(3);
/// Before a watcher connects again, at first,
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// and at last.
const LAST_PAUSE: Duration = Duration::from_secs(3);

/// A client; clones share the connection.
#[derive(Clone)]
pub struct Remote {
    server: Arc<str>,
    client: CatalogueClient<Channel>,
    /// A mistake that a test must find: a write without an answer is taken for done.
    #[cfg(test)]
    pub(super) silence_is_consent: bool,
}

/// Why a call was not answered as it should be.
enum Failure {
    /// It was not sent, or not executed because of what the caller is or says.
    Refused(CatalogError),
    /// It lost a race.
    Conflict,
    /// The key of what is there.
    Exists(String),
    /// Whether it was executed is not known.
    Unknown(String),
}

impl Remote {
    /// A client of the catalogue at `server` ("host:port"). Does not connect yet, so the server may start later.
    pub fn new(server: &str, credentials: Arc<Credentials>) -> Self {
        let server: Arc<str> = server.into();
        let target = Arc::clone(&server);
        // The address is for the HTTP header only: the connector knows where to go.
        let endpoint = Endpoint::from_static("http://catalogue")
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_LIMIT)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (target, credentials) = (Arc::clone(&target), Arc::clone(&credentials));
            async move {
                let slow = || io::Error::new(io::ErrorKind::TimedOut, "it does not answer");
                let expected = Expected { role: Some(Role::Controller), name: None };
                let connected = timeout(CONNECT_LIMIT, dial(&target, &credentials, expected)).await;
                connected.map_err(|_| slow())?.map(TokioIo::new)
            }
        }));
        let client =
            CatalogueClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        Self {
            server,
            client,
            #[cfg(test)]
            silence_is_consent: false,
        }
    }

    /// The object with this key.
    pub async fn get<T: Object>(&self, key: &str) -> Result<Option<Stored<T>>, CatalogError> {
        let request = rpc::GetRequest { kind: T::KIND.into(), key: key.into() };
        let mut client = self.client.clone();
        let answer = self.read(client.get(request)).await?;
        answer.into_inner().stored.map(|stored| self.decode(stored)).transpose()
    }

    /// The object with this name.
    pub async fn find<T: Object>(&self, name: &str) -> Result<Option<Stored<T>>, CatalogError> {
        let request = rpc::FindRequest { kind: T::KIND.into(), name: name.into() };
        let mut client = self.client.clone();
        let answer = self.read(client.find(request)).await?;
        answer.into_inner().stored.map(|stored| self.decode(stored)).transpose()
    }

    /// All objects of the kind, ordered by key.
    pub async fn list<T: Object>(&self) -> Result<Vec<Stored<T>>, CatalogError> {
        let mut client = self.client.clone();
        let listed = async move {
            let mut stream = client.list(rpc::ListRequest { kind: T::KIND.into() }).await?.into_inner();
            let mut objects = Vec::new();
            while let Some(stored) = stream.message().await? {
                objects.push(stored);
            }
            Ok(objects)
        };
        self.read(listed).await?.into_iter().map(|stored| self.decode(stored)).collect()
    }

    /// Changes from its first [`Seen::FellBehind`] on.
    pub fn watch(&self) -> Watch {
        let (send, receive) = mpsc::channel(WATCH_BACKLOG);
        let task = tokio::spawn(watch(self.client.clone(), send));
        Watch::remote(receive, task.abort_handle())
    }

    /// Puts a new object in.
    pub async fn create<T: Object>(&self, object: T) -> Result<Stored<T>, CreateError> {
        let json = self.encode(&object)?;
        let mut client = self.client.clone();
        let answer = self.call(client.create(rpc::CreateRequest { kind: T::KIND.into(), object: json })).await;
        let (kind, key) = (T::KIND, object.key());
        match answer {
            Ok(answer) => Ok(Stored { version: Version(answer.into_inner().version), object }),
            Err(Failure::Exists(key)) => Err(CreateError::Exists { kind, key }),
            Err(Failure::Refused(error)) => Err(error.into()),
            Err(Failure::Conflict) => Err(CreateError::Ambiguous { kind, key, reason: "a mistaken answer".into() }),
            Err(Failure::Unknown(reason)) => Err(CreateError::Ambiguous { kind, key, reason }),
        }
    }

    /// Replaces the object that was read as `stored.version` by `stored.object`.
    pub async fn update<T: Object>(&self, stored: Stored<T>) -> Result<Stored<T>, UpdateError> {
        let sent = rpc::Stored { version: stored.version.0, object: self.encode(&stored.object)? };
        let mut client = self.client.clone();
        let request = rpc::UpdateRequest { kind: T::KIND.into(), stored: Some(sent) };
        let answer = self.call(client.update(request)).await;
        #[cfg(test)]
        if self.silence_is_consent && matches!(answer, Err(Failure::Unknown(_))) {
            return Ok(stored);
        }
        let answer = answer.map_err(|failure| failure.of_update::<T>(stored.object.key()))?;
        Ok(Stored { version: Version(answer.into_inner().version), ..stored })
    }

    /// Takes out the object that was read as `stored.version`. One that is gone already is success.
    pub async fn delete<T: Object>(&self, stored: &Stored<T>) -> Result<(), UpdateError> {
        let sent = rpc::Stored { version: stored.version.0, object: self.encode(&stored.object)? };
        let mut client = self.client.clone();
        let request = rpc::DeleteRequest { kind: T::KIND.into(), stored: Some(sent) };
        let answer = self.call(client.delete(request)).await;
        answer.map_err(|failure| failure.of_update::<T>(stored.object.key()))?;
        Ok(())
    }

    /// What another machine does not do for this one.
    pub(super) fn not_here(&self, reason: &str) -> CatalogError {
        CatalogError::Refused { server: self.server.to_string(), reason: reason.to_owned() }
    }

    /// The catalogue's generation.
    pub async fn generation(&self) -> Result<Generation, CatalogError> {
        let mut client = self.client.clone();
        let answer = self.read(client.get_generation(rpc::GetGenerationRequest {})).await?;
        Ok(Generation(answer.into_inner().generation))
    }

    async fn call<R>(&self, call: impl Future<Output = Result<R, Status>>) -> Result<R, Failure> {
        let limit = CALL_LIMIT.as_secs();
        let answer = timeout(CALL_LIMIT, call).await;
        let answer = answer.map_err(|_| Failure::Unknown(format!("no answer within {limit} s")))?;
        answer.map_err(|status| self.failure(&status))
    }

    /// A call that changes nothing: that it was not answered is all there is to know.
    async fn read<R>(&self, call: impl Future<Output = Result<R, Status>>) -> Result<R, CatalogError> {
        self.call(call).await.map_err(|failure| match failure {
            Failure::Refused(error) => error,
            Failure::Unknown(reason) | Failure::Exists(reason) => self.unreachable(reason),
            Failure::Conflict => self.unreachable("a mistaken answer".into()),
        })
    }

    fn failure(&self, status: &Status) -> Failure {
        let text = status.message().to_owned();
        match status.code() {
            Code::Aborted => Failure::Conflict,
            Code::AlreadyExists => Failure::Exists(String::from_utf8_lossy(status.details()).into_owned()),
            Code::PermissionDenied | Code::InvalidArgument | Code::Unauthenticated | Code::Unimplemented => {
                Failure::Refused(CatalogError::Refused { server: self.server.to_string(), reason: text })
            }
            _ => match not_sent(status) {
                Some(reason) => Failure::Refused(self.unreachable(reason)),
                None => Failure::Unknown(text),
            },
        }
    }

    fn unreachable(&self, reason: String) -> CatalogError {
        CatalogError::Unreachable { server: self.server.to_string(), reason }
    }

    fn encode<T: Object>(&self, object: &T) -> Result<Vec<u8>, CatalogError> {
        let refused = |error: serde_json::Error| CatalogError::Refused {
            server: self.server.to_string(),
            reason: format!("the {} {} cannot be encoded: {error}", T::KIND, object.key()),
        };
        serde_json::to_vec(object).map_err(refused)
    }

    fn decode<T: Object>(&self, stored: rpc::Stored) -> Result<Stored<T>, CatalogError> {
        let refused = |error: serde_json::Error| CatalogError::Refused {
            server: self.server.to_string(),
            reason: format!("it has a {} that this version does not understand: {error}", T::KIND),
        };
        let object = serde_json::from_slice(&stored.object).map_err(refused)?;
        Ok(Stored { version: Version(stored.version), object })
    }
}

impl Failure {
    fn of_update<T: Object>(self, key: String) -> UpdateError {
        let kind = T::KIND;
        match self {
            Self::Refused(error) => error.into(),
            Self::Conflict => UpdateError::Conflict { kind, key },
            Self::Unknown(reason) | Self::Exists(reason) => UpdateError::Ambiguous { kind, key, reason },
        }
    }
}

/// Why it is certain that a call was not sent, if it is: there was no connection.
fn not_sent(status: &Status) -> Option<String> {
    let mut next = status.source();
    while let Some(error) = next {
        if let Some(ConnectError(inner)) = error.downcast_ref::<ConnectError>() {
            return Some(inner.to_string());
        }
        next = error.source();
    }
    None
}

/// Until nobody listens: watches, and begins again whenever the stream ends.
async fn watch(mut client: CatalogueClient<Channel>, send: mpsc::Sender<Seen>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match client.watch(rpc::WatchRequest {}).await {
            Ok(stream) => forward(stream.into_inner(), &send, &mut pause).await,
            Err(status) => Some(status),
        };
        if send.is_closed() {
            return;
        }
        tracing::debug!(?error, "the watch of the catalogue ended and begins again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

async fn forward(
    mut stream: tonic::Streaming<rpc::WatchResponse>,
    send: &mpsc::Sender<Seen>,
    pause: &mut Duration,
) -> Option<Status> {
    use rpc::watch_response::Event;
    loop {
        let message = match stream.message().await {
            Ok(message) => message?,
            Err(status) => return Some(status),
        };
        *pause = FIRST_PAUSE;
        let seen = match message.event {
            // What happened before is not known.
            Some(Event::Started(_) | Event::FellBehind(_)) => Seen::FellBehind,
            Some(Event::Changed(changed)) => match kind(&changed.kind) {
                Some(kind) => Seen::Changed(Change { kind, key: changed.key }),
                None => continue,
            },
            None => continue,
        };
        send.send(seen).await.ok()?;
    }
}
