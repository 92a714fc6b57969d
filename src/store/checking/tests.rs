use super::super::simulation::Disk;
use super::*;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

fn me() -> InstanceId {
    InstanceId::from_bytes([1; 16])
}

/// A disk whose next read of checksums sees a block of which one half is as it was before.
struct Torn {
    disk: Arc<Disk>,
    tears: AtomicBool,
}

impl Files for Torn {
    fn create(&self, name: Name) -> io::Result<()> {
        self.disk.create(name)
    }
    fn size(&self, name: Name) -> io::Result<Option<u64>> {
        self.disk.size(name)
    }
    fn read_at(&self, name: Name, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(name, offset, buffer)?;
        if name == Name::Checksums && self.tears.swap(false, Relaxed) {
            buffer[BLOCK / 2..].fill(0);
        }
        Ok(())
    }
    fn write_at(&self, name: Name, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.disk.write_at(name, offset, buffer)
    }
    fn sync(&self, name: Name) -> io::Result<()> {
        self.disk.sync(name)
    }
    fn rename(&self, from: Name, to: Name) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn exchange(&self, one: Name, other: Name) -> io::Result<()> {
        self.disk.exchange(one, other)
    }
    fn remove(&self, name: Name) -> io::Result<()> {
        self.disk.remove(name)
    }
    fn sync_names(&self) -> io::Result<()> {
        self.disk.sync_names()
    }
    fn reserve(&self, name: Name, bytes: u64) -> io::Result<()> {
        self.disk.reserve(name, bytes)
    }
    fn reserved(&self, name: Name) -> io::Result<u64> {
        self.disk.reserved(name)
    }
}

fn disk() -> Arc<Disk> {
    let disk = Arc::new(Disk::new(0));
    disk.create(Name::Checksums).expect("made");
    disk.create(Name::ChecksumsRedo).expect("made");
    disk
}

/// One step that gives all blocks of these numbers this checksum.
fn step(files: &Arc<Disk>, numbers: &[u32], crc: u32) {
    let block = || {
        let mut block = ChecksumBlock::default();
        (0..super::super::checksums::PER_BLOCK).for_each(|index| block.set(index, crc));
        block
    };
    let job = ChecksumJob {
        files: FilesHandle(files.clone()),
        instance: me(),
        layer: LayerId(1),
        map: None,
        runs: Vec::new(),
        next: 0,
        changed: numbers.iter().map(|number| (*number, block())).collect(),
        _pin: Arc::new(()),
    };
    job.write().expect("written");
}

#[test]
fn a_checksum_block_is_not_mended_with_what_an_older_step_wrote() {
    let disk = disk();
    step(&disk, &[0, 1], 1);
    step(&disk, &[1], 2);
    step(&disk, &[0], 3);
    disk.write_at(Name::Checksums, BLOCK_SIZE, &[7; BLOCK]).expect("it rots");
    redo(&*disk, me()).expect("done");
    let found = read_block(&*disk, me(), 1).map(|block| block.get(0));
    assert_eq!(found.map_err(|error| error.kind()), Err(io::ErrorKind::InvalidData));
    // What the last step wrote is mended.
    disk.write_at(Name::Checksums, 0, &[7; BLOCK]).expect("it is torn");
    redo(&*disk, me()).expect("done");
    assert_eq!(read_block(&*disk, me(), 0).expect("mended").get(0), 3);
}

#[test]
fn a_checksum_block_that_is_read_while_it_is_written_is_read_again() {
    let disk = disk();
    step(&disk, &[0], 1);
    let torn = Torn { disk, tears: AtomicBool::new(true) };
    assert_eq!(read_block(&torn, me(), 0).expect("whole").get(5), 1);
}
