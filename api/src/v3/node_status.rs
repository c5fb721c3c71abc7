//! CalicoNodeStatus: a request for a node's BGP state, and the answer.

use serde::{Deserialize, Serialize};

use crate::text::text_enum;

text_enum! {
    /// What is reported.
    pub enum NodeStatusClass { Agent = "Agent", BGP = "BGP", Routes = "Routes" }
}

/// Which node reports what, and how often.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CalicoNodeStatusSpec {
    /// The node.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// What it reports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<NodeStatusClass>,
    /// Seconds between reports, at most a day; 0 stops them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_period_seconds: Option<u32>,
}

/// The report.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CalicoNodeStatusStatus {
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_updated: Option<String>,
    /// The BGP processes.
    pub agent: NodeAgentStatus,
    /// The sessions.
    pub bgp: NodeBGPStatus,
    /// The routes.
    pub routes: NodeRoutesStatus,
}

/// The BGP processes of both families.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeAgentStatus {
    /// For IPv4.
    #[serde(rename = "birdV4")]
    pub bird_v4: BGPDaemonStatus,
    /// For IPv6.
    #[serde(rename = "birdV6")]
    pub bird_v6: BGPDaemonStatus,
}

text_enum! {
    /// Whether a BGP process works.
    pub enum BGPDaemonState { Ready = "Ready", NotReady = "NotReady" }
}

/// A BGP process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BGPDaemonStatus {
    /// Whether it works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<BGPDaemonState>,
    /// Its version.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Its BGP identifier.
    #[serde(rename = "routerID", skip_serializing_if = "String::is_empty")]
    pub router_id: String,
    /// When it started.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub last_boot_time: String,
    /// When its configuration changed last.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub last_reconfiguration_time: String,
}

/// The sessions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeBGPStatus {
    /// Established IPv4 sessions.
    pub number_established_v4: u32,
    /// Other IPv4 sessions.
    pub number_not_established_v4: u32,
    /// Established IPv6 sessions.
    pub number_established_v6: u32,
    /// Other IPv6 sessions.
    pub number_not_established_v6: u32,
    /// IPv4 peers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_v4: Vec<NodePeer>,
    /// IPv6 peers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_v6: Vec<NodePeer>,
}

text_enum! {
    /// From what a peer was configured.
    pub enum NodePeerType { NodeMesh = "NodeMesh", NodePeer = "NodePeer", GlobalPeer = "GlobalPeer" }
}

text_enum! {
    /// State of a session (RFC 4271 §8.2.2).
    pub enum BGPSessionState {
        Idle = "Idle",
        Connect = "Connect",
        Active = "Active",
        OpenSent = "OpenSent",
        OpenConfirm = "OpenConfirm",
        Established = "Established",
        Close = "Close",
    }
}

/// A peer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodePeer {
    /// Its address.
    #[serde(rename = "peerIP", skip_serializing_if = "String::is_empty")]
    pub peer_ip: String,
    /// From what it was configured.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub type_: Option<NodePeerType>,
    /// State of its session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<BGPSessionState>,
    /// Since when.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub since: String,
}

/// The routes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeRoutesStatus {
    /// IPv4 routes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routes_v4: Vec<NodeRoute>,
    /// IPv6 routes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routes_v6: Vec<NodeRoute>,
}

text_enum! {
    /// Whether a route is used for forwarding.
    pub enum NodeRouteType { Fib = "FIB", Rib = "RIB" }
}

text_enum! {
    /// Where a route came from.
    pub enum NodeRouteSource {
        Kernel = "Kernel",
        Static = "Static",
        Direct = "Direct",
        NodeMesh = "NodeMesh",
        BGPPeer = "BGPPeer",
    }
}

/// A route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeRoute {
    /// Whether it is used for forwarding.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub type_: Option<NodeRouteType>,
    /// Where it leads.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination: String,
    /// The next hop.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub gateway: String,
    /// The interface.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub interface: String,
    /// Where it came from.
    pub learned_from: NodeRouteOrigin,
}

/// Where a route came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeRouteOrigin {
    /// The kind of source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_type: Option<NodeRouteSource>,
    /// The peer, for routes learnt by BGP.
    #[serde(rename = "peerIP", skip_serializing_if = "String::is_empty")]
    pub peer_ip: String,
}
