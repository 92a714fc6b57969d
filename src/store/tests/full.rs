//! A disk without space for a checkpoint: the tree opens and goes on for as long as its logs have room, and waits then.

use super::super::job::write_checkpoint;
use super::super::planted::Planted;
use super::super::space::{Range, Space, keep};
use super::super::*;
use super::*;

/// Blocks of each log. A change of a setting takes one; a log ends when less than a quarter is left.
const LOG_BLOCKS: u64 = 24;
/// Changes that find room in two logs, less some.
const FIT: u64 = 30;

/// For a pending region with two small halves.
fn pending() -> Memory {
    Memory::zeros(3 * 4096).expect("memory")
}

/// A tree with small logs.
fn small(disk: &Arc<Disk>) -> Bench {
    let files: Arc<dyn Files> = disk.clone();
    small_in(&files)
}

fn small_in(files: &Arc<dyn Files>) -> Bench {
    Store::create_with(&**files, &superblock(), LOG_BLOCKS * BLOCK_SIZE).expect("a tree");
    let store = Store::open(files.clone(), Pending::over(pending())).expect("opens");
    let mut bench = Bench { directory: None, files: files.clone(), store: Some(store), next: 0, now: Duration::ZERO };
    let create = Control::CreateVolume { volume: volume(1), size: size(1024), verify_reads: false };
    assert_eq!(bench.control(create), Ok(()));
    bench
}

/// Changes a setting; whether that is done, or waits.
fn change(bench: &mut Bench, number: u64) -> bool {
    bench.next += 1;
    let (mut out, operation) = (Vec::new(), OperationId(bench.next));
    let modify = Control::Modify { volume: volume(1), verify_reads: number.is_multiple_of(2) };
    bench.store().control(operation, modify, &mut out);
    bench.run(out, &mut Memory::zeros(4096).expect("memory")) == Some(Ok(()))
}

fn is_changed(bench: &mut Bench, number: u64) -> bool {
    bench.store().volumes()[0].verify_reads == number.is_multiple_of(2)
}

/// The disk is full; the tree is opened again and again until both logs are full, too. The number of the change that waits.
fn until_it_waits(bench: &mut Bench, disk: &Disk) -> u64 {
    disk.keep_no_space();
    disk.set_full(true);
    for number in 0..3 * LOG_BLOCKS {
        if !change(bench, number) {
            assert!(number > FIT, "only {number} changes fit");
            return number;
        }
        if number < FIT && number.is_multiple_of(3) {
            bench.kill();
            assert!(is_changed(bench, number), "change {number} is lost");
        }
    }
    panic!("both logs are full, and nothing waits");
}

/// There is space again: what waited is done, and so is all that comes from `next` on.
fn goes_on(bench: &mut Bench, disk: &Disk, next: u64) {
    let end = next + 3 * LOG_BLOCKS;
    disk.set_full(false);
    assert_eq!(bench.ticks(&mut Memory::zeros(4096).expect("memory")), Some(Ok(())), "what waited is done");
    for number in next..end {
        assert!(change(bench, number));
    }
    bench.kill();
    assert!(is_changed(bench, end - 1));
    bench.lose_pending();
    assert!(is_changed(bench, end - 1));
}

#[test]
fn without_space_for_a_checkpoint_a_tree_opens_and_goes_on_when_there_is_some() {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    let last = until_it_waits(&mut bench, &disk);
    goes_on(&mut bench, &disk, last + 1);
}

/// Behind the end of a log there is room for what a killed process left, though for no more than that.
#[test]
fn a_tree_whose_logs_have_ended_opens_and_waits_for_a_checkpoint() {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    let mut last = until_it_waits(&mut bench, &disk);
    loop {
        bench.kill();
        assert!(is_changed(&mut bench, last), "change {last} is lost");
        if bench.store().commit.can_rotate() {
            break;
        }
        while change(&mut bench, last + 1) {
            last += 1;
        }
        last += 1;
    }
    assert_eq!(bench.read(volume(1), 0, 1), [0], "it is read");
    assert!(!change(&mut bench, last + 1), "a change waits");
    goes_on(&mut bench, &disk, last + 2);
}

#[test]
fn a_tree_whose_logs_are_full_opens_when_there_is_space() {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    let mut last = until_it_waits(&mut bench, &disk);
    // Each restart puts what waits into the log, until that is full to its last block.
    for restart in 0.. {
        assert!(restart < LOG_BLOCKS, "the log is never full");
        let memory = bench.store.take().expect("open").into_memory();
        match Store::open(disk.clone(), Pending::over(memory)) {
            Ok(store) => bench.store = Some(store),
            Err(OpenError::Io { error, .. }) if is_full(&error) => break,
            Err(error) => panic!("{error}"),
        }
        assert!(is_changed(&mut bench, last), "change {last} is lost");
        last += 1;
        change(&mut bench, last);
    }
    disk.set_full(false);
    bench.store = Some(Store::open(disk.clone(), Pending::over(pending())).expect("opens"));
    assert!(is_changed(&mut bench, last - 1), "what was done is kept");
    assert!(change(&mut bench, last));
}

/// A snapshot that is one piece, and above it a hole at every second block: merged, each block is a piece.
fn fragment(bench: &mut Bench) {
    let two = volume(2);
    assert_eq!(bench.control(Control::CreateVolume { volume: two, size: size(4096), verify_reads: false }), Ok(()));
    for start in (0..4096).step_by(256) {
        bench.write(two, start, &[7; 256]);
    }
    assert_eq!(bench.control(Control::Seal { volume: two, snapshot: snapshot(2), created_ms: 1 }), Ok(()));
    for block in (0..4096).step_by(2) {
        bench.simple(two, Request::Discard(range(block, 1)));
    }
    bench.idle();
}

/// Merges on a disk that is full; whether everything goes on.
fn goes_on_while_it_merges(planted: Option<Planted>) -> bool {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    bench.store().planted = planted;
    fragment(&mut bench);
    let written = Disk::new(0);
    let store = bench.store();
    let position = super::super::log::Position { epoch: 1, sequence: 0, chain: 0 };
    write_checkpoint(&written, store.superblock.instance, position, &store.tree).expect("a checkpoint");
    let bytes = written.size(Name::Checkpoint).expect("readable").expect("there");
    assert!(bytes > 32 << 10 && bytes <= store.space_range().least, "{bytes} are written");
    disk.set_full(true);
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(2))), Ok(()));
    for number in 0..8 * LOG_BLOCKS {
        for _ in 0..40 {
            let Some(delay) = bench.store().next_tick() else { break };
            bench.now += delay;
            let (mut out, now) = (Vec::new(), bench.now);
            bench.store().tick(now, &mut out);
            bench.run(out, &mut Memory::zeros(4096).expect("memory"));
        }
        if !change(&mut bench, number) {
            return false;
        }
    }
    assert_eq!(bench.store().backlog().merging_layers, 0, "it is merged");
    assert_eq!(bench.read(volume(2), 0, 4), [0, 7, 0, 7]);
    bench.kill();
    assert!(change(&mut bench, 8 * LOG_BLOCKS));
    true
}

#[test]
fn a_full_disk_has_space_for_what_merges_make_of_the_map() {
    assert!(goes_on_while_it_merges(None));
    assert!(!goes_on_while_it_merges(Some(Planted::SpaceForTheNextAlone)), "the mistake is not found");
}

#[test]
fn a_merge_waits_for_the_space_that_its_map_may_need() {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    fragment(&mut bench);
    // A full disk, and nothing is known to be kept on it.
    disk.keep_no_space();
    disk.set_full(true);
    bench.store().space = Space::default();
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(2))), Ok(()));
    let layers = bench.store().volumes()[1].layers;
    for _ in 0..200 {
        let delay = bench.store().next_tick().expect("it looks again");
        bench.now += delay;
        let (mut out, now) = (Vec::new(), bench.now);
        bench.store().tick(now, &mut out);
        bench.run(out, &mut Memory::zeros(4096).expect("memory"));
    }
    assert_eq!(bench.store().backlog().merging_layers, 1);
    assert_eq!(bench.store().volumes()[1].layers, layers);
    assert!(change(&mut bench, 0), "nothing else waits");
    disk.set_full(false);
    bench.idle();
    assert_eq!(bench.store().backlog().merging_layers, 0);
    assert_eq!(bench.read(volume(2), 0, 4), [0, 7, 0, 7]);
}

/// What is kept for it between two checkpoints is enough for the next one.
#[test]
fn with_the_space_that_is_kept_for_checkpoints_a_full_disk_stops_nothing() {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    disk.set_full(true);
    for number in 0..20 * LOG_BLOCKS {
        assert!(change(&mut bench, number), "change {number} waits");
        if number.is_multiple_of(7) {
            bench.kill();
        }
    }
    bench.lose_pending();
    assert!(is_changed(&mut bench, 20 * LOG_BLOCKS - 1));
}

/// Before its log is half full, a tree takes little: there may be many that nobody writes.
#[test]
fn a_directory_keeps_the_space_of_two_checkpoints() {
    let directory = tempfile::Builder::new().prefix("tandem-store-").tempdir().expect("a directory");
    let files: Arc<dyn Files> = Arc::new(Directory::new(directory.path()));
    let mut bench = small_in(&files);
    let create = Control::CreateVolume { volume: volume(2), size: size(1 << 18), verify_reads: false };
    assert_eq!(bench.control(create), Ok(()));
    bench.idle();
    let names = [Name::Checkpoint, Name::CheckpointNew];
    let kept = || names.map(|name| files.reserved(name).expect("readable"));
    let (little, before) = (90 << 10, kept());
    assert!(before.iter().all(|bytes| (12 << 10..little).contains(bytes)), "{before:?}");
    for number in 0..LOG_BLOCKS * 5 / 8 {
        assert!(change(&mut bench, number));
    }
    bench.idle();
    let after = kept();
    assert!(after.iter().all(|bytes| *bytes > 2 * little), "{after:?}");
    let content = std::fs::read(directory.path().join("checkpoint")).expect("readable");
    files.write_at(Name::CheckpointNew, 0, &[7; 4096]).expect("written");
    files.exchange(Name::Checkpoint, Name::CheckpointNew).expect("exchanged");
    assert_eq!(std::fs::read(directory.path().join("checkpoint.new")).expect("readable"), content);
    assert_eq!(kept(), [after[1], after[0]]);
}

/// An attempt that gets nothing gives nothing away, and what a tree has it need not ask for.
#[test]
fn what_is_kept_is_known_when_a_full_disk_has_no_more() {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    let most = bench.store().space_range().most;
    let kept = disk.reserved(Name::Checkpoint).and_then(|one| Ok(one.min(disk.reserved(Name::CheckpointNew)?)));
    let kept = kept.expect("readable");
    assert!(kept >= 12 << 10);
    disk.set_full(true);
    assert_eq!(keep(&*disk, Range { least: kept.max(most) + 1, most: 2 * kept.max(most) }), kept);
}

/// The directory could not be synced after an exchange; the next attempt wrote over what a power cut would still call the
/// checkpoint.
#[test]
fn a_checkpoint_is_not_written_over_before_the_exchange_of_its_name_is_durable() {
    use super::super::job::{name_checkpoint, prepare_checkpoint};
    use super::super::log::Position;
    for seed in 0..60 {
        let disk = Arc::new(Disk::new(seed));
        let mut bench = Bench::over(disk.clone(), None);
        for number in 1..=60 {
            let create = Control::CreateVolume { volume: volume(number), size: size(1024), verify_reads: false };
            assert_eq!(bench.control(create), Ok(()));
        }
        let store = bench.store.take().expect("open");
        let (instance, tree) = (store.superblock.instance, &store.tree);
        let at = |epoch| Position { epoch, sequence: 0, chain: 0 };
        write_checkpoint(&*disk, instance, at(5), tree).expect("a checkpoint");
        prepare_checkpoint(&*disk, instance, at(6), tree).expect("the next one");
        disk.set_write_errors(1000);
        assert!(name_checkpoint(&*disk).is_err(), "its name is not durable");
        disk.set_write_errors(0);
        disk.set_fuse(Some(2 + (seed % 5) as u32));
        // The machine stops in the middle of another attempt, or after it.
        let _ = prepare_checkpoint(&*disk, instance, at(7), tree);
        disk.power_cut(&[]);
        let opened = Store::open(disk.clone(), Pending::over(pending()));
        let store = opened.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(store.volumes().len(), 60);
    }
}

/// They took those of the next snapshot with each step of a merge, and all of that was read again each time.
#[test]
fn what_is_merged_without_checksums_has_none_made_anew_with_each_step() {
    let disk = Arc::new(Disk::new(0));
    let mut bench = small(&disk);
    let seal = |number| Control::Seal { volume: volume(1), snapshot: snapshot(number), created_ms: 0 };
    // A merge takes a few extents at a time.
    (0..30).for_each(|block| bench.write(volume(1), 2 * block, &[1]));
    disk.set_full(true);
    assert_eq!(bench.control(seal(1)), Ok(()));
    bench.idle();
    disk.set_full(false);
    (0..30).for_each(|block| bench.write(volume(1), 2 * block + 1, &[2]));
    assert_eq!(bench.control(seal(2)), Ok(()));
    bench.idle();
    let checked: Vec<_> = bench.store().snapshots().iter().map(|info| info.checksummed).collect();
    assert_eq!(checked, [false, true]);
    assert_eq!(bench.control(Control::DeleteSnapshot(snapshot(1))), Ok(()));
    let mut made = 0;
    while let Some(delay) = bench.store().next_tick() {
        bench.now += delay;
        let (mut out, now) = (Vec::new(), bench.now);
        bench.store().tick(now, &mut out);
        made += out.iter().filter(|action| matches!(action, Action::Job(Job::Checksum(_)))).count();
        bench.run(out, &mut Memory::zeros(4096).expect("memory"));
    }
    assert_eq!((bench.store().volumes()[0].layers, made), (2, 0));
    bench.kill();
    bench.idle();
    assert!(bench.store().snapshots()[0].checksummed, "after the next start");
}
