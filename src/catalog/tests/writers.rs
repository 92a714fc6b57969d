//! Who may write what over the network.

use super::rig::{Lab, Served, anywhere, embedded, mirrored, snapshot, volume};
use crate::catalog::{
    Catalog, CatalogError, CopyReport, CreateError, Node, NodeName, Snapshot, UpdateError, Volume, VolumeConfiguration,
};
use crate::protocol::{Configuration, Generation};
use crate::tls::Role;
use crate::volume::{InstanceId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

fn refused_create<T: std::fmt::Debug>(result: Result<T, CreateError>) -> bool {
    matches!(result, Err(CreateError::Failed(CatalogError::Refused { .. })))
}

fn refused<T: std::fmt::Debug>(result: Result<T, UpdateError>) -> bool {
    matches!(result, Err(UpdateError::Failed(CatalogError::Refused { .. })))
}

struct Site {
    _directory: tempfile::TempDir,
    _served: Served,
    controller: Catalog,
    node: Catalog,
}

/// A served catalogue, a controller, and the node n1.
async fn site() -> Site {
    let (directory, catalog) = embedded();
    let lab = Lab::new();
    let served = Served::start(&lab, catalog, anywhere()).await;
    let controller = lab.client(served.address, Role::Controller, "controller");
    let node = lab.client(served.address, Role::Node, "n1");
    Site { _directory: directory, _served: served, controller, node }
}

fn node(name: &str) -> Node {
    let address = ([127, 0, 0, 1], 1).into();
    Node::new(NodeName(name.into()), address, address, true)
}

#[tokio::test]
async fn a_node_writes_its_own_object_only() {
    let site = site().await;
    let mut mine = site.node.create(node("n1")).await.expect("its own");
    mine.object.mirror = ([127, 0, 0, 1], 2).into();
    let mine = site.node.update(mine).await.expect("its own");
    assert!(refused(site.node.delete(&mine).await), "only an operator removes a node");
    assert!(refused_create(site.node.create(node("n2")).await));
    let other = site.controller.create(node("n2")).await.expect("a controller may");
    assert!(refused(site.node.update(other).await));
    assert_eq!(site.node.list::<Node>().await.expect("everybody reads").len(), 2);
    site.controller.delete(&mine).await.expect("a controller may");
}

#[tokio::test]
async fn a_node_says_which_of_its_copies_are_there_and_nothing_else() {
    let site = site().await;
    let (here, there, gone) = (InstanceId::random(), InstanceId::random(), InstanceId::random());
    let mut wanted = mirrored("data", &[(here, "n1"), (there, "n2")]);
    wanted.status.copies = BTreeSet::from([there, gone]);
    let size = wanted.spec.size;
    let other = || CopyReport { size, verify_reads: true, refused: None };
    let report = || CopyReport { size, verify_reads: false, refused: None };
    wanted.status.reports = BTreeMap::from([(there, report()), (gone, report())]);
    let read = site.controller.create(wanted).await.expect("a controller may");
    let with = |change: &dyn Fn(&mut Volume)| {
        let mut stored = read.clone();
        change(&mut stored.object);
        site.node.update(stored)
    };
    assert!(refused(with(&|v| v.spec.deleted = true).await));
    assert!(refused(with(&|v| v.spec.mirror = None).await));
    assert!(refused(with(&|v| v.status.phase = crate::catalog::VolumePhase::Ready).await));
    assert!(refused(with(&|v| _ = v.status.copies.remove(&there)).await), "another node's");
    assert!(refused(with(&|v| _ = v.status.copies.insert(InstanceId::random())).await), "nobody wants it");
    assert!(refused(with(&|v| _ = v.status.reports.insert(there, other())).await), "another node's");
    assert!(refused(with(&|v| _ = v.status.reports.insert(gone, other())).await), "nobody wants it");
    assert!(refused(with(&|v| _ = v.status.reports.remove(&there)).await), "another node's");
    assert!(refused(with(&|v| v.request.name = "other".into()).await));
    assert!(refused(site.node.delete(&read).await));
    let mut mine = read;
    mine.object.status.copies = BTreeSet::from([there, here]);
    mine.object.status.reports = BTreeMap::from([(there, report()), (here, report())]);
    site.node.update(mine).await.expect("its own copy is there, and one that nobody wants is not");
    assert!(refused_create(site.node.create(volume("other")).await));
    assert!(refused_create(site.node.create(snapshot(VolumeId::random())).await));
    assert_eq!(site.node.list::<Snapshot>().await.expect("everybody reads"), []);
}

#[tokio::test]
async fn a_node_writes_the_configuration_that_follows() {
    let site = site().await;
    let (volume, copy) = (VolumeId::random(), InstanceId::random());
    let first = Configuration::first(Generation(0), copy, BTreeSet::new());
    assert!(refused_create(site.node.create(VolumeConfiguration::new(volume, &first)).await));
    let stored = site.controller.create(VolumeConfiguration::new(volume, &first)).await.expect("a controller may");
    let with = |generation, version| {
        let mut next = first.clone();
        (next.stamp.generation.0, next.stamp.version.0) = (generation, version);
        let mut stored = stored.clone();
        stored.object = VolumeConfiguration::new(volume, &next);
        site.node.update(stored)
    };
    for (generation, version) in [(0, 1), (0, 3), (1, 1), (1, 2)] {
        assert!(refused(with(generation, version).await), "{generation} {version}");
    }
    assert!(refused(site.node.delete(&stored).await));
    with(0, 2).await.expect("the one that follows");
}
