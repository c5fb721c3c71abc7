//! NAT outgoing as FelixConfiguration shapes it, on each backend: the other end says which address and port it sees.

mod policy_lab;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use cali_netlink::testing::eventually;
use policy_lab::{BACKENDS, Lab, Place, endpoint, open};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);
/// The node's address towards the world.
const OWN: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// Enforces an open node whose pods' pools are translated as the settings say.
fn enforce(lab: &mut Lab, settings: &Value) {
    let mut all = vec![
        open(),
        json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"},
               "spec": settings}),
        json!({"apiVersion": "projectcalico.org/v3", "kind": "Node", "metadata": {"name": "other"},
               "spec": {"bgp": {"ipv4Address": "192.0.2.2/24", "ipv6Address": "2001:db8::2/64"}}}),
    ];
    for (name, cidr) in [("v4", "10.65.0.0/24"), ("v6", "fd65::/64")] {
        all.push(json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": name},
                        "spec": {"cidr": cidr, "natOutgoing": true}}));
    }
    all.extend(lab.pods.iter().map(endpoint));
    lab.enforce_objects(&all);
}

fn seen_by_tcp(lab: &Lab, to: &Place, v4: bool) -> SocketAddr {
    let listen = || eventually(LIMIT, || TcpListener::bind("[::]:4000"));
    let listener = to.ns.netns().run(listen).expect("enter");
    let address = SocketAddr::new(to.address(v4), 4000);
    let connect = || TcpStream::connect_timeout(&address, LIMIT);
    let stream = lab.pods[0].ns.netns().run(connect).expect("enter");
    let _stream = stream.expect("connect");
    let (_, from) = listener.accept().expect("a connection");
    SocketAddr::new(from.ip().to_canonical(), from.port())
}

fn seen_by_udp(lab: &Lab, to: &Place, v4: bool) -> SocketAddr {
    let bind = |at: &'static str| move || eventually(LIMIT, || UdpSocket::bind(at));
    let receiver = to.ns.netns().run(bind("[::]:4000")).expect("enter");
    receiver.set_read_timeout(Some(LIMIT)).expect("a limit");
    let any = if v4 { "0.0.0.0:0" } else { "[::]:0" };
    let sender = lab.pods[0].ns.netns().run(bind(any)).expect("enter");
    let sent = sender.send_to(b"x", SocketAddr::new(to.address(v4), 4000));
    sent.expect("send");
    let (_, from) = receiver.recv_from(&mut [0; 8]).expect("a datagram");
    SocketAddr::new(from.ip().to_canonical(), from.port())
}

fn own(v4: bool) -> IpAddr {
    OWN[usize::from(!v4)].parse().expect("an address")
}

#[test]
fn ports_are_of_the_range_that_the_configuration_says() {
    for by in BACKENDS {
        let mut lab = Lab::with(1, by);
        enforce(&mut lab, &json!({"natPortRange": "10000:10009"}));
        for v4 in [true, false] {
            for seen in [
                seen_by_tcp(&lab, &lab.world, v4),
                seen_by_udp(&lab, &lab.world, v4),
            ] {
                assert_eq!(seen.ip(), own(v4), "{by:?}");
                assert!((10000..=10009).contains(&seen.port()), "{by:?}: {seen}");
            }
        }
    }
}

#[test]
fn the_address_is_the_one_that_the_configuration_says() {
    for by in BACKENDS {
        let mut lab = Lab::with(1, by);
        lab.node.ip("addr add 192.0.2.77/32 dev eth0");
        for ports in [Value::Null, json!("20000:20009")] {
            enforce(
                &mut lab,
                &json!({"natOutgoingAddress": "192.0.2.77", "natPortRange": ports}),
            );
            for v4 in [true, false] {
                let expected = if v4 {
                    "192.0.2.77".parse().expect("an address")
                } else {
                    own(false)
                };
                let seen = seen_by_tcp(&lab, &lab.world, v4);
                assert_eq!(seen.ip(), expected, "{by:?}");
                let in_range = (20000..=20009).contains(&seen.port());
                assert!(ports.is_null() || in_range, "{by:?}: {seen}");
            }
        }
    }
}

#[test]
fn nodes_and_other_interfaces_see_the_pod_where_the_configuration_says_so() {
    for by in BACKENDS {
        let mut lab = Lab::with(1, by);
        enforce(
            &mut lab,
            &json!({"natOutgoingExclusions": "IPPoolsAndHostIPs"}),
        );
        for v4 in [true, false] {
            let pod = lab.pods[0].address(v4);
            assert_eq!(
                seen_by_tcp(&lab, &lab.world, v4).ip(),
                pod,
                "{by:?}: a node"
            );
            assert_ne!(seen_by_tcp(&lab, &lab.lan, v4).ip(), pod, "{by:?}: no node");
        }
        enforce(
            &mut lab,
            &json!({"iptablesNATOutgoingInterfaceFilter": "eth0"}),
        );
        for v4 in [true, false] {
            let pod = lab.pods[0].address(v4);
            assert_ne!(
                seen_by_tcp(&lab, &lab.world, v4).ip(),
                pod,
                "{by:?}: by eth0"
            );
            assert_eq!(seen_by_tcp(&lab, &lab.lan, v4).ip(), pod, "{by:?}: by eth1");
        }
    }
}
