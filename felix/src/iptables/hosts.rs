//! Host endpoints: their chains in each table, and the ways to them.
//!
//! | site | table, kernel's chain | |
//! |---|---|---|
//! | untracked | raw PREROUTING, OUTPUT | what is allowed is not tracked |
//! | before destination NAT | mangle PREROUTING | |
//! | forwarded | filter FORWARD | |
//! | of the host itself | filter INPUT, OUTPUT; mangle POSTROUTING | the last where the destination was translated |
//!
//! A node has few of them, so that every change works all of them out anew; what comes out the same is written the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::Key;
use cali_api::v3::ProtoPort;

use super::dispatch::usable;
use super::names;
use super::program::{Chain, Table};
use super::render::{Asked, Renderer, VERSIONS, comment, remark};
use crate::calc::{Direction, HostEndpoint, IpVersion, Stage};
use crate::compile::hosts::{self, SITES, Site};
use crate::compile::{KeptOpen, NEIGHBOUR_DISCOVERY, ROUTER_ADVERTISEMENT};

/// Whom a site asks: by interface (`None`: all others), with the chain; without one nobody is asked there.
pub(super) type Ways = BTreeMap<Site, Vec<(Option<Arc<str>>, Option<Arc<str>>)>>;

/// The host endpoints of the node, and what was written for them.
#[derive(Default)]
pub(super) struct Hosts {
    known: BTreeMap<Key, Arc<HostEndpoint>>,
    interfaces: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    pub(super) ways: Ways,
    chains: BTreeSet<(Table, Arc<str>)>,
    asks: Vec<Asked>,
}

/// Whether something is accepted before the later stages of host endpoints see it.
pub(super) fn accepts_early(ways: &Ways) -> bool {
    [Site::RawIn, Site::RawOut, Site::DnatIn]
        .iter()
        .any(|site| ways.contains_key(site))
}

/// The table of a site.
pub(super) const fn table(site: Site) -> Table {
    match site {
        Site::RawIn | Site::RawOut => Table::Raw,
        Site::DnatIn | Site::Post => Table::Mangle,
        Site::ForwardIn | Site::ForwardOut | Site::In | Site::Out => Table::Filter,
    }
}

impl Renderer {
    /// Tells the addresses of the node's own interfaces: host endpoints may be known by them.
    pub fn set_interfaces(&mut self, interfaces: BTreeMap<Arc<str>, BTreeSet<IpAddr>>) {
        if self.hosts.interfaces != interfaces {
            self.hosts.interfaces = interfaces;
            self.put_hosts();
            self.put_dispatch_if_dirty();
        }
    }

    /// Keeps these ports open besides the fail-safe ones.
    pub fn set_kept_open(&mut self, kept: KeptOpen) {
        if self.kept_open != kept {
            self.kept_open = kept;
            self.put_hosts();
            self.put_dispatch_if_dirty();
        }
    }

    pub(super) fn put_host(&mut self, id: &Key, host: Option<&Arc<HostEndpoint>>) {
        match host {
            Some(host) => self.hosts.known.insert(id.clone(), host.clone()),
            None => self.hosts.known.remove(id),
        };
        self.put_hosts();
    }

    /// Writes all chains of host endpoints anew.
    pub(super) fn put_hosts(&mut self) {
        let mut placed = hosts::placed(&self.hosts.known, &self.hosts.interfaces);
        // A name that iptables reads otherwise is no interface's.
        placed.retain(|interface, _| interface.as_deref().is_none_or(usable));
        let (mut ways, mut chains, mut asks) = (Ways::new(), BTreeSet::new(), Vec::new());
        for site in SITES {
            let all = placed
                .get(&None)
                .is_some_and(|(_, host)| site.knows_all() && site.asks(host));
            // Single interfaces come before all others.
            let (all_others, named): (Vec<_>, Vec<_>) = placed
                .iter()
                .partition(|(interface, _)| interface.is_none());
            for (interface, (id, host)) in named.into_iter().chain(all_others) {
                let asked = match interface {
                    None if !all => continue,
                    None => true,
                    Some(_) => site.asks(host),
                };
                if !asked && !all {
                    continue;
                }
                let chain = asked.then(|| names::host_chain(site, interface.as_deref()));
                if let Some(name) = &chain {
                    asks.extend(asked_by(host, site));
                    chains.insert((table(site), name.clone()));
                    for version in VERSIONS {
                        let rules = self.host_rules(id, host, site, version);
                        self.put_chain(version, table(site), name.clone(), rules);
                    }
                }
                ways.entry(site)
                    .or_default()
                    .push((interface.clone(), chain));
            }
        }
        // First what is new, so that nothing goes that is still asked for.
        for asked in &asks {
            self.ask(asked, true);
        }
        for asked in std::mem::replace(&mut self.hosts.asks, asks) {
            self.ask(&asked, false);
        }
        for (table, gone) in std::mem::replace(&mut self.hosts.chains, chains.clone()) {
            if !chains.contains(&(table, gone.clone())) {
                self.remove_chain(table, &gone);
            }
        }
        if self.hosts.ways != ways {
            self.hosts.ways = ways;
            self.dispatch_dirty = true;
        }
    }

    fn host_rules(
        &self,
        id: &Key,
        host: &HostEndpoint,
        site: Site,
        version: IpVersion,
    ) -> Vec<String> {
        let (marks, common) = (self.settings.marks, &self.settings.common);
        let (stage, direction) = (site.stage(), site.direction());
        let mut rules = vec![marks.clear_all()];
        remark(&mut rules, &id.to_string());
        if stage != Stage::Untracked && common.drop_invalid {
            rules.push("-m conntrack --ctstate INVALID -j DROP".to_owned());
        }
        if stage == Stage::Normal && version == IpVersion::V6 {
            let kinds = NEIGHBOUR_DISCOVERY.iter().chain(&ROUTER_ADVERTISEMENT);
            rules
                .extend(kinds.map(|kind| {
                    format!("-p 58 -m icmp6 --icmpv6-type {kind} -g {}", names::ALLOW)
                }));
        }
        if stage != Stage::Forward {
            // What is let through early is asked about again, by the same ports.
            let target = match stage {
                Stage::Normal => format!("-g {}", names::ALLOW),
                _ => "-j ACCEPT".to_owned(),
            };
            let (own, other) = match direction {
                Direction::Ingress => (&common.failsafe_inbound, &common.failsafe_outbound),
                Direction::Egress => (&common.failsafe_outbound, &common.failsafe_inbound),
            };
            let text = |port, side, about: &str| {
                let matches = failsafe(port, side, direction, version)?;
                Some(format!("{matches} {} {target}", comment(about)))
            };
            rules.extend(
                own.iter()
                    .filter_map(|port| text(port, "--dport", "failsafe port")),
            );
            let (kept_own, kept_other) = match direction {
                Direction::Ingress => (&self.kept_open.inbound, &self.kept_open.outbound),
                Direction::Egress => (&self.kept_open.outbound, &self.kept_open.inbound),
            };
            rules.extend(
                kept_own
                    .iter()
                    .filter_map(|port| text(port, "--dport", "kept open by the lock-out guard")),
            );
            // Without connection tracking the answers have to be let through, too.
            let answers = other.iter().chain(kept_other);
            let answers = answers.filter(|_| stage == Stage::Untracked);
            rules.extend(
                answers.filter_map(|port| text(port, "--sport", "answer of a failsafe port")),
            );
        }
        let tiers = host.stage(stage).of(direction);
        self.tier_rules(&mut rules, tiers, direction, table(site));
        match stage {
            Stage::Normal => {
                self.profile_rules(&mut rules, &host.profiles, direction, table(site));
            }
            // What a workload's policy has allowed goes on as allowed.
            Stage::Forward if direction == Direction::Egress => {
                rules.extend(self.workload_ways("-i", &format!("-g {}", names::ALLOW)));
            }
            Stage::Forward | Stage::PreDnat | Stage::Untracked => {}
        }
        rules
    }
}

/// What a host endpoint asks at a site.
fn asked_by(host: &HostEndpoint, site: Site) -> Vec<Asked> {
    let (direction, table) = (site.direction(), table(site));
    let tiers = host.stage(site.stage()).of(direction).iter();
    let policies = tiers.flat_map(|tier| &tier.policies);
    let mut all: Vec<Asked> = policies
        .map(|id| Asked::Policy(id.clone(), direction, table))
        .collect();
    if site.stage() == Stage::Normal {
        let profiles = host.profiles.iter();
        all.extend(profiles.map(|name| Asked::Profile(name.clone(), direction, table)));
    }
    all
}

/// The chain that leads to the host endpoints of a site.
pub(super) fn dispatch(
    site: Site,
    ways: &Ways,
    not_asked: Vec<String>,
) -> Option<((Table, Arc<str>), Chain)> {
    let ways = ways.get(&site)?;
    let option = match site.direction() {
        Direction::Ingress => "-i",
        Direction::Egress => "-o",
    };
    let mut rules = not_asked;
    rules.extend(ways.iter().map(|(interface, chain)| {
        let target = match chain {
            Some(chain) => format!("-g {chain}"),
            None => "-j RETURN".to_owned(),
        };
        match interface {
            Some(interface) => format!("{option} {interface} {target}"),
            None => format!("! {option} lo {target}"),
        }
    }));
    let name = names::host_dispatch(site);
    Some(((table(site), name.into()), Chain::new(name, rules)))
}

/// A protocol, a port of one side, and the peer's network.
fn failsafe(
    port: &ProtoPort,
    side: &str,
    direction: Direction,
    version: IpVersion,
) -> Option<String> {
    let peer = match direction {
        Direction::Ingress => "-s",
        Direction::Egress => "-d",
    };
    let net = match &port.net {
        None => String::new(),
        Some(net) if IpVersion::of(net.cidr().addr()) != version => return None,
        Some(net) => format!(" {peer} {}", net.cidr()),
    };
    let protocol = port.protocol.number();
    let module = match protocol {
        6 => "tcp",
        17 => "udp",
        132 => "sctp",
        _ => "multiport",
    };
    let side = match (module, side) {
        ("multiport", "--dport") => "--dports",
        ("multiport", _) => "--sports",
        (_, side) => side,
    };
    Some(format!(
        "-p {protocol} -m {module} {side} {}{net}",
        port.port
    ))
}
