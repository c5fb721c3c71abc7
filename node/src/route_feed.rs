//! What the datastore says about routes, put into the words of `cali-routes` and `ipip-vxlan`. Pure.

use std::collections::BTreeMap;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::v3::{
    AffinityType, BlockAffinityState, FelixConfigurationSpec, ProgramClusterRoutes,
};
use cali_api::{AnyResource, Cidr, Key, Kind, NodeName};
use cali_routes::{Backend, Candidate, ClusterRoutes, Input, RouteSpec, Source, Suppliers};
use ipip_vxlan::{Endpoint, Pool, Resolver, Settings};

/// The kinds that this feed reads.
pub const KINDS: &[Kind] = &[
    Kind::Node,
    Kind::IPPool,
    Kind::BlockAffinity,
    Kind::BGPConfiguration,
    Kind::FelixConfiguration,
];

/// See the module's text.
#[derive(Debug)]
pub struct RouteFeed {
    local: NodeName,
    backend: Backend,
    resolver: Resolver,
    /// The confirmed affinities, to know what an object's deletion or edit takes back.
    affinities: BTreeMap<Key, (Source, Cidr)>,
    felix: BTreeMap<Key, FelixConfigurationSpec>,
    bgp: BTreeMap<Key, Option<ClusterRoutes>>,
    notices: Vec<String>,
}

impl RouteFeed {
    /// A feed for this node.
    pub fn new(local: NodeName, backend: Backend) -> Self {
        Self {
            resolver: Resolver::new(local.clone()),
            local,
            backend,
            affinities: BTreeMap::new(),
            felix: BTreeMap::new(),
            bgp: BTreeMap::new(),
            notices: Vec::new(),
        }
    }

    /// Whether a speaker runs on this node.
    pub fn uses_bgp(&self) -> bool {
        self.backend == Backend::Bgp
    }

    /// Pools and nodes as they are now, for the tunnels.
    pub fn resolver(&self) -> &Resolver {
        &self.resolver
    }

    /// What an operator should know about the settings.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The inputs that an event makes.
    pub fn on_event(&mut self, event: &SyncEvent) -> Vec<Input> {
        let mut inputs = Vec::new();
        match event {
            SyncEvent::Status(SyncStatus::InSync) => {
                inputs.push(Input::Suppliers(self.suppliers()));
                inputs.push(Input::InSync);
            }
            SyncEvent::Status(_) => {}
            SyncEvent::Updates(updates) => {
                for update in updates {
                    self.on_update(update, &mut inputs);
                }
            }
        }
        inputs
    }

    fn on_update(&mut self, update: &Update, inputs: &mut Vec<Input>) {
        let name = &*update.key.name;
        match (update.key.kind, update.value.as_deref()) {
            (Kind::Node, Some(AnyResource::Node(node))) => {
                let endpoint = Endpoint::from(&**node);
                self.resolver.set_node(endpoint.clone());
                inputs.push(Input::Node(endpoint));
            }
            (Kind::Node, _) => {
                let name = NodeName::from(name);
                self.resolver.remove_node(&name);
                inputs.push(Input::NodeRemove(name));
            }
            (Kind::IPPool, Some(AnyResource::IPPool(pool))) => {
                let pool = Pool::from(&**pool);
                self.resolver.set_pool(pool.clone());
                inputs.push(Input::Pool(pool));
            }
            (Kind::IPPool, _) => {
                self.resolver.remove_pool(name);
                inputs.push(Input::PoolRemove(name.to_owned()));
            }
            (Kind::BlockAffinity, value) => self.on_affinity(&update.key, value, inputs),
            (Kind::FelixConfiguration, value) => {
                match value {
                    Some(AnyResource::FelixConfiguration(config)) => {
                        self.felix.insert(update.key.clone(), config.spec.clone());
                    }
                    _ => drop(self.felix.remove(&update.key)),
                }
                inputs.push(Input::Suppliers(self.suppliers()));
            }
            (Kind::BGPConfiguration, value) => {
                match value {
                    Some(AnyResource::BGPConfiguration(config)) => {
                        let routes = config.spec.program_cluster_routes.map(cluster_routes);
                        self.bgp.insert(update.key.clone(), routes);
                    }
                    _ => drop(self.bgp.remove(&update.key)),
                }
                inputs.push(Input::Suppliers(self.suppliers()));
            }
            _ => {}
        }
    }

    fn on_affinity(&mut self, key: &Key, value: Option<&AnyResource>, inputs: &mut Vec<Input>) {
        let wanted = match value {
            Some(AnyResource::BlockAffinity(affinity))
                // A pending one may still be lost to another node; one that is being given up no longer counts.
                if affinity.spec.state == BlockAffinityState::Confirmed
                    && affinity.spec.type_ != Some(AffinityType::Virtual) =>
            {
                let node = NodeName::from(affinity.spec.node.as_str());
                let (source, spec) = if node == self.local {
                    (Source::LocalBlock, RouteSpec::Blackhole)
                } else {
                    (Source::BlockAffinity, RouteSpec::Node(node))
                };
                Some((source, affinity.spec.cidr, spec))
            }
            _ => None,
        };
        let place = wanted.as_ref().map(|(source, cidr, _)| (*source, *cidr));
        let former = match place {
            Some(place) => self.affinities.insert(key.clone(), place),
            None => self.affinities.remove(key),
        };
        // The block may be another node's by now: only what nobody else has proposed since is taken back.
        if let Some(former) = former
            && Some(former) != place
            && !self.affinities.values().any(|other| *other == former)
        {
            inputs.push(Input::Remove(former.0, former.1));
        }
        if let Some((source, cidr, spec)) = wanted {
            inputs.push(Input::Set(
                source,
                cidr,
                Candidate::new(spec, key.to_string()),
            ));
        }
    }

    fn suppliers(&mut self) -> Suppliers {
        let [specific, general] = self.configuration_keys(Kind::FelixConfiguration);
        let felix = [specific, general]
            .into_iter()
            .find_map(|key| self.felix.get(&key)?.program_cluster_routes);
        let felix = felix.map_or(ClusterRoutes::EnabledIpipOnly, cluster_routes);
        let [specific, general] = self.configuration_keys(Kind::BGPConfiguration);
        let bgp = [specific, general]
            .into_iter()
            .find_map(|key| self.bgp.get(&key).copied().flatten());
        let bgp = bgp.unwrap_or(ClusterRoutes::EnabledNoEncapOnly);
        let (suppliers, notices) = Suppliers::decide(self.backend, felix, bgp);
        self.notices = notices;
        suppliers
    }

    /// The tunnels' settings: those of this node, where set, before those of the cluster. An MTU of 0 means detected.
    pub fn tunnel_settings(&self) -> Settings {
        let keys = self.configuration_keys(Kind::FelixConfiguration);
        let specs: Vec<&FelixConfigurationSpec> =
            keys.iter().filter_map(|key| self.felix.get(key)).collect();
        let defaults = Settings::default();
        let mtu = |of: fn(&FelixConfigurationSpec) -> Option<u32>| {
            specs
                .iter()
                .find_map(|spec| of(spec))
                .filter(|mtu| *mtu != 0)
        };
        Settings {
            vni: specs
                .iter()
                .find_map(|spec| spec.vxlan_vni)
                .unwrap_or(defaults.vni),
            port: specs
                .iter()
                .find_map(|spec| spec.vxlan_port)
                .unwrap_or(defaults.port),
            vxlan_mtu: mtu(|spec| spec.vxlan_mtu),
            vxlan_mtu_v6: mtu(|spec| spec.vxlan_mtu_v6),
            ipip_mtu: mtu(|spec| spec.ipip_mtu),
            vxlan_enabled: specs.iter().find_map(|spec| spec.vxlan_enabled),
            ipip_enabled: specs.iter().find_map(|spec| spec.ipip_enabled),
        }
    }

    /// `node.<name>`, then `default`.
    fn configuration_keys(&self, kind: Kind) -> [Key; 2] {
        [
            Key::cluster(kind, format!("node.{}", self.local)),
            Key::cluster(kind, "default"),
        ]
    }
}

const fn cluster_routes(setting: ProgramClusterRoutes) -> ClusterRoutes {
    match setting {
        ProgramClusterRoutes::Enabled => ClusterRoutes::Enabled,
        ProgramClusterRoutes::Disabled => ClusterRoutes::Disabled,
        ProgramClusterRoutes::EnabledIPIPOnly => ClusterRoutes::EnabledIpipOnly,
        ProgramClusterRoutes::EnabledNoEncapOnly => ClusterRoutes::EnabledNoEncapOnly,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cali_api::Revision;
    use serde_json::{Value, json};

    use super::*;

    fn feed() -> RouteFeed {
        RouteFeed::new(NodeName::from("n1"), Backend::Bgp)
    }

    fn updates(objects: &[Value]) -> SyncEvent {
        let update = |object: &Value| {
            let value = AnyResource::from_json(object.clone()).unwrap();
            Update {
                key: value.key(),
                value: Some(Arc::new(value)),
                revision: Revision::from("1"),
            }
        };
        SyncEvent::Updates(objects.iter().map(update).collect())
    }

    fn deletion(kind: Kind, name: &str) -> SyncEvent {
        let key = Key::cluster(kind, name);
        SyncEvent::Updates(vec![Update {
            key,
            value: None,
            revision: Revision::from("2"),
        }])
    }

    fn affinity(node: &str, cidr: &str, state: &str) -> Value {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "BlockAffinity",
            "metadata": {"name": format!("{node}-{}", cidr.replace(['.', '/'], "-"))},
            "spec": {"node": node, "cidr": cidr, "state": state}})
    }

    #[test]
    fn own_blocks_are_dropped_and_others_lead_to_their_node() {
        let mut feed = feed();
        let inputs = feed.on_event(&updates(&[
            affinity("n1", "10.0.0.0/26", "confirmed"),
            affinity("n2", "10.0.0.64/26", "confirmed"),
            affinity("n3", "10.0.0.128/26", "pending"),
        ]));
        let expected = [
            Input::Set(
                Source::LocalBlock,
                "10.0.0.0/26".parse().unwrap(),
                Candidate::new(RouteSpec::Blackhole, "BlockAffinity(n1-10-0-0-0-26)"),
            ),
            Input::Set(
                Source::BlockAffinity,
                "10.0.0.64/26".parse().unwrap(),
                Candidate::new(
                    RouteSpec::Node("n2".into()),
                    "BlockAffinity(n2-10-0-0-64-26)",
                ),
            ),
        ];
        assert_eq!(inputs, expected);
    }

    #[test]
    fn an_affinity_that_ends_takes_its_route_back_but_not_its_successors() {
        let mut feed = feed();
        let cidr: Cidr = "10.0.0.64/26".parse().unwrap();
        feed.on_event(&updates(&[affinity("n2", "10.0.0.64/26", "confirmed")]));
        let moved = feed.on_event(&updates(&[affinity("n3", "10.0.0.64/26", "confirmed")]));
        assert!(
            matches!(&moved[..], [Input::Set(Source::BlockAffinity, at, _)] if *at == cidr),
            "{moved:?}"
        );
        assert_eq!(
            feed.on_event(&deletion(Kind::BlockAffinity, "n2-10-0-0-64-26")),
            []
        );
        let given_up = feed.on_event(&updates(&[affinity(
            "n3",
            "10.0.0.64/26",
            "pendingDeletion",
        )]));
        assert_eq!(given_up, [Input::Remove(Source::BlockAffinity, cidr)]);
    }

    #[test]
    fn settings_of_the_node_win_over_those_of_the_cluster() {
        let mut feed = feed();
        let config = |name: &str, spec: Value| {
            json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration",
                "metadata": {"name": name}, "spec": spec})
        };
        feed.on_event(&updates(&[
            config(
                "default",
                json!({"vxlanVNI": 5, "vxlanPort": 4000, "vxlanMTU": 0}),
            ),
            config("node.n1", json!({"vxlanVNI": 7})),
            config("node.n2", json!({"vxlanVNI": 9})),
        ]));
        let settings = feed.tunnel_settings();
        assert_eq!(
            (settings.vni, settings.port, settings.vxlan_mtu),
            (7, 4000, None)
        );
    }

    #[test]
    fn in_sync_states_the_suppliers_first() {
        let inputs = feed().on_event(&SyncEvent::Status(SyncStatus::InSync));
        assert_eq!(
            inputs,
            [Input::Suppliers(Suppliers::default()), Input::InSync]
        );
    }
}
