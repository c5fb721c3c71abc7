//! Where the servers are: addresses that are given, or the ready endpoints of a service, asked for at each attempt to connect.
//! A server on the client's own node comes first; the others in an order of each client's own, so that clients spread over them. While
//! the service cannot be read, what was found last is used.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use cali_api::kubernetes::{Endpoint, EndpointSlice};
use cali_api::{AnyResource, Kind};
use cali_datastore::Datastore;
use tokio::time::timeout;

use crate::Chain;

/// Label of an EndpointSlice that names its service (Kubernetes, `discovery.k8s.io/v1`).
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Names of the port: Calico's, and that of our manifests.
const PORT_NAMES: [&str; 2] = ["calico-typha", "typha"];
const LIMIT: Duration = Duration::from_secs(10);

/// Where to connect to.
#[derive(Debug, Clone)]
pub enum Servers {
    /// `host:port` of each.
    Fixed(Vec<String>),
    /// Those behind a service.
    Service(Service),
}

/// A service of Kubernetes (`FELIX_TYPHAK8SSERVICENAME`, `FELIX_TYPHAK8SNAMESPACE`).
#[derive(Clone)]
pub struct Service {
    /// Where its EndpointSlices are.
    pub store: Arc<dyn Datastore>,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The client's node, as in `nodeName` of an endpoint.
    pub node: String,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Service({}/{})", self.namespace, self.name)
    }
}

/// A server.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    address: String,
    local: bool,
}

/// The ready endpoints of a service among these slices.
fn endpoints<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    service: &str,
    node: &str,
) -> Vec<Found> {
    let mut found = Vec::new();
    for slice in slices.filter(|slice| is_of(slice, service)) {
        let named = |name: &Option<String>| {
            let name = name.as_deref().unwrap_or_default();
            PORT_NAMES.contains(&name)
        };
        let ports = &slice.spec.ports;
        // A service of one port need not name it.
        let port = ports
            .iter()
            .find(|port| named(&port.name))
            .or_else(|| ports.first().filter(|_| ports.len() == 1))
            .and_then(|port| u16::try_from(port.port?).ok());
        let Some(port) = port else { continue };
        for endpoint in slice.spec.endpoints.iter().filter(|e| is_ready(e)) {
            let local = endpoint.node_name.as_deref() == Some(node);
            let addresses = endpoint.addresses.iter().map(|address| Found {
                address: crate::config::socket_address(address, port),
                local,
            });
            found.extend(addresses);
        }
    }
    found
}

/// Whether a slice belongs to this service.
pub(crate) fn is_of(slice: &EndpointSlice, service: &str) -> bool {
    slice.metadata.labels.get(SERVICE_LABEL).map(String::as_str) == Some(service)
}

/// Absent means ready (Kubernetes, `EndpointConditions`).
pub(crate) fn is_ready(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    conditions.and_then(|c| c.ready).unwrap_or(true)
}

/// Local ones first, the others in an order that depends on the seed.
fn ranked(mut found: Vec<Found>, seed: &RandomState) -> Vec<String> {
    found.sort_by_key(|one| (!one.local, seed.hash_one(&one.address)));
    found.dedup();
    found.into_iter().map(|one| one.address).collect()
}

impl Servers {
    /// Brings the list up to date; it stays as it is when nothing can be found out.
    pub(super) async fn refresh(&self, known: &mut Vec<String>, seed: &RandomState) {
        let found = match self {
            Self::Fixed(addresses) => addresses
                .iter()
                .map(|address| Found {
                    address: address.clone(),
                    local: false,
                })
                .collect(),
            Self::Service(service) => match service.find().await {
                Ok(found) => found,
                Err(reason) => {
                    tracing::warn!(
                        ?service,
                        reason,
                        known = known.len(),
                        "servers cannot be looked up, those found last are tried"
                    );
                    return;
                }
            },
        };
        if !found.is_empty() {
            *known = ranked(found, seed);
        }
    }
}

impl Service {
    async fn find(&self) -> Result<Vec<Found>, String> {
        let list = self
            .store
            .list(Kind::K8sEndpointSlice, Some(&self.namespace));
        let list = timeout(LIMIT, list)
            .await
            .map_err(|_| "no answer in time")?;
        let items = list.map_err(|error| Chain(&error).to_string())?.items;
        let slices = items.iter().filter_map(|item| match &*item.object {
            AnyResource::K8sEndpointSlice(slice) => Some(&**slice),
            _ => None,
        });
        Ok(endpoints(slices, &self.name, &self.node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(name: &str, service: &str, endpoints: serde_json::Value) -> AnyResource {
        AnyResource::from_json(serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "kube-system", "labels": {SERVICE_LABEL: service}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "metrics", "port": 9093}, {"name": "calico-typha", "port": 5473}],
        }))
        .unwrap()
    }

    #[test]
    fn the_local_server_comes_first_and_what_is_not_ready_or_of_another_service_never() {
        let own = slice(
            "t-1",
            "calico-typha",
            serde_json::json!([
                {"addresses": ["10.0.0.1"], "nodeName": "a"},
                {"addresses": ["10.0.0.2"], "nodeName": "b", "conditions": {"ready": true}},
                {"addresses": ["10.0.0.3"], "nodeName": "c", "conditions": {"ready": false}},
                {"addresses": ["fd00::4"]},
            ]),
        );
        let other = slice(
            "o-1",
            "other",
            serde_json::json!([{"addresses": ["10.9.9.9"]}]),
        );
        let all = [own, other];
        let slices = || {
            all.iter().filter_map(|any| match any {
                AnyResource::K8sEndpointSlice(slice) => Some(&**slice),
                _ => None,
            })
        };
        let mut orders = std::collections::BTreeSet::new();
        for _ in 0..50 {
            let found = ranked(
                endpoints(slices(), "calico-typha", "b"),
                &RandomState::new(),
            );
            assert_eq!(found[0], "10.0.0.2:5473");
            let mut rest = found[1..].to_vec();
            orders.insert(rest.clone());
            rest.sort();
            assert_eq!(rest, ["10.0.0.1:5473", "[fd00::4]:5473"]);
        }
        assert_eq!(orders.len(), 2, "clients spread over the others");
    }
}
