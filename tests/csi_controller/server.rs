//! The whole server on its socket.

use crate::site::*;
use hyper_util::rt::TokioIo;
use std::path::PathBuf;
use tandem::csi::{CsiConfig, ServeError, serve};
use tandem::rpc::csi::controller_client::ControllerClient;
use tandem::rpc::csi::identity_client::IdentityClient;
use tandem::rpc::csi::*;
use tandem::uds::SocketError;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint, Uri};

fn config(site: &Site) -> CsiConfig {
    CsiConfig {
        endpoint: format!("unix://{}", socket(site).display()),
        dir: site.directory.path().to_owned(),
        node_id: NODE.into(),
        max_volumes_per_node: LIMIT,
        control: site.socket.clone(),
    }
}

fn socket(site: &Site) -> PathBuf {
    site.directory.path().join("csi.sock")
}

async fn connect(path: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    for _ in 0..6000 {
        match Endpoint::from_static("http://localhost").connect_with_connector(connector.clone()).await {
            Ok(channel) => return channel,
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
    panic!("the server does not come up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_services_answer_on_one_socket_until_it_is_stopped() {
    let site = Site::new();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(serve(config(&site), async move { drop(stopped.await) }));
    let channel = connect(socket(&site)).await;
    let info = IdentityClient::new(channel.clone()).get_plugin_info(GetPluginInfoRequest {}).await;
    assert_eq!(info.expect("an answer").into_inner().name, "tandem.storage");
    let created = ControllerClient::new(channel.clone()).create_volume(wanted("pvc-1", MIB)).await;
    let volume = created.expect("an answer").into_inner().volume.expect("a volume");
    let info = node_client::NodeClient::new(channel.clone()).node_get_info(NodeGetInfoRequest {}).await;
    let info = info.expect("an answer").into_inner();
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), (NODE, i64::from(LIMIT)));
    assert_eq!(info.accessible_topology, Some(volume.accessible_topology[0].clone()));
    let mut groups = group_controller_client::GroupControllerClient::new(channel.clone());
    groups.group_controller_get_capabilities(GroupControllerGetCapabilitiesRequest {}).await.expect("an answer");
    let mut metadata = snapshot_metadata_client::SnapshotMetadataClient::new(channel.clone());
    let refusal = metadata.get_metadata_allocated(GetMetadataAllocatedRequest::default()).await;
    assert_eq!(refused(refusal), tonic::Code::InvalidArgument);
    assert!(matches!(serve(config(&site), std::future::pending()).await, Err(ServeError::Catalog(_))));
    let elsewhere = tempfile::Builder::new().prefix("tandem-csi").tempdir().expect("a directory");
    let other = CsiConfig { dir: elsewhere.path().to_owned(), ..config(&site) };
    assert!(matches!(serve(other, std::future::pending()).await, Err(ServeError::Socket(SocketError::InUse(_)))));
    drop(channel);
    stop.send(()).expect("it waits");
    server.await.expect("no panic").expect("stopped well");
    assert!(!socket(&site).exists());
}
