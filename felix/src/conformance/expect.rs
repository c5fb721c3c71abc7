//! What the model says to a packet on its whole way through the node.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::backend::Interfaces;
use super::case::NODE;
use crate::calc::Direction;
use crate::verdict::{Model, Packet, Verdict, Way};

/// The answer, and what it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Whether the packet passes.
    pub allowed: bool,
    /// What each endpoint on the way says, as far as the packet comes.
    pub reasons: Vec<String>,
}

/// What the model says: at the sender, at host endpoints on the way, at the receiver. `ends` are the interfaces by which
/// the packet comes in and leaves; `None` where it begins or ends on the node.
#[must_use]
pub fn expected(
    model: &Model,
    packet: &Packet,
    ends: [Option<&str>; 2],
    interfaces: &Interfaces,
) -> Expected {
    let mut way: Vec<(String, Verdict)> = Vec::new();
    let workload = |addr: IpAddr, direction: Direction| {
        let endpoint = model.endpoint_of(addr)?;
        let verdict = model.verdict(&endpoint, packet, direction);
        Some((format!("{direction} of {endpoint}"), verdict))
    };
    let host = |interface: Option<&str>, way: Way| {
        let interface = interface?;
        let none = BTreeSet::new();
        let addresses = interfaces.get(&Arc::from(interface)).unwrap_or(&none);
        let addresses: Vec<IpAddr> = addresses.iter().copied().collect();
        let endpoint = model.host_endpoint_on(NODE, interface, &addresses)?;
        let verdict = model.host_verdict(&endpoint, packet, packet, way);
        Some((format!("{way:?} of {endpoint}"), verdict))
    };
    let outside =
        |interface: Option<&str>| interface.is_some_and(|name| interfaces.contains_key(name));
    match ends {
        [Some(from), to] if !outside(Some(from)) => {
            way.extend(workload(packet.source, Direction::Egress));
            if outside(to) {
                way.extend(host(to, Way::ForwardOut));
            } else if to.is_some() {
                way.extend(workload(packet.destination, Direction::Ingress));
            }
        }
        [from @ Some(_), None] => way.extend(host(from, Way::In)),
        [from @ Some(_), to] => {
            way.extend(host(from, Way::ForwardIn));
            if outside(to) {
                way.extend(host(to, Way::ForwardOut));
            } else {
                way.extend(workload(packet.destination, Direction::Ingress));
            }
        }
        // Whom the host reaches among its own pods is not asked.
        [None, to] if outside(to) => way.extend(host(to, Way::Out)),
        _ => {}
    }
    let denied = way.iter().position(|(_, verdict)| !verdict.is_allow());
    let seen = denied.map_or(way.len(), |at| at + 1);
    let reasons = way
        .iter()
        .take(seen)
        .map(|(place, verdict)| format!("{place}: {:?} by {}", verdict.outcome, verdict.reason));
    Expected {
        allowed: denied.is_none(),
        reasons: reasons.collect(),
    }
}
