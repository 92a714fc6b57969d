//! What a StorageClass may say, and what it may not.

use super::*;

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn the_documented_table_is_the_list_of_the_parser() {
    let document = include_str!("../../../README.md");
    let written: Vec<_> = document.lines().filter(|line| line.starts_with("| `")).collect();
    let expected = PARAMETERS.map(|p| {
        let mutable = if p.mutable { "yes" } else { "no" };
        format!("| `{}` | {} | {} | {mutable} | {} |", p.key, p.values, p.default, p.meaning)
    });
    assert_eq!(written, expected, "make README.md say:\n{}", expected.join("\n"));
}

#[test]
fn nothing_given_is_the_defaults() {
    let parsed = Parameters::parse(&map(&[]), &map(&[])).expect("defaults");
    let (replication, reach) = (Replication::None, Reach::Local);
    let (rebuild_after, pool) = (RebuildAfter::Seconds(3600), "default".into());
    assert_eq!(parsed, Parameters { replication, rebuild_after, reach, pool, fs_type: None, verify_reads: false });
}

#[test]
fn every_key_is_understood_and_mutable_ones_win() {
    let fixed = map(&[
        ("replication", "none"),
        ("pool", "fast"),
        ("csi.storage.k8s.io/fstype", "xfs"),
        ("verifyReads", "false"),
        ("csi.storage.k8s.io/pvc/name", "data"),
    ]);
    let parsed = Parameters::parse(&fixed, &map(&[("verifyReads", "true")])).expect("parses");
    let (replication, fs_type) = (Replication::None, Some(FsType::Xfs));
    let (rebuild_after, reach, pool) = (RebuildAfter::default(), Reach::Local, "fast".into());
    assert_eq!(parsed, Parameters { replication, rebuild_after, reach, pool, fs_type, verify_reads: true });
}

#[test]
fn copies_are_counted_only_where_there_are_several() {
    let parse = |pairs: &[(&str, &str)]| Parameters::parse(&map(pairs), &map(&[])).map(|parsed| parsed.replication);
    assert_eq!(parse(&[("replication", "sync")]), Ok(Replication::Sync { replicas: 2 }));
    assert_eq!(parse(&[("replication", "sync"), ("replicas", "3")]), Ok(Replication::Sync { replicas: 3 }));
    for alone in [&[("replicas", "2")][..], &[("replication", "none"), ("replicas", "2")]] {
        assert_eq!(parse(alone), Err(ParameterError::ReplicasAlone));
    }
    for wrong in ["1", "4", "", "two", "02"] {
        let refused = parse(&[("replication", "sync"), ("replicas", wrong)]).expect_err("refused").to_string();
        assert!(refused.contains("parameter replicas") && refused.contains("it takes: 2, 3"), "{refused}");
    }
}

#[test]
fn a_time_has_a_unit_and_goes_with_copies() {
    let parse = |value: &str| {
        let given = map(&[("replication", "sync"), ("rebuildAfter", value)]);
        Parameters::parse(&given, &map(&[])).map(|parsed| parsed.rebuild_after)
    };
    for (value, seconds) in [("1s", 1), ("90s", 90), ("5m", 300), ("1h", 3600), ("30d", 2_592_000)] {
        assert_eq!(parse(value), Ok(RebuildAfter::Seconds(seconds)));
    }
    assert_eq!(parse("never"), Ok(RebuildAfter::Never));
    for wrong in ["", "0s", "1", "h", "-1h", "+1h", "1.5h", "31d", "1 h", "1µ", "99999999999s", "4294967295d", "Never"]
    {
        let refused = parse(wrong).expect_err("refused").to_string();
        assert!(refused.contains("parameter rebuildAfter") && refused.contains("30d"), "{refused}");
    }
    let alone = Parameters::parse(&map(&[("rebuildAfter", "1h")]), &map(&[]));
    assert_eq!(alone, Err(ParameterError::RebuildAlone));
    let change = |now| Changes::parse(&map(&[("rebuildAfter", "never")])).and_then(|c| c.replication(now));
    assert_eq!(change(Replication::None), Err(ParameterError::RebuildAlone));
    assert_eq!(change(Replication::Sync { replicas: 3 }), Ok(Replication::Sync { replicas: 3 }));
    for (time, text) in [(90, "90s"), (300, "5m"), (7200, "2h"), (0, "0s")] {
        assert_eq!(RebuildAfter::Seconds(time).to_string(), text);
    }
}

#[test]
fn every_node_may_use_only_what_several_hold() {
    let parse = |pairs: &[(&str, &str)]| Parameters::parse(&map(pairs), &map(&[])).map(|parsed| parsed.reach);
    assert_eq!(parse(&[("access", "any"), ("replication", "sync")]), Ok(Reach::Any));
    assert_eq!(parse(&[("access", "local")]), Ok(Reach::Local));
    for alone in [&[("access", "any")][..], &[("access", "any"), ("replication", "none")]] {
        assert_eq!(parse(alone), Err(ParameterError::AnyAlone));
    }
    let refused = parse(&[("access", "remote")]).expect_err("refused").to_string();
    assert!(refused.contains("parameter access") && refused.contains("it takes: local, any"), "{refused}");
}

#[test]
fn what_is_refused_is_named_with_what_is_possible() {
    let refuse =
        |key: &str, value: &str| Parameters::parse(&map(&[(key, value)]), &map(&[])).expect_err("refused").to_string();
    assert_eq!(
        refuse("replica", "2"),
        "unknown parameter \"replica\"; known are: replication, replicas, rebuildAfter, access, pool, csi.storage.k8s.io/fstype, verifyReads"
    );
    assert!(refuse("replication", "async").contains("not available in this version"));
    assert!(refuse("replication", "raid0").contains("it takes: none, sync"));
    assert!(refuse("csi.storage.k8s.io/fstype", "zfs").contains("it takes: ext4, xfs"));
    assert!(refuse("verifyReads", "yes").contains("it takes: true, false"));
    for name in ["", "..", "a/b", ".hidden", "sp ace", &"x".repeat(64)] {
        assert!(refuse("pool", name).contains("parameter pool"), "{name}");
    }
}

#[test]
fn only_mutable_keys_change_a_volume() {
    let verified = Changes { verify_reads: Some(true), ..Changes::default() };
    assert_eq!(Changes::parse(&map(&[("verifyReads", "true")])), Ok(verified));
    assert_eq!(Changes::parse(&map(&[("pool", "fast")])), Err(ParameterError::Immutable { key: "pool" }));
    assert!(matches!(Changes::parse(&map(&[("fake", "1")])), Err(ParameterError::Unknown { .. })));
    assert_eq!(Changes::parse(&map(&[])), Ok(Changes::default()));
}

#[test]
fn the_number_of_copies_changes_when_it_is_said() {
    let (none, two, three) = (Replication::None, Replication::Sync { replicas: 2 }, Replication::Sync { replicas: 3 });
    let change = |pairs: &[(&str, &str)], now| Changes::parse(&map(pairs)).and_then(|c| c.replication(now));
    let cases: [(&[(&str, &str)], _, _); 8] = [
        (&[], three, Ok(three)),
        (&[("replication", "sync")], none, Ok(two)),
        (&[("replication", "sync")], three, Ok(three)),
        (&[("replication", "sync"), ("replicas", "3")], none, Ok(three)),
        (&[("replicas", "2")], three, Ok(two)),
        (&[("replicas", "2")], none, Err(ParameterError::ReplicasAlone)),
        (&[("replication", "none")], two, Ok(none)),
        (&[("replication", "none"), ("replicas", "2")], two, Err(ParameterError::ReplicasAlone)),
    ];
    for (pairs, now, expected) in cases {
        assert_eq!(change(pairs, now), expected, "{pairs:?} of {now:?}");
    }
    let created =
        Parameters::parse(&map(&[("replication", "sync"), ("replicas", "3")]), &map(&[("replication", "none")]));
    assert_eq!(created.expect("mutable ones win").replication, none);
}

#[test]
fn snapshots_take_no_parameters_but_the_sidecars() {
    assert_eq!(parse_snapshot(&map(&[("csi.storage.k8s.io/volumesnapshot/name", "s")])), Ok(()));
    assert!(parse_snapshot(&map(&[("pool", "x")])).is_err());
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(data: Vec<u8>) {
        fuzz(&data);
    }
}
