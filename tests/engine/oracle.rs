//! Overlapping reads, writes, discards and write-zeroes on one device, and what a filesystem may conclude from them.
//!
//! A block's value is legal unless a later change began after the value was certainly there and ended before the read
//! began. "Certainly there": its request was answered, or a read that saw it was.
#![allow(unsafe_code, reason = "ioctls on block devices")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// Few, so that requests overlap all the time.
const BLOCKS: u64 = 48;
const BLOCK: usize = 4096;
const MOST: u64 = 4;
const WORKERS: u64 = 8;

const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

#[repr(C, align(4096))]
struct Aligned([u8; MOST as usize * BLOCK]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero,
}

#[derive(Clone, Debug)]
struct Event {
    kind: Kind,
    start: u64,
    count: u64,
    began: u64,
    ended: u64,
    /// The ids that a read found; 0 is zeros.
    found: Vec<u64>,
    /// Of a write.
    id: u64,
}

/// Works on the device until `stop`; returns an error text of the first contradiction, and the number of requests.
pub fn work(device: &Path, stop: &AtomicBool, seed: u64) -> Result<usize, String> {
    let (clock, events) = (AtomicU64::new(1), Mutex::new(vec![]));
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (clock, events) = (&clock, &events);
            scope.spawn(move || {
                let mut random = seed ^ (worker + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
                let file = open(device);
                let mut memory = Box::new(Aligned([0; MOST as usize * BLOCK]));
                let mut mine = vec![];
                while !stop.load(SeqCst) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    mine.push(one(&file, &mut memory, clock, random));
                }
                events.lock().expect("no panic").append(&mut mine);
            });
        }
    });
    let mut events = events.into_inner().expect("no panic");
    // The end of the story: everything is read once more.
    let file = open(device);
    let mut memory = Box::new(Aligned([0; MOST as usize * BLOCK]));
    for start in (0..BLOCKS).step_by(MOST as usize) {
        events.push(request(&file, &mut memory, &clock, Kind::Read, start, MOST));
    }
    check(&mut events)?;
    Ok(events.len())
}

fn open(device: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device")
}

fn one(file: &File, memory: &mut Aligned, clock: &AtomicU64, random: u64) -> Event {
    let kind = match random % 10 {
        0..=3 => Kind::Read,
        4..=7 => Kind::Write,
        _ => Kind::Zero,
    };
    let start = (random >> 8) % (BLOCKS - MOST);
    request(file, memory, clock, kind, start, 1 + (random >> 32) % MOST)
}

fn request(file: &File, memory: &mut Aligned, clock: &AtomicU64, kind: Kind, start: u64, count: u64) -> Event {
    let began = clock.fetch_add(1, SeqCst);
    let bytes = &mut memory.0[..count as usize * BLOCK];
    let offset = start * BLOCK as u64;
    match kind {
        Kind::Read => file.read_exact_at(bytes, offset).expect("reads"),
        Kind::Write => {
            bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&began.to_le_bytes()));
            file.write_all_at(bytes, offset).expect("writes");
        }
        Kind::Zero => {
            let range = [offset, bytes.len() as u64];
            let ioctl = if began.is_multiple_of(2) { BLKDISCARD } else { BLKZEROOUT };
            // SAFETY: the range lives across the call.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), ioctl, range.as_ptr()) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        }
    }
    let ended = clock.fetch_add(1, SeqCst);
    let word = |at: usize| u64::from_le_bytes(memory.0[at..at + 8].try_into().expect("8 bytes"));
    let is_whole = |block: usize| (block..block + BLOCK).step_by(8).all(|at| word(at) == word(block));
    let value = |block: u64| {
        let at = block as usize * BLOCK;
        if is_whole(at) { word(at) } else { u64::MAX }
    };
    let found = if kind == Kind::Read { (0..count).map(value).collect() } else { vec![] };
    Event { kind, start, count, began, ended, found, id: began }
}

fn check(events: &mut [Event]) -> Result<(), String> {
    events.sort_by_key(|event| event.ended);
    for block in 0..BLOCKS {
        // Every change of this block: its id (0 for zeros), when it began, when it was certainly there.
        let touches = |e: &&Event| (e.start..e.start + e.count).contains(&block);
        let mut changes: Vec<(u64, u64, u64)> = vec![(0, 0, 0)];
        let changing = events.iter().filter(touches).filter(|e| e.kind != Kind::Read);
        changes.extend(changing.map(|e| (if e.kind == Kind::Write { e.id } else { 0 }, e.began, e.ended)));
        for read in events.iter().filter(touches).filter(|e| e.kind == Kind::Read) {
            let value = read.found[(block - read.start) as usize];
            if value == u64::MAX {
                return Err(format!("block {block} is torn: {read:?}"));
            }
            let stale = |there: u64| changes.iter().any(|(_, began, certain)| *began > there && *certain < read.began);
            let legal =
                |&&(id, began, certain): &&(u64, u64, u64)| id == value && began < read.ended && !stale(certain);
            if !changes.iter().any(|change| legal(&change)) {
                return Err(format!(
                    "block {block} is {value}, which something answered before the read replaced: {read:?}"
                ));
            }
            if value != 0
                && let Some(seen) = changes.iter_mut().find(|(id, ..)| *id == value)
            {
                seen.2 = seen.2.min(read.ended);
            }
        }
    }
    Ok(())
}

#[test]
fn the_oracle_objects_to_a_write_that_comes_back() {
    let event = |kind, began, ended, found: &[u64]| Event {
        kind,
        start: 0,
        count: 1,
        began,
        ended,
        found: found.to_vec(),
        id: began,
    };
    let mut good = [event(Kind::Write, 1, 4, &[]), event(Kind::Write, 2, 3, &[]), event(Kind::Read, 5, 6, &[1])];
    assert_eq!(check(&mut good), Ok(()));
    let mut stale = [event(Kind::Write, 1, 2, &[]), event(Kind::Zero, 3, 4, &[]), event(Kind::Read, 5, 6, &[1])];
    assert!(check(&mut stale).is_err());
    let mut back = [
        event(Kind::Write, 1, 9, &[]),
        event(Kind::Read, 2, 3, &[1]),
        event(Kind::Zero, 4, 5, &[]),
        event(Kind::Read, 6, 7, &[1]),
    ];
    assert!(check(&mut back).is_err(), "seen, replaced, and there again");
}
