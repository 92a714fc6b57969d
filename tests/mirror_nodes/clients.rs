//! A volume with copies on two nodes that is used on a third one, and what nobody answers there.

use crate::bytes;
use crate::site::{SIZE, Site, Up, Wanted, eventually, size, write};
use std::time::Duration;
use tandem::catalog::{ClientSpec, NodeName};
use tandem::replica::manager::AttachFailure;
use tandem::volume::InstanceId;

/// Nodes n1 and n2 have the copies, and the volume is published at n3.
async fn published(site: &mut Site) -> (Up, Up, Up, Wanted) {
    let first = site.start("n1", site.catalog()).await;
    let second = site.start("n2", site.catalog()).await;
    let third = site.start("n3", site.catalog()).await;
    for node in ["n1", "n2", "n3"] {
        site.announce(node).await;
    }
    let volume = site.create(&["n1", "n2"]).await;
    let (one, publication) = (volume.copies["n1"], InstanceId::random());
    site.change(volume.id, |volume| {
        let mirror = volume.spec.mirror.as_mut().expect("mirrored");
        mirror.primary = Some(one);
        mirror.client = Some(ClientSpec { node: NodeName("n3".into()), publication });
    })
    .await;
    eventually("the volume at n3", async || third.manager.publication(volume.id)).await;
    (first, second, third, volume)
}

/// Its device waited with what it had asked, and the one task that follows the catalogue waited with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_grows_while_nobody_serves_it_holds_up_no_other_volume() {
    let mut site = Site::new(&["n1", "n2", "n3"]);
    let (first, second, third, volume) = published(&mut site).await;
    let device = third.attach(volume.id).await;
    write(&device, 0..16, 1).await;
    first.until_up_to_date(volume.id, volume.copies["n2"]).await;
    first.kill().await;
    second.kill().await;
    let path = device.clone();
    let waits = tokio::spawn(async move { write(&path, 0..16, 2).await });
    site.change(volume.id, |volume| (volume.spec.size, volume.status.size) = (size(2 * SIZE), size(2 * SIZE))).await;
    let other = site.create(&["n3"]).await;
    eventually("a copy of another volume", async || {
        (!site.volume(other.id).await.object.status.copies.is_empty()).then_some(())
    })
    .await;
    assert!(!waits.is_finished(), "nobody has answered");
    let first = site.start("n1", site.catalog()).await;
    let second = site.start("n2", site.catalog()).await;
    waits.await.expect("answered in the end");
    eventually("the device to grow", async || (bytes(&device) == 2 * SIZE).then_some(())).await;
    third.manager.detach(volume.id).await.expect("detached");
    for up in [first, second, third] {
        up.kill().await;
    }
}

/// The call held the volume's operation, and who would have ended that was told to come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_waits_for_a_primary_does_not_hold_up_the_one_that_gives_the_device_up() {
    let mut site = Site::new(&["n1", "n2", "n3"]);
    let (first, second, third, volume) = published(&mut site).await;
    first.kill().await;
    second.kill().await;
    let (manager, id) = (third.manager.clone(), volume.id);
    eventually("the client to hear that nobody answers", async || {
        let view = manager.volume(id).await?;
        (!view.health.is_empty()).then_some(())
    })
    .await;
    let attaches = || {
        tokio::spawn({
            let manager = manager.clone();
            async move { manager.attach(id).await }
        })
    };
    let waits = attaches();
    // Each of them ends it, if it has begun by then.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        manager.detach(id).await.expect("nothing holds it up");
    }
    let refused = waits.await.expect("no panic").expect_err("nobody serves it");
    assert!(matches!(refused, AttachFailure::NotServed(_)), "{refused}");
    let waits = attaches();
    tokio::time::sleep(Duration::from_millis(200)).await;
    manager.abandon(id).await.expect("nothing holds it up");
    assert!(waits.await.expect("no panic").is_err());
    third.kill().await;
}
