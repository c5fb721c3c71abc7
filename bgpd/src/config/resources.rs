//! The resources that a node's speaker depends on, reduced to what BGP asks of them.
//!
//! Objects that only matter to other nodes are dropped on arrival (workload endpoints), or kept as the few
//! facts that are asked for (endpoint slices), so that memory grows with the node and the services, not with
//! the pods of the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use cali_api::kubernetes::{LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_SERVICE_ACCOUNT};
use cali_api::update::Update;
use cali_api::v3::{
    BGPConfigurationSpec, BGPFilterSpec, BGPPeerSpec, BlockAffinitySpec, IPPoolSpec, NodeSpec,
    WorkloadEndpoint,
};
use cali_api::{AnyResource, Kind, StringMap};

use super::services::{ServiceView, SliceView};

/// The kinds that a node's speaker is configured by.
pub const KINDS: [Kind; 9] = [
    Kind::BGPConfiguration,
    Kind::BGPPeer,
    Kind::BGPFilter,
    Kind::Node,
    Kind::IPPool,
    Kind::BlockAffinity,
    Kind::K8sService,
    Kind::K8sEndpointSlice,
    Kind::WorkloadEndpoint,
];

/// A node, as far as BGP is concerned.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NodeView {
    pub(crate) labels: StringMap,
    pub(crate) spec: NodeSpec,
}

impl NodeView {
    fn bgp(&self) -> Option<&cali_api::v3::NodeBGPSpec> {
        self.spec.bgp.as_ref()
    }

    /// The node's own addresses, IPv4 first.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        [self.spec.ipv4(), self.spec.ipv6()]
            .into_iter()
            .flatten()
            .map(|net| net.ip())
    }

    pub(crate) fn address(&self, v4: bool) -> Option<IpAddr> {
        self.addresses().find(|a| a.is_ipv4() == v4)
    }

    pub(crate) fn asn(&self) -> Option<u32> {
        Some(self.bgp()?.as_number?.0)
    }

    pub(crate) fn cluster_id(&self) -> Option<Ipv4Addr> {
        self.bgp()?.route_reflector_cluster_id
    }
}

/// A workload of a node, as far as it can be a BGP peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WorkloadView {
    pub(crate) node: String,
    pub(crate) labels: StringMap,
    pub(crate) addresses: Vec<IpAddr>,
}

impl WorkloadView {
    fn of(namespace: Option<&str>, endpoint: &WorkloadEndpoint) -> Self {
        let mut labels = endpoint.metadata.labels.clone();
        let known = [
            (LABEL_NAMESPACE, namespace.unwrap_or_default()),
            (LABEL_ORCHESTRATOR, &endpoint.spec.orchestrator),
            (LABEL_SERVICE_ACCOUNT, &endpoint.spec.service_account_name),
        ];
        for (label, value) in known.into_iter().filter(|(_, value)| !value.is_empty()) {
            labels.insert(label.to_owned(), value.to_owned());
        }
        let networks = endpoint.spec.ip_networks.iter();
        Self {
            node: endpoint.spec.node.clone(),
            labels,
            addresses: networks.map(cali_api::Cidr::addr).collect(),
        }
    }
}

/// All resources that matter, kept up to date from the update stream.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resources {
    /// Only workloads of this node are kept; all of them where it is empty.
    node: String,
    pub(crate) nodes: BTreeMap<String, NodeView>,
    pub(crate) configurations: BTreeMap<String, BGPConfigurationSpec>,
    pub(crate) peers: BTreeMap<String, BGPPeerSpec>,
    pub(crate) filters: BTreeMap<String, BGPFilterSpec>,
    pub(crate) pools: BTreeMap<String, IPPoolSpec>,
    pub(crate) affinities: BTreeMap<String, BlockAffinitySpec>,
    pub(crate) services: BTreeMap<String, ServiceView>,
    pub(crate) slices: BTreeMap<String, SliceView>,
    pub(crate) workloads: BTreeMap<String, WorkloadView>,
}

/// Whether anything is different now.
fn put<T: PartialEq>(map: &mut BTreeMap<String, T>, name: String, value: Option<T>) -> bool {
    match value {
        Some(value) if map.get(&name) == Some(&value) => false,
        Some(value) => {
            map.insert(name, value);
            true
        }
        None => map.remove(&name).is_some(),
    }
}

impl Resources {
    /// Nothing yet; of workloads, those of this node will be kept.
    #[must_use]
    pub fn of_node(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            ..Self::default()
        }
    }

    /// Takes a change; whether it matters. Kinds outside [`KINDS`] are ignored.
    pub fn apply(&mut self, update: &Update) -> bool {
        let namespace = update.key.namespace.as_deref();
        let name = match namespace {
            Some(namespace) => format!("{namespace}/{}", update.key.name),
            None => update.key.name.to_string(),
        };
        let value = update.value.as_deref();
        macro_rules! spec {
            ($variant:ident) => {
                match value {
                    Some(AnyResource::$variant(resource)) => Some(resource.spec.clone()),
                    _ => None,
                }
            };
        }
        match update.key.kind {
            Kind::Node => {
                let node = match value {
                    Some(AnyResource::Node(node)) => Some(NodeView {
                        labels: node.metadata.labels.clone(),
                        spec: node.spec.clone(),
                    }),
                    _ => None,
                };
                put(&mut self.nodes, name, node)
            }
            Kind::BGPConfiguration => put(&mut self.configurations, name, spec!(BGPConfiguration)),
            Kind::BGPPeer => put(&mut self.peers, name, spec!(BGPPeer)),
            Kind::BGPFilter => put(&mut self.filters, name, spec!(BGPFilter)),
            Kind::IPPool => put(&mut self.pools, name, spec!(IPPool)),
            Kind::BlockAffinity => put(&mut self.affinities, name, spec!(BlockAffinity)),
            Kind::K8sService => {
                let service = match value {
                    Some(AnyResource::K8sService(service)) => ServiceView::of(service),
                    _ => None,
                };
                put(&mut self.services, name, service)
            }
            Kind::K8sEndpointSlice => {
                let slice = match value {
                    Some(AnyResource::K8sEndpointSlice(slice)) => SliceView::of(namespace, slice),
                    _ => None,
                };
                put(&mut self.slices, name, slice)
            }
            Kind::WorkloadEndpoint => {
                let workload = match value {
                    Some(AnyResource::WorkloadEndpoint(endpoint))
                        if self.node.is_empty() || endpoint.spec.node == self.node =>
                    {
                        Some(WorkloadView::of(namespace, endpoint))
                    }
                    _ => None,
                };
                put(&mut self.workloads, name, workload)
            }
            _ => false,
        }
    }

    /// The cluster's settings.
    pub(crate) fn configuration(&self) -> BGPConfigurationSpec {
        self.configurations
            .get("default")
            .cloned()
            .unwrap_or_default()
    }

    /// The settings of one node, which count before the cluster's; only some fields may be there.
    pub(crate) fn node_configuration(&self, node: &str) -> Option<&BGPConfigurationSpec> {
        self.configurations.get(&format!("node.{node}"))
    }

    /// The cluster's listen port, or the node's own.
    pub(crate) fn listen_port(&self, node: &str) -> u16 {
        self.node_configuration(node)
            .and_then(|c| c.listen_port)
            .unwrap_or_else(|| self.configuration().port())
    }

    /// How much the log of a node's speaker is to say (`logSeverityScreen`), if that is set.
    #[must_use]
    pub fn log_level(&self, node: &str) -> Option<cali_api::v3::LogLevel> {
        self.node_configuration(node)
            .and_then(|c| c.log_severity_screen)
            .or(self.configuration().log_severity_screen)
    }

    /// The names of secrets that peers of any node refer to.
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<(String, String)> {
        let mesh = self.configuration().node_mesh_password;
        let peers = self.peers.values().filter_map(|p| p.password.clone());
        let selectors = mesh
            .into_iter()
            .chain(peers)
            .filter_map(|p| p.secret_key_ref);
        selectors.map(|s| (s.name, s.key)).collect()
    }
}
