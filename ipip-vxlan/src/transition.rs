//! Whether nodes may still send in the former way, because a pool's encapsulation was edited a moment ago or a node has
//! not followed yet. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cali_api::Cidr;

use crate::{Encap, Receives, Resolver, Scope, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE};

/// Remembers the pools' encapsulations and when they last changed.
#[derive(Debug, Default)]
pub(crate) struct Transition {
    seen: BTreeMap<Cidr, Encap>,
    edited: Option<Instant>,
}

impl Transition {
    /// Takes the pools in.
    pub(crate) fn see(&mut self, resolver: &Resolver, now: Instant) {
        let seen: BTreeMap<Cidr, Encap> = resolver
            .pools()
            .map(|pool| (pool.cidr, pool.encap))
            .collect();
        let edited = self
            .seen
            .iter()
            .any(|(cidr, encap)| seen.get(cidr) != Some(encap));
        if edited {
            self.edited = Some(now);
        }
        self.seen = seen;
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
    use cali_api::NodeName;

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
