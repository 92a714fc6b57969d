//! Secrets never reach a log or an answer, whatever the call and however it ends.

use crate::site::*;
use std::io;
use std::sync::{Arc, Mutex};
use tandem::rpc::csi::controller_server::Controller as _;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::volume_capability::{AccessType, MountVolume};
use tandem::rpc::csi::*;
use tonic::{Request, Status};

const SECRET: &str = "correct horse battery staple";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("the log").extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A refusal that does not repeat the secret.
#[track_caller]
fn silent<T>(result: Result<T, Status>) {
    assert!(!result.err().expect("a refusal").message().contains(SECRET));
}

#[tokio::test]
async fn no_log_line_and_no_answer_has_a_secret() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber =
        tracing_subscriber::fmt().with_writer(move || writer.clone()).with_max_level(tracing::Level::TRACE);
    // With one dispatcher alone, the thread of another test that comes to a line first decides that nobody wants it.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let _quiet = tracing::subscriber::set_default(subscriber.finish());
    let site = Site::new();
    let service = site.driver().service;
    let secrets = || map(&[("password", SECRET)]);
    let mut capability = mount(Mode::SingleNodeWriter, "");
    let flags = MountVolume { mount_flags: vec![format!("password={SECRET}")], ..Default::default() };
    capability.access_type = Some(AccessType::Mount(flags));
    let volume_capabilities = vec![capability.clone()];
    let create = CreateVolumeRequest { secrets: secrets(), volume_capabilities, ..wanted("pvc-1", MIB) };
    let volume = accepted(service.create_volume(Request::new(create.clone())).await).volume.expect("a volume");
    let volume_id = volume.volume_id;
    let other = CreateVolumeRequest { capacity_range: Some(range(GIB, 0)), ..create };
    silent(service.create_volume(Request::new(other)).await);
    let unknown = || "fake".to_owned();
    let publish = ControllerPublishVolumeRequest {
        volume_id: unknown(),
        node_id: NODE.into(),
        volume_capability: Some(capability),
        secrets: secrets(),
        ..Default::default()
    };
    silent(service.controller_publish_volume(Request::new(publish)).await);
    let expand = ControllerExpandVolumeRequest {
        volume_id: unknown(),
        capacity_range: Some(range(GIB, 0)),
        secrets: secrets(),
        ..Default::default()
    };
    silent(service.controller_expand_volume(Request::new(expand)).await);
    let modify = ControllerModifyVolumeRequest { volume_id: unknown(), secrets: secrets(), ..Default::default() };
    silent(service.controller_modify_volume(Request::new(modify)).await);
    let snapshot = CreateSnapshotRequest { name: "snap".into(), secrets: secrets(), ..Default::default() };
    silent(service.create_snapshot(Request::new(snapshot)).await);
    let list = ListSnapshotsRequest { starting_token: "x".into(), secrets: secrets(), ..Default::default() };
    silent(service.list_snapshots(Request::new(list)).await);
    let delete = DeleteVolumeRequest { volume_id, secrets: secrets() };
    accepted(service.delete_volume(Request::new(delete)).await);
    let text = String::from_utf8_lossy(&log.0.lock().expect("the log")).into_owned();
    assert!(text.contains("CreateVolume") && text.contains("ListSnapshots"), "calls that fail are logged: {text}");
    assert!(!text.contains(SECRET), "{text}");
    let descriptors = site.fake.state().volumes.values().map(|volume| volume.descriptor.clone()).collect::<String>();
    assert!(!descriptors.contains(SECRET));
}
