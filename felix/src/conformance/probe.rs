//! Probes: real packets, sent until an answer or a refusal comes.
//!
//! Denied packets are rejected, not dropped, so that every probe ends with an answer: of the receiver, or of the kernel
//! that refuses. Neither within the limit is an error of the lab, not a verdict, unless a case says that its denial is
//! silent.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::str::FromStr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cali_netlink::NetNs;
use socket2::{Domain, Protocol, Socket, Type};

use super::sctp;
use crate::verdict::Packet;

/// How long a probe may take. It only ends a test that fails anyway.
pub const LIMIT: Duration = Duration::from_secs(10);
/// How long a denial that no answer tells of is waited for.
const SILENCE: Duration = Duration::from_millis(700);

/// After this a datagram or an echo request is sent once more.
const AGAIN: Duration = Duration::from_secs(1);

/// What a probe sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Probe {
    /// A connection to this port.
    Tcp(u16),
    /// A datagram to this port.
    Udp(u16),
    /// An SCTP INIT to this port, made by hand: it needs no SCTP in the kernel.
    Sctp(u16),
    /// An echo request.
    Ping,
    /// An ICMP timestamp request; IPv4 only.
    Timestamp,
}

/// A text that is no probe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no probe (tcp:PORT, udp:PORT, sctp:PORT, ping or timestamp)")]
pub struct NoProbe(String);

impl FromStr for Probe {
    type Err = NoProbe;

    fn from_str(text: &str) -> Result<Self, NoProbe> {
        let port = |port: &str| port.parse().map_err(|_| NoProbe(text.to_owned()));
        match text.split_once(':') {
            Some(("tcp", number)) => Ok(Self::Tcp(port(number)?)),
            Some(("udp", number)) => Ok(Self::Udp(port(number)?)),
            Some(("sctp", number)) => Ok(Self::Sctp(port(number)?)),
            None if text == "ping" => Ok(Self::Ping),
            None if text == "timestamp" => Ok(Self::Timestamp),
            _ => Err(NoProbe(text.to_owned())),
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(port) => write!(f, "tcp:{port}"),
            Self::Udp(port) => write!(f, "udp:{port}"),
            Self::Sctp(port) => write!(f, "sctp:{port}"),
            Self::Ping => f.write_str("ping"),
            Self::Timestamp => f.write_str("timestamp"),
        }
    }
}

impl Probe {
    /// The first packet of the probe.
    #[must_use]
    pub fn packet(self, source: IpAddr, destination: IpAddr, source_port: u16) -> Packet {
        let (protocol, destination_port, icmp) = match (self, source.is_ipv4()) {
            (Self::Tcp(port), _) => (6, port, None),
            (Self::Udp(port), _) => (17, port, None),
            (Self::Sctp(port), _) => (132, port, None),
            (Self::Ping, true) => (1, 0, Some((8, 0))),
            (Self::Ping, false) => (58, 0, Some((128, 0))),
            (Self::Timestamp, _) => (1, 0, Some((13, 0))),
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

    /// Whether it can be sent over this family.
    #[must_use]
    pub fn exists(self, v4: bool) -> bool {
        v4 || self != Self::Timestamp
    }
}

/// What came of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The receiver answered.
    Yes,
    /// The kernel refused.
    Refused,
    /// Neither came within the limit.
    Silence,
    /// Something else.
    Failed(String),
}

impl Answer {
    /// Whether the packet passed; an error where that cannot be told.
    ///
    /// # Errors
    /// What came instead of an answer.
    pub fn verdict(&self, silent: bool) -> Result<bool, String> {
        match self {
            Self::Yes => Ok(true),
            Self::Refused => Ok(false),
            Self::Silence if silent => Ok(false),
            Self::Silence => Err("no answer".to_owned()),
            Self::Failed(error) => Err(error.clone()),
        }
    }
}

/// Somebody who answers; ends with the value.
#[derive(Debug)]
pub enum Listener {
    /// Accepts.
    Tcp(TcpListener),
    /// Echoes.
    Udp(UdpSocket),
    /// Answers INIT by INIT ACK.
    Sctp(sctp::Responder),
    /// The kernel answers.
    None,
}

impl Listener {
    /// Takes the connections that wait, so that a listener of many probes has room for more.
    pub fn drain(&self) {
        if let Self::Tcp(listener) = self
            && listener.set_nonblocking(true).is_ok()
        {
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

/// Listens on both families; panics where that cannot be done.
#[must_use]
pub fn listen(ns: &NetNs, probe: Probe) -> Listener {
    let made = ns.run(|| {
        let end = Instant::now() + LIMIT;
        loop {
            // A program that is just being started may still hold the last case's socket.
            match open(probe) {
                Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                    thread::sleep(Duration::from_millis(10));
                }
                made => return made,
            }
        }
    });
    match made {
        Ok(Ok(listener)) => listener,
        Ok(Err(error)) => panic!("listen for {probe}: {error}"),
        Err(error) => panic!("enter the namespace: {error}"),
    }
}

fn open(probe: Probe) -> std::io::Result<Listener> {
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    Ok(match probe {
        Probe::Tcp(port) => Listener::Tcp(TcpListener::bind(any(port))?),
        Probe::Udp(port) => {
            let socket = UdpSocket::bind(any(port))?;
            let answering = socket.try_clone()?;
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
        Probe::Sctp(port) => Listener::Sctp(sctp::Responder::start(port)?),
        Probe::Ping | Probe::Timestamp => Listener::None,
    })
}

/// Sends a probe from a namespace; with `silent`, it is not waited for long.
#[must_use]
pub fn probe(ns: &NetNs, to: IpAddr, probe: Probe, source_port: u16, silent: bool) -> Answer {
    let limit = if silent { SILENCE } else { LIMIT };
    let outcome = ns.run(|| send(to, probe, source_port, limit));
    match outcome {
        Ok(Ok(())) => Answer::Yes,
        Ok(Err(error)) => match error.kind() {
            ErrorKind::ConnectionRefused => Answer::Refused,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Answer::Silence,
            // What the host itself may not send is refused at once.
            ErrorKind::PermissionDenied => Answer::Refused,
            _ => Answer::Failed(error.to_string()),
        },
        Err(error) => Answer::Failed(error.to_string()),
    }
}

fn send(to: IpAddr, probe: Probe, source_port: u16, limit: Duration) -> std::io::Result<()> {
    match probe {
        Probe::Tcp(port) => {
            let socket = bound(to, Type::STREAM, Protocol::TCP, source_port, limit)?;
            socket.connect_timeout(&SocketAddr::new(to, port).into(), limit)?;
            drop(TcpStream::from(socket));
            Ok(())
        }
        Probe::Udp(port) => {
            let socket = bound(to, Type::DGRAM, Protocol::UDP, source_port, limit)?;
            exchange(&socket, SocketAddr::new(to, port), b"probe", limit)
        }
        Probe::Sctp(port) => sctp::initiate(to, port, source_port, limit),
        Probe::Ping => {
            let (protocol, request) = match to {
                IpAddr::V4(_) => (Protocol::ICMPV4, [8, 0, 0, 0, 0, 0, 0, 1]),
                IpAddr::V6(_) => (Protocol::ICMPV6, [128, 0, 0, 0, 0, 0, 0, 1]),
            };
            let socket = bound(to, Type::DGRAM, protocol, 0, limit)?;
            exchange(&socket, SocketAddr::new(to, 0), &request, limit)
        }
        Probe::Timestamp => timestamp(to, fresh_number(), limit),
    }
}

/// Identifiers and ports of packets made by hand: no two probes of a run share a flow.
pub(super) fn fresh_number() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    50_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 10_000
}

/// RFC 792, timestamp message: twenty bytes, answered with type 14.
fn timestamp(to: IpAddr, ident: u16, limit: Duration) -> std::io::Result<()> {
    let socket = bound(to, Type::RAW, Protocol::ICMPV4, 0, limit)?;
    let mut request = [0_u8; 20];
    request[0] = 13;
    request[4..6].copy_from_slice(&ident.to_be_bytes());
    let sum = u32::from(13_u16 << 8) + u32::from(ident);
    let folded = (sum & 0xffff) + (sum >> 16);
    request[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    socket.connect(&SocketAddr::new(to, 0).into())?;
    socket.send(&request)?;
    let mut answer = [0; 128];
    loop {
        let len = (&mut &socket).read(&mut answer)?;
        let header = usize::from(answer[0] & 0xf) * 4;
        let body = answer.get(header..len).unwrap_or_default();
        if body.first() == Some(&14) && body.get(4..6) == Some(&request[4..6]) {
            return Ok(());
        }
    }
}

pub(super) fn bound(
    to: IpAddr,
    kind: Type,
    protocol: Protocol,
    source_port: u16,
    limit: Duration,
) -> std::io::Result<Socket> {
    let (domain, any) = match to {
        IpAddr::V4(_) => (Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        IpAddr::V6(_) => (Domain::IPV6, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
    };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_read_timeout(Some(limit))?;
    if source_port != 0 {
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(any, source_port).into())?;
    }
    Ok(socket)
}

/// Sends until something comes: the kernel limits how many refusals it sends (`icmp_global_allow`, `net/ipv4/icmp.c`), and one
/// that is not sent is not made up for.
fn exchange(
    socket: &Socket,
    to: SocketAddr,
    request: &[u8],
    limit: Duration,
) -> std::io::Result<()> {
    socket.connect(&to.into())?;
    socket.set_read_timeout(Some(limit.min(AGAIN)))?;
    let end = Instant::now() + limit;
    let mut answer = [0; 64];
    loop {
        socket.send(request)?;
        match (&mut &*socket).read(&mut answer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(()),
            Err(error)
                if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
                    && Instant::now() < end => {}
            Err(error) => return Err(error),
        }
    }
}
