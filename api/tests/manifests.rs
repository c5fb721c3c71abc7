//! Manifests are read, refused and written as users of Calico expect.

use cali_api::{AnyResource, Kind, manifest};
use proptest::prelude::*;
use serde_json::Value;

fn errors(text: &str) -> Vec<String> {
    manifest::parse("file.yaml", text)
        .expect_err("the manifest has mistakes")
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn several_documents_and_lists_are_read_in_order() {
    let text = "\
# a comment
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: routed}
spec:
  cidr: 10.10.0.0/16
---
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata: {name: shop}
---
apiVersion: projectcalico.org/v3
kind: TierList
metadata: {resourceVersion: \"7\"}
items:
- metadata: {name: security}
  spec: {order: 10}
";
    let found = manifest::parse("file.yaml", text).unwrap();
    let keys: Vec<String> = found
        .iter()
        .map(|object| object.value.key().to_string())
        .collect();
    assert_eq!(
        keys,
        ["IPPool(routed)", "K8sNamespace(shop)", "Tier(security)"]
    );
    assert_eq!(
        found.iter().map(|object| object.line).collect::<Vec<_>>(),
        [3, 13, 21]
    );
}

#[test]
fn an_empty_file_holds_nothing() {
    for text in ["", "---\n", "# nothing\n", "---\n---\n"] {
        assert!(
            manifest::parse("file.yaml", text).unwrap().is_empty(),
            "{text:?}"
        );
    }
}

#[test]
fn every_mistake_is_told_with_its_place() {
    let text = "\
apiVersion: projectcalico.org/v3
kind: IPPool
metadata:
  name: a
spec:
  cidr: 10.10.0.0/16
  ipipmode: Always
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata:
  name: b
spec:
  cidr: 10.10.0.1/16
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata:
  name: c
spec:
  ingress:
  - action: Allow
  - action: Permit
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata:
  name: d
spec:
  egress:
  - action: Deny
    protocol: TCP
    destination:
      ports: [80, 90000]
---
apiVersion: projectcalico.org/v3
kind: IPPol
metadata: {name: e}
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {}
---
apiVersion: v1
kind: Pod
metadata: {name: f}
spec:
  containers:
  - name: c
    comand: [sleep]
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {name: g}
speck: {}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: h}
";
    assert_eq!(
        errors(text),
        [
            "file.yaml:7:3: spec.ipipmode: unknown field \"ipipmode\"; did you mean \"ipipMode\"?",
            "file.yaml:14:3: spec.cidr: 10.10.0.1/16 has bits set after its prefix; did you mean 10.10.0.0/16?",
            "file.yaml:23:5: spec.ingress[1].action: \"Permit\" is not one of Allow, Deny, Log, Pass",
            "file.yaml:34:19: spec.egress[0].destination.ports[1]: \"90000\" is not a port (a number from 0 to 65535, a range \"a:b\" or a name)",
            "file.yaml:37:1: kind: there is no kind \"IPPol\" in \"projectcalico.org/v3\"; did you mean \"IPPool\"?",
            "file.yaml:42:1: metadata.name: is missing",
            "file.yaml:50:5: spec.containers[0].comand: unknown field \"comand\"",
            "file.yaml:55:1: speck: unknown field \"speck\"; did you mean \"spec\"?",
            "file.yaml:57:1: spec: the field \"cidr\" is missing",
        ]
    );
}

#[test]
fn an_unknown_field_without_a_near_name_lists_short_alternatives() {
    let text =
        "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: t}\nspec: {colour: red}\n";
    assert_eq!(
        errors(text),
        ["file.yaml:4:8: spec.colour: unknown field \"colour\"; known are order, defaultAction"]
    );
}

#[test]
fn text_that_is_no_yaml_is_refused_with_its_place() {
    let found = errors("a: [1, 2\nb: }\n");
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("file.yaml:2:"), "{found:?}");
    assert!(found[0].contains("not valid YAML"), "{found:?}");
}

#[test]
fn a_document_that_is_no_object_is_refused() {
    assert_eq!(
        errors("- a\n- b\n"),
        ["file.yaml:1:1: an object must be a map with apiVersion, kind, metadata and spec"]
    );
    assert_eq!(
        errors("kind: IPPool\n"),
        ["file.yaml:1:1: apiVersion: is missing"]
    );
}

#[test]
fn metadata_of_an_export_is_accepted_and_kept() {
    let text = r#"{
        "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
        "metadata": {
            "name": "s", "uid": "u", "resourceVersion": "12", "generation": 2, "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"a": "b"}, "annotations": {"c": "d"}, "finalizers": ["f"],
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "x", "controller": true}],
            "managedFields": [{"manager": "kubectl", "operation": "Apply", "fieldsV1": {"f:spec": {}}}]
        },
        "spec": {"nets": ["10.0.0.0/8", "192.0.2.1"]}
    }"#;
    let found = manifest::parse("file.json", text).unwrap();
    assert_eq!(
        found[0].value.to_json(),
        serde_json::from_str::<Value>(text).unwrap()
    );
}

#[test]
fn nulls_are_absent_fields() {
    let text = "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: p\n  creationTimestamp: null\n  labels: null\nspec:\n  cidr: 10.0.0.0/8\n  nodeSelector: null\nstatus: null\n";
    let found = manifest::parse("file.yaml", text).unwrap();
    assert_eq!(found[0].value.metadata().creation_timestamp, None);
}

/// A full example of each Calico kind, in Calico's own spelling.
const EXAMPLES: &str = include_str!("examples.yaml");

#[test]
fn every_calico_kind_round_trips_unchanged() {
    let objects = manifest::parse("examples.yaml", EXAMPLES).unwrap_or_else(|errors| {
        panic!(
            "{}",
            errors.iter().map(|e| format!("{e}\n")).collect::<String>()
        )
    });
    let written: Vec<Value> = serde_saphyr::from_multiple(EXAMPLES).unwrap();
    assert_eq!(objects.len(), written.len());
    for (object, written) in objects.iter().zip(&written) {
        assert_eq!(&object.value.to_json(), written, "{}", object.value.key());
        let again = AnyResource::from_slice(&serde_json::to_vec(&object.value).unwrap()).unwrap();
        assert_eq!(again, object.value);
    }
    let mut missing: Vec<Kind> = Kind::ALL
        .iter()
        .copied()
        .filter(|kind| !kind.is_native())
        .collect();
    missing.retain(|kind| !objects.iter().any(|object| object.value.kind() == *kind));
    assert_eq!(missing, [], "every kind has an example");
}

#[test]
fn every_example_is_valid_also_with_its_defaults() {
    for mut object in manifest::parse("examples.yaml", EXAMPLES).unwrap() {
        assert_eq!(
            cali_api::validate(&object.value),
            Ok(()),
            "{}",
            object.value.key()
        );
        cali_api::defaults(&mut object.value);
        assert_eq!(
            cali_api::validate(&object.value),
            Ok(()),
            "{}",
            object.value.key()
        );
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused_without_panic(text in "\\PC{0,200}") {
        let _ = manifest::parse("file.yaml", &text);
    }

    #[test]
    fn a_damaged_manifest_is_read_or_refused_without_panic(
        start in 0usize..EXAMPLES.len(), length in 0usize..40, insert in "[-:{}\\[\\]\"' \\n#&*!a-z0-9]{0,6}",
    ) {
        let mut text = EXAMPLES.as_bytes().to_vec();
        let end = (start + length).min(text.len());
        text.splice(start..end, insert.bytes());
        if let Ok(text) = String::from_utf8(text) {
            let _ = manifest::parse("file.yaml", &text);
        }
    }
}

/// What `calictl datastore export` writes of a large cluster.
#[test]
fn a_manifest_may_be_as_large_as_a_cluster() {
    let tier = |number: usize| {
        format!(
            "---\napiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {{name: t{number}}}\nspec: {{order: {number}}}\n"
        )
    };
    let documents: String = (0..3_000).map(tier).collect();
    let parse = |text: &str| manifest::parse("file.yaml", text);
    assert_eq!(parse(&documents).unwrap().len(), 3_000);
    let nets: String = (0..300_000_u32)
        .map(|number| format!("  - {}/32\n", std::net::Ipv4Addr::from(number)))
        .collect();
    let set = format!(
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkSet\nmetadata: {{name: many}}\nspec:\n  nets:\n{nets}"
    );
    assert_eq!(parse(&set).unwrap().len(), 1);
    // A few lines that stand for thousands of millions.
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let former = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb += &format!("a{level}: &a{level} [{former}]\n");
    }
    assert!(parse(&bomb).is_err());
}

#[test]
fn a_kind_that_is_not_there_is_told_from_one_that_is_elsewhere() {
    for (api_version, kind, advice) in [
        (
            "projectcalico.org/v3",
            "FelixConfig",
            "; did you mean \"FelixConfiguration\"?",
        ),
        (
            "projectcalico.org/v3",
            "networkpolicy",
            "; did you mean \"NetworkPolicy\"?",
        ),
        ("v1", "IPPool", "; it is in projectcalico.org/v3"),
        (
            "projectcalico.org/v1",
            "BGPPear",
            "; did you mean \"BGPPeer\" in projectcalico.org/v3?",
        ),
        ("apps/v1", "Deployment", ""),
    ] {
        let object =
            serde_json::json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "a"}});
        let error = AnyResource::from_json(object).expect_err(kind);
        assert_eq!(
            error.to_string(),
            format!("kind: there is no kind {kind:?} in {api_version:?}{advice}")
        );
    }
}
