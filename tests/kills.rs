//! kill -9 of the engine, of CSI and of the whole server at random moments under fio and PostgreSQL: no error reaches
//! an application, and nothing that was acknowledged is lost. Needs root, fio, mkfs.ext4 and PostgreSQL.
//!
//! `TANDEM_KILLS` is the number of kills altogether (200 without it).

#[path = "kills/killer.rs"]
mod killer;
#[path = "kills/load.rs"]
mod load;
#[path = "kills/postgres.rs"]
mod postgres;
#[path = "kills/pulse.rs"]
mod pulse;
mod support;

use killer::{Killer, Plan};
use load::Fio;
use postgres::Server;
use pulse::Pulse;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use support::installation::Installation;
use support::mounted::{Usage, insist};

/// Kills of both tests together.
const KILLS: u32 = 200;
const MIB: i64 = 1 << 20;

/// One installation under load at a time: two would measure each other.
static MACHINE: Mutex<()> = Mutex::new(());

/// `share` percent of the kills that were asked for.
fn kills(share: u32) -> u32 {
    let all = std::env::var("TANDEM_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    (all * share / 100).max(1)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Errors that the kernel saw on a device, whose name must not be the start of another one's.
fn kernel_errors(device: &str) -> Vec<String> {
    let output = Command::new("dmesg").output().expect("dmesg");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_named = |line: &str| line.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == device);
    let is_error = |line: &&str| is_named(line) && (line.contains("error") || line.contains("abort"));
    text.lines().filter(is_error).map(str::to_owned).collect()
}

/// Fails if the kernel has seen errors on a device since `before`: old lines may be gone from its log, new ones may not come.
fn assert_no_new_errors(device: &str, before: &[String]) {
    let new: Vec<_> = kernel_errors(device).into_iter().filter(|line| !before.contains(line)).collect();
    assert!(new.is_empty(), "the kernel saw errors on {device}: {new:#?}");
}

/// The kernel's name of the device that is mounted at, or is, this path.
fn name_of(device: &std::path::Path) -> String {
    device.file_name().and_then(|name| name.to_str()).expect("a name").to_owned()
}

#[test]
fn fio_sees_no_error_on_a_device_and_on_ext4_while_everything_is_killed() {
    let _alone = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    runtime().block_on(async {
        let mut tandem = Installation::start(&[]).await;
        let raw = tandem.create("raw", 512 * MIB, &[]).await;
        let files = tandem.create_mounted("files", 768 * MIB, "ext4").await;
        let pulsed = tandem.create("pulse", 64 * MIB, &[]).await;
        let (device, slow) = (tandem.attach(&raw).await, tandem.attach(&pulsed).await);
        let usage = Usage::new(&tandem, &files, "ext4");
        usage.stage(&tandem).await.expect("staged");
        usage.publish(&tandem).await.expect("published");
        let mounted = tandem.attach(&files).await;
        let before = [&device, &slow, &mounted].map(|d| (name_of(d), kernel_errors(&name_of(d))));

        let pulse = Pulse::start(&slow);
        let loads = [Fio::on_device(&device), Fio::on_file(&usage.target.join("data"))];
        let plan = Plan { engine: kills(50), server: kills(10), csi: kills(5) };
        let report = Killer::new(&mut tandem, &pulse, plan).run().await;
        for load in loads {
            println!("fio: {} runs with verification, no error", load.finish());
        }
        println!("{report}, {} checked reads and writes beside", pulse.finish());
        before.iter().for_each(|(device, before)| assert_no_new_errors(device, before));

        insist(|| usage.unpublish(&tandem)).await.expect("unpublished");
        insist(|| usage.unstage(&tandem)).await.expect("unstaged");
        check_ext4(&tandem, &files).await;
        tandem.detach(&raw).await;
        tandem.detach(&pulsed).await;
    });
}

/// Whether the filesystem is whole.
async fn check_ext4(tandem: &Installation, volume: &str) {
    let device = tandem.attach(volume).await;
    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(&device).output().expect("e2fsck");
    let text = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success(), "e2fsck: {}\n{text}", checked.status);
    tandem.detach(volume).await;
}

#[test]
fn postgresql_keeps_every_committed_row_while_the_engine_is_killed() {
    let _alone = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    runtime().block_on(async {
        let mut tandem = Installation::start(&[]).await;
        let volume = tandem.create_mounted("database", 1536 * MIB, "ext4").await;
        let pulsed = tandem.create("pulse", 64 * MIB, &[]).await;
        let slow = tandem.attach(&pulsed).await;
        let usage = Usage::new(&tandem, &volume, "ext4");
        usage.stage(&tandem).await.expect("staged");
        usage.publish(&tandem).await.expect("published");
        let device = tandem.attach(&volume).await;
        let before = kernel_errors(&name_of(&device));

        let mut server = Server::create(tandem.dir(), &usage.target);
        let clients = server.start_clients();
        let pulse = Pulse::start(&slow);
        let plan = Plan { engine: kills(35), server: 0, csi: 0 };
        let report = Killer::new(&mut tandem, &pulse, plan).run().await;
        let committed = clients.finish();
        println!("{report}, {} checked reads and writes beside", pulse.finish());
        server.check(&committed, "with a warm cache");
        // As after a crash of the machine's software: nothing but what is on the volume.
        assert!(server.stop_at_once(), "PostgreSQL hangs");
        insist(|| usage.unpublish(&tandem)).await.expect("unpublished");
        insist(|| usage.unstage(&tandem)).await.expect("unstaged");
        check_ext4(&tandem, &volume).await;
        usage.stage(&tandem).await.expect("staged");
        usage.publish(&tandem).await.expect("published");
        let began = Instant::now();
        let mut server = server.start_again();
        server.check(&committed, "after recovery");
        println!("PostgreSQL: {} committed rows, all there; recovered in {:?}", committed.len(), began.elapsed());
        assert!(server.stop_at_once(), "PostgreSQL hangs");
        assert_no_new_errors(&name_of(&device), &before);
        insist(|| usage.unpublish(&tandem)).await.expect("unpublished");
        insist(|| usage.unstage(&tandem)).await.expect("unstaged");
        tandem.detach(&pulsed).await;
    });
}
