//! The tunnel applier on a host that others use as well: what is theirs stays as it is, and a place that is taken is
//! reported and waited for.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_api::NodeName;
use cali_netlink::testing::{
    TestNs,
    hostile::{self, Churn, Fixture, Host, Ours},
    patient, run,
};
use ipip_vxlan::{
    Encap, Endpoint, GatewaysInUse, Pool, Resolver, Scope, Tunnels, Vtep, Wish, vtep_mac,
};
use tokio::sync::watch;

/// A foreign change is put right within this time.
const REPAIR: Duration = Duration::from_secs(1);
/// For everything that has no promise about time.
const PATIENCE: Duration = Duration::from_secs(10);

fn endpoint(id: u8) -> Endpoint {
    let name = NodeName::from(format!("node{id}"));
    let vtep = Vtep {
        addr: IpAddr::from([192, 168, id, 1]),
        mac: vtep_mac(name.as_str(), false),
    };
    Endpoint {
        v4: Some(format!("10.1.0.{id}/24").parse().unwrap()),
        vtep_v4: Some(vtep),
        ..Endpoint::named(name)
    }
}

fn pool(encap: Encap) -> Pool {
    Pool {
        name: "overlay".into(),
        cidr: "192.168.0.0/16".parse().unwrap(),
        encap,
    }
}

/// node1 of two, with a VXLAN pool.
struct Node {
    ns: TestNs,
    _peer: TestNs,
    wish: watch::Sender<Wish>,
    in_use: watch::Sender<GatewaysInUse>,
}

impl Node {
    async fn new(label: &str) -> Self {
        let (ns, peer) = (TestNs::new(label), TestNs::new(label));
        let (eth0, _) = ns.veth("eth0", &peer, "port1").await;
        ns.address(eth0, "10.1.0.1/24").await;
        let mut resolver = Resolver::new(NodeName::from("node1"));
        resolver.set_node(endpoint(1));
        resolver.set_node(endpoint(2));
        resolver.set_pool(pool(Encap::Vxlan(Scope::Always)));
        let wish = Wish {
            in_sync: true,
            linger: Duration::ZERO,
            ..Wish::new(resolver)
        };
        let (in_use, _) = watch::channel(BTreeSet::new());
        Self {
            ns,
            _peer: peer,
            wish: watch::channel(wish).0,
            in_use,
        }
    }

    fn start(&self) -> Tunnels {
        let (wish, in_use) = (self.wish.subscribe(), self.in_use.subscribe());
        Tunnels::start(self.ns.netlink().clone(), wish, in_use).unwrap()
    }

    fn text(&self, program: &str, args: &str) -> String {
        let args: Vec<&str> = args.split_whitespace().collect();
        String::from_utf8_lossy(&self.ns.output(program, &args).stdout).into_owned()
    }

    /// Device, address, forwarding entry and neighbour, as far as they are there.
    fn tunnel(&self) -> String {
        [
            ("ip", "-d addr show dev vxlan.calico"),
            ("bridge", "fdb show dev vxlan.calico"),
            ("ip", "neigh show dev vxlan.calico"),
        ]
        .map(|(program, args)| self.text(program, args))
        .concat()
    }

    fn is_complete(&self) -> bool {
        let (seen, mac) = (self.tunnel(), vtep_mac("node2", false));
        seen.contains("vxlan id 4096 local 10.1.0.1")
            && seen.contains("inet 192.168.1.1/32")
            && seen.contains(&format!("{mac} dst 10.1.0.2 self permanent"))
            && seen.contains(&format!("192.168.2.1 lladdr {mac} PERMANENT"))
    }

    async fn until(&self, limit: Duration, what: &str, condition: impl Fn() -> bool) {
        let (start, limit) = (Instant::now(), patient(limit));
        while !condition() {
            let seen = self.tunnel();
            assert!(
                start.elapsed() < limit,
                "{what}: not within {limit:?}\n{seen}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn comes_and_goes_beside(label: &str, fixtures: &[Fixture]) {
    let node = Node::new(label).await;
    let host = Host::apply(&node.ns, fixtures, Ours::default());
    let _tunnels = node.start();
    let what = format!("beside {fixtures:?}");
    node.until(PATIENCE, &what, || node.is_complete()).await;
    host.assert_untouched(&node.ns);

    node.wish.send_modify(|wish| {
        wish.resolver.set_pool(pool(Encap::None));
    });
    node.until(PATIENCE, &what, || node.tunnel().is_empty())
        .await;
    host.assert_untouched(&node.ns);
}

#[test]
fn tunnels_come_and_go_beside_every_fixture() {
    run(async {
        for fixture in hostile::all() {
            comes_and_goes_beside("hvx", &[*fixture]).await;
        }
    });
}

#[test]
fn tunnels_come_and_go_on_a_crowded_host() {
    run(comes_and_goes_beside("hvxcrowd", hostile::crowded()));
}

#[test]
fn repair_is_as_quick_while_iptables_churns() {
    run(async {
        let node = Node::new("hvxchurn").await;
        let host = Host::apply(&node.ns, hostile::crowded(), Ours::default());
        let _tunnels = node.start();
        node.until(PATIENCE, "complete", || node.is_complete())
            .await;
        let churn = Churn::start(&node.ns, Duration::from_secs(30));
        node.ns.ip("neigh del 192.168.2.1 dev vxlan.calico");
        node.until(REPAIR, "neighbour", || node.is_complete()).await;
        node.ns.ip("link del vxlan.calico");
        node.until(REPAIR, "device", || node.is_complete()).await;
        drop(churn);
        host.assert_untouched(&node.ns);
    });
}

#[test]
fn another_device_with_our_vni_is_reported_and_waited_for() {
    run(async {
        let node = Node::new("hvxvni").await;
        node.ns
            .ip("link add other type vxlan id 4096 local 10.1.0.1 dstport 4789 nolearning");
        node.ns.ip("link set other up");
        let host = Host::apply(&node.ns, &[], Ours::default());
        let tunnels = node.start();
        let mut state = tunnels.state();
        let reported = state.wait_for(|state| {
            state
                .problems
                .iter()
                .any(|problem| problem.contains("vxlan.calico"))
        });
        tokio::time::timeout(PATIENCE, reported)
            .await
            .expect("a report")
            .unwrap();
        println!("{:?}", state.borrow().problems);
        host.assert_untouched(&node.ns);
        node.ns.ip("link del other");
        node.until(PATIENCE, "the free place is taken", || node.is_complete())
            .await;
    });
}
