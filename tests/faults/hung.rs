//! What takes a volume away from a node on which its device hangs.

use crate::site::{PATIENCE, Site};
use crate::small_pool::SmallPool;
use crate::{dirty, unstage_in_time};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tonic::Code;

/// Of the pool of node 1: more than twice the volume.
const POOL_MIB: usize = 512;
/// Within which kubelet hears that a volume is unstaged behind a call that hangs.
const BEHIND_A_CALL: Duration = Duration::from_secs(30);

/// The superblock of the copy at node 1, and where it is while nobody shall find it.
fn superblock(site: &Site) -> [PathBuf; 2] {
    let node = site.cluster.dir().join("node-1");
    let mut trees = fs::read_dir(node.join("pool/trees")).expect("trees").flatten();
    [trees.next().expect("a copy").path().join("superblock"), node.join("superblock")]
}

/// Its mount hung, and whoever unstaged it was told to repeat, until the copy could be opened.
#[tokio::test(flavor = "multi_thread")]
async fn a_filesystem_whose_copy_cannot_be_opened_is_unstaged_and_used_elsewhere() {
    let site = Site::with_filesystem().await;
    site.attach(1).await;
    dirty(&site.staging(1));
    site.until_whole().await;
    let [there, away] = superblock(&site);
    site.cluster.run(&["kill", "replica", "1"]);
    fs::rename(&there, &away).expect("it is there");
    site.cluster.run(&["start", "replica", "1"]);
    unstage_in_time(&site, 1).await;
    site.unpublish(1).await;
    site.attach(2).await;
    assert_eq!(fs::read(site.staging(2).join("synced")).expect("reads"), b"synced");
    fs::write(site.staging(2).join("synced"), b"newer").expect("written");
    site.cluster.run(&["kill", "replica", "1"]);
    fs::rename(&away, &there).expect("it was there");
    site.cluster.run(&["start", "replica", "1"]);
    println!("a member again after {:?}", site.until_whole().await);
    site.detach(2).await;
    site.attach(1).await;
    assert_eq!(fs::read(site.staging(1).join("synced")).expect("reads"), b"newer");
    site.detach(1).await;
    site.finish().await;
}

/// Node 1 is alone, and its disk does nothing; the volume is used at node 2 then, and at node 1 when all is well again.
async fn used_elsewhere(site: &Site) {
    site.unpublish(1).await;
    site.attach(2).await;
    fs::write(site.staging(2).join("newer"), b"newer").expect("written");
}

fn isolate(site: &Site) {
    for [from, to] in [["1", "2"], ["2", "1"], ["1", "controller"], ["controller", "1"]] {
        site.cluster.run(&["cut", from, to]);
    }
}

async fn used_again(site: Site) {
    site.cluster.run(&["heal"]);
    println!("a member again after {:?}", site.until_whole().await);
    site.detach(2).await;
    site.attach(1).await;
    assert_eq!(fs::read(site.staging(1).join("newer")).expect("reads"), b"newer");
    site.detach(1).await;
    site.finish().await;
}

/// It was waited for as long as it took, because its device was served when that was asked once.
#[tokio::test(flavor = "multi_thread")]
async fn an_unmount_that_is_slow_is_given_up_when_its_device_has_lost_its_primary() {
    let pool = SmallPool::ext4(POOL_MIB);
    let site = Site::with_filesystem_in_pool(pool.path()).await;
    site.attach(1).await;
    dirty(&site.staging(1));
    let hanging = pool.hang();
    let isolated = async {
        tokio::time::sleep(Duration::from_secs(7)).await;
        let refused = site.abandon(1).await.expect_err("it is served, and slow");
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
        isolate(&site);
        used_elsewhere(&site).await;
    };
    let began = Instant::now();
    tokio::join!(site.unstage(1), isolated);
    println!("unstaged and used elsewhere after {:?}", began.elapsed());
    assert!(began.elapsed() < PATIENCE);
    drop(hanging);
    used_again(site).await;
}

/// Whoever unstaged it was told to repeat, until the machine was started again.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_to_stage_that_hangs_where_nobody_serves_ends_when_the_volume_is_unstaged() {
    let pool = SmallPool::ext4(POOL_MIB);
    let site = Site::with_filesystem_in_pool(pool.path()).await;
    site.published(1).await;
    let began = Instant::now();
    while !site.mirror(1).await.is_some_and(|mirror| mirror.serves) {
        assert!(began.elapsed() < PATIENCE, "it does not serve");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let hanging = pool.hang();
    let (staged, ()) = tokio::join!(site.stage(1), async {
        while site.device(1).await.as_os_str().is_empty() {
            assert!(began.elapsed() < PATIENCE, "it has no device");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        isolate(&site);
        let began = Instant::now();
        site.unstage(1).await;
        println!("unstaged after {:?}", began.elapsed());
        assert!(began.elapsed() < BEHIND_A_CALL, "{:?}", began.elapsed());
    });
    println!("the call ended: {}", staged.expect_err("its device was given up").message());
    used_elsewhere(&site).await;
    drop(hanging);
    used_again(site).await;
}
