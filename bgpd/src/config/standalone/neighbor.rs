//! What the file says about neighbors: one by one, in groups that neighbors share, and as ranges of addresses.
//!
//! All three have the same keys. A neighbor or range that names a group has the group's value of each key that it does
//! not have itself.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU8, NonZeroU16};
use std::sync::Arc;
use std::time::Duration;

use cali_api::{Asn, Cidr};
use cali_control::status::PeerKind as Origin;
use serde::Deserialize;

use super::{File, FileError};
use crate::bfd::{self, Hops};
use crate::policy::Policy;
use crate::rib::NextHopMode;
use crate::speaker::settings::{Exchange, Neighbour, Range, SessionSettings};
use crate::transport::Protection;
use crate::wire::{AddPathMode, FamilySet, NextHop};

/// Most neighbors of a range that sets no limit.
const RANGE_LIMIT: u16 = 100;
/// Longest time of the capability's 24 bits (RFC 9494 §3.1).
const LONG_LIVED_LIMIT: u32 = 0x00ff_ffff;

/// The keys of `[[neighbor]]`, `[[range]]` and `[group.NAME]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Keys {
    /// Of a neighbor.
    address: Option<IpAddr>,
    /// Of a range.
    prefix: Option<Cidr>,
    /// Most neighbors of a range at a time.
    limit: Option<NonZeroU16>,
    group: Option<String>,
    /// A range may do without: then any AS.
    #[serde(rename = "as")]
    asn: Option<Asn>,
    description: Option<String>,
    port: Option<u16>,
    local_as: Option<Asn>,
    source: Option<IpAddr>,
    /// Of a link-local neighbor.
    interface: Option<String>,
    password: Option<String>,
    ttl_security: Option<u8>,
    passive: Option<bool>,
    hold_time: Option<u16>,
    keepalive: Option<u16>,
    restart_time: Option<u16>,
    /// Seconds; long-lived graceful restart.
    long_lived_stale_time: Option<u32>,
    /// Seconds between dials.
    connect_retry: Option<NonZeroU16>,
    families: Option<Vec<FamilyName>>,
    add_path: Option<AddPath>,
    /// IPv4 routes with IPv6 next hops.
    extended_next_hop: Option<bool>,
    next_hop: Option<NextHopRule>,
    /// Our address as next hop of routes of the other family.
    next_hop_v4: Option<Ipv4Addr>,
    next_hop_v6: Option<Ipv6Addr>,
    route_reflector_client: Option<bool>,
    /// Watches the path by BFD: `true`, or a table.
    bfd: Option<Bfd>,
    allow_own_as: Option<u8>,
    max_prefixes: Option<u32>,
}

macro_rules! or_from {
    ($own:ident, $group:ident: $($key:ident)*) => {
        Keys { $($key: $own.$key.clone().or_else(|| $group.$key.clone()),)* ..$own.clone() }
    };
}

impl Keys {
    fn with_group(&self, groups: &BTreeMap<String, Self>) -> Result<Self, FileError> {
        let Some(name) = &self.group else {
            return Ok(self.clone());
        };
        let group = groups
            .get(name)
            .ok_or_else(|| self.refuse(format!("there is no group {name:?}")))?;
        Ok(
            or_from!(self, group: limit asn description port local_as source interface password ttl_security passive
            hold_time keepalive restart_time long_lived_stale_time connect_retry families add_path extended_next_hop
            next_hop next_hop_v4 next_hop_v6 route_reflector_client bfd allow_own_as max_prefixes),
        )
    }

    fn refuse(&self, reason: impl Into<String>) -> FileError {
        let name = match (&self.address, &self.prefix) {
            (Some(address), _) => format!("neighbor {address}"),
            (None, Some(prefix)) => format!("range {prefix}"),
            (None, None) => "neighbor".to_owned(),
        };
        FileError::Neighbor(name, reason.into())
    }
}

/// BFD towards a neighbor.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Bfd {
    Enabled(bool),
    Table(BfdTable),
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

/// `true`, `false`, `"send"` or `"receive"`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum AddPath {
    Both(bool),
    One(Direction),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Direction {
    Send,
    Receive,
}

impl AddPath {
    const fn mode(self) -> AddPathMode {
        match self {
            Self::Both(false) => AddPathMode::OFF,
            Self::Both(true) => AddPathMode::BOTH,
            Self::One(Direction::Send) => AddPathMode {
                send: true,
                receive: false,
            },
            Self::One(Direction::Receive) => AddPathMode {
                send: false,
                receive: true,
            },
        }
    }
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

/// All neighbors of a file.
pub(super) fn neighbours(file: &File) -> Result<BTreeMap<IpAddr, Neighbour>, FileError> {
    let mut out = BTreeMap::new();
    for keys in &file.neighbor {
        let keys = keys.with_group(&file.group)?;
        let address = keys
            .address
            .ok_or_else(|| keys.refuse("has no address".to_owned()))?;
        if keys.prefix.is_some() || keys.limit.is_some() {
            return Err(keys.refuse("prefix and limit belong to a range"));
        }
        if keys.asn.is_none() {
            return Err(keys.refuse("has no as, and neither has its group"));
        }
        check(&keys, address)?;
        let link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if link_local != keys.interface.is_some() {
            return Err(keys.refuse("interface is for link-local addresses, which need it"));
        }
        if link_local && keys.bfd.is_some() {
            return Err(keys.refuse("bfd does not watch link-local addresses yet"));
        }
        if out
            .insert(address, neighbour(file, &keys, address))
            .is_some()
        {
            return Err(FileError::Twice(address));
        }
    }
    Ok(out)
}

/// All ranges of a file.
pub(super) fn ranges(file: &File) -> Result<Vec<Range>, FileError> {
    let mut out: Vec<Range> = Vec::new();
    for keys in &file.range {
        let keys = keys.with_group(&file.group)?;
        let cidr = keys.prefix.ok_or_else(|| keys.refuse("has no prefix"))?;
        let prefix = super::super::prefix(&cidr)
            .ok_or_else(|| keys.refuse("its prefix is longer than an address"))?;
        if keys.address.is_some() || keys.bfd.is_some() || keys.interface.is_some() {
            return Err(keys.refuse("address, bfd and interface belong to a neighbor"));
        }
        check(&keys, prefix.addr())?;
        if out.iter().any(|range| range.prefix == prefix) {
            return Err(keys.refuse("is there twice"));
        }
        out.push(Range {
            prefix,
            limit: keys.limit.map_or(RANGE_LIMIT, NonZeroU16::get),
            neighbour: neighbour(file, &keys, prefix.addr()),
        });
    }
    Ok(out)
}

fn check(keys: &Keys, address: IpAddr) -> Result<(), FileError> {
    let refuse = |reason: &str| Err(keys.refuse(reason));
    if keys.asn == Some(Asn(0)) || keys.local_as == Some(Asn(0)) {
        return refuse("as and local-as must not be 0");
    }
    if matches!(keys.hold_time, Some(1 | 2)) {
        return refuse("hold-time must be 0 or at least 3 seconds");
    }
    if keys
        .source
        .is_some_and(|s| s.is_ipv4() != address.is_ipv4())
    {
        return refuse("source is of the other address family");
    }
    if keys.ttl_security == Some(0) {
        return refuse("ttl-security must be at least 1");
    }
    if keys
        .password
        .as_ref()
        .is_some_and(|p| p.is_empty() || p.len() > 80)
    {
        return refuse("password must have 1 to 80 octets");
    }
    if keys
        .long_lived_stale_time
        .is_some_and(|t| t > LONG_LIVED_LIMIT)
    {
        return refuse("long-lived-stale-time must be at most 16777215 seconds");
    }
    if keys.long_lived_stale_time.is_some() && keys.restart_time == Some(0) {
        return refuse(
            "long-lived-stale-time needs graceful restart, which restart-time 0 turns off",
        );
    }
    Ok(())
}

fn session(file: &File, from: &Keys, address: IpAddr) -> SessionSettings {
    let local_as = from.local_as.unwrap_or(file.asn).0;
    let remote_as = from.asn.map(|asn| asn.0);
    let mut session = SessionSettings::new(local_as, file.router_id, remote_as);
    session.port = from.port.unwrap_or(session.port);
    session.source = from.source;
    session.interface = from.interface.as_deref().map(Arc::from);
    session.protection = Protection {
        password: from.password.clone(),
        ttl_hops: from.ttl_security,
    };
    session.passive = from.passive.unwrap_or_default();
    session.bfd = from
        .bfd
        .and_then(|bfd| bfd.settings(remote_as == Some(local_as)));
    session.hold_time = from.hold_time.unwrap_or(session.hold_time);
    session.keepalive = from.keepalive;
    session.restart_time = from.restart_time.unwrap_or(session.restart_time);
    session.long_lived = from.long_lived_stale_time;
    if let Some(seconds) = from.connect_retry {
        session.connect_retry = Duration::from_secs(seconds.get().into());
    }
    let own = if address.is_ipv4() {
        FamilySet::IPV4
    } else {
        FamilySet::IPV6
    };
    let families = from.families.iter().flatten();
    let named = families.fold(FamilySet::EMPTY, |set, family| {
        set.union(match family {
            FamilyName::Ipv4 => FamilySet::IPV4,
            FamilyName::Ipv6 => FamilySet::IPV6,
        })
    });
    session.families = if named.is_empty() { own } else { named };
    session.add_path = from.add_path.map_or(AddPathMode::OFF, AddPath::mode);
    session.extended_next_hop = from.extended_next_hop.unwrap_or_default();
    session
}

fn neighbour(file: &File, from: &Keys, address: IpAddr) -> Neighbour {
    // Nothing is refused by default: which routes leave the cluster is decided by the nodes' own rules.
    let mut exchange = Exchange::new(
        Arc::new(Policy::accept_all()),
        Arc::new(Policy::accept_all()),
    );
    exchange.next_hop = match from.next_hop.unwrap_or_default() {
        NextHopRule::Auto => NextHopMode::Auto,
        NextHopRule::Own => NextHopMode::SelfAddress,
        NextHopRule::Keep => NextHopMode::Keep,
    };
    exchange.local_v4 = from.next_hop_v4;
    exchange.local_v6 = from.next_hop_v6.map(NextHop::V6);
    exchange.reflector_client = from
        .route_reflector_client
        .unwrap_or_default()
        .then_some(file.cluster_id.unwrap_or(file.router_id));
    exchange.allow_own_as = from.allow_own_as.unwrap_or_default();
    exchange.max_prefixes = from.max_prefixes.unwrap_or_default();
    Neighbour {
        name: from.description.clone(),
        origin: Origin::Static,
        session: session(file, from, address),
        exchange,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Configuration, parse};
    use super::*;

    const HEAD: &str = "router-id = \"10.0.1.254\"\nas = 64513\n";

    fn read(text: &str) -> Configuration {
        parse(&format!("{HEAD}{text}")).unwrap()
    }

    fn only(text: &str) -> Neighbour {
        let neighbours = read(text).settings.neighbours;
        neighbours.into_values().next().unwrap()
    }

    #[test]
    fn bfd_follows_the_distance_of_a_neighbor_unless_the_file_says_otherwise() {
        let text = |bfd: &str| {
            format!(
                "[[neighbor]]\naddress = \"10.0.1.1\"\nas = 64513\nbfd = {bfd}\n\
                 [[neighbor]]\naddress = \"10.0.1.2\"\nas = 2\nbfd = {bfd}\n"
            )
        };
        let of = |bfd: &str| {
            let neighbours = read(&text(bfd)).settings.neighbours;
            let settings: Vec<_> = neighbours.values().map(|n| n.session.bfd).collect();
            (settings[0], settings[1])
        };
        let default = |hops| Some(bfd::Settings::new(hops));
        assert_eq!(of("true"), (default(Hops::Multi), default(Hops::Single)));
        assert_eq!(of("false"), (None, None));
        let (internal, external) =
            of("{ multihop = false, transmit-interval = 50, multiplier = 5 }");
        let expected = bfd::Settings {
            transmit: Duration::from_millis(50),
            multiplier: 5,
            ..bfd::Settings::new(Hops::Single)
        };
        assert_eq!((internal, external), (Some(expected), Some(expected)));
    }

    #[test]
    fn a_neighbor_has_the_keys_of_its_group_unless_it_has_its_own() {
        let neighbours = read(
            "[group.leaf]\nas = 64520\nadd-path = \"receive\"\npassword = \"secret\"\nroute-reflector-client = true\n\
             [[neighbor]]\naddress = \"10.0.1.1\"\ngroup = \"leaf\"\n\
             [[neighbor]]\naddress = \"10.0.1.2\"\ngroup = \"leaf\"\nas = 64521\nadd-path = true\n",
        )
        .settings
        .neighbours;
        let seen: Vec<_> = neighbours
            .values()
            .map(|n| (n.session.remote_as, n.session.add_path))
            .collect();
        let receive = AddPathMode {
            send: false,
            receive: true,
        };
        assert_eq!(
            seen,
            [(Some(64520), receive), (Some(64521), AddPathMode::BOTH)]
        );
        assert!(
            neighbours
                .values()
                .all(|n| n.session.protection.password.as_deref() == Some("secret"))
        );
    }

    #[test]
    fn a_range_takes_any_as_and_has_a_limit() {
        let ranges = read("[[range]]\nprefix = \"10.1.0.0/16\"\nlimit = 7\n")
            .settings
            .ranges;
        assert_eq!(ranges.len(), 1);
        assert_eq!(
            (ranges[0].limit, ranges[0].neighbour.session.remote_as),
            (7, None)
        );
        let ranges = read("[[range]]\nprefix = \"fd00::/64\"\nas = 64520\n")
            .settings
            .ranges;
        assert_eq!(ranges[0].limit, RANGE_LIMIT);
        assert_eq!(ranges[0].neighbour.session.families, FamilySet::IPV6);
    }

    #[test]
    fn every_key_of_a_session_has_its_effect() {
        let neighbour = only(
            "[[neighbor]]\naddress = \"fe80::1\"\ninterface = \"eth0\"\nas = 64520\nlocal-as = 64999\npassive = true\n\
             ttl-security = 1\nlong-lived-stale-time = 3600\nextended-next-hop = true\nfamilies = [\"ipv4\", \"ipv6\"]\n\
             allow-own-as = 2\nnext-hop = \"self\"\n",
        );
        let session = &neighbour.session;
        assert_eq!(session.interface.as_deref(), Some("eth0"));
        assert_eq!((session.local_as, session.passive), (64999, true));
        assert_eq!(session.protection.ttl_hops, Some(1));
        assert_eq!(session.long_lived, Some(3600));
        assert!(session.extended_next_hop);
        assert_eq!(session.families, FamilySet::ALL);
        assert_eq!(neighbour.exchange.allow_own_as, 2);
        assert_eq!(neighbour.exchange.next_hop, NextHopMode::SelfAddress);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for (text, expected) in [
            ("[[neighbor]]\naddress = \"10.0.1.1\"\n", "has no as"),
            ("[[neighbor]]\nas = 1\n", "has no address"),
            (
                "[[neighbor]]\naddress = \"10.0.1.1\"\ngroup = \"leaf\"\n",
                "no group \"leaf\"",
            ),
            (
                "[[neighbor]]\naddress = \"fe80::1\"\nas = 1\n",
                "link-local",
            ),
            ("[[range]]\nas = 1\n", "has no prefix"),
            (
                "[[range]]\nprefix = \"10.0.0.0/8\"\nbfd = true\n",
                "range 10.0.0.0/8",
            ),
            (
                "[[neighbor]]\naddress = \"10.0.1.1\"\nas = 1\nrestart-time = 0\nlong-lived-stale-time = 60\n",
                "needs graceful restart",
            ),
        ] {
            let error = parse(&format!("{HEAD}{text}")).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}\n{error}");
        }
    }
}
