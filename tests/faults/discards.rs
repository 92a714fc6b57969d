//! Discards of a mirrored volume, of blocks that were written and of blocks that never were: they read as zeros on each copy.

use crate::site::{LOADED, PATIENCE, Site};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use tandem::memory::Memory;

const MIB: usize = 1 << 20;
/// Length of the part of the volume that no load writes to.
const PART_MIB: usize = 16;

/// The part of the volume behind what loads write to, MiB by MiB: the byte that each is full of.
pub struct Part([u8; PART_MIB]);

impl Part {
    pub fn new() -> Self {
        Self([0; PART_MIB])
    }

    fn at(mib: usize) -> u64 {
        LOADED as u64 + (mib * MIB) as u64
    }

    fn open(device: &Path) -> File {
        File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device opens")
    }

    pub fn write(&mut self, device: &Path, range: Range<usize>, byte: u8) {
        let (file, mut chunk) = (Self::open(device), Memory::zeros(MIB).expect("memory"));
        chunk.bytes_mut().fill(byte);
        for mib in range {
            file.write_all_at(chunk.bytes(), Self::at(mib)).expect("written");
            self.0[mib] = byte;
        }
        file.sync_data().expect("flushed");
    }

    pub fn discard(&mut self, device: &Path, range: Range<usize>) {
        let mut command = Command::new("blkdiscard");
        command.arg("--offset").arg(Self::at(range.start).to_string());
        command.arg("--length").arg((range.len() * MIB).to_string()).arg(device);
        assert!(command.status().expect("it is installed").success(), "{command:?}");
        self.0[range].fill(0);
    }

    pub fn check(&self, device: &Path) {
        let (file, mut chunk) = (Self::open(device), Memory::zeros(MIB).expect("memory"));
        for (mib, byte) in self.0.iter().enumerate() {
            file.read_exact_at(chunk.bytes_mut(), Self::at(mib)).expect("read");
            let wrong = chunk.bytes().iter().find(|found| *found != byte);
            assert!(wrong.is_none(), "MiB {mib} is full of {byte}, but it has {wrong:?}");
        }
    }
}

/// Case 14.
#[tokio::test(flavor = "multi_thread")]
async fn discards_of_written_and_of_never_written_blocks_read_as_zeros_on_each_copy() {
    let (site, device, load) = Site::under_load(2).await;
    let mut part = Part::new();
    part.write(&device, 0..8, 1);
    part.discard(&device, 4..12);
    part.check(&device);
    load.await_writes(200, PATIENCE);
    // What the copy holds is discarded while it is away, and so is what nobody holds.
    site.cluster.run(&["kill", "all", "2"]);
    println!("dead: dropped after {:?}", site.until_dropped(2).await);
    part.discard(&device, 0..2);
    part.write(&device, 9..11, 2);
    part.discard(&device, 10..13);
    load.await_writes(200, PATIENCE);
    site.cluster.run(&["start", "all", "2"]);
    println!("a member again after {:?}", site.until_whole().await);
    part.write(&device, 1..2, 3);
    part.discard(&device, 3..4);
    load.stop_well();
    part.check(&device);
    site.detach(1).await;
    part.check(&site.attach(2).await);
    site.finish_at_each(&[2]).await;
}
