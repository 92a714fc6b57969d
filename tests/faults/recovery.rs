//! The controller's directory is lost, or an old one is restored, while a mirrored volume is in use; also together with the
//! node of its primary. The commands are those of the README.

use crate::load::Load;
use crate::site::{PATIENCE, Site};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tandem::rpc::control::copy::State;
use tonic::Code;

/// An operator's command at the controller.
fn tandem(site: &Site, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).arg("--dir").arg(site.cluster.dir().join("controller")).stdin(Stdio::null());
    command.output().expect("started")
}

fn catalogue(site: &Site) -> PathBuf {
    site.cluster.dir().join("controller/catalog.redb")
}

/// The controller with another catalogue, or an empty one.
fn restart_controller(site: &Site, with: impl FnOnce(PathBuf)) {
    site.cluster.run(&["kill", "controller", "controller"]);
    with(catalogue(site));
    site.cluster.run(&["start", "controller", "controller"]);
}

/// Recovers until the volume's state is this one: nodes announce themselves when they find the new controller. The report.
fn recover_until(site: &Site, state: &str) -> serde_json::Value {
    let began = Instant::now();
    loop {
        let output = tandem(site, &["recover", "-o", "json"]);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let rows = report["rows"].as_array().cloned().unwrap_or_default();
        if rows.iter().any(|row| row["id"] == site.id.as_str() && row["state"] == state) {
            println!("{state} after {:?}", began.elapsed());
            return report;
        }
        assert!(began.elapsed() < PATIENCE, "not {state}: {report} {}", String::from_utf8_lossy(&output.stderr));
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Node 2 dies. Not `kill all`, which takes the device of the volume away on whatever node it is.
fn kill_secondary(site: &Site) {
    for role in ["replica", "holder", "node"] {
        site.cluster.run(&["kill", role, "2"]);
    }
}

async fn until(what: &str, mut is: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is().await {
        assert!(began.elapsed() < PATIENCE, "{what} does not come");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The other copy has everything, and its new life at the other node shows it.
async fn ends_well(site: Site) {
    site.detach(1).await;
    let device = site.attach(2).await;
    site.check(&device).await;
    site.detach(2).await;
    site.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalogue_comes_back_under_load_and_drops_a_node_that_dies_then() {
    let site = Site::new(2).await;
    let device = site.attach(1).await;
    let load = Load::start(&device, &site.oracle);
    load.await_writes(200, PATIENCE);
    restart_controller(&site, |catalogue| std::fs::remove_file(catalogue).expect("lost"));
    println!("without a catalogue: 300 writes in {:?}", load.await_writes(300, PATIENCE));
    // What is complete at once is put back; what waited for a node is raised by the recovery that has read it.
    let began = Instant::now();
    until("the volume in the catalogue", async || {
        tandem(&site, &["recover"]);
        site.health().await.is_ok_and(|wrong| wrong.is_empty())
    })
    .await;
    println!("recovered after {:?}, 300 writes in {:?}", began.elapsed(), load.await_writes(300, PATIENCE));
    until("the raised generation", async || site.mirror(1).await.is_some_and(|m| m.generation > 0 && m.serves)).await;
    kill_secondary(&site);
    println!("dropped after {:?}", site.until_dropped(2).await);
    println!("300 writes in {:?}", load.await_writes(300, PATIENCE));
    site.cluster.run(&["start", "all", "2"]);
    println!("a member again after {:?}", site.until_whole().await);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.check(&device).await;
    // As the attacher does for what it has attached and does not find in the list.
    site.published(1).await;
    ends_well(site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_controller_and_primary_the_other_copy_serves_when_it_is_forced() {
    let site = Site::new(2).await;
    let device = site.attach(1).await;
    let load = Load::start(&device, &site.oracle);
    load.await_writes(500, PATIENCE);
    site.cluster.run(&["kill", "controller", "controller"]);
    site.cluster.run(&["kill", "all", "1"]);
    println!("{} writes", load.stop().writes);
    std::fs::remove_file(catalogue(&site)).expect("lost, too");
    site.cluster.run(&["start", "controller", "controller"]);
    let report = recover_until(&site, "WAITS");
    assert_eq!(report["rows"][0]["missing"][0], "node-1", "{report}");
    let refused = site.publish(2).await.expect_err("copy 1 may have newer writes");
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("promote"), "{refused:?}");
    let asked = tandem(&site, &["promote", &site.id, "node-2", "--force"]);
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(!asked.status.success() && said.contains("node-1 (the primary"), "{said}");
    let forced = tandem(&site, &["promote", &site.id, "node-2", "--force", "--yes"]);
    assert!(forced.status.success(), "{}", String::from_utf8_lossy(&forced.stderr));
    let device = site.attach(2).await;
    site.check(&device).await;
    let load = Load::start(&device, &site.oracle);
    println!("the other node writes after {:?}", load.await_writes(200, PATIENCE));
    site.cluster.run(&["start", "all", "1"]);
    println!("a member again after {:?}", site.until_whole().await);
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.check(&device).await;
    site.unstage(1).await;
    site.detach(2).await;
    let device = site.attach(1).await;
    site.check(&device).await;
    site.detach(1).await;
    site.finish().await;
}

/// Case 17.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_catalogue_is_not_followed_before_it_is_recovered() {
    let site = Site::new(2).await;
    let device = site.attach(1).await;
    let load = Load::start(&device, &site.oracle);
    load.await_writes(200, PATIENCE);
    let backup = site.cluster.dir().join("backup.redb");
    restart_controller(&site, |catalogue| _ = std::fs::copy(catalogue, &backup).expect("backed up"));
    kill_secondary(&site);
    println!("dropped after {:?}", site.until_dropped(2).await);
    load.await_writes(200, PATIENCE);
    restart_controller(&site, |catalogue| _ = std::fs::copy(&backup, catalogue).expect("restored"));
    site.cluster.run(&["start", "all", "2"]);
    // The old catalogue says that copy 2 is a member. Copy 1 knows better, and tells copy 2.
    assert_eq!(site.health().await.expect("it answers"), Vec::<String>::new());
    until("copy 2 brought up to date", async || {
        let copies = site.mirror(1).await.map(|mirror| mirror.copies).unwrap_or_default();
        copies.iter().any(|copy| !copy.here && copy.state() == State::SyncTarget && !copy.member)
    })
    .await;
    until("the refusal", async || {
        let log = std::fs::read_to_string(site.cluster.dir().join("node-1/replica.log")).unwrap_or_default();
        log.contains("the catalogue is older than")
    })
    .await;
    println!("under an old catalogue: 200 writes in {:?}", load.await_writes(200, PATIENCE));
    recover_until(&site, "raised");
    until("copy 2 a member", async || {
        let Some(mirror) = site.mirror(1).await else { return false };
        mirror.generation > 0 && mirror.serves && mirror.copies.iter().all(|copy| copy.member)
    })
    .await;
    load.await_writes(200, PATIENCE);
    load.stop_well();
    site.check(&device).await;
    ends_well(site).await;
}
