//! Frames on a link, reduced to what encapsulation is about: the outer header, and whose packet it carries.

use anyhow::{Context, Result};
use cali_netlink::NetNs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
    sockopt,
};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

/// What a packet is wrapped into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outer {
    /// Nothing.
    Plain,
    /// Protocol 4.
    Ipip,
    /// UDP port 4789.
    Vxlan,
    /// UDP port 51820 or 51821.
    Wireguard,
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The wrapping.
    pub outer: Outer,
    /// Source and destination of the outermost IP header.
    pub ends: (IpAddr, IpAddr),
    /// Source and destination of the innermost IP header that can be read.
    pub inner: (IpAddr, IpAddr),
    /// It is a fragment.
    pub fragment: bool,
    /// Bytes from the outermost IP header on.
    pub len: usize,
}

/// A socket that sees all frames of a namespace.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    /// The link that counts.
    link: usize,
}

impl Capture {
    /// Listens on a link of a namespace from now on.
    pub fn start(namespace: &str, link: &str) -> Result<Self> {
        let netns = NetNs::open(namespace)?;
        let link = cali_netlink::Netlink::open(&netns)?
            .link_by_name(link)?
            .context("no such link")?;
        let open = || {
            socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::EthAll,
            )
        };
        let socket = netns.run(open)?.context("cannot open a packet socket")?;
        setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))?;
        Ok(Self {
            socket,
            link: link.index as usize,
        })
    }

    /// What has come by since the start or the last call, in both directions.
    pub fn take(&self) -> Vec<Seen> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        while let Ok((len, from)) = recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
            if from.is_some_and(|from| from.ifindex() == self.link) {
                all.extend(decode(&buffer[..len]));
            }
        }
        all
    }
}

/// Reads an Ethernet frame; `None` if it holds no IP.
fn decode(frame: &[u8]) -> Option<Seen> {
    let packet = frame.get(14..)?;
    let (header, protocol, payload, fragment) = ip(packet)?;
    let port = |at: usize| {
        Some(u16::from_be_bytes(
            payload.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let (outer, inside) = match protocol {
        4 => (Outer::Ipip, Some(payload)),
        17 if !fragment && port(2) == Some(4789) => (Outer::Vxlan, payload.get(8 + 8 + 14..)),
        17 if !fragment && matches!(port(2), Some(51820 | 51821)) => (Outer::Wireguard, None),
        _ => (Outer::Plain, None),
    };
    let inner = inside.and_then(ip).map_or(header, |(inner, ..)| inner);
    Some(Seen {
        outer,
        ends: header,
        inner,
        fragment,
        len: packet.len(),
    })
}

type Ip<'a> = ((IpAddr, IpAddr), u8, &'a [u8], bool);

fn ip(packet: &[u8]) -> Option<Ip<'_>> {
    let v4 = |at: usize| -> Option<IpAddr> {
        Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into())
    };
    let v6 = |at: usize| -> Option<IpAddr> {
        Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into())
    };
    match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x3fff != 0;
            Some((
                (v4(12)?, v4(16)?),
                *packet.get(9)?,
                packet.get(header..)?,
                fragment,
            ))
        }
        6 => {
            let protocol = *packet.get(6)?;
            Some((
                (v6(8)?, v6(24)?),
                protocol,
                packet.get(40..)?,
                protocol == 44,
            ))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(protocol: u8, last: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
        packet[16..20].copy_from_slice(&[10, 0, 0, last]);
        packet.extend(payload);
        packet
    }

    #[test]
    fn wrappings_are_told_apart() {
        let pod = v4(1, 9, &[8, 0]);
        let frame = |packet: Vec<u8>| [vec![0; 14], packet].concat();
        let udp = |port: u16, inside: &[u8]| {
            let mut udp = vec![0; 8];
            udp[2..4].copy_from_slice(&port.to_be_bytes());
            v4(17, 2, &[&udp, inside].concat())
        };
        let vxlan = [vec![0; 8 + 14], pod.clone()].concat();
        for (packet, outer, inner) in [
            (pod.clone(), Outer::Plain, 9),
            (v4(4, 2, &pod), Outer::Ipip, 9),
            (udp(4789, &vxlan), Outer::Vxlan, 9),
            (udp(51820, &[0; 90]), Outer::Wireguard, 2),
        ] {
            let seen = decode(&frame(packet)).unwrap();
            assert_eq!((seen.outer, seen.fragment), (outer, false));
            assert_eq!(seen.inner.1, IpAddr::from([10, 0, 0, inner]));
        }
        let mut piece = v4(1, 9, &[]);
        piece[6] = 0x20;
        assert!(decode(&frame(piece)).unwrap().fragment);
    }
}
