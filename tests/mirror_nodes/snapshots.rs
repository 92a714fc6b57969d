//! Snapshots of mirrored volumes, and volumes made from snapshots: what is read from them on each node.

use crate::site::{SIZE, Site, Up, Wanted, at, eventually, has, write};
use std::collections::{BTreeMap, BTreeSet};
use tandem::catalog::{Base, Descriptor};
use tandem::protocol::Request;
use tandem::replica::manager::{Begun, Fill, FillFailure, NewFill, NewSnapshot, NewVolume, Source};
use tandem::replica::peer::Blocks;
use tandem::replica::records::Record;
use tandem::store::{Control, Store};
use tandem::volume::{BlockRange, InstanceId, SnapshotId, VolumeId, VolumeSize};

fn wanted(volume: VolumeId) -> NewSnapshot {
    NewSnapshot { snapshot: SnapshotId::random(), volume, descriptor: "of the test".into() }
}

/// As a controller asks for it.
fn described(volume: VolumeId) -> NewSnapshot {
    let descriptor = Descriptor::Snapshot { name: Some("snap".into()), group: None, made_for: None }.encode();
    NewSnapshot { descriptor, ..wanted(volume) }
}

fn single(source: Source) -> NewVolume {
    NewVolume {
        volume: VolumeId::random(),
        pool: "default".parse().expect("a name"),
        size: VolumeSize::try_from(SIZE).expect("a size"),
        descriptor: String::new(),
        verify_reads: false,
        source,
    }
}

/// What the controller does: promises elsewhere, the seal at the primary, and the name elsewhere.
async fn take(primary: &Up, other: &Up, wanted: &NewSnapshot) -> BTreeSet<InstanceId> {
    let items = std::slice::from_ref(wanted);
    other.manager.promise_snapshots(items).await.expect("there is space");
    let copies = primary.manager.ensure_snapshots(items).await.expect("sealed");
    other.manager.adopt_snapshots(items).await.expect("it is there");
    copies[&wanted.snapshot].clone()
}

/// The volume is used on this node from now on, and nobody else has its device.
async fn use_on(site: &Site, up: &Up, volume: VolumeId, copy: InstanceId) -> std::path::PathBuf {
    site.wish(volume, Some(copy)).await;
    up.attach(volume).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_and_its_clones_are_the_same_on_both_nodes() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1", "n2"]).await;
    let (one, two) = (volume.copies["n1"], volume.copies["n2"]);
    let device = use_on(&site, &first, volume.id, one).await;
    write(&device, 0..64, 7).await;
    first.until_up_to_date(volume.id, two).await;

    let snapshot = wanted(volume.id);
    let refused = second.manager.ensure_snapshots(std::slice::from_ref(&snapshot)).await.expect_err("no primary");
    assert!(refused.to_string().contains("not its primary"), "{refused}");
    assert_eq!(take(&first, &second, &snapshot).await, BTreeSet::from([one, two]));
    assert_eq!((first.snapshots().await, second.snapshots().await), (vec![snapshot.snapshot], vec![snapshot.snapshot]));
    let again = first.manager.ensure_snapshots(std::slice::from_ref(&snapshot)).await.expect_err("an id is used once");
    assert!(again.to_string().contains("another one taken"), "{again}");
    // What follows is in neither.
    write(&device, 32..96, 9).await;

    one_that_nobody_adopts_can_be_deleted(&first, &second, volume.id, snapshot.snapshot).await;
    let clone = a_clone_is_the_same_on_both(&mut site, &first, &second, &volume.copies, snapshot.snapshot).await;

    // The other node's snapshot, after a start.
    second.kill().await;
    let second = site.start("n2", site.catalog()).await;
    assert_eq!(second.snapshots().await, [snapshot.snapshot]);
    let restored = single(Source::Snapshot(snapshot.snapshot));
    site.note(restored.volume);
    second.manager.ensure_volume(restored.clone()).await.expect("restored");
    let device = second.attach(restored.volume).await;
    assert!(has(&device, 0..64, 7).await && has(&device, 64..96, 0).await);
    second.manager.detach(restored.volume).await.expect("detached");

    // Everything goes, the snapshots last.
    second.manager.delete_volume(restored.volume).await.expect("deleted");
    first.manager.detach(volume.id).await.expect("detached");
    for volume in [volume.id, clone.id] {
        site.change(volume, |volume| volume.spec.deleted = true).await;
        eventually("no copy", async || site.volume(volume).await.object.status.copies.is_empty().then_some(())).await;
    }
    for (node, up) in [("n1", &first), ("n2", &second)] {
        eventually("no copy here", async || up.manager.copies().is_empty().then_some(())).await;
        let pool = site.path(node).join("pool");
        assert_eq!((up.snapshots().await, up.trees(&pool)), (vec![snapshot.snapshot], 1));
        up.manager.delete_snapshot(snapshot.snapshot).await.expect("deleted");
        eventually("no tree", async || (up.trees(&pool) == 0).then_some(())).await;
    }
    first.kill().await;
    second.kill().await;
}

/// One that nobody adopts is no snapshot on the other node, and can be deleted.
async fn one_that_nobody_adopts_can_be_deleted(first: &Up, second: &Up, volume: VolumeId, known: SnapshotId) {
    let dropped = wanted(volume);
    second.manager.promise_snapshots(std::slice::from_ref(&dropped)).await.expect("there is space");
    first.manager.ensure_snapshots(std::slice::from_ref(&dropped)).await.expect("sealed");
    assert_eq!(second.snapshots().await, [known]);
    for up in [first, second] {
        up.manager.delete_snapshot(dropped.snapshot).await.expect("deleted");
    }
    let missing = second.manager.adopt_snapshots(std::slice::from_ref(&dropped)).await.expect_err("it is gone");
    assert!(missing.to_string().contains("no snapshot"), "{missing}");
}

/// A clone with two copies, read on each node.
async fn a_clone_is_the_same_on_both(
    site: &mut Site,
    first: &Up,
    second: &Up,
    copies: &BTreeMap<&'static str, InstanceId>,
    snapshot: SnapshotId,
) -> Wanted {
    let (one, two) = (copies["n1"], copies["n2"]);
    let base = Base { snapshot, clones: BTreeSet::from([one, two]) };
    let clone = site.create_from(copies.clone(), Some(base)).await;
    assert!(site.configuration(clone.id).await.is_member(two), "nothing has to be copied");
    let device = use_on(site, first, clone.id, one).await;
    assert!(has(&device, 0..64, 7).await && has(&device, 64..96, 0).await);
    first.until_up_to_date(clone.id, two).await;
    write(&device, 0..8, 5).await;
    first.manager.detach(clone.id).await.expect("detached");
    let device = use_on(site, second, clone.id, two).await;
    assert!(has(&device, 0..8, 5).await && has(&device, 8..64, 7).await && has(&device, 64..96, 0).await);
    second.manager.detach(clone.id).await.expect("detached");
    clone
}

/// A volume with two copies from a snapshot that one node has: it can be used at once, and becomes whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_one_copy_becomes_a_volume_with_two() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let source = single(Source::Blank);
    site.note(source.volume);
    first.manager.ensure_volume(source.clone()).await.expect("made");
    let device = first.attach(source.volume).await;
    write(&device, 0..300, 3).await;
    let snapshot = wanted(source.volume);
    first.manager.ensure_snapshots(std::slice::from_ref(&snapshot)).await.expect("taken");
    write(&device, 100..400, 4).await;
    let tree = first.manager.list_snapshots().await[0].tree;

    let (one, two) = (tree, InstanceId::random());
    let base = Base { snapshot: snapshot.snapshot, clones: BTreeSet::from([one]) };
    let made = site.create_from(BTreeMap::from([("n1", one), ("n2", two)]), Some(base)).await;
    assert!(!site.configuration(made.id).await.is_member(two));
    let device = use_on(&site, &first, made.id, one).await;
    assert!(has(&device, 0..300, 3).await && has(&device, 300..400, 0).await);
    write(&device, 290..310, 6).await;
    first.until_up_to_date(made.id, two).await;
    first.manager.detach(made.id).await.expect("detached");
    let device = use_on(&site, &second, made.id, two).await;
    assert!(has(&device, 0..290, 3).await && has(&device, 290..310, 6).await && has(&device, 310..400, 0).await);
    second.manager.detach(made.id).await.expect("detached");
    first.manager.detach(source.volume).await.expect("detached");
    first.kill().await;
    second.kill().await;
}

/// Several volumes at one point in time: what was written to one after the other was acknowledged is in no snapshot without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_of_mirrored_volumes_is_one_point_in_time() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volumes = [site.create(&["n1", "n2"]).await, site.create(&["n1", "n2"]).await];
    let mut devices = Vec::new();
    for volume in &volumes {
        devices.push(use_on(&site, &first, volume.id, volume.copies["n1"]).await);
        first.until_up_to_date(volume.id, volume.copies["n2"]).await;
    }
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writer = tokio::spawn({
        let devices = devices.clone();
        async move {
            let mut round = 0_u8;
            while stopped.try_recv().is_err() && round < 250 {
                round += 1;
                // The first one is never behind the second.
                write(&devices[0], 0..1, round).await;
                write(&devices[1], 0..1, round).await;
            }
        }
    });
    let mut groups = Vec::new();
    for _ in 0..5 {
        let group: Vec<_> = volumes.iter().map(|volume| wanted(volume.id)).collect();
        second.manager.promise_snapshots(&group).await.expect("there is space");
        assert_eq!(first.manager.ensure_snapshots(&group).await.expect("sealed").len(), 2);
        second.manager.adopt_snapshots(&group).await.expect("there");
        groups.push(group);
    }
    // It may have written all that it shall.
    let _ = stop.send(());
    writer.await.expect("no error");
    for group in groups {
        for up in [&first, &second] {
            let mut found = Vec::new();
            for item in &group {
                let restored = single(Source::Snapshot(item.snapshot));
                site.note(restored.volume);
                up.manager.ensure_volume(restored.clone()).await.expect("restored");
                let device = up.attach(restored.volume).await;
                let mut round = 0;
                while !has(&device, 0..1, round).await {
                    round += 1;
                }
                found.push(round);
                up.manager.detach(restored.volume).await.expect("detached");
                up.manager.delete_volume(restored.volume).await.expect("deleted");
            }
            assert!(found[0] == found[1] || found[0] == found[1] + 1, "{found:?}");
        }
    }
    for volume in &volumes {
        first.manager.detach(volume.id).await.expect("detached");
    }
    first.kill().await;
    second.kill().await;
}

/// A volume in use on n1, and a snapshot that n2 is to get: its copy there is a member, and has something else under the id.
struct Lacking {
    site: Site,
    first: Up,
    second: Up,
    volume: VolumeId,
    new: NewFill,
}

impl Lacking {
    async fn new() -> Self {
        let mut site = Site::new(&["n1", "n2"]);
        let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
        site.announce("n1").await;
        site.announce("n2").await;
        let Wanted { id: volume, copies } = site.create(&["n1", "n2"]).await;
        let device = use_on(&site, &first, volume, copies["n1"]).await;
        first.until_up_to_date(volume, copies["n2"]).await;
        write(&device, 0..64, 7).await;
        let (base, snapshot) = (wanted(volume), wanted(volume));
        take(&first, &second, &base).await;
        // What the seal leaves on n2 is nobody's as long as it is not adopted.
        write(&device, 0..8, 9).await;
        second.manager.promise_snapshots(std::slice::from_ref(&snapshot)).await.expect("there is space");
        first.manager.ensure_snapshots(std::slice::from_ref(&snapshot)).await.expect("sealed");
        let new = NewFill {
            snapshot: snapshot.snapshot,
            volume,
            copy: copies["n2"],
            size: VolumeSize::try_from(SIZE).expect("a size"),
            created_ms: 5,
            base: Some(base.snapshot),
            said_in: BTreeSet::new(),
        };
        Self { site, first, second, volume, new }
    }

    /// Volumes and snapshots in the tree of n2, whoever knows them.
    async fn known(&self) -> (usize, usize) {
        let look = |store: &mut Store| (store.volumes().len(), store.snapshots().len());
        self.second.manager.engine_handle().inspect(self.new.copy, look).await.expect("it is open")
    }

    async fn promised(&self) -> u64 {
        self.second.manager.list_pools().await.iter().map(|pool| pool.promised).sum()
    }

    /// The internal volume is made, and some of it is filled.
    async fn half_filled(&self) -> Fill {
        let fill = match self.second.manager.begin_fill(self.new.clone()).await.expect("begun") {
            Begun::Fill(fill) => fill,
            Begun::There(tree) => panic!("it is in {tree}"),
        };
        assert_eq!(self.known().await, (1, 1), "what was sealed under its id is not it");
        self.second.manager.open_fill(&fill, 8 * 4096).await.expect("there is space");
        self.write(&fill, 0, 4).await.expect("written");
        assert!(self.known().await == (2, 1) && self.second.manager.volumes().await.len() == 1, "nobody sees it");
        fill
    }

    /// Takes away the copy on n2, whose tree stays for its snapshots.
    async fn take_away(&self) {
        let copy = self.new.copy;
        let remove = |volume: &mut tandem::catalog::Volume| {
            drop(volume.spec.mirror.as_mut().expect("mirrored").copies.remove(&copy));
        };
        self.site.change(self.volume, remove).await;
        eventually("the copy to go", async || self.second.manager.copies().is_empty().then_some(())).await;
        assert_eq!(self.known().await, (0, 2), "its snapshots are there");
    }

    /// One that is filled, and cannot be sealed because its id is taken.
    async fn sealed_late(&self) -> (Fill, NewSnapshot) {
        let (manager, late) = (&self.second.manager, described(self.volume));
        let begun = manager.begin_fill(NewFill { snapshot: late.snapshot, ..self.new.clone() }).await.expect("begun");
        let Begun::Fill(fill) = begun else { panic!("it is not there") };
        manager.open_fill(&fill, 8 * 4096).await.expect("there is space");
        self.write(&fill, 0, 8).await.expect("written");
        let items = std::slice::from_ref(&late);
        manager.promise_snapshots(items).await.expect("there is space");
        assert_eq!(self.first.manager.ensure_snapshots(items).await.expect("sealed")[&late.snapshot].len(), 2);
        let held = manager.hold_filled(&fill).await.expect("nobody deletes it");
        let sealed = manager.seal_filled(&fill, held, late.descriptor.clone()).await;
        assert!(matches!(sealed, Err(FillFailure::Control(_))), "{sealed:?}");
        assert!(self.record(late.snapshot).is_some(), "it comes first");
        (fill, late)
    }

    fn record(&self, snapshot: SnapshotId) -> Option<Record> {
        let tree = self.site.path("n2").join("pool/trees").join(self.new.copy.to_string());
        Record::read(&tree, &snapshot.to_string()).expect("readable")
    }

    async fn write(&self, fill: &Fill, start: u64, count: u32) -> Result<(), FillFailure> {
        let mut blocks = Blocks::new(count as usize * 4096);
        blocks.bytes_mut().fill(8);
        let range = BlockRange::new(start, count).expect("blocks");
        self.second.manager.fill(fill, Request::Write(range), blocks.freeze()).await
    }

    async fn restart(mut self) -> Self {
        self.second.kill().await;
        self.second = self.site.start("n2", self.site.catalog()).await;
        self.first.until_up_to_date(self.volume, self.new.copy).await;
        self
    }

    async fn end(self) {
        self.first.manager.detach(self.volume).await.expect("detached");
        self.first.kill().await;
        self.second.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_half_filled_leaves_nothing_and_a_deletion_waits_for_its_end() {
    let lacking = Lacking::new().await;
    let (manager, base) = (lacking.second.manager.clone(), lacking.new.base.expect("there is one"));
    let fill = lacking.half_filled().await;
    manager.give_up_fill(fill).await;
    assert_eq!((lacking.known().await, lacking.second.snapshots().await), ((1, 1), vec![base]));

    let fill = lacking.half_filled().await;
    let (deleting, snapshot) = (manager.clone(), lacking.new.snapshot);
    let deletion = tokio::spawn(async move { deleting.delete_snapshot(snapshot).await });
    let refused = eventually("the end", async || lacking.write(&fill, 4, 4).await.err()).await;
    assert!(matches!(refused, FillFailure::Deleted(_)) && !deletion.is_finished(), "{refused}");
    assert!(manager.hold_filled(&fill).await.is_err(), "it is never sealed");
    manager.give_up_fill(fill).await;
    deletion.await.expect("it ends").expect("deleted");
    assert_eq!((lacking.known().await, lacking.second.snapshots().await), ((1, 1), vec![base]));
    drop(manager);
    let before = lacking.promised().await;
    drop(lacking.half_filled().await);
    let lacking = lacking.restart().await;
    assert_eq!((lacking.known().await, lacking.second.snapshots().await), ((1, 1), vec![base]));
    eventually("the space", async || (lacking.promised().await <= before).then_some(())).await;
    lacking.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_filled_is_the_snapshot_and_stays_it_after_a_kill() {
    let lacking = Lacking::new().await;
    let (manager, new) = (lacking.second.manager.clone(), lacking.new.clone());
    let fill = lacking.half_filled().await;
    lacking.write(&fill, 4, 4).await.expect("written");
    let held = manager.hold_filled(&fill).await.expect("nobody deletes it");
    manager.seal_filled(&fill, held, "of the test".into()).await.expect("sealed");
    drop(fill);
    assert_eq!(lacking.known().await, (1, 2));
    let again = manager.begin_fill(new.clone()).await.expect("looked at");
    assert!(matches!(again, Begun::There(tree) if tree == new.copy));
    let found = manager.list_snapshots().await;
    let found = found.iter().find(|view| view.info.snapshot == new.snapshot).expect("listed");
    let is = (found.info.volume, found.info.created_ms, found.descriptor.as_str());
    assert_eq!(is, (lacking.volume, 5, "of the test"));
    drop(manager);

    let mut lacking = lacking.restart().await;
    let again = lacking.second.manager.begin_fill(new.clone()).await.expect("looked at");
    assert!(matches!(again, Begun::There(_)), "also for who has forgotten it");
    drop(again);
    let restored = single(Source::Snapshot(new.snapshot));
    lacking.site.note(restored.volume);
    lacking.second.manager.ensure_volume(restored.clone()).await.expect("restored");
    let clone = lacking.second.attach(restored.volume).await;
    assert!(has(&clone, 0..8, 8).await && has(&clone, 8..64, 7).await && has(&clone, 64..96, 0).await);
    lacking.second.manager.detach(restored.volume).await.expect("detached");
    lacking.second.manager.delete_volume(restored.volume).await.expect("deleted");
    lacking.end().await;
}

/// A copy has followed a seal without being told, and has gone since. Its tree is there for another snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_copy_has_followed_is_found_when_the_copy_is_gone() {
    let lacking = Lacking::new().await;
    let (manager, pool) = (lacking.second.manager.clone(), lacking.site.path("n2").join("pool"));
    lacking.take_away().await;
    let another = InstanceId::random();
    let add = |volume: &mut tandem::catalog::Volume| {
        drop(volume.spec.mirror.as_mut().expect("mirrored").copies.insert(another, at("n2")));
    };
    lacking.site.change(lacking.volume, add).await;
    lacking.first.until_up_to_date(lacking.volume, another).await;
    let new = NewFill { copy: another, base: None, ..lacking.new.clone() };
    let Begun::Fill(fill) = manager.begin_fill(new).await.expect("begun") else { panic!("it is not there") };
    assert_eq!(lacking.known().await, (0, 1), "what was sealed in the middle of a resync is not it");
    manager.give_up_fill(fill).await;
    manager.delete_snapshot(lacking.new.base.expect("there is one")).await.expect("deleted");
    eventually("the old tree to go", async || (lacking.second.trees(&pool) == 1).then_some(())).await;
    drop(manager);
    lacking.end().await;

    let lacking = Lacking::new().await;
    let (manager, pool) = (lacking.second.manager.clone(), lacking.site.path("n2").join("pool"));
    lacking.take_away().await;
    manager.delete_snapshot(lacking.new.base.expect("there is one")).await.expect("deleted");
    manager.delete_snapshot(lacking.new.snapshot).await.expect("deleted");
    eventually("the tree to go", async || (lacking.second.trees(&pool) == 0).then_some(())).await;
    drop(manager);
    lacking.end().await;
}

/// What lies beside a snapshot tells it from what another tree of the node has under its id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_trees_with_a_snapshot_the_one_with_its_record_is_used() {
    let mut lacking = Lacking::new().await;
    let mut others = BTreeSet::new();
    let base = lacking.new.base.expect("there is one");
    // In whichever order the trees are opened, one of these would be the last.
    for _ in 0..4 {
        let other = lacking.site.create_sole("n2", &lacking.second).await;
        let seal = Control::Seal { volume: other.id, snapshot: base, created_ms: 1 };
        lacking.second.manager.engine_handle().control(other.copies["n2"], seal).await.expect("sealed");
        others.insert(other.copies["n2"]);
    }
    let lacking = lacking.restart().await;
    let manager = lacking.second.manager.clone();
    let found = manager.list_snapshots().await.into_iter().find(|view| view.info.snapshot == base).expect("listed");
    assert_eq!((found.tree, found.descriptor.as_str()), (lacking.new.copy, "of the test"));
    manager.delete_snapshot(base).await.expect("deleted");
    for tree in others {
        let has = manager.engine_handle().inspect(tree, move |store| store.has_snapshot(base)).await.expect("open");
        assert!(!has, "wherever it is");
    }
    drop(manager);
    lacking.end().await;
}

/// A catalogue that does not list a copy among those that have a snapshot may be an old one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_was_adopted_is_never_erased_for_another() {
    let lacking = Lacking::new().await;
    let snapshot = described(lacking.volume);
    take(&lacking.first, &lacking.second, &snapshot).await;
    let new = NewFill { snapshot: snapshot.snapshot, ..lacking.new.clone() };
    for _ in 0..2 {
        let begun = lacking.second.manager.begin_fill(new.clone()).await.expect("looked at");
        assert!(matches!(begun, Begun::There(tree) if tree == new.copy), "it was acknowledged");
    }
    let lacking = lacking.restart().await;
    let begun = lacking.second.manager.begin_fill(new.clone()).await.expect("looked at");
    assert!(matches!(begun, Begun::There(tree) if tree == new.copy), "also after a start");
    lacking.end().await;
}

/// The seal of an attempt that was given up reaches the copy while the snapshot is being filled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_late_seal_leaves_is_never_taken_for_what_was_to_be_filled() {
    let lacking = Lacking::new().await;
    let (fill, late) = lacking.sealed_late().await;
    lacking.second.manager.give_up_fill(fill).await;
    assert!(lacking.record(late.snapshot).is_none(), "what is under its id is not it");
    let begun = lacking.second.manager.begin_fill(NewFill { snapshot: late.snapshot, ..lacking.new.clone() }).await;
    assert!(matches!(begun.expect("begun"), Begun::Fill(_)));

    // Killed in this moment, it finds everything at its next start.
    let (fill, late) = lacking.sealed_late().await;
    drop(fill);
    let lacking = lacking.restart().await;
    assert!(lacking.record(late.snapshot).is_none(), "what is under its id is not it");
    let begun = lacking.second.manager.begin_fill(NewFill { snapshot: late.snapshot, ..lacking.new.clone() }).await;
    assert!(matches!(begun.expect("begun"), Begun::Fill(_)));
    lacking.end().await;
}
