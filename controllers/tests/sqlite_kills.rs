//! The real program over the embedded store: two replicas, one of which is killed again and again, clean up after a
//! deleted node and deleted pods while another node goes on working; nothing in use is touched.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::v3::{IPPoolSpec, NodeSpec};
use cali_api::{AnyResource, Resource};
use cali_controllers::check::check;
use cali_controllers::gc;
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_ipam::tunnel::Tunnel;
use cali_ipam::{Allocator, Owner, Request, names};
use serde_json::json;
use support::Replica;

const BOUND: Duration = Duration::from_secs(60);

fn pod(name: &str, node: &str, address: IpAddr) -> AnyResource {
    AnyResource::from_json(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
        "status": {"podIPs": [{"ip": address.to_string()}]},
    }))
    .unwrap()
}

fn owner(name: &str, node: &str) -> Owner {
    Owner::new(&format!("k8s-pod-network.{name}"))
        .with("node", node)
        .with("namespace", "default")
        .with("pod", name)
}

struct Cluster {
    store: Arc<dyn Datastore>,
    used: BTreeSet<IpAddr>,
    next: usize,
}

impl Cluster {
    fn allocator(&self, node: &str) -> Allocator {
        Allocator::with_system_time(Arc::clone(&self.store), node)
    }

    async fn node(&self, name: &str, journal: bool) {
        let mut node = Resource::named(name, NodeSpec::default());
        if journal {
            let annotations = &mut node.metadata.annotations;
            annotations.insert(names::JOURNAL_ANNOTATION.into(), "v1".into());
        }
        self.store.apply(node.into()).await.unwrap();
    }

    /// Pods that run, and as many whose objects were deleted without anybody releasing their addresses.
    async fn pods(&mut self, node: &str, count: usize) {
        let allocator = self.allocator(node);
        for turn in 0..count * 2 {
            self.next += 1;
            let name = format!("pod-{}", self.next);
            let leaked = turn % 2 == 1;
            if leaked {
                let request = Request::workload(owner(&name, node), 1, 0);
                allocator.assign(&request).await.unwrap();
                continue;
            }
            // As on a real node: the object is there before the address.
            let unknown = json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
            });
            let created = AnyResource::from_json(unknown).unwrap();
            self.store.apply(created).await.unwrap();
            let request = Request::workload(owner(&name, node), 1, 0);
            let address = allocator.assign(&request).await.unwrap()[0].address;
            self.store.apply(pod(&name, node, address)).await.unwrap();
            self.used.insert(address);
        }
    }

    async fn held(&self) -> BTreeSet<IpAddr> {
        let inventory = self.allocator("").inventory().await.unwrap();
        let held = inventory.blocks.iter().flat_map(|b| b.held());
        held.map(|(address, _)| address).collect()
    }

    async fn problems(&self) -> String {
        let (inventory, facts) = gc::read(&self.store, &self.allocator("")).await.unwrap();
        let found = check(&inventory, &facts).problems;
        if found.is_empty() {
            String::new()
        } else {
            format!("{found:?}")
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_replicas_clean_up_and_touch_nothing_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("cali.db");
    let store: Arc<dyn Datastore> = Arc::new(Sqlite::open(&database).unwrap());
    let mut cluster = Cluster {
        store,
        used: BTreeSet::new(),
        next: 0,
    };
    let mut pool = IPPoolSpec::new("10.0.0.0/22".parse().unwrap());
    pool.block_size = Some(28);
    pool.vxlan_mode = Some(cali_api::v3::EncapMode::Always);
    let pool = Resource::named("pool", pool);
    cluster.store.apply(pool.into()).await.unwrap();
    let settings = AnyResource::from_json(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "KubeControllersConfiguration",
        "metadata": {"name": "default"},
        "spec": {"controllers": {"node": {"leakGracePeriod": "300ms"}}},
    }))
    .unwrap();
    cluster.store.apply(settings).await.unwrap();
    cluster.node("plain", false).await;
    cluster.node("journal", true).await;
    cluster.pods("plain", 10).await;
    // A node that is gone: nobody ever made its Node, as after its deletion.
    let gone = cluster.allocator("gone");
    for name in 0..30 {
        let request = Request::workload(owner(&format!("gone-{name}"), "gone"), 1, 0);
        gone.assign(&request).await.unwrap();
    }
    let journal = cluster.allocator("journal");
    let reserve = Owner::new(&names::reserve_handle("journal")).with("node", "journal");
    let kept = [
        Request::workload(reserve, 8, 0),
        Request::workload(owner("deleted-while-out-of-contact", "journal"), 1, 0),
    ];
    for request in &kept {
        let assigned = journal.assign(request).await.unwrap();
        cluster.used.extend(assigned.iter().map(|a| a.address));
    }
    let tunnel = journal.ensure_tunnel_address(Tunnel::Vxlan).await.unwrap();
    cluster.used.extend(tunnel);

    let mut replicas = [
        Replica::start(&database, "r0"),
        Replica::start(&database, "r1"),
    ];
    for round in 0..6 {
        cluster.pods("plain", 4).await;
        let before = cluster.held().await.len();
        let started = Instant::now();
        // Killed in the middle of its work, if it is the leader; otherwise after a while.
        while started.elapsed() < Duration::from_millis(1500)
            && cluster.held().await.len() >= before
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        replicas[round % 2] = Replica::start(&database, &format!("r{}", round + 2));
        let held = cluster.held().await;
        let lost: Vec<_> = cluster.used.difference(&held).collect();
        assert!(lost.is_empty(), "freed although in use: {lost:?}");
    }
    let started = Instant::now();
    loop {
        let (held, problems) = (cluster.held().await, cluster.problems().await);
        if held == cluster.used && problems.is_empty() {
            break;
        }
        let (held, used) = (&held, &cluster.used);
        assert!(
            started.elapsed() < BOUND,
            "leaked: {:?}; freed: {:?}; {problems}",
            held.difference(used).collect::<Vec<_>>(),
            used.difference(held).collect::<Vec<_>>()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let inventory = cluster.allocator("").inventory().await.unwrap();
    let deserted: Vec<_> = inventory
        .affinities
        .iter()
        .filter(|a| a.node == "gone")
        .collect();
    assert!(deserted.is_empty(), "{deserted:?}");
}
