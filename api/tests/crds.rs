//! The resource definitions in `deploy/crds` are those of the types. `CALI_UPDATE=1` rewrites them.

use std::path::Path;
use std::sync::LazyLock;

use cali_api::Kind;
use cali_api::schema::{Group, defined, definition, manifest};
use cali_api::v3::Port;
use proptest::prelude::*;
use regex::Regex;
use serde_json::{Value, json};

fn spec(kind: Kind, group: Group) -> Value {
    let definition = definition(kind, group);
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone()
}

#[test]
fn the_files_are_current() {
    for (group, file) in [(Group::V3, "v3.yaml"), (Group::V1, "v1.yaml")] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../deploy/crds")
            .join(file);
        let wanted = manifest(group);
        if std::env::var_os("CALI_UPDATE").is_some() {
            std::fs::write(&path, &wanted).expect("the file can be written");
        }
        let stands = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            stands == wanted,
            "{} is not what the types say; run this test with CALI_UPDATE=1",
            path.display()
        );
    }
}

#[test]
fn every_field_of_a_pool_is_known_with_its_form() {
    let spec = spec(Kind::IPPool, Group::V3);
    assert_eq!(spec["required"], json!(["cidr"]));
    let fields = &spec["properties"];
    assert_eq!(
        fields["vxlanMode"]["enum"],
        json!(["Never", "Always", "CrossSubnet"])
    );
    assert_eq!(fields["natOutgoing"], json!({"type": "boolean"}));
    assert_eq!(fields["blockSize"]["maximum"], 255);
    assert_eq!(fields["allowedUses"]["items"]["type"], "string");
}

#[test]
fn rules_are_described_down_to_their_ports() {
    let spec = spec(Kind::GlobalNetworkPolicy, Group::V3);
    let rule = &spec["properties"]["ingress"]["items"];
    assert_eq!(rule["required"], json!(["action"]));
    let ports = &rule["properties"]["source"]["properties"]["ports"];
    assert_eq!(ports["items"]["x-kubernetes-int-or-string"], true);
    assert_eq!(ports["items"]["maximum"], 65_535);
    assert_eq!(ports["maxItems"], 50);
}

/// What the pattern of a port says to a text.
fn is_port(text: &str) -> bool {
    static PATTERN: LazyLock<Regex> = LazyLock::new(|| {
        let spec = spec(Kind::GlobalNetworkPolicy, Group::V3);
        let ports = "/properties/ingress/items/properties/source/properties/ports/items/pattern";
        let pattern = spec.pointer(ports).and_then(Value::as_str);
        Regex::new(pattern.expect("a pattern")).expect("a regular expression")
    });
    PATTERN.is_match(text)
}

#[test]
fn a_text_that_is_no_port_is_refused() {
    for bad in [
        "", "65536", "70000", "99999", "80:", ":80", "80:http", "1:2:3", "80-90", "1.5", "-1",
        "a b", "a/b",
    ] {
        assert!(!is_port(bad), "{bad:?}");
        assert!(bad.parse::<Port>().is_err(), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn what_is_a_port_to_the_programs_is_one_to_the_api_server(
        text in "[0-9]{1,7}|0{0,3}[0-9]{1,5}:[0-9]{1,5}|[a-z0-9_.:-]{1,12}|[0-9]{100}[a-zA-Z._-]{0,40}"
    ) {
        let known = text.parse::<Port>().is_ok();
        prop_assert!(!known || is_port(&text), "{text}");
    }
}

#[test]
fn free_addresses_of_a_block_are_null() {
    let block = spec(Kind::IPAMBlock, Group::V1);
    assert_eq!(
        block["properties"]["allocations"]["items"]["nullable"],
        true
    );
}

/// What a schema does not know the server drops: every kind must be known to its last field.
#[test]
fn nothing_is_left_open() {
    fn open(schema: &Value, path: &str, found: &mut Vec<String>) {
        if schema.get("x-kubernetes-preserve-unknown-fields").is_some() {
            found.push(path.to_owned());
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            open(field, &format!("{path}.{name}"), found);
        }
        for name in ["items", "additionalProperties"] {
            if schema.get(name).is_some() {
                open(&schema[name], &format!("{path}[]"), found);
            }
        }
    }
    let mut found = Vec::new();
    for kind in defined() {
        open(&spec(kind, Group::V3), &kind.to_string(), &mut found);
    }
    assert_eq!(found, Vec::<String>::new());
}
