//! Packet rates, numbers of connections and code points of workloads, with real packets on each backend.

mod policy_lab;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use cali_netlink::testing::{TestNs, eventually};
use policy_lab::{BACKENDS, Lab, Place, Probe, endpoint, listen, open, probe};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);

/// An open node whose first pod has these limits.
fn enforce(lab: &mut Lab, controls: &Value) {
    let mut all = vec![open()];
    for (name, cidr) in [("v4", "10.65.0.0/24"), ("v6", "fd65::/64")] {
        all.push(json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": name},
                        "spec": {"cidr": cidr}}));
    }
    all.push(json!({"apiVersion": "projectcalico.org/v3", "kind": "Node", "metadata": {"name": "other"},
                    "spec": {"bgp": {"ipv4Address": "198.51.100.2/24", "ipv6Address": "2001:db8:1::2/64"}}}));
    let mut pods: Vec<Value> = lab.pods.iter().map(endpoint).collect();
    pods[0]["spec"]["qosControls"] = controls.clone();
    all.extend(pods);
    lab.enforce_objects(&all);
}

/// Sends datagrams of one flow from one place to the other until so many have gone, each answered if it arrives; how many
/// arrived, and how long that took.
fn exchange(from: &Place, to: &Place, v4: bool, count: u32) -> (u32, Duration) {
    let bind = |at: &'static str| move || eventually(LIMIT, || UdpSocket::bind(at));
    let receiver = to.ns.netns().run(bind("[::]:4000")).expect("enter");
    let any = if v4 { "0.0.0.0:0" } else { "[::]:0" };
    let sender = from.ns.netns().run(bind(any)).expect("enter");
    let mut arrived = 0;
    let mut take = |wait: Duration| {
        receiver.set_read_timeout(Some(wait)).expect("a limit");
        let mut data = [0; 8];
        let taken = receiver.recv_from(&mut data);
        if let Ok((_, peer)) = &taken {
            arrived += 1;
            receiver.send_to(b"y", peer).expect("answer");
        }
        taken.is_ok()
    };
    let start = Instant::now();
    for _ in 0..count {
        let to = SocketAddr::new(to.address(v4), 4000);
        sender.send_to(b"x", to).expect("send");
        take(Duration::from_millis(10));
    }
    // What is late still counts.
    while take(Duration::from_millis(500)) {}
    (arrived, start.elapsed())
}

/// What may come in this time, with a little for the edges.
fn allowance(rate: f64, burst: u32, time: Duration) -> u32 {
    burst + (rate * time.as_secs_f64()).ceil() as u32 + 1
}

#[test]
fn packets_beyond_the_rate_are_dropped_also_of_established_flows() {
    for by in BACKENDS {
        let mut lab = Lab::with(1, by);
        // (limit, whether the pod is the sender)
        for (key, sends) in [("egress", true), ("ingress", false)] {
            for v4 in [true, false] {
                enforce(&mut lab, &Value::Null);
                let (pod, world) = (&lab.pods[0], &lab.world);
                let (from, to) = if sends { (pod, world) } else { (world, pod) };
                let (arrived, _) = exchange(from, to, v4, 60);
                assert_eq!(arrived, 60, "{by:?} {key} without a limit");

                let mut controls = json!({});
                controls[format!("{key}PacketRate")] = json!(2);
                controls[format!("{key}PacketBurst")] = json!(10);
                enforce(&mut lab, &controls);
                let (pod, world) = (&lab.pods[0], &lab.world);
                let (from, to) = if sends { (pod, world) } else { (world, pod) };
                let (arrived, time) = exchange(from, to, v4, 60);
                let most = allowance(2.0, 10, time);
                assert!(
                    (10..=most).contains(&arrived),
                    "{by:?} {key}: {arrived} of 60 within {time:?}, at most {most} may:\n{}",
                    lab.ruleset()
                );
            }
        }
        enforce(&mut lab, &Value::Null);
        let text = lab.ruleset();
        for left in ["cali-rate", "cali-rt-", "cali-rf-"] {
            assert!(!text.contains(left), "{by:?}: {left} is left in\n{text}");
        }
    }
}

#[test]
fn a_rate_counts_what_a_pod_sends_to_its_host_and_elsewhere_together() {
    let mut lab = Lab::new(1);
    enforce(
        &mut lab,
        &json!({"egressPacketRate": 1, "egressPacketBurst": 20}),
    );
    let pod = &lab.pods[0];
    let socket = pod.ns.netns().run(|| UdpSocket::bind("0.0.0.0:0"));
    let socket = socket.expect("enter").expect("bind");
    let start = Instant::now();
    for _ in 0..50 {
        for to in ["192.0.2.1:4000", "192.0.2.2:4000"] {
            // Refusals of earlier ones come as errors.
            let _ = socket.send_to(b"x", to);
        }
    }
    let listed = lab.listed();
    let rule = &listed.chains["cali-rf-calipod1"].rules[0].rule;
    let (dropped, _) = rule.counter().expect("a counter");
    let least = 100 - u64::from(allowance(1.0, 20, start.elapsed()));
    // An error instead of sending takes a few away.
    assert!(
        dropped + 50 >= least && dropped > 0,
        "{dropped} dropped, {least} of 100 have to be"
    );
}

fn connect(from: &TestNs, to: IpAddr) -> std::io::Result<TcpStream> {
    let to = SocketAddr::new(to, 4000);
    let connect = || TcpStream::connect_timeout(&to, LIMIT);
    from.netns().run(connect).expect("enter")
}

#[test]
fn connections_beyond_the_limit_are_reset_until_one_ends() {
    for by in BACKENDS {
        let mut lab = Lab::with(1, by);
        for (key, sends) in [("egress", true), ("ingress", false)] {
            let mut controls = json!({});
            controls[format!("{key}MaxConnections")] = json!(2);
            enforce(&mut lab, &controls);
            for v4 in [true, false] {
                let (pod, world) = (&lab.pods[0], &lab.world);
                let (from, to) = if sends { (pod, world) } else { (world, pod) };
                let bind = || eventually(LIMIT, || TcpListener::bind("[::]:4000"));
                let listener = to.ns.netns().run(bind).expect("enter");
                let mut open: Vec<TcpStream> = Vec::new();
                // Ends of the last round's connections may still be on their way.
                eventually(LIMIT, || {
                    while open.len() < 2 {
                        open.push(connect(&from.ns, to.address(v4))?);
                    }
                    Ok::<_, std::io::Error>(())
                });
                let third = connect(&from.ns, to.address(v4));
                let error = third.expect_err("a third connection");
                assert_eq!(
                    error.kind(),
                    ErrorKind::ConnectionRefused,
                    "{by:?} {key}: {error}"
                );
                // Both ends close, so that the flow ends.
                drop(open.pop());
                drop((0..2).map(|_| listener.accept()).collect::<Vec<_>>().pop());
                let again = eventually(LIMIT, || connect(&from.ns, to.address(v4)));
                drop((again, open, listener));
            }
        }
    }
}

/// Packets with the code point that came in, of each family.
fn marked(place: &Place) -> [u64; 2] {
    let text = place
        .ns
        .run("nft", &["-j", "list", "table", "inet", "seen"]);
    let value: Value = serde_json::from_str(&text).expect("JSON");
    let counters = value["nftables"].as_array().expect("objects");
    let count = |name: &str| {
        let of_name = |object: &&Value| object["counter"]["name"] == name;
        let counter = counters.iter().find(of_name).expect("the counter");
        counter["counter"]["packets"].as_u64().expect("a number")
    };
    ["four", "six"].map(count)
}

#[test]
fn packets_out_of_the_cluster_carry_the_code_point_and_no_others() {
    for by in BACKENDS {
        let mut lab = Lab::with(2, by);
        for place in [&lab.world, &lab.lan, &lab.pods[1]] {
            // An independent judge, who sees only what the receiver's IP has found whole.
            for words in [
                "add table inet seen",
                "add counter inet seen four",
                "add counter inet seen six",
                "add chain inet seen in { type filter hook prerouting priority 0; }",
                "add rule inet seen in ip dscp af31 counter name four",
                "add rule inet seen in ip6 dscp af31 counter name six",
            ] {
                place.ns.run("nft", &[words]);
            }
        }
        let reach = |lab: &Lab| {
            for place in [&lab.world, &lab.lan, &lab.pods[1]] {
                let _listener = listen(place.ns.netns(), Probe::Tcp(4000));
                for v4 in [true, false] {
                    let answered = probe(
                        lab.pods[0].ns.netns(),
                        place.address(v4),
                        Probe::Tcp(4000),
                        0,
                    );
                    assert_eq!(answered, Ok(true), "{by:?} to {}", place.address(v4));
                }
            }
        };
        enforce(&mut lab, &json!({"dscp": "AF31"}));
        reach(&lab);
        let [four, six] = marked(&lab.world);
        assert!(four > 0 && six > 0, "{by:?}:\n{}", lab.ruleset());
        assert_eq!(marked(&lab.pods[1]), [0, 0], "{by:?}: a pod");
        assert_eq!(marked(&lab.lan), [0, 0], "{by:?}: another node");

        enforce(&mut lab, &Value::Null);
        let before = marked(&lab.world);
        reach(&lab);
        assert_eq!(
            marked(&lab.world),
            before,
            "{by:?}: without a code point any more"
        );
        let text = lab.ruleset();
        assert!(!text.contains("dscp"), "{by:?}: left in\n{text}");
    }
}
