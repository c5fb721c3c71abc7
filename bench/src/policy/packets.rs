//! A pod that sends to two pods through the node: one with a single policy, one with many. Everything else on the
//! two paths is the same, and rounds alternate between them, so that their ratio means something on a busy machine.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cali_api::AnyResource;
use cali_api::update::Update;
use cali_netlink::NetNs;
use cali_netlink::conntrack::Conntrack;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockProtocol, SockType, SockaddrIn, sendmmsg,
    socket,
};
use serde_json::json;

/// Packets of one system call.
const BURST: usize = 64;
/// 64 octets on the wire without Ethernet: IPv4 and UDP headers and this.
const PAYLOAD: usize = 36;
/// Both policies' rules allow it.
const PORT: u16 = 8080;

/// Pods of the bench: the sender, and the two receivers.
pub(super) const SENDER: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);

/// One of the two paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// To the pod with one policy.
    One,
    /// To the pod with many.
    Many,
}

impl Path {
    /// The receiver's address.
    #[must_use]
    pub const fn address(self) -> Ipv4Addr {
        match self {
            Self::One => Ipv4Addr::new(10, 66, 0, 2),
            Self::Many => Ipv4Addr::new(10, 66, 0, 3),
        }
    }

    /// Its number among the pods.
    #[must_use]
    pub const fn pod(self) -> usize {
        match self {
            Self::One => 1,
            Self::Many => 2,
        }
    }
}

/// What was measured per second.
#[derive(Debug, Clone, Default)]
pub struct Rates {
    /// Packets of one established flow.
    pub established: Vec<f64>,
    /// Packets, each the first of its flow.
    pub new_flows: Vec<f64>,
    /// TCP connections, opened and closed.
    pub connections: Vec<f64>,
}

impl Rates {
    /// The middle value.
    #[must_use]
    pub fn median(values: &[f64]) -> f64 {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    }
}

fn update(manifest: &serde_json::Value) -> Result<Update> {
    let value = AnyResource::from_json(manifest.clone()).context("a manifest of the bench")?;
    Ok(Update {
        key: value.key(),
        value: Some(std::sync::Arc::new(value)),
        revision: cali_api::Revision::from("1"),
    })
}

/// The pods' endpoints, sets of peers, and policies: one for the first receiver, `policies` of `rules` rules for
/// the second. Each rule allows one of 100 groups of peers to one of 50 ports; the sender is in one group only, and
/// its port is allowed to that group by the last policy alone.
pub fn policies_for(policies: usize, rules: usize) -> Result<Vec<Update>> {
    let mut all = vec![update(
        &json!({"apiVersion": "projectcalico.org/v3", "kind": "Tier",
        "metadata": {"name": "default"}, "spec": {"order": 1_000_000}}),
    )?];
    all.push(update(&json!({"apiVersion": "projectcalico.org/v3", "kind": "Profile",
        "metadata": {"name": "open"}, "spec": {"ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}}))?);
    for (number, role) in ["sender", "one", "many"].iter().enumerate() {
        let address = Ipv4Addr::from(SENDER.to_bits() + u32::try_from(number)?);
        all.push(update(&json!({"apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
            "metadata": {"namespace": "default", "name": format!("here-k8s-{role}-eth0"), "labels": {"role": role}},
            "spec": {"orchestrator": "k8s", "node": super::NODE, "pod": role, "endpoint": "eth0",
                "interfaceName": format!("calipod{number}"), "ipNetworks": [format!("{address}/32")], "profiles": ["open"]}}))?);
    }
    for group in 0..100_u8 {
        let nets: Vec<String> = (0..20)
            .map(|host| format!("10.67.{group}.{host}/32"))
            .collect();
        all.push(update(&json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
            "metadata": {"name": format!("group{group}"), "labels": {"group": format!("g{group}")}}, "spec": {"nets": nets}}))?);
    }
    let policy = |name: String, receiver: &str, rules: Vec<serde_json::Value>| {
        update(
            &json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
            "metadata": {"name": name}, "spec": {"selector": format!("role == '{receiver}'"), "types": ["Ingress"], "ingress": rules}}),
        )
    };
    let from_sender = |protocol: &str| {
        json!({"action": "Allow", "protocol": protocol, "source": {"selector": "role == 'sender'"},
            "destination": {"ports": [PORT]}})
    };
    let both = || vec![from_sender("TCP"), from_sender("UDP")];
    all.push(policy("default.only".to_owned(), "one", both())?);
    for number in 0..policies {
        let mut own: Vec<_> = (0..rules)
            .map(|rule| {
                let index = number * rules + rule;
                json!({"action": "Allow", "protocol": if rule % 2 == 0 { "TCP" } else { "UDP" },
                    "source": {"selector": format!("group == 'g{}'", index % 100)},
                    "destination": {"ports": [8060 + (index / 7) % 50]}})
            })
            .collect();
        if number + 1 == policies {
            own.truncate(rules.saturating_sub(2));
            own.extend(both());
        }
        all.push(policy(format!("default.p{number:04}"), "many", own)?);
    }
    Ok(all)
}

/// A connected UDP flow that both ends have used.
pub fn established_flow(pods: &[NetNs], path: Path) -> Result<(UdpSocket, UdpSocket)> {
    let to = SocketAddr::new(path.address().into(), PORT);
    let server = pods[path.pod()].run(|| UdpSocket::bind(to))??;
    let client = pods[0].run(|| UdpSocket::bind((SENDER, 0)))??;
    client.connect(to)?;
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    }
    greet(&client, &server).with_context(|| format!("{path:?}"))?;
    Ok((client, server))
}

/// Both ends use the flow, so that it is an established one.
pub fn greet(client: &UdpSocket, server: &UdpSocket) -> Result<()> {
    const HELLO: &[u8] = b"hello";
    // What was sent to measure still fills the buffer.
    let mut data = [0; PAYLOAD];
    server.set_nonblocking(true)?;
    while server.recv(&mut data).is_ok() {}
    server.set_nonblocking(false)?;
    client.send(HELLO)?;
    let (_, from) = server.recv_from(&mut data).context("the first packet")?;
    server.send_to(HELLO, from)?;
    client.recv(&mut data).context("the answer")?;
    Ok(())
}

/// Sends so many packets on the flow; says how many per second.
pub fn send_established(client: &UdpSocket, packets: usize) -> Result<f64> {
    let payload = [0_u8; PAYLOAD];
    let slices = [[IoSlice::new(&payload)]; BURST];
    let mut headers = MultiHeaders::<()>::preallocate(BURST, None);
    let start = Instant::now();
    let mut sent = 0;
    while sent < packets {
        let results = sendmmsg(
            client.as_raw_fd(),
            &mut headers,
            slices.iter(),
            [None; BURST],
            [],
            MsgFlags::empty(),
        )?;
        sent += results.count();
    }
    Ok(rate(sent, start.elapsed()))
}

/// Sends so many packets, each from another port, as the kernel would send them: with a raw socket.
pub fn send_new(sender: &NetNs, path: Path, packets: usize) -> Result<f64> {
    ensure!(packets <= 60_000, "only so many ports");
    let raw: OwnedFd = sender.run(|| {
        socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Raw,
        )
    })??;
    let to = SockaddrIn::from(SocketAddrV4::new(path.address(), 0));
    let all: Vec<Vec<u8>> = (0..packets)
        .map(|number| datagram(path.address(), 1024 + number as u16))
        .collect();
    let mut headers = MultiHeaders::preallocate(BURST, None);
    let start = Instant::now();
    let mut sent = 0;
    for burst in all.chunks(BURST) {
        let slices: Vec<[IoSlice<'_>; 1]> = burst.iter().map(|data| [IoSlice::new(data)]).collect();
        let to = vec![Some(to); burst.len()];
        let results = sendmmsg(
            raw.as_raw_fd(),
            &mut headers,
            slices.iter(),
            to,
            [],
            MsgFlags::empty(),
        )?;
        sent += results.count();
    }
    Ok(rate(sent, start.elapsed()))
}

/// IPv4 and UDP headers (RFC 791 §3.1, RFC 768); the kernel fills in length, identification and checksum of the first,
/// the second's checksum may be absent.
fn datagram(to: Ipv4Addr, source_port: u16) -> Vec<u8> {
    let mut data = vec![0_u8; 28 + PAYLOAD];
    data[0] = 0x45;
    data[8] = 64;
    data[9] = 17;
    data[12..16].copy_from_slice(&SENDER.octets());
    data[16..20].copy_from_slice(&to.octets());
    data[20..22].copy_from_slice(&source_port.to_be_bytes());
    data[22..24].copy_from_slice(&PORT.to_be_bytes());
    data[24..26].copy_from_slice(&(8 + PAYLOAD as u16).to_be_bytes());
    data
}

fn rate(count: usize, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

/// Opens and closes so many connections.
pub fn connect(pods: &[NetNs], path: Path, connections: usize) -> Result<f64> {
    let to = SocketAddr::new(IpAddr::V4(path.address()), PORT);
    let listener = pods[path.pod()].run(|| TcpListener::bind(to))??;
    std::thread::scope(|scope| {
        let accepting = scope.spawn(move || {
            for _ in 0..connections {
                drop(listener.accept()?);
            }
            Ok::<_, std::io::Error>(())
        });
        let opened = pods[0].run(|| {
            let start = Instant::now();
            for _ in 0..connections {
                let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
                // A reset frees the port at once.
                let stream = reset_on_close(stream)?;
                drop(stream);
            }
            Ok::<_, std::io::Error>(start.elapsed())
        })?;
        let elapsed = match opened {
            Ok(elapsed) => elapsed,
            Err(error) => bail!("connection: {error}"),
        };
        match accepting.join() {
            Ok(accepted) => accepted?,
            Err(_) => bail!("the accepting thread has ended"),
        }
        Ok(rate(connections, elapsed))
    })
}

fn reset_on_close(stream: TcpStream) -> std::io::Result<TcpStream> {
    use nix::sys::socket::{setsockopt, sockopt};
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, sockopt::Linger, &linger)?;
    Ok(stream)
}

/// Packets that have come in at a pod's interface.
pub fn received(pod: &NetNs) -> Result<u64> {
    let text = pod
        .command("cat")
        .arg("/proc/net/dev")
        .output()
        .context("cannot read the interface's counters")?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .context("eth0 has no counters")
}

/// Forgets all flows of the node.
pub fn forget_flows(node: &NetNs) -> Result<()> {
    Conntrack::open(node)?.flush()?;
    Ok(())
}
