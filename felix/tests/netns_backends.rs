//! The backend is switched under running traffic: nothing that is denied gets through, nothing that is allowed is lost.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

mod policy_lab;

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cali_api::NodeName;
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_netlink::NetNs;
use cali_netlink::testing::run;
use felix::dataplane::{Config, Dataplane};
use nix::sys::socket::{setsockopt, sockopt};
use policy_lab::{Lab, Quiet, set};
use serde_json::json;
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(20);
const ALLOWED: u16 = 4000;
const DENIED: u16 = 4001;

fn settings(mode: &str, backend: &str) -> Update {
    set(
        json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"},
               "spec": {"nftablesMode": mode, "iptablesBackend": backend}}),
    )
}

fn policy(ports: &[u16]) -> Update {
    set(
        json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy", "metadata": {"name": "p"},
               "spec": {"selector": "pod == 'calipod2'", "types": ["Ingress"],
                        "ingress": [{"action": "Allow", "protocol": "UDP", "source": {"selector": "pod == 'calipod1'"},
                                     "destination": {"ports": ports}}]}}),
    )
}

fn objects(lab: &Lab) -> Vec<Update> {
    let mut all = vec![
        set(
            json!({"apiVersion": "projectcalico.org/v3", "kind": "Profile", "metadata": {"name": "open"},
                   "spec": {"ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}}),
        ),
        policy(&[ALLOWED]),
        settings("Auto", "Auto"),
    ];
    for place in &lab.pods {
        all.push(set(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
            "metadata": {"namespace": "default", "name": format!("node-k8s-{}-eth0", place.interface),
                         "labels": {"pod": place.interface}},
            "spec": {"node": "node", "orchestrator": "k8s", "pod": place.interface, "endpoint": "eth0",
                     "interfaceName": place.interface, "profiles": ["open"],
                     "ipNetworks": [format!("{}/32", place.v4), format!("{}/128", place.v6)]},
        })));
    }
    all
}

/// Datagrams of which each is a flow of its own, over both families. Each carries its number: its place in `sent`.
struct Stream {
    sent: Mutex<Vec<Instant>>,
    received: Mutex<BTreeSet<usize>>,
}

impl Stream {
    const fn new() -> Self {
        Self {
            sent: Mutex::new(Vec::new()),
            received: Mutex::new(BTreeSet::new()),
        }
    }

    fn send(&self, from: &NetNs, to: [SocketAddr; 2], done: &AtomicBool) {
        while !done.load(Ordering::Relaxed) {
            for to in to {
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = from.run(|| UdpSocket::bind(any)).unwrap().unwrap();
                let mut sent = self.sent.lock().unwrap();
                let number = sent.len().to_be_bytes();
                if socket.send_to(&number, to).is_ok() {
                    sent.push(Instant::now());
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn receive(&self, socket: &UdpSocket, done: &AtomicBool) {
        let mut data = [0; 8];
        loop {
            match socket.recv_from(&mut data) {
                Ok(_) => {
                    let number = usize::from_be_bytes(data);
                    self.received.lock().unwrap().insert(number);
                }
                // Nothing more has come for as long as the limit.
                Err(_) if done.load(Ordering::Relaxed) => return,
                Err(_) => {}
            }
        }
    }

    fn counts(&self) -> (usize, usize) {
        let received = self.received.lock().unwrap();
        (self.sent.lock().unwrap().len(), received.len())
    }

    /// The numbers of those that did not come, with the time they were sent, after `start`.
    fn lost(&self, start: Instant) -> Vec<(usize, Duration)> {
        let received = self.received.lock().unwrap();
        let sent = self.sent.lock().unwrap();
        let all = sent.iter().enumerate();
        all.filter(|(number, _)| !received.contains(number))
            .map(|(number, at)| (number, at.saturating_duration_since(start)))
            .collect()
    }
}

/// What of ours stands in the kernel.
fn standing(lab: &Lab) -> Vec<&'static str> {
    let mut all = Vec::new();
    if lab
        .node
        .run("nft", &["list", "tables"])
        .contains("inet calico")
    {
        all.push("nftables");
    }
    for (name, programs) in [
        ("nft", ["iptables-nft-save", "ip6tables-nft-save"]),
        ("legacy", ["iptables-legacy-save", "ip6tables-legacy-save"]),
    ] {
        let text = programs.map(|program| lab.node.run(program, &[])).concat();
        if text.contains("cali") {
            all.push(name);
        }
    }
    if lab.node.run("ipset", &["list", "-name"]).contains("cali") {
        all.push("sets");
    }
    all
}

async fn until_standing(lab: &Lab, dataplane: &Dataplane, expected: &[&str]) {
    let start = Instant::now();
    loop {
        let seen = standing(lab);
        if seen == expected {
            return;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{seen:?} instead of {expected:?}: {:#?}",
            dataplane.handle().state().borrow()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn send(updates: &mpsc::Sender<SyncEvent>, all: Vec<Update>) {
    updates.send(SyncEvent::Updates(all)).await.unwrap();
}

/// The lab leads to its pods by routes of its own, which are not the dataplane's to take over.
fn lab(pods: u8) -> Lab {
    let lab = Lab::new(pods);
    for place in &lab.pods {
        for address in [place.address(true), place.address(false)] {
            lab.node
                .ip(&format!("route del {address} dev {}", place.interface));
        }
    }
    lab
}

fn start(lab: &Lab) -> (Dataplane, mpsc::Sender<SyncEvent>) {
    let (updates, stream) = mpsc::channel(16);
    let config = Config::new(NodeName::from("node"));
    let netlink = lab.node.netlink().clone();
    let dataplane = Dataplane::start(config, netlink, stream, Box::new(Quiet)).unwrap();
    (dataplane, updates)
}

#[test]
fn switching_the_backend_leaks_nothing_and_loses_nothing() {
    run(async {
        let lab = lab(2);
        let (dataplane, updates) = start(&lab);
        send(&updates, objects(&lab)).await;
        updates
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        until_standing(&lab, &dataplane, &["nftables"]).await;
        for update in objects(&lab)
            .iter()
            .filter(|update| update.key.kind == cali_api::Kind::WorkloadEndpoint)
        {
            dataplane
                .handle()
                .programmed(&update.key, PATIENCE)
                .await
                .unwrap();
        }

        let (allowed, denied) = (Stream::new(), Stream::new());
        let (sending, receiving) = (AtomicBool::new(false), AtomicBool::new(false));
        let [from, to] = &lab.pods[..] else {
            panic!("two pods")
        };
        let ends = |port| [true, false].map(|v4| SocketAddr::new(to.address(v4), port));
        let sockets = [ALLOWED, DENIED].map(|port| {
            let bind = || UdpSocket::bind(("::", port));
            let socket = to.ns.netns().run(bind).unwrap().unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(500)))
                .unwrap();
            // A receiver that does not get the processor for a while is no loss of ours.
            setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
            socket
        });
        let start = Instant::now();
        let steps = std::thread::scope(|scope| {
            let netns = from.ns.netns();
            for (stream, socket, port) in [
                (&allowed, &sockets[0], ALLOWED),
                (&denied, &sockets[1], DENIED),
            ] {
                let (sending, receiving) = (&sending, &receiving);
                scope.spawn(move || stream.receive(socket, receiving));
                scope.spawn(move || stream.send(netns, ends(port), sending));
            }
            let switches = async {
                let mut steps = Vec::new();
                for _ in 0..2 {
                    for (mode, backend, standing) in [
                        ("Disabled", "NFT", &["nft", "sets"][..]),
                        ("Disabled", "Legacy", &["legacy", "sets"]),
                        ("Enabled", "Auto", &["nftables"]),
                        ("Disabled", "Legacy", &["legacy", "sets"]),
                        ("Auto", "NFT", &["nftables"]),
                    ] {
                        steps.push((start.elapsed(), standing));
                        send(&updates, vec![settings(mode, backend)]).await;
                        until_standing(&lab, &dataplane, standing).await;
                    }
                }
                steps
            };
            // On a thread of its own: the scope's end waits for the others.
            let switched = tokio::task::block_in_place(|| {
                let runtime = tokio::runtime::Handle::current();
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    runtime.block_on(switches)
                }))
            });
            sending.store(true, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(200));
            receiving.store(true, Ordering::Relaxed);
            switched.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let (counts_allowed, counts_denied) = (allowed.counts(), denied.counts());
        println!("allowed: {counts_allowed:?}, denied: {counts_denied:?} (sent, received)");
        assert!(counts_allowed.0 > 100 && counts_denied.0 > 100);
        assert_eq!(
            counts_allowed.0,
            counts_allowed.1,
            "allowed datagrams were lost: {:?}; the steps: {steps:?}; sockets of the receiver: {}{}",
            allowed.lost(start),
            to.ns.run("cat", &["/proc/net/udp"]),
            to.ns.run("cat", &["/proc/net/udp6"]),
        );
        assert_eq!(counts_denied.1, 0, "denied datagrams came through");
    });
}

#[test]
fn what_an_earlier_run_left_of_another_backend_goes_once_policy_stands() {
    run(async {
        let lab = lab(1);
        for (mode, backend, expected) in [
            ("Enabled", "Auto", &["nftables"][..]),
            ("Disabled", "Legacy", &["legacy", "sets"]),
            ("Disabled", "NFT", &["nft", "sets"]),
            ("Auto", "Auto", &["nftables"]),
        ] {
            let (dataplane, updates) = start(&lab);
            let mut all = objects(&lab);
            all.push(settings(mode, backend));
            send(&updates, all).await;
            updates
                .send(SyncEvent::Status(SyncStatus::InSync))
                .await
                .unwrap();
            until_standing(&lab, &dataplane, expected).await;
        }
    });
}
