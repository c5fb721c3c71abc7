//! Which service addresses a node announces (`serviceClusterIPs`, `serviceExternalIPs`, `serviceLoadBalancerIPs`
//! of BGPConfiguration).
//!
//! Ranges are announced as a whole by every node. Single addresses are announced
//! - of a service with `externalTrafficPolicy: Local`, by the nodes that have a ready endpoint of it, so that the
//!   more specific route draws traffic there and the source address survives;
//! - of any other service, by all nodes, where the range that allows the address is that one address, or where
//!   load balancer ranges are not to be announced as a whole (`serviceLoadBalancerAggregation: Disabled`).
//!
//! `internalTrafficPolicy` does not matter: it is about clients inside the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_api::Cidr;
use cali_api::kubernetes::{EndpointSlice, Service};
use cali_api::v3::{BGPConfigurationSpec, ServiceCidr, Toggle};

use super::{Resources, prefix};
use crate::wire::Prefix;

/// On a node, keeps all service addresses from being announced by it.
const EXCLUDE_LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// On an EndpointSlice: its service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// A service that has addresses to announce.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceView {
    cluster: Vec<IpAddr>,
    external: Vec<IpAddr>,
    balancer: Vec<IpAddr>,
    /// `externalTrafficPolicy: Local`.
    local: bool,
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    texts.filter_map(|text| text.parse().ok()).collect()
}

impl ServiceView {
    /// `None` for a service that is never announced: without a cluster IP (headless) or an alias (`ExternalName`).
    pub(crate) fn of(service: &Service) -> Option<Self> {
        let spec = &service.spec;
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        if !matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer") {
            return None;
        }
        let listed = spec.cluster_ips.iter().flatten();
        let mut cluster = addresses(listed.chain(&spec.cluster_ip));
        cluster.sort_unstable();
        cluster.dedup();
        if cluster.is_empty() {
            return None;
        }
        let balancer = service
            .status
            .as_ref()
            .and_then(|s| s.load_balancer.as_ref());
        let ingress = balancer
            .into_iter()
            .flat_map(|b| b.ingress.iter().flatten());
        Some(Self {
            cluster,
            external: addresses(spec.external_ips.iter().flatten()),
            balancer: addresses(ingress.filter_map(|i| i.ip.as_ref())),
            local: spec.external_traffic_policy.as_deref() == Some("Local"),
        })
    }
}

/// Where a service has ready endpoints, from one of its slices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SliceView {
    /// `namespace/name`.
    service: String,
    v4: bool,
    /// Nodes with a ready endpoint.
    nodes: BTreeSet<String>,
    /// There is a ready endpoint, wherever.
    ready: bool,
}

impl SliceView {
    /// `None` for a slice that is of no service, or of names.
    pub(crate) fn of(namespace: Option<&str>, slice: &EndpointSlice) -> Option<Self> {
        let service = slice.metadata.labels.get(SERVICE_LABEL)?;
        let v4 = match slice.spec.address_type.as_str() {
            "IPv4" => true,
            "IPv6" => false,
            _ => return None,
        };
        // Not to know counts as ready (Kubernetes' own rule).
        let all = slice.spec.endpoints.iter();
        let endpoints: Vec<_> = all
            .filter(|e| e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true))
            .collect();
        Some(Self {
            service: format!("{}/{service}", namespace.unwrap_or_default()),
            v4,
            ready: !endpoints.is_empty(),
            nodes: endpoints
                .into_iter()
                .filter_map(|e| e.node_name.clone())
                .collect(),
        })
    }
}

/// All ranges of service addresses. Routes inside them are for routers outside; the nodes' kernels do without,
/// because kube-proxy takes such packets on every node.
pub(super) fn ranges(configuration: &BGPConfigurationSpec) -> impl Iterator<Item = Prefix> {
    let lists = [
        &configuration.service_cluster_ips,
        &configuration.service_external_ips,
        &configuration.service_load_balancer_ips,
    ];
    lists.into_iter().flatten().filter_map(|r| prefix(&r.cidr))
}

fn is_single(cidr: &Cidr) -> bool {
    prefix(cidr).is_some_and(|p| p.len() == p.family().max_prefix_len())
}

fn host(address: IpAddr) -> Option<Prefix> {
    prefix(&Cidr::host(address))
}

/// Where a service has ready endpoints, by family (IPv4 first).
#[derive(Debug, Clone, Copy, Default)]
struct Endpoints {
    here: [bool; 2],
    anywhere: [bool; 2],
}

/// The same for all services that have slices.
fn endpoints<'a>(resources: &'a Resources, node: &str) -> BTreeMap<&'a str, Endpoints> {
    let mut out: BTreeMap<&str, Endpoints> = BTreeMap::new();
    for slice in resources.slices.values() {
        let family = usize::from(!slice.v4);
        let endpoints = out.entry(&slice.service).or_default();
        endpoints.here[family] |= slice.nodes.contains(node);
        endpoints.anywhere[family] |= slice.ready;
    }
    out
}

/// What this node announces: ranges as a whole and single addresses.
pub(super) fn announced(resources: &Resources, node: &str) -> BTreeSet<Prefix> {
    let mut out = BTreeSet::new();
    let configuration = resources.configuration();
    let excluded = resources
        .nodes
        .get(node)
        .and_then(|n| n.labels.get(EXCLUDE_LABEL));
    if excluded.is_some_and(|value| value == "true") || ranges(&configuration).next().is_none() {
        return out;
    }
    let aggregated = configuration.service_load_balancer_aggregation != Some(Toggle::Disabled);
    let cluster = &configuration.service_cluster_ips;
    let external = &configuration.service_external_ips;
    let balancer = &configuration.service_load_balancer_ips;
    let whole = |list: &[ServiceCidr]| -> Vec<Prefix> {
        let several = list.iter().filter(|r| !is_single(&r.cidr));
        several.filter_map(|r| prefix(&r.cidr)).collect()
    };
    out.extend(cluster.iter().filter_map(|r| prefix(&r.cidr)));
    out.extend(whole(external));
    if aggregated {
        out.extend(whole(balancer));
    }
    let endpoints = endpoints(resources, node);
    for (name, service) in &resources.services {
        let endpoints = endpoints.get(name.as_str()).copied().unwrap_or_default();
        let here = |a: &IpAddr| service.local && endpoints.here[usize::from(a.is_ipv6())];
        let within = |list: &[ServiceCidr], a: &IpAddr| -> Option<bool> {
            let around = list.iter().filter(|r| r.cidr.contains(*a));
            around.map(|r| is_single(&r.cidr)).reduce(|x, y| x || y)
        };
        let clusters = service
            .cluster
            .iter()
            .filter(|a| !cluster.is_empty() && here(a));
        let externals = service.external.iter().filter(|a| {
            within(external, a).is_some_and(|single| here(a) || (single && !service.local))
        });
        let balancers = service.balancer.iter().filter(|a| {
            within(balancer, a).is_some_and(|single| {
                let anywhere = !aggregated && endpoints.anywhere[usize::from(a.is_ipv6())];
                here(a) || (!service.local && (single || anywhere))
            })
        });
        out.extend(
            clusters
                .chain(externals)
                .chain(balancers)
                .filter_map(|a| host(*a)),
        );
    }
    out
}
