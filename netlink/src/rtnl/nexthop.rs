//! `struct nhmsg` and its attributes (`include/uapi/linux/nexthop.h`).

use super::{
    ADD, AF_INET6, AF_UNSPEC, DELETE, ONLINK, REPLACE, RTM_DELNEXTHOP, RTM_GETNEXTHOP,
    RTM_NEWNEXTHOP, family,
};
use crate::{
    Change,
    nexthop::{Nexthop, NexthopTarget},
    wire::{Attrs, Message, NLM_F_DUMP, NLM_F_REQUEST, Writer, read_u32},
};

const NHMSG: usize = 8;
const NHA_ID: u16 = 1;
const NHA_GROUP: u16 = 2;
const NHA_BLACKHOLE: u16 = 4;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
/// `struct nexthop_grp`.
const GROUP_MEMBER: usize = 8;

pub(crate) fn write_change(writer: &mut Writer, change: &Change<Nexthop>, sequence: u32) {
    let nexthop = change.object();
    let (message, flags) = match change {
        Change::Add(_) => (RTM_NEWNEXTHOP, ADD),
        Change::Replace(_) => (RTM_NEWNEXTHOP, REPLACE),
        Change::Delete(_) => (RTM_DELNEXTHOP, DELETE),
    };
    writer.begin(message, flags, sequence);
    if matches!(change, Change::Delete(_)) {
        // The kernel refuses protocol or flags here.
        writer.raw(&[0; NHMSG]);
        writer.u32(NHA_ID, nexthop.id);
    } else {
        write_object(writer, nexthop);
    }
    writer.finish();
}

fn write_object(writer: &mut Writer, nexthop: &Nexthop) {
    let (family, flags) = match &nexthop.target {
        NexthopTarget::Gateway {
            gateway, onlink, ..
        } => (family(gateway.is_ipv6()), if *onlink { ONLINK } else { 0 }),
        NexthopTarget::Device { v6, .. } | NexthopTarget::Blackhole { v6 } => (family(*v6), 0),
        NexthopTarget::Group(_) => (AF_UNSPEC, 0),
    };
    writer.raw(&[family, 0, nexthop.protocol, 0]);
    writer.raw(&u32::from(flags).to_ne_bytes());
    writer.u32(NHA_ID, nexthop.id);
    match &nexthop.target {
        NexthopTarget::Gateway { gateway, oif, .. } => {
            writer.u32(NHA_OIF, *oif);
            writer.ip(NHA_GATEWAY, *gateway);
        }
        NexthopTarget::Device { oif, .. } => writer.u32(NHA_OIF, *oif),
        NexthopTarget::Blackhole { .. } => writer.attr(NHA_BLACKHOLE, &[]),
        NexthopTarget::Group(members) => {
            let mut bytes = Vec::with_capacity(members.len() * GROUP_MEMBER);
            for (id, weight) in members {
                bytes.extend_from_slice(&id.to_ne_bytes());
                bytes.extend_from_slice(&[(weight.clamp(&1, &256) - 1) as u8, 0, 0, 0]);
            }
            writer.attr(NHA_GROUP, &bytes);
        }
    }
}

pub(crate) fn write_dump(writer: &mut Writer, sequence: u32) {
    writer.begin(RTM_GETNEXTHOP, NLM_F_REQUEST | NLM_F_DUMP, sequence);
    writer.raw(&[0; NHMSG]);
    writer.finish();
}

pub(crate) fn read(message: &Message<'_>) -> Option<Nexthop> {
    if message.kind != RTM_NEWNEXTHOP && message.kind != RTM_DELNEXTHOP {
        return None;
    }
    let header = message.payload.get(..NHMSG)?;
    let onlink = read_u32(header, 4)? & u32::from(ONLINK) != 0;
    let v6 = header[0] == AF_INET6;
    let (mut id, mut oif, mut gateway, mut blackhole, mut group) = (None, None, None, false, None);
    for attr in Attrs::after(message.payload, NHMSG) {
        match attr.kind {
            NHA_ID => id = attr.get_u32(),
            NHA_OIF => oif = attr.get_u32(),
            NHA_GATEWAY => gateway = attr.get_ip(),
            NHA_BLACKHOLE => blackhole = true,
            NHA_GROUP => {
                group = Some(
                    attr.payload
                        .chunks_exact(GROUP_MEMBER)
                        .filter_map(|member| Some((read_u32(member, 0)?, u16::from(member[4]) + 1)))
                        .collect(),
                );
            }
            _ => {}
        }
    }
    let target = match (group, blackhole, gateway, oif) {
        (Some(members), ..) => NexthopTarget::Group(members),
        (None, true, ..) => NexthopTarget::Blackhole { v6 },
        (None, false, Some(gateway), Some(oif)) => NexthopTarget::Gateway {
            gateway,
            oif,
            onlink,
        },
        (None, false, None, Some(oif)) => NexthopTarget::Device { oif, v6 },
        _ => return None,
    };
    Some(Nexthop {
        id: id?,
        protocol: header[2],
        target,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Messages;

    #[test]
    fn every_kind_reads_back_as_written() {
        let targets = [
            NexthopTarget::Gateway {
                gateway: "10.0.0.1".parse().unwrap(),
                oif: 3,
                onlink: true,
            },
            NexthopTarget::Gateway {
                gateway: "fd00::1".parse().unwrap(),
                oif: 3,
                onlink: false,
            },
            NexthopTarget::Device { oif: 7, v6: true },
            NexthopTarget::Blackhole { v6: false },
            NexthopTarget::Group(vec![(1, 1), (2, 256)]),
        ];
        for target in targets {
            let nexthop = Nexthop {
                id: 0x0ca1_0001,
                protocol: 80,
                target,
            };
            let mut writer = Writer::default();
            write_change(&mut writer, &Change::Replace(nexthop.clone()), 1);
            assert_eq!(
                read(&Messages(writer.as_slice()).next().unwrap()),
                Some(nexthop)
            );
        }
    }
}
