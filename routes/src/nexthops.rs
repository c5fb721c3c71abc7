//! Ids of nexthop objects: one per gateway and device, one per equal-cost group, all from a range of our own.
//!
//! With objects the kernel's route insertion stays linear in the number of distinct gateways, and a gateway that
//! changes its way is one write for all its routes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cali_netlink::{IfIndex, Nexthop, NexthopTarget};

/// First id of our range. Single gateways come first, groups from [`FIRST_GROUP`] on, so that in key order members
/// precede the groups that name them.
pub const FIRST_ID: u32 = 0x0ca1_0000;
/// First id of groups.
pub const FIRST_GROUP: u32 = 0x0ca1_8000;
/// Last id of our range.
pub const LAST_ID: u32 = 0x0ca1_ffff;

/// Whether an id is from our range.
#[must_use]
pub const fn is_ours(id: u32) -> bool {
    id >= FIRST_ID && id <= LAST_ID
}

/// No id is left: 32768 gateways or as many groups are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all ids for nexthop objects are in use")]
pub struct IdsExhausted;

/// What has which id. An id never changes its meaning while it is taken, so a route that names it is never
/// redirected behind its back.
#[derive(Debug, Default)]
pub struct NexthopIds {
    ids: BTreeMap<NexthopTarget, u32>,
    targets: BTreeMap<u32, NexthopTarget>,
}

impl NexthopIds {
    /// Takes over an object of an earlier incarnation. Of two with the same target the first one is used.
    pub fn adopt(&mut self, nexthop: &Nexthop) {
        if is_ours(nexthop.id) {
            self.targets.insert(nexthop.id, nexthop.target.clone());
            self.ids.entry(nexthop.target.clone()).or_insert(nexthop.id);
        }
    }

    /// The id of a gateway on a device, allocated if need be.
    ///
    /// # Errors
    /// [`IdsExhausted`].
    pub fn gateway(&mut self, gateway: IpAddr, oif: IfIndex) -> Result<u32, IdsExhausted> {
        let target = NexthopTarget::Gateway {
            gateway,
            oif,
            onlink: true,
        };
        self.of(target, FIRST_ID, FIRST_GROUP - 1)
    }

    /// The id of an equal-cost group of gateways' ids.
    ///
    /// # Errors
    /// [`IdsExhausted`].
    pub fn group(&mut self, members: &[u32]) -> Result<u32, IdsExhausted> {
        let target = NexthopTarget::Group(members.iter().map(|id| (*id, 1)).collect());
        self.of(target, FIRST_GROUP, LAST_ID)
    }

    /// What an id means.
    #[must_use]
    pub fn target(&self, id: u32) -> Option<&NexthopTarget> {
        self.targets.get(&id)
    }

    /// Gives an id back.
    pub fn release(&mut self, id: u32) {
        if let Some(target) = self.targets.remove(&id)
            && self.ids.get(&target) == Some(&id)
        {
            self.ids.remove(&target);
        }
    }

    fn of(&mut self, target: NexthopTarget, first: u32, last: u32) -> Result<u32, IdsExhausted> {
        if let Some(id) = self.ids.get(&target) {
            return Ok(*id);
        }
        let mut free = first;
        for taken in self.targets.range(first..=last).map(|(id, _)| *id) {
            if taken != free {
                break;
            }
            free += 1;
        }
        if free > last {
            return Err(IdsExhausted);
        }
        self.ids.insert(target.clone(), free);
        self.targets.insert(free, target);
        Ok(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_id_per_gateway_and_device() {
        let mut ids = NexthopIds::default();
        let a = ids.gateway([10, 0, 0, 2].into(), 2).unwrap();
        assert_eq!(ids.gateway([10, 0, 0, 2].into(), 2), Ok(a));
        assert_ne!(ids.gateway([10, 0, 0, 2].into(), 3), Ok(a));
        assert!(is_ours(a));
    }

    #[test]
    fn groups_sort_after_their_members() {
        let mut ids = NexthopIds::default();
        let group = ids.group(&[FIRST_ID + 7, FIRST_ID + 9]).unwrap();
        assert!(group >= FIRST_GROUP && is_ours(group));
    }

    #[test]
    fn adopted_ids_are_reused_and_not_given_to_others() {
        let mut ids = NexthopIds::default();
        let target = NexthopTarget::Gateway {
            gateway: [10, 0, 0, 2].into(),
            oif: 2,
            onlink: true,
        };
        ids.adopt(&Nexthop {
            id: FIRST_ID + 1,
            protocol: 80,
            target,
        });
        assert_eq!(ids.gateway([10, 0, 0, 2].into(), 2), Ok(FIRST_ID + 1));
        assert_eq!(ids.gateway([10, 0, 0, 3].into(), 2), Ok(FIRST_ID));
        assert_eq!(ids.gateway([10, 0, 0, 4].into(), 2), Ok(FIRST_ID + 2));
        ids.release(FIRST_ID + 1);
        assert_eq!(ids.gateway([10, 0, 0, 5].into(), 2), Ok(FIRST_ID + 1));
    }

    #[test]
    fn a_foreign_id_is_not_adopted() {
        let mut ids = NexthopIds::default();
        let target = NexthopTarget::Gateway {
            gateway: [10, 0, 0, 2].into(),
            oif: 2,
            onlink: true,
        };
        ids.adopt(&Nexthop {
            id: 5,
            protocol: 3,
            target,
        });
        assert_eq!(ids.gateway([10, 0, 0, 2].into(), 2), Ok(FIRST_ID));
    }
}
