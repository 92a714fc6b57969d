//! The Controller service: generated types in, domain calls, generated types out.

use super::request::{
    Capacity, Expand, Modify, NewSnapshot, NewVolume, Page, Publish, SnapshotPage, SnapshotReference, Unpublish,
    Validate, VolumeReference,
};
use super::{Controller, response};
use crate::csi::errors::{
    CapacityError, CreateSnapshotError, CreateVolumeError, DeleteSnapshotError, DeleteVolumeError, ExpandError,
    GetSnapshotError, GetVolumeError, ListError, ModifyError, PublishError, UnpublishError, VolumeHealthError,
};
use crate::csi::handler::answer;
use crate::rpc::csi;
use crate::rpc::csi::controller_server;
use crate::rpc::csi::controller_service_capability::{Rpc, Type, rpc};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Serves a [`Controller`].
pub struct ControllerService(pub Arc<Controller>);

/// What is announced: everything but VOLUME_CONDITION, which 1.13 has taken away.
const CAPABILITIES: [rpc::Type; 16] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::GetCapacity,
    rpc::Type::CreateDeleteSnapshot,
    rpc::Type::ListSnapshots,
    rpc::Type::CloneVolume,
    rpc::Type::PublishReadonly,
    rpc::Type::ExpandVolume,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::ModifyVolume,
    rpc::Type::GetSnapshot,
    rpc::Type::GetVolumeHealth,
    rpc::Type::ListVolumeHealth,
];

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl controller_server::Controller for ControllerService {
    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Answer<csi::ControllerGetCapabilitiesResponse> {
        let capability = |kind: rpc::Type| Some(Type::Rpc(Rpc { r#type: kind.into() }));
        let capabilities = CAPABILITIES.map(|kind| csi::ControllerServiceCapability { r#type: capability(kind) });
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn create_volume(&self, request: Request<csi::CreateVolumeRequest>) -> Answer<csi::CreateVolumeResponse> {
        let controller = self.0.clone();
        answer("CreateVolume", request, |wanted: NewVolume| async move {
            let volume = controller.create_volume(wanted).await?;
            let volume = Some(response::volume(&volume, &controller.reachable_from(&volume)));
            Ok::<_, CreateVolumeError>(csi::CreateVolumeResponse { volume })
        })
        .await
    }

    async fn delete_volume(&self, request: Request<csi::DeleteVolumeRequest>) -> Answer<csi::DeleteVolumeResponse> {
        let controller = self.0.clone();
        answer("DeleteVolume", request, |VolumeReference(id)| async move {
            controller.delete_volume(&id).await?;
            Ok::<_, DeleteVolumeError>(csi::DeleteVolumeResponse {})
        })
        .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Answer<csi::ControllerPublishVolumeResponse> {
        let controller = self.0.clone();
        answer("ControllerPublishVolume", request, |wanted: Publish| async move {
            controller.publish(wanted).await?;
            Ok::<_, PublishError>(csi::ControllerPublishVolumeResponse::default())
        })
        .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Answer<csi::ControllerUnpublishVolumeResponse> {
        let controller = self.0.clone();
        answer("ControllerUnpublishVolume", request, |wanted: Unpublish| async move {
            controller.unpublish(wanted).await?;
            Ok::<_, UnpublishError>(csi::ControllerUnpublishVolumeResponse {})
        })
        .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<csi::ValidateVolumeCapabilitiesResponse> {
        let controller = self.0.clone();
        let work = |wanted: Validate| async move { controller.validate(wanted).await };
        answer("ValidateVolumeCapabilities", request, work).await
    }

    async fn list_volumes(&self, request: Request<csi::ListVolumesRequest>) -> Answer<csi::ListVolumesResponse> {
        use csi::list_volumes_response::{Entry, VolumeStatus};
        let controller = self.0.clone();
        answer("ListVolumes", request, |page: Page| async move {
            let (volumes, next_token) = controller.list_volumes(page).await?;
            let entries = volumes.iter().map(|volume| Entry {
                volume: Some(response::volume(volume, &controller.reachable_from(volume))),
                status: Some(VolumeStatus { published_node_ids: response::published(volume) }),
            });
            Ok::<_, ListError>(csi::ListVolumesResponse { entries: entries.collect(), next_token })
        })
        .await
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Answer<csi::ControllerGetVolumeResponse> {
        use csi::controller_get_volume_response::VolumeStatus;
        let controller = self.0.clone();
        answer("ControllerGetVolume", request, |VolumeReference(id)| async move {
            let volume = controller.volume(&id).await?;
            Ok::<_, GetVolumeError>(csi::ControllerGetVolumeResponse {
                status: Some(VolumeStatus { published_node_ids: response::published(&volume) }),
                volume: Some(response::volume(&volume, &controller.reachable_from(&volume))),
            })
        })
        .await
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<csi::ControllerGetVolumeHealthRequest>,
    ) -> Answer<csi::ControllerGetVolumeHealthResponse> {
        let controller = self.0.clone();
        answer("ControllerGetVolumeHealth", request, |VolumeReference(id)| async move {
            let volume_health = Some(controller.volume_health(&id).await?);
            Ok::<_, VolumeHealthError>(csi::ControllerGetVolumeHealthResponse { volume_health })
        })
        .await
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<csi::ControllerListVolumeHealthRequest>,
    ) -> Answer<csi::ControllerListVolumeHealthResponse> {
        let controller = self.0.clone();
        answer("ControllerListVolumeHealth", request, |page: Page| async move {
            let (entries, next_token) = controller.list_volume_health(page).await?;
            Ok::<_, ListError>(csi::ControllerListVolumeHealthResponse { entries, next_token })
        })
        .await
    }

    async fn get_capacity(&self, request: Request<csi::GetCapacityRequest>) -> Answer<csi::GetCapacityResponse> {
        let controller = self.0.clone();
        let work = |wanted: Capacity| async move { controller.capacity(wanted).await };
        answer::<_, _, _, CapacityError, _>("GetCapacity", request, work).await
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Answer<csi::ControllerExpandVolumeResponse> {
        let controller = self.0.clone();
        answer("ControllerExpandVolume", request, |wanted: Expand| async move {
            let expanded = controller.expand(wanted).await?;
            Ok::<_, ExpandError>(csi::ControllerExpandVolumeResponse {
                capacity_bytes: response::bytes(expanded.size.bytes()),
                node_expansion_required: expanded.node_expansion_required,
            })
        })
        .await
    }

    async fn controller_modify_volume(
        &self,
        request: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Answer<csi::ControllerModifyVolumeResponse> {
        let controller = self.0.clone();
        answer("ControllerModifyVolume", request, |wanted: Modify| async move {
            controller.modify(wanted).await?;
            Ok::<_, ModifyError>(csi::ControllerModifyVolumeResponse {})
        })
        .await
    }

    async fn create_snapshot(
        &self,
        request: Request<csi::CreateSnapshotRequest>,
    ) -> Answer<csi::CreateSnapshotResponse> {
        let controller = self.0.clone();
        answer("CreateSnapshot", request, |wanted: NewSnapshot| async move {
            let snapshot = controller.create_snapshot(wanted).await?;
            Ok::<_, CreateSnapshotError>(csi::CreateSnapshotResponse { snapshot: response::snapshot(&snapshot) })
        })
        .await
    }

    async fn delete_snapshot(
        &self,
        request: Request<csi::DeleteSnapshotRequest>,
    ) -> Answer<csi::DeleteSnapshotResponse> {
        let controller = self.0.clone();
        answer("DeleteSnapshot", request, |SnapshotReference(id)| async move {
            controller.delete_snapshot(&id).await?;
            Ok::<_, DeleteSnapshotError>(csi::DeleteSnapshotResponse {})
        })
        .await
    }

    async fn list_snapshots(&self, request: Request<csi::ListSnapshotsRequest>) -> Answer<csi::ListSnapshotsResponse> {
        use csi::list_snapshots_response::Entry;
        let controller = self.0.clone();
        answer("ListSnapshots", request, |wanted: SnapshotPage| async move {
            let (snapshots, next_token) = controller.list_snapshots(wanted).await?;
            let entries = snapshots.into_iter().map(|snapshot| Entry { snapshot: Some(snapshot) }).collect();
            Ok::<_, ListError>(csi::ListSnapshotsResponse { entries, next_token })
        })
        .await
    }

    async fn get_snapshot(&self, request: Request<csi::GetSnapshotRequest>) -> Answer<csi::GetSnapshotResponse> {
        let controller = self.0.clone();
        answer("GetSnapshot", request, |SnapshotReference(id)| async move {
            let snapshot = controller.snapshot(&id).await?;
            Ok::<_, GetSnapshotError>(csi::GetSnapshotResponse { snapshot: response::snapshot(&snapshot) })
        })
        .await
    }
}
