//! An installation whose processes die where they are told, and everything that a call may leave behind in it.

use crate::support::installation::Installation;
use crate::support::mounted::may_be_repeated;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tandem::rpc::control::{ListPoolsRequest, ListSnapshotsRequest, ListVolumesRequest};
use tandem::rpc::csi;
use tonic::Status;

/// How long a call may take to converge, and background work to end.
const PATIENCE: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(25);

/// Who dies when a point is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The process that passes it.
    Itself,
    /// The whole server: both processes and their parent.
    Server,
    /// The CSI process, while the engine passes the point and goes on.
    Csi,
}

/// A point and which of its passes in one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    pub name: String,
    pub pass: u32,
}

/// Everything there is, in numbers; what a call leaves behind shows as a difference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    csi_volumes: usize,
    csi_snapshots: usize,
    volumes: usize,
    snapshots: usize,
    promised: u64,
    trees: usize,
    records: usize,
    trash: usize,
    staged: usize,
    devices: usize,
}

/// The installation. Dropped, it is gone.
pub struct Site {
    pub tandem: Installation,
    crash: PathBuf,
}

impl Site {
    pub async fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("tandem-crash-").tempdir().expect("directory");
        let crash = dir.path().join("crash");
        fs::create_dir(&crash).expect("directory");
        fs::write(crash.join("hits"), "").expect("write");
        let pool = |name: &str, path: &str| format!("{name}={}", dir.path().join(path).display());
        let (first, other) = (pool("default", "pool"), pool("other", "other"));
        let variables = [("TANDEM_CRASH_DIR", crash.clone())];
        let variables = variables.each_ref().map(|(name, path)| (*name, path.as_path()));
        let tandem = Installation::start_in(dir, &["--pool", &first, "--pool", &other], &variables).await;
        Self { tandem, crash }
    }

    /// Forgets the points that were passed.
    pub fn forget(&self) {
        fs::write(self.crash.join("hits"), "").expect("write");
    }

    /// The points that were passed since, in order.
    pub fn hits(&self) -> Vec<Point> {
        let mut passes = BTreeMap::new();
        let text = fs::read_to_string(self.crash.join("hits")).expect("hits");
        let points = text.lines().map(|name| {
            let pass = passes.entry(name.to_owned()).and_modify(|pass| *pass += 1).or_insert(1);
            Point { name: name.to_owned(), pass: *pass }
        });
        points.collect()
    }

    /// The next process that passes the point for the `pass`th time dies, or takes the server with it.
    pub fn arm(&self, point: &Point, victim: Victim) {
        let victim = match victim {
            Victim::Itself => "self".to_owned(),
            Victim::Server => "parent".to_owned(),
            Victim::Csi => self.tandem.pids("csi").first().expect("CSI runs").to_string(),
        };
        let fresh = self.crash.join("armed.new");
        fs::write(&fresh, format!("{} {} {victim}", point.name, point.pass)).expect("write");
        fs::rename(fresh, self.crash.join("armed")).expect("rename");
    }

    fn is_armed(&self) -> bool {
        self.crash.join("armed").exists()
    }

    /// Waits until the armed point was passed: some are passed after the answer.
    pub async fn fired(&self) -> bool {
        let began = Instant::now();
        while self.is_armed() {
            if began.elapsed() > PATIENCE {
                fs::remove_file(self.crash.join("armed")).expect("nobody else removes it now");
                return false;
            }
            tokio::time::sleep(PAUSE).await;
        }
        true
    }

    /// Starts the server again if it was killed.
    pub async fn revive(&mut self) {
        if self.tandem.has_ended() {
            self.tandem.start_again().await;
        }
    }

    /// Repeats the call until it is answered, as a sidecar does.
    pub async fn insist<T>(&mut self, mut call: impl AsyncFnMut(&Installation) -> Result<T, Status>) -> T {
        let began = Instant::now();
        loop {
            match call(&self.tandem).await {
                Ok(answer) => return answer,
                Err(status) => {
                    assert!(may_be_repeated(&status), "a final answer: {status}\n{}", self.tandem.log());
                    assert!(began.elapsed() < PATIENCE, "it does not converge: {status}\n{}", self.tandem.log());
                }
            }
            self.revive().await;
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn state(&mut self) -> State {
        let list = |token: String| csi::ListVolumesRequest { max_entries: 0, starting_token: token };
        let volumes = self.insist(async |t| t.controller().list_volumes(list(String::new())).await).await.into_inner();
        let snapshots =
            self.insist(async |t| t.controller().list_snapshots(csi::ListSnapshotsRequest::default()).await).await;
        let pools = self.insist(async |t| t.control().list_pools(ListPoolsRequest {}).await).await.into_inner().pools;
        let copies = self.insist(async |t| t.control().list_volumes(ListVolumesRequest {}).await).await.into_inner();
        let sealed = self.insist(async |t| t.control().list_snapshots(ListSnapshotsRequest {}).await).await;
        let roots = ["pool", "other"].map(|pool| self.tandem.dir().join(pool));
        let trees: Vec<_> = roots.iter().flat_map(|root| entries(&root.join("trees"))).collect();
        State {
            csi_volumes: volumes.entries.len(),
            csi_snapshots: snapshots.into_inner().entries.len(),
            devices: copies.volumes.iter().filter(|v| !v.device.is_empty()).count(),
            volumes: copies.volumes.len(),
            snapshots: sealed.into_inner().snapshots.len(),
            promised: pools.iter().map(|pool| pool.promised_bytes).sum(),
            records: trees.iter().map(|tree| entries(&tree.join("records")).len()).sum(),
            trees: trees.len(),
            trash: roots.iter().map(|root| entries(&root.join("trash")).len()).sum(),
            staged: entries(&self.tandem.dir().join("staged")).len(),
        }
    }

    /// The state once it is `wanted`, or what it still is after a while.
    pub async fn settled(&mut self, wanted: &State) -> State {
        let began = Instant::now();
        loop {
            let state = self.state().await;
            if state == *wanted || began.elapsed() > PATIENCE / 3 {
                return state;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The state when nothing changes any more.
    pub async fn quiet(&mut self) -> State {
        let began = Instant::now();
        let mut state = self.state().await;
        let mut same = 0;
        while same < 20 {
            tokio::time::sleep(PAUSE * 2).await;
            let now = self.state().await;
            // A disk may take its time for what is to be removed.
            let is_over = now == state && (now.trash == 0 || began.elapsed() > PATIENCE);
            same = if is_over { same + 1 } else { 0 };
            state = now;
        }
        state
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
