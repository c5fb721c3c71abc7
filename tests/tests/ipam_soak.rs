//! Simulated nodes over the embedded store, killed again and again: no address has two owners, and nothing leaks. Some seconds;
//! `make soak-ipam` runs the whole of it.

use cali_datastore::sqlite::Sqlite;
use cali_tests::soak::{Cluster, Size, run, serve};
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_simulated_node() {
    serve().await.expect("the node works");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_nodes_never_share_an_address_and_leave_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("cali.db");
    let cluster = Cluster {
        store: Arc::new(Sqlite::open(&file).expect("a store")),
        env: vec![
            ("DATASTORE_TYPE".into(), "sqlite".into()),
            ("CALI_SQLITE_PATH".into(), file.display().to_string()),
        ],
        folder: folder.path().to_owned(),
    };
    let seen = run(cluster, &Size::of_env(), "a_simulated_node").await;
    println!(
        "SQLite: {}",
        seen.unwrap_or_else(|error| panic!("{error:#}"))
    );
}
