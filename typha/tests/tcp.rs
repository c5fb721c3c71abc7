//! Server and client over real sockets.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

mod running;

use std::collections::BTreeMap;

use std::sync::Arc;

use cali_api::{AnyResource, Kind};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use running::{PATIENCE, Running, View, connect_to, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use typha::client::discovery::Service;
use typha::client::{self, ClientConfig, Servers};

#[tokio::test]
async fn client_equals_the_datastore_after_the_server_is_killed_during_changes() {
    let mut content: BTreeMap<u32, u32> = (0..3000).map(|n| (n, 0)).collect();
    let mut server = serve(0, &content).await;
    let mut events = connect_to(&[server.port]);
    let mut view = View::default();
    view.until(&mut events, &content).await;
    for round in 1..=5 {
        for number in 0..50 {
            server.put(number, round).await;
            content.insert(number, round);
        }
        // Some of these changes have been sent and some have not.
        let port = server.kill().await;
        content.remove(&(1000 + round));
        server = serve(port, &content).await;
        for number in 50..60 {
            server.put(number, round).await;
            content.insert(number, round);
        }
        view.until(&mut events, &content).await;
        assert_eq!(
            view.deletions, round as usize,
            "only what was deleted is reported deleted"
        );
    }
    assert!(
        view.updates < 3000 + 5 * 61 + 1,
        "{} updates: only changes after the snapshot",
        view.updates
    );
}

#[tokio::test]
async fn stopped_client_does_not_hold_up_the_others() {
    let mut content: BTreeMap<u32, u32> = (0..2000).map(|n| (n, 0)).collect();
    let server = serve(0, &content).await;
    // Says hello and never reads.
    let mut stuck = TcpStream::connect(("127.0.0.1", server.port))
        .await
        .unwrap();
    let identity = client::Identity {
        hostname: "stuck".into(),
        info: String::new(),
        kinds: vec![Kind::GlobalNetworkSet],
        node: None,
    };
    let mut conn = client::Conn::new(
        std::time::Instant::now(),
        &identity,
        &client::Held::default(),
    );
    let Some(client::Output::Send(hello)) = conn.poll_output(&mut client::Held::default()).unwrap()
    else {
        panic!("the hello is the first output")
    };
    stuck.write_all(&hello).await.unwrap();
    let mut events = connect_to(&[server.port]);
    let mut view = View::default();
    view.until(&mut events, &content).await;
    for version in 1..=20 {
        for number in 0..500 {
            server.put(number, version).await;
            content.insert(number, version);
        }
    }
    view.until(&mut events, &content).await;
}

#[tokio::test]
async fn garbage_is_answered_with_a_reason_and_closed() {
    let server = serve(0, &BTreeMap::new()).await;
    let mut stream = TcpStream::connect(("127.0.0.1", server.port))
        .await
        .unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let text = String::from_utf8_lossy(&answer);
    assert!(
        text.contains("protocol violation") && text.contains("exceeds the limit"),
        "{text}"
    );
}

#[tokio::test]
async fn shutdown_says_goodbye_and_ends() {
    let content = BTreeMap::from([(1, 1)]);
    let mut server = serve(0, &content).await;
    let mut events = connect_to(&[server.port]);
    View::default().until(&mut events, &content).await;
    server.stop.take().unwrap().send(()).unwrap();
    timeout(PATIENCE, server.task)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn dropped_receiver_ends_the_client() {
    let content = BTreeMap::from([(1, 1)]);
    let server = serve(0, &content).await;
    let mut events = connect_to(&[server.port]);
    View::default().until(&mut events, &content).await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    drop(events);
    let ended = async {
        // The client's task, and the server's for its connection.
        while metrics.num_alive_tasks() + 2 > before {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, ended).await.unwrap();
}

/// The service's endpoints: server and node.
fn slice(servers: &[(&Running, &str)]) -> Vec<AnyResource> {
    let one = |(server, node): &(&Running, &str)| {
        let json = serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("typha-{node}"), "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "calico-typha"}},
            "addressType": "IPv4", "endpoints": [{"addresses": ["127.0.0.1"], "nodeName": node}],
            "ports": [{"name": "calico-typha", "port": server.port}],
        });
        AnyResource::from_json(json).unwrap()
    };
    servers.iter().map(one).collect()
}

#[tokio::test]
async fn the_server_of_the_own_node_is_found_and_when_it_goes_the_other_takes_over() {
    let mut content: BTreeMap<u32, u32> = (0..20).map(|n| (n, 0)).collect();
    let near = serve(0, &content).await;
    let far = serve(0, &content).await;
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Sqlite::open(&folder.path().join("cali.db")).unwrap());
    for slice in slice(&[(&near, "here"), (&far, "there")]) {
        store.create(slice).await.unwrap();
    }
    let mut events = client::start(ClientConfig {
        servers: Servers::Service(Service {
            store,
            namespace: "kube-system".into(),
            name: "calico-typha".into(),
            node: "here".into(),
        }),
        hostname: "here".into(),
        info: "test".into(),
        kinds: vec![Kind::GlobalNetworkSet],
        tls: None,
        keep: None,
        interest: None,
    });
    let mut view = View::default();
    view.until(&mut events, &content).await;
    let connected =
        |server: &Running| running::metric(&server.registry, "typha_connections_accepted");
    assert_eq!((connected(&near), connected(&far)), (1.0, 0.0));
    near.kill().await;
    far.put(5, 1).await;
    content.insert(5, 1);
    view.until(&mut events, &content).await;
    assert_eq!((connected(&far), view.deletions), (1.0, 0));
}
