//! The dataplane on a host that others use as well: what is theirs stays as it is, ours converges and is kept, and
//! who can drop what we accept is said.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, NodeName, Revision};
use cali_netlink::testing::{
    TestNs,
    hostile::{self, Churn, Fixture, Host, Ours, Remover, RemoverPlan},
    run,
};
use felix::dataplane::{Config, Dataplane, State, StatusSink, Variant};
use tokio::sync::mpsc;

/// A foreign change is put right within this time.
const REPAIR: Duration = Duration::from_secs(1);
/// For everything that has no promise about time.
const PATIENCE: Duration = Duration::from_secs(10);

struct Quiet;

impl StatusSink for Quiet {
    fn on_state(&mut self, _: &Arc<State>) {}
}

fn set(json: &str) -> Update {
    let value = AnyResource::from_slice(json.as_bytes()).unwrap();
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from("1"),
    }
}

const POD: &str = r#"{"apiVersion":"projectcalico.org/v3","kind":"WorkloadEndpoint",
    "metadata":{"name":"node1-k8s-pod1-eth0","namespace":"default","labels":{"pod":"1"}},
    "spec":{"orchestrator":"k8s","node":"node1","pod":"pod1","endpoint":"eth0",
    "interfaceName":"cali1","ipNetworks":["192.168.1.1/32"],"profiles":["open"]}}"#;

fn everything() -> Vec<Update> {
    [
        r#"{"apiVersion":"projectcalico.org/v3","kind":"Tier","metadata":{"name":"default"},"spec":{"order":1000000}}"#,
        r#"{"apiVersion":"projectcalico.org/v3","kind":"Profile","metadata":{"name":"open"},
            "spec":{"ingress":[{"action":"Allow"}],"egress":[{"action":"Allow"}]}}"#,
        r#"{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"web"},
            "spec":{"selector":"pod == '1'","types":["Ingress"],"ingress":[{"action":"Allow","protocol":"TCP",
            "source":{"nets":["172.16.0.0/12"]},"destination":{"ports":[80]}}]}}"#,
        r#"{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"p"},
            "spec":{"cidr":"192.168.0.0/16","natOutgoing":true,"vxlanMode":"Always"}}"#,
        r#"{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"node1"},
            "spec":{"bgp":{"ipv4Address":"10.1.0.1/24"},"ipv4VXLANTunnelAddr":"192.168.1.64"}}"#,
        POD,
    ]
    .map(set)
    .into()
}

/// A host with one pod's interface.
struct Node {
    ns: TestNs,
    _peer: TestNs,
}

impl Node {
    async fn new(label: &str) -> Self {
        let (ns, peer) = (TestNs::new(label), TestNs::new(label));
        let (eth0, _) = ns.veth("eth0", &peer, "port1").await;
        ns.address(eth0, "10.1.0.1/24").await;
        ns.veth("cali1", &peer, "pod1").await;
        Self { ns, _peer: peer }
    }

    /// Starts the dataplane with everything, and waits until the pod stands.
    async fn start(&self) -> (Dataplane, mpsc::Sender<SyncEvent>) {
        self.start_with(everything()).await
    }

    /// The same, enforcing by iptables.
    async fn start_iptables(&self, variant: Variant) -> (Dataplane, mpsc::Sender<SyncEvent>) {
        let mut all = everything();
        all.push(set(&format!(
            r#"{{"apiVersion":"projectcalico.org/v3","kind":"FelixConfiguration","metadata":{{"name":"default"}},
                "spec":{{"nftablesMode":"Disabled","iptablesBackend":"{}"}}}}"#,
            variant.name()
        )));
        self.start_with(all).await
    }

    /// Our chains of both families, without counters.
    fn chains(&self, variant: Variant) -> Vec<String> {
        let mut all = Vec::new();
        for family in ["iptables", "ip6tables"] {
            let program = format!("{family}-{}-save", variant.name());
            let output = self.ns.output(&program, &[]).stdout;
            let text = String::from_utf8_lossy(&output).into_owned();
            let ours = text
                .lines()
                .filter(|line| line.contains("cali-") || line.contains("cali:"));
            all.extend(ours.map(str::to_owned));
        }
        all
    }

    async fn start_with(&self, all: Vec<Update>) -> (Dataplane, mpsc::Sender<SyncEvent>) {
        let (updates, stream) = mpsc::channel(16);
        let config = Config {
            tunnel_linger: Duration::ZERO,
            ..Config::new(NodeName::from("node1"))
        };
        let netlink = self.ns.netlink().clone();
        let dataplane = Dataplane::start(config, netlink, stream, Box::new(Quiet)).unwrap();
        let all = SyncEvent::Updates(all);
        updates.send(all).await.unwrap();
        let in_sync = SyncEvent::Status(SyncStatus::InSync);
        updates.send(in_sync).await.unwrap();
        let key: Key = set(POD).key;
        if let Err(error) = dataplane.handle().programmed(&key, PATIENCE).await {
            panic!("{error}\n{}", self.rules());
        }
        (dataplane, updates)
    }

    fn rules(&self) -> String {
        let args = ["-s", "list", "table", "inet", "calico"];
        String::from_utf8_lossy(&self.ns.output("nft", &args).stdout).into_owned()
    }

    fn has_pod_route(&self) -> bool {
        self.ns
            .ip("route show table main")
            .contains("192.168.1.1 dev cali1")
    }

    async fn until(&self, limit: Duration, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(
                start.elapsed() < limit,
                "{what}: not within {limit:?}\n{}{}",
                self.ns.ip("route"),
                self.rules()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn until_state(
    dataplane: &Dataplane,
    what: &str,
    condition: impl FnMut(&Arc<State>) -> bool,
) -> Arc<State> {
    let mut state = dataplane.handle().state();
    let waited = tokio::time::timeout(PATIENCE, state.wait_for(condition)).await;
    match waited {
        Ok(Ok(state)) => state.clone(),
        _ => panic!("{what}: {:#?}", dataplane.handle().state().borrow()),
    }
}

async fn stands_beside(label: &str, fixtures: &[Fixture]) {
    let node = Node::new(label).await;
    let host = Host::apply(&node.ns, fixtures, Ours::default());
    let (dataplane, updates) = node.start().await;
    host.assert_untouched(&node.ns);
    let before = node.rules();
    // A restart takes over ours, and only ours.
    drop((dataplane, updates));
    let (_dataplane, _updates) = node.start().await;
    assert_eq!(node.rules(), before, "beside {fixtures:?}");
    assert!(node.has_pod_route(), "beside {fixtures:?}");
    host.assert_untouched(&node.ns);
}

#[test]
fn a_pod_stands_beside_every_fixture_and_restarts_touch_nothing() {
    run(async {
        for fixture in hostile::all() {
            stands_beside("hdp", &[*fixture]).await;
        }
    });
}

#[test]
fn a_pod_stands_on_a_crowded_host_and_restarts_touch_nothing() {
    run(stands_beside("hdpcrowd", hostile::crowded()));
}

#[test]
fn rules_are_put_right_within_a_second_while_iptables_churns() {
    run(async {
        let node = Node::new("hdpchurn").await;
        let host = Host::apply(&node.ns, hostile::crowded(), Ours::default());
        let (_dataplane, _updates) = node.start().await;
        let before = node.rules();
        let churn = Churn::start(&node.ns, Duration::from_secs(30));
        let flush = ["flush", "chain", "inet", "calico", "cali-tw-cali1"];
        node.ns.run("nft", &flush);
        node.until(REPAIR, "a flushed chain", || node.rules() == before)
            .await;
        node.ns.run("nft", &["delete", "table", "inet", "calico"]);
        node.until(REPAIR, "the deleted table", || node.rules() == before)
            .await;
        drop(churn);
        host.assert_untouched(&node.ns);
    });
}

async fn iptables_stand_beside(label: &str, fixtures: &[Fixture], variant: Variant) {
    let node = Node::new(label).await;
    let host = Host::apply(&node.ns, fixtures, Ours::with_iptables());
    let running = node.start_iptables(variant).await;
    host.assert_untouched(&node.ns);
    let before = node.chains(variant);
    assert!(before.iter().any(|line| line.contains("cali-tw-cali1")));
    drop(running);
    let _running = node.start_iptables(variant).await;
    assert_eq!(
        node.chains(variant),
        before,
        "{variant} beside {fixtures:?}"
    );
    host.assert_untouched(&node.ns);
}

#[test]
fn iptables_stand_beside_every_fixture_and_restarts_touch_nothing() {
    run(async {
        for variant in [Variant::Nft, Variant::Legacy] {
            for fixture in hostile::all() {
                iptables_stand_beside("hdpipt", &[*fixture], variant).await;
            }
            iptables_stand_beside("hdpiptcrowd", hostile::crowded(), variant).await;
        }
    });
}

#[test]
fn chains_that_somebody_flushes_are_put_right_while_iptables_churns() {
    run(async {
        // The legacy tables tell nobody of changes: they are looked at.
        for (variant, limit) in [(Variant::Nft, REPAIR), (Variant::Legacy, PATIENCE)] {
            let node = Node::new("hdpiptflush").await;
            let host = Host::apply(&node.ns, hostile::crowded(), Ours::with_iptables());
            let _running = node.start_iptables(variant).await;
            let before = node.chains(variant);
            let churn = Churn::start(&node.ns, Duration::from_secs(60));
            for change in [
                vec!["-F", "cali-tw-cali1"],
                vec!["-D", "FORWARD", "1"],
                vec!["-t", "raw", "-F"],
            ] {
                let mut words = vec!["--wait"];
                words.extend(change);
                node.ns.run(&format!("iptables-{}", variant.name()), &words);
                node.until(limit, &format!("{variant} after {words:?}"), || {
                    node.chains(variant) == before
                })
                .await;
            }
            drop(churn);
            host.assert_untouched(&node.ns);
        }
    });
}

#[test]
fn a_remover_of_routes_is_told_in_the_state() {
    run(async {
        let node = Node::new("hdpremove").await;
        let (dataplane, _updates) = node.start().await;
        let rules = node.rules();
        let plan = RemoverPlan {
            every: Duration::from_millis(50),
            ..RemoverPlan::default()
        };
        let remover = Remover::start(&node.ns, plan);
        until_state(&dataplane, "the fight", |state| {
            let fights = &state.routes.fights;
            fights.iter().any(|row| row.contains("192.168.1.1"))
        })
        .await;
        drop(remover);
        assert_eq!(node.rules(), rules, "rules do not depend on routes");
    });
}

#[test]
fn who_can_drop_what_we_accept_is_said_and_taken_back() {
    run(async {
        let node = Node::new("hdpdrop").await;
        Fixture::Firewalld.apply(&node.ns);
        let (dataplane, _updates) = node.start().await;
        let says = |text: &'static str| {
            move |state: &Arc<State>| state.notices.iter().any(|notice| notice.contains(text))
        };
        const FIREWALLD: &str = "inet firewalld filter_FORWARD (priority filter+10";
        until_state(&dataplane, "at the start", says(FIREWALLD)).await;
        node.ns
            .run("nft", &["delete", "table", "inet", "firewalld"]);
        Fixture::Docker.apply(&node.ns);
        let state = until_state(&dataplane, "on change", says("of Docker")).await;
        assert!(!says(FIREWALLD)(&state), "{:#?}", state.notices);
    });
}
