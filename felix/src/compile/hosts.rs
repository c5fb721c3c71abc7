//! Host endpoints: which interface has which, their chains, and the ways to them.
//!
//! A node has few of them, so that every change works all of them out anew; what comes out the same is not touched.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::Key as ObjectKey;
use cali_api::v3::ProtoPort;
use cali_netlink::nft::{
    Chain, DataType, Elem, Expr, Key, KeyType, Meta, Rule as NftRule, Set, Verdict, ct_state,
};

use super::base::accept_neighbour_discovery;
use super::compiler::Compiler;
use super::expr::{self, Side, counter};
use super::host_policy::KeptOpen;
use super::names;
use super::program::{ChainProgram, SetProgram};
use super::settings::Settings;
use super::stack::{Place, Stack, comment};
use crate::calc::{Direction, HostEndpoint, HostInterface, PortRange, Stage};

/// A place in the packets' way where host endpoints are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Site {
    RawIn,
    RawOut,
    DnatIn,
    ForwardIn,
    ForwardOut,
    In,
    Out,
    /// What the host sends and translates on the way out: only here the interface is the right one.
    Post,
}

pub(crate) const SITES: [Site; 8] = [
    Site::RawIn,
    Site::RawOut,
    Site::DnatIn,
    Site::ForwardIn,
    Site::ForwardOut,
    Site::In,
    Site::Out,
    Site::Post,
];

impl Site {
    pub(crate) const fn stage(self) -> Stage {
        match self {
            Self::RawIn | Self::RawOut => Stage::Untracked,
            Self::DnatIn => Stage::PreDnat,
            Self::ForwardIn | Self::ForwardOut => Stage::Forward,
            Self::In | Self::Out | Self::Post => Stage::Normal,
        }
    }

    const fn place(self) -> Place {
        match self {
            Self::RawIn | Self::RawOut => Place::Untracked,
            Self::DnatIn => Place::PreDnat,
            Self::ForwardIn | Self::ForwardOut => Place::Forward,
            Self::In | Self::Out => Place::Endpoint,
            Self::Post => Place::Postrouting,
        }
    }

    pub(crate) const fn direction(self) -> Direction {
        match self {
            Self::RawIn | Self::DnatIn | Self::ForwardIn | Self::In => Direction::Ingress,
            Self::RawOut | Self::ForwardOut | Self::Out | Self::Post => Direction::Egress,
        }
    }

    /// Whether a host endpoint has anything to say here.
    pub(crate) fn asks(self, host: &HostEndpoint) -> bool {
        self.stage() == Stage::Normal || !host.stage(self.stage()).of(self.direction()).is_empty()
    }

    /// What of a packet says whose it is.
    pub(super) const fn interface(self) -> Meta {
        match self.direction() {
            Direction::Ingress => Meta::IifName,
            Direction::Egress => Meta::OifName,
        }
    }

    /// The verdict map from interfaces to chains.
    pub(super) const fn map(self) -> &'static str {
        match self {
            Self::RawIn => "cali-from-host-raw",
            Self::RawOut => "cali-to-host-raw",
            Self::DnatIn => "cali-from-host-dnat",
            Self::ForwardIn => "cali-from-host-fw",
            Self::ForwardOut => "cali-to-host-fw",
            Self::In => "cali-from-host",
            Self::Out => "cali-to-host",
            Self::Post => "cali-to-host-post",
        }
    }

    pub(crate) const fn prefix(self) -> &'static str {
        match self {
            Self::RawIn => "cali-fhr-",
            Self::RawOut => "cali-thr-",
            Self::DnatIn => "cali-fhd-",
            Self::ForwardIn => "cali-fhfw-",
            Self::ForwardOut => "cali-thfw-",
            Self::In => "cali-fh-",
            Self::Out => "cali-th-",
            Self::Post => "cali-thp-",
        }
    }

    /// The chain of an interface; that of `*` where none is given.
    pub(super) fn chain(self, interface: Option<&str>) -> Arc<str> {
        // Calico's name for the chains of `*`. No interface can have it: it is too long.
        let interface = interface.unwrap_or("any-interface-at-all");
        names::host_chain(self.prefix(), interface)
    }

    /// Whether `*` counts here. Calico knows no untracked policy for it.
    pub(crate) const fn knows_all(self) -> bool {
        !matches!(self, Self::RawIn | Self::RawOut)
    }
}

/// Where host endpoints are asked at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Shape {
    /// There are chains for single interfaces.
    pub(super) named: BTreeSet<Site>,
    /// There is a chain for all others.
    pub(super) all: BTreeSet<Site>,
}

impl Shape {
    /// Whether anything is asked at a site.
    pub(super) fn has(&self, site: Site) -> bool {
        self.named.contains(&site) || self.all.contains(&site)
    }

    /// Whether a packet can be accepted before the host endpoint's later stages see it.
    pub(super) fn accepts_early(&self) -> bool {
        [Site::RawIn, Site::RawOut, Site::DnatIn]
            .into_iter()
            .any(|site| self.has(site))
    }
}

/// The host endpoints of the node, and what was written for them.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    known: BTreeMap<ObjectKey, Arc<HostEndpoint>>,
    /// Addresses of the node's interfaces.
    interfaces: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    pub(super) shape: Shape,
    chains: BTreeSet<Arc<str>>,
    stacks: Vec<Arc<str>>,
}

/// Whose each interface is; `None` stands for all others.
pub(crate) type Placed = BTreeMap<Option<Arc<str>>, (ObjectKey, Arc<HostEndpoint>)>;

/// Whose each interface is: of those that name it the first by name, or else of those that expect
/// one of its addresses. `None` stands for all other interfaces.
pub(crate) fn placed(
    known: &BTreeMap<ObjectKey, Arc<HostEndpoint>>,
    interfaces: &BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
) -> Placed {
    let mut placed = Placed::new();
    let mut put = |interface: Option<&Arc<str>>, id: &ObjectKey, host: &Arc<HostEndpoint>| {
        placed
            .entry(interface.cloned())
            .or_insert_with(|| (id.clone(), host.clone()));
    };
    for (id, host) in known {
        match &host.interface {
            HostInterface::Named(name) => put(Some(name), id, host),
            HostInterface::All => put(None, id, host),
            HostInterface::ByAddress => {}
        }
    }
    for (id, host) in known {
        if host.interface == HostInterface::ByAddress {
            let expected = |addresses: &BTreeSet<IpAddr>| {
                host.addresses.iter().any(|addr| addresses.contains(addr))
            };
            for (interface, _) in interfaces.iter().filter(|(_, has)| expected(has)) {
                put(Some(interface), id, host);
            }
        }
    }
    placed
}

impl Hosts {
    pub(super) fn placed(&self) -> Placed {
        placed(&self.known, &self.interfaces)
    }

    /// The interfaces with their addresses.
    pub(super) fn interfaces(&self) -> impl Iterator<Item = (&Arc<str>, &BTreeSet<IpAddr>)> {
        self.interfaces.iter()
    }

    /// The interfaces that have an address.
    pub(super) fn interfaces_of(&self, address: IpAddr) -> impl Iterator<Item = &Arc<str>> {
        let having = self
            .interfaces
            .iter()
            .filter(move |(_, has)| has.contains(&address));
        having.map(|(interface, _)| interface)
    }

    /// The addresses of an interface, or of all.
    pub(super) fn addresses(&self, interface: Option<&str>) -> impl Iterator<Item = IpAddr> {
        let named = self.interfaces.iter();
        named
            .filter(move |(name, _)| interface.is_none_or(|wanted| wanted == &***name))
            .flat_map(|(_, addresses)| addresses.iter().copied())
    }

    /// Host endpoints that no interface of this node has now.
    pub(super) fn unplaced(&self) -> Vec<ObjectKey> {
        let placed = self.placed();
        let here = |id: &&ObjectKey| !placed.values().any(|(placed, _)| placed == *id);
        self.known.keys().filter(here).cloned().collect()
    }
}

impl Compiler {
    /// Tells the addresses of the node's own interfaces: host endpoints may be known by them.
    pub fn set_interfaces(&mut self, interfaces: BTreeMap<Arc<str>, BTreeSet<IpAddr>>) {
        if self.hosts.interfaces != interfaces {
            self.hosts.interfaces = interfaces;
            self.put_hosts();
            self.render_dirty();
        }
    }

    /// Host endpoints that are on no interface: none has one of their addresses, or another one has it.
    pub fn unplaced_hosts(&self) -> Vec<ObjectKey> {
        self.hosts.unplaced()
    }

    pub(super) fn put_host(&mut self, id: &ObjectKey, host: Option<&Arc<HostEndpoint>>) {
        // Its flows may be forbidden now: those of every address that it may be at.
        self.suspects.addresses.extend(self.hosts.addresses(None));
        match host {
            Some(host) => self.hosts.known.insert(id.clone(), host.clone()),
            None => self.hosts.known.remove(id),
        };
        self.put_hosts();
    }

    /// Writes all chains and maps of host endpoints anew.
    pub(super) fn put_hosts(&mut self) {
        let placed = self.hosts.placed();
        let (mut shape, mut chains, mut stacks) = (Shape::default(), BTreeSet::new(), Vec::new());
        for site in SITES {
            let asked = |host: &HostEndpoint| site.asks(host);
            let all = placed
                .get(&None)
                .is_some_and(|(_, host)| site.knows_all() && asked(host));
            let mut elements = Vec::new();
            for (interface, (id, host)) in &placed {
                let name = site.chain(interface.as_deref());
                match interface {
                    None if !all => continue,
                    Some(interface) if !asked(host) => {
                        // It has nothing to say here, and `*` is not asked instead.
                        if all {
                            let key = Key::ifname(interface);
                            elements.push(Elem::new(key).verdict(Verdict::Accept));
                        }
                        continue;
                    }
                    Some(interface) => {
                        let way = Verdict::Goto(name.clone());
                        elements.push(Elem::new(Key::ifname(interface)).verdict(way));
                    }
                    None => {
                        shape.all.insert(site);
                    }
                }
                let stack = self.acquire_stack(Stack {
                    place: site.place(),
                    direction: site.direction(),
                    tiers: host.stage(site.stage()).of(site.direction()).to_vec(),
                    profiles: match site.stage() {
                        Stage::Normal => host.profiles.clone(),
                        _ => Vec::new(),
                    },
                });
                let chain = chain(
                    (&self.settings, &self.kept_open),
                    site,
                    &name,
                    id,
                    stack.clone(),
                );
                self.desired.put_chain(chain);
                chains.insert(name);
                stacks.push(stack);
            }
            if elements.is_empty() {
                self.desired.remove_set(&site.map().into());
            } else {
                shape.named.insert(site);
                let map = Set::verdict_map(site.map(), KeyType::one(DataType::IfName));
                self.desired.put_set(SetProgram::new(map).with(elements));
            }
        }
        for gone in self.hosts.chains.difference(&chains) {
            self.desired.remove_chain(gone);
        }
        self.hosts.chains = chains;
        for former in std::mem::replace(&mut self.hosts.stacks, stacks) {
            self.release_stack(&former);
        }
        if self.hosts.shape != shape {
            self.hosts.shape = shape;
            self.put_base_chains();
        }
    }
}

/// The chain of one host endpoint at one site.
fn chain(
    (settings, kept): (&Settings, &KeptOpen),
    site: Site,
    name: &Arc<str>,
    id: &ObjectKey,
    stack: Arc<str>,
) -> ChainProgram {
    let accept = Expr::Verdict(Verdict::Accept);
    let mut rules = Vec::new();
    if site.stage() != Stage::Untracked && settings.drop_invalid {
        let drop = [counter(), Expr::Verdict(Verdict::Drop)];
        let exprs = [expr::ct_state_any(ct_state::INVALID).as_slice(), &drop].concat();
        rules.push(NftRule::new(exprs).comment("invalid"));
    }
    if site.stage() == Stage::Normal {
        rules.extend(accept_neighbour_discovery(true));
    }
    if site.stage() != Stage::Forward {
        let (own, other) = match site.direction() {
            Direction::Ingress => (&settings.failsafe_inbound, &settings.failsafe_outbound),
            Direction::Egress => (&settings.failsafe_outbound, &settings.failsafe_inbound),
        };
        let mut failsafe = |port: &ProtoPort, side: Side, text: &str| {
            let mut exprs = failsafe(port, side, site.direction());
            exprs.extend([counter(), accept.clone()]);
            rules.push(NftRule::new(exprs).comment(text));
        };
        for port in own {
            failsafe(port, Side::Destination, "failsafe port");
        }
        let (kept_own, kept_other) = match site.direction() {
            Direction::Ingress => (&kept.inbound, &kept.outbound),
            Direction::Egress => (&kept.outbound, &kept.inbound),
        };
        for port in kept_own {
            failsafe(port, Side::Destination, "kept open by the lock-out guard");
        }
        // Without connection tracking the answers have to be let through, too.
        let answers = other.iter().chain(kept_other);
        for port in answers.filter(|_| site.stage() == Stage::Untracked) {
            failsafe(port, Side::Source, "answer of a failsafe port");
        }
    }
    rules.push(NftRule::new([Expr::Verdict(Verdict::Goto(stack))]));
    let chain = Chain {
        comment: Some(comment(&id.to_string())),
        ..Chain::regular(name.clone())
    };
    ChainProgram::new(chain, rules)
}

/// A protocol, a port of one side, and the peer's network.
fn failsafe(port: &ProtoPort, side: Side, direction: Direction) -> Vec<Expr> {
    let mut exprs = expr::protocol(port.protocol.number(), false).to_vec();
    if let Some(net) = &port.net {
        let net = net.cidr();
        let peer = match direction {
            Direction::Ingress => Side::Source,
            Direction::Egress => Side::Destination,
        };
        exprs.extend(expr::family(crate::calc::IpVersion::of(net.addr())));
        if !net.is_default() {
            exprs.extend(expr::network(peer, net, false));
        }
    }
    let range = PortRange {
        first: port.port,
        last: port.port,
    };
    exprs.extend(expr::port(side, range, false));
    exprs
}
