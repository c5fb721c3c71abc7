//! Local endpoints: which routes they get, which settings their interfaces need, whose connections end. Pure.
//!
//! An address has one owner: of several endpoints that claim it, or that claim one interface, the first by name has
//! it, as in the rule set.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::{Cidr, Key};
use cali_routes::{Candidate, Input, RouteSpec, Source};

use crate::calc::{Batch, Delta, Endpoint};

/// What follows from a batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct EndpointChanges {
    /// Routes to set or to remove.
    pub routes: Vec<Input>,
    /// Addresses that left their endpoint: their connections must end before somebody else has the address.
    pub freed: BTreeSet<IpAddr>,
    /// Interfaces whose settings have to be looked at.
    pub interfaces: BTreeSet<Arc<str>>,
    /// Endpoints that appeared, changed or are gone.
    pub touched: BTreeSet<Key>,
}

/// The local endpoints.
#[derive(Debug, Default)]
pub struct Endpoints {
    known: BTreeMap<Key, Arc<Endpoint>>,
    claims: BTreeMap<Cidr, BTreeSet<Key>>,
    /// What each prefix leads to now.
    routed: BTreeMap<Cidr, (Key, Arc<str>)>,
    /// Those that are more than one address: few, if any.
    wide: BTreeSet<Cidr>,
    interfaces: BTreeMap<Arc<str>, BTreeSet<Key>>,
    /// Preferred source address towards workloads.
    source_v4: Option<IpAddr>,
    source_v6: Option<IpAddr>,
}

impl Endpoints {
    /// All endpoints.
    pub fn all(&self) -> impl Iterator<Item = (&Key, &Arc<Endpoint>)> {
        self.known.iter()
    }

    /// One endpoint.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Arc<Endpoint>> {
        self.known.get(key)
    }

    /// The endpoint that has the interface.
    #[must_use]
    pub fn of_interface(&self, interface: &str) -> Option<(&Key, &Arc<Endpoint>)> {
        let key = self.interfaces.get(interface)?.first()?;
        self.known.get_key_value(key)
    }

    /// The endpoint that an address leads to.
    #[must_use]
    pub fn owner_of(&self, addr: IpAddr) -> Option<&Key> {
        if let Some((key, _)) = self.routed.get(&Cidr::host(addr)) {
            return Some(key);
        }
        self.wide
            .iter()
            .filter(|prefix| prefix.contains(addr))
            .max_by_key(|prefix| prefix.prefix_len())
            .and_then(|prefix| self.routed.get(prefix))
            .map(|(key, _)| key)
    }

    /// Takes the graph's changes in.
    pub fn on_batch(&mut self, batch: &Batch) -> EndpointChanges {
        let mut changes = EndpointChanges::default();
        let mut prefixes = BTreeSet::new();
        for delta in &batch.deltas {
            match delta {
                Delta::Endpoint { id, endpoint } => {
                    self.forget(id, &mut prefixes, &mut changes);
                    for prefix in &endpoint.addresses {
                        self.claims.entry(*prefix).or_default().insert(id.clone());
                        prefixes.insert(*prefix);
                    }
                    self.interfaces
                        .entry(endpoint.interface.clone())
                        .or_default()
                        .insert(id.clone());
                    changes.interfaces.insert(endpoint.interface.clone());
                    changes.touched.insert(id.clone());
                    self.known.insert(id.clone(), endpoint.clone());
                }
                Delta::EndpointRemove { id } => {
                    self.forget(id, &mut prefixes, &mut changes);
                    changes.touched.insert(id.clone());
                }
                Delta::Settings(spec) => {
                    let sources = (
                        spec.device_route_source(true),
                        spec.device_route_source(false),
                    );
                    if sources != (self.source_v4, self.source_v6) {
                        (self.source_v4, self.source_v6) = sources;
                        prefixes.extend(self.claims.keys());
                        self.routed.clear();
                    }
                }
                _ => {}
            }
        }
        for prefix in prefixes {
            self.route(prefix, &mut changes);
        }
        changes
    }

    fn forget(&mut self, id: &Key, prefixes: &mut BTreeSet<Cidr>, changes: &mut EndpointChanges) {
        let Some(endpoint) = self.known.remove(id) else {
            return;
        };
        for prefix in &endpoint.addresses {
            if let Some(claims) = self.claims.get_mut(prefix) {
                claims.remove(id);
            }
            prefixes.insert(*prefix);
        }
        if let Some(owners) = self.interfaces.get_mut(&endpoint.interface) {
            owners.remove(id);
            if owners.is_empty() {
                self.interfaces.remove(&endpoint.interface);
            }
        }
        changes.interfaces.insert(endpoint.interface.clone());
    }

    /// Decides the route of one prefix anew.
    fn route(&mut self, prefix: Cidr, changes: &mut EndpointChanges) {
        let owner = self.claims.get(&prefix).and_then(|claims| {
            let owns_interface = |key: &&Key| {
                self.known.get(*key).is_some_and(|endpoint| {
                    self.interfaces
                        .get(&endpoint.interface)
                        .and_then(BTreeSet::first)
                        == Some(*key)
                })
            };
            claims.iter().find(owns_interface)
        });
        let next =
            owner.and_then(|key| Some((key.clone(), self.known.get(key)?.interface.clone())));
        let before = self.routed.get(&prefix);
        if before == next.as_ref() {
            return;
        }
        let moved =
            before.is_some_and(|before| next.as_ref().is_none_or(|next| before.0 != next.0));
        if moved && prefix.is_host() {
            changes.freed.insert(prefix.addr());
        }
        match next {
            Some((key, interface)) => {
                let source = if prefix.is_v4() {
                    self.source_v4
                } else {
                    self.source_v6
                };
                let spec = RouteSpec::Device {
                    device: interface.clone(),
                    source,
                };
                changes.routes.push(Input::Set(
                    Source::Workload,
                    prefix,
                    Candidate::new(spec, key.to_string()),
                ));
                self.routed.insert(prefix, (key, interface));
                if !prefix.is_host() {
                    self.wide.insert(prefix);
                }
            }
            None => {
                changes.routes.push(Input::Remove(Source::Workload, prefix));
                self.routed.remove(&prefix);
                self.wide.remove(&prefix);
                self.claims.remove(&prefix);
            }
        }
    }
}

/// Settings of a workload's interface, as Calico's (reference: calico-dataplane §2.6). Paths below `/proc/sys/net`.
#[must_use]
pub fn interface_settings(interface: &str, rp_filter: &str) -> Vec<(String, String)> {
    [
        // The gateway 169.254.1.1 of the pods is answered by proxy ARP, at once.
        ("ipv4/conf", "proxy_arp", "1"),
        ("ipv4/neigh", "proxy_delay", "0"),
        ("ipv4/conf", "forwarding", "1"),
        // Services that are translated to this host's loopback can be reached from pods.
        ("ipv4/conf", "route_localnet", "1"),
        ("ipv4/conf", "rp_filter", rp_filter),
        ("ipv6/conf", "accept_ra", "0"),
        ("ipv6/conf", "proxy_ndp", "1"),
        ("ipv6/conf", "forwarding", "1"),
    ]
    .map(|(place, name, value)| (format!("{place}/{interface}/{name}"), value.to_owned()))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key {
            kind: cali_api::Kind::WorkloadEndpoint,
            namespace: Some("default".into()),
            name: name.into(),
        }
    }

    fn endpoint(interface: &str, addresses: &[&str]) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            interface: interface.into(),
            addresses: addresses
                .iter()
                .map(|address| address.parse().unwrap())
                .collect(),
            mac: None,
            ingress: Vec::new(),
            egress: Vec::new(),
            profiles: Vec::new(),
            limits: Default::default(),
        })
    }

    fn put(name: &str, interface: &str, addresses: &[&str]) -> Delta {
        Delta::Endpoint {
            id: key(name),
            endpoint: endpoint(interface, addresses),
        }
    }

    fn fed(endpoints: &mut Endpoints, deltas: Vec<Delta>) -> EndpointChanges {
        endpoints.on_batch(&Batch {
            sequence: 1,
            in_sync: true,
            deltas,
        })
    }

    fn routes(changes: &EndpointChanges) -> Vec<String> {
        let text = |input: &Input| match input {
            Input::Set(
                _,
                prefix,
                Candidate {
                    spec: RouteSpec::Device { device, .. },
                    ..
                },
            ) => {
                format!("{prefix} dev {device}")
            }
            Input::Remove(_, prefix) => format!("no {prefix}"),
            other => panic!("{other:?}"),
        };
        changes.routes.iter().map(text).collect()
    }

    #[test]
    fn every_address_leads_to_its_interface() {
        let mut e = Endpoints::default();
        let changes = fed(
            &mut e,
            vec![put("a", "cali1", &["10.0.0.1/32", "fd00::1/128"])],
        );
        assert_eq!(
            routes(&changes),
            ["10.0.0.1/32 dev cali1", "fd00::1/128 dev cali1"]
        );
        assert_eq!(changes.freed, BTreeSet::new());
        assert_eq!(
            fed(
                &mut e,
                vec![put("a", "cali1", &["10.0.0.1/32", "fd00::1/128"])]
            )
            .routes,
            []
        );
    }

    #[test]
    fn a_removed_endpoint_frees_its_addresses() {
        let mut e = Endpoints::default();
        fed(&mut e, vec![put("a", "cali1", &["10.0.0.1/32"])]);
        let changes = fed(&mut e, vec![Delta::EndpointRemove { id: key("a") }]);
        assert_eq!(routes(&changes), ["no 10.0.0.1/32"]);
        assert_eq!(changes.freed, BTreeSet::from(["10.0.0.1".parse().unwrap()]));
    }

    #[test]
    fn an_address_that_moves_to_another_endpoint_is_freed_first() {
        let mut e = Endpoints::default();
        fed(&mut e, vec![put("a", "cali1", &["10.0.0.1/32"])]);
        let gone = Delta::EndpointRemove { id: key("a") };
        let changes = fed(&mut e, vec![put("b", "cali2", &["10.0.0.1/32"]), gone]);
        assert_eq!(routes(&changes), ["10.0.0.1/32 dev cali2"]);
        assert_eq!(changes.freed.len(), 1);
    }

    #[test]
    fn the_first_by_name_has_a_disputed_address_or_interface() {
        let mut e = Endpoints::default();
        fed(&mut e, vec![put("b", "cali2", &["10.0.0.1/32"])]);
        let changes = fed(&mut e, vec![put("a", "cali1", &["10.0.0.1/32"])]);
        assert_eq!(routes(&changes), ["10.0.0.1/32 dev cali1"]);
        let changes = fed(&mut e, vec![Delta::EndpointRemove { id: key("a") }]);
        assert_eq!(routes(&changes), ["10.0.0.1/32 dev cali2"]);
        fed(&mut e, vec![put("c", "cali2", &["10.0.0.3/32"])]);
        assert_eq!(e.of_interface("cali2").unwrap().0, &key("b"));
    }
}
