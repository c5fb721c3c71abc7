//! Objects as the API server has them, and as the rest of Cali has them. Pure.
//!
//! What is not used is dropped as soon as an object is read: server-side apply's bookkeeping from all, and from Pods and
//! Nodes everything but what conversion and readers look at (a Pod shrinks to about a tenth). Native objects are therefore
//! never written back whole: an update sends the difference ([`difference`]).

use cali_api::Kind;
use serde_json::{Map, Value, json};

use super::places::{Group, Place};

/// Where Calico's older clients kept metadata that Kubernetes now keeps itself.
const METADATA_ANNOTATION: &str = "projectcalico.org/metadata";
/// kubectl's copy of the manifest.
pub(super) const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Metadata that the API server gives, and that a writer does not send.
const SERVERS_METADATA: [&str; 6] = [
    "uid",
    "creationTimestamp",
    "generation",
    "managedFields",
    "selfLink",
    "deletionTimestamp",
];

fn fields(value: &mut Value) -> Option<&mut Map<String, Value>> {
    value.as_object_mut()
}

fn remove(value: &mut Value, pointer: &str, name: &str) {
    if let Some(Value::Object(map)) = value.pointer_mut(pointer) {
        map.remove(name);
    }
}

/// An object from the API server, in the form that `cali_api` reads.
pub(super) fn read(kind: Kind, mut object: Value) -> Value {
    if let Some(map) = fields(&mut object) {
        map.insert("apiVersion".to_owned(), json!(kind.api_version()));
        map.insert("kind".to_owned(), json!(kind.name()));
    }
    for name in ["managedFields", "selfLink"] {
        remove(&mut object, "/metadata", name);
    }
    if kind.is_native() {
        remove(&mut object, "/metadata/annotations", LAST_APPLIED);
    } else {
        remove(&mut object, "/metadata/annotations", METADATA_ANNOTATION);
    }
    match kind {
        Kind::K8sPod => {
            keep(
                &mut object,
                "/spec",
                &[
                    "nodeName",
                    "serviceAccountName",
                    "hostNetwork",
                    "containers",
                ],
            );
            if let Some(Value::Array(containers)) = object.pointer_mut("/spec/containers") {
                for container in containers {
                    keep(container, "", &["name", "ports"]);
                }
            }
            keep(
                &mut object,
                "/status",
                &["phase", "podIP", "podIPs", "hostIP"],
            );
        }
        Kind::K8sNode => keep(&mut object, "/status", &["addresses"]),
        Kind::K8sNamespace => {
            remove(&mut object, "", "status");
        }
        _ => {}
    }
    object
}

fn keep(value: &mut Value, pointer: &str, names: &[&str]) {
    if let Some(Value::Object(map)) = value.pointer_mut(pointer) {
        map.retain(|name, _| names.contains(&name.as_str()));
    }
}

/// An object in the form that the API server takes.
pub(super) fn write(kind: Kind, group: Group, place: &Place, mut object: Value) -> Value {
    if let Some(map) = fields(&mut object) {
        map.insert("apiVersion".to_owned(), json!(place.version));
        map.insert("kind".to_owned(), json!(place.name));
    }
    if kind == Kind::BlockAffinity && group == Group::Internal {
        // Calico's internal resource has a text here, and requires it.
        let deleted = object.pointer("/spec/deleted") == Some(&json!(true));
        object["spec"]["deleted"] = json!(deleted.to_string());
    }
    object
}

/// Removes the metadata that the server gives, for an object that is to be created.
pub(super) fn forget_origin(object: &mut Value) {
    for name in SERVERS_METADATA {
        remove(object, "/metadata", name);
    }
}

/// The JSON merge patch (RFC 7386) that makes `new` of `old`; `None` if they are equal.
pub(super) fn difference(old: &Value, new: &Value) -> Option<Value> {
    let (Value::Object(before), Value::Object(after)) = (old, new) else {
        return (old != new).then(|| new.clone());
    };
    let mut patch = Map::new();
    for (name, value) in after {
        match before.get(name) {
            None => {
                patch.insert(name.clone(), value.clone());
            }
            Some(former) => {
                if let Some(change) = difference(former, value) {
                    patch.insert(name.clone(), change);
                }
            }
        }
    }
    for name in before.keys().filter(|name| !after.contains_key(*name)) {
        patch.insert(name.clone(), Value::Null);
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

/// The patches of an update: of the object, and of its status. Pods' and Nodes' labels and annotations go with the status,
/// because that is all that Calico's roles may write of them.
pub(super) fn patches(kind: Kind, old: &Value, new: &Value) -> (Option<Value>, Option<Value>) {
    let Some(Value::Object(mut whole)) = difference(old, new) else {
        return (None, None);
    };
    let mut status = Map::new();
    if let Some(change) = whole.remove("status").filter(|change| !change.is_null()) {
        status.insert("status".to_owned(), change);
    }
    let only_metadata = whole.keys().all(|name| name == "metadata");
    if matches!(kind, Kind::K8sPod | Kind::K8sNode)
        && only_metadata
        && let Some(metadata) = whole.remove("metadata")
    {
        status.insert("metadata".to_owned(), metadata);
    }
    let some = |map: Map<String, Value>| (!map.is_empty()).then_some(Value::Object(map));
    (some(whole), some(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Value {
        json!({
            "metadata": {
                "name": "p", "namespace": "a", "resourceVersion": "7",
                "managedFields": [{"manager": "kubelet"}],
                "annotations": {LAST_APPLIED: "{}", "mine": "x"}
            },
            "spec": {
                "nodeName": "n1", "volumes": [{"name": "v"}],
                "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80}]}]
            },
            "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"name": "c"}]}
        })
    }

    #[test]
    fn pods_shrink_to_what_is_used() {
        assert_eq!(
            read(Kind::K8sPod, pod()),
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "p", "namespace": "a", "resourceVersion": "7", "annotations": {"mine": "x"}},
                "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"containerPort": 80}]}]},
                "status": {"phase": "Running", "podIP": "10.0.0.1"}
            })
        );
    }

    #[test]
    fn a_pods_annotations_are_patched_beside_its_status() {
        let old = read(Kind::K8sPod, pod());
        let mut new = old.clone();
        new["metadata"]["annotations"] = json!({"cni.projectcalico.org/podIP": "10.0.0.1/32"});
        let expected = json!({"metadata": {"annotations": {"cni.projectcalico.org/podIP": "10.0.0.1/32", "mine": null}}});
        assert_eq!(patches(Kind::K8sPod, &old, &new), (None, Some(expected)));
        new["spec"]["hostNetwork"] = json!(true);
        let (whole, status) = patches(Kind::K8sPod, &old, &new);
        assert_eq!(whole.unwrap()["spec"], json!({"hostNetwork": true}));
        assert_eq!(status, None);
    }

    #[test]
    fn applying_the_difference_gives_the_new_object() {
        let old = json!({"a": {"b": 1, "c": [1, 2]}, "d": "x"});
        let new = json!({"a": {"b": 2, "c": [1]}, "e": {}});
        assert_eq!(
            difference(&old, &new),
            Some(json!({"a": {"b": 2, "c": [1]}, "d": null, "e": {}}))
        );
        assert_eq!(difference(&new, &new), None);
    }

    #[test]
    fn the_internal_affinity_says_deleted_in_words() {
        let place = super::super::places::place(Kind::BlockAffinity, Group::Internal);
        let written = write(
            Kind::BlockAffinity,
            Group::Internal,
            &place,
            json!({"spec": {"node": "n1", "cidr": "10.0.0.0/26", "state": "pending"}}),
        );
        assert_eq!(written["spec"]["deleted"], "false");
        assert_eq!(written["apiVersion"], "crd.projectcalico.org/v1");
    }
}
