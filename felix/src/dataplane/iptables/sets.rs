//! The IP sets behind the chains: made and filled before them, destroyed after them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_netlink::ipset::{IpSet, IpSets, ListedIpSet, SetMember};
use cali_netlink::{Error, NetNs};
use tracing::{debug, warn};

use crate::iptables::{HeldSets, Program, SET_PREFIXES, SetProgram};

/// A set is exchanged with one of this name when its type or size must change.
const TEMPORARY: &str = "cali-swap";

/// See the module's head.
#[derive(Debug)]
pub(super) struct Sets {
    kernel: IpSets,
    current: BTreeMap<Arc<str>, ListedIpSet>,
    /// Sets whose content is not as it should be, with the reason.
    pub(super) refused: BTreeMap<Arc<str>, String>,
    /// Sets whose members go by themselves were made anew, without members.
    pub(super) emptied: bool,
}

impl Sets {
    /// Reads the sets of ours.
    pub(super) fn adopt(netns: &NetNs) -> Result<Self, Error> {
        let mut sets = Self {
            kernel: IpSets::open(netns)?,
            current: BTreeMap::new(),
            refused: BTreeMap::new(),
            emptied: false,
        };
        sets.read()?;
        Ok(sets)
    }

    /// Reads the sets of ours again; the names of those that are not what they were believed to be.
    pub(super) fn read(&mut self) -> Result<BTreeSet<Arc<str>>, Error> {
        let mut seen = BTreeMap::new();
        for prefix in SET_PREFIXES {
            let listed = self.kernel.list(prefix)?;
            seen.extend(listed.into_iter().map(|set| (set.set.name.clone(), set)));
        }
        let same = |name: &Arc<str>| match (self.current.get(name), seen.get(name)) {
            (Some(a), Some(b)) if a.set.timeout.is_some() => a.set == b.set,
            (Some(a), Some(b)) => a.set == b.set && a.members == b.members,
            (a, b) => a.is_none() && b.is_none(),
        };
        let names = self.current.keys().chain(seen.keys());
        let changed = names.filter(|name| !same(name)).cloned().collect();
        self.current = seen;
        Ok(changed)
    }

    /// The sets of ours.
    pub(super) fn names(&self) -> Vec<Arc<str>> {
        self.current.keys().cloned().collect()
    }

    /// In words, which sets differ from the program's.
    pub(super) fn differing(&self, wanted: &Program) -> Vec<String> {
        let names: BTreeSet<_> = self.current.keys().chain(wanted.sets.keys()).collect();
        let differs = |name: &&Arc<str>| match (self.current.get(*name), wanted.sets.get(*name)) {
            (Some(listed), Some(set)) => {
                listed.set.kind != Some(set.kind)
                    || listed.set.v6 != set.v6
                    || listed.set.timeout != set.timeout
                    || (set.timeout.is_none() && listed.members != set.members)
            }
            _ => true,
        };
        let text = |name: &Arc<str>| format!("IP set {name} differs");
        names.into_iter().filter(differs).map(text).collect()
    }

    /// Makes and fills the sets of the program that are named, as far as the kernel lets us.
    pub(super) fn fill(&mut self, wanted: &Program, names: &BTreeSet<Arc<str>>, max: u32) {
        for name in names {
            let Some(set) = wanted.sets.get(name) else {
                continue;
            };
            match self.fill_one(name, set, max) {
                Ok(()) => {
                    self.refused.remove(name);
                }
                Err(error) => {
                    // What the kernel holds now is not known.
                    self.current.remove(name);
                    if let Ok(Some(listed)) = self.kernel.get(name) {
                        self.current.insert(name.clone(), listed);
                    }
                    warn!(%error, "an IP set is not as it should be");
                    self.refused.insert(name.clone(), error.to_string());
                }
            }
        }
    }

    fn fill_one(&mut self, name: &Arc<str>, wanted: &SetProgram, max: u32) -> Result<(), Error> {
        let set = IpSet {
            name: name.clone(),
            kind: Some(wanted.kind),
            v6: wanted.v6,
            max,
            timeout: wanted.timeout,
        };
        let all: Vec<SetMember> = wanted.members.iter().copied().collect();
        match self.current.get(name) {
            None => {
                self.kernel.create(&set)?;
                self.kernel.change(name, &[], &all)?;
                self.emptied |= set.timeout.is_some();
            }
            // Its members are not the program's.
            Some(listed) if listed.set == set && set.timeout.is_some() => return Ok(()),
            Some(listed) if listed.set == set => {
                let gone: Vec<SetMember> = listed
                    .members
                    .difference(&wanted.members)
                    .copied()
                    .collect();
                let new: Vec<SetMember> = wanted
                    .members
                    .difference(&listed.members)
                    .copied()
                    .collect();
                self.kernel.change(name, &gone, &new)?;
            }
            Some(_) => {
                // Rules go on referring to the name while the content behind it is exchanged.
                let temporary = IpSet {
                    name: TEMPORARY.into(),
                    ..set.clone()
                };
                self.kernel.destroy(&[TEMPORARY.into()]);
                self.kernel.create(&temporary)?;
                self.kernel.change(TEMPORARY, &[], &all)?;
                self.kernel.swap(TEMPORARY, name)?;
                self.emptied |= set.timeout.is_some();
                self.kernel.destroy(&[TEMPORARY.into()]);
            }
        }
        let listed = ListedIpSet {
            set,
            references: 0,
            members: wanted.members.clone(),
        };
        self.current.insert(name.clone(), listed);
        Ok(())
    }

    /// Destroys what the program does not want; true when nothing of it is left.
    pub(super) fn destroy_rest(&mut self, wanted: &Program) -> bool {
        let gone: Vec<Arc<str>> = self
            .current
            .keys()
            .filter(|name| !wanted.sets.contains_key(*name))
            .cloned()
            .collect();
        self.refused
            .retain(|name, _| wanted.sets.contains_key(name));
        let mut done = true;
        for (name, result) in gone.iter().zip(self.kernel.destroy(&gone)) {
            match result {
                Ok(()) => {
                    self.current.remove(name);
                }
                Err(error) if error.is_not_found() => {
                    self.current.remove(name);
                }
                // The kernel frees the rules that used it a little later.
                Err(error) => {
                    debug!(%error, "an IP set stays for now");
                    done = false;
                }
            }
        }
        done
    }

    /// Changes members of sets whose members go by themselves; those that are not there yet get them later.
    pub(super) fn change_timed(&self, gone: &HeldSets, new: &HeldSets) -> Result<(), Error> {
        let none = BTreeSet::new();
        let names: BTreeSet<&Arc<str>> = gone.keys().chain(new.keys()).collect();
        for name in names {
            if !self.current.contains_key(name) {
                continue;
            }
            let of = |sets: &HeldSets| -> Vec<SetMember> {
                sets.get(name).unwrap_or(&none).iter().copied().collect()
            };
            self.kernel.change(name, &of(gone), &of(new))?;
        }
        Ok(())
    }

    /// What a set holds at the moment.
    pub(super) fn members_now(&self, name: &str) -> Result<BTreeSet<SetMember>, Error> {
        let listed = self.kernel.get(name)?;
        Ok(listed.map(|listed| listed.members).unwrap_or_default())
    }

    /// The names of the sets whose members go by themselves.
    pub(super) fn timed(&self) -> Vec<Arc<str>> {
        let timed = self
            .current
            .iter()
            .filter(|(_, set)| set.set.timeout.is_some());
        timed.map(|(name, _)| name.clone()).collect()
    }
}
