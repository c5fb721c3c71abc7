//! How many connections this replica should have, from the numbers of nodes and of replicas (Calico: `ConnectionRebalancingMode=kubernetes`).
//! No I/O: it is told the datastore's changes.

use std::collections::{HashMap, HashSet};

use cali_api::update::Update;
use cali_api::{AnyResource, Key, Kind};

use crate::client::discovery::{is_of, is_ready};

/// Connections of one node: its agent's and its BGP speaker's.
const PER_NODE: usize = 2;

/// The service behind which the replicas are, and the bounds (`MaxConnectionsLowerLimit`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebalancing {
    /// Namespace of the service.
    pub namespace: String,
    /// Name of the service.
    pub service: String,
    /// So many are always taken.
    pub lower: usize,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Balance {
    settings: Rebalancing,
    nodes: HashSet<Key>,
    replicas: HashMap<Key, usize>,
}

impl Balance {
    pub(super) fn new(settings: Rebalancing) -> Self {
        Self {
            settings,
            nodes: HashSet::new(),
            replicas: HashMap::new(),
        }
    }

    pub(super) fn on_update(&mut self, update: &Update) {
        let key = &update.key;
        match (key.kind, update.value.as_deref()) {
            (Kind::Node, Some(_)) => drop(self.nodes.insert(key.clone())),
            (Kind::Node, None) => drop(self.nodes.remove(key)),
            (Kind::K8sEndpointSlice, Some(AnyResource::K8sEndpointSlice(slice)))
                if key.namespace.as_deref() == Some(&self.settings.namespace)
                    && is_of(slice, &self.settings.service) =>
            {
                let ready = slice.spec.endpoints.iter().filter(|e| is_ready(e)).count();
                self.replicas.insert(key.clone(), ready);
            }
            (Kind::K8sEndpointSlice, _) => drop(self.replicas.remove(key)),
            _ => {}
        }
    }

    /// The most connections that this replica keeps, never more than `upper`. A fifth more than its share if one replica were
    /// missing, so that a replica that restarts does not set everybody moving.
    pub(super) fn limit(&self, upper: usize) -> usize {
        let replicas: usize = self.replicas.values().sum();
        if replicas < 2 {
            return upper;
        }
        let share = PER_NODE * (1 + self.nodes.len() * 120 / (replicas - 1) / 100);
        share.max(self.settings.lower).min(upper)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cali_api::Revision;

    use super::*;

    fn update(json: serde_json::Value) -> Update {
        let value = AnyResource::from_json(json).unwrap();
        Update {
            key: value.key(),
            value: Some(Arc::new(value)),
            revision: Revision::from("1"),
        }
    }

    fn slice(service: &str, endpoints: usize) -> Update {
        let endpoints: Vec<_> = (0..endpoints)
            .map(|n| serde_json::json!({"addresses": [format!("10.0.0.{n}")], "conditions": {"ready": n != 0}}))
            .collect();
        update(serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{service}-1"), "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 5473}],
        }))
    }

    #[test]
    fn the_share_follows_nodes_and_ready_replicas() {
        let mut balance = Balance::new(Rebalancing {
            namespace: "kube-system".into(),
            service: "typha".into(),
            lower: 400,
        });
        for number in 0..5000 {
            balance.on_update(&update(serde_json::json!({
                "apiVersion": "projectcalico.org/v3", "kind": "Node", "metadata": {"name": format!("n{number}")}, "spec": {},
            })));
        }
        assert_eq!(balance.limit(10_000), 10_000, "alone it takes everybody");
        balance.on_update(&slice("other", 9));
        assert_eq!(balance.limit(10_000), 10_000);
        // One of six is not ready.
        balance.on_update(&slice("typha", 6));
        assert_eq!(balance.limit(10_000), 2 * (1 + 5000 * 120 / 4 / 100));
        assert_eq!(balance.limit(1000), 1000);
        balance.on_update(&slice("typha", 40));
        assert_eq!(balance.limit(10_000), 400);
        let gone = Update {
            value: None,
            ..slice("typha", 1)
        };
        balance.on_update(&gone);
        assert_eq!(balance.limit(10_000), 10_000);
    }
}
