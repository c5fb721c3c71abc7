//! Seeds for the fuzz targets: what a server on the embedded datastore and a client say to each other, taken down between them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::targets::running::metric;
use cali_api::AnyResource;
use cali_api::manifest;
use cali_api::update::{SyncEvent, SyncStatus};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use typha::client::{self, ClientConfig, Servers};
use typha::server::{Leave, Patience, Server, ServerConfig};
use typha::source::all_kinds;
use typha::wire::{Body, Decoder, frame};

const LIMIT: Duration = Duration::from_secs(20);

/// What one side said on one connection.
pub(crate) struct Seed {
    pub(crate) name: String,
    pub(crate) octets: Vec<u8>,
}

pub(crate) fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds")
}

/// Those in the repository.
pub(crate) fn kept() -> Vec<Seed> {
    let mut seeds: Vec<Seed> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            Seed {
                name,
                octets: std::fs::read(path).unwrap(),
            }
        })
        .collect();
    seeds.sort_by(|one, other| one.name.cmp(&other.name));
    seeds
}

/// A stream cut into its frames.
pub(crate) fn frames(mut octets: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let Some((head, _)) = octets.split_first_chunk::<4>() {
        let end = 4 + u32::from_be_bytes(*head) as usize;
        let (frame, rest) = octets.split_at(end.min(octets.len()));
        frames.push(frame.to_vec());
        octets = rest;
    }
    frames
}

fn bodies(octets: &[u8]) -> Vec<Body> {
    let mut decoder = Decoder::from_servers();
    decoder.push(octets);
    std::iter::from_fn(|| decoder.next_message().unwrap()).collect()
}

/// The messages by name, those of one sort that follow one another as one; and how many objects of each kind there are.
pub(crate) fn gist(octets: &[u8]) -> (Vec<&'static str>, BTreeMap<String, usize>) {
    let mut names = Vec::new();
    let mut objects = BTreeMap::new();
    for body in bodies(octets) {
        // When one is asked whether it lives is up to the clock.
        if !matches!(body, Body::Ping(_) | Body::Pong(_)) {
            names.push(body.name());
        }
        if let Body::Updates(updates) = body {
            for object in updates.objects {
                *objects.entry(object.kind).or_default() += 1;
            }
        }
    }
    names.dedup();
    (names, objects)
}

fn examples() -> Vec<AnyResource> {
    let text = include_str!("../../../api/tests/examples.yaml");
    let examples = manifest::parse("examples.yaml", text).unwrap();
    examples.into_iter().map(|one| one.value).collect()
}

fn set(number: usize, version: usize) -> AnyResource {
    let json = serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
        "metadata": {"name": format!("set{number}"), "labels": {"version": version.to_string()}},
        "spec": {"nets": ["10.0.0.0/8"]},
    });
    AnyResource::from_json(json).unwrap()
}

/// What either side has said so far.
type Heard = Arc<Mutex<[Vec<u8>; 2]>>;

async fn pass_on(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    heard: &Heard,
    side: usize,
) {
    let mut piece = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        heard.lock().unwrap()[side].extend_from_slice(&piece[..length]);
        if to.write_all(&piece[..length]).await.is_err() {
            break;
        }
    }
}

/// Until everything so far has been told, and a deletion or change of this object where one is named.
async fn until(events: &mut mpsc::Receiver<SyncEvent>, object: Option<&str>) {
    loop {
        let event = timeout(LIMIT, events.recv()).await.unwrap().unwrap();
        match (event, object) {
            (SyncEvent::Status(SyncStatus::InSync), None) => return,
            (SyncEvent::Updates(updates), Some(name))
                if updates.iter().any(|u| &*u.key.name == name) =>
            {
                return;
            }
            _ => {}
        }
    }
}

/// Two connections of one client: it gets everything, follows changes, loses the connection, misses some, and resumes until the
/// server takes its leave.
pub(crate) async fn record() -> Vec<Seed> {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Sqlite::open(&folder.path().join("cali.db")).unwrap());
    for object in examples()
        .into_iter()
        .chain((0..400).map(|number| set(number, 0)))
    {
        let key = object.key();
        store
            .create(object)
            .await
            .unwrap_or_else(|error| panic!("{key}: {error}"));
    }
    let config = ServerConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        patience: Patience {
            ping: Duration::from_millis(200),
            ..Patience::default()
        },
        leave: Leave {
            interval: Duration::from_millis(1),
            ..Leave::default()
        },
        ..ServerConfig::default()
    };
    let server = Server::bind(config).unwrap();
    let address = server.local_addr().unwrap();
    let registry = server.registry();
    let newest = || metric(&registry, "typha_breadcrumb_seq_number");
    let (stop, stopped) = oneshot::channel::<()>();
    let source = cali_datastore::sync::start(store.clone(), &all_kinds());
    let server = tokio::spawn(server.run(source, async move { drop(stopped.await) }));
    let between = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut events = client::start(ClientConfig {
        servers: Servers::Fixed(vec![between.local_addr().unwrap().to_string()]),
        hostname: "node1".into(),
        info: "test".into(),
        kinds: all_kinds(),
        tls: None,
        keep: None,
        interest: None,
    });
    let mut said = Vec::new();
    let mut stop = Some(stop);
    for names in [
        ["client-hello", "server-snapshot"],
        ["client-resume", "server-resume"],
    ] {
        let (mut near, _) = timeout(LIMIT, between.accept()).await.unwrap().unwrap();
        let mut far = TcpStream::connect(address).await.unwrap();
        let heard = Heard::default();
        let talk = async {
            let (from_client, to_client) = near.split();
            let (from_server, to_server) = far.split();
            // The server ends it, or the end of this is not waited for.
            tokio::join!(
                pass_on(from_client, to_server, &heard, 0),
                pass_on(from_server, to_client, &heard, 1)
            );
        };
        let happen = async {
            until(&mut events, None).await;
            // A change, a deletion, and two of one object in a row.
            store.update(changed(&store, 5, 1).await).await.unwrap();
            until(&mut events, Some("set5")).await;
            let key = set(6, 0).key();
            store.delete(&key, None).await.unwrap();
            until(&mut events, Some("set6")).await;
            store.create(set(6, 2)).await.unwrap();
            until(&mut events, Some("set6")).await;
            let asked = async {
                while !bodies(&heard.lock().unwrap()[0])
                    .iter()
                    .any(|body| matches!(body, Body::Pong(_)))
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(LIMIT, asked).await.unwrap();
            if said.len() == 2 {
                stop.take().unwrap().send(()).unwrap();
                std::future::pending::<()>().await;
            }
        };
        tokio::select! { () = talk => {}, () = happen => {} }
        if said.is_empty() {
            // While nobody is connected.
            drop((near, far));
            let before = newest();
            store.update(changed(&store, 7, 3).await).await.unwrap();
            store.delete(&set(8, 0).key(), None).await.unwrap();
            let arrived = async {
                while newest() < before + 2.0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(LIMIT, arrived).await.unwrap();
        }
        let heard = std::mem::take(&mut *heard.lock().unwrap());
        said.extend(
            names
                .map(str::to_owned)
                .into_iter()
                .zip(heard)
                .map(|(name, octets)| Seed { name, octets }),
        );
    }
    timeout(LIMIT, server).await.unwrap().unwrap().unwrap();
    // Uncompressed, so that damage gets as far as the objects.
    for at in [1, 3] {
        let Seed { name, octets } = &said[at];
        let name = format!("{name}-plain");
        let octets = bodies(octets)
            .into_iter()
            .flat_map(|body| frame(body, false))
            .collect();
        said.push(Seed { name, octets });
    }
    said.sort_by(|one, other| one.name.cmp(&other.name));
    said
}

/// A set as it is stored, with another version.
async fn changed(store: &Sqlite, number: usize, version: usize) -> AnyResource {
    let mut stored = (*store.get(&set(number, 0).key()).await.unwrap().object).clone();
    let labels = &mut stored.metadata_mut().labels;
    labels.insert("version".into(), version.to_string());
    stored
}
