//! Kubernetes' own objects, and what they mean to Calico.
//!
//! | object | becomes |
//! |---|---|
//! | Namespace `x` | Profile `kns.x`: allows everything, passes the namespace's labels on as `pcns.` labels |
//! | ServiceAccount `x` in `ns` | Profile `ksa.ns.x`: no rules, passes its labels on as `pcsa.` labels |
//! | Pod | WorkloadEndpoint `<node>-k8s-<pod>-eth0` (dashes of the parts doubled) |
//! | Node | Node, from annotations `projectcalico.org/...` |
//! | ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy | GlobalNetworkPolicy of a fixed tier |
//! | NetworkPolicy `x` | NetworkPolicy `knp.default.x` in tier `default`, order 1000 |
//!
//! Services and EndpointSlices stay as they are.

mod cluster_policy;
mod names;
mod native;
mod node;
mod pod;
mod policy;
mod profile;
mod quantity;

pub use cluster_policy::*;
pub use names::*;
pub use native::*;
pub use node::node;
pub use pod::{address_annotations, interface_name, workload_endpoint, workload_endpoint_name};
pub use policy::{network_policy, staged_network_policy};
pub use profile::{
    DEFAULT_ALLOW_PROFILE, default_allow_profile, namespace_profile, service_account_profile,
};

use crate::AnyResource;

/// What an object means to Calico.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversion {
    /// The objects that stand for it.
    pub resources: Vec<AnyResource>,
    /// Parts of it that could not be used, for the log. What grants access is left out; nothing is
    /// granted instead.
    pub problems: Vec<String>,
}

/// Converts an object. What needs no conversion is returned as it is. A pod without an address,
/// one that has finished, and one in the host's network mean nothing to Calico.
#[must_use]
pub fn convert(object: &AnyResource) -> Conversion {
    let mut problems = Vec::new();
    let resources: Vec<AnyResource> = match object {
        AnyResource::K8sNamespace(namespace) => vec![namespace_profile(namespace).into()],
        AnyResource::K8sServiceAccount(account) => vec![service_account_profile(account).into()],
        AnyResource::K8sNode(kubernetes_node) => vec![node(kubernetes_node, &mut problems).into()],
        AnyResource::K8sPod(pod) => workload_endpoint(pod, &mut problems)
            .filter(|endpoint| !endpoint.spec.ip_networks.is_empty())
            .map(Into::into)
            .into_iter()
            .collect(),
        AnyResource::K8sNetworkPolicy(policy) => network_policy(policy, &mut problems)
            .map(Into::into)
            .into_iter()
            .collect(),
        AnyResource::K8sClusterNetworkPolicy(policy) => {
            global(cluster_network_policy(policy, &mut problems))
        }
        AnyResource::K8sAdminNetworkPolicy(policy) => {
            global(admin_network_policy(policy, &mut problems))
        }
        AnyResource::K8sBaselineAdminNetworkPolicy(policy) => {
            global(baseline_admin_network_policy(policy, &mut problems))
        }
        other => vec![other.clone()],
    };
    Conversion {
        resources,
        problems,
    }
}

fn global(policy: Option<crate::v3::GlobalNetworkPolicy>) -> Vec<AnyResource> {
    policy.map(Into::into).into_iter().collect()
}

/// [`convert`] without the problems.
#[must_use]
pub fn to_calico(object: &AnyResource) -> Vec<AnyResource> {
    convert(object).resources
}

/// Metadata of a converted object: same origin, other name.
fn derived_metadata(origin: &crate::ObjectMeta, name: String) -> crate::ObjectMeta {
    crate::ObjectMeta {
        name,
        uid: origin.uid.clone(),
        resource_version: origin.resource_version.clone(),
        creation_timestamp: origin.creation_timestamp.clone(),
        ..crate::ObjectMeta::default()
    }
}

/// The entries of an annotation that is a JSON list of texts.
fn json_list<T: std::str::FromStr<Err: std::fmt::Display>>(
    annotations: &crate::StringMap,
    name: &str,
    problems: &mut Vec<String>,
) -> Vec<T> {
    let Some(text) = annotations.get(name).filter(|text| !text.trim().is_empty()) else {
        return Vec::new();
    };
    let entries: Vec<String> = match serde_json::from_str(text) {
        Ok(entries) => entries,
        Err(error) => {
            problems.push(format!(
                "annotation {name}: not a JSON list of texts: {error}"
            ));
            return Vec::new();
        }
    };
    let mut values = Vec::new();
    for entry in entries {
        match entry.parse() {
            Ok(value) => values.push(value),
            Err(error) => problems.push(format!("annotation {name}: {entry:?}: {error}")),
        }
    }
    values
}

#[cfg(test)]
mod tests;
