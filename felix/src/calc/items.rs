//! What objects contribute: labels and addresses for the selectors, and the local endpoints' places.

use std::sync::Arc;

use cali_api::kubernetes::{LABEL_NAMESPACE, NAMESPACE_PROFILE_PREFIX};
use cali_api::v3::{HostEndpointSpec, QoSControls, WorkloadEndpoint, WorkloadEndpointSpec};
use cali_api::{AnyResource, Cidr, Key, StringMap};

use super::ipsets::{Item, NamedPort};
use super::local::LocalEndpoint;
use super::output::{HostInterface, Limit, Limits};

/// Packets that may come at once where nobody says how many (Calico's default).
const PACKET_BURST: u32 = 5;

/// Labels of its own, the profiles that it inherits more from, and addresses.
pub(super) struct Contribution {
    pub(super) labels: StringMap,
    pub(super) parents: Vec<Arc<str>>,
    pub(super) item: Item,
}

/// A workload: who it is says `object`, where it is says `place`.
pub(super) fn workload(
    key: &Key,
    object: &WorkloadEndpoint,
    place: &WorkloadEndpointSpec,
) -> Contribution {
    let spec = &object.spec;
    let ports = spec.ports.iter().filter(|port| !port.name.is_empty());
    Contribution {
        labels: object.effective_labels(key.namespace.as_deref()),
        parents: names(&spec.profiles),
        item: Item {
            nets: place.ip_networks.iter().copied().collect(),
            ports: ports
                .map(|port| NamedPort {
                    name: port.name.as_str().into(),
                    protocol: port.protocol.number(),
                    port: port.port,
                })
                .collect(),
        },
    }
}

/// The same as the kernel sees it.
pub(super) fn local_workload(
    object: &WorkloadEndpoint,
    place: &WorkloadEndpointSpec,
) -> LocalEndpoint {
    LocalEndpoint::Workload {
        interface: place.interface_name.as_str().into(),
        addresses: place.ip_networks.clone(),
        mac: place.mac.map(|mac| mac.to_string().into()),
        profiles: names(&object.spec.profiles),
        limits: object
            .spec
            .qos_controls
            .as_ref()
            .map(limits)
            .unwrap_or_default(),
    }
}

/// A host endpoint as the kernel sees it; `None` for one that can be on no interface.
pub(super) fn local_host(spec: &HostEndpointSpec) -> Option<LocalEndpoint> {
    let interface = match spec.interface_name.as_str() {
        "" if spec.expected_ips.is_empty() => return None,
        "" => HostInterface::ByAddress,
        "*" => HostInterface::All,
        name => HostInterface::Named(name.into()),
    };
    Some(LocalEndpoint::Host {
        interface,
        addresses: spec.expected_ips.clone(),
        profiles: names(&spec.profiles),
    })
}

/// The networks of service addresses that BGPConfiguration names, sorted.
pub(super) fn service_nets(value: Option<&AnyResource>) -> Arc<[Cidr]> {
    let Some(AnyResource::BGPConfiguration(bgp)) = value else {
        return Arc::default();
    };
    let spec = &bgp.spec;
    let mut nets: Vec<Cidr> = spec
        .service_cluster_ips
        .iter()
        .chain(&spec.service_external_ips)
        .chain(&spec.service_load_balancer_ips)
        .map(|range| range.cidr)
        .collect();
    nets.sort_unstable();
    nets.dedup();
    nets.into()
}

fn limits(controls: &QoSControls) -> Limits {
    let limit = |rate: u64, burst: u64, connections: u64| Limit {
        packets: (rate > 0).then(|| {
            let burst = u32::try_from(burst).unwrap_or(u32::MAX);
            (rate, if burst == 0 { PACKET_BURST } else { burst })
        }),
        connections: (connections > 0).then(|| u32::try_from(connections).unwrap_or(u32::MAX)),
    };
    Limits {
        ingress: limit(
            controls.ingress_packet_rate,
            controls.ingress_packet_burst,
            controls.ingress_max_connections,
        ),
        egress: limit(
            controls.egress_packet_rate,
            controls.egress_packet_burst,
            controls.egress_max_connections,
        ),
        dscp: controls.dscp.map(cali_api::v3::Dscp::value),
    }
}

fn names(names: &[String]) -> Vec<Arc<str>> {
    names.iter().map(|name| Arc::from(name.as_str())).collect()
}

/// What has addresses but is no workload; `None` for anything else.
pub(super) fn other(key: &Key, value: Option<&AnyResource>) -> Option<Contribution> {
    let plain = |nets: &[cali_api::Net]| Item {
        nets: nets.iter().map(|net| net.cidr()).collect(),
        ports: Box::default(),
    };
    let mut parents = Vec::new();
    let (mut labels, item) = match value? {
        AnyResource::GlobalNetworkSet(set) => (set.metadata.labels.clone(), plain(&set.spec.nets)),
        AnyResource::NetworkSet(set) => (set.metadata.labels.clone(), plain(&set.spec.nets)),
        AnyResource::HostEndpoint(endpoint) => {
            let spec = &endpoint.spec;
            parents.extend(names(&spec.profiles));
            let addresses = spec.expected_ips.iter();
            let item = Item {
                nets: addresses.map(|addr| Cidr::host(*addr)).collect(),
                ports: spec
                    .ports
                    .iter()
                    .map(|port| NamedPort {
                        name: port.name.as_str().into(),
                        protocol: port.protocol.number(),
                        port: port.port,
                    })
                    .collect(),
            };
            (endpoint.metadata.labels.clone(), item)
        }
        _ => return None,
    };
    if let Some(namespace) = &key.namespace {
        labels.insert(LABEL_NAMESPACE.to_owned(), namespace.to_string());
        parents.push(format!("{NAMESPACE_PROFILE_PREFIX}{namespace}").into());
    }
    Some(Contribution {
        labels,
        parents,
        item,
    })
}
