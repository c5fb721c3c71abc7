//! A client that starts while no server answers, and one that starts again beside its server.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

mod running;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cali_api::Kind;
use cali_api::update::SyncEvent;
use running::{PATIENCE, View, serve};
use tokio::sync::mpsc;
use tokio::time::timeout;
use typha::client::{self, ClientConfig, Keep, Servers};

fn connect(port: u16, file: &Path, patience: Duration) -> mpsc::Receiver<SyncEvent> {
    connect_for(&[Kind::GlobalNetworkSet], port, file, patience)
}

fn connect_for(
    kinds: &[Kind],
    port: u16,
    file: &Path,
    patience: Duration,
) -> mpsc::Receiver<SyncEvent> {
    client::start(ClientConfig {
        servers: Servers::Fixed(vec![format!("127.0.0.1:{port}")]),
        hostname: "node1".into(),
        info: "test".into(),
        kinds: kinds.to_vec(),
        tls: None,
        keep: Some(Keep {
            file: file.to_owned(),
            patience,
        }),
        interest: None,
    })
}

/// What a client of a port where nobody listens is told from this file.
async fn alone(port: u16, file: &Path, expected: &BTreeMap<u32, u32>) -> View {
    let mut events = connect(port, file, Duration::from_millis(50));
    let mut view = View::default();
    view.until(&mut events, expected).await;
    view
}

/// A file that holds this state, and a port where nobody listens any more.
async fn kept(file: &Path, content: &BTreeMap<u32, u32>) -> u16 {
    let server = serve(0, content).await;
    let mut events = connect(server.port, file, PATIENCE);
    let mut view = View::default();
    view.until(&mut events, content).await;
    let port = server.kill().await;
    drop(events);
    closed(file).await;
    port
}

/// Until the last writer has closed the file: its log is gone then.
async fn closed(file: &Path) {
    let log = PathBuf::from(format!("{}-wal", file.display()));
    let gone = async {
        while log.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the file is closed");
}

#[tokio::test]
async fn without_a_server_the_last_state_counts_and_a_server_makes_up_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("updates.db");
    let mut content: BTreeMap<u32, u32> = (0..2500).map(|n| (n, 1)).collect();
    let port = kept(&file, &content).await;

    let mut events = connect(port, &file, Duration::from_millis(50));
    let mut view = View::default();
    view.until(&mut events, &content).await;
    assert_eq!((view.updates, view.in_sync_events), (2500, 1));

    content.remove(&7);
    content.insert(8, 2);
    let server = serve(port, &content).await;
    view.until(&mut events, &content).await;
    assert_eq!(view.deletions, 1, "only what is gone is deleted");
    assert_eq!(view.updates, 2502, "only what differs is told");
    drop(server);
}

#[tokio::test]
async fn a_server_that_answers_is_asked_for_the_difference_only() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("updates.db");
    let mut content: BTreeMap<u32, u32> = (0..2500).map(|n| (n, 1)).collect();
    let port = kept(&file, &content).await;
    content.remove(&7);
    content.insert(8, 2);
    let _server = serve(port, &content).await;
    let mut events = connect(port, &file, PATIENCE);
    let mut view = View::default();
    view.until(&mut events, &content).await;
    assert_eq!((view.updates, view.deletions), (2502, 1));
    assert_eq!(view.in_sync_events, 1, "the kept state alone is not all");
}

#[tokio::test]
async fn a_state_is_kept_up_to_its_last_change() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("updates.db");
    let mut content: BTreeMap<u32, u32> = (0..100).map(|n| (n, 1)).collect();
    kept(&file, &content).await;
    content.remove(&50);
    for number in 0..10 {
        content.insert(number, 2);
    }
    let port = kept(&file, &content).await;
    let view = alone(port, &file, &content).await;
    assert_eq!(view.updates, 99);
}

#[tokio::test]
async fn a_file_that_is_not_whole_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("updates.db");
    let content: BTreeMap<u32, u32> = (0..200).map(|n| (n, 1)).collect();
    let port = kept(&file, &content).await;
    let whole = std::fs::read(&file).unwrap();
    // Pages hold remains of what was moved elsewhere, too: every copy is changed.
    let text = b"10.0.0.0/8";
    let mut changed = whole.clone();
    let copies = whole.windows(text.len()).enumerate();
    let copies: Vec<usize> = copies
        .filter(|(_, window)| window == text)
        .map(|(at, _)| at)
        .collect();
    assert!(copies.len() >= 200, "{} objects", copies.len());
    for at in copies {
        changed[at] ^= 1;
    }
    let mut other_version = whole.clone();
    // user_version (SQLite's file format, offset 60).
    other_version[63] ^= 2;
    let mut other_program = whole.clone();
    // application_id (offset 68).
    other_program[71] ^= 1;
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("garbage", b"no database".repeat(100)),
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("changed", changed),
        ("another version", other_version),
        ("another program", other_program),
    ] {
        let file = folder.path().join("damaged.db");
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{end}", file.display()));
        }
        std::fs::write(&file, bytes).unwrap();
        let events = connect(port, &file, Duration::from_millis(10));
        nothing_is_told(&events, what).await;
        drop(events);
        closed(&file).await;
        // And it does not stay in the way.
        let again = BTreeMap::from([(1, 1)]);
        kept(&file, &again).await;
    }
    let other = [Kind::GlobalNetworkSet, Kind::IPPool];
    let events = connect_for(&other, port, &file, Duration::from_millis(10));
    nothing_is_told(&events, "another subscription").await;
}

async fn nothing_is_told(events: &mpsc::Receiver<SyncEvent>, what: &str) {
    // Waiting for the server is the one event; what is told from a file comes at once after it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(events.len() <= 1, "{what}: {} events", events.len());
}
