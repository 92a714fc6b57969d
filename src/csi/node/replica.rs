//! What the node asks of the replica: the control socket for callers that block.

use crate::catalog::{Descriptor, FsType};
use crate::csi::control::{Control, ControlError};
use crate::mount::Origin;
use crate::rpc::control;
use crate::volume::VolumeId;
use std::path::PathBuf;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// What the replica says of a primary that waits for other copies,
const NOT_ANSWERING: &str = "NotAnswering";
/// and of a volume without a copy here that no primary answers.
const NOT_SERVED: &str = "NotServed";

/// A volume as far as a node cares.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    /// Whether its contents are all here; if not, bytes copied and bytes to copy.
    pub copying: Option<(u64, u64)>,
    /// Its device, if it is attached.
    pub device: Option<PathBuf>,
    /// It has copies elsewhere: what the controller says of it comes here by the catalogue.
    pub mirrored: bool,
    /// Whether blank means new.
    pub origin: Origin,
    /// The filesystem of its StorageClass.
    pub fs_type: Option<FsType>,
    /// What its device is asked is answered, or there is no other copy that it could wait for.
    pub answers: bool,
    /// What is wrong with it.
    pub health: Vec<control::Health>,
}

impl From<control::Volume> for Facts {
    fn from(volume: control::Volume) -> Self {
        let (origin, fs_type) = match Descriptor::decode(&volume.descriptor) {
            Some(Descriptor::Volume { request, .. }) if request.source.is_none() => (Origin::Empty, request.fs_type),
            Some(Descriptor::Volume { request, .. }) => (Origin::Source, request.fs_type),
            // Where it came from is not known: then it is never formatted.
            Some(Descriptor::Snapshot { .. }) | None => (Origin::Source, None),
        };
        let says = |reason: &str| volume.health.iter().any(|entry| entry.reason == reason);
        let answers = match &volume.mirror {
            Some(mirror) => mirror.serves && !says(NOT_ANSWERING),
            None => !says(NOT_SERVED),
        };
        Self {
            answers,
            size: volume.size_bytes,
            copying: (!volume.ready).then_some((volume.copied_bytes, volume.to_copy_bytes)),
            device: Some(volume.device).filter(|device| !device.is_empty()).map(PathBuf::from),
            // Without a pool it has no copy here, but elsewhere.
            mirrored: volume.mirror.is_some() || volume.pool.is_empty(),
            origin,
            fs_type,
            health: volume.health,
        }
    }
}

/// Blocking calls to the replica. Never use it on a thread of the runtime.
#[derive(Debug)]
pub struct Replica {
    control: Control,
    runtime: Handle,
}

impl Replica {
    /// Calls are driven by `runtime`.
    pub fn new(control: Control, runtime: Handle) -> Self {
        Self { control, runtime }
    }

    /// A volume as it is now.
    pub fn volume(&self, id: VolumeId) -> Result<Facts, ControlError> {
        let request = control::GetVolumeRequest { volume_id: id.to_string() };
        let answer = self.runtime.block_on(self.control.client().get_volume(request))?;
        Ok(answer.into_inner().into())
    }

    /// The same, to be used here. One that nobody here knows may be in a pool that is not open: then it is not missing.
    pub fn volume_to_use(&self, id: VolumeId) -> Result<Facts, ControlError> {
        let missing = match self.volume(id) {
            Err(ControlError::NotFound(missing)) => missing,
            found => return found,
        };
        let closed = self.pools()?.into_iter().find(|pool| pool.id.is_empty() && !pool.problem.is_empty());
        Err(match closed {
            Some(control::Pool { name, problem, .. }) => {
                ControlError::Unknown(format!("{missing}; it may be in pool {name}, which cannot be opened: {problem}"))
            }
            None => ControlError::NotFound(missing),
        })
    }

    /// The volume's device, made or found again.
    pub fn attach(&self, id: VolumeId) -> Result<PathBuf, ControlError> {
        let request = control::AttachVolumeRequest { volume_id: id.to_string() };
        let answer = self.runtime.block_on(self.control.client().attach_volume(request))?;
        Ok(answer.into_inner().device.into())
    }

    /// Takes the device away; none is fine.
    pub fn detach(&self, id: VolumeId) -> Result<(), ControlError> {
        self.runtime.block_on(self.detach_volume(id, false))
    }

    /// As [`Replica::detach`]; `None`: it goes on, and is not waited for any longer.
    pub fn detach_within(&self, id: VolumeId, limit: Duration) -> Option<Result<(), ControlError>> {
        self.runtime.block_on(async { timeout(limit, self.detach_volume(id, false)).await.ok() })
    }

    /// Whoever waits for the device gets an error, if nobody serves it here: else [`ControlError::InUse`].
    pub fn abandon(&self, id: VolumeId, limit: Duration) -> Result<(), ControlError> {
        let asked = self.runtime.block_on(async { timeout(limit, self.detach_volume(id, true)).await });
        asked.unwrap_or_else(|_| Err(ControlError::Unknown(format!("not within {} s", limit.as_secs()))))
    }

    async fn detach_volume(&self, id: VolumeId, abandon: bool) -> Result<(), ControlError> {
        let request = control::DetachVolumeRequest { volume_id: id.to_string(), abandon };
        match self.control.client().detach_volume(request).await.map_err(ControlError::from) {
            Ok(_) | Err(ControlError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// All pools.
    pub fn pools(&self) -> Result<Vec<control::Pool>, ControlError> {
        let answer = self.runtime.block_on(self.control.client().list_pools(control::ListPoolsRequest {}))?;
        Ok(answer.into_inner().pools)
    }
}
