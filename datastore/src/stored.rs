//! The stored form of an object: its JSON, and who owns which part of its metadata. Pure.
//!
//! Work is done on JSON, so that Calico's and Kubernetes' own types are treated alike.

use cali_api::{AnyResource, Key, Kind, Revision};
use serde_json::{Map, Value};

use crate::error::Error;
use crate::store::Versioned;

/// Annotations on native objects that belong to Calico's daemons, not to the author of a manifest.
const OWNED_ANNOTATIONS: [&str; 2] = ["cni.projectcalico.org/", "projectcalico.org/"];

/// Metadata that an API server and its controllers give, and that a manifest that is silent about it does not take away.
const GIVEN_METADATA: [&str; 5] = [
    "generation",
    "finalizers",
    "ownerReferences",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
];

/// The metadata that the store itself gives to an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: String,
    pub(crate) creation_timestamp: String,
}

/// A new random (version 4) UUID, from the kernel.
pub(crate) fn random_uid() -> Result<String, Error> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map_err(|error| Error::unavailable("make a uid", error))?;
    Ok(text.trim().to_owned())
}

pub(crate) fn to_value(object: &AnyResource) -> Result<Value, Error> {
    Ok(object.to_json())
}

pub(crate) fn from_value(key: &Key, value: Value) -> Result<AnyResource, Error> {
    AnyResource::from_json(value).map_err(|e| Error::Undecodable {
        key: key.clone(),
        reason: e.to_string(),
    })
}

fn metadata(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Value::Object(root) = value else {
        unreachable!("made an object above")
    };
    let slot = root
        .entry("metadata")
        .or_insert_with(|| Value::Object(Map::new()));
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    let Value::Object(metadata) = slot else {
        unreachable!("made an object above")
    };
    metadata
}

/// `metadata.resourceVersion` of an object.
pub(crate) fn revision_of(value: &Value) -> Option<&str> {
    value
        .pointer("/metadata/resourceVersion")?
        .as_str()
        .filter(|r| !r.is_empty())
}

pub(crate) fn set_revision(value: &mut Value, revision: &str) {
    metadata(value).insert("resourceVersion".into(), Value::String(revision.to_owned()));
}

pub(crate) fn clear_revision(value: &mut Value) {
    metadata(value).remove("resourceVersion");
}

pub(crate) fn set_identity(value: &mut Value, identity: &Identity) {
    let metadata = metadata(value);
    metadata.insert("uid".into(), Value::String(identity.uid.clone()));
    metadata.insert(
        "creationTimestamp".into(),
        Value::String(identity.creation_timestamp.clone()),
    );
}

/// The identity of a stored object. Objects written by this crate always have one.
pub(crate) fn identity(value: &Value) -> Identity {
    let text = |name: &str| {
        value
            .pointer(&format!("/metadata/{name}"))
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    Identity {
        uid: text("uid"),
        creation_timestamp: text("creationTimestamp"),
    }
}

/// Names a kind in the store: group and plural, because Kubernetes' and Calico's kinds share names.
pub(crate) fn kind_id(kind: Kind) -> String {
    format!("{}/{}", kind.api_version(), kind.plural())
}

/// The object without a revision, ready for `create`.
pub(crate) fn without_revision(object: &AnyResource) -> Result<AnyResource, Error> {
    let key = object.key();
    let mut value = to_value(object)?;
    clear_revision(&mut value);
    from_value(&key, value)
}

/// What an `apply` of `new` over `old` writes; `None` if that is what stands there already.
pub(crate) fn merged(old: &Versioned, new: &AnyResource) -> Result<Option<AnyResource>, Error> {
    let key = new.key();
    let before = to_value(&old.object)?;
    let mut with_defaults = new.clone();
    cali_api::defaults(&mut with_defaults);
    let mut after = to_value(&with_defaults)?;
    set_identity(&mut after, &identity(&before));
    set_revision(&mut after, old.revision.as_str());
    carry_over(key.kind, &before, &mut after);
    if before == after {
        return Ok(None);
    }
    from_value(&key, after).map(Some)
}

fn carry_over(kind: Kind, before: &Value, after: &mut Value) {
    if after.get("status").is_none_or(Value::is_null)
        && let (Some(status), Value::Object(root)) = (before.get("status"), &mut *after)
    {
        root.insert("status".into(), status.clone());
    }
    for name in GIVEN_METADATA {
        if let Some(value) = before.pointer(&format!("/metadata/{name}")) {
            metadata(after).entry(name).or_insert_with(|| value.clone());
        }
    }
    if !kind.is_native() {
        return;
    }
    let Some(Value::Object(annotations)) = before.pointer("/metadata/annotations") else {
        return;
    };
    let owned: Vec<_> = annotations
        .iter()
        .filter(|(name, _)| {
            OWNED_ANNOTATIONS
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .collect();
    if owned.is_empty() {
        return;
    }
    let slot = metadata(after)
        .entry("annotations")
        .or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(target) = slot {
        for (name, value) in owned {
            target.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
}

pub(crate) fn versioned(object: AnyResource, revision: &str) -> Versioned {
    Versioned {
        object: std::sync::Arc::new(object),
        revision: Revision::from(revision),
    }
}
