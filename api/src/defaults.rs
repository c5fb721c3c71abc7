//! What an object means where it is silent.

use crate::AnyResource;
use crate::selector::Selector;
use crate::v3::{
    AllowedUse, AssignmentMode, BGPPeerSpec, DEFAULT_TIER, EncapMode, IPPoolSpec, PolicyType,
    ReversePeering, Rule, SourceAddress, TierAction,
};

fn policy(tier: &mut String, types: &mut Vec<PolicyType>, ingress: &[Rule], egress: &[Rule]) {
    if tier.is_empty() {
        DEFAULT_TIER.clone_into(tier);
    }
    if types.is_empty() {
        if egress.is_empty() || !ingress.is_empty() {
            types.push(PolicyType::Ingress);
        }
        if !egress.is_empty() {
            types.push(PolicyType::Egress);
        }
    }
}

fn pool(spec: &mut IPPoolSpec) {
    spec.block_size
        .get_or_insert_with(|| IPPoolSpec::default_block_size(&spec.cidr));
    spec.ipip_mode.get_or_insert(EncapMode::Never);
    spec.vxlan_mode.get_or_insert(EncapMode::Never);
    spec.assignment_mode
        .get_or_insert(AssignmentMode::Automatic);
    if spec.allowed_uses.is_empty() {
        spec.allowed_uses = vec![AllowedUse::Workload, AllowedUse::Tunnel];
    }
    if spec.node_selector.is_empty() {
        spec.node_selector = Selector::all().to_string();
    }
}

fn peer(spec: &mut BGPPeerSpec) {
    spec.source_address.get_or_insert(SourceAddress::UseNodeIP);
    if !spec.peer_selector.is_empty() {
        spec.reverse_peering.get_or_insert(ReversePeering::Auto);
    }
}

/// Fills in what Calico writes when an object is created: tier and types of policies, modes and
/// block size of pools, and the like. Doing it twice changes nothing more.
pub fn defaults(object: &mut AnyResource) {
    let kind = object.kind();
    if kind.is_namespaced() && object.metadata().namespace.is_none() {
        object.metadata_mut().namespace = Some("default".to_owned());
    }
    match object {
        AnyResource::NetworkPolicy(object) => {
            let spec = &mut object.spec;
            policy(&mut spec.tier, &mut spec.types, &spec.ingress, &spec.egress);
        }
        AnyResource::GlobalNetworkPolicy(object) => {
            let spec = &mut object.spec;
            policy(&mut spec.tier, &mut spec.types, &spec.ingress, &spec.egress);
        }
        AnyResource::StagedNetworkPolicy(object) => {
            let spec = &mut object.spec;
            policy(&mut spec.tier, &mut spec.types, &spec.ingress, &spec.egress);
        }
        AnyResource::StagedGlobalNetworkPolicy(object) => {
            let spec = &mut object.spec;
            policy(&mut spec.tier, &mut spec.types, &spec.ingress, &spec.egress);
        }
        AnyResource::IPPool(object) => pool(&mut object.spec),
        AnyResource::BGPPeer(object) => peer(&mut object.spec),
        AnyResource::Tier(object) => {
            object.spec.default_action.get_or_insert(TierAction::Deny);
        }
        AnyResource::K8sNetworkPolicy(object) => {
            let spec = &mut object.spec;
            if spec.policy_types.as_ref().is_none_or(Vec::is_empty) {
                let egress = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
                let types = if egress {
                    &["Ingress", "Egress"][..]
                } else {
                    &["Ingress"]
                };
                spec.policy_types = Some(types.iter().map(|text| (*text).to_owned()).collect());
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn defaulted(json: serde_json::Value) -> serde_json::Value {
        let mut object = AnyResource::from_json(json).unwrap();
        defaults(&mut object);
        let once = object.to_json();
        defaults(&mut object);
        assert_eq!(object.to_json(), once, "a second time changes nothing");
        once
    }

    #[test]
    fn a_pool_states_everything_that_was_implied() {
        let pool = defaulted(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "p"},
            "spec": {"cidr": "fd00::/64", "vxlanMode": "CrossSubnet"}
        }));
        assert_eq!(
            pool["spec"],
            json!({
                "cidr": "fd00::/64", "vxlanMode": "CrossSubnet", "ipipMode": "Never", "blockSize": 122,
                "nodeSelector": "all()", "allowedUses": ["Workload", "Tunnel"], "assignmentMode": "Automatic"
            })
        );
    }

    #[test]
    fn a_policy_states_tier_types_and_namespace() {
        let policy = defaulted(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy", "metadata": {"name": "p"},
            "spec": {"egress": [{"action": "Deny"}]}
        }));
        assert_eq!(policy["metadata"]["namespace"], "default");
        assert_eq!(
            policy["spec"],
            json!({"tier": "default", "types": ["Egress"], "egress": [{"action": "Deny"}]})
        );
    }

    #[test]
    fn a_kubernetes_policy_gets_the_types_that_an_api_server_gives_it() {
        let policy = defaulted(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "n"},
            "spec": {"podSelector": {}, "egress": [{}]}
        }));
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
    }
}
