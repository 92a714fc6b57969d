use super::super::authority::{Authority, Leaf, Validity};
use super::super::identity::Name;
use super::super::peer::{HandshakeError, peer_identity};
use super::*;
use rustls::pki_types::ServerName;
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tandem-tls-").tempdir().expect("a directory")
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn authority(dir: &Path) -> Authority {
    Authority::create(&dir.join("authority"), name("lab"), Validity::days(10)).expect("made")
}

fn issue(authority: &Authority, role: Role, text: &str, validity: Validity, out: &Path) {
    let leaf = Leaf { role, name: name(text), addresses: vec![] };
    authority.sign(&leaf, validity).expect("signed").write(out).expect("written");
}

/// The certificates of a node in a directory of its own below `dir`.
fn node(dir: &Path, authority: &Authority, text: &str) -> PathBuf {
    issue(authority, Role::Node, text, Validity::days(1), &dir.join(text));
    dir.join(text)
}

fn expected(role: Role, text: Option<&str>) -> Expected {
    Expected { role: Some(role), name: text.map(name) }
}

/// What client and server find out about each other.
async fn connect(
    server: &Loaded,
    client: &Loaded,
    wanted: Expected,
) -> (Result<Identity, HandshakeError>, Result<Identity, HandshakeError>) {
    let (here, there) = tokio::io::duplex(4096);
    let acceptor = TlsAcceptor::from(server.server(Some(Role::Node)).expect("a configuration"));
    let connector = TlsConnector::from(client.client(wanted).expect("a configuration"));
    let address = ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into());
    let serve = async {
        let mut stream = acceptor.accept(here).await?;
        stream.write_all(&[1]).await?;
        stream.flush().await?;
        Ok(peer_identity(stream.get_ref().1).expect("checked"))
    };
    let call = async {
        let mut stream = connector.connect(address, there).await?;
        let found = peer_identity(stream.get_ref().1).expect("checked");
        // In TLS 1.3 a client learns what the server thinks of it with the first bytes that it reads.
        stream.read_exact(&mut [0]).await?;
        Ok(found)
    };
    let (served, called) = tokio::join!(serve, call);
    (called, served)
}

#[tokio::test]
async fn two_nodes_of_a_cluster_know_each_other_by_name() {
    let dir = directory();
    let authority = authority(dir.path());
    let a = Loaded::read(&node(dir.path(), &authority, "node-1")).expect("loaded");
    let b = Loaded::read(&node(dir.path(), &authority, "node-2")).expect("loaded");
    let (called, served) = connect(&a, &b, expected(Role::Node, Some("node-1"))).await;
    assert_eq!(called.expect("let in"), *a.own());
    assert_eq!(served.expect("let in"), *b.own());
}

#[tokio::test]
async fn the_wrong_role_or_name_is_refused_on_either_side() {
    let dir = directory();
    let authority = authority(dir.path());
    let a = Loaded::read(&node(dir.path(), &authority, "node-1")).expect("loaded");
    let b = Loaded::read(&node(dir.path(), &authority, "node-2")).expect("loaded");
    issue(&authority, Role::Controller, "node-2", Validity::days(1), &dir.path().join("controller"));
    let controller = Loaded::read(&dir.path().join("controller")).expect("loaded");
    let (called, _) = connect(&a, &b, expected(Role::Node, Some("node-3"))).await;
    assert!(matches!(called, Err(HandshakeError::Refused(Refusal::Name { found, .. })) if found == *a.own()));
    let (called, _) = connect(&a, &b, expected(Role::Controller, None)).await;
    assert!(matches!(called, Err(HandshakeError::Refused(Refusal::Role { .. }))));
    let (called, served) = connect(&a, &controller, expected(Role::Node, Some("node-1"))).await;
    assert!(matches!(served, Err(HandshakeError::Refused(Refusal::Role { wanted: Role::Node, .. }))));
    assert!(matches!(called, Err(HandshakeError::RefusedHere(_))), "{called:?}");
}

#[tokio::test]
async fn another_cluster_is_refused() {
    let (dir, other) = (directory(), directory());
    let a = Loaded::read(&node(dir.path(), &authority(dir.path()), "node-1")).expect("loaded");
    let stranger = Loaded::read(&node(other.path(), &authority(other.path()), "node-1")).expect("loaded");
    let (called, _) = connect(&a, &stranger, expected(Role::Node, Some("node-1"))).await;
    assert!(matches!(called, Err(HandshakeError::Refused(Refusal::Stranger))), "{called:?}");
    // A client that takes any server still has to show its own.
    let careless = Loaded { anchors: Arc::clone(&a.anchors), ..stranger };
    let (_, served) = connect(&a, &careless, expected(Role::Node, Some("node-1"))).await;
    assert!(matches!(served, Err(HandshakeError::Refused(Refusal::Stranger))), "{served:?}");
}

#[test]
fn an_own_certificate_that_peers_would_refuse_is_found_at_the_start() {
    let dir = directory();
    let authority = authority(dir.path());
    let now = OffsetDateTime::now_utc();
    let past = Validity { from: now - Duration::days(9), until: now - Duration::days(1) };
    issue(&authority, Role::Node, "node-1", past, &dir.path().join("old"));
    let error = Credentials::open(&dir.path().join("old")).expect_err("expired");
    assert!(error.to_string().contains("tls.crt: its certificate has expired: issue a new one"), "{error}");
    let (a, b) = (node(dir.path(), &authority, "node-1"), node(dir.path(), &authority, "node-2"));
    std::fs::copy(a.join(KEY), b.join(KEY)).expect("copied");
    assert!(matches!(Credentials::open(&b), Err(CredentialsError::Key { .. })));
    std::fs::remove_file(b.join(KEY)).expect("removed");
    assert!(matches!(Credentials::open(&b), Err(CredentialsError::File(FileError::Missing(_)))));
}

#[test]
fn replaced_files_are_used_and_half_replaced_ones_are_not() {
    let dir = directory();
    let authority = authority(dir.path());
    let used = node(dir.path(), &authority, "node-1");
    let new = dir.path().join("new");
    issue(&authority, Role::Node, "node-1", Validity::days(2), &new);
    let credentials = Credentials::open(&used).expect("opened");
    let before = credentials.current();
    assert!(Arc::ptr_eq(&before, &credentials.current()));
    std::fs::rename(new.join(CERTIFICATE), used.join(CERTIFICATE)).expect("moved");
    // The old key does not fit: what was loaded stays.
    assert!(Arc::ptr_eq(&before, &credentials.current()));
    std::fs::rename(new.join(KEY), used.join(KEY)).expect("moved");
    let after = credentials.current();
    assert!(!Arc::ptr_eq(&before, &after) && before.chain != after.chain);
    std::fs::remove_file(used.join(AUTHORITY)).expect("removed");
    assert!(Arc::ptr_eq(&after, &credentials.current()));
}
