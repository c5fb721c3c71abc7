//! Pieces of rules: the expressions behind each match of the policy model.
//!
//! Offsets: IPv4 RFC 791 §3.1, IPv6 RFC 8200 §3, ports in the first four bytes of TCP, UDP and SCTP,
//! ICMP type and code in the first two (RFC 792, RFC 4443 §2.1).

use std::net::IpAddr;
use std::sync::Arc;

use cali_api::Cidr;
use cali_netlink::nft::matching;
pub(super) use cali_netlink::nft::matching::cmp;
use cali_netlink::nft::{Base, CmpOp, Ct, Expr, Key, Meta, Reg, Verdict, ct_state};

use crate::calc::{IpVersion, PortRange};

/// Which end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    Source,
    Destination,
}

fn eq_or_not(negated: bool) -> CmpOp {
    if negated { CmpOp::Neq } else { CmpOp::Eq }
}

/// `meta nfproto ipv4|ipv6`.
pub(super) fn family(version: IpVersion) -> [Expr; 2] {
    matching::family(version == IpVersion::V4)
}

/// `meta l4proto [!=] number`.
pub(super) fn protocol(number: u8, negated: bool) -> [Expr; 2] {
    [
        Expr::Meta {
            key: Meta::L4Proto,
            dreg: Reg::R1,
        },
        cmp(eq_or_not(negated), Key::byte(number)),
    ]
}

/// Loads an address.
pub(super) fn load_address(side: Side, version: IpVersion, dreg: Reg) -> Expr {
    matching::load_address(side == Side::Source, version == IpVersion::V4, dreg)
}

/// Loads a port.
pub(super) fn load_port(side: Side, dreg: Reg) -> Expr {
    let offset = match side {
        Side::Source => 0,
        Side::Destination => 2,
    };
    Expr::Payload {
        base: Base::Transport,
        offset,
        len: 2,
        dreg,
    }
}

/// `ip saddr [!=] network`, for one network.
pub(super) fn network(side: Side, net: Cidr, negated: bool) -> Vec<Expr> {
    let version = IpVersion::of(net.addr());
    let mut exprs = vec![load_address(side, version, Reg::R1)];
    if !net.is_host() {
        let width = if net.is_v4() { 4 } else { 16 };
        let mask: Vec<u8> = (0..width)
            .map(|byte: usize| {
                let bits = usize::from(net.prefix_len())
                    .saturating_sub(byte * 8)
                    .min(8);
                !(0xff_u8.checked_shr(bits as u32).unwrap_or(0))
            })
            .collect();
        let xor = Key::bytes(&vec![0; width]);
        exprs.push(Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::bytes(&mask),
            xor,
        });
    }
    exprs.push(cmp(eq_or_not(negated), Key::ip(net.addr())));
    exprs
}

/// `ip saddr [!=] @set`.
pub(super) fn address_in(
    side: Side,
    version: IpVersion,
    set: Arc<str>,
    negated: bool,
) -> [Expr; 2] {
    [
        load_address(side, version, Reg::R1),
        Expr::Lookup {
            set,
            sreg: Reg::R1,
            dreg: None,
            negated,
        },
    ]
}

/// `ip saddr . meta l4proto . th sport [!=] @set`.
pub(super) fn port_in(side: Side, version: IpVersion, set: Arc<str>, negated: bool) -> [Expr; 4] {
    // Concatenated fields stand one after another in 4-byte words.
    let words = match version {
        IpVersion::V4 => 1,
        IpVersion::V6 => 4,
    };
    [
        load_address(side, version, Reg::word(0)),
        Expr::Meta {
            key: Meta::L4Proto,
            dreg: Reg::word(words),
        },
        load_port(side, Reg::word(words + 1)),
        Expr::Lookup {
            set,
            sreg: Reg::word(0),
            dreg: None,
            negated,
        },
    ]
}

/// `th dport [!=] port or range`.
pub(super) fn port(side: Side, range: PortRange, negated: bool) -> [Expr; 2] {
    let test = if range.first == range.last {
        cmp(eq_or_not(negated), Key::port(range.first))
    } else {
        Expr::Range {
            negated,
            sreg: Reg::R1,
            from: Key::port(range.first),
            to: Key::port(range.last),
        }
    };
    [load_port(side, Reg::R1), test]
}

/// `th dport [!=] @set`.
pub(super) fn port_in_literal(side: Side, set: Arc<str>, negated: bool) -> [Expr; 2] {
    [
        load_port(side, Reg::R1),
        Expr::Lookup {
            set,
            sreg: Reg::R1,
            dreg: None,
            negated,
        },
    ]
}

/// ICMP type, and code with it.
pub(super) fn icmp(icmp_type: u8, code: Option<u8>, negated: bool) -> [Expr; 2] {
    let (len, value) = match code {
        Some(code) => (2, Key::bytes(&[icmp_type, code])),
        None => (1, Key::byte(icmp_type)),
    };
    [
        Expr::Payload {
            base: Base::Transport,
            offset: 0,
            len,
            dreg: Reg::R1,
        },
        cmp(eq_or_not(negated), value),
    ]
}

/// `ct state` has one of these bits.
pub(super) fn ct_state_any(bits: u32) -> [Expr; 3] {
    [
        Expr::Ct {
            key: Ct::State,
            original: None,
            dreg: Reg::R1,
        },
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::host32(bits),
            xor: Key::host32(0),
        },
        cmp(CmpOp::Neq, Key::host32(0)),
    ]
}

/// The flow has one of these status bits (`negated`: none of them).
pub(super) fn ct_status_any(bits: u32, negated: bool) -> [Expr; 3] {
    [
        Expr::Ct {
            key: Ct::Status,
            original: None,
            dreg: Reg::R1,
        },
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::host32(bits),
            xor: Key::host32(0),
        },
        cmp(if negated { CmpOp::Eq } else { CmpOp::Neq }, Key::host32(0)),
    ]
}

/// Sets these bits of the packet's mark, or clears them.
pub(super) fn set_mark(bits: u32, on: bool) -> [Expr; 3] {
    [
        Expr::Meta {
            key: Meta::Mark,
            dreg: Reg::R1,
        },
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::host32(!bits),
            xor: Key::host32(if on { bits } else { 0 }),
        },
        Expr::MetaSet {
            key: Meta::Mark,
            sreg: Reg::R1,
        },
    ]
}

/// The packet's mark has these bits.
pub(super) fn has_mark(bits: u32) -> [Expr; 3] {
    [
        Expr::Meta {
            key: Meta::Mark,
            dreg: Reg::R1,
        },
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::host32(bits),
            xor: Key::host32(0),
        },
        cmp(CmpOp::Eq, Key::host32(bits)),
    ]
}

/// The packet's mark has none of these bits.
pub(super) fn has_no_mark(bits: u32) -> [Expr; 3] {
    let [load, mask, _] = has_mark(bits);
    [load, mask, cmp(CmpOp::Eq, Key::host32(0))]
}

/// `iifname|oifname != "name"`.
pub(super) fn interface_is_not(key: Meta, name: &str) -> [Expr; 2] {
    [
        Expr::Meta { key, dreg: Reg::R1 },
        cmp(CmpOp::Neq, Key::ifname(name)),
    ]
}

/// `ct direction original`.
pub(super) fn original_direction() -> [Expr; 2] {
    [
        Expr::Ct {
            key: Ct::Direction,
            original: None,
            dreg: Reg::R1,
        },
        cmp(CmpOp::Eq, Key::byte(0)),
    ]
}

/// `ct state established,related accept`.
pub(super) fn accept_established() -> Vec<Expr> {
    let mut exprs = ct_state_any(ct_state::ESTABLISHED | ct_state::RELATED).to_vec();
    exprs.push(Expr::Verdict(Verdict::Accept));
    exprs
}

/// `iifname|oifname "prefix*"`.
pub(super) fn interface_prefix(key: Meta, prefix: &str) -> [Expr; 2] {
    let bytes = &prefix.as_bytes()[..prefix.len().min(15)];
    [
        Expr::Meta { key, dreg: Reg::R1 },
        cmp(CmpOp::Eq, Key::bytes(bytes)),
    ]
}

/// A counter that starts at zero.
pub(super) fn counter() -> Expr {
    Expr::Counter {
        packets: 0,
        bytes: 0,
    }
}

/// First and last address of a network.
pub(super) fn bounds(net: Cidr) -> (IpAddr, IpAddr) {
    let first = net.addr();
    let last = match first {
        IpAddr::V4(addr) => {
            let hosts = u32::MAX
                .checked_shr(u32::from(net.prefix_len()))
                .unwrap_or(0);
            IpAddr::V4((addr.to_bits() | hosts).into())
        }
        IpAddr::V6(addr) => {
            let hosts = u128::MAX
                .checked_shr(u32::from(net.prefix_len()))
                .unwrap_or(0);
            IpAddr::V6((addr.to_bits() | hosts).into())
        }
    };
    (first, last)
}
