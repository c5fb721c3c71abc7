//! Held flows in IP sets: members that go by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_netlink::Error;
use cali_netlink::conntrack::Tuple;
use cali_netlink::ipset::SetMember;

use super::applier::Iptables;
use crate::iptables::{HeldSets, held_flows, held_members, held_sets};

impl Iptables {
    /// Changes which flows are held; `kept` are all that are held afterwards.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn change_held(
        &mut self,
        gone: &BTreeMap<Tuple, Tuple>,
        new: &BTreeMap<Tuple, Tuple>,
        kept: &BTreeMap<Tuple, Tuple>,
    ) -> Result<(), Error> {
        let mut gone = held_sets(gone);
        if !gone.is_empty() {
            // Flows between the same two addresses share members.
            let kept = held_sets(kept);
            for (name, members) in &mut gone {
                let kept = kept.get(name);
                members.retain(|member| !kept.is_some_and(|kept| kept.contains(member)));
            }
        }
        self.sets.change_timed(&gone, &held_sets(new))
    }

    /// Whether sets of held flows have lost their members since the last call.
    pub fn take_emptied(&mut self) -> bool {
        std::mem::take(&mut self.sets.emptied)
    }

    /// Releases what is held from and to these addresses.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn release_addresses(&self, addresses: &[IpAddr]) -> Result<(), Error> {
        let mut gone = HeldSets::new();
        for name in self.sets.timed() {
            let mut members = self.sets.members_now(&name)?;
            members.retain(|member| match member {
                SetMember::PortBetween(from, _, _, to) => {
                    addresses.contains(from) || addresses.contains(to)
                }
                _ => false,
            });
            gone.insert(name, members);
        }
        self.sets.change_timed(&gone, &HeldSets::new())
    }

    fn held_now(&self) -> Result<HeldSets, Error> {
        let timed = self.sets.timed().into_iter();
        timed
            .map(|name| self.sets.members_now(&name).map(|members| (name, members)))
            .collect()
    }

    /// The flows that are held, as far as the sets say which packets belong together.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn held(&self) -> Result<BTreeMap<Tuple, Tuple>, Error> {
        self.held_now().map(|sets| held_flows(&sets))
    }

    /// The tuples of these flows that the kernel still holds.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn still_held(&self, held: &BTreeMap<Tuple, Tuple>) -> Result<BTreeSet<Tuple>, Error> {
        let now = self.held_now()?;
        let holds = |tuple: &&Tuple| {
            held_members(tuple)
                .iter()
                .all(|(name, member)| now.get(name).is_some_and(|set| set.contains(member)))
        };
        let tuples = held.iter().flat_map(|(original, reply)| [original, reply]);
        Ok(tuples.filter(holds).copied().collect())
    }
}
