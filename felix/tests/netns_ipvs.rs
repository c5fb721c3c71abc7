//! kube-proxy in IPVS mode: the output hook, with packets as IPVS sends them through it.
//!
//! IPVS itself is not needed for that: what it sends is a packet of a foreign source address in the output hook, and a socket
//! of the host may send the same. The virtual machine has IPVS.

mod flow_lab;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use cali_api::update::Update;
use flow_lab::{ANSWER, Host, SILENCE, SetAtEnd, address, closed, gone, pod, run, set};
use socket2::{Domain, Socket, Type};

const PORT: u16 = 8000;
const OWN: &str = "10.1.0.1";
/// Behind the host's uplink.
const CLIENT: &str = "10.1.0.9";
const OUTSIDE: &str = "10.1.0.254";
/// The seventh bit of the mask: came in by an interface. The eighth: from a workload.
const ARRIVED: u32 = 0x40_0000;
const FROM_WORKLOAD: u32 = 0xc0_0000;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A policy for the pod that lets it reach only this address.
fn reaches_only(number: u8, net: &str) -> String {
    format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{{"name":"only{number}"}},
            "spec":{{"selector":"pod == '{number}'","types":["Egress"],
            "egress":[{{"action":"Allow","destination":{{"nets":["{net}"]}}}}]}}}}"#
    )
}

fn has_chain(host: &Host, name: &str) -> bool {
    let listed = host
        .ns
        .output("nft", &["list", "chain", "inet", "calico", name]);
    listed.status.success()
}

async fn ipvs_comes(host: &Host) {
    host.ns.ip("link add kube-ipvs0 type bridge");
    host.until("the chains behind IPVS", || {
        has_chain(host, "cali-ipvs-to-wl") && !has_chain(host, "cali-input-from-wl")
    })
    .await;
}

async fn ipvs_goes(host: &Host) {
    host.ns.ip("link delete kube-ipvs0");
    host.until("the usual chains", || {
        has_chain(host, "cali-input-from-wl") && !has_chain(host, "cali-ipvs-to-wl")
    })
    .await;
}

/// What the host sends to a pod.
struct Sender<'a> {
    host: &'a Host,
    to: IpAddr,
    server: UdpSocket,
}

impl<'a> Sender<'a> {
    fn new(host: &'a Host, to: u8) -> Self {
        Self::to(host, to, address(to))
    }

    /// To an address behind the host's uplink.
    fn outside(host: &'a Host) -> Self {
        host.pods[0].ip(&format!("address add {OUTSIDE}/24 dev unused0"));
        Self::to(host, 1, ip(OUTSIDE))
    }

    fn to(host: &'a Host, pod: u8, to: IpAddr) -> Self {
        let server = host.inside(pod, || UdpSocket::bind((to, PORT)));
        server.set_read_timeout(Some(ANSWER)).expect("a time limit");
        Self { host, to, server }
    }

    fn send(&self, source: IpAddr, mark: u32, word: u8) {
        let socket = || -> std::io::Result<Socket> {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
            socket.set_ip_transparent_v4(true)?;
            socket.set_mark(mark)?;
            socket.bind(&SocketAddr::new(source, 0).into())?;
            Ok(socket)
        };
        let socket = self.host.ns.netns().run(socket).expect("enter");
        let to = SocketAddr::new(self.to, PORT).into();
        match socket.expect("a socket").send_to(&[word], &to) {
            // What policy drops is an error of the call.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
            sent => assert_eq!(sent.expect("to send"), 1),
        }
    }

    /// Whether a datagram with this source and mark arrives: one of the host, which always does, follows it.
    fn arrives_marked(&self, source: IpAddr, mark: u32) -> bool {
        self.send(source, mark, b'?');
        self.send(ip(OWN), 0, b'.');
        let mut word = [0];
        let (_, from) = self.server.recv_from(&mut word).expect("a datagram");
        if word == *b"." {
            return false;
        }
        assert_eq!(from.ip(), source);
        self.server.recv_from(&mut word).expect("the host's own");
        assert_eq!(word, *b".");
        true
    }

    fn arrives(&self, source: IpAddr) -> bool {
        self.arrives_marked(source, 0)
    }
}

#[test]
fn what_ipvs_forwards_is_under_the_policy_of_both_ends() {
    run(async {
        let host = Host::new("ipvs", 3).await;
        let mut all = host.everything();
        all.push(set(&closed(2)));
        all.push(set(&reaches_only(1, "192.168.1.99/32")));
        host.in_sync(all).await;
        let (to_closed, to_open) = (Sender::new(&host, 2), Sender::new(&host, 3));

        // Without IPVS nobody but the host sends here, which is free.
        assert!(to_closed.arrives(address(1)));

        ipvs_comes(&host).await;
        assert!(!to_closed.arrives(address(3)), "{}", host.rules());
        assert!(!to_closed.arrives(ip(CLIENT)), "{}", host.rules());
        assert!(!to_open.arrives(address(1)), "{}", host.rules());
        assert!(to_open.arrives(address(2)), "{}", host.rules());
        assert!(to_open.arrives(ip(CLIENT)), "{}", host.rules());
        assert!(to_closed.arrives(ip(OWN)), "{}", host.rules());

        // Policy and endpoints change while it is at work.
        host.send(vec![
            set(&reaches_only(1, "192.168.1.3/32")),
            gone(&closed(2)),
        ])
        .await;
        host.settled().await;
        assert!(to_open.arrives(address(1)), "{}", host.rules());
        assert!(!to_closed.arrives(address(1)), "{}", host.rules());
        assert!(to_closed.arrives(ip(CLIENT)), "{}", host.rules());
        host.send(vec![set(&pod(1, 77))]).await;
        host.settled().await;
        assert!(!to_closed.arrives(address(77)), "its new address");
        assert!(to_closed.arrives(address(1)), "nobody's address any more");

        ipvs_goes(&host).await;
        assert!(to_closed.arrives(address(77)));
    });
}

#[test]
fn what_came_in_is_not_the_hosts_own_and_workloads_without_policy_send_nothing() {
    run(async {
        let host = Host::new("ipvsm", 3).await;
        host.ns.ip("address add 10.1.0.2/32 dev eth0");
        let mut all = host.everything();
        all.push(set(&closed(2)));
        host.in_sync(all).await;
        let (to_closed, to_open) = (Sender::new(&host, 2), Sender::new(&host, 3));
        ipvs_comes(&host).await;

        let borrowed = ip("10.1.0.2");
        assert!(to_closed.arrives(borrowed));
        assert!(
            !to_closed.arrives_marked(borrowed, ARRIVED),
            "{}",
            host.rules()
        );
        assert!(
            to_open.arrives_marked(borrowed, ARRIVED),
            "{}",
            host.rules()
        );

        assert!(
            to_open.arrives_marked(ip(CLIENT), ARRIVED),
            "{}",
            host.rules()
        );
        let pod = FROM_WORKLOAD;
        assert!(!to_open.arrives_marked(ip(CLIENT), pod), "{}", host.rules());
        assert!(to_open.arrives_marked(address(1), pod), "{}", host.rules());
    });
}

#[test]
fn what_ipvs_has_left_is_judged_behind_it_and_carries_no_mark() {
    run(async {
        let host = Host::new("ipvsi", 2).await;
        let to_host = |action: &str| {
            set(&format!(
                r#"{{"apiVersion":"projectcalico.org/v3","kind":"FelixConfiguration","metadata":{{"name":"default"}},
                    "spec":{{"defaultEndpointToHostAction":"{action}"}}}}"#
            ))
        };
        let mut all = host.everything();
        all.extend([to_host("Accept"), set(&reaches_only(2, "192.168.1.1/32"))]);
        host.in_sync(all).await;
        ipvs_comes(&host).await;
        // Where IPVS takes packets, and behind everything.
        host.ns.run("nft", &["add", "table", "inet", "lab"]);
        for (chain, place) in [("here", 99), ("behind", 110)] {
            let add = format!(
                "add chain inet lab {chain} {{ type filter hook input priority {place}; }}"
            );
            host.ns.run("nft", &[&add]);
            let count = format!(
                "add rule inet lab {chain} udp dport {PORT} meta mark & {FROM_WORKLOAD} == {FROM_WORKLOAD} counter"
            );
            host.ns.run("nft", &[&count]);
            let unmarked = format!(
                "add rule inet lab {chain} udp dport {PORT} meta mark & {FROM_WORKLOAD} == 0 counter"
            );
            host.ns.run("nft", &[&unmarked]);
        }
        let server = host.ns.netns().run(|| UdpSocket::bind((ip(OWN), PORT)));
        let server = server.expect("enter").expect("bind");
        let asks = |from: u8, limit| {
            let client = host.inside(from, || UdpSocket::bind((address(from), 0)));
            client.send_to(b"?", (ip(OWN), PORT)).expect("to send");
            server.set_read_timeout(Some(limit)).expect("a time limit");
            server.recv_from(&mut [0]).is_ok()
        };
        assert!(asks(1, ANSWER), "{}", host.rules());
        assert!(!asks(2, SILENCE), "{}", host.rules());
        host.send(vec![to_host("Drop")]).await;
        host.settled().await;
        assert!(!asks(1, SILENCE), "{}", host.rules());

        let listed = host.ns.output("nft", &["list", "table", "inet", "lab"]);
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let counted: Vec<u64> = listed
            .lines()
            .filter_map(|line| {
                line.split_once("counter packets ")?
                    .1
                    .split(' ')
                    .next()?
                    .parse()
                    .ok()
            })
            .collect();
        // All three came by with marks; the allowed one arrived without.
        assert_eq!(counted, [3, 0, 0, 1], "{listed}");
    });
}

/// A policy for host endpoints that denies what they send from these addresses.
fn denies_from(name: &str, forward: bool, sources: &[&str]) -> Update {
    set(&format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{{"name":"{name}"}},
            "spec":{{"selector":"has(host)","types":["Egress"],"applyOnForward":{forward},
            "egress":[{{"action":"Deny","source":{{"nets":{sources:?}}}}},{{"action":"Allow"}}]}}}}"#
    ))
}

#[test]
fn host_endpoints_are_asked_of_it_as_of_what_is_forwarded() {
    run(async {
        let host = Host::new("ipvsh", 1).await;
        host.ns.ip("address add 10.1.0.2/32 dev eth0");
        let outside = Sender::outside(&host);
        let mut all = host.everything();
        all.push(set(
            r#"{"apiVersion":"projectcalico.org/v3","kind":"HostEndpoint","metadata":{"name":"up","labels":{"host":"yes"}},
                "spec":{"node":"node1","interfaceName":"eth0"}}"#,
        ));
        all.push(denies_from("own", false, &["10.1.0.2/32", "10.1.0.9/32"]));
        host.in_sync(all).await;
        ipvs_comes(&host).await;
        let (own, client) = (ip("10.1.0.2"), ip(CLIENT));
        assert!(!outside.arrives(own), "{}", host.rules());
        assert!(outside.arrives_marked(client, ARRIVED), "{}", host.rules());
        host.send(vec![denies_from("forwarded", true, &["10.1.0.9/32"])])
            .await;
        host.settled().await;
        assert!(!outside.arrives_marked(client, ARRIVED), "{}", host.rules());
        let other = ip("10.1.0.10");
        assert!(outside.arrives_marked(other, ARRIVED), "{}", host.rules());
    });
}

#[test]
fn a_node_that_enforces_by_iptables_says_what_does_not_hold() {
    run(async {
        let host = Host::new("ipvst", 1).await;
        let mut all = host.everything();
        all.push(Host::backend("Disabled", "NFT"));
        host.in_sync(all).await;
        let says = || {
            let state = host.handle().state();
            let notices = state.borrow().notices.join("\n");
            notices.contains("POLICY DOES NOT HOLD FOR CONNECTIONS THROUGH SERVICES")
        };
        assert!(!says());
        host.ns.ip("link add kube-ipvs0 type bridge");
        host.until("the notice", says).await;
        host.send(vec![Host::backend("Enabled", "NFT")]).await;
        host.until("nf_tables, and no notice", || {
            !says() && has_chain(&host, "cali-ipvs-to-wl")
        })
        .await;
    });
}

#[test]
fn nobody_slips_through_while_the_chains_change_their_place() {
    run(async {
        let host = Host::new("ipvsg", 2).await;
        let mut all = host.everything();
        all.push(set(&reaches_only(2, "192.168.1.1/32")));
        all.push(set(
            r#"{"apiVersion":"projectcalico.org/v3","kind":"FelixConfiguration","metadata":{"name":"default"},
                "spec":{"defaultEndpointToHostAction":"Accept"}}"#,
        ));
        host.in_sync(all).await;
        let server = host.ns.netns().run(|| UdpSocket::bind((ip(OWN), PORT)));
        let server = server.expect("enter").expect("bind");
        server.set_read_timeout(Some(ANSWER)).expect("a time limit");
        let over = AtomicBool::new(false);
        let rounds = std::thread::scope(|scope| {
            let _ends = SetAtEnd([&over, &over]);
            let talk = scope.spawn(|| {
                let mut rounds = 0;
                while !over.load(Ordering::Relaxed) {
                    // Each is a flow of its own, which policy has to decide on.
                    for (from, word) in [(2, b'?'), (1, b'.')] {
                        let client = host.inside(from, || UdpSocket::bind((address(from), 0)));
                        client.send_to(&[word], (ip(OWN), PORT)).expect("to send");
                    }
                    let mut word = [0];
                    server.recv_from(&mut word).expect("what policy allows");
                    assert_eq!(word, *b".", "what policy forbids, in round {rounds}");
                    rounds += 1;
                }
                rounds
            });
            tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(async {
                    for _ in 0..5 {
                        ipvs_comes(&host).await;
                        ipvs_goes(&host).await;
                    }
                });
            });
            over.store(true, Ordering::Relaxed);
            talk.join().expect("the talk")
        });
        assert!(rounds > 5, "{rounds} rounds");
    });
}
