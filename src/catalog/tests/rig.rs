//! What the tests are made of: objects, a cluster's certificates, a served catalogue.

use crate::catalog::{
    Catalog, CopySpec, Embedded, MirrorSpec, NodeName, Remote, Replication, Snapshot, Volume, VolumeRequest, serve,
};
use crate::tls::{Authority, Credentials, Leaf, Name, Role, Validity};
use crate::volume::{InstanceId, SnapshotId, VolumeId, VolumeSize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub fn volume(name: &str) -> Volume {
    let request = VolumeRequest {
        name: name.to_owned(),
        size: VolumeSize::try_from(1 << 30).expect("a size"),
        pool: "default".to_owned(),
        fs_type: None,
        verify_reads: false,
        access: BTreeSet::new(),
        source: None,
        replication: Replication::None,
        rebuild_after: Default::default(),
        reach: Default::default(),
    };
    Volume::wanted(VolumeId::random(), request)
}

/// A volume with copies on these nodes.
pub fn mirrored(name: &str, copies: &[(InstanceId, &str)]) -> Volume {
    let mut volume = volume(name);
    let spec = |node: &str| CopySpec { node: NodeName(node.into()), pool: "default".into() };
    let copies: BTreeMap<_, _> = copies.iter().map(|(copy, node)| (*copy, spec(node))).collect();
    volume.spec.mirror = Some(MirrorSpec::new(copies));
    volume
}

pub fn snapshot(volume: VolumeId) -> Snapshot {
    Snapshot::wanted(SnapshotId::random(), volume, None)
}

pub fn embedded() -> (tempfile::TempDir, Embedded) {
    let directory = tempfile::Builder::new().prefix("tandem-catalog").tempdir().expect("a directory");
    let catalog = Embedded::open(&directory.path().join("catalog.redb")).expect("a new catalogue");
    (directory, catalog)
}

/// A cluster's certificates.
pub struct Lab {
    directory: tempfile::TempDir,
    authority: Authority,
}

pub fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

impl Lab {
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("tandem-catalog").tempdir().expect("a directory");
        let authority = Authority::create(&directory.path().join("authority"), name("lab"), Validity::days(1));
        Self { authority: authority.expect("made"), directory }
    }

    /// The directory of a certificate, which is made at its first use.
    pub fn issue(&self, role: Role, who: &str) -> PathBuf {
        let out = self.directory.path().join(format!("{role}-{who}"));
        if !out.exists() {
            let leaf = Leaf { role, name: name(who), addresses: Vec::new() };
            self.authority.issue(&leaf, Validity::days(1)).expect("issued").write(&out).expect("written");
        }
        out
    }

    pub fn credentials(&self, role: Role, who: &str) -> Arc<Credentials> {
        Arc::new(Credentials::open(&self.issue(role, who)).expect("good certificates"))
    }

    /// A client with such a certificate.
    pub fn client(&self, server: SocketAddr, role: Role, who: &str) -> Catalog {
        Catalog::Remote(Remote::new(&server.to_string(), self.credentials(role, who)))
    }
}

/// A catalogue that is served.
pub struct Served {
    pub address: SocketAddr,
    stop: oneshot::Sender<()>,
    running: JoinHandle<()>,
}

impl Served {
    pub async fn start(lab: &Lab, catalog: Embedded, address: SocketAddr) -> Self {
        Self::start_as(lab.credentials(Role::Controller, "controller"), catalog, address).await
    }

    pub async fn start_as(credentials: Arc<Credentials>, catalog: Embedded, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            serve(catalog, listener, credentials, stopped).await.expect("served");
        });
        Self { address, stop, running }
    }

    pub async fn stop(self) {
        drop(self.stop);
        self.running.await.expect("ended");
    }
}

/// Any port of this machine.
pub fn anywhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}
