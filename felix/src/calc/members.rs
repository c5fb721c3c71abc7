//! Members of one IP set: counted, because several endpoints may contribute the same one, and with
//! networks hidden that a wider network of the set covers.
//!
//! nf_tables interval sets refuse overlapping elements, so only the outermost networks are visible.
//! Single addresses live in an exact set of their own and are never hidden.

use std::collections::BTreeMap;

use cali_api::Cidr;
use foldhash::HashMap;

use super::output::Member;

/// The members of one set.
#[derive(Debug, Default)]
pub(super) struct Members {
    exact: HashMap<Member, u32>,
    /// Networks wider than a single address, ordered so that a network comes before what it contains.
    wide: BTreeMap<Cidr, u32>,
}

impl Members {
    /// Counts one more contribution of `member`; what becomes visible or hidden is told to `change`
    /// (`true`: visible).
    pub(super) fn add(&mut self, member: Member, mut change: impl FnMut(Member, bool)) {
        match member {
            Member::Net(net) if !net.is_host() => {
                let count = self.wide.entry(net).or_default();
                *count += 1;
                if *count > 1 || self.covered(net) {
                    return;
                }
                for inner in self.outermost_within(net) {
                    change(Member::Net(inner), false);
                }
                change(member, true);
            }
            _ => {
                let count = self.exact.entry(member).or_default();
                *count += 1;
                if *count == 1 {
                    change(member, true);
                }
            }
        }
    }

    /// Takes one contribution of `member` back.
    pub(super) fn remove(&mut self, member: Member, mut change: impl FnMut(Member, bool)) {
        match member {
            Member::Net(net) if !net.is_host() => {
                let Some(count) = self.wide.get_mut(&net) else {
                    return;
                };
                *count -= 1;
                if *count > 0 {
                    return;
                }
                self.wide.remove(&net);
                if self.covered(net) {
                    return;
                }
                change(member, false);
                for inner in self.outermost_within(net) {
                    change(Member::Net(inner), true);
                }
            }
            _ => {
                let Some(count) = self.exact.get_mut(&member) else {
                    return;
                };
                *count -= 1;
                if *count == 0 {
                    self.exact.remove(&member);
                    change(member, false);
                }
            }
        }
    }

    /// All visible members, sorted.
    pub(super) fn visible(&self) -> Vec<Member> {
        let mut outermost: Option<Cidr> = None;
        let mut all: Vec<Member> = self.exact.keys().copied().collect();
        for net in self.wide.keys() {
            if outermost.is_none_or(|outer| !outer.contains_cidr(net)) {
                outermost = Some(*net);
                all.push(Member::Net(*net));
            }
        }
        all.sort_unstable();
        all
    }

    /// Whether a strictly wider network is present.
    fn covered(&self, net: Cidr) -> bool {
        (0..net.prefix_len()).any(|len| {
            Cidr::masked(net.addr(), len).is_ok_and(|outer| self.wide.contains_key(&outer))
        })
    }

    /// The widest networks strictly inside `net`.
    fn outermost_within(&self, net: Cidr) -> Vec<Cidr> {
        let mut found: Vec<Cidr> = Vec::new();
        for (inner, _) in self.wide.range(net..) {
            if !net.contains_cidr(inner) {
                break;
            }
            if *inner != net && found.last().is_none_or(|outer| !outer.contains_cidr(inner)) {
                found.push(*inner);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Member {
        Member::Net(text.parse().unwrap())
    }

    #[test]
    fn a_wider_network_hides_and_reveals_what_it_covers() {
        let mut members = Members::default();
        let mut seen = Vec::new();
        for text in ["10.1.0.0/16", "10.1.2.0/24", "10.2.0.0/16", "10.1.2.3/32"] {
            members.add(net(text), |member, on| seen.push((member, on)));
        }
        assert_eq!(
            seen,
            [
                (net("10.1.0.0/16"), true),
                (net("10.2.0.0/16"), true),
                (net("10.1.2.3/32"), true)
            ]
        );
        seen.clear();
        members.add(net("10.0.0.0/8"), |member, on| seen.push((member, on)));
        assert_eq!(
            seen,
            [
                (net("10.1.0.0/16"), false),
                (net("10.2.0.0/16"), false),
                (net("10.0.0.0/8"), true)
            ]
        );
        members.remove(net("10.1.0.0/16"), |_, _| panic!("it was hidden"));
        seen.clear();
        members.remove(net("10.0.0.0/8"), |member, on| seen.push((member, on)));
        assert_eq!(
            seen,
            [
                (net("10.0.0.0/8"), false),
                (net("10.1.2.0/24"), true),
                (net("10.2.0.0/16"), true)
            ]
        );
    }

    proptest! {
        /// Told changes always add up to the outermost networks of what was added and not removed.
        #[test]
        fn changes_add_up_to_what_is_visible(steps in prop::collection::vec((any::<bool>(), 0u8..8, 0u8..=8), 0..60)) {
            let mut members = Members::default();
            let mut told: BTreeSet<Member> = BTreeSet::new();
            let mut held: Vec<Cidr> = Vec::new();
            for (add, bits, len) in steps {
                // Addresses and lengths are few, so that equal and nested networks are common.
                let net = Cidr::masked([10, 0, 0, bits << 5].into(), 24 + len).unwrap();
                let mut note = |member: Member, on: bool| {
                    assert!(if on { told.insert(member) } else { told.remove(&member) }, "{member:?} told twice");
                };
                if add {
                    held.push(net);
                    members.add(Member::Net(net), &mut note);
                } else if let Some(at) = held.iter().position(|one| *one == net) {
                    held.swap_remove(at);
                    members.remove(Member::Net(net), &mut note);
                }
                let expected: BTreeSet<Member> = held
                    .iter()
                    .filter(|net| net.is_host() || !held.iter().any(|other| !other.is_host() && other != *net && other.contains_cidr(net)))
                    .map(|net| Member::Net(*net))
                    .collect();
                prop_assert_eq!(&told, &expected);
                prop_assert_eq!(members.visible(), expected.into_iter().collect::<Vec<_>>());
            }
        }
    }
}
