//! What the rule set does whatever the policies are, with real packets.

mod policy_lab;

use std::fmt::Display;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use cali_netlink::NetNs;
use cali_netlink::conntrack::Conntrack;
use cali_netlink::testing::eventually;
use felix::compile::{Compiler, Program};
use policy_lab::{Lab, Place, batch};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

const LIMIT: Duration = Duration::from_secs(10);

/// A program for these pods, all allowed everything, and these objects.
fn program(pods: &[Place], objects: &[Value]) -> Program {
    let mut compiler = Compiler::default();
    compiler.apply(&batch(pods, objects));
    compiler.program().clone()
}

/// Packets that the rule with this comment has counted, over all of its chain's rules.
fn counted(lab: &Lab, chain: &str, comment: &str) -> u64 {
    let listed = lab.listed();
    let rules = listed.chains[chain]
        .rules
        .iter()
        .filter(|rule| rule.rule.comment.as_deref() == Some(comment));
    rules
        .filter_map(|rule| rule.rule.counter())
        .map(|(packets, _)| packets)
        .sum()
}

fn send_until_counted(
    lab: &Lab,
    place: &Place,
    from: &str,
    to: SocketAddr,
    chain: &str,
    comment: &str,
) {
    let before = counted(lab, chain, comment);
    let from: SocketAddr = from.parse().expect("an address");
    let socket = place
        .ns
        .netns()
        .run(|| UdpSocket::bind(from))
        .expect("enter")
        .expect("bind");
    eventually(LIMIT, || -> Result<(), Box<dyn Display>> {
        // A refused datagram shows up as an error of the next one.
        let _ = socket.send_to(b"probe", to);
        if counted(lab, chain, comment) > before {
            Ok(())
        } else {
            Err(Box::new("nothing counted"))
        }
    });
}

#[test]
fn a_foreign_source_address_does_not_leave_the_workload() {
    let mut lab = Lab::new(2);
    lab.enforce(&program(&lab.pods, &[]));
    let [one, two] = &lab.pods[..] else {
        panic!("two pods")
    };
    one.ns.ip("addr add 10.65.0.99/32 dev lo");
    one.ns.ip("-6 addr add fd65::99/128 dev lo nodad");
    let received = two
        .ns
        .netns()
        .run(|| UdpSocket::bind("[::]:4000"))
        .expect("enter")
        .expect("bind");
    received.set_nonblocking(true).expect("not to block");
    for (from, to) in [
        ("10.65.0.99:0", two.address(true)),
        ("[fd65::99]:0", two.address(false)),
    ] {
        let to = SocketAddr::new(to, 4000);
        send_until_counted(
            &lab,
            one,
            from,
            to,
            "cali-raw-prerouting",
            "source address is not the workload's",
        );
    }
    let answer = received.recv_from(&mut [0; 16]);
    assert!(answer.is_err(), "a spoofed packet arrived: {answer:?}");
}

#[test]
fn an_interface_without_policy_carries_nothing() {
    let mut lab = Lab::new(2);
    lab.enforce(&program(&lab.pods[..1], &[]));
    let [known, unknown] = &lab.pods[..] else {
        panic!("two pods")
    };
    let to = |place: &Place| SocketAddr::new(place.address(true), 4000);
    let comment = "interface without policy";
    send_until_counted(
        &lab,
        unknown,
        "0.0.0.0:0",
        to(known),
        "cali-forward-from-wl",
        comment,
    );
    send_until_counted(
        &lab,
        known,
        "0.0.0.0:0",
        to(unknown),
        "cali-forward-to-wl",
        comment,
    );
    let host = SocketAddr::new("192.0.2.1".parse().expect("an address"), 4000);
    send_until_counted(&lab, unknown, "0.0.0.0:0", host, "cali-wl-to-host", comment);
}

#[test]
fn workloads_reach_the_host_only_if_the_configuration_says_so() {
    let mut lab = Lab::new(1);
    let configuration = |action: &str| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"},
               "spec": {"defaultEndpointToHostAction": action}})
    };
    let listener = lab
        .node
        .netns()
        .run(|| TcpListener::bind("[::]:4000"))
        .expect("enter")
        .expect("listen");
    let addresses: Vec<SocketAddr> = ["192.0.2.1:4000", "[2001:db8::1]:4000"]
        .map(|text| text.parse().expect("an address"))
        .into();

    lab.enforce(&program(&lab.pods, &[configuration("Drop")]));
    let host = SocketAddr::new("192.0.2.1".parse().expect("an address"), 4001);
    send_until_counted(
        &lab,
        &lab.pods[0],
        "0.0.0.0:0",
        host,
        "cali-input-host",
        "defaultEndpointToHostAction",
    );

    lab.enforce(&program(&lab.pods, &[configuration("Accept")]));
    for address in addresses {
        let connect = || TcpStream::connect_timeout(&address, LIMIT);
        lab.pods[0]
            .ns
            .netns()
            .run(connect)
            .expect("enter")
            .unwrap_or_else(|error| panic!("{address}: {error}"));
    }
    drop(listener);
}

#[test]
fn packets_that_leave_the_pools_get_the_nodes_address_if_the_pool_says_so() {
    let mut lab = Lab::new(2);
    let pool = |name: &str, cidr: &str, nat: bool| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": name},
               "spec": {"cidr": cidr, "natOutgoing": nat}})
    };
    let pools = [
        pool("v4", "10.65.0.0/24", true),
        pool("v6", "fd65::/64", false),
    ];
    lab.enforce(&program(&lab.pods, &pools));
    // Each with a port of its own: a program that another test starts may hold a former listener for a moment.
    for (port, v4, to, seen) in [
        (
            4000,
            true,
            &lab.world,
            "192.0.2.1".parse().expect("an address"),
        ),
        (4001, false, &lab.world, lab.pods[0].address(false)),
        (4002, true, &lab.pods[1], lab.pods[0].address(true)),
    ] {
        let listener = to
            .ns
            .netns()
            .run(|| TcpListener::bind(SocketAddr::new("::".parse().expect("::"), port)))
            .expect("enter")
            .expect("listen");
        let address = SocketAddr::new(to.address(v4), port);
        let connect = || TcpStream::connect_timeout(&address, LIMIT);
        let _stream = lab.pods[0]
            .ns
            .netns()
            .run(connect)
            .expect("enter")
            .expect("connect");
        let (_, from) = listener.accept().expect("a connection");
        assert_eq!(from.ip().to_canonical(), seen, "seen by {address}");
    }
}

#[test]
fn what_carries_other_packets_between_nodes_is_not_tracked() {
    const OTHER: u16 = 4790;
    const OUTER: [u16; 3] = [4789, 51820, 51821];
    let mut lab = Lab::new(1);
    let configuration = json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration",
        "metadata": {"name": "default"}, "spec": {"wireguardEnabled": true, "wireguardEnabledV6": true}});
    lab.enforce(&program(&lab.pods, &[configuration]));
    let bound = |ns: &NetNs, port: u16| {
        let socket = ns.run(|| UdpSocket::bind(SocketAddr::new("::".parse().expect("::"), port)));
        let socket = socket.expect("enter").expect("bind");
        socket.set_read_timeout(Some(LIMIT)).expect("a limit");
        socket
    };
    for port in OUTER.into_iter().chain([OTHER]) {
        let here = bound(lab.node.netns(), port);
        for node in ["::ffff:192.0.2.1", "2001:db8::1"] {
            let there = bound(lab.world.ns.netns(), 0);
            let node = SocketAddr::new(node.parse().expect("an address"), port);
            // Both directions, so that either hook has seen the flow.
            there.send_to(b"there", node).expect("sent");
            let (_, peer) = here.recv_from(&mut [0; 8]).expect("there");
            here.send_to(b"back", peer).expect("sent");
            there.recv_from(&mut [0; 8]).expect("back");
        }
    }
    let flows = Conntrack::open(lab.node.netns()).expect("conntrack").dump();
    let ports: Vec<u16> = flows
        .expect("flows")
        .iter()
        .map(|flow| flow.original.destination_port)
        .filter(|port| *port == OTHER || OUTER.contains(port))
        .collect();
    assert_eq!(
        ports, [OTHER; 2],
        "one of each family, and of no other port"
    );
}

/// A packet of IPIP whose inner part nobody looks at, as it comes to a host beside: its source.
fn source_of_ipip(lab: &Lab) -> Ipv4Addr {
    let open = |ns: &NetNs| {
        let socket = ns.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(4))));
        let socket = socket.expect("enter").expect("a raw socket");
        socket.set_read_timeout(Some(LIMIT)).expect("a limit");
        socket
    };
    let (here, there) = (open(lab.node.netns()), open(lab.world.ns.netns()));
    let to = SocketAddr::new(lab.world.address(true), 0);
    here.send_to(b"inner", &to.into()).expect("sent");
    let mut packet = [0; 64];
    // The kernel at the other end drops what has a wrong checksum.
    let length = (&there).read(&mut packet).expect("a packet");
    assert_eq!(&packet[20..length], b"inner");
    <[u8; 4]>::try_from(&packet[12..16])
        .expect("a source")
        .into()
}

#[test]
fn ipip_has_an_address_by_which_this_node_is_known() {
    let mut lab = Lab::new(1);
    let node = |name: &str, spec: Value| json!({"apiVersion": "projectcalico.org/v3", "kind": "Node", "metadata": {"name": name}, "spec": spec});
    let there = lab.world.address(true).to_string();
    let there = node("there", json!({"addresses": [{"address": there}]}));
    let own = json!({"ipv4Address": "192.0.2.77/24"});
    let preferred = json!([{"address": "192.0.2.1"}]);
    let pool = |mode: &str| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "pool"},
               "spec": {"cidr": "10.65.0.0/24", "ipipMode": mode}})
    };
    let unknown = node("node", json!({"bgp": own}));
    let known = node("node", json!({"bgp": own, "addresses": preferred}));
    for (pool, here, seen) in [
        (pool("Always"), &unknown, "192.0.2.77"),
        // The others know it by that address as well.
        (pool("Always"), &known, "192.0.2.1"),
        // Somebody else's.
        (pool("Never"), &unknown, "192.0.2.1"),
    ] {
        lab.enforce(&program(&lab.pods, &[pool, here.clone(), there.clone()]));
        assert_eq!(source_of_ipip(&lab).to_string(), seen);
    }
}
