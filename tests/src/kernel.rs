//! A node's kernel state, as the system's own tools print it, without what changes by itself.

use crate::lab::Lab;
use anyhow::{Context, Result};
use serde_json::Value;

/// Normalised dumps: routes, nexthops, links, permanent neighbours, FDB, nf_tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dump(Vec<(String, Vec<String>)>);

/// Keys that a running system changes without anyone's doing.
const VOLATILE: &[&str] = &[
    "handle",
    "packets",
    "bytes",
    "expires",
    "used",
    "stats",
    "stats64",
    "carrier_changes",
    "metainfo",
    "bc_queue_len",
];

impl Dump {
    pub fn of(lab: &Lab, node: &str) -> Result<Self> {
        let commands: [(&str, &[&str]); 7] = [
            (
                "routes v4",
                &["ip", "-j", "-4", "route", "show", "table", "all"],
            ),
            (
                "routes v6",
                &["ip", "-j", "-6", "route", "show", "table", "all"],
            ),
            ("nexthops", &["ip", "-j", "nexthop"]),
            ("links", &["ip", "-j", "-d", "link"]),
            (
                "neighbours",
                &["ip", "-j", "neigh", "show", "nud", "permanent"],
            ),
            ("fdb", &["bridge", "-j", "fdb"]),
            ("nftables", &["nft", "-j", "list", "ruleset"]),
        ];
        let mut sections = Vec::with_capacity(commands.len());
        for (name, words) in commands {
            let text = lab.exec(node, words)?;
            let mut value: Value = if text.trim().is_empty() {
                Value::Null
            } else {
                serde_json::from_str(&text).with_context(|| format!("{words:?} printed no JSON"))?
            };
            normalise(&mut value);
            let items = match &value {
                Value::Array(items) => items.as_slice(),
                Value::Object(object) => object
                    .get("nftables")
                    .and_then(Value::as_array)
                    .map_or(&[][..], Vec::as_slice),
                _ => &[],
            };
            let mut lines: Vec<String> = items
                .iter()
                .map(Value::to_string)
                .filter(|line| line != "{}")
                .collect();
            lines.sort();
            sections.push((name.to_owned(), lines));
        }
        Ok(Self(sections))
    }

    /// What differs, line by line; empty if nothing does.
    pub fn difference(&self, later: &Self) -> String {
        let mut text = String::new();
        for ((name, before), (_, after)) in self.0.iter().zip(&later.0) {
            for line in before.iter().filter(|line| !after.contains(line)) {
                text.push_str(&format!("{name}: - {line}\n"));
            }
            for line in after.iter().filter(|line| !before.contains(line)) {
                text.push_str(&format!("{name}: + {line}\n"));
            }
        }
        text
    }
}

fn normalise(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.retain(|key, _| !VOLATILE.contains(&key.as_str()));
            object.values_mut().for_each(normalise);
        }
        Value::Array(items) => {
            items.iter_mut().for_each(normalise);
            // Elements of sets and maps have no order of their own.
            if items.iter().all(|item| !item.is_object()) {
                items.sort_by_key(Value::to_string);
            }
        }
        _ => {}
    }
}
