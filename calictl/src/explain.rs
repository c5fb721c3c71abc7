//! `calictl explain KIND[.field...]`: the fields of a kind with their types, values and rules, from the schema that the API
//! server checks with.

use crate::columns;
use crate::output::{self, Style};
use crate::resources::parse_kind;
use anyhow::{Context, Result, bail};
use cali_api::Kind;
use cali_api::schema::{self, Group};
use clap::Args;
use serde_json::Value;

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// Kind, or a field of it: `ippool`, `bgppeer.spec.password`; without it, the kinds there are
    #[arg(value_name = "KIND[.FIELD]")]
    path: Option<String>,
    /// All fields below, not only the next ones
    #[arg(long)]
    recursive: bool,
}

/// Every kind of Calico's.
fn kinds() -> String {
    let rows: Vec<Vec<String>> = Kind::ALL
        .iter()
        .filter(|kind| !kind.is_native())
        .map(|kind| {
            vec![
                kind.plural().to_owned(),
                kind.to_string(),
                kind.is_namespaced().to_string(),
            ]
        })
        .collect();
    columns::render(&["NAME", "KIND", "NAMESPACED"], &rows)
}

pub(crate) fn run(explain: &Explain) -> Result<()> {
    let Some(path) = &explain.path else {
        output::write(kinds());
        return Ok(());
    };
    let mut words = path.split('.');
    let kind = parse_kind(words.next().unwrap_or_default())?;
    let whole = schema(kind)?;
    let mut at = &whole;
    let mut walked = kind.to_string();
    for word in words.filter(|word| !word.is_empty()) {
        let fields = fields(at);
        at = fields
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(word))
            .map(|(_, schema)| *schema)
            .with_context(|| unknown(&walked, word, &fields))?;
        walked = format!("{walked}.{word}");
    }
    output::write(page(kind, &walked, at, explain.recursive));
    Ok(())
}

pub(crate) fn schema(kind: Kind) -> Result<Value> {
    if !schema::defined().any(|defined| defined == kind) {
        bail!("{kind} has no definition of its own: in Kubernetes it is a view of other objects");
    }
    let definition = schema::definition(kind, Group::V3);
    definition
        .pointer("/spec/versions/0/schema/openAPIV3Schema")
        .cloned()
        .with_context(|| format!("{kind} has no schema"))
}

fn unknown(walked: &str, word: &str, fields: &[(&String, &Value)]) -> String {
    if fields.is_empty() {
        return format!("{walked} has no fields");
    }
    let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
    format!(
        "{walked} has no field {word:?}; it has {}",
        names.join(", ")
    )
}

/// The fields of an object, or of the objects of a list or map.
pub(crate) fn fields(schema: &Value) -> Vec<(&String, &Value)> {
    let inner = [schema, &schema["items"], &schema["additionalProperties"]];
    inner
        .iter()
        .filter_map(|schema| schema["properties"].as_object())
        .flatten()
        .collect()
}

fn page(kind: Kind, walked: &str, schema: &Value, recursive: bool) -> String {
    let mut text = format!(
        "{}  {kind}\n{}  {}\n{}  {walked} <{}>\n",
        Style::TITLE.paint("KIND:   "),
        Style::TITLE.paint("VERSION:"),
        kind.api_version(),
        Style::TITLE.paint("FIELD:  "),
        shape(schema)
    );
    for line in limits(schema) {
        text.push_str(&format!("          {line}\n"));
    }
    for rule in rules(schema) {
        text.push_str(&format!("          rule: {rule}\n"));
    }
    if !fields(schema).is_empty() {
        text.push_str(&format!("\n{}\n", Style::TITLE.paint("FIELDS:")));
        tree(schema, 1, recursive, &mut text);
    }
    text
}

fn tree(schema: &Value, depth: usize, recursive: bool, text: &mut String) {
    let required = |name: &str| {
        [schema, &schema["items"]].iter().any(|schema| {
            let names = schema["required"].as_array();
            names.is_some_and(|names| names.iter().any(|required| required == name))
        })
    };
    for (name, field) in fields(schema) {
        let mut notes = limits(field);
        if required(name) {
            notes.insert(0, "required".to_owned());
        }
        let notes = if notes.is_empty() {
            String::new()
        } else {
            format!("  {}", Style::DIM.paint(notes.join("; ")))
        };
        text.push_str(&format!(
            "{}{name} <{}>{notes}\n",
            "  ".repeat(depth),
            shape(field)
        ));
        if recursive {
            tree(field, depth + 1, true, text);
        }
    }
}

/// `string`, `[]object`, `map[string]integer`.
pub(crate) fn shape(schema: &Value) -> String {
    if schema["x-kubernetes-int-or-string"] == true {
        return "integer or string".to_owned();
    }
    match schema["type"].as_str() {
        Some("array") => format!("[]{}", shape(&schema["items"])),
        Some("object") if schema["additionalProperties"].is_object() => {
            format!("map[string]{}", shape(&schema["additionalProperties"]))
        }
        Some(word) => word.to_owned(),
        None => "any".to_owned(),
    }
}

/// What values are taken.
pub(crate) fn limits(schema: &Value) -> Vec<String> {
    let mut limits = Vec::new();
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<String> = values.iter().map(columns::text).collect();
        limits.push(format!("one of {}", values.join(", ")));
    }
    for (key, word) in [
        ("minimum", "at least"),
        ("maximum", "at most"),
        ("pattern", "like"),
        ("format", "format"),
        ("default", "default"),
    ] {
        if !schema[key].is_null() {
            limits.push(format!("{word} {}", columns::text(&schema[key])));
        }
    }
    limits
}

fn rules(schema: &Value) -> Vec<String> {
    let rules = schema["x-kubernetes-validations"].as_array();
    let said = |rule: &Value| {
        let text = if rule["message"].is_string() {
            &rule["message"]
        } else {
            &rule["rule"]
        };
        columns::text(text)
    };
    rules.into_iter().flatten().map(said).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_with_a_definition_has_a_page_with_fields() {
        for kind in schema::defined() {
            let whole = schema(kind).expect("a schema");
            let page = page(kind, &kind.to_string(), &whole, true);
            assert!(page.contains("spec <object>"), "{page}");
        }
    }

    #[test]
    fn a_field_that_is_not_there_is_answered_with_those_that_are() {
        let whole = schema(Kind::IPPool).expect("a schema");
        let said = unknown(
            "IPPool.spec",
            "vxlan",
            &fields(&whole["properties"]["spec"]),
        );
        assert!(said.contains("vxlanMode"), "{said}");
    }
}
