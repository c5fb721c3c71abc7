//! The `typha` binary on the embedded datastore: killed and started again under a stream of changes.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use tokio::sync::mpsc;
use tokio::time::timeout;
use typha::client::{self, ClientConfig, Servers};

struct Typha(Child);

impl Typha {
    fn start(database: &Path, port: u16) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_typha"))
            .env("CALI_SQLITE_PATH", database)
            .env("TYPHA_SERVERHOST", "127.0.0.1")
            .env("TYPHA_SERVERPORT", port.to_string())
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Typha {
    fn drop(&mut self) {
        // `kill` sends SIGKILL; an error means that it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn set(number: usize, version: usize) -> AnyResource {
    let json = serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
        "metadata": {"name": format!("set{number}"), "labels": {"version": version.to_string()}},
        "spec": {"nets": ["10.0.0.0/8"]},
    });
    AnyResource::from_json(json).unwrap()
}

async fn content(store: &Sqlite) -> BTreeMap<Key, Arc<AnyResource>> {
    let list = store.list(Kind::GlobalNetworkSet, None).await.unwrap();
    list.items
        .into_iter()
        .map(|item| (item.object.key(), item.object))
        .collect()
}

/// Follows the stream; panics on a deletion of an object that the store still has or that was never told.
#[derive(Default)]
struct View {
    objects: BTreeMap<Key, Arc<AnyResource>>,
    in_sync: bool,
}

impl View {
    async fn until_equal(&mut self, events: &mut mpsc::Receiver<SyncEvent>, store: &Sqlite) {
        let expected = content(store).await;
        while !self.in_sync || self.objects != expected {
            match timeout(Duration::from_secs(30), events.recv())
                .await
                .unwrap()
                .unwrap()
            {
                SyncEvent::Status(status) => self.in_sync = status == SyncStatus::InSync,
                SyncEvent::Complete(_) => {}
                SyncEvent::Updates(updates) => {
                    for update in updates {
                        match update.value {
                            Some(value) => drop(self.objects.insert(update.key, value)),
                            None => {
                                assert!(
                                    !expected.contains_key(&update.key),
                                    "{} was not deleted",
                                    update.key
                                );
                                assert!(
                                    self.objects.remove(&update.key).is_some(),
                                    "{} was never told",
                                    update.key
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn client_equals_the_store_though_typha_is_killed_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("cali.db");
    let store = Sqlite::open(&database).unwrap();
    for number in 0..300 {
        store.create(set(number, 0)).await.unwrap();
    }
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut typha = Typha::start(&database, port);
    let mut events = client::start(ClientConfig {
        servers: Servers::Fixed(vec![format!("127.0.0.1:{port}")]),
        hostname: "node1".into(),
        info: "test".into(),
        kinds: vec![Kind::GlobalNetworkSet],
        tls: None,
        keep: None,
        interest: None,
    });
    let mut view = View::default();
    view.until_equal(&mut events, &store).await;
    for round in 1..=3 {
        for number in 0..40 {
            store.apply(set(number, round)).await.unwrap();
        }
        drop(typha);
        for number in 40..80 {
            store.apply(set(number, round)).await.unwrap();
        }
        store
            .delete(&set(200 + round, 0).key(), None)
            .await
            .unwrap();
        typha = Typha::start(&database, port);
        view.until_equal(&mut events, &store).await;
    }
}
