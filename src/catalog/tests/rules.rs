//! What holds for every catalogue.

use super::rig::{Lab, Served, anywhere, embedded, snapshot, volume};
use crate::catalog::{
    Catalog, Change, CreateError, Embedded, GroupSnapshot, Object, Seen, Snapshot, UpdateError, Volume, WATCH_BACKLOG,
};
use crate::protocol::Generation;
use crate::tls::Role;
use crate::volume::VolumeId;
use std::time::Duration;
use tokio::time::timeout;

/// When a condition is given up: a test that waits so long has failed.
const LONG: Duration = Duration::from_secs(60);

/// Runs a rule over a file, and over the network as a controller.
async fn both<F: AsyncFn(Catalog, Embedded)>(rule: F) {
    let (_directory, catalog) = embedded();
    rule(Catalog::Embedded(catalog.clone()), catalog).await;
    let (_directory, catalog) = embedded();
    let lab = Lab::new();
    let served = Served::start(&lab, catalog.clone(), anywhere()).await;
    let client = lab.client(served.address, Role::Controller, "controller-2");
    rule(client, catalog).await;
    served.stop().await;
}

#[tokio::test]
async fn a_name_is_unique_in_its_kind_and_free_after_deletion() {
    both(async |catalog, _| {
        let first = catalog.create(volume("Größe / ../ 名前")).await.expect("created");
        let refused = catalog.create(volume("Größe / ../ 名前")).await.expect_err("the name is taken");
        assert!(matches!(refused, CreateError::Exists { kind: "volume", key } if key == first.object.key()));
        let refused = catalog.create(first.object.clone()).await.expect_err("the key is taken");
        assert!(matches!(refused, CreateError::Exists { .. }));
        assert_eq!(catalog.find("Größe / ../ 名前").await.expect("reads").as_ref(), Some(&first));
        catalog.delete(&first).await.expect("deleted");
        catalog.delete(&first).await.expect("deleted already");
        assert_eq!(catalog.find::<Volume>("Größe / ../ 名前").await.expect("reads"), None);
        let second = catalog.create(volume("Größe / ../ 名前")).await.expect("the name is free");
        assert!(second.version > first.version);
        assert_eq!(catalog.list::<Volume>().await.expect("lists"), [second]);
    })
    .await;
}

#[tokio::test]
async fn of_two_updates_of_one_version_one_is_refused() {
    both(async |catalog, _| {
        let read = catalog.create(volume("data")).await.expect("created");
        let mut mine = read.clone();
        mine.object.spec.verify_reads = true;
        let written = catalog.update(mine).await.expect("first");
        assert!(matches!(catalog.update(read.clone()).await, Err(UpdateError::Conflict { .. })));
        assert!(matches!(catalog.delete(&read).await, Err(UpdateError::Conflict { .. })));
        assert_eq!(catalog.get::<Volume>(&read.object.key()).await.expect("reads"), Some(written.clone()));
        catalog.delete(&written).await.expect("deleted");
        assert!(matches!(catalog.update(written).await, Err(UpdateError::Conflict { .. })));
    })
    .await;
}

/// Many compare-and-swaps at once: each is counted exactly once.
#[tokio::test]
async fn no_update_is_lost() {
    both(async |catalog, _| {
        let created = catalog.create(volume("counter")).await.expect("created");
        let key = created.object.key();
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (catalog, key) = (catalog.clone(), key.clone());
            workers.spawn(async move {
                let mut done = 0;
                while done < 5 {
                    let mut read = catalog.get::<Volume>(&key).await.expect("reads").expect("is there");
                    let grown = read.object.spec.size.bytes() + (1 << 20);
                    read.object.spec.size = grown.try_into().expect("a size");
                    match catalog.update(read).await {
                        Ok(_) => done += 1,
                        Err(UpdateError::Conflict { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        while let Some(ended) = workers.join_next().await {
            ended.expect("a worker");
        }
        let size = catalog.get::<Volume>(&key).await.expect("reads").expect("is there").object.spec.size;
        assert_eq!(size.bytes(), created.object.spec.size.bytes() + 20 * (1 << 20));
    })
    .await;
}

#[tokio::test]
async fn objects_without_a_name_need_none() {
    both(async |catalog, _| {
        let id = VolumeId::random();
        for _ in 0..3 {
            catalog.create(snapshot(id)).await.expect("created");
        }
        let listed = catalog.list::<Snapshot>().await.expect("lists");
        let keys: Vec<_> = listed.iter().map(|stored| stored.object.key()).collect();
        assert!(keys.len() == 3 && keys.is_sorted());
        assert!(catalog.list::<GroupSnapshot>().await.expect("lists").is_empty());
        assert!(catalog.get::<Volume>(&keys[0]).await.expect("reads").is_none());
        assert_eq!(catalog.generation().await.expect("reads"), Generation(0));
    })
    .await;
}

#[tokio::test]
async fn a_name_that_is_given_up_is_free() {
    both(async |catalog, _| {
        let named = || Snapshot { name: Some("monday".into()), ..snapshot(VolumeId::random()) };
        let mut first = catalog.create(named()).await.expect("created");
        assert!(matches!(catalog.create(named()).await, Err(CreateError::Exists { .. })));
        first.object.name = None;
        let first = catalog.update(first).await.expect("given up");
        assert!(catalog.find::<Snapshot>("monday").await.expect("reads").is_none());
        let second = catalog.create(named()).await.expect("free");
        catalog.delete(&first).await.expect("deleted");
        assert_eq!(catalog.find::<Snapshot>("monday").await.expect("reads"), Some(second));
    })
    .await;
}

#[tokio::test]
async fn watchers_hear_of_changes_and_learn_that_they_lag() {
    both(async |catalog, file| {
        let mut watch = catalog.watch();
        if let Catalog::Remote(_) = &catalog {
            assert_eq!(next(&mut watch).await, Seen::FellBehind, "what happened before it was there is not known");
        }
        let stored = catalog.create(volume("data")).await.expect("created");
        let heard = Seen::Changed(Change { kind: "volume", key: stored.object.key() });
        assert_eq!(next(&mut watch).await, heard);
        catalog.delete(&stored).await.expect("deleted");
        assert_eq!(next(&mut watch).await, heard);
        // More than all that the way there can hold. Nobody reads meanwhile.
        for number in 0..WATCH_BACKLOG * 8 {
            file.announce::<Volume>(format!("{number:01000}"));
            tokio::task::yield_now().await;
        }
        while next(&mut watch).await != Seen::FellBehind {}
        // What is read after that is newer than what was left out.
        catalog.create(volume("data")).await.expect("created");
        assert_eq!(catalog.list::<Volume>().await.expect("lists").len(), 1);
    })
    .await;
}

async fn next(watch: &mut crate::catalog::Watch) -> Seen {
    timeout(LONG, watch.next()).await.expect("an event").expect("the catalogue is open")
}
