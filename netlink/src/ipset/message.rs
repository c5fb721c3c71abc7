//! Messages of the `ip_set` subsystem: commands, attributes, and how members are written.
//!
//! Numbers are in network order and say so with `NLA_F_NET_BYTEORDER`, without which the kernel refuses them. A message
//! of members is one `IPSET_ATTR_ADT` that holds an `IPSET_ATTR_DATA` for each.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{IpSet, ListedIpSet, SetMember, SetType};
use crate::{
    error::Cause,
    rtnl::{AF_INET, AF_INET6},
    socket::Socket,
    wire::{Attr, Attrs, Message, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Writer},
};

const NFNL_SUBSYS_IPSET: u16 = 6;
const NFGENMSG: usize = 4;
/// Versions of the protocol that are known here. 7 adds commands that nobody here needs.
const PROTOCOLS: std::ops::RangeInclusive<u8> = 6..=7;

const PROTOCOL: u8 = 1;
const CREATE: u8 = 2;
pub(super) const DESTROY: u8 = 3;
pub(super) const SWAP: u8 = 6;
const LIST: u8 = 7;
const ADD: u8 = 9;
const DEL: u8 = 10;
const TYPE: u8 = 13;

/// `IPSET_FLAG_LIST_SETNAME`.
pub(super) const ONLY_NAMES: u32 = 1 << 1;

const NET_ORDER: u16 = 0x4000;

const ATTR_PROTOCOL: u16 = 1;
const ATTR_SETNAME: u16 = 2;
/// Also the second name of a swap.
const ATTR_TYPENAME: u16 = 3;
const ATTR_REVISION: u16 = 4;
const ATTR_FAMILY: u16 = 5;
const ATTR_FLAGS: u16 = 6;
const ATTR_DATA: u16 = 7;
const ATTR_ADT: u16 = 8;
const ATTR_LINENO: u16 = 9;
/// Lowest version, or lowest revision of a type.
const ATTR_MINIMUM: u16 = 10;

const DATA_IP: u16 = 1;
const DATA_CIDR: u16 = 3;
const DATA_PORT: u16 = 4;
const DATA_TIMEOUT: u16 = 6;
const DATA_PROTO: u16 = 7;
const DATA_HASHSIZE: u16 = 18;
const DATA_MAXELEM: u16 = 19;
const DATA_IP2: u16 = 20;
const DATA_REFERENCES: u16 = 25;

const IPADDR_V4: u16 = 1;
const IPADDR_V6: u16 = 2;

/// What the kernel starts with by itself; it grows as members come.
const HASHSIZE: u32 = 1024;

fn begin(writer: &mut Writer, command: u8, flags: u16, v6: bool, sequence: u32, protocol: u8) {
    let kind = NFNL_SUBSYS_IPSET << 8 | u16::from(command);
    writer.begin(kind, NLM_F_REQUEST | flags, sequence);
    writer.raw(&[if v6 { AF_INET6 } else { AF_INET }, 0, 0, 0]);
    writer.u8(ATTR_PROTOCOL, protocol);
}

/// The newest version of the protocol that both sides know.
pub(super) fn agree(socket: &mut Socket) -> Result<u8, Cause> {
    let (newest, oldest) = socket.query(
        |writer, sequence| {
            begin(writer, PROTOCOL, 0, false, sequence, *PROTOCOLS.end());
            writer.finish();
        },
        |message| {
            let attrs = Attrs::after(message.payload, NFGENMSG);
            let newest = attrs.find(ATTR_PROTOCOL)?.get_u8()?;
            let oldest = attrs.find(ATTR_MINIMUM).and_then(Attr::get_u8);
            Some((newest, oldest.unwrap_or(newest)))
        },
    )?;
    let best = newest.min(*PROTOCOLS.end());
    if best < oldest || best < *PROTOCOLS.start() {
        return Err(Cause::Invalid(format!(
            "the kernel speaks versions {oldest} to {newest} of the protocol"
        )));
    }
    Ok(best)
}

/// The revision of a type to ask for: ours, or the nearest that the kernel has.
pub(super) fn revision(
    socket: &mut Socket,
    protocol: u8,
    kind: SetType,
    v6: bool,
) -> Result<u8, Cause> {
    let (newest, oldest) = socket.query(
        |writer, sequence| {
            begin(writer, TYPE, 0, v6, sequence, protocol);
            writer.text(ATTR_TYPENAME, kind.name());
            writer.u8(ATTR_FAMILY, family(v6));
            writer.finish();
        },
        |message| {
            let attrs = Attrs::after(message.payload, NFGENMSG);
            let newest = attrs.find(ATTR_REVISION)?.get_u8()?;
            let oldest = attrs.find(ATTR_MINIMUM).and_then(Attr::get_u8);
            Some((newest, oldest.unwrap_or(0)))
        },
    )?;
    Ok(kind.revision().clamp(oldest.min(newest), newest))
}

fn family(v6: bool) -> u8 {
    if v6 { AF_INET6 } else { AF_INET }
}

pub(super) fn write_list(
    writer: &mut Writer,
    sequence: u32,
    protocol: u8,
    name: Option<&str>,
    flags: u32,
) {
    begin(writer, LIST, NLM_F_DUMP, false, sequence, protocol);
    if let Some(name) = name {
        writer.text(ATTR_SETNAME, name);
    }
    if flags != 0 {
        writer.be32(ATTR_FLAGS | NET_ORDER, flags);
    }
    writer.finish();
}

pub(super) fn write_create(
    writer: &mut Writer,
    sequence: u32,
    protocol: u8,
    set: &IpSet,
    kind: SetType,
    revision: u8,
) {
    begin(writer, CREATE, NLM_F_ACK, set.v6, sequence, protocol);
    writer.text(ATTR_SETNAME, &set.name);
    writer.text(ATTR_TYPENAME, kind.name());
    writer.u8(ATTR_REVISION, revision);
    writer.u8(ATTR_FAMILY, family(set.v6));
    let data = writer.nest(ATTR_DATA);
    writer.be32(DATA_HASHSIZE | NET_ORDER, HASHSIZE);
    writer.be32(DATA_MAXELEM | NET_ORDER, set.max);
    if let Some(timeout) = set.timeout {
        writer.be32(DATA_TIMEOUT | NET_ORDER, timeout);
    }
    writer.end(data);
    writer.finish();
}

/// A command about a set, or two.
pub(super) fn write_named(
    writer: &mut Writer,
    sequence: u32,
    protocol: u8,
    command: u8,
    name: &str,
    second: Option<&str>,
) {
    begin(writer, command, NLM_F_ACK, false, sequence, protocol);
    writer.text(ATTR_SETNAME, name);
    if let Some(second) = second {
        writer.text(ATTR_TYPENAME, second);
    }
    writer.finish();
}

pub(super) fn write_members(
    writer: &mut Writer,
    sequence: u32,
    protocol: u8,
    name: &str,
    members: &[SetMember],
    add: bool,
) {
    let command = if add { ADD } else { DEL };
    // Without NLM_F_EXCL the kernel does not object to what is done already.
    begin(writer, command, NLM_F_ACK, false, sequence, protocol);
    writer.text(ATTR_SETNAME, name);
    writer.u32(ATTR_LINENO, 0);
    let all = writer.nest(ATTR_ADT);
    for member in members {
        let data = writer.nest(ATTR_DATA);
        match *member {
            SetMember::Net(address, length) => {
                write_address(writer, DATA_IP, address);
                let whole = if address.is_ipv4() { 32 } else { 128 };
                if length != whole {
                    writer.u8(DATA_CIDR, length);
                }
            }
            SetMember::Port(address, protocol, port) => {
                write_address(writer, DATA_IP, address);
                writer.be16(DATA_PORT | NET_ORDER, port);
                writer.u8(DATA_PROTO, protocol);
            }
            SetMember::PortBetween(address, protocol, port, other) => {
                write_address(writer, DATA_IP, address);
                writer.be16(DATA_PORT | NET_ORDER, port);
                writer.u8(DATA_PROTO, protocol);
                write_address(writer, DATA_IP2, other);
            }
        }
        writer.end(data);
    }
    writer.end(all);
    writer.finish();
}

fn write_address(writer: &mut Writer, attribute: u16, address: IpAddr) {
    let nest = writer.nest(attribute);
    let kind = if address.is_ipv4() {
        IPADDR_V4
    } else {
        IPADDR_V6
    };
    writer.ip(kind | NET_ORDER, address);
    writer.end(nest);
}

/// What one message of a dump says: the head of a set, members, or both.
#[derive(Debug)]
pub(super) struct Part {
    name: Arc<str>,
    head: Option<(IpSet, u32)>,
    members: Vec<SetMember>,
}

pub(super) fn read_name(message: &Message<'_>) -> Option<Arc<str>> {
    let name = Attrs::after(message.payload, NFGENMSG).find(ATTR_SETNAME)?;
    Some(name.get_text().into())
}

pub(super) fn read_part(message: &Message<'_>) -> Option<Part> {
    let attrs = Attrs::after(message.payload, NFGENMSG);
    let name: Arc<str> = attrs.find(ATTR_SETNAME)?.get_text().into();
    let head = attrs.find(ATTR_TYPENAME).map(|kind| {
        let data = attrs.find(ATTR_DATA).map_or(Attrs(&[]), Attr::nested);
        let number = |kind| data.find(kind).and_then(Attr::get_be32).unwrap_or_default();
        let set = IpSet {
            name: name.clone(),
            kind: SetType::from_name(&kind.get_text()),
            v6: attrs.find(ATTR_FAMILY).and_then(Attr::get_u8) == Some(AF_INET6),
            max: number(DATA_MAXELEM),
            timeout: data.find(DATA_TIMEOUT).and_then(Attr::get_be32),
        };
        (set, number(DATA_REFERENCES))
    });
    let members = attrs
        .find(ATTR_ADT)
        .into_iter()
        .flat_map(|all| all.nested())
        .filter_map(|data| read_member(data.nested()))
        .collect();
    Some(Part {
        name,
        head,
        members,
    })
}

fn read_member(data: Attrs<'_>) -> Option<SetMember> {
    let address = |attribute| data.find(attribute)?.nested().next()?.get_ip();
    let (address, other) = (address(DATA_IP)?, address(DATA_IP2));
    let number = |kind| data.find(kind).and_then(Attr::get_u8);
    Some(match data.find(DATA_PORT).and_then(Attr::get_be16) {
        Some(port) => match other {
            Some(other) => SetMember::PortBetween(address, number(DATA_PROTO)?, port, other),
            None => SetMember::Port(address, number(DATA_PROTO)?, port),
        },
        None => {
            let whole = if address.is_ipv4() { 32 } else { 128 };
            SetMember::Net(address, number(DATA_CIDR).unwrap_or(whole))
        }
    })
}

/// The sets that the messages of a dump make up, those whose names begin with `prefix`.
pub(super) fn join(parts: Vec<Part>, prefix: &str) -> Vec<ListedIpSet> {
    let mut sets: BTreeMap<Arc<str>, ListedIpSet> = BTreeMap::new();
    for part in parts {
        if !part.name.starts_with(prefix) {
            continue;
        }
        if let Some((set, references)) = part.head {
            sets.entry(part.name.clone())
                .or_insert_with(|| ListedIpSet {
                    set,
                    references,
                    members: Default::default(),
                });
        }
        if let Some(set) = sets.get_mut(&part.name) {
            set.members.extend(part.members);
        }
    }
    sets.into_values().collect()
}
