//! IP sets in the kernel: an exact set per family, and an interval set while there are networks.

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

/// An IP set's shape: how many networks of each family it has.
#[derive(Debug)]
struct KnownSet {
    origin: Arc<str>,
    networks: [usize; 2],
    members: usize,
}

#[derive(Debug, Default)]
pub(super) struct KnownSets {
    sets: HashMap<IpSetId, KnownSet>,
    pub(super) thresholds: Thresholds,
}

impl Sets for KnownSets {
    fn thresholds(&self) -> Thresholds {
        self.thresholds
    }

    fn is_small(&self, id: &IpSetId) -> bool {
        self.sets
            .get(id)
            .is_some_and(|set| set.members <= self.thresholds.small_set)
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
    ) {
        self.sets.insert(
            id.clone(),
            KnownSet {
                origin: origin.clone(),
                networks: [0; 2],
                members: 0,
            },
        );
        for version in VERSIONS {
            let address = address_type(version);
            let key = match kind {
                IpSetKind::Net => KeyType::one(address),
                IpSetKind::Port => {
                    KeyType::concat(&[address, DataType::InetProto, DataType::InetService])
                }
            };
            let mut set = Set::exact(names::exact_set(id, version), key);
            set.comment = Some(comment(origin));
            desired.put_set(SetProgram::new(set));
        }
        self.change(desired, id, members, &[]);
    }

    /// Members came or went. Returns whether rules that look the set up must be rendered again,
    /// because its networks appeared or disappeared, or it became small or large.
    pub(super) fn change(
        &mut self,
        desired: &mut Desired,
        id: &IpSetId,
        added: &[Member],
        removed: &[Member],
    ) -> bool {
        let Some(set) = self.sets.get_mut(id) else {
            return false;
        };
        let small_set = self.thresholds.small_set;
        let before = set.networks;
        for (members, step) in [(added, 1_isize), (removed, -1)] {
            for net in members.iter().filter_map(wide) {
                let count = &mut set.networks[IpVersion::of(net.addr()) as usize];
                *count = count.saturating_add_signed(step);
            }
        }
        let after = set.networks;
        let was_small = set.members <= small_set;
        set.members = (set.members + added.len()).saturating_sub(removed.len());
        let mut reshaped = was_small != (set.members <= small_set);
        let origin = set.origin.clone();
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
            reshaped = true;
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
    pub(super) fn remove(&mut self, desired: &mut Desired, id: &IpSetId) {
        self.sets.remove(id);
        for version in VERSIONS {
            desired.remove_set(&names::exact_set(id, version));
            desired.remove_set(&names::wide_set(id, version));
        }
    }
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
