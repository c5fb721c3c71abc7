//! Decoders and dump requests of links, addresses and rules (`if_link.h`, `if_addr.h`, `fib_rules.h`).

use std::{net::IpAddr, net::Ipv4Addr, sync::Arc};

use ipnetwork::IpNetwork;

use super::{
    ADD, AF_INET6, AF_UNSPEC, DELETE, REPLACE, RTM_DELADDR, RTM_DELLINK, RTM_DELRULE, RTM_GETADDR,
    RTM_GETLINK, RTM_GETNSID, RTM_GETRULE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWRULE, RTM_SETLINK,
    family,
};
use crate::{
    Change,
    address::Address,
    link::{IfIndex, IpIp, Link, LinkKind, Vxlan},
    mac::MacAddr,
    rule::Rule,
    wire::{Attr, Attrs, Message, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Writer, read_u32},
};

const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;
const RULE_HEADER: usize = 12;
const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
const IFF_LOWER_UP: u32 = 0x1_0000;
const IFLA_IFNAME: u16 = 3;
const IFLA_GROUP: u16 = 27;
const IFLA_EXT_MASK: u16 = 29;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Leaves the (long) statistics out.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
/// Rule action: look into a table.
const FR_ACT_TO_TBL: u8 = 1;
const FIB_RULE_INVERT: u32 = 2;

pub(crate) fn write_link_dump(writer: &mut Writer, sequence: u32) {
    writer.begin(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, sequence);
    writer.raw(&[0; IFINFOMSG]);
    writer.u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    writer.finish();
}

/// One link, by index or by name.
pub(crate) fn write_link_query(
    writer: &mut Writer,
    index: IfIndex,
    name: Option<&str>,
    sequence: u32,
) {
    writer.begin(RTM_GETLINK, NLM_F_REQUEST, sequence);
    let mut header = [0; IFINFOMSG];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    writer.raw(&header);
    if let Some(name) = name {
        writer.text(IFLA_IFNAME, name);
    }
    writer.u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    writer.finish();
}

/// Removes one link.
pub(crate) fn write_removal(writer: &mut Writer, index: IfIndex, sequence: u32) {
    writer.begin(RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, sequence);
    let mut header = [0; IFINFOMSG];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    writer.raw(&header);
    writer.finish();
}

/// Puts one link into a group.
pub(crate) fn write_group(writer: &mut Writer, index: IfIndex, group: u32, sequence: u32) {
    writer.begin(RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK, sequence);
    let mut header = [0; IFINFOMSG];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    writer.raw(&header);
    writer.u32(IFLA_GROUP, group);
    writer.finish();
}

/// Removes all links of a group.
pub(crate) fn write_group_removal(writer: &mut Writer, group: u32, sequence: u32) {
    writer.begin(RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, sequence);
    writer.raw(&[0; IFINFOMSG]);
    writer.u32(IFLA_GROUP, group);
    writer.finish();
}

pub(crate) fn write_address_dump(writer: &mut Writer, ifindex: Option<IfIndex>, sequence: u32) {
    writer.begin(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, sequence);
    let mut header = [0; IFADDRMSG];
    header[0] = AF_UNSPEC;
    header[4..8].copy_from_slice(&ifindex.unwrap_or(0).to_ne_bytes());
    writer.raw(&header);
    writer.finish();
}

pub(crate) fn write_address(writer: &mut Writer, change: &Change<Address>, sequence: u32) {
    let address = change.object();
    let (message, flags) = match change {
        Change::Add(_) => (RTM_NEWADDR, ADD),
        Change::Replace(_) => (RTM_NEWADDR, REPLACE),
        Change::Delete(_) => (RTM_DELADDR, DELETE),
    };
    let own = address.address.ip();
    writer.begin(message, flags, sequence);
    writer.raw(&[
        family(own.is_ipv6()),
        address.address.prefix(),
        0,
        address.scope,
    ]);
    writer.raw(&address.ifindex.to_ne_bytes());
    writer.ip(IFA_LOCAL, own);
    writer.ip(IFA_ADDRESS, address.peer.unwrap_or(own));
    writer.finish();
}

/// Asks for the number of another namespace (`include/uapi/linux/net_namespace.h`).
pub(crate) fn write_nsid_query(writer: &mut Writer, fd: u32, sequence: u32) {
    writer.begin(RTM_GETNSID, NLM_F_REQUEST, sequence);
    writer.raw(&[AF_UNSPEC]);
    // NETNSA_FD
    writer.u32(3, fd);
    writer.finish();
}

/// The number; `None` inside for a namespace that has none here.
pub(crate) fn read_nsid(message: &Message<'_>) -> Option<Option<i32>> {
    // `struct rtgenmsg` is one byte; NETNSA_NSID, where -1 is NETNSA_NSID_NOT_ASSIGNED.
    let number = Attrs::after(message.payload, 1).find(1)?.get_u32()?;
    Some(Some(number.cast_signed()).filter(|number| *number >= 0))
}

pub(crate) fn write_rule_dump(writer: &mut Writer, v6: bool, sequence: u32) {
    writer.begin(RTM_GETRULE, NLM_F_REQUEST | NLM_F_DUMP, sequence);
    let mut header = [0; RULE_HEADER];
    header[0] = family(v6);
    writer.raw(&header);
    writer.finish();
}

/// The link in a message; `None` for other messages and for the bridge's view of its ports.
pub(crate) fn read_link(message: &Message<'_>) -> Option<Link> {
    if message.kind != RTM_NEWLINK && message.kind != RTM_DELLINK {
        return None;
    }
    let header = message.payload.get(..IFINFOMSG)?;
    if header[0] != AF_UNSPEC {
        return None;
    }
    let flags = read_u32(header, 8)?;
    let mut link = Link {
        index: read_u32(header, 4)?,
        name: String::new(),
        kind: LinkKind::Physical,
        mac: None,
        mtu: 0,
        up: flags & IFF_UP != 0,
        carrier: flags & IFF_LOWER_UP != 0,
        noarp: flags & IFF_NOARP != 0,
        master: None,
        parent: None,
        link_netns: None,
        alias: None,
        group: 0,
    };
    for attr in Attrs::after(message.payload, IFINFOMSG) {
        match attr.kind {
            1 => link.mac = MacAddr::from_bytes(attr.payload),
            IFLA_IFNAME => link.name = attr.get_text(),
            4 => link.mtu = attr.get_u32()?,
            5 => link.parent = attr.get_u32().filter(|index| *index != 0),
            10 => link.master = attr.get_u32().filter(|index| *index != 0),
            18 => link.kind = read_kind(attr.nested()),
            20 => link.alias = Some(attr.get_text()),
            IFLA_GROUP => link.group = attr.get_u32()?,
            37 => link.link_netns = attr.get_u32().map(|id| id as i32),
            _ => {}
        }
    }
    Some(link)
}

fn read_kind(info: Attrs<'_>) -> LinkKind {
    let name = info.find(1).map(Attr::get_text).unwrap_or_default();
    let data = info.find(2).map_or(Attrs(&[]), Attr::nested);
    match name.as_str() {
        "veth" => LinkKind::Veth,
        "bridge" => LinkKind::Bridge,
        "wireguard" => LinkKind::Wireguard,
        "dummy" => LinkKind::Dummy,
        "vxlan" => LinkKind::Vxlan(read_vxlan(data)),
        "ipip" => LinkKind::IpIp(read_ipip(data)),
        "vlan" => LinkKind::Vlan(data.find(1).and_then(Attr::get_u16).unwrap_or(0)),
        _ => LinkKind::Other(Arc::from(name)),
    }
}

fn read_vxlan(data: Attrs<'_>) -> Vxlan {
    let flag = |kind| {
        data.find(kind)
            .and_then(Attr::get_u8)
            .is_some_and(|value| value != 0)
    };
    let local = data
        .find(4)
        .or_else(|| data.find(17))
        .and_then(Attr::get_ip);
    Vxlan {
        vni: data.find(1).and_then(Attr::get_u32).unwrap_or(0),
        port: data.find(15).and_then(Attr::get_be16).unwrap_or(0),
        local: local.filter(|address| !address.is_unspecified()),
        device: data
            .find(3)
            .and_then(Attr::get_u32)
            .filter(|index| *index != 0),
        learning: flag(7),
        udp_csum: flag(18),
    }
}

fn read_ipip(data: Attrs<'_>) -> IpIp {
    let address = |kind| match data.find(kind).and_then(Attr::get_ip) {
        Some(IpAddr::V4(address)) if address != Ipv4Addr::UNSPECIFIED => Some(address),
        _ => None,
    };
    IpIp {
        local: address(2),
        remote: address(3),
        ttl: data.find(4).and_then(Attr::get_u8).unwrap_or(0),
        pmtudisc: data
            .find(10)
            .and_then(Attr::get_u8)
            .is_some_and(|value| value != 0),
    }
}

pub(crate) fn read_address(message: &Message<'_>) -> Option<Address> {
    if message.kind != RTM_NEWADDR && message.kind != RTM_DELADDR {
        return None;
    }
    let header = message.payload.get(..IFADDRMSG)?;
    let (mut address, mut local, mut flags) = (None, None, u32::from(header[2]));
    for attr in Attrs::after(message.payload, IFADDRMSG) {
        match attr.kind {
            1 => address = attr.get_ip(),
            2 => local = attr.get_ip(),
            8 => flags = attr.get_u32()?,
            _ => {}
        }
    }
    // With a peer, IFA_ADDRESS is the peer's and IFA_LOCAL ours; IPv6 leaves IFA_LOCAL out when there is no peer.
    let own = local.or(address)?;
    Some(Address {
        ifindex: read_u32(header, 4)?,
        address: IpNetwork::new(own, header[1]).ok()?,
        peer: address.filter(|other| *other != own),
        scope: header[3],
        flags,
    })
}

/// A rule that looks into a table; `None` for the other actions, which nobody here makes.
pub(crate) fn read_rule(message: &Message<'_>) -> Option<Rule> {
    if message.kind != RTM_NEWRULE && message.kind != RTM_DELRULE {
        return None;
    }
    let header = message.payload.get(..RULE_HEADER)?;
    if header[7] != FR_ACT_TO_TBL {
        return None;
    }
    let mut rule = Rule::new(header[0] == AF_INET6, 0, u32::from(header[4]));
    rule.invert = read_u32(header, 8)? & FIB_RULE_INVERT != 0;
    let (mut mark, mut mask) = (None, None);
    for attr in Attrs::after(message.payload, RULE_HEADER) {
        match attr.kind {
            1 => rule.to = IpNetwork::new(attr.get_ip()?, header[1]).ok(),
            2 => rule.from = IpNetwork::new(attr.get_ip()?, header[2]).ok(),
            3 => rule.iif = Some(attr.get_text()),
            6 => rule.priority = attr.get_u32()?,
            10 => mark = attr.get_u32(),
            14 => rule.suppress_prefix_len = attr.get_u32().filter(|len| *len != u32::MAX),
            15 => rule.table = attr.get_u32()?,
            16 => mask = attr.get_u32(),
            17 => rule.oif = Some(attr.get_text()),
            21 => rule.protocol = attr.get_u8()?,
            _ => {}
        }
    }
    rule.fwmark = match (mark, mask) {
        (Some(mark), mask) => Some((mark, mask.unwrap_or(u32::MAX))),
        (None, Some(mask)) if mask != 0 => Some((0, mask)),
        (None, _) => None,
    };
    Some(rule)
}
