//! GET /metrics over HTTP/1, for one scraper at a time or a few.

use super::{Snapshot, render};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// The format that Prometheus negotiates; the text ends in `# EOF`.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// A scraper that does not finish must not keep a connection for ever.
const LONGEST_CONNECTION: Duration = Duration::from_secs(30);
/// Connections at once: one scraper, a person, and room; the next ones wait in the kernel's queue.
const CONNECTIONS: usize = 8;
/// Pause after a failed accept (out of descriptors): it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Binds `address` and serves in the background what `source` measures at each scrape.
pub async fn serve<S, F>(address: SocketAddr, source: S) -> io::Result<SocketAddr>
where
    S: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Snapshot> + Send + 'static,
{
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    tokio::spawn(accept(listener, Arc::new(source)));
    Ok(bound)
}

async fn accept<S, F>(listener: TcpListener, source: Arc<S>)
where
    S: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Snapshot> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let source = source.clone();
                tokio::spawn(async move {
                    // A scraper that went away asks again by itself: nothing to report.
                    let _ = tokio::time::timeout(LONGEST_CONNECTION, connection(stream, source)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a metrics connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<S, F>(stream: TcpStream, source: Arc<S>) -> Result<(), hyper::Error>
where
    S: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Snapshot> + Send + 'static,
{
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let source = source.clone();
        async move { Ok::<_, Infallible>(answer(&request, &*source).await) }
    });
    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await
}

async fn answer<S, F>(request: &Request<Incoming>, source: &S) -> Response<Full<Bytes>>
where
    S: Fn() -> F,
    F: Future<Output = Snapshot>,
{
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match render(source().await) {
            Ok(text) => (StatusCode::OK, OPEN_METRICS, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("cannot render: {error}\n")),
        },
        _ => (StatusCode::NOT_FOUND, "text/plain", "metrics are at /metrics\n".into()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
