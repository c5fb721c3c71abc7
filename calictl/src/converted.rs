//! Resources as the daemons see them: what is stored, and what native Kubernetes objects amount to.
//!
//! A stored resource hides a converted one of the same name, as in `cali_datastore::sync`.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::{AnyResource, Key, Kind, kubernetes};
use cali_datastore::{Datastore, Error};

/// The native kinds that resources of this kind are made from.
fn sources(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::Profile => &[Kind::K8sNamespace, Kind::K8sServiceAccount],
        Kind::WorkloadEndpoint => &[Kind::K8sPod],
        Kind::NetworkPolicy => &[Kind::K8sNetworkPolicy],
        Kind::GlobalNetworkPolicy => &[
            Kind::K8sClusterNetworkPolicy,
            Kind::K8sAdminNetworkPolicy,
            Kind::K8sBaselineAdminNetworkPolicy,
        ],
        Kind::Node => &[Kind::K8sNode],
        _ => &[],
    }
}

/// All resources of a kind, in one namespace or in all, ordered by name.
pub(crate) async fn list(
    store: &dyn Datastore,
    kind: Kind,
    namespace: Option<&str>,
) -> Result<Vec<Arc<AnyResource>>, Error> {
    let mut found: BTreeMap<Key, Arc<AnyResource>> = BTreeMap::new();
    for source in sources(kind) {
        // A cluster-scoped result may come from any namespace (the profile of a service account).
        let within = namespace.filter(|_| kind.is_namespaced());
        for item in store.list(*source, within).await?.items {
            let converted = kubernetes::to_calico(&item.object).into_iter();
            found.extend(
                converted
                    .filter(|object| object.kind() == kind)
                    .map(|object| (object.key(), Arc::new(object))),
            );
        }
    }
    for item in store.list(kind, namespace).await?.items {
        found.insert(item.object.key(), item.object);
    }
    Ok(found.into_values().collect())
}

/// One resource.
pub(crate) async fn get(store: &dyn Datastore, key: &Key) -> Result<Arc<AnyResource>, Error> {
    let missing = match store.get(key).await {
        Ok(found) => return Ok(found.object),
        Err(error @ Error::NotFound { .. }) if !sources(key.kind).is_empty() => error,
        Err(error) => return Err(error),
    };
    let all = list(store, key.kind, key.namespace.as_deref()).await?;
    all.into_iter()
        .find(|object| object.key() == *key)
        .ok_or(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_datastore::sqlite::Sqlite;
    use serde_json::json;

    #[tokio::test]
    async fn a_pod_is_listed_as_the_endpoint_it_amounts_to() {
        let folder = tempfile::tempdir().unwrap();
        let store = Sqlite::open(&folder.path().join("cali.db")).unwrap();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web", "namespace": "shop", "annotations": {"cni.projectcalico.org/podIP": "10.0.0.1/32"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
        });
        store
            .apply(AnyResource::from_json(pod).unwrap())
            .await
            .unwrap();
        let endpoints = list(&store, Kind::WorkloadEndpoint, Some("shop"))
            .await
            .unwrap();
        assert_eq!(endpoints.len(), 1);
        assert!(
            list(&store, Kind::WorkloadEndpoint, Some("other"))
                .await
                .unwrap()
                .is_empty()
        );
        let key = endpoints[0].key();
        assert_eq!(get(&store, &key).await.unwrap(), endpoints[0]);
        let absent = Key::namespaced(Kind::WorkloadEndpoint, "shop", "absent");
        assert!(matches!(
            get(&store, &absent).await,
            Err(Error::NotFound { .. })
        ));
    }
}
