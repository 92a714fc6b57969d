//! What is deleted for a node that was away, or for nobody.

use crate::site::{Site, eventually, write};
use crate::until_all_is_seen;
use tandem::catalog::{Descriptor, Embedded, Node, RebuildAfter, Stored, Volume, VolumeConfiguration, VolumePhase};
use tandem::volume::{SnapshotId, VolumeId};

async fn object_of_n2(file: &Embedded) -> Stored<Node> {
    file.get::<Node>("n2").await.expect("reads").expect("is there")
}

/// The node was removed, and is back; these were deleted meanwhile.
async fn give_up(site: &Site, volumes: [VolumeId; 2]) {
    let mut stored = object_of_n2(&site.file).await;
    stored.object.given_up.volumes = volumes.into();
    site.file.update(stored).await.expect("removed, and back");
}

/// A person has taken the node for gone, and what was on it was deleted without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_comes_back_gives_up_what_was_deleted_without_it() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let (volume, sole) = (site.create(&["n1", "n2"]).await, site.create_sole("n2", &second).await);
    site.wish(volume.id, Some(volume.copies["n1"])).await;
    let device = first.attach(volume.id).await;
    write(&device, 0..8, 7).await;
    first.until_up_to_date(volume.id, volume.copies["n2"]).await;
    first.manager.detach(volume.id).await.expect("detached");
    second.kill().await;
    let id = volume.id.to_string();
    for gone in [&id, &sole.id.to_string()] {
        let stored = site.file.get::<Volume>(gone).await.expect("reads").expect("is there");
        site.file.delete(&stored).await.expect("deleted");
    }
    let stored = site.file.get::<VolumeConfiguration>(&id).await.expect("reads").expect("is there");
    site.file.delete(&stored).await.expect("deleted");
    give_up(&site, [volume.id, sole.id]).await;
    let file = site.file.clone();
    let own = async || object_of_n2(&file).await;
    let second = site.start("n2", site.catalog()).await;
    eventually("its list is empty", async || own().await.object.given_up.is_empty().then_some(())).await;
    assert!(second.manager.copy_here(volume.id).is_none() && second.manager.volume(sole.id).await.is_none());
    assert!(first.manager.copy_here(volume.id).is_some(), "nobody has said so to this one");
    first.kill().await;
    second.kill().await;
}

/// What cannot be opened when its node comes back goes when it can be. What the catalogue has again stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_deleted_without_a_node_is_remembered_until_its_copy_can_be_opened() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let (gone, back) = (site.create_sole("n2", &second).await, site.create_sole("n2", &second).await);
    second.kill().await;
    let superblock = site.path("n2").join("pool/trees").join(gone.copies["n2"].to_string()).join("superblock");
    let away = site.path("n2").join("superblock");
    std::fs::rename(&superblock, &away).expect("it cannot be opened now");
    let stored = site.volume(gone.id).await;
    site.file.delete(&stored).await.expect("deleted");
    give_up(&site, [gone.id, back.id]).await;
    let file = site.file.clone();
    let own = async || object_of_n2(&file).await;
    let second = site.start("n2", site.catalog()).await;
    until_all_is_seen(&mut site).await;
    let left = async || (own().await.object.given_up.volumes == [gone.id].into()).then_some(());
    eventually("what may be in what is not open to be all that is left", left).await;
    let version = own().await.version;
    let (manager, id) = (&second.manager, SnapshotId::random());
    manager.ensure_no_snapshot(id, "", true).await.expect_err("a copy that is not open may have followed its seal");
    manager.ensure_no_snapshot(id, "", false).await.expect("it has no copies that follow");
    until_all_is_seen(&mut site).await;
    assert_eq!(own().await.version, version, "what stays as it is is not written again");
    second.kill().await;
    std::fs::rename(&away, &superblock).expect("it can be opened again");
    let second = site.start("n2", site.catalog()).await;
    eventually("its list is empty", async || own().await.object.given_up.is_empty().then_some(())).await;
    assert!(second.manager.volume(gone.id).await.is_none() && second.manager.volume(back.id).await.is_some());
    first.kill().await;
    second.kill().await;
}

/// What nobody knows goes if nothing was ever written to it. What is wanted now lies beside a copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_made_volume_that_was_used_is_kept() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let (used, empty) = (site.create(&["n1", "n2"]).await, site.create(&["n1", "n2"]).await);
    until_all_is_seen(&mut site).await;
    site.wish(used.id, Some(used.copies["n1"])).await;
    let device = first.attach(used.id).await;
    write(&device, 0..1, 7).await;
    first.until_up_to_date(used.id, used.copies["n2"]).await;
    first.manager.detach(used.id).await.expect("detached");
    for volume in [&used, &empty] {
        let doubted = (VolumePhase::Creating, true);
        site.change(volume.id, |volume| (volume.status.phase, volume.spec.deleted) = doubted).await;
    }
    until_all_is_seen(&mut site).await;
    eventually("no copy", async || site.volume(empty.id).await.object.status.copies.is_empty().then_some(())).await;
    assert!(first.manager.copy_here(used.id).is_some() && second.manager.copy_here(used.id).is_some());

    let after = RebuildAfter::Seconds(77);
    site.change(used.id, |volume| {
        (volume.status.phase, volume.spec.deleted) = (VolumePhase::Ready, false);
        volume.spec.rebuild_after = after;
    })
    .await;
    eventually("what is wanted beside the copy", async || {
        let here = second.manager.copy_here(used.id)?;
        let known = Descriptor::decode(&here.descriptor);
        matches!(known, Some(Descriptor::Volume { rebuild_after: Some(known), .. }) if known == after).then_some(())
    })
    .await;

    let sole = site.create_sole("n1", &first).await;
    first.manager.delete_unwritten(sole.id).await.expect("there is nothing in it");
    let sole = site.create_sole("n1", &first).await;
    let device = first.attach(sole.id).await;
    write(&device, 0..1, 7).await;
    first.manager.detach(sole.id).await.expect("detached");
    let refused = first.manager.delete_unwritten(sole.id).await.expect_err("somebody has used it");
    assert!(refused.to_string().contains("tandem recover"), "{refused}");
    first.manager.delete_volume(sole.id).await.expect("whoever knows it may");
    first.kill().await;
    second.kill().await;
}
