use super::*;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const BLOCK: usize = 4096;

/// Aligned to 4096 as O_DIRECT wants it.
#[repr(C, align(4096))]
struct Aligned([u8; 4 * BLOCK]);

fn file() -> (tempfile::TempDir, File) {
    // Beside this program: /tmp may be a tmpfs.
    let program = std::env::current_exe().expect("this program");
    let place = program.parent().expect("a directory");
    let dir = tempfile::Builder::new().prefix("tandem-io").tempdir_in(place).expect("a directory");
    let mut options = File::options();
    options.read(true).write(true).create(true).custom_flags(libc::O_DIRECT);
    let file = options.open(dir.path().join("data")).expect("a filesystem with O_DIRECT");
    (dir, file)
}

fn run(io: &mut Io, fd: RawFd, operation: Operation) -> Result<(), DiskError> {
    io.submit(Token(7), fd, operation);
    let mut events = vec![];
    while events.is_empty() {
        io.wait(Sleep::Long, &mut events).expect("waits");
    }
    match events[..] {
        [Event::Done { token: Token(7), result }] => result,
        _ => panic!("unexpected {events:?}"),
    }
}

fn both(test: impl Fn(&mut Io)) {
    for choice in [Choice::Uring, Choice::Threads] {
        for spin in [None, Some(Duration::from_micros(100))] {
            test(&mut Io::new(choice, spin).expect("this machine has io_uring"));
        }
    }
}

#[test]
fn what_is_written_is_read_and_beyond_the_end_are_zeros() {
    both(|io| {
        let (_dir, file) = file();
        let fd = file.as_raw_fd();
        let written = Box::new(Aligned([7; 4 * BLOCK]));
        let mut read = Box::new(Aligned([9; 4 * BLOCK]));
        let memory = written.0.as_ptr();
        let write = Operation::Write { memory, length: BLOCK as u32, offset: BLOCK as u64 };
        assert_eq!(run(io, fd, write), Ok(()));
        assert_eq!(run(io, fd, Operation::Sync), Ok(()));
        let all = Operation::Read { memory: read.0.as_mut_ptr(), length: 4 * BLOCK as u32, offset: 0 };
        assert_eq!(run(io, fd, all), Ok(()));
        for (block, expected) in [0, 7, 0, 0].into_iter().enumerate() {
            assert!(read.0[block * BLOCK..][..BLOCK].iter().all(|b| *b == expected), "block {block}");
        }
        assert_eq!(run(io, fd, Operation::Punch { offset: BLOCK as u64, length: BLOCK as u64 }), Ok(()));
        assert_eq!(run(io, fd, all), Ok(()));
        assert!(read.0.iter().all(|b| *b == 0));
        assert_eq!(file.metadata().expect("stat").len(), 2 * BLOCK as u64);
    });
}

#[test]
fn errors_are_named() {
    both(|io| {
        let memory = Box::new(Aligned([1; 4 * BLOCK])).0.as_ptr();
        let write = Operation::Write { memory, length: BLOCK as u32, offset: 0 };
        let full = File::options().write(true).open("/dev/full").expect("/dev/full");
        assert_eq!(run(io, full.as_raw_fd(), write), Err(DiskError::NoSpace));
        let read_only = File::open("/dev/null").expect("/dev/null");
        assert_eq!(run(io, read_only.as_raw_fd(), write), Err(DiskError::Failed));
    });
}

#[test]
fn a_short_write_goes_on_and_no_progress_is_a_failure() {
    let memory = Box::new(Aligned([1; 4 * BLOCK])).0.as_ptr();
    let operation = Operation::Write { memory, length: 2 * BLOCK as u32, offset: 0 };
    let mut transfer = Transfer { token: Token(0), fd: -1, operation, done: 0, retries: 0 };
    assert_eq!(transfer.advance(Ok(BLOCK as u32)), None);
    assert!(matches!(transfer.remaining(), Operation::Write { length: 4096, offset: 4096, .. }));
    assert_eq!(transfer.advance(Err(libc::EINTR)), None);
    assert_eq!(transfer.advance(Ok(0)), Some(Err(DiskError::Failed)));
}

#[test]
fn readiness_is_told_until_unwatched_and_sleep_ends() {
    both(|io| {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
        let fd = event.as_fd().as_raw_fd();
        io.watch(WatchKey(3), fd).expect("watches");
        let mut events = vec![];
        io.wait(Sleep::AtMost(Duration::from_millis(20)), &mut events).expect("waits");
        assert_eq!(events, []);
        for _ in 0..3 {
            event.write(1).expect("signals");
            events.clear();
            io.wait(Sleep::Long, &mut events).expect("waits");
            assert_eq!(events, [Event::Ready(WatchKey(3))]);
            event.read().expect("is signalled");
        }
        io.unwatch(WatchKey(3), fd);
        event.write(1).expect("signals");
        events.clear();
        io.wait(Sleep::AtMost(Duration::from_millis(20)), &mut events).expect("waits");
        assert_eq!(events, []);
    });
}

#[test]
fn many_at_once_all_end() {
    both(|io| {
        let (_dir, file) = file();
        file.write_all_at(&Aligned([5; 4 * BLOCK]).0, 0).expect("aligned");
        let mut memory: Vec<Box<Aligned>> = (0..2000).map(|_| Box::new(Aligned([0; 4 * BLOCK]))).collect();
        for (token, memory) in (0..).zip(&mut memory) {
            let read = Operation::Read { memory: memory.0.as_mut_ptr(), length: 4 * BLOCK as u32, offset: 0 };
            io.submit(Token(token), file.as_raw_fd(), read);
        }
        let mut events = vec![];
        while events.len() < 2000 {
            io.wait(Sleep::Long, &mut events).expect("waits");
        }
        let mut tokens: Vec<u64> = events
            .iter()
            .map(|event| match event {
                Event::Done { token, result: Ok(()) } => token.0,
                other => panic!("unexpected {other:?}"),
            })
            .collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..2000));
        assert!(memory.iter().all(|m| m.0.iter().all(|b| *b == 5)));
    });
}

/// A descriptor that has nothing yet says EAGAIN, as a kernel does that is short of something.
#[test]
fn what_the_kernel_refuses_for_the_moment_waits_and_is_no_failure() {
    let mut io = Io::new(Choice::Uring, None).expect("this machine has io_uring");
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd");
    let mut read = Box::new(Aligned([9; 4 * BLOCK]));
    let operation = Operation::Read { memory: read.0.as_mut_ptr(), length: BLOCK as u32, offset: 0 };
    io.submit(Token(7), event.as_fd().as_raw_fd(), operation);
    let mut events = vec![];
    // Longer than the attempts that follow each other at once.
    let began = Instant::now();
    while began.elapsed() < 20 * RETRY_PAUSE {
        io.wait(Sleep::AtMost(RETRY_PAUSE), &mut events).expect("waits");
        assert_eq!(events, []);
    }
    event.write(5).expect("counts");
    while events.is_empty() {
        io.wait(Sleep::Long, &mut events).expect("waits");
    }
    assert_eq!(events, [Event::Done { token: Token(7), result: Ok(()) }]);
    assert_eq!(read.0[0], 5);
    let mut transfer = Transfer { token: Token(1), fd: 0, operation, done: 0, retries: 0 };
    assert!((0..10_000).all(|_| transfer.advance(Err(libc::EAGAIN)).is_none()) && transfer.pause().is_some());
}
