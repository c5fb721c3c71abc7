//! What goes into the table and what comes out.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::policy::{LocalKind, Policy};
use crate::wire::{Attributes, Codec, Family, FamilySet, NextHop, PeerKind, Prefix, Update};

/// A configured neighbour's place in the table; stays the same over its sessions, so that stale routes of
/// graceful restart keep their owner. Given out by [`Rib::register`](super::Rib::register).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerSlot(pub(super) u16);

impl PeerSlot {
    /// The slot of routes that this speaker originates.
    pub const LOCAL: Self = Self(0);

    /// As a number, for logs.
    pub const fn index(self) -> u16 {
        self.0
    }
}

/// One session of a neighbour. Inputs that carry an older epoch than the last [`RibInput::PeerUp`] are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId {
    /// The neighbour.
    pub slot: PeerSlot,
    /// Number of the session; the speaker counts it up.
    pub epoch: u32,
}

/// What is sent as next hop (`BGPPeer.nextHopMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum NextHopMode {
    /// External sessions: our address. Internal ones: as received.
    #[default]
    Auto,
    /// Our address of the session.
    SelfAddress,
    /// As received, also to external peers.
    Keep,
}

/// All that the table needs to know about a session.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Negotiated message format; says also whether the peer is internal, and which families it has.
    pub codec: Codec,
    /// AS number that we present in this session (prepended towards external peers).
    pub local_as: u32,
    /// The peer's AS number.
    pub remote_as: u32,
    /// The peer's BGP identifier.
    pub remote_id: Ipv4Addr,
    /// The peer's address; a tie-breaker.
    pub remote_addr: IpAddr,
    /// Interface index when the peer is link-local, else 0: the scope of link-local next hops.
    pub scope: u32,
    /// Our IPv4 address for next-hop-self.
    pub local_v4: Option<Ipv4Addr>,
    /// Our IPv6 address (with link-local, if the link is shared) for next-hop-self.
    pub local_v6: Option<NextHop>,
    /// Next hop rule.
    pub next_hop: NextHopMode,
    /// `Some(cluster id)`: the peer is our route reflector client.
    pub reflector_client: Option<Ipv4Addr>,
    /// How often our own AS number may occur in a received path.
    pub allow_own_as: u8,
    /// The leftmost AS of an external peer's path must be the peer's.
    pub enforce_first_as: bool,
    /// The peer knows long-lived graceful restart, so it may have routes marked LLGR_STALE (RFC 9494 §4.4).
    pub long_lived: bool,
    /// Both sides know BoRR/EoRR (RFC 7313).
    pub enhanced_refresh: bool,
    /// Most prefixes that the peer may have in the table, per family; 0 means no limit.
    pub max_prefixes: u32,
    /// Applied to what the peer announces.
    pub import: Arc<Policy>,
    /// Applied to what the peer is sent.
    pub export: Arc<Policy>,
}

/// A route that starts here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalRoute {
    /// Destination.
    pub prefix: Prefix,
    /// Attributes (AS_PATH empty; LOCAL_PREF and communities as the configuration wants them).
    pub attributes: Attributes,
    /// Why it exists; filters can ask for it.
    pub kind: LocalKind,
    /// Interface of the route, for filters.
    pub interface: Option<Arc<str>>,
}

/// Reachability of a gateway, as the next-hop tracker sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NextHopState {
    /// No route to it.
    Unreachable,
    /// Reachable at this cost (RFC 4271 §9.1.2.2 e).
    Reachable {
        /// Interior cost; smaller is better.
        metric: u32,
    },
}

/// A next hop to forward to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gateway {
    /// Address.
    pub addr: IpAddr,
    /// Interface index for link-local addresses, else 0.
    pub scope: u32,
}

/// One event. Nothing takes effect on peers or the kernel before [`Rib::commit`](super::Rib::commit).
#[derive(Clone, Debug)]
pub enum RibInput {
    /// The session is established. Stale routes of a family outside `preserved` go at once (RFC 4724 §4.2: family
    /// absent from the new capability or forwarding bit clear); the others wait for End-of-RIB.
    PeerUp {
        /// The new session.
        peer: PeerId,
        /// How to talk to it.
        config: Arc<PeerConfig>,
        /// Families whose forwarding state the peer kept.
        preserved: FamilySet,
    },
    /// The session has ended. Routes of families in `retain` become stale, others go.
    PeerDown {
        /// The session.
        peer: PeerId,
        /// Families under graceful restart.
        retain: FamilySet,
    },
    /// The session's settings changed without a restart (filters, next hop mode, ...). The codec must be the same.
    /// Export is evaluated again and only differences are sent; for a changed import policy ask for a route refresh.
    PeerChanged {
        /// The session.
        peer: PeerId,
        /// New settings.
        config: Arc<PeerConfig>,
    },
    /// The neighbour is no longer configured; its slot becomes free.
    PeerRemoved {
        /// The neighbour.
        slot: PeerSlot,
    },
    /// A received UPDATE (End-of-RIB markers included).
    Update {
        /// From whom.
        peer: PeerId,
        /// The message.
        update: Box<Update>,
    },
    /// The peer asks for its table again.
    RefreshRequested {
        /// Who.
        peer: PeerId,
        /// Which table.
        family: Family,
    },
    /// BoRR received: what is not repeated before EoRR goes (RFC 7313 §4).
    RefreshBegin {
        /// Who.
        peer: PeerId,
        /// Which table.
        family: Family,
    },
    /// EoRR received (or its timer ran out).
    RefreshEnd {
        /// Who.
        peer: PeerId,
        /// Which table.
        family: Family,
    },
    /// The stale timer ran out: stale routes of these families go.
    StaleExpired {
        /// Whose.
        slot: PeerSlot,
        /// Which tables.
        families: FamilySet,
    },
    /// Stale routes of these families become long-lived stale (RFC 9494 §4.2): least preferred, LLGR_STALE attached;
    /// those with NO_LLGR go.
    LongLivedStale {
        /// Whose.
        slot: PeerSlot,
        /// Which tables.
        families: FamilySet,
    },
    /// The tracker learned about a gateway.
    NextHop {
        /// Which.
        gateway: Gateway,
        /// What.
        state: NextHopState,
    },
    /// Originate a route, or change it.
    Originate(LocalRoute),
    /// Stop originating.
    Retract(Prefix),
}

/// Where the best route comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteSource {
    /// Originated here.
    Local(LocalKind),
    /// Learned from a peer of this kind.
    Bgp(PeerKind),
}

/// The selected route of a prefix.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BestRoute {
    /// Where the first path comes from.
    pub source: RouteSource,
    /// Gateways of all equal paths, ascending, each once; empty for local routes.
    pub gateways: Vec<Gateway>,
    /// LOCAL_PREF of the selected path (100 if it has none).
    pub local_pref: u32,
    /// An import rule marked the path as preferred over local routes.
    pub preferred: bool,
    /// The selected path is stale.
    pub stale: bool,
}

/// A prefix whose selected route is another one now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BestChange {
    /// Destination.
    pub prefix: Prefix,
    /// The new route; `None` when there is none any more.
    pub best: Option<Arc<BestRoute>>,
    /// Whose path is selected.
    pub learned_from: Option<PeerSlot>,
}

/// Outcome of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RibChanges {
    /// For the kernel; each prefix at most once.
    pub best: Vec<BestChange>,
    /// Peers for which [`Rib::pull`](super::Rib::pull) has something, and had nothing when last pulled.
    pub ready: Vec<PeerId>,
    /// Gateways to track from now on.
    pub watch: Vec<Gateway>,
    /// Gateways that no path uses any more.
    pub unwatch: Vec<Gateway>,
    /// Sessions above their prefix limit: to be ended with Cease/1.
    pub over_limit: Vec<PeerId>,
}
