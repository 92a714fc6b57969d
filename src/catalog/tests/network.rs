//! What the network does: strangers, servers that come and go, answers that are lost.

use super::rig::{Lab, Served, anywhere, embedded, volume};
use crate::catalog::{
    Catalog, CatalogError, CreateError, Embedded, Object, Remote, Seen, Stored, UpdateError, Volume,
    VolumeConfiguration,
};
use crate::tls::{Credentials, Loaded, Role};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(60);

fn unreachable_text(error: CatalogError) -> String {
    match error {
        CatalogError::Unreachable { .. } => error.to_string(),
        other => panic!("not unreachable: {other}"),
    }
}

#[tokio::test]
async fn strangers_and_other_roles_are_refused() {
    let (_directory, catalog) = embedded();
    let (lab, other) = (Lab::new(), Lab::new());
    let served = Served::start(&lab, catalog.clone(), anywhere()).await;
    // Each of them trusts its own cluster only.
    let stranger = other.client(served.address, Role::Controller, "controller");
    let text = unreachable_text(stranger.list::<Volume>().await.expect_err("a stranger"));
    assert!(text.contains("not signed by this cluster's authority"), "{text}");
    // A stranger that trusts this cluster is not let in: and it is known that its write was not executed.
    let spy = Loaded::unchecked(&lab.issue(Role::Node, "n1"), &other.issue(Role::Controller, "spy"));
    let spy = Remote::new(&served.address.to_string(), Arc::new(Credentials::fixed(spy)));
    let Err(CreateError::Failed(error)) = spy.create(volume("data")).await else { panic!("certainly not executed") };
    let text = unreachable_text(error);
    assert!(text.contains("refuses this one's certificate"), "{text}");
    // A node that serves is no catalogue.
    let node = Served::start_as(lab.credentials(Role::Node, "n1"), catalog, anywhere()).await;
    let client = lab.client(node.address, Role::Controller, "controller");
    let refused = client.create(volume("data")).await.expect_err("not a controller");
    let CreateError::Failed(error) = refused else { panic!("certainly not executed: {refused}") };
    let text = unreachable_text(error);
    assert!(text.contains("a controller is expected"), "{text}");
    // Whoever speaks no TLS gets nothing and disturbs nobody.
    let mut plain = TcpStream::connect(served.address).await.expect("connects");
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("sends");
    let mut answer = Vec::new();
    drop(timeout(LONG, plain.read_to_end(&mut answer)).await.expect("it is closed"));
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let friend = lab.client(served.address, Role::Node, "n2");
    assert_eq!(friend.list::<Volume>().await.expect("let in"), []);
}

#[tokio::test]
async fn certificates_are_replaced_without_a_stop() {
    let (_directory, catalog) = embedded();
    let (old, new) = (Lab::new(), Lab::new());
    let directory = old.issue(Role::Controller, "controller");
    let served = Served::start(&old, catalog, anywhere()).await;
    let before = old.client(served.address, Role::Node, "n1");
    before.list::<Volume>().await.expect("let in");
    let after = new.client(served.address, Role::Node, "n1");
    after.list::<Volume>().await.expect_err("another cluster");
    for file in ["ca.crt", "tls.crt", "tls.key"] {
        let from = new.issue(Role::Controller, "controller").join(file);
        std::fs::copy(from, directory.join(file)).expect("replaced");
    }
    after.list::<Volume>().await.expect("the server shows its new certificate");
    before.list::<Volume>().await.expect("a connection that is open goes on");
    let late = old.client(served.address, Role::Node, "n2");
    late.list::<Volume>().await.expect_err("the old authority counts no more");
}

#[tokio::test]
async fn a_server_that_is_away_is_said_to_be_and_watchers_list_when_it_is_back() {
    let (_directory, catalog) = embedded();
    let lab = Lab::new();
    let served = Served::start(&lab, catalog.clone(), anywhere()).await;
    let (address, client) = (served.address, lab.client(served.address, Role::Controller, "controller"));
    let mut watch = client.watch();
    assert_eq!(timeout(LONG, watch.next()).await.expect("connects"), Some(Seen::FellBehind));
    let stored = client.create(volume("before")).await.expect("created");
    assert!(matches!(timeout(LONG, watch.next()).await.expect("heard"), Some(Seen::Changed(_))));
    timeout(LONG, served.stop()).await.expect("a watcher does not hold it up");
    let text = unreachable_text(client.get::<Volume>(&stored.object.key()).await.expect_err("away"));
    assert!(text.contains("check that `tandem controller` runs"), "{text}");
    let failed = client.update(stored.clone()).await.expect_err("away");
    assert!(matches!(failed, UpdateError::Failed(CatalogError::Unreachable { .. })), "it was not sent: {failed}");
    catalog.create(volume("meanwhile")).await.expect("created");
    let served = Served::start(&lab, catalog.clone(), address).await;
    assert_eq!(timeout(LONG, watch.next()).await.expect("back"), Some(Seen::FellBehind));
    assert_eq!(client.list::<Volume>().await.expect("lists").len(), 2);
    let after = catalog.create(volume("after")).await.expect("created");
    let heard = timeout(LONG, watch.next()).await.expect("heard");
    assert!(matches!(heard, Some(Seen::Changed(change)) if change.key == after.object.key()));
    served.stop().await;
}

/// Which answers of the server pass.
#[derive(Clone)]
enum Answers {
    All,
    /// All until this object has another version: the connection is cut at the answer to what changed it.
    Until(Embedded, Stored<VolumeConfiguration>),
    None,
    /// Neither answers nor requests: connections stay open, and nothing goes through.
    Nothing,
}

impl Answers {
    async fn pass(&self) -> bool {
        match self {
            Self::All => true,
            Self::Until(catalog, before) => {
                let now = catalog.get::<VolumeConfiguration>(&before.object.key()).await.expect("reads");
                now.is_some_and(|now| now.version == before.version)
            }
            Self::None | Self::Nothing => false,
        }
    }
}

/// Carries bytes between clients and a server, and loses answers.
pub struct Relay {
    pub address: SocketAddr,
    answers: watch::Sender<Answers>,
}

impl Relay {
    pub async fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind(anywhere()).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (answers, _) = watch::channel(Answers::All);
        let control = answers.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, server, control.clone()));
            }
        });
        Self { address, answers }
    }

    /// No answer passes any more: connections are cut where one would.
    pub fn cut(&self, cut: bool) {
        self.answers.send_replace(if cut { Answers::None } else { Answers::All });
    }

    /// Nothing goes through any more, and nobody is told.
    pub fn swallow(&self) {
        self.answers.send_replace(Answers::Nothing);
    }

    /// The answer to what changes this object is lost, and everything else passes.
    pub fn cut_after_a_change(&self, catalog: Embedded, stored: Stored<VolumeConfiguration>) {
        self.answers.send_replace(Answers::Until(catalog, stored));
    }
}

/// Until one end is closed, or an answer comes that may not pass.
async fn carry(client: TcpStream, server: SocketAddr, control: watch::Sender<Answers>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let asked = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            if matches!(*control.borrow(), Answers::Nothing) {
                continue;
            }
            if to_server.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    let answered = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
            let answers = control.borrow().clone();
            if !answers.pass().await {
                // Long enough for the server to have done what it was asked for.
                tokio::time::sleep(Duration::from_millis(500)).await;
                if let Answers::Until(..) = answers {
                    control.send_replace(Answers::All);
                }
                return;
            }
            if to_client.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = asked => {}
        () = answered => {}
    }
}

/// The rule for whoever gets no answer: read it back, and write again what is not there. The server may still be at it.
async fn resolve(client: &Catalog, wanted: &Volume) -> bool {
    let until = Instant::now() + LONG;
    loop {
        let found = client.get::<Volume>(&wanted.key()).await.expect("reads");
        if found.is_some_and(|found| found.object == *wanted) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_ambiguous_and_reading_back_resolves_it() {
    let (_directory, catalog) = embedded();
    let lab = Lab::new();
    let served = Served::start(&lab, catalog.clone(), anywhere()).await;
    let relay = Relay::start(served.address).await;
    let client = lab.client(relay.address, Role::Controller, "controller");
    let stored = client.create(volume("data")).await.expect("created");

    relay.cut(true);
    let mut wanted = stored.clone();
    wanted.object.spec.verify_reads = true;
    let answer = client.update(wanted.clone()).await.expect_err("no answer");
    assert!(matches!(answer, UpdateError::Ambiguous { .. }), "{answer}");
    relay.cut(false);
    assert!(resolve(&client, &wanted.object).await, "the server has executed it");
    let again = client.update(wanted.clone()).await.expect_err("it was executed once, so it cannot be again");
    assert!(matches!(again, UpdateError::Conflict { .. }), "a mistake: a lost answer taken for a lost race");

    relay.cut(true);
    let other = volume("other");
    let answer = client.create(other.clone()).await.expect_err("no answer");
    assert!(matches!(answer, CreateError::Ambiguous { .. }), "{answer}");
    relay.cut(false);
    assert!(resolve(&client, &other).await, "the server has executed it");
    served.stop().await;
}

/// A server that takes the connection and the request and then says nothing.
#[tokio::test]
async fn a_server_that_hangs_is_given_up() {
    let listener = TcpListener::bind(anywhere()).await.expect("a port");
    let lab = Lab::new();
    let client = lab.client(listener.local_addr().expect("an address"), Role::Controller, "controller");
    let answer = timeout(LONG, client.create(volume("data"))).await.expect("it gives up");
    let Err(CreateError::Failed(error)) = answer else { panic!("no handshake, so nothing was sent: {answer:?}") };
    unreachable_text(error);
}

/// Whether a client that says that an update is done is right, when the request never arrives.
async fn says_the_truth(planted: bool) -> bool {
    let (_directory, catalog) = embedded();
    let lab = Lab::new();
    let served = Served::start(&lab, catalog.clone(), anywhere()).await;
    let relay = Relay::start(served.address).await;
    let mut client = Remote::new(&relay.address.to_string(), lab.credentials(Role::Controller, "controller"));
    client.silence_is_consent = planted;
    let mut stored = client.create(volume("data")).await.expect("created");
    relay.swallow();
    stored.object.spec.verify_reads = true;
    let answer = timeout(LONG, client.update(stored.clone())).await.expect("it gives up");
    let there = catalog.get::<Volume>(&stored.object.key()).await.expect("reads").expect("is there").object;
    match answer {
        Ok(_) => there == stored.object,
        Err(UpdateError::Ambiguous { .. }) => true,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_request_that_never_arrives_is_not_taken_for_done() {
    assert!(says_the_truth(false).await);
    assert!(!says_the_truth(true).await, "the planted mistake is not found");
}
