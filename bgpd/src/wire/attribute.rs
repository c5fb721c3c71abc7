//! Path attributes as values.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::as_path::AsPath;
use super::community::{Community, ExtendedCommunity, LargeCommunity};

/// Attribute type codes (IANA "BGP Path Attributes").
pub mod attr {
    /// ORIGIN.
    pub const ORIGIN: u8 = 1;
    /// AS_PATH.
    pub const AS_PATH: u8 = 2;
    /// NEXT_HOP.
    pub const NEXT_HOP: u8 = 3;
    /// MULTI_EXIT_DISC.
    pub const MED: u8 = 4;
    /// LOCAL_PREF.
    pub const LOCAL_PREF: u8 = 5;
    /// ATOMIC_AGGREGATE.
    pub const ATOMIC_AGGREGATE: u8 = 6;
    /// AGGREGATOR.
    pub const AGGREGATOR: u8 = 7;
    /// COMMUNITIES (RFC 1997).
    pub const COMMUNITIES: u8 = 8;
    /// ORIGINATOR_ID (RFC 4456).
    pub const ORIGINATOR_ID: u8 = 9;
    /// CLUSTER_LIST (RFC 4456).
    pub const CLUSTER_LIST: u8 = 10;
    /// MP_REACH_NLRI (RFC 4760).
    pub const MP_REACH: u8 = 14;
    /// MP_UNREACH_NLRI (RFC 4760).
    pub const MP_UNREACH: u8 = 15;
    /// EXTENDED COMMUNITIES (RFC 4360).
    pub const EXT_COMMUNITIES: u8 = 16;
    /// AS4_PATH (RFC 6793).
    pub const AS4_PATH: u8 = 17;
    /// AS4_AGGREGATOR (RFC 6793).
    pub const AS4_AGGREGATOR: u8 = 18;
    /// LARGE_COMMUNITY (RFC 8092).
    pub const LARGE_COMMUNITIES: u8 = 32;

    /// Flag: optional.
    pub const OPTIONAL: u8 = 0x80;
    /// Flag: transitive.
    pub const TRANSITIVE: u8 = 0x40;
    /// Flag: some speaker on the way did not know the attribute.
    pub const PARTIAL: u8 = 0x20;
    /// Flag: the length has two octets.
    pub const EXTENDED_LENGTH: u8 = 0x10;
}

/// ORIGIN; smaller is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum Origin {
    /// Interior to the originating AS.
    #[default]
    Igp = 0,
    /// Learned by EGP.
    Egp = 1,
    /// Other means.
    Incomplete = 2,
}

/// AGGREGATOR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Aggregator {
    /// AS that aggregated.
    pub asn: u32,
    /// Identifier of the speaker that aggregated.
    pub router_id: Ipv4Addr,
}

/// An attribute that we do not interpret (or not here), as received.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UnknownAttribute {
    /// Flags, without the extended length bit.
    pub flags: u8,
    /// Type code.
    pub code: u8,
    /// Value.
    pub value: Box<[u8]>,
}

/// Everything about a path that may be shared by many prefixes; the next hop is kept apart, because it
/// differs between families and is edited on its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Attributes {
    /// ORIGIN.
    pub origin: Origin,
    /// AS_PATH.
    pub as_path: AsPath,
    /// MULTI_EXIT_DISC.
    pub med: Option<u32>,
    /// LOCAL_PREF.
    pub local_pref: Option<u32>,
    /// ATOMIC_AGGREGATE is present.
    pub atomic_aggregate: bool,
    /// AGGREGATOR.
    pub aggregator: Option<Aggregator>,
    /// ORIGINATOR_ID.
    pub originator_id: Option<Ipv4Addr>,
    /// CLUSTER_LIST, latest reflector first.
    pub cluster_list: Box<[Ipv4Addr]>,
    /// COMMUNITIES, ascending, each once.
    pub communities: Box<[Community]>,
    /// EXTENDED COMMUNITIES, ascending, each once.
    pub ext_communities: Box<[ExtendedCommunity]>,
    /// LARGE_COMMUNITY, ascending, each once.
    pub large_communities: Box<[LargeCommunity]>,
    /// Attributes passed through, ascending by code.
    pub unknown: Box<[UnknownAttribute]>,
}

impl Attributes {
    /// Whether `community` is attached.
    pub fn has_community(&self, community: Community) -> bool {
        self.communities.binary_search(&community).is_ok()
    }

    /// Attaches `community` (no effect when it is there).
    pub fn add_community(&mut self, community: Community) {
        insert_sorted(&mut self.communities, community);
    }

    /// Attaches `community` (no effect when it is there).
    pub fn add_ext_community(&mut self, community: ExtendedCommunity) {
        insert_sorted(&mut self.ext_communities, community);
    }

    /// Attaches `community` (no effect when it is there).
    pub fn add_large_community(&mut self, community: LargeCommunity) {
        insert_sorted(&mut self.large_communities, community);
    }
}

fn insert_sorted<T: Ord + Clone>(list: &mut Box<[T]>, item: T) {
    if let Err(at) = list.binary_search(&item) {
        let mut grown = Vec::with_capacity(list.len() + 1);
        grown.extend_from_slice(&list[..at]);
        grown.push(item);
        grown.extend_from_slice(&list[at..]);
        *list = grown.into_boxed_slice();
    }
}

/// A next hop as carried in NEXT_HOP or MP_REACH_NLRI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NextHop {
    /// IPv4.
    V4(Ipv4Addr),
    /// IPv6; global, or link-local alone on an unnumbered session.
    V6(Ipv6Addr),
    /// Global and link-local IPv6 (RFC 2545 §3).
    V6Pair {
        /// Global address.
        global: Ipv6Addr,
        /// Link-local address on the shared link.
        link_local: Ipv6Addr,
    },
}

impl NextHop {
    /// The address that forwarding uses: link-local when there is one, since it names the link (RFC 2545 §3).
    pub const fn gateway(&self) -> IpAddr {
        match self {
            Self::V4(a) => IpAddr::V4(*a),
            Self::V6(a) | Self::V6Pair { link_local: a, .. } => IpAddr::V6(*a),
        }
    }

    /// The address that is passed on to peers.
    pub const fn global(&self) -> IpAddr {
        match self {
            Self::V4(a) => IpAddr::V4(*a),
            Self::V6(a) | Self::V6Pair { global: a, .. } => IpAddr::V6(*a),
        }
    }

    /// Whether the address can never be a next hop (0/8, 127/8, multicast, class E; `::`, `::1`, ff00::/8).
    pub const fn is_martian(&self) -> bool {
        match self.global() {
            IpAddr::V4(a) => {
                let first = a.octets()[0];
                first == 0 || first == 127 || first >= 224
            }
            IpAddr::V6(a) => a.is_unspecified() || a.is_loopback() || a.is_multicast(),
        }
    }
}

impl From<IpAddr> for NextHop {
    fn from(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(a) => Self::V4(a),
            IpAddr::V6(a) => Self::V6(a),
        }
    }
}
