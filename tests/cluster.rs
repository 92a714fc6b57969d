//! A cluster of real processes in network namespaces: volumes are made, used and lost where they are; mirrored ones outlive that.

#[path = "cluster/copies.rs"]
mod copies;
#[allow(dead_code, reason = "other test programs use the rest")]
#[path = "support/leash.rs"]
mod leash;
#[path = "cluster/rig.rs"]
mod rig;

use rig::{Cluster, hack_cluster, place, traces};
use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};
use tandem::rpc::csi::{ControllerGetVolumeRequest, GetCapacityRequest};
use tonic::Code;

const WORD: &[u8] = b"written and synced";

fn write(path: &std::path::Path) {
    let mut file = fs::File::create(path.join("word")).expect("created");
    file.write_all(WORD).and_then(|()| file.sync_all()).expect("written");
}

fn read(path: &std::path::Path) -> Vec<u8> {
    let mut read = Vec::new();
    fs::File::open(path.join("word")).and_then(|mut file| file.read_to_end(&mut read)).expect("readable");
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_used_where_they_are_and_outlive_the_software_of_their_node() {
    let cluster = Cluster::up(2);
    for number in [1, 2] {
        let volume = cluster.create(&format!("pvc-{number}"), &[number]).await.expect("created");
        assert_eq!(volume.accessible_topology, [place(number)]);
        let id = volume.volume_id;
        let elsewhere = cluster.attach(&id, 3 - number).await.expect_err("no copy there");
        assert_eq!(elsewhere.code(), Code::FailedPrecondition);
        let staging = cluster.stage(&id, number).await;
        write(&staging);
        let began = Instant::now();
        cluster.run(&["kill", "replica", &number.to_string()]);
        // The filesystem waits: a write that begins while nobody serves the device ends when somebody does again.
        let writer = std::thread::spawn({
            let staging = staging.clone();
            move || {
                fs::write(staging.join("second"), WORD)
                    .and_then(|()| fs::File::open(staging.join("second"))?.sync_all())
            }
        });
        cluster.run(&["start", "replica", &number.to_string()]);
        writer.join().expect("no panic").expect("no error");
        println!("node-{number}: the replica was away for {} ms", began.elapsed().as_millis());
        assert_eq!(read(&staging), WORD);
        cluster.run(&["kill", "node", &number.to_string()]);
        cluster.run(&["start", "node", &number.to_string()]);
        let status = cluster.run(&["status"]);
        assert!(
            status.lines().any(|line| line.starts_with(&format!("node-{number}\t{id}")) && line.ends_with("well")),
            "{status}"
        );
        cluster.unstage(&id, number, &staging).await;
        let staging = cluster.stage(&id, number).await;
        assert_eq!(read(&staging), WORD);
        cluster.unstage(&id, number, &staging).await;
        cluster.delete(&id).await.expect("deleted");
    }
    cluster.down();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_down_is_named_and_comes_back_with_its_volumes() {
    let cluster = Cluster::up(2);
    let id = cluster.create("pvc", &[2]).await.expect("created").volume_id;
    let staging = cluster.stage(&id, 2).await;
    write(&staging);
    cluster.run(&["kill", "all", "2"]);
    let named = |status: tonic::Status| {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("node-2"), "{status:?}");
    };
    let began = Instant::now();
    named(cluster.create("more", &[2]).await.expect_err("its node is down"));
    let capacity = GetCapacityRequest { accessible_topology: Some(place(2)), ..Default::default() };
    named(cluster.controller().get_capacity(capacity.clone()).await.expect_err("its node is down"));
    assert!(began.elapsed() < Duration::from_secs(12), "said at once, not after {:?}", began.elapsed());
    // What need not be there is made elsewhere.
    let other = cluster.create("other", &[]).await.expect("created");
    assert_eq!(other.accessible_topology, [place(1)]);
    cluster.run(&["start", "all", "2"]);
    cluster.controller().get_capacity(capacity).await.expect("it is back");
    let staging = cluster.stage(&id, 2).await;
    assert_eq!(read(&staging), WORD, "flushed data outlive the node");
    cluster.unstage(&id, 2, &staging).await;
    cluster.delete(&id).await.expect("deleted");
    cluster.delete(&other.volume_id).await.expect("deleted");
    cluster.down();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_in_one_direction_is_a_node_that_is_down_and_a_controller_that_is_away_stops_no_volume() {
    let cluster = Cluster::up(2);
    let id = cluster.create("pvc", &[1]).await.expect("created").volume_id;
    let staging = cluster.stage(&id, 1).await;
    cluster.run(&["cut", "1", "controller"]);
    let status = cluster.create("more", &[1]).await.expect_err("its answers are lost");
    assert!(status.code() == Code::Unavailable && status.message().contains("node-1"), "{status:?}");
    write(&staging);
    cluster.run(&["heal"]);
    let began = Instant::now();
    let more = loop {
        match cluster.create("more", &[1]).await {
            Ok(volume) => break volume.volume_id,
            Err(status) => assert!(began.elapsed() < Duration::from_secs(120), "{status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    cluster.run(&["kill", "controller", "controller"]);
    write(&staging);
    cluster.run(&["start", "controller", "controller"]);
    let asked = ControllerGetVolumeRequest { volume_id: id.clone() };
    let found = cluster.controller().controller_get_volume(asked).await.expect("it knows").into_inner();
    assert_eq!(found.status.expect("a status").published_node_ids, ["node-1"]);
    assert_eq!(read(&staging), WORD);
    cluster.unstage(&id, 1, &staging).await;
    cluster.delete(&id).await.expect("deleted");
    cluster.delete(&more).await.expect("deleted");
    cluster.down();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_taken_down_while_volumes_are_in_use_leaves_nothing() {
    let cluster = Cluster::up(1);
    let mut ids = Vec::new();
    for name in ["well", "dead"] {
        let id = cluster.create(name, &[1]).await.expect("created").volume_id;
        write(&cluster.stage(&id, 1).await);
        ids.push(id);
    }
    assert_eq!(devices(&ids), 2);
    // One more mount of each, elsewhere, as kubelet makes it; and nobody serves the devices any more.
    let elsewhere = tempfile::Builder::new().prefix("tandem-target-").tempdir().expect("a directory");
    let staging = cluster.dir().join(format!("node-1/staging-{}", ids[1]));
    let bound = std::process::Command::new("mount").arg("--bind").args([&staging, &elsewhere.path().into()]).status();
    assert!(bound.expect("started").success());
    cluster.run(&["kill", "replica", "1"]);
    cluster.down();
    assert_eq!(devices(&ids), 0);
    let mounts = fs::read_to_string("/proc/self/mounts").expect("readable");
    assert!(!mounts.contains(&elsewhere.path().display().to_string()), "{mounts}");
}

/// Loop devices of these volumes; sysfs does not ask the devices.
fn devices(ids: &[String]) -> usize {
    let files = fs::read_dir("/sys/block").expect("readable").flatten();
    let backing = files.filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    backing.filter(|backing| ids.iter().any(|id| backing.contains(id.as_str()))).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirrored_volume_outlives_the_node_that_it_is_used_on() {
    let cluster = Cluster::up(2);
    let volume = cluster.create_with("mirrored", &[1], &[("replication", "sync")]).await.expect("created");
    assert_eq!(volume.accessible_topology, [place(1), place(2)]);
    let id = volume.volume_id;
    let staging = cluster.stage(&id, 1).await;
    write(&staging);
    cluster.run(&["kill", "all", "1"]);
    let began = Instant::now();
    tandem(&cluster, "controller", &["volume", "detach", &id, "node-1"]);
    let staging = cluster.stage(&id, 2).await;
    assert_eq!(read(&staging), WORD, "what was flushed is on the other node");
    println!("writable at the other node after {} ms", began.elapsed().as_millis());
    let line = |status: &str| {
        let mut lines = status.lines().filter(|line| line.starts_with(&format!("node-2\t{id}")));
        lines.next().expect("a line of the volume").to_owned()
    };
    let alone = line(&cluster.run(&["status"]));
    assert!(alone.contains("Primary serving") && alone.contains("node-1 Outdated not connected"), "{alone}");
    assert!(alone.ends_with("degraded (CopyNotUpToDate)"), "{alone}");
    cluster.run(&["start", "all", "1"]);
    let began = Instant::now();
    loop {
        let both = line(&cluster.run(&["status"]));
        if both.contains("node-1 UpToDate\t") && both.ends_with("\twell") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(180), "{both}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("{}", tandem(&cluster, "node-2", &["volume", "show", &id]));
    let text = tandem(&cluster, "node-2", &["volume", "show", &id, "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(json["mirror"]["role"] == "Primary" && json["mirror"]["copied_bytes"].as_u64() > Some(0), "{text}");
    tandem(&cluster, "node-2", &["volume", "unstage", "mirrored", &staging.display().to_string()]);
    tandem(&cluster, "controller", &["volume", "demote", &id]);
    let promoted = tandem(&cluster, "controller", &["volume", "promote", &id, "node-1"]);
    assert!(promoted.contains("node-1 is primary"), "{promoted}");
    let resynced = tandem(&cluster, "controller", &["volume", "resync", &id, "--node", "node-2"]);
    assert!(resynced.contains("the copy on node-2 is equal to the primary's"), "{resynced}");
    let refused = command(&cluster, "controller", &["volume", "resync", &id, "--node", "node-1"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.contains("is its primary"), "{why}");
    let text = tandem(&cluster, "controller", &["volume", "copies", "mirrored", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let of = |node: &str| json.as_array().into_iter().flatten().find(|copy| copy["node"] == node).expect("a copy");
    assert!(of("node-1")["primary"] == true && of("node-2")["up_to_date"] == true, "{text}");
    let listed = tandem(&cluster, "controller", &["volume", "list"]);
    assert!(listed.lines().any(|line| line.starts_with("mirrored ") && line.contains(&id)), "{listed}");
    let status = tandem(&cluster, "node-2", &["status"]);
    assert!(status.lines().any(|line| line.starts_with("Encryption") && line.ends_with("on")), "{status}");
    tandem(&cluster, "controller", &["volume", "delete", "mirrored"]);
    let left = tandem(&cluster, "controller", &["volume", "list", "-o", "json"]);
    assert_eq!(left.trim(), "[]");
    cluster.down();
}

/// What a command of a person at this host says, with the controller's socket as the cluster has it.
fn tandem(cluster: &Cluster, host: &str, arguments: &[&str]) -> String {
    let output = command(cluster, host, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn command(cluster: &Cluster, host: &str, arguments: &[&str]) -> std::process::Output {
    let controller = format!("unix://{}", cluster.dir().join("controller/csi.sock").display());
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).arg("--dir").arg(cluster.dir().join(host)).args(["--controller-endpoint", &controller]);
    command.output().expect("started")
}

#[test]
fn what_cannot_be_is_refused_and_a_half_made_cluster_goes() {
    let top = tempfile::Builder::new().prefix("tandem-cluster-").tempdir().expect("a directory");
    let dir = top.path().join("c");
    let refused = |arguments: &[&str], word: &str| {
        let output = hack_cluster(&dir, arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(word), "{arguments:?}: {text}");
    };
    refused(&["status"], "there is no cluster in");
    refused(&["down"], "there is no cluster in");
    refused(&["up", "0"], "from 1 to 99");
    refused(&["up", "x"], "from 1 to 99");
    refused(&["fly"], "hack/cluster --dir DIR up N");
    fs::create_dir(&dir).expect("made");
    refused(&["up", "1"], "exists");
    assert!(dir.exists(), "what is somebody else's stays");
    fs::remove_dir(&dir).expect("removed");
    // An `up` that is killed half way.
    let mut up = std::process::Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/hack/cluster"))
        .arg("--dir")
        .arg(&dir)
        .args(["up", "3"])
        .env("TANDEM", env!("CARGO_BIN_EXE_tandem"))
        .spawn()
        .expect("started");
    let began = Instant::now();
    while !dir.join("node-1/replica.pid").exists() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    up.kill().expect("our own child");
    up.wait().expect("our own child");
    assert!(!traces(&dir).is_empty(), "killed before anything was made");
    let down = hack_cluster(&dir, &["down"]);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert_eq!(traces(&dir), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_moves_to_a_third_node_by_a_persons_command() {
    let cluster = Cluster::up(3);
    let volume = cluster.create_with("mirrored", &[1, 2], &[("replication", "sync")]).await.expect("created");
    let id = volume.volume_id;
    let staging = cluster.stage(&id, 1).await;
    write(&staging);
    // Its node is dead for good.
    cluster.run(&["kill", "all", "2"]);
    let said = tandem(&cluster, "controller", &["volume", "move", &id, "--from", "node-2", "--to", "node-3"]);
    assert!(said.contains("the copy on node-2 is replaced by the one on node-3"), "{said}");
    println!("{}", tandem(&cluster, "controller", &["volume", "copies", &id]));
    cluster.unstage(&id, 1, &staging).await;
    cluster.run(&["kill", "all", "1"]);
    let staging = cluster.stage(&id, 3).await;
    assert_eq!(read(&staging), WORD);
    cluster.run(&["start", "all", "1"]);
    cluster.run(&["start", "all", "2"]);
    cluster.unstage(&id, 3, &staging).await;
    let began = Instant::now();
    while let Err(status) = cluster.delete(&id).await {
        assert!(status.code() == Code::Aborted && began.elapsed() < Duration::from_secs(240), "{status:?}");
    }
    cluster.down();
}
