//! The folder of examples, `tests/kinds`: every kind of Calico with every field, written and read back.

use std::collections::BTreeSet;
use std::path::PathBuf;

use cali_api::schema::{Group, defined, definition};
use serde_json::Value;

use super::Terminal;

pub(crate) const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kinds");

/// Fields of the schema that no valid object has: some things are matched in one direction only.
const EXCLUDED: [&str; 7] = [
    "spec.egress[].http",
    "spec.egress[].source.services",
    "spec.ingress[].destination.services",
    "spec.importV4[].interface",
    "spec.importV4[].source",
    "spec.importV6[].interface",
    "spec.importV6[].source",
];

fn files() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(FOLDER).expect("the folder of examples");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files
}

fn kind(file: &std::path::Path) -> String {
    file.file_stem()
        .expect("a name")
        .to_string_lossy()
        .into_owned()
}

/// The documents of a file, in the order of their names.
fn documents(text: &str) -> Vec<Value> {
    let mut documents: Vec<Value> = text
        .split("---\n")
        .filter(|text| !text.trim().is_empty())
        .map(|text| serde_saphyr::from_str(text).expect("YAML"))
        .collect();
    documents.sort_by_key(name_of);
    documents
}

fn name_of(document: &Value) -> String {
    document["metadata"]["name"].to_string()
}

/// Applies each file and reads its objects back as YAML; they must be what the file says. Kinds of `left_out` are not tried.
pub(crate) fn come_back(terminal: &Terminal, left_out: &[&str]) {
    for file in files() {
        if left_out.contains(&kind(&file).as_str()) {
            continue;
        }
        let name = file.display().to_string();
        terminal.prints(&format!("apply -f {name}"));
        let mut wanted = documents(&std::fs::read_to_string(&file).expect("a file"));
        for document in &mut wanted {
            // It is where the object lies, which an export does not tell.
            if let Some(metadata) = document["metadata"].as_object_mut() {
                metadata.remove("namespace");
            }
        }
        let text = terminal.prints(&format!("get -f {name} -o yaml --export"));
        let mut found: Value = serde_saphyr::from_str(&text).expect("YAML");
        let mut found = match found.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => items,
            _ => vec![found],
        };
        found.sort_by_key(name_of);
        let lines = |values: &[Value]| -> Vec<String> {
            let text = serde_json::to_string_pretty(values).expect("JSON");
            text.lines().map(str::to_owned).collect()
        };
        let (found, wanted) = (lines(&found), lines(&wanted));
        let first = found
            .iter()
            .zip(&wanted)
            .position(|(found, wanted)| found != wanted);
        let around = |lines: &[String]| {
            let at = first.unwrap_or(0).saturating_sub(8);
            lines
                .iter()
                .skip(at)
                .take(20)
                .cloned()
                .collect::<Vec<_>>()
                .join("\n")
        };
        assert!(
            found == wanted,
            "{name}\nwas written:\n{}\ncame back:\n{}",
            around(&wanted),
            around(&found)
        );
    }
}

/// Every field of the schemas must be in an example.
pub(crate) fn are_complete() {
    let mut kinds = BTreeSet::new();
    for file in files() {
        kinds.insert(kind(&file));
    }
    for kind in defined() {
        let file = PathBuf::from(FOLDER).join(format!("{}.yaml", kind.name()));
        let examples = documents(&std::fs::read_to_string(&file).expect("an example"));
        let definition = definition(kind, Group::V3);
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
        let mut missing = Vec::new();
        for part in ["spec", "status"] {
            let values: Vec<&Value> = examples
                .iter()
                .filter_map(|example| example.get(part))
                .collect();
            look(&schema[part], part, &values, &mut missing);
        }
        missing.retain(|path| !EXCLUDED.contains(&path.as_str()));
        assert!(
            missing.is_empty(),
            "{} has no example of {missing:?}",
            kind.name()
        );
        kinds.remove(kind.name());
    }
    // These are not defined to an API server, which has them as views.
    assert_eq!(
        Vec::from_iter(kinds),
        ["Node", "Profile", "WorkloadEndpoint"]
    );
}

fn look(schema: &Value, path: &str, values: &[&Value], missing: &mut Vec<String>) {
    if let Some(fields) = schema["properties"].as_object() {
        for (name, field) in fields {
            let path = format!("{path}.{name}");
            let inner: Vec<&Value> = values.iter().filter_map(|value| value.get(name)).collect();
            if inner.is_empty() {
                missing.push(path);
            } else {
                look(field, &path, &inner, missing);
            }
        }
    }
    if schema["items"].is_object() {
        let inner: Vec<&Value> = values
            .iter()
            .filter_map(|value| value.as_array())
            .flatten()
            .collect();
        look(&schema["items"], &format!("{path}[]"), &inner, missing);
    }
}
