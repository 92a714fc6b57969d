//! A device that a killed engine left at a node whose copy cannot be opened when it starts again.

use crate::site::{Aligned, Site, Up, Wanted, direct, eventually, has, write};
use crate::until_all_is_seen;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tandem::replica::manager::AttachFailure;
use tandem::volume::InstanceId;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

/// The first 16 blocks of the volume have content 1, and both copies have that. The first block is to have content 2: that waits in
/// the device at n1, whose copy is primary and cannot be opened.
struct Left {
    first: Up,
    second: Up,
    volume: Wanted,
    device: PathBuf,
    waits: JoinHandle<io::Result<()>>,
}

async fn left(site: &mut Site) -> Left {
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1", "n2"]).await;
    site.wish(volume.id, Some(volume.copies["n1"])).await;
    let device = first.attach(volume.id).await;
    write(&device, 0..16, 1).await;
    first.until_up_to_date(volume.id, volume.copies["n2"]).await;
    second.kill().await;
    let waits = begin(&device, 2);
    let asked = async || first.status(volume.id).await.filter(|status| status.requests > 0);
    eventually("a request that the other copy has not confirmed", asked).await;
    first.kill().await;
    assert!(site.configuration(volume.id).await.is_member(volume.copies["n2"]), "it was not dropped meanwhile");
    hide(site, volume.copies["n1"]);
    let second = site.start("n2", site.catalog()).await;
    let first = site.start("n1", site.catalog()).await;
    Left { first, second, volume, device, waits }
}

/// Writes the first block and flushes.
fn begin(device: &Path, content: u8) -> JoinHandle<io::Result<()>> {
    let device = direct(device);
    tokio::task::spawn_blocking(move || {
        device.write_all_at(&Aligned([content; 4096]).0, 0)?;
        device.sync_data()
    })
}

fn superblock(site: &Site, copy: InstanceId) -> [PathBuf; 2] {
    let node = site.path("n1");
    [node.join("pool/trees").join(copy.to_string()).join("superblock"), node.join(format!("superblock-{copy}"))]
}

/// A copy of n1 cannot be opened from now on,
fn hide(site: &Site, copy: InstanceId) {
    let [there, away] = superblock(site, copy);
    std::fs::rename(there, away).expect("it is there");
}

/// and now it can.
fn bring_back(site: &Site, copy: InstanceId) {
    let [there, away] = superblock(site, copy);
    std::fs::rename(away, there).expect("it was there");
}

/// Its mount hung until the copy was open again, and longer if that never was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_whose_copy_cannot_be_opened_ends_when_another_copy_is_primary() {
    let mut site = Site::new(&["n1", "n2"]);
    let Left { first, second, volume, waits, .. } = left(&mut site).await;
    let (one, two) = (volume.copies["n1"], volume.copies["n2"]);
    until_all_is_seen(&mut site).await;
    assert!(!waits.is_finished(), "no other copy was primary");
    site.wish(volume.id, Some(two)).await;
    let device = second.attach(volume.id).await;
    let ended = tokio::time::timeout(crate::site::LONG, waits).await.expect("it ends").expect("no panic");
    assert_eq!(ended.expect_err("nobody executes it").raw_os_error(), Some(libc::EIO));
    assert!(has(&device, 0..16, 1).await, "it was never confirmed");
    write(&device, 0..1, 3).await;
    // Nobody has unstaged it, and its copy is well again.
    first.kill().await;
    bring_back(&site, one);
    let first = site.start("n1", site.catalog()).await;
    second.until_up_to_date(volume.id, one).await;
    assert!(has(&device, 0..1, 3).await, "what was overtaken is not executed");
    first.manager.detach(volume.id).await.expect("detached");
    second.manager.detach(volume.id).await.expect("detached");
    site.wish(volume.id, Some(one)).await;
    let device = first.attach(volume.id).await;
    assert!(has(&device, 0..1, 3).await && has(&device, 1..16, 1).await);
    first.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    second.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_whose_copy_is_still_primary_waits_until_that_can_be_opened() {
    let mut site = Site::new(&["n1", "n2"]);
    let Left { first, second, volume, device, waits } = left(&mut site).await;
    until_all_is_seen(&mut site).await;
    first.manager.detach(volume.id).await.expect_err("it is not taken away under whoever uses it");
    assert!(!waits.is_finished());
    first.kill().await;
    bring_back(&site, volume.copies["n1"]);
    let first = site.start("n1", site.catalog()).await;
    waits.await.expect("no panic").expect("it is executed in the end");
    assert!(has(&device, 0..1, 2).await && has(&device, 1..16, 1).await);
    first.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    second.kill().await;
}

/// Whoever unstaged it was told to repeat, for ever. A volume without another copy is worth waiting for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_to_go_does_not_wait_for_its_copy_if_there_are_others() {
    let mut site = Site::new(&["n1", "n2"]);
    let Left { first, second, volume, waits, .. } = left(&mut site).await;
    let sole = site.create_sole("n1", &first).await;
    let (one, only) = (volume.copies["n1"], sole.copies["n1"]);
    let kept = first.attach(sole.id).await;
    write(&kept, 0..1, 5).await;
    first.kill().await;
    hide(&site, only);
    let first = site.start("n1", site.catalog()).await;
    until_all_is_seen(&mut site).await;
    let manager = &first.manager;
    let code = |failure: AttachFailure| Status::from(failure).code();
    let refused = code(manager.detach(volume.id).await.expect_err("it waits"));
    assert_eq!(refused, Code::FailedPrecondition, "whoever unstages it gives it up then");
    assert_eq!(code(manager.detach(sole.id).await.expect_err("it waits")), Code::Unavailable);
    let refused = manager.abandon(sole.id).await.expect_err("nobody else has it");
    assert!(matches!(refused, AttachFailure::Only(_)), "{refused}");
    assert!(!waits.is_finished(), "only one that is to go");
    manager.abandon(volume.id).await.expect("given up");
    let ended = tokio::time::timeout(crate::site::LONG, waits).await.expect("it ends").expect("no panic");
    assert_eq!(ended.expect_err("nobody executes it").raw_os_error(), Some(libc::EIO));
    manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    bring_back(&site, one);
    bring_back(&site, only);
    let first = site.start("n1", site.catalog()).await;
    assert!(has(&kept, 0..1, 5).await, "it goes on");
    let device = first.attach(volume.id).await;
    assert!(has(&device, 1..16, 1).await);
    for volume in [volume.id, sole.id] {
        first.manager.detach(volume).await.expect("detached");
    }
    first.kill().await;
    second.kill().await;
}
