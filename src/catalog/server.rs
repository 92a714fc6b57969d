//! The catalogue for other machines: `proto/catalog.proto` over the embedded one, with mutual TLS.
//!
//! # Invariants
//! * Nobody without a certificate of the cluster gets as far as a call; what a caller may write is checked against the
//!   object that its compare-and-swap then replaces ([`access`](super::access)).
//! * Certificates are read again when their files change; connections that are open go on.
//! * Handshakes, connections, calls, messages and what a slow watcher has not read are bounded.

use super::access::{Guarded, Write, may};
use super::embedded::Embedded;
use super::{
    CatalogError, CreateError, GroupSnapshot, MAX_OBJECT, Node, Object, Seen, Snapshot, Stored, UpdateError, Version,
    Volume, VolumeConfiguration,
};
use crate::crash::crash_point;
use crate::rpc::catalog as rpc;
use crate::rpc::catalog::catalogue_server::{Catalogue, CatalogueServer};
use crate::tls::{Caller, Credentials, Identity, Port};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

/// Calls of one connection at a time; more wait in the caller.
const MAX_CALLS: usize = 32;
/// Messages of a stream that a slow reader has not taken.
const STREAM_DEPTH: usize = 16;
/// A connection is asked whether it is alive after this time without a sign of life,
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// and has so long to answer.
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(5);

/// Serves the catalogue until `stop`; then watchers are sent away and calls under way end.
///
/// # Errors
/// The transport gave up.
pub async fn serve(
    catalog: Embedded,
    listener: TcpListener,
    credentials: Arc<Credentials>,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let (stopping, stopped) = watch::channel(false);
    let service = CatalogueServer::new(Service { catalog, stopped })
        .max_decoding_message_size(super::MAX_MESSAGE)
        .max_encoding_message_size(super::MAX_MESSAGE);
    let signal = async move {
        stop.await;
        stopping.send_replace(true);
    };
    tonic::transport::Server::builder()
        .concurrency_limit_per_connection(MAX_CALLS)
        .max_concurrent_streams(u32::try_from(MAX_CALLS).ok())
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_LIMIT))
        .add_service(service)
        .serve_with_incoming_shutdown(Port { listener, credentials, role: None }.incoming(), signal)
        .await
}

struct Service {
    catalog: Embedded,
    stopped: watch::Receiver<bool>,
}

/// Does something with the type of a kind that the caller has named.
macro_rules! for_kind {
    ($kind:expr, $T:ident => $do:expr) => {{
        let kind: &str = $kind;
        match kind {
            <Volume as Object>::KIND => {
                type $T = Volume;
                $do
            }
            <Snapshot as Object>::KIND => {
                type $T = Snapshot;
                $do
            }
            <GroupSnapshot as Object>::KIND => {
                type $T = GroupSnapshot;
                $do
            }
            <Node as Object>::KIND => {
                type $T = Node;
                $do
            }
            <VolumeConfiguration as Object>::KIND => {
                type $T = VolumeConfiguration;
                $do
            }
            other => Err(Status::invalid_argument(format!(
                "this catalogue knows no kind {other:?}: are all parts of one version?"
            ))),
        }
    }};
}

impl From<CatalogError> for Status {
    fn from(error: CatalogError) -> Self {
        Self::data_loss(error.to_string())
    }
}

impl From<CreateError> for Status {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::Exists { kind, key } => {
                let text = format!("there is already a {kind} with this key or name: {key}");
                Self::with_details(Code::AlreadyExists, text, key.into())
            }
            CreateError::Ambiguous { .. } => Self::unknown(error.to_string()),
            CreateError::Failed(error) => error.into(),
        }
    }
}

impl From<UpdateError> for Status {
    fn from(error: UpdateError) -> Self {
        match error {
            UpdateError::Conflict { .. } => Self::aborted(error.to_string()),
            UpdateError::Ambiguous { .. } => Self::unknown(error.to_string()),
            UpdateError::Failed(error) => error.into(),
        }
    }
}

fn encode<T: Object>(stored: &Stored<T>) -> Result<rpc::Stored, Status> {
    let object = serde_json::to_vec(&stored.object).map_err(|error| Status::data_loss(error.to_string()))?;
    Ok(rpc::Stored { version: stored.version.0, object })
}

fn decode<T: Object>(json: &[u8]) -> Result<T, Status> {
    if json.len() > MAX_OBJECT {
        return Err(Status::invalid_argument(format!("a {} has at most {MAX_OBJECT} bytes", T::KIND)));
    }
    let bad = |error| Status::invalid_argument(format!("no {} that this catalogue knows: {error}", T::KIND));
    serde_json::from_slice(json).map_err(bad)
}

fn decode_stored<T: Object>(stored: Option<rpc::Stored>) -> Result<Stored<T>, Status> {
    let stored = stored.ok_or_else(|| Status::invalid_argument("the object is missing"))?;
    Ok(Stored { version: Version(stored.version), object: decode(&stored.object)? })
}

fn caller<R>(request: &Request<R>) -> Result<Identity, Status> {
    let found = request.extensions().get::<Caller>().map(|caller| caller.0.clone());
    found.ok_or_else(|| Status::unauthenticated("the caller shows no certificate"))
}

fn check<T: Guarded>(who: &Identity, write: &Write<'_, T>) -> Result<(), Status> {
    if may(who, write) {
        return Ok(());
    }
    let key = write.after.or(write.before).map(Object::key).unwrap_or_default();
    tracing::warn!(%who, kind = T::KIND, key, "a write that its role does not allow was refused");
    Err(Status::permission_denied(format!("{who} may not change the {} {key} so", T::KIND)))
}

impl Service {
    /// The object that a write of this version replaces.
    async fn current<T: Object>(&self, stored: &Stored<T>) -> Result<Option<T>, Status> {
        let current = self.catalog.get::<T>(&stored.object.key()).await?;
        match current {
            Some(current) if current.version == stored.version => Ok(Some(current.object)),
            Some(_) => Err(UpdateError::Conflict { kind: T::KIND, key: stored.object.key() }.into()),
            None => Ok(None),
        }
    }

    async fn create_object<T: Guarded>(&self, who: &Identity, json: &[u8]) -> Result<Version, Status> {
        let object: T = decode(json)?;
        check(who, &Write { before: None, after: Some(&object) })?;
        Ok(self.catalog.create(object).await?.version)
    }

    async fn update_object<T: Guarded>(&self, who: &Identity, stored: Option<rpc::Stored>) -> Result<Version, Status> {
        let stored: Stored<T> = decode_stored(stored)?;
        let Some(before) = self.current(&stored).await? else {
            return Err(UpdateError::Conflict { kind: T::KIND, key: stored.object.key() }.into());
        };
        check(who, &Write { before: Some(&before), after: Some(&stored.object) })?;
        // Compare-and-swaps of configurations: nobody hears what became of one.
        let is_configuration = T::KIND == VolumeConfiguration::KIND;
        if is_configuration {
            crash_point("catalogue.configure");
        }
        let updated = self.catalog.update(stored).await;
        if is_configuration {
            crash_point("catalogue.configured");
        }
        Ok(updated?.version)
    }

    async fn delete_object<T: Guarded>(&self, who: &Identity, stored: Option<rpc::Stored>) -> Result<(), Status> {
        let stored: Stored<T> = decode_stored(stored)?;
        let Some(before) = self.current(&stored).await? else { return Ok(()) };
        check(who, &Write { before: Some(&before), after: None })?;
        Ok(self.catalog.delete(&stored).await?)
    }
}

type Answers<T> = ReceiverStream<Result<T, Status>>;

/// Sends what there is; a reader that has left needs nothing.
async fn send_all<T>(messages: Vec<Result<T, Status>>, send: mpsc::Sender<Result<T, Status>>) {
    for message in messages {
        if send.send(message).await.is_err() {
            return;
        }
    }
}

#[tonic::async_trait]
impl Catalogue for Service {
    type ListStream = Answers<rpc::Stored>;
    type WatchStream = Answers<rpc::WatchResponse>;

    async fn get(&self, request: Request<rpc::GetRequest>) -> Result<Response<rpc::GetResponse>, Status> {
        let request = request.into_inner();
        let stored = for_kind!(&request.kind, T => {
            self.catalog.get::<T>(&request.key).await?.as_ref().map(encode).transpose()
        })?;
        Ok(Response::new(rpc::GetResponse { stored }))
    }

    async fn find(&self, request: Request<rpc::FindRequest>) -> Result<Response<rpc::GetResponse>, Status> {
        let request = request.into_inner();
        let stored = for_kind!(&request.kind, T => {
            self.catalog.find::<T>(&request.name).await?.as_ref().map(encode).transpose()
        })?;
        Ok(Response::new(rpc::GetResponse { stored }))
    }

    async fn list(&self, request: Request<rpc::ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let kind = request.into_inner().kind;
        let objects: Vec<_> = for_kind!(&kind, T => {
            Ok::<_, Status>(self.catalog.list::<T>().await?.iter().map(encode).collect())
        })?;
        let (send, receive) = mpsc::channel(STREAM_DEPTH);
        tokio::spawn(send_all(objects, send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn watch(&self, _: Request<rpc::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        use rpc::watch_response::Event;
        let (mut changes, mut stopped) = (self.catalog.watch(), self.stopped.clone());
        let (send, receive) = mpsc::channel(STREAM_DEPTH);
        tokio::spawn(async move {
            let mut event = Event::Started(rpc::Started {});
            while send.send(Ok(rpc::WatchResponse { event: Some(event) })).await.is_ok() {
                event = tokio::select! {
                    seen = changes.next() => match seen {
                        Some(Seen::Changed(change)) => Event::Changed(rpc::Changed { kind: change.kind.into(), key: change.key }),
                        Some(Seen::FellBehind) => Event::FellBehind(rpc::FellBehind {}),
                        None => return,
                    },
                    () = send.closed() => return,
                    // Also when the server is gone without a word.
                    _ = stopped.wait_for(|stopped| *stopped) => return,
                };
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn create(&self, request: Request<rpc::CreateRequest>) -> Result<Response<rpc::WriteResponse>, Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let version = for_kind!(&request.kind, T => self.create_object::<T>(&who, &request.object).await)?;
        Ok(Response::new(rpc::WriteResponse { version: version.0 }))
    }

    async fn update(&self, request: Request<rpc::UpdateRequest>) -> Result<Response<rpc::WriteResponse>, Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let version = for_kind!(&request.kind, T => self.update_object::<T>(&who, request.stored).await)?;
        Ok(Response::new(rpc::WriteResponse { version: version.0 }))
    }

    async fn delete(&self, request: Request<rpc::DeleteRequest>) -> Result<Response<rpc::DeleteResponse>, Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        for_kind!(&request.kind, T => self.delete_object::<T>(&who, request.stored).await)?;
        Ok(Response::new(rpc::DeleteResponse {}))
    }

    async fn get_generation(
        &self,
        _: Request<rpc::GetGenerationRequest>,
    ) -> Result<Response<rpc::GetGenerationResponse>, Status> {
        let generation = self.catalog.generation().await?.0;
        Ok(Response::new(rpc::GetGenerationResponse { generation }))
    }
}
