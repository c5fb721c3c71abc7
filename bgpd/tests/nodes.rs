//! Nodes of a cluster, configured by resources as they change, against each other and an external router; in one
//! process and on virtual time.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bgpd::agent::Agent;
use bgpd::config::{DeviceRoute, DeviceRouteKind, Local, standalone};
use bgpd::devices::Devices;
use bgpd::passwords::Passwords;
use bgpd::reach::Anywhere;
use bgpd::sink::memory::Memory;
use bgpd::speaker::{Environment, Speaker};
use bgpd::transport::memory::Network;
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Revision};
use cali_control::status::{
    BgpRequest, BgpResponse, BgpStatus, Direction, Explanation, PeerStatus, RouteStatus,
    SessionState,
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

/// A node's agent and speaker, or a speaker that stands alone.
struct Node {
    name: String,
    speaker: Speaker,
    sink: Memory,
    events: Option<mpsc::Sender<SyncEvent>>,
    devices: watch::Sender<Devices>,
}

struct Cluster {
    net: Network,
    secrets: tempfile::TempDir,
    nodes: Vec<Node>,
    objects: BTreeMap<String, Value>,
}

fn update(object: &Value, there: bool) -> Update {
    let mut object = object.clone();
    if object.get("apiVersion").is_none() {
        object["apiVersion"] = json!("projectcalico.org/v3");
    }
    let value = AnyResource::from_json(object).unwrap();
    Update {
        key: value.key(),
        value: there.then(|| Arc::new(value)),
        revision: Revision::from("1"),
    }
}

fn environment(net: &Network, address: IpAddr, sink: &Memory) -> Environment {
    Environment {
        transport: Arc::new(net.host(&[address])),
        sink: Box::new(sink.clone()),
        reach: Box::new(Anywhere),
        seed: 7 + u64::from(address.to_string().as_bytes().last().copied().unwrap()),
        deferral: Duration::from_secs(60),
    }
}

fn name_of(object: &Value) -> String {
    format!("{}/{}", object["kind"], object["metadata"]["name"])
}

impl Cluster {
    fn new(objects: &[Value]) -> Self {
        Self {
            net: Network::default(),
            secrets: tempfile::tempdir().unwrap(),
            nodes: Vec::new(),
            objects: objects.iter().map(|o| (name_of(o), o.clone())).collect(),
        }
    }

    /// Starts the agent of a node with the resources as they are.
    async fn node(&mut self, n: u8) {
        let name = format!("node{n}");
        let sink = Memory::default();
        let address = IpAddr::from([10, 0, 0, n]);
        let local = Local {
            node: name.clone(),
            ..Local::default()
        };
        let (devices, receiver) = watch::channel(Devices::default());
        let (events, queue) = mpsc::channel(16);
        let (told, started) = oneshot::channel();
        let agent = Agent::new(local, Passwords::in_folder(self.secrets.path().to_owned()))
            .with_devices(receiver);
        let environment = environment(&self.net, address, &sink);
        tokio::spawn(agent.run(queue, environment, move |speaker: &Speaker| {
            let _ = told.send(speaker.clone());
        }));
        let all = self.objects.values().map(|o| update(o, true)).collect();
        events.send(SyncEvent::Updates(all)).await.unwrap();
        let status = SyncEvent::Status(SyncStatus::InSync);
        events.send(status).await.unwrap();
        let speaker = started.await.unwrap();
        self.nodes.push(Node {
            name,
            speaker,
            sink,
            events: Some(events),
            devices,
        });
    }

    /// Starts a router that stands alone.
    async fn router(&mut self, address: &str, file: &str) {
        let sink = Memory::default();
        let address: IpAddr = address.parse().unwrap();
        let text = format!("router-id = \"{address}\"\nlisten = [\"{address}\"]\n{file}");
        let settings = standalone::parse(&text).unwrap().settings;
        let (speaker, _) = Speaker::start(environment(&self.net, address, &sink), settings);
        self.nodes.push(Node {
            name: address.to_string(),
            speaker,
            sink,
            events: None,
            devices: watch::channel(Devices::default()).0,
        });
    }

    async fn tell(&self, object: &Value, there: bool) {
        for events in self.nodes.iter().filter_map(|n| n.events.as_ref()) {
            let one = SyncEvent::Updates(vec![update(object, there)]);
            events.send(one).await.unwrap();
        }
    }

    async fn put(&mut self, object: Value) {
        self.tell(&object, true).await;
        self.objects.insert(name_of(&object), object);
    }

    async fn delete(&mut self, kind: &str, name: &str) {
        let key = format!("\"{kind}\"/\"{name}\"");
        let object = self.objects.remove(&key).unwrap();
        self.tell(&object, false).await;
    }

    fn at(&self, name: &str) -> &Node {
        self.nodes.iter().find(|n| n.name == name).unwrap()
    }
}

impl Node {
    async fn status(&self) -> BgpStatus {
        match self.speaker.ask(BgpRequest::Status).await.unwrap() {
            BgpResponse::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    async fn peer(&self, address: &str) -> PeerStatus {
        let status = self.status().await;
        let wanted: IpAddr = address.parse().unwrap();
        let found = status.peers.iter().find(|p| p.address == wanted);
        found.unwrap_or_else(|| panic!("{status:?}")).clone()
    }

    async fn routes(&self, peer: &str, direction: Direction) -> Vec<RouteStatus> {
        let peer = peer.parse().unwrap();
        let request = BgpRequest::PeerRoutes { peer, direction };
        match self.speaker.ask(request).await.unwrap() {
            BgpResponse::Routes(routes) => routes,
            other => panic!("{other:?}"),
        }
    }

    async fn explain(&self, of: &str) -> Explanation {
        let of = of.parse().unwrap();
        match self.speaker.ask(BgpRequest::Explain { of }).await.unwrap() {
            BgpResponse::Explanation(explanation) => explanation,
            other => panic!("{other:?}"),
        }
    }

    /// Prefixes in the table.
    async fn table(&self) -> BTreeSet<String> {
        let request = BgpRequest::Routes { within: None };
        match self.speaker.ask(request).await.unwrap() {
            BgpResponse::Routes(routes) => routes.iter().map(|r| r.prefix.to_string()).collect(),
            other => panic!("{other:?}"),
        }
    }

    /// Prefixes that the kernel's side has.
    fn programmed(&self) -> Vec<String> {
        let contents = self.sink.contents();
        contents.paths.keys().map(ToString::to_string).collect()
    }

    async fn wait<F: AsyncFn(&Self) -> bool>(&self, what: &str, condition: F) {
        for _ in 0..3000 {
            if condition(self).await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!(
            "{}: {what}\n{:#?}\n{:?}\n{:?}",
            self.name,
            self.status().await,
            self.table().await,
            self.programmed()
        );
    }

    async fn is_up(&self, address: &str) -> bool {
        let wanted: IpAddr = address.parse().unwrap();
        let peers = self.status().await.peers;
        peers
            .iter()
            .any(|p| p.address == wanted && p.state == SessionState::Established)
    }
}

fn node(n: u8, extra: Value) -> Value {
    let mut bgp = json!({"ipv4Address": format!("10.0.0.{n}/24")});
    for (field, value) in extra.as_object().unwrap() {
        bgp[field] = value.clone();
    }
    json!({"kind": "Node", "metadata": {"name": format!("node{n}"), "labels": {"name": format!("node{n}")}}, "spec": {"bgp": bgp}})
}

fn affinity(cidr: &str, node: &str) -> Value {
    json!({"kind": "BlockAffinity", "metadata": {"name": format!("{node}-{}", cidr.replace(['.', '/'], "-"))},
        "spec": {"cidr": cidr, "node": node, "state": "confirmed", "deleted": "false"}})
}

fn configuration(spec: Value) -> Value {
    json!({"kind": "BGPConfiguration", "metadata": {"name": "default"}, "spec": spec})
}

fn peer(name: &str, spec: Value) -> Value {
    json!({"kind": "BGPPeer", "metadata": {"name": name}, "spec": spec})
}

fn two_nodes() -> Vec<Value> {
    vec![
        node(1, json!({})),
        node(2, json!({})),
        json!({"kind": "IPPool", "metadata": {"name": "v4"}, "spec": {"cidr": "10.10.0.0/16"}}),
        affinity("10.10.1.0/26", "node1"),
        affinity("10.10.2.0/26", "node2"),
    ]
}

fn with(extra: &[Value]) -> Vec<Value> {
    let mut all = two_nodes();
    all.extend_from_slice(extra);
    all
}

async fn mesh_of_two(extra: &[Value]) -> Cluster {
    let mut cluster = Cluster::new(&with(extra));
    cluster.node(1).await;
    cluster.node(2).await;
    for (name, block) in [("node1", "10.10.2.0/26"), ("node2", "10.10.1.0/26")] {
        let node = cluster.at(name);
        node.wait("the other's block", async |n| {
            n.programmed().contains(&block.to_owned())
        })
        .await;
    }
    cluster
}

#[tokio::test(start_paused = true)]
async fn service_ranges_are_announced_but_never_programmed() {
    let services = json!({"serviceClusterIPs": [{"cidr": "10.96.0.0/12"}]});
    let mut cluster = mesh_of_two(&[configuration(services)]).await;
    let two = cluster.at("node2");
    let here = "10.96.0.0/12".to_owned();
    two.wait("the range from node1", async |n| {
        let got = n.routes("10.0.0.1", Direction::Received).await;
        got.iter().any(|r| r.prefix.to_string() == here)
    })
    .await;
    assert_eq!(two.programmed(), ["10.10.1.0/26"]);
    cluster.put(configuration(json!({}))).await;
    let two = cluster.at("node2");
    two.wait("withdrawal", async |n| !n.table().await.contains(&here))
        .await;
    assert_eq!(two.peer("10.0.0.1").await.established_count, 1);
}

#[tokio::test(start_paused = true)]
async fn a_new_service_range_takes_learned_routes_out_of_the_kernel_and_back() {
    let tor = peer("tor", json!({"peerIP": "10.0.0.9", "asNumber": 65009}));
    let mut cluster = Cluster::new(&with(&[tor]));
    cluster.node(1).await;
    cluster
        .router(
            "10.0.0.9",
            "as = 65009\n[[neighbor]]\naddress = \"10.0.0.1\"\nas = 64512\n[[announce]]\nprefix = \"192.0.2.0/25\"\n",
        )
        .await;
    let route = "192.0.2.0/25".to_owned();
    let programmed = async |n: &Node| n.programmed().contains(&route);
    cluster.at("node1").wait("the route", programmed).await;
    let range = json!({"serviceLoadBalancerIPs": [{"cidr": "192.0.2.0/24"}]});
    cluster.put(configuration(range)).await;
    let one = cluster.at("node1");
    one.wait("out of the kernel", async |n| {
        !n.programmed().contains(&route)
    })
    .await;
    let why = one.explain("192.0.2.1/32").await;
    assert_eq!(why.prefix.unwrap().to_string(), route);
    assert!(why.kernel.contains("service range"), "{why:?}");
    cluster.put(configuration(json!({}))).await;
    cluster.at("node1").wait("back", programmed).await;
}

#[tokio::test(start_paused = true)]
async fn reachable_by_puts_a_route_to_the_peer_into_the_kernel() {
    let far = json!({"peerIP": "10.9.9.9", "asNumber": 65009, "reachableBy": "10.0.0.254"});
    let mut cluster = mesh_of_two(&[peer("far", far)]).await;
    let one = cluster.at("node1");
    let path = one.sink.contents().paths[&"10.9.9.9/32".parse().unwrap()].clone();
    assert_eq!(path.gateways[0].addr.to_string(), "10.0.0.254");
    assert!(!cluster.at("node2").table().await.contains("10.9.9.9/32"));
    cluster.delete("BGPPeer", "far").await;
    let one = cluster.at("node1");
    one.wait("the route is gone", async |n| {
        !n.programmed().contains(&"10.9.9.9/32".to_owned())
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn borrowed_addresses_follow_the_kernel() {
    let cluster = mesh_of_two(&[]).await;
    let borrowed = DeviceRoute {
        prefix: "10.10.2.7/32".parse().unwrap(),
        interface: "cali1".into(),
        kind: DeviceRouteKind::Written,
        metric: 0,
    };
    let one = cluster.at("node1");
    one.devices.send(Arc::new([borrowed].into())).unwrap();
    let two = cluster.at("node2");
    let there = async |n: &Node| n.programmed().contains(&"10.10.2.7/32".to_owned());
    two.wait("the borrowed address", there).await;
    let paths = one.explain("10.10.2.7/32").await.paths;
    assert_eq!(paths[0].local.as_deref(), Some("workload on cali1"));
    one.devices.send(Devices::default()).unwrap();
    two.wait("withdrawal", async |n| !there(n).await).await;
}

#[tokio::test(start_paused = true)]
async fn a_filter_change_is_evaluated_without_a_reset_and_named_as_the_reason() {
    let reject = |prefix: &str| {
        json!({"kind": "BGPFilter", "metadata": {"name": "f"}, "spec": {
            "importV4": [{"cidr": prefix, "matchOperator": "In", "action": "Reject"}],
            "exportV4": [{"cidr": "10.10.2.0/24", "matchOperator": "In", "action": "Accept"}]}})
    };
    let tor = peer(
        "tor",
        json!({"peerIP": "10.0.0.9", "asNumber": 65009, "filters": ["f"]}),
    );
    let mut cluster = Cluster::new(&with(&[tor, reject("203.0.113.0/24")]));
    cluster.node(1).await;
    cluster
        .router(
            "10.0.0.9",
            "as = 65009\n[[neighbor]]\naddress = \"10.0.0.1\"\nas = 64512\n[[announce]]\nprefix = \"198.51.100.0/24\"\n",
        )
        .await;
    let route = "198.51.100.0/24".to_owned();
    let one = cluster.at("node1");
    one.wait("the route", async |n| n.programmed().contains(&route))
        .await;
    cluster.put(reject("198.51.100.0/24")).await;
    let one = cluster.at("node1");
    one.wait("refused", async |n| !n.programmed().contains(&route))
        .await;
    let seen = one.routes("10.0.0.9", Direction::Received).await;
    assert_eq!(
        seen[0].reason.as_deref(),
        Some("refused by BGPFilter f importV4[0]")
    );
    assert_eq!(one.routes("10.0.0.9", Direction::Accepted).await, []);
    let tor = one.peer("10.0.0.9").await;
    assert_eq!(
        (tor.established_count, tor.received, tor.accepted),
        (1, 1, 0)
    );
    assert!(tor.messages_out.refresh >= 1, "{tor:?}");
}

#[tokio::test(start_paused = true)]
async fn what_a_peer_is_not_told_has_a_reason() {
    let tor = peer(
        "tor",
        json!({"node": "node1", "peerIP": "10.0.0.9", "asNumber": 65009}),
    );
    let mut cluster = mesh_of_two(&[tor]).await;
    cluster
        .router(
            "10.0.0.9",
            "as = 65009\n[[neighbor]]\naddress = \"10.0.0.1\"\nas = 64512\n[[announce]]\nprefix = \"198.51.100.0/24\"\n",
        )
        .await;
    let one = cluster.at("node1");
    one.wait("the router", async |n| n.is_up("10.0.0.9").await)
        .await;
    one.wait("its route", async |n| {
        n.programmed().contains(&"198.51.100.0/24".to_owned())
    })
    .await;
    let reasons = |routes: Vec<RouteStatus>| -> BTreeMap<String, String> {
        let each = routes.into_iter();
        each.map(|r| (r.prefix.to_string(), r.reason.unwrap()))
            .collect()
    };
    let to_node2 = reasons(one.routes("10.0.0.2", Direction::Withheld).await);
    assert_eq!(to_node2["10.10.2.0/26"], "it came from this neighbor");
    assert!(to_node2["198.51.100.0/24"].contains("no export rule accepts it"));
    assert!(!to_node2.contains_key("10.10.1.0/26"), "{to_node2:?}");
    let all = one.explain("10.10.1.5/32").await;
    assert!(all.kernel.contains("starts here (block)"), "{all:?}");
    assert!(all.peers.iter().all(|p| p.withheld.is_none()), "{all:?}");
    assert_eq!(all.peers.len(), 2);
    let nothing = one.explain("8.8.8.8/32").await;
    assert_eq!((nothing.prefix, nothing.paths.len()), (None, 0));
}

#[tokio::test(start_paused = true)]
async fn the_losing_path_names_the_step_and_the_values() {
    let peers = [8, 9].map(|n| {
        let spec = json!({"peerIP": format!("10.0.0.{n}"), "asNumber": 65000 + n});
        peer(&format!("tor{n}"), spec)
    });
    let mut cluster = Cluster::new(&with(&peers));
    cluster.node(1).await;
    for n in [8, 9] {
        let file = format!(
            "as = 6500{n}\n[[neighbor]]\naddress = \"10.0.0.1\"\nas = 64512\n[[announce]]\nprefix = \"198.51.100.0/24\"\nmed = {n}\n"
        );
        cluster.router(&format!("10.0.0.{n}"), &file).await;
    }
    let one = cluster.at("node1");
    one.wait("both paths", async |n| {
        n.explain("198.51.100.0/24").await.paths.len() == 2
    })
    .await;
    let paths = one.explain("198.51.100.0/24").await.paths;
    assert!(paths[0].best && paths[1].multipath, "{paths:?}");
    let prefer = json!({"kind": "BGPFilter", "metadata": {"name": "prefer"}, "spec": {"importV4": [
        {"action": "Accept", "operations": [{"setPriority": {"value": 512}}]}]}});
    cluster.put(prefer).await;
    cluster
        .put(peer(
            "tor9",
            json!({"peerIP": "10.0.0.9", "asNumber": 65009, "filters": ["prefer"]}),
        ))
        .await;
    let one = cluster.at("node1");
    one.wait("the preferred one", async |n| {
        let paths = n.explain("198.51.100.0/24").await.paths;
        paths[0].peer == Some("10.0.0.9".parse().unwrap()) && !paths[1].multipath
    })
    .await;
    let paths = one.explain("198.51.100.0/24").await.paths;
    let reason = paths[1].reason.as_deref();
    assert_eq!(
        reason,
        Some("lower LOCAL_PREF: 100 against 2147483135"),
        "{paths:?}"
    );
}

fn write_secret(folder: &Path, text: &str) {
    std::fs::create_dir_all(folder.join("bgp")).unwrap();
    std::fs::write(folder.join("bgp/mesh"), text).unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_its_password_a_session_stays_down_and_says_so_until_it_is_there() {
    let secret = json!({"nodeMeshPassword": {"secretKeyRef": {"name": "bgp", "key": "mesh"}}});
    let mut cluster = Cluster::new(&with(&[configuration(secret)]));
    cluster.node(1).await;
    cluster.node(2).await;
    let one = cluster.at("node1");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let seen = one.peer("10.0.0.2").await;
    assert_eq!(
        (seen.state, seen.messages_out.open),
        (SessionState::Idle, 0)
    );
    assert_eq!(
        seen.info.as_deref(),
        Some("no password: secret \"bgp\" has no key \"mesh\"")
    );
    write_secret(cluster.secrets.path(), "s3cret\n");
    one.wait("the session", async |n| n.is_up("10.0.0.2").await)
        .await;
    assert!(one.peer("10.0.0.2").await.password);
}

#[tokio::test(start_paused = true)]
async fn a_change_touches_only_the_peers_it_concerns() {
    let mut cluster = mesh_of_two(&[]).await;
    cluster
        .router(
            "10.0.0.9",
            "as = 65009\n[[neighbor]]\naddress = \"10.0.0.1\"\nas = 64512\n",
        )
        .await;
    cluster
        .put(peer(
            "tor",
            json!({"node": "node1", "peerIP": "10.0.0.9", "asNumber": 65009}),
        ))
        .await;
    let one = cluster.at("node1");
    one.wait("the router", async |n| n.is_up("10.0.0.9").await)
        .await;
    let before = one.status().await.configured_at;
    // Somebody else's pod, and a node's label: nothing that BGP depends on.
    let pod = json!({"kind": "WorkloadEndpoint", "metadata": {"name": "node2-k8s-a-eth0", "namespace": "shop"},
        "spec": {"node": "node2", "orchestrator": "k8s", "pod": "a", "endpoint": "eth0", "ipNetworks": ["10.10.2.5/32"]}});
    cluster.put(pod).await;
    cluster
        .put(peer("tor", json!({"node": "node1", "peerIP": "10.0.0.9", "asNumber": 65009, "keepaliveTime": "10s"})))
        .await;
    let one = cluster.at("node1");
    one.wait("a new session with the router", async |n| {
        let tor = n.peer("10.0.0.9").await;
        tor.established_count == 2 && tor.state == SessionState::Established
    })
    .await;
    assert_eq!(one.peer("10.0.0.2").await.established_count, 1);
    assert!(one.status().await.configured_at >= before);
    let down = one.peer("10.0.0.9").await.last_down.unwrap().what;
    assert!(down.contains("configuration change"), "{down}");
}

#[tokio::test(start_paused = true)]
async fn nodes_peer_across_a_local_as_number_by_one_bgppeer() {
    let off = configuration(json!({"nodeToNodeMeshEnabled": false}));
    let one_way = peer(
        "p",
        json!({"node": "node1", "peerSelector": "name == 'node2'", "localASNumber": 65077}),
    );
    let mut cluster = Cluster::new(&with(&[off, one_way]));
    cluster.node(1).await;
    cluster.node(2).await;
    let two = cluster.at("node2");
    two.wait("the session", async |n| n.is_up("10.0.0.1").await)
        .await;
    let seen = two.peer("10.0.0.1").await;
    assert_eq!((seen.remote_as.0, seen.local_as.0), (65077, 64512));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_message_is_shown_to_the_other_side() {
    let cluster = mesh_of_two(&[]).await;
    let message = Some("kernel upgrade, back at 14:00".to_owned());
    let one = &cluster.at("node1").speaker;
    one.ask(BgpRequest::Drain { message }).await.unwrap();
    let two = cluster.at("node2");
    two.wait("the session is down", async |n| !n.is_up("10.0.0.1").await)
        .await;
    let seen = two.peer("10.0.0.1").await;
    let text = "received cease: administrative shutdown (6/2): \"kernel upgrade, back at 14:00\"";
    assert_eq!(seen.last_down.unwrap().what, text);
    assert_eq!(seen.messages_in.notification, 1);
}

#[tokio::test(start_paused = true)]
async fn service_addresses_follow_their_endpoints() {
    let services = json!({"serviceClusterIPs": [{"cidr": "10.96.0.0/12"}]});
    let mut cluster = mesh_of_two(&[configuration(services)]).await;
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.1.1", "clusterIPs": ["10.96.1.1"], "externalTrafficPolicy": "Local"}});
    let slice = |node: &str| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "endpoints": [{"addresses": ["10.10.1.5"], "nodeName": node}]})
    };
    cluster.put(service).await;
    cluster.put(slice("node1")).await;
    let from = async |n: &Node, peer: &str| {
        let got = n.routes(peer, Direction::Received).await;
        got.iter().any(|r| r.prefix.to_string() == "10.96.1.1/32")
    };
    let two = cluster.at("node2");
    two.wait("node1 has the endpoint", async |n| {
        from(n, "10.0.0.1").await
    })
    .await;
    cluster.put(slice("node2")).await;
    let one = cluster.at("node1");
    one.wait("node2 has it", async |n| from(n, "10.0.0.2").await)
        .await;
    let two = cluster.at("node2");
    two.wait("node1 has none", async |n| !from(n, "10.0.0.1").await)
        .await;
}
