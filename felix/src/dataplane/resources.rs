//! From the datastore's objects to routes, pools, nodes and tunnel settings. Pure.
//!
//! Block affinities say which node holds which block; addresses that a node borrowed out of another node's block get
//! a route of their own. Local workloads are not read here: they come from the graph, with their policy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cali_api::update::Update;
use cali_api::v3::{
    AffinityType, BGPConfigurationSpec, BlockAffinitySpec, BlockAffinityState,
    FelixConfigurationSpec, IPAMBlock, ProgramClusterRoutes,
};
use cali_api::{AnyResource, Cidr, Key, Kind, NodeName};
use cali_routes::{Backend, Candidate, ClusterRoutes, Input, RouteSpec, Source, Suppliers};
use ipip_vxlan::{Endpoint, Holders, Pool, Resolver, Settings, WireguardSettings};

/// Kinds that this translation reads.
pub const KINDS: &[Kind] = &[
    Kind::IPPool,
    Kind::Node,
    Kind::BlockAffinity,
    Kind::IPAMBlock,
    Kind::BGPConfiguration,
];

/// Turns updates into inputs of the route table, and keeps what the tunnels follow.
#[derive(Debug)]
pub struct Resources {
    local: NodeName,
    backend: Backend,
    resolver: Resolver,
    /// Route prefix that each affinity gave, by its key.
    affinities: BTreeMap<Key, (Source, Cidr)>,
    /// Borrowed addresses of each block, by its key.
    borrowed: BTreeMap<Key, BTreeMap<Cidr, NodeName>>,
    /// Addresses of this host for workloads that speak BGP.
    peering: BTreeSet<Cidr>,
    bgp_routes: Option<ProgramClusterRoutes>,
    felix_routes: Option<ProgramClusterRoutes>,
    suppliers: Option<Suppliers>,
    notices: Vec<String>,
    tunnels: Settings,
    wireguard: WireguardSettings,
    holders: Holders,
}

impl Resources {
    /// A translation for the node `local`.
    #[must_use]
    pub fn new(local: NodeName, backend: Backend) -> Self {
        Self {
            resolver: Resolver::new(local.clone()),
            local,
            backend,
            affinities: BTreeMap::new(),
            borrowed: BTreeMap::new(),
            peering: BTreeSet::new(),
            bgp_routes: None,
            felix_routes: None,
            suppliers: None,
            notices: Vec::new(),
            tunnels: Settings::default(),
            wireguard: WireguardSettings::default(),
            holders: Holders::new(),
        }
    }

    /// Pools and nodes as the tunnels see them.
    #[must_use]
    pub const fn resolver(&self) -> &Resolver {
        &self.resolver
    }

    /// Tunnel settings.
    #[must_use]
    pub const fn tunnels(&self) -> &Settings {
        &self.tunnels
    }

    /// Settings of the encryption.
    #[must_use]
    pub const fn wireguard(&self) -> &WireguardSettings {
        &self.wireguard
    }

    /// Which other node holds which prefix, and which addresses of other nodes' blocks are this node's.
    #[must_use]
    pub const fn holders(&self) -> &Holders {
        &self.holders
    }

    /// What an operator should know of the settings.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Takes one object in.
    pub fn on_update(&mut self, update: &Update, out: &mut Vec<Input>) {
        let from = out.len();
        self.translate(update, out);
        for input in &out[from..] {
            match input {
                Input::Set(Source::BlockAffinity, prefix, candidate) => {
                    if let RouteSpec::Node(node) = &candidate.spec {
                        self.holders.insert(*prefix, node.clone());
                    }
                }
                Input::Remove(Source::BlockAffinity, prefix) => {
                    self.holders.remove(prefix);
                }
                _ => {}
            }
        }
        // An address that this node borrowed must not be looked for behind the block's holder.
        if update.key.kind == Kind::IPAMBlock
            && let Some(borrowed) = self.borrowed.get(&update.key)
        {
            let own = borrowed.iter().filter(|(_, node)| **node == self.local);
            self.holders
                .extend(own.map(|(address, node)| (*address, node.clone())));
        }
    }

    fn translate(&mut self, update: &Update, out: &mut Vec<Input>) {
        let (key, value) = (&update.key, update.value.as_deref());
        match (key.kind, value) {
            (Kind::IPPool, Some(AnyResource::IPPool(pool))) => {
                let pool = Pool::from(&**pool);
                self.resolver.set_pool(pool.clone());
                out.push(Input::Pool(pool));
            }
            (Kind::IPPool, _) => {
                self.resolver.remove_pool(&key.name);
                out.push(Input::PoolRemove(key.name.to_string()));
            }
            (Kind::Node, Some(AnyResource::Node(node))) => {
                let endpoint = Endpoint::from(&**node);
                self.resolver.set_node(endpoint.clone());
                out.push(Input::Node(endpoint));
            }
            (Kind::Node, _) => {
                let name = NodeName::from(&*key.name);
                self.resolver.remove_node(&name);
                out.push(Input::NodeRemove(name));
            }
            (Kind::BlockAffinity, value) => {
                let spec = match value {
                    Some(AnyResource::BlockAffinity(affinity)) => Some(&affinity.spec),
                    _ => None,
                };
                self.on_affinity(key, spec, out);
            }
            (Kind::IPAMBlock, value) => {
                let block = match value {
                    Some(AnyResource::IPAMBlock(block)) => Some(&**block),
                    _ => None,
                };
                self.on_block(key, block, out);
            }
            (Kind::BGPConfiguration, value) if &*key.name == "default" => {
                let spec = match value {
                    Some(AnyResource::BGPConfiguration(bgp)) => Some(&bgp.spec),
                    _ => None,
                };
                self.bgp_routes = spec.and_then(|spec| spec.program_cluster_routes);
                self.decide(out);
                self.peer_with_workloads(key, spec, out);
            }
            _ => {}
        }
    }

    /// Takes the node's effective settings in.
    pub fn on_settings(&mut self, spec: &FelixConfigurationSpec, out: &mut Vec<Input>) {
        let defaults = Settings::default();
        let some = |mtu: Option<u32>| mtu.filter(|mtu| *mtu != 0);
        self.tunnels = Settings {
            vni: spec.vxlan_vni.unwrap_or(defaults.vni),
            port: spec.vxlan_port.unwrap_or(defaults.port),
            vxlan_mtu: some(spec.vxlan_mtu),
            vxlan_mtu_v6: some(spec.vxlan_mtu_v6),
            ipip_mtu: some(spec.ipip_mtu),
            vxlan_enabled: spec.vxlan_enabled,
            ipip_enabled: spec.ipip_enabled,
        };
        self.wireguard = WireguardSettings::from(spec);
        self.felix_routes = spec.program_cluster_routes;
        self.decide(out);
    }

    /// The addresses that workloads peer with are this host's, on every node.
    fn peer_with_workloads(
        &mut self,
        key: &Key,
        spec: Option<&BGPConfigurationSpec>,
        out: &mut Vec<Input>,
    ) {
        let addresses = spec.into_iter().flat_map(|spec| {
            [
                spec.local_workload_peering_ip_v4,
                spec.local_workload_peering_ip_v6,
            ]
        });
        let now: BTreeSet<Cidr> = addresses.flatten().map(Cidr::host).collect();
        let gone = self.peering.difference(&now);
        out.extend(gone.map(|address| Input::Remove(Source::Static, *address)));
        let local = || Candidate::new(RouteSpec::Local, key.to_string());
        let new = now.difference(&self.peering);
        out.extend(new.map(|address| Input::Set(Source::Static, *address, local())));
        self.peering = now;
    }

    fn decide(&mut self, out: &mut Vec<Input>) {
        let felix = cluster_routes(self.felix_routes, ClusterRoutes::EnabledIpipOnly);
        let bgp = cluster_routes(self.bgp_routes, ClusterRoutes::EnabledNoEncapOnly);
        let (suppliers, notices) = Suppliers::decide(self.backend, felix, bgp);
        self.notices = notices;
        if self.suppliers.replace(suppliers) != Some(suppliers) {
            out.push(Input::Suppliers(suppliers));
        }
    }

    fn on_affinity(&mut self, key: &Key, spec: Option<&BlockAffinitySpec>, out: &mut Vec<Input>) {
        let wanted = spec.and_then(|spec| self.affinity_route(key, spec));
        let new = wanted
            .as_ref()
            .map(|(source, prefix, _)| (*source, *prefix));
        if let Some((source, prefix)) = self.affinities.remove(key)
            && Some((source, prefix)) != new
        {
            out.push(Input::Remove(source, prefix));
        }
        if let Some((source, prefix, candidate)) = wanted {
            self.affinities.insert(key.clone(), (source, prefix));
            out.push(Input::Set(source, prefix, candidate));
        }
    }

    fn affinity_route(
        &self,
        key: &Key,
        spec: &BlockAffinitySpec,
    ) -> Option<(Source, Cidr, Candidate)> {
        let of_a_node = spec.type_.is_none_or(|owner| owner == AffinityType::Host);
        if spec.deleted || spec.state != BlockAffinityState::Confirmed || !of_a_node {
            return None;
        }
        if spec.node != self.local.as_str() {
            let spec_of = RouteSpec::Node(NodeName::from(spec.node.as_str()));
            return Some((
                Source::BlockAffinity,
                spec.cidr,
                Candidate::new(spec_of, key.to_string()),
            ));
        }
        // A block of one address would hide the workload that has it.
        (!spec.cidr.is_host()).then(|| {
            (
                Source::LocalBlock,
                spec.cidr,
                Candidate::new(RouteSpec::Blackhole, key.to_string()),
            )
        })
    }

    fn on_block(&mut self, key: &Key, block: Option<&IPAMBlock>, out: &mut Vec<Input>) {
        let now: BTreeMap<Cidr, NodeName> = block.map(borrowed).unwrap_or_default();
        let before = self.borrowed.remove(key).unwrap_or_default();
        let gone: BTreeSet<&Cidr> = before
            .keys()
            .filter(|address| !now.contains_key(address))
            .collect();
        out.extend(
            gone.into_iter()
                .map(|address| Input::Remove(Source::BlockAffinity, *address)),
        );
        for (address, node) in &now {
            if before.get(address) == Some(node) {
                continue;
            }
            if *node == self.local {
                // This node's own workloads have their own routes.
                out.push(Input::Remove(Source::BlockAffinity, *address));
            } else {
                let candidate =
                    Candidate::new(RouteSpec::Node(node.clone()), format!("{key}, borrowed"));
                out.push(Input::Set(Source::BlockAffinity, *address, candidate));
            }
        }
        if !now.is_empty() {
            self.borrowed.insert(key.clone(), now);
        }
    }
}

/// Addresses of a block that another node than the block's owner uses.
fn borrowed(block: &IPAMBlock) -> BTreeMap<Cidr, NodeName> {
    let spec = &block.spec;
    let owner = spec
        .affinity
        .as_ref()
        .filter(|owner| owner.owner == AffinityType::Host)
        .map(|owner| &*owner.name);
    let mut all = BTreeMap::new();
    for (ordinal, attribute) in spec.allocations.iter().enumerate() {
        let Some(attribute) =
            attribute.and_then(|index| spec.attributes.get(usize::try_from(index).ok()?))
        else {
            continue;
        };
        let node = attribute
            .owner
            .as_ref()
            .and_then(|attributes| attributes.get("node"));
        let (Some(node), Some(address)) = (node, nth(&spec.cidr, ordinal)) else {
            continue;
        };
        if Some(node.as_str()) != owner {
            all.insert(Cidr::host(address), NodeName::from(node.as_str()));
        }
    }
    all
}

fn nth(block: &Cidr, ordinal: usize) -> Option<IpAddr> {
    let address = match block.addr() {
        IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(
            base.to_bits().checked_add(u32::try_from(ordinal).ok()?)?,
        )),
        IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(
            base.to_bits().checked_add(ordinal as u128)?,
        )),
    };
    block.contains(address).then_some(address)
}

fn cluster_routes(setting: Option<ProgramClusterRoutes>, default: ClusterRoutes) -> ClusterRoutes {
    match setting {
        None => default,
        Some(ProgramClusterRoutes::Enabled) => ClusterRoutes::Enabled,
        Some(ProgramClusterRoutes::Disabled) => ClusterRoutes::Disabled,
        Some(ProgramClusterRoutes::EnabledIPIPOnly) => ClusterRoutes::EnabledIpipOnly,
        Some(ProgramClusterRoutes::EnabledNoEncapOnly) => ClusterRoutes::EnabledNoEncapOnly,
    }
}

#[cfg(test)]
#[path = "resources_tests.rs"]
mod tests;
