//! One call of any service: parse, work, answer or fail.
//!
//! Invariant: the work runs to its end even if the caller goes away (a sidecar's timeout is shorter than a slow disk), so
//! what is under way never stops half way for that reason, and its operation says ABORTED truthfully until it ends.

use super::errors::ArgumentError;
use super::status::{Coded, failed};
use std::future::Future;
use tonic::{Request, Response, Status};

/// Answers `request` with what `work` makes of the parsed request.
pub async fn answer<P, D, R, E, F>(
    call: &'static str,
    request: Request<P>,
    work: impl FnOnce(D) -> F,
) -> Result<Response<R>, Status>
where
    D: TryFrom<P, Error = ArgumentError>,
    F: Future<Output = Result<R, E>> + Send + 'static,
    R: Send + 'static,
    E: Coded,
{
    let wanted = D::try_from(request.into_inner()).map_err(|error| failed(call, &error))?;
    let work = work(wanted);
    let done = tokio::spawn(async move { work.await.map_err(|error| failed(call, &error)) }).await;
    match done {
        Ok(result) => result.map(Response::new),
        Err(error) => {
            tracing::error!(call, %error, "the handler ended without an answer");
            Err(Status::unavailable(format!("{call} ended without an answer; repeat the call")))
        }
    }
}
