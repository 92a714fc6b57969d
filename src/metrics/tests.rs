use super::*;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn sample() -> Snapshot {
    let latency = Histogram { buckets: vec![(0.001, 3), (0.01, 1)], sum_seconds: 0.009 };
    let write = Direction { direction: "write", bytes: 16384, latency };
    let volume = Volume {
        volume: "v1".into(),
        pool: "fast \"one\"".into(),
        directions: vec![write],
        stalls: 2,
        recoveries: 1,
        queue_depth: 7,
        problems: vec!["PoolFull".into()],
        mirror: Some(Mirror {
            role: "primary",
            serves: true,
            hot_extents: 3,
            peers: vec![Peer { name: "node-2".into(), connected: true, out_of_sync_bytes: 8192 }],
        }),
        ..Volume::default()
    };
    let pool = Pool { pool: "fast".into(), ..Pool::default() };
    Snapshot {
        volumes: vec![volume],
        pools: vec![pool, Pool::default()],
        replayed_requests: 5,
        device_written_bytes: 100,
        disk_written_bytes: 150,
    }
}

/// Reads the text format: samples by name and labels; panics at anything that is none, or has no HELP and TYPE before.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let (mut helped, mut typed) = (Vec::new(), BTreeMap::new());
    assert!(text.ends_with("# EOF\n"));
    for line in text.lines().take_while(|line| *line != "# EOF") {
        if let Some(help) = line.strip_prefix("# HELP ") {
            helped.push(help.split(' ').next().expect("a name").to_string());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a name and a type");
            assert!(helped.iter().any(|h| h == name), "{name} has no help");
            typed.insert(name.to_string(), kind.to_string());
        } else {
            let (key, value) = line.rsplit_once(' ').expect("a sample");
            let name = key.split('{').next().expect("a name");
            let family =
                ["_total", "_sum", "_count", "_bucket"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
            assert!(typed.contains_key(family) || typed.contains_key(name), "{name} has no type");
            assert!(name.starts_with("tandem_") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
            assert!(samples.insert(key.to_string(), value.parse().expect("a number")).is_none(), "{key} occurs twice");
        }
    }
    samples
}

#[test]
fn what_is_rendered_can_be_parsed_and_has_the_same_numbers() {
    let samples = parse(&render(sample()).expect("rendered"));
    let labels = "volume=\"v1\",pool=\"fast \\\"one\\\"\"";
    let expected = [
        (format!("tandem_stalls_total{{{labels}}}"), 2.0),
        (format!("tandem_device_recoveries_total{{{labels}}}"), 1.0),
        (format!("tandem_queue_depth{{{labels}}}"), 7.0),
        (format!("tandem_request_bytes_total{{{labels},direction=\"write\"}}"), 16384.0),
        (format!("tandem_volume_problem{{{labels},reason=\"PoolFull\"}}"), 1.0),
        (format!("tandem_mirror_role{{{labels},role=\"primary\"}}"), 1.0),
        (format!("tandem_mirror_serving{{{labels}}}"), 1.0),
        (format!("tandem_mirror_hot_extents{{{labels}}}"), 3.0),
        (format!("tandem_mirror_connected{{{labels},peer=\"node-2\"}}"), 1.0),
        (format!("tandem_mirror_out_of_sync_bytes{{{labels},peer=\"node-2\"}}"), 8192.0),
        ("tandem_write_amplification_ratio".into(), 1.5),
        ("tandem_replayed_requests_total".into(), 5.0),
    ];
    for (key, value) in expected {
        assert_eq!(samples.get(&key), Some(&value), "{key} in {samples:#?}");
    }
    // A pool that nobody wrote to has no amplification.
    assert!(!samples.contains_key("tandem_pool_write_amplification_ratio{pool=\"\"}"));
}

#[test]
fn histograms_are_cumulative_and_end_at_infinity() {
    let samples = parse(&render(sample()).expect("rendered"));
    let of = |suffix: &str| -> Vec<f64> {
        let prefix = format!("tandem_request_duration_seconds_{suffix}");
        samples.iter().filter(|(key, _)| key.starts_with(&prefix)).map(|(_, value)| *value).collect()
    };
    assert_eq!(of("bucket").iter().copied().fold(0.0, f64::max), 4.0);
    assert_eq!((of("bucket").len(), of("count"), of("sum")), (3, vec![4.0], vec![0.009]));
    assert!(samples.keys().any(|key| key.contains("le=\"+Inf\"")));
}

#[tokio::test]
async fn metrics_are_served_on_their_path_only() {
    let address = serve("127.0.0.1:0".parse().expect("an address"), || async { sample() }).await.expect("bound");
    let get = |path: &'static str| async move {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("answered");
        text
    };
    let metrics = get("/metrics").await;
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    parse(metrics.split_once("\r\n\r\n").expect("a body").1);
    assert!(get("/").await.starts_with("HTTP/1.1 404"));
}
