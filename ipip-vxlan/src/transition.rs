//! Whether nodes may still send in the former way, because a pool's encapsulation or a node's subnet was edited a moment ago,
//! or a node has not followed yet. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cali_api::{Cidr, NodeName};
use cali_netlink::IpNetwork;

use crate::{Encap, Receives, Resolver, Scope, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE};

/// Remembers what decides the way to a node (pools' encapsulations, nodes' own addresses and subnets) and when it last changed.
#[derive(Debug, Default)]
pub(crate) struct Transition {
    pools: BTreeMap<Cidr, Encap>,
    nodes: BTreeMap<NodeName, [Option<IpNetwork>; 2]>,
    edited: Option<Instant>,
}

impl Transition {
    /// Takes pools and nodes in.
    pub(crate) fn see(&mut self, resolver: &Resolver, now: Instant) {
        let pools = resolver.pools().map(|pool| (pool.cidr, pool.encap));
        let nodes = resolver.local().into_iter().chain(resolver.remotes());
        let nodes = nodes.map(|node| (node.name.clone(), [node.v4, node.v6]));
        let pools_edited = replace(&mut self.pools, pools.collect(), |_| true);
        // A node that has gone sends nothing.
        let nodes_edited = replace(&mut self.nodes, nodes.collect(), |now| now.is_some());
        if pools_edited || nodes_edited {
            self.edited = Some(now);
        }
    }

    /// An edit is younger than `linger`.
    pub(crate) fn lasts(&self, linger: Duration, now: Instant) -> bool {
        self.edited
            .is_some_and(|at| now.saturating_duration_since(at) < linger)
    }

    /// When [`Self::lasts`] ends.
    pub(crate) fn end(&self, linger: Duration, now: Instant) -> Option<Instant> {
        self.edited.map(|at| at + linger).filter(|end| *end > now)
    }

    /// A pool has packets sent unencapsulated, at least between some nodes.
    pub(crate) fn asks_direct(resolver: &Resolver) -> bool {
        asked(resolver).direct
    }

    /// A node that tells what it receives does not receive yet what the pools ask for: it has not followed, and still sends
    /// in the former way.
    pub(crate) fn behind(resolver: &Resolver) -> bool {
        let asked = asked(resolver);
        resolver
            .remotes()
            .filter_map(|node| node.receives)
            .any(|word| {
                asked.direct && !word.direct
                    || asked.ipip && !word.ipip
                    || asked.vxlan_v4 && !word.vxlan_v4
                    || asked.vxlan_v6 && !word.vxlan_v6
            })
    }
}

/// Puts `new` in the place of what was seen; true when something that was known is another now, and that `counts`.
fn replace<K: Ord, V: PartialEq>(
    seen: &mut BTreeMap<K, V>,
    new: BTreeMap<K, V>,
    counts: impl Fn(Option<&V>) -> bool,
) -> bool {
    let former = std::mem::replace(seen, new);
    former.iter().any(|(key, value)| {
        let now = seen.get(key);
        now != Some(value) && counts(now)
    })
}

/// Everything that the pools ask for.
fn asked(resolver: &Resolver) -> Receives {
    let mut asked = Receives::default();
    for pool in resolver.pools() {
        match pool.encap {
            Encap::Ipip(_) => asked.ipip = true,
            Encap::Vxlan(_) if pool.cidr.is_v4() => asked.add_device(VXLAN_V4_DEVICE),
            Encap::Vxlan(_) => asked.add_device(VXLAN_V6_DEVICE),
            Encap::None => {}
        }
        asked.direct |= !matches!(
            pool.encap,
            Encap::Ipip(Scope::Always) | Encap::Vxlan(Scope::Always)
        );
    }
    asked
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Endpoint, Pool};

    fn resolver(encap: Encap, word: Option<&str>) -> Resolver {
        let mut resolver = Resolver::new(NodeName::from("a"));
        resolver.set_pool(Pool {
            name: "p".into(),
            cidr: "10.0.0.0/16".parse().unwrap(),
            encap,
        });
        resolver.set_node(Endpoint {
            receives: word.map(|word| word.parse().unwrap()),
            ..Endpoint::named(NodeName::from("b"))
        });
        resolver
    }

    #[test]
    fn an_edit_lasts_for_its_time_and_a_first_sight_is_none() {
        let (mut transition, start, linger) = (
            Transition::default(),
            Instant::now(),
            Duration::from_secs(60),
        );
        transition.see(&resolver(Encap::None, None), start);
        assert!(!transition.lasts(linger, start));
        transition.see(&resolver(Encap::Ipip(Scope::Always), None), start);
        assert!(transition.lasts(linger, start));
        let later = start + linger;
        transition.see(&resolver(Encap::Ipip(Scope::Always), None), later);
        assert!(!transition.lasts(linger, later));
    }

    #[test]
    fn another_subnet_of_a_node_is_an_edit_and_its_coming_or_going_is_none() {
        let (mut transition, now, linger) = (
            Transition::default(),
            Instant::now(),
            Duration::from_secs(60),
        );
        let mut resolver = resolver(Encap::Vxlan(Scope::CrossSubnet), None);
        let mut see = |resolver: &Resolver| {
            transition.see(resolver, now);
            transition.lasts(linger, now)
        };
        let node = |v4: &str| Endpoint {
            v4: Some(v4.parse().unwrap()),
            ..Endpoint::named(NodeName::from("c"))
        };
        assert!(!see(&resolver));
        resolver.set_node(node("10.0.0.3/24"));
        assert!(!see(&resolver));
        resolver.remove_node(&NodeName::from("c"));
        assert!(!see(&resolver));
        resolver.set_node(node("10.0.0.3/24"));
        assert!(!see(&resolver));
        resolver.set_node(node("10.0.0.3/32"));
        assert!(see(&resolver));
    }

    #[test]
    fn a_node_is_behind_while_its_word_lacks_what_pools_ask_for() {
        let cross = Encap::Vxlan(Scope::CrossSubnet);
        for (word, behind) in [
            (None, false),
            (Some("direct"), true),
            (Some("vxlan"), true),
            (Some("direct,vxlan"), false),
        ] {
            assert_eq!(
                Transition::behind(&resolver(cross, word)),
                behind,
                "{word:?}"
            );
        }
    }
}
