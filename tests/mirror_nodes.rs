//! Mirrored volumes made from objects in the catalogue alone: two nodes in one process, devices, real disks. Needs root.

#[path = "mirror_nodes/clients.rs"]
mod clients;
#[path = "mirror_nodes/deleted.rs"]
mod deleted;
#[path = "mirror_nodes/disks.rs"]
mod disks;
#[path = "mirror_nodes/left.rs"]
mod left;
#[path = "mirror_nodes/site.rs"]
mod site;
#[allow(dead_code, reason = "the disks here hang and do nothing else")]
#[path = "support/small_pool.rs"]
mod small_pool;
#[path = "mirror_nodes/snapshots.rs"]
mod snapshots;

use site::{SIZE, Site, at, eventually, has, size, write};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tandem::catalog::{Catalog, MirrorSpec, Remote, Stored, Volume, VolumeConfiguration, serve};
use tandem::protocol::{Configuration, Generation, Lacks};
use tandem::replica::manager::AttachFailure;
use tandem::tls::{Authority, Credentials, Leaf, Role, Validity};
use tandem::volume::InstanceId;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_moves_from_a_node_that_dies_and_back() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1", "n2"]).await;
    let (one, two) = (volume.copies["n1"], volume.copies["n2"]);
    eventually("both copies", async || (site.volume(volume.id).await.object.status.copies.len() == 2).then_some(()))
        .await;
    let refused = first.manager.attach(volume.id).await.expect_err("nobody wishes it here");
    assert!(matches!(refused, AttachFailure::NotWished(_) | AttachFailure::NotOpen(_)), "{refused}");

    site.wish(volume.id, Some(one)).await;
    let device = first.attach(volume.id).await;
    write(&device, 0..64, 7).await;
    assert!(has(&device, 0..64, 7).await);
    first.until_up_to_date(volume.id, two).await;
    let refused = second.manager.attach(volume.id).await.expect_err("it is wished elsewhere");
    assert!(matches!(refused, AttachFailure::NotWished(_)), "{refused}");
    assert!(first.manager.delete_volume(volume.id).await.is_err(), "only the catalogue says that a copy goes");

    // It dies as primary. Its device is gone before: both nodes are on one machine, which has one device for a volume.
    first.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    site.wish(volume.id, Some(two)).await;
    let device = second.attach(volume.id).await;
    assert!(has(&device, 0..64, 7).await, "what was acknowledged is there");
    write(&device, 32..96, 9).await;
    let alone = second.seen(volume.id).await;
    assert_eq!(alone.problems, ["CopyNotUpToDate"], "one copy is not what was asked for");
    let mirror = alone.mirror.expect("one of several");
    assert!(mirror.role == "primary" && mirror.serves);
    let peer = &mirror.peers[0];
    assert!(peer.name == "n1" && !peer.connected && peer.out_of_sync_bytes > 0, "{peer:?}");

    // It finds its copy, and is brought up to date.
    let first = site.start("n1", site.catalog()).await;
    second.until_up_to_date(volume.id, one).await;
    // A member that was just admitted grants its lease a heartbeat later.
    let both =
        eventually("health", async || Some(second.seen(volume.id).await).filter(|v| v.problems.is_empty())).await;
    let peer = &both.mirror.as_ref().expect("one of several").peers[0];
    assert!(peer.connected && peer.out_of_sync_bytes == 0, "{peer:?}");
    eventually("what the other one says", async || {
        (first.seen(volume.id).await.mirror?.role == "secondary").then_some(())
    })
    .await;
    let copied = second.status(volume.id).await.expect("it serves").copied_bytes;
    assert!((64 * 4096..=8 << 20).contains(&copied), "two extents at most may differ, and {copied} bytes were copied");
    assert!(has(&device, 0..32, 7).await && has(&device, 32..96, 9).await);

    second.manager.detach(volume.id).await.expect("detached");
    site.wish(volume.id, Some(one)).await;
    let device = first.attach(volume.id).await;
    assert!(has(&device, 0..32, 7).await && has(&device, 32..96, 9).await, "also what was written in between");

    first.manager.detach(volume.id).await.expect("detached");
    site.change(volume.id, |volume| volume.spec.deleted = true).await;
    eventually("no copy", async || site.volume(volume.id).await.object.status.copies.is_empty().then_some(())).await;
    for (node, up) in [("n1", &first), ("n2", &second)] {
        let pool = site.path(node).join("pool");
        eventually("no tree", async || (up.trees(&pool) == 0).then_some(())).await;
        assert!(up.manager.copies().is_empty());
    }
    first.kill().await;
    second.kill().await;
}

/// Data is deleted because the catalogue says so; one that was restored from a backup says what was true once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_catalogue_takes_no_copy_away() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1", "n2"]).await;
    let (one, two) = (volume.copies["n1"], volume.copies["n2"]);
    site.wish(volume.id, Some(one)).await;
    let device = first.attach(volume.id).await;
    write(&device, 0..8, 7).await;
    first.until_up_to_date(volume.id, two).await;
    // As it was before there was a second copy.
    let stored = site.file.get::<VolumeConfiguration>(&volume.id.to_string()).await.expect("reads").expect("is there");
    let old = Configuration::first(Generation(0), one, BTreeSet::new());
    let object = VolumeConfiguration::new(volume.id, &old);
    site.file.update(Stored { object, ..stored }).await.expect("restored");
    site.change(volume.id, |volume| drop(volume.spec.mirror.as_mut().expect("mirrored").copies.remove(&two))).await;
    until_all_is_seen(&mut site).await;
    assert!(second.manager.copy_here(volume.id).is_some(), "it is a member of what is newer");
    write(&device, 8..16, 9).await;
    let status = first.status(volume.id).await.expect("it serves");
    assert!(status.serves && status.copies[&two].connected, "{status:?}");
    // It was being made then, so the controller takes it for one that nobody knows.
    site.change(volume.id, |volume| volume.spec.deleted = true).await;
    until_all_is_seen(&mut site).await;
    assert!(second.manager.copy_here(volume.id).is_some(), "it is newer than what deletes it");
    first.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    second.kill().await;
}

/// What is said later is done later, so what was said before was looked at; twice, because what is done together has no order.
async fn until_all_is_seen(site: &mut Site) {
    for _ in 0..2 {
        let later = site.create(&["n1", "n2"]).await;
        eventually("a later volume", async || {
            (site.volume(later.id).await.object.status.copies.len() == 2).then_some(())
        })
        .await;
    }
}

/// A node whose catalogue is out of reach when it starts opens its copies from what is beside them, answers its primary, and
/// is brought up to date by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_starts_without_a_catalogue_answers_its_primary() {
    let mut site = Site::new(&["n1", "n2"]);
    let certificates = site.path("certificates");
    let authority = Authority::create(&certificates.join("ca"), "lab".parse().expect("a name"), Validity::days(1));
    let authority = authority.expect("made");
    let credentials = |role: Role, name: &str| {
        let leaf = Leaf { role, name: name.parse().expect("a name"), addresses: Vec::new() };
        let out = certificates.join(name);
        authority.issue(&leaf, Validity::days(1)).expect("issued").write(&out).expect("written");
        Arc::new(Credentials::open(&out).expect("good certificates"))
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (stop, stopped) = oneshot::channel::<()>();
    let served = serve(site.file.clone(), listener, credentials(Role::Controller, "controller"), async {
        drop(stopped.await);
    });
    let served = tokio::spawn(served);
    let (mine, theirs) = (credentials(Role::Node, "n1"), credentials(Role::Node, "n2"));
    let remote =
        |address: &str, credentials: &Arc<Credentials>| Catalog::Remote(Remote::new(address, credentials.clone()));
    let first = site.start("n1", remote(&address, &mine)).await;
    let second = site.start("n2", remote(&address, &theirs)).await;
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1", "n2"]).await;
    let (one, two) = (volume.copies["n1"], volume.copies["n2"]);
    site.wish(volume.id, Some(one)).await;
    eventually("both copies", async || (site.volume(volume.id).await.object.status.copies.len() == 2).then_some(()))
        .await;
    let device = first.attach(volume.id).await;
    write(&device, 0..16, 1).await;
    first.until_up_to_date(volume.id, two).await;

    second.kill().await;
    let late = tokio::spawn({
        let device = device.clone();
        async move { write(&device, 16..32, 2).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!late.is_finished(), "a write is on every member, or it is not acknowledged");
    tokio::time::timeout(site::LONG, late).await.expect("acknowledged without the other one").expect("written");
    assert!(!site.configuration(volume.id).await.is_member(two), "the configuration without it came first");
    // Nobody answers there.
    let second = site.start("n2", remote("127.0.0.1:9", &theirs)).await;
    let refused = second.manager.attach(volume.id).await.expect_err("nobody knows who shall use it");
    assert!(matches!(refused, AttachFailure::NoCatalogue { .. }), "{refused}");
    first.until_up_to_date(volume.id, two).await;
    write(&device, 32..48, 3).await;

    // Now nobody reaches it. What needs no other configuration goes on.
    drop(stop);
    served.await.expect("ends").expect("served");
    write(&device, 48..64, 4).await;
    for (blocks, content) in [(0..16, 1), (16..32, 2), (32..48, 3), (48..64, 4)] {
        assert!(has(&device, blocks, content).await, "{content}");
    }
    first.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    second.kill().await;
}

/// The spec names another copy: it is filled, the old one leaves, and its node gives the space back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_moves_to_another_node() {
    let mut site = Site::new(&["n1", "n2", "n3"]);
    let first = site.start("n1", site.catalog()).await;
    let (second, third) = (site.start("n2", site.catalog()).await, site.start("n3", site.catalog()).await);
    for node in ["n1", "n2", "n3"] {
        site.announce(node).await;
    }
    let volume = site.create(&["n1", "n2"]).await;
    let (one, two, three) = (volume.copies["n1"], volume.copies["n2"], InstanceId::random());
    site.wish(volume.id, Some(one)).await;
    let device = first.attach(volume.id).await;
    write(&device, 0..64, 7).await;
    first.until_up_to_date(volume.id, two).await;

    let with =
        |volume: &mut Volume, change: &dyn Fn(&mut MirrorSpec)| change(volume.spec.mirror.as_mut().expect("mirrored"));
    site.change(volume.id, |v| with(v, &|mirror| _ = mirror.copies.insert(three, at("n3")))).await;
    first.until_up_to_date(volume.id, three).await;
    site.change(volume.id, |v| with(v, &|mirror| _ = mirror.copies.remove(&two))).await;
    let pool = site.path("n2").join("pool");
    eventually("the old copy to go", async || (second.trees(&pool) == 0).then_some(())).await;
    let confirmed = site.volume(volume.id).await.object.status.copies;
    assert_eq!(confirmed, BTreeSet::from([one, three]));
    assert!(!site.configuration(volume.id).await.copies().any(|copy| copy == two));

    write(&device, 64..96, 8).await;
    first.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    site.wish(volume.id, Some(three)).await;
    let device = third.attach(volume.id).await;
    assert!(has(&device, 0..64, 7).await && has(&device, 64..96, 8).await);
    third.manager.detach(volume.id).await.expect("detached");
    second.kill().await;
    third.kill().await;
}

/// A disk that was lost is not replaced by an empty copy of the same name, and a catalogue that does not know a volume is no
/// reason to delete its copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_copy_is_not_made_again_and_an_unknown_one_is_kept() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1", "n2"]).await;
    let (one, two) = (volume.copies["n1"], volume.copies["n2"]);
    eventually("both copies", async || (site.volume(volume.id).await.object.status.copies.len() == 2).then_some(()))
        .await;
    second.kill().await;
    let pool = site.path("n2").join("pool");
    std::fs::remove_dir_all(pool.join("trees").join(two.to_string())).expect("the disk is lost");
    let second = site.start("n2", site.catalog()).await;
    // Its other work is done, so it has looked at this volume, too.
    let other = site.create(&["n2"]).await;
    eventually("the other volume", async || {
        (!site.volume(other.id).await.object.status.copies.is_empty()).then_some(())
    })
    .await;
    site.change(volume.id, |volume| volume.spec.verify_reads = true).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(second.manager.copy_here(volume.id).is_none());
    assert_eq!(second.trees(&pool), 1, "only the other volume's");
    assert_eq!(site.volume(volume.id).await.object.status.copies, BTreeSet::from([one, two]), "somebody has to see it");

    let stored = site.volume(volume.id).await;
    site.file.delete(&stored).await.expect("deleted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(first.manager.copy_here(volume.id).expect("kept").tree, one);
    first.kill().await;
    let first = site.start("n1", site.catalog()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(first.manager.copy_here(volume.id).expect("kept").tree, one);
    first.kill().await;
    second.kill().await;
}

/// Bytes of a device.
fn bytes(device: &Path) -> u64 {
    let name = device.file_name().expect("a name");
    let sectors = std::fs::read_to_string(Path::new("/sys/class/block").join(name).join("size")).expect("readable");
    sectors.trim().parse::<u64>().expect("a number") * 512
}

/// Each node grows its copy when it reads that it shall; the device follows when the catalogue says that all have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_grows_on_all_nodes_before_its_device_does() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1", "n2"]).await;
    let (one, two) = (volume.copies["n1"], volume.copies["n2"]);
    site.wish(volume.id, Some(one)).await;
    let device = first.attach(volume.id).await;
    first.until_up_to_date(volume.id, two).await;
    write(&device, 0..16, 1).await;

    // Nobody's pool has so much: both say so, and what they have stays as it is.
    let huge = size(4 << 40);
    site.change(volume.id, |volume| volume.spec.size = huge).await;
    eventually("two refusals", async || {
        let reports = site.volume(volume.id).await.object.status.reports;
        (reports.len() == 2 && reports.values().all(|report| report.refused.is_some())).then_some(())
    })
    .await;
    let larger = size(2 * SIZE);
    site.change(volume.id, |volume| (volume.spec.size, volume.spec.verify_reads) = (larger, true)).await;
    let wanted = tandem::catalog::CopyReport { size: larger, verify_reads: true, refused: None };
    eventually("both copies to be larger", async || {
        let reports = site.volume(volume.id).await.object.status.reports;
        (reports.len() == 2 && reports.values().all(|report| *report == wanted)).then_some(())
    })
    .await;
    assert_eq!(bytes(&device), SIZE, "nobody has said that all are");
    assert_eq!(first.manager.volume(volume.id).await.expect("there").size, SIZE);
    site.change(volume.id, |volume| volume.status.size = larger).await;
    eventually("the device to grow", async || (bytes(&device) == 2 * SIZE).then_some(())).await;
    let blocks = SIZE / 4096;
    write(&device, blocks..blocks + 32, 2).await;
    assert!(site.configuration(volume.id).await.is_member(two), "the other copy has taken it");

    first.manager.detach(volume.id).await.expect("detached");
    site.wish(volume.id, Some(two)).await;
    let device = second.attach(volume.id).await;
    assert_eq!(bytes(&device), 2 * SIZE);
    assert!(has(&device, 0..16, 1).await && has(&device, blocks..blocks + 32, 2).await);
    second.manager.detach(volume.id).await.expect("detached");

    // A backup of the catalogue from before it grew: the configuration is the same.
    second.kill().await;
    site.change(volume.id, |volume| (volume.spec.size, volume.status.size) = (size(SIZE), size(SIZE))).await;
    let second = site.start("n2", site.catalog()).await;
    let device = second.attach(volume.id).await;
    assert!(has(&device, blocks..blocks + 32, 2).await, "what was acknowledged has not gone");
    until_all_is_seen(&mut site).await;
    assert_eq!(bytes(&device), 2 * SIZE);
    second.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    second.kill().await;
}

/// A copy that is larger than the volume, because another one could not grow, is made equal to a new one of the volume's size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_larger_than_its_volume_fills_a_new_one() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create(&["n1"]).await;
    let (one, two) = (volume.copies["n1"], InstanceId::random());
    site.wish(volume.id, Some(one)).await;
    site.change(volume.id, |volume| volume.spec.size = size(2 * SIZE)).await;
    eventually("a larger copy", async || {
        let reports = site.volume(volume.id).await.object.status.reports;
        reports.values().all(|report| report.size == size(2 * SIZE)).then_some(()).filter(|()| reports.len() == 1)
    })
    .await;
    site.change(volume.id, |volume| volume.spec.size = size(SIZE)).await;
    let device = first.attach(volume.id).await;
    assert_eq!(bytes(&device), SIZE, "it was never the volume's size");
    write(&device, 0..64, 5).await;
    let add = |volume: &mut Volume| _ = volume.spec.mirror.as_mut().expect("mirrored").copies.insert(two, at("n2"));
    site.change(volume.id, add).await;
    first.until_up_to_date(volume.id, two).await;
    let report = site.volume(volume.id).await.object.status.reports[&two].clone();
    assert_eq!(report.size, size(SIZE));
    first.manager.detach(volume.id).await.expect("detached");
    site.wish(volume.id, Some(two)).await;
    let device = second.attach(volume.id).await;
    assert!(bytes(&device) == SIZE && has(&device, 0..64, 5).await);
    second.manager.detach(volume.id).await.expect("detached");
    first.kill().await;
    second.kill().await;
}

/// A volume with one copy, in use, gets another one, gives it up, gets it again, and can then be used there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_in_use_becomes_mirrored_and_ceases_to_be() {
    let mut site = Site::new(&["n1", "n2"]);
    let (first, second) = (site.start("n1", site.catalog()).await, site.start("n2", site.catalog()).await);
    site.announce("n1").await;
    site.announce("n2").await;
    let volume = site.create_sole("n1", &first).await;
    let (id, one) = (volume.id, volume.copies["n1"]);
    let device = first.attach(id).await;
    write(&device, 0..64, 1).await;
    let mut round = 1;
    for two in [InstanceId::random(), InstanceId::random()] {
        // As the controller does it: what is wanted, then the first configuration if there is none.
        let mirrored = |volume: &mut Volume| {
            let mut mirror = MirrorSpec::new([(one, at("n1")), (two, at("n2"))].into());
            mirror.primary = Some(one);
            (volume.spec.mirror, volume.spec.node) = (Some(mirror), None);
            volume.status.copies.insert(one);
        };
        site.change(id, mirrored).await;
        if round == 1 {
            let mut start = Configuration::first(Generation(0), one, BTreeSet::new());
            start.candidates.insert(two, Lacks::Everything);
            site.file.create(VolumeConfiguration::new(id, &start)).await.expect("created");
        }
        round += 1;
        write(&device, 32..96, round).await;
        first.until_up_to_date(id, two).await;
        // A member that was just admitted grants its lease a heartbeat later.
        eventually("health", async || first.seen(id).await.problems.is_empty().then_some(())).await;
        round += 1;
        write(&device, 64..128, round).await;
        if round == 3 {
            let sole = |volume: &mut Volume| _ = volume.spec.mirror.as_mut().expect("mirrored").copies.remove(&two);
            site.change(id, sole).await;
            let pool = site.path("n2").join("pool");
            eventually("the other copy to go", async || (second.trees(&pool) == 0).then_some(())).await;
            assert_eq!(site.configuration(id).await.members().collect::<Vec<_>>(), [one]);
            write(&device, 128..160, 9).await;
        }
        if round == 5 {
            first.manager.detach(id).await.expect("detached");
            site.wish(id, Some(two)).await;
            let device = second.attach(id).await;
            for (blocks, content) in [(0..32, 1), (32..64, 4), (64..128, 5), (128..160, 9)] {
                assert!(has(&device, blocks, content).await, "{content}");
            }
            second.manager.detach(id).await.expect("detached");
        }
    }
    site.change(id, |volume| volume.spec.deleted = true).await;
    eventually("no copy", async || site.volume(id).await.object.status.copies.is_empty().then_some(())).await;
    for (node, up) in [("n1", &first), ("n2", &second)] {
        let pool = site.path(node).join("pool");
        eventually("no tree", async || (up.trees(&pool) == 0).then_some(())).await;
    }
    first.kill().await;
    second.kill().await;
}

/// A volume that shall become mirrored and is deleted before its node has heard of it leaves nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_deleted_while_it_becomes_mirrored_leaves_nothing() {
    let mut site = Site::new(&["n1"]);
    let first = site.start("n1", site.catalog()).await;
    site.announce("n1").await;
    let volume = site.create_sole("n1", &first).await;
    let one = volume.copies["n1"];
    site.change(volume.id, |volume| {
        volume.spec.mirror = Some(MirrorSpec::new([(one, at("n1"))].into()));
        volume.status.copies.insert(one);
        volume.spec.deleted = true;
    })
    .await;
    eventually("no copy", async || site.volume(volume.id).await.object.status.copies.is_empty().then_some(())).await;
    let pool = site.path("n1").join("pool");
    eventually("no tree", async || (first.trees(&pool) == 0).then_some(())).await;
    first.kill().await;
}
