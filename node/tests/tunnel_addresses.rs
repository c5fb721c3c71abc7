//! Tunnel addresses against the embedded datastore.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::sync::Arc;
use std::time::Duration;

use cali_api::v3::{EncapMode, IPPool, IPPoolSpec, Node, NodeSpec};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_ipam::Allocator;
use cali_node::tunnel_addresses::TunnelAddresses;
use tokio::sync::watch;
use tokio::time::timeout;

fn pool(mode: EncapMode) -> AnyResource {
    let cidr = "10.244.0.0/16".parse().unwrap();
    IPPool::named(
        "overlay",
        IPPoolSpec {
            vxlan_mode: Some(mode),
            ..IPPoolSpec::new(cidr)
        },
    )
    .into()
}

/// Follows the Node resource until its VXLAN address is (not) there.
async fn address(datastore: &Arc<dyn Datastore>) -> std::net::Ipv4Addr {
    let mut events = cali_datastore::sync::start(datastore.clone(), &[Kind::Node]);
    let published = async {
        loop {
            if let cali_api::update::SyncEvent::Updates(updates) = events.recv().await.unwrap() {
                for update in updates {
                    if let Some(AnyResource::Node(node)) = update.value.as_deref()
                        && let Some(address) = node.spec.ipv4_vxlan_tunnel_addr
                    {
                        return address;
                    }
                }
            }
        }
    };
    timeout(Duration::from_secs(10), published).await.unwrap()
}

#[tokio::test]
async fn pool_that_becomes_vxlan_gives_the_node_an_address_that_a_restart_keeps() {
    let folder = tempfile::tempdir().unwrap();
    let datastore: Arc<dyn Datastore> =
        Arc::new(Sqlite::open(&folder.path().join("cali.db")).unwrap());
    datastore
        .create(Node::named("n1", NodeSpec::default()).into())
        .await
        .unwrap();
    datastore.create(pool(EncapMode::Never)).await.unwrap();
    let (_dataplane, state) = watch::channel(Arc::default());
    let start = || {
        let events = cali_datastore::sync::start(datastore.clone(), &[Kind::Node, Kind::IPPool]);
        let allocator = Allocator::with_system_time(datastore.clone(), "n1");
        tokio::spawn(
            TunnelAddresses {
                datastore: datastore.clone(),
                allocator,
                dataplane: state.clone(),
            }
            .run(events),
        )
    };
    let task = start();
    datastore.apply(pool(EncapMode::CrossSubnet)).await.unwrap();
    let first = address(&datastore).await;
    let allocator = Allocator::with_system_time(datastore.clone(), "n1");
    assert_eq!(
        allocator
            .addresses_of("vxlan-tunnel-addr-n1")
            .await
            .unwrap(),
        [std::net::IpAddr::V4(first)]
    );
    task.abort();

    // The Node resource lost the address, as when it was deleted and made again; IPAM still has it.
    let key = Key::cluster(Kind::Node, "n1");
    datastore.delete(&key, None).await.unwrap();
    datastore
        .create(Node::named("n1", NodeSpec::default()).into())
        .await
        .unwrap();
    let task = start();
    assert_eq!(address(&datastore).await, first);
    assert_eq!(
        allocator
            .addresses_of("vxlan-tunnel-addr-n1")
            .await
            .unwrap()
            .len(),
        1
    );
    task.abort();
}
