//! IP sets in the kernel: an exact set per family, and an interval set while there are networks.
//!
//! A family that no member of any set belongs to has no sets, and no rule looks for it in one: a cluster of one family pays for
//! one. Each set is looked for by its name, one after the other, and each rule is validated again with every change
//! (`nft_set_lookup`, `nft_table_validate`).

use std::sync::Arc;

use cali_netlink::nft::{DataType, Elem, Key, KeyType, Set};
use foldhash::HashMap;

use super::collapse::Thresholds;
use super::desired::Desired;
use super::names;
use super::program::SetProgram;
use super::rule::{Sets, address_type, network_elems, network_set};
use super::stack::comment;
use crate::calc::{IpSetId, IpSetKind, IpVersion, Member};

const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];

/// An IP set's shape: how many members and networks of each family it has.
#[derive(Debug)]
struct KnownSet {
    kind: IpSetKind,
    origin: Arc<str>,
    networks: [usize; 2],
    members: [usize; 2],
}

impl KnownSet {
    fn exact(&self, id: &IpSetId, version: IpVersion) -> SetProgram {
        let address = address_type(version);
        let key = match self.kind {
            IpSetKind::Net => KeyType::one(address),
            IpSetKind::Port => {
                KeyType::concat(&[address, DataType::InetProto, DataType::InetService])
            }
        };
        let mut set = Set::exact(names::exact_set(id, version), key);
        set.comment = Some(comment(&self.origin));
        SetProgram::new(set)
    }

    fn is_small(&self, thresholds: Thresholds) -> bool {
        self.members.iter().sum::<usize>() <= thresholds.small_set
    }
}

/// Which rules must be rendered again after a change of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reshaped {
    /// None.
    Nothing,
    /// Those that look the set up: its networks appeared or disappeared, or it became small or large.
    Set,
    /// All that look a set up: a family came into use or went out of it.
    Family,
}

#[derive(Debug, Default)]
pub(super) struct KnownSets {
    sets: HashMap<IpSetId, KnownSet>,
    /// Members of each family in all sets.
    members: [usize; 2],
    pub(super) thresholds: Thresholds,
}

impl Sets for KnownSets {
    fn has_family(&self, version: IpVersion) -> bool {
        self.members[version as usize] > 0
    }

    fn thresholds(&self) -> Thresholds {
        self.thresholds
    }

    fn is_small(&self, id: &IpSetId) -> bool {
        self.sets
            .get(id)
            .is_some_and(|set| set.is_small(self.thresholds))
    }

    fn has_networks(&self, id: &IpSetId, version: IpVersion) -> bool {
        self.sets
            .get(id)
            .is_some_and(|set| set.networks[version as usize] > 0)
    }
}

impl KnownSets {
    /// A set came into use.
    pub(super) fn create(
        &mut self,
        desired: &mut Desired,
        id: &IpSetId,
        kind: IpSetKind,
        origin: &Arc<str>,
        members: &[Member],
    ) -> Reshaped {
        let set = KnownSet {
            kind,
            origin: origin.clone(),
            networks: [0; 2],
            members: [0; 2],
        };
        for version in VERSIONS {
            if self.has_family(version) {
                desired.put_set(set.exact(id, version));
            }
        }
        self.sets.insert(id.clone(), set);
        self.change(desired, id, members, &[])
    }

    /// Members came or went.
    pub(super) fn change(
        &mut self,
        desired: &mut Desired,
        id: &IpSetId,
        added: &[Member],
        removed: &[Member],
    ) -> Reshaped {
        let Some(set) = self.sets.get_mut(id) else {
            return Reshaped::Nothing;
        };
        let before = set.networks;
        let was_small = set.is_small(self.thresholds);
        let mut members = self.members;
        for (changed, step) in [(added, 1_isize), (removed, -1)] {
            for member in changed {
                let add = |count: &mut usize| *count = count.saturating_add_signed(step);
                let version = version(member) as usize;
                add(&mut set.members[version]);
                add(&mut members[version]);
                if wide(member).is_some() {
                    add(&mut set.networks[version]);
                }
            }
        }
        let after = set.networks;
        let mut reshaped = if was_small == set.is_small(self.thresholds) {
            Reshaped::Nothing
        } else {
            Reshaped::Set
        };
        let origin = set.origin.clone();
        reshaped = reshaped.max(self.count(desired, members));
        for version in VERSIONS {
            let name = names::wide_set(id, version);
            match (before[version as usize] > 0, after[version as usize] > 0) {
                (false, true) => {
                    let mut interval = network_set(name, version);
                    interval.set.comment = Some(comment(&origin));
                    desired.put_set(interval);
                }
                (true, false) => desired.remove_set(&name),
                _ => continue,
            }
            reshaped = reshaped.max(Reshaped::Set);
        }
        for member in removed {
            let (name, elem) = element(id, member);
            desired.remove_element(&name, &elem.key);
        }
        for member in added {
            let (name, elem) = element(id, member);
            desired.put_element(&name, elem);
        }
        reshaped
    }

    /// Nothing looks the set up any more.
    pub(super) fn remove(&mut self, desired: &mut Desired, id: &IpSetId) -> Reshaped {
        let Some(set) = self.sets.remove(id) else {
            return Reshaped::Nothing;
        };
        let mut members = self.members;
        for version in VERSIONS {
            desired.remove_set(&names::exact_set(id, version));
            desired.remove_set(&names::wide_set(id, version));
            members[version as usize] -= set.members[version as usize];
        }
        self.count(desired, members)
    }

    /// There are so many members of each family now.
    fn count(&mut self, desired: &mut Desired, members: [usize; 2]) -> Reshaped {
        let had = VERSIONS.map(|version| self.has_family(version));
        self.members = members;
        let mut reshaped = Reshaped::Nothing;
        for version in VERSIONS {
            let has = self.has_family(version);
            if has == had[version as usize] {
                continue;
            }
            reshaped = Reshaped::Family;
            for (id, set) in &self.sets {
                if has {
                    desired.put_set(set.exact(id, version));
                } else {
                    desired.remove_set(&names::exact_set(id, version));
                }
            }
        }
        reshaped
    }
}

fn version(member: &Member) -> IpVersion {
    IpVersion::of(match member {
        Member::Net(net) => net.addr(),
        Member::Port { addr, .. } => *addr,
    })
}

/// A member that belongs into an interval set.
fn wide(member: &Member) -> Option<cali_api::Cidr> {
    match member {
        Member::Net(net) if !net.is_host() => Some(*net),
        _ => None,
    }
}

/// Where a member lives, and as what.
fn element(id: &IpSetId, member: &Member) -> (Arc<str>, Elem) {
    match member {
        Member::Net(net) => {
            let version = IpVersion::of(net.addr());
            match network_elems(&[*net]).next().filter(|_| !net.is_host()) {
                Some(elem) => (names::wide_set(id, version), elem),
                None => (
                    names::exact_set(id, version),
                    Elem::new(Key::ip(net.addr())),
                ),
            }
        }
        Member::Port {
            addr,
            protocol,
            port,
        } => {
            let fields = [Key::ip(*addr), Key::byte(*protocol), Key::port(*port)];
            (
                names::exact_set(id, IpVersion::of(*addr)),
                Elem::new(Key::concat(&fields)),
            )
        }
    }
}
