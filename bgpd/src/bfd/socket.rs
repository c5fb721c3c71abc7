//! UDP sockets of BFD: one per port and family to receive on, one per session to send from.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::Hops;

/// Source ports of senders (RFC 5881 §4).
const SOURCE_PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;
/// DSCP CS6, "internetwork control".
const TOS_NETWORK_CONTROL: u32 = 0xc0;
/// Longer than any packet that is taken.
const BUFFER: usize = 128;

/// A received datagram.
pub(super) struct Datagram {
    pub(super) from: IpAddr,
    pub(super) ttl: Option<u8>,
    pub(super) bytes: [u8; BUFFER],
    pub(super) len: usize,
}

fn new_socket(v4: bool) -> io::Result<Socket> {
    let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if v4 {
        socket.set_ttl_v4(255)?;
        socket.set_tos_v4(TOS_NETWORK_CONTROL)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_unicast_hops_v6(255)?;
        socket.set_tclass_v6(TOS_NETWORK_CONTROL)?;
    }
    Ok(socket)
}

/// Opens the socket that packets of this kind arrive at, on all addresses.
pub(super) fn receiver(hops: Hops, v4: bool) -> io::Result<UdpSocket> {
    let socket = new_socket(v4)?;
    if v4 {
        setsockopt(&socket, sockopt::Ipv4RecvTtl, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
    }
    let any: IpAddr = if v4 {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    socket.bind(&SocketAddr::new(any, hops.port()).into())?;
    Ok(socket.into())
}

/// Opens the socket that a session sends from. The first free port at or after `start` is taken.
pub(super) fn sender(
    peer: SocketAddr,
    source: Option<IpAddr>,
    start: u16,
) -> io::Result<UdpSocket> {
    let unspecified: IpAddr = if peer.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let count = SOURCE_PORTS.end() - SOURCE_PORTS.start();
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for step in 0..64 {
        let port = SOURCE_PORTS.start() + (start.wrapping_add(step)) % count;
        let socket = new_socket(peer.is_ipv4())?;
        match socket.bind(&SocketAddr::new(source.unwrap_or(unspecified), port).into()) {
            Ok(()) => {
                socket.connect(&peer.into())?;
                return Ok(socket.into());
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Takes the next datagram; `WouldBlock` when there is none.
pub(super) fn receive(socket: &impl AsRawFd) -> io::Result<Datagram> {
    let mut bytes = [0; BUFFER];
    let mut control = nix::cmsg_space!(i32, i32);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let len = message.bytes;
    let ttl = message.cmsgs()?.find_map(|m| match m {
        ControlMessageOwned::Ipv4Ttl(ttl) | ControlMessageOwned::Ipv6HopLimit(ttl) => {
            u8::try_from(ttl).ok()
        }
        _ => None,
    });
    let address = message.address;
    let v4 = address
        .as_ref()
        .and_then(|a| a.as_sockaddr_in())
        .map(|a| IpAddr::V4(a.ip()));
    let v6 = || {
        let a = address.as_ref().and_then(|a| a.as_sockaddr_in6());
        a.map(|a| IpAddr::V6(a.ip()))
    };
    let from = v4.or_else(v6).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Datagram {
        from,
        ttl,
        bytes,
        len,
    })
}
