//! Start-up against the embedded datastore, in a namespace of its own.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::v3::Node;
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_netlink::testing::{TestNs, patient};
use cali_node::startup::follow::{GROUPS, follow};
use cali_node::startup::settings::{HostNames, Settings};
use cali_node::startup::{self, StartError};
use typha::config::Env;

fn settings(folder: &Path, env: &[(&str, &str)]) -> Settings {
    let names = HostNames {
        remembered: None,
        hostname: "unused".into(),
    };
    Settings::read(&env.iter().copied().collect::<Env>(), &names, folder).unwrap()
}

/// A host with one address on `eth0`.
fn host(label: &str, address: &str) -> TestNs {
    let host = TestNs::new(label);
    host.ip("link add eth0 type veth peer name peer0");
    host.ip("link set eth0 up");
    host.ip(&format!("addr add {address} dev eth0"));
    host
}

fn open(folder: &Path) -> Arc<dyn Datastore> {
    Arc::new(Sqlite::open(&folder.join("cali.db")).unwrap())
}

async fn stored(datastore: &dyn Datastore, key: Key) -> AnyResource {
    (*datastore.get(&key).await.unwrap().object).clone()
}

#[tokio::test]
async fn start_registers_the_node_and_a_second_start_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let datastore = open(folder.path());
    let host = host("startup", "10.9.0.1/24");
    let settings = settings(
        folder.path(),
        &[("NODENAME", "n1"), ("CLUSTER_TYPE", "lab")],
    );
    startup::prepare(&settings, &datastore, host.netlink())
        .await
        .unwrap();

    let mut everything = Vec::new();
    for key in [
        Key::cluster(Kind::Node, "n1"),
        Key::cluster(Kind::IPPool, "default-ipv4-ippool"),
        Key::cluster(Kind::ClusterInformation, "default"),
        Key::cluster(Kind::FelixConfiguration, "default"),
        Key::cluster(Kind::BGPConfiguration, "default"),
        Key::cluster(Kind::IPAMConfiguration, "default"),
        Key::cluster(Kind::Tier, "default"),
        Key::cluster(Kind::Tier, "kube-admin"),
        Key::cluster(Kind::Tier, "kube-baseline"),
    ] {
        everything.push(stored(&*datastore, key).await);
    }
    let AnyResource::Node(node) = &everything[0] else {
        panic!("{:?}", everything[0])
    };
    assert_eq!(node.spec.ipv4().unwrap().to_string(), "10.9.0.1/24");
    assert_eq!(
        std::fs::read_to_string(folder.path().join("nodename")).unwrap(),
        "n1"
    );

    startup::prepare(&settings, &datastore, host.netlink())
        .await
        .unwrap();
    for before in everything {
        assert_eq!(
            stored(&*datastore, before.key()).await,
            before,
            "revisions included"
        );
    }
}

/// SQLite gives up a write after ten seconds: a node that starts beside a longer one must not end.
#[tokio::test]
async fn a_busy_datastore_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let datastore = open(folder.path());
    let other = rusqlite::Connection::open(folder.path().join("cali.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let host = host("busy", "10.9.0.1/24");
    let settings = settings(folder.path(), &[("NODENAME", "n1")]);
    let start = startup::prepare(&settings, &datastore, host.netlink());
    let release = async move {
        tokio::time::sleep(Duration::from_secs(11)).await;
        other.execute_batch("ROLLBACK").unwrap();
    };
    let (node, ()) = tokio::join!(start, release);
    assert_eq!(node.unwrap().metadata.name, "n1");
}

#[tokio::test]
async fn a_detected_address_is_followed_and_kept_while_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let datastore = open(folder.path());
    let host = host("follow", "10.9.0.1/24");
    let settings = settings(folder.path(), &[("NODENAME", "n1"), ("IP", "autodetect")]);
    startup::prepare(&settings, &datastore, host.netlink())
        .await
        .unwrap();
    let events = host.netlink().events(GROUPS).unwrap();
    let following = follow(settings, datastore.clone(), host.netlink().clone(), events);
    let task = tokio::spawn(following);
    let becomes = async |address: &str| {
        let start = Instant::now();
        loop {
            let key = Key::cluster(Kind::Node, "n1");
            let AnyResource::Node(node) = stored(&*datastore, key).await else {
                panic!("not a node")
            };
            let now = node.spec.ipv4().unwrap().to_string();
            if now == address {
                return;
            }
            assert!(
                start.elapsed() < patient(Duration::from_secs(20)),
                "{now} instead of {address}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    host.ip("addr del 10.9.0.1/24 dev eth0");
    host.ip("addr add 10.9.7.7/24 dev eth0");
    becomes("10.9.7.7/24").await;
    host.ip("addr del 10.9.7.7/24 dev eth0");
    // Time enough to notice that there is none.
    tokio::time::sleep(Duration::from_secs(2)).await;
    becomes("10.9.7.7/24").await;
    host.ip("addr add 10.9.7.7/20 dev eth0");
    becomes("10.9.7.7/20").await;
    task.abort();
}

#[tokio::test]
async fn many_nodes_start_at_once_on_one_datastore() {
    let folder = tempfile::tempdir().unwrap();
    let datastore = open(folder.path());
    let mut starts = tokio::task::JoinSet::new();
    let hosts: Vec<TestNs> = (1..=6)
        .map(|n| host("together", &format!("10.9.0.{n}/24")))
        .collect();
    for (number, host) in hosts.iter().enumerate() {
        let settings = settings(folder.path(), &[("NODENAME", &format!("n{number}"))]);
        let (datastore, netlink) = (datastore.clone(), host.netlink().clone());
        starts.spawn(async move { startup::prepare(&settings, &datastore, &netlink).await });
    }
    while let Some(started) = starts.join_next().await {
        started.unwrap().unwrap();
    }
    assert_eq!(
        datastore.list(Kind::Node, None).await.unwrap().items.len(),
        6
    );
    assert_eq!(
        datastore
            .list(Kind::ClusterInformation, None)
            .await
            .unwrap()
            .items
            .len(),
        1
    );
}

#[tokio::test]
async fn second_node_with_the_same_address_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let datastore = open(folder.path());
    let host = host("duplicate", "10.9.0.1/24");
    startup::prepare(
        &settings(folder.path(), &[("NODENAME", "n1")]),
        &datastore,
        host.netlink(),
    )
    .await
    .unwrap();
    let second = settings(folder.path(), &[("NODENAME", "n2")]);
    let error = startup::prepare(&second, &datastore, host.netlink())
        .await
        .unwrap_err();
    assert!(
        matches!(error, StartError::Node(_)) && error.to_string().contains("node n1"),
        "{error}"
    );
    let allowed = settings(
        folder.path(),
        &[("NODENAME", "n2"), ("DISABLE_NODE_IP_CHECK", "true")],
    );
    let node: Node = startup::prepare(&allowed, &datastore, host.netlink())
        .await
        .unwrap();
    assert_eq!(node.metadata.name, "n2");
}

#[test]
fn can_reach_takes_the_kernels_source_address() {
    let host = host("reach", "10.9.0.1/24");
    host.ip("addr add 10.9.1.1/24 dev eth0");
    host.ip("link set peer0 up");
    host.ip("route add 192.0.2.0/24 via 10.9.1.254");
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(
        folder.path(),
        &[
            ("NODENAME", "n1"),
            ("IP_AUTODETECTION_METHOD", "can-reach=192.0.2.9"),
        ],
    );
    // The question goes through a socket of the calling thread's namespace, as in the daemon.
    let node = host.netns().run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            // Hints are asked on the blocking pool, whose threads are made by this one and so are in its namespace.
            let netlink = cali_netlink::Netlink::current().unwrap();
            startup::prepare(&settings, &open(folder.path()), &netlink)
                .await
                .unwrap()
        })
    });
    assert_eq!(
        node.unwrap().spec.ipv4().unwrap().to_string(),
        "10.9.1.1/24"
    );
}
