//! Warnings as Kubernetes' Events, which `kubectl describe` shows beside the object. Pure.
//!
//! The name of an Event says whom it is about, who says it and what: the same warning again is the same Event.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::SystemTime;

use cali_api::kubernetes::NETWORK_POLICY_PREFIX;
use cali_api::{Key, Kind};
use serde_json::{Value, json};

use super::places::{Group, place};
use crate::store::Warning;
use crate::timestamp;

/// Longest note that the API server takes, in octets (`validateV1Event`, pkg/apis/core/validation/events.go).
const NOTE_LIMIT: usize = 1024;
/// Longest part of the object's name within the Event's.
const NAME_LIMIT: usize = 200;
/// Where Events about objects of the whole cluster are kept, as Kubernetes' own recorder has it.
const CLUSTER_NAMESPACE: &str = "default";

/// The object as the cluster knows it: a policy that was made from a NetworkPolicy of Kubernetes is that one.
fn origin(about: &Key) -> Key {
    match about.name.strip_prefix(NETWORK_POLICY_PREFIX) {
        Some(name) if about.kind == Kind::NetworkPolicy => Key {
            kind: Kind::K8sNetworkPolicy,
            name: name.into(),
            ..about.clone()
        },
        _ => about.clone(),
    }
}

/// Namespace, name and body of the Event.
pub(super) fn event(warning: &Warning, group: Group, now: SystemTime) -> (String, String, Value) {
    let about = origin(&warning.about);
    let place = place(about.kind, group);
    let namespace = about.namespace.as_deref().unwrap_or(CLUSTER_NAMESPACE);
    let mut hasher = DefaultHasher::new();
    (&about, &warning.node, warning.reason, &warning.note).hash(&mut hasher);
    let name = format!(
        "{}.{:016x}",
        cut(&about.name, NAME_LIMIT).trim_end_matches(['.', '-']),
        hasher.finish()
    );
    let now = timestamp::format(now);
    let body = json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {
            "apiVersion": place.version,
            "kind": place.name,
            "name": about.name,
            "namespace": about.namespace,
        },
        "type": "Warning",
        "reason": warning.reason,
        "message": cut(&warning.note, NOTE_LIMIT),
        "source": {"component": "cali-node", "host": warning.node},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    });
    (namespace.to_owned(), name, body)
}

/// What an Event that stands already is changed by: it was seen once more.
pub(super) fn again(stands: &Value, now: SystemTime) -> Value {
    let count = stands.get("count").and_then(Value::as_i64).unwrap_or(1);
    json!({"count": count.saturating_add(1), "lastTimestamp": timestamp::format(now)})
}

fn cut(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn warning(about: Key, note: &str) -> Warning {
        Warning {
            about,
            node: "node1".to_owned(),
            reason: "NotEnforced",
            note: note.to_owned(),
        }
    }

    #[test]
    fn a_policy_of_kubernetes_is_spoken_of_by_its_own_name() {
        let about = Key::namespaced(Kind::NetworkPolicy, "shop", "knp.default.web");
        let (namespace, name, body) = event(&warning(about, "x"), Group::Internal, UNIX_EPOCH);
        assert_eq!(namespace, "shop");
        assert!(name.starts_with("web."), "{name}");
        assert_eq!(
            body["involvedObject"],
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "name": "web", "namespace": "shop"})
        );
    }

    #[test]
    fn the_same_warning_has_the_same_name_and_another_note_another() {
        let about = Key::cluster(Kind::GlobalNetworkPolicy, "default.deny");
        let one = event(&warning(about.clone(), "a"), Group::Internal, UNIX_EPOCH);
        let later = UNIX_EPOCH + Duration::from_secs(60);
        let two = event(&warning(about.clone(), "a"), Group::Internal, later);
        let other = event(&warning(about, "b"), Group::Internal, UNIX_EPOCH);
        assert_eq!((&one.0, &one.1), (&two.0, &two.1));
        assert_eq!(one.0, "default");
        assert_ne!(one.1, other.1);
        let change = again(&one.2, later);
        assert_eq!(
            change,
            json!({"count": 2, "lastTimestamp": "1970-01-01T00:01:00Z"})
        );
    }

    #[test]
    fn long_names_and_notes_are_cut_between_characters() {
        let about = Key::cluster(Kind::GlobalNetworkPolicy, "n".repeat(253));
        let note = format!("{}é", "x".repeat(NOTE_LIMIT - 1));
        let (_, name, body) = event(&warning(about, &note), Group::Native, UNIX_EPOCH);
        assert!(name.len() < 253, "{name}");
        assert_eq!(body["message"].as_str().unwrap().len(), NOTE_LIMIT - 1);
    }
}
