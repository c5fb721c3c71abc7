//! From a selected route to the row that the kernel holds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use cali_api::Cidr;
use cali_netlink::{
    Hop, IfIndex, IpNetwork, Nexthop, NexthopTarget, Route, RouteKind, Scope, Target, route,
};

use crate::candidate::Source;
use crate::nexthops::{IdsExhausted, NexthopIds};
use crate::table::{Gateway, Selected, Way};

/// How our rows look in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSettings {
    /// Routing table.
    pub table: u32,
    /// `deviceRouteProtocol`: workload and IPAM-derived routes.
    pub protocol: u8,
    /// Routes that BGP supplied.
    pub bgp_protocol: u8,
    /// `ipv4NormalRoutePriority`: metric of workload routes.
    pub workload_metric_v4: u32,
    /// `ipv6NormalRoutePriority`.
    pub workload_metric_v6: u32,
    /// MTU of workload routes, where it is not the interface's.
    pub workload_mtu: Option<u32>,
    /// Use nexthop objects; the writer falls back by itself where the kernel has none.
    pub nexthop_objects: bool,
}

impl Default for KernelSettings {
    fn default() -> Self {
        Self {
            table: route::TABLE_MAIN,
            protocol: route::protocol::FELIX,
            bgp_protocol: route::protocol::BIRD,
            workload_metric_v4: 1024,
            workload_metric_v6: 1024,
            workload_mtu: None,
            nexthop_objects: true,
        }
    }
}

/// Devices that are up, by name.
pub type Devices = BTreeMap<Arc<str>, IfIndex>;

/// Why a selected route cannot be in the kernel at the moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Waiting {
    /// The device is missing or down.
    #[error("device {0} is not there or not up")]
    Device(Arc<str>),
    /// See [`IdsExhausted`].
    #[error(transparent)]
    Ids(#[from] IdsExhausted),
}

/// The kernel's form of a prefix.
#[must_use]
pub fn network(prefix: &Cidr) -> IpNetwork {
    // A Cidr's length is within its family's bounds, which is all that can be refused here.
    IpNetwork::new(prefix.addr(), prefix.prefix_len())
        .unwrap_or_else(|_| IpNetwork::from(prefix.addr()))
}

/// A row and the nexthop objects that it needs, members before groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The row, as the kernel will report it.
    pub route: Route,
    /// Objects to be made first.
    pub nexthops: Vec<Nexthop>,
}

/// Renders one route.
///
/// # Errors
/// [`Waiting`] names the device that is not there yet.
pub fn render(
    prefix: &Cidr,
    selected: &Selected,
    settings: &KernelSettings,
    devices: &Devices,
    ids: &mut NexthopIds,
) -> Result<Rendered, Waiting> {
    let protocol = if selected.source == Source::Bgp {
        settings.bgp_protocol
    } else {
        settings.protocol
    };
    let destination = network(prefix);
    let index = |device: &Arc<str>| {
        devices
            .get(device)
            .copied()
            .ok_or_else(|| Waiting::Device(device.clone()))
    };
    let mut nexthops = Vec::new();
    let mut row = match &selected.way {
        Way::Blackhole => Route::blackhole(destination, protocol),
        Way::Local => Route::local(destination, protocol),
        Way::Device { device, source } => Route {
            source: *source,
            mtu: settings.workload_mtu,
            metric: if prefix.is_v4() {
                settings.workload_metric_v4
            } else {
                settings.workload_metric_v6
            },
            ..Route::on_device(destination, protocol, index(device)?)
        },
        Way::Gateways(gateways) => {
            // A gateway whose device is down carries nothing; the others of an equal-cost route still do.
            let mut usable = Vec::new();
            let mut waiting = None;
            for gateway in gateways {
                match index(&gateway.device) {
                    Ok(oif) => usable.push((gateway, oif)),
                    Err(device) => waiting = Some(device),
                }
            }
            if let (Some(waiting), true) = (waiting, usable.is_empty()) {
                return Err(waiting);
            }
            let target = if settings.nexthop_objects {
                object_target(&usable, settings, ids, &mut nexthops)?
            } else {
                classic_target(&usable)
            };
            Route::new(destination, protocol, target)
        }
    };
    if selected.way != Way::Local {
        row.table = settings.table;
    }
    Ok(Rendered {
        route: row.normalised(),
        nexthops,
    })
}

/// Host routes to the far ends of IPv6 tunnels.
///
/// The address of a tunnel's far end comes from a pool, so it lies inside a block, and the block may have a route of
/// its own: unencapsulated, until the very moment in which the tunnel takes over. The kernel refuses an IPv6 gateway
/// that another route leads to over another device, `onlink` or not (`ip6_route_check_nh_onlink` in
/// `net/ipv6/route.c`; IPv4 has no such check), so the gateway gets a host route over the tunnel first.
#[must_use]
pub(crate) fn anchors(
    selected: &Selected,
    settings: &KernelSettings,
    devices: &Devices,
    pools: &[Cidr],
) -> Vec<Route> {
    let Way::Gateways(gateways) = &selected.way else {
        return Vec::new();
    };
    let pooled = |address| pools.iter().any(|pool| pool.contains(address));
    gateways
        .iter()
        .filter(|gateway| gateway.address.is_ipv6() && pooled(gateway.address))
        .filter_map(|gateway| {
            let oif = *devices.get(&gateway.device)?;
            let row = Route::on_device(gateway.address.into(), settings.protocol, oif);
            let row = Route {
                table: settings.table,
                metric: settings.workload_metric_v6,
                ..row
            };
            Some(row.normalised())
        })
        .collect()
}

fn object_target(
    gateways: &[(&Gateway, IfIndex)],
    settings: &KernelSettings,
    ids: &mut NexthopIds,
    nexthops: &mut Vec<Nexthop>,
) -> Result<Target, Waiting> {
    let mut members = Vec::with_capacity(gateways.len());
    for (gateway, oif) in gateways {
        let id = ids.gateway(gateway.address, *oif)?;
        let target = NexthopTarget::Gateway {
            gateway: gateway.address,
            oif: *oif,
            onlink: true,
        };
        nexthops.push(Nexthop {
            id,
            protocol: settings.protocol,
            target,
        });
        members.push(id);
    }
    if let [only] = members[..] {
        return Ok(Target::Nexthop(only));
    }
    let id = ids.group(&members)?;
    let target = NexthopTarget::Group(members.into_iter().map(|id| (id, 1)).collect());
    nexthops.push(Nexthop {
        id,
        protocol: settings.protocol,
        target,
    });
    Ok(Target::Nexthop(id))
}

fn classic_target(gateways: &[(&Gateway, IfIndex)]) -> Target {
    let hop = |(gateway, oif): &(&Gateway, IfIndex)| Hop::via(gateway.address, *oif).onlink();
    match gateways {
        [only] => Target::Hop(hop(only)),
        several => Target::Multipath(several.iter().map(hop).collect()),
    }
}

/// The selected route as `ip route` would print it, without the prefix.
#[must_use]
pub fn describe(prefix: &Cidr, selected: &Selected, settings: &KernelSettings) -> String {
    let mut text = match &selected.way {
        Way::Blackhole => "blackhole".to_owned(),
        Way::Local => "local dev lo".to_owned(),
        Way::Device { device, .. } => format!("dev {device} scope link"),
        Way::Gateways(gateways) => {
            let hop = |gateway: &Gateway| {
                format!("via {} dev {} onlink", gateway.address, gateway.device)
            };
            match &gateways[..] {
                [only] => hop(only),
                several => several
                    .iter()
                    .map(|one| format!("nexthop {}", hop(one)))
                    .collect::<Vec<_>>()
                    .join(" "),
            }
        }
    };
    let protocol = if selected.source == Source::Bgp {
        settings.bgp_protocol
    } else {
        settings.protocol
    };
    let name = match protocol {
        route::protocol::BIRD => "bird".to_owned(),
        route::protocol::BGP => "bgp".to_owned(),
        route::protocol::BOOT => "boot".to_owned(),
        other => other.to_string(),
    };
    // Writing to a string cannot fail.
    let _ = write!(text, " proto {name}");
    if let Way::Device { source, .. } = &selected.way {
        let metric = if prefix.is_v4() {
            settings.workload_metric_v4
        } else {
            settings.workload_metric_v6
        };
        let _ = write!(text, " metric {metric}");
        if let Some(source) = source {
            let _ = write!(text, " src {source}");
        }
        if let Some(mtu) = settings.workload_mtu {
            let _ = write!(text, " mtu {mtu}");
        }
    }
    text
}

/// Whether two rows send packets the same way, whoever wrote them. Such a row may be taken over.
#[must_use]
pub(crate) fn same_way(ours: &Route, other: &Route) -> bool {
    let comparable = |row: &Route| {
        (
            row.kind,
            row.target.clone(),
            row.kind == RouteKind::Unicast && row.scope == Scope::Link,
        )
    };
    comparable(ours) == comparable(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        [("eth0", 2), ("vxlan.calico", 7), ("cali1", 9)]
            .map(|(name, index)| (Arc::from(name), index))
            .into()
    }

    fn selected(source: Source, way: Way) -> Selected {
        Selected {
            source,
            because: "test".into(),
            way,
        }
    }

    fn gateways(list: &[(&str, &str)]) -> Way {
        let gateway = |(address, device): &(&str, &str)| Gateway {
            address: address.parse().unwrap(),
            device: Arc::from(*device),
        };
        Way::Gateways(list.iter().map(gateway).collect())
    }

    fn rendered(prefix: &str, selected: &Selected) -> Result<Rendered, Waiting> {
        let settings = KernelSettings::default();
        render(
            &prefix.parse().unwrap(),
            selected,
            &settings,
            &devices(),
            &mut NexthopIds::default(),
        )
    }

    #[test]
    fn workload_is_scope_link_with_protocol_80() {
        let way = Way::Device {
            device: "cali1".into(),
            source: None,
        };
        let row = rendered("192.168.1.5/32", &selected(Source::Workload, way)).unwrap();
        assert_eq!(
            row.route.to_string(),
            "192.168.1.5/32 dev #9 proto 80 metric 1024"
        );
        assert_eq!(row.route.scope, Scope::Link);
        assert!(row.nexthops.is_empty());
    }

    #[test]
    fn bgp_route_has_protocol_12_and_names_an_object() {
        let row = rendered(
            "192.168.2.0/26",
            &selected(Source::Bgp, gateways(&[("10.1.0.2", "eth0")])),
        )
        .unwrap();
        assert_eq!(
            row.route.to_string(),
            format!("192.168.2.0/26 nhid {} proto 12", crate::nexthops::FIRST_ID)
        );
        assert_eq!(
            row.nexthops[0].to_string(),
            format!("nexthop {} via 10.1.0.2 dev #2 onlink", row.nexthops[0].id)
        );
    }

    #[test]
    fn equal_cost_routes_name_a_group_made_after_its_members() {
        let way = gateways(&[("10.1.0.2", "eth0"), ("10.1.0.3", "eth0")]);
        let row = rendered("192.168.2.0/26", &selected(Source::Bgp, way)).unwrap();
        assert_eq!(row.nexthops.len(), 3);
        assert!(
            matches!(row.nexthops[2].target, NexthopTarget::Group(ref members) if members.len() == 2)
        );
        assert_eq!(row.route.target, Target::Nexthop(row.nexthops[2].id));
    }

    #[test]
    fn a_missing_device_is_named() {
        let way = gateways(&[("192.168.9.1", "tunl0")]);
        let waiting =
            rendered("192.168.2.0/26", &selected(Source::BlockAffinity, way)).unwrap_err();
        assert_eq!(waiting.to_string(), "device tunl0 is not there or not up");
    }

    #[test]
    fn one_dead_device_leaves_the_other_paths() {
        let way = gateways(&[("10.1.0.2", "eth0"), ("10.9.0.2", "eth9")]);
        let row = rendered("192.168.2.0/26", &selected(Source::Bgp, way)).unwrap();
        assert_eq!(row.nexthops.len(), 1);
    }

    #[test]
    fn only_the_far_end_of_an_ipv6_tunnel_gets_a_host_route() {
        let pools: Vec<Cidr> = ["10.20.0.0/16", "fd00:20::/48"]
            .map(|pool| pool.parse().unwrap())
            .into();
        let anchors = |address, device| -> Vec<String> {
            let selected = selected(Source::BlockAffinity, gateways(&[(address, device)]));
            let rows = anchors(&selected, &KernelSettings::default(), &devices(), &pools);
            rows.iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            anchors("fd00:20::b340", "vxlan.calico"),
            ["fd00:20::b340/128 dev #7 proto 80 metric 1024"]
        );
        assert!(anchors("fd00:0:0:1::2", "eth0").is_empty());
        assert!(anchors("10.20.0.1", "vxlan.calico").is_empty());
        assert!(anchors("fd00:20::b340", "gone").is_empty());
    }

    #[test]
    fn without_objects_the_gateways_are_in_the_route() {
        let settings = KernelSettings {
            nexthop_objects: false,
            ..KernelSettings::default()
        };
        let way = gateways(&[("10.1.0.2", "eth0")]);
        let prefix = "192.168.2.0/26".parse().unwrap();
        let row = render(
            &prefix,
            &selected(Source::BlockAffinity, way),
            &settings,
            &devices(),
            &mut NexthopIds::default(),
        )
        .unwrap();
        assert_eq!(
            row.route.to_string(),
            "192.168.2.0/26 via 10.1.0.2 dev #2 onlink proto 80"
        );
    }
}
