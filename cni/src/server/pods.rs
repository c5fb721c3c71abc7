//! What the datastore says about a pod that is being wired, and about what is not a pod.

use std::sync::Arc;
use std::time::Duration;

use cali_api::kubernetes::{self, Pod, annotation};
use cali_api::v3::{WorkloadEndpoint, WorkloadEndpointSpec};
use cali_api::{AnyResource, Cidr, Key, Kind, MacAddr, ObjectMeta, Resource, StringMap};
use cali_control::cni::Failure;
use cali_datastore::{Datastore, Error, WatchEvent};

use crate::spec::{code, failure, failure_of};

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

/// Reads the pod and its namespace; a pod that does not exist yet is waited for.
pub(super) async fn known(
    store: &Arc<dyn Datastore>,
    node: &str,
    who: &Who,
    wait: Duration,
) -> Result<Known, Failure> {
    let Who::Pod { namespace, name } = who else {
        return Ok(Known::default());
    };
    let away = |e: Error| {
        failure_of(
            code::TRY_AGAIN,
            format!("cannot read pod {namespace}/{name}"),
            &e,
        )
    };
    let found = tokio::time::timeout(wait, pod(store, namespace, name)).await;
    let Ok(pod) = found else {
        let msg = format!("pod {namespace}/{name} is not in the datastore yet; try again");
        return Err(failure(code::TRY_AGAIN, msg));
    };
    let pod = pod.map_err(away)?;
    let on = pod.spec.node_name.as_deref().unwrap_or_default();
    if on != node {
        let msg = format!("pod {namespace}/{name} is scheduled to node {on:?}, this is {node:?}");
        return Err(failure(code::POD, msg));
    }
    let mut known = Known {
        pod: Some(pod),
        ..Known::default()
    };
    match store
        .get(&Key::cluster(Kind::K8sNamespace, namespace.as_str()))
        .await
    {
        Ok(found) => {
            known.namespace_annotations = found.object.metadata().annotations.clone();
            known.namespace_labels = found.object.labels().clone();
        }
        Err(Error::NotFound { .. }) => {}
        Err(e) => return Err(away(e)),
    }
    Ok(known)
}

async fn pod(store: &Arc<dyn Datastore>, namespace: &str, name: &str) -> Result<Pod, Error> {
    let key = Key::namespaced(Kind::K8sPod, namespace, name);
    loop {
        // The revision is read first, so that a pod created in between is seen by the watch.
        let from = store.list(Kind::K8sPod, Some(namespace)).await?.revision;
        match store.get(&key).await {
            Ok(found) => {
                if let AnyResource::K8sPod(pod) = found.object.as_ref()
                    && pod.spec.node_name.is_some()
                {
                    return Ok(pod.as_ref().clone());
                }
            }
            Err(Error::NotFound { .. }) => {}
            Err(e) => return Err(e),
        }
        let mut watch = store.watch(&[Kind::K8sPod], &from).await?;
        loop {
            match watch.next().await {
                Some(Ok(WatchEvent::Put(put))) if put.object.key() == key => break,
                Some(Ok(_)) => {}
                Some(Err(Error::RevisionGone { .. })) | None => break,
                Some(Err(e)) => return Err(e),
            }
        }
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
