//! The configuration file of a `bgpd` that stands alone (TOML).
//!
//! ```toml
//! router-id = "10.0.1.254"
//! as = 64513
//!
//! [[neighbor]]
//! address = "10.0.1.1"
//! as = 64512
//!
//! [[announce]]
//! prefix = "203.0.113.0/24"
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16};
use std::sync::Arc;
use std::time::Duration;

use cali_api::{Asn, Cidr};
use cali_control::status::PeerKind as Origin;
use serde::Deserialize;

use crate::bfd::{self, Hops};
use crate::policy::{LocalKind, Policy};
use crate::rib::{LocalRoute, NextHopMode};
use crate::speaker::settings::{Exchange, Neighbour, SessionSettings, Settings};
use crate::transport::Protection;
use crate::wire::{AnyCommunity, Attributes, CommunityParseError, FamilySet, NextHop};

/// The file as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    router_id: Ipv4Addr,
    #[serde(rename = "as")]
    asn: Asn,
    /// Makes this speaker a reflector for neighbours that are its clients.
    cluster_id: Option<Ipv4Addr>,
    #[serde(default = "default_port")]
    listen_port: u16,
    /// Addresses to listen on; all without it.
    #[serde(default)]
    listen: Vec<IpAddr>,
    /// Whether best paths are written into the kernel; a route reflector beside the traffic has no use for it.
    #[serde(default = "default_install")]
    install: bool,
    #[serde(default)]
    neighbor: Vec<Neighbor>,
    #[serde(default)]
    announce: Vec<Announce>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Neighbor {
    address: IpAddr,
    #[serde(rename = "as")]
    asn: Asn,
    description: Option<String>,
    #[serde(default = "default_port")]
    port: u16,
    local_as: Option<Asn>,
    source: Option<IpAddr>,
    password: Option<String>,
    ttl_security: Option<u8>,
    #[serde(default)]
    passive: bool,
    hold_time: Option<u16>,
    keepalive: Option<u16>,
    restart_time: Option<u16>,
    /// Seconds between dials.
    connect_retry: Option<NonZeroU16>,
    #[serde(default)]
    families: Vec<FamilyName>,
    #[serde(default)]
    next_hop: NextHopRule,
    /// Our address as next hop of routes of the other family.
    next_hop_v4: Option<Ipv4Addr>,
    next_hop_v6: Option<Ipv6Addr>,
    #[serde(default)]
    route_reflector_client: bool,
    /// Watches the path by BFD: `true`, or a table.
    #[serde(default)]
    bfd: Bfd,
    #[serde(default)]
    allow_own_as: u8,
    #[serde(default)]
    max_prefixes: u32,
}

/// BFD towards a neighbor.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Bfd {
    Enabled(bool),
    Table(BfdTable),
}

impl Default for Bfd {
    fn default() -> Self {
        Self::Enabled(false)
    }
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BfdTable {
    /// Without it: single hop to external neighbors, multihop to internal ones.
    multihop: Option<bool>,
    /// Milliseconds.
    transmit_interval: Option<NonZeroU16>,
    /// Milliseconds.
    receive_interval: Option<NonZeroU16>,
    multiplier: Option<NonZeroU8>,
}

impl Bfd {
    fn settings(self, internal: bool) -> Option<bfd::Settings> {
        let table = match self {
            Self::Enabled(false) => return None,
            Self::Enabled(true) => BfdTable::default(),
            Self::Table(table) => table,
        };
        let hops = if table.multihop.unwrap_or(internal) {
            Hops::Multi
        } else {
            Hops::Single
        };
        let mut settings = bfd::Settings::new(hops);
        let interval = |set: Option<NonZeroU16>, default: Duration| {
            set.map_or(default, |ms| Duration::from_millis(ms.get().into()))
        };
        settings.transmit = interval(table.transmit_interval, settings.transmit);
        settings.receive = interval(table.receive_interval, settings.receive);
        settings.multiplier = table.multiplier.map_or(settings.multiplier, NonZeroU8::get);
        Some(settings)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FamilyName {
    Ipv4,
    Ipv6,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum NextHopRule {
    #[default]
    Auto,
    #[serde(rename = "self")]
    Own,
    Keep,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Announce {
    prefix: Cidr,
    local_pref: Option<u32>,
    med: Option<u32>,
    /// Of any kind: `A:B`, `A:B:C`, `rt:A:B`.
    #[serde(default)]
    communities: Vec<CommunityText>,
}

/// A community as text.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct CommunityText(AnyCommunity);

impl TryFrom<String> for CommunityText {
    type Error = CommunityParseError;

    fn try_from(text: String) -> Result<Self, CommunityParseError> {
        text.parse().map(Self)
    }
}

const fn default_port() -> u16 {
    179
}

const fn default_install() -> bool {
    true
}

/// What a file asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    /// Of the speaker.
    pub settings: Settings,
    /// Whether best paths are written into the kernel.
    pub install: bool,
}

/// Why a file cannot be used, in words for an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Not the format; the text names line and column.
    #[error("{0}")]
    Syntax(String),
    /// A value that does not fit to others.
    #[error("neighbor {0}: {1}")]
    Neighbor(IpAddr, &'static str),
    /// An address with two neighbors.
    #[error("neighbor {0} is there twice")]
    Twice(IpAddr),
    /// Identifier 0.0.0.0, or AS 0 (RFC 7607).
    #[error("{0}")]
    Identity(&'static str),
}

/// Reads a file.
pub fn parse(text: &str) -> Result<Configuration, FileError> {
    let file: File = toml::from_str(text).map_err(|e| FileError::Syntax(e.to_string()))?;
    if file.router_id.is_unspecified() {
        return Err(FileError::Identity("router-id must not be 0.0.0.0"));
    }
    if file.asn.0 == 0 {
        return Err(FileError::Identity("as must not be 0"));
    }
    let mut neighbours = BTreeMap::new();
    for neighbor in &file.neighbor {
        check(neighbor)?;
        if neighbours
            .insert(neighbor.address, neighbour(&file, neighbor))
            .is_some()
        {
            return Err(FileError::Twice(neighbor.address));
        }
    }
    let any = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let listen = if file.listen.is_empty() {
        any.to_vec()
    } else {
        file.listen.clone()
    };
    let routes = file.announce.iter().filter_map(|a| {
        let prefix = super::prefix(&a.prefix)?;
        let mut attributes = Attributes {
            local_pref: Some(a.local_pref.unwrap_or(100)),
            med: a.med,
            ..Attributes::default()
        };
        for community in &a.communities {
            match community.0 {
                AnyCommunity::Standard(community) => attributes.add_community(community),
                AnyCommunity::Large(community) => attributes.add_large_community(community),
                AnyCommunity::Extended(community) => attributes.add_ext_community(community),
            }
        }
        Some((
            prefix,
            LocalRoute {
                prefix,
                attributes,
                kind: LocalKind::Static,
                interface: None,
            },
        ))
    });
    let settings = Settings {
        router_id: file.router_id,
        local_as: file.asn.0,
        cluster_id: file.cluster_id,
        listen: listen
            .into_iter()
            .map(|ip| SocketAddr::new(ip, file.listen_port))
            .collect(),
        neighbours,
        originated: routes.collect(),
    };
    Ok(Configuration {
        settings,
        install: file.install,
    })
}

fn check(neighbor: &Neighbor) -> Result<(), FileError> {
    let refuse = |reason| Err(FileError::Neighbor(neighbor.address, reason));
    if neighbor.asn.0 == 0 {
        return refuse("as must not be 0");
    }
    if matches!(neighbor.hold_time, Some(1 | 2)) {
        return refuse("hold-time must be 0 or at least 3 seconds");
    }
    if neighbor
        .source
        .is_some_and(|s| s.is_ipv4() != neighbor.address.is_ipv4())
    {
        return refuse("source is of the other address family");
    }
    if neighbor.ttl_security == Some(0) {
        return refuse("ttl-security must be at least 1");
    }
    if neighbor
        .password
        .as_ref()
        .is_some_and(|p| p.is_empty() || p.len() > 80)
    {
        return refuse("password must have 1 to 80 octets");
    }
    Ok(())
}

fn neighbour(file: &File, from: &Neighbor) -> Neighbour {
    let local_as = from.local_as.unwrap_or(file.asn).0;
    let mut session = SessionSettings::new(local_as, file.router_id, Some(from.asn.0));
    session.port = from.port;
    session.source = from.source;
    session.protection = Protection {
        password: from.password.clone(),
        ttl_hops: from.ttl_security,
    };
    session.passive = from.passive;
    session.bfd = from.bfd.settings(local_as == from.asn.0);
    session.hold_time = from.hold_time.unwrap_or(session.hold_time);
    session.keepalive = from.keepalive;
    session.restart_time = from.restart_time.unwrap_or(session.restart_time);
    if let Some(seconds) = from.connect_retry {
        session.connect_retry = Duration::from_secs(seconds.get().into());
    }
    let own = if from.address.is_ipv4() {
        FamilySet::IPV4
    } else {
        FamilySet::IPV6
    };
    let named = from.families.iter().fold(FamilySet::EMPTY, |set, family| {
        set.union(match family {
            FamilyName::Ipv4 => FamilySet::IPV4,
            FamilyName::Ipv6 => FamilySet::IPV6,
        })
    });
    session.families = if named.is_empty() { own } else { named };
    // Nothing is refused by default: which routes leave the cluster is decided by the nodes' own rules.
    let mut exchange = Exchange::new(
        Arc::new(Policy::accept_all()),
        Arc::new(Policy::accept_all()),
    );
    exchange.next_hop = match from.next_hop {
        NextHopRule::Auto => NextHopMode::Auto,
        NextHopRule::Own => NextHopMode::SelfAddress,
        NextHopRule::Keep => NextHopMode::Keep,
    };
    exchange.local_v4 = from.next_hop_v4;
    exchange.local_v6 = from.next_hop_v6.map(NextHop::V6);
    exchange.reflector_client = from
        .route_reflector_client
        .then_some(file.cluster_id.unwrap_or(file.router_id));
    exchange.allow_own_as = from.allow_own_as;
    exchange.max_prefixes = from.max_prefixes;
    Neighbour {
        name: from.description.clone(),
        origin: Origin::Static,
        session,
        exchange,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_file_has_calicos_intervals_and_the_family_of_each_address() {
        let settings = parse(
            "router-id = \"10.0.1.254\"\nas = 64513\n[[neighbor]]\naddress = \"10.0.1.1\"\nas = 64512\n\
             [[neighbor]]\naddress = \"fd00::1\"\nas = \"1.1\"\n[[announce]]\nprefix = \"203.0.113.0/24\"\n",
        )
        .unwrap()
        .settings;
        let v4 = &settings.neighbours[&"10.0.1.1".parse::<IpAddr>().unwrap()];
        assert_eq!(
            (v4.session.port, v4.session.hold_time, v4.session.families),
            (179, 240, FamilySet::IPV4)
        );
        let v6 = &settings.neighbours[&"fd00::1".parse::<IpAddr>().unwrap()];
        assert_eq!(
            (v6.session.remote_as, v6.session.families),
            (Some(65537), FamilySet::IPV6)
        );
        assert_eq!(settings.listen.len(), 2);
        assert!(
            settings
                .originated
                .contains_key(&"203.0.113.0/24".parse().unwrap())
        );
    }

    #[test]
    fn faults_are_named_with_their_place() {
        let head = "router-id = \"10.0.1.254\"\nas = 64513\n";
        let cases = [
            ("router-id = \"10.0.1.254\"\n", "missing field `as`"),
            ("router-id = \"0.0.0.0\"\nas = 1\n", "router-id"),
            (&format!("{head}color = 1\n"), "unknown field `color`"),
            (
                &format!("{head}[[neighbor]]\naddress = \"10.0.1\"\nas = 1\n"),
                "line 4",
            ),
            (
                &format!("{head}[[neighbor]]\naddress = \"10.0.1.1\"\nas = 1\nhold-time = 2\n"),
                "hold-time",
            ),
            (
                &format!("{head}[[announce]]\nprefix = \"10.0.0.1/24\"\n"),
                "bits set after its prefix",
            ),
            (
                &format!(
                    "{head}[[announce]]\nprefix = \"10.0.0.0/24\"\ncommunities = [\"1:70000\"]\n"
                ),
                "\"1:70000\" is no community",
            ),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}\n{error}");
        }
    }

    #[test]
    fn bfd_follows_the_distance_of_a_neighbor_unless_the_file_says_otherwise() {
        let text = |bfd: &str| {
            format!(
                "router-id = \"10.0.1.254\"\nas = 1\n[[neighbor]]\naddress = \"10.0.1.1\"\nas = 1\nbfd = {bfd}\n\
                 [[neighbor]]\naddress = \"10.0.1.2\"\nas = 2\nbfd = {bfd}\n"
            )
        };
        let read = |bfd: &str| {
            let neighbours = parse(&text(bfd)).unwrap().settings.neighbours;
            let settings: Vec<_> = neighbours.values().map(|n| n.session.bfd).collect();
            (settings[0], settings[1])
        };
        let default = |hops| Some(bfd::Settings::new(hops));
        assert_eq!(read("true"), (default(Hops::Multi), default(Hops::Single)));
        assert_eq!(read("false"), (None, None));
        let (internal, external) =
            read("{ multihop = false, transmit-interval = 50, multiplier = 5 }");
        let expected = bfd::Settings {
            transmit: Duration::from_millis(50),
            multiplier: 5,
            ..bfd::Settings::new(Hops::Single)
        };
        assert_eq!((internal, external), (Some(expected), Some(expected)));
    }

    #[test]
    fn one_address_is_one_neighbor() {
        let text = "router-id = \"10.0.1.254\"\nas = 64513\n[[neighbor]]\naddress = \"10.0.1.1\"\nas = 1\n\
                    [[neighbor]]\naddress = \"10.0.1.1\"\nas = 2\n";
        assert_eq!(
            parse(text).unwrap_err(),
            FileError::Twice("10.0.1.1".parse().unwrap())
        );
    }
}
