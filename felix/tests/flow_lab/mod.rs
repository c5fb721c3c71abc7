//! A host whose dataplane runs, its pods, and long-lived flows between them.

#![allow(dead_code, reason = "each test file uses its part of the lab")]
#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, NodeName, Revision};
use cali_netlink::conntrack::{Conntrack, Flow};
use cali_netlink::testing::TestNs;
pub(crate) use cali_netlink::testing::run;
use felix::dataplane::{Config, Dataplane, Handle, State, StatusSink};
use tokio::sync::mpsc;
use typha::interest::Asker;

/// For everything that has no promise about time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// How long a read waits for what must come; only a failing test waits so long. A packet that is not dropped is answered at once; on
/// a machine that does other things, somewhat later.
pub(crate) const ANSWER: Duration = Duration::from_secs(20);

/// Sets the flags when the value goes, also after a panic: threads must end.
pub(crate) struct SetAtEnd<'a>(pub(crate) [&'a AtomicBool; 2]);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        for flag in self.0 {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

struct Quiet;

impl StatusSink for Quiet {
    fn on_state(&mut self, _: &Arc<State>) {}
}

/// How long a read waits where nothing may come.
pub(crate) const SILENCE: Duration = Duration::from_millis(20);

/// A host with pods, and the channel that stands for the datastore.
pub(crate) struct Host {
    pub(crate) ns: TestNs,
    pub(crate) pods: Vec<TestNs>,
    pub(crate) updates: mpsc::Sender<SyncEvent>,
    dataplane: Option<Dataplane>,
}

pub(crate) fn set(json: &str) -> Update {
    let value =
        AnyResource::from_slice(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"));
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from("1"),
    }
}

pub(crate) fn gone(json: &str) -> Update {
    Update {
        value: None,
        ..set(json)
    }
}

/// The address of a pod, from 1.
pub(crate) fn address(pod: u8) -> IpAddr {
    Ipv4Addr::new(192, 168, 1, pod).into()
}

/// A pod's endpoint, with the address of pod `address`.
pub(crate) fn pod(number: u8, address: u8) -> String {
    format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"WorkloadEndpoint",
            "metadata":{{"name":"node1-k8s-pod{number}-eth0","namespace":"default","labels":{{"pod":"{number}"}}}},
            "spec":{{"orchestrator":"k8s","node":"node1","pod":"pod{number}","endpoint":"eth0",
            "interfaceName":"cali{number}","ipNetworks":["192.168.1.{address}/32"],"profiles":["open"]}}}}"#
    )
}

/// A policy for the pod that denies what comes in.
pub(crate) fn closed(number: u8) -> String {
    format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{{"name":"closed{number}"}},
            "spec":{{"selector":"pod == '{number}'","types":["Ingress"],"ingress":[{{"action":"Deny"}}]}}}}"#
    )
}

impl Host {
    /// A host with so many pods, and nothing enforced yet.
    pub(crate) async fn new(label: &str, pods: u8) -> Self {
        let ns = TestNs::new(label);
        ns.run("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
        let pods: Vec<TestNs> = (0..pods).map(|_| TestNs::new(label)).collect();
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
            dataplane: Some(dataplane),
        }
    }

    fn start(ns: &TestNs) -> (mpsc::Sender<SyncEvent>, Dataplane) {
        let (updates, stream) = mpsc::channel(64);
        let config = Config::new(NodeName::from("node1"));
        let dataplane =
            Dataplane::start(config, ns.netlink().clone(), stream, Box::new(Quiet)).unwrap();
        (updates, dataplane)
    }

    /// Starts a dataplane on another stream of changes, which it asks for endpoints.
    pub(crate) fn follow(&mut self, stream: mpsc::Receiver<SyncEvent>, interest: Asker) {
        self.stop();
        let config = Config {
            interest: Some(interest),
            ..Config::new(NodeName::from("node1"))
        };
        let netlink = self.ns.netlink().clone();
        let dataplane = Dataplane::start(config, netlink, stream, Box::new(Quiet)).unwrap();
        self.dataplane = Some(dataplane);
    }

    /// Ends the dataplane; the kernel goes on.
    pub(crate) fn stop(&mut self) {
        self.dataplane = None;
    }

    /// Starts a dataplane that knows nothing.
    pub(crate) fn restart(&mut self) {
        self.stop();
        let (updates, dataplane) = Self::start(&self.ns);
        (self.updates, self.dataplane) = (updates, Some(dataplane));
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.dataplane
            .as_ref()
            .expect("a running dataplane")
            .handle()
    }

    /// The settings that choose a backend.
    pub(crate) fn backend(mode: &str, iptables: &str) -> Update {
        set(&format!(
            r#"{{"apiVersion":"projectcalico.org/v3","kind":"FelixConfiguration","metadata":{{"name":"default"}},
                "spec":{{"nftablesMode":"{mode}","iptablesBackend":"{iptables}"}}}}"#
        ))
    }

    /// What every test needs: the default tier, an open profile, and all pods.
    pub(crate) fn everything(&self) -> Vec<Update> {
        let mut all: Vec<Update> = [
            r#"{"apiVersion":"projectcalico.org/v3","kind":"Tier","metadata":{"name":"default"},"spec":{"order":1000000}}"#,
            r#"{"apiVersion":"projectcalico.org/v3","kind":"Profile","metadata":{"name":"open"},
                "spec":{"ingress":[{"action":"Allow"}],"egress":[{"action":"Allow"}]}}"#,
        ]
        .map(set)
        .into();
        all.extend(
            (1..)
                .zip(&self.pods)
                .map(|(number, _)| set(&pod(number, number))),
        );
        all
    }

    pub(crate) async fn send(&self, updates: Vec<Update>) {
        self.updates
            .send(SyncEvent::Updates(updates))
            .await
            .unwrap();
    }

    pub(crate) async fn in_sync(&self, updates: Vec<Update>) {
        self.send(updates).await;
        self.updates
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        let mut state = self.handle().state();
        let ready = state.wait_for(|state| {
            state.ready
                && state
                    .endpoints
                    .values()
                    .all(|endpoint| endpoint.is_programmed())
        });
        let waited = tokio::time::timeout(PATIENCE, ready).await.is_ok();
        assert!(
            waited,
            "{:#?}\n{}",
            self.handle().state().borrow(),
            self.rules()
        );
    }

    /// Waits until everything that was sent before is in the kernel, flows included.
    pub(crate) async fn settled(&self) {
        while self.updates.capacity() < self.updates.max_capacity() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // An announcement is answered after the step that takes it in, and with it what came before.
        let key = set(&pod(99, 99)).key;
        self.handle().announce(key, None).await.unwrap();
    }

    pub(crate) fn rules(&self) -> String {
        let nft = ["-s", "list", "table", "inet", "calico"].as_slice();
        [
            ("nft", nft),
            ("iptables-nft-save", &[]),
            ("iptables-legacy-save", &[]),
            ("ipset", &["save"]),
        ]
        .map(|(program, args)| {
            let output = self.ns.output(program, args);
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
        .concat()
    }

    pub(crate) fn conntrack(&self) -> Vec<Flow> {
        Conntrack::open(self.ns.netns()).unwrap().dump().unwrap()
    }

    /// Whether anything of a flow is held.
    pub(crate) fn holds_something(&self) -> bool {
        let table = ["-s", "list", "table", "inet", "calico"];
        let table = self.ns.output("nft", &table).stdout;
        let sets = self.ns.output("ipset", &["save"]).stdout;
        String::from_utf8_lossy(&table).contains("held")
            || String::from_utf8_lossy(&sets).contains("add cali40held")
    }

    /// Flows of an address in connection tracking.
    pub(crate) fn flows_of(&self, address: IpAddr) -> Vec<Flow> {
        let all = self.conntrack().into_iter();
        all.filter(|flow| flow.involves(address)).collect()
    }

    /// Waits until connection tracking has no flow between two pods.
    pub(crate) async fn ended(&self, one: u8, other: u8) {
        self.until("the end of the flow", || {
            let flows = self.flows_of(address(one));
            !flows.iter().any(|flow| flow.involves(address(other)))
        })
        .await;
    }

    pub(crate) async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: not within {PATIENCE:?}\n{}\n{:#?}",
                self.rules(),
                self.conntrack()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn key(number: u8) -> Key {
        set(&pod(number, number)).key
    }

    /// A TCP connection from one pod to another.
    pub(crate) fn tcp(&self, client: u8, server: u8, port: u16) -> TcpFlow {
        let to = SocketAddr::new(address(server), port);
        let listener = self.inside(server, || TcpListener::bind(to));
        let client = self.inside(client, || TcpStream::connect_timeout(&to, ANSWER));
        let (server, _) = listener.accept().unwrap();
        TcpFlow { client, server }
    }

    /// A UDP exchange from one pod to another.
    pub(crate) fn udp(&self, client: u8, server: u8, port: u16) -> UdpFlow {
        let source_port = port + 1000 * u16::from(server);
        let server = self.inside(server, || {
            UdpSocket::bind(SocketAddr::new(address(server), port))
        });
        let client = self.inside(client, || {
            UdpSocket::bind(SocketAddr::new(address(client), source_port))
        });
        client.connect(server.local_addr().unwrap()).unwrap();
        let peer = client.local_addr().unwrap();
        server.connect(peer).unwrap();
        UdpFlow { client, server }
    }

    /// A socket of a pod that waits for datagrams, a moment at a time.
    pub(crate) fn listens(&self, pod: u8, port: u16) -> UdpSocket {
        let socket = self.inside(pod, || UdpSocket::bind(SocketAddr::new(address(pod), port)));
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .expect("a time limit");
        socket
    }

    pub(crate) fn inside<T>(&self, pod: u8, run: impl FnOnce() -> std::io::Result<T> + Send) -> T
    where
        T: Send,
    {
        let ns = &self.pods[usize::from(pod) - 1];
        ns.netns().run(run).unwrap().unwrap()
    }
}

/// Both ends of a flow talk, and so do the ends of a flow that is allowed: only these hear each other.
pub(crate) fn is_cut(flow: &mut impl Conversation, control: &mut impl Conversation) {
    for _ in 0..15 {
        flow.say(true, b'!');
        flow.say(false, b'!');
        control.goes_on();
        for at_client in [true, false] {
            let heard = flow.hear(at_client, SILENCE);
            assert!(
                heard.is_empty(),
                "heard {heard:?}, at the client: {at_client}"
            );
        }
    }
}

/// Both ends of a flow, each of which can say something that the other should hear.
pub(crate) trait Conversation {
    fn say(&mut self, by_client: bool, word: u8);
    /// What the end has heard; waits up to `limit` for the first word.
    fn hear(&mut self, at_client: bool, limit: Duration) -> Vec<u8>;

    /// Both ends hear each other.
    fn goes_on(&mut self) {
        for by_client in [true, false] {
            let word = if by_client { b'c' } else { b's' };
            self.say(by_client, word);
            let heard = self.hear(!by_client, ANSWER);
            assert!(heard.contains(&word), "said {word}, heard {heard:?}");
        }
    }
}

pub(crate) struct TcpFlow {
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
}

impl Conversation for TcpFlow {
    fn say(&mut self, by_client: bool, word: u8) {
        let stream = if by_client {
            &mut self.client
        } else {
            &mut self.server
        };
        stream.write_all(&[word]).unwrap();
    }

    fn hear(&mut self, at_client: bool, limit: Duration) -> Vec<u8> {
        let stream = if at_client {
            &mut self.client
        } else {
            &mut self.server
        };
        stream.set_read_timeout(Some(limit)).unwrap();
        read(|data| stream.read(data))
    }
}

pub(crate) struct UdpFlow {
    pub(crate) client: UdpSocket,
    pub(crate) server: UdpSocket,
}

impl Conversation for UdpFlow {
    fn say(&mut self, by_client: bool, word: u8) {
        let socket = if by_client {
            &self.client
        } else {
            &self.server
        };
        socket.send(&[word]).unwrap();
    }

    fn hear(&mut self, at_client: bool, limit: Duration) -> Vec<u8> {
        let socket = if at_client {
            &self.client
        } else {
            &self.server
        };
        socket.set_read_timeout(Some(limit)).unwrap();
        read(|data| socket.recv(data))
    }
}

fn read(mut receive: impl FnMut(&mut [u8]) -> std::io::Result<usize>) -> Vec<u8> {
    let mut data = [0; 256];
    match receive(&mut data) {
        Ok(len) => data[..len].to_vec(),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            Vec::new()
        }
        Err(error) => panic!("{error}"),
    }
}
