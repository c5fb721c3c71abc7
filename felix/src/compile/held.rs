//! Flows that policy forbade while they were established: held in a timed set, dropped in both directions.
//!
//! Deleting a connection tracking entry is not enough: the next segment of either end makes a new one
//! (`nf_conntrack_tcp_loose`), and a datagram from the answering end counts as a new flow of its own.
//! So both tuples of the flow, as they come in before any translation, stand in a set for [`HOLD`], and
//! every packet starts that time again. A SYN is not held: it begins a flow, and policy decides on it.
//!
//! The base chains stand before connection tracking, and exist only while something is held: otherwise
//! packets pay nothing.

use std::sync::Arc;
use std::time::Duration;

use cali_netlink::conntrack::Tuple;
use cali_netlink::nft::{
    Base, BaseHook, Chain, ChainType, CmpOp, DataType, DynsetOp, Elem, Expr, Hook, Key, KeyType,
    Meta, Policy, Reg, Rule, Set, Verdict,
};

use super::expr::{self, Side, counter};
use super::program::{ChainProgram, SetProgram};
use super::rule::address_type;
use crate::calc::IpVersion;

/// How long a flow is held after its last packet: longer than the two hours after which TCP asks by itself whether the
/// other end is still there (`tcp_keepalive_time`), and the quarter of an hour for which it repeats that.
pub const HOLD: Duration = Duration::from_secs(2 * 3600 + 15 * 60);
/// Most tuples that one set holds; two for a flow.
pub const HELD_LIMIT: u32 = 1 << 17;

const TCP: u8 = 6;
const ANSWERS: &str = "answers: ";
const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];
const CHAINS: [(&str, Hook); 2] = [
    ("cali-held-prerouting", Hook::Prerouting),
    ("cali-held-output", Hook::Output),
];

/// The set of one family.
pub fn held_set(v4: bool) -> Set {
    let version = if v4 { IpVersion::V4 } else { IpVersion::V6 };
    let address = address_type(version);
    let key = KeyType::concat(&[
        address,
        address,
        DataType::InetService,
        DataType::InetService,
        DataType::InetProto,
    ]);
    Set {
        timeout: true,
        dynamic: true,
        size: Some(HELD_LIMIT),
        comment: Some("flows that policy forbade while they were established".to_owned()),
        ..Set::exact(name(version), key)
    }
}

/// The two elements of a flow: of its packets, and of the answers. The first names the second in its comment, so that a
/// restarted dataplane knows them as one flow.
pub fn held_elements(original: &Tuple, reply: &Tuple) -> [Elem; 2] {
    let mut first = element(original);
    first.comment = Some(format!(
        "{ANSWERS}{} {} {} {}",
        reply.source, reply.source_port, reply.destination, reply.destination_port
    ));
    [first, element(reply)]
}

fn element(tuple: &Tuple) -> Elem {
    let fields = [
        Key::ip(tuple.source),
        Key::ip(tuple.destination),
        Key::port(tuple.source_port),
        Key::port(tuple.destination_port),
        Key::byte(tuple.protocol),
    ];
    Elem::new(Key::concat(&fields)).timeout(HOLD)
}

/// Reads the first element of a flow back; `None` for the second, and for what is not ours.
pub fn held_flow(elem: &Elem) -> Option<(Tuple, Tuple)> {
    let original = held_tuple(elem)?;
    let mut words = elem.comment.as_deref()?.strip_prefix(ANSWERS)?.split(' ');
    let mut word = || words.next();
    let reply = Tuple {
        source: word()?.parse().ok()?,
        source_port: word()?.parse().ok()?,
        destination: word()?.parse().ok()?,
        destination_port: word()?.parse().ok()?,
        protocol: original.protocol,
    };
    Some((original, reply))
}

/// The tuple of an element.
pub fn held_tuple(elem: &Elem) -> Option<Tuple> {
    let bytes = elem.key.0.as_slice();
    // Each field is padded to four bytes.
    let width = match bytes.len() {
        20 => 4,
        44 => 16,
        _ => return None,
    };
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    Some(Tuple {
        source: Key::bytes(&bytes[..width]).as_ip()?,
        destination: Key::bytes(&bytes[width..2 * width]).as_ip()?,
        source_port: port(2 * width),
        destination_port: port(2 * width + 4),
        protocol: bytes[2 * width + 8],
    })
}

/// Only these protocols can go on after their entry is gone; for the others (ICMP) an answer makes no entry.
pub fn can_be_held(protocol: u8) -> bool {
    // TCP, UDP, DCCP, SCTP, UDP-Lite: what has ports in its first four bytes.
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}

fn name(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "cali40-held",
        IpVersion::V6 => "cali60-held",
    }
}

/// Both sets, without elements.
pub(super) fn sets() -> [SetProgram; 2] {
    [true, false].map(|v4| SetProgram::new(held_set(v4)))
}

/// The names of what this module makes: chains, sets.
pub(super) fn names() -> ([Arc<str>; 2], [Arc<str>; 2]) {
    (
        CHAINS.map(|(chain, _)| chain.into()),
        VERSIONS.map(|version| name(version).into()),
    )
}

/// The base chains.
pub(super) fn chains() -> [ChainProgram; 2] {
    CHAINS.map(|(chain, hook)| {
        let base = BaseHook {
            chain_type: ChainType::Filter,
            hook,
            // Before connection tracking (-200), and before the other raw chains (-300).
            priority: -301,
            policy: Policy::Accept,
        };
        let rules = [begins_a_flow()].into_iter().chain(VERSIONS.map(drop_held));
        ChainProgram::new(Chain::base(chain, base), rules)
    })
}

/// `tcp flags & (syn | ack) == syn accept`; the flags are byte 13 (RFC 9293 §3.1).
fn begins_a_flow() -> Rule {
    let mut exprs = expr::protocol(TCP, false).to_vec();
    exprs.extend([
        Expr::Payload {
            base: Base::Transport,
            offset: 13,
            len: 1,
            dreg: Reg::R1,
        },
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::byte(0x12),
            xor: Key::byte(0),
        },
        expr::cmp(CmpOp::Eq, Key::byte(0x02)),
        Expr::Verdict(Verdict::Accept),
    ]);
    Rule::new(exprs)
}

fn drop_held(version: IpVersion) -> Rule {
    let width = match version {
        IpVersion::V4 => 1,
        IpVersion::V6 => 4,
    };
    let set: Arc<str> = name(version).into();
    let mut exprs = expr::family(version).to_vec();
    exprs.extend([
        expr::load_address(Side::Source, version, Reg::word(0)),
        expr::load_address(Side::Destination, version, Reg::word(width)),
        expr::load_port(Side::Source, Reg::word(2 * width)),
        expr::load_port(Side::Destination, Reg::word(2 * width + 1)),
        Expr::Meta {
            key: Meta::L4Proto,
            dreg: Reg::word(2 * width + 2),
        },
        Expr::Lookup {
            set: set.clone(),
            sreg: Reg::word(0),
            dreg: None,
            negated: false,
        },
        Expr::Dynset {
            set,
            op: DynsetOp::Update,
            sreg: Reg::word(0),
            timeout: Some(HOLD),
        },
        counter(),
        Expr::Verdict(Verdict::Drop),
    ]);
    Rule::new(exprs).comment("forbidden while established")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_survives_the_way_through_its_elements() {
        for [client, server, translated] in [
            ["10.0.0.1", "10.96.0.1", "10.0.0.2"],
            ["fd00::1", "2001:db8::2", "2001:db8::2"],
        ] {
            let original = Tuple {
                source: client.parse().unwrap(),
                destination: server.parse().unwrap(),
                protocol: 17,
                source_port: 40_000,
                destination_port: 53,
            };
            let reply = Tuple {
                source: translated.parse().unwrap(),
                destination: client.parse().unwrap(),
                protocol: 17,
                source_port: 5353,
                destination_port: 40_000,
            };
            let [first, second] = held_elements(&original, &reply);
            assert_eq!(held_flow(&first), Some((original, reply)));
            assert_eq!(held_flow(&second), None);
            assert_eq!(held_tuple(&second), Some(reply));
            // What the kernel takes of a comment.
            assert!(first.comment.is_some_and(|comment| comment.len() < 128));
        }
        assert_eq!(held_tuple(&Elem::new(Key::port(1))), None);
    }
}
