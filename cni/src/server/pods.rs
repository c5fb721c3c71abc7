//! What the datastore says about a pod that is being wired, and about what is not a pod.

use cali_api::kubernetes::{self, Pod, annotation};
use cali_api::v3::{WorkloadEndpoint, WorkloadEndpointSpec};
use cali_api::{Cidr, Key, Kind, MacAddr, ObjectMeta, Resource, StringMap};
use cali_control::cni::Failure;

use crate::spec::{code, failure};

/// Who the interface is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Who {
    /// A Kubernetes pod.
    Pod { namespace: String, name: String },
    /// A container that some other orchestrator runs.
    Container { id: String },
}

impl Who {
    /// From `CNI_ARGS`.
    pub(super) fn of(args: &StringMap, container_id: &str) -> Self {
        let arg = |name: &str| args.get(name).filter(|v| !v.is_empty()).cloned();
        match (arg("K8S_POD_NAMESPACE"), arg("K8S_POD_NAME")) {
            (Some(namespace), Some(name)) => Self::Pod { namespace, name },
            _ => Self::Container {
                id: container_id.to_owned(),
            },
        }
    }

    /// Name of the interface on the host.
    pub(super) fn interface(&self) -> String {
        match self {
            Self::Pod { namespace, name } => kubernetes::interface_name(namespace, name),
            Self::Container { id } => format!(
                "{}{}",
                kubernetes::INTERFACE_PREFIX,
                id.chars().take(11).collect::<String>()
            ),
        }
    }

    /// Key of the WorkloadEndpoint.
    pub(super) fn endpoint_key(&self, node: &str) -> Key {
        match self {
            Self::Pod { namespace, name } => {
                let endpoint = kubernetes::workload_endpoint_name(node, name);
                Key::namespaced(Kind::WorkloadEndpoint, namespace.as_str(), endpoint)
            }
            Self::Container { id } => {
                let part = |text: &str| text.replace('-', "--");
                let name = format!(
                    "{}-cni-{}-{}",
                    part(node),
                    part(id),
                    kubernetes::POD_INTERFACE
                );
                Key::namespaced(Kind::WorkloadEndpoint, "default", name.to_lowercase())
            }
        }
    }
}

/// What is known about a workload.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub(super) pod: Option<Pod>,
    pub(super) namespace_annotations: StringMap,
    pub(super) namespace_labels: StringMap,
}

impl Known {
    pub(super) fn annotations(&self) -> StringMap {
        self.pod
            .as_ref()
            .map(|p| p.metadata.annotations.clone())
            .unwrap_or_default()
    }
}

/// An interface that stands.
#[derive(Debug, Clone)]
pub(super) struct Standing<'a> {
    pub(super) node: &'a str,
    pub(super) who: &'a Who,
    pub(super) network: &'a str,
    pub(super) container_id: &'a str,
    pub(super) ifname: &'a str,
    pub(super) addresses: &'a [Cidr],
    pub(super) mac: MacAddr,
}

/// The endpoint as the datastore will show it.
pub(super) fn endpoint(
    known: &Known,
    standing: &Standing<'_>,
) -> Result<WorkloadEndpoint, Failure> {
    let mut endpoint = match &known.pod {
        Some(pod) => {
            let mut pod = pod.clone();
            let annotations =
                kubernetes::address_annotations(standing.addresses, standing.container_id);
            pod.metadata.annotations.extend(annotations);
            let mut problems = Vec::new();
            let endpoint = kubernetes::workload_endpoint(&pod, &mut problems);
            for problem in problems {
                tracing::warn!(pod = %pod.key(), problem, "part of a pod cannot be used");
            }
            endpoint.ok_or_else(|| {
                failure(
                    code::POD,
                    "the pod has finished, or uses the host's network",
                )
            })?
        }
        None => plain_endpoint(standing),
    };
    // Status of an earlier sandbox may still be shown in the pod: what stands here is what counts.
    endpoint.spec.ip_networks = standing.addresses.to_vec();
    endpoint.spec.interface_name = standing.who.interface();
    standing
        .container_id
        .clone_into(&mut endpoint.spec.container_id);
    endpoint.spec.mac = Some(standing.mac);
    Ok(endpoint)
}

fn plain_endpoint(standing: &Standing<'_>) -> WorkloadEndpoint {
    let key = standing.who.endpoint_key(standing.node);
    let mut metadata =
        ObjectMeta::namespaced(key.namespace.as_deref().unwrap_or("default"), &*key.name);
    let labels = [
        (kubernetes::LABEL_ORCHESTRATOR, "cni"),
        (kubernetes::LABEL_NAMESPACE, "default"),
    ];
    metadata.labels = labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let spec = WorkloadEndpointSpec {
        orchestrator: "cni".to_owned(),
        workload: standing.container_id.to_owned(),
        node: standing.node.to_owned(),
        endpoint: standing.ifname.to_owned(),
        profiles: vec![standing.network.to_owned()],
        ..WorkloadEndpointSpec::default()
    };
    Resource::new(metadata, spec)
}

/// Whether the pod shows these addresses and this sandbox already.
pub(super) fn shows(pod: &Pod, annotations: &StringMap) -> bool {
    annotations
        .iter()
        .all(|(name, value)| pod.metadata.annotations.get(name) == Some(value))
}

/// Whether what the pod shows was written for this sandbox.
pub(super) fn is_of(pod: &Pod, container_id: &str) -> bool {
    pod.metadata
        .annotations
        .get(annotation::CONTAINER_ID)
        .is_some_and(|id| id == container_id)
}
