//! Calico's Node as a view of Kubernetes' Node: written as annotations. Pure; reading is `cali_api::kubernetes::node`.

use std::fmt::Display;
use std::time::SystemTime;

use cali_api::kubernetes::{self, annotation};
use cali_api::{AnyResource, StringMap, v3};
use serde_json::{Map, Value, json};

use crate::timestamp;

const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

/// The annotations by which a Node's fields are stored.
fn annotations(node: &v3::Node) -> Vec<(String, Option<String>)> {
    fn text(value: Option<impl Display>) -> Option<String> {
        value
            .map(|value| value.to_string())
            .filter(|text| !text.is_empty())
    }
    let spec = &node.spec;
    let bgp = spec.bgp.clone().unwrap_or_default();
    let wireguard = spec.wireguard.clone().unwrap_or_default();
    let status = node.status.clone().unwrap_or_default();
    let interfaces = (!spec.interfaces.is_empty())
        .then(|| serde_json::to_string(&spec.interfaces).ok())
        .flatten();
    let fields = [
        ("ASNumber", text(bgp.as_number)),
        ("IPv4Address", text(bgp.ipv4_address)),
        ("IPv6Address", text(bgp.ipv6_address)),
        ("IPv4IPIPTunnelAddr", text(bgp.ipv4_ipip_tunnel_addr)),
        (
            "RouteReflectorClusterID",
            text(bgp.route_reflector_cluster_id),
        ),
        ("IPv4VXLANTunnelAddr", text(spec.ipv4_vxlan_tunnel_addr)),
        ("VXLANTunnelMACAddr", text(spec.vxlan_tunnel_mac_addr)),
        ("IPv6VXLANTunnelAddr", text(spec.ipv6_vxlan_tunnel_addr)),
        ("VXLANTunnelMACAddrV6", text(spec.vxlan_tunnel_mac_addr_v6)),
        (
            "IPv4WireguardInterfaceAddr",
            text(wireguard.interface_ipv4_address),
        ),
        (
            "IPv6WireguardInterfaceAddr",
            text(wireguard.interface_ipv6_address),
        ),
        (
            "WireguardPublicKey",
            text(Some(&status.wireguard_public_key)),
        ),
        (
            "WireguardPublicKeyV6",
            text(Some(&status.wireguard_public_key_v6)),
        ),
        ("Interfaces", interfaces),
    ];
    fields
        .into_iter()
        .map(|(name, value)| (format!("{}{name}", annotation::NODE_PREFIX), value))
        .collect()
}

/// Calico's view of a node. Annotations of ours that are no field of the resource stay annotations.
pub(super) fn view(origin: &kubernetes::Node) -> AnyResource {
    let mut node = kubernetes::node(origin, &mut Vec::new());
    let fields: Vec<String> = annotations(&node)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let others: StringMap = origin
        .metadata
        .annotations
        .iter()
        .filter(|(name, _)| name.starts_with(annotation::NODE_PREFIX) && !fields.contains(name))
        .filter(|(name, _)| !name.ends_with("/kube-labels"))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    node.metadata.annotations = others;
    node.into()
}

/// The patch of Kubernetes' Node that stores Calico's; `None` if it says so already. Labels are Kubernetes' own.
pub(super) fn patch(origin: &kubernetes::Node, node: &v3::Node) -> Option<Value> {
    let mut wanted: Map<String, Value> = Map::new();
    let present = &origin.metadata.annotations;
    let own = node
        .metadata
        .annotations
        .iter()
        .filter(|(name, _)| name.starts_with(annotation::NODE_PREFIX))
        .map(|(name, value)| (name.clone(), Some(value.clone())));
    for (name, value) in annotations(node).into_iter().chain(own) {
        if present.get(&name) != value.as_ref() {
            wanted.insert(name, value.map_or(Value::Null, Value::String));
        }
    }
    (!wanted.is_empty()).then(|| json!({"metadata": {"annotations": wanted}}))
}

/// The patch of a Node's status that says whether its network serves pods, in Calico's words; `None` if it says so.
pub(super) fn network_condition(node: &Value, serves: bool, now: SystemTime) -> Option<Value> {
    let (status, reason, message) = if serves {
        ("False", "CalicoIsUp", "Cali is running on this node")
    } else {
        ("True", "CalicoIsDown", "Cali is shutting down on this node")
    };
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    let stands = conditions.into_iter().flatten().any(|condition| {
        condition["type"] == NETWORK_UNAVAILABLE
            && condition["status"] == status
            && condition["reason"] == reason
    });
    let now = timestamp::format(now);
    (!stands).then(|| {
        json!({"status": {"conditions": [{
            "type": NETWORK_UNAVAILABLE, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }]}})
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(annotations: Value) -> kubernetes::Node {
        let value = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "n1", "labels": {"zone": "a"}, "annotations": annotations}, "spec": {}
        });
        let AnyResource::K8sNode(node) = AnyResource::from_json(value).unwrap() else {
            panic!("a node")
        };
        *node
    }

    #[test]
    fn what_is_written_is_read_again() {
        let bare = origin(json!({"other/x": "1"}));
        let AnyResource::Node(mut node) = view(&bare) else {
            panic!("a node")
        };
        let bgp = node.spec.bgp.get_or_insert_default();
        bgp.ipv4_address = "192.0.2.1/24".parse().ok();
        bgp.as_number = "64513".parse().ok();
        node.spec.ipv4_vxlan_tunnel_addr = "10.0.0.1".parse().ok();
        node.status.get_or_insert_default().wireguard_public_key = "key=".to_owned();
        node.metadata
            .annotations
            .insert("projectcalico.org/address-journal".into(), "v1".into());
        let patch = patch(&bare, &node).unwrap();
        assert_eq!(
            patch["metadata"]["annotations"],
            json!({
                "projectcalico.org/ASNumber": "64513",
                "projectcalico.org/IPv4Address": "192.0.2.1/24",
                "projectcalico.org/IPv4VXLANTunnelAddr": "10.0.0.1",
                "projectcalico.org/WireguardPublicKey": "key=",
                "projectcalico.org/address-journal": "v1",
            })
        );
        let written = origin(patch["metadata"]["annotations"].clone());
        let AnyResource::Node(read) = view(&written) else {
            panic!("a node")
        };
        assert_eq!(read.spec.bgp, node.spec.bgp);
        assert_eq!(read.metadata.annotations, node.metadata.annotations);
        assert_eq!(super::patch(&written, &read), None);
        node.spec.bgp = None;
        let removed = super::patch(&written, &node).unwrap();
        assert_eq!(
            removed["metadata"]["annotations"]["projectcalico.org/ASNumber"],
            Value::Null
        );
    }
}
