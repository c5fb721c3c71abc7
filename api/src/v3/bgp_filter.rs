//! BGPFilter.

use serde::{Deserialize, Serialize};

use super::CommunityValue;
use crate::text::text_enum;
use crate::{Asn, Cidr};

/// Ordered rules for the routes of a peer. A route that no rule decides goes on to the built-in
/// filter.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BGPFilterSpec {
    /// IPv4 routes that we send.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub export_v4: Vec<BGPFilterRule>,
    /// IPv4 routes that we receive.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub import_v4: Vec<BGPFilterRule>,
    /// IPv6 routes that we send.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub export_v6: Vec<BGPFilterRule>,
    /// IPv6 routes that we receive.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub import_v6: Vec<BGPFilterRule>,
}

text_enum! {
    /// How a route's prefix relates to the rule's.
    pub enum MatchOperator { Equal = "Equal", NotEqual = "NotEqual", In = "In", NotIn = "NotIn" }
}

text_enum! {
    /// Where a route came from.
    pub enum FilterSource { RemotePeers = "RemotePeers" }
}

text_enum! {
    /// The relation to the peer.
    pub enum PeerType { External = "eBGP", Internal = "iBGP" }
}

text_enum! {
    /// What a rule does with a route.
    pub enum FilterAction { Accept = "Accept", Reject = "Reject" }
}

/// One rule; all its conditions must hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BGPFilterRule {
    /// Prefix to compare with; goes with `matchOperator`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidr: Option<Cidr>,
    /// Range of prefix lengths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_length: Option<PrefixLengthRange>,
    /// Where the route came from (export only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<FilterSource>,
    /// Interface of the route, `*` as wildcard (export only).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub interface: String,
    /// How prefixes are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub match_operator: Option<MatchOperator>,
    /// The relation to the peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_type: Option<PeerType>,
    /// Communities that the route must carry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub communities: Option<CommunityMatch>,
    /// AS numbers with which the path must begin.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub as_path_prefix: Vec<Asn>,
    /// Priority of the route (2147483647 minus its local preference).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// Changes to an accepted route, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<FilterOperation>,
    /// The verdict.
    pub action: FilterAction,
}

/// Bounds of a prefix length; an absent one is the rule's own length or the family's width.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixLengthRange {
    /// Shortest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<u8>,
    /// Longest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u8>,
}

/// Communities to match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommunityMatch {
    /// Exactly one in this version of the API.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<CommunityValue>,
}

/// One change to an accepted route; exactly one of the fields is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FilterOperation {
    /// Adds a community.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_community: Option<AddCommunity>,
    /// Prepends to the AS path.
    #[serde(rename = "prependASPath", skip_serializing_if = "Option::is_none")]
    pub prepend_as_path: Option<PrependAsPath>,
    /// Sets the priority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set_priority: Option<SetPriority>,
}

/// Adds a community.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddCommunity {
    /// Which.
    pub value: CommunityValue,
}

/// Prepends to the AS path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrependAsPath {
    /// The AS numbers, first one first in the resulting path.
    pub prefix: Vec<Asn>,
}

/// Sets the priority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetPriority {
    /// 1 to 2147483646.
    pub value: u32,
}
