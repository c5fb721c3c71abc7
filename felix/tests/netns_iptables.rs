//! The iptables backend beside what policies say: what stands always, what it finds at its start, what others change, and
//! what is refused. Each on either variant.

mod policy_lab;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_netlink::testing::eventually;
use felix::calc::IpVersion;
use felix::dataplane::{Iptables, Variant};
use felix::iptables::{Chain, Program, Renderer, Table};
use policy_lab::{By, Lab, Place, batch};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);
const VARIANTS: [Variant; 2] = [Variant::Nft, Variant::Legacy];

/// A program for these pods, all allowed everything, and these objects.
fn program(pods: &[Place], objects: &[Value]) -> Program {
    let mut renderer = Renderer::default();
    renderer.apply(&batch(pods, objects));
    renderer.program().clone()
}

fn lab(pods: u8, variant: Variant) -> Lab {
    Lab::with(pods, By::Iptables(variant))
}

fn sender(place: &Place, from: &str) -> UdpSocket {
    let from: SocketAddr = from.parse().expect("an address");
    place
        .ns
        .netns()
        .run(|| UdpSocket::bind(from))
        .expect("enter")
        .expect("bind")
}

fn receiver(ns: &cali_netlink::NetNs) -> UdpSocket {
    let socket = ns
        .run(|| UdpSocket::bind("[::]:4000"))
        .expect("enter")
        .expect("bind");
    socket.set_read_timeout(Some(LIMIT)).expect("a limit");
    socket
}

/// The next datagram's content: those before it on the same way would have come first.
fn next(socket: &UdpSocket) -> String {
    let mut data = [0; 64];
    let (len, _) = socket.recv_from(&mut data).expect("a datagram");
    String::from_utf8_lossy(&data[..len]).into_owned()
}

#[test]
fn a_foreign_source_address_does_not_leave_the_workload() {
    for variant in VARIANTS {
        let mut lab = lab(2, variant);
        lab.enforce_chains(&program(&lab.pods, &[]));
        let [one, two] = &lab.pods[..] else {
            panic!("two pods")
        };
        one.ns.ip("addr add 10.65.0.99/32 dev lo");
        one.ns.ip("-6 addr add fd65::99/128 dev lo nodad");
        let received = receiver(two.ns.netns());
        for (v4, spoofed) in [(true, "10.65.0.99:0"), (false, "[fd65::99]:0")] {
            let to = SocketAddr::new(two.address(v4), 4000);
            let own = SocketAddr::new(one.address(v4), 0).to_string();
            for (from, text) in [(spoofed, "spoofed"), (own.as_str(), "own")] {
                sender(one, from)
                    .send_to(text.as_bytes(), to)
                    .expect("send");
            }
            assert_eq!(next(&received), "own", "{variant}");
        }
    }
}

#[test]
fn an_interface_without_policy_carries_nothing() {
    for variant in VARIANTS {
        let mut lab = lab(2, variant);
        lab.enforce_chains(&program(&lab.pods[..1], &[]));
        let all = program(&lab.pods, &[]);
        let sockets: Vec<[UdpSocket; 3]> = [true, false]
            .map(|v4| {
                let any = if v4 { "0.0.0.0:0" } else { "[::]:0" };
                let [known, unknown] = [0, 1].map(|pod| sender(&lab.pods[pod], any));
                let host = sender(&lab.pods[1], any);
                let to = |place: &Place| SocketAddr::new(place.address(v4), 4000);
                known.send_to(b"early", to(&lab.pods[1])).expect("send");
                unknown.send_to(b"early", to(&lab.pods[0])).expect("send");
                [known, unknown, host]
            })
            .into();
        let received = [0, 1].map(|pod| receiver(lab.pods[pod].ns.netns()));
        lab.enforce_chains(&all);
        for (v4, [known, unknown, _]) in [true, false].into_iter().zip(&sockets) {
            let to = |place: &Place| SocketAddr::new(place.address(v4), 4000);
            known.send_to(b"late", to(&lab.pods[1])).expect("send");
            unknown.send_to(b"late", to(&lab.pods[0])).expect("send");
            for socket in &received {
                assert_eq!(next(socket), "late", "{variant}");
            }
        }
    }
}

#[test]
fn workloads_reach_the_host_only_if_the_configuration_says_so() {
    let configuration = |action: &str| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"},
               "spec": {"defaultEndpointToHostAction": action}})
    };
    for variant in VARIANTS {
        let mut lab = lab(1, variant);
        let received = receiver(lab.node.netns());
        let hosts = ["192.0.2.1:4000", "[2001:db8::1]:4000"]
            .map(|text| text.parse::<SocketAddr>().expect("an address"));
        let send = |lab: &Lab, text: &str| {
            for to in hosts {
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                sender(&lab.pods[0], any)
                    .send_to(text.as_bytes(), to)
                    .expect("send");
            }
        };
        lab.enforce_chains(&program(&lab.pods, &[configuration("Drop")]));
        send(&lab, "early");
        for action in ["Accept", "Return"] {
            lab.enforce_chains(&program(&lab.pods, &[configuration(action)]));
            send(&lab, action);
            assert_eq!(
                [next(&received), next(&received)],
                [action, action],
                "{variant}"
            );
        }
    }
}

#[test]
fn packets_that_leave_the_pools_get_the_nodes_address_if_the_pool_says_so() {
    let pool = |name: &str, cidr: &str, nat: bool| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": name},
               "spec": {"cidr": cidr, "natOutgoing": nat}})
    };
    let pools = [
        pool("v4", "10.65.0.0/24", true),
        pool("v6", "fd65::/64", false),
    ];
    for variant in VARIANTS {
        let mut lab = lab(2, variant);
        lab.enforce_chains(&program(&lab.pods, &pools));
        for (v4, to, seen) in [
            (
                true,
                &lab.world,
                "192.0.2.1".parse::<IpAddr>().expect("an address"),
            ),
            (false, &lab.world, lab.pods[0].address(false)),
            (true, &lab.pods[1], lab.pods[0].address(true)),
        ] {
            let listen = || eventually(LIMIT, || TcpListener::bind("[::]:4000"));
            let listener = to.ns.netns().run(listen).expect("enter");
            let address = SocketAddr::new(to.address(v4), 4000);
            let connect = || TcpStream::connect_timeout(&address, LIMIT);
            let stream = lab.pods[0].ns.netns().run(connect).expect("enter");
            let _stream = stream.expect("connect");
            let (_, from) = listener.accept().expect("a connection");
            assert_eq!(
                from.ip().to_canonical(),
                seen,
                "{variant}: seen by {address}"
            );
        }
    }
}

/// `iptables-save -c` without its dates. Of IPv4, where nothing comes and goes by itself.
fn saved(lab: &Lab, variant: Variant) -> Vec<String> {
    let text = lab
        .node
        .run(&format!("iptables-{}-save", variant.name()), &["-c"]);
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(str::to_owned).collect()
}

#[test]
fn a_successor_adopts_what_it_finds_and_counters_go_on() {
    for variant in VARIANTS {
        let mut lab = lab(2, variant);
        let desired = program(&lab.pods, &[]);
        lab.enforce_chains(&desired);
        let to = lab.pods[1].address(true).to_string();
        lab.pods[0]
            .ns
            .run("ping", &["-c", "2", "-i", "0.1", "-W", "5", &to]);
        let before = saved(&lab, variant);
        let now = Instant::now();
        let mut successor = Iptables::adopt(lab.node.netns(), variant, now).expect("adopt");
        successor.touch_all(&desired);
        successor.apply(&desired, now);
        assert!(successor.is_complete());
        assert_eq!(
            saved(&lab, variant),
            before,
            "{variant}: nothing was written"
        );
        // With one pod less, what belongs to it goes and the rest stays as it is.
        let fewer = program(&lab.pods[..1], &[]);
        successor.touch_all(&fewer);
        successor.apply(&fewer, now);
        assert!(successor.is_complete());
        let after = saved(&lab, variant);
        assert!(
            !after.iter().any(|line| line.contains("calipod2")),
            "{variant}: {after:#?}"
        );
        let kept = |lines: &[String]| -> Vec<String> {
            let of = lines
                .iter()
                .filter(|line| line.contains("-A cali-fw-calipod1"));
            of.cloned().collect()
        };
        assert_eq!(
            kept(&after),
            kept(&before),
            "{variant}: counters of the other pod go on"
        );
    }
}

#[test]
fn what_a_stranger_changes_is_put_right_and_the_rest_is_left_alone() {
    for variant in VARIANTS {
        let lab = lab(1, variant);
        let name = variant.name();
        let run = |command: &str| {
            let words: Vec<&str> = command.split(' ').collect();
            lab.node.run(words[0], &words[1..]);
        };
        run(&format!("iptables-{name} -N THEIRS"));
        run(&format!("iptables-{name} -A FORWARD -j THEIRS"));
        let mut now = Instant::now();
        let mut kernel = Iptables::adopt(lab.node.netns(), variant, now).expect("adopt");
        let pools = json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "v4"},
                           "spec": {"cidr": "10.65.0.0/24", "natOutgoing": true}});
        let desired = program(&lab.pods, &[pools]);
        kernel.touch_all(&desired);
        kernel.apply(&desired, now);
        assert!(
            kernel.is_complete(),
            "{:?} {:?}",
            kernel.refused(),
            kernel.problem()
        );
        for change in [
            format!("iptables-{name} -F cali-FORWARD"),
            format!("ip6tables-{name} -D FORWARD 1"),
            format!("iptables-{name} -I FORWARD -j THEIRS"),
            format!("iptables-{name} -A cali-tw-calipod1 -j ACCEPT"),
            "ipset flush cali40masq-ipam-pools".to_owned(),
            format!("iptables-{name} -t nat -F"),
        ] {
            run(&change);
            // The fight's limit is a matter of its own.
            now += Duration::from_secs(120);
            kernel.apply(&desired, now);
            let seen = Iptables::adopt(lab.node.netns(), variant, now).expect("adopt");
            assert_eq!(
                seen.differing(&desired),
                [""; 0],
                "{variant}: after {change}"
            );
        }
        let theirs = lab
            .node
            .run(&format!("iptables-{name}"), &["-S", "FORWARD"]);
        assert_eq!(
            theirs.matches("-j THEIRS").count(),
            2,
            "{variant}: {theirs}"
        );
        let nothing = Program::default();
        while kernel.vacate(&nothing, now) {
            now += Duration::from_secs(1);
        }
        let left = lab.ruleset();
        assert!(
            !left.contains("cali") && left.contains("THEIRS"),
            "{variant}: {left}"
        );
        assert_eq!(lab.node.run("ipset", &["list", "-name"]), "");
    }
}

/// A program with these chains besides.
fn with(mut desired: Program, chains: &[(Table, &str, &str)]) -> Program {
    for (table, name, rule) in chains {
        let chain = Chain::new(name, vec![(*rule).to_owned()]);
        let family = desired.family_mut(IpVersion::V4);
        family.chains.insert((*table, Arc::from(*name)), chain);
    }
    desired
}

#[test]
fn a_refused_chain_is_closed_or_keeps_its_former_content_and_holds_up_nothing() {
    // One that the program refuses to read, and one that only the kernel refuses.
    for (table, bad) in [(Table::Filter, "-j nowhere"), (Table::Raw, "-j REJECT")] {
        for variant in VARIANTS {
            let lab = lab(1, variant);
            let now = Instant::now();
            let mut kernel = Iptables::adopt(lab.node.netns(), variant, now).expect("adopt");
            let plain = program(&lab.pods, &[]);
            let mut wish = |chains: &[(Table, &str, &str)], now| {
                let desired = with(plain.clone(), chains);
                kernel.touch_all(&desired);
                kernel.apply(&desired, now);
                let refused: Vec<String> = kernel
                    .refused()
                    .into_iter()
                    .map(|refused| refused.object)
                    .collect();
                (
                    refused,
                    kernel.is_settled(),
                    kernel.problem().map(str::to_owned),
                )
            };
            let about = |chain: &str| format!("IPv4 chain {chain} of table {table}");
            let listed = |chain: &str| {
                let args = ["-t", table.name(), "-S", chain];
                lab.node.run(&format!("iptables-{}", variant.name()), &args)
            };
            let told = wish(
                &[(table, "cali-a", "-j ACCEPT"), (table, "cali-new", bad)],
                now,
            );
            assert_eq!(told, (vec![about("cali-new")], true, None), "{variant}");
            assert!(listed("cali-a").contains("-j ACCEPT"), "{variant}");
            assert!(
                listed("cali-new").contains("-j DROP"),
                "{variant}: a new chain is closed"
            );
            let told = wish(
                &[(table, "cali-a", bad), (table, "cali-b", "-j RETURN")],
                now,
            );
            assert_eq!(told, (vec![about("cali-a")], true, None), "{variant}");
            assert!(
                listed("cali-a").contains("-j ACCEPT"),
                "{variant}: the former content stays"
            );
            assert!(
                listed("cali-b").contains("-j RETURN"),
                "{variant}: others are written"
            );
            let told = wish(
                &[(table, "cali-a", "-j DROP")],
                now + Duration::from_secs(61),
            );
            assert_eq!(told, (vec![], true, None), "{variant}");
            assert!(listed("cali-a").contains("-j DROP"), "{variant}");
        }
    }
}

#[test]
fn a_chain_waits_for_its_sets() {
    for variant in VARIANTS {
        let lab = lab(1, variant);
        let now = Instant::now();
        let mut kernel = Iptables::adopt(lab.node.netns(), variant, now).expect("adopt");
        let pool = |name: &str| {
            json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": name},
                   "spec": {"cidr": format!("10.{name}.0.0/16"), "natOutgoing": true}})
        };
        let desired = program(&lab.pods, &[pool("65"), pool("66"), pool("67")]);
        kernel.set_max_set_size(2);
        kernel.touch_all(&desired);
        kernel.apply(&desired, now);
        let refused: Vec<String> = kernel
            .refused()
            .into_iter()
            .map(|refused| refused.object)
            .collect();
        let expected = [
            "IPv4 chain cali-nat-outgoing of table nat",
            "IP set cali40masq-ipam-pools",
            "IP set cali40network-ip-pools",
        ];
        assert_eq!(refused, expected, "{variant}");
        assert!(
            kernel.has_chain("cali-tw-calipod1"),
            "{variant}: the rest is written"
        );
        kernel.set_max_set_size(4);
        kernel.touch(Default::default());
        kernel.apply(&desired, now);
        assert!(kernel.is_complete(), "{variant}: {:?}", kernel.refused());
        let members = lab.node.run("ipset", &["save", "cali40masq-ipam-pools"]);
        assert!(
            members.contains("10.67.0.0/16") && members.contains("maxelem 4"),
            "{variant}: {members}"
        );
    }
}
