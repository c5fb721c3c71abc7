//! A network that loses everything in silence: clients keep the last state, resume when it is back, and are told of exactly what
//! happened meanwhile; what is gone only once the server has told everything.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_netlink::testing::{TestNs, eventually, patient, run};
use tokio::sync::mpsc;
use tokio::time::timeout;
use typha::client::{self, ClientConfig, Servers};

const LIMIT: Duration = Duration::from_secs(60);
const SETS: usize = 2000;
const CLIENTS: usize = 3;
/// What the server and a client of it take for a dead connection, with a ping each second.
const KEEP_ALIVE: Duration = Duration::from_secs(3);

/// The program, in a namespace.
struct Typha(Child);

impl Typha {
    fn start(ns: &TestNs, database: &Path) -> Self {
        let child = ns
            .command(env!("CARGO_BIN_EXE_typha"))
            .env("CALI_SQLITE_PATH", database)
            .env("TYPHA_SERVERHOST", "10.99.0.1")
            .env("TYPHA_SERVERPINGINTERVALSECS", "1")
            .env(
                "TYPHA_SERVERPONGTIMEOUTSECS",
                KEEP_ALIVE.as_secs().to_string(),
            )
            .env("TYPHA_PROMETHEUSMETRICSENABLED", "true")
            .env("TYPHA_PROMETHEUSMETRICSHOST", "localhost")
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Typha {
    fn drop(&mut self) {
        // An error means that it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A metric without labels; an error while there is none.
fn metric(ns: &TestNs, name: &str) -> Result<f64, String> {
    let page = ns.netns().run(|| -> std::io::Result<String> {
        let mut stream = TcpStream::connect("127.0.0.1:9093")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: typha\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        Ok(page)
    });
    let page = page.unwrap().map_err(|error| error.to_string())?;
    let value = page
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    value.ok_or_else(|| format!("no {name} in {page}"))
}

fn until_metric(ns: &TestNs, name: &str, wanted: f64) {
    eventually(LIMIT, || match metric(ns, name)? {
        value if value == wanted => Ok(()),
        value => Err(format!("{name} is {value}, not {wanted}")),
    });
}

/// A set that cannot be made much smaller by compression.
fn set(number: usize, version: usize) -> AnyResource {
    let mut state = (number * 31 + version + 1) as u64;
    let filling: String = (0..16)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            format!("{:x}", state >> 16)
        })
        .collect();
    let json = serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
        "metadata": {
            "name": format!("set{number}"), "labels": {"version": version.to_string()},
            "annotations": {"filling": filling},
        },
        "spec": {"nets": ["10.0.0.0/8"]},
    });
    AnyResource::from_json(json).unwrap()
}

async fn content(store: &Sqlite) -> BTreeMap<Key, Arc<AnyResource>> {
    let list = store.list(Kind::GlobalNetworkSet, None).await.unwrap();
    let items = list.items.into_iter();
    items.map(|item| (item.object.key(), item.object)).collect()
}

/// A client in a namespace, on a thread of its own, and what its consumer has of it.
struct Node {
    events: mpsc::UnboundedReceiver<SyncEvent>,
    objects: BTreeMap<Key, Arc<AnyResource>>,
}

impl Node {
    fn start(ns: &TestNs, name: String) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let netns = ns.netns().clone();
        std::thread::spawn(move || {
            // Sockets are those of the namespace that the thread is in.
            let follow = || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build();
                runtime.unwrap().block_on(async {
                    let mut events = client::start(ClientConfig {
                        servers: Servers::Fixed(vec!["10.99.0.1:5473".to_owned()]),
                        hostname: name,
                        info: "test".into(),
                        kinds: vec![Kind::GlobalNetworkSet],
                        tls: None,
                        keep: None,
                        interest: None,
                    });
                    while let Some(event) = events.recv().await {
                        if sender.send(event).is_err() {
                            return;
                        }
                    }
                });
            };
            netns.run(follow).unwrap();
        });
        Self {
            events,
            objects: BTreeMap::new(),
        }
    }

    async fn next(&mut self) -> SyncEvent {
        let event = timeout(patient(LIMIT), self.events.recv()).await;
        event
            .expect("an event in time")
            .expect("the client goes on")
    }

    /// Takes everything up to the word that it is everything. Deletions come right before that, all at once.
    async fn until_in_sync(&mut self) -> Vec<Update> {
        let mut told = Vec::new();
        let mut gone = false;
        loop {
            match self.next().await {
                SyncEvent::Status(SyncStatus::InSync) => return told,
                SyncEvent::Status(_) | SyncEvent::Complete(_) => {}
                SyncEvent::Updates(updates) => {
                    assert!(!gone, "deleted before everything had been told");
                    gone = updates.iter().any(|update| update.value.is_none());
                    for update in &updates {
                        match &update.value {
                            Some(object) => {
                                drop(self.objects.insert(update.key.clone(), Arc::clone(object)))
                            }
                            None => assert!(
                                self.objects.remove(&update.key).is_some(),
                                "{}",
                                update.key
                            ),
                        }
                    }
                    told.extend(updates);
                }
            }
        }
    }
}

/// Ways in which a network goes away without a word.
#[derive(Debug, Clone, Copy)]
enum Loss {
    /// Each side's packets are dropped where they come in.
    Filter,
    /// The cable is pulled.
    Cable,
}

impl Loss {
    fn begin(self, server: &TestNs, node: &TestNs) {
        match self {
            Self::Filter => {
                for ns in [server, node] {
                    let rules = "table ip partition { chain input { type filter hook input priority 0; iifname eth0 drop; }; }";
                    ns.run("nft", &[rules]);
                }
            }
            // The node's end loses its carrier, and keeps its address and route.
            Self::Cable => drop(server.ip("link set eth0 down")),
        }
    }

    fn end(self, server: &TestNs, node: &TestNs) {
        match self {
            Self::Filter => {
                for ns in [server, node] {
                    ns.run("nft", &["delete table ip partition"]);
                }
            }
            Self::Cable => drop(server.ip("link set eth0 up")),
        }
    }
}

/// Changes what is stored: the keys that are to be told, with what they are to be told as.
async fn change(store: &Sqlite, round: usize) -> BTreeMap<Key, Option<Arc<AnyResource>>> {
    let first = round * 10;
    let key = |number| set(number, 0).key();
    for version in [1, 2] {
        // The same one twice: the last version counts.
        let mut stored = (*store.get(&key(first)).await.unwrap().object).clone();
        stored
            .metadata_mut()
            .labels
            .insert("version".into(), version.to_string());
        store.update(stored).await.unwrap();
    }
    for number in [first + 1, first + 2, first + 3] {
        store.delete(&key(number), None).await.unwrap();
    }
    // Gone and there again, and there and gone again.
    store.create(set(first + 3, 1)).await.unwrap();
    store.create(set(SETS + first, 0)).await.unwrap();
    store.create(set(SETS + first + 1, 0)).await.unwrap();
    store.delete(&key(SETS + first + 1), None).await.unwrap();
    let now = content(store).await;
    let told = [first, first + 1, first + 2, first + 3, SETS + first];
    told.map(|number| (key(number), now.get(&key(number)).cloned()))
        .into()
}

#[test]
fn clients_keep_the_last_state_through_a_partition_and_are_told_of_what_they_missed_alone() {
    run(async {
        let (server, node) = (TestNs::new("typha"), TestNs::new("node"));
        let (here, there) = server.veth("eth0", &node, "eth0").await;
        server.address(here, "10.99.0.1/24").await;
        node.address(there, "10.99.0.2/24").await;
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join("cali.db");
        let store = Sqlite::open(&database).unwrap();
        for number in 0..SETS {
            store.create(set(number, 0)).await.unwrap();
        }
        let _typha = Typha::start(&server, &database);
        let mut nodes: Vec<Node> = (0..CLIENTS)
            .map(|n| Node::start(&node, format!("node{n}")))
            .collect();
        for node in &mut nodes {
            node.until_in_sync().await;
            assert_eq!(node.objects, content(&store).await);
        }
        until_metric(&server, "typha_connections_streaming", CLIENTS as f64);
        let sent = || metric(&server, "typha_sent_bytes_total").unwrap();
        let snapshot = sent();
        for (round, loss) in [Loss::Filter, Loss::Cable].into_iter().enumerate() {
            let accepted = metric(&server, "typha_connections_accepted").unwrap();
            loss.begin(&server, &node);
            let expected = change(&store, round).await;
            // Until either side has given the other one up.
            until_metric(&server, "typha_connections_active", 0.0);
            eventually(LIMIT, || {
                match node.run("ss", &["-Htn", "state", "established"]) {
                    text if text.is_empty() => Ok(()),
                    text => Err(text),
                }
            });
            for node in &mut nodes {
                assert!(node.events.try_recv().is_err(), "told something by nobody");
            }
            let before = sent();
            loss.end(&server, &node);
            for node in &mut nodes {
                let told = node.until_in_sync().await;
                let keys: Vec<&Key> = told.iter().map(|update| &update.key).collect();
                let as_map: BTreeMap<_, _> = told
                    .iter()
                    .map(|update| (update.key.clone(), update.value.clone()))
                    .collect();
                assert_eq!(as_map, expected, "{loss:?}");
                assert_eq!(keys.len(), expected.len(), "each once: {keys:?}");
                assert_eq!(node.objects, content(&store).await);
            }
            until_metric(&server, "typha_connections_streaming", CLIENTS as f64);
            let resumed = sent() - before;
            println!("{loss:?}: {snapshot} bytes for {CLIENTS} snapshots, {resumed} to resume");
            assert!(
                resumed < snapshot / 2.0,
                "{resumed} bytes to resume, {snapshot} for all"
            );
            let again = metric(&server, "typha_connections_accepted").unwrap() - accepted;
            assert!(again >= CLIENTS as f64, "{again} connections");
        }
        // What changes from here on comes as ever.
        let expected = change(&store, 2).await;
        for node in &mut nodes {
            while node.objects != content(&store).await {
                let SyncEvent::Updates(updates) = node.next().await else {
                    panic!("only changes")
                };
                for update in updates {
                    assert!(
                        expected.contains_key(&update.key)
                            || update.key.name.ends_with(&(SETS + 21).to_string())
                    );
                    match update.value {
                        Some(object) => drop(node.objects.insert(update.key, object)),
                        None => assert!(node.objects.remove(&update.key).is_some()),
                    }
                }
            }
        }
    });
}
