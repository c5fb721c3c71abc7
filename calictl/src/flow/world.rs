//! What the datastore says of pods, policies, pools and nodes, as one value.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::v3::{StagedAction, WorkloadEndpoint};
use cali_api::{AnyResource, Key, Kind};
use felix::verdict::Model;
use tokio::sync::mpsc;

use super::query::End;
use crate::connection;

/// How long the datastore may take to say everything.
const LIMIT: Duration = Duration::from_secs(30);

/// All objects that verdicts and paths depend on.
#[derive(Debug, Clone, Default)]
pub(crate) struct World {
    pub(crate) objects: BTreeMap<Key, Arc<AnyResource>>,
}

/// The world as it changes.
pub(crate) struct Live {
    pub(crate) world: World,
    stream: mpsc::Receiver<SyncEvent>,
}

impl Live {
    /// Reads everything, and follows what comes.
    pub(crate) async fn start() -> Result<Self> {
        let stream = cali_datastore::sync::start(connection::open().await?, &kinds());
        let mut live = Self {
            world: World::default(),
            stream,
        };
        let reading = async {
            while let Some(event) = live.stream.recv().await {
                match event {
                    SyncEvent::Updates(updates) => live.world.apply(updates),
                    SyncEvent::Status(SyncStatus::InSync) => return Ok(()),
                    SyncEvent::Status(_) | SyncEvent::Complete(_) => {}
                }
            }
            bail!("the datastore's stream has ended")
        };
        tokio::time::timeout(LIMIT, reading)
            .await
            .context("the datastore did not say everything within 30 s")??;
        Ok(live)
    }

    /// Waits for a change; says whether objects changed.
    pub(crate) async fn next(&mut self) -> Result<bool> {
        match self.stream.recv().await {
            Some(SyncEvent::Updates(updates)) => {
                self.world.apply(updates);
                Ok(true)
            }
            Some(SyncEvent::Status(_) | SyncEvent::Complete(_)) => Ok(false),
            None => bail!("the datastore's stream has ended"),
        }
    }
}

/// Who is at one end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Party {
    pub(crate) address: IpAddr,
    /// The workload endpoint that has the address.
    pub(crate) endpoint: Option<Key>,
    /// `namespace/pod`, or the address.
    pub(crate) name: String,
    pub(crate) node: Option<String>,
    pub(crate) interface: Option<String>,
}

impl World {
    /// Reads the datastore, as the daemons do.
    pub(crate) async fn read() -> Result<Self> {
        Ok(Live::start().await?.world)
    }

    fn apply(&mut self, updates: Vec<Update>) {
        for update in updates {
            match update.value {
                Some(object) => self.objects.insert(update.key, object),
                None => self.objects.remove(&update.key),
            };
        }
    }

    /// What policy says.
    pub(crate) fn model(&self) -> Model {
        self.objects.values().cloned().collect()
    }

    /// The world in which all staged policies have been committed; `None` where there are none.
    pub(crate) fn committed(&self) -> Option<Self> {
        let mut after = self.clone();
        let mut staged = 0;
        for (key, object) in &self.objects {
            let (kind, action, spec) = match &**object {
                AnyResource::StagedNetworkPolicy(policy) => {
                    let (action, spec) = policy.spec.committed();
                    (Kind::NetworkPolicy, action, serde_json::to_value(spec))
                }
                AnyResource::StagedGlobalNetworkPolicy(policy) => {
                    let (action, spec) = policy.spec.committed();
                    (
                        Kind::GlobalNetworkPolicy,
                        action,
                        serde_json::to_value(spec),
                    )
                }
                _ => continue,
            };
            let mut metadata = serde_json::json!({"name": key.name});
            if let Some(namespace) = &key.namespace {
                metadata["namespace"] = namespace.to_string().into();
            }
            let manifest = serde_json::json!({"apiVersion": "projectcalico.org/v3", "kind": kind.name(),
                "metadata": metadata, "spec": spec.unwrap_or_default()});
            let Ok(object) = AnyResource::from_json(manifest) else {
                continue;
            };
            match action {
                StagedAction::Delete => after.objects.remove(&object.key()),
                StagedAction::Set => after.objects.insert(object.key(), Arc::new(object)),
                // Neither says what would be committed.
                _ => continue,
            };
            staged += 1;
        }
        (staged > 0).then_some(after)
    }

    fn endpoints(&self) -> impl Iterator<Item = (&Key, &WorkloadEndpoint)> {
        self.objects
            .iter()
            .filter_map(|(key, object)| match &**object {
                AnyResource::WorkloadEndpoint(endpoint) => Some((key, &**endpoint)),
                _ => None,
            })
    }

    /// All workloads, each with its first address of a family.
    pub(crate) fn workloads(&self, v6: bool) -> Vec<Party> {
        self.endpoints()
            .filter_map(|(key, endpoint)| Some(party(key, endpoint, address(endpoint, v6)?)))
            .collect()
    }

    /// Finds out who is meant; `v6` chooses among the addresses of a pod.
    pub(crate) fn find(&self, end: &End, v6: bool) -> Result<Party> {
        match end {
            End::Address(addr) => Ok(self.at(*addr)),
            End::Pod { namespace, name } => {
                let of_namespace = |key: &Key| key.namespace.as_deref() == Some(namespace.as_str());
                let found = self.endpoints().find(|(key, endpoint)| {
                    of_namespace(key) && (endpoint.spec.pod == *name || *key.name == **name)
                });
                let Some((key, endpoint)) = found else {
                    let others: Vec<&str> = self
                        .endpoints()
                        .filter(|(key, _)| of_namespace(key))
                        .map(|(_, endpoint)| endpoint.spec.pod.as_str())
                        .take(8)
                        .collect();
                    if others.is_empty() {
                        bail!("namespace {namespace} has no pods with an address");
                    }
                    bail!(
                        "there is no pod {namespace}/{name} with an address; namespace {namespace} has {}",
                        others.join(", ")
                    );
                };
                let family = if v6 { "IPv6" } else { "IPv4" };
                let address = address(endpoint, v6)
                    .with_context(|| format!("{namespace}/{name} has no {family} address"))?;
                Ok(party(key, endpoint, address))
            }
        }
    }

    /// Who has an address.
    pub(crate) fn at(&self, addr: IpAddr) -> Party {
        let has = |endpoint: &WorkloadEndpoint| {
            endpoint
                .spec
                .ip_networks
                .iter()
                .any(|net| net.contains(addr))
        };
        match self.endpoints().find(|(_, endpoint)| has(endpoint)) {
            Some((key, endpoint)) => party(key, endpoint, addr),
            None => Party {
                address: addr,
                endpoint: None,
                name: addr.to_string(),
                node: None,
                interface: None,
            },
        }
    }
}

fn address(endpoint: &WorkloadEndpoint, v6: bool) -> Option<IpAddr> {
    let addresses = endpoint.spec.ip_networks.iter().map(|net| net.addr());
    addresses.into_iter().find(|addr| addr.is_ipv6() == v6)
}

fn party(key: &Key, endpoint: &WorkloadEndpoint, address: IpAddr) -> Party {
    let namespace = key.namespace.as_deref().unwrap_or("default");
    let name = if endpoint.spec.pod.is_empty() {
        &*key.name
    } else {
        endpoint.spec.pod.as_str()
    };
    let stated = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Party {
        address,
        endpoint: Some(key.clone()),
        name: format!("{namespace}/{name}"),
        node: stated(&endpoint.spec.node),
        interface: stated(&endpoint.spec.interface_name),
    }
}

/// What `cali-node` follows.
fn kinds() -> Vec<Kind> {
    Kind::ALL
        .iter()
        .copied()
        .filter(|kind| {
            !kind.is_native() || matches!(kind, Kind::K8sService | Kind::K8sEndpointSlice)
        })
        .collect()
}
