//! Small checked writes and reads on a volume of their own, one after the other: how long an application waits.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tandem::memory::Memory;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 1024;
/// Between two requests, so that the pulse is not a load.
const REST: Duration = Duration::from_millis(4);

struct Shared {
    stop: AtomicBool,
    started: Instant,
    /// When the request under way was made, in microseconds after the start; 0 if there is none.
    began: AtomicU64,
    /// Longest request since it was asked, in microseconds.
    longest: AtomicU64,
    /// Requests that were answered.
    count: AtomicU64,
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// The thread that does it.
pub struct Pulse {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<u64>>,
}

impl Pulse {
    pub fn start(device: &Path) -> Self {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            started: Instant::now(),
            began: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            count: AtomicU64::new(0),
        });
        let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("device");
        let working = shared.clone();
        Self { shared, thread: Some(std::thread::spawn(move || beat(&file, &working))) }
    }

    /// The longest request since the last time this was asked, the one under way included.
    pub fn longest(&self) -> Duration {
        let began = self.shared.began.load(SeqCst);
        let under_way = if began == 0 { 0 } else { self.shared.now().saturating_sub(began) };
        Duration::from_micros(self.shared.longest.swap(0, SeqCst).max(under_way))
    }

    /// Whether it ended by itself: a request failed, or found the wrong data. It has said so.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// How many requests were answered.
    pub fn count(&self) -> u64 {
        self.shared.count.load(SeqCst)
    }

    /// Ends it; the number of requests. Panics if one failed or a read found something else than was written.
    pub fn finish(mut self) -> u64 {
        self.shared.stop.store(true, SeqCst);
        self.thread.take().expect("runs until now").join().expect("no error on the device")
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
    }
}

fn beat(file: &File, shared: &Shared) -> u64 {
    let mut memory = Memory::zeros(BLOCK).expect("memory");
    let mut written = vec![0_u64; BLOCKS as usize];
    let mut count = 0_u64;
    while !shared.stop.load(SeqCst) {
        count += 1;
        let block = count.wrapping_mul(7919) % BLOCKS;
        let began = shared.now().max(1);
        shared.began.store(began, SeqCst);
        memory.bytes_mut().chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&count.to_le_bytes()));
        file.write_all_at(memory.bytes(), block * BLOCK as u64).expect("a write");
        if count.is_multiple_of(8) {
            file.sync_data().expect("a flush");
        }
        written[block as usize] = count;
        let other = count.wrapping_mul(6151) % BLOCKS;
        file.read_exact_at(memory.bytes_mut(), other * BLOCK as u64).expect("a read");
        let stamp = written[other as usize].to_le_bytes();
        assert!(memory.bytes().chunks_exact(8).all(|word| word == stamp), "block {other} is not what was written");
        shared.longest.fetch_max(shared.now().saturating_sub(began), SeqCst);
        shared.began.store(0, SeqCst);
        shared.count.store(count, SeqCst);
        std::thread::sleep(REST);
    }
    count
}
