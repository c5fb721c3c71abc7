//! Which established flows policy forbids. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use cali_api::Key;
use cali_netlink::conntrack::{Flow, Tuple};

use super::Endpoints;
use crate::calc::Direction;
use crate::compile::{Compiler, Suspects};
use crate::verdict::Packet;

/// A flow that must end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Forbidden {
    pub(super) flow: Flow,
    /// Whose policy forbids it.
    pub(super) endpoint: Key,
    pub(super) direction: Direction,
}

/// What the judgement depends on.
pub(super) struct Judge<'a> {
    pub(super) compiler: &'a Compiler,
    pub(super) endpoints: &'a Endpoints,
    /// The node's own addresses: what it sends itself is under no workload's ingress policy.
    pub(super) own: &'a BTreeSet<IpAddr>,
}

impl Judge<'_> {
    /// The forbidden ones of these flows, looking only at suspects.
    pub(super) fn forbidden(&self, flows: Vec<Flow>, suspects: &Suspects) -> Vec<Forbidden> {
        flows
            .into_iter()
            .filter(|flow| {
                suspects.covers(flow.original.source)
                    || suspects.covers(flow.reply.source)
                    || flow
                        .master
                        .is_some_and(|master| suspects.covers(master.source))
            })
            .filter_map(|flow| {
                let (endpoint, direction) =
                    self.against(&flow.original, &flow.reply, flow.master)?;
                Some(Forbidden {
                    flow,
                    endpoint,
                    direction,
                })
            })
            .collect()
    }

    /// Whose policy forbids a flow, if any does.
    ///
    /// Policy sees the packet after translation of its destination and before that of its source: from the original
    /// source to whoever answers. A flow that a helper expected has passed as related: its master is judged.
    pub(super) fn against(
        &self,
        original: &Tuple,
        reply: &Tuple,
        master: Option<Tuple>,
    ) -> Option<(Key, Direction)> {
        let packet = match master {
            Some(master) => first_packet(&master, master.destination, master.destination_port),
            None => first_packet(original, reply.source, reply.source_port),
        };
        let forbids = |addr: IpAddr, direction| {
            let endpoint = self.endpoints.owner_of(addr)?;
            (self.compiler.allows(endpoint, &packet, direction) == Some(false))
                .then(|| (endpoint.clone(), direction))
        };
        let [from_here, to_here] =
            [packet.source, packet.destination].map(|addr| self.own.contains(&addr));
        let host_forbids = |own, direction| {
            let open = self.compiler.is_kept_open(&packet, direction);
            let found = self.compiler.host_forbids(Some(own), &packet, direction);
            let endpoint = found.filter(|_| !open)?;
            // Where connection tracking has begun in the middle of a flow, it may have seen an answer first.
            let (answer, other) = (answer_of(&packet), opposite(direction));
            let may_be_answer = packet.source_port < packet.destination_port
                && (self.compiler.is_kept_open(&answer, other)
                    || self
                        .compiler
                        .host_forbids(Some(own), &answer, other)
                        .is_none());
            (!may_be_answer).then_some((endpoint, direction))
        };
        let is_workload = |addr| self.endpoints.owner_of(addr).is_some();
        match (from_here, to_here) {
            (true, true) => None,
            // Whom the host reaches among its own workloads is not asked.
            (true, false) if is_workload(packet.destination) => None,
            (true, false) => host_forbids(packet.source, Direction::Egress),
            (false, true) => forbids(packet.source, Direction::Egress).or_else(|| {
                let asked = !is_workload(packet.source);
                asked
                    .then(|| host_forbids(packet.destination, Direction::Ingress))
                    .flatten()
            }),
            (false, false) => forbids(packet.source, Direction::Egress)
                .or_else(|| forbids(packet.destination, Direction::Ingress)),
        }
    }
}

const fn opposite(direction: Direction) -> Direction {
    match direction {
        Direction::Ingress => Direction::Egress,
        Direction::Egress => Direction::Ingress,
    }
}

fn answer_of(packet: &Packet) -> Packet {
    Packet {
        source: packet.destination,
        destination: packet.source,
        source_port: packet.destination_port,
        destination_port: packet.source_port,
        ..*packet
    }
}

fn first_packet(original: &Tuple, destination: IpAddr, destination_port: u16) -> Packet {
    let is_icmp = matches!(original.protocol, 1 | 58);
    let [icmp_type, code] = original.destination_port.to_be_bytes();
    Packet {
        source: original.source,
        destination,
        protocol: original.protocol,
        source_port: if is_icmp { 0 } else { original.source_port },
        destination_port: if is_icmp { 0 } else { destination_port },
        icmp: is_icmp.then_some((icmp_type, code)),
    }
}
