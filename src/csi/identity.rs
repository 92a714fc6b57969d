//! The Identity service: who we are, what we can do, whether we can do it now.

use super::control::Control;
use crate::rpc::control::GetStatusRequest;
use crate::rpc::csi::identity_server::Identity;
use crate::rpc::csi::plugin_capability::service::Type as Feature;
use crate::rpc::csi::plugin_capability::volume_expansion::Type as Expansion;
use crate::rpc::csi::plugin_capability::{Service, Type, VolumeExpansion};
use crate::rpc::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use std::time::Duration;
use tonic::{Request, Response, Status, async_trait};

/// The driver's name in StorageClasses.
pub const DRIVER_NAME: &str = "tandem.storage";

/// Longest wait for the replica in a probe: livenessprobe gives up after 3 s.
const PROBE_LIMIT: Duration = Duration::from_secs(2);

/// The identity service.
#[derive(Clone, Debug)]
pub struct IdentityService(Option<Control>);

impl IdentityService {
    /// Probes the replica behind `control`; without one, this process alone.
    pub fn new(control: Option<Control>) -> Self {
        Self(control)
    }
}

#[async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER_NAME.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let features = [
            Feature::ControllerService,
            Feature::VolumeAccessibilityConstraints,
            Feature::GroupControllerService,
            Feature::SnapshotMetadataService,
            Feature::SnapshotAccessibilityConstraints,
        ];
        let service = |feature: Feature| Type::Service(Service { r#type: feature.into() });
        let online = Type::VolumeExpansion(VolumeExpansion { r#type: Expansion::Online.into() });
        let types = features.map(service).into_iter().chain([online]);
        let capabilities = types.map(|r#type| PluginCapability { r#type: Some(r#type) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Not ready while the replica does not answer: it is being restarted, which is no reason to restart this process.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let Some(control) = &self.0 else { return Ok(Response::new(ProbeResponse { ready: Some(true) })) };
        let mut client = control.client();
        let answer = tokio::time::timeout(PROBE_LIMIT, client.get_status(GetStatusRequest {})).await;
        let ready = matches!(answer, Ok(Ok(_)));
        Ok(Response::new(ProbeResponse { ready: Some(ready) }))
    }
}
