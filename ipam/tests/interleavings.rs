//! Many nodes assign, release, claim and give up at once, over a store that fails and with tasks that die anywhere:
//! no address ever has two owners, and what is left behind is well formed.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use cali_api::v3::{BlockAffinityState, IPPoolSpec};
use cali_api::{AnyResource, Cidr, Kind, Resource};
use cali_datastore::Datastore;
use cali_ipam::block::Block;
use cali_ipam::{Allocator, Owner, Request};
use proptest::prelude::*;
use support::{Dice, Memory, run};

/// Addresses that somebody was told are theirs, with the handle.
type Told = std::cell::RefCell<BTreeMap<IpAddr, String>>;

fn pool(cidr: &str, block_size: u8) -> AnyResource {
    let mut spec = IPPoolSpec::new(cidr.parse().unwrap());
    spec.block_size = Some(block_size);
    Resource::named("pool", spec).into()
}

fn immediately<T>(future: impl Future<Output = T>) -> T {
    let mut result = None;
    let task: Pin<Box<dyn Future<Output = ()> + '_>> =
        Box::pin(async { result = Some(future.await) });
    run(vec![task], &mut Dice::new(1), 0);
    result.unwrap()
}

/// One node's pod: gets addresses, perhaps uses them for a while, and gives them back.
async fn pod(allocator: &Allocator, handle: String, count: usize, stays: bool, told: &Told) {
    let owner = Owner::new(&handle)
        .with("node", allocator.node())
        .with("pod", handle.clone());
    let Ok(assigned) = allocator.assign(&Request::workload(owner, count, 0)).await else {
        return;
    };
    assert_eq!(assigned.len(), count);
    for a in &assigned {
        let other = told.borrow_mut().insert(a.address, handle.clone());
        assert_eq!(
            other, None,
            "{} was given to {handle} while {other:?} had it",
            a.address
        );
    }
    if stays {
        return;
    }
    // Whoever asks for release has stopped using the addresses before.
    for a in &assigned {
        told.borrow_mut().remove(&a.address);
    }
    let _ = allocator.release_handle(&handle).await;
}

fn check(store: &Memory, told: &BTreeMap<IpAddr, String>, without_crashes: bool) {
    let mut holders: BTreeMap<IpAddr, Owner> = BTreeMap::new();
    let mut used: BTreeSet<(String, Cidr)> = BTreeSet::new();
    let mut block_owner = BTreeMap::new();
    for object in store.objects(Kind::IPAMBlock) {
        let AnyResource::IPAMBlock(object) = object else {
            unreachable!()
        };
        let block = Block::from_spec(object.spec.clone());
        assert_eq!(block.defect(), None, "block {}", block.cidr());
        block_owner.insert(block.cidr(), block.affinity().cloned());
        for (address, owner) in block.held() {
            used.insert((owner.handle().unwrap().to_owned(), block.cidr()));
            assert!(holders.insert(address, owner).is_none());
        }
    }
    for (address, handle) in told {
        let holder = holders
            .get(address)
            .map(|o| o.handle().unwrap_or_default().to_owned());
        assert_eq!(
            holder.as_ref(),
            Some(handle),
            "{address} was promised to {handle}"
        );
    }
    let mut indexed = BTreeSet::new();
    for object in store.objects(Kind::IPAMHandle) {
        let AnyResource::IPAMHandle(object) = object else {
            unreachable!()
        };
        indexed.extend(
            object
                .spec
                .block
                .keys()
                .map(|b| (object.spec.handle_id.clone(), b.parse().unwrap())),
        );
    }
    assert!(
        used.is_subset(&indexed),
        "an address is not found by its handle: {used:?} {indexed:?}"
    );
    if without_crashes {
        assert_eq!(
            used, indexed,
            "a handle names a block in which it has nothing"
        );
    }
    let mut confirmed: BTreeMap<Cidr, String> = BTreeMap::new();
    for object in store.objects(Kind::BlockAffinity) {
        let AnyResource::BlockAffinity(object) = object else {
            unreachable!()
        };
        if object.spec.state == BlockAffinityState::Confirmed {
            let other = confirmed.insert(object.spec.cidr, object.spec.node.clone());
            assert_eq!(other, None, "two nodes have confirmed {}", object.spec.cidr);
            let owner = block_owner
                .get(&object.spec.cidr)
                .cloned()
                .flatten()
                .map(|a| a.name);
            assert_eq!(
                owner.as_ref(),
                Some(&object.spec.node),
                "confirmed, but the block is another's"
            );
        }
    }
}

fn scenario(seed: u64, fail_one_in: usize, crash_one_in: usize) {
    let mut dice = Dice::new(seed);
    let store = Memory::new(seed.rotate_left(17), 0);
    immediately(store.create(pool("10.0.0.0/27", 30))).unwrap();
    store.set_failures(fail_one_in);
    // The clock leaps, so that empty blocks become old enough to be taken over.
    let seconds = Arc::new(AtomicU64::new(1_000_000));
    let time = move || {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.fetch_add(40, Ordering::Relaxed))
    };
    let time = Arc::new(time);
    let nodes: Vec<Allocator> = (0..4)
        .map(|n| Allocator::new(store.clone(), &format!("node{n}"), time.clone()))
        .collect();
    let told = Told::default();
    let mut tasks: Vec<Pin<Box<dyn Future<Output = ()> + '_>>> = Vec::new();
    for number in 0..24 {
        let node = &nodes[dice.below(nodes.len())];
        let (count, stays, give_up) = (1 + dice.below(3), dice.one_in(2), dice.one_in(4));
        let told = &told;
        tasks.push(Box::pin(async move {
            pod(node, format!("net.{number}"), count, stays, told).await;
            if give_up {
                let _ = node.give_up_unselected().await;
                let block: Cidr = "10.0.0.0/30".parse().unwrap();
                let _ = node.give_up(node.node(), &block, true).await;
            }
        }));
    }
    run(tasks, &mut dice, crash_one_in);
    check(
        &store,
        &told.borrow(),
        fail_one_in == 0 && crash_one_in == 0,
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_address_has_two_owners(seed in any::<u64>()) {
        scenario(seed, 0, 0);
    }

    #[test]
    fn no_address_has_two_owners_when_writes_fail_or_their_answers_are_lost(seed in any::<u64>()) {
        scenario(seed, 12, 0);
    }

    #[test]
    fn no_address_has_two_owners_when_nodes_crash_in_the_middle(seed in any::<u64>()) {
        scenario(seed, 12, 150);
    }
}

#[test]
fn everything_a_full_pool_has_is_given_out_once_and_then_refused() {
    let store = Memory::new(7, 0);
    immediately(store.create(pool("10.0.0.0/27", 30))).unwrap();
    let mut seen = BTreeSet::new();
    for number in 0..32 {
        let node = Allocator::with_system_time(store.clone(), &format!("node{}", number % 3));
        let request = Request::workload(Owner::new(&format!("net.{number}")), 1, 0);
        let assigned = immediately(node.assign(&request)).unwrap();
        assert!(seen.insert(assigned[0].address));
    }
    let node = Allocator::with_system_time(store, "node9");
    let error =
        immediately(node.assign(&Request::workload(Owner::new("net.x"), 1, 0))).unwrap_err();
    assert_eq!(error.to_string(), "no free IPv4 address in pool");
}

#[test]
fn strict_affinity_forbids_borrowing() {
    let store = Memory::new(7, 0);
    immediately(store.create(pool("10.0.0.0/30", 30))).unwrap();
    let strict = cali_api::v3::IPAMConfigurationSpec {
        strict_affinity: true,
        ..Default::default()
    };
    immediately(store.create(Resource::named("default", strict).into())).unwrap();
    let one = Allocator::with_system_time(store.clone(), "node1");
    let two = Allocator::with_system_time(store, "node2");
    immediately(one.assign(&Request::workload(Owner::new("net.a"), 1, 0))).unwrap();
    assert!(immediately(two.assign(&Request::workload(Owner::new("net.b"), 1, 0))).is_err());
    let exact = immediately(two.assign_exact("10.0.0.3".parse().unwrap(), &Owner::new("net.b")))
        .unwrap_err();
    assert!(exact.to_string().contains("strictAffinity"), "{exact}");
}

#[test]
fn a_released_address_rests_before_anybody_gets_it_again() {
    let store = Memory::new(7, 0);
    immediately(store.create(pool("10.0.0.0/30", 30))).unwrap();
    let configuration = cali_api::v3::IPAMConfigurationSpec {
        ip_cooldown_seconds: Some(60),
        ..Default::default()
    };
    immediately(store.create(Resource::named("default", configuration).into())).unwrap();
    let seconds = Arc::new(AtomicU64::new(1000));
    let clock = seconds.clone();
    let time = Arc::new(move || {
        SystemTime::UNIX_EPOCH + Duration::from_secs(clock.load(Ordering::Relaxed))
    });
    let one = Allocator::new(store.clone(), "node1", time.clone());
    let two = Allocator::new(store, "node2", time);
    let all = immediately(one.assign(&Request::workload(Owner::new("net.a"), 4, 0))).unwrap();
    immediately(one.release(&[all[1].address], Some("net.a"))).unwrap();
    for (second, rested) in [(1000, false), (1059, false), (1060, true)] {
        seconds.store(second, Ordering::Relaxed);
        let asked = Request::workload(Owner::new("net.b"), 1, 0);
        let given = immediately(two.assign(&asked));
        let addresses = given.map(|given| given[0].address);
        assert_eq!(addresses.ok(), rested.then_some(all[1].address), "{second}");
    }
}

#[test]
fn a_failed_family_returns_the_other() {
    let store = Memory::new(7, 0);
    immediately(store.create(pool("10.0.0.0/30", 30))).unwrap();
    let node = Allocator::with_system_time(store.clone(), "node1");
    let error =
        immediately(node.assign(&Request::workload(Owner::new("net.a"), 1, 1))).unwrap_err();
    assert_eq!(error.to_string(), "no IPv6 pool can be used");
    assert_eq!(
        immediately(node.addresses_of("net.a")).unwrap(),
        Vec::<IpAddr>::new()
    );
}
