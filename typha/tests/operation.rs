//! What an operator sees: metrics, readiness, and a server that takes its leave.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

mod running;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use running::{PATIENCE, View, at, connect_to, metric, serve, serve_with};
use tokio::net::TcpStream;
use tokio::time::timeout;
use typha::server::{Leave, ServerConfig};

#[tokio::test]
async fn metrics_count_what_happened_and_are_those_of_the_documentation() {
    let mut content: BTreeMap<u32, u32> = (0..20).map(|n| (n, 0)).collect();
    let server = serve(0, &content).await;
    let mut clients = [connect_to(&[server.port]), connect_to(&[server.port])];
    let mut views = [View::default(), View::default()];
    server.put(3, 1).await;
    content.insert(3, 1);
    for (view, events) in views.iter_mut().zip(&mut clients) {
        view.until(events, &content).await;
    }
    // Once more the same: skipped.
    server.put(3, 1).await;
    let value = |name| metric(&server.registry, name);
    let counted = async {
        while value("typha_connections_streaming") < 2.0 || value("typha_updates_skipped") < 1.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, counted).await.unwrap();
    for (name, expected) in [
        ("typha_cache_size", 20.0),
        ("typha_updates_total", 22.0),
        ("typha_updates_skipped", 1.0),
        ("typha_breadcrumb_seq_number", 21.0),
        ("typha_connections_accepted", 2.0),
        ("typha_connections_active", 2.0),
        ("typha_connections_dropped", 0.0),
        ("typha_client_snapshot_send_secs", 2.0),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    assert!(value("typha_sent_bytes_total") > 500.0);
    assert!(value("typha_cache_bytes") > 2000.0);

    let served = server.registry.gather();
    let served: BTreeSet<&str> = served.iter().map(|family| family.name()).collect();
    let page = include_str!("../../docs/metrics-typha.md");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let first = |line: &'static str| line.split('|').nth(1).unwrap_or_default();
    let documented: BTreeSet<&str> = rows
        .flat_map(|line| first(line).split('`').skip(1).step_by(2))
        .collect();
    assert_eq!(served, documented);
}

#[tokio::test]
async fn a_server_that_stops_serves_on_while_it_sends_its_clients_away_one_by_one() {
    let mut content = BTreeMap::from([(1, 1)]);
    let config = ServerConfig {
        leave: Leave {
            limit: Duration::from_secs(60),
            interval: Duration::from_secs(3),
        },
        ..at(0)
    };
    let mut server = serve_with(config, &content).await;
    let mut first = connect_to(&[server.port]);
    let mut second = connect_to(&[server.port]);
    let (mut one, mut two) = (View::default(), View::default());
    one.until(&mut first, &content).await;
    two.until(&mut second, &content).await;
    assert!(server.health.readiness(Instant::now()).ok);
    server.stop.take().unwrap().send(()).unwrap();
    let refused = async {
        while TcpStream::connect(("127.0.0.1", server.port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, refused).await.unwrap();
    let readiness = server.health.readiness(Instant::now());
    assert!(!readiness.ok && readiness.parts[0].reason.contains("shutting down"));
    assert!(server.health.liveness(Instant::now()).ok);
    server.put(1, 2).await;
    content.insert(1, 2);
    tokio::select! {
        () = one.until(&mut first, &content) => {}
        () = two.until(&mut second, &content) => {}
    }
    timeout(PATIENCE, server.task)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(metric(&server.registry, "typha_connections_dropped"), 2.0);
}

#[tokio::test]
async fn a_server_that_stops_ends_within_its_limit_though_a_client_takes_nothing() {
    let config = ServerConfig {
        leave: Leave {
            limit: Duration::from_millis(300),
            interval: Duration::from_secs(3600),
        },
        ..at(0)
    };
    let mut server = serve_with(config, &BTreeMap::new()).await;
    let mut silent = Vec::new();
    for _ in 0..5 {
        silent.push(
            TcpStream::connect(("127.0.0.1", server.port))
                .await
                .unwrap(),
        );
    }
    server.stop.take().unwrap().send(()).unwrap();
    timeout(PATIENCE, server.task)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}
