//! IPPool.

use serde::{Deserialize, Serialize};

use crate::Cidr;
use crate::text::text_enum;

text_enum! {
    /// When packets between nodes are encapsulated.
    pub enum EncapMode {
        /// Not at all.
        Never = "Never",
        /// Between all nodes.
        Always = "Always",
        /// Between nodes of different subnets.
        CrossSubnet = "CrossSubnet",
    }
}

text_enum! {
    /// For what a pool's addresses may be used.
    pub enum AllowedUse { Workload = "Workload", Tunnel = "Tunnel", LoadBalancer = "LoadBalancer" }
}

text_enum! {
    /// Whether addresses are given out without being asked for by pool.
    pub enum AssignmentMode { Automatic = "Automatic", Manual = "Manual" }
}

/// A range of addresses for workloads, and how they are reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IPPoolSpec {
    /// The range; immutable.
    pub cidr: Cidr,
    /// When VXLAN is used; exclusive with IPIP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vxlan_mode: Option<EncapMode>,
    /// When IPIP is used; IPv4 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipip_mode: Option<EncapMode>,
    /// Whether traffic that leaves the pools gets the node's address.
    #[serde(default, skip_serializing_if = "super::is_zero")]
    pub nat_outgoing: bool,
    /// Whether nothing more is given out.
    #[serde(default, skip_serializing_if = "super::is_zero")]
    pub disabled: bool,
    /// Whether the pool's routes are kept from BGP peers.
    #[serde(
        default,
        rename = "disableBGPExport",
        skip_serializing_if = "super::is_zero"
    )]
    pub disable_bgp_export: bool,
    /// Prefix length of a block; immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u8>,
    /// The nodes that may use the pool.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node_selector: String,
    /// The namespaces that may use the pool.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace_selector: String,
    /// For what the addresses may be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_uses: Vec<AllowedUse>,
    /// Whether addresses are given out without being asked for by pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_mode: Option<AssignmentMode>,
}

impl IPPoolSpec {
    /// A pool with nothing but its range set.
    #[must_use]
    pub const fn new(cidr: Cidr) -> Self {
        Self {
            cidr,
            vxlan_mode: None,
            ipip_mode: None,
            nat_outgoing: false,
            disabled: false,
            disable_bgp_export: false,
            block_size: None,
            node_selector: String::new(),
            namespace_selector: String::new(),
            allowed_uses: Vec::new(),
            assignment_mode: None,
        }
    }

    /// When VXLAN is used.
    #[must_use]
    pub fn vxlan(&self) -> EncapMode {
        self.vxlan_mode.unwrap_or(EncapMode::Never)
    }

    /// When IPIP is used.
    #[must_use]
    pub fn ipip(&self) -> EncapMode {
        self.ipip_mode.unwrap_or(EncapMode::Never)
    }

    /// The block size where none is set: /26 or /122.
    #[must_use]
    pub const fn default_block_size(cidr: &Cidr) -> u8 {
        if cidr.is_v4() { 26 } else { 122 }
    }

    /// The effective prefix length of a block.
    #[must_use]
    pub fn block_prefix_len(&self) -> u8 {
        self.block_size
            .unwrap_or_else(|| Self::default_block_size(&self.cidr))
    }

    /// Whether addresses may be used for this.
    #[must_use]
    pub fn allows(&self, allowed: AllowedUse) -> bool {
        if self.allowed_uses.is_empty() {
            allowed != AllowedUse::LoadBalancer
        } else {
            self.allowed_uses.contains(&allowed)
        }
    }

    /// Whether addresses are given out without being asked for by pool.
    #[must_use]
    pub fn is_automatic(&self) -> bool {
        self.assignment_mode != Some(AssignmentMode::Manual)
    }
}
