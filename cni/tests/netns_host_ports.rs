//! Ports and addresses of the host that lead to containers, with real packets.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "netns_plugin needs all of it")]
mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cali_netlink::testing::TestNs;
use serde_json::{Value, json};
use support::{Call, Node, address, soon};

const MOMENT: Duration = Duration::from_millis(10);
/// How long something that must not be answered is listened for.
const SILENCE: Duration = Duration::from_millis(500);

/// Answers on TCP and UDP with a name and the address that it sees.
struct Answering(Arc<AtomicBool>);

impl Answering {
    fn start(pod: &TestNs, port: u16, name: &'static str) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let any = SocketAddr::from(([0u16; 8], port));
        let (tcp, udp) = pod
            .netns()
            .run(move || {
                (
                    TcpListener::bind(any).unwrap(),
                    UdpSocket::bind(any).unwrap(),
                )
            })
            .unwrap();
        tcp.set_nonblocking(true).unwrap();
        udp.set_nonblocking(true).unwrap();
        let end = Arc::clone(&ended);
        std::thread::spawn(move || {
            let mut text = [0; 16];
            while !end.load(Ordering::Relaxed) {
                if let Ok((mut stream, from)) = tcp.accept() {
                    let _ = stream.write_all(format!("{name} {}", plain(from)).as_bytes());
                } else if let Ok((_, from)) = udp.recv_from(&mut text) {
                    let _ = udp.send_to(format!("{name} {}", plain(from)).as_bytes(), from);
                } else {
                    std::thread::sleep(MOMENT);
                }
            }
        });
        Self(ended)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// `::ffff:192.0.2.1` is how a socket of both families shows IPv4.
fn plain(from: SocketAddr) -> IpAddr {
    from.ip().to_canonical()
}

/// What is answered over TCP; nothing if nobody answers.
fn tcp(from: &TestNs, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    let ask = move || {
        let mut stream = TcpStream::connect_timeout(&to, support::PATIENCE).ok()?;
        stream.set_read_timeout(Some(support::PATIENCE)).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    };
    from.netns().run(ask).unwrap()
}

/// What is answered over UDP within the time.
fn udp(socket: &UdpSocket, to: &str, within: Duration) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    let end = Instant::now() + within;
    let mut text = [0; 100];
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    while Instant::now() < end {
        // An ICMP error of an earlier try is told here.
        let _ = socket.send_to(b"?", to);
        if let Ok((len, _)) = socket.recv_from(&mut text) {
            return Some(String::from_utf8_lossy(&text[..len]).into_owned());
        }
    }
    None
}

fn socket(from: &TestNs, v4: bool) -> UdpSocket {
    let any: SocketAddr = if v4 { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
    from.netns()
        .run(move || UdpSocket::bind(any).unwrap())
        .unwrap()
}

/// A host with two addresses, and somebody beyond its link.
async fn scene(label: &str) -> (Node, TestNs) {
    let node = Node::new(label).await;
    let outside = TestNs::new("cniout");
    node.host
        .run("sysctl", &["-qw", "net.ipv6.conf.all.forwarding=1"]);
    let (here, there) = node.host.veth("uplink", &outside, "far").await;
    node.host.ip("link set uplink up");
    for address in ["192.0.2.1/24", "192.0.2.11/24", "2001:db8::1/64"] {
        let nodad = if address.contains("::") { " nodad" } else { "" };
        node.host
            .ip(&format!("address add {address} dev uplink{nodad}"));
    }
    assert!(here > 0 && there > 0);
    outside.ip("address add 192.0.2.2/24 dev far");
    outside.ip("address add 2001:db8::2/64 dev far nodad");
    outside.ip("route add default via 192.0.2.1");
    outside.ip("-6 route add default via 2001:db8::1");
    (node, outside)
}

fn add<'a>(name: &'a str, container: &'a str, pod: &'a TestNs, ports: Value) -> Call<'a> {
    Call::new("ADD", name, container, pod.name())
        .with(
            "ipam",
            json!({"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": "true"}),
        )
        .with("runtimeConfig", json!({"portMappings": ports}))
}

fn del(add: &Call<'_>) -> Call<'static> {
    Call {
        command: "DEL",
        container: Box::leak(add.container.to_owned().into_boxed_str()),
        netns: "",
        pod: Box::leak(add.pod.to_owned().into_boxed_str()),
        program: env!("CARGO_BIN_EXE_calico"),
        ifname: "eth0",
        config: add.config.clone(),
    }
}

fn mapping(protocol: &str, host: u16, container: u16, host_ip: &str) -> Value {
    json!({"hostPort": host, "containerPort": container, "protocol": protocol, "hostIP": host_ip})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_port_leads_to_its_container_from_everywhere() {
    let (mut node, outside) = scene("cniport").await;
    let (pod, other) = (TestNs::new("cnipod"), TestNs::new("cnipod"));
    node.pod("p", json!({})).await;
    node.pod("q", json!({})).await;
    let ports = json!([
        mapping("tcp", 8080, 80, ""),
        mapping("udp", 8080, 80, ""),
        mapping("tcp", 8081, 80, "192.0.2.11"),
        mapping("tcp", 8082, 80, "0.0.0.0"),
        mapping("tcp", 8083, 80, "127.0.0.1"),
    ]);
    let call = add("p", "c1", &pod, ports);
    let result = node.call(&call).ok();
    let own = address(&result, 0);
    node.call(&add("q", "c2", &other, json!([]))).ok();
    let _server = Answering::start(&pod, 80, "p");

    let seen = |text: &str| Some(format!("p {text}"));
    assert_eq!(
        tcp(&outside, "192.0.2.1:8080"),
        seen("192.0.2.2"),
        "the client's address stays"
    );
    assert_eq!(tcp(&outside, "[2001:db8::1]:8080"), seen("2001:db8::2"));
    assert_eq!(
        udp(&socket(&outside, true), "192.0.2.1:8080", support::PATIENCE),
        seen("192.0.2.2")
    );
    assert_eq!(
        udp(
            &socket(&outside, false),
            "[2001:db8::1]:8080",
            support::PATIENCE
        ),
        seen("2001:db8::2")
    );
    assert_eq!(tcp(&outside, "192.0.2.11:8081"), seen("192.0.2.2"));
    assert_eq!(
        tcp(&outside, "192.0.2.1:8081"),
        None,
        "only the address that was asked for"
    );
    assert_eq!(tcp(&outside, "192.0.2.1:8082"), seen("192.0.2.2"));
    assert_eq!(
        tcp(&outside, "[2001:db8::1]:8082"),
        None,
        "only IPv4 was asked for"
    );
    assert_eq!(tcp(&outside, "192.0.2.1:8083"), None);
    assert!(
        tcp(&node.host, "127.0.0.1:8080").is_some(),
        "the host by its loopback address"
    );
    assert!(tcp(&node.host, "127.0.0.1:8083").is_some());
    assert!(
        tcp(&node.host, "192.0.2.1:8080").is_some(),
        "the host by its own address"
    );
    assert!(
        udp(
            &socket(&node.host, true),
            "127.0.0.1:8080",
            support::PATIENCE
        )
        .is_some()
    );
    assert!(
        tcp(&other, "192.0.2.1:8080").is_some(),
        "another container of the host"
    );
    let hairpin = tcp(&pod, "192.0.2.1:8080").expect("the container itself, through the host");
    assert_ne!(
        hairpin,
        format!("p {own}"),
        "else the answer would not come back through the host"
    );
    assert!(tcp(&pod, "[2001:db8::1]:8080").is_some());

    // A container gets nowhere by the host's loopback address, although the host answers to it on this interface.
    let secret = node
        .host
        .netns()
        .run(|| UdpSocket::bind("127.0.0.1:7").unwrap())
        .unwrap();
    secret.set_read_timeout(Some(SILENCE)).unwrap();
    pod.run("sysctl", &["-qw", "net.ipv4.conf.all.route_localnet=1"]);
    pod.ip("route del local 127.0.0.0/8 dev lo table local");
    pod.ip("route del local 127.0.0.1 dev lo table local");
    pod.ip("route add 127.0.0.0/8 via 169.254.1.1 dev eth0");
    let from = socket(&pod, true);
    let _ = from.send_to(b"?", "127.0.0.1:7");
    assert!(
        secret.recv_from(&mut [0; 4]).is_err(),
        "the guard lets a container reach 127.0.0.1"
    );
    node.stop();
    node.host.run("nft", &["flush chain inet calico-nat guard"]);
    secret.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let _ = from.send_to(b"?", "127.0.0.1:7");
    assert!(
        secret.recv_from(&mut [0; 4]).is_ok(),
        "without the guard it would come through"
    );
    node.start();

    node.call(&del(&call)).ok();
    assert_eq!(tcp(&outside, "192.0.2.1:8080"), None);
    assert!(
        !node
            .host
            .run("nft", &["list", "tables"])
            .contains("calico-nat"),
        "nothing remains"
    );
    assert_eq!(
        std::fs::read_dir(node.state_dir().join("cni-translations"))
            .unwrap()
            .count(),
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_floating_address_leads_to_its_container_and_nothing_else_goes_by_it() {
    let (node, outside) = scene("cnifloat").await;
    let (pod, other) = (TestNs::new("cnipod"), TestNs::new("cnipod"));
    let floating = r#"["198.51.100.7", "2001:db8:7::7"]"#;
    node.pod("p", json!({"cni.projectcalico.org/floatingIPs": floating}))
        .await;
    node.pod("q", json!({})).await;
    let call = add("p", "c1", &pod, json!([]));
    let refused = node.call(&call);
    assert_eq!(refused.code(), 102);
    assert!(
        refused.printed["msg"]
            .as_str()
            .unwrap()
            .contains("feature_control.floating_ips"),
        "{refused:?}"
    );
    assert!(
        !node.host.ip("-br link").contains("cali"),
        "nothing is left"
    );
    let call = call.with("feature_control", json!({"floating_ips": true}));
    let own = address(&node.call(&call).ok(), 0);
    node.call(&add("q", "c2", &other, json!([]))).ok();
    let _server = Answering::start(&pod, 80, "p");
    let seen = |text: &str| Some(format!("p {text}"));
    assert_eq!(tcp(&outside, "198.51.100.7:80"), seen("192.0.2.2"));
    assert_eq!(tcp(&outside, "[2001:db8:7::7]:80"), seen("2001:db8::2"));
    assert_eq!(
        udp(
            &socket(&outside, true),
            "198.51.100.7:80",
            support::PATIENCE
        ),
        seen("192.0.2.2")
    );
    // The kernel asks for a way before it translates what the host itself sends.
    node.host.ip("route add default via 192.0.2.2");
    assert!(tcp(&node.host, "198.51.100.7:80").is_some(), "the host");
    assert!(
        tcp(&other, "198.51.100.7:80").is_some(),
        "another container"
    );
    assert_eq!(
        tcp(&pod, "198.51.100.7:80"),
        seen("198.51.100.7"),
        "a container that calls itself: else the answer would not come back through the host"
    );
    // As with Calico, what the container begins has its own address.
    let _theirs = Answering::start(&outside, 90, "o");
    assert_eq!(tcp(&pod, "192.0.2.2:90"), Some(format!("o {own}")));

    node.call(&del(&call)).ok();
    assert_eq!(
        udp(&socket(&outside, true), "198.51.100.7:80", SILENCE),
        None
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_ports_outlive_the_server_and_whoever_flushes_them() {
    let (mut node, outside) = scene("cniport").await;
    let pod = TestNs::new("cnipod");
    node.pod("p", json!({})).await;
    let call = add("p", "c1", &pod, json!([mapping("TCP", 8080, 80, "")]));
    let result = node.call(&call).ok();
    let _server = Answering::start(&pod, 80, "p");
    let answers = || tcp(&outside, "192.0.2.1:8080").is_some();
    assert!(answers());
    let check = Call {
        command: "CHECK",
        ..call.clone()
    }
    .with("prevResult", result);
    node.call(&check).ok();
    node.host.run("nft", &["flush", "ruleset"]);
    soon("the table to come back", async || answers()).await;
    node.stop();
    assert!(answers(), "the kernel goes on alone");
    node.host.run("nft", &["flush", "ruleset"]);
    assert!(!answers());
    node.start();
    soon("the next server to write it", async || answers()).await;
    node.call(&check).ok();
    // With the server away DEL is completed by the next one.
    node.stop();
    node.call(&del(&call)).ok();
    node.start();
    soon("the end of the port", async || !answers()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_sees_a_host_port_that_is_gone() {
    let (node, _outside) = scene("cniport").await;
    let pod = TestNs::new("cnipod");
    node.pod("p", json!({})).await;
    let call = add("p", "c1", &pod, json!([mapping("tcp", 8080, 80, "")]));
    let result = node.call(&call).ok();
    let check = Call {
        command: "CHECK",
        ..call.clone()
    }
    .with("prevResult", result);
    let wrong = "flush map inet calico-nat ports4; add element inet calico-nat ports4 { tcp . 8080 : 10.0.0.1 . 80 }";
    // It is put right at once, so one look may come too late.
    soon("CHECK to see it", async || {
        node.host.run("nft", &[wrong]);
        let answer = node.call(&check);
        !answer.success && answer.code() == 103
    })
    .await;
    soon("it to be put right", async || node.call(&check).success).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_udp_client_that_came_too_early_is_led_to_the_container() {
    let (node, outside) = scene("cniport").await;
    let pod = TestNs::new("cnipod");
    node.pod("p", json!({})).await;
    let early = socket(&outside, true);
    assert_eq!(udp(&early, "192.0.2.1:8080", SILENCE), None);
    node.call(&add("p", "c1", &pod, json!([mapping("udp", 8080, 80, "")])))
        .ok();
    let _server = Answering::start(&pod, 80, "p");
    assert!(udp(&early, "192.0.2.1:8080", support::PATIENCE).is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_younger_sandbox_has_the_port_and_garbage_collection_frees_it() {
    let (node, outside) = scene("cniport").await;
    let (old, young) = (TestNs::new("cnipod"), TestNs::new("cnipod"));
    node.pod("p", json!({})).await;
    node.pod("q", json!({})).await;
    let ports = json!([mapping("tcp", 8080, 80, "")]);
    node.call(&add("p", "c1", &old, ports.clone())).ok();
    let second = add("q", "c2", &young, ports.clone());
    node.call(&second).ok();
    let _servers = (
        Answering::start(&old, 80, "old"),
        Answering::start(&young, 80, "young"),
    );
    let who =
        || tcp(&outside, "192.0.2.1:8080").map(|text| text.split(' ').next().unwrap().to_owned());
    assert_eq!(who().as_deref(), Some("young"));
    node.call(&del(&second)).ok();
    assert_eq!(who().as_deref(), Some("old"), "it has the port again");
    old.ip("link del eth0");
    node.call(&Call::new("GC", "", "", "").with("cni.dev/valid-attachments", json!([])))
        .ok();
    assert!(
        !node
            .host
            .run("nft", &["list", "tables"])
            .contains("calico-nat")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mapping_that_cannot_be_is_refused_and_nothing_is_left() {
    let node = Node::new("cniport").await;
    let pod = TestNs::new("cnipod");
    node.pod("p", json!({})).await;
    let answer = node.call(&add("p", "c1", &pod, json!([mapping("tcp", 0, 80, "")])));
    assert_eq!(answer.code(), 7);
    assert!(
        answer.printed["msg"]
            .as_str()
            .unwrap()
            .contains("hostPort 0"),
        "{answer:?}"
    );
    assert!(node.keeper.attachments().await.is_empty());
    assert!(!pod.ip("-br link").contains("eth0"));
}
