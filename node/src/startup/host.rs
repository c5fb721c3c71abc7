//! Reads what the start must know about the host: interfaces, and the answers for detection. No decisions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket};

use cali_netlink::Netlink;

use super::StartError;
use super::detect::{Hints, HostInterface, Method};
use super::settings::AddressWish;

/// The interfaces of the namespace with their addresses.
pub fn interfaces(netlink: &Netlink) -> Result<Vec<HostInterface>, StartError> {
    let links = netlink.dump_links().map_err(StartError::Kernel)?;
    let addresses = netlink.dump_addresses(None).map_err(StartError::Kernel)?;
    Ok(links
        .into_iter()
        .map(|link| HostInterface {
            addresses: addresses
                .iter()
                .filter(|a| a.ifindex == link.index)
                .map(|a| a.address)
                .collect(),
            index: link.index,
            name: link.name,
            up: link.up,
        })
        .collect())
}

/// The answers that the method of this wish needs. Resolves names, so it blocks.
pub fn hints(wish: &AddressWish, v4: bool, kubernetes_internal: &[IpAddr]) -> Hints {
    let reaches_from = match wish {
        AddressWish::Detect(Method::CanReach(target))
        | AddressWish::DetectIfUnset(Method::CanReach(target)) => source_towards(target, v4),
        _ => None,
    };
    Hints {
        reaches_from,
        kubernetes_internal: kubernetes_internal.to_vec(),
    }
}

/// The kernel's choice of source address: a connected UDP socket sends nothing.
fn source_towards(target: &str, v4: bool) -> Option<IpAddr> {
    let any: IpAddr = if v4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let resolved = (target, 80).to_socket_addrs();
    let resolved = resolved
        .inspect_err(|error| tracing::warn!(target, %error, "can-reach: cannot resolve"))
        .ok()?;
    let to = resolved
        .into_iter()
        .find(|address| address.is_ipv4() == v4)?;
    let socket = UdpSocket::bind((any, 0)).ok()?;
    let connected = socket.connect(to);
    connected
        .inspect_err(|error| tracing::warn!(target, %error, "can-reach: no route"))
        .ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// Random bytes of the kernel.
pub fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}
