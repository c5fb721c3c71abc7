//! What is particular to the embedded store: its file, its bounded log, and several processes on one file.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cali_api::{AnyResource, Key, Kind};
use cali_datastore::conformance::{View, network_set, object};
use cali_datastore::sqlite::Sqlite;
use cali_datastore::{Datastore, Error, WatchEvent, sync};

/// Names the file to a child process of these tests.
const CHILD: &str = "CALI_TEST_SQLITE_CHILD";
const PROCESSES: usize = 4;
const ROUNDS: usize = 40;
const PATIENCE: Duration = Duration::from_secs(120);

fn counter() -> AnyResource {
    network_set("a", "counter", "10.0.0.0/8")
}

fn count_of(object: &AnyResource) -> usize {
    object
        .metadata()
        .annotations
        .get("count")
        .map_or(0, |c| c.parse().unwrap())
}

/// Runs only as a child: writes objects of its own and raises a counter that all processes share.
#[tokio::test]
async fn child_process() {
    let Some(path) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let store = Sqlite::open(&path).unwrap();
    let id = std::process::id();
    let key = counter().key();
    for round in 0..ROUNDS {
        store
            .create(network_set("a", &format!("p{id}-{round}"), "10.0.0.0/8"))
            .await
            .unwrap();
        loop {
            let mut value = store.get(&key).await.unwrap().object.as_ref().clone();
            let next = count_of(&value) + 1;
            value
                .metadata_mut()
                .annotations
                .insert("count".to_owned(), next.to_string());
            match store.update(value).await {
                Ok(_) => break,
                Err(Error::Conflict { .. }) => {}
                Err(e) => panic!("{e}"),
            }
        }
    }
}

fn child(path: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["child_process", "--exact"])
        .env(CHILD, path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_share_one_file_and_a_watch_sees_every_write_of_all_in_order() {
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cali.db");
    let store = Sqlite::open(&path).unwrap();
    let from = store.create(counter()).await.unwrap().revision;
    let mut watch = store.watch(&[Kind::NetworkSet], &from).await.unwrap();
    let mut children: Vec<_> = (0..PROCESSES).map(|_| child(&path)).collect();
    let (mut created, mut count) = (BTreeSet::new(), 0);
    let all = async {
        while created.len() < PROCESSES * ROUNDS || count < PROCESSES * ROUNDS {
            match watch.next().await.unwrap().unwrap() {
                WatchEvent::Put(v) if v.object.key() == counter().key() => {
                    let now = count_of(&v.object);
                    assert_eq!(
                        now,
                        count + 1,
                        "a step of the counter was lost or told out of order"
                    );
                    count = now;
                }
                WatchEvent::Put(v) => assert!(created.insert(v.object.key()), "told twice"),
                WatchEvent::Bookmark(_) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let result = tokio::time::timeout(PATIENCE, all).await;
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    result.expect("all writes of all processes are seen");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_fell_out_of_the_log_is_told_and_the_stream_sends_only_the_difference() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cali.db");
    let writer = Sqlite::open_with_log_length(&path, 16).unwrap();
    for name in ["stays", "goes"] {
        writer
            .create(network_set("a", name, "10.0.0.0/8"))
            .await
            .unwrap();
    }
    let old = writer.list(Kind::NetworkSet, None).await.unwrap().revision;
    let mut stream = sync::start(Arc::new(writer.clone()), &[Kind::NetworkSet]);
    let mut view = View::default();
    view.until(&mut stream, View::in_sync).await;
    // The stream is not read meanwhile, and its channels are bounded: it falls behind the log.
    writer
        .delete(&Key::namespaced(Kind::NetworkSet, "a", "goes"), None)
        .await
        .unwrap();
    for round in 0..3000 {
        let churn = network_set(
            "a",
            "churn",
            &format!("10.{}.{}.0/24", round / 256, round % 256),
        );
        writer.apply(churn).await.unwrap();
    }
    let gone = writer.watch(&[Kind::NetworkSet], &old).await;
    assert!(matches!(gone, Err(Error::RevisionGone { .. })), "{gone:?}");
    writer
        .create(network_set("a", "last", "10.0.0.0/8"))
        .await
        .unwrap();
    let last = Key::namespaced(Kind::NetworkSet, "a", "last");
    let caught_up = view.until(&mut stream, |v| v.objects.contains_key(&last));
    tokio::time::timeout(PATIENCE, caught_up)
        .await
        .expect("the stream catches up");
    let names: Vec<String> = view.objects.keys().map(|k| k.name.to_string()).collect();
    assert_eq!(names, ["churn", "last", "stays"]);
    assert!(view.spurious_deletions.is_empty());
}

#[tokio::test]
async fn the_file_and_its_companions_are_private() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/cali.db");
    let store = Sqlite::open(&path).unwrap();
    store.create(counter()).await.unwrap();
    for name in ["cali.db", "cali.db-wal", "cali.db-shm"] {
        let mode = std::fs::metadata(path.with_file_name(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777;
        assert_eq!(mode, 0o600, "{name} has mode {mode:o}");
    }
}

#[tokio::test]
async fn a_database_of_another_program_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.db");
    let other = rusqlite::Connection::open(&path).unwrap();
    other
        .execute_batch("CREATE TABLE mine (x); INSERT INTO mine VALUES (1);")
        .unwrap();
    let Err(error) = Sqlite::open(&path) else {
        panic!("it was taken over")
    };
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("another program"), "{cause}");
    let rows: i64 = other
        .query_row("SELECT count(*) FROM mine", [], |r| r.get(0))
        .unwrap();
    assert_eq!(rows, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_of_a_newer_version_keeps_its_last_good_form_in_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cali.db");
    let store = Sqlite::open(&path).unwrap();
    store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .unwrap();
    let mut stream = sync::start(Arc::new(store.clone()), &[Kind::NetworkSet]);
    let mut view = View::default();
    view.until(&mut stream, View::in_sync).await;
    let newer = "{\"apiVersion\":\"projectcalico.org/v3\",\"kind\":\"NetworkSet\",\"metadata\":{\"name\":\"one\",\"namespace\":\"a\"},\"spec\":{\"future\":1}}";
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch(&format!(
        "INSERT INTO changes (kind, namespace, name, body) SELECT kind, namespace, name, '{newer}' FROM objects;
         UPDATE objects SET body = '{newer}', revision = (SELECT max(revision) FROM changes);"
    ))
    .unwrap();
    store
        .create(network_set("a", "two", "10.0.0.0/8"))
        .await
        .unwrap();
    view.until(&mut stream, |v| v.objects.len() == 2).await;
    let key = Key::namespaced(Kind::NetworkSet, "a", "one");
    assert!(
        view.objects[&key]
            .to_json()
            .to_string()
            .contains("10.0.0.0/8")
    );
    let mut fresh = View::default();
    let mut second = sync::start(Arc::new(store.clone()), &[Kind::NetworkSet]);
    fresh.until(&mut second, View::in_sync).await;
    assert!(
        !fresh.objects.contains_key(&key),
        "without a predecessor it is not applied"
    );
    assert!(matches!(
        store.get(&key).await,
        Err(Error::Undecodable { .. })
    ));
    let plain = object(serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "NetworkSet",
        "metadata": {"name": "one", "namespace": "a"}, "spec": {"nets": ["11.0.0.0/8"]}
    }));
    let deleted = store.delete(&key, None).await;
    assert!(
        matches!(deleted, Err(Error::Undecodable { .. })),
        "{deleted:?}"
    );
    store.create(plain).await.unwrap();
    view.until(&mut stream, |v| {
        v.objects
            .get(&key)
            .is_some_and(|o| o.to_json().to_string().contains("11.0.0.0/8"))
    })
    .await;
}

#[test]
fn many_can_create_one_file_at_the_same_time() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cali.db");
        std::thread::scope(|scope| {
            let openers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Sqlite::open(&path).map(|_| ())))
                .collect();
            for opener in openers {
                opener.join().unwrap().unwrap();
            }
        });
    }
}
