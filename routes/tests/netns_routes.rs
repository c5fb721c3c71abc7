//! The writer against the real kernel, in namespaces of its own.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_api::{Cidr, NodeName};
use cali_netlink::events::{Event, Group, Notice};
use cali_netlink::testing::{TestNs, patient, run};
use cali_routes::{Candidate, Input, KernelSettings, NextHop, RouteSpec, Source, Writer};
use ipip_vxlan::{Encap, Endpoint, Pool};

/// A foreign change is put right within this time.
const REPAIR: Duration = Duration::from_secs(1);
/// For everything that has no promise about time.
const PATIENCE: Duration = Duration::from_secs(10);

const POD: &str = "192.168.1.5/32";
const BLOCK1: &str = "192.168.1.0/26";
const BLOCK2: &str = "192.168.2.0/26";
const BLOCK3: &str = "192.168.3.0/26";

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

/// node1 with `eth0` (10.1.0.1/24) to a router namespace and one workload device; node3's subnet is behind 10.1.0.254.
struct Node {
    ns: TestNs,
    _router: TestNs,
}

impl Node {
    async fn new(label: &str) -> Self {
        let (ns, router) = (TestNs::new(label), TestNs::new(label));
        let (eth0, _) = ns.veth("eth0", &router, "port1").await;
        ns.address(eth0, "10.1.0.1/24").await;
        ns.veth("cali1", &router, "pod1").await;
        ns.ip("route add 10.2.0.0/24 via 10.1.0.254");
        Self {
            ns,
            _router: router,
        }
    }

    fn start(&self) -> Writer {
        Writer::start(
            NodeName::from("node1"),
            self.ns.netlink().clone(),
            KernelSettings::default(),
        )
        .unwrap()
    }

    fn routes(&self) -> Vec<String> {
        let text = self.ns.ip("-d route show table main");
        text.lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }

    fn route(&self, prefix: &str) -> Option<String> {
        let bare = prefix.strip_suffix("/32").unwrap_or(prefix);
        self.routes()
            .into_iter()
            .find(|line| line.split(' ').any(|word| word == bare))
    }

    /// Waits until `accept` holds for the row of `prefix`; returns how long that took.
    async fn until(
        &self,
        prefix: &str,
        limit: Duration,
        accept: impl Fn(Option<&str>) -> bool,
    ) -> Duration {
        let (start, limit) = (Instant::now(), patient(limit));
        loop {
            let row = self.route(prefix);
            if accept(row.as_deref()) {
                return start.elapsed();
            }
            assert!(
                start.elapsed() < limit,
                "{prefix} is {row:?} after {limit:?}; all: {:#?}",
                self.routes()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn endpoint(name: &str, address: &str) -> Input {
    Input::Node(Endpoint {
        v4: Some(address.parse().unwrap()),
        ..Endpoint::named(NodeName::from(name))
    })
}

fn bgp(prefix: &str, next_hops: &[&str]) -> Input {
    let hops = next_hops
        .iter()
        .map(|hop| NextHop::new(hop.parse::<IpAddr>().unwrap()))
        .collect();
    Input::Set(
        Source::Bgp,
        cidr(prefix),
        Candidate::new(RouteSpec::NextHops(hops), "peer"),
    )
}

fn workload(prefix: &str, device: &str) -> Input {
    let spec = RouteSpec::Device {
        device: device.into(),
        source: None,
    };
    Input::Set(
        Source::Workload,
        cidr(prefix),
        Candidate::new(spec, "WorkloadEndpoint(default/pod)"),
    )
}

/// A pool without encapsulation, a local pod and block, node2's block on-link and node3's behind the router.
fn everything() -> Vec<Input> {
    vec![
        endpoint("node1", "10.1.0.1/24"),
        endpoint("node2", "10.1.0.2/24"),
        endpoint("node3", "10.2.0.3/24"),
        Input::Pool(Pool {
            name: "routed".into(),
            cidr: cidr("192.168.0.0/16"),
            encap: Encap::None,
        }),
        workload(POD, "cali1"),
        Input::Set(
            Source::LocalBlock,
            cidr(BLOCK1),
            Candidate::new(RouteSpec::Blackhole, "block"),
        ),
        bgp(BLOCK2, &["10.1.0.2"]),
        bgp(BLOCK3, &["10.2.0.3"]),
        Input::InSync,
    ]
}

fn has(text: &'static str) -> impl Fn(Option<&str>) -> bool {
    move |row| row.is_some_and(|row| row.contains(text))
}

#[test]
fn routes_have_the_form_that_users_know() {
    run(async {
        let node = Node::new("form").await;
        let writer = node.start();
        assert_eq!(writer.apply(everything()).await.unwrap(), Vec::new());
        let row = |prefix: &str| {
            node.route(prefix)
                .unwrap_or_else(|| panic!("{prefix} in {:#?}", node.routes()))
        };
        assert!(
            row(POD).contains("dev cali1 proto 80 scope link"),
            "{}",
            row(POD)
        );
        assert!(
            row(BLOCK1).starts_with("blackhole") && row(BLOCK1).contains("proto 80"),
            "{}",
            row(BLOCK1)
        );
        assert!(
            row(BLOCK2).contains("via 10.1.0.2 dev eth0 proto bird"),
            "{}",
            row(BLOCK2)
        );
        assert!(
            row(BLOCK3).contains("via 10.1.0.254 dev eth0 proto bird"),
            "{}",
            row(BLOCK3)
        );
    });
}

/// A pod's interface comes up and its route is asked for in the same moment: the news of the one must not delay the other.
#[test]
fn a_route_over_a_device_that_has_just_come_up_is_there_with_the_answer() {
    run(async {
        let node = Node::new("fresh").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        for number in 10..20 {
            let (device, prefix) = (format!("cali{number}"), format!("192.168.1.{number}/32"));
            let pair = format!("link add {device} type veth peer name peer{number}");
            node.ns.ip(&pair);
            let early = writer
                .apply(vec![workload(&prefix, &device)])
                .await
                .unwrap();
            assert_eq!(early.len(), 1, "the device is down: {early:?}");
            node.ns.ip(&format!("link set {device} up"));
            let asked = writer.apply(vec![workload(&prefix, &device)]).await;
            assert_eq!(asked.unwrap(), Vec::new());
            let row = node.route(&prefix).unwrap();
            assert!(row.contains(&format!("dev {device} proto 80")), "{row}");
        }
    });
}

#[test]
fn deleted_routes_are_back_within_a_second() {
    run(async {
        let node = Node::new("del").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        for prefix in [POD, BLOCK1, BLOCK2, BLOCK3] {
            let before = node.route(prefix).unwrap();
            let kind = if before.starts_with("blackhole") {
                "blackhole "
            } else {
                ""
            };
            node.ns.ip(&format!("route del {kind}{prefix}"));
            let took = node
                .until(prefix, REPAIR, |row| row == Some(before.as_str()))
                .await;
            println!("{prefix} was back after {took:?}");
        }
    });
}

#[test]
fn a_route_that_somebody_redirects_is_put_right() {
    run(async {
        let node = Node::new("redir").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        node.ns.ip(&format!(
            "route replace {BLOCK2} via 10.1.0.77 proto static"
        ));
        node.until(BLOCK2, REPAIR, has("via 10.1.0.2 dev eth0 proto bird"))
            .await;
    });
}

#[test]
fn a_deleted_nexthop_object_comes_back_with_its_routes() {
    run(async {
        let node = Node::new("nh").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        let before = node.route(BLOCK2).unwrap();
        let id = before
            .split(' ')
            .skip_while(|word| *word != "nhid")
            .nth(1)
            .expect("a nexthop id")
            .to_owned();
        let mut watch = node.ns.netlink().events(Group::ROUTING).unwrap();
        node.ns.ip(&format!("nexthop del id {id}"));
        let gone = async {
            while !matches!(watch.next().await.unwrap(), Event::Nexthop(Notice::Gone(_))) {}
        };
        tokio::time::timeout(PATIENCE, gone)
            .await
            .expect("the object is removed");
        node.until(BLOCK2, REPAIR, |row| row == Some(before.as_str()))
            .await;
    });
}

#[test]
fn link_down_and_up_brings_all_routes_back() {
    run(async {
        let node = Node::new("flap").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        node.ns.ip("link set cali1 down");
        node.ns.ip("link set eth0 down");
        node.until(POD, PATIENCE, |row| row.is_none()).await;
        node.ns.ip("link set cali1 up");
        node.ns.ip("link set eth0 up");
        node.ns.ip("route add 10.2.0.0/24 via 10.1.0.254");
        node.until(POD, REPAIR, has("dev cali1")).await;
        node.until(BLOCK2, REPAIR, has("via 10.1.0.2")).await;
        node.until(BLOCK3, REPAIR, has("via 10.1.0.254")).await;
        let states = writer.view().await.unwrap();
        assert!(states.iter().all(|row| row.programmed), "{states:#?}");
    });
}

#[test]
fn a_quick_flap_that_removes_routes_silently_is_noticed() {
    run(async {
        let node = Node::new("flip").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        node.ns.run(
            "sh",
            &["-c", "ip link set cali1 down; ip link set cali1 up"],
        );
        node.until(POD, REPAIR, has("dev cali1")).await;
    });
}

#[test]
fn recursive_next_hop_follows_the_underlay() {
    run(async {
        let node = Node::new("rec").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        node.ns.ip("route replace 10.2.0.0/24 via 10.1.0.253");
        node.until(BLOCK3, REPAIR, has("via 10.1.0.253")).await;
        node.ns.ip("route del 10.2.0.0/24");
        node.until(BLOCK3, REPAIR, |row| row.is_none()).await;
        let row = writer
            .view()
            .await
            .unwrap()
            .into_iter()
            .find(|row| row.prefix == cidr(BLOCK3))
            .unwrap();
        assert_eq!(
            row.problem.as_deref(),
            Some("next hop 10.2.0.3 is unreachable")
        );
    });
}

#[test]
fn equal_cost_paths_make_one_route_over_a_group() {
    run(async {
        let node = Node::new("ecmp").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        assert_eq!(
            writer
                .apply(vec![bgp(BLOCK2, &["10.1.0.2", "10.1.0.9"])])
                .await
                .unwrap(),
            Vec::new()
        );
        let text = node.ns.ip(&format!("route show {BLOCK2}"));
        assert!(
            text.contains("10.1.0.2") && text.contains("10.1.0.9"),
            "{text}"
        );
        writer
            .apply(vec![bgp(BLOCK2, &["10.1.0.9"])])
            .await
            .unwrap();
        let objects = node.ns.ip("nexthop show");
        assert!(
            !objects.contains("10.1.0.2 ") && !objects.contains("group"),
            "{objects}"
        );
    });
}

#[test]
fn restart_adopts_and_changes_nothing() {
    run(async {
        let node = Node::new("adopt").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        let before = (node.routes(), node.ns.ip("nexthop show"));
        drop(writer);
        // Whoever watches must see no change at all, not only the same end.
        let mut watch = node.ns.netlink().events(Group::ROUTING).unwrap();
        let writer = node.start();
        writer.apply(vec![Input::BgpStarted]).await.unwrap();
        writer.apply(everything()).await.unwrap();
        writer
            .apply(vec![
                Input::BgpEndOfSync { v4: true },
                Input::BgpEndOfSync { v4: false },
            ])
            .await
            .unwrap();
        assert_eq!((node.routes(), node.ns.ip("nexthop show")), before);
        let seen = tokio::time::timeout(Duration::from_millis(50), watch.next()).await;
        assert!(seen.is_err(), "the restart touched the kernel: {seen:?}");
    });
}

#[test]
fn routes_of_an_earlier_bgpd_stay_until_its_successor_has_told_everything() {
    run(async {
        let node = Node::new("hold").await;
        let writer = node.start();
        writer.apply(everything()).await.unwrap();
        drop(writer);
        let writer = node.start();
        let without_bgp = everything()
            .into_iter()
            .filter(|input| !matches!(input, Input::Set(Source::Bgp, ..)));
        writer.apply(without_bgp.collect()).await.unwrap();
        assert!(
            node.route(BLOCK2).is_some() && node.route(BLOCK3).is_some(),
            "{:#?}",
            node.routes()
        );
        writer
            .apply(vec![Input::BgpStarted, bgp(BLOCK2, &["10.1.0.2"])])
            .await
            .unwrap();
        assert!(
            node.route(BLOCK3).is_some(),
            "nothing goes before the end of sync"
        );
        writer
            .apply(vec![Input::BgpEndOfSync { v4: true }])
            .await
            .unwrap();
        assert!(
            node.route(BLOCK2).is_some() && node.route(BLOCK3).is_none(),
            "{:#?}",
            node.routes()
        );
    });
}

#[test]
fn foreign_routes_survive_start_sync_and_neighbouring_changes() {
    run(async {
        let node = Node::new("foreign").await;
        let foreign = [
            "172.16.0.0/24 via 10.1.0.9 proto 80",
            "172.17.0.0/24 via 10.1.0.9 proto bird",
            "192.168.2.0/26 via 10.1.0.9 proto static",
        ];
        for route in foreign {
            node.ns.ip(&format!("route add {route}"));
        }
        let writer = node.start();
        let failed = writer.apply(everything()).await.unwrap();
        writer
            .apply(vec![Input::BgpEndOfSync { v4: true }])
            .await
            .unwrap();
        for route in ["172.16.0.0/24", "172.17.0.0/24"] {
            assert!(
                node.route(route).is_some(),
                "{route} is gone: {:#?}",
                node.routes()
            );
        }
        assert!(
            node.route(BLOCK2).unwrap().contains("proto static"),
            "{:#?}",
            node.routes()
        );
        assert_eq!(failed.len(), 1, "the taken place is reported: {failed:?}");
        node.ns.ip("route del 192.168.2.0/26");
        // The place is free now; it is taken at the next try.
        node.until(BLOCK2, PATIENCE, has("proto bird")).await;
    });
}
