//! What the rule set does besides the policy of workloads, with real packets on each backend: addresses of services that
//! nobody serves, outer packets that are not tracked, packets that connection tracking cannot place, and what the host sends to
//! a destination that is translated on the way.

mod policy_lab;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use cali_netlink::testing::{TestNs, eventually};
use felix::conformance::Answer;
use policy_lab::{BACKENDS, Lab, Place, Probe, endpoint, listen, open, probe};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

const LIMIT: Duration = Duration::from_secs(10);
const SERVICES: [&str; 2] = ["10.96.0.10", "fd96::10"];

fn enforce(lab: &mut Lab, settings: &Value, more: &[Value]) {
    let mut all = vec![
        open(),
        json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"},
               "spec": settings}),
    ];
    all.extend(lab.pods.iter().map(endpoint));
    all.extend(more.iter().cloned());
    lab.enforce_objects(&all);
}

#[test]
fn packets_to_services_that_nobody_serves_go_no_further() {
    let services = json!({"apiVersion": "projectcalico.org/v3", "kind": "BGPConfiguration", "metadata": {"name": "default"},
                          "spec": {"serviceClusterIPs": [{"cidr": "10.96.0.0/16"}],
                                   "serviceExternalIPs": [{"cidr": "fd96::/112"}]}});
    for by in BACKENDS {
        let mut lab = Lab::with(1, by);
        // As a default route leads there, and the network beyond would send them back.
        for (address, length) in SERVICES.into_iter().zip(["32", "128"]) {
            let via = lab.world.address(address.contains('.'));
            lab.node
                .ip(&format!("route add {address} via {via} dev eth0"));
            lab.world
                .ns
                .ip(&format!("addr add {address}/{length} dev lo nodad"));
        }
        let _listener = listen(lab.world.ns.netns(), Probe::Tcp(4000));
        // Silence is not waited for long, answers are.
        let ask = |from: &Place, to: &str, expected: &Answer| {
            let to: IpAddr = to.parse().expect("an address");
            let silent = *expected == Answer::Silence;
            felix::conformance::probe(from.ns.netns(), to, Probe::Tcp(4000), 0, silent)
        };
        for (settings, expected) in [
            (json!({"serviceLoopPrevention": "Disabled"}), Answer::Yes),
            (json!({}), Answer::Silence),
            (json!({"serviceLoopPrevention": "Reject"}), Answer::Refused),
        ] {
            enforce(&mut lab, &settings, std::slice::from_ref(&services));
            for to in SERVICES {
                // A pod's, and what comes from outside and would go out again.
                for from in [&lab.pods[0], &lab.lan] {
                    let answer = ask(from, to, &expected);
                    let rules = lab.ruleset();
                    assert_eq!(answer, expected, "{by:?} {settings} to {to}:\n{rules}");
                }
            }
            // Others are not concerned.
            for v4 in [true, false] {
                let to = lab.world.address(v4);
                let answered = probe(lab.pods[0].ns.netns(), to, Probe::Tcp(4000), 0);
                assert_eq!(answered, Ok(true), "{by:?} to {to}");
            }
        }
        // Without ranges there is nothing to prevent.
        enforce(&mut lab, &json!({}), &[]);
        let answer = ask(&lab.pods[0], SERVICES[0], &Answer::Yes);
        assert_eq!(answer, Answer::Yes, "{by:?}:\n{}", lab.ruleset());
    }
}

fn send(from: &TestNs, to: SocketAddr) {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.netns().run(|| UdpSocket::bind(any)).expect("enter");
    socket.expect("bind").send_to(b"x", to).expect("send");
}

/// Ports of UDP flows that the namespace tracks.
fn tracked(ns: &TestNs, port: u16) -> bool {
    let text = ["ipv4", "ipv6"]
        .map(|family| {
            let words = [
                "-L",
                "-f",
                family,
                "-p",
                "udp",
                "--dport",
                &port.to_string(),
            ];
            let output = ns.output("conntrack", &words);
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
        .concat();
    text.contains(&format!("dport={port}"))
}

#[test]
fn outer_packets_between_nodes_are_not_tracked() {
    for by in BACKENDS {
        let mut lab = Lab::with(2, by);
        enforce(
            &mut lab,
            &json!({"wireguardEnabled": true, "wireguardEnabledV6": true, "wireguardListeningPortV6": 51999,
                    "allowVXLANPacketsFromWorkloads": true}),
            &[],
        );
        // (port, whether it is an outer one)
        for (port, outer) in [(4789, true), (51820, true), (51999, true), (51821, false)] {
            for v4 in [true, false] {
                let host = lab.host_address(&lab.world, v4);
                send(&lab.world.ns, SocketAddr::new(host, port));
                send(&lab.node, SocketAddr::new(lab.world.address(v4), port));
            }
            // What comes later is there later: an ordinary flow is waited for.
            send(
                &lab.world.ns,
                SocketAddr::new(lab.host_address(&lab.world, true), 4001),
            );
            eventually(LIMIT, || {
                tracked(&lab.node, 4001).then_some(()).ok_or("not yet")
            });
            assert_eq!(
                tracked(&lab.node, port),
                !outer,
                "{by:?}: port {port}\n{}",
                lab.ruleset()
            );
        }
        // A workload's own is under policy as all that it sends.
        send(
            &lab.pods[0].ns,
            SocketAddr::new(lab.pods[1].address(true), 4789),
        );
        eventually(LIMIT, || {
            tracked(&lab.node, 4789).then_some(()).ok_or("not tracked")
        });
    }
}

/// An echo reply that nobody asked for, to be told by its identifier.
fn unasked(from: &Place, to: &Place, v4: bool) {
    let (domain, protocol, kind) = if v4 {
        (Domain::IPV4, Protocol::ICMPV4, 0)
    } else {
        (Domain::IPV6, Protocol::ICMPV6, 129)
    };
    let open = || Socket::new(domain, Type::RAW, Some(protocol));
    let socket = from.ns.netns().run(open).expect("enter").expect("a socket");
    let mut packet = [kind, 0, 0, 0, 0x12, 0x34, 0, 1];
    if v4 {
        // The checksum (RFC 1071) over these words; that of ICMPv6 the kernel makes.
        packet[2..4].copy_from_slice(&(!0x1235_u16).to_be_bytes());
    }
    let to = SocketAddr::new(to.address(v4), 0);
    socket.send_to(&packet, &to.into()).expect("send");
}

fn arrived(place: &Place) -> u64 {
    let text = place
        .ns
        .run("nft", &["-j", "list", "table", "inet", "seen"]);
    let value: Value = serde_json::from_str(&text).expect("JSON");
    let objects = value["nftables"].as_array().expect("objects");
    let counter = objects
        .iter()
        .find(|object| object["counter"].is_object())
        .expect("the counter");
    counter["counter"]["packets"].as_u64().expect("a number")
}

#[test]
fn packets_that_connection_tracking_cannot_place_are_dropped_unless_the_configuration_says_otherwise()
 {
    for by in BACKENDS {
        let mut lab = Lab::with(2, by);
        for words in [
            "add table inet seen",
            "add counter inet seen replies",
            "add chain inet seen in { type filter hook prerouting priority 0; }",
            "add rule inet seen in icmp type echo-reply counter name replies",
            "add rule inet seen in icmpv6 type echo-reply counter name replies",
        ] {
            lab.pods[1].ns.run("nft", &[words]);
        }
        for v4 in [true, false] {
            enforce(&mut lab, &json!({}), &[]);
            let before = arrived(&lab.pods[1]);
            unasked(&lab.pods[0], &lab.pods[1], v4);
            // What was sent before has gone its way when a later one is answered.
            let answered = probe(
                lab.pods[0].ns.netns(),
                lab.pods[1].address(v4),
                Probe::Ping,
                0,
            );
            assert_eq!(answered, Ok(true), "{by:?}");
            assert_eq!(arrived(&lab.pods[1]), before, "{by:?}:\n{}", lab.ruleset());

            enforce(
                &mut lab,
                &json!({"disableConntrackInvalidCheck": true}),
                &[],
            );
            unasked(&lab.pods[0], &lab.pods[1], v4);
            eventually(LIMIT, || {
                (arrived(&lab.pods[1]) > before)
                    .then_some(())
                    .ok_or("it has not arrived")
            });
        }
    }
}

#[test]
fn policy_of_a_host_endpoint_sees_the_translated_destination_of_what_the_host_sends() {
    let policy = [
        json!({"apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
               "metadata": {"name": "eth0", "labels": {"role": "edge"}}, "spec": {"node": "node", "interfaceName": "eth0"}}),
        json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy", "metadata": {"name": "edge"},
               "spec": {"selector": "role == 'edge'", "types": ["Egress"],
                        "egress": [{"action": "Deny", "protocol": "TCP", "destination": {"ports": [8080]}}, {"action": "Allow"}]}}),
    ];
    for by in BACKENDS {
        let mut lab = Lab::with(0, by);
        enforce(&mut lab, &json!({}), &policy);
        // As kube-proxy does it: service address and port, and where they lead.
        let mut rules = String::new();
        for v4 in [true, false] {
            let (family, net, world, lan) = if v4 {
                ("ip", "10.96.0.", "192.0.2.2", "198.51.100.2")
            } else {
                ("ip6", "fd96::", "[2001:db8::2]", "[2001:db8:1::2]")
            };
            rules.push_str(&format!(
                "table {family} services {{ chain out {{ type nat hook output priority -100;\n"
            ));
            for (last, port, to) in [
                (1, 80, format!("{world}:8080")),
                (2, 8080, format!("{world}:80")),
                (3, 8080, format!("{lan}:80")),
            ] {
                rules.push_str(&format!(
                    "{family} daddr {net}{last} tcp dport {port} dnat to {to}\n"
                ));
            }
            rules.push_str("}\n}\n");
            lab.node.ip(&format!(
                "route add {net}{} via {} dev eth0",
                if v4 { "0/24" } else { "/64" },
                lab.world.address(v4)
            ));
        }
        lab.node.run("nft", &[&rules]);
        let _listeners = [80, 8080].map(|port| {
            [&lab.world, &lab.lan].map(|place| listen(place.ns.netns(), Probe::Tcp(port)))
        });
        for net in ["10.96.0.", "fd96::"] {
            for (last, port, expected, why) in [
                (1, 80, Answer::Silence, "the real port is denied"),
                (2, 8080, Answer::Yes, "the real port is allowed"),
                (3, 8080, Answer::Yes, "it leaves where no host endpoint is"),
            ] {
                let to: IpAddr = format!("{net}{last}").parse().expect("an address");
                let silent = expected == Answer::Silence;
                let probe = felix::conformance::probe;
                let answer = probe(lab.node.netns(), to, Probe::Tcp(port), 0, silent);
                let rules = lab.ruleset();
                assert_eq!(answer, expected, "{by:?} {to}, port {port}: {why}\n{rules}");
            }
            // Untranslated, it is asked before.
            let to = lab.world.address(net.contains('.'));
            let answer = felix::conformance::probe(lab.node.netns(), to, Probe::Tcp(8080), 0, true);
            assert_ne!(answer, Answer::Yes, "{by:?}");
        }
    }
}
