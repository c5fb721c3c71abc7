//! The writer on a host that others use as well: what is theirs stays as it is, ours converges, and a program that
//! keeps deleting routes is fought, then named.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::time::{Duration, Instant};

use cali_api::{Cidr, NodeName};
use cali_netlink::testing::{
    TestNs,
    hostile::{self, Churn, Fixture, Host, Ours, Remover, RemoverPlan},
    patient, run,
};
use cali_routes::{Candidate, Input, KernelSettings, NextHop, RouteSpec, Source, Writer};
use ipip_vxlan::{Encap, Endpoint, Pool};

/// A foreign change is put right within this time.
const REPAIR: Duration = Duration::from_secs(1);
/// For everything that has no promise about time.
const PATIENCE: Duration = Duration::from_secs(10);

const POD: &str = "192.168.1.5/32";
const LOCAL: &str = "192.168.1.0/26";
const REMOTE: &str = "192.168.2.0/26";

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

/// node1 with `eth0` (10.1.0.1/24), and the device of one workload.
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

    fn start(&self) -> Writer {
        let settings = KernelSettings::default();
        Writer::start(NodeName::from("node1"), self.ns.netlink().clone(), settings).unwrap()
    }

    /// Which of our three rows are missing.
    fn missing(&self) -> Vec<&'static str> {
        let routes = self.ns.ip("route show table main");
        [
            "192.168.1.5 dev cali1 proto 80 scope link",
            "blackhole 192.168.1.0/26 proto 80",
            "via 10.1.0.2 dev eth0 proto bird",
        ]
        .into_iter()
        .filter(|row| !routes.contains(row))
        .collect()
    }

    async fn until_complete(&self, limit: Duration, why: &str) {
        let (start, limit) = (Instant::now(), patient(limit));
        loop {
            let missing = self.missing();
            if missing.is_empty() {
                return;
            }
            assert!(
                start.elapsed() < limit,
                "{why}: {missing:?} missing after {limit:?} in\n{}",
                self.ns.ip("route show table main")
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn set(source: Source, prefix: &str, spec: RouteSpec) -> Input {
    Input::Set(source, cidr(prefix), Candidate::new(spec, "test"))
}

/// A pool without encapsulation, one pod, its block, and node2's block by BGP.
fn everything() -> Vec<Input> {
    let node = |name: &str, address: &str| {
        Input::Node(Endpoint {
            v4: Some(address.parse().unwrap()),
            ..Endpoint::named(NodeName::from(name))
        })
    };
    let pod = RouteSpec::Device {
        device: "cali1".into(),
        source: None,
    };
    let hops = vec![NextHop::new("10.1.0.2".parse().unwrap())];
    vec![
        node("node1", "10.1.0.1/24"),
        node("node2", "10.1.0.2/24"),
        Input::Pool(Pool {
            name: "routed".into(),
            cidr: cidr("192.168.0.0/16"),
            encap: Encap::None,
        }),
        set(Source::Workload, POD, pod),
        set(Source::LocalBlock, LOCAL, RouteSpec::Blackhole),
        set(Source::Bgp, REMOTE, RouteSpec::NextHops(hops)),
        Input::InSync,
    ]
}

fn nothing() -> Vec<Input> {
    vec![
        Input::Remove(Source::Workload, cidr(POD)),
        Input::Remove(Source::LocalBlock, cidr(LOCAL)),
        Input::Remove(Source::Bgp, cidr(REMOTE)),
    ]
}

async fn comes_and_goes_beside(label: &str, fixtures: &[Fixture]) {
    let node = Node::new(label).await;
    let host = Host::apply(&node.ns, fixtures, Ours::default());
    let writer = node.start();
    let failed = writer.apply(everything()).await.unwrap();
    assert!(failed.is_empty(), "beside {fixtures:?}: {failed:?}");
    assert_eq!(node.missing(), [""; 0], "beside {fixtures:?}");
    host.assert_untouched(&node.ns);

    let synced = [true, false].map(|v4| Input::BgpEndOfSync { v4 });
    writer.apply(synced.to_vec()).await.unwrap();
    writer.apply(nothing()).await.unwrap();
    assert_eq!(node.missing().len(), 3, "beside {fixtures:?}");
    host.assert_untouched(&node.ns);
}

#[test]
fn routes_come_and_go_beside_every_fixture() {
    run(async {
        for fixture in hostile::all() {
            comes_and_goes_beside("hroute", &[*fixture]).await;
        }
    });
}

#[test]
fn routes_come_and_go_on_a_crowded_host() {
    run(comes_and_goes_beside("hcrowd", hostile::crowded()));
}

#[test]
fn a_restart_takes_over_ours_and_nothing_else() {
    run(async {
        let node = Node::new("hadopt").await;
        let host = Host::apply(&node.ns, hostile::crowded(), Ours::default());
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        drop(writer);
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        let synced = [true, false].map(|v4| Input::BgpEndOfSync { v4 });
        writer.apply(synced.to_vec()).await.unwrap();
        assert_eq!(node.missing(), [""; 0]);
        host.assert_untouched(&node.ns);
    });
}

#[test]
fn repair_is_as_quick_while_iptables_churns() {
    run(async {
        let node = Node::new("hchurn").await;
        let host = Host::apply(&node.ns, hostile::crowded(), Ours::default());
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        let churn = Churn::start(&node.ns, Duration::from_secs(30));
        for (prefix, kind) in [(POD, ""), (LOCAL, "blackhole "), (REMOTE, "")] {
            node.ns.ip(&format!("route del {kind}{prefix}"));
            node.until_complete(REPAIR, prefix).await;
        }
        drop(churn);
        host.assert_untouched(&node.ns);
    });
}

#[test]
fn a_remover_is_fought_then_named_and_what_it_spares_stays() {
    run(async {
        let node = Node::new("hremove").await;
        let host = Host::apply(&node.ns, &[Fixture::StrictReversePath], Ours::default());
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        let mut state = writer.state();
        assert!(state.borrow().fights.is_empty());

        let plan = RemoverPlan {
            every: Duration::from_millis(50),
            ..RemoverPlan::default()
        };
        let remover = Remover::start(&node.ns, plan);
        let named = state.wait_for(|state| {
            [POD, LOCAL, REMOTE]
                .iter()
                .all(|prefix| state.fights.iter().any(|row| row.contains(prefix)))
        });
        let named = tokio::time::timeout(PATIENCE, named)
            .await
            .map(|result| result.unwrap().fights.clone());
        let removed = remover.removed();
        assert!(named.is_ok(), "{removed:?}, {:?}", state.borrow().fights);
        // It gives in instead of fighting on: each row was put back a few times only.
        assert!(removed.routes <= 40, "{removed:?} until it was named");
        drop(remover);
        // The remover is gone; the rows are taken up again after the pause.
        node.until_complete(Duration::from_secs(60), "after the fight")
            .await;
        host.assert_untouched(&node.ns);
    });
}
