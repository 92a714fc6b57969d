//! Copies that are lost, and copies that are not the same any more.

use super::rig::Cluster;
use super::{command, read, tandem, write};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::Code;

/// When a condition is given up.
const LONG: Duration = Duration::from_secs(120);

/// The nodes whose copies are up to date, and how many copies there are.
fn up_to_date(cluster: &Cluster, id: &str) -> (Vec<String>, usize) {
    let text = tandem(cluster, "controller", &["volume", "copies", id, "-o", "json"]);
    let copies: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    let good = copies.iter().filter(|copy| copy["up_to_date"] == true);
    (good.map(|copy| copy["node"].as_str().expect("a name").to_owned()).collect(), copies.len())
}

fn until_copies_are_on(cluster: &Cluster, id: &str, nodes: [&str; 2]) {
    let began = Instant::now();
    loop {
        let (mut good, all) = up_to_date(cluster, id);
        good.sort();
        if good == nodes && all == 2 {
            return;
        }
        assert!(began.elapsed() < LONG, "{good:?} of {all}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

async fn delete(cluster: &Cluster, id: &str) {
    let began = Instant::now();
    while let Err(status) = cluster.delete(id).await {
        assert!(status.code() == Code::Aborted && began.elapsed() < LONG, "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_copy_is_made_anew_without_a_person_also_that_of_the_primary() {
    let cluster = Cluster::up(3);
    let parameters = [("replication", "sync"), ("rebuildAfter", "10s")];
    let id = cluster.create_with("mirrored", &[1, 2], &parameters).await.expect("created").volume_id;
    let staging = cluster.stage(&id, 1).await;
    write(&staging);
    cluster.run(&["kill", "all", "2"]);
    until_copies_are_on(&cluster, &id, ["node-1", "node-3"]);
    // What was filled has other layers, and reads the same.
    tandem(&cluster, "controller", &["verify", &id, "--copies", "--rate", "1Gi"]);
    // It comes back, and gives its space back.
    cluster.run(&["start", "all", "2"]);
    let trees = cluster.dir().join("node-2/pool/trees");
    let began = Instant::now();
    while fs::read_dir(&trees).map_or(0, Iterator::count) > 0 {
        assert!(began.elapsed() < LONG, "its copy stays");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Nobody uses it, and the node of its primary dies.
    cluster.unstage(&id, 1, &staging).await;
    cluster.run(&["kill", "all", "1"]);
    until_copies_are_on(&cluster, &id, ["node-2", "node-3"]);
    let staging = cluster.stage(&id, 2).await;
    assert_eq!(read(&staging), super::WORD);
    cluster.unstage(&id, 2, &staging).await;
    cluster.run(&["start", "all", "1"]);
    delete(&cluster, &id).await;
    cluster.down();
}

/// A text that is nowhere else, more than a block of it.
const TEXT: &[u8] = b"one bit of this is about to rot ";
const REPEATED: usize = 4096;

/// Where the text begins in the data of the node's only copy.
fn place_of(cluster: &Cluster, node: &str) -> (PathBuf, u64) {
    let trees = cluster.dir().join(node).join("pool/trees");
    let tree = fs::read_dir(trees).expect("readable").next().expect("a copy").expect("readable").path();
    let path = tree.join("data");
    let bytes = fs::read(&path).expect("readable");
    let blocks = bytes.chunks(4096).position(|block| block.starts_with(TEXT));
    (path, blocks.expect("it is there") as u64 * 4096)
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).expect("opened");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 4], at).expect("written");
    file.sync_all().expect("synced");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_rots_in_one_copy_is_found_and_named() {
    let cluster = Cluster::up(2);
    let id = cluster.create_with("mirrored", &[1, 2], &[("replication", "sync")]).await.expect("created").volume_id;
    let staging = cluster.stage(&id, 1).await;
    fs::write(staging.join("text"), TEXT.repeat(REPEATED)).expect("written");
    fs::File::open(staging.join("text")).and_then(|file| file.sync_all()).expect("synced");
    let compare = || command(&cluster, "controller", &["verify", &id, "--copies", "--rate", "1Gi", "-o", "json"]);
    let same = compare();
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stderr));
    tandem(&cluster, "controller", &["snapshot", "create", &id, "monday"]);
    // What rots before is summed as it is then.
    let began = Instant::now();
    while !tandem(&cluster, "node-2", &["snapshot", "list", "-o", "json"]).contains("\"checksummed\": true") {
        assert!(began.elapsed() < LONG, "no checksums");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (path, at) = place_of(&cluster, "node-2");
    flip(&path, at + 7);
    let differs = compare();
    let (text, said) = (String::from_utf8_lossy(&differs.stdout), String::from_utf8_lossy(&differs.stderr));
    assert!(!differs.status.success() && said.contains("4 MiB differ between the copies"), "{text}{said}");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["differences"][0]["groups"], serde_json::json!(["node-1", "node-2"]), "{text}");
    assert_eq!(json["different_bytes"], 4 << 20, "{text}");
    // Its checksum says which one it is.
    tandem(&cluster, "node-1", &["verify", &id]);
    let damaged = command(&cluster, "node-2", &["verify", &id]);
    let text = String::from_utf8_lossy(&damaged.stdout);
    assert!(!damaged.status.success() && text.contains("crc32c"), "{text}");
    for node in ["node-1", "node-2"] {
        let left = tandem(&cluster, node, &["snapshot", "list", "-o", "json"]);
        assert!(left.matches("\"id\"").count() == 1 && left.contains("monday"), "{left}");
    }
    cluster.unstage(&id, 1, &staging).await;
    tandem(&cluster, "node-1", &["snapshot", "delete", "monday"]);
    delete(&cluster, &id).await;
    cluster.down();
}
