//! The addresses of the node's own interfaces, by which host endpoints may be known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_netlink::{Address, Error, Event, FollowedLinks, IfIndex, IpNetwork, Netlink, Notice};

/// Addresses by interface; interfaces without one are left out.
pub(super) type ByInterface = BTreeMap<Arc<str>, BTreeSet<IpAddr>>;

/// Follows them by notifications: pods come and go, and each brings a link-local address.
#[derive(Debug, Default)]
pub(super) struct OwnAddresses {
    links: FollowedLinks,
    /// None: to be read.
    addresses: Option<BTreeMap<IfIndex, BTreeSet<IpNetwork>>>,
}

impl OwnAddresses {
    /// Takes in notifications; true where an address came or went, or an interface got another name.
    pub(super) fn on_events(&mut self, events: &[Event]) -> bool {
        let mut changed = false;
        for event in events {
            let about_links = self.links.on_event(event);
            match event {
                Event::Overflow => {
                    self.addresses = None;
                    changed = true;
                }
                Event::Address(notice) => changed |= self.on_address(notice),
                // Its name matters while it has an address.
                Event::Link(notice) if about_links => {
                    let index = &notice.object().index;
                    changed |= match (&mut self.addresses, notice) {
                        (None, _) => true,
                        (Some(all), Notice::Present(_)) => all.contains_key(index),
                        (Some(all), Notice::Gone(_)) => all.remove(index).is_some(),
                    };
                }
                _ => {}
            }
        }
        changed
    }

    fn on_address(&mut self, notice: &Notice<Address>) -> bool {
        let Some(all) = &mut self.addresses else {
            return true;
        };
        let (index, address) = notice.object().key();
        match notice {
            Notice::Present(_) => all.entry(index).or_default().insert(address),
            Notice::Gone(_) => {
                let Some(left) = all.get_mut(&index) else {
                    return false;
                };
                let was_there = left.remove(&address);
                if left.is_empty() {
                    all.remove(&index);
                }
                was_there
            }
        }
    }

    /// Whether there is a device of this name now.
    ///
    /// # Errors
    /// The kernel has to be asked, and its answer is none.
    pub(super) fn has_device(&mut self, netlink: &Netlink, name: &str) -> Result<bool, Error> {
        let links = self.links.look(netlink)?;
        Ok(links.values().any(|link| link.name == name))
    }

    /// The addresses now.
    ///
    /// # Errors
    /// The kernel has to be asked, and its answer is none.
    pub(super) fn look(&mut self, netlink: &Netlink) -> Result<ByInterface, Error> {
        let addresses = match self.addresses.take() {
            Some(addresses) => addresses,
            None => {
                let mut all: BTreeMap<IfIndex, BTreeSet<IpNetwork>> = BTreeMap::new();
                for address in netlink.dump_addresses(None)? {
                    let (index, address) = address.key();
                    all.entry(index).or_default().insert(address);
                }
                all
            }
        };
        let addresses = self.addresses.insert(addresses);
        let links = self.links.look(netlink)?;
        let named = addresses.iter().filter_map(|(index, addresses)| {
            let link = links.get(index)?;
            let ips = addresses.iter().map(IpNetwork::ip).collect();
            Some((link.name.as_str().into(), ips))
        });
        Ok(named.collect())
    }
}

#[cfg(test)]
mod tests {
    use cali_netlink::LinkKind;
    use cali_netlink::testing::link;

    use super::*;

    fn address(index: IfIndex, text: &str) -> Address {
        Address::new(index, text.parse().unwrap())
    }

    /// As after a first look at a host without devices.
    fn known() -> OwnAddresses {
        let mut links = FollowedLinks::default();
        links.set([]);
        OwnAddresses {
            links,
            addresses: Some(BTreeMap::new()),
        }
    }

    fn shown(own: &OwnAddresses) -> Vec<String> {
        let held = own.addresses.iter().flatten();
        held.map(|(index, held)| format!("{index}: {held:?}"))
            .collect()
    }

    #[test]
    fn only_what_concerns_an_address_is_a_change() {
        let mut own = known();
        let came = |index, name| Event::Link(Notice::Present(link(index, name, LinkKind::Veth)));
        let put = |text| Event::Address(Notice::Present(address(2, text)));
        let gone = |text| Event::Address(Notice::Gone(address(2, text)));
        assert!(!own.on_events(&[came(2, "eth0"), came(3, "cali1")]));
        assert!(own.on_events(&[put("192.0.2.1/24")]));
        assert!(!own.on_events(&[put("192.0.2.1/24"), came(3, "cali2")]));
        assert!(own.on_events(&[came(2, "uplink")]), "another name");
        // One address with two prefix lengths is there until both are gone.
        assert!(own.on_events(&[put("192.0.2.1/32"), gone("192.0.2.1/24")]));
        assert_eq!(shown(&own).len(), 1);
        assert!(own.on_events(&[gone("192.0.2.1/32")]));
        assert!(!own.on_events(&[gone("192.0.2.1/32")]));
        assert!(own.on_events(&[put("192.0.2.9/24")]));
        let left = Event::Link(Notice::Gone(link(2, "uplink", LinkKind::Veth)));
        assert!(own.on_events(&[left]), "a device takes its addresses along");
        assert_eq!(shown(&own), [""; 0]);
        assert!(own.on_events(&[Event::Overflow]));
        assert!(own.addresses.is_none(), "to be read");
    }
}
