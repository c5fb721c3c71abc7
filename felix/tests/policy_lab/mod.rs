//! A node and its pods as network namespaces, and probes between them with real packets.
//!
//! Denied packets are rejected, not dropped, so that every probe ends with an answer: a connection,
//! or the kernel's refusal. Neither within the limit is an error of the lab, not a verdict.

// Each test file uses its part of the lab.
#![allow(dead_code)]

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use cali_api::Key;
use cali_netlink::NetNs;
use cali_netlink::nft::{Family, Nft, TableName};
use cali_netlink::testing::{TestNs, eventually};
use felix::calc::Direction;
use felix::compile::{Program, Touched, plan_transaction};
use felix::dataplane::{Iptables, Variant};
use felix::iptables;
use felix::verdict::{Model, Outcome, Packet};
use socket2::{Domain, Protocol, Socket, Type};

/// How long a probe may take. It only ends a test that fails anyway.
const LIMIT: Duration = Duration::from_secs(10);
const HOST_MAC: &str = "ee:ee:ee:ee:ee:ee";

/// What a probe sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Probe {
    Tcp(u16),
    Udp(u16),
    Ping,
}

impl Probe {
    /// The first packet of the probe.
    pub(crate) fn packet(self, source: IpAddr, destination: IpAddr, source_port: u16) -> Packet {
        let (protocol, destination_port, icmp) = match (self, source.is_ipv4()) {
            (Self::Tcp(port), _) => (6, port, None),
            (Self::Udp(port), _) => (17, port, None),
            (Self::Ping, true) => (1, 0, Some((8, 0))),
            (Self::Ping, false) => (58, 0, Some((128, 0))),
        };
        Packet {
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            icmp,
        }
    }
}

/// A place that packets come from and go to: a pod, or somebody outside (the last one).
pub(crate) struct Place {
    pub(crate) ns: TestNs,
    pub(crate) interface: String,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Place {
    pub(crate) fn address(&self, v4: bool) -> IpAddr {
        if v4 { self.v4.into() } else { self.v6.into() }
    }
}

/// What enforces policy in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Nftables,
    Iptables(Variant),
}

pub(crate) const BACKENDS: [Backend; 3] = [
    Backend::Nftables,
    Backend::Iptables(Variant::Nft),
    Backend::Iptables(Variant::Legacy),
];

/// A node, its pods and the world.
pub(crate) struct Lab {
    pub(crate) backend: Backend,
    iptables: Option<Iptables>,
    pub(crate) node: TestNs,
    pub(crate) pods: Vec<Place>,
    pub(crate) world: Place,
    nft: Nft,
    current: Program,
}

impl Lab {
    pub(crate) fn new(pods: u8) -> Self {
        Self::with(pods, Backend::Nftables)
    }

    pub(crate) fn with(pods: u8, backend: Backend) -> Self {
        let node = TestNs::new("node");
        for setting in [
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            // Refusals are answers of the test: none may be withheld.
            "net.ipv4.icmp_ratelimit=0",
            "net.ipv6.icmp.ratelimit=0",
        ] {
            node.run("sysctl", &["-qw", setting]);
        }
        let pods = (1..=pods).map(|number| pod(&node, number)).collect();
        let world = world(&node);
        let nft = Nft::open(node.netns()).expect("open nf_tables");
        let iptables = match backend {
            Backend::Nftables => None,
            Backend::Iptables(variant) => {
                let adopted = Iptables::adopt(node.netns(), variant, Instant::now());
                Some(adopted.expect("adopt the chains"))
            }
        };
        Self {
            backend,
            iptables,
            node,
            pods,
            world,
            nft,
            current: Program::absent(),
        }
    }

    /// Brings the kernel to a program with one transaction, and reads back that it is there.
    pub(crate) fn enforce(&mut self, desired: &Program) {
        let plan = plan_transaction(&self.current, desired);
        let touched = Touched::all(&self.current, desired);
        if !plan.is_empty() {
            let committed = self
                .nft
                .commit(plan.transaction)
                .unwrap_or_else(|rejected| panic!("{rejected:?}"));
            self.current
                .adopt(desired, &touched, &plan.outcome, &committed.rule_handles);
        }
        let listed = self.listed();
        let audit = plan_transaction(&listed, desired);
        assert!(
            audit.is_empty(),
            "the kernel differs from what was sent:\n{}",
            self.ruleset()
        );
        let handles = |program: &Program| -> Vec<Option<u64>> {
            program
                .chains
                .values()
                .flat_map(|chain| chain.rules.iter().map(|rule| rule.handle))
                .collect()
        };
        assert_eq!(
            handles(&self.current),
            handles(&listed),
            "handles of rules are known without a dump"
        );
    }

    /// Brings the kernel to chains and sets, and reads back that they are there.
    pub(crate) fn enforce_chains(&mut self, desired: &iptables::Program) {
        let Backend::Iptables(variant) = self.backend else {
            panic!("a lab of {:?}", self.backend)
        };
        let kernel = self.iptables.as_mut().expect("a lab of iptables");
        kernel.touch_all(desired);
        kernel.apply(desired, Instant::now());
        let told = (kernel.refused(), kernel.problem().map(str::to_owned));
        assert!(kernel.is_complete(), "{told:?}\n{}", self.ruleset());
        let seen = Iptables::adopt(self.node.netns(), variant, Instant::now()).expect("adopt");
        let differing = seen.differing(desired);
        assert!(differing.is_empty(), "{differing:?}\n{}", self.ruleset());
    }

    /// Takes a dump for what is in the kernel.
    pub(crate) fn assume(&mut self, listed: Program) {
        self.current = listed;
    }

    pub(crate) fn listed(&self) -> Program {
        let table = TableName::new(Family::Inet, "calico");
        let read = || -> cali_netlink::Result<Program> {
            let mut sets = Vec::new();
            for listed in self.nft.sets(&table)? {
                let elements = self.nft.elements(&table, &listed.set)?;
                sets.push((listed.set, elements));
            }
            let chains = self.nft.chains(Some(&table))?;
            Ok(Program::listed(
                table.clone(),
                chains,
                self.nft.rules(&table, None)?,
                sets,
            ))
        };
        read().expect("list the table")
    }

    /// What `nft` itself makes of the rules: for messages of failed tests.
    pub(crate) fn ruleset(&self) -> String {
        match self.backend {
            Backend::Nftables => self.node.run("nft", &["list", "ruleset"]),
            Backend::Iptables(variant) => ["iptables", "ip6tables"]
                .map(|family| {
                    self.node
                        .run(&format!("{family}-{}-save", variant.name()), &["-c"])
                })
                .join("\n"),
        }
    }
}

fn pod(node: &TestNs, number: u8) -> Place {
    let ns = TestNs::new("pod");
    let interface = format!("calipod{number}");
    let v4 = Ipv4Addr::new(10, 65, 0, number);
    let v6 = Ipv6Addr::new(0xfd65, 0, 0, 0, 0, 0, 0, number.into());
    let mac = format!("02:00:00:00:00:{number:02x}");
    node.ip(&format!(
        "link add {interface} type veth peer name eth0 netns {}",
        ns.name()
    ));
    node.ip(&format!("link set {interface} address {HOST_MAC} up"));
    ns.ip(&format!("link set eth0 address {mac} up"));
    ns.ip(&format!("addr add {v4}/32 dev eth0"));
    ns.ip(&format!("-6 addr add {v6}/128 dev eth0 nodad"));
    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        ns.ip(&format!(
            "{family} neigh add {gateway} lladdr {HOST_MAC} dev eth0 nud permanent"
        ));
        ns.ip(&format!(
            "{family} route add default via {gateway} dev eth0 onlink"
        ));
    }
    for address in [IpAddr::from(v4), v6.into()] {
        node.ip(&format!(
            "neigh add {address} lladdr {mac} dev {interface} nud permanent"
        ));
        node.ip(&format!("route add {address} dev {interface}"));
    }
    ns.run("sysctl", &["-qw", "net.ipv4.ping_group_range=0 0"]);
    Place {
        ns,
        interface,
        v4,
        v6,
    }
}

fn world(node: &TestNs) -> Place {
    let ns = TestNs::new("world");
    node.ip(&format!(
        "link add eth0 type veth peer name eth0 netns {}",
        ns.name()
    ));
    node.ip("link set eth0 up");
    ns.ip("link set eth0 up");
    node.ip("addr add 192.0.2.1/24 dev eth0");
    node.ip("-6 addr add 2001:db8::1/64 dev eth0 nodad");
    ns.ip("addr add 192.0.2.2/24 dev eth0");
    ns.ip("-6 addr add 2001:db8::2/64 dev eth0 nodad");
    ns.ip("route add default via 192.0.2.1");
    ns.ip("-6 route add default via 2001:db8::1");
    ns.run("sysctl", &["-qw", "net.ipv4.ping_group_range=0 0"]);
    Place {
        ns,
        interface: "eth0".to_owned(),
        v4: Ipv4Addr::new(192, 0, 2, 2),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2),
    }
}

/// What the model says: out of the sender's endpoint and into the receiver's.
pub(crate) fn expected(model: &Model, packet: &Packet) -> (bool, String) {
    let ends = [
        (packet.source, Direction::Egress),
        (packet.destination, Direction::Ingress),
    ];
    let known: Vec<(Key, Direction)> = ends
        .into_iter()
        .filter_map(|(addr, direction)| Some((model.endpoint_of(addr)?, direction)))
        .collect();
    let mut reasons = Vec::new();
    for (endpoint, direction) in known {
        let verdict = model.verdict(&endpoint, packet, direction);
        reasons.push(format!(
            "{direction} {:?} by {}",
            verdict.outcome, verdict.reason
        ));
        if verdict.outcome == Outcome::Deny {
            return (false, reasons.join(", "));
        }
    }
    (true, reasons.join(", "))
}

/// Somebody who answers; ends with the value.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
    None,
}

impl Listener {
    /// Takes the connections that wait, so that a listener of many probes has room for more.
    pub(crate) fn drain(&self) {
        if let Self::Tcp(listener) = self {
            listener.set_nonblocking(true).expect("a listener");
            while listener.accept().is_ok() {}
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Udp(socket) = self {
            // The answering thread reads its own empty datagram and ends.
            if let Ok(own) = socket.local_addr() {
                let _ =
                    socket.send_to(&[], SocketAddr::new(Ipv6Addr::LOCALHOST.into(), own.port()));
            }
        }
    }
}

/// A program that another thread starts holds the sockets of this process, also those that are closed meanwhile, until it
/// has become that program: their ports are free a little later.
pub(crate) fn patiently<T>(bind: impl FnMut() -> std::io::Result<T>) -> T {
    eventually(LIMIT, bind)
}

/// Listens on both families.
pub(crate) fn listen(ns: &NetNs, probe: Probe) -> Listener {
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    ns.run(|| match probe {
        Probe::Tcp(port) => Listener::Tcp(patiently(|| TcpListener::bind(any(port)))),
        Probe::Udp(port) => {
            let socket = patiently(|| UdpSocket::bind(any(port)));
            let answering = socket.try_clone().expect("a second handle");
            thread::spawn(move || {
                let mut data = [0; 64];
                while let Ok((len, from)) = answering.recv_from(&mut data) {
                    if len == 0 {
                        break;
                    }
                    let _ = answering.send_to(&data[..len], from);
                }
            });
            Listener::Udp(socket)
        }
        Probe::Ping => Listener::None,
    })
    .expect("enter the namespace")
}

/// Whether the other end answers; an error when neither an answer nor a refusal comes.
pub(crate) fn probe(
    ns: &NetNs,
    to: IpAddr,
    probe: Probe,
    source_port: u16,
) -> Result<bool, String> {
    let outcome = ns
        .run(|| -> std::io::Result<()> {
            match probe {
                Probe::Tcp(port) => {
                    let socket = bound(to, Type::STREAM, Protocol::TCP, source_port)?;
                    socket.connect_timeout(&SocketAddr::new(to, port).into(), LIMIT)?;
                    drop(TcpStream::from(socket));
                    Ok(())
                }
                Probe::Udp(port) => {
                    let socket = bound(to, Type::DGRAM, Protocol::UDP, source_port)?;
                    exchange(&socket, SocketAddr::new(to, port), b"probe")
                }
                Probe::Ping => {
                    let (protocol, request) = match to {
                        IpAddr::V4(_) => (Protocol::ICMPV4, [8, 0, 0, 0, 0, 0, 0, 1]),
                        IpAddr::V6(_) => (Protocol::ICMPV6, [128, 0, 0, 0, 0, 0, 0, 1]),
                    };
                    let socket = bound(to, Type::DGRAM, protocol, 0)?;
                    exchange(&socket, SocketAddr::new(to, 0), &request)
                }
            }
        })
        .map_err(|error| error.to_string())?;
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error.to_string()),
    }
}

fn bound(to: IpAddr, kind: Type, protocol: Protocol, source_port: u16) -> std::io::Result<Socket> {
    let (domain, any) = match to {
        IpAddr::V4(_) => (Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        IpAddr::V6(_) => (Domain::IPV6, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
    };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_read_timeout(Some(LIMIT))?;
    if source_port != 0 {
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(any, source_port).into())?;
    }
    Ok(socket)
}

fn exchange(socket: &Socket, to: SocketAddr, request: &[u8]) -> std::io::Result<()> {
    use std::io::Read;
    socket.connect(&to.into())?;
    socket.send(request)?;
    let mut answer = [0; 64];
    let len = (&mut &*socket).read(&mut answer)?;
    if len == 0 {
        Err(ErrorKind::UnexpectedEof.into())
    } else {
        Ok(())
    }
}
