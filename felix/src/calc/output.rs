//! What the graph tells its consumers: batches of deltas over IP sets, rules and endpoints.
//!
//! Order inside a [`Batch`] is a contract: a set is created before a policy that looks it up, a policy
//! before an endpoint that uses it; on the way out the users go first. A consumer that applies a
//! batch as one transaction never sees a dangling reference, and one that applies delta by delta
//! does not either.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use cali_api::v3::FelixConfigurationSpec;
use cali_api::{Cidr, Key};
use smallvec::SmallVec;

/// Identity of an IP set: a hash of what it selects, so that equal selectors share one set and a
/// restarted graph gives the same names again.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpSetId(pub Arc<str>);

impl IpSetId {
    /// The identity as text, at most 40 characters of `[a-z0-9-]`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IpSetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for IpSetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the members of a set are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpSetKind {
    /// Addresses and networks ([`Member::Net`]).
    Net,
    /// Address, protocol and port ([`Member::Port`]).
    Port,
}

/// One member of an IP set. Networks of one set never overlap (the covered ones are left out);
/// a single address may lie within a network of the same set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    /// A network; a single address is a host network.
    Net(Cidr),
    /// A named port of an endpoint.
    Port {
        /// The endpoint's address.
        addr: IpAddr,
        /// IP protocol number.
        protocol: u8,
        /// The port's number.
        port: u16,
    },
}

/// Inclusive port range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port, not below `first`.
    pub last: u16,
}

/// What a rule does when it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The packet is allowed in this direction.
    Allow,
    /// The packet is dropped.
    Deny,
    /// The packet is reported, evaluation goes on.
    Log,
    /// The rest of the tier is skipped.
    Pass,
}

/// Seen from the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// IP version of a rule or packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// The version of an address.
    pub fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// ICMP type, and code where given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Icmp {
    /// Type; `None` stands for every type.
    pub icmp_type: Option<u8>,
    /// Code; only with a type.
    pub code: Option<u8>,
}

/// One side of a rule with its selectors resolved to sets. All fields that are present must hold;
/// within a list any entry suffices.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerMatch {
    /// Any of these networks.
    pub nets: Vec<Cidr>,
    /// None of these networks.
    pub not_nets: Vec<Cidr>,
    /// The address is in every one of these sets.
    pub sets: SmallVec<[IpSetId; 1]>,
    /// The address is in none of these sets.
    pub not_sets: SmallVec<[IpSetId; 1]>,
    /// Any of these ports, or any of `port_sets`.
    pub ports: Vec<PortRange>,
    /// Sets of (address, protocol, port): named ports.
    pub port_sets: SmallVec<[IpSetId; 1]>,
    /// None of these ports, and none of `not_port_sets`.
    pub not_ports: Vec<PortRange>,
    /// Sets of (address, protocol, port) to stay out of.
    pub not_port_sets: SmallVec<[IpSetId; 1]>,
}

impl PeerMatch {
    /// Whether this side puts no condition on a packet.
    pub fn is_any(&self) -> bool {
        *self == Self::default()
    }

    /// Every set this side looks up.
    pub fn set_ids(&self) -> impl Iterator<Item = &IpSetId> {
        self.sets
            .iter()
            .chain(&self.not_sets)
            .chain(&self.port_sets)
            .chain(&self.not_port_sets)
    }
}

/// A rule as it is enforced.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// What happens on a match.
    pub action: Action,
    /// Only this IP version.
    pub ip_version: Option<IpVersion>,
    /// Only this IP protocol.
    pub protocol: Option<u8>,
    /// Any but this IP protocol.
    pub not_protocol: Option<u8>,
    /// Only these ICMP messages.
    pub icmp: Option<Icmp>,
    /// Any but these ICMP messages.
    pub not_icmp: Option<Icmp>,
    /// Where the packet comes from.
    pub source: PeerMatch,
    /// Where the packet goes to.
    pub destination: PeerMatch,
}

impl Rule {
    /// A rule that matches every packet.
    pub fn any(action: Action) -> Self {
        Self {
            action,
            ip_version: None,
            protocol: None,
            not_protocol: None,
            icmp: None,
            not_icmp: None,
            source: PeerMatch::default(),
            destination: PeerMatch::default(),
        }
    }

    /// Every set the rule looks up.
    pub fn set_ids(&self) -> impl Iterator<Item = &IpSetId> {
        self.source.set_ids().chain(self.destination.set_ids())
    }
}

/// Rules of an active policy or profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Rules for packets to the endpoint, in order.
    pub ingress: Vec<Rule>,
    /// Rules for packets from the endpoint, in order.
    pub egress: Vec<Rule>,
}

impl Rules {
    /// The rules of one direction.
    pub fn of(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// Every set the rules look up, once for each use.
    pub fn set_ids(&self) -> impl Iterator<Item = &IpSetId> {
        self.ingress
            .iter()
            .chain(&self.egress)
            .flat_map(Rule::set_ids)
    }
}

/// What happens to a packet that no policy of an entered tier decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierDefault {
    /// Drop it.
    Deny,
    /// Look into the next tier.
    Pass,
}

/// The policies of one tier that apply to an endpoint in one direction; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TierPolicies {
    /// The tier's name.
    pub tier: Arc<str>,
    /// What its end does.
    pub default_action: TierDefault,
    /// Policies in the order in which they are asked.
    pub policies: Vec<Key>,
}

/// A local endpoint with the policy that stands for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The host's side of the endpoint's interface pair.
    pub interface: Arc<str>,
    /// Addresses of the endpoint (host networks, or wider ones where the endpoint has them).
    pub addresses: Vec<Cidr>,
    /// The MAC address inside the endpoint, as written in the datastore.
    pub mac: Option<Arc<str>>,
    /// Tiers for packets to the endpoint, in order.
    pub ingress: Vec<TierPolicies>,
    /// Tiers for packets from the endpoint, in order.
    pub egress: Vec<TierPolicies>,
    /// Profiles, asked after the last tier, in this order.
    pub profiles: Vec<Arc<str>>,
    /// Limits of its traffic.
    pub limits: Limits,
}

impl Endpoint {
    /// The tiers of one direction.
    pub fn tiers(&self, direction: Direction) -> &[TierPolicies] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// Limits of one direction of an endpoint's traffic (Calico's QoSControls); `None` stands for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Limit {
    /// Packets per second, and how many may come at once.
    pub packets: Option<(u64, u32)>,
    /// Connections at a time.
    pub connections: Option<u32>,
}

/// Limits and marks of an endpoint's traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Limits {
    /// To the endpoint.
    pub ingress: Limit,
    /// From the endpoint.
    pub egress: Limit,
    /// Code point (0 to 63) of what the endpoint sends to addresses outside all pools.
    pub dscp: Option<u8>,
}

impl Limits {
    /// The limits of one direction.
    pub fn of(&self, direction: Direction) -> Limit {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }
}

/// The interfaces of a host endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostInterface {
    /// The one with this name.
    Named(Arc<str>),
    /// All that have no endpoint of their own, but loopback and the workloads' (`*`).
    All,
    /// Those that have one of the endpoint's addresses.
    ByAddress,
}

/// The kinds of policy that a host endpoint knows, by what they see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Before connection tracking (`doNotTrack`).
    Untracked,
    /// Before destination NAT (`preDNAT`); ingress only.
    PreDnat,
    /// What the host forwards (`applyOnForward`).
    Forward,
    /// What ends or begins on the host.
    Normal,
}

/// All stages in the order in which packets meet them.
pub const STAGES: [Stage; 4] = [
    Stage::Untracked,
    Stage::PreDnat,
    Stage::Forward,
    Stage::Normal,
];

/// Tiers of both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tiers {
    /// For packets to the endpoint, in order.
    pub ingress: Vec<TierPolicies>,
    /// For packets from the endpoint, in order.
    pub egress: Vec<TierPolicies>,
}

impl Tiers {
    /// The tiers of one direction.
    pub fn of(&self, direction: Direction) -> &[TierPolicies] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// A host endpoint of this node with the policy that stands for it. Without a tier, its stages before
/// `Normal` let everything on; `Normal` goes on to the profiles and denies what they do not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEndpoint {
    /// Where it is.
    pub interface: HostInterface,
    /// Its expected addresses.
    pub addresses: Vec<IpAddr>,
    /// Tiers of each stage, in the order of [`STAGES`].
    pub stages: [Tiers; 4],
    /// Profiles, asked after the last tier of stage `Normal`, in this order.
    pub profiles: Vec<Arc<str>>,
}

impl HostEndpoint {
    /// The tiers of one stage.
    pub fn stage(&self, stage: Stage) -> &Tiers {
        &self.stages[stage as usize]
    }

    /// Every policy of every stage, once for each use.
    pub fn policies(&self) -> impl Iterator<Item = &Key> {
        self.stages
            .iter()
            .flat_map(|tiers| tiers.ingress.iter().chain(&tiers.egress))
            .flat_map(|tier| &tier.policies)
    }
}

/// What the rule set needs to know of an IP pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolNat {
    /// The pool.
    pub cidr: Cidr,
    /// Packets that leave the pools are masqueraded.
    pub nat_outgoing: bool,
}

/// Who may send encapsulated packets to this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelPeers {
    /// Addresses of all nodes, and `externalNodesList`; sorted.
    pub sources: Vec<Cidr>,
    /// The address by which the others know this node.
    pub own: Option<Ipv4Addr>,
    /// A pool uses IPIP.
    pub ipip: bool,
    /// A pool uses VXLAN.
    pub vxlan: bool,
}

/// One change of what this node must enforce.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// Node settings: this node's FelixConfiguration over the cluster's. Sent when they change.
    Settings(Arc<FelixConfigurationSpec>),
    /// All IP pools, sorted. Sent when they change.
    Pools(Arc<[PoolNat]>),
    /// Networks of service addresses (BGPConfiguration), sorted. Sent when they change.
    ServiceNets(Arc<[Cidr]>),
    /// Senders of encapsulated packets. Sent when they change.
    TunnelPeers(Arc<TunnelPeers>),
    /// A set came into use, with all its members.
    IpSetCreate {
        /// Which set.
        id: IpSetId,
        /// What its members are.
        kind: IpSetKind,
        /// What it selects, for people.
        origin: Arc<str>,
        /// Members, sorted.
        members: Vec<Member>,
    },
    /// Members came or went. The two lists are disjoint and sorted.
    IpSetChange {
        /// Which set.
        id: IpSetId,
        /// New members.
        added: Vec<Member>,
        /// Former members.
        removed: Vec<Member>,
    },
    /// A policy came into use or its rules changed.
    Policy {
        /// Which policy.
        id: Key,
        /// Its rules.
        rules: Arc<Rules>,
    },
    /// A profile came into use or its rules changed. A profile that an endpoint names and nobody
    /// has written arrives with no rules, which allows nothing.
    Profile {
        /// Which profile.
        name: Arc<str>,
        /// Its rules.
        rules: Arc<Rules>,
    },
    /// A local endpoint appeared or changed.
    Endpoint {
        /// Which endpoint.
        id: Key,
        /// All of its state.
        endpoint: Arc<Endpoint>,
    },
    /// A host endpoint of this node appeared or changed.
    HostEndpoint {
        /// Which endpoint.
        id: Key,
        /// All of its state.
        endpoint: Arc<HostEndpoint>,
    },
    /// A local endpoint is gone.
    EndpointRemove {
        /// Which endpoint.
        id: Key,
    },
    /// A host endpoint of this node is gone.
    HostEndpointRemove {
        /// Which endpoint.
        id: Key,
    },
    /// No endpoint uses the profile any more.
    ProfileRemove {
        /// Which profile.
        name: Arc<str>,
    },
    /// No endpoint uses the policy any more.
    PolicyRemove {
        /// Which policy.
        id: Key,
    },
    /// No rule looks the set up any more.
    IpSetRemove {
        /// Which set.
        id: IpSetId,
    },
}

/// The changes since the batch before.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Counts up by one from batch to batch.
    pub sequence: u64,
    /// Set on the first batch after the datastore came into sync: with it, everything that must
    /// stand has been said, and whatever else the kernel holds of ours is stale.
    pub in_sync: bool,
    /// Changes in the order of the module's contract.
    pub deltas: Vec<Delta>,
}
