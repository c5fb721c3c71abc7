//! Services: the addresses and ports behind them, from their EndpointSlices.
//!
//! As Calico does, every address of a slice counts, ready or not: whether a server takes requests is for the service
//! proxy to say, not for policy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::kubernetes::EndpointSlice;
use cali_api::{Cidr, Key};
use foldhash::HashMap;

use super::output::{IpSetId, Member};

/// Label of a slice: the service that it belongs to (`discovery.k8s.io/v1`, `LabelServiceName`).
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// A service: namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ServiceName {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

/// What one slice holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Slice {
    addresses: BTreeSet<IpAddr>,
    /// Protocol and number.
    ports: BTreeSet<(u8, u16)>,
}

impl Slice {
    fn read(slice: &EndpointSlice) -> Self {
        let addresses = slice.spec.endpoints.iter();
        let ports = slice.spec.ports.iter().filter_map(|port| {
            let protocol: cali_api::v3::Protocol =
                port.protocol.as_deref().unwrap_or("TCP").parse().ok()?;
            Some((protocol.number(), u16::try_from(port.port?).ok()?))
        });
        Self {
            addresses: addresses
                .flat_map(|endpoint| &endpoint.addresses)
                .filter_map(|address| address.parse().ok())
                .collect(),
            ports: ports.collect(),
        }
    }

    /// What the slice contributes to a set, with ports or without.
    pub(super) fn members(&self, with_ports: bool) -> Vec<Member> {
        let plain = self
            .addresses
            .iter()
            .map(|addr| Member::Net(Cidr::host(*addr)));
        if !with_ports {
            return plain.collect();
        }
        self.addresses
            .iter()
            .flat_map(|addr| {
                self.ports.iter().map(|(protocol, port)| Member::Port {
                    addr: *addr,
                    protocol: *protocol,
                    port: *port,
                })
            })
            .collect()
    }
}

/// A slice before and after a change, and the sets that look its service up.
pub(super) struct SliceChange {
    pub(super) before: Slice,
    pub(super) after: Slice,
    pub(super) sets: Vec<IpSetId>,
}

/// All slices, by service.
#[derive(Debug, Default)]
pub(super) struct Services {
    service_of: HashMap<Key, ServiceName>,
    slices: HashMap<ServiceName, BTreeMap<Key, Slice>>,
    sets: HashMap<ServiceName, BTreeSet<IpSetId>>,
}

impl Services {
    /// A slice appeared, changed or is gone; the parts of that, one for each service that it touches.
    pub(super) fn set_slice(
        &mut self,
        key: &Key,
        slice: Option<&EndpointSlice>,
    ) -> Vec<SliceChange> {
        let service = slice.and_then(|slice| {
            Some(ServiceName {
                namespace: key.namespace.clone()?,
                name: slice.metadata.labels.get(SERVICE_NAME)?.as_str().into(),
            })
        });
        let new = slice.map(Slice::read).unwrap_or_default();
        let mut changes = Vec::new();
        let former = self.service_of.remove(key);
        if let Some(former) = former.filter(|former| Some(former) != service.as_ref()) {
            changes.push(self.replace(&former, key, None));
        }
        if let Some(service) = service {
            changes.push(self.replace(&service, key, Some(new)));
            self.service_of.insert(key.clone(), service);
        }
        changes
    }

    fn replace(&mut self, service: &ServiceName, key: &Key, new: Option<Slice>) -> SliceChange {
        let slices = self.slices.entry(service.clone()).or_default();
        let after = new.clone().unwrap_or_default();
        let before = match new {
            Some(new) => slices.insert(key.clone(), new),
            None => slices.remove(key),
        };
        if slices.is_empty() {
            self.slices.remove(service);
        }
        let sets = self.sets.get(service).into_iter().flatten().cloned();
        SliceChange {
            before: before.unwrap_or_default(),
            after,
            sets: sets.collect(),
        }
    }

    /// A set looks the service up from now on; what it holds.
    pub(super) fn add_set(&mut self, service: &ServiceName, id: &IpSetId) -> Vec<Slice> {
        let sets = self.sets.entry(service.clone()).or_default();
        sets.insert(id.clone());
        let slices = self.slices.get(service).into_iter();
        slices.flat_map(BTreeMap::values).cloned().collect()
    }

    /// The set is gone.
    pub(super) fn remove_set(&mut self, service: &ServiceName, id: &IpSetId) {
        if let Some(sets) = self.sets.get_mut(service) {
            sets.remove(id);
            if sets.is_empty() {
                self.sets.remove(service);
            }
        }
    }
}
