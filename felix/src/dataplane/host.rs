//! Settings of the host and of the workloads' interfaces, and neighbours.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_netlink::{Change, Error, IfIndex, Link, MacAddr, Neighbour, Netlink, sysctl};
use tracing::{debug, warn};

use super::endpoints::interface_settings;
use crate::calc::Endpoint;

/// Lets this host forward. IPv6 may be switched off in the kernel.
pub(super) fn enable_forwarding(netlink: &Netlink) -> Result<(), Error> {
    let settings = [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];
    for ((key, _), result) in settings
        .iter()
        .zip(sysctl::write_all(netlink.netns(), &settings))
    {
        match result {
            Err(error) if key.starts_with("ipv6/") && error.is_not_found() => {}
            Err(error) => return Err(error),
            Ok(wrote) => debug!(key, wrote, "forwarding"),
        }
    }
    Ok(())
}

/// Sets up the host's side of an endpoint's interface, and says which device it is; the reason in words if it cannot be.
fn set_up_interface(netlink: &Netlink, endpoint: &Endpoint) -> Result<IfIndex, String> {
    let interface = &endpoint.interface;
    let link = match netlink.link_by_name(interface) {
        Ok(Some(link)) => link,
        Ok(None) => return Err(format!("interface {interface} is not there")),
        Err(error) => return Err(error.to_string()),
    };
    let written = netlink.netns().run(|| {
        let rp_filter = sysctl::read_here("ipv4/conf/default/rp_filter");
        let settings = interface_settings(interface, &rp_filter.unwrap_or_else(|_| "0".to_owned()));
        let borrowed: Vec<(&str, &str)> = settings
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let results = sysctl::write_all_here(&borrowed);
        let keys = settings.into_iter().map(|(key, _)| key);
        keys.zip(results).collect::<Vec<_>>()
    });
    for (key, result) in written.map_err(|error| error.to_string())? {
        match result {
            Ok(_) => {}
            Err(error) if key.starts_with("ipv6/") && error.is_not_found() => {}
            // Best effort, as in Calico: without it the first answer of a pod's gateway is late, no more.
            Err(error) if key.ends_with("/proxy_delay") => {
                debug!(%error, "proxy_delay cannot be set")
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    neighbours(netlink, endpoint, link.index)?;
    if link.up {
        Ok(link.index)
    } else {
        Err(format!("interface {interface} is down"))
    }
}

/// Where the datastore knows the endpoint's MAC, its IPv4 addresses need no resolution.
fn neighbours(netlink: &Netlink, endpoint: &Endpoint, index: u32) -> Result<(), String> {
    let Some(mac) = endpoint
        .mac
        .as_deref()
        .and_then(|mac| mac.parse::<MacAddr>().ok())
    else {
        return Ok(());
    };
    let entries: Vec<_> = endpoint
        .addresses
        .iter()
        .filter(|address| address.is_v4() && address.is_host())
        .map(|address| Change::Replace(Neighbour::permanent(index, address.addr(), mac)))
        .collect();
    netlink
        .apply_neighbours(&entries)
        .into_iter()
        .find_map(Result::err)
        .map_or(Ok(()), |error| Err(error.to_string()))
}

/// How it went with the interfaces of endpoints.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    /// Those that are set up, with the device that was.
    done: BTreeMap<Arc<str>, IfIndex>,
    /// Those that could not be, with the reason.
    problems: BTreeMap<Arc<str>, String>,
}

impl Interfaces {
    /// Sets the interface of an endpoint up and remembers how that went.
    pub(super) fn set_up(&mut self, netlink: &Netlink, endpoint: &Endpoint) {
        match set_up_interface(netlink, endpoint) {
            Ok(index) => {
                self.problems.remove(&endpoint.interface);
                self.done.insert(endpoint.interface.clone(), index);
            }
            Err(problem) => {
                self.done.remove(&endpoint.interface);
                if self
                    .problems
                    .insert(endpoint.interface.clone(), problem.clone())
                    .as_ref()
                    != Some(&problem)
                {
                    warn!(interface = %endpoint.interface, problem, "interface is not set up");
                }
            }
        }
    }

    /// Whether this device, as it is told of, is one that has been set up and nothing has happened to since.
    pub(super) fn stands(&self, link: &Link) -> bool {
        link.up && self.done.get(link.name.as_str()) == Some(&link.index)
    }

    /// The interface has no endpoint any more.
    pub(super) fn forget(&mut self, interface: &str) {
        self.done.remove(interface);
        self.problems.remove(interface);
    }

    /// Why the interface is not set up.
    pub(super) fn problem(&self, interface: &str) -> Option<&String> {
        self.problems.get(interface)
    }
}
