//! The routes that start at this node: its address blocks, service addresses, and what its kernel forwards
//! straight to an interface (workloads, also those with an address of another node's block; tunnel addresses;
//! connected networks). Which of them a peer is told is decided by the export policy ([`super::policy`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::v3::{AffinityType, BGPConfigurationSpec, BlockAffinityState};

use super::{Resources, prefix, services};
use crate::policy::{InterfacePattern, LocalKind, local_pref_of_priority};
use crate::rib::LocalRoute;
use crate::wire::{Attributes, Prefix};

/// Metric of a normal route in the kernel, which LOCAL_PREF is derived from (`ipv4NormalRoutePriority`).
const NORMAL_PRIORITY: u32 = 1024;
/// Interfaces whose networks are never announced as connected ones.
const NEVER_DIRECT: [&str; 2] = ["cali*", "kube-ipvs*"];

/// How the kernel came to a [`DeviceRoute`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceRouteKind {
    /// The network of an address of the interface.
    Connected,
    /// Somebody wrote it: for a workload, as a rule.
    Written,
}

/// A route of this node's kernel that leads straight to an interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceRoute {
    /// Destination.
    pub prefix: Prefix,
    /// The interface's name.
    pub interface: Arc<str>,
    /// How it came about.
    pub kind: DeviceRouteKind,
    /// Metric in the kernel; 0 where it has none.
    pub metric: u32,
}

/// The metric of normal routes of a family.
pub(super) fn normal_priority(configuration: &BGPConfigurationSpec, v4: bool) -> u32 {
    let set = if v4 {
        configuration.ipv4_normal_route_priority
    } else {
        configuration.ipv6_normal_route_priority
    };
    set.unwrap_or(NORMAL_PRIORITY)
}

/// The confirmed blocks of this node.
pub(super) fn own_blocks(resources: &Resources, node: &str) -> BTreeSet<Prefix> {
    let own = resources.affinities.values().filter(|a| {
        a.node == node
            && a.state == BlockAffinityState::Confirmed
            && !a.deleted
            && a.type_.is_none_or(|t| t == AffinityType::Host)
    });
    own.filter_map(|a| prefix(&a.cidr)).collect()
}

/// All routes that start here. Where several have one destination, the block counts before the service, and that
/// before what the kernel has.
pub(super) fn originated(
    resources: &Resources,
    node: &str,
    blocks: &BTreeSet<Prefix>,
    devices: &BTreeSet<DeviceRoute>,
) -> BTreeMap<Prefix, LocalRoute> {
    let configuration = resources.configuration();
    let route = |prefix: Prefix, kind, priority: Option<u32>, interface: Option<Arc<str>>| {
        let normal = normal_priority(&configuration, prefix.addr().is_ipv4());
        let attributes = Attributes {
            local_pref: Some(local_pref_of_priority(priority.unwrap_or(normal))),
            ..Attributes::default()
        };
        LocalRoute {
            prefix,
            attributes,
            kind,
            interface,
        }
    };
    let mut out = BTreeMap::new();
    let ignored: Vec<InterfacePattern> = configuration
        .ignored_interfaces
        .iter()
        .map(String::as_str)
        .chain(NEVER_DIRECT)
        .map(InterfacePattern::new)
        .collect();
    for device in devices {
        let interface = Some(Arc::clone(&device.interface));
        match device.kind {
            DeviceRouteKind::Connected => {
                if ignored.iter().any(|p| p.matches(&device.interface)) {
                    continue;
                }
                out.entry(device.prefix)
                    .or_insert_with(|| route(device.prefix, LocalKind::Direct, None, interface));
            }
            DeviceRouteKind::Written => {
                let priority = Some(device.metric).filter(|metric| *metric > 0);
                let new = route(device.prefix, LocalKind::Workload, priority, interface);
                out.insert(device.prefix, new);
            }
        }
    }
    for service in services::announced(resources, node) {
        out.insert(service, route(service, LocalKind::Service, None, None));
    }
    for block in blocks {
        out.insert(*block, route(*block, LocalKind::Block, None, None));
    }
    out
}
