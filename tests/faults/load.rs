//! Writers that know every acknowledged write, and the check that a device has them all.
//!
//! Invariants: each 4 KiB block says its own number and the round it was written in, 256 times; a write that failed or was
//! never answered is *unknown*: the block may be as before it or as after it, until it is read; each thread has blocks of
//! its own and one request at a time, so it knows what every read must return.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// Blocks that go to one thread together: the longest request.
const CHUNK: usize = 4;
/// Blocks that a check reads together.
const PART: usize = 64;
/// Threads of a load.
pub const THREADS: usize = 4;
/// One in so many requests is a flush, and one a read.
const FLUSH_EVERY: u64 = 16;
const READ_EVERY: u64 = 5;
/// A request that hangs longer than this after it was told to stop hangs for ever.
const END_LIMIT: Duration = Duration::from_secs(120);

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; BLOCK]);

impl Page {
    fn stamped(block: u64, round: u64) -> Self {
        let mut page = Self([0; BLOCK]);
        for words in page.0.chunks_exact_mut(16) {
            words[..8].copy_from_slice(&block.to_le_bytes());
            words[8..].copy_from_slice(&round.to_le_bytes());
        }
        page
    }

    /// The round of a block that is whole and in its place; one that was never written has round 0.
    fn round(&self, block: u64) -> Option<u64> {
        let round = u64::from_le_bytes(self.0[8..16].try_into().expect("8 bytes"));
        let blank = self.0.iter().all(|byte| *byte == 0);
        (blank || self.0 == Self::stamped(block, round).0).then_some(round)
    }
}

/// What is known of one block.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// Round of the last acknowledged write, or of what was read since.
    acknowledged: u64,
    /// Round of the last write that was tried.
    tried: u64,
    /// Writes after the acknowledged one failed or were not answered.
    unknown: bool,
    /// Round of the last of those, if a read has shown that it never happened.
    refuted: u64,
    /// Round of the last write that was acknowledged before a flush that was acknowledged, too.
    flushed: u64,
}

impl Known {
    fn allows(self, round: u64) -> bool {
        round == self.acknowledged || (self.unknown && round > self.acknowledged && round <= self.tried)
    }
    /// What was read once stays.
    fn was_read(&mut self, round: u64) {
        if self.unknown && self.tried > round {
            self.refuted = self.tried;
        }
        (self.acknowledged, self.unknown) = (round, false);
    }
    /// False: an acknowledgement that may not be. It may come late, when others have written since.
    fn was_acknowledged(&mut self, round: u64) -> bool {
        if self.unknown && self.tried == round {
            (self.acknowledged, self.unknown) = (round, false);
        }
        self.refuted != round
    }
    /// It is as it was at the last flush, or as any later write has left it.
    fn loses_power(&mut self) {
        (self.acknowledged, self.unknown, self.refuted) = (self.flushed, self.tried > self.flushed, 0);
    }
}

/// Everything that was ever acknowledged to this device's writers.
#[derive(Clone)]
pub struct Oracle(Arc<Vec<Mutex<Known>>>);

impl Oracle {
    /// Of a blank device with so many bytes.
    pub fn new(bytes: i64) -> Self {
        let blocks = usize::try_from(bytes).expect("a size") / BLOCK;
        Self(Arc::new((0..blocks).map(|_| Mutex::default()).collect()))
    }

    fn known<R>(&self, block: usize, with: impl FnOnce(&mut Known) -> R) -> R {
        with(&mut self.0[block].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Every write that is acknowledged is on the device, and nothing that was never written.
    pub fn check(&self, device: &Path) {
        let wrong = self.wrong(device);
        assert!(wrong.is_empty(), "{} wrong blocks, such as {}", wrong.len(), wrong[0]);
    }

    /// Nobody has what was not flushed. Disks that lose power are those of `support/volatile_disk.rs`: they write whole blocks.
    pub fn loses_power(&self) {
        (0..self.0.len()).for_each(|block| self.known(block, Known::loses_power));
    }

    /// What is not as it may be.
    pub fn wrong(&self, device: &Path) -> Vec<String> {
        let file = open(device).expect("the device opens");
        let parts = (0..self.0.len()).step_by(PART);
        let part = |first| self.read(&file, first..(first + PART).min(self.0.len())).expect("the device reads");
        parts.flat_map(part).collect()
    }

    /// What is wrong with the blocks of a chunk.
    fn read_chunk(&self, file: &File, chunk: usize) -> std::io::Result<Vec<String>> {
        self.read(file, chunk * CHUNK..(chunk + 1) * CHUNK)
    }

    /// What is wrong with these blocks, which are read in one request.
    fn read(&self, file: &File, blocks: Range<usize>) -> std::io::Result<Vec<String>> {
        let mut pages = vec![Page([0; BLOCK]); blocks.len()];
        let mut slices: Vec<_> = pages.iter_mut().map(|page| IoSliceMut::new(&mut page.0)).collect();
        let read = nix::sys::uio::preadv(file, &mut slices, (blocks.start * BLOCK) as i64)?;
        if read != blocks.len() * BLOCK {
            return Err(std::io::Error::other(format!("only {read} bytes were read")));
        }
        let mut wrong = Vec::new();
        for (block, page) in blocks.zip(&pages) {
            let round = page.round(block as u64);
            self.known(block, |known| match round {
                Some(round) if known.allows(round) => known.was_read(round),
                _ => wrong.push(format!("block {block}: {known:?}, but it has {round:?}")),
            });
        }
        Ok(wrong)
    }

    /// Writes blocks of one chunk, in one request; what is wrong with its acknowledgement.
    fn write(&self, file: &File, blocks: Range<usize>, round: u64) -> std::io::Result<Vec<String>> {
        for block in blocks.clone() {
            self.known(block, |known| (known.tried, known.unknown) = (round, true));
        }
        let pages: Vec<_> = blocks.clone().map(|block| Page::stamped(block as u64, round)).collect();
        let slices: Vec<_> = pages.iter().map(|page| IoSlice::new(&page.0)).collect();
        let written = nix::sys::uio::pwritev(file, &slices, (blocks.start * BLOCK) as i64)?;
        if written != blocks.len() * BLOCK {
            return Err(std::io::Error::other(format!("only {written} bytes were written")));
        }
        let refuted = blocks.filter(|block| !self.known(*block, |known| known.was_acknowledged(round)));
        Ok(refuted
            .map(|block| format!("block {block}: round {round} was acknowledged after it was read without it"))
            .collect())
    }
}

fn open(device: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device)
}

/// Whatever is in it.
pub fn read_first_block(device: &Path) -> std::io::Result<()> {
    open(device)?.read_exact_at(&mut Box::new(Page([0; BLOCK])).0, 0)
}

/// Writes it, and does not flush.
pub fn write_first_block(device: &Path) -> std::io::Result<File> {
    let file = open(device)?;
    file.write_all_at(&Page::stamped(0, 1).0, 0)?;
    Ok(file)
}

/// What the threads of a load have in common.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Another node has taken over: no read may be answered any more.
    retired: AtomicBool,
    writes: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

impl Shared {
    fn is_wrong(&self, what: Vec<String>) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).extend(what);
    }
}

/// Threads that write, flush and read until they are stopped; each ends at its first error.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Option<std::io::Error>>>,
}

/// How a load went.
pub struct Done {
    /// Writes that were acknowledged.
    pub writes: u64,
    /// What ended threads before they were told to.
    pub errors: Vec<std::io::Error>,
}

impl Load {
    /// Begins.
    pub fn start(device: &Path, oracle: &Oracle) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = |number| {
            let (shared, oracle, file) = (Arc::clone(&shared), oracle.clone(), open(device).expect("the device opens"));
            std::thread::spawn(move || work(&shared, &oracle, &file, number).err())
        };
        Self { threads: (0..THREADS).map(thread).collect(), shared }
    }

    /// Writes that were acknowledged until now.
    pub fn writes(&self) -> u64 {
        self.shared.writes.load(SeqCst)
    }

    /// From now on nothing that is read here can be trusted: no read may be answered.
    pub fn retire(&self) {
        self.shared.retired.store(true, SeqCst);
    }

    /// Waits until so many more writes are acknowledged; how long it took.
    pub fn await_writes(&self, more: u64, limit: Duration) -> Duration {
        let (began, until) = (Instant::now(), self.writes() + more);
        while self.writes() < until {
            assert!(began.elapsed() < limit, "no {more} writes in {limit:?}: {} left", until - self.writes());
            assert!(self.threads.iter().any(|thread| !thread.is_finished()), "all writers have ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        began.elapsed()
    }

    /// Waits until each thread's request has failed.
    pub fn await_errors(&self, limit: Duration) {
        let began = Instant::now();
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            assert!(began.elapsed() < limit, "a writer goes on, or its request hangs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the threads; all requests are answered, and no read was wrong.
    pub fn stop(self) -> Done {
        self.shared.stop.store(true, SeqCst);
        let began = Instant::now();
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            assert!(began.elapsed() < END_LIMIT, "a request hangs");
            std::thread::sleep(Duration::from_millis(5));
        }
        let errors = self.threads.into_iter().filter_map(|thread| thread.join().expect("no panic")).collect();
        let wrong = self.shared.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(wrong.is_empty(), "{} wrong reads, such as {}", wrong.len(), wrong[0]);
        Done { writes: self.shared.writes.load(SeqCst), errors }
    }

    /// The same; and no request has failed.
    pub fn stop_well(self) -> u64 {
        let done = self.stop();
        assert!(done.errors.is_empty(), "{:?}", done.errors);
        done.writes
    }
}

/// Until it is told to stop, or something fails.
fn work(shared: &Shared, oracle: &Oracle, file: &File, number: usize) -> std::io::Result<()> {
    let chunks = oracle.0.len() / CHUNK / THREADS;
    let mut random = 0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1);
    let mut unflushed = BTreeMap::new();
    while !shared.stop.load(SeqCst) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let chunk = (random >> 20) as usize % chunks * THREADS + number;
        if random.is_multiple_of(FLUSH_EVERY) {
            file.sync_data()?;
            for (block, round) in std::mem::take(&mut unflushed) {
                oracle.known(block, |known| known.flushed = round);
            }
        } else if random.is_multiple_of(READ_EVERY) {
            file.read_exact_at(&mut Box::new(Page([0; BLOCK])).0, (chunk * CHUNK * BLOCK) as u64)?;
            if shared.retired.load(SeqCst) {
                shared.is_wrong(vec![format!("chunk {chunk} was read where another node has taken over")]);
            } else {
                shared.is_wrong(oracle.read_chunk(file, chunk)?);
            }
        } else {
            let first = chunk * CHUNK + (random >> 8) as usize % CHUNK;
            let blocks = first..(chunk + 1) * CHUNK;
            let last = blocks.clone().map(|block| oracle.known(block, |known| known.tried)).max();
            let round = last.unwrap_or_default() + 1;
            shared.is_wrong(oracle.write(file, blocks.clone(), round)?);
            unflushed.extend(blocks.map(|block| (block, round)));
            shared.writes.fetch_add(1, SeqCst);
        }
    }
    Ok(())
}

#[test]
fn a_lost_a_torn_and_a_misplaced_block_are_found() {
    let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
    file.as_file().set_len(1 << 20).expect("a length");
    let oracle = Oracle::new(1 << 20);
    let load = Load::start(file.path(), &oracle);
    load.await_writes(100, crate::site::PATIENCE);
    load.stop_well();
    oracle.check(file.path());
    let written = (0..256).find(|block| oracle.known(*block, |known| known.acknowledged) > 0).expect("one was written");
    let (mut before, at) = (vec![0; BLOCK], (written * BLOCK) as u64);
    file.as_file().read_exact_at(&mut before, at).expect("reads");
    let round = oracle.known(written, |known| known.acknowledged);
    let mut torn = before.clone();
    torn[2048..].copy_from_slice(&Page::stamped(written as u64, round + 1).0[2048..]);
    let misplaced = Page::stamped(written as u64 + 1, round).0.to_vec();
    for bad in [vec![0; BLOCK], Page::stamped(written as u64, round - 1).0.to_vec(), torn, misplaced] {
        file.as_file().write_all_at(&bad, at).expect("writes");
        assert_eq!(oracle.wrong(file.path()).len(), 1);
    }
    file.as_file().write_all_at(&before, at).expect("writes");
    oracle.check(file.path());
}

#[test]
fn of_a_device_that_lost_power_what_was_flushed_and_is_lost_is_found_and_nothing_else() {
    let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
    file.as_file().set_len(1 << 20).expect("a length");
    let oracle = Oracle::new(1 << 20);
    let load = Load::start(file.path(), &oracle);
    let flushed = || (0..256).find(|block| oracle.known(*block, |known| known.flushed > 0));
    while flushed().is_none() {
        load.await_writes(10, crate::site::PATIENCE);
    }
    load.stop_well();
    let (block, device) = (flushed().expect("one was flushed"), open(file.path()).expect("opens"));
    let known = oracle.known(block, |known| *known);
    assert_eq!(oracle.write(&device, block..block + 1, known.tried + 1).expect("writes"), Vec::<String>::new());
    for round in known.flushed..=known.tried + 1 {
        file.as_file().write_all_at(&Page::stamped(block as u64, round).0, (block * BLOCK) as u64).expect("writes");
        oracle.known(block, |known_now| *known_now = Known { tried: known.tried + 1, ..known });
        oracle.loses_power();
        oracle.check(file.path());
    }
    for bad in [Page([0; BLOCK]), Page::stamped(block as u64, known.flushed - 1)] {
        file.as_file().write_all_at(&bad.0, (block * BLOCK) as u64).expect("writes");
        oracle.loses_power();
        assert_eq!(oracle.wrong(file.path()).len(), 1);
    }
}
