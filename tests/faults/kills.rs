//! Processes of a cluster that die at chosen steps of a promotion, a resync, a seal, a snapshot that is brought over, and a growth:
//! each is started again, the volume goes on, and every acknowledged write is on every copy.
//!
//! Needs a debug build: the steps are the points of `src/crash.rs`. Those of mirrors that no test here names fail the last one.

use crate::load::Load;
use crate::points;
use crate::site::{PATIENCE, SIZE, Site};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

/// How often a step is tried that a process may also come around, such as by a takeover instead of a planned move.
const ATTEMPTS: usize = 6;
const PAUSE: Duration = Duration::from_millis(5);
/// Bytes of one growth.
const GROWTH: i64 = 8 << 20;

/// A process of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Process {
    Controller,
    Replica(usize),
}
use Process::{Controller, Replica};

impl Process {
    fn role(self) -> &'static str {
        match self {
            Controller => "controller",
            Replica(_) => "replica",
        }
    }

    fn host(self) -> String {
        match self {
            Controller => "controller".to_owned(),
            Replica(number) => format!("node-{number}"),
        }
    }
}

/// When `passes` comes to the point for the `pass`th time, `dies` is killed.
#[derive(Clone, Copy, Debug)]
struct Step {
    point: &'static str,
    pass: u32,
    passes: Process,
    dies: Process,
}

fn itself(passes: Process, point: &'static str, pass: u32) -> Step {
    Step { point, pass, passes, dies: passes }
}

impl Step {
    fn armed(&self, site: &Site) -> PathBuf {
        site.cluster.dir().join(self.passes.host()).join(format!("crash-{}/armed", self.passes.role()))
    }

    fn arm(&self, site: &Site) {
        let armed = self.armed(site);
        let victim = if self.dies == self.passes {
            "self".to_owned()
        } else {
            site.cluster.dir().join(self.dies.host()).join(format!("{}.pid", self.dies.role())).display().to_string()
        };
        let fresh = armed.with_extension("new");
        fs::write(&fresh, format!("{} {} {victim}", self.point, self.pass)).expect("written");
        fs::rename(fresh, armed).expect("renamed");
    }

    /// Starts what has died again.
    async fn revive(&self, site: &Site) {
        let (role, host) = (self.dies.role(), self.dies.host());
        let process = PathBuf::from(format!("/proc/{}/status", site.pid(role, &host)));
        await_until("the end of a killed process", || is_over(&process)).await;
        // Also of what it was just starting: until then it is refused.
        await_until("the next life of a killed process", || site.cluster.tries(&["start", role, &host])).await;
    }

    /// Does something meanwhile; whether the process died in it. It is started again as soon as it is dead.
    async fn cut_off<T>(&self, site: &Site, what: impl Future<Output = T>) -> (T, bool) {
        self.arm(site);
        let armed = self.armed(site);
        let mut what = pin!(what);
        let before = tokio::select! {
            done = &mut what => Some(done),
            () = await_until("the step", || !armed.exists()) => None,
        };
        let Some(done) = before else {
            self.revive(site).await;
            return (what.await, true);
        };
        let died = !armed.exists();
        if died {
            self.revive(site).await;
        }
        // A pass that is counted writes the file again.
        while fs::remove_file(&armed).is_ok() {
            tokio::time::sleep(PAUSE).await;
        }
        (done, died)
    }
}

/// It is gone, or nobody has asked yet how it ended.
fn is_over(status: &Path) -> bool {
    fs::read_to_string(status).map_or(true, |text| text.lines().any(|line| line.starts_with("State:\tZ")))
}

async fn await_until(what: &str, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < PATIENCE, "{what} does not come");
        tokio::time::sleep(PAUSE).await;
    }
}

/// The steps of a planned move from one node to the other.
fn steps_of_a_move(from: usize, to: usize) -> [Step; 10] {
    let (from, to) = (Replica(from), Replica(to));
    [
        itself(from, "mirror.propose", 1),
        itself(from, "mirror.proposed", 1),
        itself(from, "mirror.persist", 1),
        itself(from, "mirror.persisted", 1),
        itself(to, "mirror.propose", 1),
        itself(to, "mirror.proposed", 1),
        itself(to, "mirror.persist", 2),
        itself(to, "mirror.persisted", 2),
        itself(Controller, "catalogue.configure", 2),
        itself(Controller, "catalogue.configured", 1),
    ]
}

/// Case 6: demotion, promotion, compare-and-swaps whose answer is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_cut_off_at_each_step_and_loses_nothing() {
    let (site, _, load) = Site::under_load_with_kills().await;
    load.await_writes(100, PATIENCE);
    load.stop_well();
    let (mut here, mut there) = (1, 2);
    for number in 0..steps_of_a_move(here, there).len() {
        let mut fired = false;
        for _ in 0..ATTEMPTS {
            let (step, began) = (steps_of_a_move(here, there)[number], Instant::now());
            site.detach(here).await;
            let (device, died) = step.cut_off(&site, site.attach(there)).await;
            (here, there, fired) = (there, here, died);
            site.check(&device).await;
            let load = Load::start(&device, &site.oracle);
            load.await_writes(50, PATIENCE);
            println!("{step:?}: died: {fired}; it writes after {:?}", began.elapsed());
            site.until_whole().await;
            load.stop_well();
            if fired {
                break;
            }
        }
        assert!(fired, "step {number} of a move is never passed");
    }
    site.finish_at_each(&[here, there]).await;
}

/// Cases 1, 6: who takes over from a dead node dies on the way.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_is_cut_off_and_loses_nothing() {
    let (site, _, mut load) = Site::under_load_with_kills().await;
    let (mut here, mut there) = (1, 2);
    // Its own term is durable; the drop of the dead copy is committed.
    for (point, pass) in [("mirror.persisted", 1), ("mirror.proposed", 2)] {
        load.await_writes(200, PATIENCE);
        site.cluster.run(&["kill", "all", &here.to_string()]);
        load.stop();
        site.unpublish(here).await;
        let step = itself(Replica(there), point, pass);
        let taken_over = async {
            let device = site.attach(there).await;
            site.check(&device).await;
            device
        };
        let (device, fired) = step.cut_off(&site, taken_over).await;
        assert!(fired, "{step:?} is not passed");
        load = Load::start(&device, &site.oracle);
        load.await_writes(100, PATIENCE);
        site.cluster.run(&["start", "all", &here.to_string()]);
        println!("{step:?}: a member again after {:?}", site.until_whole().await);
        site.unstage(here).await;
        (here, there) = (there, here);
    }
    load.stop_well();
    site.finish_at_each(&[here, there]).await;
}

/// Case 6: a resync, at its source and at its target, and its admission.
#[tokio::test(flavor = "multi_thread")]
async fn a_resync_is_cut_off_at_each_step_and_ends_with_equal_copies() {
    let (source, target) = (Replica(1), Replica(2));
    let steps = [
        itself(source, "mirror.planned", 1),
        itself(source, "mirror.range", 3),
        Step { point: "mirror.range", pass: 3, passes: source, dies: target },
        itself(source, "mirror.propose", 1),
        itself(source, "mirror.proposed", 1),
        itself(Controller, "catalogue.configured", 1),
    ];
    let (site, _, load) = Site::under_load_with_kills().await;
    for step in steps {
        load.await_writes(100, PATIENCE);
        site.cluster.run(&["kill", "replica", "2"]);
        site.until_dropped(2).await;
        load.await_writes(200, PATIENCE);
        let began = Instant::now();
        let brought_up_to_date = async {
            // It may die before it has said that it is ready.
            site.cluster.tries(&["start", "replica", "2"]);
            site.until_whole().await
        };
        let (_, fired) = step.cut_off(&site, brought_up_to_date).await;
        assert!(fired, "{step:?} is not passed");
        println!("{step:?}: a member again after {:?}", began.elapsed());
    }
    load.await_writes(100, PATIENCE);
    println!("{} writes", load.stop_well());
    site.finish_at_each(&[1, 2]).await;
}

/// Case 6: a seal.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_cut_off_at_each_step_and_is_there_once() {
    let (primary, other) = (Replica(1), Replica(2));
    let steps = [
        itself(primary, "seal", 1),
        itself(primary, "mirror.seal", 1),
        itself(primary, "mirror.sealed", 1),
        itself(primary, "seal.done", 1),
        itself(other, "mirror.seal", 1),
        itself(other, "mirror.sealed", 1),
        itself(other, "record.written", 1),
        itself(Controller, "csi.created", 1),
    ];
    let (site, _, load) = Site::under_load_with_kills().await;
    for (number, step) in steps.into_iter().enumerate() {
        load.await_writes(50, PATIENCE);
        let began = Instant::now();
        let (snapshot, fired) = step.cut_off(&site, site.snapshot(&format!("snapshot-{number}"))).await;
        assert!(fired, "{step:?} is not passed");
        println!("{step:?}: taken after {:?}", began.elapsed());
        site.until_whole().await;
        assert_eq!(site.snapshots().await, std::slice::from_ref(&snapshot), "{step:?}");
        site.delete_snapshot(&snapshot).await;
        assert_eq!(site.snapshots().await, Vec::<String>::new(), "{step:?}");
    }
    load.await_writes(50, PATIENCE);
    load.stop_well();
    for node in [1, 2] {
        let (well, said) = site.verify(node);
        assert!(well, "{said}");
    }
    site.finish_at_each(&[1, 2]).await;
}

/// Case 6: a snapshot that is brought over to a copy that was away when it was taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_brought_over_whatever_dies_on_the_way() {
    let (source, target) = (Replica(1), Replica(2));
    let steps = [
        itself(target, "mirror.fill.record", 1),
        Step { point: "mirror.fill.made", pass: 1, passes: target, dies: source },
        itself(target, "mirror.fill.seal", 1),
        itself(target, "mirror.fill.sealed", 1),
        itself(Controller, "csi.updated", 1),
    ];
    let (site, device, load) = Site::under_load_with_kills().await;
    load.await_writes(50, PATIENCE);
    load.stop_well();
    for (number, step) in steps.into_iter().enumerate() {
        site.cluster.run(&["kill", "replica", "2"]);
        site.until_dropped(2).await;
        let load = Load::start(&device, &site.oracle);
        load.await_writes(50, PATIENCE);
        let snapshot = site.snapshot(&format!("snapshot-{number}")).await;
        load.await_writes(50, PATIENCE);
        // A resync beside it would only take its time.
        load.stop_well();
        let began = Instant::now();
        let brought_over = async {
            // It may die before it has said that it is ready.
            site.cluster.tries(&["start", "replica", "2"]);
            site.until_whole().await;
            site.until_snapshot_is_on(&snapshot, &[1, 2]).await;
        };
        let ((), fired) = step.cut_off(&site, brought_over).await;
        assert!(fired, "{step:?} is not passed");
        println!("{step:?}: there after {:?}", began.elapsed());
        site.until_whole().await;
        assert_eq!(site.digests(1, &snapshot).await, site.digests(2, &snapshot).await, "{step:?}");
        site.delete_snapshot(&snapshot).await;
        assert_eq!(site.snapshots().await, Vec::<String>::new(), "{step:?}");
        site.until_nothing_is_filled(2).await;
    }
    site.finish_at_each(&[1, 2]).await;
}

/// Case 13: a growth, in the middle of which each of its processes dies.
#[tokio::test(flavor = "multi_thread")]
async fn a_growth_is_cut_off_at_each_step_and_is_whole_in_the_end() {
    let (primary, other) = (Replica(1), Replica(2));
    let steps = [
        itself(other, "control", 1),
        itself(other, "control.done", 1),
        itself(primary, "control", 1),
        itself(primary, "control.done", 1),
        itself(primary, "resize.device", 1),
        itself(Controller, "csi.update", 1),
        itself(Controller, "csi.updated", 1),
    ];
    let (site, _, load) = Site::under_load_with_kills().await;
    let mut size = SIZE;
    for step in steps {
        load.await_writes(50, PATIENCE);
        size += GROWTH;
        let began = Instant::now();
        let ((), fired) = step.cut_off(&site, site.expand(size, 1)).await;
        assert!(fired, "{step:?} is not passed");
        println!("{step:?}: {} MiB after {:?}", size >> 20, began.elapsed());
        site.until_whole().await;
    }
    load.await_writes(50, PATIENCE);
    load.stop_well();
    assert_eq!(site.device_bytes(1).await, size);
    site.detach(1).await;
    site.attach(2).await;
    assert_eq!(site.device_bytes(2).await, size);
    site.finish_at_each(&[2, 1]).await;
}

#[test]
fn every_point_of_a_mirror_is_a_step_here() {
    let here = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file!())).expect("this file");
    let found: BTreeSet<_> = points::in_the_source().into_iter().filter(|name| points::is_of_a_mirror(name)).collect();
    assert!(!found.is_empty());
    let missing: Vec<_> = found.iter().filter(|name| !here.contains(&format!("\"{name}\", "))).collect();
    assert_eq!(missing, Vec::<&String>::new());
}
