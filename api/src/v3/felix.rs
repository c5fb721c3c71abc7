//! FelixConfiguration.

use serde::{Deserialize, Serialize};

/// Settings of the dataplane for the cluster (`default`) or one node (`node.<name>`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FelixConfigurationSpec {
    /// Whether IPv6 is programmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6_support: Option<bool>,
}
