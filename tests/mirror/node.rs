//! A node with one copy of a mirrored volume: engine, store, transport, and a driver between them and the catalogue.

use super::catalogue::Catalogue;
use super::rig::{self, Started};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tandem::protocol::{Generation, Memory, Record, Wish};
use tandem::replica::engine::{
    CatalogueRequest, EngineHandle, IoChoice, MirrorConfig, MirrorInput, MirrorStatus, SealReserve,
};
use tandem::replica::peer::{Endpoint, Event, Party, Security, Session};
use tandem::replica::pool::Promises;
use tandem::store::map::Entry;
use tandem::tls::{Credentials, Name};
use tandem::volume::{BootId, ClusterId, InstanceId, SnapshotId, VolumeId};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// How often the driver looks into the catalogue.
const LOOK: Duration = Duration::from_millis(50);

pub fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

pub struct Node {
    pub directory: PathBuf,
    pub handle: EngineHandle,
    pub tree: InstanceId,
    pub volume: VolumeId,
    /// It reaches neither the catalogue nor its peers.
    pub isolated: Arc<AtomicBool>,
    /// It is, and its conversations have ended.
    pub cut_off: Arc<AtomicBool>,
    _endpoint: Endpoint,
    driver: tokio::task::JoinHandle<()>,
}

/// What a node of the lab has in its directory: `ids`, `name`, `bytes`, and the credentials of its cluster if it has some.
fn security(directory: &Path, node: &str) -> Security {
    let credentials = directory.join("credentials");
    if credentials.exists() {
        return Security::Tls(Arc::new(Credentials::open(&credentials).expect("good certificates")));
    }
    Security::Off { cluster: ClusterId::from_bytes([7; 16]), node: name(node) }
}

impl Node {
    /// Starts the engine in this process and opens the copy.
    pub async fn start(directory: &Path) -> Self {
        let bytes = std::fs::read_to_string(directory.join("bytes")).expect("bytes").parse().expect("a number");
        let started = rig::start_engine(directory, IoChoice::Auto, bytes).await;
        Self::open(directory, started).await
    }

    /// The same where nobody knows what an engine before this one has left.
    pub async fn start_unknowing(directory: &Path) -> Self {
        let bytes = std::fs::read_to_string(directory.join("bytes")).expect("bytes").parse().expect("a number");
        let started = rig::start_engine(directory, IoChoice::Auto, bytes).await;
        Self::open_with(directory, started, Memory::Lost).await
    }

    /// Opens the copy with an engine that runs.
    pub async fn open(directory: &Path, started: Started) -> Self {
        Self::open_with(directory, started, Memory::Kept).await
    }

    async fn open_with(directory: &Path, started: Started, memory: Memory) -> Self {
        let Started { handle, recovered, tree, volume } = started;
        let catalogue = Catalogue::at(directory.parent().expect("the lab"));
        let node = std::fs::read_to_string(directory.join("name")).expect("a name");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let endpoint = Endpoint::listen(listener, security(directory, &node));
        let (session, events) = endpoint.open(volume, tree, Generation(1)).expect("not open");
        let session = Arc::new(session);
        let relay = directory.join("relay");
        match relay.exists() {
            true => std::fs::write(&relay, address).expect("write"),
            false => catalogue.set_node(tree, &node, &address),
        }
        let configuration = catalogue.read();
        let (requests, asked) = mpsc::channel(8);
        let reserve = SealReserve::default();
        let intact = configuration.is_member(tree);
        let config = MirrorConfig {
            tree,
            volume,
            session: Arc::clone(&session),
            boot: BootId::from_bytes([9; 16]),
            memory,
            first: Record { configuration, intact },
            reserve: reserve.clone(),
            requests,
        };
        handle.reattach(recovered).await;
        handle.open_mirror(config).await.expect("opens");
        let [isolated, cut_off] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let (told, cut, done) = (handle.clone(), Arc::clone(&isolated), Arc::clone(&cut_off));
        let driver = Driver { handle: told, catalogue, volume, tree, session, reserve, isolated: cut, cut_off: done };
        let driver = tokio::spawn(driver.run(events, asked));
        Self {
            directory: directory.to_path_buf(),
            handle,
            tree,
            volume,
            isolated,
            cut_off,
            _endpoint: endpoint,
            driver,
        }
    }

    /// Ends the copy; the engine goes with the handle.
    pub async fn stop(self) {
        self.driver.abort();
        let _ = self.driver.await;
        self.handle.close_mirror(self.volume).await.expect("closes");
        self.handle.close_tree(self.tree).await.expect("closes");
    }

    pub async fn status(&self) -> MirrorStatus {
        self.handle.mirror_status(self.volume).await.expect("an engine").expect("is open")
    }

    /// What a snapshot has: crc32c of each block that is not zero.
    pub async fn contents(&self, snapshot: SnapshotId) -> BTreeMap<u64, u32> {
        let plan = super::until("the snapshot to be done", async || {
            let plan = self.handle.inspect(self.tree, move |store| store.reader(snapshot)).await.expect("is open");
            plan.ok()
        });
        let plan = plan.await;
        let data = std::fs::read(self.directory.join("tree/data")).expect("a file");
        let mut found = BTreeMap::new();
        let mut block = 0;
        while block < plan.blocks() {
            let (entry, count) = plan.run(block, (plan.blocks() - block).min(1 << 20) as u32);
            if let Entry::Data(physical) = entry {
                for at in 0..u64::from(count) {
                    let from = (u64::from(physical.0) + at) as usize * 4096;
                    let bytes = &data[from..from + 4096];
                    if bytes.iter().any(|byte| *byte != 0) {
                        found.insert(block + at, crc32c::crc32c(bytes));
                    }
                }
            }
            block += u64::from(count);
        }
        found
    }
}

struct Driver {
    handle: EngineHandle,
    catalogue: Catalogue,
    volume: VolumeId,
    tree: InstanceId,
    session: Arc<Session>,
    reserve: SealReserve,
    isolated: Arc<AtomicBool>,
    cut_off: Arc<AtomicBool>,
}

/// What was seen of the catalogue.
#[derive(Default)]
struct Seen {
    /// `None`: nothing yet.
    client: Option<Option<InstanceId>>,
    configuration: Option<tandem::protocol::Configuration>,
    wish: Option<Wish>,
    nodes: BTreeMap<InstanceId, (String, String)>,
}

impl Driver {
    async fn run(self, mut events: mpsc::Receiver<Event>, mut asked: mpsc::Receiver<CatalogueRequest>) {
        let mut seen = Seen::default();
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                Some(event) = events.recv() => self.tell(MirrorInput::Peer(event)).await,
                Some(request) = asked.recv() => self.ask(request).await,
                _ = look.tick() => self.look(&mut seen).await,
            }
        }
    }

    async fn tell(&self, input: MirrorInput) {
        let _ = self.handle.tell_mirror(self.volume, input).await;
    }

    async fn ask(&self, request: CatalogueRequest) {
        let isolated = self.isolated.load(Ordering::SeqCst);
        match request {
            CatalogueRequest::Propose { expected, next } => {
                let outcome = match isolated {
                    true => tandem::protocol::Outcome::Ambiguous,
                    false => self.catalogue.propose(expected, &next),
                };
                self.tell(MirrorInput::Proposed { stamp: next.stamp, outcome }).await;
            }
            CatalogueRequest::Read if isolated => {}
            CatalogueRequest::Read => {
                self.tell(MirrorInput::Client { client: self.catalogue.client(), term: None }).await;
                self.tell(MirrorInput::Configuration(Box::new(self.catalogue.read()))).await;
            }
        }
    }

    async fn look(&self, seen: &mut Seen) {
        self.reserve.settle(self.tree, 0);
        self.reserve.offer(Promises::default(), 1 << 30, u64::MAX);
        if self.isolated.load(Ordering::SeqCst) {
            std::mem::take(&mut seen.nodes).into_keys().for_each(|copy| self.session.remove_peer(copy));
            seen.configuration = None;
            return self.cut_off.store(true, Ordering::SeqCst);
        }
        let client = self.catalogue.client();
        if seen.client != Some(client) {
            // Before anything that could make it serve.
            seen.client = Some(client);
            self.tell(MirrorInput::Client { client, term: None }).await;
        }
        let configuration = self.catalogue.read();
        if seen.configuration.as_ref() != Some(&configuration) {
            seen.configuration = Some(configuration.clone());
            self.tell(MirrorInput::Configuration(Box::new(configuration))).await;
        }
        let wish = self.catalogue.wish();
        if let Some(wish) = wish.clone().filter(|_| seen.wish != wish) {
            self.tell(MirrorInput::Wish(wish)).await;
        }
        seen.wish = wish;
        for (copy, node) in self.catalogue.nodes() {
            if copy != self.tree && seen.nodes.get(&copy) != Some(&node) {
                let party = Party { node: name(&node.0), copy };
                self.session.add_peer(party, node.1.parse().expect("an address"));
                seen.nodes.insert(copy, node);
            }
        }
    }
}
