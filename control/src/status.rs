//! What `calictl` and other tools ask the daemons of one node.
//!
//! Requests and answers alternate on a connection, after the two `Hello` frames. `node.sock` answers the requests
//! of [`NodeRequest`], `bgpd.sock` those of [`BgpRequest`]. Times are seconds since the Unix epoch.

use cali_api::{Asn, Cidr};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// Name in the [`crate::Hello`] of `node.sock`.
pub const NODE_PROTOCOL: &str = "cali-node-status";
/// Name in the [`crate::Hello`] of `bgpd.sock`.
pub const BGP_PROTOCOL: &str = "cali-bgp-status";
/// Version of both.
pub const VERSION: u32 = 1;

/// To `bgpd.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BgpRequest {
    Status,
    /// Best and other paths of the table, all of it or those inside one prefix.
    Routes {
        within: Option<Cidr>,
    },
    /// Routes of one peer, before and after filters, and what was advertised to it.
    PeerRoutes {
        peer: IpAddr,
        direction: Direction,
    },
    /// Everything about the longest prefix around this one that has a route: its paths, and who is told of it.
    Explain {
        of: Cidr,
    },
    /// A piece of the table as MRT records (RFC 6396 TABLE_DUMP_V2). The first has no cursor.
    Mrt {
        cursor: Option<MrtCursor>,
    },
    /// Re-reads the peer's routes (RFC 2918) without a reset.
    Refresh {
        peer: IpAddr,
    },
    /// Ends all sessions with Cease/Administrative Shutdown (RFC 4486) and exits: for a node that leaves.
    Drain {
        message: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    Received,
    Accepted,
    Advertised,
    /// Selected routes that the peer is not told of, with the reason.
    Withheld,
}

/// Where a dump goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MrtCursor {
    pub ipv6: bool,
    /// Number of a destination in the table.
    pub destination: u32,
    /// Sequence number of the next record.
    pub sequence: u32,
    /// Entries of the peer index table at the dump's start; neighbours that came later are left out.
    pub peers: u16,
}

/// From `bgpd.sock`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum BgpResponse {
    Status(BgpStatus),
    Routes(Vec<RouteStatus>),
    Explanation(Explanation),
    /// Octets in hexadecimal, and where the dump goes on; nowhere when it is complete.
    Mrt {
        records: String,
        next: Option<MrtCursor>,
    },
    Done,
    /// The request could not be served; words for an operator.
    Error(String),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BgpStatus {
    pub version: String,
    pub router_id: Ipv4Addr,
    pub local_as: Asn,
    pub started_at: u64,
    /// Time of the last applied change of configuration.
    pub configured_at: u64,
    pub peers: Vec<PeerStatus>,
    /// Prefixes with at least one path, per family.
    pub prefixes_v4: u64,
    pub prefixes_v6: u64,
    /// `true` until the first synchronisation with the route table has ended (graceful restart in progress).
    pub restarting: bool,
    /// Objects that are left out of the configuration, each with its reason.
    #[serde(default)]
    pub notices: Vec<String>,
    /// Routes that start here, per family.
    #[serde(default)]
    pub originated_v4: u64,
    #[serde(default)]
    pub originated_v6: u64,
    /// Paths in the table, those of all peers.
    #[serde(default)]
    pub paths: u64,
    /// Distinct sets of path attributes.
    #[serde(default)]
    pub attribute_sets: u64,
    /// Groups of peers that are sent the same stream.
    #[serde(default)]
    pub update_groups: u64,
}

/// Something that happened, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub at: u64,
    pub what: String,
}

/// BGP messages of all sessions with a peer so far, by type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageCounts {
    pub open: u64,
    pub update: u64,
    pub notification: u64,
    pub keepalive: u64,
    pub refresh: u64,
}

/// A peer whose routes are kept while it is away (RFC 4724 helper).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartStatus {
    pub families: Vec<String>,
    /// Seconds until the routes go, if the peer does not come back or does not send them again.
    pub seconds_left: Option<u64>,
}

/// Routes of one family with a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FamilyStatus {
    /// `ipv4` or `ipv6`.
    pub family: String,
    pub received: u64,
    pub accepted: u64,
    pub advertised: u64,
}

/// Everything about the routes of one destination.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// What was found around what was asked for; `None` if there is nothing.
    pub prefix: Option<Cidr>,
    /// All paths, the selected one first.
    pub paths: Vec<RouteStatus>,
    /// Whether the route table of the node gets it, and why not.
    pub kernel: String,
    /// What becomes of the selected path at every peer with a session.
    pub peers: Vec<ToldStatus>,
}

/// Whether a peer is told of a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToldStatus {
    pub peer: IpAddr,
    pub name: Option<String>,
    /// Why it is not told; `None` if it is.
    pub withheld: Option<String>,
}

/// How a peer came to be configured; the display form is the second column of `calictl node status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PeerKind {
    /// Node-to-node mesh.
    Mesh,
    /// A `BGPPeer` with `node` or `nodeSelector`.
    NodeSpecific,
    /// A `BGPPeer` for all nodes.
    Global,
    /// A pod that speaks BGP.
    LocalWorkload,
    /// A neighbour of a configuration file.
    Static,
}

impl PeerKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "node-to-node mesh",
            Self::NodeSpecific => "node specific",
            Self::Global => "global",
            Self::LocalWorkload => "local workload",
            Self::Static => "static",
        }
    }
}

/// RFC 4271 §8.2.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SessionState {
    Idle,
    Connect,
    Active,
    OpenSent,
    OpenConfirm,
    Established,
}

impl SessionState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "Idle",
            Self::Connect => "Connect",
            Self::Active => "Active",
            Self::OpenSent => "OpenSent",
            Self::OpenConfirm => "OpenConfirm",
            Self::Established => "Established",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub address: IpAddr,
    pub port: u16,
    /// Node name or description, where known.
    pub name: Option<String>,
    pub kind: PeerKind,
    pub remote_as: Asn,
    pub local_as: Asn,
    pub state: SessionState,
    /// When the session reached this state.
    pub since: u64,
    /// Last error, NOTIFICATION or reason for not dialling (for example a missing password secret).
    pub info: Option<String>,
    /// Routes of this peer are kept although the session is down (RFC 4724 helper).
    pub graceful_restart: bool,
    pub hold_time: u16,
    pub capabilities: Vec<String>,
    pub received: u64,
    pub accepted: u64,
    pub advertised: u64,
    pub updates_in: u64,
    pub updates_out: u64,
    /// Times the session was established.
    pub established_count: u64,
    /// How the path is watched (RFC 5880), where that is configured.
    #[serde(default)]
    pub bfd: Option<BfdStatus>,
    /// Our address of the session.
    #[serde(default)]
    pub local_address: Option<IpAddr>,
    /// The peer's BGP identifier, while there is a session.
    #[serde(default)]
    pub router_id: Option<Ipv4Addr>,
    /// The last error or failed attempt; stays when a session stands again.
    #[serde(default)]
    pub last_error: Option<Event>,
    /// How the last session ended.
    #[serde(default)]
    pub last_down: Option<Event>,
    #[serde(default)]
    pub messages_in: MessageCounts,
    #[serde(default)]
    pub messages_out: MessageCounts,
    #[serde(default)]
    pub restart: Option<RestartStatus>,
    /// Families of the session, or those that are configured while there is none.
    #[serde(default)]
    pub families: Vec<FamilyStatus>,
    /// The path is protected by a TCP MD5 password; by TTL security over this many hops.
    #[serde(default)]
    pub password: bool,
    #[serde(default)]
    pub ttl_hops: Option<u8>,
    /// The peer is our route reflector client.
    #[serde(default)]
    pub reflector_client: bool,
}

/// The BFD session with a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BfdStatus {
    /// `Up`, `Init`, `Down` or `AdminDown`.
    pub state: String,
    /// Why it is not up, or why there cannot be one.
    pub reason: Option<String>,
    /// The interval that we send at, in milliseconds.
    pub transmit_ms: u64,
    /// How long silence may last, in milliseconds.
    pub detection_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouteStatus {
    pub prefix: Cidr,
    pub next_hop: Option<IpAddr>,
    /// `None`: originated here.
    pub peer: Option<IpAddr>,
    pub as_path: String,
    pub origin: String,
    pub local_pref: Option<u32>,
    pub med: Option<u32>,
    pub communities: Vec<String>,
    pub best: bool,
    pub stale: bool,
    /// As good as the best path: forwarding uses it as well.
    #[serde(default)]
    pub multipath: bool,
    /// For a route that starts here: why it does ("block", "workload on cali1", ...).
    #[serde(default)]
    pub local: Option<String>,
    /// Why it is not best, not accepted or not advertised.
    pub reason: Option<String>,
}

/// To `node.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeRequest {
    Status,
    /// The node's route table: who owns each route and why it is there.
    Routes,
    /// Endpoints and whether their policy is in the kernel.
    Endpoints,
}

/// From `node.sock`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum NodeResponse {
    Status(NodeStatus),
    Routes(Vec<OwnedRoute>),
    Endpoints(Vec<EndpointStatus>),
    Error(String),
}

/// Annotation of a CalicoNodeStatus by which `calictl` asks for more than that kind can say: a node puts a [`NodeReport`]
/// there, as JSON, along with its report. What it finds there first, if anything, is a [`ReportQuery`].
pub const REPORT_ANNOTATION: &str = "projectcalico.org/CaliReport";

/// All that a node says of itself, as the two status sockets would.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    pub node: NodeStatus,
    /// `None` where `bgpd` does not run.
    pub bgp: Option<BgpStatus>,
    #[serde(default)]
    pub figures: Figures,
    /// The routes that were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<PackedRoutes>,
}

/// What is asked of a node beyond its status, as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportQuery {
    /// Routes as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<RouteQuery>,
}

/// Which routes; without any of the fields, all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteQuery {
    /// Those around this prefix and those inside of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub around: Option<Cidr>,
    /// Those of this [`OwnedRoute::source`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Those that are not in the kernel as they should be.
    #[serde(default)]
    pub problems: bool,
}

impl RouteQuery {
    /// Whether a route is among them.
    #[must_use]
    pub fn wants(&self, route: &OwnedRoute) -> bool {
        let around = self.around.is_none_or(|wanted| {
            route.prefix.contains_cidr(&wanted) || wanted.contains_cidr(&route.prefix)
        });
        let owned = |owner: &String| *owner == route.source;
        around
            && self.owner.as_ref().is_none_or(owned)
            && (!self.problems || !route.programmed || route.problem.is_some())
    }
}

/// Routes in a report: a list of [`OwnedRoute`] as JSON, gzip, base64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedRoutes {
    pub packed: String,
    /// Routes that were asked for and did not fit.
    pub left_out: usize,
}

/// What a node has counted since its start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Bursts of changes that the kernel enforces by now.
    pub policy_changes: u64,
    /// From a change's arrival until the kernel enforces it, in milliseconds: half of them, and 99 of 100, took no longer.
    pub policy_latency_ms: Option<[f64; 2]>,
    /// Packets that a rule has denied; `None` where rules are not counted (iptables, no rules yet).
    pub denied_packets: Option<u64>,
    /// Flows that were established when policy forbade them, and were ended.
    pub flows_ended: u64,
    pub endpoints: u64,
    pub routes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub node: String,
    pub version: String,
    pub pid: u32,
    pub started_at: u64,
    /// Address with its prefix length, `10.0.0.1/24`.
    pub ipv4: Option<String>,
    pub ipv6: Option<String>,
    /// Every part that must be ready, with the reason where it is not.
    pub readiness: Vec<Readiness>,
    /// Objects that the kernel refused, each with its reason; everything else is programmed.
    pub quarantined: Vec<Quarantined>,
    /// Things an operator should know: missing kernel features, foreign chains that can drop our traffic, fighters.
    pub notices: Vec<String>,
    pub bgpd_pid: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    pub part: String,
    pub ready: bool,
    pub reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// Kernel object, for example `route 10.0.1.0/26`.
    pub object: String,
    pub reason: String,
    /// The resources that asked for it.
    pub caused_by: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedRoute {
    pub prefix: Cidr,
    /// As `ip route` would print it, without the prefix.
    pub kernel: String,
    /// Who supplies it: `workload`, `block`, `affinity`, `bgp`, ...
    pub source: String,
    /// The resource or peer that it comes from.
    pub because: String,
    pub programmed: bool,
    pub problem: Option<String>,
    /// Where it leads; empty for what is dropped or taken here, and while nothing is selected.
    #[serde(default)]
    pub hops: Vec<RouteHop>,
    /// `VXLAN` or `IPIP`; `None` for packets that leave as they are.
    #[serde(default)]
    pub encapsulation: Option<String>,
}

/// One way out of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteHop {
    /// The gateway; `None` straight out of the device.
    pub gateway: Option<IpAddr>,
    pub device: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// `namespace/name` of the workload endpoint.
    pub endpoint: String,
    pub interface: String,
    pub addresses: Vec<IpAddr>,
    pub policies: Vec<String>,
    pub programmed: bool,
    pub problem: Option<String>,
}
