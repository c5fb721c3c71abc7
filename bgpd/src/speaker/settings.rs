//! What a speaker is to do, as values: made by [`crate::config`] from resources or from a file.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use cali_control::status::PeerKind as Origin;

use crate::policy::{Policy, PrefixSet};
use crate::rib::{LocalRoute, NextHopMode, RibConfig};
use crate::transport::Protection;
use crate::wire::{AddPathMode, FamilySet, NextHop, Prefix};

/// All settings of a speaker.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// BGP identifier.
    pub router_id: Ipv4Addr,
    /// AS number, where a neighbour has no other.
    pub local_as: u32,
    /// Cluster identifier, for a route reflector (RFC 4456).
    pub cluster_id: Option<Ipv4Addr>,
    /// Addresses to listen on.
    pub listen: Vec<SocketAddr>,
    /// Neighbours by address.
    pub neighbours: BTreeMap<IpAddr, Neighbour>,
    /// Prefixes whose addresses may become neighbours by connecting.
    pub ranges: Vec<Range>,
    /// Routes that start here.
    pub originated: BTreeMap<Prefix, LocalRoute>,
    /// What a node of a cluster adds.
    pub host: HostRules,
}

/// What a node of a cluster adds to a speaker: rules about its kernel, and what its operator should know.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostRules {
    /// Routes within these are passed on to peers, but kept out of the kernel: service addresses, which kube-proxy
    /// takes on every node.
    pub not_programmed: PrefixSet,
    /// Routes to peers over a gateway (`reachableBy`); they count before what BGP says about the same destination.
    pub static_routes: BTreeMap<Prefix, IpAddr>,
    /// What is left out of the configuration, and why.
    pub notices: Vec<Notice>,
    /// Secrets that passwords of neighbours come from, each with the key.
    pub secrets: BTreeSet<(String, String)>,
}

/// Something that is left out, and why; the rest is applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The object, as `BGPPeer name`.
    pub object: String,
    /// What is wrong with it.
    pub reason: String,
}

impl HostRules {
    /// Adds a notice that is not there yet.
    pub fn notice(&mut self, object: String, reason: impl Into<String>) {
        let notice = Notice {
            object,
            reason: reason.into(),
        };
        if !self.notices.contains(&notice) {
            self.notices.push(notice);
        }
    }
}

impl Settings {
    /// As the table takes them.
    #[must_use]
    pub const fn rib(&self) -> RibConfig {
        let mut config = RibConfig::new(self.local_as, self.router_id);
        config.cluster_id = self.cluster_id;
        config
    }
}

/// Neighbours that are not named, only the prefix that they come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Range {
    /// Where they come from. Of several that hold an address, the longest counts; a neighbour that is named counts
    /// more than any.
    pub prefix: Prefix,
    /// Most of them at a time.
    pub limit: u16,
    /// What each of them is; they are never dialled.
    pub neighbour: Neighbour,
}

/// One neighbour.
#[derive(Debug, Clone, PartialEq)]
pub struct Neighbour {
    /// Node name or description.
    pub name: Option<String>,
    /// How it came to be configured.
    pub origin: Origin,
    /// What a session is made with; a change of it needs a new session.
    pub session: SessionSettings,
    /// What is done with routes; a change of it does not touch the session.
    pub exchange: Exchange,
}

/// What a session is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionSettings {
    /// TCP port of the neighbour.
    pub port: u16,
    /// The AS number that we present.
    pub local_as: u32,
    /// Our BGP identifier.
    pub router_id: Ipv4Addr,
    /// The neighbour's AS number; `None` accepts any.
    pub remote_as: Option<u32>,
    /// Source address.
    pub source: Option<IpAddr>,
    /// Password and TTL security.
    pub protection: Protection,
    /// Never dial.
    pub passive: bool,
    /// Proposed hold time in seconds.
    pub hold_time: u16,
    /// Keepalive interval in seconds, if it is not a third of the hold time.
    pub keepalive: Option<u16>,
    /// Restart time of our graceful restart capability, in seconds; 0 leaves the capability out.
    pub restart_time: u16,
    /// How long the peer may keep our routes after the restart time, in seconds (RFC 9494, 24 bits); `None` leaves the
    /// capability out, and a neighbour's routes are not kept that long either. Needs a restart time.
    pub long_lived: Option<u32>,
    /// Families to exchange.
    pub families: FamilySet,
    /// Several paths for one prefix (RFC 7911), in each direction.
    pub add_path: AddPathMode,
    /// IPv4 routes may have IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
    /// Interface of a neighbour with a link-local address, which means nothing without it.
    pub interface: Option<Arc<str>>,
    /// Wait between dials.
    pub connect_retry: Duration,
    /// Watch the path by BFD (RFC 5882). A change of it does not touch the session.
    pub bfd: Option<crate::bfd::Settings>,
    /// Why there must be no session for now, in words for an operator (a password that is not there).
    pub blocked: Option<String>,
}

impl SessionSettings {
    /// The intervals that Calico configures, and both families.
    #[must_use]
    pub const fn new(local_as: u32, router_id: Ipv4Addr, remote_as: Option<u32>) -> Self {
        Self {
            port: 179,
            local_as,
            router_id,
            remote_as,
            source: None,
            protection: Protection {
                password: None,
                ttl_hops: None,
            },
            passive: false,
            hold_time: 240,
            keepalive: None,
            restart_time: 120,
            long_lived: None,
            families: FamilySet::ALL,
            add_path: AddPathMode::OFF,
            extended_next_hop: false,
            interface: None,
            connect_retry: Duration::from_secs(5),
            bfd: None,
            blocked: None,
        }
    }

    /// As the state machine takes them.
    #[must_use]
    pub const fn fsm(&self) -> crate::fsm::Settings {
        let mut fsm = crate::fsm::Settings::new(self.local_as, self.router_id, self.remote_as);
        fsm.passive = self.passive;
        fsm.hold_time = self.hold_time;
        fsm.keepalive = self.keepalive;
        fsm.connect_retry = self.connect_retry;
        fsm
    }
}

/// What is done with routes.
#[derive(Debug, Clone, PartialEq)]
pub struct Exchange {
    /// Next hop rule.
    pub next_hop: NextHopMode,
    /// Our IPv4 address as next hop, where it is not the session's.
    pub local_v4: Option<Ipv4Addr>,
    /// Our IPv6 address as next hop, where it is not the session's.
    pub local_v6: Option<NextHop>,
    /// `Some(cluster id)`: the neighbour is our route reflector client.
    pub reflector_client: Option<Ipv4Addr>,
    /// How often our AS number may occur in a received path.
    pub allow_own_as: u8,
    /// Most prefixes per family; 0 means no limit.
    pub max_prefixes: u32,
    /// Applied to what the neighbour announces.
    pub import: Arc<Policy>,
    /// Applied to what the neighbour is sent.
    pub export: Arc<Policy>,
}

impl Exchange {
    /// The protocol's own rules, and these policies.
    #[must_use]
    pub const fn new(import: Arc<Policy>, export: Arc<Policy>) -> Self {
        Self {
            next_hop: NextHopMode::Auto,
            local_v4: None,
            local_v6: None,
            reflector_client: None,
            allow_own_as: 0,
            max_prefixes: 0,
            import,
            export,
        }
    }
}
