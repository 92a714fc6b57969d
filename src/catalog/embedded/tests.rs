use super::*;
use crate::catalog::{GroupSnapshot, Node, Replication, Seen, Snapshot, Volume, VolumeRequest};
use crate::volume::{VolumeId, VolumeSize};
use std::collections::BTreeSet;
use std::task::Poll;
use std::time::Duration;

fn volume(name: &str) -> Volume {
    let request = VolumeRequest {
        name: name.to_owned(),
        size: VolumeSize::try_from(1 << 30).expect("a size"),
        pool: "default".to_owned(),
        fs_type: None,
        verify_reads: false,
        access: BTreeSet::new(),
        source: None,
        replication: Replication::None,
        rebuild_after: Default::default(),
        reach: Default::default(),
    };
    Volume::wanted(VolumeId::random(), request)
}

fn fresh() -> (tempfile::TempDir, Embedded) {
    let directory = tempfile::Builder::new().prefix("tandem-catalog").tempdir().expect("a directory");
    let catalog = Embedded::open(&directory.path().join("catalog.redb")).expect("a new catalogue");
    (directory, catalog)
}

#[tokio::test]
async fn what_was_created_is_there_after_opening_again() {
    let (directory, catalog) = fresh();
    let stored = catalog.create(volume("Größe / ../ 名前")).await.expect("created");
    drop(catalog);
    let catalog = Embedded::open(&directory.path().join("catalog.redb")).expect("opens");
    let key = stored.object.key();
    assert_eq!(catalog.get::<Volume>(&key).await.expect("reads").as_ref(), Some(&stored));
    assert_eq!(catalog.find::<Volume>("Größe / ../ 名前").await.expect("reads"), Some(stored));
    assert!(catalog.get::<Snapshot>(&key).await.expect("reads").is_none());
    assert!(!directory.path().join("catalog.redb.new").exists());
}

#[tokio::test]
async fn a_second_server_is_told_that_the_catalogue_is_in_use() {
    let (directory, _catalog) = fresh();
    let refused = Embedded::open(&directory.path().join("catalog.redb")).err().expect("refused");
    assert!(matches!(refused, OpenError::InUse { .. }), "{refused}");
}

#[test]
fn an_empty_or_foreign_file_is_damage_and_no_new_catalogue() {
    let directory = tempfile::Builder::new().prefix("tandem-catalog").tempdir().expect("a directory");
    let path = directory.path().join("catalog.redb");
    for content in [&b""[..], b"not a catalogue", &[0; 8192]] {
        std::fs::write(&path, content).expect("writes");
        let refused = Embedded::open(&path).err().expect("refused").to_string();
        assert!(refused.contains("is damaged") && refused.contains("catalog.redb"), "{refused}");
        assert_eq!(std::fs::read(&path).expect("reads"), content, "the evidence is untouched");
    }
}

#[tokio::test]
async fn a_later_format_is_named() {
    let (directory, catalog) = fresh();
    let transaction = catalog.0.database.begin_write().expect("a transaction");
    transaction.open_table(META).expect("a table").insert(FORMAT_KEY, 7).expect("writes");
    transaction.commit().expect("commits");
    drop(catalog);
    let refused = Embedded::open(&directory.path().join("catalog.redb")).err().expect("refused").to_string();
    assert!(refused.contains("has format 7, this version of tandem knows 2"), "{refused}");
}

/// One flipped bit anywhere: either it is reported with the file's name, or it is in a place that holds nothing.
#[tokio::test]
async fn a_flipped_bit_is_reported_or_harmless() {
    let (directory, catalog) = fresh();
    let path = directory.path().join("catalog.redb");
    for number in 0..40 {
        catalog.create(volume(&format!("volume {number}"))).await.expect("created");
    }
    let expected = catalog.list::<Volume>().await.expect("lists");
    drop(catalog);
    let sound = std::fs::read(&path).expect("reads");
    let mut reported = 0;
    let places = (0..sound.len()).step_by(6007).chain(0..512).chain(4096..4200);
    for (turn, place) in places.enumerate() {
        let mut flipped = sound.clone();
        flipped[place] ^= 1 << (turn % 8);
        std::fs::write(&path, &flipped).expect("writes");
        match Embedded::open(&path) {
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("catalog.redb"), "byte {place}: {text}");
                reported += 1;
            }
            Ok(catalog) => match catalog.list::<Volume>().await {
                Ok(listed) => assert_eq!(listed, expected, "byte {place} changed what is read"),
                Err(error) => assert!(error.to_string().contains("catalog.redb"), "byte {place}: {error}"),
            },
        }
    }
    assert!(reported > 10, "only {reported} flips were reported");
}

/// A catalogue as the first version wrote it: no tables for nodes and configurations, volumes without copies.
#[tokio::test]
async fn a_catalogue_of_format_1_is_read_and_raised() {
    let directory = tempfile::Builder::new().prefix("tandem-catalog").tempdir().expect("a directory");
    let path = directory.path().join("catalog.redb");
    let text = std::fs::read_to_string("tests/golden/catalogue-volume-v1.json").expect("the golden file");
    let id = "6f1c2c4e-3f0e-4c1f-9a55-0d9f6a1b2c3d";
    {
        let database = Database::create(&path).expect("a database");
        let transaction = database.begin_write().expect("a transaction");
        let mut meta = transaction.open_table(META).expect("a table");
        meta.insert(FORMAT_KEY, 1).expect("writes");
        meta.insert(VERSION_KEY, 7).expect("writes");
        drop(meta);
        let mut value = vec![0; 4];
        value.extend(7_u64.to_le_bytes());
        value.extend(text.trim_end().as_bytes());
        let crc = checksum(id, &value[4..]);
        value[..4].copy_from_slice(&crc.to_le_bytes());
        transaction.open_table(table::<Volume>()).expect("a table").insert(id, value.as_slice()).expect("writes");
        transaction.open_table(NAMES).expect("a table").insert("volume/pvc-1", id).expect("writes");
        transaction.open_table(table::<Snapshot>()).expect("a table");
        transaction.open_table(table::<GroupSnapshot>()).expect("a table");
        transaction.commit().expect("commits");
    }
    for _ in 0..2 {
        let catalog = Embedded::open(&path).expect("opens");
        let volume = catalog.find::<Volume>("pvc-1").await.expect("reads").expect("is there").object;
        assert_eq!((volume.request.replication, &volume.spec.mirror), (Replication::None, &None));
        assert!(volume.status.copies.is_empty() && volume.is_visible());
        assert!(catalog.list::<Node>().await.expect("lists").is_empty());
        assert_eq!(catalog.generation().await.expect("reads"), Generation(0));
    }
    let database = Database::open(&path).expect("opens");
    assert_eq!(read_format(&database).ok(), Some(2), "an older tandem would drop what it does not know");
}

#[tokio::test]
async fn a_generation_is_raised_and_kept() {
    let (directory, catalog) = fresh();
    assert_eq!(catalog.generation().await.expect("reads"), Generation(0));
    assert_eq!(catalog.raise_generation(Generation(4)).await.expect("raises"), Generation(5), "above what disks have");
    assert_eq!(catalog.raise_generation(Generation(2)).await.expect("raises"), Generation(6));
    drop(catalog);
    let catalog = Embedded::open(&directory.path().join("catalog.redb")).expect("opens");
    assert_eq!(catalog.generation().await.expect("reads"), Generation(6));
}

/// The future of a call, dropped when its work has begun: what a server does whose caller went away.
async fn begin(call: impl Future) {
    let mut call = std::pin::pin!(call);
    std::future::poll_fn(|context| {
        let _ = call.as_mut().poll(context);
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn what_was_changed_is_announced_also_when_nobody_waits_for_the_call() {
    let (_directory, catalog) = fresh();
    let mut watch = catalog.watch();
    let mut heard = async || tokio::time::timeout(Duration::from_secs(60), watch.next()).await.expect("announced");
    let object = volume("data");
    let seen = Some(Seen::Changed(change::<Volume>(object.key())));
    begin(catalog.create(object.clone())).await;
    assert_eq!(heard().await, seen);
    let stored = catalog.get::<Volume>(&object.key()).await.expect("reads").expect("committed before it was announced");
    begin(catalog.update(stored.clone())).await;
    assert_eq!(heard().await, seen);
    let now = catalog.get::<Volume>(&object.key()).await.expect("reads").expect("there");
    assert!(now.version > stored.version);
    begin(catalog.delete(&now)).await;
    assert_eq!(heard().await, seen);
    assert!(catalog.get::<Volume>(&object.key()).await.expect("reads").is_none());
}
