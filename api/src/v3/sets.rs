//! NetworkSet and GlobalNetworkSet.

use serde::{Deserialize, Serialize};

use crate::Net;

/// Addresses that selectors of one namespace can pick by the set's labels.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkSetSpec {
    /// The addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<Net>,
}

/// Addresses that selectors can pick by the set's labels.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GlobalNetworkSetSpec {
    /// The addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<Net>,
}
