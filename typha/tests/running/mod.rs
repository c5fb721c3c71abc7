//! A server with a datastore made up by the test, and a client's view of it.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind, Revision};
use cali_telemetry::{Health, Registry};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use typha::client::{self, ClientConfig, Servers};
use typha::server::{Server, ServerConfig, ServerError};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One set, whose label holds the version.
pub fn update(number: u32, version: u32) -> Update {
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

/// A server under test.
pub struct Running {
    pub port: u16,
    pub source: mpsc::Sender<SyncEvent>,
    pub stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<Result<(), ServerError>>,
    pub registry: Registry,
    pub health: Health,
}

/// A server whose datastore holds `content`.
pub async fn serve(port: u16, content: &BTreeMap<u32, u32>) -> Running {
    serve_with(at(port), content).await
}

/// A configuration for this port of loopback.
pub fn at(port: u16) -> ServerConfig {
    ServerConfig {
        listen: ([127, 0, 0, 1], port).into(),
        ..ServerConfig::default()
    }
}

/// As [`serve`], configured.
pub async fn serve_with(config: ServerConfig, content: &BTreeMap<u32, u32>) -> Running {
    let server = Server::bind(config).unwrap();
    let (registry, health) = (server.registry(), server.health());
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
        registry,
        health,
    }
}

impl Running {
    pub async fn put(&self, number: u32, version: u32) {
        self.source
            .send(SyncEvent::Updates(vec![update(number, version)]))
            .await
            .unwrap();
    }

    /// As `kill -9` does it: sockets close without a goodbye.
    pub async fn kill(self) -> u16 {
        self.task.abort();
        let _ = self.task.await;
        self.port
    }
}

/// A client of the servers at these ports.
pub fn connect_to(ports: &[u16]) -> mpsc::Receiver<SyncEvent> {
    client::start(ClientConfig {
        servers: Servers::Fixed(
            ports
                .iter()
                .map(|port| format!("127.0.0.1:{port}"))
                .collect(),
        ),
        hostname: "node1".into(),
        info: "test".into(),
        kinds: vec![Kind::GlobalNetworkSet],
        tls: None,
        keep: None,
        interest: None,
    })
}

/// Follows a client's stream; panics on a deletion of something unknown.
#[derive(Default)]
pub struct View {
    pub content: BTreeMap<u32, u32>,
    pub in_sync: bool,
    pub in_sync_events: usize,
    pub deletions: usize,
    pub updates: usize,
}

impl View {
    pub async fn until(
        &mut self,
        events: &mut mpsc::Receiver<SyncEvent>,
        expected: &BTreeMap<u32, u32>,
    ) {
        while !self.in_sync || self.content != *expected {
            let event = timeout(PATIENCE, events.recv()).await;
            let event =
                event.unwrap_or_else(|_| panic!("have {:?}, expect {expected:?}", self.content));
            self.on_event(event.unwrap());
        }
    }

    fn on_event(&mut self, event: SyncEvent) {
        match event {
            SyncEvent::Status(status) => {
                self.in_sync = status == SyncStatus::InSync;
                self.in_sync_events += usize::from(self.in_sync);
            }
            SyncEvent::Complete(_) => {}
            SyncEvent::Updates(updates) => {
                updates.into_iter().for_each(|update| self.take(update));
            }
        }
    }

    /// Takes what has come, and waits for nothing.
    pub fn take_waiting(&mut self, events: &mut mpsc::Receiver<SyncEvent>) {
        while let Ok(event) = events.try_recv() {
            self.on_event(event);
        }
    }

    pub fn take(&mut self, update: Update) {
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

/// One set of about so many bytes.
pub fn update_of_size(number: usize, size: usize) -> Update {
    let name = format!("set{number}");
    let json = serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
        "metadata": {"name": name, "annotations": {"filling": "x".repeat(size)}}, "spec": {"nets": ["10.0.0.0/8"]},
    });
    Update {
        key: Key::cluster(Kind::GlobalNetworkSet, name),
        value: Some(Arc::new(AnyResource::from_json(json).unwrap())),
        revision: Revision::from("1"),
    }
}

/// The value of a metric without labels; a histogram's is the number of observations.
pub fn metric(registry: &Registry, name: &str) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name);
    let metric = &family.unwrap_or_else(|| panic!("no {name}")).get_metric()[0];
    let observed = metric.get_histogram().get_sample_count() as f64;
    metric.get_counter().get_value() + metric.get_gauge().get_value() + observed
}
