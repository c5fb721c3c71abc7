//! What must exist in the kernel for the resolver's answers to work: devices, their addresses, and per
//! remote tunnel endpoint one forwarding entry (MAC to node) and one neighbour (overlay address to MAC).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_api::{Cidr, NodeName};
use cali_netlink::MacAddr;

use crate::{Encap, Endpoint, IPIP_DEVICE, Overhead, Resolver, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE};

/// Cluster-wide settings of the tunnels (FelixConfiguration), with Calico's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `vxlanVNI`.
    pub vni: u32,
    /// `vxlanPort`.
    pub port: u16,
    /// `vxlanMTU`; none follows the underlay.
    pub vxlan_mtu: Option<u32>,
    /// `vxlanMTUV6`; none follows the underlay.
    pub vxlan_mtu_v6: Option<u32>,
    /// `ipipMTU`; none follows the underlay.
    pub ipip_mtu: Option<u32>,
    /// `vxlanEnabled`; none lets the pools decide.
    pub vxlan_enabled: Option<bool>,
    /// `ipipEnabled`; none lets the pools decide.
    pub ipip_enabled: Option<bool>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            vni: 4096,
            port: 4789,
            vxlan_mtu: None,
            vxlan_mtu_v6: None,
            ipip_mtu: None,
            vxlan_enabled: None,
            ipip_enabled: None,
        }
    }
}

/// The link that carries the node's own address, as observed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Underlay {
    /// MTU of the link with the IPv4 address.
    pub mtu_v4: Option<u32>,
    /// MTU of the link with the IPv6 address.
    pub mtu_v6: Option<u32>,
}

/// MTU to assume while the underlay link is not known, Calico's value.
pub(crate) const FALLBACK_UNDERLAY_MTU: u32 = 1460;

/// The attributes that make a device what it is. A device that differs in them is re-created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// A VXLAN device without learning.
    Vxlan {
        /// Network identifier.
        vni: u32,
        /// UDP port.
        port: u16,
        /// Source address of outer packets.
        local: IpAddr,
        /// MAC of the device.
        mac: MacAddr,
    },
    /// The fall-back device of the `ipip` module.
    Ipip,
}

/// A device that must exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredDevice {
    /// What it is.
    pub kind: DeviceKind,
    /// Its MTU.
    pub mtu: u32,
    /// Its only address, a host prefix; none until the node has been given a tunnel address.
    pub address: Option<Cidr>,
}

/// A remote tunnel endpoint: overlay address to MAC, MAC to node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VtepEntry {
    /// MAC of the remote device.
    pub mac: MacAddr,
    /// Underlay address of the remote node.
    pub node: IpAddr,
}

/// A fact that keeps part of the plan from being made. It never stops the rest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanProblem {
    /// The node's own address is missing.
    #[error("{device} is needed but this node has no IPv{family} address")]
    NoLocalAddress {
        /// The device that cannot be made.
        device: &'static str,
        /// 4 or 6.
        family: u8,
    },
    /// Two nodes claim one overlay address or one MAC; the lexically first keeps it.
    #[error("node {loser} has the tunnel {what} of node {keeper}; no tunnel to {loser}")]
    Duplicate {
        /// What is claimed twice.
        what: &'static str,
        /// The node that keeps it.
        keeper: NodeName,
        /// The node that is left out.
        loser: NodeName,
    },
}

/// Everything that must exist, by device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Devices by name.
    pub devices: BTreeMap<&'static str, DesiredDevice>,
    /// Remote endpoints by (device, overlay address).
    pub vteps: BTreeMap<(&'static str, IpAddr), VtepEntry>,
    /// What could not be planned.
    pub problems: Vec<PlanProblem>,
}

/// Plans the tunnel objects of the local node.
#[must_use]
pub fn plan(resolver: &Resolver, settings: &Settings, underlay: &Underlay) -> Plan {
    let mut plan = Plan::default();
    let Some(local) = resolver.local() else {
        return plan;
    };
    plan_ipip(resolver, settings, underlay, local, &mut plan);
    plan_vxlan(resolver, settings, underlay, local, true, &mut plan);
    plan_vxlan(resolver, settings, underlay, local, false, &mut plan);
    plan
}

fn wanted(resolver: &Resolver, switch: Option<bool>, v4: bool, is: fn(Encap) -> bool) -> bool {
    switch.unwrap_or_else(|| {
        resolver
            .pools()
            .any(|pool| pool.cidr.is_v4() == v4 && is(pool.encap))
    })
}

fn plan_ipip(
    resolver: &Resolver,
    settings: &Settings,
    underlay: &Underlay,
    local: &Endpoint,
    plan: &mut Plan,
) {
    if !wanted(resolver, settings.ipip_enabled, true, |encap| {
        matches!(encap, Encap::Ipip(_))
    }) {
        return;
    }
    if local.v4.is_none() {
        plan.problems.push(PlanProblem::NoLocalAddress {
            device: IPIP_DEVICE,
            family: 4,
        });
        return;
    }
    let mtu = settings.ipip_mtu.unwrap_or_else(|| {
        Overhead::Ipip.device_mtu(underlay.mtu_v4.unwrap_or(FALLBACK_UNDERLAY_MTU))
    });
    let device = DesiredDevice {
        kind: DeviceKind::Ipip,
        mtu,
        address: local.ipip.map(Cidr::host),
    };
    plan.devices.insert(IPIP_DEVICE, device);
}

fn plan_vxlan(
    resolver: &Resolver,
    settings: &Settings,
    underlay: &Underlay,
    local: &Endpoint,
    v4: bool,
    plan: &mut Plan,
) {
    if !wanted(resolver, settings.vxlan_enabled, v4, |encap| {
        matches!(encap, Encap::Vxlan(_))
    }) {
        return;
    }
    let (name, overhead, forced_mtu, underlay_mtu) = if v4 {
        (
            VXLAN_V4_DEVICE,
            Overhead::VxlanV4,
            settings.vxlan_mtu,
            underlay.mtu_v4,
        )
    } else {
        (
            VXLAN_V6_DEVICE,
            Overhead::VxlanV6,
            settings.vxlan_mtu_v6,
            underlay.mtu_v6,
        )
    };
    let Some(address) = local.underlay(v4) else {
        // With the switch on for both families, a node of one family alone is no problem.
        if resolver
            .pools()
            .any(|pool| pool.cidr.is_v4() == v4 && matches!(pool.encap, Encap::Vxlan(_)))
        {
            let family = if v4 { 4 } else { 6 };
            plan.problems.push(PlanProblem::NoLocalAddress {
                device: name,
                family,
            });
        }
        return;
    };
    let mtu = forced_mtu
        .unwrap_or_else(|| overhead.device_mtu(underlay_mtu.unwrap_or(FALLBACK_UNDERLAY_MTU)));
    let vtep = local.vtep(v4);
    let mac = vtep.map_or_else(
        || crate::vtep_mac(local.name.as_str(), !v4),
        |vtep| vtep.mac,
    );
    let kind = DeviceKind::Vxlan {
        vni: settings.vni,
        port: settings.port,
        local: address.ip(),
        mac,
    };
    let device = DesiredDevice {
        kind,
        mtu,
        address: vtep.map(|vtep| Cidr::host(vtep.addr)),
    };
    plan.devices.insert(name, device);
    plan_vteps(resolver, local, name, v4, plan);
}

/// One entry per remote endpoint; of two nodes that claim the same address or MAC the first by name wins, so
/// that every node decides alike.
fn plan_vteps(
    resolver: &Resolver,
    local: &Endpoint,
    device: &'static str,
    v4: bool,
    plan: &mut Plan,
) {
    let mut addresses: BTreeMap<IpAddr, &NodeName> = BTreeMap::new();
    let mut macs: BTreeMap<MacAddr, &NodeName> = BTreeMap::new();
    if let Some(vtep) = local.vtep(v4) {
        addresses.insert(vtep.addr, &local.name);
        macs.insert(vtep.mac, &local.name);
    }
    for remote in resolver.remotes() {
        let (Some(vtep), Some(node)) = (remote.vtep(v4), remote.underlay(v4)) else {
            continue;
        };
        let clash = addresses
            .get(&vtep.addr)
            .map(|keeper| ("address", *keeper))
            .or_else(|| macs.get(&vtep.mac).map(|keeper| ("MAC", *keeper)));
        if let Some((what, keeper)) = clash {
            let (keeper, loser) = (keeper.clone(), remote.name.clone());
            plan.problems.push(PlanProblem::Duplicate {
                what,
                keeper,
                loser,
            });
            continue;
        }
        addresses.insert(vtep.addr, &remote.name);
        macs.insert(vtep.mac, &remote.name);
        plan.vteps.insert(
            (device, vtep.addr),
            VtepEntry {
                mac: vtep.mac,
                node: node.ip(),
            },
        );
    }
}

impl Plan {
    /// Makes before break: what `former` had and this plan lacks stays as long as routes need it. `used`
    /// holds the (device, gateway) pairs of the routes that are in the kernel.
    #[must_use]
    pub fn keeping(mut self, former: &Self, used: &BTreeSet<(String, IpAddr)>) -> Self {
        for (name, device) in &former.devices {
            if !self.devices.contains_key(name) && used.iter().any(|(device, _)| device == name) {
                self.devices.insert(name, device.clone());
            }
        }
        for ((device, gateway), entry) in &former.vteps {
            let needed = self.devices.contains_key(device)
                && used.contains(&((*device).to_owned(), *gateway));
            // A node that changes its overlay address keeps its MAC: both neighbours stand until no route uses the former.
            let mac_is_free =
                |other: &VtepEntry| other.mac != entry.mac || other.node == entry.node;
            if needed && self.vteps.values().all(mac_is_free) {
                self.vteps.entry((device, *gateway)).or_insert(*entry);
            }
        }
        self
    }

    /// Whether this device is planned with its address.
    pub(crate) fn has_address(&self, device: &str) -> bool {
        self.devices
            .get(device)
            .is_some_and(|device| device.address.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pool, Scope, Vtep};

    fn name(text: &str) -> NodeName {
        NodeName::from(text)
    }

    fn endpoint(id: u8) -> Endpoint {
        Endpoint {
            v4: Some(format!("10.1.0.{id}/24").parse().unwrap()),
            vtep_v4: Some(Vtep {
                addr: IpAddr::from([192, 168, id, 1]),
                mac: MacAddr([0x66, 0, 0, 0, 0, id]),
            }),
            ..Endpoint::named(name(&format!("node{id}")))
        }
    }

    fn resolver(encap: Encap) -> Resolver {
        let mut resolver = Resolver::new(name("node1"));
        for id in 1..=3 {
            resolver.set_node(endpoint(id));
        }
        resolver.set_pool(Pool {
            name: "p".into(),
            cidr: "192.168.0.0/16".parse().unwrap(),
            encap,
        });
        resolver
    }

    fn planned(resolver: &Resolver) -> Plan {
        plan(
            resolver,
            &Settings::default(),
            &Underlay {
                mtu_v4: Some(1500),
                mtu_v6: None,
            },
        )
    }

    #[test]
    fn vxlan_pool_plans_calicos_device_and_one_entry_per_remote_node() {
        let plan = planned(&resolver(Encap::Vxlan(Scope::CrossSubnet)));
        let device = &plan.devices["vxlan.calico"];
        let kind = DeviceKind::Vxlan {
            vni: 4096,
            port: 4789,
            local: [10, 1, 0, 1].into(),
            mac: MacAddr([0x66, 0, 0, 0, 0, 1]),
        };
        assert_eq!(
            *device,
            DesiredDevice {
                kind,
                mtu: 1450,
                address: Some("192.168.1.1/32".parse().unwrap())
            }
        );
        let gateways: Vec<_> = plan
            .vteps
            .keys()
            .map(|(_, gateway)| gateway.to_string())
            .collect();
        assert_eq!(gateways, ["192.168.2.1", "192.168.3.1"]);
        assert!(plan.problems.is_empty());
    }

    #[test]
    fn pools_without_tunnels_plan_nothing() {
        assert_eq!(planned(&resolver(Encap::None)), Plan::default());
    }

    #[test]
    fn ipip_plans_tunl0_with_its_mtu() {
        let plan = planned(&resolver(Encap::Ipip(Scope::Always)));
        assert_eq!(
            plan.devices["tunl0"],
            DesiredDevice {
                kind: DeviceKind::Ipip,
                mtu: 1480,
                address: None
            }
        );
    }

    #[test]
    fn a_mac_claimed_twice_goes_to_the_first_node_by_name() {
        let mut r = resolver(Encap::Vxlan(Scope::Always));
        let mut thief = endpoint(3);
        thief.vtep_v4 = Some(Vtep {
            addr: [192, 168, 3, 1].into(),
            mac: MacAddr([0x66, 0, 0, 0, 0, 2]),
        });
        r.set_node(thief);
        let plan = planned(&r);
        assert_eq!(plan.vteps.len(), 1);
        assert_eq!(
            plan.problems,
            [PlanProblem::Duplicate {
                what: "MAC",
                keeper: name("node2"),
                loser: name("node3")
            }]
        );
    }

    #[test]
    fn a_node_without_address_reports_and_plans_no_device() {
        let mut r = resolver(Encap::Vxlan(Scope::Always));
        r.set_node(Endpoint::named(name("node1")));
        let plan = planned(&r);
        assert!(plan.devices.is_empty());
        assert_eq!(
            plan.problems,
            [PlanProblem::NoLocalAddress {
                device: "vxlan.calico",
                family: 4
            }]
        );
    }

    #[test]
    fn a_former_overlay_address_outlives_the_change_to_another_pool() {
        let used = BTreeSet::from([("vxlan.calico".to_owned(), IpAddr::from([192, 168, 2, 1]))]);
        let mut r = resolver(Encap::Vxlan(Scope::Always));
        let former = planned(&r);
        let mut moved = endpoint(2);
        let mac = moved.vtep_v4.unwrap().mac;
        let addr = [192, 169, 2, 1].into();
        moved.vtep_v4 = Some(Vtep { addr, mac });
        r.set_node(moved.clone());
        let gateways = |plan: &Plan| -> Vec<String> {
            let gateways = plan.vteps.keys().map(|(_, gateway)| gateway.to_string());
            gateways
                .filter(|gateway| !gateway.starts_with("192.168.3"))
                .collect()
        };
        let kept = planned(&r).keeping(&former, &used);
        assert_eq!(gateways(&kept), ["192.168.2.1", "192.169.2.1"]);
        // At another node as well, the MAC can lead to one of them only.
        moved.v4 = Some("10.1.0.22/24".parse().unwrap());
        r.set_node(moved);
        assert_eq!(
            gateways(&planned(&r).keeping(&former, &used)),
            ["192.169.2.1"]
        );
    }

    #[test]
    fn what_routes_still_use_outlives_its_pool() {
        let former = planned(&resolver(Encap::Vxlan(Scope::Always)));
        let used = BTreeSet::from([("vxlan.calico".to_owned(), IpAddr::from([192, 168, 2, 1]))]);
        let kept = planned(&resolver(Encap::None)).keeping(&former, &used);
        assert_eq!(kept.devices, former.devices);
        assert_eq!(
            kept.vteps.len(),
            1,
            "only the gateway in use stays: {:?}",
            kept.vteps
        );
        let gone = planned(&resolver(Encap::None)).keeping(&kept, &BTreeSet::new());
        assert_eq!(gone, Plan::default());
    }
}
