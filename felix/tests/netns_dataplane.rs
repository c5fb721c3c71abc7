//! The dataplane against the real kernel: pods in namespaces, packets between them.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, NodeName, Revision};
use cali_netlink::nft::Nft;
use cali_netlink::testing::{TestNs, run};
use felix::dataplane::{Config, Dataplane, Handle, State, StatusSink};
use tokio::sync::mpsc;

/// A foreign change is put right within this time.
const REPAIR: Duration = Duration::from_secs(1);
/// For everything that has no promise about time.
const PATIENCE: Duration = Duration::from_secs(10);

struct Quiet;

impl StatusSink for Quiet {
    fn on_state(&mut self, _: &Arc<State>) {}
}

/// A host with two pods, and the channel that stands for the datastore.
struct Host {
    ns: TestNs,
    pods: Vec<TestNs>,
    updates: mpsc::Sender<SyncEvent>,
    dataplane: Dataplane,
}

fn resource(json: &str) -> AnyResource {
    AnyResource::from_slice(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"))
}

fn set(json: &str) -> Update {
    let value = resource(json);
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from("1"),
    }
}

fn gone(json: &str) -> Update {
    Update {
        value: None,
        ..set(json)
    }
}

fn pod(number: u8) -> String {
    format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"WorkloadEndpoint",
            "metadata":{{"name":"node1-k8s-pod{number}-eth0","namespace":"default","labels":{{"pod":"{number}"}}}},
            "spec":{{"orchestrator":"k8s","node":"node1","pod":"pod{number}","endpoint":"eth0",
            "interfaceName":"cali{number}","ipNetworks":["192.168.1.{number}/32"],"profiles":["open"]}}}}"#
    )
}

const DENY_TO_2: &str = r#"{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"closed"},
    "spec":{"selector":"pod == '2'","types":["Ingress"],"ingress":[{"action":"Deny"}]}}"#;

fn everything() -> Vec<Update> {
    let mut all: Vec<Update> = [
        r#"{"apiVersion":"projectcalico.org/v3","kind":"Tier","metadata":{"name":"default"},"spec":{"order":1000000}}"#,
        r#"{"apiVersion":"projectcalico.org/v3","kind":"Profile","metadata":{"name":"open"},
            "spec":{"ingress":[{"action":"Allow"}],"egress":[{"action":"Allow"}]}}"#,
        r#"{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"p"},
            "spec":{"cidr":"192.168.0.0/16","natOutgoing":true}}"#,
        r#"{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"node1"},
            "spec":{"bgp":{"ipv4Address":"10.1.0.1/24"}}}"#,
    ]
    .map(set)
    .into();
    all.extend([pod(1), pod(2)].iter().map(|json| set(json)));
    all
}

impl Host {
    async fn new(label: &str) -> Self {
        let ns = TestNs::new(label);
        let pods: Vec<TestNs> = (1..=2).map(|_| TestNs::new(label)).collect();
        // Proxy ARP answers for the pods' gateway only where the host has a way there.
        let (uplink, _) = ns.veth("eth0", &pods[0], "unused0").await;
        ns.address(uplink, "10.1.0.1/24").await;
        ns.ip("route add default via 10.1.0.254");
        for (number, pod) in (1_u8..).zip(&pods) {
            let (_, eth0) = ns.veth(&format!("cali{number}"), pod, "eth0").await;
            pod.address(eth0, &format!("192.168.1.{number}/32")).await;
            pod.ip("route add 169.254.1.1 dev eth0 scope link");
            pod.ip("route add default via 169.254.1.1 dev eth0");
        }
        let (updates, dataplane) = Self::start(&ns);
        Self {
            ns,
            pods,
            updates,
            dataplane,
        }
    }

    fn start(ns: &TestNs) -> (mpsc::Sender<SyncEvent>, Dataplane) {
        let (updates, stream) = mpsc::channel(16);
        let config = Config::new(NodeName::from("node1"));
        let dataplane =
            Dataplane::start(config, ns.netlink().clone(), stream, Box::new(Quiet)).unwrap();
        (updates, dataplane)
    }

    fn handle(&self) -> &Handle {
        self.dataplane.handle()
    }

    async fn send(&self, updates: Vec<Update>) {
        self.updates
            .send(SyncEvent::Updates(updates))
            .await
            .unwrap();
    }

    async fn in_sync(&self, updates: Vec<Update>) {
        self.send(updates).await;
        self.updates
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        self.state("ready", |state| state.ready).await;
        for number in 1..=2 {
            let key = resource(&pod(number)).key();
            if let Err(error) = self.handle().programmed(&key, PATIENCE).await {
                panic!(
                    "{error}\n{:#?}\n{}",
                    self.handle().state().borrow(),
                    self.rules()
                );
            }
        }
    }

    async fn state(&self, what: &str, condition: impl FnMut(&Arc<State>) -> bool) -> Arc<State> {
        let mut state = self.handle().state();
        match tokio::time::timeout(PATIENCE, state.wait_for(condition)).await {
            Ok(Ok(state)) => state.clone(),
            other => panic!(
                "{what}: {}; {:#?}",
                other.is_err(),
                self.handle().state().borrow()
            ),
        }
    }

    fn rules(&self) -> String {
        String::from_utf8_lossy(
            &self
                .ns
                .output("nft", &["-s", "list", "table", "inet", "calico"])
                .stdout,
        )
        .into_owned()
    }

    /// Whether pod 1 reaches pod 2 with a packet.
    fn pings(&self) -> bool {
        self.pods[0]
            .output("ping", &["-c", "1", "-W", "1", "192.168.1.2"])
            .status
            .success()
    }

    async fn until(&self, limit: Duration, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(
                start.elapsed() < limit,
                "{what}: not within {limit:?}\n{}",
                self.rules()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!("{what}: after {:?}", start.elapsed());
    }
}

#[test]
fn pods_talk_until_a_policy_denies_it() {
    run(async {
        let host = Host::new("dppolicy").await;
        host.in_sync(everything()).await;
        assert!(host.pings(), "{}\n{}", host.ns.ip("route"), host.rules());
        host.send(vec![set(DENY_TO_2)]).await;
        host.until(PATIENCE, "denied", || !host.pings()).await;
        host.send(vec![gone(DENY_TO_2)]).await;
        host.until(PATIENCE, "allowed again", || host.pings()).await;
    });
}

#[test]
fn an_object_that_cannot_be_used_is_named_while_the_rest_is_enforced() {
    run(async {
        let host = Host::new("dpunusable").await;
        host.in_sync(everything()).await;
        let bad = r#"{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"bad"},
            "spec":{"selector":"pod == '2'","order":1,"types":["Ingress"],
                    "ingress":[{"action":"Allow","source":{"selector":"app =="}}]}}"#;
        host.send(vec![set(bad)]).await;
        let named = |state: &Arc<State>| state.unusable.contains_key(&resource(bad).key());
        host.state("named", named).await;
        // Of its rules none is left, and the tier ends.
        host.until(PATIENCE, "denied", || !host.pings()).await;
        host.send(vec![gone(bad)]).await;
        host.until(PATIENCE, "allowed again", || host.pings()).await;
        host.state("forgotten", |state| state.unusable.is_empty())
            .await;
    });
}

#[test]
fn rules_changed_by_hand_are_put_right_within_a_second() {
    run(async {
        let host = Host::new("dphand").await;
        let mut all = everything();
        all.push(set(DENY_TO_2));
        host.in_sync(all).await;
        let before = host.rules();
        let same = || host.rules() == before;
        host.ns.run(
            "nft",
            &["flush", "chain", "inet", "calico", "cali-tw-cali2"],
        );
        host.until(REPAIR, "flushed chain", same).await;
        host.ns.run(
            "nft",
            &[
                "insert",
                "rule",
                "inet",
                "calico",
                "cali-tw-cali2",
                "accept",
            ],
        );
        host.until(REPAIR, "foreign rule", same).await;
        host.ns.run("nft", &["delete", "table", "inet", "calico"]);
        host.until(REPAIR, "table", same).await;
        assert!(!host.pings());
    });
}

#[test]
fn restart_adopts_the_rules_without_writing_one() {
    run(async {
        let mut host = Host::new("dpadopt").await;
        let mut all = everything();
        all.push(set(DENY_TO_2));
        host.in_sync(all.clone()).await;
        let before = (host.rules(), host.ns.ip("route"));
        let nft = Nft::open(host.ns.netns()).unwrap();
        let generation = nft.generation().unwrap();
        (host.updates, host.dataplane) = Host::start(&host.ns);
        assert_eq!(
            (host.rules(), host.ns.ip("route")),
            before,
            "before the datastore is in sync"
        );
        host.in_sync(all).await;
        assert_eq!((host.rules(), host.ns.ip("route")), before);
        assert_eq!(
            nft.generation().unwrap(),
            generation,
            "a transaction was written"
        );
    });
}

#[test]
fn an_announced_endpoint_is_programmed_before_the_datastore_knows_it() {
    run(async {
        let host = Host::new("dpcni").await;
        let (first, second) = (resource(&pod(1)), resource(&pod(2)));
        let without = everything()
            .into_iter()
            .filter(|update| update.key != first.key() && update.key != second.key());
        host.send(without.collect()).await;
        host.updates
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        for pod in [first, second] {
            let key: Key = pod.key();
            let AnyResource::WorkloadEndpoint(endpoint) = pod else {
                panic!("not an endpoint")
            };
            host.handle()
                .announce(key.clone(), Some(Arc::from(endpoint)))
                .await
                .unwrap();
            host.handle().programmed(&key, PATIENCE).await.unwrap();
        }
        assert!(host.pings(), "{}\n{}", host.ns.ip("route"), host.rules());
    });
}

#[test]
fn an_endpoint_without_interface_is_reported_and_programmed_once_it_comes() {
    run(async {
        let host = Host::new("dplate").await;
        host.in_sync(everything()).await;
        host.send(vec![set(&pod(3))]).await;
        let key = resource(&pod(3)).key();
        let problem = |state: &Arc<State>| {
            state
                .endpoints
                .get(&key)
                .and_then(|endpoint| endpoint.problem.clone())
        };
        let state = host
            .state("a reported endpoint", |state| {
                problem(state).is_some_and(|text| text.contains("cali3"))
            })
            .await;
        assert_eq!(
            problem(&state).as_deref(),
            Some("interface cali3 is not there")
        );
        host.ns.veth("cali3", &host.pods[1], "eth3").await;
        host.handle().programmed(&key, PATIENCE).await.unwrap();
        assert!(
            host.ns.ip("route show 192.168.1.3").contains("dev cali3"),
            "{}",
            host.ns.ip("route")
        );
    });
}

#[test]
fn a_removed_endpoint_leaves_no_route_and_no_connection() {
    run(async {
        let host = Host::new("dpgone").await;
        host.in_sync(everything()).await;
        assert!(host.pings());
        let conntrack = cali_netlink::conntrack::Conntrack::open(host.ns.netns()).unwrap();
        let address = "192.168.1.2".parse().unwrap();
        let flows = || {
            conntrack
                .dump()
                .unwrap()
                .into_iter()
                .filter(|flow| flow.involves(address))
                .count()
        };
        assert!(flows() > 0, "the ping is tracked");
        host.send(vec![gone(&pod(2))]).await;
        host.until(PATIENCE, "route", || {
            host.ns.ip("route show 192.168.1.2").is_empty()
        })
        .await;
        host.until(PATIENCE, "connection", || flows() == 0).await;
    });
}
