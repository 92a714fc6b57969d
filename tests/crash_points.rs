//! Every CSI call, cut off by kill -9 at every step of it, then repeated: it converges to what it does without a kill,
//! and nothing is left over. Needs root and mkfs.ext4.
//!
//! A point of the table that its call does not pass fails the test, as does a point in the source that is in no row; points of
//! mirrored volumes are those of tests/faults/kills.rs.

#[path = "crash_points/calls.rs"]
mod calls;
#[path = "crash_points/site.rs"]
mod site;
mod support;
#[path = "crash_points/table.rs"]
mod table;

use calls::{Call, Subject};
use site::{Point, Site, State, Victim};
use std::collections::BTreeSet;
use std::time::Instant;
use support::points::{in_the_source, is_of_a_mirror};
use table::TABLE;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Cuts the call off at every pass of every point; with the whole server, and with CSI alone while the engine works, at
/// every point.
fn cut_off_everywhere(call: Call) {
    let began = Instant::now();
    runtime().block_on(async {
        let mut site = Site::new().await;
        let empty = site.quiet().await;
        let (hits, after) = undisturbed(&mut site, call, &empty).await;
        let names: BTreeSet<_> = hits.iter().map(|point| point.name.as_str()).collect();
        let row = TABLE.iter().find(|(wanted, _)| *wanted == call).map(|(_, row)| row.iter().copied().collect());
        assert_eq!(row, Some(names), "{call:?}: the table is not what the call passes");
        let mut number = 0;
        // How often a copy is asked for until it is complete is chance.
        let is_chance = |point: &&Point| call == Call::CopyVolume && point.name == "csi.call" && point.pass > 1;
        for point in hits.iter().filter(|point| !is_chance(point)) {
            let mut victims = vec![Victim::Itself];
            if point.pass == 1 {
                victims.push(Victim::Server);
            }
            if point.pass == 1 && !point.name.starts_with("csi.") {
                victims.push(Victim::Csi);
            }
            for victim in victims {
                number += 1;
                cut_off(&mut site, call, number, point, victim, (&empty, &after)).await;
            }
        }
        println!("{call:?}: {number} kills at {} points, {:?}", hits.len(), began.elapsed());
    });
}

/// The points that the call passes when nothing happens, and what is there afterwards.
async fn undisturbed(site: &mut Site, call: Call, empty: &State) -> (Vec<Point>, State) {
    let subject = Subject::prepare(site, call, 0).await;
    site.quiet().await;
    site.forget();
    site.insist(async |tandem| subject.run(tandem).await).await;
    let after = site.quiet().await;
    let hits = site.hits();
    subject.verify(site).await;
    subject.clean_up(site).await;
    assert_eq!(site.settled(empty).await, *empty, "{call:?} undisturbed leaves something");
    (hits, after)
}

async fn cut_off(
    site: &mut Site,
    call: Call,
    number: u32,
    point: &Point,
    victim: Victim,
    (empty, after): (&State, &State),
) {
    let what = format!("{call:?}, pass {} of {}, {victim:?} killed", point.pass, point.name);
    let subject = Subject::prepare(site, call, number).await;
    site.arm(point, victim);
    site.insist(async |tandem| subject.run(tandem).await).await;
    assert!(site.fired().await, "{what}: the point is never passed");
    site.revive().await;
    // Once more: it is done, and stays so.
    site.insist(async |tandem| subject.run(tandem).await).await;
    assert_eq!(site.settled(after).await, *after, "{what}\n{}", site.tandem.log());
    subject.verify(site).await;
    subject.clean_up(site).await;
    assert_eq!(site.settled(empty).await, *empty, "{what}: something is left over\n{}", site.tandem.log());
}

macro_rules! every_call {
    ($($test:ident: $call:ident),* $(,)?) => { $(
        #[test]
        fn $test() {
            cut_off_everywhere(Call::$call);
        }
    )* };
}

every_call! {
    create_volume_survives_a_kill_at_every_step: CreateVolume,
    a_clone_survives_a_kill_at_every_step: CloneVolume,
    a_copy_into_another_pool_survives_a_kill_at_every_step: CopyVolume,
    a_restore_survives_a_kill_at_every_step: RestoreSnapshot,
    delete_volume_survives_a_kill_at_every_step: DeleteVolume,
    create_snapshot_survives_a_kill_at_every_step: CreateSnapshot,
    create_group_survives_a_kill_at_every_step: CreateGroup,
    delete_group_survives_a_kill_at_every_step: DeleteGroup,
    delete_snapshot_survives_a_kill_at_every_step: DeleteSnapshot,
    expand_survives_a_kill_at_every_step: Expand,
    modify_survives_a_kill_at_every_step: Modify,
    controller_publish_survives_a_kill_at_every_step: ControllerPublish,
    controller_unpublish_survives_a_kill_at_every_step: ControllerUnpublish,
    stage_survives_a_kill_at_every_step: Stage,
    publish_survives_a_kill_at_every_step: Publish,
    unpublish_survives_a_kill_at_every_step: Unpublish,
    unstage_survives_a_kill_at_every_step: Unstage,
}

#[test]
fn every_point_of_the_source_is_in_the_table() {
    let found: BTreeSet<_> = in_the_source().into_iter().filter(|name| !is_of_a_mirror(name)).collect();
    let rows: BTreeSet<_> = TABLE.iter().flat_map(|(_, row)| row.iter().map(ToString::to_string)).collect();
    assert_eq!(found, rows);
}
