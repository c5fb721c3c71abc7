//! Kubernetes nodes, which carry Calico's fields in annotations.

use std::fmt::Display;
use std::str::FromStr;

use super::{Node, annotation, derived_metadata};
use crate::v3::{
    self, CALICO_NODE_IP, NodeAddress, NodeBGPSpec, NodeInterface, NodeSpec, NodeStatus,
    NodeWireguardSpec, OrchRef,
};
use crate::{Resource, StringMap};

/// The annotations of a node, with malformed ones reported.
struct Annotations<'a> {
    annotations: &'a StringMap,
    problems: &'a mut Vec<String>,
}

impl Annotations<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        let text = self
            .annotations
            .get(&format!("{}{name}", annotation::NODE_PREFIX))?;
        Some(text.as_str()).filter(|text| !text.is_empty())
    }

    fn get<T: FromStr<Err: Display>>(&mut self, name: &str) -> Option<T> {
        let text = self.text(name)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                let problem = format!(
                    "annotation {}{name}: {text:?}: {error}",
                    annotation::NODE_PREFIX
                );
                self.problems.push(problem);
                None
            }
        }
    }

    fn json<T: serde::de::DeserializeOwned + Default>(&mut self, name: &str) -> T {
        let Some(text) = self.text(name) else {
            return T::default();
        };
        serde_json::from_str(text).unwrap_or_else(|error| {
            let problem = format!("annotation {}{name}: {error}", annotation::NODE_PREFIX);
            self.problems.push(problem);
            T::default()
        })
    }
}

/// Calico's view of a Kubernetes node.
#[must_use]
pub fn node(kubernetes: &Node, problems: &mut Vec<String>) -> v3::Node {
    let origin = &kubernetes.metadata;
    let mut annotations = Annotations {
        annotations: &origin.annotations,
        problems,
    };
    let bgp = NodeBGPSpec {
        as_number: annotations.get("ASNumber"),
        ipv4_address: annotations.get("IPv4Address"),
        ipv6_address: annotations.get("IPv6Address"),
        ipv4_ipip_tunnel_addr: annotations.get("IPv4IPIPTunnelAddr"),
        route_reflector_cluster_id: annotations.get("RouteReflectorClusterID"),
    };
    let wireguard = NodeWireguardSpec {
        interface_ipv4_address: annotations.get("IPv4WireguardInterfaceAddr"),
        interface_ipv6_address: annotations.get("IPv6WireguardInterfaceAddr"),
    };

    let own = [bgp.ipv4_address, bgp.ipv6_address].into_iter().flatten();
    let mut addresses: Vec<NodeAddress> = own
        .map(|address| NodeAddress {
            address: address.to_string(),
            type_: CALICO_NODE_IP.to_owned(),
        })
        .collect();
    let reported = kubernetes
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten());
    addresses.extend(
        reported
            .filter(|address| matches!(address.type_.as_str(), "InternalIP" | "ExternalIP"))
            .map(|address| NodeAddress {
                address: address.address.clone(),
                type_: address.type_.clone(),
            }),
    );

    let spec = NodeSpec {
        bgp: (bgp != NodeBGPSpec::default()).then_some(bgp),
        ipv4_vxlan_tunnel_addr: annotations.get("IPv4VXLANTunnelAddr"),
        vxlan_tunnel_mac_addr: annotations.get("VXLANTunnelMACAddr"),
        ipv6_vxlan_tunnel_addr: annotations.get("IPv6VXLANTunnelAddr"),
        vxlan_tunnel_mac_addr_v6: annotations.get("VXLANTunnelMACAddrV6"),
        orch_refs: vec![OrchRef {
            node_name: origin.name.clone(),
            orchestrator: super::ORCHESTRATOR_KUBERNETES.to_owned(),
        }],
        wireguard: (wireguard != NodeWireguardSpec::default()).then_some(wireguard),
        addresses,
        interfaces: annotations.json::<Vec<NodeInterface>>("Interfaces"),
    };

    let mut metadata = derived_metadata(origin, origin.name.clone());
    // The copy that was current at the last start; Kubernetes' own labels win.
    metadata.labels = annotations.json("kube-labels");
    metadata.labels.extend(origin.labels.clone());

    let ranges = match (&kubernetes.spec.pod_cidrs, &kubernetes.spec.pod_cidr) {
        (Some(ranges), _) if !ranges.is_empty() => ranges.as_slice(),
        (_, Some(range)) => std::slice::from_ref(range),
        _ => &[],
    };
    let status = NodeStatus {
        wireguard_public_key: annotations
            .text("WireguardPublicKey")
            .unwrap_or_default()
            .to_owned(),
        wireguard_public_key_v6: annotations
            .text("WireguardPublicKeyV6")
            .unwrap_or_default()
            .to_owned(),
        pod_cidrs: ranges
            .iter()
            .filter_map(|range| range.parse().ok())
            .collect(),
    };
    let mut node = Resource::new(metadata, spec);
    node.status = (status != NodeStatus::default()).then_some(status);
    node
}
