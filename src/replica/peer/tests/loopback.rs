//! Conversations over real sockets on the loopback interface. Waits are for conditions, as long as a slow machine needs.

use super::samples::{copy, name, payload, volume, write};
use crate::protocol::{Frame, Generation, Incarnation, Message, SILENCE, SerialNumber, Stamp};
use crate::replica::peer::{Endpoint, Event, Heard, Line, MAX_IN_FLIGHT, Party, Payload, Security, SendError, Session};
use crate::tls::{Authority, Credentials, Leaf, Role, Validity};
use crate::volume::{ClusterId, InstanceId, MAX_REQUEST_BLOCKS};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

/// When a condition is given up: a test that waits so long has failed.
pub const LONG: Duration = Duration::from_secs(120);

/// How often an end looks whether something was said: an engine is told.
const LOOK: Duration = Duration::from_millis(1);

/// A cluster's authority in a directory of its own.
pub struct Lab {
    pub directory: tempfile::TempDir,
    pub authority: Authority,
}

pub fn lab() -> Lab {
    let directory = tempfile::Builder::new().prefix("tandem-peer-").tempdir().expect("a directory");
    let authority = Authority::create(&directory.path().join("authority"), name("lab"), Validity::days(1));
    Lab { authority: authority.expect("made"), directory }
}

impl Lab {
    /// A certificate in a directory of its own, which must be new.
    pub fn issue(&self, role: Role, node: &str, directory: &str) -> PathBuf {
        let leaf = Leaf { role, name: name(node), addresses: Vec::new() };
        let out = self.directory.path().join(directory);
        self.authority.issue(&leaf, Validity::days(1)).expect("issued").write(&out).expect("written");
        out
    }

    /// A node with a certificate of its own, whose peers may be silent for so long.
    pub async fn node(&self, node: &str, silence: Duration) -> Node {
        let credentials = self.issue(Role::Node, node, node);
        Node::start(node, Security::Tls(open(&credentials)), silence).await
    }
}

pub fn open(directory: &Path) -> Arc<Credentials> {
    Arc::new(Credentials::open(directory).expect("good certificates"))
}

/// A node of the tests.
pub struct Node {
    pub endpoint: Endpoint,
    pub address: SocketAddr,
    node: String,
}

/// One copy's end.
pub struct End {
    pub session: Session,
    pub events: Receiver<Event>,
    lines: BTreeMap<InstanceId, Arc<Line>>,
}

impl Node {
    pub async fn start(node: &str, security: Security, silence: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        Self { endpoint: Endpoint::listen_with(listener, security, silence), address, node: node.into() }
    }

    pub fn party(&self, number: u8) -> Party {
        Party { node: name(&self.node), copy: copy(number) }
    }

    /// Opens copy `number` of the volume, which has another copy over there.
    pub fn open(&self, number: u8, other: &Node, theirs: u8) -> End {
        let (session, events) = self.endpoint.open(volume(), copy(number), Generation(2)).expect("not open");
        session.add_peer(other.party(theirs), other.address);
        End { session, events, lines: BTreeMap::new() }
    }
}

impl End {
    /// The next event.
    pub async fn next(&mut self) -> Event {
        timeout(LONG, self.event()).await.expect("an event")
    }

    async fn event(&mut self) -> Event {
        loop {
            if let Some(message) = self.heard() {
                return message;
            }
            if let Ok(event) = timeout(LOOK, self.events.recv()).await {
                let event = event.expect("the session is there");
                if let Event::Connected(copy) = &event {
                    self.lines.extend(self.session.line(*copy).map(|line| (*copy, line)));
                }
                return event;
            }
        }
    }

    /// What was said, as an engine reads it.
    fn heard(&mut self) -> Option<Event> {
        for (copy, line) in self.lines.clone() {
            match line.receive() {
                Heard::Event(message) => return Some(message),
                Heard::Nothing | Heard::Later => {}
                Heard::Ended => drop(self.lines.remove(&copy)),
            }
        }
        None
    }

    /// Takes everything, for ever.
    async fn take_all(mut self) {
        loop {
            self.event().await;
        }
    }

    /// Skips events until this one.
    pub async fn until(&mut self, wanted: &Event) {
        while self.next().await != *wanted {}
    }
}

/// Sends a write one way, and says whether the very next event at the other end is that write.
pub async fn says(from: &End, here: InstanceId, to: &mut End, there: InstanceId, serial: u64) {
    let (message, payload) = (write(serial, 2), payload(2));
    from.session.send(there, &message, &payload).expect("taken");
    from.session.flush();
    assert_eq!(to.next().await, Event::Received { from: here, message, payload: payload.clone() });
    assert_eq!(payload.check(), Ok(()));
}

/// Two nodes, and a volume with copy 1 on the first and copy 2 on the second, connected, whom no pause of a busy machine
/// parts.
pub async fn pair(lab: &Lab) -> (Node, Node, End, End) {
    pair_with(lab, LONG).await
}

async fn pair_with(lab: &Lab, silence: Duration) -> (Node, Node, End, End) {
    let (first, second) = (lab.node("node-1", silence).await, lab.node("node-2", silence).await);
    let (one, two) = connected(&first, &second).await;
    (first, second, one, two)
}

async fn connected(first: &Node, second: &Node) -> (End, End) {
    let (mut one, mut two) = (first.open(1, second, 2), second.open(2, first, 1));
    one.until(&Event::Connected(copy(2))).await;
    two.until(&Event::Connected(copy(1))).await;
    (one, two)
}

#[tokio::test]
async fn messages_and_data_arrive_with_the_crcs_of_their_sender() {
    let (_first, _second, mut one, mut two) = pair(&lab()).await;
    for serial in 0..20 {
        says(&one, copy(1), &mut two, copy(2), serial).await;
        says(&two, copy(2), &mut one, copy(1), serial).await;
    }
    let frame = Frame { stamp: Stamp::default(), incarnation: Incarnation(1) };
    let message = Message::Prepared { frame, serial: SerialNumber(1), result: Ok(()) };
    one.session.send(copy(2), &message, &Payload::default()).expect("an answer without data");
    one.session.flush();
    assert_eq!(two.next().await, Event::Received { from: copy(1), message, payload: Payload::default() });
    assert_eq!(one.session.send(copy(3), &write(1, 1), &payload(1)), Err(SendError::NoPeer));
    assert_eq!(one.session.send(copy(2), &write(1, 1), &payload(2)), Err(SendError::Payload));
}

#[tokio::test]
async fn without_encryption_two_nodes_that_both_have_it_off_talk() {
    let cluster = ClusterId::random();
    let off = |node| Security::Off { cluster, node: name(node) };
    let (first, second) =
        (Node::start("node-1", off("node-1"), LONG).await, Node::start("node-2", off("node-2"), LONG).await);
    let (mut one, mut two) = connected(&first, &second).await;
    says(&one, copy(1), &mut two, copy(2), 1).await;
    says(&two, copy(2), &mut one, copy(1), 1).await;
    large_messages_cross(&mut one, &mut two).await;
}

/// Hears these writes, in order and with their data.
async fn hears(end: &mut End, from: InstanceId, serials: std::ops::Range<u64>, blocks: u8) {
    for serial in serials {
        let (message, payload) = (write(serial, blocks), payload(blocks));
        assert_eq!(end.next().await, Event::Received { from, message, payload });
    }
}

/// More than sockets keep, both ways at once: nobody waits for the other to read first.
async fn large_messages_cross(one: &mut End, two: &mut End) {
    for serial in 0..12 {
        one.session.send(copy(2), &write(serial, u8::MAX), &payload(u8::MAX)).expect("taken");
        two.session.send(copy(1), &write(serial, u8::MAX), &payload(u8::MAX)).expect("taken");
    }
    one.session.flush();
    two.session.flush();
    tokio::join!(hears(one, copy(2), 0..12, u8::MAX), hears(two, copy(1), 0..12, u8::MAX));
    says(one, copy(1), two, copy(2), 12).await;
}

#[tokio::test]
async fn large_messages_cross_and_arrive_whole() {
    let (_first, _second, mut one, mut two) = pair(&lab()).await;
    large_messages_cross(&mut one, &mut two).await;
}

#[tokio::test]
async fn a_peer_that_goes_is_silent_and_connected_again_when_it_is_back() {
    let lab = lab();
    let (first, second, mut one, two) = pair_with(&lab, SILENCE).await;
    let before = two.session.incarnation();
    drop(two);
    one.until(&Event::Silent(copy(2))).await;
    assert_eq!(one.session.send(copy(2), &write(1, 1), &payload(1)), Err(SendError::Disconnected));
    let mut two = second.open(2, &first, 1);
    assert_ne!(two.session.incarnation(), before);
    one.until(&Event::Connected(copy(2))).await;
    two.until(&Event::Connected(copy(1))).await;
    // The other way round: the one that calls goes.
    drop(one);
    two.until(&Event::Silent(copy(1))).await;
    let mut one = first.open(1, &second, 2);
    one.until(&Event::Connected(copy(2))).await;
    two.until(&Event::Connected(copy(1))).await;
}

#[tokio::test]
async fn a_peer_that_never_was_is_silent_once() {
    let lab = lab();
    let (first, second) = (lab.node("node-1", SILENCE).await, lab.node("node-2", SILENCE).await);
    let (mut one, mut two) = (first.open(1, &second, 2), second.open(3, &first, 4));
    // Neither is what the other looks for.
    assert_eq!(one.next().await, Event::Silent(copy(2)));
    assert_eq!(two.next().await, Event::Silent(copy(4)));
    assert!(one.events.is_empty() && two.events.is_empty());
}

#[tokio::test]
async fn a_receiver_that_does_not_read_stops_the_sender_at_its_bound() {
    let (_first, _second, mut one, two) = pair_with(&lab(), SILENCE).await;
    let blocks = MAX_REQUEST_BLOCKS as usize;
    let request = crate::protocol::Request::Write(super::samples::range(0, MAX_REQUEST_BLOCKS));
    let frame = Frame { stamp: Stamp::default(), incarnation: Incarnation(1) };
    let message = Message::Prepare { frame, serial: SerialNumber(1), floor: SerialNumber(0), request };
    let data = Payload::new(vec![1; blocks * 4096].into()).expect("a request's data");
    let (mut taken, mut full) = (0, false);
    // Until the other side has taken nothing for so long that it counts as silent.
    while one.events.try_recv() != Ok(Event::Silent(copy(2))) {
        match one.session.send(copy(2), &message, &data) {
            Ok(()) => {
                one.session.flush();
                taken += data.data().len();
            }
            Err(error) => {
                full |= error == SendError::Full;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        assert!(one.session.in_flight(copy(2)) <= MAX_IN_FLIGHT);
    }
    // What waits here, what waits there, and what the kernel keeps between: not everything that could have been sent.
    assert!(full && taken < 512 << 20, "{taken}");
    // As soon as it reads again the two find each other again.
    let reader = tokio::spawn(two.take_all());
    one.until(&Event::Connected(copy(2))).await;
    reader.abort();
}

#[tokio::test]
async fn whoever_was_refused_is_told_when_there_is_room() {
    let (_first, _second, mut one, two) = pair(&lab()).await;
    let (message, data) = (write(1, 200), payload(200));
    // Not a single await: nothing is written meanwhile.
    while one.session.send(copy(2), &message, &data).is_ok() {}
    assert_eq!(one.session.send(copy(2), &message, &data), Err(SendError::Full));
    one.session.flush();
    let reader = tokio::spawn(two.take_all());
    one.until(&Event::Room(copy(2))).await;
    assert_eq!(one.session.send(copy(2), &message, &data), Ok(()));
    reader.abort();
}

#[tokio::test]
async fn whoever_asks_for_room_before_is_told_when_there_is_some() {
    let (_first, _second, mut one, two) = pair(&lab()).await;
    let (message, data) = (write(1, 200), payload(200));
    let bytes = data.data().len();
    while one.session.has_room(copy(2), bytes).is_ok() {
        one.session.send(copy(2), &message, &data).expect("as it was said, or nearly");
    }
    assert_eq!(one.session.has_room(copy(2), bytes), Err(SendError::Full));
    assert_eq!(one.session.has_room(copy(3), bytes), Err(SendError::NoPeer));
    one.session.flush();
    let reader = tokio::spawn(two.take_all());
    one.until(&Event::Room(copy(2))).await;
    assert_eq!(one.session.has_room(copy(2), bytes), Ok(()));
    reader.abort();
}

/// Each time the handshake was done again at once, and everything was said again.
#[tokio::test]
async fn connections_that_do_not_hold_are_begun_ever_more_slowly() {
    let began = std::time::Instant::now();
    let (_first, _second, mut one, _two) = pair(&lab()).await;
    for _ in 0..3 {
        one.session.reconnect(copy(2));
        one.until(&Event::Connected(copy(2))).await;
    }
    // One that held meanwhile, on a busy machine, took a second.
    assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_that_this_end_closes_is_followed_by_another_one() {
    let (_first, _second, mut one, mut two) = pair(&lab()).await;
    two.session.line(copy(1)).expect("connected").close();
    one.until(&Event::Connected(copy(2))).await;
    two.until(&Event::Connected(copy(1))).await;
    says(&one, copy(1), &mut two, copy(2), 1).await;
    says(&two, copy(2), &mut one, copy(1), 2).await;
}

/// One had a queue and nobody who wrote it, until the process was restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_two_threads_replace_at_once_is_called() {
    let lab = lab();
    let (first, second) = (lab.node("node-1", LONG).await, lab.node("node-2", LONG).await);
    let mut two = second.open(2, &first, 1);
    for _ in 0..5 {
        let (session, mut events) = first.endpoint.open(volume(), copy(1), Generation(2)).expect("not open");
        session.add_peer(second.party(2), second.address);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..100).for_each(|_| session.add_peer(second.party(2), second.address)));
            (0..100).for_each(|_| session.reconnect(copy(2)));
        });
        let connected = async { while events.recv().await != Some(Event::Connected(copy(2))) {} };
        timeout(LONG, connected).await.expect("it is called");
        while session.line(copy(2)).is_none() {
            tokio::time::sleep(LOOK).await;
        }
        two.until(&Event::Connected(copy(1))).await;
    }
}

#[tokio::test]
async fn new_certificates_are_used_for_new_connections_and_open_ones_go_on() {
    let lab = lab();
    let (_first, second, mut one, mut two) = pair(&lab).await;
    let newer = lab.issue(Role::Node, "node-2", "newer");
    let shown = super::refusals::shown_by(&second, &lab).await;
    for file in ["tls.crt", "tls.key"] {
        std::fs::rename(newer.join(file), lab.directory.path().join("node-2").join(file)).expect("moved");
    }
    assert_ne!(super::refusals::shown_by(&second, &lab).await, shown);
    says(&one, copy(1), &mut two, copy(2), 1).await;
    says(&two, copy(2), &mut one, copy(1), 1).await;
}
