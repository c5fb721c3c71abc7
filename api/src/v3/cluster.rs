//! ClusterInformation and Tier: what exists once or a few times for the whole cluster.

use serde::{Deserialize, Serialize};

use super::Order;
use crate::text::text_enum;

/// Facts about the installation, in the object `default`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClusterInformationSpec {
    /// Random identity of the cluster.
    #[serde(rename = "clusterGUID", skip_serializing_if = "String::is_empty")]
    pub cluster_guid: String,
    /// What runs here, comma separated.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cluster_type: String,
    /// Version of the installation.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub calico_version: String,
    /// `false` is the cluster-wide lock: nothing may be programmed or allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub datastore_ready: Option<bool>,
    /// Edition.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

impl ClusterInformationSpec {
    /// Whether the datastore is locked.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.datastore_ready == Some(false)
    }
}

text_enum! {
    /// What happens to traffic that a tier's policies apply to and that none of them decides.
    pub enum TierAction { Pass = "Pass", Deny = "Deny" }
}

/// A group of policies with a place in the order of evaluation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TierSpec {
    /// Place in the order; absent means last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// The verdict at the tier's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_action: Option<TierAction>,
}

impl TierSpec {
    /// The verdict at the tier's end; `Deny` unless stated.
    #[must_use]
    pub fn end_action(&self) -> TierAction {
        self.default_action.unwrap_or(TierAction::Deny)
    }
}

/// What is known about an object, as Kubernetes writes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Condition {
    /// What the condition is about.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// The generation that was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_transition_time: Option<String>,
    /// One word for programs.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// A sentence for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Status that consists of conditions only.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConditionsStatus {
    /// The conditions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
