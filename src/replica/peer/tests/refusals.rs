//! Strangers of every kind at the door of a node whose own conversation goes on.

use super::loopback::{End, LONG, Lab, Node, lab, open, pair, says};
use super::samples::{copy, hello, name, volume};
use crate::protocol::Generation;
use crate::replica::peer::Security;
use crate::replica::peer::header::{HEADER, Header, Kind, MAGIC};
use crate::replica::peer::hello::{Hello, Nonce, Party, Reason};
use crate::replica::peer::packet::Packet;
use crate::tls::{Expected, Leaf, Loaded, Role, Validity};
use crate::volume::{ClusterId, VolumeId};
use rustls::pki_types::ServerName;
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Connects to a node, as whoever the certificates say, expecting the node's name.
async fn encrypted(node: &Node, who: &Loaded) -> std::io::Result<TlsStream<TcpStream>> {
    let expected = Expected { role: Some(Role::Node), name: None };
    let connector = TlsConnector::from(who.client(expected).expect("a configuration"));
    let socket = TcpStream::connect(node.address).await?;
    connector.connect(ServerName::IpAddress(node.address.ip().into()), socket).await
}

/// The certificate that a node shows.
pub async fn shown_by(node: &Node, lab: &Lab) -> Vec<u8> {
    let directory = lab.directory.path().join("node-1");
    let stream = encrypted(node, &open(&directory).current()).await.expect("let in");
    stream.get_ref().1.peer_certificates().expect("shown")[0].to_vec()
}

/// The next frame; `None` when the node closes the connection instead.
async fn answer(stream: &mut (impl AsyncRead + Unpin)) -> Option<Packet> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await.ok()?;
    let header = Header::decode(&header).expect("a frame");
    let mut table = vec![0; header.table()];
    stream.read_exact(&mut table).await.ok()?;
    Some(Packet::decode(&header, table.into(), Default::default()).expect("a frame"))
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), packet: &Packet) {
    // The node may have closed the connection already.
    let _ = stream.write_all(&packet.encode(volume()).head).await;
    let _ = stream.flush().await;
}

/// What the node answers to these bytes in the clear.
async fn in_the_clear(node: &Node, bytes: &[u8]) -> Option<Packet> {
    let mut stream = TcpStream::connect(node.address).await.expect("connected");
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    answer(&mut stream).await
}

/// A stranger with certificates gets no further than the TLS handshake.
async fn turned_away(node: &Node, who: &Loaded) {
    if let Ok(mut stream) = encrypted(node, who).await {
        say(&mut stream, &Packet::Hello(hello())).await;
        assert_eq!(answer(&mut stream).await, None);
    }
}

/// The conversation beside is the one that it was: the next event is the next message.
async fn goes_on(one: &mut End, two: &mut End, serial: u64) {
    says(one, copy(1), two, copy(2), serial).await;
    says(two, copy(2), one, copy(1), serial).await;
}

#[tokio::test]
async fn strangers_with_certificates_are_refused_and_disturb_nobody() {
    let (lab, other) = (lab(), lab());
    let (_first, second, mut one, mut two) = pair(&lab).await;
    let trusted = lab.directory.path().join("node-1");
    other.issue(Role::Node, "node-1", "stranger");
    turned_away(&second, &Loaded::unchecked(&trusted, &other.directory.path().join("stranger"))).await;
    goes_on(&mut one, &mut two, 1).await;
    lab.issue(Role::Controller, "node-1", "controller");
    turned_away(&second, &Loaded::unchecked(&trusted, &lab.directory.path().join("controller"))).await;
    goes_on(&mut one, &mut two, 2).await;
    let now = OffsetDateTime::now_utc();
    let over = Validity { from: now - Duration::days(2), until: now - Duration::days(1) };
    let expired = lab.directory.path().join("expired");
    let leaf = Leaf { role: Role::Node, name: name("node-1"), addresses: Vec::new() };
    lab.authority.sign(&leaf, over).expect("signed").write(&expired).expect("written");
    turned_away(&second, &Loaded::unchecked(&trusted, &expired)).await;
    goes_on(&mut one, &mut two, 3).await;
}

#[tokio::test]
async fn plain_connections_garbage_and_huge_frames_are_refused_and_disturb_nobody() {
    let lab = lab();
    let (_first, second, mut one, mut two) = pair(&lab).await;
    let plain = Packet::Hello(Hello { incompatible: 0, ..hello() }).encode(volume()).head;
    assert_eq!(in_the_clear(&second, &plain).await, Some(Packet::Refuse(Reason::Encryption)));
    // Whoever only claims that it is encrypted is not believed.
    let claimed = Packet::Hello(hello()).encode(volume()).head;
    assert_eq!(in_the_clear(&second, &claimed).await, Some(Packet::Refuse(Reason::Encryption)));
    goes_on(&mut one, &mut two, 1).await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"", &[0x16; 600], &MAGIC, b"Tandem, but not a frame of its own"] {
        let mut stream = TcpStream::connect(second.address).await.expect("connected");
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        // An alert, or nothing: no frame, and the connection ends.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert!(!rest.starts_with(&MAGIC));
    }
    goes_on(&mut one, &mut two, 2).await;
    // With a good certificate, too: a handshake has no data, and a frame has a limit.
    let who = open(&lab.directory.path().join("node-1")).current();
    let with_data = Header { blocks: 256, ..Header::new(Kind::Hello, volume()) }.encode();
    let too_large = Header { blocks: 257, ..Header::new(Kind::Prepare, volume()) }.encode();
    for header in [with_data, too_large] {
        let mut stream = encrypted(&second, &who).await.expect("let in");
        stream.write_all(&header).await.expect("written");
        assert_eq!(answer(&mut stream).await, None);
    }
    goes_on(&mut one, &mut two, 3).await;
}

#[tokio::test]
async fn a_replayed_conversation_is_refused_and_disturbs_nobody() {
    let lab = lab();
    let (first, second, mut one, mut two) = pair(&lab).await;
    let who = open(&lab.directory.path().join("node-1")).current();
    let hello = Hello { cluster: lab.authority.cluster(), from: first.party(1), to: second.party(2), ..hello() };
    // The very bytes of a good conversation of another incarnation: what confirmed that one does not confirm this one.
    let mut earlier = None;
    for _ in 0..2 {
        let mut stream = encrypted(&second, &who).await.expect("let in");
        say(&mut stream, &Packet::Hello(hello.clone())).await;
        let Some(Packet::Welcome(theirs, echo)) = answer(&mut stream).await else { panic!("a good hello") };
        assert_eq!(echo, hello.nonce);
        let confirm = *earlier.get_or_insert(Nonce([9; 16]));
        assert_ne!(theirs.nonce, confirm);
        earlier = Some(theirs.nonce);
        say(&mut stream, &Packet::Confirm(confirm)).await;
        assert_eq!(answer(&mut stream).await, Some(Packet::Refuse(Reason::Replayed)));
    }
    goes_on(&mut one, &mut two, 1).await;
}

#[tokio::test]
async fn a_node_that_calls_itself_other_than_its_certificate_is_refused() {
    let lab = lab();
    let (first, second, mut one, mut two) = pair(&lab).await;
    let who = open(&lab.issue(Role::Node, "node-3", "node-3")).current();
    let hello = Hello { cluster: lab.authority.cluster(), from: first.party(1), to: second.party(2), ..hello() };
    let mut stream = encrypted(&second, &who).await.expect("let in");
    say(&mut stream, &Packet::Hello(hello)).await;
    assert_eq!(answer(&mut stream).await, Some(Packet::Refuse(Reason::Certificate)));
    goes_on(&mut one, &mut two, 1).await;
}

#[tokio::test]
async fn each_mismatch_of_a_hello_has_its_own_answer() {
    let cluster = ClusterId::random();
    let off = |node| Security::Off { cluster, node: name(node) };
    let (first, second) =
        (Node::start("node-1", off("node-1"), LONG).await, Node::start("node-2", off("node-2"), LONG).await);
    let two = second.open(2, &first, 1);
    let good = Hello { cluster, incompatible: 0, from: first.party(1), to: second.party(2), ..hello() };
    let party = |node: &str, number| Party { node: name(node), copy: copy(number) };
    let cases = [
        (Hello { incompatible: 6, ..good.clone() }, Reason::Features),
        (Hello { incompatible: 1, ..good.clone() }, Reason::Encryption),
        (Hello { cluster: ClusterId::random(), ..good.clone() }, Reason::Cluster),
        (Hello { volume: VolumeId::random(), ..good.clone() }, Reason::Volume),
        (Hello { to: party("node-2", 3), ..good.clone() }, Reason::NotHere),
        (Hello { to: party("node-3", 2), ..good.clone() }, Reason::NotHere),
        (Hello { from: party("node-1", 3), ..good.clone() }, Reason::OtherDisk),
        (Hello { from: party("node-3", 3), ..good.clone() }, Reason::Stranger),
        (Hello { generation: Generation(1), ..good.clone() }, Reason::Generation),
    ];
    for (hello, reason) in cases {
        let bytes = Packet::Hello(hello).encode(volume()).head;
        assert_eq!(in_the_clear(&second, &bytes).await, Some(Packet::Refuse(reason)));
    }
    // A feature that need not be known, and a newer generation: the core will read the catalogue.
    let newer = Hello { compatible: 8, generation: Generation(3), ..good };
    let bytes = Packet::Hello(newer).encode(volume()).head;
    assert!(matches!(in_the_clear(&second, &bytes).await, Some(Packet::Welcome(..))));
    two.session.set_generation(Generation(4));
    assert_eq!(in_the_clear(&second, &bytes).await, Some(Packet::Refuse(Reason::Generation)));
    // A record of a TLS handshake.
    assert_eq!(in_the_clear(&second, &[0x16, 3, 1, 0, 5]).await, None);
}
