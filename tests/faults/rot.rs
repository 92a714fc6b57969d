//! A bit of one copy flips at rest, in a layer that a snapshot has sealed: it is named there and nowhere else, and the
//! volume goes on.

use crate::site::{LOADED, PATIENCE, Site};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tandem::memory::Memory;

const BLOCK: usize = 4096;
/// Blocks behind what loads write to, which the snapshot seals,
pub const BLOCKS: usize = 64;
/// and the one of them that is flipped.
const FLIPPED: usize = 17;

fn open(device: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device opens")
}

fn at(block: usize) -> u64 {
    LOADED as u64 + (block * BLOCK) as u64
}

/// What no other block has.
fn content(block: usize) -> Memory {
    let mut memory = Memory::zeros(BLOCK).expect("memory");
    let line = format!("a block that rots: {block:012}\n");
    memory.bytes_mut().chunks_mut(line.len()).for_each(|part| part.copy_from_slice(&line.as_bytes()[..part.len()]));
    memory
}

pub fn write(device: &Path, blocks: std::ops::Range<usize>) {
    let file = open(device);
    for block in blocks {
        file.write_all_at(content(block).bytes(), at(block)).expect("written");
    }
    file.sync_data().expect("flushed");
}

fn read(device: &Path, block: usize) -> io::Result<Memory> {
    let mut memory = Memory::zeros(BLOCK)?;
    open(device).read_exact_at(memory.bytes_mut(), at(block))?;
    Ok(memory)
}

/// Flips a bit of the block where the copy at the node has it.
pub fn flip(site: &Site, number: usize) {
    let trees = site.cluster.dir().join(format!("node-{number}/pool/trees"));
    let trees = std::fs::read_dir(trees).expect("trees").flatten().map(|entry| entry.path());
    let data: PathBuf = trees.map(|tree| tree.join("data")).find(|data| data.exists()).expect("a copy");
    let (all, wanted) = (std::fs::read(&data).expect("it reads"), content(FLIPPED));
    let place = all.chunks(BLOCK).position(|chunk| chunk == wanted.bytes()).expect("it is there");
    let offset = (place * BLOCK + 100) as u64;
    let file = File::options().write(true).open(&data).expect("it opens");
    file.write_all_at(&[all[offset as usize] ^ 0x10], offset).expect("flipped");
    file.sync_all().expect("synced");
}

/// Case 12.
#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_flips_in_one_copy_is_named_there_and_the_volume_goes_on() {
    let (site, device, load) = Site::under_load(2).await;
    write(&device, 0..BLOCKS);
    load.await_writes(200, PATIENCE);
    let snapshot = site.snapshot("sealed").await;
    site.until_checksummed(2, &snapshot).await;
    flip(&site, 2);
    let (well, said) = site.verify(2);
    let block = LOADED as usize / BLOCK + FLIPPED;
    assert!(!well && said.contains(&format!("block {block} ")) && said.contains("node-2/pool"), "{said}");
    let (well, said) = site.verify(1);
    assert!(well, "the other copy is as it was: {said}");
    println!("200 writes more after {:?}", load.await_writes(200, PATIENCE));
    load.stop_well();
    for block in 0..BLOCKS {
        assert_eq!(read(&device, block).expect("read").bytes(), content(block).bytes());
    }
    // What is written again is good again, on each copy; what the snapshot has is not.
    write(&device, FLIPPED..FLIPPED + 1);
    site.detach(1).await;
    let device = site.attach(2).await;
    for block in 0..BLOCKS {
        assert_eq!(read(&device, block).expect("read").bytes(), content(block).bytes());
    }
    assert!(!site.verify(2).0 && site.verify(1).0);
    site.delete_snapshot(&snapshot).await;
    site.finish_at_each(&[2, 1]).await;
}
