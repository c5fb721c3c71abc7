//! What this node's kernel forwards straight to an interface, followed live: the input of
//! [`crate::config`] for workloads with borrowed addresses, tunnel addresses and connected networks.
//!
//! Routes of BGP itself are left out, or a speaker would announce as its own what it has learned. A link that goes
//! down takes its routes along without a notification of each, so the link's own counts for them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cali_netlink::{
    Address, Event, Group, Link, Netlink, Notice, Route, RouteFilter, RouteKind, Target,
};
use ipnetwork::IpNetwork;
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::config::{DeviceRoute, DeviceRouteKind};
use crate::wire::Prefix;

/// `RT_TABLE_MAIN`.
const TABLE_MAIN: u32 = 254;
/// `RTPROT_KERNEL`: made with an address; addresses are read themselves.
const PROTOCOL_KERNEL: u8 = 2;
/// Routes of BGP in a node's kernel ("bird"), and of a speaker that stands alone.
const PROTOCOLS_OF_BGP: [u8; 2] = [12, 186];
/// Changes that come within this time are taken together.
const WINDOW: Duration = Duration::from_millis(50);
/// Notifications taken at once.
const BURST: usize = 4096;
/// Wait before another try after the kernel refused a dump or the notifications.
const RETRY: Duration = Duration::from_secs(2);
/// Scope "host": loopback addresses (`RT_SCOPE_HOST`).
const SCOPE_HOST: u8 = 254;

/// The current routes.
pub type Devices = Arc<BTreeSet<DeviceRoute>>;

/// Reads the kernel, then follows it in a task that ends with the last receiver.
pub fn follow(netlink: Netlink) -> cali_netlink::Result<watch::Receiver<Devices>> {
    let table = Table::read(&netlink)?;
    let (sender, receiver) = watch::channel(Arc::new(table.routes()));
    tokio::spawn(async move {
        while !sender.is_closed() {
            tokio::select! {
                () = sender.closed() => return,
                result = keep_up(&netlink, &sender) => if let Err(error) = result {
                    warn!(%error, "cannot follow the kernel's routes; trying again");
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    });
    Ok(receiver)
}

async fn keep_up(netlink: &Netlink, sender: &watch::Sender<Devices>) -> cali_netlink::Result<()> {
    let mut events = netlink.events(&[
        Group::Link,
        Group::Ipv4Address,
        Group::Ipv6Address,
        Group::Ipv4Route,
        Group::Ipv6Route,
    ])?;
    let mut table = Table::read(netlink)?;
    loop {
        publish(sender, &table);
        for event in events.next_burst(WINDOW, BURST).await? {
            match event {
                Event::Route(notice) => table.on_route(notice),
                Event::Link(notice) => table.on_link(notice),
                Event::Address(notice) => table.on_address(&notice),
                Event::Overflow => table = Table::read(netlink)?,
                _ => {}
            }
        }
    }
}

fn publish(sender: &watch::Sender<Devices>, table: &Table) {
    let routes = table.routes();
    sender.send_if_modified(|current| {
        let changed = **current != routes;
        if changed {
            debug!(routes = routes.len(), "routes to interfaces changed");
            *current = Arc::new(routes);
        }
        changed
    });
}

/// Routes to interfaces, addresses and the names of interfaces.
#[derive(Debug, Default)]
struct Table {
    names: BTreeMap<u32, Arc<str>>,
    /// By destination and metric, as the kernel keeps them.
    written: BTreeMap<(Prefix, u32), u32>,
    connected: BTreeSet<(Prefix, u32)>,
}

fn of_network(network: IpNetwork) -> Option<Prefix> {
    Prefix::new(network.network(), network.prefix())
}

/// The interface that a route leads straight to, if it is one to look at.
fn device_of(route: &Route) -> Option<u32> {
    let ours = route.table == TABLE_MAIN
        && route.kind == RouteKind::Unicast
        && route.protocol != PROTOCOL_KERNEL
        && !PROTOCOLS_OF_BGP.contains(&route.protocol);
    match &route.target {
        Target::Hop(hop) if ours && hop.gateway.is_none() => hop.oif,
        _ => None,
    }
}

fn connected(address: &Address) -> Option<(Prefix, u32)> {
    let link_local = match address.address.ip() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    };
    if link_local || address.scope == SCOPE_HOST {
        return None;
    }
    Some((of_network(address.address)?, address.ifindex))
}

impl Table {
    /// What the kernel has now.
    fn read(netlink: &Netlink) -> cali_netlink::Result<Self> {
        let links = netlink.dump_links()?;
        let filter = RouteFilter {
            table: Some(TABLE_MAIN),
            ..RouteFilter::default()
        };
        let mut table = Self {
            names: links
                .into_iter()
                .map(|link| (link.index, link.name.into()))
                .collect(),
            ..Self::default()
        };
        let addresses = netlink.dump_addresses(None)?;
        table.connected = addresses.iter().filter_map(connected).collect();
        for route in netlink.dump_routes(&filter)? {
            table.on_route(Notice::Present(route));
        }
        Ok(table)
    }

    fn on_link(&mut self, notice: Notice<Link>) {
        let index = notice.object().index;
        let up = match notice {
            Notice::Present(link) => {
                self.names.insert(index, link.name.into());
                link.up
            }
            Notice::Gone(_) => {
                self.names.remove(&index);
                self.connected.retain(|(_, device)| *device != index);
                false
            }
        };
        if !up {
            self.written.retain(|_, device| *device != index);
        }
    }

    fn on_address(&mut self, notice: &Notice<Address>) {
        let Some(network) = connected(notice.object()) else {
            return;
        };
        match notice {
            Notice::Present(_) => self.connected.insert(network),
            Notice::Gone(_) => self.connected.remove(&network),
        };
    }

    fn on_route(&mut self, notice: Notice<Route>) {
        let route = notice.object();
        let Some(prefix) = of_network(route.prefix) else {
            return;
        };
        let key = (prefix, route.metric);
        match (device_of(route), &notice) {
            (Some(device), Notice::Present(_)) => {
                self.written.insert(key, device);
            }
            // A route with a gateway in its place, or none any more.
            (None, Notice::Present(_)) if route.table == TABLE_MAIN => {
                self.written.remove(&key);
            }
            (Some(_), Notice::Gone(_)) => {
                self.written.remove(&key);
            }
            (None, _) => {}
        }
    }

    fn routes(&self) -> BTreeSet<DeviceRoute> {
        let mut out: BTreeSet<DeviceRoute> = BTreeSet::new();
        let route = |prefix, device, kind, metric| {
            let interface = Arc::clone(self.names.get(device)?);
            Some(DeviceRoute {
                prefix,
                interface,
                kind,
                metric,
            })
        };
        let mut last = None;
        for ((prefix, metric), device) in &self.written {
            // Only the row with the best metric forwards.
            if last.replace(*prefix) != Some(*prefix) {
                out.extend(route(*prefix, device, DeviceRouteKind::Written, *metric));
            }
        }
        for (prefix, device) in &self.connected {
            out.extend(route(*prefix, device, DeviceRouteKind::Connected, 0));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(routes: &[(&str, u8, u32, Option<&str>)]) -> Table {
        let mut table = Table {
            names: BTreeMap::from([(7, "cali1".into())]),
            ..Table::default()
        };
        for (prefix, protocol, metric, gateway) in routes {
            table.on_route(Notice::Present(row(prefix, *protocol, *metric, *gateway)));
        }
        table
    }

    fn row(prefix: &str, protocol: u8, metric: u32, gateway: Option<&str>) -> Route {
        let mut route = Route::on_device(prefix.parse().unwrap(), protocol, 7);
        route.metric = metric;
        if let (Some(gateway), Target::Hop(hop)) = (gateway, &mut route.target) {
            hop.gateway = Some(gateway.parse().unwrap());
        }
        route
    }

    fn shown(table: &Table) -> Vec<String> {
        let routes = table.routes();
        let text = |r: &DeviceRoute| format!("{} {} {}", r.prefix, r.interface, r.metric);
        routes.iter().map(text).collect()
    }

    #[test]
    fn routes_of_bgp_of_the_kernel_and_over_gateways_are_left_out() {
        let seen = table(&[
            ("10.0.0.1/32", 80, 0, None),
            ("10.0.0.2/32", 12, 0, None),
            ("10.0.0.3/32", 186, 0, None),
            ("10.0.1.0/24", 2, 0, None),
            ("10.0.2.0/24", 80, 0, Some("10.0.1.9")),
        ]);
        assert_eq!(shown(&seen), ["10.0.0.1/32 cali1 0"]);
    }

    #[test]
    fn the_best_metric_counts_and_a_removed_row_uncovers_the_other() {
        let mut seen = table(&[
            ("10.0.0.1/32", 80, 1024, None),
            ("10.0.0.1/32", 80, 512, None),
        ]);
        assert_eq!(shown(&seen), ["10.0.0.1/32 cali1 512"]);
        seen.on_route(Notice::Gone(row("10.0.0.1/32", 80, 512, None)));
        assert_eq!(shown(&seen), ["10.0.0.1/32 cali1 1024"]);
    }

    #[test]
    fn a_row_that_another_one_takes_the_place_of_is_gone() {
        let mut seen = table(&[("10.0.0.1/32", 80, 0, None)]);
        seen.on_route(Notice::Present(row("10.0.0.1/32", 12, 0, Some("10.0.1.9"))));
        assert_eq!(shown(&seen), [] as [String; 0]);
    }
}
