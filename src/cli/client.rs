//! Finds the sockets of a running installation, connects to them, and turns names into ids.

use super::CliError;
use crate::catalog::Descriptor;
use crate::rpc::control::replica_client::ReplicaClient;
use crate::rpc::csi::controller_client::ControllerClient;
use crate::rpc::csi::identity_client::IdentityClient;
use crate::rpc::csi::node_client::NodeClient;
use crate::rpc::operator::LocateSnapshotsRequest;
use crate::rpc::operator::locate_snapshots_response::Location;
use crate::rpc::operator::operator_client::OperatorClient;
use crate::rpc::recovery::recovery_client::RecoveryClient;
use crate::rpc::{control, operator};
use crate::uds::connect;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tonic::Status;
use tonic::transport::Channel;

/// Where the installation is that a command talks to.
#[derive(Clone, Debug, clap::Args)]
pub struct Target {
    /// Directory of the installation: the one that `tandem standalone` was started with; in a cluster that of the node, or
    /// of the controller for what needs no node.
    #[arg(long, env = "TANDEM_DIR", default_value = "/var/lib/tandem", value_name = "DIR")]
    dir: PathBuf,
    /// CSI socket, if it is not DIR/csi.sock.
    #[arg(long, env = "CSI_ENDPOINT", value_name = "unix://PATH")]
    endpoint: Option<String>,
    /// CSI socket of the cluster's controller, if DIR is a node of a cluster.
    #[arg(long, env = "TANDEM_CONTROLLER_ENDPOINT", value_name = "unix://PATH")]
    controller_endpoint: Option<String>,
}

impl Target {
    /// An installation with its default sockets.
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.into(), endpoint: None, controller_endpoint: None }
    }
    /// The controller of a cluster: behind this socket, or with this directory. `None`: there is no cluster.
    pub fn of_controller(dir: &Path, controller_endpoint: Option<String>) -> Option<Self> {
        let target = Self { controller_endpoint, ..Self::of(dir) };
        (target.controller_endpoint.is_some() || target.is_controller()).then_some(target)
    }
    /// The path of a socket written as CSI writes it.
    pub fn socket_path(endpoint: &str) -> &Path {
        Path::new(endpoint.strip_prefix("unix://").or_else(|| endpoint.strip_prefix("unix:")).unwrap_or(endpoint))
    }
    async fn csi(&self) -> Result<Channel, CliError> {
        let default = self.dir.join("csi.sock");
        open(self.endpoint.as_deref().map_or(default.as_path(), Self::socket_path)).await
    }
    /// The controller service: of the cluster's controller, or of the CSI socket.
    pub async fn controller(&self) -> Result<ControllerClient<Channel>, CliError> {
        Ok(ControllerClient::new(self.controller_channel().await?))
    }
    async fn controller_channel(&self) -> Result<Channel, CliError> {
        match &self.controller_endpoint {
            Some(endpoint) => open(Self::socket_path(endpoint)).await,
            None => self.csi().await,
        }
    }
    /// The cluster's controller, for what a person asks of it alone.
    pub async fn recovery(&self) -> Result<RecoveryClient<Channel>, CliError> {
        Ok(RecoveryClient::new(self.controller_channel().await?))
    }
    /// The operator service, beside the controller service.
    pub async fn operator(&self) -> Result<OperatorClient<Channel>, CliError> {
        let client = OperatorClient::new(self.controller_channel().await?);
        Ok(client.max_decoding_message_size(LARGEST_ANSWER))
    }
    /// Whether it is the directory of `tandem controller`, which has no copies.
    fn is_controller(&self) -> bool {
        self.dir.join("controller.lock").exists()
    }
    /// The identity service of the CSI socket.
    pub async fn identity(&self) -> Result<IdentityClient<Channel>, CliError> {
        Ok(IdentityClient::new(self.csi().await?))
    }
    /// The node service of the CSI socket.
    pub async fn node(&self) -> Result<NodeClient<Channel>, CliError> {
        Ok(NodeClient::new(self.csi().await?))
    }
    /// The process that carries I/O.
    pub async fn replica(&self) -> Result<ReplicaClient<Channel>, CliError> {
        let client = ReplicaClient::new(open(&self.dir.join("replica.sock")).await?);
        Ok(client.max_decoding_message_size(LARGEST_ANSWER))
    }
}

/// Reason in the health of a volume that the catalogue has and the replica has not.
pub const COPY_MISSING: &str = "CopyMissing";

/// Bytes of the largest answer: 100,000 snapshots with their descriptors.
const LARGEST_ANSWER: usize = 256 << 20;

async fn open(socket: &Path) -> Result<Channel, CliError> {
    connect(socket).await.map_err(|error| {
        let cause = std::iter::successors(std::error::Error::source(&error), |e| e.source()).last();
        let reason = cause.map_or_else(|| error.to_string(), ToString::to_string);
        CliError::Unreachable { socket: socket.display().to_string(), reason }
    })
}

/// Makes an error of a server's answer. `doing` says what was asked: "cannot delete volume data".
pub fn refused(doing: impl Into<String>) -> impl FnOnce(Status) -> CliError {
    move |status| {
        let answer = if status.message().is_empty() { status.code().to_string() } else { status.message().to_string() };
        CliError::Refused { doing: doing.into(), answer }
    }
}

/// The name that a person gave it, from the text that the controller keeps beside each copy; empty if there is none.
pub fn name_of(descriptor: &str) -> String {
    match Descriptor::decode(descriptor) {
        Some(Descriptor::Volume { request, .. }) => request.name,
        Some(Descriptor::Snapshot { name, .. }) => name.unwrap_or_default(),
        None => String::new(),
    }
}

/// Every volume that the replica has, and those that the catalogue has and whose copy is not there or cannot be opened. Of a
/// node in a cluster, what it has; of a controller, what the catalogue has.
pub async fn volumes(target: &Target) -> Result<Vec<control::Volume>, CliError> {
    if target.is_controller() {
        return Ok(catalogued(target).await?.into_iter().map(elsewhere).collect());
    }
    if target.controller_endpoint.is_some() {
        return copies(target).await;
    }
    let mut copies = copies(target).await?;
    let without = |copies: &[control::Volume], id: &str| copies.iter().all(|copy| copy.volume_id != id);
    // None while the CSI part does not answer, which `tandem status` says; a node of a cluster has no such part.
    let mut missing = catalogued(target).await.unwrap_or_default();
    missing.retain(|volume| without(&copies, &volume.volume_id));
    if !missing.is_empty() {
        // One that was created in between is in the second list.
        copies = self::copies(target).await?;
        missing.retain(|volume| without(&copies, &volume.volume_id));
    }
    copies.extend(missing.into_iter().map(without_copy));
    Ok(copies)
}

async fn copies(target: &Target) -> Result<Vec<control::Volume>, CliError> {
    let answer = target.replica().await?.list_volumes(control::ListVolumesRequest {}).await;
    Ok(answer.map_err(refused("cannot list volumes"))?.into_inner().volumes)
}

/// The volumes of the catalogue.
async fn catalogued(target: &Target) -> Result<Vec<operator::Volume>, CliError> {
    let answer = target.operator().await?.list_volumes(operator::ListVolumesRequest {}).await;
    Ok(answer.map_err(refused("cannot list volumes"))?.into_inner().volumes)
}

fn without_copy(volume: operator::Volume) -> control::Volume {
    let health = control::Health {
        kind: control::health::Kind::Inaccessible.into(),
        reason: COPY_MISSING.into(),
        message: "its copy is not on this node or cannot be opened; `tandem status` says why".into(),
    };
    control::Volume { ready: false, health: vec![health], ..elsewhere(volume) }
}

/// A volume of a cluster, as its controller says it.
fn elsewhere(volume: operator::Volume) -> control::Volume {
    let operator::Volume { volume_id, pool, size_bytes, verify_reads, descriptor } = volume;
    control::Volume { volume_id, pool, size_bytes, verify_reads, descriptor, ready: true, ..Default::default() }
}

/// The volumes that have a device, by name and device.
pub async fn volumes_in_use(dir: &Path) -> Result<Vec<String>, CliError> {
    let label = |v: &control::Volume| match name_of(&v.descriptor) {
        name if name.is_empty() => format!("{} ({})", v.volume_id, v.device),
        name => format!("{name} ({})", v.device),
    };
    let all = copies(&Target::of(dir)).await?;
    Ok(all.iter().filter(|v| !v.device.is_empty()).map(label).collect())
}

/// Every snapshot that the replica has.
pub async fn snapshots(target: &Target) -> Result<Vec<control::Snapshot>, CliError> {
    let answer = target.replica().await?.list_snapshots(control::ListSnapshotsRequest {}).await;
    Ok(answer.map_err(refused("cannot list snapshots"))?.into_inner().snapshots)
}

/// Where each snapshot is, and which nodes are to get it, by id; nothing if no controller says so.
pub async fn snapshot_places(target: &Target) -> BTreeMap<String, Location> {
    let Ok(mut controller) = target.operator().await else { return BTreeMap::new() };
    let answer = controller.locate_snapshots(LocateSnapshotsRequest {}).await;
    let locations = answer.map(|answer| answer.into_inner().locations).unwrap_or_default();
    locations.into_iter().map(|location| (location.snapshot_id.clone(), location)).collect()
}

/// The volume with that id, or else the only one with that name: of those on the node, or else of its cluster.
pub async fn find_volume(target: &Target, name: &str) -> Result<control::Volume, CliError> {
    let key = |v: &control::Volume| (v.volume_id.clone(), name_of(&v.descriptor));
    match pick("volume", name, volumes(target).await?, key) {
        Err(CliError::Unknown { .. }) if target.controller_endpoint.is_some() => {
            pick("volume", name, catalogued(target).await?.into_iter().map(elsewhere).collect(), key)
        }
        found => found,
    }
}

/// The snapshot with that id, or else the only one with that name.
pub async fn find_snapshot(target: &Target, name: &str) -> Result<control::Snapshot, CliError> {
    pick("snapshot", name, snapshots(target).await?, |s| (s.snapshot_id.clone(), name_of(&s.descriptor)))
}

fn pick<T>(kind: &'static str, name: &str, all: Vec<T>, key: impl Fn(&T) -> (String, String)) -> Result<T, CliError> {
    let mut named = Vec::new();
    for item in all {
        let (id, own_name) = key(&item);
        if id == name {
            return Ok(item);
        }
        if own_name == name {
            named.push((id, item));
        }
    }
    if named.len() > 1 {
        let ids = named.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>().join(", ");
        return Err(CliError::Ambiguous { kind, name: name.into(), ids });
    }
    named.pop().map(|(_, item)| item).ok_or_else(|| CliError::Unknown { kind, name: name.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_wins_over_a_name_and_two_equal_names_are_refused() {
        let all = || vec![("1", "a"), ("2", "b"), ("3", "b"), ("b2", "1")];
        let key = |v: &(&str, &str)| (v.0.to_string(), v.1.to_string());
        assert_eq!(pick("volume", "1", all(), key).expect("an id").1, "a");
        assert_eq!(pick("volume", "a", all(), key).expect("a name").0, "1");
        let both = pick("volume", "b", all(), key).expect_err("two of them");
        assert!(both.to_string().contains("2, 3"), "{both}");
        assert!(matches!(pick("volume", "c", all(), key), Err(CliError::Unknown { .. })));
    }

    #[test]
    fn endpoints_are_written_as_csi_writes_them() {
        for text in ["unix:///a/b.sock", "unix:/a/b.sock", "/a/b.sock"] {
            assert_eq!(Target::socket_path(text), Path::new("/a/b.sock"));
        }
    }
}
