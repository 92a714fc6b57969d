//! The store over real files: every action is executed at once, in order.

mod filled;
mod full;
mod mirror;
mod plan;
mod reopen;
mod rules;

use super::simulation::Disk;
use super::*;
use crate::memory::Memory;
use crate::protocol::Request;
use crate::volume::{BLOCK_SIZE, BlockRange, PoolId};
use std::time::Duration;

pub(super) fn superblock() -> Superblock {
    Superblock { instance: InstanceId::from_bytes([1; 16]), pool: PoolId::from_bytes([2; 16]), created_ms: 3 }
}

pub(super) fn volume(number: u8) -> VolumeId {
    VolumeId::from_bytes([number; 16])
}

pub(super) fn snapshot(number: u8) -> SnapshotId {
    SnapshotId::from_bytes([number; 16])
}

pub(super) fn size(blocks: u64) -> VolumeSize {
    VolumeSize::try_from(blocks * BLOCK_SIZE).expect("a size")
}

/// A tree in a temporary directory.
struct Bench {
    directory: Option<tempfile::TempDir>,
    files: Arc<dyn Files>,
    store: Option<Store>,
    next: u64,
    now: Duration,
}

impl Bench {
    /// In memory.
    fn new() -> Self {
        Self::over(Arc::new(Disk::new(0)), None)
    }

    fn on_disk() -> Self {
        let directory = tempfile::Builder::new().prefix("tandem-store-").tempdir().expect("a directory");
        Self::over(Arc::new(Directory::new(directory.path())), Some(directory))
    }

    fn over(files: Arc<dyn Files>, directory: Option<tempfile::TempDir>) -> Self {
        Store::create(&*files, &superblock()).expect("a tree");
        let pending = Pending::over(Memory::zeros(PENDING_BYTES).expect("memory"));
        let store = Store::open(files.clone(), pending).expect("opens");
        Self { directory, files, store: Some(store), next: 0, now: Duration::ZERO }
    }

    fn store(&mut self) -> &mut Store {
        self.store.as_mut().expect("open")
    }

    /// The process dies; the pending region survives.
    fn kill(&mut self) {
        let memory = self.store.take().expect("open").into_memory();
        self.store = Some(Store::open(self.files.clone(), Pending::over(memory)).expect("opens"));
    }

    /// Everything that was not flushed is lost, but for what the files happen to have.
    fn lose_pending(&mut self) {
        self.store = None;
        let pending = Pending::over(Memory::zeros(PENDING_BYTES).expect("memory"));
        self.store = Some(Store::open(self.files.clone(), pending).expect("opens"));
    }

    /// Executes actions until there are none, and returns how the operation ended.
    fn run(&mut self, mut actions: Vec<Action<Job>>, buffer: &mut Memory) -> Option<Result<(), ControlError>> {
        let mut end = None;
        while !actions.is_empty() {
            let mut next = Vec::new();
            for action in actions {
                match action {
                    Action::Io { io, file, what } => {
                        let result = self.execute(file, what, buffer);
                        self.store().completed(io, result, &mut next);
                    }
                    Action::Zero { offset, length, .. } => {
                        buffer.bytes_mut()[offset as usize..][..length as usize].fill(0);
                    }
                    Action::Check { offset, crc, .. } => {
                        assert_eq!(crc32c::crc32c(&buffer.bytes()[offset as usize..][..4096]), crc);
                    }
                    Action::Done { result, .. } => end = Some(result.map_err(ControlError::Disk)),
                    Action::ControlDone { result, .. } => end = Some(result),
                    Action::Job(job) => {
                        let outcome = job.run();
                        self.store().job_done(outcome, &mut next);
                    }
                }
            }
            actions = next;
        }
        end
    }

    #[allow(unsafe_code, reason = "the disk reads the store's memory")]
    fn execute(&self, file: File, what: Io, buffer: &mut Memory) -> Result<(), DiskError> {
        let name = Name::from(file);
        match what {
            Io::Read { offset, length, buffer: Buffer::Request { offset: at, .. } } => {
                self.files.read_at(name, offset, &mut buffer.bytes_mut()[at as usize..][..length as usize])
            }
            Io::Write { offset, length, buffer: Buffer::Request { offset: at, .. } } => {
                self.files.write_at(name, offset, &buffer.bytes()[at as usize..][..length as usize])
            }
            Io::Write { offset, length, buffer: Buffer::Store(memory) } => {
                // SAFETY: the store keeps it until the completion.
                let bytes = unsafe { std::slice::from_raw_parts(memory, length as usize) };
                self.files.write_at(name, offset, bytes)
            }
            Io::Read { .. } => unreachable!("the store reads nothing for itself"),
            Io::Sync => self.files.sync(name),
            Io::Punch { .. } => Ok(()),
        }
        .map_err(|_| DiskError::Failed)
    }

    fn request(&mut self, id: VolumeId, request: Request, buffer: &mut Memory) -> Result<(), ControlError> {
        self.next += 1;
        let (mut out, operation) = (Vec::new(), OperationId(self.next));
        self.store().start(operation, id, request, &mut out);
        if let Some(end) = self.run(out, buffer) {
            return end;
        }
        self.ticks(buffer).expect("it ends")
    }

    fn control(&mut self, control: Control) -> Result<(), ControlError> {
        self.next += 1;
        let (mut out, operation) = (Vec::new(), OperationId(self.next));
        self.store().control(operation, control, &mut out);
        self.run(out, &mut Memory::zeros(4096).expect("memory")).expect("it ends")
    }

    /// All background work there is; how a request that was under way ended.
    fn ticks(&mut self, buffer: &mut Memory) -> Option<Result<(), ControlError>> {
        let mut end = None;
        for _ in 0..100_000 {
            let Some(delay) = self.store().next_tick() else { return end };
            self.now += delay;
            let (mut out, now) = (Vec::new(), self.now);
            self.store().tick(now, &mut out);
            end = self.run(out, buffer).or(end);
        }
        panic!("the background work never ends: {:?}", self.store().background);
    }

    fn idle(&mut self) {
        assert_eq!(self.ticks(&mut Memory::zeros(4096).expect("memory")), None);
    }

    fn write(&mut self, id: VolumeId, start: u64, bytes: &[u8]) {
        let mut buffer = Memory::zeros(bytes.len() * 4096).expect("memory");
        for (block, byte) in buffer.bytes_mut().chunks_mut(4096).zip(bytes) {
            block.fill(*byte);
        }
        let range = BlockRange::new(start, bytes.len() as u32).expect("a range");
        assert_eq!(self.request(id, Request::Write(range), &mut buffer), Ok(()));
    }

    /// The first byte of each block; all bytes of a block must be the same.
    fn read(&mut self, id: VolumeId, start: u64, count: u32) -> Vec<u8> {
        let mut buffer = Memory::zeros(count as usize * 4096).expect("memory");
        buffer.bytes_mut().fill(0xee);
        let range = BlockRange::new(start, count).expect("a range");
        assert_eq!(self.request(id, Request::Read(range), &mut buffer), Ok(()));
        buffer
            .bytes()
            .chunks(4096)
            .map(|block| {
                assert!(block.iter().all(|byte| *byte == block[0]));
                block[0]
            })
            .collect()
    }

    fn simple(&mut self, id: VolumeId, request: Request) {
        assert_eq!(self.request(id, request, &mut Memory::zeros(4096).expect("memory")), Ok(()));
    }
}

fn range(start: u64, count: u32) -> BlockRange {
    BlockRange::new(start, count).expect("a range")
}

#[test]
fn a_volume_its_snapshot_and_a_clone_keep_what_was_written() {
    let mut bench = Bench::on_disk();
    let (one, two) = (volume(1), volume(2));
    assert_eq!(bench.control(Control::CreateVolume { volume: one, size: size(1024), verify_reads: true }), Ok(()));
    assert_eq!(bench.read(one, 0, 4), [0, 0, 0, 0]);
    bench.write(one, 1, &[1, 2, 3]);
    bench.simple(one, Request::Flush);
    assert_eq!(bench.control(Control::Seal { volume: one, snapshot: snapshot(1), created_ms: 5 }), Ok(()));
    bench.write(one, 2, &[9]);
    bench.simple(one, Request::Discard(range(3, 1)));
    let clone = Control::Clone { snapshot: snapshot(1), volume: two, size: size(1024), verify_reads: false };
    assert_eq!(bench.control(clone), Ok(()));
    for _ in 0..2 {
        assert_eq!(bench.read(one, 0, 5), [0, 1, 9, 0, 0]);
        assert_eq!(bench.read(two, 0, 5), [0, 1, 2, 3, 0]);
        bench.kill();
        bench.idle();
    }
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(1))), Ok(()));
    assert_eq!(bench.control(Control::DeleteVolume(two)), Ok(()));
    bench.idle();
    assert_eq!(bench.read(one, 0, 5), [0, 1, 9, 0, 0]);
    assert_eq!(bench.store().volumes()[0].layers, 1, "everything is merged");
    bench.lose_pending();
    assert_eq!(bench.read(one, 0, 5), [0, 1, 9, 0, 0]);
    assert!(bench.directory.is_some_and(|directory| directory.path().exists()));
}
