//! What is wanted of a volume changes while it is used: how many copies it has, under fio, and its size, while a copy is away.

use crate::site::{PATIENCE, SIZE, Site};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tandem::rpc::csi::{ControllerGetVolumeHealthRequest, VolumeHealthErrorType};

/// Of the way to the new copy, until it was seen that the volume is degraded.
const SLOW: &str = "3M";
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    passes: AtomicU32,
}

/// fio with checksums, pass after pass: each reads back what it wrote.
struct Fio {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Fio {
    fn start(device: PathBuf) -> Self {
        let shared = Arc::new(Shared::default());
        let mine = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            while !mine.stop.load(SeqCst) {
                pass(&device);
                mine.passes.fetch_add(1, SeqCst);
            }
        });
        Self { shared, thread }
    }

    /// Waits for so many passes more: the last one began after this call.
    fn await_passes(&self, more: u32) {
        let (began, until) = (Instant::now(), self.shared.passes.load(SeqCst) + more + 1);
        while self.shared.passes.load(SeqCst) < until {
            assert!(!self.thread.is_finished(), "fio has found an error, or had one");
            assert!(began.elapsed() < PATIENCE, "a pass of fio does not end");
            std::thread::sleep(PAUSE);
        }
    }

    /// How many passes there were; none had an error.
    fn finish(self) -> u32 {
        self.shared.stop.store(true, SeqCst);
        self.thread.join().expect("no error");
        self.shared.passes.load(SeqCst)
    }
}

fn pass(device: &Path) {
    let mut fio = Command::new("fio");
    fio.args(["--name=tandem-changes", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16", "--size=32m"]);
    fio.args(["--direct=1", "--ioengine=libaio", "--time_based", "--runtime=2", "--output-format=terse"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=256"]);
    let output = fio.arg(format!("--filename={}", device.display())).output().expect("fio is installed");
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{fio:?}: {}\n{}", output.status, String::from_utf8_lossy(&text));
}

/// Waits until the controller calls the volume degraded.
async fn until_degraded(site: &Site) {
    let began = Instant::now();
    let request = ControllerGetVolumeHealthRequest { volume_id: site.id.clone(), ..Default::default() };
    loop {
        let answer = site.cluster.controller().controller_get_volume_health(request.clone()).await;
        let health = answer.expect("it answers").into_inner().volume_health.unwrap_or_default();
        if health.health_statuses.iter().any(|entry| entry.status() == VolumeHealthErrorType::Degraded) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "it is never degraded");
        tokio::time::sleep(PAUSE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_gets_and_gives_up_a_copy_while_fio_finds_what_it_wrote() {
    let site = Site::with_one_copy(2).await;
    let fio = Fio::start(site.attach(1).await);
    fio.await_passes(0);
    site.cluster.run(&["slow", "2", "link", SLOW]);
    let modified = async { site.modify(&[("replication", "sync")]).await };
    let seen = async {
        until_degraded(&site).await;
        site.cluster.run(&["heal"]);
    };
    tokio::join!(modified, seen);
    println!("sync: degraded, and whole after {:?}", site.until_whole().await);
    fio.await_passes(1);
    site.modify(&[("replication", "none")]).await;
    println!("none: as wanted after {:?}", site.until_whole().await);
    fio.await_passes(1);
    println!("{} passes of fio, no error", fio.finish());
    site.detach(1).await;
    site.finish().await;
}

/// Case 13.
#[tokio::test(flavor = "multi_thread")]
async fn a_growth_waits_for_a_copy_that_is_away_and_ends_when_it_is_back() {
    let (site, _, load) = Site::under_load(2).await;
    load.await_writes(100, PATIENCE);
    site.cluster.run(&["kill", "all", "2"]);
    site.until_dropped(2).await;
    let back = async {
        // Longer than the controller waits within a call for a copy that is there.
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(site.device_bytes(1).await, SIZE, "the other copy does not have that yet");
        site.cluster.run(&["start", "all", "2"]);
    };
    tokio::join!(site.expand(2 * SIZE, 1), back);
    assert_eq!(site.device_bytes(1).await, 2 * SIZE);
    println!("grown, and whole after {:?}", site.until_whole().await);
    load.await_writes(100, PATIENCE);
    load.stop_well();
    site.detach(1).await;
    site.attach(2).await;
    assert_eq!(site.device_bytes(2).await, 2 * SIZE);
    site.finish_at_each(&[2, 1]).await;
}
