//! The addresses of the node's own interfaces, by which host endpoints may be known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_netlink::events::Event;
use cali_netlink::{Error, Netlink};

/// Addresses by interface; interfaces without one are left out.
pub(super) type OwnAddresses = BTreeMap<Arc<str>, BTreeSet<IpAddr>>;

/// Whether what is known is outdated after these notifications.
pub(super) fn outdated(events: &[Event]) -> bool {
    let about = |event: &Event| matches!(event, Event::Address(_) | Event::Overflow);
    events.iter().any(about)
}

/// Reads them.
///
/// # Errors
/// The kernel's answer.
pub(super) fn read(netlink: &Netlink) -> Result<OwnAddresses, Error> {
    let names: BTreeMap<_, Arc<str>> = netlink
        .dump_links()?
        .into_iter()
        .map(|link| (link.index, link.name.into()))
        .collect();
    let mut all = OwnAddresses::new();
    for address in netlink.dump_addresses(None)? {
        if let Some(name) = names.get(&address.ifindex) {
            all.entry(name.clone())
                .or_default()
                .insert(address.address.ip());
        }
    }
    Ok(all)
}
