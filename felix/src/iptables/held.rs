//! Flows that policy forbade while they were established, as members of IP sets.
//!
//! No type of set holds both ports of a packet, so there are two for each family: one with the destination's port and one
//! with the source's. A packet that is in both is dropped, and both its members start their time again. Where two flows
//! between the same two addresses are held, a third that has one port of either is held with them; its SYN is not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_netlink::conntrack::Tuple;
use cali_netlink::ipset::{SetMember, SetType};

use super::names;
use super::program::SetProgram;
use crate::calc::IpVersion;
use crate::compile::HOLD;

const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];

/// Members of each of the sets, by its name.
pub(crate) type HeldSets = BTreeMap<Arc<str>, BTreeSet<SetMember>>;

/// The two members of a packet.
pub(crate) fn held_members(tuple: &Tuple) -> [(Arc<str>, SetMember); 2] {
    let [by_destination, by_source] = names::held_sets(IpVersion::of(tuple.source));
    let member =
        |port| SetMember::PortBetween(tuple.source, tuple.protocol, port, tuple.destination);
    [
        (by_destination, member(tuple.destination_port)),
        (by_source, member(tuple.source_port)),
    ]
}

/// The members of flows, both directions of each.
pub(crate) fn held_sets<'a>(flows: impl IntoIterator<Item = (&'a Tuple, &'a Tuple)>) -> HeldSets {
    let mut sets = HeldSets::new();
    for (original, reply) in flows {
        for (set, member) in [original, reply].into_iter().flat_map(held_members) {
            sets.entry(set).or_default().insert(member);
        }
    }
    sets
}

/// The flows that members add up to: what a successor knows of them. Which packet began a flow is not said, so the one
/// towards the lower port counts; flows whose addresses are translated are not found, and stay held for their time.
pub(crate) fn held_flows(sets: &HeldSets) -> BTreeMap<Tuple, Tuple> {
    let mut tuples = BTreeSet::new();
    for version in VERSIONS {
        let [destinations, sources] = names::held_sets(version);
        let (Some(destinations), Some(sources)) = (sets.get(&destinations), sets.get(&sources))
        else {
            continue;
        };
        let mut ports: BTreeMap<_, Vec<u16>> = BTreeMap::new();
        for member in sources {
            if let SetMember::PortBetween(source, protocol, port, destination) = *member {
                let between = ports.entry((source, protocol, destination)).or_default();
                between.push(port);
            }
        }
        for member in destinations {
            if let SetMember::PortBetween(source, protocol, port, destination) = *member {
                let found = ports.get(&(source, protocol, destination));
                tuples.extend(found.into_iter().flatten().map(|source_port| Tuple {
                    source,
                    destination,
                    protocol,
                    source_port: *source_port,
                    destination_port: port,
                }));
            }
        }
    }
    let with_answer = tuples.iter().map(|tuple| {
        let answer = Tuple {
            source: tuple.destination,
            destination: tuple.source,
            protocol: tuple.protocol,
            source_port: tuple.destination_port,
            destination_port: tuple.source_port,
        };
        (*tuple, answer)
    });
    with_answer
        .filter(|(tuple, answer)| {
            tuples.contains(answer) && tuple.destination_port <= tuple.source_port
        })
        .collect()
}

/// The sets, without members.
pub(super) fn sets() -> impl Iterator<Item = (Arc<str>, SetProgram)> {
    VERSIONS.into_iter().flat_map(|version| {
        names::held_sets(version).map(|name| {
            let set = SetProgram {
                kind: SetType::IpPortIp,
                v6: version == IpVersion::V6,
                members: BTreeSet::new(),
                timeout: Some(seconds()),
            };
            (name, set)
        })
    })
}

fn seconds() -> u32 {
    u32::try_from(HOLD.as_secs()).unwrap_or(u32::MAX)
}

/// The rule that finds held packets.
pub(super) fn find(version: IpVersion) -> String {
    let [by_destination, by_source] = names::held_sets(version);
    format!(
        "-m set --match-set {by_destination} src,dst,dst -m set --match-set {by_source} src,src,dst -j {CHAIN}"
    )
}

/// What becomes of them. A SYN begins a flow of its own: policy decides on it.
pub(super) fn rules(version: IpVersion) -> Vec<String> {
    let [by_destination, by_source] = names::held_sets(version);
    let again = |set: &str, ports: &str| {
        format!(
            "-j SET --add-set {set} {ports} --exist --timeout {}",
            seconds()
        )
    };
    vec![
        "-p 6 -m tcp --tcp-flags SYN,ACK SYN -j RETURN".to_owned(),
        again(&by_destination, "src,dst,dst"),
        again(&by_source, "src,src,dst"),
        "-m comment --comment \"forbidden while established\" -j DROP".to_owned(),
    ]
}

/// The chain of held packets.
pub(super) const CHAIN: &str = "cali-held";

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(client: &str, port: u16, server: &str, to: u16) -> (Tuple, Tuple) {
        let tuple = |source: &str, source_port, destination: &str, destination_port| Tuple {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol: 6,
            source_port,
            destination_port,
        };
        (
            tuple(client, port, server, to),
            tuple(server, to, client, port),
        )
    }

    #[test]
    fn flows_are_read_back_from_their_members() {
        let flows = BTreeMap::from([
            flow("10.0.0.1", 40_000, "10.0.0.2", 80),
            flow("10.0.0.3", 40_000, "10.0.0.2", 80),
            flow("fd00::1", 40_001, "fd00::2", 443),
        ]);
        assert_eq!(held_flows(&held_sets(&flows)), flows);
        let (original, mut reply) = flow("10.0.0.1", 40_000, "10.96.0.1", 80);
        reply.source = "10.0.0.2".parse().unwrap();
        let translated = BTreeMap::from([(original, reply)]);
        assert_eq!(held_flows(&held_sets(&translated)), BTreeMap::new());
    }
}
