//! Simulated nodes over a real etcd, killed again and again, as is etcd itself: no address has two owners, and nothing leaks. Some
//! seconds; `make soak-ipam` runs the whole of it.

use cali_datastore::testing::Etcd;
use cali_tests::soak::{Cluster, Size, run, serve};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_simulated_node() {
    serve().await.expect("the node works");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_nodes_never_share_an_address_and_leave_nothing() {
    let mut etcd = Etcd::start();
    let folder = tempfile::tempdir().expect("a folder");
    let env: Vec<(String, String)> = vec![
        ("DATASTORE_TYPE".into(), "etcdv3".into()),
        ("ETCD_ENDPOINTS".into(), etcd.endpoint()),
    ];
    let named = env.clone();
    let store = cali_datastore::open_with(|name| {
        let found = named.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.clone())
    });
    let cluster = Cluster {
        store: store.expect("a store"),
        env,
        folder: folder.path().to_owned(),
    };
    let size = Size::of_env();
    let working = tokio::spawn(async move { run(cluster, &size, "a_simulated_node").await });
    tokio::time::sleep(Duration::from_secs(3)).await;
    etcd.restart();
    let seen = working.await.expect("no panic");
    println!("etcd: {}", seen.unwrap_or_else(|error| panic!("{error:#}")));
}
