//! A pool's encapsulation is switched under running traffic: two nodes, each with its own dataplane.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, NodeName, Revision};
use cali_netlink::events::Group;
use cali_netlink::testing::{TestNs, run};
use cali_routes::{Backend, Candidate, Input, NextHop, RouteSpec, Source};
use felix::dataplane::{Config, Dataplane, State, StatusSink};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(10);

struct Quiet;

impl StatusSink for Quiet {
    fn on_state(&mut self, _: &Arc<State>) {}
}

fn set(json: &str) -> Update {
    let value =
        AnyResource::from_slice(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"));
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from("1"),
    }
}

fn pool(mode: &str) -> Update {
    set(&format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{{"name":"p"}},
            "spec":{{"cidr":"192.168.0.0/16","vxlanMode":"{mode}"}}}}"#
    ))
}

/// The cluster: two nodes, a block and a pod on each.
fn cluster() -> Vec<Update> {
    let mut all = vec![set(
        r#"{"apiVersion":"projectcalico.org/v3","kind":"Profile","metadata":{"name":"open"},
            "spec":{"ingress":[{"action":"Allow"}],"egress":[{"action":"Allow"}]}}"#,
    )];
    for id in 1..=2 {
        all.push(set(&format!(
            r#"{{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{{"name":"node{id}"}},
                "spec":{{"bgp":{{"ipv4Address":"10.1.0.{id}/24"}},"ipv4VXLANTunnelAddr":"192.168.{id}.1"}}}}"#
        )));
        all.push(set(&format!(
            r#"{{"apiVersion":"projectcalico.org/v3","kind":"BlockAffinity","metadata":{{"name":"node{id}-b"}},
                "spec":{{"state":"confirmed","node":"node{id}","cidr":"192.168.{id}.0/26","deleted":false}}}}"#
        )));
        all.push(set(&format!(
            r#"{{"apiVersion":"projectcalico.org/v3","kind":"WorkloadEndpoint",
                "metadata":{{"name":"node{id}-k8s-pod-eth0","namespace":"default"}},
                "spec":{{"orchestrator":"k8s","node":"node{id}","pod":"pod","endpoint":"eth0","interfaceName":"calipod",
                "ipNetworks":["192.168.{id}.5/32"],"profiles":["open"]}}}}"#
        )));
    }
    all
}

struct Host {
    id: u8,
    ns: TestNs,
    pod: TestNs,
    updates: mpsc::Sender<SyncEvent>,
    dataplane: Dataplane,
}

impl Host {
    async fn new(id: u8, ns: TestNs, label: &str) -> Self {
        Self::with(id, ns, label, Backend::Bgp).await
    }

    async fn with(id: u8, ns: TestNs, label: &str, backend: Backend) -> Self {
        let pod = TestNs::new(label);
        let (_, eth0) = ns.veth("calipod", &pod, "eth0").await;
        pod.address(eth0, &format!("192.168.{id}.5/32")).await;
        pod.ip("route add 169.254.1.1 dev eth0 scope link");
        pod.ip("route add default via 169.254.1.1 dev eth0");
        ns.ip("route add default via 10.1.0.254");
        let (updates, dataplane) = Self::dataplane(id, &ns, backend);
        Self {
            id,
            ns,
            pod,
            updates,
            dataplane,
        }
    }

    fn dataplane(id: u8, ns: &TestNs, backend: Backend) -> (mpsc::Sender<SyncEvent>, Dataplane) {
        let (updates, stream) = mpsc::channel(16);
        let config = Config {
            backend,
            ..Config::new(NodeName::from(format!("node{id}")))
        };
        let started = Dataplane::start(config, ns.netlink().clone(), stream, Box::new(Quiet));
        (updates, started.unwrap())
    }

    async fn in_sync(&self) {
        let status = SyncEvent::Status(SyncStatus::InSync);
        self.updates.send(status).await.unwrap();
    }

    async fn send(&self, updates: Vec<Update>) {
        self.updates
            .send(SyncEvent::Updates(updates))
            .await
            .unwrap();
    }

    /// What bgpd would say: the other node's block, by the other node.
    async fn bgp(&self) {
        let other = 3 - self.id;
        let hops = vec![NextHop::new(format!("10.1.0.{other}").parse().unwrap())];
        let candidate = Candidate::new(RouteSpec::NextHops(hops), "peer");
        let input = Input::Set(
            Source::Bgp,
            format!("192.168.{other}.0/26").parse().unwrap(),
            candidate,
        );
        self.dataplane
            .handle()
            .routes()
            .apply(vec![input])
            .await
            .unwrap();
    }

    /// Waits until the route to the other node's block reads so.
    async fn route(&self, text: &str) {
        let block = format!("192.168.{}.0/26", 3 - self.id);
        let start = Instant::now();
        loop {
            let row = self.ns.ip(&format!("route show {block}"));
            if row.contains(text) {
                return;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{block} is {row:?}, not {text:?}\n{:#?}",
                self.dataplane.handle().state().borrow()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// "N packets transmitted, M received" of ping.
fn sent_and_received(text: &str) -> (u32, u32) {
    let line = text
        .lines()
        .find(|line| line.contains("packets transmitted"))
        .unwrap_or_else(|| panic!("{text}"));
    let numbers: Vec<u32> = line
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    (numbers[0], numbers[1])
}

#[test]
fn switching_through_all_modes_loses_no_packet_between_neighbours() {
    run(async {
        let (first, second) = (TestNs::new("modes"), TestNs::new("modes"));
        let (eth_a, eth_b) = first.veth("eth0", &second, "eth0").await;
        first.address(eth_a, "10.1.0.1/24").await;
        second.address(eth_b, "10.1.0.2/24").await;
        let hosts = [
            Host::new(1, first, "modes").await,
            Host::new(2, second, "modes").await,
        ];
        for host in &hosts {
            let mut all = cluster();
            all.push(pool("CrossSubnet"));
            host.send(all).await;
            host.updates
                .send(SyncEvent::Status(SyncStatus::InSync))
                .await
                .unwrap();
        }
        for host in &hosts {
            host.route("dev eth0 proto 80").await;
        }
        // Resolves neighbours, so that the count below is about the switches alone.
        hosts[0]
            .pod
            .run("ping", &["-c", "3", "-i", "0.1", "-W", "2", "192.168.2.5"]);
        let ping = hosts[0]
            .pod
            .command("ping")
            .args(["-i", "0.002", "-W", "2", "192.168.2.5"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();

        for round in 0..10 {
            for (mode, expected) in [
                ("Always", "dev vxlan.calico proto 80"),
                ("Never", "dev eth0 proto bird"),
                ("CrossSubnet", "dev eth0 proto 80"),
            ] {
                for host in &hosts {
                    host.send(vec![pool(mode)]).await;
                    if mode == "Never" && round == 0 {
                        // BGP has nothing to offer yet: the tunnel goes on carrying.
                        host.route("dev vxlan.calico proto 80").await;
                        host.bgp().await;
                    }
                    // One node is done before the other one hears of the edit.
                    host.route(expected).await;
                }
            }
        }
        let id = ping.id().to_string();
        hosts[0].pod.run("kill", &["-INT", &id]);
        let output = ping.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let (sent, received) = sent_and_received(&text);
        println!("{sent} sent, {received} received");
        // The last one may still be on its way when ping is told to end.
        assert!(sent > 30 && sent - received <= 1, "{text}");
    });
}

/// `host-gw`: no encapsulation and no BGP. Block affinities give the routes, by the nodes' own addresses; a node beyond a router
/// gets none, and the reason is told.
#[test]
fn without_encapsulation_and_bgp_neighbours_are_routed_by_their_addresses() {
    run(async {
        let (first, second) = (TestNs::new("hostgw"), TestNs::new("hostgw"));
        let (eth_a, eth_b) = first.veth("eth0", &second, "eth0").await;
        first.address(eth_a, "10.1.0.1/24").await;
        second.address(eth_b, "10.1.0.2/24").await;
        let hosts = [
            Host::with(1, first, "hostgw", Backend::None).await,
            Host::with(2, second, "hostgw", Backend::None).await,
        ];
        for host in &hosts {
            let mut all = cluster();
            all.push(pool("Never"));
            all.push(set(
                r#"{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"far"},
                    "spec":{"bgp":{"ipv4Address":"10.2.0.3/24"}}}"#,
            ));
            all.push(set(
                r#"{"apiVersion":"projectcalico.org/v3","kind":"BlockAffinity","metadata":{"name":"far-b"},
                    "spec":{"state":"confirmed","node":"far","cidr":"192.168.3.0/26","deleted":false}}"#,
            ));
            host.send(all).await;
            host.updates
                .send(SyncEvent::Status(SyncStatus::InSync))
                .await
                .unwrap();
        }
        for host in &hosts {
            host.route("dev eth0 proto 80").await;
        }
        let said = hosts[0]
            .pod
            .run("ping", &["-c", "3", "-i", "0.1", "-W", "2", "192.168.2.5"]);
        assert_eq!(sent_and_received(&said), (3, 3), "{said}");
        let routes = hosts[0].dataplane.handle().routes().view().await.unwrap();
        let far = routes
            .iter()
            .find(|route| route.prefix.to_string() == "192.168.3.0/26")
            .unwrap();
        assert!(!far.programmed, "{far:?}");
        assert_eq!(
            far.problem.as_deref(),
            Some("node far is not on-link: its block needs BGP or encapsulation")
        );
    });
}

/// A node starts again, and bgpd is faster than the datastore: its path goes beside the tunnel.
#[test]
fn a_start_leaves_the_tunnels_route_alone_until_it_knows_the_pools() {
    run(async {
        let (first, second) = (TestNs::new("restart"), TestNs::new("restart"));
        let (eth_a, _) = first.veth("eth0", &second, "eth0").await;
        first.address(eth_a, "10.1.0.1/24").await;
        let mut host = Host::new(1, first, "restart").await;
        host.send([cluster(), vec![pool("Always")]].concat()).await;
        host.in_sync().await;
        host.route("dev vxlan.calico proto 80").await;

        let (updates, dataplane) = Host::dataplane(1, &host.ns, Backend::Bgp);
        (host.updates, host.dataplane) = (updates, dataplane);
        let mut watch = host.ns.netlink().events(Group::ROUTING).unwrap();
        host.send(cluster()).await;
        host.bgp().await;
        host.send(vec![pool("Always")]).await;
        host.in_sync().await;
        let mut state = host.dataplane.handle().state();
        let ready = state.wait_for(|state| state.ready);
        let ready = tokio::time::timeout(PATIENCE, ready).await.unwrap();
        // The first that others are told of its tunnels is as they are.
        let tunnels = ready.unwrap().tunnels.clone();
        assert!(tunnels.devices.contains("vxlan.calico"), "{tunnels:?}");
        host.route("dev vxlan.calico proto 80").await;
        let seen = tokio::time::timeout(Duration::from_millis(50), watch.next()).await;
        assert!(seen.is_err(), "the restart touched the kernel: {seen:?}");
    });
}
