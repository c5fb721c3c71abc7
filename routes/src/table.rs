//! The one desired route table of a node: candidates in, one selected route per prefix out.
//!
//! Pure. Recursive next hops are resolved by the owner: the table names the addresses it needs
//! ([`RouteTable::needed_next_hops`]) and is told what the underlay says about each.
//!
//! Make before break: when the contract moves a prefix to another supplier (a pool's mode was edited) and the new
//! supplier has nothing usable yet, the route that was selected before stays for as long as its own candidate does.
//!
//! Until the datastore has told everything no path of BGP's is selected: a pool that is not known yet may give its prefix to block
//! affinities and a tunnel, and the path that goes beside it would take the place of the route that an earlier run has left.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::{Cidr, NodeName};
use ipip_vxlan::{
    Encap, Endpoint, IPIP_DEVICE, Pool, Resolver, Unresolved, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE, Via,
};

use crate::candidate::{Candidate, NextHop, RouteSpec, Source};
use crate::supplier::{Supplier, Suppliers};

const VXLAN_DEVICES: &[&str] = &[VXLAN_V4_DEVICE, VXLAN_V6_DEVICE];

/// What the underlay says about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// A neighbour on this device.
    OnLink {
        /// The device.
        device: Arc<str>,
    },
    /// Behind a gateway on this device.
    Behind {
        /// The on-link gateway.
        gateway: IpAddr,
        /// The device.
        device: Arc<str>,
    },
    /// No route, or one of our own that must not carry itself.
    Unreachable,
}

/// A gateway that a route uses, on its device.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gateway {
    /// Address of the gateway.
    pub address: IpAddr,
    /// Device to it.
    pub device: Arc<str>,
}

/// Where a selected route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Out of a device, scope link.
    Device {
        /// The device.
        device: Arc<str>,
        /// Preferred source address.
        source: Option<IpAddr>,
    },
    /// Dropped.
    Blackhole,
    /// Taken by this host.
    Local,
    /// To gateways, sorted and without repetition. Never empty.
    Gateways(Vec<Gateway>),
}

impl Way {
    /// Devices that this way leads over.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<str>> {
        let (one, several) = match self {
            Self::Device { device, .. } => (Some(device), &[][..]),
            Self::Blackhole | Self::Local => (None, &[][..]),
            Self::Gateways(gateways) => (None, &gateways[..]),
        };
        one.into_iter()
            .chain(several.iter().map(|gateway| &gateway.device))
    }

    /// How packets are wrapped on this way; `None` if they leave as they are.
    #[must_use]
    pub fn encapsulation(&self) -> Option<&'static str> {
        if self.uses(VXLAN_DEVICES) {
            Some("VXLAN")
        } else if self.uses(&[IPIP_DEVICE]) {
            Some("IPIP")
        } else {
            None
        }
    }

    /// A gateway of this way is on one of the devices.
    fn uses(&self, devices: &[&str]) -> bool {
        match self {
            Self::Gateways(gateways) => gateways
                .iter()
                .any(|gateway| devices.contains(&&*gateway.device)),
            Self::Device { .. } | Self::Blackhole | Self::Local => false,
        }
    }
}

/// The route that the kernel is to have for a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selected {
    /// Who supplied it.
    pub source: Source,
    /// The resource or peer it comes from.
    pub because: Arc<str>,
    /// Where it leads.
    pub way: Way,
}

/// Why a prefix has no route, or not the one that it should have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The encapsulation cannot be decided yet.
    #[error(transparent)]
    Encapsulation(#[from] Unresolved),
    /// The underlay has not been asked yet.
    #[error("next hop {0} is being resolved")]
    Resolving(IpAddr),
    /// The underlay has no way there.
    #[error("next hop {0} is unreachable")]
    Unreachable(IpAddr),
    /// No BGP, no tunnel, and the node is not a neighbour.
    #[error("node {0} is not on-link: its block needs BGP or encapsulation")]
    NeedsBgpOrEncapsulation(NodeName),
    /// The contract gives the pool to BGP, which has no path yet.
    #[error("waiting for a BGP path")]
    NoBgpPath,
    /// BGP has a path, and the pools that decide about it may not be known yet.
    #[error("waiting for the datastore, which has not told all pools yet")]
    NotInSync,
    /// The contract gives the pool to block affinities, and there is none.
    #[error(
        "no block affinity; BGP paths are not installed for a pool with this encapsulation ({0})"
    )]
    NoAffinity(&'static str),
}

/// One prefix for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowView<'a> {
    /// The prefix.
    pub prefix: Cidr,
    /// The selected route.
    pub selected: Option<&'a Selected>,
    /// What is not as it should be.
    pub problem: Option<&'a Problem>,
    /// Sources that have a candidate.
    pub sources: Vec<Source>,
}

#[derive(Debug, Default)]
struct Row {
    candidates: BTreeMap<Source, Candidate>,
    /// The BGP candidate is from before the last start of bgpd.
    stale: bool,
    selected: Option<Selected>,
    problem: Option<Problem>,
    needs: BTreeSet<IpAddr>,
}

impl Row {
    fn view(&self, prefix: Cidr) -> RowView<'_> {
        RowView {
            prefix,
            selected: self.selected.as_ref(),
            problem: self.problem.as_ref(),
            sources: self.candidates.keys().copied().collect(),
        }
    }
}

/// The table.
#[derive(Debug)]
pub struct RouteTable {
    resolver: Resolver,
    suppliers: Suppliers,
    rows: BTreeMap<Cidr, Row>,
    reach: BTreeMap<IpAddr, Reach>,
    users: BTreeMap<IpAddr, BTreeSet<Cidr>>,
    dirty: BTreeSet<Cidr>,
    /// The datastore has told everything.
    in_sync: bool,
}

impl RouteTable {
    /// An empty table for the node that `local` names.
    #[must_use]
    pub fn new(local: NodeName) -> Self {
        Self {
            resolver: Resolver::new(local),
            suppliers: Suppliers::default(),
            rows: BTreeMap::new(),
            reach: BTreeMap::new(),
            users: BTreeMap::new(),
            dirty: BTreeSet::new(),
            in_sync: false,
        }
    }

    /// The datastore has told everything: BGP's paths may be selected.
    pub fn set_in_sync(&mut self) {
        if !std::mem::replace(&mut self.in_sync, true) {
            let waiting = self.rows.iter();
            let waiting = waiting.filter(|(_, row)| row.candidates.contains_key(&Source::Bgp));
            self.dirty.extend(waiting.map(|(prefix, _)| *prefix));
        }
    }

    /// The encapsulation decisions that this table uses.
    #[must_use]
    pub const fn resolver(&self) -> &Resolver {
        &self.resolver
    }

    /// Sets the candidate of one source for a prefix.
    pub fn set(&mut self, source: Source, prefix: Cidr, candidate: Candidate) {
        let row = self.rows.entry(prefix).or_default();
        if source == Source::Bgp {
            row.stale = false;
        }
        if row.candidates.get(&source) != Some(&candidate) {
            row.candidates.insert(source, candidate);
            self.dirty.insert(prefix);
        }
    }

    /// Removes the candidate of one source.
    pub fn remove(&mut self, source: Source, prefix: &Cidr) {
        if let Some(row) = self.rows.get_mut(prefix)
            && row.candidates.remove(&source).is_some()
        {
            self.dirty.insert(*prefix);
        }
    }

    /// Adds or replaces a pool.
    pub fn set_pool(&mut self, pool: Pool) {
        let cidr = pool.cidr;
        if self.resolver.set_pool(pool) {
            self.touch_within(cidr);
        }
    }

    /// Forgets a pool.
    pub fn remove_pool(&mut self, name: &str) {
        let cidr = self
            .resolver
            .pools()
            .find(|pool| pool.name == name)
            .map(|pool| pool.cidr);
        if self.resolver.remove_pool(name)
            && let Some(cidr) = cidr
        {
            self.touch_within(cidr);
        }
    }

    /// Adds or replaces a node.
    pub fn set_node(&mut self, node: Endpoint) {
        let name = node.name.clone();
        let before = self.resolver.node(&name).cloned();
        if self.resolver.set_node(node) {
            self.touch_node(&name, before.as_ref());
        }
    }

    /// Forgets a node.
    pub fn remove_node(&mut self, name: &NodeName) {
        let before = self.resolver.node(name).cloned();
        if self.resolver.remove_node(name) {
            self.touch_node(name, before.as_ref());
        }
    }

    /// Replaces the supplier decision.
    pub fn set_suppliers(&mut self, suppliers: Suppliers) {
        if self.suppliers != suppliers {
            self.suppliers = suppliers;
            self.dirty.extend(self.rows.keys());
        }
    }

    /// bgpd has connected anew: what it says no more by its end of sync will go.
    pub fn bgp_started(&mut self) {
        for row in self.rows.values_mut() {
            row.stale = row.candidates.contains_key(&Source::Bgp);
        }
    }

    /// bgpd has said everything that it knows in one family.
    pub fn bgp_end_of_sync(&mut self, v4: bool) {
        for (prefix, row) in &mut self.rows {
            if row.stale && prefix.is_v4() == v4 {
                row.stale = false;
                row.candidates.remove(&Source::Bgp);
                self.dirty.insert(*prefix);
            }
        }
    }

    /// Addresses that the underlay has to be asked about.
    pub fn needed_next_hops(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.users.keys().copied()
    }

    /// Addresses that have not been answered yet.
    #[must_use]
    pub fn unanswered_next_hops(&self) -> Vec<IpAddr> {
        self.users
            .keys()
            .filter(|address| !self.reach.contains_key(address))
            .copied()
            .collect()
    }

    /// The underlay's answer about one address; true when it differs from the last one.
    pub fn set_reach(&mut self, address: IpAddr, reach: Reach) -> bool {
        let Some(users) = self.users.get(&address) else {
            return false;
        };
        if self.reach.get(&address) == Some(&reach) {
            return false;
        }
        self.reach.insert(address, reach);
        self.dirty.extend(users);
        true
    }

    /// The rows that changed since the last call, each with what is selected now.
    pub fn take_changes(&mut self) -> Vec<(Cidr, Option<Selected>)> {
        let mut changes = Vec::new();
        for prefix in std::mem::take(&mut self.dirty) {
            let Some(row) = self.rows.get(&prefix) else {
                continue;
            };
            let choice = self.choose(&prefix, row);
            self.set_needs(prefix, choice.needs);
            let Some(row) = self.rows.get_mut(&prefix) else {
                continue;
            };
            row.problem = choice.problem;
            if row.selected != choice.selected {
                row.selected.clone_from(&choice.selected);
                changes.push((prefix, choice.selected));
            }
            if row.candidates.is_empty() && row.selected.is_none() {
                self.rows.remove(&prefix);
            }
        }
        changes
    }

    /// The selected route of a prefix.
    #[must_use]
    pub fn selected(&self, prefix: &Cidr) -> Option<&Selected> {
        self.rows.get(prefix)?.selected.as_ref()
    }

    /// All selected routes.
    pub fn all_selected(&self) -> impl Iterator<Item = (Cidr, &Selected)> {
        self.rows
            .iter()
            .filter_map(|(prefix, row)| Some((*prefix, row.selected.as_ref()?)))
    }

    /// One row, for status.
    #[must_use]
    pub fn row(&self, prefix: &Cidr) -> Option<RowView<'_>> {
        self.rows
            .get_key_value(prefix)
            .map(|(prefix, row)| row.view(*prefix))
    }

    /// All rows, for status.
    pub fn view(&self) -> impl Iterator<Item = RowView<'_>> {
        self.rows.iter().map(|(prefix, row)| row.view(*prefix))
    }

    fn touch_within(&mut self, pool: Cidr) {
        self.dirty
            .extend(self.rows.keys().filter(|prefix| pool.contains_cidr(prefix)));
    }

    /// A node's address decides about routes to it; the local node's subnet decides about all.
    fn touch_node(&mut self, name: &NodeName, before: Option<&Endpoint>) {
        if name == self.resolver.local_name() {
            self.dirty.extend(self.rows.keys());
            return;
        }
        let after = self.resolver.node(name);
        let addresses: Vec<IpAddr> = [before, after]
            .into_iter()
            .flatten()
            .flat_map(|node| [node.v4, node.v6])
            .flatten()
            .map(|network| network.ip())
            .collect();
        let concerns = |candidate: &Candidate| match &candidate.spec {
            RouteSpec::Node(node) => node == name,
            RouteSpec::NextHops(hops) => hops.iter().any(|hop| addresses.contains(&hop.address)),
            RouteSpec::Device { .. } | RouteSpec::Blackhole | RouteSpec::Local => false,
        };
        let touched = self
            .rows
            .iter()
            .filter(|(_, row)| row.candidates.values().any(concerns));
        self.dirty.extend(touched.map(|(prefix, _)| *prefix));
    }

    fn set_needs(&mut self, prefix: Cidr, needs: BTreeSet<IpAddr>) {
        let Some(row) = self.rows.get_mut(&prefix) else {
            return;
        };
        let before = std::mem::replace(&mut row.needs, needs.clone());
        for address in before.difference(&needs) {
            if let Some(users) = self.users.get_mut(address) {
                users.remove(&prefix);
                if users.is_empty() {
                    self.users.remove(address);
                    self.reach.remove(address);
                }
            }
        }
        for address in needs.difference(&before) {
            self.users.entry(*address).or_default().insert(prefix);
        }
    }

    fn choose(&self, prefix: &Cidr, row: &Row) -> Choice {
        let mut choice = Choice::default();
        // Outside all pools there are no blocks of ours: only BGP knows such prefixes.
        let pool = self.resolver.pool_of(prefix);
        let encap = pool.map_or(Encap::None, |pool| pool.encap);
        let supplier = pool.map_or(Supplier::Bgp, |pool| self.suppliers.of(pool.encap));
        for source in Source::ALL {
            let Some(candidate) = row.candidates.get(&source) else {
                continue;
            };
            if !admitted(source, supplier) {
                continue;
            }
            if source == Source::Bgp && !self.in_sync {
                choice.problem = choice.problem.or(Some(Problem::NotInSync));
                continue;
            }
            match self.way(prefix, candidate, supplier, row, &mut choice.needs) {
                Ok(way) => {
                    choice.selected = Some(Selected {
                        source,
                        because: candidate.because.clone(),
                        way,
                    });
                    choice.problem = None;
                    return choice;
                }
                Err(problem) => choice.problem = choice.problem.or(Some(problem)),
            }
        }
        if choice.problem.is_none() && !row.candidates.is_empty() {
            choice.problem = Some(match supplier {
                Supplier::Bgp => Problem::NoBgpPath,
                Supplier::BlockAffinity | Supplier::OnLinkBlockAffinity => {
                    Problem::NoAffinity(encap.label())
                }
            });
        }
        self.keep_former(row, supplier, &mut choice);
        choice
    }

    /// Make before break: see the module's head. A route whose own supplier is still the admitted one is not kept:
    /// there the candidate itself says that the way is gone.
    fn keep_former(&self, row: &Row, supplier: Supplier, choice: &mut Choice) {
        let Some(former) = &row.selected else {
            return;
        };
        if !row.candidates.contains_key(&former.source) {
            return;
        }
        let waiting = match &choice.problem {
            Some(Problem::Resolving(_)) => true,
            // The peer has not said yet that it receives this encapsulation (docs/architecture.md §6, the barrier). A peer that
            // takes back what it had said is no longer tunnelled to.
            Some(Problem::Encapsulation(Unresolved::NoVtep { .. })) => {
                !former.way.uses(VXLAN_DEVICES)
            }
            Some(Problem::Encapsulation(Unresolved::NotReady { .. })) => true,
            _ => false,
        };
        if waiting || !admitted(former.source, supplier) {
            choice.selected = Some(former.clone());
            choice.needs.extend(row.needs.iter());
        }
    }

    fn way(
        &self,
        prefix: &Cidr,
        candidate: &Candidate,
        supplier: Supplier,
        row: &Row,
        needs: &mut BTreeSet<IpAddr>,
    ) -> Result<Way, Problem> {
        match &candidate.spec {
            RouteSpec::Device { device, source } => Ok(Way::Device {
                device: device.clone(),
                source: *source,
            }),
            RouteSpec::Blackhole => Ok(Way::Blackhole),
            RouteSpec::Local => Ok(Way::Local),
            RouteSpec::Node(node) => {
                let via = self.resolver.resolve(prefix, node)?;
                let gateway = self.gateway(via, needs)?;
                if let Via::Direct { gateway: address } = via
                    && supplier == Supplier::OnLinkBlockAffinity
                    && gateway.address != address
                {
                    return Err(Problem::NeedsBgpOrEncapsulation(node.clone()));
                }
                Ok(Way::Gateways(vec![gateway]))
            }
            RouteSpec::NextHops(hops) => {
                let holder = row.candidates.values().find_map(|other| match &other.spec {
                    RouteSpec::Node(node) => self.resolver.node(node),
                    _ => None,
                });
                self.gateways(prefix, hops, holder, needs)
            }
        }
    }

    /// Equal-cost next hops: those that can be reached make the route.
    fn gateways(
        &self,
        prefix: &Cidr,
        hops: &[NextHop],
        holder: Option<&Endpoint>,
        needs: &mut BTreeSet<IpAddr>,
    ) -> Result<Way, Problem> {
        let mut gateways = BTreeSet::new();
        let mut problem = None;
        for hop in hops {
            let gateway = match &hop.interface {
                Some(device) => Ok(Gateway {
                    address: hop.address,
                    device: device.clone(),
                }),
                None => self
                    .next_hop_via(prefix, hop.address, holder)
                    .and_then(|via| self.gateway(via, needs)),
            };
            match gateway {
                Ok(gateway) => {
                    gateways.insert(gateway);
                }
                // Waiting for an answer is worth more than a decision without it.
                Err(resolving @ Problem::Resolving(_)) => problem = Some(resolving),
                Err(other) => problem = problem.or(Some(other)),
            }
        }
        match problem {
            Some(problem) if gateways.is_empty() => Err(problem),
            _ => Ok(Way::Gateways(gateways.into_iter().collect())),
        }
    }

    /// BGP carries IPIP pools through the tunnel as well, where the settings give it those pools.
    fn next_hop_via(
        &self,
        prefix: &Cidr,
        address: IpAddr,
        holder: Option<&Endpoint>,
    ) -> Result<Via, Problem> {
        let direct = Via::Direct { gateway: address };
        match self.resolver.encap_of(prefix) {
            Encap::Ipip(_) => Ok(self.resolver.resolve_address(prefix, address)?),
            Encap::None | Encap::Vxlan(_) => {
                // The block's holder receives the packet, whichever router it goes by.
                let receiver = holder.or_else(|| self.resolver.node_with_address(address));
                if let (Some(receiver), Some(_)) = (receiver, self.resolver.pool_of(prefix)) {
                    self.resolver.barrier(receiver, &direct)?;
                }
                Ok(direct)
            }
        }
    }

    fn gateway(&self, via: Via, needs: &mut BTreeSet<IpAddr>) -> Result<Gateway, Problem> {
        match via {
            Via::Vxlan { gateway, device } | Via::Ipip { gateway, device } => Ok(Gateway {
                address: gateway,
                device: device.into(),
            }),
            Via::Direct { gateway } => {
                needs.insert(gateway);
                match self.reach.get(&gateway) {
                    None => Err(Problem::Resolving(gateway)),
                    Some(Reach::Unreachable) => Err(Problem::Unreachable(gateway)),
                    Some(Reach::OnLink { device }) => Ok(Gateway {
                        address: gateway,
                        device: device.clone(),
                    }),
                    Some(Reach::Behind { gateway, device }) => Ok(Gateway {
                        address: *gateway,
                        device: device.clone(),
                    }),
                }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Choice {
    selected: Option<Selected>,
    problem: Option<Problem>,
    needs: BTreeSet<IpAddr>,
}

/// Whether the kernel contract lets this source install routes of a pool with this supplier.
const fn admitted(source: Source, supplier: Supplier) -> bool {
    match source {
        Source::Workload | Source::LocalBlock | Source::Static => true,
        Source::BlockAffinity => !matches!(supplier, Supplier::Bgp),
        Source::Bgp => matches!(supplier, Supplier::Bgp),
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
