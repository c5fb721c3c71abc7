//! What the cluster says about users of addresses: nodes, pods, endpoints. Pure values, and the reading of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_api::v3::WorkloadEndpointSpec;
use cali_api::{AnyResource, Key, Kind, kubernetes};
use cali_datastore::{Datastore, Error as StoreError, List};
use cali_ipam::names;

use crate::error::Error;

/// A pod's full name: namespace and name.
pub type PodName = (String, String);

/// A node that exists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node says that it keeps a journal of its addresses.
    pub keeps_journal: bool,
    /// Addresses of its tunnel devices, as published.
    pub tunnels: BTreeSet<IpAddr>,
}

/// A pod that exists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Where it is to run.
    pub node: Option<String>,
    /// Its addresses; none before it got some.
    pub addresses: BTreeSet<IpAddr>,
    /// It has ended and will not use an address again.
    pub finished: bool,
    /// It shares its node's addresses.
    pub host_network: bool,
}

/// Who there is in the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The nodes.
    pub nodes: BTreeMap<String, NodeFacts>,
    /// The pods.
    pub pods: BTreeMap<PodName, PodFacts>,
    /// Addresses of workload endpoints, with the endpoint.
    pub endpoints: BTreeMap<IpAddr, String>,
    /// What exists and cannot be read, so that its addresses are unknown. Nothing is collected meanwhile.
    pub unreadable: Vec<String>,
}

impl Facts {
    /// Reads everything. To be called after the blocks were read: whoever got an address has existed before.
    pub async fn read(store: &dyn Datastore) -> Result<Self, Error> {
        let mut facts = Self::default();
        for kind in [
            Kind::Node,
            Kind::K8sNode,
            Kind::K8sPod,
            Kind::WorkloadEndpoint,
        ] {
            let list = store
                .list(kind, None)
                .await
                .map_err(Error::datastore(format!("list {}", kind.plural())))?;
            facts.add(&list);
        }
        Ok(facts)
    }

    /// Reads what concerns one node and one pod only.
    pub async fn read_some(
        store: &dyn Datastore,
        node: Option<&str>,
        pod: Option<&PodName>,
    ) -> Result<Self, Error> {
        let mut keys = Vec::new();
        if let Some(node) = node {
            keys.extend([Kind::Node, Kind::K8sNode].map(|kind| Key::cluster(kind, node)));
        }
        if let Some((namespace, name)) = pod {
            keys.push(Key::namespaced(
                Kind::K8sPod,
                namespace.as_str(),
                name.as_str(),
            ));
            if let Some(node) = node {
                let endpoint = kubernetes::workload_endpoint_name(node, name);
                keys.push(Key::namespaced(
                    Kind::WorkloadEndpoint,
                    namespace.as_str(),
                    endpoint,
                ));
            }
        }
        let mut facts = Self::default();
        for key in keys {
            match store.get(&key).await {
                Ok(found) => facts.add_object(&found.object),
                Err(StoreError::NotFound { .. }) => {}
                Err(StoreError::Undecodable { key, .. }) => facts.add_unreadable(&key),
                Err(source) => return Err(Error::datastore(format!("read {key}"))(source)),
            }
        }
        Ok(facts)
    }

    fn add(&mut self, list: &List) {
        for item in &list.items {
            self.add_object(&item.object);
        }
        for item in &list.undecodable {
            self.add_unreadable(&item.key);
        }
    }

    /// Takes an object into account.
    pub fn add_object(&mut self, object: &AnyResource) {
        match object {
            AnyResource::Node(node) => {
                let known = self.node(&node.metadata.name);
                known.keeps_journal |= node
                    .metadata
                    .annotations
                    .contains_key(names::JOURNAL_ANNOTATION);
                let spec = &node.spec;
                let bgp = spec.bgp.as_ref();
                let wireguard = spec.wireguard.as_ref();
                known.tunnels.extend(
                    [
                        bgp.and_then(|b| b.ipv4_ipip_tunnel_addr).map(IpAddr::from),
                        spec.ipv4_vxlan_tunnel_addr.map(IpAddr::from),
                        spec.ipv6_vxlan_tunnel_addr.map(IpAddr::from),
                        wireguard
                            .and_then(|w| w.interface_ipv4_address)
                            .map(IpAddr::from),
                        wireguard
                            .and_then(|w| w.interface_ipv6_address)
                            .map(IpAddr::from),
                    ]
                    .into_iter()
                    .flatten(),
                );
            }
            AnyResource::K8sNode(node) => {
                self.node(&node.metadata.name).keeps_journal |= node
                    .metadata
                    .annotations
                    .contains_key(names::JOURNAL_ANNOTATION);
            }
            AnyResource::K8sPod(pod) => {
                let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
                let mut facts = PodFacts {
                    node: pod.spec.node_name.clone().filter(|n| !n.is_empty()),
                    finished: matches!(phase, Some("Succeeded" | "Failed")),
                    host_network: pod.spec.host_network == Some(true),
                    ..PodFacts::default()
                };
                let mut problems = Vec::new();
                if let Some(endpoint) = kubernetes::workload_endpoint(pod, &mut problems) {
                    facts
                        .addresses
                        .extend(endpoint.spec.ip_networks.iter().map(cali_api::Cidr::addr));
                }
                if !problems.is_empty() {
                    // An address that cannot be read may be any.
                    facts.addresses.clear();
                }
                self.pods.insert(pod_name(&pod.key()), facts);
            }
            AnyResource::WorkloadEndpoint(endpoint) => {
                let spec: &WorkloadEndpointSpec = &endpoint.spec;
                let name = endpoint.key().to_string();
                self.endpoints.extend(
                    spec.ip_networks
                        .iter()
                        .map(|network| (network.addr(), name.clone())),
                );
            }
            _ => {}
        }
    }

    fn node(&mut self, name: &str) -> &mut NodeFacts {
        self.nodes.entry(name.to_owned()).or_default()
    }

    /// What exists and cannot be read counts as there. A node's or pod's name is enough to keep its addresses.
    fn add_unreadable(&mut self, key: &Key) {
        match key.kind {
            Kind::Node | Kind::K8sNode => self.node(&key.name).keeps_journal = true,
            Kind::K8sPod => {
                self.pods.entry(pod_name(key)).or_default();
            }
            _ => {}
        }
        self.unreadable.push(key.to_string());
    }

    /// Live pods by their addresses. Pods of the host's network are left out.
    pub fn pods_by_address(&self) -> BTreeMap<IpAddr, &PodName> {
        let live = self
            .pods
            .iter()
            .filter(|(_, pod)| !pod.finished && !pod.host_network);
        live.flat_map(|(name, pod)| pod.addresses.iter().map(move |a| (*a, name)))
            .collect()
    }
}

fn pod_name(key: &Key) -> PodName {
    let namespace = key.namespace.as_deref().unwrap_or("default");
    (namespace.to_owned(), key.name.to_string())
}
