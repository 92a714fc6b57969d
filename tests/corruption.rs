//! Flipped bits in a real installation: each is detected and named, and whatever is not damaged works on. Needs root.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::installation::Installation;
use tandem::memory::Memory;
use tandem::rpc::control::{self, health::Kind};
use tandem::rpc::csi;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
/// Blocks of each volume that have data.
const FILLED: u64 = 64;
/// The one of them that is flipped.
const FLIPPED: u64 = 17;

fn open(device: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).expect("device")
}

/// Content of one block of one volume: found again in the `data` file by these bytes.
fn content(volume: &str, block: u64) -> Memory {
    let mut memory = Memory::zeros(BLOCK).expect("memory");
    let line = format!("{volume} block {block:08}\n");
    memory.bytes_mut().chunks_mut(line.len()).for_each(|part| part.copy_from_slice(&line.as_bytes()[..part.len()]));
    memory
}

fn read(device: &Path, block: u64) -> std::io::Result<Memory> {
    let mut memory = Memory::zeros(BLOCK)?;
    open(device).read_exact_at(memory.bytes_mut(), block * BLOCK as u64)?;
    Ok(memory)
}

/// Writes blocks one by one, with a flush after each `flush_every`.
fn fill(device: &Path, volume: &str, blocks: std::ops::Range<u64>, flush_every: u64) {
    let file = open(device);
    for block in blocks {
        file.write_all_at(content(volume, block).bytes(), block * BLOCK as u64).expect("written");
        if (block + 1).is_multiple_of(flush_every) {
            file.sync_data().expect("flushed");
        }
    }
    file.sync_data().expect("flushed");
}

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("it is long enough");
    byte[0] ^= 0x10;
    file.write_all_at(&byte, offset).expect("flipped");
    file.sync_all().expect("synced");
    println!("flipped a bit of byte {offset} of {}", path.display());
}

/// Every place where these bytes are in a file.
fn places(path: &Path, bytes: &[u8]) -> Vec<u64> {
    let all = fs::read(path).expect("the file");
    all.windows(bytes.len()).enumerate().filter(|(_, window)| *window == bytes).map(|(at, _)| at as u64).collect()
}

/// The directory of the volume's copy.
fn tree(tandem: &Installation, volume: &str) -> PathBuf {
    let trees = fs::read_dir(tandem.dir().join("pool/trees")).expect("trees").filter_map(Result::ok);
    let mut found = trees.map(|entry| entry.path()).filter(|path| path.join("records").join(volume).exists());
    found.next().expect("the volume's copy")
}

/// Flips the middle one of the blocks in the log that continues the checkpoint.
fn flip_log(tree: &Path) {
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let checkpoint = fs::read(tree.join("checkpoint")).expect("checkpoint");
    let (epoch, from) = (word(&checkpoint, 48), word(&checkpoint, 56));
    for name in ["log-a", "log-b"] {
        let log = fs::read(tree.join(name)).expect("log");
        let is_of = |block: &[u8]| block.starts_with(b"TandemLG") && word(block, 48) == epoch;
        let used: Vec<_> =
            (0..).zip(log.chunks(BLOCK)).filter(|(n, b)| *n >= from && is_of(b)).map(|(n, _)| n).collect();
        if used.len() >= 4 {
            return flip(&tree.join(name), used[used.len() / 2] * BLOCK as u64 + 90);
        }
    }
    panic!("no log of {} has blocks that are needed", tree.display());
}

/// Name and content of every file of a tree but its directories.
fn files(tree: &Path) -> BTreeMap<PathBuf, u32> {
    let files = fs::read_dir(tree).expect("tree").filter_map(Result::ok).map(|entry| entry.path());
    files
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), crc32c::crc32c(&fs::read(path).expect("file"))))
        .collect()
}

fn tandem(tandem: &Installation, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    let output = command.args(arguments).arg("--dir").arg(tandem.dir()).output().expect("tandem runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).expect("text"))
}

/// The server does not start; what it says.
fn refused_start(tandem: &Installation) -> String {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "120", env!("CARGO_BIN_EXE_tandem"), "standalone", "--dir"]).arg(tandem.dir());
    let output = command.output().expect("timeout");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    // Without a code it was killed: by timeout, which kills itself as it was told to kill.
    assert!(output.status.code().is_some_and(|code| code != 0), "it should have refused to start:\n{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

struct Site {
    tandem: Installation,
    /// By name: id and copy.
    volumes: BTreeMap<&'static str, (String, PathBuf)>,
}

impl Site {
    /// Volumes with data, each with a checksummed snapshot; nothing attached.
    async fn with(names: &[&'static str]) -> Self {
        let tandem = Installation::start(&[]).await;
        let mut volumes = BTreeMap::new();
        for &name in names {
            let verify = [("verifyReads", "true")];
            let id = tandem.create(name, 64 * MIB as i64, &verify).await;
            let device = tandem.attach(&id).await;
            fill(&device, name, 0..FILLED, 16);
            tandem.snapshot(name, &id).await.expect("snapshot");
            fill(&device, name, FILLED..2 * FILLED, 16);
            let tree = tree(&tandem, &id);
            volumes.insert(name, (id, tree));
        }
        let site = Self { tandem, volumes };
        site.wait_for_checksums().await;
        for (id, _) in site.volumes.values() {
            site.tandem.detach(id).await;
        }
        site
    }

    async fn wait_for_checksums(&self) {
        let began = Instant::now();
        loop {
            let request = control::ListSnapshotsRequest {};
            let snapshots =
                self.tandem.control().list_snapshots(request).await.expect("snapshots").into_inner().snapshots;
            if snapshots.iter().all(|snapshot| snapshot.checksummed) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(300), "no checksums");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn tree(&self, name: &str) -> &Path {
        &self.volumes[name].1
    }

    fn id(&self, name: &str) -> &str {
        &self.volumes[name].0
    }

    /// All of its data is there.
    async fn works(&self, name: &str) {
        let device = self.tandem.attach(self.id(name)).await;
        for block in 0..2 * FILLED {
            let found = read(&device, block).unwrap_or_else(|error| panic!("block {block} of {name}: {error}"));
            assert!(found.bytes() == content(name, block).bytes(), "block {block} of {name}");
        }
        fill(&device, name, 0..4, 4);
        self.tandem.detach(self.id(name)).await;
    }

    async fn health(&self, name: &str) -> Vec<control::Health> {
        let request = control::GetVolumeRequest { volume_id: self.id(name).to_owned() };
        self.tandem.control().get_volume(request).await.expect("volume").into_inner().health
    }

    /// The volume is not served, nothing of its copy has changed, and everybody is told.
    async fn is_broken(&self, name: &str, before: &BTreeMap<PathBuf, u32>, says: &str) {
        let request = control::AttachVolumeRequest { volume_id: self.id(name).to_owned() };
        assert!(self.tandem.control().attach_volume(request).await.is_err(), "{name} is damaged and was attached");
        assert_eq!(&files(self.tree(name)), before, "the damaged copy of {name} was changed");
        let tree = self.tree(name).file_name().expect("name").to_string_lossy().into_owned();
        let log = self.tandem.log();
        let line = log.lines().find(|line| line.contains(&tree) && line.contains("cannot be opened"));
        assert!(line.is_some_and(|line| line.contains(says)), "{name}: no {says:?} in {line:?}");
        let request = csi::ControllerGetVolumeRequest { volume_id: self.id(name).to_owned() };
        let known = self.tandem.controller().controller_get_volume(request).await;
        assert!(known.is_ok(), "the catalogue still has {name}: {known:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_of_one_copy_is_named_and_leaves_the_other_volumes_alone() {
    let mut site = Site::with(&["sound", "superblock", "checkpoint", "log", "checksums", "data", "record"]).await;
    site.tandem.terminate();
    site.tandem.start_again().await;
    // Commits that no checkpoint has yet: the log is needed.
    let device = site.tandem.attach(site.id("log")).await;
    fill(&device, "log", 2 * FILLED..3 * FILLED, 1);
    site.tandem.detach(site.id("log")).await;
    site.tandem.kill();

    flip(&site.tree("superblock").join("superblock"), 50);
    flip(&site.tree("checkpoint").join("checkpoint"), 4096 + 20);
    flip_log(site.tree("log"));
    let data = site.tree("data").join("data");
    let found = places(&data, content("data", FLIPPED).bytes());
    assert_eq!(found.len(), 1, "the block is there once");
    flip(&data, found[0] + 100);
    let sums = site.tree("checksums");
    let physical = places(&sums.join("data"), content("checksums", FLIPPED).bytes())[0] / BLOCK as u64;
    let at = physical % 1022 * 4 + 8;
    flip(&sums.join("checksums"), physical / 1022 * BLOCK as u64 + at);
    // The file is mended from what was about to be written last; it would be without this.
    flip(&sums.join("checksums.redo"), BLOCK as u64 + at);
    flip(&site.tree("record").join("records").join(site.id("record")), 30);
    let broken: Vec<_> = ["superblock", "checkpoint", "log"].map(|name| (name, files(site.tree(name)))).into();
    site.tandem.start_again().await;

    for (name, before) in &broken {
        let says = if *name == "log" { "map log" } else { name };
        site.is_broken(name, before, says).await;
    }
    let (_, status) = tandem(&site.tandem, &["status"]);
    assert!(status.contains("3 copies cannot be opened"), "{status}");
    let (_, listed) = tandem(&site.tandem, &["volume", "list"]);
    for (name, _) in &broken {
        let line = listed.lines().find(|line| line.contains(site.id(name)));
        assert!(line.is_some_and(|line| line.contains("missing")), "{name} in {listed}");
    }
    let (_, pools) = tandem(&site.tandem, &["pool", "list", "-o", "json"]);
    assert!(pools.contains("3 copies cannot be opened"), "{pools}");
    let listed = site.tandem.control().list_volumes(control::ListVolumesRequest {}).await.expect("volumes");
    let unopened = listed.into_inner().unopened;
    assert!(unopened.len() == 1 && unopened[0].problem.starts_with("3 copies cannot be opened"), "{unopened:?}");
    for name in ["sound", "record", "checksums"] {
        site.works(name).await;
    }
    let record = site.id("record");
    assert!(site.tandem.log().lines().any(|l| l.contains(record) && l.contains("is damaged")), "the record is named");

    let (clean, report) = tandem(&site.tandem, &["verify", "sound"]);
    assert!(clean, "{report}");
    let (clean, report) = tandem(&site.tandem, &["verify", site.id("checksums")]);
    assert!(!clean && report.contains("checksum cannot be read"), "{report}");
    damaged_data(&site).await;
    assert!(!site.tandem.log().contains("panicked"), "{}", site.tandem.log());
    for (name, (_, tree)) in &site.volumes {
        assert!(tree.join("data").exists(), "the copy of {name} is gone");
    }
}

/// The flipped block of the sealed layer is found by a verified read and by verify; before and after a merge.
async fn damaged_data(site: &Site) {
    let (id, name) = (site.id("data"), "data");
    let device = site.tandem.attach(id).await;
    for block in (0..2 * FILLED).filter(|block| *block != FLIPPED) {
        assert!(read(&device, block).expect("read").bytes() == content(name, block).bytes(), "block {block}");
    }
    assert!(site.health(name).await.iter().all(|health| health.kind() != Kind::DataLoss), "told before it is known");
    let error = read(&device, FLIPPED).expect_err("a verified read of the damaged block");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let health = site.health(name).await;
    assert!(
        health.iter().any(|health| health.kind() == Kind::DataLoss && health.reason == "DamagedBlocks"),
        "{health:?}"
    );
    let (clean, report) = tandem(&site.tandem, &["verify", id]);
    assert!(!clean && report.contains(&format!("block {FLIPPED} ")) && report.contains("crc32c"), "{report}");

    // Its layer is merged into the next sealed one: the checksum goes with the block.
    site.tandem.snapshot("second", id).await.expect("snapshot");
    site.wait_for_checksums().await;
    let request = control::ListSnapshotsRequest {};
    let snapshots = site.tandem.control().list_snapshots(request).await.expect("snapshots").into_inner().snapshots;
    let first = snapshots.iter().filter(|s| s.volume_id == id).min_by_key(|s| s.created_ms).expect("the first");
    let gone = csi::DeleteSnapshotRequest { snapshot_id: first.snapshot_id.clone(), ..Default::default() };
    site.tandem.controller().delete_snapshot(gone).await.expect("deleted");
    let began = Instant::now();
    loop {
        let request = control::GetVolumeRequest { volume_id: id.to_owned() };
        let volume = site.tandem.control().get_volume(request).await.expect("volume").into_inner();
        if volume.layers == 2 && volume.merging_layers == 0 && volume.unchecked_bytes == 0 {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(300), "it is never merged: {volume:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (clean, report) = tandem(&site.tandem, &["verify", id]);
    assert!(!clean && report.contains(&format!("block {FLIPPED} ")), "{report}");
    assert!(read(&device, FLIPPED).is_err(), "the damage must not look sound after a merge");
    site.tandem.detach(id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_pool_superblock_is_named_and_nothing_is_touched() {
    let mut site = Site::with(&["kept"]).await;
    let path = site.tandem.dir().join("pool/pool.tandem");
    for at in [3, 40, 100] {
        site.tandem.terminate();
        flip(&path, at);
        let before = files(site.tree("kept"));
        // Other pools could be served; this one is tried again.
        site.tandem.start_again().await;
        let pools = site.tandem.control().list_pools(control::ListPoolsRequest {}).await.expect("pools").into_inner();
        let problem = &pools.pools[0].problem;
        assert!(problem.contains("superblock") && problem.contains(&*site.tandem.dir().to_string_lossy()), "{problem}");
        let listed = site.tandem.control().list_volumes(control::ListVolumesRequest {}).await.expect("volumes");
        let control::ListVolumesResponse { volumes, unopened } = listed.into_inner();
        assert!(volumes.is_empty() && unopened.len() == 1, "nobody takes that for everything: {unopened:?}");
        assert_eq!((unopened[0].pool.as_str(), &unopened[0].problem), ("default", problem));
        let request = control::AttachVolumeRequest { volume_id: site.id("kept").to_owned() };
        assert!(site.tandem.control().attach_volume(request).await.is_err(), "its pool is damaged");
        site.tandem.terminate();
        let (done, said) = tandem(&site.tandem, &["recover"]);
        assert!(done && said.contains("pool default of") && said.contains(problem), "{said}");
        let (_, said) = tandem(&site.tandem, &["recover", "-o", "json"]);
        // What it logs follows.
        let mut found = serde_json::Deserializer::from_str(&said).into_iter::<serde_json::Value>();
        let report = found.next().expect("a report").expect("json");
        assert_eq!(report["unopened"][0]["problem"], *problem, "{said}");
        assert_eq!(files(site.tree("kept")), before);
        flip(&path, at);
        site.tandem.start_again().await;
    }
    site.works("kept").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_catalogue_is_named_and_rebuilt_from_the_disks() {
    let mut site = Site::with(&["first-of-them", "second-of-them"]).await;
    let path = site.tandem.dir().join("catalog.redb");
    let listed = async |site: &Site| {
        let volumes = site.tandem.controller().list_volumes(csi::ListVolumesRequest::default()).await.expect("volumes");
        let volumes = volumes.into_inner().entries.into_iter().filter_map(|entry| Some(entry.volume?.volume_id));
        volumes.collect::<Vec<_>>()
    };
    let known = listed(&site).await;
    assert_eq!(known.len(), 2);
    for damage in ["the header", "a volume"] {
        site.tandem.terminate();
        let found = if damage == "the header" { vec![2] } else { places(&path, b"second-of-them") };
        assert!(!found.is_empty(), "the name is in the catalogue");
        found.into_iter().for_each(|at| flip(&path, at));
        let said = refused_start(&site.tandem);
        assert!(said.contains("catalog.redb") && said.contains("tandem recover"), "{damage}: {said}");
        let (done, said) = tandem(&site.tandem, &["recover"]);
        assert!(!done && said.contains("catalog.redb"), "a damaged catalogue is not written over: {said}");
        fs::rename(&path, path.with_extension("damaged")).expect("moved away");
        let (done, said) = tandem(&site.tandem, &["recover"]);
        assert!(done, "{said}");
        site.tandem.start_again().await;
        assert_eq!(listed(&site).await, known, "after damage of {damage}: {said}");
        let again = site.tandem.create("second-of-them", 64 * MIB as i64, &[("verifyReads", "true")]).await;
        assert_eq!(again, site.id("second-of-them"), "its name is back, too");
        for name in ["first-of-them", "second-of-them"] {
            site.works(name).await;
        }
    }
}
