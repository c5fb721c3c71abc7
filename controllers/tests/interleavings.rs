//! Nodes with and without a journal, pods that come and go, nodes that are deleted and made anew, and collectors that die
//! anywhere, over a store that fails: no address that is in use is ever freed, and in the end nothing leaks.
#![allow(clippy::unwrap_used)]

#[path = "../../ipam/tests/support/mod.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use cali_api::v3::{IPPoolSpec, NodeSpec};
use cali_api::{AnyResource, Key, Kind, Resource};
use cali_controllers::gc::{self, Collector, Rules};
use cali_datastore::Datastore;
use cali_ipam::block::Block;
use cali_ipam::tunnel::Tunnel;
use cali_ipam::{Allocator, Owner, Request, names};
use proptest::prelude::*;
use serde_json::json;
use support::{Dice, Memory, run};

const GRACE: Duration = Duration::from_secs(900);

type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// What is really so, whatever the datastore says.
#[derive(Default)]
struct Truth {
    /// Addresses in use: by a running pod, a tunnel, or ready in a journal; with the node and who uses them.
    used: RefCell<BTreeMap<IpAddr, (String, String)>>,
    /// Lives of each node so far; even numbers are dead.
    lives: RefCell<BTreeMap<String, u32>>,
}

impl Truth {
    fn life(&self, node: &str) -> u32 {
        self.lives.borrow().get(node).copied().unwrap_or(0)
    }

    /// Takes addresses into use, if the node is still the one that asked for them.
    fn take(&self, node: &str, life: u32, who: &str, addresses: &[IpAddr]) -> bool {
        if self.life(node) != life {
            return false;
        }
        for address in addresses {
            let user = (node.to_owned(), who.to_owned());
            let other = self.used.borrow_mut().insert(*address, user);
            assert_eq!(
                other, None,
                "{address} was given to {who} while {other:?} had it"
            );
        }
        true
    }

    fn stop(&self, who: &str) {
        self.used.borrow_mut().retain(|_, (_, user)| user != who);
    }
}

fn allocator(
    store: &Arc<Memory>,
    node: &str,
    seconds: &Arc<std::sync::atomic::AtomicU64>,
) -> Allocator {
    let seconds = Arc::clone(seconds);
    let time = Arc::new(move || {
        let now = seconds.load(std::sync::atomic::Ordering::Relaxed);
        SystemTime::UNIX_EPOCH + Duration::from_secs(now)
    });
    Allocator::new(Arc::clone(store) as Arc<dyn Datastore>, node, time)
}

async fn insist(store: &Memory, object: &AnyResource) {
    while store.apply(object.clone()).await.is_err() {}
}

async fn insist_gone(store: &Memory, key: &Key) {
    while matches!(
        store.delete(key, None).await,
        Err(cali_datastore::Error::Unavailable { .. })
    ) {}
}

fn node_object(name: &str, journal: bool) -> AnyResource {
    let mut node = Resource::named(name, NodeSpec::default());
    if journal {
        node.metadata
            .annotations
            .insert(names::JOURNAL_ANNOTATION.into(), "v1".into());
    }
    node.into()
}

fn pod_object(name: &str, node: &str, addresses: &[IpAddr]) -> AnyResource {
    let ips: Vec<_> = addresses
        .iter()
        .map(|a| json!({"ip": a.to_string()}))
        .collect();
    AnyResource::from_json(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
        "status": {"podIPs": ips},
    }))
    .unwrap()
}

fn pod_key(name: &str) -> Key {
    Key::namespaced(Kind::K8sPod, "default", name)
}

fn pod_owner(name: &str, node: &str) -> Owner {
    Owner::new(&format!("k8s-pod-network.{name}"))
        .with("node", node)
        .with("namespace", "default")
        .with("pod", name)
}

fn plain(assigned: &[cali_ipam::Assigned]) -> Vec<IpAddr> {
    assigned.iter().map(|a| a.address).collect()
}

/// A pod on a node without a journal, from the making of its object to its end.
async fn pod(
    store: &Memory,
    allocator: &Allocator,
    truth: &Truth,
    name: String,
    stays: bool,
    leaks: bool,
) {
    let node = allocator.node().to_owned();
    let life = truth.life(&node);
    insist(store, &pod_object(&name, &node, &[])).await;
    let owner = pod_owner(&name, &node);
    let handle = owner.handle().unwrap().to_owned();
    if let Ok(assigned) = allocator.assign(&Request::workload(owner, 1, 0)).await {
        let addresses = plain(&assigned);
        if !truth.take(&node, life, &name, &addresses) {
            return;
        }
        insist(store, &pod_object(&name, &node, &addresses)).await;
        if stays {
            return;
        }
        truth.stop(&name);
        if !leaks {
            let _ = allocator.release_handle(&handle).await;
        }
    }
    insist_gone(store, &pod_key(&name)).await;
}

/// A node with a journal: its reserve, its tunnel, and a pod of which the API server knows nothing (any more).
async fn journal_node(allocator: &Allocator, truth: &Truth) {
    let node = allocator.node().to_owned();
    let life = truth.life(&node);
    if let Ok(Some(address)) = allocator.ensure_tunnel_address(Tunnel::Vxlan).await {
        truth.take(&node, life, &format!("tunnel of {node}"), &[address]);
    }
    let reserve = Owner::new(&names::reserve_handle(&node))
        .with("node", &node)
        .with("type", "reserve");
    if let Ok(assigned) = allocator.assign(&Request::workload(reserve, 2, 0)).await {
        truth.take(
            &node,
            life,
            &format!("reserve of {node}"),
            &plain(&assigned),
        );
    }
    let owner = pod_owner(&format!("gone-{node}-{life}"), &node);
    if let Ok(assigned) = allocator.assign(&Request::workload(owner, 1, 0)).await {
        truth.take(&node, life, &format!("pod of {node}"), &plain(&assigned));
    }
}

/// The machine ends, then its objects are deleted; perhaps another one comes up under its name.
async fn replace(
    store: &Memory,
    truth: &Truth,
    node: &str,
    pods: &[String],
    again: bool,
    journal: bool,
) {
    *truth.lives.borrow_mut().get_mut(node).unwrap() += 1;
    truth.used.borrow_mut().retain(|_, (on, _)| on != node);
    insist_gone(store, &Key::cluster(Kind::Node, node)).await;
    for pod in pods {
        insist_gone(store, &pod_key(pod)).await;
    }
    if again {
        insist(store, &node_object(node, journal)).await;
        *truth.lives.borrow_mut().get_mut(node).unwrap() += 1;
    }
}

async fn collect(store: &Arc<Memory>, allocator: &Allocator, clock: &Cell<Instant>, passes: usize) {
    let store = Arc::clone(store) as Arc<dyn Datastore>;
    let mut collector = Collector::new(Rules { grace: Some(GRACE) });
    for _ in 0..passes {
        let _ = gc::pass(&store, allocator, &mut collector, clock.get(), false).await;
        clock.set(clock.get() + GRACE / 2);
    }
}

fn immediately(future: impl Future<Output = ()>) {
    run(vec![Box::pin(future)], &mut Dice::new(1), 0);
}

fn holders(store: &Memory) -> BTreeMap<IpAddr, Owner> {
    let mut holders = BTreeMap::new();
    for object in store.objects(Kind::IPAMBlock) {
        let AnyResource::IPAMBlock(object) = object else {
            unreachable!()
        };
        let block = Block::from_spec(object.spec.clone());
        assert_eq!(block.defect(), None, "block {}", block.cidr());
        holders.extend(block.held());
    }
    holders
}

fn nothing_in_use_was_freed(store: &Memory, truth: &Truth) {
    let holders = holders(store);
    for (address, (node, who)) in truth.used.borrow().iter() {
        let holder = holders.get(address);
        assert_eq!(
            holder.and_then(|o| o.attribute("node")),
            Some(node.as_str()),
            "{address} is used by {who} on {node}, and the datastore says {holder:?}"
        );
    }
}

fn nothing_leaks(store: &Memory, truth: &Truth, journals: &BTreeSet<String>) {
    let nodes: BTreeSet<String> = store
        .objects(Kind::Node)
        .iter()
        .map(|n| n.metadata().name.clone())
        .collect();
    let pods: BTreeSet<String> = store
        .objects(Kind::K8sPod)
        .iter()
        .map(|p| p.metadata().name.clone())
        .collect();
    let holders = holders(store);
    for (address, owner) in &holders {
        let node = owner.attribute("node").unwrap();
        let pod = owner.attribute("pod").unwrap_or_default();
        let excused = nodes.contains(node) && journals.contains(node) || pods.contains(pod);
        assert!(
            excused || truth.used.borrow().contains_key(address),
            "{address} of {owner:?} leaks"
        );
    }
    for object in store.objects(Kind::BlockAffinity) {
        let AnyResource::BlockAffinity(affinity) = object else {
            unreachable!()
        };
        assert!(
            nodes.contains(&affinity.spec.node),
            "affinity of a deleted node: {affinity:?}"
        );
    }
    for object in store.objects(Kind::IPAMHandle) {
        let AnyResource::IPAMHandle(handle) = object else {
            unreachable!()
        };
        assert!(!handle.spec.block.is_empty(), "empty handle {handle:?}");
        for text in handle.spec.block.keys() {
            let cidr: cali_api::Cidr = text.parse().unwrap();
            let held = holders
                .iter()
                .any(|(a, o)| cidr.contains(*a) && o.has_handle(&handle.spec.handle_id));
            assert!(held, "stale handle {handle:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn nothing_in_use_is_freed_and_nothing_leaks(
        seed in any::<u64>(),
        fail_one_in in prop_oneof![Just(0usize), Just(40), Just(15)],
        crash_one_in in prop_oneof![Just(0usize), Just(400), Just(100)],
        strict in any::<bool>(),
    ) {
        let mut dice = Dice::new(seed);
        let store = Memory::new(seed, 0);
        let seconds = Arc::new(std::sync::atomic::AtomicU64::new(1_000_000));
        let truth = Truth::default();
        let journals: BTreeSet<String> = ["a".to_owned(), "b".to_owned()].into();
        let names = ["a", "b", "c", "d"];
        immediately(async {
            let mut spec = IPPoolSpec::new("10.0.0.0/27".parse().unwrap());
            spec.block_size = Some(29);
            spec.vxlan_mode = Some(cali_api::v3::EncapMode::Always);
            insist(&store, &Resource::named("pool", spec).into()).await;
            if strict {
                let configuration = cali_api::v3::IPAMConfigurationSpec { strict_affinity: true, ..Default::default() };
                insist(&store, &Resource::named("default", configuration).into()).await;
            }
            for name in names {
                insist(&store, &node_object(name, journals.contains(name))).await;
                truth.lives.borrow_mut().insert(name.to_owned(), 1);
            }
        });
        store.set_failures(fail_one_in);
        let allocators: BTreeMap<&str, Allocator> = names.iter().map(|n| (*n, allocator(&store, n, &seconds))).collect();
        let collector = allocator(&store, "", &seconds);
        let clock = Cell::new(Instant::now());
        for _ in 0..3 {
            seconds.fetch_add(120, std::sync::atomic::Ordering::Relaxed);
            let mut tasks: Vec<Task<'_>> = Vec::new();
            let mut pods: BTreeMap<&str, Vec<String>> = BTreeMap::new();
            for node in ["c", "d"] {
                for _ in 0..dice.below(4) {
                    let name = format!("p{}", dice.below(1_000_000));
                    pods.entry(node).or_default().push(name.clone());
                    let (stays, leaks) = (dice.one_in(3), dice.one_in(2));
                    if truth.life(node) % 2 == 1 {
                        tasks.push(Box::pin(pod(&store, &allocators[node], &truth, name, stays, leaks)));
                    }
                }
            }
            for node in ["a", "b"] {
                let fresh = !truth.used.borrow().values().any(|(on, _)| on == node);
                if truth.life(node) % 2 == 1 && fresh {
                    tasks.push(Box::pin(journal_node(&allocators[node], &truth)));
                }
            }
            for _ in 0..=dice.below(2) {
                tasks.push(Box::pin(collect(&store, &collector, &clock, 4)));
            }
            run(tasks, &mut dice, crash_one_in);
            nothing_in_use_was_freed(&store, &truth);
            if dice.one_in(2) {
                let node = names[dice.below(names.len())];
                if truth.life(node) % 2 == 1 {
                    let mut gone = pods.get(node).cloned().unwrap_or_default();
                    gone.extend(store.objects(Kind::K8sPod).iter().map(|p| p.metadata().name.clone()).filter(|p| truth.used.borrow().values().any(|(on, who)| on == node && who == p)));
                    let again = dice.one_in(2);
                    let mut tasks: Vec<Task<'_>> = vec![Box::pin(replace(&store, &truth, node, &gone, again, journals.contains(node)))];
                    tasks.push(Box::pin(collect(&store, &collector, &clock, 3)));
                    // The replacement itself is never cut short, or truth and objects would differ by the test's own doing.
                    run(tasks, &mut dice, 0);
                    nothing_in_use_was_freed(&store, &truth);
                }
            }
        }
        store.set_failures(0);
        immediately(collect(&store, &collector, &clock, 12));
        nothing_in_use_was_freed(&store, &truth);
        nothing_leaks(&store, &truth, &journals);
    }
}
