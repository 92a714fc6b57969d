//! What a tree makes durable when it is opened.

use super::super::simulation::Write;
use super::super::*;
use super::mirror::mirrored;
use super::*;
use crate::protocol::Extent;

/// The seal was in the checkpoint, and a write of the sealed layer landed in a cache and was never synced: a snapshot that is shown
/// changes never again.
#[test]
fn what_a_snapshot_shows_after_a_kill_is_there_after_a_power_cut() {
    let disk = Arc::new(Disk::new(0));
    Store::create_with(&*disk, &superblock(), 24 * BLOCK_SIZE).expect("a tree");
    let memory = Memory::zeros(3 * 4096).expect("memory");
    let store = Store::open(disk.clone(), Pending::over(memory)).expect("opens");
    let mut bench = Bench { directory: None, files: disk.clone(), store: Some(store), next: 0, now: Duration::ZERO };
    let one = volume(1);
    assert_eq!(bench.control(Control::CreateVolume { volume: one, size: size(1024), verify_reads: false }), Ok(()));
    bench.write(one, 0, &[1; 64]);
    assert_eq!(bench.control(Control::Seal { volume: one, snapshot: snapshot(1), created_ms: 1 }), Ok(()));
    for number in 0..48 {
        let modify = Control::Modify { volume: one, verify_reads: number % 2 == 0 };
        assert_eq!(bench.control(modify), Ok(()));
    }
    assert!(bench.store().commit.generation() > 1, "a checkpoint has the seal");
    disk.write(&Write { file: File::Data, offset: 0, bytes: vec![2; 64 * 4096] });
    bench.kill();
    let before = bench.read(one, 0, 64);
    disk.power_cut(&[]);
    bench.lose_pending();
    assert_eq!(bench.read(one, 0, 64), before);
}

/// Of a first record one copy was left by a crash; when that was damaged, the volume was taken for one that was never mirrored.
#[test]
fn of_what_a_crash_has_torn_there_are_two_copies_again() {
    let (mut bench, id) = mirrored();
    assert_eq!(bench.mark(id, &[Extent(3)]), Ok(()));
    let files = bench.files.clone();
    let blocks = files.size(Name::Mirror).expect("readable").expect("there") / BLOCK_SIZE;
    let mut block = [0; 4096];
    let begins = |at: &u64| {
        files.read_at(Name::Mirror, at * BLOCK_SIZE, &mut block).expect("readable");
        [&b"TandemMR"[..], b"TandemMH"].contains(&&block[..8])
    };
    let copies: Vec<u64> = (0..blocks).filter(begins).collect();
    let [record, other_record, hot, other_hot] = copies[..] else { panic!("{copies:?}") };
    for lost in [[record, hot], [other_record, other_hot], [record, other_hot]] {
        for at in lost {
            files.write_at(Name::Mirror, at * BLOCK_SIZE, &[0; 4096]).expect("writable");
        }
        bench.kill();
        let found = bench.store().mirrored(id).expect("mirrored");
        assert_eq!((found.record.configuration.stamp.version.0, found.hot), (1, &[Extent(3)][..]));
    }
}
