//! The tunnel applier against the real kernel, in namespaces of its own.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_api::NodeName;
use cali_netlink::testing::{TestNs, patient, run};
use ipip_vxlan::{
    Encap, Endpoint, GatewaysInUse, Pool, Resolver, Scope, Tunnels, VXLAN_V4_DEVICE, Vtep, Wish,
    vtep_mac,
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

const ALWAYS: Encap = Encap::Vxlan(Scope::Always);

/// Node `id` of a cluster of three, with the device that carries its address.
struct Node {
    ns: TestNs,
    wish: watch::Sender<Wish>,
    in_use: watch::Sender<GatewaysInUse>,
    tunnels: Option<Tunnels>,
}

impl Node {
    fn wish(id: u8) -> Wish {
        let mut resolver = Resolver::new(NodeName::from(format!("node{id}")));
        for id in 1..=3 {
            resolver.set_node(endpoint(id));
        }
        resolver.set_pool(pool(ALWAYS));
        Wish {
            in_sync: true,
            linger: Duration::ZERO,
            ..Wish::new(resolver)
        }
    }

    fn new(label: &str, id: u8) -> Self {
        let ns = TestNs::new(label);
        let (wish, _) = watch::channel(Self::wish(id));
        let (in_use, _) = watch::channel(BTreeSet::new());
        Self {
            ns,
            wish,
            in_use,
            tunnels: None,
        }
    }

    /// One node with an underlay that leads nowhere.
    async fn alone(label: &str) -> (Self, TestNs) {
        let node = Self::new(label, 1);
        let other = TestNs::new(label);
        let (eth0, _) = node.ns.veth("eth0", &other, "port1").await;
        node.ns.address(eth0, "10.1.0.1/24").await;
        (node, other)
    }

    fn start(&mut self) {
        let (wish, in_use) = (self.wish.subscribe(), self.in_use.subscribe());
        self.tunnels = Some(Tunnels::start(self.ns.netlink().clone(), wish, in_use).unwrap());
    }

    fn set_mode(&self, encap: Encap) {
        self.wish.send_modify(|wish| {
            wish.resolver.set_pool(pool(encap));
        });
    }

    /// The node reads from the datastore that it has said so.
    fn tell(&self, word: &str) {
        self.wish.send_modify(|wish| {
            wish.resolver.set_node(Endpoint {
                receives: Some(word.parse().unwrap()),
                ..endpoint(1)
            });
        });
    }

    fn text(&self, program: &str, args: &str) -> String {
        let args: Vec<&str> = args.split_whitespace().collect();
        String::from_utf8_lossy(&self.ns.output(program, &args).stdout).into_owned()
    }

    fn fdb(&self) -> String {
        self.text("bridge", "fdb show dev vxlan.calico")
    }

    fn neighbours(&self) -> String {
        self.text("ip", "neigh show dev vxlan.calico")
    }

    fn device(&self) -> String {
        self.text("ip", "-d addr show dev vxlan.calico")
    }

    async fn until(&self, limit: Duration, what: &str, condition: impl Fn() -> bool) {
        let (start, limit) = (Instant::now(), patient(limit));
        while !condition() {
            assert!(
                start.elapsed() < limit,
                "{what}: not within {limit:?}\n{}{}{}state: {:?}",
                self.device(),
                self.fdb(),
                self.neighbours(),
                self.tunnels
                    .as_ref()
                    .map(|tunnels| tunnels.state().borrow().clone())
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!("{what}: after {:?}", start.elapsed());
    }

    /// Both remote endpoints are in the kernel.
    fn is_complete(&self) -> bool {
        let (fdb, neighbours) = (self.fdb(), self.neighbours());
        [2, 3].into_iter().all(|id| {
            let mac = vtep_mac(&format!("node{id}"), false);
            fdb.contains(&format!("{mac} dst 10.1.0.{id} self permanent"))
                && neighbours.contains(&format!("192.168.{id}.1 lladdr {mac} PERMANENT"))
        })
    }
}

#[test]
fn device_and_entries_are_as_calico_makes_them() {
    run(async {
        let (mut node, _other) = Node::alone("vxform").await;
        node.start();
        node.until(PATIENCE, "complete", || node.is_complete())
            .await;
        let device = node.device();
        for part in [
            "vxlan id 4096 local 10.1.0.1",
            "dstport 4789",
            "nolearning",
            "mtu 1450",
            "inet 192.168.1.1/32",
        ] {
            assert!(device.contains(part), "{part} in {device}");
        }
        assert!(
            device.contains(&vtep_mac("node1", false).to_string()),
            "{device}"
        );
    });
}

#[test]
fn entries_removed_by_hand_are_back_within_a_second() {
    run(async {
        let (mut node, _other) = Node::alone("vxdel").await;
        node.start();
        node.until(PATIENCE, "complete", || node.is_complete())
            .await;
        let mac = vtep_mac("node2", false);
        node.ns.run(
            "bridge",
            &[
                "fdb",
                "del",
                &mac.to_string(),
                "dev",
                "vxlan.calico",
                "dst",
                "10.1.0.2",
            ],
        );
        node.until(REPAIR, "forwarding entry", || node.is_complete())
            .await;
        node.ns.ip("neigh del 192.168.2.1 dev vxlan.calico");
        node.until(REPAIR, "neighbour", || node.is_complete()).await;
        node.ns.ip(
            "neigh replace 192.168.3.1 lladdr 00:11:22:33:44:55 dev vxlan.calico nud permanent",
        );
        node.until(REPAIR, "changed neighbour", || node.is_complete())
            .await;
    });
}

#[test]
fn a_removed_device_comes_back_with_all_its_entries() {
    run(async {
        let (mut node, _other) = Node::alone("vxgone").await;
        node.start();
        node.until(PATIENCE, "complete", || node.is_complete())
            .await;
        node.ns.ip("link del vxlan.calico");
        node.until(REPAIR, "device", || node.is_complete()).await;
        node.ns.ip("link set vxlan.calico down");
        node.until(REPAIR, "up again", || {
            node.is_complete() && node.device().contains("UP")
        })
        .await;
        node.ns.ip("addr del 192.168.1.1/32 dev vxlan.calico");
        node.until(REPAIR, "address", || {
            node.device().contains("192.168.1.1/32")
        })
        .await;
    });
}

#[test]
fn a_device_of_another_kind_is_left_alone_and_reported() {
    run(async {
        let (mut node, _other) = Node::alone("vxforeign").await;
        node.ns.ip("link add vxlan.calico type bridge");
        node.start();
        let mut state = node.tunnels.as_ref().unwrap().state();
        let reported = state.wait_for(|state| {
            state
                .problems
                .iter()
                .any(|problem| problem.contains("kind 'bridge'"))
        });
        tokio::time::timeout(PATIENCE, reported)
            .await
            .expect("a report")
            .unwrap();
        assert!(node.device().contains("bridge"), "{}", node.device());
    });
}

#[test]
fn restart_adopts_the_device_as_it_is() {
    run(async {
        let (mut node, _other) = Node::alone("vxadopt").await;
        node.start();
        node.until(PATIENCE, "complete", || node.is_complete())
            .await;
        let before = (node.device(), node.fdb(), node.neighbours());
        node.tunnels = None;
        node.start();
        let mut state = node.tunnels.as_ref().unwrap().state();
        let stands = state.wait_for(|state| state.endpoints == 2);
        tokio::time::timeout(PATIENCE, stands)
            .await
            .expect("adoption")
            .unwrap();
        assert_eq!(
            (node.device(), node.fdb(), node.neighbours()),
            before,
            "index and entries are the same"
        );
    });
}

#[test]
fn mtu_follows_the_underlay() {
    run(async {
        let (mut node, _other) = Node::alone("vxmtu").await;
        node.start();
        node.until(PATIENCE, "complete", || node.device().contains("mtu 1450"))
            .await;
        node.ns.ip("link set eth0 mtu 1400");
        node.until(REPAIR, "lower", || node.device().contains("mtu 1350"))
            .await;
    });
}

#[test]
fn a_device_stays_while_routes_use_it_and_goes_after() {
    run(async {
        let (mut node, _other) = Node::alone("vxbreak").await;
        node.in_use.send_replace(BTreeSet::from([(
            VXLAN_V4_DEVICE.to_owned(),
            IpAddr::from([192, 168, 2, 1]),
        )]));
        node.start();
        node.until(PATIENCE, "complete", || node.is_complete())
            .await;
        node.set_mode(Encap::None);
        node.until(PATIENCE, "the unused endpoint goes", || {
            !node.fdb().contains("10.1.0.3")
        })
        .await;
        assert!(
            node.fdb().contains("10.1.0.2"),
            "the used one stays: {}",
            node.fdb()
        );
        node.in_use.send_replace(BTreeSet::new());
        node.until(PATIENCE, "device removed", || node.device().is_empty())
            .await;
    });
}

/// Whoever reads the former word may send through the device at any time, so the word goes first.
#[test]
fn a_device_goes_only_after_the_node_has_taken_its_word_back() {
    run(async {
        let (mut node, _other) = Node::alone("word").await;
        node.tell("vxlan");
        node.start();
        node.until(PATIENCE, "the device stands", || node.is_complete())
            .await;
        let state = node.tunnels.as_ref().unwrap().state();
        node.set_mode(Encap::None);
        node.until(PATIENCE, "the word is taken back", || {
            !state.borrow().receives.vxlan_v4
        })
        .await;
        assert!(node.is_complete(), "{}{}", node.fdb(), node.neighbours());
        let start = Instant::now();
        node.tell("direct");
        node.until(PATIENCE, "the device goes", || node.device().is_empty())
            .await;
        // The others read the word a moment later than the node itself.
        assert!(start.elapsed() > Duration::from_secs(4));
    });
}

#[test]
fn two_nodes_exchange_packets_through_the_tunnel() {
    run(async {
        let (mut a, mut b) = (Node::new("vxpair", 1), Node::new("vxpair", 2));
        let (eth_a, eth_b) = a.ns.veth("eth0", &b.ns, "eth0").await;
        a.ns.address(eth_a, "10.1.0.1/24").await;
        b.ns.address(eth_b, "10.1.0.2/24").await;
        a.start();
        b.start();
        for node in [&a, &b] {
            node.until(PATIENCE, "device", || {
                node.device().contains("inet 192.168")
            })
            .await;
        }
        a.ns.ip("route add 192.168.2.0/26 via 192.168.2.1 dev vxlan.calico onlink");
        b.ns.ip("route add 192.168.1.0/26 via 192.168.1.1 dev vxlan.calico onlink");
        a.ns.run(
            "ping",
            &[
                "-c",
                "3",
                "-i",
                "0.02",
                "-W",
                "2",
                "-M",
                "do",
                "-s",
                "1422",
                "192.168.2.1",
            ],
        );
    });
}
