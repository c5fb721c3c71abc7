//! A lower MTU under traffic: what is too large for a pod is answered from the first moment on, never lost without a word.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cali_api::AnyResource;
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_netlink::events::Group;
use cali_netlink::testing::{TestNs, eventually, run};
use cali_node::mtu::MtuFile;
use cali_routes::{Candidate, Input, KernelSettings, RouteSpec, Source, Writer};
use felix::dataplane::State;
use tokio::sync::{mpsc, watch};

const LIMIT: Duration = Duration::from_secs(20);
/// The moment between the two ends of an interface is short: one round may miss it.
const ROUNDS: u64 = 5;
const POD: [&str; 2] = ["10.65.0.1", "fd65::1"];
const FAMILIES: [&str; 2] = ["4", "6"];

fn pool(vxlan: &str) -> SyncEvent {
    let object = AnyResource::from_json(serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "p"},
        "spec": {"cidr": "10.65.0.0/16", "vxlanMode": vxlan},
    }))
    .unwrap();
    SyncEvent::Updates(vec![Update {
        key: object.key(),
        value: Some(Arc::new(object)),
        revision: "1".into(),
    }])
}

/// A node with a pod behind `cali1` and somebody outside behind `eth0`.
fn places() -> [TestNs; 3] {
    let [node, pod, world] = ["node", "pod", "world"].map(TestNs::new);
    for setting in [
        "net.ipv4.ip_forward=1",
        "net.ipv6.conf.all.forwarding=1",
        // Every packet that is too large is to be answered.
        "net.ipv4.icmp_ratelimit=0",
        "net.ipv6.icmp.ratelimit=0",
        "net.ipv4.icmp_msgs_per_sec=1000000",
    ] {
        node.output("sysctl", &["-qw", setting]);
    }
    for (interface, other) in [("cali1", &pod), ("eth0", &world)] {
        let far = other.name();
        node.ip(&format!(
            "link add {interface} type veth peer name eth0 netns {far}"
        ));
        node.ip(&format!("link set {interface} up"));
        other.ip("link set eth0 up");
    }
    for (at, interface, addresses) in [
        (&node, "cali1", ["169.254.1.1/32", "fd65::ffff/128"]),
        (&pod, "eth0", ["10.65.0.1/24", "fd65::1/64"]),
        (&node, "eth0", ["192.0.2.1/24", "2001:db8::1/64"]),
        (&world, "eth0", ["192.0.2.2/24", "2001:db8::2/64"]),
    ] {
        for address in addresses {
            at.ip(&format!("addr add {address} dev {interface} nodad"));
        }
    }
    pod.ip("route add 169.254.1.1 dev eth0");
    pod.ip("route add default via 169.254.1.1");
    pod.ip("-6 route add default via fd65::ffff");
    world.ip("route add default via 192.0.2.1");
    world.ip("-6 route add default via 2001:db8::1");
    [node, pod, world]
}

/// Packets of the full size that may not be fragmented, one after the other as they are answered.
fn flood(world: &TestNs, to: &str) -> Flood {
    let size = if to.contains(':') { "1452" } else { "1472" };
    let mut ping = world.command("ping");
    ping.args(["-n", "-q", "-f", "-M", "do", "-s", size, to]);
    ping.stdout(Stdio::null()).stderr(Stdio::null());
    Flood(ping.spawn().unwrap())
}

/// Ends with the value, also in a test that fails.
struct Flood(Child);

impl Drop for Flood {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Counts what goes over the wire, whatever ping says: it also counts what its own kernel refuses to send.
fn watch_wire(place: &TestNs) {
    for words in [
        "add table inet seen",
        "add chain inet seen out { type filter hook output priority 0; }",
        "add chain inet seen in { type filter hook prerouting priority 0; }",
    ] {
        place.run("nft", &[words]);
    }
    for (name, chain, what) in [
        ("asked4", "out", "icmp type echo-request"),
        ("asked6", "out", "icmpv6 type echo-request"),
        ("came4", "in", "icmp type echo-request"),
        ("came6", "in", "icmpv6 type echo-request"),
        ("refused4", "in", "icmp code frag-needed"),
        ("refused6", "in", "icmpv6 type packet-too-big"),
    ] {
        place.run("nft", &[&format!("add counter inet seen {name}")]);
        let rule = format!("add rule inet seen {chain} {what} counter name {name}");
        place.run("nft", &[&rule]);
    }
}

fn counted(place: &TestNs, name: &str) -> u64 {
    let text = place.run("nft", &["-j", "list", "counter", "inet", "seen", name]);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let objects = value["nftables"].as_array().unwrap();
    let mut found = objects
        .iter()
        .filter_map(|object| object["counter"]["packets"].as_u64());
    found.next().unwrap()
}

#[test]
fn what_is_too_large_for_a_lowered_mtu_is_refused_not_lost() {
    run(async {
        let [node, pod, world] = places();
        let netlink = node.netlink().clone();
        let routes = Writer::start("node".into(), netlink.clone(), KernelSettings::default());
        let routes = routes.unwrap();
        let spec = RouteSpec::Device {
            device: "cali1".into(),
            source: None,
        };
        let wanted = POD.map(|address| {
            let candidate = Candidate::new(spec.clone(), "a pod");
            let prefix = cali_api::Cidr::host(address.parse().unwrap());
            Input::Set(Source::Workload, prefix, candidate)
        });
        assert_eq!(routes.apply(wanted.to_vec()).await.unwrap(), []);

        let folder = tempfile::tempdir().unwrap();
        let (events, stream) = mpsc::channel(4);
        let (_dataplane, state) = watch::channel(Arc::<State>::default());
        let (applied, mut pods) = watch::channel(None);
        let file = MtuFile {
            path: folder.path().join("mtu"),
            netlink: netlink.clone(),
            node: "node".into(),
            routes,
            dataplane: state,
            applied,
        };
        let links = netlink.events(&[Group::Link]).unwrap();
        let task = tokio::spawn(file.run(stream, links));
        events.send(pool("Never")).await.unwrap();
        events
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        let reached = |mtu| move |now: &Option<u32>| *now == Some(mtu);
        let first = tokio::time::timeout(LIMIT, pods.wait_for(reached(1500))).await;
        first.unwrap().unwrap();

        // Addresses of the link are looked for duplicates first.
        for address in POD {
            eventually(LIMIT, || {
                let answer = world.output("ping", &["-n", "-c", "1", "-W", "1", address]);
                answer.status.success().then_some(()).ok_or("no answer yet")
            });
        }
        [&world, &pod].into_iter().for_each(watch_wire);
        for round in 1..=ROUNDS {
            let came = || FAMILIES.map(|family| counted(&pod, &format!("came{family}")));
            let before = came();
            let pings = POD.map(|address| flood(&world, address));
            eventually(LIMIT, || {
                let flows = came().into_iter().zip(before).all(|(now, then)| now > then);
                flows.then_some(()).ok_or("no packets yet")
            });
            events.send(pool("Always")).await.unwrap();
            let lowered = tokio::time::timeout(LIMIT, pods.wait_for(reached(1450))).await;
            lowered.unwrap().unwrap();
            let seen = |family: &str| {
                [(&world, "asked"), (&pod, "came"), (&world, "refused")]
                    .map(|(place, what)| counted(place, &format!("{what}{family}")))
            };
            let refused = |family| seen(family)[2] >= round;
            eventually(LIMIT, || {
                let both = FAMILIES.into_iter().all(refused);
                both.then_some(()).ok_or("nothing is refused yet")
            });
            drop(pings);
            for (family, to) in FAMILIES.into_iter().zip(POD) {
                // Something may still be on its way when the pings end.
                let [sent, came, refused] = eventually(LIMIT, || {
                    let [sent, came, refused] = seen(family);
                    let whole = sent == came + refused;
                    whole
                        .then_some([sent, came, refused])
                        .ok_or("lost without a word")
                });
                println!("{round}, {to}: {sent} sent, {came} came, {refused} refused");
                assert!(came > 0 && refused >= round, "{to}");
                assert_eq!(sent - came, refused, "{to}: lost without a word");
            }
            if round < ROUNDS {
                events.send(pool("Never")).await.unwrap();
                let raised = tokio::time::timeout(LIMIT, pods.wait_for(reached(1500))).await;
                raised.unwrap().unwrap();
                // What it has learnt of the path.
                for family in ["-4", "-6"] {
                    world.ip(&format!("{family} route flush cache"));
                }
            }
        }
        assert!(pod.ip("link show eth0").contains("mtu 1450"));
        // The interface says it now.
        let shown = node.ip("route show 10.65.0.1");
        assert!(!shown.contains("mtu"), "{shown}");
        task.abort();
    });
}
