//! `struct ndmsg` and its attributes (`include/uapi/linux/neighbour.h`), for neighbours and forwarding entries.

use super::{
    ADD, AF_BRIDGE, APPEND, DELETE, REPLACE, RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH, family,
};
use crate::{
    Change,
    link::IfIndex,
    mac::MacAddr,
    neighbour::{FdbEntry, Neighbour, flag},
    wire::{Attrs, Message, NLM_F_DUMP, NLM_F_REQUEST, Writer, read_u16, read_u32},
};

const NDMSG: usize = 12;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_VLAN: u16 = 5;
const NDA_IFINDEX: u16 = 8;

fn write_header(writer: &mut Writer, family: u8, ifindex: IfIndex, state: u16, flags: u8) {
    writer.raw(&[family, 0, 0, 0]);
    writer.raw(&ifindex.to_ne_bytes());
    let state = state.to_ne_bytes();
    writer.raw(&[state[0], state[1], flags, 0]);
}

pub(crate) fn write_neighbour(writer: &mut Writer, change: &Change<Neighbour>, sequence: u32) {
    let entry = change.object();
    let (message, flags) = match change {
        Change::Add(_) => (RTM_NEWNEIGH, ADD),
        Change::Replace(_) => (RTM_NEWNEIGH, REPLACE),
        Change::Delete(_) => (RTM_DELNEIGH, DELETE),
    };
    writer.begin(message, flags, sequence);
    write_header(
        writer,
        family(entry.address.is_ipv6()),
        entry.ifindex,
        entry.state,
        entry.flags,
    );
    writer.ip(NDA_DST, entry.address);
    if let Some(mac) = entry.mac {
        writer.attr(NDA_LLADDR, &mac.0);
    }
    writer.finish();
}

pub(crate) fn write_fdb(writer: &mut Writer, change: &Change<FdbEntry>, sequence: u32) {
    let entry = change.object();
    let (message, flags) = match change {
        Change::Add(_) => (RTM_NEWNEIGH, ADD),
        // The all-zero entry is a list of destinations; the kernel refuses to replace it.
        Change::Replace(entry) if entry.mac == MacAddr::default() => (RTM_NEWNEIGH, APPEND),
        Change::Replace(_) => (RTM_NEWNEIGH, REPLACE),
        Change::Delete(_) => (RTM_DELNEIGH, DELETE),
    };
    writer.begin(message, flags, sequence);
    write_header(writer, AF_BRIDGE, entry.ifindex, entry.state, entry.flags);
    writer.attr(NDA_LLADDR, &entry.mac.0);
    if let Some(dst) = entry.dst {
        writer.ip(NDA_DST, dst);
    }
    if let Some(vlan) = entry.vlan {
        writer.u16(NDA_VLAN, vlan);
    }
    writer.finish();
}

/// What a dump of the neighbour table is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dump {
    Neighbours { v6: bool },
    Proxies { v6: bool },
    Fdb,
}

pub(crate) fn write_dump(writer: &mut Writer, what: Dump, ifindex: Option<IfIndex>, sequence: u32) {
    writer.begin(RTM_GETNEIGH, NLM_F_REQUEST | NLM_F_DUMP, sequence);
    let (family, flags) = match what {
        Dump::Neighbours { v6 } => (family(v6), 0),
        Dump::Proxies { v6 } => (family(v6), flag::PROXY),
        Dump::Fdb => (AF_BRIDGE, 0),
    };
    write_header(writer, family, 0, 0, flags);
    if let Some(ifindex) = ifindex {
        writer.u32(NDA_IFINDEX, ifindex);
    }
    writer.finish();
}

/// What a message of the neighbour table holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    Neighbour(Neighbour),
    Fdb(FdbEntry),
}

pub(crate) fn read(message: &Message<'_>) -> Option<Entry> {
    if message.kind != RTM_NEWNEIGH && message.kind != RTM_DELNEIGH {
        return None;
    }
    let header = message.payload.get(..NDMSG)?;
    let (ifindex, state, flags) = (read_u32(header, 4)?, read_u16(header, 8)?, header[10]);
    let (mut dst, mut mac, mut vlan) = (None, None, None);
    for attr in Attrs::after(message.payload, NDMSG) {
        match attr.kind {
            NDA_DST => dst = attr.get_ip(),
            NDA_LLADDR => mac = MacAddr::from_bytes(attr.payload),
            NDA_VLAN => vlan = attr.get_u16(),
            _ => {}
        }
    }
    if header[0] == AF_BRIDGE {
        return Some(Entry::Fdb(FdbEntry {
            ifindex,
            mac: mac?,
            dst,
            vlan,
            state,
            flags,
        }));
    }
    Some(Entry::Neighbour(Neighbour {
        ifindex,
        address: dst?,
        mac,
        state,
        flags,
    }))
}

pub(crate) fn read_neighbour(message: &Message<'_>) -> Option<Neighbour> {
    match read(message)? {
        Entry::Neighbour(entry) => Some(entry),
        Entry::Fdb(_) => None,
    }
}

pub(crate) fn read_fdb(message: &Message<'_>) -> Option<FdbEntry> {
    match read(message)? {
        Entry::Fdb(entry) => Some(entry),
        Entry::Neighbour(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Messages;

    #[test]
    fn neighbours_read_back_as_written() {
        let mac = "66:00:00:00:00:01".parse().unwrap();
        for entry in [
            Neighbour::permanent(5, "10.0.0.1".parse().unwrap(), mac),
            Neighbour::proxy(5, "fe80::1".parse().unwrap()),
        ] {
            let mut writer = Writer::default();
            write_neighbour(&mut writer, &Change::Replace(entry.clone()), 1);
            assert_eq!(
                read_neighbour(&Messages(writer.as_slice()).next().unwrap()),
                Some(entry)
            );
        }
    }

    #[test]
    fn forwarding_entries_read_back_as_written() {
        let mac = "66:00:00:00:00:01".parse().unwrap();
        for dst in ["192.0.2.1", "2001:db8::1"] {
            let entry = FdbEntry::vxlan(9, mac, dst.parse().unwrap());
            let mut writer = Writer::default();
            write_fdb(&mut writer, &Change::Replace(entry.clone()), 1);
            assert_eq!(
                read_fdb(&Messages(writer.as_slice()).next().unwrap()),
                Some(entry)
            );
        }
    }
}
