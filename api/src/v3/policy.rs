//! The policy kinds and their staged forms.

use k8s_openapi::api::networking::v1::{NetworkPolicyEgressRule, NetworkPolicyIngressRule};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};

use super::{Order, PerformanceHint, PolicyType, Rule, StagedAction};

/// The tier of policies that name none.
pub const DEFAULT_TIER: &str = "default";

/// The directions to which a policy applies: those it lists, or else those that it has rules for,
/// where a policy without egress rules applies to ingress.
fn effective_types(types: &[PolicyType], ingress: &[Rule], egress: &[Rule]) -> (bool, bool) {
    if types.is_empty() {
        (egress.is_empty() || !ingress.is_empty(), !egress.is_empty())
    } else {
        (
            types.contains(&PolicyType::Ingress),
            types.contains(&PolicyType::Egress),
        )
    }
}

macro_rules! policy_methods {
    ($spec:ty) => {
        impl $spec {
            /// The tier to which the policy belongs.
            #[must_use]
            pub fn tier_name(&self) -> &str {
                if self.tier.is_empty() {
                    DEFAULT_TIER
                } else {
                    &self.tier
                }
            }

            /// Whether the policy applies to traffic towards its endpoints.
            #[must_use]
            pub fn applies_to_ingress(&self) -> bool {
                effective_types(&self.types, &self.ingress, &self.egress).0
            }

            /// Whether the policy applies to traffic from its endpoints.
            #[must_use]
            pub fn applies_to_egress(&self) -> bool {
                effective_types(&self.types, &self.ingress, &self.egress).1
            }
        }
    };
}

policy_methods!(NetworkPolicySpec);
policy_methods!(GlobalNetworkPolicySpec);
policy_methods!(StagedNetworkPolicySpec);
policy_methods!(StagedGlobalNetworkPolicySpec);

/// A policy for endpoints of one namespace.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkPolicySpec {
    /// The tier; empty means `default`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tier: String,
    /// Place within the tier; absent means last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Rules for traffic to the endpoints.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<Rule>,
    /// Rules for traffic from the endpoints.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Rule>,
    /// The endpoints to which the policy applies; empty means all.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// The directions to which it applies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<PolicyType>,
    /// Further restricts the endpoints by their service account's labels.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service_account_selector: String,
    /// Hints for the dataplane.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub performance_hints: Vec<PerformanceHint>,
}

/// A policy for endpoints of all namespaces, and host endpoints.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GlobalNetworkPolicySpec {
    /// The tier; empty means `default`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tier: String,
    /// Place within the tier; absent means last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// Rules for traffic to the endpoints.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<Rule>,
    /// Rules for traffic from the endpoints.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Rule>,
    /// The endpoints to which the policy applies; empty means all.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// The directions to which it applies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<PolicyType>,
    /// Before connection tracking; needs `applyOnForward`.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub do_not_track: bool,
    /// Before destination NAT; needs `applyOnForward`.
    #[serde(rename = "preDNAT", skip_serializing_if = "super::is_zero")]
    pub pre_dnat: bool,
    /// Also for traffic that a host endpoint forwards.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub apply_on_forward: bool,
    /// Further restricts the endpoints by their service account's labels.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service_account_selector: String,
    /// Further restricts the endpoints by their namespace's labels.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace_selector: String,
    /// Hints for the dataplane.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub performance_hints: Vec<PerformanceHint>,
}

/// A NetworkPolicy that is only reported on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct StagedNetworkPolicySpec {
    /// What committing it would do; absent means `Set`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staged_action: Option<StagedAction>,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tier: String,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<Rule>,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Rule>,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<PolicyType>,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service_account_selector: String,
    /// As in [`NetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub performance_hints: Vec<PerformanceHint>,
}

impl StagedNetworkPolicySpec {
    /// What committing it would do, and the policy that would then be in force.
    #[must_use]
    pub fn committed(&self) -> (StagedAction, NetworkPolicySpec) {
        let policy = NetworkPolicySpec {
            tier: self.tier.clone(),
            order: self.order,
            ingress: self.ingress.clone(),
            egress: self.egress.clone(),
            selector: self.selector.clone(),
            types: self.types.clone(),
            service_account_selector: self.service_account_selector.clone(),
            performance_hints: self.performance_hints.clone(),
        };
        (self.staged_action.unwrap_or(StagedAction::Set), policy)
    }
}

/// A GlobalNetworkPolicy that is only reported on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct StagedGlobalNetworkPolicySpec {
    /// What committing it would do; absent means `Set`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staged_action: Option<StagedAction>,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tier: String,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<Rule>,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Rule>,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<PolicyType>,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "super::is_zero")]
    pub do_not_track: bool,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(rename = "preDNAT", skip_serializing_if = "super::is_zero")]
    pub pre_dnat: bool,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "super::is_zero")]
    pub apply_on_forward: bool,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service_account_selector: String,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace_selector: String,
    /// As in [`GlobalNetworkPolicySpec`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub performance_hints: Vec<PerformanceHint>,
}

impl StagedGlobalNetworkPolicySpec {
    /// What committing it would do, and the policy that would then be in force.
    #[must_use]
    pub fn committed(&self) -> (StagedAction, GlobalNetworkPolicySpec) {
        let policy = GlobalNetworkPolicySpec {
            tier: self.tier.clone(),
            order: self.order,
            ingress: self.ingress.clone(),
            egress: self.egress.clone(),
            selector: self.selector.clone(),
            types: self.types.clone(),
            do_not_track: self.do_not_track,
            pre_dnat: self.pre_dnat,
            apply_on_forward: self.apply_on_forward,
            service_account_selector: self.service_account_selector.clone(),
            namespace_selector: self.namespace_selector.clone(),
            performance_hints: self.performance_hints.clone(),
        };
        (self.staged_action.unwrap_or(StagedAction::Set), policy)
    }
}

/// A Kubernetes NetworkPolicy that is only reported on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct StagedKubernetesNetworkPolicySpec {
    /// What committing it would do; absent means `Set`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staged_action: Option<StagedAction>,
    /// The pods to which the policy applies.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub pod_selector: LabelSelector,
    /// Rules for traffic to the pods.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<NetworkPolicyIngressRule>,
    /// Rules for traffic from the pods.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<NetworkPolicyEgressRule>,
    /// The directions to which it applies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policy_types: Vec<PolicyType>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v3::Action;

    #[test]
    fn directions_follow_from_the_rules_unless_listed() {
        let rules = || vec![Rule::new(Action::Allow)];
        for (types, ingress, egress, expected) in [
            (vec![], vec![], vec![], (true, false)),
            (vec![], rules(), vec![], (true, false)),
            (vec![], vec![], rules(), (false, true)),
            (vec![], rules(), rules(), (true, true)),
            (vec![PolicyType::Egress], rules(), vec![], (false, true)),
        ] {
            let spec = NetworkPolicySpec {
                types,
                ingress,
                egress,
                ..Default::default()
            };
            assert_eq!(
                (spec.applies_to_ingress(), spec.applies_to_egress()),
                expected,
                "{spec:?}"
            );
        }
    }
}
