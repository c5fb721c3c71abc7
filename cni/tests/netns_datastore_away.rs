//! Pods come and go while the datastore is away, and a server is killed in the middle of its work.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "netns_plugin needs all of it")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::{AnyResource, Kind};
use cali_ipam::block::Block;
use cali_netlink::testing::TestNs;
use serde_json::{Value, json};
use support::{Answer, Call, Node, address, soon};

const PODS: usize = 200;
/// Calls at a time.
const TOGETHER: usize = 8;

/// Every address that the datastore shows as taken, with its handle.
async fn stored(node: &Node) -> BTreeMap<IpAddr, String> {
    let list = node.store.list(Kind::IPAMBlock, None).await.unwrap();
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

/// One call for each of these pods, some at a time.
async fn call_all(
    node: &Node,
    command: &'static str,
    pods: &[(usize, Arc<TestNs>)],
) -> Vec<Answer> {
    let turns = Arc::new(tokio::sync::Semaphore::new(TOGETHER));
    let mut calls = Vec::new();
    for (number, pod) in pods {
        let (number, pod) = (*number, Arc::clone(pod));
        let (turns, folder) = (Arc::clone(&turns), node.folder().to_owned());
        calls.push(tokio::spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            tokio::task::spawn_blocking(move || {
                let (name, container) = (format!("p{number}"), format!("c{number}"));
                let ipam = json!({"type": "calico-ipam", "ipv4_pools": ["overlay"]});
                let call = Call::new(command, &name, &container, pod.name()).with("ipam", ipam);
                support::run_in(&folder, &call)
            })
            .await
            .unwrap()
        }));
    }
    let mut answers = Vec::new();
    for call in calls {
        answers.push(call.await.unwrap());
    }
    answers
}

fn of_pods(held: &BTreeMap<IpAddr, String>) -> BTreeSet<(IpAddr, String)> {
    let pods = held
        .iter()
        .filter(|(_, handle)| handle.starts_with("k8s-pod-network."));
    pods.map(|(address, handle)| (*address, handle.clone()))
        .collect()
}

async fn given(node: &Node) -> BTreeSet<(IpAddr, String)> {
    let attachments = node.keeper.attachments().await;
    attachments
        .into_iter()
        .flat_map(|(handle, a)| {
            a.addresses
                .into_iter()
                .map(move |h| (h.address, handle.clone()))
        })
        .collect()
}

async fn settle(node: &Node) {
    tokio::time::timeout(support::PATIENCE * 2, node.keeper.settled())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(of_pods(&stored(node).await), given(node).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_hundred_pods_come_and_go_without_the_datastore() {
    let node = Node::with_reserve("cniaway", Some(PODS + 4)).await;
    let pods: Vec<_> = (0..=PODS)
        .map(|n| (n, Arc::new(TestNs::new("cnipod"))))
        .collect();
    for (number, _) in &pods {
        node.pod(&format!("p{number}"), json!({})).await;
    }
    // The last one comes first: by then all are known, and its pool is one that addresses are kept ready in.
    let (first, last) = pods.split_at(PODS);
    for answer in call_all(&node, "ADD", last).await {
        answer.ok();
    }
    soon("the reserve to fill", async || {
        node.keeper.ready().await.len() >= PODS
    })
    .await;
    settle(&node).await;

    node.switch.set_away(true);
    let results: Vec<Value> = call_all(&node, "ADD", first)
        .await
        .into_iter()
        .map(Answer::ok)
        .collect();
    let different: BTreeSet<IpAddr> = results.iter().map(|r| address(r, 0)).collect();
    assert_eq!(different.len(), PODS);
    let (go, stay) = first.split_at(PODS / 2);
    for answer in call_all(&node, "DEL", go).await {
        answer.ok();
    }
    node.switch.set_away(false);
    settle(&node).await;
    assert_eq!(given(&node).await.len(), PODS / 2 + 1);
    soon("the pods to be told", async || {
        node.annotations(&format!("p{}", PODS - 1))
            .await
            .contains_key("cni.projectcalico.org/podIP")
    })
    .await;

    node.switch.set_away(true);
    for answer in call_all(&node, "DEL", stay).await {
        answer.ok();
    }
    node.switch.set_away(false);
    settle(&node).await;
    assert_eq!(given(&node).await.len(), 1);
    assert_eq!(
        node.host.ip("-br link").matches("cali").count(),
        1,
        "one interface is left"
    );
}
