//! What is removed, in which order, and what stays. Pure.
//!
//! Pods' interfaces first (nothing passes them then), tunnels, routes and rules, then what filters, then files: as long as
//! something still carries packets, what guards them is there as well. What a device takes with it is not named by itself.

use super::iptables::{Removal, plan_removal};
use super::owner::{Device, File, Owner};
use cali_netlink::nft::TableName;
use cali_netlink::route::{TABLE_LOCAL, TABLE_MAIN};
use cali_netlink::{Address, IfIndex, IpNetwork, Link, Nexthop, Route, RouteKind, Rule, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

/// Ids of Cali's nexthop objects.
const NEXTHOPS: RangeInclusive<u32> =
    cali_routes::nexthops::FIRST_ID..=cali_routes::nexthops::LAST_ID;
/// Tables that WireGuard's routes may be in (`routeTableRanges`), and where its rule stands.
const WIREGUARD_TABLES: RangeInclusive<u32> = 1..=250;
const WIREGUARD_PRIORITY: u32 = 99;
/// `default`, beside main and local.
const TABLE_DEFAULT: u32 = 253;
/// A chain of Cali's own iptables backend, which Calico has not.
const CALI_CHAIN: &str = felix::iptables::OWN_CHAIN;

/// What is on the host.
#[derive(Debug, Clone, Default)]
pub(super) struct Host {
    /// Programs of the owner that run in this network namespace.
    pub(super) running: Vec<String>,
    /// Cali runs here, and has adopted what it shares with Calico.
    pub(super) cali_runs: bool,
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<Route>,
    pub(super) rules: Vec<Rule>,
    pub(super) nexthops: Vec<Nexthop>,
    pub(super) tables: Vec<TableName>,
    /// What `NAME-save` printed, by the beginning of the programs' names (`iptables-legacy`).
    pub(super) iptables: BTreeMap<&'static str, String>,
    pub(super) sets: Vec<Arc<str>>,
    /// Files and folders at the owner's places, as the host names them.
    pub(super) files: BTreeSet<PathBuf>,
    pub(super) state_dir: PathBuf,
}

/// What else is known.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// Ranges of pods and services: routes within them are the owner's, if the protocol is.
    pub(super) ranges: Vec<IpNetwork>,
    /// Interfaces of pods that run here; or why nobody says.
    pub(super) pods: Result<BTreeSet<String>, String>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish {
    /// Cut off running pods too.
    pub(super) pods: bool,
    /// The embedded datastore too.
    pub(super) datastore: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Link {
        index: IfIndex,
        name: String,
    },
    /// A device that cannot be deleted: its addresses go, and it goes down.
    Idle {
        index: IfIndex,
        name: String,
        addresses: Vec<Address>,
    },
    Route(Route),
    Rule(Rule),
    Nexthop(Nexthop),
    Iptables {
        program: &'static str,
        removal: Removal,
    },
    Table(TableName),
    Set(Arc<str>),
    /// A file, or a folder that is empty by then.
    File(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) object: String,
    pub(super) reason: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) kept: Vec<Kept>,
    pub(super) notes: Vec<String>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link { name, .. } => write!(f, "device {name}"),
            Self::Idle { name, .. } => {
                write!(
                    f,
                    "addresses of {name}, and take it down (only its module can delete it)"
                )
            }
            Self::Route(route) => write!(f, "route {route}"),
            Self::Rule(rule) => write!(f, "rule {rule}"),
            Self::Nexthop(nexthop) => write!(f, "{nexthop}"),
            Self::Iptables { program, removal } => write!(
                f,
                "{program}: {} chains, and {} rules in chains of others",
                removal.chains, removal.rules
            ),
            Self::Table(table) => write!(f, "nf_tables table {table}"),
            Self::Set(name) => write!(f, "IP set {name}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

pub(super) fn plan(owner: Owner, host: &Host, known: &Known, wish: &Wish) -> Plan {
    let mut planner = Planner {
        owner,
        host,
        known,
        wish,
        // What both have, Cali uses.
        shared: owner == Owner::Calico && host.cali_runs,
        plan: Plan::default(),
    };
    let devices = planner.devices();
    planner.routes(&devices);
    planner.rules_and_nexthops(&devices);
    planner.filters();
    planner.files(devices.pods_stay);
    planner.notes(devices.pods_stay);
    planner.plan
}

/// What becomes of devices.
#[derive(Debug, Default)]
struct Devices {
    /// They take their routes with them.
    gone: BTreeSet<IfIndex>,
    /// Their routes stay with them.
    stay: BTreeSet<IfIndex>,
    wireguard: BTreeSet<IfIndex>,
    pods_stay: bool,
}

struct Planner<'a> {
    owner: Owner,
    host: &'a Host,
    known: &'a Known,
    wish: &'a Wish,
    shared: bool,
    plan: Plan,
}

impl Planner<'_> {
    fn keep(&mut self, object: impl fmt::Display, reason: impl Into<String>) {
        self.plan.kept.push(Kept {
            object: object.to_string(),
            reason: reason.into(),
        });
    }

    fn devices(&mut self) -> Devices {
        let mut devices = Devices::default();
        let (mut pods, mut tunnels) = (Vec::new(), Vec::new());
        let host = self.host;
        for link in &host.links {
            let step = Step::Link {
                index: link.index,
                name: link.name.clone(),
            };
            let what = self.owner.device(link);
            let stays = match what {
                Device::Foreign => continue,
                Device::NamedAlike => {
                    let kind = match link.kind.name() {
                        "" => "physical",
                        kind => kind,
                    };
                    let reason = format!("it is {kind}, which {} has none of", self.owner);
                    self.keep(format!("device {}", link.name), reason);
                    continue;
                }
                _ if self.shared => Some("Cali runs here and has adopted it".to_owned()),
                Device::Pod => self.running_pod(link),
                Device::Bridge => self.ports(link, &mut pods, &mut devices),
                Device::Tunnel | Device::Fallback => None,
            };
            if let Some(reason) = stays {
                devices.stay.insert(link.index);
                devices.pods_stay |= matches!(what, Device::Pod | Device::Bridge);
                self.keep(format!("device {}", link.name), reason);
                continue;
            }
            devices.gone.insert(link.index);
            if link.kind == cali_netlink::LinkKind::Wireguard {
                devices.wireguard.insert(link.index);
            }
            match what {
                Device::Pod => pods.push(step),
                Device::Fallback => tunnels.extend(self.idle(link)),
                _ => tunnels.push(step),
            }
        }
        self.plan.steps.extend(pods);
        self.plan.steps.extend(tunnels);
        devices
    }

    /// Why a pod's interface stays.
    fn running_pod(&self, link: &Link) -> Option<String> {
        if self.wish.pods {
            return None;
        }
        match &self.known.pods {
            Ok(running) if running.contains(&link.name) => {
                Some("its pod runs; --pods cuts it off".to_owned())
            }
            Ok(_) => None,
            Err(reason) => Some(format!(
                "nobody says whether its pod runs ({reason}); --pods removes it all the same"
            )),
        }
    }

    /// Why a bridge stays; where it goes, its ports go first.
    fn ports(&self, bridge: &Link, pods: &mut Vec<Step>, devices: &mut Devices) -> Option<String> {
        let ports: Vec<&Link> = self
            .host
            .links
            .iter()
            .filter(|link| link.master == Some(bridge.index))
            .collect();
        if !ports.is_empty() && !self.wish.pods {
            return Some(format!(
                "{} pods are connected to it; --pods cuts them off",
                ports.len()
            ));
        }
        for port in ports {
            devices.gone.insert(port.index);
            pods.push(Step::Link {
                index: port.index,
                name: port.name.clone(),
            });
        }
        None
    }

    fn idle(&self, link: &Link) -> Option<Step> {
        let addresses: Vec<Address> = self
            .host
            .addresses
            .iter()
            .filter(|address| address.ifindex == link.index)
            .cloned()
            .collect();
        (link.up || !addresses.is_empty()).then(|| Step::Idle {
            index: link.index,
            name: link.name.clone(),
            addresses,
        })
    }

    fn routes(&mut self, devices: &Devices) {
        let host = self.host;
        if self.shared {
            return;
        }
        let tables = self.wireguard_tables(devices);
        for route in &host.routes {
            if !self.owner.protocols().contains(&route.protocol) {
                continue;
            }
            let through = |some: &BTreeSet<IfIndex>| ways(route).any(|way| some.contains(&way));
            if through(&devices.gone) || through(&devices.stay) {
                continue;
            }
            if self.owner == Owner::Flannel {
                // To other nodes' ranges through their addresses (`host-gw`); everybody's routes have this protocol.
                let to_node = matches!(&route.target, Target::Hop(hop) if hop.gateway.is_some());
                if to_node && route.table == TABLE_MAIN && self.is_within_known(route.prefix) {
                    self.plan.steps.push(Step::Route(route.clone()));
                }
                continue;
            }
            let object = matches!(&route.target, Target::Nexthop(id) if NEXTHOPS.contains(id));
            let local = route.table == TABLE_LOCAL && route.kind == RouteKind::Local;
            if object && self.owner == Owner::Cali
                || local
                || tables.contains(&route.table)
                || self.is_within_known(route.prefix)
            {
                self.plan.steps.push(Step::Route(route.clone()));
            } else {
                self.keep(
                    format!("route {route}"),
                    "it is in no range of pods that is known; --pool CIDR names one",
                );
            }
        }
    }

    fn is_within_known(&self, prefix: IpNetwork) -> bool {
        self.known.ranges.iter().any(|range| {
            range.is_ipv4() == prefix.is_ipv4()
                && range.prefix() <= prefix.prefix()
                && range.contains(prefix.ip())
        })
    }

    /// Tables of WireGuard: those that its rule names.
    fn wireguard_tables(&self, devices: &Devices) -> BTreeSet<u32> {
        let own = |table: &u32| ![TABLE_MAIN, TABLE_LOCAL, TABLE_DEFAULT, 0].contains(table);
        let by_route = self
            .host
            .routes
            .iter()
            .filter(|route| ways(route).any(|way| devices.wireguard.contains(&way)))
            .map(|route| route.table);
        let by_rule = self
            .host
            .rules
            .iter()
            .filter(|rule| {
                is_wireguards(rule)
                    && rule.priority == WIREGUARD_PRIORITY
                    && WIREGUARD_TABLES.contains(&rule.table)
            })
            .map(|rule| rule.table);
        by_route.chain(by_rule).filter(own).collect()
    }

    fn rules_and_nexthops(&mut self, devices: &Devices) {
        if self.shared || self.owner == Owner::Flannel {
            return;
        }
        let tables = self.wireguard_tables(devices);
        let rules = self.host.rules.iter();
        let rules = rules.filter(|rule| is_wireguards(rule) && tables.contains(&rule.table));
        self.plan.steps.extend(rules.cloned().map(Step::Rule));
        if self.owner == Owner::Cali {
            let mut nexthops: Vec<&Nexthop> = self
                .host
                .nexthops
                .iter()
                .filter(|nexthop| NEXTHOPS.contains(&nexthop.id))
                .collect();
            // Groups, which name the others, have the higher ids.
            nexthops.sort_by_key(|nexthop| std::cmp::Reverse(nexthop.id));
            let steps = nexthops.into_iter().cloned().map(Step::Nexthop);
            self.plan.steps.extend(steps);
        }
    }

    fn filters(&mut self) {
        let host = self.host;
        let is_calis = |saved: &str| {
            let chain = format!(":{CALI_CHAIN} ");
            saved.lines().any(|line| line.starts_with(&chain))
        };
        let mut sets_used = false;
        for (program, saved) in &host.iptables {
            let removal = plan_removal(self.owner, saved);
            if removal.is_empty() {
                continue;
            }
            if self.owner == Owner::Calico && is_calis(saved) {
                sets_used = true;
                self.keep(
                    format!("{program}: chains cali-*"),
                    "they are Cali's, which enforces policy by iptables here",
                );
            } else if self.owner == Owner::Cali && !is_calis(saved) {
                sets_used = true;
                self.keep(
                    format!("{program}: chains cali-*"),
                    "they are Calico's; `calictl node takeover calico` removes them",
                );
            } else {
                self.plan.steps.push(Step::Iptables { program, removal });
            }
        }
        let tables = host.tables.iter().filter(|table| {
            let family = table.family.to_string();
            self.owner.table(&family, &table.name)
        });
        self.plan.steps.extend(tables.cloned().map(Step::Table));
        if sets_used && !host.sets.is_empty() {
            self.keep("IP sets cali40*, cali60*", "the chains that stay use them");
        } else {
            let sets = host.sets.iter().cloned();
            self.plan.steps.extend(sets.map(Step::Set));
        }
    }

    fn files(&mut self, pods_stay: bool) {
        let host = self.host;
        let mut stay: Vec<&PathBuf> = Vec::new();
        // What is in a folder before the folder.
        for path in host.files.iter().rev() {
            let shared = self.shared && !path.to_string_lossy().contains("kubeconfig");
            let reason = match self.owner.file(path, &host.state_dir) {
                _ if shared => Some(""),
                File::Goes => None,
                File::Foreign => Some(""),
                File::Datastore if self.owner == Owner::Cali && self.wish.datastore => None,
                File::Datastore if self.owner == Owner::Cali => {
                    Some("it holds the cluster's resources; --datastore removes it")
                }
                File::Datastore => Some(""),
                File::OfPods if pods_stay => Some("running pods hold addresses in it"),
                File::OfPods => None,
            };
            match reason {
                // A folder that something stays in.
                None if stay.iter().any(|kept| kept.starts_with(path)) => stay.push(path),
                None => self.plan.steps.push(Step::File(path.clone())),
                Some(reason) => {
                    stay.push(path);
                    if !reason.is_empty() {
                        self.keep(path.display(), reason);
                    }
                }
            }
        }
    }

    fn notes(&mut self, pods_stay: bool) {
        let unguarded = self
            .plan
            .steps
            .iter()
            .any(|step| matches!(step, Step::Iptables { .. } | Step::Table(_)));
        if pods_stay && unguarded && !self.host.cali_runs && self.owner != Owner::Flannel {
            self.plan.notes.push(
                "No policy guards the pods that stay until Cali runs: start it first, and it takes over before this removes anything."
                    .to_owned(),
            );
        }
        if self.owner == Owner::Cali && !self.plan.steps.is_empty() {
            self.plan.notes.push(
                "The datastore still knows this node: `calictl delete node NAME` forgets it."
                    .to_owned(),
            );
        }
    }
}

fn ways(route: &Route) -> impl Iterator<Item = IfIndex> + '_ {
    let hops = match &route.target {
        Target::Hop(hop) => std::slice::from_ref(hop),
        Target::Multipath(hops) => hops,
        _ => &[],
    };
    hops.iter().filter_map(|hop| hop.oif)
}

/// `not fwmark M lookup T`, for all packets.
fn is_wireguards(rule: &Rule) -> bool {
    rule.invert
        && rule.fwmark.is_some()
        && rule.from.is_none()
        && rule.to.is_none()
        && rule.iif.is_none()
        && rule.oif.is_none()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
