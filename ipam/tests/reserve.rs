//! The reserve over a real store: answers without the store, restarts, and many nodes at once.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use cali_api::v3::{EncapMode, IPAMConfigurationSpec, IPPoolSpec};
use cali_api::{AnyResource, Key, Kind, Resource};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_datastore::testing::Switched;
use cali_ipam::block::Block;
use cali_ipam::reserve::{Ask, Keeper, Settings};
use cali_ipam::tunnel::Tunnel;
use cali_ipam::{Allocator, Owner};

const PATIENCE: Duration = Duration::from_secs(60);

fn pool(name: &str, cidr: &str, edit: impl FnOnce(&mut IPPoolSpec)) -> AnyResource {
    let mut spec = IPPoolSpec::new(cidr.parse().unwrap());
    edit(&mut spec);
    Resource::named(name, spec).into()
}

fn switched(folder: &Path) -> Arc<Switched> {
    Switched::new(Arc::new(Sqlite::open(&folder.join("cali.db")).unwrap()))
}

/// A store with the pool `one`, 10.0.0.0/24.
async fn store_with_pool(folder: &Path) -> Arc<Switched> {
    let store = switched(folder);
    let one = pool("one", "10.0.0.0/24", |_| {});
    store.create(one).await.unwrap();
    store
}

async fn keeper(store: &Arc<Switched>, folder: &Path, node: &str) -> Keeper {
    let allocator = Allocator::with_system_time(store.clone(), node);
    keeper_of(allocator, folder, node).await
}

async fn keeper_of(allocator: Allocator, folder: &Path, node: &str) -> Keeper {
    let mut settings = Settings::new(folder.join(format!("{node}.journal")));
    // Nothing here may depend on the slow comparison.
    settings.audit = Duration::from_secs(3600);
    Keeper::open(allocator, settings).await.unwrap()
}

fn ask(handle: &str, node: &str, pools: &[&str]) -> Ask {
    Ask {
        owner: Owner::new(handle)
            .with("node", node)
            .with("pod", handle)
            .with("namespace", "test"),
        v4: true,
        v6: false,
        pools_v4: pools.iter().map(|p| (*p).to_owned()).collect(),
        pools_v6: Vec::new(),
        namespace_labels: None,
    }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen"))
}

/// Every held address in the store with its handle.
async fn stored(store: &Switched) -> BTreeMap<IpAddr, String> {
    let list = store.behind().list(Kind::IPAMBlock, None).await.unwrap();
    let mut held = BTreeMap::new();
    for item in list.items {
        let AnyResource::IPAMBlock(block) = item.object.as_ref() else {
            unreachable!()
        };
        for (address, owner) in Block::from_spec(block.spec.clone()).held() {
            held.insert(address, owner.handle().unwrap().to_owned());
        }
    }
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reserve_serves_while_the_store_is_away_and_tells_it_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_pool(folder.path()).await;
    let keeper = keeper(&store, folder.path(), "n1").await;
    let first = keeper.acquire(&ask("net.first", "n1", &[])).await.unwrap();
    soon("the refill", keeper.settled()).await.unwrap();
    let ready = keeper.ready().await.len();
    assert!(ready >= 4, "only {ready} addresses are ready");

    store.set_away(true);
    let mut got = BTreeSet::from([first[0].address]);
    for number in 0..ready {
        let held = keeper
            .acquire(&ask(&format!("net.{number}"), "n1", &[]))
            .await
            .unwrap();
        assert!(
            got.insert(held[0].address),
            "{} was given twice",
            held[0].address
        );
    }
    let error = keeper
        .acquire(&ask("net.beyond", "n1", &[]))
        .await
        .unwrap_err();
    assert!(
        error.is_transient(),
        "beyond the reserve the answer is: try again, not {error}"
    );
    keeper.release("net.0").await.unwrap();

    store.set_away(false);
    soon("the catching up", keeper.settled()).await.unwrap();
    let stored = stored(&store).await;
    for number in 1..ready {
        assert!(
            stored.values().any(|h| *h == format!("net.{number}")),
            "net.{number} is missing in {stored:?}"
        );
    }
    assert!(!stored.values().any(|h| h == "net.0"), "net.0 is gone");
    assert!(
        store
            .behind()
            .get(&Key::cluster(Kind::IPAMHandle, "net.0"))
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_without_the_store_remembers_who_has_what() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_pool(folder.path()).await;
    let before = {
        let keeper = keeper(&store, folder.path(), "n1").await;
        keeper
            .acquire(&ask("net.warm-up", "n1", &[]))
            .await
            .unwrap();
        soon("the refill", keeper.settled()).await.unwrap();
        store.set_away(true);
        let held = keeper.acquire(&ask("net.a", "n1", &["one"])).await.unwrap();
        // The journal's lock goes with the last task that holds it.
        held
    };
    let again = soon("the release of the journal", async {
        loop {
            let allocator = Allocator::with_system_time(store.clone(), "n1");
            match Keeper::open(allocator, Settings::new(folder.path().join("n1.journal"))).await {
                Ok(keeper) => break keeper,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    assert_eq!(
        again.acquire(&ask("net.a", "n1", &["one"])).await.unwrap(),
        before,
        "the same owner gets the same"
    );
    let other = again.acquire(&ask("net.b", "n1", &["one"])).await.unwrap();
    assert_ne!(other[0].address, before[0].address);
    store.set_away(false);
    soon("the catching up", again.settled()).await.unwrap();
    assert_eq!(
        stored(&store)
            .await
            .get(&before[0].address)
            .map(String::as_str),
        Some("net.a")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_get_addresses_of_the_pool_they_ask_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = switched(folder.path());
    store
        .create(pool("overlay", "10.1.0.0/24", |_| {}))
        .await
        .unwrap();
    store
        .create(pool("routed", "10.2.0.0/24", |_| {}))
        .await
        .unwrap();
    let keeper = keeper(&store, folder.path(), "n1").await;
    for (handle, name) in [
        ("net.a", "routed"),
        ("net.b", "overlay"),
        ("net.c", "10.2.0.0/24"),
    ] {
        let held = keeper.acquire(&ask(handle, "n1", &[name])).await.unwrap();
        let expected = if name == "overlay" {
            "overlay"
        } else {
            "routed"
        };
        assert_eq!(held[0].pool, expected, "{handle}");
    }
    let unknown = keeper
        .acquire(&ask("net.d", "n1", &["nowhere"]))
        .await
        .unwrap_err();
    assert!(unknown.to_string().contains("nowhere"), "{unknown}");
    assert!(!unknown.is_transient());
}

fn information(ready: bool) -> AnyResource {
    AnyResource::from_json(serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "ClusterInformation", "metadata": {"name": "default"},
        "spec": {"datastoreReady": ready},
    }))
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_store_is_left_as_it_is_until_it_is_unlocked() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_pool(folder.path()).await;
    let keeper = keeper(&store, folder.path(), "n1").await;
    let held = keeper.acquire(&ask("net.a", "n1", &[])).await.unwrap();
    soon("the refill", keeper.settled()).await.unwrap();
    store.apply(information(false)).await.unwrap();
    let mut number = 0;
    let refused = soon("the lock", async {
        loop {
            number += 1;
            let handle = format!("net.{number}");
            match keeper.acquire(&ask(&handle, "n1", &[])).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => break error,
            }
        }
    })
    .await;
    assert!(matches!(refused, cali_ipam::Error::Locked), "{refused}");
    assert!(refused.is_transient());
    // Who has an address is told it again, and a pod that goes is not held up: the store is told afterwards.
    let again = keeper.acquire(&ask("net.a", "n1", &[])).await.unwrap();
    assert_eq!(again, held);
    let before = stored(&store).await;
    keeper.release("net.a").await.unwrap();
    assert!(keeper.acquire(&ask("net.late", "n1", &[])).await.is_err());
    assert_eq!(stored(&store).await, before);
    store.apply(information(true)).await.unwrap();
    soon("the catching up", keeper.settled()).await.unwrap();
    assert!(
        !stored(&store)
            .await
            .values()
            .any(|handle| handle == "net.a")
    );
    keeper.acquire(&ask("net.late", "n1", &[])).await.unwrap();
}

/// With a cooldown, what a pod gives back does not become ready on the node: it rests in the store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_released_address_rests_and_then_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = switched(folder.path());
    let small = pool("small", "10.0.0.0/30", |spec| spec.block_size = Some(30));
    store.create(small).await.unwrap();
    let configuration = IPAMConfigurationSpec {
        ip_cooldown_seconds: Some(600),
        ..Default::default()
    };
    let configuration = Resource::named("default", configuration).into();
    store.create(configuration).await.unwrap();
    let later = Arc::new(AtomicU64::new(0));
    let clock = later.clone();
    let time = move || SystemTime::now() + Duration::from_secs(clock.load(Ordering::Relaxed));
    let allocator = Allocator::new(store.clone(), "n1", Arc::new(time));
    let keeper = keeper_of(allocator, folder.path(), "n1").await;
    let mut held = BTreeMap::new();
    for number in 0..4 {
        let handle = format!("net.{number}");
        let got = keeper.acquire(&ask(&handle, "n1", &[])).await.unwrap();
        held.insert(handle, got[0].address);
    }
    keeper.release("net.2").await.unwrap();
    soon("the release", keeper.settled()).await.unwrap();
    let refused = keeper.acquire(&ask("net.new", "n1", &[])).await;
    assert!(refused.is_err(), "{refused:?}");
    later.store(601, Ordering::Relaxed);
    let got = keeper.acquire(&ask("net.new", "n1", &[])).await.unwrap();
    assert_eq!(got[0].address, held["net.2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_journal_is_rebuilt_from_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_pool(folder.path()).await;
    let before = {
        let keeper = keeper(&store, folder.path(), "n1").await;
        let held = keeper.acquire(&ask("net.a", "n1", &[])).await.unwrap();
        soon("the refill", keeper.settled()).await.unwrap();
        held
    };
    let elsewhere = folder.path().join("other");
    let again = keeper(&store, &elsewhere, "n1").await;
    soon("the audit", again.settled()).await.unwrap();
    let known = again.attachment("net.a").await.map(|a| a.addresses);
    assert_eq!(known.as_ref(), Some(&before));
    assert!(
        again.ready().await.len() >= 4,
        "the reserve is taken up again"
    );
}

/// A process that is killed between the writes of a handle and of its block leaves a count that is too high.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_that_counts_too_much_goes_with_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_pool(folder.path()).await;
    let keeper = keeper(&store, folder.path(), "n1").await;
    keeper.acquire(&ask("net.pod", "n1", &[])).await.unwrap();
    soon("the write", keeper.settled()).await.unwrap();
    let handles = || async { store.list(Kind::IPAMHandle, None).await.unwrap().items };
    let found = handles().await.into_iter().find_map(|item| {
        let AnyResource::IPAMHandle(handle) = item.object.as_ref() else {
            unreachable!()
        };
        (handle.spec.handle_id == "net.pod").then(|| handle.clone())
    });
    let mut handle = found.unwrap();
    for count in handle.spec.block.values_mut() {
        *count += 1;
    }
    store.apply((*handle).into()).await.unwrap();
    keeper.release("net.pod").await.unwrap();
    soon("the release", keeper.settled()).await.unwrap();
    // That of the reserve.
    assert_eq!(handles().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disabled_pool_loses_its_reserve_but_not_its_pods() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_pool(folder.path()).await;
    let keeper = keeper(&store, folder.path(), "n1").await;
    keeper.acquire(&ask("net.a", "n1", &[])).await.unwrap();
    soon("the refill", keeper.settled()).await.unwrap();
    store
        .apply(pool("one", "10.0.0.0/24", |spec| spec.disabled = true))
        .await
        .unwrap();
    soon("the return of the reserve", async {
        while !keeper.ready().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    soon("the catching up", keeper.settled()).await.unwrap();
    assert_eq!(
        stored(&store).await.into_values().collect::<Vec<_>>(),
        ["net.a"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_at_once_never_share_an_address() {
    let folder = tempfile::tempdir().unwrap();
    let store = switched(folder.path());
    store
        .create(pool("one", "10.0.0.0/25", |spec| {
            spec.block_size = Some(28)
        }))
        .await
        .unwrap();
    let mut nodes = tokio::task::JoinSet::new();
    for number in 0..3 {
        let node = format!("n{number}");
        let keeper = keeper(&store, folder.path(), &node).await;
        nodes.spawn(async move {
            let mut live = BTreeMap::new();
            for round in 0..30 {
                let handle = format!("net.{node}-{round}");
                let held = keeper.acquire(&ask(&handle, &node, &[])).await.unwrap();
                live.insert(held[0].address, handle);
                if round % 3 == 2 {
                    let (address, handle) = live.pop_first().unwrap();
                    let released = keeper.release(&handle).await.unwrap();
                    assert_eq!(released[0].address, address);
                }
            }
            keeper.settled().await.unwrap();
            (keeper, live)
        });
    }
    let ended = soon("the end", nodes.join_all()).await;
    let mut all = BTreeMap::new();
    for (_, live) in &ended {
        for (address, handle) in live {
            assert_eq!(
                all.insert(*address, handle.clone()),
                None,
                "{address} has two owners"
            );
        }
    }
    let stored = stored(&store).await;
    for (address, handle) in &all {
        assert_eq!(stored.get(address), Some(handle), "{address}");
    }
    let pods = stored.values().filter(|h| h.starts_with("net.")).count();
    assert_eq!(
        pods,
        all.len(),
        "the store shows exactly the pods that live"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnel_addresses_follow_the_pools_mode() {
    let folder = tempfile::tempdir().unwrap();
    let store = switched(folder.path());
    let vxlan = |mode| {
        pool("one", "10.0.0.0/24", move |spec| {
            spec.vxlan_mode = Some(mode)
        })
    };
    store.create(vxlan(EncapMode::CrossSubnet)).await.unwrap();
    let allocator = Allocator::with_system_time(store.clone(), "n1");
    let first = allocator
        .ensure_tunnel_address(Tunnel::Vxlan)
        .await
        .unwrap();
    assert!(first.is_some());
    assert_eq!(
        allocator
            .ensure_tunnel_address(Tunnel::Vxlan)
            .await
            .unwrap(),
        first,
        "it is kept"
    );
    assert_eq!(
        allocator.ensure_tunnel_address(Tunnel::Ipip).await.unwrap(),
        None
    );
    assert_eq!(
        stored(&store).await.into_values().collect::<Vec<_>>(),
        ["vxlan-tunnel-addr-n1"]
    );
    store.apply(vxlan(EncapMode::Never)).await.unwrap();
    assert_eq!(
        allocator
            .ensure_tunnel_address(Tunnel::Vxlan)
            .await
            .unwrap(),
        None
    );
    assert!(
        stored(&store).await.is_empty(),
        "it is returned when no pool wants it"
    );
}

#[tokio::test]
async fn an_address_that_is_ready_here_is_given_to_whoever_asks_for_just_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with_pool(folder.path()).await;
    let node = keeper(&store, folder.path(), "n1").await;
    let held = node.acquire(&ask("net.a", "n1", &[])).await.unwrap();
    node.release("net.a").await.unwrap();
    soon("the reserve", node.settled()).await.unwrap();
    let ready: Vec<IpAddr> = node.ready().await.iter().map(|h| h.address).collect();
    assert!(ready.contains(&held[0].address));
    // One that nobody has, in the same block, and one that is ready.
    let pool: Vec<u8> = (0..=255).collect();
    let other = pool
        .iter()
        .map(|last| IpAddr::from([10, 0, 0, *last]))
        .find(|a| held[0].block.contains(*a) && !ready.contains(a))
        .unwrap();
    let wanted = [other, held[0].address];
    let owner = ask("net.b", "n1", &[]).owner;
    let given = node.acquire_exact(&owner, &wanted).await.unwrap();
    assert_eq!(given.iter().map(|h| h.address).collect::<Vec<_>>(), wanted);
    soon("the datastore", node.settled()).await.unwrap();
    let shown = stored(&store).await;
    assert!(
        wanted.iter().all(|address| shown[address] == "net.b"),
        "{shown:?}"
    );
    // What a pod has is refused, and what would have gone with it stays where it was.
    let next = node.ready().await[0].address;
    let refused = node
        .acquire_exact(&ask("net.c", "n1", &[]).owner, &[next, other])
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("net.b"), "{refused}");
    assert!(node.ready().await.iter().any(|h| h.address == next));
    // Another node's is not for the asking.
    let two = keeper(&store, folder.path(), "n2").await;
    let refused = two
        .acquire_exact(&ask("net.d", "n2", &[]).owner, &[next])
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("reserve"), "{refused}");
}
