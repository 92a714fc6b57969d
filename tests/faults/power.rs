//! Nodes that lose power: all processes of a node end at one moment, and so does what its disk had in its cache. What was flushed is
//! there, and what a node that did not lose power has acknowledged.

use crate::load::Load;
use crate::site::{PATIENCE, Site};
use crate::volatile_disk::{Filesystem, Flushes, VolatileDisk, VolatilePool};
use nix::sys::signal::Signal;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tandem::replica::device::loop_device;
use tandem::volume::VolumeId;

/// Of each pool: several times the volume.
const POOL_MIB: u64 = 512;

/// Nodes whose pools lie on disks that can lose power. Dropped in this order: processes, devices, disks.
struct Rig {
    site: Site,
    devices: Devices,
    pools: Vec<VolatilePool>,
}

/// Those of the volume: nobody else finds one whose copy is in such a pool when its node is dead.
struct Devices(VolumeId);

impl Devices {
    fn release(&self) {
        // One that somebody has open goes with its last user.
        let _ = loop_device::detach_all(self.0);
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.release();
    }
}

impl Rig {
    /// A node with a copy on each of these.
    async fn under_load(kinds: &[Filesystem]) -> (Self, PathBuf, Load) {
        let pools: Vec<_> = kinds.iter().map(|kind| VolatilePool::new(*kind, POOL_MIB)).collect();
        let paths: Vec<_> = pools.iter().map(VolatilePool::path).collect();
        let (site, device, load) = Site::under_load_with_pools(&paths).await;
        let devices = Devices(site.id.parse().expect("an id"));
        (Self { site, devices, pools }, device, load)
    }

    /// Their engines stop first: from then on nothing is answered, so nothing is that the disk has not done before.
    fn cut(&mut self, nodes: &[usize]) {
        nodes.iter().for_each(|node| self.site.signal(*node, Signal::SIGSTOP));
        nodes.iter().for_each(|node| self.pools[node - 1].cut());
        nodes.iter().for_each(|node| drop(self.site.cluster.run(&["kill", "all", &node.to_string()])));
    }

    fn restore(&mut self, nodes: &[usize], flushes: Flushes) {
        for node in nodes {
            self.pools[node - 1].restore(flushes);
            self.site.cluster.run(&["start", "all", &node.to_string()]);
        }
    }

    /// The node where the volume was used has lost power, and so has every other one.
    async fn attach_again(&self, number: usize) -> PathBuf {
        self.site.detach(number).await;
        self.site.oracle.loses_power();
        self.site.attach(number).await
    }

    /// See [`Site::finish_at_each`].
    async fn finish_at_each(self, nodes: &[usize]) {
        let Self { site, devices: _devices, pools: _pools } = self;
        site.finish_at_each(nodes).await;
    }
}

#[repr(C, align(4096))]
struct Page([u8; 4096]);

fn open(device: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device")
}

fn first_byte(device: &File, block: u64) -> u8 {
    let mut page = Box::new(Page([0xff; 4096]));
    device.read_exact_at(&mut page.0, block * 4096).expect("reads");
    page.0[0]
}

/// What the tests below rest on.
#[test]
fn a_disk_that_loses_power_keeps_what_was_flushed_and_nothing_else() {
    let mut disk = VolatileDisk::new(16);
    let write = |device: &File, block: u64| device.write_all_at(&Page([7; 4096]).0, block * 4096).expect("writes");
    for flushes in [Flushes::Obeyed, Flushes::Ignored] {
        let device = open(&disk.start(flushes));
        write(&device, 1);
        write(&device, 3000);
        device.sync_data().expect("flushes");
        write(&device, 2);
        write(&device, 2000);
        assert_eq!([1, 2, 2000, 3000].map(|block| first_byte(&device, block)), [7; 4]);
        disk.cut();
        drop(device);
        let device = open(&disk.start(Flushes::Obeyed));
        let found = [1, 2, 2000, 3000].map(|block| first_byte(&device, block));
        match flushes {
            Flushes::Obeyed => assert_eq!(found, [7, 0, 0, 7]),
            Flushes::Ignored => assert_eq!(found, [0; 4]),
        }
        for block in [1, 3000] {
            device.write_all_at(&Page([0; 4096]).0, block * 4096).expect("writes");
        }
        device.sync_data().expect("flushes");
        disk.cut();
    }
}

/// One copy. In the end its disk ignores flushes, and that is found.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_loses_power_keeps_what_was_flushed() {
    let (mut rig, _, mut load) = Rig::under_load(&[Filesystem::Ext4]).await;
    for flushes in [Flushes::Obeyed, Flushes::Ignored] {
        load.await_writes(500, PATIENCE);
        rig.cut(&[1]);
        let done = load.stop();
        rig.devices.release();
        rig.restore(&[1], flushes);
        let device = rig.attach_again(1).await;
        println!("{} writes before power was lost", done.writes);
        rig.site.check(&device).await;
        load = Load::start(&device, &rig.site.oracle);
    }
    load.await_writes(500, PATIENCE);
    rig.cut(&[1]);
    load.stop();
    rig.devices.release();
    rig.restore(&[1], Flushes::Obeyed);
    let device = rig.attach_again(1).await;
    let (oracle, found) = (rig.site.oracle.clone(), device.clone());
    let lost = tokio::task::spawn_blocking(move || oracle.wrong(&found).len()).await.expect("read");
    println!("a disk that ignores flushes has lost {lost} blocks that were flushed");
    assert!(lost > 0, "a disk that ignores flushes is not found");
    let Rig { site, devices: _devices, pools: _pools } = rig;
    site.detach(1).await;
    site.finish().await;
}

/// Two copies: power is lost at the secondary's node, at the primary's, and at both at once. Cases 1, 2, 3, 9, 19 and 20.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_nodes_that_loses_power_loses_nothing_and_both_lose_only_what_was_not_flushed() {
    let (mut rig, device, load) = Rig::under_load(&[Filesystem::Ext4, Filesystem::Xfs]).await;
    load.await_writes(300, PATIENCE);
    rig.cut(&[2]);
    println!("the secondary's node: dropped after {:?}", rig.site.until_dropped(2).await);
    load.await_writes(200, PATIENCE);
    // Without a load it is brought up to date sooner; under one it is in other tests.
    load.stop_well();
    rig.restore(&[2], Flushes::Obeyed);
    println!("a member again after {:?}", rig.site.until_whole().await);
    let load = Load::start(&device, &rig.site.oracle);
    load.await_writes(300, PATIENCE);

    rig.cut(&[1]);
    load.stop();
    rig.devices.release();
    rig.site.unpublish(1).await;
    let device = rig.site.attach(2).await;
    rig.site.check(&device).await;
    let load = Load::start(&device, &rig.site.oracle);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    rig.restore(&[1], Flushes::Obeyed);
    println!("the primary's node: a member again after {:?}", rig.site.until_whole().await);
    let load = Load::start(&device, &rig.site.oracle);
    load.await_writes(300, PATIENCE);
    rig.site.unstage(1).await;

    rig.cut(&[2, 1]);
    load.stop();
    rig.devices.release();
    rig.restore(&[1, 2], Flushes::Obeyed);
    let device = rig.attach_again(2).await;
    rig.site.check(&device).await;
    println!("both: members after {:?}", rig.site.until_whole().await);
    let load = Load::start(&device, &rig.site.oracle);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    rig.finish_at_each(&[2, 1]).await;
}
