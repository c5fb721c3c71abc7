//! Bringing one device to its plan: adopt, change in place, re-create, or report that it is somebody else's.

use std::net::IpAddr;

use cali_netlink::{
    Address, Error, IfIndex, IpIp, IpNetwork, Link, LinkChange, LinkKind, Netlink, NewLink,
    NewLinkKind, Vxlan,
};
use tracing::{info, warn};

use crate::plan::{DesiredDevice, DeviceKind};

/// Why a device is not as planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeviceProblem {
    /// A device of our name is of another kind: it belongs to somebody else.
    #[error(
        "device {name} exists and is of kind '{found}': it is somebody else's and is left alone"
    )]
    Foreign {
        /// The name.
        name: String,
        /// Its kind.
        found: String,
    },
    /// The kernel has no such kind of device.
    #[error("this kernel cannot make {name}: kernel module '{module}' is missing")]
    NoModule {
        /// The device.
        name: String,
        /// The module that would bring it.
        module: &'static str,
    },
    /// The kernel refused.
    #[error("device {name} cannot be programmed")]
    Kernel {
        /// The device.
        name: String,
        /// What the kernel said.
        #[source]
        source: Error,
    },
}

/// What must happen to a device. Pure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DeviceStep {
    /// It is as planned.
    Keep,
    /// It is not there.
    Create,
    /// It has attributes that cannot be changed in place.
    Recreate(String),
    /// It needs these changes.
    Change(DeviceChange),
    /// It is somebody else's, of this kind.
    Foreign(String),
}

/// Changes that are made in place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DeviceChange {
    pub(crate) mtu: Option<u32>,
    pub(crate) mac: Option<cali_netlink::MacAddr>,
    pub(crate) up: bool,
}

/// Compares a device with its plan.
pub(crate) fn plan_device(desired: &DesiredDevice, found: Option<&Link>) -> DeviceStep {
    let Some(link) = found else {
        return DeviceStep::Create;
    };
    let mut change = DeviceChange {
        up: !link.up,
        ..DeviceChange::default()
    };
    match (&desired.kind, &link.kind) {
        (
            DeviceKind::Vxlan {
                vni,
                port,
                local,
                mac,
            },
            LinkKind::Vxlan(vxlan),
        ) => {
            if let Some(reason) = differs(vxlan, *vni, *port, *local) {
                return DeviceStep::Recreate(reason);
            }
            change.mac = (link.mac != Some(*mac)).then_some(*mac);
        }
        (DeviceKind::Ipip, LinkKind::IpIp(_)) => {}
        (_, other) => return DeviceStep::Foreign(other.name().to_owned()),
    }
    change.mtu = (link.mtu != desired.mtu).then_some(desired.mtu);
    if change == DeviceChange::default() {
        DeviceStep::Keep
    } else {
        DeviceStep::Change(change)
    }
}

/// The parent device is not compared: one that Calico set is as good as none.
fn differs(found: &Vxlan, vni: u32, port: u16, local: IpAddr) -> Option<String> {
    if found.vni != vni {
        return Some(format!("VNI {} instead of {vni}", found.vni));
    }
    if found.port != port {
        return Some(format!("port {} instead of {port}", found.port));
    }
    if found.local != Some(local) {
        return Some(format!(
            "local address {:?} instead of {local}",
            found.local
        ));
    }
    found.learning.then(|| "it learns addresses".to_owned())
}

/// Brings a device to its plan; the index, and whether it is new or has come up: its entries are others then.
pub(crate) async fn apply_device(
    netlink: &Netlink,
    name: &str,
    desired: &DesiredDevice,
) -> Result<(IfIndex, bool), DeviceProblem> {
    let failed = |source: Error| DeviceProblem::Kernel {
        name: name.to_owned(),
        source,
    };
    let found = netlink.link_by_name(name).map_err(failed)?;
    let (index, fresh) = match (plan_device(desired, found.as_ref()), found) {
        (DeviceStep::Foreign(found), _) => {
            return Err(DeviceProblem::Foreign {
                name: name.to_owned(),
                found,
            });
        }
        (DeviceStep::Keep, Some(link)) => (link.index, false),
        (DeviceStep::Change(change), Some(link)) => {
            info!(
                device = name,
                ?change,
                "changing the tunnel device in place"
            );
            let came_up = change.up;
            let change = LinkChange {
                mtu: change.mtu,
                mac: change.mac,
                up: Some(true),
                ..LinkChange::default()
            };
            netlink
                .change_link(link.index, &change)
                .await
                .map_err(failed)?;
            (link.index, came_up)
        }
        (DeviceStep::Recreate(reason), Some(link)) => {
            warn!(device = name, reason, "re-creating the tunnel device");
            netlink.delete_link(link.index).await.map_err(failed)?;
            (create(netlink, name, desired).await?, true)
        }
        (_, _) => {
            info!(device = name, "creating the tunnel device");
            (create(netlink, name, desired).await?, true)
        }
    };
    apply_address(netlink, index, desired)
        .await
        .map_err(failed)?;
    Ok((index, fresh))
}

async fn create(
    netlink: &Netlink,
    name: &str,
    desired: &DesiredDevice,
) -> Result<IfIndex, DeviceProblem> {
    let (kind, mac, module) = match &desired.kind {
        DeviceKind::Vxlan {
            vni,
            port,
            local,
            mac,
        } => {
            let vxlan = Vxlan {
                vni: *vni,
                port: *port,
                local: Some(*local),
                // Without a parent the underlay's routing alone decides, also on hosts with several uplinks.
                device: None,
                learning: false,
                udp_csum: local.is_ipv6(),
            };
            (NewLinkKind::Vxlan(vxlan), Some(*mac), "vxlan")
        }
        DeviceKind::Ipip => (NewLinkKind::IpIp(IpIp::default()), None, "ipip"),
    };
    let link = NewLink {
        mtu: Some(desired.mtu),
        mac,
        ..NewLink::new(name, kind)
    };
    match netlink.add_link(&link).await {
        Ok(index) => Ok(index),
        Err(error) if error.is_unsupported() => Err(DeviceProblem::NoModule {
            name: name.to_owned(),
            module,
        }),
        // Loading the module makes `tunl0` by itself.
        Err(error) if error.is_exists() && desired.kind == DeviceKind::Ipip => {
            adopt_fallback(netlink, name, desired)
                .await
                .map_err(|source| DeviceProblem::Kernel {
                    name: name.to_owned(),
                    source,
                })
        }
        Err(source) => Err(DeviceProblem::Kernel {
            name: name.to_owned(),
            source,
        }),
    }
}

async fn adopt_fallback(
    netlink: &Netlink,
    name: &str,
    desired: &DesiredDevice,
) -> Result<IfIndex, Error> {
    let link = netlink.link_by_name(name)?.ok_or_else(|| {
        Error::errno("adopt", format!("link {name}"), cali_netlink::Errno::ENODEV)
    })?;
    let change = LinkChange {
        mtu: Some(desired.mtu),
        up: Some(true),
        ..LinkChange::default()
    };
    netlink.change_link(link.index, &change).await?;
    Ok(link.index)
}

/// The device has exactly its address, beside link-local ones.
async fn apply_address(
    netlink: &Netlink,
    index: IfIndex,
    desired: &DesiredDevice,
) -> Result<(), Error> {
    let wanted = desired
        .address
        .map(|address| IpNetwork::from(address.addr()));
    let present = netlink.dump_addresses(Some(index))?;
    if let Some(wanted) = wanted
        && !present.iter().any(|address| address.address == wanted)
    {
        netlink.add_address(&Address::new(index, wanted)).await?;
    }
    for address in present {
        let link_local =
            matches!(address.address.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local());
        // No address is known while the Node resource has none: then what is there stays.
        if !link_local && wanted.is_some_and(|wanted| wanted != address.address) {
            netlink.delete_address(&address).await?;
        }
    }
    Ok(())
}

/// Removes a device that nothing needs any more; the fall-back device of `ipip` cannot be removed and is set down.
pub(crate) async fn retire_device(
    netlink: &Netlink,
    name: &str,
    kind: &DeviceKind,
) -> Result<(), DeviceProblem> {
    let failed = |source: Error| DeviceProblem::Kernel {
        name: name.to_owned(),
        source,
    };
    let Some(link) = netlink.link_by_name(name).map_err(failed)? else {
        return Ok(());
    };
    match (kind, &link.kind) {
        (DeviceKind::Vxlan { .. }, LinkKind::Vxlan(_)) => {
            info!(device = name, "removing the tunnel device");
            netlink.delete_link(link.index).await.map_err(failed)
        }
        (DeviceKind::Ipip, LinkKind::IpIp(_)) => {
            for address in netlink.dump_addresses(Some(link.index)).map_err(failed)? {
                netlink.delete_address(&address).await.map_err(failed)?;
            }
            netlink.set_link_up(link.index, false).await.map_err(failed)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_netlink::MacAddr;

    const MAC: MacAddr = MacAddr([0x66, 1, 2, 3, 4, 5]);

    fn desired() -> DesiredDevice {
        let kind = DeviceKind::Vxlan {
            vni: 4096,
            port: 4789,
            local: [10, 0, 0, 1].into(),
            mac: MAC,
        };
        DesiredDevice {
            kind,
            mtu: 1450,
            address: None,
        }
    }

    fn link() -> Link {
        let vxlan = Vxlan {
            vni: 4096,
            port: 4789,
            local: Some([10, 0, 0, 1].into()),
            device: Some(2),
            learning: false,
            udp_csum: false,
        };
        Link {
            mac: Some(MAC),
            mtu: 1450,
            ..cali_netlink::testing::link(7, "vxlan.calico", LinkKind::Vxlan(vxlan))
        }
    }

    #[test]
    fn a_device_that_calico_made_is_kept() {
        assert_eq!(plan_device(&desired(), Some(&link())), DeviceStep::Keep);
    }

    #[test]
    fn mtu_mac_and_up_are_changed_in_place() {
        let other = Link {
            mtu: 1500,
            mac: None,
            up: false,
            ..link()
        };
        let change = DeviceChange {
            mtu: Some(1450),
            mac: Some(MAC),
            up: true,
        };
        assert_eq!(
            plan_device(&desired(), Some(&other)),
            DeviceStep::Change(change)
        );
    }

    #[test]
    fn another_vni_needs_a_new_device() {
        let mut other = link();
        if let LinkKind::Vxlan(vxlan) = &mut other.kind {
            vxlan.vni = 1;
        }
        let step = plan_device(&desired(), Some(&other));
        assert_eq!(step, DeviceStep::Recreate("VNI 1 instead of 4096".into()));
    }

    #[test]
    fn a_device_of_another_kind_is_foreign() {
        let other = Link {
            kind: LinkKind::Bridge,
            ..link()
        };
        assert_eq!(
            plan_device(&desired(), Some(&other)),
            DeviceStep::Foreign("bridge".into())
        );
    }
}
