//! Server and client over real sockets.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind, Revision};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use typha::client::{self, ClientConfig};
use typha::server::{Server, ServerConfig, ServerError};

const PATIENCE: Duration = Duration::from_secs(20);

fn update(number: u32, version: u32) -> Update {
    let name = format!("set{number}");
    let json = serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
        "metadata": {"name": name, "labels": {"version": version.to_string()}}, "spec": {"nets": ["10.0.0.0/8"]},
    });
    Update {
        key: Key::cluster(Kind::GlobalNetworkSet, name),
        value: Some(Arc::new(AnyResource::from_json(json).unwrap())),
        revision: Revision::from(version.to_string()),
    }
}

struct Running {
    port: u16,
    source: mpsc::Sender<SyncEvent>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServerError>>,
}

/// A server whose datastore holds `content`.
async fn serve(port: u16, content: &BTreeMap<u32, u32>) -> Running {
    let server = Server::bind(ServerConfig {
        listen: ([127, 0, 0, 1], port).into(),
        ..ServerConfig::default()
    });
    let server = server.unwrap();
    let port = server.local_addr().unwrap().port();
    let (source, events) = mpsc::channel(16);
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(server.run(events, async move {
        let _ = stopped.await;
    }));
    source
        .send(SyncEvent::Updates(
            content.iter().map(|(n, v)| update(*n, *v)).collect(),
        ))
        .await
        .unwrap();
    source
        .send(SyncEvent::Status(SyncStatus::InSync))
        .await
        .unwrap();
    Running {
        port,
        source,
        stop: Some(stop),
        task,
    }
}

impl Running {
    async fn put(&self, number: u32, version: u32) {
        self.source
            .send(SyncEvent::Updates(vec![update(number, version)]))
            .await
            .unwrap();
    }

    /// As `kill -9` does it: sockets close without a goodbye.
    async fn kill(self) -> u16 {
        self.task.abort();
        let _ = self.task.await;
        self.port
    }
}

fn connect(port: u16) -> mpsc::Receiver<SyncEvent> {
    client::start(ClientConfig {
        addresses: vec![format!("127.0.0.1:{port}")],
        hostname: "node1".into(),
        info: "test".into(),
        kinds: vec![Kind::GlobalNetworkSet],
        tls: None,
    })
}

/// Follows a client's stream; panics on a deletion of something unknown.
#[derive(Default)]
struct View {
    content: BTreeMap<u32, u32>,
    in_sync: bool,
    deletions: usize,
    updates: usize,
}

impl View {
    async fn until(
        &mut self,
        events: &mut mpsc::Receiver<SyncEvent>,
        expected: &BTreeMap<u32, u32>,
    ) {
        while !self.in_sync || self.content != *expected {
            let event = timeout(PATIENCE, events.recv()).await;
            match event
                .unwrap_or_else(|_| panic!("have {:?}, expect {expected:?}", self.content))
                .unwrap()
            {
                SyncEvent::Status(status) => self.in_sync = status == SyncStatus::InSync,
                SyncEvent::Updates(updates) => {
                    updates.into_iter().for_each(|update| self.take(update))
                }
            }
        }
    }

    fn take(&mut self, update: Update) {
        self.updates += 1;
        let number: u32 = update.key.name.trim_start_matches("set").parse().unwrap();
        match update.value {
            Some(value) => {
                self.content
                    .insert(number, value.metadata().labels["version"].parse().unwrap());
            }
            None => {
                self.deletions += 1;
                assert!(
                    self.content.remove(&number).is_some(),
                    "set{number} deleted though unknown"
                );
            }
        }
    }
}

#[tokio::test]
async fn client_equals_the_datastore_after_the_server_is_killed_during_changes() {
    let mut content: BTreeMap<u32, u32> = (0..3000).map(|n| (n, 0)).collect();
    let mut server = serve(0, &content).await;
    let mut events = connect(server.port);
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
    };
    let mut conn = client::Conn::new(
        std::time::Instant::now(),
        &identity,
        &client::Held::default(),
    );
    let Some(client::Output::Send(hello)) = conn.poll_output() else {
        panic!("the hello is the first output")
    };
    stuck.write_all(&hello).await.unwrap();
    let mut events = connect(server.port);
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
    let mut events = connect(server.port);
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
    let mut events = connect(server.port);
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
