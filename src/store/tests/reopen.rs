//! What a tree makes durable when it is opened.

use super::super::simulation::Write;
use super::super::*;
use super::*;

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
