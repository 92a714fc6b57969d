//! One of a node's disks does nothing, and says nothing either.

use crate::site::{SIZE, Site, Up, Wanted, eventually, size};
use crate::small_pool::SmallPool;
use std::time::Duration;
use tandem::volume::VolumeSize;

/// Time for the node to come to a step that hangs: it has a few milliseconds of work before.
const A_WHILE: Duration = Duration::from_secs(3);
/// Of the volumes of a pool, 16 may be at its disk.
const MORE_THAN_FIT: usize = 20;

impl Site {
    async fn confirmed(&self, volume: &Wanted) -> Option<VolumeSize> {
        let stored = self.volume(volume.id).await;
        stored.object.status.reports.get(&volume.copies["n1"]).map(|report| report.size)
    }

    async fn until_confirmed(&self, volume: &Wanted, bytes: u64) {
        let is_done = async || (self.confirmed(volume).await == Some(size(bytes))).then_some(());
        eventually("the copy with its size", is_done).await;
    }

    async fn grow(&self, volume: &Wanted, bytes: u64) {
        self.change(volume.id, |volume| volume.spec.size = size(bytes)).await;
    }

    async fn until_gone(&self, volume: &Wanted, up: &Up) {
        self.change(volume.id, |volume| volume.spec.deleted = true).await;
        eventually("the copy to go", async || up.manager.copy_here(volume.id).is_none().then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_holds_up_no_copy_on_another_one() {
    let pool = SmallPool::ext4(512);
    let mut site = Site::new(&["n1"]);
    site.pools.push(("hangs", pool.path().to_owned()));
    let up = site.start("n1", site.catalog()).await;
    site.announce("n1").await;
    let (grows, goes) = (site.create_in("hangs", "n1").await, site.create_in("hangs", "n1").await);
    let well = site.create(&["n1"]).await;
    for volume in [&grows, &goes, &well] {
        site.until_confirmed(volume, SIZE).await;
    }
    let hanging = pool.hang();
    site.grow(&grows, 2 * SIZE).await;
    tokio::time::sleep(A_WHILE).await;
    site.change(goes.id, |volume| volume.spec.deleted = true).await;
    let begun = site.create_in("hangs", "n1").await;
    tokio::time::sleep(A_WHILE).await;
    // Comes for a volume for which something hangs already.
    site.grow(&grows, 3 * SIZE).await;

    let made = site.create(&["n1"]).await;
    site.until_confirmed(&made, SIZE).await;
    site.grow(&well, 2 * SIZE).await;
    site.until_confirmed(&well, 2 * SIZE).await;
    site.until_gone(&made, &up).await;
    assert_eq!(site.confirmed(&grows).await, Some(size(SIZE)), "its disk hangs");
    assert!(up.manager.copy_here(goes.id).is_some() && site.confirmed(&begun).await.is_none(), "its disk hangs");

    drop(hanging);
    site.until_confirmed(&grows, 3 * SIZE).await;
    site.until_confirmed(&begun, SIZE).await;
    for volume in [&goes, &grows, &begun, &well] {
        site.until_gone(volume, &up).await;
    }
    up.kill().await;
}

/// Those that find no room at the disk wait for it, and are not tried again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_volumes_than_may_be_at_a_disk_that_hangs_go_on_after_it() {
    let pool = SmallPool::ext4(4096);
    let mut site = Site::new(&["n1"]);
    site.pools.push(("hangs", pool.path().to_owned()));
    let up = site.start("n1", site.catalog()).await;
    site.announce("n1").await;
    let mut volumes = Vec::new();
    for _ in 0..MORE_THAN_FIT {
        volumes.push(site.create_in("hangs", "n1").await);
    }
    for volume in &volumes {
        site.until_confirmed(volume, SIZE).await;
    }
    let hanging = pool.hang();
    for volume in &volumes {
        site.grow(volume, 2 * SIZE).await;
    }
    tokio::time::sleep(A_WHILE).await;
    drop(hanging);
    for volume in &volumes {
        site.until_confirmed(volume, 2 * SIZE).await;
    }
    up.kill().await;
}
