use super::*;
use std::os::unix::fs::PermissionsExt;

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tandem-tls-").tempdir().expect("a directory")
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn leaf(text: &str) -> Leaf {
    Leaf { role: Role::Node, name: name(text), addresses: vec!["10.0.0.1".parse().expect("an address")] }
}

fn anchors(dir: &Path) -> Anchors {
    Anchors::parse(&files::read(dir, AUTHORITY).expect("read")).expect("an authority")
}

#[test]
fn what_an_authority_issues_is_accepted_also_after_it_was_opened_again() {
    let dir = directory();
    let made = Authority::create(dir.path(), name("lab"), Validity::days(10)).expect("made");
    let opened = Authority::open(dir.path()).expect("opened");
    assert_eq!((opened.cluster(), opened.name()), (made.cluster(), made.name()));
    for authority in [made, opened] {
        let issued = authority.issue(&leaf("node-1"), Validity::days(1)).expect("issued");
        assert_eq!(issued.identity.to_string(), format!("tandem://{}/node/node-1", authority.cluster()));
        assert_eq!(anchors(dir.path()).check_pem(&issued.certificate), Ok(issued.identity));
    }
}

#[test]
fn keys_are_private_and_nothing_is_overwritten() {
    let dir = directory();
    let out = dir.path().join("node-1");
    let authority = Authority::create(dir.path(), name("lab"), Validity::days(10)).expect("made");
    let issued = authority.issue(&leaf("node-1"), Validity::days(1)).expect("issued");
    issued.write(&out).expect("written");
    let mode = |path: PathBuf| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(out.join(KEY)), mode(dir.path().join(AUTHORITY_KEY)), mode(out.clone())), (0o600, 0o600, 0o700));
    let before = files::read(&out, KEY).expect("read");
    assert!(matches!(issued.write(&out), Err(FileError::Exists(path)) if path == out.join(KEY)));
    let again = Authority::create(dir.path(), name("lab"), Validity::days(10));
    assert!(matches!(again, Err(IssueError::File(FileError::Exists(_)))));
    assert_eq!(files::read(&out, KEY).expect("read"), before);
}

#[test]
fn a_file_that_is_in_the_way_leaves_nothing_half_made() {
    let dir = directory();
    std::fs::write(dir.path().join(AUTHORITY), "mine").expect("written");
    let refused = Authority::create(dir.path(), name("lab"), Validity::days(10));
    assert!(matches!(refused, Err(IssueError::File(FileError::Exists(path))) if path == dir.path().join(AUTHORITY)));
    assert!(!dir.path().join(AUTHORITY_KEY).exists());
    assert_eq!(files::read(dir.path(), AUTHORITY).expect("read"), "mine");
}

#[test]
fn others_expired_and_future_certificates_are_refused_each_with_its_reason() {
    let (dir, other) = (directory(), directory());
    let authority = Authority::create(dir.path(), name("lab"), Validity::days(10)).expect("made");
    let stranger = Authority::create(other.path(), name("lab"), Validity::days(10)).expect("made");
    let now = OffsetDateTime::now_utc();
    let past = Validity { from: now - Duration::days(9), until: now - Duration::days(1) };
    let future = Validity { from: now + Duration::days(1), until: now + Duration::days(9) };
    let anchors = anchors(dir.path());
    let check =
        |by: &Authority, validity| anchors.check_pem(&by.sign(&leaf("node-1"), validity).expect("signed").certificate);
    assert_eq!(check(&stranger, Validity::days(1)), Err(Refusal::Stranger));
    assert_eq!(check(&authority, past), Err(Refusal::Expired));
    assert_eq!(check(&authority, future), Err(Refusal::NotYet));
    assert!(matches!(authority.issue(&leaf("node-1"), past), Err(IssueError::Refused(Refusal::Expired))));
    // An authority is nobody's certificate.
    let itself = files::read(dir.path(), AUTHORITY).expect("read");
    assert!(matches!(anchors.check_pem(&itself), Err(Refusal::Unacceptable(_))));
}

#[test]
fn a_name_of_another_cluster_under_the_own_key_is_refused() {
    let dir = directory();
    let mut authority = Authority::create(dir.path(), name("lab"), Validity::days(10)).expect("made");
    let cluster = authority.cluster;
    let anchors = anchors(dir.path());
    // The same key and issuer, another cluster in the URI.
    let own = parameters(cluster, "authority", Validity::days(1));
    authority.cluster = ClusterId::random();
    let mut wanted = parameters(cluster, "node", Validity::days(1));
    let foreign = Identity { cluster: authority.cluster, role: Role::Node, name: name("node-1") };
    for uris in [vec![foreign.to_string()], vec![], vec!["spiffe://x/y".into()]] {
        let san = |uri: &String| SanType::URI(uri.clone().try_into().expect("ASCII"));
        wanted.subject_alt_names = uris.iter().map(san).collect();
        let key = KeyPair::generate().expect("a key");
        let signed = wanted.signed_by(&key, &Issuer::from_params(&own, &authority.key)).expect("signed");
        assert_eq!(anchors.check_pem(&signed.pem()), Err(Refusal::Nameless(cluster)));
    }
}

#[test]
fn an_authority_with_another_key_is_noticed() {
    let (dir, other) = (directory(), directory());
    Authority::create(dir.path(), name("lab"), Validity::days(10)).expect("made");
    Authority::create(other.path(), name("lab"), Validity::days(10)).expect("made");
    std::fs::copy(other.path().join(AUTHORITY_KEY), dir.path().join(AUTHORITY_KEY)).expect("copied");
    let refused = Authority::open(dir.path()).expect("opened").issue(&leaf("node-1"), Validity::days(1));
    assert!(matches!(refused, Err(IssueError::Refused(Refusal::Stranger))), "{refused:?}");
    std::fs::write(dir.path().join(AUTHORITY_KEY), "no key").expect("written");
    assert!(matches!(Authority::open(dir.path()), Err(IssueError::BadKey { .. })));
    std::fs::write(dir.path().join(AUTHORITY), "no certificate").expect("written");
    assert!(matches!(Authority::open(dir.path()), Err(IssueError::NoAuthority(_))));
}
