//! The CSI calls that are cut off, what each needs before it, and what must be true after it.

use crate::site::Site;
use crate::support::installation::{Installation, block};
use crate::support::mounted::Usage;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use tandem::memory::Memory;
use tandem::rpc::csi;
use tandem::rpc::csi::group_controller_client::GroupControllerClient;
use tandem::rpc::csi::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use tonic::Status;

const MIB: i64 = 1 << 20;
const SIZE: i64 = 64 * MIB;
const WORD: &str = "still here";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    CreateVolume,
    CloneVolume,
    CopyVolume,
    RestoreSnapshot,
    DeleteVolume,
    CreateSnapshot,
    CreateGroup,
    DeleteGroup,
    DeleteSnapshot,
    Expand,
    Modify,
    ControllerPublish,
    ControllerUnpublish,
    Stage,
    Publish,
    Unpublish,
    Unstage,
}

use Call::*;

/// What a call works on; made anew every time.
pub struct Subject {
    call: Call,
    number: u32,
    volume: String,
    snapshot: String,
    group: String,
    usage: Usage,
}

fn groups(tandem: &Installation) -> GroupControllerClient<tonic::transport::Channel> {
    GroupControllerClient::new(tandem::uds::channel(&tandem.dir().join("csi.sock")))
}

impl Call {
    fn on_a_node(self) -> bool {
        matches!(self, Stage | Publish | Unpublish | Unstage)
    }

    /// Whether the volume's contents matter.
    fn carries_data(self) -> bool {
        matches!(self, CloneVolume | CopyVolume | RestoreSnapshot | CreateSnapshot | CreateGroup | DeleteSnapshot)
    }
}

/// A MiB of one byte at the start of the device; the device stays.
async fn fill(tandem: &Installation, volume: &str, byte: u8) {
    let device = tandem.attach(volume).await;
    let mut chunk = Memory::zeros(MIB as usize).expect("memory");
    chunk.bytes_mut().fill(byte);
    let file = fs::File::options().write(true).custom_flags(libc::O_DIRECT).open(device).expect("device");
    file.write_all_at(chunk.bytes(), 0).expect("written");
}

/// The byte of that MiB.
async fn filled_with(tandem: &Installation, volume: &str) -> u8 {
    let device = tandem.attach(volume).await;
    let mut chunk = Memory::zeros(MIB as usize).expect("memory");
    let file = fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(device).expect("device");
    file.read_exact_at(chunk.bytes_mut(), 0).expect("read");
    drop(file);
    tandem.detach(volume).await;
    let byte = chunk.bytes()[0];
    assert!(chunk.bytes().iter().all(|b| *b == byte), "volume {volume} is mixed");
    byte
}

impl Subject {
    pub async fn prepare(site: &mut Site, call: Call, number: u32) -> Self {
        let name = format!("base-{number}");
        let volume = if call.on_a_node() {
            site.tandem.create_mounted(&name, SIZE, "ext4").await
        } else {
            site.tandem.create(&name, SIZE, &[]).await
        };
        let usage = Usage::new(&site.tandem, &volume, if call.on_a_node() { "ext4" } else { "" });
        let mut subject = Self { call, number, volume, snapshot: String::new(), group: String::new(), usage };
        let tandem = &site.tandem;
        if call.carries_data() {
            fill(tandem, &subject.volume, 1).await;
        }
        match call {
            RestoreSnapshot | DeleteSnapshot => {
                subject.snapshot = tandem.snapshot(&name, &subject.volume).await.expect("snapshot");
                fill(tandem, &subject.volume, 2).await;
            }
            DeleteGroup => subject.group = subject.create_group(tandem, &name).await.expect("group"),
            ControllerUnpublish => subject.controller_publish(tandem).await.expect("published"),
            Publish | Unpublish | Unstage => {
                subject.usage.stage(tandem).await.expect("staged");
                if call == Unpublish {
                    subject.usage.publish(tandem).await.expect("published");
                    fs::write(subject.usage.target.join("file"), WORD).expect("write");
                }
            }
            Expand => drop(tandem.attach(&subject.volume).await),
            _ => {}
        }
        subject
    }

    /// The call itself; the same every time.
    pub async fn run(&self, tandem: &Installation) -> Result<(), Status> {
        let (name, volume_id) = (format!("new-{}", self.number), self.volume.clone());
        let source = Some(Source::Volume(VolumeSource { volume_id: volume_id.clone() }));
        let mut controller = tandem.controller();
        match self.call {
            CreateVolume => tandem.create_from(&name, SIZE, &[], None).await.map(drop),
            CloneVolume => tandem.create_from(&name, SIZE, &[], source).await.map(drop),
            CopyVolume => tandem.create_from(&name, SIZE, &[("pool", "other")], source).await.map(drop),
            RestoreSnapshot => {
                let source = Source::Snapshot(SnapshotSource { snapshot_id: self.snapshot.clone() });
                tandem.create_from(&name, SIZE, &[], Some(source)).await.map(drop)
            }
            DeleteVolume => delete_volume(tandem, volume_id).await,
            CreateSnapshot => tandem.snapshot(&name, &volume_id).await.map(drop),
            CreateGroup => self.create_group(tandem, &name).await.map(drop),
            DeleteGroup => self.delete_group(tandem, self.group.clone()).await,
            DeleteSnapshot => {
                let request =
                    csi::DeleteSnapshotRequest { snapshot_id: self.snapshot.clone(), secrets: HashMap::default() };
                controller.delete_snapshot(request).await.map(drop)
            }
            Expand => {
                let range = csi::CapacityRange { required_bytes: 2 * SIZE, limit_bytes: 0 };
                let request =
                    csi::ControllerExpandVolumeRequest { volume_id, capacity_range: Some(range), ..Default::default() };
                controller.controller_expand_volume(request).await.map(drop)
            }
            Modify => {
                let mutable_parameters = [("verifyReads".to_owned(), "true".to_owned())].into();
                let request =
                    csi::ControllerModifyVolumeRequest { volume_id, mutable_parameters, ..Default::default() };
                controller.controller_modify_volume(request).await.map(drop)
            }
            ControllerPublish => self.controller_publish(tandem).await,
            ControllerUnpublish => self.controller_unpublish(tandem).await,
            Stage => self.usage.stage(tandem).await,
            Publish => self.usage.publish(tandem).await,
            Unpublish => self.usage.unpublish(tandem).await,
            Unstage => self.usage.unstage(tandem).await,
        }
    }

    /// What the call is for is so.
    pub async fn verify(&self, site: &mut Site) {
        let tandem = &site.tandem;
        let made = || async {
            let name = format!("new-{}", self.number);
            let found = volumes(tandem).await.into_iter().find(|v| v.volume_id != self.volume);
            found.unwrap_or_else(|| panic!("{name} is not there")).volume_id
        };
        match self.call {
            CreateVolume => assert_eq!(filled_with(tandem, &made().await).await, 0),
            CloneVolume | CopyVolume | RestoreSnapshot => assert_eq!(filled_with(tandem, &made().await).await, 1),
            CreateSnapshot | CreateGroup => {
                fill(tandem, &self.volume, 7).await;
                let snapshot_id = snapshots(tandem).await.pop().expect("a snapshot").snapshot_id;
                let source = Some(Source::Snapshot(SnapshotSource { snapshot_id }));
                let restored = tandem.create_from("proof", SIZE, &[], source).await.expect("restored");
                assert_eq!(filled_with(tandem, &restored).await, 1);
                assert_eq!(filled_with(tandem, &self.volume).await, 7);
            }
            DeleteSnapshot => assert_eq!(filled_with(tandem, &self.volume).await, 2),
            Expand => {
                let device = tandem.attach(&self.volume).await;
                let mut file = fs::File::open(device).expect("device");
                let size = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).expect("size");
                assert_eq!(size, 2 * SIZE as u64);
            }
            Stage => {
                self.usage.publish(tandem).await.expect("published");
                fs::write(self.usage.target.join("file"), WORD).expect("write");
            }
            Publish => fs::write(self.usage.target.join("file"), WORD).expect("write"),
            Unpublish => {
                assert!(!self.usage.target.exists());
                let kept = fs::read_to_string(self.usage.staging.join("file")).expect("read");
                assert_eq!(kept, WORD);
            }
            Unstage => assert!(is_empty(&self.usage.staging), "something is left in the staging directory"),
            DeleteVolume | DeleteGroup | Modify | ControllerPublish | ControllerUnpublish => {}
        }
    }

    /// Takes away everything there is.
    pub async fn clean_up(&self, site: &mut Site) {
        let tandem = &site.tandem;
        if self.call.on_a_node() {
            self.usage.unpublish(tandem).await.expect("unpublished");
            self.usage.unstage(tandem).await.expect("unstaged");
        }
        for snapshot in snapshots(tandem).await {
            if snapshot.group_snapshot_id.is_empty() {
                let request =
                    csi::DeleteSnapshotRequest { snapshot_id: snapshot.snapshot_id, secrets: HashMap::default() };
                tandem.controller().delete_snapshot(request).await.expect("deleted");
            } else {
                self.delete_group(tandem, snapshot.group_snapshot_id).await.expect("deleted");
            }
        }
        for volume in volumes(tandem).await {
            tandem.detach(&volume.volume_id).await;
            let request =
                csi::ControllerUnpublishVolumeRequest { volume_id: volume.volume_id.clone(), ..Default::default() };
            tandem.controller().controller_unpublish_volume(request).await.expect("unpublished");
            delete_volume(tandem, volume.volume_id).await.expect("deleted");
        }
        let _ = fs::remove_dir(&self.usage.staging);
    }

    async fn create_group(&self, tandem: &Installation, name: &str) -> Result<String, Status> {
        let request = csi::CreateVolumeGroupSnapshotRequest {
            name: name.to_owned(),
            source_volume_ids: vec![self.volume.clone()],
            ..Default::default()
        };
        let made = groups(tandem).create_volume_group_snapshot(request).await?.into_inner();
        Ok(made.group_snapshot.expect("a group").group_snapshot_id)
    }

    async fn delete_group(&self, tandem: &Installation, group_snapshot_id: String) -> Result<(), Status> {
        let request = csi::DeleteVolumeGroupSnapshotRequest { group_snapshot_id, ..Default::default() };
        groups(tandem).delete_volume_group_snapshot(request).await.map(drop)
    }

    async fn controller_publish(&self, tandem: &Installation) -> Result<(), Status> {
        let node = tandem.node().node_get_info(csi::NodeGetInfoRequest {}).await?.into_inner().node_id;
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: self.volume.clone(),
            node_id: node,
            volume_capability: Some(block()),
            ..Default::default()
        };
        tandem.controller().controller_publish_volume(request).await.map(drop)
    }

    async fn controller_unpublish(&self, tandem: &Installation) -> Result<(), Status> {
        let request = csi::ControllerUnpublishVolumeRequest { volume_id: self.volume.clone(), ..Default::default() };
        tandem.controller().controller_unpublish_volume(request).await.map(drop)
    }
}

async fn delete_volume(tandem: &Installation, volume_id: String) -> Result<(), Status> {
    let request = csi::DeleteVolumeRequest { volume_id, ..Default::default() };
    tandem.controller().delete_volume(request).await.map(drop)
}

async fn volumes(tandem: &Installation) -> Vec<csi::Volume> {
    let listed = tandem.controller().list_volumes(csi::ListVolumesRequest::default()).await.expect("volumes");
    listed.into_inner().entries.into_iter().filter_map(|entry| entry.volume).collect()
}

async fn snapshots(tandem: &Installation) -> Vec<csi::Snapshot> {
    let listed = tandem.controller().list_snapshots(csi::ListSnapshotsRequest::default()).await.expect("snapshots");
    listed.into_inner().entries.into_iter().filter_map(|entry| entry.snapshot).collect()
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).expect("directory").next().is_none()
}
