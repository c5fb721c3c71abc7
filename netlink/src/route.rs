//! Routes: the model that is asked for and reported.
//!
//! A [`Route`] read back from the kernel equals the [`Route`] written, once the written one is [`Route::normalised`]:
//! the decoder drops what the kernel adds on its own (the `lo` device of an IPv6 blackhole, the expanded next hop of
//! a nexthop object, offload and dead flags).

use std::{fmt, net::IpAddr};

use ipnetwork::IpNetwork;

use crate::link::IfIndex;

/// The main routing table (`RT_TABLE_MAIN`, `include/uapi/linux/rtnetlink.h`).
pub const TABLE_MAIN: u32 = 254;
/// Index of `lo` in every namespace (`LOOPBACK_IFINDEX`, `include/net/flow.h`).
const LOOPBACK: IfIndex = 1;
/// The local routing table (`RT_TABLE_LOCAL`).
pub const TABLE_LOCAL: u32 = 255;

/// Route protocol numbers (`/etc/iproute2/rt_protos`).
pub mod protocol {
    /// Any protocol (only in filters and deletions).
    pub const UNSPEC: u8 = 0;
    /// Added by the kernel itself.
    pub const KERNEL: u8 = 2;
    /// Added at boot (what `ip route add` uses).
    pub const BOOT: u8 = 3;
    /// Added by the administrator.
    pub const STATIC: u8 = 4;
    /// BIRD; what users of Calico see on BGP-learned routes.
    pub const BIRD: u8 = 12;
    /// Felix' routes in Calico.
    pub const FELIX: u8 = 80;
    /// BGP.
    pub const BGP: u8 = 186;
}

/// What happens to a packet that matches the route (`RTN_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum RouteKind {
    /// Forwarded over the target.
    #[default]
    Unicast,
    /// Delivered locally.
    Local,
    /// Delivered locally as a broadcast.
    Broadcast,
    /// Dropped without an answer.
    Blackhole,
    /// Dropped with ICMP host unreachable.
    Unreachable,
    /// Dropped with ICMP administratively prohibited.
    Prohibit,
    /// Lookup goes on in the next rule's table.
    Throw,
    /// Any other kind, by number.
    Other(u8),
}

/// How far the destination is (`RT_SCOPE_*`). IPv6 knows only `Global`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Scope {
    /// Beyond a gateway, or not directly attached.
    #[default]
    Global,
    /// On the attached link.
    Link,
    /// On this host.
    Host,
    /// Any other scope, by number.
    Other(u8),
}

/// One way out: a device, a gateway, or both.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hop {
    /// Output device.
    pub oif: Option<IfIndex>,
    /// Gateway; may be IPv6 for an IPv4 route (RFC 8950, `RTA_VIA`).
    pub gateway: Option<IpAddr>,
    /// The gateway is reachable on the device although no subnet says so (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// Share of the traffic in a multipath route, 1..=256.
    pub weight: u16,
}

impl Hop {
    /// Straight out of a device.
    pub fn device(oif: IfIndex) -> Self {
        Self {
            oif: Some(oif),
            gateway: None,
            onlink: false,
            weight: 1,
        }
    }

    /// To a gateway over a device.
    pub fn via(gateway: IpAddr, oif: IfIndex) -> Self {
        Self {
            oif: Some(oif),
            gateway: Some(gateway),
            onlink: false,
            weight: 1,
        }
    }

    /// The same hop with the onlink flag.
    #[must_use]
    pub fn onlink(mut self) -> Self {
        self.onlink = true;
        self
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Target {
    /// Nowhere: blackhole and its like.
    #[default]
    None,
    /// One hop.
    Hop(Hop),
    /// Several hops, by weight.
    Multipath(Vec<Hop>),
    /// A nexthop object ([`crate::Nexthop`]).
    Nexthop(u32),
}

/// One row of a routing table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Destination; host bits are ignored.
    pub prefix: IpNetwork,
    /// Table id.
    pub table: u32,
    /// Metric; smaller wins. IPv6: 0 means 1024 ([`Route::normalised`]).
    pub metric: u32,
    /// Who wrote it ([`protocol`]).
    pub protocol: u8,
    /// What happens to packets.
    pub kind: RouteKind,
    /// Scope (IPv4).
    pub scope: Scope,
    /// Preferred source address (`RTA_PREFSRC`).
    pub source: Option<IpAddr>,
    /// Path MTU towards the destination (`RTAX_MTU`).
    pub mtu: Option<u32>,
    /// Where it leads.
    pub target: Target,
}

/// What identifies a row: the kernel replaces the row with the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// Table id.
    pub table: u32,
    /// Destination without host bits.
    pub prefix: IpNetwork,
    /// Metric as the kernel reports it.
    pub metric: u32,
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.prefix)?;
        if self.table != TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        Ok(())
    }
}

/// The same prefix without host bits.
pub fn canonical(prefix: IpNetwork) -> IpNetwork {
    IpNetwork::new(prefix.network(), prefix.prefix()).unwrap_or(prefix)
}

impl Route {
    /// A unicast route in the main table with nothing else set.
    pub fn new(prefix: IpNetwork, protocol: u8, target: Target) -> Self {
        Self {
            prefix: canonical(prefix),
            table: TABLE_MAIN,
            metric: 0,
            protocol,
            kind: RouteKind::Unicast,
            scope: Scope::Global,
            source: None,
            mtu: None,
            target,
        }
    }

    /// A blackhole in the main table.
    pub fn blackhole(prefix: IpNetwork, protocol: u8) -> Self {
        Self {
            kind: RouteKind::Blackhole,
            ..Self::new(prefix, protocol, Target::None)
        }
    }

    /// Taken by this host itself, as its own addresses are: `local X dev lo table local`.
    pub fn local(prefix: IpNetwork, protocol: u8) -> Self {
        Self {
            table: TABLE_LOCAL,
            kind: RouteKind::Local,
            scope: Scope::Host,
            ..Self::new(prefix, protocol, Target::Hop(Hop::device(LOOPBACK)))
        }
    }

    /// A directly attached destination: `dev X scope link`.
    pub fn on_device(prefix: IpNetwork, protocol: u8, oif: IfIndex) -> Self {
        Self {
            scope: Scope::Link,
            ..Self::new(prefix, protocol, Target::Hop(Hop::device(oif)))
        }
    }

    /// What the kernel will report after this route has been written.
    #[must_use]
    pub fn normalised(mut self) -> Self {
        self.prefix = canonical(self.prefix);
        if self.prefix.is_ipv6() {
            self.scope = Scope::Global;
            if self.metric == 0 {
                self.metric = 1024;
            }
        }
        if !matches!(
            self.kind,
            RouteKind::Unicast | RouteKind::Local | RouteKind::Broadcast | RouteKind::Other(_)
        ) {
            self.target = Target::None;
        }
        if let Target::Multipath(hops) = &mut self.target
            && hops.len() == 1
            && let Some(mut hop) = hops.pop()
        {
            hop.weight = 1;
            self.target = Target::Hop(hop);
        }
        self
    }

    /// What identifies this row.
    pub fn key(&self) -> RouteKey {
        let metric = if self.metric == 0 && self.prefix.is_ipv6() {
            1024
        } else {
            self.metric
        };
        RouteKey {
            table: self.table,
            prefix: canonical(self.prefix),
            metric,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            RouteKind::Unicast => {}
            RouteKind::Other(kind) => write!(f, "kind {kind} ")?,
            kind => write!(f, "{} ", format!("{kind:?}").to_lowercase())?,
        }
        write!(f, "{}", self.prefix)?;
        let hop = |f: &mut fmt::Formatter<'_>, hop: &Hop| {
            if let Some(gateway) = hop.gateway {
                write!(f, " via {gateway}")?;
            }
            if let Some(oif) = hop.oif {
                write!(f, " dev #{oif}")?;
            }
            if hop.onlink {
                f.write_str(" onlink")?;
            }
            Ok(())
        };
        match &self.target {
            Target::None => {}
            Target::Hop(one) => hop(f, one)?,
            Target::Multipath(hops) => {
                for one in hops {
                    f.write_str(" nexthop")?;
                    hop(f, one)?;
                    write!(f, " weight {}", one.weight)?;
                }
            }
            Target::Nexthop(id) => write!(f, " nhid {id}")?,
        }
        if self.table != TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        write!(f, " proto {}", self.protocol)?;
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        Ok(())
    }
}

/// Which routes a dump returns; the kernel filters (strict checking), so a dump costs what it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RouteFilter {
    /// `Some(true)`: only IPv6; `Some(false)`: only IPv4; `None`: both.
    pub v6: Option<bool>,
    /// Only this table; `None`: all.
    pub table: Option<u32>,
    /// Only this protocol; `None`: all.
    pub protocol: Option<u8>,
    /// Only routes over this device; `None`: all.
    pub oif: Option<IfIndex>,
}

/// The kernel's decision for one destination (`RTM_GETROUTE`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteDecision {
    /// What happens to the packet.
    pub kind: RouteKind,
    /// Output device.
    pub oif: Option<IfIndex>,
    /// Gateway.
    pub gateway: Option<IpAddr>,
    /// Source address the kernel would choose.
    pub source: Option<IpAddr>,
    /// Table of the row that matched.
    pub table: u32,
    /// Path MTU, if one is set on the route.
    pub mtu: Option<u32>,
}
