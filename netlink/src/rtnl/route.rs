//! `struct rtmsg` and its attributes (`include/uapi/linux/rtnetlink.h`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use super::{AF_INET6, DELETE, ONLINK, REPLACE, RTM_DELROUTE, RTM_GETROUTE, RTM_NEWROUTE, family};
use crate::{
    Change,
    route::{Hop, Route, RouteDecision, RouteFilter, RouteKind, Scope, Target},
    wire::{Attr, Attrs, Message, NLM_F_DUMP, NLM_F_REQUEST, Writer, read_u16, read_u32},
};

const RTMSG: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_NH_ID: u16 = 30;
const RTAX_MTU: u16 = 2;
const SCOPE_NOWHERE: u8 = 255;
const RTM_F_CLONED: u32 = 0x200;
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
const RTM_F_FIB_MATCH: u32 = 0x2000;

fn kind_number(kind: RouteKind) -> u8 {
    match kind {
        RouteKind::Unicast => 1,
        RouteKind::Local => 2,
        RouteKind::Broadcast => 3,
        RouteKind::Blackhole => 6,
        RouteKind::Unreachable => 7,
        RouteKind::Prohibit => 8,
        RouteKind::Throw => 9,
        RouteKind::Other(number) => number,
    }
}

fn kind_from(number: u8) -> RouteKind {
    match number {
        1 => RouteKind::Unicast,
        2 => RouteKind::Local,
        3 => RouteKind::Broadcast,
        6 => RouteKind::Blackhole,
        7 => RouteKind::Unreachable,
        8 => RouteKind::Prohibit,
        9 => RouteKind::Throw,
        other => RouteKind::Other(other),
    }
}

fn scope_number(scope: Scope) -> u8 {
    match scope {
        Scope::Global => 0,
        Scope::Link => 253,
        Scope::Host => 254,
        Scope::Other(number) => number,
    }
}

fn scope_from(number: u8) -> Scope {
    match number {
        0 => Scope::Global,
        253 => Scope::Link,
        254 => Scope::Host,
        other => Scope::Other(other),
    }
}

/// One change of a route.
pub(crate) fn write_change(writer: &mut Writer, change: &Change<Route>, sequence: u32) {
    let route = change.object();
    let (message, flags) = match change {
        Change::Add(_) => (RTM_NEWROUTE, super::ADD),
        Change::Replace(_) => (RTM_NEWROUTE, REPLACE),
        Change::Delete(_) => (RTM_DELROUTE, DELETE),
    };
    let delete = matches!(change, Change::Delete(_));
    writer.begin(message, flags, sequence);
    write_header(writer, route, delete);
    let key = route.key();
    writer.ip(RTA_DST, key.prefix.network());
    writer.u32(RTA_TABLE, route.table);
    if key.metric != 0 {
        writer.u32(RTA_PRIORITY, key.metric);
    }
    if !delete {
        write_body(writer, route);
    }
    writer.finish();
}

fn write_header(writer: &mut Writer, route: &Route, delete: bool) {
    let onlink = match &route.target {
        Target::Hop(hop) if !delete => hop.onlink,
        _ => false,
    };
    // For a deletion kind 0 and scope "nowhere" match any, so that a row that somebody changed goes too.
    let kind = if delete { 0 } else { kind_number(route.kind) };
    let scope = if delete {
        SCOPE_NOWHERE
    } else {
        scope_number(route.scope)
    };
    let scope = if route.prefix.is_ipv6() { 0 } else { scope };
    let table = u8::try_from(route.table).unwrap_or(0);
    writer.raw(&[
        family(route.prefix.is_ipv6()),
        route.prefix.prefix(),
        0,
        0,
        table,
        route.protocol,
        scope,
        kind,
    ]);
    writer.raw(&u32::from(if onlink { ONLINK } else { 0 }).to_ne_bytes());
}

fn write_body(writer: &mut Writer, route: &Route) {
    if let Some(source) = route.source {
        writer.ip(RTA_PREFSRC, source);
    }
    if let Some(mtu) = route.mtu {
        let metrics = writer.nest(RTA_METRICS);
        writer.u32(RTAX_MTU, mtu);
        writer.end(metrics);
    }
    match &route.target {
        Target::None => {}
        Target::Nexthop(id) => writer.u32(RTA_NH_ID, *id),
        Target::Hop(hop) => {
            write_gateway(writer, route, hop.gateway);
            if let Some(oif) = hop.oif {
                writer.u32(RTA_OIF, oif);
            }
        }
        Target::Multipath(hops) => {
            let all = writer.nest_plain(RTA_MULTIPATH);
            for hop in hops {
                write_hop(writer, route, hop);
            }
            writer.end(all);
        }
    }
}

/// `struct rtnexthop`: length u16, flags u8, weight-1 u8, device i32, then attributes. The first four bytes look like
/// an attribute header, so it is written as a nest whose kind holds flags and weight.
fn write_hop(writer: &mut Writer, route: &Route, hop: &Hop) {
    let flags = if hop.onlink { ONLINK } else { 0 };
    let weight = (hop.weight.clamp(1, 256) - 1) as u8;
    let nest = writer.nest_plain(u16::from_ne_bytes([flags, weight]));
    writer.raw(&hop.oif.unwrap_or(0).to_ne_bytes());
    write_gateway(writer, route, hop.gateway);
    writer.end(nest);
}

fn write_gateway(writer: &mut Writer, route: &Route, gateway: Option<IpAddr>) {
    match gateway {
        // RFC 8950: an IPv4 route over an IPv6 gateway needs `struct rtvia`.
        Some(IpAddr::V6(gateway)) if !route.prefix.is_ipv6() => {
            let mut via = [0_u8; 18];
            via[..2].copy_from_slice(&u16::from(AF_INET6).to_ne_bytes());
            via[2..].copy_from_slice(&gateway.octets());
            writer.attr(RTA_VIA, &via);
        }
        Some(gateway) => writer.ip(RTA_GATEWAY, gateway),
        None => {}
    }
}

/// A dump of one family.
pub(crate) fn write_dump(writer: &mut Writer, v6: bool, filter: &RouteFilter, sequence: u32) {
    writer.begin(RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP, sequence);
    let table = filter
        .table
        .and_then(|table| u8::try_from(table).ok())
        .unwrap_or(0);
    writer.raw(&[
        family(v6),
        0,
        0,
        0,
        table,
        filter.protocol.unwrap_or(0),
        0,
        0,
    ]);
    writer.raw(&[0; 4]);
    if let Some(table) = filter.table {
        writer.u32(RTA_TABLE, table);
    }
    if let Some(oif) = filter.oif {
        writer.u32(RTA_OIF, oif);
    }
    writer.finish();
}

/// A question about one destination. `fib_match`: the row that matches instead of the resolved route.
pub(crate) fn write_lookup(
    writer: &mut Writer,
    destination: IpAddr,
    fib_match: bool,
    sequence: u32,
) {
    writer.begin(RTM_GETROUTE, NLM_F_REQUEST, sequence);
    let len = if destination.is_ipv6() { 128 } else { 32 };
    writer.raw(&[family(destination.is_ipv6()), len, 0, 0, 0, 0, 0, 0]);
    let flags = if fib_match {
        RTM_F_FIB_MATCH
    } else if destination.is_ipv6() {
        // The IPv6 side reports the table anyway, and refuses the flag (`inet6_rtm_valid_getroute_req`).
        0
    } else {
        RTM_F_LOOKUP_TABLE
    };
    writer.raw(&flags.to_ne_bytes());
    writer.ip(RTA_DST, destination);
    writer.finish();
}

/// Everything of a route message that we use.
struct Parts {
    v6: bool,
    len: u8,
    table: u32,
    protocol: u8,
    scope: u8,
    kind: u8,
    flags: u32,
    destination: Option<IpAddr>,
    metric: u32,
    source: Option<IpAddr>,
    mtu: Option<u32>,
    oif: Option<u32>,
    gateway: Option<IpAddr>,
    nexthop: Option<u32>,
    hops: Vec<Hop>,
}

fn parse(message: &Message<'_>) -> Option<Parts> {
    if message.kind != RTM_NEWROUTE && message.kind != RTM_DELROUTE {
        return None;
    }
    let header = message.payload.get(..RTMSG)?;
    let v6 = match header[0] {
        super::AF_INET => false,
        AF_INET6 => true,
        _ => return None,
    };
    let mut parts = Parts {
        v6,
        len: header[1],
        table: u32::from(header[4]),
        protocol: header[5],
        scope: header[6],
        kind: header[7],
        flags: read_u32(header, 8)?,
        destination: None,
        metric: 0,
        source: None,
        mtu: None,
        oif: None,
        gateway: None,
        nexthop: None,
        hops: Vec::new(),
    };
    for attr in Attrs::after(message.payload, RTMSG) {
        match attr.kind {
            RTA_DST => parts.destination = attr.get_ip(),
            RTA_TABLE => parts.table = attr.get_u32()?,
            RTA_PRIORITY => parts.metric = attr.get_u32()?,
            RTA_PREFSRC => parts.source = attr.get_ip(),
            RTA_OIF => parts.oif = attr.get_u32(),
            RTA_GATEWAY => parts.gateway = attr.get_ip(),
            RTA_VIA => parts.gateway = read_via(attr),
            RTA_NH_ID => parts.nexthop = attr.get_u32(),
            RTA_METRICS => parts.mtu = attr.nested().find(RTAX_MTU).and_then(Attr::get_u32),
            RTA_MULTIPATH => parts.hops = read_hops(attr.payload),
            _ => {}
        }
    }
    Some(parts)
}

fn read_via(attr: Attr<'_>) -> Option<IpAddr> {
    let address = attr.payload.get(2..)?;
    match read_u16(attr.payload, 0)? {
        family if family == u16::from(AF_INET6) => {
            <[u8; 16]>::try_from(address).ok().map(IpAddr::from)
        }
        _ => <[u8; 4]>::try_from(address).ok().map(IpAddr::from),
    }
}

fn read_hops(mut bytes: &[u8]) -> Vec<Hop> {
    let mut hops = Vec::new();
    while let (Some(len), Some(oif)) = (read_u16(bytes, 0), read_u32(bytes, 4)) {
        let len = usize::from(len);
        let Some(hop) = bytes.get(8..len) else { break };
        let mut gateway = None;
        for attr in Attrs(hop) {
            match attr.kind {
                RTA_GATEWAY => gateway = attr.get_ip(),
                RTA_VIA => gateway = read_via(attr),
                _ => {}
            }
        }
        hops.push(Hop {
            oif: (oif != 0).then_some(oif),
            gateway,
            onlink: bytes[2] & ONLINK != 0,
            weight: u16::from(bytes[3]) + 1,
        });
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    hops
}

impl Parts {
    fn prefix(&self) -> Option<IpNetwork> {
        let unspecified = if self.v6 {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        IpNetwork::new(self.destination.unwrap_or(unspecified), self.len).ok()
    }

    fn into_route(self) -> Option<Route> {
        let prefix = self.prefix()?;
        let kind = kind_from(self.kind);
        let target = match kind {
            // IPv6 shows the `lo` device here.
            RouteKind::Blackhole
            | RouteKind::Unreachable
            | RouteKind::Prohibit
            | RouteKind::Throw => Target::None,
            _ => match (self.nexthop, self.hops.is_empty()) {
                (Some(id), _) => Target::Nexthop(id),
                (None, false) => Target::Multipath(self.hops),
                (None, true) => Target::Hop(Hop {
                    oif: self.oif,
                    gateway: self.gateway,
                    onlink: self.flags & u32::from(ONLINK) != 0,
                    weight: 1,
                }),
            },
        };
        Some(Route {
            prefix,
            table: self.table,
            metric: self.metric,
            protocol: self.protocol,
            kind,
            scope: if self.v6 {
                Scope::Global
            } else {
                scope_from(self.scope)
            },
            source: self.source,
            mtu: self.mtu,
            target,
        })
    }
}

/// The route in a message; `None` for cached routes and other messages.
pub(crate) fn read(message: &Message<'_>) -> Option<Route> {
    parse(message)
        .filter(|parts| parts.flags & RTM_F_CLONED == 0)?
        .into_route()
}

/// The row that matched a lookup with `fib_match`.
pub(crate) fn read_match(message: &Message<'_>) -> Option<Route> {
    parse(message)?.into_route()
}

/// The resolved route of a lookup.
pub(crate) fn read_decision(message: &Message<'_>) -> Option<RouteDecision> {
    let parts = parse(message)?;
    let first = parts.hops.first();
    Some(RouteDecision {
        kind: kind_from(parts.kind),
        oif: parts.oif.or_else(|| first.and_then(|hop| hop.oif)),
        gateway: parts.gateway.or_else(|| first.and_then(|hop| hop.gateway)),
        source: parts.source,
        table: parts.table,
        mtu: parts.mtu,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::Messages;

    fn round_trip(route: &Route) -> Option<Route> {
        let mut writer = Writer::default();
        write_change(&mut writer, &Change::Replace(route.clone()), 1);
        read(&Messages(writer.as_slice()).next()?)
    }

    fn hop(v6: bool) -> impl Strategy<Value = Hop> {
        let gateway = if v6 {
            any::<u128>()
                .prop_map(|bits| IpAddr::V6(bits.into()))
                .boxed()
        } else {
            prop_oneof![
                any::<u32>().prop_map(|bits| IpAddr::V4(bits.into())),
                any::<u128>().prop_map(|bits| IpAddr::V6(bits.into())),
            ]
            .boxed()
        };
        (
            proptest::option::of(1..1000_u32),
            proptest::option::of(gateway),
            any::<bool>(),
        )
            .prop_map(|(oif, gateway, onlink)| Hop {
                oif,
                gateway,
                onlink,
                weight: 1,
            })
    }

    fn route() -> impl Strategy<Value = Route> {
        any::<bool>().prop_flat_map(|v6| {
            let prefix = if v6 {
                (any::<u128>(), 0..=128_u8)
                    .prop_map(|(bits, len)| IpNetwork::new(IpAddr::V6(bits.into()), len).unwrap())
                    .boxed()
            } else {
                (any::<u32>(), 0..=32_u8)
                    .prop_map(|(bits, len)| IpNetwork::new(IpAddr::V4(bits.into()), len).unwrap())
                    .boxed()
            };
            let target = prop_oneof![
                hop(v6).prop_map(Target::Hop),
                proptest::collection::vec((hop(v6), 1..=256_u16), 2..5).prop_map(|hops| {
                    Target::Multipath(
                        hops.into_iter()
                            .map(|(hop, weight)| Hop { weight, ..hop })
                            .collect(),
                    )
                }),
                (1..u32::MAX).prop_map(Target::Nexthop),
            ];
            let kind = prop_oneof![
                Just(RouteKind::Unicast),
                Just(RouteKind::Blackhole),
                Just(RouteKind::Throw)
            ];
            (
                prefix,
                1..2000_u32,
                0..5000_u32,
                any::<u8>(),
                kind,
                target,
                proptest::option::of(68..9000_u32),
            )
                .prop_map(|(prefix, table, metric, protocol, kind, target, mtu)| {
                    Route {
                        table,
                        metric,
                        kind,
                        mtu,
                        ..Route::new(prefix, protocol, target)
                    }
                })
        })
    }

    proptest! {
        #[test]
        fn a_normalised_route_reads_back_as_written(route in route()) {
            let wanted = route.normalised();
            prop_assert_eq!(round_trip(&wanted), Some(wanted));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let message = Message { kind: RTM_NEWROUTE, flags: 0, sequence: 0, port: 0, payload: &bytes };
            let _ = (read(&message), read_decision(&message));
        }
    }
}
