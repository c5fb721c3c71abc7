//! The interface pair of a pod: how it is made, checked and removed.
//!
//! The pod's side has its addresses as /32 and /128 and reaches everything through a gateway that is the host's side:
//! `169.254.1.1`, and for IPv6 the link-local address that belongs to the host side's fixed Ethernet address. Both are
//! permanent neighbours of the pod, so that nothing has to be resolved. The host's side carries the container's id as
//! its alias: what belongs to which sandbox is known from the kernel alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cali_netlink::route::protocol;
use cali_netlink::{
    Address, Change, Errno, Hop, IfIndex, IpNetwork, Link, LinkChange, LinkKind, MacAddr,
    Neighbour, NetNs, Netlink, NewLink, NewLinkKind, Result, Route, RouteFilter, Target, VethPeer,
    sysctl,
};
use ipnetwork::{Ipv4Network, Ipv6Network};

/// Ethernet address of every host side.
pub(crate) const HOST_MAC: MacAddr = MacAddr([0xee; 6]);
/// Gateway of every pod.
pub(crate) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The gateways for these addresses: one for each family.
pub(crate) fn gateways(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let mut gateways = Vec::new();
    if addresses.iter().any(IpAddr::is_ipv4) {
        gateways.push(IpAddr::V4(GATEWAY_V4));
    }
    if addresses.iter().any(IpAddr::is_ipv6) {
        gateways.push(IpAddr::V6(HOST_MAC.link_local()));
    }
    gateways
}

/// What is to be made.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) host_name: String,
    pub(crate) pod_name: String,
    pub(crate) alias: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) mtu: u32,
    pub(crate) pod_mac: Option<MacAddr>,
    /// Whether this host may reach the pod from `127.0.0.1`.
    pub(crate) route_localnet: bool,
    pub(crate) forwarding: bool,
}

/// What stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wired {
    pub(crate) host_index: u32,
    pub(crate) pod_mac: MacAddr,
    pub(crate) mtu: u32,
}

/// The alias of the host side of a container's interface.
pub(crate) fn alias(container_id: &str, ifname: &str) -> String {
    format!("{container_id}/{ifname}")
}

/// The host side of a container's interface, under whatever name; `name` is the likely one.
pub(crate) fn host_side(host: &Netlink, name: &str, alias: &str) -> Result<Option<Link>> {
    let is = |link: &Link| link.kind == LinkKind::Veth && link.alias.as_deref() == Some(alias);
    if let Some(link) = host.link_by_name(name)?
        && is(&link)
    {
        return Ok(Some(link));
    }
    Ok(host.dump_links()?.into_iter().find(is))
}

/// What came of [`make`].
#[derive(Debug)]
pub(crate) enum Made {
    /// The pair stands.
    Stands(Wired),
    /// First this device of the host has to go.
    InTheWay(IfIndex),
}

/// Makes the pair, unless it stands already as it should (the runtime may repeat an `ADD`). What a failure leaves is removed
/// again. A host side of the same name is a left-over of an earlier sandbox of the same pod and gives way; an interface of
/// the same name in the pod does not, unless it is the other end of such a left-over.
///
/// Blocks: the runtime of the container waits, and nothing is handed over between the first request and the last.
pub(crate) fn make(host: &Netlink, pod: &NetNs, wish: &Wish) -> Result<Made> {
    Netlink::visit(pod, |pod| make_inside(host, pod, wish))
}

/// The calling thread is in the pod's namespace.
fn make_inside(host: &Netlink, pod: &Netlink, wish: &Wish) -> Result<Made> {
    let inside = pod.link_by_name(&wish.pod_name)?;
    let named = host.link_by_name(&wish.host_name)?;
    // A pair has both of its ends or none.
    if let Some(inside) = &inside
        && let Some(host_side) = host_side(host, &wish.host_name, &wish.alias)?
    {
        return Ok(match inside.mac {
            Some(pod_mac) if defects(host, pod, wish)?.is_empty() => Made::Stands(Wired {
                host_index: host_side.index,
                pod_mac,
                mtu: inside.mtu,
            }),
            // An ADD that was cut off: begin again.
            _ => Made::InTheWay(host_side.index),
        });
    }
    if let Some(inside) = inside
        && !is_half_made(host, pod, named.as_ref(), &inside)?
    {
        let name = format!("{} in the pod", wish.pod_name);
        return Err(cali_netlink::Error::errno("create", name, Errno::EEXIST));
    }
    if let Some(named) = named {
        return Ok(Made::InTheWay(named.index));
    }
    let v6 = wish.addresses.iter().any(IpAddr::is_ipv6);
    let settings = pod_settings(v6, wish.forwarding);
    check(&settings, sysctl::write_all_here(&borrowed(&settings)))?;
    let peer = VethPeer {
        name: wish.host_name.clone(),
        mac: Some(HOST_MAC),
        mtu: Some(wish.mtu),
        netns: Some(host.netns().fd()),
        up: false,
    };
    let mut link = NewLink::new(&wish.pod_name, NewLinkKind::Veth(peer));
    link.mtu = Some(wish.mtu);
    link.mac = wish.pod_mac;
    let pod_index = pod.add_link_at_once(&link)?;
    match complete(host, pod, pod_index, wish) {
        Ok(wired) => Ok(Made::Stands(wired)),
        Err(error) => {
            if let Err(e) = pod.delete_link_at_once(pod_index) {
                tracing::warn!(interface = wish.host_name, error = %e, "cannot remove a half-made interface pair");
            }
            Err(error)
        }
    }
}

/// The two are the ends of one pair that somebody of us was killed over before it had its alias.
fn is_half_made(host: &Netlink, pod: &Netlink, side: Option<&Link>, inside: &Link) -> Result<bool> {
    let Some(side) = side else {
        return Ok(false);
    };
    Ok(side.kind == LinkKind::Veth
        && side.alias.is_none()
        && side.parent == Some(inside.index)
        && side.link_netns.is_some()
        && side.link_netns == host.number_of(pod.netns())?)
}

fn complete(host: &Netlink, pod: &Netlink, pod_index: u32, wish: &Wish) -> Result<Wired> {
    let not_found = |name: &str| cali_netlink::Error::errno("find", name, Errno::ENODEV);
    let host_side = host
        .link_by_name(&wish.host_name)?
        .ok_or_else(|| not_found(&wish.host_name))?;
    let settings = host_settings(&wish.host_name, wish.route_localnet);
    check(
        &settings,
        sysctl::write_all(host.netns(), &borrowed(&settings)),
    )?;
    // The kernel takes the alias first: what is up has one.
    let named_and_up = LinkChange {
        alias: Some(wish.alias.clone()),
        up: Some(true),
        ..LinkChange::default()
    };
    host.change_link_at_once(host_side.index, &named_and_up)?;
    if let Some(lo) = pod.link_by_name("lo")?.filter(|lo| !lo.up) {
        let up = LinkChange {
            up: Some(true),
            ..LinkChange::default()
        };
        pod.change_link_at_once(lo.index, &up)?;
    }
    let held = wish.addresses.iter();
    let addresses: Vec<_> = held
        .map(|ip| Change::Replace(Address::new(pod_index, IpNetwork::from(*ip))))
        .collect();
    let gateways = gateways(&wish.addresses);
    let neighbours: Vec<_> = gateways
        .iter()
        .map(|g| Change::Replace(Neighbour::permanent(pod_index, *g, HOST_MAC)))
        .collect();
    let mut routes = Vec::new();
    for gateway in &gateways {
        if gateway.is_ipv4() {
            routes.push(Route::on_device(
                IpNetwork::from(*gateway),
                protocol::BOOT,
                pod_index,
            ));
        }
        let target = Target::Hop(Hop::via(*gateway, pod_index));
        routes.push(Route::new(default_of(*gateway), protocol::BOOT, target));
    }
    let routes: Vec<_> = routes.into_iter().map(Change::Replace).collect();
    for result in pod
        .apply_addresses(&addresses)
        .into_iter()
        .chain(pod.apply_neighbours(&neighbours))
        .chain(pod.apply_routes(&routes))
    {
        result?;
    }
    let side = pod
        .link_by_index(pod_index)?
        .ok_or_else(|| not_found(&wish.pod_name))?;
    Ok(Wired {
        host_index: host_side.index,
        pod_mac: side
            .mac
            .ok_or_else(|| not_found("Ethernet address of the pod's interface"))?,
        mtu: side.mtu,
    })
}

const DEFAULT_V4: Ipv4Network = match Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0) {
    Some(prefix) => prefix,
    None => unreachable!(),
};
const DEFAULT_V6: Ipv6Network = match Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0) {
    Some(prefix) => prefix,
    None => unreachable!(),
};

/// The default route of the family of an address.
fn default_of(address: IpAddr) -> IpNetwork {
    match address {
        IpAddr::V4(_) => IpNetwork::V4(DEFAULT_V4),
        IpAddr::V6(_) => IpNetwork::V6(DEFAULT_V6),
    }
}

/// One kernel setting. A kernel without IPv6 lacks those of IPv6, which is an error only where they are needed.
struct Setting {
    key: String,
    value: &'static str,
    needed: bool,
}

impl Setting {
    fn v4(key: impl Into<String>, value: &'static str) -> Self {
        Self {
            key: format!("ipv4/{}", key.into()),
            value,
            needed: true,
        }
    }

    fn v6(key: impl Into<String>, value: &'static str, needed: bool) -> Self {
        Self {
            key: format!("ipv6/{}", key.into()),
            value,
            needed,
        }
    }
}

fn borrowed(settings: &[Setting]) -> Vec<(&str, &str)> {
    let pairs = settings.iter();
    pairs
        .map(|setting| (setting.key.as_str(), setting.value))
        .collect()
}

/// The first result that matters.
fn check(settings: &[Setting], results: Vec<Result<bool>>) -> Result<()> {
    settings
        .iter()
        .zip(results)
        .try_for_each(|(setting, result)| match result {
            Err(e) if !setting.needed && e.is_not_found() => Ok(()),
            other => other.map(|_| ()),
        })
}

fn pod_settings(v6: bool, forwarding: bool) -> Vec<Setting> {
    let on = if forwarding { "1" } else { "0" };
    let mut settings = vec![
        Setting::v4("ip_forward", on),
        // Without duplicate address detection an address can be used at once; nobody else is on the link.
        Setting::v6("conf/default/accept_dad", "0", v6),
        Setting::v6("conf/all/forwarding", on, v6),
    ];
    if v6 {
        let devices = ["all", "default", "lo"];
        settings.extend(devices.map(|d| Setting::v6(format!("conf/{d}/disable_ipv6"), "0", true)));
    }
    settings
}

fn host_settings(name: &str, route_localnet: bool) -> Vec<Setting> {
    let conf = |key: &str| format!("conf/{name}/{key}");
    let mut settings = vec![
        Setting::v4(format!("neigh/{name}/proxy_delay"), "0"),
        Setting::v4(conf("proxy_arp"), "1"),
        Setting::v4(conf("forwarding"), "1"),
    ];
    if route_localnet {
        settings.push(Setting::v4(conf("route_localnet"), "1"));
    }
    settings.extend(
        [
            ("disable_ipv6", "0"),
            ("addr_gen_mode", "0"),
            ("accept_dad", "0"),
            ("accept_ra", "0"),
            ("proxy_ndp", "1"),
            ("forwarding", "1"),
        ]
        .map(|(key, value)| Setting::v6(conf(key), value, false)),
    );
    settings
}

/// Removes an interface of a pod by its name there, if it is one end of a pair.
pub(crate) async fn remove_in_pod(pod: &Netlink, ifname: &str) -> Result<bool> {
    match pod.link_by_name(ifname)? {
        Some(link) if link.kind == LinkKind::Veth => delete(pod, link.index).await,
        _ => Ok(false),
    }
}

/// Removes a device; that it is gone already is no error.
pub(crate) async fn delete(netlink: &Netlink, index: u32) -> Result<bool> {
    match netlink.delete_link(index).await {
        Ok(()) => Ok(true),
        Err(e) if e.is_not_found() => Ok(false),
        Err(e) => Err(e),
    }
}

/// What of a pod's wiring is missing or changed; nothing, if all is well.
pub(crate) fn defects(host: &Netlink, pod: &Netlink, wish: &Wish) -> Result<Vec<String>> {
    let mut defects = Vec::new();
    match host.link_by_name(&wish.host_name)? {
        None => defects.push(format!("{} is missing on the host", wish.host_name)),
        Some(link) if link.alias.as_deref() != Some(wish.alias.as_str()) => {
            defects.push(format!("{} belongs to another sandbox", wish.host_name));
        }
        Some(link) if !link.up => defects.push(format!("{} is down", wish.host_name)),
        Some(_) => {}
    }
    let Some(link) = pod.link_by_name(&wish.pod_name)? else {
        defects.push(format!("{} is missing in the pod", wish.pod_name));
        return Ok(defects);
    };
    if !link.up {
        defects.push(format!("{} is down in the pod", wish.pod_name));
    }
    let held = pod.dump_addresses(Some(link.index))?;
    for address in &wish.addresses {
        if !held.iter().any(|a| a.address.ip() == *address) {
            defects.push(format!("{} does not have {address}", wish.pod_name));
        }
    }
    let routes = pod.dump_routes(&RouteFilter::default())?;
    for gateway in gateways(&wish.addresses) {
        let wanted = Target::Hop(Hop::via(gateway, link.index));
        if !routes
            .iter()
            .any(|r| r.prefix == default_of(gateway) && r.target == wanted)
        {
            defects.push(format!(
                "the default route via {gateway} is missing or changed"
            ));
        }
    }
    Ok(defects)
}
