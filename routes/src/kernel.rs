//! The kernel's side of the table: dumps, batches and lookups, on blocking system calls.

use std::net::IpAddr;
use std::sync::Arc;

use cali_netlink::reconcile::Op;
use cali_netlink::route::TABLE_LOCAL;
use cali_netlink::{
    Change, Error, IfIndex, Link, Netlink, Nexthop, Route, RouteFilter, RouteKey, RouteKind,
};
use std::collections::BTreeMap;

use crate::nexthops::is_ours;
use crate::program::Step;
use crate::render::{Devices, KernelSettings};
use crate::table::Reach;

/// Routes of our protocols in our table and in the host's own ([`crate::Way::Local`]), of all devices or of one.
pub(crate) fn dump_routes(
    netlink: &Netlink,
    settings: &KernelSettings,
    oif: Option<IfIndex>,
) -> Result<Vec<Route>, Error> {
    let mut all = Vec::new();
    let mut protocols = vec![settings.protocol, settings.bgp_protocol];
    protocols.dedup();
    for table in [settings.table, TABLE_LOCAL] {
        for protocol in &protocols {
            let filter = RouteFilter {
                table: Some(table),
                protocol: Some(*protocol),
                oif,
                ..RouteFilter::default()
            };
            all.extend(netlink.dump_routes(&filter)?);
        }
    }
    Ok(all)
}

/// Nexthop objects of our range.
pub(crate) fn dump_nexthops(netlink: &Netlink) -> Result<Vec<Nexthop>, Error> {
    match netlink.dump_nexthops() {
        Ok(all) => Ok(all
            .into_iter()
            .filter(|nexthop| is_ours(nexthop.id))
            .collect()),
        // A kernel before 5.3 has none.
        Err(error) if error.is_unsupported() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// What one row's step came to.
pub(crate) type StepResult = Result<(), String>;

/// Carries out the steps of one plan as one batch. The second value says that our view of the kernel is outdated.
pub(crate) fn apply_routes(
    netlink: &Netlink,
    steps: &[(Op<RouteKey, Route>, Step)],
) -> (Vec<StepResult>, bool) {
    let changes: Vec<Change<Route>> = steps
        .iter()
        .filter_map(|(_, step)| match step {
            Step::Add(route) => Some(Change::Add(route.clone())),
            Step::Replace(route) => Some(Change::Replace(route.clone())),
            Step::Delete(route) => Some(Change::Delete(route.clone())),
            Step::Refuse(_) => None,
        })
        .collect();
    let mut answers = netlink.apply_routes(&changes).into_iter();
    let mut outdated = false;
    let results = steps
        .iter()
        .map(|(_, step)| {
            if let Step::Refuse(found) = step {
                return Err(format!("somebody else's route is in the place: {found}"));
            }
            match (step, answers.next()) {
                (_, Some(Ok(()))) => Ok(()),
                (Step::Delete(_), Some(Err(error))) if error.is_not_found() => Ok(()),
                (Step::Add(_), Some(Err(error))) if error.is_exists() => {
                    outdated = true;
                    Err("a route that we do not know is in the place".to_owned())
                }
                (_, Some(Err(error))) => Err(error.to_string()),
                (_, None) => Err("no answer from the kernel".to_owned()),
            }
        })
        .collect();
    (results, outdated)
}

/// Whether the kernel has no nexthop objects at all.
pub(crate) fn means_no_objects(error: &Error) -> bool {
    error.is_unsupported()
}

/// Carries out the steps for nexthop objects. Deletions go in reverse order: groups before their members.
pub(crate) fn apply_nexthops(
    netlink: &Netlink,
    ops: &mut [Op<u32, Nexthop>],
) -> Vec<Result<(), Error>> {
    ops.sort_by_key(|op| match op {
        Op::Set { key, .. } => (false, *key),
        Op::Delete { key, .. } => (true, u32::MAX - *key),
    });
    let changes: Vec<Change<Nexthop>> = ops
        .iter()
        .map(|op| match op {
            Op::Set { value, .. } => Change::Replace(value.clone()),
            Op::Delete { old, .. } => Change::Delete(old.clone()),
        })
        .collect();
    netlink
        .apply_nexthops(&changes)
        .into_iter()
        .zip(&changes)
        .map(|(result, change)| match (result, change) {
            (Err(error), Change::Delete(_)) if error.is_not_found() => Ok(()),
            (result, _) => result,
        })
        .collect()
}

/// What the underlay says about an address. A row that has the address itself as its gateway would carry itself.
pub(crate) fn reach(netlink: &Netlink, links: &BTreeMap<IfIndex, Link>, address: IpAddr) -> Reach {
    let Ok(decision) = netlink.lookup_route(address) else {
        return Reach::Unreachable;
    };
    let device = decision
        .oif
        .and_then(|oif| links.get(&oif))
        .map(|link| Arc::from(link.name.as_str()));
    match (decision.kind, device, decision.gateway) {
        (RouteKind::Unicast, Some(_), Some(gateway)) if gateway == address => Reach::Unreachable,
        (RouteKind::Unicast, Some(device), Some(gateway)) => Reach::Behind { gateway, device },
        (RouteKind::Unicast, Some(device), None) => Reach::OnLink { device },
        _ => Reach::Unreachable,
    }
}

/// Devices that can carry routes.
pub(crate) fn usable(links: &BTreeMap<IfIndex, Link>) -> Devices {
    links
        .values()
        .filter(|link| link.up)
        .map(|link| (Arc::from(link.name.as_str()), link.index))
        .collect()
}
