//! The process dies at every await, and every call to the replica fails before or after it was done: the same call
//! repeated converges, and a sweep at start leaves nothing half done.

use crate::fake::When;
use crate::site::*;
use std::collections::BTreeSet;
use std::future::Future;
use std::task::Poll;
use tandem::catalog;
use tandem::csi::controller::request::{Expand, Modify, NewSnapshot, NewVolume, Publish, Unpublish};
use tandem::csi::group::{GroupReference, NewGroup};
use tandem::csi::status::Coded;
use tandem::rpc::csi::volume_capability::access_mode::Mode;
use tandem::rpc::csi::*;
use tonic::{Code, Status};

/// More awaits than any call has; a call that needs more is stuck.
const MOST_POLLS: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    CreateVolume,
    CloneVolume,
    RestoreSnapshot,
    DeleteVolume,
    Expand,
    Modify,
    Publish,
    Unpublish,
    CreateSnapshot,
    DeleteSnapshot,
    CreateGroup,
    DeleteGroup,
}

const CALLS: [Call; 12] = [
    Call::CreateVolume,
    Call::CloneVolume,
    Call::RestoreSnapshot,
    Call::DeleteVolume,
    Call::Expand,
    Call::Modify,
    Call::Publish,
    Call::Unpublish,
    Call::CreateSnapshot,
    Call::DeleteSnapshot,
    Call::CreateGroup,
    Call::DeleteGroup,
];

/// What a call works on; made anew for every turn.
struct Subject {
    turn: usize,
    volume: String,
    snapshot: String,
    group: String,
}

async fn prepare(driver: &Driver, call: Call, turn: usize) -> Subject {
    let volume = driver.create(wanted(&format!("base-{turn}"), MIB)).await.expect("created").volume_id;
    let snapshot = match call {
        Call::RestoreSnapshot | Call::DeleteSnapshot => {
            driver.snapshot(&format!("base-{turn}"), &volume).await.expect("taken").snapshot_id
        }
        _ => String::new(),
    };
    if call == Call::Unpublish {
        driver.publish(&volume, NODE, Mode::SingleNodeWriter, false).await.expect("published");
    }
    let mut subject = Subject { turn, volume, snapshot, group: String::new() };
    if call == Call::DeleteGroup {
        let group = driver.controller.create_group(new_group(&subject, "base")).await.expect("taken");
        subject.group = group.group_snapshot_id;
    }
    subject
}

fn new_group(subject: &Subject, prefix: &str) -> NewGroup {
    let request = CreateVolumeGroupSnapshotRequest {
        name: format!("{prefix}-{}", subject.turn),
        source_volume_ids: vec![subject.volume.clone()],
        ..Default::default()
    };
    request.try_into().expect("a request")
}

fn status(error: impl Coded) -> Status {
    Status::new(error.code(), error.to_string())
}

/// The domain call itself, so that dropping the future is what a kill does: nothing runs on but what blocks in the kernel.
async fn run(driver: &Driver, call: Call, subject: &Subject) -> Result<(), Status> {
    let (controller, volume) = (&driver.controller, subject.volume.clone());
    let name = format!("new-{}", subject.turn);
    let create = |request: CreateVolumeRequest| {
        let wanted = NewVolume::try_from(request).expect("a request");
        async { controller.create_volume(wanted).await.map(drop).map_err(status) }
    };
    match call {
        Call::CreateVolume => create(wanted(&name, MIB)).await,
        Call::CloneVolume => create(from_volume(&name, &volume)).await,
        Call::RestoreSnapshot => create(from_snapshot(&name, &subject.snapshot)).await,
        Call::DeleteVolume => controller.delete_volume(&volume).await.map_err(status),
        Call::Expand => {
            let capacity_range = Some(range(2 * MIB, 0));
            let request = ControllerExpandVolumeRequest { volume_id: volume, capacity_range, ..Default::default() };
            controller.expand(Expand::try_from(request).expect("a request")).await.map(drop).map_err(status)
        }
        Call::Modify => {
            let mutable_parameters = map(&[("verifyReads", "true")]);
            let request = ControllerModifyVolumeRequest { volume_id: volume, mutable_parameters, ..Default::default() };
            controller.modify(Modify::try_from(request).expect("a request")).await.map_err(status)
        }
        Call::Publish => {
            let request = ControllerPublishVolumeRequest {
                volume_id: volume,
                node_id: NODE.into(),
                volume_capability: Some(mount(Mode::SingleNodeWriter, "")),
                ..Default::default()
            };
            controller.publish(Publish::try_from(request).expect("a request")).await.map_err(status)
        }
        Call::Unpublish => {
            let request = ControllerUnpublishVolumeRequest { volume_id: volume, ..Default::default() };
            controller.unpublish(Unpublish::try_from(request).expect("a request")).await.map_err(status)
        }
        Call::CreateSnapshot => {
            let request = CreateSnapshotRequest { name, source_volume_id: volume, ..Default::default() };
            let wanted = NewSnapshot::try_from(request).expect("a request");
            controller.create_snapshot(wanted).await.map(drop).map_err(status)
        }
        Call::DeleteSnapshot => controller.delete_snapshot(&subject.snapshot).await.map_err(status),
        Call::CreateGroup => controller.create_group(new_group(subject, "new")).await.map(drop).map_err(status),
        Call::DeleteGroup => {
            let request =
                DeleteVolumeGroupSnapshotRequest { group_snapshot_id: subject.group.clone(), ..Default::default() };
            controller.delete_group(GroupReference::try_from(request).expect("a request")).await.map_err(status)
        }
    }
}

/// Frees what would make the node full.
async fn clean_up(driver: &Driver, call: Call, subject: &Subject) {
    if call == Call::Publish {
        driver.unpublish(&subject.volume, NODE).await.expect("unpublished");
    }
}

/// Polls the future `polls` times and then drops it; `None`: it was not done.
async fn cut<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let (mut future, mut left) = (Box::pin(future), polls);
    std::future::poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    })
    .await
}

/// The catalogue and the replica agree, and nothing is half done.
async fn consistent(site: &Site, driver: &Driver, what: &str) {
    let volumes = driver.catalog.list::<catalog::Volume>().await.expect("lists");
    let snapshots = driver.catalog.list::<catalog::Snapshot>().await.expect("lists");
    let groups = driver.catalog.list::<catalog::GroupSnapshot>().await.expect("lists");
    let state = site.fake.state();
    let known: BTreeSet<_> = volumes.iter().map(|stored| stored.object.id.to_string()).collect();
    assert_eq!(known, state.volumes.keys().cloned().collect(), "{what}");
    for volume in volumes.iter().map(|stored| &stored.object) {
        let copy = &state.volumes[&volume.id.to_string()];
        let is = (copy.size_bytes, copy.verify_reads);
        assert!(volume.is_visible(), "{what}: {volume:?}");
        assert_eq!((volume.status.size.bytes(), volume.status.verify_reads), is, "{what}");
        assert_eq!((volume.spec.size.bytes(), volume.spec.verify_reads), is, "{what}");
    }
    let known: BTreeSet<_> = snapshots.iter().map(|stored| stored.object.id.to_string()).collect();
    assert_eq!(known, state.snapshots.keys().cloned().collect(), "{what}");
    for snapshot in snapshots.iter().map(|stored| &stored.object) {
        assert!(!snapshot.deleted && snapshot.status != catalog::SnapshotStatus::Creating, "{what}: {snapshot:?}");
    }
    let members = groups.iter().flat_map(|stored| &stored.object.members).map(|member| member.snapshot.to_string());
    let members: BTreeSet<_> = members.collect();
    let grouped = snapshots.iter().filter(|stored| stored.object.group.is_some());
    assert_eq!(members, grouped.map(|stored| stored.object.id.to_string()).collect(), "{what}");
    for group in groups.iter().map(|stored| &stored.object) {
        assert!(!group.deleted && group.status != catalog::GroupStatus::Creating, "{what}: {group:?}");
    }
}

/// How many of what there are.
async fn counts(driver: &Driver) -> (usize, usize) {
    (driver.volumes().await.len(), driver.snapshots().await.len())
}

/// What the call adds to what was there.
fn expected(call: Call, (volumes, snapshots): (usize, usize)) -> (usize, usize) {
    match call {
        Call::CreateVolume | Call::CloneVolume | Call::RestoreSnapshot => (volumes + 1, snapshots),
        Call::DeleteVolume => (volumes - 1, snapshots),
        Call::CreateSnapshot | Call::CreateGroup => (volumes, snapshots + 1),
        Call::DeleteSnapshot | Call::DeleteGroup => (volumes, snapshots - 1),
        Call::Expand | Call::Modify | Call::Publish | Call::Unpublish => (volumes, snapshots),
    }
}

/// Kills the process at every await of the call, and says how often. `sweeps`: the next one sweeps before the call is
/// repeated.
async fn killed_at_every_await(call: Call, sweeps: bool) -> usize {
    let site = Site::new();
    for polls in 1..MOST_POLLS {
        let what = format!("{call:?} cut after {polls} polls, sweeps: {sweeps}");
        let driver = site.driver();
        let subject = prepare(&driver, call, polls).await;
        let before = counts(&driver).await;
        let done = cut(run(&driver, call, &subject), polls).await;
        drop(driver);
        let driver = site.driver();
        if sweeps {
            driver.controller.sweep().await.unwrap_or_else(|error| panic!("{what}: {error}"));
            consistent_soon(&site, &driver, &what).await;
        }
        run(&driver, call, &subject).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        consistent(&site, &driver, &what).await;
        assert_eq!(counts(&driver).await, expected(call, before), "{what}");
        clean_up(&driver, call, &subject).await;
        if let Some(result) = done {
            result.unwrap_or_else(|error| panic!("{what}: {error}"));
            return polls - 1;
        }
    }
    panic!("{call:?} is not done after {MOST_POLLS} polls");
}

/// A clone that the replica has made is kept by the sweep until its call is repeated: not half done, but under way.
async fn consistent_soon(site: &Site, driver: &Driver, what: &str) {
    let volumes = driver.catalog.list::<catalog::Volume>().await.expect("lists");
    let under_way = |stored: &catalog::Stored<catalog::Volume>| {
        stored.object.request.source.is_some() && stored.object.status.phase == catalog::VolumePhase::Creating
    };
    if !volumes.iter().any(under_way) {
        consistent(site, driver, what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_was_killed_anywhere_converges_when_repeated() {
    let mut kills = 0;
    for call in CALLS {
        kills += killed_at_every_await(call, false).await;
    }
    assert!(kills > 3 * CALLS.len(), "only {kills} kills");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sweep_at_start_leaves_nothing_half_done() {
    let mut kills = 0;
    for call in CALLS {
        kills += killed_at_every_await(call, true).await;
    }
    assert!(kills > 3 * CALLS.len(), "only {kills} kills");
}

/// Every call to the replica fails, before or after it was done, in a way that says nothing about whether it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_dies_in_any_call_is_asked_again() {
    for call in CALLS.into_iter().filter(|call| !matches!(call, Call::Publish | Call::Unpublish)) {
        let site = Site::new();
        let driver = site.driver();
        for (turn, (number, when)) in (0..).flat_map(|n| [(n, When::Before), (n, When::After)]).enumerate() {
            let what = format!("{call:?}, call {number} fails {when:?}");
            let subject = prepare(&driver, call, turn).await;
            let before = counts(&driver).await;
            let calls = site.fake.state().calls.len();
            site.fake.fail_call(number, when, Code::Unavailable);
            let result = run(&driver, call, &subject).await;
            let failed = site.fake.state().calls.len() > calls + number;
            site.fake.state().fail = None;
            assert_eq!(result.is_err(), failed, "{what}: {result:?}");
            if let Err(status) = result {
                assert_eq!(status.code(), Code::Unavailable, "{what}");
            }
            run(&driver, call, &subject).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            consistent(&site, &driver, &what).await;
            assert_eq!(counts(&driver).await, expected(call, before), "{what}");
            if !failed {
                assert!(number > 0, "{what}: the replica was never asked");
                break;
            }
        }
    }
}

/// The pool fills up just then: a final answer, and everything is as it was.
#[tokio::test]
async fn a_refusal_for_want_of_room_leaves_everything_as_it_was() {
    let calls = [Call::CreateVolume, Call::CloneVolume, Call::RestoreSnapshot, Call::Expand];
    for call in calls.into_iter().chain([Call::CreateSnapshot, Call::CreateGroup]) {
        let site = Site::new();
        let driver = site.driver();
        let subject = prepare(&driver, call, 0).await;
        let before = counts(&driver).await;
        // A new volume is placed first: what is told then is not what is left in the end.
        let number = usize::from(call == Call::CreateVolume);
        site.fake.fail_call(number, When::Before, Code::ResourceExhausted);
        let status = run(&driver, call, &subject).await.expect_err("no room");
        assert_eq!(status.code(), Code::ResourceExhausted, "{call:?}");
        consistent(&site, &driver, &format!("{call:?}")).await;
        assert_eq!(counts(&driver).await, before, "{call:?}");
        run(&driver, call, &subject).await.expect("there is room again");
        consistent(&site, &driver, &format!("{call:?}")).await;
    }
}
