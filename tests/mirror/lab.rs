//! Two nodes in directories of their own, what is wanted of them, and the ways to disturb them. All of it goes on every path.

use super::catalogue::Catalogue;
use super::node::{Node, name};
use super::rig;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tandem::protocol::{Configuration, Generation, Lacks};
use tandem::replica::device::loop_device;
use tandem::replica::engine::CopyState;
use tandem::replica::holder::Holder;
use tandem::store::Control;
use tandem::tls::{Authority, Leaf, Role, Validity};
use tandem::volume::{InstanceId, SnapshotId, VolumeId};

pub const CHILD: &str = "TANDEM_TEST_MIRROR_CHILD";
/// Longer than a silence, a lease and a resync on a busy machine take, and than a copy is left alone that was slow there.
const LONG: Duration = Duration::from_secs(180);

/// Waits until the condition holds; what it found.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < LONG, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Tells a load to end, also when its test fails: else the test would wait for it for ever.
#[derive(Default)]
pub struct Stop(pub Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub struct Lab {
    root: tempfile::TempDir,
    pub catalogue: Catalogue,
    pub volume: VolumeId,
    pub copies: [InstanceId; 2],
    child: Option<Child>,
}

impl Lab {
    pub fn new(bytes: u64) -> Self {
        let under = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let root = tempfile::Builder::new().prefix("tandem-mirror-").tempdir_in(under).expect("a directory");
        let (volume, copies) = (VolumeId::random(), [InstanceId::random(), InstanceId::random()]);
        let catalogue = Catalogue::at(root.path());
        let lab = Self { root, catalogue, volume, copies, child: None };
        for (number, copy) in copies.iter().enumerate() {
            let directory = lab.directory(number);
            fs::create_dir(&directory).expect("a directory");
            fs::write(directory.join("ids"), format!("{copy} {volume}")).expect("write");
            fs::write(directory.join("name"), format!("node-{number}")).expect("write");
            fs::write(directory.join("bytes"), bytes.to_string()).expect("write");
        }
        let first = Configuration::first(Generation(1), copies[0], [copies[1]].into());
        lab.catalogue.write(&first);
        lab.wish(Some(0));
        lab
    }

    /// The second copy has nothing and is no member yet.
    pub fn with_candidate(self) -> Self {
        let mut first = Configuration::first(Generation(1), self.copies[0], [].into());
        first.candidates.insert(self.copies[1], Lacks::Everything);
        self.catalogue.write(&first);
        self
    }

    pub fn with_certificates(self) -> Self {
        let authority = Authority::create(&self.root.path().join("authority"), name("lab"), Validity::days(1));
        let authority = authority.expect("made");
        for number in 0..2 {
            let leaf = Leaf { role: Role::Node, name: name(&format!("node-{number}")), addresses: Vec::new() };
            let issued = authority.issue(&leaf, Validity::days(1)).expect("issued");
            issued.write(&self.directory(number).join("credentials")).expect("written");
        }
        self
    }

    pub fn directory(&self, number: usize) -> PathBuf {
        self.root.path().join(number.to_string())
    }

    pub fn wish(&self, primary: Option<usize>) {
        self.catalogue.set_wish(primary.map(|number| self.copies[number]), &self.copies);
    }

    pub async fn start(&self, number: usize) -> Node {
        Node::start(&self.directory(number)).await
    }

    /// Both nodes in this process, the first one serving.
    pub async fn start_both(&self) -> (Node, Node) {
        let both = (self.start(0).await, self.start(1).await);
        until("the first copy to serve", async || both.0.status().await.serves.then_some(())).await;
        both
    }

    /// The first node in a process of its own; its device.
    pub fn start_child(&mut self) -> PathBuf {
        let device = self.directory(0).join("device");
        let _ = fs::remove_file(&device);
        self.child = Some(rig::again("node_process", CHILD, &self.directory(0)).spawn().expect("starts"));
        rig::wait_for("the device", || fs::read_to_string(&device).ok()).into()
    }

    pub fn kill_child(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("is there");
            child.wait().expect("ends");
        }
    }

    /// The whole first node is gone, with everything that it kept in memory.
    pub fn kill_node(&mut self) {
        self.kill_child();
        self.kill_holder(0);
        let _ = loop_device::detach_all(self.volume);
    }

    /// Writing to these files of a node's store fails from now on.
    pub fn unwritable<const N: usize>(&self, number: usize, files: [&str; N]) -> Unwritable {
        let tree = self.directory(number).join("tree");
        let unwritable = Unwritable(files.iter().map(|file| tree.join(file)).collect());
        assert!(unwritable.change("+i").success(), "{:?}", unwritable.0);
        unwritable
    }

    fn kill_holder(&self, number: usize) {
        if let Ok(status) = Holder::status(&self.directory(number).join("holder.sock")) {
            let pid = nix::unistd::Pid::from_raw(status.pid as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        (0..2).for_each(|number| self.kill_holder(number));
        let _ = loop_device::detach_all(self.volume);
    }
}

/// Files that are immutable; that ends with it.
pub struct Unwritable(Vec<PathBuf>);

impl Unwritable {
    fn change(&self, how: &str) -> ExitStatus {
        Command::new("chattr").arg(how).args(&self.0).status().expect("chattr of e2fsprogs")
    }
}

impl Drop for Unwritable {
    fn drop(&mut self) {
        let _ = self.change("-i");
    }
}

/// Content that says where and when it was written.
pub fn content(block: u64, round: u64) -> Vec<u8> {
    (0..512u64)
        .flat_map(|word| (block << 40 ^ round << 20 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

/// Writes blocks of this round and flushes.
pub async fn write(device: &Path, blocks: impl IntoIterator<Item = u64>, round: u64) {
    let (device, blocks) = (device.to_path_buf(), blocks.into_iter().collect::<Vec<_>>());
    let written = tokio::task::spawn_blocking(move || {
        let file = File::options().write(true).open(&device).expect("the device");
        for block in blocks {
            file.write_all_at(&content(block, round), block * 4096).expect("writes");
        }
        file.sync_all().expect("flushes");
    });
    written.await.expect("written");
}

/// Whether these blocks are of this round.
pub async fn check(device: &Path, blocks: impl IntoIterator<Item = u64>, round: u64) {
    let (device, blocks) = (device.to_path_buf(), blocks.into_iter().collect::<Vec<_>>());
    let checked = tokio::task::spawn_blocking(move || {
        let file = File::open(&device).expect("the device");
        for block in blocks {
            let mut found = vec![0; 4096];
            file.read_exact_at(&mut found, block * 4096).expect("reads");
            assert!(found == content(block, round), "block {block} is not of round {round}");
        }
    });
    checked.await.expect("checked");
}

/// Takes a snapshot at the primary and compares it block by block with the other copy's; how many blocks it has.
pub async fn compare(primary: &Node, other: &Node) -> usize {
    let snapshot = SnapshotId::random();
    let seal = Control::Seal { volume: primary.volume, snapshot, created_ms: 5 };
    match tokio::time::timeout(LONG / 4, primary.handle.control(primary.tree, seal)).await {
        Ok(sealed) => sealed.expect("seals"),
        Err(_) => panic!("the seal is not done: {:#?} {:#?}", primary.status().await, other.status().await),
    }
    let (one, two) = (primary.contents(snapshot).await, other.contents(snapshot).await);
    let differ = |block: &&u64| one.get(*block) != two.get(*block);
    let differing: Vec<_> = one.keys().chain(two.keys()).filter(differ).collect();
    assert!(differing.is_empty(), "{} blocks differ: {differing:?}", differing.len());
    one.len()
}

/// Waits until the other copy is a member and equal.
pub async fn both_up_to_date(primary: &Node, other: &Node) {
    until("the other copy to be up to date", async || {
        let status = primary.status().await;
        let copy = status.copies.get(&other.tree).copied();
        (status.serves && copy.is_some_and(|copy| copy.state == CopyState::UpToDate)).then_some(())
    })
    .await;
}
