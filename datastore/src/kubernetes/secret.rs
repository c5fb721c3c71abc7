//! Secrets: read by name, and written over by compare-and-swap. They are never listed or watched, so that a role can name them.

use std::collections::BTreeMap;

use cali_api::Revision;
use k8s_openapi::ByteString;
use kube::api::{GetParams, Patch, PatchParams};
use kube::core::Request;
use serde::Deserialize;
use serde_json::{Value, json};

use super::cluster::{Cluster, Failed, call};
use super::failure::is_missing;
use crate::{Error, SecretObject};

/// What is read of a secret.
#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    data: BTreeMap<String, ByteString>,
    metadata: Metadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    resource_version: String,
}

fn secrets(namespace: &str) -> Request {
    Request::new(format!("/api/v1/namespaces/{namespace}/secrets"))
}

pub(super) async fn read(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
) -> Result<Option<SecretObject>, Error> {
    let request = secrets(namespace).get(name, &GetParams::default());
    match call::<Body>(&cluster.client, request).await {
        Ok(body) => Ok(Some(SecretObject {
            data: body.data.into_iter().map(|(k, v)| (k, v.0)).collect(),
            annotations: body.metadata.annotations,
            revision: Revision::from(body.metadata.resource_version),
        })),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error.unavailable(format!("read Secret({namespace}/{name})"))),
    }
}

pub(super) async fn replace(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    new: &SecretObject,
) -> Result<bool, Error> {
    let Some(stands) = read(cluster, namespace, name).await? else {
        return Ok(false);
    };
    // What is no longer wanted is named, too: a merge leaves out nothing by itself. Labels and what others annotate stay.
    let mut data: BTreeMap<&str, Value> = BTreeMap::new();
    for gone in stands.data.keys() {
        data.insert(gone, Value::Null);
    }
    for (key, value) in &new.data {
        data.insert(key, json!(ByteString(value.clone())));
    }
    let patch = json!({
        "metadata": {"resourceVersion": new.revision.as_str(), "annotations": new.annotations},
        "data": data,
    });
    let request = secrets(namespace).patch(name, &PatchParams::default(), &Patch::Merge(&patch));
    match cluster.send(request).await {
        Ok(_) => Ok(true),
        Err(Failed::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
        Err(error) => Err(error.unavailable(format!("write Secret({namespace}/{name})"))),
    }
}
