//! The Recovery service: what a person asks of a cluster's controller. Conversion only.

use super::controller::{Controller, Report, Row, State, Unopened};
use super::status::{Coded, failed};
use crate::catalog::NodeName;
use crate::protocol::{ConfigurationVersion, Generation, Stamp};
use crate::rpc::recovery::recovery_server::Recovery;
use crate::rpc::recovery::{self as rpc, row};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Serves a [`Controller`].
pub struct RecoveryService(pub Arc<Controller>);

/// Runs to its end, even if the caller goes away.
async fn to_the_end<T, E>(
    call: &'static str,
    work: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, Status>
where
    T: Send + 'static,
    E: Coded + Send + 'static,
{
    match tokio::spawn(work).await {
        Ok(done) => done.map_err(|error| failed(call, &error)),
        Err(error) => {
            tracing::error!(call, %error, "the handler ended without an answer");
            Err(Status::unavailable(format!("{call} ended without an answer; repeat the call")))
        }
    }
}

#[tonic::async_trait]
impl Recovery for RecoveryService {
    async fn recover(&self, _: Request<rpc::RecoverRequest>) -> Result<Response<rpc::RecoverResponse>, Status> {
        let controller = self.0.clone();
        let report = to_the_end("Recover", async move { controller.recover().await }).await?;
        Ok(Response::new(report.into()))
    }

    async fn plan_force(&self, r: Request<rpc::PlanForceRequest>) -> Result<Response<rpc::PlanForceResponse>, Status> {
        let (controller, rpc::PlanForceRequest { volume, node }) = (self.0.clone(), r.into_inner());
        let work = async move { controller.plan_force(&volume, &NodeName(node)).await };
        let plan = to_the_end("PlanForce", work).await?;
        Ok(Response::new(rpc::PlanForceResponse {
            volume_id: plan.volume.to_string(),
            name: plan.name,
            generation: plan.newest.generation.0,
            version: plan.newest.version.0,
            losses: plan.losses,
        }))
    }

    async fn force(&self, r: Request<rpc::ForceRequest>) -> Result<Response<rpc::ForceResponse>, Status> {
        let (controller, r) = (self.0.clone(), r.into_inner());
        let seen = Stamp { generation: Generation(r.generation), version: ConfigurationVersion(r.version) };
        let work = async move { controller.force(&r.volume, &NodeName(r.node), seen).await };
        let written = to_the_end("Force", work).await?;
        Ok(Response::new(rpc::ForceResponse { generation: written.generation.0, version: written.version.0 }))
    }
}

impl From<Report> for rpc::RecoverResponse {
    fn from(report: Report) -> Self {
        let Report { volumes, snapshots, groups, kept, problems, rows, unopened } = report;
        let rows = rows.into_iter().map(Into::into).collect();
        let unopened = unopened.into_iter().map(Into::into).collect();
        Self { volumes, snapshots, groups, kept, problems, rows, unopened }
    }
}

impl From<Unopened> for rpc::Unopened {
    fn from(Unopened { node, pool, problem }: Unopened) -> Self {
        Self { node: node.0, pool, problem }
    }
}

impl From<Row> for rpc::Row {
    fn from(row: Row) -> Self {
        let state = match row.state {
            State::PutBack => row::State::PutBack,
            State::Kept => row::State::Kept,
            State::Raised => row::State::Raised,
            State::Waits => row::State::Waits,
            State::Left => row::State::Left,
        };
        let stamp = row.configuration.unwrap_or_default();
        Self {
            volume_id: row.volume.to_string(),
            name: row.name,
            state: state.into(),
            generation: stamp.generation.0,
            version: stamp.version.0,
            nodes: row.nodes.into_iter().map(|node| node.0).collect(),
            missing: row.missing,
        }
    }
}
