//! Host endpoints over time, with real connections of the host, on each backend: what the node lives by stays open whatever
//! policy says, and what else policy forbids ends.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

mod policy_lab;

use cali_netlink::testing::run;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use cali_api::NodeName;
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_netlink::NetNs;
use felix::dataplane::{Config, Dataplane, State};
use policy_lab::{Lab, Quiet, set};
use serde_json::{Value, json};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing is waited for where nothing may come.
const SILENCE: Duration = Duration::from_millis(300);
const HOST: &str = "192.0.2.1";
const WORLD: &str = "192.0.2.2";
/// Another address of the world.
const STRANGER: &str = "192.0.2.3";
const BACKENDS: [(&str, &str); 3] = [
    ("Auto", "Auto"),
    ("Disabled", "NFT"),
    ("Disabled", "Legacy"),
];

fn policy(ingress: &Value) -> Update {
    set(
        json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy", "metadata": {"name": "p"},
               "spec": {"selector": "role == 'edge'", "types": ["Ingress", "Egress"], "ingress": ingress, "egress": []}}),
    )
}

/// A connection that stands.
struct Session {
    client: TcpStream,
    server: TcpStream,
}

impl Session {
    fn open(from: &NetNs, source: &str, to: &TcpListener) -> Option<Self> {
        let at = to.local_addr().unwrap();
        let source: SocketAddr = format!("{source}:0").parse().unwrap();
        let connect = || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&source.into())?;
            socket.connect_timeout(&at.into(), Duration::from_secs(2))?;
            Ok::<TcpStream, std::io::Error>(socket.into())
        };
        let client = from.run(connect).unwrap().ok()?;
        let (server, _) = to.accept().unwrap();
        Some(Self { client, server })
    }

    /// Whether both ends hear each other.
    fn goes_on(&mut self, limit: Duration) -> bool {
        let (client, server) = (&mut self.client, &mut self.server);
        talk(client, server, limit) && talk(server, client, limit)
    }
}

fn talk(from: &mut TcpStream, to: &mut TcpStream, limit: Duration) -> bool {
    from.write_all(b"x").unwrap();
    to.set_read_timeout(Some(limit)).unwrap();
    matches!(to.read(&mut [0; 64]), Ok(1..))
}

fn listen(ns: &NetNs, at: &str) -> TcpListener {
    ns.run(|| TcpListener::bind(at)).unwrap().unwrap()
}

async fn until(dataplane: &Dataplane, what: &str, condition: impl Fn(&State) -> bool) {
    let start = Instant::now();
    loop {
        let state = dataplane.handle().state().borrow().clone();
        if condition(&state) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: {state:#?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until what was sent is in the kernel.
async fn settled(dataplane: &Dataplane, updates: &mpsc::Sender<SyncEvent>) {
    while updates.capacity() < updates.max_capacity() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let nobody = set(
        json!({"apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
        "metadata": {"namespace": "default", "name": "nobody"},
        "spec": {"node": "node", "orchestrator": "k8s", "endpoint": "eth0", "interfaceName": "nobody", "ipNetworks": []}}),
    );
    dataplane.handle().announce(nobody.key, None).await.unwrap();
}

#[test]
fn a_policy_of_the_host_does_not_cut_what_the_node_lives_by_and_ends_what_else_it_forbids() {
    run(async {
        for (mode, iptables) in BACKENDS {
            let lab = Lab::new(1);
            lab.world.ns.ip(&format!("addr add {STRANGER}/24 dev eth0"));
            let (node, world) = (lab.node.netns(), lab.world.ns.netns());
            let ssh = listen(node, &format!("{HOST}:22"));
            let other = listen(node, &format!("{HOST}:8080"));
            let typha = listen(world, &format!("{WORLD}:5473"));
            let (updates, stream) = mpsc::channel(16);
            let config = Config::new(NodeName::from("node"));
            let netlink = lab.node.netlink().clone();
            let dataplane = Dataplane::start(config, netlink, stream, Box::new(Quiet)).unwrap();
            let configuration = set(
                json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration",
                "metadata": {"name": "default"},
                "spec": {"nftablesMode": mode, "iptablesBackend": iptables,
                         "failsafeInboundHostPorts": [], "failsafeOutboundHostPorts": []}}),
            );
            updates
                .send(SyncEvent::Updates(vec![configuration]))
                .await
                .unwrap();
            updates
                .send(SyncEvent::Status(SyncStatus::InSync))
                .await
                .unwrap();
            until(&dataplane, "ready", |state| state.ready).await;

            let mut administrator = Session::open(world, WORLD, &ssh).unwrap();
            let mut visitor = Session::open(world, WORLD, &other).unwrap();
            let mut source = Session::open(node, HOST, &typha).unwrap();
            assert!(visitor.goes_on(PATIENCE) && source.goes_on(PATIENCE));

            // A host endpoint without any policy denies everything.
            let endpoint = |interface: &str| {
                set(
                    json!({"apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
                    "metadata": {"name": interface, "labels": {"role": "edge"}},
                    "spec": {"node": "node", "interfaceName": interface}}),
                )
            };
            let both = ["eth0", "eth1"].map(endpoint).into();
            updates.send(SyncEvent::Updates(both)).await.unwrap();
            settled(&dataplane, &updates).await;
            let said = |words: &'static str| {
                move |state: &State| state.notices.iter().any(|notice| notice.contains(words))
            };
            until(&dataplane, "a word", said("SSH from everybody")).await;
            until(&dataplane, "a word", said("Typha to 192.0.2.2")).await;
            assert!(
                administrator.goes_on(PATIENCE),
                "{mode} {iptables}: the open session"
            );
            assert!(source.goes_on(PATIENCE), "{mode} {iptables}: Typha");
            assert!(
                Session::open(world, STRANGER, &ssh).is_some(),
                "{mode} {iptables}: a new session"
            );
            // Established flows are looked at a little later.
            let start = Instant::now();
            while visitor.goes_on(SILENCE) {
                assert!(
                    start.elapsed() < PATIENCE,
                    "{mode} {iptables}: what policy forbids goes on"
                );
            }
            assert!(
                Session::open(world, WORLD, &other).is_none(),
                "{mode} {iptables}: the rest is closed"
            );

            // A policy that lets others in by SSH leaves the open session, and shuts out strangers.
            let others = json!([{"action": "Allow", "protocol": "TCP", "source": {"nets": ["10.8.0.0/24"]},
                                 "destination": {"ports": [22]}}]);
            updates
                .send(SyncEvent::Updates(vec![policy(&others)]))
                .await
                .unwrap();
            settled(&dataplane, &updates).await;
            until(&dataplane, "silence about everybody", |state| {
                !said("SSH from everybody")(state) && said("SSH from 192.0.2.2")(state)
            })
            .await;
            assert!(
                administrator.goes_on(PATIENCE),
                "{mode} {iptables}: the open session"
            );
            assert!(
                Session::open(world, STRANGER, &ssh).is_none(),
                "{mode} {iptables}: a stranger"
            );

            // One that allows the administrator is left alone.
            let all = json!([{"action": "Allow", "protocol": "TCP", "source": {"nets": [format!("{WORLD}/32")]},
                              "destination": {"ports": [22]}}]);
            updates
                .send(SyncEvent::Updates(vec![policy(&all)]))
                .await
                .unwrap();
            settled(&dataplane, &updates).await;
            until(&dataplane, "silence about SSH", |state| !said("SSH")(state)).await;
            assert!(
                administrator.goes_on(PATIENCE),
                "{mode} {iptables}: the open session"
            );
        }
    });
}
