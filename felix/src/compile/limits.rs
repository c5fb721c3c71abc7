//! What limits and marks the traffic of single workloads: packet rates, connections at a time, code points.
//!
//! | what | where | why there |
//! |---|---|---|
//! | packet rate | chain `cali-rt-IF` (to) or `cali-rf-IF` (from), by a verdict map before anything else of the base chain | every packet counts, those of established flows too |
//! | connections | the endpoint's own chain | only new flows come there |
//! | code point | base chain postrouting −150, by a verdict map to one chain per code point | where the destination is the final one |
//!
//! Each map, and the way to it, is there only while some workload has a limit: nobody else's packets pay for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cali_netlink::nft::{
    Base, Chain, CmpOp, DataType, Elem, Expr, Key, KeyType, Meta, Reg, Reject, Rule as NftRule,
    Set, Verdict,
};

use super::base::{POSTROUTING_MANGLE, TCP, base_chain, pool_set};
use super::compiler::Compiler;
use super::desired::Desired;
use super::expr::{self, Side, cmp, counter};
use super::names;
use super::program::{ChainProgram, SetProgram};
use crate::calc::{Direction, IpVersion, Limits};

const DSCP_MAP: &str = "cali-dscp";
const DSCP_CHAIN: &str = "cali-egress-dscp";

/// Who has limits, by interface.
#[derive(Debug, Default)]
pub(super) struct Limited(BTreeMap<Arc<str>, Limits>);

impl Limited {
    /// Whether somebody's packet rate is limited.
    pub(super) fn rates(&self, direction: Direction) -> bool {
        self.0
            .values()
            .any(|limits| limits.of(direction).packets.is_some())
    }

    fn has_dscp(&self, code: u8) -> bool {
        self.0.values().any(|limits| limits.dscp == Some(code))
    }
}

const fn rate_map(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "cali-rate-to-wl",
        Direction::Egress => "cali-rate-from-wl",
    }
}

/// The way to the packet rates of a direction: the first rule of each base chain that leads to workloads.
pub(super) fn ask_rates(direction: Direction) -> NftRule {
    let key = match direction {
        Direction::Ingress => Meta::OifName,
        Direction::Egress => Meta::IifName,
    };
    by_interface(key, rate_map(direction))
}

fn by_interface(key: Meta, map: &str) -> NftRule {
    NftRule::new([
        Expr::Meta { key, dreg: Reg::R1 },
        Expr::VerdictMap {
            map: map.into(),
            sreg: Reg::R1,
        },
    ])
}

/// Refuses connections beyond the limit; for a chain that only new flows come to.
pub(super) fn connections(limit: u32) -> NftRule {
    let mut exprs = expr::protocol(TCP, false).to_vec();
    exprs.extend([
        Expr::ConnLimit {
            count: limit,
            over: true,
        },
        counter(),
        Expr::Reject(Reject::TcpReset),
    ]);
    NftRule::new(exprs).comment("too many connections")
}

fn rate_chain(name: Arc<str>, (rate, burst): (u64, u32)) -> ChainProgram {
    let beyond = NftRule::new([
        Expr::Limit {
            rate,
            per: Duration::from_secs(1),
            burst,
            bytes: false,
            over: true,
        },
        counter(),
        Expr::Verdict(Verdict::Drop),
    ]);
    ChainProgram::new(Chain::regular(name), [beyond.comment("packet rate")])
}

/// Marks what leaves the cluster: packets to pods and nodes go on as they are.
fn dscp_chain(code: u8) -> ChainProgram {
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let family = expr::family(version);
        for inside in ["pools", "nodes"] {
            let known =
                expr::address_in(Side::Destination, version, pool_set(inside, version), false);
            let back = [Expr::Verdict(Verdict::Return)];
            let exprs = [family.as_slice(), &known, &back].concat();
            rules.push(NftRule::new(exprs));
        }
        let exprs = [family.as_slice(), &[counter()], &set_dscp(version, code)].concat();
        rules.push(NftRule::new(exprs));
    }
    ChainProgram::new(Chain::regular(dscp_chain_name(code)), rules)
}

fn dscp_chain_name(code: u8) -> Arc<str> {
    format!("cali-dscp-{code}").into()
}

/// Writes the code point into the first two bytes of the header, where it is: the upper six bits of the second byte
/// (RFC 791 §3.1 and RFC 2474 §3), or the four before and the two behind the border of the bytes (RFC 8200 §3).
fn set_dscp(version: IpVersion, code: u8) -> [Expr; 3] {
    let (mask, bits, checksum) = match version {
        IpVersion::V4 => ([0xff, 0x03], u16::from(code) << 2, Some(10)),
        IpVersion::V6 => ([0xf0, 0x3f], u16::from(code) << 6, None),
    };
    [
        Expr::Payload {
            base: Base::Network,
            offset: 0,
            len: 2,
            dreg: Reg::R1,
        },
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::bytes(&mask),
            xor: Key::bytes(&bits.to_be_bytes()),
        },
        Expr::PayloadSet {
            base: Base::Network,
            offset: 0,
            len: 2,
            sreg: Reg::R1,
            checksum,
        },
    ]
}

/// What the host forwards of workloads with a code point; what it sends itself has come in by no interface.
fn egress_dscp() -> ChainProgram {
    let forwarded = [
        Expr::Meta {
            key: Meta::Iif,
            dreg: Reg::R1,
        },
        cmp(CmpOp::Neq, Key::host32(0)),
    ];
    let to = by_interface(Meta::IifName, DSCP_MAP);
    let rule = NftRule::new([forwarded.as_slice(), &to.exprs].concat());
    ChainProgram::new(base_chain(DSCP_CHAIN, POSTROUTING_MANGLE), [rule])
}

/// A verdict map from interfaces, while it is wanted.
fn keep_map(desired: &mut Desired, name: &'static str, wanted: bool) {
    match (wanted, desired.program.sets.contains_key(name)) {
        (true, false) => {
            let set = Set::verdict_map(name, KeyType::one(DataType::IfName));
            desired.put_set(SetProgram::new(set));
        }
        (false, true) => desired.remove_set(&Arc::from(name)),
        _ => {}
    }
}

impl Compiler {
    /// Takes in what the workload on this interface may send and receive; `None` where there is none.
    pub(super) fn put_limits(&mut self, interface: &Arc<str>, limits: Option<Limits>) {
        let limits = limits.unwrap_or_default();
        let former = self.limited.0.remove(interface).unwrap_or_default();
        if limits != Limits::default() {
            self.limited.0.insert(interface.clone(), limits);
        }
        if former == limits {
            return;
        }
        let mut ways_changed = false;
        for direction in [Direction::Ingress, Direction::Egress] {
            let map = rate_map(direction);
            let wanted = self.limited.rates(direction);
            ways_changed |= wanted != self.desired.program.sets.contains_key(map);
            keep_map(&mut self.desired, map, wanted);
            let rate = limits.of(direction).packets;
            self.put_way(
                map,
                interface,
                names::rate_chain(interface, direction),
                rate.map(|rate| move |name| rate_chain(name, rate)),
            );
        }
        self.put_dscp(interface, former.dscp, limits.dscp);
        if ways_changed {
            self.put_base_chains();
        }
    }

    /// The chain of an interface and the way to it, or neither.
    fn put_way(
        &mut self,
        map: &str,
        interface: &Arc<str>,
        chain: Arc<str>,
        content: Option<impl FnOnce(Arc<str>) -> ChainProgram>,
    ) {
        let key = Key::ifname(interface);
        match content {
            Some(content) => {
                self.desired.put_chain(content(chain.clone()));
                self.desired
                    .put_element(map, Elem::new(key).verdict(Verdict::Jump(chain)));
            }
            None => {
                self.desired.remove_element(map, &key);
                self.desired.remove_chain(&chain);
            }
        }
    }

    fn put_dscp(&mut self, interface: &Arc<str>, former: Option<u8>, code: Option<u8>) {
        let any = self.limited.0.values().any(|limits| limits.dscp.is_some());
        keep_map(&mut self.desired, DSCP_MAP, any);
        if any {
            self.desired.put_chain(egress_dscp());
        } else {
            self.desired.remove_chain(&Arc::from(DSCP_CHAIN));
        }
        let key = Key::ifname(interface);
        match code {
            Some(code) => {
                let chain = dscp_chain(code);
                let to = Verdict::Jump(chain.chain.name.clone());
                self.desired.put_chain(chain);
                self.desired
                    .put_element(DSCP_MAP, Elem::new(key).verdict(to));
            }
            None => self.desired.remove_element(DSCP_MAP, &key),
        }
        if let Some(former) = former.filter(|code| !self.limited.has_dscp(*code)) {
            self.desired.remove_chain(&dscp_chain_name(former));
        }
    }
}
